"""Rows of files: JSON lines, a JSON array, CSV, Parquet and Arrow; one file, or the shards of a
folder or pattern.

Tables and prepared folders are read in a process of their own (`runtime/sandbox.py`): their readers
are native code, which believes what a file says of its sizes. A row of more than 16 MB is a bad
row, and a file that grows to a thousand times its size is refused.
"""

import csv
import functools
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dapo_jax.config import open_regular
from dapo_jax.data.rows import MAX_ANSWER_CHARS, BadRow
from dapo_jax.runtime.sandbox import ConfinedError, results
from dapo_jax.types import InputError

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv", ".arrow")
MAX_ROW_BYTES = 16 << 20  # a line of JSON; bounds memory on a file without line ends
_MAX_ARRAY_BYTES = 256 << 20  # of JSON, which is decoded whole
_BATCH = 4096  # rows of a table
_PIECE_BYTES = 1 << 20  # of its rows that become Python objects together
_DEADLINE_S = 120.0  # for the next piece
_MEMORY_BYTES = 2 << 30  # of the process that reads a table, and four times its size
_MAX_BLANK = 1_000_000  # lines together
# What a file may grow to when it is read: so many times its size, or the least. A row counts as a
# kilobyte more than its text.
_MAX_RATIO, _LEAST_BYTES, _ROW_BYTES = 1000, 1 << 30, 1000

Rows = Iterator[tuple[int, Any]]  # numbered from 1; a row that cannot be read is a BadRow


def is_prepared(folder: str) -> bool:
    """Whether tensorflow-datasets prepared a folder.

    Hugging Face's datasets too writes a dataset_info.json, and state.json beside it.
    """
    return os.path.isfile(f"{folder}/dataset_info.json") and not os.path.isfile(
        f"{folder}/state.json"
    )


def files_of(source: str, path: str, heldout: bool) -> list[str]:
    """The files of a data set in their order.

    Messages call `path`, a file, folder or pattern (`*`) of this machine, `source`.

    A folder is one that `datasets.save_to_disk` wrote, or holds shards of one kind; where these or
    their names (`train-*.parquet`) tell splits apart, they are those of one split. Raises
    InputError if there is no such file, or its kind is not known.
    """
    if os.path.isfile(f"{path}/dataset_dict.json"):
        path = os.path.join(
            path,
            choose_split(source, _listed(source, path, "dataset_dict.json", "splits"), heldout),
        )
    if os.path.isfile(f"{path}/state.json"):
        names = [
            shard.get("filename") for shard in _listed(source, path, "state.json", "_data_files")
        ]
        return [os.path.join(path, os.path.basename(str(name))) for name in names]
    if os.path.isdir(path):
        return [
            os.path.join(path, name) for name in _shards(source, sorted(os.listdir(path)), heldout)
        ]
    found = (
        sorted(glob.glob(path, recursive=True))
        if glob.has_magic(path) and not os.path.exists(path)
        else [path]
    )
    if not found:
        raise InputError(f"{source}: no file has such a name; correct the pattern")
    if not all(file.endswith(ENDINGS) for file in found):
        raise InputError(
            f"{source}: not a known kind of data set; give {', '.join(ENDINGS)}, a folder or pattern of such, a prepared folder, "
            "or `arithmetic`"
        )
    return found


def choose_split(source: str, splits: list[str], heldout: bool) -> str:
    """The only split, or where there are several `train`, and for `heldout` problems `test` or
    `validation`.
    """
    wanted = ("test", "validation") if heldout else ("train",)
    found = splits if len(splits) == 1 else [name for name in wanted if name in splits]
    if not found:
        raise InputError(
            f"{source}: has none of the splits {', '.join(wanted)} among {', '.join(splits)}; prepare one of them alone"
        )
    return found[0]


def _listed(source: str, folder: str, name: str, key: str) -> list[Any]:
    try:
        found = json.loads(Path(folder, name).read_bytes())[key]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        found = None
    if (
        not isinstance(found, list)
        or not found
        or not all(isinstance(one, str if key == "splits" else dict) for one in found)
    ):
        raise InputError(
            f"{source}: {name}: {key}: not a list that datasets.save_to_disk wrote; save it again"
        )
    return found


def _shards(source: str, names: list[str], heldout: bool) -> list[str]:
    names = [name for name in names if name != "features.json"]  # of a prepared folder
    kind = next((ending for ending in ENDINGS for name in names if name.endswith(ending)), None)
    if kind is None:
        raise InputError(
            f"{source}: holds no dataset_info.json, and no {', '.join(ENDINGS)}; give a data set's file or folder"
        )
    names = [name for name in names if name.endswith(kind)]
    splits: dict[str, list[str]] = {}
    for name in names:
        if split := re.match(r"(train|test|validation)(?![a-z])", name):
            splits.setdefault(split[0], []).append(name)
    return splits[choose_split(source, [*splits], heldout)] if splits else names


