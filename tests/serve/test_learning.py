"""Prompts become training data only for those who opted in, through the one door of all records; the default keeps nothing."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from discreet.config import Project
from discreet.deid.policy import builtin, deidentify
from discreet.errors import ConfigInvalid, OperationFailed
from discreet.evidence.log import Log
from discreet.governance.catalog import Catalog, subject_id
from discreet.governance.consent import Consent
from discreet.keys import Key, Keyring
from discreet.record import Purpose
from discreet.serve import learning
from discreet.serve.learning import Learner, person_of, texts_of
from discreet.store import Store

TEXT = "Patient Aurelia Quistgaard, SSN 536-22-8145, was seen."
SOURCE = {"name": "chats", "path": "chats.jsonl", "unit": "person", "owner": "DPO", "purposes": ["assistant"], "basis": "consent"}


@pytest.fixture
def house(tmp_path):
    store = Store(f"sqlite:///{tmp_path / 'd.db'}")
    keyring = Keyring(store, Key(bytes(32)))
    log = Log(store, keyring, "discreet.test")
    project = project_with(tmp_path)
    yield SimpleNamespace(root=tmp_path, project=project, keyring=keyring, catalog=Catalog(store, keyring, log), consent=Consent(store, keyring, log))
    store.close()


def project_with(root, **changes) -> Project:
    head = {"name": "ward", "controller": "Clinic", "purpose": "assistant"}
    return Project.model_validate({"root": root, "project": head, "source": [{**SOURCE, **changes}], "privacy": {"unit": "patient"}})


def learner(house) -> Learner:
    return Learner(house.project, "chats", keyring=house.keyring, consent=house.consent)


def test_only_who_granted_is_kept_and_goes_the_way_of_every_record(house):
    purpose = Purpose("assistant")
    ann, bob = (subject_id(house.keyring, unit="patient", value=name) for name in ("ann", "bob"))
    kept = learner(house)
    assert not kept.offer("ann", [TEXT])
    house.consent.grant(ann, purpose)
    house.consent.grant(bob, purpose)
    house.consent.withdraw(bob)
    assert kept.offer("ann", [TEXT, "Second."])
    assert [kept.offer(*each) for each in (("bob", [TEXT]), ("eve", [TEXT]), (None, [TEXT]), ("", [TEXT]), ("ann", []))] == [False] * 5
    rows = [json.loads(line) for line in (house.root / "chats.jsonl").read_text().splitlines()]
    assert [(row["person"], row["text"]) for row in rows] == [("ann", f"{TEXT}\n\nSecond.")]
    assert os.stat(house.root / "chats.jsonl").st_mode & 0o077 == 0
    (record,) = house.catalog.collect(house.catalog.register(house.project, house.project.source[0]))
    admitted = house.consent.admit(record, purpose)
    frozen = deidentify(admitted, builtin("label"), house.keyring.subject(ann))
    assert "Quistgaard" not in frozen.text.reveal()
    house.consent.withdraw(ann, purpose)
    assert not kept.offer("ann", [TEXT])
    assert house.consent.admit_all([record], purpose)[0] == []


@pytest.mark.parametrize(
    "changes", [{"format": "csv"}, {"path": "*.jsonl"}, {"path": "s3://b/c.jsonl"}, {"name": "other"}, {"known": {"PERSON": "name"}}]
)
def test_sources_of_another_form_are_refused(house, changes):
    with pytest.raises(ConfigInvalid):
        Learner(project_with(house.root, **changes), "chats", keyring=house.keyring, consent=house.consent)


def test_a_row_that_cannot_be_written_ends_the_request(house, monkeypatch):
    house.consent.grant(subject_id(house.keyring, unit="patient", value="ann"), Purpose("assistant"))
    monkeypatch.setattr(learning.os, "write", lambda *_: (_ for _ in ()).throw(OSError(TEXT)))
    with pytest.raises(OperationFailed) as refused:
        learner(house).offer("ann", [TEXT])
    assert "Quistgaard" not in str(refused.value)


def test_a_row_that_was_half_written_is_taken_back(house, monkeypatch):
    house.consent.grant(subject_id(house.keyring, unit="patient", value="ann"), Purpose("assistant"))
    assert learner(house).offer("ann", [TEXT])
    before, write = (house.root / "chats.jsonl").read_bytes(), learning.os.write
    monkeypatch.setattr(learning.os, "write", lambda file, line: write(file, line[:9]))
    with pytest.raises(OperationFailed):
        learner(house).offer("ann", [TEXT])
    assert (house.root / "chats.jsonl").read_bytes() == before


def test_what_a_request_says_of_its_person_and_what_they_wrote():
    turns = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "no"},
    ]
    assert texts_of({"messages": turns}) == ["a", "b"]
    assert texts_of({"input": turns}) == ["a", "b"]
    assert texts_of({"input": "a"}) == texts_of({"prompt": "a"}) == texts_of({"prompt": ["a"]}) == ["a"]
    assert texts_of({"input": ["vector"]}) == []
    assert person_of({"user": "u"}) == person_of({"metadata": {"user_id": "u"}}) == "u"
    assert person_of({}) is person_of({"user": 7, "metadata": "x"}) is None


def test_an_erased_person_does_not_come_back_by_an_old_grant(house, monkeypatch):
    """What they once said outlives the erasure; nothing of theirs is kept by it."""
    house.consent.grant(subject_id(house.keyring, unit="patient", value="ann"), Purpose("assistant"))
    kept = learner(house)
    assert kept.offer("ann", [TEXT])
    monkeypatch.setattr("discreet.governance.erasure.erased", lambda tx, keyring, subjects: set(subjects))
    assert not kept.offer("ann", [TEXT])


def test_a_last_line_that_was_left_open_stays_a_line_of_its_own(house):
    house.consent.grant(subject_id(house.keyring, unit="patient", value="ann"), Purpose("assistant"))
    (house.root / "chats.jsonl").write_text(json.dumps({"id": "1", "person": "ann", "text": "Without a newline."}))
    assert learner(house).offer("ann", [TEXT])
    assert [json.loads(line)["text"] for line in (house.root / "chats.jsonl").read_text().splitlines()] == ["Without a newline.", TEXT]
