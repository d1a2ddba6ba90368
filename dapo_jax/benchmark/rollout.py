"""Sampling through the rollout engine: slots refilled as responses end, or lock-step batches."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dapo_jax.benchmark import measure
from dapo_jax.benchmark.measure import Lengths, ModelSizes, Report
from dapo_jax.config import ModelConfig
from dapo_jax.config.schema import field
from dapo_jax.model.attention import page_counts
from dapo_jax.model.flops import cache_bytes
from dapo_jax.model.ragged_attention import BLOCK_PAGES, LANES
from dapo_jax.rollout.engine import Engine, Limits
from dapo_jax.rollout.token_sampling import Sampling
from dapo_jax.runtime.chips import prefill_tokens
from dapo_jax.runtime.compiled import device_bytes
from dapo_jax.runtime.mesh import publisher
from dapo_jax.runtime.multihost import fetch
from dapo_jax.types import InputError, Params, Request


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
    cache_tokens: int = field(0, "of the KV cache; 0: all slots at their longest", ge=0)


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
    cache = options.pop("int8", False), options.pop("cache_tokens", None)
    limits = Limits(sizes.slots, *lengths, prefill_tokens(mesh), *cache)
    sampling = options.pop("sampling", Sampling())
    try:
        return Engine(model, sampling, (), limits, mesh=mesh, fetch=fetch, **options)
    except ValueError as e:
        raise InputError(f"--{str(e).replace('_', '-', 1)}") from None


def _entries_read(
    engine: Engine, table: np.ndarray, position: np.ndarray, sampled: np.ndarray, steps: int
) -> int:
    """Cache entries of a layer that the attention of a segment reads, over all shards.

    Args:
      table: of the decoded slots [N, b, T]. position: theirs before the segment [N, b].
      sampled: their tokens in it. steps: its decode steps.
    """
    at = position[..., None] + (after := np.arange(steps))  # [N, b, steps]
    if engine.page == LANES:  # by the kernel
        block = LANES * BLOCK_PAGES  # one at least, of a sequence that is not live too
        blocks = -(-np.where(after < sampled[..., None], at, 0) // block)
        return int(np.maximum(blocks, 1).sum()) * block
    held = (table > 0).sum(axis=2)
    needed = np.minimum(-(-at // engine.page), held[..., None]).sum(axis=1).max(axis=0)
    sizes = np.array(page_counts(*table.shape[1:]))
    return int(sizes[np.searchsorted(sizes, needed)].sum()) * engine.shards * engine.page


def _count_reads(engine: Engine, counts: Counter) -> None:
    """Lets the engine's decode program add up what it reads."""
    decode = engine.programs.decode

    def counted(params: Any, state: Any, table: np.ndarray, until: Any, *, width: int) -> Any:
        position, length = (x[:, :width] for x in fetch((state.slots.position, state.slots.length)))
        state, seen, steps = decode(params, state, table, until, width=width)
        sampled = fetch(seen)[1, :, :width] - length
        counts["read"] += _entries_read(engine, table[:, :width], position, sampled, int(steps))
        return state, seen, steps

    engine.programs = engine.programs._replace(decode=counted)


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
    counts["steps"], counts["suspended"] = stream.steps, stream.suspended


def _copy() -> tuple[Callable[[], Any], float]:
    """Four copies within a device's memory, and the bytes that they read and write."""
    x = jnp.zeros(1 << 26)
    four = functools.partial(jax.lax.fori_loop, 0, 4, lambda _, x: x + 1)
    return functools.partial(jax.jit(four), x), 8.0 * x.nbytes


def benchmark_rollout(sizes: RolloutSizes) -> Report:
    """Sampling through the rollout engine, lengths imposed.

    `lockstep`: batches of all slots, each until its longest response ends. `refill`: a slot gets
    the next request when its response ends, and the last ones are decoded in fewer slots.
    `read/live`: cache entries that attention reads for each of a live sequence. `bound_share`: of
    the seconds, what weights (once for a token of every slot) and live cache entries take to read,
    as fast as memory is copied; above 1 where a CPU's caches keep the weights.
    """
    model, mesh, params = measure.random_model(sizes, "slots")
    weights = publisher(params, mesh, sizes.dtype)(params)
    shape, lengths = (sizes.requests, sizes.prompt_len), response_lengths(sizes)
    prompts = np.random.default_rng(0).integers(0, sizes.vocab, shape, np.int32)
    requests = [Request(i, 0, prompts[i], limit=int(n)) for i, n in enumerate(lengths)]
    in_turn = [requests[at : at + sizes.slots] for at in range(0, len(requests), sizes.slots)]

    int8 = sizes.kv_cache == "int8"
    cache = {"int8": int8, "cache_tokens": sizes.cache_tokens or None}
    sampling = Sampling(top_p=sizes.top_p, top_k=sizes.top_k)
    make = functools.partial(rollout_engine, sizes, model, mesh, sampling=sampling, **cache)
    engines = {"lockstep": make(compact=False), "refill": make()}
    batches = {"lockstep": in_turn, "refill": [requests]}
    counts: dict[str, Counter] = {name: Counter() for name in engines}
    runs: dict[str, Callable[[], Any]] = {}
    runs["copy"], copied = _copy()
    for name, engine in engines.items():
        _count_reads(engine, counts[name])
        arguments = engine, weights, batches[name], counts[name]
        runs[name] = functools.partial(_sample, *arguments)
    times = measure.time_in_turn(runs, sizes.repeats)

    steps, live = lengths.sum() / sizes.slots, lengths * (sizes.prompt_len - 1 + (lengths - 1) / 2)
    entries = live.sum() * cache_bytes(model, int8=int8) / mesh.size
    bandwidth = copied / min(times["copy"])[0]
    least = float(steps * device_bytes(weights) + entries) / bandwidth
    modes = {}
    for name, count in counts.items():
        modes[name] = measure.speed(count["tokens"], times[name])
        modes[name]["bound_share"] = least / modes[name]["seconds"]
        modes[name]["read/live"] = count["read"] / float(live.sum())
        modes[name] |= {"decode_steps": count["steps"], "suspended": count["suspended"]}
    result: dict[str, Any] = {"modes": modes, "bound_decode_steps": float(steps)}
    result |= {"bound_seconds": least, "live_tokens": float(live.sum())}
    for key in ("seconds", "cpu_seconds"):
        result[f"lockstep/refill_{key}"] = modes["lockstep"][key] / modes["refill"][key]
    return [{"mode": name, **mode} for name, mode in modes.items()], result | measure.device()
