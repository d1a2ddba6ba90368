"""Memory and communication of a compiled program, from the compiler's own reports."""

import math
import re
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

BETWEEN_SLICES = "between slices"  # sent over the data centre network; other kinds: inside a slice

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}
_SHAPE = re.compile(r"\b(?:pred|(?:bf|[suf])(\d+))\w*\[([\d,]*)\]")  # bits, sizes
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_SLICE_SEND = re.compile(
    r'= (.*?) send\(.*_xla_megascale_target="\{([^}]*)\}'
    r'.*_xla_megascale_transfer_type="(\w+)"'
)
_WHILE = re.compile(r" while\(.*?condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_LIMIT = re.compile(r"= [su]\d+\[\]\S* constant\((\d+)\)")
_CALLED = re.compile(
    r"(?:calls|to_apply|(?:called|true|false)_computation|(?:branch|called)_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)
_PIECE = re.compile(r"fused_computation|async_collective_fusion")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_BUFFER = re.compile(r"^ +[\d.]+\wi?B\([^)]*\); +([\d.]+\wi?B); +\d+; +\d+; (.*)$", re.MULTILINE)


class Compiled(NamedTuple):
    """Bytes on each device, and bytes that each device sends in one call."""

    argument_bytes: int
    temp_bytes: int
    peak_bytes: int  # arguments, temporaries, code, and results that reuse no argument
    fits: bool  # for the compiler, with nothing else on the device
    collectives: Mapping[str, float]  # bytes sent, by kind
    largest: tuple[str, ...]  # size and shapes of the largest temporaries


def compile_program(lowered: Any, argument_bytes: int, trips: Sequence[int] = ()) -> Compiled:
    """Compiles; a program that does not fit returns what it would need.

    argument_bytes: of its arguments on each device (`device_bytes`). trips: see `sent_bytes`.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:  # the dump, not as_text(): jaxlib may be too old to parse what a newer libtpu writes
            program = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as e:
            if (temp := refused_bytes(str(e))) is None:
                raise
            largest = _largest(folder)
            return Compiled(argument_bytes, temp, argument_bytes + temp, False, {}, largest)
        sent, largest = sent_bytes(_dumped(folder, "after_optimizations"), trips), _largest(folder)
    m = program.memory_analysis()
    arguments, temp = m.argument_size_in_bytes, m.temp_size_in_bytes
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    peak = arguments + temp + m.generated_code_size_in_bytes + results
    return Compiled(arguments, temp, peak, True, sent, largest)


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


def sent_bytes(text: str, trips: Sequence[int] = ()) -> dict[str, float]:
    """Bytes that each device sends in one call, by kind of collective, from a compiled program.

    A ring over g devices sends (g-1)/g of an all-gather's result and of a reduce-scatter's or
    all-to-all's input, and twice that of an all-reduce's. A loop whose condition compares with one
    constant (a scan) runs so often; any other trips[0] times, trips[1] times inside one such loop,
    and so on; beyond `trips` once. A collective that overlaps several fusions is written in each
    of them, with one channel, and counts once. One over several slices is compiled into those
    inside a slice, and sends between devices of different slices: these are BETWEEN_SLICES.
    """
    found = re.search(r"num_partitions=(\d+)", text)
    devices = int(found[1]) if found else 1
    total: dict[str, float] = defaultdict(float)
    pieces: set[tuple[str, ...]] = set()
    for computation, line, times in _executed(text, trips):
        if found := _SLICE_SEND.search(line):
            total[BETWEEN_SLICES] += times * _sent_between(*found.groups())
        elif found := _COLLECTIVE.search(line):
            result, kind, started = found.groups()
            if _PIECE.match(computation):
                sizes = (dims for _, dims in _SHAPE.findall(result))
                piece = (kind, *re.findall(r"channel_id=\d+", line), *sizes)
                if piece in pieces:
                    continue
                pieces.add(piece)
            size = _sent(kind, _sizes(result), bool(started), _group_size(line, devices))
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind, size = "reduce-scatter", size / 2  # fused with a slice of its result
            total[kind] += times * size
    return dict(total)


def _executed(text: str, trips: Sequence[int]) -> Iterator[tuple[str, str, float]]:
    """Every operation that a call runs: its computation, its line, and how often it runs."""
    entry, name = "", ""
    computations: dict[str, list[str]] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            name = header[2]
            computations[name] = []
            entry = name if header[1] else entry
        elif line.startswith("  ") and name:
            computations[name].append(line)
    walked: set[str] = set()

    def walk(name: str, times: float, depth: int) -> Iterator[tuple[str, str, float]]:
        if name in walked:  # an asynchronous one is called by its start and by its end
            return
        walked.add(name)
        for line in computations.get(name, ()):
            yield name, line, times
            if loop := _WHILE.search(line):
                limits = set(_LIMIT.findall("\n".join(computations.get(loop[1], ()))))
                if len(limits) == 1:
                    yield from walk(loop[2], times * int(limits.pop()), depth)
                else:
                    again = trips[depth] if depth < len(trips) else 1
                    yield from walk(loop[2], times * again, depth + 1)
                continue
            for names in _CALLED.findall(line):
                for called in re.findall(r"[\w.\-]+", names):
                    yield from walk(called, times, depth)

    return walk(entry, 1.0, 0)


def _sizes(result: str) -> list[float]:
    """Bytes of the arrays in an operation's type, scalars left out."""
    arrays = ((int(bits or 8), dims) for bits, dims in _SHAPE.findall(result) if dims)
    return [math.prod(map(int, dims.split(","))) * bits / 8 for bits, dims in arrays] or [0.0]


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


def _group_size(line: str, devices: int) -> int:
    """Devices that take part in a collective, of the three forms of `replica_groups`."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[(.*?)\] ?\{(.*?)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    return devices
