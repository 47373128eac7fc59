"""Cutting values and outputs to fewer columns, each unit's in the directions given, and balancing the two."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from headshare_jax.cores import on_cores
from headshare_jax.parameters import bias_name, parameter_names, pool_name
from headshare_jax.sharing import finite
from headshare_jax.sharing.source import WeightSource


@dataclass(frozen=True)
class Directions:
    """Other coordinates of a layer's head outputs, z -> z `into`, the most telling first, and the way back.

    Attributes:
      into_uhh: float64 [U, H, H], a direction a column; zeros past the unit's rank.
      back_uhh: float64 [U, H, H], a direction a row, so that into @ back is the identity on the columns that are left.
    """

    into_uhh: np.ndarray
    back_uhh: np.ndarray


@dataclass(frozen=True)
class ValuePath:
    """A layer's values and outputs, float64: how what is attended to reaches the stream.

    Attributes:
      v_kdh: [K, D, H]; their biases, if any, are one more row of D.
      o_khe: [K, H, G D], of each unit the output weights of its heads side by side.
      heads: G.
      biased: whether the last row of v is a bias.
    """

    v_kdh: np.ndarray
    o_khe: np.ndarray
    heads: int
    biased: bool

    @classmethod
    def read(cls, source: WeightSource, layer: int) -> "ValuePath":
        """A layer's in a source."""
        v_kdh = source.read(pool_name("v"), layer).astype(np.float64)
        o_nhd = source.read(pool_name("o"), layer).astype(np.float64)
        biased = bias_name("v") in parameter_names(source.config)
        if biased:
            bias_kh = source.read(bias_name("v"), layer).astype(np.float64)
            v_kdh = np.concatenate([v_kdh, bias_kh[:, None]], axis=1)
        heads, (_, width, size) = source.config.heads_per_unit, o_nhd.shape
        o_khe = o_nhd.reshape(-1, heads, width, size).swapaxes(1, 2).reshape(len(v_kdh), width, -1)
        return cls(v_kdh, o_khe, heads, biased)

    def slices(self, source: WeightSource, layer: int) -> dict[tuple[str, int], np.ndarray]:
        """The same by parameter and layer, in a source's types.

        Raises:
          HeadshareError: they do not fit these.
        """
        units, width, _ = self.o_khe.shape
        o_nhd = self.o_khe.reshape(units, width, self.heads, -1).swapaxes(1, 2).reshape(units * self.heads, width, -1)
        v_kdh, bias_kh = (self.v_kdh[:, :-1], self.v_kdh[:, -1]) if self.biased else (self.v_kdh, None)
        whole = {pool_name("v"): v_kdh, pool_name("o"): o_nhd}
        if bias_kh is not None:
            whole[bias_name("v")] = bias_kh
        return {(name, layer): _stored(source, name, layer, values) for name, values in whole.items()}


def cut(path: ValuePath, directions: Directions, rank_u: np.ndarray) -> ValuePath:
    """Units cut to their first directions, and balanced: `rank_u`, int [U], says how many; -1 leaves one as it is."""

    def factors(unit: int) -> tuple[np.ndarray, np.ndarray]:
        into_hr, back_rh = directions.into_uhh[unit][:, : rank_u[unit]], directions.back_uhh[unit][: rank_u[unit]]
        return path.v_kdh[unit] @ into_hr, back_rh @ path.o_khe[unit]

    return _replaced(path, rank_u, factors)


def balance(path: ValuePath, rank_u: np.ndarray) -> ValuePath:
    """Units balanced as they are; `rank_u`, int [U], says how many columns each has, -1 that it is left as it is."""
    return _replaced(path, rank_u, lambda unit: (path.v_kdh[unit][:, : rank_u[unit]], path.o_khe[unit][: rank_u[unit]]))


def balanced(v_dr: np.ndarray, o_re: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors [D, r] and [r, E] of the same product whose Gram matrices v^T v and o o^T are equal and diagonal.

    The diagonal descends; r is at most D and E.
    """
    q_dr, v_rr = np.linalg.qr(v_dr)
    q_er, o_rr = np.linalg.qr(o_re.T)
    left_rr, size_r, right_rr = np.linalg.svd(v_rr @ o_rr.T)
    root_r = np.sqrt(size_r)
    return q_dr @ (left_rr * root_r), (root_r[:, None] * right_rr) @ q_er.T


def _replaced(
    path: ValuePath, rank_u: np.ndarray, factors: Callable[[int], tuple[np.ndarray, np.ndarray]]
) -> ValuePath:
    """Units with a rank, whose values [D, r] and outputs [r, G D] are balanced; zeros are behind them."""
    v_kdh, o_khe, chosen = path.v_kdh.copy(), path.o_khe.copy(), np.flatnonzero(rank_u >= 0).tolist()
    found = on_cores(lambda unit: balanced(*factors(unit)), chosen)
    for unit, (v_dr, o_re) in zip(chosen, found, strict=True):
        v_kdh[unit], o_khe[unit] = 0, 0
        v_kdh[unit, :, : len(o_re)], o_khe[unit, : len(o_re)] = v_dr, o_re
    return replace(path, v_kdh=v_kdh, o_khe=o_khe)


def _stored(source: WeightSource, name: str, layer: int, values: np.ndarray) -> np.ndarray:
    dtype: np.dtype[Any] = source.dtype(name)
    with np.errstate(over="ignore"):
        stored = values.astype(dtype)
    if not finite.is_finite(stored):
        raise finite.NotFinite(
            f"The slim {finite.slice_name(name, layer)} does not fit {dtype}, which makes {finite.said(stored)} of it; "
            "convert the model to float32 or bfloat16 first."
        )
    return stored
