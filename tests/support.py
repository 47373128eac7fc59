"""Small random models for tests, made by transformers, the reference that this project is compared with."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from headshare_jax import Llama, LlamaConfig, SharingMap, parameters, share
from headshare_jax.model.cache import KVCache
from headshare_jax.sharing.source import stored_shape
from headshare_jax.sharing.tie import DROPPED
from headshare_jax.sharing.widths import Widths

TINY: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# What may differ between LLaMA-family models, as overrides of `TINY` in transformers' present spelling.
VARIANTS: dict[str, dict[str, Any]] = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "narrow heads": {"head_dim": 8, "num_key_value_heads": 4},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "gelu": {"hidden_act": "gelu"},
    "gelu tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "relu": {"hidden_act": "relu"},
    "large eps": {"rms_norm_eps": 1e-2, "eos_token_id": [2, 3, 5], "pad_token_id": 0},
    "theta": {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "llama3": {
        "head_dim": 32,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONG_ROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
    "original_max_position_embeddings": 32,
}
PHI3 = {"model_type": "phi3", "pad_token_id": None}
WINDOWS = {"use_sliding_window": True, "sliding_window": 10}

# The other families, and what may differ within them.
FAMILY_VARIANTS: dict[str, dict[str, Any]] = {
    "yarn": {"rope_parameters": YARN},
    "yarn to the last": {
        "head_dim": 32,
        "rope_parameters": YARN | {"beta_fast": 20, "beta_slow": 2, "truncate": False},
    },
    "yarn with an attention factor": {"rope_parameters": YARN | {"attention_factor": 0.8}},
    "yarn with mscale": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.7}},
    "longrope": {"rope_parameters": LONG_ROPE | {"factor": 3.0}},
    "mistral": {"model_type": "mistral", "sliding_window": None, "head_dim": 32},
    "mistral, window": {"model_type": "mistral", "sliding_window": 10},
    "qwen2": {"model_type": "qwen2"},
    "qwen2, tied": {"model_type": "qwen2", "tie_word_embeddings": True, "rope_parameters": YARN},
    "qwen2, windows": {"model_type": "qwen2", "max_window_layers": 1, **WINDOWS},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    "qwen3, biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "rope_parameters": YARN},
    "qwen3, windows": {"model_type": "qwen3", "head_dim": 16, "max_window_layers": 0, **WINDOWS},
    "phi3": PHI3,
    "phi3, partial rotary": PHI3
    | {
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
    },
    "phi3, longrope": PHI3 | {"original_max_position_embeddings": 32, "rope_parameters": LONG_ROPE},
    "phi3, longrope within": PHI3
    | {
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 128,
        "rope_parameters": LONG_ROPE | {"original_max_position_embeddings": 128},
    },
    "phi3, as Phi-4-mini": PHI3
    | {
        "tie_word_embeddings": True,
        "original_max_position_embeddings": 32,
        "rope_parameters": LONG_ROPE
        | {
            "partial_rotary_factor": 0.75,
            **{f"{kind}_factor": LONG_ROPE[f"{kind}_factor"][:6] for kind in ("short", "long")},
        },
    },
    "phi3, window": PHI3 | {"sliding_window": 10, "num_key_value_heads": 4},
    "smollm3": {"model_type": "smollm3", "no_rope_layer_interval": 2, "pad_token_id": None},
    "smollm3, biases": {
        "model_type": "smollm3",
        "no_rope_layers": [0, 1, 1],
        "pad_token_id": None,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "smollm3, windows": {"model_type": "smollm3", "no_rope_layers": [0, 1, 0], "pad_token_id": None, **WINDOWS},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 32},
    "seed_oss, biases": {"model_type": "seed_oss", "attention_out_bias": True, "mlp_bias": True, "head_dim": 16},
    "seed_oss, no biases": {
        "model_type": "seed_oss",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "head_dim": 16,
    },
}
ALL_VARIANTS = VARIANTS | FAMILY_VARIANTS


def torch_or_skip() -> Any:
    """PyTorch; the oldest releases of everything else are tested without it (`make test-oldest`)."""
    if os.environ.get("HEADSHARE_TESTS_WITHOUT_TORCH"):
        pytest.skip("tested with PyTorch alone")
    import torch

    return torch


def hf_config(model_type: str = "llama", **overrides: Any) -> Any:
    """transformers' configuration of a tiny model."""
    return transformers.AutoConfig.for_model(model_type, **(TINY | overrides))


