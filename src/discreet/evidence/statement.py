"""Statements about what was done: in-toto Statements v1 in DSSE envelopes, of a closed list of kinds.

A `Statement` is what a caller says; an envelope is the statement with its place in the log (origin, index, time) and a fresh 16-byte salt, signed. The salt makes
the hash of an envelope say nothing about a statement that was not shown, however few the possible contents: a public bundle carries the leaf hashes of all
entries and the envelopes of the public ones only. The place makes an envelope worthless anywhere else in this log or in another.

`PREDICATES` is the whole table of kinds; a new kind is a row there and nothing else. A row says whether the kind may travel in a public bundle and which fields it must have. The
fields of public kinds are closed (required and optional, no others), because they leave the house: they hold public parameters or DP-released values (`exposure` says which), never
counts of records, snapshot roots or member scores (PITFALLS 41). Internal kinds may say more.

Guarantees: `verify` returns an entry that this key signed for this log, in the one byte form that this module prints, or raises `EvidenceInvalid`. JSON is canonical (sorted
keys, no insignificant space, UTF-8, duplicate keys and NaN refused, integers within 2^53) and accepted only when printing it again gives the same bytes.

Sources: in-toto Attestation Framework v1 (Statement layer), DSSE v1.0 (envelope and PAE), RFC 8785 for the reasons (not for the number format: floats are printed as Python's
shortest round-trip form).

Does not cover: the order of entries and the tree (`log.py`); whether a statement is true.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Any, TypeAlias, final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from discreet.errors import EvidenceInvalid
from discreet.record import Digest

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
PREDICATE_PREFIX = "urn:discreet:predicate:"

MAX_SUBJECTS = 512
MAX_ENVELOPE_BYTES = 1 << 20
SALT_BYTES = 16

_MAX_INTEGER = (1 << 53) - 1
_MAX_DEPTH = 32
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SALT = re.compile(rf"[0-9a-f]{{{2 * SALT_BYTES}}}")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)
_BLAND = "an envelope in the canonical form of docs/formats.md"


class Predicate(StrEnum):
    """The kinds of statement, in the order in which a record meets them. The rows are in `PREDICATES`."""

    COLLECTED = "collected"
    ADMITTED = "admitted"
    REFUSED = "refused"
    DEIDENTIFIED = "deidentified"
    FROZEN = "frozen"
    INDEXED = "indexed"
    SEARCHED = "searched"
    COMMITTED = "committed"
    BUDGET_OPENED = "budget_opened"
    BUDGET_RAISED = "budget_raised"
    RESERVED = "reserved"
    SPENT = "spent"
    CLOSED = "closed"
    TRAINED = "trained"
    AUDITED = "audited"
    ATTACKED = "attacked"
    CONTROL_DESTROYED = "control_destroyed"
    KEY_DESTROYED = "key_destroyed"
    KEY_ROTATED = "key_rotated"
    RELEASED = "released"
    WITHHELD = "withheld"
    OVERRIDDEN = "overridden"
    ACCESS_GRANTED = "access_granted"
    CONSENT_CHANGED = "consent_changed"
    ERASED = "erased"
    SERVED = "served"
    MEASURED = "measured"
    SYNTHESIZED = "synthesized"
    CHILD_AUDITED = "child_audited"

    @property
    def public(self) -> bool:
        """Whether statements of this kind may travel in a public bundle."""
        return PREDICATES[self].optional is not None

    @property
    def uri(self) -> str:
        """The `predicateType` of this kind: a stable name, not an address."""
        return f"{PREDICATE_PREFIX}{self.value}:v1"


class Exposure(StrEnum):
    """Who may see a field. *public*: no private record could change it. *dp-released*: post-processing of what a guarantee covers. *internal*: neither."""

    PUBLIC = "public"
    DP_RELEASED = "dp-released"
    INTERNAL = "internal"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kind of statement: the fields it must have (the value may be null), for a public kind the only others it may have, and which of them are DP-released."""

    required: tuple[str, ...]
    optional: tuple[str, ...] | None
    released: frozenset[str] = frozenset()


def exposure(predicate: Predicate, field: str) -> Exposure:
    """Returns who may see a field of a kind; "subject" stands for the digests that a statement is about."""
    row = PREDICATES[predicate]
    if row.optional is None:
        return Exposure.INTERNAL
    return Exposure.DP_RELEASED if field in row.released else Exposure.PUBLIC


def _public(required: str, optional: str = "", *, released: str = "") -> Row:
    return Row(required=tuple(required.split()), optional=tuple(optional.split()), released=frozenset(released.split()))


def _internal(required: str) -> Row:
    return Row(required=tuple(required.split()), optional=None)


