"""Timing, memory, a random model and the report: what every benchmark needs."""

import argparse
import functools
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dapo_jax.config import MeshSection, ModelConfig, check_model
from dapo_jax.model.decoder import abstract_params, init
from dapo_jax.runtime.mesh import make_mesh, params_sharding, row_shards
from dapo_jax.runtime.metrics import process_memory
from dapo_jax.types import InputError, Params

Sizes = argparse.Namespace  # the flags


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and processor seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - cpu


def speed(
    tokens: int, times: Sequence[tuple[float, float]], unit: str = "tokens"
) -> dict[str, float]:
    seconds, cpu_seconds = zip(*times, strict=True)
    rates = {
        f"{unit}_per_s": tokens / min(seconds),
        f"median_{unit}_per_s": tokens / statistics.median(seconds),
    }
    return rates | {"seconds": min(seconds), "cpu_seconds": min(cpu_seconds)}


def device() -> dict[str, str]:
    return {
        "device": f"{jax.devices()[0].platform} {jax.devices()[0].device_kind}",
        "jax": jax.__version__,
    }


def memory(*, peak: bool) -> int | None:
    """Bytes in use now, or at most since the last call that was not for the peak.

    None where neither device nor system tells.
    """
    if stats := jax.devices()[
        0
    ].memory_stats():  # an accelerator's peak is that of the whole process
        return stats["peak_bytes_in_use" if peak else "bytes_in_use"]
    try:
        if not peak:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    except OSError:
        return None
    return process_memory("VmHWM" if peak else "VmRSS")


def mesh_of(sizes: Sizes) -> Mesh:
    """The mesh of `--mesh`, data x fsdp x tensor over all devices."""
    axes = sizes.mesh.split("x")
    if (
        len(axes) != 3
        or not all(re.fullmatch(r"-1|[1-9]\d*", axis) for axis in axes)
        or axes.count("-1") > 1
    ):
        raise InputError(
            f"--mesh: expected DATAxFSDPxTENSOR, as in 1x8x1, one of them -1 for what is left; got {sizes.mesh[:20]!r}"
        )
    data, fsdp, tensor = map(int, axes)
    return make_mesh(MeshSection(data, fsdp, tensor))


def random_model(sizes: Sizes, split_flag: str, split: int) -> tuple[ModelConfig, Mesh, Params]:
    """A tied model with random float32 weights over all devices, which must divide `split`."""
    model = ModelConfig(
        family=sizes.family,
        vocab_size=sizes.vocab,
        model_dim=sizes.model_dim,
        layers=sizes.layers,
        heads=sizes.heads,
        kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        ffn_dim=sizes.ffn,
        max_position=sizes.prompt_len + sizes.max_response_len,
        compute_dtype=sizes.dtype,
        remat=sizes.remat,
    )

    def fail(key: str, message: str) -> None:
        raise InputError(f"--{key.replace('_', '-')}: {message}")

    check_model(model, fail)
    mesh = mesh_of(sizes)
    if split % row_shards(mesh):
        raise InputError(
            f"{split_flag}: {split} is no multiple of the {row_shards(mesh)} devices it is split over; give one"
        )
    shardings = params_sharding(abstract_params(model), mesh)
    return (
        model,
        mesh,
        jax.jit(functools.partial(init, model), out_shardings=shardings)(jax.random.key(0)),
    )


def temp_bytes(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def report(
    sizes: Sizes,
    table: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
    device: Mapping[str, str],
) -> dict[str, Any]:
    """Prints sizes, the table (bytes as MB) and what single results are not in it; returns the JSON
    object.
    """

    def cell(key: str, value: Any) -> str:
        if isinstance(value, int | float):
            value = value / 1e6 if key.endswith("_bytes") else value
            return (
                f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:.3g}"
            )
        return "n/a" if value is None else str(value)

    flags = {name: value for name, value in vars(sizes).items() if name not in ("run", "what")}
    alone = {
        key: value
        for key, value in result.items()
        if key not in table[0] and not isinstance(value, dict)
    }
    print(
        "  ".join(
            f"{key}={cell(key, value)}" for key, value in {**flags, **alone, **device}.items()
        )
    )
    lines = [
        [key.replace("_bytes", "_MB") for key in table[0]],
        *([cell(*item) for item in row.items()] for row in table),
    ]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    print(
        "\n".join(
            "  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True))
            for line in lines
        )
    )
    return {"benchmark": sizes.what, **flags, **result, **device}
