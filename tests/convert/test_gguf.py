"""GGUF files: configuration, dequantised weights and logits against transformers and the gguf package."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from support import hf_logits, jax_logits, random_tokens, tiny_hf_model
from support_gguf import Kind, adjacent_pairs, gguf_name, write_gguf

import headshare_jax
from headshare_jax import HeadshareError, LlamaConfig, RopeScaling, parameters
from headshare_jax.rope import inverse_frequencies
from headshare_jax.sharing.source import assemble

# Wide enough for one block of the coarsest types.
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}


def can(operation: Callable[[np.ndarray, Kind], np.ndarray], kind: Kind, data: np.ndarray) -> bool:
    try:
        operation(data, kind)
    except NotImplementedError:
        return False
    return True


def block_bytes(kind: Kind) -> int:
    return gguf.GGML_QUANT_SIZES[kind][1]


DEQUANTISABLE = [kind for kind in Kind if can(gguf.dequantize, kind, np.zeros((1, block_bytes(kind)), np.uint8))]
QUANTISABLE = [kind for kind in DEQUANTISABLE if can(gguf.quantize, kind, np.zeros((1, 256), np.float32))]


def stored_as(kind: Kind) -> Callable[[np.ndarray], tuple[np.ndarray, Kind]]:
    """Quantised values; for a type that can only be dequantised, random bytes that mean small finite values."""
    if kind in QUANTISABLE:
        return lambda values: (gguf.quantize(values, kind), kind)
    rng = np.random.default_rng(0)
    candidates = rng.integers(0, 256, (50_000, block_bytes(kind))).astype(np.uint8)
    with np.errstate(all="ignore"):
        largest = np.abs(gguf.dequantize(candidates, kind)).max(axis=1)
    blocks = candidates[np.isfinite(largest) & (largest < 0.5)]
    assert len(blocks) > 100

    def store(values: np.ndarray) -> tuple[np.ndarray, Kind]:
        rows, blocks_in_row = len(values), values.shape[1] // gguf.GGML_QUANT_SIZES[kind][0]
        return blocks[rng.integers(0, len(blocks), (rows, blocks_in_row))].reshape(rows, -1), kind

    return store


def half_split(name: str, tensor: np.ndarray, config: Any) -> np.ndarray:
    """Inverse of `adjacent_pairs`."""
    order = adjacent_pairs(name, np.arange(len(tensor)), config)
    restored = np.empty_like(tensor)
    restored[order] = tensor
    return restored


def as_transformers_reads(path: Path, model: Any) -> Any:
    """The model with the weights that the gguf package dequantises out of the file."""
    tensors = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }
    state = {
        name: torch.tensor(half_split(name, tensors[gguf_name(name)], model.config))
        for name in model.state_dict()
        if not (name == "lm_head.weight" and model.config.tie_word_embeddings)
    }
    model.load_state_dict(state, strict=not model.config.tie_word_embeddings)
    return model


def check_logits(path: Path, reference: Any) -> None:
    tokens = random_tokens((2, 40))
    expected = hf_logits(reference, tokens)
    actual = jax_logits(headshare_jax.load(path, dtype="float32"), tokens)
    assert np.abs(actual - expected).max() < 2e-5 * np.abs(expected).max()


def check_same(path: Path, reference: Any) -> None:
    """The file's configuration and weights are those of the transformers model."""
    reference.save_pretrained(path.parent / "reference")
    expected, actual = (headshare_jax.open_checkpoint(place) for place in (path.parent / "reference", path))
    assert actual.config == expected.config
    for name in parameters.parameter_names(expected.config):
        assert np.array_equal(assemble(actual, name), assemble(expected, name)), name


@pytest.mark.parametrize("kind", DEQUANTISABLE, ids=lambda kind: kind.name)
def test_every_type_gives_the_values_of_the_gguf_package(tmp_path: Path, kind: Kind) -> None:
    model = tiny_hf_model(**WIDE)
    path = write_gguf(tmp_path / "model.gguf", model, store=stored_as(kind))
    source = headshare_jax.open_checkpoint(path)
    tensors = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(path).tensors
    }
    plain = {Kind.F32: np.float32, Kind.F16: np.float16, Kind.BF16: ml_dtypes.bfloat16}
    assert source.dtype("down_lfd") == plain.get(kind, np.float32)
    assert np.array_equal(source.read("down_lfd", 0), tensors["blk.0.ffn_down.weight"].T)
    assert np.array_equal(source.read("embed_vd"), tensors["token_embd.weight"])
    check_logits(path, as_transformers_reads(path, model))


