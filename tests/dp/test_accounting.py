"""Golden figures of other libraries, the edges where accountants have failed, the budget filter, the trade-off curve, and the closed table of events."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting import DpEvent
from dp_accounting.dp_event import MixtureOfGaussiansDpEvent, RepeatAndSelectDpEvent, TruncatedSubsampledGaussianDpEvent
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import special, stats

from discreet.dp import accounting
from discreet.dp.accounting import RdpFilter, event_from_json, event_to_json, guarantee, rdp, rdp_epsilon, rdp_of_pure, trade_off


def gaussian(noise_multiplier: float, count: Any = 1) -> DpEvent:
    return dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(noise_multiplier), count)


def training(probability: float, noise_multiplier: float, steps: Any) -> DpEvent:
    return dp_accounting.SelfComposedDpEvent(dp_accounting.PoissonSampledDpEvent(probability, dp_accounting.GaussianDpEvent(noise_multiplier)), steps)


def laplace(scale: float, count: int = 1) -> DpEvent:
    return dp_accounting.SelfComposedDpEvent(dp_accounting.LaplaceDpEvent(scale), count)


def both(*events: DpEvent) -> DpEvent:
    return dp_accounting.ComposedDpEvent(list(events))


# Event, delta, then [lower, upper] for epsilon. Sources: prv_accountant 0.2.0 lower bounds, dp_accounting 0.6.0 PLD at grid 1e-4 (upper), closed forms for the plain
# Gaussian (Balle & Wang 2018) and Laplace; an independent FFT agrees to 4e-4.
GOLDEN: list[tuple[str, DpEvent, float, float, float]] = [
    ("10,000 steps", training(0.01, 1.0, 10_000), 1e-5, 6.16768381, 6.18774498),
    ("little noise", training(0.01, 0.5, 500), 1e-5, 10.27349651, 10.28301433),
    ("large batches", training(0.25, 5.0, 300), 1e-5, 3.7947317, 3.80475267),
    ("small delta", training(0.05, 1.5, 200), 1e-8, 3.31166005, 3.3216723),
    ("tiny budget", training(0.001, 8.0, 100), 1e-5, 0.0, 0.00273149),
    ("one Gaussian", gaussian(1.0), 1e-5, 4.3771781, 4.3771781),
    ("one Gaussian, small delta", gaussian(1.0), 1e-10, 6.54792407, 6.54792417),
    ("two runs", both(training(0.01, 1.0, 1000), training(0.02, 1.5, 500)), 1e-5, 2.29311556, 2.30313756),
    ("run and Laplace", both(training(0.01, 1.0, 1000), laplace(5.0, 3)), 1e-5, 2.17538666, 2.18533458),
    ("one Laplace", laplace(1.0), 1e-5, 0.99998, 0.99998),
    ("banded, 3 participations", gaussian(4.0, 3), 1e-6, 1.92535393, 1.92535395),
]


@pytest.mark.parametrize(("event", "delta", "lower", "upper"), [row[1:] for row in GOLDEN], ids=[row[0] for row in GOLDEN])
def test_golden_epsilon(event: DpEvent, delta: float, lower: float, upper: float) -> None:
    found = guarantee(event, delta=delta)
    assert lower - 1e-6 <= found.epsilon <= upper + 1e-6
    assert found.accountant == "pld"
    assert found.epsilon_rdp is not None
    assert found.epsilon <= found.epsilon_rdp
    assert found.remarks == ()


def test_golden_rdp_epsilon() -> None:
    # dp_accounting 0.6.0 and Opacus 1.6.0 agree on these to 1e-6; our orders are sparser above 6.
    for event, expected in ((training(0.004266666666666667, 1.1, 14063), 2.59665553), (gaussian(0.5), 10.7255097)):
        assert guarantee(event, delta=1e-5).epsilon_rdp == pytest.approx(expected, rel=5e-4)
        assert rdp_epsilon(event, delta=1e-5) == guarantee(event, delta=1e-5).epsilon_rdp
    assert rdp_epsilon(training(0.1, 0.0, 1), delta=1e-5) == math.inf
    assert rdp_epsilon(training(0.1, 1.0, 0), delta=1e-5) == 0.0
    with pytest.raises(ValueError, match="delta"):
        rdp_epsilon(gaussian(1.0), delta=0.0)


def test_golden_rdp_vector() -> None:
    # dp_accounting 0.6.0, rdp_privacy_accountant_test.py, q = 0.01, sigma = 2.5, 50 steps.
    vector = rdp(training(0.01, 2.5, 50), [1.5, 2.5, 5, 50, 100])
    assert vector == pytest.approx([6.70579741e-04, 1.08548710e-03, 2.18075656e-03, 2.38460375e-02, 1.67416308e02], rel=1e-6)


@pytest.mark.parametrize(("probability", "noise_multiplier"), [(24 / 180, 0.503), (0.05, 0.35), (0.5, 0.7)])
@pytest.mark.parametrize("order", [1.2, 1.5, 1.9, 2.4])
def test_little_noise_has_a_bound_at_every_fractional_order(probability: float, noise_multiplier: float, order: float) -> None:
    """dp_accounting 0.6.0 answers infinity for most of these; the truth is an integral over the noise."""
    found = rdp(training(probability, noise_multiplier, 1), [order, math.ceil(order)])
    x = np.linspace(-40 * noise_multiplier, 1 + 40 * noise_multiplier * order, 400_001)
    without, with_it = stats.norm.logpdf(x, 0, noise_multiplier), stats.norm.logpdf(x, 1, noise_multiplier)
    mixed = np.logaddexp(math.log1p(-probability) + without, math.log(probability) + with_it)
    with np.errstate(under="ignore"):
        both = [special.logsumexp(order * a + (1 - order) * b) + math.log(x[1] - x[0]) for a, b in ((mixed, without), (without, mixed))]
    assert max(both) / (order - 1) <= found[0] + 1e-9
    assert found[0] <= found[1] * (1 + 1e-12) < math.inf


def test_golden_other_mechanisms() -> None:
    truncated = dp_accounting.SelfComposedDpEvent(TruncatedSubsampledGaussianDpEvent(1000, 0.05, 80, 2.0), 5)
    untruncated = guarantee(training(0.05, 2.0, 5), delta=1e-5, grid=1e-3).epsilon
    assert untruncated < guarantee(truncated, delta=1e-5, grid=1e-3).epsilon < 2 * untruncated
    zcdp = guarantee(dp_accounting.ZCDpEvent(0.5), delta=1e-5)
    assert (zcdp.accountant, zcdp.epsilon) == ("rdp", pytest.approx(4.72850707, rel=1e-6))  # OpenDP 0.16: 4.72838698
    best_of_ten = guarantee(RepeatAndSelectDpEvent(training(0.01, 1.0, 1000), 10, 1.0), delta=1e-5)
    assert best_of_ten.epsilon == pytest.approx(4.10327066, rel=1e-6)  # once costs 2.10: a search is spend (PITFALLS 16)
    assert guarantee(training(0.01, 1.0, 1000), delta=1e-5, relation="replace_one").epsilon == pytest.approx(2.84344581, rel=1e-5)


def test_the_count_of_randomized_response_is_not_lost() -> None:
    """PLDAccountant 0.6.0 answers 1.0987 for fifty of them; the truth is 52.68."""
    fifty = dp_accounting.SelfComposedDpEvent(dp_accounting.RandomizedResponseDpEvent(0.5, 2), 50)
    assert guarantee(fifty, delta=1e-6, relation="replace_one").epsilon == pytest.approx(52.68402, rel=1e-5)


@pytest.mark.parametrize(
    ("event", "delta", "epsilon"),
    [
        (training(0.01, 0.0, 10), 1e-5, math.inf),
        (gaussian(0.0), 1e-5, math.inf),
        (laplace(0.0), 1e-5, math.inf),
        (dp_accounting.NonPrivateDpEvent(), 1e-5, math.inf),
        (training(0.01, 1.0, 0), 1e-5, 0.0),
        (training(0.01, 0.0, 0), 1e-5, 0.0),
        (training(0.0, 1.0, 1000), 1e-5, 0.0),
        (both(), 1e-5, 0.0),
        (dp_accounting.NoOpDpEvent(), 1e-5, 0.0),
        (training(0.01, 1.0, 10), 0.0, math.inf),
        (laplace(1.0), 0.0, 1.0),
        (training(0.01, 1.0, 10), 1.0, 0.0),
    ],
)
def test_edges(event: DpEvent, delta: float, epsilon: float) -> None:
    assert guarantee(event, delta=delta).epsilon == epsilon


def test_certain_sampling_is_the_full_batch() -> None:
    assert guarantee(training(1.0, 2.0, 5), delta=1e-5).epsilon == guarantee(gaussian(2.0, 5), delta=1e-5).epsilon


def test_tiny_delta_falls_back_to_rdp_and_says_so() -> None:
    found = guarantee(gaussian(3.0), delta=1e-16)
    assert (found.accountant, found.epsilon) == ("rdp", found.epsilon_rdp)
    assert found.remarks
    assert math.isfinite(found.epsilon)


@pytest.mark.parametrize(
    "event",
    [
        training(0.01, math.nan, 10),
        training(0.01, -1.0, 10),
        training(0.01, math.inf, 10),
        training(1.5, 1.0, 10),
        training(math.nan, 1.0, 10),
        training(-0.1, 1.0, 10),
        training(0.01, 1.0, -5),
        training(0.01, 1.0, 2.5),
        training(0.01, 1.0, True),
        gaussian(math.nan),
        laplace(math.nan),
        dp_accounting.ZCDpEvent(-1.0),
        dp_accounting.UnsupportedDpEvent(),
        dp_accounting.PoissonSampledDpEvent(0.1, gaussian(1.0)),
        dp_accounting.RandomizedResponseDpEvent(2.0, 2),
        MixtureOfGaussiansDpEvent(1.0, [0.0, 1.0], [0.5, 0.4]),
        RepeatAndSelectDpEvent(gaussian(math.nan), 3.0, 1.0),
    ],
)
def test_impossible_events_are_refused_by_every_entrance(event: DpEvent) -> None:
    with pytest.raises(ValueError, match="Expected"):
        guarantee(event, delta=1e-5)
    with pytest.raises(ValueError, match="Expected"):
        rdp(event, [2.0])
    with pytest.raises(ValueError, match="Expected"):
        trade_off(event)
    with pytest.raises(ValueError, match="Expected"):
        RdpFilter.open(epsilon=1.0, delta=1e-5).charge(event)


@pytest.mark.parametrize("delta", [-1e-5, math.nan, 2.0])
def test_impossible_delta_is_refused(delta: float) -> None:
    with pytest.raises(ValueError, match="delta"):
        guarantee(gaussian(1.0), delta=delta)


def test_unknown_relation_and_unaccountable_pair_are_refused() -> None:
    with pytest.raises(ValueError, match="relation"):
        guarantee(gaussian(1.0), delta=1e-5, relation="swap")  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(ValueError, match="add_remove"):
        guarantee(dp_accounting.RandomizedResponseDpEvent(0.5, 2), delta=1e-5)


def test_disagreeing_accountants_stop_the_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted defect: RDP forgets 99 of 100 steps, so PLD exceeds it."""
    right = accounting._rdp_of_parts
    monkeypatch.setattr(accounting, "_rdp_of_parts", lambda *arguments: right(*arguments) / 100)
    with pytest.raises(ValueError, match="disagree"):
        guarantee(training(0.01, 1.0, 1000), delta=1e-5)


