"""Privacy budgets: open, reserve, spend, close. What the filter does not admit, for every one of its people, is not trained.

    open     fixes epsilon, delta, the privacy unit and, in the filter, the orders and limits; nothing comes back
    raise_to a larger epsilon, a decision of people (`governance.access`: two of them) that the log and every later report names; what was spent stays spent
    reserve  charges the whole planned event, in one serialised transaction that reads, decides and writes (PITFALLS 18)
    charge   the same for queries: statistics, retrieval, search, synthetic text; named people, or everyone
    spend    marks the reservation spent, before the first noisy step; a resume of the same run finds it spent and pays nothing more
    close    ends the run; nothing is ever returned

A budget follows people, not names or files. It is a promise about *everything* that those whom it ever charged spend in this project, under whatever name: a reservation is admitted
only if it is admitted for every person of the snapshot, under the budget that is asked and under every other that binds them, each counting their whole history. So a new name is
no fresh budget, an exhausted population with one newcomer is refused, and two populations meet in those who are in both. What is charged to nobody in particular is charged to everyone,
also those who come later. `cohorts.py` keeps who has spent what. A source is measured in one privacy unit for good: another unit would be another name for the same people.

A budget is the (epsilon, delta) of an RDP filter, which holds when later spends depend on the outcome of earlier ones; the tighter PLD figure holds for what was fixed in advance and is
reported beside it (`composition`; PITFALLS 43). Queries that are epsilon-DP have one more order, infinity, where epsilons add up: it admits them until they sum to the
budget, and is used up by the first Gaussian. A query that is only (epsilon, delta)-DP (a mechanism that only PLD accounts for) is, but for an event of probability delta, no worse than
epsilon-DP: it is charged as that, and its delta to the part of the budget's delta that was kept for queries at opening (Kairouz, Oh, Viswanath 2015; none unless asked for).

A `Period` paces a budget: it unlocks the same share of every order's limit each period, and its rule says what becomes of the unused share. It only ever refuses more than the filter would: the
promise for the whole life of the budget does not rest on it.

A reservation is bound to its run, plan digest and snapshot root: the same three again give the same reservation, one run with another plan or snapshot is
refused, and a crash has spent what it reserved. *Unused steps are not returned*, whatever ended the run: not even by a public rule, in this version. `close` records how many steps ran and
why it ended, so that a later version can. Charges only grow; a spend too small for the filter's floats to show is refused instead of lost.

Sources: Feldman and Zrnic 2021 (filters); Bun and Steinke 2016 (pure DP as RDP); Luo et al. 2021, PrivateKube (reserve, then commit; unlocking by time).

Does not cover: charging a subject less for steps they did not take part in (each is charged as if in every one), one person under two identifiers whom nobody declared (`Keyring.declare_same`), and mechanisms that nobody charged.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Context, Decimal
from enum import StrEnum
from functools import lru_cache
from threading import Event, Lock
from typing import Any, final

from dp_accounting import ComposedDpEvent, DpEvent, SelfComposedDpEvent
from sqlalchemy import Column, Connection, Float, Integer, String, Table, Text, bindparam, insert, inspect, select, update

from discreet import cohorts
from discreet.config import digest_of
from discreet.dp.accounting import RdpFilter, Relation, entry_of, event_from_json, event_to_json, guarantee, rdp, rdp_of_pure
from discreet.dp.mechanism import Plan, event_of
from discreet.errors import BudgetExhausted, NotFound, OperationFailed, PlanInvalid, ReservationRefused
from discreet.evidence.log import Log
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.keys import Keyring
from discreet.record import Digest, Snapshot
from discreet.store import Store, fetch, later, metadata, now

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_EXACT = Context(prec=1000)
"""Enough digits to add any two floats as they are written without rounding."""

_TOGETHER = 256
"""Queries of several threads that are charged in one transaction, at most."""

_ALERT_FROM = 0.5
"""Share of epsilon from which on a budget warns."""

_DAY = 86400.0

_budgets = Table(
    "budgets",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("unit", String(64), nullable=False),
    Column("terms", Text, nullable=False),
    Column("reservations", Integer, nullable=False),
    Column("opened_at", Float(53), nullable=False),
)
_units = Table(
    "budget_units",
    metadata,
    Column("source", String(63), primary_key=True),
    Column("unit", String(64), nullable=False),
)
"""The privacy unit in which the people of a source are counted. The primary key is the rule: one each."""

_reservations = Table(
    "reservations",
    metadata,
    Column("id", String(80), primary_key=True),
    Column("run", String(128), nullable=False, unique=True),
    Column("budget", String(63), nullable=False, index=True),
    Column("kind", String(16), nullable=False),
    Column("plan", String(71), nullable=False),
    Column("snapshot", String(71)),
    Column("population", String(96)),
    Column("price", Text, nullable=False),
    Column("state", String(8), nullable=False, index=True),
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


class Kind(StrEnum):
    """What a reservation pays for. The list is closed; the filter treats all alike."""

    TRAINING = "training"
    SEARCH = "search"
    STATISTICS = "statistics"
    RETRIEVAL = "retrieval"
    SYNTHETIC = "synthetic"


class CarryOver(StrEnum):
    """What becomes of the share that a period leaves unused: forfeited, kept for one period more, or kept."""

    NONE = "none"
    ONE = "one"
    ALL = "all"

    @property
    def cap(self) -> float:
        """Largest number of shares that are carried into a period."""
        return {"none": 0.0, "one": 1.0, "all": math.inf}[self.value]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """The pace of a budget: `count` periods of `days` from its opening, each unlocking 1/count of every limit. After the last nothing more is unlocked.

    Args:
        days: length, > 0.
        count: number of periods, >= 1.
        carry_over: what becomes of an unused share.
    """

    days: float
    count: int
    carry_over: CarryOver = CarryOver.NONE

    def __post_init__(self) -> None:
        if not (math.isfinite(self.days) and self.days > 0 and self.count >= 1):
            raise PlanInvalid("a period of more than 0 days, and 1 period or more", value=f"{self.days} days, {self.count} periods")

    def number(self, elapsed: float) -> int:
        """Returns the period that `elapsed` seconds after the opening lie in, from 0; `count` when all are over."""
        return min(self.count, int(elapsed // (self.days * _DAY)))

    def to_json(self) -> dict[str, JSON]:
        return {"days": self.days, "count": self.count, "carry_over": self.carry_over.value}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Spend:
    """What a query costs: a dp_accounting event, or its (epsilon, delta).

    Args:
        kind: what it is for.
        epsilon: finite, > 0 and not subnormal; left out with an event.
        delta: in [0, 1); a delta above 0 is taken from what the budget kept for queries.
        event: what was run, when the accountant knows it.
    """

    kind: Kind
    epsilon: float | None = None
    delta: float = 0.0
    event: DpEvent | None = None

    def __post_init__(self) -> None:
        if (self.epsilon is None) is (self.event is None):
            raise PlanInvalid("either an epsilon or an event")
        if self.epsilon is not None and not (math.isfinite(self.epsilon) and self.epsilon >= sys.float_info.min):
            raise PlanInvalid("a finite epsilon > 0 that is not subnormal", value=self.epsilon)
        if not 0 <= self.delta < 1 or 0 < self.delta < sys.float_info.min or (self.event is not None and self.delta):
            raise PlanInvalid("a delta in [0, 1) that is not subnormal, and none beside an event", value=self.delta)

    @property
    def content(self) -> dict[str, Any]:
        """What is kept of it in the history of its people."""
        return {"event": event_to_json(self.event)} if self.event is not None else {"epsilon": self.epsilon, "delta": self.delta}

    @property
    def digest(self) -> Digest:
        return digest_of(self.content)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A budget as it stands for those of its people who have spent most. `remaining_epsilon` is for people: whether a plan fits is what the filter says of it.

    `unlocked` is the share of the whole that the periods have unlocked so far; `alerts` are sentences for the operator.
    """

    name: str
    epsilon: float
    delta: float
    unit: str
    remaining_epsilon: float
    num_reservations: int
    query_delta: float = 0.0
    period: Period | None = None
    unlocked: float = 1.0
    alerts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, JSON]:
        """Returns the budget as JSON values; `spent_epsilon` is what `remaining_epsilon` leaves of `epsilon`."""
        numbers: dict[str, JSON] = {"name": self.name, "epsilon": self.epsilon, "delta": self.delta, "unit": self.unit}
        spent = self.epsilon - self.remaining_epsilon
        numbers |= {"spent_epsilon": spent, "remaining_epsilon": self.remaining_epsilon, "num_reservations": self.num_reservations}
        period = None if self.period is None else self.period.to_json()
        return numbers | {"query_delta": self.query_delta, "period": period, "unlocked": self.unlocked, "alerts": list(self.alerts)}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Reservation:
    """The right of one run to one plan on one snapshot (line 6), built by `Ledger`. A query has no snapshot. `remaining_epsilon` is that of its people, now."""

    id: str
    budget: str
    run: str
    plan: Digest
    snapshot: Digest | None
    state: State
    remaining_epsilon: float
    kind: Kind = Kind.TRAINING


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Composition:
    """What the people of a budget who have spent most have spent: by the filter, and by PLD for the same charges as if all had been fixed in advance."""

    epsilon_filter: float
    epsilon_pld: float | None
    delta: float
    num_charges: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Terms:
    """What was fixed when a budget was opened. The filter has nothing spent; its delta is that of the budget less what is kept for queries."""

    name: str
    unit: str
    filter: RdpFilter
    query_delta: float
    period: Period | None
    opened_at: float

    @property
    def delta(self) -> float:
        return self.filter.delta + self.query_delta

    @property
    def numbers(self) -> tuple[float, float, Relation, float, Period | None]:
        return self.filter.epsilon, self.filter.delta, self.filter.relation, self.query_delta, self.period

    def to_json(self) -> str:
        period = None if self.period is None else self.period.to_json()
        return json.dumps({"filter": self.filter.to_json(), "query_delta": self.query_delta, "period": period})


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
    """A charge as one budget counts it: RDP at the filter's orders, epsilon at order infinity (infinite with a Gaussian), delta, and delta from the filter's reserve."""

    vector: tuple[float, ...]
    pure: Decimal
    delta: Decimal = Decimal(0)
    reserve: float = 0.0


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Pace:
    """Where an account stands in its budget's periods: what it had spent when this one began, and what it may spend in it, per order, infinity last."""

    period: int
    start: tuple[float, ...]
    allowance: tuple[float, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Account:
    """What one cohort has spent, as one budget counts it."""

    terms: _Terms
    spent: tuple[float, ...]
    pure: Decimal = Decimal(0)
    delta: Decimal = Decimal(0)
    reserve: float = 0.0
    pace: _Pace | None = None

    @staticmethod
    def fresh(terms: _Terms) -> _Account:
        """The account of somebody who never spent anything, when the budget was opened."""
        empty = _Account(terms=terms, spent=terms.filter.spent)
        if terms.period is None:
            return empty
        return replace(empty, pace=_Pace(period=0, start=(0.0,) * len(empty._limits), allowance=empty._share))

    @property
    def filter(self) -> RdpFilter:
        return _filter_of(self.terms, self.spent, self.reserve)

    @property
    def _limits(self) -> tuple[float, ...]:
        return (*self.terms.filter.limits, self.terms.filter.epsilon)

    @property
    def _share(self) -> tuple[float, ...]:
        """What one period unlocks."""
        count = self.terms.period.count if self.terms.period else 1
        return tuple(max(0.0, limit) / count for limit in self._limits)

    @property
    def _all_spent(self) -> tuple[float, ...]:
        return (*self.spent, float(self.pure))

    def charged(self, cost: _Cost) -> _Account:
        spent = tuple(before + more for before, more in zip(self.spent, cost.vector, strict=True))
        pure, delta = _EXACT.add(self.pure, cost.pure), _EXACT.add(self.delta, cost.delta)
        return replace(self, spent=spent, pure=pure, delta=delta, reserve=self.reserve + cost.reserve)

    def rolled(self, at: float) -> _Account:
        """The account in the period that `at` lies in; each boundary carries over what the rule says."""
        period, pace = self.terms.period, self.pace
        if period is None or pace is None:
            return self
        number = period.number(at - self.terms.opened_at)
        start, allowance = pace.start, pace.allowance
        for each in range(pace.period + 1, number + 1):
            left = [max(0.0, a - (s - b)) for a, s, b in zip(allowance, self._all_spent, start, strict=True)]
            unlocked = self._share if each < period.count else (0.0,) * len(left)
            cap = period.carry_over.cap
            carried = [min(value, cap * share) if cap and share else 0.0 for value, share in zip(left, self._share, strict=True)]
            start, allowance = self._all_spent, tuple(share + more for share, more in zip(unlocked, carried, strict=True))
        return replace(self, pace=_Pace(period=max(number, pace.period), start=start, allowance=allowance))

    @property
    def closed_off(self) -> tuple[float, ...]:
        """What is spent at each order, or locked in this period."""
        if self.pace is None:
            return self.spent
        paced = zip(self.spent, self.terms.filter.limits, self.pace.start, self.pace.allowance, strict=False)  # without order infinity
        return tuple(max(spent, limit - max(0.0, allowance - (spent - start))) for spent, limit, start, allowance in paced)

    @property
    def is_within(self) -> bool:
        """Some order has room for everything that was spent, in the budget's life and in this period; and delta is left."""
        if self.delta > _decimal(self.terms.query_delta):
            return False
        room = [spent <= limit for spent, limit in zip(self.spent, self.terms.filter.limits, strict=True)]
        room.append(self.pure <= _decimal(self.terms.filter.epsilon))
        if self.pace is None:
            return any(room)
        used = zip(room, self._all_spent, self.pace.start, self.pace.allowance, strict=True)
        return any(inside and spent - start <= allowance * (1 + 1e-12) for inside, spent, start, allowance in used)

    @property
    def used_of_period(self) -> float:
        """Share of this period's allowance that is spent, at the order that has most left; 0 without periods."""
        if self.pace is None:
            return 0.0
        used = zip(self._all_spent, self.pace.start, self.pace.allowance, strict=True)
        return min(((spent - start) / allowance if allowance else math.inf) for spent, start, allowance in used)

    @property
    def remaining_epsilon(self) -> float:
        left = 0.0 if self.pure.is_infinite() else float(max(Decimal(0), _EXACT.subtract(_decimal(self.terms.filter.epsilon), self.pure)))
        return max(left, self.filter.remaining_epsilon())

    def shows(self, after: _Account) -> bool:
        """Whether a charge is large enough to be seen in every figure that it should move."""
        return all(a > b for a, b in zip(after.spent, self.spent, strict=True) if math.isfinite(b))

    def to_json(self) -> str:
        pace = None if self.pace is None else {"period": self.pace.period, "start": self.pace.start, "allowance": self.pace.allowance}
        return json.dumps({"spent": self.spent, "pure": str(self.pure), "delta": str(self.delta), "reserve": self.reserve, "pace": pace})

    @staticmethod
    def from_json(stored: str, terms: _Terms) -> _Account:
        fields = json.loads(stored)
        kept = fields["pace"]
        pace = None if kept is None else _Pace(period=kept["period"], start=tuple(kept["start"]), allowance=tuple(kept["allowance"]))
        kept_back = {"pure": Decimal(fields["pure"]), "delta": Decimal(fields["delta"]), "reserve": fields.get("reserve", 0.0)}
        return _Account(terms=terms, spent=tuple(fields["spent"]), pace=pace, **kept_back)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Wanted:
    """A reservation before it is granted."""

    budget: str
    run: str
    kind: Kind
    plan: Digest
    snapshot: Digest | None
    population: str | None
    price: Mapping[str, JSON]
    spend: Spend


@dataclass(slots=True, kw_only=True)
class _Ticket:
    """One query that waits for its answer."""

    budget: str
    spend: Spend
    called: Event = field(default_factory=Event)
    outcome: Reservation | Exception | None = None


class Ledger:
    """The privacy budgets of one project, in its database."""

    def __init__(self, store: Store, keyring: Keyring, log: Log) -> None:
        """Binds the ledger to its project.

        Raises:
            OperationFailed: when the database was begun by a version that did not keep what each person spent.
        """
        self._store = store
        self._keyring = keyring
        self._log = log
        self._waiting: deque[_Ticket] = deque()
        self._mutex, self._is_led = Lock(), False
        if "terms" not in {column["name"] for column in inspect(store.engine).get_columns(_budgets.name)}:
            raise OperationFailed(
                "a ledger that keeps what each person spent", remedy="It was begun by an older version; begin a new project folder."
            )

    def open(
        self,
        name: str,
        *,
        epsilon: float,
        delta: float,
        unit: str,
        relation: Relation = "add_remove",
        query_delta: float = 0.0,
        period: Period | None = None,
    ) -> Budget:
        """Opens a budget, or finds it open with the same numbers. Whom it binds follows from what is charged to it.

        Args:
            name: letters, digits, '.', '_' and '-', at most 63.
            epsilon: finite, > 0.
            delta: in (0, 1).
            unit: the privacy unit that the budget protects ("patient").
            relation: neighbouring relation of everything that is charged.
            query_delta: the part of delta that is kept for queries with a delta of their own, 0 <= query_delta < delta.
            period: its pace; left out, all of it is there from the start.

        Raises:
            PlanInvalid: when a number breaks its rule.
            ReservationRefused: when the name is open with other numbers.
        """
        if not _NAME.fullmatch(name):
            raise PlanInvalid("a budget's name of letters, digits, '.', '_' and '-', at most 63", value=repr(name))
        with self._store.transaction() as tx:
            fresh = _open_terms(name, unit, epsilon, delta, relation, query_delta, period, opened_at=now(tx))
            found = _all_terms(tx).get(name)
            if found is None:
                row = {"name": name, "unit": unit, "terms": fresh.to_json(), "reservations": 0, "opened_at": fresh.opened_at}
                tx.execute(insert(_budgets).values(row))
                self._log.append(tx, _opened(fresh))
            elif (found.unit, found.numbers) != (unit, fresh.numbers):
                raise _other_numbers(found)
            return _budget(tx, name)

    def raise_to(self, name: str, epsilon: float, *, reason: str) -> Budget:
        """Raises a budget's epsilon; everything that was ever spent is counted anew under the larger one.

        The promise to its people becomes the larger epsilon, also for what was spent before. It stays a promise only if nothing that private data gave was the reason to raise it.

        Args:
            name: of an open budget.
            epsilon: above the present one, finite.
            reason: for the log, public.

        Raises:
            PlanInvalid: when epsilon is not larger, or no reason is given.
            NotFound: when it was not opened.
        """
        with self._store.transaction() as tx:
            old = _terms(tx, name)
            if not (math.isfinite(epsilon) and epsilon > old.filter.epsilon) or not reason.strip():
                raise PlanInvalid("a finite epsilon above the present one, and a reason", value=f"epsilon {epsilon:g}, now {old.filter.epsilon:g}")
            new = replace(old, filter=RdpFilter.open(epsilon=epsilon, delta=old.filter.delta, relation=old.filter.relation))
            tx.execute(update(_budgets).where(_budgets.c.name == name).values(terms=new.to_json()))
            counted = {(cohort, budget): _replayed(tx, cohort, new).to_json() for cohort, budget in cohorts.accounts(tx, budget=name)}
            cohorts.write_accounts(tx, counted)
            fields: dict[str, JSON] = {"budget": name, "epsilon": epsilon, "earlier": old.filter.epsilon, "reason": reason.strip()}
            self._log.append(tx, Statement(predicate=Predicate.BUDGET_RAISED, subjects=(digest_of(fields),), fields=fields))
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
            return [_budget(tx, name) for name in sorted(_all_terms(tx))]

    def filter(self, name: str, snapshot: Snapshot | None = None) -> RdpFilter:
        """Returns the filter of a budget for `dp.mechanism.calibrate`: at each order what the one who has spent most there has spent, so what it admits is admitted for all.
        What the periods have not unlocked counts as spent.

        Args:
            snapshot: whose people; left out, everyone whom the budget has charged. Charging the returned value charges nobody.

        Raises:
            NotFound: when it was not opened.
        """
        with self._store.transaction() as tx:
            terms = _terms(tx, name)
            if snapshot is None:
                standing = list(_standing(tx, name).values())
            else:
                _, held = _accounts(tx, name, _cohorts_without_enrolling(tx, self._keyring, snapshot))
                standing = [account for (_, budget), account in held.items() if budget == name]
            at = now(tx)
            most = tuple(max(column) for column in zip(*(account.rolled(at).closed_off for account in standing), strict=True))
            return _filter_of(terms, most, max(account.reserve for account in standing))

    def reserve(self, name: str, plan: Plan, snapshot: Snapshot, run: str, *, kind: Kind = Kind.TRAINING) -> Reservation:
        """Charges a plan's whole event to every person of a snapshot, for one run. Idempotent for the same run, plan and snapshot.

        Args:
            name: of an open budget.
            run: the run's id, unique in the project.
            kind: what the run is for.

        Raises:
            BudgetExhausted: when, for one of the people, one of the budgets that bind them has no room for the event. Nothing is charged.
            ReservationRefused: when the run holds another reservation or is closed, the plan's unit or relation is not the budget's, or the snapshot names no source or nobody.
            PlanInvalid: when the event costs nothing, or cannot be accounted.
            NotFound: when the budget was not opened.
        """
        if not snapshot.sources or not snapshot.num_units:
            raise ReservationRefused(
                "a snapshot that names its sources and has people in it", value=snapshot.root, remedy="Freeze it with `corpus.freeze`."
            )
        with self._store.transaction() as tx:
            held = _of_run(tx, run)
            if held is not None:
                return _resumed(tx, held, (name, plan.digest, snapshot.root))
            terms = _terms(tx, name)
            _check_terms(terms, plan)
            _claim_unit(tx, terms.unit, snapshot.sources)
            population = _population(snapshot)
            cohorts.enroll(tx, population, lambda: cohorts.members(self._keyring, snapshot.units.reveal()))
            spend = Spend(kind=kind, event=plan.event)
            wanted = _Wanted(
                budget=name, run=run, kind=kind, plan=plan.digest, snapshot=snapshot.root, population=population, price=_price(plan), spend=spend
            )
            return self._charge(tx, [wanted], _take_numbers(tx, name, 1))[0]

    def charge(self, name: str, spends: Sequence[Spend], *, snapshot: Snapshot | None = None) -> list[Reservation]:
        """Charges queries in one transaction, all of them or none. Every call is a new charge; single ones of several threads share a transaction.

        Args:
            name: of an open budget.
            spends: what they cost, 1 or more.
            snapshot: whose people; left out, everyone, also those who come later.

        Raises:
            BudgetExhausted, PlanInvalid, ReservationRefused, NotFound: as `reserve`. Nothing is charged.
        """
        if not spends:
            raise PlanInvalid("one spend or more", value=0)
        if snapshot is None and len(spends) == 1:
            return [self._queued(name, spends[0])]
        with self._store.transaction() as tx:
            number = _take_numbers(tx, name, len(spends))
            population = None
            if snapshot is not None:
                _claim_unit(tx, _terms(tx, name).unit, snapshot.sources)
                population = _population(snapshot)
                cohorts.enroll(tx, population, lambda: cohorts.members(self._keyring, snapshot.units.reveal()))
            return self._charge(tx, [_query(name, spend, number + k, population, snapshot) for k, spend in enumerate(spends)], number)

    def composition(self, name: str) -> Composition:
        """Returns what those people of a budget who have spent most have spent, by both accountants.

        The PLD figure is a promise only if no charge was chosen by looking at the result of another.

        Raises:
            NotFound: when the budget was not opened.
        """
        with self._store.transaction() as tx:
            terms = _terms(tx, name)
            cohort, account = min(_standing(tx, name).items(), key=lambda item: item[1].remaining_epsilon)
            history = cohorts.history(tx, cohort)
        return Composition(
            epsilon_filter=terms.filter.epsilon - account.remaining_epsilon,
            epsilon_pld=_composed_pld(history, terms),
            delta=terms.delta,
            num_charges=sum(times for _, times in history),
        )

    def affordable(self, name: str, *, sampling_probability: float, noise_multiplier: float, most: int = 1 << 20) -> int:
        """Returns how many Poisson-sampled Gaussian steps can be reserved now for everyone whom this budget has charged (before its first charge: for everybody who is known).

        Every budget that binds one of them is asked, its period included, as `reserve` asks it. 0 to `most`.

        Args:
            name: of an open budget.
            sampling_probability: in (0, 1].
            noise_multiplier: > 0.

        Raises:
            PlanInvalid: when a number breaks its rule.
            NotFound: when the budget was not opened.
        """
        if not (0 < sampling_probability <= 1 and math.isfinite(noise_multiplier) and noise_multiplier > 0):
            raise PlanInvalid("0 < sampling_probability <= 1 and a finite noise_multiplier > 0", value=(sampling_probability, noise_multiplier))
        with self._store.transaction() as tx:
            at = now(tx)
            _, held = _accounts(tx, name, list(_standing(tx, name)))
            standing = [account.rolled(at) for account in held.values()]
        one_of = {account.terms.name: account for account in standing}

        def fits(steps: int) -> bool:
            event = event_of(sampling_probability=sampling_probability, noise_multiplier=noise_multiplier, steps=steps)
            costs = {
                budget: _cost({"event": event_to_json(event)}, account) for budget, account in one_of.items()
            }  # RDP knows the event: the same for all of a budget
            return all(account.charged(costs[account.terms.name]).is_within for account in standing)

        return _largest(fits, most=most)

    def has_run(self, run: str) -> bool:
        """Returns whether a run has a reservation."""
        with self._store.transaction() as tx:
            return _of_run(tx, run) is not None

    def open_runs(self) -> list[Reservation]:
        """Returns the reservations of training runs, and of searches, that are not closed."""
        open_ = (
            (_reservations.c.state != State.CLOSED.value)
            & _reservations.c.snapshot.is_not(None)
            & _reservations.c.kind.in_((Kind.TRAINING.value, Kind.SEARCH.value))
        )
        with self._store.transaction() as tx:
            return [_reservation(tx, row) for row in tx.execute(select(_reservations).where(open_)).all()]

    def of_run(self, run: str) -> Reservation:
        """Returns the reservation of a run, whatever its state.

        Raises:
            NotFound: when the run reserved nothing.
        """
        with self._store.transaction() as tx:
            row = _of_run(tx, run)
            if row is None:
                raise NotFound("a run that reserved something", value=run)
            return _reservation(tx, row)

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
                fields = {"reservation": row.id, "run": row.run, "budget": row.budget, "plan": row.plan, "kind": row.kind, **json.loads(row.price)}
                self._log.append(tx, Statement(predicate=Predicate.SPENT, subjects=(Digest(row.plan),), fields=fields))
            return _reservation(tx, _by_id(tx, row.id))

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
                return _reservation(tx, row)
            closed = {"state": State.CLOSED.value, "reason": reason.value, "steps": executed_steps}
            tx.execute(update(_reservations).where(_reservations.c.id == row.id).values(closed))
            fields: dict[str, JSON] = {"reservation": row.id, "run": row.run, "budget": row.budget, "plan": row.plan, "reason": reason.value}
            fields |= {} if executed_steps is None else {"steps": executed_steps}
            self._log.append(tx, Statement(predicate=Predicate.CLOSED, subjects=(Digest(row.plan),), fields=fields))
            return _reservation(tx, _by_id(tx, row.id))

    def _charge(self, tx: Connection, wanted: Sequence[_Wanted], number: int) -> list[Reservation]:
        """Judges one population's spends one after the other, for every cohort under every budget that binds it, then writes them all from this number on."""
        first = wanted[0]
        people, accounts = _accounts(tx, first.budget, None if first.population is None else cohorts.of_population(tx, first.population))
        at = now(tx)
        held = {key: account.rolled(at) for key, account in accounts.items()}
        left: list[float] = []
        for want in wanted:
            held = {key: _judged(account, want, asked=first.budget) for key, account in held.items()}
            left.append(_least(held, first.budget))
        return self._write(tx, people, held, wanted, left, number)

    def _write(
        self,
        tx: Connection,
        people: Sequence[int],
        held: Mapping[tuple[int, str], _Account],
        wanted: Sequence[_Wanted],
        left: Sequence[float],
        number: int,
    ) -> list[Reservation]:
        cohorts.write_accounts(tx, {key: account.to_json() for key, account in held.items()})
        cohorts.add(tx, people, {want.spend.digest: want.spend.content for want in wanted}, Counter(want.spend.digest for want in wanted))
        rows = [_row(want, number + k, now(tx)) for k, want in enumerate(wanted)]
        later(tx, _INSERT_RESERVATIONS, rows)
        self._log.append_all(tx, [_reserved(row) for row in rows])
        return [_granted(row, remaining) for row, remaining in zip(rows, left, strict=True)]

    def _queued(self, name: str, spend: Spend) -> Reservation:
        """Charges one query to everyone, in one transaction with those of other threads that wait meanwhile; each gets its own answer."""
        ticket = _Ticket(budget=name, spend=spend)
        with self._mutex:
            self._waiting.append(ticket)
            leads, self._is_led = not self._is_led, True
        if not leads:
            ticket.called.wait()
        if ticket.outcome is None:  # the first to come, or the heir of one who led: does the work of all who wait
            self._lead()
        if isinstance(ticket.outcome, Reservation):
            return ticket.outcome
        raise ticket.outcome or OperationFailed("a reservation that is granted or refused")

    def _lead(self) -> None:
        with self._mutex:
            tickets = [self._waiting.popleft() for _ in range(min(len(self._waiting), _TOGETHER))]
        try:
            for name in dict.fromkeys(ticket.budget for ticket in tickets):
                self._answer(name, [ticket for ticket in tickets if ticket.budget == name])
        finally:
            with self._mutex:
                heir = self._waiting[0] if self._waiting else None
                self._is_led = heir is not None
            for ticket in tickets:
                ticket.outcome = ticket.outcome or OperationFailed("a reservation that was not interrupted", remedy="Ask again.")
                ticket.called.set()
            if heir is not None:
                heir.called.set()

    def _answer(self, name: str, tickets: Sequence[_Ticket]) -> None:
        try:
            with self._store.transaction() as tx:
                outcomes = self._charge_each(tx, name, [ticket.spend for ticket in tickets])
        except Exception as error:  # nothing of the transaction is kept: the answer is the same for all of them
            outcomes = [error] * len(tickets)
        for ticket, outcome in zip(tickets, outcomes, strict=True):
            ticket.outcome = outcome

    def _charge_each(self, tx: Connection, name: str, spends: Sequence[Spend]) -> list[Reservation | Exception]:
        """Judges spends one after the other; what is refused is left out, what is admitted is written."""
        at = now(tx)
        people, accounts = _accounts(tx, name)
        held = {key: account.rolled(at) for key, account in accounts.items()}
        refused: dict[int, Exception] = {}
        left: list[float] = []
        for place, spend in enumerate(spends):
            try:
                held = {key: _judged(account, _query(name, spend, 0, None, None), asked=name) for key, account in held.items()}
                left.append(_least(held, name))
            except (BudgetExhausted, PlanInvalid) as error:
                refused[place] = error
        admitted = [spend for place, spend in enumerate(spends) if place not in refused]
        granted: list[Reservation] = []
        if admitted:
            number = _take_numbers(tx, name, len(admitted))
            granted = self._write(tx, people, held, [_query(name, spend, number + k, None, None) for k, spend in enumerate(admitted)], left, number)
        order = iter(granted)
        return [refused[place] if place in refused else next(order) for place in range(len(spends))]


def _least(held: Mapping[tuple[int, str], _Account], budget: str) -> float:
    """What is left of a budget for those of its people who have least."""
    return min(account.remaining_epsilon for (_, name), account in held.items() if name == budget)


def unopened(*, epsilon: float, delta: float, unit: str, period: Period | None = None) -> RdpFilter:
    """Returns the filter that a budget would have on the day of its opening. Errors as `Ledger.open`."""
    terms = _open_terms("unopened", unit, epsilon, delta, "add_remove", 0.0, period, opened_at=0.0)
    return _filter_of(terms, _Account.fresh(terms).closed_off)


def _largest(fits: Callable[[int], bool], *, most: int) -> int:
    """The largest number from 0 to `most` up to which all fit."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, high * 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, most)


# Budgets


def _open_terms(
    name: str, unit: str, epsilon: float, delta: float, relation: Relation, query_delta: float, period: Period | None, *, opened_at: float
) -> _Terms:
    if not (0 <= query_delta < delta):
        raise PlanInvalid("a delta in (0, 1), and 0 <= query_delta < delta", value=f"delta {delta}, query_delta {query_delta}")
    try:
        opened = RdpFilter.open(epsilon=epsilon, delta=delta - query_delta, relation=relation)
    except ValueError:
        raise PlanInvalid("a finite epsilon > 0 and a delta in (0, 1)", value=f"epsilon {epsilon}, delta {delta}") from None
    return _Terms(name=name, unit=unit, filter=opened, query_delta=query_delta, period=period, opened_at=opened_at)


def _opened(terms: _Terms) -> Statement:
    numbers: dict[str, JSON] = {
        "budget": terms.name,
        "epsilon": terms.filter.epsilon,
        "delta": terms.delta,
        "unit": terms.unit,
        "relation": terms.filter.relation,
    }
    fields: dict[str, JSON] = {**numbers, "accountant": "rdp", "orders": list(terms.filter.orders)}
    fields |= {"query_delta": terms.query_delta} if terms.query_delta else {}
    fields |= {"period": terms.period.to_json()} if terms.period else {}
    return Statement(predicate=Predicate.BUDGET_OPENED, subjects=(digest_of(numbers),), fields=fields)


def _other_numbers(found: _Terms) -> ReservationRefused:
    opened = f"epsilon {found.filter.epsilon:g}, delta {found.delta:g}, unit {found.unit}, {found.filter.relation}"
    return ReservationRefused(
        f"budget '{found.name}' with the numbers that it was opened with",
        value=f"other numbers than {opened}",
        remedy="They are fixed; two people may raise its epsilon: `discreet budget raise`.",
    )


def _claim_unit(tx: Connection, unit: str, sources: Iterable[str]) -> None:
    """Counts the people of sources in this unit from now on."""
    wanted = tuple(dict.fromkeys(sources))
    known = {row[0]: row[1] for row in tx.execute(select(_units.c.source, _units.c.unit).where(_units.c.source.in_(wanted)))}
    for source in wanted:
        if known.get(source, unit) != unit:
            raise ReservationRefused(
                "a source whose people are counted in one unit",
                value=f"source {source}, counted by {known[source]}, for a budget by {unit}",
                remedy="Use a budget of that unit; the same people cannot be counted in another one.",
            )
    new = [{"source": source, "unit": unit} for source in wanted if source not in known]
    if new:
        tx.execute(insert(_units), new)


def _all_terms(tx: Connection) -> dict[str, _Terms]:
    return {row[0]: _read_terms(*row) for row in fetch(tx, _ALL_TERMS)}


_ALL_TERMS = select(_budgets.c.name, _budgets.c.unit, _budgets.c.terms, _budgets.c.opened_at)


@lru_cache(maxsize=256)
def _read_terms(name: str, unit: str, terms: str, opened_at: float) -> _Terms:
    fields = json.loads(terms)
    period = None if fields["period"] is None else Period(**{**fields["period"], "carry_over": CarryOver(fields["period"]["carry_over"])})
    return _Terms(
        name=name,
        unit=unit,
        filter=RdpFilter.from_json(fields["filter"]),
        query_delta=fields["query_delta"],
        period=period,
        opened_at=opened_at,
    )


def _terms(tx: Connection, name: str) -> _Terms:
    row = tx.execute(_ALL_TERMS.where(_budgets.c.name == name)).one_or_none()
    if row is None:
        raise _not_open(name)
    return _read_terms(*row)


def _not_open(name: str) -> NotFound:
    return NotFound("an open budget", value=repr(name), remedy="Open it with `discreet budget open NAME --epsilon E --delta D`.")


def _standing(tx: Connection, name: str) -> dict[int, _Account]:
    """The accounts of everyone whom a budget has charged; when nobody yet, of everybody who is known, with all that they spent under other names."""
    terms = _terms(tx, name)
    found = {cohort: _Account.from_json(stored, terms) for (cohort, _), stored in cohorts.accounts(tx, budget=name).items()}
    return found or {cohort: _replayed(tx, cohort, terms) for cohort in cohorts.accounts_of_everyone(tx)[0]}


def _budget(tx: Connection, name: str) -> Budget:
    terms, standing = _terms(tx, name), _standing(tx, name)
    remaining = min(account.remaining_epsilon for account in standing.values())
    return Budget(
        name=name,
        epsilon=terms.filter.epsilon,
        delta=terms.delta,
        unit=terms.unit,
        remaining_epsilon=remaining,
        num_reservations=int(tx.execute(select(_budgets.c.reservations).where(_budgets.c.name == name)).scalar_one()),
        query_delta=terms.query_delta,
        period=terms.period,
        unlocked=_unlocked(terms, now(tx)),
        alerts=_alerts(terms, remaining, [account.rolled(now(tx)) for account in standing.values()]),
    )


def _unlocked(terms: _Terms, at: float) -> float:
    return 1.0 if terms.period is None else min(1.0, (terms.period.number(at - terms.opened_at) + 1) / terms.period.count)


def _alerts(terms: _Terms, remaining: float, standing: Sequence[_Account]) -> tuple[str, ...]:
    share = 1 - remaining / terms.filter.epsilon
    said = (
        [f"budget '{terms.name}': {share:.0%} of epsilon {terms.filter.epsilon:g} is spent; nothing of it comes back"] if share >= _ALERT_FROM else []
    )
    used = max(account.used_of_period for account in standing)
    if used >= _ALERT_FROM:
        said.append(f"budget '{terms.name}': {min(used, 1.0):.0%} of what this period may spend is spent; the rest is locked until the next")
    return tuple(said)


# Accounts


def _accounts(tx: Connection, name: str, people: Sequence[int] | None = None) -> tuple[Sequence[int], dict[tuple[int, str], _Account]]:
    """Cohorts (left out, everyone) and the accounts that judge a charge to them: of every budget that binds them, and of the one that is asked, which counts all that they ever spent."""
    terms = _all_terms(tx)
    if name not in terms:
        raise _not_open(name)
    cohorts_, stored = cohorts.accounts_of_everyone(tx) if people is None else (people, cohorts.accounts(tx, people))
    found = {(c, b): _Account.from_json(content, terms[b]) for (c, b), content in stored.items()}
    return cohorts_, found | {(cohort, name): _replayed(tx, cohort, terms[name]) for cohort in cohorts_ if (cohort, name) not in found}


def _replayed(tx: Connection, cohort: int, terms: _Terms) -> _Account:
    """The account that a cohort would have, had it been under this budget from the start."""
    account = _Account.fresh(terms)
    for content, times in cohorts.history(tx, cohort):
        if _takes_reserve(content):  # each takes half of what the one before it left
            for _ in range(times):
                account = account.charged(_cost(content, account))
            continue
        cost = _cost(content, account)
        many = _Cost(
            vector=tuple(value * times for value in cost.vector), pure=_EXACT.multiply(cost.pure, times), delta=_EXACT.multiply(cost.delta, times)
        )
        account = account.charged(many)
    return account


def _judged(account: _Account, want: _Wanted, *, asked: str) -> _Account:
    """The account after the spend, or the refusal."""
    cost = _cost(want.spend.content, account)
    after = account.charged(cost)
    if not all(value > 0 for value in cost.vector) or not account.shows(after):
        raise PlanInvalid("a spend large enough to be accounted for", value=want.plan, remedy="A mechanism that costs nothing needs no budget.")
    if after.is_within:
        return after
    name, total = account.terms.name, account.terms.filter.epsilon
    asks = account.filter.epsilon_of(cost.vector) if cost.pure.is_infinite() else float(cost.pure)
    remedy = "Plan fewer steps or more noise (`discreet plan`). Nothing spent comes back; only two people raise a budget (`discreet budget raise`)."
    if account.terms.period is not None:
        remedy += " What its periods have not unlocked yet is locked."
    if cost.delta > 0 and after.delta > _decimal(account.terms.query_delta):
        remedy = "Its delta for queries is fixed at opening (--query-delta)."
    also = "" if name == asked else ", which binds some of these people,"
    raise BudgetExhausted(
        f"a spend that budget '{name}'{also} admits",
        value=f"epsilon {asks:.4g} asked, {account.remaining_epsilon:.4g} of {total:.4g} left",
        remedy=remedy,
    )


def _cost(content: Mapping[str, Any], account: _Account) -> _Cost:
    """What a charge costs an account as it stands: an event that RDP knows costs the same always; any other takes half of what is left of the filter's reserve of delta."""
    terms, orders = account.terms, account.terms.filter.orders
    if "event" not in content:
        vector = rdp_of_pure(content["epsilon"], orders)
        return _Cost(vector=tuple(map(float, vector)), pure=_decimal(content["epsilon"]), delta=_decimal(content["delta"]))
    try:
        if not _takes_reserve(content):
            spent = rdp(event_from_json(content["event"]), orders, relation=terms.filter.relation)
            return _Cost(vector=tuple(map(float, spent)), pure=Decimal("Infinity"))
        fresh = replace(terms.filter, spent_delta=account.filter.spent_delta)
        *values, basic, delta = _rare(json.dumps(content["event"], sort_keys=True), fresh)
    except ValueError as error:
        raise PlanInvalid("an event that the budget can account for", value=str(error)) from None
    return _Cost(vector=tuple(values), pure=_decimal(basic), reserve=delta)


def _takes_reserve(content: Mapping[str, Any]) -> bool:
    """Whether RDP has no bound for a charge's event (truncated Poisson, documents of a unit), so that it is charged as an (epsilon, delta) query."""
    try:
        return "event" in content and entry_of(event_from_json(content["event"])) != "rdp"
    except ValueError as error:
        raise PlanInvalid("an event that the budget can account for", value=str(error)) from None


@lru_cache(maxsize=64)
def _rare(event: str, fresh: RdpFilter) -> tuple[float, ...]:
    """`RdpFilter.vector` of an event that takes a second or more; every account that stands alike asks for the same."""
    return tuple(map(float, fresh.vector(event_from_json(json.loads(event)))))


def _composed_pld(history: Sequence[tuple[Mapping[str, Any], int]], terms: _Terms) -> float | None:
    """Events by one PLD at the filter's delta; pure and approximate queries added to it. None when the accountant has no PLD for an event."""
    events = [SelfComposedDpEvent(event_from_json(content["event"]), times) for content, times in history if "event" in content]
    queries = sum(content["epsilon"] * times for content, times in history if "event" not in content)
    if not events:
        return float(queries)
    try:
        price = guarantee(ComposedDpEvent(events), delta=terms.filter.delta, relation=terms.filter.relation)
    except ValueError:
        return None
    return price.epsilon + queries if price.accountant.startswith("pld") else None


def _population(snapshot: Snapshot) -> str:
    """The name of a set of people. Erasure only ever takes people out of a snapshot, so root and number together mean one set."""
    return f"{snapshot.root}/{snapshot.num_units}"


def _cohorts_without_enrolling(tx: Connection, keyring: Keyring, snapshot: Snapshot) -> tuple[int, ...]:
    """The cohorts that the people of a snapshot are in now, those whom nobody has named among them."""
    return cohorts.of_population(tx, _population(snapshot)) or cohorts.touched(tx, cohorts.members(keyring, snapshot.units.reveal()))


# Reservations


def _check_terms(terms: _Terms, plan: Plan) -> None:
    if (plan.unit, plan.relation) != (terms.unit, terms.filter.relation):
        expected = f"a plan for the {terms.filter.relation} of one {terms.unit}, as budget '{terms.name}'"
        raise ReservationRefused(expected, value=f"{plan.relation} of one {plan.unit}")


def _price(plan: Plan) -> dict[str, JSON]:
    """The public facts of a plan that its `spent` statement carries."""
    names = ("unit", "delta", "relation", "sampling_probability", "noise_multiplier", "clip_norm", "steps", "expected_batch", "cap", "filter_epsilon")
    return {**{name: getattr(plan, name) for name in names}, "epsilon": plan.guarantee.epsilon, "accountant": plan.guarantee.accountant}


def _query(name: str, spend: Spend, number: int, population: str | None, snapshot: Snapshot | None) -> _Wanted:
    run = f"query-{number}.{name}"
    price: dict[str, JSON] = {"accountant": "rdp"} if spend.epsilon is None else {"epsilon": spend.epsilon, "delta": spend.delta}
    root = None if snapshot is None else snapshot.root
    plan = digest_of({"spend": spend.content, "run": run})
    return _Wanted(budget=name, run=run, kind=spend.kind, plan=plan, snapshot=root, population=population, price=price, spend=spend)


def _row(want: _Wanted, number: int, at: float) -> dict[str, Any]:
    names = {"run": want.run, "budget": want.budget, "kind": want.kind.value, "plan": want.plan, "snapshot": want.snapshot}
    state = {"population": want.population, "price": json.dumps(want.price), "state": State.RESERVED.value, "reserved_at": at}
    return {"id": f"{want.budget}-{number}", **names, **state}


def _reserved(row: Mapping[str, Any]) -> Statement:
    price = json.loads(row["price"])
    fields: dict[str, JSON] = {name: row[name] for name in ("run", "budget", "plan", "snapshot", "kind")}
    fields |= {name: price[name] for name in ("epsilon", "delta") if name in price}
    subjects = (row["plan"], row["snapshot"]) if row["snapshot"] else (row["plan"],)
    return Statement(predicate=Predicate.RESERVED, subjects=subjects, fields={"reservation": row["id"], **fields})


def _decimal(value: float) -> Decimal:
    """The number as it is written: 0.1 is a tenth, so ten of them are one."""
    return Decimal(repr(float(value)))


def _take_numbers(tx: Connection, budget: str, count: int) -> int:
    """Counts `count` more reservations of a budget and returns the number of the first."""
    found = fetch(tx, _LAST_NUMBER, budget=budget)
    if not found:
        raise _not_open(budget)
    last = int(found[0][0])
    later(tx, _COUNT, [{"budget": budget, "last": last + count}])
    return last + 1


_LAST_NUMBER = select(_budgets.c.reservations).where(_budgets.c.name == bindparam("budget"))
_COUNT = update(_budgets).where(_budgets.c.name == bindparam("budget")).values(reservations=bindparam("last", type_=Integer))
_INSERT_RESERVATIONS = insert(_reservations)


def _of_run(tx: Connection, run: str) -> Any:
    return tx.execute(select(_reservations).where(_reservations.c.run == run)).one_or_none()


def _by_id(tx: Connection, identifier: str) -> Any:
    return tx.execute(select(_reservations).where(_reservations.c.id == identifier)).one_or_none()


def _resumed(tx: Connection, row: Any, wanted: tuple[str, Digest, Digest]) -> Reservation:
    if (row.budget, row.plan, row.snapshot) != wanted:
        raise ReservationRefused(
            "a run with the budget, plan and snapshot that it reserved", value=f"run {row.run}", remedy="Start a new run; it is charged anew."
        )
    if row.state == State.CLOSED:
        raise _closed(row.run)
    return _reservation(tx, row)


def _closed(run: str) -> ReservationRefused:
    return ReservationRefused("a run that is open", value=f"run {run}, closed", remedy="Start a new run; it is charged anew.")


def _matching(tx: Connection, reservation: Reservation) -> Any:
    row = _by_id(tx, reservation.id)
    given = (reservation.run, reservation.budget, reservation.plan, reservation.snapshot)
    if row is None or (row.run, row.budget, row.plan, row.snapshot) != given:
        raise ReservationRefused("a reservation of this ledger", value=reservation.id)
    return row


def _reservation(tx: Connection, row: Any) -> Reservation:
    _, standing = _accounts(tx, row.budget, None if row.population is None else cohorts.of_population(tx, row.population))
    return _granted(row._mapping, min(account.remaining_epsilon for (_, budget), account in standing.items() if budget == row.budget))


def _granted(row: Mapping[str, Any], remaining: float) -> Reservation:
    return Reservation(
        id=row["id"],
        budget=row["budget"],
        run=row["run"],
        plan=Digest(row["plan"]),
        snapshot=None if row["snapshot"] is None else Digest(row["snapshot"]),
        state=State(row["state"]),
        remaining_epsilon=remaining,
        kind=Kind(row["kind"]),
    )


def _filter_of(terms: _Terms, spent: tuple[float, ...], reserve: float = 0.0) -> RdpFilter:
    """The filter of a budget after what was spent by RDP; from then on nothing is counted by the plain sum of epsilons."""
    basic = math.inf if any(spent) else terms.filter.spent_basic
    return replace(terms.filter, spent=spent, spent_basic=basic, spent_delta=min(reserve, terms.filter.reserve))
