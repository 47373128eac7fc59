"""The programs that a plan compiles: steps of training, prompts and decoding, and what a run does outside its steps."""

from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from headshare_jax.calibration.streams import run_block
from headshare_jax.config import LlamaConfig
from headshare_jax.evaluate.agreement import compared_models
from headshare_jax.evaluate.perplexity import scored
from headshare_jax.fit.moments import Totals, batch_moments
from headshare_jax.fit.refit import RefitSettings
from headshare_jax.model import gather, spread
from headshare_jax.model import generate as generation
from headshare_jax.model.cache import cache_sharding
from headshare_jax.model.llama import Llama
from headshare_jax.model.mesh import AXES, BATCH, batch_sharding, rows_of
from headshare_jax.model.place import shared_pool
from headshare_jax.parameters import PARAMETERS, layered_names, parameter_names, pool_name, slice_shape
from headshare_jax.plan.estimate import Layout, Workload
from headshare_jax.plan.footprint import lowered_step
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.source import piece_shape
from headshare_jax.train import recipe as recipes
from headshare_jax.train.placement import abstract_params, abstract_state, bytes_on_device, moments, stage_arrays
from headshare_jax.train.step import StageContext

Lowered = jax.stages.Lowered
# Type of a model that is planned, as it is stored.
STORED = "bfloat16"


class Outside(NamedTuple):
    """A program outside a run's steps.

    Attributes:
      name: what it does.
      lowered: the program.
      beside: bytes on a chip that the run holds meanwhile, and that are none of the program's arguments.
    """

    name: str
    lowered: Lowered
    beside: int


def training(workload: Workload, layout: Layout, mesh: Mesh, *, shared: bool) -> tuple[Lowered, dict[str, int]]:
    """A training step, tied or of align, and the bytes of what it is given on a chip."""
    context = _context(workload, layout, shared=shared)
    (arrays,) = stage_arrays([context], dict.fromkeys(parameter_names(workload.config), STORED), mesh)
    sizes = arrays.sizes()
    return lowered_step(context, arrays, mesh), {
        "parameter_bytes": sizes["parameters"],
        "optimizer_bytes": sizes["optimizer"],
    }


