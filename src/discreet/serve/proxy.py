"""The privacy gateway in front of a model: any client of OpenAI's or Anthropic's API, any server that speaks it, or a released model in this process.

    caller ── request ──> tenant ─> table of its wire ─> de-identify ──> server (placeholders only)
           <── answer ─── restore, piece by piece <──────────────────────┘

What may pass is said in tables: `fields` (requests), `answers` (answers), `upstream` (the server). Each request has a table of placeholders of its own, under a key of its tenant,
in memory, and gone with it: nothing is cached, nothing is shared, nothing is written. `store` is false on the Responses API unless the caller asks for it.

Fail closed: an error anywhere is an error to the caller, in the form of its wire, before or within the stream; what an upstream says about an error is never repeated.

Metrics (Prometheus, `/metrics`) have labels of closed lists only: tenant, route, status, label of identifier. So have the roll-ups of the trail and the attributes of a trace
(`ATTRIBUTES`). Nothing else of a request is counted, logged or kept.

Settings are one frozen value, and the server is one object. `change` puts others in their place: requests that are under way keep the policy and the model they began with, new ones
have the new ones, and a server is closed when the last request that began with it has ended.

Does not cover: sizes and timing as a side channel.
"""

from __future__ import annotations

import asyncio
import collections
import hmac
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from discreet.deid.patterns import Label
from discreet.errors import (
    AccessDenied,
    ConfigInvalid,
    DiscreetError,
    NotFound,
    OperationFailed,
    OutOfTime,
    RequestInvalid,
    UpstreamFailed,
    missing_extra,
)
from discreet.keys import Key
from discreet.serve import answers, fields, oidc, openapi, upstream, wire
from discreet.serve.answers import Answer
from discreet.serve.asgi import EventStream, frame, hash_api_key, read_body, unexpected, unless_gone
from discreet.serve.filters import Conversation, prepare
from discreet.serve.learning import Learner, person_of, texts_of
from discreet.serve.oidc import Provider, Verifier
from discreet.serve.tenants import Limits, Quotas, Settings, Tenant, Unknown, bearer, claimed, identify
from discreet.serve.trail import Group, Trail
from discreet.serve.upstream import Refusing, Server

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

if TYPE_CHECKING:
    from opentelemetry.trace import Span, Tracer

MODELS_FOR_S = 60.0
"""How long the list of models of a server is believed."""

MAX_DEPTH = 64

MAX_INLINE_BYTES = 8_000
"""Requests up to this size are read in the event loop: handing them to a thread costs more than reading them."""

POLICY_HEADER = "x-discreet-policy"

ATTRIBUTES = frozenset(("http.route", "http.response.status_code", "discreet.tenant", "discreet.identifiers"))
"""All that a trace says."""

_CLIENT_GONE, _FAILED = 499, 500


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
@dataclass(slots=True, kw_only=True)
class _Asked:
    """One request under way: what it began with, and what the trail says of it at its end. `status` is that of an end nobody told: the caller's going away."""

    route: Wire
    tenant: Tenant
    server: Server
    limits: Limits
    began: float
    deadline: float
    inline: bool
    found: int = 0
    passed: collections.Counter[str] | None = None
    first: float | None = None
    status: int = 499


