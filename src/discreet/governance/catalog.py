"""What data exists: every source by name, with its owner, licence, purposes, basis, sensitivity, retention, role and privacy unit, and the digest of its bytes.

A source is registered once. From then on its bytes and its declaration are what was registered, or the run stops (`SourceChanged`, `SourceMissing`):
`discreet catalog register --again` registers it anew, on purpose and in the log. What can never be registered: the same bytes under a second name (they
would get a second budget, PITFALLS 19), and a lower sensitivity than before (sensitive text would reach the public track).

`collect` turns a source into `Record`s. The file is read once: the bytes that are hashed are the bytes that are parsed. A record's digest is
    "sha256:" + SHA-256(salt || JSON array [source, id, text])         with the salt derived from the subject's key,
so it commits to the text, and once the key is forgotten it links to nobody. Only the digest, the source and the subject's pseudonym are stored; the text
never is. The records of an erased subject are dropped here, before a digest of theirs exists.

A source is a file, a folder of texts, a glob of files, the result of an SQL query, or what fsspec reads from an object store; generated sources (the audit's
canaries, the drill's people) are handed over in memory and never written. `SourceFiles` removes an erased subject's rows from the local files (`[erasure] sources`).

Errors name the source and the line, row or file number, never the content, an identifier or the name of a file in a folder (it can be a person's).

Does not cover: sources larger than memory, encodings other than UTF-8, and people who are in two sources under two privacy units.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import shutil
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final

from sqlalchemy import Column, Connection, Float, Integer, String, Table, Text, delete, insert, select, update

from discreet.config import Project, SourceSection
from discreet.errors import (
    ConfigInvalid,
    ErasureIncomplete,
    NotFound,
    RecordConflict,
    RecordInvalid,
    SourceChanged,
    SourceEmpty,
    SourceMissing,
    SourceNotText,
    TrackRefused,
    missing_extra,
)
from discreet.evidence.log import Log
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.governance import lineage
from discreet.governance.erasure import erased
from discreet.governance.lineage import Artifact, Kind
from discreet.keys import Agree, Key, Keyring
from discreet.record import Digest, Record, Sensitive, Sensitivity, SubjectId
from discreet.store import Store, metadata, now

_File = tuple[str, bytes]
"""A name, and bytes."""

BATCH = 512
"""Most record digests in one statement."""

_SECONDS_A_DAY = 86_400
MAX_FIELD_CHARS = 16 * 1024 * 1024

_sources = Table(
    "sources",
    metadata,
    Column("name", String(63), primary_key=True),
    Column("digest", String(71), nullable=False),
    Column("declaration", Text, nullable=False),
    Column("unit", String(64), nullable=False),
    Column("registered_at", Float, nullable=False),
    Column("num_dropped", Integer, nullable=False),
)
_versions = Table("source_versions", metadata, Column("digest", String(71), primary_key=True), Column("name", String(63), nullable=False))
records = Table(
    "records",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("source", String(63), nullable=False, index=True),
    Column("subject", String(32), nullable=False, index=True),
    Column("state", String(12), nullable=False),
    Column("collected_at", Float, nullable=False),
)
COLLECTED, SUPERSEDED, SIGHTED = "collected", "superseded", "sighted"
"""`SIGHTED` rows lie in a source that has grown and were not collected yet: only their time counts, for retention."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredSource:
    """A source as it was registered. `digest` is the SHA-256 of its bytes, `unit` the privacy unit that its column names ("patient")."""

    section: SourceSection
    path: Path
    opt_outs: Path | None
    digest: Digest
    unit: str
    generated: Sensitive[bytes] | None = None

    @property
    def name(self) -> str:
        return self.section.name

    def subject(self, keyring: Keyring, value: str) -> SubjectId:
        """Returns the pseudonym of the privacy unit that this source calls `value`; in a public source each record is its own unit."""
        if self.section.sensitivity is Sensitivity.PUBLIC:
            return subject_id(keyring, unit=f"record/{self.name}", value=value)
        return subject_id(keyring, unit=self.unit, value=value)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """One record as the file has it; `place` is where ("line 7")."""

    place: str
    id: str
    unit: str
    text: str
    known: dict[str, tuple[str, ...]]

    def __repr__(self) -> str:
        return f"<row at {self.place}>"


