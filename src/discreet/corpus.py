"""Freezes de-identified documents into a snapshot: sealed shards, a Merkle root over them, an index by privacy unit.

    FOLDER/ROOT/manifest             the index, sealed under the project's key "shards"
    FOLDER/ROOT/<sha256>.shard       magic, then the sealed documents one after another; named by the SHA-256 of its bytes

Each document is sealed under its *subject's* key (AES-256-GCM, bound to the record's digest): forgetting the subject shreds their documents in every
snapshot and in every copy of it. A leaf of the tree is the JSON array [record digest, commitment], in the order of the digests; the commitment is SHA-256
over a salt of the subject's key and the frozen bytes. So the root names exactly this text, whoever reads it back is checked against it, and freezing
the same documents again, in any order, gives the same root. A document's bytes depend on that document alone (PITFALLS 39).

A snapshot appears whole or not at all: it is written beside its place, synced and renamed. Its sensitivity is the highest of its documents, and the
public track takes public documents only. `Snapshot` is built here and nowhere else.

Erasure (`SnapshotStore`) also removes the sealed bytes: shards that held the subject are rewritten without them and the index forgets the subject. The
root and every other position stay. A run that was under way on the snapshot has lost its population; it is closed, not resumed.

Does not cover: snapshots larger than memory, and whether a document may still be used (`governance.consent.revoked`, asked by the pipeline).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import Any, final

from sqlalchemy import Column, String, Table, insert, select

from discreet.errors import DigestMismatch, Forgotten, NotFound, RecordConflict, SealBroken, SourceEmpty, TrackRefused
from discreet.evidence import merkle
from discreet.evidence.log import Log
from discreet.evidence.statement import Predicate, Statement
from discreet.keys import Key, Keyring
from discreet.record import Deidentified, Digest, Sensitive, Sensitivity, Snapshot, SubjectId
from discreet.store import Store, metadata, storage_full, sync_folder

DOCUMENTS_PER_SHARD = 512
_MAGIC = b"discreet-shard/1\n"
_MANIFEST = "manifest"

_snapshots = Table(
    "snapshots",
    metadata,
    Column("root", String(71), primary_key=True),
    Column("name", String(63), nullable=False),
)


class Track(StrEnum):
    """Which training a snapshot is for."""

    DP = "dp"
    PUBLIC = "public"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Document:
    """One position of the index. An erased document has no subject and no bytes; its digest and commitment stay as leaves of the tree."""

    digest: Digest
    commitment: str
    source: str
    subject: SubjectId | None
    shard: int
    offset: int
    length: int

    @property
    def leaf(self) -> bytes:
        return merkle.leaf_hash(_canonical([self.digest, self.commitment]))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Manifest:
    """The opened index of a snapshot."""

    name: str
    sensitivity: Sensitivity
    shards: tuple[str, ...]
    documents: tuple[_Document, ...]

    def root(self) -> Digest:
        return Digest("sha256:" + merkle.root([document.leaf for document in self.documents]).hex())


def freeze(
    documents: Iterable[Deidentified], *, name: str, keyring: Keyring, log: Log, store: Store, folder: Path, track: Track = Track.DP
) -> Snapshot:
    """Freezes documents into a snapshot and logs it. Idempotent: the same documents give the snapshot that exists.

    Args:
        documents: in any order; identical ones count once.
        name: what the project calls this corpus.
        folder: where snapshots lie, one folder each.
        track: what the snapshot is for; the public track refuses whatever is not public.

    Raises:
        SourceEmpty: when there is no document.
        RecordConflict: when two documents of one record differ, or the snapshot exists under another name.
        TrackRefused: when a document that is not public is frozen for the public track.
        Forgotten: when a subject was erased since.
        StorageFull: when the disk is full; nothing is left behind.
    """
    ordered = _ordered(documents)
    _check_track(ordered, track)
    keys = keyring.subjects([document.subject for document in ordered])
    manifest_key = keyring.purpose("shards")
    commitments = [_commitment(document, keys[document.subject]) for document in ordered]
    root = _root_of(ordered, commitments)
    path = folder / root.removeprefix("sha256:")
    if not (path / _MANIFEST).exists():
        _write(path, _Plain(root=root, name=name, documents=ordered, commitments=commitments), keys, manifest_key)
    snapshot = _open(path, root, manifest_key)
    if snapshot.name != name:
        raise RecordConflict("a snapshot to have one name", value=f"{snapshot.name} and {name}", remedy=f"Use the snapshot '{snapshot.name}'.")
    _register(snapshot, ordered, log=log, store=store)
    return snapshot


def open_snapshot(root: Digest, *, keyring: Keyring, folder: Path) -> Snapshot:
    """Opens a frozen snapshot by its root and checks its index against it.

    Raises:
        NotFound: when there is no such snapshot.
        SealBroken: when the index was changed or belongs to another project.
        DigestMismatch: when the index is not that of the root.
    """
    return _open(folder / root.removeprefix("sha256:"), root, keyring.purpose("shards"))


def snapshots(*, keyring: Keyring, folder: Path) -> list[Snapshot]:
    """Opens every snapshot that lies in a folder, in the order of their roots. Errors as `open_snapshot`."""
    roots = sorted(path.name for path in folder.iterdir() if len(path.name) == 64) if folder.is_dir() else []
    return [open_snapshot(Digest(f"sha256:{name}"), keyring=keyring, folder=folder) for name in roots]


def remove(snapshot: Snapshot) -> None:
    """Removes the folder of a snapshot. What a kill leaves of it goes with any erasure."""
    gone = snapshot.path.with_name(f".partial-{snapshot.path.name}-removed")
    snapshot.path.rename(gone)
    shutil.rmtree(gone)


def texts(snapshot: Snapshot, positions: Sequence[int], keyring: Keyring) -> list[str]:
    """Returns the frozen texts at these positions, in the order asked for, each checked against the root.

    Args:
        positions: 0 <= position < number of documents, as in `snapshot.units`.

    Raises:
        NotFound: when there is no such position.
        Forgotten: when a position belongs to an erased subject.
        DigestMismatch: when a shard is missing or is not what was frozen.
        SealBroken: when a document was changed or moved.
    """
    manifest = _read_manifest(snapshot.path, snapshot.root, keyring.purpose("shards"))
    if not all(0 <= position < len(manifest.documents) for position in positions):
        raise NotFound("positions of the snapshot", value=f"outside 0 to {len(manifest.documents) - 1}")
    chosen = [manifest.documents[position] for position in positions]
    keys = keyring.subjects([_subject(document) for document in chosen])
    shards = {number: _read_shard(snapshot.path, manifest.shards[number]) for number in {document.shard for document in chosen}}
    return [_open_document(document, shards[document.shard], keys[_subject(document)]) for document in chosen]


def digests(snapshot: Snapshot, keyring: Keyring) -> list[Digest]:
    """Returns the record digest at each position, erased ones included. Internal (PITFALLS 41)."""
    return [document.digest for document in _read_manifest(snapshot.path, snapshot.root, keyring.purpose("shards")).documents]


def sources(snapshot: Snapshot, keyring: Keyring) -> list[str]:
    """Returns the source of the document at each position, erased ones included. Internal (PITFALLS 41)."""
    return [document.source for document in _read_manifest(snapshot.path, snapshot.root, keyring.purpose("shards")).documents]


@final
class SnapshotStore:
    """What the snapshots hold of a subject, for `governance.erasure`."""

    name = "corpus"

    def __init__(self, folder: Path, keyring: Keyring) -> None:
        self._folder = folder
        self._key = keyring.purpose("shards")

    def holds(self, subject: SubjectId) -> list[Digest]:
        """Returns the roots of the snapshots that hold documents of the subject."""
        return [root for root, path in self._all() if any(d.subject == subject for d in _read_manifest(path, root, self._key).documents)]

    def purge(self, subject: SubjectId) -> None:
        """Rewrites every shard that holds the subject without their bytes, and the index without their name. Idempotent."""
        for leftover in self._folder.glob(".partial-*"):
            shutil.rmtree(leftover)
        for root, path in self._all():
            manifest = _read_manifest(path, root, self._key)
            if any(document.subject == subject for document in manifest.documents):
                _replace_manifest(path, root, _without(path, manifest, subject), self._key)
            _sweep(path, root, self._key)

    def absence(self, subject: SubjectId) -> bool:
        """Returns whether no index names the subject and every byte in every shard belongs to somebody else."""
        return not any(self._folder.glob(".partial-*")) and all(_is_absent(path, root, self._key, subject) for root, path in self._all())

    def _all(self) -> list[tuple[Digest, Path]]:
        """What lies in the folder counts, not what the database remembers."""
        found = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        return [(Digest(f"sha256:{path.name}"), path) for path in found if len(path.name) == 64 and (path / _MANIFEST).exists()]


# Freezing


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Plain:
    """What is about to be sealed."""

    root: Digest
    name: str
    documents: Sequence[Deidentified]
    commitments: Sequence[str]

    def __repr__(self) -> str:
        return f"<{len(self.documents)} documents to seal>"


def _ordered(documents: Iterable[Deidentified]) -> list[Deidentified]:
    by_digest: dict[Digest, Deidentified] = {}
    for document in documents:
        first = by_digest.setdefault(document.digest, document)
        if (first.subject, _frozen_bytes(first)) != (document.subject, _frozen_bytes(document)):
            raise RecordConflict("one document for one record", value=document.digest)
    if not by_digest:
        raise SourceEmpty("at least one document to freeze", remedy="Check opt-outs, purposes and retention: every record may have been refused.")
    return [by_digest[digest] for digest in sorted(by_digest)]


def _check_track(documents: Sequence[Deidentified], track: Track) -> None:
    if track is Track.PUBLIC and _highest(documents) is not Sensitivity.PUBLIC:
        raise TrackRefused(
            "public documents on the public track", value=f"a document that is {_highest(documents).value}", remedy="Freeze it for the DP track."
        )


def _highest(documents: Iterable[Deidentified]) -> Sensitivity:
    return max((document.sensitivity for document in documents), key=list(Sensitivity).index)


def _frozen_bytes(document: Deidentified) -> bytes:
    fields = {"digest": document.digest, "policy": document.policy, "source": document.source, "sensitivity": document.sensitivity.value}
    return _canonical({**fields, "text": document.text.reveal()})


def _commitment(document: Deidentified, key: Key) -> str:
    return hashlib.sha256(key.stream("frozen").bytes(32) + _frozen_bytes(document)).hexdigest()


def _root_of(documents: Sequence[Deidentified], commitments: Sequence[str]) -> Digest:
    leaves = [merkle.leaf_hash(_canonical([d.digest, c])) for d, c in zip(documents, commitments, strict=True)]
    return Digest("sha256:" + merkle.root(leaves).hex())


def _write(path: Path, plain: _Plain, keys: Mapping[SubjectId, Key], manifest_key: Key) -> None:
    """Writes the whole snapshot beside its place and renames it there; what a crash leaves beside it is swept by the next freeze."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    for leftover in path.parent.glob(f".partial-{path.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".partial-{path.name}-", dir=path.parent))
    try:
        manifest = _seal_all(partial, plain, keys)
        _replace_manifest(partial, plain.root, manifest, manifest_key)
        partial.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            raise storage_full() from None
        if not (path / _MANIFEST).exists():  # else another process was faster, with the same documents
            raise


