"""One optimizer update, on packed and on padded rows."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from dapo_jax.benchmark import measure
from dapo_jax.benchmark.measure import Lengths, ModelSizes, Report, fail
from dapo_jax.config import Config
from dapo_jax.config.schema import field
from dapo_jax.dapo.packing import TrainItem, build_batch
from dapo_jax.runtime.mesh import put_rows, row_shards
from dapo_jax.training.programs import train_programs
from dapo_jax.types import TrainBatch


@dataclasses.dataclass(kw_only=True)
class UpdateSizes(ModelSizes):
    rows: int = field(8, "rows of a micro-batch", ge=1)
    row_len: int = field(512, "tokens of a row", ge=1)
    responses: int = field(8, "responses in the update", ge=1)
    lengths: Lengths = field("equal", "all the longest, or log-normal, median a sixth of it")


def train_items(sizes: UpdateSizes) -> list[TrainItem]:
    """Random responses, all of the longest length or log-normal; each token has the same weight."""
    rng = np.random.default_rng(0)
    lengths = np.full(sizes.responses, sizes.max_response_len)
    if sizes.lengths == "lognormal":
        drawn = np.rint(lengths / 6 * np.exp(rng.standard_normal(sizes.responses)))
        lengths = np.clip(drawn, 1, lengths).astype(int)
    items = []
    for length in lengths:
        prompt = rng.integers(0, sizes.vocab, sizes.prompt_len, np.int32)
        response = rng.integers(0, sizes.vocab, length, np.int32)
        old = np.full(length, -math.log(sizes.vocab), np.float32)
        advantage, weight = float(rng.standard_normal()), 1.0 / int(lengths.sum())
        items.append(TrainItem(prompt, response, old, old, advantage=advantage, weight=weight))
    return items


def padded_rows(items: Sequence[TrainItem], row_len: int, rows: int) -> TrainBatch:
    """One response a row, [M, rows, row_len]: what training without packing computes."""
    alone = [build_batch([item], row_len=row_len, rows_per_microbatch=1)[0] for item in items]

    def stack(*fields: np.ndarray) -> np.ndarray:
        joined = np.concatenate([field[0] for field in fields])
        return np.pad(joined, ((0, -len(joined) % rows), (0, 0))).reshape(-1, rows, row_len)

    return jax.tree.map(stack, *alone)


def benchmark_update(sizes: UpdateSizes) -> Report:
    """One AdamW update of the DAPO loss, forward, backward and optimizer over all micro-batches.

    On packed rows, and for comparison on padded ones: one response a row, about as many tokens in a
    micro-batch.
    """
    longest = sizes.prompt_len + sizes.max_response_len
    if longest > sizes.row_len:
        what = f"does not hold --prompt-len + --max-response-len = {longest}; raise it"
        fail("row_len", f"{sizes.row_len} {what}")
    model, mesh, params = measure.random_model(sizes, "rows")
    items, shards = train_items(sizes), row_shards(mesh)
    packed, stats = build_batch(
        items, row_len=sizes.row_len, rows_per_microbatch=sizes.rows, row_shards=shards
    )
    rows = max(1, sizes.rows * sizes.row_len // longest // shards) * shards
    batches = {"packed": packed, "padded": padded_rows(items, longest, rows)}

    config = Config()
    programs = train_programs(model, mesh, config.dapo, config.optim, config.rollout.temperature)
    state = programs.init_optimizer(params)

    def update(program: Any, inputs: Any) -> Any:
        nonlocal state
        state, sums = program(state, *inputs)
        return state, sums

    calls, facts = {}, {}
    for name, batch in batches.items():
        inputs = put_rows(batch, mesh, axis=1), np.float32(1e-6)
        program = programs.update.lower(state, *inputs).compile()  # type: ignore[attr-defined]
        calls[name] = functools.partial(update, program, inputs)
        filled = stats.tokens / batch.tokens.size
        facts[name] = {"microbatches": len(batch.tokens), "filled": filled}
        facts[name]["temp_bytes"] = measure.temp_bytes(program)
    times = measure.time_in_turn(calls, sizes.repeats)
    modes = {
        name: measure.speed(stats.target_tokens, times[name], "trained_tokens") | facts[name]
        for name in calls
    }
    result = {
        "trained_tokens": stats.target_tokens,
        "packing_efficiency": stats.efficiency,
        "packed_rows": stats.rows,
        "modes": modes,
    }
    return [{"mode": name, **mode} for name, mode in modes.items()], result | measure.device()
