"""Rows of JSON lines, JSON arrays, CSV, Parquet and Arrow; of files, folders and patterns.

Tables and prepared folders are read in a separate process (`runtime/sandbox.py`): their readers
are native code that trusts the sizes a file states. A row above 16 MB is a bad row, and a file that
decodes to a thousand times its size is refused.
"""

import contextlib
import csv
import functools
import glob
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dapo_jax.config import open_regular, printable
from dapo_jax.data.rows import MAX_ANSWER_CHARS, BadRow
from dapo_jax.runtime.files import reason
from dapo_jax.runtime.sandbox import ConfinedError, results
from dapo_jax.types import InputError

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".csv", ".arrow")
MAX_ROW_BYTES = 16 << 20  # a line of JSON; bounds memory on a file without line ends
_MAX_ARRAY_BYTES = 256 << 20  # of JSON, which is decoded whole
_BATCH = 4096  # rows of a table
_PIECE_BYTES = 1 << 20  # of its rows that become Python objects together
_DEADLINE_S = 120.0  # for the next piece
_MEMORY_BYTES = 2 << 30  # of the process that reads a table, and four times its size
# A file may decode to so many times its size, or to the least. A row counts 1 kB besides its text.
_MAX_RATIO, _LEAST_BYTES, _ROW_BYTES = 1000, 1 << 30, 1000
_KINDS = f"{', '.join(ENDINGS)}, a folder or pattern of such, a prepared folder, or `arithmetic`"
_TFDS = "dapo_jax.data.tfds_builder"
_BOM = b"\xef\xbb\xbf"
_JSON = json.JSONDecoder(parse_int=lambda n: int(n) if len(n) <= MAX_ANSWER_CHARS else n)
_WRAPPED = re.compile(rb'\{\s*"(data|rows|examples|train|test)"\s*:\s*\[')

Rows = Iterator[tuple[int, Any]]  # numbered from 1; a row that cannot be read is a BadRow


def rows_of(source: str, path: str, columns: list[str], heldout: bool) -> Rows:
    """The rows of a local file, folder or pattern, which messages name `source`, shard after shard.

    A folder is one that tensorflow-datasets or `datasets.save_to_disk` wrote, or holds shards of
    one kind. If it has splits, or names like `train-*.parquet`, the rows are those of one split.
    columns: those of tables that are read, `a.b` for field b of a. Raises InputError if there is no
    such file, its kind is not known, or it is damaged or changes meanwhile.
    """
    try:
        prepared = os.path.isfile(f"{path}/dataset_info.json")
        if prepared and not os.path.isfile(f"{path}/state.json"):  # `datasets` writes both
            files = [entry.path for entry in os.scandir(path) if not entry.is_dir()]
            before = [*map(_version, files)]
            size = sum(size for size, _ in before)
            yield from _table(f"{_TFDS}:records", source, [source, path, heldout], size)
        else:
            files = _files(source, path, heldout)
            before = [*map(_version, files)]
            yield from _rows_of_files(source, files, columns)
        changed = before != [*map(_version, files)]
    except FileNotFoundError:
        raise InputError(f"{source}: no such file; correct the path") from None
    except OSError as e:
        where = f"{source}: cannot be read ({e.strerror or e})"
        raise InputError(f"{where}; check the file and its permissions") from None
    if changed:
        raise InputError(f"{source}: changed while it was read; run again when it is complete")


def _version(file: str) -> tuple[int, int]:
    """Size and time of the last change of a regular file. Raises OSError for any other."""
    with open_regular(file) as stream:
        found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns


def _files(source: str, path: str, heldout: bool) -> list[str]:
    if os.path.isfile(f"{path}/dataset_dict.json"):
        splits = _listed(source, path, "dataset_dict.json", "splits", str)
        path = os.path.join(path, choose_split(source, splits, heldout))
    if os.path.isfile(f"{path}/state.json"):
        shards = _listed(source, path, "state.json", "_data_files", dict)
        return [os.path.join(path, os.path.basename(str(s.get("filename")))) for s in shards]
    if os.path.isdir(path):
        return [os.path.join(path, name) for name in _shards(source, os.listdir(path), heldout)]
    is_pattern = glob.has_magic(path) and not os.path.exists(path)
    found = sorted(glob.glob(path, recursive=True)) if is_pattern else [path]
    if not found:
        raise InputError(f"{source}: no file has such a name; correct the pattern")
    if not all(file.endswith(ENDINGS) for file in found):
        raise InputError(f"{source}: not a known kind of data set; give {_KINDS}")
    return found


def choose_split(source: str, splits: list[str], heldout: bool) -> str:
    """The only split, else `train`, or `test` or `validation` for `heldout` problems."""
    wanted = ("test", "validation") if heldout else ("train",)
    found = splits if len(splits) == 1 else [name for name in wanted if name in splits]
    if not found:
        there = f"no split {' or '.join(wanted)} among {', '.join(splits)}"
        raise InputError(f"{source}: {there}; prepare one of them alone")
    return found[0]


