"""Distributed noise: a clipped vector becomes small integers that carry their share of exact discrete Gaussian noise, so that only a noised sum is ever seen.

    clip (given) ──rotate──> flat ──quantise──> integers ──+ N_Z(0, s^2)──> mod 2^bits ── sum over clients ──> decode, rotate back

Rotation: a randomised Hadamard transform with public signs spreads every vector evenly, so that few bits suffice. A length that is no power of two takes two overlapping
transforms, of the first and of the last 2^k coordinates: each is orthogonal, so no padding is sent. A coordinate of the result is a Rademacher sum with squared weights
at most |x|^2 / 2^k, hence sub-Gaussian (Hoeffding): `Encoding.wrap_probability` is computed from that bound and from the noise.

Quantisation: floor(scale * x + u), u uniform. For two vectors that differ by g and the same u the results differ by a stochastic rounding of scale * g, whose squared norm is
at most (scale |g|)^2 + d/4 + sqrt(d L / 2) + scale |g| sqrt(2 L), L = ln(2 / beta), except with probability beta (Hoeffding on both terms). `Encoding.sensitivity` is that bound;
beta = 2^-80 a round is added to delta. So the rounding happens once for the whole sum of a client, however many units are in it.

Noise: each client adds N_Z(0, s^2) to every coordinate. For an integer shift the Renyi divergence of N_Z, subsampled or not, is the Gaussian's at every integer order:
E_{N_Z(0)}[(P_m/P_0)^j] = exp(j(j-1)m^2/2s^2) exactly, since j m is an integer; add and remove are mirrored by x -> m - x (Mironov et al. 2019, Thm 5). A sum of n is within a
factor exp(+-d tau) of one N_Z(0, n s^2), tau = 10 sum_k exp(-2 pi^2 s^2 k/(k+1)) (Kairouz et al. 2021, Thm 11): with s >= 4 that is below 1e-60 d and is added all the same.
So the event is the Gaussian's by RDP; the epsilon of a fleet is the RDP one, because the discrete profile is not the continuous PLD.

Sampling is by inversion on 64-bit words of the secret stream against the distribution function in 320-bit integers; the one word in 10^15 that falls on a border draws further
bits. The total variation distance to N_Z(0, s^2) is below 2^-180 a coordinate.

Sources: Canonne, Kamath & Steinke 2020 (discrete Gaussian); Kairouz, Liu & Steinke 2021, arXiv 2102.06387 (distributed); Suresh et al. 2017 (rotation); Andrew et al. 2021
(adaptive clipping).

Does not cover: timing of the search in the table; a client that adds no noise (it is counted among the colluders or not at all).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from discreet.keys import Stream

Integers = NDArray[np.int64]
Reals = NDArray[np.float32]

SMALLEST_STD = 4.0
LARGEST_STD = float(1 << 13)
WRAP_PROBABILITY = 2.0**-40
ROUNDING_BETA = 2.0**-80
"""Probability a round with which the rounding of a pair of neighbours exceeds the sensitivity; added to delta."""

_BITS = 320
_GUARD = 64
_BLOCK = 1 << 6
_UNIT24 = np.float32(2.0**-24)


# Rotation


def rotate(vector: Reals, signs: Stream) -> Reals:
    """Returns a randomised Hadamard transform of a vector: orthogonal, linear, the same for the same public stream.

    Args:
        vector: float32 [d], d >= 1.
        signs: public stream, the same at every client and at the server.
    """
    turned = vector.astype(np.float32, copy=True)
    for part, sign in _passes(len(turned), signs):
        turned[part] = _hadamard(turned[part] * sign)
    return turned


def rotate_back(vector: Reals, signs: Stream) -> Reals:
    """Returns the inverse of `rotate` (the transpose)."""
    turned = vector.astype(np.float32, copy=True)
    for part, sign in reversed(_passes(len(turned), signs)):
        turned[part] = _hadamard(turned[part]) * sign
    return turned


def _passes(count: int, signs: Stream) -> list[tuple[slice, Reals]]:
    """The first 2^k coordinates and the last 2^k, each with its signs; one pass where they are all."""
    if count < 1:
        raise ValueError(f"Expected a vector of length {count} >= 1.")
    size = 1 << (count.bit_length() - 1)
    parts = [slice(0, size)] if size == count else [slice(0, size), slice(count - size, count)]
    return [(part, _signs(signs.fork("signs", index), size)) for index, part in enumerate(parts)]


def _signs(stream: Stream, count: int) -> Reals:
    bits = np.unpackbits(np.frombuffer(stream.bytes((count + 7) // 8), np.uint8), count=count)
    return np.float32(1.0) - np.float32(2.0) * bits.astype(np.float32)


def _hadamard(vector: Reals) -> Reals:
    """The normalised Walsh-Hadamard transform of 2^k values, six bits of the index at a time, as small matrix products."""
    size, left = len(vector), 1
    while left < size:
        block = min(_BLOCK, size // left)
        vector = np.matmul(_matrix(block), vector.reshape(left, block, size // (left * block))).reshape(size)
        left *= block
    return vector


@lru_cache(maxsize=8)
def _matrix(size: int) -> Reals:
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / np.float32(math.sqrt(size))).astype(np.float32)


# The encoding: what is public


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Encoding:
    """Public parameters of the integers of a round; every figure that the promise needs follows from them. Built by `encode_for`.

    Attributes:
        dimension: length of the vector.
        bits: of the ring, 16 or 32.
        clients: largest number of clients in a sum.
        noisy: smallest number of clients whose noise is counted on (survivors minus colluders).
        client_norm: L2 bound of one client's vector, which honest clients keep.
        clip_norm: L2 bound of one privacy unit's contribution to it.
        noise_multiplier: standard deviation of the counted noise in units of `sensitivity`, >= 0; 0 sends no noise.
        scale: grid steps in one unit of length.
    """

    dimension: int
    bits: int
    clients: int
    noisy: int
    client_norm: float
    clip_norm: float
    noise_multiplier: float
    scale: float

    @property
    def sensitivity(self) -> float:
        """L2 distance of neighbouring integer vectors, in grid steps, except with probability `ROUNDING_BETA`."""
        length, log = self.scale * self.clip_norm, math.log(2 / ROUNDING_BETA)
        return math.sqrt(length**2 + self.dimension / 4 + math.sqrt(self.dimension * log / 2) + length * math.sqrt(2 * log))

    @property
    def local_std(self) -> float:
        """Standard deviation of each client's noise, in grid steps."""
        return self.noise_multiplier * self.sensitivity / math.sqrt(self.noisy)

    @property
    def noise_std(self) -> float:
        """Standard deviation of the counted noise on a decoded coordinate, in units of length."""
        return self.noise_multiplier * self.sensitivity / self.scale

    @property
    def overhead(self) -> float:
        """How much larger the noise is than without quantisation: 1.02 is two per cent."""
        return self.sensitivity / (self.scale * self.clip_norm)

    @property
    def wrap_probability(self) -> float:
        """Bound on the probability that any coordinate of the sum leaves the ring. A wrap spoils a value; it never harms privacy."""
        block = 1 << (self.dimension.bit_length() - 1)
        signal = self.clients * self.scale * self.client_norm / math.sqrt(block)
        # Sub-Gaussian: rotated sum, stochastic rounding of each client (range 1), noise of every client.
        variance = signal**2 + self.clients / 4 + self.clients * self.local_std**2
        limit = 2 ** (self.bits - 1) - 1
        return min(1.0, 2 * self.dimension * math.exp(-(limit**2) / (2 * variance)))

    @property
    def renyi_slack(self) -> float:
        """What the difference between a sum of discrete Gaussians and one costs, at most, at every order above 1.1 (added to each RDP value)."""
        if self.noise_multiplier == 0:
            return 0.0
        tau = 10 * (self.noisy - 1) * math.exp(-(math.pi**2) * self.local_std**2)
        return 22 * self.dimension * tau

    def to_json(self) -> dict[str, Any]:
        """Returns the parameters and what follows from them; all of it is public."""
        given = {name: getattr(self, name) for name in self.__slots__}
        return {**given, "sensitivity": self.sensitivity, "local_std": self.local_std, "wrap_probability": self.wrap_probability}


