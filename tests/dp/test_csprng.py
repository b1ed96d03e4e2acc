"""The stream cipher against RFC 8439, and the samplers against their distributions.

Statistics run on fixed keys, so they cannot flake: each threshold is the quantile of a false alarm of 1e-6 for a fresh key.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from discreet.dp import csprng
from discreet.keys import Stream

FALSE_ALARM = 1e-6


def stream(number: int = 1) -> Stream:
    return Stream(number.to_bytes(32, "little"))


def test_stream_is_chacha20_of_rfc_8439() -> None:
    # RFC 8439, appendix A.1, test vectors 1 and 2: zero key and nonce, block counters 0 and 1.
    blocks = stream(0).bytes(128).hex()
    assert blocks[:128] == (
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
    )
    assert blocks[128:] == (
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )


def test_a_key_replays_its_draws_and_forks_are_independent() -> None:
    assert torch.equal(csprng.normal(stream(), (7,)), csprng.normal(stream(), (7,)))
    assert not torch.equal(csprng.normal(stream().fork("a"), (7,)), csprng.normal(stream().fork("b"), (7,)))
    used = stream()
    used.bytes(1000)
    assert torch.equal(csprng.normal(used.fork("a"), (7,)), csprng.normal(stream().fork("a"), (7,)))


def test_draws_do_not_touch_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    csprng.normal(stream(), (100,))
    csprng.bernoulli(stream(), 100, 0.5)
    assert torch.equal(before, torch.random.get_rng_state())


def test_uniform_is_the_53_high_bits() -> None:
    draws = csprng.uniform(stream(0), 2)
    words = np.frombuffer(stream(0).bytes(16), dtype="<u8")
    assert draws.tolist() == [int(word >> np.uint64(11)) / 2**53 for word in words]
    assert draws.dtype == torch.float64


def test_uniform_is_uniform() -> None:
    draws = csprng.uniform(stream(), 200_000).numpy()
    assert (draws >= 0).all()
    assert (draws < 1).all()
    assert stats.kstest(draws, "uniform").pvalue > FALSE_ALARM


def test_normal_is_standard_normal() -> None:
    draws = csprng.normal(stream(), (200_001,), dtype=torch.float64).numpy()
    n = len(draws)
    assert stats.kstest(draws, "norm").pvalue > FALSE_ALARM
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], n)
    assert low < float((draws**2).sum()) < high
    assert abs(draws.mean()) < stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(n)


def test_normal_coordinates_are_independent() -> None:
    """Box-Muller makes pairs; neither pairs nor neighbours may correlate."""
    draws = csprng.normal(stream(), (100_000,), dtype=torch.float64)
    for lag in (1, 2, 50_000):
        correlation = float((draws[:-lag] * draws[lag:]).mean())
        assert abs(correlation) < stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(len(draws) - lag)


def test_normal_spans_chunks_without_repeating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csprng, "_CHUNK", 8)
    draws = csprng.normal(stream(), (5, 9))
    assert draws.shape == (5, 9)
    assert len(draws.unique()) == 45


def test_normal_is_finite_where_the_uniform_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stream, "bytes", lambda self, count: bytes(count))
    assert csprng.normal(stream(), (4,)).isfinite().all()


def test_bernoulli_rate() -> None:
    n, probability = 200_000, 0.01
    hits = int(csprng.bernoulli(stream(), n, probability).sum())
    assert stats.binomtest(hits, n, probability).pvalue > FALSE_ALARM


def test_bernoulli_is_exact_at_the_ends_and_strict_at_the_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not csprng.bernoulli(stream(), 1000, 0.0).any()
    assert csprng.bernoulli(stream(), 1000, 1.0).all()
    monkeypatch.setattr(Stream, "bytes", lambda self, count: (2**63).to_bytes(8, "little") * (count // 8))
    assert not csprng.bernoulli(stream(), 1, 0.5).any()
    assert csprng.bernoulli(stream(), 1, 0.5 + 2**-53).all()


@pytest.mark.parametrize("probability", [-0.1, 1.1, math.nan])
def test_bernoulli_refuses(probability: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        csprng.bernoulli(stream(), 1, probability)


def test_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count"):
        csprng.uniform(stream(), -1)


def test_the_cipher_on_a_device_is_the_one_of_the_stream() -> None:
    key = bytes(range(32))
    words = csprng.keystream(key, nonce=0, num_blocks=5, device=torch.device("cpu"))
    assert words.numpy().astype("<i4").tobytes() == Stream(key).bytes(320)
    other = csprng.keystream(key, nonce=1, num_blocks=5, device=torch.device("cpu"))
    assert not torch.equal(words, other)


def test_gaussians_of_a_device_are_gaussians() -> None:
    """The code that a GPU runs, run on the CPU; the GPU itself is exercised by `test_noise_on_a_gpu`."""
    drawn = torch.cat([csprng._box_muller_on(torch.device("cpu"), bytes(32), chunk, 1 << 10) for chunk in range(10)])[:20_001].float()
    assert drawn.shape == (20_001,)
    assert stats.kstest(drawn.double().numpy(), "norm").pvalue > 1e-6
    assert len(torch.unique(drawn)) > 19_900, "no chunk repeats another"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_noise_on_a_gpu() -> None:
    device = torch.device("cuda")
    drawn = csprng.normal(Stream(bytes(32)), (1000, 300), device=device)
    assert drawn.device.type == "cuda"
    torch.testing.assert_close(
        drawn.cpu().flatten(), csprng._box_muller_on(torch.device("cpu"), Stream(bytes(32)).fork("device").bytes(32), 0, 150_000).float()
    )


@pytest.mark.parametrize(("first", "count"), [(0, 90), (1, 3), (37, 20), (63, 27), (90, 0), (0, 0)])
def test_a_part_is_what_the_whole_holds_there(monkeypatch: pytest.MonkeyPatch, first: int, count: int) -> None:
    """A shard's noise is its part of the parameter's draw, whatever the number of ranks (PITFALLS 10)."""
    monkeypatch.setattr(csprng, "_CHUNK", 8)
    whole = csprng.normal(Stream(bytes(32)), (9, 10)).flatten()
    assert torch.equal(csprng.normal_part(Stream(bytes(32)), (9, 10), first=first, count=count), whole[first : first + count])


def test_a_part_lies_in_the_whole() -> None:
    with pytest.raises(ValueError, match="first=3 <= first"):
        csprng.normal_part(Stream(bytes(32)), (5,), first=3, count=3)
