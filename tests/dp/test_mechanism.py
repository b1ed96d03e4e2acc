"""Calibration against golden noise multipliers, the refusals, and a plan that cannot be altered without being noticed."""

from __future__ import annotations

import dataclasses
import json
import math
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from discreet.dp import mechanism
from discreet.dp.accounting import RdpFilter, guarantee
from discreet.dp.combine import Combine
from discreet.dp.mechanism import Adaptive, Mechanism, Plan, Sampling, calibrate, noise_for, plan_from_json
from discreet.keys import Key

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


def test_a_plan_priced_by_another_numerics_library_keeps_its_figures(plan: Plan) -> None:
    """Last digits may differ; a figure that understates, or is far off, may not."""
    stored = plan.to_json()
    other = {**stored, "epsilon": stored["epsilon"] * (1 + 1e-7), "epsilon_rdp": stored["epsilon_rdp"] * (1 - 1e-9)}
    rebuilt = plan_from_json(other)
    assert rebuilt.to_json() == other
    assert rebuilt.digest != plan.digest
    for wrong in (0.999, 1.02):
        with pytest.raises(ValueError, match="epsilon"):
            plan_from_json({**stored, "epsilon": stored["epsilon"] * wrong})
    with pytest.raises(ValueError, match="epsilon"):
        plan_from_json({**stored, "epsilon": "3.0"})


SAMPLERS: dict[Sampling, dict[str, Any]] = {
    Sampling.POISSON: {},
    Sampling.TRUNCATED_POISSON: {"sampling": Sampling.TRUNCATED_POISSON, "batch_limit": 80},
    Sampling.CYCLIC_POISSON: {"sampling": Sampling.CYCLIC_POISSON, "bands": 4},
    Sampling.POISSON_DOCUMENTS: {"sampling": Sampling.POISSON_DOCUMENTS},
}
BANDS: dict[str, Any] = {"bands": 3}


@pytest.fixture(scope="module", params=list(Sampling))
def sampled(request: pytest.FixtureRequest) -> Plan:
    return calibrate(**HOSPITAL, **SAMPLERS[request.param])


def test_every_sampler_has_its_event(sampled: Plan) -> None:
    assert set(mechanism._PAIRS) == set(Sampling)
    assert 0.99 * 3 < sampled.guarantee.epsilon <= 3
    assert sampled.event == sampled.mechanism.event
    stored = json.loads(json.dumps(sampled.to_json()))
    assert plan_from_json(stored) == sampled
    for other in set(Sampling) - {sampled.sampling}:
        with pytest.raises(ValueError, match="Expected"):
            plan_from_json({**stored, "sampling": other.value})


@pytest.mark.parametrize("sampling", [Sampling.TRUNCATED_POISSON, Sampling.POISSON_DOCUMENTS])
def test_a_plan_of_pld_alone_is_calibrated_to_a_budget(sampling: Sampling, budget: RdpFilter) -> None:
    plan = calibrate(**HOSPITAL, **SAMPLERS[sampling], budget=budget)
    assert plan.admitted_by(budget)
    assert plan.filter_epsilon is not None
    assert plan.guarantee.epsilon_rdp is None
    assert plan.guarantee.epsilon < plan.filter_epsilon <= 3


NAMES = tuple(f"unit-{number}" for number in range(300))
SIZES = tuple(1 + number % 4 for number in range(300))


def run_key(number: int = 1) -> Key:
    return Key(number.to_bytes(32, "little"))


def draws(plan: Plan, steps: int = 400, names: tuple[str, ...] = NAMES) -> list[list[mechanism.Group]]:
    return [mechanism.draw(plan, SIZES[: len(names)], names, key=run_key(), step=step) for step in range(1, steps + 1)]


@cache
def small(sampling: Sampling, **more: Any) -> Plan:
    common = {"epsilon": 8.0, "delta": 1e-4, "population": 300, "expected_batch": 30, "steps": 5, "clip_norm": 1.0, "cap": 2}
    return calibrate(**{**common, "sampling": sampling, **more})


