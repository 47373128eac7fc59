"""Weights that lie on a mesh of devices, brought to the hosts a slice at a time."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# Of a slice that is gathered, so many bytes are on a device at a time.
PIECE_BYTES = 256 * 2**20


def on_host(
    array: jax.Array | np.ndarray, rows: int | np.ndarray | Sequence[int] | None = None, dtype: str | None = None
) -> np.ndarray:
    """Rows of an array's leading axis in this host's memory.

    Of an array that lies on several processes' devices, all processes must ask for the same rows, and all get them; on
    a device that takes `PIECE_BYTES` at most, beside the slice's part that it holds.

    Args:
      array: anywhere.
      rows: a row, which is then no axis of the result; some rows; by default all of the array. Of an array on several
        processes, its leading axis must not be cut for rows to be asked for.
      dtype: type to bring them in, rounded where they lie; by default their own.
    """
    if isinstance(rows, int):
        return on_host(array, [rows], dtype)[0]
    target = jnp.dtype(dtype or array.dtype)
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        part = array if rows is None else array[np.asarray(rows)]
        return np.asarray(part.astype(target))
    where = None if rows is None else np.asarray(rows, np.int32)
    shape = array.shape if where is None else (len(where), *array.shape[1:])
    held = array.sharding.shard_shape(shape)
    axis, size = _piece_of(shape, held, target)
    values = np.empty(shape, target)
    # The axis that is gathered in pieces, as the devices' parts of it: of each, a piece has the same places.
    parts = values.reshape(*shape[:axis], -1, held[axis], *shape[axis + 1 :])
    inside = (slice(None),) * (axis + 1)
    for start in range(0, held[axis], size):
        start = min(start, held[axis] - size)
        piece = _piece(array, where, np.int32(start), axis=axis, size=size, dtype=target, sharding=array.sharding)
        on_one = np.asarray(piece.addressable_data(0))
        parts[(*inside, slice(start, start + size))] = on_one.reshape(*shape[:axis], -1, size, *shape[axis + 1 :])
    return values


def lowered(array: jax.ShapeDtypeStruct, rows: Sequence[int] | None, dtype: str) -> jax.stages.Lowered:
    """The program by which `on_host` brings a piece of some rows, to be compiled for devices that are not there."""
    where = None if rows is None else np.asarray(rows, np.int32)
    shape, target = array.shape if where is None else (len(where), *array.shape[1:]), jnp.dtype(dtype)
    axis, size = _piece_of(shape, array.sharding.shard_shape(shape), target)
    return _piece.lower(array, where, np.int32(0), axis=axis, size=size, dtype=target, sharding=array.sharding)


def _piece_of(shape: tuple[int, ...], held: tuple[int, ...], dtype: np.dtype) -> tuple[int, int]:
    """The axis that is gathered in pieces, and how much of each device's part of it a piece has."""
    axis = int(np.argmax(held))
    return axis, max(1, min(held[axis], held[axis] * PIECE_BYTES // (math.prod(shape) * dtype.itemsize)))


@partial(jax.jit, static_argnames=("axis", "size", "dtype", "sharding"))
def _piece(
    array: jax.Array,
    rows: jax.Array | None,
    start: jax.Array,
    *,
    axis: int,
    size: int,
    dtype: jnp.dtype,
    sharding: NamedSharding,
) -> jax.Array:
    """The same places of an axis in every device's part of an array, side by side, whole on all devices."""

    def gather(part: jax.Array, rows: jax.Array | None, start: jax.Array) -> jax.Array:
        part = part if rows is None else part[rows]
        part = jax.lax.dynamic_slice_in_dim(part, start, size, axis).astype(dtype)
        for place, names in enumerate(sharding.spec):
            part = part if names is None else jax.lax.all_gather(part, names, axis=place, tiled=True)
        return part

    everywhere = PartitionSpec()
    whole: jax.Array = jax.shard_map(
        gather,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, everywhere, everywhere),
        out_specs=everywhere,
        check_vma=False,
    )(array, rows, start)
    return whole
