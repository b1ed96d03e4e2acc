"""A model in this process behind the gateway, over real connections, with OpenAI's own client: what enters, what leaves, what is never said, and that only a release is served."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import httpx
import openai
import pytest
import torch

from discreet import model
from discreet.config import DeidSection, ModelSection
from discreet.deid.policy import Channel, Policy, configured
from discreet.errors import DigestMismatch, EvidenceInvalid, ModelUnsafe, NotReleased, OperationFailed, OutOfTime, Overloaded
from discreet.evidence.log import Log
from discreet.evidence.statement import Predicate, Statement
from discreet.keys import Key, Keyring
from discreet.record import Digest, Release
from discreet.serve import asgi, filters, gateway, local, proxy
from discreet.serve.engine import LocalEngine, Piece, Sampling, Turn
from discreet.serve.local import ADAPTER_HEADER, Local
from discreet.serve.tenants import Limits, Settings, Tenant
from discreet.serve.trail import Group
from discreet.store import Store

ADAPTER = Digest("sha256:" + "ab" * 32)
MODEL = "note-assistant"
NAME, EMAIL, SSN = "Aurelia Quistgaard", "aurelia.quistgaard@example.org", "536-22-8145"
PROMPT = f"Patient {NAME} can be reached at {EMAIL}, SSN {SSN}. Summarise."
SECRETS = ("Aurelia", "Quistgaard", "aurelia.quistgaard", "536-22-8145")


@dataclass
class EchoEngine:
    """Says what it saw, cut into pieces of a few characters; keeps what it saw."""

    cut: int = 2
    seen: list[tuple[tuple[Turn, ...], Sampling]] = field(default_factory=list)
    fail_after: int | None = None
    pause: float = 0.0
    closed: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    async def generate(self, prompt: Sequence[Turn] | str, sampling: Sampling):
        turns = (Turn(role="user", text=prompt),) if isinstance(prompt, str) else tuple(prompt)
        self.seen.append((turns, sampling))
        text = turns[-1].text
        pieces = [text[at : at + self.cut] for at in range(0, len(text), self.cut)]
        try:
            for count, piece in enumerate(pieces):
                if count == self.fail_after:
                    raise RuntimeError(text)
                await asyncio.sleep(self.pause)
                yield Piece(text=piece, prompt_tokens=7, completion_tokens=count + 1)
            yield Piece(text="", prompt_tokens=7, completion_tokens=len(pieces), finish_reason="stop")
        finally:
            self.closed.set()

    def close(self) -> None:
        self.ended.set()

    def everything(self) -> str:
        return repr([[(turn.role, turn.text) for turn in turns] + [repr(sampling)] for turns, sampling in self.seen])


@dataclass
class Kept:
    """In place of the trail."""

    broken: bool = False
    counted: list[tuple[Group, dict[str, object]]] = field(default_factory=list)

    def refuse_if_broken(self) -> None:
        if self.broken:
            raise OperationFailed("a database that answers")

    def count(self, group: Group, **what: object) -> bool:
        self.counted.append((group, what))
        return False

    async def keep_writing(self) -> None:
        """Writes nothing."""


@dataclass
class Served:
    url: str
    api_key: str
    kept: Kept
    application: proxy.Gateway
    settings: Settings

    @property
    def counted(self) -> list[tuple[Group, dict[str, object]]]:
        """What was answered."""
        return [(group, what) for group, what in self.kept.counted if what["status"] == 200]

    def client(self, **options: object) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.api_key, max_retries=0, timeout=20, **options)

    def post(self, body: object, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = {"authorization": f"Bearer {self.api_key}", "content-type": "application/json", **headers}
        return httpx.post(f"{self.url}/v1/chat/completions", content=content, headers=sent, timeout=20)


@contextlib.contextmanager
def serving(engine, *, limits: Limits | None = None, broken: bool = False, policy: Policy = filters.POLICY) -> Iterator[Served]:
    api_key, api_key_hash = asgi.new_api_key()
    settings = Settings(tenants=(Tenant(name="default", key_hashes=(api_key_hash,), policy=policy),), limits=limits or Limits())
    server, kept = Local(engine, name=MODEL, adapter=ADAPTER), Kept(broken=broken)
    application = proxy.app(server, settings, key=Key(bytes(32)), trail=kept)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        running = asgi.server(application, host="127.0.0.1", port=0)
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            while not running.started:
                time.sleep(0.01)
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            yield Served(url=url, api_key=api_key, kept=kept, application=application, settings=settings)
        finally:
            running.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture
def echo() -> EchoEngine:
    return EchoEngine()


@pytest.fixture
def served(echo):
    with serving(echo) as running:
        yield running


def ask(client: openai.OpenAI, text: str = PROMPT, **options):
    return client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}], **options)


def streamed(client: openai.OpenAI, text: str = PROMPT, **options) -> list:
    with ask(client, text, stream=True, **options) as stream:
        return list(stream)


def content(chunks: list) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


# --- what enters and what leaves


def test_identifiers_never_reach_the_engine_and_are_restored(served, echo):
    with served.client() as client:
        answer = ask(client)
    assert answer.choices[0].message.content == PROMPT
    assert answer.choices[0].finish_reason == "stop"
    assert not [secret for secret in SECRETS if secret in echo.everything()]
    assert "Summarise" in echo.everything()


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 1000])
def test_streaming_restores_whatever_the_cut(cut):
    engine = EchoEngine(cut=cut)
    with serving(engine) as running, running.client() as client:
        chunks = streamed(client)
    assert content(chunks) == PROMPT
    assert not [secret for secret in SECRETS if secret in engine.everything()]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_streamed_answer_arrives_while_it_is_made():
    engine = EchoEngine(cut=1, pause=0.002)
    with serving(engine) as running, running.client() as client, ask(client, "a plain question without any names in it", stream=True) as stream:
        first = next(chunk for chunk in stream if chunk.choices[0].delta.content)
        assert first.choices[0].delta.content
        assert not engine.closed.is_set()


def test_every_message_is_deidentified_and_one_value_has_one_placeholder(served, echo):
    with served.client() as client:
        client.chat.completions.create(
            model=MODEL,
            messages=[
                {"role": "system", "content": f"You help {NAME}."},
                {"role": "user", "content": [{"type": "text", "text": f"My e-mail is {EMAIL}"}]},
                {"role": "assistant", "content": f"Noted: {EMAIL}"},
                {"role": "developer", "content": f"SSN {SSN}"},
                {"role": "user", "content": f"Write to {EMAIL}"},
            ],
        )
    assert not [secret for secret in SECRETS if secret in echo.everything()]
    turns = echo.seen[0][0]
    assert [turn.role for turn in turns] == ["system", "user", "assistant", "system", "user"]
    placeholder = turns[1].text.removeprefix("My e-mail is ")
    assert placeholder != EMAIL
    assert turns[2].text == f"Noted: {placeholder}"
    assert turns[4].text == f"Write to {placeholder}"


def test_what_a_project_says_of_prompts_holds_in_its_gateway(echo):
    """`[deid.operators.prompt]`: a stand-in is one person's in all messages, and what has no placeholder does not come back."""
    section = DeidSection(operators={"prompt": {"any": {"PERSON": "surrogate", "EMAIL": "label", "SSN": "redact"}}})
    with serving(echo, policy=configured(section, Channel.PROMPT)) as running, running.client() as client:
        messages = [{"role": "user", "content": f"Patient: {NAME}"}, {"role": "user", "content": PROMPT}]
        answer = client.chat.completions.create(model=MODEL, messages=messages).choices[0].message.content
    first, second = (turn.text for turn in echo.seen[0][0])
    stand_in = first.removeprefix("Patient: ")
    assert stand_in != NAME
    assert second == f"Patient {stand_in} can be reached at [EMAIL], SSN [REDACTED]. Summarise." == answer


