"""Measures the audit: false alarms, power, clean runs of the demo, its share of training time, and lower bound over theory on trained models.

    python benchmarks/audit.py alarms          false alarms under epsilon = 0
    python benchmarks/audit.py power           power of the curve test with the noise halved, on simulated scores
    python benchmarks/audit.py rehearsal       layer 0 on planted gradients: which layers fail with the noise halved, and as it is
    python benchmarks/audit.py clean           verdicts of correct runs of both demos
    python benchmarks/audit.py text            power on text canaries, noise as planned and halved; lower bound over theory, white box and black box
    python benchmarks/audit.py overhead        CPU time of layers 0 to 2 over that of training, controls apart

Simulated scores come from the mechanism itself: T Poisson-sampled Gaussian releases of one canary's coordinate, read by the likelihood ratio, which is the best attack there is.
Models of `text`: a Llama of four blocks, all of its weights trained (a small full fine-tune) or adapters, and the demo's own base with the demo's adapters. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from discreet import model
from discreet.audit import attacks, bounds, canaries, membership
from discreet.audit import mechanism as rehearsal
from discreet.config import ModelSection, RunSection, TrainSection
from discreet.dp import accounting, noise
from discreet.dp.mechanism import Plan, calibrate, event_of
from discreet.keys import Key
from discreet.ledger import Reservation, State
from discreet.model import Base, PublicText
from discreet.record import Basis, Digest, Sensitive, Sensitivity, Snapshot, SubjectId
from discreet.train import loop, parallel, step
from discreet.train.checkpoint import Checkpoints

DELTA = 1e-5


class Remembered:
    """A trade-off curve that computes each point once."""

    def __init__(self, curve: accounting.TradeOff) -> None:
        self.mu, self.tpr = curve.mu, lru_cache(maxsize=None)(curve.tpr)


def fair(count: int, random: np.random.Generator) -> np.ndarray:
    return random.random(count) < 0.5


def simulated(
    included: np.ndarray, *, q: float, sigma: float, steps: int, random: np.random.Generator, real_sigma: float | None = None
) -> np.ndarray:
    """Scores of the best attack on each canary's own coordinate, seen at every step."""
    seen_TM = (random.random((steps, len(included))) < q) * included + (real_sigma or sigma) * random.normal(size=(steps, len(included)))
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-q), math.log(q) + (2 * seen_TM - 1) / (2 * sigma**2)).sum(0)


def false_alarms(runs: int) -> dict[str, float]:
    """Share of runs in which scores that know nothing (epsilon = 0) are called a leak at level 5 %, 1000 canaries."""
    random, nothing = np.random.default_rng(0), bounds.GaussianTradeOff(mu=0.0)
    auditors: dict[str, Callable[[Any, Any], bool]] = {
        "one_run": lambda s, i: bounds.one_run(s, i, delta=DELTA, level=0.05).epsilon > 0,
        "f_dp_one_run": lambda s, i: bounds.f_dp_one_run(s, i, delta=DELTA, level=0.05).epsilon > 0,
        "clopper_pearson": lambda s, i: bounds.clopper_pearson(s, i, delta=DELTA, level=0.05).epsilon > 0,
        "curve_test": lambda s, i: bounds.curve_test(s, i, trade_off=nothing, fpr=0.05, level=0.05).rejected,
    }
    counts = dict.fromkeys(auditors, 0)
    for _ in range(runs):
        scores, included = random.normal(size=1000), fair(1000, random)
        for name, auditor in auditors.items():
            counts[name] += auditor(scores, included)
    return {name: count / runs for name, count in counts.items()}


