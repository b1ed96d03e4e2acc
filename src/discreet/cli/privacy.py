"""`discreet privacy`: what a mechanism costs, without a project."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, cast

import typer

from discreet.cli.shared import Json, as_plan_error, say
from discreet.errors import PlanInvalid

privacy = typer.Typer(no_args_is_help=True, help="What a mechanism costs, without a project.")
Q = Annotated[float, typer.Option("--sampling-probability", help="Probability that a unit takes part in a step.")]
Steps = Annotated[int, typer.Option("--steps")]
Delta = Annotated[float, typer.Option("--delta")]


@privacy.command("epsilon")
def privacy_epsilon(
    sampling_probability: Q,
    noise_multiplier: Annotated[float, typer.Option("--noise-multiplier")],
    steps: Steps,
    delta: Delta,
    relation: Annotated[str, typer.Option("--relation")] = "add_remove",
    accountant: Annotated[str, typer.Option("--accountant", help="pld, rdp or pld,rdp")] = "pld",
    as_json: Json = False,
) -> None:
    """The epsilon of Poisson-sampled Gaussian steps."""
    wanted = accountant.split(",")
    if not set(wanted) <= {"pld", "rdp"} or relation not in ("add_remove", "replace_one"):
        raise PlanInvalid("an accountant out of pld, rdp and a relation out of add_remove, replace_one", value=f"{accountant}, {relation}")
    quick = _quick_epsilon(sampling_probability, noise_multiplier, steps, delta) if (accountant, relation) == ("pld", "add_remove") else None
    epsilons = {"pld": quick} if quick is not None else _epsilons(wanted, relation, sampling_probability, noise_multiplier, steps, delta)
    document = {
        "epsilon": _finite(epsilons[wanted[0]]),
        "accountants": {which: _finite(value) for which, value in epsilons.items()},
        "accountant": wanted[0],
        "delta": delta,
        "sampling_probability": sampling_probability,
        "noise_multiplier": noise_multiplier,
        "steps": steps,
        "relation": relation,
    }
    say(as_json, document, [f"epsilon = {_finite(value)} ({which}), delta = {delta:g}, {relation}" for which, value in epsilons.items()])


def _quick_epsilon(sampling_probability: float, noise_multiplier: float, steps: int, delta: float) -> float | None:
    """The same figure without the libraries, whose import alone takes longer than a second; None where it is not covered."""
    from discreet.dp import losses

    figures = {"sampling_probability": sampling_probability, "noise_multiplier": noise_multiplier, "delta": delta}
    return losses.epsilon(**figures, steps=steps, grid=1e-4) if steps <= 20_000 else None


def _epsilons(
    wanted: Iterable[str], relation: str, sampling_probability: float, noise_multiplier: float, steps: int, delta: float
) -> dict[str, float | None]:
    from discreet.dp import accounting, mechanism

    event = mechanism.event_of(sampling_probability=sampling_probability, noise_multiplier=noise_multiplier, steps=steps)
    price = as_plan_error(lambda: accounting.guarantee(event, delta=delta, relation=cast("accounting.Relation", relation)))
    return {which: price.epsilon if which == "pld" else price.epsilon_rdp for which in wanted}


@privacy.command("curve")
def privacy_curve(
    sampling_probability: Q,
    noise_multiplier: Annotated[float, typer.Option("--noise-multiplier")],
    steps: Steps,
    svg: Annotated[Path | None, typer.Option("--svg", help="Also draw the curve into this file.")] = None,
    as_json: Json = False,
) -> None:
    """The whole (epsilon, delta) curve of Poisson-sampled Gaussian steps, and what the best attack on one unit reaches."""
    from discreet.dp import accounting, mechanism

    event = mechanism.event_of(sampling_probability=sampling_probability, noise_multiplier=noise_multiplier, steps=steps)
    trade_off = as_plan_error(lambda: accounting.trade_off(event))
    deltas = [10 ** (-half / 2) for half in range(2, 21)]
    points = list(zip(deltas, trade_off.epsilons(deltas), strict=True))
    attacks = [(fpr, trade_off.tpr(fpr)) for fpr in (0.001, 0.01, 0.05, 0.1, 0.5)]
    if svg:
        from discreet import plot

        title = f"{steps} steps, q = {sampling_probability:g}, noise multiplier {noise_multiplier:g}"
        svg.write_text(as_plan_error(lambda: plot.curve_svg(points, title=title, x_title="delta", y_title="epsilon")), encoding="utf-8")
    document = {
        "points": [{"delta": delta, "epsilon": _finite(epsilon)} for delta, epsilon in points],
        "attacks": [{"fpr": fpr, "tpr": tpr} for fpr, tpr in attacks],
        "advantage": trade_off.advantage,
        "accountant": "pld",
        "sampling_probability": sampling_probability,
        "noise_multiplier": noise_multiplier,
        "steps": steps,
        "relation": "add_remove",
        **({"svg": str(svg)} if svg else {}),
    }
    lines = [f"delta = {delta:<9.2g} epsilon = {_finite(epsilon)}" for delta, epsilon in points]
    lines += [f"best attack at a false positive rate of {fpr:g}: true positive rate {tpr:.4f}" for fpr, tpr in attacks]
    say(as_json, document, [*lines, f"largest advantage of an attack: {trade_off.advantage:.4f}", *([f"drawn: {svg}"] if svg else [])])


@privacy.command("noise")
def privacy_noise(
    epsilon: Annotated[float, typer.Option("--epsilon")],
    sampling_probability: Q,
    steps: Steps,
    delta: Delta,
    as_json: Json = False,
) -> None:
    """The smallest noise multiplier for a target epsilon."""
    from discreet.dp import accounting, mechanism

    noise = as_plan_error(lambda: mechanism.noise_for(epsilon=epsilon, delta=delta, sampling_probability=sampling_probability, steps=steps))
    price = accounting.guarantee(mechanism.event_of(sampling_probability=sampling_probability, noise_multiplier=noise, steps=steps), delta=delta)
    document = {
        "noise_multiplier": noise,
        "epsilon": price.epsilon,
        "target_epsilon": epsilon,
        "accountant": "pld",
        "delta": delta,
        "sampling_probability": sampling_probability,
        "steps": steps,
        "relation": price.relation,
    }
    say(as_json, document, [f"noise multiplier = {noise:.5f}"])


def _finite(value: float | None) -> float | str:
    return "infinity" if value is None or math.isinf(value) else value
