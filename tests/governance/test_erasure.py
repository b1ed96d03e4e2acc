"""Erasure: complete or loud, finished after a crash, the same answer for everybody, and nobody comes back."""

from __future__ import annotations

import copy
import os
import shutil
import signal
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime

import pytest

from discreet import corpus
from discreet.corpus import SnapshotStore
from discreet.errors import AccessDenied, ClockBackwards, ErasureIncomplete, Forgotten
from discreet.evidence.statement import Predicate
from discreet.governance import lineage
from discreet.governance.catalog import subject_id
from discreet.governance.erasure import (
    MAX_ATTEMPTS,
    Decision,
    Erasure,
    Finding,
    Identity,
    Reason,
    State,
    Transcript,
    decide,
    erased,
    group_epsilon,
    recomputed,
    request_digest,
    unfinished,
)
from discreet.governance.lineage import Artifact, Kind
from discreet.record import Deidentified, Digest, Purpose, Sensitive

PURPOSE = Purpose("note-assistant")
MODEL, MERGED = Digest("sha256:" + "1" * 64), Digest("sha256:" + "2" * 64)


VOUCHED = Identity(method="vouched for by the operator", by="tester")


@dataclass
class Models:
    """The models of a project, as the erasure sees them."""

    transcripts: dict = field(default_factory=dict)
    finding: Finding = Finding.NOT_EXPOSED
    withdrawn: list = field(default_factory=list)
    stuck: bool = False

    def transcript(self, digest):
        return self.transcripts.get(digest, Transcript())

    def test(self, subject, digest):
        return self.finding

    def withdraw(self, digest):
        if self.stuck:
            raise ErasureIncomplete("weights that can be destroyed", value=f"model {digest}; responsible: engineer")
        self.withdrawn.append(digest)


def build(house, stores, models=None, **options):
    return Erasure(house.store, house.keyring, house.log, stores=stores, models=models or Models(), unit="patient", **options)


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

    @property
    def models(self):
        return self.erasure._models

    def model(self, digest, parent, protects="patient"):
        self.models.transcripts[digest] = Transcript(unit=protects, epsilon=4, delta=1e-5, sampling_probability=0.01, noise_multiplier=1, steps=100)
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
    stores = [house.consent, house.catalog, SnapshotStore(house.root / "corpus", house.keyring)]
    return Ward(house, records, snapshot, build(house, stores))


@pytest.fixture
def ward(house):
    return walk(house)


def test_both_databases_collect_admit_freeze_and_erase_alike(either_house):
    ward = walk(either_house)
    ward.model(MODEL, ward.snapshot.root)
    assert ward.erasure.plan(ward.subject).holdings.reveal() == {"consent": 2, "catalog": 2, "corpus": 1}
    assert set(ward.erasure.plan(ward.subject).affected.reveal()) == {ward.snapshot.root, MODEL}
    for _ in range(2):
        ward.erasure.execute(ward.subject, identity=VOUCHED)
    assert ward.erasure.plan(ward.subject).holdings.reveal() == {"consent": 0, "catalog": 0, "corpus": 0}
    admitted, refused = either_house.consent.admit_all(ward.records, PURPOSE)
    assert [a.record for a in admitted] == ward.records[2:]
    assert {reason for _, reason in refused} == {"erased"}
    again = either_house.catalog.collect(either_house.catalog.register(*either_house.notes()))
    assert [record.digest for record in again] == [ward.records[2].digest]


def test_everything_of_the_subject_goes_and_nothing_else(ward):
    house = ward.house
    others = ward.records[2]
    ward.model(MODEL, ward.snapshot.root)
    certificate = ward.erasure.execute(ward.subject, identity=VOUCHED)
    assert certificate.stores == ("consent", "catalog", "corpus")
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
    certificate = ward.erasure.execute(ward.subject, identity=VOUCHED)
    first, last = ward.house.log.select(Predicate.ERASED)
    assert first.subjects[0] == last.subjects[0] == certificate.request == request_digest(ward.house.keyring, ward.subject)
    assert set(first.subjects[1:]) == {ward.snapshot.root, MODEL, MERGED}
    assert dict(first.fields["decisions"]) == {ward.snapshot.root: Decision.PURGED, MODEL: Decision.KEPT, MERGED: Decision.KEPT}
    assert "budget is not refunded" in Decision.KEPT
    assert last.index == certificate.entry
    digests = {record.digest for record in ward.records}
    assert not digests & {subject for entry in (first, last) for subject in entry.subjects}, "the request is never tied to records"


