"""Meshes: where every array lies, and that many devices do what one does, each its share of it."""

import re
from functools import cache
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from support import random_tokens, sharing_by_hand, tiny_model

from headshare_jax import HeadshareError, Llama, parameters, share
from headshare_jax.model.mesh import AXES, batch_sharding, make_mesh, parameter_sharding, replicated
from headshare_jax.sharing.source import stored_shape
from headshare_jax.train import losses
from headshare_jax.train import recipe as recipes
from headshare_jax.train import step as steps
from headshare_jax.train.placement import abstract_state, begin

WIDTH, POOL_WIDTH = "fsdp", ("fsdp", "tensor")
# Where each parameter lies on a mesh with all three axes.
PLACES = {
    "embed_vd": ("tensor", WIDTH),
    "attn_norm_ld": (None, WIDTH),
    "q_pool_pdh": (None, POOL_WIDTH, None),
    "k_pool_pdh": (None, POOL_WIDTH, None),
    "v_pool_pdh": (None, POOL_WIDTH, None),
    "o_pool_phd": (None, None, POOL_WIDTH),
    "q_bias_ph": (None, None),
    "k_bias_ph": (None, None),
    "v_bias_ph": (None, None),
    "o_bias_ld": (None, WIDTH),
    "mlp_norm_ld": (None, WIDTH),
    "gate_ldf": (None, WIDTH, "tensor"),
    "up_ldf": (None, WIDTH, "tensor"),
    "down_lfd": (None, "tensor", WIDTH),
    "gate_bias_lf": (None, "tensor"),
    "up_bias_lf": (None, "tensor"),
    "down_bias_ld": (None, WIDTH),
    "final_norm_d": (WIDTH,),
    "head_vd": ("tensor", WIDTH),
}


def mesh_of(*sizes: int) -> Mesh:
    """A mesh of the first of the eight devices."""
    return make_mesh(sizes, jax.devices()[: prod(sizes)])


def test_every_parameter_has_its_place() -> None:
    config, mesh = tiny_model(attention_bias=True, mlp_bias=True).config, mesh_of(2, 2, 2)
    placed = {
        name: parameter_sharding(mesh, config, name, stored_shape(config, name)).spec
        for name in parameters.parameter_names(config)
    }
    assert placed == {name: PartitionSpec(*place) for name, place in PLACES.items()}


def test_rows_of_a_pool_are_never_cut() -> None:
    config, mesh = tiny_model().config, mesh_of(1, 4, 2)
    for name, shard in [("q_pool_pdh", (12, 8, 16)), ("o_pool_phd", (12, 16, 8))]:
        # Twelve rows would divide by the four fsdp devices.
        shape = stored_shape(config, name)
        assert parameter_sharding(mesh, config, name, shape).shard_shape(shape) == shard


@pytest.mark.parametrize(
    ("name", "place"), [("gate_ldf", (None, None, "tensor")), ("embed_vd", ("tensor", None)), ("final_norm_d", (None,))]
)
def test_axes_that_do_not_divide_are_not_cut(name: str, place: tuple[str | None, ...]) -> None:
    config = tiny_model().config
    shape = stored_shape(config, name)
    assert parameter_sharding(mesh_of(1, 3, 2), config, name, shape).spec == PartitionSpec(*place)


