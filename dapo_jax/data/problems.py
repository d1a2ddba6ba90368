"""Problems from files: read row by row, checked, de-duplicated, and put in an order that a restart
can repeat.

`files.py` reads the rows of files, `tfds_builder.py` those of prepared folders.
`rows.py` says what a row may look like.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dapo_jax.config import ArithmeticConfig, ColumnsConfig, printable
from dapo_jax.data.arithmetic import arithmetic_problems
from dapo_jax.data.files import ENDINGS, files_of, is_prepared, prepared_rows, rows_of
from dapo_jax.data.rows import AS_USUAL, BadRow, column_names, problem_from_row
from dapo_jax.runtime.files import local_copy
from dapo_jax.types import InputError, Message, Problem

_WATCHED = 1000  # rows between two words on how far the reading is
_SHOWN_COLUMNS = 12

Watch = Callable[[int], Any]  # is told how many rows were read since it was last told


@dataclasses.dataclass(frozen=True)
class Skip:
    """Rows that were left out for one reason."""

    count: int
    first_row: int  # from 1
    columns: Sequence[str] = dataclasses.field(
        default=(), compare=False
    )  # of that row, where it lacks one that is needed

    @property
    def where(self) -> str:
        """The first row, for people: `row 3: columns text, label`."""
        return f"row {self.first_row}" + (
            f": columns {', '.join(self.columns)}" if self.columns else ""
        )


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What became of every row: `rows == problems + elsewhere + duplicates + conflicts + skipped
    rows`.
    """

    source: str
    rows: int
    problems: int  # distinct prompts that are kept
    duplicates: int  # rows whose prompt an earlier row had
    conflicts: int  # distinct prompts that came with different answers, and were dropped whole
    skipped: Mapping[str, Skip]  # by reason
    elsewhere: int = 0  # distinct prompts that an earlier data set of the mixture has
    normalized: Mapping[str, int] = dataclasses.field(
        default_factory=dict
    )  # rows that were not taken literally, by what was done

    def summary(self) -> str:
        """One line for the log."""
        parts = [f"{self.duplicates:,} duplicates"] if self.duplicates else []
        parts += [f"{self.conflicts:,} conflicting prompts dropped"] if self.conflicts else []
        parts += [f"{self.elsewhere:,} in an earlier data set"] if self.elsewhere else []
        parts += [
            f"{skip.count:,} skipped: {reason} ({skip.where})"
            for reason, skip in self.skipped.items()
        ]
        parts += [f"{count:,} {what}" for what, count in self.normalized.items()]
        summary = f"{self.source}: {self.problems:,} problems from {self.rows:,} rows" + (
            f" ({', '.join(parts)})" if parts else ""
        )
        return printable(summary)


# --------------------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------------------


def load_problems(
    source: str,
    arithmetic: ArithmeticConfig,
    *,
    columns: ColumnsConfig = AS_USUAL,
    heldout: bool = False,
    watch: Watch | None = None,
) -> tuple[list[Problem], LoadReport]:
    """Distinct problems of a data set, in order of first appearance, and what became of its rows.

    `source` is a file, or a folder or pattern of shards (`files.py`), a folder prepared by
    tensorflow-datasets, or the word `arithmetic`, which makes the problems of `arithmetic`.
    `heldout` selects evaluation problems where a source has both kinds. Raises InputError if the
    source cannot be read, or holds no usable problem.
    """
    if source == "arithmetic":
        problems = arithmetic_problems(arithmetic, heldout=heldout)
        report = LoadReport(
            source, len(problems), len(problems), duplicates=0, conflicts=0, skipped={}
        )
    else:
        with local_copy(source, [f"*{ending}" for ending in ENDINGS]) as path:
            problems, report = _load(source, str(path), columns, heldout, watch)
    return [dataclasses.replace(p, source=source) for p in problems], report


def _load(
    source: str, path: str, columns: ColumnsConfig, heldout: bool, watch: Watch | None
) -> tuple[list[Problem], LoadReport]:
    """The problems of `path`, a file or folder of this machine, which messages call `source`."""
    try:
        prepared = is_prepared(path)
        files = [] if prepared else files_of(source, path, heldout)
        before = _versions(files)
        rows = (
            prepared_rows(source, path, heldout)
            if prepared
            else rows_of(source, files, column_names(columns))
        )
        loaded = collect_problems(source, rows, columns, watch)
        after = _versions(files)
    except FileNotFoundError:
        raise InputError(f"{source}: no such file; correct the path") from None
    except OSError as e:
        raise InputError(
            f"{source}: cannot be read ({e.strerror or e}); check the file and its permissions"
        ) from None
    if before != after:
        raise InputError(f"{source}: changed while it was read; run again when it is complete")
    return loaded


