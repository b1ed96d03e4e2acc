"""Public parameters -> Plan: sampler, clip, noise and event bound together, so that what is accounted is what is run.

    Mechanism (what will be done) --calibrate--> Plan (with what it costs, and the digest under which it is reserved)

The defects that broke published systems were almost all a sampler, a clip or a step count that differed from the accounted one (PITFALLS 1, 2). A `Plan` is the only
value that the ledger reserves and the trainer takes, it can only be built here, and its event is computed from its own fields.

Calibration searches the smallest noise multiplier. With a budget it is the smallest that the budget's RDP filter admits (valid when later runs depend on this one),
and the tighter PLD epsilon stands beside it; without one it is the smallest whose PLD epsilon meets the target: bracketed by RDP, refined on a coarse PLD grid that
can only overstate, verified once on the fine one.

Source: Abadi et al. 2016 (mechanism); the division by a public expected batch follows the add/remove relation, under which the realised size is private.

Does not cover: other samplers than Poisson, adaptive clipping, correlated noise.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import dp_accounting
from dp_accounting import DpEvent

from discreet.dp.accounting import COARSE, FINE, MANY_STEPS, Guarantee, RdpFilter, Relation, event_to_json, guarantee, pld_epsilon, rdp
from discreet.record import Digest

_RELATION: Relation = "add_remove"
_TOLERANCE = 2e-4
"""Relative width at which a search for the noise multiplier stops, on its private side."""

_TINY_EPSILON = 0.05
_LARGEST_NOISE = 1e6
_SMALLEST_NOISE = 1e-2


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """DP-SGD on privacy units: Poisson sampling, one flat clip, one Gaussian draw a step.

    Attributes:
        sampling_probability: chance of each unit to take part in a step, in (0, 1].
        noise_multiplier: noise standard deviation divided by `clip_norm`, > 0.
        clip_norm: L2 bound of one unit's contribution to a step, > 0.
        steps: number of noised updates, >= 1, all of them paid for.
    """

    sampling_probability: float
    noise_multiplier: float
    clip_norm: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_probability <= 1:
            raise ValueError(f"Expected 0 < sampling_probability={self.sampling_probability} <= 1.")
        _positive(self.noise_multiplier, "noise_multiplier")
        _positive(self.clip_norm, "clip_norm")
        _whole(self.steps, "steps")

    @property
    def event(self) -> DpEvent:
        """The dp_accounting event that this mechanism is, for one unit, under add/remove."""
        return event_of(sampling_probability=self.sampling_probability, noise_multiplier=self.noise_multiplier, steps=self.steps)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A calibrated mechanism with its price. Built by `calibrate` and `plan_from_json` only.

    Attributes:
        mechanism: what is run.
        population: number of privacy units, public.
        expected_batch: expected number of units in a step; sums are divided by it, never by the realised number.
        unit: what one epsilon protects.
        cap: largest number of documents of one unit used in one step.
        guarantee: the PLD epsilon at `delta`: what the finished run may claim, standing alone.
        filter_epsilon: the epsilon that the budget's RDP filter would need for this plan alone; None when calibrated without a budget.
        allow_large_delta: the recorded reason for delta >= 1/population; empty when it is below.
    """

    mechanism: Mechanism
    population: int
    expected_batch: int
    unit: str
    cap: int
    guarantee: Guarantee
    filter_epsilon: float | None
    allow_large_delta: str = ""

    @property
    def sampling_probability(self) -> float:
        return self.mechanism.sampling_probability

    @property
    def noise_multiplier(self) -> float:
        return self.mechanism.noise_multiplier

    @property
    def clip_norm(self) -> float:
        return self.mechanism.clip_norm

    @property
    def steps(self) -> int:
        return self.mechanism.steps

    @property
    def relation(self) -> str:
        return self.guarantee.relation

    @property
    def delta(self) -> float:
        return self.guarantee.delta

    @property
    def event(self) -> DpEvent:
        return self.guarantee.event

    @property
    def noise_std_of_mean(self) -> float:
        """Standard deviation of the noise on each coordinate of the released mean: the signal has to stand out from it."""
        return self.noise_multiplier * self.clip_norm / self.expected_batch

    @property
    def digest(self) -> Digest:
        """SHA-256 of `to_json` in canonical JSON (sorted keys, no spaces, UTF-8)."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return Digest("sha256:" + hashlib.sha256(canonical.encode()).hexdigest())

    def admitted_by(self, budget: RdpFilter) -> bool:
        """Says whether a budget, as it stands, has room for the whole planned event."""
        return budget.relation == self.relation and budget.admits(self.event)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON values; every one of them is public."""
        return {
            "kind": "plan/1",
            "sampling": "poisson",
            "sampling_probability": self.sampling_probability,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "steps": self.steps,
            "population": self.population,
            "expected_batch": self.expected_batch,
            "unit": self.unit,
            "cap": self.cap,
            "relation": self.relation,
            "delta": self.delta,
            "epsilon": self.guarantee.epsilon,
            "epsilon_rdp": self.guarantee.epsilon_rdp,
            "filter_epsilon": self.filter_epsilon,
            "allow_large_delta": self.allow_large_delta,
            "event": event_to_json(self.event),
        }