def power(runs: int) -> dict[str, Any]:
    """The claim is epsilon 2.4 at 1e-6 (sigma 0.9, q = 1024/60000, 176 steps); scores of several mu, 250 + 250 and 500 + 500 canaries, level 5 %, threshold at 5 %."""
    q, steps = 1024 / 60000, 176
    claim = Remembered(accounting.trade_off(event_of(sampling_probability=q, noise_multiplier=0.9, steps=steps)))
    halved = accounting.trade_off(event_of(sampling_probability=q, noise_multiplier=0.45, steps=steps)).mu
    random = np.random.default_rng(1)

    def gaussian(mu: float) -> Callable[[np.ndarray], np.ndarray]:
        return lambda included: random.normal(size=len(included)) + mu * included

    def steps_of_half_the_noise(included: np.ndarray) -> np.ndarray:
        return simulated(included, q=q, sigma=0.9, steps=steps, random=random, real_sigma=0.45)

    def rejected(scores_of: Callable[[np.ndarray], np.ndarray], plus: int) -> dict[str, float]:
        included = np.arange(2 * plus) < plus
        curve = pair = 0
        for _ in range(runs):
            scores = scores_of(included)
            curve += bounds.curve_test(scores, included, trade_off=claim, fpr=0.05, level=0.05).rejected
            pair += bounds.clopper_pearson(scores, included, delta=1e-6, level=0.05, fpr=0.05).epsilon > 2.41
        return {"curve_test": curve / runs, "clopper_pearson": pair / runs}

    cells = {"as claimed": claim.mu, "twice the claimed mu": 2 * claim.mu, "mu 1": 1.0, "noise halved": halved}
    return {
        f"{plus}+{plus}": {
            **{name: {"mu": mu, **rejected(gaussian(mu), plus)} for name, mu in cells.items()},
            "noise halved, scores from its steps": {"mu": halved, **rejected(steps_of_half_the_noise, plus)},
        }
        for plus in (250, 500)
    }


def rehearsals(runs: int) -> dict[str, Any]:
    """Share of rehearsals in which each layer says FAIL: epsilon 2.4 at 1e-4, 1,000 units in batches of 100, 20 steps."""
    plan = calibrate(epsilon=2.4, delta=1e-4, population=1000, expected_batch=100, steps=20, clip_norm=0.5, unit="patient")
    found: dict[str, Any] = {"runs": runs}
    for name, context in (("noise halved", _halved()), ("as it is", noise.add)):
        original, noise.add = noise.add, context
        try:
            told = [layer for number in range(runs) for layer in rehearsal.layers(plan, key=Key(number.to_bytes(32)))]
        finally:
            noise.add = original
        failed = [layer.name for layer in told if layer.verdict is bounds.Verdict.FAIL]
        found[name] = {each: failed.count(each) / runs for each in dict.fromkeys(layer.name for layer in told)}
    return found


def clean_demo(runs: int) -> dict[str, Any]:
    """Verdicts of correct runs of both demos: their canaries, steps, sampling and noise; the best attack; the level of a first audit; a control that memorised."""
    found = {}
    for name, plan, count in (("fast", demo_plan(1700, 400, 8), 300), ("default", demo_plan(2200, 160, 5), 500)):
        claim, random = Remembered(accounting.trade_off(plan.event)), np.random.default_rng(3)
        verdicts: dict[str, int] = {}
        for _ in range(runs):
            included = fair(count, random)
            scores = simulated(included, q=plan.sampling_probability, sigma=plan.noise_multiplier, steps=plan.steps, random=random)
            report = bounds.verdict(
                scores,
                included,
                control=random.normal(size=count) + 12 * included,
                negatives={
                    "untouched": bounds.area_under_curve(random.normal(size=count), included),
                    "words": bounds.area_under_curve(random.normal(size=count), included),
                },
                epsilon=plan.guarantee.epsilon,
                delta=plan.delta,
                trade_off=claim,
                fpr=0.05,
                level=0.8 * bounds.spent_level(0.05, 1),
            )
            verdicts[str(report.verdict)] = verdicts.get(str(report.verdict), 0) + 1
        found[name] = {"epsilon": plan.guarantee.epsilon, "claimed_mu": claim.mu, "canaries": count, "runs": runs, "verdicts": verdicts}
    return found


def demo_plan(population: int, batch: int, steps: int) -> Plan:
    return calibrate(epsilon=8.0, delta=1 / (2 * population), population=population, expected_batch=batch, steps=steps, clip_norm=0.5, unit="patient")