@final
class Metrics:
    """Counters whose labels are of closed lists: names of tenants and routes, HTTP statuses, labels of identifiers."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # prometheus_client leaves it without types
        self.registry = CollectorRegistry()
        self._requests = Counter("discreet_requests", "Requests answered.", ["tenant", "route", "status"], registry=self.registry)
        self._found = Counter("discreet_identifiers", "Identifiers replaced.", ["tenant", "label"], registry=self.registry)
        self._running = Gauge("discreet_running", "Requests under way.", registry=self.registry)
        self._stopped = Counter("discreet_stopped", "Identifiers and canaries of the model's own.", ["tenant", "label"], registry=self.registry)
        self._filter = Histogram("discreet_filter_seconds", "Time to de-identify a request.", ["route"], registry=self.registry)

    def answered(self, tenant: str, route: str, status: int) -> None:
        """Counts one answer; `tenant` is empty where no key was right."""
        self._requests.labels(tenant, route, str(status)).inc()

    def filtered(self, tenant: str, route: str, seconds: float, counts: Mapping[str, int]) -> None:
        """Counts what one request held."""
        self._filter.labels(route).observe(seconds)
        for label, number in counts.items():
            self._found.labels(tenant, Label(label)).inc(number)

    def stopped(self, tenant: str, counts: Mapping[str, int]) -> None:
        """Counts what one answer held that must not leave."""
        for label, number in counts.items():
            self._stopped.labels(tenant, label).inc(number)

    def page(self, running: int) -> bytes:
        """Returns the text that Prometheus reads."""
        self._running.set(running)
        return generate_latest(self.registry)


@final
class Gateway(Starlette):
    """The ASGI application, and the one thing that may be done to it while it runs."""

    def __init__(self, proxy: _Proxy, **options: Any) -> None:
        super().__init__(**options)
        self._proxy = proxy

    def change(self, settings: Settings | None = None, server: Server | None = None) -> None:
        """Puts other settings, and another server, in place (None: as it was): for every request from now on; those that are under way keep theirs.

        Called from another thread than that of the event loop; what takes long is done in it.

        Raises:
            ConfigInvalid, UpstreamFailed, OperationFailed: when the keys of the identity provider cannot be had or the server does not open; then nothing has changed.
        """
        if settings is not None:
            _prepare(settings)
        self._proxy.swap(settings, server)

    def refuse(self, why: DiscreetError) -> None:
        """Puts nothing in place of the server: every request from now on is refused with the reason."""
        self._proxy.swap(None, Refusing(why=why, paths=self._proxy.paths))


def _prepare(settings: Settings) -> None:
    for policy in {tenant.policy_digest: tenant.policy for tenant in settings.tenants}.values():
        prepare(policy)


def app(
    server: Server,
    settings: Settings,
    *,
    key: Key,
    cache_salt: bool = False,
    trail: Trail | None = None,
    tracer: Tracer | None = None,
    private: frozenset[str] = frozenset(),
    learner: Learner | None = None,
) -> Gateway:
    """Returns the ASGI application.

    Args:
        server: what answers; opened and closed with the application.
        settings: who may ask, and how much.
        key: from which the keys of the tenants derive.
        cache_salt: whether the upstream (vLLM) takes a `cache_salt`, which then separates the prefix caches of the tenants.
        trail: where roll-ups of what was served are signed; None for nowhere.
        tracer: of OpenTelemetry; None for no traces.
        private: hosts of an identity provider that may be private.
        learner: keeps the prompts of those who opted in; None keeps nothing.
    """
    _prepare(settings)
    proxy = _Proxy(server, settings, key, cache_salt=cache_salt, trail=trail, tracer=tracer, private=private, learner=learner)
    routes = [Route(each.path, proxy.endpoint(each.path, proxy.exchange(each)), methods=["POST"]) for each in _wires(server)]
    others = {
        "/v1/models": proxy.models,
        "/v1/models/{model:path}": proxy.model,
        "/healthz": proxy.health,
        "/readyz": proxy.ready,
        "/metrics": proxy.metrics,
        "/openapi.json": proxy.openapi,
    }
    routes += [Route(path, proxy.endpoint(path, handle)) for path, handle in others.items()]

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        await proxy.open()
        writing = None if trail is None else asyncio.create_task(trail.keep_writing())
        try:
            yield
        finally:
            if writing is not None:
                writing.cancel()
            await proxy.close()

    return Gateway(proxy, routes=routes, exception_handlers={HTTPException: proxy.no_route}, lifespan=lifespan)


def _wires(server: Server) -> list[Wire]:
    return [each for each in WIRES if each.path in server.paths]


@final
class _Proxy:
    """The routes, and what they share."""

    def __init__(
        self,
        server: Server,
        settings: Settings,
        key: Key,
        *,
        cache_salt: bool,
        trail: Trail | None,
        tracer: Tracer | None,
        private: frozenset[str],
        learner: Learner | None,
    ) -> None:
        self._server, self._key, self._cache_salt, self._private = server, key, cache_salt, private
        self._trail, self._tracer, self._learner = trail, tracer, learner
        self._quotas, self._metrics, self._writing = Quotas(), Metrics(), False
        self._listed: tuple[Server, float, frozenset[str]] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._served: dict[Server, int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._put(settings, None if settings.provider is None else self._verifier_of(settings.provider))

    def _put(self, settings: Settings, verifier: Verifier | None) -> None:
        """Puts settings in place; a token is believed only once the keys of its provider are there."""
        self._settings, self._verifier = settings, verifier
        self._server.max_answer_bytes = settings.limits.max_answer_bytes

    def _verifier_of(self, provider: Provider) -> Verifier:
        return Verifier(provider=provider, load=partial(self._keys, provider.keys))

    @property
    def paths(self) -> frozenset[str]:
        """The routes of the server."""
        return self._server.paths

    def swap(self, settings: Settings | None, server: Server | None) -> None:
        """Puts settings and a server in place, between two steps of the event loop where it runs already; waits until they are in force."""
        if self._loop is not None:
            asyncio.run_coroutine_threadsafe(self._swap(settings, server), self._loop).result()
            return
        self._served.setdefault(self._server, 0)  # closed at the end, if it is another
        self._server, settings = server or self._server, settings or self._settings
        self._put(settings, None if settings.provider is None else self._verifier_of(settings.provider))

    async def _swap(self, settings: Settings | None, server: Server | None) -> None:
        """Opens first what has to be opened; a provider that is the same keeps its keys, so that nobody is locked out while it cannot be asked."""
        before, settings, verifier = self._server, settings or self._settings, self._verifier
        if settings.provider != self._settings.provider:
            verifier = None if settings.provider is None else self._verifier_of(settings.provider)
            if verifier is not None:
                await verifier.open()
        if server is not None and server is not before:
            await server.open()
            self._server = server
        self._put(settings, verifier)
        if self._server is not before and not self._served.get(before):
            await before.close()

    async def open(self) -> None:
        """Loads what has to be there before the first request."""
        self._loop = asyncio.get_running_loop()
        await self._server.open()
        if self._verifier is not None:
            await self._verifier.open()

    async def close(self) -> None:
        """Closes the server, and those before it that a request was still served by."""
        self._loop = None
        for server in {self._server, *self._served}:
            await server.close()

    @contextmanager
    def _pinned(self) -> Iterator[Server]:
        """Gives the server for one request, which keeps it to its end; one that was replaced meanwhile is closed after the last of them."""
        server = self._server
        self._served[server] = self._served.get(server, 0) + 1
        try:
            yield server
        finally:
            self._served[server] -= 1
            if not self._served[server]:
                del self._served[server]
                if server is not self._server:
                    self._later(server.close())

    def _later(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _keys(self, place: str) -> bytes:
        if place.startswith("https://"):
            return await upstream.fetch(place, private=self._private, max_bytes=oidc.MAX_KEYS_BYTES)
        try:
            return await run_in_threadpool(Path(place).read_bytes)
        except OSError:
            raise ConfigInvalid("a key set of the identity provider that can be read", value=Path(place).name) from None

    def endpoint(self, path: str, handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Wraps a route so that every error becomes a refusal without words of the request, and every answer is counted."""

        async def guarded(request: Request) -> Response:
            with self._span(path) as span:
                try:
                    response = await handle(request)
                except ClientDisconnect:
                    response = Response(status_code=_CLIENT_GONE)
                except DiscreetError as error:
                    response = _refuse(path, error)
                except Exception as error:
                    response = _refuse(path, unexpected(error))
                tenant = getattr(request.state, "tenant", "")
                self._metrics.answered(tenant, path, response.status_code)
                _describe(span, {"discreet.tenant": tenant, "http.response.status_code": response.status_code, **getattr(request.state, "found", {})})
                return response

        return guarded

    @contextmanager
    def _span(self, path: str) -> Iterator[Span | None]:
        """A span that says its route; exceptions, whose words may quote, are not recorded."""
        if self._tracer is None:
            yield None
            return
        with self._tracer.start_as_current_span(f"discreet {path}", record_exception=False, set_status_on_exception=False) as span:
            _describe(span, {"http.route": path})
            yield span

    async def health(self, _request: Request) -> Response:
        """`GET /healthz`: the process answers."""
        return _json({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        """`GET /readyz`: the upstream answered within the last minute."""
        await self._models(self._server)
        return _json({"status": "ready"})

    async def metrics(self, request: Request) -> Response:
        """`GET /metrics`."""
        key_hash = self._settings.metrics_key_hash
        if key_hash is None:
            await self._identify(request)
        else:
            given = request.headers.get("authorization", "").partition(" ")[2].strip()
            if not hmac.compare_digest(hash_api_key(given), key_hash):
                raise AccessDenied("the key that reads the metrics")
        return Response(self._metrics.page(self._quotas.running()), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`: those that this tenant may ask for."""
        names = sorted(await self._allowed(await self._identify(request), self._server))
        page = {"first_id": names[0] if names else None, "last_id": names[-1] if names else None, "has_more": False}
        return _json({"object": "list", "data": [_model(name) for name in names], **page})

    async def model(self, request: Request) -> Response:
        """`GET /v1/models/{model}`."""
        name = request.path_params["model"]
        await self._check_model(await self._identify(request), self._server, {"model": name})
        return _json(_model(name))

    async def openapi(self, request: Request) -> Response:
        """`GET /openapi.json`: what the tables accept, and for who shows a key the models that they may name."""
        names = sorted(await self._allowed(await self._identify(request), self._server)) if bearer(request.headers) else []
        return _json(openapi.document(_wires(self._server), models=names))

    async def no_route(self, _request: Request, error: Exception) -> Response:
        """Answers what the router refuses: no such path, or another method."""
        status = error.status_code if isinstance(error, HTTPException) else 500
        return _refuse("", NotFound("a route of this gateway", remedy=f"It serves {', '.join(sorted(self._server.paths))}."), status=status)

    def exchange(self, route: Wire) -> Callable[[Request], Awaitable[Response]]:
        """Returns the handler of one wire."""

        async def handle(request: Request) -> Response:
            began, limits = time.perf_counter(), self._settings.limits
            deadline = asyncio.get_running_loop().time() + limits.max_seconds
            tenant = await self._identify(request)
            if self._trail is not None:
                self._trail.refuse_if_broken()
            raw = await read_body(request, max_bytes=limits.max_request_bytes)
            body = wire.parse_json(raw, max_bytes=limits.max_request_bytes, max_depth=MAX_DEPTH)
            async with AsyncExitStack() as stack:
                stack.enter_context(self._quotas.admitted(tenant))
                server = stack.enter_context(self._pinned())
                inline = len(raw) <= MAX_INLINE_BYTES
                asked = _Asked(route=route, tenant=tenant, server=server, limits=limits, began=began, deadline=deadline, inline=inline)
                try:
                    response = await unless_gone(request.receive, self._answer(asked, body, stack))
                except DiscreetError as error:
                    asked.status = error.http_status
                    raise
                except Exception as error:
                    asked.status = _CLIENT_GONE if isinstance(error, ClientDisconnect) else _FAILED
                    raise
                request.state.found = {"discreet.identifiers": asked.found}
                return response

        return handle

    async def _answer(self, asked: _Asked, body: Any, stack: AsyncExitStack) -> Response:
        """De-identifies, asks, and answers; a stream takes over what has to be closed at its end."""
        route, tenant, server = asked.route, asked.tenant, asked.server
        await self._check_model(tenant, server, body)
        key = self._key.derive("tenant", tenant.name)
        conversation = Conversation(key, policy=tenant.policy, guard=tenant.guard)
        began = time.perf_counter()
        asked.passed = None if tenant.unknown is Unknown.REFUSE else collections.Counter()
        read = partial(fields.deidentify, body, route.table, conversation, tenant=key, max_chars=asked.limits.max_chars, passed=asked.passed)
        sent = read() if asked.inline else await run_in_threadpool(read)
        asked.found = sum(conversation.counts.values())
        self._metrics.filtered(tenant.name, route.path, time.perf_counter() - began, conversation.counts)
        sent = self._completed(sent, route, key)
        if self._learner is not None:
            await run_in_threadpool(self._learner.offer, person_of(body), texts_of(body))
        headers = {POLICY_HEADER: tenant.policy_digest, **server.headers}
        answer = Answer(conversation, tenant.tools)
        stack.callback(self._count, asked, body["model"], conversation)
        if sent.get("stream") and route.events is not None:
            async with _in_time(asked):
                chunks = await stack.enter_async_context(server.stream(route.path, sent))  # an earlier refusal still has its own status
            return EventStream(self._frames(asked, chunks, answer), headers={**_HEADERS, **headers}, closing=stack.pop_all())
        async with _in_time(asked):
            received = await server.ask(route.path, sent)
        if not isinstance(received, dict):
            raise UpstreamFailed("an answer that is an object")
        asked.first = time.perf_counter()
        restored = _json(received if route.events is None else answer.whole(received), headers=headers)
        asked.status = 200
        return restored

    def _count(self, asked: _Asked, model: str, conversation: Conversation) -> None:
        """Counts one request at its end, whatever the end was; a roll-up that is due is written beside the next requests."""
        self._metrics.stopped(asked.tenant.name, conversation.stopped)
        if self._trail is None:
            return
        server = asked.server
        group = Group(tenant=asked.tenant.name, policy=asked.tenant.policy_digest, model=model, server=server.digest, released=server.released)
        due = self._trail.count(
            group,
            route=asked.route.path,
            status=asked.status,
            counts=conversation.counts,
            stopped=conversation.stopped,
            passed=asked.passed or {},
            seconds=(asked.first or time.perf_counter()) - asked.began,
        )
        if due and not self._writing:
            self._writing = True
            self._later(self._roll_up(self._trail))

    async def _roll_up(self, trail: Trail) -> None:
        try:
            await run_in_threadpool(trail.write)
        except DiscreetError as error:
            unexpected(error)
        finally:
            self._writing = False

    def _completed(self, sent: dict[str, Any], route: Wire, key: Key) -> dict[str, Any]:
        """Adds what the gateway decides and no caller may: nothing is stored unasked, and caches of tenants are apart."""
        if route.path == upstream.RESPONSES:
            sent = {"store": False, **sent}
        if self._cache_salt and route.path != upstream.EMBEDDINGS:
            sent = {**sent, "cache_salt": key.derive("cache").mac(b"salt").hex()}
        return sent

    async def _frames(self, asked: _Asked, chunks: AsyncGenerator[bytes, None], answer: Answer) -> AsyncGenerator[str, None]:
        """Yields the events of an answer, restored; an error ends the stream as an error event, and what was held back stays."""
        route = asked.route
        try:
            async with aclosing(self._restored(asked, chunks, answer)) as texts:
                async for text in texts:
                    asked.first = asked.first or time.perf_counter()
                    yield text
            if route.done is not None:
                yield frame(route.done)
            asked.status = 200  # whatever ends it before (the caller, a send that takes too long, the gateway's own end) is no whole answer
        except DiscreetError as error:
            asked.status = error.http_status
            yield _error_frame(route, error)
        except Exception as error:
            asked.status = _FAILED
            yield _error_frame(route, unexpected(error))

    async def _restored(self, asked: _Asked, chunks: AsyncGenerator[bytes, None], answer: Answer) -> AsyncGenerator[str, None]:
        route = asked.route
        async with aclosing(answers.events(chunks)) as received:
            done = False
            while not done:
                async with _in_time(asked):
                    texts = await anext(received, None)
                done = texts is None or "[DONE]" in texts
                frames: list[str] = []
                for text in itertools.takewhile(lambda text: text != "[DONE]", texts or ()):
                    event = wire.parse_json(text.encode(), max_bytes=answers.MAX_EVENT_BYTES, max_depth=MAX_DEPTH)
                    for each in _events(route, answer, event):
                        frames.append(frame(wire.to_json(each), event=str(each["type"]) if route.named_events else None))
                if route.done is not None and texts is not None and "[DONE]" in texts:
                    frames += [frame(wire.to_json(each)) for each in answer.done()]
                if frames:
                    yield "".join(frames)
        if not answer.ended:
            raise UpstreamFailed("an answer to the end")

    async def _identify(self, request: Request) -> Tenant:
        """Returns the tenant of a key or a token.

        Raises:
            AccessDenied: when it is nobody's, or a header that says who asks is there twice.
        """
        if any(len(request.headers.getlist(name)) > 1 for name in ("authorization", "x-api-key")):
            raise AccessDenied("one key in one header")
        tenants, verifier, given = self._settings.tenants, self._verifier, bearer(request.headers)
        if verifier is not None and oidc.looks_like_token(given):
            tenant = claimed(tenants, await verifier.values(given))
        else:
            tenant = identify(tenants, request.headers)
        request.state.tenant = tenant.name
        return tenant

    async def _check_model(self, tenant: Tenant, server: Server, body: Any) -> None:
        name = body.get("model") if isinstance(body, dict) else None
        if not isinstance(name, str):
            raise RequestInvalid("model to be a string", value="model")
        if name not in await self._allowed(tenant, server):
            raise NotFound("a model that this tenant may use", remedy="GET /v1/models lists them.")

    async def _allowed(self, tenant: Tenant, server: Server) -> frozenset[str]:
        """Returns the models that a tenant may ask for. Behind a release there is one name, and no tenants file makes another of it."""
        if tenant.models is None:
            return await self._models(server)
        return tenant.models & await self._models(server) if server.released else tenant.models

    async def _models(self, server: Server) -> frozenset[str]:
        """Returns the names that the server lists."""
        now = time.monotonic()
        if self._listed is None or self._listed[0] is not server or now - self._listed[1] > MODELS_FOR_S:
            async with asyncio.timeout(30):
                self._listed = server, now, await server.models()
        return self._listed[2]


@asynccontextmanager
async def _in_time(asked: _Asked) -> AsyncIterator[None]:
    """Ends what takes longer than the request may, from its first byte on.

    Raises:
        OutOfTime: then.
    """
    try:
        async with asyncio.timeout_at(asked.deadline) as limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise OutOfTime(f"an answer within {asked.limits.max_seconds:g} s", remedy="Ask for a shorter one.") from None


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "type": "model", "display_name": name, "created": 0, "owned_by": "upstream"}


def _describe(span: Span | None, attributes: Mapping[str, str | int]) -> None:
    """Sets attributes of the closed list, and no other."""
    for name, value in attributes.items():
        if span is not None and name in ATTRIBUTES:
            span.set_attribute(name, value)


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
