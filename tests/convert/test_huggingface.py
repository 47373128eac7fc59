"""Hugging Face checkpoints: bit-exact round trips, transformers as the judge of exports, and strict reading."""

import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from fuzzing import damaged, open_or_refuse
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import (
    VARIANTS,
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


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_through_native_keeps_every_bit(tmp_path: Path, variant: str) -> None:
    folder = saved_hf_model(tmp_path / "hf", **VARIANTS[variant])
    back = there_and_back(folder, tmp_path)
    check_same_tensors(folder, back)
    tokens = random_tokens((1, 12))
    assert np.array_equal(
        hf_logits(loaded_by_transformers(back), tokens), hf_logits(loaded_by_transformers(folder), tokens)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_keeps_every_type(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = saved_hf_model(tmp_path / "hf", dtype=dtype)
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


# Reading what is not as it should be.


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


@pytest.mark.parametrize("name", ["MistralForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM"])
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


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_configuration_never_gives_another_error(
    tmp_path_factory: pytest.TempPathFactory, pristine: Path, data: st.DataObject
) -> None:
    content = (pristine / "config.json").read_bytes()
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "model.safetensors").symlink_to(pristine / "model.safetensors")
    (folder / "config.json").write_bytes(damaged(content, data))
    open_or_refuse(folder)


@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_safetensors_header_never_gives_another_error(
    tmp_path_factory: pytest.TempPathFactory, pristine: Path, data: st.DataObject
) -> None:
    content = (pristine / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").symlink_to(pristine / "config.json")
    (folder / "model.safetensors").write_bytes(damaged(content[:header], data) + content[header:])
    open_or_refuse(folder)


# The hub.


def test_a_hub_id_without_a_network_is_refused_in_one_sentence() -> None:
    with pytest.raises(HeadshareError) as caught:
        headshare_jax.open_checkpoint("nobody/no-such-model")
    message = str(caught.value)
    assert message.startswith(
        "nobody/no-such-model is not a local path, and fetching it from the Hugging Face hub failed"
    )
    assert "check the name and the network, or give a local folder" in message
    assert "\n" not in message


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_id_is_fetched_once_and_only_what_is_needed(
    tmp_path: Path, pristine: Path, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    asked: list[list[str]] = []

    def snapshot_download(hub_id: str, *, allow_patterns: list[str]) -> str:
        assert hub_id == "somebody/tiny"
        asked.append(allow_patterns)
        held = ["config.json", weights, "onnx/model.onnx"]
        for name in (name for name in held if any(fnmatch(name, pattern) for pattern in allow_patterns)):
            if name == "pytorch_model.bin":
                torch.save(load_file(pristine / "model.safetensors"), tmp_path / name)
            else:
                shutil.copyfile(pristine / name, tmp_path / name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    expected = headshare_jax.open_checkpoint(pristine)
    source = headshare_jax.open_checkpoint("somebody/tiny")
    assert np.array_equal(source.read("gate_ldf", 1), expected.read("gate_ldf", 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["config.json", weights])
    assert len(asked) == (1 if weights == "model.safetensors" else 2)


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), ValueError("Repo id must be\nshort"), Exception()]
)
def test_whatever_the_hub_raises_is_one_sentence(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(*args: Any, **settings: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(HeadshareError) as caught:
        headshare_jax.open_checkpoint("somebody/tiny")
    assert "\n" not in str(caught.value)
    assert str(caught.value).split("failed: ")[1]
