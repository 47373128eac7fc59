"""How a layer's heads and matrices are read: gathered, one by one, from arrays of their own, or by the GPU's kernel.

The blocks of `layer` know a layer only as a `Layer`, something that multiplies by its weights. A `Reading` makes one of
what a model stores; `choose` picks it, once, for the device and the number of tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from headshare_jax.config import LlamaConfig
from headshare_jax.model.mesh import nvidia_capability
from headshare_jax.parameters import PARAMETERS, PROJECTIONS, bias_name, index_name, pool_name
from headshare_jax.sharing.columns import to_heads

# Up to this many tokens a projection reads its heads one by one, which costs no bytes beyond the weights; above it,
# one gather of the layer's heads is shared by all tokens. A GPU gathers, unless its kernel reads the heads: starting a
# kernel for every head takes it longer than the copy.
PER_HEAD_TOKENS = 32
# A CPU reads prompts of at least twice as many tokens in two parts; of fewer it reads all together.
PART_TOKENS = 2048
# What the GPU's kernel takes: so many tokens, sides that are multiples of so much, and GPUs from Ampere on.
KERNEL_TOKENS, KERNEL_SIDE, _KERNEL_CAPABILITY = 4, 16, 8.0
STACKED_MATRICES = ("gate_ldf", "up_ldf", "down_lfd")


# Pool rows of heads, int32 [n]: an array that a program is given, or one that it is made for.
Index = jax.Array | np.ndarray


class Layer(Protocol):
    """One layer's weights, as the blocks use them."""

    def vector(self, name: str) -> jax.Array | None:
        """A norm's or a bias's values, [D], [F] or [H]; None where the architecture has no such parameter.

        What a layer is beside its weights (`layer.layer_kinds`) is read likewise, []. `pair_lkp`, int32 [K, P], names
        the rotary pairs that its key heads and their queries keep, where that is not all of them in their order.
        """

    def heads_in(self, projection: str, x_btd: jax.Array) -> jax.Array:
        """Heads [B, T, n, H] of x, in its type; n is N for `q`, K for `k` and `v`. With their biases, if any."""

    def heads_out(self, heads_btnh: jax.Array) -> jax.Array:
        """Output [B, T, D] of head outputs, summed over heads in float32, in their type; without the bias."""

    def product(self, name: str, x_mi: jax.Array) -> jax.Array:
        """x [M, I] times a matrix [I, J], in the type of x."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Held:
    """A layer in arrays of its own, one for each parameter.

    Attributes:
      weights: by parameter name; pools as the layer's heads, [n, D, H] or [n, H, D].
      kept_n: bool [N], the heads that are not dropped, where those have some other head's weights; None if all are kept
        or a dropped one's weights are zeros.
    """

    weights: Mapping[str, jax.Array]
    kept_n: jax.Array | None = None

    def vector(self, name: str) -> jax.Array | None:
        return self.weights.get(name)

    def heads_in(self, projection: str, x_btd: jax.Array) -> jax.Array:
        heads_ndh = self.weights[pool_name(projection)].astype(x_btd.dtype)
        out_btnh = jnp.einsum("btd,ndh->btnh", x_btd, heads_ndh)
        return _with_bias(out_btnh, self.weights.get(bias_name(projection)))

    def heads_out(self, heads_btnh: jax.Array) -> jax.Array:
        heads_btnh = _kept(heads_btnh, self.kept_n)
        rows_nhd = self.weights[pool_name("o")].astype(heads_btnh.dtype)
        batch, length, count, width = heads_btnh.shape
        out_md = heads_btnh.reshape(batch * length, count * width) @ rows_nhd.reshape(count * width, rows_nhd.shape[-1])
        return out_md.reshape(batch, length, rows_nhd.shape[-1])

    def product(self, name: str, x_mi: jax.Array) -> jax.Array:
        return _times(self.weights[name], x_mi)


@dataclass(frozen=True)
class Stacks:
    """What a model stores of its layers.

    Attributes:
      layered: by name, everything that has a leading layer axis, head indices among it.
      pools: by name, everything that is stored by pool rows.
      drops: whether some heads are dropped, whose index is one past the pool's last row.
      slots: pool rows that a whole head takes: 1, or H where pools hold columns; of these, one past the last is zeros.
      mesh: where gathered heads are cut over tensor by whoever uses them, while their pools are cut along D.
      apart: by projection and layer, head indices, int32 [n], where layers have unequal numbers of heads; a place is
        then a number that the program is made for. None where all have as many.
    """

    layered: Mapping[str, jax.Array]
    pools: Mapping[str, jax.Array]
    drops: bool
    slots: int = 1
    mesh: Mesh | None = None
    apart: Mapping[str, tuple[np.ndarray, ...]] | None = None

    def slice(self, name: str, place: jax.Array | int) -> jax.Array:
        """One layer's slice of what has a leading layer axis."""
        return jax.lax.dynamic_index_in_dim(self.layered[name], place, keepdims=False)

    def index(self, projection: str, place: jax.Array | int) -> Index:
        """Pool rows of a layer's heads."""
        if self.apart is None:
            return self.slice(index_name(projection), place)
        assert isinstance(place, int)
        return self.apart[projection][place]

    def has_heads(self, place: jax.Array | int) -> bool:
        """Whether some head of a layer is kept."""
        return self.apart is None or len(self.index("q", place)) > 0

    def heads(self, name: str, index_n: Index) -> jax.Array:
        """Heads of a pool whose rows' index is given; one past the last row stands for the last, or for zeros."""
        return to_heads(name, self._rows(self.pools[name], index_n), self.slots)

    def _rows(self, pool: jax.Array, index_n: Index) -> jax.Array:
        if self.slots == 1:
            return pool.at[index_n].get(mode="clip")
        return pool.at[index_n].get(mode="fill", fill_value=0)

    def _gathered(self, name: str, index_n: Index) -> jax.Array:
        """A layer's heads; on a mesh each device takes the rows of its part of the pool, and tensor groups join theirs.

        XLA, which wants these heads cut over tensor, finds no way there from a pool but by whole pools or whole heads.
        """
        axes, mesh = PARAMETERS[name].axes, self.mesh
        if mesh is None or "d" not in axes:
            return self.heads(name, index_n)
        pool, along = self.pools[name], axes.index("d") if self.slots == 1 else 1
        if pool.shape[along] % (mesh.shape["fsdp"] * mesh.shape["tensor"]):
            return self.heads(name, index_n)

        def of_part(part: jax.Array, index_n: Index) -> jax.Array:
            return jax.lax.all_gather(self._rows(part, index_n), "tensor", axis=along, tiled=True)

        before: tuple[None, ...] = (None,) * along
        rows: jax.Array = jax.shard_map(
            of_part,
            mesh=mesh,
            in_specs=(PartitionSpec(*before, ("fsdp", "tensor")), PartitionSpec()),
            out_specs=PartitionSpec(*before, "fsdp"),
            check_vma=False,
        )(pool, index_n)
        return to_heads(name, rows, self.slots)

    def of_heads(self, heads: Mapping[str, Sequence[np.ndarray]]) -> "Stacks":
        """What is read of some heads alone: by projection, those of every layer, int32 [n]."""
        counts = {len(index_n) for index_n in heads["k"]}
        drops = any((index_n >= len(self.pools[pool_name("o")])).any() for index_n in heads["o"])
        if len(counts) > 1:
            return replace(self, drops=drops, apart={name: tuple(each) for name, each in heads.items()})
        alike = {index_name(name): jnp.asarray(np.stack(each)) for name, each in heads.items()}
        return replace(self, drops=drops, layered={**self.layered, **alike})

    def kept(self, index_n: Index) -> jax.Array | None:
        """bool [N]: heads of the output projection that are stored; None if what is not is zeros, or there is none."""
        if not self.drops or self.slots > 1:
            return None
        return jnp.asarray(index_n < self.pools[pool_name("o")].shape[0])

    def held(self, slices: Mapping[str, jax.Array]) -> Held:
        """A layer whose heads are gathered, from its slices of everything that has a leading layer axis."""
        index = {projection: slices[index_name(projection)] for projection in PROJECTIONS}
        heads = {name: self._gathered(name, index[str(PARAMETERS[name].pool)]) for name in self.pools}
        return Held({**slices, **heads}, self.kept(index["o"]))


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
        index = {index_name(projection): jnp.asarray(stacks.index(projection, place)) for projection in PROJECTIONS}
        return stacks.held({name: stacks.slice(name, place) for name in stacks.layered} | index)


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=())
@dataclass(frozen=True)
class OneByOne:
    """Heads are read one by one from their pools; those that lie there by columns are gathered."""

    parts = 1

    def layer(self, stacks: Stacks, place: jax.Array | int) -> Layer:
        one_by_one = stacks.slots == 1 and stacks.has_heads(place)
        return _HeadByHead(stacks, place) if one_by_one else Gathered().layer(stacks, place)


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
        return self.stacks.slice(name, self.place) if name in self.stacks.layered else None

    def index(self, projection: str) -> Index:
        return self.stacks.index(projection, self.place)

    def bias(self, projection: str) -> jax.Array | None:
        name = bias_name(projection)
        return self.stacks.heads(name, self.index(projection)) if name in self.stacks.pools else None


