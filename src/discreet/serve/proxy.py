"""The privacy gateway in front of a model elsewhere: any client of OpenAI's or Anthropic's API, any server that speaks it, no project and no training.

    caller ── request ──> tenant ─> table of its wire ─> de-identify ──> upstream (placeholders only)
           <── answer ─── restore, piece by piece <──────────────────────┘

What may pass is said in tables: `fields` (requests), `answers` (answers), `upstream` (the one server). Each request has a table of placeholders of its own, under a key of its tenant,
in memory, and gone with it: nothing is cached, nothing is shared, nothing is written. `store` is false on the Responses API unless the caller asks for it.

Fail closed: an error anywhere is an error to the caller, in the form of its wire, before or within the stream; what an upstream says about an error is never repeated.

Metrics (Prometheus, `/metrics`) have labels of closed lists only: tenant, route, status, label of identifier. Nothing else of a request is counted, logged or kept.

Does not cover: TLS towards callers (bind to loopback, or put a proxy that terminates it in front), identifiers that the model makes up or remembers, sizes and timing as a side channel.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

from discreet.deid.patterns import Label
from discreet.errors import AccessDenied, DiscreetError, NotFound, OperationFailed, RequestInvalid, UpstreamFailed, missing_extra
from discreet.keys import Key
from discreet.serve import answers, fields, upstream, wire
from discreet.serve.answers import Answer
from discreet.serve.asgi import EventStream, frame, hash_api_key, read_body, unexpected, unless_gone
from discreet.serve.filters import Conversation
from discreet.serve.tenants import Quotas, Tenant, identify
from discreet.serve.upstream import Upstream

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise missing_extra("serve", str(error.name)) from None

MODELS_FOR_S = 60.0
"""How long the upstream's list of models is believed."""

MAX_DEPTH = 64

MAX_INLINE_BYTES = 8_000
"""Requests up to this size are read in the event loop: handing them to a thread costs more than reading them."""

POLICY_HEADER = "x-discreet-policy"

_CLIENT_GONE = 499


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request may cost.

    Args:
        max_request_bytes: size of a body, >= 1.
        max_chars: text in it, >= 1.
        max_seconds: time for an answer, > 0.
    """

    max_request_bytes: int = 4_000_000
    max_chars: int = 400_000
    max_seconds: float = 600.0

    def __post_init__(self) -> None:
        if min(self.max_request_bytes, self.max_chars) < 1 or not self.max_seconds > 0:
            raise RequestInvalid("max_request_bytes >= 1, max_chars >= 1 and max_seconds > 0")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """One route: its table, what restores its events, and how its streams look."""

    path: str
    table: Mapping[str, Any]
    events: Callable[[Answer, dict[str, Any]], list[dict[str, Any]]] | None
    named_events: bool = False
    done: str | None = None


WIRES = (
    Wire(path=upstream.CHAT, table=fields.CHAT, events=Answer.chat, done="[DONE]"),
    Wire(path=upstream.COMPLETIONS, table=fields.COMPLETIONS, events=Answer.completion, done="[DONE]"),
    Wire(path=upstream.EMBEDDINGS, table=fields.EMBEDDINGS, events=None),
    Wire(path=upstream.RESPONSES, table=fields.RESPONSES, events=Answer.response, named_events=True),
    Wire(path=upstream.MESSAGES, table=fields.MESSAGES, events=Answer.message, named_events=True),
)


@final
class Metrics:
    """Counters whose labels are of closed lists: names of tenants and routes, HTTP statuses, labels of identifiers."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client leaves it without types
        self.registry = CollectorRegistry()
        self._requests = Counter("discreet_requests", "Requests answered.", ["tenant", "route", "status"], registry=self.registry)
        self._found = Counter("discreet_identifiers", "Identifiers replaced.", ["tenant", "label"], registry=self.registry)
        self._running = Gauge("discreet_running", "Requests under way.", registry=self.registry)
        self._filter = Histogram("discreet_filter_seconds", "Time to de-identify a request.", ["route"], registry=self.registry)

    def answered(self, tenant: str, route: str, status: int) -> None:
        """Counts one answer; `tenant` is empty where no key was right."""
        self._requests.labels(tenant, route, str(status)).inc()

    def filtered(self, tenant: str, route: str, seconds: float, counts: Mapping[str, int]) -> None:
        """Counts what one request held."""
        self._filter.labels(route).observe(seconds)
        for label, number in counts.items():
            self._found.labels(tenant, Label(label)).inc(number)

    def page(self, running: int) -> bytes:
        """Returns the text that Prometheus reads."""
        self._running.set(running)
        return generate_latest(self.registry)


