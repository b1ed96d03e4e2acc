"""The pages: read-only, public, no script, one stylesheet; what the provider says is what a reader sees."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from discreet.errors import NotFound
from discreet.report import Report, build
from discreet.web.pages import routes

OVERVIEW: dict[str, Any] = {
    "project": {"name": "hospital", "purpose": "note-assistant", "controller": "Riverside"},
    "budgets": [{"name": "patients", "epsilon": 8.0, "delta": 0.0002, "unit": "patient", "spent": 6.0, "remaining": 2.0}],
    "runs": [
        {"run": "run-1", "status": "released", "epsilon": 7.61, "delta": 0.0002, "steps": 25, "verdict": "PASS", "time": "2026-11-23T10:00:00Z"}
    ],
    "release": {"name": "notes-1", "epsilon": 7.61, "delta": 0.0002, "unit": "patient", "adapter": "sha256:ad", "time": "2026-11-23T10:00:00Z"},
    "checkpoint": "discreet.example/hospital\n11\nroot=",
    "public_key": "discreet.example/hospital+c7+key",
}
EMPTY: dict[str, Any] = {"project": OVERVIEW["project"], "budgets": [], "runs": [], "release": None, "checkpoint": "", "public_key": ""}


def entries() -> list[Any]:
    guarantee = {"epsilon": 7.61, "delta": 0.0002, "unit": "patient", "population": 2437}
    rows: list[tuple[str, list[str], Mapping[str, Any]]] = [
        ("admitted", ["a", "b"], {"purpose": "note-assistant", "basis": "consent"}),
        ("refused", ["c"], {"purpose": "note-assistant", "reason": "opted out"}),
        ("trained", ["d"], {"run": "run-1", "base": "b", "adapter": "sha256:ad", "guarantee": guarantee, "seconds": 417.25}),
    ]
    return [SimpleNamespace(index=i, predicate=p, subjects=s, fields=f, time=f"2026-11-23T10:00:0{i}Z") for i, (p, s, f) in enumerate(rows)]


@dataclass
class Fixed:
    """A provider with one state."""

    facts: Mapping[str, Any] = field(default_factory=lambda: OVERVIEW)

    def overview(self) -> Mapping[str, Any]:
        return self.facts

    def report(self, run: str | None) -> Report:
        if run not in (None, "run-1"):
            raise NotFound("a run of this project")
        return build(entries(), run=run)


def client(facts: Mapping[str, Any] = OVERVIEW) -> TestClient:
    return TestClient(Starlette(routes=list(routes(Fixed(facts)))))


def test_the_dashboard_shows_budget_runs_release_and_checkpoint() -> None:
    page = client().get("/").text
    for expected in (
        "hospital, for note-assistant",
        "notes-1",
        "7.61",
        "75 percent spent",
        'href="/report?run=run-1"',
        "PASS",
        "discreet.example/hospital",
        "+c7+key",
    ):
        assert expected in page
    assert re.search(r'<rect width="75.0"', page)


def test_an_empty_project_has_a_dashboard() -> None:
    page = client(EMPTY).get("/").text
    for expected in ("Nothing is released", "No budget is open", "No run yet", "The log is empty"):
        assert expected in page


def test_the_report_pages_are_the_public_rendering() -> None:
    page, document = client().get("/report").text, client().get("/report.json")
    assert "differentially private for every patient" in page
    assert document.json()["audience"] == "dp-released"
    for internal in ("opted out", "417.2"):
        assert internal not in page
        assert internal not in document.text


def test_an_unknown_run_is_not_found_and_is_not_echoed() -> None:
    answer = client().get("/report", params={"run": "<script>"})
    assert answer.status_code == 404
    assert answer.text == "Expected a run of this project."


def test_names_are_escaped() -> None:
    facts = OVERVIEW | {"runs": [OVERVIEW["runs"][0] | {"run": "<b>x</b>&y"}]}
    page = client(facts).get("/").text
    assert "<b>x" not in page
    assert "/report?run=%3Cb%3Ex" in page


@pytest.mark.parametrize("path", ["/", "/report", "/report.json", "/checkpoint", "/style.css", "/report?run=none"])
def test_every_answer_forbids_scripts_and_storing(path: str) -> None:
    headers = client().get(path).headers
    assert headers["content-security-policy"].startswith("default-src 'none'; style-src 'self' 'sha256-")
    assert "script" not in headers["content-security-policy"]
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"


def test_the_policy_admits_exactly_the_inline_stylesheet() -> None:
    answer = client().get("/report")
    inline = re.search(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    assert inline is not None
    assert base64.b64encode(hashlib.sha256(inline[1].encode()).digest()).decode() in answer.headers["content-security-policy"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_pages_are_read_only(method: str) -> None:
    for path in ("/", "/report", "/checkpoint"):
        assert client().request(method, path).status_code == 405


def test_the_checkpoint_is_plain_text() -> None:
    answer = client().get("/checkpoint")
    assert answer.text == OVERVIEW["checkpoint"]
    assert answer.headers["content-type"].startswith("text/plain")
