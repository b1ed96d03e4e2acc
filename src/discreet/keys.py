"""Keys and secret randomness: one master key, and everything else wrapped or derived from it.

    master key ──wraps──> key of each subject, run and purpose (random, in the database, AES-256-GCM)
               └─derives─> pseudonyms and log HMACs (HKDF-SHA256; they outlive the erasure of a subject)

Forgetting a subject deletes their wrapped key: whatever was sealed under it, and every salted digest that used it, links to nobody any more. A run
key holds the seeds of sampling and noise; whoever has it can subtract the noise, so it lives here, outside any checkpoint, and is destroyed when the run closes (PITFALLS 40).

This is the only module that asks the operating system for randomness. `Stream` is ChaCha20 (RFC 8439) under a 256-bit key, forked by name, so that a resumed
run replays the same draws without storing a position.

Does not cover: an attacker who reads this process's memory, or a backup of the database taken before `forget` together with the master key.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import os
import secrets
import stat
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from sqlalchemy import Column, Connection, LargeBinary, String, Table, delete, insert, select

from discreet.errors import ConfigInvalid, Forgotten, KeyUnavailable, RecordInvalid, SealBroken
from discreet.record import SubjectId
from discreet.store import Store, metadata

KEY_BYTES = 32
_NONCE_BYTES = 12

_keys = Table(
    "wrapped_keys",
    metadata,
    Column("kind", String(16), primary_key=True),
    Column("name", String(128), primary_key=True),
    Column("wrapped", LargeBinary, nullable=False),
)


Agree = Callable[[Connection, Mapping[int, SubjectId]], None]
"""What else has to hold, or is written, in the transaction that declares second identifiers: their pseudonyms by the place of the pair."""


@final
@dataclass(frozen=True, slots=True)
class Key:
    """A 256-bit key: seals bytes, derives other keys, makes salts and HMACs. Prints as `<key>`."""

    _secret: bytes

    def __repr__(self) -> str:
        return "<key>"

    def __reduce__(self) -> str:
        raise TypeError("Expected a key to stay in this process.")

    @staticmethod
    def random() -> Key:
        """Returns a fresh key from the operating system's generator."""
        return Key(secrets.token_bytes(KEY_BYTES))

    def derive(self, *path: str | int) -> Key:
        """Returns the key at `path` below this one (HKDF-Expand, RFC 5869; the path is length-prefixed, so no two paths collide)."""
        return Key(HKDFExpand(SHA256(), KEY_BYTES, _encode_path(path)).derive(self._secret))

    def stream(self, *path: str | int) -> Stream:
        """Returns the stream of secret randomness at `path`."""
        return Stream(self.derive("stream", *path)._secret)

    def mac(self, message: bytes) -> bytes:
        """Returns HMAC-SHA256 of the message, 32 bytes."""
        return hmac.digest(self._secret, message, hashlib.sha256)

    def seal(self, plaintext: bytes, *, context: bytes) -> bytes:
        """Returns nonce + AES-256-GCM ciphertext; `context` is authenticated and must be given again to `open`."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + AESGCM(self._secret).encrypt(nonce, plaintext, context)

    def open(self, sealed: bytes, *, context: bytes) -> bytes:
        """Returns the plaintext of `seal`.

        Raises:
            SealBroken: when the bytes, the context or the key are not those of the seal.
        """
        try:
            return AESGCM(self._secret).decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
        except (InvalidTag, ValueError):
            raise SealBroken("sealed bytes that open under this key", remedy="The file was changed, moved or sealed under another key.") from None


@final
class Stream:
    """ChaCha20 keystream as a deterministic random bit generator, from a 256-bit secret. Not thread-safe."""

    __slots__ = ("_key", "_keystream")

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"Expected a key of {KEY_BYTES} bytes, got {len(key)}.")
        self._key = key
        self._keystream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def __repr__(self) -> str:
        return "<stream>"

    def bytes(self, count: int) -> bytes:
        """Returns the next `count` bytes of the keystream (counter 0, nonce 0: each key is used for one stream only)."""
        return self._keystream.update(bytes(count))

    def fork(self, *path: str | int) -> Stream:
        """Returns an independent stream named by `path`; it does not depend on how much of this one was read."""
        return Key(self._key).stream("fork", *path)


class Keyring:
    """The keys of one project: opened from the master key, stored wrapped in the project's database."""

    def __init__(self, store: Store, master: Key) -> None:
        self._store = store
        self._wrap = master.derive("wrap")
        self._pseudonym = master.derive("pseudonym")
        self._log = master.derive("log")
        self._cache: dict[tuple[str, str], Key] = {}
        with store.transaction() as tx:
            self._same = self.second_identifiers(tx)

    def pseudonym(self, unit: str) -> SubjectId:
        """Returns the stable pseudonym of a privacy unit as the source names it: 'S' and 26 base32 characters (130 bits of HMAC-SHA256).

        An identifier that was declared to be somebody's second one (`declare_same`) has the pseudonym of the first.
        """
        own = self._own_pseudonym(unit)
        return self._same.get(own, own)

    def _own_pseudonym(self, unit: str) -> SubjectId:
        return SubjectId("S" + base64.b32encode(self._pseudonym.mac(unit.encode())).decode()[:26])

    def second_identifiers(self, tx: Connection) -> dict[SubjectId, SubjectId]:
        """Returns whose the pseudonyms of second identifiers are, as of a transaction: another process may have declared some since this keyring was opened."""
        rows = tx.execute(select(_keys.c.name, _keys.c.wrapped).where(_keys.c.kind == _SAME)).all()
        return dict(self._open_same(row.name, row.wrapped) for row in rows)

    def declare_same(self, pairs: Sequence[tuple[str, str]], *, agree: Agree | None = None) -> int:
        """Makes second identifiers one person with the first, from now on and for every part of the project. All of them or none; returns how many are new.

        Kept sealed, under an HMAC: the database names neither, and it outlives an erasure, so that whoever was erased does not come back under the other name. A second identifier that was
        seen already is refused: what was collected, said and spent under it would be left with a person who is none.

        Args:
            pairs: (second identifier, first one), spelled as for `pseudonym`.
            agree: called in the same transaction when there are new ones, with the places of their pairs, from 1, and what was the second's own pseudonym. Nothing is declared when it raises.

        Raises:
            RecordInvalid: when the second was seen already, is the first, has a second of its own, or was declared to be somebody else. The value is the place of the pair, from 1.
        """
        new: dict[int, SubjectId] = {}
        rows = []
        with self._store.transaction() as tx:
            same = self.second_identifiers(tx)
            for place, (second, first) in enumerate(pairs, start=1):
                own, person = self._own_pseudonym(second), same.get(first_own := self._own_pseudonym(first), first_own)
                if same.get(own) == person:
                    continue
                if own == person or own in same or own in same.values() or self._is_known(tx, own):
                    raise RecordInvalid(
                        "a second identifier that was not seen before, and is nobody else's",
                        value=f"pair {place}",
                        remedy="Declare it before its records are collected, and the identifier that the project knows as the first.",
                    )
                same[own], new[place] = person, own
                name = self.hmac("same", own.encode()).hex()
                rows.append({"kind": _SAME, "name": name, "wrapped": self._wrap.seal(f"{own} {person}".encode(), context=f"{_SAME}/{name}".encode())})
            if rows:
                tx.execute(insert(_keys), rows)
                if agree is not None:
                    agree(tx, new)
        self._same = same
        return len(rows)

    def _open_same(self, name: str, wrapped: bytes) -> tuple[SubjectId, SubjectId]:
        own, _, person = self._wrap.open(wrapped, context=f"{_SAME}/{name}".encode()).decode().partition(" ")
        return SubjectId(own), SubjectId(person)

    def hmac(self, label: str, message: bytes) -> bytes:
        """Returns a project-wide HMAC under the label's own key (suppression lists, ids): it survives every erasure."""
        return self._log.derive(label).mac(message)

    def hmacs(self, label: str, messages: Sequence[bytes]) -> list[bytes]:
        """Returns `hmac` of many messages, deriving the label's key once."""
        key = self._log.derive(label)
        return [key.mac(message) for message in messages]

    def subject(self, subject: SubjectId) -> Key:
        """Returns the subject's key, created at the first call.

        Raises:
            Forgotten: when the subject's key was destroyed; it is never created again.
        """
        return self._key("subject", subject)

    def subjects(self, subjects: list[SubjectId]) -> dict[SubjectId, Key]:
        """Returns the keys of many subjects with one transaction. Raises like `subject`."""
        missing = [s for s in dict.fromkeys(subjects) if ("subject", s) not in self._cache]
        if missing:
            with self._store.transaction() as tx:
                loaded: dict[tuple[str, str], Key] = {("subject", name): self._load(tx, "subject", name) for name in missing}
            self._cache |= loaded
        return {s: self._cache["subject", s] for s in subjects}

    def existing(self, subjects: Sequence[SubjectId]) -> dict[SubjectId, Key]:
        """Returns the keys of those subjects who have one, and makes none. Raises like `subject`."""
        wanted = list(dict.fromkeys(subjects))
        tombstones = [digest.hex() for digest in self.hmacs("tombstone", [f"subject/{subject}".encode() for subject in wanted])]
        found: dict[str, bytes] = {}
        with self._store.transaction() as tx:
            for start in range(0, len(wanted), _IN_ONE_QUERY):
                names = wanted[start : start + _IN_ONE_QUERY] + tombstones[start : start + _IN_ONE_QUERY]
                rows = tx.execute(select(_keys.c.name, _keys.c.wrapped).where(_keys.c.kind == "subject", _keys.c.name.in_(names)))
                found |= {row.name: row.wrapped for row in rows}
        if _DESTROYED in found.values():
            raise _forgotten("subject")
        return {s: Key(self._wrap.open(found[s], context=f"subject/{s}".encode())) for s in wanted if s in found}

    def purpose(self, name: str) -> Key:
        """Returns the project's key for one purpose ("shards", "checkpoint"), created at the first call."""
        return self._key("purpose", name)

    def run(self, run: str) -> Key:
        """Returns the key of a run, created at the first call.

        Raises:
            Forgotten: when the run has closed and its key was destroyed.
        """
        return self._key("run", run)

    def signer(self, name: str = "log", *, tx: Connection | None = None) -> Ed25519PrivateKey:
        """Returns the project's Ed25519 signing key of that name, created at the first call.

        Args:
            tx: the caller's transaction, when it is inside one.

        Raises:
            Forgotten: when the key was rotated out and destroyed.
        """
        key = self._load(tx, "signer", name) if tx is not None else self._key("signer", name)
        return Ed25519PrivateKey.from_private_bytes(key._secret)

    def destroy_signer(self, name: str) -> None:
        """Destroys a signing key that was rotated out; what it signed stays verifiable. Idempotent."""
        self._destroy("signer", name)

    def forget(self, subject: SubjectId) -> None:
        """Destroys the subject's key for good. Idempotent."""
        self._destroy("subject", subject)

    def known_subjects(self) -> list[SubjectId]:
        """Returns every subject that has a key. Internal (PITFALLS 41)."""
        with self._store.transaction() as tx:
            living = (_keys.c.kind == "subject") & (_keys.c.wrapped != _DESTROYED)
            return [SubjectId(name) for name in tx.execute(select(_keys.c.name).where(living).order_by(_keys.c.name)).scalars()]

    def has_subject(self, subject: SubjectId) -> bool:
        """Says whether the subject has a key, or had one that was destroyed; makes none."""
        with self._store.transaction() as tx:
            return self._is_known(tx, subject)

    def _is_known(self, tx: Connection, subject: SubjectId) -> bool:
        named = _keys.c.name.in_((subject, self._tombstone("subject", subject)))
        return tx.execute(select(_keys.c.name).where(_keys.c.kind == "subject", named)).first() is not None

    def close_run(self, run: str) -> None:
        """Destroys the run's key: its noise and sampling can no longer be regenerated. Idempotent."""
        self._destroy("run", run)

    def _key(self, kind: str, name: str) -> Key:
        key = self._cache.get((kind, name))
        if key is None:
            with self._store.transaction() as tx:
                key = self._load(tx, kind, name)
            self._cache[kind, name] = key
        return key

    def _load(self, tx: Connection, kind: str, name: str) -> Key:
        found = self._find(tx, kind, name)
        if found is not None:
            return found
        key = Key.random()
        tx.execute(insert(_keys).values(kind=kind, name=name, wrapped=self._wrap.seal(key._secret, context=f"{kind}/{name}".encode())))
        return key

    def _find(self, tx: Connection, kind: str, name: str) -> Key | None:
        rows = tx.execute(select(_keys.c.wrapped).where(_keys.c.kind == kind, _keys.c.name.in_((name, self._tombstone(kind, name))))).scalars().all()
        wrapped = max(rows, key=lambda stored: stored == _DESTROYED, default=None)
        if wrapped == _DESTROYED:
            raise _forgotten(kind)
        return None if wrapped is None else Key(self._wrap.open(wrapped, context=f"{kind}/{name}".encode()))

    def _destroy(self, kind: str, name: str) -> None:
        self._cache.pop((kind, name), None)
        with self._store.transaction() as tx:
            tx.execute(delete(_keys).where(_keys.c.kind == kind, _keys.c.name.in_((name, self._tombstone(kind, name)))))
            tx.execute(insert(_keys).values(kind=kind, name=self._tombstone(kind, name), wrapped=_DESTROYED))
        self._store.scrub()

    def _tombstone(self, kind: str, name: str) -> str:
        """What a destroyed key is remembered by: an HMAC, so that not even the pseudonym stays."""
        return self.hmac("tombstone", f"{kind}/{name}".encode()).hex()


