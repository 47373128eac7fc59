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
from headshare_jax.convert.gguf_header import GgufHeader, GgufTensor
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
        tensor = self.header.tensors[name]
        with self._explained(name), self.header.path.open("rb") as file:
            file.seek(tensor.offset)
            if tensor.kind in PLAIN:
                return np.fromfile(file, PLAIN[tensor.kind], math.prod(tensor.shape)).reshape(tensor.shape)
            return _dequantised(file, tensor)

    def read(self, info: TensorInfo, name: str, cut: keys.Cut | None = None) -> np.ndarray:
        values = self.read_all(name)
        return values if cut is None else cut.of(values)

    @contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise HeadshareError(f"{name} cannot be read from {self.header.path} ({error}); fetch it again.") from error


def _dequantised(file: Any, tensor: GgufTensor) -> np.ndarray:
    """Values of a quantised tensor, float32; peak memory is the tensor plus one piece."""
    values = np.empty(tensor.shape, np.float32)
    rows = values.reshape(-1, tensor.shape[-1])
    row_bytes = tensor.size // len(rows)
    step = max(1, _PIECE_BYTES // row_bytes)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        stored = np.fromfile(file, np.uint8, len(piece) * row_bytes).reshape(len(piece), row_bytes)
        piece[:] = gguf.dequantize(stored, tensor.kind)
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
