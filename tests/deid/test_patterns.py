"""Each row of the pattern table against its own examples, and the table against its rules."""

from __future__ import annotations

import json
import re
import string
from importlib import resources
from pathlib import Path
from random import Random
from re import _constants as op  # type: ignore[attr-defined]  # the parser of the standard library has no stubs
from re import _parser as parser  # type: ignore[attr-defined]  # as above
from typing import Any

import pytest

from discreet.deid.detect import normalise, scan
from discreet.deid.patterns import ISSUERS, PATTERNS, Label, Pattern, entropy, is_card, is_dea, is_npi, is_vin


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


def test_national_numbers_of_thirty_countries_have_check_digits() -> None:
    countries = {row.locale for row in PATTERNS if row.label is Label.NATIONAL_ID and row.validator is not None}
    assert len(countries - {"any"}) >= 30


# The issuers' rows: an example is written from the expression itself -----------------------------------------------------------------------------------------


def written(items: Any, draw: Random) -> str:
    """Returns a text that the parsed expression matches; what merely looks around is left out."""
    return "".join(_one(code, argument, draw) for code, argument in items)


def _one(code: Any, argument: Any, draw: Random) -> str:
    if code is op.LITERAL:
        return chr(argument)
    if code is op.IN:
        return _member(argument, draw)
    if code is op.ANY:
        return "."
    if code is op.NOT_LITERAL:
        return "b" if argument != ord("b") else "c"
    if code is op.GROUPREF:
        return "-"  # what a group held is not kept: such an example need not match
    if code is op.BRANCH:
        return written(draw.choice(argument[1]), draw)
    if code is op.SUBPATTERN:
        return written(argument[3], draw)
    if code in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
        least, most, items = argument
        return "".join(written(items, draw) for _ in range(least if least else min(most, draw.choice([0, 1]))))
    assert code in (op.AT, op.ASSERT, op.ASSERT_NOT), code
    return ""


CLASSES = {op.CATEGORY_WORD: string.ascii_letters + string.digits + "_", op.CATEGORY_DIGIT: string.digits, op.CATEGORY_SPACE: " "}


def _member(items: Any, draw: Random) -> str:
    allowed: set[str] = set()
    for code, argument in items:
        if code is op.LITERAL:
            allowed.add(chr(argument))
        elif code is op.RANGE:
            allowed |= {chr(c) for c in range(argument[0], argument[1] + 1)}
        elif code is op.CATEGORY:
            allowed |= set(CLASSES.get(argument, string.punctuation))
    if items[0][0] is op.NEGATE:
        allowed = set(string.printable) - allowed
    return draw.choice(sorted(allowed))


def _samples(row: Pattern, count: int = 40) -> list[str]:
    draw = Random(7)
    tree = parser.parse(row.expression)
    made = (written(tree, draw) for _ in range(count))
    return [text if any(anchor in text.lower() for anchor in row.anchors) else f"{row.anchors[0]} {text}" for text in made]


@pytest.mark.parametrize("row", [pytest.param(row, id=row.source) for row in ISSUERS])
def test_an_issuers_row_finds_what_it_describes_and_not_half_of_it(row: Pattern) -> None:
    samples = _samples(row)
    found = [sample for sample in samples if list(scan(row, sample))]
    assert found, "none of its samples is found"
    start, end = next(scan(row, found[0]))
    assert not list(scan(row, found[0][: start + (end - start) // 3])), "a third of the value is enough"
    assert not list(scan(row, "aaaa aaaa aaaa")), "a word without its keyword is enough"


def test_issuers_rows_are_bounded_and_attributed() -> None:
    for row in ISSUERS:
        assert row.anchors
        assert row.label is Label.SECRET
        assert "MAXREPEAT" not in repr(parser.parse(row.expression)), row.source
    head = json.loads((resources.files("discreet.deid") / "secret_rules.json").read_text(encoding="utf-8"))
    assert re.fullmatch(r"[0-9a-f]{40}", head["commit"])
    assert "MIT License" in (resources.files("discreet.deid") / "secret_rules.LICENSE.txt").read_text(encoding="utf-8")


def test_entropy_is_shannons() -> None:
    assert entropy("aaaa") == 0
    assert entropy("abcd") == 2
    assert entropy("") == 0
