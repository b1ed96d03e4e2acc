"""PITFALLS 39 over the whole of ingest: remove one subject, and every other subject's frozen bytes are identical."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from discreet import corpus, pipeline
from discreet.keys import Key, Keyring
from discreet.pipeline import admission, story
from discreet.record import SubjectId

PEOPLE = {
    "p1": ("Kelly Fuller", "212-555-0147", "Kelly Fuller, a 45-year-old mayor from Vermont, came on 2024-03-05."),
    "p2": ("Kelly Fuller", "212-555-0148", "Ms. Fuller wrote from kelly@mail.example.org; her brother José García called on 5 March 2024."),
    "p3": ("Ann Reed", "212-555-0147", "Dr. Reed saw Kelly Fuller at Howell Memorial Hospital, 12 Maple Street."),
    "p4": ("Zyra Quorndike", "212-555-0199", "Zyra has the number of Ann Reed, 212-555-0147."),
}
TOML = """
[project]
name = "ward"
controller = "c"
purpose = "note-assistant"
[[source]]
name = "notes"
path = "notes.jsonl"
unit = "patient"
owner = "o"
purposes = ["note-assistant"]
basis = "consent"
[source.known]
PERSON = "name"
PHONE = "phone"
[[source]]
name = "held-out"
path = "held.jsonl"
owner = "us"
sensitivity = "public"
purposes = ["note-assistant"]
basis = "generated"
role = "evaluation"
[privacy]
population = 60
[audit]
canaries = 20
"""


def frozen(folder: Path, people: list[str], deid: str) -> dict[SubjectId, list[str]]:
    """Ingests a fresh project of these people; returns every subject's frozen documents."""
    folder.mkdir()
    rows = [
        {"id": f"{who}-{n}", "patient": who, "name": PEOPLE[who][0], "phone": PEOPLE[who][1], "text": f"{n}: {PEOPLE[who][2]} Call {PEOPLE[who][1]}."}
        for who in people
        for n in range(3)
    ]
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "held.jsonl").write_text('{"id": "1", "text": "The patient was seen for a cough."}\n')
    (folder / "discreet.toml").write_text(TOML + deid)
    found: dict[SubjectId, list[str]] = {}
    with pipeline.open_house(folder) as house:
        snapshot = pipeline.ingest(house, pipeline.Silent()).snapshot
        wanted = {pipeline.subject_of(house, who) for who in people}
        for subject, positions in snapshot.units.reveal().items():
            if subject in wanted:
                found[subject] = corpus.texts(snapshot, positions, house.keyring)
    return {subject: sorted(texts) for subject, texts in found.items()}


@pytest.fixture(autouse=True)
def same_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """The keys of a subject are the third argument of the function that is tested: here they are the same in every project."""
    original = Keyring._load

    def fixed(self: Keyring, tx: object, kind: str, name: str) -> Key:
        found = original(self, tx, kind, name)
        return Key(bytes(32)).derive(name) if kind == "subject" else found

    monkeypatch.setattr(Keyring, "_load", fixed)
    monkeypatch.setattr(story, "open_master", lambda _: Key(bytes(32)))


@pytest.mark.parametrize(
    "deid", ["", "[deid]\npolicy = 'label'\nk = 100\n[deid.operators.training.special]\nDATE = 'generalise'\n"], ids=["surrogate", "label with k"]
)
def test_removing_one_subject_leaves_every_other_byte(tmp_path: Path, deid: str) -> None:
    everybody = frozen(tmp_path / "all", list(PEOPLE), deid)
    assert len(everybody) == len(PEOPLE)
    assert all(len(texts) == 3 for texts in everybody.values())
    assert "Fuller" not in json.dumps(list(everybody.values()))
    for absent in ("p1", "p3"):
        rest = frozen(tmp_path / absent, [who for who in reversed(PEOPLE) if who != absent], deid)
        assert len(rest) == len(PEOPLE) - 1
        assert rest == {subject: everybody[subject] for subject in rest}


def test_the_test_sees_one_subject_that_depends_on_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: a table of all texts so far is looked at."""
    original, seen = admission.deid.deidentify_all, []

    def looking(admitted, policy, key):
        told = str(any("Kelly" in text for text in seen))
        seen.extend(each.record.text.reveal() for each in admitted)
        return original(admitted, policy, key.derive("seen", told))

    monkeypatch.setattr(admission.deid, "deidentify_all", looking)
    everybody = frozen(tmp_path / "all", ["p1", "p4"], "")
    seen.clear()
    alone = frozen(tmp_path / "p4", ["p4"], "")
    assert alone != {subject: everybody[subject] for subject in alone}
