"""The ledger: never overspent, whoever races; charged once, whatever crashes; nothing comes back, whatever it is called."""

from __future__ import annotations

import hashlib
import math
import multiprocessing
import os
import signal
import sqlite3
import sys
import threading
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from uuid import uuid4

import dp_accounting
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from discreet import cohorts
from discreet import store as store_module
from discreet.dp.accounting import RdpFilter
from discreet.dp.mechanism import Mechanism, Sampling, calibrate, event_of
from discreet.errors import BudgetExhausted, ClockBackwards, NotFound, OperationFailed, PlanInvalid, ReservationRefused
from discreet.evidence.log import Log
from discreet.evidence.statement import Predicate
from discreet.keys import Key, Keyring
from discreet.ledger import CarryOver, CloseReason, Kind, Ledger, Period, Spend, State, unopened
from discreet.record import Digest, Sensitive, Sensitivity, Snapshot, SubjectId
from discreet.store import Store

EPSILON, TIGHT, DELTA = 8.0, 1.0, 1e-5
MASTER = b"k" * 32
RACERS = 32


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
    return House(url, store, keyring, log, Ledger(store, keyring, log))


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


def pay(ledger, name, epsilon):
    """A pure query, charged to everyone."""
    return ledger.charge(name, [Spend(kind=Kind.STATISTICS, epsilon=epsilon)])[0]


def snapshot(name="train", sources=("notes",), people=("S1",)):
    root = Digest("sha256:" + hashlib.sha256(name.encode()).hexdigest())
    units = {SubjectId(person): (position,) for position, person in enumerate(people)}
    return Snapshot(root=root, name=name, sensitivity=Sensitivity.SPECIAL, path=Path("nowhere"), units=Sensitive(units), sources=sources)


# Opening


def test_a_budget_opens_once_and_is_logged_once(house):
    first = house.ledger.open("main", epsilon=8.0, delta=1e-5, unit="patient")
    assert (first.epsilon, first.delta, first.unit) == (8.0, 1e-5, "patient")
    assert (first.remaining_epsilon, first.num_reservations) == (8.0, 0)
    assert house.ledger.open("main", epsilon=8.0, delta=1e-5, unit="patient") == first == house.ledger.show("main")
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
    pay(house.ledger, "a", 0.25)
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
    for use in (house.ledger.show, house.ledger.filter, lambda name: pay(house.ledger, name, 0.1)):
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


def test_a_new_name_is_no_fresh_budget(tight, plan):
    """Whatever the budget and the snapshot are called, and however large the budget is."""
    tight.ledger.reserve("main", plan, snapshot(), "run-1")
    tight.ledger.open("fresh", epsilon=100.0, delta=DELTA, unit="patient")
    with pytest.raises(BudgetExhausted, match="budget 'main', which binds some of these people"):
        tight.ledger.reserve("fresh", plan, snapshot("renamed", ("letters",)), "run-2")
    with pytest.raises(NotFound):
        tight.ledger.of_run("run-2")
    tight.ledger.reserve("fresh", plan, snapshot("others", ("letters",), ("S2",)), "run-2")


def test_a_later_budget_counts_what_was_spent_before_it(opened, plan):
    opened.ledger.reserve("main", plan, snapshot(), "run-1")
    opened.ledger.open("later", epsilon=TIGHT, delta=DELTA, unit="patient")
    with pytest.raises(BudgetExhausted, match="budget 'later' admits"):
        opened.ledger.reserve("later", plan, snapshot(), "run-2")
    assert opened.ledger.filter("later", snapshot()).spent == RdpFilter.open(epsilon=TIGHT, delta=DELTA).charge(plan.event).spent


def test_an_exhausted_population_and_a_newcomer_are_refused(tight, plan):
    old = tuple(f"S{number}" for number in range(20))
    tight.ledger.reserve("main", plan, snapshot("old", people=old), "run-1")
    with pytest.raises(BudgetExhausted):
        tight.ledger.reserve("main", plan, snapshot("grown", people=(*old, "S99")), "run-2")
    assert not tight.ledger.filter("main", snapshot("grown", people=(*old, "S99"))).admits(plan.event)
    tight.ledger.reserve("main", plan, snapshot("newcomer", people=("S99",)), "run-2")


