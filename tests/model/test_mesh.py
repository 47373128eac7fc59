"""Meshes: where every array lies, and that many devices do what one does, each its share of it."""

import re
from functools import cache
from importlib.util import find_spec
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
from headshare_jax.plan.topology import topology_devices
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


@pytest.fixture
def two_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has every other of the eight devices lie in a second slice."""
    monkeypatch.setattr(type(jax.devices()[0]), "slice_index", property(lambda device: device.id % 2), raising=False)


@pytest.mark.usefixtures("two_slices")
def test_a_slice_lies_along_the_data_axis() -> None:
    for sizes in [(1, -1, 1), (2, 1, 2)]:
        mesh = make_mesh(sizes, dcn_data=2)
        halves = np.split(mesh.devices, 2)
        assert [{device.id % 2 for device in half.flat} for half in halves] == [{0}, {1}]
        assert mesh.shape["data"] == 2 * sizes[0]


@pytest.mark.usefixtures("two_slices")
@pytest.mark.parametrize("count", [3, 4, 8])
def test_slices_that_there_are_not_are_refused(count: int) -> None:
    with pytest.raises(HeadshareError, match=f"of {count} slices .* are in 2 slices"):
        make_mesh((1, -1, 1), dcn_data=count)


def test_one_process_without_slices_is_one() -> None:
    with pytest.raises(HeadshareError, match=r"of 2 slices .* are in 1 processes"):
        make_mesh((1, -1, 1), dcn_data=2)


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("sizes", [(16, 16, 1), (1, 64, 4)])
def test_neighbours_in_a_mesh_are_neighbours_in_the_network(sizes: tuple[int, ...]) -> None:
    devices = topology_devices("v5e:16x16")
    before, now = np.asarray(devices).reshape(sizes), make_mesh(sizes, devices).devices
    assert hops(now) < 1.3 < hops(before)


def hops(devices: np.ndarray) -> float:
    """Mean way in a network of 16 x 16 chips, whose ends meet, from a device to the next along the fsdp axis."""
    ways = [
        min(abs(here - there), 16 - abs(here - there))
        for one, other in zip(devices.flat, np.roll(devices, -1, axis=1).flat, strict=True)
        for here, there in zip(one.coords, other.coords, strict=True)
    ]
    return sum(ways) / devices.size


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
    return compiled_for(mesh_of(*sizes), rows, length, **stage)


def compiled_for(mesh: Mesh, rows: int = ROWS, length: int = LENGTH, **stage: Any) -> Any:
    """The same for a mesh that is there already."""
    at = context(**stage)
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


def groups(attributes: str) -> list[set[int]]:
    """The groups of devices that a collective joins, by their places in the mesh; pairs of one that sends."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{\{(.*?)\}\}", attributes):
        return [{*map(int, group.split(","))} for group in listed[1].split("},{")]
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]<=(\S+?),? ", attributes):
        rows = _order(counted[2]).reshape(-1, int(counted[1]))
    else:
        named = re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\)\))? \{(.*?)\}", attributes)
        assert named is not None, attributes
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
        order = _order(f"{named[2]})") if named[2] else np.arange(prod(sizes.values()))
        joined = [place for place, axis in enumerate(sizes) if f"'{axis}'" in named[3]]
        ids = np.moveaxis(order.reshape([*sizes.values()]), joined, range(-len(joined), 0))
        rows = ids.reshape(-1, prod(ids.shape[-len(joined) :]))
    return [{*row} for row in rows.tolist()]


def _order(text: str) -> np.ndarray:
    """Numbers in an order that XLA writes as `[2,4]T(1,0)`: counted in a table, and read by its columns."""
    sizes, axes = (
        [*map(int, filter(None, part.split(",")))] for part in re.findall(r"[\[(](.*?)[\])]", text + "()")[:2]
    )
    return np.arange(prod(sizes)).reshape(sizes).transpose(axes or None).ravel()


@pytest.mark.usefixtures("two_slices")
@pytest.mark.parametrize(("sizes", "kind"), [((1, 4, 1), "align"), ((1, 2, 2), "tied")])
def test_only_gradients_and_their_sums_cross_slices(sizes: tuple[int, ...], kind: str) -> None:
    program = compiled_for(make_mesh(sizes, dcn_data=2), kind=kind).as_text()
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    crossing = []
    for shapes, opcode, attributes in re.findall(rf" = (\S.*?) ({kinds})\((.*)", program):
        if any(len({place // 4 for place in group}) > 1 for group in groups(attributes)):
            largest = max(prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\[([\d,]*)\]", shapes))
            crossing.append((opcode, largest, attributes))
    assert crossing
    for opcode, largest, attributes in crossing:
        # Metrics are a few numbers.
        assert largest <= 8 or "transpose(jvp" in attributes, (opcode, largest, attributes)
        assert opcode not in ("all-gather", "all-to-all")


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
