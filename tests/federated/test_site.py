"""A whole session in one process: guarantee, receipts, ledgers, resume after the coordinator's death, and the same over Flower's real processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from discreet import federate, pipeline
from discreet.errors import AccessDenied, DiscreetError, TermsRefused
from discreet.evidence.statement import Predicate
from discreet.federated import processes as flower
from discreet.federated import site as parts
from discreet.federated.site import Site

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAMES = ("north", "south", "west")


class Quiet:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def stage(self, name: str) -> None: ...

    def note(self, line: str) -> None:
        self.notes.append(line)

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None: ...


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three enrolled hospitals, made once; every test gets a copy."""
    folder = tmp_path_factory.mktemp("fleet") / "fleet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(federate, "SIZES", {"patients": 60, "documents": 120, "public": 60, "held_out": 10})
        federate.init_fleet(folder)
    path = folder / "fleet.toml"
    path.write_text(path.read_text().replace("rounds = 10", "rounds = 2").replace("population = 500", "population = 250").replace("= 100 ", "= 50 "))
    federate.prepare(folder, Quiet())
    return folder


@pytest.fixture
def fleet(enrolled: Path, tmp_path: Path) -> Path:
    shutil.copytree(enrolled, tmp_path / "fleet")
    return tmp_path / "fleet"


def test_a_session_ends_with_the_promise_and_honoured_receipts_in_every_ledger(fleet: Path) -> None:
    """The personal head of each site is trained after the last round, differs from the shared adapter and lies nowhere but at the site."""
    path = fleet / "fleet.toml"
    path.write_text(path.read_text() + "\npersonal_steps = 2\n")
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
            assert [len(house.log.select(one)) for one in (Predicate.RESERVED, Predicate.SPENT, Predicate.CLOSED)] == [1, 1, 1]
            committed = [entry.fields for entry in house.log.select(Predicate.COMMITTED)]
            assert [each["scheme"] for each in committed if each["kind"] == "transcript of a federated session"] == ["verified"]
    heads = {name: (fleet / name / ".discreet" / "federation" / "personal" / "adapter_model.safetensors").read_bytes() for name in NAMES}
    shared = (fleet / "adapter" / "adapter_model.safetensors").read_bytes()
    assert len({shared, *heads.values()}) == 4
    held = [path.read_bytes() for path in (fleet / ".federation").rglob("*") if path.is_file()]
    assert not any(head[-512:] in content for head in heads.values() for content in held)
    again = federate.simulate(fleet, Quiet())
    assert again["rounds"] == 2, "a finished session is not run again"


@pytest.mark.parametrize(("dies_at", "sites_too"), [(8, False), (10, True), (11, False)])
def test_a_killed_coordinator_takes_up_the_round_it_was_in(fleet: Path, dies_at: int, sites_too: bool) -> None:
    """Killed at the third stage of the second round, at its last one, or when everything is opened: nothing is asked twice, nothing paid is lost."""
    observer = Quiet()
    base, section = parts.kept_model(fleet)
    sites = {name: Site(fleet / name, fleet_folder=fleet) for name in NAMES}

    class Dies(parts.InProcess):
        def __call__(self, requests: Mapping[str, bytes], *, enough: int) -> Mapping[str, bytes]:
            nonlocal dies_at
            dies_at -= 1
            replies = parts.InProcess.__call__(self, requests, enough=enough)
            if dies_at == 0:  # the sites have answered, the coordinator does not hear it
                raise KeyboardInterrupt
            return replies

    with pytest.raises(KeyboardInterrupt):
        parts.coordinator(fleet, base=base, section=section, observer=observer).run(Dies(sites, observer))
    if sites_too:
        for site in sites.values():
            site.close()
        sites = {name: Site(fleet / name, fleet_folder=fleet) for name in sites}
    run = parts.coordinator(fleet, base=base, section=section, observer=observer)
    result = run.run(parts.InProcess(sites, observer))
    for site in sites.values():
        site.close()
    assert (result["rounds"], result["aborted"]) == (2, 0)
    assert all(receipt["valid"] and receipt["rounds"] == 2 for receipt in result["receipts"].values())


