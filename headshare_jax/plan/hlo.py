"""A compiled program, read from XLA's text of it: computations, their instructions, and how often each runs."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(, \w+=.*|)$")
_NAME = re.compile(r"%([\w.\-]+)")


class Array(NamedTuple):
    """An array's shape, its size, and whether it lies in the device's main memory."""

    dims: tuple[int, ...]
    bytes: int
    in_hbm: bool


@dataclass(eq=False, repr=False)
class Instruction:
    """An instruction.

    Attributes:
      name, opcode: as written.
      arrays: what it gives.
      operands: what it takes.
      users: the instructions of its computation that take what it gives.
      inside: text between its parentheses: a constant's value, a parameter's place.
      attributes: text behind them.
      calls: computations that it runs: of a loop, condition and body; of a fusion, what is fused.
    """

    name: str
    opcode: str
    arrays: list[Array]
    operands: list["Instruction"]
    users: list["Instruction"]
    inside: str
    attributes: str
    calls: list["Computation"]

    @property
    def fused(self) -> "Computation | None":
        return self.calls[0] if self.opcode == "fusion" else None

    @property
    def rounds(self) -> int | None:
        """Rounds of a loop that counts from 0 up to a constant, as those of `jax.lax.scan` do; None of any other."""
        test = self.calls[0].root
        limit = test.operands[-1]
        counts = limit.opcode == "constant" and "direction=LT" in test.attributes
        return int(limit.inside) if counts else None


@dataclass(eq=False, repr=False)
class Computation:
    """Instructions, in the order in which they run."""

    name: str
    parts: list[Instruction] = field(default_factory=list)
    root: Instruction = field(init=False)

    def runs(self, times: int = 1) -> Iterator[tuple["Computation", int]]:
        """This computation and those that it calls, and how often each runs; a loop that may end anywhere runs once."""
        yield self, times
        for part in self.parts:
            if part.opcode in ("while", "call", "conditional", "async-start"):
                rounds = part.rounds or 1 if part.opcode == "while" else 1
                for called in part.calls:
                    yield from called.runs(times * rounds)


def parse(text: str) -> Computation:
    """The program whose text is `compiled.as_text()`."""
    # Whatever is named is written before it is used.
    computations: dict[str, Computation] = {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            named: dict[str, Instruction] = {}
            current = computations[header[1]] = Computation(header[1])
        elif found := _INSTRUCTION.match(line):
            is_root, name, shapes, opcode, inside, attributes = found.groups()
            operands = [named[operand] for operand in _NAME.findall(inside)]
            calls = [computations[called] for called in _NAME.findall(attributes) if called in computations]
            if opcode == "fusion" and [part.opcode for part in calls[0].parts] == ["parameter", "bitcast"]:
                opcode = "bitcast"
            part = Instruction(name, opcode, _arrays(shapes), operands, [], inside, attributes, calls)
            for operand in dict.fromkeys(operands):
                operand.users.append(part)
            named[name] = part
            current.parts.append(part)
            if is_root:
                current.root = part
    return current


def _arrays(shapes: str) -> list[Array]:
    arrays = []
    for kind, bits, dims, layout in _ARRAY.findall(shapes):
        sizes = tuple(map(int, filter(None, dims.split(","))))
        size = prod(sizes) * (int(bits) if bits else 8 * (kind == "pred")) // 8
        arrays.append(Array(sizes, size, not re.search(r"S\([1-9]", layout)))
    return arrays
