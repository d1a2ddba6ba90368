"""Training problems of one data set, or of several with weights.

With weights w, a data set gets a share w / Σw of the draws, in its own shuffled epochs. An epoch of
the mixture is N draws for N problems in all. In E epochs a data set is drawn w / Σw · N · E times,
to within one draw, at random places. Draws are a function of the seed and the cursor.
"""

import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from dapo_jax.config import DataSection, TrainSet
from dapo_jax.data import problems as single
from dapo_jax.data.problems import Cursor, LoadReport, advance, load_problems
from dapo_jax.data.rows import AS_USUAL
from dapo_jax.types import InputError, Message, Problem


class Mixture(NamedTuple):
    """Data sets whose problems, one data set after the other, are drawn with weights."""

    sources: tuple[str, ...]
    counts: tuple[int, ...]  # problems of each
    weights: tuple[float, ...]  # share of the draws, up to a common factor

    def shares(self) -> list[Fraction]:
        """Share of each in the draws, adding up to 1."""
        weights = [Fraction(weight) for weight in self.weights]
        return [weight / sum(weights) for weight in weights]

    def summary(self) -> str:
        """The shares, as text; empty for a single data set."""
        parts = []
        for source, count, share in zip(self.sources, self.counts, self.shares(), strict=True):
            times = f"{float(share) * sum(self.counts) / count:.2g} times an epoch"
            parts.append(f"{float(share):.1%} {source} ({count:,} prompts, each drawn {times})")
        return ", ".join(parts) if len(parts) > 1 else ""


def load_training(section: DataSection) -> tuple[list[Problem], list[LoadReport]]:
    """The distinct problems of data.train, one data set after the other, and a report of each.

    A prompt of several data sets belongs to the first of them, with its answer there. Raises
    InputError if a data set cannot be read, or has no problem of its own.
    """
    found: dict[str | tuple[Message, ...], Problem] = {}
    reports = []
    for one in section.train:
        columns = one.columns or AS_USUAL
        problems, report = load_problems(one.path, section.arithmetic, columns=columns)
        own = {p.prompt: p for p in problems if p.prompt not in found}
        if not own:
            where = f"{one.path}: every problem is in an earlier data set of data.train"
            raise InputError(f"{where}; leave this one out")
        found |= own
        counts: Any = {"problems": len(own), "in_earlier_sets": len(problems) - len(own)}
        reports.append(dataclasses.replace(report, **counts))
    mixed = [*found.values()]
    return single.with_unique_ids(mixed) if len(reports) > 1 else mixed, reports


def mix(train: Sequence[TrainSet], problems: Sequence[Problem]) -> Mixture:
    """The mixture of those problems of `load_training` that are to be drawn. InputError if a data
    set has no problem, or less than one draw an epoch."""
    sources = tuple(one.path for one in train)
    counts = tuple(sum(p.source == source for p in problems) for source in sources)
    mixture = Mixture(sources, counts, tuple(one.weight for one in train))
    for source, count, share in zip(sources, counts, mixture.shares(), strict=True):
        if not count:
            raise InputError(f"{source}: has no prompt to train on; leave it out of data.train")
        if share * len(problems) < 1:
            less = f"less than one draw in an epoch of {len(problems):,}; raise it, or leave it out"
            where = f"data.train: {source}: weight {float(share):.2g} of the whole"
            raise InputError(f"{where} is {less}")
    return mixture


def drawn_of_each(mixture: Mixture, epochs: int) -> list[int]:
    """Draws of each data set in so many epochs: N x epochs in all, shares to within one."""
    draws = sum(mixture.counts) * epochs
    edges = [math.floor(draws * s) for s in accumulate(mixture.shares(), initial=Fraction(0))]
    return [end - begin for begin, end in pairwise(edges)]


@functools.lru_cache(maxsize=4)
def mixture_order(mixture: Mixture, *, seed: int, epoch: int) -> np.ndarray:
    """The draws of an epoch as indices of problems, int64 [N]; of one data set: `epoch_order`."""
    counts = mixture.counts
    begins, ends = (drawn_of_each(mixture, e) for e in (epoch, epoch + 1))
    owners = np.repeat(np.arange(len(counts)), np.subtract(ends, begins))
    owners = owners[single.epoch_order(len(owners), seed=seed, epoch=epoch, stream=len(counts))]
    order = np.empty(len(owners), np.int64)
    for n, (count, begin, end) in enumerate(zip(counts, begins, ends, strict=True)):
        own_order = functools.partial(single.epoch_order, count, seed=seed, stream=n)
        start = Cursor(*divmod(begin, count))
        own, _ = advance(start, count, end - begin, seed=seed, order=own_order)
        order[owners == n] = sum(counts[:n]) + own
    order.flags.writeable = False  # the cache shares it
    return order


def next_problems(
    mixture: Mixture, cursor: Cursor, wanted: int, *, seed: int
) -> tuple[np.ndarray, Cursor]:
    """The next `wanted` draws as indices of problems, int64 [wanted], and the cursor after them."""
    order = functools.partial(mixture_order, mixture, seed=seed)
    return advance(cursor, sum(mixture.counts), wanted, seed=seed, order=order)


def mixture_digest(problems: Sequence[Problem], mixture: Mixture) -> str:
    """Equal if and only if problems and weights are. Of one data set: `problems_digest`."""
    digest = single.problems_digest(problems)
    if len(mixture.counts) == 1:
        return digest
    text = json.dumps([digest, mixture.counts, mixture.weights])
    return hashlib.sha256(text.encode()).hexdigest()
