"""`discreet serve --upstream`: the gateway alone, from a command line to a server that stops gracefully.

It reads the tenants file again on SIGHUP: a file that is right is in force for every request from then on, one that is not changes nothing and is named on stderr. What is under way
keeps the policy it began with.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from discreet.errors import DiscreetError, missing_extra
from discreet.keys import Key
from discreet.serve import asgi, proxy
from discreet.serve.learning import Learner
from discreet.serve.tenants import Settings, Tenant, load
from discreet.serve.trail import opened
from discreet.serve.upstream import Upstream, resolve

Say = Callable[[str], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says.

    Args:
        upstream: URL of the one server.
        host, port: where the gateway listens.
        tenants: tenants file; None for one tenant with a fresh key.
        private: hosts that may be private, or spoken to in plain HTTP.
        key_env: environment variable with the gateway's key at the upstream.
        cache_salt: whether the upstream takes one.
        tls: certificate and key; None for plain HTTP.
        trail: folder of the gateway's own log; None for none.
        traces: URL of an OTLP collector; None for no traces.
        grace_s: how long running answers may take after a signal to stop, in seconds, >= 0.
    """

    upstream: str
    host: str
    port: int
    tenants: Path | None = None
    private: frozenset[str] = frozenset()
    key_env: str = "OPENAI_API_KEY"
    cache_salt: bool = False
    tls: asgi.Tls | None = None
    trail: Path | None = None
    traces: str | None = None
    grace_s: int = asgi.GRACE_S


def run(options: Options, *, say: Say, learner: Learner | None = None) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        options: of the command line.
        learner: keeps the prompts of those who opted in; None keeps nothing.
        say: prints a line for the operator; gets the fresh key where there is no tenants file.

    Raises:
        ConfigInvalid, UpstreamFailed, KeyUnavailable: before any port is opened.
    """
    server = Upstream(address=resolve(options.upstream, private=options.private), api_key=os.environ.get(options.key_env, ""))
    url = f"{'http' if options.tls is None else 'https'}://{options.host}:{options.port}"
    say(f"gateway    {url}/v1  ->  {server.address.host}")
    if options.tls is None and not _is_loopback(options.host):
        say("warning    plain HTTP beyond this machine: give --tls-cert and --tls-key, or put a proxy that terminates TLS in front")
    settings = _fresh(url, say) if options.tenants is None else load(options.tenants)
    say(f"tenants    {len(settings.tenants)}")
    with ExitStack() as stack:
        trail = None if options.trail is None else stack.enter_context(opened(options.trail, server=server.address.authority))
        say(f"trail      {'none' if trail is None else f'{options.trail} (discreet evidence export --trail {options.trail})'}")
        tracer = None if options.traces is None else _tracer(options.traces, stack)
        application = proxy.app(
            server, settings, key=Key.random(), cache_salt=options.cache_salt, trail=trail, tracer=tracer, private=options.private, learner=learner
        )
        reload = None if options.tenants is None else _reloader(application, options.tenants, say)
        asgi.run(application, host=options.host, port=options.port, tls=options.tls, grace_s=options.grace_s, on_hangup=reload)


def _fresh(url: str, say: Say) -> Settings:
    api_key, hashed = asgi.new_api_key()
    say(f'key (shown once)  {api_key}\n\nOpenAI(base_url="{url}/v1", api_key="{api_key}")')
    return Settings(tenants=(Tenant(name="default", key_hashes=(hashed,)),))


def _reloader(application: proxy.Gateway, path: Path, say: Say) -> Callable[[], None]:
    def reload() -> None:
        try:
            application.change(load(path))
        except DiscreetError as error:
            say(f"not reloaded, the old settings stay: {error}")
        else:
            say(f"reloaded   {path.name}")

    return reload


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
