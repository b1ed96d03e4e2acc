"""The log: append a statement, get it back with its proof, and hand it over as a bundle that anyone can verify offline.

    append (in the caller's transaction) -> entry: signed envelope, leaf hash     log_entries, log_subjects
    checkpoint                           -> signed root over all entries           log_checkpoints
    export                               -> bundle: checkpoint, leaves, entries.jsonl, manifest.json
    verify_bundle(bundle, public key)    -> the entries, or the list of everything that broke

A statement is written in the transaction that stores what it describes, so neither exists without the other. Writers are serialised by `store.py`; the index is the next free one and
the database refuses a second entry at it. Whatever is read back is verified again: leaf hash, signature, place.

Guarantees of `verify_bundle`: every byte of every file was read once, is covered by a signature of the given key, and is the only form of what it says; the entries are leaves of the signed
tree, at their places, none of the public ones missing (none at all in an internal bundle); and the story holds (`_PRECEDED`, `_ONCE`: what was released was audited, what was trained was
paid for). With an older checkpoint as `pinned`, also that the log has only grown since.

Sources: RFC 6962, c2sp.org/tlog-checkpoint, c2sp.org/tlog-proof, docs/formats.md.

Does not cover: an owner of the key who rewrites the whole log and shows it to someone who never saw an older checkpoint (pin one, or have it cosigned); entries after the last checkpoint removed from the
database; the size of the tree, which a public bundle shows and which grows with the number of batches of records; rotation of the log's key.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar, final

from sqlalchemy import Column, Connection, Integer, LargeBinary, String, Table, func, insert, select

from discreet.errors import EvidenceInvalid, NotFound, OperationFailed
from discreet.evidence import merkle, note, statement
from discreet.evidence.note import Checkpoint, VerifierKey
from discreet.evidence.statement import Entry, Predicate, Statement, canonical_json, parse_json
from discreet.keys import Key, Keyring, Stream
from discreet.record import Digest
from discreet.store import Store, metadata, now

T = TypeVar("T")

__all__ = ["Entry", "Log", "Predicate", "Proof", "Statement", "VerifiedBundle", "verify_bundle", "verify_proof"]

BUNDLE_FORMAT = "discreet-bundle/v1"
MANIFEST_TYPE = "application/vnd.discreet.bundle+json"
PROOF_HEADER = "c2sp.org/tlog-proof@v1"

_MANIFEST = "manifest.json"
_CAPS: Mapping[str, int] = {"checkpoint": note.MAX_NOTE_BYTES, "leaves": 1 << 30, "entries.jsonl": 1 << 33, _MANIFEST: statement.MAX_ENVELOPE_BYTES}
"""The files of a bundle, with the most bytes that are read of each."""
_COVERED = tuple(name for name in _CAPS if name != _MANIFEST)
_INDEX = re.compile(r"index (0|[1-9][0-9]{0,18})")

_entries = Table(
    "log_entries",
    metadata,
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("leaf_hash", LargeBinary, nullable=False),
    Column("envelope", LargeBinary, nullable=False),
    Column("predicate", String(32), nullable=False, index=True),
    Column("serial", Integer, unique=True),
    Column("time", String(32), nullable=False),
)
_subjects = Table(
    "log_subjects",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
)
_checkpoints = Table(
    "log_checkpoints",
    metadata,
    Column("size", Integer, primary_key=True, autoincrement=False),
    Column("note", LargeBinary, nullable=False),
)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """That an entry is in the log: its index, the siblings up to the root (lowest first), and the signed checkpoint with that root."""

    index: int
    path: tuple[bytes, ...]
    checkpoint: bytes

    def __bytes__(self) -> bytes:
        """The proof as a file of c2sp.org/tlog-proof."""
        hashes = "".join(f"{base64.b64encode(item).decode()}\n" for item in self.path)
        return f"{PROOF_HEADER}\nindex {self.index}\n{hashes}\n".encode() + self.checkpoint


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedBundle:
    """What verified: the entries in order, the checkpoint they are under, its note as signed, and whether only public entries are shown."""

    entries: tuple[Entry, ...]
    checkpoint: Checkpoint
    note: bytes
    public: bool


class Log:
    """The log of one project, in its database, signed by its key."""

    def __init__(self, store: Store, keyring: Keyring, origin: str) -> None:
        """Opens the log. Fetches its key, so it must not be called inside a transaction.

        Args:
            store: the database.
            keyring: gives the Ed25519 key "log".
            origin: the log's name, by convention a URL without a scheme; no spaces, no plus signs.

        Raises:
            EvidenceInvalid: when the origin cannot be the name of a log.
        """
        self._store = store
        self._signer = keyring.signer("log")
        self._key = note.verifier_key(name=origin, signer=self._signer)
        self.origin = origin

    def public_key(self) -> str:
        """Returns the C2SP vkey with which anyone verifies this log's bundles, checkpoints and proofs."""
        return str(self._key)

    def seal(self, payload: bytes, *, payload_type: str) -> bytes:
        """Returns the DSSE envelope of a payload that travels beside the log's bundle, signed by the log's key.

        Args:
            payload_type: of its own, other than those of entries and manifests, so that no signature can stand for another.
        """
        if payload_type in (statement.PAYLOAD_TYPE, MANIFEST_TYPE):
            raise EvidenceInvalid("a payload type of its own", value=payload_type)
        return statement.seal_envelope(payload, payload_type=payload_type, signer=self._signer, key_id=self._key.label)

    def append(self, tx: Connection, statement_: Statement) -> int:
        """Appends a statement inside the caller's transaction and returns its index.

        Args:
            tx: from `store.transaction()`; the entry exists exactly if it commits.
            statement_: what happened. Its time is the store's (`store.now`).

        Raises:
            ClockBackwards: when the clock is behind the latest recorded time.
            EvidenceInvalid: when the envelope would be too large, or entries under the last checkpoint are gone.
        """
        return self.append_all(tx, [statement_])[0]

    def append_all(self, tx: Connection, statements: Sequence[Statement]) -> list[int]:
        """Appends statements in order, as durable as the one transaction that holds them, and returns their indices. Errors as `append`."""
        if not statements:
            return []
        counted = select(func.max(_entries.c.position), func.max(_entries.c.serial), select(func.max(_checkpoints.c.size)).scalar_subquery())
        last, last_serial, signed = tx.execute(counted).one()
        first, serial = (0 if last is None else last + 1), (0 if last_serial is None else last_serial + 1)
        if first < (signed or 0):
            raise _invalid([f"log: rollback, {signed} entries were signed and {first} are here"])
        time = datetime.fromtimestamp(now(tx), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        salts = Key.random().stream("salts")  # one seed from the operating system, a fresh salt of its stream for each
        rows: list[dict[str, Any]] = []
        for index, each in enumerate(statements, start=first):
            rows.append(self._row(each, index=index, serial=serial if each.predicate.public else None, time=time, salt=salts))
            serial += each.predicate.public
        tx.execute(insert(_entries), rows)
        about = [{"digest": digest, "position": row["position"]} for row, each in zip(rows, statements, strict=True) for digest in each.subjects]
        tx.execute(insert(_subjects), about)
        return [row["position"] for row in rows]

    def _row(self, statement_: Statement, *, index: int, serial: int | None, time: str, salt: Stream) -> dict[str, Any]:
        signer, key = self._signer, self._key
        envelope = statement.sign(
            statement_,
            signer=signer,
            key_id=key.label,
            origin=self.origin,
            index=index,
            serial=serial,
            time=time,
            salt=salt.bytes(statement.SALT_BYTES),
        )
        row = {"position": index, "leaf_hash": merkle.leaf_hash(envelope), "envelope": envelope, "predicate": statement_.predicate.value}
        return {**row, "serial": serial, "time": time}

    def entries(self, digest: Digest, *, tx: Connection | None = None) -> list[Entry]:
        """Returns the entries about a digest, oldest first, each verified.

        Args:
            digest: a subject of the statements.
            tx: the caller's transaction, when it is inside one.

        Raises:
            EvidenceInvalid: when the database no longer holds what was signed.
        """
        query = select(_entries).join(_subjects, _subjects.c.position == _entries.c.position).where(_subjects.c.digest == digest)
        return self._read(query, tx)

    def select(self, predicate: Predicate, *, tx: Connection | None = None) -> list[Entry]:
        """Returns the entries of one kind, oldest first, each verified. Arguments and errors as `entries`."""
        return self._read(select(_entries).where(_entries.c.predicate == predicate.value), tx)

    def checkpoint(self) -> bytes:
        """Signs, stores and returns the C2SP note over all entries; the stored one when nothing was appended since.

        Raises:
            EvidenceInvalid: when the entries are not those of the last checkpoint and more: this log signs no fork (PITFALLS 20).
        """
        with self._store.transaction() as tx:
            return self._checkpoint(tx, _leaves(tx))

    def prove(self, index: int) -> Proof:
        """Returns the proof that an entry is in the log, under a checkpoint over all entries.

        Raises:
            NotFound: when there is no such entry.
            EvidenceInvalid: as `checkpoint`.
        """
        with self._store.transaction() as tx:
            leaves = _leaves(tx)
            if not 0 <= index < len(leaves):
                raise NotFound(f"the index of one of {len(leaves)} entries", value=index)
            return Proof(index=index, path=tuple(merkle.inclusion_proof(leaves, index)), checkpoint=self._checkpoint(tx, leaves))

    def verify(self, *, pinned: bytes | None = None) -> VerifiedBundle:
        """Verifies the whole log as it stands in the database and returns it under a fresh checkpoint.

        Args:
            pinned: an older checkpoint from outside the database, which a restored backup cannot have changed.

        Raises:
            EvidenceInvalid: `failed` names every entry, index row, checkpoint and rule that broke.
        """
        failed: list[str] = []
        with self._store.transaction() as tx:
            rows = list(tx.execute(select(_entries).order_by(_entries.c.position)))
            leaves = [merkle.leaf_hash(row.envelope) for row in rows]
            failed += [f"log_entries row {row.position}: leaf hash differs" for row, leaf in zip(rows, leaves, strict=True) if row.leaf_hash != leaf]
            entries = _check_entries(
                (row.envelope for row in rows), leaves=leaves, key=self._key, public=False, failed=failed, where="log_entries row"
            )
            failed += _check_columns(tx, rows, entries)
            for old in tx.execute(select(_checkpoints.c.note).order_by(_checkpoints.c.size)).scalars():
                _check_pinned(old, leaves=leaves, key=self._key, failed=failed, where="log_checkpoints")
            _finish(entries, leaves=leaves, key=self._key, public=False, pinned=pinned, failed=failed)
            signed = self._checkpoint(tx, leaves)
        return VerifiedBundle(entries=tuple(entries), checkpoint=note.open_checkpoint(signed, key=self._key), note=signed, public=False)

    def export(self, folder: Path, *, public: bool) -> Path:
        """Writes the log as a bundle and returns its folder.

        Args:
            folder: new, empty, or an earlier bundle, which is replaced.
            public: whether the envelopes of internal statements stay at home (their leaf hashes travel, salted). The folder of an internal bundle is readable by its owner only.

        Raises:
            EvidenceInvalid: as `checkpoint`.
            OperationFailed: when the folder holds anything else, or cannot be written.
            StorageFull: when the disk is full; an earlier bundle is kept.
        """
        partial = folder.with_name(folder.name + ".partial")
        with _writing(partial), self._store.transaction() as tx:
            for stale in (folder, partial):
                _check_replaceable(stale)
            _remove(partial)
            partial.mkdir(parents=True, mode=0o755 if public else 0o700)
            leaves = _leaves(tx)
            shown = select(_entries.c.envelope).order_by(_entries.c.position)
            lines = tx.execute(shown.where(_entries.c.serial.is_not(None)) if public else shown).yield_per(256).scalars()
            contents: dict[str, Iterable[bytes]] = {
                "checkpoint": [self._checkpoint(tx, leaves)],
                "leaves": leaves,
                "entries.jsonl": (line + b"\n" for line in lines),
            }
            files = {name: _write(partial / name, content) for name, content in contents.items()}
            payload = canonical_json({"files": files, "format": BUNDLE_FORMAT, "origin": self.origin, "public": public, "size": len(leaves)})
            manifest = statement.seal_envelope(payload, payload_type=MANIFEST_TYPE, signer=self._signer, key_id=self._key.label)
            _write(partial / _MANIFEST, [manifest])
            _remove(folder)
            partial.rename(folder)
        return folder

    def _read(self, query: Any, tx: Connection | None) -> list[Entry]:
        query = query.order_by(_entries.c.position)
        if tx is not None:
            return [self._entry(row) for row in tx.execute(query)]
        with self._store.transaction() as own:
            rows = list(own.execute(query))
        return [self._entry(row) for row in rows]

    def _entry(self, row: Any) -> Entry:
        """The verified entry of a row, or what broke."""
        failed: list[str] = []
        entry = _verify_entry(row.envelope, key=self._key, failed=failed, where=f"log_entries row {row.position}")
        if entry is None or entry.index != row.position or merkle.leaf_hash(row.envelope) != row.leaf_hash or entry.predicate != row.predicate:
            raise _invalid(failed or [f"log_entries row {row.position}: not the entry that was appended"])
        return entry

    def _checkpoint(self, tx: Connection, leaves: Sequence[bytes]) -> bytes:
        latest = tx.execute(select(_checkpoints.c.note).order_by(_checkpoints.c.size.desc()).limit(1)).scalar_one_or_none()
        if latest is not None:
            failed: list[str] = []
            _check_pinned(latest, leaves=leaves, key=self._key, failed=failed, where="last checkpoint")
            if failed:
                raise _invalid(failed)
            if note.open_checkpoint(latest, key=self._key).size == len(leaves):
                return bytes(latest)
        head = Checkpoint(origin=self.origin, size=len(leaves), root=merkle.root(leaves))
        signed = note.sign_note(head.text, name=self.origin, signer=self._signer)
        tx.execute(insert(_checkpoints).values(size=len(leaves), note=signed))
        return signed


def verify_bundle(path: Path, *, public_key: str, pinned: bytes | None = None) -> VerifiedBundle:
    """Returns the contents of a bundle, verified with the bundle and the public key alone: no network, no database.

    Args:
        path: the bundle's folder.
        public_key: the C2SP vkey of the log, from somewhere else than the bundle.
        pinned: an older checkpoint of the same log; the bundle must have grown from it.

    Raises:
        EvidenceInvalid: `failed` names every file, entry and rule that broke.
    """
    failed = _check_names(path)
    key = _try(lambda: note.parse_key(public_key.strip()), "public key", failed)
    if key is None:
        raise _invalid(failed)
    read: dict[str, bytes] = {}
    for name in ("checkpoint", "leaves", _MANIFEST):
        with _opened(path, name, failed) as file:
            if file is not None:
                read[name] = file.read(_CAPS[name])
    seen = {name: _Seen.of([content]) for name, content in read.items()}
    manifest = _try(lambda: _read_manifest(read[_MANIFEST], key), _MANIFEST, failed) if _MANIFEST in read else None
    head = _try(lambda: note.open_checkpoint(read["checkpoint"], key=key), "checkpoint", failed) if "checkpoint" in read else None
    leaves = _split_leaves(read.get("leaves", b""), failed)
    if head is not None and "leaves" in read and (len(leaves) != head.size or merkle.root(leaves) != head.root):
        failed.append("leaves: not the tree of the checkpoint")
    public = manifest["public"] if manifest else None
    entries: list[Entry] = []
    with _opened(path, "entries.jsonl", failed) as file:
        if file is not None:
            seen["entries.jsonl"] = _Seen.of(())
            lines = _lines(file, seen["entries.jsonl"], failed)
            entries = _check_entries(lines, leaves=leaves, key=key, public=public, failed=failed, where="entries.jsonl line")
    if manifest is not None:
        failed += _check_manifest(manifest, seen, key=key, size=len(leaves))
    _finish(entries, leaves=leaves, key=key, public=public, pinned=pinned, failed=failed)
    if head is None or public is None:  # both were named above; the type checker and a reader need not trace that
        raise _invalid(["bundle: incomplete"])
    return VerifiedBundle(entries=tuple(entries), checkpoint=head, note=read["checkpoint"], public=public)


def verify_proof(proof: bytes, *, envelope: bytes, public_key: str) -> Entry:
    """Returns the entry that an envelope is, verified to be in the log by a tlog-proof.

    Args:
        proof: the bytes of a `Proof`.
        envelope: the bytes of the entry.
        public_key: the C2SP vkey of the log.

    Raises:
        EvidenceInvalid: when proof, checkpoint, signature or statement do not verify, or do not belong together.
    """
    key = note.parse_key(public_key.strip())
    if len(proof) > note.MAX_NOTE_BYTES + 8192:
        raise EvidenceInvalid("a proof of at most 72 KiB", value=len(proof))
    parsed = _parse_proof(proof)
    entry = statement.verify(envelope, public_key=key.ed25519, key_id=key.label, origin=key.name)
    head = note.open_checkpoint(parsed.checkpoint, key=key)
    try:
        merkle.verify_inclusion(merkle.leaf_hash(envelope), index=parsed.index, size=head.size, proof=parsed.path, root=head.root)
    except ValueError as error:
        raise _invalid([f"proof: {error}"]) from None
    if entry.index != parsed.index:
        raise _invalid(["proof: of another entry"])
    return entry


def _leaves(tx: Connection) -> list[bytes]:
    """The leaf hashes in order, with no gap."""
    rows = list(tx.execute(select(_entries.c.position, _entries.c.leaf_hash).order_by(_entries.c.position)))
    broken = [
        f"log_entries row {row.position}: out of place"
        for number, row in enumerate(rows)
        if row.position != number or len(row.leaf_hash) != merkle.HASH_BYTES
    ]
    if broken:
        raise _invalid(broken)
    return [row.leaf_hash for row in rows]


def _parse_proof(proof: bytes) -> Proof:
    """The proof that prints as these bytes (the optional `extra` line is not part of our proofs)."""
    header, _, checkpoint = proof.partition(b"\n\n")
    try:
        first, index, *hashes = header.decode().split("\n")
        match = _INDEX.fullmatch(index)
        path = tuple(base64.b64decode(item, validate=True) for item in hashes)
    except ValueError:
        match, first, path = None, "", ()
    if match is not None and first == PROOF_HEADER:
        parsed = Proof(index=int(match[1]), path=path, checkpoint=checkpoint)
        if bytes(parsed) == proof:
            return parsed
    raise EvidenceInvalid("a proof in the form of docs/formats.md")


# ---------------------------------------------------------------- files of a bundle


@dataclass(slots=True)
class _Seen:
    """Size and hash of what was read or written, chunk by chunk."""

    size: int
    sha256: hashlib._Hash

    @staticmethod
    def of(chunks: Iterable[bytes]) -> _Seen:
        seen = _Seen(size=0, sha256=hashlib.sha256())
        for chunk in chunks:
            seen.add(chunk)
        return seen

    def add(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.sha256.update(chunk)

    def described(self) -> dict[str, object]:
        return {"sha256": self.sha256.hexdigest(), "size": self.size}


@contextmanager
def _writing(partial: Path) -> Iterator[None]:
    """Leaves no half-written bundle behind, and gives errors of the file system our form (a full disk has its own, from the store)."""
    try:
        try:
            yield
        except BaseException:
            _remove(partial)
            raise
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, "error")
        raise OperationFailed("an export folder that can be written", value=reason, remedy="Choose another folder.") from None


def _check_replaceable(folder: Path) -> None:
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or not set(os.listdir(folder)) <= set(_CAPS))):
        raise OperationFailed("an export folder that is new, empty or an earlier bundle", value=folder, remedy="Choose another folder.")