class Catalog:
    """The sources and records of one project."""

    name = "catalog"

    def __init__(self, store: Store, keyring: Keyring, log: Log) -> None:
        self._store = store
        self._keyring = keyring
        self._log = log

    def register(self, project: Project, section: SourceSection, *, generated: bytes | None = None) -> RegisteredSource:
        """Registers a source, or finds it unchanged since it was registered.

        Args:
            project: the open project.
            section: the declaration.
            generated: JSON Lines of a generated source, which lies in no file.

        Raises:
            SourceMissing: when the file or folder is not there.
            SourceEmpty: when there is nothing in it.
            SourceChanged: when its bytes or its declaration are not those that were registered.
            RecordConflict: when the same bytes are registered under another name.
        """
        source = _describe(project, section, generated=generated)
        declaration = _declaration(project, section)
        with self._store.transaction() as tx:
            stored = tx.execute(select(_sources).where(_sources.c.name == source.name)).one_or_none()
            if stored is None:
                _claim_bytes(tx, source)
                tx.execute(insert(_sources).values(name=source.name, num_dropped=0, **_source_row(project, source, at=now(tx))))
            elif stored.digest != source.digest:
                raise _changed(source.name)
            elif stored.declaration != declaration:
                raise _changed(f"{source.name}, {_difference(stored.declaration, declaration)}")
        return source

    def register_again(self, project: Project, section: SourceSection) -> RegisteredSource:
        """Registers the present bytes and declaration of a source in place of the earlier ones. Its name, and so its budget, stay.

        Raises:
            SourceMissing, SourceEmpty, RecordConflict: as `register`.
            NotFound: when no source of that name was registered.
            TrackRefused: when the sensitivity would sink.
        """
        source = _describe(project, section)
        with self._store.transaction() as tx:
            stored = tx.execute(select(_sources).where(_sources.c.name == source.name)).one_or_none()
            if stored is None:
                raise NotFound("a registered source", value=source.name, remedy="Register it without --again.")
            _check_sensitivity(json.loads(stored.declaration)["sensitivity"], section)
            _claim_bytes(tx, source)
            tx.execute(update(_sources).where(_sources.c.name == source.name).values(_source_row(project, source, at=now(tx))))
        return source

    def collect(self, source: RegisteredSource) -> list[Record]:
        """Reads the records of a source and logs those that are new. Idempotent; records of erased subjects are left out and logged as refused.

        Raises:
            SourceChanged, SourceMissing: when the source is not what was registered.
            SourceEmpty, SourceNotText, RecordInvalid, RecordConflict: when its content breaks a rule; the value says where.
        """
        files = _read(source.path, source.section) if source.generated is None else [("", source.generated.reveal())]
        if _digest_of_files(files, source.section.format) != source.digest:
            raise _changed(source.name)
        collected, num_dropped = self._living(source, files, self._keyring.subjects)
        with self._store.transaction() as tx:
            self._write(tx, source, collected, num_dropped=num_dropped)
        return collected

    def sample(self, source: RegisteredSource) -> list[Record]:
        """Returns the records of a source as it lies there now, for classification; logs and keeps nothing, of whoever was never seen before not even a key. Errors as `collect`."""
        return self._living(source, _read(source.path, source.section), self._seen)[0]

    def _living(
        self, source: RegisteredSource, files: Sequence[_File], keys_of: Callable[[list[SubjectId]], Mapping[SubjectId, Key]]
    ) -> tuple[list[Record], int]:
        """The records of everybody who was not erased, and how many others there are."""
        rows = _collapse(_rows(files, source.section), source.name)
        subjects = [source.subject(self._keyring, row.unit) for row in rows]
        with self._store.transaction() as tx:
            gone = erased(tx, self._keyring, list(dict.fromkeys(subjects)))
        keys = keys_of([subject for subject in subjects if subject not in gone])
        living = [_record(source, subject, keys[subject], row) for row, subject in zip(rows, subjects, strict=True) if subject in keys]
        return living, len(rows) - len(living)

    def _seen(self, subjects: list[SubjectId]) -> Mapping[SubjectId, Key]:
        """The keys of subjects, and for whoever has none one that is derived and kept nowhere: their records have other digests once they are collected."""
        passing = self._keyring.purpose("records not collected")
        return {subject: passing.derive(subject) for subject in subjects} | self._keyring.existing(subjects)

    def present(self, project: Project, section: SourceSection) -> RegisteredSource:
        """Returns a source as it lies there now, whatever was registered: what a person may see and what must go does not wait for a registration.

        Raises:
            SourceMissing, SourceEmpty: as `register`.
        """
        return _describe(project, section)

    def sight(self, source: RegisteredSource) -> None:
        """Notes when the rows of a source that were not collected yet were first seen, so that their retention runs. Logs nothing; erased subjects are left out.

        Raises:
            SourceNotText, RecordInvalid, RecordConflict: as `collect`.
        """
        present, _ = self._living(source, _read(source.path, source.section), self._keyring.subjects)
        with self._store.transaction() as tx:
            state = _states(tx, source.name)
            new = [record for record in present if record.digest not in state]
            _drop(tx, [d for d, s in state.items() if s == SIGHTED and d not in {record.digest for record in present}])
            if new:
                tx.execute(insert(records), _record_rows(new, SIGHTED, at=now(tx)))

    def texts_of(self, source: RegisteredSource, subject: SubjectId) -> list[tuple[Digest, Sensitive[str], Sensitive[Mapping[str, tuple[str, ...]]]]]:
        """Returns the subject's own texts and known identifiers as the source has them now, and the digest that each record has if it was collected; logs and keeps nothing."""
        files = _read(source.path, source.section) if source.generated is None else [("", source.generated.reveal())]
        rows = [row for row in _collapse(_rows(files, source.section), source.name) if source.subject(self._keyring, row.unit) == subject]
        if not rows:
            return []
        key = self._seen([subject])[subject]
        records_of = [_record(source, subject, key, row) for row in rows]
        return [(record.digest, record.text, record.known) for record in records_of]

    def past_retention(self, sections: Sequence[SourceSection] = ()) -> list[SubjectId]:
        """Returns the subjects all of whose records are past the retention of their source, by the time at which they were recorded.

        Args:
            sections: sources that may not be registered yet, whose rows were sighted.

        Raises:
            ClockBackwards: when the clock was set back: nothing gets younger by it.
        """
        with self._store.transaction() as tx:
            known = {section.name: section for section in sections} | declared(tx)
            at, kept_for = now(tx), {name: section.retention_days * _SECONDS_A_DAY for name, section in known.items()}
            rows = tx.execute(select(records.c.subject, records.c.source, records.c.collected_at)).all()
        over: dict[SubjectId, bool] = {}
        for row in rows:
            past = at - row.collected_at > kept_for.get(row.source, math.inf)
            over[SubjectId(row.subject)] = over.get(SubjectId(row.subject), True) and past
        return sorted(subject for subject, past in over.items() if past)

    def sources(self) -> list[dict[str, Any]]:
        """Returns what was registered, by name: the declaration, the privacy unit and the digest of the bytes, as JSON values. No count of records."""
        with self._store.transaction() as tx:
            rows = tx.execute(select(_sources).order_by(_sources.c.name)).all()
        return [{**json.loads(row.declaration)["section"], "privacy_unit": row.unit, "digest": row.digest} for row in rows]

    def changed(self, project: Project, section: SourceSection) -> bool:
        """Returns whether a registered source has other bytes now."""
        with self._store.transaction() as tx:
            stored = tx.execute(select(_sources.c.digest).where(_sources.c.name == section.name)).scalar_one_or_none()
        return stored is not None and stored != _describe(project, section).digest

    def holds_in(self, tx: Connection, subject: SubjectId) -> Sequence[Digest]:
        """Returns the digests of the subject's records, inside the caller's transaction."""
        return digests_of(tx, subject)

    def holds(self, subject: SubjectId) -> Sequence[Digest]:
        """Returns the digests of the subject's records (`erasure.Store`)."""
        with self._store.transaction() as tx:
            return digests_of(tx, subject)

    def purge(self, subject: SubjectId) -> None:
        """Deletes the subject's record rows (`erasure.Store`)."""
        with self._store.transaction() as tx:
            tx.execute(delete(records).where(records.c.subject == subject))
        self._store.scrub()

    def absence(self, subject: SubjectId) -> bool:
        """Returns whether no record row of the subject is left (`erasure.Store`)."""
        with self._store.transaction() as tx:
            return tx.execute(select(records.c.digest).where(records.c.subject == subject).limit(1)).one_or_none() is None

    def _write(self, tx: Connection, source: RegisteredSource, collected: Sequence[Record], *, num_dropped: int) -> None:
        state = _states(tx, source.name)
        new = [record for record in collected if state.get(record.digest, SIGHTED) == SIGHTED]
        present = {record.digest for record in collected}
        _drop(tx, [d for d, s in state.items() if s == SIGHTED and d not in present])
        _set_state(tx, [record.digest for record in new if record.digest in state], COLLECTED)  # their time is that of the first sight
        _set_state(tx, [d for d, s in state.items() if d not in present and s == COLLECTED], SUPERSEDED)
        _set_state(tx, [d for d, s in state.items() if d in present and s == SUPERSEDED], COLLECTED)
        if unseen := [record for record in new if record.digest not in state]:
            tx.execute(insert(records), _record_rows(unseen, COLLECTED, at=now(tx)))
        if new:
            lineage.register(tx, [Artifact(digest=record.digest, kind=Kind.RECORD) for record in new])
        for batch in lineage.chunks([record.digest for record in new], BATCH):
            facts = {"source": source.name, "source_digest": source.digest, "sensitivity": source.section.sensitivity.value}
            self._log.append(tx, Statement(predicate=Predicate.COLLECTED, subjects=tuple(batch), fields=facts))
        mine = _sources.c.name == source.name
        if num_dropped != tx.execute(select(_sources.c.num_dropped).where(mine)).scalar_one():
            tx.execute(update(_sources).where(mine).values(num_dropped=num_dropped))
            fields: dict[str, JSON] = {"source": source.name, "purpose": "*", "reason": "erased", "num_records": num_dropped}
            self._log.append(tx, Statement(predicate=Predicate.REFUSED, subjects=(source.digest,), fields=fields))


