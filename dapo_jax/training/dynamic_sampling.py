"""Dynamic sampling during decoding: prompts are drawn until enough groups are informative, and
responses are judged as they finish.

    prompts ─▶ engine stream ─▶ finished responses ─▶ reward workers ─▶ verdicts
       ▲                                                                   │
       └──────────────── too few informative groups: draw more ◀───────────┘

Every drawn group is sampled to its end, and a step trains on the first informative ones in draw
order. "First finished wins" would favour short responses. With partial rollouts prompts are drawn
ahead, so that slots stay full; groups after the last one needed stay open, and the next step
continues their responses under new weights.

Time is logical. A verdict on a response of segment k is used from segment k + VERDICT_DELAY on:
never earlier, and decoding waits for it if needed. So all hosts draw the same prompts.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Annotated, NamedTuple

import jax
import numpy as np
from pydantic import AfterValidator, Field

from dapo_jax.config import DapoSection, RewardSection, RolloutSection
from dapo_jax.dapo.groups import is_informative
from dapo_jax.data.mixture import Mixture, next_problems
from dapo_jax.data.problems import Cursor
from dapo_jax.data.prompts import decode
from dapo_jax.reward.overlong import overlong_penalty
from dapo_jax.reward.pool import PendingVerdicts, RewardItem, RewardPool, check_errors
from dapo_jax.rollout.engine import Engine, Stream, refill_size
from dapo_jax.runtime import multihost
from dapo_jax.runtime.console import progress
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.metrics import timed
from dapo_jax.runtime.records import Count
from dapo_jax.training.setup import Policy
from dapo_jax.types import Group, Params, Prompt, Request, Response, Verdict

Times = dict[str, float]

VERDICT_DELAY = 2  # segments that workers have before decoding waits for them

_PRIOR_GROUPS = 8  # weight of the previous keep rate, in groups of this step


def _checked(r: Response) -> Response:
    counts = {len(values) for values in r.sampled} | {sum(n for _, n in r.policies)}
    if len(counts) > 1:
        raise ValueError("a response whose tokens, log-probs and policies differ in number")
    return r


class Sample(NamedTuple):
    response: Annotated[Response, AfterValidator(_checked)] = Response(
        np.zeros(0, np.int32), np.zeros(0, np.float32), False
    )  # so far
    ended: bool = False
    verdict: Verdict | None = None


@dataclasses.dataclass(eq=False)
class OpenGroup:
    """A group that is being sampled or judged."""

    draw: Count
    problem: Count  # index of its prompt in the data set
    samples: list[Sample]

    def requests(self, prompt: Prompt) -> list[Request]:
        return [
            Request(self.draw, n, prompt.tokens, sample.response.sampled)
            for n, sample in enumerate(self.samples)
            if not sample.ended
        ]

    def extend(self, n: int, response: Response, step: int, *, ended: bool) -> None:
        """Sample n is now `response`, as the policy of a rollout step has continued it."""
        before = self.samples[n].response
        policies, new = before.policies, len(response.tokens) - len(before.tokens)
        policies = (*policies, (step, new)) if new else policies
        self.samples[n] = Sample(response._replace(policies=policies), ended)

    def tokens(self) -> int:
        return sum(len(sample.response.tokens) for sample in self.samples)

    def is_judged(self) -> bool:
        return all(sample.verdict is not None for sample in self.samples)

    def is_informative(self) -> bool:
        """Has a correct and an incorrect response already, whatever the rest will be."""
        return self.outcomes() == {True, False}

    def outcomes(self) -> set[bool]:
        """The distinct outcomes so far, without errors: time-outs depend on the clock."""
        return {v.correct for *_, v in self.samples if v is not None and v.error is None}

    def judged(self, prompt: Prompt, reward: RewardSection, max_response_len: int) -> Group:
        """The group with its rewards, score + overlong penalty; without what got no verdict."""
        judged = [(r, v) for r, _, v in self.samples if v is not None and v.error is None]
        lengths = np.array([len(r.tokens) for r, _ in judged], np.int64)
        penalty = np.zeros(len(judged), np.float32)
        if reward.overlong_penalty:
            buffer_len = reward.overlong_buffer_len
            penalty = overlong_penalty(
                lengths, max_response_len=max_response_len, overlong_buffer_len=buffer_len
            )
        return Group(
            draw=self.draw,
            prompt=prompt,
            responses=tuple(r for r, _ in judged),
            correct=np.array([v.correct for _, v in judged], bool),
            reward=np.array([v.score for _, v in judged], np.float32) + penalty,
            penalty=penalty,
            old_logprobs=tuple(r.behavior_logprobs for r, _ in judged),
        )


class DrawState(NamedTuple):
    """Where dynamic sampling continues; part of a checkpoint."""

    cursor: Cursor = Cursor()  # next problem of the shuffled order
    draws: Count = 0  # prompts drawn since the run began
    # expected share of informative groups
    keep_rate: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 1.0
    open: tuple[OpenGroup, ...] = ()  # left by partial rollouts, in draw order
    step: Count = 0  # rollout steps sampled


class Drawn(NamedTuple):
    """The groups and counts that one step sampled."""

    groups: list[Group]  # in draw order; old_logprobs are the sampler's
    verdicts: list[Verdict]
    draws: int  # prompts drawn, those of groups left open included
    tokens: int  # response tokens sampled, those of groups left open included
    unjudged_tokens: int  # of the groups' responses that got no verdict
    state: DrawState  # where the next step continues
    suspended: int = 0  # times that a sequence was, for lack of cache
    decode_steps: int = 0


def keep_rate_after(rate: float, groups: Sequence[Group]) -> float:
    """Expected share of informative groups, half from this step and half from those before."""
    if not groups:
        return rate
    return 0.5 * rate + 0.5 * float(np.mean([is_informative(g.correct) for g in groups]))


@dataclasses.dataclass
class GroupCounts:
    """How many of a step's groups are judged, and what is known of the others."""

    kept: int = 0  # judged and informative
    dropped: int = 0  # judged and not
    early: int = 0  # informative already, though not judged
    # by draw, whether informative already
    unjudged: dict[int, bool] = dataclasses.field(default_factory=dict)

    def update(self, changed: Iterable[OpenGroup]) -> "GroupCounts":
        """Counts groups that are new or have got verdicts since they were last counted."""
        for group in changed:
            informative = group.is_informative()
            if not group.is_judged():
                self.unjudged[group.draw] = informative
                continue
            self.unjudged.pop(group.draw, None)
            self.kept += informative
            self.dropped += not informative
        self.early = sum(self.unjudged.values())
        return self


