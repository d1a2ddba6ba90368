"""Know before paying: compiles a config's programs with the real TPU compiler and no TPU.

Do they fit, and what can a step cost at best?

    python -m dapo_jax.plan --config C [--topology v5p:4x4x8] [--json OUT] [--suggest] [--set section.key=value ...]
    python -m dapo_jax.plan --config C --topology "v5p:4x4x8*2" --set mesh.data=2     two slices
    python -m dapo_jax.plan --config C --only update --only "plain update"            what the fused loss saves

Memory and collectives are the compiler's. Times are a roofline, max(FLOPs / peak, HBM bytes /
bandwidth, bytes sent in a slice / ICI bandwidth, bytes sent between slices / DCN bandwidth), from
published peaks (`runtime/chips.py`): a bound that no run beats, not a forecast. The compiler proves
fit and legality, never speed. Needs `pip install libtpu` on an x86-64 Linux machine. Exit status: 0
all fits, 1 not, 2 bad input.
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
from jax.sharding import Mesh, NamedSharding

from dapo_jax.config import Config, ConfigError, DapoSection, ModelConfig, load_config
from dapo_jax.dapo.loss import batch_hidden, dapo_terms
from dapo_jax.evaluate import eval_sampling
from dapo_jax.model import flops
from dapo_jax.model.decoder import abstract_params, logits_of
from dapo_jax.model.weights import load_model_config
from dapo_jax.rollout.sampler import Arrivals
from dapo_jax.runtime.chips import CHIPS, Chip, loss_chunk
from dapo_jax.runtime.compiled import BETWEEN_SLICES, Compiled, compile_program, device_bytes
from dapo_jax.runtime.files import local_model, write_result
from dapo_jax.runtime.mesh import make_mesh, rollout_dtype, rollout_sharding, row_shards
from dapo_jax.training.programs import (
    TrainPrograms,
    abstract_batch,
    state_programs,
    train_programs,
)
from dapo_jax.training.setup import (
    Policy,
    adapted,
    batch_shape,
    check_divides,
    make_engine,
    train_sampling,
    with_computation,
)
from dapo_jax.types import Array, InputError, Params, TrainBatch

_GIB = 2**30
_COMFORT = 0.9  # share of HBM that --suggest fills
PLAIN = "plain update"  # compiled only if asked for


class Pod(NamedTuple):
    """The chips that are compiled for."""

    topology: str
    devices: list[Any]
    chips: int
    chip: Chip  # per device: half a chip where a chip is two devices


class Lengths(NamedTuple):
    """What a run's cost depends on and no config says. Means, in tokens."""

    prompt: float
    response: float
    kept: float  # share of the drawn groups that are informative


class Work(NamedTuple):
    """Of one call, over all devices, but for the last."""

    flops: float  # the model's
    computed: float  # with what is computed again, and padding
    tokens: float
    hbm_bytes: float  # on each device


class Program(NamedTuple):
    """A jitted program, ready to compile."""

    name: str
    lower: Callable[[], Any]
    arguments: Any  # shapes with shardings
    resident_bytes: int  # that lie on each device meanwhile, and are no argument
    work: Work
    calls: float  # in a rollout step
    trips: tuple[int, ...] = ()  # of loops that end by data, outermost first
    settings: str = ""  # what to change where it does not fit

    @property
    def key(self) -> Any:
        """The same for the same program, among configs that differ in sizes only."""
        return self.name, *jax.tree.leaves(self.arguments)


class Result(NamedTuple):
    """A program, compiled."""

    program: Program
    compiled: Compiled
    pod: Pod

    @property
    def peak_bytes(self) -> int:
        return self.compiled.peak_bytes + self.program.resident_bytes

    @property
    def fits(self) -> bool:
        return self.compiled.fits and self.peak_bytes <= self.pod.chip.hbm_bytes

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
        """Seconds of a call that each limit allows at best."""
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


