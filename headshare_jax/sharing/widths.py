"""Widths: how much of a slim unit is kept, of its values and outputs and of its queries and keys."""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from headshare_jax.config import LlamaConfig
from headshare_jax.errors import HeadshareError


@dataclass(frozen=True, eq=False)
class Widths:
    """For every sharing unit, which columns of its heads are kept.

    Attributes:
      rank: int32 [L, U], value columns kept: the first of the unit's H, and the same rows of o of each of its query
        heads; H where all are.
      pairs: bool [L, U, H - R / 2], what is kept of q and k, of all heads of the unit alike. With R the columns that
        turn, entry j < R / 2 is the rotary pair of columns j and j + R / 2; entry j >= R / 2 is the column j + R / 2,
        which does not turn.
      head_dim: H.

    Raises:
      HeadshareError: shapes or types are other ones, a unit keeps no value column or more than there are, or keeps
        nothing of q and k.
    """

    rank: np.ndarray
    pairs: np.ndarray
    head_dim: int

    def __post_init__(self) -> None:
        rank, pairs = np.array(self.rank), np.array(self.pairs)
        if rank.dtype.kind not in "iu" or pairs.dtype != np.bool_:
            raise HeadshareError("Widths need whole numbers as ranks, and pairs that are kept (true) or not (false).")
        if rank.ndim != 2 or pairs.ndim != 3 or rank.shape != pairs.shape[:2]:
            raise HeadshareError("Widths need ranks [layers, units] and pairs [layers, units, pairs of a head].")
        check_head(self.head_dim, 2 * (self.head_dim - pairs.shape[2]))
        for layer, unit in np.argwhere((rank < 1) | (rank > self.head_dim)):
            raise HeadshareError(
                f"The map keeps {rank[layer, unit]} of the {self.head_dim} value columns of unit {layer}.{unit} "
                f"(layer.unit); keep 1 to {self.head_dim} of them, or drop the unit instead."
            )
        for layer, unit in np.argwhere(~pairs.any(axis=2)):
            raise HeadshareError(
                f"The map keeps no pair of q and k of unit {layer}.{unit} (layer.unit); keep at least one, or drop the "
                "unit instead."
            )
        object.__setattr__(self, "rank", rank.astype(np.int32))
        object.__setattr__(self, "pairs", pairs)
        self.rank.setflags(write=False)
        self.pairs.setflags(write=False)

    @classmethod
    def full(cls, config: LlamaConfig) -> Self:
        """Widths of a model of which nothing is cut."""
        shape, head_dim = (config.num_layers, config.num_kv_heads), config.head_dim
        pairs = np.ones((*shape, check_head(head_dim, config.rotary_dim)), bool)
        return cls(np.full(shape, head_dim), pairs, head_dim)

    @property
    def rotary_dim(self) -> int:
        """R, the columns of a head that turn."""
        return 2 * (self.head_dim - self.pairs.shape[2])

    @property
    def qk(self) -> np.ndarray:
        """bool [L, U, H]: columns of q and k that are kept."""
        return np.concatenate([self.pairs[..., : self.rotary_dim // 2], self.pairs], axis=2)

    @property
    def vo(self) -> np.ndarray:
        """bool [L, U, H]: columns of v, and rows of o, that are kept."""
        return np.arange(self.head_dim) < self.rank[..., None]

    def kept(self, projection: str) -> np.ndarray:
        """bool [L, U, H]: columns (of o, rows) of a projection's heads that are kept."""
        return self.qk if projection in "qk" else self.vo

    @property
    def slim(self) -> np.ndarray:
        """bool [L, U]: something of the unit is cut."""
        return (self.rank < self.head_dim) | ~self.pairs.all(axis=2)

    def _key(self) -> tuple[Any, ...]:
        return (self.pairs.shape, self.rank.tobytes(), self.pairs.tobytes(), self.head_dim)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Widths) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


def check_head(head_dim: int, rotary_dim: int) -> int:
    """H - R / 2, what of q and k can be cut one by one; HeadshareError unless R is even, above 0 and at most H."""
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        raise HeadshareError(
            f"A head of {head_dim} columns, {rotary_dim} of which turn, cannot be slim: those that turn must be an "
            f"even number from 2 to {head_dim}."
        )
    return head_dim - rotary_dim // 2
