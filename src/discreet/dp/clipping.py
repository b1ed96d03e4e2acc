"""Exact per-unit clipping in one forward and one backward pass: gradients -> ClippedSum, whose L2 sensitivity to one unit is `clip_norm`.

For a layer y = x W^T the gradient of one document is G^T A, the product of the output gradients and the layer's inputs. So it is enough to book-keep A and G:

    forward    every trained layer with a rule stores A and computes with a *detached* weight: autograd never forms a weight gradient for it
    backward   one call of autograd for the G of all those layers; it stops by itself where nothing below trains
    norms      per unit, from A and G alone (the Gram trick) or from the unit's own gradient, whichever takes fewer operations
    sum        one weighted product a layer, A^T diag(c) G, with c = min(1, clip_norm / norm)

The rules are in `rules.py`, a table from layer type to the *uses* its parameters make of (A, G). Uses of one parameter, in one module or in several (tied embedding
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

Also: per-layer and group-wise clipping (`groups`), normalised gradients (`Weighing`), units larger than a micro-batch (`clipped_unit`). A compiled model is run
eagerly, a reentrant checkpoint as a non-reentrant one.

A model sharded by FSDP2 (`fully_shard`): every rank calls with its own units, and each gets its shard of the sum over all ranks. Weights are gathered for the forward and
the backward as without privacy; norms and sums are made of A and G alone, so nothing is gathered a third time, and each parameter's sum is scattered as soon as it is
there. A rank without units calls `in_step`. A sharded layer needs a rule: there is no fallback.

Does not cover: tensor parallelism (refused), fused GPU kernels, compiled speed, custom autograd functions that mix rows without the probe noticing.

Legend: B rows of the batch, T tokens of a row, D documents, U units, L tokens of a unit (padded), d and p features in and out, V rows of an embedding.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import checkpoint as torch_checkpoint
from torch.utils._pytree import tree_map

from discreet.dp import rules
from discreet.dp.combine import Combine
from discreet.dp.rules import MARGIN, Kept, Rule, Use

_LOG = logging.getLogger(__name__)

_STABILITY = 0.01
"""What `Weighing.NORMALISE` adds to a norm (Bu et al. 2023, arXiv 2206.07136, eq. 3.4)."""


class Weighing(Enum):
    """What a unit's gradient is multiplied with."""

    CLIP = "min(1, clip_norm / norm)"
    NORMALISE = "clip_norm / (norm + 0.01): automatic clipping, in which clip_norm only scales the step"


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ClippedSum:
    """A sum over privacy units, each contributing a vector of L2 norm at most `clip_norm`.

    How many units it holds is private and is not kept. Built by `clipped_sum` and `zero`; sums over the micro-batches of one step are added with `+` or, in place, `+=`.

    Attributes:
        gradients: name of every trained parameter -> sum, float32 (float64 for a float64 parameter), the parameter's shape.
        clip_norm: the L2 sensitivity to adding or removing one unit.
        votes: number of units with norm <= clip_norm, less half the number of units: sensitivity 1/2, private until `adaptive.update` noises it.
    """

    gradients: Mapping[str, Tensor]
    clip_norm: float
    votes: float = 0.0

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """Adds the sum of other units.

        Raises:
            ValueError: when clip norms or parameters differ. A unit must not be in both: keep its documents in one micro-batch.
        """
        if not isinstance(other, ClippedSum):
            return NotImplemented
        self._check_alike(other)
        gradients = {name: mine + other.gradients[name] for name, mine in self.gradients.items()}
        return ClippedSum(gradients=gradients, clip_norm=self.clip_norm, votes=self.votes + other.votes)

    def __iadd__(self, other: ClippedSum) -> ClippedSum:
        """Adds in place, as `+` otherwise: the tensors of the left side are changed."""
        if not isinstance(other, ClippedSum):
            return NotImplemented
        self._check_alike(other)
        for name, mine in self.gradients.items():
            mine.add_(other.gradients[name])
        return ClippedSum(gradients=self.gradients, clip_norm=self.clip_norm, votes=self.votes + other.votes)

    def _check_alike(self, other: ClippedSum) -> None:
        if self.clip_norm != other.clip_norm:
            raise ValueError(f"Expected equal clip norms, got {self.clip_norm} and {other.clip_norm}.")
        if self.gradients.keys() != other.gradients.keys():
            raise ValueError("Expected sums over the same parameters.")

    @staticmethod
    def zero(model: nn.Module, *, clip_norm: float) -> ClippedSum:
        """Returns the sum over no units, for an empty Poisson batch.

        Raises:
            ValueError: when `clip_norm` is not positive and finite, or no parameter requires grad.
        """
        _check_clip_norm(clip_norm)
        parameters = _trained(model)  # zeros of a sharded parameter are its shard's
        return ClippedSum(gradients={name: torch.zeros_like(p, dtype=rules.working(p.dtype)) for name, p in parameters.items()}, clip_norm=clip_norm)


