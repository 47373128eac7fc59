"""Refit: against least squares on what transformers computes, and what holds for any map and any text."""

import tempfile
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equivalent_models import equivalent, with_params
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    ALL_VARIANTS,
    VARIANTS,
    jax_logits,
    random_tokens,
    sharing_by_hand,
    tied_by_hand,
    tiny_hf_model,
    tiny_model,
    torch_or_skip,
)

import headshare_jax
from headshare_jax import HeadshareError, Llama, Widths, parameters, share
from headshare_jax.calibration.streams import BLOCKS, advance, layer_weights, on_disk
from headshare_jax.calibration.windows import calibration_windows
from headshare_jax.fit.moments import Moments, solve_ridge
from headshare_jax.fit.refit import RefitSettings, refit

WINDOWS = random_tokens((8, 32))


def model_of(hf: Any) -> Llama:
    """A transformers model's parameters, in float32, as a `Llama`."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        return headshare_jax.load(folder)


KINDS = ["gqa", "attention bias", "mlp bias", "llama3", "gelu", "longrope", "mistral, window", "qwen2, windows"]
KINDS += ["qwen3, biases", "phi3, partial rotary", "smollm3", "smollm3, windows"]


@pytest.mark.parametrize("name", KINDS)
def test_the_walk_computes_what_the_model_does(name: str) -> None:
    model = tiny_model(**ALL_VARIANTS[name])
    x_wtd = model.array("embed_vd")[WINDOWS]
    for layer in range(model.config.num_layers):
        for block in BLOCKS:
            x_wtd = advance(model.config, layer_weights(model, layer), x_wtd, block)
    scale = 1 / jnp.sqrt(jnp.mean(x_wtd**2, axis=-1, keepdims=True) + model.config.rms_norm_eps)
    expected = np.asarray(jax.jit(Llama.features)(model, WINDOWS))
    found = np.asarray(x_wtd * scale * model.final_norm_d[...][None, None])
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


def captured(hf: Any, tokens: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What transformers' layer reads, its heads give and its attention gives, float64 [M, ...]."""
    torch, found = torch_or_skip(), dict[str, Any]()
    block = hf.model.layers[layer]
    hooks = [
        block.register_forward_pre_hook(lambda module, args: found.update(x=args[0])),
        block.self_attn.o_proj.register_forward_hook(lambda module, args, out: found.update(h=args[0], y=out)),
    ]
    with torch.no_grad():
        hf(torch.as_tensor(tokens, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return tuple(found[name].flatten(0, 1).numpy() for name in "xhy")  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("overrides", "drops", "slim"),
    [
        ({}, False, False),
        (VARIANTS["mha"], False, False),
        (VARIANTS["mha"], True, False),
        ({"attention_bias": True}, True, False),
        ({"attention_bias": True}, True, True),
    ],
    ids=["gqa, shared", "mha, shared", "mha, dropped", "bias, dropped", "bias, slim"],
)
def test_refit_is_the_least_squares_solution(overrides: dict[str, Any], drops: bool, slim: bool) -> None:
    hf, torch = tiny_hf_model(**overrides), torch_or_skip()
    dense = model_of(hf)
    units = dense.config.num_kv_heads
    # With drops, the last layer has dropped units only.
    pairs, dropped = ({units: 0}, [2 * units - 1, 2 * units]) if drops else ({units: 0, 2 * units: 1}, [])
    sharing = sharing_by_hand(dense, "qkv", pairs, dropped)
    cut = np.zeros((3, dense.config.num_heads, dense.config.head_dim), bool)
    if slim:
        widths = Widths.full(dense.config)
        rank, pairs_kept = widths.rank.copy(), widths.pairs.copy()
        # In layer 1 the receiver stays whole; in layer 2 what is not dropped is slim.
        rank[2, 1], pairs_kept[2, 1, 3:] = 5, False
        cut[2, 2:, 5:] = True
        sharing = replace(sharing, widths=Widths(rank, pairs_kept, dense.config.head_dim))
    fitted, report = refit(
        dense, share(dense, sharing), WINDOWS, RefitSettings(scope="receivers", ridges=(1.0,), drifts=(0.5,))
    )
    hf, tied, tokens = hf.double(), tied_by_hand(tiny_hf_model(**overrides), sharing).double(), WINDOWS
    assert [block.layer for block in report.blocks] == [1, 2]
    for layer in (1, 2):
        width = dense.config.heads_per_unit * dense.config.head_dim
        kept = np.repeat(~sharing.dropped[layer], width) & ~cut[layer].ravel()
        assert report.blocks[layer - 1].fitted_rows == kept.sum()
        x, _, y = captured(hf, tokens, layer)
        x_tied, h, _ = captured(tied, tokens, layer)
        projection = tied.model.layers[layer].self_attn.o_proj
        bias = 0.0 if projection.bias is None else projection.bias.detach().numpy()
        w = 1 / np.linalg.norm(x + y, axis=1, keepdims=True)
        target = y - bias + 0.5 * (x - x_tied)
        before = projection.weight.detach().numpy().T
        rho = np.mean(np.sum((w * h[:, kept]) ** 2, axis=0))
        rows = np.concatenate([w * h[:, kept], np.sqrt(rho) * np.eye(kept.sum())])
        values = np.concatenate([w * target, np.sqrt(rho) * before[kept]])
        expected = np.zeros_like(before)
        expected[kept] = np.linalg.lstsq(rows, values)[0]
        found = fitted.read("o_pool_phd", layer).reshape(expected.shape)
        assert np.abs(expected - before).max() > 1e-2
        np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)
        assert not found[~kept].any()
        with torch.no_grad():
            projection.weight.copy_(torch.tensor(found.T))


