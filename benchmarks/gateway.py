"""The gateway alone, measured: what it adds to a request, beside the same request sent to the same fake upstream directly, in one run.

    python benchmarks/gateway.py [--requests N] [--streams N] [--memory N] [--json results.json]

Three processes: this one (the client), a fake upstream that echoes at once, and the gateway in front of it. The prompt has 200 words with four identifiers. Measured: latency of one
request after another (added p50 and p99), time to the first byte of a streamed answer, requests per second with 16 clients, many streams at once, and the resident memory
of the gateway after each quarter of `--memory` requests. LiteLLM, the peer of choice, is
not measured yet.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
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
PROMPT = " ".join(["Dr. Aurelia Quistgaard, SSN 536-22-8145, aurelia@example.org, phone 415-555-0132:", *(WORDS[n % len(WORDS)] for n in range(190))])
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


def asked(stream: bool) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "stream": stream}


async def latencies(client: httpx.AsyncClient, url: str, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        (await client.post(url, json=asked(False))).raise_for_status()
        taken.append(1000 * (time.perf_counter() - began))
    return taken


async def first_bytes(client: httpx.AsyncClient, url: str, count: int) -> list[float]:
    taken = []
    for _ in range(count):
        began = time.perf_counter()
        async with client.stream("POST", url, json=asked(True)) as response:
            async for _chunk in response.aiter_bytes():
                taken.append(1000 * (time.perf_counter() - began))
                break
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


async def measure(direct: str, through: str, pid: int, options: argparse.Namespace) -> dict[str, object]:
    limits = httpx.Limits(max_connections=400)
    async with httpx.AsyncClient(timeout=120, limits=limits, headers={"authorization": f"Bearer {os.environ['BENCH_KEY']}"}) as client:
        found: dict[str, object] = {}
        for name, url in (("direct", direct), ("gateway", through)):
            await latencies(client, url, 20)
            taken = sorted(await latencies(client, url, options.requests))
            first = statistics.median(await first_bytes(client, url, options.requests // 2))
            rate = await throughput(client, url, options.requests)
            found[name] = {
                "p50_ms": round(statistics.median(taken), 2),
                "p99_ms": round(taken[int(len(taken) * 0.99)], 2),
                "first_byte_ms": round(first, 2),
                "requests_per_s": round(rate, 1),
            }
        found["streams_held"] = f"{await streams_held(client, through, options.streams)} of {options.streams}"
        memory = [round(resident_mb(pid), 1)]
        for _ in range(4 if options.memory else 0):
            await throughput(client, through, options.memory // 4)
            memory.append(round(resident_mb(pid), 1))
        found["gateway_resident_mb"] = memory
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--memory", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    from discreet.serve import asgi

    key, hashed = asgi.new_api_key()
    os.environ["BENCH_KEY"] = key
    up, gate = free_port(), free_port()
    tenants = Path(os.environ.get("TMPDIR", "/tmp")) / f"bench-tenants-{os.getpid()}.toml"
    tenants.write_text(f'[tenant.bench]\nkey_sha256 = ["{hashed}"]\nrequests_per_minute = 1000000\nmax_concurrent = 1000\n')
    command = [
        str(Path(sys.executable).parent / "discreet"),
        "serve",
        "--upstream",
        f"http://127.0.0.1:{up}",
        "--allow-private",
        "127.0.0.1",
        "--port",
        str(gate),
        "--tenants",
        str(tenants),
    ]
    processes = [subprocess.Popen([sys.executable, "-c", UPSTREAM, str(up)]), subprocess.Popen(command)]
    try:
        for port in (up, gate):
            for _ in range(200):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
        found = asyncio.run(
            measure(f"http://127.0.0.1:{up}/v1/chat/completions", f"http://127.0.0.1:{gate}/v1/chat/completions", processes[1].pid, options)
        )
    finally:
        for process in processes:
            process.terminate()
            process.wait(20)
        tenants.unlink()
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