def clipped_sum(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    units: Tensor | Sequence[int],
    *,
    clip_norm: float,
    documents: Tensor | None = None,
    combine: Combine = Combine.SUM,
    weighing: Weighing = Weighing.CLIP,
    groups: Mapping[str, str] | None = None,
) -> ClippedSum:
    """Computes the sum over units of clip(gradient of the unit's combined losses).

    Args:
        model: any module; parameters that require grad are trained, the rest is frozen. Its parameters and their `.grad` are left as they were.
        loss_fn: `loss_fn(model, batch)` gives one loss per document, [D], each a function of its own document alone (a sum, or a mean over that document's own
            tokens). Never divide by anything that depends on the other documents.
        batch: whatever `loss_fn` takes; its first dimension is the document, one a row, unless `documents` says otherwise.
        units: int [D], the privacy unit of each document; documents with equal values are clipped as one. All documents of a unit must be in one call.
        clip_norm: > 0, finite.
        documents: int64 [B, T], the document (0..D-1) of each token of packed rows, -1 for padding. Attention must not cross documents.
        combine: whether a unit's documents are added or averaged.
        weighing: whether gradients longer than `clip_norm` are shortened, or all are brought to nearly that length.
        groups: name of every trained parameter -> label; each of the G groups is weighed by its own norm against clip_norm / sqrt(G), so that a unit still
            contributes at most `clip_norm` in all. Default: one group (flat clipping). `groups_by_layer` gives one a layer.

    Returns:
        the sum over all trained parameters; zeros for a parameter that no loss reaches.

    Raises:
        ValueError: when `clip_norm` is not positive and finite; losses are not [D]; no parameter is trained; a layer mixes documents of different units.
    """
    parameters = _trained(model)
    how = _How.of(parameters, clip_norm=clip_norm, weighing=weighing, groups=groups)
    _refuse_mixing_layers(model)
    layout = _Layout.of(units, documents, device=next(iter(parameters.values())).device)
    if layout.num_documents == 0:
        if _is_sharded(parameters):
            raise ValueError("Expected a document on every rank of a sharded model; a rank without one calls in_step.")
        return ClippedSum.zero(model, clip_norm=clip_norm)
    return _clipped(model, parameters, loss_fn, batch, layout, how=how, combine=combine)


def in_step(model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, *, clip_norm: float) -> ClippedSum:
    """Takes part in the `clipped_sum` of the other ranks of a sharded model, and contributes nothing.

    Args:
        batch: of one document that is nobody's, such as two tokens of padding; it is computed so that this rank gathers and scatters when the others do.

    Returns:
        this rank's shard of the sum over the units of the other ranks.

    Raises:
        ValueError: as for `clipped_sum`.
    """
    parameters = _trained(model)
    how = _How.of(parameters, clip_norm=clip_norm, weighing=Weighing.CLIP, groups=None)
    layout = _Layout.of([0], None, device=next(iter(parameters.values())).device)
    return _clipped(model, parameters, loss_fn, batch, layout, how=how, combine=Combine.SUM, counts=False)


