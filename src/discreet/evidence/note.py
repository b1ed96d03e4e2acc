"""C2SP signed notes: text, a blank line and signature lines; checkpoints of logs, and the cosignatures of witnesses, all with Ed25519.

    example.org/log                     origin
    20852163                            number of leaves
    CsUYapGGPo4dkMgIAUqom/Xajj7h2...=   root, base64

    — example.org/log Az3grlgtzPICa5OS8npVmf1M...=

Parsing is canonical: a note, a checkpoint or a verifier key is accepted only if printing what was understood gives the same bytes. The size is checked first. Whatever is malformed
gets one error, which says nothing of where: the reader of a forged note needs no help.

Guarantees: `open_note` returns a text that at least one of the given keys signed, and none of the given keys signed wrongly; signature lines of unknown keys are ignored, as
the format demands (rotation, witnesses).

Sources: c2sp.org/signed-note, c2sp.org/tlog-checkpoint, c2sp.org/tlog-cosignature (Ed25519, `cosignature/v1`).

Does not cover: ML-DSA-44 and ECDSA signature lines (ignored as unknown), quorums of witnesses (count `Opened.signed_by`), whether a checkpoint is consistent with another (`merkle.py`).
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from discreet.errors import EvidenceInvalid

MAX_NOTE_BYTES = 64 * 1024
MAX_SIGNATURES = 100

_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")
_TIMESTAMP_BYTES = 8
_SIGNATURE_BYTES = 64


class Algorithm(IntEnum):
    """Signature types of c2sp.org/signed-note that are verified here."""

    ED25519 = 0x01
    COSIGNATURE_V1 = 0x04


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierKey:
    """A named public key. Printed as `name+hex of the key ID+base64(algorithm byte, key)`, the `vkey` of C2SP.

    Args:
        name: without spaces and plus signs; by convention a URL without a scheme, for a log the origin.
        algorithm: what its signatures are over.
        public: 32 bytes, an Ed25519 public key.

    Raises:
        EvidenceInvalid: when the name or the key is malformed.
    """

    name: str
    algorithm: Algorithm
    public: bytes

    def __post_init__(self) -> None:
        _check_name(self.name)
        if len(self.public) != 32:
            raise _malformed()

    @property
    def key_id(self) -> bytes:
        """The first four bytes of SHA-256(name, newline, algorithm, key): an identifier, not a commitment."""
        return hashlib.sha256(self.name.encode() + b"\n" + bytes([self.algorithm]) + self.public).digest()[:4]

    @property
    def label(self) -> str:
        """Name and key ID, as they stand in the `keyid` of our envelopes."""
        return f"{self.name}+{self.key_id.hex()}"

    @property
    def ed25519(self) -> Ed25519PublicKey:
        """The key itself."""
        return Ed25519PublicKey.from_public_bytes(self.public)

    def __str__(self) -> str:
        return f"{self.label}+{base64.b64encode(bytes([self.algorithm]) + self.public).decode()}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A note that verified: its text, and the keys that signed it."""

    text: str
    signed_by: tuple[VerifierKey, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """The head of a log's tree at one size.

    Args:
        origin: name of the log, one non-empty line.
        size: number of leaves, 0 <= size < 2^63.
        root: 32 bytes.
        extensions: further lines, each non-empty; nobody audits them.

    Raises:
        EvidenceInvalid: when a line would not survive printing and parsing.
    """

    origin: str
    size: int
    root: bytes
    extensions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        lines = (self.origin, *self.extensions)
        if not all(line and _is_clean(line) and "\n" not in line for line in lines) or not 0 <= self.size < 1 << 63 or len(self.root) != 32:
            raise _malformed()

    @property
    def text(self) -> str:
        """The note text that is signed, with its final newline."""
        return "".join(f"{line}\n" for line in (self.origin, str(self.size), base64.b64encode(self.root).decode(), *self.extensions))


def verifier_key(*, name: str, signer: Ed25519PrivateKey, algorithm: Algorithm = Algorithm.ED25519) -> VerifierKey:
    """Returns the public half of a signing key under a name."""
    return VerifierKey(name=name, algorithm=algorithm, public=signer.public_key().public_bytes_raw())


def parse_key(vkey: str) -> VerifierKey:
    """Returns the key that a vkey line names.

    Raises:
        EvidenceInvalid: when it is not exactly the printed form of an Ed25519 key.
    """
    name, _, rest = vkey.partition("+")
    content = _decode(rest.partition("+")[2])
    if len(content) != 33 or content[0] not in tuple(Algorithm):
        raise _malformed()
    key = VerifierKey(name=name, algorithm=Algorithm(content[0]), public=content[1:])
    if str(key) != vkey:
        raise _malformed()
    return key


def parse_keys(text: str) -> tuple[VerifierKey, ...]:
    """Returns the keys of a log that had several, oldest first: one vkey a line, all under the log's name.

    Raises:
        EvidenceInvalid: when a line is no vkey, is there twice, or names another log.
    """
    keys = tuple(parse_key(line) for line in text.strip().split("\n"))
    if len({key.name for key in keys}) != 1 or len(set(keys)) != len(keys):
        raise _malformed()
    return keys


def by_label(keys: Sequence[VerifierKey]) -> dict[str, Ed25519PublicKey]:
    """Returns the keys by their label, as envelopes name them."""
    return {key.label: key.ed25519 for key in keys}


def sign_note(text: str, *, name: str, signer: Ed25519PrivateKey) -> bytes:
    """Returns the note of a text with one Ed25519 signature line.

    Args:
        text: ends in a newline, no control characters but newlines.
        name: of the key; for a checkpoint the origin of the log.
        signer: the key.

    Raises:
        EvidenceInvalid: when text or name cannot be a note.
    """
    if not _is_clean(text):
        raise _malformed()
    key = verifier_key(name=name, signer=signer)
    note = f"{text}\n{_line(key, signer.sign(text.encode()))}".encode()
    open_note(note, keys=[key])  # construction verifies
    return note


def cosign(note: bytes, *, log_key: VerifierKey, name: str, signer: Ed25519PrivateKey, timestamp: int) -> bytes:
    """Returns a checkpoint's note with a witness's cosignature line added (`cosignature/v1`).

    The caller, as a witness, has verified consistency with the largest checkpoint it cosigned before, and stored the new one in the same transaction.

    Args:
        note: the checkpoint, signed by the log.
        log_key: of the log; a witness signs nothing else than what the log signed.
        name: of the witness's key.
        signer: the witness's key, used for cosignatures only.
        timestamp: seconds since 1970, 0 < timestamp < 2^63.

    Raises:
        EvidenceInvalid: when the note is not a checkpoint signed by the log.
    """
    text = open_note(note, keys=[log_key]).text
    parse_checkpoint(text)
    if not 0 < timestamp < 1 << 63:
        raise _malformed()
    key = verifier_key(name=name, signer=signer, algorithm=Algorithm.COSIGNATURE_V1)
    signature = timestamp.to_bytes(_TIMESTAMP_BYTES, "big") + signer.sign(_cosigned(text, timestamp))
    cosigned = note + _line(key, signature).encode()
    open_note(cosigned, keys=[log_key, key])
    return cosigned


def open_note(note: bytes, *, keys: Sequence[VerifierKey]) -> Opened:
    """Returns the text of a note that one of the keys signed.

    Args:
        note: at most 64 KiB.
        keys: the trusted keys; a policy has no default.

    Raises:
        EvidenceInvalid: when the note is malformed, no given key signed it, or a given key's signature does not verify.
    """
    text, signatures = _split(note)
    signed_by: list[VerifierKey] = []
    for name, content in signatures:
        for key in keys:
            if key.name == name and key.key_id == content[:4]:
                _verify(text, content[4:], key)
                signed_by.append(key)
    if not signed_by:
        raise EvidenceInvalid("a note signed by a trusted key", remedy="Verify with the public key of the log that made it.")
    return Opened(text=text, signed_by=tuple(dict.fromkeys(signed_by)))


def parse_checkpoint(text: str) -> Checkpoint:
    """Returns the checkpoint that a note text is.

    Args:
        text: of an opened note.

    Raises:
        EvidenceInvalid: when the text is not exactly the printed form of a checkpoint.
    """
    lines = text.split("\n")
    if len(lines) < 4 or lines[-1] != "" or not _SIZE.fullmatch(lines[1]):
        raise _malformed()
    checkpoint = Checkpoint(origin=lines[0], size=int(lines[1]), root=_decode(lines[2]), extensions=tuple(lines[3:-1]))
    if checkpoint.text != text:
        raise _malformed()
    return checkpoint


def open_checkpoint(note: bytes, *, keys: Sequence[VerifierKey]) -> Checkpoint:
    """Returns the checkpoint that a log signed under its own name.

    Args:
        note: at most 64 KiB.
        keys: of the log, 1 or more; their name is the origin.

    Raises:
        EvidenceInvalid: as `open_note` and `parse_checkpoint`, and when the origin is another log's.
    """
    checkpoint = parse_checkpoint(open_note(note, keys=keys).text)
    if checkpoint.origin != keys[0].name:
        raise EvidenceInvalid("a checkpoint of the log that the key names", remedy="Verify with the public key of the log that made it.")
    return checkpoint


def _split(note: bytes) -> tuple[str, list[tuple[str, bytes]]]:
    """Text and (name, key ID and signature) of each line, or the one error."""
    if len(note) > MAX_NOTE_BYTES:
        raise EvidenceInvalid(f"a note of at most {MAX_NOTE_BYTES} bytes", value=len(note))
    try:
        printed = note.decode()
    except UnicodeDecodeError:
        raise _malformed() from None
    body, blank, tail = printed.rpartition("\n\n")
    # Lines end at U+000A alone: str.splitlines would also cut at U+0085 and U+2028, and let one text be read as two.
    if not blank or not body or not _is_clean(printed) or not tail.endswith("\n"):
        raise _malformed()
    lines = tail[:-1].split("\n")
    if len(lines) > MAX_SIGNATURES:
        raise _malformed()
    return body + "\n", [_parse_line(line) for line in lines]


def _parse_line(line: str) -> tuple[str, bytes]:
    dash, _, rest = line.partition(" ")
    name, _, encoded = rest.partition(" ")
    content = _decode(encoded)
    _check_name(name)
    if dash != "—" or len(content) <= 4:
        raise _malformed()
    return name, content


def _verify(text: str, signature: bytes, key: VerifierKey) -> None:
    message = text.encode()
    if key.algorithm is Algorithm.COSIGNATURE_V1:
        timestamp, signature = int.from_bytes(signature[:_TIMESTAMP_BYTES], "big"), signature[_TIMESTAMP_BYTES:]
        if timestamp >= 1 << 63:
            raise _malformed()
        message = _cosigned(text, timestamp)
    try:
        if len(signature) != _SIGNATURE_BYTES:
            raise InvalidSignature
        key.ed25519.verify(signature, message)
    except InvalidSignature:
        raise EvidenceInvalid("a note whose signature verifies") from None


def _cosigned(text: str, timestamp: int) -> bytes:
    return f"cosignature/v1\ntime {timestamp}\n{text}".encode()


def _line(key: VerifierKey, signature: bytes) -> str:
    return f"— {key.name} {base64.b64encode(key.key_id + signature).decode()}\n"


def _decode(encoded: str) -> bytes:
    """Standard base64; equal when encoded again, so that spare bits and missing padding are refused."""
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise _malformed() from None
    if base64.b64encode(content).decode() != encoded:
        raise _malformed()
    return content


def _check_name(name: str) -> None:
    if not name or "+" in name or any(c.isspace() for c in name) or not _is_clean(name):
        raise _malformed()


def _is_clean(text: str) -> bool:
    """No ASCII control character but the newline, and encodable (no lone surrogates)."""
    return not any((c < " " and c != "\n") or "\ud800" <= c <= "\udfff" for c in text)


def _malformed() -> EvidenceInvalid:
    return EvidenceInvalid("a well-formed signed note, checkpoint or verifier key", remedy="See docs/formats.md; the value was changed or cut.")
