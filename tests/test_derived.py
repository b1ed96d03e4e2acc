"""Statistics and synthetic text: noise as charged, bins as said; on a project that ran in tests/test_story.py."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from discreet import derived
from discreet.derived import BOUNDS, binned


def test_bins_hold_every_length_once() -> None:
    assert binned([]) == [0] * (len(BOUNDS) + 1)
    assert binned([1, 64, 65, 128, 4096, 4097]) == [2, 2, 0, 0, 0, 0, 1, 1]


def test_noise_has_the_scale_that_was_charged() -> None:
    """Half of epsilon each, sensitivities 1 and cap; the variance of a discrete Laplace against its formula, false-alarm rate about 1e-6."""
    pytest.importorskip("opendp")
    count, histogram = derived._measurements(0.5, cap=3)
    assert count.map(1) == pytest.approx(0.25)
    assert histogram.map(3) == pytest.approx(0.25)
    draws = np.array([histogram([0] * 8) for _ in range(500)]).ravel()
    scale = 2 * 3 / 0.5
    ratio = np.exp(-1 / scale)
    variance = 2 * ratio / (1 - ratio) ** 2
    z = (np.mean(draws**2) / variance - 1) / np.sqrt(5 / len(draws))  # kurtosis of a Laplace: fourth moment 6 variance^2
    assert abs(z) < stats.norm.isf(5e-7)
