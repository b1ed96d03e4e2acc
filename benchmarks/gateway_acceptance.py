"""Outside acceptance tests of the gateway, by people who do not know it: pii-leak-benchmark and canarywire (PyPI), and schemathesis against the OpenAPI document.

    python benchmarks/gateway_acceptance.py --acceptance VENV [--schemathesis VENV] [--json results.json]

VENV: pip install pii-leak-benchmark==0.6.0 canarywire==0.1.0a1 (the first), schemathesis (the second). The tools bring the upstream that records what it is sent; a relay in
front of the gateway adds the key, because two of the tools know none. Everything runs on this machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gateway import free_port, gateway_command, wait_for

MODELS = ["gpt-4o-mini", "canarywire-test"]
RELAY = """
import sys, httpx, uvicorn
key, to, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
client = httpx.AsyncClient(timeout=60, limits=httpx.Limits(keepalive_expiry=2))
DROPPED = (b"authorization", b"x-api-key", b"host", b"content-length", b"transfer-encoding")
async def app(scope, receive, send):
    if scope["type"] != "http": return
    body = b""
    while True:
        part = await receive(); body += part.get("body", b"")
        if not part.get("more_body"): break
    headers = [(name, value) for name, value in scope["headers"] if name not in DROPPED] + [(b"authorization", b"Bearer " + key.encode())]
    async with client.stream(scope["method"], to + scope["path"], content=body, headers=headers) as response:
        kept = [(name, value) for name, value in response.headers.raw if name.lower() not in DROPPED]
        await send({"type": "http.response.start", "status": response.status_code, "headers": kept})
        async for chunk in response.aiter_raw(): await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})
uvicorn.run(app, port=port, log_level="error", lifespan="off")
"""
ECHO = """
import json, sys, uvicorn
async def app(scope, receive, send):
    if scope["type"] != "http": return
    body = b""
    while True:
        part = await receive(); body += part.get("body", b"")
        if not part.get("more_body"): break
    found = {"data": [{"id": "gpt-4o-mini"}]} if scope["method"] == "GET" else {"id": "c", "object": "x", "model": "m", "choices": [], "output": [], "content": [], "data": []}
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(found).encode()})
uvicorn.run(app, port=int(sys.argv[1]), log_level="error", lifespan="off")
"""


def asked(command: list[str], *, seconds: int = 400, **env: str) -> tuple[int, str]:
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": "", **env}, capture_output=True, text=True, timeout=seconds)
    return done.returncode, done.stdout + done.stderr


def accepted(options: argparse.Namespace, folder: Path, key: str, port: int, up: int) -> dict[str, object]:
    """Both tools, each with an upstream of its own at the same port."""
    found: dict[str, object] = {}
    tools, relay = options.acceptance / "bin", free_port()
    process = subprocess.Popen(
        [str(tools / "python"), "-c", RELAY, key, f"http://127.0.0.1:{port}", str(relay)], env={**os.environ, "PYTHONPATH": ""}
    )
    try:
        wait_for(relay)
        for profile in ("pii-v1", "pii-secrets-v1"):
            there = ["--target-base-url", f"http://127.0.0.1:{port}/v1", "--target-model", MODELS[0], "--capture-port", str(up)]
            command = [str(tools / "pii-leak-benchmark"), "selfcheck", "--profile", profile, *there, "--json-out", str(folder / "pii.json")]
            code, said = asked(command, CONFORMANCE_TARGET_API_KEY=key)
            found[f"pii-leak-benchmark, {profile}"] = "CLEAN" if code == 0 and "CLEAN" in said else said[-400:]
        there = ["--gateway-url", f"http://127.0.0.1:{relay}/v1/chat/completions", "--upstream-port", str(up), "--model", MODELS[0]]
        asked(
            [
                str(tools / "pii-leak-benchmark-v2"),
                "--out",
                str(folder),
                *there,
                "--oracle",
                "exhaustive-2-part",
                "--json-out",
                str(folder / "v2.json"),
            ]
        )
        rows = json.loads((folder / "v2.json").read_text())["rows"]
        kept = ("outcome", "fidelity_rate", "leak_single_chunk", "leak_adversarial", "cases_applicable", "cases_attempted", "inconclusive")
        distinct = {
            json.dumps({name: row[name] for name in kept}) for row in rows
        }  # a row for each policy of its own gateway: ours is the same for all
        found["pii-leak-benchmark-v2, every cut in two"] = [json.loads(row) for row in sorted(distinct)]
        asked([str(tools / "canarywire"), "serve", "--listen", f"127.0.0.1:{up}", "--detach"])
        there = ["--target", f"http://127.0.0.1:{relay}", "--capture", f"http://127.0.0.1:{up}", "--out", str(folder / "canarywire"), "--seed", "7"]
        asked([str(tools / "canarywire"), "run", *there])
        asked([str(tools / "canarywire"), "stop"])
        report = json.loads((folder / "canarywire" / "report.json").read_text())
        sizes = {name: len(report[name]) for name in ("attacks", "leaks", "unrestored", "inconsistent", "mangled", "findings", "problems")}
        found["canarywire"] = {"outcome": report["outcome"], "verified": report["verified"], **sizes}
    finally:
        process.terminate()
        process.wait(20)
    return found


def fuzzed(options: argparse.Namespace, key: str, port: int, up: int) -> dict[str, object]:
    """Schemathesis: no answer outside the document, no crash, whatever the request."""
    upstream = subprocess.Popen([sys.executable, "-c", ECHO, str(up)])
    try:
        wait_for(up)
        url = f"http://127.0.0.1:{port}"
        checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,ignored_auth"
        command = [str(options.schemathesis / "bin" / "schemathesis"), "run", f"{url}/openapi.json", "--url", url, "--checks", checks]
        command += ["-H", f"Authorization: Bearer {key}", "--max-examples", str(options.examples), "--seed", "7", "--no-color"]
        code, said = asked(command, seconds=900)
    finally:
        upstream.terminate()
        upstream.wait(20)
    return {
        "schemathesis": {
            "exit": code,
            "examples_each": options.examples,
            "said": [line.strip(" =") for line in said.splitlines() if "generated" in line or "issues found" in line or "FAIL" in line],
        }
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--acceptance", type=Path)
    parser.add_argument("--schemathesis", type=Path)
    parser.add_argument("--examples", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from discreet.serve import asgi

    key, hashed = asgi.new_api_key()
    found: dict[str, object] = {"date": time.strftime("%Y-%m-%d")}
    with tempfile.TemporaryDirectory() as name:
        folder, port, up = Path(name), free_port(), free_port()
        tenants = folder / "tenants.toml"
        quota = "requests_per_minute = 1000000\nmax_concurrent = 500\n"
        tenants.write_text(f'[tenant.bench]\nkey_sha256 = ["{hashed}"]\n{quota}models = {json.dumps(MODELS)}\n')
        gate = subprocess.Popen(gateway_command(up, port, tenants), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(port)
            if options.acceptance:
                found |= accepted(options, folder, key, port, up)
            if options.schemathesis:
                found |= fuzzed(options, key, port, up)
        finally:
            gate.terminate()
            gate.wait(20)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
