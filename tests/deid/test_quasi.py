"""How many people share a text's quasi-identifiers, and coarser words and tables until enough do."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.deid import quasi
from discreet.deid.policy import BUILTIN, redact
from discreet.deid.quasi import LADDERS, Kind, coarser, find, generalise_table, k_map, kind_of, uniqueness
from discreet.errors import RequestInvalid

NOTE = "The patient is a 45-year-old woman from Vermont with Huntington disease; her son is aged 67. ZIP 05641. BP 120/80, 45 mg of Warfarin."


def apply(text: str, edits: list[tuple[int, int, str]]) -> str:
    for start, end, put in reversed(edits):
        text = text[:start] + put + text[end:]
    return text


def test_the_score_is_the_product_of_the_rarest_of_each_kind() -> None:
    found = uniqueness(NOTE)
    assert dict(found.shares) == {Kind.AGE: 1 / 80, Kind.SEX: 0.5, Kind.PLACE: 10_000 / 331e6, Kind.TERM: 1e-4}
    assert found.expected == pytest.approx(331e6 / 80 * 0.5 * 10_000 / 331e6 * 1e-4)
    assert uniqueness("Cough for two weeks.").expected == quasi.POPULATION
    assert uniqueness(NOTE, population=1000).expected == pytest.approx(found.expected * 1000 / 331e6)


@pytest.mark.parametrize(
    ("text", "value"),
    [("a 45-year-old man", "45"), ("45 y/o with", "45"), ("a 45 yo", "45"), ("aged 7", "7"), ("Age: 62", "62"), ("45F with cough", "45"), ("born in 1956", "1956"), ("aged 45-49", "45-49"), ("a 45-49-year-old", "45-49")],
)  # fmt: skip
def test_ages_are_found(text: str, value: str) -> None:
    assert [text[each.start : each.end] for each in find(text) if each.kind is Kind.AGE] == [value]


@pytest.mark.parametrize(
    "text", ["45 mg", "BP 145/90", "a 5-year-old Honda? no: 5.45 km", "aged 12 mg", "on 4/5", "v1.45M", "[AGE]", "page 45", "the 1956 report"]
)
def test_what_is_no_age_is_not(text: str) -> None:
    assert [text[each.start : each.end] for each in find(text) if each.kind is Kind.AGE] in ([], ["5"])


def test_words_get_coarser_step_by_step_until_k_share_them() -> None:
    last = uniqueness(NOTE).expected
    for k in (100, 10_000, 1_000_000):
        edits, left = coarser(NOTE, k=k)
        made = apply(NOTE, edits)
        assert left.expected >= max(k, last)
        assert "45 mg of Warfarin" in made
        assert "05641" not in made
        last = left.expected
    assert coarser("Cough.", k=10**6)[0] == []
    assert "rare condition" in apply(NOTE, coarser(NOTE, k=100)[0])


def test_what_cannot_be_made_coarse_enough_is_said() -> None:
    _, left = coarser("A woman.", k=10**9)
    assert left.expected == quasi.POPULATION / 2


def test_own_terms_and_superlatives_count() -> None:
    text = "He is the only survivor, a cooper by trade."
    assert uniqueness(text).shares[Kind.TERM] == 1e-4
    assert uniqueness(text, terms={"cooper": 1e-6}).shares[Kind.TERM] == 1e-6
    for wrong in ({"population": 0}, {"terms": {"x": 0.0}}, {"terms": {"x": 2.0}}):
        with pytest.raises(RequestInvalid):
            uniqueness(text, **wrong)


def test_marks_hold_no_quasi_identifiers_and_nothing_prints_text() -> None:
    assert find("[PERSON] from [LOCATION], [AGE], [DATE]") == []
    assert "Vermont" not in repr(find(NOTE))


def test_a_policy_with_k_makes_what_is_left_coarser_and_says_what_is_reached() -> None:
    from dataclasses import replace

    text = "Dr. Kelly Fuller saw a 45-year-old man from Vermont on 2024-03-05. " + NOTE
    done = redact(text, replace(BUILTIN["label"], k=5000))
    assert done.expected is not None
    assert done.expected >= 5000
    assert done.text.startswith("Dr. [PERSON] saw a ")
    assert "Vermont" not in done.text
    assert [text[s.start : s.end] for s in done.spans][:2] == ["Kelly Fuller", "2024-03-05"] or "Vermont" in [
        text[s.start : s.end] for s in done.spans
    ]
    again = redact(done.text, replace(BUILTIN["label"], k=5000))
    assert again.text == done.text
    assert replace(BUILTIN["label"], k=5000).digest != BUILTIN["label"].digest


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*NOTE.split(" "), "Texas", "aged 12", "mayor", "\n", "é", "born in 1999"]), max_size=25).map(" ".join),
    st.integers(1, 10**7),
)
def test_edits_are_in_range_disjoint_and_never_finer(text: str, k: int) -> None:
    edits, left = coarser(text, k=k)
    assert all(0 <= start < end <= len(text) for start, end, _ in edits)
    assert all(a[1] <= b[0] for a, b in pairwise(edits))
    assert left.expected >= uniqueness(text).expected


def rows(count: int = 120) -> list[list[str]]:
    return [[str(20 + n % 60), f"0564{n % 3}", f"19{50 + n % 40}-01-02", "ab"[n % 2]] for n in range(count)]


COLUMNS = ["age", "zip", "birth", "group"]


def test_the_table_is_the_least_coarse_that_has_k() -> None:
    made = generalise_table(COLUMNS, rows(), k=8)
    assert made.kinds == {"age": "age", "zip": "zip", "birth": "date", "group": "other"}
    kept = [row for _, row in made.rows]
    assert min(k_map(kept, kept)) == made.smallest >= 8
    assert made.suppressed == 0
    for name in COLUMNS:  # one step less anywhere is not enough
        if made.steps[name]:
            finer = [tuple(LADDERS[made.kinds[c]][made.steps[c] - (c == name)](v) for c, v in zip(COLUMNS, row, strict=True)) for row in rows()]
            assert min(k_map(finer, finer)) < 8


def test_k_map_counts_the_population_and_outliers_may_be_left_out() -> None:
    population = rows(6000)
    assert sum(generalise_table(COLUMNS, rows(), k=8, population=population).steps.values()) < sum(
        generalise_table(COLUMNS, rows(), k=8).steps.values()
    )
    odd = [*rows(), ["85", "99999", "1901-01-01", "c"]]
    assert generalise_table(COLUMNS, odd, k=8, suppress=0.01).suppressed == 1
    assert k_map([["a"], ["b"]], [["a"], ["a"]]) == [2, 0]


def test_ladders_never_split_what_was_together() -> None:
    for kind, values in {
        "age": [str(n) for n in range(120)],
        "zip": ["05641", "05642-1234", "x", "03601"],
        "date": ["2024-03-05", "3/5/1999", "x"],
    }.items():
        for finer, wider in zip(LADDERS[kind], LADDERS[kind][1:], strict=False):
            groups: dict[str, set[str]] = {}
            for value in values:
                groups.setdefault(finer(value), set()).add(wider(value))
            assert all(len(above) == 1 for above in groups.values()), kind
    assert kind_of("age", ["young"]) == "other"
    assert kind_of("amount", ["12345"]) == "other"


@pytest.mark.parametrize(("columns", "k", "suppress"), [([], 2, 0.0), (["a"], 1, 0.0), (["a"], 2, 1.0), (["a"], 2, -0.1), (["a"] * 8, 2, 0.0)])
def test_refused_arguments(columns: list[str], k: int, suppress: float) -> None:
    with pytest.raises(RequestInvalid):
        generalise_table(columns, [["1"] * len(columns)] * 3, k=k, suppress=suppress)


def test_too_few_people_are_refused() -> None:
    with pytest.raises(RequestInvalid, match="population"):
        generalise_table(["age"], [["20"], ["30"]], k=3)
