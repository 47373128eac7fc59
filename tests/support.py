"""Small random models for tests, made by transformers, the reference that this project is compared with."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

TINY = {
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


def tiny_hf_model(seed: int = 0, **overrides: Any) -> transformers.LlamaForCausalLM:
    """A random LlamaForCausalLM in float32 whose norms and biases are random too."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(TINY | overrides))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "bias" in name:
                parameter.normal_(0, 0.1)
            else:
                parameter.normal_(0, 0.08)
    return model


def saved_hf_model(folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """A tiny model written to a folder by transformers; returns the folder."""
    tiny_hf_model(seed, **overrides).to(dtype).save_pretrained(folder)
    return folder


def random_tokens(shape: tuple[int, ...], vocab_size: int = TINY["vocab_size"], seed: int = 0) -> np.ndarray:
    """int32 token ids."""
    return np.random.default_rng(seed).integers(0, vocab_size, shape).astype(np.int32)


def hf_logits(model: transformers.LlamaForCausalLM, tokens: np.ndarray, **inputs: Any) -> np.ndarray:
    """Logits by transformers, float32 [B, T, V]."""
    with torch.no_grad():
        logits: np.ndarray = model(torch.as_tensor(tokens, dtype=torch.long), **inputs).logits.float().numpy()
    return logits