def _remove(folder: Path) -> None:
    """Removes a bundle, and nothing else: a folder with any other file in it stays."""
    if folder.is_dir() and not folder.is_symlink():
        for name in _CAPS:
            (folder / name).unlink(missing_ok=True)
        folder.rmdir()


def _write(path: Path, chunks: Iterable[bytes]) -> dict[str, object]:
    seen = _Seen.of(())
    with path.open("xb") as file:
        for chunk in chunks:
            file.write(chunk)
            seen.add(chunk)
        file.flush()
        os.fsync(file.fileno())
    return seen.described()


@contextmanager
def _opened(folder: Path, name: str, failed: list[str]) -> Iterator[IO[bytes] | None]:
    """The open file, checked after opening so that it is the one that is read: no link, no device, no larger than its cap."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:  # `_check_names` has named it
        yield None
        return
    except OSError:
        failed.append(f"{name}: not a regular file that can be read")
        yield None
        return
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _CAPS[name]:
        os.close(descriptor)
        failed.append(f"{name}: not a regular file of at most {_CAPS[name]} bytes")
        yield None
        return
    with os.fdopen(descriptor, "rb") as file:
        yield file


def _lines(file: IO[bytes], seen: _Seen, failed: list[str]) -> Iterator[bytes]:
    """The lines without their newline; all bytes are hashed, also those after a line that is too long."""
    number = 0
    while line := file.readline(statement.MAX_ENVELOPE_BYTES + 1):
        seen.add(line)
        if not line.endswith(b"\n"):
            failed.append(f"entries.jsonl line {number}: cut, or longer than {statement.MAX_ENVELOPE_BYTES} bytes")
            while rest := file.read(1 << 20):
                seen.add(rest)
            return
        yield line[:-1]
        number += 1


# ---------------------------------------------------------------- the story

_PRECEDED: tuple[tuple[Predicate, Predicate, str, tuple[str, ...]], ...] = (
    (Predicate.RESERVED, Predicate.BUDGET_OPENED, "budget", ()),
    (Predicate.SPENT, Predicate.BUDGET_OPENED, "budget", ()),
    (Predicate.SPENT, Predicate.RESERVED, "reservation", ("run", "budget", "plan")),
    (Predicate.CLOSED, Predicate.RESERVED, "reservation", ()),
    (Predicate.TRAINED, Predicate.SPENT, "run", ("plan",)),
    (Predicate.RELEASED, Predicate.TRAINED, "adapter", ("base", "guarantee")),
    (Predicate.RELEASED, Predicate.AUDITED, "adapter", ()),
)
"""(later, earlier, key, same): a later statement needs an earlier one with the same value of `key`, and the same values of `same`."""

_ONCE: tuple[tuple[Predicate, str], ...] = (
    (Predicate.BUDGET_OPENED, "budget"),
    (Predicate.RESERVED, "reservation"),
    (Predicate.SPENT, "reservation"),
    (Predicate.CLOSED, "reservation"),
    (Predicate.TRAINED, "run"),
)
"""(kind, key): no two statements of the kind share a value of the key. A reservation is spent once, whatever crashed."""

_KEYS = frozenset({key for _, _, key, _ in _PRECEDED} | {key for _, key in _ONCE})


def _check_story(entries: Sequence[Entry], *, public: bool) -> list[str]:
    """The rules of the table over verified entries. Rules whose earlier kind is internal need an internal bundle."""
    broken: list[str] = []
    seen: dict[tuple[Predicate, str, bytes], Entry] = {}
    for entry in entries:
        for later, earlier, key, same in _PRECEDED:
            if entry.predicate is later and (earlier.public or not public) and not _is_public_track(entry):
                before = seen.get((earlier, key, canonical_json(entry.fields[key])))
                if before is None:
                    broken.append(f"story: entry {entry.index} ({later}) without {earlier} of the same {key} before it")
                else:
                    broken += [
                        f"story: entry {entry.index} ({later}) differs from entry {before.index} in {f}"
                        for f in same
                        if before.fields[f] != entry.fields[f]
                    ]
        for kind, key in _ONCE:
            if entry.predicate is kind and (kind, key, canonical_json(entry.fields[key])) in seen:
                broken.append(f"story: entry {entry.index} is a second {kind} of the same {key}")
        if entry.predicate is Predicate.SPENT and (Predicate.CLOSED, "reservation", canonical_json(entry.fields["reservation"])) in seen:
            broken.append(f"story: entry {entry.index} (spent) after its reservation was closed")
        for name in _KEYS & set(entry.fields):
            seen[entry.predicate, name, canonical_json(entry.fields[name])] = entry
    return broken + _check_verdicts(entries)


def _is_public_track(entry: Entry) -> bool:
    """Training on public or generated text alone costs nothing."""
    return entry.predicate is Predicate.TRAINED and entry.fields["track"] == "public"


def _check_verdicts(entries: Sequence[Entry]) -> list[str]:
    """A model whose last audit failed leaves only by a logged override about it."""
    broken: list[str] = []
    failing: set[object] = set()
    for entry in entries:
        adapter = str(entry.fields.get("adapter"))
        if entry.predicate is Predicate.AUDITED:
            (failing.add if str(entry.fields["verdict"]).upper() == "FAIL" else failing.discard)(adapter)
        elif entry.predicate is Predicate.OVERRIDDEN:
            failing.difference_update(entry.subjects)
        elif entry.predicate is Predicate.RELEASED and adapter in failing:
            broken.append(f"story: entry {entry.index} (released) after a failed audit, without an override")
    return broken


# ---------------------------------------------------------------- checks; each adds to `failed` what broke


def _check_entries(
    envelopes: Iterable[bytes], *, leaves: Sequence[bytes], key: VerifierKey, public: bool | None, failed: list[str], where: str
) -> list[Entry]:
    """The entries that verify; `public` None means that the manifest does not say what should be there."""
    entries: list[Entry] = []
    count = 0
    for number, envelope in enumerate(envelopes):
        count += 1
        entry = _verify_entry(envelope, key=key, failed=failed, where=f"{where} {number}")
        if entry is None:
            continue
        name = f"{where} {number} (entry {entry.index}, {entry.predicate})"
        if entry.index >= len(leaves) or merkle.leaf_hash(envelope) != leaves[entry.index]:
            failed.append(f"{name}: not a leaf of the tree")
        if public is True and not entry.predicate.public:
            failed.append(f"{name}: internal, in a public bundle")
        if public is False and entry.index != number:
            failed.append(f"{name}: out of place")
        if entries and (entry.index <= entries[-1].index or entry.time < entries[-1].time):
            failed.append(f"{name}: before the entry that precedes it")
        entries.append(entry)
    if public is False and count != len(leaves):
        failed.append(f"{where}s: {count} entries for {len(leaves)} leaves")
    serials = [entry.serial for entry in entries if entry.serial is not None]
    if serials != list(range(len(serials))):
        failed.append(f"{where}s: a public statement is missing, or there twice")
    return entries


def _verify_entry(envelope: bytes, *, key: VerifierKey, failed: list[str], where: str) -> Entry | None:
    return _try(lambda: statement.verify(envelope, public_key=key.ed25519, key_id=key.label, origin=key.name), where, failed)


def _check_pinned(old: bytes, *, leaves: Sequence[bytes], key: VerifierKey, failed: list[str], where: str) -> None:
    """The tree has grown from an older checkpoint. All leaves are here, so the old root is computed rather than proven."""
    head = _try(lambda: note.open_checkpoint(old, key=key), where, failed)
    if head is None:
        return
    if head.size > len(leaves):
        failed.append(f"{where}: rollback, {head.size} entries were signed and {len(leaves)} are here")
    elif merkle.root(leaves[: head.size]) != head.root:
        failed.append(f"{where}: fork, the first {head.size} entries are not those that were signed")


def _check_columns(tx: Connection, rows: Sequence[Any], entries: Sequence[Entry]) -> list[str]:
    """The columns by which rows are found say what the signed envelopes say."""
    signed = {entry.index: (entry.predicate.value, entry.serial, entry.time) for entry in entries}
    wrong = [
        f"log_entries row {row.position}: columns differ from the envelope"
        for row in rows
        if signed.get(row.position) != (row.predicate, row.serial, row.time)
    ]
    found = {(row.digest, row.position) for row in tx.execute(select(_subjects))}
    expected = {(str(subject), entry.index) for entry in entries for subject in entry.subjects}
    return wrong + [f"log_subjects: the rows of entry {index} differ from the envelope" for index in sorted({index for _, index in found ^ expected})]


def _finish(
    entries: Sequence[Entry], *, leaves: Sequence[bytes], key: VerifierKey, public: bool | None, pinned: bytes | None, failed: list[str]
) -> None:
    """Growth since the pinned checkpoint, then the story; the story only of a log that is whole, since a broken entry breaks the rules that need it too."""
    if pinned is not None:
        _check_pinned(pinned, leaves=leaves, key=key, failed=failed, where="pinned checkpoint")
    if not failed:
        failed += _check_story(entries, public=public is not False)
    if failed:
        raise _invalid(failed)


def _check_names(path: Path) -> list[str]:
    """Nothing but the four files is in the folder; names are printed as ASCII, since they come from a stranger."""
    try:
        names = sorted(os.listdir(path))
    except OSError:
        raise _invalid(["bundle: not a folder that can be read"]) from None
    unknown = [f"{ascii(name)[:80]}: not part of a bundle" for name in names if name not in _CAPS]
    return unknown + [f"{name}: missing" for name in sorted(_CAPS) if name not in names]


def _read_manifest(content: bytes, key: VerifierKey) -> dict[str, Any]:
    payload = statement.open_envelope(content, payload_type=MANIFEST_TYPE, public_key=key.ed25519, key_id=key.label)
    manifest = parse_json(payload)
    match manifest:
        case {"files": dict(), "format": str(), "origin": str(), "public": bool(), "size": int(), **more} if not more:
            return manifest  # type: ignore[no-any-return]  # the pattern above is its type
    raise EvidenceInvalid("a manifest in the form of docs/formats.md")


def _check_manifest(manifest: dict[str, Any], seen: Mapping[str, _Seen], *, key: VerifierKey, size: int) -> list[str]:
    """What was signed about the files against what was read. Only names of the closed list are looked up: a path in a manifest leads nowhere."""
    wrong = [] if (manifest["format"], manifest["origin"]) == (BUNDLE_FORMAT, key.name) else [f"{_MANIFEST}: of another format or log"]
    if set(manifest["files"]) != set(_COVERED) or manifest["size"] != size:
        wrong.append(f"{_MANIFEST}: does not describe this bundle")
    return wrong + [
        f"{name}: differs from {_MANIFEST}" for name in _COVERED if name in seen and manifest["files"].get(name) != seen[name].described()
    ]


def _split_leaves(content: bytes, failed: list[str]) -> list[bytes]:
    if len(content) % merkle.HASH_BYTES:
        failed.append("leaves: not a whole number of hashes")
    whole = len(content) - len(content) % merkle.HASH_BYTES
    return [content[i : i + merkle.HASH_BYTES] for i in range(0, whole, merkle.HASH_BYTES)]


def _try(attempt: Callable[[], T], where: str, failed: list[str]) -> T | None:
    """The result, or None with the rule that broke added to `failed`."""
    try:
        return attempt()
    except EvidenceInvalid as error:
        failed.append(f"{where}: expected {error.rule}")
        return None


def _invalid(failed: list[str]) -> EvidenceInvalid:
    return EvidenceInvalid(
        "evidence that verifies", value=f"{len(failed)} failures, first: {failed[0]}", remedy="Trust nothing in it.", failed=failed
    )