_SAME = "same person"
"""The kind of the rows that say which identifiers are one person."""

_DESTROYED = b""
"""The tombstone in place of a wrapped key: a destroyed key is not silently made anew."""
_IN_ONE_QUERY = 500


def _forgotten(kind: str) -> Forgotten:
    return Forgotten(f"a {kind} whose key still exists", remedy="It was erased or closed; this cannot be undone.")


def open_master(location: str) -> Key:
    """Opens the master key, or creates it where the location is a file that does not exist.

    Args:
        location: `file:PATH` (32 bytes as base64, mode 0600), `env:NAME` (the same base64), or `vault+https://HOST/v1/MOUNT/KEY?file=PATH` (the transit engine
            of HashiCorp Vault or OpenBao: the file holds the wrapped key, the service unwraps it; the token comes from `VAULT_TOKEN`).

    Raises:
        ConfigInvalid: when the location is of another kind.
        KeyUnavailable: when the key cannot be read, has the wrong size, or the file is readable by others.
    """
    kind, _, rest = location.partition(":")
    if kind == "file":
        return _master_from_file(Path(rest))
    if kind == "env":
        return _decode_master(os.environ.get(rest), f"environment variable {rest}")
    if kind in ("vault+https", "vault+http"):
        return _master_from_vault(location.removeprefix("vault+"))
    raise ConfigInvalid("[keys] master to start with file:, env: or vault+https:", value=kind)


