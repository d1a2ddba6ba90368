"""Responses for people to read: one each of the first groups of a step, with the log-prob of each
token.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from dapo_jax.config import DapoSection
from dapo_jax.dapo.groups import advantages_of
from dapo_jax.data.prompts import decode
from dapo_jax.training.setup import Policy
from dapo_jax.types import Group, Response

_TOKENS = 1024  # with log-probs, at each end of a response: a row of a long response is little more than its text


def sample_rows(
    groups: Sequence[Group], count: int, algo: DapoSection, policy: Policy
) -> list[dict[str, Any]]:
    """The first response with a verdict of each of the first `count` groups that have one, as JSON
    objects.

    `group` says what became of the response's group: all_correct, all_wrong, or kept. `tokens` are
    pairs of a text and the sampler's log-prob; the texts make up `response`, and a pair with None
    stands for many tokens (`scored_texts`).
    """
    rows = []
    for group in [g for g in groups if g.responses][:count]:
        problem, right = group.prompt.problem, int(group.correct.sum())
        text = decode(policy.tokenizer, group.responses[0].tokens, policy.stop)
        advantage = advantages_of(group.reward, algo)[0]
        rows.append(
            {
                "draw": group.draw,
                "id": problem.id,
                "prompt": problem.prompt
                if isinstance(problem.prompt, str)
                else [dataclasses.asdict(m) for m in problem.prompt],
                "answer": problem.answer,
                "response": text,
                "correct": bool(group.correct[0]),
                "group": "all_wrong"
                if right == 0
                else "all_correct"
                if right == len(group.correct)
                else "kept",
                "group_correct": right,
                "group_size": len(group.correct),
                "reward": float(group.reward[0]),
                "penalty": float(group.penalty[0]),
                "advantage": float(advantage),
                "length": len(group.responses[0].tokens),
                "truncated": bool(group.responses[0].truncated),
                "tokens": scored_texts(policy, group.responses[0], text),
            }
        )
    return rows


def scored_texts(
    policy: Policy, response: Response, text: str, ends: int = _TOKENS
) -> list[tuple[str, float | None]]:
    """A response as (text, log-prob) in order.

    The texts concatenate to `text`, which is the decoded response.

    A token that shows nothing, such as the end token or the first bytes of a character, has the
    text "". Of a response of more than 2 * `ends` tokens only so many at each end come one by one;
    what is between them is a text with None.
    """
    tokens, logprobs = response.tokens, [round(float(p), 4) for p in response.behavior_logprobs]
    n = len(tokens)
    head, tail = (n, 0) if n <= 2 * ends else (ends, ends)
    first = list(zip(_texts(policy, tokens[:head]), logprobs[:head], strict=True))
    last = list(zip(_texts(policy, tokens[n - tail :]), logprobs[n - tail :], strict=True))
    # A tokenizer may decode a part otherwise than within the whole; from there on its texts are not
    # used.
    start, end = 0, len(text)
    for i, (piece, _) in enumerate(first):
        if not text.startswith(piece, start):
            first = first[:i]
            break
        start += len(piece)
    for i, (piece, _) in reversed(list(enumerate(last))):
        if not text.endswith(piece, start, end):
            last = last[i + 1 :]
            break
        end -= len(piece)
    between = [(text[start:end], None)] if start < end or len(first) + len(last) < n else []
    return [*first, *between, *last]


def _texts(policy: Policy, tokens: np.ndarray) -> list[str]:
    """What each token adds to the text.

    Decoded with the token before it, since spaces and characters span tokens.
    """
    size = len(tokens) - (len(tokens) > 0 and int(tokens[-1]) in policy.stop)
    texts = [""] * len(tokens)
    start, shown, before = 0, 0, ""  # tokens[start:shown] decode to `before`
    for end in range(1, size + 1):
        text = decode(policy.tokenizer, tokens[start:end], ())
        if text == before or (
            text.endswith("\ufffd") and end < size
        ):  # shows nothing, or perhaps half a character
            continue
        texts[end - 1] = text[len(before) :]
        start, shown = shown, end
        before = decode(policy.tokenizer, tokens[start:shown], ())
    return texts
