"""The corpus: one root for one set of documents, sealed by subject, atomic, and shredded by erasure."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import random
import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from discreet import corpus
from discreet.corpus import SnapshotStore, Track
from discreet.errors import DigestMismatch, Forgotten, NotFound, RecordConflict, SealBroken, SourceEmpty, StorageFull, TrackRefused
from discreet.evidence.log import Log
from discreet.evidence.statement import Predicate
from discreet.keys import Key, Keyring
from discreet.record import Deidentified, Digest, Sensitive, Sensitivity, Snapshot
from discreet.store import Store

POLICY = Digest("sha256:" + "ab" * 32)


@dataclass
class House:
    root: Path
    store: Store
    keyring: Keyring
    log: Log

    @property
    def folder(self):
        return self.root / "corpus"

    def document(self, number, subject, text, sensitivity=Sensitivity.SPECIAL, source="notes"):
        return Deidentified(
            digest=Digest("sha256:" + hashlib.sha256(f"{source}/{number}".encode()).hexdigest()),
            source=source,
            subject=self.keyring.pseudonym(f"patient:{subject}"),
            sensitivity=sensitivity,
            text=Sensitive(text),
            policy=POLICY,
            counts={},
        )

    def documents(self, count=30, subjects=7):
        return [self.document(i, i % subjects, f"Zebediah note {i} of {i % subjects}") for i in range(count)]

    def freeze(self, documents, **options):
        parts = {"name": "train", "keyring": self.keyring, "log": self.log, "store": self.store, "folder": self.folder}
        return corpus.freeze(documents, **{**parts, **options})

    def by_digest(self, snapshot: Snapshot):
        found = corpus.digests(snapshot, self.keyring)
        return dict(zip(found, corpus.texts(snapshot, range(len(found)), self.keyring), strict=True))


@pytest.fixture
def house(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/discreet.db")
    keyring = Keyring(store, Key.random())
    yield House(tmp_path, store, keyring, Log(store, keyring, "example.org/ward"))
    store.close()


def test_texts_come_back_by_position_and_unit(house):
    documents = house.documents()
    snapshot = house.freeze(documents)
    assert house.by_digest(snapshot) == {d.digest: d.text.reveal() for d in documents}
    units = snapshot.units.reveal()
    assert snapshot.num_units == len(units) == 7
    assert sorted(p for positions in units.values() for p in positions) == list(range(30))
    owner = {d.digest: d.subject for d in documents}
    at = corpus.digests(snapshot, house.keyring)
    assert all(owner[at[p]] == subject for subject, positions in units.items() for p in positions)
    assert corpus.texts(snapshot, [5, 3, 5], house.keyring) == [documents_text(documents, at[i]) for i in (5, 3, 5)]
    assert corpus.texts(snapshot, [], house.keyring) == []
    assert snapshot.sources == ("notes",)


def documents_text(documents, digest):
    return next(d.text.reveal() for d in documents if d.digest == digest)


def test_more_documents_than_a_shard_holds(house, monkeypatch):
    monkeypatch.setattr(corpus, "DOCUMENTS_PER_SHARD", 8)
    snapshot = house.freeze(house.documents(30))
    assert len(list(snapshot.path.glob("*.shard"))) == 4
    assert len(house.by_digest(snapshot)) == 30


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.randoms(use_true_random=False))
def test_the_root_does_not_depend_on_the_order(house, rng):
    documents = house.documents()
    first = house.freeze(documents)
    rng.shuffle(documents)
    assert house.freeze([*documents, documents[0]]).root == first.root


def test_freezing_again_gives_the_same_snapshot_and_logs_once(house):
    documents = house.documents()
    first = house.freeze(documents)
    files = {path: path.read_bytes() for path in first.path.iterdir()}
    assert house.freeze(documents) == first or house.freeze(documents).root == first.root
    assert {path: path.read_bytes() for path in first.path.iterdir()} == files
    [entry] = house.log.select(Predicate.FROZEN)
    assert entry.subjects == (first.root,)
    assert entry.fields["sensitivity"] == "special"
    assert not Predicate.FROZEN.public, "counts and roots are functions of private data (PITFALLS 41)"


@pytest.mark.parametrize("change", ["text", "policy", "one less", "one more"])
def test_the_root_names_exactly_these_documents(house, change):
    documents = house.documents()
    root = house.freeze(documents).root
    changed = {
        "text": [replace(documents[0], text=Sensitive("other")), *documents[1:]],
        "policy": [replace(documents[0], policy=Digest("sha256:" + "cd" * 32)), *documents[1:]],
        "one less": documents[1:],
        "one more": [*documents, house.document(99, 1, "more")],
    }
    assert house.freeze(changed[change]).root != root


def test_one_subjects_absence_changes_no_byte_of_another(house):
    """PITFALLS 39, on the frozen plaintext itself."""
    documents = house.documents()
    whole = house.by_digest(house.freeze(documents))
    for subject in {d.subject for d in documents}:
        rest = [d for d in documents if d.subject != subject]
        frozen = house.freeze(rest)
        assert house.by_digest(frozen) == {d.digest: whole[d.digest] for d in rest}
        plain = {d.digest: corpus._frozen_bytes(d) for d in documents}
        assert _unsealed(house, frozen) == {d.digest: plain[d.digest] for d in rest}


def _unsealed(house, snapshot):
    """Every frozen document's bytes, opened from the shards without the help of `texts`."""
    key = house.keyring.purpose("shards")
    manifest = json.loads(key.open((snapshot.path / "manifest").read_bytes(), context=b"discreet/corpus/" + snapshot.root.encode()))
    opened = {}
    for digest, _, _, subject, shard, offset, length in manifest["documents"]:
        sealed = (snapshot.path / f"{manifest['shards'][shard]}.shard").read_bytes()[offset : offset + length]
        opened[digest] = house.keyring.subject(subject).open(sealed, context=b"discreet/corpus/" + digest.encode())
    return opened


