"""Exact per-unit clipping in one forward and one backward pass: gradients -> ClippedSum, whose L2 sensitivity to one unit is `clip_norm`.

For a layer y = x W^T the gradient of one document is G^T A, the product of the output gradients and the layer's inputs. So it is enough to book-keep A and G:

    forward    every trained layer with a rule stores A and computes with a *detached* weight: autograd never forms a weight gradient for it
    backward   one call of autograd for the G of all those layers; it stops by itself where nothing below trains
    norms      per unit, from A and G alone (the Gram trick) or from the unit's own gradient, whichever takes fewer operations
    sum        one weighted product a layer, A^T diag(c) G, with c = min(1, clip_norm / norm)

The rules are `_RULES`, a table from layer type to the *uses* its parameters make of (A, G). Uses of one parameter, in one module or in several (tied embedding
and head, layers applied twice), are added before the norm is taken, cross terms included. Whatever else reaches a trained parameter (a custom layer, a
functional use of a weight) is found in the autograd graph and differentiated one unit at a time: slow, but exact.

Guarantees, for every unit, whatever its documents contain:
    - the norm of its contribution, over all trained parameters together, is at most `clip_norm`, also when activations are bfloat16: norms and sums are float32 or
      better, and `_MARGIN` covers their rounding;
    - documents of one unit are added before clipping; a unit with a NaN, an infinity or an overflow contributes exactly zero and changes no other unit;
    - a loss that makes one unit depend on another (batch norm, balancing losses, a wrong batch dimension) is refused: by name where the type is known, and by
      a probe of the graph the first time a layer of a model is seen.

Sources: Goodfellow 2015 (arXiv 1510.01799); Li et al. 2022, "Large Language Models Can Be Strong Differentially Private Learners" (Gram norms); Bu et al. 2023,
"Differentially Private Optimization on Large Foundation Models" (book-keeping). The tied cross term and the shape of the module are ours.

Does not cover: several devices, fused GPU kernels, per-layer or adaptive clipping, custom autograd functions that mix rows without the probe noticing.

Legend: B rows of the batch, T tokens of a row, D documents, U units, L tokens of a unit (padded), d and p features in and out, V rows of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional

_MARGIN = 16
"""Rounding allowance, in units of the working precision's epsilon: relative to the norm, and relative to the sum of token norms for Gram matrices."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClippedSum:
    """A sum over privacy units, each contributing a vector of L2 norm at most `clip_norm`.

    How many units it holds is private and is not kept. Built by `clipped_sum` and `zero`; sums over the micro-batches of one step are added with `+`.

    Attributes:
        gradients: name of every trained parameter -> sum, float32 (float64 for a float64 parameter), the parameter's shape.
        clip_norm: the L2 sensitivity to adding or removing one unit.
    """

    gradients: Mapping[str, Tensor]
    clip_norm: float

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """Adds the sum of other units.

        Raises:
            ValueError: when clip norms or parameters differ. A unit must not be in both: keep its documents in one micro-batch.
        """
        if not isinstance(other, ClippedSum):
            return NotImplemented
        if self.clip_norm != other.clip_norm:
            raise ValueError(f"Expected equal clip norms, got {self.clip_norm} and {other.clip_norm}.")
        if self.gradients.keys() != other.gradients.keys():
            raise ValueError("Expected sums over the same parameters.")
        return ClippedSum(gradients={name: mine + other.gradients[name] for name, mine in self.gradients.items()}, clip_norm=self.clip_norm)

    @staticmethod
    def zero(model: nn.Module, *, clip_norm: float) -> ClippedSum:
        """Returns the sum over no units, for an empty Poisson batch.

        Raises:
            ValueError: when `clip_norm` is not positive and finite, or no parameter requires grad.
        """
        _check_clip_norm(clip_norm)
        parameters = _trained(model)
        return ClippedSum(gradients={name: torch.zeros_like(p, dtype=_working(p.dtype)) for name, p in parameters.items()}, clip_norm=clip_norm)


