"""Sums over tokens to which a refit reduces any amount of text, and the ridge regression that they are solved by."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy import linalg

from headshare_jax.calibration.streams import Weights, block_output, features, residual_weights
from headshare_jax.config import LlamaConfig
from headshare_jax.model.mesh import replicated

# Where a ridge is too small for the system to be solved, it is raised tenfold until it is not, from this least value.
LEAST_RIDGE = 1e-12


@dataclass(frozen=True)
class Moments:
    """Weighted sums over tokens, in float64: all that fitting needs of any amount of text.

    Targets are what W_0 leaves: row 0 is the block's own error e = y - H W_0, row 1 the drift d = x - x'.

    Attributes:
      gram: [I, I], H^T w^2 H.
      cross: [2, I, D], H^T w^2 (e, d).
      energy: [2, 2], inner products of e and d.
      tokens: M.
    """

    gram: np.ndarray
    cross: np.ndarray
    energy: np.ndarray
    tokens: int

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(
            self.gram + other.gram,
            self.cross + other.cross,
            self.energy + other.energy,
            self.tokens + other.tokens,
        )

    def of_rows(self, rows: np.ndarray) -> "Moments":
        """The same with only some of the features."""
        return Moments(self.gram[np.ix_(rows, rows)], self.cross[:, rows], self.energy, self.tokens)

    def error(self, change: np.ndarray) -> float:
        """Root mean square of w (e + d - H change)."""
        cross = self.cross[0] + self.cross[1]
        squares = self.energy.sum() + np.sum(change * (self.gram @ change - 2 * cross))
        return float(np.sqrt(max(squares, 0.0) / self.tokens))

    def solutions(self, ridge: float) -> tuple[np.ndarray, float]:
        """Changes for the error and for the drift, [2, I, D], which add up for any beta; and the ridge used."""
        solution, used = solve_ridge(self.gram, np.moveaxis(self.cross, 0, 1), ridge)
        return np.moveaxis(solution, 1, 0), used


def solve_ridge(gram: np.ndarray, cross: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """Minimises ||H X - t||^2 + rho ||X||^2, rho being `ridge` times the mean square of a feature.

    Args:
      gram: float64 [I, I], H^T H.
      cross: float64 [I, ...], H^T t.
      ridge: raised until the system can be solved, if need be.

    Returns:
      X, shaped like `cross`, and the ridge that was used.
    """
    scale = np.trace(gram) / len(gram)
    if scale == 0:
        return np.zeros_like(cross), ridge
    while True:
        try:
            factor = linalg.cho_factor(gram + ridge * scale * np.eye(len(gram)), lower=True, check_finite=False)
        except linalg.LinAlgError:
            ridge = max(10 * ridge, LEAST_RIDGE)
        else:
            return linalg.cho_solve(factor, cross.reshape(len(gram), -1)).reshape(cross.shape), ridge


@partial(jax.jit, static_argnames=("config", "block", "mesh"))
def batch_moments(
    config: LlamaConfig,
    compressed: Weights,
    x_btd: jax.Array,
    y_btd: jax.Array,
    after_btd: jax.Array,
    compressed_btd: jax.Array,
    there_b: jax.Array,
    block: str,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`Moments.gram`, `.cross` and `.energy` of a batch, float32, whole on every device of the mesh.

    y and the stream behind the block are the dense's; `there_b` is as of `streams.there`.
    """
    with jax.default_matmul_precision("highest"):
        w_bt1 = residual_weights(after_btd) * there_b[:, None, None]
        h_bti = features(config, compressed, compressed_btd, block)
        error_btd = y_btd - block_output(compressed, h_bti, block)
        h_mi = (w_bt1 * h_bti).reshape(-1, h_bti.shape[-1])
        targets_rbtd = w_bt1[None] * jnp.stack([error_btd, x_btd - compressed_btd])
        targets_rmd = targets_rbtd.reshape(2, -1, x_btd.shape[-1])
        cross_rid = jnp.einsum("mi,rmd->rid", h_mi, targets_rmd)
        energy_rs = jnp.einsum("rmd,smd->rs", targets_rmd, targets_rmd)
        return jax.lax.with_sharding_constraint((h_mi.T @ h_mi, cross_rid, energy_rs), replicated(mesh))
