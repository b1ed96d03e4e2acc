"""The one noise draw: scale, precision, independence, replay, and what it refuses. Fixed keys; false-alarm rate 1e-6 for a fresh one."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn

from discreet.dp import noise
from discreet.dp.clipping import ClippedSum
from discreet.keys import Stream

FALSE_ALARM = 1e-6


def stream(number: int = 1) -> Stream:
    return Stream(number.to_bytes(32, "little"))


def zero(clip_norm: float = 0.25, dtype: torch.dtype = torch.float32) -> ClippedSum:
    model = nn.ModuleDict({"a": nn.Linear(200, 300, bias=False), "b": nn.Linear(200, 300, bias=False)}).to(dtype)
    return ClippedSum.zero(model, clip_norm=clip_norm)


def test_standard_deviation_is_noise_multiplier_times_clip_norm() -> None:
    noised = noise.add(zero(0.25), noise_multiplier=3.0, key=stream())
    assert noised.noise_std == 0.75
    draws = torch.cat([gradient.flatten() for gradient in noised.gradients.values()]).double()
    low, high = stats.chi2.ppf([FALSE_ALARM / 2, 1 - FALSE_ALARM / 2], len(draws))
    assert low < float((draws / 0.75).square().sum()) < high
    assert stats.kstest(draws.numpy() / 0.75, "norm").pvalue > FALSE_ALARM


def test_parameters_draw_independently() -> None:
    gradients = noise.add(zero(), noise_multiplier=1.0, key=stream()).gradients
    a, b = gradients["a.weight"].flatten().double(), gradients["b.weight"].flatten().double()
    correlation = float((a * b).mean() / (a.std() * b.std()))
    assert abs(correlation) < stats.norm.isf(FALSE_ALARM / 2) / math.sqrt(len(a))


def test_noise_is_added_to_the_sum_and_replayed() -> None:
    clipped = zero()
    shifted = ClippedSum(gradients={name: gradient + 5 for name, gradient in clipped.gradients.items()}, clip_norm=clipped.clip_norm)
    one, two = (noise.add(value, noise_multiplier=1.0, key=stream()).gradients["a.weight"] for value in (clipped, shifted))
    torch.testing.assert_close(two - one, torch.full_like(one, 5.0), atol=1e-6, rtol=0)
    again = noise.add(clipped, noise_multiplier=1.0, key=stream()).gradients["a.weight"]
    assert torch.equal(one, again)
    assert not torch.equal(one, noise.add(clipped, noise_multiplier=1.0, key=stream(2)).gradients["a.weight"])


def test_noise_is_float32_for_a_bfloat16_model() -> None:
    gradient = noise.add(zero(dtype=torch.bfloat16), noise_multiplier=1.0, key=stream()).gradients["a.weight"]
    assert gradient.dtype == torch.float32
    assert not torch.equal(gradient, gradient.bfloat16().float())


def test_zero_noise_changes_nothing() -> None:
    assert noise.add(zero(), noise_multiplier=0.0, key=stream()).gradients["a.weight"].eq(0).all()


@pytest.mark.parametrize("noise_multiplier", [-1.0, math.nan, math.inf])
def test_bad_noise_multiplier_is_refused(noise_multiplier: float) -> None:
    with pytest.raises(ValueError, match="noise_multiplier"):
        noise.add(zero(), noise_multiplier=noise_multiplier, key=stream())


def test_only_a_clipped_sum_is_noised() -> None:
    with pytest.raises(TypeError, match="ClippedSum"):
        noise.add({"w": torch.zeros(3)}, noise_multiplier=1.0, key=stream())  # type: ignore[arg-type]  # the point of the test