def test_a_large_gap_is_remarked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted defect: PLD forgets most of the steps, as it did for randomized response."""
    right = accounting._pld_or_none
    monkeypatch.setattr(accounting, "_pld_or_none", lambda parts, *rest: right([(part, 1) for part, _ in parts], *rest))
    assert "less than half" in guarantee(training(0.01, 1.0, 1000), delta=1e-5).remarks[0]


@settings(deadline=None, max_examples=8)
@example(probability=0.001953125, noise_multiplier=6.0, steps=77, exponent=4)  # on this grid PLD alone exceeds RDP
@given(probability=st.floats(0.001, 1.0), noise_multiplier=st.floats(0.6, 10.0), steps=st.integers(1, 200), exponent=st.integers(3, 9))
def test_epsilon_grows_with_steps_and_stays_below_rdp(probability: float, noise_multiplier: float, steps: int, exponent: int) -> None:
    delta = 10.0**-exponent
    once, twice = (training(probability, noise_multiplier, n) for n in (steps, 2 * steps))
    assert 0 <= accounting.pld_epsilon(once, delta=delta, grid=1e-3) <= accounting.pld_epsilon(twice, delta=delta, grid=1e-3)
    priced = guarantee(twice, delta=delta, grid=1e-3)
    assert priced.epsilon_rdp is not None
    assert priced.epsilon <= priced.epsilon_rdp


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Trade-off curve


def test_trade_off_of_a_gaussian_is_exact() -> None:
    # Ten Gaussians with sigma 5 are mu = sqrt(10) / 5 GDP: TPR = Phi(Phi^-1(FPR) + mu) (Dong, Roth & Su 2022).
    mu = math.sqrt(10) / 5
    curve = trade_off(gaussian(5.0, 10))
    for fpr in (0.001, 0.01, 0.1):
        assert curve.tpr(fpr) == pytest.approx(stats.norm.cdf(stats.norm.ppf(fpr) + mu), abs=2e-6)
    assert curve.mu == pytest.approx(mu, abs=1e-5)
    assert (curve.tpr(0.0), curve.tpr(1.0)) == (pytest.approx(0.0, abs=1e-9), 1.0)


def test_trade_off_of_training() -> None:
    # riskcal 1.5.1 on the PLD: q = 0.01, sigma = 1, 1000 steps.
    curve = trade_off(training(0.01, 1.0, 1000))
    assert [curve.tpr(fpr) for fpr in (0.001, 0.01, 0.1)] == pytest.approx([0.00401389, 0.02909972, 0.19417869], abs=1e-6)
    assert [stats.norm.cdf(stats.norm.ppf(fpr) + curve.mu) >= curve.tpr(fpr) - 1e-9 for fpr in (1e-4, 0.01, 0.3)] == [True] * 3


def test_trade_off_at_the_ends() -> None:
    assert trade_off(gaussian(0.0)).tpr(0.0) == 1.0
    assert trade_off(gaussian(0.0)).mu == math.inf
    assert trade_off(both()).tpr(0.25) == pytest.approx(0.25, abs=1e-6)
    with pytest.raises(ValueError, match="fpr"):
        trade_off(gaussian(1.0)).tpr(math.nan)


def test_the_curve_of_a_guarantee_falls_with_delta() -> None:
    curve = guarantee(training(0.05, 1.5, 200), delta=1e-6).curve([1e-8, 1e-6, 1e-4])
    assert curve[0] == pytest.approx(3.3216723, rel=1e-6)
    assert all(left > right for left, right in pairwise(curve))


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Filter


def open_filter(epsilon: float = 8.0, delta: float = 1e-5) -> RdpFilter:
    return RdpFilter.open(epsilon=epsilon, delta=delta)


def test_an_open_filter_has_everything_left() -> None:
    budget = open_filter()
    assert budget.spent_epsilon() == 0.0
    assert budget.remaining_epsilon() == 8.0
    assert math.fsum(budget.shares) == pytest.approx(0.99)
    assert all(limit > 0 for limit in budget.limits)


def test_limits_convert_back_to_epsilon() -> None:
    """At every order, RDP of exactly B(order) converts to epsilon at that order's share of delta, and the shares add up to delta."""
    budget = open_filter()
    for order, share, limit in zip(budget.orders, budget.shares, budget.limits, strict=True):
        assert dp_accounting.rdp.compute_epsilon([order], [limit], share * budget.delta)[0] == pytest.approx(budget.epsilon, rel=1e-9)