class SourceFiles:
    """What the source files hold of a subject, and the opt-out lists beside them, for `governance.erasure`.

    With `[erasure] sources = "rewrite"` their rows are removed, also from a file that has grown or was changed since it was registered: a right to erasure does not wait for a
    registration. The registered digest moves to the new bytes before the file does, so that a killed purge is finished by the next one; where the file is not what was registered, the
    registration stays as it is, and the source is still refused as changed until somebody registers it again. A database or an object store is its owner's to purge: until
    `[erasure] retain` names it (the owner deletes there, or keeps on a ground of their own), an erasure fails with the owner's name, for a known and an unknown subject alike. The
    certificate names what was left to its owner.
    """

    def __init__(self, project: Project, keyring: Keyring, store: Store) -> None:
        self._project = project
        self._keyring = keyring
        self._store = store
        kept = {*project.erasure.retain} if project.erasure.sources == "rewrite" else {section.name for section in project.source}
        self._sections = tuple(section for section in project.source if section.name not in kept)
        left = ", ".join(f"{section.name} (left to {section.owner})" for section in project.source if section.name in kept)
        self.name = f"sources but for {left}" if left else "sources"

    def holds(self, subject: SubjectId) -> Sequence[Digest]:
        """Returns the registered digests of the sources that have rows of the subject."""
        return sorted(source.digest for source in self._local() if self._has(source, subject))

    def purge(self, subject: SubjectId) -> None:
        """Rewrites every local file without the subject's rows, and every opt-out list without their line.

        Raises:
            ErasureIncomplete: when a source cannot be rewritten; the value names its owner.
        """
        for source in self._local():
            self._rewrite(source, subject)
            if source.opt_outs is not None and source.opt_outs.is_file():
                _rewrite_opt_outs(source, subject, self._keyring)
        for section in self._sections:
            if not _is_local(section):
                raise _owner_must(section)

    def absence(self, subject: SubjectId) -> bool:
        """Reads every local file again."""
        listed = any(subject in _opted_out(source, self._keyring) for source in self._local())
        return not listed and not any(self._has(source, subject) for source in self._local())

    def _local(self) -> Iterator[RegisteredSource]:
        """Every local source that lies in its place; a source that was never there holds nobody, one that went away since is its owner's to name."""
        for section in self._sections:
            if not _is_local(section):
                continue
            try:
                yield _describe(self._project, section)
            except SourceEmpty:
                continue
            except SourceMissing:
                if self._registered(section.name) is None:
                    continue
                raise _owner_must(section) from None

    def _registered(self, name: str) -> str | None:
        with self._store.transaction() as tx:
            return tx.execute(select(_sources.c.digest).where(_sources.c.name == name)).scalar_one_or_none()

    def _has(self, source: RegisteredSource, subject: SubjectId) -> bool:
        return any(source.subject(self._keyring, row.unit) == subject for row in _rows(_read(source.path, source.section), source.section))

    def _rewrite(self, source: RegisteredSource, subject: SubjectId) -> None:
        files = _read(source.path, source.section)
        kept = [(name, _without(name, content, source, lambda unit: source.subject(self._keyring, unit) == subject)) for name, content in files]
        after = _digest_of_files([(name, content) for name, content in kept if content is not None], source.section.format)
        registered = self._registered(source.name)
        if after == source.digest:
            return  # nothing of theirs is in it; whether it may be used as it is, `register` decides
        if registered in (source.digest, after):
            with self._store.transaction() as tx:
                tx.execute(update(_sources).where(_sources.c.name == source.name).values(digest=after))
                tx.execute(delete(_versions).where(_versions.c.digest == after))
                tx.execute(insert(_versions).values(digest=after, name=source.name))
        paths = _paths(source)
        for (_, before), (name, content) in zip(files, kept, strict=True):
            if content != before:
                _put_back(paths[name], content, source.section)


