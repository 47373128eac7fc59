"""Hugging Face checkpoints that are not as they should be: each is refused in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import (
    saved_hf_model,
)

import headshare_jax
from headshare_jax import HeadshareError


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_hf_model(tmp_path_factory.mktemp("pristine"))


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint to damage."""
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def refused(folder: Path) -> str:
    with pytest.raises(HeadshareError) as caught:
        headshare_jax.open_checkpoint(folder)
    return str(caught.value)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def configure(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_all_problems_are_told_at_once(folder: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_norm.weight"] = torch.ones(16)
        tensors["model.embed_tokens.weight"] = torch.ones(160, 63)
        tensors["lm_head.weight"] = torch.ones(160, 64, dtype=torch.int32)
        save_file(
            {"model.layers.0.input_layernorm.weight": torch.ones(64)}, folder / "model-00001-of-00002.safetensors"
        )

    rewrite(folder, damage)
    (folder / "model.safetensors").rename(folder / "model-00002-of-00002.safetensors")
    message = refused(folder)
    for problem in (
        "missing: model.layers.1.mlp.up_proj.weight, model.norm.weight;",
        "unexpected: model.layers.0.self_attn.q_norm.weight;",
        "model.embed_tokens.weight has shape [160, 63] instead of [160, 64]",
        "not float32, float16 or bfloat16: lm_head.weight",
        "model.layers.0.input_layernorm.weight stands in both model-00001-of-00002.safetensors and model-00002-of",
    ):
        assert problem in message
    assert "\n" not in message


def test_a_tensor_twice_in_one_header_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    norm = json.loads(data[8 : 8 + size])["model.norm.weight"]
    header = data[8 : 8 + size].rstrip()[:-1] + f', "model.norm.weight": {json.dumps(norm)}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])
    assert "model.norm.weight stands more than once in model.safetensors" in refused(folder)


def test_every_missing_tensor_is_named(folder: Path) -> None:
    lost: list[str] = []
    rewrite(
        folder,
        lambda tensors: lost.extend(
            name for name in list(tensors) if "layers" in name and tensors.pop(name) is not None
        ),
    )
    message = refused(folder)
    assert len(lost) == 27
    assert all(name in message for name in lost)


def test_harmless_extras_are_allowed(folder: Path) -> None:
    extra = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({extra: torch.ones(8)}))
    headshare_jax.open_checkpoint(folder)


def test_a_stored_head_beside_tied_embeddings(folder: Path) -> None:
    configure(folder, tie_word_embeddings=True)
    assert "lm_head.weight differs from model.embed_tokens.weight although tie_word_embeddings is true" in refused(
        folder
    )
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    headshare_jax.open_checkpoint(folder)


def test_the_head_of_another_format_is_unexpected(folder: Path) -> None:
    rewrite(folder, lambda tensors: tensors.update({"output.weight": torch.ones(160, 64)}))
    assert "unexpected: output.weight" in refused(folder)


@pytest.mark.parametrize("length", [0, 7, 100, 5000, -1])
def test_truncated_weights_are_refused(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert "model.safetensors is truncated, corrupt or no safetensors file" in refused(folder)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_cannot_name_files_elsewhere(folder: Path, name: str) -> None:
    (folder / "model.safetensors").rename(folder.parent / "elsewhere.safetensors")
    index = {"weight_map": {"model.norm.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"names files outside its folder: {name}" in refused(folder)


def test_missing_shards_are_named(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks shards that its index names: model-00002-of-00002.safetensors; fetch them" in refused(folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 3}, {"a": None}])
def test_an_unusable_index_is_refused(folder: Path, weight_map: Any) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "has no usable weight_map" in refused(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", "null", "\x00", "[" * 100_000, '{"hidden_size": ' * 50_000, "\ud83d", "9" * 5000]
)
def test_unreadable_configurations_are_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("utf-16" if "\ud83d" in text else "utf-8", "surrogatepass"))
    assert "config.json" in refused(folder)


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": float("nan")},
        {"hidden_size": "64"},
        {"hidden_size": 2**70},
        {"vocab_size": -1},
        {"num_hidden_layers": 10**12},
        {"num_attention_heads": 0},
        {"num_attention_heads": 2**62, "head_dim": 2**62},
        {"rms_norm_eps": float("inf")},
        {"rope_parameters": 3},
        {"rope_parameters": {"rope_type": ["linear"]}},
        {"architectures": 3},
        {"architectures": [["LlamaForCausalLM"]]},
        {"eos_token_id": {"a": 1}},
        {"tie_word_embeddings": "yes"},
        {"hidden_act": None, "mlp_bias": 1},
    ],
    ids=str,
)
def test_impossible_configurations_are_refused(folder: Path, fields: dict[str, Any]) -> None:
    configure(folder, **fields)
    assert refused(folder)


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_other_architectures_are_refused_by_name(folder: Path, name: str) -> None:
    configure(folder, architectures=[name])
    assert f"({name}) is not supported" in refused(folder)


def test_folders_without_a_checkpoint_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "empty holds no checkpoint: no headshare.json (native), no config.json" in refused(tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    assert "has a config.json but no weights" in refused(folder)
    assert "config.json" in refused(folder / "config.json")


def test_a_lone_gguf_file_in_a_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "model.gguf is truncated, corrupt or no GGUF file" in refused(tmp_path)
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    assert "and more than one .gguf file" in refused(tmp_path)


@pytest.mark.parametrize("name", ["", "  ", "no/such/folder", "/no/such", "x" * 5000, "a\0b", "..", "nothing"])
def test_names_of_nothing_are_refused(name: str) -> None:
    with pytest.raises(HeadshareError, match=r"is empty|does not exist|holds no checkpoint"):
        headshare_jax.open_checkpoint(name)
