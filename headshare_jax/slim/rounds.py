"""Slimming in rounds: each takes another tenth of attention from the model so far, and fits o to the dense model."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from jax.sharding import Mesh

from headshare_jax.calibration import streams
from headshare_jax.calibration.fisher import layer_room
from headshare_jax.calibration.journal import Journals, journal_of
from headshare_jax.errors import HeadshareError
from headshare_jax.fit.refit import RefitReport, RefitSettings, watched_refit
from headshare_jax.sharing.budget import check_budget
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult
from headshare_jax.sharing.source import WeightSource, fingerprint
from headshare_jax.sharing.tie import DROPPED
from headshare_jax.sharing.view import DenseView, ReplacedView, SharedView
from headshare_jax.sharing.widths import Widths
from headshare_jax.slim.choose import Rules, choose
from headshare_jax.slim.costs import measure
from headshare_jax.slim.cut import ValuePath, balance, cut
from headshare_jax.slim.kept import Kept, pair_sizes
from headshare_jax.slim.pairs import Pairs
from headshare_jax.typed import check_fields, typed

# Part of attention's weights that one round removes.
ROUND = 0.1
# What a journal keeps of a round besides new slices, which are named by parameter and layer.
_RANK, _PAIRS, _DONOR, _COST = "rank", "pairs", "donor", "cost"
Step = dict[str, np.ndarray]


@dataclass(frozen=True)
class SlimSettings:
    """How a model is made slim.

    Attributes:
      rules: what widths must be.
      scoring_tokens: the first tokens of the text, on which costs are measured; whole windows, at least one.
      round_tokens: the first tokens of the text, to which o is fitted after every round but the last; two windows at
        least. The last takes all.
      refit: how o is fitted.
      seed: of the tokens that are drawn to measure costs.
    """

    rules: Rules = field(default_factory=Rules)
    scoring_tokens: int = 8192
    round_tokens: int = 8192
    refit: RefitSettings = field(
        default_factory=lambda: RefitSettings(scope="attention", ridges=(0.03,), drifts=(0.5,))
    )
    seed: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("scoring_tokens", "round_tokens"):
            if getattr(self, name) < 1:
                raise HeadshareError(f"{name} must be at least 1, not {getattr(self, name)}.", option=name)


@typed
def slim(
    source: WeightSource,
    windows_wt: np.ndarray,
    budget: float,
    settings: SlimSettings | None = None,
    *,
    scores: MatchResult | None = None,
    mesh: Mesh | None = None,
    journals: Journals | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[WeightSource, SharingMap, RefitReport]:
    """Cuts columns of attention's heads until a part of its weights is left, and fits what is left to the dense model.

    In every round costs are measured on the model so far, and each unit keeps the value columns, in directions of its
    own, and the rotary pairs that are worth most for their weights, or is dropped, or uses another's q, k and v; then o
    is fitted. In the end values and outputs of slim units are balanced, which does not change what they compute.

    Args:
      source: the dense model, or an opened checkpoint.
      windows_wt: int32 [W, T], the calibration text.
      budget: part of attention's weights (q, k, v and o) to keep at most, in (0, 1].
      settings: by default `SlimSettings()`.
      scores: of functional matching, for units to share too where that costs less; by default none does.
      mesh: devices of this process, over which windows and each layer's weights are cut; by default all.
      journals: where finished rounds are kept, as the steps of a work `slim`, and the blocks of refits.
      progress: called with the steps done and in all: a round is three for each layer.

    Returns:
      A view of the source in which new values and outputs, alone in memory, take the place of its own; its map; and
      what the last refit did.

    Raises:
      HeadshareError: a source that is not dense, a budget outside (0, 1] or one that the rules cannot meet, fewer than
        two windows, scores of another kind or with even widths, or no room for temporary files or journals.

    Examples:
      >>> model, sharing, report = slim(dense, windows, 0.8)
      >>> model.sharing == sharing
      True
    """
    settings, config = settings or SlimSettings(), source.config
    check_budget(budget)
    if source.sharing is not None:
        raise HeadshareError("Only a dense model can be made slim; give one that shares and drops nothing.")
    if len(windows_wt) < 2:
        raise HeadshareError("Slimming needs at least two windows of text; give more tokens or shorter windows.")
    targets = round_targets(budget)
    # The rounds before one follow from what it leaves, so that budgets have their first ones in common.
    journal = journal_of(journals, "slim" if scores is None else "plan", {"model": source}, windows_wt, settings)
    pairs = None if scores is None else Pairs.of(scores, config.head_dim)
    scored_wt, layers, report = _first(windows_wt, settings.scoring_tokens, 1), config.num_layers, None
    with layer_room(config, scored_wt) as states_lwtd:
        state = _Slimming(source, settings, pairs, mesh, scored_wt, states_lwtd)
        for number, target in enumerate(targets):

            def told(done: int, total: int, before: int = 3 * layers * number) -> None:
                progress(before + done, 3 * layers * len(targets))

            def told_fit(done: int, total: int, before: int = (3 * number + 2) * layers) -> None:
                progress(before + done, 3 * layers * len(targets))

            step = journal.read(f"to-{target}")
            if step is None:
                step = state.cut(target, told)
                journal.write(f"to-{target}", step)
            state.take(step)
            text_wt = windows_wt if target == budget else _first(windows_wt, settings.round_tokens, 2)
            report = state.fit(text_wt, target, journals, told_fit, last=target == budget)
    assert report is not None
    state.balance()
    return state.model(budget), state.map(budget), report


def round_targets(budget: float) -> list[float]:
    """Parts of attention that are left after each round, the last of them the budget."""
    count = max(1, math.ceil(round((1 - budget) / ROUND, 6)))
    return [round(1 - ROUND * (number + 1), 6) for number in range(count - 1)] + [budget]


def _first(windows_wt: np.ndarray, tokens: int, least: int) -> np.ndarray:
    """The first windows of so many tokens, at least so many windows."""
    return windows_wt[: max(least, tokens // windows_wt.shape[1])]


class _Slimming:
    """The model so far: what is left of every unit, what that cost, and the slices that took the dense one's place."""

    def __init__(
        self,
        source: WeightSource,
        settings: SlimSettings,
        pairs: Pairs | None,
        mesh: Mesh | None,
        scored_wt: np.ndarray,
        states_lwtd: np.ndarray,
    ):
        self.source, self.settings, self.pairs, self.mesh = source, settings, pairs, mesh
        # What its layers read of the text that costs are measured on, once it was fitted to that.
        self.scored_wt, self.states_lwtd, self.known = scored_wt, states_lwtd, False
        self.origin = fingerprint(source)
        self.kept = Kept.all_of(source.config)
        self.cost_lu = np.zeros(self.kept.rank.shape, np.float32)
        self.slices: dict[tuple[str, int], np.ndarray] = {}

    def cut(self, target: float, progress: Callable[[int, int], None]) -> Step:
        """A round's widths and slices, from costs."""
        model, settings, config = self.model(target), self.settings, self.source.config
        costs, directions = measure(
            DenseView(model),
            self.kept,
            self.scored_wt,
            states_lwtd=self.states_lwtd,
            known=self.known,
            batch_tokens=settings.refit.batch_tokens,
            seed=settings.seed,
            mesh=self.mesh,
            progress=progress,
        )
        kept, cost_lu = choose(costs, self.kept, pair_sizes(config), target, settings.rules, self.pairs)
        step: Step = {_RANK: kept.rank, _PAIRS: kept.pairs.astype(np.int32), _DONOR: kept.donor}
        step[_COST] = (self.cost_lu + cost_lu).astype(np.float32)
        rank_lu = np.where((kept.rank < self.kept.rank) & ~kept.dropped, kept.rank, -1)
        for layer in np.flatnonzero((rank_lu >= 0).any(axis=1)).tolist():
            path = cut(ValuePath.read(model, layer), directions[layer], rank_lu[layer])
            step |= {f"{name} {layer}": values for (name, _), values in path.slices(self.source, layer).items()}
        return step

    def take(self, step: Step) -> None:
        """Goes on to what a round made."""
        self.kept, self.cost_lu = Kept(step[_RANK], step[_PAIRS].astype(bool), step[_DONOR]), step[_COST]
        for key in step.keys() - {_RANK, _PAIRS, _DONOR, _COST}:
            name, layer = key.split()
            self.slices[name, int(layer)] = step[key]

    def fit(
        self,
        windows_wt: np.ndarray,
        target: float,
        journals: Journals | None,
        progress: Callable[[int, int], None],
        *,
        last: bool,
    ) -> RefitReport:
        """Fits o to the dense model; after the last round nothing measures costs on what layers then read."""
        scored = len(self.scored_wt)
        self.known = not last and scored <= len(windows_wt)

        def watch(layer: int, stream: streams.Stream) -> None:
            if self.known:
                self.states_lwtd[layer] = stream.states_wtd[:scored]

        fitted, report = watched_refit(
            self.source,
            self.model(target),
            windows_wt,
            self.settings.refit,
            mesh=self.mesh,
            journals=journals,
            progress=progress,
            watch=watch,
        )
        assert isinstance(fitted, ReplacedView)
        self.slices |= fitted.values
        return report

    def balance(self) -> None:
        """Balances values and outputs of units whose values are slim."""
        rank_lu = np.where((self.kept.rank < self.source.config.head_dim) & ~self.kept.dropped, self.kept.rank, -1)
        for layer in np.flatnonzero((rank_lu >= 0).any(axis=1)).tolist():
            path = balance(ValuePath.read(ReplacedView(self.source, self.slices), layer), rank_lu[layer])
            self.slices |= path.slices(self.source, layer)

    def map(self, target: float) -> SharingMap:
        """What became of every unit."""
        kept, size = self.kept, self.source.config.head_dim
        widths = Widths(
            np.where(kept.dropped, size, kept.rank).astype(np.int32), kept.pairs | kept.dropped[:, :, None], size
        )
        changed = kept.dropped | kept.receives | widths.slim
        return SharingMap(
            donor=np.where(kept.dropped, DROPPED, kept.donor),
            score=np.where(changed, 0.0 - self.cost_lu.astype(np.float64), np.nan),
            heads_per_unit=self.source.config.heads_per_unit,
            method="slim" if self.pairs is None else "plan",
            budget=target,
            source=self.origin,
            widths=widths,
        )

    def model(self, target: float) -> WeightSource:
        """The model so far as a view of the dense one."""
        return SharedView(ReplacedView(self.source, dict(self.slices)), self.map(target), check_source=False)
