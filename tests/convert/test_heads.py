"""Single heads of a layer, and rows of a table: what checkpoints give of them, and how little is read for them."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import saved_hf_model, sharing_by_hand, tiny_hf_model, tiny_model
from support_gguf import write_gguf

import headshare_jax
from headshare_jax import SharedView, parameters
from headshare_jax.convert import safetensors_files, storage
from headshare_jax.convert.tensor_files import TensorCheckpoint
from headshare_jax.model.mesh import make_mesh
from headshare_jax.parameters import PARAMETERS
from headshare_jax.sharing import source as source_module
from headshare_jax.sharing.source import WeightSource, assemble
from headshare_jax.sharing.view import CastView


def write_bin(path: Path) -> Path:
    model = tiny_hf_model().to(torch.bfloat16)
    model.config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    return path


def compact(path: Path) -> Path:
    dense = tiny_model(attention_bias=True)
    headshare_jax.save(
        headshare_jax.share(dense, sharing_by_hand(dense, "qkv", {2: 0, 5: 1}, [4])), path, to="hf-compact"
    )
    return path


def native(path: Path) -> Path:
    headshare_jax.save(tiny_model(attention_bias=True), path)
    return path


KINDS: dict[str, Callable[[Path], Path]] = {
    "safetensors": lambda path: saved_hf_model(path, attention_bias=True),
    "bfloat16": lambda path: saved_hf_model(path, dtype=torch.bfloat16),
    "bin": write_bin,
    "gguf": lambda path: write_gguf(path.with_suffix(".gguf"), tiny_hf_model()),
    "compact": compact,
    "native": native,
}


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_those_of_the_whole_layer(tmp_path: Path, kind: str) -> None:
    source = headshare_jax.open_checkpoint(KINDS[kind](tmp_path / "model"))
    for name in parameters.parameter_names(source.config):
        if PARAMETERS[name].pool is None:
            continue
        for layer in range(source.config.num_layers):
            whole = source.read(name, layer)
            assert whole.shape == parameters.slice_shape(source.config, name)
            for heads in ([0], [1], [0, 1], list(range(len(whole)))[1:]):
                part = source.read(name, layer, heads)
                assert part.dtype == whole.dtype
                assert np.array_equal(part, whole[heads]), (name, layer, heads)


@pytest.mark.parametrize("kind", [*KINDS, "view", "model"])
def test_rows_are_those_of_the_whole_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    # Chunks of a native checkpoint begin and end within what is asked for.
    monkeypatch.setattr(source_module, "TABLE_BYTES", 3000)
    source: WeightSource = headshare_jax.open_checkpoint(KINDS.get(kind, native)(tmp_path / "model"))
    if kind == "view":
        source = CastView(SharedView(source, sharing_by_hand(source, "qkv", {5: 0})), "float32")
    elif kind == "model":
        source = headshare_jax.Llama.of(source, mesh=make_mesh((2, 2, 2)))
    for name in ("embed_vd", "head_vd", "final_norm_d"):
        whole = source.read(name)
        for rows in ([0], [len(whole) - 1], range(3, len(whole) - 2), [1, 2, 5, 17], range(len(whole))):
            part = source.read(name, None, rows)
            assert part.dtype == whole.dtype
            assert np.array_equal(part, whole[list(rows)]), (name, rows)


@pytest.mark.parametrize("to", ["native", "hf", "hf-compact", "gguf"])
def test_tables_are_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, to: Any) -> None:
    source = headshare_jax.open_checkpoint(saved_hf_model(tmp_path / "model"))
    view = SharedView(source, sharing_by_hand(source, "qkv", {5: 0}))
    ending = ".gguf" if to == "gguf" else ""
    headshare_jax.save(view, tmp_path / f"whole{ending}", to=to)
    table_bytes = source.read("embed_vd").nbytes
    monkeypatch.setattr(source_module, "TABLE_BYTES", table_bytes // 3)
    largest = Counter[str]()
    read = TensorCheckpoint.read

    def watched(self: TensorCheckpoint, name: str, layer: int | None = None, rows: Any = None) -> np.ndarray:
        values = read(self, name, layer, rows)
        largest[name] = max(largest[name], values.nbytes)
        return values

    monkeypatch.setattr(TensorCheckpoint, "read", watched)
    headshare_jax.save(view, tmp_path / f"pieces{ending}", to=to)
    assert 0 < largest["embed_vd"] <= table_bytes // 3
    assert 0 < largest["head_vd"] <= table_bytes // 3
    whole, pieces = (headshare_jax.open_checkpoint(tmp_path / f"{name}{ending}") for name in ("whole", "pieces"))
    for name in parameters.parameter_names(source.config):
        assert np.array_equal(assemble(pieces, name), assemble(whole, name)), name


class Sliced:
    """A tensor of a safetensors file; keeps the numbers of values that are asked for."""

    def __init__(self, part: Any, asked: list[int]):
        self.part, self.asked = part, asked

    def __getitem__(self, key: Any) -> np.ndarray:
        values: np.ndarray = self.part[key]
        self.asked.append(values.size)
        return values


def test_an_expanded_export_reads_the_heads_of_other_layers_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source: Any = headshare_jax.open_checkpoint(saved_hf_model(tmp_path / "hf"))
    view = SharedView(source, sharing_by_hand(source, "qkvo", {5: 0}))
    asked: list[int] = []
    of = safetensors_files.Cut.of
    monkeypatch.setattr(safetensors_files.Cut, "of", lambda cut, part: of(cut, Sliced(part, asked)))
    value = view.read("o_pool_phd", 2)
    # Two query heads of the donor, and the two others of the layer itself.
    assert asked == [value.size // 2] * 2
    assert np.array_equal(value[2:], source.read("o_pool_phd", 0)[:2])
    assert np.array_equal(value[:2], source.read("o_pool_phd", 2)[:2])


def test_threads_read_the_same_files(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    tiny_hf_model().save_pretrained(folder, max_shard_size="100KB")
    source = headshare_jax.open_checkpoint(folder)
    names = parameters.parameter_names(source.config)
    expected = [assemble(source, name).tobytes() for name in names]
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda _: [assemble(source, name).tobytes() for name in names], range(8)):
            assert found == expected


def test_of_some_rows_of_a_tensor_no_other_bytes_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = headshare_jax.open_checkpoint(saved_hf_model(tmp_path / "hf"))
    sizes: list[int] = []
    read_array = storage.read_array

    def counted(file: Path, start: int, size: int) -> np.ndarray:
        sizes.append(size)
        return read_array(file, start, size)

    monkeypatch.setattr(storage, "read_array", counted)
    part = source.read("q_pool_pdh", 1, [1, 2])
    rows = source.read("embed_vd", None, range(5, 9))
    assert sizes == [part.nbytes, rows.nbytes]
