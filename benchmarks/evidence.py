"""The log: appends a second, a million leaves verified, one inclusion proof; and statement signatures by themselves.

    python benchmarks/evidence.py --appends 4000 --leaves 1000000

`appends_per_second` is in batches of 100 (one durable SQLite transaction each), `appends_per_cpu_second` the same by CPU time, `single_appends_per_second` one at a time. `leaves_seconds` hashes every
leaf from its bytes (a kilobyte each), builds the root and checks the checkpoint's signature. `prove_ms` is `Log.prove` of random entries of a log of so many in its database, from tiles, checkpoint and
transaction included; `inclusion_ms` makes one proof from all leaf hashes instead, `check_ms` verifies one. `signatures_per_second` verifies envelopes with their statements.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text

from discreet.evidence import merkle, note
from discreet.evidence.log import Log
from discreet.evidence.note import Checkpoint
from discreet.evidence.statement import Predicate, Statement
from discreet.keys import Key, Keyring
from discreet.record import Digest
from discreet.store import Store


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def statements(count: int) -> list[Statement]:
    subject = Digest("sha256:" + "ab" * 32)
    return [Statement(predicate=Predicate.ADMITTED, subjects=(subject,), fields={"purpose": "bench", "basis": "consent"}) for _ in range(count)]


def appends(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/log.db")
        log = Log(store, Keyring(store, Key(b"b" * 32)), "example.org/bench")

        def append(rows: list[Statement]) -> None:
            with store.transaction() as tx:
                log.append_all(tx, rows)

        def each(together: int, times: int) -> None:
            for _ in range(times):
                append(statements(together))

        before = time.process_time()
        batched = seconds(lambda: each(100, count // 100))
        processor = time.process_time() - before
        single = seconds(lambda: each(1, 200))
        size = count // 100 * 100 + 200
        verified = seconds(log.verify)
        store.close()
    return {
        "appends_per_second": round(count // 100 * 100 / batched),
        "appends_per_cpu_second": round(count // 100 * 100 / processor),
        "single_appends_per_second": round(200 / single),
        "signatures_per_second": round(size / verified),
    }


def tree(count: int) -> dict[str, float]:
    signer = Ed25519PrivateKey.from_private_bytes(b"b" * 32)
    key = note.verifier_key(name="example.org/bench", signer=signer)
    padding = b"x" * 992
    envelopes = [hashlib.sha256(b"%d" % i).digest() + padding for i in range(min(count, 100_000))]
    leaves: list[bytes] = []
    hashing = seconds(lambda: leaves.extend(merkle.leaf_hash(envelopes[i % len(envelopes)]) for i in range(count)))
    head = Checkpoint(origin="example.org/bench", size=count, root=merkle.root(leaves))
    signed = note.sign_note(head.text, name="example.org/bench", signer=signer)

    def verify() -> None:
        if note.open_checkpoint(signed, keys=[key]).root != merkle.root(leaves):
            raise SystemExit("the root differs")

    rooting = seconds(verify)
    index = count // 3
    proof = merkle.inclusion_proof(leaves, index)
    checking = statistics.median(
        seconds(lambda: merkle.verify_inclusion(leaves[index], index=index, size=count, proof=proof, root=head.root)) for _ in range(50)
    )
    proving = statistics.median(seconds(lambda: merkle.inclusion_proof(leaves, index)) for _ in range(3))
    return {
        "leaves": count,
        "leaves_seconds": round(hashing + rooting, 2),
        "inclusion_ms": round(proving * 1e3, 2),
        "check_ms": round(checking * 1e3, 3),
    }


def proofs(count: int) -> dict[str, float]:
    """A log whose database holds `count` times one signed entry: as many rows as a proof may have to find its way in."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/log.db")
        keyring = Keyring(store, Key(b"b" * 32))
        log = Log(store, keyring, "example.org/bench")
        with store.transaction() as tx:
            log.append_all(tx, statements(1))
            envelope = tx.execute(text("SELECT envelope FROM log_entries")).scalar_one()
        leaf = merkle.leaf_hash(envelope)
        rows = ((i, leaf, envelope, "admitted", None, "t") for i in range(1, count))
        with sqlite3.connect(f"{folder}/log.db") as database:
            database.executemany("INSERT INTO log_entries VALUES (?, ?, ?, ?, ?, ?)", rows)
        opening = seconds(lambda: Log(store, keyring, "example.org/bench"))
        log.checkpoint()
        found = [seconds(lambda position=position: log.prove(position)) for position in list(range(1, count, 7919))[:100]]
        store.close()
    return {"prove_ms": round(statistics.median(found) * 1e3, 2), "slowest_prove_ms": round(max(found) * 1e3, 2), "tiles_seconds": round(opening, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--appends", type=int, default=4000)
    parser.add_argument("--leaves", type=int, default=1_000_000)
    args = parser.parse_args()
    found = {
        "benchmark": "evidence",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        **appends(args.appends),
        **tree(args.leaves),
        **proofs(args.leaves),
    }
    print(json.dumps(found, indent=1))
    Path(__file__).with_name("results").joinpath("evidence.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
