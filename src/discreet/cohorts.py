"""Who has spent what: people in disjoint cohorts, and what every cohort was charged.

A cohort is a set of people with one history, so a million people who were always charged together are one row. A population (a snapshot's people) is a union of
cohorts; where a new population cuts through a cohort, the cohort is split and both parts keep its history. People whom no population has named yet are the
cohort `UNSEEN`: what was charged to everyone was charged to it, and whoever appears later leaves it with that history.

    members        keyed pseudonym -> cohort          each person in exactly one
    populations    population -> cohorts
    spends         cohort, charge -> how often        the whole history, from which every budget can be recomputed
    accounts       cohort, budget -> what the filter of that budget has counted so far (`ledger.py` reads and writes its content)

A pseudonym here is an HMAC of the subject's under a key of its own, which no erasure destroys: an erased person who comes back finds what was spent, and nothing else links to them
(PITFALLS 19). Functions of an open transaction: the ledger decides and writes in the same one.

Guarantees: cohorts stay disjoint and their histories only grow. Does not cover: one person under two pseudonyms (two schemes of units, identifiers that nobody declared to be
one): to this module they are two people.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from sqlalchemy import (
    Column,
    Connection,
    Index,
    Integer,
    String,
    Table,
    Text,
    bindparam,
    func,
    insert,
    literal_column,
    select,
    text,
    union_all,
    update,
)

from discreet.keys import Keyring
from discreet.record import Digest, SubjectId
from discreet.store import fetch, later, metadata

UNSEEN = 0
"""The cohort of everyone whom no population has named yet. It has no members in the table."""

_IN_ONE_QUERY = 500

_members = Table(
    "ledger_members",
    metadata,
    Column("member", String(64), primary_key=True),
    Column("cohort", Integer, nullable=False, index=True),
)
_cohorts = Table("ledger_cohorts", metadata, Column("id", Integer, primary_key=True, autoincrement=False), Column("size", Integer, nullable=False))
_populations = Table(
    "ledger_populations",
    metadata,
    Column("population", String(96), primary_key=True),
    Column("cohort", Integer, primary_key=True, autoincrement=False),
    Index("ledger_populations_by_cohort", "cohort"),
)
_charges = Table("ledger_charges", metadata, Column("id", String(71), primary_key=True), Column("content", Text, nullable=False))
_spends = Table(
    "ledger_spends",
    metadata,
    Column("cohort", Integer, primary_key=True, autoincrement=False),
    Column("charge", String(71), primary_key=True),
    Column("times", Integer, nullable=False),
)
_accounts = Table(
    "ledger_accounts",
    metadata,
    Column("cohort", Integer, primary_key=True, autoincrement=False),
    Column("budget", String(63), primary_key=True),
    Column("account", Text, nullable=False),
)


def members(keyring: Keyring, subjects: Iterable[SubjectId]) -> list[str]:
    """Returns the ledger's own pseudonyms of subjects, 64 hex digits each."""
    return [mac.hex() for mac in keyring.hmacs("ledger", [subject.encode() for subject in subjects])]


def accounts_of_everyone(tx: Connection) -> tuple[tuple[int, ...], dict[tuple[int, str], str]]:
    """Returns every cohort, `UNSEEN` included and first, and all of `accounts`."""
    rows = fetch(tx, _ACCOUNTS_OF_EVERYONE)
    return tuple(dict.fromkeys(row[0] for row in rows)), {(row[0], row[1]): row[2] for row in rows if row[1] is not None}


def of_population(tx: Connection, population: str) -> tuple[int, ...]:
    """Returns the cohorts of a population; none when it was never enrolled."""
    return tuple(tx.execute(select(_populations.c.cohort).where(_populations.c.population == population).order_by(_populations.c.cohort)).scalars())


def enroll(tx: Connection, population: str, people: Callable[[], Sequence[str]]) -> tuple[int, ...]:
    """Returns the cohorts that together are a population, after splitting those that are only partly in it. Idempotent by name.

    Args:
        population: a name that stands for one set of people.
        people: gives their pseudonyms (`members`); asked only the first time.
    """
    known = of_population(tx, population)
    if known:
        return known
    sizes = {row[0]: row[1] for row in tx.execute(select(_cohorts.c.id, _cohorts.c.size))}
    whole = [
        cohort if sizes.get(cohort) == len(group) else _split(tx, cohort, group) for cohort, group in sorted(_grouped(tx, set(people())).items())
    ]
    if whole:
        tx.execute(insert(_populations), [{"population": population, "cohort": cohort} for cohort in whole])
    return tuple(whole)


def touched(tx: Connection, people: Sequence[str]) -> tuple[int, ...]:
    """Returns the cohorts that people are in now, without splitting any."""
    return tuple(sorted(_grouped(tx, set(people))))


