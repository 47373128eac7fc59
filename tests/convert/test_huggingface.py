"""Hugging Face checkpoints: bit-exact round trips, and transformers as the judge of exports."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from support import (
    ALL_VARIANTS,
    hf_logits,
    jax_logits,
    random_tokens,
    saved_hf_model,
    sharing_by_hand,
    tiny_hf_model,
)

import headshare_jax
from headshare_jax import HeadshareError, SharingMap, parameters
from headshare_jax.convert import MAP_FILE, huggingface
from headshare_jax.sharing.source import assemble

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def check_same_tensors(one: Path, other: Path) -> None:
    expected, actual = tensors_of(one), tensors_of(other)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, name
        assert torch.equal(actual[name].view(torch.uint8), value.view(torch.uint8)), name


def loaded_by_transformers(folder: Path, **settings: Any) -> Any:
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    model, info = loaded
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def there_and_back(folder: Path, place: Path) -> Path:
    """Hugging Face -> native -> Hugging Face."""
    headshare_jax.save(headshare_jax.open_checkpoint(folder), place / "native")
    headshare_jax.save(headshare_jax.open_checkpoint(place / "native"), place / "back", to="hf")
    return place / "back"


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_round_trip_through_native_keeps_every_bit(tmp_path: Path, variant: str) -> None:
    folder = saved_hf_model(tmp_path / "hf", **ALL_VARIANTS[variant])
    back = there_and_back(folder, tmp_path)
    check_same_tensors(folder, back)
    tokens = random_tokens((1, 12))
    assert np.array_equal(
        hf_logits(loaded_by_transformers(back), tokens), hf_logits(loaded_by_transformers(folder), tokens)
    )


@pytest.mark.parametrize("variant", ["gqa", "phi3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_keeps_every_type(tmp_path: Path, dtype: torch.dtype, variant: str) -> None:
    folder = saved_hf_model(tmp_path / "hf", dtype=dtype, **ALL_VARIANTS[variant])
    back = there_and_back(folder, tmp_path)
    check_same_tensors(folder, back)
    assert loaded_by_transformers(back, dtype="auto").dtype == dtype


def test_tensors_of_different_types_keep_theirs(tmp_path: Path) -> None:
    model = tiny_hf_model().to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data = parameter.data.float()
    model.save_pretrained(tmp_path / "hf")
    check_same_tensors(tmp_path / "hf", there_and_back(tmp_path / "hf", tmp_path))


def test_a_sharded_source(tmp_path: Path) -> None:
    model = tiny_hf_model()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    check_same_tensors(tmp_path / "one", there_and_back(tmp_path / "many", tmp_path))
    (tmp_path / "many" / "model.safetensors.index.json").unlink()
    headshare_jax.open_checkpoint(tmp_path / "many")


def test_a_sharded_export(tmp_path: Path) -> None:
    folder = saved_hf_model(tmp_path / "hf")
    (tmp_path / "shards").mkdir()
    huggingface.write(headshare_jax.open_checkpoint(folder), tmp_path / "shards", shard_bytes=100_000)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 2
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors_of(folder).values())
    check_same_tensors(folder, tmp_path / "shards")
    loaded_by_transformers(tmp_path / "shards")


def test_an_export_is_readable_by_whoever_may_read_new_files(tmp_path: Path) -> None:
    folder = saved_hf_model(tmp_path / "hf")
    headshare_jax.save(headshare_jax.open_checkpoint(folder), tmp_path / "out", to="hf")
    (tmp_path / "new").write_text("")
    expected = (tmp_path / "new").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {expected}


def test_greedy_text_is_that_of_transformers(tmp_path: Path) -> None:
    folder = saved_hf_model(tmp_path / "hf")
    headshare_jax.save(headshare_jax.load(folder), tmp_path / "out", to="hf")
    exported, prompt = loaded_by_transformers(tmp_path / "out"), random_tokens((1, 7))
    inputs = torch.as_tensor(prompt, dtype=torch.long)
    expected = exported.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        do_sample=False,
        max_new_tokens=20,
        eos_token_id=0,
        pad_token_id=0,
    )[0, 7:].tolist()
    new = headshare_jax.generate(headshare_jax.load(folder), [prompt[0].tolist()], max_new_tokens=20, stop_tokens=[])
    assert new[0] == expected


@pytest.mark.parametrize("tie", ["qkv", "qkvo", "k", "mixed"])
def test_an_expanded_shared_model_computes_the_same(tmp_path: Path, tie: str) -> None:
    dense = headshare_jax.load(saved_hf_model(tmp_path / "hf", attention_bias=True))
    shared = headshare_jax.share(dense, sharing_by_hand(dense, tie, {3: 0, 4: 1, 5: 1}))
    headshare_jax.save(shared, tmp_path / "out", to="hf")
    exported, tokens = loaded_by_transformers(tmp_path / "out"), random_tokens((2, 40))
    expected = jax_logits(shared, tokens)
    assert np.abs(hf_logits(exported, tokens) - expected).max() < 1e-5 * np.abs(expected).max()
    unshared = headshare_jax.unshare(shared)
    reread = headshare_jax.open_checkpoint(tmp_path / "out")
    for name in parameters.parameter_names(dense.config):
        assert np.array_equal(assemble(reread, name), assemble(unshared, name)), name
    sharing = SharingMap.from_json((tmp_path / "out" / MAP_FILE).read_text())
    assert sharing == shared.sharing
    again = headshare_jax.share(headshare_jax.load(tmp_path / "out"), sharing)
    for name in parameters.parameter_names(dense.config):
        assert np.array_equal(getattr(again, name)[...], getattr(shared, name)[...]), name


def test_a_dense_export_has_no_map(tmp_path: Path) -> None:
    headshare_jax.save(headshare_jax.open_checkpoint(saved_hf_model(tmp_path / "hf")), tmp_path / "out", to="hf")
    assert not (tmp_path / "out" / MAP_FILE).exists()


def test_loading_in_another_type_rounds_as_torch_does(tmp_path: Path) -> None:
    folder = saved_hf_model(tmp_path / "hf")
    headshare_jax.save(headshare_jax.load(folder, dtype="bfloat16"), tmp_path / "out", to="hf")
    tiny_hf_model().to(torch.bfloat16).save_pretrained(tmp_path / "expected")
    check_same_tensors(tmp_path / "expected", tmp_path / "out")


def test_unknown_types_and_formats_are_refused(tmp_path: Path) -> None:
    folder = saved_hf_model(tmp_path / "hf")
    with pytest.raises(HeadshareError, match="'float8' is not one of float32, bfloat16, float16"):
        headshare_jax.load(folder, dtype="float8")
    with pytest.raises(HeadshareError, match="'onnx' is not one of native, hf"):
        headshare_jax.save(headshare_jax.open_checkpoint(folder), tmp_path / "out", to="onnx")
