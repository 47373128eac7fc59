"""Sharing, dropping and undoing it against transformers models edited by hand."""

import gc
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax  # type: ignore[import-untyped]
import pytest
from flax import nnx
from support import (
    VARIANTS,
    hf_logits,
    jax_logits,
    random_tokens,
    saved_hf_model,
    sharing_by_hand,
    tied_by_hand,
    tiny_hf_model,
    tiny_model,
)

import headshare_jax
from headshare_jax import HeadshareError, Llama, ledger, match, parameters, share, sharing_map, unshare
from headshare_jax.model.reading import PER_HEAD_TOKENS
from headshare_jax.parameters import PARAMETERS
from headshare_jax.sharing.source import fingerprint

TIES = tuple("".join(letters) for size in range(1, 5) for letters in combinations("qkvo", size))
MODELS: dict[str, dict[str, Any]] = {"mha": VARIANTS["mha"], "gqa": {"attention_bias": True}}


def pairs(units: int) -> dict[int, int]:
    """Receivers in two layers, two of them with one donor."""
    return {units: 0, 2 * units: 0, 2 * units + 1: units + 1}


def attention_weights(model: Llama) -> list[np.ndarray]:
    names = [name for name in parameters.parameter_names(model.config) if PARAMETERS[name].pool]
    return [model.read(name, layer) for name in names for layer in range(model.config.num_layers)]


