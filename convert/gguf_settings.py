"""The settings of a model as a GGUF file's metadata spells them, read and written."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from headshare_jax.config import LlamaConfig, RopeScaling
from headshare_jax.convert import gguf_tokenizer
from headshare_jax.convert.gguf_header import GgufHeader, GgufTensor
from headshare_jax.convert.gguf_tensors import GgufReader
from headshare_jax.errors import HeadshareError
from headshare_jax.families import FAMILIES
from headshare_jax.rope import inverse_frequencies, llama3_divisors

logger = logging.getLogger(__name__)

T = TypeVar("T", int, float, str)


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp computes of a `LlamaConfig`, under one name.

    Attributes:
      family: of the models that are read.
      attention_bias, mlp_bias: values of these settings that it computes.
      scalings: rotary scalings that it computes.
    """

    family: str
    attention_bias: tuple[bool | str, ...] = (False,)
    mlp_bias: tuple[bool, ...] = (False,)
    scalings: tuple[str, ...] = ("linear", "yarn")


_LLAMA = Architecture("llama", (False, True), (False, True), ("linear", "yarn", "llama3", "longrope"))
ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": _LLAMA,
    # Llamas whose layers differ in their numbers of heads.
    "deci": _LLAMA,
    "internlm2": _LLAMA,
    "qwen2": Architecture("qwen2", ("qkv",)),
    "qwen3": Architecture("qwen3"),
    "phi3": Architecture("phi3", scalings=("longrope",)),
    "smollm3": Architecture("smollm3"),
    "seed_oss": Architecture("seed_oss", (False, "qkv")),
}
# The one choice of layers without rotary embedding that llama.cpp has: every so-many-th.
_NOPE_EVERY = {"smollm3": 4}
# Where what no key of llama.cpp's says is kept: all settings, and the map.
OWN_SETTINGS, OWN_MAP = "headshare.config", "headshare.map"
# llama.cpp's converter folds Llama 3.1's frequency scaling into this tensor and keeps no other trace of it.
ROPE_TENSOR = "rope_freqs.weight"
LONG_TENSOR, SHORT_TENSOR = "rope_factors_long.weight", "rope_factors_short.weight"
_LLAMA3: dict[str, Any] = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Settings that change what the model computes, in ways that this one cannot, unless they are absent or zero.
_UNSUPPORTED = (
    "expert_count",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "use_parallel_residual",
)


def architecture_of(config: LlamaConfig) -> str:
    """llama.cpp's name of the architecture of a model whose layers are alike.

    Raises:
      HeadshareError: it has none that computes the same.
    """
    name = FAMILIES[config.family].gguf
    known = ARCHITECTURES[name]
    kind = None if config.rope_scaling is None else config.rope_scaling.kind
    wanted = {
        f"the activation {config.hidden_act}": config.hidden_act == "silu",
        f"{kind} rotary scaling": kind is None or kind in known.scalings,
        "YaRN without truncation": config.rope_scaling is None or config.rope_scaling.truncate,
        "these attention biases": config.attention_bias in known.attention_bias,
        "MLP biases": config.mlp_bias in known.mlp_bias,
        "these layers without rotary embedding": config.nope_layers == _nope_layers(name, config.num_layers),
    }
    for what, computed in wanted.items():
        if not computed:
            raise HeadshareError(f"llama.cpp does not compute {what} in its architecture {name}; write hf instead.")
    return name


def _nope_layers(architecture: str, num_layers: int) -> tuple[int, ...]:
    every = _NOPE_EVERY.get(architecture)
    return () if every is None else tuple(range(every - 1, num_layers, every))


