"""Parameters and training state on a mesh; every part is read by itself, so that no host holds more than its own."""

from collections.abc import Mapping
from math import prod
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from headshare_jax.config import LlamaConfig
from headshare_jax.model.mesh import parameter_sharding, replicated
from headshare_jax.model.place import place
from headshare_jax.parameters import parameter_names
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource, stored_shape
from headshare_jax.train.step import Params, StageContext, TrainState, first_state, trainable_names


def begin(context: StageContext, source: WeightSource, mesh: Mesh) -> tuple[TrainState, Params]:
    """The state before a stage's first step, float32, and the frozen parameters, in the source's own types."""
    names, others = split_names(context)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(context, mesh))
    start = jax.jit(lambda params: first_state(context, params), out_shardings=shardings)
    return start(place(source, names, mesh, "float32")), place(source, others, mesh)


def split_names(context: StageContext) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the parameters that train in a stage, and of those that do not."""
    names = trainable_names(context.config, context.stage.trainable)
    return names, tuple(name for name in parameter_names(context.config) if name not in names)


def abstract_state(context: StageContext, mesh: Mesh) -> TrainState:
    """Shapes, types and shardings of a stage's state: optimizer moments lie where their parameters do."""
    dtypes = dict.fromkeys(split_names(context)[0], "float32")
    params = abstract_params(context.config, context.model_sharing, mesh, dtypes)

    def placed(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        name = getattr(path[-1], "key", None)
        sharding = params[name].sharding if name in params and leaf.ndim else replicated(mesh)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    state = jax.eval_shape(lambda params: first_state(context, params), params)
    placed_state: TrainState = jax.tree_util.tree_map_with_path(placed, state)
    return placed_state


def abstract_params(
    config: LlamaConfig, sharing: SharingMap | None, mesh: Mesh | AbstractMesh, dtypes: Mapping[str, Any]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameters of these names and types as a model stores them on a mesh: shapes, without arrays."""
    params = {}
    for name, dtype in dtypes.items():
        shape = stored_shape(config, name, sharing)
        params[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=parameter_sharding(mesh, config, name, shape))
    return params


def bytes_on_device(tree: Any) -> int:
    """Bytes of a tree's arrays, or of their shapes with shardings, on one device."""
    return sum(leaf.dtype.itemsize * prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(tree))
