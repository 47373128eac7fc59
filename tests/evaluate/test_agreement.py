"""Two models' predictions against each other, layer by layer from disk."""

import jax
import numpy as np
import pytest
import support

import headshare_jax as hs
from headshare_jax import HeadshareError
from headshare_jax.model.mesh import make_mesh


@pytest.fixture(scope="module")
def dense() -> hs.Llama:
    return support.tiny_model()


@pytest.fixture(scope="module")
def shared(dense: hs.Llama) -> hs.Llama:
    return hs.share(dense, hs.sharing_map(hs.match(dense), 0.4))


def test_figures_are_those_of_the_models_logits(dense: hs.Llama, shared: hs.Llama) -> None:
    windows_wt = support.random_tokens((3, 16))
    found = hs.agreement(dense, shared, windows_wt)
    first, second = (
        np.asarray(jax.nn.log_softmax(support.jax_logits(model, windows_wt)[:, :-1])) for model in (dense, shared)
    )
    target = windows_wt[:, 1:, None]
    losses = [-np.take_along_axis(each, target, -1)[..., 0].mean(axis=1) for each in (first, second)]
    difference_w = losses[1] - losses[0]
    ratio = np.exp(difference_w.mean())
    assert found.before == pytest.approx(np.exp(losses[0].mean()), rel=1e-5)
    assert found.ratio == pytest.approx(ratio, rel=1e-5)
    assert found.ratio_error == pytest.approx(ratio * difference_w.std(ddof=1) / 3**0.5, rel=1e-3)
    assert found.kl == pytest.approx((np.exp(first) * (first - second)).sum(-1).mean(), rel=1e-4)
    assert found.same_choice == pytest.approx((first.argmax(-1) == second.argmax(-1)).mean())
    assert (found.windows, found.seq_len) == (3, 16)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 2, 4)])
def test_models_on_a_mesh_compare_as_from_disk(dense: hs.Llama, shared: hs.Llama, sizes: tuple[int, ...]) -> None:
    windows_wt, mesh = support.random_tokens((11, 16)), make_mesh(sizes)
    layers, spread = (
        hs.agreement(*models, windows_wt)
        for models in ((dense, shared), [hs.Llama.of(model, mesh=mesh) for model in (dense, shared)])
    )
    for name in ("before", "after", "ratio_error", "same_choice"):
        assert getattr(spread, name) == pytest.approx(getattr(layers, name), rel=1e-6)
    assert spread.kl == pytest.approx(layers.kl, rel=1e-4)


def test_a_model_agrees_with_itself(dense: hs.Llama) -> None:
    found = hs.agreement(dense, dense, support.random_tokens((1, 8)))
    assert (found.ratio, found.kl, found.same_choice, found.ratio_error) == (1.0, 0.0, 1.0, None)
    said = f"perplexity {found.before:,.0f} -> {found.after:,.0f} (1.000x), KL 0.000 nats, "
    assert str(found) == said + "the same first choice in 100.0%"


@pytest.mark.parametrize(
    ("windows_wt", "said"),
    [
        (np.zeros((2, 1), np.int32), "at least two tokens"),
        (np.full((2, 4), 10**6), "outside the models' vocabulary"),
        (np.full((2, 4), -1), "outside the models' vocabulary"),
    ],
)
def test_impossible_windows_are_refused(dense: hs.Llama, windows_wt: np.ndarray, said: str) -> None:
    with pytest.raises(HeadshareError, match=said):
        hs.agreement(dense, dense, windows_wt)


def test_other_vocabularies_are_refused(dense: hs.Llama) -> None:
    other = support.tiny_model(vocab_size=dense.config.vocab_size + 1)
    with pytest.raises(HeadshareError, match="one vocabulary"):
        hs.agreement(dense, other, support.random_tokens((1, 8)))
