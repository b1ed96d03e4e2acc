"""May this record be used for this purpose? The legal basis of every subject and purpose, objections and withdrawals, and the one door: `admit`.

The rules, in this order; the first that speaks decides:
    erased          the subject was erased, or the erasure has begun                         refused, for good
    not collected   the record is not a collected record of a registered source              refused
    past retention  more days than the source allows since the record was collected          refused
    objected        the subject's latest word on this purpose is an objection or withdrawal  refused
    granted         the subject's latest word on this purpose is a grant                     admitted on the basis of the grant
    declared        the source declares the purpose                                          admitted on the basis of the source
    no basis        nothing allows the purpose                                               refused

A subject's words are kept under an HMAC of their pseudonym, so the list names nobody and outlives an erasure. An opt-out list overrides an
earlier grant for as long as it lists the unit. Every decision that is new is logged in the transaction that stores it, in statements of at most
512 records; asking twice logs once. `Admitted` is built here and nowhere else.

Sources: GDPR Art. 6, 7(3), 17, 18, 21. Does not cover: whether a basis holds in law, and consent by anyone but the privacy unit.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby
from typing import final

from sqlalchemy import Column, Connection, Float, Index, Integer, String, Table, delete, insert, select

from discreet.config import SourceSection
from discreet.errors import NotAdmitted, SourceMissing, SourceNotText
from discreet.evidence.log import Log
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.governance import catalog, erasure, lineage
from discreet.governance.catalog import BATCH, RegisteredSource
from discreet.keys import Key, Keyring
from discreet.record import Admitted, Basis, Digest, Purpose, Record, SubjectId
from discreet.store import Store, metadata, now

_SECONDS_A_DAY = 86_400
_EVERY_PURPOSE = "*"

_words = Table(
    "consent_events",
    metadata,
    Column("sequence", Integer, primary_key=True, autoincrement=True),
    Column("token", String(64), nullable=False),
    Column("purpose", String(63), nullable=False),
    Column("basis", String(32), nullable=False),
    Column("at", Float, nullable=False),
    Index("consent_events_by_token", "token", "purpose"),
)
"""What subjects said; an empty basis is an objection."""

_decisions = Table(
    "admissions",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("purpose", String(63), primary_key=True),
    Column("outcome", String(48), nullable=False),
)


class Reason(StrEnum):
    """Why a record is refused."""

    ERASED = "erased"
    NOT_COLLECTED = "not collected"
    RETENTION = "past retention"
    OBJECTED = "objected"
    NO_BASIS = "no basis for purpose"


_REMEDY = {
    Reason.ERASED: "The subject was erased; this cannot be undone.",
    Reason.NOT_COLLECTED: "Register the source and collect it again.",
    Reason.RETENTION: "Its retention_days are over; erase it.",
    Reason.OBJECTED: "Leave the record out; only the subject can grant it again.",
    Reason.NO_BASIS: "Declare the purpose in [[source]] purposes, or record a grant.",
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    """What one decision depends on, read in one transaction."""

    erased: frozenset[SubjectId]
    rows: Mapping[Digest, tuple[str, SubjectId, float]]
    sources: Mapping[str, SourceSection]
    words: Mapping[SubjectId, Basis | None]
    at: float


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """One word of a subject, for their own access request: what was said about which purpose ("*" is every purpose), and when, in seconds since 1970."""

    purpose: str
    basis: Basis | None
    at: float


class Consent:
    """The legal basis for every use of a record in one project.

    For `governance.erasure` it is a store too: decisions about the subject's records go, their words stay, as HMACs that keep an objection alive.
    """

    name = "consent"

    def __init__(self, store: Store, keyring: Keyring, log: Log) -> None:
        self._store = store
        self._keyring = keyring
        self._log = log

    def load_opt_outs(self, source: RegisteredSource) -> int:
        """Reads the opt-out list of a source, one privacy unit a line, and records who is new on it. Nothing to do when it declares none.

        Returns:
            The number of units whose standing changed. Internal (PITFALLS 41).

        Raises:
            SourceMissing: when the declared file cannot be read. Without it nobody may be admitted.
            SourceNotText: when it is not UTF-8 text.
        """
        if source.opt_outs is None:
            return 0
        listed = [source.subject(self._keyring, unit) for unit in _read_units(source)]
        with self._store.transaction() as tx:
            subjects = self._people(tx, listed)
            silent = self._without_objection(tx, subjects)
            new = [subject for subject in dict.fromkeys(subjects) if subject in silent]
            if new:
                self._say(tx, new, purpose=_EVERY_PURPOSE, basis=None)
                fields: dict[str, JSON] = {"change": "objected", "purpose": _EVERY_PURPOSE, "source": source.name, "num_units": len(new)}
                self._log.append(tx, Statement(predicate=Predicate.CONSENT_CHANGED, subjects=(source.digest,), fields=fields))
        return len(new)

    def grant(self, subject: SubjectId, purpose: Purpose, *, basis: Basis = Basis.CONSENT) -> None:
        """Records that the subject's records may be used for this purpose on this basis, from now on."""
        self._change(subject, purpose.name, basis=basis)

    def withdraw(self, subject: SubjectId, purpose: Purpose | None = None) -> None:
        """Records that the subject objects, or withdraws, from now on: for one purpose, or for every purpose. Says nothing about whether they are known."""
        self._change(subject, purpose.name if purpose else _EVERY_PURPOSE, basis=None)

    def import_words(self, rows: Iterable[tuple[SubjectId, Purpose | None, Basis | None]]) -> int:
        """Records the words of many subjects at once, all or none, and logs how many changed; internal (PITFALLS 41).

        Args:
            rows: subject, purpose (None: every purpose), and the basis of a grant (None: an objection), in the order in which they were said.
        """
        changed = 0
        with self._store.transaction() as tx:
            for (purpose, basis), group in groupby(rows, key=lambda row: (row[1], row[2])):
                name = purpose.name if purpose else _EVERY_PURPOSE
                subjects = list(dict.fromkeys(self._people(tx, [subject for subject, _, _ in group])))
                if basis is None:
                    open_ones = self._without_objection(tx, subjects, name)
                    new = [subject for subject in subjects if subject in open_ones]
                else:
                    standing = self._standing(tx, subjects, name)
                    new = [subject for subject in subjects if standing.get(subject) is not basis]
                if new:
                    self._say(tx, new, purpose=name, basis=basis)
                changed += len(new)
            if changed:
                fields: dict[str, JSON] = {"change": "imported", "purpose": _EVERY_PURPOSE, "num_units": changed}
                self._log.append(tx, Statement(predicate=Predicate.CONSENT_CHANGED, subjects=(self._import_digest(tx),), fields=fields))
        return changed

    def history(self, subject: SubjectId) -> list[Word]:
        """Returns everything the subject said, oldest first."""
        with self._store.transaction() as tx:
            rows = tx.execute(select(_words).where(_words.c.token == self._token(subject)).order_by(_words.c.sequence)).all()
        return [Word(purpose=row.purpose, basis=Basis(row.basis) if row.basis else None, at=row.at) for row in rows]

    def has_heard_of(self, tx: Connection, subject: SubjectId) -> bool:
        """Returns, within a transaction, whether anything was said in the name of this very pseudonym, or it was erased or is restricted."""
        said = tx.execute(select(_words.c.sequence).where(_words.c.token == self._token(subject)).limit(1)).first()
        return said is not None or bool(erasure.erased(tx, self._keyring, [subject]))

    def is_erased(self, subject: SubjectId) -> bool:
        """Returns whether the subject was erased, or is restricted: nothing of theirs may be taken in again."""
        with self._store.transaction() as tx:
            return bool(erasure.erased(tx, self._keyring, [subject]))

    def holds(self, subject: SubjectId) -> Sequence[Digest]:
        """Returns the subject's records that were decided on (`erasure.Store`)."""
        with self._store.transaction() as tx:
            return self._decided(tx, subject)

    def purge(self, subject: SubjectId) -> None:
        """Deletes the decisions about the subject's records; asked before the catalog forgets which records those are (`erasure.Store`)."""
        with self._store.transaction() as tx:
            for chunk in lineage.chunks(self._decided(tx, subject)):
                tx.execute(delete(_decisions).where(_decisions.c.digest.in_(chunk)))
        self._store.scrub()

    def absence(self, subject: SubjectId) -> bool:
        """Returns whether no decision is left about a record of the subject, or about a record that nobody knows any more (`erasure.Store`)."""
        known = select(catalog.records.c.digest)
        with self._store.transaction() as tx:
            orphan = tx.execute(select(_decisions.c.digest).where(_decisions.c.digest.not_in(known)).limit(1)).scalar_one_or_none()
        return orphan is None and not self.holds(subject)

    def _decided(self, tx: Connection, subject: SubjectId) -> list[Digest]:
        theirs = select(catalog.records.c.digest).where(catalog.records.c.subject == subject)
        return [Digest(d) for d in tx.execute(select(_decisions.c.digest).where(_decisions.c.digest.in_(theirs)).distinct()).scalars()]

    def _import_digest(self, tx: Connection) -> Digest:
        latest = tx.execute(select(_words.c.sequence).order_by(_words.c.sequence.desc()).limit(1)).scalar_one()
        return Digest("sha256:" + self._keyring.hmac("consent import", str(latest).encode()).hex())

    def admit(self, record: Record, purpose: Purpose) -> Admitted:
        """Admits a record for one purpose, and logs the decision.

        Raises:
            NotAdmitted: when a rule refuses it; the value is the `Reason`.
        """
        admitted, refused = self.admit_all([record], purpose)
        for _, reason in refused:
            raise NotAdmitted(f"a record that may be used for {purpose.name}", value=reason.value, remedy=_REMEDY[reason])
        return admitted[0]

    def admit_all(self, records: Sequence[Record], purpose: Purpose) -> tuple[list[Admitted], list[tuple[Digest, Reason]]]:
        """Decides on many records in one transaction, and logs what is new in statements of at most 512 records.

        Returns:
            The admitted records in the order given, and the digest and reason of each of the others.
        """
        claims = [(record.digest, record.source, record.subject) for record in records]
        with self._store.transaction() as tx:
            facts = self._facts(tx, claims, purpose)
            decided = [_decide(claim, purpose, facts, record) for claim, record in zip(claims, records, strict=True)]
            self._write(tx, [(record.digest, outcome) for record, outcome in zip(records, decided, strict=True)], purpose)
        admitted = [Admitted(record=r, purpose=purpose, basis=b) for r, b in zip(records, decided, strict=True) if isinstance(b, Basis)]
        refused = [(r.digest, reason) for r, reason in zip(records, decided, strict=True) if isinstance(reason, Reason)]
        return admitted, refused

    def revoked(self, digests: Iterable[Digest], purpose: Purpose) -> list[tuple[Digest, Reason]]:
        """Returns which of these records may no longer be used for this purpose, and why: to be asked again before each later stage.

        Writes nothing; `admit_all` logs the refusal when the records are next offered.
        """
        wanted = list(digests)
        with self._store.transaction() as tx:
            rows = _rows(tx, wanted)
            claims = [(digest, *rows[digest][:2]) if digest in rows else (digest, "", SubjectId("")) for digest in wanted]
            facts = self._facts(tx, claims, purpose)
            decided = [(claim[0], _decide(claim, purpose, facts, None)) for claim in claims]
        return [(digest, outcome) for digest, outcome in decided if isinstance(outcome, Reason)]

    def _change(self, subject: SubjectId, purpose: str, *, basis: Basis | None) -> None:
        with self._store.transaction() as tx:
            [subject] = self._people(tx, [subject])
            if basis is None and not self._without_objection(tx, [subject], purpose):
                return
            if basis is not None and self._standing(tx, [subject], purpose).get(subject) is basis:
                return
            self._say(tx, [subject], purpose=purpose, basis=basis)
            fields = {"change": "granted" if basis else "objected", "purpose": purpose}
            # The subject's records, whose salt is their key's; of somebody without any, a digest of nothing: no leaf is to link to them once they are erased.
            about = catalog.digests_of(tx, subject) or [Digest("sha256:" + Key.random().stream("consent").bytes(32).hex())]
            for batch in lineage.chunks(about, BATCH):
                self._log.append(tx, Statement(predicate=Predicate.CONSENT_CHANGED, subjects=tuple(batch), fields=fields))

    def _people(self, tx: Connection, subjects: Sequence[SubjectId]) -> list[SubjectId]:
        """Whose words these are as of this transaction: a pseudonym may have become a second one of somebody since it was made."""
        same = self._keyring.second_identifiers(tx)
        return [same.get(subject, subject) for subject in subjects]

    def _say(self, tx: Connection, subjects: Sequence[SubjectId], *, purpose: str, basis: Basis | None) -> None:
        at = now(tx)
        said = basis.value if basis else ""
        tx.execute(insert(_words), [{"token": self._token(s), "purpose": purpose, "basis": said, "at": at} for s in subjects])

    def _standing(self, tx: Connection, subjects: Iterable[SubjectId], purpose: str) -> dict[SubjectId, Basis | None]:
        """Returns the latest word of each subject who said one on this purpose or on every purpose; None is an objection."""
        by_token = {self._token(subject): subject for subject in subjects}
        latest: dict[SubjectId, Basis | None] = {}
        for chunk in lineage.chunks(by_token):
            of_these = _words.c.token.in_(chunk) & _words.c.purpose.in_((purpose, _EVERY_PURPOSE))
            for row in tx.execute(select(_words).where(of_these).order_by(_words.c.sequence)):
                latest[by_token[row.token]] = Basis(row.basis) if row.basis else None
        return latest

    def _without_objection(self, tx: Connection, subjects: Iterable[SubjectId], purpose: str = _EVERY_PURPOSE) -> set[SubjectId]:
        """Returns those with no objection that covers `purpose`, or with a later grant of anything that it covered."""
        by_token = {self._token(subject): subject for subject in subjects}
        objecting: set[str] = set()
        for chunk in lineage.chunks(by_token):
            for row in tx.execute(select(_words).where(_words.c.token.in_(chunk)).order_by(_words.c.sequence)):
                if row.basis and purpose in (row.purpose, _EVERY_PURPOSE):
                    objecting.discard(row.token)
                elif not row.basis and row.purpose in (purpose, _EVERY_PURPOSE):
                    objecting.add(row.token)
        return {subject for t, subject in by_token.items() if t not in objecting}

    def _token(self, subject: SubjectId) -> str:
        return self._keyring.hmac("consent", subject.encode()).hex()

    def _facts(self, tx: Connection, claims: Sequence[tuple[Digest, str, SubjectId]], purpose: Purpose) -> _Facts:
        subjects = list(dict.fromkeys(subject for _, _, subject in claims))
        return _Facts(
            erased=frozenset(erasure.erased(tx, self._keyring, subjects)),
            rows=_rows(tx, [digest for digest, _, _ in claims]),
            sources=catalog.declared(tx),
            words=self._standing(tx, subjects, purpose.name),
            at=now(tx),
        )

    def _write(self, tx: Connection, decided: Sequence[tuple[Digest, Basis | Reason]], purpose: Purpose) -> None:
        digests = [digest for digest, _ in decided]
        stored = {
            row.digest: row.outcome
            for chunk in lineage.chunks(digests)
            for row in tx.execute(select(_decisions).where(_decisions.c.purpose == purpose.name, _decisions.c.digest.in_(chunk)))
        }
        new = sorted({(_spell(outcome), digest) for digest, outcome in decided if stored.get(digest) != _spell(outcome)})
        for chunk in lineage.chunks([digest for _, digest in new]):
            tx.execute(delete(_decisions).where(_decisions.c.purpose == purpose.name, _decisions.c.digest.in_(chunk)))
        if new:
            tx.execute(insert(_decisions), [{"digest": d, "purpose": purpose.name, "outcome": outcome} for outcome, d in new])
        for outcome, group in groupby(new, key=lambda pair: pair[0]):
            for batch in lineage.chunks((digest for _, digest in group), BATCH):
                self._log.append(tx, _statement(outcome, tuple(batch), purpose))


