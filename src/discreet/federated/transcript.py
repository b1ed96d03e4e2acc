"""The hash-chained transcript of a fleet's rounds, signed by the coordinator, and a client's check of it.

An entry names the terms, the survivors with the digests of their uploads, the digest of the noised sum and of the model before; it carries the digest of the entry before
it. With its receipts (`secagg.Receipt`) a client verifies that every upload of its own was counted once, under the model and plan that it signed, in the survivor set that it
signed. Two transcripts of one session that differ are a proof against the coordinator: it signed both.

Does not cover: that the opened sum is the sum of the uploads (it takes the shares to see that).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from discreet.errors import EvidenceInvalid, PeerRefused
from discreet.federated import secagg
from discreet.federated.secagg import Opened, Receipt, Roster, Terms, survivors_digest

GENESIS = "0" * 64


def entry(opened: Opened, terms: Terms, *, released: bytes, entries: Sequence[bytes], signer: Ed25519PrivateKey) -> bytes:
    """Returns the signed entry of an opened round, to be appended to `entries`.

    Args:
        released: the sum as it left the mechanism, with its noise. Never `opened.total` itself: under central DP that has none yet, and whoever knows all but one person's
            data tells from its digest whether that person is in.
    """
    fields = {
        "kind": "entry",
        "index": len(entries),
        "previous": hashlib.sha256(entries[-1]).hexdigest() if entries else GENESIS,
        "terms": terms.digest.hex(),
        "terms_json": terms.to_json(),
        "uploads": dict(opened.uploads),
        "left_out": dict(opened.left_out),
        "sum": hashlib.sha256(released).hexdigest(),
    }
    return secagg.sealed_frame(signer, fields)


def verify(entries: Sequence[bytes], *, roster: Roster, name: str, receipts: Sequence[Receipt]) -> list[Mapping[str, Any]]:
    """Returns the verified entries of a session, after checking this client's receipts against them.

    Raises:
        EvidenceInvalid: when an entry is not signed by the pinned server, the chain is broken, or a receipt is not honoured exactly once; `failed` says which.
    """
    found: list[Mapping[str, Any]] = []
    failed: list[str] = []
    for index, frame in enumerate(entries):
        try:
            header = secagg.open_frame(frame, roster.server, kind="entry", terms=None).header
        except PeerRefused:
            raise _broken([f"entry {index}: signature"]) from None
        previous = hashlib.sha256(entries[index - 1]).hexdigest() if index else GENESIS
        if header.get("index") != index or header.get("previous") != previous:
            failed.append(f"entry {index}: chain")
        found.append(header)
    counted = Counter(upload for header in found for who, upload in header["uploads"].items() if who == name)
    by_terms = {header["terms"]: header for header in found}
    for receipt in receipts:
        counted_in = by_terms.get(receipt.terms, {"uploads": {}})
        if counted_in["uploads"].get(name) != receipt.upload or counted[receipt.upload] != 1:
            failed.append(f"round {receipt.number}: upload not counted once under its terms")
        elif survivors_digest(counted_in["uploads"]) != receipt.survivors or counted_in["terms_json"]["model"] != receipt.model:
            failed.append(f"round {receipt.number}: other survivors or another model than signed")
    known = {receipt.upload for receipt in receipts}
    failed += [f"an upload counted without a receipt, {count} times" for upload, count in counted.items() if upload not in known]
    if failed:
        raise _broken(failed)
    return found


def _broken(failed: list[str]) -> EvidenceInvalid:
    return EvidenceInvalid(
        "a transcript that honours this client's receipts", value=failed[0], remedy="Keep both: the server signed them.", failed=failed
    )
