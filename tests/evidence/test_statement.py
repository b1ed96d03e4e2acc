"""DSSE's published vector, the closed table, canonical JSON, round trips, and every refusal."""

from __future__ import annotations

import base64
import json
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.errors import EvidenceInvalid
from discreet.evidence import statement
from discreet.evidence.statement import PREDICATES, Exposure, Predicate, Statement, canonical_json, digest_of, exposure, parse_json
from discreet.record import Sensitive

SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
PUBLIC = SIGNER.public_key()
ORIGIN, KEY_ID = "example.org/log", "example.org/log+00000000"
TIME = "2026-01-02T03:04:05.000006Z"
SUBJECT = digest_of(b"subject")
OPENED = Statement(predicate=Predicate.BUDGET_OPENED, subjects=(SUBJECT,), fields={"budget": "b", "epsilon": 8.0, "delta": 1e-6, "unit": "patient"})


def sign(what: Statement = OPENED, **changes: object) -> bytes:
    place = {"origin": ORIGIN, "index": 3, "serial": 1 if what.predicate.public else None, "time": TIME, "salt": bytes(range(16)), **changes}
    return statement.sign(what, signer=SIGNER, key_id=KEY_ID, **place)


def verify(envelope: bytes) -> statement.Entry:
    return statement.verify(envelope, keys={KEY_ID: PUBLIC}, origin=ORIGIN)


def resign(payload: bytes, payload_type: str = statement.PAYLOAD_TYPE) -> bytes:
    """An envelope with a good signature over whatever payload: only the reading of the payload can refuse it."""
    return statement.seal_envelope(payload, payload_type=payload_type, signer=SIGNER, key_id=KEY_ID)


def payload_of(envelope: bytes) -> dict:
    return json.loads(base64.b64decode(json.loads(envelope)["payload"]))


def example(predicate: Predicate) -> Statement:
    return Statement(predicate=predicate, subjects=(SUBJECT,), fields=dict.fromkeys(PREDICATES[predicate].required, "x"))


def test_pre_authentication_encoding_is_that_of_the_dsse_specification() -> None:
    assert statement.pae("http://example.com/HelloWorld", b"hello world") == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"


def test_the_envelope_is_in_toto_in_dsse_with_a_signature_anyone_can_check() -> None:
    outer = json.loads(sign())
    payload = base64.b64decode(outer["payload"])
    body = json.loads(payload)
    assert outer["payloadType"] == "application/vnd.in-toto+json"
    assert body["_type"] == "https://in-toto.io/Statement/v1"
    assert body["subject"] == [{"digest": {"sha256": SUBJECT.removeprefix("sha256:")}}]
    assert body["predicateType"] == "urn:discreet:predicate:budget_opened:v1"
    message = b"DSSEv1 28 application/vnd.in-toto+json %d %b" % (len(payload), payload)
    PUBLIC.verify(base64.b64decode(outer["signatures"][0]["sig"]), message)


@pytest.mark.parametrize("predicate", [p for p in Predicate if p.public])
def test_what_a_private_model_or_a_noisy_count_decides_is_dp_released(predicate: Predicate) -> None:
    """Another person in the corpus makes other weights, verdicts and counts: none of them may pass for public, nor the digests of them."""
    row = PREDICATES[predicate]
    released = {name for name in (*row.required, *(row.optional or ())) if exposure(predicate, name) is Exposure.DP_RELEASED}
    decided = {
        "adapter",
        "verdict",
        "epsilon_lower",
        "ceiling",
        "detectable",
        "layers",
        "roc",
        "recitation",
        "gates",
        "reasons",
        "public_loss",
        "values",
    }
    assert decided & {*row.required, *(row.optional or ())} <= released
    if released - {"value"}:
        assert exposure(predicate, "subject") is Exposure.DP_RELEASED


@pytest.mark.parametrize("predicate", Predicate)
def test_every_kind_goes_round(predicate: Predicate) -> None:
    what = example(predicate)
    entry = verify(sign(what))
    assert (entry.predicate, entry.subjects, dict(entry.fields), entry.index, entry.time) == (predicate, what.subjects, dict(what.fields), 3, TIME)
    assert entry.serial == (1 if predicate.public else None)
    assert entry.envelope == sign(what)


def test_the_table_has_a_row_for_every_kind() -> None:
    assert list(PREDICATES) == list(Predicate)