def test_overlapping_populations_meet_in_the_overlap(house, plan):
    """Two budgets for two wards, some patients in both: those spend twice, the others once."""
    house.ledger.open("east", epsilon=2.0, delta=DELTA, unit="patient")
    house.ledger.open("west", epsilon=2.0, delta=DELTA, unit="patient")
    house.ledger.reserve("east", plan, snapshot("east", people=("S1", "S2", "S3")), "run-1")
    house.ledger.reserve("west", plan, snapshot("west", people=("S3", "S4")), "run-2")
    once = RdpFilter.open(epsilon=2.0, delta=DELTA).charge(plan.event)
    for people, expected in (
        (("S1",), once),
        (("S4",), once),
        (("S3",), once.charge(plan.event)),
        (("S9",), RdpFilter.open(epsilon=2.0, delta=DELTA)),
    ):
        assert house.ledger.filter("west", snapshot("+".join(people), people=people)).spent == expected.spent, people
    with house.store.transaction() as tx:
        sizes = dict(tx.execute(select(cohorts._cohorts.c.id, cohorts._cohorts.c.size)).all())
        assert [sizes.get(cohort, 0) for cohort in cohorts.accounts_of_everyone(tx)[0]] == [0, 2, 1, 1]


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sets(st.integers(0, 5), max_size=5), st.sampled_from("ab"), st.sampled_from([0.1, 0.2, 0.3])), max_size=12))
@example([(set(), "a", 0.1), ({0, 5}, "a", 0.1), *[(set(), "a", 0.1)] * 2, ({5}, "a", 0.1), *[(set(), "a", 0.1)] * 6, ({0, 1}, "a", 0.1)])
def test_cohorts_count_what_counting_each_person_counts(house, wanted):
    """Against a model that keeps a list for every person and budget; an empty set of people is a query about everyone."""
    made = uuid4().hex[:8]
    fresh = open_house(f"sqlite:///{house.url.removeprefix('sqlite:///')}-{made}")
    limit = {"a": 1.0, "b": 0.5}
    for name, epsilon in limit.items():
        fresh.ledger.open(name, epsilon=epsilon, delta=1e-6, unit="patient")
    spent = {person: Decimal(0) for person in range(7)}  # the seventh is never named
    binds = {person: set() for person in spent}
    for number, (people, name, epsilon) in enumerate(wanted):
        chosen = people or set(spent)
        frozen = snapshot(f"{number}", people=tuple(f"S{p}" for p in people)) if people else None
        cost = Decimal(repr(epsilon))
        expected = all(spent[p] + cost <= Decimal(repr(limit[b])) for p in chosen for b in binds[p] | {name})
        if expected:
            [granted] = fresh.ledger.charge(name, [Spend(kind=Kind.STATISTICS, epsilon=epsilon)], snapshot=frozen)
            assert granted.kind is Kind.STATISTICS
            for p in chosen:
                spent[p] += cost
                binds[p].add(name)
        else:
            with pytest.raises(BudgetExhausted):
                fresh.ledger.charge(name, [Spend(kind=Kind.STATISTICS, epsilon=epsilon)], snapshot=frozen)
    fresh.store.close()


def test_the_people_of_a_source_are_counted_in_one_unit(opened, plan):
    opened.ledger.reserve("main", plan, snapshot(), "run-1")
    opened.ledger.open("notes", epsilon=EPSILON, delta=DELTA, unit="note")
    with pytest.raises(ReservationRefused, match="source notes, counted by patient"):
        opened.ledger.reserve("notes", replace(plan, unit="note"), snapshot("other"), "run-2")


def test_a_person_who_was_erased_and_comes_back_finds_what_was_spent(tight, plan):
    tight.ledger.reserve("main", plan, snapshot(), "run-1")
    tight.keyring.subject(SubjectId("S1"))
    tight.keyring.forget(SubjectId("S1"))
    with pytest.raises(BudgetExhausted):
        tight.ledger.reserve("main", plan, snapshot("again"), "run-2")


def test_the_ledger_keeps_no_name_that_another_table_has(tight, plan):
    tight.ledger.reserve("main", plan, snapshot(people=("SABC",)), "run-1")
    with tight.store.transaction() as tx:
        [member] = tx.execute(select(cohorts._members.c.member)).scalars()
    assert member == tight.keyring.hmac("ledger", b"SABC").hex()


