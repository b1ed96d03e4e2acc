"""Erasure: complete or loud, finished after a crash, the same answer for everybody, and nobody comes back."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from discreet import corpus
from discreet.corpus import SnapshotStore
from discreet.errors import ErasureIncomplete, Forgotten
from discreet.evidence.statement import Predicate
from discreet.governance import lineage
from discreet.governance.catalog import subject_id
from discreet.governance.erasure import Decision, Erasure, request_digest
from discreet.governance.lineage import Artifact, Kind
from discreet.record import Deidentified, Digest, Purpose, Sensitive

PURPOSE = Purpose("note-assistant")
MODEL, MERGED = Digest("sha256:" + "1" * 64), Digest("sha256:" + "2" * 64)


@dataclass
class Ward:
    """A project whose notes were admitted, frozen and trained on."""

    house: object
    records: list
    snapshot: object
    erasure: Erasure
    subject: str = field(init=False)

    def __post_init__(self):
        self.subject = self.records[0].subject

    def model(self, digest, parent, protects="patient"):
        with self.house.store.transaction() as tx:
            lineage.derive(tx, Artifact(digest=digest, kind=Kind.MODEL, protects=protects), parents=[parent])


def freeze(house, records, name="train"):
    documents = [
        Deidentified(
            digest=record.digest,
            source=record.source,
            subject=record.subject,
            sensitivity=record.sensitivity,
            text=record.text,
            policy=Digest("sha256:" + "a" * 64),
            counts={},
        )
        for record in records
    ]
    snapshot = corpus.freeze(documents, name=name, keyring=house.keyring, log=house.log, store=house.store, folder=house.root / "corpus")
    with house.store.transaction() as tx:
        parents = [record.digest for record in records]
        lineage.derive(tx, Artifact(digest=snapshot.root, kind=Kind.SNAPSHOT), parents=parents)
    return snapshot


def walk(house):
    records = house.catalog.collect(house.catalog.register(*house.notes()))
    house.consent.admit_all(records, PURPOSE)
    snapshot = freeze(house, records)
    stores = [house.catalog, SnapshotStore(house.root / "corpus", house.keyring)]
    return Ward(house, records, snapshot, Erasure(house.store, house.keyring, house.log, stores=stores, unit="patient"))


@pytest.fixture
def ward(house):
    return walk(house)


def test_both_databases_collect_admit_freeze_and_erase_alike(either_house):
    ward = walk(either_house)
    ward.model(MODEL, ward.snapshot.root)
    assert ward.erasure.plan(ward.subject).holdings.reveal() == {"catalog": 2, "corpus": 1}
    assert set(ward.erasure.plan(ward.subject).affected.reveal()) == {ward.snapshot.root, MODEL}
    for _ in range(2):
        ward.erasure.execute(ward.subject)
    assert ward.erasure.plan(ward.subject).holdings.reveal() == {"catalog": 0, "corpus": 0}
    admitted, refused = either_house.consent.admit_all(ward.records, PURPOSE)
    assert [a.record for a in admitted] == ward.records[2:]
    assert {reason for _, reason in refused} == {"erased"}
    again = either_house.catalog.collect(either_house.catalog.register(*either_house.notes()))
    assert [record.digest for record in again] == [ward.records[2].digest]


def test_everything_of_the_subject_goes_and_nothing_else(ward):
    house = ward.house
    others = ward.records[2]
    ward.model(MODEL, ward.snapshot.root)
    certificate = ward.erasure.execute(ward.subject)
    assert certificate.stores == ("catalog", "corpus")
    assert house.catalog.holds(ward.subject) == []
    assert list(house.catalog.holds(others.subject)) == [others.digest]
    with pytest.raises(Forgotten):
        house.keyring.subject(ward.subject)
    after = corpus.open_snapshot(ward.snapshot.root, keyring=house.keyring, folder=house.root / "corpus")
    assert list(after.units.reveal()) == [others.subject]
    [position] = after.units.reveal()[others.subject]
    assert corpus.texts(after, [position], house.keyring) == [others.text.reveal()]


def test_the_log_names_what_was_affected_and_what_was_decided(ward):
    ward.model(MODEL, ward.snapshot.root)
    ward.model(MERGED, MODEL)
    certificate = ward.erasure.execute(ward.subject)
    first, last = ward.house.log.select(Predicate.ERASED)
    assert first.subjects[0] == last.subjects[0] == certificate.request == request_digest(ward.house.keyring, ward.subject)
    assert set(first.subjects[1:]) == {ward.snapshot.root, MODEL, MERGED}
    assert dict(first.fields["decisions"]) == {ward.snapshot.root: Decision.PURGED, MODEL: Decision.KEPT, MERGED: Decision.KEPT}
    assert "budget is not refunded" in Decision.KEPT
    assert last.index == certificate.entry
    digests = {record.digest for record in ward.records}
    assert not digests & {subject for entry in (first, last) for subject in entry.subjects}, "the request is never tied to records"


@pytest.mark.parametrize("protects", ["", "note"])
def test_a_model_without_privacy_for_this_unit_fails_by_name_until_it_is_gone(ward, protects):
    ward.model(MODEL, ward.snapshot.root, protects)
    with pytest.raises(ErasureIncomplete, match=f"model {MODEL}") as caught:
        ward.erasure.execute(ward.subject)
    assert caught.value.exit_code == 1
    assert ward.house.log.select(Predicate.ERASED) == []
    with pytest.raises(ErasureIncomplete):
        ward.erasure.execute(ward.subject)
    with ward.house.store.transaction() as tx:
        lineage.retire(tx, MODEL)
    ward.erasure.execute(ward.subject)


class Stubborn:
    """A store that keeps what it was told to purge: the defect that must be loud."""

    name = "embeddings"

    def __init__(self):
        self.obeys = False
        self.held = True

    def holds(self, subject):
        return [Digest("sha256:" + "9" * 64)] if self.held else []

    def purge(self, subject):
        self.held = self.held and not self.obeys

    def absence(self, subject):
        return not self.held


def test_a_store_that_still_holds_the_subject_is_named(ward):
    house, stubborn = ward.house, Stubborn()
    erasure = Erasure(house.store, house.keyring, house.log, stores=[house.catalog, stubborn], unit="patient")
    with pytest.raises(ErasureIncomplete, match="embeddings"):
        erasure.execute(ward.subject)
    assert house.consent.admit_all(ward.records[:1], PURPOSE)[0] == [], "restricted although the erasure failed"
    assert house.log.select(Predicate.ERASED) == []
    stubborn.obeys = True
    erasure.execute(ward.subject)
    named = {subject for entry in house.log.select(Predicate.ERASED) for subject in entry.subjects}
    assert {"sha256:" + "9" * 64, ward.snapshot.root} <= named, "what the first attempt found is still named"


def test_a_store_that_was_left_out_leaves_shreds_only(ward):
    """The key is destroyed all the same: what lies in a forgotten store opens for nobody."""
    house = ward.house
    Erasure(house.store, house.keyring, house.log, stores=[house.catalog], unit="patient").execute(ward.subject)
    with pytest.raises(Forgotten):
        corpus.texts(ward.snapshot, ward.snapshot.units.reveal()[ward.subject], house.keyring)


@pytest.mark.parametrize("step", ["purge catalog", "purge corpus", "forget", "prove", "certify"])
def test_a_crash_at_any_step_is_finished_by_the_next_call(ward, monkeypatch, step):
    house, erasure = ward.house, ward.erasure
    ward.model(MODEL, ward.snapshot.root)
    owner, name = {
        "purge catalog": (erasure._stores[0], "purge"),
        "purge corpus": (erasure._stores[1], "purge"),
        "forget": (house.keyring, "forget"),
        "prove": (erasure, "_prove"),
        "certify": (house.log, "append"),
    }[step]

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, crash)
    with pytest.raises(KeyboardInterrupt):
        erasure.execute(ward.subject)
    monkeypatch.undo()
    assert house.consent.admit_all(ward.records[:1], PURPOSE)[0] == []
    erasure.execute(ward.subject)
    [first, _] = house.log.select(Predicate.ERASED)
    assert set(first.subjects[1:]) == {ward.snapshot.root, MODEL}


def test_a_stranger_gets_the_same_answer_by_the_same_steps(ward):
    stranger = subject_id(ward.house.keyring, unit="patient", value="nobody")
    plans = [ward.erasure.plan(subject) for subject in (ward.subject, stranger)]
    assert str(plans[0]) == str(plans[1])
    assert plans[0].holdings.reveal() == {"catalog": 2, "corpus": 1}
    assert plans[1].holdings.reveal() == {"catalog": 0, "corpus": 0}
    known, unknown, twice = (ward.erasure.execute(subject) for subject in (ward.subject, stranger, ward.subject))
    for certificate in (unknown, twice):
        assert (type(certificate), certificate.stores) == (type(known), known.stores)
        assert certificate.request.startswith("sha256:")
    with pytest.raises(Forgotten):
        ward.house.keyring.subject(stranger)


def test_the_subject_does_not_come_back(ward):
    house = ward.house
    ward.erasure.execute(ward.subject)
    extra = [{"id": "n9", "patient": "P-1", "text": "Zebediah again."}, {"id": "n10", "patient": "P-5", "text": "New."}]
    project, section = house.notes(extra)
    records = house.catalog.collect(house.catalog.register_again(project, section))
    assert [record.text.reveal() for record in records] == ["New."]


def test_certificates_and_errors_name_nobody(ward):
    certificate = ward.erasure.execute(ward.subject)
    for text in (repr(certificate), repr(ward.erasure.plan(ward.subject))):
        assert ward.subject not in text
        assert not [record.digest for record in ward.records if record.digest in text]
    assert isinstance(ward.erasure.plan(ward.subject).affected, Sensitive)
