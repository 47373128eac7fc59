"""Match scores against their definition, one pair at a time in NumPy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support import VARIANTS, tiny_model

import headshare_jax
from headshare_jax import HeadshareError, Llama, match
from headshare_jax.matching import cosine
from headshare_jax.matching.cosine import MATCH_FUNCTIONS

WEIGHTED = tuple(name for name in MATCH_FUNCTIONS if name != "random")
MODELS: dict[str, dict[str, Any]] = {
    "mha": VARIANTS["mha"],
    "gqa": VARIANTS["wide heads"],
    "mqa": VARIANTS["mqa"] | {"num_hidden_layers": 5},
}


def unit_vectors(model: Llama, function: str) -> np.ndarray:
    """What a match function compares, float64 [L * U, dim]: the definition, unit by unit."""
    config, vectors = model.config, []
    for layer in range(config.num_layers):
        q, k, v = (np.asarray(model.read(f"{p}_pool_pdh", layer), np.float64).swapaxes(1, 2) for p in "qkv")
        for unit in range(config.num_kv_heads):
            heads = range(unit * config.heads_per_unit, (unit + 1) * config.heads_per_unit)
            if function == "total":
                parts = [total(q[head], k[unit], v[unit]) for head in heads]
            else:
                slices = {"q": [q[head] for head in heads], "k": [k[unit]], "v": [v[unit]]}
                parts = [part for letter in function for part in slices[letter]]
            vectors.append(np.concatenate([part.ravel() for part in parts]))
    return np.stack(vectors)


def total(q_hd: np.ndarray, k_hd: np.ndarray, v_hd: np.ndarray) -> np.ndarray:
    exponent = np.exp(q_hd @ k_hd.T / np.sqrt(q_hd.shape[1]))
    product: np.ndarray = exponent / exponent.sum(axis=1, keepdims=True) @ v_hd
    return product


@pytest.mark.parametrize("function", WEIGHTED)
@pytest.mark.parametrize("overrides", MODELS.values(), ids=MODELS)
def test_every_pair_has_the_score_of_its_definition(overrides: dict[str, Any], function: str) -> None:
    model = tiny_model(**overrides)
    result, vectors = match(model, function), unit_vectors(model, function)
    layers, units = result.value.shape
    expected = np.full((layers * units, layers * units), -np.inf)
    for receiver in range(units, layers * units):
        for donor in range(receiver // units * units):
            a, b = vectors[receiver], vectors[donor]
            expected[receiver, donor] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert result.scores is not None
    np.testing.assert_allclose(result.scores, expected, atol=1e-5, rtol=0)
    np.testing.assert_array_equal(result.donor.ravel()[units:], expected[units:].argmax(axis=1))
    np.testing.assert_array_equal(result.value.ravel()[units:], result.scores[units:].max(axis=1))


def test_the_first_layer_has_no_donors() -> None:
    for function in MATCH_FUNCTIONS:
        result = match(tiny_model(), function)
        assert (result.donor_layer[0] == -1).all()
        assert (result.donor_unit[0] == -1).all()
        assert (result.value[0] == -np.inf).all()
        assert np.isfinite(result.value[1:]).all()
        assert (result.donor_layer[1:] < np.arange(1, 3)[:, None]).all()


@pytest.mark.parametrize("function", ["k", "qk"])
def test_features_longer_than_a_chunk_are_summed_whole(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cosine, "CHUNK_BYTES", 1)
    model = tiny_model(hidden_size=36, head_dim=16)
    vectors = unit_vectors(model, function)
    assert vectors.shape[1] % 128, "the last chunk is a part of one"
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    scores = match(model, function).scores
    assert scores is not None
    np.testing.assert_allclose(scores[4:, :4], unit[4:] @ unit[:4].T, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("tile_units", "tile_features"), [(1, 64), (2, 100), (3, 512), (4, 128), (8, 7)])
def test_tiles_of_any_size_give_the_same_scores(
    tile_units: int, tile_features: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(**VARIANTS["mha"] | {"num_hidden_layers": 5})
    assert model.config.num_kv_heads == 4, "of the tiles, some lie in one layer, some hold two, some cut one"
    layer_bytes = 4 * unit_vectors(model, "qkv")[:4].size
    whole = match(model, "qkv")
    assert whole.scores is not None
    monkeypatch.setattr(cosine, "TILE_UNITS", tile_units)
    monkeypatch.setattr(cosine, "TILE_FEATURES", tile_features)
    for block_bytes in (cosine.BLOCK_BYTES, 2 * layer_bytes):
        tiled = match(model, "qkv", block_bytes=block_bytes)
        assert tiled.scores is not None
        np.testing.assert_allclose(tiled.scores, whole.scores, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layers_in_block", [0, 1, 2, 3, 6])
def test_blocks_of_any_size_find_the_same_donors(layers_in_block: int) -> None:
    model = tiny_model(num_hidden_layers=7)
    whole = match(model, "qkv")
    layer_bytes = 4 * unit_vectors(model, "qkv")[: model.config.num_kv_heads].size
    steps: list[tuple[int, int]] = []
    result = match(
        model,
        "qkv",
        block_bytes=layers_in_block * layer_bytes,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert result.scores is not None
    assert whole.scores is not None
    np.testing.assert_array_equal(result.donor, whole.donor)
    np.testing.assert_allclose(result.scores, whole.scores, atol=1e-6, rtol=0)
    blocks = -(-7 // max(layers_in_block, 1))
    products = blocks * (blocks + 1) // 2
    assert steps == [(step + 1, products) for step in range(products)]


class CountedLayers:
    """A model that counts how often each layer is read."""

    def __init__(self, model: Llama):
        self.model = model
        self.config, self.sharing, self.dtype = model.config, model.sharing, model.dtype
        self.reads: list[int] = []

    def read(self, name: str, layer: int | None = None, rows: Sequence[int] | None = None) -> np.ndarray:
        assert layer is not None, "matching needs no whole parameter"
        self.reads.append(layer)
        return self.model.read(name, layer)


def test_with_room_for_all_layers_each_is_read_few_times() -> None:
    source = CountedLayers(tiny_model(num_hidden_layers=4))
    match(source, "q")
    fingerprinting = 4 * 4
    assert len(source.reads) <= 4 + 1 + fingerprinting


def test_the_random_baseline_is_set_by_its_seed() -> None:
    model = tiny_model(num_hidden_layers=6)
    one, same, other = (match(model, "random", seed=seed) for seed in (3, 3, 4))
    assert one.seed == 3
    np.testing.assert_array_equal(one.scores, same.scores)
    assert (one.donor != other.donor).any()
    assert match(model, "qk").seed is None


def test_scores_know_their_weights() -> None:
    model = tiny_model()
    assert match(model, "qk").source == headshare_jax.fingerprint(model)


@pytest.mark.parametrize(
    ("layers", "function", "reason"), [(3, "kq", "kq.*not one of"), (3, "", "not one of"), (1, "qk", "two layers")]
)
def test_what_cannot_be_matched_is_refused(layers: int, function: str, reason: str) -> None:
    with pytest.raises(HeadshareError, match=reason):
        match(tiny_model(num_hidden_layers=layers), function)
    with pytest.raises(HeadshareError, match="must not be negative"):
        match(tiny_model(), "random", seed=-1)
