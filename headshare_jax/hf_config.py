"""The settings of a model as Hugging Face's `config.json` spells them, read and written."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from headshare_jax.errors import HeadshareError, one_sentence
from headshare_jax.families import FAMILIES, SPELLINGS, Family
from headshare_jax.hf_class import architecture, is_fp8, text_model

if TYPE_CHECKING:
    from headshare_jax.config import LlamaConfig

logger = logging.getLogger(__name__)

# No count in a file or in memory can be larger.
Count = Annotated[int, Field(gt=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# Of which -1 stands for none in some; what is beyond a vocabulary is met nowhere.
TokenId = Annotated[int, Field(ge=-1, lt=2**31)]

# Fields that change nothing about the function the model computes.
_NEUTRAL = (
    "architectures model_type torch_dtype dtype use_cache transformers_version initializer_range pretraining_tp "
    "_name_or_path is_decoder _attn_implementation auto_map is_llama_config transformers.js_config unsloth_version "
    "unsloth_fixed tokenizer_class model_max_length gradient_checkpointing _from_model_config z_loss_weight "
    "return_dict output_attentions output_hidden_states name_or_path attn_implementation id2label label2id "
    "quantization_config full_attn_mod interpolate_factor"
)


class _Fields(BaseModel):
    """What is read of an object in a `config.json`; `model_extra` is what was not understood."""

    model_config = ConfigDict(strict=True, extra="allow")

    rope_theta: Positive | None = None
    original_max_position_embeddings: Count | None = None
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] | None = None
    # Anything but this in one of these changes the function that the model computes.
    attention_dropout: Annotated[float, Field(ge=0, le=0)] = 0
    rope_interleaved: Literal[False] = False
    add_cross_attention: Literal[False] = False

    @classmethod
    def read(cls, fields: Mapping[str, Any], where: str) -> Self:
        """The fields, of which null ones are as absent."""
        with one_sentence(where):
            found = cls.model_validate({name: value for name, value in fields.items() if value is not None})
        return found

    def warn_of_rest(self, where: str) -> None:
        rest = sorted(name for name, value in (self.model_extra or {}).items() if value)
        if unknown := [name for name in rest if name not in _NEUTRAL.split()]:
            logger.warning("%s does not use these fields of its configuration: %s", where, ", ".join(unknown))


class _Scaled(_Fields):
    factor: Positive


class _Llama3(_Scaled):
    low_freq_factor: Positive
    high_freq_factor: Positive


class _Yarn(_Fields):
    factor: Positive | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    attention_factor: Positive | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0


class _LongRope(_Fields):
    factor: Positive | None = None
    attention_factor: Positive | None = None
    short_factor: list[Positive]
    long_factor: list[Positive]


_ROTARY: dict[str, type[_Fields]] = {
    "default": _Fields,
    "linear": _Scaled,
    "dynamic": _Scaled,
    "llama3": _Llama3,
    "yarn": _Yarn,
    "longrope": _LongRope,
}
_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


class _Model(_Fields):
    """A whole `config.json`, by the names of `LlamaConfig` where it has them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: Annotated[int, Field(alias="num_hidden_layers")]
    num_heads: Annotated[int, Field(alias="num_attention_heads")]
    num_kv_heads: Annotated[int, Field(alias="num_key_value_heads", default_factory=lambda read: read["num_heads"])]
    head_dim: Annotated[int, Field(default_factory=lambda read: read["hidden_size"] // max(read["num_heads"], 1))]
    max_position_embeddings: int = 2048
    rms_norm_eps: Positive = 1e-6
    rope_scaling: dict[str, Any] = {}
    rope_parameters: dict[str, Any] = {}
    hidden_act: Annotated[
        Literal["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"],
        AfterValidator(lambda name: _ACTIVATIONS.get(name, name)),
    ] = "silu"
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: Count | None = None
    use_sliding_window: bool | None = None
    max_window_layers: int = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Annotated[int, Field(ge=0)] = 0
    bos_token_id: TokenId | None = None
    eos_token_ids: Annotated[
        tuple[TokenId, ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else (value,)),
        Field(alias="eos_token_id"),
    ] = ()
    pad_token_id: TokenId | None = None

    def biases(self, family: Family) -> bool | Literal["qkv"]:
        """Which projections of attention have a bias, as `LlamaConfig` says it."""
        if self.attention_out_bias and not self.attention_bias:
            raise HeadshareError(
                "config.json asks for a bias of o alone (attention_out_bias without attention_bias), which is not read."
            )
        return "qkv" if family.out_bias and self.attention_bias and not self.attention_out_bias else self.attention_bias

    def nope_layers(self) -> tuple[int, ...]:
        """Layers without rotary embedding: where `no_rope_layers` has 0, or every so-many-th."""
        every = self.no_rope_layer_interval
        rotates = self.no_rope_layers or [not every or (layer + 1) % every for layer in range(self._layers)]
        return tuple(layer for layer, turned in enumerate(rotates[: self._layers]) if not turned)

    def window(self, family: Family, nope_layers: tuple[int, ...]) -> tuple[int | None, tuple[int, ...]]:
        """The sliding window, if some layer has it, and the layers that see all earlier tokens in spite of it."""
        kinds = self.layer_types or []
        if family.windows == "all":
            if self.use_sliding_window is False and self.sliding_window is None:
                return None, ()
            if "sliding_attention" in kinds and "full_attention" in kinds:
                raise HeadshareError(
                    f"layer_types in config.json names both kinds of attention, which no {family.architecture} has."
                )
            return self.sliding_window, ()
        if not self.use_sliding_window or self.sliding_window is None:
            return None, ()
        # Where a family leaves layers out of the rotary embedding, it is those that have the window.
        windowed = nope_layers if "nope_layers" in family.may else range(self.max_window_layers, self._layers)
        given = [layer for layer, kind in enumerate(kinds) if kind == "sliding_attention"]
        full = sorted(set(range(self._layers)) - set(given if kinds else windowed))
        return (None, ()) if len(full) == self._layers else (self.sliding_window, tuple(full))

    @property
    def _layers(self) -> int:
        if not 0 < self.num_layers < 2**16:
            raise HeadshareError(f"num_layers in config.json must be from 1 to 65535, not {self.num_layers}.")
        return self.num_layers


def read(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `LlamaConfig`, and others, from those of a `config.json`; `rope_scaling` as those of `RopeScaling`.

    Raises:
      HeadshareError: a field is missing, has the wrong type, or asks for something this model cannot compute.
    """
    fields = text_model(fields)
    kind = architecture(fields)
    is_fp8(fields)
    name = next((name for name, family in FAMILIES.items() if family.architecture == kind), "llama")
    family, spelling = FAMILIES[name], SPELLINGS.get(kind)
    renamed = {} if spelling is None else {new: fields.get(old) for old, new in spelling.renamed.items()}
    given = {field: value for field, value in fields.items() if field not in family.dropouts}
    found = _Model.read({**family.absent, **given, **renamed}, "config.json")
    rope_theta, partial, rope_scaling = _rope(found, name)
    found.warn_of_rest(kind)
    nope_layers = found.nope_layers()
    sliding_window, full_attention_layers = found.window(family, nope_layers)
    return {
        **{field: getattr(found, field) for field in _Model.model_fields},
        "attention_bias": found.biases(family),
        **family.always,
        **({} if spelling is None else spelling.always),
        "family": name,
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "partial_rotary_factor": partial,
        "nope_layers": nope_layers,
        "sliding_window": sliding_window,
        "full_attention_layers": full_attention_layers,
    }


def _rope(found: _Model, family: str) -> tuple[float, float, dict[str, Any] | None]:
    """The base of the rotary frequencies, the part of a head that turns, and the arguments of `RopeScaling`."""
    # Where both spellings are given, transformers too takes the old one.
    where = "rope_scaling" if found.rope_scaling else "rope_parameters"
    fields = found.rope_scaling or found.rope_parameters
    kind: Any = fields.get("rope_type") or fields.get("type") or "default"
    if family == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"
    if kind not in list(_ROTARY):
        raise HeadshareError(f"{where} asks for rotary scaling of type {kind!r}; {', '.join(_ROTARY)} are supported.")
    rope = _ROTARY[kind].read(fields | {"type": None, "rope_type": None}, where)
    rope.warn_of_rest(where)
    positions = found.max_position_embeddings
    original = found.original_max_position_embeddings or rope.original_max_position_embeddings or positions
    scaling: dict[str, Any] | None = None
    if kind != "default":
        own = {name: getattr(rope, name) for name in type(rope).model_fields if name not in _Fields.model_fields}
        mscale, mscale_all = own.pop("mscale", 0.0), own.pop("mscale_all_dim", 0.0)
        scaling = {"kind": kind, **own, "original_max_position_embeddings": original}
        # Older Phi-3s and DeepSeek's YaRN leave out what follows from the context.
        scaling["factor"] = own["factor"] or max(positions / original, 1.0)
        if mscale and mscale_all and own["attention_factor"] is None:
            scaling["attention_factor"] = _mscale(scaling["factor"], mscale) / _mscale(scaling["factor"], mscale_all)
        scaling |= {name: tuple(map(float, value)) for name, value in own.items() if isinstance(value, list)}
    if kind in ("linear", "dynamic"):
        assert scaling is not None
        del scaling["original_max_position_embeddings"]
        if original != positions:
            raise HeadshareError(
                f"original_max_position_embeddings ({original}) differs from max_position_embeddings ({positions}), "
                f"which {kind} rotary scaling does not use."
            )
    partial = rope.partial_rotary_factor or found.partial_rotary_factor or 1.0
    return rope.rope_theta or found.rope_theta or 10000.0, float(partial), scaling


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def written(config: LlamaConfig) -> dict[str, Any]:
    """Fields of the family's own `config.json`, rotary settings in both spellings."""
    family = FAMILIES[config.family]
    eos = config.eos_token_ids[0] if len(config.eos_token_ids) == 1 else list(config.eos_token_ids) or None
    return {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        **_written_rope(config),
        "hidden_act": "gelu_pytorch_tanh" if config.hidden_act == "gelu_tanh" else config.hidden_act,
        **dict.fromkeys(("attention_dropout", *family.dropouts), 0.0),
        **{name: bool(getattr(config, name)) for name in ("attention_bias", "mlp_bias") if name in family.may},
        **({"attention_out_bias": config.attention_bias is True} if family.out_bias else {}),
        **_written_layers(config, family),
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": config.pad_token_id,
        "use_cache": True,
    }


def _written_rope(config: LlamaConfig) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if config.rope_scaling is not None:
        names = [name for name in _ROTARY[config.rope_scaling.kind].model_fields if not name.startswith("mscale")]
        values = asdict(config.rope_scaling)
        scaling = {name: values[name] for name in names if values.get(name) is not None}
        scaling = {"rope_type": config.rope_scaling.kind} | {
            name: list(value) if isinstance(value, tuple) else value for name, value in scaling.items()
        }
    partial = {} if config.partial_rotary_factor == 1 else {"partial_rotary_factor": config.partial_rotary_factor}
    rope = {"rope_theta": config.rope_theta, **(scaling or {"rope_type": "default"}), **partial}
    fields = {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": rope, **partial}
    if config.family == "phi3" and scaling is not None:
        fields["original_max_position_embeddings"] = scaling["original_max_position_embeddings"]
    return fields


def _written_layers(config: LlamaConfig, family: Family) -> dict[str, Any]:
    """What differs between layers."""
    fields: dict[str, Any] = {}
    layers = range(config.num_layers)
    if "nope_layers" in family.may:
        fields["no_rope_layers"] = [int(layer not in config.nope_layers) for layer in layers]
    if family.windows == "all":
        return fields | ({"sliding_window": config.sliding_window} if "sliding_window" in family.may else {})
    kinds = ["full_attention" if window is None else "sliding_attention" for window in config.windows]
    return fields | {
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": [*kinds, "sliding_attention"].index("sliding_attention"),
        "layer_types": kinds,
    }