def test_a_site_that_leaves_for_good_and_one_that_comes_late(fleet: Path) -> None:
    """`south` is there for the first round only, `west` from the second on; the rounds go on with whoever is there."""
    path = fleet / "fleet.toml"
    path.write_text(path.read_text().replace("minimum = 3", "minimum = 2"))
    observer = Quiet()
    base, section = parts.kept_model(fleet)
    sites = {name: Site(fleet / name, fleet_folder=fleet) for name in NAMES}
    exchange = parts.InProcess({name: sites[name] for name in ("north", "south")}, observer)
    run = parts.coordinator(fleet, base=base, section=section, observer=observer)
    run._round(exchange)
    sites["south"].leave()
    result = run.run(parts.InProcess({name: sites[name] for name in ("north", "west")}, observer))
    with pytest.raises(DiscreetError):
        sites["south"].answer((sites["north"].place / "announce.request").read_bytes())
    for site in sites.values():
        site.close()
    assert {name: (r["valid"], r["rounds"]) for name, r in result["receipts"].items()} == {"north": (True, 2), "west": (True, 1)}
    assert result["absent"] == ["south"]
    with pipeline.open_house(fleet / "south") as house:
        assert house.ledger.show("fleet-hospitals").remaining_epsilon < 1.0


def test_a_fleet_that_cannot_be_sampled_trains_with_bounded_participation(fleet: Path) -> None:
    """Every unit in every second of three steps. A coordinator that names an opened step again, in a round of another number, gets nothing; each ledger was charged two steps."""
    path = fleet / "fleet.toml"
    text = path.read_text().replace("rounds = 2", "rounds = 3").replace('noise = "distributed"', 'noise = "central"')
    path.write_text(text + '\nparticipation = "bounded"\nseparation = 2\n')
    observer = Quiet()
    base, section = parts.kept_model(fleet)
    sites = {name: Site(fleet / name, fleet_folder=fleet) for name in NAMES}
    run = parts.coordinator(fleet, base=base, section=section, observer=observer)
    exchange = parts.InProcess(sites, observer)
    run._round(exchange)
    run.trainer.number = 0
    run._round(exchange)
    assert sum("a step that was not opened before" in note for note in observer.notes) == len(NAMES)
    run.trainer.number = 1
    result = run.run(exchange)
    for site in sites.values():
        site.close()
    assert (result["rounds"], result["aborted"]) == (3, 1)
    assert all(receipt["valid"] and receipt["rounds"] == 3 for receipt in result["receipts"].values())
    said = result["guarantee"]
    assert (said["participation"], said["steps_of_a_unit"], said["sampling_probability"]) == ("bounded", 2, 1.0)
    with pipeline.open_house(fleet / "north") as house:
        assert house.ledger.show("fleet-hospitals").remaining_epsilon < 1.0
        [closed] = house.log.select(Predicate.CLOSED)
        assert closed.fields["steps"] == 2


def test_a_site_joins_only_a_coordinator_whose_attestation_is_accepted(fleet: Path) -> None:
    """The verifier sees the evidence and the binding; whatever it does but accept, the site does not join."""
    site = Site(fleet / "north", fleet_folder=fleet)
    bound = parts.binding(site.session, site.worker.agreement)
    accept = [sys.executable, "-c", "import sys; sys.exit(sys.stdin.read() != 'quote of ' + sys.argv[1])"]
    site.check_attestation(f"quote of {bound}".encode(), verifier=accept)
    for evidence, verifier in ((b"quote of another", accept), (b"", accept), (b"x", ["/does/not/exist"])):
        with pytest.raises(TermsRefused, match="attestation"):
            site.check_attestation(evidence, verifier=verifier)
    site.close()