def _owner_must(section: SourceSection) -> ErasureIncomplete:
    return ErasureIncomplete(
        "sources that can be rewritten without the erased subject",
        value=f"source {section.name}; responsible: {section.owner}",
        remedy=f"Ask the owner to delete the records at their origin, then leave the source to them, as also where they keep them on their own legal ground: [erasure] retain = ['{section.name}'].",
    )


def _paths(source: RegisteredSource) -> dict[str, Path]:
    if source.section.format == "text":
        return {file.relative_to(source.path).as_posix(): file for file in source.path.rglob("*.txt")}
    return {file.name: file for file in _matches(source.path)} if _is_glob(source.section.path) else {"": source.path}


def _without(name: str, content: bytes, source: RegisteredSource, is_theirs: Callable[[str], bool]) -> bytes | None:
    """Returns the bytes of one file without the rows of a subject; None removes a text file."""
    section = source.section
    file = [(name, content)]
    if section.format == "text":
        return None if any(is_theirs(row.unit) for row in _rows(file, section)) else content
    theirs = {int(row.place.rpartition(" ")[2]) for row in _rows(file, section) if is_theirs(row.unit)}
    if not theirs:
        return content
    if section.format == "parquet":
        return _parquet_without(content, theirs)
    if section.format == "jsonl":
        return b"\n".join(line for number, line in enumerate(content.split(b"\n"), start=1) if number not in theirs)
    return _csv_without(content, theirs)


