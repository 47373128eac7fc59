"""Match results: the scores by which receivers, donors and units to drop are chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class MatchResult:
    """The best donor of every unit.

    Attributes:
      donor_layer: int32 [L, U], layer of the best donor among all units of earlier layers; -1 in layer 0.
      donor_unit: int32 [L, U], its unit in that layer; -1 in layer 0.
      value: float64 [L, U], its score; -inf in layer 0.
      match: match function.
      heads_per_unit: G.
      scores: float32 [L * U, L * U], the score of every (receiver, donor) pair, -inf where the donor is not in an
        earlier layer; None where only the best donors are known. Functional scores are of the tie `qkv`.
      tie_scores: by tie, float32 [L * U, L * U], functional scores of other ties, -inf where they were not tried.
      drop_score: float32 [L, U], functional score of dropping each unit.
      seed: of the random baseline.
      source: fingerprint of the attention weights.
    """

    donor_layer: np.ndarray
    donor_unit: np.ndarray
    value: np.ndarray
    match: str | None = None
    heads_per_unit: int = 1
    scores: np.ndarray | None = None
    tie_scores: Mapping[str, np.ndarray] = field(default_factory=dict)
    drop_score: np.ndarray | None = None
    seed: int | None = None
    source: str | None = None

    @property
    def donor(self) -> np.ndarray:
        """int64 [L, U], flat index of the best donor."""
        return self.donor_layer.astype(np.int64) * self.value.shape[1] + self.donor_unit

    def pairs(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Flat receiver, flat donor and score of every known pair."""
        if self.scores is not None:
            receivers, donors = np.nonzero(np.isfinite(self.scores))
            return receivers, donors, self.scores[receivers, donors]
        receivers = np.flatnonzero(np.isfinite(self.value))
        return receivers, self.donor.ravel()[receivers], self.value.ravel()[receivers]


def best_donors(scores: np.ndarray, units: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`MatchResult.donor_layer`, `.donor_unit` and `.value` of the scores of all pairs, U units in a layer."""
    best = np.argmax(scores, axis=1)
    value = np.take_along_axis(scores, best[:, None], axis=1)[:, 0].astype(np.float64)
    none = np.isneginf(value)
    donor_layer, donor_unit = (np.where(none, -1, part).astype(np.int32) for part in np.divmod(best, units))
    return donor_layer.reshape(-1, units), donor_unit.reshape(-1, units), value.reshape(-1, units)
