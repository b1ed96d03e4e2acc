"""The strategy's exact sensitivity, noise that is C^-1 z, and less of it in running sums."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from discreet.dp import banded, noise
from discreet.dp.accounting import guarantee
from discreet.dp.clipping import ClippedSum
from discreet.dp.mechanism import Sampling, calibrate
from discreet.keys import Key


@pytest.mark.parametrize(("bands", "steps"), [(1, 5), (2, 25), (5, 12), (8, 100), (12, 12)])
def test_the_sensitivity_of_the_matrix_is_what_the_event_says(bands: int, steps: int) -> None:
    """Exactly, over every pattern of steps that are at least `bands` apart: k turns cost sqrt(k), so each turn is one Gaussian of sensitivity 1."""
    strategy = banded.matrix(banded.coefficients(bands, steps), steps)
    assert np.linalg.norm(strategy, axis=0).max() == pytest.approx(1, abs=1e-9)
    gram = strategy.T @ strategy
    apart = [(s, t) for s, t in combinations(range(steps), 2) if t - s >= bands]
    assert max((abs(gram[s, t]) for s, t in apart), default=0.0) == 0.0
    for first in range(bands):
        turns = list(range(first, steps, bands))
        signs = np.ones(len(turns))
        worst = max(np.linalg.norm(strategy[:, turns] @ (signs * flip)) for flip in (1, -1))
        assert worst <= math.sqrt(len(turns)) + 1e-9


def test_golden_banded_epsilon() -> None:
    """The column-normalised strategy of 8 bands with cyclic Poisson sampling, 2000 steps (dp_accounting and an independent FFT agree)."""
    plan = calibrate(
        epsilon=5.01583263, delta=1e-6, population=10_000, expected_batch=100, steps=2000, clip_norm=1.0, sampling=Sampling.CYCLIC_POISSON, bands=8
    )
    assert plan.sampling_probability == 0.08
    assert plan.noise_multiplier == pytest.approx(1.5, rel=2e-3)
    three_turns = calibrate(
        epsilon=1.92535395, delta=1e-6, population=40, expected_batch=10, steps=12, clip_norm=1.0, sampling=Sampling.CYCLIC_POISSON, bands=4
    )
    assert three_turns.noise_multiplier == pytest.approx(4.0, rel=2e-3)  # everyone of the group in each turn, three of them


def test_noise_is_the_strategys_inverse_times_independent_draws() -> None:
    steps, column = 9, banded.coefficients(4, 9)
    zero = ClippedSum.zero(nn.Linear(3, 2).double(), clip_norm=0.5)
    memory, key = noise.Memory(bands=column), Key(bytes(32))
    fresh, seen = [], []
    for step in range(steps):
        stream = [key.stream("noise", step) for _ in range(2)]
        fresh.append(noise.add(zero, noise_multiplier=2.0, key=stream[0]).gradients["weight"].double().flatten().numpy())
        seen.append(noise.add(zero, noise_multiplier=2.0, key=stream[1], memory=memory).gradients["weight"].double().flatten().numpy())
        assert all(len(past) == min(step + 1, 3) for past in memory.past.values())
    expected = np.linalg.solve(banded.matrix(column, steps), np.array(fresh))
    np.testing.assert_allclose(np.array(seen), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(banded.matrix(column, steps) @ np.tile(banded.inverse(column, steps)[:, None], 1), np.eye(steps)[:, :1], atol=1e-12)


def test_one_band_is_independent_noise() -> None:
    zero, key = ClippedSum.zero(nn.Linear(3, 2), clip_norm=0.5), Key(bytes(32))
    plain = noise.add(zero, noise_multiplier=2.0, key=key.stream("noise", 1)).gradients
    one = noise.add(zero, noise_multiplier=2.0, key=key.stream("noise", 1), memory=noise.Memory(bands=(1.0,))).gradients
    assert all(torch.equal(plain[name], one[name]) for name in plain)


@pytest.mark.parametrize(("bands", "steps"), [(2, 25), (8, 400), (32, 2000)])
def test_coefficients_beat_the_square_root_and_independent_noise(bands: int, steps: int) -> None:
    column = banded.coefficients(bands, steps)
    root = np.cumprod([1.0, *((2 * k - 1) / (2 * k) for k in range(1, bands))])
    assert banded.error(column, steps) <= banded.error(root / np.linalg.norm(root), steps) * (1 + 1e-9)
    assert banded.error(column, steps) < 0.8 * banded.error((1.0,), steps)


def test_running_sums_hold_less_noise_at_the_same_epsilon() -> None:
    """A thousand units, everyone about ten times: error of the mean running sum, price included. At epsilon 2 sampling alone hides as much, and bands gain nothing."""
    common = {"epsilon": 8.0, "delta": 1e-5, "population": 1000, "expected_batch": 100, "steps": 100, "clip_norm": 1.0}
    plain = calibrate(**common)
    correlated = calibrate(**common, sampling=Sampling.CYCLIC_POISSON, bands=4)
    for plan in (plain, correlated):
        assert guarantee(plan.event, delta=1e-5).epsilon <= 8.0
    before = plain.noise_multiplier * banded.error((1.0,), 100)
    after = correlated.noise_multiplier * banded.error(correlated.bands, 100)
    assert after < 0.87 * before


@pytest.mark.parametrize("column", [(), (0.0, 0.5), (1.0, 0.1), (float("nan"),), (-0.5, 0.1)])
def test_a_column_of_another_sensitivity_is_refused(column: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="squares sum to at most 1"):
        banded.check(column)


@pytest.mark.parametrize(("bands", "steps"), [(0, 5), (6, 5)])
def test_bands_out_of_range_are_refused(bands: int, steps: int) -> None:
    with pytest.raises(ValueError, match=f"bands={bands}"):
        banded.coefficients(bands, steps)
