"""The epsilon of Poisson-sampled Gaussian steps in a fraction of a second: (probability, noise, steps, delta) -> epsilon, with numpy alone.

Why beside the accountant: importing its libraries takes longer than anybody waits for one figure at a prompt. This is the same mathematics for the one event that is
asked for most, and nothing that is promised or charged comes from here: plans, budgets and guarantees are `accounting`'s.

    one step      the privacy loss of x ~ P is log P/Q; the P- and Q-mass of each cell of a grid go to the cell's two ends, so that both are kept
    many steps    the distribution's power by FFT, on a window that Chernoff's bound shows to hold all but 1e-15 of it
    epsilon       where the hockey-stick divergence of the result crosses delta

Guarantees: pessimistic like the libraries': keeping both masses at the ends can only raise every delta, tails count as certain loss; the larger of adding and removing
a unit is given. What it cannot do well (no sampling, tiny noise, tiny deltas) it refuses by None, and the caller asks `accounting`.

Source: Doroshenko et al. 2022, "Connect the Dots" (arXiv 2207.04380); Koskela et al. 2020 (FFT); tested against dp_accounting.

Does not cover: other events or relations, rounding in the last digits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

_TAIL = 1e-15
"""Mass that composition may leave out; it counts as certain loss."""

_REACH = 9.5
"""Standard deviations of one step that are looked at: the mass beyond, 1e-21, counts as certain loss."""

_SMALLEST_DELTA = 1e-11
"""Below this the noise of the FFT would show."""

_MOST_CELLS = 2_000_000
_SLOPES = np.geomspace(1e-2, 1e3, 60)
"""Exponents that Chernoff's bound is tried with."""


class _Losses(NamedTuple):
    """A distribution of the privacy loss on the grid.

    Attributes:
        lowest: grid index of the first mass.
        masses: float64 [cells].
        certain: mass at infinity.
    """

    lowest: int
    masses: Vector
    certain: float


def epsilon(*, sampling_probability: float, noise_multiplier: float, steps: int, delta: float, grid: float) -> float | None:
    """Computes the epsilon of `steps` Poisson-sampled Gaussian releases under add/remove of one unit.

    Args:
        sampling_probability: in [0, 1].
        noise_multiplier: > 0, finite.
        steps: >= 1.
        delta: in (0, 1).
        grid: width of a cell of the privacy loss, > 0; 1e-4 is fine enough for 20,000 steps.

    Returns:
        epsilon >= 0, or None for parameters that are not covered.
    """
    if not (0 < sampling_probability < 1 and 0 < noise_multiplier < math.inf and steps >= 1 and _SMALLEST_DELTA <= delta < 1):
        return None
    reach = _loss(1 + _REACH * noise_multiplier, sampling_probability, noise_multiplier)
    if not (reach - math.log1p(-sampling_probability)) / grid < _MOST_CELLS:
        return None
    found = [
        _epsilon_of(composed, delta, grid)
        for one in _one_step(sampling_probability, noise_multiplier, reach, grid)
        if (composed := _composed(one, steps, grid))
    ]
    return max(found) if len(found) == 2 else None


def _loss(x: float, probability: float, noise: float) -> float:
    return float(np.logaddexp(math.log1p(-probability), math.log(probability) + (2 * x - 1) / (2 * noise**2)))


def _one_step(probability: float, noise: float, reach: float, grid: float) -> tuple[_Losses, _Losses]:
    """The loss of removing a unit, log of the mixture (1 - q) N(0, s^2) + q N(1, s^2) over N(0, s^2), and of adding one, its negative."""
    first, last = math.floor(math.log1p(-probability) / grid), math.ceil(reach / grid)
    losses = np.arange(first, last + 1, dtype=np.float64) * grid
    above = np.expm1(losses) + probability
    with np.errstate(divide="ignore", invalid="ignore"):
        places = np.where(above > 0, noise**2 * np.log(np.maximum(above, 0) / probability) + 0.5, -np.inf)
    places[0] = -np.inf
    without = _cells(places / noise)
    mixed = (1 - probability) * without + probability * _cells((places - 1) / noise)
    beyond_without = 0.5 * math.erfc(places[-1] / noise / math.sqrt(2))
    beyond_mixed = (1 - probability) * beyond_without + probability * 0.5 * math.erfc((places[-1] - 1) / noise / math.sqrt(2))
    remove = _Losses(first, _at_ends(mixed, without, losses[:-1], grid), beyond_mixed)
    masses = _at_ends(without[::-1], mixed[::-1], -losses[:0:-1], grid)
    masses[0] += beyond_without  # a loss below the grid counts as the grid's lowest
    return remove, _Losses(-last, masses, 0.0)