def test_what_the_filter_admits_is_within_epsilon_by_both_accountants() -> None:
    budget = open_filter()
    charges = [training(0.01, 1.0, 1000), laplace(5.0, 3), training(0.02, 0.8, 500)]
    for charge in charges:
        budget = budget.charge(charge)
    total = guarantee(both(*charges), delta=budget.delta)
    assert total.epsilon_rdp is not None
    assert total.epsilon < total.epsilon_rdp < budget.spent_epsilon() < budget.epsilon


def test_a_full_filter_refuses_and_keeps_its_state() -> None:
    budget, charge = open_filter(epsilon=2.0), training(0.01, 1.0, 300)
    charged = 0
    while budget.admits(charge):
        budget = budget.charge(charge)
        charged += 1
    assert 1 < charged < 10
    before = budget.to_json()
    with pytest.raises(ValueError, match="admits"):
        budget.charge(charge)
    assert budget.to_json() == before
    assert budget.admits(training(0.01, 1.0, 0))


def test_charges_commute_and_split() -> None:
    a, b = training(0.01, 1.0, 400), laplace(3.0)
    one, two = open_filter().charge(a).charge(b), open_filter().charge(b).charge(a)
    assert one.spent == pytest.approx(two.spent)
    halves = open_filter().charge(training(0.01, 1.0, 200)).charge(training(0.01, 1.0, 200)).charge(b)
    assert halves.spent == pytest.approx(one.spent)