def test_without_receivers_no_bit_changes() -> None:
    dense = tiny_model()
    shared = share(dense, sharing_by_hand(dense, "qkv", {}))
    fitted, report = refit(dense, shared, WINDOWS)
    assert report.blocks == ()
    for name in parameters.parameter_names(dense.config):
        assert getattr(fitted, name)[...] is getattr(shared, name)[...], name


def test_layers_below_the_first_receiver_are_untouched() -> None:
    dense = tiny_model()
    fitted, report = refit(dense, share(dense, sharing_by_hand(dense, "qkv", {4: 0})), WINDOWS, RefitSettings("all"))
    assert [(block.layer, block.block) for block in report.blocks] == [(2, "attention"), (2, "mlp")]
    for name in ("o_pool_phd", "down_lfd"):
        for layer in (0, 1):
            np.testing.assert_array_equal(fitted.read(name, layer), dense.read(name, layer))


@pytest.mark.parametrize(("pairs", "dropped"), [({2: 0}, []), ({}, [2, 3])], ids=["shared", "dropped"])
@pytest.mark.parametrize(("scope", "count"), [("receivers", 1), ("attention", 2), ("all", 4)])
def test_scope_says_what_is_fitted(scope: str, count: int, pairs: dict[int, int], dropped: list[int]) -> None:
    dense = tiny_model()
    shared = share(dense, sharing_by_hand(dense, "qkv", pairs, dropped))
    _, report = refit(dense, shared, WINDOWS, RefitSettings(scope=scope))
    assert len(report.blocks) == count
    assert report.blocks[0].fitted_rows == (0 if dropped else 64)


@settings(max_examples=10)
@given(
    donors=st.lists(st.none() | st.integers(0, 3), min_size=2, max_size=2),
    tie=st.sampled_from(["q", "qk", "qkv", "vo", "qkvo"]),
    scope=st.sampled_from(["receivers", "attention", "all"]),
    seed=st.integers(0, 99),
)
def test_no_error_ever_rises(donors: list[int | None], tie: str, scope: str, seed: int) -> None:
    dense = tiny_model(seed=3)
    pairs = {unit: donor for unit, donor in zip((4, 5), donors, strict=True) if donor is not None}
    dropped = [unit for unit in (4, 5) if unit not in pairs]
    shared = share(dense, sharing_by_hand(dense, tie, pairs, dropped))
    fitted, report = refit(dense, shared, random_tokens((6, 16), seed=seed), RefitSettings(scope=scope))
    for block in report.blocks:
        assert block.error_after <= block.error_before
        assert block.held_out_after <= block.held_out_before
        assert (block.error_after < block.error_before) == (block.ridge is not None)
    assert np.isfinite(jax_logits(fitted, WINDOWS)).all()