_PRICE = (
    "unit epsilon delta relation accountant guarantee sampling_probability noise_multiplier clip_norm steps expected_batch cap filter_epsilon kind"
)

PREDICATES: Mapping[Predicate, Row] = MappingProxyType(
    {
        Predicate.COLLECTED: _internal("source sensitivity"),
        Predicate.ADMITTED: _internal("purpose basis"),
        Predicate.REFUSED: _internal("purpose reason"),
        Predicate.DEIDENTIFIED: _internal("policy counts"),
        Predicate.FROZEN: _internal("name"),
        Predicate.INDEXED: _internal("snapshot purposes"),
        Predicate.SEARCHED: _internal("purpose by role passages"),
        Predicate.COMMITTED: _public("commitment", "scheme run canaries kind"),
        Predicate.BUDGET_OPENED: _public("budget epsilon delta unit", "accountant orders relation query_delta period"),
        Predicate.BUDGET_RAISED: _public("budget epsilon earlier reason"),
        Predicate.RESERVED: _internal("reservation run budget plan snapshot"),
        Predicate.SPENT: _public("reservation run budget plan", _PRICE),
        Predicate.CLOSED: _public("reservation reason", "run budget plan steps"),
        Predicate.TRAINED: _public(
            "run track base adapter plan guarantee",
            "reservation budget steps parameters public_loss kind chosen",
            released="subject adapter public_loss chosen",
        ),
        Predicate.AUDITED: _public(
            "adapter verdict epsilon_lower ceiling",
            "run level detectable detectable_mu claimed_epsilon claimed_delta layers canaries recitation roc control_roc report",
            released="subject adapter verdict epsilon_lower ceiling detectable detectable_mu layers recitation roc control_roc report",
        ),
        Predicate.ATTACKED: _internal("adapter run layers"),
        Predicate.CONTROL_DESTROYED: _public("control", "run kind reason", released="subject"),
        Predicate.KEY_DESTROYED: _public("run", "reason kind", released="subject"),
        Predicate.KEY_ROTATED: _public("old new consent"),
        Predicate.RELEASED: _public(
            "name base adapter guarantee",
            "run plan gates audit verdict report purpose controller policy limits kind",
            released="subject adapter gates audit verdict report",
        ),
        Predicate.WITHHELD: _public("adapter reasons", "name run gates audit verdict", released="subject adapter reasons gates audit verdict"),
        Predicate.OVERRIDDEN: _public("rule reason", "value run budget name by", released="subject value"),
        Predicate.ACCESS_GRANTED: _internal("role action"),
        Predicate.CONSENT_CHANGED: _internal("change"),
        Predicate.ERASED: _internal("reason"),
        Predicate.SERVED: _internal("release requests"),
        Predicate.MEASURED: _public("what reservation epsilon values", "delta unit cap mechanism kind", released="subject values"),
        Predicate.SYNTHESIZED: _public("adapter guarantee reservation", "texts kind", released="subject adapter"),
        Predicate.CHILD_AUDITED: _public("adapter verdict kind", "level layers", released="subject adapter verdict layers"),
    }
)
"""The closed table. `track` of a `trained` statement is "dp" or "public"; `plan` and `guarantee` are null on the public track."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Statement:
    """What a caller says happened to some digests; checked against its row when made.

    Args:
        predicate: the kind.
        subjects: the digests that the statement is about, 1 to 512, each once (in-toto requires one; larger batches are several statements).
        fields: JSON values by name. They are copied: later changes of the caller's objects do not reach the statement.

    Raises:
        EvidenceInvalid: when the fields or subjects are not those of the kind, or are not canonical JSON.
    """

    predicate: Predicate
    subjects: tuple[Digest, ...]
    fields: Mapping[str, JSON]

    def __post_init__(self) -> None:
        if not 1 <= len(self.subjects) <= MAX_SUBJECTS or len(set(self.subjects)) != len(self.subjects):
            raise EvidenceInvalid(f"1 to {MAX_SUBJECTS} different subjects in a {self.predicate} statement", value=len(self.subjects))
        if not all(_DIGEST.fullmatch(subject) for subject in self.subjects):
            raise EvidenceInvalid(f"subjects of a {self.predicate} statement to be 'sha256:' and 64 lower-case hex digits")
        row = PREDICATES[self.predicate]
        missing = [name for name in row.required if name not in self.fields]
        if missing:
            raise EvidenceInvalid(f"the fields {', '.join(row.required)} in a {self.predicate} statement", value=f"none named {', '.join(missing)}")
        unknown = [] if row.optional is None else sorted(set(self.fields) - {*row.required, *row.optional})
        if unknown:
            remedy = "It is public, so its fields are closed: add the field to PREDICATES, or say it in an internal statement."
            raise EvidenceInvalid(f"only known fields in a {self.predicate} statement", value=", ".join(unknown), remedy=remedy)
        object.__setattr__(self, "fields", MappingProxyType(json.loads(canonical_json(self.fields))))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A statement at its place in a log, as read from its verified envelope. `time` is RFC 3339 in UTC with microseconds.

    `serial` is the number of public statements before this one in the log (None for internal ones): a public bundle that leaves one out shows a gap.
    """

    index: int
    predicate: Predicate
    subjects: tuple[Digest, ...]
    fields: Mapping[str, Any]
    time: str
    serial: int | None
    envelope: bytes
    key_id: str


