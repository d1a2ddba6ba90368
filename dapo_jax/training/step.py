"""A rollout step on devices: log π_old of the drawn groups, mini-batches, updates."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from dapo_jax.config import DapoSection, OptimSection
from dapo_jax.dapo.buffer import StepCounts
from dapo_jax.dapo.groups import (
    corrects_mismatch,
    is_informative,
    removed_responses,
    step_advantages,
)
from dapo_jax.dapo.packing import (
    PackStats,
    TrainItem,
    build_batch,
    gather_targets,
    normalizer_weights,
)
from dapo_jax.dapo.update import learning_rate
from dapo_jax.runtime import multihost
from dapo_jax.runtime.console import progress
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.mesh import put_rows
from dapo_jax.runtime.metrics import timed
from dapo_jax.training.programs import TrainPrograms
from dapo_jax.training.setup import BatchShape
from dapo_jax.training.state import RunState, fetched, skipped_in_a_row
from dapo_jax.types import Group, NonFiniteError, Params, TrainBatch


class Updates(NamedTuple):
    """The groups and batches that one step trained on."""

    kept: Sequence[Group]
    counts: StepCounts
    first_draw: int  # of the step
    sizes: Sequence[int]  # groups of each update
    packed: Sequence[PackStats]  # of each update
    resumed: int  # updates done before the run resumed
    rate: float  # learning rate


def groups_of_updates(count: int, algo: DapoSection) -> list[slice]:
    """Which of a step's groups each update trains on, in draw order, in as few updates as possible.

    An underfilled step is spread evenly: 33 groups, of which 32 fill an update, become 17 and 16.
    """
    updates = math.ceil(count * algo.responses_per_prompt / algo.responses_per_update)
    ends = [math.ceil(n * count / updates) for n in range(updates + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def minibatches(
    groups: Sequence[Group], algo: DapoSection, shape: BatchShape, first_draw: int = 0
) -> Iterator[tuple[TrainBatch, PackStats]]:
    """Yields the packed batch of each update, with advantages and loss weights.

    first_draw: of the step. The sampler's log-probs in the ratio are compared from there on only.
    """
    advantages = step_advantages([g.reward for g in groups], algo)
    for part in groups_of_updates(len(groups), algo):
        mine = groups[part]
        responses = [r for group in mine for r in group.responses]
        weights = normalizer_weights(
            np.repeat(np.arange(len(mine)), [len(group.responses) for group in mine]),
            np.array([len(r.tokens) for r in responses]),
            np.array([not (r.truncated and algo.overlong_filtering) for r in responses]),
            normalizer=algo.loss_normalizer,
            length=algo.loss_length,
        )
        weight, items = iter(weights.tolist()), []
        for g, scores in zip(mine, advantages[part], strict=True):
            removed = np.logical_or(*removed_responses(g, algo))  # the normaliser still counts them
            current = algo.old_logprobs == "recompute" or g.draw >= first_draw
            each = zip(g.responses, g.old_logprobs, scores.tolist(), removed, strict=True)
            for r, old, a, out in each:
                w, tokens = next(weight) * (not out), (g.prompt.tokens, r.tokens)
                item = TrainItem(*tokens, old, r.behavior_logprobs, a, w, current, r.experts)
                items.append(item)
        yield build_batch(items, **shape._asdict())


@dataclasses.dataclass(frozen=True)
class Trainer:
    """Scores groups and updates the policy on them."""

    programs: TrainPrograms
    publish: Callable[[Params], Params]  # parameters → rollout weights, valid until an update
    algo: DapoSection
    optim: OptimSection
    shape: BatchShape
    mesh: Mesh
    guard: Guard
    bars: bool = False

    def publish_weights(self, run: RunState) -> None:
        """Sets `run.weights`, the rollout weights of the current parameters, unless it is set."""
        if run.weights is None:
            run.weights = self.publish(run.state.params)

    def score(self, run: RunState, groups: list[Group], times: dict[str, float]) -> list[Group]:
        """The groups with log π_old of every token by the trainer's own forward pass.

        Done once, when groups are drawn: the first update's ratio is then exactly 1, and carried
        groups keep the log-probs of the policy that drew them. Groups that are not trained on keep
        the sampler's; so do those that partial rollouts finished in this step, whose tokens several
        policies sampled, unless `corrects_mismatch`. Raises NonFiniteError if a log-prob is
        non-finite.
        """
        if self.algo.old_logprobs != "recompute":
            return groups
        dynamic = self.algo.dynamic_sampling
        first = 0 if corrects_mismatch(self.algo) else run.draw.draws
        wanted = [
            g for g in groups if g.draw >= first and (not dynamic or is_informative(g.correct))
        ]
        with timed(times, "time/old_logprobs_s"):
            scored = iter(self._logprobs(run.state.params, wanted))
        new = {}
        for g in wanted:
            old_logprobs = tuple(itertools.islice(scored, len(g.responses)))
            new[g.draw] = dataclasses.replace(g, old_logprobs=old_logprobs)
        return [new.get(g.draw, g) for g in groups]

    def _logprobs(self, params: Params, groups: Sequence[Group]) -> list[np.ndarray]:
        """The trainer's log-probs of the tokens of each response, float32 [R]."""
        items = [
            TrainItem(g.prompt.tokens, r.tokens, sampled, sampled, 0.0, 0.0, experts=r.experts)
            for g in groups
            for r in g.responses
            for sampled in [r.behavior_logprobs]
        ]
        scored: list[np.ndarray] = []
        size = self.algo.responses_per_update
        for start in range(0, len(items), size):
            self.guard.reach("score")
            batch, stats = build_batch(items[start : start + size], **self.shape._asdict())
            rows = put_rows(batch, self.mesh, axis=1)
            values = multihost.fetch(self.programs.old_logprobs(params, rows))
            scored += gather_targets(values, stats.placement)
        if bad := sum(not np.isfinite(logprobs).all() for logprobs in scored):
            raise NonFiniteError(
                f"the trainer's log-probs of {bad} of {len(scored)} responses are non-finite, "
                "though the sampler's are finite"
            )
        return scored

    def update(self, run: RunState, times: dict[str, float]) -> Updates:
        """One pass over the groups in mini-batches of whole groups, then new rollout weights.

        Skips updates that a restored checkpoint holds. Raises NonFiniteError if
        `optim.max_nonfinite_updates` in a row have a non-finite loss or gradient.
        """
        assert run.partial is not None
        kept, counts = run.buffer.ready()
        first_draw = run.draw.draws - int(run.partial.drawn["rollout/prompts"])
        run.weights = None  # to free their memory
        sums, algo = run.partial.sums, self.algo
        rate, resumed = learning_rate(self.optim, run.progress.step + 1), len(sums)
        packed: list[PackStats] = []
        bar = progress(len(kept), f"{self.guard.doing}: update", enabled=self.bars)
        with timed(times, "time/update_s"), bar:
            batches = minibatches(kept, algo, self.shape, first_draw)
            for n, (batch, stats) in enumerate(batches):
                packed.append(stats)
                bar.update(algo.responses_per_update // algo.responses_per_prompt)
                if n < resumed:
                    continue
                rows = put_rows(batch, self.mesh, axis=1)
                # One update runs while the next batch is built: a signal waits for one at most.
                jax.block_until_ready(sums[-1:])
                self.guard.reach("update")
                run.state, s = self.programs.update(run.state, rows, np.float32(rate))
                sums.append(s)
            sums[:] = fetched(sums)
        most, _ = skipped_in_a_row(run.progress.nonfinite, sums)
        if most >= self.optim.max_nonfinite_updates:
            what = "had a non-finite loss or gradient and were skipped"
            raise NonFiniteError(f"{most} updates in a row {what}")
        self.publish_weights(run)
        sizes = [part.stop - part.start for part in groups_of_updates(len(kept), algo)]
        return Updates(kept, counts, first_draw, sizes, packed, resumed, rate)
