"""`discreet redact` on files of any size: read in bounded pieces, replaced on all cores, written in order, resumed where it stopped.

    file ── pieces (lines, paragraphs, whole files) ──> workers ──> pieces in order ──> stdout, or FILE.partial ──rename──> FILE

A running text beyond one call's limit is cut between paragraphs; a name is then followed through its piece, not through the whole file. Memory holds a few pieces for each worker, whatever the size of the file: a line beyond `MAX_LINE_BYTES`
is refused before more of it is read. What was written so far is named in `FILE.resume` (sizes and digests of the policy, no text), so that a killed command goes on behind its last piece; a file that changed, or another
policy, starts over.

Does not cover: a file that changes while it is read; names across pieces.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import os
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, Protocol, final

from discreet import config, review
from discreet.deid import policy as policies
from discreet.deid import quasi, syntax
from discreet.deid.calibrate import Calibrated
from discreet.deid.detect import MAX_CHARS, Span
from discreet.deid.policy import Channel, Policy, Redacted
from discreet.deid.syntax import Syntax
from discreet.errors import DiscreetError, OperationFailed, RequestInvalid, SourceMissing
from discreet.keys import Key
from discreet.record import Sensitivity

MAX_LINE_BYTES = 4 * MAX_CHARS
"""Longest line that is read; a text of `MAX_CHARS` code points has at most so many bytes."""

MAX_FILE_BYTES = 100_000_000
"""Largest file that is read as a whole: one with a syntax, or one whose spans are asked for."""

_PIECE_CHARS = 200_000
_PIECE_LINES = 200
_SMALL_BYTES = 400_000
"""Below it one process is quicker than starting others."""


class Observer(Protocol):
    """What shows progress."""

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None: ...
    def note(self, line: str) -> None: ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What is to be done to every text, in words that another process understands.

    Args:
        policy: name of a built-in policy; with a project the policy of `channel` in its discreet.toml is taken instead.
        project: folder of a discreet.toml, or "".
        channel, sensitivity: where the text goes, and how sensitive it is.
        k: see `policy.Policy`; 0 for the policy's own.
        syntax: what the text is written in.
        lines: whether every line is a JSON object with a field `text`.
    """

    policy: str = "label"
    project: str = ""
    channel: str = "training"
    sensitivity: str = "special"
    k: int = 0
    syntax: str = "text"
    lines: bool = False

    def checked(self, file: str) -> Task:
        """Returns the task with the syntax of the file in place of `auto`, after everything that is named was found to exist.

        Raises:
            RequestInvalid: when a channel, sensitivity or syntax is not known, or two options do not go together.
            ConfigInvalid, UnknownKey, SourceMissing: as `chosen`.
        """
        known: dict[str, tuple[str, Iterable[str]]] = {
            "channel": (self.channel, Channel),
            "sensitivity": (self.sensitivity, Sensitivity),
            "syntax": (self.syntax, ("auto", *Syntax)),
        }
        for option, (word, words) in known.items():
            policies.known_word(word, words, f"--{option}")
        if self.k < 0 or (self.lines and self.syntax not in ("auto", "text")):
            raise RequestInvalid("--k of at least 0, and --lines without --syntax", value=f"--k {self.k} --syntax {self.syntax}")
        found = replace(self, syntax=syntax.of_file(file) if self.syntax == "auto" and not self.lines else "text" if self.lines else self.syntax)
        found.chosen()
        return found

    def chosen(self) -> Policy:
        """Returns the policy.

        Raises:
            ConfigInvalid, UnknownKey, SourceMissing: when there is none of that name, or the project's file is not valid.
        """
        if self.project:
            section = config.load(Path(self.project)).deid
            policies.check(section)
            found = policies.resolve(policies.configured(section, Channel(self.channel), Sensitivity(self.sensitivity)))
        else:
            found = policies.resolve(self.policy)
        return replace(found, k=self.k) if self.k else found


# One text ---------------------------------------------------------------------------------------------------------------------------------------------------


