"""What a compiled program says of itself: memory a device, and what it sends to other devices."""

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

_BITS = {
    "pred": 8,
    "s4": 4,
    "u4": 4,
    "s8": 8,
    "u8": 8,
    "f8": 8,
    "s16": 16,
    "u16": 16,
    "f16": 16,
    "bf16": 16,
}
_BITS |= {"s32": 32, "u32": 32, "f32": 32, "s64": 64, "u64": 64, "f64": 64}
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}

_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\w*\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_SLICE_SEND = re.compile(
    r'= (.*?) send\(.*_xla_megascale_target="\{([^}]*)\}.*_xla_megascale_transfer_type="(\w+)"'
)
_WHILE = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_CALLED = re.compile(
    r"(?:calls|to_apply|called_computation|true_computation|false_computation)=%?([\w.\-]+)|(?:branch_computations|called_computations|calls)=\{([^}]*)\}"
)
_PIECE = re.compile(r"fused_computation|async_collective_fusion")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")

BETWEEN_SLICES = "between slices"  # what goes over the data centre network, beside the kinds of collectives inside a slice


class Compiled(NamedTuple):
    """Bytes on each device, and bytes that each device sends in one call, by kind of collective."""

    argument_bytes: int
    temp_bytes: int
    peak_bytes: int  # arguments, temporaries, code, and results that reuse no argument
    fits: bool  # for the compiler, with nothing else on the device
    collectives: Mapping[str, float]
    largest: tuple[str, ...]  # what takes most of the temporaries, as the compiler lists it


def compile_program(lowered: Any, argument_bytes: int, trips: Sequence[int] = ()) -> Compiled:
    """Compiles.

    A program that does not fit the device's memory is an answer, not an error: what it would have
    needed.

    argument_bytes: of its arguments on each device (`device_bytes`). trips: see `sent_bytes`.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:  # the dump, not as_text(): jaxlib may be too old to read back what a newer libtpu wrote
            program = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as e:
            if (temp := refused_bytes(str(e))) is None:
                raise
            return Compiled(
                argument_bytes,
                temp,
                argument_bytes + temp,
                False,
                {},
                _largest(_dumped(folder, "memory-usage-report")),
            )
        largest, sent = (
            _largest(_dumped(folder, "memory-usage-report")),
            sent_bytes(_dumped(folder, "after_optimizations"), trips),
        )
    m = program.memory_analysis()
    own = (
        m.temp_size_in_bytes
        + m.generated_code_size_in_bytes
        + m.output_size_in_bytes
        - m.alias_size_in_bytes
    )
    return Compiled(
        m.argument_size_in_bytes,
        m.temp_size_in_bytes,
        m.argument_size_in_bytes + own,
        True,
        sent,
        largest,
    )


def device_bytes(tree: Any) -> int:
    """Bytes on each device of arrays, or of shapes with shardings; what has no sharding is whole on
    each.
    """

    def size(leaf: Any) -> int:
        shape = (
            leaf.sharding.shard_shape(leaf.shape) if getattr(leaf, "sharding", None) else leaf.shape
        )
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def refused_bytes(message: str) -> int | None:
    """Temporaries that a program would have needed, from the compiler's refusal; None if it failed
    for another reason.
    """
    found = re.search(r"CompileTimeHbmOom.*?\(([\d.]+[KMGTP]?)\)", message)
    return _bytes(found[1]) if found else None


def _dumped(folder: str, kind: str) -> str:
    """The text that the compiler left of its main module."""
    return max(
        (path.read_text() for path in Path(folder).glob(f"*{kind}.txt")), key=len, default=""
    )


def _bytes(text: str) -> int:
    number, unit = re.fullmatch(r"([\d.]+)([KMGTP]?)", text).groups()  # type: ignore[union-attr]
    return int(float(number) * _UNITS[unit])


def _largest(report: str) -> tuple[str, ...]:
    """The first lines of the compiler's memory report: size and shapes of the largest buffers."""
    found = re.findall(
        r"^ +[\d.]+\wi?B\([^)]*\); +([\d.]+\wi?B); +\d+; +\d+; (.*)$", report, re.MULTILINE
    )
    return tuple(f"{size} {shapes[:80]}" for size, shapes in found[:3])


