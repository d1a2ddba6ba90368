"""The resumable run state: all that a run needs to continue, as one checkpoint holds it.

While a step samples, the state is that of the end of the previous step: a resumed run samples the
step again, bit for bit. While a step updates and evaluates, a partial checkpoint holds its groups
and the updates done so far. Partial checkpoints of step 0 hold an unfinished warm-up, too.
"""

import contextlib
import dataclasses
import math
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from dapo_jax.dapo.buffer import BufferState, DynamicSamplingBuffer
from dapo_jax.data.inputs import Digests
from dapo_jax.data.problems import Cursor
from dapo_jax.runtime.checkpoint import Checkpoints, Restored
from dapo_jax.runtime.files import reason
from dapo_jax.runtime.metrics import MetricsLog, definition
from dapo_jax.runtime.records import Count, typed
from dapo_jax.training.dynamic_sampling import Drawn, DrawState
from dapo_jax.types import (
    Group,
    InputError,
    NoCheckpointError,
    NonFiniteError,
    Prompt,
    SharedError,
    Stopped,
)

_MAX_ROLLBACKS = 5  # of a run, before it gives up
_COUNTS = ("rollout/prompts", "rollout/tokens", "filter/wasted_tokens")  # that a step ends with


class Progress(NamedTuple):
    step: Count = 0  # rollout steps done
    updates: Count = 0  # gradient updates applied
    warmed: Count = 0  # updates of supervised warm-up done
    begun: bool = False  # warm-up and the evaluation before training are done
    nonfinite: Count = 0  # updates in a row, up to the last one, that were skipped
    rollbacks: Count = 0  # rollbacks so far


class PartialStep(NamedTuple):
    """A step whose groups are sampled and whose metrics are not written yet."""

    drawn: dict[str, int | float]  # its sampling metrics
    sums: list[dict[str, Any]]  # metric sums of its updates so far, on devices or host

    def is_valid(self) -> bool:
        """Whether the keys and numbers are those of a step; sums on the host."""
        numbers = [value for sums in self.sums for value in sums.values()]
        return (
            all(definition(key) for key in self.drawn)
            and all(math.isfinite(self.drawn.get(key, math.nan)) for key in _COUNTS)
            and all("skipped" in sums for sums in self.sums)
            and all(isinstance(value, int | float) for value in numbers)
        )


@dataclasses.dataclass
class RunState:
    buffer: DynamicSamplingBuffer
    progress: Progress = Progress()
    draw: DrawState = DrawState()
    state: Any = None  # a TrainState
    weights: Any = None  # rollout weights, computed from `state`; not saved
    partial: PartialStep | None = None
    saved: Mapping[str, Any] | None = None  # the counts of the newest checkpoint of a whole step

    @property
    def where(self) -> str:
        """How far the run is, in words."""
        if not self.progress.begun:
            return f"{self.progress.warmed} updates of warm-up"
        more = f" and {len(self.partial.sums)} updates of the next" if self.partial else ""
        return f"step {self.progress.step}{more}"

    def counts(self) -> dict[str, Any]:
        return self.progress._asdict() | self.draw._replace(open=())._asdict()

    def commit(
        self, drawn: Drawn, groups: Sequence[Group], metrics: dict[str, float], at_least: int
    ) -> None:
        """Ends the sampling of a step. groups: those of `drawn`, with log π_old.

        Raises UnderfilledError, and changes nothing, with fewer than `at_least` groups to train on.
        """
        self.buffer.add(groups, at_least=at_least)
        self.draw = drawn.state
        self.partial = PartialStep(metrics, [])

    def end_step(self) -> None:
        """Ends the step: its groups leave the buffer."""
        assert self.partial is not None
        sums, done = self.partial.sums, self.progress
        self.buffer.take()
        self.progress = done._replace(
            step=done.step + 1,
            updates=done.updates + sum(not s["skipped"] for s in sums),
            nonfinite=skipped_in_a_row(done.nonfinite, sums)[1],
        )
        self.partial = None


def skipped_in_a_row(before: int, sums: Sequence[Mapping[str, float]]) -> tuple[int, int]:
    """How many updates in a row were skipped, after `before` of earlier steps: (most, last)."""
    most = running = before
    for s in sums:
        running = running + 1 if s["skipped"] else 0
        most = max(most, running)
    return most, running