# --------------------------------------------------------------------------------------------------------------------
# Chips and model
# --------------------------------------------------------------------------------------------------------------------


def load_pod(topology: str) -> Pod:
    """The devices of a topology such as v5p:4x4x8, or v5p:4x4x8*2 for two such slices.

    InputError without libtpu, or if it knows no such topology.
    """
    form = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)(?:\*([1-9]\d*))?", topology)
    if form is None or form[1] not in CHIPS:
        raise InputError(
            f"topology {topology!r}: expected NAME:AxB or NAME:AxBxC with NAME one of {', '.join(CHIPS)}, e.g. v5p:4x4x8, "
            "and *N after it for N slices"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "plan compiles with Google's TPU compiler, which is not installed; `pip install libtpu` (or dapo_jax[plan])"
        )
    name, shape, slices = form[1], form[2], int(form[3] or 1)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if name == "v4":
        options["chip_config_name"] = (
            "megacore"  # both cores of a v4 chip as one device, as training sees it
        )
    try:
        devices: list[Any] = list(
            topologies.get_topology_desc(
                platform="tpu", topology_name=f"{name}:{shape}", **options
            ).devices
        )
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError, NotImplementedError) as e:
        raise InputError(
            f"topology {topology!r}: libtpu knows none ({(str(e).splitlines() or ['no reason'])[0][:200]})"
        ) from None
    chips = slices * len({tuple(d.coords) for d in devices})
    share, chip = chips / len(devices), CHIPS[name]
    return Pod(topology, devices, chips, Chip(*(value * share for value in chip)))


def load_model(config: Config) -> ModelConfig:
    """The architecture, from model.architecture or the config.json of model.folder: neither weights
    nor a tokenizer are needed.
    """
    folder = config.model.folder and local_model(config.model.folder, ("config.json",)).folder
    model = load_model_config(folder) if folder else config.model.architecture
    assert model is not None  # the config's own check
    return with_computation(config, model)


# --------------------------------------------------------------------------------------------------------------------
# The programs of a config
# --------------------------------------------------------------------------------------------------------------------


def programs(config: Config, model: ModelConfig, mesh: Mesh, lengths: Lengths) -> list[Program]:
    """Every jitted program of a run of a size that matters, in the order of a step; last one that
    no run has, for comparison.
    """
    check_divides(config, mesh, rows=True, slots=True)
    trained = adapted(model, config.model.lora)
    train = train_programs(trained, mesh, config.dapo, config.optim, config.rollout.temperature)
    training = _training(config, model, mesh, lengths, train)
    update = next(p for p in training if p.name == "update")
    loss = functools.partial(plain_loss, model=trained, algo=config.dapo, mesh=mesh)
    plain_update = state_programs(loss, trained, mesh, config.optim).update
    plain = functools.partial(plain_update.lower, *update.arguments)  # type: ignore[attr-defined]
    return [
        *_rollout(config, model, mesh, lengths, train),
        *training,
        update._replace(name=PLAIN, lower=plain, calls=0),
    ]


def plain_loss(
    params: Params, batch: TrainBatch, *, model: ModelConfig, algo: DapoSection, mesh: Mesh
) -> tuple[Array, dict[str, Array]]:
    """`dapo.loss.loss_fn` as it is mostly written: all logits [N * T, V] at a time.

    What it would cost is worth knowing.
    """
    flat = TrainBatch(*(a.reshape(-1) for a in batch))
    scores = jax.nn.log_softmax(logits_of(params, batch_hidden(params, batch, model, mesh)))
    logprobs = jnp.take_along_axis(scores, flat.tokens[:, None], axis=-1)[:, 0]
    entropy = -jnp.sum(jnp.exp(scores) * scores, axis=-1)
    loss, metrics = dapo_terms(
        jnp.where(flat.target_mask, logprobs, 0.0), jax.lax.stop_gradient(entropy), flat, algo
    )
    return jnp.where(flat.target_mask, loss, 0.0).sum(), {
        k: jnp.where(flat.target_mask, v, 0.0).sum() for k, v in metrics.items()
    }