def test_a_database_of_before_is_refused_and_not_taken_for_an_empty_one(tmp_path):
    connection = sqlite3.connect(tmp_path / "discreet.db")
    connection.execute("CREATE TABLE budgets (name TEXT PRIMARY KEY, unit TEXT, account TEXT, opened_at FLOAT)")
    connection.close()
    with pytest.raises(OperationFailed, match="older version"):
        open_house(f"sqlite:///{tmp_path}/discreet.db")


def test_a_snapshot_without_sources_is_refused(opened, plan):
    with pytest.raises(ReservationRefused, match="names its sources"):
        opened.ledger.reserve("main", plan, snapshot(sources=()), "run-1")
    with pytest.raises(ReservationRefused, match="has people"):
        opened.ledger.reserve("main", plan, snapshot(people=()), "run-1")


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
    left = [pay(house.ledger, "queries", 0.1).remaining_epsilon for _ in range(10)]
    assert left == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0])
    for epsilon in (0.1, 1e-3):
        with pytest.raises(BudgetExhausted):
            pay(house.ledger, "queries", epsilon)
    assert house.ledger.show("queries").num_reservations == 10


def test_many_small_queries_compose_better_than_they_add(house):
    """0.2 a query: the sum passes 8 after 40 of them, the RDP orders have room for more."""
    house.ledger.open("queries", epsilon=8.0, delta=1e-6, unit="patient")
    for _ in range(45):
        last = pay(house.ledger, "queries", 0.2)
    assert 0 < last.remaining_epsilon < 8.0
    assert house.ledger.filter("queries").remaining_epsilon() == last.remaining_epsilon


def test_a_gaussian_uses_up_order_infinity(tight, plan):
    """After a mechanism with a delta the sum of epsilons proves nothing: only the RDP orders admit."""
    tight.ledger.reserve("main", plan, snapshot(), "run-1")
    with pytest.raises(BudgetExhausted):
        pay(tight.ledger, "main", 0.5)


def test_a_query_leaves_less_for_a_plan(tight, plan):
    pay(tight.ledger, "main", 0.3)
    with pytest.raises(BudgetExhausted):
        tight.ledger.reserve("main", plan, snapshot(), "run-1")


@pytest.mark.parametrize("epsilon", [0.0, -0.0, -1.0, math.nan, math.inf, -math.inf, 5e-324, sys.float_info.min / 2])
def test_worthless_spends_are_refused(house, epsilon):
    house.ledger.open("queries", epsilon=1.0, delta=1e-6, unit="patient")
    with pytest.raises(PlanInvalid):
        pay(house.ledger, "queries", epsilon)
    assert house.ledger.show("queries").num_reservations == 0


@pytest.mark.parametrize("epsilon", [1e-9, 1e-200, sys.float_info.min])
def test_a_spend_that_the_floats_would_lose_is_refused(house, epsilon):
    house.ledger.open("queries", epsilon=1.0, delta=1e-6, unit="patient")
    pay(house.ledger, "queries", 0.5)
    with pytest.raises(PlanInvalid, match="accounted for"):
        pay(house.ledger, "queries", epsilon)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(min_value=1e-3, max_value=0.7), max_size=12))
def test_admitted_pure_queries_are_within_some_order(house, wanted):
    """Checked against the rule itself, computed here from the admitted epsilons alone."""
    name = f"b{uuid4().hex[:8]}"
    house.ledger.open(name, epsilon=1.0, delta=1e-6, unit="patient")
    admitted = []
    for epsilon in wanted:
        try:
            pay(house.ledger, name, epsilon)
        except BudgetExhausted:
            continue
        admitted.append(epsilon)
    opened = RdpFilter.open(epsilon=1.0, delta=1e-6)
    within = [sum(min(e, order * e * e / 2) for e in admitted) <= limit + 1e-12 for order, limit in zip(opened.orders, opened.limits, strict=True)]
    assert any(within) or sum(Decimal(repr(e)) for e in admitted) <= 1


# Heterogeneous spends


