"""Samples for people to read: responses of the first groups of a step, with token log-probs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dapo_jax.config import DapoSection
from dapo_jax.dapo.groups import step_advantages
from dapo_jax.data.prompts import decode, shown_prompt
from dapo_jax.training.setup import Policy
from dapo_jax.types import Group, Response

_TOKENS = 1024  # written with log-probs at each end of a response, to keep long rows short
_SHOWN = 300  # characters at each end of a prompt and response where it is shortened


def sample_rows(
    groups: Sequence[Group], count: int, algo: DapoSection, policy: Policy
) -> list[dict[str, Any]]:
    """The first judged response of each of the first `count` groups that have one, as JSON objects.

    `group` is all_correct, all_wrong, or kept. `tokens` are of `scored_texts`, `fed` is the prompt
    with its special tokens, `siblings` are the other responses of the group.
    """
    rows = []
    for group in [g for g in groups if g.responses][:count]:
        problem, response = group.prompt.problem, group.responses[0]
        prompt, n_correct = problem.prompt, int(group.correct.sum())
        judged_one = judged_row(response, bool(group.correct[0]), policy)
        kinds = {0: "all_wrong", len(group.correct): "all_correct"}
        row = {
            "draw": group.draw,
            "id": problem.id,
            "prompt": prompt if isinstance(prompt, str) else [*map(dataclasses.asdict, prompt)],
            "answer": problem.answer,
            **judged_one,
            "group": kinds.get(n_correct, "kept"),
            "group_correct": n_correct,
            "group_size": len(group.correct),
            "reward": float(group.reward[0]),
            "penalty": float(group.penalty[0]),
            "tokens": scored_texts(policy, response, judged_one["response"]),
            "fed": shown_prompt(policy.tokenizer, group.prompt.tokens),
            "siblings": [sibling(group, n, policy) for n in range(1, len(group.responses))],
        }
        if algo.advantage_scale != "batch":  # which depends on all groups that are trained on
            [advantages] = step_advantages([group.reward], algo)
            row["advantage"] = float(advantages[0])
        rows.append(row)
    return rows


def judged_row(response: Response, correct: bool, policy: Policy) -> dict[str, Any]:
    """What every row has of its response."""
    text = decode(policy.tokenizer, response.tokens, policy.stop)
    row: dict[str, Any] = {"response": text, "correct": correct, "length": len(response.tokens)}
    return row | {"truncated": bool(response.truncated)}


def sibling(group: Group, n: int, policy: Policy) -> dict[str, Any]:
    row = judged_row(group.responses[n], bool(group.correct[n]), policy)
    return row | {"response": shortened(row["response"]), "reward": float(group.reward[n])}


def shortened(text: str) -> str:
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]} ... {text[-_SHOWN:]}"


def shown_answer(answer: Any, policy: Policy) -> str:
    """An answer of an evaluation for the console: prompt as fed, response, verdict."""
    text = shown_prompt(policy.tokenizer, answer.prompt.tokens)
    text += decode(policy.tokenizer, answer.response.tokens, policy.stop)
    verdict = "correct" if answer.verdict.correct else "incorrect"
    gold = answer.prompt.problem.answer
    lines = f"{shortened(text)}\n[{verdict}; the ground truth is {gold}]".split("\n")
    return "\n".join(f"  | {line}" for line in lines)


def scored_texts(
    policy: Policy, response: Response, text: str, ends: int = _TOKENS
) -> list[tuple[str, float | None]]:
    """A decoded response as (text, log-prob) pairs in order; their texts concatenate to `text`.

    A token that shows nothing, as the end token, has the text "". Of more than 2 * `ends` tokens,
    those in the middle are one text with None.
    """
    tokens, logprobs = response.tokens, [round(float(p), 4) for p in response.behavior_logprobs]
    n = len(tokens)
    head, tail = (n, 0) if n <= 2 * ends else (ends, ends)
    first = list(zip(_texts(policy, tokens[:head]), logprobs[:head], strict=True))
    last = list(zip(_texts(policy, tokens[n - tail :]), logprobs[n - tail :], strict=True))
    # A tokenizer may decode a part differently than the whole; texts from there on are unused.
    while not text.startswith(_joined(first)):
        first.pop()
    rest = text[len(_joined(first)) :]
    while not rest.endswith(_joined(last)):
        last.pop(0)
    middle = rest[: len(rest) - len(_joined(last))]
    between = [(middle, None)] if middle or len(first) + len(last) < n else []
    return [*first, *between, *last]


def _joined(pairs: Sequence[tuple[str, float]]) -> str:
    return "".join(text for text, _ in pairs)


def _texts(policy: Policy, tokens: np.ndarray) -> list[str]:
    """What each token adds to the text. Spaces and characters span tokens."""
    size = len(tokens) - (len(tokens) > 0 and int(tokens[-1]) in policy.stop)
    texts = [""] * len(tokens)
    start, shown, before = 0, 0, ""  # tokens[start:shown] decode to `before`
    for end in range(1, size + 1):
        text = decode(policy.tokenizer, tokens[start:end], ())
        partial = text.endswith("\ufffd") and end < size  # perhaps half a character
        if text == before or partial:
            continue
        texts[end - 1] = text[len(before) :]
        start, shown = shown, end
        before = decode(policy.tokenizer, tokens[start:shown], ())
    return texts
