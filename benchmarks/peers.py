"""Clipped sums of the same batch by us and by others, as functions of one shape, and the measurement of functions that take turns.

    plain           the gradient without privacy
    ours            discreet.dp.clipping.clipped_sum
    opacus hooks    Opacus 1.6, gradients of every example (`pip install --no-deps opacus==1.6.* opt_einsum` into an environment of its own)
    opacus ghost    Opacus 1.6, ghost norms, then a second backward pass
    fastdp          awslabs/fast-differential-privacy, book-keeping ("MixOpt"), from a folder of its source; its noise is left out, as ours is

Every contender owns a copy of the model with the same weights and gives name -> clipped sum, so that `agreement` can say whether all did the same work.
"""

from __future__ import annotations

import copy
import importlib
import statistics
import sys
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from discreet.dp.clipping import clipped_sum

Loss = Callable[[Any, Any], Tensor]
Contender = Callable[[Any], dict[str, Tensor]]


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def plain(model: nn.Module, loss_fn: Loss) -> Contender:
    def run(batch: Any) -> dict[str, Tensor]:
        loss_fn(model, batch).sum().backward()
        return _taken(model, "grad")

    return run


def ours(model: nn.Module, loss_fn: Loss, *, clip_norm: float) -> Contender:
    def run(batch: Any) -> dict[str, Tensor]:
        rows = len(next(iter(batch.values())))
        return dict(clipped_sum(model, loss_fn, batch, torch.arange(rows), clip_norm=clip_norm).gradients)

    return run


def opacus_hooks(model: nn.Module, loss_fn: Loss, *, clip_norm: float) -> Contender:
    from opacus.grad_sample import GradSampleModule

    GradSampleModule(model, loss_reduction="sum", strict=False)

    def run(batch: Any) -> dict[str, Tensor]:
        loss_fn(model, batch).sum().backward()
        samples = _taken(model, "grad_sample")
        _taken(model, "grad")
        norm_B = torch.stack([sample.flatten(1).norm(dim=1) for sample in samples.values()]).norm(dim=0)
        weight_B = (clip_norm / (norm_B + 1e-6)).clamp(max=1.0)
        return {name: torch.einsum("i,i...", weight_B, sample) for name, sample in samples.items()}

    return run


def opacus_ghost(model: nn.Module, loss_fn: Loss, *, clip_norm: float) -> Contender:
    from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleModuleFastGradientClipping

    engine = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=clip_norm, strict=False)

    def run(batch: Any) -> dict[str, Tensor]:
        losses = loss_fn(model, batch)
        losses.sum().backward(retain_graph=True)
        weight_B = engine.get_clipping_coef().detach()
        _taken(model, "grad")
        engine.disable_hooks()
        (weight_B * losses).sum().backward()
        engine.enable_hooks()
        return _taken(model, "grad")

    return run


def fastdp(model: nn.Module, loss_fn: Loss, *, clip_norm: float, source: Path) -> Contender:
    """Book-keeping with the origin-parameter trick where an embedding trains, as its README tells."""
    _import_fastdp(source)
    hooks = importlib.import_module("fastDP.autograd_grad_sample")
    layers = importlib.import_module("fastDP.supported_layers_grad_samplers")._supported_layers_norm_sample_AND_clipping
    parameters: dict[str, Any] = trained(model)
    holds_embedding = any("embed" in name and "lora" not in name for name in parameters)
    parameter: Any  # fastDP keeps its notes on the parameters
    for name, parameter in model.named_parameters():
        parameter.initially_requires_grad = parameter.requires_grad
        parameter.requires_grad = parameter.requires_grad and ("embed_in" in name or "embed_tokens" in name or not holds_embedding)
        parameter.noise = 0.0
    named = [
        (n, m)
        for n, m in model.named_modules()
        if type(m) in layers and any(p.initially_requires_grad for p in m._parameters.values() if p is not None)
    ]
    hooks.add_hooks(
        model=model, loss_reduction="sum", clipping_mode="MixOpt", bias_only=False, clipping_style="all-layer", block_heads=[named[0][0]],
        named_params=list(parameters.items()), named_layers=named, clipping_fn="Abadi", numerical_stability_constant=1e-6, max_grad_norm_layerwise=clip_norm,
    )  # fmt: skip

    def run(batch: Any) -> dict[str, Tensor]:
        for parameter in parameters.values():
            parameter.private_grad = torch.zeros_like(parameter)
        loss_fn(model, batch).sum().backward()
        _taken(model, "grad")
        found = {name: parameter.private_grad for name, parameter in parameters.items()}
        for parameter in parameters.values():
            del parameter.private_grad
        return found

    return run


