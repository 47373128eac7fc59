"""TPU topologies without the hardware: their devices, to compile for, and the published rates of their chips."""

import os
import re
from collections.abc import Sequence
from importlib.util import find_spec
from math import inf, prod

import jax

from headshare_jax.chips import CHIPS, Chip
from headshare_jax.errors import HeadshareError

EXAMPLES = "v5e:1x1, v5e:2x2, v5e:16x16, v5p:2x2x1, v5p:8x8x8, v6e:16x16"
_NAME = re.compile(r"(v5e|v5p|v6e):(\d{1,2}x\d{1,2}(?:x\d{1,2})?)")


def chip_of(topology: str) -> tuple[Chip, int]:
    """The chips of a topology, and how many it has.

    Raises:
      HeadshareError: not the name of a topology, or more chips than a pod has.
    """
    found = _NAME.fullmatch(topology)
    sizes = [int(size) for size in found[2].split("x")] if found else []
    if not found or len(sizes) != (3 if found[1] == "v5p" else 2):
        raise HeadshareError(f"{topology!r} is no TPU topology; give one such as {EXAMPLES}.", option="topology")
    chip = CHIPS[found[1]]
    if not 0 < prod(sizes) <= chip.most_chips:
        raise HeadshareError(
            f"{topology} has {prod(sizes)} chips, but a {chip.name} pod 1 to {chip.most_chips}.", option="topology"
        )
    return chip, prod(sizes)


def topology_devices(topology: str) -> Sequence[jax.Device]:
    """Devices of a topology to compile for; none of them need be there.

    Raises:
      HeadshareError: not the name of a topology that libtpu knows, or no libtpu.
    """
    chip_of(topology)
    if find_spec("libtpu") is None:
        raise HeadshareError(
            "Compiling for a TPU needs libtpu: pip install 'headshare-jax[tpu]'. "
            "Without it, the shapes alone give an estimate.",
            option="host",
        )
    # What libtpu would else ask the machine's metadata server, or take a lock for, as if it were to run something.
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise HeadshareError(
            f"libtpu has no topology {topology}; give one such as {EXAMPLES}.", option="topology"
        ) from error


def compile_program(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """Compiles for a topology's devices, past JAX's cache of compiled programs, which cannot read such a one again."""
    setting = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, setting)
    jax.config.update(setting, inf)
    try:
        return lowered.compile()
    finally:
        jax.config.update(setting, before)


_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}
