"""The table of methods: one set of scores serves every ratio, and a method does what its name says."""

from collections.abc import Callable

import numpy as np
import pytest
from support import random_tokens, tiny_model

import headshare_jax as hs
from headshare_jax.methods.scored import ScoredMethod
from headshare_jax.methods.table import METHODS, find
from headshare_jax.methods.work import Amount, MethodSettings, Work
from headshare_jax.sharing.scores import MatchResult


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if not method.by_budget])
def test_scores_serve_every_ratio(name: str) -> None:
    model, method = tiny_model(), find(name)
    kept: dict[str, MatchResult] = {}

    def once(key: str, score: Callable[[], MatchResult]) -> MatchResult:
        kept[key] = kept.get(key) or score()
        return kept[key]

    assert isinstance(method, ScoredMethod)
    work = Work(model, windows_wt=random_tokens((4, 16)), kept=once)
    scores = method.scored(work)
    for ratio in (0.2, 0.4):
        made = method.make(work, Amount(ratio=ratio))
        assert method.scored(work) is scores
        shared, sharing, report = made.model, made.map, made.fit
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
    made = find("direct", settings).make(Work(model, settings), Amount(ratio=0.3))
    assert made.map == hs.sharing_map(hs.match(model, "v"), 0.3, tie="qk", chains="forbid")


def test_donors_of_fitted_maps_keep_their_weights() -> None:
    made = find("fitted").make(Work(tiny_model(), windows_wt=random_tokens((4, 16))), Amount(ratio=0.4))
    assert made.map.chains == "forbid"


def test_what_cannot_be_is_refused() -> None:
    config = tiny_model().config
    with pytest.raises(hs.HeadshareError, match="one of direct, refit, fitted, plan"):
        find("best", MethodSettings())
    with pytest.raises(hs.HeadshareError, match="no use for match"):
        find("fitted", MethodSettings(match="qk"))
    for ratio, words in ((1.0, "below 1"), (float("nan"), "at least 0"), (0.1, "at least 0.1667")):
        with pytest.raises(hs.HeadshareError, match=words):
            Amount(ratio=ratio).check(config)
    with pytest.raises(hs.HeadshareError, match="budget must be above 0"):
        Amount(budget=0.0).check(config)
    with pytest.raises(hs.HeadshareError, match="plan needs a budget, not a ratio") as refused:
        find("plan").make(Work(tiny_model(), windows_wt=random_tokens((4, 16))), Amount(ratio=0.3))
    assert refused.value.options == ("budget", "ratio")
