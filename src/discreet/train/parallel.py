"""One private step on several ranks (`torchrun`): every rank holds the model, computes its share of the sampled units, and one all-reduce adds everything up.

    draw      every rank makes the same Poisson draw from the run key: one coin a unit, so inclusion is independent across units and ranks by construction, and the
              sample does not depend on the number of ranks
    share     the micro-batches go to the ranks, largest first to the least loaded; a unit is in one micro-batch, hence on one rank
    shards    with `[run] weights = "sharded"` FSDP2 splits weights, sums, noise and optimiser state over the ranks. Every rank then computes equally many micro-batches, for
              weights are gathered together: one that runs out takes part with a document of nobody, whatever was drawn
    noise     every parameter has one owner, which adds the parameter's noise to its own partial sum; the all-reduce then gives sum + noise to all

Sensitivity: a unit contributes to the partial sum of exactly one rank, with norm at most clip_norm, so the sum over ranks has sensitivity clip_norm like the sum of
one rank. Each coordinate is noised by exactly one rank with the full standard deviation, from the stream that the parameter's name forks: the noise is the very draw
of a run on one rank, and no two coordinates share one. Partial sums travel between the ranks of one operator; they are not released.

Guarantees: N ranks take the step of one rank, up to the rounding of the order of additions; a rank without a micro-batch takes part with zero, and an empty sample is
noised and counted, so ranks stay in step whatever was drawn; replicas stay equal to the bit, for an all-reduce gives every rank the same bytes.

Sources: Li et al. 2020, "PyTorch Distributed", arXiv 2006.15704; Zhao et al. 2023, "PyTorch FSDP", arXiv 2304.11277. Does not cover: tensor parallelism, ranks that do not trust each other (federated/), ranks that fail:
`torchrun` ends the others, and the run resumes from its checkpoint, on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from discreet.dp import adaptive, clipping, noise
from discreet.dp.clipping import ClippedSum
from discreet.dp.combine import Combine
from discreet.dp.mechanism import Plan
from discreet.dp.noise import Memory, Noised
from discreet.keys import Key, Stream
from discreet.train.course import Course
from discreet.train.step import (
    MicroBatch,
    PrivateCorpus,
    Rows,
    Units,
    Work,
    arranged,
    document_losses,
    drawn,
    padded,
    padded_size,
    summed,
    update,
    work,
)

_PATIENCE = timedelta(hours=24)
"""How long a rank waits for another: the slowest micro-batch, or a checkpoint on a slow disk, not a deadlock."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """This process among those that train together.

    Attributes:
        rank: from 0; rank 0 writes.
        size: number of processes, >= 1.
    """

    rank: int
    size: int

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size:
            raise ValueError(f"Expected 0 <= rank={self.rank} < size={self.size}.")

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def announce(self, go: bool) -> None:
        """Tells the other ranks, who `follow`, whether to train."""
        if self.size > 1:
            dist.broadcast(torch.tensor([int(go)]), 0)

    def follow(self) -> bool:
        """Waits for what rank 0 announces."""
        told = torch.zeros(1, dtype=torch.long)
        dist.broadcast(told, 0)
        return bool(told)

    def of_first(self, tensor: Tensor) -> Tensor:
        """Returns rank 0's tensor, on the CPU; the others give one of its shape and type, which is overwritten."""
        if self.size > 1:
            dist.broadcast(tensor, 0)
        return tensor

    def wait(self) -> None:
        """Returns when every rank has called it."""
        if self.size > 1:
            dist.barrier()


ALONE = Ranks(rank=0, size=1)


@contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Joins the group that `torchrun` announces in the environment; without it the process is alone.

    Args:
        device: "cpu" (gloo) or "cuda" (nccl, one GPU a rank).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size())
    finally:
        dist.destroy_process_group()


def sharded(model: nn.Module, *, device: str) -> nn.Module:
    """Splits a model's weights over the ranks, block by block (FSDP2), after looking at its layers while they are whole.

    Args:
        model: as `clipped_sum` takes it; changed in place.

    Raises:
        ValueError: when a layer mixes documents, or a trained layer has no rule.
    """
    batch = padded([torch.zeros(3, dtype=torch.long), torch.ones(2, dtype=torch.long)])
    for _ in range(2):
        clipping.clipped_sum(model, document_losses, batch, [0, 1], clip_norm=1.0)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name in lists:
        if not any(name.startswith(f"{other}.") for other in lists):
            for block in model.get_submodule(name).children():
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def resharded(model: nn.Module) -> None:
    """Puts the shards back that a forward without a backward has left gathered; nothing for a model that is not sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(tensor: Any) -> Tensor:
    """The whole of a tensor that may be a shard; every rank calls it."""
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found


def split_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The shard of a whole tensor that lies where a parameter's does."""
    if not isinstance(parameter, DTensor):
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)  # every rank has the whole


