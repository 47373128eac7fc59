"""Whether a step fits a TPU that is not at hand, and what bounds its speed: the real step, compiled for the chip."""

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
from jax.sharding import Mesh

from headshare_jax.chips import Chip
from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.model.attention import has_kernel
from headshare_jax.model.layer import REMAT_POLICIES
from headshare_jax.model.mesh import make_mesh, mesh_shape
from headshare_jax.plan import estimate, programs
from headshare_jax.plan.costs import program_costs, round_costs
from headshare_jax.plan.estimate import Layout, Workload
from headshare_jax.plan.host import host_bytes
from headshare_jax.plan.program import compiled
from headshare_jax.plan.topology import chip_of, topology_devices
from headshare_jax.sharing.choose import sharing_map
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult

# Layouts to compile before giving up.
MOST_TRIES = 4


def plan(
    workload: Workload,
    topology: str,
    *,
    devices: int | None = None,
    mesh: tuple[int, ...] | None = None,
    remat: str | None = None,
    host: bool = False,
) -> dict[str, Any]:
    """Plans a step, dense and shared.

    Args:
      workload: the step.
      topology: such as `v5e:16x16`.
      devices: chips to use, the topology's first ones; all by default.
      mesh: sizes of data, fsdp and tensor, one of which may be -1; by default the first that fits.
      remat: policy of a training step; by default the first that fits.
      host: estimate from the shapes alone, without compiling.

    Returns:
      Plain data: the request, the chip's `hbm_bytes`, the `mesh` and `remat` chosen, `tried` (layouts, and whether the
      dense step fits), and `dense` and `shared`, each as of `measured`. Of a run also `programs`, as of `outside`, and
      `host_bytes`, as of `host.host_bytes`.

    Raises:
      HeadshareError: no such topology, more devices than it has, a mesh or a batch that does not fit, or no libtpu.
    """
    chip, count = chip_of(topology)
    if devices is not None and not 1 <= devices <= count:
        raise HeadshareError(
            f"{topology} has {count} chips; use from 1 to {count} devices, not {devices}.", option="devices"
        )
    if remat is not None and not workload.trains:
        raise HeadshareError(f"The stage {workload.stage} has no use for remat; leave it out.", option="remat")
    if workload.stage == "run" and host:
        raise HeadshareError("What a run does outside its steps is only known compiled.", option="host")
    count = devices or count
    choices = _choices(workload, chip, count, mesh, remat)
    places = None if host else topology_devices(topology)[:count]

    def costs(layout: Layout, *, shared: bool) -> dict[str, Any]:
        filled = workload.filled(layout)
        if places is None:
            found = estimate.estimated(filled, layout, chip, shared=shared)
        else:
            found = measured(filled, layout, chip, make_mesh(layout.mesh, places), shared=shared)
        if found["tokens_per_second"]:
            found["tokens_per_second"] *= workload.tokens / filled.tokens
        return found

    tried = []
    for layout in choices:
        dense = costs(layout, shared=False)
        tried.append({"mesh": list(layout.mesh), "remat": layout.remat, "fits": dense["fits"]})
        if dense["fits"]:
            break
    result = {
        "topology": topology,
        "chip": chip.name,
        "devices": count,
        "hbm_bytes": chip.hbm_bytes,
        "stage": workload.stage,
        "batch": workload.batch,
        "length": workload.length,
        "receivers": len(workload.sharing.receivers),
        "units": workload.sharing.donor.size,
        "tie": workload.sharing.tie,
        "compiled": not host,
        "mesh": list(layout.mesh),
        "remat": layout.remat,
        "tried": tried,
        "dense": dense,
        "shared": costs(layout, shared=True),
    }
    if workload.stage == "run":
        state_bytes = dense["parameter_bytes"] + dense["optimizer_bytes"]
        result["host_bytes"] = host_bytes(workload.config, state_bytes)
        result["programs"] = outside(workload, layout, chip, make_mesh(layout.mesh, places))
    return result