# Trained models


def trained(
    base: Base, plan: Plan, texts: Sequence[str], section: ModelSection, *, rate: float, folder: Path, number: int, budget: int = 512
) -> torch.nn.Module:
    """Takes the plan's steps on one text a unit, by the loop that training uses."""
    units = {SubjectId(f"S{row:05d}"): (row,) for row in range(len(texts))}
    root = Digest("sha256:" + "ab" * 32)
    loop.train(
        plan,
        Snapshot(root=root, name="train", sensitivity=Sensitivity.SPECIAL, path=folder, units=Sensitive(units)),
        Reservation(id="r", budget="b", run="run", plan=plan.digest, snapshot=root, state=State.SPENT, remaining_epsilon=0.0),
        texts=texts,
        setup=loop.Setup(
            base=base,
            model=section,
            train=TrainSection(learning_rate=rate, optimizer="sgd" if "all" in section.train else "adam"),
            run=RunSection(threads=1, token_budget=budget, checkpoint_every=10**6),
            held_out=generated(["The small bell says nothing."]),
            evaluations=1,
        ),
        run_key=Key(bytes([number]) * 32),
        checkpoints=Checkpoints(folder=folder / f"c{number}", key=Key(bytes(32)), run="run"),
        adapter=folder / f"a{number}",
    )
    return model.load_adapter(base, folder / f"a{number}")


def generated(texts: Sequence[str]) -> PublicText:
    return PublicText.of(list(texts), sensitivity=Sensitivity.PUBLIC, basis=Basis.GENERATED)


FOUR_STEPS = {"epsilon": 4.0, "delta": 1e-4, "population": 250, "expected_batch": 125, "steps": 4, "clip_norm": 0.5, "unit": "canary"}
CELLS: dict[str, tuple[str, ModelSection, float]] = {
    "full fine-tune": (model.TINY, ModelSection(base="tiny", train=("all",), max_tokens=64), 0.5),
    "full fine-tune, small steps": (model.TINY, ModelSection(base="tiny", train=("all",), max_tokens=64), 0.02),
    "adapters": (model.TINY, ModelSection(base="tiny", train=("lora_B",), max_tokens=64), 0.03),
    "SmolLM2, adapters as the demo": (
        model.SMOLLM2,
        ModelSection(base=model.SMOLLM2, train=("lora_B",), lora_rank=4, lora_targets=("q_proj", "v_proj"), max_tokens=64),
        0.01,
    ),
}


class Watched:
    """Where the weights were before each step, and what each step released: what the guarantee lets an attacker see."""

    def __init__(self) -> None:
        self.before: list[dict[str, torch.Tensor]] = []
        self.released: list[dict[str, torch.Tensor]] = []

    def __enter__(self) -> Watched:
        self._step, self._add = parallel.private_step, noise.add
        parallel.private_step, noise.add = self._watch, self._note  # type: ignore[assignment]  # stand-ins that watch
        return self

    def __exit__(self, *about: object) -> None:
        parallel.private_step, noise.add = self._step, self._add

    def _watch(self, module: torch.nn.Module, *about: Any, **how: Any) -> Any:
        self.before.append({name: each.detach().clone() for name, each in model.trained_parameters(module).items()})
        return self._step(module, *about, **how)

    def _note(self, clipped: Any, **how: Any) -> Any:
        noised = self._add(clipped, **how)
        self.released.append(dict(noised.gradients))
        return noised

    def scores(self, start: torch.nn.Module, documents: Sequence[torch.Tensor], plan: Plan) -> np.ndarray:
        """Reads every release along the gradients at the weights of its step, and adds the readings up."""
        share = plan.sampling_probability / 2
        total = np.zeros(len(documents))
        for before, released in zip(self.before, self.released, strict=True):
            with torch.no_grad():
                for name, parameter in model.trained_parameters(start).items():
                    parameter.copy_(before[name])
            [products], gram = attacks.gradient(start, [released], documents)
            total += attacks.untangled(products, gram, ridge=plan.noise_multiplier**2 / (share * (1 - share)))
        return total


