"""Dynamic sampling: collects groups until a rollout step has enough informative ones.

Groups are accepted in draw order: the order in which they finish would favour short responses.
"""

import itertools
import operator
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dapo_jax.dapo.groups import is_informative
from dapo_jax.runtime.records import Count
from dapo_jax.types import Group, SharedError


class UnderfilledError(SharedError):
    """A step reached its cap on generation batches with too few groups to train on."""


class StepCounts(NamedTuple):
    """Counts of one rollout step: groups drawn, kept, dropped and carried.

    With dynamic sampling: drawn + carried_in == kept + all_correct + all_wrong + surplus; without,
    every group with a verdict is trained on: drawn + carried_in == kept + surplus.
    """

    carried_in: Count = 0  # groups that the previous step left over
    drawn: Count = 0  # groups completed in this step
    all_correct: Count = 0  # drawn groups without an incorrect response
    all_wrong: Count = 0  # drawn groups without a correct response
    unjudged: Count = 0  # drawn groups without any verdict
    wasted_tokens: Count = 0  # response tokens of groups that will never be trained on
    # Both 0 until the step ends; the first min(carried_in, kept) kept groups are carried ones.
    kept: Count = 0  # groups to train on
    surplus: Count = 0  # groups beyond what the step needs, carried to the next step or dropped


class BufferState(NamedTuple):
    last_draw: int
    counts: StepCounts
    groups: tuple[Group, ...]


class DynamicSamplingBuffer:
    """Collects the groups of a rollout step.

    prompts_per_step: groups a step trains on. dynamic_sampling: accept informative groups only.
    carry_surplus: keep surplus groups for the next step.
    """

    def __init__(self, prompts_per_step: int, dynamic_sampling: bool, carry_surplus: bool):
        if prompts_per_step < 1:
            raise ValueError(f"prompts_per_step must be at least 1, got {prompts_per_step}")
        self._prompts_per_step = prompts_per_step
        self._dynamic_sampling = dynamic_sampling
        self._carry_surplus = carry_surplus
        self.clear()

    def clear(self) -> None:
        self._accepted: list[Group] = []  # in draw order, the carried ones first
        self._last_draw = -1
        self._counts = StepCounts()

    def add(self, groups: Sequence[Group], *, at_least: int = 0) -> None:
        """Accepts judged groups in draw order.

        Changes nothing where it raises: UnderfilledError with fewer than `at_least` groups to train
        on, ValueError for draws that do not increase and accepted groups that are not complete.
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
        """The groups to train on and the step's counts. UnderfilledError if there is no group."""
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

    def state(self) -> BufferState:
        return BufferState(self._last_draw, self._counts, tuple(self._accepted))

    def restore(self, state: BufferState) -> None:
        """Inverse of `state`. Raises ValueError for malformed groups, and changes nothing then."""
        for group in state.groups:
            _check_lengths(group)
        self._last_draw, self._counts, self._accepted = *state[:2], [*state.groups]


def _cap_message(accepted: int, needed: int, t: StepCounts) -> str:
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
    if any(len(r.sampled[-1]) != len(r.tokens) for r in group.responses):
        raise ValueError(f"{where}, but experts of another number of tokens")
    if not len(lengths) == len(group.correct) == len(group.reward) == len(group.penalty):
        raise ValueError(f"{where}, but not as many verdicts, rewards and penalties")


def _response_tokens(groups: Sequence[Group]) -> int:
    return sum(len(response.tokens) for group in groups for response in group.responses)
