"""The table of methods: one set of scores serves every ratio, and a method does what its name says."""

import numpy as np
import pytest
from support import random_tokens, tiny_model

import headshare_jax as hs
from headshare_jax.fit import methods
from headshare_jax.fit.methods import METHODS, Amount, MethodSettings, Scoring


@pytest.mark.parametrize("name", [name for name in METHODS if name != "plan"])
def test_scores_serve_every_ratio(name: str) -> None:
    model, windows, settings = tiny_model(), random_tokens((4, 16)), MethodSettings()
    method = methods.find(name, settings)
    scores = method.scores(Scoring(model, settings, windows))
    for ratio in (0.2, 0.4):
        sharing = methods.choose(method, scores, Amount(ratio=ratio), model.config, settings)
        shared, report = methods.apply(method, model, sharing, windows)
        assert shared.sharing is not None
        assert shared.sharing == sharing
        changed = np.count_nonzero(sharing.receives | sharing.dropped)
        assert (sharing.method, changed) == (name, int(ratio * 6))
        assert sharing.dropped.any() == (name in ("drop", "magnitude"))
        assert (report is not None) == method.refits
        if report is None:
            for layer in range(model.config.num_layers):
                assert np.array_equal(shared.read("o_pool_phd", layer), model.read("o_pool_phd", layer))


def test_settings_reach_the_map() -> None:
    model = tiny_model()
    settings = MethodSettings(match="v", tie="qk", chains="forbid")
    method = methods.find("direct", settings)
    scores = method.scores(Scoring(model, settings))
    sharing = methods.choose(method, scores, Amount(ratio=0.3), model.config, settings)
    assert sharing == hs.sharing_map(hs.match(model, "v"), 0.3, tie="qk", chains="forbid")


def test_donors_of_fitted_maps_keep_their_weights() -> None:
    model, windows, settings = tiny_model(), random_tokens((4, 16)), MethodSettings()
    method = METHODS["fitted"]
    scores = method.scores(Scoring(model, settings, windows))
    sharing = methods.choose(method, scores, Amount(ratio=0.4), model.config, settings)
    assert sharing.chains == "forbid"


def test_what_cannot_be_is_refused() -> None:
    config = tiny_model().config
    with pytest.raises(hs.HeadshareError, match="one of direct, refit, fitted, plan"):
        methods.find("best", MethodSettings())
    with pytest.raises(hs.HeadshareError, match="no use for match"):
        methods.find("fitted", MethodSettings(match="qk"))
    for ratio, words in ((1.0, "below 1"), (float("nan"), "at least 0"), (0.1, "at least 0.1667")):
        with pytest.raises(hs.HeadshareError, match=words):
            methods.check_amount(Amount(ratio=ratio), config)
    with pytest.raises(hs.HeadshareError, match="budget must be above 0"):
        methods.check_amount(Amount(budget=0.0), config)