def _csv_without(content: bytes, theirs: set[int]) -> bytes:
    """Drops the physical lines of records that end at the line numbers `theirs`: a quoted field may span several."""
    lines = content.splitlines(keepends=True) if b"\r\n" in content else [line + b"\n" for line in content.split(b"\n")]
    reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
    kept = bytearray()
    start = 0
    for _ in reader:
        end = reader.line_num
        if end not in theirs:
            kept += b"".join(lines[start:end])
        start = end
    return bytes(kept)


def _parquet_without(content: bytes, theirs: set[int]) -> bytes:
    from pyarrow import BufferOutputStream, BufferReader, array
    from pyarrow.parquet import read_table, write_table

    table = read_table(BufferReader(content))
    sink = BufferOutputStream()
    write_table(table.filter(array([number not in theirs for number in range(1, table.num_rows + 1)])), sink)
    return bytes(sink.getvalue().to_pybytes())


def _put_back(path: Path, content: bytes | None, section: SourceSection) -> None:
    try:
        if content is None:
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()  # the folder is named after the unit
            return
        partial = path.with_name(path.name + ".partial")
        partial.write_bytes(content)
        shutil.copymode(path, partial)
        partial.replace(path)
    except OSError:
        raise _owner_must(section) from None


def _opted_out(source: RegisteredSource, keyring: Keyring) -> set[SubjectId]:
    if source.opt_outs is None or not source.opt_outs.is_file():
        return set()
    lines = source.opt_outs.read_text("utf-8-sig").splitlines()
    return {source.subject(keyring, line) for line in lines if line.strip()}


def _rewrite_opt_outs(source: RegisteredSource, subject: SubjectId, keyring: Keyring) -> None:
    """The objection itself is kept, as an HMAC in `consent`: the plain line is not needed."""
    path = source.opt_outs
    if path is None or subject not in _opted_out(source, keyring):
        return
    lines = path.read_text("utf-8-sig").splitlines(keepends=True)
    kept = [line for line in lines if not line.strip() or source.subject(keyring, line) != subject]
    _put_back(path, "".join(kept).encode(), source.section)


def subject_id(keyring: Keyring, *, unit: str, value: str) -> SubjectId:
    """Returns the pseudonym of the privacy unit `value` ("MRN-12") of the scheme `unit` ("patient"), as every source of that scheme derives it."""
    return keyring.pseudonym(_scheme(unit, value))


def declare_same(keyring: Keyring, *, unit: str, pairs: Sequence[tuple[str, str]], agree: Agree | None = None) -> int:
    """Makes second identifiers of a scheme one person with the first. Arguments and errors as `Keyring.declare_same`."""
    return keyring.declare_same([(_scheme(unit, second), _scheme(unit, first)) for second, first in pairs], agree=agree)


def _scheme(unit: str, value: str) -> str:
    return f"{unit}:{unicodedata.normalize('NFC', value).strip()}"


def digests_of(tx: Connection, subject: SubjectId) -> list[Digest]:
    """Returns the digests of the subject's records that were collected."""
    query = select(records.c.digest).where(records.c.subject == subject, records.c.state != SIGHTED).order_by(records.c.digest)
    return [Digest(digest) for digest in tx.execute(query).scalars()]


def declared(tx: Connection) -> dict[str, SourceSection]:
    """Returns the declaration of every registered source by its name."""
    rows = tx.execute(select(_sources.c.name, _sources.c.declaration))
    return {row.name: SourceSection.model_validate(json.loads(row.declaration)["section"]) for row in rows}


def _record(source: RegisteredSource, subject: SubjectId, key: Key, row: _Row) -> Record:
    salt = key.stream("record").bytes(32)
    content = json.dumps([source.name, row.id, row.text], ensure_ascii=False, separators=(",", ":")).encode()
    return Record(
        digest=Digest("sha256:" + hashlib.sha256(salt + content).hexdigest()),
        source=source.name,
        subject=subject,
        sensitivity=source.section.sensitivity,
        text=Sensitive(row.text),
        known=Sensitive(row.known),
    )


def _record_rows(new: Iterable[Record], state: str, *, at: float) -> list[dict[str, Any]]:
    return [{"digest": r.digest, "source": r.source, "subject": r.subject, "state": state, "collected_at": at} for r in new]


def _states(tx: Connection, source: str) -> dict[Digest, str]:
    return {Digest(row.digest): row.state for row in tx.execute(select(records.c.digest, records.c.state).where(records.c.source == source))}


def _drop(tx: Connection, digests: Sequence[Digest]) -> None:
    for chunk in lineage.chunks(digests):
        tx.execute(delete(records).where(records.c.digest.in_(chunk)))


def _set_state(tx: Connection, digests: Sequence[Digest], state: str) -> None:
    for chunk in lineage.chunks(digests):
        tx.execute(update(records).where(records.c.digest.in_(chunk)).values(state=state))


# Registration