def _clipped(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batch: Any,
    layout: _Layout,
    *,
    how: _How,
    combine: Combine,
    counts: bool = True,
) -> ClippedSum:
    """One forward, one backward, norms and sums; nothing of it is added where the units do not count."""
    with _Recorder(model, parameters, layout) as recorder:
        with _plain_execution(model):
            losses = loss_fn(model, batch)
        recorder.stop()
        _check_losses(losses, layout.num_documents)
        losses = layout.combined(losses, combine)
        recorder.probe(losses)
        rest = _one_unit_at_a_time(losses, recorder.without_rule(losses), layout)
        uses = recorder.differentiate(losses, rest)
    del losses
    if any(not bool(use.grad_UX.isfinite().all()) for kept in rest.values() for use in kept) and layout.num_units > 1:
        return _isolated(model, loss_fn, batch, layout, how=how, combine=combine)
    return _clip_and_add(uses, parameters, layout.num_units, how, counts=counts)


def clipped_unit(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    chunks: Iterable[Any],
    *,
    clip_norm: float,
    combine: Combine = Combine.SUM,
    weighing: Weighing = Weighing.CLIP,
    groups: Mapping[str, str] | None = None,
) -> ClippedSum:
    """Computes what one unit contributes whose documents do not fit into one micro-batch: its gradient is added up over chunks, then clipped once.

    Args:
        chunks: batches of whole documents, all of one unit; taken one at a time.
        loss_fn, clip_norm, combine, weighing, groups: as for `clipped_sum`; the mean is over the documents of all chunks.

    Returns:
        the same as `clipped_sum` over all documents at once, to rounding; zeros for a unit without documents or with one that is not finite.

    Raises:
        ValueError: as for `clipped_sum`.
    """
    parameters = _trained(model)
    if _is_sharded(parameters):
        raise ValueError("Expected a model that is not sharded; on a sharded one a unit is computed whole, by clipped_sum.")
    how = _How.of(parameters, clip_norm=clip_norm, weighing=weighing, groups=groups)
    _refuse_mixing_layers(model)
    total = {name: torch.zeros_like(p, dtype=rules.working(p.dtype)) for name, p in parameters.items()}
    num_documents = 0
    for chunk in chunks:
        with _plain_execution(model):
            losses = loss_fn(model, chunk)
        if not isinstance(losses, Tensor) or losses.dim() != 1:
            raise ValueError("Expected loss_fn to give one loss per document, shape [D].")
        num_documents += len(losses)
        grads = torch.autograd.grad(losses.sum(), list(parameters.values()), allow_unused=True) if losses.requires_grad else [None] * len(parameters)
        for name, grad in zip(parameters, grads, strict=True):
            if grad is not None:
                total[name] += grad
    if num_documents == 0:
        return ClippedSum.zero(model, clip_norm=clip_norm)
    divisor = num_documents if combine is Combine.MEAN else 1
    uses: dict[str, list[Use]] = {name: [Kept(sum_.div_(divisor).view(1, -1))] for name, sum_ in total.items()}
    return _clip_and_add(uses, parameters, 1, how)


def groups_by_layer(model: nn.Module) -> dict[str, str]:
    """Names one group for each layer that holds trained parameters: per-layer clipping."""
    return {name: name.rpartition(".")[0] for name in _trained(model)}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _How:
    """How units are weighed.

    Attributes:
        labels: of the groups, sorted.
    """

    clip_norm: float
    weighing: Weighing
    groups: Mapping[str, str]
    labels: tuple[str, ...]

    @staticmethod
    def of(parameters: Mapping[str, nn.Parameter], *, clip_norm: float, weighing: Weighing, groups: Mapping[str, str] | None) -> _How:
        """Validates the request.

        Raises:
            ValueError: when `clip_norm` is not positive and finite, or `groups` leaves a trained parameter out.
        """
        _check_clip_norm(clip_norm)
        groups = dict.fromkeys(parameters, "") if groups is None else groups
        missing = sorted(parameters.keys() - groups.keys())
        if missing:
            raise ValueError(f"Expected groups to name every trained parameter, but {missing[0]!r} is in none.")
        return _How(clip_norm=clip_norm, weighing=weighing, groups=groups, labels=tuple(sorted({groups[name] for name in parameters})))

    def label_of(self, name: str) -> str:
        """The group of a parameter."""
        return self.groups[name]

    def weight(self, norm_U: Tensor) -> Tensor:
        """Weights of the units in a group, float64 [U]."""
        share = self.clip_norm / math.sqrt(len(self.labels))
        if len(self.labels) > 1:
            share *= 1 - 1e-7  # squares of rounded shares must not add up to more
        if self.weighing is Weighing.NORMALISE:
            return share / (norm_U + _STABILITY)
        return share / norm_U.clamp(min=share)


