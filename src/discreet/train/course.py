"""What a private run carries from one step to the next beside its parameters: the clip norm, where it moves, and the noise of the last steps, where it is correlated.

The clip norm is a released figure. The noise is the opposite: with a step's noise and the model before and after it, anybody has the clipped gradient (PITFALLS 40). So a
course is sealed under a key that the *run key* derives, inside the checkpoint, which is sealed already: when the run closes and its key is destroyed, no copy of a
checkpoint gives the noise back.

Guarantees: a course belongs to its next step and no other; a step that is taken twice or left out raises; opened, it is bit for bit what was sealed.

On several ranks each keeps the noise of the parameters that it noises; `parallel.whole` brings them together for a checkpoint.

Does not cover: what the optimiser carries (the checkpoint's own).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import safetensors.torch
import torch

from discreet.dp.mechanism import Plan
from discreet.dp.noise import Memory
from discreet.keys import Key

_CONTEXT = b"course"


@final
@dataclass(slots=True, kw_only=True, eq=False)
class Course:
    """Where a run's mechanism stands.

    Attributes:
        step: steps taken, >= 0.
        clip_norm: of the next step.
        memory: noise of the last steps, or None for independent noise.
    """

    step: int
    clip_norm: float
    memory: Memory | None = field(repr=False)

    @staticmethod
    def of(plan: Plan, *, step: int = 0) -> Course:
        """Begins a plan's course; in the middle for a plan that carries nothing from step to step.

        Raises:
            ValueError: when the plan carries something, and `step` is not 0.
        """
        if step and (plan.bands or plan.adaptive):
            raise ValueError(f"Expected the course of a plan with correlated noise or a moving clip norm from its beginning, not from step {step}.")
        return Course(step=step, clip_norm=plan.clip_norm, memory=Memory(bands=plan.bands) if plan.bands else None)

    def take(self, step: int) -> None:
        """Moves on to a step.

        Raises:
            ValueError: when it is not the next: its noise would be that of another.
        """
        if step != self.step + 1:
            raise ValueError(f"Expected step {self.step + 1} of the run next, got {step}.")
        self.step = step

    def sealed(self, run_key: Key) -> bytes:
        """Returns the course as bytes that only the run key opens; `memory` must hold every parameter."""
        tensors = {"step": torch.tensor(self.step), "clip_norm": torch.tensor(self.clip_norm, dtype=torch.float64)}
        if self.memory is not None:
            tensors |= {f"past/{lag}/{name}": noise.contiguous() for name, past in self.memory.past.items() for lag, noise in enumerate(past)}
        return run_key.derive("course").seal(safetensors.torch.save(tensors), context=_CONTEXT)

    @staticmethod
    def opened(content: bytes, plan: Plan, run_key: Key, *, device: str = "cpu") -> Course:
        """Reads a sealed course of this plan.

        Raises:
            SealBroken: when it was changed, or sealed by another run.
        """
        tensors = safetensors.torch.load(run_key.derive("course").open(content, context=_CONTEXT))
        course = Course.of(plan)
        course.step, course.clip_norm = int(tensors.pop("step")), float(tensors.pop("clip_norm"))
        if course.memory is not None:
            for path in sorted(tensors, key=lambda path: int(path.split("/")[1])):
                course.memory.past.setdefault(path.split("/", 2)[2], []).append(tensors[path].to(device))
        return course
