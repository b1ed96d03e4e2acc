"""`discreet redact`: text, folders, tables, thresholds, risk."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from discreet.cli.shared import HERE, Bars, Folder, Json, say
from discreet.errors import RequestInvalid


class _RedactGroup(TyperGroup):
    """`discreet redact FILE` is `discreet redact text FILE`; a file that is called like a subcommand is given as ./calibrate."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = next((part for part in args if not part.startswith("-") or part == "-"), None)
        return super().parse_args(ctx, args if args[:1] == ["--help"] or (args and named == args[0] and named in self.commands) else ["text", *args])


redacting = typer.Typer(cls=_RedactGroup, help="Removes identifiers from text (FILE or -); calibrates thresholds on labelled samples.")
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
            redaction.to_file(file, out, spec, bars := Bars(), jobs=many, redactor=own if subject else None)
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
    bars = Bars()
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
        say(True, {"text": restored, "restored": count}, [])
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
    say(as_json, document, [f"expected people who share all of it: {found.expected:,.1f} of {population:,} ({found.bits:.1f} bits)", *said])


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
        say(as_json, document, [least, *told])


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
    say(as_json, document, ["[deid.thresholds]", *said])


def _json_line(line: str, number: int) -> object:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        raise RequestInvalid("JSON on every line", value=f"line {number}") from None
