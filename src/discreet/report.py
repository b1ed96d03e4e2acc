"""The privacy report: what was promised, what it rests on and what it does not cover, computed from the log alone.

What: `build` reads the statements of a log and returns a frozen `Report` of labelled facts; `render_html` turns it into one page that a person can read and print,
`Report.to_json` into a document that a program can. The charts are small inline SVG: no script, no second file, no network.

Why this way: a report that is computed from anything but the log could say more than can be proven. A fact that no statement carries is absent here; a
project in progress gives a short report, not an error.

Guarantees: each fact is labelled. *public*: a parameter or figure that no private record could change. *dp-released*: computed from the private
model or from its audit, so post-processing of what the guarantee covers. *internal*: a function of private records (counts of people, refusals, times). `Report.public()`
holds only the first two (PITFALLS 41). The same entries give the same report: its date is that of the last statement.

Sources: NIST SP 800-226 (2025) for the questions that a statement about differential privacy has to answer.

Does not cover: whether a statement is true, or signed: verify the bundle first (`discreet evidence verify`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from pathlib import Path
from statistics import NormalDist
from typing import Any, Protocol, final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from discreet.evidence.log import Log
from discreet.evidence.statement import Exposure, Predicate
from discreet.store import write_atomically

SCHEMA = "urn:discreet:report:v1"


class Logged(Protocol):
    """A statement of the log, as `evidence.log.Entry` holds it."""

    @property
    def index(self) -> int: ...

    @property
    def predicate(self) -> str: ...

    @property
    def subjects(self) -> Sequence[str]: ...

    @property
    def fields(self) -> Mapping[str, Any]: ...

    @property
    def time(self) -> str: ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Fact:
    """One figure of the report: a stable name for programs, a title for people, its value and who may see it."""

    name: str
    title: str
    value: Any
    exposure: Exposure = Exposure.PUBLIC


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Facts that belong together."""

    name: str
    title: str
    facts: tuple[Fact, ...]

    def get(self, name: str) -> Any:
        """Returns the value of a fact, or None if the log does not carry it."""
        return next((fact.value for fact in self.facts if fact.name == name), None)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the log says about one run, built by `build`.

    Args:
        sentence: the guarantee in plain words.
        status: "in progress", "trained", "released" or "withheld".
        not_covered: what the guarantee does not promise, one sentence each.
        sections: the facts, in the order in which a reader wants them.
        time: of the last statement, RFC 3339.
        audience: the widest exposure it holds.
    """

    sentence: str
    status: str
    not_covered: tuple[str, ...]
    sections: tuple[Section, ...]
    time: str
    audience: Exposure = field(default=Exposure.INTERNAL)

    def section(self, name: str) -> Section:
        """Returns the section of that name; an absent one is empty."""
        return next((section for section in self.sections if section.name == name), Section(name=name, title="", facts=()))

    def public(self) -> Report:
        """Returns the same report without its internal facts."""
        kept = (replace(section, facts=tuple(f for f in section.facts if f.exposure is not Exposure.INTERNAL)) for section in self.sections)
        return replace(self, sections=tuple(section for section in kept if section.facts), audience=Exposure.DP_RELEASED)

    def to_json(self) -> dict[str, Any]:
        """Returns the report as the JSON document of `schemas/report.json`."""
        return {
            "schema": SCHEMA,
            "time": self.time,
            "status": self.status,
            "audience": str(self.audience),
            "sentence": self.sentence,
            "not_covered": list(self.not_covered),
            "sections": {s.name: {f.name: {"value": f.value, "exposure": str(f.exposure)} for f in s.facts} for s in self.sections},
        }


def build(entries: Iterable[Logged], *, run: str | None = None, checkpoint: str = "", public_key: str = "") -> Report:
    """Computes the report of one run from the statements of a log.

    Args:
        entries: every statement of the log (or of a public bundle), in any order.
        run: which run; left out, the last one that trained with a guarantee, else the last that spent.
        checkpoint: the signed checkpoint under which the entries were read, as text.
        public_key: the log's public key, as text.
    """
    log = _Log(entries)
    chosen = log.run() if run is None else run
    trained = log.last("trained", run=chosen, private=True)
    guarantee = _guarantee(log, chosen, trained)
    adapter = trained.fields.get("adapter") if trained else None
    audited = log.last("audited", adapter=adapter) if adapter else None
    decision = max(
        (e for kind in ("released", "withheld") if adapter and (e := log.last(kind, adapter=adapter))), key=lambda e: e.index, default=None
    )
    status = decision.predicate if decision else ("trained" if trained else "in progress")
    sections = (
        _purpose(log),
        _statement(guarantee),
        _budget(log, chosen),
        _training(log, trained),
        _audit(audited, guarantee),
        _attacked(log.last("attacked", adapter=adapter) if adapter else None),
        _release(decision),
        _records(log),
        _deid(log),
        _evidence(log, checkpoint, public_key),
    )
    return Report(
        sentence=_sentence(guarantee, str(status)),
        status=str(status),
        not_covered=_not_covered(guarantee),
        sections=tuple(section for section in sections if section.facts),
        time=max((entry.time for entry in log.entries), default=""),
    )


def render_html(report: Report) -> str:
    """Returns the report as one HTML page: one inline stylesheet, inline SVG, no script, nothing loaded from elsewhere."""
    page = _templates().get_template("report.html")
    style = Markup(stylesheet())  # noqa: S704 - our own file, no input in it
    drawn = dict.fromkeys(("curves", "roc", "exposure", "ceiling", "people_roc")) | charts(report)
    return page.render(report=report, style=style, rates=_rates(report), **drawn)


def charts(report: Report) -> dict[str, _Chart]:
    """Returns the charts that the report has something for, by name, as `plot.save` draws them: curves, roc, exposure, ceiling, people_roc."""
    drawn = {
        "curves": _curves(report),
        "roc": _attack(report),
        "exposure": _exposure(report),
        "ceiling": _ceiling(report),
        "people_roc": _people(report),
    }
    return {name: chart for name, chart in drawn.items() if chart is not None}


def of(log: Log, *, run: str | None = None) -> Report:
    """Computes the report of a run from a project's log."""
    entries = [entry for predicate in Predicate for entry in log.select(predicate)]
    return build(entries, run=run, checkpoint=log.checkpoint().decode(), public_key=log.public_key())


