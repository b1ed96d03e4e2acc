"""What each layer adds to a unit's gradient: layer type -> its *uses* of a parameter -> (squared norm, weighted sum), without ever forming a batch of gradients.

For a layer y = x W^T the gradient of one unit is G^T A, the product of the output gradients and the layer's inputs over the unit's tokens. So a use keeps A and G:

    Outer   left^T right over the tokens: linear layers. Its norm is that of Gram matrices, sum_st <l_s, l_t> <r_s, r_t>, or of the gradient itself where that takes
            no more memory than A and G do; then the gradient is kept, and the weighted sum needs no second product
    Rows    right[t] added to row ids[t]: embeddings. Segment sums over (unit, row), never a one-hot
    Kept    a gradient small enough to keep for each unit: biases, norms, and layers without a rule, by `torch.func`

`rule_of` knows torch's own layers by exact type and the layers of model libraries by qualified name; every instance must then pass `agrees`: on fixed numbers, in its
own dtype, the rule's gradients are those of `torch.func.grad` for each example. A layer that fails is computed by `row_gradients`, slower and exact.

Guarantees: norms are upper bounds, `_MARGIN` included, of the numbers that `add_weighted` adds; both work in float32 or better whatever the layers' dtype.

Sources: Goodfellow 2015 (arXiv 1510.01799); Li et al. 2022 (arXiv 2110.05679), Gram norms; Bu et al. 2023 (arXiv 2210.00038), kept or Gram; the tied cross term, the
triangular Gram product and the check of each instance are ours.

Does not cover: fused GPU kernels; weights that are neither plain tensors nor held by the layer that uses them (`clipping` differentiates those unit by unit).

Legend: B rows of the batch, U units, L tokens of a unit (padded), N tokens, d and p features in and out, V rows of an embedding, X elements of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_unflatten

MARGIN = 16
"""Rounding allowance, in units of the working precision's epsilon: relative to the norm, and relative to the sum of token norms for Gram matrices."""

_STRIP = 32
"""Least number of columns of a Gram matrix that are formed at once; a strip ends at the diagonal, so little of the other triangle is computed."""

_ROOM = 1.5
"""A kept gradient may take this much more memory than the inputs and output gradients it replaces."""

_COLUMNS = 80
"""Time of keeping over that of Gram matrices is this times p d / (L^2 (p + d)): 0.8 ns an element against 0.01 ns, measured on a CPU with AVX-512."""

_SMALL = 1 << 15
"""Elements of a gradient that is kept whatever the time says: a call has a price of its own."""

_PACKED = 1 << 20
"""Kept gradients up to this size are laid side by side: hundreds of adapters and scales become one norm and one product."""

_TILE = 1 << 13
"""Features of a low-precision tensor that are widened to float32 at once: 512 tokens of a vocabulary of 262,144 would take 512 MB."""

_BLOCK = 1 << 18
"""Numbers that are squared and added in float32 before float64 takes over."""


class Outer(NamedTuple):
    """A use whose gradient is left^T right, summed over the unit's tokens: every linear layer."""

    left_ULp: Tensor
    right_ULd: Tensor


class Rows(NamedTuple):
    """A use whose gradient adds right[t] to row ids[t]: every embedding."""

    ids_UL: Tensor
    right_ULd: Tensor


class Kept(NamedTuple):
    """A use whose gradient is small enough to be kept for each unit."""

    grad_UX: Tensor


Use = Outer | Rows | Kept
Uses = Iterator[tuple[str, Use]]