def _versions(files: Sequence[str]) -> list[tuple[int, int]]:
    """What tells whether files were written to."""
    return [(found.st_size, found.st_mtime_ns) for found in map(os.stat, files)]


def collect_problems(
    source: str, rows: Iterable[tuple[int, Any]], columns: ColumnsConfig, watch: Watch | None = None
) -> tuple[list[Problem], LoadReport]:
    """Parses numbered rows, keeps one problem a distinct prompt, drops prompts with conflicting
    answers, counts the rest.

    A row may be the BadRow that its reader makes of it. Only distinct prompts stay in memory.
    Raises InputError if no problem is left.
    """
    found: dict[str | tuple[Message, ...], Problem | None] = {}  # None: answers conflict
    skipped: dict[str, Skip] = {}
    normalized: Counter[str] = Counter()
    total = duplicates = 0
    for number, row in rows:
        total += 1
        if watch is not None and total % _WATCHED == 0:
            watch(_WATCHED)
        notes: list[str] = []
        try:
            if isinstance(row, BadRow):
                raise row
            problem = problem_from_row(row, columns, notes)
        except BadRow as e:
            before = skipped.get(str(e)) or Skip(0, number, _shown(e.columns))
            skipped[str(e)] = dataclasses.replace(before, count=before.count + 1)
            continue
        if notes:
            normalized.update(dict.fromkeys(notes, 1))
        if problem.prompt not in found:
            found[problem.prompt] = problem
            continue
        duplicates += 1
        first = found[problem.prompt]
        if first is not None and first.answer != problem.answer:
            found[problem.prompt] = None
    problems = with_unique_ids([p for p in found.values() if p is not None])
    report = LoadReport(
        source,
        total,
        len(problems),
        duplicates,
        len(found) - len(problems),
        skipped,
        normalized=normalized,
    )
    if not problems:
        recipe = f"{{path: {source}, columns: {{prompt: COLUMN, answer: COLUMN}}}}"
        raise InputError(
            f"{report.summary()}; give rows with a `prompt` and an `answer`, or name their columns: {recipe}"
        )
    return problems, report


def _shown(columns: Sequence[str]) -> list[str]:
    """Names of columns as messages hold them: few, short and without control characters."""
    return [printable(name)[:40] for name in columns[:_SHOWN_COLUMNS]] + ["..."] * (
        len(columns) > _SHOWN_COLUMNS
    )


def with_unique_ids(problems: list[Problem]) -> list[Problem]:
    """A data set's own identifiers where they identify, else ones that derive from the prompt."""
    uses = Counter(p.id for p in problems)
    return [
        p if p.id and uses[p.id] == 1 else dataclasses.replace(p, id=_content_id(p.prompt))
        for p in problems
    ]


# --------------------------------------------------------------------------------------------------------------------
# Identity and order
# --------------------------------------------------------------------------------------------------------------------


def _plain_prompt(prompt: str | tuple[Message, ...]) -> str | list[list[str]]:
    return prompt if isinstance(prompt, str) else [[turn.role, turn.content] for turn in prompt]


def _content_id(prompt: str | tuple[Message, ...]) -> str:
    return hashlib.sha256(json.dumps(_plain_prompt(prompt)).encode()).hexdigest()[:16]


def problems_digest(problems: Iterable[Problem]) -> str:
    """SHA-256, in hexadecimal, of ids, prompts and answers in order: equal if and only if the
    problems are.
    """
    digest = hashlib.sha256()
    for p in problems:
        digest.update(json.dumps([p.id, _plain_prompt(p.prompt), p.answer]).encode() + b"\n")
    return digest.hexdigest()


def epoch_order(count: int, *, seed: int, epoch: int, stream: int = 0) -> np.ndarray:
    """The order of problems in an epoch: a permutation of 0..count-1, int64 [count], a function of
    its arguments alone.

    Sorts raw Philox words, a stream that numpy promises not to change; it makes no such promise of
    `Generator.permutation`. Another `stream` gives orders that have nothing to do with each other.
    seed: below 2^32.
    """
    words = np.random.Philox(key=np.array([seed | stream << 32, epoch], np.uint64)).random_raw(
        count
    )
    return np.argsort(words, kind="stable")


class Cursor(NamedTuple):
    """A place in the endless sequence of epochs."""

    epoch: int = 0
    index: int = 0  # type: ignore[assignment]  # draws of this epoch already made; hides tuple.index


def advance(
    cursor: Cursor,
    count: int,
    take: int,
    *,
    seed: int,
    order: Callable[..., np.ndarray] | None = None,
) -> tuple[np.ndarray, Cursor]:
    """The next `take` of `count` problems as indices, int64 [take], and the cursor after them.

    Each problem comes once an epoch.

    order: gives the `count` draws of an `epoch`, where they are not those of `epoch_order`.
    """
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
