"""Offsets, resolution, obfuscation, known identifiers, precision and bounded work of the detector."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.deid import detect as module
from discreet.deid.detect import MAX_CHARS, Span, detect, fold, normalise
from discreet.deid.patterns import PATTERNS, Label
from discreet.deid.policy import find
from discreet.errors import RequestInvalid

EXAMPLES = [example.replace("«", "").replace("»", "") for row in PATTERNS for example in row.matches]
NOISE = ["\u200b", "\u00ad", "\u2060", "\ufe0f", "é", "ﬁ", "４", "\n", " ", "—", "😀", "e\u0301", "[PERSON]", "[REDACTED]", "Ж", "\ufffc", "中"]
texts = st.lists(st.one_of(st.sampled_from(EXAMPLES), st.sampled_from(NOISE), st.text(max_size=12)), max_size=8).map("".join)


def found(text: str, **options: object) -> dict[str, str]:
    return {text[s.start : s.end]: str(s.label) for s in detect(text, **options)}  # type: ignore[arg-type]  # test helper passes options through


@settings(max_examples=150, deadline=None)
@given(texts)
def test_spans_are_in_range_sorted_disjoint_and_not_empty(text: str) -> None:
    spans = detect(text)
    at = 0
    for span in spans:
        assert at <= span.start < span.end <= len(text)
        assert 0 < span.score <= 1
        assert span.label in Label.__members__
        at = span.end


@pytest.mark.parametrize(
    ("text", "cards"),
    [("altitude=240\n20171223-22:17:23", 0), ("port 62270\n2015-10-18 18:01:53", 0), ("card 4111 1111\n1111 1111 ok", 1), ("3782-8224\n63-10005", 1)],
)
def test_a_number_and_the_date_of_the_next_line_are_no_card(text: str, cards: int) -> None:
    assert sum(span.label == "CARD" for span in detect(text)) == cards


def test_what_an_earlier_span_covers_is_not_covered_again() -> None:
    spans = [Span(0, 5, "PERSON", 0.9), Span(3, 8, "DATE", 0.9), Span(4, 5, "ID", 0.9), Span(8, 9, "ID", 0.5)]
    assert [(s.start, s.end) for s in module._disjoint(spans)] == [(0, 5), (5, 8), (8, 9)]


@settings(max_examples=150, deadline=None)
@given(texts)
def test_view_maps_every_character_into_the_original(text: str) -> None:
    view = normalise(text)
    at = 0
    for index in range(len(view.text)):
        start, end = view.original(index, index + 1)
        assert at <= start < end <= len(text)
        at = start


@settings(max_examples=100, deadline=None)
@given(texts)
def test_nothing_is_left_to_find_behind_the_labels(text: str) -> None:
    left = text
    for span in reversed(detect(text)):
        left = left[: span.start] + f"[{span.label}]" + left[span.end :]
    assert detect(left) == []


FAR = "\n\n" + "nothing to see in this part of the text, which goes on for a while " * 8 + "\n\n"
PATTERNS_ONLY = [label for label in Label if label not in (Label.PERSON, Label.LOCATION, Label.ORG)]


@settings(max_examples=80, deadline=None)
@given(texts, texts)
def test_what_stands_far_away_does_not_change_what_patterns_find(one: str, other: str) -> None:
    far = len(one) + len(FAR)
    apart = [*detect(one, labels=PATTERNS_ONLY), *(Span(s.start + far, s.end + far, s.label, s.score) for s in detect(other, labels=PATTERNS_ONLY))]
    assert detect(one + FAR + other, labels=PATTERNS_ONLY) == apart


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(texts, st.sampled_from(["\x00", "\ud800", "A" * 300, "Ann Lee", "12 Main St, Boston, MA 02118", "[" * 40])), max_size=4).map(
        " ".join
    )
)
def test_the_model_keeps_to_the_text_as_well(text: str) -> None:
    at = 0
    for span in find(text):
        assert at <= span.start < span.end <= len(text)
        at = span.end
    assert find(text) == find(text)


def test_the_model_does_not_read_across_what_an_earlier_round_has_found() -> None:
    text = "db = connect('app', 'realize3793$')Andrewside Imaging (accessionoib 33392005961 givenoib 33392005961 given"
    spans = find(text)
    assert all(one.end <= other.start for one, other in itertools.pairwise(spans))
    assert [text[s.start : s.end] for s in spans if s.label == "ID"] == ["33392005961"] * 2


@settings(max_examples=60, deadline=None)
@given(texts, st.sampled_from(["Zyra Quorndike", "QX-88213-7", "1984-02-22"]))
def test_a_known_value_between_spaces_is_always_covered(text: str, value: str) -> None:
    label = {"Z": "PERSON", "Q": "MRN", "1": "DATE"}[value[0]]
    whole = f"{text} {value} {text}"
    at = len(text) + 1
    covered = {i for span in detect(whole, known={label: [value]}) for i in range(span.start, span.end)}
    assert {i for i in range(at, at + len(value)) if whole[i].isalnum()} <= covered


@pytest.mark.parametrize(
    "written",
    [
        "Kelly Fuller", "KELLY FULLER", "Fuller, Kelly", "FULLER,KELLY", "kelly fuller", "Kelly  Fuller", "Kelly\nFuller", "Kelly-Fuller", "K. Fuller", "Fuller", "Kelly",
        "Ke\u200blly Ful\u00adler", "Ｋｅｌｌｙ Ｆｕｌｌｅｒ", "Kélly Füller", "K e l l y F u l l e r", "Kеlly Fullеr",
    ],
)  # fmt: skip
def test_known_name_in_every_spelling(written: str) -> None:
    text = f"seen by the team: {written} was well"
    spans = detect(text, known={"PERSON": ["Kelly Fuller"]})
    start = text.index(written)
    letters = {i for i in range(start, start + len(written)) if written[i - start].isalpha()}
    assert letters <= {i for s in spans for i in range(s.start, s.end)}


@pytest.mark.parametrize(
    "written", ["1977-10-09", "10/09/1977", "10/9/77", "9 Oct 1977", "October 9, 1977", "October 9th, 1977", "19771009", "09.10.1977", "Oct 9"]
)
def test_known_date_in_every_format(written: str) -> None:
    assert any(written in span or span in written for span in found(f"it was {written}, so", known={"DATE": ["1977-10-09"]}))


@pytest.mark.parametrize(
    "written",
    ["(322) 555-0124", "322.555.0124", "3225550124", "322 555 0124", "555-0124", "+1 322 555 0124", "３２２-５５５-０１２４", "322–555–0124"],
)
def test_known_number_with_other_separators(written: str) -> None:
    text = f"number {written} works"
    covered = {i for s in detect(text, known={"PHONE": ["322-555-0124"]}) for i in range(s.start, s.end)}
    assert {i for i, c in enumerate(text) if c.isdigit()} - {text.index("1") if written.startswith("+1") else -1} <= covered


def test_known_name_that_is_a_word_needs_a_capital() -> None:
    assert found("She may eat beans. Bean came.", known={"PERSON": ["May Bean"]}) == {"Bean": "PERSON"}


def test_known_age_below_ninety_is_left_alone() -> None:
    assert found("aged 45", known={"AGE": ["45"]}) == {}


@pytest.mark.parametrize(
    ("text", "value", "label"),
    [
        ("SSN 4\u200b6\u200b4\u200b-79-1772 ok", "4\u200b6\u200b4\u200b-79-1772", "SSN"),
        ("SSN ４６４-７９-１７７２ ok", "４６４-７９-１７７２", "SSN"),
        ("SSN ٤٦٤-٧٩-١٧٧٢ ok", "٤٦٤-٧٩-١٧٧٢", "SSN"),
        ("SSN 464\u00ad-79\u00ad-1772 ok", "464\u00ad-79\u00ad-1772", "SSN"),
        ("SSN 464–79–1772 ok", "464–79–1772", "SSN"),
        ("write to ann@exаmple.com ok", "ann@exаmple.com", "EMAIL"),
        ("write to ann＠example．com ok", "ann＠example．com", "EMAIL"),
        ("Dr. Gon\u0301zalez came", "Gon\u0301zalez", "PERSON"),
        ("Dr. Söderström came", "Söderström", "PERSON"),
    ],
)
def test_obfuscated_values_are_found_at_their_original_place(text: str, value: str, label: str) -> None:
    assert found(text) == {value: label}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Dear Dr. Reed, thank you.", {"Reed"}),
        ("Mrs. Torres and her daughter, Drew, came.", {"Torres", "Drew"}),
        ("Patient: GARCIA, JOHN  seen", {"GARCIA, JOHN"}),
        ("Signed by Ann Lee, MD", {"Ann Lee"}),
        ("Kelly Fuller is well. Fuller sleeps. FULLER eats.", {"Kelly Fuller", "Fuller", "FULLER"}),
        ("my name is Frank", {"Frank"}),
        ("It is Chloe Campbell, Jan 18, 1982.", {"Chloe Campbell"}),
        ("hi hortense, how are you", {"hortense"}),
        ("[doctor] thank you , mr. white . so craig is here", {"white", "craig"}),
        ("Patient Name: Hưng Vũ\nHưng sleeps", {"Hưng Vũ", "Hưng"}),
        ("Thanks, Austin. See you.", {"Austin"}),
        ("DT: 08/14/19  REED / 94325", {"REED"}),
        ("The mail was signed Παπαδόπουλος, as always.", {"Παπαδόπουλος"}),
    ],
)
def test_names(text: str, names: set[str]) -> None:
    assert {value for value, label in found(text).items() if label == "PERSON"} == names


@pytest.mark.parametrize(
    ("text", "value", "label"),
    [
        ("I am in ΛΕΥΚΩΣΙΑ for a business trip.", "ΛΕΥΚΩΣΙΑ", "LOCATION"),
        ("She spent three years at Zorblatt as an assistant.", "Zorblatt", "ORG"),
        ("Zorblatt Analytica is a small design agency.", "Zorblatt Analytica", "ORG"),
        ('{"health_plan_beneficiary_number": "HPB-OM312-0002"}', "HPB-OM312-0002", "HEALTH_PLAN"),
        ("MEDICAL_RECORD_NUMBER=MRN-OM312-0001;", "MRN-OM312-0001", "MRN"),
        ("手机号13800000000，", "13800000000", "ID"),
        ("患者2026年3月14日入院", "2026年3月14日", "DATE"),
    ],
)
def test_other_scripts_firms_and_keys(text: str, value: str, label: str) -> None:
    assert found(text) == {value: label}


@pytest.mark.parametrize(
    "text",
    [
        "Warfarin 5 mg daily, Metformin 500 mg twice a day, Lisinopril 10 mg, Protonix 40 mg.",
        "Patient: Ibuprofen, almost daily. Add Symbicort 2 puffs. Benzoyl Peroxide gel.",
        "WBC 11,000, Hgb 13.2 g/dL, HbA1c 7.2%, platelets 250000, glucose 290 mg/dL, INR 2.5.",
        "BP 120/80, pulse 72, temp 38.4 C, SpO2 98%, pain 5/10, strength 5/5.",
        "A 45-year-old woman, 89 years old, aged 62, for 10 days, since Monday, in 2019, next week.",
        "Parkinson's disease, Crohn's disease, Foley catheter, Babinski sign, Graves disease, Hodgkin lymphoma.",
        "version 1.2.3, v10.4.0.1, commit 9f8e7d6c5b4a3f2e1d0c, id 550e8400-e29b-41d4-a716-446655440000.",
        "ICD-10 E11.9, CPT 99213, LOINC 2345-7, COVID-19, type 2 diabetes, T4, B12, S1.",
        "Doctor: Good news about the scan. Patient: The knee hurts. Nurse: Good, and may you rest.",
        "The small trabosk drawer holds ranch fabric lighthouse saddle.",
        "The old zafirn bell says amber walrus copper lantern.",
        "def main(argv: list[str]) -> int:\n    return len(argv) + 0x1F\n",
        "He may march in the fall. Will the patient have hope and faith? Mark the site.",
        "Doctor: Does it help? Patient: Nope. Nurse: Yep, I will. Patient: Meth.",
        "so the carter of goods will grant a mark for the white house",
        "password: walrus is a word; the secret is kindness; token = identifier",
        "The α and β chains, a ΔG of 3 kJ, TGF-β1, the ΔΔCt method and 5 µg of Σ.",
        "Пациентка поступила утром. Жалобы на кашель. Температура нормальная.",
        "He worked for two years at The Time, then as partner at Law; Surgery is a large company.",
    ],
)
def test_what_is_not_an_identifier_stays(text: str) -> None:
    assert found(text) == {}


def test_ages_count_from_ninety() -> None:
    assert found("an 89-year-old and a 90-year-old, both well") == {"90": "AGE"}


def test_longest_candidate_wins_and_no_part_of_a_loser_is_left() -> None:
    text = "see https://portal.example.org/p/MR408814 and MR408814"
    spans = found(text, known={"MRN": ["MR408814"]})
    assert spans == {"https://portal.example.org/p/MR408814": "URL", "MR408814": "MRN"}
    assert module._resolve([Span(0, 6, "PERSON", 0.9), Span(4, 12, "ORG", 0.5)], "abcdefghijkl") == [
        Span(0, 4, "PERSON", 0.9),
        Span(4, 12, "ORG", 0.5),
    ]


def test_labels_narrow_the_answer() -> None:
    text = "Dr. Reed, SSN 464-79-1772"
    assert {s.label for s in detect(text, labels=["SSN"])} == {"SSN"}
    assert {s.label for s in detect(text, labels=["ssn", "NAME"])} == {"SSN", "PERSON"}


def test_unknown_label_is_refused_by_name() -> None:
    with pytest.raises(RequestInvalid, match="NICKNAME"):
        detect("x", known={"NICKNAME": ["Bob"]})


def test_error_does_not_show_the_known_value() -> None:
    with pytest.raises(RequestInvalid) as caught:
        detect("x", known={"NICKNAME": ["Zyra Quorndike"]})
    assert "Quorndike" not in repr(caught.value) + str(caught.value.to_json())


def test_too_long_a_text_is_refused() -> None:
    with pytest.raises(RequestInvalid, match=str(MAX_CHARS)):
        detect("a" * (MAX_CHARS + 1))


def test_fold_is_what_a_view_holds() -> None:
    assert fold("Ｍü\u00adller\u200b—１２") == "Muller-12"


@pytest.mark.parametrize(
    "piece",
    [
        "A",
        "a@",
        "1-",
        "Aa ",
        "(555) ",
        "MRN: 1",
        "password=",
        "eyJaaaaaaaaaa.",
        "a://b:",
        "Dr. Smith ",
        "Aa, ",
        "-----BEGIN PRIVATE KEY-----",
        "[PERSON]",
        "\u200b",
    ],
)
def test_work_is_bounded_on_hostile_text(piece: str) -> None:
    text = (piece * 20_000)[:20_000]
    started = time.process_time()
    detect(text)
    assert time.process_time() - started < 5.0  # measured 0.01 to 0.3; a quadratic scan takes minutes
