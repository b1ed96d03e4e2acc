"""A subject asks to be forgotten: plan, execute, prove, certify.

    restricted (nothing new of theirs is admitted) -> every store purged -> key destroyed -> absence proved in every store -> `erased` logged

The suppression survives the erasure: it is an HMAC of the pseudonym under a project key, so that a later copy of the source cannot bring the subject back,
and it names nobody. Every step is idempotent; what was affected is written down in the first transaction, so that a crash between two steps is finished
by the next call and loses nothing.

What happens to what was made from the subject:
    snapshot                              the documents are destroyed in it, its root stays
    model trained with DP for this unit   kept: it is (epsilon, delta)-close to the model trained without the subject; the budget is not refunded
    model trained otherwise               it still holds the subject: the erasure fails with its digest until it is destroyed and retired

An unknown subject gets the same certificate, by the same steps, as a known one: a request cannot be used to learn who is in (PITFALLS 22). The counts of
a plan are `Sensitive`, and the statement is internal.

Sources: GDPR Art. 17 and 18; Bourtoule et al. 2021 on what "trained without" would cost. Does not cover: identity verification of whoever asks (the
caller's), how long an erasure takes (it takes longer for somebody who is in), backups until their horizon, copies that left the project, retention on a
timer, and stores that were not passed in.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, final

from sqlalchemy import Column, Connection, String, Table, Text, insert, select, update

from discreet.errors import ErasureIncomplete
from discreet.evidence.log import Log
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.governance import lineage
from discreet.governance.lineage import Artifact, Kind
from discreet.keys import Keyring
from discreet.record import Digest, Sensitive, SubjectId
from discreet.store import Store as Database
from discreet.store import metadata

_erasures = Table(
    "erasures",
    metadata,
    Column("token", String(64), primary_key=True),
    Column("state", String(8), nullable=False),
    Column("affected", Text, nullable=False),
)
_BEGUN, _DONE = "begun", "done"
_BATCH = 256
"""Artifacts in one statement, which has room for 512 digests."""


class Store(Protocol):
    """Anything that keeps something of a subject. Every store implements this in its own file; `purge` is idempotent."""

    @property
    def name(self) -> str:
        """A word for the certificate ("corpus")."""

    def holds(self, subject: SubjectId) -> Sequence[Digest]:
        """Returns the digests of what holds something of the subject: records, snapshots, indexes."""

    def purge(self, subject: SubjectId) -> None:
        """Destroys everything of the subject."""

    def absence(self, subject: SubjectId) -> bool:
        """Looks again, at the stored bytes themselves, and returns whether nothing of the subject is left."""


class Decision(StrEnum):
    """What is done with an artifact that was made from an erased subject."""

    PURGED = "purged"
    KEPT = "kept: trained with differential privacy for this unit; the budget is not refunded"
    DESTROY = "destroy: trained without differential privacy for this unit"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ErasurePlan:
    """What an erasure would touch, for the operator; it prints the same for a known and an unknown subject."""

    stores: tuple[str, ...]
    holdings: Sensitive[Mapping[str, int]]
    affected: Sensitive[Mapping[Digest, Decision]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What the subject gets: which stores proved absence, and the entry of the log that says so. No identifier, no count of theirs."""

    request: Digest
    entry: int
    stores: tuple[str, ...]