def tiny_hf_model(seed: int = 0, **overrides: Any) -> Any:
    """A random model of transformers' in float32, by default a Llama, whose norms and biases are random too."""
    torch = torch_or_skip()
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForCausalLM.from_config(hf_config(**overrides))
    model.eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.08)
    return model


def saved_hf_model(folder: Path, seed: int = 0, dtype: Any = None, **overrides: Any) -> Path:
    """A tiny model written to a folder by transformers, in a type of PyTorch's (float32); returns the folder."""
    tiny_hf_model(seed, **overrides).to(dtype or torch_or_skip().float32).save_pretrained(folder)
    return folder


def random_tokens(shape: tuple[int, ...], vocab_size: int = TINY["vocab_size"], seed: int = 0) -> np.ndarray:
    """int32 token ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


def hf_logits(model: Any, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
    """Logits by transformers, float32 [B, T, V]."""
    torch = torch_or_skip()
    with torch.no_grad():
        logits: np.ndarray = model(torch.as_tensor(tokens, dtype=torch.long), **inputs).logits.float().numpy()
    return logits


def tiny_model(seed: int = 0, dtype: str = "float32", **overrides: Any) -> Llama:
    """A dense model with all parameters random, made without transformers; overrides as for `tiny_hf_model`."""
    return random_model(LlamaConfig.from_hf(hf_config(**overrides).to_dict()), seed, dtype)


def random_model(config: LlamaConfig, seed: int = 0, dtype: str = "float32") -> Llama:
    """A dense model with all parameters random."""
    rng = np.random.default_rng(seed)

    def draw(name: str) -> jax.Array:
        shape = stored_shape(config, name)
        return jnp.asarray(rng.uniform(0.5, 1.5, shape) if "norm" in name else rng.normal(0, 0.08, shape), dtype)

    return Llama(config, {name: draw(name) for name in parameters.parameter_names(config)})


def jax_logits(model: Llama, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
    """Logits of a jitted model, float32 [B, T, V]."""
    return np.asarray(_forward(model, jnp.asarray(tokens), **{name: jnp.asarray(x) for name, x in inputs.items()}))


def logits_in_pieces(
    model: Llama, rows: np.ndarray, lengths: tuple[int, ...], cache: KVCache, pieces: Sequence[tuple[int, int]]
) -> tuple[np.ndarray, KVCache]:
    """Logits [B, T, V] by the cache, and the cache: of each prompt's last token, and of pieces of what follows it.

    Args:
      model: dense or shared.
      rows: tokens [B, T].
      lengths: tokens of every row's prompt, at most 40; all 0 for no prompts.
      cache: empty.
      pieces: first and last place behind the prompt, one after the other.
    """
    logits = np.zeros((*rows.shape, model.config.vocab_size), np.float32)
    if any(lengths):
        padded = np.where(np.arange(40) < np.array(lengths)[:, None], rows[:, :40], 5)
        features, cache = jax.jit(Llama.prefill)(model, padded[:, : max(lengths)], jnp.asarray(lengths), cache)
        for row, length in enumerate(lengths):
            logits[row, length - 1] = np.asarray(jax.jit(Llama.logits)(model, features))[row]
    for begin, end in pieces:
        piece = np.stack([row[length + begin : length + end] for row, length in zip(rows, lengths, strict=True)])
        features, cache = jax.jit(Llama.extend)(model, jnp.asarray(piece), cache)
        for row, length in enumerate(lengths):
            logits[row, length + begin : length + end] = np.asarray(jax.jit(Llama.logits)(model, features))[row]
    return logits, cache


@jax.jit
def _forward(model: Llama, tokens_bt: jax.Array, **inputs: jax.Array) -> jax.Array:
    return model(tokens_bt, **inputs)


def sharing_by_hand(model: Llama, tie: str, pairs: dict[int, int], dropped: Sequence[int] = ()) -> SharingMap:
    """A map for a model, from flat receivers to flat donors; `mixed_sharing`, whatever these are, if tie is `mixed`."""
    if tie == "mixed":
        return mixed_sharing(model)
    config = model.config
    flat = np.arange(config.num_units)
    flat[list(pairs)] = list(pairs.values())
    flat[list(dropped)] = DROPPED
    donor = flat.reshape(config.num_layers, config.num_kv_heads)
    score = np.full(donor.shape, np.nan)
    score.flat[[*pairs, *dropped]] = 0.0
    return SharingMap(donor, score, config.heads_per_unit, tie=tie)


def mixed_sharing(model: Llama) -> SharingMap:
    """Of three layers: receivers in the first and last, of different ties; the second and the last unit are dropped."""
    config = model.config
    units = config.num_kv_heads
    donor = np.arange(3 * units).reshape(3, units)
    donor[0, 1] = donor[2, 0] = 0
    donor[1], donor[2, -1] = DROPPED, DROPPED
    score = np.where(donor == np.arange(3 * units).reshape(3, units), np.nan, 0.5)
    unit_tie = np.full(donor.shape, "", "<U4")
    unit_tie[0, 1], unit_tie[2, 0] = "qkv", "qo"
    return SharingMap(donor, score, config.heads_per_unit, unit_tie=unit_tie)


def slim_sharing(model: Llama, seed: int = 0) -> SharingMap:
    """Of three layers: a receiver, a dropped unit, and slim ones of random widths: in q and k, in v and o, or in all.

    Units of models with norms on q and k heads are slim in v and o alone.
    """
    config, rng = model.config, np.random.default_rng(seed)
    units = config.num_kv_heads
    sharing = sharing_by_hand(model, "qkv", {2 * units: 0}, [3 * units - 1])
    widths = Widths.full(config)
    rank, pairs = widths.rank.copy(), widths.pairs.copy()
    for turn, place in enumerate(divmod(unit, units) for unit in range(1, 2 * units)):
        if turn % 3 != 1:
            rank[place] = rng.integers(1, config.head_dim)
        if turn % 3 != 2 and not config.qk_norm:
            pairs[place] = rng.permutation(pairs.shape[2]) < rng.integers(1, pairs.shape[2])
    return replace(sharing, widths=Widths(rank, pairs, config.head_dim))


def tied_by_hand(model: Any, sharing: SharingMap) -> Any:
    """A transformers model with receivers' weights overwritten by their donors', what is dropped or cut by zeros."""
    torch, config = torch_or_skip(), model.config
    heads = {"q": config.num_attention_heads, "o": config.num_attention_heads}
    assert sharing.unit_tie is not None
    with torch.no_grad():
        for flat, donor in enumerate(sharing.donor.ravel().tolist()):
            (layer, unit), (donor_layer, donor_unit) = (
                divmod(place, config.num_key_value_heads) for place in (flat, max(donor, 0))
            )
            for p in "qkvo" if donor == DROPPED else sharing.unit_tie.flat[flat]:
                mine, theirs = (getattr(model.model.layers[i].self_attn, f"{p}_proj") for i in (layer, donor_layer))
                size = heads.get(p, config.num_key_value_heads) // config.num_key_value_heads * config.head_dim
                to, source = slice(unit * size, (unit + 1) * size), slice(donor_unit * size, (donor_unit + 1) * size)
                if p == "o":
                    mine.weight[:, to] = 0 if donor == DROPPED else theirs.weight[:, source]
                    continue
                mine.weight[to] = 0 if donor == DROPPED else theirs.weight[source]
                if mine.bias is not None:
                    mine.bias[to] = 0 if donor == DROPPED else theirs.bias[source]
        for layer, unit in np.argwhere(sharing.slim):
            assert sharing.widths is not None
            for p in "qkvo":
                linear = getattr(model.model.layers[layer].self_attn, f"{p}_proj")
                group = heads.get(p, config.num_key_value_heads) // config.num_key_value_heads
                cut = np.tile(~(sharing.widths.qk if p in "qk" else sharing.widths.vo)[layer, unit], group)
                at = np.flatnonzero(cut) + unit * group * config.head_dim
                linear.weight[(slice(None), at) if p == "o" else at] = 0
                if p != "o" and linear.bias is not None:
                    linear.bias[at] = 0
    return model


def compilations(function: Any) -> int:
    """How often a jitted function has been compiled."""
    return int(function._cache_size())


def dropped(model: Llama, units: dict[int, list[int]]) -> Llama:
    """A model without some units of some layers."""
    shape = model.config.num_layers, model.config.num_kv_heads
    donor = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    for layer, of in units.items():
        donor[layer, of] = DROPPED
    score = np.where(donor == DROPPED, 0.5, np.nan)
    return share(model, SharingMap(donor=donor, score=score, heads_per_unit=model.config.heads_per_unit))


def calls_of(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[tuple[Any, ...]]:
    """The arguments by position of every call of a function from now on, in a list that grows."""
    calls, function = list[tuple[Any, ...]](), getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return function(*args, **kwargs)

    monkeypatch.setattr(owner, name, called)
    return calls