@contextmanager
def _plain_execution(model: nn.Module) -> Iterator[None]:
    """Runs compiled models eagerly, so that their layers can be recorded, and reentrant checkpoints as non-reentrant ones, which compute the same."""
    is_compiled = any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules())
    reentrant = torch_checkpoint.CheckpointFunction
    torch_checkpoint.CheckpointFunction = _NonReentrant  # type: ignore[misc, assignment]  # looked up by name at every checkpoint, put back below
    try:
        with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
            yield
    finally:
        torch_checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]  # see above


class _NonReentrant:
    """Stands in for torch's reentrant checkpoint, whose backward cannot be asked for the gradients of layers."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Replays `function` in the backward."""
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


# --------------------------------------------------------------------------------------------------------------------------------------------------
# From uses to the clipped sum


def _clip_and_add(
    uses: dict[str, list[Use]], parameters: Mapping[str, nn.Parameter], num_units: int, how: _How, *, counts: bool = True
) -> ClippedSum:
    """Weighs every unit by its norm, in float64 for the norms and in the working precision for the sum."""
    device = next(iter(parameters.values())).device
    margin = MARGIN * max(_rounding(parameter) for parameter in parameters.values())
    by_group: dict[str, dict[str, list[Use]]] = {label: {} for label in how.labels}
    for name in list(uses):
        by_group[how.label_of(name)][name] = rules.combine(uses.pop(name), parameters[name].shape, num_units)
    entries = {label: rules.entries(of_group) for label, of_group in by_group.items()}
    del by_group
    nothing_U = torch.zeros(num_units, dtype=torch.float64, device=device)
    square_by_group = {label: rules.square_norm([each.uses for each in of], margin) if of else nothing_U for label, of in entries.items()}
    norm_U = torch.stack(list(square_by_group.values())).sum(0).sqrt() * (1 + margin)
    finite_U = norm_U.isfinite()
    broken_U = None if bool(finite_U.all()) else ~finite_U
    weight_by_group = {
        label: torch.where(finite_U & counts, how.weight(square_U.sqrt() * (1 + margin)), 0.0) for label, square_U in square_by_group.items()
    }
    entry_of = {name: each for of in entries.values() for each in of for name in each.names}
    del entries, uses
    sums: dict[str, Tensor] = {}
    for (
        name,
        parameter,
    ) in parameters.items():  # in this order on every rank: each is freed as soon as it is added up, and scattered where it is sharded
        dtype = rules.working(parameter.dtype)
        if name in entry_of:
            each = entry_of[name]
            shapes = [parameters[other].shape for other in each.names]
            whole = shapes[0] if len(shapes) == 1 else torch.Size([sum(shape.numel() for shape in shapes)])
            total = rules.weighted_sum(each.uses, whole, weight_by_group[how.label_of(name)].to(dtype), broken_U)
            parts = torch.split(total.flatten(), [shape.numel() for shape in shapes])
            for other, part, shape in zip(each.names, parts, shapes, strict=True):
                sums[other] = part.view(shape)
                del entry_of[other]
            del each, total, parts
        sums[name] = _scattered(sums.get(name), parameter, dtype)
    sums = {name: sums[name] for name in parameters}
    votes = float(((norm_U <= how.clip_norm).double() - 0.5).sum()) if counts else 0.0
    return ClippedSum(gradients=sums, clip_norm=how.clip_norm, votes=votes)


def _scattered(total: Tensor | None, parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """This rank's part of a parameter's sum: all of it, or its shard of the sum over the ranks; zero where no loss reaches the parameter."""
    total = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device) if total is None else total
    if not _is_shard(parameter):
        return total
    from torch.distributed.tensor import DTensor, Partial

    sharded: Any = parameter
    partial = DTensor.from_local(total, sharded.device_mesh, [Partial()] * sharded.device_mesh.ndim)
    scattered: Tensor = partial.redistribute(placements=sharded.placements)
    return scattered


def _is_shard(parameter: Tensor) -> bool:
    return hasattr(parameter, "device_mesh")


