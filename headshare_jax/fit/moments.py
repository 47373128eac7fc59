"""Sums over tokens to which a refit reduces any amount of text, and the ridge regression that they are solved by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import linalg

from headshare_jax.calibration.streams import Weights, block_output, features, on_rows, residual_weights
from headshare_jax.config import LlamaConfig
from headshare_jax.model.mesh import put, replicated

# Where a ridge is too small for the system to be solved, it is raised tenfold until it is not, from this least value.
LEAST_RIDGE = 1e-12
# The least ridge for which float32 will do: rounding, times the largest condition number, is then well below 1.
LEAST_ON_DEVICE = 1e-2


@dataclass(frozen=True)
class Moments:
    """Weighted sums over tokens, in float64: all that fitting needs of any amount of text.

    Targets are what W_0 leaves: row 0 is the block's own error e = y - H W_0, row 1 the drift d = x - x'.

    Attributes:
      gram: [I, I], H^T w^2 H.
      cross: [2, I, D], H^T w^2 (e, d).
      energy: [2, 2], inner products of e and d.
      tokens: M.
      device: an accelerator, which then does in float32 what is large; None: the host does all.
    """

    gram: np.ndarray
    cross: np.ndarray
    energy: np.ndarray
    tokens: int
    device: jax.Device | None = None

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.energy + other.energy,
            self.tokens + other.tokens,
            self.device,
        )

    def of_rows(self, rows: np.ndarray) -> "Moments":
        """The same with only some of the features, ascending."""
        if len(rows) == len(self.gram):
            return self
        return replace(self, gram=self.gram[np.ix_(rows, rows)], cross=self.cross[:, rows])

    def error(self, change: np.ndarray | None = None) -> float:
        """Root mean square of w (e + d - H change); of no change by default."""
        if change is None:
            return self._root(0.0)
        product = self.gram @ change if self.device is None else _on(self.device, gram_product, self.gram, change)
        return self._root(np.sum(change * (2 * self.target(1.0) - product)))

    def target(self, drift: float) -> np.ndarray:
        """H^T w^2 (e + beta d), [I, D]."""
        target: np.ndarray = self.cross[0] + drift * self.cross[1]
        return target

    def solutions(self, ridge: float, drifts: Sequence[float]) -> tuple[list["Solution"], float]:
        """The change for each of some drifts, and the ridge that was used.

        Solutions add up, so that two right sides serve any number of drifts, and one serves one.
        """
        few = len(drifts) < 3
        rights = [self.target(drift) for drift in drifts] if few else list(self.cross)
        solution, used = solve_ridge(self.gram, np.stack(rights, axis=1), ridge, self.device)
        rho = used * mean_square(self.gram)
        found = []
        for place, drift in enumerate(drifts):
            change = solution[:, place] if few else solution[:, 0] + drift * solution[:, 1]
            # What the equations say of the product with the Gram matrix spares it.
            product = self.target(drift) - rho * change
            found.append(Solution(change, self._root(np.sum(change * (2 * self.target(1.0) - product)))))
        return found, used

    def _root(self, gain: float) -> float:
        return float(np.sqrt(max(self.energy.sum() - gain, 0.0) / self.tokens))


@dataclass(frozen=True)
class Solution:
    """A change of an output weight, float64 [I, D], and the error that it leaves where it was solved for."""

    change: np.ndarray
    error: float


def mean_square(gram: np.ndarray) -> float:
    """That of a feature, but for the number of tokens."""
    return float(np.trace(gram) / len(gram))


def solve_ridge(
    gram: np.ndarray, cross: np.ndarray, ridge: float, device: jax.Device | None = None
) -> tuple[np.ndarray, float]:
    """Minimises ||H X - t||^2 + rho ||X||^2, rho being `ridge` times the mean square of a feature.

    Args:
      gram: float64 [I, I], H^T H.
      cross: float64 [I, ...], H^T t.
      ridge: raised until the system can be solved, if need be.
      device: one that solves it, in float32 and refined once, unless the ridge is too small for that.

    Returns:
      X, shaped like `cross`, and the ridge that was used.
    """
    scale = mean_square(gram)
    if scale == 0:
        return np.zeros_like(cross), ridge
    if device is not None and ridge >= LEAST_ON_DEVICE:
        flat = cross.reshape(len(gram), -1)
        solution = _on(device, refined_solution, gram / scale, flat / scale, np.array(ridge))
        if np.isfinite(solution).all():
            return solution.reshape(cross.shape), ridge
    while True:
        try:
            system = gram.copy()
            system.flat[:: len(gram) + 1] += ridge * scale
            # Transposed, which it is not changed by, LAPACK takes it as it lies.
            factor = linalg.cho_factor(system.T, lower=True, overwrite_a=True, check_finite=False)
        except linalg.LinAlgError:
            ridge = max(10 * ridge, LEAST_RIDGE)
        else:
            return linalg.cho_solve(factor, cross.reshape(len(gram), -1)).reshape(cross.shape), ridge


def _on(device: jax.Device, program: Callable[..., jax.Array], *values: np.ndarray) -> np.ndarray:
    """What a program gives on a device for some values, float64."""
    placed = (jax.device_put(np.asarray(value, np.float32), device) for value in values)
    return np.asarray(program(*placed), np.float64)


@jax.jit
def gram_product(gram: jax.Array, change: jax.Array) -> jax.Array:
    return jnp.matmul(gram, change, precision="highest")


@jax.jit
def refined_solution(gram: jax.Array, cross: jax.Array, ridge: jax.Array) -> jax.Array:
    """(gram + ridge)^-1 cross by Cholesky; of what rounding leaves of it, the same once more."""
    with jax.default_matmul_precision("highest"):
        system = gram + ridge * jnp.eye(len(gram), dtype=gram.dtype)
        factor = jax.scipy.linalg.cho_factor(system, lower=True)
        solution = jax.scipy.linalg.cho_solve(factor, cross)
        return solution + jax.scipy.linalg.cho_solve(factor, cross - system @ solution)


class Totals(NamedTuple):
    """`Moments.gram`, `.cross` and `.energy` on a mesh, whole on every device: two float32 numbers for each.

    Attributes:
      sums: of batches.
      over: what rounding has put into these that is not there.
    """

    sums: tuple[jax.Array, ...]
    over: tuple[jax.Array, ...]

    @classmethod
    def by(cls, array: Callable[[tuple[int, ...]], Any], width: int, hidden: int) -> "Totals":
        """Of arrays by their shape, for features so wide and a stream."""
        shapes: tuple[tuple[int, ...], ...] = (width, width), (2, width, hidden), (2, 2)
        sums, over = (tuple(map(array, shapes)) for _ in range(2))
        return cls(sums, over)

    @classmethod
    def nothing(cls, width: int, hidden: int, mesh: Mesh) -> "Totals":
        """Of no batch."""
        return cls.by(lambda shape: put(np.zeros(shape, np.float32), replicated(mesh)), width, hidden)

    def moments(self, tokens: int) -> Moments:
        """On the host, of so many tokens."""
        device: jax.Device = self.sums[0].addressable_shards[0].device
        pairs = zip(self.sums, self.over, strict=True)
        gram, cross, energy = (
            np.subtract(np.asarray(total), np.asarray(over), dtype=np.float64) for total, over in pairs
        )
        return Moments(gram, cross, energy, tokens, None if device.platform == "cpu" else device)


@partial(jax.jit, static_argnames=("config", "block", "mesh"))
def batch_features(config: LlamaConfig, weights: Weights, x_btd: jax.Array, block: str, mesh: Mesh) -> jax.Array:
    """What a block's output weight multiplies, [B, T, I], cut over the mesh as the stream is."""
    with jax.default_matmul_precision("highest"):
        return on_rows(features(config, weights, x_btd, block), mesh)


