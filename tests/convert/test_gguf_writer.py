"""GGUF files that are written: read back the same, and as llama.cpp expects them."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import jax_logits, random_model, random_tokens, sharing_by_hand, tiny_model
from support_gguf import Kind

import headshare_jax as hs
from headshare_jax import HeadshareError, LlamaConfig, RopeScaling, parameters
from headshare_jax.convert import gguf_settings, keys
from headshare_jax.convert.gguf_header import GgufHeader, read_header
from headshare_jax.sharing.source import WeightSource, assemble
from headshare_jax.sharing.view import DenseView

LONG = RopeScaling(
    "longrope", 4.0, original_max_position_embeddings=32,
    short_factor=tuple(1 + 0.1 * i for i in range(6)), long_factor=tuple(2.0 + i for i in range(6)),
)  # fmt: skip
BASE = LlamaConfig(
    vocab_size=160, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=16,
    max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1, eos_token_ids=(2, 5, 7),
)  # fmt: skip
# A model of every architecture that llama.cpp has for one of ours, and each of its settings.
MODELS: dict[str, LlamaConfig] = {
    "llama": BASE,
    "tied": replace(BASE, tie_word_embeddings=True),
    "biases": replace(BASE, attention_bias=True, mlp_bias=True),
    "linear": replace(BASE, rope_scaling=RopeScaling("linear", 3.0)),
    "llama3": replace(BASE, head_dim=32, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 32)),
    "yarn": replace(BASE, rope_scaling=RopeScaling("yarn", 4.0, original_max_position_embeddings=32, beta_fast=16.0)),
    "mistral": replace(BASE, family="mistral", sliding_window=8),
    "qwen2": replace(BASE, family="qwen2", attention_bias="qkv", sliding_window=8, full_attention_layers=(0,)),
    "qwen3": replace(BASE, family="qwen3", qk_norm=True, head_dim=32),
    "phi3": replace(BASE, family="phi3", partial_rotary_factor=0.75, rope_scaling=LONG),
    "smollm3": replace(BASE, family="smollm3", num_layers=4, nope_layers=(3,)),
    "seed_oss": replace(BASE, family="seed_oss", attention_bias="qkv"),
    "seed_oss, no biases": replace(BASE, family="seed_oss", tie_word_embeddings=True),
}


def write(source: WeightSource, path: Path, **options: Any) -> Path:
    hs.save(source, path, to="gguf", overwrite=True, **options)
    return path


def check_same(one: WeightSource, other: WeightSource) -> None:
    assert one.config == other.config
    for name in parameters.parameter_names(one.config):
        assert np.array_equal(assemble(one, name), assemble(other, name)), name


def contents(path: Path) -> dict[str, bytes]:
    data = path.read_bytes()
    return {
        name: data[tensor.offset : tensor.offset + tensor.size] for name, tensor in read_header(path).tensors.items()
    }


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_gguf_to_native_to_gguf_keeps_every_bit(tmp_path: Path, name: str, dtype: str) -> None:
    model = random_model(MODELS[name], dtype=dtype)
    first = write(model, tmp_path / "first.gguf")
    source = hs.open_checkpoint(first)
    check_same(source, model)
    hs.save(source, tmp_path / "native")
    again = write(hs.open_checkpoint(tmp_path / "native"), tmp_path / "again.gguf")
    assert contents(again) == contents(first)
    assert read_header(again).tensors.keys() == read_header(first).tensors.keys()
    kinds = {"float32": Kind.F32, "float16": Kind.F16, "bfloat16": Kind.BF16}
    assert {tensor.kind for tensor in read_header(again).tensors.values()} == {Kind.F32, kinds[dtype]}


@pytest.mark.parametrize("name", MODELS)
def test_tensors_have_the_names_that_llama_cpp_reads(name: str) -> None:
    architecture = gguf_settings.architecture_of(MODELS[name])
    of_name = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[of_name[architecture]]}
    written = keys.tensors(keys.GGUF[architecture], MODELS[name])
    assert {re.sub(r"^blk\.\d+", "blk.{bid}", tensor.rpartition(".")[0]) for tensor in written} <= known


@pytest.mark.parametrize("name", MODELS)
def test_settings_are_told_to_llama_cpp_too(tmp_path: Path, name: str) -> None:
    """What is read without this library's own entries is what llama.cpp can say of the model."""
    config = MODELS[name]
    header = read_header(write(random_model(config), tmp_path / "model.gguf"))
    path = rewritten(header, tmp_path / "foreign.gguf", drop=("headshare.config",))
    said = replace(config, eos_token_ids=(2, 5), full_attention_layers=())
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        with pytest.raises(HeadshareError, match=r"is not Llama 3\.1's"):
            hs.open_checkpoint(path)
        return
    read = hs.open_checkpoint(path).config
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        assert read.rope_scaling is not None
        assert np.allclose(read.rope_scaling.short_factor, LONG.short_factor)
        assert np.isclose(read.rope_scaling.scale, LONG.scale)
        said = replace(said, rope_scaling=read.rope_scaling)
    assert read == said


