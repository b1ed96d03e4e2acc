"""The log: append a statement, get it back with its proof, and hand it over as a bundle that anyone can verify offline.

    append (in the caller's transaction) -> entry: signed envelope, leaf hash     log_entries, log_subjects
    checkpoint                           -> signed root over all entries           log_checkpoints
    export                               -> bundle: checkpoint, leaves, entries.jsonl, manifest.json
    verify_bundle(bundle, public key)    -> the entries, or the list of everything that broke
    rotate                               -> a new key, which the old one names and which consents to it         log_keys
    pin                                  -> the last checkpoint in a file outside the database, which a restored database cannot fake

A statement is written in the transaction that stores what it describes, so neither exists without the other. Writers are serialised by `store.py`; the index is the next free one and
the database refuses a second entry at it. Whatever is read back is verified again: leaf hash, signature, place.

Guarantees of `verify_bundle`: every byte of every file was read once, is covered by a signature of the given key, and is the only form of what it says; the entries are leaves of the signed
tree, at their places, each signed by the key that was in force there, none of the public ones missing (none at all in an internal bundle); and the story holds (`_PRECEDED`, `_ONCE`: what was released was audited, what was trained was
paid for). With an older checkpoint as `pinned`, also that the log has only grown since.

A proof of one entry reads tiles, never the whole tree: the roots of full tiles are kept with the leaves in a table of their own (`log_tiles`). They are computed again by `verify`, and a proof is checked before it is given out.

Rotation: from the entry after `key_rotated` on, the new key signs. The old key named the new one, the new one signed its consent, the old private key is destroyed. Whoever trusts any one
key of a log verifies a whole bundle of it; a proof made before the rotation verifies with the old key as before.

Sources: RFC 6962, c2sp.org/tlog-checkpoint, c2sp.org/tlog-proof, c2sp.org/tlog-tiles, docs/formats.md.

Does not cover: an owner of the key who rewrites the whole log and shows it to someone who never saw an older checkpoint (pin one, or have it cosigned); entries after the last checkpoint removed from the
database; the size of the tree, which a public bundle shows and which grows with the number of batches of records; a key that was stolen before its rotation and shown to somebody who kept no checkpoint.
"""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, TypeVar, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import Column, Connection, Integer, LargeBinary, String, Table, Text, bindparam, func, insert, select

from discreet.errors import EvidenceInvalid, NotFound, OperationFailed
from discreet.evidence import merkle, note, statement
from discreet.evidence.note import Checkpoint, VerifierKey
from discreet.evidence.statement import JSON, Entry, Predicate, Statement, canonical_json, parse_json
from discreet.keys import Key, Keyring, Stream
from discreet.record import Digest
from discreet.store import Store, fetch, later, metadata, now, write_atomically

T = TypeVar("T")

__all__ = ["Entry", "Log", "Predicate", "Proof", "Statement", "VerifiedBundle", "verify_bundle", "verify_certificate", "verify_proof"]

BUNDLE_FORMAT = "discreet-bundle/v1"
MANIFEST_TYPE = "application/vnd.discreet.bundle+json"
CONSENT_PREFIX = b"discreet log key rotation v1\n"
PROOF_HEADER = "c2sp.org/tlog-proof@v1"

_MANIFEST = "manifest.json"
_CAPS: Mapping[str, int] = {"checkpoint": note.MAX_NOTE_BYTES, "leaves": 1 << 30, "entries.jsonl": 1 << 33, _MANIFEST: statement.MAX_ENVELOPE_BYTES}
"""The files of a bundle, with the most bytes that are read of each."""
BUNDLE = tuple(_CAPS)
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
_tiles = Table(
    "log_tiles",
    metadata,
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("hash", LargeBinary, nullable=False),
    sqlite_with_rowid=False,
)
"""The hashes of the tree by the tile: leaves at level 0, roots of full tiles of the level below above it. Beside the entries, so that a tile is a few pages and not a run of envelopes."""

_keys = Table(
    "log_keys",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("first", Integer, nullable=False),
    Column("vkey", Text, nullable=False),
)
"""The keys of a log that had several: the first entry that each signs. Empty until the first rotation."""


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
    keys: tuple[VerifierKey, ...]
    """Every key the log ever had, oldest first."""


@final
@dataclass(frozen=True, slots=True)
class _Keys:
    """The keys of a log and the first entry that each signs, oldest first."""

    since: tuple[tuple[int, VerifierKey], ...]

    @property
    def all(self) -> tuple[VerifierKey, ...]:
        return tuple(key for _, key in self.since)

    @property
    def current(self) -> VerifierKey:
        return self.since[-1][1]

    def at(self, index: int) -> VerifierKey:
        """The key that signs the entry at an index."""
        return next(key for first, key in reversed(self.since) if first <= index)

    def to_json(self) -> list[list[JSON]]:
        return [[first, str(key)] for first, key in self.since]


