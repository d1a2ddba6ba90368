"""Problems from files: read row by row, checked, de-duplicated, and put in an order that a restart can repeat.

Two row schemas, in JSON lines, Parquet or a prepared tensorflow-datasets folder:

    {"prompt": "What is 6 x 7?", "answer": 42}                       and, if there, "id" and "solution"
    {"prompt": [{"role": "user", "content": "..."}], "reward_model": {"ground_truth": "42"}, "extra_info": {"index": 7}}

The second is that of DAPO-Math-17k, which holds each of its 17 k prompts about 100 times. Chat turns are used as they are.
"""

import dataclasses
import gzip
import hashlib
import io
import json
import math
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dapo_jax.config import ArithmeticConfig
from dapo_jax.data.arithmetic import arithmetic_problems
from dapo_jax.types import InputError, Message, Problem

_MAX_ANSWER_CHARS = 1000
_MAX_ROW_BYTES = 16 << 20  # a line of JSON; bounds memory on a file without line ends
_PARQUET_BATCH = 4096  # rows
_COLUMNS = ("id", "prompt", "answer", "solution", "reward_model.ground_truth", "extra_info.index")
# Stand for rows whose text cannot be decoded, and for rows with a date or time that Python cannot hold: skipped like their likes in JSON.
_NOT_UNICODE: Mapping[str, Any] = {"prompt": "\ud800"}
_NO_VALUE: Mapping[str, Any] = {"prompt": "?", "answer": math.inf}


@dataclasses.dataclass(frozen=True)
class Skip:
    """Rows that were left out for one reason."""

    count: int
    first_row: int  # from 1


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of every row: `rows == problems + duplicates + conflicts + skipped rows`."""

    source: str
    rows: int
    problems: int  # distinct prompts that are kept
    duplicates: int  # rows whose prompt an earlier row had
    conflicts: int  # distinct prompts that came with different answers, and were dropped whole
    skipped: Mapping[str, Skip]  # by reason

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{self.duplicates:,} duplicates"] if self.duplicates else []
        parts += [f"{self.conflicts:,} conflicting prompts dropped"] if self.conflicts else []
        parts += [f"{skip.count:,} skipped: {reason} (row {skip.first_row})" for reason, skip in self.skipped.items()]
        return f"{self.source}: {self.problems:,} problems from {self.rows:,} rows" + (f" ({', '.join(parts)})" if parts else "")


class BadRow(Exception):
    """A row that cannot be used; its text is the reason under which such rows are counted."""


# --------------------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------------------


def load_problems(source: str, arithmetic: ArithmeticConfig, *, heldout: bool = False) -> tuple[list[Problem], LoadReport]:
    """Distinct problems of a data set, in order of first appearance, and what became of its rows.

    `source` is a .jsonl, .jsonl.gz or .parquet file, a folder prepared by tensorflow-datasets, or the word `arithmetic`, which
    makes the problems of `arithmetic`. `heldout` selects evaluation problems where a source has both kinds.
    Raises InputError if the source cannot be read, or holds no usable problem.
    """
    if source == "arithmetic":
        problems = arithmetic_problems(arithmetic, heldout=heldout)
        return problems, LoadReport(source, len(problems), len(problems), duplicates=0, conflicts=0, skipped={})
    if os.path.isdir(source):
        from dapo_jax.data import tfds_builder  # not at the top: tensorflow-datasets is slow to import, and few runs need it

        return tfds_builder.read_problems(source, heldout=heldout)
    rows: Callable[[Path], Iterator[tuple[int, Any]]]
    parse: Callable[[Any], Problem]
    if source.endswith((".jsonl", ".jsonl.gz")):
        rows, parse = _json_lines, _problem_from_line
    elif source.endswith(".parquet"):
        rows, parse = _parquet_rows, problem_from_row
    else:
        raise InputError(f"{source}: not a known kind of data set; give .jsonl, .jsonl.gz, .parquet, a prepared folder, or `arithmetic`")
    try:
        before = os.stat(source)
        loaded = collect_problems(source, rows(Path(source)), parse)
        after = os.stat(source)
    except FileNotFoundError:
        raise InputError(f"{source}: no such file; correct the path") from None
    except OSError as e:
        raise InputError(f"{source}: cannot be read ({e.strerror or e}); check the file and its permissions") from None
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(f"{source}: changed while it was read; start again when it is complete")
    return loaded


def collect_problems(source: str, rows: Iterable[tuple[int, Any]], parse: Callable[[Any], Problem]) -> tuple[list[Problem], LoadReport]:
    """Parses numbered rows, keeps one problem a distinct prompt, drops prompts with conflicting answers, counts the rest.

    Only distinct prompts stay in memory. Raises InputError if no problem is left.
    """
    found: dict[str | tuple[Message, ...], Problem | None] = {}  # None: answers conflict
    skipped: dict[str, Skip] = {}
    total = duplicates = 0
    for number, row in rows:
        total += 1
        try:
            problem = parse(row)
        except BadRow as e:
            before = skipped.get(str(e), Skip(0, number))
            skipped[str(e)] = Skip(before.count + 1, before.first_row)
            continue
        if problem.prompt not in found:
            found[problem.prompt] = problem
            continue
        duplicates += 1
        first = found[problem.prompt]
        if first is not None and first.answer != problem.answer:
            found[problem.prompt] = None
    problems = _with_unique_ids([p for p in found.values() if p is not None])
    report = LoadReport(source, total, len(problems), duplicates, len(found) - len(problems), skipped)
    if not problems:
        raise InputError(f"{report.summary()}; give rows with a `prompt` and an `answer`")
    return problems, report


def _with_unique_ids(problems: list[Problem]) -> list[Problem]:
    """A data set's own identifiers where they identify, else ones that derive from the prompt."""
    uses = Counter(p.id for p in problems)
    return [p if p.id and uses[p.id] == 1 else dataclasses.replace(p, id=_content_id(p.prompt)) for p in problems]


