"""What hides an identifier is read through, maps back to the original, and costs bounded work."""

from __future__ import annotations

import base64
import html
import json
import time
import urllib.parse
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.deid.decode import EXPRESSIONS, MAX_DECODED, hidden
from discreet.deid.detect import detect
from discreet.deid.normalise import Edit, normalise

VALUES = {
    "e-mail: ": "ann.keller@mail.example.org", "SSN: ": "464-79-1772", "card number: ": "4111 1111 1111 1111", "phone: ": "212-555-0187",
    "IBAN: ": "GB82WEST12345698765432", "IP address: ": "203.0.113.77", "Patient name: ": "Jonathan Smith", "address: ": "482 Maple Street",
}  # fmt: skip


def _middle(value: str, put: str) -> str:
    return value[: len(value) // 2] + put + value[len(value) // 2 :]


WAYS: dict[str, Callable[[str], str]] = {
    "plain": lambda v: v,
    "lower": str.lower,
    "upper": str.upper,
    "homoglyph": lambda v: v.translate(str.maketrans("aeopcxy", "аеорсху")),
    "fullwidth": lambda v: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in v),
    "zero-width once": lambda v: _middle(v, "\u200b"),
    "zero-width each": lambda v: "\u200b".join(v),
    "soft hyphen": lambda v: _middle(v, "\u00ad"),
    "nbsp and figure dash": lambda v: v.replace(" ", "\u00a0").replace("-", "\u2012"),
    "Arabic digits": lambda v: v.translate({ord(str(i)): chr(0x660 + i) for i in range(10)}),
    "combining marks": lambda v: "".join(c + "\u0301" if c.isalpha() else c for c in v),
    "line break": lambda v: _middle(v, "\n"),
    "hyphen and line break": lambda v: _middle(v, "-\n"),
    "spaced out": " ".join,
    "markdown": lambda v: _middle(v, "**"),
    "spelled": lambda v: v.replace("@", " at ").replace(".", " dot "),
    "reversed": lambda v: v[::-1],
    "HTML": lambda v: "".join(f"&#{ord(c)};" for c in v),
    "HTML, named": lambda v: html.escape(v).replace("@", "&commat;").replace(".", "&period;").replace("-", "&#45;"),
    "percent": lambda v: "".join(f"%{b:02X}" for b in v.encode()),
    "URL-quoted": urllib.parse.quote,
    "JSON": lambda v: "".join(f"\\u{ord(c):04x}" for c in v),
    "base64": lambda v: base64.b64encode(v.encode()).decode(),
    "base64 twice": lambda v: base64.b64encode(base64.b64encode(v.encode())).decode(),
    "base64 of JSON": lambda v: base64.b64encode(json.dumps({"v": v, "x": 1}).encode()).decode(),
    "hex": lambda v: v.encode().hex(),
}


@pytest.mark.parametrize("cue", VALUES)
@pytest.mark.parametrize("way", WAYS)
def test_value_is_covered_however_it_is_written(way: str, cue: str) -> None:
    written = WAYS[way](VALUES[cue])
    text = f"Seen today. {cue}{written} is what she gave us."
    start = text.index(written)
    covered = {i for s in detect(text) for i in range(s.start, s.end)}
    assert {i for i in range(start, start + len(written)) if text[i].isalnum()} <= covered


@pytest.mark.parametrize(
    "text",
    [
        "The dose was given\nand the patient slept.\nShe went home\nthe next day.",
        "We looked at the dot on the map and met at noon. Meet at home dot in front.",
        "x = a*b*c; __init__ is **bold**; 50% off &amp; more",
        "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
        "see Zm9vYmFyYmF6cXV4 for the constant and aGVsbG8gd29ybGQ= for the greeting",
    ],
)
def test_what_hides_nothing_stays(text: str) -> None:
    assert detect(text) == []


def everywhere(text: str, is_word: Callable[[str], bool]) -> tuple[list[Edit], list[str]]:
    return hidden(text, is_word, [[(0, len(text))]] * len(EXPRESSIONS), [(0, len(text))])


def test_next_line_is_not_swallowed() -> None:
    text = "write to ann@example.com\nThanks, and call 212-555-0187\n3 days later"
    assert [text[s.start : s.end] for s in detect(text)] == ["ann@example.com", "212-555-0187"]


def test_depth_and_size_are_bounded() -> None:
    nest = b"SSN 464-79-1772 " * 8000
    for _ in range(8):
        nest = base64.b64encode(nest)
    text = nest.decode()[:1_500_000]
    started = time.process_time()
    detect(text)
    assert time.process_time() - started < 10
    edits, _ = everywhere("QUJD" * 100 + " " + "41" * 40, lambda word: False)
    assert edits
    assert sum(len(put) for _, _, put in edits) <= MAX_DECODED


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["&#65;", "%41", "\\u0041", "QW5uIExlZQ==", "-\n", "a", "1", "@", "**", " ", "é", "\u200b"]), max_size=30).map("".join)
)
def test_edits_are_sorted_disjoint_and_map_into_the_original(text: str) -> None:
    view = normalise(text)
    edits, kinds = everywhere(view.text, lambda word: word == "aa")
    assert len(edits) == len(kinds)
    assert all(a[1] <= b[0] for a, b in pairwise(edits))
    after = view.replace(edits)
    for index in range(len(after.text)):
        start, end = after.original(index, index + 1)
        assert 0 <= start < end <= len(text)
