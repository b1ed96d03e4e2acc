"""Classification: what the detectors see decides, one false alarm does not, and the sample cannot be steered."""

from __future__ import annotations

import pytest

from discreet.deid.patterns import Label
from discreet.errors import SourceEmpty
from discreet.governance.classify import SENSITIVITY, classify
from discreet.record import Sensitivity

PLAIN = "The kettle boils and the bread is in the oven."
CASES = {
    Sensitivity.SPECIAL: "Patient MRN: 00482913 was seen today.",
    Sensitivity.PERSONAL: "Write to anna.kowalska@example.com about it.",
    Sensitivity.INTERNAL: "The build is at https://intranet.example.com/build/7 now.",
    Sensitivity.PUBLIC: PLAIN,
}


def records(house, texts):
    rows = [{"id": number, "patient": number, "text": text} for number, text in enumerate(texts)]
    return house.catalog.collect(house.catalog.register(*house.notes(rows)))


@pytest.mark.parametrize("expected", CASES)
def test_the_most_sensitive_label_decides(house, expected):
    proposal = classify(records(house, [*([PLAIN] * 9), CASES[expected]]))
    assert proposal.sensitivity is expected
    assert proposal.num_sampled == 10
    assert proposal.exceeds(Sensitivity.PUBLIC) is (expected is not Sensitivity.PUBLIC)
    assert not proposal.exceeds(Sensitivity.SPECIAL)


def test_declared_identifiers_count(house):
    rows = [{"id": 1, "patient": 1, "text": "Quibbleton came back.", "name": "Quibbleton"}]
    source = house.catalog.register(*house.notes(rows, known={"PERSON": "name"}))
    assert classify(house.catalog.collect(source)).sensitivity is Sensitivity.PERSONAL


def test_one_in_a_thousand_is_a_false_alarm(house):
    texts = [PLAIN] * 150 + [CASES[Sensitivity.PERSONAL]]
    assert classify(records(house, texts), sample=151).sensitivity is Sensitivity.PUBLIC


def test_the_sample_is_the_same_at_every_call_and_not_the_first_records(house):
    found = records(house, [f"{PLAIN} {number}" for number in range(50)])
    chosen = sorted(found, key=lambda record: record.digest)[:5]
    assert classify(found, sample=5).num_sampled == 5
    assert {record.digest for record in chosen} != {record.digest for record in found[:5]}
    assert classify(list(reversed(found)), sample=5) == classify(found, sample=5)


def test_nothing_to_classify_is_an_error(house):
    with pytest.raises(SourceEmpty):
        classify([])


def test_every_label_says_something():
    assert set(SENSITIVITY) == set(Label)
    assert SENSITIVITY[Label.PERSON] is Sensitivity.PERSONAL
