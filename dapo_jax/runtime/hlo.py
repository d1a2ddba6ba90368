"""Reads a compiled program's HLO text: what a call executes, and the HBM traffic of it."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

_ARRAY = re.compile(r"\b(?:pred|(?:bf|[suf])(\d+))\w*\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|(?:called|true|false)_computation|(?:branch|called)_computations)"
    r"=(\{[^}]*\}|%?[\w.\-]+)"
)
_NAME = re.compile(r"[\w.\-]+")
# Operations without code or traffic of their own.
_FREE = frozenset(
    "get-tuple-element bitcast constant parameter tuple while conditional call after-all "
    "partition-id replica-id opt-barrier add-dependency".split()
)
_PHASES = ("-start", "-update", "-done")  # of an asynchronous operation
FUSED_SCATTER = "all-reduce-scatter"  # a fusion of an all-reduce and a slice of its result
_VIEWS = ("bitcast", "get-tuple-element")
_SLICES = ("dynamic-slice", "slice", "gather")
# A kernel that reads these first operands whole and writes its first result; `plan` adds the
# entries that it reads and writes of the caches after them.
_RAGGED, _RAGGED_WHOLE = "ragged_attention", 6
_GROUPED = "grouped_matmul"  # a kernel that reads one layer of stacks [L, E, ...]
_KERNEL = "tpu_custom_call"  # Pallas; other custom calls are the compiler's own notes


class Array(NamedTuple):
    """An array in an instruction's type."""

    size: int  # elements, without padding
    bits: int  # of an element
    scalar: bool
    padded: int  # bytes, with the padding of its tiles
    hbm: bool  # else in a core's own memory, or the host's


_NONE = Array(0, 0, True, 0, False)


class Instruction(NamedTuple):
    name: str
    type: str
    opcode: str
    arguments: str  # what stands in the parentheses
    attributes: str  # what follows them
    root: bool

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.arguments)

    @property
    def called(self) -> list[str]:
        """Computations that it runs, those of a `while` left out."""
        return [n for names in _CALLED.findall(self.attributes) for n in _NAME.findall(names)]


_Outer = tuple[str, Instruction] | None


class Executed(NamedTuple):
    """An instruction that a call runs."""

    computation: str
    instruction: Instruction
    times: float
    # The operation that it is part of, e.g. a fusion, and its computation; None: it is one itself.
    part_of: _Outer


class Traffic(NamedTuple):
    """Of one call on each device."""

    read: float = 0.0  # bytes of HBM
    written: float = 0.0
    operations: float = 0.0  # one after another
    small: float = 0.0  # of these, operations that move less than `small_bytes`
    small_bytes: float = 0.0  # that those move

    @property
    def bytes(self) -> float:
        return self.read + self.written


def arrays(text: str) -> list[Array]:
    """The arrays of a type: `bf16[8,100]{1,0:T(8,128)(2,1)S(1)}` is padded to 8 x 128, in space 1.

    HBM is space 0.
    """
    return [_array(*found) for found in _ARRAY.findall(text)]


