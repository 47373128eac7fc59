"""Checkpoints made of named tensors: strict checking, and reading one layer at a time through the key table."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.convert import keys
from headshare_jax.errors import HeadshareError
from headshare_jax.sharing import finite
from headshare_jax.sharing.ledger import described
from headshare_jax.sharing.map import SharingMap


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

    def read(self, info: TensorInfo, name: str, cut: keys.Cut | None = None) -> np.ndarray:
        """One tensor's values, or those of a cut of it; where the format allows, no others are read."""


@dataclass(repr=False)
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
        self._infos, problems = self.reader.infos()
        expected = self._expected()
        problems += _compare(expected, self._infos, self.optional | {self.table["head_vd"].template})
        if not problems:
            problems += self._contradictions()
        if problems:
            raise HeadshareError(f"The tensors in {self.path} do not fit its configuration: {'; '.join(problems)}.")
        self._by_parameter = {}
        for tensor_name, tensor in expected.items():
            for name in tensor.parts:
                self._by_parameter.setdefault(name, []).append(self._infos[tensor_name])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({described(self)})"

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type that holds every layer's values of a parameter exactly."""
        types = {info.dtype for info in self._by_parameter[name] if info.dtype is not None}
        return types.pop() if len(types) == 1 else np.dtype(np.float32)

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        tensor = self.table[name].name(layer)
        part = self.values(tensor, keys.cut(self.table, self.config, name, rows))
        return keys.decode(self.table, self.config, name, part)

    def values(self, tensor: str, cut: keys.Cut | None = None) -> np.ndarray:
        """A tensor's values, or those of a cut of it; raises HeadshareError if one that is read is not finite."""
        found = self.reader.read(self._infos[tensor], tensor, cut)
        if not finite.is_finite(found):
            # How many there are in all of it tells more than those of some heads.
            finite.check_weights(self.reader.read(self._infos[tensor], tensor), tensor, self._infos[tensor].file)
        return found

    def _expected(self) -> dict[str, keys.Tensor]:
        """Every tensor that the configuration asks for, unless its sizes are beyond any file."""
        if self.config.num_layers > max(len(self._infos), 1):
            raise HeadshareError(
                f"The configuration of {self.path} asks for {self.config.num_layers} layers, but there are only "
                f"{len(self._infos)} tensors; fetch it again."
            )
        try:
            return keys.tensors(self.table, self.config)
        except ValueError as error:
            raise HeadshareError(f"The configuration of {self.path} asks for impossible sizes ({error}).") from error

    def _contradictions(self) -> list[str]:
        """A stored head is fine beside tied embeddings as long as it is the same."""
        head, embed = self.table["head_vd"].template, self.table["embed_vd"].template
        if not self.config.tie_word_embeddings or head not in self._infos:
            return []
        same = np.array_equal(self.values(head), self.values(embed))
        return [] if same else [f"{head} differs from {embed} although tie_word_embeddings is true"]


def _compare(
    expected: Mapping[str, keys.Tensor], found: Mapping[str, TensorInfo], allowed: frozenset[str]
) -> list[str]:
    known = [name for name in expected if name in found]
    lists = {
        "missing": [name for name in expected if name not in found],
        "unexpected": [
            name
            for name in found
            if name not in expected and name not in allowed and not name.endswith("rotary_emb.inv_freq")
        ],
        "misshapen": [
            f"{name} has shape {list(found[name].shape)} instead of {list(expected[name].shape)}"
            for name in known
            if found[name].shape != expected[name].shape
        ],
        "not float32, float16 or bfloat16": [
            name for name in known if found[name].dtype is None and expected[name].parts
        ],
    }
    return [f"{problem}: {', '.join(names)}" for problem, names in lists.items() if names]