def text_canaries(runs: int, cells: Sequence[str], count: int) -> dict[str, Any]:
    """Text canaries alone, every unit in every second step; noise as planned and halved; every reading, and what of a canary's gradient is its own."""
    found: dict[str, Any] = {}
    plan = calibrate(**{**FOUR_STEPS, "population": count // 2, "expected_batch": count // 4})
    claim, expected = accounting.trade_off(plan.event), plan.steps * plan.sampling_probability
    ridge = plan.steps * plan.noise_multiplier**2 / (expected * (1 - plan.sampling_probability) / 2 + expected**2 / 4)
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        for name in cells:
            base_name, section, rate = CELLS[name]
            cache = Path.home() / ".cache" / "discreet" / "models" if base_name == model.SMOLLM2 else folder / "cache"
            base = model.load_base(base_name, cache=cache)
            for noise_name, context in (("as planned", noise.add), ("halved", _halved())):
                rows = []
                for number in range(runs):
                    planted = canaries.plant(count, key=Key(bytes([number]) * 32).stream("plant"))
                    inside = [each.text for each in planted if each.included]
                    original, noise.add = noise.add, context
                    cell = folder / f"{name} {noise_name}"  # its own, or the checkpoint of another cell would be taken up
                    try:
                        with Watched() as watched:
                            module = trained(base, plan, inside, section, rate=rate, folder=cell, number=number)
                    finally:
                        noise.add = original
                    rows.append(_readings(base, section, module, watched, planted, claim, plan, ridge))
                found[f"{name}, noise {noise_name}"] = {
                    way: {figure: float(np.mean([row[way][figure] for row in rows])) for figure in rows[0][way]} for way in rows[0]
                }
                print(json.dumps({f"{name}, noise {noise_name}": found[f"{name}, noise {noise_name}"]}), file=sys.stderr, flush=True)
    return {
        "epsilon": plan.guarantee.epsilon,
        "claimed_mu": claim.mu,
        "canaries": count,
        "steps": plan.steps,
        "noise_multiplier": plan.noise_multiplier,
        "runs": runs,
        **found,
    }


def _readings(
    base: Base,
    section: ModelSection,
    module: torch.nn.Module,
    watched: Watched,
    planted: canaries.Canaries,
    claim: bounds.TradeOff,
    plan: Plan,
    ridge: float,
) -> dict[str, dict[str, float]]:
    black = membership.scores(module, base.tokenizer, planted.texts, token_budget=2048, adapter_off=lambda: model.adapter_off(module, base))
    documents, start = step.tokenize(planted.texts, base, max_tokens=64), model.attach(base, section)
    [products], gram = attacks.gradient(start, [attacks.moved(start, module)], documents)
    own = 1 / np.sqrt(np.diag(np.linalg.inv(gram + 1e-9 * np.eye(len(gram)))))
    ways = {
        "black box": black,
        "white box, last weights, inner product": products,
        "white box, last weights, untangled": attacks.untangled(products, gram, ridge=ridge),
        "white box, every step, untangled": watched.scores(start, documents, plan),
    }
    apart = gram[~np.eye(len(gram), dtype=bool)]
    shape = {"cosine of two": float(apart.mean()), "length of what is its own": float(np.median(own))}
    return {way: _read(scores, planted.included, claim, plan) for way, scores in ways.items()} | {"gradients": shape}


def _halved() -> Callable[..., Any]:
    original = noise.add
    return lambda clipped, *, noise_multiplier, key, **how: original(clipped, noise_multiplier=noise_multiplier / 2, key=key, **how)


def _read(scores: np.ndarray, included: Sequence[bool], claim: bounds.TradeOff, plan: Plan) -> dict[str, float]:
    certified = bounds.f_dp_one_run(scores, included, delta=plan.delta, level=0.05)
    curve = bounds.curve_test(scores, included, trade_off=claim, fpr=0.05, level=0.05)
    return {
        "auc": bounds.area_under_curve(scores, included).auc,
        "mu_lower": bounds.gdp(scores, included, delta=plan.delta, level=0.05, fpr=0.05).mu or 0.0,
        "rejected": float(curve.rejected),
        "epsilon_lower": certified.epsilon,
        "lower_over_theory": certified.epsilon / plan.guarantee.epsilon,
        "ceiling": certified.ceiling,
    }


def overhead(num_canaries: int, times: int) -> dict[str, Any]:
    """CPU seconds of the rehearsal (layer 0), of scoring and of the statistics (layer 2) beside those of training, whose tokens are `times` those of the canaries."""
    planted = canaries.plant(num_canaries, key=Key(bytes(32)).stream("plant"))
    inside = [each.text for each in planted if each.included]
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        base = model.load_base("tiny", cache=folder / "cache")
        tokens = [len(ids) for ids in step.tokenize(inside, base, max_tokens=96)]
        notes = [
            f"Note {number}: the patient of bed {number % 37} had a cough for {number % 9} days and was given syrup {number % 4} times."
            for number in range(20 * num_canaries)
        ]
        batch = (len(notes) + len(inside)) // 4
        steps = math.ceil(times * sum(tokens) / (batch * np.mean([len(ids) for ids in step.tokenize([*notes[:200], *inside], base, max_tokens=96)])))
        plan = calibrate(
            epsilon=8.0, delta=1e-5, population=len(notes) + len(inside), expected_batch=batch, steps=steps, clip_norm=0.5, unit="patient"
        )
        section = ModelSection(base="tiny", train=("lora_B",), max_tokens=96)
        began = time.process_time()
        module = trained(base, plan, [*inside, *notes], section, rate=0.01, folder=folder, number=1, budget=2048)
        training = time.process_time() - began
        began = time.process_time()
        rehearsal.layers(plan, key=Key(bytes(32)))
        layer_0 = time.process_time() - began
        began = time.process_time()
        scores = membership.scores(module, base.tokenizer, planted.texts, token_budget=2048, adapter_off=lambda: model.adapter_off(module, base))
        scoring = time.process_time() - began
        began = time.process_time()
        bounds.verdict(
            scores,
            planted.included,
            control=np.asarray(planted.included) + np.linspace(0, 0.5, len(scores)),
            negatives={"words": membership.blind(planted.texts, planted.included)},
            epsilon=plan.guarantee.epsilon,
            delta=plan.delta,
            trade_off=accounting.trade_off(plan.event),
            fpr=0.05,
            level=0.05,
        )
        reading = time.process_time() - began
    return {
        "canaries": num_canaries,
        "steps": steps,
        "tokens_trained_over_canary_tokens": times,
        "training_cpu_s": training,
        "rehearsal_cpu_s": layer_0,
        "scoring_cpu_s": scoring,
        "statistics_cpu_s": reading,
        "audit_over_training": (layer_0 + scoring + reading) / training,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["alarms", "power", "rehearsal", "clean", "text", "overhead"])
    parser.add_argument("--runs", type=int, default=0, help="runs in each cell; default 1000 for alarms and power, 100 for clean, 5 for text")
    parser.add_argument("--canaries", type=int, default=500)
    parser.add_argument("--cells", nargs="*", choices=list(CELLS), help="of text; all of them by default")
    parser.add_argument("--times", type=int, default=20, help="tokens trained for each token of a planted canary")
    given = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    match given.what:
        case "alarms":
            found: dict[str, Any] = false_alarms(given.runs or 1000)
        case "power":
            found = power(given.runs or 1000)
        case "rehearsal":
            found = rehearsals(given.runs or 50)
        case "clean":
            found = clean_demo(given.runs or 100)
        case "text":
            found = text_canaries(given.runs or 5, given.cells or list(CELLS), given.canaries)
        case "overhead":
            found = overhead(given.canaries, given.times)
    found |= {"machine": f"{platform.machine()}, one thread", "cpu_s": time.process_time() - began}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