def encode_for(
    *,
    dimension: int,
    bits: int,
    clients: int,
    noisy: int,
    client_norm: float,
    clip_norm: float,
    noise_multiplier: float,
    wrap: float = WRAP_PROBABILITY,
) -> Encoding:
    """Finds the finest grid whose sums leave the ring with probability at most `wrap`.

    Args:
        dimension: >= 1.
        bits: 16 or 32.
        clients, noisy: 1 <= noisy <= clients.
        client_norm, clip_norm: 0 < clip_norm <= client_norm, finite.
        noise_multiplier: >= 0.

    Raises:
        ValueError: when a parameter breaks its rule, or no grid keeps the noise of a client between 4 and 8,192 steps within the ring.
    """
    if bits not in (16, 32) or dimension < 1 or not 1 <= noisy <= clients:
        raise ValueError(f"Expected bits={bits} of 16 or 32, dimension={dimension} >= 1 and 1 <= noisy={noisy} <= clients={clients}.")
    if not (0 < clip_norm <= client_norm < math.inf and 0 <= noise_multiplier < math.inf and 0 < wrap < 1):
        raise ValueError(f"Expected 0 < clip_norm={clip_norm} <= client_norm={client_norm}, noise_multiplier={noise_multiplier} >= 0.")

    def at(scale: float) -> Encoding:
        return Encoding(
            dimension=dimension,
            bits=bits,
            clients=clients,
            noisy=noisy,
            client_norm=client_norm,
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            scale=scale,
        )

    def fits(scale: float) -> bool:
        made = at(scale)
        return made.wrap_probability <= wrap and made.local_std <= LARGEST_STD

    low, high = 0.0, 2.0**31 / client_norm
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if low == 0.0 or (noise_multiplier > 0 and at(low).local_std < SMALLEST_STD):
        raise ValueError(
            f"Expected a ring of {bits} bits to hold the sum of {clients} clients and its noise; use 32 bits, fewer clients or less noise."
        )
    return at(low)


