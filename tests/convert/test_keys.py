"""The key tables: every layout is reversible, and every parameter has its place in every table."""

import math
from collections.abc import Sequence
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ALL_VARIANTS, VARIANTS, hf_config, tiny_hf_model

from headshare_jax import LlamaConfig, parameters
from headshare_jax.convert import keys
from headshare_jax.parameters import PARAMETERS

WRITTEN = {"llama": keys.LLAMA, "baichuan": keys.BAICHUAN, "phi3": keys.PHI3, "gguf": keys.GGUF["llama"]}
TABLES = WRITTEN | {"internlm2": keys.INTERNLM2}


def config_of(variant: str) -> LlamaConfig:
    return LlamaConfig.from_hf(hf_config(**VARIANTS[variant]).to_dict())


@st.composite
def configs(draw: Any, table: str = "llama") -> LlamaConfig:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return LlamaConfig(
        vocab_size=draw(st.integers(1, 9)),
        hidden_size=draw(st.integers(1, 9)),
        intermediate_size=draw(st.integers(1, 9)),
        num_layers=draw(st.integers(1, 2)),
        num_heads=kv_heads * group,
        num_kv_heads=kv_heads,
        head_dim=2 * draw(st.integers(1, 4)),
        attention_bias=draw(st.booleans()),
        mlp_bias=table != "internlm2" and draw(st.booleans()),
    )


class Numbers:
    """A source whose every value is another number."""

    sharing = None

    def __init__(self, config: LlamaConfig):
        self.config = config
        self.values: dict[tuple[str, int | None], np.ndarray] = {}
        start = 0
        for name in parameters.parameter_names(config):
            shape = parameters.slice_shape(config, name)
            for layer in range(config.num_layers) if PARAMETERS[name].layered else [None]:
                self.values[name, layer] = np.arange(start, start + math.prod(shape), dtype=np.float32).reshape(shape)
                start += math.prod(shape)

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        value = self.values[name, layer]
        return value if rows is None else value[list(rows)]


def grouped(table: keys.KeyTable, source: Numbers, tensor: keys.Tensor) -> np.ndarray:
    """A tensor that InternLM2 fuses: the rows of every key/value head's queries, its key and its value."""
    units = source.config.num_kv_heads
    parts = [keys.encode(table, source.config, name, source.read(name, tensor.layer)) for name in tensor.parts]
    pieces = [part.reshape(units, -1, *part.shape[1:]) for part in parts]
    return np.concatenate(pieces, axis=1).reshape(-1, *parts[0].shape[1:])


def written(table: str, source: Numbers) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint."""
    rows = TABLES[table]
    return {
        name: (grouped if rows[tensor.parts[0]].grouped else keys.encoded)(rows, source, tensor)
        for name, tensor in keys.tensors(rows, source.config).items()
    }


@pytest.mark.parametrize("table", TABLES)
@given(data=st.data())
def test_what_is_written_is_read_back(table: str, data: st.DataObject) -> None:
    source = Numbers(data.draw(configs(table)))
    rows, config, tensors = TABLES[table], source.config, written(table, source)
    assert sum(tensor.size for tensor in tensors.values()) == sum(value.size for value in source.values.values())
    for (name, layer), value in source.values.items():
        tensor, cut = tensors[rows[name].name(layer)], keys.cut(rows, config, name)
        part = tensor if cut is None else cut.of(tensor)
        assert np.array_equal(keys.decode(rows, config, name, part), value)
        assert np.array_equal(keys.encode(rows, config, name, value), part)


@pytest.mark.parametrize("table", TABLES)
@given(data=st.data())
def test_a_cut_for_some_heads_holds_those_heads(table: str, data: st.DataObject) -> None:
    source = Numbers(data.draw(configs(table)))
    rows, config, tensors = TABLES[table], source.config, written(table, source)
    for (name, layer), value in source.values.items():
        projection = PARAMETERS[name].pool
        if projection is None:
            continue
        count = parameters.heads_per_layer(config, projection)
        heads = data.draw(st.lists(st.integers(0, count - 1), min_size=1, unique=True).map(sorted))
        cut = keys.cut(rows, config, name, heads)
        assert cut is not None
        part = cut.of(tensors[rows[name].name(layer)])
        assert np.array_equal(keys.decode(rows, config, name, part), value[heads])


@pytest.mark.parametrize("table", TABLES)
@given(data=st.data())
def test_shapes_are_those_of_the_tensors(table: str, data: st.DataObject) -> None:
    source = Numbers(data.draw(configs(table)))
    shapes = {name: tensor.shape for name, tensor in keys.tensors(TABLES[table], source.config).items()}
    assert {name: tensor.shape for name, tensor in written(table, source).items()} == shapes


def test_a_fused_tensor_of_two_types_is_written_in_the_one_that_holds_both() -> None:
    source = Numbers(config_of("gqa"))
    types = {"gate_ldf": np.dtype(ml_dtypes.bfloat16)}
    source.dtype = lambda name: types.get(name, np.dtype(np.float16))  # type: ignore[method-assign]
    tensors = keys.tensors(keys.PHI3, source.config)
    kinds = {name.split("layers.0.")[-1]: keys.dtype(source, tensor) for name, tensor in tensors.items()}
    assert kinds["mlp.gate_up_proj.weight"] == np.float32
    assert kinds["self_attn.qkv_proj.weight"] == np.float16


@pytest.mark.parametrize("table", WRITTEN)
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_tensor_in_every_layer(table: str, variant: str) -> None:
    config = config_of(variant)
    found = {(part, tensor.layer) for tensor in keys.tensors(TABLES[table], config).values() for part in tensor.parts}
    assert found == {
        (name, layer)
        for name in parameters.parameter_names(config)
        for layer in (range(config.num_layers) if PARAMETERS[name].layered else [None])
    }


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_tensor_names_and_shapes_are_those_of_transformers(variant: str) -> None:
    model = tiny_hf_model(**ALL_VARIANTS[variant])
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    table = keys.of_class(type(model).__name__)
    tensors = keys.tensors(table, LlamaConfig.from_hf(model.config.to_dict()))
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected


def test_gguf_tensor_names_are_those_of_llama_cpp() -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    config = LlamaConfig.from_hf(hf_config(attention_bias=True, mlp_bias=True).to_dict())
    ours = keys.tensors(keys.GGUF["llama"], config)
    theirs = [names.get_name(name, (".weight", ".bias")) for name in keys.tensors(keys.LLAMA, config)]
    assert list(ours) == theirs