def test_pure_queries_are_charged_as_vectors() -> None:
    budget = open_filter()
    vector = rdp_of_pure(0.1, budget.orders)
    assert vector == pytest.approx([min(0.1, order * 0.005) for order in budget.orders])
    assert budget.charge(vector).spent == pytest.approx(tuple(vector))
    for bad in ([0.1], [-1.0] * 3, [math.nan] * 3):
        with pytest.raises(ValueError, match="charge"):
            budget.charge(bad)
    assert not budget.admits([math.inf] * 3)
    with pytest.raises(ValueError, match="epsilon"):
        rdp_of_pure(math.nan, [2.0])


def test_pure_bound_holds_for_randomized_response() -> None:
    # Renyi divergence between Bernoulli(p) and Bernoulli(1-p) with p / (1-p) = e^epsilon.
    epsilon = 0.7
    p = math.exp(epsilon) / (1 + math.exp(epsilon))
    orders = np.array([1.5, 2.0, 8.0, 64.0])
    exact = np.log(p**orders * (1 - p) ** (1 - orders) + (1 - p) ** orders * p ** (1 - orders)) / (orders - 1)
    assert (exact <= rdp_of_pure(epsilon, orders.tolist()) + 1e-12).all()


def test_no_noise_is_never_admitted() -> None:
    assert not open_filter().admits(gaussian(0.0))
    assert not open_filter().admits(dp_accounting.NonPrivateDpEvent())