def test_the_stop_strings_and_the_user_do_not_reach_the_engine(served, echo):
    with served.client() as client:
        answer = ask(client, f"Before {NAME} after", stop=[NAME], user=NAME)
    assert answer.choices[0].message.content == "Before "
    assert answer.choices[0].finish_reason == "stop"
    assert "Quistgaard" not in echo.everything()


def test_a_placeholder_of_another_request_is_not_restored(served, echo):
    with served.client() as client:
        ask(client)
        placeholders = [word for word in echo.seen[0][0][-1].text.split() if word not in PROMPT]
        text = " and ".join(placeholders)
        assert ask(client, text).choices[0].message.content == text


def test_served_requests_are_counted_by_label(served):
    with served.client() as client:
        ask(client)
    group, what = served.counted[0]
    assert (group.server, group.released, group.model, group.tenant) == (ADAPTER, True, MODEL, "default")
    assert group.policy.startswith("sha256:")
    assert what["counts"]["EMAIL"] == 1
    assert sum(what["counts"].values()) >= 3
    assert len(served.counted) == 1


def test_the_adapter_is_named_in_every_answer(served):
    with served.client() as client:
        raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=[{"role": "user", "content": "x"}])
        assert raw.headers[ADAPTER_HEADER] == ADAPTER
        assert raw.parse().system_fingerprint == ADAPTER
        assert {chunk.system_fingerprint for chunk in streamed(client, "x")} == {ADAPTER}


