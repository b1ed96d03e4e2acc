"""A whole session in one process: guarantee, receipts, ledgers, resume after the coordinator's death, and the same over Flower's real processes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from discreet import federate, pipeline
from discreet.federated import app
from discreet.federated import site as parts
from discreet.federated.site import Site

pytestmark = pytest.mark.slow


class Quiet:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, name: str) -> None: ...

    def note(self, line: str) -> None:
        self.notes.append(line)

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None: ...


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(federate, "SIZES", {"patients": 60, "documents": 120, "public": 60, "held_out": 10})
    federate.init_fleet(tmp_path / "fleet")
    path = tmp_path / "fleet" / "fleet.toml"
    path.write_text(path.read_text().replace("rounds = 10", "rounds = 2").replace("population = 500", "population = 250").replace("= 100 ", "= 50 "))
    return tmp_path / "fleet"


def test_a_session_ends_with_the_promise_and_honoured_receipts_in_every_ledger(fleet: Path) -> None:
    result = federate.simulate(fleet, Quiet())
    assert result["rounds"] == 2
    assert {name: (r["valid"], r["rounds"]) for name, r in result["receipts"].items()} == dict.fromkeys(("north", "south", "west"), (True, 2))
    assert result["loss"]["after"] != result["loss"]["before"]
    assert any("(patient, site)" in line for line in federate.lines(result))
    for name in ("north", "south", "west"):
        with pipeline.open_house(fleet / name) as house:
            budget = house.ledger.show("fleet-hospitals")
            assert budget.num_reservations == 1
            assert budget.remaining_epsilon < 1.0
            predicates = [entry.predicate.value for entry in house.log.select()]
            assert [p for p in predicates if p in ("reserved", "spent", "closed")] == ["reserved", "spent", "closed"]
    again = federate.simulate(fleet, Quiet())
    assert again["rounds"] == 2, "a finished session is not run again"


def test_a_killed_coordinator_continues_and_no_round_is_opened_twice(fleet: Path) -> None:
    observer = Quiet()
    federate.prepare(fleet, observer)
    base, section = parts.kept_model(fleet)
    sites = {name: Site(fleet / name, fleet_folder=fleet) for name in ("north", "south", "west")}
    served = 0

    def dies(requests: Mapping[str, bytes]) -> Mapping[str, bytes]:
        nonlocal served
        served += 1
        if served == 8:  # in the middle of the second round
            raise KeyboardInterrupt
        return parts.in_process(sites, observer)(requests)

    with pytest.raises(KeyboardInterrupt):
        parts.coordinator(fleet, base=base, section=section, observer=observer).run(dies)
    for site in sites.values():
        site.close()
    sites = {name: Site(fleet / name, fleet_folder=fleet) for name in sites}
    run = parts.coordinator(fleet, base=base, section=section, observer=observer)
    result = run.run(parts.in_process(sites, observer))
    for site in sites.values():
        site.close()
    assert (result["rounds"], result["aborted"]) == (2, 1)
    assert all(receipt["valid"] and receipt["rounds"] == 2 for receipt in result["receipts"].values())


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the process and all it started: it leads its own session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


@pytest.mark.timeout(900)
def test_real_processes_over_tls_one_killed_one_unregistered(fleet: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    """SuperLink and three SuperNodes: a stranger is refused, one site is killed in the middle of a round, two of three finish it."""
    pytest.importorskip("flwr")
    path = fleet / "fleet.toml"
    path.write_text(path.read_text().replace('server = "malicious"', 'server = "semi_honest"').replace("minimum = 3", "minimum = 2"))
    federate.prepare(fleet, Quiet())
    place, port = fleet / ".federation" / "flower", free_port()
    superlink = f"127.0.0.1:{port}"
    app.write_credentials(place)
    app.write_connection(place / "home", place=place, superlink=superlink)
    env = {**os.environ, "FLWR_HOME": str(place / "home"), "FLWR_TELEMETRY_ENABLED": "0"}
    flwr = str(Path(sys.executable).parent / "flwr")

    def start(command: list[str], name: str) -> subprocess.Popen[bytes]:
        with (place / f"{name}.log").open("wb") as log:
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
        return processes[-1]

    start(app.superlink_command(place, host="127.0.0.1", port=port), "superlink")
    wait_for(port)
    stranger = place / "nodes" / "stranger"
    app.write_node_key(stranger)
    command = app.supernode_command(place, key=stranger, superlink=superlink, project=fleet / "north", fleet=fleet, port=free_port())
    assert start(command, "stranger").wait(120) != 0, "an unregistered key must be refused"
    nodes = {}
    for name in ("north", "south", "west"):
        public = app.write_node_key(place / "nodes" / name)
        subprocess.run([flwr, "supernode", "register", str(public), "fleet"], env=env, check=True, capture_output=True, timeout=120)
        command = app.supernode_command(place, key=place / "nodes" / name, superlink=superlink, project=fleet / name, fleet=fleet, port=free_port())
        nodes[name] = start(command, name)
    time.sleep(10)
    start([flwr, "run", str(app.write_app(place, fleet=fleet, timeout=45)), "fleet", "--stream"], "run")
    victim = fleet / "west" / ".discreet" / "federation" / "cohort.request"
    wait_until(victim.is_file, 300)
    kill(nodes["west"])
    results = fleet / ".federation" / parts.Session.load(fleet).id / "result.json"
    wait_until(results.is_file, 600)
    result = json.loads(results.read_text())
    assert result["rounds"] == 2
    assert {name for name, receipt in result["receipts"].items() if receipt["valid"]} == {"north", "south"}


def wait_for(port: int) -> None:
    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_until(answers, 120)


def wait_until(holds: object, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]  # a callable
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.3)
