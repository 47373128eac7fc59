"""The key tables: every layout is reversible, and every parameter has its place in every table."""

from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import VARIANTS, hf_config, tiny_hf_model

from headshare_jax import LlamaConfig, parameters
from headshare_jax.convert import keys
from headshare_jax.parameters import PARAMETERS

TABLES = {"llama": keys.LLAMA, "baichuan": keys.BAICHUAN, "gguf": keys.GGUF}


def config_of(variant: str) -> LlamaConfig:
    return LlamaConfig.from_hf(hf_config(**VARIANTS[variant]).to_dict())


@st.composite
def configs(draw: Any, table: str = "llama") -> LlamaConfig:
    # Baichuan-2 has as many key/value heads as query heads: its fused tensor has three equal parts.
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3 if table != "baichuan" else 1))
    return LlamaConfig(
        vocab_size=draw(st.integers(1, 9)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(1, 9)),
        num_layers=draw(st.integers(1, 2)),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
    )


@pytest.mark.parametrize("table", TABLES)
@given(data=st.data())
def test_decode_and_encode_undo_each_other(table: str, data: st.DataObject) -> None:
    config = data.draw(configs(table))
    for name in parameters.parameter_names(config):
        shape = parameters.slice_shape(config, name)
        value = np.arange(np.prod(shape)).reshape(shape)
        part = keys.encode(TABLES[table], config, name, value)
        key = TABLES[table][name]
        fused = np.full((key.parts, *part.shape), -1)
        fused[key.part] = part
        tensor = fused.reshape(-1, *part.shape[1:])
        cut = keys.cut(key, config, None, tensor.shape)
        decoded = keys.decode(TABLES[table], config, name, tensor if cut is None else cut.of(tensor))
        assert np.array_equal(decoded, value)
        assert np.array_equal(keys.encode(TABLES[table], config, name, decoded), part)


@pytest.mark.parametrize("table", TABLES)
@given(data=st.data())
def test_a_cut_for_some_heads_holds_those_heads(table: str, data: st.DataObject) -> None:
    config = data.draw(configs(table))
    for name in parameters.parameter_names(config):
        projection, key = PARAMETERS[name].pool, TABLES[table][name]
        if projection is None:
            continue
        count = parameters.heads_per_layer(config, projection)
        heads = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True).map(sorted))
        shape = parameters.slice_shape(config, name)
        value = np.arange(np.prod(shape)).reshape(shape)
        part = keys.encode(TABLES[table], config, name, value)
        tensor = np.concatenate([part if number == key.part else part * 0 - 1 for number in range(key.parts)])
        cut = keys.cut(key, config, heads, tensor.shape)
        assert cut is not None
        assert np.array_equal(keys.decode(TABLES[table], config, name, cut.of(tensor)), value[heads])


@pytest.mark.parametrize("table", TABLES)
@given(data=st.data())
def test_shapes_of_tensors_are_those_of_their_parts(table: str, data: st.DataObject) -> None:
    config = data.draw(configs(table))
    for name, tensor in keys.tensors(TABLES[table], config).items():
        shape = (tensor.shape[0] // len(tensor.parts), *tensor.shape[1:])
        for part in tensor.parts:
            decoded = keys.decode(TABLES[table], config, part, np.zeros(shape))
            assert decoded.shape == parameters.slice_shape(config, part), name


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_tensor_in_every_layer(table: str, variant: str) -> None:
    config = config_of(variant)
    found = {(part, tensor.layer) for tensor in keys.tensors(TABLES[table], config).values() for part in tensor.parts}
    assert found == {
        (name, layer)
        for name in parameters.parameter_names(config)
        for layer in (range(config.num_layers) if PARAMETERS[name].layered else [None])
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_tensor_names_and_shapes_are_those_of_transformers(variant: str) -> None:
    model = tiny_hf_model(**VARIANTS[variant])
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    tensors = keys.tensors(keys.LLAMA, LlamaConfig.from_hf(model.config.to_dict()))
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected


def test_gguf_tensor_names_are_those_of_llama_cpp() -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    config = LlamaConfig.from_hf(hf_config(attention_bias=True, mlp_bias=True).to_dict())
    ours = keys.tensors(keys.GGUF, config)
    theirs = [names.get_name(name, (".weight", ".bias")) for name in keys.tensors(keys.LLAMA, config)]
    assert list(ours) == theirs
