"""Compiles a config's programs with the real TPU compiler, without a TPU: do they fit, and what
does a step cost at least?

Memory, HBM traffic, collectives and the number of operations are the compiler's; the decode steps
are those of the real scheduler for a distribution of response lengths (`benchmark schedule`).

    bound = max(FLOPs / peak, HBM bytes / bandwidth, overlapped ICI, DCN)
            + synchronous ICI + small operations x 1.2 µs

of each program, with published peaks (`runtime/chips.py`). `expected` adds all of these: nothing
overlaps. Host time is in neither; nor are the fetching of responses, moves between slots, and keys
and values that attention over rows reads again for each of its blocks: below 2% of a step. Needs
`pip install libtpu` on an x86-64 Linux machine. Exit status: 0 all fits, 1 not, 2 bad input.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from dapo_jax import cli
from dapo_jax.benchmark.schedule import (
    SIGMA,
    Machine,
    Schedule,
    Segments,
    Workload,
    lengths_and_kept,
    simulate,
)
from dapo_jax.config import Config, ConfigError, ModelConfig, load_config
from dapo_jax.model import flops
from dapo_jax.model.experts import tile_rows
from dapo_jax.model.logprobs import split_axis
from dapo_jax.model.ragged_attention import entries_read, entries_written, is_ragged, page_size
from dapo_jax.model.weights import load_model_config
from dapo_jax.rollout.sampler import Arrivals, Until
from dapo_jax.runtime.chips import CHIPS, OPERATION_SECONDS, Chip, loss_chunk, prefill_tokens
from dapo_jax.runtime.compiled import (
    BETWEEN_SLICES,
    Compiled,
    Counting,
    compile_program,
    device_bytes,
)
from dapo_jax.runtime.files import check_result, local_model, write_result
from dapo_jax.runtime.mesh import make_mesh, row_shards
from dapo_jax.training import programs as training
from dapo_jax.training import setup
from dapo_jax.types import InputError

_GIB = 2**30
_COMFORT = 0.9  # share of HBM that --suggest fills
# Of the slots that a cache has entries for on average, the shares that --suggest tries, until so
# few of a draw's sequences are suspended in a step.
_SHARES, _FEW = (1.0, 0.95, 0.9, 0.85, 0.8), 0.02
_SAVE_BANDWIDTH = 1e9  # bytes/s that a host is assumed to write to a bucket
_SERIAL = ("synchronous ICI", "small operations")  # limits that add to the time

Info = Callable[[str], None]  # prints a line


class Pod(NamedTuple):
    """The chips to compile for."""

    topology: str
    devices: list[Any]
    chips: int
    chip: Chip  # per device: half a chip where a chip is two devices


class Work(NamedTuple):
    """Work of one call, over all devices."""

    flops: float  # the model's
    computed: float  # with recomputation and padding
    tokens: float


class Program(NamedTuple):
    """A jitted function and the shapes, with shardings, that a run calls it with."""

    name: str
    function: Any
    arguments: tuple[Any, ...]
    resident_bytes: int  # in use on each device during a call, without the arguments
    work: Work
    calls: float = 0.0  # in a rollout step; of rollout programs the scheduler decides
    trips: tuple[int, ...] = ()  # of loops with a data-dependent end, outermost first
    settings: str = ""  # what to change where it does not fit
    static: Mapping[str, int] = {}
    entry_bytes: float = 0.0  # of a live cache entry on a device, where no others are read
    written_bytes: float = 0.0  # of the cache, where the HLO does not show it

    @property
    def key(self) -> Any:
        """Identifies the program among configs that differ in sizes only."""
        return self.name, *jax.tree.leaves(self.arguments)

    def lower(self) -> Any:
        return self.function.lower(*self.arguments, **self.static)


class Result(NamedTuple):
    """A compiled program."""

    program: Program
    compiled: Compiled
    pod: Pod

    @property
    def peak_bytes(self) -> int:
        return self.compiled.peak_bytes + self.program.resident_bytes

    @property
    def hbm_fraction(self) -> float:
        return self.peak_bytes / self.pod.chip.hbm_bytes

    @property
    def fits(self) -> bool:
        return self.compiled.fits and self.hbm_fraction <= 1

    @property
    def times(self) -> dict[str, float]:
        """Least seconds of a call by each limit."""
        chip, t = self.pod.chip, self.compiled.traffic
        sent = {True: 0.0, False: 0.0}  # seconds, by whether other work runs meanwhile
        for link, size in self.compiled.sent.items():
            if link.kind != BETWEEN_SLICES:
                sent[link.overlapped] += size / (chip.ici_bandwidth * link.axes / chip.torus)
        small = t.small * OPERATION_SECONDS - t.small_bytes / chip.hbm_bandwidth
        return {
            "FLOPs": self.program.work.computed / len(self.pod.devices) / chip.flops,
            "HBM": (t.bytes + self.program.written_bytes) / chip.hbm_bandwidth,
            "ICI": sent[True],
            "DCN": self.compiled.collectives.get(BETWEEN_SLICES, 0.0) / chip.dcn_bandwidth,
            "synchronous ICI": sent[False],
            "small operations": small,
        }

    @property
    def seconds(self) -> float:
        return float(bound(self.times))


def bound(times: Mapping[str, Any]) -> Any:
    """Least seconds: of the limits that may overlap the largest, and all of the others."""
    overlapping = [times[limit] for limit in times if limit not in _SERIAL]
    return np.maximum.reduce(overlapping) + sum(times[limit] for limit in _SERIAL)


def load_pod(topology: str) -> Pod:
    """The devices of a topology such as v5p:4x4x8, or v5p:4x4x8*2 for two such slices.

    InputError without libtpu, or if libtpu does not support the topology.
    """
    form = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*([1-9]\d*))?", topology)
    if form is None or form[1] not in CHIPS:
        what = f"expected NAME:AxB or NAME:AxBxC with NAME one of {', '.join(CHIPS)}"
        raise InputError(f"topology {topology!r}: {what}, and *N after it for N slices")
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "plan compiles with Google's TPU compiler, which is not installed; pip install libtpu"
        )
    name, shape, slices = form[1], form[2], int(form[3] or 1)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name == "v4":  # both cores of a chip as one device, as in training
        options["chip_config_name"] = "megacore"
    try:
        found = topologies.get_topology_desc(f"{name}:{shape}", "tpu", **options)
        devices: list[Any] = list(found.devices)
    except (ValueError, RuntimeError, NotImplementedError) as e:
        why = (str(e).splitlines() or ["no reason given"])[0][:200]
        what = f"libtpu does not support it ({why}); give another"
        raise InputError(f"topology {topology!r}: {what}") from None
    chips = slices * len({tuple(d.coords) for d in devices})
    whole = CHIPS[name]
    share = {key: n * chips / len(devices) for key, n in whole._asdict().items()}
    chip = Chip(**{**share, "torus": whole.torus})
    return Pod(topology, devices, chips, chip)


def load_model(config: Config) -> ModelConfig:
    """The architecture, from model.architecture or the config.json of model.folder."""
    folder = config.model.folder and local_model(config.model.folder, ("config.json",)).folder
    model = load_model_config(folder) if folder else config.model.architecture
    assert model is not None  # load_config checks it
    return setup.with_computation(config, model)


def programs(config: Config, model: ModelConfig, mesh: Mesh, load: Workload) -> list[Program]:
    """The jitted programs of a run whose size matters, in the order of a step."""
    setup.check_divides(config, mesh, rows=True, slots=True)
    trained = setup.adapted(model, config.model.lora)
    sampled = config.rollout.temperature, config.rollout.weights == "int8"
    train = training.train_programs(trained, mesh, config.dapo, config.optim, *sampled)
    arguments = config, model, mesh, load, train
    return _rollout_programs(*arguments) + _training_programs(*arguments)


def _tile_flops(c: ModelConfig, mesh: Mesh, tokens: float) -> float:
    """FLOPs of a forward pass for rows of other experts, one tile an expert (`tile_rows`)."""
    if c.experts is None:
        return 0.0
    shards = row_shards(mesh)
    rows = c.experts.count * tile_rows(tokens * c.experts.per_token / shards)
    return 6.0 * shards * rows * c.layers * c.model_dim * c.ffn_dim


def _shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _training_programs(
    config: Config, model: ModelConfig, mesh: Mesh, load: Workload, train: training.TrainPrograms
) -> list[Program]:
    """Old log-probs and an update of one mini-batch, and publishing the rollout weights."""
    d, shape = config.dapo, setup.batch_shape(config, mesh)
    responses, segments = d.responses_per_update, load.prompt_len + load.lengths.values
    tokens = responses * float(segments.mean())
    rows = max(1.0, tokens / shape.row_len)
    used = min(shape.microbatches, math.ceil(rows / shape.rows_per_microbatch))
    padded = used * shape.rows_per_microbatch * shape.row_len

    c = setup.adapted(model, config.model.lora)
    pairs = responses * float(np.mean([flops.visible_pairs(model, n) for n in segments]))
    targets = responses * load.lengths.mean
    forward = flops.forward_flops(c, padded, pairs, targets)
    backward = flops.backward_flops(c, padded, pairs, targets)
    backward += flops.recomputed_flops(c, padded, pairs)
    tiles = used * _tile_flops(c, mesh, padded / used)
    forward, backward = forward + tiles, backward + tiles * (3 if c.remat == "full" else 2)

    chosen = c.experts.per_token * c.layers if c.experts and d.replay_routing else 0
    state, batch = train.state, training.abstract_batch(shape, mesh, chosen)
    params, rate = state.params, _shape(dtype=jnp.float32)
    moments = device_bytes(state) - device_bytes(params)
    held = moments + device_bytes(jax.eval_shape(train.publish, params))
    score = Work(flops.forward_flops(c, tokens, pairs, targets), forward, tokens)
    learn = Work(flops.train_flops(c, tokens, pairs, targets), forward + backward, tokens)
    updates = d.prompts_per_step * d.responses_per_prompt / responses
    scores = updates if d.old_logprobs == "recompute" else 0
    loops = used, math.ceil(targets / used / row_shards(mesh) / loss_chunk(mesh))
    fix = "train.rows_per_microbatch, mesh.tensor"
    inputs, fix_update = (params, batch), f"{fix}, model.remat"
    return [
        Program("old log-probs", train.old_logprobs, inputs, held, score, scores, loops, fix),
        Program("update", train.update, (state, batch, rate), 0, learn, updates, loops, fix_update),
        Program("publish", train.publish, (params,), moments, Work(0, 0, 0), 1, (), "mesh.tensor"),
    ]


def _rollout_programs(
    config: Config, model: ModelConfig, mesh: Mesh, load: Workload, train: training.TrainPrograms
) -> list[Program]:
    """Prefill, insertion into slots, and a decode step, at the longest prompts and a full cache."""
    d = config.dapo
    shards, policy = row_shards(mesh), setup.Policy(model, None, (0,))
    engine = setup.make_engine(config, policy, mesh)
    functions, number = engine.programs, _shape()
    weights = jax.eval_shape(train.publish, train.state.params)
    state, resident = jax.eval_shape(functions.start), device_bytes(train.state)
    fix = "rollout.cache_tokens, rollout.decode_slots, rollout.kv_cache, mesh.tensor"

    def prefill(name: str, longest: int) -> Program:
        width = next(n for n in engine.prompt_lens if n >= longest)
        tokens, pairs = shards * width, shards * flops.visible_pairs(model, width)
        needed = flops.forward_flops(model, tokens, pairs, 0)
        work = Work(needed, needed + _tile_flops(model, mesh, tokens), tokens)
        held = resident + device_bytes(state)
        arguments = weights, _shape(shards, width)
        return Program(name, functions.prefill, arguments, held, work, settings=fix)

    def insert(name: str, prefill: Program, copied: int) -> Program:
        prefilled = jax.eval_shape(functions.prefill, *prefill.arguments)
        arrivals = _shape(len(Arrivals._fields), shards, engine.slots)
        copies = _shape(2, shards, engine.copies)
        inserted = state, prefilled, jax.eval_shape(jax.random.key, 0), arrivals, copies, number
        held, work = resident + device_bytes(weights), Work(0, 0, prefill.work.tokens)
        return Program(name, functions.insert, inserted, held, work, 0, (copied,), fix)

    found = [prefill("prefill", config.data.max_prompt_len)]
    found.append(insert("insert", found[0], max(1, engine.slots // 16)))  # at a refill
    if d.partial_rollouts or engine.pages < engine.slots * engine.table_len:
        # prompts with what unfinished responses hold so far
        found.append(prefill("prefill of prefixes", engine.cache_len))
        found.append(insert("insert of prefixes", found[-1], engine.table_len))
    prefilled = device_bytes(found[-1].arguments[1])  # the last

    ragged = is_ragged(mesh, model.head_dim)
    split = mesh.shape["tensor"] if split_axis(mesh, "tensor", model.kv_heads) else 1
    int8 = config.rollout.kv_cache == "int8"
    entry = flops.cache_bytes(model, int8=int8) / split if ragged else 0.0

    def decode(name: str, width: int) -> Program:
        keys = flops.visible_keys(model, load.prompt_len + load.lengths.live_mean)
        tokens = width * shards
        step = flops.forward_flops(model, tokens, tokens * keys, tokens)
        table = _shape(shards, engine.slots, engine.table_len)
        arguments = weights, state, table, Until(number, number, number)
        held, sizes = resident + prefilled, {"width": width}
        work = Work(step, step + _tile_flops(model, mesh, tokens), tokens)
        trips = (1,)  # a segment of one step
        rest = trips, fix, sizes, entry, entry * width * entries_written(int8=int8)
        return Program(name, functions.decode, arguments, held, work, 0, *rest)

    most = decode("decode step", engine.slots)
    found.append(most)
    if engine.widths[0] < engine.slots:  # from two sizes follows the cost of any: a + b width
        found.append(decode("decode step, few slots", engine.widths[0]))
    if config.eval.every:
        other = setup.make_engine(config, policy, mesh, held_out=True).programs.decode
        evaluated = most._replace(name="eval decode step", function=other)
        if train.publish_exact:  # beside the weights of rollouts
            exact = jax.eval_shape(train.publish_exact, train.state.params)
            held = most.resident_bytes + device_bytes(weights)
            inputs = exact, *most.arguments[1:]
            evaluated = evaluated._replace(arguments=inputs, resident_bytes=held)
        found.append(evaluated)
    return found


def compile_all(
    config: Config,
    pod: Pod,
    load: Workload,
    only: Sequence[str] = (),
    info: Info = print,
    known: Mapping[Any, Compiled] | None = None,
) -> list[Result]:
    """Compiles the programs of a config (those named, or all); `known` ones, by key, are reused."""
    mesh = make_mesh(config.mesh, pod.devices)
    results = []
    for program in programs(config, load_model(config), mesh, load):
        if only and program.name not in only:
            continue
        if (compiled := (known or {}).get(program.key)) is None:
            info(f"compiling {program.name} ...")
            size = device_bytes(program.arguments)
            small = OPERATION_SECONDS * pod.chip.hbm_bandwidth
            coords = [getattr(device, "coords", ()) for device in mesh.devices.flat]
            count = Counting(program.trips, small, coords)
            compiled = compile_program(program.lower(), size, count)
        results.append(Result(program, compiled, pod))
    return results


_COLUMNS: dict[str, Callable[[Result], str]] = {
    "program": lambda r: r.program.name,
    "arguments": lambda r: f"{r.compiled.argument_bytes / _GIB:.2f}",
    "temporaries": lambda r: f"{r.compiled.temp_bytes / _GIB:.2f}",
    "resident": lambda r: f"{r.program.resident_bytes / _GIB:.2f}",
    "peak GiB": lambda r: f"{r.peak_bytes / _GIB:.2f}",
    "of HBM": lambda r: f"{r.hbm_fraction:.0%}",
    "fits": lambda r: "yes" if r.fits else "NO",
    "TFLOP": lambda r: f"{r.program.work.flops / 1e12:,.1f}",
    "HBM GB": lambda r: f"{r.compiled.traffic.bytes / 1e9:,.1f}",
    "sent GB": lambda r: f"{sum(r.compiled.sent.values()) / 1e9:,.2f}",
    "operations": lambda r: f"{r.compiled.traffic.operations:,.0f}",
    "least s": lambda r: f"{r.seconds:.3g}",
    "limit": lambda r: max(r.times, key=lambda key: r.times[key]),
}


def table(results: Sequence[Result]) -> str:
    """One line per program: memory of a device, work of a call, and its least time."""
    lines = [list(_COLUMNS), *([cell(r) for cell in _COLUMNS.values()] for r in results)]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in lines
    )


class Part(NamedTuple):
    """A part of a rollout step."""

    name: str
    bound: float  # least seconds
    times: Mapping[str, float]  # least seconds by each limit


def machine(model: ModelConfig, mesh: Mesh) -> Machine:
    """What the scheduler's simulation needs to know of the mesh."""

    share, size = flops.window_share(model), model.windows.size if model.windows else 0

    def reads(entries: np.ndarray) -> np.ndarray:
        return share * entries_read(entries, size) + (1 - share) * entries_read(entries)

    found = Machine(row_shards(mesh), prefill_tokens(mesh), page_size(mesh, model.head_dim))
    return found._replace(reads=reads) if is_ragged(mesh, model.head_dim) else found


