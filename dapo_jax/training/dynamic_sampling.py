"""Dynamic sampling while decoding goes on: prompts are drawn until enough groups are informative,
and judged as they finish.

    prompts ─▶ stream of the engine ─▶ finished responses ─▶ reward workers ─▶ verdicts ─▶ enough
    informative groups? draw more

Every drawn group is sampled to its end, and a step trains on the first informative ones in draw
order: what was drawn first is used first, however long it took. "First finished wins" would favour
short responses.

With partial rollouts a step ends as soon as the first groups in draw order suffice. Later groups
stay open, and the next step goes on with their responses where they stand: under new weights, each
token with the log-prob of the policy that drew it.

Time is logical. A verdict on a response of segment k is used from segment k + VERDICT_DELAY on,
waited for if need be, and never earlier, so that two runs, and all hosts, draw the same prompts
whatever the clock does.
"""

import collections
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dapo_jax.config import Config
from dapo_jax.dapo.groups import is_informative
from dapo_jax.data.mixture import Mixture, next_problems
from dapo_jax.data.problems import Cursor
from dapo_jax.data.prompts import decode
from dapo_jax.reward.overlong import overlong_penalty
from dapo_jax.reward.pool import PendingVerdicts, RewardItem, RewardPool, check_errors
from dapo_jax.rollout.engine import Stream
from dapo_jax.runtime import multihost
from dapo_jax.runtime.guard import Guard
from dapo_jax.runtime.metrics import timed
from dapo_jax.training.setup import Policy
from dapo_jax.types import Group, Prompt, Request, Response, Verdict

VERDICT_DELAY = 2  # segments that workers have before decoding waits for them

_PRIOR_GROUPS = 8  # the keep rate of earlier steps counts as so many groups of this one


class Drawn(NamedTuple):
    """What one step drew."""

    groups: list[Group]  # in draw order; old_logprobs are the sampler's
    verdicts: list[Verdict]
    cursor: Cursor  # after the last prompt drawn
    draws: int  # prompts drawn, those of groups that are left open included
    tokens: int  # response tokens sampled, those of groups that are left open included
    open: list["OpenGroup"]  # left to the next step, in draw order


class OpenGroup:
    """A group under way."""

    def __init__(self, draw: int, prompt: Prompt, size: int, problem: int = 0):
        self.draw, self.prompt = draw, prompt
        self.problem = problem  # index in the data set
        self.responses: list[Response | None] = [None] * size
        self.verdicts: list[Verdict | None] = [None] * size
        self.begun: dict[
            int, tuple[np.ndarray, np.ndarray]
        ] = {}  # tokens and log-probs of responses that an earlier step began

    def copy(self) -> "OpenGroup":
        """Another of the same standing."""
        other = OpenGroup(self.draw, self.prompt, len(self.responses), self.problem)
        other.responses, other.verdicts, other.begun = (
            list(self.responses),
            list(self.verdicts),
            dict(self.begun),
        )
        return other

    def requests(self) -> list[Request]:
        """For the responses that are not there yet."""
        return [
            Request(self.draw, sample, self.prompt.tokens, self.begun.get(sample))
            for sample, response in enumerate(self.responses)
            if response is None
        ]

    def tokens(self) -> int:
        """Response tokens that are there so far."""
        begun = (
            len(self.begun[n][0]) if n in self.begun else 0 for n in range(len(self.responses))
        )
        return sum(
            here if r is None else len(r.tokens)
            for r, here in zip(self.responses, begun, strict=True)
        )

    def is_judged(self) -> bool:
        return None not in self.verdicts

    def is_informative(self) -> bool:
        """Holds a right and a wrong response already, whatever the rest will be."""
        return self.outcomes() == {True, False}

    def outcomes(self) -> set[bool]:
        """What verdicts say so far.

        An answer without one says nothing, for whether it is in time depends on the clock.
        """
        return {v.correct for v in self.verdicts if v is not None and v.error is None}


def keep_rate_after(rate: float, groups: Sequence[Group]) -> float:
    """Expected share of informative groups, half from this step and half from those before."""
    if not groups:
        return rate
    return 0.5 * rate + 0.5 * float(np.mean([is_informative(g.correct) for g in groups]))


def prompts_wanted(missing: int, groups: Sequence[OpenGroup], rate: float) -> int:
    """How many further prompts the step needs, by what is known of the groups drawn so far.

    (missing - informative ones - p x undecided ones) / p, rounded up. p, the keep rate, is the mean
    of `rate`, which counts as a few groups, and of the groups decided so far.

    >>> prompts_wanted(6, [], 0.5), prompts_wanted(6, [], 0.25)
    (12, 24)
    """
    informative = sum(g.is_informative() for g in groups)
    dropped = sum(g.is_judged() and not g.is_informative() for g in groups)
    p = (_PRIOR_GROUPS * rate + informative) / (_PRIOR_GROUPS + informative + dropped)
    short = missing - informative - p * (len(groups) - informative - dropped)
    return math.ceil(short / p - 1e-9) if short > 0 else 0


