"""Privacy budgets: open, reserve, spend, close. What the filter does not admit is not trained.

    open     fixes epsilon, delta, the privacy unit and, in the filter, the orders and limits; never changed, never refilled
    reserve  charges the whole planned event, in one serialised transaction that reads, decides and writes (PITFALLS 18)
    spend    marks the reservation spent, before the first noisy step; a resume of the same run finds it spent and pays nothing more
    close    ends the run; nothing is ever returned

A budget is the (epsilon, delta) of an RDP filter, which holds when later spends depend on the outcome of earlier ones; the tighter PLD figure of one plan
is its `Guarantee`, by a different accountant (PITFALLS 43). Queries that are epsilon-DP with delta 0 have one more order, infinity, where epsilons add up and no delta is
needed: it admits them until they sum to the budget, and is used up by the first Gaussian.

A reservation is bound to its run, plan digest and snapshot root: the same three again give the same reservation, one run with another plan or snapshot is
refused, and a crash has spent what it reserved. A source belongs to the first budget that it is charged to, for good: a second budget over the
same sources is refused, under whatever name and unit (PITFALLS 19).

*Unused steps are not returned*, whatever ended the run: not even by a public rule, in this version. `close` records how many steps ran and why it
ended, so that a later version can. Charges only grow; a spend too small for the filter's floats to show is refused instead of lost.

Sources: Feldman and Zrnic 2021 (filters); Bun and Steinke 2016 (pure DP as RDP); Luo et al. 2021, PrivateKube (reserve, then commit).

Does not cover: per-subject accounting (each subject is charged as if in every step; a later version charges what they took part in), people who are in two sources
that are charged to two budgets, and mechanisms that nobody charged.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from decimal import Context, Decimal
from enum import StrEnum
from typing import Any, final

from sqlalchemy import Column, Connection, Float, Integer, String, Table, Text, func, insert, select, update

from discreet.config import digest_of
from discreet.dp.accounting import RdpFilter, Relation, rdp, rdp_of_pure
from discreet.dp.mechanism import Plan
from discreet.errors import BudgetExhausted, NotFound, PlanInvalid, ReservationRefused
from discreet.evidence.log import Log
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.record import Digest, Snapshot
from discreet.store import Store, metadata, now

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_EXACT = Context(prec=1000)
"""Enough digits to add any two floats as they are written without rounding."""

_budgets = Table(
    "budgets",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("unit", String(64), nullable=False),
    Column("account", Text, nullable=False),
    Column("opened_at", Float(53), nullable=False),
)
_sources = Table(
    "budget_sources",
    metadata,
    Column("source", String(63), primary_key=True),
    Column("budget", String(63), nullable=False, index=True),
)
"""Which budget a source is charged to. The primary key is the rule: one budget each."""

_reservations = Table(
    "reservations",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("run", String(128), nullable=False, unique=True),
    Column("budget", String(63), nullable=False, index=True),
    Column("plan", String(71), nullable=False),
    Column("snapshot", String(71)),
    Column("price", Text, nullable=False),
    Column("state", String(8), nullable=False),
    Column("steps", Integer),
    Column("reason", String(16)),
    Column("reserved_at", Float(53), nullable=False),
)


class State(StrEnum):
    """Where a reservation stands. All three are charged in full."""

    RESERVED = "reserved"
    SPENT = "spent"
    CLOSED = "closed"


class CloseReason(StrEnum):
    """Why a run ended. None of them returns anything."""

    COMPLETED = "completed"
    PUBLIC_RULE = "public_rule"
    CRASH = "crash"
    PRIVATE_LOSS = "private_loss"
    ERASURE = "erasure"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A budget as it stands. `remaining_epsilon` is for people: whether a plan fits is what the filter says of it."""

    name: str
    epsilon: float
    delta: float
    unit: str
    sources: tuple[str, ...]
    remaining_epsilon: float
    num_reservations: int

    def to_json(self) -> dict[str, JSON]:
        """Returns the budget as JSON values; `spent_epsilon` is what `remaining_epsilon` leaves of `epsilon`."""
        numbers: dict[str, JSON] = {"name": self.name, "epsilon": self.epsilon, "delta": self.delta, "unit": self.unit, "sources": list(self.sources)}
        spent = self.epsilon - self.remaining_epsilon
        return numbers | {"spent_epsilon": spent, "remaining_epsilon": self.remaining_epsilon, "num_reservations": self.num_reservations}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """The right of one run to one plan on one snapshot (line 6), built by `Ledger`. A query has no snapshot. `remaining_epsilon` is the budget's, now."""

    id: str
    budget: str
    run: str
    plan: Digest
    snapshot: Digest | None
    state: State
    remaining_epsilon: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Account:
    """What a budget has spent: RDP at the filter's orders, and the sum of pure epsilons at order infinity (infinite after the first charge with a delta)."""

    filter: RdpFilter
    pure: Decimal

    def charged(self, charge: tuple[float, ...], pure: Decimal) -> _Account:
        spent = tuple(before + more for before, more in zip(self.filter.spent, charge, strict=True))
        return _Account(filter=replace(self.filter, spent=spent), pure=_EXACT.add(self.pure, pure))

    @property
    def is_within(self) -> bool:
        """Some order has room for everything that was spent."""
        has_room = any(spent <= limit for spent, limit in zip(self.filter.spent, self.filter.limits, strict=True))
        return has_room or self.pure <= _decimal(self.filter.epsilon)

    @property
    def remaining_epsilon(self) -> float:
        left = 0.0 if self.pure.is_infinite() else float(max(Decimal(0), _EXACT.subtract(_decimal(self.filter.epsilon), self.pure)))
        return max(left, self.filter.remaining_epsilon())

    def to_json(self) -> str:
        return json.dumps({"filter": self.filter.to_json(), "pure": str(self.pure)}, allow_nan=True)

    @staticmethod
    def from_json(stored: str) -> _Account:
        fields = json.loads(stored)
        return _Account(filter=RdpFilter.from_json(fields["filter"]), pure=Decimal(fields["pure"]))