def clipped_sum(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    units: Tensor | Sequence[int],
    *,
    clip_norm: float,
    documents: Tensor | None = None,
) -> ClippedSum:
    """Computes the sum over units of clip(gradient of the unit's summed losses).

    Args:
        model: any module; parameters that require grad are trained, the rest is frozen. Its parameters and their `.grad` are left as they were.
        loss_fn: `loss_fn(model, batch)` gives one loss per document, [D], each a function of its own document alone (a sum, or a mean over that document's own
            tokens). Never divide by anything that depends on the other documents.
        batch: whatever `loss_fn` takes; its first dimension is the document, one a row, unless `documents` says otherwise.
        units: int [D], the privacy unit of each document; documents with equal values are clipped as one. All documents of a unit must be in one call.
        clip_norm: > 0, finite.
        documents: int64 [B, T], the document (0..D-1) of each token of packed rows, -1 for padding. Attention must not cross documents.

    Returns:
        the sum over all trained parameters; zeros for a parameter that no loss reaches.

    Raises:
        ValueError: when `clip_norm` is not positive and finite; losses are not [D]; no parameter is trained; a layer mixes documents of different units.
    """
    _check_clip_norm(clip_norm)
    parameters = _trained(model)
    _refuse_mixing_layers(model)
    layout = _Layout.of(units, documents, device=next(iter(parameters.values())).device)
    if layout.num_documents == 0:
        return ClippedSum.zero(model, clip_norm=clip_norm)
    with _Recorder(model, parameters, layout) as recorder:
        losses = loss_fn(model, batch)
        recorder.stop()
        _check_losses(losses, layout.num_documents)
        recorder.probe(losses)
        rest = _one_unit_at_a_time(losses, _reached(losses, parameters), layout)
        uses = recorder.differentiate(losses, rest)
    del losses
    if any(not bool(use.grad_UX.isfinite().all()) for kept in rest.values() for use in kept) and layout.num_units > 1:
        return _isolated(model, loss_fn, batch, layout, clip_norm=clip_norm)
    return ClippedSum(gradients=_clip_and_add(uses, parameters, layout.num_units, clip_norm), clip_norm=clip_norm)


# --------------------------------------------------------------------------------------------------------------------------------------------------
# From uses to the clipped sum


class _Outer(NamedTuple):
    """A use whose gradient is left^T right, summed over the unit's tokens: every linear layer."""

    left_ULp: Tensor
    right_ULd: Tensor


class _Rows(NamedTuple):
    """A use whose gradient adds right[t] to row ids[t]: every embedding."""

    ids_UL: Tensor
    right_ULd: Tensor


class _Kept(NamedTuple):
    """A use whose gradient is small enough to be kept for each unit."""

    grad_UX: Tensor


_Use = _Outer | _Rows | _Kept


def _clip_and_add(uses: dict[str, list[_Use]], parameters: Mapping[str, nn.Parameter], num_units: int, clip_norm: float) -> dict[str, Tensor]:
    """Weighs every unit by min(1, clip_norm / norm), in float64 for the norms and in the working precision for the sum."""
    device = next(iter(parameters.values())).device
    margin = _MARGIN * max(_rounding(parameter) for parameter in parameters.values())
    square_U = torch.zeros(num_units, dtype=torch.float64, device=device)
    for name in uses:
        uses[name] = _combine(uses[name], parameters[name].shape, num_units)
        square_U += _square_norm(uses[name], margin)
    norm_U = square_U.sqrt() * (1 + margin)
    finite_U = norm_U.isfinite()
    weight_U = torch.where(finite_U, (clip_norm / norm_U.clamp(min=clip_norm)), 0.0)
    broken_U = None if bool(finite_U.all()) else ~finite_U
    sums: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        total = torch.zeros_like(parameter, dtype=_working(parameter.dtype))
        for use in uses.pop(name, []):
            _add_weighted(total, use, weight_U.to(total.dtype), broken_U)
        sums[name] = total
    return sums


def _combine(uses: list[_Use], shape: torch.Size, num_units: int) -> list[_Use]:
    """Merges a parameter's uses of one kind, and forms the unit's own gradient where that takes fewer operations than Gram matrices."""
    outer = [use for use in uses if isinstance(use, _Outer)]
    rows = [use for use in uses if isinstance(use, _Rows)]
    kept = [use for use in uses if isinstance(use, _Kept)]
    merged: list[_Use] = []
    if outer:
        merged.append(_Outer(*(_concatenate(list(parts)) for parts in zip(*outer, strict=True))))
    if rows:
        merged.append(_Rows(*(_concatenate(list(parts)) for parts in zip(*rows, strict=True))))
    if not kept and not any(isinstance(use, _Outer) and _gram_costs_more(use) for use in merged):
        return merged
    grad_UX = sum((use.grad_UX for use in kept[1:]), start=kept[0].grad_UX.clone()) if kept else None
    for use in merged:
        formed = _form(use, shape, num_units)
        grad_UX = formed if grad_UX is None else grad_UX.add_(formed)
    return [_Kept(grad_UX)] if grad_UX is not None else []


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _gram_costs_more(use: _Outer) -> bool:
    """Compares 2 L^2 (p + d) with 2 L p d; at the break-even the unit's own gradients take as much memory as the stored inputs and output gradients."""
    (_, num_tokens, p), d = use.left_ULp.shape, use.right_ULd.shape[2]
    return num_tokens * (p + d) >= p * d


