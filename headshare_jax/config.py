"""Architecture of a LLaMA-family model, and its Hugging Face spelling in both directions."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as fields_of
from typing import Any, Self

from headshare_jax.errors import HeadshareError

logger = logging.getLogger(__name__)

ROPE_KINDS = ("linear", "dynamic", "llama3")
HIDDEN_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")

_ACTIVATION_FROM_HF = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_ACTIVATION_TO_HF = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}

# Fields of a config.json that change nothing about the function the model computes.
_NEUTRAL = (
    "architectures model_type torch_dtype dtype use_cache transformers_version initializer_range "
    "pretraining_tp _name_or_path _attn_implementation auto_map is_llama_config transformers.js_config "
    "unsloth_version unsloth_fixed tokenizer_class model_max_length gradient_checkpointing _from_model_config "
    "z_loss_weight return_dict output_attentions output_hidden_states name_or_path"
)
_NEUTRAL_FIELDS = frozenset(_NEUTRAL.split())
# Fields that do change it when they hold anything but these values.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "attention_dropout": (0, None),
    "partial_rotary_factor": (1, None),
    "rope_interleaved": (False, None),
    "quantization_config": (None,),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "layer_types": (None,),
    "is_decoder": (True, False, None),
    "add_cross_attention": (False, None),
}


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

    kind: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if self.kind not in ROPE_KINDS:
            raise HeadshareError(f"Rotary scaling {self.kind!r} is not one of {', '.join(ROPE_KINDS)}.")
        if self.factor < 1:
            raise HeadshareError(f"The factor of rotary scaling must be at least 1, not {self.factor}.")
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
      hidden_act: MLP activation, one of `HIDDEN_ACTIVATIONS`.
      attention_bias: q, k, v and o projections carry a bias.
      mlp_bias: gate, up and down projections carry a bias.
      tie_word_embeddings: the output head is the embedding.
      normalize_head: rows of the output head are divided by their L2 norm before use (Baichuan-2).
      bos_token_id: token that begins a text, where the model names one.
      eos_token_ids: tokens that end a text.
      pad_token_id: token of padding, where the model names one.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    normalize_head: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        _check_positive(self, "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads")
        _check_positive(self, "num_kv_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta")
        if self.num_heads % self.num_kv_heads:
            raise HeadshareError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})."
            )
        if self.head_dim % 2:
            raise HeadshareError(f"head_dim must be even for rotary embeddings, not {self.head_dim}.")
        if self.hidden_act not in HIDDEN_ACTIVATIONS:
            raise HeadshareError(f"hidden_act {self.hidden_act!r} is not one of {', '.join(HIDDEN_ACTIVATIONS)}.")
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
        return cls(**_ConfigReader(fields).read())

    def to_hf(self) -> dict[str, Any]:
        """Fields of a `LlamaForCausalLM` `config.json`, rotary settings in both spellings.

        `normalize_head` has no such field: whoever writes the weights must write the head already normalised.
        """
        eos: int | list[int] | None = list(self.eos_token_ids) or None
        if len(self.eos_token_ids) == 1:
            eos = self.eos_token_ids[0]
        scaling = self._rope_scaling_to_hf()
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
            "hidden_act": _ACTIVATION_TO_HF[self.hidden_act],
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
            "use_cache": True,
        }

    def _rope_scaling_to_hf(self) -> dict[str, Any] | None:
        if self.rope_scaling is None:
            return None
        fields = {name: value for name, value in asdict(self.rope_scaling).items() if value is not None}
        return {"rope_type": fields.pop("kind"), **fields}


def _check_types(config: RopeScaling | LlamaConfig) -> None:
    accepted: dict[Any, Any] = {float: int | float, float | None: int | float | None, tuple[int, ...]: tuple}
    for field in fields_of(config):
        value = getattr(config, field.name)
        items = value if isinstance(value, tuple) else ()
        if (
            not isinstance(value, accepted.get(field.type, field.type))
            or (isinstance(value, bool) and field.type is not bool)
            or any(isinstance(item, bool) or not isinstance(item, int) for item in items)
        ):
            kind = field.type.__name__ if isinstance(field.type, type) else field.type
            raise HeadshareError(f"{field.name} of a model configuration must be of type {kind}, not {value!r}.")


def _check_positive(config: RopeScaling | LlamaConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value <= sys.float_info.max:
            raise HeadshareError(f"{name} must be positive, not {value}.")


class _ConfigReader:
    """Takes fields out of a config.json one by one, so that what is left over was not understood."""

    def __init__(self, fields: Mapping[str, Any]):
        self.left = dict(fields)

    def read(self) -> dict[str, Any]:
        architecture, baichuan2 = self._architecture()
        hidden_size = self._int("hidden_size")
        num_heads = self._int("num_attention_heads")
        values: dict[str, Any] = {
            "hidden_size": hidden_size,
            "num_heads": num_heads,
            "num_kv_heads": self._int("num_key_value_heads", num_heads),
            "head_dim": self._int("head_dim", hidden_size // max(num_heads, 1)),
            "vocab_size": self._int("vocab_size"),
            "intermediate_size": self._int("intermediate_size"),
            "num_layers": self._int("num_hidden_layers"),
            "max_position_embeddings": self._int("max_position_embeddings", None if baichuan2 else 2048),
            "rms_norm_eps": self._float("rms_norm_eps", 1e-6),
            "attention_bias": self._bool("attention_bias"),
            "mlp_bias": self._bool("mlp_bias"),
            "tie_word_embeddings": self._bool("tie_word_embeddings"),
            "normalize_head": baichuan2,
            "hidden_act": self._activation(),
            "bos_token_id": self._token("bos_token_id"),
            "pad_token_id": self._token("pad_token_id"),
            "eos_token_ids": self._tokens("eos_token_id"),
        }
        values["rope_theta"], values["rope_scaling"] = self._rope(values["max_position_embeddings"])
        self._check_rest(architecture)
        return values

    def _architecture(self) -> tuple[str, bool]:
        names = self.left.get("architectures") or []
        if not isinstance(names, list):
            raise HeadshareError(f"architectures in config.json must be a list of names, not {names!r}.")
        model_type = self.left.get("model_type")
        for name, normalizes_head in (("BaichuanForCausalLM", True), ("BaiChuanForCausalLM", False)):
            if name in names and "max_position_embeddings" not in self.left:
                raise HeadshareError(
                    f"This {name} has no max_position_embeddings, so it is a 13B with ALiBi positions, which are not "
                    "supported; only the rotary Baichuan models are."
                )
            if name in names:
                return name, normalizes_head
        if "LlamaForCausalLM" in names or (not names and model_type == "llama"):
            return "LlamaForCausalLM", False
        found = ", ".join(map(str, names)) or f"model_type {model_type!r}"
        raise HeadshareError(
            f"The architecture in config.json ({found}) is not supported; LlamaForCausalLM, BaichuanForCausalLM "
            "(Baichuan-2) and BaiChuanForCausalLM (Baichuan-1) are."
        )

    def _rope(self, max_positions: int) -> tuple[float, RopeScaling | None]:
        theta = self._float("rope_theta", 10000.0)
        old, new = self.left.pop("rope_scaling", None), self.left.pop("rope_parameters", None)
        for name, value in (("rope_scaling", old), ("rope_parameters", new)):
            if value is not None and not isinstance(value, Mapping):
                raise HeadshareError(f"{name} in config.json must be an object, not {value!r}.")
        # Where both are given, transformers too takes the old one.
        name, fields = ("rope_scaling", dict(old)) if old else ("rope_parameters", dict(new or {}))
        outer = self._int("original_max_position_embeddings", 0)
        rope = _ConfigReader(fields)
        theta = rope._float("rope_theta", theta)
        old_kind = rope.left.pop("type", None)
        kind = rope.left.pop("rope_type", None) or old_kind or "default"
        if kind not in ("default", *ROPE_KINDS):
            raise HeadshareError(
                f"{name} asks for rotary scaling of type {kind!r}; default, linear, dynamic and llama3 are supported."
            )
        scaling = None
        if kind != "default":
            factor = rope._float("factor")
            original = outer or rope._int("original_max_position_embeddings", max_positions)
            if kind == "llama3":
                scaling = RopeScaling(
                    kind, factor, rope._float("low_freq_factor"), rope._float("high_freq_factor"), original
                )
            elif original != max_positions:
                raise HeadshareError(
                    f"original_max_position_embeddings ({original}) differs from max_position_embeddings "
                    f"({max_positions}), which {kind} rotary scaling does not use."
                )
            else:
                scaling = RopeScaling(kind, factor)
        rope.left.pop("original_max_position_embeddings", None)
        rope._check_rest(name)
        return theta, scaling

    def _check_rest(self, where: str) -> None:
        for name, allowed in _REQUIRED_VALUES.items():
            value = self.left.pop(name, None)
            if value not in allowed:
                raise HeadshareError(f"{name} = {value!r} in {where} is not supported; it must be {allowed[0]!r}.")
        unknown = sorted(name for name, value in self.left.items() if name not in _NEUTRAL_FIELDS and value)
        if unknown:
            logger.warning("%s does not use these fields of its configuration: %s", where, ", ".join(unknown))

    def _take(self, name: str, default: Any, kinds: tuple[type, ...], wanted: str) -> Any:
        value = self.left.pop(name, None)
        if value is None:
            value = default
        if value is None:
            raise HeadshareError(f"config.json has no {name}; it is not a complete model configuration.")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise HeadshareError(f"{name} in config.json must be {wanted}, not {value!r}.")
        return value

    def _int(self, name: str, default: int | None = None) -> int:
        return int(self._take(name, default, (int,), "a whole number"))

    def _float(self, name: str, default: float | None = None) -> float:
        value = self._take(name, default, (int, float), "a number")
        if not 0 < value <= sys.float_info.max:
            raise HeadshareError(f"{name} in config.json must be a positive number, not {value}.")
        return float(value)

    def _bool(self, name: str) -> bool:
        return bool(self._take(name, False, (bool,), "true or false"))

    def _token(self, name: str) -> int | None:
        value = self.left.pop(name, None)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        raise HeadshareError(f"{name} in config.json must be a token id or null, not {value!r}.")

    def _tokens(self, name: str) -> tuple[int, ...]:
        value = self.left.get(name)
        if not isinstance(value, list):
            token = self._token(name)
            return () if token is None else (token,)
        self.left.pop(name)
        if not all(isinstance(token, int) for token in value):
            raise HeadshareError(f"{name} in config.json must be token ids, not {value!r}.")
        return tuple(value)

    def _activation(self) -> str:
        name = self._take("hidden_act", "silu", (str,), "a name")
        if name not in _ACTIVATION_FROM_HF:
            raise HeadshareError(
                f"hidden_act {name!r} is not supported; these are: {', '.join(sorted(_ACTIVATION_FROM_HF))}."
            )
        return _ACTIVATION_FROM_HF[name]