def test_a_type_that_is_not_written_is_kept_where_nothing_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(**WIDE), store=stored_as(Kind.Q4_K))
    source = headshare_jax.open_checkpoint(path)
    donor, score = np.array([[0, 0]]), np.array([[np.nan, 0.5]])
    view = headshare_jax.SharedView(source, headshare_jax.SharingMap(donor, score, 2, tie="q"))
    headshare_jax.save(view, tmp_path / "shared.gguf", to="gguf")
    before, after = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors} for file in (path, tmp_path / "shared.gguf")
    )
    changed = "blk.0.attn_q.weight"
    assert after[changed].tensor_type == Kind.Q8_0
    assert f"{changed} changed, and q4_k cannot be written" in caplog.text
    for name in before.keys() - {changed}:
        assert after[name].tensor_type == before[name].tensor_type
        assert np.array_equal(after[name].data, before[name].data)


@pytest.mark.parametrize("kind", sorted(set(Kind) - set(DEQUANTISABLE)), ids=lambda kind: kind.name)
def test_a_type_that_cannot_be_dequantised_is_refused(tmp_path: Path, kind: Kind) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]

    def store(values: np.ndarray) -> tuple[np.ndarray, Kind]:
        return np.zeros((len(values), values.shape[1] // block * size), np.uint8), kind

    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(**WIDE), store=store)
    with pytest.raises(HeadshareError, match=r"not float32, float16 or bfloat16.*token_embd\.weight"):
        headshare_jax.open_checkpoint(path)


@pytest.mark.parametrize(
    "overrides",
    [
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"tie_word_embeddings": True},
        {"head_dim": 32},
        {"head_dim": 8},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ],
    ids=lambda overrides: next(iter(overrides)),
)
def test_architectures(tmp_path: Path, overrides: dict[str, Any]) -> None:
    model = tiny_hf_model(**overrides)
    path = write_gguf(tmp_path / "model.gguf", model)
    check_same(path, model)


def test_metadata_that_may_be_absent(tmp_path: Path) -> None:
    model = tiny_hf_model(num_key_value_heads=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    heads = ("attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count")
    drop = [f"llama.{name}" for name in ("vocab_size", *heads, "rope.freq_base")]
    drop += ["tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"]
    path = write_gguf(tmp_path / "model.gguf", model, drop=tuple(drop))
    config = headshare_jax.open_checkpoint(path).config
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (None, (), None)
    assert replace(config, bos_token_id=1, eos_token_ids=(2,)) == LlamaConfig.from_hf(model.config.to_dict())


def test_special_tokens(tmp_path: Path) -> None:
    extra = {"tokenizer.ggml.eot_token_id": 7, "tokenizer.ggml.padding_token_id": 5}
    config = headshare_jax.open_checkpoint(write_gguf(tmp_path / "model.gguf", tiny_hf_model(), metadata=extra)).config
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2, 7), 5)


def test_layers_of_different_types_are_held_in_one_that_is_exact(tmp_path: Path) -> None:
    kinds = iter([Kind.F16, Kind.BF16] * 20)

    def store(values: np.ndarray) -> tuple[np.ndarray, Kind]:
        kind = next(kinds)
        return gguf.quantize(values, kind), kind

    model = tiny_hf_model()
    path = write_gguf(tmp_path / "model.gguf", model, store=store)
    assert headshare_jax.open_checkpoint(path).dtype("q_pool_pdh") == np.float32
    check_same(path, as_transformers_reads(path, model))


def scaled_model(scaling: dict[str, Any]) -> Any:
    theta = 5e5 if scaling["rope_type"] == "llama3" else 1e4
    return tiny_hf_model(head_dim=32, rope_parameters={"rope_theta": theta} | scaling)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequency_scaling(tmp_path: Path, factor: float) -> None:
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    model = scaled_model(scaling | {"original_max_position_embeddings": 8192})
    unscaled = model.config.rope_parameters["rope_theta"] ** -(np.arange(0, 32, 2) / 32)
    divisors = unscaled / model.model.rotary_emb.inv_freq.numpy()
    path = write_gguf(tmp_path / "model.gguf", model, rope_divisors=divisors)
    config = headshare_jax.open_checkpoint(path).config
    assert config.rope_scaling == RopeScaling("llama3", factor, 1.0, 4.0, 8192)
    assert np.allclose(inverse_frequencies(config, 1), model.model.rotary_emb.inv_freq.numpy(), rtol=1e-6, atol=0)
    check_logits(path, model)