def _listed(source: str, folder: str, name: str, key: str, kind: type) -> list[Any]:
    """A list that `datasets.save_to_disk` wrote."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        found = json.loads(Path(folder, name).read_bytes())[key]
        if isinstance(found, list) and found and all(isinstance(one, kind) for one in found):
            return found
    raise InputError(f"{source}: {name}: {key}: not as save_to_disk writes it; save it again")


def _shards(source: str, names: list[str], heldout: bool) -> list[str]:
    names = sorted({*names} - {"features.json"})  # of a prepared folder
    kind = next((ending for ending in ENDINGS for name in names if name.endswith(ending)), None)
    if kind is None:
        raise InputError(f"{source}: holds no dataset_info.json and no data; give {_KINDS}")
    splits: dict[str, list[str]] = {}
    names = [name for name in names if name.endswith(kind)]
    for name in names:
        if split := re.match(r"(train|test|validation)(?![a-z])", name):
            splits.setdefault(split[0], []).append(name)
    return splits[choose_split(source, [*splits], heldout)] if splits else names


def _rows_of_files(source: str, files: list[str], columns: list[str]) -> Rows:
    before = number = 0
    for file in files:
        where = source if len(files) == 1 else f"{source}: {os.path.basename(file)}"
        if file.endswith((".parquet", ".arrow")):
            order, size = [where, file, columns], os.path.getsize(file)
            rows = _table(f"{__name__}:table_rows", where, order, size)
        elif file.endswith(".csv"):
            rows = _csv(where, file)
        else:
            rows = _json(where, file) if file.endswith(".json") else _json_lines(where, file)
        for number, row in rows:
            yield before + number, row
        before, number = before + number, 0


def _table(work: str, where: str, order: list[Any], size: int) -> Rows:
    """Rows of files of `size` bytes, which `work` yields in a separate process for `order`, as
    [bytes, rows]; for a row that cannot be read, the reason."""
    limits: Any = {"deadline_s": _DEADLINE_S, "memory_bytes": _MEMORY_BYTES + 4 * size}
    number = read = 0
    try:
        for more, rows in results(work, [order], **limits):
            for number, row in enumerate(rows, number + 1):  # noqa: B020
                yield number, BadRow(row) if isinstance(row, str) else row
            read += more + _ROW_BYTES * len(rows)
            _check_growth(where, number, read, size)
    except ConfinedError as e:
        where = f"{where}: cannot be read after row {number}"
        raise InputError(f"{where} ({e}); write .jsonl, or smaller files") from None


def _check_growth(where: str, number: int, read: int, size: int) -> None:
    if read > max(_LEAST_BYTES, _MAX_RATIO * size):
        much = f"the rows so far are over {_MAX_RATIO} times the file's {size:,} bytes"
        raise InputError(f"{where}: row {number}: {much}; leave out repeated ones")


# ------------------------------------------------------------------------------------------- text


def _json_lines(where: str, path: str) -> Rows:
    """Lines that are not blank, without byte-order mark."""
    number = read = 0
    try:
        unzip: Any = gzip.open if path.endswith(".gz") else contextlib.nullcontext
        with open(path, "rb") as file, unzip(file) as stream:
            size = os.fstat(file.fileno()).st_size
            while line := stream.readline(MAX_ROW_BYTES + 1):
                number, read, rest = number + 1, read + _ROW_BYTES + len(line), line
                while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):  # keep the start
                    rest = stream.readline(MAX_ROW_BYTES + 1)
                    read += len(rest)
                    _check_growth(where, number, read, size)
                _check_growth(where, number, read, size)
                line = line.removeprefix(_BOM) if number == 1 else line
                if line.strip():
                    yield number, _row_of_line(line)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        where = f"{where}: corrupt gzip after row {number}"
        raise InputError(f"{where} ({e}); fetch the file again") from None


def _row_of_line(line: bytes) -> Any:
    if len(line) > MAX_ROW_BYTES:
        return BadRow(f"longer than {MAX_ROW_BYTES >> 20} MB")
    try:
        return _JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, RecursionError):
        return BadRow("not JSON")


def _json(where: str, path: str) -> Rows:
    """An array of rows, also as {"data": [...]}, or lines as in .jsonl."""
    with open(path, "rb") as stream:
        start = stream.read(1 << 16).removeprefix(_BOM).lstrip()
        wrapped = _WRAPPED.match(start)
        if start.partition(b"\n")[0].rstrip() == b"{" and not wrapped:
            raise InputError(f"{where}: a JSON object over several lines; give an array of rows")
        if not wrapped and not start.startswith(b"["):
            yield from _json_lines(where, path)
            return
        if os.fstat(stream.fileno()).st_size > _MAX_ARRAY_BYTES:
            much = f"a JSON array over {_MAX_ARRAY_BYTES >> 20} MB"
            raise InputError(f"{where}: {much}; write it as .jsonl, a row a line")
        stream.seek(0)
        try:
            rows = _JSON.decode(stream.read().decode("utf-8-sig"))
            rows = rows[wrapped[1].decode()] if wrapped else rows
            if not isinstance(rows, list):
                raise ValueError("several values of one key")
        except (ValueError, RecursionError) as e:
            where = f"{where}: not a JSON array ({printable(reason(e))})"
            raise InputError(f"{where}; fetch the file again, or write it as .jsonl") from None
    yield from enumerate(rows, 1)


def _csv(where: str, path: str) -> Rows:
    """Rows under the names of the first one, separated by `,`, `;` or tabs; empty cells are None.

    Lone surrogates stand for bytes that are not UTF-8.
    """
    limit, number = csv.field_size_limit(MAX_ROW_BYTES), 0  # of the whole process
    how: Any = {"newline": "", "encoding": "utf-8-sig", "errors": "surrogateescape"}
    with open(path, **how) as stream:
        lines = iter(functools.partial(stream.readline, MAX_ROW_BYTES), "")
        names = next(lines, "")
        separator = max(",;\t", key=names.count)
        reader = csv.DictReader(itertools.chain([names], lines), strict=True, delimiter=separator)
        try:
            for number, row in enumerate(reader, 1):
                more: Any = row.pop(None, ())  # beyond the names, such as 001 of an unquoted 1,001
                cells = {name: value or None for name, value in row.items()}
                yield number, BadRow("more cells than columns") if any(more) else cells
        except csv.Error as e:
            where = f"{where}: not CSV after row {number}"
            raise InputError(f"{where} ({e}); correct the quotes there") from None
        finally:
            csv.field_size_limit(limit)


# ----------------------------------------------------------------------------------------- tables


def table_rows(orders: Iterator[Any]) -> Iterator[Any]:
    """Reads Parquet or Arrow in the process of `_table`: [where, path, columns] → [bytes, rows]."""
    import pyarrow as pa
    import pyarrow.parquet  # noqa: F401

    pa.set_cpu_count(1)  # stacks and heaps of threads are address space
    yield
    where, path, columns = next(orders)
    number = 0
    try:
        for names, batch in (_parquet if path.endswith(".parquet") else _arrow)(pa, path, columns):
            every = dict.fromkeys([*names, *batch.schema.names])  # so that a row shows its columns
            for size, rows in _pieces(batch):
                number += len(rows)
                yield [size, [row if isinstance(row, str) else every | row for row in rows]]
    except MemoryError:  # an ArrowException too
        raise
    except (pa.ArrowException, OSError, ValueError) as e:  # ValueError: column names not UTF-8
        kind = "Parquet" if path.endswith(".parquet") else "Arrow"
        where = f"{where}: corrupt {kind} after row {number}"
        raise InputError(f"{where} ({printable(reason(e))}); fetch the file again") from None


def _parquet(pa: Any, path: str, columns: list[str]) -> Iterator[tuple[list[str], Any]]:
    """The names of all columns, and record batches of those that are needed."""
    with pa.parquet.ParquetFile(path, pre_buffer=False) as file:
        for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
            yield file.schema_arrow.names, batch


def _arrow(pa: Any, path: str, columns: list[str]) -> Iterator[tuple[list[str], Any]]:
    with pa.OSFile(path) as file, pa.ipc.open_stream(file) as reader:
        needed = {column.partition(".")[0] for column in columns} | {*columns}
        chosen = [i for i, name in enumerate(reader.schema.names) if name in needed]
        for batch in reader:
            yield reader.schema.names, batch.select(chosen)


def _pieces(batch: Any) -> Iterator[tuple[int, list[Any]]]:
    """A few rows as Python objects, or why a row cannot be one, and their bytes in front."""
    bad = None
    if batch.nbytes <= _PIECE_BYTES or len(batch) == 1:
        try:
            bad = f"longer than {MAX_ROW_BYTES >> 20} MB"
            if batch.nbytes <= MAX_ROW_BYTES:
                yield batch.nbytes, batch.to_pylist()
                return
        except UnicodeDecodeError:  # writers may store any bytes as text
            bad = "prompt is not valid Unicode"
        except (
            ArithmeticError,
            LookupError,
            ValueError,
        ):  # a date after 9999, a bad time zone
            bad = "answer is neither text nor a finite number"
    if bad and len(batch) == 1:
        yield batch.nbytes, [bad]
        return
    half = len(batch) // 2
    yield from _pieces(batch.slice(0, half))
    yield from _pieces(batch.slice(half))
