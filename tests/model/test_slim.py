"""Slim models: what is cut is gone from what they store, and they compute what the same weights with zeros do."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import (
    ALL_VARIANTS,
    hf_logits,
    jax_logits,
    random_tokens,
    saved_hf_model,
    slim_sharing,
    tied_by_hand,
    tiny_hf_model,
    tiny_model,
)

import headshare_jax
from headshare_jax import Llama, SharedView, ledger, parameters, share, unshare
from headshare_jax.convert import verify
from headshare_jax.convert.native_document import WEIGHTS
from headshare_jax.model import reading as readings
from headshare_jax.model.generate import reading_to_decode
from headshare_jax.model.mesh import make_mesh
from headshare_jax.parameters import PARAMETERS
from headshare_jax.sharing.source import assemble, stored_shape
from headshare_jax.sharing.view import DenseView, ReplacedView

# One of every kind of attention that the families have.
KINDS = ("attention bias", "qwen3, biases", "phi3, partial rotary", "smollm3, windows", "seed_oss, biases")


def slim_model(kind: str = "attention bias", **settings: Any) -> tuple[Llama, Llama]:
    dense = tiny_model(**ALL_VARIANTS[kind] | settings)
    return dense, share(dense, slim_sharing(dense))


def with_zeros(dense: Llama, slim: Llama, name: str, layer: int) -> np.ndarray:
    """A layer's heads of a dense model's, with zeros in what the map of another cuts or drops, by a loop."""
    sharing, group = slim.sharing, dense.config.heads_per_unit
    assert sharing is not None
    assert sharing.widths is not None
    projection = PARAMETERS[name].pool
    assert projection is not None
    heads = np.zeros_like(dense.read(name, layer))
    per_unit = group if projection in "qo" else 1
    for unit, donor in enumerate(sharing.donor[layer].tolist()):
        if donor < 0:
            continue
        from_layer, from_unit = (
            divmod(donor, len(sharing.donor[layer]))
            if sharing.tied(projection)[layer, unit]
            else (
                layer,
                unit,
            )
        )
        for head in range(per_unit):
            values = dense.read(name, from_layer)[from_unit * per_unit + head].copy()
            columns = (sharing.widths.qk if projection in "qk" else sharing.widths.vo)[layer, unit]
            values[{"o": (~columns,)}.get(projection, (..., ~columns))] = 0
            heads[unit * per_unit + head] = values
    return heads


@pytest.mark.parametrize("kind", KINDS)
def test_a_slim_model_is_read_as_a_plain_one_with_zeros(kind: str) -> None:
    dense, slim = slim_model(kind)
    view = SharedView(dense, slim_sharing(dense))
    for name in parameters.layered_names(dense.config):
        for layer in range(3):
            if PARAMETERS[name].pool is None:
                continue
            expected = with_zeros(dense, slim, name, layer)
            for source in (slim, view, DenseView(slim), unshare(slim)):
                np.testing.assert_array_equal(source.read(name, layer), expected)
                np.testing.assert_array_equal(source.read(name, layer, [len(expected) - 1]), expected[-1:])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_is_not_stored(kind: str) -> None:
    dense, slim = slim_model(kind)
    sharing, config = slim.sharing, dense.config
    assert sharing is not None
    assert sharing.widths is not None
    stored = sharing.widths.qk, sharing.widths.vo
    count = 0
    for projection in "qkvo":
        heads = config.heads_per_unit if projection in "qo" else 1
        column = config.hidden_size + (bool(config.attention_bias) and projection != "o")
        owns = ~(sharing.tied(projection) | sharing.dropped)
        count += int(stored[projection in "vo"][owns].sum()) * heads * column
    o_bias = 3 * config.hidden_size if config.attention_bias is True else 0
    sizes = ledger(slim)
    assert sizes.attention_stored == count + o_bias
    assert sizes.nominal_saving == sizes.dense - sizes.stored == ledger(dense).stored - sizes.stored > 0
    assert sizes.live_bytes == slim.nbytes == 4 * sizes.stored
    assert ledger(SharedView(dense, sharing)).rows == sizes.rows
    assert slim.q_pool_pdh.shape == (len(sharing.stored_slots("q")), 64)


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_the_plain_model_does(kind: str) -> None:
    dense, slim = slim_model(kind)
    tokens = random_tokens((2, 40))
    expected = jax_logits(unshare(slim), tokens)
    np.testing.assert_allclose(jax_logits(slim, tokens), expected, atol=2e-6 * np.abs(expected).max(), rtol=0)
    assert np.abs(jax_logits(dense, tokens) - expected).max() > 1e-3


def test_it_computes_what_transformers_does_with_zeros(tmp_path: Path) -> None:
    overrides = ALL_VARIANTS["attention bias"]
    dense, tokens = headshare_jax.load(saved_hf_model(tmp_path, **overrides)), random_tokens((2, 40))
    slim = share(dense, slim_sharing(dense))
    assert slim.sharing is not None
    expected = hf_logits(tied_by_hand(tiny_hf_model(**overrides), slim.sharing), tokens)
    np.testing.assert_allclose(jax_logits(slim, tokens), expected, atol=2e-5 * np.abs(expected).max(), rtol=0)


def test_it_does_not_matter_how_a_slim_model_is_read() -> None:
    _, slim = slim_model()
    tokens = jnp.asarray(random_tokens((2, 2)))
    expected = np.asarray(jax.jit(Llama.features)(slim, tokens))
    for way in (readings.Gathered(), readings.OneByOne(), reading_to_decode(slim, 2)):
        got, _ = jax.jit(Llama.extend)(slim, tokens, slim.empty_cache(2, 8), way)
        np.testing.assert_allclose(np.asarray(got), expected, atol=2e-6 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("kind", ["attention bias", "phi3, partial rotary", "smollm3, windows"])
def test_decoding_gives_what_the_whole_text_does(kind: str) -> None:
    _, slim = slim_model(kind)
    tokens = random_tokens((2, 24))
    expected = np.asarray(jax.jit(Llama.features)(slim, tokens))
    first, cache = jax.jit(Llama.prefill)(slim, tokens[:, :20], jnp.array([20, 20]), slim.empty_cache(2, 32))
    rest, _ = jax.jit(Llama.extend)(slim, jnp.asarray(tokens[:, 20:]), cache)
    got = np.concatenate([np.asarray(first)[:, None], np.asarray(rest)], axis=1)
    np.testing.assert_allclose(got, expected[:, 19:], atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["attention bias", "phi3, partial rotary"])
def test_native_keeps_a_slim_model_bit_by_bit(tmp_path: Path, kind: str, dtype: str) -> None:
    dense, slim = slim_model(kind, dtype=dtype)
    assert slim.sharing is not None
    for source, folder in ((slim, tmp_path / "model"), (SharedView(dense, slim.sharing), tmp_path / "view")):
        headshare_jax.save(source, folder)
        stored = headshare_jax.open_checkpoint(folder)
        assert stored.sharing == slim.sharing
        for name in parameters.parameter_names(dense.config):
            values = np.asarray(slim.array(name))
            assert values.shape == stored_shape(dense.config, name, slim.sharing)
            assert assemble(stored, name).tobytes() == values.tobytes(), name
            assert len(list((folder / WEIGHTS / name / "c").iterdir())) == 1
        assert verify(folder).checksums
    tokens = random_tokens((1, 9))
    np.testing.assert_array_equal(jax_logits(headshare_jax.load(folder), tokens), jax_logits(slim, tokens))


def test_a_slim_model_lies_on_a_mesh(tmp_path: Path) -> None:
    dense, slim = slim_model()
    assert slim.sharing is not None
    headshare_jax.save(slim, tmp_path / "slim")
    mesh, tokens = make_mesh((2, 2, 2)), random_tokens((8, 12))
    stored = headshare_jax.open_checkpoint(tmp_path / "slim")
    for source in (slim, SharedView(dense, slim.sharing), stored):
        placed = Llama.of(source, mesh=mesh)
        shape = placed.q_pool_pdh.shape
        assert placed.array("q_pool_pdh").sharding.shard_shape(shape) == (shape[0], 64 // 4)
        for name in parameters.parameter_names(dense.config):
            np.testing.assert_array_equal(np.asarray(placed.array(name)), np.asarray(slim.array(name)))
    np.testing.assert_allclose(jax_logits(placed, tokens), jax_logits(slim, tokens), atol=1e-5, rtol=0)
    decoded = []
    for model in (placed, slim):
        _, cache = jax.jit(Llama.prefill)(model, tokens, jnp.full(8, 12), model.empty_cache(8, 16))
        decoded.append(np.asarray(jax.jit(Llama.extend)(model, jnp.asarray(tokens[:, :1]), cache)[0]))
    np.testing.assert_allclose(*decoded, atol=1e-5, rtol=0)


def test_replaced_slices_of_a_slim_model_are_stored_as_they_are_read() -> None:
    dense, slim = slim_model()
    assert slim.sharing is not None
    values = {
        (name, layer): jnp.asarray(2 * slim.read(name, layer))
        for name in ("o_pool_phd", "v_bias_ph")
        for layer in (0, 2)
    }
    over_slim, under = (
        ReplacedView(slim, values),
        SharedView(ReplacedView(dense, values), slim.sharing, check_source=False),
    )
    for (name, layer), value in values.items():
        for model in (Llama.of(over_slim), Llama.of(under)):
            np.testing.assert_array_equal(model.read(name, layer), np.asarray(value))
            np.testing.assert_array_equal(model.read("q_pool_pdh", layer), slim.read("q_pool_pdh", layer))


def test_the_gradient_of_a_column_is_the_sum_over_its_users() -> None:
    _, slim = slim_model()
    tokens = jnp.asarray(random_tokens((2, 12)))

    def gradient(model: Llama) -> dict[str, np.ndarray]:
        def loss(params: dict[str, jax.Array]) -> jax.Array:
            return Llama(model.config, params, sharing=model.sharing)(tokens)[..., 3].mean()

        params = {name: model.array(name) for name in parameters.parameter_names(model.config)}
        return {name: np.asarray(value) for name, value in jax.jit(jax.grad(loss))(params).items()}

    apart, together = gradient(unshare(slim)), gradient(slim)
    assert slim.sharing is not None
    for name, grad in together.items():
        expected, projection = apart[name], PARAMETERS[name].pool
        if projection is not None:
            columns = np.moveaxis(expected, PARAMETERS[name].axes.index("h"), 1).reshape(-1, *grad.shape[1:])
            expected = np.zeros((len(grad) + 1, *grad.shape[1:]), np.float32)
            np.add.at(expected, slim.sharing.pool_index(projection).ravel(), columns)
            expected = expected[:-1]
        np.testing.assert_allclose(grad, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_sharing_an_unshared_slim_model_again_restores_it() -> None:
    _, slim = slim_model()
    assert slim.sharing is not None
    again = share(unshare(slim), slim.sharing)
    for name in parameters.parameter_names(slim.config):
        np.testing.assert_array_equal(np.asarray(again.array(name)), np.asarray(slim.array(name)))
