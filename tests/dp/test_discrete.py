"""Rotation, rounding and the exact discrete Gaussian: against their definitions, their bounds and published figures.

Statistics run on fixed keys, so they cannot flake: each threshold is the quantile of a false alarm of 1e-6 for a fresh key.
"""

from __future__ import annotations

import hashlib
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats

from discreet.dp import discrete
from discreet.dp.accounting import rdp
from discreet.dp.discrete import Encoding
from discreet.dp.mechanism import event_of
from discreet.keys import Stream


def stream(*path: object) -> Stream:
    return Stream(hashlib.sha256(repr(path).encode()).digest())


def encoding(**changes: object) -> Encoding:
    usual = {"dimension": 1000, "bits": 16, "clients": 10, "noisy": 7, "client_norm": 1.0, "clip_norm": 1.0, "noise_multiplier": 1.0}
    return discrete.encode_for(**{**usual, **changes})  # type: ignore[arg-type]  # keywords of mixed types


def vector(count: int, name: str = "v") -> np.ndarray:  # type: ignore[type-arg]  # float32 [count]
    raw = np.frombuffer(stream(name).bytes(4 * count), "<i4").astype(np.float64)
    return (raw / np.linalg.norm(raw)).astype(np.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 64, 100, 1000, 4096, 5000])
def test_rotation_keeps_norms_and_comes_back(count: int) -> None:
    x = vector(count)
    turned = discrete.rotate(x, stream("signs"))
    assert np.linalg.norm(turned) == pytest.approx(1.0, abs=1e-5)
    assert np.allclose(discrete.rotate_back(turned, stream("signs")), x, atol=1e-6)


def test_rotation_is_linear_and_flattens_a_spike() -> None:
    signs = stream("signs")
    spike = np.zeros(6000, np.float32)
    spike[17] = 1.0
    turned = discrete.rotate(spike, signs)
    assert np.abs(turned).max() <= math.sqrt(2 * math.log(2 * 6000 / 1e-6) / 4096)
    x, y = vector(6000, "x"), vector(6000, "y")
    assert np.allclose(discrete.rotate(x + y, signs), discrete.rotate(x, signs) + discrete.rotate(y, signs), atol=1e-5)


@pytest.mark.parametrize("std", [0.5, 0.8, 1.3, 4.0, 30.0, 797.3])
def test_the_discrete_gaussian_has_its_distribution(std: float) -> None:
    draws = discrete.discrete_gaussian(stream("gauss", std), 200_000, std=std)
    reach = math.ceil(6 * std)
    support = np.arange(-reach, reach + 1)
    weights = np.exp(-(support**2) / (2 * std**2))
    expected = 200_000 * weights / weights.sum()
    width = max(1, reach // 15)
    edges = np.arange(-reach, reach + 2, width)
    seen, _ = np.histogram(draws, edges)
    wanted = np.array([expected[(support >= low) & (support < high)].sum() for low, high in itertools.pairwise(edges)])
    keep = wanted > 10
    statistic = ((seen[keep] - wanted[keep]) ** 2 / wanted[keep]).sum()
    assert stats.chi2.sf(statistic, keep.sum() - 1) > 1e-6


def test_the_table_is_the_distribution_function_in_320_bits() -> None:
    from decimal import Decimal, localcontext

    table = discrete._table(1.75)
    with localcontext() as context:
        context.prec = 120
        weights = [(-Decimal(k * k) / (2 * Decimal("1.75") ** 2)).exp() for k in range(-table.reach, table.reach + 1)]
        total, running = sum(weights), Decimal(0)
        for exact, weight in zip(table.exact, weights, strict=True):
            running += weight
            assert abs(Decimal(exact) / Decimal(2) ** 320 - running / total) < Decimal(2) ** -300


def test_a_word_on_a_border_is_resolved_with_further_bits() -> None:
    table = discrete._table(2.0)
    border = int(table.words[table.reach])
    found = {discrete._refined(table.exact, border, stream("refine", i)) for i in range(64)}
    assert found == {table.reach, table.reach + 1}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 0.3, 1.0]))
def test_neighbours_differ_by_at_most_the_stated_sensitivity(seed: int, norm: float) -> None:
    """One unit more or less in a client's sum, under the same coins of the rounding."""
    made = encoding(client_norm=3.0)
    quiet = Encoding(**{**{name: getattr(made, name) for name in Encoding.__slots__}, "noise_multiplier": 0.0})
    x = 2 * vector(1000, f"x{seed}")
    g = norm * vector(1000, f"g{seed}")
    first, second = (discrete.encode(v, quiet, signs=stream("s"), secret=stream("c", seed)) for v in (x, (x + g).astype(np.float32)))
    assert np.linalg.norm((second - first).astype(np.float64)) <= made.sensitivity


def test_rounding_is_unbiased() -> None:
    x = np.full(100_000, 0.3, np.float32)
    rounded = discrete._quantised(x, 1.0, stream("round"))
    assert set(rounded.tolist()) == {0, 1}
    assert abs(rounded.mean() - 0.3) < 5 * math.sqrt(0.21 / 100_000)


