"""The ledger: never overspent, whoever races; charged once, whatever crashes; never refilled, whatever it is called."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from discreet.dp.accounting import RdpFilter
from discreet.dp.mechanism import calibrate
from discreet.errors import BudgetExhausted, NotFound, PlanInvalid, ReservationRefused
from discreet.evidence.log import Log
from discreet.evidence.statement import Predicate
from discreet.keys import Key, Keyring
from discreet.ledger import CloseReason, Ledger, State
from discreet.record import Digest, Sensitive, Sensitivity, Snapshot, SubjectId
from discreet.store import Store

EPSILON, TIGHT, DELTA = 8.0, 1.0, 1e-5
MASTER = b"k" * 32
RACERS = 16


@dataclass
class House:
    url: str
    store: Store
    keyring: Keyring
    log: Log
    ledger: Ledger


def open_house(url):
    store = Store(url)
    keyring = Keyring(store, Key(MASTER))
    log = Log(store, keyring, "example.org/ward")
    return House(url, store, keyring, log, Ledger(store, log))


@pytest.fixture
def house(tmp_path):
    opened = open_house(f"sqlite:///{tmp_path}/discreet.db")
    yield opened
    opened.store.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    """A fresh database of either kind."""
    return f"sqlite:///{tmp_path}/discreet.db" if request.param == "sqlite" else request.getfixturevalue("postgres")


@pytest.fixture(scope="module")
def plan():
    """A plan that just fits a budget of epsilon 1, and many times one of epsilon 8."""
    return calibrate(
        epsilon=TIGHT,
        delta=DELTA,
        population=2000,
        expected_batch=64,
        steps=20,
        clip_norm=0.5,
        unit="patient",
        cap=1,
        budget=RdpFilter.open(epsilon=TIGHT, delta=DELTA),
    )


def snapshot(name="train", sources=("notes",)):
    root = Digest("sha256:" + (name.encode().hex() * 64)[:64])
    units = {SubjectId("S1"): (0,)}
    return Snapshot(root=root, name=name, sensitivity=Sensitivity.SPECIAL, path=Path("nowhere"), units=Sensitive(units), sources=sources)


# Opening


def test_a_budget_opens_once_and_is_logged_once(house):
    first = house.ledger.open("main", epsilon=8.0, delta=1e-5, unit="patient", sources=["notes"])
    assert (first.epsilon, first.delta, first.unit, first.sources) == (8.0, 1e-5, "patient", ("notes",))
    assert (first.remaining_epsilon, first.num_reservations) == (8.0, 0)
    assert house.ledger.open("main", epsilon=8.0, delta=1e-5, unit="patient", sources=["notes"]) == first == house.ledger.show("main")
    [entry] = house.log.select(Predicate.BUDGET_OPENED)
    assert {key: entry.fields[key] for key in ("budget", "epsilon", "delta", "unit")} == {
        "budget": "main",
        "epsilon": 8.0,
        "delta": 1e-5,
        "unit": "patient",
    }


def test_budgets_are_listed_with_what_was_spent(house):
    assert house.ledger.budgets() == []
    for name in ("b", "a"):
        house.ledger.open(name, epsilon=1.0, delta=1e-6, unit="patient")
    house.ledger.reserve_epsilon("a", 0.25)
    assert [budget.name for budget in house.ledger.budgets()] == ["a", "b"]
    shown = house.ledger.show("a").to_json()
    assert (shown["spent_epsilon"], shown["remaining_epsilon"], shown["num_reservations"]) == (0.25, 0.75, 1)


@pytest.mark.parametrize("other", [{"epsilon": 9.0}, {"delta": 1e-6}, {"unit": "note"}, {"relation": "replace_one"}])
def test_other_numbers_under_the_same_name_are_refused(house, other):
    numbers = {"epsilon": 8.0, "delta": 1e-5, "unit": "patient"}
    house.ledger.open("main", **numbers)
    with pytest.raises(ReservationRefused, match="opened with") as caught:
        house.ledger.open("main", **{**numbers, **other})
    assert caught.value.exit_code == 3
    assert house.ledger.show("main").epsilon == 8.0


@pytest.mark.parametrize("unit", ["patient", "note"])
def test_the_same_population_gets_no_fresh_budget_under_a_new_name(house, unit):
    house.ledger.open("main", epsilon=8.0, delta=1e-5, unit="patient", sources=["notes", "letters"])
    with pytest.raises(ReservationRefused, match="source letters of budget main"):
        house.ledger.open("again", epsilon=8.0, delta=1e-5, unit=unit, sources=["letters"])
    with pytest.raises(NotFound):
        house.ledger.show("again")


@pytest.mark.parametrize(
    "numbers", [(0.0, 1e-5), (-1.0, 1e-5), (math.nan, 1e-5), (math.inf, 1e-5), (1.0, 0.0), (1.0, 1.0), (1.0, math.nan), (1.0, -1e-5)]
)
def test_impossible_budgets_are_refused(house, numbers):
    with pytest.raises(PlanInvalid):
        house.ledger.open("main", epsilon=numbers[0], delta=numbers[1], unit="patient")


@pytest.mark.parametrize("name", ["", "a b", "../x", "x" * 64, "ä"])
def test_names_are_plain(house, name):
    with pytest.raises(PlanInvalid):
        house.ledger.open(name, epsilon=1.0, delta=1e-5, unit="patient")


def test_an_unopened_budget_is_not_found(house, plan):
    for use in (house.ledger.show, house.ledger.filter, lambda name: house.ledger.reserve_epsilon(name, 0.1)):
        with pytest.raises(NotFound, match="budget open"):
            use("none")
    with pytest.raises(NotFound):
        house.ledger.reserve("none", plan, snapshot(), "run-1")


# Reserving a plan


@pytest.fixture
def opened(house):
    house.ledger.open("main", epsilon=EPSILON, delta=DELTA, unit="patient")
    return house


@pytest.fixture
def tight(house):
    house.ledger.open("main", epsilon=TIGHT, delta=DELTA, unit="patient")
    return house


def test_a_reservation_charges_the_whole_event_and_binds(opened, plan):
    before = opened.ledger.filter("main")
    held = opened.ledger.reserve("main", plan, snapshot(), "run-1")
    assert (held.run, held.plan, held.snapshot, held.state) == ("run-1", plan.digest, snapshot().root, State.RESERVED)
    assert opened.ledger.filter("main") == before.charge(plan.event)
    assert held.remaining_epsilon == opened.ledger.show("main").remaining_epsilon < EPSILON
    [entry] = opened.log.select(Predicate.RESERVED)
    assert entry.subjects == (plan.digest, snapshot().root)
    assert entry.fields["reservation"] == held.id


def test_the_same_run_and_plan_is_the_same_reservation(opened, plan):
    first = opened.ledger.reserve("main", plan, snapshot(), "run-1")
    for _ in range(3):
        assert opened.ledger.reserve("main", plan, snapshot(), "run-1") == first
    assert opened.ledger.show("main").num_reservations == 1
    assert len(opened.log.select(Predicate.RESERVED)) == 1


def test_one_run_holds_one_plan_on_one_snapshot(opened, plan):
    opened.ledger.reserve("main", plan, snapshot(), "run-1")
    opened.ledger.open("other", epsilon=EPSILON, delta=DELTA, unit="patient")
    state = opened.ledger.filter("main")
    for name, chosen, frozen in [
        ("main", replace(plan, cap=2), snapshot()),
        ("main", plan, snapshot("second")),
        ("other", plan, snapshot()),
    ]:
        with pytest.raises(ReservationRefused, match="run run-1"):
            opened.ledger.reserve(name, chosen, frozen, "run-1")
    assert opened.ledger.filter("main") == state


def test_an_exhausted_budget_refuses_and_charges_nothing(tight, plan):
    tight.ledger.reserve("main", plan, snapshot(), "run-1")
    state = tight.ledger.filter("main")
    with pytest.raises(BudgetExhausted, match="of 1 left") as caught:
        tight.ledger.reserve("main", plan, snapshot(), "run-2")
    assert caught.value.exit_code == 3
    assert tight.ledger.filter("main") == state
    assert tight.ledger.reserve("main", plan, snapshot(), "run-1").state is State.RESERVED, "the first run still holds its own"


def test_a_new_run_of_the_same_plan_is_a_new_charge(opened, plan):
    opened.ledger.reserve("main", plan, snapshot(), "run-1")
    once = opened.ledger.filter("main")
    opened.ledger.reserve("main", plan, snapshot(), "run-2")
    assert opened.ledger.filter("main") == once.charge(plan.event)


def test_a_source_is_charged_to_its_first_budget_for_good(opened, plan):
    opened.ledger.reserve("main", plan, snapshot(), "run-1")
    opened.ledger.open("fresh", epsilon=EPSILON, delta=DELTA, unit="patient")
    with pytest.raises(ReservationRefused, match="notes of budget main"):
        opened.ledger.reserve("fresh", plan, snapshot("renamed", ("letters", "notes")), "run-2")
    assert opened.ledger.show("fresh").sources == (), "a refusal claims nothing"
    opened.ledger.reserve("fresh", plan, snapshot("letters", ("letters",)), "run-2")


def test_a_snapshot_without_sources_is_refused(opened, plan):
    with pytest.raises(ReservationRefused, match="names its sources"):
        opened.ledger.reserve("main", plan, snapshot(sources=()), "run-1")


def test_another_unit_is_refused(opened, plan):
    with pytest.raises(ReservationRefused, match="one note"):
        opened.ledger.reserve("main", replace(plan, unit="note"), snapshot(), "run-1")


# Spending and closing


def test_spending_is_logged_once_and_costs_nothing_more(opened, plan):
    held = opened.ledger.reserve("main", plan, snapshot(), "run-1")
    state = opened.ledger.filter("main")
    spent = [opened.ledger.spend(held) for _ in range(3)]
    assert {s.state for s in spent} == {State.SPENT}
    assert opened.ledger.filter("main") == state
    [entry] = opened.log.select(Predicate.SPENT)
    assert entry.fields["noise_multiplier"] == plan.noise_multiplier
    assert (entry.fields["run"], entry.fields["plan"], entry.fields["steps"]) == ("run-1", plan.digest, plan.steps)
    assert opened.ledger.reserve("main", plan, snapshot(), "run-1").state is State.SPENT


@pytest.mark.parametrize("reason", CloseReason)
@pytest.mark.parametrize("spent", [False, True])
def test_nothing_comes_back_whatever_ended_the_run(opened, plan, reason, spent):
    held = opened.ledger.reserve("main", plan, snapshot(), "run-1")
    state = opened.ledger.filter("main")
    if spent:
        opened.ledger.spend(held)
    for _ in range(2):
        assert opened.ledger.close(held, reason, executed_steps=1).state is State.CLOSED
    assert opened.ledger.filter("main") == state
    [entry] = opened.log.select(Predicate.CLOSED)
    assert (entry.fields["reason"], entry.fields["steps"]) == (reason.value, 1)


def test_a_closed_run_neither_spends_nor_reserves(opened, plan):
    held = opened.ledger.reserve("main", plan, snapshot(), "run-1")
    opened.ledger.close(held, CloseReason.CRASH)
    for use in (
        lambda: opened.ledger.spend(held),
        lambda: opened.ledger.reserve("main", plan, snapshot(), "run-1"),
        lambda: opened.ledger.close(held, CloseReason.COMPLETED),
    ):
        with pytest.raises(ReservationRefused, match="closed"):
            use()


def test_a_forged_reservation_is_refused(opened, plan):
    held = opened.ledger.reserve("main", plan, snapshot(), "run-1")
    for forged in (
        replace(held, id="main-9"),
        replace(held, plan=snapshot().root),
        replace(held, run="run-2"),
        replace(held, snapshot=plan.digest),
    ):
        for use in (opened.ledger.spend, lambda r: opened.ledger.close(r, CloseReason.COMPLETED)):
            with pytest.raises(ReservationRefused, match="of this ledger"):
                use(forged)


@pytest.mark.parametrize("steps", [-1, 21])
def test_impossible_step_counts_are_refused(opened, plan, steps):
    held = opened.ledger.reserve("main", plan, snapshot(), "run-1")
    with pytest.raises(PlanInvalid, match="0 to 20"):
        opened.ledger.close(held, CloseReason.COMPLETED, executed_steps=steps)


# Pure queries


def test_pure_queries_add_up_to_the_budget_and_not_beyond(house):
    house.ledger.open("queries", epsilon=1.0, delta=1e-6, unit="patient")
    left = [house.ledger.reserve_epsilon("queries", 0.1).remaining_epsilon for _ in range(10)]
    assert left == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    for epsilon in (0.1, 1e-3):
        with pytest.raises(BudgetExhausted):
            house.ledger.reserve_epsilon("queries", epsilon)
    assert house.ledger.show("queries").num_reservations == 10


def test_many_small_queries_compose_better_than_they_add(house):
    """0.2 a query: the sum passes 8 after 40 of them, the RDP orders have room for more."""
    house.ledger.open("queries", epsilon=8.0, delta=1e-6, unit="patient")
    for _ in range(45):
        last = house.ledger.reserve_epsilon("queries", 0.2)
    assert 0 < last.remaining_epsilon < 8.0
    assert house.ledger.filter("queries").remaining_epsilon() == last.remaining_epsilon


def test_a_gaussian_uses_up_order_infinity(tight, plan):
    """After a mechanism with a delta the sum of epsilons proves nothing: only the RDP orders admit."""
    tight.ledger.reserve("main", plan, snapshot(), "run-1")
    with pytest.raises(BudgetExhausted):
        tight.ledger.reserve_epsilon("main", 0.5)


def test_a_query_leaves_less_for_a_plan(tight, plan):
    tight.ledger.reserve_epsilon("main", 0.3)
    with pytest.raises(BudgetExhausted):
        tight.ledger.reserve("main", plan, snapshot(), "run-1")


@pytest.mark.parametrize("epsilon", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 5e-324, sys.float_info.min / 2])
def test_worthless_spends_are_refused(house, epsilon):
    house.ledger.open("queries", epsilon=1.0, delta=1e-6, unit="patient")
    with pytest.raises(PlanInvalid):
        house.ledger.reserve_epsilon("queries", epsilon)
    assert house.ledger.show("queries").num_reservations == 0


@pytest.mark.parametrize("epsilon", [1e-9, 1e-200, sys.float_info.min])
def test_a_spend_that_the_floats_would_lose_is_refused(house, epsilon):
    house.ledger.open("queries", epsilon=1.0, delta=1e-6, unit="patient")
    house.ledger.reserve_epsilon("queries", 0.5)
    with pytest.raises(PlanInvalid, match="accounted for"):
        house.ledger.reserve_epsilon("queries", epsilon)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(min_value=1e-3, max_value=0.7), max_size=12))
def test_admitted_pure_queries_are_within_some_order(house, wanted):
    """Checked against the rule itself, computed here from the admitted epsilons alone."""
    name = f"b{uuid4().hex[:8]}"
    house.ledger.open(name, epsilon=1.0, delta=1e-6, unit="patient")
    admitted = []
    for epsilon in wanted:
        try:
            house.ledger.reserve_epsilon(name, epsilon)
        except BudgetExhausted:
            continue
        admitted.append(epsilon)
    opened = RdpFilter.open(epsilon=1.0, delta=1e-6)
    within = [sum(min(e, order * e * e / 2) for e in admitted) <= limit + 1e-12 for order, limit in zip(opened.orders, opened.limits, strict=True)]
    assert any(within) or sum(Decimal(repr(e)) for e in admitted) <= 1


# Crashes and races


def _children(work, arguments):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, args=a) for a in arguments]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


def _race(url, barrier, results, number, epsilon):
    house = open_house(url)
    barrier.wait()
    try:
        house.ledger.reserve_epsilon("main", epsilon)
        results[number] = 1
    except BudgetExhausted:
        results[number] = 0
    finally:
        house.store.close()


@pytest.mark.parametrize(("spent_before", "expected"), [(0, 3), (2, 1)])
def test_sixteen_processes_never_overspend(url, spent_before, expected):
    """Limit 1.0, cost 0.3: three slices, or the last one. A ledger that reads and then inserts admits up to sixteen (PITFALLS 18)."""
    house = open_house(url)
    house.ledger.open("main", epsilon=1.0, delta=1e-6, unit="patient")
    for _ in range(spent_before):
        house.ledger.reserve_epsilon("main", 0.3)
    house.store.close()
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(RACERS), context.Array("i", [-1] * RACERS)
    exits = _children(_race, [(url, barrier, results, number, 0.3) for number in range(RACERS)])
    assert exits == [0] * RACERS
    assert sorted(results) == [0] * (RACERS - expected) + [1] * expected
    after = open_house(url)
    shown = after.ledger.show("main")
    assert shown.num_reservations == spent_before + expected == 3
    assert shown.remaining_epsilon == pytest.approx(0.1)
    assert len(after.log.select(Predicate.RESERVED)) == 3
    after.store.close()


def test_the_race_test_catches_a_ledger_that_does_not_lock(tmp_path, monkeypatch):
    """The mutant: the same race with transactions that read before they take the lock."""
    url = f"sqlite:///{tmp_path}/discreet.db"
    house = open_house(url)
    house.ledger.open("main", epsilon=1.0, delta=1e-6, unit="patient")
    house.store.close()
    context = multiprocessing.get_context("fork")
    barrier, results, read = context.Barrier(RACERS), context.Array("i", [-1] * RACERS), context.Barrier(RACERS)

    def racer(number):
        mutant = open_house(url)
        import discreet.ledger as module

        with mutant.store.transaction() as tx:
            stale = module._account(tx, "main")
        read.wait()  # every process has read the balance before the first one writes
        module._account = lambda tx, name: stale
        _race_with(mutant, barrier, results, number)

    assert _children(racer, [(number,) for number in range(RACERS)]) == [0] * RACERS
    assert sum(results) == RACERS, "every one of them was admitted: the check in the test above can fail"


def _race_with(house, barrier, results, number):
    barrier.wait()
    try:
        house.ledger.reserve_epsilon("main", 0.3)
        results[number] = 1
    except BudgetExhausted:
        results[number] = 0


def _die(url, plan, moment):
    """Reserves and spends, and is killed just before or just after a commit."""
    house = open_house(url)
    append, calls = house.log.append, 0

    def dying(tx, statement):
        nonlocal calls
        calls += 1
        index = append(tx, statement)
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return index

    house.log.append = dying
    held = house.ledger.reserve("main", plan, snapshot(), "run-1")
    if moment == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    house.ledger.spend(held)
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("moment", "state"), [(1, None), (0, State.RESERVED), (2, State.RESERVED), (3, State.SPENT)])
def test_sigkill_never_spends_twice(url, plan, moment, state):
    """Killed inside `reserve`, between, inside `spend`, after: the next call of the same run ends with one charge."""
    house = open_house(url)
    house.ledger.open("main", epsilon=EPSILON, delta=DELTA, unit="patient")
    house.store.close()
    assert _children(_die, [(url, plan, moment)]) == [-signal.SIGKILL]
    house = open_house(url)
    once = RdpFilter.open(epsilon=EPSILON, delta=DELTA).charge(plan.event)
    assert house.ledger.show("main").num_reservations == (0 if state is None else 1)
    held = house.ledger.reserve("main", plan, snapshot(), "run-1")
    assert held.state is (state or State.RESERVED)
    assert house.ledger.spend(held).state is State.SPENT
    assert house.ledger.filter("main") == once
    assert [len(house.log.select(p)) for p in (Predicate.RESERVED, Predicate.SPENT)] == [1, 1]
    house.store.close()
