"""What a model stores of its layers, and a layer in arrays of its own: from pools by heads, or by columns of heads."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from headshare_jax.config import LlamaConfig
from headshare_jax.parameters import PARAMETERS, PROJECTIONS, bias_name, index_name, parameter_names, pool_name
from headshare_jax.sharing.map import SharingMap

# Pool rows of heads, int32 [n], or of their columns, [n, H]: an array that a program is given, or that it is made for.
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
        return with_bias(out_btnh, self.weights.get(bias_name(projection)))

    def heads_out(self, heads_btnh: jax.Array) -> jax.Array:
        heads_btnh = only_kept(heads_btnh, self.kept_n)
        rows_nhd = self.weights[pool_name("o")].astype(heads_btnh.dtype)
        batch, length, count, width = heads_btnh.shape
        out_md = heads_btnh.reshape(batch * length, count * width) @ rows_nhd.reshape(count * width, rows_nhd.shape[-1])
        return out_md.reshape(batch, length, rows_nhd.shape[-1])

    def product(self, name: str, x_mi: jax.Array) -> jax.Array:
        return times(self.weights[name], x_mi)


@dataclass(frozen=True)
class Stacks:
    """What a model stores of its layers.

    Attributes:
      layered: by name, everything that has a leading layer axis, head indices among it.
      pools: by name, everything that is stored by pool rows: heads, or columns of heads.
      drops: whether some heads are dropped, whose index is one past the last row of a pool of heads.
      mesh: where gathered heads are cut over tensor by whoever uses them, while their pools are cut along D.
      apart: by name and layer, what takes the place of something layered where layers' heads are not alike, or parts of
        heads; a layer's place is then a number that the program is made for.
    """

    layered: Mapping[str, jax.Array]
    pools: Mapping[str, jax.Array]
    drops: bool
    mesh: Mesh | None = None
    apart: Mapping[str, tuple[np.ndarray, ...]] = field(default_factory=dict)

    @property
    def by_columns(self) -> bool:
        """Whether pools hold columns of heads; one past the last of them is zeros."""
        return self.pools[pool_name("q")].ndim == 2

    def slices(self, place: jax.Array | int) -> dict[str, jax.Array]:
        """One layer's slices of everything that has a leading layer axis."""
        return {name: self.slice(name, place) for name in (*self.layered, *self.apart)}

    def slice(self, name: str, place: jax.Array | int) -> jax.Array:
        """One layer's slice of what has a leading layer axis."""
        if name in self.apart:
            return jnp.asarray(self._apart(name, place))
        return jax.lax.dynamic_index_in_dim(self.layered[name], place, keepdims=False)

    def index(self, projection: str, place: jax.Array | int) -> Index:
        """Pool rows of a layer's heads."""
        name = index_name(projection)
        return self._apart(name, place) if name in self.apart else self.slice(name, place)

    def _apart(self, name: str, place: jax.Array | int) -> np.ndarray:
        assert isinstance(place, int)
        return self.apart[name][place]

    def has_heads(self, place: jax.Array | int) -> bool:
        """Whether some head of a layer is kept."""
        return len(self.index("q", place)) > 0

    def heads(self, name: str, index: Index) -> jax.Array:
        """Heads of a pool by their index; one past its last row stands for its last head, or for a column of zeros."""
        return _side_by_side(name, self._rows(self.pools[name], index), index)

    def _rows(self, pool: jax.Array, index: Index) -> jax.Array:
        if self.by_columns:
            return pool.at[index.ravel()].get(mode="fill", fill_value=0)
        return pool.at[index].get(mode="clip")

    def _gathered(self, name: str, index: Index) -> jax.Array:
        """A layer's heads; on a mesh each device takes the rows of its part of the pool, and tensor groups join theirs.

        XLA, which wants these heads cut over tensor, finds no way there from a pool but by whole pools or whole heads.
        """
        axes, mesh = PARAMETERS[name].axes, self.mesh
        if mesh is None or "d" not in axes:
            return self.heads(name, index)
        pool, along = self.pools[name], 1 if self.by_columns else axes.index("d")
        if pool.shape[along] % (mesh.shape["fsdp"] * mesh.shape["tensor"]):
            return self.heads(name, index)

        def of_part(part: jax.Array, index: Index) -> jax.Array:
            return jax.lax.all_gather(self._rows(part, index), "tensor", axis=along, tiled=True)

        before: tuple[None, ...] = (None,) * along
        rows: jax.Array = jax.shard_map(
            of_part,
            mesh=mesh,
            in_specs=(PartitionSpec(*before, ("fsdp", "tensor")), PartitionSpec()),
            out_specs=PartitionSpec(*before, "fsdp"),
            check_vma=False,
        )(pool, index)
        return _side_by_side(name, rows, index)

    def of_heads(self, tables: Mapping[str, Sequence[np.ndarray]]) -> "Stacks":
        """What is read of some heads, or parts of heads, alone, as `running_tables` names them."""
        past = self.pools[pool_name("o")].shape[0]
        drops = any((index >= past).any() for index in tables[index_name("o")])
        # A loop could but gather columns; a program that knows them reads them where they lie.
        if self.by_columns or any(len({table.shape for table in each}) > 1 for each in tables.values()):
            return replace(self, drops=drops, apart={name: tuple(each) for name, each in tables.items()})
        alike = {name: jnp.asarray(np.stack(each)) for name, each in tables.items()}
        return replace(self, drops=drops, layered={**self.layered, **alike})

    def kept(self, index: Index) -> jax.Array | None:
        """bool [N]: heads of the output projection that are stored; None if what is not is zeros, or there is none."""
        if not self.drops or self.by_columns:
            return None
        return jnp.asarray(index < self.pools[pool_name("o")].shape[0])

    def held(self, slices: Mapping[str, jax.Array]) -> Held:
        """A layer whose heads are gathered, from its slices of everything that has a leading layer axis."""
        index = {projection: slices[index_name(projection)] for projection in PROJECTIONS}
        heads = {name: self._gathered(name, index[str(PARAMETERS[name].pool)]) for name in self.pools}
        return Held({**slices, **heads}, self.kept(index["o"]))


