"""Placing: a source's parameters straight onto the devices where they are used, one device or a mesh."""

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from headshare_jax.model.mesh import parameter_sharding
from headshare_jax.model.spread import read_layer_onto, read_onto, slice_sharding
from headshare_jax.parameters import PARAMETERS
from headshare_jax.sharing.columns import columns_at, over_heads, to_columns, to_heads
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource, assemble, pool_index, slots_per_head, stored_shape
from headshare_jax.sharing.tie import DROPPED
from headshare_jax.sharing.view import CastView, DenseView, ReplacedView, SharedView


@runtime_checkable
class OnDevices(Protocol):
    """A source whose parameters are in memory as a model stores them."""

    def array(self, name: str) -> jax.Array:
        """A parameter, shaped as `source.stored_shape` says."""


def place(
    source: WeightSource, names: Iterable[str], mesh: Mesh | None = None, dtype: str | None = None
) -> dict[str, jax.Array]:
    """Parameters of a source as a model stores them.

    A source on disk is read layer by layer, once. Onto a mesh of several processes, which all call it, each process
    reads other layers, and the devices pass them on: together the processes read no byte twice. Beside what is
    returned, a host has two slices of a layer in memory, and so has a device. What a model in memory holds is moved
    from device to device; what a map leaves as it is, and is to lie where it lies, is the model's own array.

    Args:
      source: the weights.
      names: parameters.
      mesh: where they are to lie; by default on one device.
      dtype: their type; by default the source's own.
    """
    placed, names = {}, list(names)
    for name in names:
        held, target = _held(source, name), jnp.dtype(dtype or source.dtype(name))
        if mesh is None:
            placed[name] = _read(source, name).astype(target) if held is None else held.astype(target)
        elif held is not None:
            placed[name] = _moved(held, _sharding(source, name, mesh), target)
    if mesh is not None:
        placed |= read_onto(source, [name for name in names if name not in placed], mesh, dtype)
    return {name: placed[name] for name in names}


def rows_of_pool(pool: jax.Array, slots: np.ndarray | jax.Array) -> jax.Array:
    """Rows of a pool; zeros where a slot is outside it, as those of dropped units are."""
    return pool.at[jnp.asarray(slots)].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _held(source: WeightSource, name: str) -> jax.Array | None:
    """A parameter that is on devices, as the source has it; None if it is to be read."""
    if isinstance(source, OnDevices):
        array = source.array(name)
        # A model may be of NumPy's arrays.
        return array if isinstance(array, jax.Array) else None
    if not isinstance(source, SharedView | DenseView | ReplacedView | CastView):
        return None
    base = _held(source.base, name)
    if base is not None and isinstance(source, CastView):
        return base.astype(source.dtype(name))
    projection = PARAMETERS[name].pool
    if base is None:
        return None
    if isinstance(source, ReplacedView):
        return _with_slices(source, name, base)
    if isinstance(source, SharedView) and projection is not None:
        return shared_pool(source.sharing, name, base)
    if isinstance(source, DenseView) and projection is not None and source.base.sharing is not None:
        shared = source.base.sharing
        return to_heads(name, rows_of_pool(base, shared.pool_index(projection).ravel()), shared.slots_per_head)
    return base


def shared_pool(sharing: SharingMap, name: str, pool: jax.Array) -> jax.Array:
    """What a map keeps of a dense model's pool, which is the same array where it keeps all."""
    projection = PARAMETERS[name].pool
    assert projection is not None
    stored = sharing.stored_slots(projection)
    if sharing.widths is not None:
        return columns_at(name, pool, stored, sharing.widths.head_dim)
    return rows_of_pool(pool, stored) if projection in sharing.pooled else pool


def place_layer(source: WeightSource, names: Sequence[str], layer: int, mesh: Mesh) -> dict[str, jax.Array]:
    """One layer's slices of parameters, as `WeightSource.read` has them, in float32 on a mesh.

    Of several processes, which all call it, each reads some of the slices; what a model on the mesh holds, which none
    of them has as a whole, is moved from device to device.
    """
    placed = {}
    for name in names:
        held = _held_slice(source, name, layer)
        if held is not None and not held.is_fully_addressable:
            placed[name] = _moved(held, slice_sharding(mesh, source.config, name), np.dtype(np.float32))
    return placed | read_layer_onto(source, [name for name in names if name not in placed], layer, mesh)


def _held_slice(source: WeightSource, name: str, layer: int) -> jax.Array | None:
    """A layer's slice of a parameter that is on devices, as `WeightSource.read` has it; None if it is to be read."""
    projection = PARAMETERS[name].pool
    if isinstance(source, ReplacedView) and (name, layer) in source.values:
        value = source.values[name, layer]
        return value if isinstance(value, jax.Array) else None
    if isinstance(source, CastView):
        base = _held_slice(source.base, name, layer)
        return None if base is None else base.astype(source.dtype(name))
    if isinstance(source, SharedView) and projection is not None:
        pool = _held(source.base, name)
        return None if pool is None else _shared_slice(source.sharing, name, pool, layer)
    if isinstance(source, SharedView | DenseView | ReplacedView):
        return _held_slice(source.base, name, layer)
    array = _held(source, name)
    if array is None or projection is None:
        return None if array is None else array[layer]
    rows = rows_of_pool(array, pool_index(source.config, projection, source.sharing)[layer])
    return to_heads(name, rows, slots_per_head(source.sharing))


def _shared_slice(sharing: SharingMap, name: str, pool: jax.Array, layer: int) -> jax.Array:
    """A layer's heads as a map shares them, of a dense model's pool."""
    projection = PARAMETERS[name].pool
    assert projection is not None
    donor_n = sharing.head_donor(projection)[layer]
    heads = rows_of_pool(pool, np.where(donor_n == DROPPED, len(pool), donor_n))
    if sharing.widths is None:
        return heads
    return jnp.where(over_heads(name, sharing.kept_columns(projection)[layer]), heads, heads.dtype.type(0))


def _with_slices(source: ReplacedView, name: str, base: jax.Array) -> jax.Array | None:
    """A parameter on devices with the slices that a view replaces; None where these are not on devices."""
    values = {layer: value for (changed, layer), value in source.values.items() if changed == name}
    if not all(isinstance(value, jax.Array) for value in values.values()):
        return None
    projection = PARAMETERS[name].pool
    index = None if projection is None else pool_index(source.config, projection, source.sharing)
    by_columns = projection is not None and slots_per_head(source.sharing) > 1
    for layer, value in values.items():
        # A row that several heads use is not replaced by anything else; a dropped head's is outside the pool.
        rows = layer if index is None else index[layer]
        value = jnp.asarray(value, base.dtype)
        base = base.at[rows].set(to_columns(name, value) if by_columns else value, mode="drop")
    return base


def _read(source: WeightSource, name: str) -> jax.Array:
    """A parameter of a source in memory of its own, on the default device."""
    value = assemble(source, name)
    # Without layers it may be a view of a mapped file or of another model's memory, which must not be taken over.
    return jax.device_put(value) if PARAMETERS[name].layered else jnp.array(value)


def _moved(array: jax.Array, sharding: NamedSharding, dtype: np.dtype) -> jax.Array:
    """An array in another place and type, never the same one; of several hosts, all processes must call it together."""
    return jax.jit(lambda array: jnp.copy(array.astype(dtype)), out_shardings=sharding)(array)


def _sharding(source: WeightSource, name: str, mesh: Mesh) -> NamedSharding:
    return parameter_sharding(mesh, source.config, name, stored_shape(source.config, name, source.sharing))