def test_a_site_answers_for_those_who_may_run_it(fleet: Path) -> None:
    with (fleet / "north" / "discreet.toml").open("a") as file:
        file.write('\n[access]\nowner = ["olga"]\nengineer = ["emil"]\n')
    with pytest.raises(AccessDenied):
        Site(fleet / "north", fleet_folder=fleet)
    with pytest.raises(AccessDenied):
        federate.leave(fleet / "north", fleet=fleet)


# Real processes


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(30)


@pytest.mark.timeout(1800)
def test_real_processes_over_tls(fleet: Path, processes: list[subprocess.Popen[bytes]]) -> None:
    """`federate server` and three `federate client` over TLS, one of them two processes under `torchrun`: a stranger is refused; a site dies by SIGKILL in the middle of a
    round, which two of three finish; then the server dies by SIGKILL, and the one that is started in its place ends the session; the site that died comes back late."""
    if not (Path(sys.executable).parent / "flower-superlink").is_file():
        pytest.skip("flwr is not installed beside this Python: pip install --no-deps flwr==1.41.0")
    path = fleet / "fleet.toml"
    path.write_text(path.read_text().replace('server = "malicious"', 'server = "semi_honest"').replace("minimum = 3", "minimum = 2"))
    port, logs = flower.free_port(), fleet / "logs"
    logs.mkdir()

    def start(name: str, *arguments: str, ranks: int = 1) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", "from discreet.cli import main; main()", "federate", *arguments, "--json"]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "--no-python"]
        with (logs / f"{name}.out").open("wb") as out, (logs / f"{name}.log").open("ab") as log:
            processes.append(subprocess.Popen([*(torchrun if ranks > 1 else []), *command], stdout=out, stderr=log, start_new_session=True))
        return processes[-1]

    def server() -> subprocess.Popen[bytes]:
        return start("server", "server", "-C", str(fleet), "--port", str(port), "--timeout", "180")

    def client(name: str, folder: Path, ranks: int = 1) -> subprocess.Popen[bytes]:
        return start(name, "client", f"127.0.0.1:{port}", "-C", str(folder), "--fleet", str(fleet), ranks=ranks)

    stranger = fleet / "stranger"
    shutil.copytree(fleet / "north", stranger)
    for key in (stranger / ".discreet" / "federation" / "flower").glob("node*"):
        key.unlink()
    flower.write_node_key(stranger / ".discreet" / "federation" / "flower" / "node")
    first = server()
    wait_until(lambda: "listening" in (logs / "server.log").read_text(), 400)
    refused = client("stranger", stranger)
    nodes = {name: client(name, fleet / name, ranks=2 if name == "south" else 1) for name in NAMES}
    victim = fleet / "west" / ".discreet" / "federation" / "cohort.request"
    wait_until(victim.is_file, 500)
    os.kill(nodes["west"].pid, signal.SIGKILL)
    assert refused.wait(400) == 1, "an unregistered key must be refused"
    checkpoint = fleet / ".federation" / parts.Session.load(fleet).id / "checkpoint"
    wait_until(checkpoint.is_file, 500)
    os.kill(first.pid, signal.SIGKILL)
    client("west", fleet / "west")
    first.wait(30)
    assert server().wait(800) == 0, (logs / "server.log").read_text()
    result = json.loads((logs / "server.out").read_text())
    assert result["rounds"] == 2
    assert {name for name, receipt in result["receipts"].items() if receipt["valid"] and receipt["rounds"] == 2} >= {"north", "south"}
    assert all(receipt["valid"] for receipt in result["receipts"].values())
    for name in ("north", "south"):
        assert nodes[name].wait(120) == 0
        said = json.loads((logs / f"{name}.out").read_text())
        assert said["valid"], "one document, whatever the number of processes"
    again = client("north", fleet / "north")
    assert again.wait(120) == 0, "a client that is started after the end says the same"
    assert json.loads((logs / "north.out").read_text())["valid"]


def wait_until(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.3)
