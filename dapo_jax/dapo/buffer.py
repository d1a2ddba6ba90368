"""Dynamic sampling: groups wait here until a rollout step has enough that are neither all right nor
all wrong.

Groups are accepted in the order in which their prompts were drawn, never in the order in which they
finished: first finished, first served would favour short responses. Decisions depend on nothing but
the groups; there is no clock here.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from dapo_jax.dapo.groups import is_informative
from dapo_jax.types import Group, InputError, Problem, Prompt, Response, SharedError


class StarvedError(SharedError):
    """The generation batches a step may take gave too few groups to train on."""


@dataclasses.dataclass(frozen=True)
class StepCounts:
    """What one rollout step drew and what became of it.

    With dynamic sampling: drawn + carried_in == kept + all_correct + all_wrong + surplus; without
    it, all-right and all-wrong groups are trained on too: drawn + carried_in == kept + surplus, but
    for groups without a verdict.
    """

    drawn: (
        int  # groups drawn in this step, or completed in it where partial rollouts left them open
    )
    kept: int  # groups to train on; the first min(carried_in, kept) of them are carried ones
    all_correct: int  # drawn groups without a wrong response
    all_wrong: int  # drawn groups without a right response
    surplus: int  # groups beyond what the step needs, carried to the next step or dropped
    carried_in: int  # groups that the previous step left over
    wasted_tokens: int  # response tokens of groups that will never be trained on
    accuracy: (
        float | None
    )  # share of right responses among those of the drawn groups; None if there are none
    accuracy_kept: float  # share of right responses among those to train on


class _Tally(NamedTuple):
    """Running counts of the step under way."""

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
    carry_surplus: keep what a step does not need for the next one, else drop it. If groups are
    added only while `missing()` is above 0, the n groups that one step adds are trained on at most
    ceil(n / prompts_per_step) steps later.
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
        """Takes in judged groups, in draw order.

        Groups that the filter drops need no old log-probs.

        Raises StarvedError, and takes none, if fewer than `at_least` groups to train on would be
        there then. Raises ValueError, and takes none, unless draw indices increase, also from call
        to call, and every group that passes the filter is complete: a text, a verdict and a reward
        for each response, a log-prob of both kinds for each token.
        """
        draws = [self._last_draw, *(group.draw for group in groups)]
        for before, after in itertools.pairwise(draws):
            if after <= before:
                raise ValueError(
                    f"groups must arrive in draw order, got draw {after} after draw {before}"
                )
        usable = [
            is_informative(group.correct) if self._dynamic_sampling else bool(group.correct.size)
            for group in groups
        ]
        for group, use in zip(groups, usable, strict=True):
            if use:
                _check_lengths(group)
        accepted, t = [*self._accepted, *itertools.compress(groups, usable)], self._tally
        for group, use in zip(groups, usable, strict=True):
            size, right = len(group.correct), int(np.sum(group.correct))
            t = _Tally(
                carried_in=t.carried_in,
                drawn=t.drawn + 1,
                all_correct=t.all_correct + (right == size > 0),
                all_wrong=t.all_wrong + (right == 0),
                responses=t.responses + size,
                right=t.right + right,
                wasted_tokens=t.wasted_tokens + (0 if use else _response_tokens(group)),
            )
        if len(accepted) < at_least:
            raise StarvedError(_cap_message(len(accepted), self._prompts_per_step, t))
        self._accepted, self._tally, self._last_draw = accepted, t, draws[-1]

    def missing(self) -> int:
        """Groups that the step still needs."""
        return max(0, self._prompts_per_step - len(self._accepted))

    def ready(self) -> tuple[list[Group], StepCounts]:
        """What the step trains on, its first prompts_per_step accepted groups in draw order, fewer
        if there are no more, and its counts.

        Changes nothing: until `take`, `state` holds all of it. Raises StarvedError if there is no
        group at all.
        """
        if not self._accepted:
            raise StarvedError(_cap_message(0, self._prompts_per_step, self._tally))
        kept, surplus = (
            self._accepted[: self._prompts_per_step],
            self._accepted[self._prompts_per_step :],
        )
        t = self._tally
        return kept, StepCounts(
            drawn=t.drawn,
            kept=len(kept),
            all_correct=t.all_correct,
            all_wrong=t.all_wrong,
            surplus=len(surplus),
            carried_in=t.carried_in,
            wasted_tokens=t.wasted_tokens
            + (0 if self._carry_surplus else sum(map(_response_tokens, surplus))),
            accuracy=t.right / t.responses if t.responses else None,
            accuracy_kept=float(np.mean(np.concatenate([group.correct for group in kept]))),
        )

    def take(self) -> tuple[list[Group], StepCounts]:
        """Ends the step and returns what was `ready`.

        Raises StarvedError, and leaves the step open, if that is nothing.
        """
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
    """One line for a step that may draw no more and has too few groups: what was drawn, and what to
    do.
    """
    mixed = t.drawn - t.all_correct - t.all_wrong
    problems = (
        "easier problems or a supervised warm-up"
        if t.all_wrong >= t.all_correct
        else "harder problems"
    )
    train = " or set dapo.on_cap: train" if accepted else ""
    return (
        f"dapo.max_generation_batches: used up with {accepted} of {needed} groups to train on; "
        f"this step carried in {t.carried_in} and drew {t.drawn}: {t.all_correct} all right, {t.all_wrong} all wrong, {mixed} mixed; "
        f"use {problems}, raise dapo.responses_per_prompt, raise dapo.max_generation_batches{train}"
    )


def _check_lengths(group: Group) -> None:
    lengths = [len(response.tokens) for response in group.responses]
    behavior, old = (
        [len(r.behavior_logprobs) for r in group.responses],
        [len(logprobs) for logprobs in group.old_logprobs],
    )
    if not lengths == behavior == old:
        raise ValueError(
            f"draw {group.draw}: responses of {lengths} tokens have {behavior} behavior and {old} old log-probs"
        )
    if not len(lengths) == len(group.correct) == len(group.reward) == len(group.penalty):
        raise ValueError(
            f"draw {group.draw}: {len(lengths)} responses, but not as many verdicts, rewards and penalties"
        )


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
