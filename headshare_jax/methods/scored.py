"""Methods that share and drop units: a way to score them, a way to choose among them, and perhaps a refit.

Scoring is what costs, and its result serves every ratio and budget: score once, then choose and apply for each. What
takes text can be kept in journals, layer by layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError, Unmet
from headshare_jax.fit.refit import refit
from headshare_jax.matching.cosine import magnitudes, match
from headshare_jax.matching.functional import match_functional
from headshare_jax.methods.work import Amount, Made, Method, MethodSettings, Step, Work
from headshare_jax.sharing.budget import units_to_save
from headshare_jax.sharing.choose import drop_map, sharing_map, within_shards
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult
from headshare_jax.sharing.view import SharedView

Scorer = Callable[[Work, Step], MatchResult]
Chooser = Callable[[MatchResult, Amount, LlamaConfig, MethodSettings], SharingMap]


def weight_scores(work: Work, progress: Step) -> MatchResult:
    """Cosines of weights."""
    return match(work.source, work.settings.match or "qk", seed=work.settings.seed or 0, progress=progress)


def random_scores(work: Work, progress: Step) -> MatchResult:
    """Scores drawn at random."""
    return match(work.source, "random", seed=work.settings.seed or 0, progress=progress)


def functional_scores(work: Work, progress: Step) -> MatchResult:
    """What units compute on the text, and donors in their place."""
    return match_functional(work.source, work.text_wt, mesh=work.mesh, journals=work.journals, progress=progress)


def magnitude_scores(work: Work, progress: Step) -> MatchResult:
    """How small a unit's weights are."""
    return magnitudes(work.source, progress=progress)


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


def kept_scores(work: Work, scores: Scorer) -> MatchResult:
    """Scores of all units, made unless they are kept already."""

    def score() -> MatchResult:
        with work.phase("matching") as progress:
            return scores(work, progress)

    return work.kept(scores.__name__, score)


def in_shards(result: MatchResult, settings: MethodSettings) -> MatchResult:
    """Scores of the donors that a method may choose from: those in their receivers' shards, if that is asked for."""
    if settings.within_shards is None or result.scores is None:
        return result
    return within_shards(result, settings.within_shards)


@dataclass(frozen=True, kw_only=True)
class ScoredMethod(Method):
    """A method that scores units and chooses among them.

    Attributes:
      scores: scores all units; methods with the same function share its result.
      choose: makes a map of the scores, for a ratio or a budget.
      refits: whether output projections are fitted to the dense model after sharing.
    """

    scores: Scorer
    choose: Chooser = best_pairs
    refits: bool = False

    @property
    def functional(self) -> bool:
        return self.scores is functional_scores

    @property
    def minutes(self) -> int:
        # Gradients and pairs on 4,096 tokens take as long as a refit on 49,152.
        return 10 * self.refits + 10 * self.functional

    @property
    def needs_text(self) -> bool:
        return self.refits or self.functional

    def scored(self, work: Work) -> MatchResult:
        return kept_scores(work, self.scores)

    def chosen(self, result: MatchResult, amount: Amount, config: LlamaConfig, settings: MethodSettings) -> SharingMap:
        """The map that it makes of its scores, which names it.

        Raises:
          HeadshareError: as `sharing_map`, `drop_map` and `within_shards`.
        """
        return replace(self.choose(in_shards(result, settings), amount, config, settings), method=self.name)

    def make(self, work: Work, amount: Amount) -> Made:
        scores = self.scored(work)
        try:
            sharing = self.chosen(scores, amount, work.source.config, work.settings)
        except HeadshareError as error:
            raise Unmet(str(error), option=error.options) from error
        return self.apply(work, sharing, check_source=False)

    def apply(self, work: Work, sharing: SharingMap, *, check_source: bool = True) -> Made:
        """The source as any map shares it and, if the method does so, refitted.

        Args:
          work: what to work on.
          sharing: the method's choice, or any other map.
          check_source: as for `SharedView`; needless for a map that was just made for the source.

        Raises:
          HeadshareError: as `SharedView` and `refit`.
        """
        shared = SharedView(work.source, sharing, check_source=check_source)
        if not self.refits:
            return Made(shared, sharing)
        with work.phase("refitting") as progress:
            model, report = refit(
                work.source, shared, work.text_wt, mesh=work.mesh, journals=work.fits, progress=progress
            )
        return Made(model, sharing, report)
