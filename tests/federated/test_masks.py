"""Mask expansion against AES-CTR itself, shares at t-1, t, t+1, agreement that depends on every input."""

from __future__ import annotations

import contextlib
import hashlib
import itertools

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.errors import PeerRefused
from discreet.federated import masks
from discreet.keys import Stream


def stream(name: str = "") -> Stream:
    return Stream(hashlib.sha256(name.encode()).digest())


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("count", [1, 7, 131_072, 131_073, 300_001])
def test_a_mask_is_the_keystream_of_aes_256_in_counter_mode(bits: int, count: int) -> None:
    word, seed = masks.WORD[bits], hashlib.sha256(b"seed").digest()
    total = np.zeros(count, word)
    masks.add_mask(total, seed, sign=1)
    expected = Cipher(AES256(seed), CTR(bytes(16))).encryptor().update(bytes(count * word.itemsize))
    assert total.tobytes() == expected
    masks.add_mask(total, seed, sign=-1)
    assert not total.any()


def test_all_256_bits_of_a_seed_count() -> None:
    """Flipping any bit gives another mask: no folding into a smaller state (PITFALLS 33)."""
    seed = bytes(32)
    seen = set()
    for bit in range(256):
        total = np.zeros(16, masks.WORD[32])
        masks.add_mask(total, (int.from_bytes(seed, "little") ^ (1 << bit)).to_bytes(32, "little"), sign=1)
        seen.add(total.tobytes())
    assert len(seen) == 256


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.integers(1, 9), st.data())
def test_any_threshold_of_the_shares_give_the_secret_and_one_fewer_does_not(secret: bytes, count: int, data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, count))
    shares = masks.split(secret, threshold=threshold, points=range(1, count + 1), stream=stream("split"))
    for size in {threshold - 1, threshold, min(threshold + 1, count)} - {0}:
        points = data.draw(st.permutations(range(1, count + 1)))[:size]
        chosen, weights = [shares[p - 1] for p in points], masks.weights(points)
        if size >= threshold:
            assert masks.combine(chosen, weights) == secret
        else:
            with contextlib.suppress(PeerRefused):
                assert masks.combine(chosen, weights) != secret


def test_one_share_below_the_threshold_fits_every_secret() -> None:
    """Perfect secrecy, shown: t-1 shares of one secret are completed by some share to any other secret."""
    shares = masks.split(bytes(32), threshold=3, points=(1, 2, 3), stream=stream())
    weights = masks.weights([1, 2, 3])
    wanted = int.from_bytes(b"\x07" * 32, "little")
    known = sum(int.from_bytes(share, "little") * weight for share, weight in zip(shares[:2], weights[:2], strict=True))
    third = (wanted - known) * pow(weights[2], -1, masks._PRIME) % masks._PRIME
    assert masks.combine([*shares[:2], third.to_bytes(33, "little")], weights) == b"\x07" * 32


def test_agreement_is_mutual_and_depends_on_terms_and_purpose() -> None:
    mine, theirs = masks.RoundKeys.draw(stream("a")), masks.RoundKeys.draw(stream("b"))
    public = [key.mask.public_key().public_bytes_raw() for key in (mine, theirs)]
    terms = [hashlib.sha256(name).digest() for name in (b"1", b"2")]
    seeds = {masks.agree(mine.mask, public[1], terms=t, purpose=p) for t, p in itertools.product(terms, ("mask", "shares"))}
    assert len(seeds) == 4
    assert masks.agree(theirs.mask, public[0], terms=terms[0], purpose="mask") in seeds
    with pytest.raises(PeerRefused):
        masks.agree(mine.mask, bytes(32), terms=terms[0], purpose="mask")
    assert repr(mine) == "<round keys>"


def test_sealed_shares_open_only_in_their_context() -> None:
    sealed = masks.seal_shares(bytes(32), b"x" * 66, context=b"a>b")
    assert masks.open_shares(bytes(32), sealed, context=b"a>b") == b"x" * 66
    with pytest.raises(PeerRefused):
        masks.open_shares(bytes(32), sealed, context=b"b>a")


def test_bad_parameters_are_refused() -> None:
    for threshold, points in ((0, (1, 2)), (1, (0,)), (1, ((1 << 16) + 1,))):
        with pytest.raises(ValueError, match="threshold"):
            masks.split(bytes(32), threshold=threshold, points=points, stream=stream())
    with pytest.raises(ValueError, match="distinct"):
        masks.weights([1, 1])
    assert not masks.is_share(b"\xff" * 33)