def stacks_of(
    config: LlamaConfig,
    sharing: SharingMap | None,
    array: Callable[[str], jax.Array],
    kinds: Mapping[str, jax.Array],
) -> Stacks:
    """What a model stores of its layers.

    Args:
      config: the architecture.
      sharing: the model's map.
      array: gives what is stored under a name.
      kinds: what else differs from layer to layer.
    """
    names = parameter_names(config)
    layered = [name for name in names if PARAMETERS[name].layered and PARAMETERS[name].pool is None]
    index = {name: array(name) for name in map(index_name, PROJECTIONS)}
    if sharing is not None and sharing.widths is not None:
        index = {name: rows.reshape(len(rows), -1, sharing.slots_per_head) for name, rows in index.items()}
    return Stacks(
        layered={name: array(name) for name in layered} | index | dict(kinds),
        pools={name: array(name) for name in names if PARAMETERS[name].pool is not None},
        drops=sharing is not None and bool(sharing.dropped.any()),
    )


def with_bias(heads_btnh: jax.Array, bias_nh: jax.Array | None) -> jax.Array:
    return heads_btnh if bias_nh is None else heads_btnh + bias_nh.astype(heads_btnh.dtype)[None, None]


def only_kept(heads_btnh: jax.Array, kept_n: jax.Array | None) -> jax.Array:
    """Head outputs, zero for a dropped head: some other head's weights stand in for those it has not."""
    return heads_btnh if kept_n is None else heads_btnh * kept_n.astype(heads_btnh.dtype)[None, None, :, None]


def row(pool: jax.Array, row: jax.Array | int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(pool, row, keepdims=False)


def times(matrix_ij: jax.Array, x_mi: jax.Array) -> jax.Array:
    return x_mi @ matrix_ij.astype(x_mi.dtype)


def _side_by_side(name: str, rows: jax.Array, index: Index) -> jax.Array:
    """Heads [n, D, H], [n, H, D] or [n, H] of rows that are heads, or their columns one after another."""
    if index.ndim == 1:
        return rows
    heads = rows.reshape(*index.shape, *rows.shape[1:])
    return heads.swapaxes(1, 2) if PARAMETERS[name].axes == "pdh" else heads
