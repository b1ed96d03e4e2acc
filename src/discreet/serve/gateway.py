"""A released model behind the gateway: verified against its signed statement before it is loaded, and named in every answer.

It starts only with a `Release`: the signed statement is verified again, and the digests of the base and of the adapter are computed from the files that are opened.
The digest of the adapter that answered travels in every answer (`local`).

Does not cover: whoever may read the process' memory.
"""

from __future__ import annotations

from discreet import model
from discreet.errors import DigestMismatch, NotReleased
from discreet.evidence import note, statement
from discreet.evidence.statement import Entry, Predicate
from discreet.keys import Key
from discreet.record import Digest, Release
from discreet.serve.engine import LocalEngine

STATEMENT_FILE, ADAPTER_FOLDER = "release.json", "adapter"
"""A release folder: the signed `released` statement, and the PEFT adapter whose digest it names."""


def released_entry(envelope: bytes, *, public_key: str) -> Entry:
    """Returns the `released` statement that this key signed.

    Args:
        envelope: content of `release.json`, a DSSE envelope.
        public_key: the log's vkeys (C2SP), a line each, which also name the log.

    Raises:
        EvidenceInvalid: when the envelope, its signature, its place or the key is not valid.
        NotReleased: when it is a valid statement of another kind: that a model was trained, or withheld, is not a release.
    """
    keys = note.parse_keys(public_key)
    entry = statement.verify(envelope, keys=note.by_label(keys), origin=keys[0].name)
    if entry.predicate is not Predicate.RELEASED:
        raise NotReleased("a statement that a model was released", value=entry.predicate, remedy="Run `discreet release`.")
    return entry


def verify_release(release: Release, *, public_key: str, base: Digest) -> Release:
    """Returns the release, after reading its signed statement again and comparing it with what is there.

    Args:
        release: as given by the pipeline.
        public_key: the log's vkey.
        base: digest computed from the files of the base model.

    Raises:
        EvidenceInvalid, NotReleased: as `released_entry`.
        DigestMismatch: when the release says other than its statement, or the base is not the one that was released.
    """
    fields = released_entry(release.statement, public_key=public_key).fields
    said = {"name": release.name, "base": release.base, "adapter": release.adapter, "guarantee": dict(release.guarantee)}
    for name, value in said.items():
        if fields[name] != value:
            raise DigestMismatch(f"a release with the {name} of its signed statement")
    if fields["base"] != base:
        remedy = "These are not the files that were audited; restore them."
        raise DigestMismatch(f"the base that was released, {fields['base']}", value=base, remedy=remedy)
    return release


def open_engine(release: Release, base: model.Base, *, public_key: str, key: Key) -> LocalEngine:
    """Returns the engine of a release, verified against the files that it opens: what is hashed is what is loaded, whoever writes to the release folder meanwhile.

    Raises:
        EvidenceInvalid, NotReleased, DigestMismatch: as `verify_release`, and when the adapter is not the one that was released.
    """
    verify_release(release, public_key=public_key, base=base.digest)
    return LocalEngine(model.load_adapter(base, release.path / ADAPTER_FOLDER, digest=release.adapter), base.tokenizer, key=key)
