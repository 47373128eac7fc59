"""Layers with different numbers of heads, llama.cpp's architecture `deci`: Llamas of which a map drops units.

Dropped heads' rows and columns are left out. llama.cpp gives a layer without heads neither the attention's norm nor its
output bias, and needs heads in the first layer: where that matters, one dropped unit stays, as zeros.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.convert import keys
from headshare_jax.convert.gguf_header import GgufHeader
from headshare_jax.convert.gguf_settings import OWN_MAP
from headshare_jax.convert.tensor_files import TensorCheckpoint
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PARAMETERS, slice_shape
from headshare_jax.sharing import finite
from headshare_jax.sharing.map import DROPPED, SharingMap
from headshare_jax.sharing.view import View

HEADS, KV_HEADS = "deci.attention.head_count", "deci.attention.head_count_kv"
# The norm of a layer without heads, a list of numbers.
NORM = "headshare.attn_norm.{layer}"


def units_written(config: LlamaConfig, sharing: SharingMap) -> np.ndarray:
    """bool [L, U]: the units of which a file holds the heads."""
    kept_lu = np.logical_not(sharing.dropped)
    empty_l = np.logical_not(kept_lu.any(axis=1))
    if not config.attention_bias:
        empty_l[1:] = False
    kept_lu[empty_l, 0] = True
    return kept_lu


def head_counts(config: LlamaConfig, kept_lu: np.ndarray) -> dict[str, list[int]]:
    """The numbers of heads of every layer, by their keys in the metadata."""
    counts = kept_lu.sum(axis=1).tolist()
    return {HEADS: [count * config.heads_per_unit for count in counts], KV_HEADS: counts}


def tensors(table: keys.KeyTable, config: LlamaConfig, kept_lu: np.ndarray) -> dict[str, keys.Tensor]:
    """Every tensor of such a file."""
    found = {}
    for name, tensor in keys.tensors(table, config).items():
        parameter, kept = tensor.parts[0], 1 if tensor.layer is None else int(kept_lu[tensor.layer].sum())
        shape = list(tensor.shape)
        if PARAMETERS[parameter].pool is not None:
            axis = table[parameter].layout.heads_axis
            shape[axis] = shape[axis] // config.num_kv_heads * kept
        elif parameter == "attn_norm_ld":
            shape[0] *= bool(kept)
        if all(shape):
            found[name] = keys.Tensor(tensor.parts, tensor.layer, tuple(shape))
    return found


class KeptView(View):
    """A source of which a layer has the heads alone that are written."""

    def __init__(self, base: Any, kept_lu: np.ndarray):
        super().__init__(base)
        self.kept_lu = kept_lu

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        heads_n = None if layer is None else _heads_of(self.kept_lu[layer], self.config, name)
        return self.base.read(name, layer, rows if heads_n is None else np.flatnonzero(heads_n).tolist())


def _heads_of(units_u: np.ndarray, config: LlamaConfig, name: str) -> np.ndarray | None:
    """bool [N or K]: the heads of some units of a layer; None for a parameter without heads."""
    pool = PARAMETERS[name].pool
    return None if pool is None else np.repeat(units_u, config.heads_per_unit if pool in "qo" else 1)


@dataclass(repr=False)
class DeciCheckpoint(TensorCheckpoint):
    """A file of architecture `deci`, as a `WeightSource`; heads that it leaves out read as zeros.

    Attributes:
      kept_lu: bool [L, U], the units that it holds.
      norms: the attention's norms of layers without heads; ones where there is none.
    """

    kept_lu: np.ndarray = field(default_factory=lambda: np.ones((0, 0), bool))
    norms: Mapping[int, list[float]] = field(default_factory=dict)

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        if layer is None:
            return super().read(name, layer, rows)
        kept_n = _heads_of(self.kept_lu[layer], self.config, name)
        if kept_n is None:
            if name == "attn_norm_ld" and not self.kept_lu[layer].any():
                ones = np.ones(self.config.hidden_size)
                norm = np.asarray(self.norms.get(layer, ones), self.dtype(name))
                return finite.check_weights(norm, NORM.format(layer=layer), self.path)
            return super().read(name, layer)
        wanted_n = np.arange(len(kept_n)) if rows is None else np.asarray(rows, int)
        values = np.zeros((len(wanted_n), *slice_shape(self.config, name)[1:]), self.dtype(name))
        here_n = kept_n[wanted_n]
        if here_n.any():
            # Where each head lies among those that the file holds.
            place_n = np.cumsum(kept_n) - 1
            values[here_n] = super().read(name, layer, place_n[wanted_n[here_n]].tolist())
        return values

    def _expected(self) -> dict[str, keys.Tensor]:
        super()._expected()
        return tensors(self.table, self.config, self.kept_lu)


@dataclass(frozen=True)
class Heads:
    """The heads of a `deci` file.

    Attributes:
      units, group: key/value heads of a layer, kept or dropped, and query heads for each.
      kept_lu: bool [L, U], the units that the file holds.
      sharing: the map that drops the others; None if there are none.
      norms: of layers without heads.
    """

    units: int
    group: int
    kept_lu: np.ndarray
    sharing: SharingMap | None
    norms: Mapping[int, list[float]]


def read(header: GgufHeader) -> Heads:
    """The heads of a `deci` file: those of its map, or of a foreign file the first ones of every layer.

    Raises:
      HeadshareError: counts that cannot be, or layers that group their heads differently or have linear attention.
    """
    heads_l, kv_l = _counts(header, HEADS), _counts(header, KV_HEADS)
    groups = {heads // kv if kv and heads % kv == 0 else 0 for heads, kv in zip(heads_l, kv_l, strict=True) if heads}
    if len(groups) != 1 or 0 in groups or any(kv for heads, kv in zip(heads_l, kv_l, strict=True) if not heads):
        raise HeadshareError(
            f"The layers of {header.path} group query heads by key/value heads in different ways, which is not "
            "supported."
        )
    (group,) = groups
    text = header.metadata.get(OWN_MAP)
    if not isinstance(text, str):
        units = max(kv_l)
        kept_lu = np.arange(units) < np.asarray(kv_l)[:, None]
        flat_lu = np.arange(kept_lu.size).reshape(kept_lu.shape)
        donor_lu = np.where(kept_lu, flat_lu, DROPPED)
        sharing = None if kept_lu.all() else SharingMap(donor_lu, np.full(kept_lu.shape, np.nan), group)
        return Heads(units, group, kept_lu, sharing, {})
    # The heads of slim units are there in full.
    sharing = replace(SharingMap.from_json(text), widths=None)
    units = sharing.donor.shape[1]
    kept_lu = np.logical_not(sharing.dropped)
    # One unit of zeros may stand for a layer that lost all.
    kept_lu[:, 0] |= (kept_lu.sum(axis=1) == 0) & (np.resize(kv_l, len(kept_lu)) == 1)
    if sharing.receives.any() or sharing.heads_per_unit != group or kept_lu.sum(axis=1).tolist() != kv_l:
        raise HeadshareError(f"{KV_HEADS} in {header.path} disagrees with its map; fetch it again.")
    norms = {
        layer: norm
        for layer in range(len(kv_l))
        if isinstance(norm := header.metadata.get(NORM.format(layer=layer)), list)
    }
    return Heads(units, group, kept_lu, sharing, norms)


def _counts(header: GgufHeader, name: str) -> list[int]:
    """A number for every layer."""
    layers, value = header.metadata.get("deci.block_count"), header.metadata.get(name)
    if not isinstance(layers, int) or not 0 < layers <= len(header.tensors):
        raise HeadshareError(f"{header.path} has no usable deci.block_count; fetch it again.")
    counts: list[Any] = value if isinstance(value, list) else [value] * layers
    if len(counts) != layers or not all(type(count) is int and 0 <= count < 2**16 for count in counts):
        raise HeadshareError(f"{name} in {header.path} must have a whole number for each of {layers} layers.")
    return counts