def test_what_depends_on_private_data_is_internal() -> None:
    """PITFALLS 41: counts, roots and everything about single records or subjects stay at home."""
    internal = {p for p in Predicate if not p.public}
    assert internal == {
        Predicate.COLLECTED,
        Predicate.ADMITTED,
        Predicate.REFUSED,
        Predicate.DEIDENTIFIED,
        Predicate.ACCESS_GRANTED,
        Predicate.FROZEN,
        Predicate.RESERVED,
        Predicate.ATTACKED,
        Predicate.CONSENT_CHANGED,
        Predicate.ERASED,
        Predicate.SERVED,
        Predicate.INDEXED,
        Predicate.SEARCHED,
    }
    for predicate in set(Predicate) - internal:
        row = PREDICATES[predicate]
        assert row.optional is not None
        assert not {"snapshot", "root", "documents", "units", "population", "scores", "counts"} & {*row.required, *row.optional}


@pytest.mark.parametrize("predicate", Predicate)
def test_a_missing_field_is_named(predicate: Predicate) -> None:
    for name in PREDICATES[predicate].required:
        fields = {other: "x" for other in PREDICATES[predicate].required if other != name}
        with pytest.raises(EvidenceInvalid, match=name):
            Statement(predicate=predicate, subjects=(SUBJECT,), fields=fields)


def test_public_kinds_are_closed_and_internal_ones_may_say_more() -> None:
    for predicate in Predicate:
        fields = {**dict.fromkeys(PREDICATES[predicate].required, "x"), "num_patients": 1993}
        if predicate.public:
            with pytest.raises(EvidenceInvalid, match="num_patients"):
                Statement(predicate=predicate, subjects=(SUBJECT,), fields=fields)
        else:
            assert Statement(predicate=predicate, subjects=(SUBJECT,), fields=fields).fields["num_patients"] == 1993


@pytest.mark.parametrize(
    "subjects",
    [
        (),
        (SUBJECT, SUBJECT),
        tuple(digest_of(bytes([i, j])) for i in range(3) for j in range(256))[:513],
        ("sha256:abc",),
        (SUBJECT.upper(),),
        (SUBJECT + "\n",),
        (SUBJECT.replace("sha256", "sha512"),),
    ],
)
def test_refuses_subjects(subjects: tuple) -> None:
    with pytest.raises(EvidenceInvalid):
        replace(OPENED, subjects=subjects)


def test_a_statement_does_not_change_after_it_was_made() -> None:
    inner = {"epsilon": [1, 2]}
    what = Statement(predicate=Predicate.REFUSED, subjects=(SUBJECT,), fields={"purpose": "p", "reason": inner})
    inner["epsilon"].append(3)
    assert what.fields["reason"] == {"epsilon": [1, 2]}
    with pytest.raises(TypeError):
        what.fields["reason"] = "changed"  # type: ignore[index]  # the mapping is read-only, which is what is tested


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        float("inf"),
        1 << 53,
        -(1 << 53),
        {1: "key"},
        "\ud800",
        b"bytes",
        {"a", "set"},
        Sensitive("secret"),
        object(),
        [[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]]],
    ],
)
def test_refuses_values_that_are_not_canonical_json(value: object) -> None:
    with pytest.raises(EvidenceInvalid) as caught:
        Statement(predicate=Predicate.REFUSED, subjects=(SUBJECT,), fields={"purpose": "p", "reason": value})  # type: ignore[dict-item]  # refused on purpose
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), children, max_size=3)
    ),
    max_leaves=10,
)


@given(json_values)
@settings(max_examples=100, deadline=None)
def test_canonical_json_goes_round(value: object) -> None:
    printed = canonical_json(value)
    assert parse_json(printed) == value
    assert canonical_json(parse_json(printed)) == printed


@pytest.mark.parametrize(
    "content",
    [
        b'{"a": 1}',
        b'{"b":1,"a":2}',
        b'{"a":1,"a":1}',
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
        b'{"a":1e999}',
        b"1.50",
        b"1E2",
        b'"\\u0061"',
        b'"\\ud800"',
        b'"\xff"',
        b"[1,]",
        b" 1",
        b"1\n",
        b"",
        b"\xef\xbb\xbf1",
        b"[" * 100_000,
        b"9" * 5000,
    ],
)
def test_refuses_json_in_any_other_form(content: bytes) -> None:
    with pytest.raises(EvidenceInvalid):
        parse_json(content)


def test_every_flipped_bit_of_an_envelope_is_refused() -> None:
    envelope = sign()
    for position in range(len(envelope)):
        flipped = bytearray(envelope)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(EvidenceInvalid):
            verify(bytes(flipped))


