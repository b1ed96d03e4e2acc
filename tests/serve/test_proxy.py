"""The gateway in front of a fake upstream, over real connections, with OpenAI's and Anthropic's own clients."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace

import anthropic
import httpx
import openai
import pytest

from discreet.deid.vault import PLACEHOLDER
from discreet.errors import ConfigInvalid, UpstreamFailed
from discreet.evidence.log import verify_bundle
from discreet.keys import Key
from discreet.serve import answers, asgi, fields, filters, proxy, trail, upstream
from discreet.serve.answers import ToolArguments
from discreet.serve.leaks import Canaries, Guard, OwnIdentifiers
from discreet.serve.tenants import Limits, Settings, Tenant, Unknown
from discreet.serve.upstream import Address, Upstream

from . import test_oidc

NAME, EMAIL, SSN = "Aurelia Quistgaard", "aurelia.quistgaard@example.org", "536-22-8145"
PROMPT = f"Patient {NAME} can be reached at {EMAIL}, SSN {SSN}. Summarise."
SECRETS = ("Aurelia", "Quistgaard", "aurelia", "536-22-8145", "5362281")
TOOL = {
    "type": "function",
    "function": {
        "name": "send_email",
        "description": f"Writes to {EMAIL}.",
        "parameters": {"type": "object", "properties": {"to": {"type": "string"}}},
    },
}


@dataclass
class FakeUpstream(httpx.AsyncBaseTransport):
    """Answers with what it saw, on all wires, its stream cut into pieces of a few bytes; keeps every request."""

    cut: int = 3
    piece: int = 2
    status: int = 200
    die_after: int | None = None
    pause: float = 0.0
    say: str = ""
    seen: list[str] = field(default_factory=list)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(f"{request.method} {request.url} {dict(request.headers)} {request.content.decode()}")
        if self.status != 200:
            return httpx.Response(self.status, headers={"location": "http://169.254.169.254/"}, content=request.content)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m"}]})
        body = json.loads(request.content)
        if self.say:
            last = (
                {"prompt": self.say}
                if "prompt" in body
                else {"input": self.say}
                if "input" in body
                else {"messages": [{"role": "user", "content": self.say}]}
            )
            body = {**body, **last}
        make = {"/v1/chat/completions": _chat, "/v1/completions": _completion, "/v1/responses": _response, "/v1/messages": _message}.get(
            request.url.path
        )
        if make is None:
            return httpx.Response(
                200,
                json={
                    "object": "list",
                    "model": "m",
                    "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}],
                    "usage": {"prompt_tokens": 1, "total_tokens": 1},
                },
            )
        whole, events = make(body, self.piece)
        if not body.get("stream"):
            return httpx.Response(200, json=whole)
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=self._bytes(events))

    async def _bytes(self, events: list) -> AsyncIterator[bytes]:
        if self.die_after is not None:
            events = events[: self.die_after]
        sent = "".join(
            f"event: x\ndata: {event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)}\n\n" for event in events
        ).encode()
        for at in range(0, len(sent), self.cut):
            yield sent[at : at + self.cut]
            if self.pause:
                import asyncio

                await asyncio.sleep(self.pause)

    def everything(self) -> str:
        return "\n".join(self.seen)


def _pieces(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def _said(content) -> str:
    return content if isinstance(content, str) else "\n".join(part.get("text") or json.dumps(part) for part in content)


CACHED = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12, "prompt_tokens_details": {"cached_tokens": 7}}


def _chat(body, size):
    base = {"id": "c", "created": 1, "model": "m"}
    text = _said(body["messages"][-1]["content"])
    calls = []
    if body.get("tools"):
        calls = [
            {"id": "call_1", "type": "function", "function": {"name": body["tools"][0]["function"]["name"], "arguments": json.dumps({"to": text})}}
        ]
    whole = {
        **base,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text, "tool_calls": calls or None}, "finish_reason": "stop"}],
        "usage": CACHED,
    }
    deltas = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in _pieces(text, size))]
    for call in calls:
        deltas.append(
            {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": call["function"]["name"], "arguments": ""}}]}
        )
        deltas += [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]} for piece in _pieces(call["function"]["arguments"], size)]
    events = [{**base, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    return whole, [
        *events,
        {**base, "object": "chat.completion.chunk", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "usage": CACHED},
        "[DONE]",
    ]


def _completion(body, size):
    base = {"id": "c", "created": 1, "model": "m", "object": "text_completion"}
    text = body["prompt"] if isinstance(body["prompt"], str) else body["prompt"][0]
    events = [{**base, "choices": [{"index": 0, "text": piece, "finish_reason": None}]} for piece in _pieces(text, size)]
    return {**base, "choices": [{"index": 0, "text": text, "finish_reason": "stop"}]}, [
        *events,
        {**base, "choices": [{"index": 0, "text": "", "finish_reason": "stop"}]},
        "[DONE]",
    ]


def _response(body, size):
    text = body["input"] if isinstance(body["input"], str) else _said(body["input"][-1].get("content") or body["input"][-1]["output"])
    arguments = json.dumps({"to": text})
    item = {
        "id": "i",
        "type": "message",
        "role": "assistant",
        "status": "completed",
        "content": [{"type": "output_text", "text": text, "annotations": []}],
    }
    call = {"id": "f", "type": "function_call", "call_id": "c1", "name": "send_email", "arguments": arguments, "status": "completed"}
    usage = {
        "input_tokens": 9,
        "output_tokens": 3,
        "total_tokens": 12,
        "input_tokens_details": {"cached_tokens": 7},
        "output_tokens_details": {"reasoning_tokens": 0},
    }
    whole = {
        "id": "r",
        "object": "response",
        "created_at": 1,
        "model": "m",
        "status": "completed",
        "output": [item, call],
        "usage": usage,
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
    }
    at, call_at = {"item_id": "i", "output_index": 0, "content_index": 0}, {"item_id": "f", "output_index": 1}
    events = [{"type": "response.created", "response": {**whole, "status": "in_progress", "output": []}}]
    events += [{"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": [], "status": "in_progress"}}]
    events += [{"type": "response.content_part.added", **at, "part": {"type": "output_text", "text": "", "annotations": []}}]
    events += [{"type": "response.output_text.delta", **at, "delta": piece, "logprobs": []} for piece in _pieces(text, size)]
    events += [{"type": "response.output_text.done", **at, "text": text, "logprobs": []}]
    events += [{"type": "response.output_item.added", "output_index": 1, "item": {**call, "arguments": "", "status": "in_progress"}}]
    events += [{"type": "response.function_call_arguments.delta", **call_at, "delta": piece} for piece in _pieces(arguments, size)]
    events += [{"type": "response.function_call_arguments.done", **call_at, "arguments": arguments, "name": "send_email"}]
    events += [{"type": "response.completed", "response": whole}]
    return whole, [{**event, "sequence_number": number} for number, event in enumerate(events)]


def _message(body, size):
    text = _said(body["messages"][-1]["content"])
    usage = {"input_tokens": 9, "output_tokens": 3, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 5}
    tool = {"type": "tool_use", "id": "t", "name": "send_email", "input": {"to": text}}
    whole = {
        "id": "m1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": text}, tool],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": usage,
    }
    events = [
        {"type": "message_start", "message": {**whole, "content": [], "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    ]
    events += [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}} for piece in _pieces(text, size)]
    events += [{"type": "content_block_stop", "index": 0}, {"type": "content_block_start", "index": 1, "content_block": {**tool, "input": {}}}]
    events += [
        {"type": "content_block_delta", "index": 1, "delta": {"type": "input_json_delta", "partial_json": piece}}
        for piece in _pieces(json.dumps({"to": text}), size)
    ]
    events += [
        {"type": "content_block_stop", "index": 1},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": {"output_tokens": 3}},
        {"type": "message_stop"},
    ]
    return whole, events


@dataclass
class Running:
    url: str
    keys: tuple[str, ...]
    application: proxy.Gateway

    def openai(self, which: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.keys[which], max_retries=0, timeout=20)

    def anthropic(self) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=self.url, api_key=self.keys[0], max_retries=0, timeout=20)

    def post(self, path: str, body: object, which: int = 0) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", json=body, headers={"authorization": f"Bearer {self.keys[which]}"}, timeout=20)

    def get(self, path: str, which: int = 0) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers={"authorization": f"Bearer {self.keys[which]}"}, timeout=20)


@contextlib.contextmanager
def serving(fake: FakeUpstream, *changes: dict, **options) -> Iterator[Running]:
    pairs = [asgi.new_api_key() for _ in changes or ({},)]
    tenants = [
        replace(Tenant(name=f"t{n}", key_hashes=(pair[1],)), **change) for n, (pair, change) in enumerate(zip(pairs, changes or ({},), strict=True))
    ]
    address = Address(base="http://192.0.2.1:80", host="upstream.test", authority="upstream.test")
    settings = Settings(tenants=tuple(tenants), **{name: options.pop(name) for name in ("limits", "metrics_key_hash", "provider") if name in options})
    application = proxy.app(Upstream(address=address, api_key="upstream-secret", transport=fake), settings, key=Key(bytes(32)), **options)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = asgi.server(application, host="127.0.0.1", port=0)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not running.started:
                time.sleep(0.01)
            yield Running(url=f"http://127.0.0.1:{listener.getsockname()[1]}", keys=tuple(pair[0] for pair in pairs), application=application)
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(scope="module")
def fake() -> FakeUpstream:
    return FakeUpstream()


@pytest.fixture(scope="module")
def gate(fake):
    with serving(fake) as running:
        yield running


@pytest.fixture(autouse=True)
def _fresh(fake):
    fake.seen.clear()
    fake.status, fake.die_after, fake.cut, fake.piece, fake.say, fake.pause = 200, None, 3, 2, "", 0.0


def unseen(fake: FakeUpstream) -> None:
    assert fake.seen
    assert [secret for secret in SECRETS if secret in fake.everything()] == []


# --- the official clients


@pytest.mark.parametrize("piece", [1, 2, 7, 1000])
def test_chat_with_tools_streams_restored(gate, fake, piece):
    fake.piece = piece
    with (
        gate.openai() as client,
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": PROMPT}], tools=[TOOL], stream=True) as stream,
    ):
        chunks = list(stream)
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == PROMPT
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    assert json.loads("".join(call.function.arguments or "" for call in calls)) == {"to": PROMPT}
    assert calls[0].function.name == "send_email"
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 0
    unseen(fake)


def test_chat_in_one_piece(gate, fake):
    with gate.openai() as client:
        answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": PROMPT}], tools=[TOOL])
    assert answer.choices[0].message.content == PROMPT
    assert json.loads(answer.choices[0].message.tool_calls[0].function.arguments) == {"to": PROMPT}
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    unseen(fake)


def test_completions_embeddings_and_models(gate, fake):
    with gate.openai() as client:
        assert client.completions.create(model="m", prompt=PROMPT).choices[0].text == PROMPT
        with client.completions.create(model="m", prompt=PROMPT, stream=True) as stream:
            assert "".join(chunk.choices[0].text for chunk in stream) == PROMPT
        assert client.embeddings.create(model="m", input=[PROMPT]).data[0].embedding == [0.5]
        assert [model.id for model in client.models.list()] == ["m"]
    unseen(fake)
    assert "[PERSON]" in fake.everything()  # the same text has the same vector in every request


def test_responses(gate, fake):
    with gate.openai() as client:
        answer = client.responses.create(model="m", input=PROMPT, instructions=f"About {NAME}.")
        assert answer.output_text == PROMPT
        assert json.loads(answer.output[1].arguments) == {"to": PROMPT}
        with client.responses.stream(model="m", input=PROMPT) as stream:
            events = list(stream)
            final = stream.get_final_response()
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == PROMPT
    assert json.loads("".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")) == {"to": PROMPT}
    assert final.output_text == PROMPT
    assert final.usage.input_tokens_details.cached_tokens == 0
    unseen(fake)
    assert '"store": false' in fake.everything()


def test_anthropic_messages(gate, fake):
    asked = {"model": "m", "max_tokens": 50, "system": f"You treat {NAME}.", "messages": [{"role": "user", "content": PROMPT}]}
    with gate.anthropic() as client:
        answer = client.messages.create(**asked)
        assert answer.content[0].text == PROMPT
        assert answer.content[1].input == {"to": PROMPT}
        assert answer.usage.cache_read_input_tokens == 0
        with client.messages.stream(**asked) as stream:
            assert "".join(stream.text_stream) == PROMPT
            final = stream.get_final_message()
    assert final.content[1].input == {"to": PROMPT}
    assert [model for model in fake.seen if "x-api-key" in model]
    unseen(fake)


def test_the_clients_see_errors_of_their_own_kind(gate, fake):
    fake.status = 500
    with gate.openai() as client, pytest.raises(openai.InternalServerError) as error:
        client.chat.completions.create(model="m", messages=[{"role": "user", "content": PROMPT}])
    assert error.value.code == UpstreamFailed.code
    with gate.anthropic() as other, pytest.raises(anthropic.InternalServerError):
        other.messages.create(model="m", max_tokens=5, messages=[{"role": "user", "content": PROMPT}])


# --- what is refused


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"model": "m", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:x"}}]}]}),
        ("chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x", "note": NAME}]}),
        ("chat/completions", {"model": "m", "messages": [], "tools": [{"type": "web_search"}]}),
        ("chat/completions", {"model": "m", "messages": [], "logprobs": True}),
        ("chat/completions", {"model": "m", "messages": [], "n": 17}),
        ("chat/completions", {"model": "m", "messages": [{"role": NAME, "content": "x"}]}),
        ("embeddings", {"model": "m", "input": [[1, 2, 3]]}),
        ("responses", {"model": "m", "input": "x", "previous_response_id": NAME}),
        ("responses", {"model": "m", "input": [{"type": "input_file", "file_data": NAME}]}),
        ("messages", {"model": "m", "messages": [{"role": "user", "content": [{"type": "document", "source": NAME}]}]}),
        ("completions", {"model": "m", "prompt": [[1, 2]]}),
    ],
)
def test_what_the_filters_do_not_know_is_refused(gate, fake, path, body):
    answer = gate.post(path, body)
    assert answer.status_code == 400
    assert NAME not in answer.text
    assert [request for request in fake.seen if "POST" in request] == []


def test_unknown_models_keys_and_routes_are_refused(gate, fake):
    assert gate.post("chat/completions", {"model": "other", "messages": []}).status_code == 404
    assert httpx.post(f"{gate.url}/v1/chat/completions", json={}).status_code == 401
    assert httpx.get(f"{gate.url}/metrics").status_code == 401
    for path in ("/invocations", "/v1/files", "/v1/models/../../pause"):
        assert gate.get(path).status_code == 404
    assert [request for request in fake.seen if "POST" in request] == []


@pytest.mark.parametrize(("status", "expected"), [(302, 502), (307, 502), (401, 502), (500, 502), (400, 400), (429, 429)])
@pytest.mark.parametrize("stream", [False, True])
def test_what_an_upstream_says_when_it_fails_is_not_repeated(gate, fake, status, expected, stream):
    assert gate.get("/v1/models").status_code == 200
    fake.status = status
    answer = gate.post("chat/completions", {"model": "m", "messages": [{"role": "user", "content": "hello there"}], "stream": stream})
    assert (answer.status_code, "hello" in answer.text) == (expected, False)
    assert len([request for request in fake.seen if "POST" in request]) == 1  # and no redirect was followed


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
def test_an_upstream_that_dies_in_the_stream_ends_it_with_an_error(gate, fake, path):
    fake.die_after = 8
    said = (
        {"prompt": PROMPT}
        if path == "completions"
        else {"input": PROMPT}
        if path == "responses"
        else {"messages": [{"role": "user", "content": PROMPT}]}
    )
    answer = gate.post(path, {"model": "m", "stream": True, **said})
    assert UpstreamFailed.code in answer.text
    assert "[DONE]" not in answer.text
    assert not PLACEHOLDER.search(answer.text)


# --- faults: an error in a filter is an error, never text


_BEFORE, _WHOLE, _STREAM = (False, True), (False,), (True,)


@pytest.mark.parametrize(
    ("owner", "name", "stream"),
    [
        (owner, name, stream)
        for owner, name, streams in (
            (filters.Conversation, "learn", _BEFORE),
            (filters.Conversation, "text", _BEFORE),
            (filters.Conversation, "name", _BEFORE),
            (filters, "protect", _BEFORE),
            (filters, "find", _BEFORE),
            (filters, "leaves_none", _BEFORE),
            (filters, "protect", _BEFORE),
            (fields, "_walk", _BEFORE),
            (proxy, "Conversation", _BEFORE),
            (proxy, "Answer", _BEFORE),
            (filters.Vault, "issue", _BEFORE),
            (filters.Vault, "restore", _BEFORE),
            (filters.Vault, "restore_one", _STREAM),
            (filters.Conversation, "restore", _BEFORE),
            (filters.JsonRestorer, "feed", _BEFORE),
            (filters.Restorer, "feed", _STREAM),
            (filters.Restorer, "close", _STREAM),
            (answers.Answer, "whole", _BEFORE),
            (answers, "events", _STREAM),
            (proxy, "_events", _STREAM),
        )
        for stream in streams
    ],
)
def test_a_fault_in_a_filter_never_lets_text_through(gate, fake, monkeypatch, caplog, owner, name, stream):
    gate.get("/v1/models")
    fake.seen.clear()

    def fails(*args, **kwargs):
        raise RuntimeError(PROMPT)

    monkeypatch.setattr(owner, name, fails)
    answer = gate.post("chat/completions", {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "tools": [TOOL], "stream": stream})
    monkeypatch.undo()
    assert '"error"' in answer.text
    assert "[DONE]" not in answer.text
    assert "RuntimeError" in answer.text
    everything = fake.everything() + caplog.text + ("" if stream else answer.text)  # a stream may have said something before the fault
    assert [secret for secret in SECRETS if secret in everything] == []


def test_a_client_who_goes_away_frees_its_place():
    fake = FakeUpstream(pause=0.01)
    with serving(fake, {"max_concurrent": 1}) as gate:
        for _ in range(3):
            with (
                gate.openai() as client,
                client.chat.completions.create(model="m", messages=[{"role": "user", "content": PROMPT}], stream=True) as stream,
            ):
                next(iter(stream))
            deadline = time.monotonic() + 5
            while "discreet_running 0" not in gate.get("/metrics").text:
                assert time.monotonic() < deadline
                time.sleep(0.01)


# --- tenants


def test_tenants_have_quotas_models_and_destinations_of_their_own(fake):
    third = {"tools": ToolArguments.PLACEHOLDER}
    with serving(fake, {"requests_per_minute": 2}, {"models": frozenset(("m",))}, third, cache_salt=True) as gate:
        ask = {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "tools": [TOOL], "user": "u1"}
        assert [gate.post("chat/completions", ask).status_code for _ in range(3)] == [200, 200, 429]
        assert gate.post("chat/completions", ask, which=1).status_code == 200
        answer = gate.post("chat/completions", ask, which=2).json()["choices"][0]["message"]
        assert answer["content"] == PROMPT
        assert not [secret for secret in SECRETS if secret in answer["tool_calls"][0]["function"]["arguments"]]
        posted = [json.loads(request[request.index('{"model"') :]) for request in fake.seen if "POST" in request]
        assert posted[0]["cache_salt"] == posted[1]["cache_salt"] != posted[2]["cache_salt"]
        assert posted[0]["user"] == posted[1]["user"] != posted[2]["user"]
        shown = PLACEHOLDER.search(posted[0]["messages"][0]["content"]).group()
        echoed = gate.post("chat/completions", {"model": "m", "messages": [{"role": "user", "content": f"Say {shown}"}]}, which=1).json()
        assert echoed["choices"][0]["message"]["content"] == f"Say {shown}"  # typed by a user: comes back as typed, and is nobody's value
        assert shown not in json.loads(fake.seen[-1][fake.seen[-1].index('{"model"') :])["messages"][0]["content"]


# --- every field, every sink


def _planted() -> tuple[list[str], list[tuple[str, dict]]]:
    secrets: list[str] = []

    def secret() -> str:
        secrets.append(f"planted{len(secrets):03d}@leak-test.org")
        return f"write to {secrets[-1]} now"

    def bare() -> str:
        secret()
        return secrets[-1]

    schema = {"type": "object", "properties": {bare(): {"type": "string", "description": secret(), "enum": [secret()], "default": secret()}}}
    function = {"name": "find_Aurelia_Quistgaard", "description": secret(), "parameters": schema}
    call = {
        "id": bare(),
        "type": "function",
        "function": {"name": "find_Aurelia_Quistgaard", "arguments": json.dumps({"a": secret(), bare(): [secret(), {"ssn": 536228145}]})},
    }
    chat = {
        "model": "m", "user": bare(), "metadata": {"k": secret(), bare(): "v"}, "stop": [secret()], "safety_identifier": bare(), "prompt_cache_key": bare(),
        "messages": [
            {"role": "system", "content": secret()}, {"role": "developer", "content": secret()},
            {"role": "user", "name": bare(), "content": [{"type": "text", "text": secret()}, {"type": "text", "text": PROMPT}]},
            {"role": "assistant", "content": secret(), "refusal": secret(), "reasoning_content": secret(), "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": json.dumps({"r": secret()})}, {"role": "user", "content": secret()},
        ],
        "tools": [{"type": "function", "function": function}], "tool_choice": {"type": "function", "function": {"name": "find_Aurelia_Quistgaard"}},
        "response_format": {"type": "json_schema", "json_schema": {"name": "find_Aurelia_Quistgaard", "description": secret(), "schema": schema}},
        "prediction": {"type": "content", "content": secret()},
    }  # fmt: skip
    responses = {
        "model": "m", "instructions": secret(), "user": bare(), "metadata": {"k": secret()}, "tools": [{"type": "function", **function}],
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": secret()}]}, {"type": "message", "id": bare(), "role": "assistant", "content": [{"type": "output_text", "text": secret(), "annotations": []}]},
            {"type": "function_call", "call_id": bare(), "name": "f", "arguments": secret()}, {"type": "function_call_output", "call_id": bare(), "output": secret()},
        ],
        "text": {"format": {"type": "json_schema", "name": "s", "schema": schema, "description": secret()}},
    }  # fmt: skip
    messages = {
        "model": "m", "max_tokens": 9, "system": [{"type": "text", "text": secret()}], "metadata": {"user_id": bare()}, "stop_sequences": [secret()],
        "tools": [{"name": "f", "description": secret(), "input_schema": schema}],
        "messages": [
            {"role": "user", "content": secret()}, {"role": "assistant", "content": [{"type": "tool_use", "id": bare(), "name": "f", "input": {"x": [secret()]}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": bare(), "content": [{"type": "text", "text": secret()}]}, {"type": "text", "text": secret()}]},
        ],
    }  # fmt: skip
    completions = {"model": "m", "prompt": [secret(), secret()], "suffix": secret(), "user": bare()}
    embeddings = {"model": "m", "input": [secret(), secret()], "user": bare()}
    return secrets, [
        ("chat/completions", chat),
        ("responses", responses),
        ("messages", messages),
        ("completions", completions),
        ("embeddings", embeddings),
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_secret_in_every_field_reaches_no_sink(gate, fake, caplog, capfd, stream):
    caplog.set_level(logging.DEBUG, logger="discreet")
    planted, requests = _planted()
    for path, body in requests:
        answer = gate.post(path, body if path == "embeddings" else {**body, "stream": stream})
        assert answer.status_code == 200, answer.text
        assert '"error"' not in answer.text
    sinks = {"upstream": fake.everything(), "log": caplog.text, "console": "".join(capfd.readouterr()), "metrics": gate.get("/metrics").text}
    found = [
        (sink, value) for sink, text in sinks.items() for value in (*planted, *SECRETS, "leak-test", "536228145") if value.lower() in text.lower()
    ]
    assert found == []
    assert len([request for request in fake.seen if "POST" in request]) == len(requests)


def test_metrics_have_labels_of_closed_lists_only(gate):
    gate.post("chat/completions", {"model": "m", "messages": [{"role": "user", "content": PROMPT}]})
    page = gate.get("/metrics").text
    labels = set(re.findall(r"[{,]([a-z_]+)=", page))
    assert labels <= {"tenant", "route", "status", "label", "le"}
    assert 'discreet_identifiers_total{label="EMAIL",tenant="t0"}' in page


def test_health_and_readiness(fake):
    with serving(fake) as gate:
        assert httpx.get(f"{gate.url}/healthz").status_code == 200
        fake.status = 503
        assert httpx.get(f"{gate.url}/readyz").status_code == 502
        fake.status = 200
        assert httpx.get(f"{gate.url}/readyz").status_code == 200


def test_limits(fake):
    with serving(fake, limits=Limits(max_request_bytes=500, max_chars=100)) as gate:
        assert gate.post("chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x" * 101}]}).status_code == 400
        assert gate.post("chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x" * 501}]}).status_code == 400


def test_the_gateway_alone_needs_no_training_library(tmp_path):
    """Nor do its commands: the trail is exported and verified where torch cannot be imported."""
    with trail.opened(tmp_path / "trail"):
        pass
    told = """
