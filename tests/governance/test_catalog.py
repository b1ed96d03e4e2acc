"""The catalog: registration holds, four formats read the same, bad input says where and nothing else, digests commit and stay unlinkable."""

from __future__ import annotations

import csv
import io
import json
import traceback

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from discreet.config import ErasureSection
from discreet.errors import (
    ConfigInvalid,
    DiscreetError,
    NotFound,
    RecordConflict,
    RecordInvalid,
    SourceChanged,
    SourceEmpty,
    SourceMissing,
    SourceNotText,
    TrackRefused,
)
from discreet.evidence.statement import Predicate
from discreet.governance.catalog import SourceFiles, subject_id
from discreet.record import Sensitivity

NOTES = [
    {"id": "n1", "patient": "P-1", "text": "Zebediah came with a cough.", "name": "Zebediah"},
    {"id": "n2", "patient": "P-1", "text": "Zebediah is better.", "name": "Zebediah"},
    {"id": "n3", "patient": "P-2", "text": "Wilhelmina has a fracture.", "name": "Wilhelmina"},
]
SECRETS = ("Zebediah", "Wilhelmina", "P-1", "P-2", "n1")


def _csv(rows):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def _parquet(rows):
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def _collect(house, content=NOTES, **declared):
    project, section = house.notes(content, **declared)
    return house.catalog.collect(house.catalog.register(project, section))


def test_a_record_is_collected_and_logged_once(house):
    project, section = house.notes(known={"PERSON": "name"})
    source = house.catalog.register(project, section)
    first = house.catalog.collect(source)
    assert [record.text.reveal() for record in first] == [note["text"] for note in NOTES]
    assert [record.known.reveal() for record in first] == [{"PERSON": (note["name"],)} for note in NOTES]
    assert {record.sensitivity for record in first} == {Sensitivity.SPECIAL}
    assert first[0].subject == first[1].subject != first[2].subject
    assert first[0].subject == subject_id(house.keyring, unit="patient", value="P-1")
    entries = house.log.select(Predicate.COLLECTED)
    assert [set(entry.subjects) for entry in entries] == [{record.digest for record in first}]
    again = house.catalog.collect(house.catalog.register(project, section))
    assert [record.digest for record in again] == [record.digest for record in first]
    assert len(house.log.select(Predicate.COLLECTED)) == 1


def test_sources_are_listed_as_declared(house):
    assert house.catalog.sources() == []
    _collect(house)
    [source] = house.catalog.sources()
    declared = {"name": "notes", "owner": "Records office", "sensitivity": "special", "purposes": ["note-assistant"], "privacy_unit": "patient"}
    assert {key: source[key] for key in declared} == declared
    assert json.loads(json.dumps(source)) == source


def test_statements_carry_at_most_512_records(house):
    many = [{"id": i, "patient": i, "text": f"note {i}"} for i in range(1100)]
    _collect(house, many)
    assert [len(entry.subjects) for entry in house.log.select(Predicate.COLLECTED)] == [512, 512, 76]


@pytest.mark.parametrize(("form", "write"), [("csv", _csv), ("parquet", _parquet)])
def test_csv_and_parquet_read_as_json_lines_do(house, form, write):
    lines = _collect(house, known={"PERSON": "name"})
    project, section = house.notes(write(NOTES), path=f"notes.{form}", format=form, name=form, known={"PERSON": "name"})
    others = house.catalog.collect(house.catalog.register(project, section))
    assert [(r.subject, r.text.reveal(), r.known.reveal()) for r in others] == [(r.subject, r.text.reveal(), r.known.reveal()) for r in lines]
    assert {r.digest for r in others}.isdisjoint(r.digest for r in lines), "the source is part of what is committed to"


