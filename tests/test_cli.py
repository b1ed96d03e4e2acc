"""The command line as its users meet it: exit codes, one JSON document on stdout, errors with rule, value and remedy, never a traceback, never a text."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from discreet import cli, demo

Run = Callable[..., tuple[int, str, str]]
SECRET = "Zebulon Quimby"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command in this process; returns exit code, stdout and stderr."""

    def call(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["discreet", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def document(name: str, out: str) -> dict[str, Any]:
    """The JSON on stdout, checked against its schema."""
    value = json.loads(out)
    schema = json.loads((resources.files("discreet") / "schemas" / f"{name}.json").read_text())
    Draft202012Validator(schema).validate(value)
    return dict(value)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a little data of its own."""
    rows = [{"id": str(i), "patient": f"p{i}", "name": SECRET, "text": f"{SECRET} came in with a cough for {i} days."} for i in range(30)]
    return write_project(tmp_path / "ward", "".join(json.dumps(row) + "\n" for row in rows).encode())


def write_project(folder: Path, notes: bytes, **changes: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "notes.jsonl").write_bytes(notes)
    (folder / "held.jsonl").write_text('{"id": "1", "text": "The patient was seen for a cough."}\n')
    toml = """
[project]
name = "ward"
controller = "General Hospital"
purpose = "note-assistant"
[[source]]
name = "notes"
path = "notes.jsonl"
unit = "patient"
owner = "records office"
purposes = ["note-assistant"]
basis = "consent"
[source.known]
PERSON = "name"
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
expected_batch = 8
steps = 2
[audit]
canaries = 20
[erasure]
answer_seconds = 0.3
"""
    for old, new in changes.items():
        toml = toml.replace(old.replace("_", " "), new) if old.replace("_", " ") in toml else toml + new
    (folder / "discreet.toml").write_text(toml)
    return folder


def test_a_checkpoint_that_was_kept_and_cosigned_is_held_against_the_log(run: Run, project: Path, tmp_path: Path):
    """A stranger keeps a cosigned checkpoint, and shows it at every later export: of another log, of fewer entries, or without the witness it is no proof."""
    where = ("-C", str(project), "--json")
    assert run("budget", "open", "b", "--epsilon", "1", "--delta", "1e-6", *where)[0] == 0
    first = document("evidence-export", run("evidence", "export", "--public", "--out", str(tmp_path / "first"), *where)[1])
    state, names = str(tmp_path / "state"), ("--name", "witness.example")
    code, out, err = run("evidence", "witness", first["bundle"], "--key", first["key"], *names, "--state", state, "--json")
    assert code == 0, err
    signed = document("evidence-witness", out)
    kept, who, other = tmp_path / "kept", tmp_path / "who", tmp_path / "other"
    kept.write_text(signed["checkpoint"])
    who.write_text(signed["key"] + "\n")
    other.write_text(signed["key"].replace("witness.example", "somebody.example"))
    assert run("budget", "open", "c", "--epsilon", "1", "--delta", "1e-6", *where)[0] == 0
    alone = document("evidence-export", run("evidence", "export", "--log-only", "--out", str(tmp_path / "alone"), *where)[1])
    assert not (tmp_path / "alone" / "dossier.json").exists()

    def verify(bundle: str, *more: str) -> tuple[int, dict]:
        code, out, _ = run("evidence", "verify", bundle, "--key", alone["key"], *more, "--json")
        return code, document("evidence-verify", out) if code in (0, 4) else {}

    for bundle in (first["bundle"], alone["bundle"]):
        assert verify(bundle, "--pinned", str(kept), "--witnesses", str(who))[0] == 0
    newer = tmp_path / "newer"
    newer.write_text(alone["checkpoint"])
    code, said = verify(first["bundle"], "--pinned", str(newer))
    assert (code, "rollback" in said["failed"][0]) == (4, True)
    assert verify(alone["bundle"], "--pinned", str(newer), "--witnesses", str(who))[0] == 4, "no witness signed it"
    assert verify(alone["bundle"], "--pinned", str(kept), "--witnesses", str(other))[0] == 4
    assert verify(alone["bundle"], "--witnesses", str(who))[0] == 2
    with kept.open("r+b") as file:
        file.truncate(2 << 30)
    assert verify(alone["bundle"], "--pinned", str(kept))[0] == 4, "its size is looked at first"


def test_two_identifiers_of_one_person_are_one_before_they_are_collected(run: Run, project: Path, tmp_path: Path):
    """One pseudonym, so one budget and one consent; one erasure takes the rows of both, and neither number comes back. Afterwards it is too late to say so."""
    where, pairs = ("-C", str(project), "--json"), tmp_path / "pairs.csv"

    def declare(second: str, first: str) -> tuple[int, str]:
        pairs.write_text(f"subject,same_as\n{second},{first}\n")
        code, out, err = run("consent", "same-person", str(pairs), *where)
        return code, f"{document('consent-same-person', out)['declared']}" if code == 0 else err

    assert declare("p4", "p3") == (0, "1")
    assert declare("p4", "p3") == (0, "0"), "said before"
    assert declare("p5", "p4") == (0, "1"), "a third one, by way of the second"
    for second, first in (("p3", "p6"), ("p4", "p6"), ("p7", "p7")):
        code, err = declare(second, first)
        assert (code, "pair 1" in err, "p6" in err) == (2, True, False), (second, first)
    assert run("consent", "withdraw", "p9", *where)[0] == 0
    assert declare("p9", "p8")[0] == 2, "p9 has spoken"
    assert run("run", "ingest", *where)[0] == 0
    assert declare("p11", "p10")[0] == 2, "p11 was collected"
    held = [document("access-export", run("access", "export", name, *where)[1]) for name in ("p3", "p4", "p5")]
    assert held[0] == held[1] == held[2]
    assert len(held[0]["sources"][0]["records"]) == 3
    database = b"".join(path.read_bytes() for path in (project / ".discreet").glob("discreet.db*"))
    assert b'"p4"' not in database
    assert run("erase", "p4", *where)[0] == 0
    left = {json.loads(line)["patient"] for line in (project / "notes.jsonl").read_text().splitlines()}
    assert left & {"p2", "p3", "p4", "p5", "p6"} == {"p2", "p6"}
    assert declare("p12", "p3")[0] == 2
    assert run("consent", "history", "p5", *where)[0] == 0


def test_ingest_trace_and_erase(run: Run, project: Path):
    code, out, err = run("run", "ingest", "-C", str(project), "--json")
    assert code == 0, err
    document("run", out)
    code, out, _ = run("evidence", "export", "--out", str(project / "ev"), "-C", str(project), "--json")
    assert code == 0
    exported = document("evidence-export", out)
    code, out, _ = run("evidence", "verify", exported["bundle"], "--key", exported["key"], "--json")
    assert code == 0
    assert document("evidence-verify", out)["valid"]
    for name in ("log/entries.jsonl", "dossier.json"):
        file = project / "ev" / name
        kept = file.read_bytes()
        file.write_bytes(kept.replace(b"a", b"b", 1))
        code, out, _ = run("evidence", "verify", exported["bundle"], "--key", exported["key"], "--json")
        assert code == 4, name
        assert document("evidence-verify", out)["failed"], name
        file.write_bytes(kept)
    code, out, _ = run("catalog", "list", "-C", str(project), "--json")
    assert code == 0
    assert {source["name"] for source in document("catalog", out)["sources"]} == {"notes", "held-out", "audit-canaries-20-v2"}
    code, out, _ = run("consent", "withdraw", "p3", "-C", str(project), "--json")
    assert code == 0
    document("consent", out)
    code, out, err = run("erase", "p4", "-C", str(project), "--json")
    assert code == 0, err
    document("erase", out)
    assert "multiple of 0.3 s" in err
    code, out, _ = run("erase", "p5", "-C", str(project))
    assert "stores: open runs, sources, consent, catalog, corpus, checkpoints, unfinished weights" in " ".join(out.split())
    code, out, _ = run("trace", "sha256:" + "0" * 64, "-C", str(project), "--json")
    assert code == 2
    assert SECRET not in out + err


def test_classify_proposes_and_keeps_nothing(run: Run, project: Path):
    code, out, err = run("catalog", "classify", "notes", "-C", str(project), "--json")
    assert code == 0, err
    found = document("catalog-classify", out)
    assert (found["declared"], found["proposed"], found["exceeds"], found["sampled"]) == ("special", "personal", False, 30)
    assert found["shares"]["PERSON"] == 1.0
    with closing(sqlite3.connect(project / ".discreet" / "discreet.db")) as database:
        assert database.execute("SELECT count(*) FROM wrapped_keys WHERE kind = 'subject'").fetchone() == (0,)
        assert database.execute("SELECT count(*) FROM records").fetchone() == (0,)
    code, said, err = run("catalog", "classify", "notes", "-C", str(project))
    assert code == 0
    assert "proposed personal from 30 records" in said
    code, out, _ = run("catalog", "classify", "nothing", "-C", str(project), "--json")
    assert code == 2
    assert document("error", out)["error"]["code"] == "not_found"
    assert SECRET not in said + err + out + json.dumps(found)


def test_words_of_many_people_are_imported_whole_or_not_at_all(run: Run, project: Path):
    words = project / "words.csv"
    words.write_text("subject,purpose,basis\np1,note-assistant,consent\np1,*,\np2,note-assistant,contract\n")
    code, out, err = run("consent", "import", str(words), "-C", str(project), "--json")
    assert code == 0, err
    assert document("consent-import", out)["changed"] == 3
    for who, said in (("p1", ["granted", "withdrawn"]), ("p2", ["granted"]), ("p3", [])):
        code, out, _ = run("consent", "history", who, "-C", str(project), "--json")
        assert [word["state"] for word in document("consent-history", out)["history"]] == said
    code, out, _ = run("consent", "grant", "p1", "-C", str(project), "--json")
    assert (code, document("consent", out)["state"]) == (0, "granted")
    for wrong in ("p4,note-assistant,consent\np5,note-assistant,whim\n", "p4,,consent\n", ",*,\n"):
        words.write_text("subject,purpose,basis\n" + wrong)
        code, out, _ = run("consent", "import", str(words), "-C", str(project), "--json")
        assert code == 2
        assert document("error", out)["error"]["value"].startswith("line ")
        assert document("consent-history", run("consent", "history", "p4", "-C", str(project), "--json")[1])["history"] == []
    assert run("consent", "import", "nowhere.csv", "-C", str(project), "--json")[0] == 2


def test_budget_is_a_budget(run: Run, project: Path):
    opened = run("budget", "open", "queries", "--epsilon", "1", "--delta", "1e-6", "-C", str(project), "--json")
    assert opened[0] == 0
    document("budget-open", opened[1])
    code, out, _ = run("budget", "reserve", "queries", "--epsilon", "0.6", "-C", str(project), "--json")
    assert code == 0
    assert document("budget-reserve", out)["remaining"] == pytest.approx(0.4)
    code, out, _ = run("budget", "reserve", "queries", "--epsilon", "0.6", "-C", str(project), "--json")
    assert code == 3
    assert document("error", out)["error"]["code"] == "budget.exhausted"
    for bad in ("0", "-1", "nan", "inf"):
        assert run("budget", "reserve", "queries", "--epsilon", bad, "-C", str(project), "--json")[0] == 2
    code, out, _ = run("budget", "show", "-C", str(project), "--json")
    assert code == 0
    document("budget-show", out)
    code, out, err = run("budget", "raise", "queries", "--epsilon", "2", "--reason", "the board decided", "-C", str(project), "--json")
    assert code == 0, err
    assert document("budget-raise", out)["remaining"] == pytest.approx(1.4)
    plot = project / "plan.svg"
    asked = ("--sampling-probability", "0.01", "--noise-multiplier", "3", "--plot", str(plot))
    code, out, err = run("budget", "plan", "queries", *asked, "-C", str(project), "--json")
    assert code == 0, err
    assert document("budget-plan", out)["steps"] > 0
    assert plan_svg_has_points(plot)


def plan_svg_has_points(plot: Path) -> bool:
    return plot.read_text().count("<circle") == 7


def test_the_log_rotates_pins_and_is_mirrored(run: Run, project: Path, tmp_path: Path):
    assert run("budget", "open", "queries", "--epsilon", "1", "--delta", "1e-6", "-C", str(project))[0] == 0
    before = run("evidence", "export", "--out", str(tmp_path / "before"), "-C", str(project), "--json")
    assert before[0] == 0
    code, out, err = run("evidence", "rotate-key", "--out", str(tmp_path / "log.pub"), "-C", str(project), "--json")
    assert code == 0, err
    assert len(document("evidence-rotate-key", out)["keys"]) == 2
    code, out, _ = run("evidence", "tiles", "--out", str(tmp_path / "tiles"), "-C", str(project), "--json")
    assert (code, document("evidence-tiles", out)["tiles"]) == (0, 1)
    code, out, _ = run("evidence", "pin", "-C", str(project), "--json")
    assert code == 0
    document("evidence-pin", out)
    assert run("evidence", "pin", "--accept-rollback", "-C", str(project))[0] == 2
    assert run("evidence", "export", "--out", str(tmp_path / "after"), "-C", str(project))[0] == 0
    for bundle, key in (("before", "before.pub"), ("before", "log.pub"), ("after", "before.pub"), ("after", "log.pub")):
        code, out, _ = run("evidence", "verify", str(tmp_path / bundle), "--key", str(tmp_path / key), "--json")
        assert (code, document("evidence-verify", out)["valid"]) == (0, True), (bundle, key)


@pytest.mark.parametrize(
    ("notes", "code", "value"),
    [
        (b"", "source.empty", None),
        (b"\x00\x01\x02binary\x00", "source.not_text", None),
        (b'{"id": "1", "patient": "p", "name": "n", "text": "\xff\xfe"}\n', "source.not_text", None),
        (b'{"id": "1", "patient": "p", "name": "n", "text": "a"}\n{"id": "2", \n', "record.invalid", "line 2"),
        (b'{"id": "1", "patient": "p", "name": "n"}\n', "record.invalid", "line 1"),
        (b'{"id": "1", "patient": "", "name": "n", "text": "a"}\n', "record.invalid", "line 1"),
        (b'{"id":"1","patient":"p","name":"n","text":"Zebulon Quimby a"}\n{"id":"1","patient":"p","name":"n","text":"b"}\n', "record.conflict", None),
    ],
    ids=["empty", "binary", "not UTF-8", "broken JSON", "no text", "no unit", "one id, two texts"],
)
def test_bad_sources_are_refused_with_a_place_and_no_text(run: Run, tmp_path: Path, notes: bytes, code: str, value: str | None):
    exit_code, out, err = run("run", "ingest", "-C", str(write_project(tmp_path / "ward", notes)), "--json")
    error = document("error", out)["error"]
    assert (exit_code, error["code"]) == (2, code)
    assert value is None or value in str(error["value"])
    assert "Quimby" not in out + err
    assert "Traceback" not in err


def test_a_source_that_changed_or_disappeared_is_refused(run: Run, project: Path):
    assert run("run", "ingest", "-C", str(project), "--json")[0] == 0
    original = (project / "notes.jsonl").read_bytes()
    (project / "notes.jsonl").write_bytes(original + b'{"id": "x", "patient": "x", "name": "x", "text": "x"}\n')
    code, out, _ = run("run", "ingest", "-C", str(project), "--json")
    assert (code, document("error", out)["error"]["code"]) == (4, "source.changed")
    (project / "notes.jsonl").unlink()
    code, out, _ = run("run", "ingest", "-C", str(project), "--json")
    assert (code, document("error", out)["error"]["code"]) == (2, "source.missing")
    (project / "notes.jsonl").write_bytes(original + b'{"id": "x", "patient": "x", "name": "x", "text": "x"}\n')
    assert run("catalog", "register", "notes", "--again", "-C", str(project), "--json")[0] == 0
    assert run("run", "ingest", "-C", str(project), "--json")[0] == 0, "the remedy of the message works"
    (project / "notes.jsonl").write_bytes(original)
    assert run("catalog", "register", "notes", "--again", "-C", str(project), "--json")[0] == 0
    assert run("run", "ingest", "-C", str(project), "--json")[0] == 0, "nothing was lost"


@pytest.mark.parametrize(
    ("change", "code"),
    [("[privacy]\n", "config.invalid"), ("[privvacy]\nepsilon = 1\n", "config.unknown_key"), ("[deid]\npolicy = 'nothing'\n", "config.invalid")],
)
def test_a_broken_configuration_says_which_key(run: Run, project: Path, change: str, code: str):
    settings = project / "discreet.toml"
    settings.write_text(settings.read_text() + change)
    exit_code, out, err = run("run", "-C", str(project), "--json")
    assert (exit_code, document("error", out)["error"]["code"]) == (2, code)
    assert "Traceback" not in err


def test_large_delta_needs_a_recorded_reason(run: Run, project: Path):
    settings = project / "discreet.toml"
    settings.write_text(settings.read_text().replace("[privacy]\n", "[privacy]\ndelta = 0.5\n"))
    code, out, _ = run("train", "-C", str(project), "--json")
    assert (code, document("error", out)["error"]["code"]) == (2, "plan.invalid")


def test_a_search_is_asked_for_exactly_where_it_is_declared(run: Run, project: Path):
    code, out, _ = run("train", "--search", "-C", str(project), "--json")
    assert (code, document("error", out)["error"]["code"]) == (2, "request.invalid")
    settings = project / "discreet.toml"
    settings.write_text(settings.read_text() + "[search]\nlearning_rate = [0.001, 0.004]\n")
    code, out, _ = run("train", "-C", str(project), "--json")
    assert (code, document("error", out)["error"]["code"]) == (2, "request.invalid")


def test_nothing_is_synthesized_or_stored_before_a_release_or_counted_for_nothing(run: Run, project: Path):
    code, out, _ = run("synthesize", "out.jsonl", "-C", str(project), "--json")
    assert (code, document("error", out)["error"]["code"]) == (2, "not_found")
    code, out, _ = run("child", "model.gguf", "--kind", "q8_0", "-C", str(project), "--json")
    assert (code, document("error", out)["error"]["code"]) == (2, "not_found")
    code, out, _ = run("child", "model.gguf", "--kind", "q9", "-C", str(project), "--json")
    assert (code, document("error", out)["error"]["code"]) == (2, "request.invalid")
    code, out, _ = run("statistics", "--epsilon", "0", "-C", str(project), "--json")
    assert (code, document("error", out)["error"]["code"]) == (2, "plan.invalid")


def test_a_model_folder_with_a_pickle_is_refused(run: Run, project: Path):
    (project / "base").mkdir()
    (project / "base" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    settings = project / "discreet.toml"
    settings.write_text(settings.read_text() + "[model]\nbase = 'base'\n")
    code, out, _ = run("plan", "-C", str(project), "--json")
    assert (code, document("error", out)["error"]["code"]) == (2, "model.unsafe")


def test_privacy_commands(run: Run, tmp_path: Path):
    # Golden row q=0.01, sigma=1, T=10000, delta=1e-5: PLD 6.1877, RDP 6.7128 (dp_accounting 0.6, prv_accountant).
    arguments = ["--sampling-probability", "0.01", "--noise-multiplier", "1", "--steps", "10000", "--delta", "1e-5"]
    code, out, _ = run("privacy", "epsilon", *arguments, "--accountant", "pld,rdp", "--json")
    assert code == 0
    found = document("privacy-epsilon", out)
    assert found["epsilon"] == pytest.approx(6.188, abs=0.01)
    assert found["accountants"]["rdp"] == pytest.approx(6.713, abs=0.05)
    code, out, _ = run("privacy", "noise", "--epsilon", "8", "--sampling-probability", "0.01", "--steps", "10000", "--delta", "1e-5", "--json")
    assert code == 0
    assert document("privacy-noise", out)["noise_multiplier"] == pytest.approx(0.8826, abs=0.002)
    code, out, _ = run("privacy", "curve", *arguments[:-2], "--svg", str(tmp_path / "curve.svg"), "--json")
    assert code == 0
    curve = document("privacy-curve", out)
    assert {round(point["delta"], 12): point["epsilon"] for point in curve["points"]}[1e-5] == pytest.approx(6.188, abs=0.01)
    assert "<polyline" in (tmp_path / "curve.svg").read_text()
    for bad in (["--delta", "1"], ["--noise-multiplier", "nan"], ["--sampling-probability", "2"], ["--steps", "-1"]):
        merged = dict(zip(arguments[::2], arguments[1::2], strict=True)) | {bad[0]: bad[1]}
        code, out, err = run("privacy", "epsilon", *[part for pair in merged.items() for part in pair], "--json")
        if bad != ["--delta", "1"]:
            assert code == 2, (bad, out, err)


def test_redact_text_and_lines(run: Run):
    code, out, _ = run("redact", "-", "--json", stdin=b"Call Dr. Ann Lee at 212-555-0147.")
    assert code == 0
    found = document("redact", out)
    assert "Ann Lee" not in found["text"]
    assert all(0 <= span["start"] < span["end"] <= 33 for span in found["spans"])
    code, out, _ = run("redact", "-", "--lines", stdin=b'{"id": 7, "text": "SSN 536-90-4399"}\n')
    assert code == 0
    assert json.loads(out)["id"] == 7
    assert "4399" not in out
    for bad in (b"\xff", b""):
        code, _, err = run("redact", "-", "--lines", stdin=b'{"id": 7}\n' if bad == b"" else bad)
        assert code == 2
        assert "Traceback" not in err


def test_redact_a_folder_resumes_and_leaves_out_what_is_no_text(run: Run, tmp_path: Path):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    (source / "a.txt").write_text("Call Dr. Ann Lee.")
    (source / "deep" / "b.txt").write_text("SSN 536-90-4399\r\nno more")
    assert run("redact", str(source), "--out", str(out))[0] == 0
    assert "Ann Lee" not in (out / "a.txt").read_text()
    (out / "a.txt").write_text("done before")
    (source / "bad.txt").write_bytes(b"\xff secret")
    code, _, err = run("redact", str(source), "--out", str(out))
    assert code == 2
    assert "secret" not in err
    assert (out / "a.txt").read_text() == "done before"
    assert not (out / "bad.txt").exists()
    assert run("redact", str(source), "--out", str(source / "x"))[0] == 2


def test_redact_refuses_bad_lines_without_quoting_them(run: Run):
    for bad in (b'{"text": "Ann Lee \\ud800"}', b"[" * 100_000, b'{"text": 7, "note": "Ann Lee"}', b"Ann Lee"):
        code, _, err = run("redact", "-", "--lines", stdin=bad + b"\n")
        assert code == 2
        assert "Ann Lee" not in err
    assert run("redact", "-", "--policy", "nothing", stdin=b"x")[0] == 2
    code, out, _ = run("redact", stdin=b"SSN 536-90-4399\x00 and more")
    assert code == 0
    assert "4399" not in out
    assert "\x00 and more" in out


def test_redact_calibrate_states_the_miss_rate(run: Run):
    rows = "".join(
        json.dumps({"text": f"to a{i}@b.example.org", "spans": [{"start": 3, "end": 17 + len(str(i)), "label": "EMAIL"}]}) + "\n" for i in range(30)
    )
    code, out, _ = run("redact", "calibrate", "--miss-rate", "0.3", "--json", stdin=rows.encode())
    assert code == 0
    found = document("redact-calibrate", out)
    assert found["met"]
    assert found["labels"][0]["values"] == 30
    assert run("redact", "calibrate", stdin=b'{"text": 3}')[0] == 2


def test_usage_mistakes_exit_2(run: Run, tmp_path: Path):
    assert run("no-such-verb", "--json")[0] == 2
    assert run("run", "-C", str(tmp_path), "--json")[0] == 2
    assert run("run", "dance", "-C", str(tmp_path))[0] == 2
    assert run("serve", "-C", str(tmp_path))[0] == 2


def test_the_name_model_has_one_thread_unless_the_operator_says_otherwise():
    told = "import os, sys; sys.argv = ['discreet', 'serve', '--new-key']; from discreet import cli; from discreet.cli import serving; serving._new_key = lambda: print(os.environ['OPENBLAS_NUM_THREADS']); cli.main()"
    for given, found in (({}, "1"), ({"OPENBLAS_NUM_THREADS": "2"}, "2")):
        env = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"} | given
        assert subprocess.run([sys.executable, "-c", told], env=env, capture_output=True, text=True, check=True, timeout=60).stdout.strip() == found


def test_unexpected_errors_do_not_quote_text(run: Run, project: Path, monkeypatch: pytest.MonkeyPatch):
    def explode(*_: object, **__: object) -> None:
        raise RuntimeError(SECRET)

    monkeypatch.setattr("discreet.pipeline.story.ingest", explode)
    code, out, err = run("run", "ingest", "-C", str(project), "--json")
    assert code == 1
    assert "Quimby" not in out + err
    assert "RuntimeError" in out


def test_init_makes_projects_that_load(run: Run, tmp_path: Path):
    for example in demo.EXAMPLES:
        code, out, _ = run("init", str(tmp_path / example), "--example", example, "--json")
        assert code == 0
        document("init", out)
    assert run("init", str(tmp_path / "plain"), "--example", "plain", "--json")[0] == 2, "an existing project is not overwritten"


def test_serve_upstream_refuses_private_hosts_and_bad_tenants(run, tmp_path, monkeypatch):
    from discreet.serve import asgi

    monkeypatch.chdir(tmp_path)
    started: list[dict] = []
    monkeypatch.setattr(asgi, "run", lambda application, **address: started.append(address))
    assert run("serve", "--upstream", "http://127.0.0.1:9")[0] == 2
    assert run("serve", "--upstream", "https://127.0.0.1:9")[0] == 2
    for alone in (["--trail", "elsewhere"], ["--upstream-key-env", "KEY"], ["--no-trail"]):
        assert "--upstream" in run("serve", *alone)[2]
        assert not started
    code, _, err = run("serve", "--upstream", "http://127.0.0.1:9", "--allow-private", "127.0.0.1", "--port", "9999")
    assert (code, [(each["host"], each["port"], each["tls"]) for each in started]) == (0, [("127.0.0.1", 9999, None)])
    assert "dk-" in err
    code, out, _ = run("evidence", "export", "--trail", ".discreet-gateway", "--out", "bundle", "--json")
    assert (code, document("evidence-export", out)["entries"]) == (0, 0)
    assert run("evidence", "export", "--trail", "nowhere", "--out", "bundle2", "--json")[0] == 2
    assert run("serve", "--upstream", "http://127.0.0.1:9", "--allow-private", "127.0.0.1", "--tls-cert", "none.pem")[0] == 2
    assert run("serve", "--upstream", "http://127.0.0.1:9", "--allow-private", "127.0.0.1", "--tls-cert", "none.pem", "--tls-key", "none.pem")[0] == 2
    code, out, _ = run("serve", "--new-key")
    key, hashed = (line.split()[1] for line in out.splitlines())
    assert (code, asgi.hash_api_key(key)) == (0, hashed)
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(f'[tenant.ward]\nkey_sha256 = ["{hashed}"]\n')
    here = ("serve", "--upstream", "http://127.0.0.1:9", "--allow-private", "127.0.0.1", "--tenants", str(tenants))
    code, _, err = run(*here)
    assert (code, "dk-" in err) == (0, False)
    tenants.write_text("[tenant.ward]\n")
    assert run(*here)[0] == 2


def test_redact_review_writes_a_private_page(run: Run, tmp_path: Path):
    (tmp_path / "note.txt").write_text("Call Dr. Ann Lee.")
    code, _, err = run("redact", str(tmp_path / "note.txt"), "--review", "--out", str(tmp_path / "page.html"))
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    assert '"text": "Call Dr. Ann Lee."' in page
    assert (tmp_path / "page.html").stat().st_mode & 0o077 == 0
    code, out, _ = run("redact", "-", "--lines", "--review", stdin=b'{"text": "Call Dr. Ann Lee."}\n{"text": "b"}\n')
    assert code == 0
    assert out.count('"spans"') == 2
    assert run("redact", "-", "--lines", "--review", stdin=b'{"text": 7, "x": "Ann Lee"}\n')[0] == 2
    assert run("redact", "-", "--review", stdin=b"")[0] == 2


def test_redact_code_by_its_name_and_json_keeps_its_shape(run: Run, tmp_path: Path):
    (tmp_path / "a.json").write_text('{"patient_name": "Xqzz", "n": [1, 2]}')
    code, out, _ = run("redact", str(tmp_path / "a.json"))
    assert (code, json.loads(out)) == (0, {"patient_name": "[PERSON]", "n": [1, 2]})
    code, out, _ = run("redact", "-", "--syntax", "python", stdin=b'x = "Dr. Ann Lee"')
    assert (code, out) == (0, 'x = "Dr. [PERSON]"')
    code, out, _ = run("redact", str(tmp_path / "a.json"), "--json")
    assert document("redact", out)["spans"][0]["label"] == "PERSON"


def test_redact_risk_and_k(run: Run):
    note = b"A 45-year-old man from Vermont with Huntington disease."
    code, out, _ = run("redact", "risk", "--json", stdin=note)
    assert code == 0
    found = document("redact-risk", out)
    assert found["expected"] < 5
    code, out, _ = run("redact", "-", "--k", "1000", "--json", stdin=note)
    assert code == 0
    assert document("redact", out)["expected"] >= 1000
    assert "Huntington" not in out
    assert run("redact", "risk", "--population", "0", stdin=note)[0] == 2
    assert run("redact", "-", "--k", "-1", stdin=note)[0] == 2


def test_redact_table(run: Run, tmp_path: Path):
    (tmp_path / "t.csv").write_text("age,zip\n" + "".join(f"{20 + n % 40},0564{n % 3}\n" for n in range(90)))
    here = ("redact", "table", str(tmp_path / "t.csv"), "--column", "age", "--column", "zip", "--k", "10")
    code, out, _ = run(*here, "--out", str(tmp_path / "out.csv"), "--json")
    assert code == 0
    assert document("redact-table", out)["smallest"] >= 10
    assert run(*here)[1] == (tmp_path / "out.csv").read_text()
    assert run(*here, "--out", str(tmp_path / "out.csv"))[0] == 2
    code, out, _ = run("redact", "table", str(tmp_path / "t.csv"), "--column", "agee", "--json")
    assert (code, document("error", out)["error"]["remedy"]) == (2, "Did you mean 'age'?")
    assert run("redact", "table", str(tmp_path / "t.csv"), "--column", "age", "--k", "91")[0] == 2


def test_calibrated_thresholds_go_into_the_project_and_are_used(run: Run, project: Path):
    rows = "".join(
        json.dumps({"text": f"to a{i}@b.example.org", "spans": [{"start": 3, "end": 17 + len(str(i)), "label": "EMAIL"}]}) + "\n" for i in range(60)
    )
    settings = project / "discreet.toml"
    settings.write_text(settings.read_text() + "[deid.thresholds]\nPHONE = 0.5\n[audit.x]\n".replace("[audit.x]\n", "[train]\nwarmup_steps = 1\n"))
    code, _, err = run("redact", "calibrate", "-C", str(project), "--miss-rate", "0.2", "--write", "--json", stdin=rows.encode())
    assert code == 0, err
    from discreet import config
    from discreet.deid import policy

    stored = config.load(project)
    chosen = policy.configured(stored.deid)
    assert stored.train.warmup_steps == 1, "the rest of the file stays"
    assert list(chosen.thresholds) == ["EMAIL"]
    assert chosen.misses["EMAIL"][1] <= 0.2
    assert policy.redact("to a@b.example.org", chosen).spans
    assert run("redact", "calibrate", "--write", stdin=rows.encode())[0] == 2
    before = settings.read_text()
    settings.write_text(before.replace("[deid.thresholds]", "[deid]\nthresholds = { EMAIL = 0.5 }\n[deid_thresholds]"))
    assert run("redact", "calibrate", "-C", str(project), "--write", stdin=rows.encode())[0] == 2


def test_tokens_come_back_for_the_entitled_until_the_person_is_forgotten(run: Run, project: Path):
    settings = project / "discreet.toml"
    note = f"{SECRET} called from 212-555-0147.".encode()
    here = ("-C", str(project), "--subject", "p3")
    code, sealed, err = run("redact", "-", *here, "--channel", "archive", stdin=note)
    assert code == 0, err
    assert "PHONE_" in sealed
    assert "0147" not in sealed
    assert run("redact", "-", *here, "--channel", "archive", stdin=note)[1] == sealed
    assert run("redact", "-", "-C", str(project), "--subject", "p4", "--channel", "archive", stdin=note)[1] != sealed
    code, out, _ = run("redact", "restore", *here, "--json", stdin=sealed.encode())
    assert code == 0
    assert document("redact-restore", out)["text"] == note.decode()
    assert run("redact", "restore", "-C", str(project), "--subject", "p4", stdin=sealed.encode())[1] == sealed, "another person's key opens nothing"
    code, out, _ = run("redact", "restore", "-C", str(project), "--subject", "nobody", "--json", stdin=sealed.encode())
    assert (code, document("error", out)["error"]["code"]) == (2, "not_found")
    assert run("redact", "-", "--subject", "p3", stdin=note)[0] == 2
    from discreet import pipeline
    from discreet.evidence.statement import Predicate

    with pipeline.open_house(project) as house:
        granted = [e.fields for e in house.log.select(Predicate.ACCESS_GRANTED) if e.fields.get("kind") == "re-identification"]
        assert [fields["values"] for fields in granted] == [
            document("redact-restore", json.dumps({"text": "", "restored": granted[0]["values"]}))["restored"],
            0,
        ]
        house.keyring.forget(pipeline.subject_of(house, "p3"))
    code, out, _ = run("redact", "restore", *here, "--json", stdin=sealed.encode())
    assert (code, document("error", out)["error"]["code"]) == (3, "keys.forgotten")
    settings.write_text(settings.read_text() + "[access]\nauditor = ['root']\nengineer = ['somebody']\n")
    code, out, _ = run("redact", "restore", "-C", str(project), "--subject", "p4", "--json", stdin=sealed.encode())
    assert (code, document("error", out)["error"]["code"]) == (3, "access.denied")
    assert SECRET.encode() not in b"".join(path.read_bytes() for path in (project / ".discreet").rglob("*") if path.is_file())


def test_reasons_are_logged_without_identifiers(run: Run, project: Path):
    code, _, err = run("access", "break-glass", "erase", "--reason", "Dr. Ann Lee called from 212-555-0147 about a fire", "-C", str(project))
    assert code == 0, err
    from discreet import pipeline
    from discreet.evidence.statement import Predicate

    with pipeline.open_house(project) as house:
        (reason,) = [e.fields["reason"] for e in house.log.select(Predicate.ACCESS_GRANTED) if e.fields.get("kind") == "break-glass"]
    assert reason == "Dr. [REDACTED] called from [REDACTED] about a fire"


def test_search_shows_passages_or_counts_people(run: Run, project: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("opendp")
    where = ("-C", str(project), "--json")
    code, out, _ = run("search", "cough", *where)
    assert (code, document("error", out)["error"]["code"]) == (2, "config.invalid")
    toml = project / "discreet.toml"
    toml.write_text(toml.read_text() + '[retrieval]\npurposes = ["note-assistant"]\nreads = { product = ["notes"] }\n')
    code, out, _ = run("search", "cough", *where)
    assert (code, document("error", out)["error"]["code"]) == (2, "not_found")
    code, out, err = run("index", *where)
    assert code == 0, err
    assert document("index", out)["documents"] == 30
    code, out, err = run("search", "-", "-k", "3", *where, stdin=b"cough for 7 days")
    assert code == 0, err
    found = document("search", out)["passages"]
    assert len(found) == 3
    assert "7 days" in found[0]["text"]
    code, said, err = run("search", "cough for 7 days", "-k", "1", "-C", str(project))
    assert (code, said.splitlines()[1]) == (0, found[0]["text"])
    asked = ("--private", "--option", "for 7 days", "--option", "fever")
    code, out, err = run("search", "cough", *asked, "--epsilon", "1", *where)
    assert code == 0, err
    assert document("search-private", out)["epsilon"] == 1.0
    code, said, err = run("search", "cough", *asked, "--epsilon", "1", "-C", str(project))
    assert code == 0, err
    with (project / "notes.jsonl").open("a") as file:
        file.write(json.dumps({"id": "bell", "patient": "p30", "name": SECRET, "text": "A cough that \x1b[2J clears \x07 the screen."}) + "\n")
    assert run("catalog", "register", "notes", "--again", "-C", str(project))[0] == 0
    assert run("index", "-C", str(project))[0] == 0
    shown = run("search", "clears the screen", "-k", "1", "-C", str(project))[1]
    assert "clears" in shown
    assert not {"\x1b", "\x07"} & set(shown)
    assert "within 3 of the true number of patients with probability 0.95; epsilon 1" in said
    for wrong, exit_code, error in (
        (("--private",), 2, "request.invalid"),
        (("--epsilon", "1"), 2, "request.invalid"),
        (("--option", "fever"), 2, "request.invalid"),
        (("-k", "0"), 2, "request.invalid"),
        ((*asked, "--epsilon", "0"), 2, "plan.invalid"),
        ((*asked, "--epsilon", "9"), 3, "budget.exhausted"),
        (("--purpose", "marketing"), 3, "consent.not_admitted"),
    ):
        code, out, _ = run("search", "cough", *wrong, *where)
        assert (code, document("error", out)["error"]["code"]) == (exit_code, error), wrong
    (index,) = (project / ".discreet" / "indexes").iterdir()
    index.write_bytes(index.read_bytes()[:-1])
    code, out, err = run("search", "cough", *where)
    assert (code, document("error", out)["error"]["code"]) == (4, "digest.mismatch")
    assert SECRET not in out + said + err + json.dumps(found)
