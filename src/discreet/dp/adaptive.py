"""A clip norm that follows a quantile of the units' norms, at a declared price: votes of a ClippedSum -> noised fraction -> the next step's clip norm.

Each unit votes +1/2 where its norm is within the clip norm and -1/2 where it is not, so that one unit moves the sum of votes by exactly 1/2. The sum is noised with
`votes_multiplier` and moves the clip norm geometrically: C <- C exp(-rate * (fraction - quantile)).

Guarantees: gradients and votes of one step come from one sample, and together are one Gaussian mechanism of noise multiplier `joint_multiplier`: that figure, not the
gradient's own, is what the accountant must be given (Opacus once gave it the other: #807).

Source: Andrew et al. 2021, "Differentially Private Learning with Adaptive Clipping" (arXiv 1905.03871), theorem 1.

Does not cover: a different clip norm for each group.
"""

from __future__ import annotations

import math

from discreet.dp import csprng
from discreet.dp.clipping import ClippedSum
from discreet.keys import Stream


def joint_multiplier(*, noise_multiplier: float, votes_multiplier: float) -> float:
    """Gives the noise multiplier to account for a step that releases both its gradient and its votes.

    Args:
        noise_multiplier: standard deviation of the gradient's noise in clip norms, > 0.
        votes_multiplier: standard deviation of the votes' noise, > 0; the sensitivity of the votes is 1/2.

    Returns:
        (noise_multiplier^-2 + (2 votes_multiplier)^-2)^(-1/2), below both.

    Raises:
        ValueError: when one of them is not positive and finite.
    """
    _check_positive(noise_multiplier=noise_multiplier, votes_multiplier=votes_multiplier)
    return 1 / math.hypot(1 / noise_multiplier, 1 / (2 * votes_multiplier))


def update(clipped: ClippedSum, *, quantile: float, rate: float, votes_multiplier: float, expected_batch: float, key: Stream) -> float:
    """Gives the clip norm of the next step.

    Args:
        clipped: the sum over all micro-batches of this step.
        quantile: the share of units that should lie within the clip norm, in (0, 1).
        rate: > 0; 0.2 is usual.
        votes_multiplier: standard deviation of the noise on the votes, > 0; accounted by `joint_multiplier`.
        expected_batch: public expected number of units in a step, > 0; never the realised one.
        key: this step's stream.

    Returns:
        a positive number that may be published.

    Raises:
        TypeError: when the first argument is not a `ClippedSum`.
        ValueError: when a figure is out of range.
    """
    if not isinstance(clipped, ClippedSum):
        raise TypeError(f"Expected a ClippedSum, got {type(clipped).__name__}.")
    _check_positive(rate=rate, votes_multiplier=votes_multiplier, expected_batch=expected_batch)
    if not 0.0 < quantile < 1.0:
        raise ValueError(f"Expected 0 < quantile={quantile} < 1.")
    noise = float(csprng.normal(key.fork("votes"), (1,))) * votes_multiplier
    fraction = (clipped.votes + noise) / expected_batch + 0.5
    return moved(clipped.clip_norm, fraction=fraction, quantile=quantile, rate=rate)


def moved(clip_norm: float, *, fraction: float, quantile: float, rate: float) -> float:
    """Moves a clip norm against the noised fraction: up when fewer than `quantile` are within it, down when more are (algorithm 1).

    Args:
        clip_norm: of this step, > 0.
        fraction: noised share of units, or of clients, whose norm was at most `clip_norm`; beyond [0, 1] it is cut.
        quantile: the share that should be within, in (0, 1); 0.5 is the median.
        rate: > 0.

    Raises:
        ValueError: when a figure is out of range.
    """
    _check_positive(clip_norm=clip_norm, rate=rate)
    if not 0.0 < quantile < 1.0 or math.isnan(fraction):
        raise ValueError(f"Expected 0 < quantile={quantile} < 1 and a fraction that is a number.")
    return clip_norm * math.exp(-rate * (min(1.0, max(0.0, fraction)) - quantile))


def _check_positive(**figures: float) -> None:
    for name, value in figures.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"Expected a finite {name}={value} > 0.")
