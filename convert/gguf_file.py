"""GGUF files (llama.cpp): configuration from metadata, tensors dequantised one by one."""

import logging
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import gguf
import ml_dtypes
import numpy as np

from headshare_jax.config import LlamaConfig, RopeScaling
from headshare_jax.convert import keys
from headshare_jax.convert.gguf_header import GgufHeader, GgufTensor, read_header
from headshare_jax.convert.tensor_files import TensorCheckpoint, TensorInfo
from headshare_jax.errors import HeadshareError
from headshare_jax.rope import inverse_frequencies, llama3_divisors

logger = logging.getLogger(__name__)

T = TypeVar("T", int, float, str)

_PLAIN: dict[gguf.GGMLQuantizationType, np.dtype[Any]] = {
    gguf.GGMLQuantizationType.F32: np.dtype(np.float32),
    gguf.GGMLQuantizationType.F16: np.dtype(np.float16),
    gguf.GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
# Quantised tensors are read and dequantised in pieces of about this size.
_PIECE_BYTES = 2**20
# llama.cpp's converter folds Llama 3.1's frequency scaling into this tensor and keeps no other trace of it.
_ROPE_TENSOR = "rope_freqs.weight"
_LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Settings that change what the model computes, in ways that this one cannot, unless they are absent or zero.
_UNSUPPORTED = (
    "llama.expert_count",
    "llama.attention.sliding_window",
    "llama.attention.scale",
    "llama.attention.clamp_kqv",
    "llama.attention.max_alibi_bias",
    "llama.embedding_scale",
    "llama.residual_scale",
    "llama.logit_scale",
    "llama.use_parallel_residual",
)


def open_file(path: Path) -> TensorCheckpoint:
    """Opens a GGUF file of a LLaMA model.

    float32, float16 and bfloat16 tensors keep their type; quantised ones become float32, the type in which the `gguf`
    package dequantises them.

    Raises:
      HeadshareError: no GGUF file, truncated, another architecture, or tensors that do not fit its metadata.
    """
    header = read_header(path)
    return TensorCheckpoint(path, _config(header), keys.GGUF, GgufReader(header), frozenset({_ROPE_TENSOR}))


class GgufReader:
    """Tensors of one GGUF file; reads by file offset, so that no mapped pages count as memory."""

    def __init__(self, header: GgufHeader):
        self._header = header

    def infos(self) -> tuple[dict[str, TensorInfo], list[str]]:
        return {
            name: TensorInfo(tensor.shape, _dtype(tensor.kind), self._header.path)
            for name, tensor in self._header.tensors.items()
        }, []

    def read(self, info: TensorInfo, name: str, cut: keys.Cut | None = None) -> np.ndarray:
        values = self._whole(info, name)
        return values if cut is None else cut.of(values)

    def _whole(self, info: TensorInfo, name: str) -> np.ndarray:
        tensor = self._header.tensors[name]
        try:
            with info.file.open("rb") as file:
                file.seek(tensor.offset)
                if tensor.kind in _PLAIN:
                    return np.fromfile(file, _PLAIN[tensor.kind], int(np.prod(info.shape))).reshape(info.shape)
                return _dequantised(file, tensor)
        except (OSError, ValueError) as error:
            raise HeadshareError(f"{name} cannot be read from {info.file} ({error}); fetch it again.") from error


def _dequantised(file: Any, tensor: GgufTensor) -> np.ndarray:
    """Values of a quantised tensor, float32; peak memory is the tensor plus one piece."""
    values = np.empty(tensor.shape, np.float32)
    rows = values.reshape(-1, tensor.shape[-1])
    row_bytes = tensor.size // len(rows)
    step = max(1, _PIECE_BYTES // row_bytes)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step]
        stored = np.fromfile(file, np.uint8, len(piece) * row_bytes).reshape(len(piece), row_bytes)
        piece[:] = gguf.dequantize(stored, tensor.kind)
    return values


def _dtype(kind: gguf.GGMLQuantizationType) -> np.dtype[Any] | None:
    if kind in _PLAIN:
        return _PLAIN[kind]
    return np.dtype(np.float32) if _can_dequantise(kind) else None


@cache
def _can_dequantise(kind: gguf.GGMLQuantizationType) -> bool:
    _, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _config(header: GgufHeader) -> LlamaConfig:
    metadata, tensors = _Metadata(header), header.tensors
    architecture = metadata.get("general.architecture", str)
    if architecture != "llama":
        raise HeadshareError(
            f"{header.path} holds a model of architecture {architecture!r}; of GGUF files, llama is supported."
        )
    metadata.refuse_unsupported()
    hidden_size = metadata.get("llama.embedding_length", int)
    num_heads = metadata.get("llama.attention.head_count", int)
    head_dim = metadata.get("llama.attention.key_length", int, hidden_size // max(num_heads, 1))
    for name in ("llama.rope.dimension_count", "llama.attention.value_length"):
        if metadata.get(name, int, head_dim) != head_dim:
            raise HeadshareError(
                f"{name} in {header.path} differs from the head width {head_dim}, which is not supported."
            )
    bos, eos, pad, turn = (
        metadata.get(f"tokenizer.ggml.{name}_token_id", int, -1) for name in ("bos", "eos", "padding", "eot")
    )
    fields: dict[str, Any] = {
        "vocab_size": _vocab_size(metadata, tensors),
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
    scaling = _rope_scaling(header, metadata, LlamaConfig(**fields))
    metadata.warn_of_unused()
    return LlamaConfig(**fields, rope_scaling=scaling)


def _vocab_size(metadata: "_Metadata", tensors: dict[str, GgufTensor]) -> int:
    size = metadata.get("llama.vocab_size", int, 0)
    if not size and "token_embd.weight" not in tensors:
        raise HeadshareError(f"{metadata.path} has neither llama.vocab_size nor token_embd.weight; fetch it again.")
    return size or tensors["token_embd.weight"].shape[0]


def _rope_scaling(header: GgufHeader, metadata: "_Metadata", unscaled: LlamaConfig) -> RopeScaling | None:
    kind = metadata.get("llama.rope.scaling.type", str, "")
    factor = metadata.get("llama.rope.scaling.factor", float, metadata.get("llama.rope.scale_linear", float, 1.0))
    if kind not in ("", "none", "linear"):
        raise HeadshareError(f"{kind!r} rope scaling (in {header.path}) is not supported; none, linear and llama3 are.")
    linear = RopeScaling("linear", _shortest(factor)) if kind != "none" and factor not in (0.0, 1.0) else None
    if _ROPE_TENSOR not in header.tensors:
        return linear
    if linear is not None:
        raise HeadshareError(f"{header.path} has both {_ROPE_TENSOR} and a linear scaling, which is not supported.")
    return _llama3_scaling(header, unscaled)


def _llama3_scaling(header: GgufHeader, unscaled: LlamaConfig) -> RopeScaling:
    tensor = header.tensors[_ROPE_TENSOR]
    info = TensorInfo(tensor.shape, _dtype(tensor.kind), header.path)
    divisors_h = np.zeros(0) if info.dtype is None else GgufReader(header).read(info, _ROPE_TENSOR).astype(np.float32)
    largest = float(divisors_h.max(initial=1.0))
    if np.isfinite(largest):
        scaling = RopeScaling("llama3", largest, **_LLAMA3)
        expected_h = llama3_divisors(np.asarray(inverse_frequencies(unscaled, 1)), scaling)
        if divisors_h.shape == expected_h.shape and np.allclose(divisors_h, expected_h, rtol=1e-4):
            return scaling
    raise HeadshareError(f"{_ROPE_TENSOR} in {header.path} is not Llama 3.1's frequency scaling, so is not supported.")


def _shortest(value: float) -> float:
    """The shortest decimal number that rounds to the float32 stored, such as 1e-05 for 9.999999747378752e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


class _Metadata:
    """A GGUF file's key/value pairs, with types checked."""

    def __init__(self, header: GgufHeader):
        self.path, self._values = header.path, header.metadata
        self._used: set[str] = set()

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        self._used.add(name)
        value = self._values.get(name, default)
        if value is None:
            raise HeadshareError(f"{self.path} has no {name} in its metadata; it is not a complete LLaMA model.")
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            shown = "a list, with a value for each layer" if isinstance(value, list) else repr(value)
            raise HeadshareError(f"{name} in {self.path} must be one {_KINDS[kind]}, not {shown}.")
        return kind(value)

    def refuse_unsupported(self) -> None:
        for name in _UNSUPPORTED:
            self._used.add(name)
            if self._values.get(name):
                raise HeadshareError(f"{self.path} sets {name} to {self._values[name]!r}, which is not supported.")
        if self._values.get("split.count"):
            raise HeadshareError(f"{self.path} is one part of a split model; merge it first with llama-gguf-split.")

    def warn_of_unused(self) -> None:
        unused = sorted(name for name in self._values.keys() - self._used if name.startswith("llama."))
        if unused:
            logger.warning("These settings in %s are not used: %s", self.path, ", ".join(unused))


_KINDS = {int: "whole number", float: "number", str: "text"}