def _is_sharded(parameters: Mapping[str, nn.Parameter]) -> bool:
    return any(_is_shard(parameter) for parameter in parameters.values())


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Book-keeping


class _Tap(NamedTuple):
    """One call of a layer with a rule: its inputs, and the edge of the graph where its output gradient arrives."""

    module: nn.Module
    name: str
    rule: Rule
    inputs: Tensor
    version: int
    place: _Place
    edge: GradientEdge
    call: _Call | None


class _Call(NamedTuple):
    """A call of a layer without a rule, to be repeated row by row."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Seen(NamedTuple):
    """What earlier calls learned about a model: rules by layer, layers that passed the probe, layers whose calls did not fit the batch, calls that were checked."""

    rules: WeakKeyDictionary[nn.Module, Rule]
    probes_left: dict[str, int]
    shared: set[str]
    checked: set[str]
    logged: set[str]


_ROW_BY_ROW = Rule(lambda *_: iter(()), lambda _: (), lambda _: ())
"""Marks a layer without a rule whose calls can be repeated for each row (`rules.row_gradients`)."""

_PROBES = 2
"""A probe of a layer that no chosen loss reaches (a LoRA matrix below one that is still zero) says nothing; it is repeated this often."""

_SEEN: WeakKeyDictionary[nn.Module, _Seen] = WeakKeyDictionary()


class _Recorder:
    """Hooks for one forward and its backward; leaves no trace on the model."""

    def __init__(self, model: nn.Module, parameters: Mapping[str, nn.Parameter], layout: _Layout) -> None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._names: dict[tuple[nn.Module, str], str] = {}
        self._sharded, self._whole = _is_sharded(parameters), dict(names)
        self._model, self._parameters = model, parameters
        self._layout = layout
        self._taps: list[_Tap] = []
        self._recording = True
        self._pending: dict[nn.Module, tuple[Rule, Tensor | None, _Place, _Call | None]] = {}
        self._swapped: dict[nn.Module, dict[str, nn.Parameter]] = {}
        self._seen = _SEEN.setdefault(model, _Seen(WeakKeyDictionary(), {}, set(), set(), set()))
        self._hooks = ExitStack()
        for name, module in model.named_modules():
            held = {(module, key): names[id(parameter)] for key, parameter in module._parameters.items() if id(parameter) in names}
            if held:
                self._names |= held
                if name not in self._seen.shared:
                    self._hook(name, module)

    def _hook(self, name: str, module: nn.Module) -> None:
        if module not in self._seen.rules:
            self._seen.rules[module] = self._find(name, module)
        before = module.register_forward_pre_hook(lambda m, args, kwargs: self._before(name, m, args, kwargs), with_kwargs=True)
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

    def _find(self, name: str, module: nn.Module) -> Rule:
        rule = rules.rule_of(module)
        if rule is None:
            self._log(name, module, "is computed row by row")
        return rule or _ROW_BY_ROW

    def _log(self, name: str, module: nn.Module, what: str) -> None:
        if name not in self._seen.logged:
            self._seen.logged.add(name)
            _LOG.warning("Layer %r (%s) has no clipping rule: its gradient %s, exactly but slower.", name, type(module).__name__, what)

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Lets the layer compute with detached weights when its input is laid out as the batch is; leaves it to autograd otherwise."""
        rule = self._seen.rules[module]
        if self._sharded:
            self._note_whole(name, module, rule)
        if not torch.is_grad_enabled() or name in self._seen.shared:
            return
        found = self._row_by_row(name, module, args, kwargs) if rule is _ROW_BY_ROW else self._read(name, module, rule, args, kwargs)
        if found is None:
            self._seen.shared.add(name)
            return
        if module in self._swapped:  # a replay that checkpointing cut short
            self._restore(module)
        trained = {key: p for key, p in module._parameters.items() if p is not None and p.requires_grad}
        self._swapped[module] = trained
        for key, parameter in trained.items():
            module._parameters[key] = parameter.detach()  # type: ignore[assignment]  # a tensor for the length of one forward: autograd must not see the parameter
        self._pending[module] = (rule, *found)

    def _note_whole(self, name: str, module: nn.Module, rule: Rule) -> None:
        """Remembers the gathered parameters of a sharded layer, which are other objects than its shards.

        Raises:
            ValueError: when the layer has no rule, or computes on shards itself (tensor parallelism).
        """
        if rule is _ROW_BY_ROW or any(p is not None and p.requires_grad and _is_shard(p) for p in module._parameters.values()):
            raise ValueError(
                f"Expected a rule and whole weights for every trained layer of a sharded model, but {name!r} ({type(module).__name__}) has not."
            )
        self._whole |= {id(p): self._names[module, key] for key, p in module._parameters.items() if (module, key) in self._names}

    def _read(self, name: str, module: nn.Module, rule: Rule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, _Place, None] | None:
        """The input of a layer with a rule and how it lies."""
        inputs = rule.read(module, args, kwargs)
        place = None if inputs is None else self._layout.place(inputs.shape, rule.features_in(module))
        if inputs is None or place is None:
            return None
        if rule.read is not rules.only_input and name not in self._seen.checked:
            if not rules.reads_truly(module, inputs, args, kwargs):
                return None
            self._seen.checked.add(name)
        return inputs, place, None

    def _row_by_row(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[None, _Place, _Call] | None:
        """The call of a layer without a rule, if `torch.func` repeats it for each row with the same answer and nothing else in it is trained."""
        own = {id(p) for p in module._parameters.values()}
        if len(self._layout.leading) != 1 or any(p.requires_grad and id(p) not in own for p in module.parameters()):
            return None
        detached = tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, (args, dict(kwargs)))
        num_rows = self._layout.leading[0]
        kind = f"{name} {rules.call_kind(module, *detached, num_rows=num_rows)}"
        if kind not in self._seen.checked:
            if not rules.repeats(module, *detached, num_rows=num_rows):
                return None
            if num_rows > 1:  # one row alone cannot show that rows mix
                self._seen.checked.add(kind)
        return None, _Place.OWN, _Call(*detached)

    def _after(self, name: str, module: nn.Module, output: Tensor) -> Tensor | None:
        """Gives the layer its parameters back and notes where its output gradient will arrive."""
        if module not in self._pending:
            return None
        rule, inputs, place, call = self._pending.pop(module)
        self._restore(module)
        starts_graph = not output.requires_grad
        if starts_graph:
            output = output.detach().requires_grad_()
        tapped = self._layout.spread(output, place)
        if self._recording:
            kept = tapped.detach()[:0] if inputs is None else inputs.detach()
            self._taps.append(_Tap(module, name, rule, kept, kept._version, place, get_gradient_edge(tapped), call))
        if starts_graph:
            return tapped.clone()  # a leaf must not be changed in place; the copy may
        return tapped if tapped is not output else None

    def without_rule(self, losses: Tensor) -> dict[str, nn.Parameter]:
        """Trained parameters that are left to autograd, one unit at a time; logs their layers once."""
        reached = _reached(losses)
        if self._sharded:
            if any(isinstance(leaf, nn.Parameter) for leaf in reached):
                named = sorted({self._whole.get(id(leaf), "one that no layer was called with") for leaf in reached if isinstance(leaf, nn.Parameter)})
                raise ValueError(
                    f"Expected every trained parameter of a sharded model to be used by its own layer, but this is not so for {named[0]!r}."
                )
            return {}
        found = {self._whole[id(leaf)]: self._parameters[self._whole[id(leaf)]] for leaf in reached if id(leaf) in self._whole}
        for name in found:
            layer = name.rpartition(".")[0]
            self._log(layer, self._model.get_submodule(layer), "takes one backward pass a unit")
        return found

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
        if self._sharded:
            return  # a backward of one rank alone would wait for the others: `sharded` in `train/parallel.py` probes the model before it shards it
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

    def differentiate(self, losses: Tensor, rest: Mapping[str, list[Kept]]) -> dict[str, list[Use]]:
        """Runs the one backward pass and returns the uses of every parameter."""
        uses: dict[str, list[Use]] = {name: list(kept) for name, kept in rest.items()}
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

    def _book(self, tap: _Tap, grad: Tensor, uses: dict[str, list[Use]]) -> None:
        if tap.call is not None:
            held = {key: p.detach() for key, p in tap.module._parameters.items() if p is not None}
            for key, grad_BX in rules.row_gradients(tap.module, held, *tap.call, grad).items():
                grad_UX = self._layout.group(rules.wide(grad_BX).flatten(1), (held[key].numel(),)).sum(1)
                uses.setdefault(self._names[tap.module, key], []).append(Kept(grad_UX))
            return
        inputs_ULd = self._layout.group(self._layout.spread(tap.inputs, tap.place), tap.rule.features_in(tap.module))
        grad_ULp = self._layout.group(grad, tap.rule.features_out(tap.module))
        for key, use in tap.rule.uses(tap.module, inputs_ULd, grad_ULp):
            uses.setdefault(self._names[tap.module, key], []).append(use)


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

    def combined(self, losses_D: Tensor, combine: Combine) -> Tensor:
        """Losses whose sum over a unit is what the unit's gradient is taken of."""
        if combine is Combine.SUM:
            return losses_D
        return losses_D / torch.bincount(self.unit_D, minlength=self.num_units).to(losses_D.dtype)[self.unit_D]

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
        """Lays out a tensor by unit: [U, L, features]; tokens a unit does not have are zero."""
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


