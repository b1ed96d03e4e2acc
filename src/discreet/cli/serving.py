"""`discreet serve`: the released model, or a gateway in front of any other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from discreet.cli.shared import HERE, Folder, stderr, stdout
from discreet.errors import ConfigInvalid, RequestInvalid

commands = typer.Typer()


@commands.command()
def serve(
    project: Folder = HERE,
    port: Annotated[int | None, typer.Option(help="Port; default from discreet.toml.")] = None,
    upstream: Annotated[
        str | None, typer.Option(help="URL of an OpenAI- or Anthropic-compatible server: the gateway alone, no project needed.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1, or from discreet.toml.")] = None,
    tenants: Annotated[Path | None, typer.Option(help="TOML file of tenants, keys and quotas (docs/gateway.md); left out, one fresh key.")] = None,
    allow_private: Annotated[list[str] | None, typer.Option(help="Host that may be private, or plain http; may be repeated.")] = None,
    upstream_key_env: Annotated[str | None, typer.Option(help="Environment variable with the upstream's API key; default OPENAI_API_KEY.")] = None,
    cache_salt: Annotated[bool, typer.Option("--cache-salt", help="Send vLLM a cache_salt for each tenant.")] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain in PEM: callers speak TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of the certificate, in PEM.")] = None,
    tls_callers: Annotated[Path | None, typer.Option(help="Authorities in PEM whose certificates callers must show.")] = None,
    trail: Annotated[Path | None, typer.Option(help="Folder of the gateway's own signed log (with --upstream); default .discreet-gateway.")] = None,
    no_trail: Annotated[bool, typer.Option("--no-trail", help="Keep no signed log of what was served.")] = False,
    traces: Annotated[str | None, typer.Option(help="URL of an OTLP collector for traces, such as http://127.0.0.1:4318/v1/traces.")] = None,
    grace: Annotated[int, typer.Option(min=0, help="Seconds that running answers may take after a signal to stop.")] = 10,
    learn: Annotated[
        str | None,
        typer.Option(help="Source of the project (-C) that takes the prompts of people who granted its purpose; left out, nothing is kept."),
    ] = None,
    new_key: Annotated[bool, typer.Option("--new-key", help="Print a fresh API key and its hash for the tenants file, and stop.")] = False,
) -> None:
    """Starts the gateway and the dashboard from the verified release, or the privacy gateway alone in front of another server."""
    if new_key:
        _new_key()
        return
    from discreet.serve import run
    from discreet.serve.asgi import Tls

    if (tls_cert is None) != (tls_key is None) or (tls_callers and not tls_cert):
        raise ConfigInvalid("--tls-cert and --tls-key together", remedy="--tls-callers needs both.")
    if upstream is None and (cache_salt or no_trail or trail or upstream_key_env):
        raise RequestInvalid(
            "--cache-salt, --trail, --no-trail and --upstream-key-env together with --upstream",
            remedy="A release is served into the log of its project.",
        )
    private = frozenset(allow_private or ())
    with ExitStack() as stack:
        if upstream is None:
            house, behind = stack.enter_context(_released(project))
            host, port = host or house.project.serve.host, house.project.serve.port if port is None else port
        else:
            kept = None if no_trail else trail or Path(".discreet-gateway")
            behind = stack.enter_context(run.elsewhere(upstream, private=private, key_env=upstream_key_env or "OPENAI_API_KEY", trail=kept))
            if kept is not None:
                stderr.print(f"trail      {kept} (discreet evidence export --trail {kept})", markup=False, soft_wrap=True)
        options = run.Options(
            host=host or "127.0.0.1",
            port=8765 if port is None else port,
            tenants=tenants,
            private=private,
            cache_salt=cache_salt,
            tls=None if tls_cert is None or tls_key is None else Tls(certificate=tls_cert, key=tls_key, callers=tls_callers),
            traces=traces,
            grace_s=grace,
        )
        learner = None if learn is None else stack.enter_context(_learner(project, learn))
        run.run(options, behind, say=lambda line: stderr.print(line, markup=False, soft_wrap=True), learner=learner)


@contextmanager
def _released(project: Path) -> Iterator[Any]:
    """Gives the project and what stands behind its gateway, with the dashboard beside it."""
    from discreet import pipeline
    from discreet.web import pages

    with pipeline.open_house(project, exclusive=False) as house:
        behind = pipeline.behind(house)
        try:
            yield house, replace(behind, routes=pages.routes(pages.HouseProvider(house)))
        finally:
            behind.write()


@contextmanager
def _learner(project: Path, source: str) -> Iterator[Any]:
    from discreet import pipeline
    from discreet.governance.access import Action, current_user
    from discreet.serve.learning import Learner

    with pipeline.open_house(project, exclusive=False) as house:
        house.access.require(Action.SERVE, who=current_user())
        yield Learner(house.project, source, keyring=house.keyring, consent=house.consent)


def _new_key() -> None:
    from discreet.serve import asgi

    api_key, hashed = asgi.new_api_key()
    stderr.print("The key goes to the tenant, the hash into the tenants file; the key is not kept.", markup=False)
    stdout.print(f"key         {api_key}\nkey_sha256  {hashed}", markup=False)
