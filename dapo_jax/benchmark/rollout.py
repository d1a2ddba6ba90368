"""Sampling through the rollout engine: slots refilled as responses end, against lock-step batches."""

import functools
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from dapo_jax.benchmark.measure import Sizes, device, random_model, report, speed, timed
from dapo_jax.rollout.engine import Engine, Programs
from dapo_jax.rollout.sampler import sample_on_mesh
from dapo_jax.rollout.token_sampling import Sampling
from dapo_jax.runtime.chips import prefill_tokens
from dapo_jax.runtime.mesh import publisher
from dapo_jax.runtime.multihost import fetch
from dapo_jax.types import Params, Request


def response_lengths(sizes: Sizes) -> np.ndarray:
    """Lengths to impose [requests]: all the longest, or log-normal around the median and cut; the
    same at every call.
    """
    if sizes.lengths == "equal":
        return np.full(sizes.requests, sizes.max_response_len)
    # Of this draw lock-step takes 3.3 times the bound, as most do.
    drawn = np.random.default_rng(6).lognormal(math.log(sizes.median), sizes.sigma, sizes.requests)
    return np.clip(drawn.round(), 1, sizes.max_response_len).astype(int)


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
    engine.programs = Programs(
        **{name: watched(name, program) for name, program in before._asdict().items()}
    )
    seconds = timed(run)[0]
    engine.programs = before
    return seconds, spent


def benchmark_rollout(sizes: Sizes) -> dict[str, Any]:
    """Sampling through the rollout engine, lengths imposed.

    `lockstep`: batches of all slots, each until its longest response ends. `refill`: a slot gets
    the next request when its response ends, and the last ones are decoded in fewer slots. Shares
    are of the time of one more run; sampling is timed by itself, on logits of all slots, and taken
    out of decode.
    """
    model, mesh, params = random_model(sizes, "--slots", sizes.slots)
    limits = {
        "slots": sizes.slots,
        "max_prompt_len": sizes.prompt_len,
        "max_response_len": sizes.max_response_len,
    }
    sampling = Sampling(top_p=sizes.top_p, top_k=sizes.top_k)
    make = functools.partial(
        Engine,
        model,
        sampling,
        (),
        **limits,
        mesh=mesh,
        fetch=fetch,
        prefill_tokens=prefill_tokens(mesh),
        int8=sizes.kv_cache == "int8",
    )
    weights = publisher(params, mesh, sizes.dtype)(params)
    prompts = np.random.default_rng(0).integers(
        0, sizes.vocab, (sizes.requests, sizes.prompt_len), np.int32
    )
    lengths = response_lengths(sizes)
    requests = [
        Request(i, 0, prompt, limit=int(n))
        for i, (prompt, n) in enumerate(zip(prompts, lengths, strict=True))
    ]
    in_turn = [requests[at : at + sizes.slots] for at in range(0, len(requests), sizes.slots)]

    engines = {"lockstep": make(compact=False), "refill": make()}
    batches = {"lockstep": in_turn, "refill": [requests]}
    counts: dict[str, Counter] = {name: Counter() for name in engines}
    runs = {
        name: functools.partial(_sample, engines[name], weights, batches[name], counts[name])
        for name in engines
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    for repeat in range(sizes.repeats + 1):
        for name, run in runs.items():
            taken = timed(run)
            if repeat:  # the first compiles
                times[name].append(taken)

    draw = jax.jit(functools.partial(sample_on_mesh, sampling=sampling, mesh=mesh))
    logits = jax.random.normal(jax.random.key(0), (sizes.slots, sizes.vocab))
    keys = jax.random.split(jax.random.key(0), sizes.slots)
    draw(logits, keys)
    draw_seconds = min(timed(lambda: draw(logits, keys))[0] for _ in range(20))

    modes, bound = {}, float(lengths.sum() / sizes.slots)
    for name, engine in engines.items():
        seconds, spent = _time_in_programs(engine, runs[name])
        drawing = min(draw_seconds * counts[name]["steps"], spent["decode"])
        parts = {
            "prefill": spent["prefill"] + spent["insert"],
            "decode": spent["decode"] - drawing,
            "sampling": drawing,
        }
        parts["host"] = seconds - spent["prefill"] - spent["insert"] - spent["decode"]
        shares = {f"{part}_share": part_seconds / seconds for part, part_seconds in parts.items()}
        modes[name] = (
            speed(counts[name]["tokens"], times[name])
            | {"decode_steps": counts[name]["steps"]}
            | shares
        )
    table = [{"mode": name, **mode, "bound": bound} for name, mode in modes.items()]
    ratios = {
        f"lockstep/refill_{key}": modes["lockstep"][key] / modes["refill"][key]
        for key in ("seconds", "cpu_seconds")
    }
    return report(sizes, table, {"modes": modes, "bound_decode_steps": bound} | ratios, device())