def test_a_refitted_model_is_closer_to_the_dense_one_on_other_text() -> None:
    dense = tiny_model()
    shared = share(dense, sharing_by_hand(dense, "qkv", {2: 0, 5: 1}))
    fitted, _ = refit(dense, shared, random_tokens((32, 32), seed=1))
    expected = jax_logits(dense, WINDOWS)
    errors = [np.linalg.norm(jax_logits(model, WINDOWS) - expected) for model in (shared, fitted)]
    assert errors[1] < 0.8 * errors[0]


def test_only_rows_that_nothing_else_uses_are_fitted() -> None:
    dense = tiny_model(**VARIANTS["mha"])
    shared = share(dense, sharing_by_hand(dense, "qkvo", {4: 0, 9: 5}))
    fitted, report = refit(dense, shared, WINDOWS, RefitSettings(scope="attention"))
    assert [block.fitted_rows for block in report.blocks] == [2 * 16, 3 * 16]
    rows = np.any(fitted.o_pool_phd[...] != shared.o_pool_phd[...], axis=(1, 2))
    # Pool rows 0 to 3 are the first layer's; 4.. are slots 5, 6, 7 and 8, 10, 11.
    assert np.flatnonzero(rows).tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_weights_keep_their_type(dtype: str) -> None:
    dense = tiny_model(dtype=dtype)
    shared = share(dense, sharing_by_hand(dense, "qkv", {2: 0, 5: 1}))
    fitted, report = refit(dense, shared, WINDOWS)
    exact, _ = refit(
        with_params(dense, **{name: getattr(dense, name)[...].astype("float32") for name in _names(dense)}),
        with_params(shared, **{name: getattr(shared, name)[...].astype("float32") for name in _names(dense)}),
        WINDOWS,
        RefitSettings(),
    )
    assert fitted.o_pool_phd.dtype == fitted.down_lfd.dtype == dtype
    assert report.blocks[0].error_after < report.blocks[0].error_before
    first, exact_first = (np.asarray(model.read("o_pool_phd", 1), np.float32) for model in (fitted, exact))
    info = jnp.finfo(dtype)
    unit = np.maximum(float(info.eps) * 2.0 ** np.floor(np.log2(np.abs(exact_first))), float(info.smallest_subnormal))
    # The exact weights are rounded too, to float32.
    assert (np.abs(first - exact_first) <= 0.501 * unit).all()


def _names(model: Llama) -> tuple[str, ...]:
    return parameters.parameter_names(model.config)


def test_singular_systems_are_regularised_and_reported() -> None:
    dense = tiny_model()
    # Two units of one layer with the same weights: their outputs are the same, and without a ridge the system singular.
    shared = share(dense, sharing_by_hand(dense, "qkv", {2: 0, 3: 0}))
    settings = RefitSettings(ridges=(0.0,), scope="receivers")
    fitted, report = refit(dense, shared, random_tokens((32, 32)), settings)
    assert report.blocks[0].raised
    assert report.blocks[0].error_after < report.blocks[0].error_before
    assert np.isfinite(np.asarray(fitted.o_pool_phd[...])).all()


