"""What the model is called with: token ids and their positions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.errors import HeadshareError


def check_tokens(tokens_bt: Any, vocab_size: int) -> None:
    """Raises HeadshareError unless tokens are whole numbers [B, T], and, where values are known, of the vocabulary."""
    dtype, shape = getattr(tokens_bt, "dtype", type(tokens_bt).__name__), np.shape(tokens_bt)
    if not isinstance(tokens_bt, jax.Array | np.ndarray) or len(shape) != 2 or not jnp.issubdtype(dtype, jnp.integer):
        raise HeadshareError(f"Tokens must be an array of whole numbers [B, T], not {dtype} {list(shape)}.")
    if (
        isinstance(tokens_bt, jax.core.Tracer)
        or not tokens_bt.size
        or not getattr(tokens_bt, "is_fully_addressable", True)
    ):
        return
    # Computed by JAX they would be traced inside of `jit`, even of an array that is not.
    values_bt = np.asarray(tokens_bt)
    low, high = int(values_bt.min()), int(values_bt.max())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise HeadshareError(f"The tokens hold {wrong}, which is outside the model's vocabulary of {vocab_size}.")


def positions(tokens_bt: jax.Array, segments_bt: jax.Array | None) -> jax.Array:
    """Position of every token within its segment, int32 [B, T]."""
    place_bt = jnp.broadcast_to(jnp.arange(tokens_bt.shape[1], dtype=jnp.int32)[None], tokens_bt.shape)
    if segments_bt is None:
        return place_bt
    begins_bt = jnp.diff(segments_bt, axis=1, prepend=segments_bt[:, :1] - 1) != 0
    return place_bt - jax.lax.cummax(jnp.where(begins_bt, place_bt, 0), axis=1)
