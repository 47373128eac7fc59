"""The tensors of GGUF files, one by one: dequantised, and quantised."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from headshare_jax.convert import keys
from headshare_jax.convert.gguf_header import GgufHeader
from headshare_jax.convert.tensor_files import TensorInfo
from headshare_jax.errors import HeadshareError
from headshare_jax.sharing import finite

Kind = gguf.GGMLQuantizationType

PLAIN: dict[Kind, np.dtype[Any]] = {
    Kind.F32: np.dtype(np.float32),
    Kind.F16: np.dtype(np.float16),
    Kind.BF16: np.dtype(ml_dtypes.bfloat16),
}
# Tensors are dequantised and quantised in pieces of about this size.
_PIECE_BYTES = 2**20
# Of values up to this size every type has finite scales.
_LARGE = 2.0**14


class GgufReader:
    """Tensors of one GGUF file; reads by file offset, so that no mapped pages count as memory."""

    def __init__(self, header: GgufHeader):
        self.header = header

    def infos(self) -> tuple[dict[str, TensorInfo], list[str]]:
        return {
            name: TensorInfo(tensor.shape, _dtype(tensor.kind), self.header.path)
            for name, tensor in self.header.tensors.items()
        }, []

    @property
    def kinds(self) -> dict[str, Kind]:
        """How each tensor is stored."""
        return {name: tensor.kind for name, tensor in self.header.tensors.items()}

    @property
    def quantised_as(self) -> str | None:
        """The quantised type that most of the file's bytes are in; None if there is none."""
        sizes: Counter[str] = Counter()
        for tensor in self.header.tensors.values():
            if tensor.kind not in PLAIN:
                sizes[tensor.kind.name.lower()] += tensor.size
        return sizes.most_common(1)[0][0] if sizes else None

    def stored(self, name: str) -> np.ndarray:
        """A tensor's bytes, uint8."""
        tensor = self.header.tensors[name]
        with self._explained(name), self.header.path.open("rb") as file:
            file.seek(tensor.offset)
            return np.fromfile(file, np.uint8, tensor.size)

    def read_all(self, name: str) -> np.ndarray:
        """A tensor's values, in the type that they are read in."""
        return self._rows(name, slice(0, self.header.tensors[name].shape[0]))

    def read(self, info: TensorInfo, name: str, cut: keys.Cut | None = None) -> np.ndarray:
        if cut is None or cut.axis or len(info.shape) == 1:
            values = self.read_all(name)
            return values if cut is None else cut.of(values)
        parts = [self._rows(name, rows) for rows in cut.slices]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _rows(self, name: str, rows: slice) -> np.ndarray:
        """Values of some rows of a tensor's first axis; nothing else is read."""
        tensor = self.header.tensors[name]
        row_bytes, shape = tensor.size // tensor.shape[0], (rows.stop - rows.start, *tensor.shape[1:])
        with self._explained(name), self.header.path.open("rb") as file:
            file.seek(tensor.offset + rows.start * row_bytes)
            if tensor.kind in PLAIN:
                return np.fromfile(file, PLAIN[tensor.kind], math.prod(shape)).reshape(shape)
            return _dequantised(file, tensor.kind, shape)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise HeadshareError(f"{name} cannot be read from {self.header.path} ({error}); fetch it again.") from error


def _dequantised(file: Any, kind: Kind, shape: tuple[int, ...]) -> np.ndarray:
    """Quantised values that begin where a file is, float32; peak memory is these plus one piece."""
    values = np.empty(shape, np.float32)
    rows = values.reshape(-1, shape[-1])
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row_bytes = shape[-1] // block * block_bytes
    step = max(1, _PIECE_BYTES // row_bytes)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        stored = np.fromfile(file, np.uint8, len(piece) * row_bytes).reshape(len(piece), row_bytes)
        piece[:] = gguf.dequantize(stored, kind)
    return values


def _dtype(kind: Kind) -> np.dtype[Any] | None:
    if kind in PLAIN:
        return PLAIN[kind]
    return np.dtype(np.float32) if _can_dequantise(kind) else None


@cache
def _can_dequantise(kind: Kind) -> bool:
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@cache
def can_quantise(kind: Kind) -> bool:
    """Whether the `gguf` package writes a type."""
    try:
        gguf.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
    except NotImplementedError:
        return False
    return True


def quantised(values: np.ndarray, kind: Kind, name: str) -> np.ndarray:
    """A tensor as a type stores it; peak memory is the tensor, the result and one piece.

    Raises:
      NotFinite: it makes NaN or infinities of some values; `name` is the tensor's.
    """
    if kind in PLAIN:
        with np.errstate(over="ignore"):
            plain = values.astype(PLAIN[kind], copy=False)
        if not finite.is_finite(plain):
            raise _does_not_fit(name, kind, finite.said(plain))
        return plain
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows = values.reshape(-1, values.shape[-1])
    stored = np.empty((len(rows), rows.shape[1] // block * block_bytes), np.uint8)
    step = max(1, _PIECE_BYTES // (4 * rows.shape[1]))
    for start in range(0, len(rows), step):
        piece = np.ascontiguousarray(rows[start : start + step], np.float32)
        with np.errstate(over="ignore", invalid="ignore"):
            stored[start : start + step] = gguf.quantize(piece, kind)
            # Scales and least values are float16.
            if max(piece.max(), -piece.min()) > _LARGE:
                back = gguf.dequantize(stored[start : start + step], kind)
                if not finite.is_finite(back):
                    raise _does_not_fit(name, kind, finite.said(back))
    return stored


def _does_not_fit(name: str, kind: Kind, said: str) -> finite.NotFinite:
    return finite.NotFinite(
        f"{name} does not fit {kind.name.lower()}, which makes {said} of it; choose a type of larger range, such as "
        "bf16 or f32.",
        option="quantize",
    )
