"""Weights from a source onto a mesh: read in blocks, each by one process, and passed on to where they are to lie."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from headshare_jax.ahead import in_order
from headshare_jax.config import LlamaConfig
from headshare_jax.model.gather import PIECE_BYTES
from headshare_jax.model.mesh import AXES, parameter_sharding
from headshare_jax.parameters import slice_shape
from headshare_jax.sharing.source import WeightSource, path_of, read_rows, stored_rows, stored_shape

# Layers are read together up to so many bytes; one that is larger alone.
BLOCK_BYTES = 2**20


@dataclass(frozen=True)
class Block:
    """Rows of an array that are read, and put in their place, at once.

    Attributes:
      name: of the array.
      start: the first of them.
      shape, dtype: of their values.
      read: gives them.
    """

    name: str
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def read_onto(source: WeightSource, names: Sequence[str], mesh: Mesh, dtype: str | None) -> dict[str, jax.Array]:
    """Parameters of a source that is not on devices, as a model stores them on a mesh, all of whose processes call it.

    Args:
      source: the weights.
      names: parameters.
      mesh: where they are to lie.
      dtype: their type; by default the source's own.
    """
    targets, blocks = dict[str, jax.ShapeDtypeStruct](), list[Block]()
    for name in names:
        shape = stored_shape(source.config, name, source.sharing)
        sharding = parameter_sharding(mesh, source.config, name, shape)
        targets[name] = jax.ShapeDtypeStruct(shape, dtype or source.dtype(name), sharding=sharding)
        blocks += _stored_blocks(source, name, shape)
    return _spread(blocks, targets, mesh, read_ahead=_is_stored(source))


def read_layer_onto(source: WeightSource, names: Sequence[str], layer: int, mesh: Mesh) -> dict[str, jax.Array]:
    """One layer's slices of parameters, as `WeightSource.read` has them, in float32 and otherwise as `read_onto`."""
    targets, blocks = {}, []
    for name in names:
        shape = slice_shape(source.config, name)
        targets[name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=slice_sharding(mesh, source.config, name))
        blocks.append(Block(name, 0, shape, source.dtype(name), partial(source.read, name, layer)))
    return _spread(blocks, targets, mesh, read_ahead=_is_stored(source))


def from_first(values: np.ndarray | None, like: jax.ShapeDtypeStruct, mesh: Mesh) -> jax.Array:
    """What the first process of a mesh has, placed as `like` says; all of them call it, the others without values."""
    block = Block("", 0, like.shape, like.dtype, lambda: np.empty(0))
    return _Writer(mesh).write(_zeros(like.shape, like.dtype, like.sharding), block, values)


def slice_sharding(mesh: Mesh, config: LlamaConfig, name: str) -> NamedSharding:
    """Where a layer's slice of a parameter lies; as the parameter does, along the axes that it has too."""
    shape = slice_shape(config, name)
    whole = parameter_sharding(mesh, config, name, stored_shape(config, name))
    return NamedSharding(mesh, PartitionSpec(*whole.spec[-len(shape) :]))


def _spread(
    blocks: Sequence[Block], targets: Mapping[str, jax.ShapeDtypeStruct], mesh: Mesh, *, read_ahead: bool
) -> dict[str, jax.Array]:
    """Arrays as the targets have them, made of blocks of which each process reads some."""
    writer = _Writer(mesh)
    readers = _readers([math.prod(block.shape) * block.dtype.itemsize for block in blocks], writer.processes)
    me, placed, turns = jax.process_index(), dict[str, jax.Array](), list(zip(blocks, readers, strict=True))
    reads = (block.read for block, reader in turns if reader == me)
    mine = in_order(lambda read: read(), reads, int(read_ahead), 1)
    for block, reader in turns:
        target = targets[block.name]
        if block.name not in placed:
            placed[block.name] = _zeros(target.shape, target.dtype, target.sharding)
        placed[block.name] = writer.write(placed[block.name], block, next(mine) if reader == me else None)
        if len(writer.processes) > 1:
            # Else blocks pile up, and on CPUs sums of two parameters may meet in another order elsewhere, and wait
            # for each other for good.
            placed[block.name].block_until_ready()
    return placed


def _is_stored(source: WeightSource) -> bool:
    """Whether reading is left to files: devices that several threads give work to may take it in different orders."""
    return path_of(source) is not None


