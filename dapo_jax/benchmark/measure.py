"""Shared by all benchmarks: flags, timing, memory, a random model, table and JSON line."""

import argparse
import dataclasses
import functools
import json
import re
import statistics
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import jax
from jax.sharding import Mesh

from dapo_jax.cli import out_of_memory
from dapo_jax.config import MeshSection, ModelConfig, check_model
from dapo_jax.config.checks import build
from dapo_jax.config.schema import STRICT, Dtype, Remat, field
from dapo_jax.model.decoder import abstract_params, init
from dapo_jax.runtime.mesh import make_mesh, params_sharding, row_shards
from dapo_jax.types import InputError, Params

Row = Mapping[str, Any]
Report = tuple[list[dict[str, Any]], dict[str, Any]]  # the table's rows, and the JSON object
Lengths = Literal["equal", "lognormal"]
Times = list[tuple[float, float]]  # seconds and processor seconds of each call


@dataclasses.dataclass(kw_only=True)
class Sizes:
    __pydantic_config__ = STRICT
    repeats: int = field(3, "timed calls, after one warm-up call", ge=1)
    dtype: Dtype = field("float32", "of the matmuls")
    mesh: str = field("1x-1x1", "DATAxFSDPxTENSOR over all devices; -1: all that are left")


@dataclasses.dataclass(kw_only=True)
class ModelSizes(Sizes):
    prompt_len: int = field(64, "tokens of a prompt", ge=1)
    max_response_len: int = field(128, "tokens of the longest response", ge=1)
    layers: int = field(4, "decoder layers", ge=1)
    model_dim: int = field(256, "D, width of the residual stream", ge=1)
    heads: int = field(8, "query heads", ge=1)
    kv_heads: int = field(4, "key/value heads; divides --heads", ge=1)
    head_dim: int = field(32, "width of a head; even", ge=1)
    ffn: int = field(1024, "hidden width of the feed-forward", ge=1)
    vocab: int = field(32768, "V, vocabulary entries", ge=1)
    family: Literal["llama", "qwen2", "qwen3"] = field("qwen3", "of the model")
    remat: Remat = field("none", "as in the config")


def fail(key: str, message: str) -> NoReturn:
    raise InputError(f"--{key.replace('_', '-')}: {message}")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


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
        for size in dataclasses.fields(defaults):
            flag, several = "--" + size.name.replace("_", "-"), size.type == tuple[str, ...]
            kind = "KEY=VALUE" if several else "|".join(typing.get_args(size.type))
            text = f"{size.metadata['description']} (default {getattr(defaults, size.name)})"
            options: Any = {"type": _value, "default": argparse.SUPPRESS, "metavar": kind or "N"}
            if several:
                options |= {"action": "append", "type": str}
            verb.add_argument(flag, help=text, **options)
    given = vars(parser.parse_args(argv))
    name = given.pop("benchmark")
    run, defaults = benchmarks[name]
    sizes = build(type(defaults), vars(defaults) | given, fail)
    try:
        rows, result = run(sizes)
    except (MemoryError, jax.errors.JaxRuntimeError) as e:
        if not out_of_memory(e):
            raise
        raise InputError(f"{name}: out of memory; lower the sizes") from None
    _print_table({**vars(sizes), **result}, rows)
    print(json.dumps({"benchmark": name, **vars(sizes), **result}))
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
    wall, cpu = time.perf_counter(), time.process_time()
    jax.block_until_ready(call())
    return time.perf_counter() - wall, time.process_time() - cpu


def time_in_turn(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Times]:
    """Times of each call after one warm-up, interleaved, so that a slower minute slows down all."""
    times: dict[str, Times] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            taken = timed(call)
            if not repeat:
                print(f"{name}: first call {taken[0]:.3g} s", flush=True)
            else:
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


def mesh_of(sizes: Sizes, split: str) -> Mesh:
    """The mesh of `--mesh`. Its row shards must divide the size of the name `split`."""
    axes = sizes.mesh.split("x")
    numbers = all(re.fullmatch(r"-1|[1-9]\d*", axis) for axis in axes)
    if len(axes) != 3 or not numbers or axes.count("-1") > 1:
        form = "expected DATAxFSDPxTENSOR, as in 1x8x1, one of them -1 for all that are left"
        fail("mesh", f"{form}; got {sizes.mesh[:20]!r}")
    data, fsdp, tensor = map(int, axes)
    mesh = make_mesh(MeshSection(data, fsdp, tensor))
    number, shards = getattr(sizes, split), row_shards(mesh)
    if number % shards:
        fail(split, f"{number} is no multiple of the {shards} devices it is split over; give one")
    return mesh


def random_model(sizes: ModelSizes, split: str) -> tuple[ModelConfig, Mesh, Params]:
    """A tied model with random float32 weights over all devices. split: as for `mesh_of`."""
    s = sizes
    shape = (s.vocab, s.model_dim, s.layers, s.heads, s.kv_heads, s.head_dim, s.ffn)
    longest = s.prompt_len + s.max_response_len
    model = ModelConfig(
        s.family, *shape, max_position=longest, compute_dtype=s.dtype, remat=s.remat
    )
    check_model(model, fail)
    mesh = mesh_of(sizes, split)
    shardings = params_sharding(abstract_params(model), mesh)
    make = jax.jit(functools.partial(init, model), out_shardings=shardings)
    return model, mesh, make(jax.random.key(0))