def _form(use: _Outer | _Rows | _Kept, shape: torch.Size, num_units: int) -> Tensor:
    """Gradient of each unit, [U, numel]."""
    if isinstance(use, _Outer):
        return torch.bmm(use.left_ULp.mT, use.right_ULd).reshape(num_units, -1)
    if isinstance(use, _Rows):
        grad_UVd = use.right_ULd.new_zeros(num_units, *shape)
        flat_N = (use.ids_UL + torch.arange(num_units, device=use.ids_UL.device)[:, None] * shape[0]).flatten()
        grad_UVd.view(-1, shape[1]).index_add_(0, flat_N, use.right_ULd.reshape(len(flat_N), -1))
        return grad_UVd.view(num_units, -1)
    return use.grad_UX


def _square_norm(uses: list[_Use], margin: float) -> Tensor:
    """Upper bound of the squared norm of one parameter's gradient for each unit, float64 [U].

    The norm of a kept gradient is that of the very numbers that are released. A Gram norm is computed on another path than the sum it bounds: both round
    relative to the sum of token norms, which tokens that cancel leave far above the norm itself, hence the second term.
    """
    square_U, tokens_U = (torch.stack(parts).sum(0) for parts in zip(*(_SQUARE_NORM[type(use)](use) for use in uses), strict=True))
    outer = next((use for use in uses if isinstance(use, _Outer)), None)
    rows = next((use for use in uses if isinstance(use, _Rows)), None)
    if outer is not None and rows is not None:
        square_U += 2 * _cross_term(outer, rows)
    return (square_U + margin * tokens_U.square()).clamp(min=0.0)


def _outer_norm(use: _Outer) -> tuple[Tensor, Tensor]:
    """sum_st <l_s, l_t> <r_s, r_t> (Goodfellow; Li et al.), and sum_t |l_t| |r_t|."""
    left_ULL = torch.bmm(use.left_ULp, use.left_ULp.mT)
    right_ULL = torch.bmm(use.right_ULd, use.right_ULd.mT)
    product_ULL = left_ULL.mul_(right_ULL)
    tokens_U = product_ULL.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt().sum(1, dtype=torch.float64)
    return product_ULL.sum((1, 2), dtype=torch.float64), tokens_U


def _rows_norm(use: _Rows) -> tuple[Tensor, Tensor]:
    """Segment sums over (unit, row): no V-sized scratch, one sort."""
    num_units, num_tokens = use.ids_UL.shape
    owner_N = torch.arange(num_units, device=use.ids_UL.device).repeat_interleave(num_tokens)
    ids_N = use.ids_UL.flatten()
    keys, segment_N = torch.unique(owner_N * (ids_N.max() + 1) + ids_N, return_inverse=True)
    sums_Sd = use.right_ULd.new_zeros(len(keys), use.right_ULd.shape[2]).index_add_(0, segment_N, use.right_ULd.flatten(0, 1))
    owner_S = torch.empty_like(keys).scatter_(0, segment_N, owner_N)
    square_U = torch.zeros(num_units, dtype=torch.float64, device=keys.device).index_add_(0, owner_S, sums_Sd.square().sum(1, dtype=torch.float64))
    return square_U, use.right_ULd.square().sum(2, dtype=torch.float64).sqrt().sum(1)


def _kept_norm(use: _Kept) -> tuple[Tensor, Tensor]:
    square_U = use.grad_UX.square().sum(1, dtype=torch.float64)
    return square_U, torch.zeros_like(square_U)


_SQUARE_NORM: dict[type, Callable[[Any], tuple[Tensor, Tensor]]] = {_Outer: _outer_norm, _Rows: _rows_norm, _Kept: _kept_norm}


def _cross_term(outer: _Outer, rows: _Rows) -> Tensor:
    """<head, embedding> = sum_st left[s, id_t] <right_s, rows_t> for a weight that is both; leaving it out understates the norm (PITFALLS 7)."""
    index_USR = rows.ids_UL[:, None, :].expand(-1, outer.left_ULp.shape[1], -1)
    return (outer.left_ULp.gather(2, index_USR) * torch.bmm(outer.right_ULd, rows.right_ULd.mT)).sum((1, 2), dtype=torch.float64)