def _describe(project: Project, section: SourceSection, *, generated: bytes | None = None) -> RegisteredSource:
    path = _place(project, section)
    files = _read(path, section) if generated is None else [("", generated)]
    opt_outs = project.path(section.opt_outs) if section.opt_outs else None
    digest = _digest_of_files(files, section.format)
    sealed = None if generated is None else Sensitive(generated)
    return RegisteredSource(section=section, path=path, opt_outs=opt_outs, digest=digest, unit=project.privacy.unit, generated=sealed)


def _place(project: Project, section: SourceSection) -> Path:
    """Where a local source lies; for a database or an object store the folder of the project."""
    return project.path(section.path) if _is_local(section) else project.root


def _is_local(section: SourceSection) -> bool:
    return not section.query and "://" not in section.path


def _source_row(project: Project, source: RegisteredSource, *, at: float) -> dict[str, Any]:
    return {"digest": source.digest, "declaration": _declaration(project, source.section), "unit": source.unit, "registered_at": at}


def _declaration(project: Project, section: SourceSection) -> str:
    """Canonical JSON of everything that was declared, but for the opt-out list, which may change at any time."""
    declared_here = section.model_dump(mode="json", exclude={"opt_outs"})
    whole = {
        "section": declared_here,
        "controller": project.project.controller,
        "unit": project.privacy.unit,
        "sensitivity": section.sensitivity.value,
    }
    return json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _difference(stored: str, declaration: str) -> str:
    """Names the declared keys that differ, never their values."""
    old, new = json.loads(stored), json.loads(declaration)
    keys = [key for key in new["section"] if old["section"].get(key) != new["section"][key]]
    keys += [key for key in ("controller", "unit") if old[key] != new[key]]
    return "declaration of " + ", ".join(keys)


def _changed(what: str) -> SourceChanged:
    remedy = "Restore it, register the new text under a new name, or replace the registration on purpose: `discreet catalog register NAME --again`."
    return SourceChanged("a source as it was registered", value=what, remedy=remedy)


def _claim_bytes(tx: Connection, source: RegisteredSource) -> None:
    owner = tx.execute(select(_versions.c.name).where(_versions.c.digest == source.digest)).scalar_one_or_none()
    if owner is None:
        tx.execute(insert(_versions).values(digest=source.digest, name=source.name))
    elif owner != source.name:
        raise RecordConflict("a body of text to have one name", value=f"{owner} and {source.name}", remedy=f"Use the source '{owner}'.")


def _check_sensitivity(before: str, section: SourceSection) -> None:
    order = list(Sensitivity)
    if order.index(section.sensitivity) < order.index(Sensitivity(before)):
        raise TrackRefused(
            "a source whose sensitivity does not sink",
            value=f"{section.name}, {before} to {section.sensitivity.value}",
            remedy="Register text that is less sensitive as a new source.",
        )


# Reading


def _read(path: Path, section: SourceSection) -> list[_File]:
    """Reads every byte of the source once: what is hashed is what is parsed."""
    try:
        files = _files_of(path, section)
    except OSError as error:
        remedy = "Restore it, or remove the [[source]]."
        raise SourceMissing(f"a readable {_NOUN[section.format]}", value=f"source {section.name}, {type(error).__name__}", remedy=remedy) from None
    if not any(content.strip() for _, content in files):
        raise SourceEmpty("a source with something in it", value=f"source {section.name}")
    return files


def _files_of(path: Path, section: SourceSection) -> list[_File]:
    if section.query:
        return [("", _read_query(path, section))]
    if not _is_local(section):
        return _read_remote(section)
    if section.format == "text":
        return _read_folder(path, section.name)
    if _is_glob(section.path):
        found = [file for file in sorted(_matches(path)) if file.is_file()]
        return [(file.name, file.read_bytes()) for file in found] or _nothing_there()
    return [("", path.read_bytes())]


def _is_glob(path: str) -> bool:
    return any(mark in path for mark in "*?[")


def _matches(pattern: Path) -> Iterator[Path]:
    return Path(pattern.anchor).glob(str(pattern.relative_to(pattern.anchor)))


def _nothing_there() -> NoReturn:
    raise FileNotFoundError


def _read_remote(section: SourceSection) -> list[_File]:
    """Reads objects through fsspec; a folder of texts would need listing rights, so it stays local."""
    try:
        from fsspec.core import url_to_fs  # 0.1 s to import; only projects with an object store pay
    except ImportError:
        raise missing_extra("governance", "fsspec") from None
    if section.format == "text":
        raise ConfigInvalid("a local folder for format = 'text'", value=f"source {section.name}")
    try:
        system, path = url_to_fs(section.path)
        found = sorted(system.glob(path)) if _is_glob(path) else [path]
        return [(str(name).rpartition("/")[2], system.cat_file(name)) for name in found] or _nothing_there()
    except ImportError as error:
        remedy = f"pip install {error.name or 'the package that fsspec names for this protocol'}"
        raise SourceMissing("an installed driver of the object store", value=f"source {section.name}", remedy=remedy) from None
    except ValueError:
        raise ConfigInvalid("a URL of a protocol that fsspec knows", value=f"source {section.name}") from None