def event_of(*, sampling_probability: float, noise_multiplier: float, steps: int) -> DpEvent:
    """Returns the event of `steps` Poisson-sampled Gaussian releases."""
    return dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(sampling_probability, dp_accounting.GaussianDpEvent(noise_multiplier)), steps
    )


def calibrate(
    *,
    epsilon: float,
    delta: float,
    population: int,
    expected_batch: int,
    steps: int,
    clip_norm: float,
    unit: str = "record",
    cap: int = 1,
    budget: RdpFilter | None = None,
    allow_large_delta: str = "",
) -> Plan:
    """Finds the least noise that keeps the promise.

    Args:
        epsilon: > 0, finite. With a budget: the RDP epsilon of the plan must not exceed it either.
        delta: in (0, 1), below 1/population.
        population: number of privacy units, >= 1, a public number.
        expected_batch: expected units in a step, from 1 to `population`.
        steps: noised updates, >= 1.
        clip_norm: > 0, finite.
        unit: what one epsilon protects.
        cap: documents of one unit used in one step, >= 1.
        budget: the filter, as it stands, that must admit the whole plan.
        allow_large_delta: a reason to accept delta >= 1/population; it is recorded in the plan.

    Returns:
        the plan with the smallest noise multiplier, to 0.02 %.

    Raises:
        ValueError: when a parameter breaks its rule; when delta >= 1/population without a reason; when no noise multiplier up to 10^6 is admitted.
    """
    _positive(epsilon, "epsilon")
    _check_delta(delta, population, allow_large_delta)
    _check_batch(population, expected_batch, cap)
    _whole(steps, "steps")
    _positive(clip_norm, "clip_norm")
    _check_unit(unit)
    probability = expected_batch / population
    if budget is None:
        noise_multiplier = noise_for(epsilon=epsilon, delta=delta, sampling_probability=probability, steps=steps)
    else:
        noise_multiplier = _noise_for_budget(budget, epsilon=epsilon, delta=delta, sampling_probability=probability, steps=steps)
    return _plan(
        Mechanism(sampling_probability=probability, noise_multiplier=noise_multiplier, clip_norm=clip_norm, steps=steps),
        population=population,
        expected_batch=expected_batch,
        unit=unit,
        cap=cap,
        delta=delta,
        filter_epsilon=None
        if budget is None
        else budget.epsilon_of(event_of(sampling_probability=probability, noise_multiplier=noise_multiplier, steps=steps)),
        allow_large_delta=allow_large_delta if delta >= 1 / population else "",
    )


