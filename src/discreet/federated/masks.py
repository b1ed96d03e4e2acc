"""The primitives of secure aggregation: key agreement, mask expansion, secret shares, and their encryption on the way.

    X25519 pair ──HKDF(terms)──> 256-bit seed ──AES-256-CTR──> one mask word for each coordinate, added in the ring Z_2^bits
    32-byte secret ──Shamir over GF(2^256 + 297)──> one share for each peer ──AES-256-GCM──> only that peer reads it

Every derivation takes the digest of the round's terms (protocol, session, round, roster, model) as salt: keys of two rounds, or of two clients that were shown
different terms, never agree. A seed keeps all its 256 bits and expands one mask only, so the counter of AES-CTR starts at zero without a nonce (PITFALLS 33).

Guarantees: fewer than `threshold` shares say nothing about the secret (Shamir 1979); a share that was changed or sent to another peer does not open.

Sources: Bonawitz et al. 2017 (masks, shares); RFC 7748, RFC 5869, NIST SP 800-38A and 38D.

Does not cover: timing of the big-integer arithmetic of shares, which runs on the device of the secret's owner and on the server that is to learn the sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from discreet.errors import PeerRefused
from discreet.keys import Stream

PROTOCOL = b"discreet secagg/1"
SECRET_BYTES = 32
SHARE_BYTES = 33
_PRIME = 2**256 + 297
_FIELD_BYTES = 48
"""Random coefficients are 48 bytes modulo the prime: within 2^-127 of uniform."""

_LAZY = 16
"""Steps of Horner's rule between two reductions."""

_CHUNK = 1 << 18
"""Bytes of keystream at once: what fits the cache is added before it leaves it."""

_ZERO_NONCE = bytes(12)

Words = NDArray[np.unsignedinteger]
WORD: dict[int, np.dtype[Any]] = {16: np.dtype("<u2"), 32: np.dtype("<u4")}
"""Bits of the ring -> its little-endian word: the wire carries exactly these words."""


@final
@dataclass(frozen=True, slots=True)
class RoundKeys:
    """A client's secrets of one round: two X25519 keys and the seed of its own mask. Prints nothing of them."""

    cipher: X25519PrivateKey
    mask: X25519PrivateKey
    own_seed: bytes

    def __repr__(self) -> str:
        return "<round keys>"

    @staticmethod
    def draw(stream: Stream) -> RoundKeys:
        """Draws fresh keys; the stream is forked by session, round and terms, and used for nothing else."""
        return RoundKeys(
            X25519PrivateKey.from_private_bytes(stream.bytes(SECRET_BYTES)),
            X25519PrivateKey.from_private_bytes(stream.bytes(SECRET_BYTES)),
            stream.bytes(SECRET_BYTES),
        )


def agree(private: X25519PrivateKey, public: bytes, *, terms: bytes, purpose: str) -> bytes:
    """Returns the 32-byte key that two peers share for one purpose in one round.

    Args:
        public: the peer's X25519 key, 32 bytes.
        terms: digest of the round's terms, 32 bytes.

    Raises:
        PeerRefused: when the peer's key is not one of 32 bytes, or of small order.
    """
    return derive(exchange(private, public), terms=terms, purpose=purpose)


def exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    """Returns the raw X25519 secret, from which only `derive` makes keys. Raises as `agree`."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:
        raise PeerRefused("an X25519 key that agrees on a secret") from None


def derive(secret: bytes, *, terms: bytes, purpose: str) -> bytes:
    """Returns the key of one purpose and one round from an X25519 secret."""
    return HKDF(SHA256(), SECRET_BYTES, terms, PROTOCOL + b" " + purpose.encode()).derive(secret)


def add_mask(total: Words, seed: bytes, *, sign: int) -> None:
    """Adds the mask of a seed to a vector of ring words, in place, a chunk at a time.

    Args:
        total: uint16 or uint32 [d], contiguous.
        seed: 32 bytes, used for this mask only.
        sign: +1 or -1.
    """
    keystream = Cipher(AES256(seed), CTR(bytes(16))).encryptor()
    step = _CHUNK // total.itemsize
    zeros, scratch = bytes(step * total.itemsize), bytearray(step * total.itemsize + 15)
    operation = np.add if sign > 0 else np.subtract
    for start in range(0, len(total), step):
        part = total[start : start + step]
        keystream.update_into(zeros[: part.nbytes], scratch)
        operation(part, np.frombuffer(scratch, total.dtype, len(part)), out=part)


def split(secret: bytes, *, threshold: int, points: Sequence[int], stream: Stream) -> list[bytes]:
    """Splits a secret into shares, any `threshold` of which give it back.

    Args:
        secret: 32 bytes.
        threshold: >= 1.
        points: distinct, 1 to 2^16: of the shares that are wanted; the same stream gives shares of the same polynomial.
        stream: the source of the polynomial, used for nothing else.

    Returns:
        one share of 33 bytes for each point.
    """
    if len(secret) != SECRET_BYTES or threshold < 1 or not all(1 <= point <= 1 << 16 for point in points):
        raise ValueError(f"Expected a secret of {SECRET_BYTES} bytes, threshold={threshold} >= 1 and points of 1 to 65536.")
    random = stream.bytes(_FIELD_BYTES * (threshold - 1))
    higher = [int.from_bytes(random[i : i + _FIELD_BYTES], "little") % _PRIME for i in range(0, len(random), _FIELD_BYTES)]
    coefficients = [*higher, int.from_bytes(secret, "little")]
    return [_evaluate(coefficients, point).to_bytes(SHARE_BYTES, "little") for point in points]


def weights(points: Sequence[int]) -> list[int]:
    """Returns the Lagrange weights at zero of distinct points >= 1: computed once, they combine every secret that was shared among the same peers."""
    if len(set(points)) != len(points) or min(points, default=0) < 1:
        raise ValueError("Expected distinct points >= 1.")
    result = []
    for point in points:
        above, below = 1, 1
        for other in points:
            if other != point:
                above, below = above * other % _PRIME, below * (other - point) % _PRIME
        result.append(above * pow(below, -1, _PRIME) % _PRIME)
    return result


def combine(shares: Sequence[bytes], weights: Sequence[int]) -> bytes:
    """Returns the secret of at least `threshold` shares, given the weights of their points.

    Raises:
        PeerRefused: when the shares are not those of one secret of 32 bytes (the caller also checks the secret against what was published of it).
    """
    total = sum(int.from_bytes(share, "little") * weight for share, weight in zip(shares, weights, strict=True)) % _PRIME
    if total >= 1 << (8 * SECRET_BYTES):
        raise PeerRefused("shares that combine to a secret of 32 bytes")
    return total.to_bytes(SECRET_BYTES, "little")


def is_share(share: bytes) -> bool:
    """Whether these bytes are an element of the field."""
    return len(share) == SHARE_BYTES and int.from_bytes(share, "little") < _PRIME


def seal_shares(key: bytes, shares: bytes, *, context: bytes) -> bytes:
    """Returns the AES-256-GCM ciphertext of shares on their way to one peer. The key serves one message (pair, direction, round), so the nonce is zero."""
    return AESGCM(key).encrypt(_ZERO_NONCE, shares, context)


def open_shares(key: bytes, sealed: bytes, *, context: bytes) -> bytes:
    """Returns what `seal_shares` sealed.

    Raises:
        PeerRefused: when it was sealed by another peer, for another one, under other terms or for another cohort, or was changed.
    """
    try:
        return AESGCM(key).decrypt(_ZERO_NONCE, sealed, context)
    except InvalidTag:
        raise PeerRefused("shares that this peer sealed for this client in this round") from None


def total_mask(total: Words, *, own_seed: bytes, pair_seeds: Mapping[str, bytes], name: str) -> None:
    """Adds a client's own mask and its mask with every peer, in place: of two peers the one whose name sorts first adds, the other subtracts."""
    add_mask(total, own_seed, sign=1)
    for peer, seed in pair_seeds.items():
        add_mask(total, seed, sign=pair_sign(name, peer))


def pair_sign(name: str, peer: str) -> int:
    """The sign with which `name` adds the mask it shares with `peer`."""
    return 1 if name < peer else -1


def _evaluate(coefficients: Sequence[int], point: int) -> int:
    """Horner's rule; the last coefficient is the constant, the secret. Reduced now and then only: a point has 17 bits, so the value stays small for a while."""
    value = 0
    for start in range(0, len(coefficients), _LAZY):
        for coefficient in coefficients[start : start + _LAZY]:
            value = value * point + coefficient
        value %= _PRIME
    return value