def test_usage(served):
    with served.client() as client:
        assert ask(client).usage.total_tokens == ask(client).usage.prompt_tokens + ask(client).usage.completion_tokens
        chunks = streamed(client, "abcd", stream_options={"include_usage": True})
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 2
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_sampling_parameters_reach_the_engine(served, echo):
    with served.client() as client:
        ask(client, "x", temperature=0.7, top_p=0.4, max_completion_tokens=5, seed=11)
        ask(client, "x", max_tokens=10**6)
    assert echo.seen[0][1] == Sampling(temperature=0.7, top_p=0.4, max_new_tokens=5, seed=11)
    assert echo.seen[1][1].max_new_tokens == local.DEFAULTS.max_new_tokens


def test_a_real_model_answers(local_engine):
    with serving(local_engine) as running, running.client() as client:
        whole = ask(client, "Hello", temperature=0, max_tokens=12)
        chunks = streamed(client, "Hello", temperature=0, max_tokens=12, stream_options={"include_usage": True})
        seeded = [ask(client, "Hello", temperature=1.5, seed=3, max_tokens=12).choices[0].message.content for _ in range(2)]
    assert content(chunks) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert whole.choices[0].finish_reason == "length"
    assert seeded[0] == seeded[1]


def test_models_and_health(served):
    with served.client() as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        assert client.models.retrieve(MODEL).id == MODEL
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("another")
    assert httpx.get(f"{served.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{served.url}/readyz").status_code == 200
    assert httpx.get(f"{served.url}/openapi.json").json()["paths"].keys() >= {"/v1/messages"}
    assert "/v1/embeddings" not in httpx.get(f"{served.url}/openapi.json").json()["paths"]


# --- refusals


@pytest.mark.parametrize("api_key", ["wrong", "dk-", "é"])
def test_a_wrong_key_is_401_before_the_body_is_read(served, echo, api_key):
    headers = {"authorization": f"Bearer {api_key}".encode(), "content-type": "application/json"}
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=b"not json", headers=headers)
    assert answer.status_code == 401
    assert answer.json()["error"]["type"] == "authentication_error"
    assert echo.seen == []


def test_the_openai_client_reads_our_errors(served):
    with served.client() as client:
        with pytest.raises(openai.AuthenticationError):
            ask(client.copy(api_key="wrong"))
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, logprobs=True)
        assert caught.value.param == "logprobs"
        assert caught.value.code == "request.invalid"
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="another", messages=[{"role": "user", "content": "x"}])


