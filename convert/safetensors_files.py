"""Safetensors files: reading tensor by tensor, and writing without holding more than one tensor in memory."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from headshare_jax.convert.tensor_files import TensorInfo
from headshare_jax.errors import HeadshareError

FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in FLOATS.items()} | {
    np.dtype(np.int32): "I32",
    np.dtype(np.uint8): "U8",
}


class SafetensorsReader:
    """Tensors of safetensors files; reads by file offset, so that no mapped pages count as memory."""

    def __init__(self, files: list[Path]):
        self.files = files

    def infos(self) -> tuple[dict[str, TensorInfo], list[str]]:
        found: dict[str, TensorInfo] = {}
        problems = []
        for path in self.files:
            with _opened(path) as file:
                problems += [f"{name} stands more than once in {path.name}" for name in _repeated(path)]
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(name)
                    if name in found:
                        problems.append(f"{name} stands in both {found[name].file.name} and {path.name}")
                    found[name] = TensorInfo(tuple(part.get_shape()), FLOATS.get(part.get_dtype()), path)
        return found, problems

    def read(self, info: TensorInfo, name: str) -> np.ndarray:
        with _opened(info.file) as file:
            tensor: np.ndarray = file.get_tensor(name)
        return tensor

    def read_rows(self, info: TensorInfo, name: str, rows: np.ndarray) -> np.ndarray:
        """The given rows of a tensor's first axis; no others are read."""
        with _opened(info.file) as file:
            part = file.get_slice(name)
            return np.stack([part[int(row)] for row in rows])


def _repeated(path: Path) -> list[str]:
    """Names that a file's header has more than once; the `safetensors` package sees the last of each alone."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        names = json.loads(file.read(size), object_pairs_hook=lambda pairs: [name for name, _ in pairs])
    return [name for name, count in Counter(names).items() if count > 1]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "numpy", backend="pread") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise HeadshareError(
            f"{path} is truncated, corrupt or no safetensors file ({error}); fetch it again."
        ) from error


def write_safetensors(
    path: Path, layout: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]], values: Iterable[np.ndarray]
) -> None:
    """Writes one file; peak memory is one tensor.

    Args:
      path: the file.
      layout: shape and type (float32, float16, bfloat16, int32 or uint8) of every tensor, by name, in file order.
      values: the tensors themselves, in that order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (shape, dtype), value in zip(layout.values(), values, strict=True):
            assert value.shape == shape
            file.write(np.ascontiguousarray(value, dtype).view(np.uint8).data)