@pytest.mark.parametrize("protects", ["", "note"])
def test_a_model_without_privacy_for_this_unit_is_withdrawn_with_all_that_came_from_it(ward, protects):
    ward.model(MODEL, ward.snapshot.root, protects)
    ward.model(MERGED, MODEL, "patient")
    ward.models.stuck = True
    with pytest.raises(ErasureIncomplete, match="engineer") as caught:
        ward.erasure.execute(ward.subject, identity=VOUCHED)
    assert caught.value.exit_code == 1
    assert ward.house.log.select(Predicate.ERASED) == []
    ward.models.stuck = False
    ward.erasure.execute(ward.subject, identity=VOUCHED)
    assert set(ward.models.withdrawn) == {MODEL, MERGED}
    decided = ward.house.log.select(Predicate.ERASED)[0].fields["decisions"]
    assert decided[MODEL] == decided[MERGED] == Decision.WITHDRAWN
    with ward.house.store.transaction() as tx:
        assert not lineage.is_known(tx, MODEL)
        assert not lineage.is_known(tx, MERGED)


def test_somebody_in_two_populations_is_erased_from_both(ward):
    """Two sources, two snapshots, a model of each: one request reaches all, and leaves the others of both."""
    house, other = ward.house, Digest("sha256:" + "3" * 64)
    ward.model(MODEL, ward.snapshot.root)
    wing = [{"id": "w1", "patient": "P-1", "text": "Seen in the other wing."}, {"id": "w2", "patient": "P-9", "text": "A sprain."}]
    records = house.catalog.collect(house.catalog.register(*house.notes(wing, name="wing", path="wing.jsonl")))
    house.consent.admit_all(records, PURPOSE)
    assert records[0].subject == ward.subject
    second = freeze(house, records, name="wing")
    ward.model(other, second.root, protects="")
    ward.erasure.execute(ward.subject, identity=VOUCHED)
    decided = house.log.select(Predicate.ERASED)[0].fields["decisions"]
    assert decided == {ward.snapshot.root: Decision.PURGED, second.root: Decision.PURGED, MODEL: Decision.KEPT, other: Decision.WITHDRAWN}
    for root, left in ((ward.snapshot.root, ward.records[2].subject), (second.root, records[1].subject)):
        assert set(corpus.open_snapshot(root, keyring=house.keyring, folder=house.root / "corpus").units.reveal()) == {left}
    assert house.catalog.holds(ward.subject) == []


def test_the_decision_follows_the_transcript():
    rules = {"unit": "patient", "num_records": 3, "max_epsilon": 8.0}
    by_record = Transcript(unit="record", epsilon=1, delta=1e-5, sampling_probability=0.01, noise_multiplier=2.0, steps=50)
    trained = Artifact(digest=MODEL, kind=Kind.MODEL, protects="record")
    assert decide(trained, by_record, **rules) is Decision.KEPT_GROUP
    assert decide(trained, by_record, **{**rules, "num_records": 300}) is Decision.WITHDRAWN
    assert decide(trained, Transcript(unit="patient"), **rules) is Decision.KEPT
    assert decide(trained, Transcript(unit="patient", relation="replace_one"), **rules) is Decision.WITHDRAWN
    assert decide(Artifact(digest=MODEL, kind=Kind.BASE), Transcript(), **rules) is Decision.SUPPRESSED
    assert decide(Artifact(digest=MODEL, kind=Kind.INDEX), Transcript(), **rules) is Decision.PURGED


def test_the_bound_for_a_group_grows_and_beats_the_linear_one():
    by_record = Transcript(unit="record", delta=1e-5, sampling_probability=0.01, noise_multiplier=2.0, steps=50)
    one, three = group_epsilon(by_record, 1), group_epsilon(by_record, 3)
    assert group_epsilon(by_record, 0) == 0.0
    assert one < three < 10 * one


