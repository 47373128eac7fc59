"""The tables of tensor keys: which tensor of which format holds which parameter, in which layout.

Every row is used in both directions: `decode` reads a checkpoint's tensor into a parameter, `encode` writes it back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headshare_jax import parameters
from headshare_jax.config import LlamaConfig
from headshare_jax.parameters import PARAMETERS


@dataclass(frozen=True)
class Layout:
    """A reversible rearrangement between a checkpoint's tensor and a parameter's slice for one layer.

    Attributes:
      decode, encode: take an array and H, the width of a head; one may hold any number of a layer's heads.
      heads_axis: axis of the tensor along which heads lie one after another, where it holds heads.
    """

    decode: Callable[[np.ndarray, int], np.ndarray]
    encode: Callable[[np.ndarray, int], np.ndarray]
    heads_axis: int = 0


@dataclass(frozen=True)
class Key:
    """Where a parameter lies in a checkpoint.

    Attributes:
      template: tensor name, with `{layer}` where there is one for every layer.
      layout: rearrangement of the tensor into the parameter.
      part, parts: the tensor fuses this many parameters of equal size along its first axis; this is number `part`.
    """

    template: str
    layout: Layout
    part: int = 0
    parts: int = 1

    def name(self, layer: int | None) -> str:
        """The tensor's name in this layer."""
        return self.template.format(layer=layer)


@dataclass(frozen=True)
class Cut:
    """Slices of one axis of a tensor, in the order in which they are wanted."""

    axis: int
    slices: Sequence[slice]

    def of(self, tensor: Any) -> np.ndarray:
        """The slices of an array, or of what gives arrays where it is sliced, side by side."""
        before = (slice(None),) * self.axis
        return np.concatenate([tensor[(*before, part)] for part in self.slices], self.axis)