@dataclass(frozen=True)
class _HeadByHead(_Stacked):
    def heads_in(self, projection: str, x_btd: jax.Array) -> jax.Array:
        pool_pdh = self.stacks.pools[pool_name(projection)]
        heads = [x_btd @ _row(pool_pdh, row).astype(x_btd.dtype) for row in self.index(projection)]
        return _with_bias(jnp.stack(heads, axis=2), self.bias(projection))

    def heads_out(self, heads_btnh: jax.Array) -> jax.Array:
        pool_phd, index_n = self.stacks.pools[pool_name("o")], self.index("o")
        heads_btnh = _kept(heads_btnh, self.stacks.kept(index_n))
        dtype, times = heads_btnh.dtype, partial(jnp.matmul, preferred_element_type=jnp.float32)
        parts_btd = [
            times(heads_btnh[:, :, head], _row(pool_phd, row).astype(dtype)) for head, row in enumerate(index_n)
        ]
        return sum(parts_btd[1:], start=parts_btd[0]).astype(dtype)

    def product(self, name: str, x_mi: jax.Array) -> jax.Array:
        return _times(self.stacks.slice(name, self.place), x_mi)


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
            return _times(self.matrices[name][self.place], x_mi)
        branches = [partial(_times, matrix) for matrix in self.matrices[name]]
        out_mj: jax.Array = jax.lax.switch(self.place, branches, x_mi)
        return out_mj