def digest_of(content: bytes) -> Digest:
    """Returns the digest of bytes that are not guessable personal data (files, plans, parameters); records have salted ones (`record.py`)."""
    return Digest("sha256:" + hashlib.sha256(content).hexdigest())


def canonical_json(value: object) -> bytes:
    """Returns the one byte form of a JSON value: sorted keys, no space, UTF-8, shortest round-trip floats.

    Raises:
        EvidenceInvalid: on NaN, infinity, integers beyond 2^53 - 1, keys that are not strings, lone surrogates, or anything that is not JSON.
    """
    try:
        return json.dumps(_plain(value, 0), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):  # the value may be sensitive: nothing of it is repeated, nor chained
        raise EvidenceInvalid(
            "a value that canonical JSON can hold", remedy="Use strings, finite numbers, booleans, null, lists and objects."
        ) from None


def parse_json(content: bytes) -> Any:
    """Returns the value of canonical JSON.

    Raises:
        EvidenceInvalid: when the bytes are not exactly what `canonical_json` prints for the value.
    """
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError):
        raise EvidenceInvalid(_BLAND) from None
    if canonical_json(value) != content:  # also what tells duplicate keys: of two, one is left
        raise EvidenceInvalid(_BLAND)
    return value


def parse_once(content: bytes) -> Any:
    """Returns the value of JSON in any layout.

    Raises:
        EvidenceInvalid: when it is no JSON, or an object has a key twice: readers would differ in which of them they see.
    """
    try:
        return json.loads(content, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        raise EvidenceInvalid("JSON in which no object has a key twice") from None


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if len({name for name, _ in pairs}) != len(pairs):
        raise ValueError
    return dict(pairs)


def pae(payload_type: str, payload: bytes) -> bytes:
    """Returns DSSE's pre-authentication encoding, the bytes that are signed (DSSE v1.0)."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def seal_envelope(payload: bytes, *, payload_type: str, signer: Ed25519PrivateKey, key_id: str) -> bytes:
    """Returns the signed DSSE envelope of a payload, as canonical JSON."""
    signature = signer.sign(pae(payload_type, payload))
    return canonical_json(
        {
            "payload": base64.b64encode(payload).decode(),
            "payloadType": payload_type,
            "signatures": [{"keyid": key_id, "sig": base64.b64encode(signature).decode()}],
        }
    )


def open_envelope(envelope: bytes, *, payload_type: str, keys: Mapping[str, Ed25519PublicKey]) -> tuple[bytes, str]:
    """Returns the payload of a DSSE envelope signed by one of these keys, and that key's label.

    Args:
        keys: by label (`note.by_label`); the trusted ones.

    Raises:
        EvidenceInvalid: when the envelope is too large, not canonical, of another type, signed by another key than these, or the signature does not verify.
    """
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise EvidenceInvalid(f"an envelope of at most {MAX_ENVELOPE_BYTES} bytes", value=len(envelope))
    outer = parse_json(envelope)
    match outer:
        case {"payload": str(encoded), "payloadType": str(kind), "signatures": [{"keyid": str(named), "sig": str(sig), **no_more}], **nothing}:
            pass
        case _:
            raise EvidenceInvalid(_BLAND)
    if no_more or nothing:
        raise EvidenceInvalid(_BLAND)
    if kind != payload_type or named not in keys:
        raise EvidenceInvalid("an envelope of this type, signed by this log's key", remedy="Verify with the public key of the log that made it.")
    payload, signature = _decode(encoded), _decode(sig)
    try:
        keys[named].verify(signature, pae(kind, payload))
    except InvalidSignature:
        raise EvidenceInvalid("an envelope whose signature verifies") from None
    return payload, named


def sign(
    statement: Statement, *, signer: Ed25519PrivateKey, key_id: str, origin: str, index: int, serial: int | None, time: str, salt: bytes
) -> bytes:
    """Returns the envelope of a statement at its place in a log.

    Args:
        statement: what happened.
        signer: the log's key.
        key_id: its name (`note.VerifierKey.label`).
        origin: the log's name.
        index: of the entry, >= 0.
        serial: public statements before it, or None exactly for an internal kind.
        time: RFC 3339 in UTC with microseconds.
        salt: 16 fresh secret random bytes.

    Raises:
        EvidenceInvalid: when the place or the salt is malformed, or the envelope is too large.
    """
    predicate = {"fields": statement.fields, "index": index, "log": origin, "salt": salt.hex(), "serial": serial, "time": time}
    if not _is_place(predicate, statement.predicate):  # construction verifies: what is written can be read back
        raise EvidenceInvalid(_BLAND)
    payload = canonical_json(
        {
            "_type": STATEMENT_TYPE,
            "predicate": predicate,
            "predicateType": statement.predicate.uri,
            "subject": [{"digest": {"sha256": subject.removeprefix("sha256:")}} for subject in statement.subjects],
        }
    )
    envelope = seal_envelope(payload, payload_type=PAYLOAD_TYPE, signer=signer, key_id=key_id)
    if len(envelope) > MAX_ENVELOPE_BYTES:
        raise EvidenceInvalid(f"an envelope of at most {MAX_ENVELOPE_BYTES} bytes", value=len(envelope), remedy="Split the statement.")
    return envelope


def verify(envelope: bytes, *, keys: Mapping[str, Ed25519PublicKey], origin: str) -> Entry:
    """Returns the entry that one of these keys signed for this log; which of them was in force at its place is for the caller to check (`Entry.key_id`).

    Args:
        envelope: the bytes of the log entry.
        keys: of the log, by label (`note.by_label`).
        origin: the log's name.

    Raises:
        EvidenceInvalid: when the envelope or its signature is not valid, or the statement is not of the closed table.
    """
    payload, key_id = open_envelope(envelope, payload_type=PAYLOAD_TYPE, keys=keys)
    return _read_payload(payload, envelope, origin, key_id)


def _read_payload(payload: bytes, envelope: bytes, origin: str, key_id: str) -> Entry:
    """The entry of a payload whose signature has been verified; every key of it is accounted for."""
    body = parse_json(payload)
    try:
        if body["_type"] != STATEMENT_TYPE or set(body) != {"_type", "predicate", "predicateType", "subject"}:
            raise ValueError
        place = body["predicate"]
        if set(place) != {"fields", "index", "log", "salt", "serial", "time"} or not isinstance(place["fields"], dict):
            raise ValueError
        kind = Predicate(body["predicateType"].removeprefix(PREDICATE_PREFIX).removesuffix(":v1"))
        subjects = tuple(_subject(item) for item in body["subject"])
    except (AttributeError, KeyError, TypeError, ValueError):
        raise EvidenceInvalid(_BLAND) from None
    if body["predicateType"] != kind.uri or not _is_place(place, kind):
        raise EvidenceInvalid(_BLAND)
    if place["log"] != origin:
        raise EvidenceInvalid("a statement made for this log", remedy="It was signed for another log of the same key.")
    statement = Statement(predicate=kind, subjects=subjects, fields=place["fields"])
    return Entry(
        index=place["index"],
        predicate=kind,
        subjects=subjects,
        fields=statement.fields,
        time=place["time"],
        serial=place["serial"],
        envelope=envelope,
        key_id=key_id,
    )


def _subject(item: dict[str, Any]) -> Digest:
    if set(item) != {"digest"} or set(item["digest"]) != {"sha256"}:
        raise ValueError
    return Digest(f"sha256:{item['digest']['sha256']}")


def _is_place(place: Mapping[str, Any], kind: Predicate) -> bool:
    serial, index = place["serial"], place["index"]
    return (
        _is_count(index)
        and (_is_count(serial) and serial <= index if kind.public else serial is None)
        and isinstance(place["salt"], str)
        and _SALT.fullmatch(place["salt"]) is not None
        and isinstance(place["time"], str)
        and _TIME.fullmatch(place["time"]) is not None
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _decode(encoded: str) -> bytes:
    """Standard base64 with padding; the re-encoding must be equal, so that spare bits and spaces are refused."""
    try:
        content = base64.b64decode(encoded, validate=True)
    except ValueError:
        raise EvidenceInvalid(_BLAND) from None
    if base64.b64encode(content).decode() != encoded:
        raise EvidenceInvalid(_BLAND)
    return content


def _plain(value: object, depth: int) -> object:
    """The same value in the types that json.dumps knows (a read-only mapping is not one of them); refuses what it would accept or bend silently, but for NaN."""
    if isinstance(value, str) or value is None or isinstance(value, bool):
        return value
    if depth > _MAX_DEPTH:
        raise ValueError
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, int):
        if abs(value) > _MAX_INTEGER:
            raise ValueError
        return value
    if not isinstance(value, float):
        raise TypeError
    return float(value)
