"""Products with a layer's matrices and pooled heads, by the way that suits the number of tokens and the device."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from headshare_jax.stack_kernel import InStack

if TYPE_CHECKING:
    from headshare_jax.modeling import Llama

# Up to this many tokens a projection reads its heads one by one, which costs no bytes beyond the weights; above it,
# one gather of the layer's heads is shared by all tokens. A GPU gathers, unless `stack_kernel` reads the heads:
# starting a kernel for every head takes it longer than the copy.
PER_HEAD_TOKENS = 32
STACKED_MATRICES = ("gate_ldf", "up_ldf", "down_lfd")
# By parameter and layer, as `unstacked` gives them.
Matrices = dict[str, tuple[jax.Array, ...]]


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


def unstacked(model: "Llama") -> Matrices:
    """Matrices of all layers in arrays of their own, for `Llama.extend`; on a CPU views of the model's memory."""
    return {
        name: tuple(jax.device_put(matrix) for matrix in np.asarray(getattr(model, name)[...]))
        for name in STACKED_MATRICES
    }


@dataclass(frozen=True)
class LayerOf:
    """A layer's matrix: one of those of all layers, chosen when the program runs."""

    layers: Sequence[jax.Array]
    place: jax.Array

    def product(self, x: jax.Array) -> jax.Array:
        """x [..., I] times the matrix."""
        out: jax.Array = jax.lax.switch(self.place, [partial(product, layer) for layer in self.layers], x)
        return out


def product(matrix: jax.Array | LayerOf | InStack, x: jax.Array) -> jax.Array:
    """x [..., I] times a layer's matrix [I, J], in the type of x."""
    if isinstance(matrix, LayerOf | InStack):
        return matrix.product(x)
    return x @ matrix.astype(x.dtype)
