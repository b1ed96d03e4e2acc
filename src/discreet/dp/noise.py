"""ClippedSum -> Noised: the one place where noise is drawn, once a step, on the sum, in float32, from secret randomness.

Adds N(0, (noise_multiplier * clip_norm)^2) to every coordinate of the sum, which is the Gaussian mechanism for L2 sensitivity clip_norm under add/remove of
one unit (Dwork & Roth 2014, A.1; Abadi et al. 2016). Each parameter draws from its own fork of the step's stream, named by the parameter: the draw
does not depend on the order of parameters, and no two parameters share one.

With a `Memory` the noise is correlated over steps: u_t = (z_t - c_1 u_(t-1) - ... - c_(b-1) u_(t-b+1)) / c_0 for the strategy's column c (`banded`), z_t the draw of this
step; that is row t of C^-1 z. A step takes back part of what the steps before added, so running sums hold less noise at the same price.

Guarantees: the input is a `ClippedSum`, hence bounded; noise is added before anything is divided; the same stream gives the same noise (resume).

A sharded sum (FSDP2) is noised in shards, each with its own part of the one draw.

Does not cover: discrete noise for federation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch

from discreet.dp import csprng
from discreet.dp.clipping import ClippedSum
from discreet.keys import Stream


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Noised:
    """A sum that may be seen: dividing, averaging and publishing it cost nothing more.

    Attributes:
        gradients: parameter name -> noised sum, float32, the parameter's shape.
        noise_std: standard deviation of the step's own draw on each coordinate.
    """

    gradients: Mapping[str, torch.Tensor]
    noise_std: float


@final
@dataclass(slots=True, kw_only=True, eq=False)
class Memory:
    """The noise of the last steps, which correlated noise takes back in part. Sensitive like a seed: whoever holds it subtracts the noise.

    Attributes:
        bands: the strategy's column (`banded.coefficients`).
        past: parameter name -> noise of the last steps in standard deviations, the latest first, at most one less than there are bands; float32 or the sum's dtype.
    """

    bands: tuple[float, ...]
    past: dict[str, list[torch.Tensor]] = field(default_factory=dict, repr=False)

    def correlated(self, name: str, fresh: torch.Tensor) -> torch.Tensor:
        """Turns a step's independent draw into its noise, and keeps it for the steps to come."""
        before = self.past.setdefault(name, [])
        for coefficient, noise in zip(self.bands[1:], before, strict=False):
            fresh.sub_(noise, alpha=coefficient)
        fresh.div_(self.bands[0])
        before.insert(0, fresh.clone())
        del before[len(self.bands) - 1 :]
        return fresh


def add(clipped: ClippedSum, *, noise_multiplier: float, key: Stream, memory: Memory | None = None) -> Noised:
    """Adds one Gaussian draw to a clipped sum.

    Args:
        clipped: the sum over all micro-batches of one step; `ClippedSum.zero` for an empty one.
        noise_multiplier: standard deviation of the noise as a multiple of `clipped.clip_norm`, finite and >= 0; 0 gives no privacy.
        key: this step's stream; a different one for every step.
        memory: noise of the steps before, for correlated noise; it is moved on by this step. None for independent noise.

    Returns:
        the noised sum, not divided by anything.

    Raises:
        TypeError: when the first argument is not a `ClippedSum`: nothing else has a sensitivity.
        ValueError: when the noise multiplier is NaN, infinite or negative.
    """
    if not isinstance(clipped, ClippedSum):
        raise TypeError(f"Expected a ClippedSum, got {type(clipped).__name__}; only a clipped sum has a known sensitivity.")
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ValueError(f"Expected a finite noise_multiplier={noise_multiplier} >= 0.")
    std = noise_multiplier * clipped.clip_norm
    return Noised(gradients={name: _noised(name, sum_, std, key, memory) for name, sum_ in clipped.gradients.items()}, noise_std=std)


def _noised(name: str, sum_: torch.Tensor, std: float, key: Stream, memory: Memory | None) -> torch.Tensor:
    noise = _drawn(key.fork("noise", name), sum_)
    return (noise if memory is None else memory.correlated(name, noise)).mul_(std).add_(sum_)


def _drawn(key: Stream, like: Any) -> torch.Tensor:
    """Standard Gaussians for a sum; for a shard its part of them, so shards share no coordinate and the draw does not depend on the number of ranks."""
    if not hasattr(like, "device_mesh"):
        return csprng.normal(key, like.shape, dtype=like.dtype, device=like.device)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, local = like.device_mesh, like.to_local()
    axes = [axis for axis, placement in enumerate(like.placements) if not isinstance(placement, Replicate)]
    if len(axes) > 1 or any(like.placements[axis] != Shard(0) for axis in axes):
        raise ValueError("Expected sums that are sharded once, along their first dimension.")
    rows = -(-like.shape[0] // mesh.size(axes[0])) if axes else like.shape[0]
    first = min(mesh.get_local_rank(axes[0]) * rows, like.shape[0]) * math.prod(like.shape[1:]) if axes else 0
    part = csprng.normal_part(key, like.shape, first=first, count=local.numel(), dtype=local.dtype, device=local.device)
    drawn: torch.Tensor = DTensor.from_local(part.view(local.shape), mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
    return drawn
