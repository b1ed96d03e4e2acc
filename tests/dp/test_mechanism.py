"""Calibration against golden noise multipliers, the refusals, and a plan that cannot be altered without being noticed."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from discreet.dp import mechanism
from discreet.dp.accounting import RdpFilter, guarantee
from discreet.dp.mechanism import Mechanism, Plan, calibrate, noise_for, plan_from_json

HOSPITAL: dict[str, Any] = {
    "epsilon": 3.0,
    "delta": 1 / 4000,
    "population": 2000,
    "expected_batch": 64,
    "steps": 25,
    "clip_norm": 0.5,
    "unit": "patient",
    "cap": 2,
}


@pytest.fixture(scope="module")
def budget() -> RdpFilter:
    return RdpFilter.open(epsilon=3.0, delta=1 / 4000)


@pytest.fixture(scope="module")
def plan(budget: RdpFilter) -> Plan:
    return calibrate(**HOSPITAL, budget=budget)


def test_golden_noise_multiplier() -> None:
    # dp_accounting 0.6.0 calibrate_dp_mechanism with PLD at grid 1e-4.
    assert noise_for(epsilon=8.0, delta=1e-6, sampling_probability=1024 / 60000, steps=176) == pytest.approx(0.58437139, rel=2e-3)


@pytest.mark.parametrize(("epsilon", "delta", "probability", "steps"), [(0.01, 1e-5, 0.01, 10), (0.1, 1e-6, 0.01, 100), (1.0, 1e-5, 1.0, 1)])
def test_noise_is_enough_and_hardly_more(epsilon: float, delta: float, probability: float, steps: int) -> None:
    found = noise_for(epsilon=epsilon, delta=delta, sampling_probability=probability, steps=steps)
    event = mechanism.event_of(sampling_probability=probability, noise_multiplier=found, steps=steps)
    assert 0.98 * epsilon < guarantee(event, delta=delta).epsilon <= epsilon


def test_without_a_budget_the_pld_epsilon_meets_the_target_closely() -> None:
    plan = calibrate(**HOSPITAL)
    assert 0.995 * 3 < plan.guarantee.epsilon <= 3
    assert plan.filter_epsilon is None


def test_with_a_budget_the_noise_is_the_smallest_admitted(plan: Plan, budget: RdpFilter) -> None:
    assert plan.admitted_by(budget)
    less = mechanism.event_of(sampling_probability=plan.sampling_probability, noise_multiplier=plan.noise_multiplier * 0.999, steps=plan.steps)
    assert not budget.admits(less)
    assert plan.filter_epsilon is not None
    assert plan.guarantee.epsilon_rdp is not None
    assert plan.guarantee.epsilon < plan.guarantee.epsilon_rdp <= plan.filter_epsilon <= 3


def test_a_stricter_target_than_the_budget_holds() -> None:
    strict = calibrate(**{**HOSPITAL, "epsilon": 2.0}, budget=RdpFilter.open(epsilon=3.0, delta=1 / 4000))
    assert strict.guarantee.epsilon_rdp is not None
    assert 1.9 < strict.guarantee.epsilon_rdp <= 2.0


def test_a_used_budget_needs_more_noise_and_an_exhausted_one_is_refused(plan: Plan, budget: RdpFilter) -> None:
    used = budget.charge([limit / 2 for limit in budget.limits])
    assert calibrate(**HOSPITAL, budget=used).noise_multiplier > plan.noise_multiplier
    exhausted = dataclasses.replace(budget, spent=tuple(limit + 1 for limit in budget.limits))
    with pytest.raises(ValueError, match="noise multiplier"):
        calibrate(**HOSPITAL, budget=exhausted)


def test_event_is_what_the_fields_say(plan: Plan) -> None:
    assert plan.sampling_probability == 64 / 2000
    assert plan.event == mechanism.event_of(sampling_probability=64 / 2000, noise_multiplier=plan.noise_multiplier, steps=25)
    assert plan.mechanism.event == plan.event
    assert plan.guarantee.epsilon == guarantee(plan.event, delta=plan.delta).epsilon
    assert plan.noise_std_of_mean == pytest.approx(plan.noise_multiplier * 0.5 / 64)
    assert (plan.unit, plan.guarantee.unit, plan.relation, plan.cap) == ("patient", "patient", "add_remove", 2)


def test_digest_is_stable_and_covers_every_field(plan: Plan, budget: RdpFilter) -> None:
    assert calibrate(**HOSPITAL, budget=budget).digest == plan.digest
    assert plan.digest.startswith("sha256:")
    stored = plan.to_json()
    for key, value in {"clip_norm": 0.6, "cap": 3, "unit": "record", "filter_epsilon": None}.items():
        assert plan_from_json({**stored, key: value}).digest != plan.digest


def test_plan_survives_json_and_a_changed_one_is_refused(plan: Plan) -> None:
    stored = json.loads(json.dumps(plan.to_json()))
    assert plan_from_json(stored) == plan
    for key, value in {"epsilon": 1.0, "noise_multiplier": 5.0, "steps": 1, "sampling_probability": 0.001, "event": {}, "more": 1}.items():
        with pytest.raises(ValueError, match="Expected"):
            plan_from_json({**stored, key: value})
    del stored["cap"]
    with pytest.raises(ValueError, match="all its fields"):
        plan_from_json(stored)


def test_delta_of_one_over_population_needs_a_recorded_reason(budget: RdpFilter) -> None:
    for delta in (1 / 2000, 0.1):
        with pytest.raises(ValueError, match="1/population"):
            calibrate(**{**HOSPITAL, "delta": delta})
    with pytest.raises(ValueError, match="1/population"):
        calibrate(**{**HOSPITAL, "delta": 1 / 2000}, allow_large_delta="  ")
    excepted = calibrate(**{**HOSPITAL, "delta": 1 / 2000}, budget=budget, allow_large_delta="pilot on generated text")
    assert excepted.to_json()["allow_large_delta"] == "pilot on generated text"


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0.0},
        {"epsilon": -1.0},
        {"epsilon": math.nan},
        {"epsilon": math.inf},
        {"delta": 0.0},
        {"delta": math.nan},
        {"delta": -1e-6},
        {"population": 0},
        {"population": 2000.0},
        {"expected_batch": 2001},
        {"expected_batch": 0},
        {"steps": 0},
        {"steps": 2.5},
        {"clip_norm": 0.0},
        {"clip_norm": math.nan},
        {"cap": 0},
        {"unit": ""},
    ],
)
def test_bad_targets_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        calibrate(**{**HOSPITAL, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"sampling_probability": 0.0},
        {"sampling_probability": 1.5},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"steps": 0},
        {"clip_norm": -1.0},
    ],
)
def test_bad_mechanisms_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        Mechanism(**{"sampling_probability": 0.1, "noise_multiplier": 1.0, "clip_norm": 1.0, "steps": 1, **change})


def test_a_budget_under_another_relation_is_refused(budget: RdpFilter) -> None:
    with pytest.raises(ValueError, match="relation"):
        calibrate(**HOSPITAL, budget=dataclasses.replace(budget, relation="replace_one"))
