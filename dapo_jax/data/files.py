"""Rows of JSON lines, JSON arrays, CSV, Parquet and Arrow; of files, folders and patterns.

Tables and prepared folders are read in a separate process: their readers are native code that
trusts the sizes a file states. A row above 16 MB is a bad row, and a file that decodes to a
thousand times its size is refused.
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
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dapo_jax.config import open_regular, printable
from dapo_jax.data.rows import MAX_ANSWER_CHARS, BadRow
from dapo_jax.runtime.files import reason
from dapo_jax.runtime.sandbox import ConfinedError, Process
from dapo_jax.types import InputError, one_line

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
_BLANK = object()  # a line that is no row
_JSON = json.JSONDecoder(parse_int=lambda n: int(n) if len(n) <= MAX_ANSWER_CHARS else n)
_WRAPPED = re.compile(rb'\{\s*"(data|rows|examples|train|test)"\s*:\s*\[')

Rows = Iterator[tuple[int, Any]]  # numbered from 1; a row that cannot be read is a BadRow
Pieces = Iterator[tuple[int, Sequence[Any]]]  # some rows, and their bytes


def rows_of(source: str, path: str, columns: list[str], heldout: bool) -> Rows:
    """The rows of a local file, folder or pattern, which messages name `source`, shard after shard.

    A folder is one that tensorflow-datasets or `datasets.save_to_disk` wrote, or holds shards of
    one kind. With splits, or names like `train-*.parquet`, the rows are those of one split.
    columns: those of tables that are read, `a.b` for field b of a. Raises InputError if there is no
    such file, its kind is not known, or it is damaged or changes meanwhile.
    """
    try:
        prepared = os.path.isfile(f"{path}/dataset_info.json")
        if prepared and not os.path.isfile(f"{path}/state.json"):  # `datasets` writes both
            files = [entry.path for entry in os.scandir(path) if not entry.is_dir()]
            before = [*map(_version, files)]
            size = sum(size for size, _ in before)
            parts = [("", size, _sandboxed(f"{_TFDS}:records", [path, heldout], size))]
        else:
            files = _files(path, heldout)
            before = [*map(_version, files)]
            names = [f"{os.path.basename(file)}: " if len(files) > 1 else "" for file in files]
            parts = [
                (name, size, _pieces(file, columns, size))
                for name, file, (size, _) in zip(names, files, before, strict=True)
            ]
        yield from _numbered(parts)
        changed = before != [*map(_version, files)]
    except FileNotFoundError:
        raise InputError(f"{source}: no such file; correct the path") from None
    except OSError as e:
        where = f"{source}: cannot be read ({e.strerror or e})"
        raise InputError(f"{where}; check the file and its permissions") from None
    except InputError as e:
        raise InputError(f"{source}: {e}") from None
    if changed:
        raise InputError(f"{source}: changed while it was read; run again when it is complete")


def _version(file: str) -> tuple[int, int]:
    """Size and time of the last change of a regular file. Raises OSError for any other."""
    with open_regular(file) as stream:
        found = os.fstat(stream.fileno())
    return found.st_size, found.st_mtime_ns


def _numbered(parts: Iterable[tuple[str, int, Pieces]]) -> Rows:
    """The rows of files, each with its prefix in messages and its size in bytes."""
    number = 0
    for name, size, pieces in parts:
        first, read = number, 0
        try:
            for more, rows in pieces:
                read += more + _ROW_BYTES * len(rows)
                if read > max(_LEAST_BYTES, _MAX_RATIO * size):
                    much = f"over {_MAX_RATIO} times the file's {size:,} bytes"
                    raise InputError(f"the rows so far are {much}; leave out repeated ones")
                for row in rows:
                    number += 1
                    if row is not _BLANK:
                        yield number, row
        except InputError as e:
            after = f"after row {number - first}: " if number > first else ""
            raise InputError(f"{name}{after}{e}") from None


def _files(path: str, heldout: bool) -> list[str]:
    if os.path.isfile(f"{path}/dataset_dict.json"):
        splits = _listed(path, "dataset_dict.json", "splits", str)
        path = os.path.join(path, choose_split(splits, heldout))
    if os.path.isfile(f"{path}/state.json"):
        shards = _listed(path, "state.json", "_data_files", dict)
        names = [os.path.basename(str(s.get("filename"))) for s in shards]
        if bad := next((name for name in names if "\0" in name), None):
            raise InputError(f"state.json: _data_files: {bad!r} is no file name; save it again")
        return [os.path.join(path, name) for name in names]
    if os.path.isdir(path):
        return [os.path.join(path, name) for name in _shards(os.listdir(path), heldout)]
    is_pattern = glob.has_magic(path) and not os.path.exists(path)
    found = sorted(glob.glob(path, recursive=True)) if is_pattern else [path]
    if not found:
        raise InputError("no file has such a name; correct the pattern")
    if not all(file.endswith(ENDINGS) for file in found):
        raise InputError(f"not a known kind of data set; give {_KINDS}")
    return found


def choose_split(splits: list[str], heldout: bool) -> str:
    """The only split, else `train`, or `test` or `validation` for `heldout` problems."""
    wanted = ("test", "validation") if heldout else ("train",)
    found = splits if len(splits) == 1 else [name for name in wanted if name in splits]
    if not found:
        there = f"no split {' or '.join(wanted)} among {', '.join(splits)}"
        raise InputError(f"{there}; prepare one of them alone")
    return found[0]


def _listed(folder: str, name: str, key: str, kind: type) -> list[Any]:
    """A list that `datasets.save_to_disk` wrote."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        found = json.loads(Path(folder, name).read_bytes())[key]
        if isinstance(found, list) and found and all(isinstance(one, kind) for one in found):
            return found
    raise InputError(f"{name}: {key}: not as save_to_disk writes it; save it again")