def _training(
    config: Config, model: ModelConfig, mesh: Mesh, lengths: Lengths, train: TrainPrograms
) -> list[Program]:
    d, tensor = config.dapo, mesh.shape["tensor"]
    shape = batch_shape(config, mesh)
    batch, state, trained = (
        abstract_batch(shape, mesh),
        train.state,
        adapted(model, config.model.lora),
    )
    responses, segment = d.responses_per_update, lengths.prompt + lengths.response
    rows = max(1.0, responses * segment / shape.row_len)
    used = min(shape.microbatches, math.ceil(rows / shape.rows_per_microbatch))
    computed = used * shape.rows_per_microbatch * shape.row_len  # positions, padding among them
    tokens, pairs, targets = (
        responses * segment,
        responses * flops.visible_pairs(model, segment),
        responses * lengths.response,
    )
    forward = flops.forward_flops(trained, computed, pairs, targets)
    backward = flops.backward_flops(trained, computed, pairs, targets) + flops.recomputed_flops(
        trained, computed, pairs
    )
    read = used * 2 * flops.weights(model) / tensor  # bfloat16 weights, once a pass and micro-batch
    chunks = math.ceil(targets / used / row_shards(mesh) / loss_chunk(mesh))
    moments = device_bytes(state) - device_bytes(state.params)
    published = device_bytes(_published(model, mesh))
    updates = d.prompts_per_step * d.responses_per_prompt / responses
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    return [
        Program(
            "old log-probs",
            functools.partial(train.old_logprobs.lower, state.params, batch),  # type: ignore[attr-defined]
            (state.params, batch),
            moments + published,
            Work(flops.forward_flops(trained, tokens, pairs, targets), forward, tokens, read),
            updates if d.old_logprobs == "recompute" else 0,
            (used, chunks),
            "train.rows_per_microbatch, mesh.tensor",
        ),
        Program(
            "update",
            functools.partial(train.update.lower, state, batch, rate),  # type: ignore[attr-defined]
            (state, batch, rate),
            0,
            Work(
                flops.train_flops(trained, tokens, pairs, targets),
                forward + backward,
                tokens,
                3 * read + 3 * moments,
            ),
            updates,
            (used, chunks),
            "train.rows_per_microbatch, mesh.tensor, model.remat",
        ),
        Program(
            "publish",
            functools.partial(train.publish.lower, state.params),  # type: ignore[attr-defined]
            (state.params,),
            moments,
            Work(0, 0, 0, device_bytes(state.params) + 2 * flops.weights(model) / tensor),
            1,
            (),
            "mesh.tensor",
        ),
    ]