def decode_part(results: Sequence[Result], schedule: Schedule) -> Part:
    """All decode steps of a mean rollout step. `cache` is the part of HBM for the entries read on
    the shard that reads most; without the kernel (head_dim no multiple of 128), which alone reads
    little more than live ones, `b width` has whole caches in it.
    """
    known = [r for r in results if r.program.name.startswith("decode step")]
    most = known[0].program.static

    def sizes(width: Any) -> np.ndarray:
        share = np.asarray(width / most["width"])
        return np.stack([np.ones_like(share), share], axis=-1)

    compiled = np.stack([sizes(**r.program.static) for r in known])
    seen = schedule.segments
    steps, at = seen.steps / len(schedule.steps), sizes(seen.width)
    times, cache = {}, 0.0
    for limit in known[0].times:
        line = np.linalg.lstsq(compiled, np.array([r.times[limit] for r in known]))[0]
        times[limit] = steps * np.maximum(at @ line, 0)
    if entry := known[0].program.entry_bytes:
        worst = seen.cache_read / len(schedule.steps) * entry / known[0].pod.chip.hbm_bandwidth
        times["HBM"], cache = times["HBM"] + worst, float(worst.sum())
    total = {limit: float(seconds.sum()) for limit, seconds in times.items()}
    return Part("decode", float(bound(times).sum()), total | {"cache": cache})


