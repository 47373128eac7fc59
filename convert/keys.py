"""The tables of tensor keys: which tensor of which format holds which parameter, in which layout.

Every row is used in both directions: `decode` reads a checkpoint's tensor into a parameter, `encode` writes it back.
Parameters to which a table gives the same tensor are fused in it: side by side along its first axis, in the table's
order, each as large as its own shape asks for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from headshare_jax import parameters
from headshare_jax.config import LlamaConfig
from headshare_jax.families import FAMILIES
from headshare_jax.output_head import normalized_rows
from headshare_jax.parameters import PARAMETERS
from headshare_jax.sharing.source import WeightSource, runs, stored_rows


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
      layout: rearrangement of the tensor, or of this parameter's part of it, into the parameter.
      grouped: fused parameters do not lie one after the other as a whole, but what each has for the first key/value
        head, then what each has for the second, and so on. Such tensors are only read.
    """

    template: str
    layout: Layout
    grouped: bool = False

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
# Of some architectures, llama.cpp stores q and k with adjacent rotary pairs.
HEADS_IN_ADJACENT = Layout(
    lambda tensor, width: _heads_in(_split_halves(tensor, width), width),
    lambda value, width: _interleave(_heads_in_back(value, width), width),
)
HEAD_BIAS_ADJACENT = Layout(
    lambda tensor, width: _split_halves(tensor, width).reshape(-1, width),
    lambda value, width: _interleave(value.reshape(-1), width),
)

KeyTable = Mapping[str, Key]
# What gives a tensor's values, some rows of its first axis after others.
Reads = Sequence[Callable[[], np.ndarray]]

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
    "q_norm_lh": Key("model.layers.{layer}.self_attn.q_norm.weight", SAME),
    "k_norm_lh": Key("model.layers.{layer}.self_attn.k_norm.weight", SAME),
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
    **dict.fromkeys(
        ("q_pool_pdh", "k_pool_pdh", "v_pool_pdh"), Key("model.layers.{layer}.self_attn.W_pack.weight", HEADS_IN)
    ),
}

PHI3: KeyTable = {
    **LLAMA,
    **dict.fromkeys(
        ("q_pool_pdh", "k_pool_pdh", "v_pool_pdh"), Key("model.layers.{layer}.self_attn.qkv_proj.weight", HEADS_IN)
    ),
    **dict.fromkeys(("gate_ldf", "up_ldf"), Key("model.layers.{layer}.mlp.gate_up_proj.weight", TRANSPOSED)),
}

INTERNLM2: KeyTable = {
    "embed_vd": Key("model.tok_embeddings.weight", SAME),
    "attn_norm_ld": Key("model.layers.{layer}.attention_norm.weight", SAME),
    **dict.fromkeys(
        ("q_pool_pdh", "k_pool_pdh", "v_pool_pdh"), Key("model.layers.{layer}.attention.wqkv.weight", HEADS_IN, True)
    ),
    "o_pool_phd": Key("model.layers.{layer}.attention.wo.weight", HEADS_OUT),
    **dict.fromkeys(
        ("q_bias_ph", "k_bias_ph", "v_bias_ph"), Key("model.layers.{layer}.attention.wqkv.bias", HEAD_BIAS, True)
    ),
    "o_bias_ld": Key("model.layers.{layer}.attention.wo.bias", SAME),
    "mlp_norm_ld": Key("model.layers.{layer}.ffn_norm.weight", SAME),
    "gate_ldf": Key("model.layers.{layer}.feed_forward.w1.weight", TRANSPOSED),
    "up_ldf": Key("model.layers.{layer}.feed_forward.w3.weight", TRANSPOSED),
    "down_lfd": Key("model.layers.{layer}.feed_forward.w2.weight", TRANSPOSED),
    "final_norm_d": Key("model.norm.weight", SAME),
    "head_vd": Key("output.weight", SAME),
}

# By the name of a class at Hugging Face; the others name their tensors as Llama does.
HUGGING_FACE: Mapping[str, KeyTable] = {
    "BaichuanForCausalLM": BAICHUAN,
    "BaiChuanForCausalLM": BAICHUAN,
    "InternLM2ForCausalLM": INTERNLM2,
    "Phi3ForCausalLM": PHI3,
}