def test_every_kind_is_charged_to_one_account(opened, plan):
    event = dp_accounting.GaussianDpEvent(20.0)
    expected = opened.ledger.filter("main").charge(plan.event).charge(event)
    opened.ledger.reserve("main", plan, snapshot(), "run-1", kind=Kind.SEARCH)
    kinds = [Kind.STATISTICS, Kind.RETRIEVAL, Kind.SYNTHETIC]
    made = opened.ledger.charge("main", [Spend(kind=kinds[0], event=event)], snapshot=snapshot())
    assert opened.ledger.filter("main") == expected
    made += opened.ledger.charge("main", [Spend(kind=kind, epsilon=0.01) for kind in kinds[1:]], snapshot=snapshot())
    assert [held.kind for held in made] == kinds
    assert [entry.fields["kind"] for entry in opened.log.select(Predicate.RESERVED)] == ["search", *kinds]
    assert made[0].remaining_epsilon > made[1].remaining_epsilon > made[2].remaining_epsilon == opened.ledger.show("main").remaining_epsilon


def test_a_batch_is_charged_whole_or_not_at_all(house):
    house.ledger.open("queries", epsilon=1.0, delta=1e-6, unit="patient")
    with pytest.raises(BudgetExhausted):
        house.ledger.charge("queries", [Spend(kind=Kind.RETRIEVAL, epsilon=0.3)] * 4)
    assert house.ledger.show("queries").num_reservations == 0
    assert [round(held.remaining_epsilon, 6) for held in house.ledger.charge("queries", [Spend(kind=Kind.RETRIEVAL, epsilon=0.3)] * 3)] == [
        0.7,
        0.4,
        0.1,
    ]
    with pytest.raises(PlanInvalid):
        house.ledger.charge("queries", [])


def test_threads_share_transactions_and_each_gets_its_own_answer(house):
    """Sixty-four threads, room for ten of a tenth: ten are granted with ten numbers, the others and a mistake are refused, in fewer transactions than threads."""
    house.ledger.open("queries", epsilon=1.0, delta=1e-6, unit="patient")
    barrier, outcomes, commits = threading.Barrier(64), [], []
    append_all = house.log.append_all
    house.log.append_all = lambda tx, statements: (commits.append(len(statements)), append_all(tx, statements))[1]

    def ask(number):
        barrier.wait()
        try:
            outcomes.append(pay(house.ledger, "queries" if number else "nothing", 0.1).id)
        except (BudgetExhausted, NotFound) as refusal:
            outcomes.append(type(refusal))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    granted = [outcome for outcome in outcomes if isinstance(outcome, str)]
    assert sorted(granted) == sorted(f"queries-{number}" for number in range(1, 11))
    assert (outcomes.count(BudgetExhausted), outcomes.count(NotFound)) == (53, 1)
    assert sum(commits) == 10
    shown = house.ledger.show("queries")
    assert (shown.num_reservations, shown.remaining_epsilon) == (10, 0.0)
    assert len(house.log.verify().entries) == 11


def test_what_breaks_a_shared_transaction_is_told_to_all_of_them(house, monkeypatch):
    house.ledger.open("queries", epsilon=1.0, delta=1e-6, unit="patient")
    monkeypatch.setattr(house.ledger._log, "append_all", lambda tx, statements: (_ for _ in ()).throw(OperationFailed("a disk")))
    with pytest.raises(OperationFailed, match="a disk"):
        pay(house.ledger, "queries", 0.1)
    monkeypatch.undo()
    assert house.ledger.show("queries").num_reservations == 0
    pay(house.ledger, "queries", 0.1)


def test_a_query_with_a_delta_takes_it_from_what_was_kept_for_queries(house):
    house.ledger.open("plain", epsilon=1.0, delta=1e-6, unit="patient")
    with pytest.raises(BudgetExhausted, match="query-delta"):
        house.ledger.charge("plain", [Spend(kind=Kind.STATISTICS, epsilon=0.1, delta=1e-9)])
    house.ledger.open("split", epsilon=1.0, delta=1e-6, unit="patient", query_delta=3e-7)
    assert house.ledger.filter("split").delta == pytest.approx(7e-7)
    assert house.ledger.show("split").delta == pytest.approx(1e-6)
    for _ in range(3):
        house.ledger.charge("split", [Spend(kind=Kind.STATISTICS, epsilon=0.1, delta=1e-7)])
    with pytest.raises(BudgetExhausted, match="query-delta"):
        house.ledger.charge("split", [Spend(kind=Kind.STATISTICS, epsilon=0.1, delta=1e-12)])
    assert house.ledger.charge("split", [Spend(kind=Kind.STATISTICS, epsilon=0.1)])[0].remaining_epsilon == pytest.approx(0.6)


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"epsilon": 1.0, "event": dp_accounting.GaussianDpEvent(1.0)},
        {"epsilon": 1.0, "delta": 1.0},
        {"epsilon": 1.0, "delta": -1e-9},
        {"epsilon": math.nan},
    ],
)
def test_a_spend_is_an_event_or_numbers(wrong):
    with pytest.raises(PlanInvalid):
        Spend(kind=Kind.STATISTICS, **wrong)


