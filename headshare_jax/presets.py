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

# Vocabulary, width, MLP width, layers, heads, key/value heads, head width.
PRESETS = {
    "llama-2-7b": LlamaConfig(32000, 4096, 11008, 32, 32, 32, 128, **_LLAMA_2),
    "llama-2-13b": LlamaConfig(32000, 5120, 13824, 40, 40, 40, 128, **_LLAMA_2),
    "llama-2-70b": LlamaConfig(32000, 8192, 28672, 80, 64, 8, 128, **_LLAMA_2),
    "llama-3.1-8b": LlamaConfig(128256, 4096, 14336, 32, 32, 8, 128, **_LLAMA_3_1),
    "llama-3.1-70b": LlamaConfig(128256, 8192, 28672, 80, 64, 8, 128, **_LLAMA_3_1),
}
