"""Baichuan: fused projections and normalised heads, against transformers' LLaMA with the same weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from support import hf_logits, jax_logits, random_tokens, tiny_hf_model

import headshare_jax
from headshare_jax import HeadshareError, parameters
from headshare_jax.sharing.source import assemble

BAICHUAN_1, BAICHUAN_2 = "BaiChuanForCausalLM", "BaichuanForCausalLM"


def write_baichuan(folder: Path, model: Any, architecture: str = BAICHUAN_2, drop: tuple[str, ...] = ()) -> Path:
    """A LLaMA's weights as a Baichuan checkpoint: q, k and v of a layer in one tensor."""
    state = dict(model.state_dict())
    for layer in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{layer}.self_attn."
        parts = [state.pop(f"{prefix}{projection}_proj.weight") for projection in "qkv"]
        state[f"{prefix}W_pack.weight"] = torch.cat(parts)
    taken = [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "max_position_embeddings",
        "rms_norm_eps",
        "bos_token_id",
        "eos_token_id",
        "tie_word_embeddings",
    ]
    fields = {name: getattr(model.config, name) for name in taken if name not in drop}
    fields |= {"architectures": [architecture], "model_type": "baichuan", "auto_map": {"AutoConfig": "c.C"}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    return folder


@pytest.fixture
def model() -> Any:
    """Its head's rows are far from unit length."""
    model = tiny_hf_model(num_key_value_heads=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(torch.linspace(0.5, 20, 160)[:, None])
    return model


def normalized(model: Any) -> Any:
    with torch.no_grad():
        model.lm_head.weight.copy_(torch.nn.functional.normalize(model.lm_head.weight))
    return model


def check_logits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


def test_baichuan_2_is_a_llama_with_a_normalised_head(tmp_path: Path, model: Any) -> None:
    folder, tokens = write_baichuan(tmp_path / "baichuan", model), random_tokens((2, 40))
    source = headshare_jax.open_checkpoint(folder)
    assert np.array_equal(source.read("head_vd"), model.lm_head.weight.detach().numpy())
    expected = hf_logits(normalized(model), tokens)
    check_logits(jax_logits(headshare_jax.load(source), tokens), expected)


def test_baichuan_2_keeps_its_head_in_native_and_exports_it_normalised(tmp_path: Path, model: Any) -> None:
    folder, tokens = write_baichuan(tmp_path / "baichuan", model), random_tokens((2, 40))
    source = headshare_jax.open_checkpoint(folder)
    headshare_jax.save(source, tmp_path / "native")
    native = headshare_jax.open_checkpoint(tmp_path / "native")
    assert native.config == source.config
    for name in parameters.parameter_names(source.config):
        assert assemble(native, name).tobytes() == assemble(source, name).tobytes(), name
    headshare_jax.save(native, tmp_path / "hf", to="hf")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    exported, info = loaded
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    check_logits(hf_logits(exported.eval(), tokens), hf_logits(normalized(model), tokens))


def test_single_heads_of_the_fused_tensor(tmp_path: Path, model: Any) -> None:
    source = headshare_jax.open_checkpoint(write_baichuan(tmp_path / "baichuan", model))
    for projection, name in (("q", "q_pool_pdh"), ("k", "k_pool_pdh"), ("v", "v_pool_pdh")):
        weight = model.get_submodule(f"model.layers.1.self_attn.{projection}_proj").weight.detach().numpy()
        heads_ndh = weight.reshape(4, -1, weight.shape[1]).swapaxes(1, 2)
        assert np.array_equal(source.read(name, 1), heads_ndh)
        assert np.array_equal(source.read(name, 1, [0, 3]), heads_ndh[[0, 3]])


def test_baichuan_1_has_a_plain_head(tmp_path: Path, model: Any) -> None:
    folder, tokens = write_baichuan(tmp_path / "baichuan", model, BAICHUAN_1), random_tokens((2, 40))
    check_logits(jax_logits(headshare_jax.load(folder), tokens), hf_logits(model, tokens))


@pytest.mark.parametrize("architecture", [BAICHUAN_1, BAICHUAN_2])
def test_models_with_alibi_positions_are_refused(tmp_path: Path, model: Any, architecture: str) -> None:
    folder = write_baichuan(tmp_path / "baichuan", model, architecture, drop=("max_position_embeddings",))
    with pytest.raises(HeadshareError, match="has no max_position_embeddings, so it is a 13B with ALiBi positions"):
        headshare_jax.open_checkpoint(folder)


def test_unequal_parts_of_the_fused_tensor_are_refused(tmp_path: Path) -> None:
    folder = write_baichuan(tmp_path / "baichuan", tiny_hf_model(num_key_value_heads=2))
    with pytest.raises(HeadshareError, match=r"W_pack\.weight has shape \[128, 64\] instead of \[192, 64\]"):
        headshare_jax.open_checkpoint(folder)
