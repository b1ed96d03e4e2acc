"""The coefficients of banded matrix factorisation: bands, steps -> the strategy's column, by which noise of one step is taken back in later ones.

    C        lower triangular, Toeplitz, b bands of coefficients c_0 .. c_(b-1) with sum of squares 1: the strategy
    release  C x + z, z independent, which is as good as x + C^-1 z: each step's sum with noise that is correlated with that of the steps before

What training feels is the noise in running sums of the steps, A C^-1 z with A all ones below the diagonal; the coefficients minimise its mean square over the run. They
start from the banded square root of A (Kalinin & Lampert 2024) and are improved by a quasi-Newton method with exact gradients.

Guarantees: every column of C has norm at most 1, whatever the optimiser found; columns b or more apart share no row, so that a unit which takes part only in steps b
apart meets independent noise each time: that, and nothing else here, is what the accountant relies on.

Source: Choquette-Choo et al. 2023, "(Amplified) Banded Matrix Factorization", arXiv 2306.08153; Kalinin & Lampert 2024, arXiv 2405.13763.

Does not cover: strategies that are not Toeplitz; workloads with momentum or a schedule, which change the utility and not the price.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, signal

Vector = NDArray[np.float64]

_ROUNDING = 1e-12


def coefficients(num_bands: int, steps: int) -> tuple[float, ...]:
    """Computes the column of the strategy.

    Args:
        num_bands: b, from 1 to `steps`. 1 is independent noise.
        steps: length of the run, >= 1.

    Returns:
        b coefficients, the first > 0, with sum of squares at most 1.

    Raises:
        ValueError: when a number is out of range.
    """
    if not 1 <= num_bands <= steps:
        raise ValueError(f"Expected 1 <= bands={num_bands} <= steps={steps}.")
    if num_bands == 1:
        return (1.0,)
    start = np.cumprod([1.0, *((2 * k - 1) / (2 * k) for k in range(1, num_bands))])
    found = optimize.minimize(_cost, start[1:], args=(steps,), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    best = min((start, np.append(1.0, found.x)), key=lambda column: _cost(column[1:], steps)[0])
    scaled = best / math.sqrt(math.fsum(best**2)) * (1 - _ROUNDING)
    return tuple(float(value) for value in scaled)


def check(column: Sequence[float]) -> None:
    """Refuses a column that is no strategy of sensitivity 1.

    Raises:
        ValueError: when the first coefficient is not positive, one is not finite, or the squares sum to more than 1.
    """
    if not column or not all(math.isfinite(value) for value in column) or not column[0] > 0 or math.fsum(value**2 for value in column) > 1:
        raise ValueError("Expected coefficients of bands that are finite, begin above 0 and whose squares sum to at most 1.")


def matrix(column: Sequence[float], steps: int) -> Vector:
    """Returns the strategy C, float64 [steps, steps]."""
    result = np.zeros((steps, steps))
    for band, value in enumerate(column):
        result += value * np.eye(steps, k=-band)
    return result


def inverse(column: Sequence[float], steps: int) -> Vector:
    """Returns the first column of C^-1, float64 [steps]: how much of the independent noise of a step is in the noise of each later one."""
    result: Vector = signal.lfilter([1.0], np.asarray(column, dtype=np.float64), np.append(1.0, np.zeros(steps - 1)))
    return result


def error(column: Sequence[float], steps: int) -> float:
    """Returns the root mean square of the noise in running sums, for independent noise of standard deviation 1."""
    sums = np.cumsum(inverse(column, steps))
    return math.sqrt(float(np.mean(np.cumsum(sums**2))))


def _cost(tail: Vector, steps: int) -> tuple[float, Vector]:
    """(log of the mean square error of a column scaled to norm 1, its gradient), for the column (1, *tail)."""
    column = np.append(1.0, tail)
    inverse_ = signal.lfilter([1.0], column, np.append(1.0, np.zeros(steps - 1)))
    with np.errstate(all="ignore"):
        sums = np.cumsum(inverse_)
        weights = np.arange(steps, 0, -1.0)
        square, norm = float(np.sum(weights * sums**2)), float(np.sum(column**2))
        if not math.isfinite(square) or square > 1e150:
            return 1e6, np.zeros_like(tail)  # far outside: a column whose inverse grows without bound
        moved = signal.lfilter([1.0], column, sums)
        slope = [-2 * float(np.sum(weights[band:] * sums[band:] * moved[: steps - band])) / square for band in range(1, len(column))]
    return math.log(square) + math.log(norm), np.asarray(slope) + 2 * tail / norm
