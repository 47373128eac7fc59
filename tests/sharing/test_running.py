"""What it costs to run a model, counted from shapes, against what is there and what is compiled."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support import TINY, dropped, tiny_model

from headshare_jax import Llama
from headshare_jax.sharing.running import running


def compiled_flops(model: Llama, context: int) -> float:
    """Of a token added to one text, by XLA; of layers that are no loop."""
    arguments = (model, jnp.zeros((1, 1), jnp.int32), model.empty_cache(1, context))

    def step(model: Llama, token: jax.Array, cache: Any) -> jax.Array:
        return model.logits(model.extend(token, cache)[0])

    analysis: Any = jax.jit(step).lower(*arguments).compile().cost_analysis()
    return float(analysis["flops"])


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"model_type": "qwen2"}], ids=str)
def test_costs_are_those_of_arrays_and_programs(changes: dict[str, Any]) -> None:
    dense = tiny_model(**{"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8, **changes})
    model = dropped(dense, {0: [1], 2: [0]} if dense.config.num_kv_heads == 2 else {0: [1, 3], 1: [2], 2: [0]})
    for each in (dense, model):
        costs = running(each.config, each.sharing, context=256, batch=3, itemsize=4)
        assert costs.model.cache_bytes == each.empty_cache(3, 256).nbytes
    costs = running(model.config, model.sharing, context=1024, batch=1)
    assert costs.dense == running(dense.config, None, context=1024, batch=1).model
    assert (costs.padding.cache_bytes, costs.padding.flops) == (0, 0)
    # Norms, angles, masks and sums come on top.
    assert 1 < compiled_flops(model, 1024) / costs.model.flops < 1.2


def test_a_window_bounds_the_cache_and_what_is_seen() -> None:
    config = tiny_model(model_type="mistral", sliding_window=10).config
    short, long = (running(config, None, context=length, batch=1).model for length in (10, 500))
    assert short == long
    position = 2 * 2 * TINY["num_hidden_layers"] * config.num_kv_heads * config.head_dim
    assert short.cache_bytes == 10 * position