def _stored_blocks(source: WeightSource, name: str, shape: tuple[int, ...]) -> Iterator[Block]:
    """A stored parameter's rows in blocks."""
    dtype = source.dtype(name)
    row_bytes = math.prod(shape[1:]) * dtype.itemsize
    start, stop, reads = 0, 0, list[Callable[[], np.ndarray]]()

    def block() -> Block:
        return Block(name, start, (stop - start, *shape[1:]), dtype, partial(_together, reads))

    for rows, layer, wanted in stored_rows(source, name):
        if reads and (rows.stop - start) * row_bytes > BLOCK_BYTES:
            yield block()
            start, reads = rows.start, []
        stop = rows.stop
        reads.append(partial(read_rows, source, name, layer, wanted))
    if reads:
        yield block()


def _together(reads: Sequence[Callable[[], np.ndarray]]) -> np.ndarray:
    parts = [read() for read in reads]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _readers(sizes: Sequence[int], processes: Sequence[int]) -> list[int]:
    """Which process reads each of some blocks: the one that has least to read so far, as all of them reckon alike."""
    so_far, readers = dict.fromkeys(processes, 0), []
    for size in sizes:
        reader = min(processes, key=lambda process: (so_far[process], process))
        so_far[reader] += size
        readers.append(reader)
    return readers


class _Writer:
    """Puts blocks in their places on a mesh; of several processes, one has the block, and the others have zeros."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self.processes = sorted({device.process_index for device in mesh.devices.flat})
        self._nothing: dict[jax.Device, jax.Array] = {}
        self._shape: tuple[tuple[int, ...], np.dtype] | None = None

    def write(self, target: jax.Array, block: Block, values: np.ndarray | None) -> jax.Array:
        """The array with a block's values in their place; the target is given up. Without values, others have them."""
        if len(self.processes) == 1:
            assert values is not None
            return _put(target, jax.device_put(values, target.sharding), np.int32(block.start), target.sharding)
        step = rows_at_once(block.shape, block.dtype)
        for start in range(0, block.shape[0], step):
            some = None if values is None else values[start : start + step]
            shape = (min(step, block.shape[0] - start), *block.shape[1:])
            target = self._write_rows(target, block.start + start, shape, block.dtype, some)
        return target

    def _write_rows(
        self, target: jax.Array, start: int, shape: tuple[int, ...], dtype: np.dtype, values: np.ndarray | None
    ) -> jax.Array:
        if self._shape != (shape, dtype):
            nothing = np.zeros((1, *shape), dtype)
            self._nothing = {device: jax.device_put(nothing, device) for device in self._mesh.local_devices}
            self._shape = (shape, dtype)
        parts = dict(self._nothing)
        if values is not None:
            first = self._mesh.local_devices[0]
            parts[first] = jax.device_put(values[None], first)
        everywhere = NamedSharding(self._mesh, PartitionSpec(AXES))
        whole = (self._mesh.size, *shape)
        staged = jax.make_array_from_single_device_arrays(whole, everywhere, list(parts.values()))
        return put_sum(target, staged, np.int32(start), target.sharding)


def rows_at_once(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Rows of a block that are passed on at a time, so that no device has the whole of a large embedding."""
    return max(1, PIECE_BYTES // (math.prod(shape[1:]) * dtype.itemsize))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _zeros(shape: tuple[int, ...], dtype: np.dtype, sharding: NamedSharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def _put(target: jax.Array, values: jax.Array, start: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The target with some rows in their place; both lie as the sharding says."""
    at = (start, *[jnp.int32(0)] * (target.ndim - 1))
    values = jax.lax.with_sharding_constraint(values, sharding).astype(target.dtype)
    return jax.lax.with_sharding_constraint(jax.lax.dynamic_update_slice(target, values, at), sharding)


@partial(jax.jit, donate_argnums=0, static_argnums=3)
def put_sum(target: jax.Array, staged: jax.Array, start: jax.Array, sharding: NamedSharding) -> jax.Array:
    """The same of what one device has and the others have zeros of, along a first axis; bits are summed, and exact."""
    bits = jax.lax.bitcast_convert_type(staged, f"uint{8 * staged.dtype.itemsize}")
    summed = jax.lax.with_sharding_constraint(jnp.sum(bits, axis=0, dtype=bits.dtype), sharding)
    return _put(target, jax.lax.bitcast_convert_type(summed, staged.dtype), start, sharding)