def settled(groups: Sequence[OpenGroup]) -> list[OpenGroup]:
    """The groups before the first that is not judged yet."""
    return list(itertools.takewhile(OpenGroup.is_judged, groups))


def enough(groups: Sequence[OpenGroup], missing: int) -> bool:
    """Whether the settled groups hold `missing` informative ones."""
    return sum(group.is_informative() for group in settled(groups)) >= missing


def draw_groups(
    stream: Stream,
    prompts: Sequence[Prompt],
    *,
    missing: int,
    keep_rate: float,
    first_draw: int,
    left_open: Sequence[OpenGroup],
    cursor: Cursor,
    mixture: Mixture,
    config: Config,
    policy: Policy,
    pool: RewardPool,
    guard: Guard,
    times: dict[str, float],
    on_done: Callable[[int, int], None],
) -> Drawn:
    """Draws until `missing` groups are informative, or the cap on draws is reached; without dynamic
    sampling until so many have a verdict.

    Prompts are drawn when the engine runs short of requests, and only as many as the keep rate
    calls for.

    Args: keep_rate: expected share of informative groups. left_open: groups of the step before that
      are still under way. mixture: of the prompts. guard: reached after each segment, as
      `rollout`, and before verdicts are
        used, as `reward`. times: gets time/rollout_s and time/reward_s.
      on_done: told how many responses have ended, and how many were drawn in all.

    Raises InputError if too many answers get no verdict, and Stopped; nothing that was given has
    changed then.
    """
    algo = config.dapo
    size = algo.responses_per_prompt
    cap = algo.max_generation_batches * algo.prompts_per_draw
    cap = cap if algo.dynamic_sampling else max(cap, missing)
    keep_rate = max(keep_rate, missing / cap)
    groups, draws = [group.copy() for group in left_open], 0  # in draw order
    by_draw = {group.draw: group for group in groups}
    judging: collections.deque[tuple[int, list[tuple[Request, Response]], PendingVerdicts]] = (
        collections.deque()
    )
    judged: list[Verdict] = []
    ended = 0
    stream.submit([request for group in groups for request in group.requests()])
    while True:
        if algo.dynamic_sampling:
            room = -(
                -(2 * config.rollout.decode_slots - stream.live - stream.pending) // size
            )  # enough to fill all slots once more
            wanted = min(prompts_wanted(missing, groups, keep_rate), room, cap - draws)
        else:
            wanted = min(
                missing - sum(bool(g.outcomes()) or not g.is_judged() for g in groups), cap - draws
            )
        if wanted > 0:
            taken, cursor = next_problems(mixture, cursor, wanted, seed=config.seed)
            numbered = enumerate(taken.tolist(), first_draw + draws)
            new = [OpenGroup(draw, prompts[i], size, i) for draw, i in numbered]
            groups, draws = groups + new, draws + wanted
            by_draw |= {group.draw: group for group in new}
            stream.submit([request for group in new for request in group.requests()])
        if stream.live or stream.pending:
            with timed(times, "time/rollout_s"):
                finished = stream.advance()
            guard.reach("rollout")
            on_done(len(finished), len(groups) * size)
            with timed(times, "time/reward_s"):
                for request, response in finished:
                    by_draw[request.draw].responses[request.sample] = response
                items = [
                    RewardItem(
                        by_draw[q.draw].prompt.problem,
                        decode(policy.tokenizer, r.tokens, policy.stop),
                        len(r.tokens),
                    )
                    for q, r in multihost.share(finished, ended)
                ]
                ended += len(finished)
                judging.append((stream.segment + VERDICT_DELAY, finished, pool.submit(items)))
        elif not judging:
            break
        idle = not (stream.live or stream.pending)
        while judging and (judging[0][0] <= stream.segment or idle):
            _, finished, pending = judging.popleft()
            with timed(times, "time/reward_s"):
                guard.wait(pending.wait, "reward")
                verdicts = multihost.gather_verdicts(
                    pending.result(), len(finished), before=len(judged)
                )
            for (request, _), verdict in zip(finished, verdicts, strict=True):
                by_draw[request.draw].verdicts[request.sample] = verdict
            judged += verdicts
            if len(judged) >= size * algo.prompts_per_step:
                check_errors(judged, config.reward)
            # What is still being judged is waited for: it belongs to this step or, whole, to the
            # next.
            idle = idle or (algo.partial_rollouts and enough(groups, missing))
        if algo.partial_rollouts and not judging and enough(groups, missing):
            break
    for request, response in stream.unfinished():
        if len(response.tokens):
            by_draw[request.draw].begun[request.sample] = (
                response.tokens,
                response.behavior_logprobs,
            )
    stream.close()
    check_errors(judged, config.reward)
    done = settled(groups)
    tokens = sum(map(OpenGroup.tokens, groups)) - sum(map(OpenGroup.tokens, left_open))
    return Drawn(
        [_reward(group, config) for group in done],
        judged,
        cursor,
        draws,
        tokens,
        groups[len(done) :],
    )


