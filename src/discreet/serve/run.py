"""`discreet serve`: the gateway from a command line to a server that stops gracefully, whatever stands behind it.

On SIGHUP it reads the tenants file again, and then asks what stands behind it for its server again (a project: for its release). Each is in force for every request from then on where it is right, whatever
became of the other: a key that was revoked is refused even when nothing can be served. What is not right stays as it was and is named on stderr, but a release that was withdrawn or withheld: from then on every
request is refused with the reason. What is under way keeps the policy and the model it began with; a model that was replaced is let go of after its last answer.
"""

from __future__ import annotations

import ipaddress
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from discreet.deid.policy import Policy
from discreet.errors import DiscreetError, NotReleased, missing_extra
from discreet.keys import Key
from discreet.serve import asgi, proxy
from discreet.serve.filters import POLICY
from discreet.serve.learning import Learner
from discreet.serve.tenants import Limits, Settings, Tenant, load
from discreet.serve.trail import Trail, opened
from discreet.serve.upstream import Server, Upstream, resolve

try:
    from starlette.routing import BaseRoute
except ImportError as error:
    raise missing_extra("serve", str(error.name)) from None

Say = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says of the gateway itself.

    Args:
        host, port: where the gateway listens.
        tenants: tenants file; None for one tenant with a fresh key.
        private: hosts that may be private, or spoken to in plain HTTP.
        cache_salt: whether the server takes one.
        tls: certificate and key; None for plain HTTP.
        traces: URL of an OTLP collector; None for no traces.
        grace_s: how long running answers may take after a signal to stop, in seconds, >= 0.
    """

    host: str
    port: int
    tenants: Path | None = None
    private: frozenset[str] = frozenset()
    cache_salt: bool = False
    tls: asgi.Tls | None = None
    traces: str | None = None
    grace_s: int = asgi.GRACE_S


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """What stands behind a gateway.

    Args:
        server: returns it, verified; called again on SIGHUP, and returns the same object where nothing has changed.
        key: from which the keys of the tenants derive.
        trail: where roll-ups of what was served are signed; None for nowhere.
        policy: of the channel prompt, where a tenant says nothing else.
        limits: of a request, where there is no tenants file.
        routes: pages that are served beside the gateway.
    """

    server: Callable[[], Server]
    key: Key
    trail: Trail | None
    policy: Policy = POLICY
    limits: Limits = field(default_factory=Limits)
    routes: Sequence[BaseRoute] = ()

    def write(self) -> None:
        """Signs what was counted since the last roll-up."""
        if self.trail is not None:
            self.trail.write()


@contextmanager
def elsewhere(url: str, *, private: frozenset[str], key_env: str, trail: Path | None) -> Iterator[Behind]:
    """Gives the server of a URL, and the gateway's own trail.

    Args:
        url: of the one server.
        private: hosts that may be private, or spoken to in plain HTTP.
        key_env: environment variable with the gateway's key there.
        trail: folder of the gateway's own log; None for none.

    Raises:
        ConfigInvalid, UpstreamFailed, KeyUnavailable: when one of them cannot be used.
    """
    server = Upstream(address=resolve(url, private=private), api_key=os.environ.get(key_env, ""))
    with ExitStack() as stack:
        kept = None if trail is None else stack.enter_context(opened(trail))
        yield Behind(server=lambda: server, key=Key.random(), trail=kept)


def run(options: Options, behind: Behind, *, say: Say, learner: Learner | None = None) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        options: of the command line.
        behind: what stands behind the gateway.
        learner: keeps the prompts of those who opted in; None keeps nothing.
        say: prints a line for the operator; gets the fresh key where there is no tenants file.

    Raises:
        ConfigInvalid, UpstreamFailed, NotReleased, EvidenceInvalid, DigestMismatch: before any port is opened.
    """
    url = f"{'http' if options.tls is None else 'https'}://{options.host}:{options.port}"
    server = behind.server()
    say(f"gateway    {url}/v1  ->  {server.name}")
    if behind.routes:
        say(f"dashboard  {url}/")
    if options.tls is None and not _is_loopback(options.host):
        say("warning    plain HTTP beyond this machine: give --tls-cert and --tls-key, or put a proxy that terminates TLS in front")
    settings = _fresh(url, behind, say) if options.tenants is None else load(options.tenants, policy=behind.policy)
    say(f"tenants    {len(settings.tenants)}")
    with ExitStack() as stack:
        application = proxy.app(
            server,
            settings,
            key=behind.key,
            cache_salt=options.cache_salt,
            trail=behind.trail,
            tracer=None if options.traces is None else _tracer(options.traces, stack),
            private=options.private,
            learner=learner,
        )
        application.router.routes.extend(behind.routes)
        reload = _reloader(application, options.tenants, behind, say)
        asgi.run(application, host=options.host, port=options.port, tls=options.tls, grace_s=options.grace_s, on_hangup=reload)


def _fresh(url: str, behind: Behind, say: Say) -> Settings:
    api_key, hashed = asgi.new_api_key()
    say(f'key (shown once)  {api_key}\n\nOpenAI(base_url="{url}/v1", api_key="{api_key}")')
    return Settings(tenants=(Tenant(name="default", key_hashes=(hashed,), policy=behind.policy),), limits=behind.limits)


def _reloader(application: proxy.Gateway, path: Path | None, behind: Behind, say: Say) -> Callable[[], None]:
    """Returns what a signal calls: the work is done in a thread of its own, one at a time, while requests are answered."""
    one = threading.Lock()

    def tenants() -> str | None:
        if path is None:
            return None
        application.change(load(path, policy=behind.policy))
        return path.name

    def server() -> str:
        try:
            found = behind.server()
        except NotReleased as error:
            application.refuse(error)
            return f"nothing is served: {error}"
        application.change(server=found)
        return found.name

    def reload() -> None:
        with one:
            for name, again in (("tenants file", tenants), ("server", server)):
                try:
                    done = again()
                except DiscreetError as error:
                    say(f"not reloaded, the {name} before stays in force: {error}")
                except Exception as error:  # its words may quote a file
                    say(f"not reloaded, the {name} before stays in force: {type(error).__name__}")
                else:
                    if done is not None:
                        say(f"reloaded   {done}")

    return lambda: threading.Thread(target=reload, daemon=True).start()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _tracer(url: str, stack: ExitStack) -> Any:
    """Returns a tracer that sends its spans to a collector, in batches, until the gateway ends. The resource names the service and nothing of the machine."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise missing_extra("otel", str(error.name)) from None
    provider = TracerProvider(resource=Resource({"service.name": "discreet-gateway"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
    stack.callback(provider.shutdown)
    return provider.get_tracer("discreet.serve")