def _json_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank, without byte-order mark. Of an overlong line only the start is kept."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            while line := _line(stream):
                number += 1
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise InputError(f"{path}: corrupt gzip after row {number} ({e}); fetch the file again") from None


def _line(stream: io.BufferedIOBase) -> bytes:
    line = stream.readline(_MAX_ROW_BYTES + 1)
    rest = line
    while len(rest) > _MAX_ROW_BYTES and not rest.endswith(b"\n"):
        rest = stream.readline(_MAX_ROW_BYTES + 1)
    return line


def _parquet_rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Numbered rows as plain Python objects, a record batch in memory at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_BATCH, columns=_COLUMNS):
                for row in _plain_rows(batch):
                    number += 1
                    yield number, row
    except (FileNotFoundError, PermissionError):
        raise
    except (pa.ArrowException, OSError, ValueError) as e:  # ValueError: names of columns that are not UTF-8
        raise InputError(f"{path}: corrupt Parquet after row {number} ({_first_line(e)}); fetch the file again") from None


def _plain_rows(batch: Any) -> list[Any]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # Parquet writers may store any bytes as text; find the rows that hold them
        stand_in = _NOT_UNICODE
    except (ArithmeticError, LookupError, ValueError):  # a date beyond the year 9999, a time zone that nobody knows
        stand_in = _NO_VALUE
    if len(batch) == 1:
        return [stand_in]
    half = len(batch) // 2
    return _plain_rows(batch.slice(0, half)) + _plain_rows(batch.slice(half))


def _first_line(error: BaseException) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


# --------------------------------------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------------------------------------


def problem_from_row(row: Any) -> Problem:
    """The problem that a decoded row states; its id is empty if the row has none. Raises BadRow with the reason if it states none."""
    if not isinstance(row, Mapping):
        raise BadRow("not a JSON object")
    reward_model, extra_info = row.get("reward_model"), row.get("extra_info")
    answer, identifier, solution = row.get("answer"), row.get("id"), row.get("solution")
    if answer is None and isinstance(reward_model, Mapping):
        answer = reward_model.get("ground_truth")
    if identifier is None and isinstance(extra_info, Mapping):
        identifier = extra_info.get("index")
    problem = Problem(
        id="" if _missing(identifier) else _scalar_text(identifier, "id"),
        prompt=_prompt(row.get("prompt")),
        answer=_answer(answer),
        solution=None if _missing(solution) else _text(solution, "solution") or None,
    )
    return problem


