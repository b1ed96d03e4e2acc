"""The processes around a fleet: certificates that verify for their host alone, keys that only their owner reads, an exchange that survives its carrier."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from discreet.errors import MissingExtra, OperationFailed
from discreet.federated import app, processes


class Quiet:
    def note(self, line: str) -> None: ...

    def progress(self, task: str, done: int, total: int, figures: Any) -> None: ...


@pytest.mark.parametrize("host", ["127.0.0.1", "fleet.example"])
def test_the_servers_certificate_is_of_its_own_authority_and_names_its_host(tmp_path: Path, host: str) -> None:
    processes.write_credentials(tmp_path, host=host)
    root, own = (x509.load_pem_x509_certificate((tmp_path / name).read_bytes()) for name in ("ca.crt", "server.pem"))
    own.verify_directly_issued_by(root)
    named = own.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(name.value) for name in named] == [host]
    assert stat.S_IMODE((tmp_path / "server.key").stat().st_mode) == 0o600
    before = (tmp_path / "server.pem").read_bytes()
    processes.write_credentials(tmp_path, host=host)
    assert (tmp_path / "server.pem").read_bytes() == before


def test_a_nodes_key_is_made_once_and_only_its_owner_reads_it(tmp_path: Path) -> None:
    public = processes.write_node_key(tmp_path / "node")
    load_ssh_public_key(public.read_bytes())
    assert stat.S_IMODE((tmp_path / "node").stat().st_mode) == 0o600
    assert processes.write_node_key(tmp_path / "node").read_bytes() == public.read_bytes()


def test_without_flwr_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(MissingExtra, match="flwr"):
        processes.tool("flower-superlink")


def test_a_batch_that_met_a_dead_run_goes_out_again_on_a_new_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    link = processes.Link(place=tmp_path, nodes={"north": tmp_path / "k"}, host="127.0.0.1", port=1, timeout=1.0, observer=Quiet())
    lines = [Pipe() for _ in range(2)]
    lines[0][1].close()  # the first run is dead
    lines[1][1].send_bytes(app.pack({"names": ["north"], "present": ["north"]}, [b"reply"]))
    started: list[Any] = []

    def connected(self: processes.Link) -> Any:
        if self._line is None:
            started.append(self._line)
            self._line = lines[len(started) - 1][0]
        return self._line

    monkeypatch.setattr(processes.Link, "_connected", connected)
    assert link({"north": b"x"}, enough=1) == {"north": b"reply"}
    assert len(started) == 2
    head, bodies = app.unpack(lines[1][1].recv_bytes())
    assert (head["names"], bodies) == (["north"], [b"x"])
    monkeypatch.setattr(processes.Link, "_connected", lambda self: (_ for _ in ()).throw(EOFError()))
    with pytest.raises(OperationFailed, match="Flower run"):
        link({}, enough=0)
    link.close()


@pytest.mark.skipif(sys.platform != "linux", reason="the leash is Linux's")
def test_a_child_on_a_leash_ends_with_its_parent_though_that_is_killed(tmp_path: Path) -> None:
    script = f"import sys,time; from pathlib import Path; from discreet.federated import processes as p; c=p._start([sys.executable,'-c','import time; time.sleep(60)'],log=Path({str(tmp_path / 'log')!r}),env={{}}); print(c.pid, flush=True); time.sleep(60)"
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(1.0)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(10)
    parent.stdout.close()
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    raise AssertionError("the child outlived its parent")
