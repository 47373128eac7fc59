"""What a run needs on every device, found by compiling its steps without running them."""

from typing import Any

import jax
import jax.numpy as jnp

from headshare_jax.errors import HeadshareError
from headshare_jax.model.mesh import batch_sharding
from headshare_jax.parameters import parameter_names
from headshare_jax.train import recipe as recipes
from headshare_jax.train.inputs import check_devices, choose_pairs, open_inputs
from headshare_jax.train.placement import abstract_params, abstract_state, bytes_on_device, split_names
from headshare_jax.train.step import StageContext, make_step


def footprint(recipe: recipes.Recipe) -> dict[str, Any]:
    """Bytes of parameters, teacher, optimizer state and temporaries (activations, gradients) on a device, by stage.

    Without a map in the recipe, one is drawn at random: sizes depend on its ratio and tie alone. The texts are opened,
    and read as far as the first block, or all that a refit takes, so that a run does not fail for what could be known.

    Raises:
      HeadshareError: model, map or texts cannot be read, a text is too short, or mesh and batch do not fit this
        machine's devices.
    """
    mesh = check_devices(recipe)
    source, _, _ = open_inputs(recipe)
    sharing = choose_pairs(recipe, source, "random")
    stages = []
    for stage in recipe.stages:
        context = StageContext(source.config, sharing, stage, recipe)
        state = abstract_state(context, mesh)
        _, others = split_names(context)
        frozen = abstract_params(context, others, mesh, source.dtype("embed_vd"))
        every = parameter_names(source.config) if stage.distill_weight else ()
        dense = StageContext(source.config, sharing, recipes.Stage(), recipe)
        teacher = abstract_params(dense, every, mesh, source.dtype("embed_vd"))
        shape = (recipe.accumulate, recipe.batch_size // recipe.accumulate, recipe.data.seq_len)
        batch = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(mesh, axis=1))
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        compiled = make_step(context, state_sharding=shardings).lower(state, frozen, teacher, batch, batch).compile()
        sizes = {
            "parameters": bytes_on_device(state.params) + bytes_on_device(frozen),
            "teacher": bytes_on_device(teacher),
            "optimizer": bytes_on_device(state.opt_state),
            "temporaries": _temporaries(compiled),
        }
        stages.append({"kind": stage.kind, **sizes, "total": sum(sizes.values())})
    return {"mesh": dict(mesh.shape), "stages": stages}


def _temporaries(compiled: jax.stages.Compiled) -> int:
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise HeadshareError(f"JAX does not tell what a step needs on {jax.default_backend()}.")
    return int(analysis.temp_size_in_bytes)
