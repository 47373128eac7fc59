"""Architecture of a LLaMA-family model."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, create_model

from headshare_jax import hf_config
from headshare_jax.errors import HeadshareError, one_sentence
from headshare_jax.families import FAMILIES
from headshare_jax.hf_config import Count, Positive, TokenId


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed to reach past the original context.

    Attributes:
      kind: `linear` (all frequencies divided by `factor`), `dynamic` (NTK: the base grows with the length of the
        sequence beyond `max_position_embeddings`), `llama3` (long wavelengths divided, short ones kept), `yarn`
        (likewise, by the turns that a pair makes over the original context) or `longrope` (each divided by a factor of
        its own, for sequences within the original context and beyond it).
      factor: stretch of the context, >= 1.
      low_freq_factor: `llama3` only; the long wavelength limit is the original context divided by it.
      high_freq_factor: `llama3` only; the short limit likewise. It must be the larger factor.
      original_max_position_embeddings: `llama3`, `yarn` and `longrope`; the original context.
      beta_fast: `yarn` only; pairs that turn more often over the original context keep their frequency.
      beta_slow: `yarn` only; pairs that turn less often have it divided by `factor`.
      truncate: `yarn` only; whether both limits are rounded to whole pairs.
      attention_factor: `yarn` and `longrope`; what queries and keys are multiplied by, or None for the papers' value.
      short_factor, long_factor: `longrope` only; divisor of each frequency within and beyond the original context.

    Raises:
      HeadshareError: an unknown kind, or a value that is missing, has the wrong type or is out of range.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"]
    factor: Annotated[float, Field(ge=1, allow_inf_nan=False)]
    low_freq_factor: Positive | None = None
    high_freq_factor: Positive | None = None
    original_max_position_embeddings: Count | None = None
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True
    attention_factor: Positive | None = None
    short_factor: tuple[Positive, ...] = ()
    long_factor: tuple[Positive, ...] = ()

    def __post_init__(self) -> None:
        with one_sentence("a model configuration"):
            _CHECKS[RopeScaling].model_validate(vars(self))
        needed = {
            "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
            "yarn": ("original_max_position_embeddings",),
            "longrope": ("original_max_position_embeddings", "short_factor", "long_factor"),
        }.get(self.kind, ())
        if not all(getattr(self, name) for name in needed):
            raise HeadshareError(f"{self.kind} rotary scaling needs {' and '.join(needed)}.")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and low >= high:
            raise HeadshareError(f"low_freq_factor ({low}) must be below high_freq_factor ({high}).")

    @property
    def scale(self) -> float:
        """What cosines and sines are multiplied by: queries and keys grow, and their products by its square."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn":
            return 1 + 0.1 * math.log(self.factor)
        assert self.original_max_position_embeddings is not None
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))


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
      family: the family of models, by Hugging Face's `model_type`, whose class it is there (`families.FAMILIES`).
      attention_bias: q, k, v and o projections carry a bias; `qkv`: all of them but o.
      mlp_bias: gate, up and down projections carry a bias.
      tie_word_embeddings: the output head is the embedding.
      qk_norm: every query and key head is normalised (RMSNorm) before it turns, with scales of its layer.
      partial_rotary_factor: the part of a head's features that turn, the first of them.
      nope_layers: layers without rotary embedding.
      sliding_window: tokens that a query sees, itself and those before it; None for all.
      full_attention_layers: layers that see all earlier tokens in spite of `sliding_window`.
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
    family: str = "llama"
    attention_bias: bool | Literal["qkv"] = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    partial_rotary_factor: Annotated[float, Field(gt=0, le=1)] = 1.0
    nope_layers: tuple[int, ...] = ()
    sliding_window: Count | None = None
    full_attention_layers: tuple[int, ...] = ()
    normalize_head: bool = False
    bos_token_id: TokenId | None = None
    eos_token_ids: tuple[TokenId, ...] = ()
    pad_token_id: TokenId | None = None

    def __post_init__(self) -> None:
        with one_sentence("a model configuration"):
            _CHECKS[LlamaConfig].model_validate(vars(self))
        if self.num_heads % self.num_kv_heads:
            raise HeadshareError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})."
            )
        if self.head_dim % 2 or self.rotary_dim % 2 or not self.rotary_dim:
            part = "" if self.partial_rotary_factor == 1 else f" and so must its part that turns, {self.rotary_dim}"
            raise HeadshareError(f"head_dim must be even for rotary embeddings, not {self.head_dim}{part}.")
        if self.tie_word_embeddings and self.normalize_head:
            raise HeadshareError("normalize_head needs its own output head, but tie_word_embeddings is true.")
        self._check_family()

    def _check_family(self) -> None:
        if self.family not in FAMILIES:
            raise HeadshareError(f"The family {self.family!r} is not one of {', '.join(FAMILIES)}.")
        family = FAMILIES[self.family]
        for name in _OF_FAMILIES:
            value, usual = getattr(self, name), family.always.get(name, _DEFAULTS[name])
            if value != usual and (name not in family.may or (value == "qkv" and not family.out_bias)):
                raise HeadshareError(
                    f"{name} is {value!r}, but {usual!r} in models of the family {self.family} ({family.architecture})."
                )
        scaling = self.rope_scaling
        if scaling is not None and {len(scaling.short_factor), len(scaling.long_factor)} - {0, self.rotary_dim // 2}:
            raise HeadshareError(f"short_factor and long_factor must have {self.rotary_dim // 2} values each.")

    @property
    def rotary_dim(self) -> int:
        """R: features of a head that turn, the first of them."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The sliding window of every layer; None for one that sees all earlier tokens."""
        full = self.full_attention_layers
        return tuple(None if layer in full else self.sliding_window for layer in range(self.num_layers))

    @property
    def heads_per_unit(self) -> int:
        """G: query heads in one sharing unit (one KV group; 1 in MHA)."""
        return self.num_heads // self.num_kv_heads

    @property
    def num_units(self) -> int:
        """L * U: sharing units in the whole model."""
        return self.num_layers * self.num_kv_heads

    def to_json(self) -> dict[str, Any]:
        """Plain data for `headshare.json`; `from_json` reads it back.

        What a fingerprint of an earlier version did not have is left out where it is the default.
        """
        values = asdict(self)
        if values["rope_scaling"] is not None:
            values["rope_scaling"] = _without_defaults(values["rope_scaling"], RopeScaling, _ROPE_SINCE_0_1)
        return _without_defaults(values, LlamaConfig, _SINCE_0_1)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`. Raises HeadshareError on unknown, missing or impossible fields."""
        try:
            values = _tuples(fields)
            if values.get("rope_scaling") is not None:
                values["rope_scaling"] = RopeScaling(**_tuples(values["rope_scaling"]))
            values["eos_token_ids"] = tuple(values.get("eos_token_ids", ()))
            return cls(**values)
        except (TypeError, ValueError) as error:
            if isinstance(error, HeadshareError):
                raise
            raise HeadshareError(f"The stored model configuration is not usable: {error}.") from error

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> Self:
        """Reads the fields of a Hugging Face `config.json`, of any family of `families.FAMILIES`.

        Baichuan's and InternLM2's are read as Llamas. Both spellings of rotary settings are read: `rope_theta` with
        `rope_scaling`, and `rope_parameters`.

        Raises:
          HeadshareError: a field is missing, has the wrong type, or asks for something this model cannot compute.

        Examples:
          >>> fields = json.loads(Path("my-llama/config.json").read_text())
          >>> hs.LlamaConfig.from_hf(fields).heads_per_unit
          2
        """
        values = hf_config.read(fields)
        if values["rope_scaling"] is not None:
            values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        return cls(**{name: value for name, value in values.items() if name in _DEFAULTS})

    def to_hf(self) -> dict[str, Any]:
        """Fields of the family's own `config.json`, rotary settings in both spellings.

        `normalize_head` has no such field: whoever writes the weights must write the head already normalised.
        """
        return hf_config.written(self)


def _checks(kind: type[Any]) -> type[BaseModel]:
    fields: dict[str, Any] = {field.name: (field.type, ...) for field in fields_of(kind)}
    return create_model(kind.__name__, __config__=ConfigDict(strict=True), **fields)


def _without_defaults(values: dict[str, Any], kind: type[Any], names: tuple[str, ...]) -> dict[str, Any]:
    defaults = {field.name: field.default for field in fields_of(kind)}
    return {name: value for name, value in values.items() if name not in names or value != defaults[name]}


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in dict(fields).items()}


# What the annotations of a configuration's fields ask for.
_CHECKS = {kind: _checks(kind) for kind in (RopeScaling, LlamaConfig)}
_DEFAULTS = {field.name: field.default for field in fields_of(LlamaConfig)}
# Fields that the first version did not have.
_KINDS = ("qk_norm", "partial_rotary_factor", "nope_layers", "sliding_window", "full_attention_layers")
_SINCE_0_1 = ("family", *_KINDS)
# Fields in which families differ.
_OF_FAMILIES = ("attention_bias", "mlp_bias", *_KINDS, "normalize_head")
_ROPE_SINCE_0_1 = ("beta_fast", "beta_slow", "truncate", "attention_factor", "short_factor", "long_factor")