def _cells(places: Vector) -> Vector:
    """Mass of a standard Gaussian between neighbours, computed in the nearer tail so that small masses keep their digits."""
    scaled = (places / math.sqrt(2)).tolist()
    below = np.array([0.5 * math.erfc(-place) for place in scaled])
    beyond = np.array([0.5 * math.erfc(place) for place in scaled])
    return np.where(places[1:] < 0, np.diff(below), -np.diff(beyond))


def _at_ends(masses_P: Vector, masses_Q: Vector, low: Vector, grid: float) -> Vector:
    """Moves each cell's mass to its ends such that the masses under both P and Q stay: high + low = p, high e^-(l + grid) + low e^-l = q."""
    high = np.clip((masses_P - masses_Q * np.exp(np.minimum(low, 700.0))) / -math.expm1(-grid), 0.0, masses_P)
    ends = np.append(masses_P - high, 0.0)
    ends[1:] += high
    return ends


def _composed(one: _Losses, steps: int, grid: float) -> _Losses | None:
    """The sum of independent losses; None where its window is too large."""
    places = np.arange(one.lowest, one.lowest + len(one.masses), dtype=np.int64)
    losses = places.astype(np.float64) * grid
    highest = min(steps * (one.lowest + len(one.masses) - 1), _reached(one.masses, losses, steps, grid))
    lowest = max(steps * one.lowest, -_reached(one.masses, -losses, steps, grid))
    size = 1 << (highest - lowest).bit_length()
    if size > _MOST_CELLS:
        return None
    folded = np.bincount(places % size, weights=one.masses, minlength=size)
    power = np.fft.irfft(np.fft.rfft(folded) ** steps, size)
    masses = np.maximum(np.roll(power, -(lowest % size)), 0.0)
    return _Losses(lowest, masses, -math.expm1(steps * math.log1p(-one.certain)) + _TAIL)


def _reached(masses: Vector, losses: Vector, steps: int, grid: float) -> int:
    """Grid index beyond which at most `_TAIL` of the composed mass lies (Chernoff)."""
    there = masses > 0
    log_masses, losses = np.log(masses[there]), losses[there]
    top = float(losses.max())
    bounds = []
    for slope in _SLOPES:
        log_moment = slope * top + math.log(float(np.exp(log_masses + slope * (losses - top)).sum()))
        bounds.append((steps * log_moment - math.log(_TAIL)) / slope)
    return math.ceil(float(min(bounds)) / grid)


def _epsilon_of(losses: _Losses, delta: float, grid: float) -> float:
    """Where delta(epsilon) = certain + sum over losses l > epsilon of mass (1 - e^(epsilon - l)) crosses delta."""
    if losses.certain > delta:
        return math.inf
    start = max(0, -losses.lowest)
    at = (losses.lowest + np.arange(start, len(losses.masses))) * grid
    masses = losses.masses[start:]
    mass = np.cumsum(masses[::-1])[::-1]
    shrunk = np.cumsum((masses * np.exp(-at))[::-1])[::-1]
    enough = np.nonzero(losses.certain + mass - np.exp(np.minimum(at, 700.0)) * shrunk <= delta)[0]
    if not len(enough):
        return math.inf
    place = int(enough[0])
    left = losses.certain + float(mass[place]) - delta
    return max(0.0, math.log(left / float(shrunk[place]))) if left > 0 and shrunk[place] > 0 else float(at[place])