def rewritten(
    header: GgufHeader, path: Path, *, drop: tuple[str, ...] = (), metadata: dict[str, Any] | None = None
) -> Path:
    """A file with other metadata."""
    reader = gguf.GGUFReader(header.path)
    writer = gguf.GGUFWriter(path, header.metadata["general.architecture"])
    kept = {name: value for name, value in header.metadata.items() if name not in drop}
    for name, value in (kept | (metadata or {})).items():
        if name != "general.architecture":
            kind, item = header.types.get(name, (gguf.GGUFValueType.get_type(value), None))
            writer.add_key_value(name, value, kind, item)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.asarray(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_setting_that_was_changed_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    header = read_header(write(random_model(BASE), tmp_path / "model.gguf"))
    changed = {"llama.context_length": 512, "tokenizer.ggml.eos_token_id": 9}
    config = hs.open_checkpoint(rewritten(header, tmp_path / "changed.gguf", metadata=changed)).config
    assert config == replace(BASE, max_position_embeddings=512, eos_token_ids=(9, 5))
    assert "llama.context_length" in caplog.text


@pytest.mark.parametrize("quantize", ["Q8_0", "q4_0", "q4_1", "q5_0", "q5_1"])
def test_quantised_values_are_those_of_the_gguf_package(tmp_path: Path, quantize: str) -> None:
    config = replace(BASE, tie_word_embeddings=True)
    model = random_model(config)
    path = write(model, tmp_path / "model.gguf", quantize=quantize)
    kind = Kind[quantize.upper()]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {tensors[name].tensor_type for name in tensors if name.endswith("norm.weight")} == {Kind.F32}
    assert tensors["token_embd.weight"].tensor_type == Kind.Q8_0
    assert tensors["blk.1.attn_q.weight"].tensor_type == kind
    down = np.ascontiguousarray(model.read("down_lfd", 1).T)
    expected = gguf.dequantize(gguf.quantize(down, kind), kind)
    source = hs.open_checkpoint(path)
    assert np.array_equal(source.read("down_lfd", 1), expected.T)
    # Written again from the file, nothing changes; from its values alone, no more than by the rounding of a scale.
    assert contents(write(source, tmp_path / "again.gguf")) == contents(path)
    hs.save(source, tmp_path / "native")
    native = hs.open_checkpoint(tmp_path / "native")
    twice = hs.open_checkpoint(write(native, tmp_path / "twice.gguf", quantize=quantize))
    error, first = (np.abs(twice.read("down_lfd", 1) - expected.T).max(), np.abs(down - expected).max())
    assert error < 1e-2 * first
    fields = gguf.GGUFReader(path).fields
    assert fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind.name}"]


def test_types_of_a_quantised_file_are_kept_where_it_changes(tmp_path: Path) -> None:
    model = random_model(replace(BASE, num_kv_heads=4, head_dim=32))
    source = hs.open_checkpoint(write(model, tmp_path / "model.gguf", quantize="q4_1"))
    sharing = sharing_by_hand(model, "qkv", {5: 1})
    view = hs.SharedView(source, sharing, check_source=False)
    shared = hs.open_checkpoint(write(view, tmp_path / "shared.gguf"))
    before, after = (read_header(place.path).tensors for place in (source, shared))
    assert {name: tensor.kind for name, tensor in before.items()} == {
        name: tensor.kind for name, tensor in after.items()
    }
    check_same(shared, DenseView(view))


