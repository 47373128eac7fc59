"""Rotary frequencies against transformers at the sizes of real models, and what a rotation leaves unchanged."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from support import torch_or_skip
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from headshare_jax import LlamaConfig
from headshare_jax.rope import inverse_frequencies, rotary_angles, rotate

LLAMA_3_1: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def real_config(rope: dict[str, Any]) -> Any:
    sizes: dict[str, Any] = {
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 1,
    }
    return transformers.LlamaConfig(**sizes, max_position_embeddings=131072, rope_parameters=rope)


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        (LLAMA_3_1, 10),
        (LLAMA_3_1 | {"factor": 32.0, "high_freq_factor": 8.0}, 10),
        ({"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}, 10),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 10),
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 200_000),
    ],
)
def test_frequencies_are_those_of_transformers(rope: dict[str, Any], length: int) -> None:
    theirs = real_config(rope)
    device = torch_or_skip().device("cpu")
    expected, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs, device, seq_len=length)
    frequencies = inverse_frequencies(LlamaConfig.from_hf(theirs.to_dict()), length)
    np.testing.assert_allclose(np.asarray(frequencies), expected.numpy(), rtol=2e-6)


def test_scores_depend_on_the_distance_alone() -> None:
    config = LlamaConfig.from_hf(real_config({"rope_type": "default", "rope_theta": 1e4}).to_dict())
    q, k = np.random.default_rng(0).normal(size=(2, 1, 1, 1, config.head_dim)).astype(np.float32)

    def score(q_position: int, k_position: int) -> float:
        turned = [
            rotate(jnp.asarray(x), *rotary_angles(config, jnp.full((1, 1), position, jnp.int32)))
            for x, position in ((q, q_position), (k, k_position))
        ]
        return float(jnp.sum(turned[0] * turned[1]))

    assert score(30, 11) == pytest.approx(score(19, 0), abs=1e-4)
    assert score(30, 11) != pytest.approx(score(11, 30), abs=1e-2)
    assert score(7, 7) == pytest.approx(float(np.sum(q * k)), abs=1e-4)


def test_rotation_keeps_the_storage_type() -> None:
    config = LlamaConfig.from_hf(real_config({"rope_type": "default", "rope_theta": 1e4}).to_dict())
    x = jnp.ones((1, 2, 3, config.head_dim), jnp.bfloat16)
    angles = rotary_angles(config, jnp.arange(2, dtype=jnp.int32)[None])
    assert rotate(x, *angles).dtype == jnp.bfloat16
    assert {angle.dtype for angle in angles} == {jnp.dtype("float32")}
