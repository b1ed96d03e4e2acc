"""The processes of a deployment: TLS credentials, node keys, the command lines of Flower's programs, and the two daemons that stay open around them.

    Link      `federate server`: a SuperLink and a run of the relay app, both started again when they die; an `Exchange` for the coordinator
    attend    `federate client`: a SuperNode, and the site that answers what its ClientApps hand over

Flower's programs are children on a leash: they end when the process that started them ends, however it ends (Linux; elsewhere at its normal end). Their sockets lie in a
fresh folder that only this user can enter.

flwr 1.41 pins older releases of packages that Discreet uses (rich, typer, starlette, uvicorn, packaging); it runs with the newer ones, so it is installed without its
dependencies, and what it misses comes with the extra: `pip install 'discreet[federated]' && pip install --no-deps flwr==1.41.0`.

Does not cover: certificates for more than one host; who may use the SuperLink's control interface (bind it to a host that only the coordinator's people reach: a node that
somebody else registers can carry messages, but not sign any).
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from discreet.errors import DiscreetError, OperationFailed
from discreet.federated.app import HELLO, missing_flwr, pack, unpack
from discreet.store import write_atomically

if TYPE_CHECKING:
    from discreet.federated.site import Observer, Site

START_S = 300.0
LINGER_S = 15.0
"""How long a site stays after it has answered the end of the session: its answer is still on the way through Flower."""

_LEASH = "import ctypes,os,signal,sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, signal.SIGTERM); os.execv(sys.argv[1], sys.argv[1:])"


# The coordinator's side


@final
@dataclass(slots=True, kw_only=True)
class Link:
    """A coordinator's exchange over Flower. Starts SuperLink and relay when they are needed, also again.

    Attributes:
        place: folder of credentials, database and logs.
        nodes: name of each site -> file of its node's public key.
        timeout: seconds that a stage may take.
    """

    place: Path
    nodes: Mapping[str, Path]
    host: str
    port: int
    timeout: float
    observer: Observer
    _folder: tempfile.TemporaryDirectory[str] = field(default_factory=lambda: tempfile.TemporaryDirectory(prefix="discreet-"))
    _listener: Listener | None = None
    _superlink: subprocess.Popen[bytes] | None = None
    _line: Connection | None = None
    _present: set[str] = field(default_factory=set)

    def present(self) -> set[str]:
        """Returns the sites whose nodes are connected now."""
        self({}, enough=0)
        return self._present

    def __call__(self, requests: Mapping[str, bytes], *, enough: int) -> Mapping[str, bytes]:
        """Sends each site its request and returns the replies that came in time. When Flower died meanwhile the same requests go out once more: a site answers them the same."""
        batch = pack({"names": list(requests), "enough": enough, "timeout": self.timeout, "sites": list(self.nodes)}, list(requests.values()))
        for _ in range(3):
            try:
                line = self._connected()
                line.send_bytes(batch)
                head, bodies = unpack(line.recv_bytes())
            except (EOFError, OSError):
                self.observer.note("Flower's run ended; starting another one")
                self._hang_up()
                continue
            self._present = set(head["present"])
            return dict(zip(head["names"], bodies, strict=True))
        raise OperationFailed("a Flower run that stays up", value=str(self.place), remedy="See superlink.log and run.log there; then start again.")

    def close(self) -> None:
        self._hang_up()
        if self._listener is not None:
            self._listener.close()
        _end(self._superlink)
        self._folder.cleanup()

    def _hang_up(self) -> None:
        if self._line is not None:
            self._line.close()
        self._line = None

    def _connected(self) -> Connection:
        if self._superlink is None or self._superlink.poll() is not None:
            self._start_superlink()
        if self._line is None:
            self._line = self._start_run()
        return self._line

    def _start_superlink(self) -> None:
        write_credentials(self.place, host=self.host)
        write_connection(self.place / "home", place=self.place, superlink=f"{self.host}:{self.port}")
        self._superlink = _start(
            superlink_command(self.place, host=self.host, port=self.port), log=self.place / "superlink.log", env=_environment(self.place)
        )
        _wait_until(lambda: _answers(self.host, self.port), START_S, what="a SuperLink that listens", running=self._superlink)
        for key in self.nodes.values():
            self._register(key)
        self.observer.note(f"listening on {self.host}:{self.port}")

    def _register(self, key: Path) -> None:
        """Lets a node in, once: Flower keeps it in its database."""
        done = key.with_suffix(".registered")
        if done.is_file() and done.read_bytes() == key.read_bytes():
            return
        if self._flwr("supernode", "register", str(key), "fleet").returncode:
            raise OperationFailed("a SuperLink that registers a node's key", value=key.name, remedy=f"See {self.place}/run.log.")
        write_atomically(done, key.read_bytes())

    def _start_run(self) -> Connection:
        path = f"{self._folder.name}/line"
        if self._listener is None:
            self._listener = Listener(path, family="AF_UNIX")
        done = self._flwr("run", str(write_app(self.place, line=path)), "fleet")
        if done.returncode:
            raise OperationFailed("a SuperLink that starts a run", value=done.returncode, remedy=f"See {self.place}/superlink.log.")
        with _time_limit(self._listener, START_S):
            return self._listener.accept()

    def _flwr(self, *arguments: str) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run([tool("flwr"), *arguments], env=_environment(self.place), capture_output=True, timeout=START_S, check=False)
        with (self.place / "run.log").open("ab") as log:
            log.write(done.stdout + done.stderr)
        return done


# A site's side


def attend(site: Site, *, place: Path, superlink: str, observer: Observer) -> dict[str, Any]:
    """Answers for a site until the session is closed, and returns what the site verified of it.

    Args:
        place: folder with the SuperLink's ca.crt, the node's key `node` and logs.
        superlink: host:port.

    Raises:
        OperationFailed: when the SuperNode ends, because its key is not registered or the certificate is not the one of ca.crt.
    """
    with tempfile.TemporaryDirectory(prefix="discreet-") as folder, Listener(f"{folder}/line", family="AF_UNIX") as listener:
        command = supernode_command(place, key=place / "node", superlink=superlink, line=f"{folder}/line", port=free_port())
        node = _start(command, log=place / "supernode.log", env=_environment(place))
        try:
            return _answer_until_closed(site, listener, node, observer)
        finally:
            _end(node)


def _answer_until_closed(site: Site, listener: Listener, node: subprocess.Popen[bytes], observer: Observer) -> dict[str, Any]:
    closed_at: float | None = None
    while closed_at is None or time.monotonic() < closed_at + LINGER_S:
        if node.poll() is not None:
            raise OperationFailed("a SuperNode that stays connected", value=node.returncode, remedy="Is its key registered, its ca.crt the server's?")
        with contextlib.suppress(TimeoutError, EOFError), _time_limit(listener, 1.0), listener.accept() as line:
            request = line.recv_bytes()
            line.send_bytes(site.name.encode() if request == HELLO else _answered(site, request, observer))
        if closed_at is None and site.outcome() is not None:
            closed_at = time.monotonic()
    outcome = site.outcome()
    if outcome is None:
        raise OperationFailed("the outcome of a closed session")
    return outcome


def _answered(site: Site, request: bytes, observer: Observer) -> bytes:
    try:
        reply = site.answer(request)
    except DiscreetError as error:
        observer.note(f"{site.name}: {error} [{error.code}]")
        return b""
    observer.note(site.said)
    return reply


# Programs


def _environment(place: Path) -> dict[str, str]:
    """Flower's own configuration is ours, and its programs find each other beside this Python."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": path, "FLWR_HOME": str(place / "home"), "FLWR_TELEMETRY_ENABLED": "0"}