def test_another_frequency_scaling_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(), rope_divisors=np.linspace(1, 2, 8))
    with pytest.raises(HeadshareError, match=r"rope_freqs\.weight .* is not Llama 3.1's"):
        headshare_jax.open_checkpoint(path)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
    ids=["present key", "old key"],
)
def test_linear_scaling(tmp_path: Path, metadata: dict[str, Any]) -> None:
    model = scaled_model({"rope_type": "linear", "factor": 4.0})
    path = write_gguf(tmp_path / "model.gguf", model, metadata=metadata)
    assert headshare_jax.open_checkpoint(path).config.rope_scaling == RopeScaling("linear", 4.0)
    check_same(path, model)


def test_no_scaling_by_name(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(), metadata=metadata)
    assert headshare_jax.open_checkpoint(path).config.rope_scaling is None


@pytest.mark.parametrize("tied", [False, True])
def test_gguf_to_native_to_hf_to_native_keeps_every_bit(tmp_path: Path, tied: bool) -> None:
    model = tiny_hf_model(attention_bias=True, tie_word_embeddings=tied, hidden_size=128)
    path = write_gguf(tmp_path / "model.gguf", model, store=stored_as(Kind.Q4_1))
    first = headshare_jax.open_checkpoint(path)
    headshare_jax.save(first, tmp_path / "native")
    headshare_jax.save(headshare_jax.open_checkpoint(tmp_path / "native"), tmp_path / "hf", to="hf")
    headshare_jax.save(headshare_jax.open_checkpoint(tmp_path / "hf"), tmp_path / "again")
    last = headshare_jax.open_checkpoint(tmp_path / "again")
    assert last.config == first.config
    for name in parameters.parameter_names(first.config):
        one, other = assemble(first, name), assemble(last, name)
        assert one.dtype == other.dtype
        assert one.tobytes() == other.tobytes(), name
    exported: Any = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf")
    assert np.array_equal(
        hf_logits(exported.eval(), random_tokens((1, 9))),
        hf_logits(as_transformers_reads(path, model), random_tokens((1, 9))),
    )


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "sets llama.expert_count to 8, which is not supported"),
        ({"llama.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale"),
        ({"llama.rope.scaling.type": "alibi"}, "'alibi' rope scaling"),
        ({"llama.attention.head_count_kv": [2, 1, 2]}, "head_count_kv .* must be one whole number, not a list"),
        ({"llama.feed_forward_length": [96, 96, 64]}, "feed_forward_length .* must be one whole number, not a list"),
        ({"llama.block_count": "three"}, "block_count .* must be one whole number, not 'three'"),
        ({"llama.block_count": True}, "block_count .* must be one whole number, not True"),
        ({"llama.block_count": 4}, r"missing: blk\.3\.attn_norm\.weight"),
        ({"llama.block_count": 2}, r"unexpected: blk\.2\.attn_q\.weight"),
        ({"llama.block_count": 4_000_000_000}, "asks for 4000000000 layers"),
        ({"llama.rope.dimension_count": 8}, "partial_rotary_factor is 0.5, but 1.0 in models of the family llama"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps .* must be a finite number"),
        ({"llama.rope.freq_base": -1.0}, "rope_theta .* must be greater than 0"),
        ({"llama.vocab_size": 161}, r"token_embd.weight has shape \[160, 64\] instead of \[161, 64\]"),
        ({"split.count": 3}, "one part of a split model"),
    ],
    ids=str,
)
def test_unsupported_settings_are_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(), metadata=metadata)
    with pytest.raises(HeadshareError, match=message):
        headshare_jax.open_checkpoint(path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(), architecture="gemma2")
    with pytest.raises(HeadshareError, match=r"architecture 'gemma2'; of GGUF files, llama, .* are supported"):
        headshare_jax.open_checkpoint(path)


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(), drop=("llama.block_count",))
    with pytest.raises(HeadshareError, match=r"has no llama\.block_count"):
        headshare_jax.open_checkpoint(path)


def test_settings_that_are_not_used_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model(), metadata={"llama.novelty": 1})
    headshare_jax.open_checkpoint(path)
    assert "are not used: llama.novelty" in caplog.text


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model())
    content = path.read_bytes()
    for length in (0, 3, 20, 400, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(HeadshareError, match="is truncated, corrupt or no GGUF file"):
            headshare_jax.open_checkpoint(path)


@pytest.mark.parametrize("version", [1, 4, 3 << 24])
def test_another_version_or_byte_order_is_refused(tmp_path: Path, version: int) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny_hf_model())
    content = bytearray(path.read_bytes())
    content[4:8] = version.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(HeadshareError, match="another version or byte order"):
        headshare_jax.open_checkpoint(path)
