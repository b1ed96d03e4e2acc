"""One private step on several ranks (`torchrun`): every rank holds the model, computes its share of the sampled units, and one all-reduce adds everything up.

    draw      every rank makes the same Poisson draw from the run key: one coin a unit, so inclusion is independent across units and ranks by construction, and the
              sample does not depend on the number of ranks
    share     the micro-batches go to the ranks, largest first to the least loaded; a unit is in one micro-batch, hence on one rank
    noise     every parameter has one owner, which adds the parameter's noise to its own partial sum; the all-reduce then gives sum + noise to all

Sensitivity: a unit contributes to the partial sum of exactly one rank, with norm at most clip_norm, so the sum over ranks has sensitivity clip_norm like the sum of
one rank. Each coordinate is noised by exactly one rank with the full standard deviation, from the stream that the parameter's name forks: the noise is the very draw
of a run on one rank, and no two coordinates share one. Partial sums travel between the ranks of one operator; they are not released.

Guarantees: N ranks take the step of one rank, up to the rounding of the order of additions; a rank without a micro-batch takes part with zero, and an empty sample is
noised and counted, so ranks stay in step whatever was drawn; replicas stay equal to the bit, for an all-reduce gives every rank the same bytes.

Source: Li et al. 2020, "PyTorch Distributed", arXiv 2006.15704. Does not cover: sharded models (FSDP2), ranks that do not trust each other (federated/), ranks that fail:
`torchrun` ends the others, and the run resumes from its checkpoint, on any number of ranks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from discreet.dp import adaptive, noise
from discreet.dp.clipping import ClippedSum
from discreet.dp.mechanism import Plan
from discreet.dp.noise import Memory, Noised
from discreet.keys import Key, Stream
from discreet.train.course import Course
from discreet.train.step import PrivateCorpus, Rows, Work, arranged, drawn, padded_size, summed, update, work

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
    dist.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_PATIENCE)
    try:
        yield Ranks(rank=dist.get_rank(), size=dist.get_world_size())
    finally:
        dist.destroy_process_group()


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
    mine = shares([padded_size(units, batch) for batch in batches], ranks.size)[ranks.rank]
    chosen = [batches[index] for index in mine]
    total = summed(model, units, chosen, clip_norm=course.clip_norm, token_budget=token_budget, combine=plan.combine)
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
    owned, lags = _owned(parameters, ranks), min(course.step, len(course.memory.bands) - 1)
    past: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for lag in range(lags):
        mine = {
            name: course.memory.past[name][lag] if name in owned else torch.zeros_like(parameters[name], dtype=torch.float32) for name in parameters
        }
        for name, noise_ in _all_reduced(mine, ranks).items():
            past[name].append(noise_.clone())
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
