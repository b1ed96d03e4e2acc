"""The gateway: OpenAI's chat completions in front of a released model, for callers who have its key.

    caller ── request ──> parse ─> de-identify ──> engine (placeholders only)
           <── answer ─── stop <── restore <────────┘

It starts only with a `Release`: the signed statement is verified again, and the digests of the base and of the adapter are computed from the files that are opened.
The digest of the adapter that answered travels in every response (`x-discreet-adapter`, `system_fingerprint`).

Fail closed: whatever goes wrong in a filter, in the engine or in the count of served requests ends in an error, before or within the stream; there is no path on which text
travels unfiltered. Every placeholder table lives in memory for one request under a key of its own, and is gone with it.

Nothing of a prompt or an answer is logged. An error tells its caller a rule and a field; the log gets the kind of an unexpected error and no traceback, because a traceback quotes values.
Requests are counted, by label, through `on_served`, before the first byte of the answer leaves.

Does not cover: TLS (bind to loopback, or put a proxy that terminates it in front), many keys or tenants, quotas, text sizes and token timing as a side channel.
"""

from __future__ import annotations

import asyncio
import hmac
import shutil
import tempfile
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from discreet import model
from discreet.deid.policy import Policy
from discreet.errors import AccessDenied, DigestMismatch, DiscreetError, NotFound, NotReleased, RequestInvalid, missing_extra
from discreet.evidence import note, statement
from discreet.evidence.statement import Entry, Predicate
from discreet.keys import Key
from discreet.record import Digest, Release
from discreet.serve import filters, wire
from discreet.serve.asgi import EventStream, frame, hash_api_key, read_body, run, unexpected, unless_gone
from discreet.serve.engine import Engine, LocalEngine, Piece, Sampling, StopAt

try:
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise missing_extra("serve", str(error.name)) from None

OnServed = Callable[[Digest, Digest, Mapping[str, int]], None]
"""Called with the adapter's digest, the policy's digest and the number of identifiers by label; must be quick, and whatever it raises refuses the request."""

STATEMENT_FILE, ADAPTER_FOLDER = "release.json", "adapter"
"""A release folder: the signed `released` statement, and the PEFT adapter whose digest it names."""

