"""Configurations: the same as transformers', both ways; what cannot be computed is refused by name."""

import contextlib
import json
import logging
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support import VARIANTS, hf_config

from headshare_jax import HeadshareError, LlamaConfig, RopeScaling

HF = hf_config().to_dict()
BAICHUAN = {name: value for name, value in HF.items() if name not in ("num_key_value_heads", "head_dim")}
BAICHUAN |= {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan", "z_loss_weight": 0}
LLAMA3: dict[str, Any] = VARIANTS["llama3"]["rope_parameters"]


def old_spelling(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields as transformers 4 wrote them."""
    fields = dict(fields)
    rope = dict(fields.pop("rope_parameters"))
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {"type" if kind != "llama3" else "rope_type": kind, **rope}
    return fields | {"rope_theta": theta, "rope_scaling": scaling}


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("spelling", [dict, old_spelling])
def test_round_trip_through_transformers(overrides: dict[str, Any], spelling: Any) -> None:
    original = hf_config(**overrides, architectures=["LlamaForCausalLM"])
    config = LlamaConfig.from_hf(spelling(original.to_dict()))
    written = transformers.LlamaConfig(**config.to_hf()).to_dict()
    assert written == original.to_dict()
    assert LlamaConfig.from_hf(written) == config
    assert LlamaConfig.from_hf(config.to_hf()) == config
    assert LlamaConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_fields_mean_what_transformers_means_by_them() -> None:
    config = LlamaConfig.from_hf(hf_config(**VARIANTS["llama3"]).to_dict())
    assert config == LlamaConfig(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32),
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    assert (config.heads_per_unit, config.num_units) == (2, 6)


def test_absent_fields_have_transformers_defaults() -> None:
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    fields = {name: HF[name] for name in needed}
    config = LlamaConfig.from_hf(fields | {"model_type": "llama"})
    theirs = transformers.LlamaConfig(**fields).to_dict()
    assert config == LlamaConfig.from_hf(theirs | {"bos_token_id": None, "eos_token_id": None})


def test_the_old_spelling_wins_as_in_transformers() -> None:
    both = {
        "rope_theta": 2e4,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_theta": 3e4},
    }
    config = LlamaConfig.from_hf(HF | both)
    theirs = hf_config(**both).to_dict()
    assert (config.rope_theta, config.rope_scaling) == (2e4, RopeScaling("linear", 2.0))
    assert LlamaConfig.from_hf(theirs) == config


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"rope_type": "ntk", "factor": 2.0}}, "rope_scaling.*ntk"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "short_factor in rope_parameters"),
    ({"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0, 3.0]}}, "8 values"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": "32"}}, "beta_fast"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"sliding_window": 128}, "sliding_window"),
    ({"hidden_act": "mish"}, "hidden_act.*mish"),
    ({"hidden_act": 3}, "hidden_act"),
    ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
    ({"architectures": [], "model_type": "gemma"}, "gemma"),
    ({"architectures": ["MistralForCausalLM"], "attention_bias": True}, "attention_bias.*mistral"),
    (
        {"architectures": ["SeedOssForCausalLM"], "attention_bias": False, "attention_out_bias": True},
        "a bias of o alone",
    ),
    ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["chunked_attention"]}, "layer_types"),
    ({"architectures": 7}, "architectures"),
    ({"num_key_value_heads": 3}, "num_kv_heads"),
    ({"num_attention_heads": 0}, "num_heads"),
    ({"num_hidden_layers": 0}, "num_layers"),
    ({"vocab_size": -1}, "vocab_size"),
    ({"head_dim": 15}, "head_dim"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": 64.0}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"intermediate_size": None}, "intermediate_size"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"rope_parameters": {"rope_theta": -1e4}}, "rope_theta"),
    ({"rope_parameters": None, "rope_theta": 10**400}, "rope_theta"),
    ({"attention_bias": "yes"}, "attention_bias"),
    ({"eos_token_id": "2"}, "eos_token_id"),
    ({"eos_token_id": [2, "3"]}, "eos_token_id"),
    ({"bos_token_id": 1.5}, "bos_token_id"),
    ({"rope_scaling": "linear"}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32}}, "original_max_pos"),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor"),
    ({"rope_parameters": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor"),
    ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": "32"}}, "original_max_position_embeddings"),
]


@pytest.mark.parametrize(("overrides", "named"), REFUSED)
def test_what_cannot_be_computed_is_refused_by_name(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(HeadshareError, match=named):
        LlamaConfig.from_hf(HF | overrides)


def test_another_architecture_is_named_whatever_its_fields() -> None:
    with pytest.raises(HeadshareError, match="GPT2LMHeadModel"):
        LlamaConfig.from_hf({"architectures": ["GPT2LMHeadModel"], "n_embd": 768, "attn_pdrop": 0.1})


@pytest.mark.parametrize(
    "name", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
)
def test_a_missing_field_is_named(name: str) -> None:
    with pytest.raises(HeadshareError, match=name):
        LlamaConfig.from_hf({key: value for key, value in HF.items() if key != name})


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([0, 1, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(name=st.sampled_from(sorted(HF)), value=JSON_VALUES)
def test_nonsense_in_any_field_is_accepted_or_refused_but_never_crashes(name: str, value: Any) -> None:
    with contextlib.suppress(HeadshareError):
        LlamaConfig.from_hf(HF | {name: value})


@given(name=st.sampled_from([*LLAMA3, "type", "partial_rotary_factor"]), value=JSON_VALUES)
def test_nonsense_in_rotary_settings_is_accepted_or_refused_but_never_crashes(name: str, value: Any) -> None:
    with contextlib.suppress(HeadshareError):
        LlamaConfig.from_hf(HF | {"rope_parameters": LLAMA3 | {name: value}})


STORED = LlamaConfig.from_hf(HF | {"rope_parameters": LLAMA3}).to_json()


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"surprise": 1}, "surprise"),
        ({"num_heads": 4.0}, "num_heads"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_ids": "ab"}, "eos_token_ids"),
        ({"eos_token_ids": 5}, "not usable"),
        ({"rope_scaling": {"kind": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"kind": "ntk", "factor": 2.0}}, "ntk"),
        ({"family": "gemma"}, "gemma"),
        ({"family": "qwen2"}, "attention_bias"),
        ({"partial_rotary_factor": 0.1}, "turns"),
        ({"rope_scaling": {"kind": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": {"kind": "linear", "factor": float("inf")}}, "factor"),
        ({"rope_scaling": [1]}, "not usable"),
        ({"normalize_head": True, "tie_word_embeddings": True}, "normalize_head"),
    ],
)
def test_a_stored_configuration_is_not_trusted(overrides: dict[str, Any], named: str) -> None:
    with pytest.raises(HeadshareError, match=named):
        LlamaConfig.from_json(STORED | overrides)


def test_unknown_fields_are_warned_about_if_they_hold_anything(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        LlamaConfig.from_hf(HF | {"router_layers": 3, "unused_switch": False, "use_cache": True})
    assert "router_layers" in caplog.text
    assert "unused_switch" not in caplog.text
    assert "use_cache" not in caplog.text


def test_a_known_configuration_warns_about_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        LlamaConfig.from_hf(hf_config(**VARIANTS["llama3"]).to_diff_dict())
    assert caplog.text == ""


def test_baichuan2_normalises_its_head() -> None:
    config = LlamaConfig.from_hf(BAICHUAN)
    assert config.normalize_head
    assert config.num_kv_heads == config.num_heads


def test_baichuan_13b_is_refused() -> None:
    without = {name: value for name, value in BAICHUAN.items() if name != "max_position_embeddings"}
    with pytest.raises(HeadshareError, match=r"max_position_embeddings.*ALiBi"):
        LlamaConfig.from_hf(without)