def written(architecture: str, config: LlamaConfig) -> dict[str, Any]:
    """A model's settings, by their keys in the file's metadata, but for its special tokens."""
    scaling = config.rope_scaling
    settings: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": config.rotary_dim,
        "rope.freq_base": config.rope_theta,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    if config.sliding_window is not None:
        settings["attention.sliding_window"] = config.sliding_window
    if scaling is not None and scaling.kind != "llama3":
        settings["rope.scaling.type"] = scaling.kind
    if scaling is not None and scaling.kind in ("linear", "yarn"):
        settings["rope.scaling.factor"] = scaling.factor
    if scaling is not None and scaling.kind in ("yarn", "longrope"):
        settings["rope.scaling.original_context_length"] = scaling.original_max_position_embeddings
        settings["rope.scaling.attn_factor"] = scaling.scale / _of_yarn(scaling.kind, scaling.factor)
    if scaling is not None and scaling.kind == "yarn":
        settings["rope.scaling.yarn_beta_fast"] = scaling.beta_fast
        settings["rope.scaling.yarn_beta_slow"] = scaling.beta_slow
    return {f"{architecture}.{name}": value for name, value in settings.items()}


def _of_yarn(kind: str, factor: float) -> float:
    """What llama.cpp multiplies the stored attention factor by."""
    return 1 + 0.1 * math.log(factor) if kind == "yarn" else 1.0


def rope_tensors(config: LlamaConfig) -> dict[str, np.ndarray]:
    """The divisors of rotary frequencies that llama.cpp reads as tensors, float32 [R // 2] each, by name."""
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "llama3":
        unscaled_h = np.asarray(inverse_frequencies(replace(config, rope_scaling=None), 1))
        return {ROPE_TENSOR: llama3_divisors(unscaled_h, scaling)}
    if scaling is not None and scaling.kind == "longrope":
        factors = {LONG_TENSOR: scaling.long_factor, SHORT_TENSOR: scaling.short_factor}
        return {name: np.asarray(values, np.float32) for name, values in factors.items()}
    return {}


def read(header: GgufHeader, heads: tuple[int, int] | None = None) -> LlamaConfig:
    """A model's settings.

    Args:
      header: the file's.
      heads: query heads and key/value heads of a layer, where they are not to be read from the metadata.

    Raises:
      HeadshareError: an architecture or a setting that is not supported, or metadata that cannot be.
    """
    architecture: Any = header.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise HeadshareError(
            f"{header.path} holds a model of architecture {architecture!r}; of GGUF files, "
            f"{', '.join(ARCHITECTURES)} are supported."
        )
    metadata = Metadata(header, architecture)
    metadata.refuse_unsupported()
    bos, pad, *ends = (
        metadata.get(f"tokenizer.ggml.{name}_token_id", int, -1) for name in ("bos", "padding", "eos", "eot", "eom")
    )
    ends = [*(token for token in ends if token >= 0), *gguf_tokenizer.turn_ends(header.metadata)]
    tokens: dict[str, Any] = {
        "bos_token_id": None if bos < 0 else bos,
        "eos_token_ids": tuple(dict.fromkeys(ends)),
        "pad_token_id": None if pad < 0 else pad,
    }
    own = _own(header, architecture)
    if own is not None:
        if set(tokens["eos_token_ids"]) <= set(own.eos_token_ids):
            tokens["eos_token_ids"] = own.eos_token_ids
        return replace(own, **{name: value for name, value in tokens.items() if value is not None})
    config = _foreign(header, metadata, architecture, heads, tokens)
    metadata.warn_of_unused()
    return config


def _own(header: GgufHeader, architecture: str) -> LlamaConfig | None:
    """The settings as this library wrote them, unless llama.cpp's own keys have been changed since."""
    text = header.metadata.get(OWN_SETTINGS)
    if not isinstance(text, str):
        return None
    try:
        config = LlamaConfig.from_json(json.loads(text))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise HeadshareError(f"{OWN_SETTINGS} in {header.path} cannot be used ({error}); fetch it again.") from error
    if architecture_of(config) != ("llama" if architecture == "deci" else architecture):
        raise HeadshareError(f"{OWN_SETTINGS} in {header.path} is of another architecture; fetch it again.")
    for name, value in written(architecture, config).items():
        found = header.metadata.get(name)
        if isinstance(found, list):
            continue
        if found != (float(np.float32(value)) if isinstance(value, float) else value):
            logger.warning("%s in %s was changed since headshare-jax wrote it.", name, header.path)
            return None
    return config