def app(
    server: Upstream,
    *,
    tenants: Sequence[Tenant],
    key: Key,
    metrics_key_hash: str | None = None,
    cache_salt: bool = False,
    limits: Limits | None = None,
) -> Starlette:
    """Returns the ASGI application.

    Args:
        server: the upstream; opened and closed with the application.
        tenants: who may ask, at least one.
        key: from which the keys of the tenants derive.
        metrics_key_hash: of the key that reads `/metrics`; None for the tenants' keys.
        cache_salt: whether the upstream (vLLM) takes a `cache_salt`, which then separates the prefix caches of the tenants.
        limits: of one request.
    """
    proxy = _Proxy(server, tuple(tenants), key, metrics_key_hash, cache_salt, limits or Limits())
    routes = [Route(each.path, proxy.endpoint(each.path, proxy.exchange(each)), methods=["POST"]) for each in WIRES]
    others = {"/v1/models": proxy.models, "/healthz": proxy.health, "/readyz": proxy.ready, "/metrics": proxy.metrics}
    routes += [Route(path, proxy.endpoint(path, handle)) for path, handle in others.items()]

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await server.open()
        try:
            yield
        finally:
            await server.close()

    return Starlette(routes=routes, exception_handlers={HTTPException: proxy.no_route}, lifespan=lifespan)


