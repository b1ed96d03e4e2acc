"""The privacy loss of Gaussian noise on a random number of contributions, quickly: (noise, sensitivities, chances) -> the library's distribution.

Sampling a unit's documents one by one makes this event (arXiv 2401.10294), and a calibration asks for its distribution a dozen times. The library inverts the privacy loss
by binary search, point by point; here all points are inverted at once by Newton's method, which converges from the right because the loss is convex and rising. What is
made of the points is the library's: connect-the-dots rounding, which can only overstate every delta, and composition.

Guarantees: epsilons equal the library's to 1e-6 (a test); mass beyond exp(-50) counts as certain loss.

Source: Choquette-Choo et al. 2024, arXiv 2310.15526, corollary 4.7 (one norm a sensitivity dominates vectors); Doroshenko et al. 2022, arXiv 2207.04380.

Does not cover: replace-one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from dp_accounting.pld.pld_pmf import create_pmf_pessimistic_connect_dots_fixed_gap
from dp_accounting.pld.privacy_loss_distribution import PrivacyLossDistribution
from numpy.typing import NDArray
from scipy import optimize, special

Vector = NDArray[np.float64]

_LOG_TAIL = -50.0
_NEWTON_STEPS = 100
_REACH = -float(special.ndtri_exp(_LOG_TAIL))
"""Standard deviations beyond which a Gaussian has mass exp(-50)."""


def loss_distribution(standard_deviation: float, sensitivities: Sequence[float], chances: Sequence[float], *, grid: float) -> Any:
    """Computes the privacy loss distribution of N(0, s^2) against the mixture of N(sensitivity, s^2), for removing a unit and for adding one.

    Args:
        standard_deviation: > 0.
        sensitivities: each >= 0, at least one of a positive chance above 0.
        chances: of each, summing to 1.
        grid: width of a cell of the privacy loss, > 0.
    """
    mixed = _Mixture(standard_deviation, np.asarray(sensitivities, dtype=np.float64), np.asarray(chances, dtype=np.float64))
    low, high = -_REACH * standard_deviation, mixed.reach()
    remove = _rounded(mixed.deltas_removing, mixed.loss(low), mixed.loss(high), grid)
    add = _rounded(mixed.deltas_adding, -mixed.loss(-low), -mixed.loss(low), grid)
    return PrivacyLossDistribution(remove, add)


def _rounded(deltas: Callable[[Vector], Vector], lowest: float, highest: float, grid: float) -> Any:
    first, last = math.floor(lowest / grid), math.ceil(highest / grid)
    found = np.clip(deltas(np.arange(first, last + 1, dtype=np.float64) * grid), 0.0, 1.0)
    rising = np.maximum.accumulate(found[::-1])[::-1]  # rounding may break the order of neighbours; upwards is safe
    return create_pmf_pessimistic_connect_dots_fixed_gap(grid, first, last, rising)


class _Mixture:
    """P = sum of chance_i N(sensitivity_i, s^2) against Q = N(0, s^2), on the line; the loss log P/Q rises with x."""

    def __init__(self, std: float, sensitivities: Vector, chances: Vector) -> None:
        there = chances > 0
        self.std, self.shift, self.log_chance = std, sensitivities[there], np.log(chances[there])
        still = float(chances[there & (sensitivities == 0)].sum())
        self.floor = math.log(still) if still > 0 else -math.inf

    def loss(self, x: float) -> float:
        return float(special.logsumexp(self.log_chance + self.shift * (x - self.shift / 2) / self.std**2))

    def reach(self) -> float:
        """Beyond it lies mass exp(-50) of P."""
        start = _REACH * self.std
        end = start + float(self.shift.max()) + self.std
        return float(optimize.brentq(lambda x: float(self._log_tail(np.array([x]))[0]) - _LOG_TAIL, start - self.std, end, xtol=1e-6 * self.std))

    def deltas_removing(self, epsilons: Vector) -> Vector:
        """max over events of P - e^epsilon Q: P is large where x is."""
        above = epsilons > self.floor
        result = -np.expm1(np.minimum(epsilons, 0.0))
        x = self._inverse(epsilons[above])
        result[above] = np.exp(self._log_tail(x)) - np.exp(epsilons[above] + special.log_ndtr(-x / self.std))
        return result

    def deltas_adding(self, epsilons: Vector) -> Vector:
        """max over events of Q - e^epsilon P: Q is large where x is small."""
        below = -epsilons > self.floor
        result = np.zeros_like(epsilons)
        x = self._inverse(-epsilons[below])
        log_P = special.logsumexp(self.log_chance + special.log_ndtr((x[:, None] - self.shift) / self.std), axis=1)
        result[below] = special.ndtr(x / self.std) - np.exp(epsilons[below] + log_P)
        return result

    def _log_tail(self, x: Vector) -> Vector:
        result: Vector = special.logsumexp(self.log_chance + special.log_ndtr((self.shift - x[:, None]) / self.std), axis=1)
        return result

    def _inverse(self, losses: Vector) -> Vector:
        """Where the loss is each of `losses`, all above the floor: Newton from the least point that one term of the mixture proves to be too large."""
        moving = self.shift > 0
        shift, log_chance = self.shift[moving], self.log_chance[moving]
        x: Vector = (self.std**2 * (losses[:, None] - log_chance) / shift + shift / 2).min(axis=1)
        for _ in range(_NEWTON_STEPS):
            terms = self.log_chance + self.shift * (x[:, None] - self.shift / 2) / self.std**2
            loss = special.logsumexp(terms, axis=1)
            slope = (np.exp(terms - loss[:, None]) * self.shift).sum(axis=1) / self.std**2
            step = np.where(slope > 0, (loss - losses) / np.where(slope > 0, slope, 1.0), 0.0)
            x = x - step
            if not len(x) or np.max(np.abs(step)) <= 1e-12 * self.std:
                break
        return x
