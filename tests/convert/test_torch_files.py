"""PyTorch `.bin` checkpoints: read exactly, and without running anything that is pickled in them."""

import os
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from support import saved_hf_model, tiny_hf_model

import headshare_jax
from headshare_jax import HeadshareError, parameters
from headshare_jax.sharing.source import assemble

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def write_bin(folder: Path, dtype: torch.dtype = torch.float32, shards: int = 1, **settings: Any) -> Path:
    """A tiny model as .bin files; returns the folder."""
    model = tiny_hf_model().to(dtype)
    model.config.save_pretrained(folder)
    state = OrderedDict(model.state_dict())
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin", **settings)
        return folder
    weight_map: dict[str, str] = {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        part = {name: value.clone() for name, value in list(state.items())[number::shards]}
        torch.save(part, folder / file, **settings)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(str(index).replace("'", '"'))
    return folder


def check_same(folder: Path, reference: Path) -> None:
    expected, actual = headshare_jax.open_checkpoint(reference), headshare_jax.open_checkpoint(folder)
    for name in parameters.parameter_names(expected.config):
        one, other = assemble(actual, name), assemble(expected, name)
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes(), name


def refused(folder: Path) -> str:
    with pytest.raises(HeadshareError) as caught:
        headshare_jax.open_checkpoint(folder)
    return str(caught.value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shards", [1, 3])
def test_weights_are_those_of_the_safetensors_checkpoint(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    check_same(write_bin(tmp_path / "bin", dtype, shards), saved_hf_model(tmp_path / "hf", dtype=dtype))


def test_files_are_mapped_anew_before_their_pages_fill_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, loads = write_bin(tmp_path / "bin"), []
    load = torch.load

    def counted(*args: Any, **settings: Any) -> Any:
        loads.append(args)
        return load(*args, **settings)

    monkeypatch.setattr(torch, "load", counted)
    headshare_jax.load(folder)
    assert len(loads) == 1
    monkeypatch.setattr("headshare_jax.convert.torch_files._MAPPED_BYTES", 100_000)
    check_same(folder, saved_hf_model(tmp_path / "hf"))
    assert 4 <= len(loads) <= 8


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = write_bin(tmp_path / "bin", shards=2)
    (folder / "pytorch_model.bin.index.json").unlink()
    check_same(folder, saved_hf_model(tmp_path / "hf"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_of_before_pytorch_1_6(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = write_bin(tmp_path / "bin", dtype, _use_new_zipfile_serialization=False)
    check_same(folder, saved_hf_model(tmp_path / "hf", dtype=dtype))


def test_parameters_views_and_transposed_tensors(tmp_path: Path) -> None:
    folder = write_bin(tmp_path / "bin")
    state = torch.load(folder / "pytorch_model.bin")
    for name, value in state.items():
        state[name] = torch.nn.Parameter(
            value.T.contiguous().T if value.ndim == 2 else torch.cat([value, value])[: len(value)]
        )
    torch.save(state, folder / "pytorch_model.bin")
    check_same(folder, saved_hf_model(tmp_path / "hf"))


def test_safetensors_come_first_where_both_are_there(tmp_path: Path) -> None:
    folder = saved_hf_model(tmp_path / "hf")
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    headshare_jax.open_checkpoint(folder)


class Attack:
    """Unpickling this as pickle does makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_never_run(tmp_path: Path, zipped: bool) -> None:
    folder, made = write_bin(tmp_path / "bin"), tmp_path / "made"
    path = folder / "pytorch_model.bin"
    torch.save({"model.norm.weight": Attack(made)}, path, _use_new_zipfile_serialization=zipped)
    message = refused(folder)
    assert not made.exists()
    assert "pickled code" in message
    assert "convert it to safetensors" in message
    torch.load(path, weights_only=False)
    assert made.exists()


def test_a_plain_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    folder, made = write_bin(tmp_path / "bin"), tmp_path / "made"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Attack(made)}))
    assert "pytorch_model.bin" in refused(folder)
    assert not made.exists()


@pytest.mark.parametrize(
    "value", [[torch.ones(3)], torch.ones(3), {"model": {"norm": torch.ones(3)}}, {"step": 3}], ids=str
)
def test_anything_but_a_dictionary_of_tensors_is_refused(tmp_path: Path, value: Any) -> None:
    folder = write_bin(tmp_path / "bin")
    torch.save(value, folder / "pytorch_model.bin")
    assert "does not hold a plain dictionary of tensors" in refused(folder)


@pytest.mark.filterwarnings("ignore:Sparse")
def test_tensors_that_are_no_plain_floats_are_named(tmp_path: Path) -> None:
    folder = write_bin(tmp_path / "bin")
    state = torch.load(folder / "pytorch_model.bin")
    state["model.norm.weight"] = state["model.norm.weight"].double()
    state["lm_head.weight"] = state["lm_head.weight"].to_sparse()
    torch.save(state, folder / "pytorch_model.bin")
    assert "not float32, float16 or bfloat16: model.norm.weight, lm_head.weight" in refused(folder)


@pytest.mark.parametrize("length", [0, 10, 5000, -1])
@pytest.mark.parametrize("zipped", [True, False])
def test_truncated_files_are_refused(tmp_path: Path, length: int, zipped: bool) -> None:
    folder = write_bin(tmp_path / "bin", _use_new_zipfile_serialization=zipped)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:length])
    assert "pytorch_model.bin is" in refused(folder)


def test_without_pytorch_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_bin(tmp_path / "bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "needs PyTorch: pip install 'headshare-jax[torch]'" in refused(folder)