def test_weights_that_betray_somebody_are_not_kept(ward):
    """The transcript says keep, the audit's test says exposed: the test is believed."""
    ward.model(MODEL, ward.snapshot.root)
    ward.models.finding = Finding.EXPOSED
    with pytest.raises(ErasureIncomplete, match="exposed"):
        ward.erasure.execute(ward.subject, identity=VOUCHED)
    ward.erasure.execute(ward.subject, identity=VOUCHED)
    assert ward.models.withdrawn == [MODEL]


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
    erasure = build(house, [house.catalog, stubborn], responsible="privacy officer (petra)")
    with pytest.raises(ErasureIncomplete, match=r"embeddings; responsible: privacy officer \(petra\)"):
        erasure.execute(ward.subject, identity=VOUCHED)
    assert house.consent.admit_all(ward.records[:1], PURPOSE)[0] == [], "restricted although the erasure failed"
    assert house.log.select(Predicate.ERASED) == []
    stubborn.obeys = True
    erasure.execute(ward.subject, identity=VOUCHED)
    named = {subject for entry in house.log.select(Predicate.ERASED) for subject in entry.subjects}
    assert {"sha256:" + "9" * 64, ward.snapshot.root} <= named, "what the first attempt found is still named"


def test_a_store_that_was_left_out_leaves_shreds_only(ward):
    """The key is destroyed all the same: what lies in a forgotten store opens for nobody."""
    house = ward.house
    build(house, [house.catalog]).execute(ward.subject, identity=VOUCHED)
    with pytest.raises(Forgotten):
        corpus.texts(ward.snapshot, ward.snapshot.units.reveal()[ward.subject], house.keyring)


@pytest.mark.parametrize("state", [s for s in State if not s.reached(State.CERTIFIED)])
@pytest.mark.parametrize("moment", ["before", "after"])
def test_sigkill_in_every_state_is_finished_by_the_next_call(ward, state, moment):
    """A child does the steps and kills itself, before or after the work that leads out of one state."""
    ward.model(MODEL, ward.snapshot.root)
    house, erasure = ward.house, ward.erasure
    house.store.close()
    child = os.fork()
    if child == 0:
        step, identify = erasure._step, erasure._identify

        def dies(subject, at, work):
            if at is state and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            work()
            if at is state:
                os.kill(os.getpid(), signal.SIGKILL)

        erasure._step = lambda subject, at: dies(subject, at, lambda: step(subject, at))
        erasure._identify = lambda subject, identity, **asked: dies(subject, State.RECEIVED, lambda: identify(subject, identity, **asked))
        try:
            erasure.execute(ward.subject, identity=VOUCHED)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    restricted = erasure.state(ward.subject).reached(State.RESTRICTED)
    with house.store.transaction() as tx:
        assert bool(erased(tx, house.keyring, [ward.subject])) is restricted
    certified = state is State.VERIFIED and moment == "after"
    if state is State.RECEIVED and moment == "before":
        assert unfinished(house.store, house.keyring) == [], "nobody was verified"
        with pytest.raises(AccessDenied):
            erasure.execute(ward.subject)
    else:
        assert unfinished(house.store, house.keyring) == ([] if certified else [ward.subject]), "found also when nothing else knows them any more"
    erasure.execute(ward.subject, identity=VOUCHED)
    [first, last, *again] = house.log.select(Predicate.ERASED)
    assert unfinished(house.store, house.keyring) == []
    assert len(again) == 2 * certified, "what was certified already was asked again"
    assert set(first.subjects[1:]) == {ward.snapshot.root, MODEL}
    assert last.subjects == first.subjects[:1]


