"""The number of tries has its declared distribution, and a search costs what repeated selection or composition says."""

from __future__ import annotations

import json
from typing import Any

import dp_accounting
import numpy as np
import pytest

from discreet.dp import accounting, mechanism
from discreet.dp.accounting import RdpFilter, entry_of, guarantee
from discreet.dp.mechanism import calibrate, plan_from_json
from discreet.dp.selection import Search, Tries

RUN = mechanism.event_of(sampling_probability=0.01, noise_multiplier=1.0, steps=1000)
COMMON: dict[str, Any] = {"epsilon": 4.0, "delta": 1e-4, "population": 1000, "expected_batch": 50, "steps": 20, "clip_norm": 1.0}


@pytest.mark.parametrize(
    ("search", "tolerance"),
    [
        (Search(tries=Tries.NEGATIVE_BINOMIAL, mean=4.0), 0.01),
        (Search(tries=Tries.NEGATIVE_BINOMIAL, mean=4.0, shape=0.5), 0.02),
        (Search(tries=Tries.NEGATIVE_BINOMIAL, mean=4.0, shape=0.0), 0.03),
        (Search(tries=Tries.NEGATIVE_BINOMIAL, mean=1.0), 0.0),
        (Search(tries=Tries.POISSON, mean=4.0), 0.01),
    ],
)
def test_the_number_of_tries_has_its_mean(search: Search, tolerance: float) -> None:
    """By quantiles, not by luck: the inverse of the distribution at evenly spaced uniforms."""
    numbers = [search.number(float(u)) for u in (np.arange(5000) + 0.5) / 5000]
    assert np.mean(numbers) == pytest.approx(search.mean, rel=max(tolerance, 1e-9))
    assert numbers == sorted(numbers)
    assert min(numbers) == (0 if search.tries is Tries.POISSON else 1)


def test_geometric_and_poisson_have_their_chances() -> None:
    geometric = Search(tries=Tries.NEGATIVE_BINOMIAL, mean=4.0)
    assert [geometric.number(u) for u in (0.0, 0.2499, 0.2501, 0.4374, 0.4376)] == [1, 1, 2, 2, 3]
    poisson = Search(tries=Tries.POISSON, mean=2.0)
    assert [poisson.number(u) for u in (0.0, 0.1353, 0.1354, 0.4060, 0.4061)] == [0, 0, 1, 1, 2]


def test_golden_repeated_selection() -> None:
    best_of_ten = Search(tries=Tries.NEGATIVE_BINOMIAL, mean=10.0).event(RUN)
    found = guarantee(best_of_ten, delta=1e-5)
    assert found.accountant == "rdp"
    assert found.epsilon == pytest.approx(4.10327066, rel=5e-3)  # dp_accounting 0.6.0; one run costs 1.83
    assert not accounting.has_pld(best_of_ten)
    assert entry_of(best_of_ten) == "rdp"
    budget = RdpFilter.open(epsilon=10.0, delta=1e-5)
    assert guarantee(RUN, delta=1e-5).epsilon < budget.epsilon_of(best_of_ten) < 2 * found.epsilon


@pytest.mark.parametrize("tries", [Tries.EACH, Tries.GUIDED])
def test_a_grid_and_a_guided_search_are_compositions(tries: Tries) -> None:
    event = Search(tries=tries, mean=3.0).event(RUN)
    assert (
        guarantee(event, delta=1e-5).epsilon
        == guarantee(mechanism.event_of(sampling_probability=0.01, noise_multiplier=1.0, steps=3000), delta=1e-5).epsilon
    )
    with pytest.raises(ValueError, match="whole number of tries"):
        Search(tries=tries, mean=2.5)


def test_a_private_score_is_part_of_every_try() -> None:
    scored = Search(tries=Tries.EACH, mean=2.0, score_epsilon=0.1).event(RUN)
    expected = dp_accounting.SelfComposedDpEvent(dp_accounting.ComposedDpEvent([RUN, dp_accounting.LaplaceDpEvent(10.0)]), 2)
    assert scored == expected
    selected = Search(tries=Tries.NEGATIVE_BINOMIAL, mean=4.0, score_epsilon=0.1)
    assert (
        guarantee(selected.event(RUN), delta=1e-5).epsilon > guarantee(Search(tries=Tries.NEGATIVE_BINOMIAL, mean=4.0).event(RUN), delta=1e-5).epsilon
    )


def test_a_plan_pays_for_the_whole_search() -> None:
    search = Search(tries=Tries.NEGATIVE_BINOMIAL, mean=4.0)
    budget = RdpFilter.open(epsilon=4.0, delta=1e-4)
    one, searched = calibrate(**COMMON, budget=budget), calibrate(**COMMON, budget=budget, search=search)
    assert searched.noise_multiplier > 1.1 * one.noise_multiplier
    assert searched.admitted_by(budget)
    assert searched.event == search.event(searched.mechanism.event)
    stored = json.loads(json.dumps(searched.to_json()))
    assert plan_from_json(stored) == searched
    with pytest.raises(ValueError, match="Expected"):
        plan_from_json({**stored, "search": {**stored["search"], "mean": 2.0}})
    poisson = calibrate(**COMMON, search=Search(tries=Tries.POISSON, mean=2.0))
    assert plan_from_json(json.loads(json.dumps(poisson.to_json(), allow_nan=False))) == poisson
    alone = calibrate(**COMMON, search=search)
    assert 3.9 < alone.guarantee.epsilon <= 4.0
    assert alone.guarantee.accountant == "rdp"


def test_a_search_promises_a_group_nothing() -> None:
    """No exact event of a group is known for repeated selection, so none is made up; of a fixed number of tries there is one."""
    with pytest.raises(ValueError, match="what it costs a group; got RepeatAndSelectDpEvent"):
        guarantee(Search(tries=Tries.NEGATIVE_BINOMIAL, mean=4.0).event(RUN), delta=1e-5).group(2)
    fixed = guarantee(Search(tries=Tries.EACH, mean=3.0).event(RUN), delta=1e-5)
    assert fixed.group(2).epsilon > fixed.epsilon


def test_a_run_that_only_pld_knows_is_not_searched_by_selection() -> None:
    """RDP takes no mixtures, PLD takes no selection: nobody knows the whole, so it is refused."""
    with pytest.raises(ValueError, match="Expected"):
        calibrate(**COMMON, cap=2, sampling=mechanism.Sampling.POISSON_DOCUMENTS, search=Search(tries=Tries.NEGATIVE_BINOMIAL, mean=4.0))


@pytest.mark.parametrize(
    "wrong", [{"mean": 0.5}, {"mean": float("nan")}, {"shape": -1.0}, {"tries": Tries.POISSON, "shape": 2.0}, {"score_epsilon": 0.0}]
)
def test_figures_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        Search(**{"tries": Tries.NEGATIVE_BINOMIAL, "mean": 4.0, **wrong})
