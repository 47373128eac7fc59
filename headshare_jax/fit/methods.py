"""Methods of sharing: each is a way to score units, a way to choose among them, and perhaps a refit.

Scoring is what costs, and its result serves every ratio and budget: score once, then choose and apply for each. What
takes text can be kept in journals, layer by layer.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from jax.sharding import Mesh

from headshare_jax.calibration.journal import Journals
from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.fit.refit import RefitReport, refit
from headshare_jax.matching.cosine import magnitudes, match
from headshare_jax.matching.functional import match_functional
from headshare_jax.sharing.budget import budget_map, check_budget, units_to_save
from headshare_jax.sharing.choose import drop_map, receiver_count, sharing_map, within_shards
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult
from headshare_jax.sharing.source import WeightSource
from headshare_jax.sharing.view import SharedView
from headshare_jax.typed import check_fields

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class MethodSettings:
    """What a method is told besides the ratio; None leaves a setting to the method.

    Attributes:
      match: match function of the methods that compare weights, `qk` by default.
      seed: of random scores, 0 by default.
      tie: projections that are shared, `qkv` by default.
      chains: as for `sharing_map`.
      within_shards: chips over which heads are cut; donors are then in their receivers' shards. By default, any donors.
    """

    match: str | None = None
    seed: int | None = None
    tie: str | None = None
    chains: str | None = None
    within_shards: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def given(self) -> dict[str, Any]:
        """The settings that are not left to the method."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def shared_tie(self) -> str:
        """The tie, or its default."""
        return self.tie or "qkv"


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


@dataclass(frozen=True)
class Scoring:
    """What scoring works on.

    Attributes:
      source: the dense model, or an opened checkpoint.
      settings: what the method is told.
      windows_wt: int32 [W, T], the calibration text, for methods that need one.
      journals: where those that take text keep finished layers.
      progress: called with the steps done and in all.
      mesh: devices to run the text on; by default all of this process.
    """

    source: WeightSource
    settings: MethodSettings = field(default_factory=MethodSettings)
    windows_wt: np.ndarray | None = None
    journals: Journals | None = None
    progress: Progress = lambda done, total: None
    mesh: Mesh | None = None


Scorer = Callable[[Scoring], MatchResult]
Chooser = Callable[[MatchResult, Amount, LlamaConfig, MethodSettings], SharingMap]


def weight_scores(work: Scoring) -> MatchResult:
    """Cosines of weights."""
    return match(work.source, work.settings.match or "qk", seed=work.settings.seed or 0, progress=work.progress)


def random_scores(work: Scoring) -> MatchResult:
    """Scores drawn at random."""
    return match(work.source, "random", seed=work.settings.seed or 0, progress=work.progress)


def functional_scores(work: Scoring) -> MatchResult:
    """What units compute on the text, and donors in their place."""
    assert work.windows_wt is not None
    return match_functional(
        work.source, work.windows_wt, mesh=work.mesh, journals=work.journals, progress=work.progress
    )


def magnitude_scores(work: Scoring) -> MatchResult:
    """How small a unit's weights are."""
    return magnitudes(work.source, progress=work.progress)


def best_pairs(result: MatchResult, amount: Amount, config: LlamaConfig, settings: MethodSettings) -> SharingMap:
    """Every receiver has the donor that is best for it; by functional scores, one that does not receive."""
    tie, chains = settings.shared_tie, settings.chains or ("forbid" if result.match == "functional" else "resolve")
    if amount.ratio is not None:
        return sharing_map(result, amount.ratio, chains=chains, tie=tie)
    assert amount.budget is not None
    count, most = units_to_save(config, amount.budget, tie), config.num_units - config.num_kv_heads
    if count > most:
        raise HeadshareError(
            f"A budget of {amount.budget} cannot be met by sharing {tie}, which {count} of {config.num_units} units "
            f"would have to do, where at most {most} can; keep more, share more of each unit (the tie qkvo), or drop "
            "units too (the method plan).",
            option="tie",
        )
    ratio = count / config.num_units
    return replace(sharing_map(result, ratio, chains=chains, tie=tie), budget=amount.budget)


def least_dropped(result: MatchResult, amount: Amount, config: LlamaConfig, settings: MethodSettings) -> SharingMap:
    """The units whose loss costs least are dropped."""
    if amount.budget is None:
        assert amount.ratio is not None
        return drop_map(result, amount.ratio)
    ratio = units_to_save(config, amount.budget, "qkvo") / config.num_units
    return replace(drop_map(result, ratio), budget=amount.budget)


