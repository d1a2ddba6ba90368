"""Problems of data sets: read row by row, checked, de-duplicated, in an order that resumes."""

import dataclasses
import functools
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dapo_jax.config import ArithmeticConfig, ColumnsConfig, printable
from dapo_jax.data.arithmetic import arithmetic_problems
from dapo_jax.data.files import ENDINGS, rows_of
from dapo_jax.data.rows import AS_USUAL, BadRow, column_names, problem_from_row
from dapo_jax.runtime.files import local_copy
from dapo_jax.runtime.records import Count
from dapo_jax.types import InputError, Message, Problem

_SHOWN_COLUMNS = 12
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d+)?")  # 1,234 is the same gold as 1234


@dataclasses.dataclass(frozen=True)
class Skip:
    """Rows skipped for one reason; the columns of the first one, if one is missing."""

    count: int
    first_row: int  # from 1
    columns: Sequence[str] = dataclasses.field(default=(), compare=False)

    @property
    def where(self) -> str:
        """The first row, as text: `row 3: columns text, label`."""
        shown = [printable(name)[:40] for name in self.columns[:_SHOWN_COLUMNS]]
        shown += ["..."] if len(self.columns) > _SHOWN_COLUMNS else []
        return f"row {self.first_row}" + (f": columns {', '.join(shown)}" if shown else "")


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """Counts of the rows of a data set: used, skipped, dropped."""

    source: str
    rows: int  # == problems + duplicates + conflicts + in_earlier_sets + skipped ones
    problems: int  # distinct prompts that are kept
    duplicates: int = 0  # rows whose prompt an earlier row had
    conflicts: int = 0  # distinct prompts that came with different answers, left out
    skipped: Mapping[str, Skip] = dataclasses.field(default_factory=dict)  # by reason
    in_earlier_sets: int = 0  # distinct prompts that an earlier data set of the mixture has
    normalized: Mapping[str, int] = dataclasses.field(default_factory=dict)  # rows by change

    def counts(self) -> dict[str, int]:
        """What became of the rows that are no problem of their own, and which ones changed."""
        counts = {"duplicates": self.duplicates, "conflicting prompts dropped": self.conflicts}
        counts |= {"in an earlier data set": self.in_earlier_sets}
        counts |= {f"skipped: {reason} ({s.where})": s.count for reason, s in self.skipped.items()}
        return {what: n for what, n in (counts | {**self.normalized}).items() if n}

    def summary(self) -> str:
        noted = ", ".join(f"{count:,} {what}" for what, count in self.counts().items())
        line = f"{self.source}: {self.problems:,} problems from {self.rows:,} rows"
        return printable(f"{line} ({noted})" if noted else line)


def load_problems(
    source: str,
    arithmetic: ArithmeticConfig,
    *,
    columns: ColumnsConfig = AS_USUAL,
    heldout: bool = False,
) -> tuple[list[Problem], LoadReport]:
    """Distinct problems of a data set, in order of first appearance, and the counts of its rows.

    A prompt whose answers conflict is left out. source: a file, a folder or pattern of shards
    (`files.py`), or the word `arithmetic`. heldout: evaluation problems where a source has both
    kinds. Raises InputError if the source cannot be read or holds no usable problem.
    """
    if source == "arithmetic":
        problems = arithmetic_problems(arithmetic, heldout=heldout)
        report = LoadReport(source, len(problems), len(problems))
        return [dataclasses.replace(p, source=source) for p in problems], report
    found: dict[str | tuple[Message, ...], Problem | None] = {}  # None: answers conflict
    skipped: dict[str, Skip] = {}
    normalized: Counter[str] = Counter()
    total = duplicates = 0
    with local_copy(source, [f"*{ending}" for ending in ENDINGS]) as path:
        for number, row in rows_of(source, str(path), column_names(columns), heldout):
            total += 1
            notes: list[str] = []
            try:
                problem = problem_from_row(row, columns, notes)
            except BadRow as e:
                skip = skipped.setdefault(str(e), Skip(0, number, e.columns))
                skipped[str(e)] = dataclasses.replace(skip, count=skip.count + 1)
                continue
            normalized.update(list(dict.fromkeys(notes)))
            first = found.setdefault(problem.prompt, problem)
            if first is not problem:
                duplicates += 1
                if first is not None and _plain(first.answer) != _plain(problem.answer):
                    found[problem.prompt] = None
    kept = [dataclasses.replace(p, source=source) for p in found.values() if p is not None]
    conflicts = len(found) - len(kept)
    counts: Any = {"skipped": skipped, "normalized": dict(normalized)}
    report = LoadReport(source, total, len(kept), duplicates, conflicts, **counts)
    if not kept:
        recipe = f"{{path: {source}, columns: {{prompt: COLUMN, answer: COLUMN}}}}"
        remedy = f"give rows with a `prompt` and an `answer`, or name their columns: {recipe}"
        raise InputError(f"{report.summary()}; {remedy}")
    return with_unique_ids(kept), report


def _plain(answer: str) -> str:
    return answer.replace(",", "") if _THOUSANDS.fullmatch(answer) else answer


def with_unique_ids(problems: list[Problem]) -> list[Problem]:
    """A data set's own ids where they are unique, else the digest of the prompt."""
    uses = Counter(p.id for p in problems)
    return [p if p.id and uses[p.id] == 1 else _with_content_id(p) for p in problems]


# ------------------------------------------------------------------------------ identity and order


def _prompt_as_json(p: Problem) -> str | list[list[str]]:
    return p.prompt if isinstance(p.prompt, str) else [[t.role, t.content] for t in p.prompt]


def _with_content_id(p: Problem) -> Problem:
    digest = hashlib.sha256(json.dumps(_prompt_as_json(p)).encode()).hexdigest()
    return dataclasses.replace(p, id=digest[:16])


def problems_digest(problems: Iterable[Problem]) -> str:
    """SHA-256, in hexadecimal, of ids, prompts and answers in order."""
    digest = hashlib.sha256()
    for p in problems:
        digest.update(json.dumps([p.id, _prompt_as_json(p), p.answer]).encode() + b"\n")
    return digest.hexdigest()


def epoch_order(count: int, *, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """The order of problems in an epoch: a permutation of 0..count-1, int64 [count].

    Sorts raw Philox words, a stream that numpy promises not to change, unlike
    `Generator.permutation`. Orders of different streams are independent. seed: below 2^32.
    """
    key = np.array([seed | stream << 32, epoch], np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(count), kind="stable")


Order = Callable[..., np.ndarray]  # the draws of an `epoch`


class Cursor(NamedTuple):
    """A place in the endless sequence of epochs."""

    epoch: Count = 0
    index: Count = 0  # type: ignore[assignment]  # draws made in this epoch; hides tuple.index


def advance(
    cursor: Cursor, count: int, take: int, *, seed: int, order: Order | None = None
) -> tuple[np.ndarray, Cursor]:
    """The next `take` of `count` problems as indices, int64 [take], and the cursor after them. Each
    problem comes once an epoch. order: instead of `epoch_order`."""
    if count < 1:
        raise ValueError("advance needs at least one problem")
    order = order or functools.partial(epoch_order, count, seed=seed)
    epoch, index = cursor
    taken = [np.empty(0, np.int64)]
    while take > 0:
        if index >= count:
            epoch, index = epoch + 1, 0
        taken.append(order(epoch=epoch)[index : index + take])
        index += len(taken[-1])
        take -= len(taken[-1])
    return np.concatenate(taken), Cursor(epoch, index)
