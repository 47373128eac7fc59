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
from headshare_jax.train.placement import abstract_params, abstract_state, beginning_bytes, bytes_on_device, split_names
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
    stages: list[dict[str, Any]] = []
    before: dict[str, Any] = {}
    for stage in recipe.stages:
        context = StageContext(source.config, sharing, stage, recipe)
        lowered, sizes = lowered_step(context, mesh, source.dtype("embed_vd"))
        analysis = lowered.compile().memory_analysis()
        if analysis is None:
            raise HeadshareError(f"JAX does not tell what a step needs on {jax.default_backend()}.")
        sizes["temporaries"] = int(analysis.temp_size_in_bytes)
        state = abstract_state(context, mesh)
        # What was trained before is float32.
        dtypes = {
            name: before[name].dtype if name in before else source.dtype(name) for name in split_names(context)[1]
        }
        params = abstract_params(context.config, context.model_sharing, mesh, dtypes) | state.params
        params = {name: params[name] for name in parameter_names(context.config)}
        beginning = beginning_bytes(before, params, state.opt_state) + sizes["teacher"]
        stages.append({"kind": stage.kind, **sizes, "total": sum(sizes.values()), "beginning": beginning})
        before = params
    return {"mesh": dict(mesh.shape), "stages": stages}


def lowered_step(context: StageContext, mesh: Mesh, dtype: Any) -> tuple[jax.stages.Lowered, dict[str, int]]:
    """A stage's step on a mesh, to be compiled, and the bytes of what it is given on a device.

    Args:
      context: the stage.
      mesh: its devices need not be there.
      dtype: of parameters that do not train, and of the teacher.
    """
    recipe, config = context.recipe, context.config
    state = abstract_state(context, mesh)
    frozen = abstract_params(config, context.model_sharing, mesh, dict.fromkeys(split_names(context)[1], dtype))
    teacher_names = parameter_names(config) if context.stage.distill_weight else ()
    teacher = abstract_params(config, None, mesh, dict.fromkeys(teacher_names, dtype))
    shape = (recipe.accumulate, recipe.batch_size // recipe.accumulate, recipe.data.seq_len)
    batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, axis=1))
    step = make_step(context, state_sharding=jax.tree.map(lambda leaf: leaf.sharding, state))
    sizes = {
        "parameters": bytes_on_device(state.params) + bytes_on_device(frozen),
        "teacher": bytes_on_device(teacher),
        "optimizer": bytes_on_device(state.opt_state),
    }
    return step.lower(state, frozen, teacher, batch, batch), sizes
