"""Dynamic sampling: collects groups until a rollout step has enough informative ones.

Groups are accepted in the order in which their prompts were drawn: the order in which they finish
would favour short responses. Decisions depend on the groups alone, never on the clock.
"""

import itertools
import json
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dapo_jax.dapo.groups import is_informative
from dapo_jax.types import Group, InputError, Problem, Prompt, Response, SharedError


class UnderfilledError(SharedError):
    """A step reached its cap on generation batches with too few groups to train on."""


class StepCounts(NamedTuple):
    """Counts of one rollout step: groups drawn, kept, dropped and carried.

    With dynamic sampling: drawn + carried_in == kept + all_correct + all_wrong + surplus; without,
    every group with a verdict is trained on: drawn + carried_in == kept + surplus.
    """

    carried_in: int = 0  # groups that the previous step left over
    drawn: int = 0  # groups completed in this step
    all_correct: int = 0  # drawn groups without an incorrect response
    all_wrong: int = 0  # drawn groups without a correct response
    unjudged: int = 0  # drawn groups without any verdict
    responses: int = 0  # with a verdict, of the drawn groups
    correct: int = 0  # of these
    wasted_tokens: int = 0  # response tokens of groups that will never be trained on
    # Both 0 until the step ends; the first min(carried_in, kept) kept groups are carried ones.
    kept: int = 0  # groups to train on
    surplus: int = 0  # groups beyond what the step needs, carried to the next step or dropped


class DynamicSamplingBuffer:
    """Collects the groups of a rollout step.

    prompts_per_step: groups a step trains on. dynamic_sampling: accept informative groups only.
    carry_surplus: keep surplus groups for the next step. If groups are added only while `missing()`
    is above 0, n groups of one step are trained on at most ceil(n / prompts_per_step) steps later.
    """

    def __init__(self, prompts_per_step: int, dynamic_sampling: bool, carry_surplus: bool):
        if prompts_per_step < 1:
            raise ValueError(f"prompts_per_step must be at least 1, got {prompts_per_step}")
        self._prompts_per_step = prompts_per_step
        self._dynamic_sampling = dynamic_sampling
        self._carry_surplus = carry_surplus
        self.clear()

    def clear(self) -> None:
        """Forgets all groups and counts."""
        self._accepted: list[Group] = []  # in draw order, the carried ones first
        self._last_draw = -1
        self._counts = StepCounts()

    def add(self, groups: Sequence[Group], *, at_least: int = 0) -> None:
        """Accepts judged groups in draw order; groups that the filter drops need no old log-probs.

        Both errors leave the buffer unchanged. Raises UnderfilledError if it would have fewer than
        `at_least` groups to train on. Raises ValueError unless draw indices increase, also from
        call to call, and every accepted group is complete: a verdict and a reward for each
        response, both log-probs for each token.
        """
        draws = [self._last_draw, *(group.draw for group in groups)]
        for before, after in itertools.pairwise(draws):
            if after <= before:
                found = f"draw {after} after draw {before}"
                raise ValueError(f"groups must arrive in draw order, got {found}")
        accepts = is_informative if self._dynamic_sampling else np.size
        used = [group for group in groups if accepts(group.correct)]
        for group in used:
            _check_lengths(group)
        judged = [group.correct for group in groups if len(group.correct)]
        added = StepCounts(
            drawn=len(groups),
            all_correct=sum(map(all, judged)),
            all_wrong=sum(not any(correct) for correct in judged),
            unjudged=len(groups) - len(judged),
            responses=sum(map(len, judged)),
            correct=sum(int(np.sum(correct)) for correct in judged),
            wasted_tokens=_response_tokens(groups) - _response_tokens(used),
        )
        accepted = [*self._accepted, *used]
        counts = StepCounts(*map(operator.add, self._counts, added))
        if len(accepted) < at_least:
            raise UnderfilledError(_cap_message(len(accepted), self._prompts_per_step, counts))
        self._accepted, self._counts, self._last_draw = accepted, counts, draws[-1]

    def missing(self) -> int:
        """Groups that the step still needs."""
        return max(0, self._prompts_per_step - len(self._accepted))

    def ready(self) -> tuple[list[Group], StepCounts]:
        """The groups to train on, the first prompts_per_step accepted ones or fewer, and counts.

        Changes nothing. Raises UnderfilledError if there is no group at all.
        """
        needed, counts = self._prompts_per_step, self._counts
        if not self._accepted:
            raise UnderfilledError(_cap_message(0, needed, counts))
        kept, surplus = self._accepted[:needed], self._accepted[needed:]
        wasted = counts.wasted_tokens + _response_tokens([] if self._carry_surplus else surplus)
        return kept, counts._replace(kept=len(kept), surplus=len(surplus), wasted_tokens=wasted)

    def take(self) -> tuple[list[Group], StepCounts]:
        """Ends the step and returns `ready()`; raises as it does."""
        kept, counts = self.ready()
        self._accepted = self._accepted[len(kept) :] if self._carry_surplus else []
        self._counts = StepCounts(carried_in=len(self._accepted))
        return kept, counts

    def state(self) -> dict[str, Any]:
        """The whole state as plain data, for a checkpoint."""
        groups = [_packed(group) for group in self._accepted]
        return {"last_draw": self._last_draw, "tally": list(self._counts), "groups": groups}

    def restore(self, state: Mapping[str, Any], problems: Mapping[str, Problem]) -> None:
        """Inverse of `state`. problems: by id.

        Changes nothing if it raises: InputError for a group of an unknown problem,
        ValueError, TypeError or KeyError for malformed data.
        """
        groups = [_unpacked(group, problems) for group in state["groups"]]
        counts, last_draw = StepCounts(*map(int, state["tally"])), int(state["last_draw"])
        self._last_draw, self._counts, self._accepted = last_draw, counts, groups


