"""Device meshes, and where parameters and batches lie on them."""

from collections.abc import Sequence
from math import prod

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PARAMETERS

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")


def make_mesh(sizes: Sequence[int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes `AXES`; one size may be -1, for all devices that the others leave.

    Raises:
      HeadshareError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = mesh_shape(sizes, len(devices))
    return Mesh(np.asarray(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_shape(sizes: Sequence[int], count: int) -> tuple[int, ...]:
    """Sizes of a mesh's axes on so many devices; errors as of `make_mesh`."""
    shape = list(sizes)
    if len(shape) != len(AXES) or shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise HeadshareError(
            f"A mesh needs a positive size for each of {', '.join(AXES)} (one may be -1), not {sizes}."
        )
    known = prod(size for size in shape if size != -1)
    if -1 in shape:
        if count % known:
            raise HeadshareError(
                f"A mesh of {' x '.join(map(str, sizes))} ({', '.join(AXES)}; -1 takes what is left) needs a multiple "
                f"of {known} devices, but there are {count}; give smaller sizes."
            )
        shape[shape.index(-1)] = count // known
    if prod(shape) != count:
        raise HeadshareError(
            f"A mesh of {' x '.join(map(str, shape))} ({', '.join(AXES)}) needs {prod(shape)} devices, "
            f"but there are {count}."
        )
    return tuple(shape)


def parameter_sharding(
    mesh: Mesh | AbstractMesh, config: LlamaConfig, name: str, shape: Sequence[int]
) -> NamedSharding:
    """Where a parameter lies; an axis that its part of the mesh does not divide is not cut."""
    parameter, spec = PARAMETERS[name], []
    for letter, size in zip(parameter.axes, shape, strict=True):
        placed = parameter.cuts.get(letter)
        names = (placed,) if isinstance(placed, str) else placed or ()
        spec.append(placed if names and size % prod(mesh.shape[axis] for axis in names) == 0 else None)
    return NamedSharding(mesh, PartitionSpec(*spec))


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Where a batch lies whose rows are along `axis`: cut over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def nvidia_capability(device: jax.Device) -> float:
    """Compute capability of an NVIDIA GPU, as 9.0; 0 for any other device."""
    text = str(getattr(device, "compute_capability", ""))
    return float(text) if text.replace(".", "", 1).isdigit() else 0.0
