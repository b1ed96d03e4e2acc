"""The optimisers that [train] may name: those of torch.optim in lower case, and one of ours; each is post-processing of a noised gradient and must stay that.

What asks for the loss again (LBFGS) or for sparse gradients is left out: the loss is private, and noise is nowhere zero.

Adam under differential privacy sees the noise twice: the second moment of a noised mean is too large by the noise's variance, which is public. Where the noise is
stronger than the signal, as it is in almost every coordinate, all second moments are nearly that variance and Adam becomes SGD. `CorrectedAdam` subtracts it.

Guarantees: nothing here reads anything but gradients that are noised and figures of the plan; state is kept under torch's own names, so checkpoints hold it.

Source: Tang, Shpilevskiy & Lecuyer 2024, "DP-AdamBC" (arXiv 2312.14334), algorithm 1; Kingma & Ba 2015. The floor as a share of the noise's variance is ours.

Does not cover: the correction under correlated noise or a moving clip norm, whose variance is another at each step (refused).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor, nn

from discreet.config import TrainSection
from discreet.dp.mechanism import Plan
from discreet.errors import PlanInvalid

_CORRECTED = "adam_corrected"
_LEFT_OUT = {"optimizer", "lbfgs", "sparseadam"}
_OF_TORCH = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer) and name.lower() not in _LEFT_OUT
}
_MOMENTUM = 0.9
_FLOOR = 0.1
"""Least second moment left after the correction, as a share of the noise's variance: a step is at most sqrt(10) times the one that pure noise would make."""


def make(parameters: Iterable[nn.Parameter], section: TrainSection, *, noise_std: float) -> torch.optim.Optimizer:
    """Makes the declared optimiser.

    Args:
        noise_std: standard deviation of the noise on each coordinate of the mean gradient (`Plan.noise_std_of_mean`); 0 without privacy.

    Raises:
        PlanInvalid: when there is no such optimiser.
    """
    rate, trained = section.learning_rate, list(parameters)
    if section.optimizer == _CORRECTED:
        return CorrectedAdam(trained, lr=rate, noise_std=noise_std)
    kind, more = _kind(section.optimizer), {"momentum": _MOMENTUM} if section.optimizer == "sgd" else {}
    made: torch.optim.Optimizer = kind(trained, lr=rate, **more)
    return made


def check(section: TrainSection, plan: Plan) -> None:
    """Refuses, before anything is spent, an optimiser that does not exist or does not go with the plan.

    Raises:
        PlanInvalid: when the name is not known, or the correction of the second moment has no one variance to take out.
    """
    if section.optimizer != _CORRECTED:
        _kind(section.optimizer)
    elif plan.bands or plan.adaptive:
        raise PlanInvalid(
            "an optimiser other than adam_corrected with bands or clip_quantile",
            value=section.optimizer,
            remedy="The variance of the noise is another at each step: choose adam or sgd.",
        )


def _kind(name: str) -> Any:
    if name not in _OF_TORCH:
        raise PlanInvalid("[train] optimizer out of " + ", ".join(sorted({*_OF_TORCH, _CORRECTED})), value=name)
    return _OF_TORCH[name]


@final
class CorrectedAdam(torch.optim.Optimizer):
    """Adam whose second moment is corrected for the noise: x -= lr * m / (sqrt(max(v - std^2, 0.1 std^2)) + eps), m and v free of their bias towards zero."""

    def __init__(
        self, params: Iterable[nn.Parameter], *, lr: float, noise_std: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
    ) -> None:
        """Keeps what a step needs.

        Args:
            lr: > 0.
            noise_std: standard deviation of the noise on each coordinate of a gradient, >= 0; with 0 this is Adam.

        Raises:
            ValueError: when a figure is out of range.
        """
        if not (lr > 0 and eps > 0 and noise_std >= 0 and math.isfinite(noise_std) and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"Expected lr={lr} > 0, eps={eps} > 0, a finite noise_std={noise_std} >= 0 and betas={betas} in [0, 1).")
        super().__init__(params, {"lr": lr, "noise_std": noise_std, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # torch's overloads also take a closure that evaluates the loss
        """Takes one step with the gradients in place.

        Raises:
            ValueError: when a closure is given: the loss is private.
        """
        if closure is not None:
            raise ValueError("Expected no closure: a step must not look at the loss again.")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        if not state:
            state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter), exp_avg_sq=torch.zeros_like(parameter))
        state["step"] += 1
        number, variance = float(state["step"]), group["noise_std"] ** 2
        state["exp_avg"].lerp_(grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        second = (state["exp_avg_sq"] / (1 - beta2**number)).sub_(variance).clamp_(min=_FLOOR * variance)
        parameter.addcdiv_(state["exp_avg"], second.sqrt_().add_(group["eps"]), value=-group["lr"] / (1 - beta1**number))
