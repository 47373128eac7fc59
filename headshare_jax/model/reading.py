"""How a layer's heads and matrices are read: gathered, one by one, from arrays of their own, or by the GPU's kernel.

The blocks of `layer` know a layer only as a `Layer`, something that multiplies by its weights. A `Reading` makes one of
what a model stores; `choose` picks it, once, for the device and the number of tokens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.model.mesh import nvidia_capability
from headshare_jax.model.stacks import Index, Layer, Stacks, only_kept, row, times, with_bias
from headshare_jax.parameters import bias_name, pool_name
from headshare_jax.sharing.source import runs

# Up to this many tokens a projection reads its heads one by one, which costs no bytes beyond the weights; above it,
# one gather of the layer's heads is shared by all tokens. A GPU gathers, unless its kernel reads the heads: starting a
# kernel for every head takes it longer than the copy.
PER_HEAD_TOKENS = 32
# A CPU reads prompts of at least twice as many tokens in two parts; of fewer it reads all together.
PART_TOKENS = 2048
# What the GPU's kernel takes: so many tokens, sides that are multiples of so much, and GPUs from Ampere on.
KERNEL_TOKENS, KERNEL_SIDE, _KERNEL_CAPABILITY = 4, 16, 8.0
STACKED_MATRICES = ("gate_ldf", "up_ldf", "down_lfd")


class Reading(Protocol):
    """A way to read a model's layers, the same for all of them.

    Attributes:
      parts: in how many parts a layer runs a batch of prompts, side by side: where one leaves a core idle, another does
        not.
    """

    @property
    def parts(self) -> int: ...

    def layer(self, stacks: Stacks, place: jax.Array | int) -> Layer:
        """The layer at a place."""


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("parts",))
@dataclass(frozen=True)
class Gathered:
    """Heads are gathered once per layer, for all tokens."""

    parts: int = 1

    def layer(self, stacks: Stacks, place: jax.Array | int) -> Layer:
        return stacks.held(stacks.slices(place))


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=())
@dataclass(frozen=True)
class OneByOne:
    """Heads are read one by one from their pools; of heads by columns, those that lie there side by side together."""

    parts = 1

    def layer(self, stacks: Stacks, place: jax.Array | int) -> Layer:
        if not stacks.has_heads(place):
            return Gathered().layer(stacks, place)
        return _RunByRun(stacks, place) if stacks.by_columns else _HeadByHead(stacks, place)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OwnMatrices:
    """Matrices are in arrays of their own, one for each layer; heads are read in another way.

    Attributes:
      heads: how heads are read.
      matrices: each layer's, by name, as `unstacked` gives them.
    """

    heads: Reading
    matrices: Mapping[str, tuple[jax.Array, ...]]

    @property
    def parts(self) -> int:
        return self.heads.parts

    def layer(self, stacks: Stacks, place: jax.Array | int) -> Layer:
        return _OwnMatrices(self.heads.layer(stacks, place), place, self.matrices)


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=())
@dataclass(frozen=True)
class ByKernel:
    """Heads and matrices are read where they lie, by a kernel of NVIDIA GPUs."""

    parts = 1

    def layer(self, stacks: Stacks, place: jax.Array | int) -> Layer:
        return _InStack(stacks, place) if stacks.has_heads(place) else Gathered().layer(stacks, place)


@dataclass(frozen=True)
class _Stacked:
    """A layer that reads what it needs from stacks."""

    stacks: Stacks
    place: jax.Array | int

    def vector(self, name: str) -> jax.Array | None:
        known = name in self.stacks.layered or name in self.stacks.apart
        return self.stacks.slice(name, self.place) if known else None

    def index(self, projection: str) -> Index:
        return self.stacks.index(projection, self.place)

    def bias(self, projection: str) -> jax.Array | None:
        name = bias_name(projection)
        return self.stacks.heads(name, self.index(projection)) if name in self.stacks.pools else None


@dataclass(frozen=True)
class _HeadByHead(_Stacked):
    def heads_in(self, projection: str, x_btd: jax.Array) -> jax.Array:
        pool_pdh = self.stacks.pools[pool_name(projection)]
        heads = [x_btd @ row(pool_pdh, place).astype(x_btd.dtype) for place in self.index(projection)]
        return with_bias(jnp.stack(heads, axis=2), self.bias(projection))

    def heads_out(self, heads_btnh: jax.Array) -> jax.Array:
        pool_phd, index_n = self.stacks.pools[pool_name("o")], self.index("o")
        heads_btnh = only_kept(heads_btnh, self.stacks.kept(index_n))
        heads = ((heads_btnh[:, :, head], row(pool_phd, place)) for head, place in enumerate(index_n))
        return _summed(heads, heads_btnh.dtype)

    def product(self, name: str, x_mi: jax.Array) -> jax.Array:
        return times(self.stacks.slice(name, self.place), x_mi)


@dataclass(frozen=True)
class _RunByRun(_Stacked):
    """Nothing but what heads keep is multiplied; their columns are known to the program."""

    def heads_in(self, projection: str, x_btd: jax.Array) -> jax.Array:
        pool_cd, index_nh = self.stacks.pools[pool_name(projection)], np.asarray(self.index(projection))
        stored = index_nh < len(pool_cd)
        columns = [x_btd @ pool_cd[run].astype(x_btd.dtype).T for run in runs(index_nh[stored])]
        # One past the last is zeros.
        place_nh = np.where(stored, np.cumsum(stored).reshape(stored.shape) - 1, np.count_nonzero(stored))
        heads_btnh = jnp.concatenate(columns, axis=2).at[..., place_nh].get(mode="fill", fill_value=0)
        return with_bias(heads_btnh, self.bias(projection))

    def heads_out(self, heads_btnh: jax.Array) -> jax.Array:
        pool_cd, index_nh = self.stacks.pools[pool_name("o")], np.asarray(self.index("o"))
        stored = index_nh < len(pool_cd)
        columns_btc = heads_btnh.reshape(*heads_btnh.shape[:2], -1)[..., np.flatnonzero(stored)]
        found = runs(index_nh[stored])
        ends = np.cumsum([run.stop - run.start for run in found])
        columns = (columns_btc[..., end - (run.stop - run.start) : end] for run, end in zip(found, ends, strict=True))
        return _summed(zip(columns, (pool_cd[run] for run in found), strict=True), heads_btnh.dtype)

    def product(self, name: str, x_mi: jax.Array) -> jax.Array:
        return times(self.stacks.slice(name, self.place), x_mi)


@dataclass(frozen=True)
class _OwnMatrices:
    heads: Layer
    place: jax.Array | int
    matrices: Mapping[str, tuple[jax.Array, ...]]

    def vector(self, name: str) -> jax.Array | None:
        return self.heads.vector(name)

    def heads_in(self, projection: str, x_btd: jax.Array) -> jax.Array:
        return self.heads.heads_in(projection, x_btd)

    def heads_out(self, heads_btnh: jax.Array) -> jax.Array:
        return self.heads.heads_out(heads_btnh)

    def product(self, name: str, x_mi: jax.Array) -> jax.Array:
        if isinstance(self.place, int):
            return times(self.matrices[name][self.place], x_mi)
        branches = [partial(times, matrix) for matrix in self.matrices[name]]
        out_mj: jax.Array = jax.lax.switch(self.place, branches, x_mi)
        return out_mj


@dataclass(frozen=True)
class _InStack(_Stacked):
    def heads_in(self, projection: str, x_btd: jax.Array) -> jax.Array:
        batch, length, width = x_btd.shape
        index_n = self.index(projection)
        out_mj = self._times(pool_name(projection), index_n, x_btd.reshape(-1, width), side_by_side=True)
        return with_bias(out_mj.reshape(batch, length, len(index_n), -1), self.bias(projection))

    def heads_out(self, heads_btnh: jax.Array) -> jax.Array:
        index_n = self.index("o")
        heads_btnh = only_kept(heads_btnh, self.stacks.kept(index_n))
        batch, length, count, width = heads_btnh.shape
        out_md = self._times(pool_name("o"), index_n, heads_btnh.reshape(-1, count * width), side_by_side=False)
        return out_md.reshape(batch, length, -1)

    def product(self, name: str, x_mi: jax.Array) -> jax.Array:
        return self._times(name, jnp.asarray(self.place)[None], x_mi, side_by_side=True)

    def _times(self, name: str, index_n: Index, x_mi: jax.Array, *, side_by_side: bool) -> jax.Array:
        # The kernel's language is deprecated in JAX: whoever does not run it must not depend on it.
        from headshare_jax.model.kernels.stack import times_in_stack

        stack_sij = self.stacks.pools[name] if name in self.stacks.pools else self.stacks.layered[name]
        return times_in_stack(x_mi, stack_sij, jnp.asarray(index_n), side_by_side=side_by_side)


def choose(config: LlamaConfig, device: jax.Device | None, batch: int, slots: int = 1) -> Reading:
    """How to read heads and matrices to add a token to each of some rows.

    Args:
      config: the model's architecture.
      device: the one that holds the model; None if there are several.
      batch: rows, each with one token.
      slots: as of `Stacks`.
    """
    # The kernel cuts a model's matrices into tiles.
    sides = (config.hidden_size, config.intermediate_size, config.head_dim)
    suits = batch <= KERNEL_TOKENS and slots == 1 and all(side % KERNEL_SIDE == 0 for side in sides)
    if device is not None and suits and nvidia_capability(device) >= _KERNEL_CAPABILITY:
        return ByKernel()
    gpu = device is not None and device.platform == "gpu"
    return Gathered() if gpu or batch > PER_HEAD_TOKENS else OneByOne()


def choose_for_prompts(device: jax.Device | None, batch: int, tokens: int) -> Gathered:
    """How to read heads and matrices for prompts: `tokens` in all rows together, padding included."""
    on_cpu = device is not None and device.platform == "cpu"
    return Gathered(parts=2 if on_cpu and batch > 1 and tokens >= 2 * PART_TOKENS else 1)


def unstacked(arrays: Mapping[str, jax.Array]) -> dict[str, tuple[jax.Array, ...]]:
    """Matrices of all layers in arrays of their own, for `OwnMatrices`; on a CPU views of the stacks' memory."""
    return {name: tuple(jax.device_put(matrix) for matrix in np.asarray(arrays[name])) for name in STACKED_MATRICES}


def _summed(terms: Iterable[tuple[jax.Array, jax.Array]], dtype: jnp.dtype) -> jax.Array:
    """The sum of products x @ W, [B, T, D], in a type; in float32 until then."""
    parts_btd = [jnp.matmul(x, rows.astype(dtype), preferred_element_type=jnp.float32) for x, rows in terms]
    return sum(parts_btd[1:], start=parts_btd[0]).astype(dtype)
