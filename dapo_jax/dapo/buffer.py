"""Dynamic sampling: collects groups until a rollout step has enough informative ones.

Groups are accepted in the order in which their prompts were drawn: the order in which they finish
would favour short responses. Decisions depend on the groups alone, never on the clock.
"""

import dataclasses
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dapo_jax.dapo.groups import is_informative
from dapo_jax.types import Group, InputError, Problem, Prompt, Response, SharedError


class StarvedError(SharedError):
    """A step reached its cap on generation batches with too few groups to train on."""


@dataclasses.dataclass(frozen=True)
class StepCounts:
    """What one rollout step drew and what became of it.

    With dynamic sampling: drawn + carried_in == kept + all_correct + all_wrong + surplus; without,
    every group with a verdict is trained on: drawn + carried_in == kept + surplus.
    """

    drawn: int  # groups completed in this step
    kept: int  # groups to train on; the first min(carried_in, kept) of them are carried ones
    all_correct: int  # drawn groups without an incorrect response
    all_wrong: int  # drawn groups without a correct response
    surplus: int  # groups beyond what the step needs, carried to the next step or dropped
    carried_in: int  # groups that the previous step left over
    wasted_tokens: int  # response tokens of groups that will never be trained on
    accuracy: float | None  # share of correct responses in the drawn groups, None without any
    accuracy_kept: float  # the same in the groups to train on