def _foreign(
    header: GgufHeader,
    metadata: "Metadata",
    architecture: str,
    heads: tuple[int, int] | None,
    tokens: Mapping[str, Any],
) -> LlamaConfig:
    tensors = header.tensors
    num_heads = metadata.setting("attention.head_count", int) if heads is None else heads[0]
    num_kv_heads = metadata.setting("attention.head_count_kv", int, num_heads) if heads is None else heads[1]
    hidden_size, num_layers = metadata.setting("embedding_length", int), metadata.setting("block_count", int)
    head_dim = metadata.setting("attention.key_length", int, hidden_size // max(num_heads, 1))
    rotary_dim = metadata.setting("rope.dimension_count", int, head_dim)
    if metadata.setting("attention.value_length", int, head_dim) != head_dim:
        raise HeadshareError(f"{header.path} has values of another width than its keys, which is not supported.")
    window = metadata.setting("attention.sliding_window", int, 0)
    family = ARCHITECTURES[architecture].family
    biased: dict[str, Any] = {f"{name}_bias": f"blk.0.{tensor}.bias" in tensors for name, tensor in _BIASED.items()}
    if biased["attention_bias"] and "qkv" in ARCHITECTURES[architecture].attention_bias:
        biased["attention_bias"] = "qkv"
    if window and family == "llama":
        family = "mistral"
    config = LlamaConfig(
        vocab_size=_vocab_size(metadata, tensors),
        hidden_size=hidden_size,
        intermediate_size=metadata.setting("feed_forward_length", int),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=metadata.setting("context_length", int),
        rms_norm_eps=_shortest(metadata.setting("attention.layer_norm_rms_epsilon", float)),
        rope_theta=_shortest(metadata.setting("rope.freq_base", float, 10000.0)),
        tie_word_embeddings="output.weight" not in tensors,
        family=family,
        partial_rotary_factor=rotary_dim / max(head_dim, 1),
        nope_layers=_nope_layers(architecture, min(num_layers, len(tensors))),
        sliding_window=window or None,
        **(biased | dict(FAMILIES[family].always)),
        **tokens,
    )
    return replace(config, rope_scaling=_rope_scaling(header, metadata, config))


_BIASED = {"attention": "attn_q", "mlp": "ffn_gate"}


def _vocab_size(metadata: "Metadata", tensors: dict[str, GgufTensor]) -> int:
    size = metadata.setting("vocab_size", int, 0)
    if not size and "token_embd.weight" not in tensors:
        raise HeadshareError(f"{metadata.path} has neither a vocab_size nor token_embd.weight; fetch it again.")
    return size or tensors["token_embd.weight"].shape[0]


def _rope_scaling(header: GgufHeader, metadata: "Metadata", unscaled: LlamaConfig) -> RopeScaling | None:
    kind = metadata.setting("rope.scaling.type", str, "")
    stretch = metadata.setting("rope.scaling.factor", float, metadata.setting("rope.scale_linear", float, 1.0))
    positions = unscaled.max_position_embeddings
    original = metadata.setting("rope.scaling.original_context_length", int, positions)
    multiplier = metadata.setting("rope.scaling.attn_factor", float, 0.0)
    if kind not in ("", "none", "linear", "yarn", "longrope"):
        raise HeadshareError(
            f"{kind!r} rope scaling (in {header.path}) is not supported; none, linear, yarn, longrope and llama3 are."
        )
    if {LONG_TENSOR, SHORT_TENSOR} <= header.tensors.keys():
        long, short = (tuple(map(float, _vector(header, name))) for name in (LONG_TENSOR, SHORT_TENSOR))
        return RopeScaling(
            "longrope", max(positions / max(original, 1), 1.0), original_max_position_embeddings=original,
            attention_factor=multiplier or None, short_factor=short, long_factor=long,
        )  # fmt: skip
    if kind == "yarn":
        return RopeScaling(
            "yarn",
            _shortest(stretch),
            original_max_position_embeddings=original,
            beta_fast=_shortest(metadata.setting("rope.scaling.yarn_beta_fast", float, 32.0)),
            beta_slow=_shortest(metadata.setting("rope.scaling.yarn_beta_slow", float, 1.0)),
            attention_factor=None if multiplier in (0, 1) else _shortest(multiplier) * _of_yarn(kind, max(stretch, 1)),
        )
    linear = RopeScaling("linear", _shortest(stretch)) if kind != "none" and stretch not in (0.0, 1.0) else None
    if ROPE_TENSOR not in header.tensors:
        return linear
    if linear is not None:
        raise HeadshareError(f"{header.path} has both {ROPE_TENSOR} and a linear scaling, which is not supported.")
    return _llama3_scaling(header, unscaled)


def _llama3_scaling(header: GgufHeader, unscaled: LlamaConfig) -> RopeScaling:
    divisors_h = _vector(header, ROPE_TENSOR)
    largest = float(divisors_h.max(initial=1.0))
    if np.isfinite(largest):
        scaling = RopeScaling("llama3", largest, **_LLAMA3)
        expected_h = llama3_divisors(np.asarray(inverse_frequencies(unscaled, 1)), scaling)
        if divisors_h.shape == expected_h.shape and np.allclose(divisors_h, expected_h, rtol=1e-4):
            return scaling
    raise HeadshareError(f"{ROPE_TENSOR} in {header.path} is not Llama 3.1's frequency scaling, so is not supported.")


def _vector(header: GgufHeader, name: str) -> np.ndarray:
    """A tensor of a few numbers, float32; none at all if it is of a type that is not read."""
    reader = GgufReader(header)
    info = reader.infos()[0][name]
    return np.zeros(0, np.float32) if info.dtype is None else reader.read(info, name).astype(np.float32)


def _shortest(value: float) -> float:
    """The shortest decimal number that rounds to the float32 stored, such as 1e-05 for 9.999999747378752e-06."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


class Metadata:
    """A GGUF file's key/value pairs, with types checked."""

    def __init__(self, header: GgufHeader, architecture: str):
        self.path, self._values = header.path, header.metadata
        self._architecture = architecture
        self._used = {f"{architecture}.attention.head_count{kind}" for kind in ("", "_kv")}

    def setting(self, name: str, kind: type[T], default: T | None = None) -> T:
        """A setting of the architecture."""
        return self.get(f"{self._architecture}.{name}", kind, default)

    def get(self, name: str, kind: type[T], default: T | None = None) -> T:
        """A value, or where it is absent the default; a list of equal values counts as that value."""
        self._used.add(name)
        value = self._values.get(name, default)
        if value is None:
            raise HeadshareError(f"{self.path} has no {name} in its metadata; it is not a complete model.")
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            shown = "a list, with a value for each layer" if isinstance(value, list) else repr(value)
            raise HeadshareError(f"{name} in {self.path} must be one {_KINDS[kind]}, not {shown}.")
        return kind(value)

    def refuse_unsupported(self) -> None:
        for name in (f"{self._architecture}.{name}" for name in _UNSUPPORTED):
            self._used.add(name)
            if self._values.get(name):
                raise HeadshareError(f"{self.path} sets {name} to {self._values[name]!r}, which is not supported.")
        if self._values.get("split.count"):
            raise HeadshareError(f"{self.path} is one part of a split model; merge it first with llama-gguf-split.")

    def warn_of_unused(self) -> None:
        names = self._values.keys() - self._used
        if unused := sorted(name for name in names if name.startswith(f"{self._architecture}.")):
            logger.warning("These settings in %s are not used: %s", self.path, ", ".join(unused))


_KINDS = {int: "whole number", float: "number", str: "text"}