def truncated(steps: int = 1000) -> DpEvent:
    return dp_accounting.SelfComposedDpEvent(TruncatedSubsampledGaussianDpEvent(10000, 0.01, 150, 1.0), steps)


def test_every_kind_of_mechanism_has_its_accountants_and_its_entry() -> None:
    assert set(accounting.ACCOUNTANTS) == set(accounting._FIELDS) - {"self_composed", "composed"}
    assert accounting.entry_of(training(0.01, 1.0, 10)) == "rdp"
    assert accounting.entry_of(truncated()) == "epsilon_delta"
    assert accounting.entry_of(both(truncated(), training(0.01, 1.0, 10))) == "epsilon_delta"
    selection = RepeatAndSelectDpEvent(training(0.01, 1.0, 10), 10.0, 1.0)
    assert accounting.entry_of(selection) == "rdp"
    assert guarantee(selection, delta=1e-5).accountant == "rdp"
    with pytest.raises(ValueError, match="known to none"):
        accounting.entry_of(both(truncated(), selection))
    with pytest.raises(ValueError, match="knows"):
        guarantee(both(truncated(), selection), delta=1e-5)


def test_an_event_of_pld_alone_is_one_query_of_the_whole_run() -> None:
    """Charged by basic composition among its like, by the RDP of its epsilon beside others; its delta comes out of the reserve."""
    budget = open_filter(epsilon=6.0)
    delta = budget.next_delta
    assert delta == pytest.approx(0.005 * 1e-5)
    epsilon = guarantee(truncated(), delta=delta).epsilon
    once = budget.charge(truncated())
    assert once.spent_epsilon() == pytest.approx(epsilon)
    assert once.spent == pytest.approx(tuple(rdp_of_pure(epsilon, budget.orders)))
    assert once.spent_delta == pytest.approx(delta)
    twice = once.charge(truncated())
    assert twice.spent_basic > 2 * epsilon  # the second was charged at half the delta
    assert not twice.admits(truncated())
    assert math.fsum(twice.shares) * twice.delta + twice.spent_delta < twice.delta
    assert not twice.admits(training(0.01, 1.0, 10)) or math.isinf(twice.charge(training(0.01, 1.0, 10)).spent_basic)
    assert RdpFilter.from_json(json.loads(json.dumps(twice.to_json()))) == twice