def noise_for(*, epsilon: float, delta: float, sampling_probability: float, steps: int) -> float:
    """Finds the smallest noise multiplier whose PLD epsilon at delta is at most `epsilon`, under add/remove.

    Raises:
        ValueError: when a parameter breaks its rule, or no noise multiplier up to 10^6 is enough.
    """
    _positive(epsilon, "epsilon")
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta={delta} < 1.")

    def event(noise_multiplier: float) -> DpEvent:
        return event_of(sampling_probability=sampling_probability, noise_multiplier=noise_multiplier, steps=steps)

    grid = COARSE if epsilon > _TINY_EPSILON else FINE
    bracket = _smallest(lambda noise: min(_rdp_epsilon(event(noise), delta), _pld_if_tiny(event(noise), epsilon, delta)) <= epsilon, tolerance=1e-2)
    noise_multiplier = _least_noise(lambda noise: pld_epsilon(event(noise), delta=delta, grid=grid), epsilon, low=0.85 * bracket, high=bracket)
    while pld_epsilon(event(noise_multiplier), delta=delta, grid=FINE if steps <= MANY_STEPS else COARSE) > epsilon:
        noise_multiplier *= 1 + _TOLERANCE
    return noise_multiplier


def plan_from_json(value: Mapping[str, Any]) -> Plan:
    """Rebuilds a stored plan: its price is computed anew, and must be the one it states.

    Raises:
        ValueError: when a field is missing, unknown or out of range, or a stated figure differs from the computed one.
    """
    try:
        plan = _plan(
            Mechanism(**{key: value[key] for key in ("sampling_probability", "noise_multiplier", "clip_norm", "steps")}),
            **{key: value[key] for key in ("population", "expected_batch", "unit", "cap", "delta", "filter_epsilon", "allow_large_delta")},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"Expected a plan with all its fields, got {type(error).__name__}.") from None
    if plan.to_json() != dict(value):
        changed = sorted(key for key in plan.to_json().keys() | value.keys() if plan.to_json().get(key) != value.get(key))
        raise ValueError(f"Expected a plan whose figures follow from its parameters; these do not: {changed}.")
    return plan


def _plan(
    mechanism: Mechanism,
    *,
    population: int,
    expected_batch: int,
    unit: str,
    cap: int,
    delta: float,
    filter_epsilon: float | None,
    allow_large_delta: str,
) -> Plan:
    """The only place where a Plan is built."""
    _check_delta(delta, population, allow_large_delta)
    _check_batch(population, expected_batch, cap)
    _check_unit(unit)
    if mechanism.sampling_probability != expected_batch / population:
        raise ValueError("Expected sampling_probability = expected_batch / population.")
    return Plan(
        mechanism=mechanism,
        population=population,
        expected_batch=expected_batch,
        unit=unit,
        cap=cap,
        guarantee=guarantee(mechanism.event, delta=delta, relation=_RELATION, unit=unit),
        filter_epsilon=filter_epsilon,
        allow_large_delta=allow_large_delta,
    )


def _noise_for_budget(budget: RdpFilter, *, epsilon: float, delta: float, sampling_probability: float, steps: int) -> float:
    """The smallest noise multiplier that the filter admits and whose own RDP epsilon meets the target."""
    if budget.relation != _RELATION:
        raise ValueError(f"Expected a budget for the {_RELATION} relation, got {budget.relation}.")

    def fits(noise_multiplier: float) -> bool:
        event = event_of(sampling_probability=sampling_probability, noise_multiplier=noise_multiplier, steps=steps)
        return budget.admits(event)

    noise_multiplier = _smallest(fits)
    if _rdp_epsilon(event_of(sampling_probability=sampling_probability, noise_multiplier=noise_multiplier, steps=steps), delta) <= epsilon:
        return noise_multiplier

    def meets(noise: float) -> bool:
        return _rdp_epsilon(event_of(sampling_probability=sampling_probability, noise_multiplier=noise, steps=steps), delta) <= epsilon

    return _smallest(lambda noise: meets(noise) and fits(noise))