def write(log: Log, folder: Path, *, public: bool = False) -> list[Path]:
    """Writes the latest run's report as `report.html` and `report.json` into `folder` (`report-public.*` for the public one); returns both paths.

    Raises:
        StorageFull: when the disk is full; earlier files are kept.
    """
    built = of(log).public() if public else of(log)
    stem = folder / ("report-public" if public else "report")
    contents = {stem.with_suffix(".html"): render_html(built), stem.with_suffix(".json"): json.dumps(built.to_json(), indent=2, ensure_ascii=False)}
    for path, content in contents.items():
        write_atomically(path, content.encode())
    return list(contents)


def affordable_chart(points: Sequence[tuple[float, int]], *, chosen: float) -> str:
    """Returns a stand-alone SVG of how many steps a budget still buys (logarithmic) at each noise multiplier.

    Args:
        points: (noise multiplier, steps), rising, 2 or more.
        chosen: the noise multiplier that was asked about.
    """
    width, height, left, bottom = 480, 300, 70, 45
    low, high = math.log(points[0][0]), math.log(points[-1][0])
    top = math.log1p(max(1, *(steps for _, steps in points)))

    def place(sigma: float, steps: int) -> tuple[float, float]:
        across = (math.log(sigma) - low) / (high - low)
        return left + across * (width - left - 20), height - bottom - math.log1p(steps) / top * (height - bottom - 20)

    placed = [(sigma, steps, *place(sigma, steps)) for sigma, steps in points]
    line = " ".join(f"{x:.1f},{y:.1f}" for _, _, x, y in placed)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{6 if sigma == chosen else 3}"/><text x="{x:.1f}" y="{y - 10:.1f}">{steps}</text>'
        f'<text x="{x:.1f}" y="{height - bottom + 18}">{sigma:.3g}</text>'
        for sigma, steps, x, y in placed
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11" text-anchor="middle">'
        f'<rect width="{width}" height="{height}" fill="white"/><polyline points="{line}" fill="none" stroke="#246"/>{marks}'
        f'<text x="{width / 2}" y="{height - 8}">noise multiplier</text><text x="14" y="{height / 2}" transform="rotate(-90 14 {height / 2})">steps left</text></svg>\n'
    )


def write_attack(found: Mapping[str, Any], path: Path) -> None:
    """Writes the page of an audit of any model (`audit.external.audit`): its verdict, its figures, and a curve for each score.

    Raises:
        StorageFull: when the disk is full.
    """
    style = Markup(stylesheet())  # noqa: S704 - our own file, no input in it
    page = _templates().get_template("audit.html").render(found=found, style=style, charts=list(attack_charts(found).values()))
    write_atomically(path, page.encode())