def any_moved(before: Mapping[str, Tensor], after: Mapping[str, Tensor], ranks: Ranks) -> bool:
    """Says whether a parameter differs on any rank; every rank calls it."""
    moved = any(not torch.equal(_local(before[name]), _local(parameter)) for name, parameter in after.items())
    if ranks.size == 1:
        return moved
    told = torch.tensor([int(moved)])
    dist.all_reduce(told)
    return bool(told)


def _local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return found


def private_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    corpus: PrivateCorpus,
    plan: Plan,
    *,
    run_key: Key,
    step: int,
    token_budget: int,
    rows: Rows,
    ranks: Ranks,
    course: Course | None = None,
) -> Work:
    """Takes one step of the plan together with the other ranks; every rank calls it with the same arguments.

    Args:
        course: what the steps before left, moved on by this one; None where a plan carries nothing from step to step.
        token_budget: padded tokens of a micro-batch of one rank, >= 1.

    Returns:
        the work of all ranks together.

    Raises:
        ValueError: when the course is not at this step, or is missing where the plan needs one.
    """
    course = course or Course.of(plan, step=step - 1)
    course.take(step)
    units = drawn(corpus, plan, run_key=run_key, step=step)
    batches = arranged(units, token_budget, rows)
    total = partial_sum(model, units, batches, clip_norm=course.clip_norm, token_budget=token_budget, combine=plan.combine, ranks=ranks)
    noised = add_noise(total, noise_multiplier=plan.noise_multiplier, key=run_key.stream("noise", step), ranks=ranks, memory=course.memory)
    if plan.adaptive is not None:
        moving, votes = plan.adaptive, run_key.stream("votes", step)
        course.clip_norm = next_clip_norm(
            total,
            quantile=moving.quantile,
            rate=moving.rate,
            votes_multiplier=moving.votes_multiplier,
            expected_batch=plan.expected_batch,
            key=votes,
            ranks=ranks,
        )
    update(model, optimizer, noised.gradients, divisor=plan.expected_batch)
    return work(units, batches)


def partial_sum(
    model: nn.Module, units: Units, batches: Sequence[MicroBatch], *, clip_norm: float, token_budget: int, combine: Combine, ranks: Ranks
) -> ClippedSum:
    """This rank's part of a step's clipped sum: over its share of the micro-batches, or, where weights are sharded, its shard of the sum over all of them."""
    dealt = shares([padded_size(units, batch) for batch in batches], ranks.size)
    chosen = [batches[index] for index in dealt[ranks.rank]]
    if isinstance(model, FSDPModule):
        return _summed_in_step(model, units, chosen, clip_norm=clip_norm, combine=combine, rounds=max(map(len, dealt)))
    return summed(model, units, chosen, clip_norm=clip_norm, token_budget=token_budget, combine=combine)


def whole_sum(partial: ClippedSum, ranks: Ranks) -> dict[str, Tensor]:
    """What the ranks have clipped together, before noise and whole; every rank calls it. It leaves nobody's hands as it is."""
    if any(isinstance(part, DTensor) for part in partial.gradients.values()):
        return {name: gathered(part) for name, part in partial.gradients.items()}
    return _all_reduced(partial.gradients, ranks)


def summed_together(model: nn.Module, units: Units, *, clip_norm: float, token_budget: int, combine: Combine, ranks: Ranks) -> dict[str, Tensor]:
    """Returns the clipped sum of all ranks, on every rank, without noise: a site of a fleet adds its own before anything leaves it (federated/).

    Args:
        units: those that were drawn, the same on every rank.
        token_budget: padded tokens of a micro-batch of one rank, >= 1.
    """
    batches = arranged(units, token_budget, Rows.PADDED)
    partial = partial_sum(model, units, batches, clip_norm=clip_norm, token_budget=token_budget, combine=combine, ranks=ranks)
    return whole_sum(partial, ranks)


def _summed_in_step(model: nn.Module, units: Units, chosen: Sequence[MicroBatch], *, clip_norm: float, combine: Combine, rounds: int) -> ClippedSum:
    """This rank's shard of the sum over all ranks. A unit above the token budget is computed whole."""
    total = ClippedSum.zero(model, clip_norm=clip_norm)
    nobody = padded([torch.zeros(2, dtype=torch.long)])
    for number in range(rounds):
        if number < len(chosen):
            total += summed(model, units, [chosen[number]], clip_norm=clip_norm, token_budget=sys.maxsize, combine=combine)
        else:
            total += clipping.in_step(model, document_losses, nobody, clip_norm=clip_norm)
    return total


