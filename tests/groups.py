"""Groups of random responses."""

import numpy as np

from dapo_jax.types import Group, Problem, Prompt, Response

WRONG, MIXED, RIGHT = [0, 0], [1, 0], [1, 1]
PROBLEMS = {p.id: p for p in (Problem(f"problem-{i}-½", f"What is {i}?", str(i)) for i in range(5))}


def make_group(draw, correct, seed=0):
    rng = np.random.default_rng([seed, draw])
    responses = tuple(
        Response(
            rng.integers(0, 50, n, np.int32), -rng.random(n, np.float32), bool(rng.random() < 0.5)
        )
        for n in rng.integers(1, 6, len(correct))
    )
    penalty = -rng.random(len(correct), np.float32)
    return Group(
        draw=draw,
        prompt=Prompt(
            PROBLEMS[f"problem-{draw % 5}-½"], rng.integers(0, 50, rng.integers(1, 8), np.int32)
        ),
        responses=responses,
        correct=np.array(correct, bool),
        reward=np.where(correct, 1, -1).astype(np.float32) + penalty,
        penalty=penalty,
        old_logprobs=tuple(-rng.random(len(r.tokens), np.float32) for r in responses),
    )
