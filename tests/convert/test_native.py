"""The native format: exact round trips, sizes on disk, plain Orbax as a reader, and damaged copies."""

import json
import logging
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from fuzzing import damaged, open_or_refuse
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ALL_VARIANTS, jax_logits, random_tokens, sharing_by_hand, tiny_model

import headshare_jax
from headshare_jax import HeadshareError, Llama, SharingMap, parameters
from headshare_jax.convert.native import DOCUMENT, WEIGHTS
from headshare_jax.parameters import PROJECTIONS, index_name
from headshare_jax.sharing.ledger import ledger
from headshare_jax.sharing.source import assemble, pool_index, stored_shape

PAIRS = {2: 0, 4: 1, 5: 1}


def shared_model(tie: str = "qkv", **overrides: Any) -> Llama:
    dense = tiny_model(attention_bias=True, **overrides)
    return headshare_jax.share(dense, sharing_by_hand(dense, tie, PAIRS))


def check_same(source: Any, folder: Path) -> None:
    stored = headshare_jax.open_checkpoint(folder)
    assert stored.config == source.config
    assert (stored.sharing is None) == (source.sharing is None)
    if stored.sharing is not None:
        assert stored.sharing.to_json() == source.sharing.to_json()
    for name in parameters.parameter_names(source.config):
        expected, actual = assemble(source, name), assemble(stored, name)
        assert actual.dtype == expected.dtype
        assert actual.shape == stored_shape(source.config, name, source.sharing)
        assert actual.tobytes() == expected.tobytes(), name


