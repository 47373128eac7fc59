"""Views: what they read is what the same change does to a model in memory, for any map, head by head."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import sharing_by_hand, tiny_model

import headshare_jax as hs
from headshare_jax import HeadshareError, Llama, LlamaConfig, SharingMap, WeightSource, share, unshare
from headshare_jax.model.mesh import make_mesh
from headshare_jax.parameters import PARAMETERS, PROJECTIONS, parameter_names, pool_name
from headshare_jax.sharing.source import assemble
from headshare_jax.sharing.tie import DROPPED
from headshare_jax.sharing.view import CastView, DenseView, ReplacedView, SharedView, View

MODEL = tiny_model(attention_bias=True)
POOLS = tuple(name for name in parameter_names(MODEL.config) if PARAMETERS[name].pool)
TIES = ("q", "k", "v", "o", "qk", "vo", "qkv", "qkvo")


@st.composite
def maps(draw: st.DrawFn, config: LlamaConfig = MODEL.config) -> SharingMap:
    """Any map: donors in earlier and later layers and in the receiver's own, ties of every kind, dropped units."""
    units = range(config.num_units)
    kept = sorted(draw(st.sets(st.sampled_from(units), min_size=1)))
    donor, tie = np.arange(config.num_units), np.full(config.num_units, "", "<U4")
    for unit in set(units) - set(kept):
        donor[unit] = draw(st.sampled_from([DROPPED, *kept]))
        tie[unit] = "" if donor[unit] == DROPPED else draw(st.sampled_from(TIES))
    shape = (config.num_layers, config.num_kv_heads)
    score = np.where(donor == np.arange(config.num_units), np.nan, 0.0)
    return SharingMap(donor.reshape(shape), score.reshape(shape), config.heads_per_unit, unit_tie=tie.reshape(shape))


class Counted(View):
    """A source that is read, not in memory, and counts what is read of it."""

    def __init__(self, base: WeightSource):
        super().__init__(base)
        self.reads: Counter[tuple[str, int | None]] = Counter()

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        self.reads[name, layer] += 1
        return self.base.read(name, layer, rows)


def by_hand(model: Llama, sharing: SharingMap, name: str, layer: int) -> np.ndarray:
    """A layer's heads as the map says, unit by unit."""
    projection, units = PARAMETERS[name].pool, model.config.num_kv_heads
    value = np.array(model.read(name, layer))
    size = len(value) // units
    assert sharing.unit_tie is not None
    for unit in range(units):
        donor_layer, donor_unit = divmod(int(sharing.donor[layer, unit]), units)
        mine = slice(unit * size, (unit + 1) * size)
        if sharing.dropped[layer, unit]:
            value[mine] = 0
        elif str(projection) in str(sharing.unit_tie[layer, unit]):
            value[mine] = model.read(name, donor_layer)[donor_unit * size : (donor_unit + 1) * size]
    return value


def assert_same_model(found: Llama, expected: Llama) -> None:
    assert found.sharing == expected.sharing
    for name in parameter_names(expected.config):
        mine, theirs = (np.asarray(model.array(name)) for model in (found, expected))
        np.testing.assert_array_equal(mine, theirs, strict=True, err_msg=name)


@settings(max_examples=20)
@given(maps())
def test_a_shared_view_reads_what_the_map_says(sharing: SharingMap) -> None:
    view, shared = SharedView(MODEL, sharing), share(MODEL, sharing)
    for layer in range(MODEL.config.num_layers):
        for name in parameter_names(MODEL.config):
            if not PARAMETERS[name].layered:
                continue
            expected = by_hand(MODEL, sharing, name, layer) if name in POOLS else MODEL.read(name, layer)
            np.testing.assert_array_equal(view.read(name, layer), expected)
            np.testing.assert_array_equal(shared.read(name, layer), expected)


@given(maps(), st.data())
def test_some_heads_are_those_of_the_whole_layer(sharing: SharingMap, data: st.DataObject) -> None:
    name, layer = data.draw(st.sampled_from(POOLS)), data.draw(st.integers(0, MODEL.config.num_layers - 1))
    heads = sorted(data.draw(st.sets(st.integers(0, len(MODEL.read(name, layer)) - 1))))
    shared = share(MODEL, sharing)
    views = (
        SharedView(MODEL, sharing),
        shared,
        DenseView(shared),
        CastView(shared, "bfloat16"),
        ReplacedView(shared, {(name, layer): MODEL.read(name, 0)}),
        ReplacedView(shared, {}),
    )
    for view in views:
        np.testing.assert_array_equal(view.read(name, layer, heads), view.read(name, layer)[heads], strict=True)


