"""One person by name: their key, their tokens, their consent, and what the project holds about them."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from discreet.config import SourceSection
from discreet.deid import policy as deid
from discreet.errors import NotFound, RecordInvalid, SourceEmpty, SourceMissing
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.governance import lineage
from discreet.governance.access import Action, current_user
from discreet.keys import Key
from discreet.pipeline.house import House, subject_of, training_policy
from discreet.record import Basis, Digest, Purpose, Sensitive, SubjectId


def subject_key(house: House, unit: str) -> tuple[SubjectId, Key]:
    """Returns a person's pseudonym and key, for stand-ins and tokens outside of the corpus.

    Raises:
        Forgotten: when they were erased.
    """
    house.access.require(Action.RUN, who=current_user())
    subject = subject_of(house, unit)
    return subject, house.keyring.subject(subject)


def restore_tokens(house: House, unit: str, text: str, *, policy: str) -> tuple[str, int]:
    """Puts the values of a person's tokens back into a text, and says so in the log, by number. Returns the text and how many were opened.

    Raises:
        AccessDenied: when whoever asks may not, or nobody else approved it for this person.
        Forgotten: when the person was erased: nothing opens their tokens any more.
        NotFound: when the project has no key of theirs.
    """
    who, subject = current_user(), subject_of(house, unit)
    about = reidentification(house, unit)
    house.access.require(Action.REIDENTIFY, who=who, about=about)
    if not house.keyring.has_subject(subject):
        raise NotFound("a subject of whom this project has tokens")
    restored, count = deid.restore(text, house.keyring.subject(subject), policy=policy, subject=subject)
    fields: dict[str, JSON] = {"kind": "re-identification", "action": Action.REIDENTIFY.value, "by": who.name, "policy": policy, "values": count}
    with house.store.transaction() as tx:
        house.log.append(
            tx, Statement(predicate=Predicate.ACCESS_GRANTED, subjects=(about,), fields={**fields, "role": ", ".join(house.access.roles(who))})
        )
    return restored, count


def reidentification(house: House, unit: str) -> Digest:
    """Returns what an approval and a statement about opening a person's tokens are bound to: an HMAC that outlives their erasure and names nobody."""
    return Digest("sha256:" + house.keyring.hmac("reidentified", subject_of(house, unit).encode()).hex())


Own = tuple[str, Mapping[str, tuple[str, ...]], deid.Policy]
"""A text, the identifiers that it is known to be about, and the policy of its source."""


def own_texts(house: House, subject: SubjectId) -> list[Own]:
    """What the sensitive training sources say about a subject now."""
    told: list[Own] = []
    collected = set(house.catalog.holds(subject))  # a source may have grown: what came later was never trained on
    for section in house.project.source:
        if section.role != "train":
            continue
        found, policy = _rows_of(house, section, subject), training_policy(house, section)
        told += [(text.reveal(), known.reveal(), policy) for digest, text, known in found if digest in collected]
    return told


def _rows_of(
    house: House, section: SourceSection, subject: SubjectId
) -> list[tuple[Digest, Sensitive[str], Sensitive[Mapping[str, tuple[str, ...]]]]]:
    """A person's rows in a source as it lies there now, registered or not; none where everybody was taken out of it."""
    try:
        return house.catalog.texts_of(house.catalog.present(house.project, section), subject)
    except SourceEmpty:
        return []


def may_record_consent(house: House, unit: str, *, source: str = "") -> SubjectId:
    """Returns the pseudonym of a person, or of one record of a public source, whose words the operator may record.

    Raises:
        AccessDenied: when their role may not.
    """
    house.access.require(Action.CONSENT, who=current_user())
    return subject_of(house, unit, source=source)


def import_consent(house: House, file: Path) -> int:
    """Reads a CSV of subject, purpose ("*": every purpose) and basis (empty: withdrawn), and records it whole or not at all.

    Raises:
        SourceMissing, RecordInvalid: when it cannot be read or a line breaks a rule; nothing is recorded.
    """
    house.access.require(Action.CONSENT, who=current_user())
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise SourceMissing("a readable CSV file in UTF-8") from None
    words = []
    for number, row in enumerate(csv.DictReader(lines), start=2):
        subject, purpose, basis = (row.get(name) for name in ("subject", "purpose", "basis"))
        if not subject or not purpose or basis is None or basis not in ("", *Basis):
            raise RecordInvalid("subject, purpose and a basis of GDPR Art. 6 (or none, for a withdrawal)", value=f"line {number}")
        words.append((subject_of(house, subject), None if purpose == "*" else Purpose(purpose), Basis(basis) if basis else None))
    return house.consent.import_words(words)


def access_export(house: House, unit: str) -> dict[str, Any]:
    """Returns what the project holds about one person, for that person (GDPR Art. 15), in each source as it lies there now. Holds their text: it goes to them and nowhere else.

    Raises:
        SourceMissing: when a source cannot be read: an export that leaves it out would not be whole.
    """
    house.access.require(Action.ACCESS_EXPORT, who=current_user())
    subject = subject_of(house, unit)
    sources, collected = [], set(house.catalog.holds(subject))
    for section in house.project.source:
        held = _rows_of(house, section, subject)
        if held:
            declared = {"name": section.name, "owner": section.owner, "basis": section.basis.value, "purposes": list(section.purposes)}
            told = [{"digest": d if d in collected else None, "text": t.reveal()} for d, t, _ in held]
            sources.append({**declared, "retention_days": section.retention_days, "records": told})
    with house.store.transaction() as tx:
        digests = list(house.catalog.holds_in(tx, subject))
        made = lineage.descendants(tx, digests)
    words = [{"purpose": w.purpose, "basis": w.basis.value if w.basis else None, "at": w.at} for w in house.consent.history(subject)]
    derived = [{"digest": a.digest, "kind": a.kind.value, "protects": a.protects} for a in made]
    return {"controller": house.project.project.controller, "sources": sources, "consent": words, "derived": derived}