def test_no_key_and_two_keys_are_401(served):
    assert httpx.get(f"{served.url}/v1/models").status_code == 401
    twice = [("authorization", f"Bearer {served.api_key}")] * 2
    assert httpx.get(f"{served.url}/v1/models", headers=twice).status_code == 401
    assert httpx.get(f"{served.url}/v1/models", headers={"authorization": f"Basic {served.api_key}"}).status_code == 401


def test_only_the_hash_of_the_key_is_kept():
    api_key, stored = asgi.new_api_key()
    assert stored == asgi.hash_api_key(api_key)
    assert len(api_key) >= 43
    assert api_key not in stored
    assert asgi.new_api_key()[0] != api_key


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"logprobs": True},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"presence_penalty": 0.5},
        {"response_format": {"type": "json_object"}},
        {"store": True},
        {"messages": [{"role": "tool", "content": PROMPT, "tool_call_id": "x"}]},
        {"max_tokens": 1.5},
        {"images": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    ],
)
def test_what_the_gateway_does_not_do_is_400(served, echo, fields):
    answer = served.post({"model": MODEL, "messages": [{"role": "user", "content": PROMPT}], **fields})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"].startswith(next(iter(fields)))
    assert echo.seen == []


def test_transport_tricks_are_400(served, echo):
    body = {"model": MODEL, "messages": [{"role": "user", "content": "x"}]}
    assert served.post(body, **{"content-encoding": "gzip"}).status_code == 400
    assert served.post(body, **{"content-type": "text/plain"}).status_code == 400
    assert served.post(b'{"model":"a","model":"b"}').status_code == 400
    assert echo.seen == []


def test_a_body_above_the_cap_is_400(echo):
    with serving(echo, limits=Limits(max_request_bytes=1000)) as running:
        answer = running.post({"model": MODEL, "messages": [{"role": "user", "content": "x" * 1000}]})
    assert answer.status_code == 400
    assert "1000 bytes" in answer.json()["error"]["message"]


def test_a_conversation_above_the_cap_is_400_before_it_is_read(echo, monkeypatch):
    with serving(echo, limits=Limits(max_chars=100)) as running:
        monkeypatch.setattr(filters.Conversation, "learn", _raise)
        answer = running.post({"model": MODEL, "messages": [{"role": "user", "content": "x" * 60}] * 2})
    assert answer.status_code == 400
    assert "100 characters" in answer.json()["error"]["message"]


def test_unknown_paths_and_methods_are_404_in_the_same_shape(served):
    for answer in (httpx.get(f"{served.url}/v1/{NAME}"), httpx.delete(f"{served.url}/v1/models")):
        assert answer.status_code in (404, 405)
        assert set(answer.json()["error"]) == {"message", "type", "code", "param"}
        assert NAME not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_429(served, echo, monkeypatch, stream):
    async def full(turns, sampling):
        raise Overloaded("a free place")
        yield

    monkeypatch.setattr(echo, "generate", full)
    with served.client() as client, pytest.raises(openai.RateLimitError):
        ask(client, stream=stream)
    assert served.counted == []


# --- fail closed


def _raise(*_args, **_kwargs):
    raise RuntimeError(PROMPT)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("broken", ["learn", "text"])
def test_a_filter_that_fails_at_the_start_is_an_error(served, echo, monkeypatch, broken, stream):
    monkeypatch.setattr(filters.Conversation, broken, _raise)
    with served.client() as client, pytest.raises(openai.InternalServerError) as caught:
        ask(client, stream=stream)
    assert not [secret for secret in SECRETS if secret in str(caught.value) + caught.value.response.text]
    assert echo.seen == []
    assert served.counted == []


