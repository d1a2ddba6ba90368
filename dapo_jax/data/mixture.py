"""Training problems of one data set or several: with weights, every data set goes through shuffled
epochs of its own.

With weights w, a share w / Σw of all draws is of each data set. An epoch is as many draws as there
are problems, of all data sets together: N. In E epochs a data set is drawn w / Σw x N x E times, to
within one draw, and where in an epoch its draws stand is drawn at random. Which of its problems
they are goes on from epoch to epoch: all of them in random order, then all of them in another.

Draws are a function of the seed and the cursor. They do not depend on how many hosts there are or
how a run was cut.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from dapo_jax.config import DataSection, TrainSet
from dapo_jax.data.problems import (
    Cursor,
    LoadReport,
    Watch,
    advance,
    epoch_order,
    load_problems,
    problems_digest,
    with_unique_ids,
)
from dapo_jax.data.rows import AS_USUAL
from dapo_jax.types import InputError, Message, Problem


class Mixture(NamedTuple):
    """Data sets that are drawn from together. Their problems lie one data set after the other."""

    sources: tuple[str, ...]
    counts: tuple[int, ...]  # problems of each
    weights: tuple[float, ...]  # share of the draws, up to a common factor

    def shares(self) -> list[Fraction]:
        """Share of each in the draws, adding up to 1."""
        weights = [Fraction(weight) for weight in self.weights]
        return [weight / sum(weights) for weight in weights]

    def summary(self) -> str:
        """Who is drawn how often, for people; empty for a single data set."""
        if len(self.sources) == 1:
            return ""
        total = sum(self.counts)
        return ", ".join(
            f"{float(share):.1%} {source} ({count:,} prompts, each drawn {float(share) * total / count:.2g} times an epoch)"
            for source, count, share in zip(self.sources, self.counts, self.shares(), strict=True)
        )


def load_training(
    section: DataSection, watch: Watch | None = None
) -> tuple[list[Problem], list[LoadReport]]:
    """The distinct problems of data.train, one data set after the other, and what became of the
    rows of each.

    A prompt that several data sets have is the first one's, and its answer too.
    Raises InputError if a data set cannot be read, or has no problem of its own.
    """
    found: dict[str | tuple[Message, ...], Problem] = {}
    reports = []
    for one in section.train:
        columns = one.columns or AS_USUAL
        problems, report = load_problems(one.path, section.arithmetic, columns=columns, watch=watch)
        own = [p for p in problems if p.prompt not in found]
        if not own:
            raise InputError(
                f"{one.path}: every problem is in an earlier data set of data.train; leave this one out"
            )
        found |= {p.prompt: p for p in own}
        reports.append(
            dataclasses.replace(report, problems=len(own), elsewhere=len(problems) - len(own))
        )
    return (with_unique_ids([*found.values()]) if len(reports) > 1 else [*found.values()]), reports


def mix(train: Sequence[TrainSet], problems: Sequence[Problem]) -> Mixture:
    """The mixture of those problems of `load_training` that are to be drawn.

    Raises InputError if a data set has none among them, or too small a weight to be drawn in every
    epoch.
    """
    sources = tuple(one.path for one in train)
    counts = tuple(sum(p.source == source for p in problems) for source in sources)
    mixture = Mixture(sources, counts, tuple(one.weight for one in train))
    for source, count, share in zip(sources, counts, mixture.shares(), strict=True):
        if not count:
            raise InputError(f"{source}: has no prompt to train on; leave it out of data.train")
        if share * len(problems) < 1:
            raise InputError(
                f"data.train: {source}: weight {float(share):.2g} of the whole is less than one draw in an epoch of {len(problems):,}; "
                "raise it, or leave it out"
            )
    return mixture


def drawn_of_each(mixture: Mixture, epochs: int) -> list[int]:
    """How many draws of each data set the first `epochs` epochs hold: within one of its share, and
    N x epochs together.
    """
    draws = sum(mixture.counts) * epochs
    edges = [
        math.floor(draws * share) for share in accumulate(mixture.shares(), initial=Fraction(0))
    ]
    return [end - begin for begin, end in pairwise(edges)]


@functools.lru_cache(maxsize=4)
def mixture_order(mixture: Mixture, *, seed: int, epoch: int) -> np.ndarray:
    """The draws of an epoch as indices of problems, int64 [N], a function of its arguments alone.

    Of one data set: `epoch_order`.
    """
    begins, ends = (drawn_of_each(mixture, e) for e in (epoch, epoch + 1))
    owners = np.repeat(np.arange(len(mixture.counts)), np.subtract(ends, begins))
    owners = owners[epoch_order(len(owners), seed=seed, epoch=epoch, stream=len(mixture.counts))]
    order = np.empty(len(owners), np.int64)
    first = 0
    for n, count in enumerate(mixture.counts):
        own_order = functools.partial(epoch_order, count, seed=seed, stream=n)
        own, _ = advance(
            Cursor(*divmod(begins[n], count)),
            count,
            ends[n] - begins[n],
            seed=seed,
            order=own_order,
        )
        order[owners == n] = first + own
        first += count
    order.flags.writeable = False  # it is shared by all who ask
    return order


def next_problems(
    mixture: Mixture, cursor: Cursor, wanted: int, *, seed: int
) -> tuple[np.ndarray, Cursor]:
    """The next `wanted` draws as indices of problems, int64 [wanted], and the cursor after them."""
    order = functools.partial(mixture_order, mixture, seed=seed)
    return advance(cursor, sum(mixture.counts), wanted, seed=seed, order=order)


def mixture_digest(problems: Sequence[Problem], mixture: Mixture) -> str:
    """Equal if and only if problems and weights are. Of one data set: `problems_digest`."""
    digest = problems_digest(problems)
    if len(mixture.counts) == 1:
        return digest
    return hashlib.sha256(
        json.dumps([digest, mixture.counts, mixture.weights]).encode()
    ).hexdigest()
