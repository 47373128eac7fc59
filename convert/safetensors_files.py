"""Safetensors files: reading tensor by tensor, and writing without holding more than one tensor in memory."""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from headshare_jax.convert.keys import Cut
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
# Files of one checkpoint that are kept open; systems allow a few hundred.
_OPEN_FILES = 64


class SafetensorsReader:
    """Tensors of safetensors files, which stay open; no pages stay mapped, for they would count as memory."""

    def __init__(self, files: list[Path]):
        self.files = files
        self._open: Callable[[Path], Any] = lru_cache(_OPEN_FILES)(
            partial(safe_open, framework="numpy", backend="pread")
        )

    def infos(self) -> tuple[dict[str, TensorInfo], list[str]]:
        found: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for path in self.files:
            with _explained(path):
                file = self._open(path)
                problems += _unseen(path)
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(name)
                    if name in found:
                        problems.append(f"{name} stands in both {found[name].file.name} and {path.name}")
                    found[name] = TensorInfo(tuple(part.get_shape()), FLOATS.get(part.get_dtype()), path)
        return found, problems

    def read(self, info: TensorInfo, name: str, cut: Cut | None = None) -> np.ndarray:
        with _explained(info.file):
            if cut is None:
                tensor: np.ndarray = self._open(info.file).get_tensor(name)
                return tensor
            # Without a mapping the package reads the whole tensor for a slice of it.
            with safe_open(info.file, "numpy", backend="mmap") as file:
                return cut.of(file.get_slice(name))


def header(path: Path, **hooks: Any) -> tuple[int, Any]:
    """Where a file's values begin, in bytes, and its header, as `json.loads` reads it."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return 8 + size, json.loads(file.read(size), **hooks)


def _unseen(path: Path) -> Iterator[str]:
    """What is wrong in a header that the `safetensors` package accepts: of a name's entries it sees the last alone, and
    what it does not know in one it passes over."""
    _, entries = header(path, object_pairs_hook=list)
    for name, count in Counter(name for name, _ in entries).items():
        if count > 1:
            yield f"{name} stands more than once in {path.name}"
    for name, entry in entries:
        unknown = set() if name == "__metadata__" else {key for key, _ in entry} - {"dtype", "shape", "data_offsets"}
        if unknown:
            yield f"{name} in {path.name} has unknown fields ({', '.join(sorted(unknown))})"


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except HeadshareError:
        raise
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
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
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (shape, dtype) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (shape, dtype), value in zip(layout.values(), values, strict=True):
            assert value.shape == shape
            file.write(np.ascontiguousarray(value, dtype).view(np.uint8).data)