def _shards(names: list[str], heldout: bool) -> list[str]:
    names = sorted({*names} - {"features.json"})  # of a prepared folder
    kind = next((ending for ending in ENDINGS for name in names if name.endswith(ending)), None)
    if kind is None:
        raise InputError(f"holds no dataset_info.json and no data; give {_KINDS}")
    splits: dict[str, list[str]] = {}
    names = [name for name in names if name.endswith(kind)]
    for name in names:
        if split := re.match(r"(train|test|validation)(?![a-z])", name):
            splits.setdefault(split[0], []).append(name)
    return splits[choose_split([*splits], heldout)] if splits else names


def _pieces(path: str, columns: list[str], size: int) -> Pieces:
    if path.endswith((".parquet", ".arrow")):
        return _sandboxed(f"{__name__}:table", [path, columns], size)
    if path.endswith(".csv"):
        return _csv(path)
    return _json(path) if path.endswith(".json") else _json_lines(path)


# ------------------------------------------------------------------------------------------- text


def _json_lines(path: str) -> Pieces:
    try:
        unzip: Any = gzip.open if path.endswith(".gz") else contextlib.nullcontext
        with open(path, "rb") as file, unzip(file) as stream:
            while line := stream.readline(MAX_ROW_BYTES + 1):
                rest = line
                while len(rest) > MAX_ROW_BYTES and not rest.endswith(b"\n"):  # keep the start
                    rest = stream.readline(MAX_ROW_BYTES + 1)
                    yield len(rest), []
                yield len(line), [_row_of_line(line.removeprefix(_BOM))]
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise InputError(f"corrupt gzip ({e}); fetch the file again") from None


def _row_of_line(line: bytes) -> Any:
    if not line.strip():
        return _BLANK
    if len(line) > MAX_ROW_BYTES:
        return BadRow(f"longer than {MAX_ROW_BYTES >> 20} MB")
    try:
        return _JSON.decode(line.decode("utf-8"))
    except UnicodeDecodeError:
        return BadRow("not UTF-8")
    except (ValueError, RecursionError):
        return BadRow("not JSON")


def _json(path: str) -> Pieces:
    """An array of rows, also as {"data": [...]}, or lines as in .jsonl."""
    with open(path, "rb") as stream:
        start = stream.read(1 << 16).removeprefix(_BOM).lstrip()
        wrapped = _WRAPPED.match(start)
        if start.partition(b"\n")[0].rstrip() == b"{" and not wrapped:
            raise InputError("a JSON object over several lines; give an array of rows")
        if not wrapped and not start.startswith(b"["):
            yield from _json_lines(path)
            return
        if os.fstat(stream.fileno()).st_size > _MAX_ARRAY_BYTES:
            much = f"a JSON array over {_MAX_ARRAY_BYTES >> 20} MB"
            raise InputError(f"{much}; write it as .jsonl, a row a line")
        stream.seek(0)
        try:
            rows = _JSON.decode(stream.read().decode("utf-8-sig"))
            rows = rows[wrapped[1].decode()] if wrapped else rows
            if not isinstance(rows, list):
                raise ValueError("several values of one key")
        except (ValueError, RecursionError) as e:
            what = f"not a JSON array ({printable(one_line(e))})"
            raise InputError(f"{what}; fetch the file again, or write it as .jsonl") from None
    yield 0, rows


