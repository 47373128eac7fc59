"""What each family of models computes beyond Llama, and what Hugging Face and llama.cpp call it: a row for each.

How its tensors are named is in `convert/keys.py`; how `config.json` spells its settings, in `hf_config.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
      architecture: its class in transformers.
      gguf: llama.cpp's name of it.
      always: fields of `LlamaConfig` that are the same in all its models, where they are not the defaults.
      may: fields of `LlamaConfig` that its models may set.
      windows: how `config.json` tells which layers have the sliding window: `all` that have one, or those that
        `layer_types` lists, once `use_sliding_window` is true.
      absent: what fields of `config.json` are where they are absent, unless it is Llama's default.
      out_bias: whether `config.json` says by a field of its own, `attention_out_bias`, whether o has a bias.
      dropouts: fields of `config.json` with its dropouts, which are for training alone: not read, and written as 0.
    """

    architecture: str
    gguf: str
    always: Mapping[str, Any] = field(default_factory=dict)
    may: tuple[str, ...] = ()
    windows: Literal["all", "listed"] = "all"
    absent: Mapping[str, Any] = field(default_factory=dict)
    out_bias: bool = False
    dropouts: tuple[str, ...] = ()


_WINDOWS = ("sliding_window", "full_attention_layers")

# By Hugging Face's `model_type`.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM", "llama", may=("attention_bias", "mlp_bias", "normalize_head")),
    "mistral": Family(
        "MistralForCausalLM",
        "llama",
        may=("sliding_window",),
        absent={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        "qwen2",
        always={"attention_bias": "qkv"},
        may=_WINDOWS,
        windows="listed",
        absent={"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        "qwen3",
        always={"qk_norm": True},
        may=("attention_bias", *_WINDOWS),
        windows="listed",
        absent={
            "head_dim": 128,
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
        },
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        "phi3",
        may=("partial_rotary_factor", "sliding_window"),
        absent={"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        "smollm3",
        may=("attention_bias", "mlp_bias", "nope_layers", *_WINDOWS),
        windows="listed",
        absent={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
        },
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        "seed_oss",
        may=("attention_bias", "mlp_bias"),
        absent={
            "head_dim": 128,
            "num_key_value_heads": 8,
            "max_position_embeddings": 524288,
            "attention_bias": True,
        },
        out_bias=True,
        dropouts=("attention_dropout", "residual_dropout"),
    ),
}


@dataclass(frozen=True)
class Spelling:
    """A class of models that are Llamas by another name.

    Attributes:
      always: fields of `LlamaConfig` that are the same in all its models.
      renamed: fields of its `config.json`, by their names there, with their usual names.
    """

    always: Mapping[str, Any] = field(default_factory=dict)
    renamed: Mapping[str, str] = field(default_factory=dict)


# By the class's name.
SPELLINGS: Mapping[str, Spelling] = {
    "BaichuanForCausalLM": Spelling(always={"normalize_head": True}),
    "BaiChuanForCausalLM": Spelling(),
    "InternLM2ForCausalLM": Spelling(renamed={"bias": "attention_bias"}),
}