@pytest.mark.parametrize("sampling", list(Sampling))
def test_inclusion_is_what_the_event_says(sampling: Sampling) -> None:
    """Counts of inclusion against the binomial of the event's own probability; false-alarm rate 1e-6 for a fresh key."""
    plan = small(
        sampling, **({"batch_limit": 300} if sampling is Sampling.TRUNCATED_POISSON else BANDS if sampling is Sampling.CYCLIC_POISSON else {})
    )
    drawn = draws(plan)
    probability = plan.sampling_probability
    places = sum(min(size, plan.cap) for size in SIZES) if sampling is Sampling.POISSON_DOCUMENTS else len(NAMES)
    if sampling is Sampling.CYCLIC_POISSON:  # a round of as many steps as there are groups asks everyone once
        drawn = [[group for step in drawn[first : first + 3] for group in step] for first in range(0, len(drawn) - 2, 3)]
    total = sum(len(step) for step in drawn)
    assert stats.binomtest(total, places * len(drawn), probability).pvalue > 1e-6
    sizes = np.array([len(step) for step in drawn])
    low, high = stats.chi2.ppf([5e-7, 1 - 5e-7], len(sizes) - 1) / (len(sizes) - 1)
    expected = places * probability * (1 - probability)
    assert low * expected < sizes.var(ddof=1) < high * expected
    assert draws(plan, steps=3) == draws(plan, steps=3)


