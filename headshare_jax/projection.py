"""Products with a layer's matrices and pooled heads, by the way that suits the number of tokens and the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.parameters import index_name, pool_name
from headshare_jax.sharing import PROJECTIONS
from headshare_jax.stack_kernel import InStack

if TYPE_CHECKING:
    from headshare_jax.modeling import Llama

# Up to this many tokens a projection reads its heads one by one, which costs no bytes beyond the weights; above it,
# one gather of the layer's heads is shared by all tokens. A GPU gathers, unless `stack_kernel` reads the heads:
# starting a kernel for every head takes it longer than the copy.
PER_HEAD_TOKENS = 32
STACKED_MATRICES = ("gate_ldf", "up_ldf", "down_lfd")
# By parameter and layer: the layer's matrix or heads, as `unstacked` gives them.
Matrices = dict[str, tuple[Any, ...]]


def heads_in(x_btd: jax.Array, pool_pdh: jax.Array, index_n: jax.Array) -> jax.Array:
    """Heads [B, T, N, H] of x by rows of a pool."""
    return _few_or_many(_heads_in_one_by_one, _heads_in_gathered, x_btd, pool_pdh, index_n)


def heads_out(heads_btnh: jax.Array, pool_phd: jax.Array, index_n: jax.Array) -> jax.Array:
    """Output [B, T, D] of heads by rows of a pool."""
    return _few_or_many(_heads_out_one_by_one, _heads_out_gathered, heads_btnh, pool_phd, index_n)


def rows(pool: jax.Array, index_n: jax.Array) -> jax.Array:
    """Rows of a pool; one past the last stands for the last."""
    return pool.at[index_n].get(mode="clip")


def _few_or_many(
    one_by_one: Callable[..., jax.Array],
    gathered: Callable[..., jax.Array],
    x_bt: jax.Array,
    pool: jax.Array,
    index_n: jax.Array,
) -> jax.Array:
    """A projection [B, T, ...] of x [B, T, ...] by the way that suits the number of tokens and the device."""
    if x_bt.shape[0] * x_bt.shape[1] > PER_HEAD_TOKENS:
        return gathered(x_bt, pool, index_n)
    out_bt: jax.Array = jax.lax.platform_dependent(
        x_bt, pool, index_n, cuda=gathered, rocm=gathered, default=one_by_one
    )
    return out_bt


def _heads_in_one_by_one(x_btd: jax.Array, pool_pdh: jax.Array, index_n: jax.Array) -> jax.Array:
    return jnp.stack([x_btd @ _row(pool_pdh, row).astype(x_btd.dtype) for row in index_n], axis=2)


def _heads_in_gathered(x_btd: jax.Array, pool_pdh: jax.Array, index_n: jax.Array) -> jax.Array:
    return jnp.einsum("btd,ndh->btnh", x_btd, rows(pool_pdh, index_n).astype(x_btd.dtype))


def _heads_out_one_by_one(heads_btnh: jax.Array, pool_phd: jax.Array, index_n: jax.Array) -> jax.Array:
    heads = [heads_btnh[:, :, n] @ _row(pool_phd, row).astype(heads_btnh.dtype) for n, row in enumerate(index_n)]
    return sum(heads[1:], start=heads[0])


def _heads_out_gathered(heads_btnh: jax.Array, pool_phd: jax.Array, index_n: jax.Array) -> jax.Array:
    rows_nhd = rows(pool_phd, index_n).astype(heads_btnh.dtype)
    batch, length, count, width = heads_btnh.shape
    out_md = heads_btnh.reshape(-1, count * width) @ rows_nhd.reshape(count * width, -1)
    return out_md.reshape(batch, length, -1)


def _row(pool: jax.Array, row: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(pool, row, keepdims=False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Heads:
    """A layer's heads: rows of a pool, in runs of rows that lie side by side, [n, X, Y] each.

    Attributes:
      runs: the lowest rows first.
      order: which head of the layer each row of the runs is.
    """

    runs: tuple[jax.Array, ...]
    order: tuple[int, ...] = field(metadata={"static": True})

    @property
    def in_order(self) -> bool:
        """Whether the runs have the heads in the layer's own order."""
        return self.order == tuple(range(len(self.order)))

    @classmethod
    def of(cls, pool: np.ndarray, index_n: np.ndarray) -> Self:
        """Heads by pool row; arrays are views of the pool on a CPU."""
        order = np.argsort(index_n, kind="stable")
        runs = np.split(index_n[order], np.flatnonzero(np.diff(index_n[order]) != 1) + 1)
        views = (jax.device_put(pool[run[0] : run[-1] + 1]) for run in runs)
        return cls(tuple(views), tuple(order.tolist()))


