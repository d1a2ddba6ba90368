"""Compiles a config's programs with the real TPU compiler, without a TPU: do they fit, and what
does a step cost at least?

    python -m dapo_jax.plan --config C [--topology v5p:4x4x8] [--json OUT] [--suggest] [--set K=V]
    python -m dapo_jax.plan --config C --topology "v5p:4x4x8*2" --set mesh.data=2     two slices

Memory and collectives are the compiler's. Times are a roofline, max(FLOPs / peak, HBM bytes /
bandwidth, bytes sent in a slice / ICI bandwidth, bytes sent between slices / DCN bandwidth), from
published peaks (`runtime/chips.py`): a lower bound, not a forecast. Needs `pip install libtpu` on
an x86-64 Linux machine. Exit status: 0 all fits, 1 not, 2 bad input.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from dapo_jax.config import Config, ConfigError, ModelConfig, load_config
from dapo_jax.model import flops
from dapo_jax.model.weights import load_model_config
from dapo_jax.rollout.sampler import Arrivals, Until
from dapo_jax.runtime.chips import CHIPS, Chip, loss_chunk
from dapo_jax.runtime.compiled import BETWEEN_SLICES, Compiled, compile_program, device_bytes
from dapo_jax.runtime.files import local_model, write_result
from dapo_jax.runtime.mesh import make_mesh, row_shards
from dapo_jax.training import programs as training
from dapo_jax.training import setup
from dapo_jax.types import InputError

_GIB = 2**30
_COMFORT = 0.9  # share of HBM that --suggest fills

Info = Callable[[str], None]  # prints a line


class Pod(NamedTuple):
    """The chips to compile for."""

    topology: str
    devices: list[Any]
    chips: int
    chip: Chip  # per device: half a chip where a chip is two devices


class Lengths(NamedTuple):
    """Mean lengths, in tokens, that the cost of a run depends on and no config holds."""

    prompt: float
    response: float
    kept: float  # share of sampled groups that are informative


class Work(NamedTuple):
    """Work of one call: over all devices, but for hbm_bytes."""

    flops: float  # the model's
    computed: float  # with recomputation and padding
    tokens: float
    hbm_bytes: float  # on each device


class Program(NamedTuple):
    """A jitted function and the shapes, with shardings, that a run calls it with."""

    name: str
    function: Any
    arguments: tuple[Any, ...]
    resident_bytes: int  # in use on each device during a call, without the arguments
    work: Work
    calls: float  # in a rollout step
    trips: tuple[int, ...] = ()  # of loops with a data-dependent end, outermost first
    settings: str = ""  # what to change where it does not fit
    static: Mapping[str, int] = {}

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
    def between_slices(self) -> float:
        """Bytes that each device sends to other slices in a call."""
        return self.compiled.collectives.get(BETWEEN_SLICES, 0.0)

    @property
    def sent_bytes(self) -> float:
        """Bytes that each device sends inside its slice in a call."""
        return sum(self.compiled.collectives.values()) - self.between_slices

    @property
    def times(self) -> dict[str, float]:
        """Least seconds of a call by each limit."""
        chip, work = self.pod.chip, self.program.work
        return {
            "FLOPs": work.computed / len(self.pod.devices) / chip.flops,
            "HBM": work.hbm_bytes / chip.hbm_bandwidth,
            "ICI": self.sent_bytes / chip.ici_bandwidth,
            "DCN": self.between_slices / chip.dcn_bandwidth,
        }

    @property
    def seconds(self) -> float:
        return max(self.times.values())


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
    return Pod(topology, devices, chips, Chip(*(n * chips / len(devices) for n in CHIPS[name])))


def load_model(config: Config) -> ModelConfig:
    """The architecture, from model.architecture or the config.json of model.folder."""
    folder = config.model.folder and local_model(config.model.folder, ("config.json",)).folder
    model = load_model_config(folder) if folder else config.model.architecture
    assert model is not None  # load_config checks it
    return setup.with_computation(config, model)


def programs(config: Config, model: ModelConfig, mesh: Mesh, lengths: Lengths) -> list[Program]:
    """The jitted programs of a run whose size matters, in the order of a step."""
    setup.check_divides(config, mesh, rows=True, slots=True)
    trained, temperature = setup.adapted(model, config.model.lora), config.rollout.temperature
    train = training.train_programs(trained, mesh, config.dapo, config.optim, temperature)
    arguments = config, model, mesh, lengths, train
    return _rollout_programs(*arguments) + _training_programs(*arguments)


def _shape(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def _training_programs(
    config: Config, model: ModelConfig, mesh: Mesh, lengths: Lengths, train: training.TrainPrograms
) -> list[Program]:
    """Old log-probs and an update of one mini-batch, and publishing the rollout weights."""
    d, shape = config.dapo, setup.batch_shape(config, mesh)
    responses, segment = d.responses_per_update, lengths.prompt + lengths.response
    rows = max(1.0, responses * segment / shape.row_len)
    used = min(shape.microbatches, math.ceil(rows / shape.rows_per_microbatch))
    tokens, padded = responses * segment, used * shape.rows_per_microbatch * shape.row_len

    c = setup.adapted(model, config.model.lora)
    pairs, targets = responses * flops.visible_pairs(model, segment), responses * lengths.response
    forward = flops.forward_flops(c, padded, pairs, targets)
    backward = flops.backward_flops(c, padded, pairs, targets)
    backward += flops.recomputed_flops(c, padded, pairs)
    weights = 2 * flops.weights(model) / mesh.shape["tensor"]  # bytes in bfloat16
    read = used * weights  # once a pass and micro-batch

    state, batch = train.state, training.abstract_batch(shape, mesh)
    params, rate = state.params, _shape(dtype=jnp.float32)
    moments = device_bytes(state) - device_bytes(params)
    held = moments + device_bytes(jax.eval_shape(train.publish, params))
    score = Work(flops.forward_flops(c, tokens, pairs, targets), forward, tokens, read)
    useful, traffic = flops.train_flops(c, tokens, pairs, targets), 3 * read + 3 * moments
    learn = Work(useful, forward + backward, tokens, traffic)
    publish = Work(0, 0, 0, device_bytes(params) + weights)
    updates = d.prompts_per_step * d.responses_per_prompt / responses
    scores = updates if d.old_logprobs == "recompute" else 0
    loops = used, math.ceil(targets / used / row_shards(mesh) / loss_chunk(mesh))
    fix = "train.rows_per_microbatch, mesh.tensor"
    inputs, fix_update = (params, batch), f"{fix}, model.remat"
    return [
        Program("old log-probs", train.old_logprobs, inputs, held, score, scores, loops, fix),
        Program("update", train.update, (state, batch, rate), 0, learn, updates, loops, fix_update),
        Program("publish", train.publish, (params,), moments, publish, 1, (), "mesh.tensor"),
    ]


def _rollout_programs(
    config: Config, model: ModelConfig, mesh: Mesh, lengths: Lengths, train: training.TrainPrograms
) -> list[Program]:
    """Prefill, insertion into slots, and a decode step, at the longest prompts and a full cache."""
    d, slots = config.dapo, config.rollout.decode_slots
    tensor, shards = mesh.shape["tensor"], row_shards(mesh)
    policy = setup.Policy(model, None, (0,))
    engine = setup.make_engine(config, policy, mesh)
    functions, number = engine.programs, _shape()
    weights = jax.eval_shape(train.publish, train.state.params)
    state, resident = jax.eval_shape(functions.start), device_bytes(train.state)
    fix = "rollout.decode_slots, rollout.kv_cache, mesh.tensor"
    read = 2 * flops.layer_weights(model) / tensor

    def prefill(name: str, longest: int, calls: float) -> Program:
        width, mean = next(n for n in engine.prompt_lens if n >= longest), lengths.prompt
        useful, computed = (
            flops.forward_flops(model, shards * n, shards * flops.visible_pairs(model, n), 0)
            for n in (mean, width)
        )
        work, held = Work(useful, computed, shards * mean, read), resident + device_bytes(state)
        arguments = weights, _shape(shards, width)
        return Program(name, functions.prefill, arguments, held, work, calls, (), fix)

    responses = d.prompts_per_step / lengths.kept * d.responses_per_prompt
    prompts = responses / d.responses_per_prompt / shards
    found = [prefill("prefill", config.data.max_prompt_len, prompts)]
    prefilled = jax.eval_shape(functions.prefill, *found[0].arguments)
    arrivals = _shape(len(Arrivals._fields), shards, engine.slots)
    inserted = state, prefilled, jax.eval_shape(jax.random.key, 0), arrivals, number
    held, calls = resident + device_bytes(weights), responses / slots
    work = Work(0, 0, 0, 0)
    found.append(Program("insert", functions.insert, inserted, held, work, calls, (), fix))
    if d.partial_rollouts:  # prompts with what unfinished responses hold so far
        found.append(prefill("prefill of prefixes", engine.cache_len, 0))
        prefilled = jax.eval_shape(functions.prefill, *found[-1].arguments)

    mean = lengths.prompt + lengths.response / 2  # tokens in the cache of a live sequence
    step = flops.forward_flops(model, slots, slots * flops.visible_keys(model, mean), slots)
    split = tensor if model.kv_heads % tensor == 0 else 1
    cached = flops.cache_bytes(model, int8=config.rollout.kv_cache == "int8") / split
    traffic = read + 2 * flops.head_weights(model) / tensor + slots / shards * mean * cached
    decode = Program(
        "decode step",
        functions.decode,
        (weights, state, Until(number, number, number)),
        resident + device_bytes(prefilled),
        Work(step, step, slots, traffic),
        max(responses * lengths.response / slots, config.rollout.max_response_len),
        (1,),  # the program decodes a segment of steps; its loop counts as one of them
        fix,
        {"width": engine.slots, "read": engine.cache_len},
    )
    found.append(decode)
    if config.eval.every:
        other = setup.make_engine(config, policy, mesh, held_out=True).programs.decode
        found.append(decode._replace(name="eval decode step", function=other, calls=0.0))
    return found


def compile_all(
    config: Config,
    pod: Pod,
    lengths: Lengths,
    only: Sequence[str] = (),
    info: Info = print,
    known: Mapping[Any, Compiled] | None = None,
) -> list[Result]:
    """Compiles the programs of a config (those named, or all); `known` ones, by key, are reused."""
    mesh = make_mesh(config.mesh, pod.devices)
    results = []
    for program in programs(config, load_model(config), mesh, lengths):
        if only and program.name not in only:
            continue
        if (compiled := (known or {}).get(program.key)) is None:
            info(f"compiling {program.name} ...")
            size = device_bytes(program.arguments)
            compiled = compile_program(program.lower(), size, program.trips)
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
    "sent GB": lambda r: f"{r.sent_bytes / 1e9:,.2f}",
    "least s": lambda r: f"{r.seconds:.3g}",
    "limit": lambda r: max(r.times, key=lambda key: r.times[key]),
    "x step": lambda r: f"{r.program.calls:,.0f}",
}


def table(results: Sequence[Result]) -> str:
    """One line per program: memory of a device, work of a call, and its least time."""
    lines = [list(_COLUMNS), *([cell(r) for cell in _COLUMNS.values()] for r in results)]
    first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        "  ".join([name.ljust(first), *map(str.rjust, cells, others)]) for name, *cells in lines
    )


def estimate(results: Sequence[Result], config: Config, lengths: Lengths) -> dict[str, float]:
    """Least seconds of a step, most tokens/s a chip, and least chip-hours of the run."""
    chips, d = results[0].pod.chips, config.dapo
    seconds = {r.program.name: r.program.calls * r.seconds for r in results}
    rollout = sum(seconds.get(name, 0.0) for name in ("prefill", "insert", "decode step"))
    training = sum(seconds.get(name, 0.0) for name in ("old log-probs", "update", "publish"))
    trained = d.prompts_per_step * d.responses_per_prompt * lengths.response
    sampled = trained / lengths.kept
    hours = config.train.steps * (rollout + training) / 3600
    return {
        "rollout_s": rollout,
        "training_s": training,
        "rollout_tokens_per_s_per_chip": sampled / rollout / chips if rollout else 0.0,
        "train_tokens_per_s_per_chip": trained / training / chips if training else 0.0,
        "hours": hours,
        "chip_hours": hours * chips,
    }


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


def to_json(results: Sequence[Result], estimates: Mapping[str, float]) -> dict[str, Any]:
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
            "collective_bytes": r.sent_bytes,
            "between_slices_bytes": r.between_slices,
            "collectives": dict(r.compiled.collectives),
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
        if high - low <= unit or (guesses and guesses[0] < low + unit):
            break
        # With one n: in proportion, which is too small where it fits. Constant memory: double n.
        alone = 2 * low if len(fit) > 1 else (low or high) * room / max(known[low or high])
        guess = next((g for g in guesses if g < high or not over), alone)
        n = min(max(int(guess) // unit * unit, low + unit), (high - 1) // unit * unit)
        known[n] = peaks(n)
    return max((n for n in known if max(known[n]) <= room), default=0)


def suggest(
    config: Config, pod: Pod, lengths: Lengths, results: Sequence[Result], info: Info = print
) -> list[str]:
    """The most decode slots and rows of a micro-batch that fit. results: of the config as it is."""
    known = {r.program.key: r.compiled for r in results}

    def peaks(section: str, key: str, names: Sequence[str], n: int) -> list[int]:
        info(f"trying {section}.{key}: {n}")
        values: Any = {section: dataclasses.replace(getattr(config, section), **{key: n})}
        changed = dataclasses.replace(config, **values)
        found = compile_all(changed, pod, lengths, names, info, known)
        known.update({r.program.key: r.compiled for r in found})
        return [r.peak_bytes for r in found]

    d, lines, room = config.dapo, [], _COMFORT * pod.chip.hbm_bytes
    unit, drawn = row_shards(make_mesh(config.mesh, pod.devices)), d.prompts_per_draw
    rollout, train = ("prefill", "prefill of prefixes", "decode step"), ("old log-probs", "update")
    for section, key, names, most in (
        ("rollout", "decode_slots", rollout, drawn * d.responses_per_prompt),
        ("train", "rows_per_microbatch", train, d.responses_per_update),
    ):
        now = getattr(getattr(config, section), key)
        call = functools.partial(peaks, section, key, names)
        best = largest_that_fits(unit, now, max(now, most), call, room)
        fits = f"{now}; at most {best} fit in {_COMFORT:.0%} of HBM" if best else "none fits"
        lines.append(f"{section}.{key}: {fits}")
    return lines


def _compile_for_other_machines() -> None:
    """Keeps libtpu from looking for a TPU here (metadata server, lock); arrays are on the CPU."""
    here = {"TPU_ACCELERATOR_TYPE": "v5p-8", "TPU_WORKER_HOSTNAMES": "localhost"}
    switches = ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD")
    quiet = ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL")
    os.environ.update({**here, **dict.fromkeys(switches, "1"), **dict.fromkeys(quiet, "3")})
    jax.config.update("jax_platforms", "cpu")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.plan", description=main.__doc__)
    add = parser.add_argument
    text = "YAML config; neither its weights, its tokenizer nor its data are read"
    add("--config", required=True, help=text)
    add("--topology", help="chips, as v5p:4x4x8 (default: mesh.topology of the config)")
    add("--json", metavar="OUT", help="also write the results to this file")
    text = "search decode slots and micro-batch rows for the largest that fit in 90%% of HBM"
    add("--suggest", action="store_true", help=text)
    text = "tokens (default: a quarter of rollout.max_response_len)"
    add("--response-len", help=f"mean response, {text}", type=float)
    text = "tokens (default: an eighth of data.max_prompt_len)"
    add("--prompt-len", help=f"mean prompt, {text}", type=float)
    text = "share of sampled groups that are informative (default 0.5)"
    add("--kept-fraction", default=0.5, help=text, type=float)
    text = "only this program; may be repeated"
    add("--only", action="append", default=[], metavar="PROGRAM", help=text)
    text = "override, e.g. train.rows_per_microbatch=64"
    add("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    return parser


def _summary(estimates: Mapping[str, float], config: Config, lengths: Lengths) -> str:
    e = estimates
    return (
        f"a step takes at least: rollout {e['rollout_s']:,.0f} s "
        f"({e['rollout_tokens_per_s_per_chip']:,.0f} tokens/s/chip), training "
        f"{e['training_s']:,.0f} s ({e['train_tokens_per_s_per_chip']:,.0f} tokens/s/chip); "
        f"{config.train.steps} steps: {e['hours']:,.0f} hours, {e['chip_hours']:,.0f} chip-hours. "
        f"Assumed: prompts of {lengths.prompt:,.0f} tokens, responses of {lengths.response:,.0f}, "
        f"{lengths.kept:.0%} of the groups kept"
    )


def main(argv: list[str] | None = None) -> int:
    """Compiles every program of a config for a TPU pod, without a TPU: memory, collectives, and a
    lower bound on time and cost.
    """
    args = _parser().parse_args(argv)
    config = load_config(args.config, args.set)
    topology = args.topology or config.mesh.topology
    if topology is None:
        what = "is null; set the chips to plan for, or give --topology, e.g. v5p:4x4x8"
        raise ConfigError(f"{args.config}: mesh.topology: {what}")
    if not 0 < args.kept_fraction <= 1:
        raise InputError("--kept-fraction: must be above 0 and at most 1")
    prompt_len = args.prompt_len or config.data.max_prompt_len / 8
    response_len = args.response_len or config.rollout.max_response_len / 4
    lengths = Lengths(prompt_len, response_len, args.kept_fraction)
    _compile_for_other_machines()
    pod = load_pod(topology)
    hbm = f"{pod.chip.hbm_bytes / 1e9:.0f} GB HBM a device"
    print(f"{args.config}: {pod.topology}, {pod.chips} chips, {hbm}")
    results = compile_all(config, pod, lengths, args.only)
    if not results:
        raise InputError(f"--only: no program is called {' or '.join(args.only)}")
    print(table(results))
    for r in results:
        collectives = sorted(r.compiled.collectives.items())
        sent = ", ".join(f"{kind} {size / 1e9:.2f} GB" for kind, size in collectives)
        print(f"{r.program.name} sends a call and device: {sent or 'nothing'}")
    estimates = estimate(results, config, lengths)
    if not args.only:  # else there is no whole step
        print(_summary(estimates, config, lengths))
    for line in complaints(results):
        print(line)
    if args.suggest:
        print("\n".join(suggest(config, pod, lengths, results)))
    if args.json:
        write_result(args.json, json.dumps(to_json(results, estimates), indent=2) + "\n")
    return 0 if all(r.fits for r in results) else 1


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
