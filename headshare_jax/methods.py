"""Methods of sharing: each is a way to score pairs, a way to choose among them, and perhaps a refit.

Scoring is what costs, and its result serves every ratio: score once, then choose and apply for each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.functional import match_functional
from headshare_jax.modeling import Llama
from headshare_jax.parameters import WeightSource
from headshare_jax.refit import RefitReport, refit
from headshare_jax.selection import receiver_count, sharing_map
from headshare_jax.sharing import SharingMap
from headshare_jax.similarity import MatchResult, match
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
    """

    match: str | None = None
    seed: int = 0
    tie: str = "qkv"
    chains: str | None = None


def weight_scores(
    source: WeightSource, windows_wt: np.ndarray | None, settings: MethodSettings, progress: Progress
) -> MatchResult:
    """Cosines of weights."""
    return match(source, settings.match or "qk", seed=settings.seed, progress=progress)


def random_scores(
    source: WeightSource, windows_wt: np.ndarray | None, settings: MethodSettings, progress: Progress
) -> MatchResult:
    """Scores drawn at random."""
    return match(source, "random", seed=settings.seed, progress=progress)


def functional_scores(
    source: WeightSource, windows_wt: np.ndarray | None, settings: MethodSettings, progress: Progress
) -> MatchResult:
    """What donors compute on the text in the receiver's place."""
    assert windows_wt is not None
    return match_functional(source, windows_wt, progress=progress)


def best_pairs(scores: MatchResult, ratio: float, settings: MethodSettings) -> SharingMap:
    """Every receiver has the donor that is best for it."""
    return sharing_map(scores, ratio, chains=settings.chains or "resolve", tie=settings.tie)


def unchained_pairs(scores: MatchResult, ratio: float, settings: MethodSettings) -> SharingMap:
    """No donor receives."""
    return sharing_map(scores, ratio, chains=settings.chains or "forbid", tie=settings.tie)


@dataclass(frozen=True)
class Method:
    """A method of sharing.

    Attributes:
      name, summary: for those who choose among methods.
      scores: scores all pairs; methods with the same function share its result.
      choose: makes a map of the scores, for a ratio.
      refits: whether output projections are fitted to the dense model after sharing.
    """

    name: str
    summary: str
    scores: Callable[[WeightSource, np.ndarray | None, MethodSettings, Progress], MatchResult]
    choose: Callable[[MatchResult, float, MethodSettings], SharingMap] = best_pairs
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
        Method("random", "pairs drawn at random, a baseline", random_scores),
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


def check_ratio(ratio: float, config: LlamaConfig) -> None:
    """Raises HeadshareError unless a ratio lies in [0, 1) and makes at least one of the model's units a receiver."""
    if not 0 <= ratio < 1:
        raise HeadshareError(f"The sharing ratio must be at least 0 and below 1, not {ratio}.")
    units = config.num_units
    if not receiver_count(ratio, units):
        raise HeadshareError(
            f"A ratio of {ratio} makes none of {units} units a receiver; give at least "
            f"{math.ceil(1e4 / units) / 1e4}, which makes one."
        )


def choose(method: Method, scores: MatchResult, ratio: float, settings: MethodSettings) -> SharingMap:
    """The map that a method makes of its scores, which names the method.

    Raises:
      HeadshareError: as `sharing_map`.
    """
    return replace(method.choose(scores, ratio, settings), method=method.name)


def apply(
    method: Method,
    source: WeightSource,
    sharing: SharingMap,
    windows_wt: np.ndarray | None = None,
    *,
    progress: Progress = lambda done, total: None,
) -> tuple[Llama, RefitReport | None]:
    """The model shared by a map and, if the method does so, refitted; with the record of the fit.

    Args:
      method: says whether to refit.
      source: the dense model, or an opened checkpoint.
      sharing: the method's choice, or any other map.
      windows_wt: int32 [W, T], calibration text, if the method refits.
      progress: called with the layers refitted and in all.

    Raises:
      HeadshareError: as `share` and `refit`.
    """
    shared = share(Llama.of(source), sharing)
    if not method.refits:
        return shared, None
    assert windows_wt is not None
    return refit(source, shared, windows_wt, progress=progress)