_GGUF_ADJACENT: KeyTable = {
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
_GGUF_HALVES: KeyTable = {
    **_GGUF_ADJACENT,
    "q_pool_pdh": Key("blk.{layer}.attn_q.weight", HEADS_IN),
    "k_pool_pdh": Key("blk.{layer}.attn_k.weight", HEADS_IN),
    "q_bias_ph": Key("blk.{layer}.attn_q.bias", HEAD_BIAS),
    "k_bias_ph": Key("blk.{layer}.attn_k.bias", HEAD_BIAS),
    "q_norm_lh": Key("blk.{layer}.attn_q_norm.weight", SAME),
    "k_norm_lh": Key("blk.{layer}.attn_k_norm.weight", SAME),
}

# By llama.cpp's name of the architecture, which says how rotary pairs lie.
GGUF: Mapping[str, KeyTable] = {
    **dict.fromkeys(("llama", "deci", "internlm2", "smollm3"), _GGUF_ADJACENT),
    **dict.fromkeys(("qwen2", "qwen3"), _GGUF_HALVES),
    "phi3": {
        **_GGUF_HALVES,
        **dict.fromkeys(("q_pool_pdh", "k_pool_pdh", "v_pool_pdh"), Key("blk.{layer}.attn_qkv.weight", HEADS_IN)),
        **dict.fromkeys(("gate_ldf", "up_ldf"), Key("blk.{layer}.ffn_up.weight", TRANSPOSED)),
    },
    "seed_oss": {**_GGUF_HALVES, "mlp_norm_ld": Key("blk.{layer}.post_attention_norm.weight", SAME)},
}


def of_class(architecture: str) -> KeyTable:
    """The table of a class at Hugging Face."""
    return HUGGING_FACE.get(architecture, LLAMA)


def of_family(family: str) -> KeyTable:
    """The table of a family's own class at Hugging Face."""
    return of_class(FAMILIES[family].architecture)


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
        tensor = table[name].name(layer)
        if tensor not in found:
            parts = fused(table, config, name)
            shapes = [_part_shape(table, config, part) for part in parts]
            found[tensor] = Tensor(parts, layer, (sum(shape[0] for shape in shapes), *shapes[0][1:]))

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


def fused(table: KeyTable, config: LlamaConfig, name: str) -> tuple[str, ...]:
    """The parameters of the tensor that holds this one, in order."""
    template = table[name].template
    return tuple(other for other in table if table[other].template == template and PARAMETERS[other].exists(config))


def _part_shape(table: KeyTable, config: LlamaConfig, name: str) -> tuple[int, ...]:
    """Shape of what a tensor holds of one parameter."""
    like = np.broadcast_to(np.int8(0), parameters.slice_shape(config, name))
    return encode(table, config, name, like).shape


def cut(table: KeyTable, config: LlamaConfig, name: str, rows: Sequence[int] | None = None) -> Cut | None:
    """What of its tensor holds a parameter, or those of its rows that a source is asked for; None if all of it does."""
    key, parts = table[name], fused(table, config, name)
    if rows is None and len(parts) == 1:
        return None
    axis = 0 if rows is None else key.layout.heads_axis
    groups = config.num_kv_heads if key.grouped else 1
    sizes = {part: _part_shape(table, config, part)[axis] // groups for part in parts}
    before, size = sum(sizes[part] for part in parts[: parts.index(name)]), sizes[name]
    # Where the wanted pieces begin among the parameter's own rows, and then among the tensor's.
    width = size if rows is None else 1 if PARAMETERS[name].pool is None else config.head_dim
    firsts = np.asarray(range(groups) if rows is None else rows) * width
    starts = firsts // size * sum(sizes.values()) + before + firsts % size
    return Cut(axis, runs(starts, width))


def decode(table: KeyTable, config: LlamaConfig, name: str, part: np.ndarray) -> np.ndarray:
    """A parameter's slice for one layer, or some heads of it, from what `cut` leaves of the tensor that holds it."""
    return table[name].layout.decode(part, config.head_dim)


def encode(table: KeyTable, config: LlamaConfig, name: str, value: np.ndarray) -> np.ndarray:
    """Inverse of `decode`: a parameter's slice as (its part of) the tensor that holds it."""
    return table[name].layout.encode(value, config.head_dim)


def encoded(table: KeyTable, source: WeightSource, tensor: Tensor) -> np.ndarray:
    """One tensor of a checkpoint; a normalised output head (Baichuan-2) already normalised.

    Besides a fused tensor, one of its parts is in memory.
    """

    if len(tensor.parts) == 1:
        return _encoded_rows(table, source, tensor.parts[0], tensor.layer)
    whole, end = np.empty(tensor.shape, dtype(source, tensor)), 0
    for name in tensor.parts:
        values = _encoded_rows(table, source, name, tensor.layer)
        start, end = end, end + len(values)
        whole[start:end] = values
    return whole


def reads(table: KeyTable, source: WeightSource, tensor: Tensor) -> Reads:
    """What gives the same: one, or of a tensor without layers as many as `piece_shape` has."""
    if tensor.layer is not None:
        return [partial(encoded, table, source, tensor)]
    (name,) = tensor.parts
    return [partial(_encoded_rows, table, source, name, None, rows) for _, _, rows in stored_rows(source, name)]


def _encoded_rows(
    table: KeyTable, source: WeightSource, name: str, layer: int | None, rows: Sequence[int] | None = None
) -> np.ndarray:
    value = source.read(name, layer, rows)
    if name == "head_vd" and source.config.normalize_head:
        value = np.asarray(normalized_rows(jnp.asarray(value)))
    return encode(table, source.config, name, value)


def dtype(source: WeightSource, tensor: Tensor) -> np.dtype[Any]:
    """The type that holds a tensor's values exactly."""
    types = {source.dtype(name) for name in tensor.parts}
    return types.pop() if len(types) == 1 else np.dtype(np.float32)