def test_both_accountants_are_reported(opened, plan):
    assert opened.ledger.composition("main").num_charges == 0
    opened.ledger.reserve("main", plan, snapshot(), "run-1")
    opened.ledger.reserve("main", plan, snapshot(), "run-2")
    composed = opened.ledger.composition("main")
    assert (composed.num_charges, composed.delta) == (2, DELTA)
    assert plan.guarantee.epsilon < composed.epsilon_pld < composed.epsilon_filter < 8.0


# Periods, alerts, and what can still be trained

DAY = 86400.0


@pytest.fixture
def clock(monkeypatch):
    """Sets the time, in days from a fixed moment."""

    def at(days):
        monkeypatch.setattr(store_module.time, "time", lambda: 1_800_000_000.0 + days * DAY)

    at(0)
    return at


@pytest.mark.parametrize(
    ("carry_over", "spendable"),
    [(CarryOver.NONE, [0.5, 0.5, 0.5, 0.0]), (CarryOver.ONE, [0.5, 0.9, 1.0, 0.5]), (CarryOver.ALL, [0.5, 0.9, 1.4, 1.4])],
)
def test_a_period_unlocks_its_share_and_carries_over_by_its_rule(house, clock, carry_over, spendable):
    """Epsilon 2 over four periods, 0.1 spent in the first: what one query may take in the first, second, third and, all over, the fifth."""
    for number, (day, most) in enumerate([(0, spendable[0]), (10, spendable[1]), (20, spendable[2]), (40, spendable[3])]):
        clock(0)
        fresh = open_house(f"{house.url}-{number}")
        fresh.ledger.open("paced", epsilon=2.0, delta=1e-6, unit="patient", period=Period(days=10, count=4, carry_over=carry_over))
        if number:
            pay(fresh.ledger, "paced", 0.1)
        clock(day)
        if number == 3:
            most = {CarryOver.NONE: 0.0, CarryOver.ONE: 0.5, CarryOver.ALL: 1.9}[carry_over]
        with pytest.raises(BudgetExhausted, match="locked"):
            pay(fresh.ledger, "paced", most + 0.01)
        if most:
            pay(fresh.ledger, "paced", most)
        fresh.store.close()


def test_a_period_never_admits_what_the_whole_budget_would_not(house, clock):
    house.ledger.open("paced", epsilon=1.0, delta=1e-6, unit="patient", period=Period(days=1, count=2, carry_over=CarryOver.ALL))
    for day in range(2):
        clock(day)
        pay(house.ledger, "paced", 0.5)
    clock(2)
    with pytest.raises(BudgetExhausted):
        pay(house.ledger, "paced", 0.01)
    assert house.ledger.show("paced").unlocked == 1.0


@pytest.mark.parametrize("carry_over", CarryOver)
def test_a_plan_is_fitted_to_what_the_periods_have_unlocked(house, clock, carry_over):
    """Calibrated against the filter of an unopened or an open budget, it is admitted; and what one period takes, the next finds spent."""
    period = Period(days=10, count=4, carry_over=carry_over)
    clock(0)
    fresh = unopened(epsilon=EPSILON, delta=DELTA, unit="patient", period=period)
    house.ledger.open("paced", epsilon=EPSILON, delta=DELTA, unit="patient", period=period)
    assert house.ledger.filter("paced").spent == pytest.approx(fresh.spent)
    assert all(0 < spent < limit for spent, limit in zip(fresh.spent, fresh.limits, strict=True))
    terms = {"delta": DELTA, "population": 2000, "expected_batch": 64, "steps": 20, "clip_norm": 0.5, "unit": "patient", "cap": 1}
    for number, day in enumerate((0, 10)):
        clock(day)
        fitted = calibrate(epsilon=EPSILON, budget=house.ledger.filter("paced"), **terms)
        house.ledger.reserve("paced", fitted, snapshot(), f"run-{number}")
        with pytest.raises(BudgetExhausted):
            house.ledger.reserve("paced", fitted, snapshot(), f"again-{number}")


