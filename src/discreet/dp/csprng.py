"""Samplers on the stream cipher of `keys.Stream`: uniform, Bernoulli, Gaussian and Laplace tensors that nobody without the key can regenerate.

Why not `torch.randn`: its Mersenne Twister or Philox seed is guessable and 64 bits wide, and whoever knows the seed subtracts the noise. Here every bit comes
from ChaCha20 (RFC 8439) under a 256-bit key, so that a resumed run replays the same draws from the same key and nobody else can.

On another device than the CPU the same cipher runs there, on tensors of 32-bit words, a block for every value of its counter, under a key that the stream gives: noise
does not cross the bus. Those draws are as secret and have the same distribution, but are not the CPU's: a run resumes to the bit on the kind of device it began on.

Gaussians are computed in float64 by Box-Muller (Box & Muller 1958) from 53-bit uniforms that are never zero, then cast once. Their tails end at
sqrt(2 * 53 * ln 2) = 8.57 standard deviations (true mass beyond: 1e-17, below every delta that `accounting` accepts).

Does not cover: attacks on the floating-point representation of the sum (Mironov 2012; Haney et al. 2022), side channels in time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from discreet.keys import KEY_BYTES, Stream

_CHUNK = 1 << 20
"""Pairs of Gaussians computed at once: bounds the float64 scratch memory to a few tens of megabytes."""

_UNIT = 2.0**-53
_CPU = torch.device("cpu")
_WORDS_A_BLOCK = 16


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


def normal(stream: Stream, shape: Sequence[int], *, dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> torch.Tensor:
    """Draws independent standard Gaussians, computed in float64 and cast to `dtype`.

    Args:
        shape: shape of the result, each dimension >= 0.
        device: where they are drawn and stay.

    Returns:
        `dtype` [*shape].
    """
    return normal_part(stream, shape, first=0, count=math.prod(shape), dtype=dtype, device=device).reshape(tuple(shape))


def normal_part(
    stream: Stream, shape: Sequence[int], *, first: int, count: int, dtype: torch.dtype = torch.float32, device: torch.device = _CPU
) -> torch.Tensor:
    """Draws a part of what `normal` draws for the whole shape: for a rank that holds a shard. Only chunks that the part touches are computed.

    Args:
        shape: of the whole.
        first, count: the part in the flattened whole.

    Returns:
        `dtype` [count].

    Raises:
        ValueError: when the part does not lie in the whole.
    """
    whole = math.prod(shape)
    if not 0 <= first <= first + count <= whole:
        raise ValueError(f"Expected 0 <= first={first} <= first + count={first + count} <= {whole}.")
    key = stream.fork("device").bytes(KEY_BYTES) if device.type != "cpu" else b""
    values = torch.empty(count, dtype=dtype, device=device)
    for chunk, start in enumerate(range(0, whole, 2 * _CHUNK)):
        stop = min(start + 2 * _CHUNK, whole)
        pairs = (stop - start + 1) // 2
        low, high = max(start, first), min(stop, first + count)
        if low < high:
            drawn = _box_muller_on(device, key, chunk, pairs) if key else _box_muller(stream, pairs)
            values[low - first : high - first] = drawn[low - start : high - start]
        elif not key and start < first:
            stream.bytes(16 * pairs)  # the cipher alone: what another rank draws
    return values


def laplace(stream: Stream, count: int) -> torch.Tensor:
    """Draws independent standard Laplace numbers, each the difference of two exponentials; they end at 36.7.

    Returns:
        float64 [count].
    """
    logarithms = (uniform(stream, 2 * count).view(2, count) + _UNIT).log_()
    return logarithms[1] - logarithms[0]


def _integers(stream: Stream, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Uniform integers in [0, 2^53)."""
    if count < 0:
        raise ValueError(f"Expected count={count} >= 0.")
    return np.frombuffer(stream.bytes(8 * count), dtype="<u8") >> np.uint64(11)


def _box_muller(stream: Stream, pairs: int) -> torch.Tensor:
    """float64 [2 * pairs] standard Gaussians; the radius takes its uniform from (0, 1], so its logarithm is finite."""
    return _gaussians(uniform(stream, 2 * pairs).view(2, pairs))


def _gaussians(uniforms: torch.Tensor) -> torch.Tensor:
    radius_uniform, angle_uniform = uniforms
    radius = (radius_uniform + _UNIT).log_().mul_(-2.0).sqrt_()
    angle = angle_uniform.mul_(2.0 * math.pi)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])


# The same on another device


def _box_muller_on(device: torch.device, key: bytes, chunk: int, pairs: int) -> torch.Tensor:
    """As `_box_muller` from the cipher run on `device`; each chunk has a nonce of its own, so no counter wraps."""
    words = keystream(key, nonce=chunk, num_blocks=-(-4 * pairs // _WORDS_A_BLOCK), device=device).view(-1, 2)[: 2 * pairs]
    integers = ((words[:, 1].long() & 0xFFFFFFFF) << 21) | ((words[:, 0].long() & 0xFFFFFFFF) >> 11)
    return _gaussians((integers.double() * _UNIT).view(2, pairs))


def keystream(key: bytes, *, nonce: int, num_blocks: int, device: torch.device) -> torch.Tensor:
    """Computes ChaCha20 (RFC 8439, 2.3) on a device, all blocks at once.

    Args:
        key: 32 bytes.
        nonce: first word of the nonce, in [0, 2^31); the other two are 0.
        num_blocks: counters from 0, at most 2^31.

    Returns:
        int32 [16 * num_blocks]: the words of the key stream, little-endian.
    """
    head = np.frombuffer(b"expand 32-byte k" + key, dtype="<i4").tolist()
    start = torch.zeros(_WORDS_A_BLOCK, num_blocks, dtype=torch.int32, device=device)
    start[:12] = torch.tensor(head, dtype=torch.int32, device=device)[:, None]
    start[12] = torch.arange(num_blocks, dtype=torch.int32, device=device)
    start[13] = nonce
    a, b, c, d = start.clone().view(4, 4, num_blocks)
    for _ in range(10):
        a, b, c, d = _quarter_rounds(a, b, c, d)
        a, b, c, d = _quarter_rounds(a, b.roll(-1, 0), c.roll(-2, 0), d.roll(-3, 0))
        b, c, d = b.roll(1, 0), c.roll(2, 0), d.roll(3, 0)
    return (torch.cat([a, b, c, d]) + start).T.flatten()


def _quarter_rounds(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four quarter rounds at once, one a row; 32-bit additions wrap."""
    a = a + b
    d = _rotated(d ^ a, 16)
    c = c + d
    b = _rotated(b ^ c, 12)
    a = a + b
    d = _rotated(d ^ a, 8)
    c = c + d
    return a, _rotated(b ^ c, 7), c, d


def _rotated(x: torch.Tensor, bits: int) -> torch.Tensor:
    """Rotates to the left; the right shift of a signed word brings in its sign, which the mask takes away."""
    return (x << bits) | ((x >> (32 - bits)) & ((1 << bits) - 1))