def _import_fastdp(source: Path) -> None:
    """Makes the package importable without its __init__, which patches classes that transformers no longer has."""
    if not (source / "fastDP" / "autograd_grad_sample.py").exists():
        raise ImportError(f"no fastDP in {source}")
    package = types.ModuleType("fastDP")
    package.__path__ = [str(source / "fastDP")]
    sys.modules.setdefault("fastDP", package)


def _taken(model: nn.Module, key: str) -> dict[str, Tensor]:
    """Collects an attribute of all parameters and clears it."""
    found = {name: value for name, parameter in model.named_parameters() if (value := getattr(parameter, key, None)) is not None}
    for parameter in model.parameters():
        if getattr(parameter, key, None) is not None:
            setattr(parameter, key, None)
    return found


def contenders(model: nn.Module, loss_fn: Loss, *, clip_norm: float, names: Sequence[str], fastdp_source: Path | None) -> dict[str, Contender]:
    """Makes the named contenders; one that is not installed is left out with a word."""
    make: dict[str, Callable[[nn.Module], Contender]] = {
        "plain": lambda m: plain(m, loss_fn),
        "ours": lambda m: ours(m, loss_fn, clip_norm=clip_norm),
        "opacus hooks": lambda m: opacus_hooks(m, loss_fn, clip_norm=clip_norm),
        "opacus ghost": lambda m: opacus_ghost(m, loss_fn, clip_norm=clip_norm),
        "fastdp": lambda m: fastdp(m, loss_fn, clip_norm=clip_norm, source=fastdp_source or Path("nowhere")),
    }
    made: dict[str, Contender] = {}
    for name in names:
        try:
            made[name] = make[name](copy.deepcopy(model))
        except ImportError as error:
            print(f"{name}: left out ({error})", file=sys.stderr, flush=True)
    return made


def agreement(runs: Mapping[str, Contender], batch: Any) -> dict[str, float | str]:
    """Norm of each contender's difference to ours, relative to ours; those that fail say how, and are taken out."""
    reference = runs["ours"](batch)
    size = torch.stack([value.norm() for value in reference.values()]).norm()
    said: dict[str, float | str] = {}
    for name, run in runs.items():
        if name in ("plain", "ours"):
            continue
        try:
            found = {key.removeprefix("_module."): value for key, value in run(batch).items()}
            missing = reference.keys() - found.keys()
            away = torch.stack([(found[key] - value).norm() for key, value in reference.items() if key in found]).norm() / size
            said[name] = f"{len(missing)} parameters missing" if missing else float(f"{float(away):.1e}")
        except Exception as error:  # a peer may fail in any way; that is a result
            said[name] = f"{type(error).__name__}: {error}"[:160]
    return said


def cpu_seconds(step: Callable[[], object]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def in_turn(steps: Mapping[str, Callable[[], object]], alternations: int) -> dict[str, list[float]]:
    """CPU seconds of each step, all of them one after the other in each alternation, each first equally often."""
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(alternations):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(cpu_seconds(steps[name]))
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Median of the ratios of pairs, and the ends of its interval of at least 95 % (order statistics)."""
    ratios = sorted(a / b for a, b in zip(above, below, strict=True))
    number = len(ratios)
    skip = int((number - 1.96 * number**0.5) / 2)
    low, high = (ratios[max(0, skip - 1)], ratios[min(number - 1, number - skip)]) if number > 5 else (ratios[0], ratios[-1])
    return [round(value, 3) for value in (statistics.median(ratios), low, high)]