def sent_bytes(text: str, trips: Sequence[int] = ()) -> dict[str, float]:
    """Bytes that each device sends in one call, by kind of collective, from the compiled program's
    text.

    A ring over g devices sends (g-1)/g of an all-gather's result and of a reduce-scatter's or
    all-to-all's input, twice that of an all-reduce's. Loops count as often as they go round: where
    their condition compares with one constant, that many times (a scan); else trips[0] times, or
    trips[1] if inside one such loop, and so on; beyond `trips` once. A collective that runs beside
    several fusions is written in each of them, with one channel, and is one. A collective of
    several slices is compiled into those inside a slice and what each device exchanges with its
    like in the other slices: that counts as BETWEEN_SLICES.
    """
    entry, computations = _computations(text)
    devices = int(found[1]) if (found := re.search(r"num_partitions=(\d+)", text)) else 1
    total: dict[str, float] = {}
    walked: set[str] = set()
    pieces: set[tuple[str, ...]] = set()

    def walk(name: str, times: float, depth: int) -> None:
        if name in walked:  # an asynchronous one is called by its start and by its end
            return
        walked.add(name)
        for line in computations.get(name, ()):
            if found := _SLICE_SEND.search(line):
                total[BETWEEN_SLICES] = total.get(BETWEEN_SLICES, 0.0) + times * _sent_between(
                    found[3], found[1], found[2].count(",") + 1
                )
            elif found := _COLLECTIVE.search(line):
                if _PIECE.match(name):
                    piece = (
                        found[2],
                        *re.findall(r"channel_id=\d+", line),
                        *(dims for _, dims in _SHAPE.findall(found[1])),
                    )
                    if piece in pieces:
                        continue
                    pieces.add(piece)
                kind = (
                    "reduce-scatter"
                    if found[2] == "all-reduce" and name.startswith("all-reduce-scatter")
                    else found[2]
                )
                size = _sent(found[2], kind, found[1], bool(found[3]), line, devices)
                total[kind] = total.get(kind, 0.0) + times * size
            elif found := _WHILE.search(line):
                constants = re.findall(
                    r"= [su]\d+\[\]\S* constant\((\d+)\)", "\n".join(computations.get(found[1], ()))
                )
                if len(set(constants)) == 1:
                    walk(found[2], times * int(constants[0]), depth)
                else:
                    walk(found[2], times * (trips[depth] if depth < len(trips) else 1), depth + 1)
            else:
                for one, several in _CALLED.findall(line):
                    for called in [one] if one else re.findall(r"[\w.\-]+", several):
                        walk(called, times, depth)

    walk(entry, 1.0, 0)
    return total


def _computations(text: str) -> tuple[str, dict[str, list[str]]]:
    entry, name = "", ""
    computations: dict[str, list[str]] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif line.startswith("  ") and name:
            computations[name].append(line)
    return entry, computations


def _sizes(result: str) -> list[float]:
    """Bytes of the arrays in an operation's type."""
    arrays = ((dtype, dims.split(",")) for dtype, dims in _SHAPE.findall(result) if dims)
    return [math.prod(map(int, dims)) * _BITS.get(dtype, 8) / 8 for dtype, dims in arrays] or [0.0]


def _sent_between(transfer: str, result: str, slices: int) -> float:
    """Bytes that a device sends to other slices, from what it hands to the host: a ring over the
    slices.
    """
    size = _sizes(result)[0]
    others = {
        "ALL_GATHER": slices - 1,
        "ALL_REDUCE": 2 * (slices - 1) / slices,
        "REDUCE_SCATTER": (slices - 1) / slices,
    }
    return size * others.get(transfer, 1)


def _sent(operation: str, kind: str, result: str, started: bool, line: str, devices: int) -> float:
    sizes = _sizes(result)
    if operation == "collective-permute":
        return sizes[0]
    size = max(sizes) if started and operation == "all-gather" else sum(sizes)
    g = _group_size(line, devices)
    if operation == "reduce-scatter":
        return size * (g - 1)
    if operation == "all-reduce":
        return size * (g - 1) / g * (1 if kind == "reduce-scatter" else 2)
    return size * (g - 1) / g


def _group_size(line: str, devices: int) -> int:
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return devices