@pytest.mark.parametrize("broken", ["feed", "close"])
def test_a_filter_that_fails_within_the_answer_ends_it(served, monkeypatch, broken):
    original, calls = getattr(filters.LeakStop, broken), []

    def fails_later(self, *args):
        calls.append(1)
        return original(self, *args) if broken == "feed" and len(calls) < 5 else _raise()

    monkeypatch.setattr(filters.LeakStop, broken, fails_later)
    with served.client() as client:
        with pytest.raises(openai.InternalServerError) as whole:
            ask(client)
        calls.clear()
        got = []
        with pytest.raises(openai.APIError) as stream, ask(client, stream=True) as chunks:
            got.extend(chunks)
    assert not [secret for secret in SECRETS if secret in str(whole.value) + str(stream.value) + repr(stream.value.body)]
    assert all(chunk.choices[0].finish_reason is None for chunk in got)


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_fails_is_an_error_without_its_words(stream):
    with serving(EchoEngine(fail_after=4)) as running, running.client() as client:
        with pytest.raises(openai.APIError) as caught:
            streamed(client) if stream else ask(client)
        assert "RuntimeError" in str(caught.value)
        assert not [secret for secret in SECRETS if secret in str(caught.value) + repr(caught.value.body)]


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_that_never_finishes_is_an_error(served, echo, monkeypatch, stream):
    async def endless(turns, sampling):
        yield Piece(text="a", prompt_tokens=1, completion_tokens=1)

    monkeypatch.setattr(echo, "generate", endless)
    with served.client() as client, pytest.raises(openai.APIError):
        streamed(client) if stream else ask(client)


def test_an_answer_out_of_time_is_an_error():
    engine = EchoEngine(cut=1, pause=0.2)
    with serving(engine, limits=Limits(max_seconds=0.3)) as running:
        client = running.client()
        with pytest.raises(openai.InternalServerError, match="within") as late:
            ask(client)
        assert (late.value.status_code, late.value.code) == (504, OutOfTime.code)
        began = time.monotonic()
        with pytest.raises(openai.APIError, match="within"):
            streamed(client)
        assert time.monotonic() - began < 3
    assert [what["status"] for _, what in running.kept.counted] == [504, 504]


def test_an_answer_is_a_success_only_when_it_was_sent_to_its_end():
    engine = EchoEngine(cut=1, pause=0.02)
    with serving(engine) as running, running.client() as client:
        with ask(client, stream=True) as stream:
            next(iter(stream))
        assert engine.closed.wait(5)
        streamed(client, "x")
    assert [what["status"] for _, what in running.kept.counted] == [499, 200]


def test_nothing_is_served_uncounted(echo):
    with serving(echo, broken=True) as running, running.client() as client, pytest.raises(openai.InternalServerError) as caught:
        ask(client)
    assert PROMPT not in caught.value.response.text
    assert echo.seen == []


# --- the caller goes away


@pytest.mark.parametrize("stream", [False, True])
def test_generation_stops_when_the_caller_goes_away(stream):
    engine = EchoEngine(cut=1, pause=0.02)
    with serving(engine) as running:
        with running.client() as client:
            if stream:
                with ask(client, "word " * 500, stream=True) as chunks:
                    next(iter(chunks))
            else:
                with pytest.raises(openai.APITimeoutError):
                    ask(client.with_options(timeout=0.2), "word " * 500)
        assert engine.closed.wait(5), "2,500 pieces would take 50 s"


# --- leaks