def steady(schedule: Schedule) -> Schedule:
    """Without the first rollout step, where there are more: with open groups it draws more."""
    if len(schedule.steps) == 1:
        return schedule
    seen = schedule.segments
    later = Segments(*(column[seen.rollout_step > 0] for column in seen))
    calls = {name: getattr(schedule, name) for name in ("prefills", "inserts")}
    later_calls = {name: rows[rows[:, 0] > 0] for name, rows in calls.items()}
    return schedule._replace(segments=later, steps=schedule.steps[1:], **later_calls)


def tokens_part(
    name: str, results: Sequence[Result], calls: np.ndarray, steps: int, read: float = 0.0
) -> Part:
    """All prefills or inserts of a mean rollout step: by tokens, from the program compiled for the
    longest.

    calls: as those of a Schedule. read: seconds that a call takes at least.
    """
    known = [r for r in results if r.program.name.startswith(name)]
    total = dict.fromkeys(known[0].times, 0.0)
    seconds = 0.0
    for _, rows, width in calls:
        tokens = rows * width
        r = next((r for r in known if tokens <= r.program.work.tokens), known[-1])
        share = tokens / r.program.work.tokens
        seconds += max(share * r.seconds, read)
        total = {limit: time + share * r.times[limit] for limit, time in total.items()}
    return Part(name, seconds / steps, {limit: time / steps for limit, time in total.items()})


