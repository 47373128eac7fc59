"""Architecture of a LLaMA-family model, and its Hugging Face spelling in both directions."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from headshare_jax.errors import HeadshareError, one_sentence

logger = logging.getLogger(__name__)

# No count in a file or in memory can be larger.
Count = Annotated[int, Field(gt=0, lt=2**63)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

# Fields of a config.json that change nothing about the function the model computes.
_NEUTRAL = (
    "architectures model_type torch_dtype dtype use_cache transformers_version initializer_range pretraining_tp "
    "_name_or_path is_decoder _attn_implementation auto_map is_llama_config transformers.js_config unsloth_version "
    "unsloth_fixed tokenizer_class model_max_length gradient_checkpointing _from_model_config z_loss_weight "
    "return_dict output_attentions output_hidden_states name_or_path"
)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed to reach past the original context.

    Attributes:
      kind: `linear` (all frequencies divided by `factor`), `dynamic` (NTK: the base grows with the length of the
        sequence beyond `max_position_embeddings`) or `llama3` (long wavelengths divided, short ones kept).
      factor: stretch of the context, >= 1.
      low_freq_factor: `llama3` only; the long wavelength limit is the original context divided by it.
      high_freq_factor: `llama3` only; the short limit likewise. It must be the larger factor.
      original_max_position_embeddings: `llama3` only; the original context.

    Raises:
      HeadshareError: an unknown kind, or a value that is missing, has the wrong type or is out of range.
    """

    kind: Literal["linear", "dynamic", "llama3"]
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Count | None = None

    def __post_init__(self) -> None:
        with one_sentence("a model configuration"):
            _CHECKS[RopeScaling].model_validate(vars(self))
        if self.kind != "llama3":
            return
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is None or high is None or self.original_max_position_embeddings is None:
            raise HeadshareError(
                "llama3 rotary scaling needs low_freq_factor, high_freq_factor and original_max_position_embeddings."
            )
        if low >= high:
            raise HeadshareError(f"low_freq_factor ({low}) must be below high_freq_factor ({high}).")


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a LLaMA-family decoder.

    Attributes:
      vocab_size: V.
      hidden_size: D, the model width.
      intermediate_size: F, the MLP width.
      num_layers: L.
      num_heads: N, query heads.
      num_kv_heads: K, key/value heads; N must be a multiple of K.
      head_dim: H, even; need not be D / N.
      max_position_embeddings: context the model was trained for, in tokens.
      rms_norm_eps: added to the mean square in RMSNorm.
      rope_theta: base of the rotary frequencies.
      rope_scaling: stretch of the rotary frequencies, or None.
      hidden_act: MLP activation, `silu`, `gelu`, `gelu_tanh` or `relu`.
      attention_bias: q, k, v and o projections carry a bias.
      mlp_bias: gate, up and down projections carry a bias.
      tie_word_embeddings: the output head is the embedding.
      normalize_head: rows of the output head are divided by their L2 norm before use (Baichuan-2).
      bos_token_id: token that begins a text, where the model names one.
      eos_token_ids: tokens that end a text.
      pad_token_id: token of padding, where the model names one.
    """

    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_layers: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    max_position_embeddings: Count = 2048
    rms_norm_eps: Positive = 1e-6
    rope_theta: Positive = 10000.0
    rope_scaling: RopeScaling | None = None
    hidden_act: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    normalize_head: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        with one_sentence("a model configuration"):
            _CHECKS[LlamaConfig].model_validate(vars(self))
        if self.num_heads % self.num_kv_heads:
            raise HeadshareError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise HeadshareError(f"head_dim must be even for rotary embeddings, not {self.head_dim}.")
        if self.tie_word_embeddings and self.normalize_head:
            raise HeadshareError("normalize_head needs its own output head, but tie_word_embeddings is true.")

    @property
    def heads_per_unit(self) -> int:
        """G: query heads in one sharing unit (one KV group; 1 in MHA)."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_units(self) -> int:
        """L * U: sharing units in the whole model."""
        return self.num_layers * self.num_kv_heads

    def to_json(self) -> dict[str, Any]:
        """Plain data for `headshare.json`; `from_json` reads it back."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`. Raises HeadshareError on unknown, missing or impossible fields."""
        values = dict(fields)
        try:
            if values.get("rope_scaling") is not None:
                values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
            values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
            return cls(**values)
        except TypeError as error:
            raise HeadshareError(f"The stored model configuration is not usable: {error}.") from error

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Self:
        """Reads the fields of a Hugging Face `config.json` (LlamaForCausalLM or Baichuan).

        Both spellings of rotary settings are read: `rope_theta` with `rope_scaling`, and `rope_parameters`.

        Raises:
          HeadshareError: a field is missing, has the wrong type, or asks for something this model cannot compute.

        Examples:
          >>> fields = json.loads(Path("my-llama/config.json").read_text())
          >>> hs.LlamaConfig.from_hf(fields).heads_per_unit
          2
        """
        architecture, normalize_head = _architecture(fields)
        found = _HuggingFace.read(fields, "config.json")
        rope_theta, rope_scaling = _rope(found)
        found.warn_of_rest(architecture)
        values = {field.name: getattr(found, field.name) for field in fields_of(cls) if field.name in vars(found)}
        values |= {"normalize_head": normalize_head, "rope_theta": rope_theta, "rope_scaling": rope_scaling}
        return cls(**values)

    def to_hf(self) -> dict[str, Any]:
        """Fields of a `LlamaForCausalLM` `config.json`, rotary settings in both spellings.

        `normalize_head` has no such field: whoever writes the weights must write the head already normalised.
        """
        eos = self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None
        scaling: dict[str, Any] | None = None
        if self.rope_scaling is not None:
            set_fields = {name: value for name, value in asdict(self.rope_scaling).items() if value is not None}
            scaling = {"rope_type": set_fields.pop("kind"), **set_fields}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self.rope_theta, **(scaling or {"rope_type": "default"})},
            "hidden_act": "gelu_pytorch_tanh" if self.hidden_act == "gelu_tanh" else self.hidden_act,
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
        }