def _decide(claim: tuple[Digest, str, SubjectId], purpose: Purpose, facts: _Facts, record: Record | None) -> Basis | Reason:
    """Applies the table of the module docstring."""
    digest, source_name, subject = claim
    if subject in facts.erased:
        return Reason.ERASED
    stored = facts.rows.get(digest)
    source = facts.sources.get(source_name)
    if stored is None or source is None or stored[:2] != (source_name, subject):
        return Reason.NOT_COLLECTED
    if record is not None and record.sensitivity is not source.sensitivity:
        return Reason.NOT_COLLECTED  # a record that claims to be less sensitive than its source was not built by the catalog
    if facts.at - stored[2] > source.retention_days * _SECONDS_A_DAY:
        return Reason.RETENTION
    if subject in facts.words:
        return facts.words[subject] or Reason.OBJECTED
    return source.basis if purpose.name in source.purposes else Reason.NO_BASIS


def _rows(tx: Connection, digests: Sequence[Digest]) -> dict[Digest, tuple[str, SubjectId, float]]:
    table = catalog.records
    live = table.c.state == catalog.COLLECTED
    found = [row for chunk in lineage.chunks(digests) for row in tx.execute(select(table).where(table.c.digest.in_(chunk), live))]
    return {Digest(row.digest): (row.source, SubjectId(row.subject), row.collected_at) for row in found}