def _csv(path: str) -> Pieces:
    """Rows under the names of the first one, separated by `,`, `;` or tabs; empty cells are None.
    Lone surrogates stand for bytes that are not UTF-8."""
    limit = csv.field_size_limit(MAX_ROW_BYTES)  # of the whole process
    how: Any = {"newline": "", "encoding": "utf-8-sig", "errors": "surrogateescape"}
    with open(path, **how) as stream:
        lines = iter(functools.partial(stream.readline, MAX_ROW_BYTES), "")
        names = next(lines, "")
        separator = max(",;\t", key=names.count)
        reader = csv.DictReader(itertools.chain([names], lines), strict=True, delimiter=separator)
        try:
            for row in reader:
                more: Any = row.pop(None, ())  # beyond the names, such as 001 of an unquoted 1,001
                cells = {name: value or None for name, value in row.items()}
                yield 0, [BadRow("more cells than columns") if any(more) else cells]
        except csv.Error as e:
            raise InputError(f"not CSV ({e}); correct the quotes there") from None
        finally:
            csv.field_size_limit(limit)


# ----------------------------------------------------------------------------------------- tables


def _sandboxed(work: str, setup: list[Any], size: int) -> Pieces:
    """Pieces of files that `work` reads in a separate process; bad rows are their reasons."""
    memory_bytes = _MEMORY_BYTES + 4 * size
    try:
        with Process(work, setup, deadline_s=_DEADLINE_S, memory_bytes=memory_bytes) as process:
            process.start()
            process.send(None)
            while piece := process.receive():
                process.send(None)  # it reads on meanwhile
                yield piece[0], [BadRow(row) if isinstance(row, str) else row for row in piece[1]]
    except ConfinedError as e:
        raise InputError(f"cannot be read ({e}); write .jsonl, or smaller files") from None


def table(path: str, columns: list[str]) -> Callable[[None], tuple[int, list[Any]] | None]:
    """In the process: reads the next piece of a Parquet or Arrow file; None at the end."""
    import pyarrow as pa
    import pyarrow.parquet  # noqa: F401

    pa.set_cpu_count(1)  # stacks and heaps of threads are address space

    def pieces() -> Iterator[tuple[int, list[Any]]]:
        try:
            for names, batch in _batches(pa, path, columns):
                every = dict.fromkeys([*names, *batch.schema.names])  # a row shows its columns
                count = max(1, len(batch) * _PIECE_BYTES // max(1, batch.nbytes))
                for start in range(0, len(batch), count):
                    piece = batch.slice(start, count)
                    rows = _python_rows(piece)
                    full = [row if isinstance(row, str) else every | row for row in rows]
                    yield piece.nbytes, full
        except MemoryError:  # an ArrowException too
            raise
        except (pa.ArrowException, OSError, ValueError) as e:  # ValueError: names not UTF-8
            kind = "Parquet" if path.endswith(".parquet") else "Arrow"
            what = f"corrupt {kind} ({printable(reason(e))})"
            raise InputError(f"{what}; fetch the file again") from None

    found = pieces()
    return lambda order: next(found, None)


def _batches(pa: Any, path: str, columns: list[str]) -> Iterator[tuple[list[str], Any]]:
    """The names of all columns, and record batches of those that are needed."""
    if path.endswith(".parquet"):
        with pa.parquet.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(_BATCH, columns=columns, use_threads=False):
                yield file.schema_arrow.names, batch
        return
    with pa.OSFile(path) as file, pa.ipc.open_stream(file) as reader:
        needed = {column.partition(".")[0] for column in columns} | {*columns}
        chosen = [i for i, name in enumerate(reader.schema.names) if name in needed]
        for batch in reader:
            yield reader.schema.names, batch.select(chosen)


def _python_rows(piece: Any) -> list[Any]:
    """Rows as Python objects; for one that cannot be, the reason."""
    bad = f"longer than {MAX_ROW_BYTES >> 20} MB"
    try:
        if piece.nbytes <= MAX_ROW_BYTES:
            return piece.to_pylist()
    except UnicodeDecodeError:  # writers may store any bytes as text
        bad = "prompt is not valid Unicode"
    except (ArithmeticError, LookupError, ValueError):  # a date after 9999, a bad time zone
        bad = "answer is neither text nor a finite number"
    ones = [] if len(piece) == 1 else [piece.slice(n, 1) for n in range(len(piece))]
    return [row for one in ones for row in _python_rows(one)] or [bad]