def _add_weighted(total: Tensor, use: _Use, weight_U: Tensor, broken_U: Tensor | None) -> None:
    """Adds sum_u weight_u gradient_u to `total`; a broken unit's rows are zeroed first, for 0 * NaN is NaN."""
    if broken_U is not None:
        use = type(use)(*(part.masked_fill(broken_U.view(-1, *[1] * (part.dim() - 1)), 0) for part in use))
    if isinstance(use, _Kept):
        total.add_((weight_U.to(use.grad_UX.dtype) @ use.grad_UX).view_as(total))
    elif isinstance(use, _Rows):
        scaled_ULd = use.right_ULd * weight_U.to(use.right_ULd.dtype)[:, None, None]
        total.index_add_(0, use.ids_UL.flatten(), scaled_ULd.flatten(0, 1).to(total.dtype))
    else:
        left_Np, right_Nd, weight_N1 = (
            use.left_ULp.flatten(0, 1),
            use.right_ULd.flatten(0, 1),
            weight_U.repeat_interleave(use.left_ULp.shape[1])[:, None],
        )
        if left_Np.shape[1] < right_Nd.shape[1]:
            left_Np = left_Np * weight_N1
        else:
            right_Nd = right_Nd * weight_N1
        total.addmm_(left_Np.T, right_Nd)


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Rules: layer type -> the uses its parameters make of (inputs, output gradients)

_Uses = Iterator[tuple[str, _Use]]


def _linear(module: Any, inputs_ULd: Tensor, grad_ULp: Tensor) -> _Uses:
    if _trains(module, "weight"):
        yield "weight", _Outer(grad_ULp, inputs_ULd)
    if _trains(module, "bias"):
        yield "bias", _Kept(grad_ULp.sum(1))


def _transposed_linear(module: Any, inputs_ULd: Tensor, grad_ULp: Tensor) -> _Uses:
    """GPT-2's Conv1D: a linear layer whose weight is [d, p]."""
    if _trains(module, "weight"):
        yield "weight", _Outer(inputs_ULd, grad_ULp)
    if _trains(module, "bias"):
        yield "bias", _Kept(grad_ULp.sum(1))


def _embedding(module: Any, ids_UL1: Tensor, grad_ULd: Tensor) -> _Uses:
    if module.padding_idx is not None:
        grad_ULd = grad_ULd.masked_fill(ids_UL1 == module.padding_idx, 0)
    yield "weight", _Rows(ids_UL1.squeeze(2).long(), grad_ULd)


def _layer_norm(module: Any, inputs_ULd: Tensor, grad_ULd: Tensor) -> _Uses:
    if _trains(module, "weight"):
        yield "weight", _Kept((functional.layer_norm(inputs_ULd, inputs_ULd.shape[2:], eps=module.eps) * grad_ULd).sum(1).flatten(1))
    if _trains(module, "bias"):
        yield "bias", _Kept(grad_ULd.sum(1).flatten(1))


def _rms_norm(module: Any, inputs_ULd: Tensor, grad_ULd: Tensor) -> _Uses:
    normalised_ULd = functional.rms_norm(inputs_ULd, inputs_ULd.shape[2:], eps=module.eps)
    yield "weight", _Kept((normalised_ULd * grad_ULd).sum(1).flatten(1))


def _scale_norm(module: nn.Module, inputs_ULd: Tensor, grad_ULd: Tensor, *, unit_weight: float) -> _Uses:
    """A library's RMS norm: with `unit_weight` as weight it gives the normalised input, rounded the way this layer rounds it."""
    with torch.no_grad():
        normalised_ULd = torch.func.functional_call(module, {"weight": inputs_ULd.new_full(inputs_ULd.shape[2:], unit_weight)}, (inputs_ULd,))
    yield "weight", _Kept((normalised_ULd * grad_ULd).sum(1))


def _trains(module: nn.Module, key: str) -> bool:
    parameter = module._parameters.get(key)
    return parameter is not None and parameter.requires_grad


class _Rule(NamedTuple):
    uses: Callable[[Any, Tensor, Tensor], _Uses]
    features_in: Callable[[Any], tuple[int, ...]]
    """Trailing dimensions of the input that belong to one token; empty for token ids."""
    features_out: Callable[[Any], tuple[int, ...]]


_RULES: dict[type[nn.Module], _Rule] = {
    nn.Linear: _Rule(_linear, lambda m: (m.in_features,), lambda m: (m.out_features,)),
    nn.Embedding: _Rule(_embedding, lambda _: (), lambda m: (m.embedding_dim,)),
    nn.LayerNorm: _Rule(_layer_norm, lambda m: m.normalized_shape, lambda m: m.normalized_shape),
    nn.RMSNorm: _Rule(_rms_norm, lambda m: m.normalized_shape, lambda m: m.normalized_shape),
}
_CONV1D = _Rule(_transposed_linear, lambda m: m.weight.shape[:1], lambda m: m.weight.shape[1:])
_SCALE_NORM = _Rule(partial(_scale_norm, unit_weight=1.0), lambda m: m.weight.shape, lambda m: m.weight.shape)
_OFFSET_NORM = _Rule(partial(_scale_norm, unit_weight=0.0), lambda m: m.weight.shape, lambda m: m.weight.shape)


