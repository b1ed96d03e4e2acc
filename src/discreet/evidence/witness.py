"""A witness of a log: somebody else, who remembers the last checkpoint they saw and signs the next one only if the log has grown from it.

What: `cosign` verifies a bundle, compares it with the checkpoint kept in the witness's own folder, and returns the checkpoint's note with a `cosignature/v1` line. The folder holds
the witness's key and, for each log, the last note.

Guarantees: no cosignature for a bundle that does not verify, for fewer entries than were seen (rollback) or for other ones (fork); the note is kept on disk before its cosignature
leaves, so a crash can cost a cosignature and never allow two histories. `cosigned` is the other side: whoever relies on witnesses checks that all of them signed.

Source: C2SP tlog-cosignature and tlog-witness.

Does not cover: tlog-witness's HTTP protocol; a witness who shows their key to the log's owner.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from discreet.errors import EvidenceInvalid, OperationFailed
from discreet.evidence import note
from discreet.evidence.log import verify_bundle
from discreet.keys import KEY_BYTES, Key
from discreet.store import write_atomically

_KEY = "witness.key"


def cosign(bundle: Path, *, public_key: str, name: str, state: Path) -> dict[str, str]:
    """Returns the cosigned checkpoint and the witness's public key, as `checkpoint` and `key`.

    Args:
        bundle: a bundle of the log (`discreet evidence export`).
        public_key: the C2SP vkey of the log.
        name: of the witness's key.
        state: the witness's own folder; made when it is not there, readable by its owner only.

    Raises:
        EvidenceInvalid: when the bundle does not verify, or the log was rolled back or forked since.
        OperationFailed: when the witness's key file is not a key.
    """
    origin = note.parse_keys(public_key)[0].name
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    kept = state / f"{hashlib.sha256(origin.encode()).hexdigest()}.checkpoint"
    verified = verify_bundle(bundle, public_key=public_key, pinned=kept.read_bytes() if kept.exists() else None)
    signer = _signer(state / _KEY)
    write_atomically(kept, verified.note)
    signed = note.cosign(verified.note, log_key=verified.keys[-1], name=name, signer=signer, timestamp=int(time.time()))
    key = note.verifier_key(name=name, signer=signer, algorithm=note.Algorithm.COSIGNATURE_V1)
    return {"checkpoint": signed.decode(), "key": str(key)}


def cosigned(checkpoint: bytes, *, public_key: str, witnesses: str) -> bytes:
    """Returns a checkpoint that the log signed and every one of these witnesses cosigned.

    Args:
        checkpoint: the note.
        public_key: the C2SP vkeys of the log, a line each.
        witnesses: those of the witnesses, a line each; from them, not from the log's owner.

    Raises:
        EvidenceInvalid: when the note is not one of the log, or a witness is missing.
    """
    wanted = [note.parse_key(line) for line in witnesses.strip().split("\n")]
    note.open_checkpoint(checkpoint, keys=note.parse_keys(public_key))
    opened = note.open_note(checkpoint, keys=[*note.parse_keys(public_key), *wanted])
    missing = [key.name for key in wanted if key not in opened.signed_by]
    if missing:
        raise EvidenceInvalid("a checkpoint that every witness cosigned", value=f"none by {', '.join(missing)}")
    return checkpoint


def _signer(path: Path) -> Ed25519PrivateKey:
    """The witness's key, made the first time. The file is created closed to others, and never overwritten."""
    if not path.exists():
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(Key.random().stream("witness").bytes(KEY_BYTES))
    seed = path.read_bytes()
    if len(seed) != KEY_BYTES:
        raise OperationFailed(f"a witness key of {KEY_BYTES} bytes", value=f"{len(seed)} bytes", remedy="Restore it, or choose a new --state folder.")
    return Ed25519PrivateKey.from_private_bytes(seed)
