"""What a compiled program costs a TPU: matrix products, traffic of its main memory, and collective operations.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, and what moves within a chip's fast
memory as if it were main memory.
"""

import re
from dataclasses import dataclass
from math import isqrt, prod

from headshare_jax.plan.hlo import Array, Computation, Instruction, parse

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

# What moves nothing, and what is counted where it leads to.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "opt-barrier")
_CALLS = ("while", "call", "conditional", "async-start")
# Fusions that begin or end a collective operation.
_ASYNC = 'custom_call_target="AsyncCollective'


@dataclass(frozen=True)
class Costs:
    """What one run of a program costs a device.

    Attributes:
      flops: floating-point operations of matrix products, and of sums.
      hbm_bytes: bytes read from and written to the device's main memory. What stays in faster memory is not counted.
      collective_bytes: by kind of collective operation, bytes that a device sends, by the best ring algorithm.
      collective_largest: by kind, bytes of the largest array that such an operation takes or gives.
    """

    flops: float
    hbm_bytes: float
    collective_bytes: dict[str, float]
    collective_largest: dict[str, int]


def program_costs(text: str) -> Costs:
    """Costs of a compiled program whose text is `compiled.as_text()`.

    A loop whose number of rounds depends on the program's input counts as one round.
    """
    return _costs(parse(text))


def round_costs(text: str) -> Costs:
    """Costs of one round of a program's one loop whose number of rounds depends on its input.

    Raises:
      ValueError: the program has no such loop, or several.
    """
    (loop,) = [part for part in parse(text).parts if part.opcode == "while" and part.rounds is None]
    return _costs(loop.calls[1])


def _costs(start: Computation) -> Costs:
    flops = hbm_bytes = 0.0
    sent: dict[str, float] = {}
    largest: dict[str, int] = {}
    for computation, times in start.runs():
        operations: dict[str, _Collective] = {}
        for part in computation.parts:
            flops += times * _flops(part)
            hbm_bytes += times * _traffic(part)
            operations |= _collectives(part)
        for operation in operations.values():
            kind = operation.kind
            sent[kind] = sent.get(kind, 0) + times * operation.sent
            largest[kind] = max(largest.get(kind, 0), *(array.bytes for array in operation.arrays))
            hbm_bytes += times * sum(array.bytes for array in operation.arrays if array.in_hbm)
    return Costs(flops, hbm_bytes, sent, largest)


def _flops(part: Instruction) -> int:
    if part.fused:
        return sum(map(_flops, part.fused.parts))
    if part.opcode == "convolution":
        return _product_flops(part)
    # A product with a vector is written as a multiplication and a sum.
    return 2 * prod(part.operands[0].arrays[0].dims) if part.opcode == "reduce" else 0


def _product_flops(part: Instruction) -> int:
    """Operations of a matrix product, which XLA writes as a convolution.

    Rows, columns and summands are each an axis of two of its three arrays; separate products are one of all three.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", part.attributes)
    assert labels is not None
    arrays = [part.operands[0].arrays[0], part.operands[1].arrays[0], part.arrays[0]]
    shapes = [dict(zip(axes, array.dims, strict=True)) for axes, array in zip(labels.groups(), arrays, strict=True)]
    spatial = [[shape[axis] for shape in shapes] for axis in shapes[0] if axis.isdigit()]
    separate = prod(sizes[0] for sizes in spatial if len(set(sizes)) == 1)
    return 2 * isqrt(prod(prod(array.dims) for array in arrays) // separate)


def _traffic(part: Instruction) -> int:
    """Bytes between an instruction and the device's main memory, but for collective operations."""
    if part.opcode in (*_FREE, *_CALLS) or part.opcode.endswith("-done") or _kind(part):
        return 0
    if part.opcode.endswith("-start"):
        # A copy of an array or of a slice of it, which are the first two of its arrays.
        return min(array.bytes for array in part.arrays[:2]) * sum(array.in_hbm for array in part.arrays[:2])
    root = part.fused.root if part.fused else part
    if _ASYNC in root.attributes:
        return 0
    operands = [operand for operand in dict.fromkeys(part.operands) if len(operand.arrays) == 1]
    read = sum(_read(part, operand) for operand in operands if operand.arrays[0].in_hbm)
    outputs = root.operands if root.opcode == "tuple" else [root]
    if len(outputs) != len(part.arrays):
        return read + sum(array.bytes for array in part.arrays if array.in_hbm)
    return read + sum(_written(out) for out, array in zip(outputs, part.arrays, strict=True) if array.in_hbm)


def _read(part: Instruction, operand: Instruction) -> int:
    """Bytes that an instruction reads of an operand: of a slice, no more than the slice."""
    whole = operand.arrays[0].bytes
    if part.fused:
        place = str(part.operands.index(operand))
        (value,) = [inner for inner in part.fused.parts if (inner.opcode, inner.inside) == ("parameter", place)]
        return min(whole, sum(_read(user, value) for user in value.users))
    if part.opcode in ("bitcast", "tuple"):
        return sum(_read(user, part) for user in part.users)
    first = part.operands[0] is operand
    if _kind(part) or _ASYNC in part.attributes or (first and part.opcode in ("dynamic-update-slice", "scatter")):
        return 0
    sliced = first and part.opcode in ("dynamic-slice", "slice", "gather")
    return min(whole, part.arrays[0].bytes) if sliced else whole


def _written(output: Instruction) -> int:
    """Bytes written of an output: of one that is updated in place, where it changes."""
    while output.opcode == "bitcast":
        output = output.operands[0]
    if _kind(output):
        return 0
    changed = output.operands[1] if output.opcode == "dynamic-update-slice" else output
    return sum(array.bytes for array in changed.arrays)


@dataclass(frozen=True)
class _Collective:
    kind: str
    sent: float
    arrays: list[Array]


def _kind(part: Instruction) -> str | None:
    """Which collective operation an instruction is, starts or ends, if any."""
    kind = part.opcode.removesuffix("-start").removesuffix("-done")
    return kind if kind in COLLECTIVES else None


def _collectives(part: Instruction, fusion: str = "") -> dict[str, _Collective]:
    """The collective operations that an instruction is or fuses."""
    if part.fused:
        return {key: each for inner in part.fused.parts for key, each in _collectives(inner, part.fused.name).items()}
    kind = _kind(part)
    if kind is None or part.opcode.endswith("-done"):
        return {}
    taken = [array for operand in part.operands for array in operand.arrays]
    # A started operation names what it takes beside what it gives.
    given = part.arrays if part.opcode in (kind, "all-reduce-start") else part.arrays[len(taken) :]
    sizes = [sum(array.bytes for array in arrays) for arrays in (taken, given)]
    size = _group_size(part.attributes)
    sent = (size - 1) / size * max(sizes)
    if fusion.startswith("all-reduce-scatter"):
        # An all-reduce of which each device takes its slice.
        kind = "reduce-scatter"
    elif kind in ("all-reduce", "collective-permute"):
        sent = 2 * sent if kind == "all-reduce" else float(sizes[0])
    # What runs while others compute is written in each of the fusions that it spans, under one channel.
    channel = re.search(r"channel_id=\d+", part.attributes) if fusion else None
    return {f"{kind} {channel[0]}" if channel else part.name: _Collective(kind, sent, [*taken, *given])}


def _group_size(attributes: str) -> int:
    """Devices that take part in a collective operation with one another."""
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(.*?\))? \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
        return prod(int(sizes[axis]) for axis in re.findall(r"'([^']*)'", named[2]))
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", attributes)
    return len(listed[1].split(",")) if listed else 2