def _read_query(root: Path, section: SourceSection) -> bytes:
    """Runs the declared query and returns its rows as JSON Lines; the address may hold a password and is in no message."""
    import os

    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    if section.format != "jsonl":
        raise ConfigInvalid("format = 'jsonl', or none, for a source with a query", value=f"source {section.name}")
    url = os.environ.get(section.path.removeprefix("env:"), "") if section.path.startswith("env:") else section.path
    local = "sqlite:///"
    url = local + str(root / url.removeprefix(local)) if url.startswith(local) else url
    failed = ""
    try:
        if url.startswith(local) and not Path(url.removeprefix(local)).is_file():
            raise FileNotFoundError
        engine = create_engine(url, hide_parameters=True)
        try:
            with engine.connect() as connection:
                rows = [dict(row) for row in connection.execute(text(section.query)).mappings()]
        finally:
            engine.dispose()
        return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows).encode()
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError):
        failed = "a database URL in path"
    except SQLAlchemyError as error:
        failed = f"a query that the database answers, not {type(error).__name__}"
    raise SourceMissing(failed, value=f"source {section.name}", remedy="Check path and query of the [[source]].")


_NOUN = {"text": "folder of .txt files", "jsonl": "JSON Lines file", "csv": "CSV file", "parquet": "Parquet file"}


def _read_folder(path: Path, name: str) -> list[_File]:
    if not path.is_dir():
        raise NotADirectoryError
    found = sorted(file for file in path.rglob("*.txt") if file.is_symlink() or file.is_file())
    for number, file in enumerate(found, start=1):
        if not file.resolve().is_relative_to(path.resolve()):
            raise RecordInvalid(
                "files that lie in the folder of their source", value=f"file {number} of source {name}", remedy="Replace the link by a copy."
            )
    return [(file.relative_to(path).as_posix(), file.read_bytes()) for file in found]


def _digest_of_files(files: Sequence[_File], layout: str) -> Digest:
    """Returns the SHA-256 of the one file, or of the list of names and digests of a folder or glob (length-prefixed by JSON)."""
    if layout != "text" and len(files) == 1:
        return Digest("sha256:" + hashlib.sha256(files[0][1]).hexdigest())
    listing = json.dumps([[name, hashlib.sha256(content).hexdigest()] for name, content in files], ensure_ascii=True)
    return Digest("sha256:" + hashlib.sha256(listing.encode()).hexdigest())


def _rows(files: Sequence[_File], section: SourceSection) -> Iterator[_Row]:
    readers: dict[str, Callable[[Sequence[_File], SourceSection], Iterator[tuple[str, Mapping[str, object]]]]]
    readers = {"jsonl": _json_lines, "csv": _csv_rows, "parquet": _parquet_rows, "text": _text_files}
    if section.format == "text" or len(files) == 1:
        parts = [("", files)]
    else:
        parts = [(f"file {number}, ", [file]) for number, file in enumerate(files, start=1)]
    for prefix, part in parts:
        for place, fields in readers[section.format](part, section):
            yield _row(prefix + place, fields, section)


def _json_lines(files: Sequence[_File], section: SourceSection) -> Iterator[tuple[str, Mapping[str, object]]]:
    text = _decode(files[0][1], section.name, place="line")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            place = f"line {number}"
            yield place, _json_object(line, f"{place} of source {section.name}")


def _json_object(line: str, where: str) -> Mapping[str, object]:
    parsed: object = None
    failure = ""
    try:
        parsed = json.loads(line, object_pairs_hook=_distinct_keys)
    except _DuplicateKey:
        failure = "JSON keys that occur once"
    except (ValueError, RecursionError):
        failure = "a line to be one JSON object"
    # Raised outside the handler: the parser's exception holds the line, and must not travel as the context of ours.
    if failure or not isinstance(parsed, dict):
        raise RecordInvalid(failure or "a line to be one JSON object", value=where)
    return parsed


class _DuplicateKey(ValueError):
    """A JSON object has one key twice; which of the values counts is anybody's guess."""


def _distinct_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _DuplicateKey
    return fields


def _csv_rows(files: Sequence[_File], section: SourceSection) -> Iterator[tuple[str, Mapping[str, object]]]:
    csv.field_size_limit(MAX_FIELD_CHARS)
    reader = csv.reader(io.StringIO(_decode(files[0][1], section.name, place="line"), newline=""), strict=True)
    header = _next_csv(reader, section.name) or []
    if len(set(header)) != len(header):
        raise RecordInvalid("a CSV header whose columns are distinct", value=f"line 1 of source {section.name}")
    _check_columns(header, section)
    while (values := _next_csv(reader, section.name)) is not None:
        if not values:
            continue  # an empty line between records
        if len(values) != len(header):
            raise RecordInvalid(
                f"{len(header)} values, as in the header", value=f"{len(values)} values, line {reader.line_num} of source {section.name}"
            )
        yield f"line {reader.line_num}", dict(zip(header, values, strict=True))


