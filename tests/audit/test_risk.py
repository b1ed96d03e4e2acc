"""The advantage of the best attack: closed forms of the Gaussian curve and of (epsilon, delta)-DP."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
from scipy.special import ndtr

from discreet.audit.bounds import GaussianTradeOff
from discreet.audit.risk import advantage


@dataclass
class _Pure:
    """Trade-off curve of (epsilon, delta)-DP: Kairouz, Oh & Viswanath 2015."""

    epsilon: float
    delta: float = 0.0
    mu: float = math.nan

    def tpr(self, fpr: float) -> float:
        return min(1.0, math.exp(self.epsilon) * fpr + self.delta, 1 - math.exp(-self.epsilon) * (1 - self.delta - fpr))


@pytest.mark.parametrize("mu", [0.0, 0.01, 0.268, 1.0, 1.666, 5.0, 10.0])
def test_advantage_of_the_gaussian_curve(mu: float) -> None:
    assert advantage(GaussianTradeOff(mu=mu)) == pytest.approx(2 * ndtr(mu / 2) - 1, abs=1e-6)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.1, 0.0), (1.0, 1e-3), (3.0, 0.0), (8.0, 1e-5)])
def test_advantage_of_epsilon_delta(epsilon: float, delta: float) -> None:
    expected = (math.expm1(epsilon) + 2 * delta) / (math.exp(epsilon) + 1)
    assert advantage(_Pure(epsilon, delta)) == pytest.approx(expected, abs=1e-6)
