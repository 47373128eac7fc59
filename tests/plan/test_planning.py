"""Plans for TPU topologies: what sharing saves there, what training moves, and what fits."""

from dataclasses import replace
from math import prod
from typing import Any

import jax
import numpy as np
import pytest

from headshare_jax import HeadshareError, LlamaConfig, SharingMap, Widths, parameters
from headshare_jax.chips import CHIPS
from headshare_jax.plan import planning
from headshare_jax.plan.estimate import Layout, Workload, activation_bytes, estimated, meshes
from headshare_jax.plan.topology import chip_of, topology_devices
from headshare_jax.presets import PRESETS
from headshare_jax.sharing.source import stored_shape

SMALL = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
)
SHARING = planning.random_map(SMALL, 0.5)


# Parameters that the models' pages name.
PUBLISHED = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-8b": 8_190_735_360,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "phi-3-mini-4k": 3_821_079_552,
    "seed-oss-36b": 36_151_104_512,
}


def planned(stage: str, batch: int, topology: str = "v5e:1x1", **settings: Any) -> dict[str, Any]:
    return planning.plan(Workload(SMALL, SHARING, stage, batch, 128), topology, **settings)


def stored_bytes(shared: bool) -> int:
    names = parameters.parameter_names(SMALL)
    return 2 * sum(prod(stored_shape(SMALL, name, SHARING if shared else None)) for name in names)


@pytest.mark.parametrize("batch", [1, 32])
def test_sharing_costs_decode_nothing_and_saves_what_the_map_says(batch: int) -> None:
    # Wide enough that pools do not fit a chip's fast memory, into which XLA would copy them whole.
    wide = LlamaConfig(512, 4096, 1024, 64, 4, 4, 128)
    sharing = planning.random_map(wide, 0.5)
    result = planning.plan(Workload(wide, sharing, "decode", batch, 128), "v5e:1x1")
    dense, shared = result["dense"], result["shared"]
    saved = 2 * len(sharing.receivers) * 3 * 4096 * 128
    assert dense["parameter_bytes"] - shared["parameter_bytes"] == saved
    assert dense["argument_bytes"] - shared["argument_bytes"] == saved
    assert shared["hbm_bytes_accessed"] <= dense["hbm_bytes_accessed"]
    assert shared["temporary_bytes"] <= 1.01 * dense["temporary_bytes"]
    assert shared["flops"] == dense["flops"]
    # The loop over tokens writes the cache where it lies.
    assert dense["temporary_bytes"] < 0.05 * dense["argument_bytes"]
    assert dense["fits"]
    assert shared["room_bytes"] > dense["room_bytes"]


@pytest.mark.parametrize(("stage", "length", "itemsize"), [("decode", 2**16, 2), ("postshare", 128, 4)])
def test_slim_units_are_planned_as_they_are_stored(stage: str, length: int, itemsize: int) -> None:
    widths = Widths.full(SMALL)
    rank, pairs = widths.rank.copy(), widths.pairs.copy()
    rank[1], pairs[0, :, 1:3] = 3, False
    whole = np.arange(SMALL.num_units).reshape(rank.shape)
    slim = SharingMap(whole, np.full(rank.shape, np.nan), 2, widths=Widths(rank, pairs, SMALL.head_dim))
    result = planning.plan(Workload(SMALL, slim, stage, 4, length), "v5e:2x2", mesh=(1, 4, 1))
    dense, shared = result["dense"], result["shared"]
    # Of both units, columns of two query heads and a key head, or of a value head and rows of o of two heads.
    saved = 2 * 3 * (61 + 4) * SMALL.hidden_size
    assert dense["parameter_bytes"] - shared["parameter_bytes"] == saved * itemsize // 4
    assert shared["fits"]
    if stage == "decode":
        # A text's keys and values of both units, in widths that are multiples of 8: 64 for 60, and 8 for 3.
        assert dense["cache_bytes"] - shared["cache_bytes"] == 2 * length * 2 * (64 - 8)
        assert shared["temporary_bytes"] < 0.05 * shared["cache_bytes"]


def test_prefill_counts_every_product() -> None:
    result = planned("prefill", 1)
    # In the last layer every token has a key and a value, the last one alone everything else.
    layers, keys_values = SMALL.num_layers - 1, 256 * 64 * 2 * 2
    products = 2 * 128 * (layers * (256 * 64 * (2 * 4 + 2 * 2) + 3 * 256 * 512) + keys_values)
    attention = layers * 2 * 2 * 4 * 64 * 128 * 128
    last_token = 2 * 256 * (2 * 4 * 64 + 3 * 512 + 512)
    assert result["dense"]["flops"] == pytest.approx(products + attention + last_token, rel=0.03)
    assert result["shared"]["flops"] == pytest.approx(result["dense"]["flops"], rel=0.01)


