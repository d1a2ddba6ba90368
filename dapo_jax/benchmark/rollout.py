"""Sampling through the rollout engine: slots refilled as responses end, or lock-step batches."""

import dataclasses
import functools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from dapo_jax.benchmark import measure
from dapo_jax.benchmark.measure import ModelSizes, Report, flag, timed
from dapo_jax.config import ModelConfig
from dapo_jax.rollout.engine import Engine, Limits, Programs
from dapo_jax.rollout.sampler import sample_on_mesh
from dapo_jax.rollout.token_sampling import Sampling
from dapo_jax.runtime.chips import prefill_tokens
from dapo_jax.runtime.mesh import publisher
from dapo_jax.runtime.multihost import fetch
from dapo_jax.types import Params, Request


@dataclasses.dataclass(kw_only=True)
class RolloutSizes(ModelSizes):
    slots: int = flag(16, "sequences decoded at a time")
    requests: int = flag(16, "responses to sample")
    lengths: str = flag("equal", "of responses, imposed", choices=("equal", "lognormal"))
    median: int = flag(21, "of log-normal lengths, before they are clipped")
    sigma: float = flag(1.0, "of the logarithm of log-normal lengths", high=9)
    top_k: int = flag(0, "sample among this many tokens; 0: all", low=0)
    top_p: float = flag(1.0, "nucleus mass; 1: off")
    kv_cache: str = flag("compute", "as in the config", choices=("compute", "int8"))


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


def _time_in_programs(engine: Engine, run: Callable[[], None]) -> tuple[float, dict[str, float]]:
    """Seconds of a run in which every program is waited for, and of each program in it."""
    spent: dict[str, float] = defaultdict(float)

    def watched(name: str, program: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = jax.block_until_ready(program(*args, **kwargs))
            spent[name] += time.perf_counter() - start
            return result

        return call

    before = engine.programs
    engine.programs = Programs(*map(watched, Programs._fields, before))
    seconds = timed(run)[0]
    engine.programs = before
    return seconds, spent


def _sampling_seconds(sizes: RolloutSizes, sampling: Sampling, mesh: Mesh) -> float:
    """Seconds of sampling a token for every slot, the best of 20."""
    draw = jax.jit(functools.partial(sample_on_mesh, sampling=sampling, mesh=mesh))
    logits = jax.random.normal(jax.random.key(0), (sizes.slots, sizes.vocab))
    keys = jax.random.split(jax.random.key(0), sizes.slots)
    draw(logits, keys)
    return min(timed(lambda: draw(logits, keys))[0] for _ in range(20))


def benchmark_rollout(sizes: RolloutSizes) -> Report:
    """Sampling through the rollout engine, lengths imposed.

    `lockstep`: batches of all slots, each until its longest response ends. `refill`: a slot gets
    the next request when its response ends, and the last ones are decoded in fewer slots. Shares
    are of the time of one more run; sampling is timed by itself, on logits of all slots, and
    subtracted from decode.
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
    draw_seconds = _sampling_seconds(sizes, sampling, mesh)

    modes = {}
    for name, engine in engines.items():
        steps = counts[name]["steps"]
        seconds, spent = _time_in_programs(engine, runs[name])
        drawing = min(draw_seconds * steps, spent["decode"])
        prefill, decode = spent["prefill"] + spent["insert"], spent["decode"]
        modes[name] = measure.speed(counts[name]["tokens"], times[name]) | {
            "decode_steps": steps,
            "prefill_share": prefill / seconds,
            "decode_share": (decode - drawing) / seconds,
            "sampling_share": drawing / seconds,
            "host_share": (seconds - prefill - decode) / seconds,
        }
    bound = float(lengths.sum() / sizes.slots)
    result: dict[str, Any] = {"modes": modes, "bound_decode_steps": bound}
    for key in ("seconds", "cpu_seconds"):
        result[f"lockstep/refill_{key}"] = modes["lockstep"][key] / modes["refill"][key]
    return [{"mode": name, **mode} for name, mode in modes.items()], result | measure.device()
