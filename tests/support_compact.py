"""Small models that share heads, as compact checkpoints and in PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import transformers
from support import FAMILY_VARIANTS, sharing_by_hand, slim_sharing, tiny_model

import headshare_jax
from headshare_jax import Llama, SharingMap, parameters
from headshare_jax.sharing.source import assemble
from headshare_jax.sharing.tie import DROPPED
from headshare_jax.sharing.widths import Widths

# In a model of three layers with two units: two receivers of one donor, and one of another.
PAIRS = {2: 1, 5: 1, 4: 0}
LONG_ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = LONG_ROPE | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
SHARED: dict[str, tuple[str, dict[str, Any]]] = {
    "qkv": ("qkv", {}),
    "qkv with biases": ("qkv", {"attention_bias": True}),
    "kv": ("kv", {}),
    "qkvo with biases": ("qkvo", {"attention_bias": True, "mlp_bias": True}),
    "q with wide heads": ("q", {"head_dim": 32}),
    "o with tied embeddings": ("o", {"tie_word_embeddings": True}),
    "mha": ("qkv", {"num_attention_heads": 2}),
    "mixed with biases": ("mixed", {"attention_bias": True}),
    "mixed mha": ("mixed", {"num_attention_heads": 2}),
    "linear": ("qkv", {"rope_parameters": LONG_ROPE | {"rope_type": "linear"}}),
    "dynamic": ("qkv", {"rope_parameters": LONG_ROPE | {"rope_type": "dynamic"}}),
    "llama3": ("qkv", {"rope_parameters": LLAMA3 | {"rope_type": "llama3"}}),
    **{name: ("qkv", overrides) for name, overrides in FAMILY_VARIANTS.items()},
    "qwen2 + mixed": ("mixed", FAMILY_VARIANTS["qwen2"]),
    "qwen3 + qkvo": ("qkvo", FAMILY_VARIANTS["qwen3, biases"]),
    "phi3 + mixed": ("mixed", FAMILY_VARIANTS["phi3"]),
    "phi3 + k": ("k", FAMILY_VARIANTS["phi3, longrope"]),
    "phi3, o alone": ("o", FAMILY_VARIANTS["phi3"]),
    "smollm3 + mixed": ("mixed", FAMILY_VARIANTS["smollm3, biases"]),
    "biases + slim": ("slim", {"attention_bias": True, "mlp_bias": True}),
    "qwen3 + narrow": ("narrow", FAMILY_VARIANTS["qwen3, biases"]),
    "phi3, partial rotary + narrow": ("narrow", FAMILY_VARIANTS["phi3, partial rotary"]),
    "narrow with biases": ("narrow", {"attention_bias": True}),
    "narrow qwen2, windows": ("narrow", FAMILY_VARIANTS["qwen2, windows"]),
    "narrow smollm3": ("narrow", FAMILY_VARIANTS["smollm3, biases"]),
}
COMBINED = ["qkv with biases", "qkvo with biases", "kv", "mixed with biases", *(name for name in SHARED if "+" in name)]


def shared_model(tie: str = "qkv", **overrides: Any) -> Llama:
    """A model of three layers; the ties `slim` and `narrow` also drop units, and make others slim."""
    model = tiny_model(**overrides)
    if tie in ("slim", "narrow"):
        return headshare_jax.share(model, slim_sharing(model) if tie == "slim" else narrow_sharing(model))
    return headshare_jax.share(model, sharing_by_hand(model, tie, PAIRS))


def narrow_sharing(model: Llama) -> SharingMap:
    """Of three layers of two units: none of the first runs, both of the second are narrow, and one of the last is gone.

    Those of the second keep other widths and other rotary pairs; models with norms on q and k heads keep all of these.
    """
    config = model.config
    donor = np.array([[DROPPED, DROPPED], [2, 3], [4, DROPPED]])
    widths = Widths.full(config)
    rank, pairs = widths.rank.copy(), widths.pairs.copy()
    rank[1:] = [[5, 9], [7, config.head_dim]]
    if not config.qk_norm:
        pairs[1, 0, 1::2] = pairs[1, 1, :3] = pairs[2, 0, 2:5] = False
    score = np.where(donor == DROPPED, 0.5, np.nan)
    return SharingMap(donor, score, config.heads_per_unit, widths=Widths(rank, pairs, config.head_dim))


def exported(model: Llama, folder: Path) -> Path:
    headshare_jax.save(model, folder, to="hf-compact")
    return folder


def in_pytorch(folder: Path, auto: Any = transformers.AutoModelForCausalLM, **settings: Any) -> Any:
    """A compact checkpoint's own PyTorch model; every tensor of the file fits it."""
    model, info = auto.from_pretrained(folder, trust_remote_code=True, output_loading_info=True, **settings)
    assert not any(info.values()), info
    return model.eval()


def assert_close(actual: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(actual - expected).max() < 1e-5 * np.abs(expected).max()


def assert_same(actual: Any, expected: Any) -> None:
    """Two sources have the same configuration, map and weights, bit by bit."""
    assert actual.config == expected.config
    assert actual.sharing == expected.sharing
    for name in parameters.parameter_names(expected.config):
        one, other = (assemble(source, name) for source in (actual, expected))
        assert one.dtype == other.dtype
        assert np.array_equal(one, other), name