def add(tx: Connection, cohorts: Sequence[int], charges: Mapping[Digest, Mapping[str, Any]], times: Mapping[Digest, int]) -> None:
    """Writes charges into the history of cohorts.

    Args:
        charges: content by digest; JSON.
        times: how often each was made now, >= 1.
    """
    later(tx, _ADD_CHARGE, [{"id": digest, "content": json.dumps(content, sort_keys=True)} for digest, content in charges.items()])
    pairs = [{"cohort": cohort, "charge": digest, "times": count} for cohort in cohorts for digest, count in times.items()]
    later(tx, _ADD_SPEND, pairs)


def history(tx: Connection, cohort: int) -> list[tuple[dict[str, Any], int]]:
    """Returns everything that a cohort was charged, as (content, how often), oldest kind of charge first."""
    query = select(_charges.c.content, _spends.c.times).join(_charges, _charges.c.id == _spends.c.charge).where(_spends.c.cohort == cohort)
    return [(json.loads(row.content), row.times) for row in tx.execute(query.order_by(_spends.c.charge))]


def accounts(tx: Connection, cohorts: Sequence[int] | None = None, *, budget: str | None = None) -> dict[tuple[int, str], str]:
    """Returns the stored accounts, of some cohorts or of all, under one budget or under every one."""
    query = select(_accounts.c.cohort, _accounts.c.budget, _accounts.c.account)
    if cohorts is not None:
        query = query.where(_accounts.c.cohort.in_(cohorts))
    if budget is not None:
        query = query.where(_accounts.c.budget == budget)
    return {(row.cohort, row.budget): row.account for row in tx.execute(query.order_by(_accounts.c.cohort, _accounts.c.budget))}


def write_accounts(tx: Connection, accounts: Mapping[tuple[int, str], str]) -> None:
    """Stores accounts, new ones and known ones."""
    rows = [{"cohort": cohort, "budget": budget, "account": content} for (cohort, budget), content in accounts.items()]
    later(tx, _PUT_ACCOUNT, rows)


_each = union_all(select(_cohorts.c.id), select(literal_column(str(UNSEEN), Integer).label("id"))).subquery()
_ACCOUNTS_OF_EVERYONE = (
    select(_each.c.id, _accounts.c.budget, _accounts.c.account)
    .join_from(_each, _accounts, _accounts.c.cohort == _each.c.id, isouter=True)
    .order_by(_each.c.id, _accounts.c.budget)
)
_ADD_CHARGE = text("INSERT INTO ledger_charges (id, content) VALUES (:id, :content) ON CONFLICT (id) DO NOTHING")
_ADD_SPEND = text(
    "INSERT INTO ledger_spends (cohort, charge, times) VALUES (:cohort, :charge, :times)"
    " ON CONFLICT (cohort, charge) DO UPDATE SET times = ledger_spends.times + excluded.times"
)
_PUT_ACCOUNT = text(
    "INSERT INTO ledger_accounts (cohort, budget, account) VALUES (:cohort, :budget, :account)"
    " ON CONFLICT (cohort, budget) DO UPDATE SET account = excluded.account"
)
"""Upserts, in the form that SQLite and PostgreSQL share."""


def _grouped(tx: Connection, people: set[str]) -> dict[int, list[str]]:
    """People by the cohort that they are in; the unseen are those whom the table does not know."""
    groups: dict[int, list[str]] = {}
    pending = iter(sorted(people))
    while chunk := list(islice(pending, _IN_ONE_QUERY)):
        found = {row[0]: row[1] for row in tx.execute(select(_members.c.member, _members.c.cohort).where(_members.c.member.in_(chunk)))}
        for member in chunk:
            groups.setdefault(found.get(member, UNSEEN), []).append(member)
    return groups


def _split(tx: Connection, cohort: int, group: Sequence[str]) -> int:
    """Moves a group out of its cohort into one of its own, with the same history, accounts and populations."""
    new = int(tx.execute(select(func.coalesce(func.max(_cohorts.c.id), UNSEEN))).scalar_one()) + 1
    tx.execute(insert(_cohorts).values(id=new, size=len(group)))
    for table, columns in ((_spends, ("charge", "times")), (_accounts, ("budget", "account")), (_populations, ("population",))):
        copied = select(*(table.c[name] for name in columns), bindparam("new", new, type_=Integer)).where(table.c.cohort == cohort)
        tx.execute(insert(table).from_select([*columns, "cohort"], copied))
    if cohort == UNSEEN:
        _write_many(tx, insert(_members), [{"member": member, "cohort": new} for member in group])
    else:
        move = update(_members).where(_members.c.member == bindparam("m")).values(cohort=new)
        _write_many(tx, move, [{"m": member} for member in group])
        tx.execute(update(_cohorts).where(_cohorts.c.id == cohort).values(size=_cohorts.c.size - len(group)))
    return new


def _write_many(tx: Connection, statement: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    if rows:
        tx.execute(statement, list(rows))
