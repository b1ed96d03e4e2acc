"""The command as a person runs it: over TLS, read again on SIGHUP, drained on SIGTERM, its trail verified; and traces that reach a collector."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import ipaddress
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from discreet.errors import ConfigInvalid, DigestMismatch, NotReleased
from discreet.evidence.log import verify_bundle
from discreet.keys import Key
from discreet.serve import asgi, run, trail

NAME = "Aurelia Quistgaard"


class _Upstream(http.server.BaseHTTPRequestHandler):
    seen: list[bytes] = []
    pause = 0.0

    def _answer(self, body: dict) -> None:
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers["content-length"]))
        self.seen.append(raw)
        time.sleep(self.pause)
        if self.path.endswith("traces"):
            self._answer({})
        else:
            text = json.loads(raw)["messages"][-1]["content"]
            self._answer({"id": "c", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]})

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def upstream() -> Iterator[int]:
    _Upstream.seen, _Upstream.pause = [], 0.0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Upstream) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join(10)


def certificate(folder) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    made = made.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
    alternative = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    signed = made.add_extension(alternative, critical=False).sign(key, hashes.SHA256())
    (folder / "cert.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain))


def wait(condition, seconds: float = 200.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_the_command_over_tls_reloads_drains_and_leaves_a_verified_trail(tmp_path, upstream):
    certificate(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    keys = [asgi.new_api_key() for _ in range(2)]
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(f'[tenant.ward]\nkey_sha256 = ["{keys[0][1]}"]\n')
    command = [
        sys.executable,
        "-c",
        "from discreet.cli import main; main()",
        "serve",
        "--upstream",
        f"http://127.0.0.1:{upstream}",
        "--allow-private",
        "127.0.0.1",
    ]
    command += [
        "--port",
        str(port),
        "--tenants",
        str(tenants),
        "--tls-cert",
        str(tmp_path / "cert.pem"),
        "--tls-key",
        str(tmp_path / "key.pem"),
        "--trail",
        str(tmp_path / "trail"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ)
    said: list[str] = []
    reader = threading.Thread(target=lambda: said.extend(process.stderr))
    reader.start()
    try:
        context = ssl.create_default_context(cafile=str(tmp_path / "cert.pem"))
        client = httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=context, timeout=200)

        def status(which: int) -> int:
            return client.get("/v1/models", headers={"authorization": f"Bearer {keys[which][0]}"}).status_code

        def up() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return client.get("/healthz").status_code == 200
            return False

        wait(up)
        assert (status(0), status(1)) == (200, 401)
        tenants.write_text("not toml")
        process.send_signal(signal.SIGHUP)
        wait(lambda: any("not reloaded" in line for line in said))
        assert status(0) == 200
        tenants.write_text(f'[tenant.ward]\nkey_sha256 = ["{keys[1][1]}"]\n')
        process.send_signal(signal.SIGHUP)
        wait(lambda: status(1) == 200)
        assert status(0) == 401
        _Upstream.pause = 1.0
        answers: list[httpx.Response] = []
        ask = {"model": "m", "messages": [{"role": "user", "content": f"Patient {NAME}"}]}
        asking = threading.Thread(target=lambda: answers.append(client.post("/v1/chat/completions", json=ask, headers={"x-api-key": keys[1][0]})))
        asking.start()
        wait(lambda: bool(_Upstream.seen))
        process.send_signal(signal.SIGTERM)
        asking.join(200)
        assert answers[0].json()["choices"][0]["message"]["content"] == f"Patient {NAME}"  # a running answer is finished first
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(10)
        reader.join(10)
        process.stderr.close()
        client.close()
    assert b"Quistgaard" not in b"".join(_Upstream.seen)
    bundle, key = trail.export(tmp_path / "trail", tmp_path / "bundle", public=False)
    assert [entry.fields["requests"] for entry in verify_bundle(bundle, public_key=key.read_text()).entries] == [1]


def test_traces_reach_a_collector_and_hold_no_text(upstream):
    with contextlib.ExitStack() as stack:
        tracer = run._tracer(f"http://127.0.0.1:{upstream}/v1/traces", stack)
        with tracer.start_as_current_span("discreet /v1/chat/completions"):
            pass
    assert b"discreet-gateway" in b"".join(_Upstream.seen)
    assert socket.gethostname().encode() not in b"".join(_Upstream.seen)


def test_certificates_that_do_not_fit_are_refused(tmp_path):
    certificate(tmp_path)
    (tmp_path / "other.pem").write_text("nothing")
    good = asgi.Tls(certificate=tmp_path / "cert.pem", key=tmp_path / "key.pem", callers=tmp_path / "cert.pem")
    assert good.options()["ssl_cert_reqs"] == ssl.CERT_REQUIRED
    for name in ("other.pem", "none.pem"):
        with pytest.raises(ConfigInvalid):
            asgi.Tls(certificate=tmp_path / "cert.pem", key=tmp_path / name)


def test_plain_http_beyond_this_machine_is_said_aloud(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(asgi, "run", lambda *_, **__: None)
    with run.elsewhere("http://127.0.0.1:9", private=frozenset(("127.0.0.1",)), key_env="NO_SUCH_KEY", trail=None) as behind:
        for host in ("127.0.0.1", "localhost", "0.0.0.0"):
            run.run(run.Options(host=host, port=1), behind, say=said.append)
    assert [line.split()[0] for line in said].count("warning") == 1


def test_a_hangup_reads_tenants_and_release_each_for_itself(tmp_path):
    @dataclass
    class Named:
        name: str

    class Application:
        changed: list[object] = []

        def change(self, settings: object = None, server: object = None) -> None:
            self.changed.append(settings or server)

        def refuse(self, why: object) -> None:
            self.changed.append(why)

    said: list[str] = []
    first, second, withdrawn = Named("first"), Named("second"), NotReleased("a model whose parents are known")
    answers: list[object] = [first, DigestMismatch("the adapter that was released"), RuntimeError(NAME), second, withdrawn]

    def server() -> object:
        found = answers.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    behind = run.Behind(server=server, key=Key(bytes(32)), trail=None)
    reload = run._reloader(Application(), None, behind, said.append)
    for number in range(1, 6):
        reload()
        wait(lambda number=number: len(said) == number, 20)
    assert [" ".join(line.split()[:2]) for line in said] == [
        "reloaded first",
        "not reloaded,",
        "not reloaded,",
        "reloaded second",
        "reloaded nothing",
    ]
    assert Application.changed == [first, second, withdrawn]
    assert NAME not in "".join(said)
    tenants = tmp_path / "tenants.toml"
    tenants.write_text(f'[tenant.ward]\nkey_sha256 = ["{asgi.new_api_key()[1]}"]\n')
    answers.append(withdrawn)
    run._reloader(Application(), tenants, behind, said.append)()
    wait(lambda: len(said) == 7, 20)
    assert Application.changed[-2].tenants[0].policy == behind.policy, "the keys are in force though nothing is served"
    assert Application.changed[-1] is withdrawn
    tenants.write_text("not toml")
    answers.append(first)
    run._reloader(Application(), tenants, behind, said.append)()
    wait(lambda: len(said) == 9, 20)
    assert Application.changed[-1] is first