@pytest.mark.parametrize("tie", ["qkv", "mixed"])
def test_a_map_that_shares_is_written_out_and_said_so(
    tmp_path: Path, tie: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model()
    shared = hs.share(model, sharing_by_hand(model, tie, {3: 0}))
    path = write(shared, tmp_path / "model.gguf")
    assert "holds every head" in caplog.text
    source, metadata = hs.open_checkpoint(path), read_header(path).metadata
    assert source.sharing is None
    check_same(source, DenseView(shared))
    assert metadata["general.architecture"] == "llama"
    assert metadata["general.name"] == "model (expanded)"
    assert "the file holds every head" in metadata["general.description"]
    assert hs.SharingMap.from_json(metadata["headshare.map"]) == shared.sharing


@pytest.mark.parametrize("dropped", [(1,), (0, 1), (2, 3), (4, 5), (0, 1, 2, 3, 5)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_dropped_heads_are_left_out(tmp_path: Path, dropped: tuple[int, ...], bias: bool) -> None:
    model = tiny_model(attention_bias=bias)
    pruned = hs.share(model, sharing_by_hand(model, "qkv", {}, dropped))
    path = write(pruned, tmp_path / "model.gguf")
    header, source = read_header(path), hs.open_checkpoint(path)
    assert source.sharing == pruned.sharing
    check_same(source, pruned)
    check_same(DenseView(source), DenseView(pruned))
    heads = header.metadata["deci.attention.head_count"]
    kept = [2 - sum(layer * 2 <= unit < layer * 2 + 2 for unit in dropped) for layer in range(3)]
    expected = [2 * (count or (layer == 0 or bias)) for layer, count in enumerate(kept)]
    assert heads == expected
    assert [header.tensors[f"blk.{layer}.attn_q.weight"].shape[0] for layer in range(3) if heads[layer]] == [
        16 * count for count in heads if count
    ]
    assert [f"blk.{layer}.attn_norm.weight" in header.tensors for layer in range(3)] == [bool(count) for count in heads]
    tokens = random_tokens((1, 9))
    assert np.array_equal(jax_logits(hs.load(path), tokens), jax_logits(pruned, tokens))
    hs.save(source, tmp_path / "native")
    check_same(hs.open_checkpoint(tmp_path / "native"), pruned)


def deci(tmp_path: Path, dropped: tuple[int, ...] = (1, 4, 5), **metadata: Any) -> Path:
    model = tiny_model()
    header = read_header(write(hs.share(model, sharing_by_hand(model, "qkv", {}, dropped)), tmp_path / "model.gguf"))
    drop = ("headshare.map", "headshare.config")
    return rewritten(header, tmp_path / "foreign.gguf", drop=drop, metadata=metadata)


def test_a_foreign_file_of_layers_that_differ_is_read(tmp_path: Path) -> None:
    source = hs.open_checkpoint(deci(tmp_path))
    assert source.sharing is not None
    assert np.flatnonzero(source.sharing.dropped).tolist() == [1, 4, 5]
    model = tiny_model()
    for name in ("q_pool_pdh", "o_pool_phd"):
        assert np.array_equal(source.read(name, 0, [1]), model.read(name, 0, [1]))
        assert not source.read(name, 2).any()


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"deci.attention.head_count": [2, 4, 2]}, "group query heads .* in different ways"),
        ({"deci.attention.head_count": [2, 3, 0]}, "group query heads .* in different ways"),
        ({"deci.attention.head_count_kv": [0, 2, 0]}, "group query heads .* in different ways"),
        ({"deci.attention.head_count_kv": [1, 2]}, "must have a whole number for each of 3 layers"),
        ({"deci.attention.head_count_kv": [1, 2, -1]}, "must have a whole number for each of 3 layers"),
        (
            {"deci.attention.head_count": [4, 4, 0], "deci.attention.head_count_kv": [2, 2, 0]},
            r"blk.0.attn_q.weight has shape \[32, 64\] instead of \[64, 64\]",
        ),
        ({"deci.block_count": 0}, "no usable deci.block_count"),
        ({"headshare.map": "{}"}, "map"),
        ({"headshare.config": "[1]"}, r"headshare\.config in .* cannot be used"),
        ({"headshare.config": json.dumps(MODELS["qwen2"].to_json())}, "is of another architecture"),
    ],
    ids=str,
)
def test_head_counts_that_contradict_the_tensors_are_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = deci(tmp_path, **metadata)
    with pytest.raises(HeadshareError, match=message) as raised:
        hs.open_checkpoint(path)
    assert "\n" not in str(raised.value)


def test_a_map_that_contradicts_the_head_counts_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    header = read_header(write(hs.share(model, sharing_by_hand(model, "qkv", {}, (1, 4))), tmp_path / "model.gguf"))
    other = {"headshare.map": sharing_by_hand(model, "qkv", {}, (1, 2)).to_json()}
    path = rewritten(header, tmp_path / "other.gguf", metadata=other)
    with pytest.raises(HeadshareError, match=r"head_count_kv .* disagrees with its map"):
        hs.open_checkpoint(path)


