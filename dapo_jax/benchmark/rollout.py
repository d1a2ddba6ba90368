"""Sampling through the rollout engine."""

import functools
from typing import Any

import jax
import numpy as np

from dapo_jax.benchmark.measure import Sizes, device, random_model, report, speed, timed
from dapo_jax.rollout.engine import Engine
from dapo_jax.rollout.sampler import Sampling
from dapo_jax.runtime.mesh import publisher, put
from dapo_jax.runtime.multihost import fetch
from dapo_jax.types import Request


def benchmark_rollout(sizes: Sizes) -> dict[str, Any]:
    """Sampling through the rollout engine, without an end token: every response has the full length."""
    model, mesh, params = random_model(sizes, "--slots", sizes.slots)
    limits = {"slots": sizes.slots, "max_prompt_len": sizes.prompt_len, "max_response_len": sizes.max_response_len}
    engine = Engine(model, Sampling(top_p=sizes.top_p), (), **limits, mesh=mesh, put=put, fetch=fetch)
    weights = publisher(params, mesh, sizes.dtype)(params)
    prompts = np.random.default_rng(0).integers(0, sizes.vocab, (sizes.requests, sizes.prompt_len), np.int32)
    requests = [Request(draw, 0, prompt) for draw, prompt in enumerate(prompts)]
    generate = functools.partial(engine.generate, weights, requests, jax.random.key(1))
    lengths = [len(response.tokens) for response in generate()]  # compiles
    times = [timed(generate) for _ in range(sizes.repeats)]
    # A step draws one token a slot, the first in the prefill. In lock-step the longest response of a batch decides.
    steps = sum(max(lengths[at : at + sizes.slots]) for at in range(0, len(lengths), sizes.slots))
    mode = speed(sum(lengths), times) | {"decode_steps": steps}
    bound = sum(lengths) / sizes.slots
    table = [{"mode": "lockstep", **mode, "bound": bound}]
    return report(sizes, table, {"modes": {"lockstep": mode}, "bound_decode_steps": bound}, device())
