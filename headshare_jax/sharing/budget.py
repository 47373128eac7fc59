"""Which units to keep, share or drop within a budget of parameters, by measured cost per parameter saved."""

from collections.abc import Sequence
from fractions import Fraction
from math import ceil, prod

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError
from headshare_jax.parameters import PROJECTIONS, parameter_names, pool_name, slice_shape
from headshare_jax.sharing.map import SharingMap
from headshare_jax.sharing.scores import MatchResult
from headshare_jax.sharing.source import stored_shape
from headshare_jax.sharing.tie import DROPPED
from headshare_jax.typed import typed

DROP = "drop"


def unit_parameters(config: LlamaConfig) -> dict[str, int]:
    """Weights of one sharing unit, by projection."""
    return {p: prod(slice_shape(config, pool_name(p))) // config.num_kv_heads for p in PROJECTIONS}


def crossing_parameters(config: LlamaConfig, sharing: SharingMap, shards: int) -> int:
    """Weights that receivers use and another shard stores, in all layers; shards as in `SharingMap.crossing`."""
    crossing_lu = sharing.crossing(shards)
    sizes = unit_parameters(config)
    return sum(sizes[p] * int(np.count_nonzero(crossing_lu & sharing.tied(p))) for p in PROJECTIONS)


def units_to_save(config: LlamaConfig, budget: float, projections: str) -> int:
    """How many units must do without their own weights of some projections for the rest to fit a budget."""
    check_budget(budget)
    sizes = unit_parameters(config)
    target = (1 - budget) * config.num_units * sum(sizes.values())
    return ceil(target / sum(sizes[p] for p in projections) - 1e-9)


def check_budget(budget: float) -> None:
    """Raises HeadshareError unless a budget lies in (0, 1]."""
    if not 0 < budget <= 1:
        raise HeadshareError(f"The budget must be above 0 and at most 1, not {budget}.")


def attention_budget(config: LlamaConfig, model_budget: float) -> float:
    """The part of the attention parameters to keep so that a part of all the model's parameters is kept.

    Raises:
      HeadshareError: a part outside (0, 1], or one that the rest of the model exceeds by itself.
    """
    check_budget(model_budget)
    attention = config.num_units * sum(unit_parameters(config).values())
    whole = sum(prod(stored_shape(config, name)) for name in parameter_names(config))
    kept = 1 - (1 - Fraction(str(model_budget))) * whole / attention
    if kept <= 0:
        raise HeadshareError(
            f"A model budget of {model_budget} cannot be met: what is not attention, which stays as it is, is "
            f"{1 - attention / whole:.3f} of the model; keep more."
        )
    return float(kept)


@typed
def budget_map(
    result: MatchResult,
    config: LlamaConfig,
    budget: float,
    *,
    actions: Sequence[str] | None = None,
) -> SharingMap:
    """Saves parameters where they cost least until the rest fits the budget.

    The cost of a change is minus its score; costs of different units are taken to add up. The step with the least added
    cost for a saved parameter is taken over and over: a unit becomes a receiver or is dropped, or what it shares grows.
    Donors keep their weights. At the end steps that the budget does not need are taken back, the costliest first.

    Args:
      result: functional scores, of every action.
      config: the architecture.
      budget: part of the attention parameters (q, k, v and o weights) to keep, in (0, 1].
      actions: what may be done to a unit, `drop` or a tie that was scored; by default all of them.

    Raises:
      HeadshareError: a budget outside (0, 1], or one that these actions cannot meet.

    Examples:
      >>> plan = hs.budget_map(scores, model.config, budget=0.8)
      >>> sizes = hs.ledger(hs.share(model, plan))
      >>> sizes.attention_stored <= 0.8 * sizes.attention_dense
      True
    """
    check_budget(budget)
    actions = (DROP, "qkv", *result.tie_scores) if actions is None else actions
    for action in actions:
        if result.drop_score is None or action not in (DROP, "qkv", *result.tie_scores):
            raise HeadshareError(f"A budget needs functional scores of {action}; match with it.")
    plan = _Plan(result, config, actions)
    whole = plan.size * sum(plan.unit_parameters.values())
    # Exact: in floating point (1 - 0.7) * 90 lies above 27, and one unit more would go.
    target = ceil((1 - Fraction(str(budget))) * whole)
    while plan.saved.sum() < target:
        if not plan.step():
            raise HeadshareError(
                f"A budget of {budget} cannot be met by {', '.join(actions)}: at least "
                f"{1 - plan.saved.sum() / whole:.3f} of the attention parameters stay; allow more, or other actions."
            )
    plan.take_back(target)
    return plan.map(budget)


class _Plan:
    """What is done to every unit so far."""

    def __init__(self, result: MatchResult, config: LlamaConfig, actions: Sequence[str]):
        self.result, self.actions = result, actions
        self.size = result.value.size
        self.unit_parameters = unit_parameters(config)
        self.donor = np.arange(self.size)
        self.tie = np.full(self.size, "", "<U4")
        self.cost, self.saved = np.zeros(self.size), np.zeros(self.size)

    def step(self) -> bool:
        """Takes the cheapest step; False if there is none."""
        keeps = self.donor == np.arange(self.size)
        free = ~np.isin(np.arange(self.size), self.donor[~keeps])
        least, best = np.inf, None
        for action in self.actions:
            gain_u = self._parameters(action) - self.saved
            cost_u, donor_u = self._outcomes(action, keeps)
            ratio_u = np.where(free & (gain_u > 0), (cost_u - self.cost) / np.maximum(gain_u, 1), np.inf)
            unit = int(np.argmin(ratio_u))
            if ratio_u[unit] < least:
                least, best = ratio_u[unit], (unit, action, int(donor_u[unit]), float(cost_u[unit]))
        if best is not None:
            self._set(*best)
        return best is not None

    def take_back(self, target: float) -> None:
        """Keeps units after all, the costliest first, as long as `target` parameters are saved."""
        for unit in np.argsort(-self.cost, kind="stable"):
            if self.saved[unit] and self.saved.sum() - self.saved[unit] >= target:
                self._set(int(unit), "", int(unit), 0.0)

    def map(self, budget: float) -> SharingMap:
        """The plan as a sharing map; the scores are minus the costs."""
        changed = self.donor != np.arange(self.size)
        shape = self.result.value.shape
        ties = sorted(set(self.tie) - {""}, key=len)
        return SharingMap(
            donor=self.donor.reshape(shape),
            score=np.where(changed, -self.cost, np.nan).reshape(shape),
            heads_per_unit=self.result.heads_per_unit,
            tie=ties[-1] if ties else "qkv",
            unit_tie=self.tie.reshape(shape),
            method="budget",
            match="functional",
            chains="forbid",
            budget=budget,
            source=self.result.source,
        )

    def _parameters(self, action: str) -> int:
        """What an action saves."""
        return sum(size for p, size in self.unit_parameters.items() if action == DROP or p in action)

    def _outcomes(self, action: str, keeps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cost of an action for every unit, and the donor it would have."""
        if action == DROP:
            assert self.result.drop_score is not None
            return -self.result.drop_score.ravel(), np.full(self.size, DROPPED)
        scores = self.result.scores if action == "qkv" else self.result.tie_scores[action]
        assert scores is not None
        possible = np.where(keeps[None, :], -scores, np.inf)
        donor_u = np.argmin(possible, axis=1)
        return possible[np.arange(self.size), donor_u], donor_u

    def _set(self, unit: int, action: str, donor: int, cost: float) -> None:
        self.donor[unit], self.cost[unit] = donor, cost
        self.tie[unit] = "" if action == DROP else action
        self.saved[unit] = self._parameters(action) if action else 0