def test_batches_are_cut_over_data_and_fsdp() -> None:
    mesh = mesh_of(2, 2, 2)
    assert batch_sharding(mesh, axis=1).shard_shape((3, 8, 5)) == (3, 2, 5)
    assert batch_sharding(mesh).shard_shape((8, 5)) == (2, 5)
    assert replicated(mesh).shard_shape((8, 5)) == (8, 5)


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [((1, -1, 1), (1, 8, 1)), ((2, -1, 2), (2, 2, 2)), ((-1, 1, 1), (8, 1, 1)), ((4, 1, 2), (4, 1, 2))],
)
def test_one_size_may_be_left_to_the_others(sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert make_mesh(sizes).shape == dict(zip(AXES, shape, strict=True))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ((3, -1, 1), "3 x -1 x 1 .* needs a multiple of 3 devices, but there are 8"),
        ((2, 2, 1), "needs 4 devices, but there are 8"),
        ((4, 4, 1), "needs 16 devices, but there are 8"),
        ((-1, -1, 1), "one may be -1"),
        ((0, 8, 1), "positive size"),
        ((-2, 4, 1), "positive size"),
        ((8, 1), "data, fsdp, tensor"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(sizes: tuple[int, ...], said: str) -> None:
    with pytest.raises(HeadshareError, match=said):
        make_mesh(sizes)


ROWS, LENGTH = 8, 16


@cache
def model() -> Llama:
    """A small dense model."""
    return tiny_model(num_hidden_layers=2)


def context(**stage: Any) -> steps.StageContext:
    """A stage of three steps in float32."""
    document = {
        "model": "tiny",
        "data": {"train": "text"},
        "stages": [{"steps": 3, "learning_rate": 1e-3, **stage}],
        "optimizer": {"clip": 0.5},
        "compute_dtype": "float32",
        "remat": "none",
    }
    recipe = recipes.from_mapping(document)
    sharing = sharing_by_hand(model(), "qkvo", {2: 0, 3: 1})
    return steps.StageContext(model().config, sharing, recipe.stages[0], recipe)


def start(at: steps.StageContext, mesh: Mesh) -> tuple[steps.TrainState, Any]:
    """The first state on a mesh, and the step that keeps it there."""
    source = model() if at.model_sharing is None else share(model(), at.model_sharing)
    state, _ = begin(at, source, mesh)
    return state, steps.make_step(at, state_sharding=jax.tree.map(lambda leaf: leaf.sharding, state))


def trained(at: steps.StageContext, mesh: Mesh, parts: int = 1) -> tuple[list[dict[str, float]], steps.TrainState]:
    """Metrics of three steps on packed and padded rows, and the state after them."""
    state, step = start(at, mesh)
    segments = np.tile(np.repeat([1, 2, 0], [7, 6, 3]), (ROWS, 1)).astype(np.int32)
    metrics = []
    for number in range(3):
        tokens = random_tokens((ROWS, LENGTH), seed=number)
        rows = (array.reshape(parts, ROWS // parts, LENGTH) for array in (tokens, segments))
        state, values = step(state, {}, {}, *jax.device_put(tuple(rows), batch_sharding(mesh, axis=1)))
        metrics.append({name: float(value) for name, value in values.items()})
    return metrics, state


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    """Training on one device, by kind of stage."""
    return {kind: trained(context(kind=kind), mesh_of(1, 1, 1)) for kind in ("align", "tied")}


@pytest.mark.parametrize(
    ("sizes", "kind", "parts"),
    [
        ((2, 1, 1), "align", 1),
        ((1, 2, 1), "tied", 2),
        ((8, 1, 1), "align", 1),
        ((1, 8, 1), "align", 1),
        ((1, 4, 2), "align", 2),
        ((1, 4, 2), "tied", 1),
    ],
)
def test_many_devices_do_what_one_does(alone: dict[str, Any], sizes: tuple[int, ...], kind: str, parts: int) -> None:
    expected, expected_state = alone[kind]
    metrics, state = trained(context(kind=kind), mesh_of(*sizes), parts)
    for mine, theirs in zip(metrics, expected, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
    for name, value in expected_state.params.items():
        mine, theirs = np.asarray(state.params[name]), np.asarray(value)
        assert np.linalg.norm(mine - theirs) < 1e-5 * np.linalg.norm(theirs), name


def test_state_is_made_and_stays_in_parts() -> None:
    at = context(kind="tied")
    mesh = mesh_of(1, 4, 2)
    state, step = start(at, mesh)
    batch = jnp.ones((1, ROWS, LENGTH), jnp.int32)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    parts = {"norm": 4, "pool": 8, "vd": 8, "ldf": 8, "lfd": 8}
    for _ in range(2):
        assert jax.tree.map(lambda leaf: leaf.sharding, state) == shardings
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            name = getattr(path[-1], "key", "")
            cut = max((count for key, count in parts.items() if key in name and leaf.ndim), default=1)
            assert {shard.data.size * cut for shard in leaf.addressable_shards} == {leaf.size}, path
        state, _ = step(state, {}, {}, batch, batch)


def compiled(sizes: tuple[int, ...], rows: int = ROWS, length: int = LENGTH, **stage: Any) -> Any:
    """The step of a stage, compiled for a mesh."""
    at, mesh = context(**stage), mesh_of(*sizes)
    state = abstract_state(at, mesh)
    batch = jax.ShapeDtypeStruct((1, rows, length), jnp.int32, sharding=batch_sharding(mesh, axis=1))
    step = steps.make_step(at, state_sharding=jax.tree.map(lambda leaf: leaf.sharding, state))
    return step.lower(state, {}, {}, batch, batch).compile()


def traffic(program: str) -> dict[str, list[int]]:
    """Elements that each collective operation of a compiled program gives, by its kind."""
    sizes: dict[str, list[int]] = {}
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    for shapes, kind in re.findall(rf" = (\S.*?) ({kinds})\(", program):
        elements = [prod(map(int, filter(None, shape.split(",")))) for shape in re.findall(r"\w\[([\d,]*)\]", shapes)]
        sizes.setdefault(kind, []).append(sum(elements))
    return sizes


@pytest.mark.parametrize(("sizes", "penalty"), [((1, 8, 1), "norm"), ((1, 4, 2), "norm"), ((1, 4, 2), "js")])
def test_penalty_moves_no_weights_between_devices(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], penalty: str
) -> None:
    beside = traffic(compiled(sizes, penalty=penalty).as_text())
    monkeypatch.setattr(steps, "similarity_penalty", lambda *arguments: jnp.float32(0))
    without = traffic(compiled(sizes).as_text())
    assert sum(without["all-gather"]) > 0
    reduced, reduced_without = (sum(sizes.pop("all-reduce")) for sizes in (beside, without))
    assert beside == without
    # A few sums per pair and projection; a pool's head has 64 x 16 elements.
    assert 0 < reduced - reduced_without < 64 * 16


def test_devices_share_the_work_and_weights_are_gathered_not_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    # Chunks of 128 tokens a device, so that there are two.
    monkeypatch.setattr(losses, "HEAD_TOKENS", 128)
    one, data, fsdp = (compiled(sizes, 8, 256, kind="tied") for sizes in ((1, 1, 1), (8, 1, 1), (1, 8, 1)))
    flops = [program.cost_analysis()["flops"] for program in (one, data, fsdp)]
    assert flops[2] < 1.05 * flops[1] < 0.5 * flops[0]
    operations = traffic(fsdp.as_text())
    largest = 160 * 64
    activations = 8 * 256 * 64
    assert max(operations["all-gather"]) == largest < activations / 8
