"""Wrong arguments of public functions are refused by name, before anything is done."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import support

import headshare_jax as hs

MODEL = support.tiny_model()
TOKENS = np.arange(300) % MODEL.config.vocab_size
WINDOWS = TOKENS[:256].reshape(4, 64).astype(np.int32)

CASES: list[tuple[Callable[[], Any], str]] = [
    (lambda: hs.compress(MODEL, ratio="0.3"), "ratio must be a number or None, not '0.3'"),
    (lambda: hs.compress(MODEL, ratio=True), "ratio must be a number or None, not True"),
    (lambda: hs.compress(MODEL, ratio=0.3, method=3), "method must be a text or None, not 3"),
    (lambda: hs.compress(MODEL, ratio=0.3, method="random", seed=1.5), "seed must be a whole number or None, not 1.5"),
    (lambda: hs.compress(MODEL, ratio=0.3, seq_len=64.0), "seq_len must be a whole number or None, not 64.0"),
    (lambda: hs.compress(MODEL, ratio=0.3, overwrite="no"), "overwrite must be True or False, not 'no'"),
    (lambda: hs.compress(MODEL, 7, ratio=0.3), "dst must be a text or a path or None, not 7"),
    (lambda: hs.match(MODEL, 3), "function must be a text, not 3"),
    (lambda: hs.match(MODEL, "random", seed=0.5), "seed must be a whole number, not 0.5"),
    (lambda: hs.sharing_map(hs.match(MODEL), "0.3"), "ratio must be a number, not '0.3'"),
    (lambda: hs.perplexity(MODEL, TOKENS, seq_len=64.0), "seq_len must be a whole number, not 64.0"),
    (lambda: hs.perplexity(MODEL, TOKENS, batch_size=True), "batch_size must be a whole number, not True"),
    (lambda: hs.calibration_windows(TOKENS, 4.0, 64, 128), "count must be a whole number, not 4.0"),
    (lambda: hs.open_checkpoint(None), "src must be a text or a path, not None"),
    (lambda: hs.load("absent", dtype=32), "dtype must be a text or None, not 32"),
    (lambda: hs.save(MODEL, None), "dst must be a text or a path, not None"),
    (lambda: hs.save(MODEL, "out", overwrite=1), "overwrite must be True or False, not 1"),
    (lambda: hs.Sampling(temperature="hot"), "temperature must be a number, not 'hot'"),
    (lambda: hs.Sampling(top_k=2.0), "top_k must be a whole number or None, not 2.0"),
    (lambda: hs.FunctionalSettings(windows=2.5), "windows must be a whole number, not 2.5"),
    (lambda: hs.RefitSettings(held_out="half"), "held_out must be a number, not 'half'"),
    (lambda: MODEL(jnp.array([[0, -1]])), "The tokens hold -1, which is outside the model's vocabulary"),
    (lambda: MODEL(np.array([[0, 2**32]])), f"The tokens hold {2**32}, which is outside"),
    (lambda: MODEL(jnp.zeros((1, 2))), "must be an array of whole numbers [B, T], not float32 [1, 2]"),
    (lambda: MODEL(jnp.zeros(2, jnp.int32)), "must be an array of whole numbers [B, T], not int32 [2]"),
    (lambda: MODEL([[0, 1]]), "must be an array of whole numbers"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "words"), CASES, ids=[words for _, words in CASES])
def test_wrong_arguments_are_refused_by_name(call: Callable[[], Any], words: str, monkeypatch: Any) -> None:
    with pytest.raises(hs.HeadshareError) as error:
        call()
    assert words in str(error.value)
    assert not Path("out").exists()


def test_numpys_scalars_are_numbers() -> None:
    result = hs.match(MODEL, "random", seed=np.int64(3))
    assert hs.sharing_map(result, np.float32(0.5)) == hs.sharing_map(hs.match(MODEL, "random", seed=3), 0.5)


def test_unknown_ids_are_no_error_inside_jit() -> None:
    logits = jax.jit(lambda model, tokens_bt: model(tokens_bt))(MODEL, jnp.array([[0, 1]]))
    assert jnp.allclose(logits, MODEL(jnp.array([[0, 1]])), atol=1e-5)


def test_refit_takes_only_the_dense_model_that_the_shared_one_was_made_of() -> None:
    shared = hs.share(MODEL, hs.sharing_map(hs.match(MODEL), 0.5))
    with pytest.raises(hs.HeadshareError, match="was not made of this dense model: they differ in"):
        hs.refit(support.tiny_model(seed=5), shared, WINDOWS)
    repaired, _ = hs.refit(MODEL, shared, WINDOWS)
    # A fitted model can be fitted again.
    hs.refit(MODEL, repaired, WINDOWS)