@pytest.mark.parametrize("stream", [False, True])
def test_no_sink_holds_a_word_of_prompt_or_answer(caplog, capfd, monkeypatch, tmp_path, stream):
    """Plants secrets in every part of a request, breaks every stage in turn, and searches all that was written."""
    caplog.set_level(logging.DEBUG, logger="discreet")
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=name)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    said: list[str] = []
    engine = EchoEngine()
    with serving(engine) as running, running.client() as client:
        requests = [
            {"messages": [{"role": "user", "content": PROMPT}]},
            {"messages": [{"role": "user", "content": PROMPT}], "modalities": [PROMPT]},
            {"messages": [{"role": "user", "content": PROMPT}], "presence_penalty": 1},
            {"messages": [{"role": PROMPT, "content": PROMPT}]},
            {"messages": [{"role": "user", "content": [{"type": PROMPT, "text": PROMPT}]}]},
            {"messages": PROMPT, "stop": 7},
            {NAME: PROMPT, "messages": []},
        ]
        for fields in requests:
            answer = running.post({"model": MODEL, "stream": stream, **fields})
            if answer.status_code != 200:
                said.append(answer.text + repr(answer.headers))
        said += [running.post({"model": PROMPT, "messages": [{"role": "user", "content": "x"}]}).text, running.post(PROMPT.encode()).text]
        said.append(httpx.get(f"{running.url}/v1/models/{NAME}?q={EMAIL}", headers={"x-note": PROMPT}).text)
        for target, name in (
            (filters.Conversation, "text"),
            (filters.LeakStop, "feed"),
            (engine, "generate"),
            (Limits, "__getattribute__"),
        ):
            with monkeypatch.context() as broken:
                broken.setattr(target, name, _raise)
                try:
                    streamed(client) if stream else ask(client)
                except openai.APIError as error:
                    said.append(str(error) + repr(error.body))
                else:
                    pytest.fail(f"{name} was broken and the request was answered")
        with monkeypatch.context() as broken:  # not even an error outside our own handlers is printed with its words
            broken.setattr(proxy.wire, "error_body", _raise)
            said.append(running.post(b"{}").text)
    gc.collect()
    out, err = capfd.readouterr()
    logged = "".join(f"{record.getMessage()} {record.exc_info} {record.exc_text} {record.args}" for record in caplog.records)
    files = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    everywhere = "\n".join([*said, logged, caplog.text, out, err, files, repr(running.kept.counted)])
    assert "RuntimeError" in logged, "the faults were injected and noticed"
    assert not [secret for secret in SECRETS if secret in everywhere]


def test_the_server_logs_no_traceback(caplog, served):
    with caplog.at_level(logging.ERROR, logger="uvicorn.error"):
        try:
            _raise()
        except RuntimeError:
            logging.getLogger("uvicorn.error").exception("Exception in ASGI application: %s", PROMPT)
    assert caplog.messages == ["RuntimeError"]
    assert "Quistgaard" not in caplog.text


# --- only what was released


BASE = Digest("sha256:" + "cd" * 32)
GUARANTEE = {"epsilon": 7.5, "delta": 1e-4, "unit": "patient"}


@dataclass
class Project:
    """A released adapter: its folder, the base it stands on, and the log that says so."""

    log: Log
    store: Store
    release: Release
    base: model.Base

    def say(self, predicate: Predicate, **fields: object) -> bytes:
        with self.store.transaction() as tx:
            self.log.append(tx, Statement(predicate=predicate, subjects=(self.release.adapter,), fields=fields))
        return self.log.select(predicate)[-1].envelope

    def changed(self, **fields: object) -> Release:
        return Release(**({name: getattr(self.release, name) for name in Release.__dataclass_fields__} | fields))

    def open(self, release: Release | None = None) -> LocalEngine:
        return gateway.open_engine(release or self.release, self.base, public_key=self.log.public_key(), key=Key(bytes(32)))


@pytest.fixture
def project(tmp_path, tiny_llama, tokenizer) -> Project:
    base = model.Base(module=tiny_llama, tokenizer=tokenizer, digest=BASE, name="tiny", path=tmp_path)
    module = model.attach(base, ModelSection())
    with torch.no_grad():
        for parameter in model.trained_parameters(module).values():
            parameter.add_(0.5)
    adapter = model.save_adapter(module, tmp_path / "release" / gateway.ADAPTER_FOLDER)
    store = Store(f"sqlite:///{tmp_path}/discreet.db")
    log = Log(store, Keyring(store, Key.random()), "example.org/log")
    said = {"name": MODEL, "base": BASE, "adapter": adapter, "guarantee": GUARANTEE}
    release = Release(path=tmp_path / "release", statement=b"", **said)
    project = Project(log=log, store=store, release=release, base=base)
    project.release = project.changed(statement=project.say(Predicate.RELEASED, **said))
    yield project
    store.close()