@given(st.integers(1, 12), st.integers(0, 6), st.floats(0, 10), st.integers(0, 99))
def test_ridge_solutions_are_those_of_least_squares(size: int, rank: int, ridge: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    h, t = rng.normal(size=(rank, size)), rng.normal(size=(rank, 3))
    found, used = solve_ridge(h.T @ h, h.T @ t, ridge)
    assert used >= ridge
    assert np.isfinite(found).all()
    rho = used * np.mean(np.sum(h**2, axis=0)) if rank else 0.0
    rows = np.concatenate([h, np.sqrt(rho) * np.eye(size)])
    expected = np.linalg.lstsq(rows, np.concatenate([t, np.zeros((size, 3))]))[0]
    np.testing.assert_allclose(h @ found, h @ expected, atol=1e-5)


def test_an_accelerator_solves_in_float32_what_the_host_does_in_float64() -> None:
    rng = np.random.default_rng(0)
    h = rng.normal(size=(400, 64)) * np.geomspace(1, 1e-4, 64) @ np.linalg.qr(rng.normal(size=(64, 64)))[0]
    e, d = rng.normal(size=(2, 400, 32))
    sums = Moments(h.T @ h, np.stack([h.T @ e, h.T @ d]), np.array([[np.sum(e * e), np.sum(e * d)]] * 2), 400)
    there = replace(sums, device=jax.devices()[0])
    (host,), _ = sums.solutions(0.01, (0.5,))
    (found,), used = there.solutions(0.01, (0.5,))
    assert used == 0.01
    np.testing.assert_allclose(found.change, host.change, atol=1e-4 * np.abs(host.change).max())
    assert found.error == pytest.approx(host.error, rel=1e-7)
    # Also by the product that the equations spare.
    assert there.error(found.change) == pytest.approx(sums.error(host.change), rel=1e-6)
    assert host.error == pytest.approx(sums.error(host.change), rel=1e-9)
    # Where float32 might not do, the host solves.
    np.testing.assert_array_equal(there.solutions(1e-4, (0.5,))[0][0].change, sums.solutions(1e-4, (0.5,))[0][0].change)


@settings(max_examples=4)
@given(seed=st.integers(0, 99), block=st.sampled_from(["vo", "qk"]))
def test_what_cannot_be_seen_in_a_models_outputs_changes_no_error(seed: int, block: str) -> None:
    dense = tiny_model(seed=1)
    transformed = equivalent(dense, block, np.random.default_rng(seed))
    # A ridge pulls to the weights themselves, whose scale V and O may exchange.
    settings = RefitSettings(scope="receivers", ridges=(1e-9,) if block == "vo" else (0.1,), drifts=(1.0,))
    errors = []
    for model in (dense, transformed):
        shared = share(model, sharing_by_hand(model, "qkv", {2: 0, 5: 1}))
        _, report = refit(model, shared, random_tokens((16, 32)), settings)
        errors.append([block.error_after for block in report.blocks])
    np.testing.assert_allclose(errors[1], errors[0], rtol=2e-3)


@pytest.mark.parametrize("block", ["vo", "qk"])
def test_equivalent_models_are_equivalent(block: str) -> None:
    dense = tiny_model()
    expected = jax_logits(dense, WINDOWS)
    found = jax_logits(equivalent(dense, block, np.random.default_rng(0)), WINDOWS)
    assert np.abs(found - expected).max() < 1e-3 * np.abs(expected).max()


def test_batches_change_nothing_but_rounding() -> None:
    dense = tiny_model()
    shared = share(dense, sharing_by_hand(dense, "qkv", {2: 0, 5: 1}))
    one, all = (
        refit(dense, shared, WINDOWS, RefitSettings(ridges=(1.0,), drifts=(0.5,), batch_tokens=n))[0] for n in (1, 1000)
    )
    for name in ("o_pool_phd", "down_lfd"):
        np.testing.assert_allclose(getattr(one, name)[...], getattr(all, name)[...], atol=2e-6)


def test_hidden_states_that_find_no_room_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: Any) -> int:
            raise OSError(28, "No space left on device")

        def __enter__(self) -> "Full":
            return self

        def __exit__(self, *args: object) -> None: ...

    monkeypatch.setattr("tempfile.TemporaryFile", Full)
    with pytest.raises(HeadshareError, match="TMPDIR"), on_disk([np.zeros((1, 2, 3))], (2, 3)):
        pass


def test_text_that_is_too_short_is_told_how_much_is_needed() -> None:
    with pytest.raises(HeadshareError, match="99 tokens, but 10 windows of 10 need 100"):
        calibration_windows(list(range(99)), 10, 10, 160)
    with pytest.raises(HeadshareError, match="vocabulary of 50"):
        calibration_windows(list(range(99)), 9, 10, 50)
    with pytest.raises(HeadshareError, match="at least one window"):
        calibration_windows(list(range(99)), 0, 10, 160)
    assert calibration_windows(list(range(99)), 3, 4, 160)[2].tolist() == [8, 9, 10, 11]
    dense = tiny_model()
    with pytest.raises(HeadshareError, match="64 tokens"):
        refit(dense, share(dense, sharing_by_hand(dense, "qkv", {2: 0})), WINDOWS[:1])


def test_wrong_settings_and_models_are_refused() -> None:
    for wrong in ({"scope": "some"}, {"ridges": ()}, {"ridges": (-1.0,)}, {"drifts": (2.0,)}, {"held_out": 1.0}):
        with pytest.raises(HeadshareError):
            RefitSettings(**wrong)  # type: ignore[arg-type]
    dense = tiny_model()
    with pytest.raises(HeadshareError, match="shared model"):
        refit(dense, dense, WINDOWS)
