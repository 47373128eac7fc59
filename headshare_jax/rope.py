"""Rotary position embeddings: frequencies of every supported scaling, and their application."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.config import LlamaConfig, RopeScaling


def inverse_frequencies(config: LlamaConfig, length: jax.Array | int) -> jax.Array | np.ndarray:
    """Angular frequency of each rotary pair, float32 [R // 2], in radians per position.

    Args:
      config: the model's architecture.
      length: number of positions in use, i.e. the highest position + 1; only `dynamic` and `longrope` scaling depend on
        it.
    """
    scaling, width = config.rope_scaling, config.rotary_dim
    exponent_h = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    if scaling is not None and scaling.kind == "dynamic":
        context = config.max_position_embeddings
        stretch = scaling.factor * jnp.maximum(length, context).astype(jnp.float32) / context - (scaling.factor - 1)
        return 1 / jnp.power(config.rope_theta * stretch ** (width / (width - 2)), exponent_h)
    frequency_h = 1 / np.power(np.float32(config.rope_theta), exponent_h)
    if scaling is None:
        return frequency_h
    if scaling.kind == "linear":
        return frequency_h / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        return frequency_h / llama3_divisors(frequency_h, scaling)
    if scaling.kind == "yarn":
        return frequency_h / yarn_divisors(config, scaling)
    short_h, long_h = (np.asarray(each, np.float32) for each in (scaling.short_factor, scaling.long_factor))
    assert scaling.original_max_position_embeddings is not None
    beyond = jnp.asarray(length) > scaling.original_max_position_embeddings
    return jnp.where(beyond, frequency_h / long_h, frequency_h / short_h)


def llama3_divisors(frequency_h: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """What Llama 3.1 divides each unscaled frequency by, float32 [R // 2].

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


def yarn_divisors(config: LlamaConfig, scaling: RopeScaling) -> np.ndarray:
    """What YaRN (arXiv 2309.00071, section 3.2) divides each unscaled frequency by, float32 [R // 2].

    1 for pairs that make `beta_fast` turns or more in the original context, `factor` for `beta_slow` or fewer; between
    them the reciprocal is linear in the pair's place.
    """
    width, context = config.rotary_dim, scaling.original_max_position_embeddings
    assert context is not None

    def place(turns: float) -> float:
        return width * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    span = last - first or 0.001
    slow_h = np.clip((np.arange(width // 2, dtype=np.float32) - first) / span, 0, 1)
    return (1 / (slow_h / scaling.factor + (1 - slow_h))).astype(np.float32)


def rotary_angles(config: LlamaConfig, positions_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position and rotary pair, float32 [B, T, R // 2] each, times the scaling's `scale`."""
    frequency_h = inverse_frequencies(config, jnp.max(positions_bt) + 1)
    angle_bth = positions_bt.astype(jnp.float32)[:, :, None] * frequency_h[None, None, :]
    cos_bth, sin_bth = jnp.cos(angle_bth), jnp.sin(angle_bth)
    if config.rope_scaling is None or config.rope_scaling.scale == 1:
        return cos_bth, sin_bth
    return cos_bth * config.rope_scaling.scale, sin_bth * config.rope_scaling.scale


def rotate(x_btnh: jax.Array, cos_bth: jax.Array, sin_bth: jax.Array, scale: float = 1.0) -> jax.Array:
    """Turns each pair (i, i + R // 2) of every head by its angle, and multiplies by a scale; in the input's dtype.

    Pairs are half-split, as Hugging Face stores them. Features past the first R do not turn.

    Args:
      x_btnh: heads, of any width of at least R.
      cos_bth, sin_bth: of every position and pair, [B or 1, T, R // 2]; or [B or 1, T, K, R // 2] where heads' pairs
        differ, each for N // K heads side by side.
      scale: what all features are multiplied by.
    """
    turning = 2 * cos_bth.shape[-1]
    if scale != 1:
        cos_bth, sin_bth = cos_bth * scale, sin_bth * scale
    x_f32 = x_btnh.astype(jnp.float32)
    first_btnh, second_btnh = jnp.split(x_f32[..., :turning], 2, axis=-1)
    cos_btnh, sin_btnh = (_by_head(angle, x_btnh.shape[2]) for angle in (cos_bth, sin_bth))
    turned = [first_btnh * cos_btnh - second_btnh * sin_btnh, second_btnh * cos_btnh + first_btnh * sin_btnh]
    if turning < x_btnh.shape[-1]:
        turned.append(x_f32[..., turning:] * scale)
    return jnp.concatenate(turned, axis=-1).astype(x_btnh.dtype)


def rotate_queries(q_btnh: jax.Array, cos_bth: jax.Array, sin_bth: jax.Array, head_dim: int) -> jax.Array:
    """`rotate`, and divides by the square root of H: here that costs nothing, on the scores a pass over them.

    H is that of the whole heads, of which `q_btnh` may have some features only.
    """
    return rotate(q_btnh, cos_bth, sin_bth, head_dim**-0.5)


def _by_head(angle: jax.Array, heads: int) -> jax.Array:
    """Angles [B, T, N or 1, R // 2] of heads, from those that `rotate` takes."""
    return angle[:, :, None] if angle.ndim == 3 else jnp.repeat(angle, heads // max(1, angle.shape[2]), axis=2)