def fetched(sums: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    return [{name: float(value) for name, value in s.items()} for s in jax.device_get(list(sums))]


@dataclasses.dataclass(frozen=True)
class RunStore:
    """Saves a run to checkpoints, restores it, and rolls it back."""

    checkpoints: Checkpoints
    abstract_state: Any  # a TrainState of shapes and shardings
    prompts: Sequence[Prompt]  # all that the run trains on
    config: Mapping[str, Any]
    digests: Digests
    allow_change: bool = False  # of the data: --allow-change data.train

    def save(self, run: RunState, *, whole: bool = True) -> None:
        """Saves a checkpoint, unless the newest one has the same counts. whole: as one of a whole
        step, if the run is between two.
        """
        warmed = run.progress.warmed >= self.config["supervised"]["updates"]
        whole = whole and warmed and run.partial is None
        if whole and run.counts() == run.saved:
            return
        host = {"progress": run.progress._asdict(), "config": self.config}
        host["digests"] = self.digests._asdict()
        partial = run.partial and run.partial._replace(sums=fetched(run.partial.sums))
        groups = {"buffer": run.buffer.state(), "draw": run.draw, "partial": partial}
        self.checkpoints.save(run.progress.step, run.state, host, groups, partial=not whole)
        run.saved = run.counts() if whole else None

    def restore(self, run: RunState, *, at_most: int | None = None) -> bool:
        """Restores the newest usable checkpoint, not after step `at_most`. False if there is none.

        Raises InputError if the data or the prompts' tokens are not those of the checkpoint; with
        `allow_change` the run then resumes from the start of the data. Raises NoCheckpointError if
        the digests of the checkpoint hold but its content is malformed.
        """
        if at_most is not None and min(self.checkpoints.steps(), default=at_most + 1) > at_most:
            return False
        run.state = run.weights = None  # to free their memory
        restored = self.checkpoints.restore(self.abstract_state, at_most=at_most)
        if restored is None:
            return False
        try:
            self._unpack(run, restored)
        except ValueError as e:
            raise NoCheckpointError(
                f"{restored.path}: its digests hold, but its run state is malformed ({reason(e)}); "
                "put back a copy, or move it out of the folder to resume from the checkpoint before"
            ) from None
        return True

    def resumed(self, run: RunState) -> str:
        """Where a restored run resumes, in words."""
        warmed, planned = run.progress.warmed, self.config["supervised"]["updates"]
        if warmed < planned:
            return f"resumed in warm-up, update {warmed} of {planned}"
        counts = f"{run.progress.updates} updates, {run.draw.draws} draws"
        return f"resumed from the checkpoint of {run.where}: {counts}"

    def _unpack(self, run: RunState, restored: Restored) -> None:
        host, groups = restored.host, restored.groups
        progress = typed(Progress, host.get("progress"))
        draw = typed(DrawState, groups.get("draw"))
        partial = typed(PartialStep, groups["partial"]) if groups.get("partial") else None
        if progress.step != restored.step or (partial and not partial.is_valid()):
            raise ValueError("counts of another step, or metrics of other names")
        changed, remedy = self.digests.changes_from(typed(Digests, host.get("digests")))
        if not changed:
            if any(group.problem >= len(self.prompts) for group in draw.open):
                raise ValueError("an open group of a problem that there is not")
            run.buffer.restore(typed(BufferState, groups.get("buffer")))
        elif not self.allow_change:
            raise InputError(
                f"{changed}; use {remedy}, or give --allow-change data.train to resume from the "
                "start of the current data, or another --run-dir"
            )
        elif partial:
            midst = f"the run was stopped in the middle of step {progress.step + 1}"
            raise InputError(f"{changed}, and {midst}; finish that step with {remedy}")
        else:
            run.buffer.clear()
            draw = draw._replace(open=(), cursor=Cursor())
        run.progress, run.draw, run.state = progress, draw, restored.state
        run.partial = partial
        run.saved = run.counts() if run.partial is None else None

    @contextlib.contextmanager
    def saving_on_exit(self, run: RunState) -> Iterator[None]:
        """Saves a checkpoint when a signal, or an error of all processes, ends the block."""
        try:
            yield
        except SharedError:
            self.save(run)
            raise
        except Stopped as stopped:
            self.save(run)
            saved = f"{signal.Signals(stopped.number).name}: saved a checkpoint after {run.where}"
            resume = f"{saved}; run the same command again to resume"
            raise Stopped(stopped.number, resume) from None

    @contextlib.contextmanager
    def rolling_back(
        self, run: RunState, steps: int | None, log: MetricsLog, info: Callable[[str], None]
    ) -> Iterator[None]:
        """Rolls the run back `steps` steps or more when NonFiniteError ends the block, and saves it
        with the prompts drawn since skipped.

        Raises InputError if `steps` is None or no checkpoint is that old. Nothing of the step is
        saved then: the resumed run repeats it, because a device may have been at fault.
        """
        failure = ""
        try:
            yield
        except NonFiniteError as e:
            failure = f"step {run.progress.step + 1}: {e}"
            traceback.clear_frames(e.__traceback__)  # they hold weights and caches
        if not failure:
            return
        if steps is None:
            raise InputError(
                f"{failure}; lower optim.learning_rate, look at the samples of this step, or set "
                "optim.rollback_steps"
            )
        draw, rollbacks = run.draw, run.progress.rollbacks
        if rollbacks >= _MAX_ROLLBACKS:
            raise InputError(f"{failure}, after {rollbacks} rollbacks; lower optim.learning_rate")
        if not self.restore(run, at_most=run.progress.step - steps):
            raise InputError(
                f"{failure}, and there is no checkpoint {steps} steps back; lower "
                "train.save_every or optim.rollback_steps"
            )
        run.draw = run.draw._replace(draws=draw.draws, cursor=draw.cursor)
        # The checkpoint of step 0 is saved before the evaluation that begins the run.
        run.progress = run.progress._replace(rollbacks=rollbacks + 1, begun=True)
        log.rollback(run.progress.step)
        self.save(run)  # so that a later exit keeps these draws and this rollback counted
        info(
            f"{failure}: rolled back to step {run.progress.step}, skipping the prompts drawn since"
        )