def open_state(groups: Sequence[OpenGroup]) -> dict[str, np.ndarray]:
    """Open groups as flat arrays, for a checkpoint; no array where there is no group."""
    if not groups:
        return {}
    samples = [(group, sample) for group in groups for sample in range(len(group.responses))]
    begun = [
        group.responses[n] or Response(*group.begun.get(n, _NOTHING), False) for group, n in samples
    ]
    verdicts = [group.verdicts[n] for group, n in samples]
    arrays = {
        "open_groups": np.array([(g.draw, g.problem) for g in groups], np.int64),
        "open_ended": np.array([group.responses[n] is not None for group, n in samples]),
        "open_truncated": np.array([response.truncated for response in begun]),
        "open_lengths": np.array([len(response.tokens) for response in begun], np.int64),
        "open_tokens": np.concatenate([response.tokens for response in begun]),
        "open_logprobs": np.concatenate([response.behavior_logprobs for response in begun]),
        "open_judged": np.array([verdict is not None for verdict in verdicts]),
        "open_errors": np.array(
            [verdict is not None and verdict.error is not None for verdict in verdicts]
        ),
        "open_correct": np.array([verdict is not None and verdict.correct for verdict in verdicts]),
        "open_scores": np.array(
            [0.0 if verdict is None else verdict.score for verdict in verdicts], np.float64
        ),
    }
    return {name: array for name, array in arrays.items() if array.size}


def restore_open(arrays: Mapping[str, np.ndarray], prompts: Sequence[Prompt]) -> list[OpenGroup]:
    """What `open_state` gave. prompts: of the whole data set. (Why an answer got no verdict is
    forgotten.)
    """
    if "open_groups" not in arrays:
        return []
    ends = np.cumsum(arrays["open_lengths"])
    tokens, logprobs = (
        np.split(arrays.get(name, np.zeros(0, kind)), ends)[:-1] for name, kind in _FLAT
    )
    size = len(ends) // len(arrays["open_groups"])
    errors = arrays.get("open_errors", np.zeros(len(ends), bool))
    groups = []
    for number, (draw, problem) in enumerate(arrays["open_groups"].tolist()):
        group = OpenGroup(draw, prompts[problem], size, problem)
        for sample in range(size):
            at = number * size + sample
            if arrays["open_ended"][at]:
                group.responses[sample] = Response(
                    tokens[at], logprobs[at], bool(arrays["open_truncated"][at])
                )
            elif len(tokens[at]):
                group.begun[sample] = (tokens[at], logprobs[at])
            if arrays["open_judged"][at]:
                error = "no verdict" if errors[at] else None
                group.verdicts[sample] = Verdict(
                    bool(arrays["open_correct"][at]), float(arrays["open_scores"][at]), error
                )
        groups.append(group)
    return groups


_NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.float32))
_FLAT = (("open_tokens", np.int32), ("open_logprobs", np.float32))


def _reward(group: OpenGroup, config: Config) -> Group:
    """The group with its rewards: score + overlong penalty.

    An answer without a verdict is left out, as if it had not been sampled.
    """
    sampled = zip(group.responses, group.verdicts, strict=True)
    judged = [(r, v) for r, v in sampled if r is not None and v is not None and v.error is None]
    responses, verdicts = tuple(r for r, _ in judged), [v for _, v in judged]
    penalty = np.zeros(len(responses), np.float32)
    if config.reward.overlong_penalty:
        penalty = overlong_penalty(
            np.array([len(r.tokens) for r in responses], np.int64),
            max_response_len=config.rollout.max_response_len,
            overlong_buffer_len=config.reward.overlong_buffer_len,
        )
    return Group(
        draw=group.draw,
        prompt=group.prompt,
        responses=responses,
        correct=np.array([v.correct for v in verdicts], bool),
        reward=np.array([v.score for v in verdicts], np.float32) + penalty,
        penalty=penalty,
        old_logprobs=tuple(r.behavior_logprobs for r in responses),
    )