def _seal_all(partial: Path, plain: _Plain, keys: Mapping[SubjectId, Key]) -> _Manifest:
    shards: list[str] = []
    index: list[_Document] = []
    pairs = iter(zip(plain.documents, plain.commitments, strict=True))
    while batch := list(islice(pairs, DOCUMENTS_PER_SHARD)):
        content = bytearray(_MAGIC)
        for document, commitment in batch:
            sealed = keys[document.subject].seal(_frozen_bytes(document), context=_context(document.digest))
            index.append(
                _Document(
                    digest=document.digest,
                    commitment=commitment,
                    source=document.source,
                    subject=document.subject,
                    shard=len(shards),
                    offset=len(content),
                    length=len(sealed),
                )
            )
            content += sealed
        shards.append(_write_shard(partial, bytes(content)))
    return _Manifest(name=plain.name, sensitivity=_highest(plain.documents), shards=tuple(shards), documents=tuple(index))


def _register(snapshot: Snapshot, documents: Sequence[Deidentified], *, log: Log, store: Store) -> None:
    with store.transaction() as tx:
        if tx.execute(select(_snapshots.c.root).where(_snapshots.c.root == snapshot.root)).scalar_one_or_none() is not None:
            return
        tx.execute(insert(_snapshots).values(root=snapshot.root, name=snapshot.name))
        fields = {
            "name": snapshot.name,
            "sensitivity": snapshot.sensitivity.value,
            "num_documents": len(documents),
            "num_units": snapshot.num_units,
            "policies": sorted({document.policy for document in documents}),
            "sources": list(snapshot.sources),
        }
        log.append(tx, Statement(predicate=Predicate.FROZEN, subjects=(snapshot.root,), fields=fields))


