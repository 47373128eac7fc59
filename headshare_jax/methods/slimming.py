"""The methods that make units slim."""

import math
from dataclasses import dataclass

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.methods.scored import functional_scores, in_shards, kept_scores
from headshare_jax.methods.work import Amount, Made, Method, Work
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult
from headshare_jax.sharing.widths import Widths
from headshare_jax.slim.choose import Rules
from headshare_jax.slim.rounds import SlimSettings, slim


@dataclass(frozen=True)
class SlimMethod(Method):
    """Keeps of every unit the columns whose loss costs most, in rounds, and refits after each.

    Map and weights are made together for one budget. Rounds that several budgets have in common are found in the
    journals.

    Attributes:
      shares: whether units use others' queries, keys and values too where that costs less.
    """

    by_budget: bool = True
    shares: bool = False

    @property
    def functional(self) -> bool:
        return self.shares

    @property
    def own(self) -> float:
        # By what SmolLM2 lost on articles, source files and help (docs/experiments.md).
        return 0.25

    @property
    def minutes(self) -> int:
        # At a budget of 0.7: three rounds and text that the model writes take as long as four refits on all the text.
        return 40 + 10 * self.functional

    @property
    def needs_text(self) -> bool:
        return True

    def scored(self, work: Work) -> MatchResult | None:
        return kept_scores(work, functional_scores) if self.shares else None

    def make(self, work: Work, amount: Amount) -> Made:
        if amount.budget is None:
            self.check_ratio()
        assert amount.budget is not None
        scores = self.scored(work)
        settings = SlimSettings(Rules(even=work.settings.even, shards=work.settings.within_shards))
        with work.phase("slimming") as progress:
            model, sharing, report = slim(
                work.source, work.text_wt, amount.budget, settings,
                scores=None if scores is None else in_shards(scores, work.settings),
                mesh=work.mesh, journals=work.journals, progress=progress,
            )  # fmt: skip
        return Made(model, sharing, report)


def even_map(config: LlamaConfig, budget: float) -> SharingMap:
    """A map of about the size that slimming comes to: of every unit the same part, by which sizes are told before."""
    full = Widths.full(config)
    entries, size = full.pairs.shape[2], full.head_dim
    pairs = full.pairs & (np.arange(entries) < (entries if config.qk_norm else math.ceil(budget * entries)))
    columns_lu = Widths(full.rank, pairs, size).qk.sum(axis=2)
    rank = np.clip(math.ceil(2 * size * budget) - columns_lu, 1, size)
    units = np.arange(rank.size).reshape(rank.shape)
    return SharingMap(
        units, np.full(rank.shape, np.nan), config.heads_per_unit, method="slim", budget=budget,
        widths=Widths(rank, pairs, size),
    )  # fmt: skip
