"""One decoder layer: the attention block and the MLP block, which everything that runs a model runs.

A block is a pure function of a configuration, a `reading.Layer` and activations: in training, for prompts, decoding,
perplexity, calibration, gradients of predictions and refits alike. Each ends in a linear map of its features: head
outputs, or gated MLP units.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from headshare_jax.config import LlamaConfig
from headshare_jax.model.attention import HEADS, Window
from headshare_jax.model.stacks import Layer
from headshare_jax.rope import rotate, rotate_queries

Kept = TypeVar("Kept")
# Cosine and sine of every position and rotary pair, as `rope.rotary_angles` gives them.
Angles = tuple[jax.Array, jax.Array]
# From queries, keys, values and the window to head outputs [B, T, N, H], and whatever is kept besides, such as a
# cache.
Attend = Callable[[jax.Array, jax.Array, jax.Array, Window], tuple[jax.Array, Kept]]
# A window that no sequence is longer than.
UNLIMITED = 2**30

# What costs a product or the attention; norms and the gated product are computed again in the backward pass, which is
# cheaper than writing them to memory and reading them back.
_COSTLY = ("query", "key", "value", HEADS, "middle", "gate", "up")
# Activations of a layer kept for the backward pass, most first; everything else is computed again.
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.save_only_these_names(*_COSTLY),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

_ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


def attention_block(
    config: LlamaConfig,
    layer: Layer,
    x_btd: jax.Array,
    angles: Angles,
    attend: Attend[Kept],
    at_b: jax.Array | None = None,
) -> tuple[jax.Array, Kept]:
    """The residual stream behind attention, and what `attend` kept; arguments as of `head_outputs`.

    With `at_b`, the stream is that of one token of every row, [B, 1, D].
    """
    heads_btnh, kept = head_outputs(config, layer, x_btd, angles, attend, at_b)
    x_btd = _at(x_btd, at_b)
    return checkpoint_name(x_btd + attention_output(layer, heads_btnh), "middle"), kept


def mlp_block(config: LlamaConfig, layer: Layer, x_btd: jax.Array) -> jax.Array:
    """The residual stream behind the MLP, [B, T, D]."""
    return x_btd + mlp_output(layer, mlp_units(config, layer, x_btd)).reshape(x_btd.shape)


def head_outputs(
    config: LlamaConfig,
    layer: Layer,
    x_btd: jax.Array,
    angles: Angles,
    attend: Attend[Kept],
    at_b: jax.Array | None = None,
) -> tuple[jax.Array, Kept]:
    """What attention's output projection multiplies, [B, T, N, H], and what `attend` kept.

    Args:
      config: the architecture.
      layer: the layer; N, K and the widths of its heads are those of its weights.
      x_btd: the residual stream.
      angles: of the stream's positions, [B or 1, T, H / 2] each.
      attend: the attention.
      at_b: int32 [B], one token of every row whose output is wanted: no other's query is computed. By default all.
    """
    normed_btd = rms_norm(x_btd, _norm(layer, "attn_norm_ld"), config.rms_norm_eps)
    angles = _angles(layer, angles)
    k_btkh = _normed_heads(config, layer, "k_norm_lh", layer.heads_in("k", normed_btd))
    k_btkh = checkpoint_name(rotate(k_btkh, *angles), "key")
    v_btkh = checkpoint_name(layer.heads_in("v", normed_btd), "value")
    normed_btd = _at(normed_btd, at_b)
    cos_bth, sin_bth = angles if at_b is None else (angle[0][at_b[:, None]] for angle in angles)
    q_btnh = _normed_heads(config, layer, "q_norm_lh", layer.heads_in("q", normed_btd))
    q_btnh = checkpoint_name(rotate_queries(q_btnh, cos_bth, sin_bth, config.head_dim), "query")
    window_l = layer.vector("window_l")
    return attend(q_btnh, k_btkh, v_btkh, config.windows[0] if window_l is None else window_l)


def layer_kinds(config: LlamaConfig) -> dict[str, np.ndarray]:
    """In what layers differ besides weights, by name: nothing where they are all alike.

    `window_l`, int32 [L], tokens that a query sees; `rotates_l`, bool [L], whether queries and keys turn. They are read
    layer by layer beside the parameters (`Layer.vector`), so that one loop runs layers of all kinds.
    """
    kinds: dict[str, np.ndarray] = {}
    if len(set(config.windows)) > 1:
        kinds["window_l"] = np.array([UNLIMITED if each is None else each for each in config.windows], np.int32)
    if config.nope_layers:
        kinds["rotates_l"] = ~np.isin(np.arange(config.num_layers), config.nope_layers)
    return kinds


def attention_output(layer: Layer, heads_btnh: jax.Array) -> jax.Array:
    """What attention adds to the residual stream, [B, T, D], from its head outputs."""
    return _biased(layer.heads_out(heads_btnh), layer, "o_bias_ld")


def mlp_units(config: LlamaConfig, layer: Layer, x_btd: jax.Array) -> jax.Array:
    """What the MLP's down projection multiplies, [B * T, F], from the residual stream [B, T, D]."""
    normed_btd = rms_norm(x_btd, _norm(layer, "mlp_norm_ld"), config.rms_norm_eps)
    # Tokens along one axis: the gradient of a weight sums over them, and over two axes XLA would first copy.
    normed_md = normed_btd.reshape(-1, normed_btd.shape[-1])
    gate_mf = checkpoint_name(_biased(layer.product("gate_ldf", normed_md), layer, "gate_bias_lf"), "gate")
    up_mf = checkpoint_name(_biased(layer.product("up_ldf", normed_md), layer, "up_bias_lf"), "up")
    return _ACTIVATIONS[config.hidden_act](gate_mf) * up_mf