# Encoding a vector


def encode(vector: Reals, encoding: Encoding, *, signs: Stream, secret: Stream) -> Integers:
    """Returns the integers that a client sends: projected on the client's bound, rotated, rounded and noised.

    The projection on a ball moves no two vectors apart, so the sensitivity to one unit stays.

    Args:
        vector: float32 [dimension], the client's sum of clipped contributions; NaN or infinity makes it zero.
        signs: the public stream of the round.
        secret: the client's stream of this round, used for nothing else.

    Returns:
        int64 [dimension], to be taken modulo 2^bits.
    """
    if vector.shape != (encoding.dimension,):
        raise ValueError(f"Expected a vector of shape ({encoding.dimension},), got {vector.shape}.")
    integers = _quantised(rotate(_projected(vector, encoding.client_norm), signs), encoding.scale, secret.fork("rounding"))
    if encoding.noise_multiplier > 0:
        integers += discrete_gaussian(secret.fork("noise"), encoding.dimension, std=encoding.local_std)
    return integers


def decode(total: NDArray[np.unsignedinteger], encoding: Encoding, *, signs: Stream) -> Reals:
    """Returns the sum of the clients' vectors, noise included, from the sum of their integers modulo 2^bits.

    Args:
        total: uint16 or uint32 [dimension].
    """
    signed = total.view(np.int16 if encoding.bits == 16 else np.int32)
    return rotate_back((signed.astype(np.float64) / encoding.scale).astype(np.float32), signs)


def _projected(vector: Reals, bound: float) -> Reals:
    norm = float(np.linalg.norm(vector.astype(np.float64)))
    if not math.isfinite(norm):
        return np.zeros_like(vector)
    return vector if norm <= bound else vector * np.float32(bound / norm * (1 - 1e-6))


def _quantised(vector: Reals, scale: float, stream: Stream) -> Integers:
    """floor(scale * x + u) with u uniform on 2^24 steps of [0, 1)."""
    uniform = (np.frombuffer(stream.bytes(4 * len(vector)), "<u4") >> np.uint32(8)).astype(np.float64) * float(_UNIT24)
    return np.floor(vector.astype(np.float64) * scale + uniform).astype(np.int64)