def test_a_query_after_training_is_charged_by_rdp_and_a_budget_without_reserve_refuses_it() -> None:
    trained = open_filter().charge(training(0.01, 1.0, 500))
    assert math.isinf(trained.basic)
    assert not trained.admits(truncated(8000))  # alone, by its epsilon, it would be admitted
    assert open_filter().admits(truncated(8000))
    old = {key: value for key, value in open_filter().to_json().items() if not key.startswith("spent_")}
    full = RdpFilter.from_json({**old, "kind": "rdp_filter/1", "shares": [0.45, 0.45, 0.1]})
    assert full.admits(training(0.01, 1.0, 10))
    with pytest.raises(ValueError, match="reserve"):
        full.charge(truncated())


def test_a_vector_charged_by_hand_closes_the_basic_sum() -> None:
    """Planted defect: a caller that adds RDP to `spent` and forgets the rest gains nothing."""
    budget = open_filter()
    spent = dataclasses.replace(budget, spent=tuple(limit + 1 for limit in budget.limits))
    assert spent.spent_epsilon() > budget.epsilon
    assert not spent.admits(truncated(1))


def renyi(event: Any, orders: tuple[float, ...], grid: float) -> Any:
    """The Renyi divergence of the composed PLD, the larger of both directions. Connecting the dots overstates it by at most grid^2 * order / 8 a step."""
    composed = accounting._pld_or_none(accounting._parts(event), "add_remove", grid)
    found = []
    for pmf in (composed._pmf_remove.to_dense_pmf(), composed._pmf_add.to_dense_pmf()):
        mass = np.asarray(pmf._probs, dtype=np.float64)
        losses = ((pmf._lower_loss + np.arange(len(mass))) * pmf._discretization)[mass > 0]
        with np.errstate(under="ignore"):
            found.append([special.logsumexp((order - 1) * losses, b=mass[mass > 0]) / (order - 1) for order in orders])
    return np.max(found, axis=0)