def within_budget(result: MatchResult, amount: Amount, config: LlamaConfig, settings: MethodSettings) -> SharingMap:
    """Every unit is kept, shared or dropped as it costs least."""
    if amount.budget is None:
        raise HeadshareError(
            "The method plan needs a budget, not a ratio: it chooses how many units share or go.", option="budget"
        )
    return budget_map(result, config, amount.budget)


@dataclass(frozen=True)
class Method:
    """A method of sharing.

    Attributes:
      name, summary: for those who choose among methods.
      scores: scores all units; methods with the same function share its result.
      uses: names of the settings that it heeds.
      choose: makes a map of the scores, for a ratio or a budget.
      refits: whether output projections are fitted to the dense model after sharing.
    """

    name: str
    summary: str
    scores: Scorer
    uses: tuple[str, ...] = ()
    choose: Chooser = best_pairs
    refits: bool = False

    @property
    def by_budget(self) -> bool:
        """Whether it takes a budget only, and no ratio."""
        return self.choose is within_budget

    @property
    def minutes(self) -> int:
        """About what it takes on two CPU cores for a billion parameters, by SmolLM2-135M and Qwen2.5-Coder-0.5B."""
        # Gradients and pairs on 4,096 tokens take as long as a refit on 49,152.
        return 10 * self.refits + 10 * (self.scores is functional_scores)

    @property
    def needs_text(self) -> bool:
        """Whether it needs calibration text, to score or to refit."""
        return self.refits or self.scores is functional_scores


_PAIRS = ("tie", "chains", "within_shards")
_PLAN = ("within_shards",)
METHODS = {
    method.name: method
    for method in (
        Method("direct", "the paper's DirectShare", weight_scores, ("match", "seed", *_PAIRS)),
        Method("refit", "direct, then output weights fitted", weight_scores, ("match", "seed", *_PAIRS), refits=True),
        Method("fitted", "refit, with donors by what they compute", functional_scores, _PAIRS, refits=True),
        Method("plan", "keep, share or drop each unit, then refit", functional_scores, _PLAN, within_budget, True),
        Method("drop", "drop the units that matter least, then refit", functional_scores, (), least_dropped, True),
        Method("magnitude", "drop the smallest units, then refit", magnitude_scores, (), least_dropped, True),
        Method("random", "pairs drawn at random, a baseline", random_scores, ("seed", *_PAIRS)),
        Method("random-refit", "pairs drawn at random, then refit", random_scores, ("seed", *_PAIRS), refits=True),
    )
}


def find(name: str, settings: MethodSettings | None = None) -> Method:
    """The method of a name.

    Raises:
      HeadshareError: there is none of this name, or it does not heed a setting that was given.
    """
    if name not in METHODS:
        raise HeadshareError(f"The method must be one of {', '.join(METHODS)}, not {name!r}.", option="method")
    method, settings = METHODS[name], settings or MethodSettings()
    if settings.seed is not None and "match" in method.uses and settings.match != "random":
        raise HeadshareError(f"The method {name} draws nothing unless match is random; leave seed out.", option="seed")
    for setting in settings.given:
        if setting not in method.uses:
            users = ", ".join(other.name for other in METHODS.values() if setting in other.uses)
            raise HeadshareError(
                f"The method {name} has no use for {setting} (these have: {users}); leave it out.", option=setting
            )
    return method


def check_amount(amount: Amount, config: LlamaConfig) -> None:
    """Raises HeadshareError unless a ratio or a budget is possible and changes at least one of the model's units."""
    if amount.budget is not None:
        check_budget(amount.budget)
        return
    ratio, units = amount.ratio, config.num_units
    assert ratio is not None
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
    if settings.within_shards is not None and result.scores is not None:
        result = within_shards(result, settings.within_shards)
    return replace(method.choose(result, amount, config, settings), method=method.name)


def apply(
    method: Method,
    source: WeightSource,
    sharing: SharingMap,
    windows_wt: np.ndarray | None = None,
    *,
    check_source: bool = True,
    mesh: Mesh | None = None,
    journals: Journals | None = None,
    progress: Progress = lambda done, total: None,
) -> tuple[WeightSource, RefitReport | None]:
    """The source as a map shares it and, if the method does so, refitted: a view; with the record of the fit.

    Args:
      method: says whether to refit.
      source: the dense model, or an opened checkpoint.
      sharing: the method's choice, or any other map.
      windows_wt: int32 [W, T], calibration text, if the method refits.
      check_source: as for `SharedView`; needless for a map that was just made for the source.
      mesh, journals: as for `refit`.
      progress: called with the layers refitted and in all.

    Raises:
      HeadshareError: as `SharedView` and `refit`.
    """
    shared = SharedView(source, sharing, check_source=check_source)
    if not method.refits:
        return shared, None
    assert windows_wt is not None
    return refit(source, shared, windows_wt, mesh=mesh, journals=journals, progress=progress)
