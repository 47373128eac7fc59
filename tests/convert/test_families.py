"""Families of models: what is particular to reading and writing each of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import (
    ALL_VARIANTS,
    FAMILY_VARIANTS,
    hf_config,
    hf_logits,
    jax_logits,
    random_tokens,
    saved_hf_model,
    tiny_hf_model,
)

import headshare_jax
from headshare_jax import HeadshareError, LlamaConfig
from headshare_jax.families import FAMILIES

INTERNLM2_NAMES = {
    "model.embed_tokens": "model.tok_embeddings",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "lm_head": "output",
}


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def write_internlm2(folder: Path, model: Any) -> Path:
    """A Llama's weights as an InternLM2: queries, keys and values of a layer in one tensor, by key/value heads."""
    state, config = dict(model.state_dict()), model.config
    for layer in range(config.num_hidden_layers):
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            parts = [state.pop(f"model.layers.{layer}.self_attn.{p}_proj.{kind}") for p in "qkv"]
            pieces = [part.unflatten(0, (config.num_key_value_heads, -1)) for part in parts]
            state[f"model.layers.{layer}.attention.wqkv.{kind}"] = torch.cat(pieces, dim=1).flatten(0, 1)
    for ours, theirs in INTERNLM2_NAMES.items():
        state = {name.replace(ours, theirs): value for name, value in state.items()}
    fields = model.config.to_dict() | {"architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2"}
    fields |= {"bias": fields.pop("attention_bias"), "attn_implementation": "eager"}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("bias", [False, True])
def test_internlm2_is_a_llama(tmp_path: Path, bias: bool) -> None:
    model, tokens = tiny_hf_model(attention_bias=bias), random_tokens((2, 40))
    source = headshare_jax.open_checkpoint(write_internlm2(tmp_path / "internlm2", model))
    assert error(jax_logits(headshare_jax.load(source), tokens), hf_logits(model, tokens)) < 2e-5
    for p in "qkv":
        weight = model.get_submodule(f"model.layers.1.self_attn.{p}_proj").weight.detach().numpy()
        heads_ndh = weight.reshape(-1, 16, weight.shape[1]).swapaxes(1, 2)
        last = len(heads_ndh) - 1
        assert np.array_equal(source.read(f"{p}_pool_pdh", 1, [0, last]), heads_ndh[[0, last]])
    headshare_jax.save(source, tmp_path / "hf", to="hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == model.state_dict().keys()
    assert all(torch.equal(value, exported[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("variant", FAMILY_VARIANTS)
def test_an_export_is_of_its_familys_class(tmp_path: Path, variant: str) -> None:
    source = headshare_jax.open_checkpoint(saved_hf_model(tmp_path / "hf", **FAMILY_VARIANTS[variant]))
    headshare_jax.save(source, tmp_path / "out", to="hf")
    configs = [transformers.AutoConfig.from_pretrained(tmp_path / name) for name in ("hf", "out")]
    family = FAMILY_VARIANTS[variant].get("model_type", "llama")
    assert configs[1].architectures == configs[0].architectures == [FAMILIES[family].architecture]
    assert headshare_jax.open_checkpoint(tmp_path / "out").config == source.config


def multimodal(text: str) -> Any:
    """A random LLaVA of transformers' with a text model of a variant."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=hf_config(**ALL_VARIANTS[text]), tie_word_embeddings=text.endswith("tied")
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.mark.parametrize("later_names", [False, True])
@pytest.mark.parametrize("text", ["gqa", "mistral", "qwen2, tied"])
def test_the_text_model_inside_a_multimodal_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, later_names: bool
) -> None:
    model, tokens = multimodal(text), random_tokens((2, 40))
    model.save_pretrained(tmp_path / "llava")
    path = tmp_path / "llava" / "model.safetensors"
    if later_names:
        names = {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head."}
        tensors = load_file(path)
        for old, new in names.items():
            tensors = {name.replace(old, new): value for name, value in tensors.items()}
        save_file(tensors, path)
    source = headshare_jax.open_checkpoint(tmp_path / "llava")
    assert "Of the multimodal model" in caplog.text
    expected = hf_logits(model, tokens)
    assert error(jax_logits(headshare_jax.load(source), tokens), expected) < 2e-5
    headshare_jax.save(source, tmp_path / "out", to="hf")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert type(exported).__name__ == FAMILIES[source.config.family].architecture
    assert error(hf_logits(exported, tokens), expected) < 2e-5


def test_sizes_that_a_multimodal_model_leaves_out_are_those_of_transformers() -> None:
    # LLaVA-1.5's, whose text model is Vicuna.
    text = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "vocab_size": 32064}
    config = LlamaConfig.from_hf({"architectures": ["LlavaForConditionalGeneration"], "text_config": text})
    sizes = (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers, config.num_kv_heads)
    assert sizes == (32064, 4096, 11008, 32, 32)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Mixtral": ({"num_local_experts": 8}, r"\(num_local_experts asks for a mixture of experts\)"),
    "DeepseekV3": ({"kv_lora_rank": 512}, r"\(kv_lora_rank asks for latent attention \(MLA\)\)"),
    "Gemma": ({"model_type": "gemma"}, "Gemma's norms and scaled embeddings"),
    "Gemma2": (
        {"model_type": "gemma2", "final_logit_softcapping": 30.0},
        "Gemma's .*, final_logit_softcapping asks for",
    ),
    "Qwen2VL": ({"vision_config": {"depth": 2}}, r"\(vision_config asks for images beside text\)"),
    "Olmo2": ({}, r"\(Olmo2ForCausalLM\) is not supported; "),
    "Llama4": (
        {"text_config": {"model_type": "llama4_text", "num_experts": 16}},
        r"a mixture of experts, the text model inside is of model_type 'llama4_text'\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named_with_what_is(name: str) -> None:
    fields, message = REFUSED[name]
    with pytest.raises(HeadshareError, match=message) as caught:
        LlamaConfig.from_hf({"architectures": [f"{name}ForCausalLM"], **fields})
    assert f"({name}ForCausalLM) is not supported" in str(caught.value)
    assert all(family.architecture in str(caught.value) for family in FAMILIES.values())


@pytest.mark.parametrize("form", ["hf", "hf-compact"])
@pytest.mark.parametrize("stops", [[151645, 151643], 7, [], None])
def test_texts_end_at_the_tokens_of_the_generation_config(tmp_path: Path, form: str, stops: Any) -> None:
    source = headshare_jax.open_checkpoint(saved_hf_model(tmp_path / "hf", **FAMILY_VARIANTS["qwen2"]))
    headshare_jax.save(source, tmp_path / "model", to=form)
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps({"bos_token_id": 151643, "eos_token_id": stops, "temperature": 0.7}))
    expected = (2,) if stops is None else (7,) if stops == 7 else tuple(stops)
    for place, to in (("native", "native"), ("again", form)):
        headshare_jax.save(headshare_jax.open_checkpoint(tmp_path / "model"), tmp_path / place, to=to)
        assert headshare_jax.open_checkpoint(tmp_path / place).config.eos_token_ids == expected
    if stops:
        generation = transformers.GenerationConfig.from_pretrained(tmp_path / "again")
        assert generation.eos_token_id == stops


@pytest.mark.parametrize("text", ['{"eos_token_id": "</s>"}', '{"eos_token_id": [1, true]}', "{", "[]"])
def test_an_unusable_generation_config_is_refused(tmp_path: Path, text: str) -> None:
    folder = saved_hf_model(tmp_path / "hf")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(HeadshareError, match=r"generation_config\.json"):
        headshare_jax.open_checkpoint(folder)
