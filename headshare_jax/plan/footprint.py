"""What a training step needs on every device, found by compiling it without running it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from headshare_jax.errors import HeadshareError
from headshare_jax.model.mesh import batch_sharding
from headshare_jax.parameters import parameter_names
from headshare_jax.train import recipe as recipes
from headshare_jax.train.inputs import check_devices, open_inputs, pairs_to_plan
from headshare_jax.train.placement import StageArrays, stage_arrays
from headshare_jax.train.step import StageContext, make_step


def footprint(recipe: recipes.Recipe) -> dict[str, Any]:
    """Bytes of parameters, teacher, optimizer state and temporaries (activations, gradients) on a device, by stage.

    `beginning` is the most while the stage takes over from the one before.

    Without a map in the recipe, one is drawn at random: sizes depend on its ratio and tie alone. The texts are opened,
    and read as far as the first block, or all that a refit takes, so that a run does not fail for what could be known.

    Raises:
      HeadshareError: model, map or texts cannot be read, a text is too short, or mesh and batch do not fit this
        machine's devices.
    """
    mesh = check_devices(recipe)
    source, _, _ = open_inputs(recipe)
    sharing = pairs_to_plan(recipe, source)
    contexts = [StageContext(source.config, sharing, stage, recipe) for stage in recipe.stages]
    dtypes = {name: source.dtype(name) for name in parameter_names(source.config)}
    stages: list[dict[str, Any]] = []
    for context, arrays in zip(contexts, stage_arrays(contexts, dtypes, mesh), strict=True):
        analysis = lowered_step(context, arrays, mesh).compile().memory_analysis()
        if analysis is None:
            raise HeadshareError(f"JAX does not tell what a step needs on {jax.default_backend()}.")
        sizes = arrays.sizes() | {"temporaries": int(analysis.temp_size_in_bytes)}
        total = sum(sizes.values())
        stages.append({"kind": context.stage.kind, **sizes, "total": total, "beginning": arrays.beginning})
    return {"mesh": dict(mesh.shape), "stages": stages}


def lowered_step(context: StageContext, arrays: StageArrays, mesh: Mesh) -> jax.stages.Lowered:
    """A stage's step on a mesh, whose devices need not be there, to be compiled."""
    recipe = context.recipe
    shape = (recipe.accumulate, recipe.batch_size // recipe.accumulate, recipe.data.seq_len)
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, axis=1))
    step = make_step(context, state_sharding=jax.tree.map(lambda leaf: leaf.sharding, arrays.state))
    return step.lower(arrays.state, arrays.frozen, arrays.teacher, batch, batch)