def _problem_from_line(line: bytes) -> Problem:
    if len(line) > _MAX_ROW_BYTES:
        raise BadRow(f"longer than {_MAX_ROW_BYTES >> 20} MB")
    try:
        return problem_from_row(_JSON.decode(line.decode("utf-8")))
    except UnicodeDecodeError:
        raise BadRow("not UTF-8") from None
    except (ValueError, RecursionError):
        raise BadRow("not JSON") from None


def _whole_number(digits: str) -> int | str:
    return int(digits) if len(digits) <= _MAX_ANSWER_CHARS else digits  # int() refuses, or takes long over, thousands of digits


_JSON = json.JSONDecoder(parse_int=_whole_number)


def _prompt(value: Any) -> str | tuple[Message, ...]:
    if _missing(value):
        raise BadRow("no prompt")
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty prompt")
        return _text(value, "prompt")
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise BadRow("prompt is neither text nor chat turns")
    turns = tuple(Message(_text(turn.get("role"), "chat role"), _text(turn.get("content"), "chat content")) for turn in value)
    if not any(turn.content.strip() for turn in turns):
        raise BadRow("empty prompt")
    return turns


def _answer(value: Any) -> str:
    if _missing(value):
        raise BadRow("no answer")
    text = _scalar_text(value, "answer").strip()
    if not text:
        raise BadRow("no answer")
    if len(text) > _MAX_ANSWER_CHARS:
        raise BadRow(f"answer over {_MAX_ANSWER_CHARS} characters")
    return text


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))  # NaN is how data frames write null


def _scalar_text(value: Any, name: str) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return str(int(value)) if value.is_integer() else repr(value)  # 42.0: a whole number in a float column
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str):
        return _text(value, name)
    raise BadRow(f"{name} is neither text nor a finite number")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{name} is not valid Unicode") from None
    return value


# --------------------------------------------------------------------------------------------------------------------
# Identity and order
# --------------------------------------------------------------------------------------------------------------------


def _plain_prompt(prompt: str | tuple[Message, ...]) -> str | list[list[str]]:
    return prompt if isinstance(prompt, str) else [[turn.role, turn.content] for turn in prompt]


def _content_id(prompt: str | tuple[Message, ...]) -> str:
    return hashlib.sha256(json.dumps(_plain_prompt(prompt)).encode()).hexdigest()[:16]


def problems_digest(problems: Iterable[Problem]) -> str:
    """SHA-256, in hexadecimal, of ids, prompts and answers in order: equal if and only if the problems are."""
    digest = hashlib.sha256()
    for p in problems:
        digest.update(json.dumps([p.id, _plain_prompt(p.prompt), p.answer]).encode() + b"\n")
    return digest.hexdigest()


def epoch_order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """The order of problems in an epoch: a permutation of 0..count-1, int64 [count], a function of its arguments alone.

    Sorts raw Philox words, a stream that numpy promises not to change; it makes no such promise of `Generator.permutation`.
    """
    words = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)
    return np.argsort(words, kind="stable")


class Cursor(NamedTuple):
    """A place in the endless sequence of shuffled epochs."""

    epoch: int = 0
    index: int = 0  # type: ignore[assignment]  # problems of this epoch already taken; hides tuple.index


def advance(cursor: Cursor, count: int, take: int, *, seed: int) -> tuple[np.ndarray, Cursor]:
    """The next `take` of `count` problems as indices, int64 [take], and the cursor after them. Each problem comes once an epoch."""
    if count < 1:
        raise ValueError("advance needs at least one problem")
    epoch, index = cursor
    taken = [np.empty(0, np.int64)]
    while take > 0:
        if index >= count:
            epoch, index = epoch + 1, 0
        taken.append(epoch_order(count, seed=seed, epoch=epoch)[index : index + take])
        index += len(taken[-1])
        take -= len(taken[-1])
    return np.concatenate(taken), Cursor(epoch, index)
