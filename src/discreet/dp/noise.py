"""ClippedSum -> Noised: the one place where noise is drawn, once a step, on the sum, in float32, from secret randomness.

Adds N(0, (noise_multiplier * clip_norm)^2) to every coordinate of the sum, which is the Gaussian mechanism for L2 sensitivity clip_norm under add/remove of
one unit (Dwork & Roth 2014, A.1; Abadi et al. 2016). Each parameter draws from its own fork of the step's stream, named by the parameter: the draw
does not depend on the order of parameters, and no two parameters share one.

Guarantees: the input is a `ClippedSum`, hence bounded; noise is added before anything is divided; the same stream gives the same noise (resume).

Does not cover: correlated noise, discrete noise for federation, one draw across ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
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
        noise_std: standard deviation of the noise on each coordinate.
    """

    gradients: Mapping[str, torch.Tensor]
    noise_std: float


def add(clipped: ClippedSum, *, noise_multiplier: float, key: Stream) -> Noised:
    """Adds one Gaussian draw to a clipped sum.

    Args:
        clipped: the sum over all micro-batches of one step; `ClippedSum.zero` for an empty one.
        noise_multiplier: standard deviation of the noise as a multiple of `clipped.clip_norm`, finite and >= 0; 0 gives no privacy.
        key: this step's stream; a different one for every step.

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
    return Noised(gradients={name: _noised(sum_, std, key.fork("noise", name)) for name, sum_ in clipped.gradients.items()}, noise_std=std)


def _noised(sum_: torch.Tensor, std: float, key: Stream) -> torch.Tensor:
    if hasattr(sum_, "device_mesh"):
        return _noised_shard(sum_, std, key)
    noise = csprng.normal(key, sum_.shape, dtype=sum_.dtype, device=sum_.device)
    return noise.mul_(std).add_(sum_)


def _noised_shard(sum_: Any, std: float, key: Stream) -> torch.Tensor:
    """Noises one rank's shard with its part of the parameter's draw: shards share no coordinate, and the draw does not depend on the number of ranks."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh, local = sum_.device_mesh, sum_.to_local()
    axes = [axis for axis, placement in enumerate(sum_.placements) if not isinstance(placement, Replicate)]
    if len(axes) > 1 or any(sum_.placements[axis] != Shard(0) for axis in axes):
        raise ValueError("Expected sums that are sharded once, along their first dimension.")
    rows = -(-sum_.shape[0] // mesh.size(axes[0])) if axes else sum_.shape[0]
    row = math.prod(sum_.shape[1:])
    first = min(mesh.get_local_rank(axes[0]) * rows, sum_.shape[0]) * row if axes else 0
    part = csprng.normal_part(key, sum_.shape, first=first, count=local.numel(), dtype=local.dtype, device=local.device)
    noised = part.view(local.shape).mul_(std).add_(local)
    return DTensor.from_local(noised, mesh, sum_.placements, run_check=False, shape=sum_.shape, stride=sum_.stride())
