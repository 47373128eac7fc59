"""The output head: logits of features, and the normalisation of its rows in Baichuan-2."""

import jax
import jax.numpy as jnp


def head_logits(features_btd: jax.Array, head_vd: jax.Array) -> jax.Array:
    """Logits, float32 [..., V], of features [..., D]."""
    return jnp.einsum("...d,vd->...v", features_btd, head_vd, preferred_element_type=jnp.float32)


def normalized_rows(weights_vd: jax.Array) -> jax.Array:
    """Rows divided by their L2 norm, in the input's dtype (Baichuan-2's output head)."""
    rows = weights_vd.astype(jnp.float32)
    norm = jnp.linalg.norm(rows, axis=-1, keepdims=True)
    return (rows / jnp.maximum(norm, 1e-12)).astype(weights_vd.dtype)
