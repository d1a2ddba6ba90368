"""Memory, HBM traffic and communication of a compiled program, from the compiler's own reports."""

import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from dapo_jax.runtime.hlo import FUSED_SCATTER, Module, Traffic, arrays

BETWEEN_SLICES = "between slices"  # sent over the data centre network; other kinds: inside a slice

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?"
)
_SLICE_SEND = re.compile(
    r'_xla_megascale_target="\{([^}]*)\}.*_xla_megascale_transfer_type="(\w+)"'
)
_PIECE = re.compile(r"fused_computation|async_collective_fusion")
_BUFFER = re.compile(r"^ +[\d.]+\wi?B\([^)]*\); +([\d.]+\wi?B); +\d+; +\d+; (.*)$", re.MULTILINE)


class Link(NamedTuple):
    """How bytes are sent."""

    kind: str  # of collective
    axes: int = 1  # of the torus, along which the devices of a group lie
    overlapped: bool = False  # other work runs meanwhile


class Compiled(NamedTuple):
    """Bytes on each device, and what each device does in one call."""

    argument_bytes: int
    temp_bytes: int
    peak_bytes: int  # arguments, temporaries, code, and results that reuse no argument
    fits: bool  # for the compiler, with nothing else on the device
    sent: Mapping[Link, float]  # bytes
    traffic: Traffic
    largest: tuple[str, ...]  # size and shapes of the largest temporaries

    @property
    def collectives(self) -> dict[str, float]:
        """Bytes sent, by kind."""
        total: dict[str, float] = defaultdict(float)
        for link, size in self.sent.items():
            total[link.kind] += size
        return dict(total)


class Counting(NamedTuple):
    """What the text of a program does not say."""

    trips: Sequence[int] = ()  # of loops with a data-dependent end (`Module.executed`)
    small_bytes: float = 0.0  # an operation that moves fewer is small (`Traffic`)
    coords: Sequence[Sequence[int]] = ()  # of the devices on the torus, in the order of the mesh


_NOTHING = Counting()


def compile_program(lowered: Any, argument_bytes: int, count: Counting = _NOTHING) -> Compiled:
    """Compiles; a program that does not fit returns what it would need.

    argument_bytes: of its arguments on each device (`device_bytes`).
    """
    with tempfile.TemporaryDirectory() as folder:
        try:  # the dump, not as_text(): jaxlib may be too old to parse what a newer libtpu writes
            program = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as e:
            if (temp := refused_bytes(str(e))) is None:
                raise
            largest, peak = _largest(folder), argument_bytes + temp
            return Compiled(argument_bytes, temp, peak, False, {}, Traffic(), largest)
        module, largest = Module(_dumped(folder, "after_optimizations")), _largest(folder)
    m = program.memory_analysis()
    arguments, temp = m.argument_size_in_bytes, m.temp_size_in_bytes
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    peak = arguments + temp + m.generated_code_size_in_bytes + results
    traffic = module.traffic(count.trips, count.small_bytes)
    return Compiled(arguments, temp, peak, True, sent_bytes(module, count), traffic, largest)


def device_bytes(tree: Any) -> int:
    """Bytes on each device of arrays or shapes; without a sharding they are replicated."""

    def size(leaf: Any) -> int:
        sharding = getattr(leaf, "sharding", None)
        shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))