class Ledger:
    """The privacy budgets of one project, in its database."""

    def __init__(self, store: Store, log: Log) -> None:
        self._store = store
        self._log = log

    def open(self, name: str, *, epsilon: float, delta: float, unit: str, sources: Iterable[str] = (), relation: Relation = "add_remove") -> Budget:
        """Opens a budget, or finds it open with the same numbers.

        Args:
            name: letters, digits, '.', '_' and '-', at most 63.
            epsilon: finite, > 0.
            delta: in (0, 1).
            unit: the privacy unit that the budget protects ("patient").
            sources: names of the sources whose people it protects; each belongs to one budget. Others join with the first reservation that uses them.
            relation: neighbouring relation of everything that is charged.

        Raises:
            PlanInvalid: when a number breaks its rule.
            ReservationRefused: when the name is open with other numbers, or a source is charged to another budget.
        """
        if not _NAME.fullmatch(name):
            raise PlanInvalid("a budget's name of letters, digits, '.', '_' and '-', at most 63", value=repr(name))
        fresh = _open_account(epsilon, delta, relation)
        with self._store.transaction() as tx:
            stored = tx.execute(select(_budgets).where(_budgets.c.name == name)).one_or_none()
            if stored is None:
                tx.execute(insert(_budgets).values(name=name, unit=unit, account=fresh.to_json(), opened_at=now(tx)))
                self._log.append(tx, _opened(name, unit, fresh.filter))
            elif stored.unit != unit or _terms(_Account.from_json(stored.account)) != _terms(fresh):
                raise _other_numbers(name, stored.unit, _Account.from_json(stored.account))
            _claim(tx, name, sources)
            return _budget(tx, name)

    def show(self, name: str) -> Budget:
        """Returns a budget as it stands.

        Raises:
            NotFound: when it was not opened.
        """
        with self._store.transaction() as tx:
            return _budget(tx, name)

    def budgets(self) -> list[Budget]:
        """Returns every budget as it stands, by name."""
        with self._store.transaction() as tx:
            return [_budget(tx, name) for name in tx.execute(select(_budgets.c.name).order_by(_budgets.c.name)).scalars().all()]

    def filter(self, name: str) -> RdpFilter:
        """Returns the filter of a budget as it stands, for `dp.mechanism.calibrate`. Charging the returned value charges nobody.

        Raises:
            NotFound: when it was not opened.
        """
        with self._store.transaction() as tx:
            return _account(tx, name).filter

    def reserve(self, name: str, plan: Plan, snapshot: Snapshot, run: str) -> Reservation:
        """Charges a plan's whole event to a budget for one run. Idempotent for the same run, plan and snapshot.

        Args:
            name: of an open budget.
            run: the run's id, unique in the project.

        Raises:
            BudgetExhausted: when the filter has no room for the event. Nothing is charged.
            ReservationRefused: when the run holds another reservation or is closed, or the plan's unit or relation, or a source of the snapshot, are not the budget's.
            PlanInvalid: when the event costs nothing, or cannot be accounted.
            NotFound: when the budget was not opened.
        """
        if not snapshot.sources:
            raise ReservationRefused("a snapshot that names its sources", value=snapshot.root, remedy="Freeze it with `corpus.freeze`.")
        with self._store.transaction() as tx:
            held = _of_run(tx, run)
            if held is not None:
                return _resumed(tx, held, (name, plan.digest, snapshot.root))
            account = _account(tx, name)
            _check_terms(tx, name, plan, account.filter.relation)
            _claim(tx, name, snapshot.sources)
            wanted = _Wanted(budget=name, run=run, plan=plan.digest, snapshot=snapshot.root, price=_price(plan))
            return self._charge(tx, wanted, account, _vector(plan, account.filter), pure=Decimal("Infinity"))

    def has_run(self, run: str) -> bool:
        """Returns whether a run has a reservation."""
        with self._store.transaction() as tx:
            return _of_run(tx, run) is not None

    def open_runs(self) -> list[Reservation]:
        """Returns the reservations of training runs that are not closed."""
        open_ = (_reservations.c.state != State.CLOSED.value) & _reservations.c.snapshot.is_not(None)
        with self._store.transaction() as tx:
            return [_reservation(tx, identifier) for identifier in tx.execute(select(_reservations.c.id).where(open_)).scalars()]

    def of_run(self, run: str) -> Reservation:
        """Returns the reservation of a run, whatever its state.

        Raises:
            NotFound: when the run reserved nothing.
        """
        with self._store.transaction() as tx:
            row = _of_run(tx, run)
            if row is None:
                raise NotFound("a run that reserved something", value=run)
            return _reservation(tx, row.id)

    def reserve_epsilon(self, name: str, epsilon: float) -> Reservation:
        """Charges a query that is epsilon-DP with delta 0, by its RDP bound or, among pure queries only, by its epsilon. Every call is a new charge.

        Args:
            epsilon: finite, > 0 and not subnormal.

        Raises:
            BudgetExhausted, PlanInvalid, NotFound: as `reserve`.
        """
        if not (math.isfinite(epsilon) and epsilon >= sys.float_info.min):
            raise PlanInvalid("a finite epsilon > 0 that is not subnormal", value=epsilon)
        with self._store.transaction() as tx:
            account = _account(tx, name)
            run = f"query-{_next_number(tx, name)}.{name}"
            plan = digest_of({"pure_epsilon": epsilon, "run": run})
            wanted = _Wanted(budget=name, run=run, plan=plan, snapshot=None, price={"epsilon": epsilon, "delta": 0.0})
            charge = tuple(float(value) for value in rdp_of_pure(epsilon, account.filter.orders))
            return self._charge(tx, wanted, account, charge, pure=_decimal(epsilon))

    def spend(self, reservation: Reservation) -> Reservation:
        """Marks a reservation spent, before its first noisy step. Idempotent: a resume of the run spends nothing more.

        Raises:
            ReservationRefused: when the reservation is not this ledger's, or is closed.
        """
        with self._store.transaction() as tx:
            row = _matching(tx, reservation)
            if row.state == State.CLOSED:
                raise _closed(row.run)
            if row.state == State.RESERVED:
                tx.execute(update(_reservations).where(_reservations.c.id == row.id).values(state=State.SPENT.value))
                fields = {"reservation": row.id, "run": row.run, "budget": row.budget, "plan": row.plan, **json.loads(row.price)}
                self._log.append(tx, Statement(predicate=Predicate.SPENT, subjects=(Digest(row.plan),), fields=fields))
            return _reservation(tx, row.id)

    def close(self, reservation: Reservation, reason: CloseReason, *, executed_steps: int | None = None) -> Reservation:
        """Closes a reservation. Nothing is returned to the budget, whatever the reason (see the module docstring). Idempotent.

        Args:
            executed_steps: noisy steps that ran, 0 to the plan's; None when unknown (a crash). The figure is public.

        Raises:
            ReservationRefused: when the reservation is not this ledger's, or was closed with another reason or number of steps.
            PlanInvalid: when more steps ran than were planned, or fewer than none.
        """
        with self._store.transaction() as tx:
            row = _matching(tx, reservation)
            planned = json.loads(row.price).get("steps")
            if executed_steps is not None and not 0 <= executed_steps <= (planned or 0):
                raise PlanInvalid(f"0 to {planned or 0} executed steps", value=executed_steps)
            if row.state == State.CLOSED:
                if (row.reason, row.steps) != (reason.value, executed_steps):
                    raise _closed(row.run)
                return _reservation(tx, row.id)
            closed = {"state": State.CLOSED.value, "reason": reason.value, "steps": executed_steps}
            tx.execute(update(_reservations).where(_reservations.c.id == row.id).values(closed))
            fields: dict[str, JSON] = {"reservation": row.id, "run": row.run, "budget": row.budget, "plan": row.plan, "reason": reason.value}
            fields |= {} if executed_steps is None else {"steps": executed_steps}
            self._log.append(tx, Statement(predicate=Predicate.CLOSED, subjects=(Digest(row.plan),), fields=fields))
            return _reservation(tx, row.id)

    def _charge(self, tx: Connection, wanted: _Wanted, account: _Account, charge: tuple[float, ...], *, pure: Decimal) -> Reservation:
        after = account.charged(charge, pure)
        if not all(value > 0 for value in charge) or any(
            a <= b for a, b in zip(after.filter.spent, account.filter.spent, strict=True) if math.isfinite(b)
        ):
            raise PlanInvalid("a spend large enough to be accounted for", value=wanted.plan, remedy="A mechanism that costs nothing needs no budget.")
        if not after.is_within:
            raise BudgetExhausted(
                f"a spend that budget '{wanted.budget}' admits",
                value=f"epsilon {_cost(account, charge, pure):.4g} asked, {account.remaining_epsilon:.4g} of {account.filter.epsilon:.4g} left",
                remedy="Plan fewer steps or more noise (`discreet plan`). A budget is never refilled.",
            )
        tx.execute(update(_budgets).where(_budgets.c.name == wanted.budget).values(account=after.to_json()))
        row: dict[str, Any] = {
            "id": f"{wanted.budget}-{_next_number(tx, wanted.budget)}",
            "run": wanted.run,
            "budget": wanted.budget,
            "plan": wanted.plan,
        }
        row |= {"snapshot": wanted.snapshot, "price": json.dumps(wanted.price), "state": State.RESERVED.value, "reserved_at": now(tx)}
        tx.execute(insert(_reservations).values(row))
        fields: dict[str, JSON] = {
            "reservation": row["id"],
            "run": wanted.run,
            "budget": wanted.budget,
            "plan": wanted.plan,
            "snapshot": wanted.snapshot,
        }
        subjects = (wanted.plan, wanted.snapshot) if wanted.snapshot else (wanted.plan,)
        self._log.append(tx, Statement(predicate=Predicate.RESERVED, subjects=subjects, fields=fields))
        return _reservation(tx, row["id"])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A reservation before it is granted."""

    budget: str
    run: str
    plan: Digest
    snapshot: Digest | None
    price: Mapping[str, JSON]


# Budgets


def _open_account(epsilon: float, delta: float, relation: Relation) -> _Account:
    try:
        return _Account(filter=RdpFilter.open(epsilon=epsilon, delta=delta, relation=relation), pure=Decimal(0))
    except ValueError:
        raise PlanInvalid("a finite epsilon > 0 and a delta in (0, 1)", value=f"epsilon {epsilon}, delta {delta}") from None


def _terms(account: _Account) -> tuple[float, float, Relation]:
    return account.filter.epsilon, account.filter.delta, account.filter.relation


def _opened(name: str, unit: str, rdp_filter: RdpFilter) -> Statement:
    numbers: dict[str, JSON] = {
        "budget": name,
        "epsilon": rdp_filter.epsilon,
        "delta": rdp_filter.delta,
        "unit": unit,
        "relation": rdp_filter.relation,
    }
    fields: dict[str, JSON] = {**numbers, "accountant": "rdp", "orders": list(rdp_filter.orders)}
    return Statement(predicate=Predicate.BUDGET_OPENED, subjects=(digest_of(numbers),), fields=fields)


def _other_numbers(name: str, unit: str, account: _Account) -> ReservationRefused:
    opened = f"epsilon {account.filter.epsilon:g}, delta {account.filter.delta:g}, unit {unit}, {account.filter.relation}"
    return ReservationRefused(
        f"budget '{name}' with the numbers that it was opened with", value=f"other numbers than {opened}", remedy="They are fixed for good."
    )


def _claim(tx: Connection, name: str, sources: Iterable[str]) -> None:
    """Charges sources to this budget from now on."""
    owner = {row.source: row.budget for row in tx.execute(select(_sources))}
    for source in dict.fromkeys(sources):
        if owner.get(source, name) != name:
            raise ReservationRefused(
                "a source to be charged to one budget",
                value=f"source {source} of budget {owner[source]}, for budget {name}",
                remedy=f"Use the budget '{owner[source]}'; the same people cannot be given a fresh one.",
            )
        if source not in owner:
            tx.execute(insert(_sources).values(source=source, budget=name))


def _account(tx: Connection, name: str) -> _Account:
    stored = tx.execute(select(_budgets.c.account).where(_budgets.c.name == name)).scalar_one_or_none()
    if stored is None:
        raise NotFound("an open budget", value=repr(name), remedy="Open it with `discreet budget open NAME --epsilon E --delta D`.")
    return _Account.from_json(stored)


def _budget(tx: Connection, name: str) -> Budget:
    account = _account(tx, name)
    return Budget(
        name=name,
        epsilon=account.filter.epsilon,
        delta=account.filter.delta,
        unit=tx.execute(select(_budgets.c.unit).where(_budgets.c.name == name)).scalar_one(),
        sources=tuple(tx.execute(select(_sources.c.source).where(_sources.c.budget == name).order_by(_sources.c.source)).scalars()),
        remaining_epsilon=account.remaining_epsilon,
        num_reservations=_next_number(tx, name) - 1,
    )


# Reservations


def _check_terms(tx: Connection, name: str, plan: Plan, relation: Relation) -> None:
    unit = tx.execute(select(_budgets.c.unit).where(_budgets.c.name == name)).scalar_one()
    if (plan.unit, plan.relation) != (unit, relation):
        raise ReservationRefused(f"a plan for the {relation} of one {unit}, as budget '{name}'", value=f"{plan.relation} of one {plan.unit}")


def _vector(plan: Plan, rdp_filter: RdpFilter) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in rdp(plan.event, rdp_filter.orders, relation=rdp_filter.relation))
    except ValueError as error:
        raise PlanInvalid("an event that the budget can account for", value=str(error)) from None


def _price(plan: Plan) -> dict[str, JSON]:
    """The public facts of a plan that its `spent` statement carries."""
    names = ("unit", "delta", "relation", "sampling_probability", "noise_multiplier", "clip_norm", "steps", "expected_batch", "cap", "filter_epsilon")
    return {**{name: getattr(plan, name) for name in names}, "epsilon": plan.guarantee.epsilon, "accountant": plan.guarantee.accountant}


def _cost(account: _Account, charge: tuple[float, ...], pure: Decimal) -> float:
    """What the charge alone would need, for the message."""
    return account.filter.epsilon_of(charge) if pure.is_infinite() else float(pure)


def _decimal(value: float) -> Decimal:
    """The number as it is written: 0.1 is a tenth, so ten of them are one."""
    return Decimal(repr(float(value)))


def _next_number(tx: Connection, budget: str) -> int:
    return int(tx.execute(select(func.count()).where(_reservations.c.budget == budget)).scalar_one()) + 1


def _of_run(tx: Connection, run: str) -> Any:
    return tx.execute(select(_reservations).where(_reservations.c.run == run)).one_or_none()


def _resumed(tx: Connection, row: Any, wanted: tuple[str, Digest, Digest]) -> Reservation:
    if (row.budget, row.plan, row.snapshot) != wanted:
        raise ReservationRefused(
            "a run with the budget, plan and snapshot that it reserved", value=f"run {row.run}", remedy="Start a new run; it is charged anew."
        )
    if row.state == State.CLOSED:
        raise _closed(row.run)
    return _reservation(tx, row.id)


def _closed(run: str) -> ReservationRefused:
    return ReservationRefused("a run that is open", value=f"run {run}, closed", remedy="Start a new run; it is charged anew.")


def _matching(tx: Connection, reservation: Reservation) -> Any:
    row = tx.execute(select(_reservations).where(_reservations.c.id == reservation.id)).one_or_none()
    given = (reservation.run, reservation.budget, reservation.plan, reservation.snapshot)
    if row is None or (row.run, row.budget, row.plan, row.snapshot) != given:
        raise ReservationRefused("a reservation of this ledger", value=reservation.id)
    return row


def _reservation(tx: Connection, identifier: str) -> Reservation:
    row = tx.execute(select(_reservations).where(_reservations.c.id == identifier)).one()
    snapshot = None if row.snapshot is None else Digest(row.snapshot)
    return Reservation(
        id=row.id,
        budget=row.budget,
        run=row.run,
        plan=Digest(row.plan),
        snapshot=snapshot,
        state=State(row.state),
        remaining_epsilon=_account(tx, row.budget).remaining_epsilon,
    )