def test_two_erasures_of_one_subject_at_once_certify_once(ward):
    barrier, done = threading.Barrier(2), []

    def ask():
        barrier.wait()
        done.append(ward.erasure.execute(ward.subject, identity=VOUCHED))

    askers = [threading.Thread(target=ask) for _ in range(2)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert len(done) == 2
    assert len({each.entry for each in done}) == 1
    assert len([e for e in ward.house.log.select(Predicate.ERASED) if len(e.subjects) == 1]) == 1


def test_a_forged_identity_changes_nothing(ward):
    code = ward.erasure.code(ward.subject).reveal()
    with pytest.raises(AccessDenied):
        ward.erasure.execute(ward.subject)
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(AccessDenied):
            ward.erasure.confirm(ward.subject, "AAAAAAAAAAAA")
    with pytest.raises(AccessDenied):
        ward.erasure.confirm(ward.subject, code)
    assert [a.record.subject for a in ward.house.consent.admit_all(ward.records[:1], PURPOSE)[0]] == [ward.subject]
    again = ward.erasure.code(ward.subject).reveal()
    assert again != code
    other = ward.records[2].subject
    ward.erasure.code(other)
    with pytest.raises(AccessDenied):
        ward.erasure.confirm(other, again)
    ward.erasure.confirm(ward.subject, f" {again.lower()} ")
    ward.erasure.execute(ward.subject)


@pytest.mark.parametrize("known", [True, False])
def test_a_request_about_somebody_erased_before_changes_nothing_until_it_is_proved(ward, known):
    """Else whoever can ask for a code could stop the project, and have people erased again, on nobody's word."""
    subject = ward.subject if known else subject_id(ward.house.keyring, unit="patient", value="nobody")
    first = ward.erasure.execute(subject, identity=VOUCHED)
    code = ward.erasure.code(subject).reveal()
    with pytest.raises(AccessDenied):
        ward.erasure.confirm(subject, "AAAAAAAAAAAA")
    assert unfinished(ward.house.store, ward.house.keyring) == []
    assert ward.erasure.state(subject) is State.CERTIFIED
    assert ward.erasure.execute(subject) == first, "what was certified is given again, and nothing more"
    with ward.house.store.transaction() as tx:
        assert erased(tx, ward.house.keyring, [subject]) == {subject}
    ward.erasure.confirm(subject, code)
    assert unfinished(ward.house.store, ward.house.keyring) == [subject]
    assert ward.erasure.execute(subject).entry > first.entry


def test_codes_and_refusals_do_not_tell_who_is_known(ward):
    stranger = subject_id(ward.house.keyring, unit="patient", value="nobody")
    codes = [ward.erasure.code(subject) for subject in (ward.subject, stranger)]
    assert [len(code.reveal()) for code in codes] == [12, 12]
    refusals = []
    for subject in (ward.subject, stranger, subject_id(ward.house.keyring, unit="patient", value="never asked")):
        with pytest.raises(AccessDenied) as caught:
            ward.erasure.confirm(subject, "AAAAAAAAAAAA")
        refusals.append(str(caught.value))
    assert len(set(refusals)) == 1


def test_a_restored_database_brings_nobody_back(ward, tmp_path):
    house = ward.house
    journal = tmp_path / "elsewhere" / "suppressions"
    erasure = build(house, ward.erasure._stores, journal=journal)
    house.store.close()
    shutil.copy(tmp_path / "discreet.db", tmp_path / "backup.db")
    erasure.execute(ward.subject, identity=VOUCHED)
    house.store.close()
    shutil.copy(tmp_path / "backup.db", tmp_path / "discreet.db")
    assert erasure.reapply() == 1
    assert erasure.reapply() == 0
    assert house.consent.admit_all(ward.records[:1], PURPOSE)[0] == []
    assert unfinished(house.store, house.keyring) == [ward.subject]
    erasure.execute(ward.subject, reason=Reason.RESTORED)
    assert unfinished(house.store, house.keyring) == []
    assert house.catalog.holds(ward.subject) == []
    journal.write_text(journal.read_text().replace("0", "1"))
    with pytest.raises(ErasureIncomplete, match="journal"):
        erasure.reapply()


def test_a_restored_database_brings_nobody_back_by_their_other_number(ward, tmp_path):
    house, journal = ward.house, tmp_path / "elsewhere" / "suppressions"
    second, first = "P-9", "P-8"
    house.store.close()
    shutil.copy(tmp_path / "discreet.db", tmp_path / "backup.db")
    alone = house.keyring.pseudonym(second)
    house.keyring.declare_same([(second, first)])
    erasure = build(house, ward.erasure._stores, journal=journal)
    assert house.keyring.pseudonym(second) == house.keyring.pseudonym(first) != alone
    erasure.execute(house.keyring.pseudonym(second), identity=VOUCHED)
    assert erasure.reapply() == 0, "the other number is nobody's alone as long as the database knows whose it is"
    assert unfinished(house.store, house.keyring) == []
    house.store.close()
    shutil.copy(tmp_path / "backup.db", tmp_path / "discreet.db")
    forgetful = copy.copy(house.keyring)
    forgetful._same = {}  # what a keyring of the restored database reads
    assert forgetful.pseudonym(second) == alone
    assert Erasure(house.store, forgetful, house.log, stores=[], models=ward.models, unit="patient", journal=journal).reapply() == 2
    with house.store.transaction() as tx:
        assert erased(tx, forgetful, [alone]) == {alone}


def test_a_clock_set_back_makes_nothing_younger(ward, monkeypatch):
    ward.erasure.execute(ward.subject, identity=VOUCHED)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600)
    with pytest.raises(ClockBackwards):
        ward.erasure.close_due()
    with pytest.raises(ClockBackwards):
        ward.house.catalog.past_retention()
    monkeypatch.setattr(time, "time", lambda: real() + 31 * 86_400)
    assert ward.erasure.close_due() == 1
    assert ward.erasure.state(ward.subject) is State.CLOSED


