"""Reservations a second of the ledger, each its own durable transaction with its log entry.

    python benchmarks/ledger.py --count 500
    python benchmarks/ledger.py --url postgresql+psycopg://... --processes 4

Each process opens its own connection and charges one pure query at a time to one budget that has room for all. `reservations_per_second` counts what was committed
in wall-clock time from the moment when all processes were ready. `batched` charges in lists of 100: one transaction for each list.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from discreet.evidence.log import Log
from discreet.keys import Key, Keyring
from discreet.ledger import Kind, Ledger, Spend
from discreet.store import Store

SPEND = Spend(kind=Kind.STATISTICS, epsilon=1e-4)


def opened(url: str) -> tuple[Store, Ledger]:
    store = Store(url)
    keyring = Keyring(store, Key(b"b" * 32))
    return store, Ledger(store, keyring, Log(store, keyring, "example.org/bench"))


def work(url: str, count: int, batch: int, ready: Any) -> None:
    store, ledger = opened(url)
    ready.wait()
    for _ in range(count // batch):
        ledger.charge("bench", [SPEND] * batch)
    store.close()


def rate(url: str, *, count: int, processes: int, batch: int) -> float:
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(processes + 1)
    workers = [context.Process(target=work, args=(url, count // processes, batch, ready)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    ready.wait()
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - started
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a process failed")
    return count // processes // batch * batch * processes / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="", help="an empty database; a temporary SQLite file when left out")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        url = args.url or f"sqlite:///{folder}/ledger.db"
        store, ledger = opened(url)
        ledger.open("bench", epsilon=1000.0, delta=1e-6, unit="person")
        found: dict[str, Any] = {
            "benchmark": "ledger",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "hardware": f"{platform.machine()}, {multiprocessing.cpu_count()} cores",
            "database": url.partition(":")[0],
            "processes": args.processes,
            "reservations": args.count,
        }
        found["reservations_per_second"] = round(rate(url, count=args.count, processes=args.processes, batch=1), 1)
        found["batched_reservations_per_second"] = round(rate(url, count=max(1000, args.count), processes=1, batch=100), 1)
        store.close()
    print(json.dumps(found, indent=1))
    Path(__file__).with_name("results").joinpath(f"ledger-{found['database'].partition('+')[0]}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
