"""The key/value cache."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions already seen.

    Attributes:
      k_lbskh: keys, [L, B, S, K, H], in the compute dtype; rotary embedding already applied.
      v_lbskh: values, likewise, without it.
      length: int32 scalar, slots filled; the same for every row of the batch.
      prompt_b: int32 [B], tokens of every row's prompt, which fill its first slots.
      prompt_slots: int32 scalar, slots that prompts take; from its prompt's end to here a row holds padding.
    """

    k_lbskh: jax.Array
    v_lbskh: jax.Array
    length: jax.Array
    prompt_b: jax.Array
    prompt_slots: jax.Array

    def with_layer(self, layer: jax.Array | int, k_btkh: jax.Array, v_btkh: jax.Array) -> "KVCache":
        """The cache with a layer's next T keys and values; `length` stays, for other layers write there too."""
        at = (layer, 0, self.length, 0, 0)
        return replace(
            self,
            k_lbskh=jax.lax.dynamic_update_slice(self.k_lbskh, k_btkh[None], at),
            v_lbskh=jax.lax.dynamic_update_slice(self.v_lbskh, v_btkh[None], at),
        )

    def seen_by(self, slot_t: jax.Array) -> jax.Array:
        """bool [B, T, S]: which slots the tokens in some slots see, int32 [T]: no later one, and no padding."""
        slot_s = jnp.arange(self.k_lbskh.shape[2], dtype=jnp.int32)
        earlier_ts = slot_s[None, :] <= slot_t[:, None]
        used_bs = (slot_s[None, :] < self.prompt_b[:, None]) | (slot_s[None, :] >= self.prompt_slots)
        return earlier_ts[None] & used_bs[:, None]

    def positions(self, slot_t: jax.Array) -> jax.Array:
        """int32 [B, T]: positions of the tokens in some slots after the prompts, int32 [T]."""
        return slot_t[None, :] - (self.prompt_slots - self.prompt_b)[:, None]
