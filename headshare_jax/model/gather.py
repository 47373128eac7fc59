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
      rows: a row, which is then no axis of the result; some rows; by default all of the array.
      dtype: type to bring them in, rounded where they lie; by default their own.
    """
    if isinstance(rows, int):
        return on_host(array, [rows], dtype)[0]
    target = jnp.dtype(dtype or array.dtype)
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        part = array if rows is None else array[np.asarray(rows)]
        return np.asarray(part.astype(target))
    where = None if rows is None else np.asarray(rows, np.int32)
    shape, held = _shapes(array, where)
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
    target = jnp.dtype(dtype)
    axis, size = _piece_of(*_shapes(array, where), target)
    return _piece.lower(array, where, np.int32(0), axis=axis, size=size, dtype=target, sharding=array.sharding)


def _shapes(
    array: jax.Array | jax.ShapeDtypeStruct, where: np.ndarray | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of some rows of an array, or all of it: the shape, and that of a device's part, which has each of some rows."""
    if where is None:
        return array.shape, array.sharding.shard_shape(array.shape)
    shape, sharding = (len(where), *array.shape[1:]), array.sharding
    assert isinstance(sharding, NamedSharding)
    return shape, NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:])).shard_shape(shape)


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
    # The mesh's axes by which rows that are asked for are cut.
    across = sharding.spec[0] if rows is not None and sharding.spec else None

    def gather(part: jax.Array, rows: jax.Array | None, start: jax.Array) -> jax.Array:
        if rows is not None:
            first = 0 if across is None else jax.lax.axis_index(across) * len(part)
            part = part.at[rows - first].get(mode="fill", fill_value=0, wrap_negative_indices=False)
        part = jax.lax.dynamic_slice_in_dim(part, start, size, axis).astype(dtype)
        if across is not None:
            # One device along these axes has a row, the others have zeros of it.
            bits = jax.lax.bitcast_convert_type(part, f"uint{8 * part.dtype.itemsize}")
            part = jax.lax.bitcast_convert_type(jax.lax.psum(bits, across), part.dtype)
        for place, names in enumerate(sharding.spec):
            if names is not None and (place or rows is None):
                part = jax.lax.all_gather(part, names, axis=place, tiled=True)
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
