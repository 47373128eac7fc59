"""The key/value cache."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from headshare_jax.config import LlamaConfig
from headshare_jax.model.mesh import BATCH, rows_of


def cache_slots(config: LlamaConfig, length: int) -> int:
    """Slots that a cache for so many positions of every row has: no more than its window where all layers have one."""
    windows = [length if window is None else window for window in config.windows]
    return min(length, max(windows))


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

    def with_prompts(
        self, layer: jax.Array | int, k_btkh: jax.Array, v_btkh: jax.Array, prompt_b: jax.Array
    ) -> "KVCache":
        """The empty cache with a layer's keys and values of T tokens, of which `prompt_b` are a row's prompt."""
        return self.with_layer(layer, k_btkh, v_btkh)

    def with_layer(self, layer: jax.Array | int, k_btkh: jax.Array, v_btkh: jax.Array) -> "KVCache":
        """The cache with a layer's next T keys and values; `length` stays, for other layers write there too."""
        return self._written(layer, self.length, k_btkh, v_btkh)

    def seen_by(self, slot_t: jax.Array) -> jax.Array:
        """bool [B, T, S]: which slots the tokens in some slots see, int32 [T]: no later one, and no padding."""
        slot_s = self._slots()
        earlier_ts = slot_s[None, :] <= slot_t[:, None]
        used_bs = (slot_s[None, :] < self.prompt_b[:, None]) | (slot_s[None, :] >= self.prompt_slots)
        return earlier_ts[None] & used_bs[:, None]

    def behind(self, slot_t: jax.Array) -> jax.Array:
        """int32 [B, T, S]: by how many tokens what a slot holds comes before the tokens in some slots, int32 [T]."""
        slot_s, padding_b = self._slots(), self.prompt_slots - self.prompt_b
        position_bs = slot_s[None] - jnp.where(slot_s[None] < self.prompt_b[:, None], 0, padding_b[:, None])
        return self.positions(slot_t)[:, :, None] - position_bs[:, None]

    def positions(self, slot_t: jax.Array) -> jax.Array:
        """int32 [B, T]: positions of the tokens in some slots after the prompts, int32 [T]."""
        return slot_t[None, :] - (self.prompt_slots - self.prompt_b)[:, None]

    def _slots(self) -> jax.Array:
        return jnp.arange(self.k_lbskh.shape[2], dtype=jnp.int32)

    def _written(self, layer: jax.Array | int, slot: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array) -> "KVCache":
        at = (layer, 0, slot, 0, 0)
        return replace(
            self,
            k_lbskh=jax.lax.dynamic_update_slice(self.k_lbskh, k_btkh[None], at),
            v_lbskh=jax.lax.dynamic_update_slice(self.v_lbskh, v_btkh[None], at),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingCache(KVCache):
    """Keys and values of every row's last S positions, for a window of S: a new token takes the oldest one's slot.

    Rows end together, so that one slot is the oldest of all of them: slot n % S is the n-th's, counted with the padding
    that a row with a shorter prompt has before it.
    """

    def with_prompts(
        self, layer: jax.Array | int, k_btkh: jax.Array, v_btkh: jax.Array, prompt_b: jax.Array
    ) -> KVCache:
        last = jnp.int32(k_btkh.shape[1] - 1)
        # Before a prompt's first token there is nothing, for which that token stands.
        index_bs = jnp.maximum(prompt_b[:, None] - 1 - self.behind(last[None])[0], 0)
        k_bskh, v_bskh = (
            jnp.take_along_axis(each_btkh, index_bs[:, :, None, None], axis=1) for each_btkh in (k_btkh, v_btkh)
        )
        return self._written(layer, jnp.int32(0), k_bskh, v_bskh)

    def with_layer(self, layer: jax.Array | int, k_btkh: jax.Array, v_btkh: jax.Array) -> KVCache:
        """The cache with a layer's keys and values of one more token."""
        return self._written(layer, self.length % self.k_lbskh.shape[2], k_btkh, v_btkh)

    def seen_by(self, slot_t: jax.Array) -> jax.Array:
        return self.behind(slot_t) <= self.positions(slot_t)[:, :, None]

    def behind(self, slot_t: jax.Array) -> jax.Array:
        slot_s = self._slots()
        return ((slot_t[:, None] - slot_s[None]) % len(slot_s))[None]


@partial(jax.jit, static_argnames=("config", "dtype", "batch", "slots", "mesh"))
def empty_cache(config: LlamaConfig, dtype: str, batch: int, slots: int, mesh: Mesh | None = None) -> KVCache:
    """A cache with room for `slots` positions of every row; of windows, no more than the last ones."""
    room = cache_slots(config, slots)
    zeros = jnp.zeros((config.num_layers, batch, room, config.num_kv_heads, config.head_dim), dtype)
    if mesh is not None:
        zeros = jax.lax.with_sharding_constraint(zeros, cache_sharding(config, mesh, batch))
    return (KVCache if room == slots else RingCache)(
        k_lbskh=zeros,
        v_lbskh=zeros,
        length=jnp.zeros((), jnp.int32),
        prompt_b=jnp.zeros(batch, jnp.int32),
        prompt_slots=jnp.zeros((), jnp.int32),
    )


def cache_sharding(config: LlamaConfig, mesh: Mesh, batch: int) -> NamedSharding:
    """Where keys and values lie on a mesh: rows over data and fsdp, heads over tensor, each where it divides them."""
    rows = BATCH if batch % rows_of(mesh) == 0 else None
    heads = "tensor" if config.num_kv_heads % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(None, rows, None, heads))
