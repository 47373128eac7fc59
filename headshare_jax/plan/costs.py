"""What a compiled program costs a device, read from XLA's text of it.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs. Here it counts as often as it runs.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from math import prod

import numpy as np

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "opt-barrier")
_ARITHMETIC = ("add", "subtract", "multiply", "divide", "maximum", "minimum", "negate", "abs", "compare", "select")
# Fusions that begin or end a collective operation of a TPU.
_ASYNC = 'custom_call_target="AsyncCollective'
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%([\w.\-]+) \(.*\{$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%([\w.\-]+) = (.*)$")


@dataclass(frozen=True)
class Costs:
    """What one run of a program costs a device.

    Attributes:
      flops: floating-point operations, those of matrix products above all; transcendental functions are not counted.
      hbm_bytes: bytes read from and written to the device's main memory. What stays in faster memory is not counted.
      collective_bytes: by kind of collective operation, bytes that a device sends, by the best ring algorithm.
      collective_largest: by kind, bytes of the largest array that such an operation gives.
      unknown_loops: loops whose number of rounds the text does not tell; they count as one round.
    """

    flops: float
    hbm_bytes: float
    collective_bytes: dict[str, float]
    collective_largest: dict[str, int]
    unknown_loops: int

    def plus(self, other: "Costs", times: int = 1) -> "Costs":
        """These costs and `times` the other's."""
        sent, largest = dict(self.collective_bytes), dict(self.collective_largest)
        for kind, count in other.collective_bytes.items():
            sent[kind] = sent.get(kind, 0) + times * count
            largest[kind] = max(largest.get(kind, 0), other.collective_largest[kind])
        return Costs(
            self.flops + times * other.flops,
            self.hbm_bytes + times * other.hbm_bytes,
            sent,
            largest,
            self.unknown_loops + other.unknown_loops,
        )


_NOTHING = Costs(0, 0, {}, {}, 0)


def program_costs(text: str) -> Costs:
    """Costs of a compiled program whose text is `compiled.as_text()`."""
    program = _parse(text)
    return _Counter(program).computation(next(name for name, part in program.items() if part.is_entry))


def round_costs(text: str) -> Costs:
    """Costs of one round of a program's one loop whose number of rounds depends on its input.

    Raises:
      ValueError: the program has no such loop, or several.
    """
    program = _parse(text)
    entry = next(part for part in program.values() if part.is_entry)
    counter = _Counter(program)
    rounds = [counter.loop(part) for part in entry.instructions.values() if part.opcode == "while"]
    (costs,) = [costs for costs in rounds if costs.unknown_loops == 1]
    return costs


@dataclass(frozen=True)
class _Array:
    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool

    @property
    def elements(self) -> int:
        return prod(self.dims)

    @property
    def bytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return self.elements * (int(bits[0]) if bits else 8 * (self.dtype == "pred")) // 8


