"""Methods of sharing: each is a way to score units, a way to choose among them, and perhaps a refit.

Scoring is what costs, and its result serves every ratio and budget: score once, then choose and apply for each. What
takes text can be kept in journals, layer by layer.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from headshare_jax.budget import budget_map, check_budget, units_to_save
from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.functional import match_functional
from headshare_jax.journal import Journals
from headshare_jax.modeling import Llama
from headshare_jax.parameters import WeightSource
from headshare_jax.refit import RefitReport, refit
from headshare_jax.selection import drop_map, receiver_count, sharing_map, within_shards
from headshare_jax.sharing import SharingMap
from headshare_jax.similarity import MatchResult, magnitudes, match
from headshare_jax.transform import share

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MethodSettings:
    """What a method is told besides the ratio.

    Attributes:
      match: match function of the methods that compare weights; None for their default, `qk`.
      seed: of random scores.
      tie: projections that are shared.
      chains: as for `sharing_map`; None for the method's own.
      shards: chips over which heads are cut; donors are then in their receivers' shards. None for any donors.
    """

    match: str | None = None
    seed: int = 0
    tie: str = "qkv"
    chains: str | None = None
    shards: int | None = None


@dataclass(frozen=True)
class Amount:
    """How much to do without: one of the two is given.

    Attributes:
      ratio: part of the units that become receivers, or are dropped, in [0, 1).
      budget: part of the attention parameters (q, k, v and o weights) to keep, in (0, 1].
    """

    ratio: float | None = None
    budget: float | None = None

    def __str__(self) -> str:
        return f"{self.ratio:g}" if self.budget is None else f"budget {self.budget:g}"


Scorer = Callable[[WeightSource, np.ndarray | None, MethodSettings, Progress, Journals | None], MatchResult]
Chooser = Callable[[MatchResult, Amount, LlamaConfig, MethodSettings], SharingMap]


def weight_scores(
    source: WeightSource,
    windows_wt: np.ndarray | None,
    settings: MethodSettings,
    progress: Progress,
    journals: Journals | None = None,
) -> MatchResult:
    """Cosines of weights."""
    return match(source, settings.match or "qk", seed=settings.seed, progress=progress)


def random_scores(
    source: WeightSource,
    windows_wt: np.ndarray | None,
    settings: MethodSettings,
    progress: Progress,
    journals: Journals | None = None,
) -> MatchResult:
    """Scores drawn at random."""
    return match(source, "random", seed=settings.seed, progress=progress)


def functional_scores(
    source: WeightSource,
    windows_wt: np.ndarray | None,
    settings: MethodSettings,
    progress: Progress,
    journals: Journals | None = None,
) -> MatchResult:
    """What units compute on the text, and donors in their place."""
    assert windows_wt is not None
    return match_functional(source, windows_wt, journals=journals, progress=progress)


def magnitude_scores(
    source: WeightSource,
    windows_wt: np.ndarray | None,
    settings: MethodSettings,
    progress: Progress,
    journals: Journals | None = None,
) -> MatchResult:
    """How small a unit's weights are."""
    return magnitudes(source, progress=progress)


def best_pairs(result: MatchResult, amount: Amount, config: LlamaConfig, settings: MethodSettings) -> SharingMap:
    """Every receiver has the donor that is best for it."""
    return _pairs(result, amount, config, settings, settings.chains or "resolve")


def unchained_pairs(result: MatchResult, amount: Amount, config: LlamaConfig, settings: MethodSettings) -> SharingMap:
    """No donor receives."""
    return _pairs(result, amount, config, settings, settings.chains or "forbid")


def _pairs(
    result: MatchResult, amount: Amount, config: LlamaConfig, settings: MethodSettings, chains: str
) -> SharingMap:
    if amount.ratio is not None:
        return sharing_map(result, amount.ratio, chains=chains, tie=settings.tie)
    assert amount.budget is not None
    count, most = units_to_save(config, amount.budget, settings.tie), config.num_units - config.num_kv_heads
    if count > most:
        raise HeadshareError(
            f"A budget of {amount.budget} cannot be met by sharing {settings.tie}, which {count} of {config.num_units} "
            f"units would have to do, where at most {most} can; keep more, share more of each unit (--tie qkvo), or "
            "drop units too (the method plan)."
        )
    ratio = count / config.num_units
    return replace(sharing_map(result, ratio, chains=chains, tie=settings.tie), budget=amount.budget)


