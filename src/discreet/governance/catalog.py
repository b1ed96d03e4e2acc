"""What data exists: every source by name, with its owner, licence, purposes, basis, sensitivity, retention, role and privacy unit, and the digest of its bytes.

A source is registered once. From then on its bytes and its declaration are what was registered, or the run stops (`SourceChanged`, `SourceMissing`):
`discreet catalog register --again` registers it anew, on purpose and in the log. What can never be registered: the same bytes under a second name (they
would get a second budget, PITFALLS 19), and a lower sensitivity than before (sensitive text would reach the public track).

`collect` turns a source into `Record`s. The file is read once: the bytes that are hashed are the bytes that are parsed. A record's digest is
    "sha256:" + SHA-256(salt || JSON array [source, id, text])         with the salt derived from the subject's key,
so it commits to the text, and once the key is forgotten it links to nobody. Only the digest, the source and the subject's pseudonym are stored; the text
never is. The records of an erased subject are dropped here, before a digest of theirs exists.

Errors name the source and the line, row or file number, never the content, an identifier or the name of a file in a folder (it can be a person's).

Does not cover: sources larger than memory, encodings other than UTF-8, and people who are in two sources under two privacy units.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, final

from sqlalchemy import Column, Connection, Float, Integer, String, Table, Text, delete, insert, select, update

from discreet.config import Project, SourceSection
from discreet.errors import NotFound, RecordConflict, RecordInvalid, SourceChanged, SourceEmpty, SourceMissing, SourceNotText, TrackRefused
from discreet.evidence.log import Log
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.governance import lineage
from discreet.governance.erasure import erased
from discreet.governance.lineage import Artifact, Kind
from discreet.keys import Key, Keyring
from discreet.record import Digest, Record, Sensitive, Sensitivity, SubjectId
from discreet.store import Store, metadata, now

BATCH = 512
"""Most record digests in one statement."""

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
COLLECTED, SUPERSEDED = "collected", "superseded"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RegisteredSource:
    """A source as it was registered. `digest` is the SHA-256 of its bytes, `unit` the privacy unit that its column names ("patient")."""

    section: SourceSection
    path: Path
    opt_outs: Path | None
    digest: Digest
    unit: str

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

    def register(self, project: Project, section: SourceSection) -> RegisteredSource:
        """Registers a source, or finds it unchanged since it was registered.

        Raises:
            SourceMissing: when the file or folder is not there.
            SourceEmpty: when there is nothing in it.
            SourceChanged: when its bytes or its declaration are not those that were registered.
            RecordConflict: when the same bytes are registered under another name.
        """
        source = _describe(project, section)
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
        files = _read(source.path, source.section)
        if _digest_of_files(files, source.section.format) != source.digest:
            raise _changed(source.name)
        rows = _collapse(_rows(files, source.section), source.name)
        subjects = [source.subject(self._keyring, row.unit) for row in rows]
        with self._store.transaction() as tx:
            gone = erased(tx, self._keyring, list(dict.fromkeys(subjects)))
        keys = self._keyring.subjects([subject for subject in subjects if subject not in gone])
        collected = [_record(source, subject, keys[subject], row) for row, subject in zip(rows, subjects, strict=True) if subject in keys]
        with self._store.transaction() as tx:
            self._write(tx, source, collected, num_dropped=len(rows) - len(collected))
        return collected

    def sources(self) -> list[dict[str, Any]]:
        """Returns what was registered, by name: the declaration, the privacy unit and the digest of the bytes, as JSON values. No count of records."""
        with self._store.transaction() as tx:
            rows = tx.execute(select(_sources).order_by(_sources.c.name)).all()
        return [{**json.loads(row.declaration)["section"], "privacy_unit": row.unit, "digest": row.digest} for row in rows]

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
        return not self.holds(subject)

    def _write(self, tx: Connection, source: RegisteredSource, collected: Sequence[Record], *, num_dropped: int) -> None:
        state = {
            Digest(row.digest): row.state for row in tx.execute(select(records.c.digest, records.c.state).where(records.c.source == source.name))
        }
        new = [record for record in collected if record.digest not in state]
        present = {record.digest for record in collected}
        _set_state(tx, [d for d, s in state.items() if d not in present and s == COLLECTED], SUPERSEDED)
        _set_state(tx, [d for d, s in state.items() if d in present and s == SUPERSEDED], COLLECTED)
        if new:
            tx.execute(insert(records), _record_rows(new, at=now(tx)))
            lineage.register(tx, [Artifact(digest=record.digest, kind=Kind.RECORD) for record in new])
        for batch in lineage.chunks([record.digest for record in new], BATCH):
            facts = {"source": source.name, "source_digest": source.digest, "sensitivity": source.section.sensitivity.value}
            self._log.append(tx, Statement(predicate=Predicate.COLLECTED, subjects=tuple(batch), fields=facts))
        mine = _sources.c.name == source.name
        if num_dropped != tx.execute(select(_sources.c.num_dropped).where(mine)).scalar_one():
            tx.execute(update(_sources).where(mine).values(num_dropped=num_dropped))
            fields: dict[str, JSON] = {"source": source.name, "purpose": "*", "reason": "erased", "num_records": num_dropped}
            self._log.append(tx, Statement(predicate=Predicate.REFUSED, subjects=(source.digest,), fields=fields))


def subject_id(keyring: Keyring, *, unit: str, value: str) -> SubjectId:
    """Returns the pseudonym of the privacy unit `value` ("MRN-12") of the scheme `unit` ("patient"), as every source of that scheme derives it."""
    return keyring.pseudonym(f"{unit}:{unicodedata.normalize('NFC', value).strip()}")


def digests_of(tx: Connection, subject: SubjectId) -> list[Digest]:
    """Returns the digests of the subject's records."""
    query = select(records.c.digest).where(records.c.subject == subject).order_by(records.c.digest)
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


