"""Choosing receivers, donors and units to drop from scores."""

import math
from dataclasses import replace

import numpy as np

from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.map import SharingMap, shard_of_units
from headshare_jax.sharing.scores import MatchResult, best_donors
from headshare_jax.sharing.tie import DROPPED, check_tie
from headshare_jax.typed import typed


@typed
def sharing_map(
    result: MatchResult, ratio: float, *, chains: str = "resolve", tie: str = "qkv", heads_per_unit: int | None = None
) -> SharingMap:
    """Makes the units with the highest scores receivers of their best donors (paper, section 3.2).

    Args:
      result: best donors and scores of all units.
      ratio: r in [0, 1); int(r * L * U) units become receivers.
      chains: `resolve` replaces a donor that itself receives by its root; `forbid` selects greedily, by descending
        score, so that no donor receives, trying next best donors where the result holds all pairs' scores.
      tie: projections that are shared.
      heads_per_unit: G; taken from the result unless given.

    Raises:
      HeadshareError: ratio outside [0, 1), an unknown `chains` or `tie`, or fewer possible receivers than asked for.

    Examples:
      >>> sharing = hs.sharing_map(hs.match(model, "qk"), ratio=0.4)
      >>> sharing.summary()
      "2 of 6 units use another unit's qkv weights"
    """
    num_layers, units = result.value.shape
    count = receiver_count(ratio, num_layers * units)
    if chains not in ("resolve", "forbid"):
        raise HeadshareError(f"chains must be resolve or forbid, not {chains!r}.")
    tie = check_tie(tie)
    if chains == "resolve" and result.match == "functional":
        raise HeadshareError("Functional scores hold only for donors that keep their weights; choose chains=forbid.")
    if count > (num_layers - 1) * units:
        raise HeadshareError(
            f"A ratio of {ratio} asks for {count} receivers, but the first layer never receives, "
            f"so at most {(num_layers - 1) * units} of {num_layers * units} units can; give at most "
            f"{math.floor(1e4 * (num_layers - 1) / num_layers) / 1e4}."
        )
    donor, score = (_select_resolved if chains == "resolve" else _select_unchained)(result, count)
    return SharingMap(
        donor=donor.reshape(num_layers, units),
        score=score.reshape(num_layers, units),
        heads_per_unit=heads_per_unit or result.heads_per_unit,
        tie=tie,
        match=result.match,
        chains=chains,
        ratio=ratio,
        seed=result.seed,
        source=result.source,
    )


def within_shards(result: MatchResult, shards: int) -> MatchResult:
    """The same scores, of the pairs alone whose two units lie in the same shard of their layers.

    For heads that are cut over chips, unit by unit: a receiver then finds its donor's weights on its own chip.

    Args:
      result: has the scores of all pairs.
      shards: how many chips the heads of a layer are cut over.

    Raises:
      HeadshareError: the shards do not divide a layer's units, or only the best donors are known.
    """
    if result.scores is None:
        raise HeadshareError("Donors within shards are chosen from the scores of all pairs, which this result lacks.")
    num_layers, units = result.value.shape
    shard = np.tile(shard_of_units(units, shards), num_layers)
    together = shard[:, None] == shard[None, :]
    scores = np.where(together, result.scores, np.float32(-np.inf))
    tie_scores = {tie: np.where(together, theirs, -np.inf) for tie, theirs in result.tie_scores.items()}
    layer, unit, value = best_donors(scores, units)
    return replace(result, donor_layer=layer, donor_unit=unit, value=value, scores=scores, tie_scores=tie_scores)


@typed
def drop_map(result: MatchResult, ratio: float) -> SharingMap:
    """Drops the units whose score of being dropped is highest.

    Args:
      result: has `drop_score`.
      ratio: in [0, 1); int(r * L * U) units are dropped.

    Raises:
      HeadshareError: ratio outside [0, 1), or a result that does not score dropping.

    Examples:
      >>> hs.drop_map(scores, ratio=0.4).summary()
      '2 of 6 units are dropped'
    """
    count = receiver_count(ratio, result.value.size)
    if result.drop_score is None:
        raise HeadshareError(f"Scores by {result.match} do not say what dropping a unit costs; use functional ones.")
    shape = result.value.shape
    chosen = np.argsort(-result.drop_score.ravel(), kind="stable")[:count]
    donor, score = np.arange(result.value.size), np.full(result.value.size, np.nan)
    donor[chosen], score[chosen] = DROPPED, result.drop_score.ravel()[chosen]
    return SharingMap(
        donor=donor.reshape(shape),
        score=score.reshape(shape),
        heads_per_unit=result.heads_per_unit,
        match=result.match,
        ratio=ratio,
        source=result.source,
    )


def receiver_count(ratio: float, num_units: int) -> int:
    """How many of a model's units a ratio makes receivers, or drops; HeadshareError if it is outside [0, 1)."""
    if not 0 <= ratio < 1:
        raise HeadshareError(f"The sharing ratio must be at least 0 and below 1, not {ratio}.")
    # The small term keeps a product such as 0.29 * 100 from falling just below the whole number it stands for.
    return int(ratio * num_units + 1e-9)


def _select_resolved(result: MatchResult, count: int) -> tuple[np.ndarray, np.ndarray]:
    value, best = result.value.ravel(), result.donor.ravel()
    donor, score = np.arange(value.size), np.full(value.size, np.nan)
    chosen = np.argsort(-value, kind="stable")[:count]
    donor[chosen], score[chosen] = best[chosen], value[chosen]
    # Donors lie in earlier layers, so following them ends after at most L steps.
    while not np.array_equal(donor, donor[donor]):
        donor = donor[donor]
    return donor, score


def _select_unchained(result: MatchResult, count: int) -> tuple[np.ndarray, np.ndarray]:
    receivers, donors, values = result.pairs()
    size = result.value.size
    donor, score = np.arange(size), np.full(size, np.nan)
    receives, gives = np.zeros(size, bool), np.zeros(size, bool)
    for pair in np.argsort(-values, kind="stable"):
        if receives.sum() == count:
            break
        receiver, giver = receivers[pair], donors[pair]
        if receives[receiver] or gives[receiver] or receives[giver]:
            continue
        donor[receiver], score[receiver] = giver, values[pair]
        receives[receiver] = gives[giver] = True
    if receives.sum() < count:
        raise HeadshareError(
            f"Without chains only {receives.sum()} of {count} receivers can be chosen; "
            "lower the ratio or use chains=resolve."
        )
    return donor, score
