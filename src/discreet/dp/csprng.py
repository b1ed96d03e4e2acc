"""Samplers on the stream cipher of `keys.Stream`: uniform, Bernoulli and Gaussian tensors that nobody without the key can regenerate.

Why not `torch.randn`: its Mersenne Twister or Philox seed is guessable and 64 bits wide, and whoever knows the seed subtracts the noise. Here every bit comes
from ChaCha20 (RFC 8439) under a 256-bit key, so that a resumed run replays the same draws from the same key and nobody else can.

Gaussians are computed in float64 by Box-Muller (Box & Muller 1958) from 53-bit uniforms that are never zero, then cast once. Their tails end at
sqrt(2 * 53 * ln 2) = 8.57 standard deviations (true mass beyond: 1e-17, below every delta that `accounting` accepts).

Does not cover: attacks on the floating-point representation of the sum (Mironov 2012; Haney et al. 2022), side channels in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from discreet.keys import Stream

_CHUNK = 1 << 20
"""Pairs of Gaussians computed at once: bounds the float64 scratch memory to a few tens of megabytes."""

_UNIT = 2.0**-53


def uniform(stream: Stream, count: int) -> torch.Tensor:
    """Draws independent uniforms on the 2^53 multiples of 2^-53 in [0, 1).

    Args:
        stream: the source of bits; 8 bytes of it are used for each draw.
        count: number of draws, >= 0.

    Returns:
        float64 [count].
    """
    return torch.from_numpy(_integers(stream, count).astype(np.float64) * _UNIT)


def bernoulli(stream: Stream, count: int, probability: float) -> torch.Tensor:
    """Draws independent coins, each True with the given probability to within 2^-53.

    Args:
        probability: in [0, 1]; 0 and 1 are exact.

    Returns:
        bool [count].

    Raises:
        ValueError: when the probability is NaN or outside [0, 1].
    """
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"Expected 0 <= probability={probability} <= 1.")
    return uniform(stream, count) < probability


def normal(stream: Stream, shape: Sequence[int], *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Draws independent standard Gaussians, computed in float64 and cast to `dtype`.

    Args:
        shape: shape of the result, each dimension >= 0.

    Returns:
        `dtype` [*shape].
    """
    count = math.prod(shape)
    values = torch.empty(count, dtype=dtype)
    for start in range(0, count, 2 * _CHUNK):
        part = values[start : start + 2 * _CHUNK]
        part.copy_(_box_muller(stream, (len(part) + 1) // 2)[: len(part)])
    return values.reshape(tuple(shape))


def _integers(stream: Stream, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Uniform integers in [0, 2^53)."""
    if count < 0:
        raise ValueError(f"Expected count={count} >= 0.")
    return np.frombuffer(stream.bytes(8 * count), dtype="<u8") >> np.uint64(11)


def _box_muller(stream: Stream, pairs: int) -> torch.Tensor:
    """float64 [2 * pairs] standard Gaussians; the radius takes its uniform from (0, 1], so its logarithm is finite."""
    radius_uniform, angle_uniform = uniform(stream, 2 * pairs).view(2, pairs)
    radius = (radius_uniform + _UNIT).log_().mul_(-2.0).sqrt_()
    angle = angle_uniform.mul_(2.0 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])