def refused_bytes(message: str) -> int | None:
    """Temporaries that a program needs, from the compiler's refusal; None for other errors."""
    found = re.search(r"CompileTimeHbmOom.*?\(([\d.]+)([KMGTP]?)\)", message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else None


def _dumped(folder: str, kind: str) -> str:
    """The compiler's dump of its main module."""
    texts = (path.read_text() for path in Path(folder).glob(f"*{kind}.txt"))
    return max(texts, key=len, default="")


def _largest(folder: str) -> tuple[str, ...]:
    found = _BUFFER.findall(_dumped(folder, "memory-usage-report"))
    return tuple(f"{size} {shapes[:80]}" for size, shapes in found[:3])


def sent_bytes(module: Module, count: Counting = _NOTHING) -> dict[Link, float]:
    """Bytes that each device sends in one call.

    A ring over g devices sends (g-1)/g of an all-gather's result and of a reduce-scatter's or
    all-to-all's input, and twice that of an all-reduce's. A collective that overlaps several
    fusions is written in each of them, with one channel, and counts once. One over several slices
    is compiled into those inside a slice, and sends between devices of different slices: these are
    BETWEEN_SLICES.
    """
    total: dict[Link, float] = defaultdict(float)
    pieces: set[tuple[str, ...]] = set()
    for e in module.executed(count.trips):
        i = e.instruction
        if i.opcode == "send" and (found := _SLICE_SEND.search(i.attributes)):
            operand = i.type.removeprefix("(").partition(", u32[]")[0]
            link = Link(BETWEEN_SLICES, overlapped=True)
            total[link] += e.times * _sent_between(operand, *found.groups())
        elif found := _COLLECTIVE.fullmatch(i.opcode):
            kind, started = found.groups()
            if _PIECE.match(e.computation):
                channel = re.findall(r"channel_id=\d+", i.attributes)
                piece = (kind, *channel, *(str(a.size) for a in arrays(i.type)))
                if piece in pieces:
                    continue
                pieces.add(piece)
            group = _group(i.attributes, module.devices)
            size = _sent(kind, _sizes(i.type), bool(started), len(group))
            if kind == "all-reduce" and e.computation.startswith(FUSED_SCATTER):
                kind, size = "reduce-scatter", size / 2
            link = Link(kind, _axes(group, count.coords), module.overlaps(e))
            total[link] += e.times * size
    return dict(total)


def _sizes(result: str) -> list[float]:
    """Bytes of the arrays in an operation's type, without padding, scalars left out."""
    return [a.size * a.bits / 8 for a in arrays(result) if not a.scalar] or [0.0]


def _sent_between(operand: str, targets: str, transfer: str) -> float:
    """Bytes that a device sends to other slices, in a ring over them, from what it sends one."""
    n = targets.count(",") + 1
    shares = {"ALL_GATHER": n - 1, "ALL_REDUCE": 2 * (n - 1) / n, "REDUCE_SCATTER": (n - 1) / n}
    return _sizes(operand)[0] * shares.get(transfer, 1)


def _sent(kind: str, sizes: Sequence[float], started: bool, g: int) -> float:
    """Bytes that each of g devices sends. sizes: of the result; of an asynchronous one's start
    also of the operand.
    """
    if kind == "collective-permute":
        return sizes[0]
    size = max(sizes) if started and kind == "all-gather" else sum(sizes)
    shares = {"all-reduce": 2 * (g - 1) / g, "reduce-scatter": g - 1}
    return size * shares.get(kind, (g - 1) / g)


def _group(attributes: str, devices: int) -> list[int]:
    """The first group of devices of a collective, of the four forms that name it."""

    def numbers(text: str) -> list[int]:
        return [int(n) for n in re.findall(r"\d+", text)]

    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        return numbers(found[1])
    if found := re.search(
        r"replica_groups=\[(\d+),(\d+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?", attributes
    ):
        shape = numbers(found[3] or str(int(found[1]) * int(found[2])))
        ids = np.arange(math.prod(shape)).reshape(shape)
        ids = ids.transpose(numbers(found[4])) if found[4] else ids
        return ids.ravel()[: int(found[2])].tolist()
    if found := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", attributes):
        sizes, used = re.findall(r"'(\w+)'=(\d+)", found[1]), re.findall(r"'(\w+)'", found[2])
        ids = np.arange(math.prod(int(n) for _, n in sizes)).reshape([int(n) for _, n in sizes])
        return ids[tuple(slice(None) if axis in used else 0 for axis, _ in sizes)].ravel().tolist()
    return list(range(devices))


def _axes(group: Sequence[int], coords: Sequence[Sequence[int]]) -> int:
    """How many axes of the torus a group's devices lie along, at least 1."""
    if not coords:
        return 1
    along = zip(*(coords[n] for n in group), strict=True)
    return max(1, sum(len(set(values)) > 1 for values in along))