def _next_csv(reader: Any, name: str) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error:
        pass
    raise RecordInvalid("a line to be CSV (RFC 4180)", value=f"line {reader.line_num} of source {name}")


def _parquet_rows(files: Sequence[_File], section: SourceSection) -> Iterator[tuple[str, Mapping[str, object]]]:
    from pyarrow import ArrowException, BufferReader  # 0.3 s to import; only projects with Parquet pay
    from pyarrow.parquet import ParquetFile

    table = None
    columns: list[str] = []
    try:
        file = ParquetFile(BufferReader(files[0][1]))
        columns = file.schema_arrow.names
        table = file.read(columns=[column for column in _columns(section) if column in columns])
    except (ArrowException, OSError, ValueError):
        pass
    if table is None:
        raise SourceNotText("a readable Parquet file", value=f"source {section.name}")
    _check_columns(columns, section)
    for number, fields in enumerate(table.to_pylist(), start=1):
        yield f"row {number}", fields


def _text_files(files: Sequence[_File], section: SourceSection) -> Iterator[tuple[str, Mapping[str, object]]]:
    for number, (name, content) in enumerate(files, start=1):
        place = f"file {number}"
        text = _decode(content, section.name, place=f"{place}, line")
        yield place, {"id": name, "text": text, "unit": name.rpartition("/")[0]}


def _decode(content: bytes, name: str, *, place: str) -> str:
    if (nul := content.find(b"\x00")) >= 0:
        raise SourceNotText("text, not a binary file", value=f"a NUL byte, {place} {content.count(bytes([10]), 0, nul) + 1} of source {name}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
    raise SourceNotText("text in UTF-8", value=f"{place} {line} of source {name}", remedy="Convert it to UTF-8 (iconv).")


def _columns(section: SourceSection) -> list[str]:
    unit = [] if _is_own_unit(section) else [section.unit]
    return list(dict.fromkeys([section.text, section.id, *unit, *section.known.values()]))


def _check_columns(header: Sequence[str], section: SourceSection) -> None:
    for column in _columns(section):
        if column not in header:
            raise RecordInvalid(f"a column '{column}', as [[source]] declares it", value=f"source {section.name}")


def _is_own_unit(section: SourceSection) -> bool:
    return section.sensitivity is Sensitivity.PUBLIC


# Rows


def _row(place: str, fields: Mapping[str, object], section: SourceSection) -> _Row:
    where = f"{place} of source {section.name}"
    id_column, unit_column, text_column = ("id", "unit", "text") if section.format == "text" else (section.id, section.unit, section.text)
    record_id = _identifier(fields.get(id_column), "id", where)
    unit = record_id if _is_own_unit(section) else _identifier(fields.get(unit_column), "privacy unit", where)
    text = fields.get(text_column)
    if not isinstance(text, str) or not text.strip():
        _invalid("a record with text", where)
    known = {label: _known(fields.get(column), where) for label, column in section.known.items()}
    row = _Row(place=place, id=record_id, unit=unit, text=text, known={label: values for label, values in known.items() if values})
    _check_unicode(row, where)
    return row


def _identifier(value: object, what: str, where: str) -> str:
    """Accepts text and whole numbers; a float has more than one spelling, and an identifier must not."""
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        _invalid(f"a record with {'an' if what == 'id' else 'a'} {what} (text or a whole number)", where)
    return unicodedata.normalize("NFC", str(value)).strip()


def _known(value: object, where: str) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not all(v is None or (isinstance(v, str | int) and not isinstance(v, bool)) for v in values):
        _invalid("known identifiers that are text, whole numbers or lists of them", where)
    return tuple(str(v).strip() for v in values if v is not None and str(v).strip())


def _check_unicode(row: _Row, where: str) -> None:
    """Refuses what JSON can spell and UTF-8 cannot: lone surrogates; and NUL, which is not text."""
    for value in (row.id, row.unit, row.text, *(v for values in row.known.values() for v in values)):
        if "\x00" in value or any("\ud800" <= char <= "\udfff" for char in value):
            _invalid("text without NUL and lone surrogates", where)


def _invalid(rule: str, where: str) -> NoReturn:
    raise RecordInvalid(rule, value=where)


def _collapse(rows: Iterable[_Row], name: str) -> list[_Row]:
    """Keeps one of identical records, and refuses two that share an id and differ."""
    by_id: dict[str, _Row] = {}
    for row in rows:
        first = by_id.setdefault(row.id, row)
        if (first.unit, first.text, first.known) != (row.unit, row.text, row.known):
            raise RecordConflict(
                "records of one id to be identical", value=f"{first.place} and {row.place} of source {name}", remedy="Give every record its own id."
            )
    if not by_id:
        raise SourceEmpty("a source with at least one record", value=f"source {name}")
    return list(by_id.values())