def _pld_if_tiny(event: DpEvent, epsilon: float, delta: float) -> float:
    """PLD epsilon where the target is below what RDP at finite orders can show, whatever the noise; infinity elsewhere."""
    return pld_epsilon(event, delta=delta, grid=FINE) if epsilon <= _TINY_EPSILON else math.inf


def _rdp_epsilon(event: DpEvent, delta: float) -> float:
    """RDP epsilon over orders enough for a search; a subset of orders can only overstate."""
    overhead = [math.log1p(-1 / order) - math.log(delta * order) / (order - 1) for order in _SEARCH_ORDERS]
    return max(0.0, min(value + extra for value, extra in zip(rdp(event, _SEARCH_ORDERS).tolist(), overhead, strict=True)))


_SEARCH_ORDERS = (
    1.5,
    1.75,
    2.0,
    2.25,
    2.5,
    2.75,
    3.0,
    3.5,
    4.0,
    5.0,
    6.0,
    7.0,
    8.0,
    10.0,
    12.0,
    16.0,
    20.0,
    26.0,
    32.0,
    48.0,
    64.0,
    128.0,
    256.0,
    512.0,
)


def _smallest(enough: Callable[[float], bool], *, high: float = 1.0, tolerance: float = _TOLERANCE) -> float:
    """The smallest noise multiplier for which a monotone predicate holds."""
    while not enough(high):
        high *= 2
        if high > _LARGEST_NOISE:
            raise ValueError(
                f"Expected a target that some noise multiplier up to {_LARGEST_NOISE:g} meets; nothing is left of it, or it is too small."
            )
    low = high / 2
    while low > _SMALLEST_NOISE and enough(low):
        low, high = low / 2, low
    return _bisect(enough, low, high, tolerance=tolerance)


def _bisect(enough: Callable[[float], bool], low: float, high: float, *, tolerance: float = _TOLERANCE) -> float:
    """Narrows (low, high], where the predicate holds at `high`; returns a point where it was seen to hold."""
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def _least_noise(cost: Callable[[float], float], target: float, *, low: float, high: float) -> float:
    """The least noise whose cost, a falling function that is nearly a power of the noise, is at most the target: secants in logarithms, kept in a bracket."""
    cost_low, cost_high = cost(low), cost(high)
    while cost_low <= target and low > _SMALLEST_NOISE:
        low, high, cost_low, cost_high = low / 2, low, cost(low / 2), cost_low
    while cost_high < target * (1 - _TOLERANCE) and high > low * (1 + _TOLERANCE / 4):
        fraction = 0.5
        if math.isfinite(cost_low) and cost_high > 0:
            fraction = math.log(cost_low / (target * (1 - _TOLERANCE / 2))) / math.log(cost_low / cost_high)
        middle = low * (high / low) ** min(0.95, max(0.05, fraction))
        cost_middle = cost(middle)
        if cost_middle <= target:
            high, cost_high = middle, cost_middle
        else:
            low, cost_low = middle, cost_middle
    return high


def _positive(value: float, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"Expected a finite {name}={value} > 0.")


def _whole(value: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected a whole number {name}={value} >= 1.")


def _check_delta(delta: float, population: int, allow_large_delta: str) -> None:
    _whole(population, "population")
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta={delta} < 1.")
    if delta >= 1 / population and not allow_large_delta.strip():
        raise ValueError(
            f"Expected delta={delta} < 1/population={1 / population:.3g}: a larger one allows some unit to be published outright. "
            "Give a reason in allow_large_delta to record an exception."
        )


def _check_batch(population: int, expected_batch: int, cap: int) -> None:
    _whole(expected_batch, "expected_batch")
    _whole(cap, "cap")
    if expected_batch > population:
        raise ValueError(f"Expected expected_batch={expected_batch} <= population={population}.")


def _check_unit(unit: str) -> None:
    if not unit:
        raise ValueError("Expected unit to name what one epsilon protects, such as 'patient'.")