# The discrete Gaussian


def discrete_gaussian(stream: Stream, count: int, *, std: float) -> Integers:
    """Draws independent discrete Gaussians: P(x) proportional to exp(-x^2 / 2 std^2) on the integers.

    Args:
        stream: 8 bytes of it are used for a draw, and in one draw of 10^15 more.
        count: >= 0.
        std: 0.5 to 8,192.

    Returns:
        int64 [count].

    Raises:
        ValueError: when `std` is out of range.
    """
    if not 0.5 <= std <= LARGEST_STD:
        raise ValueError(f"Expected 0.5 <= std={std} <= {LARGEST_STD}.")
    table = _table(std)
    words = np.frombuffer(stream.bytes(8 * count), "<u8")
    start = table.guide[words >> np.uint64(48)]
    index = _searched(table.words, words, start)
    for place in np.flatnonzero(table.words[np.minimum(index, len(table.words) - 1)] == words):
        index[place] = _refined(table.exact, int(words[place]), stream)
    return index - table.reach


def _searched(borders: NDArray[np.uint64], words: NDArray[np.uint64], start: NDArray[np.int32]) -> Integers:
    """The number of borders below each word. The guide is at most a few borders short, so most words are done after one or two looks."""
    index = start.astype(np.int64)
    todo = np.flatnonzero(borders[index] < words)
    for _ in range(4):
        if not len(todo):
            return index
        index[todo] += 1
        todo = todo[borders[index[todo]] < words[todo]]
    index[todo] = np.searchsorted(borders, words[todo], side="left")
    return index


@final
@dataclass(frozen=True, slots=True)
class _Table:
    """The distribution function of N_Z(0, std^2): its values at -reach, -reach + 1, ... in units of 2^-320, and their top 64 bits."""

    reach: int
    exact: tuple[int, ...]
    words: NDArray[np.uint64]
    guide: NDArray[np.int32]


@lru_cache(maxsize=4)
def _table(std: float) -> _Table:
    """Weights by exp(-(k+1)^2/2s^2) = exp(-k^2/2s^2) * r^(2k+1) in integers of 384 bits: the error after 140,000 products is below 2^-340."""
    one = 1 << (_BITS + _GUARD)
    reach = math.ceil(std * math.sqrt(2 * math.log(2) * 200)) + 2  # the tail beyond has mass below 2^-190
    ratio = _exp_fixed(std)
    weights, weight, factor, square = [one], one, ratio, ratio * ratio >> (_BITS + _GUARD)
    for _ in range(reach):
        weight = weight * factor >> (_BITS + _GUARD)
        factor = factor * square >> (_BITS + _GUARD)
        weights.append(weight)
    total = 2 * sum(weights) - one
    exact, running = [], 0
    for k in range(-reach, reach + 1):
        running += weights[abs(k)]
        exact.append((running << _BITS) // total)
    words = np.array([min(value >> (_BITS - 64), 2**64 - 1) for value in exact], np.uint64)
    guide = np.searchsorted(words, np.arange(1 << 16, dtype=np.uint64) << np.uint64(48), side="left").astype(np.int32)
    return _Table(reach, tuple(exact), words, guide)


def _exp_fixed(std: float) -> int:
    """exp(-1 / 2 std^2) in units of 2^-384, by its series in exact rationals of the float `std`."""
    numerator, denominator = std.as_integer_ratio()
    unit = 1 << (_BITS + 2 * _GUARD)
    term, total, k = unit, 0, 0
    while term:
        total += term
        k += 1
        term = -((-term if term < 0 else term) * denominator**2 // (2 * numerator**2 * k)) * (1 if term > 0 else -1)
    return total >> _GUARD


def _refined(exact: tuple[int, ...], word: int, stream: Stream) -> int:
    """Resolves a word that equals the top of a border, by 256 further bits: together 320, the precision of the table."""
    value = (word << (_BITS - 64)) | int.from_bytes(stream.bytes(32), "little")
    low, high = 0, len(exact) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if exact[middle] > value else (middle + 1, high)
    return low