def parts(results: Sequence[Result], schedule: Schedule) -> list[Part]:
    """The parts of a rollout step in their order."""
    by_name = {r.program.name: r for r in results}

    def several(name: str, calls: float) -> Part:
        r = by_name[name]
        times = {limit: calls * time for limit, time in r.times.items()}
        return Part(name, calls * r.seconds, times)

    weights, n = by_name["prefill"].program.arguments[0], len(schedule.steps)
    read = device_bytes(weights) / results[0].pod.chip.hbm_bandwidth  # however few tokens
    rollout = [
        tokens_part("prefill", results, schedule.prefills, n, read),
        tokens_part("insert", results, schedule.inserts, n),
        decode_part(results, schedule),
    ]
    training = ("old log-probs", "update", "publish")
    return rollout + [several(name, by_name[name].program.calls) for name in training]


def estimate(
    results: Sequence[Result], schedule: Schedule, config: Config, load: Workload
) -> dict[str, float]:
    """Least seconds of a step, expected ones, most tokens/s a chip, chip-hours of the run, ..."""
    pod, d, found = results[0].pod, config.dapo, parts(results, schedule)
    rollout, training = (sum(p.bound for p in some) for some in (found[:3], found[3:]))
    expected = sum(time for p in found for limit, time in p.times.items() if limit != "cache")
    useful = sum(r.program.calls * r.program.work.flops for r in results)
    trained = d.prompts_per_step * d.responses_per_prompt * load.lengths.mean
    sampled = sum(step.tokens for step in schedule.steps) / len(schedule.steps)
    hours = config.train.steps * (rollout + training) / 3600
    (state,) = (r.program.arguments[0] for r in results if r.program.name == "update")
    hosts = len({device.process_index for device in pod.devices})
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    seen, n = schedule.segments, len(schedule.steps)
    (decode,) = (r.program for r in results if r.program.name == "decode step")
    weights = decode.arguments[0]
    used = [part for name, part in weights.items() if name != "embed" or "head" not in weights]
    live = float(seen.cache_mean.sum()) / n
    needed = device_bytes(used) * schedule.decode_steps + decode.entry_bytes * live
    return {
        "rollout_s": rollout,
        "training_s": training,
        "bound_s": rollout + training,
        "expected_s": expected,
        "decode_steps": schedule.decode_steps,
        "live_share": schedule.live_share,
        "live_share_of_cache": schedule.cache_share,
        "suspended": sum(step.suspended for step in schedule.steps) / n,
        "cache_read_per_live_token": float(seen.cache_read.sum()) / n / max(1, live),
        "decode_bytes_per_needed": found[2].times["HBM"] * pod.chip.hbm_bandwidth / needed,
        "token_age_mean": float(np.mean([step.token_age_mean for step in schedule.steps])),
        "token_age_max": max(step.token_age_max for step in schedule.steps),
        "training_mfu": useful / (training * len(pod.devices) * pod.chip.flops),
        "rollout_tokens_per_s_per_chip": sampled / rollout / pod.chips,
        "train_tokens_per_s_per_chip": trained / training / pod.chips,
        "checkpoint_s": size / hosts / _SAVE_BANDWIDTH,
        "hours": hours,
        "chip_hours": hours * pod.chips,
    }