@pytest.mark.parametrize("bits", [16, 32])
def test_a_sum_decodes_to_the_sum_and_its_noise(bits: int) -> None:
    made = encoding(bits=bits, noise_multiplier=0.5, dimension=5000)
    vectors = [vector(5000, f"client {i}") for i in range(10)]
    mask = (1 << bits) - 1
    sent = [(discrete.encode(v, made, signs=stream("s"), secret=stream("c", i)) & mask).astype(f"<u{bits // 8}") for i, v in enumerate(vectors)]
    total = np.sum(sent, axis=0, dtype=f"<u{bits // 8}")
    error = discrete.decode(total, made, signs=stream("s")) - np.sum(vectors, axis=0)
    expected = made.noise_std * math.sqrt(10 / 7)
    assert np.std(error) == pytest.approx(expected, rel=0.08)


def test_a_norm_beyond_the_bound_is_projected_and_nan_costs_the_contribution() -> None:
    made = encoding(noise_multiplier=0.0, client_norm=1.0)
    sent = discrete.encode(100 * vector(1000), made, signs=stream("s"), secret=stream("c"))
    assert np.linalg.norm(sent / made.scale) <= 1 + 1e-2
    broken = vector(1000).copy()
    broken[3] = np.nan
    assert abs(discrete.encode(broken, made, signs=stream("s"), secret=stream("c"))).max() <= 1


def test_wrapping_is_improbable_and_the_grid_is_as_fine_as_that_allows() -> None:
    made = encoding()
    assert 2.0**-41 < made.wrap_probability <= 2.0**-40
    finer = Encoding(**{**{name: getattr(made, name) for name in Encoding.__slots__}, "scale": made.scale * 1.01})
    assert finer.wrap_probability > 2.0**-40
    assert encoding(bits=32).scale > made.scale


def test_sixteen_bits_cost_little_as_published() -> None:
    """Kairouz et al. 2021 (abstract): the distributed discrete Gaussian matches central DP with fewer than 16 bits a value."""
    assert encoding(dimension=1_000_000, clients=20, noisy=13).overhead < 1.02
    assert encoding(dimension=100_000, clients=500, noisy=300).overhead < 1.05


def test_the_renyi_divergence_is_the_gaussians() -> None:
    """Sums over the integers, subsampled and not, both directions, against the event that is accounted."""
    std, shift, q = 4.0, 4, 0.3
    k = np.arange(-160, 165)
    log0, log1 = (-((k - m) ** 2) / (2 * std**2) for m in (0, shift))
    log0, log1 = log0 - special.logsumexp(log0), log1 - special.logsumexp(log1)
    mixed = np.logaddexp(math.log(1 - q) + log0, math.log(q) + log1)

    def divergence(first: np.ndarray, second: np.ndarray, order: int) -> float:  # type: ignore[type-arg]  # float64 [k]
        return float(special.logsumexp(order * first + (1 - order) * second)) / (order - 1)

    for order in (2, 3, 8):
        assert divergence(log1, log0, order) == pytest.approx(order * shift**2 / (2 * std**2), rel=1e-9)
        accounted = rdp(event_of(sampling_probability=q, noise_multiplier=std / shift, steps=1), [order])[0]
        assert divergence(mixed, log0, order) == pytest.approx(accounted, rel=1e-6)
        assert divergence(log0, mixed, order) <= accounted * (1 + 1e-6)


def test_a_sum_of_discrete_gaussians_is_as_good_as_one() -> None:
    """Kairouz et al. 2021, Thm 11, checked by convolution: with a standard deviation of 1.2 the factor is seen and bounded, with 4 and more it is nothing."""
    std = 1.2
    k = np.arange(-60, 61)
    one = np.exp(-(k**2) / (2 * std**2))
    one /= one.sum()
    two = np.convolve(one, one)[60:181]
    wide = np.exp(-(k**2) / (4 * std**2))
    wide /= wide.sum()
    core = np.abs(k) < 12
    assert np.abs(np.log(two[core] / wide[core])).max() <= 10 * math.exp(-(math.pi**2) * std**2)
    assert encoding().renyi_slack < 1e-60


REFUSED = [
    {"bits": 8},
    {"dimension": 0},
    {"noisy": 11},
    {"clip_norm": 2.0},
    {"noise_multiplier": -1.0},
    {"noise_multiplier": math.nan},
    {"clients": 10_000_000, "client_norm": 1e4, "noisy": 9_000_000},
]


@pytest.mark.parametrize("changes", REFUSED)
def test_bad_parameters_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        encoding(**changes)
    with pytest.raises(ValueError, match="std"):
        discrete.discrete_gaussian(stream(), 1, std=0.1)
    with pytest.raises(ValueError, match="shape"):
        discrete.encode(vector(3), encoding(), signs=stream(), secret=stream())
