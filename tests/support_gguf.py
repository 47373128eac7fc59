"""GGUF files of tiny models, written with the `gguf` package as llama.cpp's converter writes them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Kind = gguf.GGMLQuantizationType
_NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 8)


def write_gguf(
    path: Path,
    model: Any,
    *,
    store: Callable[[np.ndarray], tuple[np.ndarray, Kind]] = lambda values: (values, Kind.F32),
    rope_divisors: np.ndarray | None = None,
    metadata: Mapping[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    architecture: str = "llama",
) -> Path:
    """Writes a transformers model; returns the path.

    Args:
      path: the file.
      model: a transformers.LlamaForCausalLM.
      store: gives the stored form of a matrix; vectors are stored as float32.
      rope_divisors: of Llama 3.1's frequency scaling.
      metadata: further values, or others than the model's own.
      drop: metadata to leave out.
      architecture: the name that the file gives to it.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    values: dict[str, Any] = {
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.attention.key_length": config.head_dim,
        "llama.attention.value_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.bos_token_id": config.bos_token_id,
        "tokenizer.ggml.eos_token_id": config.eos_token_id,
    } | dict(metadata or {})
    for name, value in values.items():
        if name not in drop:
            _add(writer, name, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        matrix = adjacent_pairs(name, tensor.numpy(), config)
        stored, kind = (matrix, Kind.F32) if matrix.ndim == 1 else store(matrix)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=kind)
    if rope_divisors is not None:
        writer.add_tensor("rope_freqs.weight", rope_divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    """llama.cpp's name of a transformers tensor."""
    return str(_NAMES.get_name(name, (".weight", ".bias")))


def adjacent_pairs(name: str, tensor: np.ndarray, config: Any) -> np.ndarray:
    """Query and key rows in llama.cpp's order: rotary pairs (i, i + H/2) of every head become neighbours."""
    if not any(projection in name for projection in ("q_proj", "k_proj")):
        return tensor
    half = config.head_dim // 2
    order = [
        head * config.head_dim + place + side * half
        for head in range(len(tensor) // config.head_dim)
        for place in range(half)
        for side in (0, 1)
    ]
    return tensor[order]


def _add(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    kinds: dict[type, Any] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    kinds.get(type(value), writer.add_array)(name, value)
