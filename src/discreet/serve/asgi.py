"""HTTP plumbing of the gateway: keys of callers, bodies of bounded size and time, event streams that end with their reader, a server that logs no text.

Nothing here looks into a conversation. An unexpected error loses its words (they may quote values) and its traceback; a caller who goes away cancels the work that was
done for them, and the work has ended before the request has.

Does not cover: the meaning of any body.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import resource
import signal
import ssl
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

from discreet.errors import ConfigInvalid, OperationFailed, RequestInvalid, missing_extra
from discreet.keys import Key

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import Response
    from starlette.types import Receive, Scope, Send
except ImportError as error:
    raise missing_extra("serve", str(error.name)) from None

T = TypeVar("T")

READ_TIMEOUT_S = 30.0
SEND_TIMEOUT_S = 60.0
GRACE_S = 10
MAX_CONNECTIONS = 512

_log = logging.getLogger("discreet.serve")


def new_api_key() -> tuple[str, str]:
    """Returns a fresh API key, to be shown once, and its hash, to be kept. The key has 256 bits, so one SHA-256 is enough."""
    secret = base64.urlsafe_b64encode(Key.random().mac(b"api key")).decode().rstrip("=")
    return f"dk-{secret}", hash_api_key(f"dk-{secret}")


def hash_api_key(api_key: str) -> str:
    """Returns what is stored in place of an API key: its SHA-256, in hex."""
    return hashlib.sha256(api_key.encode()).hexdigest()


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Tls:
    """How callers reach the gateway over TLS 1.2 or later.

    Args:
        certificate: file with the chain, in PEM.
        key: file with its private key, in PEM.
        callers: file with the authorities whose certificates callers must show; None asks for none.

    Raises:
        ConfigInvalid: when a file cannot be read, or key and certificate do not belong together.
    """

    certificate: Path
    key: Path
    callers: Path | None = None

    def __post_init__(self) -> None:
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key)
            if self.callers is not None:
                context.load_verify_locations(self.callers)
        except (OSError, ssl.SSLError):
            raise ConfigInvalid("a certificate and its private key in PEM", value=self.certificate.name) from None

    def options(self) -> dict[str, Any]:
        """Returns what the server needs to know."""
        found: dict[str, Any] = {"ssl_certfile": str(self.certificate), "ssl_keyfile": str(self.key), "ssl_version": ssl.PROTOCOL_TLS_SERVER}
        return found if self.callers is None else {**found, "ssl_ca_certs": str(self.callers), "ssl_cert_reqs": ssl.CERT_REQUIRED}


def server(application: Starlette, *, host: str, port: int, tls: Tls | None = None, grace_s: int = GRACE_S) -> uvicorn.Server:
    """Returns the server for `run`, for those who start and stop it themselves (`should_exit`)."""
    config = uvicorn.Config(
        application,
        host=host,
        port=port,
        access_log=False,
        log_config=None,
        log_level=logging.WARNING,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_graceful_shutdown=grace_s,
        **({} if tls is None else tls.options()),
    )
    logging.getLogger("uvicorn.error").addFilter(_without_traceback)  # adding the same function twice adds it once
    return uvicorn.Server(config)


def run(
    application: Starlette, *, host: str, port: int, tls: Tls | None = None, grace_s: int = GRACE_S, on_hangup: Callable[[], None] | None = None
) -> None:
    """Serves until SIGINT or SIGTERM, lets running answers finish for at most `grace_s` seconds, and returns.

    SIGHUP calls `on_hangup` (read the settings again). The server raises the signal again once it has stopped, which would end the process before its owner has written down what was served; here it then does nothing.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # a crash leaves no prompts in a file
    with _signals_end_here(on_hangup):
        server(application, host=host, port=port, tls=tls, grace_s=grace_s).run()


@contextmanager
def _signals_end_here(on_hangup: Callable[[], None] | None) -> Iterator[None]:
    """Gives the two signals a handler that does nothing, in the thread that can; the server puts its own in front while it runs."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    if on_hangup is not None:
        before[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: on_hangup())
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _without_traceback(record: logging.LogRecord) -> bool:
    """Keeps the kind of an unexpected error, and drops its words and its traceback."""
    if record.exc_info:
        kind = record.exc_info[0]
        record.msg, record.args = "%s", ("unexpected error" if kind is None else kind.__name__,)
        record.exc_info = record.exc_text = record.stack_info = None
    return True


@final
class EventStream(Response):
    """Server-sent events (whole frames, see `frame`) that stop, and close their source, when the caller goes away."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None], *, headers: Mapping[str, str], closing: AsyncExitStack | None = None) -> None:
        """Takes over the events and what has to be closed after them, also where nobody ever reads the first one."""
        super().__init__(headers=headers)
        self._closing = closing or AsyncExitStack()
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        async with self._closing, aclosing(self._events):
            try:
                await unless_gone(receive, self._send(send))
            except ClientDisconnect:
                return
            except Exception as error:  # the server would log its words
                unexpected(error)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for event in self._events:
            async with asyncio.timeout(SEND_TIMEOUT_S):  # a caller who stops reading holds a place no longer than that
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b""})


def frame(text: str, *, event: str | None = None) -> str:
    """Returns one server-sent event; `text` has no line ends (JSON in ASCII has none)."""
    return f"data: {text}\n\n" if event is None else f"event: {event}\ndata: {text}\n\n"


def unexpected(error: Exception) -> OperationFailed:
    """Returns the error that stands for any other: its words may quote the conversation, so only its kind is kept, here and in the log."""
    _log.error("request failed: %s", type(error).__name__)
    return OperationFailed("the request to be answered", value=type(error).__name__, remedy="Try again.")


async def read_body(request: Request, *, max_bytes: int) -> bytes:
    """Reads a body of bounded size in bounded time. A compressed one is refused: its size is known too late."""
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise RequestInvalid("a request that is not compressed", value="content-encoding")
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RequestInvalid("content-type application/json", value="content-type")
    body = bytearray()
    try:
        async with asyncio.timeout(READ_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise RequestInvalid(f"a request of at most {max_bytes} bytes", remedy="Send a shorter conversation.")
    except TimeoutError:
        raise RequestInvalid(f"a request that arrives within {READ_TIMEOUT_S:.0f} s") from None
    return bytes(body)


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Returns the result of `work`, or cancels it, waits for its end and raises `ClientDisconnect` when the caller goes away."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for unfinished in (task, gone):
            unfinished.cancel()  # no effect on a finished one
        await asyncio.wait({task, gone})
    if task.cancelled():
        raise ClientDisconnect
    return task.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
