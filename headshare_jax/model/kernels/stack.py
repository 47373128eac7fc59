"""A GPU kernel for products of a few tokens with matrices that lie in a stack, of which it copies none.

XLA's GPU backend copies a layer's matrices out of their stack, and its heads out of their pool, before it multiplies by
them, which moves three times their bytes. Here each program reads a tile where it lies and multiplies it by its rows of
x; what the programs give is summed afterwards.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton

# Sides of a tile are powers of two up to this, and divide the matrix's.
_MOST_SIDE = 128


def times_in_stack(x_mi: jax.Array, stack_sij: jax.Array, index_n: jax.Array, *, side_by_side: bool) -> jax.Array:
    """x [M, I] times matrices picked from a stack; M is at most `reading.KERNEL_TOKENS`.

    Args:
      x_mi: rows of activations.
      stack_sij: [S, I, J], matrices of all layers or a pool of heads.
      index_n: int32 [N], which of them; one past the last stands for the last.
      side_by_side: the picked matrices are side by side, the result [M, N * J]; else one above the other, and x is
        [M, N * I], the result [M, J].
    """
    index_n = jnp.minimum(index_n, len(stack_sij) - 1)
    kernel = partial(_times, side_by_side=side_by_side)
    out_mj: jax.Array = jax.lax.platform_dependent(
        x_mi, stack_sij, index_n, cuda=kernel, default=partial(kernel, interpret=True)
    )
    return out_mj


def _times(
    x_mi: jax.Array, stack_sij: jax.Array, index_n: jax.Array, *, side_by_side: bool, interpret: bool = False
) -> jax.Array:
    """x times the matrix that the N picked ones are side by side, or one above the other; float32 sums."""
    _, height, width = stack_sij.shape
    columns = len(index_n) * width if side_by_side else width
    tile = (_side(height), _side(width))
    tokens, rows = x_mi.shape
    parts_pmj = pl.pallas_call(
        partial(_multiply_tile, tile=tile, side_by_side=side_by_side),
        out_shape=jax.ShapeDtypeStruct((rows // tile[0], tokens, columns), jnp.float32),
        grid=(columns // tile[1], rows // tile[0]),
        in_specs=[pl.no_block_spec] * 3,
        out_specs=pl.BlockSpec((1, tokens, tile[1]), lambda column, row: (row, 0, column)),
        compiler_params=pallas_triton.CompilerParams(num_warps=4),
        interpret=interpret,
    )(index_n, x_mi, stack_sij)
    return jnp.sum(parts_pmj, axis=0).astype(x_mi.dtype)


def _multiply_tile(
    index_n: Any, x_mi: Any, stack_sij: Any, out_1mj: Any, *, tile: tuple[int, int], side_by_side: bool
) -> None:
    """One tile's part of the product."""
    column, row = pl.program_id(0) * tile[1], pl.program_id(1) * tile[0]
    _, height, width = stack_sij.shape
    place = column // width if side_by_side else row // height
    rows, columns = pl.ds(jax.lax.rem(row, height), tile[0]), pl.ds(jax.lax.rem(column, width), tile[1])
    tile_ij = stack_sij[index_n[place], rows, columns].astype(jnp.float32)
    for token in range(x_mi.shape[0]):
        x_i = x_mi[token, pl.ds(row, tile[0])].astype(jnp.float32)
        out_1mj[0, token, :] = jnp.sum(x_i[:, None] * tile_ij, axis=0)


def _side(size: int) -> int:
    """The largest power of two that divides a side, within limits."""
    return min(size & -size, _MOST_SIDE)
