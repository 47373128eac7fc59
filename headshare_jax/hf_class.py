"""Which class of models a Hugging Face `config.json` describes, and why it is refused where it is."""

from collections.abc import Mapping
from typing import Any

from headshare_jax.errors import HeadshareError
from headshare_jax.families import FAMILIES, SPELLINGS

KNOWN = (*(family.architecture for family in FAMILIES.values()), *SPELLINGS)
# Fields that other models have, and what they ask for.
_BEYOND = {
    "kv_lora_rank": "latent attention (MLA)",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "final_logit_softcapping": "capped logits",
    "query_pre_attn_scalar": "attention scores with a scale of their own",
    "embedding_multiplier": "scaled embeddings",
    "logit_scale": "scaled logits",
    "vision_config": "images beside text",
    "audio_config": "sound beside text",
    "is_encoder_decoder": "an encoder",
}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_SCHEMES = {"gptq": "GPTQ", "awq": "AWQ", "bitsandbytes": "bitsandbytes"}


def architecture(fields: Mapping[str, Any]) -> str:
    """The name of the model's class, one of `KNOWN`.

    Raises:
      HeadshareError: it is another one.
    """
    kind = fields.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    names = fields.get("architectures") or [f"model_type {kind!r}" if family is None else family.architecture]
    if not isinstance(names, list):
        raise HeadshareError(f"architectures in config.json must be a list of names, not {names!r}.")
    name = next((name for name in KNOWN if name in names), None)
    if name is None:
        raise HeadshareError(
            f"The architecture in config.json ({', '.join(map(str, names))}) is not supported{_reason(fields)}; "
            f"{', '.join(KNOWN)} are."
        )
    if "aichuan" in name.lower() and fields.get("max_position_embeddings") is None:
        raise HeadshareError(
            f"This {name} has no max_position_embeddings, so it is a 13B with ALiBi positions, which are not "
            "supported; only the rotary Baichuan models are."
        )
    return name


def _reason(fields: Mapping[str, Any]) -> str:
    """What in a configuration is beyond the supported models."""
    inner = fields.get("text_config")
    text = inner if isinstance(inner, dict) else {}
    found = [f"{name} asks for {what}" for name, what in _BEYOND.items() if fields.get(name) or text.get(name)]
    if "gemma" in str(fields.get("model_type")):
        found.insert(0, "Gemma's norms and scaled embeddings are not Llama's")
    if text:
        found.append(f"the text model inside is of model_type {text.get('model_type')!r}")
    return f" ({', '.join(found)})" if found else ""


def is_multimodal(fields: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a model of several kinds of data whose text model is of a known family."""
    inner, names = fields.get("text_config"), fields.get("architectures") or []
    return isinstance(inner, dict) and inner.get("model_type") in list(FAMILIES) and not set(KNOWN) & {*map(str, names)}


def text_model(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """The configuration of the text model: that inside a multimodal one, or the whole."""
    if not is_multimodal(fields):
        return fields
    from transformers import AutoConfig

    inner: dict[str, Any] = fields["text_config"]
    # Inside a multimodal model's, transformers wrote nothing that is its default.
    defaults = AutoConfig.for_model(inner["model_type"])
    sizes = {name: getattr(defaults, name) for name in _SIZES}
    outer = {name: fields[name] for name in ("tie_word_embeddings", "quantization_config", "dtype") if name in fields}
    return {**sizes, **inner, **outer, "architectures": [FAMILIES[inner["model_type"]].architecture]}


def is_fp8(fields: Mapping[str, Any]) -> bool:
    """Whether weights are stored as FP8 numbers with scales.

    Raises:
      HeadshareError: they are quantised in another way.
    """
    scheme = fields.get("quantization_config")
    if scheme is None:
        return False
    if not isinstance(scheme, dict):
        raise HeadshareError(f"quantization_config in config.json must be an object, not {scheme!r:.99}.")
    method, form = (
        scheme.get("quant_method", "bitsandbytes" if "load_in_4bit" in scheme else None),
        scheme.get("format"),
    )
    if method in ("fp8", "fbgemm_fp8") or (method == "compressed-tensors" and form == "float-quantized"):
        return True
    name = _SCHEMES.get(str(method), f"{method} ({form})" if form else str(method))
    raise HeadshareError(
        f"The weights are quantised with {name}, as quantization_config in config.json says, which is not read; give "
        "the checkpoint that they were quantised from, which its model card names."
    )