def _array(bits: str, dims: str, layout: str) -> Array:
    sizes, width = [int(n) for n in dims.split(",") if n], int(bits or 8)
    order = [int(n) for n in layout.partition(":")[0].split(",") if n.strip().isdigit()]
    if len(order) != len(sizes):
        order = list(range(len(sizes)))[::-1]
    physical = [sizes[i] for i in order]  # minor first
    if tile := re.search(r"T\(([\d,]+)\)", layout):
        for i, n in enumerate(int(n) for n in reversed(tile[1].split(","))):
            if i < len(physical):
                physical[i] = -(-physical[i] // n) * n
    space = re.search(r"S\((\d+)\)", layout)
    hbm, size = space is None or space[1] == "0", math.prod(sizes)
    return Array(size, width, not sizes, math.prod(physical) * width // 8, hbm)


def hbm_bytes(text: str) -> int:
    """Bytes of a type's arrays that are in HBM, with the padding of their tiles."""
    return sum(a.padded for a in arrays(text) if a.hbm)


def _layer_bytes(text: str) -> int:
    """`hbm_bytes`, of a stack [L, E, ...] those of one layer."""
    stack = re.search(r"\[(\d+),\d+,\d", text)
    return hbm_bytes(text) // (int(stack[1]) if stack else 1)


def _touched(text: str, other: str) -> int:
    """Bytes of a type's arrays, wherever they are, if those of the other type are in HBM."""
    return sum(a.padded for a in arrays(text)) if hbm_bytes(other) else 0


class Module:
    """The computations of a compiled program, as the compiler dumps it."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry, name = "", ""
        found = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(found[1]) if found else 1
        for line in text.splitlines():
            if header := _HEADER.match(line):
                name = header[2]
                self.computations[name] = {}
                self.entry = name if header[1] else self.entry
            elif name and (match := _INSTRUCTION.match(line)):
                root, own, kind, opcode, rest = match.groups()
                end = _closing(rest)
                parts = (rest[:end], rest[end + 1 :], bool(root))
                self.computations[name][own] = Instruction(own, kind, opcode, *parts)
        self._reads: dict[tuple[str, int], int] = {}

    def executed(self, trips: Sequence[int] = (), entry: str = "") -> Iterator[Executed]:
        """Every instruction that a call runs, and how often. entry: another computation.

        A loop whose condition compares with one constant (a scan) runs so often; any other trips[0]
        times, trips[1] times inside one such loop, and so on; beyond `trips` once. Of a conditional
        the branch counts that moves most.
        """
        walked: set[str] = set()

        def walk(name: str, times: float, depth: int, outer: _Outer) -> Iterator[Executed]:
            if name in walked:  # an asynchronous one is called by its start and by its end
                return
            walked.add(name)
            for i in self.computations.get(name, {}).values():
                yield Executed(name, i, times, outer)
                if i.opcode == "while":
                    trip, body = self._trip(i), _attribute(i, "body")
                    again = trip or (trips[depth] if depth < len(trips) else 1)
                    yield from walk(body, times * again, depth + (trip is None), outer)
                    continue
                one = outer or (None if i.opcode in ("call", "conditional") else (name, i))
                run = [max(i.called, key=self._bytes)] if i.opcode == "conditional" else i.called
                for called in run:
                    yield from walk(called, times, depth, one)

        return walk(entry or self.entry, 1.0, 0, None)

    def overlaps(self, e: Executed) -> bool:
        """Whether other work runs while an executed collective does: it is in a fusion with other
        operations, or work stands between its start and its end.
        """
        name, i = e.part_of or (e.computation, e.instruction)
        if i.opcode == "fusion":
            return not e.computation.startswith(FUSED_SCATTER)
        if not i.opcode.endswith("-start"):
            return False
        own = list(self.computations[name].values())
        for other in own[own.index(i) + 1 :]:
            if i.name in other.operands:
                return False
            if not (other.opcode in _FREE or other.opcode.endswith(_PHASES) or _is_note(other)):
                return True
        return True  # it ends in a later turn of a loop

    def _trip(self, loop: Instruction) -> int | None:
        """How often a loop runs, if its condition has one constant, or a fusion of it."""

        def limits(name: str) -> Iterator[int]:
            for i in self.computations.get(name, {}).values():
                if i.opcode == "constant" and re.match(r"[su]\d+\[\]", i.type):
                    yield int(i.arguments)
                for called in i.called if i.opcode == "fusion" else ():
                    yield from limits(called)

        found = set(limits(_attribute(loop, "condition")))
        return (found.pop() or None) if len(found) == 1 else None  # compared with 0: data

    # ---- HBM traffic -----------------------------------------------------------------------------

    def _bytes(self, branch: str) -> float:
        own = (e for e in self.executed(entry=branch) if not e.part_of)
        return sum(e.times * sum(self.moved(e.computation, e.instruction)) for e in own)

    def traffic(self, trips: Sequence[int] = (), small_bytes: float = 0.0) -> Traffic:
        """HBM traffic and number of operations of a call. trips: see `executed`.

        An operation reads its operands and writes its result, but for those in a core's own memory;
        a slice reads what it takes, an update in place what it changes. A fusion counts as one.
        """
        read = written = operations = small = moved = 0.0
        for name, i, times, part_of in self.executed(trips):
            if part_of or i.opcode in _FREE:
                continue
            r, w = self.moved(name, i)
            read, written = read + times * r, written + times * w
            if i.opcode.endswith(_PHASES) or _is_note(i):
                continue
            if i.opcode != "fusion" and max(a.size for a in arrays(i.type) or [_NONE]) < 8:
                continue  # of a few numbers: the scalar core's
            operations += times
            if r + w < small_bytes:
                small, moved = small + times, moved + times * (r + w)
        return Traffic(read, written, operations, small, moved)

    def moved(self, name: str, i: Instruction) -> tuple[int, int]:
        """HBM bytes that an instruction of a computation reads and writes."""
        types = [self._type(name, operand) for operand in i.operands]
        if i.opcode in _FREE or i.opcode.endswith(_PHASES[1:]) or _is_note(i):
            return 0, 0
        if i.opcode == "fusion":
            (fused,) = i.called
            reads = (self._read(fused, n) if hbm_bytes(t) else 0 for n, t in enumerate(types))
            return sum(reads), self._written(fused)
        if i.opcode in _SLICES:
            return _touched(i.type, types[0]), hbm_bytes(i.type)
        if i.opcode in ("dynamic-update-slice", "scatter"):
            update = types[1 if i.opcode == "dynamic-update-slice" else 2]
            return hbm_bytes(update), _touched(update, i.type)
        if i.opcode in ("copy-start", "slice-start"):
            first, second = arrays(i.type)[:2]  # (target, source, ...), or ((source), target, ...)
            target, source = (first, second) if i.opcode == "copy-start" else (second, first)
            return target.padded * source.hbm, target.padded * target.hbm
        if i.opcode == "async-start":
            (root,) = (j for j in self.computations[i.called[0]].values() if j.root)
            return self.moved(i.called[0], root)
        if i.name.startswith(_RAGGED):
            written = sum(a.padded for a in arrays(i.type)[:1] if a.hbm)
            return sum(map(hbm_bytes, types[:_RAGGED_WHOLE])), written
        if i.name.startswith(_GROUPED):
            return sum(map(_layer_bytes, types)), hbm_bytes(i.type)
        if i.opcode.endswith("-start"):  # (operands, result)
            read = sum(map(hbm_bytes, types))
            return read, max(hbm_bytes(i.type) - read, 0)
        return sum(hbm_bytes(t) for t in types if not t.startswith("(")), hbm_bytes(i.type)

    def _type(self, name: str, instruction: str) -> str:
        """The type of an instruction; "" if it is unknown."""
        own = self.computations.get(name, {})
        return own[instruction].type if instruction in own else ""

    def _read(self, fused: str, number: int) -> int:
        """HBM bytes that a fusion reads of one operand."""
        if (fused, number) not in self._reads:
            self._reads[fused, number] = self._read_of_parameter(fused, number)
        return self._reads[fused, number]

    def _read_of_parameter(self, fused: str, number: int) -> int:
        own = self.computations[fused]
        is_it = (i for i in own.values() if i.opcode == "parameter" and i.arguments == str(number))
        parameter = next(is_it)
        whole, total, views = hbm_bytes(parameter.type), 0, {parameter.name}
        for i in own.values():  # operands stand before their users
            for n, operand in enumerate(i.operands):
                if operand not in views:
                    continue
                if i.opcode in _VIEWS or "output_to_operand_aliasing" in i.attributes:
                    views.add(i.name)  # the latter: another tiling of 8-bit arrays
                elif i.opcode in _SLICES and n == 0:
                    total += _touched(i.type, parameter.type)
                elif i.opcode == "fusion":
                    total += self._read(i.called[0], n)
                elif n or i.opcode not in ("dynamic-update-slice", "scatter"):
                    if i.opcode != "tuple":
                        return whole
        if any(i.root and i.name in views for i in own.values()):
            return whole
        return min(whole, total)

    def _written(self, fused: str) -> int:
        """HBM bytes that a fusion writes."""
        own = self.computations[fused]

        def one(i: Instruction) -> int:
            if i.opcode == "bitcast" and hbm_bytes(i.type) and i.operands[0] in own:
                return one(own[i.operands[0]])
            if i.opcode == "dynamic-update-slice":
                return _touched(own[i.operands[1]].type, i.type)
            if i.opcode == "scatter":
                return _touched(own[i.operands[2]].type, i.type)
            return self._written(i.called[0]) if i.opcode == "fusion" else hbm_bytes(i.type)

        root = next(i for i in own.values() if i.root)
        return sum(one(own[n]) for n in root.operands) if root.opcode == "tuple" else one(root)


def _closing(text: str) -> int:
    """The index of the parenthesis that closes one opened before the text."""
    depth = 1
    for at, c in enumerate(text):
        depth += (c == "(") - (c == ")")
        if not depth:
            return at
    return len(text)


def _attribute(i: Instruction, key: str) -> str:
    found = re.search(rf"\b{key}=%?([\w.\-]+)", i.attributes)
    return found[1] if found else ""


def _is_note(i: Instruction) -> bool:
    return i.opcode == "custom-call" and f'custom_call_target="{_KERNEL}"' not in i.attributes
