"""One optimizer update, on packed and on padded rows."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dapo_jax.benchmark.measure import (
    Sizes,
    device,
    memory,
    random_model,
    report,
    speed,
    temp_bytes,
    timed,
)
from dapo_jax.config import Config
from dapo_jax.dapo.packing import TrainItem, build_batch
from dapo_jax.runtime.mesh import put_rows, row_shards
from dapo_jax.training.programs import train_programs
from dapo_jax.types import InputError, TrainBatch


def train_items(sizes: Sizes) -> list[TrainItem]:
    """Random responses, all of the full length or log-normal with a median of a sixth of it; each
    token weighs the same.
    """
    rng = np.random.default_rng(0)
    lengths = np.full(sizes.responses, sizes.max_response_len)
    if sizes.lengths == "lognormal":
        lengths = np.clip(
            np.rint(lengths / 6 * np.exp(rng.standard_normal(sizes.responses))), 1, lengths
        ).astype(int)
    items = []
    for length in lengths:
        prompt, response = (
            rng.integers(0, sizes.vocab, n, np.int32) for n in (sizes.prompt_len, length)
        )
        old = np.full(length, -math.log(sizes.vocab), np.float32)
        items.append(
            TrainItem(
                prompt,
                response,
                old,
                old,
                advantage=float(rng.standard_normal()),
                weight=1.0 / int(lengths.sum()),
            )
        )
    return items


def padded_rows(items: Sequence[TrainItem], row_len: int, rows: int) -> TrainBatch:
    """One response a row, [M, rows, row_len]: what training without packing computes."""
    alone = [build_batch([item], row_len=row_len, rows_per_microbatch=1)[0] for item in items]

    def stack(*fields: np.ndarray) -> np.ndarray:
        joined = np.concatenate([field[0] for field in fields])
        return np.pad(joined, ((0, -len(joined) % rows), (0, 0))).reshape(-1, rows, row_len)

    return jax.tree.map(stack, *alone)


def benchmark_update(sizes: Sizes) -> dict[str, Any]:
    """One AdamW update of the DAPO loss, forward, backward and optimizer over all micro-batches: on
    packed rows, and on padded ones (one response a row, about as many tokens in a micro-batch) for
    comparison.
    """
    longest = sizes.prompt_len + sizes.max_response_len
    if longest > sizes.row_len:
        raise InputError(
            f"--row-len: {sizes.row_len} does not hold --prompt-len + --max-response-len = {longest}; raise it"
        )
    model, mesh, params = random_model(sizes, "--rows", sizes.rows)
    items, shards = train_items(sizes), row_shards(mesh)
    packed, stats = build_batch(
        items, row_len=sizes.row_len, rows_per_microbatch=sizes.rows, row_shards=shards
    )
    rows = max(1, sizes.rows * sizes.row_len // longest // shards) * shards
    batches = {"packed": packed, "padded": padded_rows(items, longest, rows)}

    programs = train_programs(Config(), model, mesh)
    state = programs.init_optimizer(params)

    def update(program: Any, inputs: Any) -> Any:
        nonlocal state
        state, sums = program(state, *inputs)
        return state, sums

    runs, peaks = {}, {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in batches}
    for name, batch in batches.items():
        inputs = put_rows(batch, mesh, axis=1), np.float32(1e-6)
        runs[name] = programs.update.lower(state, *inputs).compile(), inputs  # type: ignore[attr-defined]
    for name, run in runs.items():
        before = memory(peak=False)
        jax.block_until_ready(update(*run))
        after = memory(peak=True)
        peaks[name] = None if before is None or after is None else after - before
    for _ in range(sizes.repeats):
        for name, run in runs.items():
            times[name].append(timed(functools.partial(update, *run)))
    modes = {
        name: speed(stats.target_tokens, times[name], "trained_tokens")
        | {
            "microbatches": len(batch.tokens),
            "filled": stats.tokens / batch.tokens.size,
            "temp_bytes": temp_bytes(runs[name][0]),
            "peak_bytes": peaks[name],
        }
        for name, batch in batches.items()
    }
    result = {
        "trained_tokens": stats.target_tokens,
        "packing_efficiency": stats.efficiency,
        "packed_rows": stats.rows,
        "modes": modes,
    }
    return report(sizes, [{"mode": name, **mode} for name, mode in modes.items()], result, device())