@final
class Redactor:
    """Does a task to one text after another, in one process.

    Args:
        task: what is to be done.
        key: of the subject that all texts are about; None for a fresh one for each text.
        subject: whom tokens are bound to.
    """

    def __init__(self, task: Task, key: Key | None = None, subject: str = "") -> None:
        self._task, self._key, self._subject = task, key, subject
        self.policy = task.chosen()

    def text(self, text: str) -> Redacted:
        """Returns what is left of a text."""
        return syntax.redact(text, Syntax(self._task.syntax), self.policy, key=self._key, subject=self._subject)

    def spans(self, text: str) -> list[Span]:
        """Returns what would be replaced in a text."""
        return policies.spans_in(text, self.policy)

    @property
    def lines(self) -> bool:
        """Whether every line is a text."""
        return self._task.lines

    def texts(self, content: str) -> list[str]:
        """Returns the texts of JSON Lines."""
        return [str(self._row(line, number)["text"]) for number, line in enumerate(content.split("\n"), start=1) if line.strip()]

    def line(self, line: str, number: int) -> str:
        """Returns a line of JSON with its field `text` replaced and its spans beside it.

        Raises:
            RequestInvalid: when it is not such a line; the message has its number and none of its text.
        """
        row = self._row(line, number)
        try:
            return json.dumps({**row, **document(self.text(row["text"]))}, ensure_ascii=False)
        except RequestInvalid as error:
            raise RequestInvalid(error.rule, value=f"line {number}", remedy=error.remedy) from None

    @staticmethod
    def _row(line: str, number: int) -> dict[str, Any]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str) or any("\ud800" <= c <= "\udfff" for c in row["text"]):
            raise RequestInvalid("a JSON object with a string field `text` (no lone surrogates) on every line", value=f"line {number}")
        return row

    def piece(self, piece: Piece) -> str:
        """Returns what is written for a piece."""
        if not self._task.lines:
            return self.text(piece.text).text
        numbered = enumerate(piece.text.split("\n"), start=piece.first)
        return "".join(self.line(line, number) + "\n" for number, line in numbered if line.strip())


def document(done: Redacted) -> dict[str, Any]:
    """Returns what `--json` prints."""
    return {
        "text": done.text,
        "spans": [{"start": s.start, "end": s.end, "label": s.label, "score": s.score} for s in done.spans],
        **({} if done.expected is None else {"expected": done.expected}),
    }


@contextmanager
def redactor(task: Task, subject: str = "") -> Iterator[Redactor]:
    """Opens what does a task in this process, with the subject's key where one is named.

    Raises:
        RequestInvalid: when a subject is named without a project.
        Forgotten: when the subject was erased.
    """
    if not subject:
        yield Redactor(task)
        return
    if not task.project:
        raise RequestInvalid("-C PROJECT beside --subject", remedy="The keys of subjects are in a project.")
    from discreet import pipeline  # what it imports takes seconds; a plain redaction does without

    with pipeline.open_house(Path(task.project), exclusive=False) as house:
        name, key = pipeline.subject_key(house, subject)
        yield Redactor(task, key, name)


def review_page(file: str, own: Redactor) -> str:
    """Returns the page on which a person corrects what was found in a file, a text for each line with `lines`."""
    text = read_whole(file)
    return review.page([(each, own.spans(each)) for each in ([text] if not own.lines else own.texts(text))])


def write_new(out: Path, text: str) -> None:
    """Writes a file that only its owner may read, whole or not at all.

    Raises:
        RequestInvalid: when there is one of that name.
    """
    if out.exists():
        raise RequestInvalid("--out with a name that is not taken", value=str(out))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    partial.unlink(missing_ok=True)
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8", newline="") as sink:
            sink.write(text)
        partial.replace(out)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def thresholds(chosen: Sequence[Calibrated], confidence: float) -> list[str]:
    """Returns the lines of `[deid.thresholds]`: each threshold with the miss rate that it keeps."""
    return [
        f"{c.label} = {{ least = {c.threshold}, miss_rate = [{c.lower:.4f}, {c.upper:.4f}], confidence = {confidence}, values = {c.values} }}"
        + ("" if c.met else f"  # the target was not met: {c.missed} missed")
        for c in chosen
    ]