def weight_bytes(folder: Path) -> int:
    """Bytes of the arrays' chunks, without the indices."""
    indices = {index_name(projection) for projection in PROJECTIONS}
    return sum(
        path.stat().st_size
        for array in (folder / WEIGHTS).iterdir()
        if array.is_dir() and array.name not in indices
        for path in array.iterdir()
        if path.name != ".zarray"
    )


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_dense_models_come_back_bit_by_bit(tmp_path: Path, variant: str) -> None:
    model = tiny_model(**ALL_VARIANTS[variant])
    headshare_jax.save(model, tmp_path / "out")
    check_same(model, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tie", ["qkv", "qkvo", "k", "o", "mixed"])
def test_shared_models_come_back_bit_by_bit(tmp_path: Path, tie: str, dtype: str) -> None:
    model = shared_model(tie, dtype=dtype)
    headshare_jax.save(model, tmp_path / "out")
    check_same(model, tmp_path / "out")


@pytest.mark.parametrize("tie", ["qkv", "mixed"])
def test_a_loaded_shared_model_computes_the_same(tmp_path: Path, tie: str) -> None:
    model, tokens = shared_model(tie), random_tokens((2, 40))
    headshare_jax.save(model, tmp_path / "out")
    assert np.array_equal(jax_logits(headshare_jax.load(tmp_path / "out"), tokens), jax_logits(model, tokens))


@pytest.mark.parametrize("tie", ["qkv", "qkvo", "v", "mixed"])
def test_sharing_saves_on_disk_exactly_what_the_map_says(tmp_path: Path, tie: str) -> None:
    dense = tiny_model(attention_bias=True)
    shared = headshare_jax.share(dense, sharing_by_hand(dense, tie, PAIRS))
    headshare_jax.save(dense, tmp_path / "dense")
    headshare_jax.save(shared, tmp_path / "shared")
    saving = 4 * (ledger(dense).stored - ledger(shared).stored)
    assert saving > 0
    assert weight_bytes(tmp_path / "dense") == 4 * ledger(dense).stored
    assert weight_bytes(tmp_path / "dense") - weight_bytes(tmp_path / "shared") == saving


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_orbax_reads_the_tree(tmp_path: Path, dtype: str) -> None:
    model = shared_model(dtype=dtype)
    headshare_jax.save(model, tmp_path / "out")
    tree = ocp.PyTreeCheckpointer().restore((tmp_path / "out" / WEIGHTS).absolute())
    for name in parameters.parameter_names(model.config):
        value = np.asarray(getattr(model, name)[...])
        assert tree.pop(name).tobytes() == value.tobytes(), name
    for projection in PROJECTIONS:
        index = pool_index(model.config, projection, model.sharing)
        assert np.array_equal(tree.pop(index_name(projection)), index)
    assert not tree


def test_a_conversion_from_a_checkpoint_on_disk_keeps_sharing(tmp_path: Path) -> None:
    model = shared_model("qk")
    headshare_jax.save(model, tmp_path / "one")
    headshare_jax.save(headshare_jax.open_checkpoint(tmp_path / "one"), tmp_path / "two")
    check_same(model, tmp_path / "two")


def test_parameters_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headshare_jax.convert.native.CHUNK_BYTES", 1000)
    model = tiny_model()
    headshare_jax.save(model, tmp_path / "out")
    assert len(list((tmp_path / "out" / WEIGHTS / "embed_vd").glob("[0-9]*"))) > 40
    check_same(model, tmp_path / "out")


class Counted:
    """A source that keeps a list of what is read of it."""

    def __init__(self, base: Any):
        self.base, self.config, self.sharing = base, base.config, base.sharing
        self.reads: list[tuple[str, int | None]] = []

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(self.base.dtype(name))

    def read(self, name: str, layer: int | None = None, heads: Any = None) -> np.ndarray:
        self.reads.append((name, layer))
        return np.array(self.base.read(name, layer, heads))


@pytest.mark.parametrize("shared", [False, True])
def test_layers_are_read_once_and_never_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    monkeypatch.setattr("headshare_jax.convert.native.CHUNK_BYTES", 10_000)
    model = tiny_model(num_hidden_layers=24, intermediate_size=512)
    if shared:
        model = headshare_jax.share(model, sharing_by_hand(model, "qkvo", {3: 0, 4: 0}))
    source = Counted(model)
    stack = source.read("up_ldf", 0).nbytes * model.config.num_layers
    source.reads.clear()
    tracemalloc.start()
    try:
        headshare_jax.save(source, tmp_path / "out")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < stack / 2
    assert len(source.reads) == len(set(source.reads))
    check_same(model, tmp_path / "out")


def test_after_an_error_nothing_more_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Counted(tiny_model())
    read = source.read

    def failing(name: str, layer: int | None = None, heads: Any = None) -> np.ndarray:
        if (name, layer) == ("up_ldf", 2):
            raise HeadshareError("No more layers.")
        return read(name, layer, heads)

    monkeypatch.setattr(source, "read", failing)
    with pytest.raises(HeadshareError, match="No more layers"):
        headshare_jax.save(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_paths_may_go_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = tiny_model()
    headshare_jax.save(model, Path("../model"))
    check_same(model, Path("../model"))
    check_same(model, tmp_path / "elsewhere" / ".." / "model")


def test_the_document_is_for_people_too(tmp_path: Path) -> None:
    model = shared_model()
    headshare_jax.save(model, tmp_path / "out", provenance={"source": "somewhere"})
    document = json.loads((tmp_path / "out" / DOCUMENT).read_text())
    assert document["provenance"] == {"source": "somewhere"}
    assert document["parameters"]["q_pool_pdh"] == {"shape": [6, 64, 16], "dtype": "float32"}
    assert len(document["sharing"]["receivers"]) == len(PAIRS)


def test_writing_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: Any) -> None:
    model = tiny_model()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        headshare_jax.save(model, tmp_path / "out")
    assert not caplog.text
    assert capfd.readouterr() == ("", "")


# Damaged copies.


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "shared"
    headshare_jax.save(shared_model(), folder)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def refused(folder: Path) -> str:
    with pytest.raises(HeadshareError) as caught:
        headshare_jax.open_checkpoint(folder)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads((folder / DOCUMENT).read_text())
    change(document)
    (folder / DOCUMENT).write_text(json.dumps(document))


def array_of(folder: Path, name: str, **settings: Any) -> Any:
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{folder / WEIGHTS / name}/"}}
    return ts.open(spec, open=True, **settings).result()


def replace_array(folder: Path, name: str, value: np.ndarray) -> None:
    shutil.rmtree(folder / WEIGHTS / name)
    array_of(folder, name, create=True, dtype=value.dtype, shape=value.shape).write(value).result()


@pytest.mark.parametrize("cut", [0, 10, -1])
@pytest.mark.parametrize("chunk", ["gate_ldf/1.0.0", "q_pool_pdh/3.0.0", "embed_vd/0.0"])
def test_a_truncated_chunk_is_an_error_when_it_is_read(folder: Path, chunk: str, cut: int) -> None:
    path = folder / WEIGHTS / chunk
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(
        HeadshareError, match=f"{chunk.split('/')[0]} is incomplete or corrupt .*; copy or make it again"
    ):
        headshare_jax.load(folder)


@pytest.mark.parametrize("chunk", ["gate_ldf/1.0.0", "q_pool_pdh/3.0.0", "embed_vd/0.0"])
def test_a_missing_chunk_is_never_zeros(folder: Path, chunk: str) -> None:
    (folder / WEIGHTS / chunk).unlink()
    with pytest.raises(
        HeadshareError, match=f"{chunk.split('/')[0]} is incomplete or corrupt .*; copy or make it again"
    ):
        headshare_jax.load(folder)


@pytest.mark.parametrize("name", ["gate_ldf", "v_pool_pdh", "o_index_ln"])
def test_a_missing_array_is_named(folder: Path, name: str) -> None:
    shutil.rmtree(folder / WEIGHTS / name)
    assert f"has no readable array {name}; the copy is incomplete" in refused(folder)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_a_tampered_index_is_refused(folder: Path, projection: str) -> None:
    array = array_of(folder, index_name(projection))
    array[0, 0].write(1).result()
    assert f"{index_name(projection)} in {folder} disagrees with the map" in refused(folder)


def test_a_map_for_other_arrays_is_refused(folder: Path) -> None:
    rewrite(folder, lambda document: document["sharing"]["receivers"].pop())
    assert "q_pool_pdh has shape [6, 64, 16] instead of [8, 64, 16]" in refused(folder)


def test_a_map_of_the_same_size_that_shares_others_is_refused(folder: Path) -> None:
    rewrite(folder, lambda document: document["sharing"]["receivers"][0].update({"donor": [0, 1]}))
    assert "q_index_ln in" in refused(folder)
    assert "disagrees with the map" in refused(folder)


def test_a_map_that_was_removed_is_missed(folder: Path) -> None:
    rewrite(folder, lambda document: document.update({"sharing": None}))
    assert "q_pool_pdh has shape [6, 64, 16] instead of [12, 64, 16]" in refused(folder)


def test_all_mismatches_are_told_at_once(folder: Path) -> None:
    replace_array(folder, "gate_ldf", np.zeros((3, 64, 95), np.float32))
    replace_array(folder, "final_norm_d", np.zeros(64, np.int32))
    replace_array(folder, "k_index_lk", np.zeros((3, 2), np.float32))
    message = refused(folder)
    for problem in (
        "gate_ldf has shape [3, 64, 95] instead of [3, 64, 96]",
        "final_norm_d holds int32 instead of float32 or bfloat16 or float16",
        "k_index_lk holds float32 instead of int32",
    ):
        assert problem in message


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is not readable JSON"),
        ("{", "is not readable JSON"),
        ("[" * 100_000, "is not readable JSON"),
        ("[]", "is not a headshare-native document"),
        ("{}", "is not a headshare-native document"),
        ('{"format": "headshare-map", "version": 1}', "is not a headshare-native document"),
        ('{"format": "headshare-native", "version": 2}', "has version 2; this release reads version 1"),
        ('{"format": "headshare-native", "version": 1}', "lacks or garbles a field"),
        ('{"format": "headshare-native", "version": 1, "config": [], "sharing": null}', "configuration"),
        (
            '{"format": "headshare-native", "version": 1, "config": {"vocab_size": "x"}, "sharing": null}',
            "configuration",
        ),
    ],
)
def test_other_documents_are_refused(folder: Path, text: str, reason: str) -> None:
    (folder / DOCUMENT).write_text(text)
    assert reason in refused(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"num_layers": 10**12},
        {"num_layers": 2},
        {"vocab_size": 2**70},
        {"head_dim": 8},
        {"num_heads": 8},
        {"novelty": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("sharing", [True, False])
def test_configurations_for_other_arrays_are_refused(folder: Path, fields: dict[str, Any], sharing: bool) -> None:
    rewrite(folder, lambda document: document["config"].update(fields))
    if not sharing:
        rewrite(folder, lambda document: document.update({"sharing": None}))
    assert refused(folder)


def test_a_map_in_the_document_is_not_trusted(folder: Path) -> None:
    rewrite(
        folder, lambda document: document["sharing"].update({"receivers": [{"layer": 9, "unit": 0, "donor": [0, 0]}]})
    )
    assert "names unit 9.0" in refused(folder)


@settings(max_examples=60)
@given(data=st.data())
@pytest.mark.parametrize("name", [DOCUMENT, f"{WEIGHTS}/gate_ldf/.zarray", f"{WEIGHTS}/q_index_ln/.zarray"])
def test_a_damaged_file_never_gives_another_error(
    tmp_path_factory: pytest.TempPathFactory, pristine: Path, name: str, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(pristine, folder, copy_function=os.link)
    (folder / name).unlink()
    (folder / name).write_bytes(damaged((pristine / name).read_bytes(), data))
    open_or_refuse(folder)


def test_the_map_of_a_checkpoint_is_the_one_it_was_shared_by(tmp_path: Path) -> None:
    dense = tiny_model()
    sharing = SharingMap(
        np.array([[0, 1], [0, 3], [4, 5]]),
        np.array([[np.nan] * 2, [0.5, np.nan], [np.nan] * 2]),
        2,
        ratio=0.2,
        match="qk",
    )
    headshare_jax.save(headshare_jax.share(dense, sharing), tmp_path / "out")
    assert headshare_jax.open_checkpoint(tmp_path / "out").sharing == sharing
