"""The native format: exact round trips, sizes on disk, and plain Orbax as a reader."""

import json
import logging
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
from support import ALL_VARIANTS, jax_logits, random_tokens, sharing_by_hand, tiny_model

import headshare_jax
from headshare_jax import HeadshareError, Llama, SharingMap, convert, parameters
from headshare_jax.convert import native_array
from headshare_jax.convert.native_document import DOCUMENT, WEIGHTS
from headshare_jax.parameters import PROJECTIONS, index_name
from headshare_jax.presets import PRESETS
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
    size = 0
    for name in parameters.parameter_names(headshare_jax.open_checkpoint(folder).config):
        place = folder / WEIGHTS / name
        sharded = json.loads((place / "zarr.json").read_text())
        (codec,) = sharded["codecs"]
        entries = sharded["chunk_grid"]["configuration"]["chunk_shape"][0] // codec["configuration"]["chunk_shape"][0]
        files = [path for path in (place / "c").rglob("*") if path.is_file()]
        size += sum(path.stat().st_size - 16 * entries - 4 for path in files)
    return size


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
    monkeypatch.setattr("headshare_jax.convert.native_array.SHARD_BYTES", 1000)
    monkeypatch.setattr("headshare_jax.sharing.source.TABLE_BYTES", 1000)
    model = tiny_model()
    headshare_jax.save(model, tmp_path / "out")
    assert len(list((tmp_path / "out" / WEIGHTS / "embed_vd" / "c").iterdir())) >= 40
    check_same(model, tmp_path / "out")


@pytest.mark.parametrize("vocab_size", [160, 157])
@pytest.mark.parametrize("size", [20_000, 50_000])
def test_files_of_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, vocab_size: int) -> None:
    """Also where files end within a layer, and where the rows of an embedding cannot be cut evenly."""
    monkeypatch.setattr("headshare_jax.convert.native_array.SHARD_BYTES", size)
    monkeypatch.setattr("headshare_jax.sharing.source.TABLE_BYTES", size)
    model = shared_model("qkvo", vocab_size=vocab_size)
    headshare_jax.save(model, tmp_path / "out")
    assert len(list((tmp_path / "out" / WEIGHTS / "q_pool_pdh" / "c").iterdir())) == -(-6 // (size // 4096))
    check_same(model, tmp_path / "out")
    assert weight_bytes(tmp_path / "out") == 4 * ledger(model).stored
    assert convert.verify(tmp_path / "out").checksums


@pytest.mark.parametrize(("preset", "most"), [("llama-2-7b", 250), ("llama-2-70b", 800)])
def test_large_models_are_a_few_hundred_files(preset: str, most: int) -> None:
    config, files = PRESETS[preset], 2
    for name in parameters.parameter_names(config):
        shape = stored_shape(config, name)
        value = native_array.Deferred(shape, np.dtype("bfloat16"), parameters.PARAMETERS[name].layered, [])
        chunk, rows = native_array.layout(value)
        assert rows == chunk or rows * np.prod(shape[1:]) * 2 <= 64 * 2**20
        files += 1 + -(-shape[0] // rows)
    assert files + 2 * len(PROJECTIONS) <= most


class Counted:
    """A source that keeps a list of what is read of it."""

    def __init__(self, base: Any):
        self.base, self.config, self.sharing = base, base.config, base.sharing
        self.reads: list[tuple[str, int | None, str]] = []

    def dtype(self, name: str) -> np.dtype[Any]:
        return np.dtype(self.base.dtype(name))

    def read(self, name: str, layer: int | None = None, rows: Any = None) -> np.ndarray:
        self.reads.append((name, layer, str(rows)))
        return np.array(self.base.read(name, layer, rows))


@pytest.mark.parametrize("shared", [False, True])
def test_layers_are_read_once_and_never_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    monkeypatch.setattr("headshare_jax.convert.native_array.SHARD_BYTES", 10_000)
    monkeypatch.setattr("headshare_jax.sharing.source.TABLE_BYTES", 10_000)
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

    def failing(name: str, layer: int | None = None, rows: Any = None) -> np.ndarray:
        if (name, layer) == ("up_ldf", 2):
            raise HeadshareError("No more layers.")
        return read(name, layer, rows)

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