def _reached(losses: Tensor) -> list[Tensor]:
    """Leaves that the graph of the losses still leads to: parameters that no rule has taken out of it, and inputs that require grad."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    open_nodes: list[Any] = [losses.grad_fn]
    while open_nodes:
        node = open_nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        open_nodes.extend(following for following, _ in node.next_functions)
    return list(found.values())


def _one_unit_at_a_time(losses: Tensor, rest: Mapping[str, nn.Parameter], layout: _Layout) -> dict[str, list[Kept]]:
    """Gradients that autograd has to form: one backward pass a unit through the graph that is already there."""
    if not rest:
        return {}
    rows: dict[str, list[Tensor]] = {name: [] for name in rest}
    for unit in range(layout.num_units):
        loss = losses[layout.unit_D == unit].sum()
        grads = torch.autograd.grad(loss, list(rest.values()), retain_graph=True, allow_unused=True)
        for (name, parameter), grad in zip(rest.items(), grads, strict=True):
            grad = torch.zeros_like(parameter) if grad is None else grad
            rows[name].append(grad.to(rules.working(grad.dtype)).flatten())
    return {name: [Kept(torch.stack(grads))] for name, grads in rows.items()}


def _isolated(
    model: nn.Module, loss_fn: Callable[[nn.Module, Any], Tensor], batch: Any, layout: _Layout, *, how: _How, combine: Combine
) -> ClippedSum:
    """Computes each unit in a batch of its own: a NaN of one would otherwise reach the autograd gradients of the others as 0 * NaN.

    Raises:
        ValueError: when the batch is not made of tensors with the document as first dimension, so that it cannot be split.
    """
    total = ClippedSum.zero(model, clip_norm=how.clip_norm)
    given: Any = {"clip_norm": how.clip_norm, "combine": combine, "weighing": how.weighing, "groups": how.groups}
    for unit in range(layout.num_units):
        rows = torch.nonzero(layout.unit_D == unit).squeeze(1)
        total = total + clipped_sum(model, loss_fn, _take(batch, rows, layout), torch.zeros_like(rows), **given)
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


def _rounding(parameter: Tensor) -> float:
    """Relative rounding of the products that this parameter's norm and sum are made of, with what `torch.set_float32_matmul_precision` allows."""
    if rules.working(parameter.dtype) is torch.float64:
        return float(torch.finfo(torch.float64).eps)
    return {"highest": float(torch.finfo(torch.float32).eps), "high": 2.0**-10, "medium": 2.0**-7}[torch.get_float32_matmul_precision()]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    sharded: Iterable[Any] = [module for module in model.modules() if hasattr(type(module), "reshard")]
    for module in sharded:  # a forward without a backward leaves the root's weights gathered: other objects than the shards that are trained
        module.reshard()
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
    config = vars(module).get("config")
    if getattr(config, "output_router_logits", False) is True and bool(getattr(config, "router_aux_loss_coef", None)):
        return "adds a balancing loss over the batch; set output_router_logits=False"
    return ""
