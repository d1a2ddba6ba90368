"""Sampling through the rollout engine: slots refilled as responses end, or lock-step batches."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from dapo_jax.benchmark import measure
from dapo_jax.benchmark.measure import Lengths, ModelSizes, Report
from dapo_jax.config import ModelConfig
from dapo_jax.config.schema import field
from dapo_jax.rollout.engine import Engine, Limits
from dapo_jax.rollout.token_sampling import Sampling
from dapo_jax.runtime.chips import prefill_tokens
from dapo_jax.runtime.mesh import publisher
from dapo_jax.runtime.multihost import fetch
from dapo_jax.types import Params, Request


@dataclasses.dataclass(kw_only=True)
class RolloutSizes(ModelSizes):
    slots: int = field(16, "sequences decoded at a time", ge=1)
    requests: int = field(16, "responses to sample", ge=1)
    lengths: Lengths = field("equal", "of responses, imposed")
    median: int = field(21, "of log-normal lengths, before they are clipped", ge=1)
    sigma: float = field(1.0, "of the logarithm of log-normal lengths", gt=0, le=9)
    top_k: int = field(0, "sample among this many tokens; 0: all", ge=0)
    top_p: float = field(1.0, "nucleus mass; 1: off", gt=0, le=1)
    kv_cache: Literal["compute", "int8"] = field("compute", "as in the config")


def response_lengths(sizes: RolloutSizes) -> np.ndarray:
    """Lengths to impose [requests]: all the longest, or log-normal and clipped; always the same."""
    if sizes.lengths == "equal":
        return np.full(sizes.requests, sizes.max_response_len)
    # With this seed lock-step takes 3.3 times the bound, which is typical.
    drawn = np.random.default_rng(6).lognormal(math.log(sizes.median), sizes.sigma, sizes.requests)
    return np.clip(drawn.round(), 1, sizes.max_response_len).astype(int)


def rollout_engine(sizes: Any, model: ModelConfig, mesh: Mesh, **options: Any) -> Engine:
    """An engine of the sizes' slots and lengths that no token stops."""
    lengths = (sizes.prompt_len, sizes.max_response_len)
    int8 = options.pop("int8", False)
    limits = Limits(sizes.slots, *lengths, prefill_tokens(mesh), int8)
    sampling = options.pop("sampling", Sampling())
    return Engine(model, sampling, (), limits, mesh=mesh, fetch=fetch, **options)


def _sample(
    engine: Engine, params: Params, batches: Sequence[Sequence[Request]], counts: Counter
) -> None:
    """Each batch to its end before the next."""
    stream = engine.stream(params, jax.random.key(1))
    counts.clear()
    for batch in batches:
        stream.submit(batch)
        while stream.pending or stream.live:
            counts["tokens"] += sum(len(response.tokens) for _, response in stream.advance())
    counts["steps"] = stream.steps


def benchmark_rollout(sizes: RolloutSizes) -> Report:
    """Sampling through the rollout engine, lengths imposed.

    `lockstep`: batches of all slots, each until its longest response ends. `refill`: a slot gets
    the next request when its response ends, and the last ones are decoded in fewer slots.
    """
    model, mesh, params = measure.random_model(sizes, "slots")
    weights = publisher(params, mesh, sizes.dtype)(params)
    shape, lengths = (sizes.requests, sizes.prompt_len), response_lengths(sizes)
    prompts = np.random.default_rng(0).integers(0, sizes.vocab, shape, np.int32)
    requests = [Request(i, 0, prompts[i], limit=int(n)) for i, n in enumerate(lengths)]
    in_turn = [requests[at : at + sizes.slots] for at in range(0, len(requests), sizes.slots)]

    sampling = Sampling(top_p=sizes.top_p, top_k=sizes.top_k)
    make = functools.partial(
        rollout_engine, sizes, model, mesh, sampling=sampling, int8=sizes.kv_cache == "int8"
    )
    engines = {"lockstep": make(compact=False), "refill": make()}
    batches = {"lockstep": in_turn, "refill": [requests]}
    counts: dict[str, Counter] = {name: Counter() for name in engines}
    runs = {
        name: functools.partial(_sample, engine, weights, batches[name], counts[name])
        for name, engine in engines.items()
    }
    times = measure.time_in_turn(runs, sizes.repeats)
    modes = {
        name: measure.speed(counts[name]["tokens"], times[name])
        | {"decode_steps": counts[name]["steps"]}
        for name in engines
    }
    bound = float(lengths.sum() / sizes.slots)
    result: dict[str, Any] = {"modes": modes, "bound_decode_steps": bound}
    for key in ("seconds", "cpu_seconds"):
        result[f"lockstep/refill_{key}"] = modes["lockstep"][key] / modes["refill"][key]
    return [{"mode": name, **mode} for name, mode in modes.items()], result | measure.device()
