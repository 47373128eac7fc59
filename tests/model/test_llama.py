"""The model against transformers, and its paths against one another."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from flax import nnx
from support import (
    ALL_VARIANTS,
    VARIANTS,
    compilations,
    hf_logits,
    jax_logits,
    logits_in_pieces,
    random_tokens,
    saved_hf_model,
    sharing_by_hand,
    tiny_hf_model,
    tiny_model,
    torch_or_skip,
)

import headshare_jax
from headshare_jax import HeadshareError, Llama, parameters, share, unshare
from headshare_jax.model import reading as readings
from headshare_jax.parameters import PARAMETERS
from headshare_jax.sharing.source import pool_index

CONTEXT = 64


def rebuilt(model: Llama, **settings: Any) -> Llama:
    """The same parameters with other settings."""
    params = {name: getattr(model, name)[...] for name in parameters.parameter_names(model.config)}
    return Llama(model.config, params, sharing=model.sharing, **settings)


def error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, relative to the largest expected value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def loaded_by_hf(folder: Path, dtype: Any) -> Any:
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model.eval()


def loss(model: Llama, tokens_bt: jax.Array) -> jax.Array:
    log_probs_btv = jax.nn.log_softmax(model(tokens_bt)[:, :-1])
    return -jnp.mean(jnp.take_along_axis(log_probs_btv, tokens_bt[:, 1:, None], axis=-1))


def gradient_function(model: Llama, tokens: np.ndarray) -> Any:
    """The compiled gradient of `loss` for every parameter, and the parameters it is taken at."""
    graph, params, *rest = nnx.split(model, nnx.Param, ...)
    grad = jax.jit(jax.grad(lambda params: loss(nnx.merge(graph, params, *rest), jnp.asarray(tokens))))
    return grad.lower(params).compile(), params


def gradients(model: Llama, tokens: np.ndarray) -> dict[str, np.ndarray]:
    compiled, params = gradient_function(model, tokens)
    grads = compiled(params)
    return {name: np.asarray(grads[name][...]) for name in parameters.parameter_names(model.config)}


@pytest.mark.parametrize("variant", ALL_VARIANTS)
def test_logits_are_those_of_transformers(tmp_path: Path, variant: str) -> None:
    overrides = ALL_VARIANTS[variant]
    tokens = random_tokens((2, CONTEXT + 32))
    logits = jax_logits(headshare_jax.load(saved_hf_model(tmp_path, **overrides)), tokens)
    assert logits.dtype == np.float32
    assert error(logits, hf_logits(tiny_hf_model(**overrides), tokens)) < 2e-5


def test_dynamic_scaling_starts_beyond_the_context() -> None:
    plain, dynamic = tiny_model(), tiny_model(**VARIANTS["dynamic"])
    tokens = random_tokens((1, CONTEXT + 1))
    inside = tokens[:, :CONTEXT]
    assert error(jax_logits(dynamic, inside), jax_logits(plain, inside)) < 2e-6
    assert error(jax_logits(dynamic, tokens), jax_logits(plain, tokens)) > 1e-3


def test_given_positions_are_used_as_by_transformers(tmp_path: Path) -> None:
    torch = torch_or_skip()
    tokens, positions = random_tokens((2, 12)), np.stack([np.arange(12) * 3, np.arange(12) + 5]).astype(np.int32)
    logits = jax_logits(headshare_jax.load(saved_hf_model(tmp_path)), tokens, positions_bt=positions)
    expected = hf_logits(tiny_hf_model(), tokens, position_ids=torch.as_tensor(positions, dtype=torch.long))
    assert error(logits, expected) < 2e-5


# All documents are within the context, and together beyond it: dynamic scaling must not begin.
@pytest.mark.parametrize("name", ["gqa", "dynamic"])
def test_packed_documents_do_not_see_one_another(name: str) -> None:
    model, lengths = tiny_model(**VARIANTS[name]), (30, 28, 12)
    documents = [random_tokens((length,), seed=length) for length in lengths]
    alone = np.zeros((3, max(lengths)), np.int32)
    for row, document in enumerate(documents):
        alone[row, : len(document)] = document
    packed = np.stack([np.concatenate(documents), np.concatenate(documents[::-1])])
    segments = np.stack([np.repeat([4, 0, 7], lengths), np.repeat([1, 2, 3], lengths[::-1])]).astype(np.int32)
    expected = [logits[:length] for logits, length in zip(jax_logits(model, alone), lengths, strict=True)]
    logits = jax_logits(model, packed, segments_bt=segments)
    assert error(logits[0], np.concatenate(expected)) < 2e-6
    assert error(logits[1], np.concatenate(expected[::-1])) < 2e-6


def test_padding_on_the_left_changes_nothing() -> None:
    model, prompt = tiny_model(), random_tokens((13,))
    padded, segments = random_tokens((1, 20), seed=1), np.zeros((1, 20), np.int32)
    padded[0, 7:], segments[0, 7:] = prompt, 1
    logits = jax_logits(model, padded, segments_bt=segments)
    assert error(logits[0, 7:], jax_logits(model, prompt[None])[0]) < 2e-6


@pytest.mark.parametrize("prompts", [(34, 34), (34, 11), (1, 34), None])
def test_prompts_and_pieces_equal_one_pass(prompts: tuple[int, int] | None) -> None:
    model, lengths = tiny_model(**VARIANTS["llama3"], attention_bias=True), prompts or (0, 0)
    rows, cache = random_tokens((2, 70)), model.empty_cache(2, slots=max(lengths) + 40)
    logits, cache = logits_in_pieces(model, rows, lengths, cache, [(0, 33), (33, 34), (34, 36)])
    assert int(cache.length) == max(lengths) + 36
    expected = jax_logits(model, rows)
    for row, length in enumerate(lengths):
        compared = slice(max(length - 1, 0), length + 36)
        assert error(logits[row, compared], expected[row, compared]) < 2e-6


def test_padding_does_not_count_as_length() -> None:
    # Dynamic scaling begins beyond the context of 64, which the padding passes and the prompt does not.
    model, prompt = tiny_model(**VARIANTS["dynamic"]), random_tokens((1, 60))
    padded = jnp.asarray(np.pad(prompt, ((0, 0), (0, 30))))
    features, _ = jax.jit(Llama.prefill)(model, padded, jnp.array([60]), model.empty_cache(1, slots=90))
    assert error(np.asarray(model.logits(features)), jax_logits(model, prompt)[:, -1]) < 2e-6


def test_bfloat16_is_as_exact_as_in_transformers(tmp_path: Path) -> None:
    torch, tokens = torch_or_skip(), random_tokens((4, CONTEXT))
    folder = saved_hf_model(tmp_path, dtype=torch.bfloat16)
    exact = jax_logits(headshare_jax.load(folder), tokens)
    logits = jax_logits(headshare_jax.load(folder, compute_dtype="bfloat16"), tokens)
    theirs = hf_logits(loaded_by_hf(folder, torch.bfloat16), tokens)
    assert logits.dtype == np.float32
    # A tenth is for chance: both round at the same places, but sum in different orders.
    assert np.std(logits - exact) < 1.1 * np.std(theirs - exact)


def test_a_bfloat16_checkpoint_is_stored_and_computed_as_it_is(tmp_path: Path) -> None:
    torch, tokens = torch_or_skip(), random_tokens((2, 20))
    folder = saved_hf_model(tmp_path, dtype=torch.bfloat16)
    model = headshare_jax.load(folder)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("bfloat16")}
    logits = jax_logits(model, tokens)
    assert logits.dtype == np.float32
    assert error(logits, hf_logits(loaded_by_hf(folder, torch.float32), tokens)) < 2e-5


def test_remat_changes_memory_but_not_results() -> None:
    tokens = random_tokens((2, CONTEXT))
    plain = tiny_model(num_hidden_layers=6)
    memory, results = {}, {}
    for remat in ("none", "dots", "full"):
        compiled, params = gradient_function(rebuilt(plain, remat=remat), tokens)
        memory[remat] = compiled.memory_analysis().temp_size_in_bytes
        results[remat] = compiled(params)
    assert memory["full"] < memory["dots"] < memory["none"]
    for remat in ("dots", "full"):
        for name in parameters.parameter_names(plain.config):
            assert error(np.asarray(results[remat][name][...]), np.asarray(results["none"][name][...])) < 1e-5


@pytest.mark.parametrize("tie", ["qkvo", "mixed"])
def test_it_does_not_matter_how_heads_and_matrices_are_read(tie: str) -> None:
    dense = tiny_model(attention_bias=True, hidden_size=64, head_dim=16)
    model = share(dense, sharing_by_hand(dense, tie, {3: 0, 5: 1}))
    tokens = jnp.asarray(random_tokens((2, 2)))
    matrices = readings.unstacked({name: model.array(name) for name in readings.STACKED_MATRICES})
    ways: list[readings.Reading] = [readings.OneByOne(), readings.ByKernel()]
    ways += [readings.OwnMatrices(heads, matrices) for heads in (readings.Gathered(), readings.OneByOne())]
    expected = np.asarray(jax.jit(Llama.features)(model, tokens))
    for way in (readings.Gathered(), *ways):
        got, _ = jax.jit(Llama.extend)(model, tokens, model.empty_cache(2, 8), way)
        assert error(np.asarray(got), expected) < 2e-6


def test_decoding_in_bfloat16_sums_heads_in_float32() -> None:
    model = rebuilt(tiny_model(num_attention_heads=16, num_key_value_heads=16, head_dim=16), compute_dtype="bfloat16")
    tokens = jnp.asarray(random_tokens((4, 1)))
    cache = rebuilt(model).empty_cache(4, 8)
    exact, _ = jax.jit(Llama.extend)(rebuilt(model, compute_dtype="float32"), tokens, cache)
    errors = {}
    for way in (readings.Gathered(), readings.OneByOne()):
        got, _ = jax.jit(Llama.extend)(model, tokens, model.empty_cache(4, 8), way)
        errors[type(way)] = error(np.asarray(got, np.float32), np.asarray(exact))
    assert errors[readings.OneByOne] < 1.2 * errors[readings.Gathered]


@pytest.mark.parametrize("tie", ["qkvo", "mixed"])
@pytest.mark.parametrize("length", [8, 40])
def test_the_gradient_of_a_shared_row_is_the_sum_over_its_users(tie: str, length: int) -> None:
    dense, tokens = tiny_model(attention_bias=True), random_tokens((2, length))
    units = dense.config.num_kv_heads
    shared = share(dense, sharing_by_hand(dense, tie, {units: 0, units + 1: 0, 2 * units: 1}))
    apart, together = gradients(unshare(shared), tokens), gradients(shared, tokens)
    for name, grad in together.items():
        projection = PARAMETERS[name].pool
        expected = apart[name]
        if projection is not None:
            index = pool_index(dense.config, projection, shared.sharing).ravel()
            # One row more, for what dropped heads get.
            expected = np.zeros((len(grad) + 1, *grad.shape[1:]), grad.dtype)
            np.add.at(expected, index, apart[name])
            expected = expected[:-1]
        assert error(grad, expected) < 1e-5, name


def test_models_are_arguments_of_jitted_functions() -> None:
    forward = jax.jit(lambda model, tokens: model(tokens))
    tokens = jnp.asarray(random_tokens((1, 8)))
    first, second = tiny_model(seed=0), tiny_model(seed=1)
    outputs = [np.asarray(forward(model, tokens)) for model in (first, second)]
    assert compilations(forward) == 1
    assert error(outputs[0], outputs[1]) > 0.1
    shared = [share(model, sharing_by_hand(model, "qkv", {2: 0})) for model in (first, second)]
    outputs = [np.asarray(forward(model, tokens)) for model in shared]
    assert compilations(forward) == 2


def test_random_models_are_reproducible() -> None:
    config = tiny_model().config
    one, same, other = (Llama.init(config, jax.random.key(seed), dtype="bfloat16") for seed in (0, 0, 1))
    for name in parameters.parameter_names(config):
        value = np.asarray(getattr(one, name)[...], np.float32)
        assert getattr(one, name).dtype == jnp.bfloat16
        np.testing.assert_array_equal(value, np.asarray(getattr(same, name)[...], np.float32))
        if "norm" not in name:
            assert np.std(value) == pytest.approx(0.02, rel=0.05)
            assert np.any(value != np.asarray(getattr(other, name)[...], np.float32))


@pytest.mark.parametrize("setting", [{"compute_dtype": "float64"}, {"remat": "some"}])
def test_unknown_settings_are_refused(setting: dict[str, str]) -> None:
    (name,) = setting
    with pytest.raises(HeadshareError, match=name):
        rebuilt(tiny_model(), **setting)