@final
class _Proxy:
    """The routes, and what they share."""

    def __init__(
        self, server: Upstream, tenants: tuple[Tenant, ...], key: Key, metrics_key_hash: str | None, cache_salt: bool, limits: Limits
    ) -> None:
        self._server, self._tenants, self._key = server, tenants, key
        self._metrics_key_hash, self._cache_salt, self._limits = metrics_key_hash, cache_salt, limits
        self._quotas, self._metrics = Quotas(), Metrics()
        self._listed: tuple[float, frozenset[str]] | None = None

    def endpoint(self, path: str, handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Wraps a route so that every error becomes a refusal without words of the request, and every answer is counted."""

        async def guarded(request: Request) -> Response:
            try:
                response = await handle(request)
            except ClientDisconnect:
                response = Response(status_code=_CLIENT_GONE)
            except DiscreetError as error:
                response = _refuse(path, error)
            except Exception as error:
                response = _refuse(path, unexpected(error))
            self._metrics.answered(getattr(request.state, "tenant", ""), path, response.status_code)
            return response

        return guarded

    async def health(self, _request: Request) -> Response:
        """`GET /healthz`: the process answers."""
        return _json({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        """`GET /readyz`: the upstream answered within the last minute."""
        await self._models()
        return _json({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`."""
        if self._metrics_key_hash is None:
            identify(self._tenants, request.headers)
        else:
            given = request.headers.get("authorization", "").partition(" ")[2].strip()
            if not hmac.compare_digest(hash_api_key(given), self._metrics_key_hash):
                raise AccessDenied("the key that reads the metrics")
        return Response(self._metrics.page(self._quotas.running()), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: those that this tenant may ask for."""
        tenant = self._identify(request)
        names = sorted(await self._allowed(tenant))
        page = {"first_id": names[0] if names else None, "last_id": names[-1] if names else None, "has_more": False}
        listed = [{"id": name, "object": "model", "type": "model", "display_name": name, "created": 0, "owned_by": "upstream"} for name in names]
        return _json({"object": "list", "data": listed, **page})

    async def no_route(self, _request: Request, error: Exception) -> Response:
        """Answers what the router refuses: no such path, or another method."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        return _refuse("", NotFound("a route of this gateway", remedy=f"It serves {', '.join(sorted(upstream.PATHS))}."), status=status)

    def exchange(self, route: Wire) -> Callable[[Request], Awaitable[Response]]:
        """Returns the handler of one wire."""

        async def handle(request: Request) -> Response:
            tenant = self._identify(request)
            raw = await read_body(request, max_bytes=self._limits.max_request_bytes)
            body = wire.parse_json(raw, max_bytes=self._limits.max_request_bytes, max_depth=MAX_DEPTH)
            async with AsyncExitStack() as stack:
                stack.enter_context(self._quotas.admitted(tenant))
                return await unless_gone(request.receive, self._answer(route, tenant, body, stack, inline=len(raw) <= MAX_INLINE_BYTES))

        return handle

    async def _answer(self, route: Wire, tenant: Tenant, body: Any, stack: AsyncExitStack, *, inline: bool) -> Response:
        """De-identifies, asks, and answers; a stream takes over what has to be closed at its end."""
        await self._check_model(tenant, body)
        key = self._key.derive("tenant", tenant.name)
        conversation = Conversation(key, policy=tenant.policy, guard=tenant.guard)
        began = time.perf_counter()
        read = partial(fields.deidentify, body, route.table, conversation, tenant=key, max_chars=self._limits.max_chars)
        sent = read() if inline else await run_in_threadpool(read)
        self._metrics.filtered(tenant.name, route.path, time.perf_counter() - began, conversation.counts)
        sent = self._completed(sent, route, key)
        headers = {POLICY_HEADER: tenant.policy.digest}
        answer = Answer(conversation, tenant.tools)
        if sent.get("stream") and route.events is not None:
            chunks = await stack.enter_async_context(self._server.stream(route.path, sent))  # an earlier refusal still has its own status
            return EventStream(self._frames(route, chunks, answer), headers={**_HEADERS, **headers}, closing=stack.pop_all())
        async with asyncio.timeout(self._limits.max_seconds):
            received = await self._server.ask(route.path, sent)
        if not isinstance(received, dict):
            raise UpstreamFailed("an answer that is an object")
        return _json(received if route.events is None else answer.whole(received), headers=headers)

    def _completed(self, sent: dict[str, Any], route: Wire, key: Key) -> dict[str, Any]:
        """Adds what the gateway decides and no caller may: nothing is stored unasked, and caches of tenants are apart."""
        if route.path == upstream.RESPONSES:
            sent = {"store": False, **sent}
        if self._cache_salt and route.path != upstream.EMBEDDINGS:
            sent = {**sent, "cache_salt": key.derive("cache").mac(b"salt").hex()}
        return sent

    async def _frames(self, route: Wire, chunks: AsyncGenerator[bytes, None], answer: Answer) -> AsyncGenerator[str, None]:
        """Yields the events of an answer, restored; an error ends the stream as an error event, and what was held back stays."""
        try:
            async with aclosing(self._restored(route, chunks, answer)) as texts:
                async for text in texts:
                    yield text
            if route.done is not None:
                yield frame(route.done)
        except DiscreetError as error:
            yield _error_frame(route, error)
        except Exception as error:
            yield _error_frame(route, unexpected(error))

    async def _restored(self, route: Wire, chunks: AsyncGenerator[bytes, None], answer: Answer) -> AsyncGenerator[str, None]:
        deadline = asyncio.get_running_loop().time() + self._limits.max_seconds
        async with aclosing(answers.events(chunks)) as received:
            done = False
            while not done:
                async with asyncio.timeout_at(deadline):
                    texts = await anext(received, None)
                done = texts is None or "[DONE]" in texts
                frames: list[str] = []
                for text in itertools.takewhile(lambda text: text != "[DONE]", texts or ()):
                    event = wire.parse_json(text.encode(), max_bytes=answers.MAX_EVENT_BYTES, max_depth=MAX_DEPTH)
                    for each in _events(route, answer, event):
                        frames.append(frame(wire.to_json(each), event=str(each["type"]) if route.named_events else None))
                if frames:
                    yield "".join(frames)
        if not answer.ended:
            raise UpstreamFailed("an answer to the end")

    def _identify(self, request: Request) -> Tenant:
        tenant = identify(self._tenants, request.headers)
        request.state.tenant = tenant.name
        return tenant

    async def _check_model(self, tenant: Tenant, body: Any) -> None:
        name = body.get("model") if isinstance(body, dict) else None
        if not isinstance(name, str):
            raise RequestInvalid("model to be a string", value="model")
        if name not in await self._allowed(tenant):
            raise NotFound("a model that this tenant may use", remedy="GET /v1/models lists them.")

    async def _allowed(self, tenant: Tenant) -> frozenset[str]:
        return tenant.models if tenant.models is not None else await self._models()

    async def _models(self) -> frozenset[str]:
        """Returns the names that the upstream lists."""
        now = time.monotonic()
        if self._listed is None or now - self._listed[0] > MODELS_FOR_S:
            async with asyncio.timeout(30):
                listed = await self._server.ask(upstream.MODELS)
            self._listed = now, frozenset(str(model["id"]) for model in listed["data"])
        return self._listed[1]


def _events(route: Wire, answer: Answer, event: Any) -> list[dict[str, Any]]:
    """Returns what stands for one event of the upstream.

    Raises:
        UpstreamFailed: when it does not have the form of its wire, or says that the answer failed.
    """
    if route.events is None or not isinstance(event, dict) or event.get("error"):
        raise UpstreamFailed("an answer to the end")
    try:
        return route.events(answer, event)
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UpstreamFailed("events of the form of this route") from None


_HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}


def _json(body: Mapping[str, Any], *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(body, status_code=status, headers={**_HEADERS, **(headers or {})})


def _error_body(path: str, error: DiscreetError) -> dict[str, Any]:
    body: dict[str, Any] = dict(wire.error_body(error))
    return {"type": "error", **body} if path == upstream.MESSAGES else body


def _error_frame(route: Wire, error: DiscreetError) -> str:
    body = _error_body(route.path, error)
    if route.path == upstream.RESPONSES:
        body = {"type": "error", "code": error.code, "message": str(error), "param": None, "sequence_number": 0}
    return frame(wire.to_json(body), event="error" if route.named_events else None)


def _refuse(path: str, error: DiscreetError, *, status: int | None = None) -> Response:
    response = _json(_error_body(path, error), status=status or error.http_status)
    if isinstance(error, AccessDenied):
        response.headers["www-authenticate"] = "Bearer"
    if isinstance(error, OperationFailed) and error.http_status == 429:
        response.headers["retry-after"] = "1"
    return response