def least_dropped(result: MatchResult, amount: Amount, config: LlamaConfig, settings: MethodSettings) -> SharingMap:
    """The units whose loss costs least are dropped."""
    ratio = amount.ratio
    if amount.budget is not None:
        ratio = units_to_save(config, amount.budget, "qkvo") / config.num_units
    assert ratio is not None
    return replace(drop_map(result, ratio), budget=amount.budget)


def within_budget(result: MatchResult, amount: Amount, config: LlamaConfig, settings: MethodSettings) -> SharingMap:
    """Every unit is kept, shared or dropped as it costs least."""
    if amount.budget is None:
        raise HeadshareError("The method plan needs a budget, not a ratio: it chooses how many units share or go.")
    return budget_map(result, config, amount.budget)


@dataclass(frozen=True)
class Method:
    """A method of sharing.

    Attributes:
      name, summary: for those who choose among methods.
      scores: scores all units; methods with the same function share its result.
      choose: makes a map of the scores, for a ratio or a budget.
      refits: whether output projections are fitted to the dense model after sharing.
    """

    name: str
    summary: str
    scores: Scorer
    choose: Chooser = best_pairs
    refits: bool = False

    @property
    def needs_text(self) -> bool:
        """Whether it needs calibration text, to score or to refit."""
        return self.refits or self.scores is functional_scores


METHODS = {
    method.name: method
    for method in (
        Method("direct", "the paper's DirectShare", weight_scores),
        Method("refit", "direct, then output weights fitted to the dense model", weight_scores, refits=True),
        Method("fitted", "refit, with donors by what they compute", functional_scores, unchained_pairs, refits=True),
        Method("plan", "keep, share or drop each unit, then refit", functional_scores, within_budget, refits=True),
        Method("drop", "drop the units that matter least, then refit", functional_scores, least_dropped, refits=True),
        Method(
            "magnitude",
            "drop the units with the smallest weights, then refit",
            magnitude_scores,
            least_dropped,
            refits=True,
        ),
        Method("random", "pairs drawn at random, a baseline", random_scores),
        Method("random-refit", "pairs drawn at random, then refit", random_scores, refits=True),
    )
}


def find(name: str, settings: MethodSettings) -> Method:
    """The method of a name.

    Raises:
      HeadshareError: there is none of this name, or it has no use for the match function that was given.
    """
    if name not in METHODS:
        raise HeadshareError(f"The method must be one of {', '.join(METHODS)}, not {name!r}.")
    method = METHODS[name]
    if settings.match is not None and method.scores is not weight_scores:
        users = ", ".join(other.name for other in METHODS.values() if other.scores is weight_scores)
        raise HeadshareError(f"The method {name} has no match function to choose (these have: {users}).")
    return method


def check_amount(amount: Amount, config: LlamaConfig) -> None:
    """Raises HeadshareError unless a ratio or a budget is possible and changes at least one of the model's units."""
    if amount.budget is not None:
        check_budget(amount.budget)
        return
    ratio, units = amount.ratio, config.num_units
    assert ratio is not None
    if not 0 <= ratio < 1:
        raise HeadshareError(f"The sharing ratio must be at least 0 and below 1, not {ratio}.")
    if not receiver_count(ratio, units):
        raise HeadshareError(
            f"A ratio of {ratio} makes none of {units} units a receiver; give at least "
            f"{math.ceil(1e4 / units) / 1e4}, which makes one."
        )


def choose(
    method: Method, result: MatchResult, amount: Amount, config: LlamaConfig, settings: MethodSettings
) -> SharingMap:
    """The map that a method makes of its scores, which names the method.

    Raises:
      HeadshareError: as `sharing_map`, `drop_map`, `budget_map` and `within_shards`.
    """
    if settings.shards is not None and result.scores is not None:
        result = within_shards(result, settings.shards)
    return replace(method.choose(result, amount, config, settings), method=method.name)


def apply(
    method: Method,
    source: WeightSource,
    sharing: SharingMap,
    windows_wt: np.ndarray | None = None,
    *,
    journals: Journals | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[Llama, RefitReport | None]:
    """The model shared by a map and, if the method does so, refitted; with the record of the fit.

    Args:
      method: says whether to refit.
      source: the dense model, or an opened checkpoint.
      sharing: the method's choice, or any other map.
      windows_wt: int32 [W, T], calibration text, if the method refits.
      journals: as for `refit`.
      progress: called with the layers refitted and in all.

    Raises:
      HeadshareError: as `share` and `refit`.
    """
    shared = share(Llama.of(source), sharing)
    if not method.refits:
        return shared, None
    assert windows_wt is not None
    return refit(source, shared, windows_wt, journals=journals, progress=progress)