class Log:
    """The log of one project, in its database, signed by its key."""

    def __init__(self, store: Store, keyring: Keyring, origin: str, *, pin: Path | None = None) -> None:
        """Opens the log. Must not be called inside a transaction.

        Args:
            store: the database.
            keyring: gives the Ed25519 keys "log", "log/1" and so on.
            origin: the log's name, by convention a URL without a scheme; no spaces, no plus signs.
            pin: file of the last checkpoint, outside the database; left out, none is kept.

        Raises:
            EvidenceInvalid: when the origin cannot be the name of a log.
        """
        self._store = store
        self._keyring = keyring
        self._pin = pin
        self.origin = origin
        with store.transaction() as tx:
            self._load_keys(tx)
            _fill_tiles(tx)

    def _load_keys(self, tx: Connection) -> None:
        rows = tx.execute(select(_keys).order_by(_keys.c.number)).all()
        self._signer = self._keyring.signer(_signer_name(max(0, len(rows) - 1)), tx=tx)
        self._keys = _Keys(
            tuple((row.first, note.parse_key(row.vkey)) for row in rows) or ((0, note.verifier_key(name=self.origin, signer=self._signer)),)
        )
        self._by_label = note.by_label(self._keys.all)
        self._rotations = len(rows)

    @property
    def _key(self) -> VerifierKey:
        return self._keys.current

    def public_key(self) -> str:
        """Returns the C2SP vkey with which anyone verifies this log's bundles, checkpoints and proofs; of a log whose key was rotated all of them, a line each, oldest first."""
        return "\n".join(map(str, self._keys.all))

    def rotate(self) -> str:
        """Gives the log a new key, logs it under the old one, and destroys the old private key. Returns the new public key (every key, as `public_key`).

        Raises:
            EvidenceInvalid: as `append`.
        """
        with self._store.transaction() as tx:
            self._load_keys(tx)
            number, old = len(self._keys.since), self._key
            signer = self._keyring.signer(_signer_name(number), tx=tx)
            new = note.verifier_key(name=self.origin, signer=signer)
            consent = base64.b64encode(signer.sign(_consented(old, new))).decode()
            fields: dict[str, JSON] = {"old": str(old), "new": str(new), "consent": consent}
            index = self.append(tx, Statement(predicate=Predicate.KEY_ROTATED, subjects=(statement.digest_of(str(new).encode()),), fields=fields))
            known = [] if self._rotations else [{"number": 0, "first": 0, "vkey": str(old)}]
            tx.execute(insert(_keys), [*known, {"number": number, "first": index + 1, "vkey": str(new)}])
            self._load_keys(tx)
        self._keyring.destroy_signer(_signer_name(number - 1))
        return self.public_key()

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
        [(last, last_serial, signed, rotations)] = fetch(tx, _COUNTED)
        if rotations != self._rotations:  # another process gave the log a new key
            self._load_keys(tx)
        first, serial = (0 if last is None else last + 1), (0 if last_serial is None else last_serial + 1)
        if first < (signed or 0):
            raise EvidenceInvalid.of([f"log: rollback, {signed} entries were signed and {first} are here"])
        time = datetime.fromtimestamp(now(tx), UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        salts = Key.random().stream("salts")  # one seed from the operating system, a fresh salt of its stream for each
        rows: list[dict[str, Any]] = []
        for index, each in enumerate(statements, start=first):
            rows.append(self._row(each, index=index, serial=serial if each.predicate.public else None, time=time, salt=salts))
            serial += each.predicate.public
        later(tx, _INSERT_ENTRIES, rows)
        about = [{"digest": digest, "position": row["position"]} for row, each in zip(rows, statements, strict=True) for digest in each.subjects]
        later(tx, _INSERT_SUBJECTS, about)
        _fold(tx, first, [row["leaf_hash"] for row in rows])
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

    def select(self, predicate: Predicate, *, after: int = -1, tx: Connection | None = None) -> list[Entry]:
        """Returns the entries of one kind behind an index, oldest first, each verified. Other arguments and errors as `entries`."""
        return self._read(select(_entries).where(_entries.c.predicate == predicate.value, _entries.c.position > after), tx)

    def checkpoint(self) -> bytes:
        """Signs, stores and returns the C2SP note over all entries; the stored one when nothing was appended since.

        Raises:
            EvidenceInvalid: when the entries are not those of the last checkpoint and more: this log signs no fork (PITFALLS 20).
        """
        with self._store.transaction() as tx:
            return self._checkpoint(tx, _Tree.of(tx))

    def prove(self, index: int) -> Proof:
        """Returns the proof that an entry is in the log, under a checkpoint over all entries.

        Raises:
            NotFound: when there is no such entry.
            EvidenceInvalid: as `checkpoint`, and when the entry is not the one that was appended.
        """
        with self._store.transaction() as tx:
            tree = _Tree.of(tx)
            envelope = tx.execute(select(_entries.c.envelope).where(_entries.c.position == index)).scalar_one_or_none()
            if envelope is None or not 0 <= index < tree.size:
                raise NotFound(f"the index of one of {tree.size} entries", value=index)
            proof = Proof(index=index, path=tree.path(index), checkpoint=self._checkpoint(tx, tree))
            try:
                merkle.verify_inclusion(merkle.leaf_hash(envelope), index=index, size=tree.size, proof=proof.path, root=tree.root(tree.size))
            except ValueError:
                raise EvidenceInvalid.of([f"log_entries row {index}: not the entry that was appended"]) from None
            return proof

    def check_pin(self) -> None:
        """Compares the log with the last checkpoint that was pinned outside the database.

        Raises:
            EvidenceInvalid: when the log lacks entries that were signed (a restored backup), or has other ones (a fork).
        """
        with self._store.transaction() as tx:
            self._check_pin(tx)

    def _check_pin(self, tx: Connection) -> _Tree:
        self._load_keys(tx)  # another process may have given the log a new key, and pinned a checkpoint under it
        tree, failed = _Tree.of(tx), list[str]()
        if self._pin is not None and self._pin.exists():
            _check_pinned(self._pin.read_bytes(), tree=tree, keys=self._keys.all, failed=failed, where="pinned checkpoint")
        if failed:
            raise EvidenceInvalid(
                "a log that has grown from the checkpoint that was pinned outside the database",
                value=failed[0],
                remedy="A backup was restored, or the log was changed. Restore a newer one, or accept the loss: `discreet evidence pin --accept-rollback`.",
                failed=failed,
            )
        return tree

    def pin(self) -> bytes:
        """Signs a checkpoint over all entries, keeps it outside the database, and returns it. Processes that pin at the same time do it one after the other.

        Raises:
            EvidenceInvalid: as `checkpoint` and `check_pin`.
        """
        with self._pinning():
            with self._store.transaction() as tx:
                signed = self._checkpoint(tx, self._check_pin(tx))
            return self._keep(signed)

    @contextmanager
    def _pinning(self) -> Iterator[None]:
        """One process at a time compares the pinned checkpoint and replaces it, so that a newer one never gives way to an older."""
        if self._pin is None:
            yield
            return
        self._pin.parent.mkdir(parents=True, exist_ok=True)
        with self._pin.with_name(f"{self._pin.name}.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file is closed
            yield

    def _keep(self, signed: bytes) -> bytes:
        """Replaces the pinned checkpoint, after the database has committed what it is about: a kill before leaves the earlier one."""
        if self._pin is not None and (not self._pin.exists() or self._pin.read_bytes() != signed):
            write_atomically(self._pin, signed)
        return signed

    def accept_rollback(self, *, by: str, reason: str) -> bytes:
        """Logs that a named person goes on with a log that lost entries, and pins it as it is. Whoever kept a newer checkpoint still sees the loss.

        Raises:
            EvidenceInvalid: as `checkpoint`.
        """
        lost = ""
        with self._pinning():
            with suppress(EvidenceInvalid), self._store.transaction() as tx:
                if self._pin is not None and self._pin.exists():
                    lost = f"{note.open_checkpoint(self._pin.read_bytes(), keys=self._keys.all).size} entries signed, {_Tree.of(tx).size} here"
            fields: dict[str, JSON] = {"rule": "no rollback", "reason": reason, "by": by, "value": lost}
            with self._store.transaction() as tx:
                self.append(tx, Statement(predicate=Predicate.OVERRIDDEN, subjects=(statement.digest_of(self.origin.encode()),), fields=fields))
            return self._keep(self.checkpoint())

    def export_tiles(self, folder: Path) -> Path:
        """Writes checkpoint and tiles as c2sp.org/tlog-tiles serves them, for monitors and mirrors, and returns the folder. No entry is in it.

        Args:
            folder: new or empty, or an earlier export, which grows.

        Raises:
            EvidenceInvalid: as `checkpoint`.
            OperationFailed: when it cannot be written.
        """
        with self._store.transaction() as tx:
            tree = _Tree.of(tx)
            signed = self._checkpoint(tx, tree)
            level, width = 0, tree.size
            while width:
                for number in range(-(-width // merkle.TILE_WIDTH)):
                    count = min(merkle.TILE_WIDTH, width - number * merkle.TILE_WIDTH)
                    path = folder / "tile" / str(level) / _tile_name(number, count)
                    if count < merkle.TILE_WIDTH or not path.exists():
                        write_atomically(path, b"".join(_read_tile(tx, level, number)[:count]))
                level, width = level + 1, width // merkle.TILE_WIDTH
        write_atomically(folder / "checkpoint", signed)
        return folder

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
            tree = _Tree.over(leaves)
            entries = _check_entries(
                (row.envelope for row in rows), leaves=leaves, keys=self._keys, public=False, failed=failed, where="log_entries row"
            )
            failed += _check_columns(tx, rows, entries)
            failed += _check_tiles(tx, leaves)
            for old in tx.execute(select(_checkpoints.c.note).order_by(_checkpoints.c.size)).scalars():
                _check_pinned(old, tree=tree, keys=self._keys.all, failed=failed, where="log_checkpoints")
            _finish(entries, tree=tree, keys=self._keys, public=False, pinned=pinned, failed=failed)
            signed = self._checkpoint(tx, tree)
        head = note.open_checkpoint(signed, keys=self._keys.all)
        return VerifiedBundle(entries=tuple(entries), checkpoint=head, note=signed, public=False, keys=self._keys.all)

    def export(self, folder: Path, *, public: bool) -> Path:
        """Writes the log as a bundle and returns its folder.

        Args:
            folder: new, empty, or an earlier bundle, which is replaced.
            public: whether the envelopes of internal statements stay at home (their leaf hashes travel, salted). The folder of an internal bundle is readable by its owner only.

        Raises:
            EvidenceInvalid: as `checkpoint`.
            OperationFailed: when the folder holds anything but a bundle with its manifest, or cannot be written.
            StorageFull: when the disk is full; an earlier bundle is kept.
        """
        folder = named(folder)
        partial = folder.with_name(f"{folder.name}.partial")
        check_replaceable(folder, BUNDLE, types=(MANIFEST_TYPE,))
        check_replaceable(partial, BUNDLE)
        with writing(partial, BUNDLE), self._store.transaction() as tx:
            remove(partial, BUNDLE)
            partial.mkdir(parents=True, mode=0o755 if public else 0o700)
            leaves = _leaves(tx)
            shown = select(_entries.c.envelope).order_by(_entries.c.position)
            lines = tx.execute(shown.where(_entries.c.serial.is_not(None)) if public else shown).yield_per(256).scalars()
            contents: dict[str, Iterable[bytes]] = {
                "checkpoint": [self._checkpoint(tx, _Tree.over(leaves))],
                "leaves": leaves,
                "entries.jsonl": (line + b"\n" for line in lines),
            }
            files = {name: _write(partial / name, content) for name, content in contents.items()}
            described = {"files": files, "format": BUNDLE_FORMAT, "origin": self.origin, "public": public, "size": len(leaves)}
            payload = canonical_json(described | ({"keys": self._keys.to_json()} if self._rotations else {}))
            manifest = statement.seal_envelope(payload, payload_type=MANIFEST_TYPE, signer=self._signer, key_id=self._key.label)
            _write(partial / _MANIFEST, [manifest])
            remove(folder, BUNDLE)
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
        entry = _verify_entry(row.envelope, keys=self._keys, labels=self._by_label, failed=failed, where=f"log_entries row {row.position}")
        if entry is None or entry.index != row.position or merkle.leaf_hash(row.envelope) != row.leaf_hash or entry.predicate != row.predicate:
            raise EvidenceInvalid.of(failed or [f"log_entries row {row.position}: not the entry that was appended"])
        return entry

    def _checkpoint(self, tx: Connection, tree: _Tree) -> bytes:
        latest = tx.execute(select(_checkpoints.c.note).order_by(_checkpoints.c.size.desc()).limit(1)).scalar_one_or_none()
        if latest is not None:
            failed: list[str] = []
            _check_pinned(latest, tree=tree, keys=self._keys.all, failed=failed, where="last checkpoint")
            if failed:
                raise EvidenceInvalid.of(failed)
            if note.open_checkpoint(latest, keys=self._keys.all).size == tree.size:
                return bytes(latest)
        head = Checkpoint(origin=self.origin, size=tree.size, root=tree.root(tree.size))
        signed = note.sign_note(head.text, name=self.origin, signer=self._signer)
        tx.execute(insert(_checkpoints).values(size=tree.size, note=signed))
        return signed


_COUNTED = select(
    func.max(_entries.c.position),
    func.max(_entries.c.serial),
    select(func.max(_checkpoints.c.size)).scalar_subquery(),
    select(func.count()).select_from(_keys).scalar_subquery(),
)
_INSERT_ENTRIES, _INSERT_SUBJECTS = insert(_entries), insert(_subjects)


def verify_bundle(path: Path, *, public_key: str, pinned: bytes | None = None) -> VerifiedBundle:
    """Returns the contents of a bundle, verified with the bundle and the public key alone: no network, no database.

    Args:
        path: the bundle's folder.
        public_key: a C2SP vkey of the log, or all that it ever had, a line each and oldest first; from somewhere else than the bundle.
        pinned: an older checkpoint of the same log; the bundle must have grown from it.

    Raises:
        EvidenceInvalid: `failed` names every file, entry and rule that broke.
    """
    failed = _check_names(path)
    trusted = _try(lambda: note.parse_keys(public_key), "public key", failed)
    if trusted is None:
        raise EvidenceInvalid.of(failed)
    read: dict[str, bytes] = {}
    for name in ("checkpoint", "leaves", _MANIFEST):
        with _opened(path, name, failed) as file:
            if file is not None:
                read[name] = file.read(_CAPS[name])
    seen = {name: _Seen.of([content]) for name, content in read.items()}
    opened = _try(lambda: _read_manifest(read[_MANIFEST], trusted), _MANIFEST, failed) if _MANIFEST in read else None
    manifest, keys = opened if opened else (None, _Keys(((0, trusted[-1]),)))
    head = _try(lambda: note.open_checkpoint(read["checkpoint"], keys=[keys.current]), "checkpoint", failed) if "checkpoint" in read else None
    leaves = _split_leaves(read.get("leaves", b""), failed)
    if head is not None and "leaves" in read and (len(leaves) != head.size or merkle.root(leaves) != head.root):
        failed.append("leaves: not the tree of the checkpoint")
    public = manifest["public"] if manifest else None
    entries: list[Entry] = []
    with _opened(path, "entries.jsonl", failed) as file:
        if file is not None:
            seen["entries.jsonl"] = _Seen.of(())
            lines = _lines(file, seen["entries.jsonl"], failed)
            entries = _check_entries(lines, leaves=leaves, keys=keys, public=public, failed=failed, where="entries.jsonl line")
    if manifest is not None:
        failed += _check_manifest(manifest, seen, key=keys.current, size=len(leaves))
    _finish(entries, tree=_Tree.over(leaves), keys=keys, public=public, pinned=pinned, failed=failed)
    if head is None or public is None:  # both were named above; the type checker and a reader need not trace that
        raise EvidenceInvalid.of(["bundle: incomplete"])
    return VerifiedBundle(entries=tuple(entries), checkpoint=head, note=read["checkpoint"], public=public, keys=keys.all)


def verify_proof(proof: bytes, *, envelope: bytes, public_key: str) -> Entry:
    """Returns the entry that an envelope is, verified to be in the log by a tlog-proof.

    Args:
        proof: the bytes of a `Proof`.
        envelope: the bytes of the entry.
        public_key: the C2SP vkeys of the log under which entry and checkpoint were signed, a line each; one, when its key was not rotated between them.

    Raises:
        EvidenceInvalid: when proof, checkpoint, signature or statement do not verify, or do not belong together.
    """
    keys = note.parse_keys(public_key)
    if len(proof) > note.MAX_NOTE_BYTES + 8192:
        raise EvidenceInvalid("a proof of at most 72 KiB", value=len(proof))
    parsed = _parse_proof(proof)
    entry = statement.verify(envelope, keys=note.by_label(keys), origin=keys[0].name)
    head = note.open_checkpoint(parsed.checkpoint, keys=keys)
    try:
        merkle.verify_inclusion(merkle.leaf_hash(envelope), index=parsed.index, size=head.size, proof=parsed.path, root=head.root)
    except ValueError as error:
        raise EvidenceInvalid.of([f"proof: {error}"]) from None
    if entry.index != parsed.index:
        raise EvidenceInvalid.of(["proof: of another entry"])
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
        raise EvidenceInvalid.of(broken)
    return [row.leaf_hash for row in rows]


def verify_certificate(path: Path, *, public_key: str) -> tuple[Entry, bytes]:
    """Verifies a statement with its proof, as `erase --json` and `trace --json` print them, with a public key alone.

    Args:
        path: a JSON file with the members `statement` (an envelope) and `proof` (a tlog-proof).
        public_key: as in `verify_proof`.

    Returns:
        The entry and the checkpoint's note.

    Raises:
        EvidenceInvalid: when it is too large, has a key twice, is no such document, or does not verify.
    """
    with path.open("rb") as file:
        content = file.read(_MAX_CERTIFICATE_BYTES + 1)
    if len(content) > _MAX_CERTIFICATE_BYTES:
        raise EvidenceInvalid.of([f"certificate: larger than {_MAX_CERTIFICATE_BYTES} bytes"])
    try:
        document = statement.parse_once(content)
        said, proof = document["statement"].encode(), document["proof"].encode()
    except (AttributeError, EvidenceInvalid, KeyError, TypeError, ValueError):
        raise EvidenceInvalid.of(["certificate: not a JSON object with a statement and its proof"]) from None
    return verify_proof(proof, envelope=said, public_key=public_key), _parse_proof(proof).checkpoint


_MAX_CERTIFICATE_BYTES = 2 << 20


# ---------------------------------------------------------------- keys


def _signer_name(number: int) -> str:
    return f"log/{number}" if number else "log"


def _consented(old: VerifierKey, new: VerifierKey) -> bytes:
    return CONSENT_PREFIX + f"{old}\n{new}\n".encode()


def _check_rotations(entries: Sequence[Entry], keys: _Keys) -> list[str]:
    """Each key but the first was named by the one before it, in the last entry that that one signed, and consented to it; no other rotation was logged."""
    logged = {entry.index: entry for entry in entries if entry.predicate is Predicate.KEY_ROTATED}
    broken: list[str] = []
    for (_, old), (first, new) in zip(keys.since, keys.since[1:], strict=False):
        entry = logged.pop(first - 1, None)
        named = entry is not None and (entry.fields["old"], entry.fields["new"]) == (str(old), str(new))
        if entry is None or not named or not _consents(str(entry.fields["consent"]), old, new):
            broken.append(f"keys: the key of entry {first} was not named by the one before it")
    return broken + [f"keys: entry {index} rotates a key that signs on" for index in sorted(logged)]


def _consents(consent: str, old: VerifierKey, new: VerifierKey) -> bool:
    try:
        new.ed25519.verify(base64.b64decode(consent, validate=True), _consented(old, new))
    except (ValueError, InvalidSignature):
        return False
    return True


# ---------------------------------------------------------------- the tree in the database


@final
@dataclass(frozen=True, slots=True)
class _Tree:
    """Root and proofs of a log's tree, from tiles in the database or from all leaves."""

    size: int
    root: Callable[[int], bytes]
    path: Callable[[int], tuple[bytes, ...]]
    growth: Callable[[int], tuple[bytes, ...]]

    @staticmethod
    def of(tx: Connection) -> _Tree:
        """The tree in the database; reads what is asked for."""
        size = _size(tx)
        tiles = merkle.Tiles(lambda level, number: _read_tile(tx, level, number))
        return _Tree(
            size=size,
            root=lambda n: _read(lambda: tiles.root(n)),
            path=lambda index: _read(lambda: tuple(tiles.inclusion_proof(index, size))),
            growth=lambda old: _read(lambda: tuple(tiles.consistency_proof(old, size))),
        )

    @staticmethod
    def over(leaves: Sequence[bytes]) -> _Tree:
        return _Tree(
            size=len(leaves),
            root=lambda n: merkle.root(leaves[:n]),
            path=lambda index: tuple(merkle.inclusion_proof(leaves, index)),
            growth=lambda old: tuple(merkle.consistency_proof(leaves, old)),
        )


def _read(compute: Callable[[], T]) -> T:
    try:
        return compute()
    except ValueError as error:
        raise EvidenceInvalid.of([f"log_tiles: {error}"]) from None


def _size(tx: Connection) -> int:
    last = tx.execute(select(func.max(_entries.c.position))).scalar_one()
    return 0 if last is None else int(last) + 1


def _read_tile(tx: Connection, level: int, number: int) -> list[bytes]:
    """The hashes of a tile that are there, in order and without a gap."""
    first = number * merkle.TILE_WIDTH
    rows = tx.execute(_TILE, {"level": level, "first": first, "end": first + merkle.TILE_WIDTH}).all()
    if rows and rows[-1].position != first + len(rows) - 1:
        raise EvidenceInvalid.of([f"log_tiles: tile {number} of level {level} has a gap"])
    return [row.hash for row in rows]


_TILE = (
    select(_tiles.c.position, _tiles.c.hash)
    .where(_tiles.c.level == bindparam("level"), _tiles.c.position >= bindparam("first"), _tiles.c.position < bindparam("end"))
    .order_by(_tiles.c.position)
)
_INSERT_TILES = insert(_tiles)


def _fold(tx: Connection, start: int, leaves: Sequence[bytes]) -> None:
    """Keeps the leaf hashes from entry `start` on, and the roots of the tiles that became full with them."""
    level, hashes, end = 0, leaves, start + len(leaves)
    while hashes:
        later(tx, _INSERT_TILES, [{"level": level, "position": n, "hash": each} for n, each in enumerate(hashes, start=start)])
        full = range(start // merkle.TILE_WIDTH, end // merkle.TILE_WIDTH)
        hashes = [merkle.root(_read_tile(tx, level, number)) for number in full]
        level, start, end = level + 1, start // merkle.TILE_WIDTH, end // merkle.TILE_WIDTH


def _fill_tiles(tx: Connection) -> None:
    """Keeps the tiles of a log that was begun before there were any."""
    last = tx.execute(select(func.max(_tiles.c.position)).where(_tiles.c.level == 0)).scalar_one()
    kept = 0 if last is None else last + 1
    if kept < _size(tx):
        query = select(_entries.c.leaf_hash).where(_entries.c.position >= kept).order_by(_entries.c.position)
        _fold(tx, kept, tx.execute(query).scalars().all())


def _check_tiles(tx: Connection, leaves: Sequence[bytes]) -> list[str]:
    """Every kept hash is that of the leaves, and none is missing."""
    kept = {(row.level, row.position): row.hash for row in tx.execute(select(_tiles))}
    expected: dict[tuple[int, int], bytes] = {}
    level, hashes = 0, list(leaves)
    while hashes:
        expected |= {(level, position): item for position, item in enumerate(hashes)}
        full = range(0, len(hashes) - merkle.TILE_WIDTH + 1, merkle.TILE_WIDTH)
        hashes = [merkle.root(hashes[first : first + merkle.TILE_WIDTH]) for first in full]
        level += 1
    wrong = sorted(place for place in kept.keys() | expected.keys() if kept.get(place) != expected.get(place))
    return [f"log_tiles: hash {position} of level {level} differs from the leaves" for level, position in wrong]


def _tile_name(number: int, count: int) -> Path:
    """The path of a tile below its level: thousands as folders, and how many hashes it has when it is not full (c2sp.org/tlog-tiles)."""
    parts = [f"{number % 1000:03d}"]
    while number := number // 1000:
        parts.insert(0, f"x{number % 1000:03d}")
    name = Path(*parts)
    return name if count == merkle.TILE_WIDTH else name.with_name(f"{name.name}.p") / str(count)


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
def writing(partial: Path, names: Sequence[str]) -> Iterator[None]:
    """Leaves nothing half-written behind (`names` as `remove`), and gives errors of the file system our form (a full disk has its own, from the store)."""
    try:
        try:
            yield
        except BaseException:
            remove(partial, names)
            raise
    except OSError as error:
        reason = errno.errorcode.get(error.errno or 0, "error")
        raise OperationFailed("an export folder that can be written", value=reason, remedy="Choose another folder.") from None


def check_replaceable(folder: Path, names: Sequence[str], *, types: Sequence[str] = ()) -> None:
    """Refuses to replace a folder that is not new, empty or ours.

    Args:
        names: of all that an export writes there (`remove`).
        types: payload types, one of which its manifest has; none for the `.partial` in which an export is written, where a kill leaves no manifest.

    Raises:
        OperationFailed: when it holds anything else, or is no folder.
    """
    try:
        ours = not folder.is_symlink() and (not folder.exists() or (folder.is_dir() and _holds_only(folder, names, types)))
    except OSError:
        ours = False
    if not ours:
        raise OperationFailed("a folder that is new, empty, or earlier evidence", value=folder, remedy="Choose another folder.")


def _holds_only(folder: Path, names: Sequence[str], types: Sequence[str]) -> bool:
    found = list(folder.rglob("*"))
    known = {str(path.relative_to(folder)) for path in found} <= set(names) and not any(path.is_symlink() for path in found)
    return not found or (known and (not types or _sealed_as(folder / _MANIFEST) in types))


def _sealed_as(path: Path) -> object:
    """The payload type of an envelope as it says itself; None of any other file. Nothing is verified."""
    with suppress(EvidenceInvalid):
        if path.is_file() and path.stat().st_size <= statement.MAX_ENVELOPE_BYTES:
            outer = parse_json(path.read_bytes())
            return outer.get("payloadType") if isinstance(outer, dict) else None
    return None


def remove(folder: Path, names: Sequence[str]) -> None:
    """Removes what an export wrote, and nothing else: a folder with anything else in it stays.

    Args:
        names: of files and folders below it, what is in a folder before it, and the manifest last: until then a kill leaves what is known as ours.
    """
    if folder.is_dir() and not folder.is_symlink():
        for path in (folder / name for name in names):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink(missing_ok=True)
        folder.rmdir()


def named(folder: Path) -> Path:
    """Returns a folder by a path that has its name, as it was given where it does: "." has none."""
    return folder if folder.name else folder.absolute()


def key_beside(folder: Path) -> Path:
    """Returns where the public key of exported evidence goes.

    Raises:
        OperationFailed: when a file is there that is no public key.
    """
    path = named(folder).with_name(f"{named(folder).name}.pub")
    try:
        if path.exists():
            with path.open("rb") as file:
                note.parse_keys(file.read(note.MAX_NOTE_BYTES).decode())
    except (EvidenceInvalid, OSError, ValueError):
        raise OperationFailed("no file, or an earlier public key, where the key goes", value=path, remedy="Choose another folder.") from None
    return path


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
    (Predicate.BUDGET_RAISED, Predicate.BUDGET_OPENED, "budget", ()),
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
        for kind, earlier, key, same in _PRECEDED:
            if entry.predicate is kind and (earlier.public or not public) and not _is_public_track(entry):
                before = seen.get((earlier, key, canonical_json(entry.fields[key])))
                if before is None:
                    broken.append(f"story: entry {entry.index} ({kind}) without {earlier} of the same {key} before it")
                else:
                    broken += [
                        f"story: entry {entry.index} ({kind}) differs from entry {before.index} in {f}"
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
    envelopes: Iterable[bytes], *, leaves: Sequence[bytes], keys: _Keys, public: bool | None, failed: list[str], where: str
) -> list[Entry]:
    """The entries that verify; `public` None means that the manifest does not say what should be there."""
    entries: list[Entry] = []
    count, labels = 0, note.by_label(keys.all)
    for number, envelope in enumerate(envelopes):
        count += 1
        entry = _verify_entry(envelope, keys=keys, labels=labels, failed=failed, where=f"{where} {number}")
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


def _verify_entry(envelope: bytes, *, keys: _Keys, labels: Mapping[str, Ed25519PublicKey], failed: list[str], where: str) -> Entry | None:
    entry = _try(lambda: statement.verify(envelope, keys=labels, origin=keys.current.name), where, failed)
    if entry is not None and entry.key_id != keys.at(entry.index).label:
        failed.append(f"{where} (entry {entry.index}): signed by a key that was not in force")
    return entry


def _check_pinned(old: bytes, *, tree: _Tree, keys: Sequence[VerifierKey], failed: list[str], where: str) -> None:
    """The tree has grown from an older checkpoint: the old root is computed from what is here rather than proven."""
    head = _try(lambda: note.open_checkpoint(old, keys=keys), where, failed)
    if head is None:
        return
    if head.size > tree.size:
        failed.append(f"{where}: rollback, {head.size} entries were signed and {tree.size} are here")
    elif tree.root(head.size) != head.root:
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


def _finish(entries: Sequence[Entry], *, tree: _Tree, keys: _Keys, public: bool | None, pinned: bytes | None, failed: list[str]) -> None:
    """Keys, growth since the pinned checkpoint, then the story; the story only of a log that is whole, since a broken entry breaks the rules that need it too."""
    if not failed:
        failed += _check_rotations(entries, keys)
    if pinned is not None:
        _check_pinned(pinned, tree=tree, keys=keys.all, failed=failed, where="pinned checkpoint")
    if not failed:
        failed += _check_story(entries, public=public is not False)
    if failed:
        raise EvidenceInvalid.of(failed)


def _check_names(path: Path) -> list[str]:
    """Nothing but the four files is in the folder; names are printed as ASCII, since they come from a stranger."""
    try:
        names = sorted(os.listdir(path))
    except OSError:
        raise EvidenceInvalid.of(["bundle: not a folder that can be read"]) from None
    unknown = [f"{ascii(name)[:80]}: not part of a bundle" for name in names if name not in _CAPS]
    return unknown + [f"{name}: missing" for name in sorted(_CAPS) if name not in names]


def _read_manifest(content: bytes, trusted: Sequence[VerifierKey]) -> tuple[dict[str, Any], _Keys]:
    """The manifest and the keys of its log. Keys that the reader does not know yet are believed only after `_check_rotations`."""
    if len(content) > statement.MAX_ENVELOPE_BYTES:
        raise EvidenceInvalid(f"an envelope of at most {statement.MAX_ENVELOPE_BYTES} bytes", value=len(content))
    keys = _claimed_keys(content, trusted)
    payload, _ = statement.open_envelope(content, payload_type=MANIFEST_TYPE, keys=note.by_label([keys.current]))
    manifest = parse_json(payload)
    match manifest:
        case {"files": dict(), "format": str(), "origin": str(), "public": bool(), "size": int(), **more} if not set(more) - {"keys"}:
            return manifest, keys
    raise EvidenceInvalid("a manifest in the form of docs/formats.md")


def _claimed_keys(content: bytes, trusted: Sequence[VerifierKey]) -> _Keys:
    """The keys that a manifest, not verified yet, says its log had. A reader who knows several finds them there in a row."""
    try:
        outer = parse_json(content)
        label = outer["signatures"][0]["keyid"]
        claimed = parse_json(base64.b64decode(outer["payload"], validate=True)).get("keys")
        if claimed is None:
            return _Keys(((0, next((key for key in trusted if key.label == label), trusted[-1])),))
        since = tuple((int(first), note.parse_key(vkey)) for first, vkey in claimed)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise EvidenceInvalid("a manifest in the form of docs/formats.md") from None
    firsts, keys = [first for first, _ in since], [key for _, key in since]
    if len(keys) < 2 or firsts[0] != 0 or firsts != sorted(set(firsts)) or len(set(keys)) != len(keys):
        raise EvidenceInvalid("a manifest in the form of docs/formats.md")
    start = next((keys.index(key) for key in trusted if key in keys), None)
    known = trusted[trusted.index(keys[start]) :] if start is not None else ()
    if start is None or any(a != b for a, b in zip(keys[start:], known, strict=False)):
        raise EvidenceInvalid("a bundle of the log that the key names", remedy="Verify with the public key of the log that made it.")
    return _Keys(since)


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