def test_a_released_adapter_is_served_under_its_digest(project, local_engine):
    engine = project.open()
    with serving(engine) as running, running.client() as client:
        adapted = ask(client, "Hello", temperature=0, max_tokens=16).choices[0].message.content
    with serving(local_engine) as running, running.client() as client:
        assert ask(client, "Hello", temperature=0, max_tokens=16).choices[0].message.content != adapted, "the adapter changes the answer"
    engine.close()


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "other"), ("base", "sha256:" + "00" * 32), ("adapter", "sha256:" + "00" * 32), ("guarantee", {**GUARANTEE, "epsilon": 1.0})],
)
def test_a_release_that_says_other_than_its_statement_is_refused(project, field, value):
    with pytest.raises(DigestMismatch, match=field):
        project.open(project.changed(**{field: value}))


def test_a_changed_adapter_is_refused(project):
    weights = project.release.path / gateway.ADAPTER_FOLDER / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DigestMismatch, match="adapter"):
        project.open()


def test_an_adapter_that_changes_after_it_was_hashed_is_not_what_answers(project, monkeypatch):
    """Whoever writes to the release folder between verification and loading writes in vain: the hashed bytes are the loaded ones."""
    weights = project.release.path / gateway.ADAPTER_FOLDER / "adapter_model.safetensors"
    content, hashed = weights.read_bytes(), model._digest

    def swapping(files):
        found = hashed(files)
        weights.write_bytes(content[:-4] + b"\x00\x00\x80\x7f")  # infinity: nothing would answer with it
        return found

    monkeypatch.setattr(model, "_digest", swapping)
    engine = project.open()
    monkeypatch.undo()
    assert weights.read_bytes() != content
    with serving(engine) as running, running.client() as client:
        assert ask(client, "Hello", temperature=0, max_tokens=4).choices[0].message.content
    engine.close()
    with pytest.raises(DigestMismatch, match="adapter"):
        project.open()


def test_another_base_is_refused(project):
    project.base = model.Base(module=project.base.module, tokenizer=project.base.tokenizer, digest=ADAPTER, name="tiny", path=project.base.path)
    with pytest.raises(DigestMismatch, match="base"):
        project.open()


def test_a_linked_adapter_is_refused(project, tmp_path):
    weights = project.release.path / gateway.ADAPTER_FOLDER / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere.safetensors")
    weights.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ModelUnsafe):
        project.open()


def test_only_a_statement_of_release_is_a_release(project):
    withheld = project.say(Predicate.WITHHELD, name=MODEL, adapter=project.release.adapter, reasons=["epsilon"])
    with pytest.raises(NotReleased, match="withheld"):
        project.open(project.changed(statement=withheld))


def test_a_forged_statement_is_refused(project):
    forged = bytearray(project.release.statement)
    forged[100] ^= 1
    with pytest.raises(EvidenceInvalid):
        project.open(project.changed(statement=bytes(forged)))
    with pytest.raises(EvidenceInvalid):
        project.open(project.changed(statement=b""))


def test_a_statement_of_another_key_is_refused(project, tmp_path):
    store = Store(f"sqlite:///{tmp_path}/other.db")
    other = Log(store, Keyring(store, Key.random()), "example.org/log")
    with pytest.raises(EvidenceInvalid):
        gateway.open_engine(project.release, project.base, public_key=other.public_key(), key=Key(bytes(32)))
    store.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_returns_on_a_signal_so_that_what_was_served_can_be_written_down(echo, number, monkeypatch):
    application = proxy.app(Local(echo, name=MODEL, adapter=ADAPTER), Settings(tenants=()), key=Key(bytes(32)))
    made = []
    original = asgi.server
    monkeypatch.setattr(asgi, "server", lambda *a, **k: made.append(original(*a, **k)) or made[0])
    before = signal.getsignal(number)

    def stop():
        while not (made and made[0].started):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    stopper = threading.Thread(target=stop)
    stopper.start()
    asgi.run(application, host="127.0.0.1", port=0)
    stopper.join()
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0, "a crash leaves no prompts in a file"
    assert signal.getsignal(number) is before
