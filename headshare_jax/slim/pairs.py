"""Sharing beside slimming: units that may run on another's queries, keys and values, and what that costs."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from headshare_jax.errors import HeadshareError
from headshare_jax.sharing.scores import MatchResult
from headshare_jax.slim.kept import Kept


@dataclass(frozen=True)
class Pairs:
    """Receivers, each with a donor that it could have.

    Functional matching measures costs after a refit, and costs of cuts are of before one. So a pair's cost is told
    against that of dropping its receiver, which both measure.

    Attributes:
      receiver, donor: int64 [C], flat units.
      part: float64 [C], what sharing costs, as a part of what dropping the receiver does.
      stored: columns of values, and of queries and keys, that take up as much as what a receiver stores, its outputs.
      size: columns of a whole unit.
    """

    receiver: np.ndarray
    donor: np.ndarray
    part: np.ndarray
    stored: Fraction
    size: int

    @classmethod
    def of(cls, scores: MatchResult, head_dim: int) -> "Pairs":
        """The pairs that functional matching scored.

        Raises:
          HeadshareError: the scores are others.
        """
        if scores.drop_score is None:
            raise HeadshareError("Sharing beside slimming needs functional scores; match with match_functional.")
        receiver, donor, score = scores.pairs()
        drop = -scores.drop_score.ravel()[receiver].astype(np.float64)
        part = np.divide(-score, drop, out=np.ones(len(drop)), where=drop > 0)
        heads = scores.heads_per_unit
        return cls(receiver, donor, part, Fraction(heads * head_dim, heads + 1), 2 * head_dim)

    def worth_sharing(
        self, kept: Kept, whole_n: np.ndarray, drop_n: np.ndarray, price_n: np.ndarray, least_n: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Donors for the units that cost less so, at a price of a column, than they and their donors do apart.

        A donor stays whole, and so does a unit that shares. The pair that saves most is taken over and over.

        Args:
          kept: what is left of the units.
          whole_n: bool [N], units of which nothing is cut.
          drop_n: float64 [N], what it costs to drop each unit.
          price_n: float64 [N], of a column.
          least_n: float64 [N], cost and price of each unit where it shares nothing.

        Returns:
          int32 [N], donors, a unit's own where it does not share; float64 [N], what sharing costs each.
        """
        donor_n, cost_n = kept.donor.ravel().copy(), np.zeros(len(drop_n))
        own_n = np.arange(len(donor_n))
        cost_c = self.part * drop_n[self.receiver]
        shared_c = cost_c + price_n[self.receiver] * float(self.stored)
        whole_c = whole_n[self.receiver] & whole_n[self.donor]
        while True:
            receives_n, donates_n = donor_n != own_n, np.isin(own_n, donor_n[donor_n != own_n])
            stays_n = np.where(donates_n, 0, price_n * self.size - least_n)
            free_c = whole_c & ~(receives_n | donates_n)[self.receiver] & ~receives_n[self.donor]
            gain_c = np.where(free_c, least_n[self.receiver] - shared_c - stays_n[self.donor], -np.inf)
            best = int(gain_c.argmax()) if len(gain_c) else -1
            if best < 0 or gain_c[best] <= 0:
                return donor_n, cost_n
            donor_n[self.receiver[best]], cost_n[self.receiver[best]] = self.donor[best], cost_c[best]
