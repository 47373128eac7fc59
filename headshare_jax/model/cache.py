"""The key/value cache.

Slots are its last axis. A TPU fills the last axis of an array up to a multiple of 128, which slots are or nearly are,
and the widths of slim heads are not. It stays in this order in memory: left to itself XLA takes the cache to another
one, in which a new token lies together, and holds it twice, then with widths filled up to 128.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from operator import index
from typing import SupportsIndex

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from headshare_jax.config import LlamaConfig
from headshare_jax.model.mesh import BATCH, rows_of
from headshare_jax.sharing.shapes import HeadShape, cache_slots

# Up to so many bytes of a layer's keys, or of its values, layers whose heads are not alike lie in one array on a TPU,
# which takes an array of a layer's own to its fast memory, of 128 MB, and back whole in each round of decoding. What is
# larger it would copy out of one array.
JOINED_BYTES = 40 * 2**20


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Joined:
    """Keys or values of layers whose heads are not alike, in one array.

    Attributes:
      x_bpcs: of every part of a layer's heads, which a device may have, its columns, layer after layer.
      heads: K and H of every layer.
    """

    x_bpcs: jax.Array
    heads: tuple[tuple[int, int], ...] = field(metadata={"static": True})

    def __getitem__(self, layer: SupportsIndex) -> jax.Array:
        """A layer's, [B, K, H, S]."""
        place, (rows, _, _, slots) = index(layer), self.x_bpcs.shape
        columns = slice(self._columns(place), self._columns(place + 1))
        return self.x_bpcs[:, :, columns].reshape(rows, *self.heads[place], slots)

    def written(self, layer: int, slot: jax.Array, x_bkht: jax.Array) -> "Joined":
        """With those that a layer writes from a slot on."""
        part = x_bkht.reshape(*self.x_bpcs.shape[:2], -1, x_bkht.shape[-1])
        return replace(self, x_bpcs=_with_slots(self.x_bpcs, part, (0, 0, self._columns(layer), slot)))

    def _columns(self, layers: int) -> int:
        """Of the first layers."""
        return sum(map(prod, self.heads[:layers])) // self.x_bpcs.shape[1]