def _interleave(rows: np.ndarray, width: int) -> np.ndarray:
    """Rotary pairs from half-split (i, i + H/2) to adjacent (2i, 2i + 1), per head, along the first axis."""
    return rows.reshape(-1, 2, width // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _split_halves(rows: np.ndarray, width: int) -> np.ndarray:
    """Inverse of `_interleave`."""
    return rows.reshape(-1, width // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _heads_in(rows: np.ndarray, width: int) -> np.ndarray:
    return rows.reshape(-1, width, rows.shape[-1]).swapaxes(1, 2)


def _heads_in_back(heads_ndh: np.ndarray, width: int) -> np.ndarray:
    return heads_ndh.swapaxes(1, 2).reshape(-1, heads_ndh.shape[1])


SAME = Layout(lambda tensor, width: tensor, lambda value, width: value)
# [out, in] <-> [in, out]
TRANSPOSED = Layout(lambda tensor, width: tensor.T, lambda value, width: value.T)
# [n * H, D] <-> [n, D, H]
HEADS_IN = Layout(_heads_in, _heads_in_back)
# [D, n * H] <-> [n, H, D]
HEADS_OUT = Layout(
    lambda tensor, width: tensor.T.reshape(-1, width, tensor.shape[0]),
    lambda value, width: value.reshape(-1, value.shape[-1]).T,
    heads_axis=1,
)
# [n * H] <-> [n, H]
HEAD_BIAS = Layout(lambda tensor, width: tensor.reshape(-1, width), lambda value, width: value.reshape(-1))
# llama.cpp stores q and k with adjacent rotary pairs.
HEADS_IN_ADJACENT = Layout(
    lambda tensor, width: _heads_in(_split_halves(tensor, width), width),
    lambda value, width: _interleave(_heads_in_back(value, width), width),
)
HEAD_BIAS_ADJACENT = Layout(
    lambda tensor, width: _split_halves(tensor, width).reshape(-1, width),
    lambda value, width: _interleave(value.reshape(-1), width),
)

KeyTable = Mapping[str, Key]

LLAMA: KeyTable = {
    "embed_vd": Key("model.embed_tokens.weight", SAME),
    "attn_norm_ld": Key("model.layers.{layer}.input_layernorm.weight", SAME),
    "q_pool_pdh": Key("model.layers.{layer}.self_attn.q_proj.weight", HEADS_IN),
    "k_pool_pdh": Key("model.layers.{layer}.self_attn.k_proj.weight", HEADS_IN),
    "v_pool_pdh": Key("model.layers.{layer}.self_attn.v_proj.weight", HEADS_IN),
    "o_pool_phd": Key("model.layers.{layer}.self_attn.o_proj.weight", HEADS_OUT),
    "q_bias_ph": Key("model.layers.{layer}.self_attn.q_proj.bias", HEAD_BIAS),
    "k_bias_ph": Key("model.layers.{layer}.self_attn.k_proj.bias", HEAD_BIAS),
    "v_bias_ph": Key("model.layers.{layer}.self_attn.v_proj.bias", HEAD_BIAS),
    "o_bias_ld": Key("model.layers.{layer}.self_attn.o_proj.bias", SAME),
    "mlp_norm_ld": Key("model.layers.{layer}.post_attention_layernorm.weight", SAME),
    "gate_ldf": Key("model.layers.{layer}.mlp.gate_proj.weight", TRANSPOSED),
    "up_ldf": Key("model.layers.{layer}.mlp.up_proj.weight", TRANSPOSED),
    "down_lfd": Key("model.layers.{layer}.mlp.down_proj.weight", TRANSPOSED),
    "gate_bias_lf": Key("model.layers.{layer}.mlp.gate_proj.bias", SAME),
    "up_bias_lf": Key("model.layers.{layer}.mlp.up_proj.bias", SAME),
    "down_bias_ld": Key("model.layers.{layer}.mlp.down_proj.bias", SAME),
    "final_norm_d": Key("model.norm.weight", SAME),
    "head_vd": Key("lm_head.weight", SAME),
}

BAICHUAN: KeyTable = {
    **LLAMA,
    "q_pool_pdh": Key("model.layers.{layer}.self_attn.W_pack.weight", HEADS_IN, part=0, parts=3),
    "k_pool_pdh": Key("model.layers.{layer}.self_attn.W_pack.weight", HEADS_IN, part=1, parts=3),
    "v_pool_pdh": Key("model.layers.{layer}.self_attn.W_pack.weight", HEADS_IN, part=2, parts=3),
}

GGUF: KeyTable = {
    "embed_vd": Key("token_embd.weight", SAME),
    "attn_norm_ld": Key("blk.{layer}.attn_norm.weight", SAME),
    "q_pool_pdh": Key("blk.{layer}.attn_q.weight", HEADS_IN_ADJACENT),
    "k_pool_pdh": Key("blk.{layer}.attn_k.weight", HEADS_IN_ADJACENT),
    "v_pool_pdh": Key("blk.{layer}.attn_v.weight", HEADS_IN),
    "o_pool_phd": Key("blk.{layer}.attn_output.weight", HEADS_OUT),
    "q_bias_ph": Key("blk.{layer}.attn_q.bias", HEAD_BIAS_ADJACENT),
    "k_bias_ph": Key("blk.{layer}.attn_k.bias", HEAD_BIAS_ADJACENT),
    "v_bias_ph": Key("blk.{layer}.attn_v.bias", HEAD_BIAS),
    "o_bias_ld": Key("blk.{layer}.attn_output.bias", SAME),
    "mlp_norm_ld": Key("blk.{layer}.ffn_norm.weight", SAME),
    "gate_ldf": Key("blk.{layer}.ffn_gate.weight", TRANSPOSED),
    "up_ldf": Key("blk.{layer}.ffn_up.weight", TRANSPOSED),
    "down_lfd": Key("blk.{layer}.ffn_down.weight", TRANSPOSED),
    "gate_bias_lf": Key("blk.{layer}.ffn_gate.bias", SAME),
    "up_bias_lf": Key("blk.{layer}.ffn_up.bias", SAME),
    "down_bias_ld": Key("blk.{layer}.ffn_down.bias", SAME),
    "final_norm_d": Key("output_norm.weight", SAME),
    "head_vd": Key("output.weight", SAME),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint: the parameters it fuses, in order, and its shape."""

    parts: tuple[str, ...]
    layer: int | None
    shape: tuple[int, ...]


def tensors(table: KeyTable, config: LlamaConfig) -> dict[str, Tensor]:
    """Every tensor that a checkpoint of this model holds, by name, in layer order."""
    found: dict[str, Tensor] = {}

    def add(name: str, layer: int | None) -> None:
        key = table[name]
        tensor = key.name(layer)
        before = found[tensor].parts if tensor in found else ()
        shape = encode(table, config, name, np.broadcast_to(np.int8(0), parameters.slice_shape(config, name))).shape
        found[tensor] = Tensor((*before, name), layer, (shape[0] * key.parts, *shape[1:]))

    names = parameters.parameter_names(config)
    layered = [name for name in names if PARAMETERS[name].layered]
    first_layered = names.index(layered[0])
    for name in names[:first_layered]:
        add(name, None)
    for layer in range(config.num_layers):
        for name in layered:
            add(name, layer)
    for name in names[first_layered:]:
        if name not in layered:
            add(name, None)
    return found


def cut(key: Key, config: LlamaConfig, heads: Sequence[int] | None, shape: Sequence[int]) -> Cut | None:
    """What of a tensor of this shape holds a parameter, or some heads of it; None if all of it does."""
    if heads is None and key.parts == 1:
        return None
    axis = 0 if heads is None else key.layout.heads_axis
    size = shape[axis] // key.parts
    first = key.part * size
    if heads is None:
        return Cut(axis, [slice(first, first + size)])
    runs = np.split(heads, np.flatnonzero(np.diff(heads) != 1) + 1)
    edges = [(first + config.head_dim * int(head) for head in (run[0], run[-1] + 1)) for run in runs]
    return Cut(axis, [slice(*edge) for edge in edges])


def decode(table: KeyTable, config: LlamaConfig, name: str, part: np.ndarray) -> np.ndarray:
    """A parameter's slice for one layer, or some heads of it, from what `cut` leaves of the tensor that holds it."""
    return table[name].layout.decode(part, config.head_dim)


def encode(table: KeyTable, config: LlamaConfig, name: str, value: np.ndarray) -> np.ndarray:
    """Inverse of `decode`: a parameter's slice as (its part of) the tensor that holds it."""
    return table[name].layout.encode(value, config.head_dim)