def _spell(outcome: Basis | Reason) -> str:
    return f"{'admitted' if isinstance(outcome, Basis) else 'refused'}/{outcome.value}"


def _statement(outcome: str, digests: tuple[Digest, ...], purpose: Purpose) -> Statement:
    verdict, _, why = outcome.partition("/")
    if verdict == "admitted":
        return Statement(predicate=Predicate.ADMITTED, subjects=digests, fields={"purpose": purpose.name, "basis": why})
    return Statement(predicate=Predicate.REFUSED, subjects=digests, fields={"purpose": purpose.name, "reason": why})


def _read_units(source: RegisteredSource) -> list[str]:
    content: bytes | None = None
    text: str | None = None
    try:
        content = source.opt_outs.read_bytes() if source.opt_outs else b""
        text = content.decode("utf-8-sig")
    except OSError:
        pass
    except UnicodeDecodeError:
        pass  # raised below, outside the handler: the decoder's exception holds the bytes
    if content is None:
        raise SourceMissing(
            "a readable opt-out list", value=f"source {source.name}", remedy="Restore it; without it nobody of this source may be admitted."
        )
    if text is None or "\x00" in text:
        raise SourceNotText("an opt-out list in UTF-8, one privacy unit a line", value=f"source {source.name}")
    return [unicodedata.normalize("NFC", line).strip() for line in text.splitlines() if line.strip()]
