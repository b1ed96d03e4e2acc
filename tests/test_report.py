"""The report: every figure from the log, labelled; nothing internal in the public rendering; stages that are missing are missing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from discreet.audit.extraction import Share
from discreet.report import Exposure, Report, _allowed, _allowed_gaussian, build, charts, figure, render_html

ADAPTER = "sha256:" + "ad" * 32
BASE = "sha256:" + "ba" * 32
GUARANTEE = {
    "epsilon": 7.61,
    "delta": 0.0002,
    "unit": "patient",
    "relation": "add_remove",
    "accountant": "pld",
    "filter_epsilon": 7.98,
    "noise_multiplier": 0.62,
    "sampling_probability": 0.026,
    "steps": 25,
    "clip_norm": 0.5,
    "expected_batch": 64,
    "population": 2437,
    "cap": 1,
    "sampler": "poisson",
    "privacy_digest": "sha256:" + "cc" * 32,
}
AUDIT = {
    "adapter": ADAPTER,
    "verdict": "PASS",
    "epsilon_lower": 0.31,
    "ceiling": 4.2,
    "detectable": 9.1,
    "detectable_mu": 2.2,
    "claimed_epsilon": 7.61,
    "claimed_delta": 0.0002,
    "level": 0.05,
    "layers": [
        {"name": "positive control", "verdict": "PASS", "figures": {"fpr": 0.04, "tpr": 0.98, "auc": 0.99}},
        {"name": "curve test", "verdict": "PASS", "figures": {"fpr": 0.04, "tpr": 0.09, "auc": 0.55, "claimed": 1.9}},
    ],
    "recitation": {"control": 31, "private": 0, "tried": 40},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    index: int
    predicate: str
    subjects: Sequence[str]
    fields: Mapping[str, Any]
    time: str


def log(*statements: tuple[str, int, Mapping[str, Any]]) -> list[Entry]:
    """Makes entries of (predicate, number of subjects, fields)."""
    return [
        Entry(index=i, predicate=p, subjects=[f"sha256:{p}-{i}-{k}" for k in range(n)], fields=f, time=f"2026-11-23T10:00:{i:02d}.000000Z")
        for i, (p, n, f) in enumerate(statements)
    ]


def story() -> list[Entry]:
    curve = [[0, 3.1], [10, 2.5], [25, 2.2]]
    return log(
        ("collected", 5000, {"source": "notes", "sensitivity": "special"}),
        ("admitted", 4873, {"purpose": "note-assistant", "basis": "consent"}),
        ("refused", 127, {"purpose": "note-assistant", "reason": "opted out"}),
        ("deidentified", 4873, {"policy": "sha256:99", "counts": {"PERSON": 5501, "MRN": 498}, "detector": {"samples": 40, "values": 200, "recall": 0.95, "recall_at_least": 0.91, "precision": 0.97, "precision_at_least": 0.94, "corpus": "labelled.jsonl"}}),
        ("frozen", 1, {"name": "notes"}),
        ("budget_opened", 1, {"budget": "patients", "epsilon": 8.0, "delta": 0.0002, "unit": "patient"}),
        ("spent", 1, {"reservation": "r1", "run": "run-1", "budget": "patients", "plan": "sha256:77", "filter_epsilon": 7.98}),
        ("trained", 1, {"run": "run-1", "plan": "sha256:77", "base": BASE, "adapter": ADAPTER, "guarantee": GUARANTEE, "track": "dp", "steps": 25, "public_loss": curve}),
        ("trained", 1, {"run": "utility-run-1", "track": "public", "kind": "utility control", "guarantee": None, "public_loss": [[0, 3.1], [25, 1.9]]}),
        ("audited", 1, AUDIT),
        ("control_destroyed", 1, {"control": "sha256:11"}),
        ("released", 1, {"name": "notes-1", "adapter": ADAPTER, "base": BASE, "guarantee": GUARANTEE, "gates": [{"gate": "max_epsilon", "required": 8.0, "got": 7.61, "holds": True}]}),
    )  # fmt: skip


class Reader(HTMLParser):
    """Collects the text a person sees and the tags that would load or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.open: list[str] = []
        self.loading: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "object") or any(
            name in ("src", "href", "style") or name.startswith("on") for name, _ in attrs
        ):
            self.loading.append(tag)
        if tag not in ("meta", "br", "line", "polyline", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.seen.append(data)


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    assert reader.open == []
    return reader


def values(report: Report) -> dict[str, Any]:
    return {f"{section.name}.{fact.name}": fact.value for section in report.sections for fact in section.facts}


def test_the_figures_are_those_of_the_log() -> None:
    found = values(build(story(), checkpoint="discreet\n11\nroot", public_key="log+key"))
    assert found["guarantee.epsilon"] == 7.61
    assert found["budget.charges"][0]["epsilon"] == 7.98
    assert found["records.collected"] == 5000
    assert found["records.reasons"] == {"opted out": 127}
    assert found["deidentification.counts"] == {"MRN": 498, "PERSON": 5501}
    assert found["deidentification.recall"] == 0.95
    assert found["training.gain_share"] == pytest.approx(0.75)
    assert found["audit.recitation"]["tried"] == 40
    assert found["release.decision"] == "released"
    assert found["evidence.checkpoint"].startswith("discreet")


def test_the_sentence_states_the_guarantee() -> None:
    sentence = build(story()).sentence
    assert sentence.startswith("The released model is (epsilon = 7.61, delta = 0.0002)-differentially private for every patient")
    assert "no outcome more than 2,018 times as likely, plus at most 0.0002" in sentence
    small = build(log(("trained", 1, {"run": "r", "adapter": ADAPTER, "guarantee": GUARANTEE | {"epsilon": 1.0}}))).sentence
    assert "The trained model" in small
    assert "adding or leaving out" in small
    assert "more than 2.72 times as likely" in small


def test_a_public_rendering_holds_nothing_internal() -> None:
    """PITFALLS 41: counts, reasons and sources stay inside, in both renderings; the declared population is public."""
    report = build(story())
    assert {"records", "training", "audit"} <= {section.name for section in report.sections}
    public = report.public()
    assert all(fact.exposure is not Exposure.INTERNAL for section in public.sections for fact in section.facts)
    for rendered in (json.dumps(public.to_json()), "".join(read(render_html(public)).seen)):
        for internal in ("5000", "4873", "opted out", "5501"):
            assert internal in json.dumps(report.to_json())
            assert internal not in rendered
        assert "7.61" in rendered
        assert "2437" in rendered
    assert "do not publish" in render_html(report)
    assert "do not publish" not in render_html(public)


def test_both_documents_fit_the_schema() -> None:
    schema = json.loads((resources.files("discreet") / "schemas" / "report.json").read_text())
    for report in (build(story()), build(story()).public()):
        Draft202012Validator(schema).validate(json.loads(json.dumps(report.to_json())))


def test_the_page_loads_nothing_and_is_well_formed() -> None:
    reader = read(render_html(build(story(), checkpoint="discreet", public_key="k")))
    assert reader.loading == []
    text = " ".join(reader.seen)
    for expected in (
        "What is not covered",
        "31 of 40",
        "0 of 40",
        "PASS",
        "max_epsilon",
        "discreet evidence verify",
        "non-private control",
        "Poisson",
    ):
        assert expected in text
    assert text.index("differentially private") < text.index("What is not covered") < text.index("The audit")


def test_both_curves_and_the_attack_are_drawn() -> None:
    html = render_html(build(story()))
    assert html.count("<svg") == 2
    lines = re.findall(r'<polyline class="(\w+)" points="([^"]+)"', html)
    assert [style for style, _ in lines] == ["private", "control", "claim", "chance"]
    private = [tuple(map(float, point.split(","))) for point in lines[0][1].split()]
    assert len(private) == 3
    assert private[0][1] < private[-1][1], "a falling loss goes down the page"
    assert html.count("<circle") >= 7


def test_a_claim_of_zero_epsilon_allows_only_guessing() -> None:
    """At epsilon -> 0 and delta -> 0 the claim line is the diagonal; at any epsilon it lies above it."""
    assert all(tpr == pytest.approx(fpr, abs=1e-9) for fpr, tpr in _allowed(0.0, 0.0))
    assert all(tpr >= fpr for fpr, tpr in _allowed(2.0, 1e-5))
    assert _allowed(2.0, 1e-5)[0][1] == pytest.approx(1e-5)
    assert all(tpr == pytest.approx(fpr) for fpr, tpr in _allowed_gaussian(0.0))
    assert dict(_allowed_gaussian(1.0))[0.5] == pytest.approx(0.841345, abs=1e-6)
    assert _allowed_gaussian(None) == []


@pytest.mark.parametrize("stages", range(13))
def test_a_project_in_progress_gives_a_report(stages: int) -> None:
    report = build(story()[:stages])
    read(render_html(report))
    assert report.status == ("released" if stages == 12 else "trained" if stages >= 8 else "in progress")
    assert ("Nothing is promised" in report.sentence) == (stages < 8)


def test_what_was_spent_is_a_promise_before_the_model_is_there() -> None:
    report = build(log(("spent", 1, {"run": "run-2", "reservation": "r", "budget": "b", "plan": "p", "guarantee": GUARANTEE})))
    assert report.sentence.startswith("The run in progress is (epsilon = 7.61")


def extracted(count: int) -> dict[str, Any]:
    """What one model gives away of its canaries, as the audit states it."""
    sides = {"planted": Share.of(count, 40).figures(), "held_out": Share.of(0, 40).figures()}
    return {
        "recited": sides,
        "discoverable": {"samples": 1000, "probability": 0.5, **sides},
        "exposure": {"rank": {"median": 5.0, "low": 4.0, "high": 6.0}, "counts": [10, 6, 3, 1 + count]},
    }


def leaked(count: int) -> dict[str, Any]:
    return {"planted": Share.of(count, 20).figures(), "held_out": Share.of(0, 20).figures()}


def test_the_audit_is_drawn_with_its_forbidden_region_exposure_and_ceiling() -> None:
    pair = {"method": "gdp", "epsilon": 0.2, "ceiling": 6.5}
    certified = {"name": "certified bound", "verdict": "PASS", "figures": {"method": "f_dp_one_run", "epsilon": 0.3, "ceiling": 4.2, "gdp": pair}}
    drawn = AUDIT | {
        "layers": [*AUDIT["layers"], certified],
        "roc": [[0.0, 0.02], [0.5, 0.6], [1.0, 1.0]],
        "recitation": AUDIT["recitation"]
        | {"extraction": {"private": extracted(0), "control": extracted(31)}, "identifiers": {"private": leaked(0), "control": leaked(17)}},
    }
    entries = [
        Entry(index=e.index, predicate=e.predicate, subjects=e.subjects, fields=drawn if e.predicate == "audited" else e.fields, time=e.time)
        for e in story()
    ]
    page = render_html(build(entries))
    assert '<polygon class="forbidden"' in page
    for cell in ("31 of 40 (0.6", "0 of 40 (0 to 0.08", "said at least once in 1000 samples", "by rank", "5 (4 to 6)", "17 of 20 (0.6"):
        assert cell in page, cell
    assert page.index("Exposure of planted canaries") < page.index("Lower bounds on epsilon against their ceilings")
    bounds_drawn = charts(build(entries))["ceiling"]
    assert [name for _, name in bounds_drawn.y_ticks] == ["f-DP", "GDP"]
    assert [series.label for series in bounds_drawn.series if series.label] == ["epsilon claimed", "at most", "proven"]
    plain = render_html(build(story()))
    assert "Exposure of planted canaries" not in plain


def test_a_withheld_model_says_why() -> None:
    entries = [*story()[:-1], *log(*[("refused", 0, {})] * 11, ("withheld", 1, {"adapter": ADAPTER, "reasons": ["audit verdict FAIL"], "gates": [{"gate": "verdicts", "required": ["PASS"], "got": "FAIL", "holds": False}]}))[-1:]]  # fmt: skip
    report = build(entries)
    assert report.status == "withheld"
    assert "which was withheld" in report.sentence
    assert "audit verdict FAIL" in render_html(report)


def test_a_report_is_about_one_run() -> None:
    other = "sha256:" + "ee" * 32
    entries = story()
    entries += [
        Entry(index=20, predicate="trained", subjects=["s"], fields={"run": "run-2", "base": BASE, "adapter": other, "plan": "p", "guarantee": GUARANTEE | {"epsilon": 3.0}}, time="2026-11-24T00:00:00.000000Z"),
        Entry(index=21, predicate="trained", subjects=["s"], fields={"run": "public-1", "base": BASE, "adapter": "x", "plan": None, "guarantee": None}, time="2026-11-24T00:00:01.000000Z"),
    ]  # fmt: skip
    latest = build(entries)
    assert "epsilon = 3," in latest.sentence
    assert latest.section("audit").facts == ()
    assert latest.section("training").get("public_runs") == ["public-1"]
    assert "epsilon = 7.61" in build(entries, run="run-1").sentence


def test_order_and_date_come_from_the_log() -> None:
    assert build(reversed(story())).to_json() == build(story()).to_json()
    assert build(story()).time == "2026-11-23T10:00:11.000000Z"


def test_markup_in_a_statement_is_text() -> None:
    html = render_html(build(log(("admitted", 1, {"purpose": "<script>alert(1)</script>", "basis": "consent"}))))
    assert "<script" not in html
    assert "&lt;script&gt;" in html


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "none"), (True, "yes"), (0.00020001, "0.0002"), (7.98123, "7.981"), (5, "5"), ({"a": 1.5, "b": [1, 2]}, "a 1.5, b 1, 2"), ("x", "x")],
)
def test_figures_are_readable(value: Any, shown: str) -> None:
    assert figure(value) == shown
