"""Rotary position embeddings: frequencies of every supported scaling, and their application."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.config import LlamaConfig, RopeScaling


def inverse_frequencies(config: LlamaConfig, length: jax.Array | int) -> jax.Array | np.ndarray:
    """Angular frequency of each rotary pair, float32 [H // 2], in radians per position.

    Args:
      config: the model's architecture.
      length: number of positions in use, i.e. the highest position + 1; only `dynamic` scaling depends on it.
    """
    head_dim, scaling = config.head_dim, config.rope_scaling
    exponent_h = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    if scaling is None:
        return 1 / np.power(np.float32(config.rope_theta), exponent_h)
    if scaling.kind == "dynamic":
        context = config.max_position_embeddings
        stretch = scaling.factor * jnp.maximum(length, context).astype(jnp.float32) / context - (scaling.factor - 1)
        return 1 / jnp.power(config.rope_theta * stretch ** (head_dim / (head_dim - 2)), exponent_h)
    frequency_h = 1 / np.power(np.float32(config.rope_theta), exponent_h)
    if scaling.kind == "linear":
        return frequency_h / np.float32(scaling.factor)
    return frequency_h / llama3_divisors(frequency_h, scaling)


def llama3_divisors(frequency_h: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """What Llama 3.1 divides each unscaled frequency by, float32 [H // 2].

    1 below the shorter wavelength limit, `factor` above the longer one, and between them the divisor whose
    reciprocal is linear in the number of turns the pair makes over the original context.
    """
    assert scaling.low_freq_factor is not None
    assert scaling.high_freq_factor is not None
    assert scaling.original_max_position_embeddings is not None
    turns_h = scaling.original_max_position_embeddings * frequency_h / np.float32(2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    smooth_h = np.clip((turns_h - scaling.low_freq_factor) / span, 0, 1)
    return (1 / ((1 - smooth_h) / scaling.factor + smooth_h)).astype(np.float32)


def rotary_angles(config: LlamaConfig, positions_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position and rotary pair, float32 [B, T, H // 2] each."""
    frequency_h = inverse_frequencies(config, jnp.max(positions_bt) + 1)
    angle_bth = positions_bt.astype(jnp.float32)[:, :, None] * frequency_h[None, None, :]
    return jnp.cos(angle_bth), jnp.sin(angle_bth)


def rotate(x_btnh: jax.Array, cos_bth: jax.Array, sin_bth: jax.Array) -> jax.Array:
    """Turns each pair (i, i + H // 2) of every head by its angle; the result has the input's dtype.

    Pairs are half-split, as Hugging Face stores them.
    """
    first_btnh, second_btnh = jnp.split(x_btnh.astype(jnp.float32), 2, axis=-1)
    cos_btnh, sin_btnh = cos_bth[:, :, None, :], sin_bth[:, :, None, :]
    turned = (first_btnh * cos_btnh - second_btnh * sin_btnh, second_btnh * cos_btnh + first_btnh * sin_btnh)
    return jnp.concatenate(turned, axis=-1).astype(x_btnh.dtype)


def rotate_queries(q_btnh: jax.Array, cos_bth: jax.Array, sin_bth: jax.Array) -> jax.Array:
    """`rotate`, and divides by the square root of H: here that costs nothing, on the scores a pass over them."""
    scale = q_btnh.shape[-1] ** -0.5
    return rotate(q_btnh, cos_bth * scale, sin_bth * scale)
