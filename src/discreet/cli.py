"""Verbs, each short, each one call into the pipeline, the report or one library.

With `--json` a command prints exactly one JSON document on stdout; logs and progress go to stderr. Exit codes: 0 done, 2 usage, 3 refused, 4 verification
failed, 1 other. A user's mistake never ends in a traceback; an unexpected error prints its type and place only, because its message could quote text
(set DISCREET_DEBUG=1 to see it all).
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup
from typer.exceptions import TyperException

from discreet import __version__
from discreet.errors import ConfigInvalid, DiscreetError, NotFound, NotReleased, PlanInvalid, RequestInvalid, SourceMissing

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help="Sensitive text to a language model that keeps it, with proof."
)
privacy = typer.Typer(no_args_is_help=True, help="What a mechanism costs, without a project.")
budget = typer.Typer(no_args_is_help=True, help="Privacy budgets: open, show, reserve.")
consent = typer.Typer(no_args_is_help=True, help="Grants and withdrawals of the people whose data it is.")
catalog = typer.Typer(no_args_is_help=True, help="What data exists, whose it is, what for.")
evidence = typer.Typer(no_args_is_help=True, help="The signed log: export and verify.")
access = typer.Typer(no_args_is_help=True, help="Who may do what: approvals and the broken glass.")
app.add_typer(access, name="access")
federate = typer.Typer(no_args_is_help=True, help="A fleet that trains together and shows nobody its data.")
app.add_typer(federate, name="federate")


class _RedactGroup(TyperGroup):
    """`discreet redact FILE` is `discreet redact text FILE`; a file that is called like a subcommand is given as ./calibrate."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = next((part for part in args if not part.startswith("-") or part == "-"), None)
        return super().parse_args(ctx, args if args[:1] == ["--help"] or (args and named == args[0] and named in self.commands) else ["text", *args])


redacting = typer.Typer(cls=_RedactGroup, help="Removes identifiers from text (FILE or -); calibrates thresholds on labelled samples.")
app.add_typer(redacting, name="redact")
for name, group in (("privacy", privacy), ("budget", budget), ("consent", consent), ("catalog", catalog), ("evidence", evidence)):
    app.add_typer(group, name=name)

T = TypeVar("T")

stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False, soft_wrap=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Folder = Annotated[Path, typer.Option("--project", "-C", help="Folder of the project's discreet.toml.")]
Fleet = Annotated[Path, typer.Option("--fleet", "-C", help="Folder of fleet.toml.")]
HERE = Path()


def _print(as_json: bool, document: Mapping[str, Any], lines: Iterable[str]) -> None:
    if as_json:
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        for line in lines:
            stdout.print(line, markup=False)


# --- the story ------------------------------------------------------------------------------------------------------------------------------------


@app.command()
def demo(
    fast: Annotated[bool, typer.Option("--fast", help="A tiny model built on the spot; the whole story in minutes.")] = False,
    folder: Annotated[Path | None, typer.Option("--dir", help="Folder of the demo project; default ./demo/hospital or ./demo/fast.")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete the demo folder first.")] = False,
    serve: Annotated[bool | None, typer.Option("--serve/--no-serve", help="Start the gateway and the dashboard at the end; default: ask.")] = None,
    as_json: Json = False,
) -> None:
    """Tells the whole story on a generated hospital: from notes to a private, audited, served model."""
    from discreet import demo as story

    home = folder or Path("demo") / ("fast" if fast else "hospital")
    if fresh and home.is_dir():
        story.remove(home)
    outcome = story.tell(home, fast=fast, observer=_Bars())
    _print(as_json, outcome.to_json(), outcome.lines())
    asked = serve is None and not as_json and sys.stdin.isatty() and typer.confirm("Start the gateway and the dashboard?", default=True, err=True)
    if serve or asked:
        serve_model(home)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="New project folder.")],
    example: Annotated[
        str, typer.Option("--example", help="hospital (generated corpus), plain (your own data) or fleet (three hospitals).")
    ] = "plain",
    as_json: Json = False,
) -> None:
    """Makes a project folder with a commented discreet.toml."""
    from discreet import demo as story

    if example == "fleet":
        from discreet import federate as fleets

        made = fleets.init_fleet(folder)
        then = [f"discreet federate simulate -C {folder}"]
        _print(as_json, {"folder": str(folder), "files": made, "next": then}, [*(f"{folder}/{name}" for name in made), *then])
        return
    created = story.init_project(folder, example=example)
    following = [f"discreet plan -C {folder}", f"discreet run -C {folder}"]
    _print(as_json, {"folder": str(folder), "files": created, "next": following}, [*(f"{folder}/{name}" for name in created), *following])