@pytest.mark.parametrize("tie", ["qkv", "qkvo"])
def test_the_papers_method_gives_the_model_that_its_rule_makes_by_hand(tmp_path: Path, tie: str) -> None:
    model = headshare_jax.load(saved_hf_model(tmp_path, **VARIANTS["mha"]))
    weights = [np.concatenate([model.read(f"{p}_pool_pdh", layer)[unit].ravel() for p in "qk"]).astype(np.float64)
               for layer in range(3) for unit in range(4)]  # fmt: skip
    best: dict[int, tuple[float, int]] = {}
    for receiver in range(4, 12):
        one = weights[receiver]
        best[receiver] = max((one @ two / np.linalg.norm(one) / np.linalg.norm(two), donor)
                             for donor, two in enumerate(weights[: receiver // 4 * 4]))  # fmt: skip
    receivers = sorted(best, key=lambda unit: -best[unit][0])[: 12 * 3 // 10]
    pairs = {unit: best[unit][1] for unit in receivers}
    pairs = {unit: pairs.get(donor, donor) for unit, donor in pairs.items()}
    chosen = sharing_map(match(model, "qk"), 0.3, tie=tie)
    by_hand = sharing_by_hand(model, tie, pairs)
    assert len(pairs) == 3
    np.testing.assert_array_equal(chosen.donor, by_hand.donor)
    tokens = random_tokens((2, 20))
    expected = hf_logits(tied_by_hand(tiny_hf_model(**VARIANTS["mha"]), by_hand), tokens)
    np.testing.assert_allclose(jax_logits(share(model, chosen), tokens), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_receivers_hold_their_donors_weights_and_dropped_units_zeros(tmp_path: Path, overrides: dict[str, Any]) -> None:
    model = headshare_jax.load(saved_hf_model(tmp_path / "dense", **overrides))
    for tie in (*TIES, "mixed"):
        sharing = sharing_by_hand(model, tie, pairs(model.config.num_kv_heads))
        tied_by_hand(tiny_hf_model(**overrides), sharing).save_pretrained(tmp_path / tie)
        expected = attention_weights(headshare_jax.load(tmp_path / tie))
        for mine, theirs in zip(attention_weights(share(model, sharing)), expected, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("tie", ["k", "qk", "vo", "qkv", "qkvo", "mixed"])
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_a_shared_model_computes_what_a_model_edited_by_hand_does(
    tmp_path: Path, overrides: dict[str, Any], tie: str
) -> None:
    model = headshare_jax.load(saved_hf_model(tmp_path, **overrides))
    sharing = sharing_by_hand(model, tie, pairs(model.config.num_kv_heads))
    edited, dense = tied_by_hand(tiny_hf_model(**overrides), sharing), tiny_hf_model(**overrides)
    shared = share(model, sharing)
    for length in (PER_HEAD_TOKENS // 4, PER_HEAD_TOKENS):
        tokens = random_tokens((2, length))
        logits, expected = jax_logits(shared, tokens), hf_logits(edited, tokens)
        assert np.abs(logits - expected).max() < 2e-5 * np.abs(expected).max()
        assert np.abs(logits - hf_logits(dense, tokens)).max() > 1e-3 * np.abs(expected).max()


@pytest.mark.parametrize("tie", ["qkvo", "mixed"])
@pytest.mark.parametrize("length", [5, 20])
def test_unsharing_changes_no_bit_of_the_logits(length: int, tie: str) -> None:
    model, tokens = tiny_model(attention_bias=True), random_tokens((2, length))
    shared = share(model, sharing_by_hand(model, tie, pairs(2)))
    again = unshare(shared)
    assert again.sharing is None
    np.testing.assert_array_equal(jax_logits(again, tokens), jax_logits(shared, tokens))


@pytest.mark.parametrize("tie", ["qkv", "mixed"])
def test_sharing_an_unshared_model_again_restores_it(tie: str) -> None:
    model = tiny_model(attention_bias=True)
    sharing = replace(sharing_by_hand(model, tie, pairs(2)), source=fingerprint(model))
    once = share(model, sharing)
    twice = share(unshare(once), sharing)
    assert twice.sharing == sharing
    for name in parameters.parameter_names(model.config):
        np.testing.assert_array_equal(getattr(twice, name)[...], getattr(once, name)[...])


def test_what_a_map_does_not_touch_is_not_copied() -> None:
    model = tiny_model()
    shared = share(model, sharing_by_hand(model, "qkv", pairs(2)))
    for name in parameters.parameter_names(model.config):
        same = getattr(shared, name)[...] is getattr(model, name)[...]
        assert same == (PARAMETERS[name].pool not in ("q", "k", "v")), name
    assert model.sharing is None
    assert model.q_pool_pdh.shape[0] == 12


@pytest.mark.parametrize(("tie", "heads"), [("qkvo", 3 * 6), ("mixed", 4 + 4 + 3 * 6)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_optimizer_state_falls_by_twice_the_saving(dtype: str, tie: str, heads: int) -> None:
    model = tiny_model(dtype=dtype)
    shared = share(model, sharing_by_hand(model, tie, pairs(2)))
    sizes = ledger(shared)
    saved = sizes.dense_bytes - sizes.stored_bytes
    assert saved == heads * 64 * 16 * (4 if dtype == "float32" else 2)

    def state_bytes(model: Llama) -> int:
        state = optax.adamw(1e-3).init(nnx.state(model, nnx.Param))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(state))

    assert state_bytes(model) - state_bytes(shared) == 2 * saved


def test_memory_falls_by_the_saving_once_the_dense_model_is_gone() -> None:
    def live_bytes() -> int:
        gc.collect()
        arrays: list[jax.Array] = jax.live_arrays()  # type: ignore[no-untyped-call]
        return sum(array.nbytes for array in arrays)

    model = tiny_model()
    before = live_bytes()
    sharing = sharing_by_hand(model, "qkv", pairs(2))
    model = share(model, sharing)
    sizes = ledger(model)
    assert before - live_bytes() == sizes.dense_bytes - sizes.stored_bytes > 0


def test_a_map_is_for_its_own_weights() -> None:
    model, other = tiny_model(seed=0), tiny_model(seed=1)
    chosen = sharing_map(match(model, "qk"), 0.3)
    with pytest.raises(HeadshareError, match="other weights"):
        share(other, chosen)
    assert share(other, chosen, check_source=False).sharing == chosen
    assert share(model, chosen).sharing == chosen


def test_a_map_is_for_a_model_of_its_shape() -> None:
    chosen = sharing_map(match(tiny_model(), "qk"), 0.3)
    changes: list[dict[str, Any]] = [{"num_hidden_layers": 4}, {"num_key_value_heads": 4}, {"num_attention_heads": 8}]
    for change in changes:
        with pytest.raises(HeadshareError, match="another model"):
            share(tiny_model(**change), chosen, check_source=False)


def test_a_shared_model_is_not_shared_again() -> None:
    model = tiny_model()
    sharing = sharing_by_hand(model, "qkv", pairs(2))
    with pytest.raises(HeadshareError, match="unshare"):
        share(share(model, sharing), sharing)


def test_settings_are_kept() -> None:
    model = tiny_model()
    params = {name: getattr(model, name)[...] for name in parameters.parameter_names(model.config)}
    model = Llama(model.config, params, compute_dtype="bfloat16", remat="dots")
    shared = share(model, sharing_by_hand(model, "qkv", pairs(2)))
    for changed in (shared, unshare(shared)):
        assert (changed.compute_dtype, changed.remat) == ("bfloat16", "dots")
    assert shared.q_pool_pdh.dtype == jnp.float32