@dataclass(frozen=True)
class _InStack(_Stacked):
    def heads_in(self, projection: str, x_btd: jax.Array) -> jax.Array:
        batch, length, width = x_btd.shape
        index_n = self.index(projection)
        out_mj = self._times(pool_name(projection), index_n, x_btd.reshape(-1, width), side_by_side=True)
        return _with_bias(out_mj.reshape(batch, length, len(index_n), -1), self.bias(projection))

    def heads_out(self, heads_btnh: jax.Array) -> jax.Array:
        index_n = self.index("o")
        heads_btnh = _kept(heads_btnh, self.stacks.kept(index_n))
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


def _with_bias(heads_btnh: jax.Array, bias_nh: jax.Array | None) -> jax.Array:
    return heads_btnh if bias_nh is None else heads_btnh + bias_nh.astype(heads_btnh.dtype)[None, None]


def _kept(heads_btnh: jax.Array, kept_n: jax.Array | None) -> jax.Array:
    """Head outputs, zero for a dropped head: some other head's weights stand in for those it has not."""
    return heads_btnh if kept_n is None else heads_btnh * kept_n.astype(heads_btnh.dtype)[None, None, :, None]


def _row(pool: jax.Array, row: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(pool, row, keepdims=False)


def _times(matrix_ij: jax.Array, x_mi: jax.Array) -> jax.Array:
    return x_mi @ matrix_ij.astype(x_mi.dtype)