# What changes a cost.
_CURES = {
    "cache": "rollout.kv_cache: int8 reads less; a smaller rollout.max_response_len too",
    "decode HBM": "more rollout.decode_slots or a larger mesh.tensor read fewer weights",
    "FLOPs": "model.remat recomputes less where memory allows",
    "HBM": "more train.rows_per_microbatch, or another mesh.tensor",
    "ICI": "more train.rows_per_microbatch, or another mesh.tensor",
    "DCN": "more train.rows_per_microbatch",
    "synchronous ICI": "a smaller mesh.tensor",
    "small operations": "more rollout.decode_slots, so fewer decode steps",
}


def largest_cost(found: Sequence[Part]) -> tuple[str, float, str]:
    """Of all parts and limits: what costs most, its seconds, and what would change it."""
    costs = []
    for part in found:
        times = dict(part.times)
        cache = times.pop("cache", 0.0)
        serial = {limit: times.pop(limit) for limit in _SERIAL}
        largest = max(times, key=lambda limit: times[limit])
        named = {**serial, largest: times[largest]}
        if part.name == "decode" and largest == "HBM":
            named = {**serial, "decode HBM": times["HBM"] - cache, "cache": cache}
        costs += [(seconds, part.name, limit) for limit, seconds in named.items()]
    seconds, name, limit = max(costs)
    words = {"cache": "reading the caches", "decode HBM": "HBM traffic without the caches"}
    return f"{words.get(limit, limit)} of {name}", seconds, _CURES[limit]