_THRESHOLDS = re.compile(r"^\[deid\.thresholds\][^\n]*\n(?:(?!\[)[^\n]*\n?)*", re.MULTILINE)


def store_thresholds(project: Path | None, lines: Sequence[str]) -> None:
    """Puts a `[deid.thresholds]` into a project's discreet.toml, in place of the one that is there; the rest of the file stays as it is.

    Raises:
        RequestInvalid: when there is no project, or its thresholds stand elsewhere than under `[deid.thresholds]`.
        ConfigInvalid: when the file would not be valid; it is left as it was.
    """
    if project is None:
        raise RequestInvalid("-C PROJECT beside --write")
    path = project / config.FILE_NAME
    before = path.read_text(encoding="utf-8")
    if not _THRESHOLDS.search(before) and config.load(project).deid.thresholds:
        raise RequestInvalid("thresholds in a section [deid.thresholds] of their own", remedy="Remove `thresholds` from [deid].")
    path.write_text(_THRESHOLDS.sub("", before).rstrip("\n") + "\n\n[deid.thresholds]\n" + "\n".join(lines) + "\n", encoding="utf-8")
    try:
        policies.check(config.load(project).deid)
    except DiscreetError:
        path.write_text(before, encoding="utf-8")
        raise


def coarser_table(file: str, columns: Sequence[str], *, k: int, population: str, suppress: float) -> tuple[dict[str, Any], str]:
    """Returns what `discreet redact table` prints, and the coarser table as CSV.

    Raises:
        SourceMissing, RequestInvalid: when a file or a column is missing, or no table is coarse enough.
    """
    header, rows = _table(file)
    everybody = _columns(*_table(population), columns) if population else None
    own = _columns(header, rows, columns)
    made = quasi.generalise_table(columns, own, k=k, population=everybody, suppress=suppress)
    places = [header.index(name) for name in columns]
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(header)
    for number, values in made.rows:
        row = list(rows[number])
        for place, value in zip(places, values, strict=True):
            row[place] = value
        writer.writerow(row)
    steps = {name: {"kind": made.kinds[name], "step": made.steps[name], "steps": len(quasi.LADDERS[made.kinds[name]]) - 1} for name in columns}
    before = min(quasi.k_map(own, own if everybody is None else everybody), default=0)
    figures = {"k": k, "rows": len(rows), "before": before, "smallest": made.smallest, "suppressed": made.suppressed}
    return {**figures, "columns": steps}, sink.getvalue()


def _table(file: str) -> tuple[list[str], list[list[str]]]:
    try:
        rows = [row for row in csv.reader(io.StringIO(read_whole(file), newline=""), strict=True) if row]
    except csv.Error:
        raise RequestInvalid("a CSV file with a header", value=file) from None
    if len(rows) < 2 or any(len(row) != len(rows[0]) for row in rows):
        raise RequestInvalid("a CSV file with a header and as many cells in every row", value=file)
    return rows[0], rows[1:]


def _columns(header: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[str]) -> list[list[str]]:
    for name in columns:
        policies.known_word(name, header, "a column")
    places = [header.index(name) for name in columns]
    return [[row[place] for place in places] for row in rows]


# Reading ----------------------------------------------------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """Some lines or paragraphs: the number of their first line and of the one behind them, and the bytes of the file up to their end."""

    text: str
    first: int
    following: int
    read: int

    def __repr__(self) -> str:
        return f"<piece from line {self.first}>"


def read_whole(file: str) -> str:
    """Returns the text of a file or of standard input (`-`).

    Raises:
        SourceMissing: when there is no such file.
        RequestInvalid: when it is larger than `MAX_FILE_BYTES`, or not UTF-8.
    """
    with _opened(file) as stream:
        content = stream.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise RequestInvalid(f"at most {MAX_FILE_BYTES} bytes of text", remedy="Split the file, or leave out --json and --syntax.")
    return _decoded(content, 0)


@contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    if file == "-":
        yield sys.stdin.buffer
        return
    if not Path(file).is_file():
        raise SourceMissing("a file that exists", value=file)
    with Path(file).open("rb") as stream:
        yield stream


def _decoded(content: bytes, before: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RequestInvalid("text in UTF-8", value=f"byte {before + error.start}") from None


def pieces_of_lines(stream: BinaryIO, *, first: int = 1, read: int = 0) -> Iterator[Piece]:
    """Yields whole lines in pieces of at most `_PIECE_LINES` lines and about `_PIECE_CHARS` bytes.

    Raises:
        RequestInvalid: when a line is longer than `MAX_LINE_BYTES`, or not UTF-8.
    """
    held: list[str] = []
    for line in iter(lambda: stream.readline(MAX_LINE_BYTES + 1), b""):
        number = first + len(held)
        if len(line) > MAX_LINE_BYTES:
            raise RequestInvalid(
                f"lines of at most {MAX_LINE_BYTES} bytes", value=f"line {number}", remedy=f"A text has at most {MAX_CHARS} characters."
            )
        held.append(_decoded(line, read))
        read += len(line)
        if len(held) == _PIECE_LINES or sum(map(len, held)) > _PIECE_CHARS:
            yield Piece("".join(held), first, number + 1, read)
            held, first = [], number + 1
    if held:
        yield Piece("".join(held), first, first + len(held), read)


def pieces_of_text(stream: BinaryIO, *, first: int = 1, read: int = 0) -> Iterator[Piece]:
    """Yields a running text in one piece where one call takes it, else cut behind the last empty line, or line end, of about every `_PIECE_CHARS` characters.

    Raises:
        RequestInvalid: when a stretch of `MAX_CHARS` characters has no line end, or it is not UTF-8.
    """
    held, cutting = "", read > 0
    for block in _blocks(stream, read):
        held += block
        cutting = cutting or len(held) > MAX_CHARS
        while cutting and (cut := _cut(held)):
            following, read = first + held.count("\n", 0, cut), read + len(held[:cut].encode())
            yield Piece(held[:cut], first, following, read)
            held, first = held[cut:], following
        if len(held) > MAX_CHARS:
            raise RequestInvalid(f"a line end within every {MAX_CHARS} characters", value=f"line {first}", remedy="Split the file.")
    if held:
        yield Piece(held, first, first + held.count("\n"), read + len(held.encode()))


def _blocks(stream: BinaryIO, before: int) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    ended = False
    while not ended:
        block = stream.read(1 << 20)
        ended, waiting = not block, len(decoder.getstate()[0])
        try:
            yield decoder.decode(block, ended)
        except UnicodeDecodeError as error:
            raise RequestInvalid("text in UTF-8", value=f"byte {before - waiting + error.start}") from None
        before += len(block)


def _cut(text: str) -> int:
    """Where a piece ends: behind an empty line, else behind a line end, as late as may be; 0 where that is not known yet."""
    if len(text) <= _PIECE_CHARS:
        return 0
    blank = text.rfind("\n\n", 0, _PIECE_CHARS)
    line = text.rfind("\n", 0, _PIECE_CHARS)
    return blank + 2 if blank > _PIECE_CHARS // 2 else line + 1 if line >= 0 else text.find("\n", _PIECE_CHARS) + 1


# Writing ----------------------------------------------------------------------------------------------------------------------------------------------------


def to_stream(file: str, task: Task, write: Callable[[str], object], *, jobs: int, redactor: Redactor | None = None) -> None:
    """Redacts a file or standard input piece by piece, and writes the pieces in order.

    Args:
        file: a path, or `-`.
        task: its syntax must be text; JSON Lines with `lines`.
        write: takes each piece of the result.
        jobs: processes, >= 1.
        redactor: does the work in this process instead, under a key that stays here.
    """
    with _opened(file) as stream:
        pieces = (pieces_of_lines if task.lines else pieces_of_text)(stream)
        for _, made in _in_order(pieces, task, jobs=jobs, redactor=redactor):
            write(made)


def to_file(file: str, out: Path, task: Task, observer: Observer, *, jobs: int, redactor: Redactor | None = None) -> None:
    """Redacts a file into another, resumes where a killed call stopped, and gives the result its name when it is whole.

    Raises:
        RequestInvalid: when `out` is there already, or is the file itself.
    """
    if out.exists():
        raise RequestInvalid("--out with a name that is not taken", value=str(out))
    if file == "-":
        raise RequestInvalid("--out beside a FILE", remedy="Standard input cannot be resumed; redirect the output instead.")
    partial, state = out.with_name(out.name + ".partial"), out.with_name(out.name + ".resume")
    total = Path(file).stat().st_size if Path(file).is_file() else 0
    with _opened(file) as stream:
        known = _Progress.of(state, stream, task)
        fresh = _Progress.begin(stream, task)
        done = known if known is not None and partial.exists() and partial.stat().st_size >= known.written else fresh
        out.parent.mkdir(parents=True, exist_ok=True)
        stream.seek(done.read)
        with partial.open("ab") as sink:
            sink.truncate(done.written)
            pieces = (pieces_of_lines if task.lines else pieces_of_text)(stream, first=done.line, read=done.read)
            for piece, made in _in_order(pieces, task, jobs=jobs, redactor=redactor):
                sink.write(made.encode())
                sink.flush()
                done = done.after(piece, sink.tell())
                done.save(state)
                observer.progress("bytes", done.read, total, {})
            os.fsync(sink.fileno())
    partial.replace(out)
    state.unlink(missing_ok=True)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Progress:
    """How far a file is done."""

    size: int
    changed_ns: int
    task: str
    read: int
    written: int
    line: int

    @staticmethod
    def begin(stream: BinaryIO, task: Task) -> _Progress:
        seen = os.fstat(stream.fileno())
        made = config.digest_of([task.chosen().digest, task.syntax, task.lines])
        return _Progress(size=seen.st_size, changed_ns=seen.st_mtime_ns, task=made, read=0, written=0, line=1)

    @staticmethod
    def of(state: Path, stream: BinaryIO, task: Task) -> _Progress | None:
        """Returns what an earlier call noted, when it was about this file as it is and this task."""
        try:
            found = _Progress(**json.loads(state.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        start = _Progress.begin(stream, task)
        same = (found.size, found.changed_ns, found.task) == (start.size, start.changed_ns, start.task)
        return found if same and 0 <= found.read <= found.size and found.written >= 0 and found.line >= 1 else None

    def after(self, piece: Piece, written: int) -> _Progress:
        return replace(self, read=piece.read, written=written, line=piece.following)

    def save(self, state: Path) -> None:
        fresh = state.with_name(state.name + ".new")
        fresh.write_text(json.dumps(asdict(self)))
        fresh.replace(state)


_MANIFEST = ".discreet-redact.json"


def folder(source: Path, out: Path, task: Task, observer: Observer, *, jobs: int) -> tuple[int, int]:
    """Redacts every file below a folder, each in the syntax that its name says; files that are done and did not change since are not done again.

    Returns:
        The number of files that were to be done, and of those that could not (named to the observer; nothing of them is written).

    Raises:
        RequestInvalid: when `out` lies in the folder, or holds the result of another policy.
    """
    if out.resolve().is_relative_to(source.resolve()):
        raise RequestInvalid("--out with a folder outside the one that is read")
    _claim(out, task)
    wanted = [path for path in sorted(source.rglob("*")) if path.is_file() and not path.is_symlink()]
    todo = [path for path in wanted if not _is_done(path, out / path.relative_to(source))]
    small = [path for path in todo if path.stat().st_size <= _SMALL_BYTES or _syntax_of(path, task) is not Syntax.TEXT]
    large = [path for path in todo if path not in set(small)]
    failed, done = 0, 0

    def told(path: Path, problem: str | None) -> None:
        nonlocal failed, done
        done += 1
        observer.progress("files", done, len(todo), {})
        if problem is not None:
            failed += 1
            observer.note(f"{path}: {problem}")

    work = ((str(path), str(out / path.relative_to(source)), str(_syntax_of(path, task))) for path in small)
    for (path, _, _), problem in _mapped(_redact_file, work, task, jobs=min(jobs, max(len(small), 1))):
        told(Path(path), problem)
    for path in large:
        try:
            target = out / path.relative_to(source)
            target.unlink(missing_ok=True)
            to_file(str(path), target, task, observer, jobs=jobs)
            told(path, None)
        except DiscreetError as error:
            told(path, str(error))
    return len(todo), failed


def _syntax_of(path: Path, task: Task) -> Syntax:
    return Syntax.TEXT if task.lines else syntax.of_file(path.name)


def _is_done(path: Path, target: Path) -> bool:
    return target.exists() and target.stat().st_mtime_ns >= path.stat().st_mtime_ns


def _claim(out: Path, task: Task) -> None:
    """Notes which policy a folder is made under, so that it never holds files of two."""
    made = {"policy": task.chosen().digest, "lines": task.lines}
    manifest = out / _MANIFEST
    if manifest.exists():
        try:
            same = json.loads(manifest.read_bytes()) == made
        except ValueError:
            same = False
        if not same:
            raise RequestInvalid("--out with a folder made under the same policy", value=str(out), remedy="Choose another folder, or empty this one.")
        return
    out.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps(made))


def _redact_file(redactor: Redactor, work: tuple[str, str, str], task: Task) -> str | None:
    """Redacts one file; returns what is wrong with it, without a word of its text."""
    path, target, written_in = work
    try:
        text = read_whole(path)
        made = redactor.piece(Piece(text, 1, 1, 0)) if task.lines else syntax.redact(text, Syntax(written_in), redactor.policy).text
    except DiscreetError as error:
        return str(error)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    partial = Path(target + ".partial")
    try:
        partial.write_bytes(made.encode())
        partial.replace(target)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return None


# Workers ----------------------------------------------------------------------------------------------------------------------------------------------------

_worker: tuple[Redactor, Task] | None = None


def _start_worker(task: Task) -> None:
    global _worker
    _worker = Redactor(task), task


def _work(function: Callable[[Redactor, Any, Task], Any], item: Any) -> Any:
    if _worker is None:
        raise RuntimeError("a worker without its task")
    return function(_worker[0], item, _worker[1])


def _redact_piece(redactor: Redactor, piece: Piece, _task: Task) -> str:
    return redactor.piece(piece)


def _in_order(pieces: Iterator[Piece], task: Task, *, jobs: int, redactor: Redactor | None) -> Iterator[tuple[Piece, str]]:
    if redactor is not None:
        for piece in pieces:
            yield piece, redactor.piece(piece)
        return
    yield from _mapped(_redact_piece, pieces, task, jobs=jobs)


def _mapped(function: Callable[[Redactor, Any, Task], Any], items: Iterable[Any], task: Task, *, jobs: int) -> Iterator[tuple[Any, Any]]:
    """Yields (item, result) in the order of the items; a single item is done here, more of them by other processes, a few at a time."""
    items = iter(items)
    few = list(itertools.islice(items, 2))
    if jobs == 1 or len(few) < 2:
        redactor = Redactor(task)
        for item in itertools.chain(few, items):
            yield item, function(redactor, item, task)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(task,)) as pool:
        waiting: deque[tuple[Any, Future[Any]]] = deque()
        try:
            for item in itertools.chain(few, items):
                waiting.append((item, pool.submit(_work, function, item)))
                if len(waiting) >= 3 * jobs:
                    yield waiting[0][0], waiting.popleft()[1].result()
            while waiting:
                yield waiting[0][0], waiting.popleft()[1].result()
        except BrokenProcessPool:
            raise OperationFailed(
                "worker processes that stay alive", remedy="One was ended from outside, perhaps for memory. Try --jobs 1."
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
