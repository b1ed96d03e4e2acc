"""The transcript: honoured receipts verify; every way to dishonour one is named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from discreet.errors import EvidenceInvalid
from discreet.federated import secagg, transcript
from discreet.federated.secagg import Opened, Receipt, Roster, Terms

SIGNER = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
ROSTER = Roster(server=SIGNER.public_key().public_bytes_raw(), clients={"a": b"\x02" * 32, "b": b"\x03" * 32})


def round_of(number: int, uploads: dict[str, str]) -> tuple[Terms, Opened, Receipt]:
    terms = Terms(
        session="s", number=number, members=("a", "b"), threshold=2, minimum=2, dimension=2, bits=16, model="m", roster=ROSTER.digest, plan="p"
    )
    opened = Opened(total=np.zeros(2, "<u2"), uploads=uploads, left_out={})
    receipt = Receipt(
        session="s", number=number, terms=terms.digest.hex(), model="m", plan="p", survivors=secagg.survivors_digest(uploads), upload=uploads["a"]
    )
    return terms, opened, receipt


def chain(*uploads: dict[str, str]) -> tuple[list[bytes], list[Receipt]]:
    entries: list[bytes] = []
    receipts = []
    for number, each in enumerate(uploads):
        terms, opened, receipt = round_of(number, each)
        entries.append(transcript.entry(opened, terms, released=b"", entries=entries, signer=SIGNER))
        receipts.append(receipt)
    return entries, receipts


GOOD = ({"a": "u1", "b": "v1"}, {"a": "u2", "b": "v2"})


def failed(entries: list[bytes], receipts: list[Receipt]) -> list[str]:
    with pytest.raises(EvidenceInvalid) as refused:
        transcript.verify(entries, roster=ROSTER, name="a", receipts=receipts)
    return refused.value.failed


def test_honoured_receipts_verify() -> None:
    entries, receipts = chain(*GOOD)
    assert [entry["index"] for entry in transcript.verify(entries, roster=ROSTER, name="a", receipts=receipts)] == [0, 1]


def test_a_missing_entry_a_broken_chain_and_a_foreign_signature_are_named() -> None:
    entries, receipts = chain(*GOOD)
    assert failed(entries[:1], receipts) == ["round 1: upload not counted once under its terms"]
    assert "entry 0: chain" in failed(entries[1:], receipts)
    assert failed([entries[0][:-1] + b"\x00", entries[1]], receipts) == ["entry 0: signature"]


def test_an_upload_counted_twice_or_under_another_model_or_among_others_is_named() -> None:
    entries, receipts = chain({"a": "u1", "b": "v1"}, {"a": "u1", "b": "v2"})
    assert "round 0: upload not counted once under its terms" in failed(entries, receipts[:1])
    entries, receipts = chain(*GOOD)
    assert failed(entries, [receipts[0], dataclasses.replace(receipts[1], model="other")]) == [
        "round 1: other survivors or another model than signed"
    ]
    assert failed(entries, [dataclasses.replace(receipts[0], survivors="x"), receipts[1]]) == [
        "round 0: other survivors or another model than signed"
    ]
    assert failed(entries, receipts[:1]) == ["an upload counted without a receipt, 1 times"]
