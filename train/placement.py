"""Parameters and training state on a mesh; every part is read by itself, so that no host holds more than its own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike

from headshare_jax.config import LlamaConfig
from headshare_jax.model.mesh import parameter_sharding, replicated
from headshare_jax.model.place import OnDevices, place
from headshare_jax.parameters import parameter_names
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import WeightSource, stored_shape
from headshare_jax.sharing.view import View
from headshare_jax.train.step import Params, StageContext, TrainState, first_state, trainable_names


def begin(context: StageContext, source: WeightSource, mesh: Mesh, *, take: bool = False) -> tuple[TrainState, Params]:
    """The state before a stage's first step, float32, and the frozen parameters, in the source's own types.

    Args:
      context: the stage.
      source: its weights.
      mesh: where they are to lie.
      take: the model in memory that the source is, or is a view of, is not used again: of each parameter its memory is
        given back as soon as it has been placed, so that both are never there as a whole.
    """
    model = memory_of(source) if take else None
    names, others = split_names(context)
    placed: Params = {}
    for name in parameter_names(context.config):
        placed |= place(source, [name], mesh, "float32" if name in names else None)
        if model is not None:
            jax.block_until_ready(placed[name])
            model.array(name).delete()
    # They lie there already; but a sharding in other words would have the step compiled twice.
    shardings = {name: leaf.sharding for name, leaf in abstract_state(context, mesh).params.items()}
    params = {name: jax.device_put(placed[name], sharding) for name, sharding in shardings.items()}
    counts = jax.jit(lambda: (jnp.int32(0), jnp.int32(0)), out_shardings=replicated(mesh))()
    return TrainState(params, moments(context, mesh)(), *counts), {name: placed[name] for name in others}


def moments(context: StageContext, mesh: Mesh) -> jax.stages.Wrapped:
    """The jitted function of nothing that gives a stage's optimizer state before its first step."""
    abstract = abstract_state(context, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.opt_state)

    def first() -> Any:
        # Of shapes alone: given the parameters, it would hold a second copy of them.
        zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract.params.items()}
        return first_state(context, zeros).opt_state

    return jax.jit(first, out_shardings=shardings)


def beginning_bytes(before: Mapping[str, Any], params: Mapping[str, Any], opt_state: Any) -> int:
    """The most bytes on a device while `begin` takes a stage's parameters from those of the stage before.

    Args:
      before: the parameters of that stage; none where the first begins.
      params: all parameters of the stage that begins, which are placed in this order.
      opt_state: of the optimizer.
    """
    most = held = bytes_on_device(before)
    for name, param in params.items():
        held += bytes_on_device(param)
        most = max(most, held)
        held -= bytes_on_device(before.get(name))
    return max(most, held + bytes_on_device(opt_state))


@dataclass(frozen=True)
class StageArrays:
    """What a stage has on the mesh, as shapes.

    Attributes:
      state: what its steps change.
      frozen, teacher: parameters that they do not.
      beginning: the most bytes on a device while it takes over from the stage before.
    """

    state: TrainState
    frozen: dict[str, jax.ShapeDtypeStruct]
    teacher: dict[str, jax.ShapeDtypeStruct]
    beginning: int

    def sizes(self) -> dict[str, int]:
        """Bytes on a device of parameters, teacher and optimizer."""
        return {
            "parameters": bytes_on_device(self.state.params) + bytes_on_device(self.frozen),
            "teacher": bytes_on_device(self.teacher),
            "optimizer": bytes_on_device(self.state.opt_state),
        }


def stage_arrays(contexts: Sequence[StageContext], dtypes: Mapping[str, DTypeLike], mesh: Mesh) -> list[StageArrays]:
    """What each stage of a run has on a mesh, whose devices need not be there; the model's types are given by name."""
    found: list[StageArrays] = []
    before: dict[str, jax.ShapeDtypeStruct] = {}
    for context in contexts:
        config, state = context.config, abstract_state(context, mesh)
        # What was trained before is float32.
        others = {name: before[name].dtype if name in before else dtypes[name] for name in split_names(context)[1]}
        frozen = abstract_params(config, context.model_sharing, mesh, others)
        taught = dtypes if context.stage.distill_weight else {}
        teacher = abstract_params(config, None, mesh, taught)
        every: dict[str, Any] = {**frozen, **state.params}
        params = {name: every[name] for name in parameter_names(config)}
        beginning = beginning_bytes(before, params, state.opt_state) + bytes_on_device(teacher)
        found.append(StageArrays(state, frozen, teacher, beginning))
        before = params
    return found


def memory_of(source: WeightSource) -> OnDevices | None:
    """The model in memory that a source is, or is a view of."""
    while isinstance(source, View):
        source = source.base
    return source if isinstance(source, OnDevices) else None


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
