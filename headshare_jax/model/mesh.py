"""Device meshes, and where parameters and batches lie on them."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from math import prod

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PARAMETERS

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")

logger = logging.getLogger(__name__)


def make_mesh(sizes: Sequence[int], devices: Sequence[jax.Device] | None = None, *, dcn_data: int = 1) -> Mesh:
    """A mesh with the axes `AXES`; one size may be -1, for all devices that the others leave.

    Neighbours on an axis are neighbours in the chips' network, as far as its shape allows. Of several slices, which a
    slower network joins, each holds the others' parts of the axes fsdp and tensor too, so that the data axis alone
    crosses it.

    Args:
      sizes: of data, fsdp and tensor, within a slice.
      devices: by default all.
      dcn_data: slices; the mesh's data axis is so many times as long. Where devices tell no slices, a slice is one
        process, or as many as there are for each.

    Raises:
      HeadshareError: the sizes do not multiply to the number of devices, or the devices are not in so many slices.
    """
    slices = _slices(jax.devices() if devices is None else devices, dcn_data)
    shape = mesh_shape(sizes, len(slices[0]))
    parts = [_ordered(shape, devices) for devices in slices]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_mesh(sizes: Sequence[int] | None, *, usual: Sequence[int] = (1, -1, 1)) -> Mesh | None:
    """A mesh of this machine's devices, the first ones if it needs fewer; None for one device without a wish.

    Args:
      sizes: as of `make_mesh`; None for the usual ones of all devices.
      usual: likewise.

    Raises:
      HeadshareError: as `make_mesh`.
    """
    devices = jax.local_devices()
    if sizes is None and len(devices) == 1:
        return None
    sizes = usual if sizes is None else sizes
    count = prod(sizes)
    return make_mesh(sizes, devices[:count] if count > 0 else devices)


def _slices(devices: Sequence[jax.Device], count: int) -> list[list[jax.Device]]:
    """The devices of each of so many slices."""
    groups: dict[int, list[jax.Device]] = defaultdict(list)
    for device in devices:
        groups[getattr(device, "slice_index", 0)].append(device)
    told = len(groups)
    if count == 1:
        if told > 1 and devices[0].platform == "tpu":
            logger.warning(
                "The devices are in %d slices, but the mesh is not: all of its axes cross the network between them; "
                "give it dcn_data: %d.",
                told,
                told,
            )
        return [list(devices)]
    if told == 1:
        groups = defaultdict(list)
        for device in devices:
            groups[device.process_index].append(device)
    each, left = divmod(len(groups), count)
    parts = [groups[index] for index in sorted(groups)]
    if each == 0 or left or (told > 1 and each > 1) or len(set(map(len, parts))) > 1:
        raise HeadshareError(
            f"A mesh of {count} slices (dcn_data) needs devices in so many equal ones, but these are in {len(groups)} "
            f"{'slices' if told > 1 else 'processes'}; give another number."
        )
    return [list(chain(*parts[begin : begin + each])) for begin in range(0, len(parts), each)]


def _ordered(shape: tuple[int, ...], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of a slice as a mesh."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (AssertionError, NotImplementedError, ValueError):
        # Some chips of a slice only, or a shape that its network has nothing like.
        return np.asarray(devices).reshape(shape)


def mesh_shape(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Sizes of a mesh's axes on so many devices; errors as of `make_mesh`."""
    shape = list(sizes)
    if len(shape) != len(AXES) or shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise HeadshareError(
            f"A mesh needs a positive size for each of {', '.join(AXES)} (one may be -1), not {sizes}.", option="mesh"
        )
    known = prod(size for size in shape if size != -1)
    if -1 in shape:
        if count % known:
            raise HeadshareError(
                f"A mesh of {' x '.join(map(str, sizes))} ({', '.join(AXES)}; -1 takes what is left) needs a multiple "
                f"of {known} devices, but there are {count}; give sizes whose product divides {count}.",
                option="mesh",
            )
        shape[shape.index(-1)] = count // known
    if prod(shape) != count:
        raise HeadshareError(
            f"A mesh of {' x '.join(map(str, shape))} ({', '.join(AXES)}) needs {prod(shape)} devices, "
            f"but there are {count}; give sizes whose product is {count}.",
            option="mesh",
        )
    return tuple(shape)


def parameter_sharding(
    mesh: Mesh | AbstractMesh, config: LlamaConfig, name: str, shape: Sequence[int]
) -> NamedSharding:
    """Where a parameter lies; an axis that its part of the mesh does not divide is not cut."""
    parameter, spec = PARAMETERS[name], []
    # A row of a pool may be a column of a head.
    axes = parameter.axes if len(shape) == len(parameter.axes) else parameter.axes.replace("h", "")
    for letter, size in zip(axes, shape, strict=True):
        placed = parameter.cuts.get(letter)
        names = (placed,) if isinstance(placed, str) else placed or ()
        spec.append(placed if names and size % prod(mesh.shape[axis] for axis in names) == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Where a batch lies whose rows are along `axis`: cut over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def cut_along_weights(x_btd: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Activations of few tokens, cut along D as the weights are: these then stay, and sums of the tokens move."""
    if mesh is None or mesh.shape["fsdp"] == 1 or len(x_btd) % mesh.shape["data"]:
        return x_btd
    return jax.lax.with_sharding_constraint(x_btd, NamedSharding(mesh, PartitionSpec("data", None, "fsdp")))


def rows_of(mesh: Mesh | AbstractMesh | None) -> int:
    """Parts in which a batch is cut over a mesh; 1 without one."""
    return 1 if mesh is None else prod(mesh.shape[axis] for axis in BATCH)


def put(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array that every process has whole, in the place that a sharding says."""
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def nvidia_capability(device: jax.Device) -> float:
    """Compute capability of an NVIDIA GPU, as 9.0; 0 for any other device."""
    text = str(getattr(device, "compute_capability", ""))
    return float(text) if text.replace(".", "", 1).isdigit() else 0.0