def prompts_wanted(missing: int, counts: GroupCounts, rate: float) -> int:
    """How many more prompts the step needs, given the groups drawn so far.

    (missing - kept - max(early, p x unjudged) + margin) / p, rounded up. p, the keep rate, is the
    mean of `rate`, weighted as a few groups, and of the judged groups. The margin is one standard
    deviation of what is still missing, from the first verdicts on: without it the last prompts
    would be drawn a few at a time, each as slow as its longest response.

    >>> prompts_wanted(6, GroupCounts(), 0.5), prompts_wanted(6, GroupCounts(), 0.25)
    (12, 24)
    """
    p = (_PRIOR_GROUPS * rate + counts.kept) / (_PRIOR_GROUPS + counts.kept + counts.dropped)
    left = missing - counts.kept - counts.early
    if left <= 0:
        return 0
    known = counts.kept + counts.dropped + counts.early > 0
    margin = math.sqrt(left * (1 - p)) if known else 0.0
    short = missing - counts.kept - max(counts.early, p * len(counts.unjudged)) + margin
    return math.ceil(short / p - 1e-9) if short > 0 else 0


@dataclasses.dataclass(frozen=True)
class DynamicSampler:
    engine: Engine
    prompts: Sequence[Prompt]
    mixture: Mixture  # of the prompts
    policy: Policy
    pool: RewardPool
    guard: Guard  # reached after each segment (`rollout`) and before verdicts are used (`reward`)
    algo: DapoSection
    reward: RewardSection
    rollout: RolloutSection
    seed: int
    bars: bool = False

    def draw(self, params: Params, state: DrawState, missing: int, times: Times) -> Drawn:
        """Draws until `missing` groups are informative (without dynamic sampling: have a verdict),
        or the cap on draws is reached.

        params: rollout weights. times: time/rollout_s and time/reward_s are added to. Raises
        InputError if too many responses get no verdict, Stopped on a signal.
        """
        if not missing:
            return Drawn([], [], 0, 0, 0, state._replace(step=state.step + 1))
        stream = self.engine.stream(params, jax.random.key(self.seed))
        step = _StepDraw(self, stream, state, missing, times)
        partial = self.algo.partial_rollouts
        with progress(None, f"{self.guard.doing}: rollout", enabled=self.bars) as bar:
            while True:
                if (wanted := step.wanted()) > 0:
                    step.draw(wanted)
                if stream.live or stream.pending:
                    bar.update(step.advance())
                    bar.total = len(step.groups) * self.algo.responses_per_prompt
                elif not step.judging:
                    break
                step.collect_verdicts()
                if partial and not step.judging and step.enough():
                    break
        return step.drawn()