def test_nothing_readable_lies_on_disk(house):
    snapshot = house.freeze(house.documents())
    content = b"".join(path.read_bytes() for path in snapshot.path.iterdir())
    subjects = [subject.encode() for subject in snapshot.units.reveal()]
    for secret in (b"Zebediah", b"note", b"notes", b"train", *subjects):
        assert secret not in content
    assert all(path.stat().st_mode & 0o077 == 0 for path in [snapshot.path, *snapshot.path.iterdir()])


def test_a_snapshot_opens_by_its_root(house):
    first = house.freeze(house.documents())
    again = corpus.open_snapshot(first.root, keyring=house.keyring, folder=house.folder)
    assert (again.root, again.name, again.sensitivity, again.units.reveal()) == (first.root, first.name, first.sensitivity, first.units.reveal())
    with pytest.raises(NotFound):
        corpus.open_snapshot(Digest("sha256:" + "0" * 64), keyring=house.keyring, folder=house.folder)
    with pytest.raises(NotFound):
        corpus.texts(first, [30], house.keyring)
    with pytest.raises(NotFound):
        corpus.texts(first, [-1], house.keyring)


def test_another_projects_key_opens_nothing(house, tmp_path):
    snapshot = house.freeze(house.documents())
    stranger = Keyring(Store(f"sqlite:///{tmp_path}/other.db"), Key.random())
    with pytest.raises(SealBroken):
        corpus.open_snapshot(snapshot.root, keyring=stranger, folder=house.folder)


def test_every_flipped_byte_is_noticed(house):
    snapshot = house.freeze(house.documents(6, 2))
    rng = random.Random(5)
    for path in snapshot.path.iterdir():
        good = path.read_bytes()
        for position in {0, len(good) - 1, *(rng.randrange(len(good)) for _ in range(40))}:
            path.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
            with pytest.raises((DigestMismatch, SealBroken)):
                house.by_digest(snapshot)
        path.write_bytes(good[:-1])
        with pytest.raises((DigestMismatch, SealBroken)):
            house.by_digest(snapshot)
        path.write_bytes(good)
    assert len(house.by_digest(snapshot)) == 6


def test_a_snapshot_under_another_root_is_refused(house):
    first, second = house.freeze(house.documents()), house.freeze(house.documents(20))
    (second.path / "manifest").write_bytes((first.path / "manifest").read_bytes())
    with pytest.raises(SealBroken):
        corpus.open_snapshot(second.root, keyring=house.keyring, folder=house.folder)


def test_sensitivity_is_the_highest_and_the_public_track_takes_public_only(house):
    public = [house.document(i, f"r{i}", "weather", Sensitivity.PUBLIC, "open") for i in range(3)]
    mixed = [*public, house.document(99, 1, "secret", Sensitivity.INTERNAL)]
    assert house.freeze(public, track=Track.PUBLIC).sensitivity is Sensitivity.PUBLIC
    assert house.freeze(mixed).sensitivity is Sensitivity.INTERNAL
    assert house.freeze([*mixed, *house.documents()]).sensitivity is Sensitivity.SPECIAL
    with pytest.raises(TrackRefused, match="internal"):
        house.freeze(mixed, track=Track.PUBLIC)


def test_empty_and_contradictory_documents_are_refused(house):
    with pytest.raises(SourceEmpty):
        house.freeze([])
    one = house.document(1, 1, "a")
    for other in (
        replace(one, text=Sensitive("b")),
        replace(one, sensitivity=Sensitivity.PUBLIC),
        replace(one, subject=house.keyring.pseudonym("patient:2")),
    ):
        with pytest.raises(RecordConflict):
            house.freeze([one, other])
    house.freeze([one])
    with pytest.raises(RecordConflict, match="train and other"):
        house.freeze([one], name="other")