class Erasure:
    """The right to erasure over every store of one project."""

    def __init__(self, store: Database, keyring: Keyring, log: Log, *, stores: Sequence[Store], unit: str) -> None:
        """Binds the erasure to its stores.

        Args:
            stores: every store of the project; one that is left out is not erased.
            unit: the privacy unit that a subject is ("patient"), as in `[privacy] unit`.
        """
        self._database = store
        self._keyring = keyring
        self._log = log
        self._stores = tuple(stores)
        self._unit = unit

    def plan(self, subject: SubjectId) -> ErasurePlan:
        """Returns what `execute` would touch, and writes nothing."""
        held = {store.name: tuple(store.holds(subject)) for store in self._stores}
        with self._database.transaction() as tx:
            affected = self._affected(tx, held)
        counts = {name: len(digests) for name, digests in held.items()}
        return ErasurePlan(stores=self._names(), holdings=Sensitive(counts), affected=Sensitive(affected))

    def execute(self, subject: SubjectId) -> Certificate:
        """Erases the subject everywhere and returns the certificate. Idempotent; a crash is finished by the next call.

        Raises:
            ErasureIncomplete: when a store or a model still holds the subject; its name is the value. The subject stays restricted.
        """
        self._restrict(subject)
        affected = self._scope(subject)
        for store in self._stores:
            store.purge(subject)
        self._keyring.forget(subject)
        self._prove(subject, affected)
        entry = self._certify(subject, affected)
        return Certificate(request=request_digest(self._keyring, subject), entry=entry, stores=self._names())

    def _restrict(self, subject: SubjectId) -> None:
        """Writes the suppression first: from here on nothing new of the subject is admitted."""
        key = token(self._keyring, subject)
        with self._database.transaction() as tx:
            if tx.execute(select(_erasures.c.token).where(_erasures.c.token == key)).scalar_one_or_none() is None:
                tx.execute(insert(_erasures).values(token=key, state=_BEGUN, affected="{}"))

    def _scope(self, subject: SubjectId) -> dict[Digest, Decision]:
        """Writes down what is affected before anything is destroyed: afterwards nobody could tell any more."""
        held = {store.name: tuple(store.holds(subject)) for store in self._stores}
        mine = _erasures.c.token == token(self._keyring, subject)
        with self._database.transaction() as tx:
            earlier = _decode(tx.execute(select(_erasures.c.affected).where(mine)).scalar_one())
            affected = {**_without_retired(tx, earlier), **self._affected(tx, held)}
            tx.execute(update(_erasures).where(mine).values(state=_BEGUN, affected=_encode(affected)))
        return affected

    def _affected(self, tx: Connection, held: Mapping[str, Sequence[Digest]]) -> dict[Digest, Decision]:
        """Returns the snapshots and models that hold the subject or were made from what does; records are not named, they are destroyed."""
        digests = [digest for held_here in held.values() for digest in held_here]
        reached = {artifact.digest: artifact for artifact in lineage.descendants(tx, digests)}
        for digest in digests:
            reached.setdefault(digest, _known(tx, digest))
        return {d: self._decide(artifact) for d, artifact in sorted(reached.items()) if artifact.kind is not Kind.RECORD}

    def _decide(self, artifact: Artifact) -> Decision:
        if artifact.kind is not Kind.MODEL:
            return Decision.PURGED
        return Decision.KEPT if artifact.protects == self._unit else Decision.DESTROY

    def _prove(self, subject: SubjectId, affected: Mapping[Digest, Decision]) -> None:
        remaining = [store.name for store in self._stores if not store.absence(subject)]
        remaining += [f"model {digest}" for digest, decision in affected.items() if decision is Decision.DESTROY]
        if remaining:
            raise ErasureIncomplete(
                "every store and model to be without the erased subject",
                value=", ".join(remaining),
                remedy="Repair or destroy what is named, then run the erasure again; the subject stays restricted until it succeeds.",
            )

    def _certify(self, subject: SubjectId, affected: Mapping[Digest, Decision]) -> int:
        fields: dict[str, JSON] = {"reason": "request", "stores": list(self._names())}
        with self._database.transaction() as tx:
            tx.execute(update(_erasures).where(_erasures.c.token == token(self._keyring, subject)).values(state=_DONE))
            request = request_digest(self._keyring, subject)
            for batch in lineage.chunks(affected.items(), _BATCH):
                decisions: dict[str, JSON] = {digest: decision.value for digest, decision in batch}
                self._log.append(tx, _erased_statement((request, *(digest for digest, _ in batch)), {**fields, "decisions": decisions}))
            return self._log.append(tx, _erased_statement((request,), fields))

    def _names(self) -> tuple[str, ...]:
        return tuple(store.name for store in self._stores)


def erased(tx: Connection, keyring: Keyring, subjects: Sequence[SubjectId]) -> set[SubjectId]:
    """Returns those of `subjects` who were erased, or whose erasure has begun."""
    by_token = {token(keyring, subject): subject for subject in subjects}
    found = [t for chunk in lineage.chunks(by_token) for t in tx.execute(select(_erasures.c.token).where(_erasures.c.token.in_(chunk))).scalars()]
    return {by_token[t] for t in found}


def token(keyring: Keyring, subject: SubjectId) -> str:
    """Returns the entry of a subject in the suppression list: 64 hex digits that outlive the subject's key and name nobody."""
    return keyring.hmac("suppression", subject.encode()).hex()


def request_digest(keyring: Keyring, subject: SubjectId) -> Digest:
    """Returns the digest under which the log keeps a subject's requests; only the holder of the master key can compute it."""
    return Digest("sha256:" + keyring.hmac("request", subject.encode()).hex())


def _erased_statement(subjects: tuple[Digest, ...], fields: Mapping[str, JSON]) -> Statement:
    return Statement(predicate=Predicate.ERASED, subjects=subjects, fields=fields)


def _without_retired(tx: Connection, affected: Mapping[Digest, Decision]) -> dict[Digest, Decision]:
    """Leaves out the models that were destroyed and retired since an earlier attempt."""
    return {d: decision for d, decision in affected.items() if decision is not Decision.DESTROY or lineage.is_known(tx, d)}


def _known(tx: Connection, digest: Digest) -> Artifact:
    """Returns the artifact, or a snapshot for a digest that only a store knows."""
    return lineage.find(tx, digest) if lineage.is_known(tx, digest) else Artifact(digest=digest, kind=Kind.SNAPSHOT)


def _encode(affected: Mapping[Digest, Decision]) -> str:
    return json.dumps({digest: decision.name for digest, decision in affected.items()})


def _decode(stored: str) -> dict[Digest, Decision]:
    return {Digest(digest): Decision[name] for digest, name in json.loads(stored).items()}