def _start(command: list[str], *, log: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-c", _LEASH, *command], env=dict(env), stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )


def _end(process: subprocess.Popen[bytes] | None) -> None:
    if process is None:
        return
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _answers(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


def _wait_until(holds: Callable[[], bool], seconds: float, *, what: str, running: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end or running.poll() is not None:
            raise OperationFailed(what, value=running.returncode, remedy="See the log beside its credentials.")
        time.sleep(0.2)


@contextlib.contextmanager
def _time_limit(listener: Listener, seconds: float) -> Iterator[None]:
    """Limits the next `accept`; `Listener` has no such argument, its socket has."""
    held = listener._listener._socket  # type: ignore[attr-defined]  # not in the stubs, being private
    held.settimeout(seconds)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            held.settimeout(None)


def free_port() -> int:
    """Returns a port of the loopback interface that is free now."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def write_app(folder: Path, *, line: str) -> Path:
    """Writes the Flower app of a fleet (two names and no code of its own) and returns its folder."""
    app = folder / "discreet_app"
    files = {
        "pyproject.toml": _APP.format(line=json.dumps(line)),
        "LICENSE": "Apache-2.0\n",
        "discreet_fleet.py": "from discreet.federated import app\n\nclient_app = app.client_app()\nserver_app = app.server_app()\n",
    }
    for name, content in files.items():
        write_atomically(app / name, content.encode())
    return app


_APP = """[project]
name = "discreet-fleet"
version = "1.0.0"
description = "Carries the messages of a Discreet fleet."
license = {{ file = "LICENSE" }}
dependencies = ["flwr>=1.41.0"]

[tool.flwr.app]
publisher = "discreet"
fab-format-version = 1
flwr-version-target = "1.41.0"

[tool.flwr.app.components]
serverapp = "discreet_fleet:server_app"
clientapp = "discreet_fleet:client_app"

[tool.flwr.app.config]
line = {line}
"""


def write_credentials(folder: Path, *, host: str = "127.0.0.1") -> None:
    """Writes a private certificate authority and the SuperLink's certificate for one host, once: ca.crt, server.pem, server.key."""
    if (folder / "server.key").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority, server = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "discreet fleet")])
    root = _certificate(issuer, issuer, authority.public_key()).add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    own = _certificate(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)]), issuer, server.public_key())
    own = own.add_extension(x509.SubjectAlternativeName([_alternative(host)]), critical=False)
    write_atomically(folder / "ca.crt", root.sign(authority, SHA256()).public_bytes(serialization.Encoding.PEM))
    write_atomically(folder / "server.pem", own.sign(authority, SHA256()).public_bytes(serialization.Encoding.PEM))
    _write_private(folder / "server.key", _pem(server, serialization.PrivateFormat.TraditionalOpenSSL))