def _master_from_file(path: Path) -> Key:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_private(path, base64.b64encode(secrets.token_bytes(KEY_BYTES)))
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        mode = oct(stat.S_IMODE(path.stat().st_mode))
        raise KeyUnavailable("a master key file that only its owner can read", value=f"mode {mode}", remedy=f"chmod 600 {path}")
    return _decode_master(path.read_text(), str(path))


def _write_private(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileExistsError):  # another process was faster: its key is the key
        os.link(partial, path)
    partial.unlink()


def _decode_master(encoded: str | None, where: str) -> Key:
    try:
        secret = base64.b64decode((encoded or "").strip(), validate=True)
    except ValueError:
        secret = b""
    if len(secret) != KEY_BYTES:
        raise KeyUnavailable(f"32 bytes of base64 in {where}", remedy="Restore the key; without it the sealed data cannot be opened.")
    return Key(secret)


def _master_from_vault(url: str) -> Key:
    base, _, query = url.partition("?file=")
    if not query:
        raise ConfigInvalid("a Vault URL that ends in ?file=PATH for the wrapped key")
    mount, _, key_name = base.rpartition("/")
    path = Path(query)
    if not path.exists():
        secret = base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()
        wrapped = _vault_call(f"{mount}/encrypt/{key_name}", {"plaintext": secret})["ciphertext"]
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_private(path, wrapped.encode())
    answer = _vault_call(f"{mount}/decrypt/{key_name}", {"ciphertext": path.read_text().strip()})
    return _decode_master(answer["plaintext"], "the answer of the key service")


def _vault_call(url: str, body: dict[str, str]) -> dict[str, str]:
    headers = {"X-Vault-Token": os.environ.get("VAULT_TOKEN", ""), "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            answer = json.load(response)["data"]
            return {key: str(value) for key, value in answer.items()}
    except (urllib.error.URLError, ValueError, KeyError, TimeoutError) as error:
        reason = f"HTTP {error.code}" if isinstance(error, urllib.error.HTTPError) else type(error).__name__
        raise KeyUnavailable("a key service that answers", value=reason, remedy="Check the address and VAULT_TOKEN.") from None


def _encode_path(path: tuple[str | int, ...]) -> bytes:
    parts = [f"{'i' if isinstance(p, int) else 's'}{p}".encode() for p in path]
    return b"discreet/v1" + b"".join(len(p).to_bytes(4, "big") + p for p in parts)
