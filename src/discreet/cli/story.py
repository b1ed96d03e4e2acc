"""The story: demo, init, run and its stages, plan, report, update."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from discreet.cli import serving
from discreet.cli.shared import HERE, Bars, Folder, Json, flat, say
from discreet.errors import NotReleased, RequestInvalid, SourceMissing

if TYPE_CHECKING:
    from discreet.plot import Chart

commands = typer.Typer()


@commands.command()
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
    outcome = story.tell(home, fast=fast, observer=Bars())
    say(as_json, outcome.to_json(), outcome.lines())
    asked = serve is None and not as_json and sys.stdin.isatty() and typer.confirm("Start the gateway and the dashboard?", default=True, err=True)
    if serve or asked:
        serving.serve(home)


@commands.command()
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
        say(as_json, {"folder": str(folder), "files": made, "next": then}, [*(f"{folder}/{name}" for name in made), *then])
        return
    created = story.init_project(folder, example=example)
    following = [f"discreet plan -C {folder}", f"discreet run -C {folder}"]
    say(as_json, {"folder": str(folder), "files": created, "next": following}, [*(f"{folder}/{name}" for name in created), *following])


@commands.command()
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
            outcome = pipeline.run(house, until=stage, observer=Bars())
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
    say(as_json, document, [*(f"{s['stage']}: {s['state']}" for s in document["stages"]), sentence, *([f"report: {written}"] if written else [])])


def _one_stage(name: str, project: Path, as_json: bool) -> None:
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        result = pipeline.run(house, until=name, observer=Bars())[name]
    say(as_json, result, [f"{key}: {value}" for key, value in flat(result)])


@commands.command()
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

    if (result := pipeline.train_together(project, Bars())) is not None:
        say(as_json, result, [f"{key}: {value}" for key, value in flat(result)])


@commands.command()
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
    number: Annotated[
        int, typer.Option("--number", min=0, help="Which audit of this model it is, from 1: all of them share --level. 0: this one has it.")
    ] = 0,
    html: Annotated[Path | None, typer.Option("--html", help="Write a page with the curves here.")] = None,
    plots: Annotated[Path | None, typer.Option("--plots", help="Write every curve as PNG and SVG into this folder.")] = None,
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
        model,
        adapter=adapter,
        members=members,
        non_members=non_members,
        cache=Path.home() / ".cache" / "discreet",
        claim=claim,
        level=level,
        number=number,
    )
    if html is not None:
        reports.write_attack(found, html)
    if plots is not None:
        _save(reports.attack_charts(found), plots)
    lines = [f"{layer['name']}: {_figure(layer['figures'])}  {layer['verdict']}" for layer in found["layers"]]
    say(as_json, found, [f"verdict: {found['verdict']}", *(f"because: {reason}" for reason in found["because"]), *lines])


def _figure(figures: Mapping[str, Any]) -> str:
    """One layer of an audit of any model in a word: an area, or how often something happened."""
    if "auc" in figures:
        return f"AUC {figures['auc']:.3f}"
    found = figures.get("model")
    if found is None:
        return "texts are too short"
    return f"{found['inside']['count']} of {found['inside']['total']} members, {found['outside']['count']} of {found['outside']['total']} non-members"


def _save(charts: Mapping[str, Chart], folder: Path) -> list[Path]:
    """Writes every chart as PNG and as SVG."""
    from discreet import plot

    folder.mkdir(parents=True, exist_ok=True)
    paths = [(folder / f"{name}.{kind}", chart) for name, chart in charts.items() for kind in ("png", "svg")]
    for path, chart in paths:
        plot.save(chart, path)
    return [path for path, _ in paths]


@commands.command()
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


@commands.command()
def statistics(
    epsilon: Annotated[float, typer.Option("--epsilon", help="Price of the answer, charged to the budget before anything is counted; delta 0.")],
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Releases how many units the corpus has and how long their documents are, under differential privacy."""
    from discreet import derived, pipeline

    with pipeline.open_house(project) as house:
        found = derived.statistics(house, epsilon=epsilon, observer=Bars())
    say(as_json, found, [f"{key}: {value}" for key, value in flat(found)])


@commands.command()
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
    say(as_json, made, [f"{key}: {value}" for key, value in flat(made)])


@commands.command()
def child(
    file: Annotated[
        Path,
        typer.Argument(help="File or folder to write with --kind, or a GGUF file or folder of safetensors that somebody else made of the release."),
    ],
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="Write it first: merged (a folder of safetensors, as vLLM reads it), f16, q8_0 or q4_0 (GGUF). It stays only when it passes.",
        ),
    ] = "",
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Audits the released model merged into a folder or one GGUF file, at the precision that it will be deployed with."""
    from discreet import derived, pipeline

    with pipeline.open_house(project) as house:
        made = derived.child(house, file=file, kind=kind)
    say(as_json, made, [f"{key}: {value}" for key, value in flat(made)])


@commands.command()
def plan(project: Folder = HERE, as_json: Json = False) -> None:
    """Shows the price before any spend: epsilon, time, noise against signal, what is left of the budget."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        price = pipeline.price(house, Bars())
    say(as_json, price.to_json(), price.lines())


@commands.command()
def report(
    project: Folder = HERE,
    public: Annotated[bool, typer.Option("--public", help="Only public and DP-released fields.")] = False,
    plots: Annotated[Path | None, typer.Option("--plots", help="Also write every chart as PNG and SVG into this folder.")] = None,
    as_json: Json = False,
) -> None:
    """Writes the privacy report (HTML and JSON) from the log alone."""
    from discreet import duties, pipeline
    from discreet import report as reports
    from discreet.governance.access import Action

    with pipeline.open_house(project) as house:
        duties.ask(house, Action.READ)
        written = reports.write(house.log, house.project.root, public=public)
        if plots is not None:
            built = reports.of(house.log).public() if public else reports.of(house.log)
            written += _save(reports.charts(built), plots)
    say(as_json, {"files": [str(p) for p in written]}, [str(p) for p in written])


@commands.command()
def update(
    onward: Annotated[
        bool, typer.Option("--continue", help="Go on from the model that was released last; its epsilon and that of the new run then count together.")
    ] = False,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Takes in changed sources: same ledger, trained, audited and released anew; warns when the audit sees more than before."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        done = pipeline.update(house, Bars(), start="released" if onward else "base")
    say(as_json, done, [f"{name}: {value}" for name, value in flat(done)])