def test_cyclic_groups_take_turns_and_are_fair() -> None:
    plan = small(Sampling.CYCLIC_POISSON, **BANDS)
    turns: dict[int, set[int]] = {}
    for step, drawn in enumerate(draws(plan, steps=120)):
        for unit, _ in drawn:
            turns.setdefault(unit, set()).add(step % 3)
    assert all(len(found) == 1 for found in turns.values())
    sizes = [sum(found == {turn} for found in turns.values()) for turn in range(3)]
    assert sum(sizes) == len(NAMES)
    assert stats.chisquare(sizes).pvalue > 1e-6


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"sampling": Sampling.CYCLIC_POISSON}, "Expected bands for cyclic Poisson"),
        ({"bands": 3}, "Expected bands for cyclic Poisson"),
        ({"sampling": Sampling.CYCLIC_POISSON, "bands": 26}, "bands=26"),
        ({"sampling": Sampling.CYCLIC_POISSON, "bands": 20, "expected_batch": 128}, "bands=20 <= population"),
        ({"sampling": Sampling.CYCLIC_POISSON, "bands": 2, "adaptive": Adaptive(quantile=0.5, rate=0.2, votes_multiplier=3.0)}, "fixed clip norm"),
        ({"adaptive": Adaptive(quantile=0.5, rate=0.2, votes_multiplier=0.1)}, "noise multiplier"),
    ],
)
def test_what_does_not_go_together_is_refused(more: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        calibrate(**{**HOSPITAL, **more})


def test_an_adaptive_clip_norm_is_paid_for(plan: Plan, budget: RdpFilter) -> None:
    """Gradient and votes are one Gaussian of the joint multiplier: that is accounted, so the gradient alone needs a little more noise (arXiv 1905.03871, theorem 1)."""
    moving = calibrate(**HOSPITAL, budget=budget, adaptive=Adaptive(quantile=0.5, rate=0.2, votes_multiplier=64 / 20))
    assert moving.mechanism.accounted_multiplier == pytest.approx(plan.noise_multiplier, rel=1e-3)
    assert moving.noise_multiplier > plan.noise_multiplier * 1.001
    expected = mechanism.event_of(sampling_probability=64 / 2000, noise_multiplier=moving.mechanism.accounted_multiplier, steps=25)
    assert moving.event == expected
    stored = json.loads(json.dumps(moving.to_json()))
    assert plan_from_json(stored) == moving
    for wrong in ({**stored["adaptive"], "votes_multiplier": 30.0}, {**stored["adaptive"], "quantile": 2.0}, {}):
        with pytest.raises(ValueError, match="Expected"):
            plan_from_json({**stored, "adaptive": wrong})


def test_a_unit_is_clipped_as_one_or_each_document_alone() -> None:
    for sampling in (Sampling.POISSON, Sampling.POISSON_DOCUMENTS):
        kept: dict[int, set[int]] = {}
        for groups in draws(small(sampling), steps=100):
            for unit, places in groups:
                assert len(places) == (1 if sampling is Sampling.POISSON_DOCUMENTS else min(SIZES[unit], 2))
                kept.setdefault(unit, set()).update(places)
        over_all = max(len(places) for places in kept.values())
        assert over_all == (2 if sampling is Sampling.POISSON_DOCUMENTS else 4)  # the cap of ELS holds over the whole run


def test_truncation_keeps_a_fair_choice_of_at_most_the_limit() -> None:
    plan = small(Sampling.TRUNCATED_POISSON, batch_limit=20)
    drawn = draws(plan)
    assert max(len(step) for step in drawn) == 20
    counts = np.bincount([unit for step in drawn for unit, _ in step], minlength=300)
    assert stats.chisquare(counts).pvalue > 1e-6
    crowd = tuple(f"unit-{number}" for number in range(301))
    with pytest.raises(ValueError, match="population"):
        mechanism.draw(plan, (1,) * 301, crowd, key=run_key(), step=1)


def test_truncation_with_few_units_leaves_places_empty() -> None:
    """Half of the places are empty, so half of at most twenty is the mean: filling up would double a unit's chance."""
    plan = small(Sampling.TRUNCATED_POISSON, batch_limit=20)
    drawn = draws(plan, names=NAMES[:150])
    assert np.mean([len(step) for step in drawn]) == pytest.approx(10, abs=0.6)


def test_a_batch_limit_belongs_to_truncation() -> None:
    for change in ({"batch_limit": 5}, {"sampling": Sampling.TRUNCATED_POISSON}, {"sampling": Sampling.TRUNCATED_POISSON, "batch_limit": 0}):
        with pytest.raises(ValueError, match="batch_limit"):
            calibrate(**{**HOSPITAL, **change})
    with pytest.raises(ValueError, match="name"):
        mechanism.draw(small(Sampling.POISSON), (1, 2), ("a",), key=run_key(), step=1)


@pytest.mark.slow
def test_sampling_documents_never_costs_more_than_the_worst_group() -> None:
    """ELS of at most one document is plain Poisson sampling; of two, it lies between one participation and a doubled sensitivity."""
    common: dict[str, Any] = {"sampling_probability": 0.01, "noise_multiplier": 1.0, "clip_norm": 1.0, "steps": 100}
    one, two = (guarantee(Mechanism(**common, sampling=Sampling.POISSON_DOCUMENTS, cap=cap).event, delta=1e-5).epsilon for cap in (1, 2))
    plain = guarantee(Mechanism(**common).event, delta=1e-5).epsilon
    doubled = guarantee(Mechanism(**{**common, "sampling_probability": 0.02, "noise_multiplier": 0.5}).event, delta=1e-5).epsilon
    assert one == pytest.approx(plain, rel=1e-3)
    assert plain < two < doubled


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


def test_how_documents_combine_is_part_of_the_plan_and_costs_nothing(plan: Plan, budget: RdpFilter) -> None:
    mean = calibrate(**HOSPITAL, budget=budget, combine=Combine.MEAN)
    assert mean.noise_multiplier == plan.noise_multiplier
    assert (plan.combine, mean.combine) == (Combine.SUM, Combine.MEAN)
    assert mean.digest != plan.digest
    assert plan_from_json(mean.to_json()) == mean