def rows_of(source: str, files: list[str], columns: list[str]) -> Rows:
    """The rows of files one after the other. columns: all that are needed, `a.b` for field b of a;
    more of them may be there.

    Raises InputError for a damaged file, and OSError.
    """
    number = before = 0
    for file in files:
        where = source if len(files) == 1 else f"{source}: {os.path.basename(file)}"
        for number, row in _reader(file)(where, file, columns):
            yield before + number, row
        before += number
        number = 0


def prepared_rows(source: str, folder: str, heldout: bool) -> Rows:
    """The records of a folder that tensorflow-datasets prepared: of its only split, or as
    `choose_split` says.
    """
    return _table(
        "dapo_jax.data.tfds_builder:records",
        source,
        [source, folder, heldout],
        [entry.path for entry in os.scandir(folder) if not entry.is_dir()],
    )


def _table(work: str, where: str, order: list[Any], files: list[str]) -> Rows:
    """The rows that `work`, in a process of its own, makes of an order.

    It yields [bytes, rows], a row that cannot be read as its reason.

    files: that it will open.
    """
    for file in files:
        open_regular(file).close()
    size = sum(map(os.path.getsize, files))
    number = read = 0
    try:
        for more, rows in results(
            work, [order], deadline_s=_DEADLINE_S, memory_bytes=_MEMORY_BYTES + 4 * size
        ):
            for row in rows:
                number += 1
                yield number, BadRow(row) if isinstance(row, str) else row
            read += more + _ROW_BYTES * len(rows)
            _check_growth(where, number, read, size)
    except ConfinedError as e:
        raise InputError(
            f"{where}: cannot be read after row {number} ({e}); write its rows as .jsonl, or in smaller files"
        ) from None


def _check_growth(where: str, number: int, read: int, size: int) -> None:
    if read > max(_LEAST_BYTES, _MAX_RATIO * size):
        raise InputError(
            f"{where}: row {number}: the rows so far are over {_MAX_RATIO} times the file's {size:,} bytes; leave out repeated ones"
        )


def _reader(file: str) -> Callable[[str, str, list[str]], Rows]:
    if file.endswith((".parquet", ".arrow")):
        return lambda where, path, columns: _table(
            f"{__name__}:table_rows", where, [where, path, columns], [path]
        )
    if file.endswith(".csv"):
        return _csv
    return _json if file.endswith(".json") else _json_lines


# --------------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------------


def _json_lines(where: str, path: str, columns: list[str]) -> Rows:
    """Lines that are not blank, without byte-order mark.

    Of an overlong line only the start is kept.
    """
    number = blank = read = 0
    try:
        with (
            open_regular(path) as file,
            gzip.open(file) if path.endswith(".gz") else file as stream,
        ):
            size = os.fstat(file.fileno()).st_size
            while line := _line(stream, where, number):
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, _row_of_line(line)
                    blank, read = 0, read + len(line) + _ROW_BYTES
                    _check_growth(where, number, read, size)
                elif (blank := blank + 1) > _MAX_BLANK:
                    raise InputError(
                        f"{where}: {_MAX_BLANK:,} blank lines up to line {number:,}; remove them"
                    )
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise InputError(
            f"{where}: corrupt gzip after row {number} ({e}); fetch the file again"
        ) from None


def _line(stream: Any, where: str, number: int) -> bytes:
    line = rest = stream.readline(MAX_ROW_BYTES + 1)
    length = 0
    while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):
        rest = stream.readline(MAX_ROW_BYTES + 1)
        if (length := length + len(rest)) > _LEAST_BYTES:
            raise InputError(
                f"{where}: row {number + 1} has over {_LEAST_BYTES >> 30} GB; give a file of JSON lines, a row a line"
            )
    return line


def _row_of_line(line: bytes) -> Any:
    if len(line) > MAX_ROW_BYTES:
        return BadRow(f"longer than {MAX_ROW_BYTES >> 20} MB")
    try:
        return _JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, RecursionError):
        return BadRow("not JSON")


def _whole_number(digits: str) -> int | str:
    return (
        int(digits) if len(digits) <= MAX_ANSWER_CHARS else digits
    )  # int() refuses, or takes long over, thousands of digits


_JSON = json.JSONDecoder(parse_int=_whole_number)


