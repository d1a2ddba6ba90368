"""One optimizer update on packed rows."""

import functools
import math
from typing import Any

import jax
import numpy as np

from dapo_jax.benchmark.measure import Sizes, device, random_model, report, speed, temp_bytes, timed
from dapo_jax.config import DapoSection, OptimSection
from dapo_jax.dapo.loss import loss_fn
from dapo_jax.dapo.packing import TrainItem, build_batch
from dapo_jax.dapo.update import init_state, make_optimizer, update_step
from dapo_jax.runtime.mesh import put_rows, state_sharding
from dapo_jax.types import InputError


def train_items(sizes: Sizes) -> list[TrainItem]:
    """Random responses, all of the full length or log-normal with a median of a sixth of it; each token weighs the same."""
    rng = np.random.default_rng(0)
    lengths = np.full(sizes.responses, sizes.max_response_len)
    if sizes.lengths == "lognormal":
        lengths = np.clip(np.rint(lengths / 6 * np.exp(rng.standard_normal(sizes.responses))), 1, lengths).astype(int)
    items = []
    for length in lengths:
        prompt, response = (rng.integers(0, sizes.vocab, n, np.int32) for n in (sizes.prompt_len, length))
        old = np.full(length, -math.log(sizes.vocab), np.float32)
        items.append(TrainItem(prompt, response, old, old, advantage=float(rng.standard_normal()), weight=1.0 / int(lengths.sum())))
    return items


def benchmark_update(sizes: Sizes) -> dict[str, Any]:
    """One AdamW update of the DAPO loss on packed rows: forward, backward and optimizer, over all micro-batches."""
    longest = sizes.prompt_len + sizes.max_response_len
    if longest > sizes.row_len:
        raise InputError(f"--row-len: {sizes.row_len} does not hold --prompt-len + --max-response-len = {longest}; raise it")
    model, mesh, params = random_model(sizes, "--rows", sizes.rows)
    batch, stats = build_batch(train_items(sizes), row_len=sizes.row_len, rows_per_microbatch=sizes.rows)
    optimizer = make_optimizer(OptimSection())
    shardings = state_sharding(jax.eval_shape(lambda p: init_state(p, optimizer), params), mesh)
    state = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings, donate_argnums=0)(params)
    step = functools.partial(
        update_step, loss_fn=functools.partial(loss_fn, model=model, algo=DapoSection(), mesh=mesh), optimizer=optimizer
    )
    inputs = put_rows(batch, mesh, axis=1), np.float32(1e-6)
    program = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(state, *inputs).compile()

    def update() -> Any:
        nonlocal state
        state, sums = program(state, *inputs)
        return state, sums

    times = [timed(update) for _ in range(1 + sizes.repeats)][1:]
    result = speed(stats.target_tokens, times, "trained_tokens") | {
        "trained_tokens": stats.target_tokens,
        "packing_efficiency": stats.efficiency,
        "packed_rows": stats.rows,
        "microbatches": stats.used_microbatches,
        "temp_bytes": temp_bytes(program),
    }
    return report(sizes, [result], result, device())