def test_a_full_disk_leaves_nothing_and_the_next_try_works(house, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        house.freeze(house.documents())
    assert list(house.folder.iterdir()) == []
    monkeypatch.undo()
    assert house.freeze(house.documents()).num_units == 7


def _house_at(root):
    store = Store(f"sqlite:///{root}/discreet.db")
    keyring = Keyring(store, Key(b"k" * 32))
    return House(root, store, keyring, Log(store, keyring, "example.org/ward"))


def _freeze_and_die(root, at):
    """Freezes four shards and is killed at the `at`-th sync of a folder: one a shard, the manifest, the rename."""
    original, calls = corpus.sync_folder, 0

    def sync(path):
        nonlocal calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        original(path)

    corpus.sync_folder = sync
    corpus.DOCUMENTS_PER_SHARD = 8
    house = _house_at(root)
    house.freeze(house.documents())


@pytest.mark.parametrize("at", [2, 5, 6])
def test_killed_at_any_moment_the_next_freeze_finishes(tmp_path, at):
    """SIGKILL among the shards, after the manifest, and after the rename before the log."""
    child = multiprocessing.get_context("fork").Process(target=_freeze_and_die, args=(tmp_path, at))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    house = _house_at(tmp_path)
    snapshot = house.freeze(house.documents())
    assert house.freeze(house.documents()).root == snapshot.root
    assert list((tmp_path / "corpus").iterdir()) == [snapshot.path]
    assert house.by_digest(snapshot) == {d.digest: d.text.reveal() for d in house.documents()}
    assert len(house.log.select(Predicate.FROZEN)) == 1
    house.store.close()


def test_a_forgotten_subject_is_shredded_everywhere(house):
    """Crypto-shredding alone: the sealed bytes remain and nobody opens them."""
    documents = house.documents()
    snapshot = house.freeze(documents)
    subject = documents[0].subject
    mine = snapshot.units.reveal()[subject]
    house.keyring.forget(subject)
    with pytest.raises(Forgotten):
        corpus.texts(snapshot, mine, house.keyring)
    others = [p for s, positions in snapshot.units.reveal().items() if s != subject for p in positions]
    assert len(corpus.texts(snapshot, others, house.keyring)) == len(others)
    with pytest.raises(Forgotten):
        house.freeze(documents)


def test_purging_removes_the_bytes_and_keeps_everything_else(house, monkeypatch):
    monkeypatch.setattr(corpus, "DOCUMENTS_PER_SHARD", 8)
    documents = house.documents()
    snapshot, other = house.freeze(documents), house.freeze(documents[:10], name="small")
    subject = documents[0].subject
    before = house.by_digest(snapshot)
    sealed = _sealed(house, snapshot, subject)
    places = SnapshotStore(house.folder, house.keyring)
    assert sorted(places.holds(subject)) == sorted([snapshot.root, other.root])
    assert not places.absence(subject)
    for _ in range(2):
        places.purge(subject)
        assert places.absence(subject)
    assert places.holds(subject) == []
    content = b"".join(path.read_bytes() for path in snapshot.path.iterdir())
    assert sealed
    assert not [piece for piece in sealed if piece in content]
    again = corpus.open_snapshot(snapshot.root, keyring=house.keyring, folder=house.folder)
    assert set(again.units.reveal()) == set(snapshot.units.reveal()) - {subject}
    at = corpus.digests(again, house.keyring)
    for unit, positions in again.units.reveal().items():
        assert positions == snapshot.units.reveal()[unit], "positions stay"
        assert corpus.texts(again, positions, house.keyring) == [before[at[p]] for p in positions]
    with pytest.raises(Forgotten):
        corpus.texts(again, snapshot.units.reveal()[subject], house.keyring)


def _sealed(house, snapshot, subject):
    key = house.keyring.purpose("shards")
    manifest = json.loads(key.open((snapshot.path / "manifest").read_bytes(), context=b"discreet/corpus/" + snapshot.root.encode()))
    return [
        (snapshot.path / f"{manifest['shards'][shard]}.shard").read_bytes()[offset : offset + length]
        for _, _, _, owner, shard, offset, length in manifest["documents"]
        if owner == subject
    ]


@pytest.mark.parametrize("leftover", ["old.shard", ".partial-x"])
def test_absence_looks_at_the_files(house, leftover):
    documents = house.documents()
    snapshot = house.freeze(documents)
    places = SnapshotStore(house.folder, house.keyring)
    stranger = house.keyring.pseudonym("patient:nobody")
    assert places.absence(stranger)
    if leftover == "old.shard":
        (snapshot.path / leftover).write_bytes(b"copy")
    else:
        (house.folder / leftover).mkdir()
    assert not places.absence(stranger)
    places.purge(stranger)
    assert places.absence(stranger)