@dataclass(frozen=True)
class _Instruction:
    name: str
    opcode: str
    arrays: tuple[_Array, ...]
    operands: tuple[str, ...]
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        found = re.search(pattern, self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> str | None:
        return self.attribute(r"(?:calls|to_apply)=%([\w.\-]+)")


@dataclass(frozen=True)
class _Computation:
    is_entry: bool
    instructions: dict[str, _Instruction]
    root: _Instruction

    @cached_property
    def parameters(self) -> dict[int, str]:
        found = (part for part in self.instructions.values() if part.opcode == "parameter")
        return {int(part.attributes.partition(")")[0]): part.name for part in found}

    @cached_property
    def users(self) -> dict[str, list[_Instruction]]:
        users: dict[str, list[_Instruction]] = {}
        for part in self.instructions.values():
            for operand in dict.fromkeys(part.operands):
                users.setdefault(operand, []).append(part)
        return users

    def outputs(self) -> list[_Instruction]:
        """What the computation gives, one for each array."""
        if self.root.opcode == "tuple":
            return [self.instructions[name] for name in self.root.operands]
        return [self.root]


_Program = dict[str, _Computation]


def _parse(text: str) -> _Program:
    program = {}
    text += "\n"
    for header in _HEADER.finditer(text):
        body = text[header.end() + 1 : text.index("\n}\n", header.end())]
        parts, root = {}, None
        for line in body.splitlines():
            found = _INSTRUCTION.match(line)
            if found:
                part = _instruction(found[2], found[3])
                parts[part.name] = part
                root = part if found[1] else root
        assert root is not None
        program[header[2]] = _Computation(bool(header[1]), parts, root)
    return program


def _instruction(name: str, text: str) -> _Instruction:
    end = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    shapes, rest = text[:end], text[end + 1 :]
    opcode = rest[: rest.index("(")]
    close = _closing(rest, len(opcode))
    arrays = tuple(
        _Array(dtype, tuple(map(int, filter(None, dims.split(",")))), not re.search(r"S\([1-9]", layout or ""))
        for dtype, dims, layout in _ARRAY.findall(shapes)
    )
    inside = rest[len(opcode) + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return _Instruction(name, opcode, arrays, operands, (inside if not operands else "") + rest[close:])


def _closing(text: str, start: int) -> int:
    """Place of the parenthesis that closes the one at `start`."""
    depth = 0
    for place in re.finditer(r"[()]", text[start:]):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return start + place.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


class _Counter:
    """Adds up a program's costs, each computation once."""

    def __init__(self, program: _Program):
        self.program = program
        self.done: dict[str, Costs] = {}

    def computation(self, name: str) -> Costs:
        if name not in self.done:
            where, total = self.program[name], _NOTHING
            collectives: dict[str, Costs] = {}
            for part in where.instructions.values():
                total = total.plus(self._part(where, part))
                # What runs while others compute is written in each of the fusions it spans, under one channel.
                for channel, costs in self._collectives(where, part):
                    collectives.setdefault(channel, costs)
            for costs in collectives.values():
                total = total.plus(costs)
            self.done[name] = total
        return self.done[name]

    def _part(self, where: _Computation, part: _Instruction) -> Costs:
        """Costs of an instruction without the collective operations that it is or fuses."""
        if part.opcode == "while":
            return self.loop(part)
        if part.opcode == "conditional":
            branches = re.search(r"branch_computations=\{[^}]*\}|true_computation=.*", part.attributes)
            names = re.findall(r"%([\w.\-]+)", branches[0] if branches else "")
            return max((self.computation(name) for name in names), key=lambda costs: costs.hbm_bytes)
        if part.opcode in ("call", "async-start") and part.called:
            return self.computation(part.called)
        if part.opcode in _FREE or part.opcode.endswith("-done") or _collective_kind(part):
            return _NOTHING
        flops = self._fused_flops(part.called) if part.opcode == "fusion" and part.called else _flops(where, part)
        return Costs(flops, self._traffic(where, part), {}, {}, 0)

    def _fused_flops(self, name: str) -> float:
        where, total = self.program[name], 0.0
        for part in where.instructions.values():
            fused = part.opcode == "fusion" and part.called
            total += self._fused_flops(fused) if fused else _flops(where, part)
        return total

    def _collectives(self, where: _Computation, part: _Instruction) -> list[tuple[str, Costs]]:
        """The collective operations that an instruction is or fuses, by the channel that tells them apart."""
        if part.opcode == "fusion" and part.called:
            inside = self.program[part.called]
            found = [pair for inner in inside.instructions.values() for pair in self._collectives(inside, inner)]
            # A TPU's reduce-scatter is an all-reduce of which each device takes its slice.
            if part.called.startswith("all-reduce-scatter"):
                return [(channel, _scattered(costs)) for channel, costs in found]
            return found
        kind = _collective_kind(part)
        if kind is None or part.opcode.endswith("-done"):
            return []
        channel = part.attribute(r"channel_id=(\d+)") or f"{kind} {part.name}"
        return [(channel, _collective(where, part, kind))]

    def loop(self, part: _Instruction) -> Costs:
        condition, body = part.attribute(r"condition=%([\w.\-]+)"), part.attribute(r"body=%([\w.\-]+)")
        assert condition is not None
        assert body is not None
        known = part.attribute(r'"known_trip_count":\{"n":"(\d+)"')
        rounds = int(known) if known else self._rounds(condition, body)
        round_costs = self.computation(body).plus(self.computation(condition))
        unknown = Costs(0, 0, {}, {}, int(rounds is None))
        return unknown.plus(round_costs, 1 if rounds is None else rounds)

    def _rounds(self, condition: str, body: str) -> int | None:
        """Rounds of a loop that counts from 0 up to a constant, as those of `jax.lax.scan` do."""
        where = self.program[condition]
        test = where.root
        while test.opcode == "fusion" and test.called:
            test = self.program[test.called].root
        constants = [
            int(part.attributes.partition(")")[0])
            for part in where.instructions.values()
            if part.opcode == "constant" and part.arrays[0].dtype == "s32"
        ]
        if "direction=LT" not in test.attributes or len(constants) != 1:
            return None
        counter = next((part for part in where.instructions.values() if part.opcode == "get-tuple-element"), None)
        step = 1 if counter is None else self._step(body, int(counter.attribute(r"index=(\d+)") or 0))
        return -(-constants[0] // step)

    def _step(self, body: str, counter: int) -> int:
        """What a round adds to the loop's counter."""
        where = self.program[body]
        part = where.instructions[where.root.operands[counter]]
        while part.opcode in ("copy", "bitcast"):
            part = where.instructions[part.operands[0]]
        if part.opcode == "add":
            for name in part.operands:
                operand = where.instructions[name]
                if operand.opcode == "constant":
                    return int(operand.attributes.partition(")")[0])
        return 1

    def _traffic(self, where: _Computation, part: _Instruction) -> float:
        """Bytes between an instruction and the device's main memory."""
        total = 0
        for place, name in enumerate(part.operands):
            arrays = where.instructions[name].arrays
            if len(arrays) == 1 and arrays[0].in_hbm:
                total += self._read(where, part, place, name)
        if part.opcode == "fusion" and part.called:
            fused = self.program[part.called]
            if _ASYNC in fused.root.attributes:
                return 0
            outputs = fused.outputs()
            written = [self._written(fused, output) for output in outputs] if len(outputs) == len(part.arrays) else None
        elif part.opcode.endswith("-start"):
            # The arrays of an asynchronous copy: what it makes, what it reads, and a flag.
            return total + (part.arrays[0].bytes if part.arrays[0].in_hbm else 0)
        else:
            written = [self._written(where, part)] if part.opcode == "dynamic-update-slice" else None
        for place, array in enumerate(part.arrays):
            if array.in_hbm:
                total += array.bytes if written is None else min(written[place], array.bytes)
        return total

    def _read(self, where: _Computation, part: _Instruction, place: int, name: str) -> int:
        """Bytes that an instruction reads of an operand: of a slice, no more than the slice."""
        whole = where.instructions[name].arrays[0].bytes
        if part.opcode == "fusion" and part.called:
            return min(whole, self._read_inside(part.called, place, whole))
        if part.operands[0] == name and part.opcode in ("dynamic-slice", "slice", "gather"):
            return min(whole, part.arrays[0].bytes)
        if part.operands[0] == name and part.opcode in ("dynamic-update-slice", "scatter"):
            return 0
        return whole

    def _read_inside(self, name: str, place: int, whole: int) -> int:
        where = self.program[name]
        values, total = [where.parameters[place]], 0
        while values:
            value = values.pop()
            for user in where.users.get(value, []):
                if user.opcode in ("bitcast", "tuple"):
                    values.append(user.name)
                elif _collective_kind(user) or _ASYNC in user.attributes:
                    continue
                elif user.opcode == "fusion":
                    total += self._read(where, user, user.operands.index(value), value)
                else:
                    total += self._read(where, user, 0, value)
        return min(total, whole)

    def _written(self, where: _Computation, output: _Instruction) -> int:
        """Bytes written of an output: what is passed on is not, and what is updated in place only where it changes."""
        while output.opcode == "bitcast":
            output = where.instructions[output.operands[0]]
        if output.opcode == "parameter" or _collective_kind(output):
            return 0
        if output.opcode == "dynamic-update-slice":
            return where.instructions[output.operands[1]].arrays[0].bytes
        return sum(array.bytes for array in output.arrays)


def _collective_kind(part: _Instruction) -> str | None:
    kind = part.opcode.removesuffix("-start").removesuffix("-done")
    return kind if kind in COLLECTIVES else None


def _collective(where: _Computation, part: _Instruction, kind: str) -> Costs:
    taken = [array for name in part.operands for array in where.instructions[name].arrays]
    # A started operation names what it takes beside what it gives.
    given = part.arrays if part.opcode == kind or kind == "all-reduce" else part.arrays[len(taken) :]
    sizes = [sum(array.bytes for array in arrays) for arrays in (taken, given)]
    size = _group_size(part.attributes)
    whole = (size - 1) / size * max(sizes)
    sent = {"all-reduce": 2 * whole, "collective-permute": float(sizes[0])}.get(kind, whole)
    traffic = sum(array.bytes for array in (*taken, *given) if array.in_hbm)
    return Costs(0, traffic, {kind: sent}, {kind: max((array.bytes for array in given), default=0)}, 0)


def _scattered(costs: Costs) -> Costs:
    sent, largest = costs.collective_bytes["all-reduce"] / 2, costs.collective_largest["all-reduce"]
    return Costs(costs.flops, costs.hbm_bytes, {"reduce-scatter": sent}, {"reduce-scatter": largest}, 0)


def _group_size(attributes: str) -> int:
    """Devices that take part in a collective operation with one another."""
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if counted:
        return int(counted[1])
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if named:
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
        return prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", named[2]))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed else 2


def _flops(where: _Computation, part: _Instruction) -> float:
    """Floating-point operations of an instruction that is neither a fusion nor calls a computation."""
    if not part.arrays:
        return 0
    out = part.arrays[0].elements
    if part.opcode in ("dot", "convolution"):
        sides = [where.instructions[name].arrays[0] for name in part.operands]
        return _dot_flops(part, sides, out) if part.opcode == "dot" else _convolution_flops(part, sides)
    if part.opcode == "reduce":
        return where.instructions[part.operands[0]].arrays[0].elements
    if part.opcode == "custom-call":
        return float(part.attribute(r'"cost_estimate":\{[^}]*"flops":"?(\d+)') or 0)
    return out if part.opcode in _ARITHMETIC else 0


def _dot_flops(part: _Instruction, sides: list[_Array], out: int) -> float:
    contracted = part.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
    return 2.0 * out * prod(sides[0].dims[int(place)] for place in filter(None, contracted.split(",")))


def _convolution_flops(part: _Instruction, sides: list[_Array]) -> float:
    """Products that a convolution adds up; XLA writes matrix products for a TPU as convolutions."""
    labels = part.attribute(r"dim_labels=(\w+_\w+->\w+)")
    assert labels is not None
    left, right = labels.partition("->")[0].split("_")
    window = part.attribute(r"window=\{([^}]*)\}") or ""

    def field(name: str, default: int, read: Callable[[str], int] = int) -> list[int]:
        found = re.search(rf"(?:^| ){name}=(\S+)", window)
        return [read(value) for value in found[1].split("x")] if found else [default] * len(spatial)

    spatial = sorted(label for label in left if label.isdigit())
    places = 1
    fields = zip(
        spatial,
        field("stride", 1),
        field("pad", 0, lambda value: int(value.split("_")[0])),
        field("pad", 0, lambda value: int(value.split("_")[1])),
        field("lhs_dilate", 1),
        field("rhs_dilate", 1),
        strict=True,
    )
    for label, stride, low, high, lhs_dilate, rhs_dilate in fields:
        size, kernel = sides[0].dims[left.index(label)], sides[1].dims[right.index(label)]
        places *= _window_places(size, kernel, stride, low, high, lhs_dilate, rhs_dilate)
    groups = int(part.attribute(r"batch_group_count=(\d+)") or 1)
    batch = sides[0].dims[left.index("b")] // groups
    return 2.0 * places * batch * sides[1].dims[right.index("i")] * sides[1].dims[right.index("o")]


def _window_places(size: int, kernel: int, stride: int, low: int, high: int, lhs_dilate: int, rhs_dilate: int) -> int:
    """Pairs of an output and a kernel position along one axis that meet an input rather than padding."""
    padded = (size - 1) * lhs_dilate + 1 + low + high
    outputs = (padded - ((kernel - 1) * rhs_dilate + 1)) // stride + 1
    at = np.arange(outputs)[:, None] * stride - low + np.arange(kernel)[None, :] * rhs_dilate
    return int(np.count_nonzero((at % lhs_dilate == 0) & (at >= 0) & (at < (size - 1) * lhs_dilate + 1)))
