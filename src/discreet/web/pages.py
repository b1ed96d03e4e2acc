"""The dashboard and the report as pages of a Starlette application.

What: `routes(provider)` gives the routes; whoever has the store and the log implements `Provider`. A page shows budgets, runs, the latest release, the signed
checkpoint and the report of a run.

Why this way: pages are a view of what the log and the ledger already say, so there is no state here, no form and no session.

Guarantees: only GET and HEAD; only the public rendering of the report (nothing labelled internal); no script can run (Content-Security-Policy names only our
stylesheet, by its hash); an error page holds the error's own public sentence and nothing else.

Does not cover: who may look. The pages are public by content, but budgets and run names are business facts: bind to localhost or put them behind the gateway's access rules.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping
from functools import cache, wraps
from typing import Any, Protocol, final

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from discreet.errors import DiscreetError, NotFound
from discreet.evidence.statement import Entry, Predicate
from discreet.ledger import Budget
from discreet.pipeline import House
from discreet.report import Report, figure, render_html, stylesheet
from discreet.report import of as report_of


class Provider(Protocol):
    """What the pages ask for; each call reads the present state."""

    def overview(self) -> Mapping[str, Any]:
        """Returns the dashboard's facts.

        Keys: `project` {name, purpose, controller}; `budgets` [{name, epsilon, delta, unit, spent, remaining}], the epsilons of the filter; `runs` [{run, status, epsilon,
        delta, steps, verdict, time}], newest first, unknown members null; `release` {name, epsilon, delta, unit, adapter, time} or null; `checkpoint` and
        `public_key`, text or "".
        """

    def report(self, run: str | None) -> Report:
        """Returns the report of a run, of the latest one for None.

        Raises:
            NotFound: when there is no such run.
        """


def routes(provider: Provider) -> list[Route]:
    """Returns the read-only pages: `/`, `/report`, `/report.json` (both with `?run=`), `/checkpoint`, `/style.css`.

    Args:
        provider: gives the facts; its calls may block, they run on worker threads.
    """

    @_page
    def dashboard(_: Request) -> Response:
        return HTMLResponse(_templates().get_template("dashboard.html").render(**provider.overview()))

    @_page
    def report(request: Request) -> Response:
        return HTMLResponse(render_html(provider.report(request.query_params.get("run")).public()))

    @_page
    def report_json(request: Request) -> Response:
        return JSONResponse(provider.report(request.query_params.get("run")).public().to_json())

    @_page
    def checkpoint(_: Request) -> Response:
        return PlainTextResponse(str(provider.overview()["checkpoint"]))

    @_page
    def style(_: Request) -> Response:
        return Response(stylesheet(), media_type="text/css")

    pages = {"/": dashboard, "/report": report, "/report.json": report_json, "/checkpoint": checkpoint, "/style.css": style}
    return [Route(path, page, methods=["GET"]) for path, page in pages.items()]


def _page(endpoint: Callable[[Request], Response]) -> Callable[[Request], Response]:
    """Wraps an endpoint: our errors become their public sentence, and every answer forbids scripts, framing and storing."""

    @wraps(endpoint)
    def answer(request: Request) -> Response:
        try:
            response = endpoint(request)
        except DiscreetError as error:
            response = PlainTextResponse(str(error), status_code=error.http_status)
        response.headers.update(_headers())
        return response

    return answer


@cache
def _headers() -> dict[str, str]:
    """Returns the headers of every page; the hash admits the report's inline stylesheet and no other."""
    style = base64.b64encode(hashlib.sha256(stylesheet().encode()).digest()).decode()
    return {
        "Content-Security-Policy": f"default-src 'none'; style-src 'self' 'sha256-{style}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }


@cache
def _templates() -> Environment:
    loader = PackageLoader("discreet", "web/templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["figure"] = figure
    return environment


@final
class HouseProvider:
    """The pages' facts of one open project, read from its log and ledger alone."""

    def __init__(self, house: House) -> None:
        self._house = house

    def overview(self) -> Mapping[str, Any]:
        """Returns the dashboard's facts (see `Provider`)."""
        house, log = self._house, self._house.log
        declared = house.project.project
        released = log.select(Predicate.RELEASED)
        return {
            "project": {"name": declared.name, "purpose": declared.purpose, "controller": declared.controller},
            "budgets": [_budget(budget) for budget in house.ledger.budgets()],
            "runs": [self._run(entry) for entry in reversed(log.select(Predicate.TRAINED)) if entry.fields["track"] == "dp"],
            "release": _released(released[-1]) if released else None,
            "checkpoint": log.checkpoint().decode(),
            "public_key": log.public_key(),
        }

    def report(self, run: str | None) -> Report:
        """Returns the report of a run (see `Provider`)."""
        if run is not None and run not in {entry.fields["run"] for entry in self._house.log.select(Predicate.TRAINED)}:
            raise NotFound("a run of this project")
        return report_of(self._house.log, run=run)

    def _run(self, trained: Entry) -> dict[str, Any]:
        same = [entry for kind in (Predicate.AUDITED, Predicate.RELEASED, Predicate.WITHHELD) for entry in self._house.log.select(kind)]
        about = [entry for entry in same if entry.fields["adapter"] == trained.fields["adapter"]]
        promised = trained.fields["guarantee"]
        return {
            "run": trained.fields["run"],
            "status": max(about, key=lambda entry: entry.index).predicate.value if about else "trained",
            "epsilon": promised["epsilon"],
            "delta": promised["delta"],
            "steps": trained.fields.get("steps"),
            "verdict": next((entry.fields["verdict"] for entry in about if entry.predicate is Predicate.AUDITED), None),
            "time": trained.time,
        }


def _budget(budget: Budget) -> dict[str, Any]:
    left = budget.remaining_epsilon
    return {
        "name": budget.name,
        "epsilon": budget.epsilon,
        "delta": budget.delta,
        "unit": budget.unit,
        "spent": budget.epsilon - left,
        "remaining": left,
    }


def _released(entry: Entry) -> dict[str, Any]:
    promised = entry.fields["guarantee"]
    return {
        "name": entry.fields["name"],
        "epsilon": promised["epsilon"],
        "delta": promised["delta"],
        "unit": promised["unit"],
        "adapter": entry.fields["adapter"],
        "time": entry.time,
    }
