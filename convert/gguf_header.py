"""The container of GGUF files: metadata and the list of tensors, every count checked against the file's size."""

import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np

from headshare_jax.errors import HeadshareError

_VERSIONS = (2, 3)
_MAX_AXES = 4
_TENSOR_ALIGNMENT = 32
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "?", 10: "Q", 11: "q", 12: "d"}
# The least that a tensor's entry takes: an empty name, one axis, a type and an offset.
_ENTRY_BYTES = 32


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
      shape: slowest axis first, unlike in the file.
      kind: how values are stored.
      offset, size: place in the file, in bytes.
    """

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    offset: int
    size: int


@dataclass(frozen=True)
class GgufHeader:
    """All of a GGUF file but the tensors' values.

    Attributes:
      path: the file.
      metadata: strings, numbers, booleans and lists of these, by key.
      tensors: by name, in file order.
      types: how each value of the metadata is stored, and the items of a list.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    types: dict[str, tuple[gguf.GGUFValueType, gguf.GGUFValueType | None]] = field(default_factory=dict)


def read_header(path: Path) -> GgufHeader:
    """Reads metadata and the list of tensors.

    Raises:
      HeadshareError: no GGUF file, truncated, corrupt, or of a version that is not read.
    """
    try:
        with path.open("rb") as file:
            return _Parser(path, file).header()
    except HeadshareError:
        raise
    except (ValueError, OSError) as error:
        raise HeadshareError(f"{path} is truncated, corrupt or no GGUF file ({error}); fetch it again.") from error


# Name, shape, type and offset of a tensor, as they are stored.
_Entry = tuple[str, tuple[int, ...], gguf.GGMLQuantizationType, int]


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


class _Parser:
    def __init__(self, path: Path, file: BinaryIO):
        self.path, self.file = path, file
        self.size = self.left = path.stat().st_size

    def header(self) -> GgufHeader:
        magic = self.take(4)
        if magic != b"GGUF":
            raise HeadshareError(
                f"{self.path} is no GGUF file, the only kind of model in a single file that is read (it begins with "
                f"{magic!r}); give a .gguf file or a checkpoint's folder."
            )
        version = self.number("I")
        if version not in _VERSIONS:
            raise HeadshareError(
                f"{self.path} is a GGUF file of another version or byte order (its version reads {version}); "
                "versions 2 and 3, little-endian, are read."
            )
        tensor_count, pair_count = self.number("Q"), self.number("Q")
        metadata, types = {}, {}
        for _ in range(pair_count):
            key = self.string()
            if key in metadata:
                raise ValueError(f"{key} stands twice in its metadata")
            kind = self.number("I")
            item = self.number("I") if kind == _ARRAY else None
            metadata[key] = self.value(kind, item)
            types[key] = (gguf.GGUFValueType(kind), None if item is None else gguf.GGUFValueType(item))
        self.check_left(tensor_count * _ENTRY_BYTES)
        entries = [self.tensor() for _ in range(tensor_count)]
        return GgufHeader(self.path, metadata, self.placed(entries, metadata), types)

    def placed(self, entries: list[_Entry], metadata: dict[str, Any]) -> dict[str, GgufTensor]:
        alignment = metadata.get("general.alignment", _TENSOR_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its alignment is {alignment!r}, no power of two")
        start = _aligned(self.size - self.left, alignment)
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            if shape[-1] % block:
                raise ValueError(f"rows of {name} are not a whole number of {kind.name} blocks")
            size = math.prod(shape) // block * block_bytes
            if start + offset + size > self.size:
                raise ValueError(f"{name} reaches beyond its end")
            if name in tensors:
                raise ValueError(f"the tensor {name} stands twice in it")
            tensors[name] = GgufTensor(shape, kind, start + offset, size)
        self.check_places(tensors, start, alignment)
        return tensors

    def check_places(self, tensors: dict[str, GgufTensor], start: int, alignment: int) -> None:
        """Raises ValueError unless tensors follow each other with no more between them than the alignment asks for."""
        end, before = start, "the header"
        for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].size)):
            if tensor.offset % alignment:
                raise ValueError(f"{name} begins at byte {tensor.offset}, no multiple of the alignment {alignment}")
            if tensor.offset < end:
                raise ValueError(f"{name} overlaps {before}")
            if tensor.offset > _aligned(end, alignment):
                raise ValueError(f"between {before} and {name} lie {tensor.offset - end} bytes that are no tensor's")
            end, before = tensor.offset + tensor.size, name
        if tensors and self.size > _aligned(end, alignment):
            raise ValueError(f"after {before}, its last tensor, {self.size - end} bytes are left over")

    def tensor(self) -> _Entry:
        name, axes = self.string(), self.number("I")
        if not 1 <= axes <= _MAX_AXES:
            raise ValueError(f"{name} has {axes} axes")
        # The file lists the fastest axis first.
        shape = tuple(reversed([self.number("Q") for _ in range(axes)]))
        return name, shape, gguf.GGMLQuantizationType(self.number("I")), self.number("Q")

    def value(self, kind: int, item: int | None) -> Any:
        if kind == _STRING:
            return self.string()
        if item is None:
            return self.number(self.letter(kind))
        count = self.number("Q")
        if item == _STRING:
            return [self.string() for _ in range(count)]
        kind_of_items = np.dtype(self.letter(item)).newbyteorder("<")
        return np.frombuffer(self.take(count * kind_of_items.itemsize), kind_of_items).tolist()

    def letter(self, kind: int) -> str:
        if kind not in _NUMBERS:
            raise ValueError(f"its metadata holds values of unknown type {kind}")
        return _NUMBERS[kind]

    def number(self, letter: str) -> Any:
        return struct.unpack(f"<{letter}", self.take(struct.calcsize(f"<{letter}")))[0]

    def string(self) -> str:
        return self.take(self.number("Q")).decode()

    def take(self, count: int) -> bytes:
        self.check_left(count)
        self.left -= count
        return self.file.read(count)

    def check_left(self, count: int) -> None:
        if count > self.left:
            raise ValueError("it ends too early")
