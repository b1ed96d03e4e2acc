"""Flower carries the messages: ClientApp and ServerApp over its Message API, TLS credentials, node keys, and the command lines of its processes.

    SuperLink (TLS, node keys) ── ServerApp: Coordinator.run(exchange) ── one train message a stage ──> SuperNode ── ClientApp: Site.answer(bytes)

A Flower message holds one opaque field of bytes of our own protocol, and nothing else: no metrics, no example counts, none of Flower's SecAgg+ or DP code. Flower starts a
process for each message; the site takes its round up from its journal. A reply that does not come in time, an error, or a refusal counts as a client that dropped out.
Which node is which site is asked once a run and trusted for nothing: every message is signed by the site's own pinned identity. Another engine needs an `Exchange`, no more.

When Flower's own run ends (its SuperLink died), a new run of the same app continues the session from the coordinator's checkpoint.

flwr 1.41 pins older releases of packages that Discreet uses (rich, typer, starlette, uvicorn, packaging); it runs with the newer ones, so it is installed without its
dependencies, and what it misses comes with the extra: `pip install 'discreet[federated]' && pip install --no-deps flwr==1.41.0`.

Does not cover: Flower's user accounts and its simulation engine (it needs Ray; `discreet federate simulate` needs nothing); certificates for more than one host.
"""

from __future__ import annotations

import datetime
import ipaddress
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from discreet.errors import DiscreetError, OperationFailed, missing_extra
from discreet.federated import site as parts
from discreet.federated.site import Exchange, Site
from discreet.store import write_atomically

_FIELD = "discreet"
ROUND_TIMEOUT_S = 600.0
NODES_TIMEOUT_S = 300.0
_HELLO = b"hello"


def client_app() -> Any:
    """Returns the ClientApp of a site; its node configuration names `project` and `fleet`, two folders.

    Raises:
        MissingExtra: when flwr is not installed.
    """
    try:
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.clientapp import ClientApp
    except ImportError:
        raise missing_extra("federated", "flwr==1.41.0 (with --no-deps)") from None
    app = ClientApp()

    @app.train()
    def answer(message: Any, context: Any) -> Any:
        site = Site(Path(str(context.node_config["project"])), fleet_folder=Path(str(context.node_config["fleet"])))
        try:
            request = bytes(message.content[_FIELD]["b"])
            reply = site.name.encode() if request == _HELLO else site.answer(request)
        except DiscreetError as error:
            print(f"{site.name}: {error} [{error.code}]", file=sys.stderr)  # noqa: T201  # a Flower process has no other sink; the message is safe by contract
            reply = b""
        finally:
            site.close()
        return Message(RecordDict({_FIELD: ConfigRecord({"b": reply})}), reply_to=message)

    return app


def server_app() -> Any:
    """Returns the ServerApp of a fleet; its run configuration names `fleet`, a folder, and `timeout`, seconds a stage may take.

    Raises:
        MissingExtra: when flwr is not installed.
    """
    try:
        from flwr.serverapp import ServerApp
    except ImportError:
        raise missing_extra("federated", "flwr==1.41.0 (with --no-deps)") from None
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        folder = Path(str(context.run_config["fleet"]))
        base, section = parts.kept_model(folder)
        run = parts.coordinator(folder, base=base, section=section, observer=_Lines())
        result = run.run(over_grid(grid, run.session.roster.clients, timeout=float(context.run_config["timeout"])))
        digest = parts.save_shared(run, base=base, section=section, folder=folder / "adapter")
        result |= {"adapter": str(folder / "adapter"), "adapter_digest": digest, "fleet": run.agreement.fleet.name}
        write_atomically(run.place / "result.json", json.dumps(result, indent=2).encode())

    return app


def over_grid(grid: Any, names: Mapping[str, bytes], *, timeout: float) -> Exchange:
    """Returns the exchange over a Flower grid. A node that comes back, or comes late, is found again before each stage.

    Args:
        grid: flwr's Grid.
        names: the sites of the roster.
        timeout: seconds that a stage may take.
    """
    from flwr.app import ConfigRecord, Message, RecordDict

    nodes: dict[str, int] = {}

    def send(requests: Mapping[int, bytes], limit: float) -> dict[int, bytes]:
        messages = [Message(RecordDict({_FIELD: ConfigRecord({"b": body})}), node, "train") for node, body in requests.items()]
        replies = grid.send_and_receive(messages, timeout=limit)
        return {reply.metadata.src_node_id: bytes(reply.content[_FIELD]["b"]) for reply in replies if not reply.has_error()}

    def exchange(requests: Mapping[str, bytes]) -> Mapping[str, bytes]:
        present = set(grid.get_node_ids())
        strangers = present - set(nodes.values())
        if strangers and set(requests) - set(nodes):
            for node, name in send(dict.fromkeys(strangers, _HELLO), min(timeout, NODES_TIMEOUT_S)).items():
                if name.decode("utf-8", "replace") in names:
                    nodes[name.decode()] = node
        by_node = {nodes[name]: body for name, body in requests.items() if nodes.get(name) in present}
        replies = send(by_node, timeout) if by_node else {}
        return {name: replies[node] for name, node in nodes.items() if replies.get(node)}

    return exchange


class _Lines:
    """Progress as lines on stderr: what `flwr run --stream` and the SuperLink's log show."""

    def note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)  # noqa: T201  # the log of a Flower process

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None:
        self.note(f"{task} {done}/{total}  " + "  ".join(f"{name} {value}" for name, value in figures.items()))


# What Flower's processes need


def write_app(folder: Path, *, fleet: Path, timeout: float = ROUND_TIMEOUT_S) -> Path:
    """Writes the Flower app of a fleet (two names and no code of its own) and returns its folder."""
    app = folder / "discreet_app"
    files = {
        "pyproject.toml": _APP.format(fleet=json.dumps(str(fleet.resolve())), timeout=timeout),
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
fleet = {fleet}
timeout = {timeout}
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
    return [_tool("flower-superlink"), *tls, *flags, "--database", f"{place}/flower.db"]


def supernode_command(place: Path, *, key: Path, superlink: str, project: Path, fleet: Path, port: int) -> list[str]:
    """Returns the command line of a site's SuperNode.

    Args:
        place: folder with the ca.crt of the SuperLink.
        port: for the SuperNode's own processes, on the loopback interface.
    """
    node = f'project="{project.resolve()}" fleet="{fleet.resolve()}"'
    door = ["--root-certificates", f"{place}/ca.crt", "--superlink", superlink, "--auth-supernode-private-key", str(key)]
    return [_tool("flower-supernode"), *door, "--host", "127.0.0.1", "--port", str(port), "--node-config", node]


def write_connection(home: Path, *, place: Path, superlink: str) -> None:
    """Writes Flower's own configuration (FLWR_HOME) with the one SuperLink of this fleet."""
    content = f'[superlink]\ndefault = "fleet"\n\n[superlink.fleet]\naddress = "{superlink}"\nroot-certificates = "{place.resolve()}/ca.crt"\n'
    write_atomically(home / "config.toml", content.encode())


def _tool(name: str) -> str:
    path = Path(sys.executable).parent / name
    if not path.is_file():
        raise missing_extra("federated", "flwr==1.41.0 (with --no-deps)")
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