@pytest.mark.parametrize(
    "host", [pytest.param(False, marks=pytest.mark.slow, id="compiled"), pytest.param(True, id="estimated")]
)
def test_windows_make_caches_and_attention_cost_less(host: bool) -> None:
    def costs(stage: str, **changes: Any) -> dict[str, Any]:
        # So narrow that attention is most of the work.
        config = replace(SMALL, family="smollm3", hidden_size=64, intermediate_size=64, vocab_size=64, **changes)
        dense: dict[str, Any] = planning.plan(Workload(config, SHARING, stage, 1, 2048), "v5e:1x1", host=host)["dense"]
        return dense

    window = {"sliding_window": 256}
    full, alike, mixed = (costs("decode", **each) for each in ({}, window, {**window, "full_attention_layers": (0,)}))
    assert alike["cache_bytes"] == pytest.approx(full["cache_bytes"] / 8, abs=64)
    assert mixed["cache_bytes"] == full["cache_bytes"]
    assert alike["hbm_bytes_accessed"] < 0.5 * full["hbm_bytes_accessed"]
    full, alike = (costs("prefill", **each) for each in ({}, window))
    assert alike["flops"] < 0.6 * full["flops"]
    assert alike["cache_bytes"] == pytest.approx(full["cache_bytes"] / 8, abs=64)


def test_training_gathers_a_layer_of_weights_at_a_time_and_never_a_pool() -> None:
    result = planned("postshare", 4, "v5e:2x2", mesh=(1, 4, 1), remat="full")
    layer, pool = 2 * 256 * 512, 2 * SMALL.num_layers * 4 * 256 * 64
    for name in ("dense", "shared"):
        plan = result[name]
        assert plan["largest_collective_bytes"]["all-gather"] <= layer < pool
        assert plan["optimizer_bytes"] == pytest.approx(2 * plan["parameter_bytes"], abs=64)
        assert plan["argument_bytes"] >= plan["parameter_bytes"] + plan["optimizer_bytes"]
        # Four passes over the weights, and the attention kernels.
        assert plan["flops"] > 8 * 128 * stored_bytes(False) / 2 * 0.8
    saved = result["dense"]["parameter_bytes"] - result["shared"]["parameter_bytes"]
    assert saved == 4 * 4 * (2 + 1 + 1) * 256 * 64 // 4


def test_decoding_cuts_weights_over_fsdp_and_leaves_them_where_they_lie() -> None:
    result = planned("decode", 4, "v5e:2x2", mesh=(1, 4, 1))
    for name, shared in (("dense", False), ("shared", True)):
        plan = result[name]
        assert plan["parameter_bytes"] == pytest.approx(stored_bytes(shared) / 4, rel=0.01)
        assert plan["cache_bytes"] == 2 * 2 * SMALL.num_layers * 128 * 2 * 64 + 4 * 3
        # Sums of the tokens, and no layer's weights.
        assert sum(plan["collective_bytes"].values()) < 2 * 256 * 512


def test_decoding_is_spread_over_fsdp_where_the_cache_needs_it() -> None:
    config = PRESETS["llama-3.1-70b"]
    sharing = planning.random_map(config, 0.3)
    one, many = (
        planning.plan(Workload(config, sharing, "decode", batch, 4096), "v5e:4x4", host=True) for batch in (1, 32)
    )
    assert one["mesh"] == [1, 1, 16]
    assert many["mesh"][1] > 1
    assert one["dense"]["fits"]
    assert many["dense"]["fits"]


def test_a_mesh_is_filled_with_sequences() -> None:
    one, four = (planned("decode", batch, "v5e:2x2", mesh=(2, 2, 1), host=True)["dense"] for batch in (1, 4))
    assert one["cache_bytes"] == four["cache_bytes"]
    assert one["step_seconds"] == four["step_seconds"]
    assert four["tokens_per_second"] == 4 * one["tokens_per_second"]


@pytest.mark.slow
def test_a_run_is_planned_with_what_it_does_outside_its_steps() -> None:
    result = planned("run", 4, "v5e:2x2", mesh=(1, 4, 1), remat="full")
    state = result["dense"]["parameter_bytes"] + result["dense"]["optimizer_bytes"]
    names = [row["name"] for row in result["programs"]]
    for name in ("place", "share", "begin", "evaluate", "compare", "refit", "export"):
        assert any(row.startswith(name) for row in names), name
    for row in result["programs"]:
        assert row["fits"]
        assert 0 <= row["beside_bytes"] < row["needed_bytes"]
        assert row["needed_bytes"] + row["room_bytes"] == result["hbm_bytes"]
    assert result["host_bytes"]["save"] == 4 * state


def test_a_run_cannot_be_estimated() -> None:
    with pytest.raises(HeadshareError, match="only known compiled"):
        planned("run", 4, "v5e:2x2", host=True)