def shares(costs: Sequence[int], size: int) -> list[list[int]]:
    """Deals indices to `size` ranks, the costliest first to the least loaded (Graham 1969): every index once, the same on every rank.

    Example:
        >>> shares([5, 3, 2], 2)
        [[0], [1, 2]]
    """
    dealt: list[list[int]] = [[] for _ in range(size)]
    load = [0] * size
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = load.index(min(load))
        dealt[least].append(index)
        load[least] += costs[index]
    return dealt


def add_noise(partial: ClippedSum, *, noise_multiplier: float, key: Stream, ranks: Ranks, memory: Memory | None = None) -> Noised:
    """Adds the partial sums of all ranks and one Gaussian draw.

    Args:
        partial: the sum over this rank's units; zero for none.
        key: this step's stream, the same on every rank.
        memory: this rank's noise of the steps before, for correlated noise.

    Raises:
        ValueError: as `noise.add`.
    """
    if any(isinstance(part, DTensor) for part in partial.gradients.values()):
        return noise.add(partial, noise_multiplier=noise_multiplier, key=key, memory=memory)  # the sum of all ranks, in shards
    own = dataclasses.replace(partial, gradients={name: partial.gradients[name] for name in _owned(partial.gradients, ranks)})
    noised = noise.add(own, noise_multiplier=noise_multiplier, key=key, memory=memory)
    return dataclasses.replace(noised, gradients=_all_reduced({**partial.gradients, **noised.gradients}, ranks))


def _owned(tensors: Mapping[str, Tensor], ranks: Ranks) -> list[str]:
    """The parameters that this rank adds noise to, the same at every step."""
    names = sorted(tensors)
    return [names[index] for index in sorted(shares([tensors[name].numel() for name in names], ranks.size)[ranks.rank])]


def whole(course: Course, parameters: Mapping[str, Tensor], ranks: Ranks) -> Course:
    """Returns the course with the noise of all parameters, which the ranks keep in shares; every rank calls it, for a checkpoint.

    Args:
        parameters: those that are trained, by the names of their gradients.
    """
    if course.memory is None or ranks.size == 1:
        return course
    if any(isinstance(parameter, DTensor) for parameter in parameters.values()):
        in_whole = {name: [gathered(noise_) for noise_ in past] for name, past in course.memory.past.items()}
        return dataclasses.replace(course, memory=Memory(bands=course.memory.bands, past=in_whole))
    owned, lags = _owned(parameters, ranks), min(course.step, len(course.memory.bands) - 1)
    past: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for lag in range(lags):
        mine = {
            name: course.memory.past[name][lag] if name in owned else torch.zeros_like(parameters[name], dtype=torch.float32) for name in parameters
        }
        for name, noise_ in _all_reduced(mine, ranks).items():
            past[name].append(noise_.clone())
    return dataclasses.replace(course, memory=Memory(bands=course.memory.bands, past=past))


def split(course: Course, parameters: Mapping[str, Tensor]) -> Course:
    """Gives a whole course, as a checkpoint holds it, the shards of this rank."""
    if course.memory is None:
        return course
    past = {name: [split_like(noise_, parameters[name]) for noise_ in of_name] for name, of_name in course.memory.past.items()}
    return dataclasses.replace(course, memory=Memory(bands=course.memory.bands, past=past))


def next_clip_norm(
    partial: ClippedSum, *, quantile: float, rate: float, votes_multiplier: float, expected_batch: float, key: Stream, ranks: Ranks
) -> float:
    """Gives the clip norm of the next step from the votes of all ranks, noised once: the same figure on every rank (`adaptive.update`).

    Args:
        partial: the sum over this rank's units; zero for none.
        key: this step's stream, the same on every rank.
    """
    if not isinstance(partial, ClippedSum):
        raise TypeError(f"Expected a ClippedSum, got {type(partial).__name__}.")
    votes = torch.tensor([partial.votes], dtype=torch.float64, device=next(iter(partial.gradients.values())).device)
    if ranks.size > 1:
        dist.all_reduce(votes)
    everyone = dataclasses.replace(partial, votes=float(votes))
    return adaptive.update(everyone, quantile=quantile, rate=rate, votes_multiplier=votes_multiplier, expected_batch=expected_batch, key=key)


def _all_reduced(parts: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """Sums over ranks with one collective for each precision."""
    summed_: dict[str, Tensor] = dict(parts)
    if ranks.size == 1:
        return summed_
    for dtype in sorted({part.dtype for part in parts.values()}, key=str):
        names = sorted(name for name, part in parts.items() if part.dtype is dtype)
        flat = torch.cat([parts[name].flatten() for name in names])
        dist.all_reduce(flat)
        for name, piece in zip(names, torch.split(flat, [parts[name].numel() for name in names]), strict=True):
            summed_[name] = piece.view(parts[name].shape)
    return summed_