def test_metadata_is_carried_exactly(tmp_path: Path) -> None:
    model = tiny_model()
    first = write(model, tmp_path / "first.gguf")
    metadata: dict[str, Any] = {
        "general.name": "Tiny", "general.license": "mit", "general.tags": ["a", "b"], "general.file_type": 1024,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["x", "y\n", "é"],
        "tokenizer.ggml.scores": [0.1, -1e30, 3.0],
        "tokenizer.ggml.token_type": [1, 3, 4], "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{{ '' }}",
        "tokenizer.ggml.precompiled_charsmap": [1, 2], "tokenizer.ggml.suffix": "",
    }  # fmt: skip
    given = rewritten(read_header(first), tmp_path / "given.gguf", metadata=metadata, drop=("headshare.config",))
    source = hs.open_checkpoint(given)
    before = read_header(given)
    for options in ({}, {"quantize": "q8_0"}):
        after = read_header(write(source, tmp_path / "again.gguf", tokenizer_from=given, **options))
        for name in metadata.keys() - {"general.file_type"}:
            assert (after.metadata[name], after.types[name]) == (before.metadata[name], before.types[name]), name
        assert after.metadata["general.file_type"] == (7 if options else 1024)


def test_rope_factors_are_carried_exactly(tmp_path: Path) -> None:
    config = replace(BASE, head_dim=32, rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, 8192), rope_theta=5e5)
    header = read_header(write(random_model(config), tmp_path / "model.gguf"))
    path = rewritten(header, tmp_path / "near.gguf", drop=("headshare.config",))
    data, tensor = bytearray(path.read_bytes()), read_header(path).tensors["rope_freqs.weight"]
    place = slice(tensor.offset, tensor.offset + tensor.size)
    near = np.nextafter(np.frombuffer(data[place], np.float32), np.float32(9))
    data[place] = near.tobytes()
    path.write_bytes(data)
    again = write(hs.open_checkpoint(path), tmp_path / "again.gguf")
    assert contents(again)["rope_freqs.weight"] == near.tobytes()


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (replace(BASE, intermediate_size=80), {"quantize": "q8_0"}, r"ffn_down.weight has rows of 80 values.* 32"),
        (BASE, {"quantize": "tq1_0"}, "in blocks of 256, cannot hold"),
        (BASE, {"quantize": "q4_k_m"}, r"llama-quantize model-f16.gguf model-q4_k_m.gguf Q4_K_M"),
        (BASE, {"quantize": "Q4_K"}, r"llama-quantize model-f16.gguf model-Q4_K.gguf Q4_K"),
        (BASE, {"quantize": "q3"}, "'q3' is not one of f32, f16, q4_0"),
        (replace(BASE, hidden_act="gelu"), {}, "does not compute the activation gelu"),
        (replace(BASE, rope_scaling=RopeScaling("dynamic", 2.0)), {}, "does not compute dynamic rotary scaling"),
        (replace(MODELS["smollm3"], nope_layers=(0,)), {}, "does not compute these layers without rotary"),
        (replace(MODELS["qwen3"], attention_bias=True), {}, "does not compute these attention biases"),
        (replace(MODELS["seed_oss"], attention_bias=True), {}, "does not compute these attention biases"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_written_leaves_nothing(
    tmp_path: Path, config: LlamaConfig, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(HeadshareError, match=message) as raised:
        write(random_model(config), tmp_path / "model.gguf", **options)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.iterdir())


def test_the_output_is_a_file(tmp_path: Path) -> None:
    model = tiny_model()
    with pytest.raises(HeadshareError, match=r"give the output .* a name that ends in \.gguf"):
        hs.save(model, tmp_path / "model", to="gguf")
    with pytest.raises(HeadshareError, match=r"is a folder; give the output .*model\.gguf another name"):
        hs.save(model, tmp_path / "model.gguf", to="hf")
    with pytest.raises(HeadshareError, match="quantize is for the format gguf"):
        hs.save(model, tmp_path / "model", to="hf", quantize="q8_0")
    write(model, tmp_path / "model.gguf")
    with pytest.raises(HeadshareError, match="exists already"):
        hs.save(model, tmp_path / "model.gguf", to="gguf")
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_a_normalised_head_is_written_normalised(tmp_path: Path) -> None:
    model = random_model(replace(BASE, normalize_head=True))
    path = write(model, tmp_path / "model.gguf")
    tokens = random_tokens((1, 9))
    assert not hs.open_checkpoint(path).config.normalize_head
    assert np.allclose(jax_logits(hs.load(path), tokens), jax_logits(model, tokens), atol=1e-5)


@settings(max_examples=25)
@given(
    name=st.sampled_from(sorted(MODELS)),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    seed=st.integers(0, 2**16),
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, name: str, dtype: str, seed: int) -> None:
    model = random_model(MODELS[name], dtype=dtype)
    rng = np.random.default_rng(seed)
    units = model.config.num_units
    dropped = rng.permutation(units)[: rng.integers(0, units)].tolist() if model.config.family == "llama" else []
    source = hs.share(model, sharing_by_hand(model, "qkv", {}, dropped)) if dropped else model
    read = hs.open_checkpoint(write(source, tmp_path_factory.mktemp("gguf") / "model.gguf"))
    assert read.sharing == source.sharing
    check_same(read, source)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