def test_a_folder_of_text_takes_the_folder_as_unit(house):
    for name, content in {"P-1/a.txt": "Zebediah coughs.", "P-1/b.txt": "Better.", "P-2/a.txt": "Fracture.", "P-2/skip.md": "not text"}.items():
        house.write(f"texts/{name}", content)
    section = {"name": "texts", "path": "texts", "format": "text", "owner": "o", "purposes": ["note-assistant"], "basis": "contract"}
    project = house.project(section)
    records = house.catalog.collect(house.catalog.register(project, project.source[0]))
    assert [record.text.reveal() for record in records] == ["Zebediah coughs.", "Better.", "Fracture."]
    assert records[0].subject == records[1].subject == subject_id(house.keyring, unit="patient", value="P-1")
    house.write("texts/loose.txt", "whose?")
    project = house.project({**section, "name": "loose"})
    with pytest.raises(RecordInvalid, match=r"privacy unit.*file 4"):
        house.catalog.collect(house.catalog.register(project, project.source[0]))


def test_a_text_file_behind_a_link_out_of_the_folder_is_refused(house):
    house.write("outside.txt", "elsewhere")
    house.write("texts/P-1/a.txt", "here")
    (house.root / "texts/P-1/b.txt").symlink_to(house.root / "outside.txt")
    project = house.project({"name": "t", "path": "texts", "format": "text", "owner": "o", "purposes": ["p"], "basis": "contract"})
    with pytest.raises(RecordInvalid, match="file 2"):
        house.catalog.register(project, project.source[0])


def test_a_public_record_is_its_own_unit(house):
    records = _collect(house, sensitivity="public", role="public", unit="")
    assert len({record.subject for record in records}) == len(NOTES)
    assert subject_id(house.keyring, unit="patient", value="P-1") not in {record.subject for record in records}


def test_one_patient_has_one_pseudonym_in_every_source(house):
    first = _collect(house)
    project, section = house.notes([{"id": "x", "who": " P-1 ", "text": "other"}], name="letters", path="letters.jsonl", unit="who")
    [other] = house.catalog.collect(house.catalog.register(project, section))
    assert other.subject == first[0].subject


def test_changed_bytes_stop_the_run_until_registered_again(house):
    project, section = house.notes()
    source = house.catalog.register(project, section)
    before = house.catalog.collect(source)
    changed = [*NOTES[1:], {"id": "n1", "patient": "P-1", "text": "Corrected."}]
    house.write("notes.jsonl", changed)
    with pytest.raises(SourceChanged, match="notes"):
        house.catalog.collect(source)
    with pytest.raises(SourceChanged, match="--again"):
        house.catalog.register(project, section)
    after = house.catalog.collect(house.catalog.register_again(project, section))
    assert {r.digest for r in after} & {r.digest for r in before} == {r.digest for r in before[1:]}
    [superseded] = [digest for digest, _ in house.consent.revoked([r.digest for r in before], project.purpose)]
    assert superseded == before[0].digest


def test_a_source_that_disappeared_stops_the_run(house):
    project, section = house.notes()
    source = house.catalog.register(project, section)
    (house.root / "notes.jsonl").unlink()
    for step in (lambda: house.catalog.register(project, section), lambda: house.catalog.collect(source)):
        with pytest.raises(SourceMissing, match="notes"):
            step()


def test_a_changed_declaration_names_its_keys(house):
    house.catalog.register(*house.notes())
    with pytest.raises(SourceChanged, match="declaration of basis, purposes"):
        house.catalog.register(*house.notes(basis="contract", purposes=["note-assistant", "research"]))
    house.catalog.register(*house.notes(opt_outs="optouts.txt"))  # the list may appear and change at any time


@pytest.mark.parametrize("again", [False, True])
def test_sensitivity_never_sinks(house, again):
    house.catalog.register(*house.notes())
    public = house.notes(sensitivity="public", role="public")
    if again:
        with pytest.raises(TrackRefused):
            house.catalog.register_again(*public)
    else:
        with pytest.raises(SourceChanged):
            house.catalog.register(*public)