# Reading


def _open(path: Path, root: Digest, key: Key) -> Snapshot:
    manifest = _read_manifest(path, root, key)
    units: dict[SubjectId, list[int]] = {}
    for position, document in enumerate(manifest.documents):
        if document.subject is not None:
            units.setdefault(document.subject, []).append(position)
    by_unit = {subject: tuple(units[subject]) for subject in sorted(units)}
    sources = tuple(sorted({document.source for document in manifest.documents}))
    return Snapshot(root=root, name=manifest.name, sensitivity=manifest.sensitivity, path=path, units=Sensitive(by_unit), sources=sources)


def _read_manifest(path: Path, root: Digest, key: Key) -> _Manifest:
    try:
        sealed = (path / _MANIFEST).read_bytes()
    except OSError:
        raise NotFound("a frozen snapshot", value=root, remedy="Freeze it again: `discreet run`.") from None
    manifest = _manifest_from(json.loads(key.open(sealed, context=_context(root))))
    if manifest.root() != root:
        raise DigestMismatch("the index of the snapshot that was asked for", value=root)
    return manifest


def _manifest_from(fields: Mapping[str, Any]) -> _Manifest:
    documents = tuple(
        _Document(digest=digest, commitment=commitment, source=source, subject=subject, shard=shard, offset=offset, length=length)
        for digest, commitment, source, subject, shard, offset, length in fields["documents"]
    )
    return _Manifest(name=fields["name"], sensitivity=Sensitivity(fields["sensitivity"]), shards=tuple(fields["shards"]), documents=documents)