def test_the_closure_is_computed_twice(ward):
    ward.model(MODEL, ward.snapshot.root)
    ward.model(MERGED, MODEL)
    with ward.house.store.transaction() as tx:
        assert recomputed(tx, [ward.snapshot.root]) == {MODEL, MERGED} == {a.digest for a in lineage.descendants(tx, [ward.snapshot.root])}


def test_a_closure_that_missed_something_is_not_certified(ward, monkeypatch):
    ward.model(MODEL, ward.snapshot.root)
    monkeypatch.setattr(lineage, "descendants", lambda tx, digests: [])
    with pytest.raises(ErasureIncomplete, match="unplanned"):
        ward.erasure.execute(ward.subject, identity=VOUCHED)


def test_a_stranger_gets_the_same_answer_by_the_same_steps(ward):
    stranger = subject_id(ward.house.keyring, unit="patient", value="nobody")
    plans = [ward.erasure.plan(subject) for subject in (ward.subject, stranger)]
    assert str(plans[0]) == str(plans[1])
    assert plans[0].holdings.reveal() == {"consent": 2, "catalog": 2, "corpus": 1}
    assert plans[1].holdings.reveal() == {"consent": 0, "catalog": 0, "corpus": 0}
    known, unknown, twice = (ward.erasure.execute(subject, identity=VOUCHED) for subject in (ward.subject, stranger, ward.subject))
    for certificate in (unknown, twice):
        assert (type(certificate), certificate.stores) == (type(known), known.stores)
        assert certificate.request.startswith("sha256:")
    with pytest.raises(Forgotten):
        ward.house.keyring.subject(stranger)


def test_the_subject_does_not_come_back(ward):
    house = ward.house
    ward.erasure.execute(ward.subject, identity=VOUCHED)
    extra = [{"id": "n9", "patient": "P-1", "text": "Zebediah again."}, {"id": "n10", "patient": "P-5", "text": "New."}]
    project, section = house.notes(extra)
    records = house.catalog.collect(house.catalog.register_again(project, section))
    assert [record.text.reveal() for record in records] == ["New."]


def test_certificates_and_errors_name_nobody(ward):
    certificate = ward.erasure.execute(ward.subject, identity=VOUCHED)
    for text in (repr(certificate), repr(ward.erasure.plan(ward.subject))):
        assert ward.subject not in text
        assert not [record.digest for record in ward.records if record.digest in text]
    assert isinstance(ward.erasure.plan(ward.subject).affected, Sensitive)


class Clock:
    """A clock that moves by sleeping, and by what work is said to take."""

    def __init__(self, monkeypatch):
        self.now = time.time()
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Slow:
    """A store that takes its time over whoever is in."""

    name = "archive"

    def __init__(self, clock, known, seconds):
        self.clock, self.known, self.seconds = clock, known, seconds

    def holds(self, subject):
        return []

    def purge(self, subject):
        self.clock.now += self.seconds if subject == self.known else 0.1

    def absence(self, subject):
        return True


def log_size(ward):
    return int(ward.house.log.checkpoint().split(b"\n")[1])


def asked(ward, erasure, clock, subject, **options):
    """Seconds from the verified identity to the certificate as they are logged and as they pass, and how far the log has grown."""
    began, size = clock.now, log_size(ward)
    certificate = erasure.execute(subject, identity=VOUCHED, **options)
    [entry] = [each for each in ward.house.log.entries(certificate.request) if each.index == certificate.entry]
    passed = round(clock.now - began, 3)
    assert abs(datetime.fromisoformat(entry.time).timestamp() - clock.now) < 1.5, "what the certificate says is when it was given"
    return passed, log_size(ward) - size