@partial(jax.jit, static_argnames=("block", "mesh"))
def behind(weights: Weights, x_btd: jax.Array, features_bti: jax.Array, block: str, mesh: Mesh) -> jax.Array:
    """The stream behind a block, from the stream before it and `batch_features`."""
    with jax.default_matmul_precision("highest"):
        return on_rows(x_btd + block_output(weights, features_bti, block), mesh)


@partial(jax.jit, static_argnames=("block", "mesh"), donate_argnames="totals")
def batch_moments(
    totals: Totals,
    compressed: Weights,
    h_bti: jax.Array,
    x_btd: jax.Array,
    y_btd: jax.Array,
    after_btd: jax.Array,
    compressed_btd: jax.Array,
    there_b: jax.Array,
    block: str,
    mesh: Mesh,
) -> Totals:
    """Totals with a batch more.

    y and the stream behind the block are the dense's, features the compressed model's; `there_b` is as of
    `streams.there`.
    """
    with jax.default_matmul_precision("highest"):
        w_bt1 = residual_weights(after_btd) * there_b[:, None, None]
        error_btd = y_btd - block_output(compressed, h_bti, block)
        h_mi = (w_bt1 * h_bti).reshape(-1, h_bti.shape[-1])
        targets_rbtd = w_bt1[None] * jnp.stack([error_btd, x_btd - compressed_btd])
        targets_rmd = targets_rbtd.reshape(2, -1, x_btd.shape[-1])
        cross_rid = jnp.einsum("mi,rmd->rid", h_mi, targets_rmd)
        energy_rs = jnp.einsum("rmd,smd->rs", targets_rmd, targets_rmd)
        more = jax.lax.with_sharding_constraint((h_mi.T @ h_mi, cross_rid, energy_rs), replicated(mesh))
    sums, over = zip(*map(_added, *totals, more), strict=True)
    return Totals(sums, over)


def _added(total: jax.Array, over: jax.Array, more: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A sum with more, by Kahan's summation, and what rounding has put into it."""
    more = more - over
    found = total + more
    return found, (found - total) - more
