"""Placing: a source's parameters straight onto the devices where they are used, one device or a mesh."""

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from headshare_jax.model.mesh import parameter_sharding
from headshare_jax.parameters import PARAMETERS
from headshare_jax.sharing.source import WeightSource, assemble, assemble_parts, stored_shape
from headshare_jax.sharing.view import CastView, DenseView, ReplacedView, SharedView


@runtime_checkable
class OnDevices(Protocol):
    """A source whose parameters are in memory as a model stores them."""

    def array(self, name: str) -> jax.Array:
        """A parameter, shaped as `source.stored_shape` says."""


def place(
    source: WeightSource, names: Iterable[str], mesh: Mesh | None = None, dtype: str | None = None
) -> dict[str, jax.Array]:
    """Parameters of a source as a model stores them; each process reads what its devices hold.

    A source on disk is read layer by layer, once: peak memory of the host is what is returned and one layer's slice of
    a parameter. What a model in memory holds is moved from device to device; what a map leaves as it is, and is to lie
    where it lies, is the model's own array.

    Args:
      source: the weights.
      names: parameters.
      mesh: where they are to lie; by default on one device.
      dtype: their type; by default the source's own.
    """
    placed = {}
    for name in names:
        held, target = _held(source, name), jnp.dtype(dtype or source.dtype(name))
        if mesh is None:
            placed[name] = _read(source, name).astype(target) if held is None else held.astype(target)
            continue
        sharding = parameter_sharding(mesh, source.config, name, stored_shape(source.config, name, source.sharing))
        placed[name] = _read_onto(source, name, sharding, target) if held is None else _moved(held, sharding, target)
    return placed


def rows_of_pool(pool: jax.Array, slots: np.ndarray | jax.Array) -> jax.Array:
    """Rows of a pool; zeros where a slot is outside it, as those of dropped units are."""
    return pool.at[jnp.asarray(slots)].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def _held(source: WeightSource, name: str) -> jax.Array | None:
    """A parameter that is on devices, as the source has it; None if it is to be read."""
    if isinstance(source, OnDevices):
        array = source.array(name)
        # A model gathered from several hosts is NumPy's arrays, of which each process takes its part.
        return array if isinstance(array, jax.Array) else None
    if not isinstance(source, SharedView | DenseView | ReplacedView | CastView):
        return None
    base = _held(source.base, name)
    if base is not None and isinstance(source, CastView):
        return base.astype(source.dtype(name))
    projection = PARAMETERS[name].pool
    if base is None or (isinstance(source, ReplacedView) and name in {changed for changed, _ in source.values}):
        return None
    if isinstance(source, SharedView) and projection is not None and projection in source.sharing.pooled:
        return rows_of_pool(base, source.sharing.stored_slots(projection))
    if isinstance(source, DenseView) and projection is not None and source.base.sharing is not None:
        return rows_of_pool(base, source.base.sharing.pool_index(projection).ravel())
    return base


def _read(source: WeightSource, name: str) -> jax.Array:
    """A parameter of a source in memory of its own, on the default device."""
    value = assemble(source, name)
    # Without layers it may be a view of a mapped file or of another model's memory, which must not be taken over.
    return jax.device_put(value) if PARAMETERS[name].layered else jnp.array(value)


def _moved(array: jax.Array, sharding: NamedSharding, dtype: np.dtype) -> jax.Array:
    """An array in another place and type, never the same one; of several hosts, all processes must call it together."""
    return jax.jit(lambda array: jnp.copy(array.astype(dtype)), out_shardings=sharding)(array)


def _read_onto(source: WeightSource, name: str, sharding: NamedSharding, dtype: np.dtype) -> jax.Array:
    shape = stored_shape(source.config, name, source.sharing)
    places = {device: part for device, part in sharding.addressable_devices_indices_map(shape).items() if part}
    # Told apart by their text: slices themselves cannot be hashed.
    parts = {str(part): part for part in places.values()}
    values = dict(zip(parts, assemble_parts(source, name, list(parts.values())), strict=True))
    arrays = [jax.device_put(values[str(part)].astype(dtype), device) for device, part in places.items()]
    return jax.make_array_from_single_device_arrays(shape, sharding, arrays)