def test_a_clock_set_back_unlocks_nothing(house, clock):
    clock(100)
    house.ledger.open("paced", epsilon=1.0, delta=1e-6, unit="patient", period=Period(days=1, count=2))
    clock(0)
    with pytest.raises(ClockBackwards):
        pay(house.ledger, "paced", 0.1)


@pytest.mark.parametrize(("days", "count"), [(0.0, 4), (math.nan, 4), (math.inf, 4), (1.0, 0)])
def test_impossible_periods_are_refused(days, count):
    with pytest.raises(PlanInvalid):
        Period(days=days, count=count)


def test_alerts_begin_at_half(house):
    house.ledger.open("queries", epsilon=1.0, delta=1e-6, unit="patient")
    pay(house.ledger, "queries", 0.4)
    assert house.ledger.show("queries").alerts == ()
    pay(house.ledger, "queries", 0.4)
    assert house.ledger.show("queries").alerts == ("budget 'queries': 80% of epsilon 1 is spent; nothing of it comes back",)


def test_a_period_that_is_used_up_says_so_until_the_next(house, monkeypatch):
    days = 86400.0
    monkeypatch.setattr(store_module.time, "time", lambda: 1e9)
    house.ledger.open("queries", epsilon=1.0, delta=1e-6, unit="patient", period=Period(days=30, count=4))
    pay(house.ledger, "queries", 0.2)
    said = "budget 'queries': 80% of what this period may spend is spent; the rest is locked until the next"
    assert house.ledger.show("queries").alerts == (said,)
    monkeypatch.setattr(store_module.time, "time", lambda: 1e9 + 31 * days)
    assert house.ledger.show("queries").alerts == ()


def test_a_new_name_shows_what_its_people_have_left(tight, plan):
    """Nobody was charged under it yet: whoever is known brings along what they spent, and every budget that binds them is asked."""
    tight.ledger.reserve("main", plan, snapshot(), "run-1")
    tight.ledger.open("same", epsilon=TIGHT, delta=DELTA, unit="patient")
    assert tight.ledger.show("same").remaining_epsilon < 0.1
    tight.ledger.open("large", epsilon=100.0, delta=DELTA, unit="patient")
    assert tight.ledger.show("large").remaining_epsilon < 100
    assert tight.ledger.affordable("large", sampling_probability=0.05, noise_multiplier=2.0) == 0, "the budget 'main' binds them"


def test_a_raise_keeps_what_was_spent_and_admits_what_fits_now(tight, plan):
    """The first plan uses up epsilon 1; raised to 8, the budget counts it as if it had been opened with 8."""
    tight.ledger.reserve("main", plan, snapshot(), "run-1")
    with pytest.raises(BudgetExhausted):
        tight.ledger.reserve("main", plan, snapshot(), "run-2")
    for wrong in (TIGHT, 0.5, math.inf, math.nan):
        with pytest.raises(PlanInvalid):
            tight.ledger.raise_to("main", wrong, reason="the board decided")
    with pytest.raises(PlanInvalid):
        tight.ledger.raise_to("main", EPSILON, reason=" ")
    tight.ledger.raise_to("main", EPSILON, reason="the board decided")
    assert tight.ledger.filter("main") == RdpFilter.open(epsilon=EPSILON, delta=DELTA).charge(plan.event)
    tight.ledger.reserve("main", plan, snapshot(), "run-2")
    [said] = tight.log.select(Predicate.BUDGET_RAISED)
    assert said.fields == {"budget": "main", "epsilon": EPSILON, "earlier": TIGHT, "reason": "the board decided"}
    with pytest.raises(ReservationRefused):
        tight.ledger.open("main", epsilon=TIGHT, delta=DELTA, unit="patient")
    tight.log.verify()


def test_a_raise_of_one_budget_raises_no_other(house):
    """Somebody bound by two budgets stays bound by the one that was not raised."""
    for name in ("first", "second"):
        house.ledger.open(name, epsilon=1.0, delta=1e-6, unit="patient")
        pay(house.ledger, name, 0.3)
    house.ledger.raise_to("first", 10.0, reason="the board decided")
    with pytest.raises(BudgetExhausted, match="second"):
        pay(house.ledger, "first", 0.6)


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
        pay(house.ledger, "main", epsilon)
        results[number] = 1
    except BudgetExhausted:
        results[number] = 0
    finally:
        house.store.close()