@pytest.mark.parametrize(
    ("event", "orders"),
    [
        (training(0.01, 1.0, 100), (2, 4)),
        (training(0.02, 2.0, 1000), (2, 4, 8)),
        (gaussian(10.0, 5), (2, 4, 8, 16)),
        (laplace(5.0, 3), (2, 4, 8, 16)),
        (gaussian(30.0, 20), (2, 4, 8, 16)),
        (training(0.25, 16.0, 20), (2, 4, 8, 16)),
    ],
)
def test_the_renyi_divergence_of_the_pld_is_that_of_rdp(event: Any, orders: tuple[float, ...]) -> None:
    """Like against like, within steps * grid^2 * order / 8; orders whose mass lies beyond the tail that composition cuts off (1e-15) are left out."""
    grid = 1e-3
    allowed = event.count * grid**2 * np.array(orders) / 8 + 1e-6
    difference = renyi(event, orders, grid) - rdp(event, orders)
    assert np.all(np.abs(difference) <= allowed)
    halved = dp_accounting.SelfComposedDpEvent(event.event, event.count // 2)
    assert np.all(np.abs(renyi(halved, orders, grid) - rdp(event, orders)) > allowed)  # the check can fail


def test_figures_of_a_guarantee() -> None:
    # riskcal 1.5.1 on the PLD; group of 4 by a mixture of Gaussians, dp_accounting 0.6.0 at grid 1e-4.
    promised = guarantee(training(0.01, 1.0, 1000), delta=1e-5)
    assert promised.trade_off.advantage == pytest.approx(0.16101842, abs=1e-6)
    assert promised.curve([1e-5]) == [promised.epsilon]
    assert guarantee(gaussian(5.0, 10), delta=1e-5).trade_off.advantage == pytest.approx(0.24817037, abs=1e-6)
    record = guarantee(training(0.001, 1.0, 1000), delta=1e-6)
    assert record.group(4).epsilon == pytest.approx(0.83414891, rel=2e-3)
    assert record.group(1).epsilon == record.epsilon
    assert guarantee(gaussian(3.0), delta=1e-6).group(3).epsilon == pytest.approx(guarantee(gaussian(1.0), delta=1e-6).epsilon)
    assert guarantee(laplace(3.0), delta=0.0).group(3).epsilon == pytest.approx(1.0, rel=1e-6)
    with pytest.raises(ValueError, match="size"):
        record.group(0)
    with pytest.raises(ValueError, match="group"):
        guarantee(truncated(10), delta=1e-5).group(2)


def test_filter_survives_json() -> None:
    budget = open_filter().charge(training(0.01, 1.0, 100))
    assert RdpFilter.from_json(json.loads(json.dumps(budget.to_json()))) == budget


@pytest.mark.parametrize(
    "change",
    [
        {"spent": [-1.0, 0.0, 0.0]},
        {"spent": [math.nan, 0.0, 0.0]},
        {"spent": [0.0]},
        {"spent": ["0", "0", "0"]},
        {"shares": [0.9, 0.9, 0.9]},
        {"orders": [1.0, 2.0, 3.0]},
        {"epsilon": math.inf},
        {"epsilon": True},
        {"delta": 0.0},
        {"relation": "swap"},
        {"kind": "other"},
        {"more": 1},
    ],
)
def test_a_tampered_filter_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        RdpFilter.from_json({**open_filter().to_json(), **change})


@pytest.mark.parametrize(
    ("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (math.inf, 1e-5), (1.0, 0.0), (1.0, 1.0), (1.0, math.nan)]
)
def test_a_bad_budget_is_not_opened(epsilon: float, delta: float) -> None:
    with pytest.raises(ValueError, match="Expected"):
        RdpFilter.open(epsilon=epsilon, delta=delta)


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Events as JSON


@pytest.mark.parametrize(
    "event",
    [
        training(0.01, 1.0, 100),
        both(training(0.01, 1.0, 100), laplace(2.0, 3), gaussian(4.0)),
        dp_accounting.ZCDpEvent(0.5),
        MixtureOfGaussiansDpEvent(1.0, [0.0, 1.0], [0.5, 0.5]),
        TruncatedSubsampledGaussianDpEvent(1000, 0.05, 80, 1.0),
        RepeatAndSelectDpEvent(training(0.01, 1.0, 10), 10.0, 1.0),
        dp_accounting.SampledWithoutReplacementDpEvent(1000, 10, dp_accounting.GaussianDpEvent(1.0)),
        dp_accounting.NoOpDpEvent(),
        dp_accounting.NonPrivateDpEvent(),
    ],
)
def test_events_survive_json(event: DpEvent) -> None:
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


@pytest.mark.parametrize(
    "value",
    [
        {"kind": "os.system"},
        {"kind": "gaussian"},
        {"kind": "gaussian", "noise_multiplier": 1.0, "module_name": "os"},
        {"kind": "gaussian", "noise_multiplier": "1.0"},
        {"kind": "gaussian", "noise_multiplier": math.nan},
        {"kind": "self_composed", "event": {"kind": "gaussian", "noise_multiplier": 1.0}, "count": 2.5},
        {"kind": "self_composed", "event": 3, "count": 2},
        {"kind": "composed", "events": 3},
        {"kind": ["gaussian"]},
        [],
    ],
)
def test_unknown_events_are_not_read(value: Any) -> None:
    with pytest.raises(ValueError, match="Expected"):
        event_from_json(value)