def write_node_key(path: Path) -> Path:
    """Writes a SuperNode's P-384 key and its public half (`path` and `path.pub`), once; returns the public one. It only opens the door: our messages have their own keys."""
    public = path.with_name(path.name + ".pub")
    if not public.is_file():
        key = ec.generate_private_key(ec.SECP384R1())
        _write_private(path, _pem(key, serialization.PrivateFormat.OpenSSH))
        write_atomically(public, key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))
    return public


def superlink_command(place: Path, *, host: str, port: int) -> list[str]:
    """Returns the command line of a SuperLink with TLS that lets in registered nodes only."""
    tls = ["--ssl-ca-certfile", f"{place}/ca.crt", "--ssl-certfile", f"{place}/server.pem", "--ssl-keyfile", f"{place}/server.key"]
    flags = ["--enable-supernode-auth", "--disable-runtime-dependency-installation", "--host", host, "--port", str(port)]
    return [tool("flower-superlink"), *tls, *flags, "--database", f"{place}/flower.db"]


def supernode_command(place: Path, *, key: Path, superlink: str, line: str, port: int) -> list[str]:
    """Returns the command line of a site's SuperNode.

    Args:
        place: folder with the ca.crt of the SuperLink.
        line: the socket of the site's process.
        port: for the SuperNode's own processes, on the loopback interface.
    """
    door = ["--root-certificates", f"{place}/ca.crt", "--superlink", superlink, "--auth-supernode-private-key", str(key)]
    return [tool("flower-supernode"), *door, "--host", "127.0.0.1", "--port", str(port), "--node-config", f"line={json.dumps(line)}"]


def write_connection(home: Path, *, place: Path, superlink: str) -> None:
    """Writes Flower's own configuration (FLWR_HOME) with the one SuperLink of this fleet."""
    content = f'[superlink]\ndefault = "fleet"\n\n[superlink.fleet]\naddress = "{superlink}"\nroot-certificates = "{place.resolve()}/ca.crt"\n'
    write_atomically(home / "config.toml", content.encode())


def tool(name: str) -> str:
    """Returns one of Flower's programs, beside this Python.

    Raises:
        MissingExtra: when flwr is not installed.
    """
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise missing_flwr()
    return str(path)


def _certificate(subject: x509.Name, issuer: x509.Name, public: Any) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public).serial_number(x509.random_serial_number())
    return builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=365))


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem(key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())


def _write_private(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        path.touch(mode=0o600, exist_ok=True)
        path.chmod(0o600)
        path.write_bytes(content)
    except OSError as error:
        raise OperationFailed("a folder that can hold a private key", value=type(error).__name__) from None
