"""A model in this process on four wires, with the official clients; its adapter changed while it serves."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import anthropic
import httpx
import openai
import pytest

from discreet.errors import NotFound, NotReleased, OperationFailed, RequestInvalid
from discreet.record import Digest
from discreet.serve import asgi, local
from discreet.serve.engine import Sampling
from discreet.serve.local import ADAPTER_HEADER, Local
from discreet.serve.tenants import Tenant
from discreet.serve.upstream import CHAT, COMPLETIONS, EMBEDDINGS, MESSAGES, RESPONSES

from .test_gateway import ADAPTER, EMAIL, MODEL, NAME, PROMPT, SECRETS, EchoEngine, Served, ask, content, serving, streamed

OTHER = Digest("sha256:" + "ef" * 32)


@pytest.fixture(scope="module")
def echo() -> EchoEngine:
    return EchoEngine()


@pytest.fixture(scope="module")
def served(echo):
    with serving(echo) as running:
        yield running


def anthropics(served: Served) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=served.url, api_key=served.api_key, max_retries=0, timeout=20)


def unseen(engine: EchoEngine) -> None:
    assert engine.seen
    assert not [secret for secret in SECRETS if secret in engine.everything()]


# --- the official clients


def test_completions(served, echo):
    with served.client() as client:
        answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=500)
        chunks = list(client.completions.create(model=MODEL, prompt=PROMPT, stream=True, stream_options={"include_usage": True}))
    assert answer.choices[0].text == PROMPT == "".join(choice.text for chunk in chunks for choice in chunk.choices)
    assert answer.system_fingerprint == ADAPTER
    assert chunks[-1].usage.total_tokens > 7
    unseen(echo)


def test_responses(served, echo):
    with served.client() as client:
        answer = client.responses.create(model=MODEL, instructions=f"You help {NAME}.", input=[{"role": "user", "content": PROMPT}])
        events = list(client.responses.create(model=MODEL, input=PROMPT, stream=True))
    assert answer.output_text == PROMPT
    assert (answer.status, answer.usage.input_tokens) == ("completed", 7)
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == PROMPT
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == PROMPT
    assert [event.sequence_number for event in events] == list(range(len(events)))
    unseen(echo)


def test_messages(served, echo):
    with anthropics(served) as client:
        turns = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}, {"role": "assistant", "content": "Yes?"}]
        turns.append({"role": "user", "content": PROMPT})
        raw = client.messages.with_raw_response.create(model=MODEL, max_tokens=500, system=f"You help {NAME}.", messages=turns)
        with client.messages.stream(model=MODEL, max_tokens=500, messages=turns) as stream:
            assert "".join(stream.text_stream) == PROMPT
            assert stream.get_final_message().stop_reason == "end_turn"
        stopped = client.messages.create(model=MODEL, max_tokens=500, messages=turns, stop_sequences=[EMAIL])
    answer = raw.parse()
    assert answer.content[0].text == PROMPT
    assert (answer.usage.input_tokens, raw.headers[ADAPTER_HEADER]) == (7, ADAPTER)
    assert [turn.role for turn in echo.seen[-3][0]] == ["system", "user", "assistant", "user"]
    assert stopped.content[0].text == PROMPT[: PROMPT.index(EMAIL)]
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", EMAIL)
    unseen(echo)


def test_an_answer_that_was_cut_says_so_on_every_wire(local_engine):
    with serving(local_engine) as running, running.client() as client, anthropics(running) as other:
        assert ask(client, "Hello", max_tokens=3, temperature=0).choices[0].finish_reason == "length"
        assert client.completions.create(model=MODEL, prompt="Hello", max_tokens=3, temperature=0).choices[0].finish_reason == "length"
        found = client.responses.create(model=MODEL, input="Hello", max_output_tokens=3, temperature=0)
        assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        events = list(client.responses.create(model=MODEL, input="Hello", max_output_tokens=3, temperature=0, stream=True))
        assert events[-1].type == "response.incomplete"
        assert (
            other.messages.create(
                model=MODEL, max_tokens=3, messages=[{"role": "user", "content": "Hello"}], extra_body={"temperature": 0}
            ).stop_reason
            == "max_tokens"
        )


def test_a_bare_prompt_is_continued_as_it_stands(local_engine, tiny_llama, tokenizer):
    prompt = "The cough"

    async def one() -> str:
        server = Local(local_engine, name=MODEL, adapter=ADAPTER)
        answer = await server.ask(COMPLETIONS, {"prompt": prompt, "temperature": 0, "max_tokens": 6})
        return str(answer["choices"][0]["text"])

    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    expected = tiny_llama.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=[256, 257], pad_token_id=0)[0, ids.shape[1] :]
    assert asyncio.run(one()) == tokenizer.decode([token for token in expected if token < 256])


# --- default deny


MESSAGE = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (CHAT, {"messages": MESSAGE, "n": 2}, "n"),
        (CHAT, {"messages": MESSAGE, "tools": [{}]}, "tools"),
        (CHAT, {"messages": MESSAGE, "frequency_penalty": 1}, "frequency_penalty"),
        (CHAT, {"messages": MESSAGE, "response_format": {"type": "json_object"}}, "response_format"),
        (CHAT, {"messages": MESSAGE, "input": "x"}, "input"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        (CHAT, {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "x"}]}]}, "messages.0.content"),
        (CHAT, {"messages": MESSAGE, "max_tokens": 0}, "max_tokens"),
        (CHAT, {"messages": MESSAGE, "max_tokens": 1.5}, "max_tokens"),
        (CHAT, {"messages": MESSAGE, "temperature": 3}, "temperature"),
        (CHAT, {"messages": MESSAGE, "seed": 0.5}, "seed"),
        (CHAT, {"messages": MESSAGE, "stop": ["x"] * 17}, "stop"),
        (CHAT, {"messages": MESSAGE, "stop": "x" * 257}, "stop"),
        (MESSAGES, {"messages": MESSAGE, "stop_sequences": ["x" * 257]}, "stop_sequences"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
        (COMPLETIONS, {"prompt": "a", "suffix": "b"}, "suffix"),
        (RESPONSES, {"input": [{"type": "function_call_output", "output": "x"}]}, "input"),
        (RESPONSES, {"input": "x", "store": True}, "store"),
        (MESSAGES, {"messages": MESSAGE, "top_k": 3}, "top_k"),
        (MESSAGES, {"messages": MESSAGE, "tools": [{}]}, "tools"),
    ],
)
def test_what_the_model_cannot_do_is_refused_by_name(path, body, field):
    engine = EchoEngine()
    with pytest.raises(RequestInvalid) as caught:
        asyncio.run(Local(engine, name=MODEL, adapter=ADAPTER).ask(path, body))
    assert caught.value.value == field
    assert engine.seen == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, {"messages": [None]}),
        (CHAT, {"messages": [{"role": "user", "content": [None]}]}),
        (CHAT, {"messages": MESSAGE, "stop": [None]}),
        (COMPLETIONS, {"prompt": [None]}),
        (RESPONSES, {"input": [None]}),
        (RESPONSES, {"input": [{"role": "user", "content": [None]}]}),
        (MESSAGES, {"messages": [None], "max_tokens": 9}),
        (MESSAGES, {"messages": [{"role": "user", "content": [None]}], "max_tokens": 9}),
        (MESSAGES, {"messages": MESSAGE, "system": [None], "max_tokens": 9}),
        (MESSAGES, {"messages": MESSAGE, "stop_sequences": [None], "max_tokens": 9}),
    ],
)
def test_null_in_a_list_is_refused_on_every_wire(served, echo, path, body):
    before = len(echo.seen)
    answer = httpx.post(f"{served.url}{path}", json={"model": MODEL, **body}, headers={"x-api-key": served.api_key}, timeout=20)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request.invalid")
    assert len(echo.seen) == before


def test_what_asks_for_nothing_is_let_through(echo):
    body = {"n": 1, "presence_penalty": 0, "tools": [], "logprobs": False, "store": False, "response_format": {"type": "text"}, "user": "u-1"}
    answer = asyncio.run(Local(echo, name=MODEL, adapter=ADAPTER).ask(CHAT, {"messages": MESSAGE, "stop": None, **body}))
    assert answer["choices"][0]["message"]["content"] == "x"


def test_a_route_that_the_model_does_not_have(served):
    with pytest.raises(NotFound):
        asyncio.run(Local(EchoEngine(), name=MODEL, adapter=ADAPTER).ask(EMBEDDINGS, {"input": "x"}))
    with served.client() as client, pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=MODEL, input="x")


def test_a_longer_answer_than_the_operator_allows_is_cut():
    engine = EchoEngine()
    server = Local(engine, name=MODEL, adapter=ADAPTER, defaults=Sampling(temperature=0.5, top_p=0.8, max_new_tokens=7))
    asyncio.run(server.ask(CHAT, {"messages": MESSAGE, "max_tokens": 100}))
    asyncio.run(server.ask(CHAT, {"messages": MESSAGE, "max_completion_tokens": 3, "temperature": 0}))
    assert [sampling.max_new_tokens for _, sampling in engine.seen] == [7, 3]
    assert [(sampling.temperature, sampling.top_p) for _, sampling in engine.seen] == [(0.5, 0.8), (0, 0.8)]


# --- another adapter while it serves


def test_another_adapter_serves_new_requests_and_running_ones_end_on_their_own():
    old, new = EchoEngine(cut=1, pause=0.02), EchoEngine()
    with serving(old) as running, running.client() as client, ThreadPoolExecutor(1) as pool:
        chunks = pool.submit(streamed, client, PROMPT)
        while not old.seen:
            time.sleep(0.01)
        running.application.change(running.settings, Local(new, name=MODEL, adapter=OTHER))
        answer = client.chat.completions.with_raw_response.create(model=MODEL, messages=[{"role": "user", "content": PROMPT}])
        assert (answer.headers[ADAPTER_HEADER], answer.parse().system_fingerprint) == (OTHER, OTHER)
        assert not old.ended.is_set(), "somebody is served by it still"
        assert not chunks.done()
        assert content(chunks.result()) == PROMPT
        assert {chunk.system_fingerprint for chunk in chunks.result()} == {ADAPTER}
        assert old.ended.wait(5), "it is closed after its last answer"
        assert not new.ended.is_set()
    assert new.ended.is_set()
    assert [group.server for group, _ in running.counted] == [OTHER, ADAPTER]


def test_an_adapter_that_nobody_is_served_by_is_closed_at_once():
    old, new = EchoEngine(), EchoEngine()
    with serving(old) as running:
        running.application.change(running.settings, Local(new, name="another", adapter=OTHER))
        assert old.ended.is_set()
        listed = httpx.get(f"{running.url}/v1/models", headers={"authorization": f"Bearer {running.api_key}"}).json()
    assert [each["id"] for each in listed["data"]] == ["another"]


def test_many_callers_while_adapters_change():
    """Every answer is whole, and of the adapter that it names."""
    first = EchoEngine(cut=4)
    adapters = [Digest("sha256:" + f"{number:02x}" * 32) for number in range(5)]
    answers: list[tuple[str, str]] = []
    with serving(first) as running, running.client() as client:

        def call(number: int) -> None:
            for _ in range(6):
                raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=[{"role": "user", "content": f"{number} {PROMPT}"}])
                answers.append((raw.headers[ADAPTER_HEADER], raw.parse().system_fingerprint))
                assert raw.parse().choices[0].message.content == f"{number} {PROMPT}"

        callers = [threading.Thread(target=call, args=(number,)) for number in range(4)]
        for caller in callers:
            caller.start()
        engines = [EchoEngine(cut=4) for _ in adapters]
        for engine, adapter in zip(engines, adapters, strict=True):
            running.application.change(running.settings, Local(engine, name=MODEL, adapter=adapter))
            time.sleep(0.05)
        for caller in callers:
            caller.join(30)
    assert len(answers) == 24
    assert all(header == fingerprint for header, fingerprint in answers)
    assert all(engine.ended.is_set() for engine in (first, *engines))


def test_a_release_that_was_withdrawn_is_served_no_more_and_one_that_follows_is():
    old, new = EchoEngine(), EchoEngine()
    key, hashed = asgi.new_api_key()
    with serving(old) as running:
        running.application.change(replace(running.settings, tenants=(Tenant(name="new", key_hashes=(hashed,)),)))
        running.application.refuse(NotReleased("a model whose parents are known", remedy="It was withdrawn."))
        assert old.ended.is_set()
        assert running.post({"model": MODEL, "messages": MESSAGE}).status_code == 401
        for stream in (False, True):
            refused = running.post({"model": MODEL, "messages": MESSAGE, "stream": stream}, authorization=f"Bearer {key}")
            assert (refused.status_code, refused.json()["error"]["code"]) == (403, "release.withheld")
        assert httpx.get(f"{running.url}/readyz").status_code == 403
        assert httpx.get(f"{running.url}/v1/models", headers={"x-api-key": key}).status_code == 403
        running.application.change(server=Local(new, name=MODEL, adapter=OTHER))
        assert running.post({"model": MODEL, "messages": MESSAGE}, authorization=f"Bearer {key}").status_code == 200
    assert old.seen == []


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, RESPONSES, MESSAGES])
@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_is_an_error_on_every_wire_without_its_words(path, stream):
    text = {CHAT: {"messages": [{"role": "user", "content": PROMPT}]}, COMPLETIONS: {"prompt": PROMPT}, RESPONSES: {"input": PROMPT}}
    body = {"model": MODEL, "stream": stream, **text.get(path, {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 99})}
    with serving(EchoEngine(fail_after=3)) as running:
        answer = httpx.post(f"{running.url}{path}", json=body, headers={"x-api-key": running.api_key}, timeout=20)
    assert "RuntimeError" in answer.text
    assert answer.status_code == (200 if stream else 500)
    assert not [secret for secret in SECRETS if secret in answer.text]
    assert not stream or json.loads(answer.text.rstrip().rpartition("data: ")[2])
    assert local.frame("[DONE]") not in answer.text


AWAITS = (
    (Local, "ask"),
    (Local, "stream"),
    (Local, "_pieces"),
    (Local, "_read"),
    (Local, "models"),
    (local, "_with_first"),
    (local, "_bytes"),
    (EchoEngine, "generate"),
)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("owner", "name"), AWAITS, ids=[name for _, name in AWAITS])
def test_a_fault_at_any_await_fails_closed(monkeypatch, caplog, owner, name, stream):
    calls = []

    def fails(*_args, **_kwargs):
        calls.append(name)
        raise RuntimeError(PROMPT)

    engine = EchoEngine()
    with serving(engine) as running:
        monkeypatch.setattr(owner, name, fails)
        answer = running.post({"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], "stream": stream})
    assert bool(calls) == (name not in (("ask",) if stream else ("stream", "_with_first", "_bytes")))
    if calls:
        assert '"error"' in answer.text
        assert "[DONE]" not in answer.text
        assert not [secret for secret in SECRETS if secret in answer.text + caplog.text + engine.everything()]


def test_a_server_that_cannot_be_opened_changes_nothing(monkeypatch):
    old, new = EchoEngine(), Local(EchoEngine(), name=MODEL, adapter=OTHER)

    async def fails():
        raise OperationFailed("a model that opens")

    monkeypatch.setattr(new, "open", fails)
    with serving(old) as running, running.client() as client:
        with pytest.raises(OperationFailed):
            running.application.change(running.settings, new)
        assert ask(client).system_fingerprint == ADAPTER
        assert not old.ended.is_set()
