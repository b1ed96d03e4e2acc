"""Consent: each rule of the table refuses, decisions are logged once, what was said outlives erasure, nobody is named."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from sqlalchemy import text

from discreet.errors import Forgotten, NotAdmitted, SourceMissing, SourceNotText
from discreet.evidence.statement import Predicate
from discreet.governance.catalog import SourceFiles, declare_same, subject_id
from discreet.governance.consent import Consent, Reason
from discreet.governance.erasure import Erasure, Finding, Identity, Transcript, token
from discreet.keys import Keyring
from discreet.record import Basis, Digest, Purpose, Sensitivity, SubjectId

PURPOSE = Purpose("note-assistant")
OTHER = Purpose("research")


@pytest.fixture
def records(house):
    project, section = house.notes(opt_outs="optouts.txt")
    house.write("optouts.txt", "")
    return house.catalog.collect(house.catalog.register(project, section))


@pytest.fixture
def source(house, records):
    return house.catalog.register(*house.notes(opt_outs="optouts.txt"))


def refusals(house, records, purpose=PURPOSE):
    return {reason for _, reason in house.consent.admit_all(records, purpose)[1]}


def test_a_declared_purpose_is_admitted_on_the_basis_of_the_source(house, records):
    admitted = house.consent.admit(records[0], PURPOSE)
    assert (admitted.record, admitted.purpose, admitted.basis) == (records[0], PURPOSE, Basis.PUBLIC_TASK)
    [entry] = house.log.select(Predicate.ADMITTED)
    assert entry.subjects == (records[0].digest,)
    assert dict(entry.fields) == {"purpose": "note-assistant", "basis": "public_task"}


def test_another_purpose_has_no_basis_until_it_is_granted(house, records):
    with pytest.raises(NotAdmitted, match="no basis for purpose"):
        house.consent.admit(records[0], OTHER)
    house.consent.grant(records[0].subject, OTHER)
    assert house.consent.admit(records[0], OTHER).basis is Basis.CONSENT
    assert refusals(house, records[2:], OTHER) == {Reason.NO_BASIS}, "a grant is one subject's"


def test_a_withdrawal_refuses_and_a_later_grant_admits(house, records):
    house.consent.admit_all(records, PURPOSE)
    house.consent.withdraw(records[0].subject, PURPOSE)
    admitted, refused = house.consent.admit_all(records, PURPOSE)
    assert [a.record for a in admitted] == records[2:]
    assert refused == [(record.digest, Reason.OBJECTED) for record in records[:2]]
    with pytest.raises(NotAdmitted, match="objected"):
        house.consent.admit(records[1], PURPOSE)
    house.consent.grant(records[0].subject, PURPOSE, basis=Basis.CONTRACT)
    assert house.consent.admit(records[0], PURPOSE).basis is Basis.CONTRACT


def test_a_general_withdrawal_overrides_an_earlier_grant(house, records):
    subject = records[0].subject
    house.consent.withdraw(subject)
    house.consent.grant(subject, OTHER)
    assert refusals(house, records[:1], OTHER) == set()
    assert refusals(house, records[:1], PURPOSE) == {Reason.OBJECTED}
    house.consent.withdraw(subject)
    assert refusals(house, records[:1], OTHER) == {Reason.OBJECTED}


def test_a_change_is_logged_once_and_names_records_not_people(house, records):
    for _ in range(2):
        house.consent.withdraw(records[0].subject, PURPOSE)
    [entry] = house.log.select(Predicate.CONSENT_CHANGED)
    assert set(entry.subjects) == {record.digest for record in records[:2]}
    assert dict(entry.fields) == {"change": "objected", "purpose": "note-assistant"}
    stranger = subject_id(house.keyring, unit="patient", value="P-99")
    house.consent.withdraw(stranger)
    assert len(house.log.select(Predicate.CONSENT_CHANGED)) == 2, "a stranger's objection is kept for when they come"


def test_opt_outs_are_refused_whenever_the_list_has_them(house, records, source):
    assert house.consent.load_opt_outs(source) == 0
    house.write("optouts.txt", "\ufeffP-404\r\n\n  P-2 \n")
    assert house.consent.load_opt_outs(source) == 2
    assert house.consent.load_opt_outs(source) == 0
    admitted, refused = house.consent.admit_all(records, PURPOSE)
    assert [a.record for a in admitted] == records[:2]
    assert refused == [(records[2].digest, Reason.OBJECTED)]
    house.consent.grant(records[2].subject, PURPOSE)
    assert refusals(house, records) == set()
    assert house.consent.load_opt_outs(source) == 1, "the list overrides a grant while it lists the unit"
    assert refusals(house, records) == {Reason.OBJECTED}
    house.write("optouts.txt", "")
    house.consent.load_opt_outs(source)
    assert refusals(house, records) == {Reason.OBJECTED}, "to vanish from a list is not a grant"


def test_a_list_that_cannot_be_read_stops_the_run(house, source):
    (house.root / "optouts.txt").unlink()
    with pytest.raises(SourceMissing, match="opt-out"):
        house.consent.load_opt_outs(source)
    for content in (b"P-1\n\xff\n", b"P-1\x00"):
        house.write("optouts.txt", content)
        with pytest.raises(SourceNotText) as caught:
            house.consent.load_opt_outs(source)
        assert "P-1" not in str(caught.value)
        assert caught.value.__context__ is None


def test_retention_counts_from_the_recorded_time(house, monkeypatch):
    records = house.catalog.collect(house.catalog.register(*house.notes(retention_days=30)))
    start = time.time()
    monkeypatch.setattr(time, "time", lambda: start + 29 * 86_400)
    assert refusals(house, records) == set()
    monkeypatch.setattr(time, "time", lambda: start + 31 * 86_400)
    assert refusals(house, records) == {Reason.RETENTION}
    house.consent.grant(records[0].subject, PURPOSE)
    assert refusals(house, records) == {Reason.RETENTION}, "a grant does not make old data young"


def test_forged_and_unknown_records_are_refused(house, records):
    forged = [
        replace(records[0], digest=Digest("sha256:" + "0" * 64)),
        replace(records[0], subject=records[2].subject),
        replace(records[0], source="elsewhere"),
        replace(records[0], sensitivity=Sensitivity.PUBLIC),
    ]
    for record in forged:
        with pytest.raises(NotAdmitted, match="not collected"):
            house.consent.admit(record, PURPOSE)


class NoModels:
    """A project without a model."""

    def transcript(self, digest):
        return Transcript()

    def test(self, subject, digest):
        return Finding.NO_POWER

    def withdraw(self, digest):
        raise AssertionError


def erase(house, subject):
    erasure = Erasure(house.store, house.keyring, house.log, stores=[house.consent, house.catalog], models=NoModels(), unit="patient")
    erasure.execute(subject, identity=Identity(method="vouched", by="tester"))


def test_an_objection_outlives_the_erasure_that_removes_its_line(house, records, source):
    house.write("optouts.txt", "P-1\nP-404\n")
    house.consent.load_opt_outs(source)
    files = SourceFiles(house.project(source.section.model_dump()), house.keyring, house.store)
    subject = records[0].subject
    Erasure(house.store, house.keyring, house.log, stores=[files, house.consent, house.catalog], models=NoModels(), unit="patient").execute(
        subject, identity=Identity(method="vouched", by="tester")
    )
    assert (house.root / "optouts.txt").read_text() == "P-404\n"
    assert [(word.purpose, word.basis) for word in house.consent.history(subject)] == [("*", None)]
    assert house.consent.load_opt_outs(source) == 0, "who is on the list still is known, and said nothing new"


def test_an_erased_subject_is_refused_even_with_a_grant_and_at_reingestion(house, records):
    erase(house, records[0].subject)
    house.consent.grant(records[0].subject, PURPOSE)
    with pytest.raises(NotAdmitted, match="erased"):
        house.consent.admit(records[0], PURPOSE)
    project, section = house.notes(opt_outs="optouts.txt")
    for _ in range(2):
        again = house.catalog.collect(house.catalog.register(project, section))
        assert [record.text.reveal() for record in again] == ["Wilhelmina has a fracture."]
    assert [word.basis for word in house.consent.history(records[0].subject)] == [Basis.CONSENT], "what they said outlives them, as an HMAC"
    dropped = [entry for entry in house.log.select(Predicate.REFUSED) if "num_records" in entry.fields]
    assert [(e.fields["reason"], e.fields["num_records"]) for e in dropped] == [("erased", 2)], "logged once"


def test_decisions_are_logged_once_in_few_statements(house):
    many = [{"id": i, "patient": i, "text": f"note {i}"} for i in range(1030)]
    records = house.catalog.collect(house.catalog.register(*house.notes(many)))
    house.consent.withdraw(records[7].subject)
    for _ in range(2):
        admitted, refused = house.consent.admit_all(records, PURPOSE)
        assert (len(admitted), len(refused)) == (1029, 1)
    assert [len(e.subjects) for e in house.log.select(Predicate.ADMITTED)] == [512, 512, 5]
    assert [e.subjects for e in house.log.select(Predicate.REFUSED)] == [(records[7].digest,)]


def test_revoked_is_asked_before_each_later_stage(house, records):
    house.consent.admit_all(records, PURPOSE)
    digests = [record.digest for record in records]
    assert house.consent.revoked(digests, PURPOSE) == []
    house.consent.withdraw(records[2].subject)
    assert house.consent.revoked(digests, PURPOSE) == [(records[2].digest, Reason.OBJECTED)]
    stranger = Digest("sha256:" + "1" * 64)
    assert (stranger, Reason.NOT_COLLECTED) in house.consent.revoked([*digests, stranger], PURPOSE)


def test_what_subjects_said_names_nobody_in_the_database(house, records):
    subject: SubjectId = records[0].subject
    house.consent.withdraw(subject)
    with house.store.transaction() as tx:
        said = tx.exec_driver_sql("SELECT * FROM consent_events").all()
    assert len(said) == 1
    assert subject not in str(said)


def test_after_an_erasure_no_leaf_links_to_the_person(house, records):
    """Whoever has the whole log, the master key, the person's text and pseudonym finds the certificate and nothing else: a record's salt came from the destroyed key."""
    subject, stranger = records[0].subject, subject_id(house.keyring, unit="patient", value="nobody")
    house.consent.admit_all(records, PURPOSE)
    house.consent.withdraw(subject)
    house.consent.grant(stranger, PURPOSE)
    mine = {record.digest for record in records if record.subject == subject}
    assert mine < {digest for entry in house.log.select(Predicate.ADMITTED) for digest in entry.subjects}, "who is there is in the log"
    salt = house.keyring.subject(subject).stream("record").bytes(32)
    notes = [json.loads(line) for line in (house.root / "notes.jsonl").read_text().splitlines()]
    content = [json.dumps(["notes", row["id"], row["text"]], ensure_ascii=False, separators=(",", ":")).encode() for row in notes]
    assert mine == {"sha256:" + hashlib.sha256(salt + each).hexdigest() for each in content[:2]}, "with the key the leaf is found"
    models = SimpleNamespace(transcript=lambda digest: None, test=lambda subject, digest: None, withdraw=lambda digest: None)
    machine = Erasure(house.store, house.keyring, house.log, stores=(house.consent, house.catalog), models=models, unit="patient")
    for who in (subject, stranger):
        machine.execute(who, identity=Identity(method="vouched", by="tester"))
    house.log.verify()
    assert [word.basis for word in house.consent.history(subject)] == [None], "what they said outlives the erasure, under an HMAC"
    with pytest.raises(Forgotten):
        house.keyring.subject(subject)
    labels = ("suppression", "request", "consent", "ledger", "tombstone", "access", "consent import")
    known = [
        value.encode() for value in (subject, stranger, "P-1", "Zebediah", token(house.keyring, subject), token(house.keyring, stranger))
    ] + content
    computable = {"sha256:" + house.keyring.hmac(label, each).hex() for label in labels for each in known}
    computable |= {"sha256:" + hashlib.sha256(each).hexdigest() for each in known}
    entries = [entry for predicate in Predicate for entry in house.log.select(predicate)]
    assert {entry.predicate for entry in entries if computable & set(entry.subjects)} == {Predicate.ERASED}
    assert not [entry for entry in entries if subject.encode() in entry.envelope or stranger.encode() in entry.envelope]
    assert not [row for row in _rows_of(house, "records") + _rows_of(house, "admissions") if mine & set(map(str, row))]


def _rows_of(house, table):
    with house.store.transaction() as tx:
        return list(tx.execute(text(f"SELECT * FROM {table}")))


def test_withdrawals_by_the_thousand_reach_the_next_question_within_a_minute(house):
    """A list of 3,000 words is recorded and every later question about 3,000 records answers by it: seconds, of the minute that a run may take to stop."""
    many = [{"id": i, "patient": i, "text": f"note {i}"} for i in range(3000)]
    records = house.catalog.collect(house.catalog.register(*house.notes(many)))
    house.consent.admit_all(records, PURPOSE)
    began = time.monotonic()
    assert house.consent.import_words([(record.subject, None, None) for record in records[::2]]) == 1500
    gone = house.consent.revoked([record.digest for record in records], PURPOSE)
    assert {digest for digest, _ in gone} == {record.digest for record in records[::2]}
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("how", ["withdraw", "import", "opt out"])
def test_words_under_a_number_that_became_somebodys_meanwhile_are_theirs(house, how):
    """Whoever withdraws has named the person before the numbers were declared to be one, and writes after it."""
    source = house.catalog.register(*house.notes(opt_outs="optouts.txt"))
    person, second = (subject_id(house.keyring, unit="patient", value=value) for value in ("P-1", "P-9"))
    other = Keyring(house.store, house.master)
    declare_same(other, unit="patient", pairs=[("P-9", "P-1")])
    if how == "withdraw":
        house.consent.withdraw(second)
    elif how == "import":
        house.consent.import_words([(second, None, None), (person, None, None)])
    else:
        house.write("optouts.txt", "P-9\nP-1\n")
        house.consent.load_opt_outs(source)
    assert [word.basis for word in house.consent.history(person)] == [None], "said once"
    assert house.consent.history(second) == []
    restarted = Consent(house.store, other, house.log)
    assert restarted.history(subject_id(other, unit="patient", value="P-9")) == house.consent.history(person)