def serving(workload: Workload, layout: Layout, mesh: Mesh, *, shared: bool) -> tuple[Lowered, dict[str, int]]:
    """A run over prompts, or the loop that decodes, and the bytes of what it is given on a chip."""
    config, array = workload.config, partial(_array, mesh)
    model, params = _model(config, workload.sharing if shared else None, mesh, STORED)
    row_b = array((workload.batch,), jnp.int32, BATCH)
    cache = jax.eval_shape(lambda: model.empty_cache(workload.batch, workload.length))

    def placed(leaf: Any) -> Any:
        axes = cache_sharding(mesh, leaf.shape).spec if leaf.ndim > 1 else (BATCH,) * leaf.ndim
        return array(leaf.shape, leaf.dtype, *axes)

    cache = jax.tree.map(placed, cache)
    key = array((), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    held = {"parameter_bytes": params, "cache_bytes": bytes_on_device(cache)}
    greedy = generation.Sampling()
    if workload.stage == "prefill":
        prompts = array((workload.batch, workload.length), jnp.int32, BATCH)
        return generation.prefill.lower(model, prompts, row_b, cache, key, sampling=greedy), held
    ends = (array(()), array((1,)))
    return generation.decode.lower(model, row_b, cache, key, *ends, room=generation.BUCKET, sampling=greedy), held


def outside(workload: Workload, layout: Layout, mesh: Mesh) -> Iterator[Outside]:
    """The largest program of each thing that a run does outside its steps.

    The run begins with an align stage, and goes on with a tied one, whose output weights are fitted first.
    """
    config = workload.config
    dense, tied = (_context(workload, layout, shared=shared) for shared in (False, True))
    state, tied_state = (abstract_state(context, mesh) for context in (dense, tied))
    weights, optimizer = bytes_on_device(state.params), bytes_on_device(state.opt_state)
    yield _placed(state.params, config, mesh)
    pool = state.params[pool_name("q")]
    share = partial(shared_pool, workload.sharing, pool_name("q"))
    # The optimizer's moments are gone by then.
    yield Outside("share a pool", jax.jit(share).lower(pool), weights - bytes_on_device(pool))
    # Each parameter of the dense model goes as soon as the tied one's is there.
    yield Outside("begin the tied stage", moments(tied, mesh).lower(), bytes_on_device(tied_state.params))
    model, _ = _model(config, None, mesh, "float32")
    tokens = _array(mesh, (rows_of(mesh), workload.length), jnp.int32, BATCH)
    yield Outside("evaluate", scored.lower(model, tokens), optimizer)
    both = (_model(config, sharing, mesh, STORED, "float32")[0] for sharing in (None, workload.sharing))
    yield Outside("compare with the dense model", compared_models.lower(*both, tokens), weights + optimizer)
    yield from _refits(workload, mesh, weights + optimizer)
    yield _exported(state.params, config, weights + optimizer)


def _placed(params: dict[str, Any], config: LlamaConfig, mesh: Mesh) -> Outside:
    """Takes over the largest block of a parameter that is passed on at once, from the process that has read it."""

    def block(name: str) -> tuple[int, ...]:
        shape = piece_shape(config, name, np.dtype(STORED))
        shape = (1, *shape) if PARAMETERS[name].axes[0] == "l" else shape
        return min(shape[0], spread.rows_at_once(shape, np.dtype(STORED))), *shape[1:]

    name = max(params, key=lambda name: prod(block(name)))
    target, staged = params[name], _array(mesh, (mesh.size, *block(name)), STORED, AXES)
    lowered = spread.put_sum.lower(target, staged, np.int32(0), target.sharding)
    # The first device has what its process read beside the zeros that it has for other processes' blocks.
    others = bytes_on_device(params) - bytes_on_device(target)
    return Outside("place a layer", lowered, others + bytes_on_device(staged))


def _exported(params: dict[str, Any], config: LlamaConfig, held: int) -> Outside:
    """Brings a piece of the largest slice to the hosts."""
    shapes = {name: piece_shape(config, name, np.dtype(STORED)) for name in params}
    name = max(params, key=lambda name: prod(shapes[name]))
    rows = range(1 if PARAMETERS[name].axes[0] == "l" else shapes[name][0])
    array = params[name]
    return Outside("export a layer", gather.lowered(array, rows, STORED), held - bytes_on_device(array))


def _refits(workload: Workload, mesh: Mesh, held: int) -> Iterator[Outside]:
    """Runs a batch of windows through a layer's attention, and sums over them."""
    config = workload.config
    layer = {}
    for name in layered_names(config):
        place = spread.slice_sharding(mesh, config, name)
        layer[name] = jax.ShapeDtypeStruct(slice_shape(config, name), jnp.float32, sharding=place)
    rows = rows_of(mesh) * max(1, RefitSettings().batch_tokens // workload.length)
    x_btd = _array(mesh, (rows, workload.length, config.hidden_size), jnp.float32, BATCH)
    there_b = _array(mesh, (rows,), jnp.float32, BATCH)
    both = held + bytes_on_device(layer)
    run = run_block.lower(config, layer, x_btd, "attention", mesh)
    yield Outside("refit: run a layer", run, both + bytes_on_device(x_btd))
    width = config.num_heads * config.head_dim
    h_bti = _array(mesh, (*x_btd.shape[:2], width), jnp.float32, BATCH)
    totals = Totals.by(lambda shape: _array(mesh, shape, jnp.float32), width, config.hidden_size)
    sums = batch_moments.lower(totals, layer, h_bti, *[x_btd] * 4, there_b, "attention", mesh)
    yield Outside("refit: sums of a layer", sums, both)


def _context(workload: Workload, layout: Layout, *, shared: bool) -> StageContext:
    stage = recipes.Stage(kind="tied" if shared else "align")
    text = recipes.Data(train=(recipes.Source(source=""),), seq_len=workload.length)
    recipe = recipes.Recipe(
        model="", data=text, stages=(stage,), batch_size=workload.batch, remat=cast(Any, layout.remat)
    )
    return StageContext(workload.config, workload.sharing, stage, recipe)


def _model(
    config: LlamaConfig, sharing: SharingMap | None, mesh: Mesh, dtype: str, compute_dtype: str = "bfloat16"
) -> tuple[Llama, int]:
    """A model on a mesh, as shapes, and the bytes of its parameters on a chip."""
    params = abstract_params(config, sharing, mesh, dict.fromkeys(parameter_names(config), dtype))
    model = Llama(config, params, sharing=sharing, compute_dtype=compute_dtype, batch_sharding=batch_sharding(mesh))

    # The head indices, which the model makes by itself.
    def abstract(leaf: Any) -> Any:
        return _array(mesh, leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf

    return jax.tree.map(abstract, model), bytes_on_device(params)


def _array(mesh: Mesh, shape: tuple[int, ...], dtype: Any = jnp.int32, *axes: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