def complaints(results: Sequence[Result]) -> list[str]:
    """For each program that does not fit: by how much, what is largest, and what to change."""
    lines = []
    for r in results:
        if r.fits:
            continue
        c, over = r.compiled, (r.peak_bytes - r.pod.chip.hbm_bytes) / _GIB
        parts = {"arguments": c.argument_bytes, "temporaries": c.temp_bytes}
        parts["resident buffers"] = r.program.resident_bytes
        worst, size = max(parts.items(), key=lambda item: item[1])
        largest = f"; largest buffers: {'; '.join(c.largest)}" if c.largest else ""
        lines.append(
            f"{r.program.name} does not fit by {over:.1f} GiB a device: {worst} take "
            f"{size / _GIB:.1f} GiB{largest}; change {r.program.settings}"
        )
    return lines


def to_json(results: Sequence[Result], estimates: Mapping[str, Any]) -> dict[str, Any]:
    """The output of `--json`."""

    def entry(r: Result) -> dict[str, Any]:
        return {
            "name": r.program.name,
            "argument_bytes": r.compiled.argument_bytes,
            "temp_bytes": r.compiled.temp_bytes,
            "resident_bytes": r.program.resident_bytes,
            "peak_bytes": r.peak_bytes,
            "hbm_fraction": r.hbm_fraction,
            "flops": r.program.work.flops,
            "computed_flops": r.program.work.computed,
            "tokens": r.program.work.tokens,
            "hbm_traffic_bytes": r.compiled.traffic.bytes,
            "operations": r.compiled.traffic.operations,
            "small_operations": r.compiled.traffic.small,
            "collective_bytes": sum(r.compiled.sent.values()),
            "collectives": r.compiled.collectives,
            "seconds": r.seconds,
            "limits": r.times,
            "calls_per_step": r.program.calls,
            "fits": r.fits,
        }

    pod = results[0].pod
    return {
        "topology": pod.topology,
        "chips": pod.chips,
        "devices": len(pod.devices),
        "hbm_bytes": pod.chip.hbm_bytes,
        "fits": all(r.fits for r in results),
        "estimate": dict(estimates),
        "programs": [entry(r) for r in results],
    }