def mangled() -> dict[str, bytes]:
    """Envelopes that are well signed and yet not statements of ours."""
    body = payload_of(sign())
    place = body["predicate"]

    def variant(**changes: object) -> bytes:
        return resign(canonical_json({**body, **changes}))

    def moved(**changes: object) -> bytes:
        return variant(predicate={**place, **changes})

    return {
        "other type": variant(_type="https://in-toto.io/Statement/v0.1"),
        "unknown kind": variant(predicateType="urn:discreet:predicate:invented:v1"),
        "other version": variant(predicateType="urn:discreet:predicate:budget_opened:v2"),
        "bare kind": variant(predicateType="budget_opened"),
        "kind is no string": variant(predicateType=1),
        "further key": variant(comment="x"),
        "further key of the place": moved(comment="x"),
        "no subject": variant(subject=[]),
        "subject with another digest": variant(subject=[{"digest": {"sha512": "0" * 128}}]),
        "subject with a name": variant(subject=[{"digest": {"sha256": "0" * 64}, "name": "Jane"}]),
        "subject is a string": variant(subject="sha256"),
        "predicate is a list": variant(predicate=[]),
        "fields is a list": moved(fields=[]),
        "missing field": moved(fields={"budget": "b"}),
        "unknown public field": moved(fields={**place["fields"], "documents": 5000}),
        "negative index": moved(index=-1),
        "index is true": moved(index=True),
        "index is a float": moved(index=3.0),
        "no serial in a public statement": moved(serial=None),
        "serial above the index": moved(serial=4),
        "short salt": moved(salt="00"),
        "salt in upper case": moved(salt="AB" * 16),
        "no salt": moved(salt=None),
        "time without microseconds": moved(time="2026-01-02T03:04:05Z"),
        "time in another zone": moved(time="2026-01-02T03:04:05.000006+01:00"),
        "time is a number": moved(time=1),
        "another log": moved(log="example.org/other"),
        "payload is a list": resign(b"[]"),
        "payload is not canonical": resign(json.dumps(body).encode()),
        "payload of another type": resign(canonical_json(body), payload_type="application/json"),
        "payload is empty": resign(b""),
    }


@pytest.mark.parametrize("case", mangled())
def test_refuses_well_signed_nonsense(case: str) -> None:
    with pytest.raises(EvidenceInvalid):
        verify(mangled()[case])


def reshaped() -> dict[str, bytes]:
    outer = json.loads(sign())
    signature = outer["signatures"][0]
    unpadded = signature["sig"].rstrip("=")
    return {
        "two signatures": canonical_json({**outer, "signatures": [signature, signature]}),
        "no signature": canonical_json({**outer, "signatures": []}),
        "further key": canonical_json({**outer, "comment": "x"}),
        "further key of the signature": canonical_json({**outer, "signatures": [{**signature, "cert": "x"}]}),
        "another key ID": canonical_json({**outer, "signatures": [{**signature, "keyid": "example.org/log+11111111"}]}),
        "base64 without padding": canonical_json({**outer, "signatures": [{**signature, "sig": unpadded}]}),
        "URL-safe base64": canonical_json(
            {**outer, "signatures": [{**signature, "sig": signature["sig"].replace("+", "-").replace("/", "_") + "-_=="}]}
        ),
        "signature too short": canonical_json({**outer, "signatures": [{**signature, "sig": base64.b64encode(bytes(63)).decode()}]}),
        "spaces": json.dumps(outer).encode(),
        "line end": sign() + b"\n",
        "a list": b"[]",
        "too large": b'{"payload":"' + b"A" * statement.MAX_ENVELOPE_BYTES,
    }


@pytest.mark.parametrize("case", reshaped())
def test_refuses_other_forms_of_the_envelope(case: str) -> None:
    with pytest.raises(EvidenceInvalid):
        verify(reshaped()[case])


def test_refuses_another_key_and_another_log() -> None:
    other = Ed25519PrivateKey.from_private_bytes(bytes(32)).public_key()
    with pytest.raises(EvidenceInvalid):
        statement.verify(sign(), keys={KEY_ID: other}, origin=ORIGIN)
    with pytest.raises(EvidenceInvalid, match="this log"):
        statement.verify(sign(), keys={KEY_ID: PUBLIC}, origin="example.org/other")


@pytest.mark.parametrize("place", [{"salt": b""}, {"index": -1}, {"time": "now"}, {"serial": None}, {"serial": 9}])
def test_refuses_to_sign_what_could_not_be_read_back(place: dict) -> None:
    with pytest.raises(EvidenceInvalid):
        sign(**place)


def test_refuses_to_sign_more_than_a_reader_takes() -> None:
    with pytest.raises(EvidenceInvalid, match="at most"):
        sign(replace(OPENED, fields={**OPENED.fields, "orders": "x" * statement.MAX_ENVELOPE_BYTES}))


def test_the_salt_hides_the_content_of_a_leaf() -> None:
    """Two statements that say the same have unrelated envelopes: a leaf hash cannot be guessed from the few things it could say."""
    assert sign(salt=bytes(16)) != sign(salt=bytes(range(16)))
