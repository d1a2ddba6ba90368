"""Rows of files: JSON lines, a JSON array, CSV, Parquet and Arrow; one file, or the shards of a folder or pattern."""

import csv
import functools
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dapo_jax.data.rows import MAX_ANSWER_CHARS, BadRow
from dapo_jax.types import InputError

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv", ".arrow")
_MAX_ROW_BYTES = 16 << 20  # a line of JSON; bounds memory on a file without line ends
_MAX_ARRAY_BYTES = 256 << 20  # of JSON, which is decoded whole
_BATCH = 4096  # rows of a table

Rows = Iterator[tuple[int, Any]]  # numbered from 1; a row that cannot be read is a BadRow


def is_prepared(folder: str) -> bool:
    """Whether tensorflow-datasets prepared a folder. Hugging Face's datasets too writes a dataset_info.json, and state.json beside it."""
    return os.path.isfile(f"{folder}/dataset_info.json") and not os.path.isfile(f"{folder}/state.json")


def files_of(source: str, path: str, heldout: bool) -> list[str]:
    """The files of a data set in their order. Messages call `path`, a file, folder or pattern (`*`) of this machine, `source`.

    A folder is one that `datasets.save_to_disk` wrote, or holds shards of one kind; where these or their names (`train-*.parquet`)
    tell splits apart, they are those of one split. Raises InputError if there is no such file, or its kind is not known.
    """
    if os.path.isfile(f"{path}/dataset_dict.json"):
        path = os.path.join(path, choose_split(source, _listed(source, path, "dataset_dict.json", "splits"), heldout))
    if os.path.isfile(f"{path}/state.json"):
        names = [shard.get("filename") for shard in _listed(source, path, "state.json", "_data_files")]
        return [os.path.join(path, os.path.basename(str(name))) for name in names]
    if os.path.isdir(path):
        return [os.path.join(path, name) for name in _shards(source, sorted(os.listdir(path)), heldout)]
    found = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) and not os.path.exists(path) else [path]
    if not found:
        raise InputError(f"{source}: no file has such a name; correct the pattern")
    if not all(file.endswith(ENDINGS) for file in found):
        raise InputError(
            f"{source}: not a known kind of data set; give {', '.join(ENDINGS)}, a folder or pattern of such, a prepared folder, "
            "or `arithmetic`"
        )
    return found


def choose_split(source: str, splits: list[str], heldout: bool) -> str:
    """The only split, or where there are several `train`, and for `heldout` problems `test` or `validation`."""
    wanted = ("test", "validation") if heldout else ("train",)
    found = splits if len(splits) == 1 else [name for name in wanted if name in splits]
    if not found:
        raise InputError(f"{source}: has none of the splits {', '.join(wanted)} among {', '.join(splits)}; prepare one of them alone")
    return found[0]


def _listed(source: str, folder: str, name: str, key: str) -> list[Any]:
    try:
        found = json.loads(Path(folder, name).read_bytes())[key]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        found = None
    if not isinstance(found, list) or not found or not all(isinstance(one, str if key == "splits" else dict) for one in found):
        raise InputError(f"{source}: {name}: {key}: not a list that datasets.save_to_disk wrote; save it again")
    return found


def _shards(source: str, names: list[str], heldout: bool) -> list[str]:
    kind = next((ending for ending in ENDINGS for name in names if name.endswith(ending)), None)
    if kind is None:
        raise InputError(f"{source}: holds no dataset_info.json, and no {', '.join(ENDINGS)}; give a data set's file or folder")
    names = [name for name in names if name.endswith(kind)]
    splits: dict[str, list[str]] = {}
    for name in names:
        if split := re.match(r"(train|test|validation)(?![a-z])", name):
            splits.setdefault(split[0], []).append(name)
    return splits[choose_split(source, [*splits], heldout)] if splits else names


def rows_of(source: str, files: list[str], columns: list[str]) -> Rows:
    """The rows of files one after the other. columns: all that are needed, `a.b` for field b of a; more of them may be there.

    Raises InputError for a damaged file, and OSError.
    """
    number = before = 0
    for file in files:
        where = source if len(files) == 1 else f"{source}: {os.path.basename(file)}"
        for number, row in _reader(file)(where, file, columns):
            yield before + number, row
        before += number
        number = 0


def _reader(file: str) -> Callable[[str, str, list[str]], Rows]:
    if file.endswith(".parquet"):
        return _parquet
    if file.endswith(".arrow"):
        return _arrow
    if file.endswith(".csv"):
        return _csv
    return _json if file.endswith(".json") else _json_lines


# --------------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------------