ADAPTER_HEADER = "x-discreet-adapter"
_CLIENT_GONE = 499  # nobody is there to read it


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may cost.

    Args:
        max_request_bytes: size of a body, >= 1.
        max_prompt_chars: size of a conversation's text, >= 1; the detectors read some 20,000 characters a second.
        max_new_tokens: length of an answer, >= 1; a longer one is cut and says so.
        max_seconds: time for an answer, > 0.
        temperature: used where the caller gives none, 0 to 2.
        top_p: used where the caller gives none, in (0, 1].
    """

    max_request_bytes: int = 1_000_000
    max_prompt_chars: int = 64_000
    max_new_tokens: int = 256
    max_seconds: float = 300.0
    temperature: float = 0.2
    top_p: float = 0.9

    def __post_init__(self) -> None:
        if min(self.max_request_bytes, self.max_prompt_chars) < 1 or not self.max_seconds > 0:
            given = f"{self.max_request_bytes}, {self.max_prompt_chars}, {self.max_seconds}"
            raise RequestInvalid("max_request_bytes >= 1, max_prompt_chars >= 1 and max_seconds > 0", value=given)
        Sampling(temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_new_tokens)


def released_entry(envelope: bytes, *, public_key: str) -> Entry:
    """Returns the `released` statement that this key signed.

    Args:
        envelope: content of `release.json`, a DSSE envelope.
        public_key: the log's vkeys (C2SP), a line each, which also name the log.

    Raises:
        EvidenceInvalid: when the envelope, its signature, its place or the key is not valid.
        NotReleased: when it is a valid statement of another kind: that a model was trained, or withheld, is not a release.
    """
    keys = note.parse_keys(public_key)
    entry = statement.verify(envelope, keys=note.by_label(keys), origin=keys[0].name)
    if entry.predicate is not Predicate.RELEASED:
        raise NotReleased("a statement that a model was released", value=entry.predicate, remedy="Run `discreet release`.")
    return entry


def verify_release(release: Release, *, public_key: str, base: Digest, adapter: Digest) -> Release:
    """Returns the release, after reading its signed statement again and comparing it with what is there.

    Args:
        release: as given by the pipeline.
        public_key: the log's vkey.
        base: digest computed from the files of the base model.
        adapter: digest computed from the files of the adapter.

    Raises:
        EvidenceInvalid, NotReleased: as `released_entry`.
        DigestMismatch: when the release says other than its statement, or the base or the adapter is not the one that was released.
    """
    fields = released_entry(release.statement, public_key=public_key).fields
    said = {"name": release.name, "base": release.base, "adapter": release.adapter, "guarantee": dict(release.guarantee)}
    for name, value in said.items():
        if fields[name] != value:
            raise DigestMismatch(f"a release with the {name} of its signed statement")
    for name, found in (("base", base), ("adapter", adapter)):
        if fields[name] != found:
            remedy = "These are not the files that were audited; restore them."
            raise DigestMismatch(f"the {name} that was released, {fields[name]}", value=found, remedy=remedy)
    return release


def open_engine(release: Release, base: model.Base, *, public_key: str, key: Key, max_waiting: int = 8) -> LocalEngine:
    """Returns the engine of a release, verified against the files that it opens.

    The adapter is copied into a folder of this process first: what is hashed is then what is loaded, whoever writes to the release folder meanwhile.

    Raises:
        EvidenceInvalid, NotReleased, DigestMismatch: as `verify_release`.
    """
    with tempfile.TemporaryDirectory(prefix="discreet-") as private:
        adapter = Path(private) / ADAPTER_FOLDER
        shutil.copytree(release.path / ADAPTER_FOLDER, adapter, symlinks=True)  # a link is refused below, not followed here
        verify_release(release, public_key=public_key, base=base.digest, adapter=model.adapter_digest(adapter))
        return LocalEngine(model.load_adapter(base, adapter), base.tokenizer, key=key, max_waiting=max_waiting)


def serve(
    release: Release,
    base: model.Base,
    *,
    public_key: str,
    key: Key,
    api_key_hash: str,
    on_served: OnServed,
    host: str,
    port: int,
    limits: Limits | None = None,
) -> None:
    """Verifies the release, loads it and serves it until it is told to stop.

    Raises:
        EvidenceInvalid, NotReleased, DigestMismatch: as `verify_release`, before any port is opened.
    """
    engine = open_engine(release, base, public_key=public_key, key=key)
    application = app(
        engine, model_name=release.name, adapter=release.adapter, key=key, api_key_hash=api_key_hash, on_served=on_served, limits=limits
    )
    try:
        run(application, host=host, port=port)
    finally:
        engine.close()


def app(
    engine: Engine,
    *,
    model_name: str,
    adapter: Digest,
    key: Key,
    api_key_hash: str,
    on_served: OnServed,
    limits: Limits | None = None,
    policy: Policy = filters.POLICY,
) -> Starlette:
    """Returns the ASGI application.

    Args:
        engine: what answers.
        model_name: the name under which callers ask for it.
        adapter: digest of the adapter that answers.
        key: from which the keys of the placeholder tables derive, one for each request.
        api_key_hash: of the one key that opens the gateway (`hash_api_key`).
        on_served: counts what was served.
        limits: of one request.
        policy: of the channel prompt.
    """
    filters.prepare(policy)
    gateway = _Gateway(engine, model_name, adapter, key, api_key_hash, on_served, limits or Limits(), policy)
    routes = [
        Route("/v1/chat/completions", gateway.endpoint(gateway.chat), methods=["POST"]),
        Route("/v1/models", gateway.endpoint(gateway.models)),
        Route("/v1/models/{model:path}", gateway.endpoint(gateway.model)),
        Route("/healthz", gateway.endpoint(gateway.health)),
        Route("/readyz", gateway.endpoint(gateway.health)),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: gateway.no_route})


@final
class _Gateway:
    """The routes, and what they share."""

    def __init__(
        self, engine: Engine, model_name: str, adapter: Digest, key: Key, api_key_hash: str, on_served: OnServed, limits: Limits, policy: Policy
    ) -> None:
        self._engine = engine
        self._model_name = model_name
        self._adapter = adapter
        self._key = key
        self._api_key_hash = api_key_hash
        self._on_served = on_served
        self._limits = limits
        self._policy = policy
        self._started = int(time.time())

    def endpoint(self, handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Wraps a route so that every error becomes a refusal without words of the request, and no exception reaches the server."""

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except ClientDisconnect:
                return Response(status_code=_CLIENT_GONE)
            except DiscreetError as error:
                return self._refuse(error)
            except Exception as error:
                return self._refuse(unexpected(error))

        return guarded

    async def health(self, _request: Request) -> Response:
        """`GET /healthz`, `/readyz`: the process is there only after the release was verified and the model loaded."""
        return self._json({"status": "ok"})

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        self._authorize(request)
        return self._json(wire.ModelList(data=[self._model()]).model_dump(mode="json"))

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{model}`."""
        self._authorize(request)
        self._check_model(request.path_params["model"])
        return self._json(self._model().model_dump(mode="json"))

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        self._authorize(request)
        body = await read_body(request, max_bytes=self._limits.max_request_bytes)
        asked = wire.parse_request(body, max_bytes=self._limits.max_request_bytes)
        self._check_model(asked.model)
        if sum(len(message.text) for message in asked.messages) > self._limits.max_prompt_chars:
            rule = f"a conversation of at most {self._limits.max_prompt_chars} characters"
            raise RequestInvalid(rule, value="messages", remedy="Send a shorter conversation.")
        return await unless_gone(request.receive, self._answer(asked))

    async def no_route(self, _request: Request, error: Exception) -> Response:
        """Answers what the router refuses: no such path, or another method."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        return self._refuse(NotFound("a route of this gateway", remedy="It serves POST /v1/chat/completions and GET /v1/models."), status=status)

    async def _answer(self, asked: wire.ChatRequest) -> Response:
        """De-identifies, waits for the first piece (so that a refusal still has its own status), counts, and answers."""
        conversation = filters.Conversation(self._key, policy=self._policy)
        prompt = await run_in_threadpool(conversation.deidentify, asked.messages)
        async with AsyncExitStack() as stack:
            pieces = self._pieces(asked, prompt, conversation.restorer())
            await stack.enter_async_context(aclosing(pieces))
            first = await anext(pieces)
            self._on_served(self._adapter, prompt.policy, prompt.counts)
            label = _Label(model=self._model_name, adapter=self._adapter)
            if asked.stream:
                stack.pop_all()  # the stream closes the pieces
                return EventStream(_events(pieces, first, label, asked), headers=self._headers())
            return self._json(await _whole(pieces, first, label))

    async def _pieces(self, asked: wire.ChatRequest, prompt: filters.Prompt, restorer: filters.Growing) -> AsyncGenerator[Piece, None]:
        """Yields the answer, restored, cut at the caller's stop strings, which are applied to what the caller sees and never reach the engine."""
        stop = StopAt(asked.stop or ())
        deadline = asyncio.get_running_loop().time() + self._limits.max_seconds
        async with aclosing(self._engine.generate(prompt.turns, self._sampling(asked))) as pieces:
            while True:
                async with asyncio.timeout_at(deadline):
                    piece = await anext(pieces)
                ended = piece.finish_reason
                text = stop.feed(restorer.feed(piece.text))
                if ended is not None:
                    text += stop.feed(restorer.close()) + stop.close()
                yield replace(piece, text=text, finish_reason="stop" if stop.hit else ended)
                if stop.hit or ended is not None:
                    return

    def _sampling(self, asked: wire.ChatRequest) -> Sampling:
        return Sampling(
            temperature=self._limits.temperature if asked.temperature is None else asked.temperature,
            top_p=self._limits.top_p if asked.top_p is None else asked.top_p,
            max_new_tokens=asked.max_new_tokens(self._limits.max_new_tokens),
            seed=asked.seed,
        )

    def _authorize(self, request: Request) -> None:
        """Compares hashes in constant time: neither the key nor how much of it was right can be measured."""
        given = request.headers.getlist("authorization")
        scheme, _, api_key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        same = hmac.compare_digest(hash_api_key(api_key.strip()), self._api_key_hash)
        if scheme.lower() != "bearer" or not same:
            raise AccessDenied("the API key of this gateway", remedy="Send it as the header Authorization: Bearer KEY.")

    def _check_model(self, name: str) -> None:
        if name != self._model_name:
            raise NotFound("a model that this gateway serves", remedy="GET /v1/models lists it.")

    def _model(self) -> wire.Model:
        return wire.Model(id=self._model_name, created=self._started)

    def _headers(self) -> dict[str, str]:
        return {ADAPTER_HEADER: self._adapter, "cache-control": "no-store", "x-content-type-options": "nosniff"}

    def _json(self, body: Mapping[str, Any], *, status: int = 200) -> Response:
        return JSONResponse(body, status_code=status, headers=self._headers())

    def _refuse(self, error: DiscreetError, *, status: int | None = None) -> Response:
        response = self._json(wire.error_body(error), status=status or error.http_status)
        if isinstance(error, AccessDenied):
            response.headers["www-authenticate"] = "Bearer"
        return response


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Label:
    """What every object of one answer says about where it comes from."""

    model: str
    adapter: Digest

    def fields(self) -> dict[str, Any]:
        number = Key.random().mac(b"completion id").hex()[:24]
        return {"id": f"chatcmpl-{number}", "created": int(time.time()), "model": self.model, "system_fingerprint": self.adapter}


async def _events(pieces: AsyncGenerator[Piece, None], first: Piece, label: _Label, asked: wire.ChatRequest) -> AsyncGenerator[str, None]:
    """Yields the chunks of an answer as JSON; an error ends the stream as an error event, without `[DONE]`."""
    fields, with_usage = label.fields(), bool(asked.stream_options and asked.stream_options.include_usage)

    def chunk(delta: wire.Delta, finish_reason: wire.FinishReason | None = None) -> str:
        choice = wire.ChunkChoice(delta=delta, finish_reason=finish_reason)
        return wire.ChatCompletionChunk(**fields, choices=[choice]).to_json(with_usage=with_usage)

    async with aclosing(pieces):
        try:
            yield frame(chunk(wire.Delta(role="assistant", content="")))
            piece = first
            while True:
                if piece.text:
                    yield frame(chunk(wire.Delta(content=piece.text)))
                if piece.finish_reason is not None:
                    break
                piece = await anext(pieces)
            yield frame(chunk(wire.Delta(), piece.finish_reason))
            if with_usage:
                yield frame(wire.ChatCompletionChunk(**fields, choices=[], usage=_usage(piece)).to_json(with_usage=True))
            yield frame("[DONE]")
        except DiscreetError as error:
            yield frame(wire.to_json(wire.error_body(error)))
        except Exception as error:
            yield frame(wire.to_json(wire.error_body(unexpected(error))))


async def _whole(pieces: AsyncGenerator[Piece, None], first: Piece, label: _Label) -> dict[str, Any]:
    """Returns the answer in one object."""
    last, texts = first, [first.text]
    while last.finish_reason is None:
        last = await anext(pieces)
        texts.append(last.text)
    choice = wire.Choice(message=wire.AnswerMessage(content="".join(texts)), finish_reason=last.finish_reason)
    return wire.ChatCompletion(**label.fields(), choices=[choice], usage=_usage(last)).model_dump(mode="json")


def _usage(last: Piece) -> wire.Usage:
    total = last.prompt_tokens + last.completion_tokens
    return wire.Usage(prompt_tokens=last.prompt_tokens, completion_tokens=last.completion_tokens, total_tokens=total)