def mlp_output(layer: Layer, units_mf: jax.Array) -> jax.Array:
    """What the MLP adds to the residual stream, [B * T, D], from its units."""
    return _biased(layer.product("down_lfd", units_mf), layer, "down_bias_ld")


def rms_norm(x_btd: jax.Array, scale_d: jax.Array, eps: float) -> jax.Array:
    """RMSNorm, computed in float32, in the type of x."""
    x_f32 = x_btd.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x_f32), axis=-1, keepdims=True) + eps)
    return (x_f32 * inverse).astype(x_btd.dtype) * _along_last(scale_d.astype(x_btd.dtype), x_btd)


def _angles(layer: Layer, angles: Angles) -> Angles:
    """The angles by which a layer turns its queries and keys: none in a layer without rotary embedding.

    Of key heads that keep some rotary pairs only, the pairs' own, [B or 1, T, K, P].
    """
    rotates, pair_kp = layer.vector("rotates_l"), layer.vector("pair_lkp")
    if pair_kp is not None:
        angles = angles[0][..., pair_kp], angles[1][..., pair_kp]
    if rotates is None:
        return angles
    cos_bth, sin_bth = angles
    return jnp.where(rotates, cos_bth, jnp.ones_like(cos_bth)), jnp.where(rotates, sin_bth, jnp.zeros_like(sin_bth))


def _normed_heads(config: LlamaConfig, layer: Layer, name: str, x_btnh: jax.Array) -> jax.Array:
    """Heads, each normalised along its width where the architecture does that."""
    scale_h = layer.vector(name)
    return x_btnh if scale_h is None else rms_norm(x_btnh, scale_h, config.rms_norm_eps)


def _norm(layer: Layer, name: str) -> jax.Array:
    scale_d = layer.vector(name)
    assert scale_d is not None
    return scale_d


def _biased(y: jax.Array, layer: Layer, name: str) -> jax.Array:
    bias = layer.vector(name)
    return y if bias is None else y + _along_last(bias.astype(y.dtype), y)


def _along_last(vector: jax.Array, like: jax.Array) -> jax.Array:
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def _at(x_btd: jax.Array, at_b: jax.Array | None) -> jax.Array:
    """One token of every row, [B, 1, D]; all if none is named."""
    return x_btd if at_b is None else jnp.take_along_axis(x_btd, at_b[:, None, None], axis=1)
