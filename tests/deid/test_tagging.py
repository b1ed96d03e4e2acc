"""The seam for a name model: gate, batch, cache, offsets, and refusals."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discreet.deid.detect import detect
from discreet.deid.tagging import MAX_SENTENCE, Reader, Tag, can_hold_a_name, sentences
from discreet.errors import RequestInvalid


class Finder:
    """Tags every "Zq" word as a person, and notes what it was given."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []

    def tag(self, sentences: Sequence[str]) -> list[list[Tag]]:
        self.batches.append(list(sentences))
        return [[(s.index("Zq"), s.index("Zq") + 4, "PERSON", 0.8)] if "Zq" in s else [] for s in sentences]


def test_tags_become_spans_of_the_original() -> None:
    text = "All is well.\nYesterday came Z\u200bqua again. He left."
    (span,) = detect(text, reader=Reader(Finder()))
    assert (text[span.start : span.end], span.label, span.score) == ("Z\u200bqua", "PERSON", 0.8)


def test_only_sentences_that_can_hold_a_name_are_read_and_each_once() -> None:
    finder = Finder()
    reader = Reader(finder)
    for _ in range(2):
        detect("The pain is gone since the end of the week before last. It was Mbxo who said so. Nothing else.", reader=reader)
    assert [[s.strip() for s in batch] for batch in finder.batches] == [["It was Mbxo who said so."]]


def test_short_lines_are_read_together_and_long_ones_alone() -> None:
    long = "the pain is gone since the end of the week before last, so it seems to me"
    text = f"Ann Lee\n12 Main St\nBoston\n{long}\nZqua\n\nZqib"
    assert [text[a:b] for a, b in sentences(text, [(0, len(text))])] == ["Ann Lee\n12 Main St\nBoston\n", f"{long}\n", "Zqua\n\nZqib"]


def test_a_sentence_does_not_end_behind_an_initial_or_a_part_of_an_address() -> None:
    text = "Please send it to 12 Main St Apt. 501 in Delft, or to Ann S. Lee, who lives near St. Paul. Then call me about the rest of it."
    assert [text[a:b] for a, b in sentences(text, [(0, len(text))])] == [text[: text.index("Then")], text[text.index("Then") :]]


@given(
    st.lists(st.sampled_from(["Zqua. ", "a b c d e f ", "x" * 70, "\n", "\n\n", ". A"]), max_size=30).map("".join),
    st.integers(0, 200),
    st.integers(0, 200),
)
def test_pieces_are_those_of_the_whole_text(text: str, first: int, length: int) -> None:
    whole = list(sentences(text, [(0, len(text))]))
    some = list(sentences(text, [(min(first, len(text)), min(first + length, len(text)))]))
    assert set(some) <= set(whole)
    assert all(piece in some for piece in whole if piece[0] < min(first + length, len(text)) and piece[1] > first)


def test_answer_does_not_depend_on_the_cache() -> None:
    texts = [f"Then {name} came in." for name in ("Zqua", "Zqib", "Zqua")]
    reader = Reader(Finder(), size=1)
    assert [detect(t, reader=reader) for t in texts] == [detect(t, reader=Reader(Finder())) for t in texts]
    assert len(reader._cache) == 1


def test_cache_and_representation_hold_no_text() -> None:
    reader = Reader(Finder())
    detect("Then Zqua came in.", reader=reader)
    assert "Zqua" not in repr(reader._cache) + repr(reader)


def test_long_sentences_are_cut_at_white_space() -> None:
    text = "word " * 1000
    pieces = list(sentences(text, [(0, len(text))]))
    assert all(end - start <= MAX_SENTENCE for start, end in pieces)
    assert "".join(text[a:b] for a, b in pieces).split() == text.split()


@pytest.mark.parametrize(("sentence", "can"), [("The pain is gone.", False), ("Then Bob came.", True), ("Xylo came.", True), ("no capitals", True)])
def test_gate(sentence: str, can: bool) -> None:
    assert can_hold_a_name(sentence, frozenset({"the"})) is can


@pytest.mark.parametrize("tags", [[], [[(0, 99, "PERSON", 0.5)]], [[(0, 2, "NICKNAME", 0.5)]], [[(0, 2, "PERSON", 1.5)]]])
def test_answers_that_do_not_fit_are_refused(tags: list[list[Tag]]) -> None:
    class Wrong:
        def tag(self, sentences: Sequence[str]) -> list[list[Tag]]:
            return tags

    with pytest.raises(RequestInvalid):
        detect("Then Zqua came.", reader=Reader(Wrong()))
