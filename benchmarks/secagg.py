"""Secure aggregation beside Flower's SecAgg+ in one run: CPU of one client and of the server above plain aggregation, and bytes up; then the cost of the noise.

    python benchmarks/secagg.py compare --clients 20 --dimension 1000000 --rounds 3
    python benchmarks/secagg.py noise
    python benchmarks/secagg.py large --clients 500 --dimension 100000 --dropout 0.1
    python benchmarks/secagg.py round

Both run in this process and are timed by CPU. Ours: every message of `secagg.client` and `secagg.server`, the journal in SQLite included; plain aggregation is the sum of the
same vectors from bytes. Flower's: its DefaultWorkflow over an in-process Grid, once with SecAggPlusWorkflow and once without; client time is the ClientApp with its mod, server
time is all the rest of the process. Flower 1.41: `pip install --no-deps flwr==1.41.0` and what it misses; without it its half is left out with a word.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from discreet.dp import discrete
from discreet.errors import RoundAborted
from discreet.federated import secagg
from discreet.federated.journal import Journal
from discreet.federated.secagg import Policy, Roster
from discreet.keys import Stream
from discreet.store import Store


def cpu() -> float:
    return time.process_time()


def secret(*path: object) -> bytes:
    return hashlib.sha256(repr(path).encode()).digest()


def ours(count: int, dimension: int, dropout: float = 0.0) -> dict[str, float]:
    names = [f"site-{i:04d}" for i in range(count)]
    identities = {name: Ed25519PrivateKey.from_private_bytes(secret("identity", name)) for name in names}
    signer = Ed25519PrivateKey.from_private_bytes(secret("server"))
    roster = Roster(server=signer.public_key().public_bytes_raw(), clients={n: k.public_key().public_bytes_raw() for n, k in identities.items()})
    lost = set(names[: int(dropout * count)])
    policy = Policy(roster=roster, session="s", plan="p", minimum=2, dimension=dimension, bits=16)
    vectors = {name: np.frombuffer(Stream(secret("v", name)).bytes(2 * dimension), "<u2") for name in names}
    terms = secagg.terms_for(roster, session="s", number=0, members=names, minimum=2, dimension=dimension, bits=16, payload=b"", plan="p")
    client_s, server_s, alone_s, up = 0.0, 0.0, 0.0, dict.fromkeys(names, 0)
    with tempfile.TemporaryDirectory() as folder:
        stores = {name: Store(f"sqlite:///{folder}/{name}.db") for name in (names if count <= 50 else names[:1])}
        members = {}
        for name in names:
            journal = Journal(stores.get(name, stores[names[0]])) if count <= 50 else Unrecorded()
            members[name] = secagg.client(
                lambda t, p, n=name: vectors[n],
                name=name,
                identity=identities[name],
                policy=policy,
                stream=Stream(secret("c", name)),
                journal=journal,
            )
            next(members[name])
        began = cpu()
        hub = secagg.server(terms, roster=roster, signer=signer, payload=b"")
        requests = next(hub)
        server_s += cpu() - began
        while True:
            replies, began = {}, cpu()
            for name, request in requests.items():
                if name in lost and secagg.kind_of(request) == "delivery":
                    continue
                if name == names[-1]:  # one client that verifies everything for itself, as on a machine of its own
                    secagg._verify.cache_clear()
                    secagg._header.cache_clear()
                    alone = cpu()
                replies[name] = members[name].send(request)
                up[name] += len(replies[name])
                if name == names[-1]:
                    alone_s += cpu() - alone
            client_s += cpu() - began
            began = cpu()
            try:
                requests = hub.send(replies)
            except StopIteration as end:
                server_s += cpu() - began
                opened = end.value
                break
        for store in stores.values():
            store.close()
    kept = [name for name in names if name not in lost]
    assert np.array_equal(opened.total, np.sum([vectors[n] for n in kept], axis=0, dtype="<u2"))
    plain_client, plain_server = plain(vectors)
    return {
        "client_ms": 1e3 * client_s / count,
        "client_alone_ms": 1e3 * alone_s,
        "server_ms": 1e3 * server_s,
        "plain_client_ms": plain_client,
        "plain_server_ms": plain_server,
        "up_bytes": float(up[names[-1]]),
        "float16_bytes": 2.0 * dimension,
    }


class Unrecorded:
    """No journal, for hundreds of clients in one process: the protocol alone."""

    def once(self, session: str, number: int, stage: str, request: bytes, answer: Any) -> bytes:
        return bytes(answer())

    def rounds(self, session: str) -> int:
        return 0

    def count(self, session: str, *stages: str, other_than: int) -> int:
        return 0


def plain(vectors: dict[str, Any]) -> tuple[float, float]:
    began = cpu()
    messages = [vector.tobytes() for vector in vectors.values()]
    client = 1e3 * (cpu() - began) / len(messages)
    began = cpu()
    total = np.zeros(len(messages[0]) // 2, "<u2")
    for message in messages:
        total += np.frombuffer(message, "<u2")
    return client, 1e3 * (cpu() - began)


def flower(count: int, dimension: int, *, secure: bool) -> dict[str, float] | None:
    try:
        import logging

        from flwr.app import Context, RecordDict
        from flwr.client import NumPyClient
        from flwr.client.mod import secaggplus_mod
        from flwr.clientapp import ClientApp
        from flwr.common import ndarrays_to_parameters
        from flwr.server import LegacyContext, ServerConfig
        from flwr.server.strategy import FedAvg
        from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
        from flwr.serverapp.grid import Grid
        from flwr.supercore.run import Run
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError as error:
        print(f"Flower's half is left out: {error}")
        return None
    logging.getLogger("flwr").setLevel(logging.ERROR)
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 1
    vector = np.random.default_rng(1).normal(0, 0.1, dimension).astype(np.float32)

    class Trainer(NumPyClient):
        def fit(self, parameters: Any, config: Any) -> Any:
            return [vector], 1, {}

    app = ClientApp(client_fn=lambda context: Trainer().to_client(), mods=[secaggplus_mod] if secure else [])
    contexts = {i: Context(run_id=1, node_id=i, node_config={}, state=RecordDict(), run_config={}) for i in range(1, count + 1)}
    spent = {"client": 0.0, "copies": 0.0, "up": 0}

    class InProcess(Grid):
        run = Run.create_empty(1) if hasattr(Run, "create_empty") else None  # type: ignore[assignment]  # a benchmark of another library

        def set_run(self, run: Any) -> None: ...

        def create_message(self, *a: Any, **k: Any) -> Any:
            raise NotImplementedError

        def get_node_ids(self) -> Any:
            return list(contexts)

        def push_messages(self, messages: Any) -> Any:
            raise NotImplementedError

        def pull_messages(self, ids: Any) -> Any:
            raise NotImplementedError

        def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> Any:
            replies = []
            for number, message in enumerate(messages):
                began = cpu()
                message = copy.deepcopy(message)  # a transport hands every node its own bytes; not counted
                spent["copies"] += cpu() - began
                message.metadata.__dict__["_message_id"] = f"m{number}"
                began = cpu()
                reply = app(message, contexts[message.metadata.dst_node_id])
                spent["client"] += cpu() - began
                spent["up"] += sum(len(a.data) for r in reply.content.array_records.values() for a in r.values())
                spent["up"] += sum(
                    len(v) if isinstance(v, bytes) else sum(len(x) if isinstance(x, bytes) else 8 for x in v) if isinstance(v, list) else 8
                    for r in reply.content.config_records.values()
                    for v in r.values()
                )
                replies.append(reply)
            return replies

    strategy = FedAvg(fraction_evaluate=0.0, min_fit_clients=count, min_available_clients=count, initial_parameters=ndarrays_to_parameters([vector]))
    context = LegacyContext(Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config={}), ServerConfig(num_rounds=1), strategy)
    workflow = DefaultWorkflow(fit_workflow=SecAggPlusWorkflow(num_shares=1.0, reconstruction_threshold=0.51)) if secure else DefaultWorkflow()
    began, spent["copies"] = cpu(), 0.0
    with contextlib.redirect_stdout(open(os.devnull, "w")), contextlib.redirect_stderr(open(os.devnull, "w")):
        workflow(InProcess(), context)
    total = cpu() - began
    return {
        "client_ms": 1e3 * spent["client"] / count,
        "server_ms": 1e3 * (total - spent["client"] - spent["copies"]),
        "up_bytes": spent["up"] / count,
    }


def compare(count: int, dimension: int, rounds: int) -> dict[str, Any]:
    mine = [ours(count, dimension) for _ in range(rounds)]
    theirs = [(flower(count, dimension, secure=True), flower(count, dimension, secure=False)) for _ in range(rounds)]
    result: dict[str, Any] = {"clients": count, "dimension": dimension, "ours": {key: statistics.median(m[key] for m in mine) for key in mine[0]}}
    got = result["ours"]
    got["client_above_plain_ms"] = got["client_ms"] - got["plain_client_ms"]
    got["server_above_plain_ms"] = got["server_ms"] - got["plain_server_ms"]
    got["up_over_float16"] = got["up_bytes"] / got["float16_bytes"]
    if theirs[0][0] is not None:
        secure, bare = ([pair[i] for pair in theirs] for i in (0, 1))
        result["flower"] = {f"secagg_{key}": statistics.median(s[key] for s in secure if s) for key in secure[0] or {}}
        result["flower"] |= {f"plain_{key}": statistics.median(b[key] for b in bare if b) for key in bare[0] or {}}
        for side in ("client", "server"):
            above = result["flower"][f"secagg_{side}_ms"] - result["flower"][f"plain_{side}_ms"]
            result["flower"][f"{side}_above_plain_ms"] = above
            result[f"{side}_ratio"] = got[f"{side}_above_plain_ms"] / above
    return result


def noise(dimension: int) -> dict[str, Any]:
    encoding = discrete.encode_for(dimension=dimension, bits=16, clients=20, noisy=13, client_norm=1.0, clip_norm=1.0, noise_multiplier=1.0)
    vector = np.random.default_rng(0).normal(size=dimension).astype(np.float32)
    vector /= np.linalg.norm(vector)
    times, walls = [], []
    for number in range(5):
        began, wall = cpu(), time.perf_counter()
        discrete.encode(vector, encoding, signs=Stream(secret("signs", number)), secret=Stream(secret("noise", number)))
        times.append(cpu() - began)
        walls.append(time.perf_counter() - wall)
    return {
        "dimension": dimension,
        "rotate_quantise_noise_cpu_s": statistics.median(times),
        "wall_s": statistics.median(walls),
        "first_with_table_cpu_s": times[0],
    }


def large(count: int, dimension: int, dropout: float) -> dict[str, Any]:
    wall = time.perf_counter()
    try:
        figures = ours(count, dimension, dropout)
    except RoundAborted as error:
        return {"completed": False, "why": str(error)}
    return {"completed": True, "clients": count, "dimension": dimension, "dropout": dropout, "wall_s": time.perf_counter() - wall, **figures}


class Silent:
    """An observer that says nothing."""

    def stage(self, name: str) -> None: ...

    def note(self, line: str) -> None: ...

    def progress(self, task: str, done: int, total: int, figures: Any) -> None: ...


def demo_round(rounds: int) -> dict[str, Any]:
    """What secure aggregation adds to a round of the example fleet: CPU of everything but the contributions, beside the contributions themselves.

    A contribution is what plain federated DP would compute too: load the model, clipped gradients of the drawn patients, rounding, noise. All the rest is added: keys, shares,
    masks, signatures, journal and files at the three sites, and the coordinator.
    """
    from discreet import federate
    from discreet.federated import site as parts
    from discreet.federated.fleet import Worker

    spent = 0.0
    compute = Worker.contribution

    def timed(self: Worker, terms: Any, payload: bytes) -> Any:
        nonlocal spent
        began = cpu()
        found = compute(self, terms, payload)
        spent += cpu() - began
        return found

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "fleet"
        federate.init_fleet(folder)
        enrolled = federate.prepare(folder, Silent())
        sites = {each.name: parts.Site(folder / each.name, fleet_folder=folder) for each in enrolled}
        run = parts.coordinator(folder, base=enrolled[0].base, section=enrolled[0].project.model, observer=Silent())
        exchange = parts.InProcess(sites, Silent())
        run._round(exchange)  # opens models and corpora, charges the ledgers: once a session
        Worker.contribution = timed  # type: ignore[method-assign]  # a stopwatch
        began = cpu()
        for _ in range(rounds):
            run._round(exchange)
        whole = cpu() - began
        for each in sites.values():
            each.close()
    added = whole - spent
    return {"rounds": rounds, "contributions_ms": 1e3 * spent / rounds, "added_ms": 1e3 * added / rounds, "added_percent": 100 * added / spent}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["compare", "noise", "large", "round"])
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--dimension", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.what == "compare":
        result = compare(asked.clients, asked.dimension, asked.rounds)
    elif asked.what == "noise":
        result = noise(asked.dimension)
    elif asked.what == "round":
        result = demo_round(asked.rounds)
    else:
        result = large(asked.clients, asked.dimension, asked.dropout)
    result |= {
        "what": asked.what,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {os.getloadavg()[0]:.1f} load",
    }
    print(json.dumps(result, indent=2))
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