def _record_rows(new: Iterable[Record], *, at: float) -> list[dict[str, Any]]:
    return [{"digest": r.digest, "source": r.source, "subject": r.subject, "state": COLLECTED, "collected_at": at} for r in new]


def _set_state(tx: Connection, digests: Sequence[Digest], state: str) -> None:
    for chunk in lineage.chunks(digests):
        tx.execute(update(records).where(records.c.digest.in_(chunk)).values(state=state))


# Registration


def _describe(project: Project, section: SourceSection) -> RegisteredSource:
    path = project.path(section.path)
    files = _read(path, section)
    opt_outs = project.path(section.opt_outs) if section.opt_outs else None
    digest = _digest_of_files(files, section.format)
    return RegisteredSource(section=section, path=path, opt_outs=opt_outs, digest=digest, unit=project.privacy.unit)


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

_File = tuple[str, bytes]


def _read(path: Path, section: SourceSection) -> list[_File]:
    """Reads every byte of the source once: what is hashed is what is parsed."""
    try:
        files = _read_folder(path, section.name) if section.format == "text" else [("", path.read_bytes())]
    except OSError as error:
        remedy = "Restore it, or remove the [[source]]."
        raise SourceMissing(f"a readable {_NOUN[section.format]}", value=f"source {section.name}, {type(error).__name__}", remedy=remedy) from None
    if not any(content.strip() for _, content in files):
        raise SourceEmpty("a source with something in it", value=f"source {section.name}")
    return files


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
    """Returns the SHA-256 of the one file, or of the list of names and digests of a folder (length-prefixed by JSON)."""
    if layout != "text":
        return Digest("sha256:" + hashlib.sha256(files[0][1]).hexdigest())
    listing = json.dumps([[name, hashlib.sha256(content).hexdigest()] for name, content in files], ensure_ascii=True)
    return Digest("sha256:" + hashlib.sha256(listing.encode()).hexdigest())


def _rows(files: Sequence[_File], section: SourceSection) -> Iterator[_Row]:
    readers: dict[str, Callable[[Sequence[_File], SourceSection], Iterator[tuple[str, Mapping[str, object]]]]]
    readers = {"jsonl": _json_lines, "csv": _csv_rows, "parquet": _parquet_rows, "text": _text_files}
    for place, fields in readers[section.format](files, section):
        yield _row(place, fields, section)


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
