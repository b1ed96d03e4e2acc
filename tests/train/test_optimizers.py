"""What [train] may name, and an Adam that knows how large the noise is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from discreet.config import TrainSection
from discreet.dp.mechanism import calibrate
from discreet.errors import PlanInvalid
from discreet.train import optimizers
from discreet.train.optimizers import CorrectedAdam


@pytest.mark.parametrize("kind", [*sorted(optimizers._OF_TORCH), "adam_corrected"])
def test_every_optimizer_of_torch_moves_parameters_downhill(kind: str) -> None:
    parameter = nn.Parameter(torch.ones(3, 1))
    optimizer = optimizers.make([parameter], TrainSection(optimizer=kind, learning_rate=0.1), noise_std=0.5)
    for _ in range(3):
        before = parameter.detach().clone()
        parameter.grad = torch.tensor([[1.0], [-1.0], [2.0]])
        optimizer.step()
    if kind != "rprop":  # its first step has no sign to go by
        assert bool(((parameter < before) == torch.tensor([[True], [False], [True]])).all())


def test_what_looks_at_the_loss_again_or_does_not_exist_is_refused() -> None:
    assert {"adam", "adamw", "sgd", "rmsprop", "nadam"} <= set(optimizers._OF_TORCH)
    plan = calibrate(epsilon=8.0, delta=1e-3, population=100, expected_batch=10, steps=2, clip_norm=1.0)
    for name in ("lbfgs", "sparseadam", "optimizer", "adamm", "lr_scheduler"):
        with pytest.raises(PlanInvalid, match="adam_corrected, adamax"):
            optimizers.check(TrainSection(optimizer=name), plan)


def test_without_noise_it_is_adam() -> None:
    mine, theirs = (nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    corrected, adam = CorrectedAdam([mine], lr=0.01, noise_std=0.0), torch.optim.Adam([theirs], lr=0.01)
    for number in range(20):
        mine.grad, theirs.grad = (torch.linspace(-2, 3, 5).mul(number + 1).sin() for _ in range(2))
        corrected.step()
        adam.step()
    torch.testing.assert_close(mine, theirs)


def test_the_second_moment_is_that_of_the_signal() -> None:
    """Signal 1 in noise of standard deviation 3: Adam's denominator is sqrt(10), the corrected one is 1."""
    generator = torch.Generator().manual_seed(1)
    parameter = nn.Parameter(torch.zeros(2000))
    corrected = CorrectedAdam([parameter], lr=1e-3, noise_std=3.0, betas=(0.9, 0.9995))
    for _ in range(600):
        parameter.grad = 1.0 + 3.0 * torch.randn(2000, generator=generator)
        corrected.step()
    before = parameter.detach().clone()
    for _ in range(100):
        parameter.grad = 1.0 + 3.0 * torch.randn(2000, generator=generator)
        corrected.step()
    mean_step = float((before - parameter.detach()).mean()) / 100
    assert 0.9e-3 < mean_step < 1.3e-3  # Adam: 0.32e-3


def test_where_there_is_only_noise_the_floor_holds() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    parameter.grad = torch.full((1,), 1e-9)
    CorrectedAdam([parameter], lr=1.0, noise_std=2.0).step()
    assert abs(parameter.item()) < 1e-8


@pytest.mark.parametrize("changed", [{"lr": 0.0}, {"noise_std": -1.0}, {"noise_std": float("inf")}, {"betas": (0.9, 1.0)}])
def test_figures_out_of_range_are_refused(changed: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        CorrectedAdam([nn.Parameter(torch.zeros(1))], **{"lr": 0.1, "noise_std": 1.0, **changed})
