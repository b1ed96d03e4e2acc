"""The quantile that a clip norm follows, and what following it costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from discreet.dp import adaptive
from discreet.dp.clipping import ClippedSum, clipped_sum
from discreet.keys import Key

KEY = Key(bytes(32))


def given_gradients(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).squeeze(1)


def test_the_clip_norm_finds_the_quantile() -> None:
    model, clip_norm = nn.Linear(1, 1, bias=False), 50.0
    norms = torch.linspace(0.0, 10.0, 200)[:, None]
    for step in range(80):
        clipped = clipped_sum(model, given_gradients, norms, list(range(200)), clip_norm=clip_norm)
        clip_norm = adaptive.update(clipped, quantile=0.7, rate=0.3, votes_multiplier=2.0, expected_batch=200, key=KEY.stream("noise", step))
    assert clip_norm == pytest.approx(7.0, rel=0.1)


def test_the_joint_price_is_that_of_one_gaussian() -> None:
    """Two Gaussians on one sample compose to mu^2 = mu_1^2 + mu_2^2 (Dong et al. 2019, corollary 3.3); leaving the votes out would be Opacus #807."""
    joint = adaptive.joint_multiplier(noise_multiplier=1.0, votes_multiplier=5.0)
    assert 1 / joint**2 == pytest.approx(1.0 + (0.5 / 5.0) ** 2)
    assert joint < 1.0


@pytest.mark.parametrize("changed", [{"quantile": 0.0}, {"quantile": 1.0}, {"rate": 0.0}, {"votes_multiplier": 0.0}, {"expected_batch": math.nan}])
def test_figures_out_of_range_are_refused(changed: dict[str, float]) -> None:
    clipped = ClippedSum.zero(nn.Linear(1, 1), clip_norm=1.0)
    figures = {"quantile": 0.5, "rate": 0.2, "votes_multiplier": 1.0, "expected_batch": 10.0, **changed}
    with pytest.raises(ValueError, match=next(iter(changed))):
        adaptive.update(clipped, **figures, key=KEY.stream("noise", 1))


def test_only_a_clipped_sum_has_votes() -> None:
    with pytest.raises(TypeError, match="ClippedSum"):
        adaptive.update({}, quantile=0.5, rate=0.2, votes_multiplier=1.0, expected_batch=10.0, key=KEY.stream("noise", 1))  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [0.1, 3.0])
def test_adaptive_clipping_finds_the_median_from_below_and_from_above(start: float) -> None:
    """The sign that a published system has reversed: from 0.1 it fell to 2.5e-4, from 3.0 it rose to 1210."""
    norms, clip = torch.linspace(0.6, 1.6, 101), start
    for _ in range(60):
        clip = adaptive.moved(clip, fraction=float((norms <= clip).float().mean()), quantile=0.5, rate=0.2)
    assert clip == pytest.approx(float(norms.median()), rel=0.06)
    with pytest.raises(ValueError, match="quantile"):
        adaptive.moved(1.0, fraction=0.5, quantile=1.0, rate=0.2)
