"""What people see: whole sessions at the command line, word for word. `...` stands for what differs between machines; `[exit N]` for an exit code that is not 0."""

from __future__ import annotations

import doctest
import io
import json
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from discreet import cli

SESSIONS = sorted((Path(__file__).parent / "transcripts").glob("*.txt"))
WARD = """
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
[retrieval]
purposes = ["note-assistant"]
reads = { product = ["notes"] }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the project `ward` and a letter."""
    (tmp_path / "ward").mkdir()
    rows = [{"id": str(i), "patient": f"p{i}", "text": f"A cough for {i} days."} for i in range(30)]
    (tmp_path / "ward" / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "ward" / "held.jsonl").write_text('{"id": "1", "text": "The patient was seen for a cough."}\n')
    (tmp_path / "ward" / "discreet.toml").write_text(WARD)
    (tmp_path / "letter.txt").write_text("Call me on +1 212 555 0142 or write to kim@example.org.\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.stderr, "width", 160, raising=False)
    return tmp_path


def commands(session: str) -> Iterator[tuple[str, str]]:
    """Yields each command of a session with what it is to print."""
    for part in session.split("\n$ ")[1:]:
        command, _, expected = part.partition("\n")
        yield command, expected


def said(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """Runs one command line in this process and returns what it printed, errors after results."""
    name, *arguments = shlex.split(command)
    assert name == "discreet"
    monkeypatch.setattr(sys, "argv", ["discreet", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b""), encoding="utf-8"))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    return out + err + (f"[exit {caught.value.code}]\n" if caught.value.code else "")


@pytest.mark.parametrize("session", SESSIONS, ids=lambda path: path.stem)
def test_a_session_reads_as_written(session: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    told = list(commands("\n" + session.read_text()))
    assert told
    for command, expected in told:
        got = said(command, monkeypatch, capsys).strip()
        same = doctest.OutputChecker().check_output(expected.strip() + "\n", got + "\n", doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        assert same, f"$ {command}\n{got}"
