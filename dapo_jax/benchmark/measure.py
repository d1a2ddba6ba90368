"""Shared by all benchmarks: flags, timing, memory, a random model, table and JSON line."""

import argparse
import dataclasses
import functools
import json
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from dapo_jax.cli import out_of_memory
from dapo_jax.config import MeshSection, ModelConfig, check_model
from dapo_jax.model.decoder import abstract_params, init
from dapo_jax.runtime.mesh import make_mesh, params_sharding, row_shards
from dapo_jax.types import InputError, Params

Row = Mapping[str, Any]
Report = tuple[list[dict[str, Any]], dict[str, Any]]  # the table's rows, and the JSON object
Times = list[tuple[float, float]]  # seconds and processor seconds of each call


def flag(default: Any, text: str, **limits: Any) -> Any:
    """A field with its help. limits: low and high of a number, or the choices of a text."""
    return dataclasses.field(default=default, metadata={"text": text, **limits})


@dataclasses.dataclass(kw_only=True)
class Sizes:
    """Flags of every benchmark that runs on devices."""

    repeats: int = flag(3, "timed calls, after one warm-up call")
    dtype: str = flag("float32", "of the matmuls", choices=("float32", "bfloat16"))
    mesh: str = flag("1x-1x1", "data x fsdp x tensor over all devices; -1: all that are left")


@dataclasses.dataclass(kw_only=True)
class ModelSizes(Sizes):
    """Flags of the benchmarks that run a model."""

    prompt_len: int = flag(64, "tokens of a prompt")
    max_response_len: int = flag(128, "tokens of the longest response")
    layers: int = flag(4, "decoder layers")
    model_dim: int = flag(256, "D, width of the residual stream")
    heads: int = flag(8, "query heads")
    kv_heads: int = flag(4, "key/value heads; divides --heads")
    head_dim: int = flag(32, "width of a head; even")
    ffn: int = flag(1024, "hidden width of the feed-forward")
    vocab: int = flag(32768, "V, vocabulary entries")
    family: str = flag("qwen3", "of the model", choices=("llama", "qwen2", "qwen3"))
    remat: str = flag("none", "as in the config", choices=("none", "dots", "full"))


def _number(name: str, kind: type, low: float, high: float, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise InputError(
            f"{name}: expected {what} from {low} to {high}, got {text[:20]!r}; correct it"
        )
    return value


def _add_flags(parser: argparse.ArgumentParser, defaults: Any) -> None:
    for field in dataclasses.fields(defaults):
        name, default = "--" + field.name.replace("_", "-"), getattr(defaults, field.name)
        kind, limits = type(default), dict(field.metadata)
        text = f"{limits.pop('text')} (default {default})"
        if kind in (int, float):
            low = limits.get("low", 1 if kind is int else 1e-6)
            high = limits.get("high", 2**31 - 1 if kind is int else 1)
            limits = {"type": functools.partial(_number, name, kind, low, high), "metavar": "N"}
        parser.add_argument(name, default=default, help=text, **limits)


def run_benchmark(
    parser: argparse.ArgumentParser,
    benchmarks: Mapping[str, tuple[Callable[[Any], Report], Any]],
    argv: Sequence[str] | None,
) -> int:
    """Runs the benchmark that argv names. benchmarks: name → function of sizes, default sizes."""
    verbs = parser.add_subparsers(dest="benchmark", required=True, metavar="|".join(benchmarks))
    for name, (run, defaults) in benchmarks.items():
        usage = "%(prog)s [--flag value ...], or --help"
        verb = verbs.add_parser(name, help=run.__doc__, description=run.__doc__, usage=usage)
        _add_flags(verb, defaults)
    flags = vars(parser.parse_args(argv))
    name = flags.pop("benchmark")
    run, defaults = benchmarks[name]
    try:
        rows, result = run(dataclasses.replace(defaults, **flags))
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if not out_of_memory(e):
            raise
        raise InputError(f"{name}: out of memory; lower the sizes") from None
    _print_table({**flags, **result}, rows)
    print(json.dumps({"benchmark": name, **flags, **result}))
    return 0


def _print_table(facts: Row, rows: Sequence[Row]) -> None:
    """One line of the facts that are no column, then the rows; bytes as MB."""

    def cell(key: str, value: Any) -> str:
        if not isinstance(value, int | float):
            return "n/a" if value is None else str(value)
        value = value / 1e6 if key.endswith("_bytes") else value
        return f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:.3g}"

    alone = {k: v for k, v in facts.items() if k not in rows[0] and not isinstance(v, dict)}
    print("  ".join(f"{key}={cell(key, value)}" for key, value in alone.items()))
    lines = [[key.replace("_bytes", "_MB") for key in rows[0]]]
    lines += [[cell(*item) for item in row.items()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)))


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and processor seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - cpu


def time_in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Times of each call after one warm-up, interleaved, so that a slower minute slows down all."""
    times: dict[str, Times] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            taken = timed(call)
            if repeat:
                times[name].append(taken)
    return times


def speed(tokens: int, times: Times, unit: str = "tokens") -> dict[str, float]:
    seconds, cpu_seconds = zip(*times, strict=True)
    rates = {f"{unit}_per_s": tokens / min(seconds)}
    rates[f"median_{unit}_per_s"] = tokens / statistics.median(seconds)
    return rates | {"seconds": min(seconds), "cpu_seconds": min(cpu_seconds)}


def temp_bytes(program: Any) -> int:
    return program.memory_analysis().temp_size_in_bytes


def device() -> dict[str, str]:
    first = jax.devices()[0]
    return {"device": f"{first.platform} {first.device_kind}", "jax": jax.__version__}


def mesh_of(sizes: Sizes) -> Mesh:
    """The mesh of `--mesh`."""
    axes = sizes.mesh.split("x")
    numbers = all(re.fullmatch(r"-1|[1-9]\d*", axis) for axis in axes)
    if len(axes) != 3 or not numbers or axes.count("-1") > 1:
        raise InputError(
            "--mesh: expected DATAxFSDPxTENSOR, as in 1x8x1, one of them -1 for all that are left; "
            f"got {sizes.mesh[:20]!r}"
        )
    data, fsdp, tensor = map(int, axes)
    return make_mesh(MeshSection(data, fsdp, tensor))


def check_split(name: str, number: int, mesh: Mesh) -> None:
    """InputError unless the row shards of the mesh divide the number."""
    if number % (shards := row_shards(mesh)):
        raise InputError(
            f"{name}: {number} is no multiple of the {shards} devices it is split over; give one"
        )


def random_model(sizes: ModelSizes, split: str) -> tuple[ModelConfig, Mesh, Params]:
    """A tied model with random float32 weights over all devices, which must divide `split`."""
    s = sizes
    shape = (s.vocab, s.model_dim, s.layers, s.heads, s.kv_heads, s.head_dim, s.ffn)
    computation: dict[str, Any] = {"compute_dtype": s.dtype, "remat": s.remat}
    longest = s.prompt_len + s.max_response_len
    model = ModelConfig(
        s.family,  # type: ignore[arg-type]
        *shape,
        max_position=longest,
        **computation,
    )

    def fail(key: str, message: str) -> None:
        raise InputError(f"--{key.replace('_', '-')}: {message}")

    check_model(model, fail)
    mesh = mesh_of(sizes)
    check_split(f"--{split}", getattr(sizes, split), mesh)
    shardings = params_sharding(abstract_params(model), mesh)
    make = jax.jit(functools.partial(init, model), out_shardings=shardings)
    return model, mesh, make(jax.random.key(0))
