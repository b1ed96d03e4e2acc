"""Noised counts: the proof is within the charge, the noise is as wide as said, the margin is the exact tail."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from discreet.dp import counts

pytest.importorskip("opendp")


@pytest.mark.parametrize(("epsilon", "sensitivity"), [(1.0, 1), (0.25, 3), (8.0, 2), (1e-6, 1)])
def test_the_proof_is_within_what_is_charged(epsilon: float, sensitivity: int) -> None:
    measurement = counts.laplace(epsilon, sensitivity=sensitivity)
    assert epsilon * (1 - 1e-6) <= measurement.map(sensitivity) <= epsilon * (1 + 1e-9)
    assert measurement.map(sensitivity + 1) > epsilon, "a unit that moves the counts by more is not covered"


def test_the_noise_is_as_wide_as_its_scale_and_differs_between_counts_and_calls() -> None:
    """4,000 draws against the variance of a discrete Laplace of scale 2; false-alarm rate about 1e-6. Half of the noise, or twice, is far outside."""
    measurement = counts.laplace(0.5, sensitivity=1)
    draws = np.array([measurement([100] * 8) for _ in range(500)]).ravel() - 100
    ratio = math.exp(-0.5)
    variance = 2 * ratio / (1 - ratio) ** 2
    z = (np.mean(draws.astype(float) ** 2) / variance - 1) / math.sqrt(5 / len(draws))  # kurtosis of a Laplace: fourth moment 6 variance^2
    assert abs(z) < stats.norm.isf(5e-7)
    assert abs(3 / math.sqrt(5 / len(draws))) > stats.norm.isf(5e-7), "four times the variance would be seen"
    assert len({tuple(row) for row in draws.reshape(-1, 8)}) > 490


@pytest.mark.parametrize("epsilon", [0.01, 0.3, 1.0, 5.0])
@pytest.mark.parametrize("sensitivity", [1, 4])
def test_the_margin_is_the_smallest_that_holds(epsilon: float, sensitivity: int) -> None:
    ratio = math.exp(-epsilon / sensitivity)
    mass = (1 - ratio) / (1 + ratio) * ratio ** np.abs(np.arange(-20_000, 20_001, dtype=float))
    width = counts.margin(epsilon, sensitivity=sensitivity)
    outside = [mass[np.abs(np.arange(-20_000, 20_001)) > t].sum() for t in (width, width - 1)]
    assert outside[0] <= 0.05
    assert width == 0 or outside[1] > 0.05


def test_the_margin_of_the_smallest_and_the_largest_epsilon() -> None:
    assert counts.margin(1e-9, sensitivity=1) > 10**9
    assert counts.margin(1e4, sensitivity=1) == 0


@pytest.mark.parametrize(("epsilon", "sensitivity"), [(0.0, 1), (-1.0, 1), (math.inf, 1), (math.nan, 1), (1.0, 0), (1e-310, 1)])
def test_figures_that_prove_nothing_are_refused(epsilon: float, sensitivity: int) -> None:
    with pytest.raises(ValueError, match="epsilon"):
        counts.laplace(epsilon, sensitivity=sensitivity)
