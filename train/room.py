"""Whether a run finds room: on the disk for its checkpoints and its model, and in memory for its state."""

from math import prod
from pathlib import Path

import jax
from jax.sharding import Mesh

from headshare_jax.convert import Checkpoint
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import parameter_names
from headshare_jax.resources import check_disk, check_memory, gigabytes
from headshare_jax.sharing.map import SharingMap
from headshare_jax.train import recipe as recipes
from headshare_jax.train.placement import abstract_params, bytes_on_device, stage_arrays
from headshare_jax.train.step import StageContext


def check_room(recipe: recipes.Recipe, source: Checkpoint, sharing: SharingMap, mesh: Mesh, output: Path) -> None:
    """Raises HeadshareError unless disk and memory are free that the run will need for certain.

    On the disk those are the checkpoints that are kept, one that is being written, and the final model; in memory,
    parameters, gradients, optimizer state and teacher, or what a stage that takes over from another needs (`plan`'s
    `beginning`), if that is more. Activations come on top: only compiling the step tells them.
    """
    contexts = [StageContext(source.config, sharing, stage, recipe) for stage in recipe.stages]
    stages = stage_arrays(contexts, {name: source.dtype(name) for name in parameter_names(source.config)}, mesh)
    checkpoint = max(_bytes(stage.state) + _bytes(stage.frozen) for stage in stages)
    # The best may be one more than the last ones; those of a run that goes on are there already.
    count = min(recipe.checkpoints.keep + 2, 1 + recipe.total_steps)
    final = _final(recipe, source, sharing, mesh)
    folder = next(parent for parent in output.absolute().parents if parent.is_dir())
    there = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    check_disk(
        folder, count * checkpoint + final - there, f"A run with {count} checkpoints of {gigabytes(checkpoint)} each"
    )
    steps = max(sum(stage.sizes().values()) + bytes_on_device(stage.state.params) for stage in stages)
    needed = max(steps, *(stage.beginning for stage in stages))
    remedy = "train fewer parameters (stages.N.trainable), use more devices, or close other programs"
    what = "Parameters, gradients, optimizer state and teacher"
    if needed > steps:
        what = "Parameters of a stage and of the one before it"
    if jax.default_backend() == "cpu":
        check_memory(needed * jax.local_device_count(), f"A run (for {what.lower()} alone)", remedy)
        return
    memory = jax.local_devices()[0].memory_stats() or {}
    free = memory.get("bytes_limit", needed) - memory.get("bytes_in_use", 0)
    if free < needed:
        raise HeadshareError(
            f"{what} need {gigabytes(needed)} of a device's memory, and {gigabytes(free)} is free; {remedy}."
        )


def _final(recipe: recipes.Recipe, source: Checkpoint, sharing: SharingMap, mesh: Mesh) -> int:
    """Bytes of the model that is written at the end."""
    dtypes = {name: recipe.final.dtype or source.dtype(name) for name in parameter_names(source.config)}
    stored = sharing if recipe.final.to in ("native", "hf-compact") else None
    return _bytes(abstract_params(source.config, stored, mesh, dtypes))


def _bytes(tree: object) -> int:
    """Bytes of all the arrays of a tree, or of their shapes, on all devices together."""
    return sum(leaf.dtype.itemsize * prod(leaf.shape) for leaf in jax.tree.leaves(tree))