class _StepDraw:
    def __init__(
        self, sampler: DynamicSampler, stream: Stream, state: DrawState, missing: int, times: Times
    ):
        algo = sampler.algo
        self.sampler, self.stream, self.state = sampler, stream, state
        self.missing, self.times, self.cursor = missing, times, state.cursor
        self.step = state.step + 1
        cap = algo.max_generation_batches * algo.prompts_per_draw
        self.cap = cap if algo.dynamic_sampling else max(cap, missing)
        self.keep_rate = min(1.0, max(state.keep_rate, missing / self.cap))
        self.draws, self.finished = 0, 0
        self.groups: list[OpenGroup] = []  # in draw order
        self.counts = GroupCounts()
        self.settled = self.settled_informative = 0  # of the groups before the first not judged
        self.by_draw: dict[int, OpenGroup] = {}
        self.verdicts: list[Verdict] = []
        # segment from which verdicts are used, requests, verdicts
        self.judging = collections.deque[tuple[int, list[Request], PendingVerdicts]]()
        self._submit([dataclasses.replace(g, samples=[*g.samples]) for g in state.open])

    def _submit(self, groups: Sequence[OpenGroup]) -> None:
        self.groups += groups
        self.by_draw |= {group.draw: group for group in groups}
        prompts = self.sampler.prompts
        self.stream.submit([q for group in groups for q in group.requests(prompts[group.problem])])
        self._count(groups)

    def wanted(self) -> int:
        left, algo = self.cap - self.draws, self.sampler.algo
        if not algo.dynamic_sampling:
            usable = sum(bool(g.outcomes()) or not g.is_judged() for g in self.groups)
            return min(self.missing - usable, left)
        slots = self.sampler.rollout.decode_slots
        if algo.partial_rollouts:
            if algo.max_policy_age is not None:
                left = min(left, self._young(algo.max_policy_age))
            return 0 if self.enough() else min(self._room(slots + refill_size(slots)), left)
        wanted = prompts_wanted(self.missing, self.counts, self.keep_rate)
        return min(wanted, self._room(2 * slots), left)

    def _room(self, requests: int) -> int:
        """Prompts that give the engine so many requests, rounded up."""
        more = requests - self.stream.live - self.stream.pending
        return -(-more // self.sampler.algo.responses_per_prompt)

    def _young(self, age: int) -> int:
        """Prompts that are trained on at most `age` steps from now, whatever their verdicts."""
        ahead = self.counts.kept + len(self.counts.unjudged)
        return self.missing + age * self.sampler.algo.prompts_per_step - ahead

    def draw(self, count: int) -> None:
        sampler, first = self.sampler, self.state.draws + self.draws
        samples = [Sample()] * sampler.algo.responses_per_prompt
        taken, self.cursor = next_problems(sampler.mixture, self.cursor, count, seed=sampler.seed)
        self.draws += count
        problems = enumerate(taken.tolist(), first)
        self._submit([OpenGroup(draw, i, [*samples]) for draw, i in problems])

    def advance(self) -> int:
        """Decodes a segment and submits the responses that finish to the reward workers."""
        policy, stream, prompts = self.sampler.policy, self.stream, self.sampler.prompts
        with timed(self.times, "time/rollout_s"):
            finished = stream.advance()
        self.sampler.guard.reach("rollout")
        with timed(self.times, "time/reward_s"):
            for q, response in finished:
                self.by_draw[q.draw].extend(q.sample, response, self.step, ended=True)
            items = [
                RewardItem(
                    prompts[self.by_draw[q.draw].problem].problem,
                    decode(policy.tokenizer, r.tokens, policy.stop),
                    len(r.tokens),
                )
                for q, r in multihost.share(finished, self.finished)
            ]
            pending = self.sampler.pool.submit(items)
        self.finished += len(finished)
        requests = [request for request, _ in finished]
        self.judging.append((stream.segment + VERDICT_DELAY, requests, pending))
        return len(finished)

    def collect_verdicts(self) -> None:
        """Collects the verdicts that are due; all of them once nothing is left to decode, or once a
        partial step has enough groups."""
        sampler, algo = self.sampler, self.sampler.algo
        everything = not (self.stream.live or self.stream.pending)
        while self.judging and (everything or self.judging[0][0] <= self.stream.segment):
            _, requests, pending = self.judging.popleft()
            with timed(self.times, "time/reward_s"):
                sampler.guard.wait(pending.wait, "reward")
                verdicts = multihost.gather_verdicts(
                    pending.result(), len(requests), before=len(self.verdicts)
                )
            for q, verdict in zip(requests, verdicts, strict=True):
                samples, known = self.by_draw[q.draw].samples, verdict
                if verdict.error is not None:  # a checkpoint holds no text of a user's function
                    known = verdict._replace(error="no verdict")
                samples[q.sample] = samples[q.sample]._replace(verdict=known)
            self.verdicts += verdicts
            self._count({q.draw: self.by_draw[q.draw] for q in requests}.values())
            enough = algo.responses_per_prompt * algo.prompts_per_step
            some_failed = any(verdict.error is not None for verdict in verdicts)
            if some_failed and len(self.verdicts) >= enough:
                check_errors(self.verdicts, sampler.reward)
            everything = everything or (algo.partial_rollouts and self.enough())

    def _count(self, changed: Iterable[OpenGroup]) -> None:
        self.counts.update(changed)
        new = list(itertools.takewhile(OpenGroup.is_judged, self.groups[self.settled :]))
        self.settled += len(new)
        self.settled_informative += sum(group.is_informative() for group in new)

    def enough(self) -> bool:
        """Whether the groups before the first not judged hold the missing informative ones."""
        return self.settled_informative >= self.missing

    def drawn(self) -> Drawn:
        """Closes the stream and returns the result; unfinished responses stay with their groups."""
        for q, response in self.stream.unfinished():
            self.by_draw[q.draw].extend(q.sample, response, self.step, ended=False)
        self.stream.close()
        sampler, state = self.sampler, self.state
        check_errors(self.verdicts, sampler.reward)
        done, limit = self.groups[: self.settled], sampler.rollout.max_response_len
        pairs = [(group, sampler.prompts[group.problem]) for group in done]
        groups = [group.judged(prompt, sampler.reward, limit) for group, prompt in pairs]
        kept = sum(len(r.tokens) for group in groups for r in group.responses)
        tokens = sum(g.tokens() for g in self.groups) - sum(g.tokens() for g in state.open)
        rate = keep_rate_after(state.keep_rate, groups)
        still_open = tuple(self.groups[len(done) :])
        return Drawn(
            groups,
            self.verdicts,
            self.draws,
            tokens,
            sum(group.tokens() for group in done) - kept,
            DrawState(self.cursor, state.draws + self.draws, rate, still_open, self.step),
            self.stream.suspended,
            self.stream.steps,
        )
