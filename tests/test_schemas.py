"""The JSON schemas: valid, with an example each; what our own code prints fits them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib import resources
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from discreet import errors
from discreet.report import build

SCHEMAS: dict[str, Any] = {
    path.name.removesuffix(".json"): json.loads(path.read_text(encoding="utf-8"))
    for path in (resources.files("discreet") / "schemas").iterdir()
    if path.name.endswith(".json")
}
COMMANDS = (
    "redact", "redact-calibrate", "redact-restore", "redact-risk", "redact-table", "privacy-epsilon", "privacy-noise", "privacy-curve", "budget-open", "budget-show", "budget-reserve", "budget-plan", "budget-raise", "evidence-rotate-key", "evidence-pin", "evidence-tiles", "evidence-witness", "plan", "train", "audit", "release", "evidence-export", "evidence-verify",
    "trace", "run", "demo", "index", "search", "search-private", "catalog", "catalog-classify", "consent", "erase", "init", "report", "error",
    "federate-enroll", "federate-roster", "federate-server", "federate-client", "federate-leave", "federate-simulate",
    "statistics", "synthesize", "child", "erase-drill", "erase-request", "erase-resume", "retention", "lineage", "update", "access", "access-export", "access-show", "consent-history", "consent-import", "consent-same-person",
)  # fmt: skip


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator(SCHEMAS[name])


def test_every_document_has_a_schema() -> None:
    assert set(SCHEMAS) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_schema_is_valid_and_its_example_fits(name: str) -> None:
    Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name]["$id"] == f"urn:discreet:schema:{name}:v1"
    for example in SCHEMAS[name]["examples"]:
        validator(name).validate(example)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_document_without_a_required_member_does_not_fit(name: str) -> None:
    example = SCHEMAS[name]["examples"][0]
    assert SCHEMAS[name]["required"]
    for member in SCHEMAS[name]["required"]:
        broken = copy.deepcopy(example)
        del broken[member]
        assert not validator(name).is_valid(broken)


def test_a_verification_says_what_failed_exactly_when_it_failed() -> None:
    check = validator("evidence-verify")
    assert check.is_valid({"valid": True, "failed": [], "checkpoint": "c"})
    assert not check.is_valid({"valid": True, "failed": ["x"], "checkpoint": "c"})
    assert not check.is_valid({"valid": False, "failed": [], "checkpoint": None})


def family(kind: type[errors.DiscreetError]) -> Iterator[type[errors.DiscreetError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from family(child)


@pytest.mark.parametrize("kind", list(family(errors.DiscreetError)), ids=lambda kind: kind.__name__)
def test_every_error_prints_an_error_document(kind: type[errors.DiscreetError]) -> None:
    validator("error").validate(kind("a rule", value=7, remedy="A remedy.").to_json())
    validator("error").validate(kind("a rule").to_json())


def test_an_empty_report_fits() -> None:
    validator("report").validate(build([]).to_json())
    validator("report").validate(build([]).public().to_json())
