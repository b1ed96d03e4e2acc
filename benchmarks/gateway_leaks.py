"""Generated conversations with planted values through the gateway: none may be in the upstream's record or in any sink, and each must come back to its caller.

    python benchmarks/gateway_leaks.py [--conversations N] [--names rules|model] [--seed S] [--json results.json]

In one process, without sockets: the ASGI application, a fake upstream that records what it sees and echoes it, in pieces of random size where the request streams. Each conversation has two
to five turns on one of four wires, with e-mail addresses, social security numbers, phone and card numbers, IBANs and people's names, each planted in one sentence out of a list and
repeated bare in a later turn, in tool arguments, or in `metadata`. Counted are values (not conversations) that the upstream saw, by label; values in the log, the metrics or the trail; answers
that do not hold what was asked.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import logging
import random
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import httpx
from faker import Faker

from discreet.deid.policy import Names
from discreet.keys import Key
from discreet.serve import asgi, proxy, trail
from discreet.serve.filters import POLICY
from discreet.serve.tenants import Settings, Tenant
from discreet.serve.upstream import Address, Upstream

SENTENCES = {
    "PERSON": ("Patient {} was seen today.", "Dear Mr. {}, thank you.", "Please ask Dr. {} about it.", "Name: {}", "My name is {} and I need help."),
    "EMAIL": ("Write to {} please.", "email: {}", "<{}> asked twice", "contact={}&x=1"),
    "SSN": ("SSN {}", "Her social security number is {}.", "ssn: {};"),
    "PHONE": ("Call {} tomorrow.", "Phone: {}", "reach me at {} or not at all"),
    "CARD": ("charge card {} now", "Card number: {}", "paid with {}."),
    "IBAN": ("IBAN {}", "transfer it to {} today", "account {}"),
}
FILLER = (
    "Thanks for the help so far.",
    "What should we do about the cough?",
    "Summarise the visit.",
    "The plan stays the same.",
    "for i in range(3): print(i)",
)


def value(label: str, fake: Faker, rng: random.Random) -> str:
    if label == "PERSON":
        return f"{fake.first_name()} {fake.last_name()}"
    if label == "EMAIL":
        return str(fake.email())
    if label == "SSN":
        return f"{rng.randint(1, 665):03d}-{rng.randint(1, 99):02d}-{rng.randint(1, 9999):04d}"
    if label == "PHONE":
        return f"{rng.choice(('212', '415', '617', '312'))}-{rng.randint(200, 999)}-{rng.randint(0, 9999):04d}"
    return str(fake.credit_card_number("visa") if label == "CARD" else fake.iban())


class Echo(httpx.AsyncBaseTransport):
    def __init__(self, rng: random.Random) -> None:
        self.seen, self.rng = [], rng

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = request.content.decode()
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        self.seen.append(content)
        body = json.loads(content)
        if "input" in body:
            text = body["input"][-1]["content"]
            part = {"type": "output_text", "text": text, "annotations": []}
            return httpx.Response(
                200, json={"id": "r", "object": "response", "output": [{"type": "message", "role": "assistant", "content": [part]}]}
            )
        if "prompt" in body:
            return httpx.Response(200, json={"id": "c", "choices": [{"index": 0, "text": body["prompt"], "finish_reason": "stop"}]})
        text = body["messages"][-1]["content"]
        if request.url.path == "/v1/messages":
            return httpx.Response(200, json={"id": "x", "type": "message", "role": "assistant", "content": [{"type": "text", "text": text}]})
        if body.get("stream"):
            return httpx.Response(200, content=self._stream(text))
        return httpx.Response(
            200, json={"id": "c", "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}
        )

    async def _stream(self, text: str) -> AsyncIterator[bytes]:
        while text:
            size = self.rng.randint(1, 9)
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text[:size]}}]})}\n\n".encode()
            text = text[size:]
        yield b'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'


def conversation(fake: Faker, rng: random.Random) -> tuple[str, dict[str, object], list[tuple[str, str]], str]:
    """Returns path, body, the planted (label, value) and the text that must come back."""
    planted = [(label, value(label, fake, rng)) for label in rng.sample(sorted(SENTENCES), rng.randint(1, 4))]
    texts = [" ".join([rng.choice(FILLER), *(rng.choice(SENTENCES[label]).format(each) for label, each in planted)])]
    texts += [f"{rng.choice(FILLER)} And {rng.choice(planted)[1]}, again?" for _ in range(rng.randint(1, 4))]
    kind = rng.randrange(5)
    roles = [("user", "assistant")[turn % 2] for turn in range(len(texts))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    if kind == 0:
        return "/v1/completions", {"model": "m", "prompt": "\n".join(texts)}, planted, "\n".join(texts)
    if kind == 1:
        return "/v1/responses", {"model": "m", "input": messages, "metadata": {"who": planted[0][1]}}, planted, texts[-1]
    if kind == 2:
        return "/v1/messages", {"model": "m", "max_tokens": 9, "messages": messages}, planted, texts[-1]
    call = {"id": "c1", "type": "function", "function": {"name": "look_up", "arguments": json.dumps({"who": planted[-1][1]})}}
    messages[1:1] = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "done"}]
    return "/v1/chat/completions", {"model": "m", "messages": messages, "stream": kind == 3}, planted, texts[-1]


def resident_mb() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024, 1)


async def drive(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    rng, fake = random.Random(options.seed), Faker("en_US")
    Faker.seed(options.seed)
    log = io.StringIO()
    logging.basicConfig(stream=log, level=logging.DEBUG, force=True)
    key, hashed = asgi.new_api_key()
    tenant = Tenant(name="t", key_hashes=(hashed,), policy=replace(POLICY, names=Names(options.names)), requests_per_minute=10**6, max_concurrent=100)
    echo = Echo(rng)
    address = Address(base="http://192.0.2.1:80", host="upstream.test", authority="upstream.test")
    planted_at_all, leaked, sinks, wrong = Counter(), Counter(), Counter(), 0
    began, memory = time.process_time(), []
    with trail.opened(folder) as kept:
        application = proxy.app(Upstream(address=address, transport=echo), Settings(tenants=(tenant,)), key=Key.random(), trail=kept)
        async with application.router.lifespan_context(application):
            transport = httpx.ASGITransport(app=application)
            async with httpx.AsyncClient(transport=transport, base_url="http://g", headers={"authorization": f"Bearer {key}"}) as client:
                everything: set[str] = set()
                for number in range(options.conversations):
                    if number % max(1, options.conversations // 5) == 0:
                        memory.append(resident_mb())
                    path, body, planted, expected = conversation(fake, rng)
                    echo.seen.clear()
                    answer = await client.post(path, json=body)
                    seen = "\n".join(echo.seen)
                    for label, each in planted:
                        planted_at_all[label] += 1
                        everything.add(each)
                        parts = each.split() if label == "PERSON" else [each]
                        leaked[label] += any(part in seen for part in parts)
                    if body.get("stream"):
                        events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
                        wrong += "".join(event["choices"][0]["delta"].get("content", "") for event in events) != expected
                    else:
                        wrong += json.dumps(expected)[1:-1] not in json.dumps(answer.json())
                metrics = (await client.get("/metrics")).text
    files = "\n".join(path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file())
    for name, text in (("log", log.getvalue()), ("metrics", metrics), ("trail", files)):
        sinks[name] = sum(each in text for each in everything)
    return {
        "conversations": options.conversations,
        "names": options.names,
        "planted": dict(planted_at_all),
        "seen_by_upstream": dict(leaked),
        "in_sinks": dict(sinks),
        "answers_not_restored": wrong,
        "resident_mb_after_each_fifth": memory,
        "cpu_s": round(time.process_time() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--conversations", type=int, default=10_000)
    parser.add_argument("--names", choices=["rules", "model"], default="model")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(drive(options, Path(folder)))
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
