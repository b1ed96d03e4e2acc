"""What stands behind the gateway, and the one server elsewhere that it may call: named once, resolved once, never followed elsewhere.

The URL is an allowlist of one host. Its name is resolved when the gateway starts; addresses that are not global (loopback, private, link-local, metadata services) are refused
unless the operator lists that host, and every later connection goes to the address that was checked, under the host's name for TLS and for `Host`, so that a name that
resolves differently later (DNS rebinding) reaches nobody. Redirects are not followed, proxies of the environment are not used, certificates are verified against the host's name, plain HTTP is
for listed hosts only, and only the paths of the gateway's own routes exist.

Whatever the upstream says when it fails stays here: its words may echo a prompt. The caller gets a status and our words.

Does not cover: several upstreams behind one gateway, failover, HTTP/2.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from collections.abc import AsyncGenerator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol, final
from urllib.parse import urlsplit

from discreet.errors import ConfigInvalid, DiscreetError, Overloaded, RequestInvalid, UpstreamFailed, missing_extra
from discreet.evidence.statement import digest_of
from discreet.record import Digest

try:
    import httpx
except ImportError as error:
    raise missing_extra("serve", str(error.name)) from None

CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, MODELS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/messages",
    "/v1/models",
)
PATHS = frozenset((CHAT, COMPLETIONS, EMBEDDINGS, RESPONSES, MESSAGES, MODELS))
ANTHROPIC_VERSION = "2023-06-01"

KEEP_ALIVE_S = 2.0
"""Idle connections are dropped before the servers do it (uvicorn, and so vLLM, after five seconds): a request that meets a connection being closed would fail."""

_DEFAULT_PORTS = {"https": 443, "http": 80}


class Server(Protocol):
    """Whatever stands behind the gateway: a server elsewhere (`Upstream`), or a model in this process (`local.Local`).

    Attributes:
        paths: the routes it has, of `PATHS`.
        headers: said with every answer of it.
        digest: of who answers: the adapter that was released, or the name of a server elsewhere.
        released: whether it is a verified release.
        name: how the operator knows it.
        max_answer_bytes: largest answer that is read, where that is not bounded otherwise.
    """

    @property
    def paths(self) -> frozenset[str]: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    @property
    def digest(self) -> Digest: ...
    @property
    def released(self) -> bool: ...
    @property
    def name(self) -> str: ...

    max_answer_bytes: int

    async def open(self) -> None:
        """Called in the event loop before the first request."""
        ...

    async def close(self) -> None:
        """Called after the last one."""
        ...

    async def models(self) -> frozenset[str]:
        """Returns the names under which callers may ask for a model."""
        ...

    async def ask(self, path: str, body: Mapping[str, Any]) -> Any:
        """Returns the JSON that answers a de-identified request."""
        ...

    def stream(self, path: str, body: Mapping[str, Any]) -> AbstractAsyncContextManager[AsyncGenerator[bytes, None]]:
        """Gives the bytes of the server-sent events that answer it."""
        ...


@final
@dataclass(slots=True, kw_only=True, eq=False)
class Refusing:
    """In place of a release that may be served no more: whoever asks gets the reason, and no model is held.

    Args:
        why: the reason.
        paths: those of the server that was there.
    """

    why: DiscreetError
    paths: frozenset[str]
    headers: Mapping[str, str] = field(default_factory=dict, init=False)
    digest: Digest = field(default=digest_of(b""), init=False)
    released: bool = field(default=True, init=False)
    name: str = field(default="nothing", init=False)
    max_answer_bytes: int = field(default=0, init=False)

    async def open(self) -> None:
        """See `Server.open`."""

    async def close(self) -> None:
        """See `Server.close`."""

    async def models(self) -> frozenset[str]:
        """Raises the reason: every request asks for the models first."""
        self._refuse()

    async def ask(self, _path: str, _body: Mapping[str, Any]) -> Any:
        """Raises the reason."""
        self._refuse()

    def stream(self, _path: str, _body: Mapping[str, Any]) -> AbstractAsyncContextManager[AsyncGenerator[bytes, None]]:
        """Raises the reason."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise type(self.why)(
            self.why.rule, value=self.why.value, remedy=self.why.remedy
        )  # a fresh one: an exception that is raised again keeps every frame


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where the upstream is, checked. `base` has the address in place of the host."""

    base: str
    host: str
    authority: str


def resolve(url: str, *, private: frozenset[str] = frozenset()) -> Address:
    """Returns the address of an upstream after checking it; the only place where its name is looked up.

    Args:
        url: `https://host[:port][/prefix]`, with or without `/v1` at its end.
        private: hosts that may have addresses that are not global, and may be spoken to in plain HTTP.

    Raises:
        ConfigInvalid: when the URL is not of that form, its host is not listed but private, or it would travel unencrypted.
        UpstreamFailed: when the name cannot be resolved.
    """
    parts = urlsplit(url)
    try:
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
    except (ValueError, KeyError):
        raise ConfigInvalid("an upstream of the form https://host[:port][/prefix]") from None
    host = parts.hostname or ""
    if not host or parts.username or parts.password or parts.query or parts.fragment:
        raise ConfigInvalid("an upstream of the form https://host[:port][/prefix]", remedy="Keys belong into the environment, not into the URL.")
    if parts.scheme == "http" and host not in private:
        raise ConfigInvalid("an upstream that is spoken to over TLS", value=host, remedy=f"Use https, or say --allow-private {host}.")
    address = _look_up(host, port, private)
    numeric = f"[{address}]" if ":" in address else address
    prefix = parts.path.rstrip("/").removesuffix("/v1")
    shown = f"[{host}]" if ":" in host else host
    authority = shown if port == _DEFAULT_PORTS[parts.scheme] else f"{shown}:{port}"
    return Address(base=f"{parts.scheme}://{numeric}:{port}{prefix}", host=host, authority=authority)


async def fetch(url: str, *, private: frozenset[str] = frozenset(), max_bytes: int, transport: httpx.AsyncBaseTransport | None = None) -> bytes:
    """Returns a document of another server (a key set), resolved and checked as the upstream is, in at most ten seconds.

    Raises:
        ConfigInvalid: as `resolve`.
        UpstreamFailed: when it cannot be had, redirects, or is too large.
    """
    address = resolve(url, private=private)
    received = bytearray()
    try:
        async with httpx.AsyncClient(transport=transport, follow_redirects=False, trust_env=False, timeout=10) as client:
            headers = {"host": address.authority, "accept": "application/json", "accept-encoding": "identity", "user-agent": "discreet"}
            extensions = {"sni_hostname": address.host}
            async with client.stream("GET", address.base, headers=headers, extensions=extensions) as response:
                async for chunk in response.aiter_bytes():
                    received += chunk
                    if response.status_code != 200 or len(received) > max_bytes:
                        break
                status = response.status_code
    except httpx.HTTPError:
        status = 0
    if status != 200 or len(received) > max_bytes:
        raise UpstreamFailed(f"a key set of at most {max_bytes} bytes, with status 200", value=status)
    return bytes(received)


def _look_up(host: str, port: int, private: frozenset[str]) -> str:
    try:
        found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    except OSError:
        raise UpstreamFailed("an upstream whose name resolves", value=host) from None
    if host not in private and not all(_is_global(address) for address in found):
        remedy = f"If it is yours, say --allow-private {host}."
        raise ConfigInvalid("an upstream with global addresses alone", value=host, remedy=remedy)
    return found[0]


def _is_global(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    inner = getattr(parsed, "ipv4_mapped", None) or getattr(parsed, "sixtofour", None) or parsed
    return bool(inner.is_global and parsed.is_global and not inner.is_multicast)


@final
@dataclass(slots=True, kw_only=True, eq=False)
class Upstream:
    """A client of the one server.

    Args:
        address: as `resolve` gives it.
        api_key: the gateway's own key there; callers never send one through.
        max_answer_bytes: largest answer that is read, >= 1; an answer keeps the one that it began with.
        timeout_s: for a connection, and for each silence within an answer, > 0.
        transport: for tests; None for the network.
    """

    address: Address
    api_key: str = field(default="", repr=False)
    max_answer_bytes: int = 32_000_000
    timeout_s: float = 120.0
    transport: httpx.AsyncBaseTransport | None = None
    paths: frozenset[str] = field(default=PATHS - {MODELS}, init=False)
    headers: Mapping[str, str] = field(default_factory=dict, init=False)
    digest: Digest = field(init=False)
    released: bool = field(default=False, init=False)
    _open: httpx.AsyncBaseTransport | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Computes the digest of the server's name."""
        self.digest = digest_of(self.address.authority.encode())

    @property
    def name(self) -> str:
        """See `Server`."""
        return self.address.host

    async def open(self) -> None:
        """Opens the pool of connections, in the loop that will use it."""
        limits = httpx.Limits(max_connections=512, max_keepalive_connections=64, keepalive_expiry=KEEP_ALIVE_S)
        self._open = self.transport or httpx.AsyncHTTPTransport(trust_env=False, limits=limits)

    async def close(self) -> None:
        """Closes it."""
        if self._open is not None:
            await self._open.aclose()

    async def models(self) -> frozenset[str]:
        """Returns the names that it lists. Raises like `ask`."""
        listed = await self.ask(MODELS)
        return frozenset(str(model["id"]) for model in listed["data"])

    async def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Returns the JSON that the upstream answers.

        Raises:
            Overloaded, RequestInvalid, UpstreamFailed: as `stream`, and when the answer is not JSON.
        """
        received = bytearray()
        async with self.stream(path, body) as chunks:
            async for chunk in chunks:
                received += chunk
        try:
            return json.loads(received)
        except (ValueError, RecursionError):
            raise UpstreamFailed("an answer that is JSON") from None

    @asynccontextmanager
    async def stream(self, path: str, body: Mapping[str, Any] | None = None) -> AsyncGenerator[AsyncGenerator[bytes, None], None]:
        """Gives the bytes of the answer while they come.

        Args:
            path: one of `PATHS`.
            body: what is posted; None asks with GET.

        Raises:
            Overloaded: when the upstream says 429.
            RequestInvalid: when it says that the request is wrong.
            UpstreamFailed: when it cannot be reached, redirects, or answers any other status.
        """
        if path not in PATHS or self._open is None:
            raise UpstreamFailed("a path of this gateway, on an open connection")
        limit = self.max_answer_bytes
        method, content = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        timeout = httpx.Timeout(self.timeout_s, connect=10.0).as_dict()
        extensions = {"sni_hostname": self.address.host, "timeout": timeout}
        request = httpx.Request(method, self.address.base + path, content=content, headers=self._headers(path), extensions=extensions)
        try:
            response = await self._open.handle_async_request(
                request
            )  # a transport follows nothing and asks nobody for credentials, and is quicker than a client
            try:
                _check(response.status_code)
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise UpstreamFailed("an answer that is not compressed")  # nobody asked for it, and how large it is would be known too late
                yield _bounded(response, limit)
            finally:
                await response.aclose()
        except httpx.HTTPError as error:
            failed: DiscreetError = UpstreamFailed("the upstream to answer", value=type(error).__name__)
        else:
            return
        raise failed

    def _headers(self, path: str) -> dict[str, str]:
        headers = {"host": self.address.authority, "accept-encoding": "identity", "user-agent": "discreet"}
        headers["content-type"] = "application/json"
        if self.api_key and path != MESSAGES:
            headers["authorization"] = f"Bearer {self.api_key}"
        if path in (MESSAGES, MODELS):
            headers["anthropic-version"] = ANTHROPIC_VERSION
            headers.update({"x-api-key": self.api_key} if self.api_key else {})
        return headers


async def _bounded(response: httpx.Response, max_bytes: int) -> AsyncGenerator[bytes, None]:
    received = 0
    async for chunk in response.aiter_bytes():
        received += len(chunk)
        if received > max_bytes:
            raise UpstreamFailed(f"an answer of at most {max_bytes} bytes")
        yield chunk


def _check(status: int) -> None:
    if status == 200:
        return
    if status == 429:
        raise Overloaded("an upstream with room for another request", value=status, remedy="Try again shortly.")
    if status in (400, 404, 413, 422):
        raise RequestInvalid(
            "a request that the upstream accepts", value=status, remedy="Its own words are not repeated: they may quote the request."
        )
    raise UpstreamFailed("the upstream to answer with status 200", value=status)