@settings(max_examples=10)
@given(maps())
def test_a_model_read_through_views_is_the_one_changed_in_memory(sharing: SharingMap) -> None:
    on_disk = Counted(MODEL)
    shared = share(MODEL, sharing)
    assert_same_model(Llama.of(SharedView(on_disk, sharing)), shared)
    assert set(on_disk.reads.values()) <= {1}
    assert_same_model(Llama.of(DenseView(Counted(shared))), unshare(shared))
    assert_same_model(Llama.of(DenseView(SharedView(Counted(MODEL), sharing))), unshare(shared))


@pytest.mark.parametrize("to", ["native", "hf"])
def test_a_checkpoint_is_shared_as_it_is_read(tmp_path: Path, to: str) -> None:
    dense = tiny_model()
    hs.save(dense, tmp_path / "dense", to=to)
    checkpoint = hs.open_checkpoint(tmp_path / "dense")
    for tie in ("qkv", "mixed"):
        sharing = replace(sharing_by_hand(dense, tie, {2: 0, 5: 1}), source=hs.fingerprint(dense))
        view = SharedView(checkpoint, sharing)
        expected = share(hs.load(tmp_path / "dense"), sharing)
        assert_same_model(Llama.of(view), expected)
        hs.save(view, tmp_path / tie, to="native")
        assert_same_model(hs.load(tmp_path / tie), expected)
        assert hs.fingerprint(view) == hs.fingerprint(expected)


@settings(max_examples=4)
@given(maps())
def test_on_a_mesh_each_layer_is_read_once(sharing: SharingMap) -> None:
    source, mesh = Counted(MODEL), make_mesh((2, 2, 2))
    placed = Llama.of(SharedView(source, sharing), mesh=mesh)
    assert len(jax.tree.leaves(placed)[0].sharding.device_set) == 8
    assert_same_model(placed, share(MODEL, sharing))
    assert set(source.reads.values()) == {1}
    for projection in PROJECTIONS:
        read = {layer for name, layer in source.reads if name == pool_name(projection)}
        assert read == set(np.flatnonzero(sharing.owns_weights(projection).any(axis=1)).tolist())


def test_replaced_slices_take_the_place_of_the_sources() -> None:
    shared = share(MODEL, sharing_by_hand(MODEL, "mixed", {}))
    values = {("down_lfd", 1): MODEL.read("down_lfd", 0), ("o_pool_phd", 2): 2 * shared.read("o_pool_phd", 2)}
    view = ReplacedView(shared, values)
    for name in parameter_names(MODEL.config):
        for layer in range(3) if PARAMETERS[name].layered else (None,):
            expected = values.get((name, layer)) if layer is not None else None
            np.testing.assert_array_equal(
                view.read(name, layer), shared.read(name, layer) if expected is None else expected
            )
    model = Llama.of(view)
    assert model.sharing == shared.sharing
    for name in values:
        np.testing.assert_array_equal(assemble(view, name[0]), model.array(name[0]))
    assert model.array("up_ldf") is shared.array("up_ldf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_cast_view_rounds_as_it_is_read(dtype: str) -> None:
    shared = share(MODEL, sharing_by_hand(MODEL, "mixed", {}))
    view = CastView(shared, dtype)
    model = Llama.of(view)
    for name in parameter_names(MODEL.config):
        assert view.dtype(name) == np.dtype(dtype)
        np.testing.assert_array_equal(model.array(name), np.asarray(shared.array(name)).astype(dtype), strict=True)
        layer = 1 if PARAMETERS[name].layered else None
        np.testing.assert_array_equal(view.read(name, layer), shared.read(name, layer).astype(dtype), strict=True)


def test_what_cannot_be_viewed_is_refused() -> None:
    sharing = sharing_by_hand(MODEL, "qkv", {2: 0})
    with pytest.raises(HeadshareError, match="not one of float32, bfloat16, float16"):
        CastView(MODEL, "int8")
    with pytest.raises(HeadshareError, match="already shares heads"):
        SharedView(share(MODEL, sharing), sharing)
    with pytest.raises(HeadshareError, match="another model"):
        SharedView(tiny_model(num_hidden_layers=4), sharing)
    of_others = replace(sharing, source=hs.fingerprint(tiny_model(seed=1)))
    with pytest.raises(HeadshareError, match="other weights"):
        SharedView(MODEL, of_others)
    # Weights that the map changes nothing of, as a dense export of the shared model has them, are its own.
    assert SharedView(unshare(share(MODEL, sharing)), of_others).sharing == of_others
    assert SharedView(MODEL, of_others, check_source=False).sharing == of_others