def _read_shard(path: Path, shard: str) -> bytes:
    """Reads a shard once and checks those very bytes."""
    try:
        content = (path / f"{shard}.shard").read_bytes()
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() != shard or not content.startswith(_MAGIC):
        raise DigestMismatch("every shard as it was frozen", value=f"shard {shard}", remedy="Restore it, or freeze the snapshot again.")
    return content


def _open_document(document: _Document, shard: bytes, key: Key) -> str:
    sealed = shard[document.offset : document.offset + document.length]
    frozen = key.open(sealed, context=_context(document.digest))
    if hashlib.sha256(key.stream("frozen").bytes(32) + frozen).hexdigest() != document.commitment:
        raise SealBroken("a document as it was frozen", value=document.digest)
    text = json.loads(frozen)["text"]
    if not isinstance(text, str):
        raise SealBroken("a document with text", value=document.digest)
    return text


def _subject(document: _Document) -> SubjectId:
    if document.subject is None:
        raise Forgotten("a document whose subject was not erased", remedy="Leave it out; this cannot be undone.")
    return document.subject


# Erasing


def _without(path: Path, manifest: _Manifest, subject: SubjectId) -> _Manifest:
    shards = list(manifest.shards)
    documents = list(manifest.documents)
    for number in {document.shard for document in documents if document.subject == subject}:
        positions = [position for position, document in enumerate(documents) if document.shard == number]
        content = _read_shard(path, shards[number])
        rewritten = bytearray(_MAGIC)
        for position in positions:
            document = documents[position]
            kept = b"" if document.subject == subject else content[document.offset : document.offset + document.length]
            owner = None if document.subject == subject else document.subject
            documents[position] = replace(document, subject=owner, offset=len(rewritten), length=len(kept))
            rewritten += kept
        shards[number] = _write_shard(path, bytes(rewritten))
    return replace(manifest, shards=tuple(shards), documents=tuple(documents))


def _sweep(path: Path, root: Digest, key: Key) -> None:
    """Removes the files that the index does not name: shards from before an erasure, also one that was interrupted."""
    named = {f"{shard}.shard" for shard in _read_manifest(path, root, key).shards} | {_MANIFEST}
    for file in path.iterdir():
        if file.name not in named:
            file.unlink()


def _is_absent(path: Path, root: Digest, key: Key, subject: SubjectId) -> bool:
    manifest = _read_manifest(path, root, key)
    if any(document.subject == subject for document in manifest.documents):
        return False
    if {file.name for file in path.iterdir()} - {f"{shard}.shard" for shard in manifest.shards} - {_MANIFEST}:
        return False
    return all(_is_covered(_read_shard(path, shard), number, manifest) for number, shard in enumerate(manifest.shards))


def _is_covered(content: bytes, number: int, manifest: _Manifest) -> bool:
    """Returns whether the bytes of a shard are its magic and the documents that the index gives to living subjects, and nothing else."""
    lengths = [document.length for document in manifest.documents if document.shard == number and document.subject is not None]
    return len(content) == len(_MAGIC) + sum(lengths)


# Files


def _replace_manifest(path: Path, root: Digest, manifest: _Manifest, key: Key) -> None:
    rows = [[d.digest, d.commitment, d.source, d.subject, d.shard, d.offset, d.length] for d in manifest.documents]
    fields = {"name": manifest.name, "sensitivity": manifest.sensitivity.value, "shards": list(manifest.shards), "documents": rows}
    _write_file(path / _MANIFEST, key.seal(_canonical(fields), context=_context(root)))


def _write_shard(path: Path, content: bytes) -> str:
    shard = hashlib.sha256(content).hexdigest()
    _write_file(path / f"{shard}.shard", content)
    return shard


def _write_file(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, readable by its owner only."""
    temporary = path.with_name(f"{path.name}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def _context(digest: Digest) -> bytes:
    return b"discreet/corpus/" + digest.encode()


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
