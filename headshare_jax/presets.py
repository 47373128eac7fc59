"""Shapes of published models, by name, for planning without their weights."""

from typing import Any

from headshare_jax.config import LlamaConfig, RopeScaling

_LLAMA_2: Any = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_ids": (2,)}
_LLAMA_3_1: Any = {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
    "bos_token_id": 128000,
    "eos_token_ids": (128001,),
}
_QWEN: Any = {"rope_theta": 1e6, "bos_token_id": 151643}
_MISTRAL: Any = {
    "family": "mistral",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_ids": (2,),
}

# Vocabulary, width, MLP width, layers, heads, key/value heads, head width.
PRESETS = {
    "llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, **_LLAMA_2),
    "llama-2-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128, **_LLAMA_2),
    "llama-2-70b": LlamaConfig(32000, 8192, 28672, 80, 64, 8, 128, **_LLAMA_2),
    "llama-3.1-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, **_LLAMA_3_1),
    "llama-3.1-70b": LlamaConfig(128256, 8192, 28672, 80, 64, 8, 128, **_LLAMA_3_1),
    "qwen2.5-7b": LlamaConfig(
        *(152064, 3584, 18944, 28, 28, 4, 128),
        **_QWEN,
        family="qwen2",
        attention_bias="qkv",
        max_position_embeddings=131072,
        eos_token_ids=(151643,),
    ),
    "qwen3-8b": LlamaConfig(
        *(151936, 4096, 12288, 36, 32, 8, 128),
        **_QWEN,
        family="qwen3",
        qk_norm=True,
        max_position_embeddings=40960,
        eos_token_ids=(151645,),
    ),
    "mistral-7b-v0.1": LlamaConfig(32000, 4096, 14336, 32, 32, 8, 128, **_MISTRAL, sliding_window=4096),
    "mistral-7b-v0.3": LlamaConfig(32768, 4096, 14336, 32, 32, 8, 128, **_MISTRAL, rope_theta=1e6),
    "phi-3-mini-4k": LlamaConfig(
        *(32064, 3072, 8192, 32, 32, 32, 96),
        family="phi3",
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        sliding_window=2047,
        bos_token_id=1,
        eos_token_ids=(32000,),
        pad_token_id=32000,
    ),
    "seed-oss-36b": LlamaConfig(
        *(155136, 5120, 27648, 64, 80, 8, 128),
        family="seed_oss",
        attention_bias="qkv",
        max_position_embeddings=524288,
        rope_theta=1e7,
        bos_token_id=0,
        eos_token_ids=(2,),
        pad_token_id=1,
    ),
}