def test_the_time_of_an_answer_does_not_tell_who_is_in(ward, clock):
    ward.model(MODEL, ward.snapshot.root)
    stranger = subject_id(ward.house.keyring, unit="patient", value="nobody")
    slow = Slow(clock, ward.subject, 20)
    erasure = build(ward.house, [*ward.erasure._stores, slow], models=ward.models, answer_seconds=60)
    asks = [asked(ward, erasure, clock, subject) for subject in (ward.subject, stranger, ward.subject, stranger)]
    assert asks == [(60.0, 2)] * 4, "nor does how far the log grows, nor asking again"
    at_once = build(ward.house, [*ward.erasure._stores, slow], models=ward.models)
    assert asked(ward, at_once, clock, ward.subject)[0] != asked(ward, at_once, clock, stranger)[0], "without the wait it does"


def test_the_time_of_an_answer_runs_from_the_proof_whatever_came_before(ward, clock, monkeypatch, tmp_path):
    """A timer that had erased them or was killed over them, and a journal that named them, began earlier: none of it shortens the wait, which would tell who was in."""

    def later(subject, erasure, *, seconds):
        clock.now += seconds
        return asked(ward, erasure, clock, subject)[0]

    erasure = build(ward.house, ward.erasure._stores, answer_seconds=300)
    by_code, killed = ward.records[0].subject, ward.records[2].subject
    stranger, restored = (subject_id(ward.house.keyring, unit="patient", value=value) for value in ("nobody", "nobody else"))
    erasure.execute(by_code, identity=VOUCHED, reason=Reason.RETENTION)
    for subject in (by_code, stranger):
        code = erasure.code(subject).reveal()
        clock.now += 200
        erasure.confirm(subject, code)
        began = clock.now
        erasure.execute(subject)
        assert clock.now - began == pytest.approx(300)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(erasure, "_shred", interrupted)
        erasure.execute(killed, identity=VOUCHED, reason=Reason.RETENTION)
    assert later(killed, erasure, seconds=100) == 300

    journal = tmp_path / "suppressions"
    keeping = build(ward.house, ward.erasure._stores, answer_seconds=300, journal=journal)
    ward.house.store.close()
    shutil.copy(tmp_path / "discreet.db", tmp_path / "backup.db")
    keeping.execute(restored, identity=VOUCHED)
    ward.house.store.close()
    shutil.copy(tmp_path / "backup.db", tmp_path / "discreet.db")
    assert keeping.reapply() >= 1
    assert later(restored, keeping, seconds=100) == 300


def interrupted(_):
    raise KeyboardInterrupt


def test_an_erasure_that_takes_too_long_is_answered_at_the_next_multiple_and_timers_do_not_wait(ward, clock):
    slow = Slow(clock, ward.subject, 70)
    erasure = build(ward.house, [*ward.erasure._stores, slow], answer_seconds=60)
    assert asked(ward, erasure, clock, ward.subject)[0] == 120
    other = ward.records[2].subject
    assert asked(ward, erasure, clock, other, reason=Reason.RETENTION)[0] < 1
    clock.now += 1
    assert asked(ward, erasure, clock, other)[0] == 60, "whoever was erased by a timer before is answered like anybody"


def test_a_clock_that_is_set_back_while_an_answer_waits_stops_it_and_loses_nothing(ward, clock, monkeypatch):
    erasure = build(ward.house, ward.erasure._stores, answer_seconds=60)

    def set_back(_):
        clock.now -= 86_400

    with monkeypatch.context() as patched, pytest.raises(ClockBackwards):
        patched.setattr(time, "sleep", set_back)
        erasure.execute(ward.subject, identity=VOUCHED)
    assert erasure.state(ward.subject) is State.VERIFIED
    clock.now += 86_400
    assert asked(ward, erasure, clock, ward.subject)[0] <= 60


def test_whoever_is_killed_while_waiting_is_certified_when_the_time_has_come(ward, clock, monkeypatch):
    def killed(_):
        raise KeyboardInterrupt

    erasure = build(ward.house, ward.erasure._stores, answer_seconds=60)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(time, "sleep", killed)
        erasure.execute(ward.subject, identity=VOUCHED)
    assert erasure.state(ward.subject) is State.VERIFIED
    assert ward.house.consent.admit_all(ward.records[:1], PURPOSE)[0] == []
    clock.now += 75
    assert asked(ward, erasure, clock, ward.subject)[0] == 0
