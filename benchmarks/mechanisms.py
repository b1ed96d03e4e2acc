"""What a mechanism is worth at equal epsilon: a linear classifier on generated data, trained by plain DP-SGD, with banded noise, and with a moving clip norm.

    python benchmarks/mechanisms.py [--repeats 10] [--out benchmarks/results/mechanisms.json]

Every arm is a plan for the same (epsilon, delta), population, batch and steps, run by its own draw, clip and noise; the figure is the mean held-out cross entropy over repeats
with new randomness, beside its standard error. The fixed arms have a clip norm that suits the data; two begin a hundred times larger, one of which moves it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from discreet.dp import adaptive, mechanism, noise
from discreet.dp.clipping import ClippedSum, clipped_sum
from discreet.dp.mechanism import Adaptive, Plan, Sampling, calibrate
from discreet.keys import Key
from discreet.train.course import Course

UNITS, FEATURES, CLASSES = 1000, 20, 4
COMMON: dict[str, Any] = {"delta": 1e-5, "population": UNITS, "expected_batch": 100, "steps": 100}
RATE, CLIP = 0.5, 1.0


def world() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features and labels, trained on and held out; the same in every run."""
    generator = torch.Generator().manual_seed(7)
    truth = torch.randn(FEATURES, CLASSES, generator=generator)
    features = torch.randn(2 * UNITS, FEATURES, generator=generator)
    labels = (features @ truth + torch.randn(2 * UNITS, CLASSES, generator=generator)).argmax(1)
    return features[:UNITS], labels[:UNITS], features[UNITS:], labels[UNITS:]


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def trained(plan: Plan, key: Key) -> float:
    """Held-out cross entropy after the plan's steps of SGD."""
    features, labels, held_features, held_labels = world()
    model, course, names = nn.Linear(FEATURES, CLASSES), Course.of(plan), [str(unit) for unit in range(UNITS)]
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    for step in range(1, plan.steps + 1):
        course.take(step)
        drawn = [unit for unit, _ in mechanism.draw(plan, [1] * UNITS, names, key=key, step=step)]
        total = ClippedSum.zero(model, clip_norm=course.clip_norm)
        if drawn:
            total = clipped_sum(model, losses, (features[drawn], labels[drawn]), list(range(len(drawn))), clip_norm=course.clip_norm)
        noised = noise.add(total, noise_multiplier=plan.noise_multiplier, key=key.stream("noise", step), memory=course.memory)
        if plan.adaptive:
            course.clip_norm = adaptive.update(
                total,
                quantile=plan.adaptive.quantile,
                rate=plan.adaptive.rate,
                votes_multiplier=plan.adaptive.votes_multiplier,
                expected_batch=plan.expected_batch,
                key=key.stream("votes", step),
            )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= RATE * noised.gradients[name] / plan.expected_batch
    with torch.no_grad():
        return float(losses(model, (held_features, held_labels)).mean())


def figures(plan: Plan, repeats: int) -> dict[str, float]:
    found = torch.tensor([trained(plan, Key(number.to_bytes(32, "little"))) for number in range(1, repeats + 1)])
    return {
        "epsilon": round(plan.guarantee.epsilon, 4),
        "noise_multiplier": round(plan.noise_multiplier, 4),
        "clip_norm": plan.clip_norm,
        "loss": round(float(found.mean()), 4),
        "error": round(float(found.std() / math.sqrt(repeats)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mechanisms.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    began = time.process_time()
    for epsilon in (2.0, 8.0):
        rows.append({"arm": "plain", **figures(calibrate(**COMMON, epsilon=epsilon, clip_norm=CLIP), options.repeats)})
        rows.append({"arm": "plain, clip norm 100", **figures(calibrate(**COMMON, epsilon=epsilon, clip_norm=100.0), options.repeats)})
        for bands in (2, 4, 8):
            plan = calibrate(**COMMON, epsilon=epsilon, clip_norm=CLIP, sampling=Sampling.CYCLIC_POISSON, bands=bands)
            rows.append({"arm": f"banded {bands}", **figures(plan, options.repeats)})
        moving = Adaptive(quantile=0.5, rate=0.2, votes_multiplier=5.0)
        rows.append({"arm": "adaptive from 100", **figures(calibrate(**COMMON, epsilon=epsilon, clip_norm=100.0, adaptive=moving), options.repeats)})
        for row in rows[-6:]:
            print(json.dumps(row), flush=True)
    document = {"common": COMMON, "rate": RATE, "repeats": options.repeats, "cpu_seconds": round(time.process_time() - began), "rows": rows}
    options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