def _array(value: Any, dtype: type[np.generic]) -> np.ndarray:
    """A one-dimensional array of plain data. Raises ValueError for any other value."""
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.ndim != 1:
        raise ValueError(f"not a one-dimensional array of {dtype.__name__}")
    return value


def packed_response(r: Response) -> dict[str, Any]:
    """As plain data, for a checkpoint."""
    sampled = {"tokens": r.tokens, "logprobs": r.behavior_logprobs}
    policies = [list(policy) for policy in r.policies]
    return sampled | {"truncated": bool(r.truncated), "policies": policies}


def unpacked_response(data: Mapping[str, Any], truncated: Any) -> Response:
    """Inverse of `packed_response`. Raises ValueError, TypeError or KeyError for malformed data."""
    tokens = _array(data["tokens"], np.int32)
    logprobs = _array(data["logprobs"], np.float32)
    policies = tuple((int(step), int(count)) for step, count in data.get("policies", ()))
    by_policy = sum(count for _, count in policies) if policies else len(tokens)
    if not len(logprobs) == by_policy == len(tokens):
        raise ValueError("a response whose tokens, log-probs and policies differ in number")
    return Response(tokens, logprobs, bool(truncated), policies)


def _packed(group: Group) -> dict[str, Any]:
    responses = [
        packed_response(r) | {"old_logprobs": old}
        for r, old in zip(group.responses, group.old_logprobs, strict=True)
    ]
    # As JSON, because an id may hold lone surrogates.
    named = {"draw": group.draw, "problem": json.dumps(group.prompt.problem.id)}
    judged = {"correct": group.correct, "reward": group.reward, "penalty": group.penalty}
    return named | {"prompt": group.prompt.tokens, "responses": responses} | judged


def _unpacked(data: Mapping[str, Any], problems: Mapping[str, Problem]) -> Group:
    draw, problem = int(data["draw"]), json.loads(data["problem"])
    if problem not in problems:
        raise InputError(
            f"checkpoint: the buffered group of draw {draw} belongs to problem {problem[:60]!r}, "
            "which the data set does not have; resume with the data set that the run started with"
        )
    group = Group(
        draw=draw,
        prompt=Prompt(problems[problem], _array(data["prompt"], np.int32)),
        responses=tuple(unpacked_response(r, r["truncated"]) for r in data["responses"]),
        correct=_array(data["correct"], np.bool_),
        reward=_array(data["reward"], np.float32),
        penalty=_array(data["penalty"], np.float32),
        old_logprobs=tuple(_array(r["old_logprobs"], np.float32) for r in data["responses"]),
    )
    _check_lengths(group)
    return group


def _cap_message(accepted: int, needed: int, t: StepCounts) -> str:
    """One line for a step with too few groups at its cap: what was drawn, and what to do."""
    informative = t.drawn - t.all_correct - t.all_wrong - t.unjudged
    easier, harder = "easier problems or a supervised warm-up", "harder problems"
    train = " or set dapo.on_cap: train" if accepted else ""
    return (
        f"dapo.max_generation_batches: reached with {accepted} of {needed} groups to train on; "
        f"this step carried in {t.carried_in} and drew {t.drawn}: {t.all_correct} all-correct, "
        f"{t.all_wrong} all-incorrect, {informative} informative; "
        f"use {easier if t.all_wrong >= t.all_correct else harder}, "
        f"raise dapo.responses_per_prompt, raise dapo.max_generation_batches{train}"
    )


def _check_lengths(group: Group) -> None:
    lengths = [len(response.tokens) for response in group.responses]
    behavior = [len(response.behavior_logprobs) for response in group.responses]
    old = [len(logprobs) for logprobs in group.old_logprobs]
    where = f"draw {group.draw}: {len(lengths)} responses"
    if not lengths == behavior == old:
        found = f"{behavior} behavior and {old} old log-probs"
        raise ValueError(f"{where} of {lengths} tokens have {found}")
    if not len(lengths) == len(group.correct) == len(group.reward) == len(group.penalty):
        raise ValueError(f"{where}, but not as many verdicts, rewards and penalties")


def _response_tokens(groups: Sequence[Group]) -> int:
    return sum(len(response.tokens) for group in groups for response in group.responses)