def _published(model: ModelConfig, mesh: Mesh) -> Any:
    """Shapes of the rollout weights."""
    shapes = abstract_params(model)

    def published(path: Any, leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(
            leaf.shape, jnp.dtype(rollout_dtype(path, model.compute_dtype)), sharding=sharding
        )

    return jax.tree_util.tree_map_with_path(published, shapes, rollout_sharding(shapes, mesh))


def _rollout(
    config: Config, model: ModelConfig, mesh: Mesh, lengths: Lengths, train: TrainPrograms
) -> list[Program]:
    """Reading prompts, putting them into slots, and a decode step, at the longest prompts and the
    fullest cache.
    """
    d, tensor, shards, slots = (
        config.dapo,
        mesh.shape["tensor"],
        row_shards(mesh),
        config.rollout.decode_slots,
    )
    weights, resident = _published(model, mesh), device_bytes(train.state)
    responses = d.prompts_per_step / lengths.kept * d.responses_per_prompt
    int8 = config.rollout.kv_cache == "int8"
    cached = flops.cache_bytes(model, int8=int8) / (tensor if model.kv_heads % tensor == 0 else 1)
    number = jax.ShapeDtypeStruct((), jnp.int32)

    engine = make_engine(config, Policy(model, None, (0,)), mesh, train_sampling(config))
    state = jax.eval_shape(engine.programs.start)
    prompts, prefixes = (
        jax.ShapeDtypeStruct((shards, next(n for n in engine.prompt_lens if n >= most)), jnp.int32)
        for most in (config.data.max_prompt_len, engine.cache_len)
    )
    prefilled = jax.eval_shape(engine.programs.prefill, weights, prompts)
    seed, arrivals = (
        jax.eval_shape(jax.random.key, 0),
        jax.ShapeDtypeStruct((len(Arrivals._fields), shards, engine.slots), jnp.int32),
    )
    layers, settings = (
        2 * flops.layer_weights(model) / tensor,
        "rollout.decode_slots, rollout.kv_cache, mesh.tensor",
    )

    def prefill(name: str, tokens: jax.ShapeDtypeStruct, calls: float) -> Program:
        (rows, width), mean = tokens.shape, lengths.prompt
        useful = flops.forward_flops(model, rows * mean, rows * flops.visible_pairs(model, mean), 0)
        computed = flops.forward_flops(
            model, rows * width, rows * flops.visible_pairs(model, width), 0
        )
        lower = functools.partial(engine.programs.prefill.lower, weights, tokens)  # type: ignore[attr-defined]
        work = Work(useful, computed, rows * mean, layers)
        return Program(
            name,
            lower,
            (weights, tokens),
            resident + device_bytes(state),
            work,
            calls,
            settings=settings,
        )

    found = [
        prefill("prefill", prompts, responses / d.responses_per_prompt / shards),
        Program(
            "insert",
            functools.partial(
                engine.programs.insert.lower,  # type: ignore[attr-defined]
                state,
                prefilled,
                seed,
                arrivals,
                number,
            ),
            (state, prefilled, seed, arrivals, number),
            resident + device_bytes(weights),
            Work(0, 0, 0, 0),
            responses / slots,
            settings=settings,
        ),
    ]
    if d.partial_rollouts:  # reads what unfinished responses have said so far
        found.append(prefill("prefill of prefixes", prefixes, 0))
        prefilled = jax.eval_shape(engine.programs.prefill, weights, prefixes)
    mean = lengths.prompt + lengths.response / 2  # tokens in the cache of a sequence under way
    step = flops.forward_flops(model, slots, slots * flops.visible_keys(model, mean), slots)
    read = layers + 2 * flops.head_weights(model) / tensor + slots / shards * mean * cached
    evaluated = [
        (
            "eval decode step",
            make_engine(config, Policy(model, None, (0,)), mesh, eval_sampling(config.eval)),
            0.0,
        )
    ]
    steps = max(responses * lengths.response / slots, config.rollout.max_response_len)
    for name, sampler, calls in [
        ("decode step", engine, steps),
        *(evaluated if config.eval.every else []),
    ]:
        # The program decodes a segment of steps; its loop is counted as one of them.
        lower = functools.partial(
            sampler.programs.decode.lower,  # type: ignore[attr-defined]
            width=engine.slots,
            read=engine.cache_len,
        )
        arguments = (weights, state, number, number, number)
        held = resident + device_bytes(prefilled)
        work = Work(step, step, slots, read)
        found.append(
            Program(
                name,
                functools.partial(lower, *arguments),
                arguments,
                held,
                work,
                calls,
                (1,),
                settings,
            )
        )
    return found


# --------------------------------------------------------------------------------------------------------------------
# What it comes to
# --------------------------------------------------------------------------------------------------------------------


def compile_all(
    config: Config,
    pod: Pod,
    lengths: Lengths,
    only: Sequence[str] = (),
    info: Callable[[str], None] = print,
    known: Mapping[Any, Compiled] | None = None,
) -> list[Result]:
    """Compiles the programs of a config (those named, or all), one after the other, but for those
    that are known by their keys.
    """
    mesh = make_mesh(config.mesh, pod.devices)
    results = []
    for program in programs(config, load_model(config), mesh, lengths):
        if program.name in only or (not only and program.name != PLAIN):
            if (compiled := (known or {}).get(program.key)) is None:
                info(f"compiling {program.name} ...")
                compiled = compile_program(
                    program.lower(), device_bytes(program.arguments), program.trips
                )
            results.append(Result(program, compiled, pod))
    return results


def table(results: Sequence[Result]) -> str:
    """Programs as lines: memory of a device, work of a call, and its time at best."""
    memory = ["arguments", "temporaries", "elsewhere", "peak GiB", "of HBM", "fits"]
    head = ["program", *memory, "TFLOP", "sent GB", "best s", "limit", "x step"]
    lines = [head]
    for r in results:
        sizes = (
            r.compiled.argument_bytes,
            r.compiled.temp_bytes,
            r.program.resident_bytes,
            r.peak_bytes,
        )
        times = r.times
        lines.append(
            [
                r.program.name,
                *(f"{size / _GIB:.2f}" for size in sizes),
                f"{r.peak_bytes / r.pod.chip.hbm_bytes:.0%}",
                "yes" if r.fits else "NO",
                f"{r.program.work.flops / 1e12:,.1f}",
                f"{r.sent_bytes / 1e9:,.2f}",
                f"{r.seconds:.3g}",
                max(times, key=lambda key: times[key]),
                f"{r.program.calls:,.0f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def estimate(results: Sequence[Result], config: Config, lengths: Lengths) -> dict[str, float]:
    """Seconds of a step, tokens/s a chip, and chip-hours of the run, at best."""
    pod = results[0].pod
    seconds = {r.program.name: r.program.calls * r.seconds for r in results}
    rollout = sum(seconds.get(name, 0.0) for name in ("prefill", "insert", "decode step"))
    training = sum(seconds.get(name, 0.0) for name in ("old log-probs", "update", "publish"))
    trained = config.dapo.prompts_per_step * config.dapo.responses_per_prompt * lengths.response
    hours = config.train.steps * (rollout + training) / 3600
    return {
        "rollout_s": rollout,
        "training_s": training,
        "rollout_tokens_per_s_per_chip": trained / lengths.kept / rollout / pod.chips
        if rollout
        else 0.0,
        "train_tokens_per_s_per_chip": trained / training / pod.chips if training else 0.0,
        "hours": hours,
        "chip_hours": hours * pod.chips,
    }


def complaints(results: Sequence[Result]) -> list[str]:
    """What does not fit: by how much, what is largest, and what to change."""
    lines = []
    for r in results:
        if not r.fits:
            over = (r.peak_bytes - r.pod.chip.hbm_bytes) / _GIB
            what = {
                "arguments": r.compiled.argument_bytes,
                "temporaries": r.compiled.temp_bytes,
                "what lies there meanwhile": r.program.resident_bytes,
            }
            worst = max(what, key=lambda key: what[key])
            largest = (
                f"; largest buffers: {'; '.join(r.compiled.largest)}" if r.compiled.largest else ""
            )
            lines.append(
                f"{r.program.name} does not fit by {over:.1f} GiB a device: {worst} take {what[worst] / _GIB:.1f} GiB{largest}; "
                f"change {r.program.settings}"
            )
    return lines


def to_json(results: Sequence[Result], estimates: Mapping[str, float]) -> dict[str, Any]:
    """What `--json` writes."""
    pod = results[0].pod
    return {
        "topology": pod.topology,
        "chips": pod.chips,
        "devices": len(pod.devices),
        "hbm_bytes": pod.chip.hbm_bytes,
        "fits": all(r.fits for r in results),
        "estimate": dict(estimates),
        "programs": [
            {
                "name": r.program.name,
                "argument_bytes": r.compiled.argument_bytes,
                "temp_bytes": r.compiled.temp_bytes,
                "resident_bytes": r.program.resident_bytes,
                "peak_bytes": r.peak_bytes,
                "hbm_fraction": r.peak_bytes / pod.chip.hbm_bytes,
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
            for r in results
        ],
    }


def largest_that_fits(
    unit: int, start: int, most: int, peaks: Callable[[int], Sequence[float]], room: float
) -> int:
    """About the largest multiple of `unit` up to `most` with all peaks(n) ≤ room, 0 if none is
    found. At most 5 calls, `start` the first.

    peaks: bytes of each program at n, which grow about evenly: its line through the two largest n
    that fit tells the next n, and when to stop. What the compiler says of a program that it refuses
    is less exact, and only used where the lines lead there.
    """
    known, most = {start: peaks(start)}, most // unit * unit
    while len(known) < 5:
        fit, over = (
            sorted(n for n in known if (max(known[n]) <= room) == fits) for fits in (True, False)
        )
        low, high = fit[-1] if fit else 0, over[0] if over else most + unit
        pairs = ([(fit[-2], low)] if len(fit) > 1 else []) + ([(low, high)] if fit and over else [])
        lines = [
            [(y, z - x) for x, y, z in zip(known[a], known[low], known[b], strict=True) if z > x]
            for a, b in pairs
        ]
        guesses = [
            low + min((room - y) / rise * (b - a) for y, rise in line)
            for line, (a, b) in zip(lines, pairs, strict=True)
            if line
        ]
        if high - low <= unit or (guesses and guesses[0] < low + unit):
            break
        # With one n: as if all of it were in proportion, which is too little where it fits. On
        # level ground: further away.
        alone = 2 * low if len(fit) > 1 else (low or high) * room / max(known[low or high])
        guess = next((g for g in guesses if g < high or not over), alone)
        n = min(max(int(guess) // unit * unit, low + unit), (high - 1) // unit * unit)
        known[n] = peaks(n)
    return max((n for n in known if max(known[n]) <= room), default=0)


def suggest(
    config: Config,
    pod: Pod,
    lengths: Lengths,
    results: Sequence[Result],
    info: Callable[[str], None],
) -> list[str]:
    """Decode slots and rows of a micro-batch, the largest that fit in 90% of HBM. results: of the
    config as it is.
    """
    shards, lines, d = row_shards(make_mesh(config.mesh, pod.devices)), [], config.dapo
    searches = (
        (
            "decode_slots",
            "rollout",
            ("prefill", "prefill of prefixes", "decode step"),
            d.prompts_per_draw * d.responses_per_prompt,
        ),
        ("rows_per_microbatch", "train", ("old log-probs", "update"), d.responses_per_update),
    )
    known = {r.program.key: r.compiled for r in results}
    for key, section, names, most in searches:

        def peaks(n: int, key=key, section=section, names=names) -> list[int]:
            changed = dataclasses.replace(
                config, **{section: dataclasses.replace(getattr(config, section), **{key: n})}
            )
            found = compile_all(
                changed, pod, lengths, names, lambda line: info(f"{key} {n}: {line}"), known
            )
            known.update({r.program.key: r.compiled for r in found})
            return [r.peak_bytes for r in found]

        now = getattr(getattr(config, section), key)
        best = largest_that_fits(shards, now, max(now, most), peaks, _COMFORT * pod.chip.hbm_bytes)
        lines.append(
            f"{section}.{key}: {now}; at most {best} fit in {_COMFORT:.0%} of HBM"
            if best
            else f"{section}.{key}: none fits"
        )
    return lines


# --------------------------------------------------------------------------------------------------------------------
# The verb
# --------------------------------------------------------------------------------------------------------------------


def _at_host() -> None:
    """libtpu compiles here for chips elsewhere: no metadata server, no lock on a TPU, and arrays of
    this process on the CPU.
    """
    quiet = {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3"}
    here = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    os.environ.update({**here, **quiet, "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})
    jax.config.update("jax_platforms", "cpu")


def main(argv: list[str] | None = None) -> int:
    """Compiles every program of a config for a TPU pod, with no TPU: memory, collectives, and a
    bound on time and cost.
    """
    parser = argparse.ArgumentParser(prog="python -m dapo_jax.plan", description=main.__doc__)
    parser.add_argument(
        "--config",
        required=True,
        help="YAML config; neither its weights, its tokenizer nor its data are read",
    )
    parser.add_argument(
        "--topology", help="chips, as v5p:4x4x8 (default: mesh.topology of the config)"
    )
    parser.add_argument("--json", metavar="OUT", help="also write the results to this file")
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="search decode slots and micro-batch rows for the largest that fit in 90%% of HBM",
    )
    parser.add_argument(
        "--response-len",
        type=float,
        help="mean response, tokens (default: a quarter of rollout.max_response_len)",
    )
    parser.add_argument(
        "--prompt-len",
        type=float,
        help="mean prompt, tokens (default: an eighth of data.max_prompt_len)",
    )
    parser.add_argument(
        "--kept-fraction",
        type=float,
        default=0.5,
        help="share of drawn groups that are informative (default 0.5)",
    )
    only = f"only this program; may be repeated. Not among all: `{PLAIN}`, with whole logits"
    parser.add_argument("--only", action="append", default=[], metavar="PROGRAM", help=only)
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override, e.g. train.rows_per_microbatch=64",
    )
    args = parser.parse_args(argv)
    config = load_config(args.config, args.set)
    topology = args.topology or config.mesh.topology
    if topology is None:
        raise ConfigError(
            f"{args.config}: mesh.topology: says no chips to plan for; set it, or give --topology, e.g. v5p:4x4x8"
        )
    if not 0 < args.kept_fraction <= 1:
        raise InputError("--kept-fraction: must be above 0 and at most 1")
    lengths = Lengths(
        args.prompt_len or config.data.max_prompt_len / 8,
        args.response_len or config.rollout.max_response_len / 4,
        args.kept_fraction,
    )
    _at_host()
    pod = load_pod(topology)
    print(
        f"{args.config}: {pod.topology}, {pod.chips} chips, {pod.chip.hbm_bytes / 1e9:.0f} GB HBM a device"
    )
    results = compile_all(config, pod, lengths, args.only)
    if not results:
        raise InputError(f"--only: no program is called {' or '.join(args.only)}")
    print(table(results))
    estimates = estimate(results, config, lengths)
    for r in results:
        sent = ", ".join(
            f"{kind} {size / 1e9:.2f} GB" for kind, size in sorted(r.compiled.collectives.items())
        )
        print(f"{r.program.name} sends a call and device: {sent or 'nothing'}")
    if not args.only:  # else there is no whole step
        print(
            f"a step at best: rollout {estimates['rollout_s']:,.0f} s ({estimates['rollout_tokens_per_s_per_chip']:,.0f} tokens/s/chip), "
            f"training {estimates['training_s']:,.0f} s ({estimates['train_tokens_per_s_per_chip']:,.0f} tokens/s/chip); "
            f"{config.train.steps} steps: {estimates['hours']:,.0f} hours, {estimates['chip_hours']:,.0f} chip-hours. Assumed: prompts of "
            f"{lengths.prompt:,.0f} tokens, responses of {lengths.response:,.0f}, {lengths.kept:.0%} of the groups kept"
        )
    for line in complaints(results):
        print(line)
    if args.suggest:
        for line in suggest(config, pod, lengths, results, print):
            print(line)
    if args.json:
        write_result(args.json, json.dumps(to_json(results, estimates), indent=2) + "\n")
    return 0 if all(r.fits for r in results) else 1


if __name__ == "__main__":
    from dapo_jax.cli import run

    run(main)