def unstacked(model: "Llama") -> Matrices:
    """Matrices of all layers in arrays of their own, for `Llama.extend`; on a CPU they are views of the model's memory.

    A dropped head has the last one's weights.
    """
    matrices: Matrices = {}
    for name in STACKED_MATRICES:
        matrices[name] = tuple(jax.device_put(matrix) for matrix in np.asarray(getattr(model, name)[...]))
    for projection in PROJECTIONS:
        pool = np.asarray(getattr(model, pool_name(projection))[...])
        index_ln = np.minimum(np.asarray(getattr(model, index_name(projection))[...]), len(pool) - 1)
        matrices[pool_name(projection)] = tuple(Heads.of(pool, index_n) for index_n in index_ln)
    return matrices


@dataclass(frozen=True)
class LayerOf:
    """A layer's matrix or heads: one place's among those of all layers, chosen when the program runs."""

    layers: Sequence[Any]
    place: jax.Array

    def product(self, x: jax.Array) -> jax.Array:
        """x [..., I] times the matrix."""
        return self._applied(product, x)

    def heads_in(self, x_btd: jax.Array) -> jax.Array:
        """Heads [B, T, N, H] of x."""
        return self._applied(_runs_in, x_btd)

    def heads_out(self, heads_btnh: jax.Array) -> jax.Array:
        """Output [B, T, D] of head outputs."""
        return self._applied(_runs_out, heads_btnh)

    def _applied(self, function: Callable[[Any, jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        out: jax.Array = jax.lax.switch(self.place, [partial(function, layer) for layer in self.layers], x)
        return out


def product(matrix: jax.Array | LayerOf | InStack, x: jax.Array) -> jax.Array:
    """x [..., I] times a layer's matrix [I, J], in the type of x."""
    if isinstance(matrix, LayerOf | InStack):
        return matrix.product(x)
    return x @ matrix.astype(x.dtype)


def _runs_in(heads: Heads, x_btd: jax.Array) -> jax.Array:
    """Heads [B, T, N, H] of x; one product a run, of a batch of heads."""
    batch, length, width = x_btd.shape
    x_md = x_btd.reshape(-1, width)

    def of_run(run_ndh: jax.Array) -> jax.Array:
        x_nmd = jnp.broadcast_to(x_md, (len(run_ndh), *x_md.shape))
        return jnp.einsum("nmd,ndh->nmh", x_nmd, run_ndh.astype(x_md.dtype))

    out_nmh = jnp.concatenate([of_run(run) for run in heads.runs])
    if not heads.in_order:
        out_nmh = out_nmh[np.argsort(heads.order)]
    return out_nmh.swapaxes(0, 1).reshape(batch, length, len(heads.order), -1)


def _runs_out(heads: Heads, heads_btnh: jax.Array) -> jax.Array:
    """Output [B, T, D] of head outputs; one product a run."""
    if not heads.in_order:
        heads_btnh = heads_btnh[:, :, np.array(heads.order)]
    ends = np.cumsum([len(run) for run in heads.runs])
    parts = jnp.split(heads_btnh, ends[:-1], axis=2)
    out = [
        part.reshape(*part.shape[:2], -1) @ run.reshape(-1, run.shape[-1]).astype(part.dtype)
        for part, run in zip(parts, heads.runs, strict=True)
    ]
    return sum(out[1:], start=out[0])