def _rule_of(module: nn.Module) -> _Rule | None:
    """Finds the rule of a layer by its exact type, or, for the layers of model libraries, by name and a check of what the layer computes."""
    if type(module) in _RULES:
        return _RULES[type(module)]
    kind = type(module)
    if (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D"):
        return _CONV1D
    if "Norm" in kind.__qualname__ and list(module._parameters) == ["weight"] and not module._modules:
        return _rule_of_norm(module)
    return None


@torch.no_grad()
def _rule_of_norm(module: nn.Module) -> _Rule | None:
    """Compares the layer with x / rms(x) * w and x / rms(x) * (1 + w) on a ramp, with a ramp as weight; it never sees a document."""
    weight = module.get_parameter("weight")
    if weight.dim() != 1:
        return None
    ramp = torch.linspace(-1.0, 2.0, 2 * len(weight), device=weight.device).view(2, -1)
    scale = torch.linspace(0.5, 1.5, len(weight), device=weight.device)
    try:
        answer = torch.func.functional_call(module, {"weight": scale.to(weight.dtype)}, (ramp.to(weight.dtype),))
    except (RuntimeError, TypeError, ValueError):
        return None
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    normalised = functional.rms_norm(ramp, ramp.shape[1:], eps=epsilon)
    tolerance = 0.05 if weight.dtype in (torch.bfloat16, torch.float16) else 1e-4
    if not isinstance(answer, Tensor) or answer.shape != ramp.shape:
        return None
    if torch.allclose(answer.to(ramp.dtype), normalised * scale, rtol=tolerance, atol=tolerance):
        return _SCALE_NORM
    if torch.allclose(answer.to(ramp.dtype), normalised * (1 + scale), rtol=tolerance, atol=tolerance):
        return _OFFSET_NORM
    return None


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Book-keeping


class _Tap(NamedTuple):
    """One call of a layer with a rule: its inputs, and the edge of the graph where its output gradient arrives."""

    module: nn.Module
    name: str
    rule: _Rule
    inputs: Tensor
    version: int
    place: _Place
    edge: GradientEdge


class _Seen(NamedTuple):
    """What earlier calls learned about a model: rules by layer, layers that passed the probe, layers whose calls did not fit the batch."""

    rules: WeakKeyDictionary[nn.Module, _Rule]
    probes_left: dict[str, int]
    shared: set[str]


_PROBES = 2
"""A probe of a layer that no chosen loss reaches (a LoRA matrix below one that is still zero) says nothing; it is repeated this often."""

_SEEN: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()


class _Recorder:
    """Hooks for one forward and its backward; leaves no trace on the model."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], layout: _Layout) -> None:
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        self._layout = layout
        self._taps: list[_Tap] = []
        self._recording = True
        self._pending: dict[nn.Module, tuple[_Rule, Tensor, _Place]] = {}
        self._swapped: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self._seen = _SEEN.setdefault(model, _Seen(WeakKeyDictionary(), {}, set()))
        self._hooks = ExitStack()
        for name, module in model.named_modules():
            if name not in self._seen.shared and any(p is not None and p.requires_grad for p in module._parameters.values()):
                self._hook(name, module)

    def _hook(self, name: str, module: nn.Module) -> None:
        rule = self._seen.rules.get(module) or _rule_of(module)
        if rule is None:
            return
        self._seen.rules[module] = rule
        before = module.register_forward_pre_hook(lambda m, args, kwargs: self._before(name, m, (*args, *kwargs.values())), with_kwargs=True)
        after = module.register_forward_hook(lambda m, _, output: self._after(name, m, output), prepend=True)
        self._hooks.callback(before.remove)
        self._hooks.callback(after.remove)

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_all()
        self._hooks.close()

    def stop(self) -> None:
        """Ends the forward: what runs from here on is the backward, which may replay checkpointed layers."""
        self._recording = False

    def _before(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Lets the layer compute with detached weights when its input is laid out as the batch is; leaves it to autograd otherwise."""
        rule = self._seen.rules[module]
        if not torch.is_grad_enabled() or name in self._seen.shared:
            return
        one = len(inputs) == 1 and isinstance(inputs[0], Tensor)
        place = self._layout.place(inputs[0].shape, rule.features_in(module)) if one else None
        if place is None:
            self._seen.shared.add(name)
            return
        if module in self._swapped:  # a replay that checkpointing cut short
            self._restore(module)
        trained = {key: p for key, p in module._parameters.items() if p is not None and p.requires_grad}
        self._swapped[module] = trained
        for key, parameter in trained.items():
            module._parameters[key] = parameter.detach()  # type: ignore[assignment]  # a tensor for the length of one forward: autograd must not see the parameter
        self._pending[module] = (rule, inputs[0], place)

    def _after(self, name: str, module: nn.Module, output: Tensor) -> Tensor | None:
        """Gives the layer its parameters back and notes where its output gradient will arrive."""
        if module not in self._pending:
            return None
        rule, inputs, place = self._pending.pop(module)
        self._restore(module)
        starts_graph = not output.requires_grad
        if starts_graph:
            output = output.detach().requires_grad_()
        tapped = self._layout.spread(output, place)
        if self._recording:
            self._taps.append(_Tap(module, name, rule, inputs.detach(), inputs._version, place, get_gradient_edge(tapped)))
        if starts_graph:
            return tapped.clone()  # a leaf must not be changed in place; the copy may
        return tapped if tapped is not output else None

    def _restore(self, module: nn.Module) -> None:
        for key, parameter in self._swapped.pop(module).items():
            module._parameters[key] = parameter

    def _restore_all(self) -> None:
        for module in list(self._swapped):
            self._restore(module)

    def _grad(self, loss: Tensor, taps: list[_Tap], *, keep_graph: bool) -> list[Tensor | None]:
        """Output gradients of the taps. Checkpointing replays forwards in here and cuts them short, so parameters are given back afterwards."""
        grads: list[Tensor | None] = []
        grads.extend(torch.autograd.grad(loss, [tap.edge for tap in taps], retain_graph=keep_graph, allow_unused=True))
        self._restore_all()
        return grads

    def probe(self, losses: Tensor) -> None:
        """Checks, the first time a layer is tapped, that the losses of every other unit reach only those units' rows.

        Raises:
            ValueError: when a layer mixes units: the rows of one would carry gradients of another, and no norm would bound what it contributes.
        """
        new = [tap for tap in self._taps if self._seen.probes_left.get(tap.name, _PROBES) > 0]
        if not new or self._layout.num_units < 2 or not losses.requires_grad:
            return
        chosen_U = torch.arange(self._layout.num_units, device=losses.device) % 2 == 0
        chosen = losses[chosen_U[self._layout.unit_D]].sum()
        for tap, grad in zip(new, self._grad(chosen, new, keep_graph=True), strict=True):
            grad_ULx = None if grad is None else self._layout.group(grad, tap.rule.features_out(tap.module))
            if grad_ULx is not None and _has_signal(grad_ULx[~chosen_U]):
                raise ValueError(
                    f"Expected the loss of one document to depend on its own rows only, but layer {tap.name!r} mixes documents. "
                    "The document must be the first dimension, and no layer or loss may combine documents (batch norm, balancing losses)."
                )
            telling = grad_ULx is not None and _has_signal(grad_ULx[chosen_U])
            self._seen.probes_left[tap.name] = 0 if telling else self._seen.probes_left.get(tap.name, _PROBES) - 1

    def differentiate(self, losses: Tensor, rest: Mapping[str, list[_Kept]]) -> dict[str, list[_Use]]:
        """Runs the one backward pass and returns the uses of every parameter."""
        uses: dict[str, list[_Use]] = {name: list(kept) for name, kept in rest.items()}
        taps, self._taps = self._taps, []
        if not taps or not losses.requires_grad:
            return uses
        grads = self._grad(losses.sum(), taps, keep_graph=False)
        for position, tap in enumerate(taps):
            grad, grads[position] = grads[position], None  # each is freed as soon as it is booked, unless its Gram matrix is still to come
            if tap.inputs._version != tap.version:
                raise ValueError(f"Expected the input of layer {tap.name!r} to stay as it was, but it was changed in place after the layer used it.")
            if grad is not None:
                self._book(tap, grad, uses)
        return uses

    def _book(self, tap: _Tap, grad: Tensor, uses: dict[str, list[_Use]]) -> None:
        inputs_ULd = self._layout.group(self._layout.spread(tap.inputs, tap.place), tap.rule.features_in(tap.module))
        grad_ULp = self._layout.group(grad, tap.rule.features_out(tap.module))
        for key, use in tap.rule.uses(tap.module, inputs_ULd, grad_ULp):
            uses.setdefault(self._names[id(tap.module._parameters[key])], []).append(use)


def _has_signal(grad: Tensor) -> bool:
    """Says whether any value is finite and not zero; 0 * NaN of a poisoned neighbour is no signal."""
    return bool(((grad != 0) & grad.isfinite()).any())


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Layout:
    """Where the tokens of each unit lie in a tensor whose first dimensions are those of the batch.

    Attributes:
        unit_D: the unit of each document, 0..U-1.
        leading: (B,) for a document a row, (B, T) for packed rows.
        index_UK: positions (rows, or tokens when packed) of each unit, -1 where it has fewer; None when row u is unit u.
    """

    num_units: int
    unit_D: Tensor
    leading: tuple[int, ...]
    index_UK: Tensor | None

    @property
    def num_documents(self) -> int:
        return len(self.unit_D)

    @staticmethod
    def of(units: Tensor | Sequence[int], documents: Tensor | None, device: torch.device) -> _Layout:
        """Validates and numbers the units.

        Raises:
            ValueError: when shapes or the range of `documents` are wrong.
        """
        given_D = torch.as_tensor(units, device=device)
        if given_D.dim() != 1 or (given_D.is_floating_point() and len(given_D) > 0):
            raise ValueError(f"Expected units to be integers of shape [D], got {given_D.dtype} of shape {list(given_D.shape)}.")
        names_U, unit_D = torch.unique(given_D.long(), return_inverse=True)
        if documents is None:
            identity = len(names_U) == len(unit_D)
            unit_D = torch.arange(len(unit_D), device=device) if identity else unit_D
            return _Layout(num_units=len(names_U), unit_D=unit_D, leading=(len(unit_D),), index_UK=None if identity else _table(unit_D, len(names_U)))
        if documents.dim() != 2 or documents.is_floating_point() or not bool(((documents >= -1) & (documents < len(unit_D))).all()):
            raise ValueError("Expected documents to be integers of shape [B, T] from -1 (padding) to D - 1.")
        document_N = documents.to(device).flatten().long()
        unit_N = torch.where(document_N < 0, -1, unit_D[document_N.clamp(min=0)])
        return _Layout(num_units=len(names_U), unit_D=unit_D, leading=tuple(documents.shape), index_UK=_table(unit_N, len(names_U)))

    def place(self, shape: torch.Size, features: tuple[int, ...]) -> _Place | None:
        """Says how a layer's input is laid out, or None where it does not follow the batch."""
        lead = tuple(shape[: len(shape) - len(features)])
        if tuple(shape[len(lead) :]) != tuple(features) or not lead or 0 in lead:
            return None
        if lead[: len(self.leading)] == self.leading:
            return _Place.OWN
        if lead[0] == 1 and lead[1 : len(self.leading)] == self.leading[1:] and len(lead) > 1:
            return _Place.SHARED_ROW
        if len(lead) == 1 and not features and self.leading[1:] in ((), lead):
            return _Place.SHARED_IDS
        if len(lead) == 1 and features and (lead[0] == math.prod(self.leading) or (len(self.leading) == 1 and lead[0] % self.leading[0] == 0)):
            return _Place.OWN
        return None

    def spread(self, x: Tensor, place: _Place) -> Tensor:
        """Repeats a row that the whole batch shares, so that every row has its own output gradient."""
        if place is _Place.OWN:
            return x
        return x.expand(self.leading[0], *(x.shape[1:] if place is _Place.SHARED_ROW else x.shape))

    def group(self, x: Tensor, features: tuple[int, ...]) -> Tensor:
        """Lays out a tensor by unit: [U, L, features], in the working precision; tokens a unit does not have are zero."""
        x = x.to(_working(x.dtype)) if x.is_floating_point() else x
        x_NMd = x.reshape(math.prod(self.leading), -1, *(features or (1,)))
        if self.index_UK is None:
            return x_NMd
        missing_UK = self.index_UK < 0
        x_UKMd = x_NMd[self.index_UK.clamp(min=0)].masked_fill(missing_UK.view(*missing_UK.shape, *[1] * (x_NMd.dim() - 1)), 0)
        return x_UKMd.flatten(1, 2)


class _Place(Enum):
    """How a layer's input lies with respect to the batch."""

    OWN = "one row, or more, for each row of the batch"
    SHARED_ROW = "[1, ...]: one row for all, such as position ids"
    SHARED_IDS = "[T]: ids without a batch dimension"


def _table(owner_N: Tensor, num_owners: int) -> Tensor:
    """Positions of each owner in order, [owners, most], padded with -1; an owner of -1 owns nothing."""
    order_N = torch.argsort(owner_N, stable=True)[int((owner_N < 0).sum()) :]
    count_U = torch.bincount(owner_N[order_N], minlength=num_owners)
    first_U = count_U.cumsum(0) - count_U
    index_UK = torch.full((num_owners, max(1, int(count_U.max()))), -1, device=owner_N.device)
    owners_N = owner_N[order_N]
    index_UK[owners_N, torch.arange(len(order_N), device=owner_N.device) - first_U[owners_N]] = order_N
    return index_UK


# --------------------------------------------------------------------------------------------------------------------------------------------------
# What has no rule


def _reached(losses: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Trained parameters that the graph of the losses still leads to: those that no rule has taken out of it."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, nn.Parameter] = {}
    seen: set[Any] = set()
    open_nodes: list[Any] = [losses.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            found[name] = parameters[name]
        open_nodes.extend(following for following, _ in node.next_functions)
    return found


def _one_unit_at_a_time(losses: Tensor, rest: Mapping[str, nn.Parameter], layout: _Layout) -> dict[str, list[_Kept]]:
    """Gradients that autograd has to form: one backward pass a unit through the graph that is already there."""
    if not rest:
        return {}
    rows: dict[str, list[Tensor]] = {name: [] for name in rest}
    for unit in range(layout.num_units):
        loss = losses[layout.unit_D == unit].sum()
        grads = torch.autograd.grad(loss, list(rest.values()), retain_graph=True, allow_unused=True)
        for (name, parameter), grad in zip(rest.items(), grads, strict=True):
            grad = torch.zeros_like(parameter) if grad is None else grad
            rows[name].append(grad.to(_working(grad.dtype)).flatten())
    return {name: [_Kept(torch.stack(grads))] for name, grads in rows.items()}


def _isolated(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, layout: _Layout, *, clip_norm: float) -> ClippedSum:
    """Computes each unit in a batch of its own: a NaN of one would otherwise reach the autograd gradients of the others as 0 * NaN.

    Raises:
        ValueError: when the batch is not made of tensors with the document as first dimension, so that it cannot be split.
    """
    total = ClippedSum.zero(model, clip_norm=clip_norm)
    for unit in range(layout.num_units):
        rows = torch.nonzero(layout.unit_D == unit).squeeze(1)
        total = total + clipped_sum(model, loss_fn, _take(batch, rows, layout), torch.zeros_like(rows), clip_norm=clip_norm)
    return total


def _take(batch: Any, rows: Tensor, layout: _Layout) -> Any:
    if len(layout.leading) == 1:
        if isinstance(batch, Tensor) and batch.dim() > 0 and len(batch) == layout.num_documents:
            return batch[rows.to(batch.device)]
        if isinstance(batch, Mapping):
            return {key: _take(value, rows, layout) for key, value in batch.items()}
        if isinstance(batch, tuple | list):
            return tuple(_take(value, rows, layout) for value in batch)
    raise ValueError(
        "Expected a batch of tensors with one document a row: a gradient is not finite and the model has trained parameters without a rule, "
        "so its units have to be computed apart."
    )


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Checks


def _working(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything narrower is computed in float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def _rounding(parameter: Tensor) -> float:
    """Relative rounding of the products that this parameter's norm and sum are made of, with what `torch.set_float32_matmul_precision` allows."""
    if _working(parameter.dtype) is torch.float64:
        return float(torch.finfo(torch.float64).eps)
    return {"highest": float(torch.finfo(torch.float32).eps), "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError("Expected a model with at least one parameter that requires grad.")
    return parameters


def _check_clip_norm(clip_norm: float) -> None:
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError(f"Expected a finite clip_norm={clip_norm} > 0.")


def _check_losses(losses: Any, num_documents: int) -> None:
    if not isinstance(losses, Tensor) or tuple(losses.shape) != (num_documents,):
        got = list(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(f"Expected loss_fn to give one loss per document, shape [{num_documents}], got {got}.")


def _refuse_mixing_layers(model: nn.Module) -> None:
    """Refuses by name what computes on several documents at once."""
    for name, module in model.named_modules():
        reason = _why_refused(module)
        if reason:
            raise ValueError(f"Expected layers that treat each document alone, but {name or 'the model'!r} ({type(module).__name__}) {reason}.")


def _why_refused(module: nn.Module) -> str:
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
        return "normalises over the batch; use layer or group norm"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.training and module.track_running_stats:
        return "keeps statistics of the documents it saw; set track_running_stats=False"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.scale_grad_by_freq:
        return "scales gradients by the batch's token counts; set scale_grad_by_freq=False"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None:
        return "changes its weight by the tokens it sees; set max_norm=None"
    config = getattr(module, "config", None)
    if getattr(config, "output_router_logits", False) is True and bool(getattr(config, "router_aux_loss_coef", None)):
        return "adds a balancing loss over the batch; set output_router_logits=False"
    return ""