def attack_charts(found: Mapping[str, Any]) -> dict[str, _Chart]:
    """Lays out the curve of each score of an audit of any model, by a name that a file can have."""
    allowed, charts = found["allowed"], dict[str, _Chart]()
    for name, points in found["roc"].items():
        lines = [("most that the claim allows", "claim", allowed)] if allowed else []
        chart = _chart(
            name,
            "false positive rate",
            "true positive rate",
            [*lines, ("guessing", "chance", [[0, 0], [1, 1]]), (name, "private", points)],
            unit_square=True,
        )
        if chart is not None:
            charts[name.replace(", ", "-").replace(" ", "-")] = replace(chart, forbidden=f"{chart.series[0].path} {_LEFT},{_TOP}" if allowed else "")
    return charts


@cache
def stylesheet() -> str:
    """Returns the one stylesheet of the report and of the pages of `web`."""
    return (resources.files("discreet") / "templates" / "style.css").read_text(encoding="utf-8")


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("discreet", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["figure"] = figure
    return environment


def figure(value: Any) -> str:
    """Returns a value as a person reads it: four significant digits, "none" for null, "yes" and "no", members joined by commas."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {figure(member)}" for key, member in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(figure(member) for member in value)
    return str(value)


@final
class _Log:
    """The statements in order, and the few questions that a report asks of them."""

    def __init__(self, entries: Iterable[Logged]) -> None:
        self.entries = sorted(entries, key=lambda entry: entry.index)

    def all(self, predicate: str, **fields: Any) -> list[Logged]:
        """Returns the statements of a kind whose fields have these values; None matches any."""
        wanted = {name: value for name, value in fields.items() if value is not None}
        return [e for e in self.entries if e.predicate == predicate and all(e.fields.get(name) == value for name, value in wanted.items())]

    def last(self, predicate: str, *, private: bool = False, **fields: Any) -> Logged | None:
        """Returns the last such statement; `private` asks for one with a guarantee."""
        return next((e for e in reversed(self.all(predicate, **fields)) if not private or e.fields.get("guarantee")), None)

    def run(self) -> str | None:
        """Returns the run that the report is about."""
        last = self.last("trained", private=True) or self.last("spent")
        return str(last.fields["run"]) if last and last.fields.get("run") is not None else None

    def subjects(self, predicate: str) -> set[str]:
        """Returns the digests that statements of a kind are about."""
        return {subject for entry in self.all(predicate) for subject in entry.subjects}


def _facts(*rows: tuple[str, str, Any] | tuple[str, str, Any, Exposure]) -> tuple[Fact, ...]:
    """Makes facts of (name, title, value[, exposure]) and leaves out what the log does not carry."""
    made = (Fact(name=row[0], title=row[1], value=row[2], exposure=row[3] if len(row) == 4 else Exposure.PUBLIC) for row in rows)
    return tuple(fact for fact in made if fact.value is not None and fact.value not in ("", [], {}))


def _guarantee(log: _Log, run: str | None, trained: Logged | None) -> dict[str, Any]:
    """Returns the figures of the promise: those of the model, else those that were spent before training; empty when there are none."""
    spent = log.last("spent", run=run) if run is not None else None
    charged = dict(spent.fields) if spent else {}
    nested = charged.get("guarantee")
    charged |= dict(nested) if isinstance(nested, Mapping) else {}
    held = trained.fields.get("guarantee") if trained else None
    figures = charged | (dict(held) if isinstance(held, Mapping) else {})
    return figures if _number(figures.get("epsilon")) and _number(figures.get("delta")) else {}


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _sentence(guarantee: Mapping[str, Any], status: str) -> str:
    if not guarantee:
        return "Nothing is promised yet: no model of this project has been trained under a budget."
    unit, epsilon, delta = guarantee.get("unit", "unit"), float(guarantee["epsilon"]), float(guarantee["delta"])
    factor = f"{math.exp(epsilon):,.0f}" if epsilon > 5 else f"{math.exp(epsilon):.2f}"
    change = "replacing" if "replace" in str(guarantee.get("relation", "")) else "adding or leaving out"
    subject = {"released": "The released model", "withheld": "The model, which was withheld,", "trained": "The trained model"}.get(
        status, "The run in progress"
    )
    return (
        f"{subject} is (epsilon = {epsilon:.3g}, delta = {delta:.2g})-differentially private for every {unit}: {change} everything that one {unit} contributed "
        f"makes no outcome more than {factor} times as likely, plus at most {delta:.2g}."
    )


def _not_covered(guarantee: Mapping[str, Any]) -> tuple[str, ...]:
    unit = guarantee.get("unit", "privacy unit")
    return (
        f"What is true of the whole population, and so would be learnt without any single {unit}.",
        f"A group: what k units have in common (a family, a ward) is protected k times less; k = 2 already means an epsilon twice as large. What is written about one {unit} in "
        "the record of another counts as the other's.",
        "What the base model learnt before it came here.",
        "Identifiers that no detector found: redaction lowers the harm, the guarantee does not rest on it.",
        "What users type into the served model, what it retrieves for them, and what others infer from outside knowledge.",
        "People who can read the sensitive source, the memory of the training machine or its timing while it runs.",
        "Choices of parameters made by looking at private results outside the ledger.",
    )


def _purpose(log: _Log) -> Section:
    collected = {entry.fields.get("source"): entry.fields for entry in log.all("collected")}
    purposes = sorted({str(entry.fields["purpose"]) for kind in ("admitted", "released") for entry in log.all(kind) if entry.fields.get("purpose")})
    bases = sorted({str(entry.fields["basis"]) for entry in log.all("admitted") if entry.fields.get("basis")})
    controllers = sorted({str(entry.fields["controller"]) for entry in log.all("released") if entry.fields.get("controller")})
    sources = [{"source": name, "sensitivity": fields.get("sensitivity")} for name, fields in collected.items()]
    facts = _facts(
        ("controller", "Who decides on the data", controllers),
        ("purposes", "Purpose", purposes),
        ("bases", "Legal basis of the records admitted", bases, Exposure.INTERNAL),
        ("sources", "Sources", sources, Exposure.INTERNAL),
    )
    return Section(name="purpose", title="Purpose and basis", facts=facts)


def _records(log: _Log) -> Section:
    counts = [
        (kind, title, len(log.subjects(kind)) if log.all(kind) else None, Exposure.INTERNAL)
        for kind, title in (
            ("collected", "Records collected"),
            ("admitted", "Records admitted"),
            ("refused", "Records refused"),
            ("deidentified", "Records de-identified"),
        )
    ]
    reasons: Counter[str] = Counter()
    for entry in log.all("refused"):
        reasons[str(entry.fields.get("reason"))] += len(entry.subjects)
    erased = len(log.subjects("erased")) if log.all("erased") else None
    facts = _facts(
        *counts,
        ("reasons", "Reasons for refusal", dict(sorted(reasons.items())), Exposure.INTERNAL),
        ("erased", "Statements of erasure cover", erased, Exposure.INTERNAL),
    )
    return Section(name="records", title="Records", facts=facts)


def _deid(log: _Log) -> Section:
    statements = log.all("deidentified")
    labels: Counter[str] = Counter()
    for entry in statements:
        labels.update({str(label): int(count) for label, count in dict(entry.fields.get("counts") or {}).items()})
    measured: Mapping[str, Any] = next((e.fields["detector"] for e in reversed(statements) if isinstance(e.fields.get("detector"), Mapping)), {})
    policies = sorted({str(entry.fields["policy"]) for entry in statements if entry.fields.get("policy")})
    facts = _facts(
        ("policy", "Policy", policies),
        ("counts", "Identifiers replaced, by label", dict(sorted(labels.items())), Exposure.INTERNAL),
        ("recall", "Marked values that the detectors cover whole", measured.get("recall"), Exposure.INTERNAL),
        ("recall_at_least", "at least, with 95 % confidence", measured.get("recall_at_least"), Exposure.INTERNAL),
        ("precision", "Spans that touch a marked value", measured.get("precision"), Exposure.INTERNAL),
        ("precision_at_least", "at least, with 95 % confidence", measured.get("precision_at_least"), Exposure.INTERNAL),
        ("corpus", "Measured on", f"{measured['corpus']}: {measured['values']} values" if measured else None, Exposure.INTERNAL),
    )
    return Section(name="deidentification", title="What is left of the person before training", facts=facts)


def _search(declared: Mapping[str, Any] | None) -> str | None:
    return None if declared is None else f"{declared['tries']}, {declared['mean']:g}"


_SAMPLERS = {
    "poisson": "Poisson: each unit takes part in each step independently",
    "truncated_poisson": "truncated Poisson: each unit independently, and of too many a public number, chosen uniformly",
    "cyclic_poisson": "cyclic Poisson: units in secret groups that take turns, each unit of the group independently",
    "poisson_documents": "Poisson by document: each of a unit's documents, at most the cap, independently",
}


def _continued(above: Mapping[str, Any] | None) -> str | None:
    """The run that a model goes on from: the figures of the mechanism are those of the last run alone, its epsilon is that of all of them together."""
    if above is None:
        return None
    return f"{above['run']} (epsilon {above['guarantee']['epsilon']:.3g} alone): the epsilon above is that of both together, the mechanism below that of the last run"


def _statement(guarantee: Mapping[str, Any]) -> Section:
    """Returns the answers to the questions of NIST SP 800-226; a fixed answer is a property of this package."""
    if not guarantee:
        return Section(name="guarantee", title="", facts=())
    unit, get = guarantee.get("unit", "unit"), guarantee.get
    sampler = _SAMPLERS.get(get("sampler", "poisson"), get("sampler"))
    bands = len(get("bands") or ())
    noise = f"Gaussian noise, correlated over {bands} steps (banded matrix factorisation)," if bands else "Gaussian noise"
    clip = "Clip norm of the first step; it follows a quantile of the norms, which the price counts" if get("adaptive") else "Clip norm"
    facts = _facts(
        ("definition", "Definition", "(epsilon, delta)-differential privacy, central model"),
        ("epsilon", "Epsilon of this model", get("epsilon")),
        ("delta", "Delta", get("delta")),
        ("unit", "Privacy unit", unit),
        ("relation", "Neighbouring data sets", get("relation")),
        ("cap", f"Documents of one {unit} in one step", get("cap")),
        ("population", f"Population: number of {unit}s that the plan was made for, a public figure", get("population")),
        ("mechanism", "Mechanism", f"DP-SGD: per-{unit} gradients clipped, summed, {noise} added once a step"),
        ("clip_norm", clip, get("clip_norm")),
        ("noise_multiplier", "Noise multiplier", get("noise_multiplier")),
        ("sampler", "Sampler that was run", sampler),
        ("sampling_probability", "Sampling probability", get("sampling_probability")),
        ("expected_batch", "Expected units in a step", get("expected_batch")),
        ("steps", "Steps", get("steps")),
        ("search", "Search for settings, charged as a whole: how the number of tries came about, and its mean", _search(get("search"))),
        ("continues", "Goes on from", _continued(get("continues"))),
        ("accountant", "Accountant of the figure above", get("accountant")),
        ("filter_epsilon", "Epsilon that the budget's filter was charged", get("filter_epsilon")),
        (
            "composition",
            "Composition",
            "every run on these people is charged to one budget; its filter stays valid when a choice depends on earlier results",
        ),
        ("randomness", "Randomness", "ChaCha20 under a key from the operating system, destroyed when the run closes; Gaussian in float64"),
        ("released", "What is released", "the weights of the last step; curves are measured on public text"),
        ("unprotected", "Not protected", "the configuration, the base model, public and generated text"),
        ("trust", "Trust model", "the controller's training machine sees the text; the log's key signs what it did"),
        ("privacy_digest", "Digest of [privacy]", get("privacy_digest")),
    )
    return Section(name="guarantee", title="The statement of differential privacy", facts=facts)


def _budget(log: _Log, run: str | None) -> Section:
    spent = log.last("spent", run=run) if run is not None else None
    name = spent.fields.get("budget") if spent else None
    opened = log.last("budget_opened", budget=name)
    if opened is None:
        return Section(name="budget", title="", facts=())
    spends = log.all("spent", budget=opened.fields.get("budget"))
    charges = [{"run": e.fields.get("run"), "epsilon": _charged(e), "time": e.time} for e in spends]
    facts = _facts(
        ("name", "Budget", opened.fields.get("budget")),
        ("epsilon", "Opened with epsilon", opened.fields.get("epsilon")),
        ("delta", "and delta", opened.fields.get("delta")),
        ("unit", "for every", opened.fields.get("unit")),
        ("runs", "Runs charged to it", len(spends)),
        ("charges", "Charged", charges),
        ("overrides", "Rules overridden, with reasons", [dict(entry.fields) for entry in log.all("overridden")], Exposure.DP_RELEASED),
    )
    return Section(name="budget", title="The budget", facts=facts)


def _charged(entry: Logged) -> Any:
    """Returns what the filter was charged by a `spent` statement, wherever the statement carries it."""
    nested = entry.fields.get("guarantee")
    inner = nested if isinstance(nested, Mapping) else {}
    return entry.fields.get("filter_epsilon", inner.get("filter_epsilon", entry.fields.get("epsilon", inner.get("epsilon"))))


def _training(log: _Log, trained: Logged | None) -> Section:
    if trained is None:
        return Section(name="training", title="", facts=())
    fields = trained.fields
    curve = _points(fields, "public_loss")
    utility = log.last("trained", kind="utility control", run=f"utility-{fields.get('run')}")
    control = _points(utility.fields, "public_loss") if utility else None
    public_runs = [
        entry.fields.get("run") for entry in log.all("trained") if not entry.fields.get("guarantee") and entry.fields.get("kind") != "utility control"
    ]
    facts = _facts(
        ("run", "Run", fields.get("run")),
        ("base", "Base model", fields.get("base")),
        ("adapter", "Weights", fields.get("adapter"), Exposure.DP_RELEASED),
        ("steps", "Steps run", fields.get("steps")),
        ("loss_before", "Held-out loss before", curve[0][1] if curve else None, Exposure.DP_RELEASED),
        ("loss_after", "Held-out loss after", curve[-1][1] if curve else None, Exposure.DP_RELEASED),
        ("gain_share", "Share of the non-private gain that is kept", _gain_share(curve, control), Exposure.DP_RELEASED),
        ("curve", "Held-out loss, private", curve, Exposure.DP_RELEASED),
        ("control_curve", "Held-out loss, non-private control on generated text", control, Exposure.DP_RELEASED),
        ("public_runs", "Runs on the public track", public_runs),
        ("tokens_per_second", "Tokens per second", fields.get("tokens_per_second"), Exposure.INTERNAL),
        ("seconds", "Seconds", fields.get("seconds"), Exposure.INTERNAL),
    )
    return Section(name="training", title="Training", facts=facts)


def _points(fields: Mapping[str, Any], *names: str) -> list[list[float]] | None:
    """Returns the first of these fields that is a curve of [x, y] pairs."""
    for name in names:
        value = fields.get(name)
        if (
            isinstance(value, Sequence)
            and not isinstance(value, str)
            and value
            and all(isinstance(p, Sequence) and len(p) == 2 and all(map(_number, p)) for p in value)
        ):
            return [[float(x), float(y)] for x, y in value]
    return None


def _gain_share(curve: Sequence[Sequence[float]] | None, control: Sequence[Sequence[float]] | None) -> float | None:
    """Returns the private gain in held-out loss over the control's; None unless both are known and the control gained."""
    if not curve or not control or control[0][1] <= control[-1][1]:
        return None
    return (curve[0][1] - curve[-1][1]) / (control[0][1] - control[-1][1])


def _audit(audited: Logged | None, guarantee: Mapping[str, Any]) -> Section:
    if audited is None:
        return Section(name="audit", title="", facts=())
    fields, released = audited.fields, Exposure.DP_RELEASED
    facts = _facts(
        ("verdict", "Verdict", fields.get("verdict"), released),
        ("epsilon_lower", "Lower bound on epsilon that the attack proves", fields.get("epsilon_lower"), released),
        ("claimed_epsilon", "Epsilon claimed", fields.get("claimed_epsilon", guarantee.get("epsilon"))),
        ("ceiling", "Largest lower bound that it could have proven", fields.get("ceiling"), released),
        ("detectable", "Smallest violation that it finds with probability 0.8, as epsilon", fields.get("detectable"), released),
        ("level", "Probability of a false alarm", fields.get("level")),
        ("layers", "Layers", [dict(layer) for layer in fields.get("layers") or []], released),
        ("roc", "Attack on the private model", _points(fields, "roc"), released),
        ("control_roc", "Attack on the control", _points(fields, "control_roc"), released),
        ("recitation", "Recitation", dict(fields.get("recitation") or {}), released),
    )
    return Section(name="audit", title="The audit: does it hold?", facts=facts)


def _attacked(attacked: Logged | None) -> Section:
    """What the attacks on real records found: all of it internal."""
    if attacked is None:
        return Section(name="attack", title="", facts=())
    fields, inside = attacked.fields, Exposure.INTERNAL
    facts = _facts(
        ("layers", "Layers", [dict(layer) for layer in fields.get("layers") or []], inside),
        ("people", "Most exposed, without names", [dict(each) for each in fields.get("people") or []], inside),
        ("roc", "Attacks by person", {name: _points(fields["roc"], name) for name in fields.get("roc") or {}}, inside),
    )
    return Section(name="attack", title="Attacks on real records, and the people most exposed", facts=facts)


def _release(decision: Logged | None) -> Section:
    if decision is None:
        return Section(name="release", title="", facts=())
    gates = [dict(gate) for gate in decision.fields.get("gates") or [] if isinstance(gate, Mapping)]
    facts = _facts(
        ("decision", "Decision", str(decision.predicate), Exposure.DP_RELEASED),
        ("name", "Name", decision.fields.get("name")),
        ("gates", "Gates", gates, Exposure.DP_RELEASED),
        ("reasons", "Reasons", decision.fields.get("reasons"), Exposure.DP_RELEASED),
        ("time", "When", decision.time, Exposure.DP_RELEASED),
    )
    return Section(name="release", title="The decision: may it leave?", facts=facts)


def _evidence(log: _Log, checkpoint: str, public_key: str) -> Section:
    destroyed = [f"{entry.predicate.replace('_', ' ')}, {entry.time}" for kind in ("control_destroyed", "key_destroyed") for entry in log.all(kind)]
    facts = _facts(
        ("statements", "Statements read", len(log.entries) or None, Exposure.INTERNAL),
        ("first", "First statement", log.entries[0].time if log.entries else None, Exposure.INTERNAL),
        ("last", "Last statement", log.entries[-1].time if log.entries else None, Exposure.INTERNAL),
        ("destroyed", "Destroyed and logged", destroyed),
        ("checkpoint", "Signed checkpoint", checkpoint),
        ("public_key", "Public key", public_key),
    )
    return Section(name="evidence", title="How to check this", facts=facts)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Series:
    """One line or cloud of a chart, already in the chart's own units."""

    label: str
    style: str
    path: str
    dots: tuple[tuple[float, float], ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Chart:
    """What the template draws: series and ticks in a box of 560 x 252."""

    title: str
    x_title: str
    y_title: str
    series: tuple[_Series, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    forbidden: str = ""
    """Corners of the shaded region, or nothing: what no attack may reach if the claim holds."""


_LEFT, _RIGHT, _TOP, _BOTTOM = 56.0, 548.0, 12.0, 216.0


def _chart(
    title: str, x_title: str, y_title: str, lines: Sequence[tuple[str, str, Sequence[Sequence[float]]]], *, unit_square: bool
) -> _Chart | None:
    """Scales (label, style, points) into the box; None when there is nothing to draw."""
    points = [point for _, _, line in lines for point in line]
    if not points:
        return None
    x_low, x_high = (0.0, 1.0) if unit_square else _span([x for x, _ in points])
    y_low, y_high = (0.0, 1.0) if unit_square else _span([y for _, y in points])

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            round(_LEFT + (x - x_low) / (x_high - x_low) * (_RIGHT - _LEFT), 1),
            round(_BOTTOM - (y - y_low) / (y_high - y_low) * (_BOTTOM - _TOP), 1),
        )

    series = []
    for label, style, line in lines:
        dots = tuple(place(x, y) for x, y in line)
        series.append(
            _Series(
                label=label, style=style, path=" ".join(f"{x},{y}" for x, y in dots) if len(dots) > 1 else "", dots=dots if len(dots) <= 40 else ()
            )
        )
    x_ticks = tuple((place(x, y_low)[0], f"{x:.10g}") for x in _ticks(x_low, x_high))
    y_ticks = tuple((place(x_low, y)[1], f"{y:.10g}") for y in _ticks(y_low, y_high))
    return _Chart(title=title, x_title=x_title, y_title=y_title, series=tuple(series), x_ticks=x_ticks, y_ticks=y_ticks)


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """Returns four to ten round numbers between the ends."""
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5) if (high - low) / (step * factor) <= 10)
    return [round(number * step, 10) for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _curves(report: Report) -> _Chart | None:
    training = report.section("training")
    lines = [
        ("private", "private", training.get("curve") or []),
        ("non-private control", "control", training.get("control_curve") or []),
    ]
    return _chart("Loss on public held-out text", "step", "loss per token", [line for line in lines if line[2]], unit_square=False)


def _attack(report: Report) -> _Chart | None:
    """The attack's true and false positives against what the claim allows: a point above the line would refute it."""
    audit, guarantee = report.section("audit"), report.section("guarantee")
    epsilon, delta = guarantee.get("epsilon"), guarantee.get("delta")
    if not audit.facts or epsilon is None:
        return None
    allowed = _allowed_gaussian(_figures(audit, "curve test").get("claimed")) or _allowed(float(epsilon), float(delta))
    lines = [
        ("most that the claim allows", "claim", allowed),
        ("guessing", "chance", [[0.0, 0.0], [1.0, 1.0]]),
        ("private model", "private", audit.get("roc") or _operating_point(audit, "curve test")),
        ("non-private control", "control", audit.get("control_roc") or _operating_point(audit, "positive control")),
    ]
    chart = _chart("The attack against the claim", "false positive rate", "true positive rate", [line for line in lines if line[2]], unit_square=True)
    return chart and replace(chart, forbidden=f"{chart.series[0].path} {_LEFT},{_TOP}")


def _people(report: Report) -> _Chart | None:
    """The attacks on real records against what the claim allows; internal, so absent from the public report."""
    chosen = {name: points for name, points in (report.section("attack").get("roc") or {}).items() if name in ("reference", "min-k++", "rmia")}
    claimed = _allowed_gaussian(_figures(report.section("audit"), "curve test").get("claimed"))
    styles = ("private", "control", "chance")
    lines = [
        ("most that the claim allows", "claim", claimed),
        *((name, styles[place], points) for place, (name, points) in enumerate(chosen.items())),
    ]
    chart = (
        _chart("Attacks on real records, by person", "false positive rate", "true positive rate", lines, unit_square=True)
        if chosen and claimed
        else None
    )
    return chart and replace(chart, forbidden=f"{chart.series[0].path} {_LEFT},{_TOP}")


def _rates(report: Report) -> list[dict[str, Any]]:
    """The table of the attacks by person: area and rate at 1 %, each with its limits and what the claim allows."""
    found = _figures(report.section("attack"), "records: membership").get("by_subject") or {}
    return [{"name": name, **each, "first": each["rates"][0]} for name, each in found.items()]


def _exposure(report: Report) -> _Chart | None:
    """How many planted canaries stand out by how many bits, beside what guessing gives: half of them less than one bit, a quarter one, and so on."""
    extracted = (report.section("audit").get("recitation") or {}).get("extraction") or {}
    found = {name: each.get("exposure", {}).get("counts") for name, each in extracted.items()}
    total = sum(found.get("private") or [])
    if not total:
        return None
    guessing = [total / 2 ** (bits + 1) for bits in range(len(found["private"]))]
    lines = [
        ("guessing", "chance", guessing),
        ("private model", "private", found["private"]),
        ("non-private control", "control", found.get("control") or []),
    ]
    steps = [
        (label, style, [[bits + right, count] for bits, count in enumerate(counts) for right in (0, 1)]) for label, style, counts in lines if counts
    ]
    return _chart("Exposure of planted canaries", "bits of exposure", "canaries", steps, unit_square=False)


def _ceiling(report: Report) -> _Chart | None:
    """The certified bounds as they are, as they could have been at most, and the claim, on one axis of epsilon."""
    audit = report.section("audit")
    certified, claimed = _figures(audit, "certified bound"), audit.get("claimed_epsilon")
    found = [certified, *(certified.get(method) or {} for method in _METHODS if method != certified.get("method"))]
    rows = [each for each in found if _number(each.get("epsilon")) and _number(each.get("ceiling"))]
    if not rows or not _number(claimed):
        return None
    lines = [("epsilon claimed", "claim", [[float(claimed), 0.0], [float(claimed), float(len(rows))]])]
    for place, row in enumerate(rows):
        height, said = len(rows) - place - 0.5, place == 0  # one label each in the legend
        lines.append(("at most" if said else "", "control", [[0.0, height], [float(row["ceiling"]), height]]))
        lines.append(("proven" if said else "", "private", [[0.0, height], [float(row["epsilon"]), height]]))
    chart = _chart("Lower bounds on epsilon against their ceilings", "epsilon", "", lines, unit_square=False)
    names = [_METHODS.get(str(row.get("method")), "bound") for row in rows]
    return chart and replace(chart, y_ticks=tuple((series.dots[0][1], name) for series, name in zip(chart.series[1::2], names, strict=True)))


_METHODS = {"f_dp_one_run": "f-DP", "one_run": "one run", "clopper_pearson": "C-P", "gdp": "GDP"}
"""Rows of the chart, in the width of an axis label."""


def _figures(audit: Section, layer: str) -> Mapping[str, Any]:
    """Returns the figures of a layer of the audit; an absent one has none."""
    return next((found.get("figures", {}) for found in audit.get("layers") or [] if found.get("name") == layer), {})


def _operating_point(audit: Section, layer: str) -> list[list[float]]:
    """Returns the [fpr, tpr] that a layer of the audit reports, if it does."""
    figures = _figures(audit, layer)
    return [[float(figures["fpr"]), float(figures["tpr"])]] if _number(figures.get("fpr")) and _number(figures.get("tpr")) else []


_GRID = (0.0, 1e-5, 1e-4, *(k / 1000 for k in range(1, 20)), *(k / 50 for k in range(1, 51)))
"""False-positive rates at which the claim's curve is drawn: dense where it is steep."""


def _allowed_gaussian(mu: Any) -> list[list[float]]:
    """Returns the trade-off curve of mu-GDP (Dong, Roth, Su 2019), against which the audit's curve test decides; empty without a mu."""
    if not _number(mu):
        return []
    normal = NormalDist()
    return [[a, normal.cdf(normal.inv_cdf(a) + mu) if 0 < a < 1 else a] for a in _GRID]


def _allowed(epsilon: float, delta: float) -> list[list[float]]:
    """Returns the largest true-positive rate under (epsilon, delta) at 0..1 (Kairouz, Oh, Viswanath 2015): min(1, delta + e^eps a, 1 - e^-eps (1 - delta - a))."""
    growth = math.exp(min(epsilon, 700.0))
    return [[a, max(0.0, min(1.0, delta + growth * a, 1 - (1 - delta - a) / growth))] for a in _GRID]
