"""What a refit leaves of a layer's error once one unit runs on another's weights, or none: closed forms in float64.

All pairs of a layer share one inverse of the layer's size; the other units' rows are eliminated by hand, so that a pair
costs systems of one unit's width alone.
"""

import numpy as np
from scipy import linalg

from headshare_jax.cores import on_cores

# Relative to a matrix's trace.
ROUNDING = 1e-13
TINY = float(np.finfo(np.float32).tiny)


def pair_residuals(
    gram: np.ndarray,
    cross: np.ndarray,
    own: np.ndarray,
    outer: np.ndarray,
    ridge: float,
    wanted_uc: np.ndarray | None = None,
) -> np.ndarray:
    """Squared error, ridge term included, left by every pair of a unit of a layer and a donor; float64 [U, C].

    With rho = ridge * mean(diag(gram)), the least value over W of ||H' W - H W_0||^2 + rho ||W - W_0||^2, H' being H
    with a unit's features replaced by the donor's. Let P = (gram + rho)^-1, the only factorisation of the layer's size,
    Z = P cross, T = own - cross^T Z, and N = P_aa^-1 for the rows a of the unit. Eliminating the other rows leaves

        trace(W_a^T (N - Y^T S^-1 Y) W_a),  Y = Z_a^T N + rho,  S = T + rho + Z_a^T N Z_a,

    so that a pair costs one system of its own J features. Directions of the output count by a metric G: W_a stands for
    W_a G^(1/2), and G does not change which W is best.

    Args:
      gram: float64 [I, I], H^T H.
      cross: float64 [C, I, J], H^T G of every donor's features G.
      own: float64 [C, J, J], G^T G.
      outer: float64 [I, I], W_0 G W_0^T.
      ridge: above 0.
      wanted_uc: bool [U, C], the pairs to solve; the others' error is infinite. By default all.
    """
    width, size = len(gram), own.shape[-1]
    inverse, rho = regular_inverse(gram, ridge)
    z_cij = inverse @ cross
    t_cjj = own - np.swapaxes(cross, 1, 2) @ z_cij + rho * np.eye(size)
    units = width // size

    def of_unit(unit: int) -> np.ndarray:
        rows = slice(unit * size, (unit + 1) * size)
        n_jj = linalg.inv(inverse[rows, rows])
        residual_c = np.full(len(cross), np.inf)
        for donor in range(len(cross)) if wanted_uc is None else np.flatnonzero(wanted_uc[unit]):
            z_jj = z_cij[donor, rows]
            y_jj = z_jj.T @ n_jj + rho * np.eye(size)
            s_jj = t_cjj[donor] + z_jj.T @ n_jj @ z_jj
            # A donor that does what the layer's own units do leaves T near zero, and rounding may make it negative.
            s_jj += ROUNDING * np.trace(s_jj) * np.eye(size)
            left_jj = n_jj - y_jj.T @ linalg.cho_solve(linalg.cho_factor(s_jj), y_jj)
            residual_c[donor] = max(np.sum(left_jj * outer[rows, rows]), 0.0)
        return residual_c

    return np.stack(on_cores(of_unit, range(units)))


def shared_solution(inverse: np.ndarray, rho: float, cross: np.ndarray, own: np.ndarray, rows: slice) -> np.ndarray:
    """B, float64 [I, J]: the best change of the output weight for a pair is B W_a; names as in `pair_residuals`.

    With H' the features with the donor's G in the rows a, B = (H'^T H' + rho)^-1 H'^T (H_a - G), by elimination of the
    other rows.
    """
    n_jj = linalg.inv(inverse[rows, rows])
    z_ij = inverse @ cross
    others_ij = -inverse[:, rows] @ n_jj
    by_cross_ij = z_ij + others_ij @ z_ij[rows]
    others_ij[rows] = by_cross_ij[rows] = 0
    other_cross = cross.copy()
    other_cross[rows] = 0
    schur_jj = own + rho * np.eye(own.shape[0]) - other_cross.T @ by_cross_ij
    schur_jj += ROUNDING * np.trace(schur_jj) * np.eye(len(schur_jj))
    right_jj = cross[rows].T - own - other_cross.T @ (others_ij - by_cross_ij)
    own_rows_jj = linalg.cho_solve(linalg.cho_factor(schur_jj), right_jj)
    solution_ij = others_ij - by_cross_ij - by_cross_ij @ own_rows_jj
    solution_ij[rows] = own_rows_jj
    return solution_ij


def dropped_solution(inverse: np.ndarray, rows: slice) -> np.ndarray:
    """B of a unit that is dropped, float64 [I, J]: the other rows of the output weight change by theirs of B W_a."""
    solution_ij = -inverse[:, rows] @ linalg.inv(inverse[rows, rows])
    solution_ij[rows] = 0
    return solution_ij


def regular_inverse(gram: np.ndarray, ridge: float) -> tuple[np.ndarray, float]:
    """(gram + rho)^-1 and rho."""
    rho = ridge * max(np.trace(gram) / len(gram), TINY)
    return linalg.inv(gram + rho * np.eye(len(gram))), rho
