"""Files of any size: bounded, in order, resumed where they stopped, and nothing of their text in a message."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from discreet import redaction
from discreet.deid.policy import Channel
from discreet.errors import ConfigInvalid, DiscreetError, RequestInvalid
from discreet.redaction import Task, folder, pieces_of_lines, pieces_of_text, to_file, to_stream

NOTE = "Seen by Dr. Kelly Fuller on 2024-03-05, call 212-555-0147.\n"
LINES = Task(policy="label", lines=True)
TEXT = Task(policy="label")


class Seen:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.done: list[tuple[int, int]] = []

    def progress(self, task: str, done: int, total: int, figures: object) -> None:
        self.done.append((done, total))

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_PIECE_LINES", 3)
    monkeypatch.setattr(redaction, "_PIECE_CHARS", 200)


def rows(count: int) -> str:
    return "".join(json.dumps({"id": n, "text": f"{n}: {NOTE}"}) + "\n" for n in range(count))


def test_lines_come_out_in_order_from_one_process_and_from_two(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(rows(20))
    outs = []
    for jobs in (1, 2):
        made: list[str] = []
        to_stream(str(tmp_path / "in.jsonl"), LINES, made.append, jobs=jobs)
        outs.append("".join(made))
    assert outs[0] == outs[1]
    found = [json.loads(line) for line in outs[0].splitlines()]
    assert [row["id"] for row in found] == list(range(20))
    assert all(row["text"] == f"{row['id']}: Seen by Dr. [PERSON] on [DATE], call [PHONE].\n" for row in found)
    assert all(row["spans"] for row in found)


@pytest.mark.parametrize(
    "text", ["", "a", "x\n", "one\n\ntwo\n\n" * 90, "é" * 199 + "\n" + "ß" * 500 + "\nend", "a" * 150 + "\n" + "b" * 150 + "\n" + "c" * 150]
)
def test_pieces_are_the_text_and_say_where_they_are(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(redaction, "MAX_CHARS", 600)
    for cutting in (0, 1):
        content = ("x\n" * cutting + text).encode()
        stream = io.BytesIO(content)
        stream.seek(2 * cutting)
        pieces = list(pieces_of_text(stream, first=1 + cutting, read=2 * cutting))
        assert "".join(piece.text for piece in pieces) == text
        at, line = 2 * cutting, 1 + cutting
        for piece in pieces:
            at, line = at + len(piece.text.encode()), line + piece.text.count("\n")
            assert (piece.read, piece.following) == (at, line)
    again = list(pieces_of_lines(io.BytesIO(text.encode())))
    assert "".join(piece.text for piece in again) == text


def test_a_cut_text_gives_the_same_from_where_it_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "MAX_CHARS", 600)
    content = "".join(f"{n} {'word ' * (n % 9)}\n" + ("\n" if n % 5 == 0 else "") for n in range(200)).encode()
    whole = list(pieces_of_text(io.BytesIO(content)))
    assert len(whole) > 5
    for stop in (1, 3, len(whole) - 1):
        stream = io.BytesIO(content)
        stream.seek(whole[stop - 1].read)
        assert list(pieces_of_text(stream, first=whole[stop - 1].following, read=whole[stop - 1].read)) == whole[stop:]


def test_a_line_that_does_not_end_is_refused_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(io.RawIOBase):
        given = 0

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: bytearray) -> int:
            buffer[:] = b"Kelly Fuller "[: len(buffer)] * 1 + b"x" * max(0, len(buffer) - 13)
            self.given += len(buffer)
            return len(buffer)

    monkeypatch.setattr(redaction, "MAX_LINE_BYTES", 100_000)
    monkeypatch.setattr(redaction, "MAX_CHARS", 100_000)
    for read in (pieces_of_lines, pieces_of_text):
        endless = Endless()
        with pytest.raises(RequestInvalid, match="line 1") as caught:
            list(read(io.BufferedReader(endless)))
        assert endless.given < 3_000_000
        assert "Kelly" not in str(caught.value)


@pytest.mark.slow
def test_a_gigabyte_line_needs_no_gigabyte(tmp_path: Path) -> None:
    path = tmp_path / "line.txt"
    with path.open("wb") as file:
        file.write(b'{"text": "Kelly Fuller ')
        file.truncate(1_000_000_000)
    for more in ([], ["--lines"]):
        command = [sys.executable, "-c", "from discreet.cli import main; main()", "redact", str(path), *more]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (3_000_000_000,) * 2)
        )
        assert done.returncode == 2, done.stderr
        assert "line 1" in done.stderr
        assert "Fuller" not in done.stdout + done.stderr


def test_bytes_that_are_no_text_are_refused_with_their_place(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"Kelly Fuller\n" * 3 + b"\xff\xfe")
    with pytest.raises(RequestInvalid, match="byte 39") as caught:
        to_stream(str(tmp_path / "a.txt"), TEXT, print, jobs=1)
    assert "Kelly" not in str(caught.value)


def test_nul_and_other_control_characters_pass(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"SSN 536-90-4399\x00\x1b[31m\r\nand more\x7f")
    made: list[str] = []
    to_stream(str(tmp_path / "a.txt"), TEXT, made.append, jobs=1)
    assert "".join(made) == "SSN [SSN]\x00\x1b[31m\r\nand more\x7f"


def test_a_killed_call_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(rows(20))
    whole: list[str] = []
    to_stream(str(source), LINES, whole.append, jobs=1)
    seen: list[int] = []
    original = redaction.Redactor.piece

    def counting(self: redaction.Redactor, piece: redaction.Piece) -> str:
        seen.append(piece.first)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return original(self, piece)

    monkeypatch.setattr(redaction.Redactor, "piece", counting)
    with pytest.raises(KeyboardInterrupt):
        to_file(str(source), out, LINES, Seen(), jobs=1)
    assert not out.exists()
    with (tmp_path / "out.jsonl.partial").open("ab") as torn:
        torn.write(b'{"id": 9, "te')  # what a kill in the middle of a write leaves
    to_file(str(source), out, LINES, watch := Seen(), jobs=1)
    assert out.read_text() == "".join(whole)
    assert seen == [1, 4, 7, 10, 10, 13, 16, 19]
    assert watch.done[-1] == (source.stat().st_size, source.stat().st_size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("change", ["file", "policy", "state"])
def test_another_file_or_policy_starts_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(rows(9))
    original = redaction._in_order

    def stopped(*args: object, **more: object) -> object:
        yield next(original(*args, **more))
        raise KeyboardInterrupt

    monkeypatch.setattr(redaction, "_in_order", stopped)
    with pytest.raises(KeyboardInterrupt):
        to_file(str(source), out, LINES, Seen(), jobs=1)
    monkeypatch.setattr(redaction, "_in_order", original)
    task = LINES
    if change == "file":
        source.write_text(rows(10))
    elif change == "policy":
        task = Task(policy="redact", lines=True)
    else:
        (tmp_path / "out.jsonl.resume").write_text('{"size": -1}')
    to_file(str(source), out, task, Seen(), jobs=1)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["id"] for row in found] == list(range(10 if change == "file" else 9))
    assert all(("[REDACTED]" in row["text"]) is (change == "policy") for row in found)


def test_an_existing_result_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text(NOTE)
    (tmp_path / "out.txt").write_text("mine")
    with pytest.raises(RequestInvalid, match="not taken"):
        to_file(str(tmp_path / "in.txt"), tmp_path / "out.txt", TEXT, Seen(), jobs=1)
    with pytest.raises(RequestInvalid, match="not taken"):
        redaction.write_new(tmp_path / "out.txt", "x")
    assert (tmp_path / "out.txt").read_text() == "mine"


def test_a_folder_in_its_syntaxes_resumes_and_keeps_to_one_policy(tmp_path: Path) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    (source / "a.py").write_text('name = "Dr. Kelly Fuller"\n')
    (source / "deep" / "b.json").write_text('{"patient_name": "Xqzz"}')
    (source / "c.txt").write_text(NOTE)
    (source / "bad.txt").write_bytes(b"Kelly \xff")
    (source / "link.txt").symlink_to("/etc/passwd")
    assert folder(source, out, TEXT, watch := Seen(), jobs=1) == (4, 1)
    assert len(watch.notes) == 1
    assert "Kelly" not in watch.notes[0]
    assert (out / "a.py").read_text() == 'name = "Dr. [PERSON]"\n'
    assert json.loads((out / "deep" / "b.json").read_text()) == {"patient_name": "[PERSON]"}
    assert not (out / "link.txt").exists()
    (out / "c.txt").write_text("done before")
    assert folder(source, out, TEXT, Seen(), jobs=1) == (1, 1), "only the one that failed"
    later = time.time() + 10
    (source / "c.txt").write_text("Call 212-555-0147.")
    os.utime(source / "c.txt", (later, later))
    assert folder(source, out, TEXT, Seen(), jobs=1) == (2, 1)
    assert (out / "c.txt").read_text() == "Call [PHONE]."
    with pytest.raises(RequestInvalid, match="same policy"):
        folder(source, out, Task(policy="redact"), Seen(), jobs=1)
    with pytest.raises(RequestInvalid, match="outside"):
        folder(source, source / "x", TEXT, Seen(), jobs=1)


def test_a_large_file_of_a_folder_is_cut_and_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redaction, "_SMALL_BYTES", 1000)
    monkeypatch.setattr(redaction, "MAX_CHARS", 2000)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "big.txt").write_text(NOTE * 100)
    assert folder(tmp_path / "in", tmp_path / "out", TEXT, Seen(), jobs=1) == (1, 0)
    assert (tmp_path / "out" / "big.txt").read_text() == "Seen by Dr. [PERSON] on [DATE], call [PHONE].\n" * 100


def test_a_full_disk_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(NOTE)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="full"):
        folder(tmp_path / "in", tmp_path / "out", TEXT, Seen(), jobs=1)
    assert [path.name for path in (tmp_path / "out").iterdir() if path.suffix != ".json"] == []
    with pytest.raises(OSError, match="full"):
        redaction.write_new(tmp_path / "page.html", "text")
    assert not list(tmp_path.glob("page*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_output_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(NOTE)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from discreet.cli import main; main()", "redact", str(tmp_path / "a.txt")],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "free space" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert "Fuller" not in done.stderr


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_call_with_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(rows(3000))
    script = (
        "import sys\nfrom pathlib import Path\nfrom discreet import redaction\nfrom discreet.errors import OperationFailed\nredaction._PIECE_LINES = 5\n"
        "def kill(text):\n import multiprocessing, os, signal\n os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)\n"
        "if __name__ == '__main__':\n try:\n  redaction.to_stream(sys.argv[1], redaction.Task(lines=True), kill, jobs=2)\n except OperationFailed as error:\n  print(error.code); sys.exit(7)\n"
    )
    (tmp_path / "run.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "in.jsonl")], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 7, done.stderr
    assert "Fuller" not in done.stdout + done.stderr


def test_tasks_say_what_they_do_not_know() -> None:
    for task, near in (
        (Task(policy="lable"), "label"), (Task(channel="trainig"), "training"), (Task(sensitivity="speciall"), "special"), (Task(syntax="pyton"), "python"),
    ):  # fmt: skip
        with pytest.raises(ConfigInvalid, match=f"Did you mean '{near}'"):
            task.checked("-")
    for task in (Task(k=-1), Task(lines=True, syntax="python")):
        with pytest.raises(RequestInvalid):
            task.checked("-")
    assert Task(syntax="auto").checked("a.py").syntax == "python"
    assert Task(syntax="auto", lines=True).checked("a.py").syntax == "text"
    assert Task(syntax="auto").checked("-").syntax == "text"


def test_a_project_gives_the_policy_of_its_channel(tmp_path: Path) -> None:
    base = '[project]\nname = "p"\ncontroller = "c"\npurpose = "p"\n[[source]]\nname = "s"\npath = "x"\nunit = "u"\nowner = "o"\npurposes = ["p"]\nbasis = "consent"\n'
    (tmp_path / "discreet.toml").write_text(base + '[deid]\npolicy = "label"\n[deid.operators.training.personal]\nPHONE = "mask"\n')
    here = Task(project=str(tmp_path))
    assert redaction.Redactor(here).text(NOTE).text.endswith("call [PHONE].\n")
    assert redaction.Redactor(Task(project=str(tmp_path), sensitivity="personal")).text(NOTE).text.endswith("call ***-***-****.\n")
    assert "[REDACTED]" in redaction.Redactor(Task(project=str(tmp_path), channel=Channel.LOG)).text(NOTE).text
    with pytest.raises(DiscreetError, match="vault"):
        Task(project=str(tmp_path), channel="prompt").chosen()


def test_a_table_made_coarser(tmp_path: Path) -> None:
    path = tmp_path / "people.csv"
    path.write_text("id,age,zip,note\n" + "".join(f'{n},{20 + n % 40},0564{n % 3},"a, b"\n' for n in range(90)))
    figures, table = redaction.coarser_table(str(path), ["age", "zip"], k=10, population="", suppress=0.0)
    assert figures["smallest"] >= 10 > figures["before"]
    made = list(csv.DictReader(io.StringIO(table)))
    assert [row["id"] for row in made] == [str(n) for n in range(90)]
    assert made[0]["note"] == "a, b"
    assert len({(row["age"], row["zip"]) for row in made}) > 1
    with pytest.raises(ConfigInvalid, match="Did you mean 'zip'"):
        redaction.coarser_table(str(path), ["zipp"], k=2, population="", suppress=0.0)
    path.write_text("a,b\n1\n")
    with pytest.raises(RequestInvalid, match="cells"):
        redaction.coarser_table(str(path), ["a"], k=2, population="", suppress=0.0)
