"""The output head: logits of features, and the normalisation of its rows in Baichuan-2."""

import jax
import jax.numpy as jnp


def head_logits(features_btd: jax.Array, head_vd: jax.Array) -> jax.Array:
    """Logits, float32 [..., V], of features [..., D]."""
    return jnp.einsum("...d,vd->...v", features_btd, head_vd, preferred_element_type=jnp.float32)


def most_likely(logits_bv: jax.Array) -> jax.Array:
    """The first token of the largest logit, int32 [...]; V where logits are NaN."""
    # Two plain reductions, which XLA's CPU backend vectorises with what makes the logits; its argmax it does not.
    count = logits_bv.shape[-1]
    at_top_bv = logits_bv == jnp.max(logits_bv, axis=-1, keepdims=True)
    token_v = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), logits_bv.shape)
    return jnp.min(jnp.where(at_top_bv, token_v, count), axis=-1)


def drawn(key: jax.Array, logits_bv: jax.Array) -> jax.Array:
    """A token by its probability, int32 [...]: what `jax.random.categorical` draws."""
    return most_likely(logits_bv + jax.random.gumbel(key, logits_bv.shape, logits_bv.dtype))


def normalized_rows(weights_vd: jax.Array) -> jax.Array:
    """Rows divided by their L2 norm, in the input's dtype (Baichuan-2's output head)."""
    rows = weights_vd.astype(jnp.float32)
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return (rows / jnp.maximum(norm, 1e-12)).astype(weights_vd.dtype)
