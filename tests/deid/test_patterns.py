"""Each row of the pattern table against its own examples, and the table against its rules."""

from __future__ import annotations

from pathlib import Path

import pytest

from discreet.deid.detect import normalise, scan
from discreet.deid.patterns import PATTERNS, Label, Pattern, is_card, is_dea, is_npi, is_vin


def _cases(kind: str) -> list[object]:
    return [
        pytest.param(row, example, id=f"{row.label}-{index}-{number}")
        for index, row in enumerate(PATTERNS)
        for number, example in enumerate(getattr(row, kind))
    ]


@pytest.mark.parametrize(("row", "example"), _cases("matches"))
def test_row_finds_exactly_the_marked_value(row: Pattern, example: str) -> None:
    text = example.replace("«", "").replace("»", "")
    assert list(scan(row, normalise(text).text)) == [(example.index("«"), example.index("»") - 1)]


@pytest.mark.parametrize(("row", "example"), _cases("rejects"))
def test_row_finds_nothing(row: Pattern, example: str) -> None:
    assert list(scan(row, normalise(example).text)) == []


def test_every_row_has_examples_of_both_kinds() -> None:
    assert [row.expression for row in PATTERNS if not row.matches or not row.rejects] == []


def test_every_row_is_scored_in_range() -> None:
    assert all(0 < row.score <= 1 for row in PATTERNS)


def test_every_label_is_documented_once() -> None:
    lines = (Path(__file__).parents[2] / "docs" / "labels.md").read_text().splitlines()
    documented = [line.split("`")[1] for line in lines if line.startswith("| `") and line.split("`")[1].isupper()]
    assert documented == list(Label)


@pytest.mark.parametrize(
    ("check", "right", "wrong"),
    [
        (is_card, "4111111111111111", "4111111111111112"),
        (is_npi, "1234567893", "1234567890"),
        (is_dea, "AB1234563", "AB1234564"),
        (is_vin, "1M8GDM9AXKP042788", "1M8GDM9A0KP042788"),
    ],
)
def test_check_digits(check: object, right: str, wrong: str) -> None:
    assert callable(check)
    assert check(right)
    assert not check(wrong)
