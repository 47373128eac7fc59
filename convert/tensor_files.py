"""Checkpoints made of named tensors: strict checking, and reading one layer at a time through the key table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from headshare_jax.config import LlamaConfig
from headshare_jax.convert import keys
from headshare_jax.errors import HeadshareError
from headshare_jax.sharing import SharingMap

FLOATS: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class TensorInfo:
    """Shape and type of a tensor, and the file it lies in; `dtype` is None for one that holds no usable floats."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    file: Path


class TensorReader(Protocol):
    """Named tensors on disk."""

    def infos(self) -> tuple[dict[str, TensorInfo], list[str]]:
        """All tensors by name, and problems found in their listing (such as a name that stands in two files)."""

    def read(self, info: TensorInfo, name: str) -> np.ndarray:
        """One tensor's values."""


class SafetensorsReader:
    """Tensors of safetensors files; reads by file offset, so that no mapped pages count as memory."""

    def __init__(self, files: list[Path]):
        self.files = files

    def infos(self) -> tuple[dict[str, TensorInfo], list[str]]:
        found: dict[str, TensorInfo] = {}
        problems = []
        for path in self.files:
            with _opened(path) as file:
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


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, "numpy", backend="pread")
    except (SafetensorError, OSError) as error:
        raise HeadshareError(f"{path} is truncated, corrupt or no safetensors file ({error}); fetch it again.") from error


@dataclass
class TensorCheckpoint:
    """A dense checkpoint of named tensors, as a `WeightSource`.

    Opening it reads no weights, but checks every name, shape and type.

    Raises:
      HeadshareError: tensors are missing, unexpected, doubled, misshapen or of another type; all are listed at once.
    """

    path: Path
    config: LlamaConfig
    table: keys.KeyTable
    reader: TensorReader
    optional: frozenset[str] = frozenset()
    sharing: SharingMap | None = None
    _infos: dict[str, TensorInfo] = field(init=False, repr=False)
    _by_parameter: dict[str, list[TensorInfo]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        expected = keys.tensors(self.table, self.config)
        self._infos, problems = self.reader.infos()
        problems += _compare(expected, self._infos, self.optional)
        if not problems:
            problems += self._untied_head()
        if problems:
            raise HeadshareError(f"The tensors in {self.path} do not fit its configuration: {'; '.join(problems)}.")
        self._by_parameter = {}
        for tensor_name, tensor in expected.items():
            for name in tensor.parts:
                self._by_parameter.setdefault(name, []).append(self._infos[tensor_name])

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type that holds every layer's values of a parameter exactly."""
        types = {info.dtype for info in self._by_parameter[name]}
        return np.dtype(reduce(jnp.promote_types, types))

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        tensor = self.table[name].name(layer)
        return keys.decode(self.table, self.config, name, self.reader.read(self._infos[tensor], tensor))

    def _untied_head(self) -> list[str]:
        """A stored head is fine beside tied embeddings as long as it is the same."""
        head, embed = self.table["head_vd"].template, self.table["embed_vd"].template
        if not self.config.tie_word_embeddings or head not in self._infos:
            return []
        same = np.array_equal(self.reader.read(self._infos[head], head), self.reader.read(self._infos[embed], embed))
        return [] if same else [f"{head} differs from {embed} although tie_word_embeddings is true"]


def _compare(
    expected: Mapping[str, keys.Tensor], found: Mapping[str, TensorInfo], optional: frozenset[str]
) -> list[str]:
    problems = []
    missing = [name for name in expected if name not in found]
    head = {"lm_head.weight", "output.weight"}
    unexpected = [
        name
        for name in found
        if name not in expected and name not in optional and name not in head and not name.endswith("rotary_emb.inv_freq")
    ]
    if missing:
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected:
        problems.append(f"unexpected: {', '.join(unexpected)}")
    for name, tensor in expected.items():
        if name not in found:
            continue
        if found[name].shape != tensor.shape:
            problems.append(f"{name} has shape {list(found[name].shape)} instead of {list(tensor.shape)}")
        if found[name].dtype is None:
            problems.append(f"{name} does not hold float32, float16 or bfloat16 values")
    return problems
