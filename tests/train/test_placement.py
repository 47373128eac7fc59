"""The state that a tied stage begins with is read straight onto the mesh: what is in memory, and where."""

import tracemalloc
from collections import Counter
from collections.abc import Sequence

import jax
import numpy as np
import pytest
from support import sharing_by_hand, tiny_model

from headshare_jax import SharedView, share
from headshare_jax.model import spread
from headshare_jax.model.mesh import make_mesh
from headshare_jax.model.place import place
from headshare_jax.parameters import PARAMETERS, parameter_names
from headshare_jax.sharing import source as source_module
from headshare_jax.sharing.view import View
from headshare_jax.train import recipe as recipes
from headshare_jax.train.placement import abstract_state, begin
from headshare_jax.train.step import StageContext


class Watched(View):
    """A source that is no model in memory, and counts what is read of it."""

    reads: Counter[tuple[str, int | None]]

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        self.reads[name, layer] += 1
        return super().read(name, layer, rows)


@pytest.mark.parametrize("tie", ["qkv", "mixed"])
def test_a_tied_stage_begins_as_sharing_in_memory_would_and_reads_once(tie: str) -> None:
    dense, mesh = tiny_model(), make_mesh((2, 2, 2))
    source = Watched(dense)
    source.reads = Counter()
    sharing = sharing_by_hand(dense, tie, {2: 0, 3: 1, 5: 0})
    recipe = recipes.from_mapping(
        {"model": "m", "data": {"train": "t"}, "stages": [{"kind": "tied", "trainable": "*_pool_*, *norm*"}]}
    )
    context = StageContext(dense.config, sharing, recipe.stages[0], recipe)
    state, frozen = begin(context, SharedView(source, sharing, check_source=False), mesh)
    assert set(source.reads.values()) == {1}
    expected = share(dense, sharing, check_source=False)
    for name in parameter_names(dense.config):
        value = {**frozen, **state.params}[name]
        np.testing.assert_array_equal(np.asarray(value), np.asarray(expected.array(name)), err_msg=name)
        if PARAMETERS[name].pool:
            assert {shard.data.size for shard in value.addressable_shards} == {value.size // 4}, name
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == jax.tree.map(
        lambda leaf: leaf.sharding, abstract_state(context, mesh)
    )
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize("name", ["q_pool_pdh", "gate_ldf"])
def test_a_host_has_two_layers_beside_what_its_devices_hold(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(spread, "BLOCK_BYTES", 1)
    dense = tiny_model(num_hidden_layers=16, hidden_size=512, intermediate_size=512)
    source = Watched(dense)
    source.reads = Counter()
    whole = dense.array(name).nbytes
    place(source, [name], make_mesh((1, 8, 1)))
    tracemalloc.start()
    try:
        placed = place(source, [name], make_mesh((1, 8, 1)))[name]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(placed, dense.array(name))
    assert peak < 4 * whole // 16 + 100_000 < whole // 3


def test_a_table_is_placed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_model(vocab_size=4096, hidden_size=512)
    whole = dense.array("embed_vd").nbytes
    monkeypatch.setattr(source_module, "TABLE_BYTES", whole // 16)
    source = Watched(dense)
    source.reads = Counter()
    place(source, ["embed_vd"], make_mesh((1, 4, 2)))
    tracemalloc.start()
    try:
        placed = place(source, ["embed_vd"], make_mesh((1, 4, 2)))["embed_vd"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_array_equal(placed, dense.array("embed_vd"))
    assert source.reads["embed_vd", None] == 2 * 16
    assert peak < 4 * whole // 16 + 100_000 < whole // 3


def test_a_stage_takes_over_the_memory_of_the_one_before() -> None:
    dense, mesh = tiny_model(), make_mesh((1, 4, 2))
    sharing = sharing_by_hand(dense, "qkv", {2: 0, 3: 1})
    stages = [{"kind": "align"}, {"kind": "tied", "trainable": "*_pool_*"}]
    recipe = recipes.from_mapping({"model": "m", "data": {"train": "t"}, "stages": stages})
    align, tied = (StageContext(dense.config, sharing, stage, recipe) for stage in recipe.stages)
    expected = {name: np.array(value) for name, value in begin(tied, share(dense, sharing), mesh)[0].params.items()}
    state, frozen = begin(align, dense, mesh)
    model = align.model({**state.params, **frozen})
    state, frozen = begin(tied, SharedView(model, sharing, check_source=False), mesh, take=True)
    assert all(model.array(name).is_deleted() for name in parameter_names(dense.config))
    for name, value in expected.items():
        assert np.array_equal(state.params[name], value), name
    # Frozen here, it was trained before.
    assert frozen["gate_ldf"].dtype == np.float32
    assert np.array_equal(frozen["gate_ldf"], dense.array("gate_ldf"))