class _Tally(NamedTuple):
    """Counts of the current step so far."""

    carried_in: int = 0
    drawn: int = 0
    all_correct: int = 0
    all_wrong: int = 0
    responses: int = 0
    right: int = 0
    wasted_tokens: int = 0


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
        self._tally = _Tally()

    def add(self, groups: Sequence[Group], *, at_least: int = 0) -> None:
        """Accepts judged groups in draw order; groups that the filter drops need no old log-probs.

        Both errors leave the buffer unchanged. Raises StarvedError if it would have fewer than
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
        sizes = [len(group.correct) for group in groups]
        correct = [int(np.sum(group.correct)) for group in groups]
        added = _Tally(
            drawn=len(groups),
            all_correct=sum(c == n > 0 for c, n in zip(correct, sizes, strict=True)),
            all_wrong=correct.count(0),
            responses=sum(sizes),
            right=sum(correct),
            wasted_tokens=sum(map(_response_tokens, groups)) - sum(map(_response_tokens, used)),
        )
        accepted, tally = [*self._accepted, *used], _Tally(*map(operator.add, self._tally, added))
        if len(accepted) < at_least:
            raise StarvedError(_cap_message(len(accepted), self._prompts_per_step, tally))
        self._accepted, self._tally, self._last_draw = accepted, tally, draws[-1]

    def missing(self) -> int:
        """Groups that the step still needs."""
        return max(0, self._prompts_per_step - len(self._accepted))

    def ready(self) -> tuple[list[Group], StepCounts]:
        """The groups to train on, the first prompts_per_step accepted ones or fewer, and counts.

        Changes nothing. Raises StarvedError if there is no group at all.
        """
        if not self._accepted:
            raise StarvedError(_cap_message(0, self._prompts_per_step, self._tally))
        needed = self._prompts_per_step
        kept, surplus = self._accepted[:needed], self._accepted[needed:]
        dropped = [] if self._carry_surplus else surplus
        t = self._tally
        return kept, StepCounts(
            drawn=t.drawn,
            kept=len(kept),
            all_correct=t.all_correct,
            all_wrong=t.all_wrong,
            surplus=len(surplus),
            carried_in=t.carried_in,
            wasted_tokens=t.wasted_tokens + sum(map(_response_tokens, dropped)),
            accuracy=t.right / t.responses if t.responses else None,
            accuracy_kept=float(np.mean(np.concatenate([group.correct for group in kept]))),
        )

    def take(self) -> tuple[list[Group], StepCounts]:
        """Ends the step and returns what was `ready`; raises as it does."""
        kept, counts = self.ready()
        self._accepted = self._accepted[len(kept) :] if self._carry_surplus else []
        self._tally = _Tally(carried_in=len(self._accepted))
        return kept, counts

    def state(self) -> dict[str, np.ndarray]:
        """Everything that `restore` needs, as flat numeric arrays; arrays without elements are left
        out, for stores that refuse them.
        """
        groups = self._accepted
        responses = [response for group in groups for response in group.responses]
        arrays = {
            "counters": np.array([self._last_draw, *self._tally], np.int64),
            "draw": np.array([group.draw for group in groups], np.int64),
            **_ragged("problem_id", [_utf8(group.prompt.problem.id) for group in groups], np.uint8),
            **_ragged("prompt", [group.prompt.tokens for group in groups], np.int32),
            **_ragged("correct", [group.correct for group in groups], np.bool_),
            "reward": _flat([group.reward for group in groups], np.float32),
            "penalty": _flat([group.penalty for group in groups], np.float32),
            **_ragged("response", [response.tokens for response in responses], np.int32),
            "behavior_logprobs": _flat(
                [response.behavior_logprobs for response in responses], np.float32
            ),
            "old_logprobs": _flat(
                [logprobs for group in groups for logprobs in group.old_logprobs], np.float32
            ),
            "truncated": np.array([response.truncated for response in responses], np.bool_),
        }
        return {name: array for name, array in arrays.items() if array.size}

    def restore(self, arrays: Mapping[str, np.ndarray], problems: Mapping[str, Problem]) -> None:
        """Puts back what `state` gave. `problems` finds a problem by its id.

        Raises InputError, and changes nothing, if a buffered group belongs to a problem that is not
        there; ValueError or KeyError if the arrays do not fit each other.
        """
        last_draw, *tally = (int(count) for count in arrays["counters"])
        sizes = _array(arrays, "correct_len", np.int64)
        token_counts = _array(arrays, "response_len", np.int64)
        responses = [
            Response(tokens, logprobs, bool(truncated))
            for tokens, logprobs, truncated in zip(
                _parts(arrays, "response", np.int32),
                _split(_array(arrays, "behavior_logprobs", np.float32), token_counts),
                _array(arrays, "truncated", np.bool_),
                strict=True,
            )
        ]
        old_logprobs = _split(_array(arrays, "old_logprobs", np.float32), token_counts)
        groups = []
        for draw, problem_id, prompt, correct, reward, penalty, size, end in zip(
            _array(arrays, "draw", np.int64),
            map(_text, _parts(arrays, "problem_id", np.uint8)),
            _parts(arrays, "prompt", np.int32),
            _parts(arrays, "correct", np.bool_),
            _split(_array(arrays, "reward", np.float32), sizes),
            _split(_array(arrays, "penalty", np.float32), sizes),
            sizes,
            np.cumsum(sizes),
            strict=True,
        ):
            if problem_id not in problems:
                raise InputError(
                    f"checkpoint: the buffered group of draw {draw} belongs to problem {problem_id[:60]!r}, "
                    "which the data set does not hold; resume with the data set the run was started with"
                )
            groups.append(
                Group(
                    draw=int(draw),
                    prompt=Prompt(problems[problem_id], prompt),
                    responses=tuple(responses[end - size : end]),
                    correct=correct,
                    reward=reward,
                    penalty=penalty,
                    old_logprobs=tuple(old_logprobs[end - size : end]),
                )
            )
            _check_lengths(groups[-1])
        self._last_draw, self._tally, self._accepted = last_draw, _Tally(*tally), groups


def _cap_message(accepted: int, needed: int, t: _Tally) -> str:
    """One line for a step with too few groups at its cap: what was drawn, and what to do."""
    informative = t.drawn - t.all_correct - t.all_wrong
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


def _response_tokens(group: Group) -> int:
    return sum(len(response.tokens) for response in group.responses)


def _utf8(text: str) -> np.ndarray:
    return np.frombuffer(
        text.encode("utf-8", "surrogatepass"), np.uint8
    )  # lone surrogates come back as they were


def _text(array: np.ndarray) -> str:
    return array.tobytes().decode("utf-8", "surrogatepass")


def _flat(parts: Iterable[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.zeros(0, dtype), *parts], dtype=dtype)


def _ragged(
    name: str, parts: Sequence[np.ndarray], dtype: type[np.generic]
) -> dict[str, np.ndarray]:
    return {
        name: _flat(parts, dtype),
        f"{name}_len": np.array([len(part) for part in parts], np.int64),
    }


def _array(arrays: Mapping[str, np.ndarray], name: str, dtype: type[np.generic]) -> np.ndarray:
    return np.asarray(arrays.get(name, ()), dtype)


def _split(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    if lengths.sum() != len(flat) or (lengths < 0).any():
        raise ValueError("lengths of parts do not add up")
    return np.split(flat, np.cumsum(lengths))[:-1]


def _parts(
    arrays: Mapping[str, np.ndarray], name: str, dtype: type[np.generic]
) -> list[np.ndarray]:
    return _split(_array(arrays, name, dtype), _array(arrays, f"{name}_len", np.int64))
