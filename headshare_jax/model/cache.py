"""The key/value cache."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from headshare_jax.config import LlamaConfig
from headshare_jax.model.mesh import BATCH, rows_of
from headshare_jax.sharing.shapes import HeadShape, cache_slots

# Keys or values of all layers: of layers whose heads are alike [L, B, S, K, H], of others [B, S, K, H] each.
Stack = jax.Array | tuple[jax.Array, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions already seen.

    Attributes:
      k_lbskh: keys, in the compute dtype; rotary embedding already applied.
      v_lbskh: values, likewise, without it; their width may be another.
      length: int32 scalar, slots filled; the same for every row of the batch.
      prompt_b: int32 [B], tokens of every row's prompt, which fill its first slots.
      prompt_slots: int32 scalar, slots that prompts take; from its prompt's end to here a row holds padding.
    """

    k_lbskh: Stack
    v_lbskh: Stack
    length: jax.Array
    prompt_b: jax.Array
    prompt_slots: jax.Array

    @property
    def slots(self) -> int:
        """S, of which every layer has as many."""
        shape: tuple[int, ...] = jax.tree.leaves(self.k_lbskh)[0].shape
        return shape[-3]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.k_lbskh, self.v_lbskh)))

    def with_slots(self, slots: int) -> "KVCache":
        """The cache with room for at least so many positions of every row."""
        more = max(0, slots - self.slots)

        def grown(array: jax.Array) -> jax.Array:
            return jnp.pad(array, [(0, more if axis == array.ndim - 3 else 0) for axis in range(array.ndim)])

        if not more:
            return self
        return replace(self, k_lbskh=jax.tree.map(grown, self.k_lbskh), v_lbskh=jax.tree.map(grown, self.v_lbskh))

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
        return jnp.arange(self.slots, dtype=jnp.int32)

    def _written(self, layer: jax.Array | int, slot: jax.Array, k_btkh: jax.Array, v_btkh: jax.Array) -> "KVCache":
        return replace(
            self,
            k_lbskh=_stack_with(self.k_lbskh, layer, slot, k_btkh),
            v_lbskh=_stack_with(self.v_lbskh, layer, slot, v_btkh),
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
        return self._written(layer, self.length % self.slots, k_btkh, v_btkh)

    def seen_by(self, slot_t: jax.Array) -> jax.Array:
        return self.behind(slot_t) <= self.positions(slot_t)[:, :, None]

    def behind(self, slot_t: jax.Array) -> jax.Array:
        slot_s = self._slots()
        return ((slot_t[:, None] - slot_s[None]) % len(slot_s))[None]


@partial(jax.jit, static_argnames=("config", "dtype", "batch", "slots", "shapes", "mesh"))
def empty_cache(
    config: LlamaConfig,
    dtype: str,
    batch: int,
    slots: int,
    shapes: tuple[HeadShape, ...],
    mesh: Mesh | None = None,
) -> KVCache:
    """A cache with room for `slots` positions of every row; of windows, no more than the last ones.

    Args:
      config: the architecture.
      dtype: of keys and values.
      batch: rows.
      slots: positions.
      shapes: the heads of every layer, as they run.
      mesh: where it lies, if on a mesh.
    """
    room = cache_slots(config, slots)

    def zeros(*shape: int) -> jax.Array:
        array = jnp.zeros(shape, dtype)
        return array if mesh is None else jax.lax.with_sharding_constraint(array, cache_sharding(mesh, shape))

    def stack(widths: list[int]) -> Stack:
        if len(set(shapes)) == 1:
            return zeros(len(shapes), batch, room, shapes[0].units, widths[0])
        return tuple(zeros(batch, room, shape.units, width) for shape, width in zip(shapes, widths, strict=True))

    return (KVCache if room == slots else RingCache)(
        k_lbskh=stack([shape.qk for shape in shapes]),
        v_lbskh=stack([shape.vo for shape in shapes]),
        length=jnp.zeros((), jnp.int32),
        prompt_b=jnp.zeros(batch, jnp.int32),
        prompt_slots=jnp.zeros((), jnp.int32),
    )


def cache_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where keys or values [..., B, S, K, H] lie on a mesh: rows over data and fsdp, heads over tensor.

    Either is cut where it is divided.
    """
    *before, batch, _, heads, _ = shape
    rows = BATCH if batch % rows_of(mesh) == 0 else None
    cut = "tensor" if heads % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(*[None] * len(before), rows, None, cut))


def _stack_with(stack: Stack, layer: jax.Array | int, slot: jax.Array, x_btkh: jax.Array) -> Stack:
    """Keys or values with those that a layer writes from a slot on."""
    if isinstance(stack, jax.Array):
        return jax.lax.dynamic_update_slice(stack, x_btkh[None], (layer, 0, slot, 0, 0))
    assert isinstance(layer, int)
    mine = jax.lax.dynamic_update_slice(stack[layer], x_btkh, (0, slot, 0, 0))
    return (*stack[:layer], mine, *stack[layer + 1 :])