@pytest.mark.parametrize(("spent_before", "expected"), [(0, 3), (2, 1)])
def test_thirty_two_processes_never_overspend(url, spent_before, expected):
    """Limit 1.0, cost 0.3: three slices, or the last one. A ledger that reads and then inserts admits up to all of them (PITFALLS 18)."""
    house = open_house(url)
    house.ledger.open("main", epsilon=1.0, delta=1e-6, unit="patient")
    for _ in range(spent_before):
        pay(house.ledger, "main", 0.3)
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
            stale = module._accounts(tx, "main")
        read.wait()  # every process has read the balance before the first one writes
        module._accounts = lambda tx, name: stale
        _race_with(mutant, barrier, results, number)

    assert _children(racer, [(number,) for number in range(RACERS)]) == [0] * RACERS
    assert sum(results) == RACERS, "every one of them was admitted: the check in the test above can fail"


def _race_with(house, barrier, results, number):
    barrier.wait()
    try:
        pay(house.ledger, "main", 0.3)
        results[number] = 1
    except BudgetExhausted:
        results[number] = 0


def _die(url, plan, moment):
    """Reserves and spends, and is killed just before or just after a commit."""
    house = open_house(url)
    append_all, calls = house.log.append_all, 0

    def dying(tx, statements):
        nonlocal calls
        calls += 1
        indices = append_all(tx, statements)
        if calls == moment:
            os.kill(os.getpid(), signal.SIGKILL)
        return indices

    house.log.append_all = dying
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


@pytest.mark.parametrize("rare", ["truncated_poisson", "poisson_documents"])
def test_a_sampler_that_rdp_does_not_know_is_admitted_and_takes_the_reserve(house, rare):
    """As an (epsilon, delta) query: half of what is left of the filter's own reserve each time, and never more than all of it."""
    more = {"batch_limit": 60} if rare == "truncated_poisson" else {"cap": 2}
    event = Mechanism(sampling_probability=0.02, noise_multiplier=4.0, clip_norm=1.0, steps=2, sampling=Sampling(rare), population=1000, **more).event
    house.ledger.open("b", epsilon=EPSILON, delta=DELTA, unit="patient")
    before = house.ledger.filter("b")
    house.ledger.charge("b", [Spend(kind=Kind.TRAINING, event=event)])
    once = house.ledger.filter("b")
    assert once.spent_delta == before.next_delta
    assert once.spent[0] == pytest.approx(before.vector(event)[0])
    house.ledger.charge("b", [Spend(kind=Kind.TRAINING, event=event)])
    twice = house.ledger.filter("b")
    assert once.spent_delta < twice.spent_delta < twice.reserve
    house.ledger.open("later", epsilon=EPSILON, delta=DELTA, unit="patient")
    assert house.ledger.filter("later").spent_delta == twice.spent_delta, "a new name is no fresh budget"


def test_what_is_affordable_is_admitted_and_one_step_more_is_not(house):
    house.ledger.open("b", epsilon=TIGHT, delta=DELTA, unit="patient", period=Period(days=30, count=4))
    pay(house.ledger, "b", 0.05)
    steps = house.ledger.affordable("b", sampling_probability=0.05, noise_multiplier=2.0)
    paced, whole = house.ledger.filter("b"), RdpFilter.open(epsilon=TIGHT, delta=DELTA)
    event = event_of(sampling_probability=0.05, noise_multiplier=2.0, steps=steps + 1)
    assert steps > 0
    assert not paced.admits(event), "a period holds back, and a plan is fitted to what it unlocks"
    assert whole.admits(event)

    def spend(count):
        return [Spend(kind=Kind.TRAINING, event=event_of(sampling_probability=0.05, noise_multiplier=2.0, steps=count))]

    with pytest.raises(BudgetExhausted):
        house.ledger.charge("b", spend(steps + 1))
    house.ledger.charge("b", spend(steps))
    assert house.ledger.affordable("b", sampling_probability=0.05, noise_multiplier=2.0) == 0
    with pytest.raises(PlanInvalid):
        house.ledger.affordable("b", sampling_probability=0.0, noise_multiplier=2.0)