def largest_that_fits(
    unit: int, start: int, most: int, peaks: Callable[[int], Sequence[float]], room: float
) -> int:
    """About the largest multiple of `unit` up to `most` with all peaks(n) ≤ room, 0 if none is
    found. At most 5 calls, `start` the first.

    peaks: bytes of each program at n, which grow about linearly: its line through the two largest n
    that fit gives the next n, and when to stop. The sizes of programs that the compiler refuses are
    less exact, and used only if that next n is one of them.
    """
    known, most = {start: peaks(start)}, most // unit * unit
    while len(known) < 5:
        fit = sorted(n for n in known if max(known[n]) <= room)
        over = sorted(known.keys() - set(fit))
        low, high = fit[-1] if fit else 0, over[0] if over else most + unit
        pairs = ([(fit[-2], low)] if len(fit) > 1 else []) + ([(low, high)] if fit and over else [])
        guesses = []
        for a, b in pairs:
            rises = zip(known[low], known[a], known[b], strict=True)
            steps = [(room - y) / (z - x) * (b - a) for y, x, z in rises if z > x]
            guesses += [low + min(steps)] if steps else []
        if high - low <= unit or (guesses and guesses[0] < max(low + unit, 1.02 * low)):
            break
        # With one n: in proportion, which is too small where it fits. Constant memory: double n.
        alone = 2 * low if len(fit) > 1 else (low or high) * room / max(known[low or high])
        guess = next((g for g in guesses if g < high or not over), alone)
        n = min(max(int(guess) // unit * unit, low + unit), (high - 1) // unit * unit)
        known[n] = peaks(n)
    return max((n for n in known if max(known[n]) <= room), default=0)


def suggest(
    config: Config, pod: Pod, load: Workload, results: Sequence[Result], info: Info = print
) -> list[str]:
    """The largest cache that fits, the decode slots that its live entries fill, and the most rows
    of a micro-batch. results: of the config as it is.
    """
    known = {r.program.key: r.compiled for r in results}
    mesh, d, rollout = make_mesh(config.mesh, pod.devices), config.dapo, config.rollout
    devices, room = machine(load_model(config), mesh), _COMFORT * pod.chip.hbm_bytes
    unit, longest = devices.shards, config.data.max_prompt_len + rollout.max_response_len
    drawn, each = d.prompts_per_draw * d.responses_per_prompt, load.live_entries + devices.page
    page = unit * devices.page

    def with_cache(tokens: int, share: float = 1.0) -> Config:
        slots = max(unit, int(share * min(drawn, tokens / each)) // unit * unit)
        sized = dataclasses.replace(rollout, decode_slots=slots, cache_tokens=tokens)
        return dataclasses.replace(config, rollout=sized)

    def with_rows(rows: int) -> Config:
        train = dataclasses.replace(config.train, rows_per_microbatch=rows)
        return dataclasses.replace(config, train=train)

    def search(
        what: str, sized: Callable[[int], Config], names: Sequence[str], sizes: tuple[int, int, int]
    ) -> int:
        def peaks(n: int) -> list[float]:
            if sized is with_cache and n < least:
                return [math.inf] * len(names)
            info(f"trying {what}: {n}")
            found = compile_all(sized(n), pod, load, names, info, known)
            known.update({r.program.key: r.compiled for r in found})
            peak = {r.program.name: r.peak_bytes for r in found}
            return [peak.get(name, 0) for name in names]  # without prefixes where no cache is short

        return largest_that_fits(*sizes, peaks, room)

    least = page * -(-longest // devices.page)  # the longest sequence on every shard
    tokens = least * (rollout.decode_slots // unit)
    now = min(tokens, rollout.cache_tokens or tokens) // page * page
    most = max(now, least // unit * drawn)
    names = ["prefill", "prefill of prefixes", "insert of prefixes", "decode step"]
    best = search("rollout.cache_tokens", with_cache, names, (page, now, most))
    text = f"rollout.cache_tokens: {now}; none fits"
    for share in _SHARES if best else ():
        schedule = steady(simulate(with_cache(best, share), devices, load))
        suspended = sum(step.suspended for step in schedule.steps) / len(schedule.steps)
        text = (
            f"rollout.cache_tokens: {now}; at most {best} fit in {_COMFORT:.0%} of HBM, with "
            f"decode_slots {schedule.slots}: {suspended:,.0f} suspensions a step"
        )
        if suspended <= _FEW * drawn:
            break
    rows, names = config.train.rows_per_microbatch, ["old log-probs", "update"]
    most = max(rows, d.responses_per_update)
    best = search("train.rows_per_microbatch", with_rows, names, (unit, rows, most))
    fits = f"{rows}; at most {best} fit in {_COMFORT:.0%} of HBM" if best else "none fits"
    return [text, f"train.rows_per_microbatch: {fits}"]


def _compile_for_other_machines() -> None:
    """Keeps libtpu from looking for a TPU here (metadata server, lock); arrays are on the CPU."""
    here = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    switches = ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD")
    quiet = ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL")
    os.environ.update({**here, **dict.fromkeys(switches, "1"), **dict.fromkeys(quiet, "3")})
    jax.config.update("jax_platforms", "cpu")
    # A program for another machine cannot be read back from a cache.
    jax.config.update("jax_enable_compilation_cache", False)


def _parser() -> argparse.ArgumentParser:
    example = "--config configs/qwen2.5-7b_dapo17k_v5p-64.yaml --topology "
    two_slices = '"v5p:2x4x4*2" --set mesh.data=2'
    parser = cli.parser("plan", main.__doc__, f"{example}v5p:4x4x4", example + two_slices)
    add = parser.add_argument
    text = "YAML config; neither its weights, its tokenizer nor its data are read"
    add("--config", required=True, help=text)
    add("--topology", help="chips, as v5p:4x4x8 (default: mesh.topology of the config)")
    add("--json", metavar="OUT", help="also write the results to this file")
    text = "search cache, decode slots and micro-batch rows for the largest that fit in 90%% of HBM"
    add("--suggest", action="store_true", help=text)
    text = "lognormal:MEAN:SIGMA, MEAN tokens after truncation and SIGMA of the logarithm"
    default = f"(default: a quarter of rollout.max_response_len, {SIGMA})"
    add("--lengths", help=f"of responses: {text} {default}")
    text = "instead: a run folder, for its samples and share of kept groups"
    add("--lengths-from", metavar="RUN_DIR", help=text)
    text = "tokens (default: an eighth of data.max_prompt_len)"
    add("--prompt-len", help=f"mean prompt, {text}", type=float)
    text = "share of sampled groups that are informative (default 0.5)"
    add("--kept-fraction", default=0.5, help=text, type=float)
    text = "only this program; may be repeated"
    add("--only", action="append", default=[], metavar="PROGRAM", help=text)
    text = "override, e.g. train.rows_per_microbatch=64"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    return parser


def _load(args: argparse.Namespace, config: Config) -> Workload:
    kept = args.kept_fraction
    if not 0 < kept <= 1:
        raise InputError("--kept-fraction: must be above 0 and at most 1")
    given = args.lengths, args.lengths_from, config.rollout.max_response_len
    lengths, kept = lengths_and_kept(*given, kept)
    steps = 3 if config.dapo.partial_rollouts else 1
    return Workload(lengths, args.prompt_len or config.data.max_prompt_len / 8, kept, steps)


def _summary(e: Mapping[str, float], found: Sequence[Part], config: Config, load: Workload) -> str:
    cost, seconds, cure = largest_cost(found)
    each = ", ".join(f"{part.name} {part.bound:,.1f} s" for part in found)
    steps = config.train.steps
    return "\n".join(
        [
            f"a step takes at least {e['bound_s']:,.0f} s: rollout {e['rollout_s']:,.0f} s "
            f"({e['rollout_tokens_per_s_per_chip']:,.0f} tokens/s/chip), training "
            f"{e['training_s']:,.0f} s ({e['train_tokens_per_s_per_chip']:,.0f} tokens/s/chip, MFU "
            f"at most {e['training_mfu']:.0%}); {each}",
            f"expected if nothing overlaps: {e['expected_s']:,.0f} s",
            f"decode steps: {e['decode_steps']:,.0f}, {e['live_share']:.0%} of the slots live, "
            f"{e['live_share_of_cache']:.0%} of the cache; {e['suspended']:,.0f} suspensions",
            f"decode steps move {e['decode_bytes_per_needed']:.2f}x the bytes of weights and live "
            f"caches; {e['cache_read_per_live_token']:.2f} entries are read for each live one",
            f"tokens trained on are {e['token_age_mean']:.2f} rollout steps old on average, "
            f"{e['token_age_max']:.0f} at most",
            f"largest cost: {cost}, {seconds:,.0f} s; {cure}",
            f"a checkpoint: {e['checkpoint_s']:,.0f} s at {_SAVE_BANDWIDTH / 1e9:g} GB/s a host",
            f"{steps} steps at least: {e['hours']:,.0f} hours, {e['chip_hours']:,.0f} chip-hours",
            f"assumed: prompts of {load.prompt_len:,.0f} tokens, responses of "
            f"{load.lengths.mean:,.0f} ({load.lengths.name}; a live one has "
            f"{load.lengths.live_mean:,.0f} on average), {load.kept:.0%} of the groups kept",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Compiles every program of a config for a TPU pod, without a TPU: memory, collectives, and a
    lower bound on time and cost.
    """
    args = _parser().parse_args(argv)
    check_result(args.json)
    config = load_config(args.config, args.set)
    topology = args.topology or config.mesh.topology
    if topology is None:
        what = "is null; set the chips to plan for, or give --topology, e.g. v5p:4x4x8"
        raise ConfigError(f"{args.config}: mesh.topology: {what}")
    load = _load(args, config)
    _compile_for_other_machines()
    pod = load_pod(topology)
    hbm = f"{pod.chip.hbm_bytes / 1e9:.0f} GB HBM a device"
    print(f"{args.config}: {pod.topology}, {pod.chips} chips, {hbm}")
    results = compile_all(config, pod, load, args.only)
    if not results:
        raise InputError(f"--only: no program is called {' or '.join(args.only)}")
    print(table(results))
    for r in results:
        collectives = sorted(r.compiled.collectives.items())
        sent = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in collectives)
        print(f"{r.program.name} sends a call and device: {sent or 'nothing'}")
    estimates: dict[str, Any] = {}
    if not args.only:  # else there is no whole step
        devices = machine(load_model(config), make_mesh(config.mesh, pod.devices))
        schedule = steady(simulate(config, devices, load))
        found = parts(results, schedule)
        least = estimate(results, schedule, config, load)
        print(_summary(least, found, config, load))
        facts = {"parts": [part._asdict() for part in found], "lengths": load.lengths.name}
        estimates = least | facts | {"largest_cost": largest_cost(found)}
    for line in complaints(results):
        print(line)
    if args.suggest:
        print("\n".join(suggest(config, pod, load, results)))
    if args.json:
        write_result(args.json, json.dumps(to_json(results, estimates), indent=2) + "\n")
    return 0 if all(r.fits for r in results) else 1


if __name__ == "__main__":
    cli.run(main)
