"""Recall counts whole values, precision counts spans that touch one; the limits hold back what few samples cannot show."""

from __future__ import annotations

import pytest

from discreet.deid.calibrate import Sample
from discreet.deid.measure import measure
from discreet.deid.patterns import Label
from discreet.deid.policy import builtin


def sample(text: str, *values: str) -> Sample:
    return Sample(text=text, gold=tuple((text.index(value), text.index(value) + len(value), Label.EMAIL) for value in values))


def test_counts_are_of_values_and_of_spans():
    found = measure(
        [sample("write to ann@example.org or swordfish", "ann@example.org", "swordfish"), sample("call bob@example.org")], builtin("label")
    )
    assert (found.samples, found.values, found.covered, found.found, found.right) == (2, 2, 1, 2, 1)
    assert (found.recall, found.precision) == (0.5, 0.5)


def test_limits_lie_below_the_shares():
    found = measure([sample(f"write to a{i}@example.org", f"a{i}@example.org") for i in range(20)], builtin("label")).to_json()
    assert found["recall"] == found["precision"] == 1.0
    assert found["recall_at_least"] == found["precision_at_least"] == pytest.approx(0.05 ** (1 / 20), abs=1e-4)


def test_half_a_value_is_not_covered():
    text = "write to ann@example.org or so"
    found = measure([Sample(text=text, gold=((9, 29, Label.EMAIL),))], builtin("label"))
    assert (found.covered, found.right) == (0, 1)


def test_nothing_marked_and_nothing_found_is_no_division_by_zero():
    found = measure([sample("a quiet night")], builtin("label"))
    assert (found.recall, found.precision, found.to_json()["recall_at_least"]) == (1.0, 1.0, 0.0)