@app.command()
def run(
    stage: Annotated[str | None, typer.Argument(help="ingest, train, audit or release; all of them, and the report, when left out.")] = None,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Runs the project's pipeline, or up to one stage of it; resumes where it stopped."""
    from discreet import pipeline
    from discreet import report as reports

    with pipeline.open_house(project) as house:
        before = pipeline.finished(house)
        try:
            outcome = pipeline.run(house, until=stage, observer=_Bars())
        except NotReleased:
            reports.write(house.log, house.project.root)
            raise
        written = reports.write(house.log, house.project.root)[0] if stage is None else None
        sentence = reports.of(house.log).sentence
    trained = outcome.get("train", {})
    document = {
        "run": trained.get("run"),
        "stages": [{"stage": name, "state": "skipped" if name in before else "done"} for name in outcome],
        "sentence": sentence,
        **({"guarantee": trained["guarantee"]} if trained else {}),
        **({"verdict": outcome["audit"]["verdict"]} if "audit" in outcome else {}),
        **({"release": outcome["release"]["name"]} if "release" in outcome else {}),
        **({"report": str(written)} if written else {}),
    }
    _print(as_json, document, [*(f"{s['stage']}: {s['state']}" for s in document["stages"]), sentence, *([f"report: {written}"] if written else [])])


def _one_stage(name: str, project: Path, as_json: bool) -> None:
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        result = pipeline.run(house, until=name, observer=_Bars())[name]
    _print(as_json, result, [f"{key}: {value}" for key, value in _flat(result)])


@app.command()
def train(
    search: Annotated[
        bool, typer.Option("--search", help="Try the settings of [search]; the whole search is one charge, only its winner leaves.")
    ] = False,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Trains under differential privacy: reserves and spends the budget, then takes the noisy steps. On several processes: `torchrun --no-python ... discreet train`."""
    from discreet import config

    if search is not config.load(project).search.declared:
        remedy = (
            "Declare candidates such as learning_rate = [0.001, 0.004]."
            if search
            else "Give --search, or remove [search]: a search costs more than a run."
        )
        raise RequestInvalid("--search exactly where [search] declares candidates", remedy=remedy)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _one_stage("train", project, as_json)
        return
    from discreet import pipeline

    if (result := pipeline.train_together(project, _Bars())) is not None:
        _print(as_json, result, [f"{key}: {value}" for key, value in _flat(result)])


@app.command()
def audit(
    project: Folder = HERE,
    model: Annotated[str, typer.Option("--model", help="Audit this model folder instead of a project: no project is needed.")] = "",
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Folder of an adapter on --model; its base becomes the reference.")] = None,
    members: Annotated[
        Path | None, typer.Option("--members", help="Texts it was trained on: one a line, or JSON lines with text and subject.")
    ] = None,
    non_members: Annotated[Path | None, typer.Option("--non-members", help="Texts of the same kind that it never saw.")] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="What the model claims; with --delta.")] = None,
    delta: Annotated[float | None, typer.Option("--delta")] = None,
    gaussian: Annotated[bool, typer.Option("--gaussian", help="The claim is a Gaussian mechanism's: a sharper curve.")] = False,
    level: Annotated[float, typer.Option("--level", help="Probability of a false FAIL.")] = 0.05,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with the curves here.")] = None,
    as_json: Json = False,
) -> None:
    """Attacks the trained model and gives PASS, FAIL or INCONCLUSIVE; with --model any causal language model."""
    if not model:
        _one_stage("audit", project, as_json)
        return
    from discreet import report as reports
    from discreet.audit import external

    if members is None or non_members is None:
        raise RequestInvalid("--members and --non-members beside --model", remedy="One text a line, at least 20 in each.")
    if (epsilon is None) != (delta is None):
        raise RequestInvalid("--epsilon and --delta together, or neither")
    missing = next((path for path in (members, non_members) if not path.is_file()), None)
    if missing is not None:
        raise SourceMissing("a file of texts", value=missing.name)
    loose = None if epsilon is None or delta is None else external.LooseTradeOff(epsilon=epsilon, delta=delta)
    claim = external.gaussian(loose) if loose is not None and gaussian else loose
    found = external.audit(
        model, adapter=adapter, members=members, non_members=non_members, cache=Path.home() / ".cache" / "discreet", claim=claim, level=level
    )
    if html is not None:
        reports.write_attack(found, html)
    lines = [f"{layer['name']}: AUC {layer['figures']['auc']:.3f}  {layer['verdict']}" for layer in found["layers"]]
    _print(as_json, found, [f"verdict: {found['verdict']}", *(f"because: {reason}" for reason in found["because"]), *lines])


@app.command()
def release(
    project: Folder = HERE,
    by: Annotated[str, typer.Option("--by", help="Override an INCONCLUSIVE audit in this person's name; the log keeps it.")] = "",
    reason: Annotated[str, typer.Option("--reason", help="Why the model may leave although its audit could see nothing.")] = "",
    as_json: Json = False,
) -> None:
    """Signs the model out through its gates, or withholds it (exit 3)."""
    if by or reason:
        from discreet import pipeline

        with pipeline.open_house(project) as house:
            pipeline.override_inconclusive(house, by=by, reason=reason)
    _one_stage("release", project, as_json)


@app.command()
def statistics(
    epsilon: Annotated[float, typer.Option("--epsilon", help="Price of the answer, charged to the budget before anything is counted; delta 0.")],
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Releases how many units the corpus has and how long their documents are, under differential privacy."""
    from discreet import derived, pipeline

    with pipeline.open_house(project) as house:
        found = derived.statistics(house, epsilon=epsilon, observer=_Bars())
    _print(as_json, found, [f"{key}: {value}" for key, value in _flat(found)])


@app.command()
def synthesize(
    out: Annotated[Path, typer.Argument(help="File of JSON Lines to write.")],
    count: Annotated[int, typer.Option("--count", help="Number of texts.")] = 100,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest text, in tokens.")] = 96,
    temperature: Annotated[float, typer.Option("--temperature", help="Below 1 is tamer, above 1 wilder.")] = 1.0,
    prompt: Annotated[str, typer.Option("--prompt", help="Beginning of every text; public.")] = "",
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Writes text that the released model draws: post-processing of its guarantee, nothing more is charged."""
    from discreet import derived, pipeline

    with pipeline.open_house(project) as house:
        made = derived.synthesize(house, count=count, out=out, max_tokens=max_tokens, temperature=temperature, prompt=prompt)
    _print(as_json, made, [f"{key}: {value}" for key, value in _flat(made)])


@app.command()
def plan(project: Folder = HERE, as_json: Json = False) -> None:
    """Shows the price before any spend: epsilon, time, noise against signal, what is left of the budget."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        price = pipeline.price(house, _Bars())
    _print(as_json, price.to_json(), price.lines())


@app.command()
def report(
    project: Folder = HERE,
    public: Annotated[bool, typer.Option("--public", help="Only public and DP-released fields.")] = False,
    plots: Annotated[Path | None, typer.Option("--plots", help="Also write every chart as PNG and SVG into this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Writes the privacy report (HTML and JSON) from the log alone."""
    from discreet import duties, pipeline
    from discreet import plot as plotting
    from discreet import report as reports
    from discreet.governance.access import Action

    with pipeline.open_house(project) as house:
        duties.ask(house, Action.READ)
        written = reports.write(house.log, house.project.root, public=public)
        if plots is not None:
            plots.mkdir(parents=True, exist_ok=True)
            built = reports.of(house.log).public() if public else reports.of(house.log)
            for path, chart in [(plots / f"{name}.{kind}", chart) for name, chart in reports.charts(built).items() for kind in ("png", "svg")]:
                plotting.save(chart, path)
                written.append(path)
    _print(as_json, {"files": [str(p) for p in written]}, [str(p) for p in written])


@app.command()
def trace(digest: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Prints every statement about one record, model or snapshot, with its inclusion proof."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        lines = pipeline.trace(house, digest)
    if not lines:
        raise NotFound("a digest that the log knows", value=digest)
    _print(
        as_json,
        {"digest": digest, "statements": lines},
        [f"{e['index']:>6}  {e['time']}  {e['predicate']:<13} {json.dumps(e['fields'])}" for e in lines],
    )


@app.command()
def erase(
    subject: Annotated[str | None, typer.Argument(help="The privacy unit as the source names it, e.g. the patient number.")] = None,
    request: Annotated[bool, typer.Option("--request", help="Only receive the request, and print the code for the address on file.")] = False,
    code: Annotated[str, typer.Option("--code", help="The code that the subject sends back: proves who asks.")] = "",
    source: Annotated[str, typer.Option("--source", help="A public source, when SUBJECT is one of its records.")] = "",
    resume: Annotated[bool, typer.Option("--resume", help="Finish what was killed, and whoever a restored backup brought back.")] = False,
    drill: Annotated[bool, typer.Option("--drill", help="Plant a generated person, erase them and search every byte; run it weekly.")] = False,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Erases one person: their records, their key, their place in every snapshot; decides about every model; prints the certificate."""
    from discreet import pipeline

    if (subject is None) is not (resume or drill):
        raise RequestInvalid("a SUBJECT, or --resume, or --drill")
    with pipeline.open_house(project) as house:
        if subject is None:
            done = pipeline.drill(house) if drill else {"resumed": pipeline.resume_erasures(house)}
        elif request:
            done = {"state": "received", "code": pipeline.request_erasure(house, subject, source=source)}
        elif code:
            done = pipeline.confirm_erasure(house, subject, code, source=source)
        else:
            done = pipeline.erase(house, subject, source=source)
    _print(as_json, done, [f"{name}: {value}" for name, value in _flat(done) if name not in ("statement", "proof")])


@app.command()
def retention(project: Folder = HERE, as_json: Json = False) -> None:
    """Erases whoever is past retention, and closes requests past their backup horizon; run it daily."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        done = pipeline.retention(house)
    _print(as_json, done, [f"erased: {done['erased']}", f"closed: {done['closed']}", f"open: {len(done['open'])}"])


@app.command()
def lineage(
    digest: Annotated[str, typer.Argument(help="A snapshot or model; left out with --subject.")] = "",
    subject: Annotated[str, typer.Option("--subject", help="A person as the sources name them.")] = "",
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Shows what was made from a person's records or from an artifact, as OpenLineage events."""
    from discreet import pipeline

    if bool(digest) is bool(subject):
        raise RequestInvalid("a DIGEST or --subject")
    with pipeline.open_house(project, exclusive=False) as house:
        events = pipeline.lineage_export(house, unit=subject, digest=digest)
    _print(as_json, {"events": events}, [f"{e['job']['name']}: {e['outputs'][0]['name']}" for e in events])


@app.command()
def update(project: Folder = HERE, as_json: Json = False) -> None:
    """Takes in changed sources: same ledger, trained, audited and released anew; warns when the audit sees more than before."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        done = pipeline.update(house, _Bars())
    _print(as_json, done, [f"{name}: {value}" for name, value in _flat(done)])


@access.command("export")
def access_export(subject: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Prints everything the project holds about one person, for that person (GDPR Art. 15). It holds their text."""
    from discreet import pipeline

    with pipeline.open_house(project, exclusive=False) as house:
        held = pipeline.access_export(house, subject)
    _print(as_json, held, [json.dumps(held, indent=2, ensure_ascii=False)])


@access.command("show")
def access_show(project: Folder = HERE, as_json: Json = False) -> None:
    """Says which roles you hold."""
    from discreet import pipeline
    from discreet.governance.access import current_user

    with pipeline.open_house(project, exclusive=False) as house:
        who = current_user()
        document = {"user": who.name, "roles": [role.value for role in house.access.roles(who)], "configured": house.access.configured}
    said = "" if document["configured"] else " ([access] names nobody: the local operator holds all roles)"
    _print(as_json, document, [f"{who.name}: {', '.join(house.access.roles(who)) or 'no role'}{said}"])


@access.command("propose")
def access_propose(action: str, about: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Proposes a release (ABOUT: the adapter's digest), a raised budget ("NAME to EPSILON") or a re-identification (the person), which another person has to approve."""
    _approval("propose", action, about, project, as_json)


@access.command("approve")
def access_approve(action: str, about: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Approves what somebody else proposed; the log names both."""
    _approval("approve", action, about, project, as_json)


@access.command("break-glass")
def access_break_glass(
    action: str, reason: Annotated[str, typer.Option("--reason", help="Why it cannot wait.")], project: Folder = HERE, as_json: Json = False
) -> None:
    """Opens one action for you for an hour, and says so in the log before it opens."""
    _approval("break_glass", action, reason, project, as_json)


def _approval(verb: str, action: str, about: str, project: Path, as_json: bool) -> None:
    from discreet import duties, pipeline
    from discreet.governance.access import Action, current_user

    if action not in Action.__members__.values():
        raise RequestInvalid(f"an action out of {', '.join(Action)}", value=action)
    with pipeline.open_house(project, exclusive=False) as house:
        {"propose": duties.propose, "approve": duties.approve, "break_glass": duties.break_glass}[verb](house, Action(action), about)
    document = {
        "action": action,
        "state": {"propose": "proposed", "approve": "approved", "break_glass": "open for an hour"}[verb],
        "by": current_user().name,
    }
    _print(as_json, document, [f"{action}: {document['state']}"])


@app.command("serve")
def serve_model(
    project: Folder = HERE,
    port: Annotated[int | None, typer.Option(help="Port; default from discreet.toml.")] = None,
    upstream: Annotated[
        str | None, typer.Option(help="URL of an OpenAI- or Anthropic-compatible server: the gateway alone, no project needed.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; default 127.0.0.1, or from discreet.toml.")] = None,
    tenants: Annotated[Path | None, typer.Option(help="TOML file of tenants, keys and quotas (docs/gateway.md); left out, one fresh key.")] = None,
    allow_private: Annotated[list[str] | None, typer.Option(help="Host that may be private, or plain http; may be repeated.")] = None,
    upstream_key_env: Annotated[str, typer.Option(help="Environment variable with the upstream's API key.")] = "OPENAI_API_KEY",
    cache_salt: Annotated[bool, typer.Option("--cache-salt", help="Send vLLM a cache_salt for each tenant.")] = False,
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain in PEM: callers speak TLS.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Private key of the certificate, in PEM.")] = None,
    tls_callers: Annotated[Path | None, typer.Option(help="Authorities in PEM whose certificates callers must show.")] = None,
    trail: Annotated[Path, typer.Option(help="Folder of the gateway's own signed log (with --upstream).")] = Path(".discreet-gateway"),
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
    if upstream is None and (cache_salt or no_trail):
        raise RequestInvalid("--cache-salt and --no-trail together with --upstream", remedy="A release is served into the log of its project.")
    private = frozenset(allow_private or ())
    with ExitStack() as stack:
        if upstream is None:
            house, behind = stack.enter_context(_released(project))
            host, port = host or house.project.serve.host, house.project.serve.port if port is None else port
        else:
            kept = None if no_trail else trail
            behind = stack.enter_context(run.elsewhere(upstream, private=private, key_env=upstream_key_env, trail=kept))
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


# --- text -----------------------------------------------------------------------------------------------------------------------------------------

Project = Annotated[Path | None, typer.Option("--project", "-C", help="Folder of a discreet.toml whose [deid] decides, and whose keys are used.")]


@redacting.command("text")
def redact(
    file: Annotated[str, typer.Argument(help="A file, a folder, or - for standard input.")] = "-",
    lines: Annotated[bool, typer.Option("--lines", help="JSON Lines in, JSON Lines out; the text is in the field `text`.")] = False,
    policy: Annotated[str, typer.Option("--policy", help="label, redact, log, surrogate or token.")] = "label",
    out: Annotated[Path | None, typer.Option("--out", help="File or folder for the result; a killed call resumes when it is called again.")] = None,
    written_in: Annotated[
        str, typer.Option("--syntax", help="text, python, javascript, sql, json, jsonl, yaml or csv; auto: by the file's name.")
    ] = "auto",
    review: Annotated[bool, typer.Option("--review", help="An HTML page on which a person corrects what was found, for `calibrate`.")] = False,
    project: Project = None,
    channel: Annotated[str, typer.Option("--channel", help="With -C: training, prompt, log or archive.")] = "training",
    sensitivity: Annotated[str, typer.Option("--sensitivity", help="With -C: public, internal, personal or special.")] = "special",
    subject: Annotated[str, typer.Option("--subject", help="With -C: whose text it is; stand-ins and tokens are then under this person's key.")] = "",
    k: Annotated[int, typer.Option("--k", help="Make ages, places and rare terms coarser until so many people share them.")] = 0,
    jobs: Annotated[int, typer.Option("--jobs", help="Processes; 0 for all cores.")] = 0,
    as_json: Json = False,
) -> None:
    """Removes identifiers from a text, source code, a table, JSON Lines, or every file of a folder."""
    from discreet import redaction

    spec = redaction.Task(
        policy=policy, project="" if project is None else str(project), channel=channel, sensitivity=sensitivity, k=k, syntax=written_in, lines=lines
    ).checked(file)
    many = jobs if jobs > 0 else os.cpu_count() or 1
    if file != "-" and Path(file).is_dir():
        _redact_folder(Path(file), out, spec, many)
        return
    with redaction.redactor(spec, subject) as own:
        if review:
            _written(redaction.review_page(file, own), out)
        elif as_json or spec.syntax != "text":
            done = own.text(redaction.read_whole(file))
            _written(json.dumps(redaction.document(done), indent=2, ensure_ascii=False) + "\n" if as_json else done.text, out)
        elif out is not None:
            redaction.to_file(file, out, spec, bars := _Bars(), jobs=many, redactor=own if subject else None)
            bars.stop()
        else:
            redaction.to_stream(file, spec, sys.stdout.write, jobs=many, redactor=own if subject else None)
            sys.stdout.flush()


def _written(text: str, out: Path | None) -> None:
    from discreet import redaction

    if out is None:
        sys.stdout.write(text)
        sys.stdout.flush()
    else:
        redaction.write_new(out, text)


def _redact_folder(source: Path, out: Path | None, spec: Any, jobs: int) -> None:
    from discreet import redaction

    if out is None:
        raise RequestInvalid("--out with a folder for the results")
    bars = _Bars()
    total, failed = redaction.folder(source, out, spec, bars, jobs=jobs)
    bars.stop()
    if failed:
        remedy = "They are named above and left out; nothing of them was written."
        raise RequestInvalid("files of text", value=f"{failed} of {total} not redacted", remedy=remedy)


@redacting.command("restore")
def redact_restore(
    subject: Annotated[str, typer.Option("--subject", help="Whose tokens they are, as the sources name them.")],
    file: Annotated[str, typer.Argument(help="A file, or - for standard input.")] = "-",
    policy: Annotated[str, typer.Option("--policy", help="Name of the policy that made the tokens.")] = "token",
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Puts the values of one person's tokens back, for whoever may re-identify; the log says who did."""
    from discreet import pipeline, redaction

    text = redaction.read_whole(file)
    with pipeline.open_house(project, exclusive=False) as house:
        restored, count = pipeline.restore_tokens(house, subject, text, policy=policy)
    if as_json:
        _print(True, {"text": restored, "restored": count}, [])
    else:
        _written(restored, None)


@redacting.command("risk")
def redact_risk(
    file: Annotated[str, typer.Argument(help="A file, or - for standard input.")] = "-",
    population: Annotated[int, typer.Option("--population", help="People that the subject could be; default: the United States.")] = 331_000_000,
    as_json: Json = False,
) -> None:
    """Says how many people are expected to share a text's age, place and rare terms: its quasi-identifiers."""
    from discreet import redaction
    from discreet.deid import quasi

    found = quasi.uniqueness(redaction.read_whole(file), population=population)
    shares = {kind.value: share for kind, share in found.shares.items()}
    document = {"population": population, "expected": found.expected, "bits": found.bits, "shares": shares}
    said = [f"{kind}: shared by 1 in {1 / share:,.0f}" for kind, share in shares.items()]
    _print(as_json, document, [f"expected people who share all of it: {found.expected:,.1f} of {population:,} ({found.bits:.1f} bits)", *said])


@redacting.command("table")
def redact_table(
    file: Annotated[str, typer.Argument(help="A CSV file with a header, or - for standard input.")],
    column: Annotated[list[str], typer.Option("--column", help="A quasi-identifier (age, ZIP, date, other); may be repeated.")],
    k: Annotated[int, typer.Option("--k", help="People that must share every row.")] = 11,
    population: Annotated[str, typer.Option("--population", help="CSV file of everybody who could be in it; left out: the table itself.")] = "",
    suppress: Annotated[float, typer.Option("--suppress", help="Largest share of rows that may be left out instead.")] = 0.0,
    out: Annotated[Path | None, typer.Option("--out", help="Write the coarser table here.")] = None,
    as_json: Json = False,
) -> None:
    """Makes a table coarse enough that at least k people share every row (k-map; without --population k-anonymity)."""
    from discreet import redaction

    document, table = redaction.coarser_table(file, column, k=k, population=population, suppress=suppress)
    if out is not None:
        redaction.write_new(out, table)
    told = [f"{name}: {step['kind']}, {step['step']} of {step['steps']} steps coarser" for name, step in document["columns"].items()]
    least = f"fewest people of a row: {document['before']} before, {document['smallest']} after; {document['suppressed']} of {document['rows']} rows left out"
    if out is None and not as_json:
        _written(table, None)
    else:
        _print(as_json, document, [least, *told])


@redacting.command("calibrate")
def redact_calibrate(
    file: Annotated[str, typer.Argument(help="JSON Lines of labelled samples: text, spans of start, end, label; - for standard input.")] = "-",
    miss_rate: Annotated[float, typer.Option("--miss-rate", help="Largest share of values that may be missed, per label.")] = 0.05,
    confidence: Annotated[float, typer.Option("--confidence", help="Of all statements together.")] = 0.95,
    project: Project = None,
    write: Annotated[bool, typer.Option("--write", help="With -C: put the thresholds into its discreet.toml.")] = False,
    as_json: Json = False,
) -> None:
    """Chooses score thresholds per label from labelled samples, with the miss rate they keep and its confidence interval."""
    from discreet import config, redaction
    from discreet.deid import policy
    from discreet.deid.calibrate import calibrate, samples_of

    rows = [_json_line(line, number) for number, line in enumerate(redaction.read_whole(file).split("\n"), start=1) if line.strip()]
    names = policy.Names.MODEL if project is None else policy.Names(config.load(project).deid.names)
    chosen = calibrate(samples_of(rows), miss_rate=miss_rate, confidence=confidence, find=policy.finder(names))
    labels = [
        {
            "label": str(c.label), "threshold": c.threshold, "values": c.values, "missed": c.missed, "lower": c.lower, "upper": c.upper, "met": c.met,
            "flagged_wrongly": c.flagged_wrongly,
        }
        for c in chosen
    ]  # fmt: skip
    said = redaction.thresholds(chosen, confidence)
    if write:
        redaction.store_thresholds(project, said)
    document = {"miss_rate": miss_rate, "confidence": confidence, "met": all(c.met for c in chosen), "labels": labels}
    _print(as_json, document, ["[deid.thresholds]", *said])


def _json_line(line: str, number: int) -> object:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise RequestInvalid("JSON on every line", value=f"line {number}") from None


# --- privacy ----------------------------------------------------------------------------------------------------------------------------------------

Q = Annotated[float, typer.Option("--sampling-probability", help="Probability that a unit takes part in a step.")]
Steps = Annotated[int, typer.Option("--steps")]
Delta = Annotated[float, typer.Option("--delta")]


@privacy.command("epsilon")
def privacy_epsilon(
    sampling_probability: Q,
    noise_multiplier: Annotated[float, typer.Option("--noise-multiplier")],
    steps: Steps,
    delta: Delta,
    relation: Annotated[str, typer.Option("--relation")] = "add_remove",
    accountant: Annotated[str, typer.Option("--accountant", help="pld, rdp or pld,rdp")] = "pld",
    as_json: Json = False,
) -> None:
    """The epsilon of Poisson-sampled Gaussian steps."""
    wanted = accountant.split(",")
    if not set(wanted) <= {"pld", "rdp"} or relation not in ("add_remove", "replace_one"):
        raise PlanInvalid("an accountant out of pld, rdp and a relation out of add_remove, replace_one", value=f"{accountant}, {relation}")
    quick = _quick_epsilon(sampling_probability, noise_multiplier, steps, delta) if (accountant, relation) == ("pld", "add_remove") else None
    epsilons = {"pld": quick} if quick is not None else _epsilons(wanted, relation, sampling_probability, noise_multiplier, steps, delta)
    document = {
        "epsilon": _finite(epsilons[wanted[0]]),
        "accountants": {which: _finite(value) for which, value in epsilons.items()},
        "accountant": wanted[0],
        "delta": delta,
        "sampling_probability": sampling_probability,
        "noise_multiplier": noise_multiplier,
        "steps": steps,
        "relation": relation,
    }
    _print(as_json, document, [f"epsilon = {_finite(value)} ({which}), delta = {delta:g}, {relation}" for which, value in epsilons.items()])


def _quick_epsilon(sampling_probability: float, noise_multiplier: float, steps: int, delta: float) -> float | None:
    """The same figure without the libraries, whose import alone takes longer than a second; None where it is not covered."""
    from discreet.dp import losses

    figures = {"sampling_probability": sampling_probability, "noise_multiplier": noise_multiplier, "delta": delta}
    return losses.epsilon(**figures, steps=steps, grid=1e-4) if steps <= 20_000 else None


def _epsilons(
    wanted: Iterable[str], relation: str, sampling_probability: float, noise_multiplier: float, steps: int, delta: float
) -> dict[str, float | None]:
    from discreet.dp import accounting, mechanism

    event = mechanism.event_of(sampling_probability=sampling_probability, noise_multiplier=noise_multiplier, steps=steps)
    price = _math(lambda: accounting.guarantee(event, delta=delta, relation=cast("accounting.Relation", relation)))
    return {which: price.epsilon if which == "pld" else price.epsilon_rdp for which in wanted}


@privacy.command("curve")
def privacy_curve(
    sampling_probability: Q,
    noise_multiplier: Annotated[float, typer.Option("--noise-multiplier")],
    steps: Steps,
    svg: Annotated[Path | None, typer.Option("--svg", help="Also draw the curve into this file.")] = None,
    as_json: Json = False,
) -> None:
    """The whole (epsilon, delta) curve of Poisson-sampled Gaussian steps, and what the best attack on one unit reaches."""
    from discreet.dp import accounting, mechanism

    event = mechanism.event_of(sampling_probability=sampling_probability, noise_multiplier=noise_multiplier, steps=steps)
    trade_off = _math(lambda: accounting.trade_off(event))
    deltas = [10 ** (-half / 2) for half in range(2, 21)]
    points = list(zip(deltas, trade_off.epsilons(deltas), strict=True))
    attacks = [(fpr, trade_off.tpr(fpr)) for fpr in (0.001, 0.01, 0.05, 0.1, 0.5)]
    if svg:
        from discreet import plot

        title = f"{steps} steps, q = {sampling_probability:g}, noise multiplier {noise_multiplier:g}"
        svg.write_text(_math(lambda: plot.curve_svg(points, title=title, x_title="delta", y_title="epsilon")), encoding="utf-8")
    document = {
        "points": [{"delta": delta, "epsilon": _finite(epsilon)} for delta, epsilon in points],
        "attacks": [{"fpr": fpr, "tpr": tpr} for fpr, tpr in attacks],
        "advantage": trade_off.advantage,
        "accountant": "pld",
        "sampling_probability": sampling_probability,
        "noise_multiplier": noise_multiplier,
        "steps": steps,
        "relation": "add_remove",
        **({"svg": str(svg)} if svg else {}),
    }
    lines = [f"delta = {delta:<9.2g} epsilon = {_finite(epsilon)}" for delta, epsilon in points]
    lines += [f"best attack at a false positive rate of {fpr:g}: true positive rate {tpr:.4f}" for fpr, tpr in attacks]
    _print(as_json, document, [*lines, f"largest advantage of an attack: {trade_off.advantage:.4f}", *([f"drawn: {svg}"] if svg else [])])


@privacy.command("noise")
def privacy_noise(
    epsilon: Annotated[float, typer.Option("--epsilon")],
    sampling_probability: Q,
    steps: Steps,
    delta: Delta,
    as_json: Json = False,
) -> None:
    """The smallest noise multiplier for a target epsilon."""
    from discreet.dp import accounting, mechanism

    noise = _math(lambda: mechanism.noise_for(epsilon=epsilon, delta=delta, sampling_probability=sampling_probability, steps=steps))
    price = accounting.guarantee(mechanism.event_of(sampling_probability=sampling_probability, noise_multiplier=noise, steps=steps), delta=delta)
    document = {
        "noise_multiplier": noise,
        "epsilon": price.epsilon,
        "target_epsilon": epsilon,
        "accountant": "pld",
        "delta": delta,
        "sampling_probability": sampling_probability,
        "steps": steps,
        "relation": price.relation,
    }
    _print(as_json, document, [f"noise multiplier = {noise:.5f}"])


def _math(call: Callable[[], T]) -> T:
    """Runs mathematics that raises ValueError and turns that into our usage error."""
    try:
        return call()
    except ValueError as error:
        raise PlanInvalid.of(error) from None


def _finite(value: float | None) -> float | str:
    return "infinity" if value is None or math.isinf(value) else value


# --- budget -----------------------------------------------------------------------------------------------------------------------------------------


@budget.command("open")
def budget_open(
    name: str,
    epsilon: Annotated[float, typer.Option("--epsilon")],
    delta: Delta,
    unit: Annotated[str, typer.Option("--unit")] = "record",
    query_delta: Annotated[float, typer.Option("--query-delta", help="The part of delta kept for queries with a delta of their own.")] = 0.0,
    periods: Annotated[int, typer.Option("--periods", help="Number of periods, each of which unlocks an equal share; 0: all from the start.")] = 0,
    period_days: Annotated[float, typer.Option("--period-days", help="Length of a period.")] = 91.0,
    carry_over: Annotated[str, typer.Option("--carry-over", help="What becomes of an unused share: none, one (period more) or all.")] = "none",
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Opens a budget: nothing spent of it comes back."""
    from discreet import duties, pipeline
    from discreet.ledger import CarryOver, Period

    if carry_over not in set(CarryOver):
        raise RequestInvalid(f"--carry-over out of {', '.join(CarryOver)}", value=carry_over)
    period = Period(days=period_days, count=periods, carry_over=CarryOver(carry_over)) if periods else None
    with pipeline.open_house(project) as house:
        opened = duties.open_budget(house, name, epsilon=epsilon, delta=delta, unit=unit, query_delta=query_delta, period=period)
    _print(as_json, opened, [f"{k}: {v}" for k, v in _flat(opened)])


@budget.command("raise")
def budget_raise(
    name: str,
    epsilon: Annotated[float, typer.Option("--epsilon", help="The new, larger epsilon.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; the log keeps it, and it is public.")],
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Raises a budget; where roles are set, after another person approved "NAME to EPSILON"."""
    from discreet import duties, pipeline

    with pipeline.open_house(project) as house:
        raised = duties.raise_budget(house, name, epsilon=epsilon, reason=reason)
    _print(as_json, raised, [f"{k}: {v}" for k, v in _flat(raised)])


@budget.command("show")
def budget_show(name: Annotated[str | None, typer.Argument()] = None, project: Folder = HERE, as_json: Json = False) -> None:
    """Shows what was spent and what remains, and warns from half on."""
    from discreet import duties, pipeline

    with pipeline.open_house(project) as house:
        budgets = duties.show_budgets(house, name)
    lines = [f"{b['name']}: epsilon {b['remaining']:.3f} of {b['epsilon']:g} left, delta {b['delta']:.2g}, unit {b['unit']}" for b in budgets]
    _print(as_json, {"budgets": budgets}, [*lines, *(f"ALERT {alert}" for b in budgets for alert in b["alerts"])])


@budget.command("reserve")
def budget_reserve(
    name: str,
    epsilon: Annotated[float, typer.Option("--epsilon")],
    delta: Annotated[float, typer.Option("--delta", help="Of the query; taken from what the budget kept for queries.")] = 0.0,
    kind: Annotated[str, typer.Option("--kind", help="training, search, statistics, retrieval or synthetic.")] = "statistics",
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Charges an (epsilon, delta)-DP query to everyone, or refuses it (exit 3)."""
    from discreet import duties, pipeline
    from discreet.ledger import Kind

    if kind not in set(Kind):
        raise RequestInvalid(f"--kind out of {', '.join(Kind)}", value=kind)
    with pipeline.open_house(project) as house:
        held = duties.reserve(house, name, epsilon=epsilon, delta=delta, kind=Kind(kind))
    document = {"reservation": held.id, "remaining": held.remaining_epsilon}
    _print(as_json, document, [f"reserved {held.id}; epsilon left: {held.remaining_epsilon:.4f}"])


@budget.command("plan")
def budget_plan(
    name: str,
    sampling_probability: Annotated[float, typer.Option("--sampling-probability", help="Chance of a unit to take part in a step.")],
    noise_multiplier: Annotated[
        float, typer.Option("--noise-multiplier", help="The utility you need: noise over clip norm (`discreet plan` shows it).")
    ],
    plot: Annotated[Path | None, typer.Option("--plot", help="Write the trade-off of noise against steps as an SVG file.")] = None,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Says what can still be trained now at this utility, and what more noise would buy. Charges nothing."""
    from discreet import duties, pipeline
    from discreet import report as reports
    from discreet.store import write_atomically

    with pipeline.open_house(project) as house:
        document = duties.plan(house, name, sampling_probability=sampling_probability, noise_multiplier=noise_multiplier)
    if plot:
        points = [(row["noise_multiplier"], int(row["steps"])) for row in document["curve"]]
        write_atomically(plot, reports.affordable_chart(points, chosen=noise_multiplier).encode())
        document["plot"] = str(plot)
    lines = [
        f"{name}: epsilon {document['remaining']:.3f} of {document['epsilon']:g} left, {document['unlocked']:.0%} unlocked",
        f"at noise multiplier {noise_multiplier:g}: {document['steps']} more steps ({document['epochs']:.1f} epochs)",
    ]
    _print(as_json, document, [*lines, *(f"  noise multiplier {row['noise_multiplier']:6.3g}: {row['steps']:>8} steps" for row in document["curve"])])


# --- governance -------------------------------------------------------------------------------------------------------------------------------------


@consent.command("withdraw")
def consent_withdraw(subject: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Records that a person withdrew: none of their records is admitted from now on."""
    from discreet import pipeline

    with pipeline.open_house(project, exclusive=False) as house:  # a training run asks for it every half minute
        who = pipeline.may_record_consent(house, subject)
        house.consent.withdraw(who, house.project.purpose)
    _print(as_json, {"subject": who, "purpose": house.project.purpose.name, "state": "withdrawn"}, ["withdrawn"])


@consent.command("grant")
def consent_grant(subject: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Records a person's consent for the project's purpose."""
    from discreet import pipeline

    with pipeline.open_house(project, exclusive=False) as house:
        who = pipeline.may_record_consent(house, subject)
        house.consent.grant(who, house.project.purpose)
    _print(as_json, {"subject": who, "purpose": house.project.purpose.name, "state": "granted"}, ["granted"])


@consent.command("history")
def consent_history(subject: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Shows everything a person said about their data, oldest first."""
    from discreet import duties, pipeline
    from discreet.governance.access import Action

    with pipeline.open_house(project, exclusive=False) as house:
        duties.ask(house, Action.CONSENT)
        words = house.consent.history(pipeline.subject_of(house, subject))
    said = [
        {"purpose": w.purpose, "state": "granted" if w.basis else "withdrawn", "basis": w.basis.value if w.basis else None, "at": w.at} for w in words
    ]
    _print(as_json, {"history": said}, [f"{w['at']:.0f}  {w['state']}  {w['purpose']}" for w in said])


@consent.command("import")
def consent_import(
    file: Annotated[Path, typer.Argument(help="CSV with the columns subject, purpose (* for every purpose) and basis (empty: withdrawn).")],
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Records the words of many people at once, all or none."""
    from discreet import pipeline

    with pipeline.open_house(project, exclusive=False) as house:
        changed = pipeline.import_consent(house, file)
    _print(as_json, {"changed": changed}, [f"changed: {changed}"])


@catalog.command("confirm")
def catalog_confirm(
    name: str,
    by: Annotated[str, typer.Option("--by", help="The person who read the sample.")],
    reason: Annotated[str, typer.Option("--reason")],
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Confirms by name that a source in whose new rows the detectors found more than it is declared is what it is declared."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        pipeline.confirm_sensitivity(house, name, by=by, reason=reason)
        sources = house.catalog.sources()
    _print(as_json, {"sources": sources}, [f"confirmed {name}"])


@catalog.command("classify")
def catalog_classify(name: str, project: Folder = HERE, as_json: Json = False) -> None:
    """Proposes a sensitivity for a source by running a sample of it through the detectors. Applies nothing."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        done = pipeline.propose_sensitivity(house, name)
    lines = [f"{name}: declared {done['declared']}, proposed {done['proposed']} from {done['sampled']} records"]
    _print(as_json, done, [*lines, *(f"  {label}: in {share:.1%} of them" for label, share in done["shares"].items())])


@catalog.command("list")
def catalog_list(project: Folder = HERE, as_json: Json = False) -> None:
    """Lists the registered sources."""
    from discreet import duties, pipeline
    from discreet.governance.access import Action

    with pipeline.open_house(project) as house:
        duties.ask(house, Action.READ)
        sources = house.catalog.sources()
    _print(
        as_json, {"sources": sources}, [f"{s['name']}: {s['sensitivity']}, owner {s['owner']}, purposes {', '.join(s['purposes'])}" for s in sources]
    )


@catalog.command("register")
def catalog_register(
    name: Annotated[str, typer.Argument(help="Name of the [[source]] in discreet.toml.")],
    again: Annotated[bool, typer.Option("--again", help="Take the present bytes and declaration in place of the registered ones.")] = False,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Registers a source, or with --again what became of it since; its name, and so its budget, stay."""
    from discreet import duties, pipeline
    from discreet.governance.access import Action

    with pipeline.open_house(project) as house:
        duties.ask(house, Action.REGISTER_SOURCE)
        section = next((section for section in house.project.source if section.name == name), None)
        if section is None:
            raise NotFound("a [[source]] of that name in discreet.toml", value=name)
        (house.catalog.register_again if again else house.catalog.register)(house.project, section)
        sources = house.catalog.sources()
    _print(as_json, {"sources": sources}, [f"registered {name}"])


# --- evidence ---------------------------------------------------------------------------------------------------------------------------------------


@evidence.command("export")
def evidence_export(
    out: Annotated[Path, typer.Option("--out", help="New folder for the bundle.")] = Path("evidence"),
    public: Annotated[bool, typer.Option("--public", help="Only what may be published.")] = False,
    trail: Annotated[
        Path | None, typer.Option("--trail", help="Folder of a gateway's trail (`discreet serve --upstream`) in place of a project.")
    ] = None,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Writes a bundle that anyone can verify offline, and the public key beside it; verifies it once."""
    from discreet import pipeline
    from discreet.evidence.log import verify_bundle

    if trail is not None:
        from discreet.serve.trail import export

        bundle, key = export(trail, out, public=public)
    else:
        with pipeline.open_house(project) as house:
            bundle, key = pipeline.export_evidence(house, out, public=public)
    verified = verify_bundle(bundle, public_key=key.read_text())
    document = {"bundle": str(bundle), "key": str(key), "public": public, "entries": len(verified.entries), "checkpoint": verified.note.decode()}
    _print(as_json, document, [f"bundle: {bundle}", f"key:    {key}"])


@evidence.command("dossier")
def evidence_dossier(
    out: Annotated[Path, typer.Option("--out", help="New folder for the dossier.")] = Path("dossier"),
    public: Annotated[bool, typer.Option("--public", help="Only public and DP-released answers, and the public log.")] = False,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Writes what a privacy officer needs as one signed folder, and the public key beside it; verifies it once."""
    from discreet import dossier, duties, pipeline
    from discreet.governance.access import Action
    from discreet.store import write_atomically

    with pipeline.open_house(project) as house:
        duties.ask(house, Action.READ)
        folder = dossier.write(house.log, house.store, out, public=public, namespace=house.log.origin)
        key = out.with_name(out.name + ".pub")
        write_atomically(key, (house.log.public_key() + "\n").encode())
        verified = dossier.verify(folder, public_key=key.read_text())
    document = {"dossier": str(folder), "key": str(key), "public": public, "entries": len(verified.entries), "checkpoint": verified.note.decode()}
    _print(as_json, document, [f"dossier: {folder}", f"key:     {key}"])


@evidence.command("witness")
def evidence_witness(
    bundle: Path,
    key: Annotated[Path, typer.Option("--key", help="File with the log's public key.")],
    name: Annotated[str, typer.Option("--name", help="Name of your key, by convention a URL without a scheme.")],
    state: Annotated[Path, typer.Option("--state", help="Your folder: your key, and the last checkpoint of each log.")] = Path("witness"),
    as_json: Json = False,
) -> None:
    """Verifies a bundle, refuses a rollback or fork since you last saw the log (exit 4), and cosigns its checkpoint. For anyone: needs no project."""
    from discreet.evidence import witness

    if not key.is_file():
        raise SourceMissing("a file with the log's public key", value=str(key))
    signed = witness.cosign(bundle, public_key=key.read_text(), name=name, state=state)
    _print(as_json, signed, [signed["checkpoint"], f"witness key: {signed['key']}"])


@evidence.command("rotate-key")
def evidence_rotate_key(
    out: Annotated[Path, typer.Option("--out", help="Where the public keys go, oldest first; hand the file out in place of the earlier one.")] = Path(
        "log.pub"
    ),
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Gives the log a new key; what the old one signed stays verifiable, and its private half is destroyed."""
    from discreet import duties, pipeline

    with pipeline.open_house(project) as house:
        done = duties.rotate_key(house, out)
    _print(as_json, done, [*done["keys"], f"written to {out}"])


@evidence.command("pin")
def evidence_pin(
    accept: Annotated[bool, typer.Option("--accept-rollback", help="Go on with a database that lost entries; needs --by and --reason.")] = False,
    by: Annotated[str, typer.Option("--by", help="Who accepts the loss; the log keeps it.")] = "",
    reason: Annotated[str, typer.Option("--reason")] = "",
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Signs a checkpoint and keeps it outside the database; a restored backup is refused from then on."""
    from discreet import duties, pipeline

    if accept:
        done = duties.accept_rollback(project, by=by, reason=reason)
    else:
        with pipeline.open_house(project) as house:
            done = duties.pin(house)
    _print(as_json, done, [done["checkpoint"]])


@evidence.command("tiles")
def evidence_tiles(
    out: Annotated[Path, typer.Option("--out", help="Folder to be served; an earlier export grows.")] = Path("tiles"),
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Writes checkpoint and tiles of the log (c2sp.org/tlog-tiles) for mirrors and monitors: hashes only, no statement."""
    from discreet import duties, pipeline

    with pipeline.open_house(project) as house:
        done = duties.tiles(house, out)
    _print(as_json, done, [f"{done['tiles']} tiles in {out}"])


@evidence.command("verify")
def evidence_verify(
    bundle: Annotated[Path, typer.Argument(help="A folder (bundle or dossier), or a JSON file with a statement and its proof.")],
    key: Annotated[Path, typer.Option("--key", help="File with the log's public key; of a log whose key was rotated one a line.")],
    as_json: Json = False,
) -> None:
    """Verifies a bundle, a dossier or a certificate with a public key alone: no network, no database (exit 4 when anything is broken)."""
    from discreet import dossier
    from discreet.errors import EvidenceInvalid
    from discreet.evidence.log import verify_bundle, verify_certificate

    for path in (key, bundle):
        if not path.exists():
            raise SourceMissing("a bundle, and a file with the log's public key", value=str(path))
    public_key = key.read_text()
    try:
        if bundle.is_file():
            entry, signed = verify_certificate(bundle, public_key=public_key)
            statements, said = 1, f"VALID: '{entry.predicate}' of {entry.time} is in the log under this checkpoint"
        else:
            verified = (dossier.verify if dossier.is_dossier(bundle) else verify_bundle)(bundle, public_key=public_key)
            statements, signed = len(verified.entries), verified.note
            said = f"VALID: {statements} statements under this checkpoint"
    except EvidenceInvalid as error:
        _print(as_json, {"valid": False, "failed": error.failed or [str(error)], "checkpoint": None}, ["BROKEN", *error.failed])
        raise typer.Exit(error.exit_code) from None
    _print(as_json, {"valid": True, "failed": [], "checkpoint": signed.decode(), "statements": statements}, [said, signed.decode()])


# --- federation -------------------------------------------------------------------------------------------------------------------------------------


@federate.command("simulate")
def federate_simulate(fleet: Fleet = HERE, as_json: Json = False) -> None:
    """Runs every site and the coordinator of a fleet on this machine; resumes where it stopped."""
    from discreet import federate as fleets

    result = fleets.simulate(fleet, _Bars())
    _print(as_json, result, fleets.lines(result))


@federate.command("enroll")
def federate_enroll(project: Folder = HERE, as_json: Json = False) -> None:
    """Freezes a site's corpus and prints the public key that goes into the fleet's roster.json."""
    from discreet import federate as fleets

    document = fleets.document(fleets.enroll(project, _Bars()))
    _print(as_json, document, [f"{document['name']} {document['key']}"])


@federate.command("roster")
def federate_roster(
    enrolled: Annotated[list[Path], typer.Argument(help="What `enroll --json` printed at each site, one file each.")],
    base: Annotated[Path, typer.Option("--base", help="Folder of the base model.")],
    host: Annotated[str, typer.Option("--host", help="By which the sites reach the coordinator; it is in the certificate.")] = "127.0.0.1",
    fleet: Fleet = HERE,
    as_json: Json = False,
) -> None:
    """Writes roster.json and ca.crt, which every site gets beside fleet.toml."""
    from discreet import federate as fleets

    made = fleets.roster(fleet, [_json_file(path) for path in enrolled], base=base, host=host)
    _print(
        as_json,
        made,
        [
            f"session {made['session']} of {', '.join(made['sites'])}",
            f"roster  {made['digest']}  (compare it at every site)",
            f"binding {made['binding']}  (report data of an attestation)",
        ],
    )


@federate.command("server")
def federate_server(
    fleet: Fleet = HERE,
    host: Annotated[str, typer.Option("--host", help="Address to listen on, the one of the certificate.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port")] = 9700,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that a stage of a round may take.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Coordinates a fleet over Flower; started again after its death, it continues the round that was under way."""
    from discreet import federate as fleets

    result = fleets.serve(fleet, host=host, port=port, timeout=timeout, observer=_Bars())
    _print(as_json, result, fleets.lines(result))


@federate.command("client")
def federate_client(
    superlink: Annotated[str, typer.Argument(help="HOST:PORT of the coordinator.")],
    project: Folder = HERE,
    fleet: Annotated[Path, typer.Option("--fleet", help="Folder with fleet.toml, roster.json and ca.crt.")] = HERE,
    verifier: Annotated[
        str, typer.Option("--verifier", help="Program that accepts the coordinator's `attestation` (stdin; the binding is its argument) by exit 0.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Takes part with this site until the session is closed; exit 4 when its receipts are not honoured. On several processes: `torchrun --no-python ... discreet federate client`."""
    from discreet import federate as fleets

    result = fleets.attend(project, fleet=fleet, superlink=superlink, observer=_Bars(), verifier=shlex.split(verifier))
    if result is None:  # another rank prints
        return
    said = "each counted once under the agreed model and plan" if result["valid"] else f"NOT HONOURED: {'; '.join(result['failed'])}"
    _print(as_json, result, [f"receipt    {result['site']}: {result['rounds']} uploads, {said}"])
    if not result["valid"]:
        raise typer.Exit(4)


@federate.command("leave")
def federate_leave(
    project: Folder = HERE,
    fleet: Annotated[Path, typer.Option("--fleet", help="Folder with fleet.toml and roster.json.")] = HERE,
    as_json: Json = False,
) -> None:
    """Takes this site out of its session for good; what it spent stays spent."""
    from discreet import federate as fleets

    left = fleets.leave(project, fleet=fleet)
    _print(as_json, left, [f"{left['site']} left session {left['session']} after {left['rounds']} rounds"])


def _json_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceMissing("a file that `discreet federate enroll --json` printed", value=f"{path.name}: {type(error).__name__}") from None
    if not isinstance(content, dict) or not {"name", "key", "node", "base", "model"} <= set(content):
        raise SourceMissing("a file that `discreet federate enroll --json` printed", value=path.name)
    return content


# --- plumbing ---------------------------------------------------------------------------------------------------------------------------------------


def _flat(document: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield prefix + name, value


class _Bars:
    """Shows the story on stderr: one line a stage, one bar a task. On a pipe it prints lines at every tenth of a task instead."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=stderr,
        )
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def stage(self, name: str) -> None:
        self.stop()
        stderr.print(f"[bold]{name}[/bold]")

    def note(self, line: str) -> None:
        stderr.print("  " + line, markup=False)

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None:
        said = "  ".join(f"{name} {value}" for name, value in figures.items())
        if not stderr.is_terminal:
            self._print_tenth(task, done, total, said)
            return
        if task not in self._tasks:
            self._bars.start()
            self._tasks[task] = self._bars.add_task(task, total=total, figures=said)
        self._bars.update(self._tasks[task], completed=done, total=total, figures=said)
        if done >= total:
            self._bars.refresh()

    def _print_tenth(self, task: str, done: int, total: int, said: str) -> None:
        tenth = 10 * done // max(total, 1)
        if self._tenths.get(task) != tenth:
            self._tenths[task] = tenth
            stderr.print(f"  {task} {done}/{total}  {said}", markup=False)

    def stop(self) -> None:
        self._bars.stop()
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"discreet {__version__}")
        raise typer.Exit


def main() -> None:
    """Runs the command line; maps every error to its documented exit code."""
    as_json = "--json" in sys.argv
    os.environ.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # numpy reads it once; two threads for the name model's small products cost six times the CPU time and win none
    try:
        code = app(standalone_mode=False)
    except DiscreetError as error:
        code = _fail(as_json, error.to_json(), f"{error} [{error.code}]", error.exit_code)
    except typer.Abort:
        code = _fail(as_json, {"error": {"code": "aborted"}}, "Stopped.", 1)
    except TyperException as error:
        code = _fail(as_json, {"error": {"code": "usage", "rule": str(error), "value": None, "remedy": "See --help."}}, f"{error} See --help.", 2)
    except KeyboardInterrupt:
        code = _fail(as_json, {"error": {"code": "interrupted"}}, "Interrupted; the next call resumes where this one stopped.", 1)
    except OSError as error:
        import errno

        if error.errno != errno.ENOSPC:
            code = _unexpected(as_json, error)
        else:
            from discreet.store import storage_full

            code = _fail(as_json, storage_full().to_json(), str(storage_full()), 1)
    except Exception as error:  # the last line of defence: nothing of an unexpected message is printed
        code = _unexpected(as_json, error)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(as_json: bool, document: dict[str, object], line: str, code: int) -> int:
    if as_json:
        typer.echo(json.dumps(document))
    stderr.print(line, markup=False, style="red")
    return code


def _unexpected(as_json: bool, error: BaseException) -> int:
    if os.environ.get("DISCREET_DEBUG"):
        traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    line = f"Unexpected {type(error).__name__} at {where}. This is a defect of discreet; nothing was lost. DISCREET_DEBUG=1 shows more."
    return _fail(as_json, {"error": {"code": "unexpected", "rule": type(error).__name__, "value": where}}, line, 1)