def outside(workload: Workload, layout: Layout, chip: Chip, mesh: Mesh) -> list[dict[str, Any]]:
    """What a run does outside its steps: of each thing its largest program, and what that needs on a chip.

    Returns:
      Of each: its `name`, `beside_bytes` that the run holds meanwhile, `needed_bytes` of all, `room_bytes` left, and
      whether it `fits`.
    """
    rows = []
    for name, lowered, beside in programs.outside(workload, layout, mesh):
        needed = beside + compiled(lowered).needed_bytes
        rows.append({"name": name, "beside_bytes": beside, **estimate.fit(chip, needed)})
    return rows


def measured(workload: Workload, layout: Layout, chip: Chip, mesh: Mesh, *, shared: bool) -> dict[str, Any]:
    """What the compiled step needs and costs on one chip.

    Returns:
      Bytes on a chip: `argument_bytes` (of which `parameter_bytes`, `optimizer_bytes`, `cache_bytes`),
      `temporary_bytes` (of which `activation_bytes` are kept for the backward pass), `needed_bytes` of all,
      `room_bytes` left, and whether it `fits`. A step: `flops`, `hbm_bytes_accessed`, `collective_bytes` that a chip
      sends, by kind, and their largest arrays, `seconds` of each at the chip's published rates, `step_seconds` as the
      longest of them, and which one it is `bound_by`. And `compile_seconds`. A step that XLA refuses for its memory
      has no costs; those of one that it cannot write down once it is compiled are `costs_estimated`.
    """
    lowered, held = (programs.training if workload.trains else programs.serving)(workload, layout, mesh, shared=shared)
    program = compiled(lowered)
    result = estimate.estimated(workload, layout, chip, shared=shared) | held
    result |= estimate.fit(chip, program.needed_bytes)
    result |= {"temporary_bytes": program.temporary_bytes, "compile_seconds": program.seconds}
    if program.argument_bytes is None:
        return result | dict.fromkeys(estimate.COSTS) | {"argument_bytes": sum(held.values()), "costs_estimated": False}
    result["argument_bytes"] = program.argument_bytes
    if program.text is None:
        return result
    costs = (round_costs if workload.stage == "decode" else program_costs)(program.text)
    if workload.trains and has_kernel(mesh, workload.length, workload.config.head_dim, "bfloat16"):
        # A kernel's text does not tell what it computes.
        costs = replace(costs, flops=costs.flops + estimate.attention_flops(workload, layout))
    return result | estimate.speed(workload, chip, costs) | {"costs_estimated": False}


def random_map(config: LlamaConfig, ratio: float, tie: str = "qkv") -> SharingMap:
    """A map of random pairs, for sizes; errors as of `sharing_map`."""
    rng, shape = np.random.default_rng(0), (config.num_layers, config.num_kv_heads)
    value = rng.random(shape)
    donor_layer, donor_unit = rng.integers(0, np.maximum(np.indices(shape)[0], 1)), rng.integers(0, shape[1], shape)
    value[0], donor_layer[0] = -np.inf, -1
    scores = MatchResult(donor_layer, donor_unit, value, match="random", heads_per_unit=config.heads_per_unit, seed=0)
    return sharing_map(scores, ratio, tie=tie)


def _choices(
    workload: Workload, chip: Chip, count: int, mesh: tuple[int, ...] | None, remat: str | None
) -> list[Layout]:
    """Layouts to try in this order: those that an estimate says fit; without any, the one that needs least."""
    sizes = estimate.meshes(workload, count) if mesh is None else [mesh_shape(mesh, count)]
    remats = [remat] if remat else [*REMAT_POLICIES] if workload.trains else ["none"]
    choices = [Layout(size, policy) for size in sizes for policy in remats]
    if not choices:
        raise HeadshareError(
            f"A batch of {workload.batch} cannot be cut over {count} chips; give another.", option="batch"
        )
    estimates = [estimate.estimated(workload.filled(choice), choice, chip, shared=False) for choice in choices]
    needed = [each["needed_bytes"] for each in estimates]
    likely = [choice for choice, bytes_ in zip(choices, needed, strict=True) if bytes_ <= chip.hbm_bytes]
    least = choices[int(np.argmin(needed))]
    return list(dict.fromkeys([*islice(likely, MOST_TRIES - 1), least]))
