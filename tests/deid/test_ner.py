"""The tagger of names: what it finds, that it depends on nothing but the sentence, that it refuses bad weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.deid import ner
from discreet.deid.patterns import Label
from discreet.errors import RequestInvalid


def found(sentence: str) -> list[tuple[str, str]]:
    return [(sentence[start:end], label) for start, end, label, _ in ner.tag([sentence])[0]]


@pytest.mark.parametrize(
    ("sentence", "name", "label"),
    [
        ("The applicant, Mr Tobiasz Wrzesnik, lives in Gdynia.", "Tobiasz Wrzesnik", "PERSON"),
        ("Dr. Okonkwobi agreed to see the patient next week.", "Okonkwobi", "PERSON"),
        ("She moved here from Trondheim two years ago.", "Trondheim", "LOCATION"),
        ("He works for Brackenfeld Logistics as a driver.", "Brackenfeld Logistics", "ORG"),
        ("Records were requested from Ostrander Memorial Hospital.", "Ostrander Memorial Hospital", "ORG"),
    ],
)
def test_names_that_no_list_has_are_found_by_form_and_place(sentence: str, name: str, label: str) -> None:
    assert (name, label) in found(sentence)


@pytest.mark.parametrize(
    "sentence",
    [
        "The patient was started on Metformin 500 mg twice daily.",
        "Blood pressure 120/80, pulse 72, temperature 98.6.",
        "REVIEW OF SYSTEMS",
        pytest.param(
            "Parkinson's disease is treated with levodopa.", marks=pytest.mark.xfail(reason="these weights take levodopa for a name", strict=True)
        ),
        "def add(left, right): return left + right",
        "What is the maximum dose of ibuprofen?",
    ],
)
def test_what_names_nobody_is_left_alone(sentence: str) -> None:
    assert found(sentence) == []


def test_a_sentence_is_read_the_same_alone_and_among_others() -> None:
    sentences = ["Call Ann Lee in Boston.", "", "No name here.", "Mr. Vandersloot works for Quillmark Inc. in Leeds."] * 5
    together = ner.tag(sentences)
    for sentence, tags in zip(sentences, together, strict=True):
        alone = ner.tag([sentence])[0]
        assert [t[:3] for t in alone] == [t[:3] for t in tags]
        assert np.allclose([t[3] for t in alone], [t[3] for t in tags], atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=80), max_size=4))
def test_ranges_are_sorted_disjoint_and_within(sentences: list[str]) -> None:
    for sentence, tags in zip(sentences, ner.tag(sentences), strict=True):
        at = 0
        for start, end, label, score in tags:
            assert at <= start < end <= len(sentence)
            assert label in Label.__members__
            assert 0 < score <= 1
            at = end


def test_a_long_line_is_read_in_windows() -> None:
    text = "The dose was changed. " * 300 + "Mr. Vandersloot agreed."
    assert any(text[start:end] == "Vandersloot" for start, end, _, _ in ner.tag([text])[0])


def test_a_higher_threshold_finds_a_subset() -> None:
    sentences = ["ann lee went to leeds with vandersloot", "Mr. Vandersloot works for Quillmark."]
    few = ner.tag(sentences, thresholds=dict.fromkeys(ner.LABELS, 0.95))
    many = ner.tag(sentences, thresholds=dict.fromkeys(ner.LABELS, 0.05))
    for less, more in zip(few, many, strict=True):
        assert sum(e - s for s, e, _, _ in less) <= sum(e - s for s, e, _, _ in more)


def test_other_weights_are_refused() -> None:
    with pytest.raises(RequestInvalid, match="table"):
        ner.Tagger({"table": np.zeros((2, 2), np.float16)})


def test_the_weights_fit_the_package() -> None:
    assert len(ner._weights()) <= 15_000_000
    assert len(ner.digest()) == 64