def test_the_same_bytes_do_not_get_a_second_name(house):
    house.catalog.register(*house.notes())
    with pytest.raises(RecordConflict, match="notes and copy"):
        house.catalog.register(*house.notes(name="copy", path="copy.jsonl"))
    with pytest.raises(RecordConflict, match="notes and copy"):
        house.catalog.register(*house.notes(name="copy", path="copy.jsonl", sensitivity="public", role="public"))
    project, section = house.notes([*NOTES, {"id": "n4", "patient": "P-3", "text": "new"}])
    house.catalog.register_again(project, section)
    with pytest.raises(RecordConflict):
        house.catalog.register(*house.notes(name="copy", path="copy.jsonl"))


def test_registering_again_needs_a_registration(house):
    with pytest.raises(NotFound):
        house.catalog.register_again(*house.notes())


BAD_LINES = {
    "broken": (b'{"id": "n1", "patient": "P-1", "text": "Zebediah', RecordInvalid, "line 2"),
    "not an object": (b'["Zebediah"]', RecordInvalid, "line 2"),
    "deep": (b"[" * 100_000, RecordInvalid, "line 2"),
    "no text": (b'{"id": "n1", "patient": "P-1"}', RecordInvalid, "text.*line 2"),
    "empty text": (b'{"id": "n1", "patient": "P-1", "text": "  "}', RecordInvalid, "text.*line 2"),
    "text is a number": (b'{"id": "n1", "patient": "P-1", "text": 5}', RecordInvalid, "text.*line 2"),
    "no unit": (b'{"id": "n1", "text": "Zebediah"}', RecordInvalid, "privacy unit.*line 2"),
    "null unit": (b'{"id": "n1", "patient": null, "text": "Zebediah"}', RecordInvalid, "privacy unit.*line 2"),
    "unit is a float": (b'{"id": "n1", "patient": 1.0, "text": "Zebediah"}', RecordInvalid, "privacy unit.*line 2"),
    "unit is a boolean": (b'{"id": "n1", "patient": true, "text": "Zebediah"}', RecordInvalid, "privacy unit.*line 2"),
    "no id": (b'{"patient": "P-1", "text": "Zebediah"}', RecordInvalid, "an id.*line 2"),
    "duplicate key": (b'{"id": "n1", "patient": "P-1", "patient": "P-2", "text": "Zebediah"}', RecordInvalid, "once.*line 2"),
    "lone surrogate": (b'{"id": "n1", "patient": "P-1", "text": "Zebediah \\ud800"}', RecordInvalid, "surrogates.*line 2"),
    "escaped NUL": (b'{"id": "n1", "patient": "P-1", "text": "Zebediah \\u0000"}', RecordInvalid, "NUL.*line 2"),
    "huge number": (b'{"id": ' + b"9" * 5000 + b', "patient": "P-1", "text": "Zebediah"}', RecordInvalid, "line 2"),
    "bad known": (b'{"id": "n1", "patient": "P-1", "text": "t", "name": {"first": "Zebediah"}}', RecordInvalid, "known.*line 2"),
    "invalid UTF-8": (b'{"id": "n1", "patient": "P-1", "text": "Zebediah \xff"}', SourceNotText, "UTF-8.*line 2"),
    "binary": (b"Zebediah\x00\x01", SourceNotText, "NUL byte, line 2"),
    "conflict": (b'{"id": "n0", "patient": "P-1", "text": "Zebediah"}', RecordConflict, "line 1 and line 2"),
    "conflict of units": (b'{"id": "n0", "patient": "P-2", "text": "fine"}', RecordConflict, "line 1 and line 2"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_json_lines_say_where_and_never_what(house, case):
    line, error, where = BAD_LINES[case]
    good = b'{"id": "n0", "patient": "P-9", "text": "fine"}\n'
    with pytest.raises(error, match=where) as caught:
        _collect(house, good + line + b"\n", known={"PERSON": "name"})
    _assert_silent(caught.value)


def _assert_silent(error):
    """No secret in the message, nor in any exception that a traceback or a debugger would reach from it."""
    assert isinstance(error, DiscreetError)
    seen = []
    while error is not None:
        seen += [str(error), repr(error.args), repr(vars(error)), *(str(getattr(error, name, "")) for name in ("doc", "object"))]
        error = error.__cause__ or error.__context__
    seen.append("".join(traceback.format_exception(error)))
    assert not [secret for secret in SECRETS for text in seen if secret in text]


def test_identical_duplicates_are_one_record(house):
    assert len(_collect(house, [*NOTES, NOTES[0]])) == len(NOTES)


@pytest.mark.parametrize("content", [b"", b"\n\n  \n", b"\xef\xbb\xbf\n"])
def test_an_empty_source_is_refused(house, content):
    with pytest.raises(SourceEmpty, match="notes"):
        _collect(house, content)


def test_windows_line_ends_and_a_byte_order_mark_are_read(house):
    content = b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(note).encode() for note in NOTES)
    assert len(_collect(house, content)) == 3


BAD_CSV = {
    "ragged": (b"id,patient,text\nn1,P-1\n", "line 2"),
    "missing column": (b"id,text\nn1,Zebediah\n", "column 'patient'"),
    "twice the column": (b"id,patient,text,text\nn1,P-1,a,b\n", "distinct.*line 1"),
    "open quote": (b'id,patient,text\nn1,P-1,"Zebediah\n', "CSV"),
    "no text": (b'id,patient,text\n"n1","P-1",""\n', "text.*line 2"),
}


@pytest.mark.parametrize("case", BAD_CSV)
def test_bad_csv_says_where(house, case):
    content, where = BAD_CSV[case]
    with pytest.raises(RecordInvalid, match=where) as caught:
        _collect(house, content, format="csv", path="notes.csv")
    _assert_silent(caught.value)


def test_a_quoted_line_break_stays_in_the_text(house):
    [record] = _collect(house, b'id,patient,text\r\nn1,P-1,"first\r\nsecond"\r\n', format="csv", path="notes.csv")
    assert record.text.reveal() == "first\r\nsecond"


@pytest.mark.parametrize("content", [b"PAR1 this is not Parquet PAR1", b"id,text\n"])
def test_a_broken_parquet_file_is_refused(house, content):
    with pytest.raises(SourceNotText, match="Parquet"):
        _collect(house, content, format="parquet", path="notes.parquet")


def test_parquet_says_which_row(house):
    with pytest.raises(RecordInvalid, match=r"privacy unit.*row 2"):
        _collect(house, _parquet([NOTES[0], {**NOTES[1], "patient": None}]), format="parquet", path="notes.parquet")


def test_digests_commit_to_the_text_and_need_the_subjects_key(house):
    project, section = house.notes()
    source = house.catalog.register(project, section)
    [first, *_] = house.catalog.collect(source)
    import hashlib

    content = json.dumps(["notes", "n1", NOTES[0]["text"]], ensure_ascii=False, separators=(",", ":")).encode()
    assert first.digest != "sha256:" + hashlib.sha256(content).hexdigest()
    salt = house.keyring.subject(first.subject).stream("record").bytes(32)
    assert first.digest == "sha256:" + hashlib.sha256(salt + content).hexdigest()


def test_no_text_reaches_the_database(house):
    _collect(house, known={"PERSON": "name"})
    with house.store.engine.connect() as connection:
        connection.exec_driver_sql("COMMIT")
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    content = b"".join(path.read_bytes() for path in house.root.glob("discreet.db*"))
    assert b"notes" in content
    for secret in (b"Zebediah", b"Wilhelmina", b"P-1", b"cough"):
        assert secret not in content


def test_a_glob_and_a_query_are_sources_too(house):
    import sqlite3

    from discreet.errors import ErasureIncomplete

    for number, name in enumerate(("a.jsonl", "b.jsonl")):
        house.write(f"parts/{name}", [{"id": f"n{number}", "patient": f"P-{number}", "text": "A cough."}])
    base = {"owner": "Records office", "purposes": ["note-assistant"], "basis": "public_task", "unit": "patient"}
    with sqlite3.connect(house.root / "ward.db") as connection:
        connection.execute("CREATE TABLE notes (id, patient, text)")
        connection.execute("INSERT INTO notes VALUES ('q1', 'P-0', 'A fracture.')")
    connection.close()
    query = {"name": "table", "path": "sqlite:///ward.db", "query": "SELECT * FROM notes ORDER BY id", **base}
    project = house.project({"name": "parts", "path": "parts/*.jsonl", **base}, query)
    records = [record for section in project.source for record in house.catalog.collect(house.catalog.register(project, section))]
    assert sorted(record.text.reveal() for record in records) == ["A cough.", "A cough.", "A fracture."]
    assert records[0].subject == records[2].subject, "one person in two populations"
    files = SourceFiles(project, house.keyring, house.store)
    for subject in (records[0].subject, records[1].subject):
        with pytest.raises(ErasureIncomplete, match="Records office"):
            files.purge(subject)  # a database is its owner's: the same answer for everybody
        assert not any(files._has(source, subject) for source in files._local()), "what can be rewritten from here was, before it failed"
    left = SourceFiles(project.model_copy(update={"erasure": ErasureSection(retain=("table",))}), house.keyring, house.store)
    left.purge(records[0].subject)
    assert (left.absence(records[0].subject), left.name) == (True, "sources but for table (left to Records office)"), "the certificate says so"
    with pytest.raises(ValueError, match="retain"):
        project.model_validate(project.model_dump() | {"erasure": {"retain": ["tabel"]}})


def test_objects_of_a_store_are_read_and_only_their_owner_can_purge_them(house):
    """Through fsspec, in memory: one object, and a pattern; a changed object stops the run; an erasure names the owner, for a known and an unknown person alike."""
    fsspec = pytest.importorskip("fsspec")
    from discreet.errors import ErasureIncomplete

    memory = fsspec.filesystem("memory")
    lines = ["".join(json.dumps(line) + "\n" for line in part).encode() for part in (NOTES[:2], NOTES[2:])]
    for number, content in enumerate(lines):
        memory.pipe(f"/ward/part-{number}.jsonl", content)
    base = {"unit": "patient", "owner": "Cloud team", "purposes": ["note-assistant"], "basis": "public_task"}
    project = house.project({"name": "whole", "path": "memory://ward/part-*.jsonl", **base})
    source = house.catalog.register(project, project.source[0])
    assert sorted(record.text.reveal() for record in house.catalog.collect(source)) == sorted(row["text"] for row in NOTES)
    for who in ("P-1", "nobody"):
        with pytest.raises(ErasureIncomplete, match="Cloud team"):
            SourceFiles(project, house.keyring, house.store).purge(subject_id(house.keyring, unit="patient", value=who))
    memory.pipe("/ward/part-1.jsonl", lines[0])
    with pytest.raises(SourceChanged):
        house.catalog.register(project, project.source[0])
    gone = house.project({"name": "gone", "path": "memory://ward/nothing.jsonl", **base}).source[0]
    unknown = house.project({"name": "unknown", "path": "nosuch://secret-bucket/nothing.jsonl", **base}).source[0]
    with pytest.raises(SourceMissing):
        house.catalog.register(project, gone)
    with pytest.raises(ConfigInvalid) as caught:
        house.catalog.register(project, unknown)
    assert "secret-bucket" not in str(caught.value)


def test_a_query_that_fails_says_neither_address_nor_rows(house):
    base = {"unit": "patient", "owner": "Records office", "purposes": ["note-assistant"], "basis": "public_task", "query": "SELECT * FROM notes"}
    for path in ("sqlite:///nowhere.db", "postgresql+psycopg://user:hunter2@127.0.0.1:1/x", "nosuch://hunter2", "env:DISCREET_NO_SUCH_VARIABLE"):
        project = house.project({"name": "table", "path": path, **base})
        with pytest.raises(SourceMissing) as caught:
            house.catalog.register(project, project.source[0])
        assert "hunter2" not in f"{caught.value} {caught.value.__cause__} {caught.value.__context__}"


def test_who_is_past_retention_in_every_source_is_due_and_nobody_else(house, monkeypatch):
    """P-1 is in a source kept for ten days and one kept for a hundred, P-2 only in the first: after eleven days P-2 is due, after a hundred and one P-1 too."""
    import time

    short, long = house.notes(retention_days=10), house.notes(NOTES[:1], name="letters", path="letters.jsonl", retention_days=100)
    for project, section in (short, long):
        house.catalog.collect(house.catalog.register(project, section))
    first, second = (subject_id(house.keyring, unit="patient", value=who) for who in ("P-1", "P-2"))
    real = time.time
    for days, due in ((9, []), (11, [second]), (101, sorted([first, second]))):
        monkeypatch.setattr(time, "time", lambda days=days: real() + days * 86_400)
        assert house.catalog.past_retention() == due, days


MORE = {"id": "n4", "patient": "P-3", "text": "Xanthippe came later.", "name": "Xanthippe"}


def test_a_source_that_grew_is_rewritten_without_the_erased(house):
    """Rows that nobody registered go too; the registration stays what it was, and the source is still refused as changed."""
    project, section = house.notes()
    house.catalog.register(project, section)
    house.write("notes.jsonl", [*NOTES, {**MORE, "patient": "P-1", "id": "n5"}, MORE])
    files = SourceFiles(project, house.keyring, house.store)
    first, third = (subject_id(house.keyring, unit="patient", value=who) for who in ("P-1", "P-3"))
    for subject in (first, third):
        assert not files.absence(subject)
        files.purge(subject)
        assert files.absence(subject)
    assert [json.loads(line) for line in (house.root / "notes.jsonl").read_text().splitlines()] == [NOTES[2]]
    with pytest.raises(SourceChanged):
        house.catalog.register(project, section)
    assert house.catalog.collect(house.catalog.register_again(project, section))


def test_retention_of_a_row_runs_from_when_it_was_first_seen(house, monkeypatch):
    """Not from when somebody registers the source again; a sighted row is logged, exported and admitted by nobody before that."""
    import time

    project, section = house.notes(retention_days=10)
    house.catalog.collect(house.catalog.register(project, section))
    began = time.time()
    third = subject_id(house.keyring, unit="patient", value="P-3")
    monkeypatch.setattr(time, "time", lambda: began + 5 * 86_400)
    house.write("notes.jsonl", [*NOTES, MORE, {**MORE, "id": "n6", "patient": "P-4"}])
    logged = len(house.log.select(Predicate.COLLECTED))
    house.catalog.sight(house.catalog.present(project, section))
    assert house.catalog.holds(third) == []
    assert len(house.log.select(Predicate.COLLECTED)) == logged
    monkeypatch.setattr(time, "time", lambda: began + 12 * 86_400)
    house.write("notes.jsonl", [*NOTES, MORE])
    house.catalog.sight(house.catalog.present(project, section))
    assert house.catalog.absence(subject_id(house.keyring, unit="patient", value="P-4")), "its owner took it out again"
    assert third not in house.catalog.past_retention()
    records = house.catalog.collect(house.catalog.register_again(project, section))
    assert [entry.subjects for entry in house.log.select(Predicate.COLLECTED)][logged:] == [(records[3].digest,)]
    assert list(house.catalog.holds(third)) == [records[3].digest]
    monkeypatch.setattr(time, "time", lambda: began + 16 * 86_400)
    assert third in house.catalog.past_retention()
    house.catalog.purge(third)
    assert house.catalog.absence(third)


def test_retention_reaches_a_source_that_nobody_registered(house, monkeypatch):
    import time

    project, section = house.notes(retention_days=10)
    house.catalog.sight(house.catalog.present(project, section))
    assert house.catalog.past_retention(project.source) == []
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 11 * 86_400)
    assert len(house.catalog.past_retention(project.source)) == 2