def working(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything narrower is computed in float32."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """The tensor in the working precision."""
    return x.to(working(x.dtype))


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Uses -> norms and sums


def combine(uses: list[Use], shape: torch.Size, num_units: int) -> list[Use]:
    """Merges a parameter's uses of one kind, and forms the unit's own gradient where that is cheaper."""
    outer = [use for use in uses if isinstance(use, Outer)]
    rows = [use for use in uses if isinstance(use, Rows)]
    kept = [use for use in uses if isinstance(use, Kept)]
    merged: list[Use] = []
    if outer:
        merged.append(Outer(*(_concatenate(list(parts)) for parts in zip(*outer, strict=True))))
    if rows:
        merged.append(Rows(*(_concatenate(list(parts)) for parts in zip(*rows, strict=True))))
    if not kept and not any(isinstance(use, Outer) and _forming_is_cheaper(use) for use in merged):
        return merged
    grad_UX = sum((use.grad_UX for use in kept[1:]), start=kept[0].grad_UX.clone() if len(kept) > 1 or merged else kept[0].grad_UX) if kept else None
    for use in merged:
        formed = form(use, shape, num_units)
        grad_UX = formed if grad_UX is None else grad_UX.add_(formed)
    return [Kept(grad_UX)] if grad_UX is not None else []


class Entry(NamedTuple):
    """Parameters whose norm and sum are computed together: one with its uses, or several whose gradients are kept side by side."""

    names: tuple[str, ...]
    uses: list[Use]


def entries(uses: Mapping[str, list[Use]]) -> list[Entry]:
    """Lays the small kept gradients of one group of parameters side by side, by precision; the others stay alone."""
    small: dict[torch.dtype, list[str]] = {}
    alone = []
    for name, of_name in uses.items():
        match of_name:
            case [Kept(grad_UX)] if grad_UX.numel() <= _PACKED:
                small.setdefault(grad_UX.dtype, []).append(name)
            case _:
                alone.append(Entry((name,), of_name))
    packed = [Entry(tuple(names), [Kept(torch.cat([uses[name][0].grad_UX for name in names], dim=1))]) for names in small.values()]  # type: ignore[union-attr]  # all Kept
    return packed + alone


def _concatenate(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _forming_is_cheaper(use: Outer) -> bool:
    """Says whether to form each unit's gradient, which then serves norm and sum with 2 L p d operations, or Gram matrices of L^2 (p + d) on top of the product.

    Forming takes no more operations, but each unit's p d numbers are written and read twice: at L = 128 and p = d = 1024 that is dearer than the matrices. Twice the
    operations (T <= 2 p d / (p + d)) would be the rule if the gradient were formed for its norm alone.
    """
    (_, num_tokens, p), d = use.left_ULp.shape, use.right_ULd.shape[2]
    fits = p * d <= _ROOM * num_tokens * (p + d)
    return fits and (p * d <= _SMALL or _COLUMNS * p * d <= num_tokens**2 * (p + d))


def form(use: Use, shape: torch.Size, num_units: int) -> Tensor:
    """Gradient of each unit, [U, X]."""
    if isinstance(use, Outer):
        return torch.bmm(wide(use.left_ULp).mT, wide(use.right_ULd)).reshape(num_units, -1)
    if isinstance(use, Rows):
        right_ULd = wide(use.right_ULd)
        grad_UVd = right_ULd.new_zeros(num_units, *shape)
        flat_N = (use.ids_UL + torch.arange(num_units, device=use.ids_UL.device)[:, None] * shape[0]).flatten()
        grad_UVd.view(-1, shape[1]).index_add_(0, flat_N, right_ULd.reshape(len(flat_N), -1))
        return grad_UVd.view(num_units, -1)
    return use.grad_UX


def square_norm(groups: Iterable[Sequence[Use]], margin: float) -> Tensor:
    """Upper bound of the squared norm over several parameters for each unit, float64 [U].

    The norm of a kept gradient is that of the very numbers that are released. A Gram norm is computed on another path than the sum it bounds: both round
    relative to the sum of token norms, which tokens that cancel leave far above the norm itself, hence the second term.

    Args:
        groups: the uses of each parameter, or entry, at least one.
    """
    found: list[tuple[Tensor, Tensor]] = []
    sharing: dict[Any, list[Outer]] = {}
    for uses in groups:
        match uses:
            case [Outer() as outer]:
                sharing.setdefault(_identity(outer.right_ULd), []).append(outer)
            case [Outer() as outer, Rows() as rows]:
                (head_U, head_tokens_U), (rows_U, rows_tokens_U) = _outer_norm([outer]), _rows_norm(rows)
                found.append((head_U + rows_U + 2 * cross_term(outer, rows), head_tokens_U + rows_tokens_U))
            case _:
                found += [_rows_norm(use) if isinstance(use, Rows) else _kept_norm(use) for use in uses if not isinstance(use, Outer)]
    found += [_outer_norm(outers) for outers in sharing.values()]
    return torch.stack([(square_U + margin * tokens_U.square()).clamp_(min=0.0) for square_U, tokens_U in found]).sum(0)


def _identity(x: Tensor) -> tuple[Any, ...]:
    """Tells whether two tensors are one: the layers that read a block's input (query, key and value; gate and up) share it."""
    return (x.data_ptr(), x.shape, x.stride(), x.dtype)


def _outer_norm(uses: Sequence[Outer]) -> tuple[Tensor, Tensor]:
    """sum_st <l_s, l_t> <r_s, r_t> (Goodfellow; Li et al.), and sum_t |l_t| |r_t|, for parameters with the same right side: <l_s, l_t> is then added over them.

    The matrices are formed in strips of columns that end at the diagonal, tall times narrow: up to half of the operations, at twice the speed of whole products.
    The token sum of several is that of their lengths together, an upper bound of the root of their squares (Minkowski).
    """
    right_ULd = uses[0].right_ULd
    num_tokens = right_ULd.shape[1]
    width = max(_STRIP, num_tokens // 8)
    columns, blocks, diagonals = [], [], []
    for start in range(0, num_tokens, width):
        stop = min(start + width, num_tokens)
        product_USs = _products(right_ULd[:, :stop], right_ULd[:, start:stop])
        left_USs = None
        for use in uses:
            left_USs = _products(use.left_ULp[:, :stop], use.left_ULp[:, start:stop], left_USs)
        assert left_USs is not None
        product_USs.mul_(left_USs)
        block_Uss = product_USs[:, start:]
        columns.append(product_USs.sum(1))
        blocks.append(block_Uss.sum(1))
        diagonals.append(block_Uss.diagonal(dim1=1, dim2=2))
    column_UL, block_UL, diagonal_UL = (torch.cat(parts, dim=1) for parts in (columns, blocks, diagonals))
    square_U = 2 * column_UL.sum(1, dtype=torch.float64) - block_UL.sum(1, dtype=torch.float64)
    return square_U, diagonal_UL.clamp_(min=0.0).sqrt_().sum(1, dtype=torch.float64)


def _products(one_USp: Tensor, other_UTp: Tensor, added_UST: Tensor | None = None) -> Tensor:
    """Inner products of tokens, [U, S, T], in the working precision, added to what there is; a low-precision tensor is widened a tile at a time."""
    if one_USp.dtype is working(one_USp.dtype):
        return torch.bmm(one_USp, other_UTp.mT) if added_UST is None else added_UST.baddbmm_(one_USp, other_UTp.mT)
    for first, second in zip(torch.split(one_USp, _TILE, dim=2), torch.split(other_UTp, _TILE, dim=2), strict=True):
        first, second = wide(first), wide(second)
        added_UST = torch.bmm(first, second.mT) if added_UST is None else added_UST.baddbmm_(first, second.mT)
    assert added_UST is not None
    return added_UST


def _total(product_UST: Tensor) -> Tensor:
    """Rows in the working precision, their sum in float64."""
    return product_UST.sum(2).sum(1, dtype=torch.float64)


def _rows_norm(use: Rows) -> tuple[Tensor, Tensor]:
    """Segment sums over (unit, row): no V-sized scratch, one sort."""
    num_units, num_tokens = use.ids_UL.shape
    right_ULd = wide(use.right_ULd)
    owner_N = torch.arange(num_units, device=use.ids_UL.device).repeat_interleave(num_tokens)
    ids_N = use.ids_UL.flatten()
    keys, segment_N = torch.unique(owner_N * (ids_N.max() + 1) + ids_N, return_inverse=True)
    sums_Sd = right_ULd.new_zeros(len(keys), right_ULd.shape[2]).index_add_(0, segment_N, right_ULd.flatten(0, 1))
    owner_S = torch.empty_like(keys).scatter_(0, segment_N, owner_N)
    square_U = torch.zeros(num_units, dtype=torch.float64, device=keys.device).index_add_(0, owner_S, sums_Sd.square().sum(1).double())
    return square_U, right_ULd.square().sum(2).sqrt().sum(1, dtype=torch.float64)


def _kept_norm(use: Kept) -> tuple[Tensor, Tensor]:
    square_U = torch.zeros(len(use.grad_UX), dtype=torch.float64, device=use.grad_UX.device)
    for block_UX in torch.split(use.grad_UX, _BLOCK, dim=1):
        square_U += torch.linalg.vector_norm(block_UX, dim=1).double().square()
    return square_U, torch.zeros_like(square_U)


def cross_term(outer: Outer, rows: Rows) -> Tensor:
    """<head, embedding> = sum_st left[s, id_t] <right_s, rows_t> for a weight that is both; leaving it out understates the norm (PITFALLS 7)."""
    index_USR = rows.ids_UL[:, None, :].expand(-1, outer.left_ULp.shape[1], -1)
    return _total(wide(outer.left_ULp.gather(2, index_USR)) * _products(outer.right_ULd, rows.right_ULd))


def weighted_sum(uses: list[Use], shape: torch.Size, weight_U: Tensor, broken_U: Tensor | None) -> Tensor:
    """Forms sum_u weight_u gradient_u in the parameter's shape; a broken unit's rows are zeroed first, for 0 * NaN is NaN.

    Args:
        weight_U: in the working precision of the parameter, [U].
        broken_U: bool [U], or None where every unit is finite.
    """
    total: Tensor | None = None
    for use in sorted(uses, key=lambda use: isinstance(use, Rows)):  # products write every element; rows then need no zeros to start from
        if broken_U is not None:
            use = type(use)(*(part.masked_fill(broken_U.view(-1, *[1] * (part.dim() - 1)), 0) for part in use))
        total = _WEIGHTED[type(use)](use, shape, weight_U, total)
    return weight_U.new_zeros(shape) if total is None else total


def _weighted_kept(use: Kept, shape: torch.Size, weight_U: Tensor, total: Tensor | None) -> Tensor:
    added = (weight_U @ use.grad_UX.to(weight_U.dtype)).view(shape)
    return added if total is None else total.add_(added)


def _weighted_rows(use: Rows, shape: torch.Size, weight_U: Tensor, total: Tensor | None) -> Tensor:
    total = weight_U.new_zeros(shape) if total is None else total
    scaled_ULd = use.right_ULd.to(weight_U.dtype) * weight_U[:, None, None]
    return total.index_add_(0, use.ids_UL.flatten(), scaled_ULd.flatten(0, 1))


def _weighted_outer(use: Outer, shape: torch.Size, weight_U: Tensor, total: Tensor | None) -> Tensor:
    """The smaller factor takes the weights; the wider one is widened a tile at a time where it is of low precision."""
    weight_N1 = weight_U.repeat_interleave(use.left_ULp.shape[1])[:, None]
    left_Np, right_Nd = use.left_ULp.flatten(0, 1), use.right_ULd.flatten(0, 1)
    if left_Np.shape[1] < right_Nd.shape[1]:
        left_Np = left_Np * weight_N1
    else:
        right_Nd = right_Nd * weight_N1
    if left_Np.dtype is right_Nd.dtype is weight_U.dtype:
        return left_Np.T @ right_Nd if total is None else total.addmm_(left_Np.T, right_Nd)
    right_Nd = right_Nd.to(weight_U.dtype)
    total = weight_U.new_zeros(shape) if total is None else total
    for part_Pd, part_NP in zip(torch.split(total, _TILE), torch.split(left_Np, _TILE, dim=1), strict=True):
        part_Pd.addmm_(part_NP.T.to(weight_U.dtype), right_Nd)
    return total


_WEIGHTED: dict[type, Callable[[Any, torch.Size, Tensor, Tensor | None], Tensor]] = {
    Kept: _weighted_kept,
    Rows: _weighted_rows,
    Outer: _weighted_outer,
}


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Rules: layer type -> the uses its parameters make of (inputs, output gradients)


def _linear(module: Any, inputs_ULd: Tensor, grad_ULp: Tensor) -> Uses:
    if trains(module, "weight"):
        yield "weight", Outer(grad_ULp, inputs_ULd)
    if trains(module, "bias"):
        yield "bias", Kept(_token_sum(grad_ULp))


def _transposed_linear(module: Any, inputs_ULd: Tensor, grad_ULp: Tensor) -> Uses:
    """GPT-2's Conv1D: a linear layer whose weight is [d, p]."""
    if trains(module, "weight"):
        yield "weight", Outer(inputs_ULd, grad_ULp)
    if trains(module, "bias"):
        yield "bias", Kept(_token_sum(grad_ULp))


def _embedding(module: Any, ids_UL1: Tensor, grad_ULd: Tensor) -> Uses:
    if module.padding_idx is not None:
        grad_ULd = grad_ULd.masked_fill(ids_UL1 == module.padding_idx, 0)
    yield "weight", Rows(ids_UL1.squeeze(2).long(), grad_ULd)


def _scaled_embedding(module: Any, place_UL2: Tensor, grad_ULd: Tensor) -> Uses:
    """Row and scale of every token, as `_looked_up` found them."""
    ids_UL1, scale_UL1 = torch.split(place_UL2, 1, dim=2)
    yield from _embedding(module, ids_UL1.round().long(), wide(grad_ULd) * scale_UL1.to(working(grad_ULd.dtype)))


def _layer_norm(module: Any, inputs_ULd: Tensor, grad_ULd: Tensor) -> Uses:
    if trains(module, "weight"):
        normalised_ULd = functional.layer_norm(wide(inputs_ULd), inputs_ULd.shape[2:], eps=module.eps)
        yield "weight", Kept(normalised_ULd.mul_(grad_ULd).sum(1).flatten(1))
    if trains(module, "bias"):
        yield "bias", Kept(_token_sum(grad_ULd))


def _rms_norm(module: Any, inputs_ULd: Tensor, grad_ULd: Tensor) -> Uses:
    normalised_ULd = functional.rms_norm(wide(inputs_ULd), inputs_ULd.shape[2:], eps=module.eps)
    yield "weight", Kept(normalised_ULd.mul_(grad_ULd).sum(1).flatten(1))


def _scale_norm(module: nn.Module, inputs_ULd: Tensor, grad_ULd: Tensor) -> Uses:
    """Any layer that is linear in its one weight, such as a library's RMS norm, w or 1 + w: what it gives for weight 1 less what it gives for 0."""
    weight, inputs_ULd = module.get_parameter("weight"), wide(inputs_ULd)
    one, nothing = (
        torch.full(weight.shape, value, dtype=weight.dtype, device=inputs_ULd.device) for value in (1.0, 0.0)
    )  # whole, also where the weight is a shard
    with torch.no_grad():
        derivative_ULd = _forward(module, {"weight": one}, inputs_ULd)
        some_11d = _numbers(1, 1, *weight.shape, like=inputs_ULd)
        if bool((_forward(module, {"weight": nothing}, some_11d) != 0).any()):  # (1 + w) * x and not w * x; a token of the batch may be zero in both
            derivative_ULd = derivative_ULd - _forward(module, {"weight": nothing}, inputs_ULd)
    yield "weight", Kept(wide(derivative_ULd).mul_(grad_ULd).sum(1))


def _token_sum(grad_ULp: Tensor) -> Tensor:
    return grad_ULp.sum(1, dtype=working(grad_ULp.dtype)).flatten(1)


def trains(module: nn.Module, key: str) -> bool:
    """Says whether the layer holds a trained parameter of that name."""
    parameter = module._parameters.get(key)
    return parameter is not None and parameter.requires_grad


class _Alone(nn.Module):
    """Calls a layer without its hooks."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.forward(*args, **kwargs)


def _forward(module: nn.Module, parameters: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """What the layer computes with other parameters, its hooks left alone."""
    return torch.func.functional_call(_Alone(module), {f"inner.{name}": value for name, value in parameters.items()}, args, kwargs)


def only_input(_module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The single tensor a layer is called with."""
    given = (*args, *kwargs.values())
    return given[0] if len(given) == 1 and isinstance(given[0], Tensor) else None


@torch.no_grad()
def _looked_up(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Which row an embedding with a forward of its own takes for each token, and by which factor: it is asked for a weight of ones, then for one that counts."""
    weight = module.get_parameter("weight")
    ones_V1 = torch.ones(len(weight), 1, dtype=torch.float64, device=weight.device)
    asked = (ones_V1, ones_V1.cumsum(0), ones_V1.to(weight.dtype))
    one, counted, scale = (_forward(module, {"weight": weight_V1}, *args, **kwargs) for weight_V1 in asked)
    if not isinstance(scale, Tensor) or scale.shape[-1:] != (1,):
        return None
    return torch.cat([counted / one - 1, scale.double()], dim=-1)


class Rule(NamedTuple):
    """How a layer type is computed.

    Attributes:
        uses: (module, inputs [U, L, d], output gradients [U, L, p]) -> uses of its trained parameters by name.
        features_in, features_out: trailing dimensions of input and output that belong to one token; empty for token ids.
        read: the tensor to keep of a call's arguments, or None where the call is not one that the rule covers.
    """

    uses: Callable[[Any, Tensor, Tensor], Uses]
    features_in: Callable[[Any], tuple[int, ...]]
    features_out: Callable[[Any], tuple[int, ...]]
    read: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], Tensor | None] = only_input


_EMBEDDING = Rule(_embedding, lambda _: (), lambda m: (m.embedding_dim,))
_RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: Rule(_linear, lambda m: (m.in_features,), lambda m: (m.out_features,)),
    nn.Embedding: _EMBEDDING,
    nn.LayerNorm: Rule(_layer_norm, lambda m: m.normalized_shape, lambda m: m.normalized_shape),
    nn.RMSNorm: Rule(_rms_norm, lambda m: m.normalized_shape, lambda m: m.normalized_shape),
}
_CONV1D = Rule(_transposed_linear, lambda m: m.weight.shape[:1], lambda m: m.weight.shape[1:])
_SCALE_NORM = Rule(_scale_norm, lambda m: m.weight.shape, lambda m: m.weight.shape)
_SCALED_EMBEDDING = Rule(_scaled_embedding, lambda _: (2,), lambda m: (m.embedding_dim,), _looked_up)


def rule_of(module: nn.Module) -> Rule | None:
    """Finds the rule of a layer: torch's own by exact type, a library's by name; None where none is known or this instance computes something else."""
    rule = _candidate(module)
    return rule if rule is not None and agrees(module, rule) else None


def _candidate(module: nn.Module) -> Rule | None:
    kind = type(module)
    if kind in _RULES:
        return _RULES[kind]
    if (kind.__module__, kind.__qualname__) == ("transformers.pytorch_utils", "Conv1D"):
        return _CONV1D
    if module._modules:
        return None
    if isinstance(module, nn.Embedding) and kind.forward is not nn.Embedding.forward:
        return _SCALED_EMBEDDING
    if isinstance(module, nn.Embedding | nn.Linear | nn.LayerNorm | nn.RMSNorm):
        return next(rule for known, rule in _RULES.items() if isinstance(module, known))
    is_scale = "Norm" in kind.__qualname__ and list(module._parameters) == ["weight"]
    return _SCALE_NORM if is_scale and module.get_parameter("weight").dim() == 1 else None


_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}
"""Difference, relative to the largest number, that rounding explains; a wrong rule is wrong by a factor."""


def agrees(module: nn.Module, rule: Rule) -> bool:
    """Compares the rule with `torch.func` for each of two examples of three tokens, on fixed numbers that never come from a document."""
    held = {key: p.detach() for key, p in module._parameters.items() if p is not None}
    if any(type(p) is not Tensor for p in held.values()):
        return type(module) in _RULES  # a sharded weight cannot be called outside its own forward
    if rule is _SCALED_EMBEDDING:
        return True  # what it is called with is the library's choice; `reads_truly` looks at every first call instead
    like = next(iter(held.values()))
    held = {key: _numbers(*p.shape, like=wide(p)) if p.dim() == 1 else wide(p) for key, p in held.items()}
    features = rule.features_in(module)
    inputs = _numbers(2, 3, *features, like=wide(like)) if features else torch.tensor([[1, 0, 1], [0, 0, 1]], device=like.device) % len(like)
    grad = _numbers(2, 3, *rule.features_out(module), like=wide(like)).flip(1)
    try:
        expected = row_gradients(module, held, (inputs,), {}, grad)
        found = dict(rule.uses(module, inputs if features else inputs[:, :, None], grad))
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    return found.keys() == expected.keys() and all(_close(form(use, held[key].shape, 2), expected[key]) for key, use in found.items())


@torch.no_grad()
def reads_truly(module: nn.Module, inputs: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Says whether an embedding with a forward of its own gives, for this call, the rows and factors that were read from it."""
    weight = wide(module.get_parameter("weight"))
    ids, scale = inputs[..., 0], inputs[..., 1:]
    if not bool(((ids - ids.round()).abs() < 1e-3).all()) or not bool(((ids > -0.5) & (ids < len(weight) - 0.5)).all()):
        return False
    answer = _forward(module, {"weight": weight}, *args, **kwargs)
    return bool(torch.allclose(wide(answer), functional.embedding(ids.round().long(), weight) * scale.to(weight.dtype), rtol=0.02, atol=1e-6))


@torch.no_grad()
def row_gradients(
    module: nn.Module, held: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], grad_Bx: Tensor
) -> dict[str, Tensor]:
    """Gradients of a layer's trained parameters for each row of its arguments, by `torch.func`, [B, *shape] each.

    Args:
        held: values of the layer's parameters by name, trained ones and others.
        args, kwargs: the call; a tensor whose first dimension is B goes row by row, everything else goes whole.
        grad_Bx: gradient of the layer's output.

    Raises:
        RuntimeError: where `torch.func` cannot follow the layer, or the layer draws random numbers.
    """
    trained = {key: value for key, value in held.items() if module.get_parameter(key).requires_grad}
    fixed = {key: value for key, value in held.items() if key not in trained}
    flat, spec = tree_flatten((args, dict(kwargs)))
    along = [0 if is_rowwise(leaf, len(grad_Bx)) else None for leaf in flat]

    def gradient(grad_x: Tensor, *leaves: Any) -> dict[str, Tensor]:
        row = [leaf if dim is None else leaf[None] for leaf, dim in zip(leaves, along, strict=True)]
        row_args, row_kwargs = tree_unflatten(row, spec)

        def product(parameters: dict[str, Tensor]) -> Tensor:
            answer = _forward(module, {**fixed, **parameters}, *row_args, **row_kwargs)
            total: Tensor = (answer * grad_x[None]).sum()
            return total

        gradients: dict[str, Tensor] = torch.func.grad(product)(trained)
        return gradients

    found: dict[str, Tensor] = torch.func.vmap(gradient, in_dims=(0, *along))(grad_Bx, *flat)
    return found


@torch.no_grad()
def repeats(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, num_rows: int) -> bool:
    """Says whether a layer without a rule, called for each row by `torch.func`, has the gradients that plain autograd finds for one row alone."""
    held = {key: p.detach() for key, p in module._parameters.items() if p is not None}
    if not any(is_rowwise(leaf, num_rows) for leaf in tree_flatten((args, dict(kwargs)))[0]) or num_rows < 1:
        return False
    with torch.random.fork_rng(), torch.autocast(next(iter(held.values())).device.type, enabled=False):
        try:
            answer = _forward(module, held, *args, **kwargs)
            if not is_rowwise(answer, num_rows):
                return False
            grad = _numbers(*answer.shape, like=answer)
            found = row_gradients(module, held, args, kwargs, grad)
            expected = _first_row(module, held, args, kwargs, grad)
            return all(_close(found[key][:1], gradient[None]) for key, gradient in expected.items())
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError, KeyError):
            return False


def call_kind(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, num_rows: int) -> str:
    """Names what of a call decides whether it can be repeated row by row: two calls of one kind differ only in sizes and values of tensors.

    Returns:
        a name made of the layer's mode, the arguments' structure, their numbers of dimensions, which of them have a row each, and of flags; of no content.
    """
    leaves, spec = tree_flatten((args, dict(kwargs)))
    kinds = [
        f"{leaf.dim()}d {leaf.dtype} {is_rowwise(leaf, num_rows)}"
        if isinstance(leaf, Tensor)
        else repr(leaf)
        if isinstance(leaf, bool)
        else type(leaf).__name__
        for leaf in leaves
    ]
    return f"{module.training} {spec} {kinds}"


def _first_row(module: nn.Module, held: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any], grad_Bx: Tensor) -> dict[str, Tensor]:
    """The gradients of the first row inside the whole batch, by autograd."""
    with torch.enable_grad():
        leaves = {key: value.requires_grad_() for key, value in ((k, v.clone()) for k, v in held.items()) if module.get_parameter(key).requires_grad}
        answer = _forward(module, {**held, **leaves}, *args, **kwargs)
        grads = torch.autograd.grad((answer[0] * grad_Bx[0]).sum(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def is_rowwise(leaf: Any, num_rows: int) -> bool:
    """Says whether an argument is a tensor with one entry for each row."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == num_rows


def _numbers(*shape: int, like: Tensor) -> Tensor:
    """Fixed numbers in [-1, 1] without visible order."""
    count = torch.arange(1, 1 + math.prod(shape), dtype=torch.float64, device=like.device)
    return (count * 0.6180339887).frac().mul(2).sub(1).view(shape).to(like)


def _close(found: Tensor, expected: Tensor) -> bool:
    found, expected = wide(found).flatten(1), wide(expected).flatten(1)
    return bool((found - expected).abs().max() <= _TOLERANCE[expected.dtype] * expected.abs().max().clamp(min=1e-12))
