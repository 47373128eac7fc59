"""Shapes of published models, by name, for planning without their weights."""

from headshare_jax.config import LlamaConfig, RopeScaling


def _llama_2(layers: int, width: int, mlp: int, heads: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=width // heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def _llama_3_1(layers: int, width: int, mlp: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=128256,
        hidden_size=width,
        intermediate_size=mlp,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        head_dim=width // heads,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192),
        bos_token_id=128000,
        eos_token_ids=(128001,),
    )


PRESETS = {
    "llama-2-7b": _llama_2(32, 4096, 11008, 32, 32),
    "llama-2-13b": _llama_2(40, 5120, 13824, 40, 40),
    "llama-2-70b": _llama_2(80, 8192, 28672, 64, 8),
    "llama-3.1-8b": _llama_3_1(32, 4096, 14336, 32),
    "llama-3.1-70b": _llama_3_1(80, 8192, 28672, 64),
}
