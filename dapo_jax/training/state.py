"""Where a run stands: all that it needs to go on, as one checkpoint holds it.

A run may be left at three kinds of places. Between two steps, and while a step draws, it stands at
the end of the last step: what a step has drawn so far is drawn again, bit for bit the same. While a
step updates and evaluates it stands `under way`: the groups it drew, the updates it made. And
before the first step, in the midst of supervised warm-up.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from dapo_jax.dapo.buffer import DynamicSamplingBuffer
from dapo_jax.data.problems import Cursor
from dapo_jax.runtime.checkpoint import Checkpoints, Restored
from dapo_jax.runtime.files import reason
from dapo_jax.runtime.metrics import definition
from dapo_jax.training.dynamic_sampling import (
    Drawn,
    OpenGroup,
    keep_rate_after,
    open_state,
    restore_open,
)
from dapo_jax.types import Group, InputError, NoCheckpointError, Prompt


class Progress(NamedTuple):
    """How far a run is.

    Steps, updates and prompts are counted apart, because they are three things.
    """

    step: int = 0  # rollout steps done
    updates: int = 0  # gradient updates applied
    draws: int = 0  # prompts drawn
    cursor: Cursor = Cursor()  # next problem of the shuffled order
    keep_rate: float = 1.0  # expected share of informative groups
    warmed: int = 0  # updates of supervised warm-up done
    begun: bool = False  # warm-up and the evaluation before training are done
    nonfinite: int = 0  # updates in a row, up to the last one, that were skipped
    rollbacks: int = 0  # times that the run went back to an earlier step


class PartialStep(NamedTuple):
    """A step between its drawing and its line."""

    drawn: dict[str, float]  # metrics of what it drew
    sums: list[dict[str, Any]]  # metric sums of its updates so far, on devices or host


class DataDigests(NamedTuple):
    """Which problems a run trains on, and as which tokens."""

    loaded: str  # of data.train, those that evaluation sets hold too among them
    trained_on: str  # without these, and with their weights
    tokens: str  # of the prompts of the latter


@dataclasses.dataclass
class Run:
    """A run at this moment."""

    buffer: DynamicSamplingBuffer
    at: Progress
    state: Any = None  # a TrainState
    left_open: Sequence[OpenGroup] = ()  # by partial rollouts, for the next step
    partial: PartialStep | None = None
    saved: Progress | None = None  # what the newest checkpoint of a whole step says

    @property
    def where(self) -> str:
        """In words."""
        return f"step {self.at.step}" + (
            f" and {len(self.partial.sums)} updates of the next" if self.partial else ""
        )

    def commit(self, drawn: Drawn, groups: Sequence[Group], *, at_least: int) -> None:
        """A step has drawn. groups: those of `drawn`, with log π_old.

        Raises StarvedError, and stands where it stood, if there are fewer than `at_least` groups to
        train on: the step is then drawn anew when the run goes on, under the limits and from the
        problems that it has by then.
        """
        self.buffer.add(groups, at_least=at_least)
        self.left_open = drawn.open
        at = self.at
        self.at = at._replace(
            draws=at.draws + drawn.draws,
            cursor=drawn.cursor,
            keep_rate=keep_rate_after(at.keep_rate, groups),
        )


def save(
    run: Run,
    checkpoints: Checkpoints,
    *,
    config: Mapping[str, Any],
    data: DataDigests,
    function: str | None,
) -> None:
    """Saves a checkpoint unless the newest one is of this progress.

    function: digest of the file of reward.function, if there is one.
    """
    whole = run.at.begun and run.partial is None
    if whole and run.at == run.saved:
        return
    host: dict[str, Any] = {
        "progress": run.at,
        "config": config,
        "data_digest": data.trained_on,
        "loaded_digest": data.loaded,
    }
    host["tokens_digest"] = data.tokens
    host["function_digest"] = function
    arrays = run.buffer.state() | open_state(run.left_open)
    if run.partial is not None:
        sums = fetched(run.partial.sums)
        host |= {"drawn": run.partial.drawn, "sums": sorted(sums[0]) if sums else []}
        if sums:  # arrays, for what a skipped update summed up may be no number that JSON knows
            arrays["partial_sums"] = np.array(
                [[s[name] for name in sorted(s)] for s in sums], np.float64
            )
    checkpoints.save(run.at.step, run.state, host, arrays, partial=not whole)
    run.saved = run.at if whole else None


def restore(
    run: Run,
    checkpoints: Checkpoints,
    abstract_state: Any,
    *,
    prompts: Sequence[Prompt],
    data: DataDigests,
    allow_change: bool = False,
    at_most: int | None = None,
) -> bool:
    """Takes up the newest usable checkpoint, of a step no later than `at_most`; False if there is
    none.

    prompts: of the whole data set. allow_change: goes on although the data set is another one: at
    its start, and without the groups that were drawn from the old one. Raises InputError if the
    data set is another one otherwise; it is also where evaluation sets have come to hold other
    problems of it, and where its prompts have become other tokens. Raises NoCheckpointError if the
    digests of the checkpoint hold, but not what it says of the run.
    """
    if at_most is not None and min(checkpoints.steps(), default=at_most + 1) > at_most:
        return False
    run.state = None  # its memory is needed
    restored = checkpoints.restore(abstract_state, at_most=at_most)
    if restored is None:
        return False
    try:
        _take_up(run, restored, prompts, data, allow_change)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as e:
        raise NoCheckpointError(
            f"{restored.path}: its digests hold, but what it says of the run cannot be ({reason(e)}); put back a copy, or move it out of "
            "the folder: the run then goes on from the checkpoint before"
        ) from None
    return True


def _take_up(
    run: Run, restored: Restored, prompts: Sequence[Prompt], data: DataDigests, allow_change: bool
) -> None:
    host, arrays = restored.host, restored.groups
    at = _progress(host["progress"], restored.step)
    changed, before = "data.train: is not the data set that the run was started with", "that one"
    same = host["data_digest"] == data.trained_on
    if same:
        changed, before = (
            "model.folder: its tokenizer or chat template makes other prompts than when the run was started",
            "the files it had",
        )
        same = (
            host.get("tokens_digest", data.tokens) == data.tokens
        )  # absent where an earlier version saved
    elif host.get("loaded_digest") == data.loaded:
        changed = "eval.sets: hold other prompts of data.train than when the run was started, and what they hold is not trained on"
        before = "the sets that it had (python -m dapo_jax.evaluate measures any other)"
    if same:
        run.buffer.restore(arrays, {p.problem.id: p.problem for p in prompts})
        run.left_open = restore_open(arrays, prompts)
        run.partial = _partial_step(host, arrays) if "drawn" in host else None
    elif not allow_change:
        raise InputError(
            f"{changed}; use {before}, or set data.allow_change to go on from the start of what there is now, or give another --run-dir"
        )
    elif "drawn" in host:
        raise InputError(
            f"{changed}, and the run was stopped in the midst of step {at.step + 1}; finish that with {before}"
        )
    else:
        at = at._replace(cursor=Cursor())
        run.buffer.clear()
        run.left_open, run.partial = (), None
    run.at, run.state, run.saved = at, restored.state, at if run.partial is None else None


def _progress(found: Sequence[Any], step: int) -> Progress:
    """Raises TypeError or ValueError unless a record holds what `save` writes."""
    at = Progress(*found)
    at = at._replace(cursor=Cursor(*at.cursor))
    if [type(value) for value in (*at, *at.cursor)] != [
        type(value) for value in (*Progress(), *Cursor())
    ]:
        raise TypeError("progress of other types")
    if at.step != step or min(at[:3] + at.cursor) < 0 or not 0 <= at.keep_rate <= 1:
        raise ValueError("progress that cannot be")
    return at


def _partial_step(host: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> PartialStep:
    """Raises as `_progress`."""
    drawn = host["drawn"]
    if not all(definition(key) and isinstance(value, int | float) for key, value in drawn.items()):
        raise TypeError("metrics of other names or types")
    return PartialStep(drawn, _sums(host["sums"], arrays))


def fetched(sums: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Metric sums as Python numbers."""
    return [{name: float(value) for name, value in s.items()} for s in jax.device_get(list(sums))]


def _sums(names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        dict(zip(names, map(float, row), strict=True)) for row in arrays.get("partial_sums", ())
    ]
