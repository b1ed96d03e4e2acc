"""One subject's closure over a million records: what was made from the records of one person, in milliseconds.

    python benchmarks/lineage.py --records 1000000

Records in 1,000 snapshots, each with a model. The subject has twenty records in one snapshot; `closure_ms` is the median of 50 calls of `lineage.descendants` in one transaction,
`slowest_ms` the slowest by the clock, which waits whenever another process has the core, `slowest_cpu_ms` by the time that this process computed, `of_that_collecting_ms` the longest
pause of the interpreter's garbage collector among them, `uncollected_cpu_ms` the slowest of the calls without one.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

from discreet.governance import lineage
from discreet.governance.lineage import Artifact, Kind
from discreet.record import Digest
from discreet.store import Store


def digest(*path: object) -> Digest:
    return Digest("sha256:" + hashlib.sha256(repr(path).encode()).hexdigest())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--snapshots", type=int, default=1000)
    args = parser.parse_args()
    each = args.records // args.snapshots
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/lineage.db")
        started = time.perf_counter()
        with store.transaction() as tx:
            for s in range(args.snapshots):
                records = [digest("record", s, i) for i in range(each)]
                lineage.register(tx, [Artifact(digest=record, kind=Kind.RECORD) for record in records])
                lineage.derive(tx, Artifact(digest=digest("snapshot", s), kind=Kind.SNAPSHOT), parents=records)
                lineage.derive(tx, Artifact(digest=digest("model", s), kind=Kind.MODEL), parents=[digest("snapshot", s)])
        written = time.perf_counter() - started
        subject = [digest("record", args.snapshots // 2, i) for i in range(min(20, each))]
        times, computed, pauses = [], [], []
        marks: list[float] = []

        def collecting(phase: str, _: object) -> None:
            marks.append(time.process_time())
            if phase == "stop":
                pauses[-1] = max(pauses[-1], marks[-1] - marks[-2])

        gc.callbacks.append(collecting)
        with store.transaction() as tx:
            for _ in range(50):
                pauses.append(0.0)
                started, cpu = time.perf_counter(), time.process_time()
                found = lineage.descendants(tx, subject)
                times.append(time.perf_counter() - started)
                computed.append(time.process_time() - cpu)
        gc.callbacks.remove(collecting)
        store.close()
    if len(found) != 2:
        raise SystemExit(f"a closure of {len(found)} artifacts instead of 2")
    result = {
        "benchmark": "lineage",
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
        "records": each * args.snapshots,
        "closure_ms": round(statistics.median(times) * 1e3, 3),
        "slowest_ms": round(max(times) * 1e3, 3),
        "slowest_cpu_ms": round(max(computed) * 1e3, 3),
        "of_that_collecting_ms": round(max(pauses) * 1e3, 3),
        "uncollected_cpu_ms": round(max(cpu for cpu, pause in zip(computed, pauses, strict=True) if pause < 1e-3) * 1e3, 3),
        "records_written_per_second": round(each * args.snapshots / written),
    }
    print(json.dumps(result, indent=1))
    Path(__file__).with_name("results").joinpath("lineage.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