def _json(where: str, path: str, columns: list[str]) -> Rows:
    """An array of rows, or lines as in .jsonl."""
    with open_regular(path) as stream:
        start = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
        if start.partition(b"\n")[0].rstrip() == b"{":
            raise InputError(
                f"{where}: a JSON object over several lines; give an array of rows, or .jsonl with a row a line"
            )
        if not start.startswith(b"["):
            yield from _json_lines(where, path, columns)
            return
        if os.fstat(stream.fileno()).st_size > _MAX_ARRAY_BYTES:
            raise InputError(
                f"{where}: a JSON array larger than {_MAX_ARRAY_BYTES >> 20} MB; write it as .jsonl, a row a line"
            )
        stream.seek(0)
        try:
            rows = _JSON.decode(stream.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as e:
            raise InputError(
                f"{where}: not a JSON array ({_first_line(e)}); fetch the file again, or write it as .jsonl"
            ) from None
    yield from enumerate(rows, 1)


def _csv(where: str, path: str, columns: list[str]) -> Rows:
    """Rows under the names of the first one; empty cells are None.

    Lone surrogates stand for bytes that are not UTF-8.
    """
    csv.field_size_limit(MAX_ROW_BYTES)
    number = 0
    with io.TextIOWrapper(
        open_regular(path), newline="", encoding="utf-8-sig", errors="surrogateescape"
    ) as stream:
        reader = csv.DictReader(
            iter(functools.partial(stream.readline, MAX_ROW_BYTES), ""), strict=True
        )
        try:
            for number, row in enumerate(reader, 1):
                more: Any = row.pop(
                    None, ()
                )  # cells beyond those of the first row, such as the 001 of an unquoted 1,001
                yield (
                    number,
                    BadRow("more cells than columns")
                    if any(more)
                    else {name: value or None for name, value in row.items()},
                )
        except csv.Error as e:
            raise InputError(
                f"{where}: not CSV after row {number} ({e}); correct the quotes there"
            ) from None


# --------------------------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------------------------


def table_rows(orders: Iterator[Any]) -> Iterator[Any]:
    """The rows of a Parquet or Arrow file, in the process of `_table`: [where, path, columns] →
    [bytes, rows].
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_cpu_count(1)  # stacks and heaps of threads are address space
    yield
    where, path, columns = next(orders)
    number = 0
    try:
        for names, batch in (
            _parquet(pq, path, columns) if path.endswith(".parquet") else _arrow(pa, path, columns)
        ):
            unread = dict.fromkeys(names) | dict.fromkeys(
                batch.schema.names
            )  # so that a row says what it has
            for size, rows in _pieces(batch):
                number += len(rows)
                yield [size, [row if isinstance(row, str) else unread | row for row in rows]]
    except MemoryError:  # an ArrowException too
        raise
    except (
        pa.ArrowException,
        OSError,
        ValueError,
    ) as e:  # ValueError: names of columns that are not UTF-8
        kind = "Parquet" if path.endswith(".parquet") else "Arrow"
        raise InputError(
            f"{where}: corrupt {kind} after row {number} ({_first_line(e)}); fetch the file again"
        ) from None


def _parquet(pq: Any, path: str, columns: list[str]) -> Iterator[tuple[list[str], Any]]:
    """The names of all columns, and record batches of those that are needed."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
            yield file.schema_arrow.names, batch


def _arrow(pa: Any, path: str, columns: list[str]) -> Iterator[tuple[list[str], Any]]:
    with pa.OSFile(path) as file, pa.ipc.open_stream(file) as reader:
        names = reader.schema.names
        needed = {column.partition(".")[0] for column in columns} | {*columns}
        for batch in reader:
            yield names, batch.select([i for i, name in enumerate(names) if name in needed])


def _pieces(batch: Any) -> Iterator[tuple[int, list[Any]]]:
    """Rows of a record batch as plain Python objects, few at a time, and their bytes.

    A row that cannot be one is the reason.
    """
    bad = None
    if batch.nbytes <= _PIECE_BYTES or len(batch) == 1:
        try:
            bad = f"longer than {MAX_ROW_BYTES >> 20} MB"
            if batch.nbytes <= MAX_ROW_BYTES:
                yield batch.nbytes, batch.to_pylist()
                return
        except (
            UnicodeDecodeError
        ):  # writers may store any bytes as text; find the rows that hold them
            bad = "prompt is not valid Unicode"
        except (
            ArithmeticError,
            LookupError,
            ValueError,
        ):  # a date beyond the year 9999, a time zone that nobody knows
            bad = "answer is neither text nor a finite number"
        if len(batch) == 1:
            yield batch.nbytes, [bad]
            return
    half = len(batch) // 2
    yield from _pieces(batch.slice(0, half))
    yield from _pieces(batch.slice(half))


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
