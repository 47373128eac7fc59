"""GGUF files (llama.cpp): configuration from metadata, tensors dequantised one by one."""

from pathlib import Path
from typing import Any, TypeVar

import gguf
import ml_dtypes
import numpy as np

from headshare_jax.config import LlamaConfig, RopeScaling
from headshare_jax.convert import keys
from headshare_jax.convert.tensor_files import TensorCheckpoint, TensorInfo
from headshare_jax.errors import HeadshareError
from headshare_jax.rope import inverse_frequencies, llama3_divisors

T = TypeVar("T", int, float, str)

_PLAIN: dict[gguf.GGMLQuantizationType, np.dtype[Any]] = {
    gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# llama.cpp's converter folds Llama 3.1's frequency scaling into this tensor and keeps no other trace of it.
_ROPE_TENSOR = "rope_freqs.weight"
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def open_file(path: Path) -> TensorCheckpoint:
    """Opens a GGUF file of a LLaMA model.

    float32, float16 and bfloat16 tensors keep their type; quantised ones become float32, the type in which the `gguf`
    package dequantises them.

    Raises:
      HeadshareError: no GGUF file, truncated, another architecture, or tensors that do not fit its metadata.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, OSError, KeyError, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise HeadshareError(f"{path} is truncated, corrupt or no GGUF file ({error}); fetch it again.") from error
    return TensorCheckpoint(path, _config(path, reader), keys.GGUF, GgufReader(path, reader), frozenset({_ROPE_TENSOR}))


class GgufReader:
    """Tensors of one GGUF file."""

    def __init__(self, path: Path, reader: gguf.GGUFReader):
        self.path = path
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._doubled = len(reader.tensors) - len(self._tensors)

    def infos(self) -> tuple[dict[str, TensorInfo], list[str]]:
        problems = [f"{self._doubled} tensor names stand twice"] if self._doubled else []
        # GGUF lists the fastest axis first.
        return {
            name: TensorInfo(tuple(int(n) for n in reversed(tensor.shape)), self._dtype(tensor), self.path)
            for name, tensor in self._tensors.items()
        }, problems

    def read(self, info: TensorInfo, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        if tensor.tensor_type not in _PLAIN:
            return gguf.dequantize(tensor.data, tensor.tensor_type)
        # A copy, so that no page of the mapped file stays referenced.
        return np.array(tensor.data).view(_PLAIN[tensor.tensor_type]).reshape(info.shape)

    def _dtype(self, tensor: gguf.ReaderTensor) -> np.dtype[Any] | None:
        if tensor.tensor_type in _PLAIN:
            return _PLAIN[tensor.tensor_type]
        return np.dtype(np.float32) if _can_dequantise(tensor.tensor_type) else None


def _can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _config(path: Path, reader: gguf.GGUFReader) -> LlamaConfig:
    metadata = _Metadata(path, reader)
    architecture = metadata.get("general.architecture", str)
    if architecture != "llama":
        raise HeadshareError(f"{path} holds a model of architecture {architecture!r}; of GGUF files, llama is supported.")
    if metadata.get("llama.expert_count", int, 0):
        raise HeadshareError(f"{path} is a mixture of experts (llama.expert_count), which is not supported.")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    hidden_size = metadata.get("llama.embedding_length", int)
    num_heads = metadata.get("llama.attention.head_count", int)
    head_dim = metadata.get("llama.attention.key_length", int, hidden_size // max(num_heads, 1))
    for name in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if metadata.get(name, int, head_dim) != head_dim:
            raise HeadshareError(f"{name} in {path} differs from the head width {head_dim}, which is not supported.")
    bos, eos, pad, turn = (
        metadata.get(f"tokenizer.ggml.{name}_token_id", int, -1) for name in ("bos", "eos", "padding", "eot")
    )
    fields: dict[str, Any] = {
        "vocab_size": _vocab_size(path, metadata, tensors),
        "hidden_size": hidden_size,
        "intermediate_size": metadata.get("llama.feed_forward_length", int),
        "num_layers": metadata.get("llama.block_count", int),
        "num_heads": num_heads,
        "num_kv_heads": metadata.get("llama.attention.head_count_kv", int, num_heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.get("llama.context_length", int),
        "rms_norm_eps": _shortest(metadata.get("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(metadata.get("llama.rope.freq_base", float, 10000.0)),
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": None if bos < 0 else bos,
        "eos_token_ids": tuple(dict.fromkeys(token for token in (eos, turn) if token >= 0)),
        "pad_token_id": None if pad < 0 else pad,
    }
    return LlamaConfig(**fields, rope_scaling=_rope_scaling(path, metadata, tensors, LlamaConfig(**fields)))


def _vocab_size(path: Path, metadata: "_Metadata", tensors: dict[str, gguf.ReaderTensor]) -> int:
    size = metadata.get("llama.vocab_size", int, 0)
    if not size and "token_embd.weight" not in tensors:
        raise HeadshareError(f"{path} has neither llama.vocab_size nor token_embd.weight; fetch it again.")
    return size or int(tensors["token_embd.weight"].shape[1])


def _rope_scaling(
    path: Path, metadata: "_Metadata", tensors: dict[str, gguf.ReaderTensor], unscaled: LlamaConfig
) -> RopeScaling | None:
    if _ROPE_TENSOR in tensors:
        divisors_h = np.asarray(tensors[_ROPE_TENSOR].data, np.float32)
        scaling = RopeScaling("llama3", float(divisors_h.max()), **_LLAMA3)
        expected_h = llama3_divisors(np.asarray(inverse_frequencies(unscaled, 1)), scaling)
        if divisors_h.shape != expected_h.shape or not np.allclose(divisors_h, expected_h, rtol=1e-4):
            raise HeadshareError(f"{_ROPE_TENSOR} in {path} is not Llama 3.1's frequency scaling, so is not supported.")
        return scaling
    kind = metadata.get("llama.rope.scaling.type", str, "none")
    factor = metadata.get("llama.rope.scaling.factor", float, metadata.get("llama.rope.scale_linear", float, 1.0))
    if kind == "none" and "llama.rope.scaling.type" in metadata:
        return None
    if kind not in ("none", "linear"):
        raise HeadshareError(f"llama.rope.scaling.type {kind!r} in {path} is not supported; none and linear are.")
    return None if factor in (0.0, 1.0) else RopeScaling("linear", _shortest(factor))


def _shortest(value: float) -> float:
    """The shortest decimal number that rounds to the float32 stored, such as 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


class _Metadata:
    """A GGUF file's key/value pairs, with types checked."""

    def __init__(self, path: Path, reader: gguf.GGUFReader):
        self.path, self.fields = path, reader.fields

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        if name not in self.fields:
            if default is None:
                raise HeadshareError(f"{self.path} has no {name} in its metadata; it is not a complete LLaMA model.")
            return default
        value = self.fields[name].contents()
        if not isinstance(value, (int, float) if kind is float else kind):
            raise HeadshareError(f"{name} in {self.path} must be of type {kind.__name__}, not {value!r}.")
        return kind(value)