def _json_lines(where: str, path: str, columns: list[str]) -> Rows:
    """Lines that are not blank, without byte-order mark. Of an overlong line only the start is kept."""
    number = 0
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as stream:
            while line := _line(stream):
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, _row_of_line(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise InputError(f"{where}: corrupt gzip after row {number} ({e}); fetch the file again") from None


def _line(stream: io.BufferedIOBase) -> bytes:
    line = stream.readline(_MAX_ROW_BYTES + 1)
    rest = line
    while len(rest) > _MAX_ROW_BYTES and not rest.endswith(b"\n"):
        rest = stream.readline(_MAX_ROW_BYTES + 1)
    return line


def _row_of_line(line: bytes) -> Any:
    if len(line) > _MAX_ROW_BYTES:
        return BadRow(f"longer than {_MAX_ROW_BYTES >> 20} MB")
    try:
        return _JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, RecursionError):
        return BadRow("not JSON")


def _whole_number(digits: str) -> int | str:
    return int(digits) if len(digits) <= MAX_ANSWER_CHARS else digits  # int() refuses, or takes long over, thousands of digits


_JSON = json.JSONDecoder(parse_int=_whole_number)


def _json(where: str, path: str, columns: list[str]) -> Rows:
    """An array of rows, or lines as in .jsonl."""
    with open(path, "rb") as stream:
        if not stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _json_lines(where, path, columns)
            return
        if os.fstat(stream.fileno()).st_size > _MAX_ARRAY_BYTES:
            raise InputError(f"{where}: a JSON array larger than {_MAX_ARRAY_BYTES >> 20} MB; write it as .jsonl, a row a line")
        stream.seek(0)
        try:
            rows = _JSON.decode(stream.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as e:
            raise InputError(f"{where}: not a JSON array ({_first_line(e)}); fetch the file again, or write it as .jsonl") from None
    yield from enumerate(rows, 1)


def _csv(where: str, path: str, columns: list[str]) -> Rows:
    """Rows under the names of the first one; empty cells are None. Lone surrogates stand for bytes that are not UTF-8."""
    csv.field_size_limit(_MAX_ROW_BYTES)
    number = 0
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        reader = csv.DictReader(iter(functools.partial(stream.readline, _MAX_ROW_BYTES), ""), restkey="")
        try:
            for number, row in enumerate(reader, 1):
                yield number, {name: value or None for name, value in row.items()}
        except csv.Error as e:
            raise InputError(f"{where}: not CSV after row {number} ({e}); correct the quotes there") from None


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------


def _parquet(where: str, path: str, columns: list[str]) -> Rows:
    import pyarrow.parquet as pq  # not at the top, as in `_arrow`: few files need it

    def batches() -> Iterator[Any]:
        with pq.ParquetFile(path) as file:
            yield file.schema_arrow.names
            yield from file.iter_batches(_BATCH, columns=columns)

    return _table_rows(where, "Parquet", batches())


def _arrow(where: str, path: str, columns: list[str]) -> Rows:
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with pa.OSFile(path) as file, pa.ipc.open_stream(file) as reader:
            yield (names := reader.schema.names)
            needed = {column.partition(".")[0] for column in columns} | {*columns}
            for batch in reader:
                batch = batch.select([i for i, name in enumerate(names) if name in needed])
                yield from (batch.slice(start, _BATCH) for start in range(0, len(batch), _BATCH))

    return _table_rows(where, "Arrow", batches())


def _table_rows(where: str, kind: str, batches: Iterator[Any]) -> Rows:
    """Rows as plain Python objects, a record batch in memory at a time. batches: the names of all columns, then those read of the rows.

    Columns that were not read are None, so that a row says what it has.
    """
    import pyarrow as pa

    number = 0
    try:
        names = next(batches)
        for batch in batches:
            unread = dict.fromkeys(names) | dict.fromkeys(batch.schema.names)
            for row in _plain_rows(batch):
                number += 1
                yield number, row if isinstance(row, BadRow) else unread | row
    except (FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowException, OSError, ValueError) as e:  # ValueError: names of columns that are not UTF-8
        raise InputError(f"{where}: corrupt {kind} after row {number} ({_first_line(e)}); fetch the file again") from None


def _plain_rows(batch: Any) -> Iterable[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # writers may store any bytes as text; find the rows that hold them
        bad = "prompt is not valid Unicode"
    except (ArithmeticError, LookupError, ValueError):  # a date beyond the year 9999, a time zone that nobody knows
        bad = "answer is neither text nor a finite number"
    if len(batch) == 1:
        return [BadRow(bad)]
    half = len(batch) // 2
    return [*_plain_rows(batch.slice(0, half)), *_plain_rows(batch.slice(half))]


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