# Keys or values of all layers: of layers whose heads are alike [L, B, K, H, S], of others [B, K, H, S] each, or joined.
Stack = jax.Array | tuple[jax.Array, ...] | Joined


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the positions already seen.

    Attributes:
      k_lbkhs: keys, in the compute dtype; rotary embedding already applied.
      v_lbkhs: values, likewise, without it; their width may be another.
      length: int32 scalar, slots filled; the same for every row of the batch.
      prompt_b: int32 [B], tokens of every row's prompt, which fill its first slots.
      prompt_slots: int32 scalar, slots that prompts take; from its prompt's end to here a row holds padding.
    """

    k_lbkhs: Stack
    v_lbkhs: Stack
    length: jax.Array
    prompt_b: jax.Array
    prompt_slots: jax.Array

    @property
    def slots(self) -> int:
        """S, of which every layer has as many."""
        shape: tuple[int, ...] = jax.tree.leaves(self.k_lbkhs)[0].shape
        return shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves((self.k_lbkhs, self.v_lbkhs)))

    def with_slots(self, slots: int) -> "KVCache":
        """The cache with room for at least so many positions of every row."""
        more = max(0, slots - self.slots)

        def grown(array: jax.Array) -> jax.Array:
            return jnp.pad(array, [(0, more if axis == array.ndim - 1 else 0) for axis in range(array.ndim)])

        if not more:
            return self
        return replace(self, k_lbkhs=jax.tree.map(grown, self.k_lbkhs), v_lbkhs=jax.tree.map(grown, self.v_lbkhs))

    def with_prompts(
        self, layer: jax.Array | int, k_bkht: jax.Array, v_bkht: jax.Array, prompt_b: jax.Array
    ) -> "KVCache":
        """The empty cache with a layer's keys and values of T tokens, of which `prompt_b` are a row's prompt."""
        return self.with_layer(layer, k_bkht, v_bkht)

    def with_layer(self, layer: jax.Array | int, k_bkht: jax.Array, v_bkht: jax.Array) -> "KVCache":
        """The cache with a layer's next T keys and values; `length` stays, for other layers write there too."""
        return self._written(layer, self.length, k_bkht, v_bkht)

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

    def _written(self, layer: jax.Array | int, slot: jax.Array, k_bkht: jax.Array, v_bkht: jax.Array) -> "KVCache":
        return replace(
            self,
            k_lbkhs=_stack_with(self.k_lbkhs, layer, slot, k_bkht),
            v_lbkhs=_stack_with(self.v_lbkhs, layer, slot, v_bkht),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RingCache(KVCache):
    """Keys and values of every row's last S positions, for a window of S: a new token takes the oldest one's slot.

    Rows end together, so that one slot is the oldest of all of them: slot n % S is the n-th's, counted with the padding
    that a row with a shorter prompt has before it.
    """

    def with_prompts(
        self, layer: jax.Array | int, k_bkht: jax.Array, v_bkht: jax.Array, prompt_b: jax.Array
    ) -> KVCache:
        last = jnp.int32(k_bkht.shape[-1] - 1)
        # Before a prompt's first token there is nothing, for which that token stands.
        index_bs = jnp.maximum(prompt_b[:, None] - 1 - self.behind(last[None])[0], 0)
        k_bkhs, v_bkhs = (
            jnp.take_along_axis(each_bkht, index_bs[:, None, None, :], axis=3) for each_bkht in (k_bkht, v_bkht)
        )
        return self._written(layer, jnp.int32(0), k_bkhs, v_bkhs)

    def with_layer(self, layer: jax.Array | int, k_bkht: jax.Array, v_bkht: jax.Array) -> KVCache:
        """The cache with a layer's keys and values of one more token."""
        return self._written(layer, self.length % self.slots, k_bkht, v_bkht)

    def seen_by(self, slot_t: jax.Array) -> jax.Array:
        return self.behind(slot_t) <= self.positions(slot_t)[:, :, None]

    def behind(self, slot_t: jax.Array) -> jax.Array:
        slot_s = self._slots()
        return ((slot_t[:, None] - slot_s[None]) % len(slot_s))[None]


@partial(jax.jit, static_argnames=("config", "dtype", "batch", "slots", "shapes", "mesh", "joined"))
def empty_cache(
    config: LlamaConfig,
    dtype: str,
    batch: int,
    slots: int,
    shapes: tuple[HeadShape, ...],
    mesh: Mesh | None = None,
    joined: int = 0,
) -> KVCache:
    """A cache with room for `slots` positions of every row; of windows, no more than the last ones.

    Args:
      config: the architecture.
      dtype: of keys and values.
      batch: rows.
      slots: positions.
      shapes: the heads of every layer, as they run.
      mesh: where it lies, if on a mesh.
      joined: up to how many bytes of a layer's keys, or values, on a device layers that are not alike lie in one array.
    """
    room = cache_slots(config, slots)

    def zeros(*shape: int) -> jax.Array:
        array = jnp.zeros(shape, dtype)
        return array if mesh is None else jax.lax.with_sharding_constraint(array, cache_sharding(mesh, shape))

    def stack(widths: list[int]) -> Stack:
        if len(set(shapes)) == 1:
            return zeros(len(shapes), batch, shapes[0].units, widths[0], room)
        heads = tuple(zip((shape.units for shape in shapes), widths, strict=True))
        rows, parts = (1, 1) if mesh is None else (rows_of(mesh), mesh.shape["tensor"])
        rows = rows if batch % rows == 0 else 1
        parts = 1 if any(units % parts for units, _ in heads) else parts
        if batch * max(map(prod, heads)) * room * jnp.dtype(dtype).itemsize <= joined * rows * parts:
            return Joined(zeros(batch, parts, sum(map(prod, heads)) // parts, room), heads)
        return tuple(zeros(batch, units, width, room) for units, width in heads)

    return (KVCache if room == slots else RingCache)(
        k_lbkhs=stack([shape.qk for shape in shapes]),
        v_lbkhs=stack([shape.vo for shape in shapes]),
        length=jnp.zeros((), jnp.int32),
        prompt_b=jnp.zeros(batch, jnp.int32),
        prompt_slots=jnp.zeros((), jnp.int32),
    )


def cache_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where keys or values [..., B, K, H, S] lie on a mesh: rows over data and fsdp, heads over tensor.

    Either is cut where it is divided.
    """
    *before, batch, heads, _, _ = shape
    rows = BATCH if batch % rows_of(mesh) == 0 else None
    cut = "tensor" if heads % mesh.shape["tensor"] == 0 else None
    return NamedSharding(mesh, PartitionSpec(*[None] * len(before), rows, cut))


def _stack_with(stack: Stack, layer: jax.Array | int, slot: jax.Array, x_bkht: jax.Array) -> Stack:
    """Keys or values with those that a layer writes from a slot on."""
    if isinstance(stack, jax.Array):
        return _with_slots(stack, x_bkht[None], (layer, 0, 0, 0, slot))
    assert isinstance(layer, int)
    if isinstance(stack, Joined):
        return stack.written(layer, slot, x_bkht)
    return (*stack[:layer], _with_slots(stack[layer], x_bkht, (0, 0, 0, slot)), *stack[layer + 1 :])


def _with_slots(array: jax.Array, part: jax.Array, begin: tuple[jax.Array | int, ...]) -> jax.Array:
    """An array with a part of it written in place, its axes in memory in their order."""
    in_order = with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))
    return jax.lax.dynamic_update_slice(in_order, part, begin)