def _checks(kind: type[Any]) -> type[BaseModel]:
    fields: dict[str, Any] = {field.name: (field.type, ...) for field in fields_of(kind)}
    return create_model(kind.__name__, __config__=ConfigDict(strict=True), **fields)


# What the annotations of a configuration's fields ask for.
_CHECKS = {kind: _checks(kind) for kind in (RopeScaling, LlamaConfig)}


class _Fields(BaseModel):
    """What is read of an object in a `config.json`; `model_extra` is what was not understood."""

    model_config = ConfigDict(strict=True, extra="allow")

    rope_theta: Positive | None = None
    original_max_position_embeddings: Count | None = None
    # Anything but this in one of these changes the function that the model computes.
    attention_dropout: Annotated[float, Field(ge=0, le=0)] = 0
    partial_rotary_factor: Annotated[float, Field(ge=1, le=1)] = 1
    rope_interleaved: Literal[False] = False
    quantization_config: None = None
    sliding_window: None = None
    use_sliding_window: Literal[False] = False
    layer_types: None = None
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


_ROTARY: dict[str, type[_Fields]] = {"default": _Fields, "linear": _Scaled, "dynamic": _Scaled, "llama3": _Llama3}
_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}


class _HuggingFace(_Fields):
    """A Hugging Face `config.json`, by the names of `LlamaConfig` where it has them."""

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
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: Annotated[
        tuple[int, ...],
        BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else (value,)),
        Field(alias="eos_token_id"),
    ] = ()
    pad_token_id: int | None = None


def _architecture(fields: Mapping[str, Any]) -> tuple[str, bool]:
    """The name of the model's class, and whether it normalises its output head."""
    normalizes_head = {"BaichuanForCausalLM": True, "BaiChuanForCausalLM": False, "LlamaForCausalLM": False}
    kind = fields.get("model_type")
    names = fields.get("architectures") or ["LlamaForCausalLM" if kind == "llama" else f"model_type {kind!r}"]
    if not isinstance(names, list):
        raise HeadshareError(f"architectures in config.json must be a list of names, not {names!r}.")
    name = next((name for name in normalizes_head if name in names), None)
    if name is None:
        raise HeadshareError(
            f"The architecture in config.json ({', '.join(map(str, names))}) is not supported; LlamaForCausalLM, "
            "BaichuanForCausalLM (Baichuan-2) and BaiChuanForCausalLM (Baichuan-1) are."
        )
    if name != "LlamaForCausalLM" and fields.get("max_position_embeddings") is None:
        raise HeadshareError(
            f"This {name} has no max_position_embeddings, so it is a 13B with ALiBi positions, which are not "
            "supported; only the rotary Baichuan models are."
        )
    return name, normalizes_head[name]


def _rope(found: _HuggingFace) -> tuple[float, RopeScaling | None]:
    """The base of the rotary frequencies, and their scaling."""
    # Where both spellings are given, transformers too takes the old one.
    where = "rope_scaling" if found.rope_scaling else "rope_parameters"
    fields = found.rope_scaling or found.rope_parameters
    kind: Any = fields.get("rope_type") or fields.get("type") or "default"
    if kind not in list(_ROTARY):
        raise HeadshareError(f"{where} asks for rotary scaling of type {kind!r}; {', '.join(_ROTARY)} are supported.")
    rope = _ROTARY[kind].read(fields | {"type": None, "rope_type": None}, where)
    rope.warn_of_rest(where)
    positions = found.max_position_embeddings
    original = found.original_max_position_embeddings or rope.original_max_position_embeddings or positions
    scaling = None
    if isinstance(rope, _Llama3):
        scaling = RopeScaling("llama3", rope.factor, rope.low_freq_factor, rope.high_freq_factor, original)
    elif isinstance(rope, _Scaled):
        scaling = RopeScaling(kind, rope.factor)
        if original != positions:
            raise HeadshareError(
                f"original_max_position_embeddings ({original}) differs from max_position_embeddings ({positions}), "
                f"which {kind} rotary scaling does not use."
            )
    return rope.rope_theta or found.rope_theta or 10000.0, scaling