import sys
class Absent:
    def find_spec(name, *_):
        if name.partition(".")[0] in ("torch", "transformers", "peft"):
            raise ModuleNotFoundError(name=name)
sys.meta_path.insert(0, Absent)
from discreet import cli
import discreet.serve.run
for verb in (["evidence", "export", "--trail", "trail", "--out", "bundle"], ["evidence", "verify", "bundle", "--key", "bundle.pub"]):
    sys.argv = ["discreet", *verb]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, verb
print("VALID" if __import__("pathlib").Path("bundle.pub").is_file() else "nothing")
"""
    done = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, cwd=tmp_path, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("VALID")


def test_a_line_of_ten_thousand_tokens_and_many_streams_at_once(gate, fake):
    fake.piece, fake.cut = 20, 4096
    text = f"{PROMPT} " + "word " * 10_000
    answers_of: list[str] = []

    def ask() -> None:
        answers_of.append(gate.post("completions", {"model": "m", "prompt": PROMPT, "stream": True}).text)

    long = gate.post("chat/completions", {"model": "m", "messages": [{"role": "user", "content": text}]}).json()
    assert long["choices"][0]["message"]["content"] == text
    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers_of) == 20
    assert all("[DONE]" in answer and "Aurelia" in answer for answer in answers_of)


# --- what the model says of its own


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": "Who?"}], "tools": [TOOL]}),
        ("completions", {"prompt": "Who?"}),
        ("responses", {"input": "Who?"}),
        ("messages", {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 9}),
    ],
)
def test_identifiers_of_the_models_own_reach_nobody_on_any_wire(gate, fake, path, body, stream):
    fake.say = f"The SSN of another patient is {SSN}, her mail {EMAIL} I believe."
    answer = gate.post(path, {"model": "m", **body, "stream": stream})
    assert answer.status_code == 200
    assert [secret for secret in (SSN, EMAIL) if secret in answer.text] == []
    assert 'discreet_stopped_total{label="SSN",tenant="t0"}' in gate.get("/metrics").text


@pytest.mark.parametrize("stream", [False, True])
def test_a_canary_or_a_stopped_identifier_ends_the_answer(fake, stream):
    canary = "The heron of Quillfjord owes 7 crowns"
    with serving(
        fake, {"guard": Guard(canaries=Canaries.of([canary]))}, {"guard": Guard(own=OwnIdentifiers.STOP)}, {"tools": ToolArguments.PLACEHOLDER}
    ) as gate:
        ask = {"model": "m", "messages": [{"role": "user", "content": "Who?"}], "stream": stream, "tools": [TOOL]}
        fake.say = f"Well: {canary.upper()} and that is that, so it is."
        stopped = gate.post("chat/completions", ask)
        assert "serve.leak" in stopped.text
        assert "QUILLFJORD" not in stopped.text
        assert "[DONE]" not in stopped.text
        assert stopped.status_code == (200 if stream else 403)
        fake.say = f"The SSN is {SSN} and that is that."
        assert "serve.leak" in gate.post("chat/completions", ask, which=1).text
        kept = gate.post("chat/completions", ask, which=2).text
        assert "serve.leak" not in kept
        assert SSN not in kept  # in the arguments of a tool call neither, though they keep their placeholders


def test_an_upstream_that_caches_never_finds_what_another_tenant_asked(fake):
    """What a cache is looked up by (PITFALLS 29): the same words of two tenants are two keys, those of one tenant are one."""
    with serving(fake, {}, {}, cache_salt=True) as gate:
        for which in (0, 1, 0, 1):
            gate.post("chat/completions", {"model": "m", "messages": [{"role": "user", "content": "the same plain words"}]}, which=which)
    bodies = [json.loads(seen[seen.index("} {") + 2 :]) for seen in fake.seen if "/chat/completions" in seen]
    keys = [(body["cache_salt"], json.dumps(body["messages"])) for body in bodies]
    assert keys[0] == keys[2] != keys[1] == keys[3]
    assert all(len(salt) >= 43 for salt, _ in keys)


# --- faults at every await, and every kind of bad connection

AWAITS = (
    (proxy._Proxy, "_identify"), (proxy, "read_body"), (proxy._Proxy, "_check_model"), (proxy._Proxy, "_models"), (Upstream, "ask"), (Upstream, "stream"),
    (proxy._Proxy, "_answer"), (proxy, "run_in_threadpool"), (proxy, "unless_gone"), (upstream, "_bounded"), (answers, "events"), (proxy._Proxy, "_restored"), (proxy._Proxy, "_frames"),
    (asgi.EventStream, "_send"), (fields, "deidentify"), (proxy, "_json"), (proxy._Proxy, "_allowed"), (proxy._Proxy, "_pinned"), (Upstream, "models"),
    (FakeUpstream, "handle_async_request"), (httpx.Response, "aclose"), (httpx.Response, "aiter_bytes"),
)  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("owner", "name"), AWAITS, ids=[name for _, name in AWAITS])
@pytest.mark.parametrize(
    "error", [RuntimeError(PROMPT), OSError(PROMPT), TimeoutError(PROMPT), UpstreamFailed("an answer")], ids=lambda error: type(error).__name__
)
def test_a_fault_at_any_await_fails_closed(gate, fake, monkeypatch, caplog, owner, name, stream, error):
    monkeypatch.setattr(proxy, "MAX_INLINE_BYTES", 0)
    real, calls = getattr(owner, name), []

    def fails(*args, **kwargs):
        calls.append(name)
        if name in ("_json",) and len(calls) > 1:
            return real(*args, **kwargs)  # the refusal itself is written by it
        raise error

    monkeypatch.setattr(owner, name, fails)
    try:
        answer = gate.post("chat/completions", {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "stream": stream})
        text, status = answer.text, answer.status_code
    except httpx.HTTPError:
        text, status = "", 0
    monkeypatch.undo()
    if calls and not (stream and name == "aclose"):  # a stream is closed after its end
        assert "[DONE]" not in text
        assert status != 200 or '"error"' in text or not text
    assert [secret for secret in SECRETS if secret in fake.everything() + caplog.text + (text if not stream else "")] == [] or not calls


def _raw(gate, request: bytes) -> bytes:
    host, port = gate.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        connection.shutdown(socket.SHUT_WR)
        received = b""
        while piece := connection.recv(65536):
            received += piece
    return received


@pytest.mark.parametrize(
    "header",
    [
        b"X-Forwarded-Host: evil.example", b"Connection: keep-alive, authorization", b"Proxy-Authorization: Basic QQ==", b"Cookie: a=b", b"OpenAI-Organization: org-x",
        b"X-Evil: a\r\n b", b"TE: trailers", b"Upgrade: websocket", b"Host: evil.example", b"anthropic-beta: files", b"x-api-key: other",
    ],
)  # fmt: skip
def test_no_header_of_a_caller_travels_on(gate, fake, header):
    gate.get("/v1/models")
    fake.seen.clear()
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}]}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\nauthorization: Bearer " + gate.keys[0].encode()
    head += b"\r\ncontent-type: application/json\r\ncontent-length: " + str(len(body)).encode() + b"\r\n" + header + b"\r\n\r\n"
    _raw(gate, head + body)
    for request in fake.seen:
        assert set(re.findall(r"'([a-z-]+)': ", request[: request.index("{\"model")])) <= {
            "host", "accept", "accept-encoding", "connection", "user-agent", "content-type", "content-length", "authorization",
        }  # fmt: skip
        assert "evil" not in request


def test_two_keys_are_refused_and_names_cannot_break_lines(gate, fake):
    twice = [("authorization", f"Bearer {gate.keys[0]}"), ("authorization", "Bearer x")]
    assert httpx.post(f"{gate.url}/v1/chat/completions", json={}, headers=twice).status_code == 401
    asked = {"model": "m\r\nx-evil: 1", "messages": [{"role": "user", "content": "x"}], "user": "a\r\nx-evil: 1"}
    assert gate.post("chat/completions", asked).status_code == 404
    assert gate.post("chat/completions", {**asked, "model": "m"}).status_code == 200
    assert "x-evil" not in fake.everything()


def test_a_caller_who_stops_reading_loses_the_place(monkeypatch):
    monkeypatch.setattr(asgi, "SEND_TIMEOUT_S", 0.3)
    fake = FakeUpstream(piece=50_000, cut=1 << 20, say="slow words " * 400_000)
    with serving(fake, {"max_concurrent": 1}) as gate:
        host, port = gate.url.removeprefix("http://").split(":")
        body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
        with socket.create_connection((host, int(port))) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: g\r\nauthorization: Bearer {gate.keys[0]}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            deadline = time.monotonic() + 20
            time.sleep(0.5)
            while "discreet_running 0" not in gate.get("/metrics").text:
                assert time.monotonic() < deadline
                time.sleep(0.1)


def test_an_answer_that_does_not_end_is_cut_off():
    fake = FakeUpstream(piece=50_000, cut=1 << 16, say="word " * 100_000)
    with serving(fake, limits=Limits(max_answer_bytes=100_000)) as gate:
        for stream in (False, True):
            text = gate.post("chat/completions", {"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": stream}).text
            assert "serve.upstream" in text
            assert "[DONE]" not in text


# --- settings that change, tokens, traces, the trail


def test_a_change_of_settings_holds_for_new_requests_and_leaves_running_ones_alone():
    fake = FakeUpstream(pause=0.002)
    with serving(fake) as gate:
        with (
            gate.openai() as client,
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": PROMPT}], stream=True) as stream,
        ):
            chunks = iter(stream)
            first = [next(chunks) for _ in range(2)]
            key, hashed = asgi.new_api_key()
            gate.application.change(Settings(tenants=(Tenant(name="new", key_hashes=(hashed,)),)))
            rest = list(chunks)
        text = "".join(choice.delta.content or "" for chunk in [*first, *rest] for choice in chunk.choices)
        assert text == PROMPT
        assert gate.get("/v1/models").status_code == 401
        assert httpx.get(f"{gate.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_tokens_of_a_provider_open_the_tenant_of_their_claim(tmp_path, fake):
    (tmp_path / "jwks.json").write_bytes(test_oidc.PUBLIC)
    provider = replace(test_oidc.PROVIDER, keys=str(tmp_path / "jwks.json"))
    with serving(fake, {"claim_values": frozenset(("ward",))}, {"claim_values": frozenset(("lab",))}, provider=provider) as gate:

        def status(token: str) -> int:
            return httpx.get(f"{gate.url}/v1/models", headers={"authorization": f"Bearer {token}"}).status_code

        assert status(test_oidc.token()) == 200
        assert [status(test_oidc.token(groups=groups)) for groups in (["lab"], ["ward", "lab"], ["none"], None)] == [200, 401, 401, 401]
        assert status(test_oidc.forged({"alg": "none"})) == 401
        assert status(gate.keys[0]) == 200


def test_a_provider_is_asked_before_it_is_believed_and_one_that_stays_keeps_its_keys(tmp_path, fake):
    keys, other = tmp_path / "jwks.json", tmp_path / "other.json"
    keys.write_bytes(test_oidc.PUBLIC)
    other.write_bytes(b"{}")
    provider = replace(test_oidc.PROVIDER, keys=str(keys))
    with serving(fake, {"claim_values": frozenset(("ward",))}, provider=provider) as gate:

        def status(key: str) -> int:
            return httpx.get(f"{gate.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code

        keys.unlink()
        key, hashed = asgi.new_api_key()
        changed = Settings(tenants=(Tenant(name="t0", key_hashes=(hashed,), claim_values=frozenset(("ward",))),), provider=provider)
        gate.application.change(changed)
        assert [status(given) for given in (test_oidc.token(), key, gate.keys[0])] == [200, 200, 401]
        for bad in (str(keys), str(other)):
            with pytest.raises(ConfigInvalid):
                gate.application.change(replace(changed, tenants=(), provider=replace(provider, audience="another", keys=bad)))
        assert [status(given) for given in (test_oidc.token(), key)] == [200, 200]


def test_what_changes_before_the_gateway_has_started_is_what_starts(fake):
    def behind(transport: FakeUpstream) -> Upstream:
        return Upstream(address=Address(base="http://192.0.2.1:80", host="upstream.test", authority="upstream.test"), transport=transport)

    key, hashed = asgi.new_api_key()
    settings, first = Settings(tenants=(Tenant(name="t0", key_hashes=(hashed,)),)), FakeUpstream()
    application = proxy.app(behind(first), replace(settings, tenants=()), key=Key(bytes(32)))
    application.change(settings, behind(fake))

    async def ask() -> int:
        async with application.router.lifespan_context(application):
            client = httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://gateway")
            async with client:
                return (await client.get("/v1/models", headers={"x-api-key": key})).status_code

    assert asyncio.run(ask()) == 200
    assert (len(fake.seen), first.seen) == (1, [])


def test_traces_have_attributes_of_a_closed_list_only(fake):
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    with serving(fake, tracer=provider.get_tracer("test")) as gate:
        gate.post("chat/completions", {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "user": NAME})
        gate.post("chat/completions", {"model": NAME, "messages": [{"role": "user", "content": PROMPT}], NAME: 1})
    provider.shutdown()
    spans = exporter.get_finished_spans()
    assert [dict(span.attributes) for span in spans] == [
        {"http.route": "/v1/chat/completions", "discreet.tenant": "t0", "http.response.status_code": 200, "discreet.identifiers": 3},
        {"http.route": "/v1/chat/completions", "discreet.tenant": "t0", "http.response.status_code": 404},
    ]
    assert [secret for secret in SECRETS if any(secret in span.to_json() for span in spans)] == []
    assert not any(span.events for span in spans)


def test_what_was_served_is_signed_and_verifies_offline(tmp_path, fake):
    with (
        trail.opened(tmp_path / "trail") as kept,
        serving(fake, {}, {"guard": Guard(own=OwnIdentifiers.STOP)}, trail=kept) as gate,
    ):
        ask = {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}
        for stream in (False, True):
            gate.post("chat/completions", {**ask, "stream": stream})
        fake.say = f"SSN {SSN}."
        gate.post("chat/completions", ask, which=1)
    bundle, key = trail.export(tmp_path / "trail", tmp_path / "bundle", public=False)
    entries = verify_bundle(bundle, public_key=key.read_text()).entries
    assert {entry.fields["tenant"]: (entry.fields["requests"], entry.fields["statuses"], entry.fields["stopped"]) for entry in entries} == {
        "t0": (2, {"200": 2}, {}),
        "t1": (1, {"403": 1}, {"SSN": 1}),
    }
    assert entries[0].fields["counts"] == {"EMAIL": 2, "PERSON": 2, "SSN": 2}
    held = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert [secret for secret in SECRETS if secret.encode() in held] == []


def test_what_a_policy_lets_pass_is_counted_in_the_statement(tmp_path, fake):
    with trail.opened(tmp_path / "trail") as kept, serving(fake, {"unknown": Unknown.DEIDENTIFY}, {}, trail=kept) as gate:
        ask = {"model": "m", "messages": [{"role": "user", "content": "hello", "mood": PROMPT}]}
        assert gate.post("chat/completions", ask).status_code == 200
        assert gate.post("chat/completions", ask, which=1).status_code == 400, "the other tenant's policy is the default"
        [asked] = [each for each in fake.seen if "mood" in each]
        assert not [secret for secret in SECRETS if secret in asked]
    bundle, key = trail.export(tmp_path / "trail", tmp_path / "bundle", public=False)
    said = {entry.fields["tenant"]: entry.fields.get("passed") for entry in verify_bundle(bundle, public_key=key.read_text()).entries}
    assert said == {"t0": {"field": 1}}


def test_a_trail_that_cannot_be_written_refuses_requests(tmp_path, fake, monkeypatch):
    with trail.opened(tmp_path / "trail") as kept, serving(fake, trail=kept) as gate:
        ask = {"model": "m", "messages": [{"role": "user", "content": PROMPT}]}
        monkeypatch.setattr(trail, "BATCH", 1)
        real = kept._log.append_all
        monkeypatch.setattr(kept._log, "append_all", lambda *_: (_ for _ in ()).throw(OSError(PROMPT)))
        assert gate.post("chat/completions", ask).status_code == 200
        deadline = time.monotonic() + 10
        while (refused := gate.post("chat/completions", ask)).status_code == 200:
            assert time.monotonic() < deadline
        assert "trail" in refused.text
        monkeypatch.setattr(kept._log, "append_all", real)
        kept.write()
        assert gate.post("chat/completions", ask).status_code == 200


def test_the_openapi_document_lists_every_route_and_no_other_field(gate):
    document = gate.get("/openapi.json").json()
    assert set(document["paths"]) == {"/v1/models", "/healthz", "/readyz", *(each.path for each in proxy.WIRES)}
    for wired in proxy.WIRES:
        schema = document["paths"][wired.path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        assert set(schema["properties"]) == set(wired.table)
        assert schema["additionalProperties"] is False


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
def test_a_server_that_gives_no_index_and_no_reason_is_understood(gate, fake, monkeypatch, path):
    def bare(body, _size):
        text = body["prompt"] if "prompt" in body else _said(body["messages"][-1]["content"])
        chunk = (lambda piece: {"text": piece}) if "prompt" in body else (lambda piece: {"delta": {"content": piece}})
        return {}, [*({"choices": [chunk(piece)]} for piece in text), "[DONE]"]

    monkeypatch.setitem(globals(), "_chat", bare)
    monkeypatch.setitem(globals(), "_completion", bare)
    asked = {"prompt": f"Call {NAME}"} if path == "completions" else {"messages": [{"role": "user", "content": f"Call {NAME}"}]}
    text = gate.post(path, {"model": "m", "stream": True, **asked}).text
    events = [json.loads(line[6:])["choices"][0] for line in text.splitlines() if line.startswith("data: {")]
    assert "".join(event.get("text") or event["delta"]["content"] for event in events if event.get("text") or event.get("delta")) == f"Call {NAME}"
    assert text.rstrip().endswith("[DONE]")


def test_prompts_are_offered_to_a_learner_and_its_failure_ends_the_request(fake):
    class Offered:
        taken: list = []

        def offer(self, person, texts):
            self.taken.append((person, texts))
            if person == "full":
                raise OSError(PROMPT)

    with serving(fake, learner=Offered()) as gate:
        asked = {"model": "m", "messages": [{"role": "user", "content": PROMPT}], "user": "ann"}
        assert gate.post("chat/completions", asked).status_code == 200
        fake.seen.clear()
        refused = gate.post("chat/completions", {**asked, "user": "full"})
    assert refused.status_code == 500
    assert [secret for secret in SECRETS if secret in refused.text] == []
    assert not any("POST" in request for request in fake.seen)
    assert Offered.taken == [("ann", [PROMPT]), ("full", [PROMPT])]