def test_costs_are_estimated_where_the_program_cannot_be_written_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwritable(self: object) -> str:
        raise jax.errors.JaxRuntimeError("INTERNAL: no such instruction\nin full")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unwritable)
    unwritten, estimate = planned("decode", 3), planned("decode", 3, host=True)
    for name in ("dense", "shared"):
        plan = unwritten[name]
        assert plan.keys() == estimate[name].keys()
        assert plan["costs_estimated"]
        for cost in ("flops", "hbm_bytes_accessed", "collective_bytes", "step_seconds", "bound_by"):
            assert plan[cost] == estimate[name][cost] is not None
        assert plan["argument_bytes"] >= plan["parameter_bytes"] + plan["cache_bytes"] > 0
        assert plan["temporary_bytes"] > 0
        assert plan["fits"]


def test_what_cannot_fit_is_said_not_to() -> None:
    large = LlamaConfig(2**20, 8192, 256, 2, 64, 8, 128)
    result = planning.plan(Workload(large, planning.random_map(large, 0.2), "decode", 1, 128), "v5e:1x1")
    for name in ("dense", "shared"):
        assert not result[name]["fits"]
        assert result[name]["needed_bytes"] > CHIPS["v5e"].hbm_bytes
        assert result[name]["room_bytes"] < 0
        assert result[name]["hbm_bytes_accessed"] is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_planned_from_their_shapes(name: str) -> None:
    config = PRESETS[name]
    result = planning.plan(
        Workload(config, planning.random_map(config, 0.3), "postshare", 512, 4096), "v5p:8x8x8", host=True
    )
    assert result["dense"]["fits"]
    assert prod(result["mesh"]) == 512
    layout = Layout((1, 1, 1))
    whole = estimated(Workload(config, SHARING, "decode", 1, 2), layout, CHIPS["v5p"], shared=False)
    assert whole["parameter_bytes"] == 2 * PUBLISHED[name]


def test_an_estimate_has_what_a_compiled_plan_has() -> None:
    compiled, guessed = planned("decode", 4), planned("decode", 4, host=True)
    assert set(compiled["shared"]) == set(guessed["shared"])
    for name in ("parameter_bytes", "cache_bytes", "optimizer_bytes"):
        assert compiled["shared"][name] == pytest.approx(guessed["shared"][name], abs=64)
    assert guessed["shared"]["compile_seconds"] is None


def test_the_first_layout_that_fits_is_taken() -> None:
    config = PRESETS["llama-2-7b"]
    result = planning.plan(
        Workload(config, planning.random_map(config, 0.3), "postshare", 64, 4096), "v5p:4x4x4", host=True
    )
    assert result["mesh"] == [1, 64, 1]
    assert result["tried"][-1] == {"mesh": [1, 64, 1], "remat": result["remat"], "fits": True}


def test_meshes_divide_the_batch() -> None:
    workload = Workload(SMALL, SHARING, "postshare", 2, 128)
    assert meshes(workload, 8) == [(1, 2, 4), (1, 1, 8)]
    kept = [activation_bytes(workload, Layout((1, 2, 4), remat)) for remat in ("none", "dots", "full")]
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 2 * SMALL.num_layers * 128 * 256


def test_random_maps_share_what_is_asked() -> None:
    sharing = planning.random_map(PRESETS["llama-3.1-8b"], 0.3, "qk")
    assert (len(sharing.receivers), sharing.tie) == (76, "qk")
    assert np.all(sharing.donor.ravel()[sharing.receivers] < sharing.receivers)


@pytest.mark.parametrize(
    ("topology", "said"),
    [
        ("v5e", "no TPU topology"),
        ("a100:8", "no TPU topology"),
        ("v5p:2x2", "no TPU topology"),
        ("v5e:3x3", "libtpu has no topology v5e:3x3"),
        ("v5e:32x32", "1024 chips, but a v5e pod 1 to 256"),
        ("v6e:0x4", "0 chips"),
    ],
)
def test_topologies_that_are_none_are_refused_with_examples(topology: str, said: str) -> None:
    with pytest.raises(HeadshareError, match=said):
        topology_devices(topology)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"devices": 2}, "has 1 chips; use from 1 to 1 devices, not 2"),
        ({"mesh": (1, 2, 1)}, "needs 2 devices, but there are 1"),
        ({"stage": "train"}, "decode, prefill, postshare"),
        ({"stage": "postshare", "remat": "some"}, "remat must be one of none, dots, full"),
        ({"remat": "full"}, "stage decode has no use for remat"),
        ({"batch": 0}, "a batch of 0"),
        (
            {"stage": "postshare", "batch": 3, "topology": "v5e:2x2", "mesh": (1, 4, 1)},
            "multiple of the mesh's data x fsdp",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(HeadshareError, match=f"(?i){said}"):
        planned(**{"stage": "decode", "batch": 1, "host": True, **settings})


def test_without_libtpu_an_estimate_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headshare_jax.plan.topology.find_spec", lambda name: None)
    with pytest.raises(HeadshareError, match=r"pip install 'headshare-jax\[tpu\]'") as refused:
        planned("decode", 1)
    assert refused.value.options == ("host",)
    assert planned("decode", 1, host=True)["dense"]["fits"]


def test_chips_of_a_topology() -> None:
    assert chip_of("v5p:4x4x8") == (CHIPS["v5p"], 128)
