"""Finds identifiers: text in, non-overlapping `Span`s out, as Python string indices of the *original* text.

    original -> view (normalised, with an offset for every character) -> candidates (rows, names, known values) -> spans -> blank them, look again -> spans

`normalise` folds single characters; `decode` then reads through escapes, encodings, markup and broken lines, and what it finds maps back to the characters that hide it.
Text written backwards is read where a line has the look of it. A name model joins in through `tagging`.

One resolution rule: the longest candidate wins, then the stronger, then the earlier; what a loser covers beyond the winner stays as a span of its own, so that no
candidate's text is ever left uncovered because another one was longer.

Guarantees: spans are in range, sorted, disjoint and non-empty. A found span counts as opaque (like a `[LABEL]` mark that stands in the text) and the rest is read again until nothing
is found, so that redacting a redacted text changes nothing. The result depends on the text, `known`, `labels` and the `reader` alone. Time is linear in the text times a bounded number
of rounds; texts above `MAX_CHARS` are refused.

Does not cover: names that no list, cue, model or `known` value gives away, encodings beyond `decode`'s, quasi-identifiers (occupation, rare disease), states, countries,
years, weekdays and ages below 90 (45 CFR 164.514(b)(2) lets them stand).
"""

from __future__ import annotations

import itertools
import re
import string
import threading
from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import final

from discreet.deid import patterns
from discreet.deid import scan as automaton
from discreet.deid.decode import BREAK, EXPRESSIONS, MAX_DEPTH, hidden, plain
from discreet.deid.normalise import OPAQUE, View, fold, normalise
from discreet.deid.patterns import GUARDS, ISSUERS, PATTERNS, SHAPE, STRONG, WEAK, Label, Pattern
from discreet.deid.scan import Regions
from discreet.deid.tagging import Reader
from discreet.errors import RequestInvalid

MAX_CHARS = 2_000_000
"""Longest text that one call takes, in code points."""

MAX_ROUNDS = 6
"""How often a text is read: each round covers more of it. Two are enough for all text we have seen."""


@final
@dataclass(frozen=True, slots=True)
class Span:
    """One identifier: `text[start:end]` of the original text, its label, and a score in (0, 1]."""

    start: int
    end: int
    label: str
    score: float


def detect(
    text: str,
    *,
    known: Mapping[str, Sequence[str]] = MappingProxyType({}),
    labels: Iterable[str] | None = None,
    reader: Reader | None = None,
) -> list[Span]:
    """Returns the identifiers in the text, sorted by place, none overlapping another.

    Args:
        text: at most `MAX_CHARS` code points.
        known: identifiers that this text is known to be about, label -> values; found in other spellings too (letter case, spaces, separators, name order,
            date format).
        labels: only these labels are looked for; None for all.
        reader: a name model as one more detector; None for lists and rules alone.

    Returns:
        Spans with indices of `text`.

    Raises:
        RequestInvalid: when the text is too long or a label is not in the closed list.
    """
    if len(text) > MAX_CHARS:
        raise RequestInvalid(f"a text of at most {MAX_CHARS} characters", value=len(text), remedy="Split it at paragraphs.")
    wanted = frozenset(Label) if labels is None else frozenset(map(parse_label, labels))
    values = list(dict.fromkeys((parse_label(label), value) for label, group in known.items() for value in group))
    view = normalise(text)
    found: list[Span] = []
    regions: Regions = [(0, len(view.text))]
    for _ in range(MAX_ROUNDS):
        spans = _whole(view, _read(view, values, regions, reader, wanted))
        if not spans:
            break
        found += [Span(*view.original(s.start, s.end), s.label, s.score) for s in spans]
        view = view.blank([(s.start, s.end) for s in spans])
        regions = _around((match.span() for match in _OPAQUES.finditer(view.text)), view.text)  # elsewhere nothing has changed
    return _disjoint(sorted((s for s in found if s.label in wanted), key=lambda s: (s.start, -s.end)))


def _disjoint(spans: Iterable[Span]) -> list[Span]:
    """Returns sorted spans without what an earlier one covers already: whatever the rounds found, no character is written over twice."""
    kept: list[Span] = []
    for span in spans:
        start = max(span.start, kept[-1].end) if kept else span.start
        if start < span.end:
            kept.append(span if start == span.start else Span(start, span.end, span.label, span.score))
    return kept


def _whole(view: View, spans: Iterable[Span]) -> list[Span]:
    """Returns the spans, sorted, each widened to whole characters of the original."""
    kept: list[Span] = []
    for span in spans:
        start, end = view.whole(span.start, span.end)
        start = max(start, kept[-1].end) if kept else start
        if start < end:
            kept.append(Span(start, end, span.label, span.score))
    return kept


def parse_label(label: str) -> Label:
    """Returns the label of that name, case ignored; a few common synonyms are understood.

    Raises:
        RequestInvalid: when it is not in the closed list.
    """
    name = label.upper()
    name = {"NAME": "PERSON", "DOB": "DATE", "LICENSE": "LICENCE", "ORGANIZATION": "ORG"}.get(name, name)
    if name not in Label.__members__:
        raise RequestInvalid("a label of docs/labels.md", value=label, remedy=f"Labels: {', '.join(Label)}.")
    return Label[name]


_NAMED = frozenset((Label.PERSON, Label.LOCATION, Label.ORG))
"""What lists and cues of names can find; without these labels, patterns alone read the text."""

# Candidates -------------------------------------------------------------------------------------------------------------------------------------------------


def _read(view: View, values: Sequence[tuple[Label, str]], regions: Regions, reader: Reader | None, wanted: Collection[Label]) -> list[Span]:
    """One round over the regions of a view: every candidate, then the resolution rule. Spans are indices of the view."""
    text = view.text
    named = not _NAMED.isdisjoint(wanted)
    windows = _automaton(named=named)(text, regions)
    candidates = [*_rows(text, windows, wanted), *_known(text, values)]
    if reader is not None:
        candidates += [Span(*tag) for tag in reader.read(text, regions, _words())]
    if named:
        candidates += _names(text, candidates, regions, windows)
    candidates += _uncovered(text, values, regions, windows, candidates, wanted)
    candidates += _backwards(text, windows.get(_TURNED_AT, ()))
    return _resolve(candidates, text)


# What is hidden ---------------------------------------------------------------------------------------------------------------------------------------------

_BROKEN_MAY = frozenset(Label) - {Label.ORG, Label.LOCATION, Label.AGE, Label.ZIP, Label.ID}
"""Labels that are looked for across a line break; for the others what stands on two lines is two things."""


def _uncovered(
    text: str, values: Sequence[tuple[Label, str]], regions: Regions, windows: Mapping[int, Regions], plain: Sequence[Span], wanted: Collection[Label]
) -> Iterator[Span]:
    """Yields what stands behind escapes, encodings, markup and line breaks, as places of the text."""
    named = not _NAMED.isdisjoint(wanted)
    view = View(text, [0], [0], [-1])
    for _ in range(MAX_DEPTH):
        edits, kinds = hidden(view.text, _is_word, [windows.get(number, ()) for number in _CODES], regions)
        if not edits:
            return
        view, places = _edited(view, edits)
        regions = _around(places, view.text)
        windows = _automaton(named=named)(view.text, regions)
        found = [*_rows(view.text, windows, wanted), *_known(view.text, values)]
        if named:
            found += _names(view.text, found, regions, windows)
        yield from _touching(found, places, kinds, view, plain)


def _edited(view: View, edits: Sequence[tuple[int, int, str]]) -> tuple[View, list[tuple[int, int]]]:
    """Returns the view with the edits made, and where they stand in it."""
    places, moved = [], 0
    for start, end, put in edits:
        places.append((start + moved, start + moved + len(put)))
        moved += len(put) - (end - start)
    return view.replace(edits), places


def _touching(found: Iterable[Span], places: Sequence[tuple[int, int]], kinds: Sequence[str], view: View, plain: Sequence[Span]) -> Iterator[Span]:
    """Yields the finds that touch an edit; across line breaks alone only telling ones, and none that begins with a find of its own."""
    ends = [end for _, end in places]
    for span in found:
        index = bisect_left(ends, span.start + 1)
        touched = set()
        while index < len(places) and places[index][0] < span.end:
            touched.add(kinds[index])
            index += 1
        if not touched:
            continue
        start, end = view.original(span.start, span.end)
        if touched == {BREAK} and span.label == Label.CARD and not _in_card_groups(view.text[span.start : span.end]):
            continue
        if touched == {BREAK} and (span.score < SHAPE or span.label not in _BROKEN_MAY or _has_own(span.label, start, end, plain)):
            continue
        yield Span(start, end, span.label, span.score)


def _in_card_groups(number: str) -> bool:
    """Says whether a number over two lines is grouped as on a card, but for the gap that the break may have taken: a count and the next line's date are not."""
    *groups, last = [len(group) for group in re.split("[ -]+", number)]
    return (all(size % 4 == 0 for size in groups) and last >= 3) or [*groups, last] in ([4, 6, 5], [10, 5], [4, 11])


def _has_own(label: str, start: int, end: int, plain: Sequence[Span]) -> bool:
    """Says whether a find of that label, long enough to be whole, stands in the range already: what follows on the next line is then something else."""
    if label in (Label.PERSON, Label.ADDRESS):
        return False
    return any(s.label == label and start < s.end and s.start < end and s.end - s.start >= 8 for s in plain)


def _is_word(word: str) -> bool:
    return word in _words() or word in names()


_TURNED = re.compile(
    r"(?<![A-Za-z])[a-z]{2,20}[A-Z](?![A-Za-z])|(?<![\w-])\d{4}-\d{2,3}-\d{3}(?![\w-])|(?<!\w)\d{8,30}[A-Z]{1,6}\d{2}[A-Z]{2}(?!\w)|(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.])"
)
_TURNED_MAY = frozenset((Label.PERSON, Label.ADDRESS, Label.SSN, Label.PHONE, Label.IBAN, Label.IP, Label.CARD, Label.EMAIL))


def _backwards(text: str, regions: Regions) -> Iterator[Span]:
    """Yields what is found in the reversed line, where a line has what looks like a reversed name or number."""
    done = 0
    for first, last in regions:
        for match in _TURNED.finditer(text, first, last):
            if match.start() < done:
                continue
            start, end = max(done, match.start() - 60), min(len(text), match.end() + 60)
            start, end = text.rfind("\n", start, match.start()) + 1 or start, end if (stop := text.find("\n", match.end(), end)) < 0 else stop
            done = end
            turned = text[start:end][::-1]
            whole = [(0, len(turned))]
            found = [*_rows(turned, _automaton()(turned, whole), _TURNED_MAY)]
            for span in [*found, *_listed(turned, whole)]:
                if span.score >= SHAPE:
                    yield Span(end - span.end, end - span.start, span.label, span.score)


# Rows -------------------------------------------------------------------------------------------------------------------------------------------------------

_OPAQUES = re.compile(OPAQUE + "++")
_GUARD = re.compile("|".join(f"(?:{guard})" for guard in GUARDS))
_ROWS = (*PATTERNS, *ISSUERS)


@cache
def _compiled(index: int) -> re.Pattern[str]:
    """Compiled when a text first asks for it: most rows wait for a word that most texts never have."""
    return _ROWS[index].compiled()


_FILLER = r"(?:(?:is|was|are|number|numbers|num|no|nr|id|the|at|to|as|on|my|his|her|their|me|us|new|code|been|reads|below|above|for|with|from|this|your|or|and|home|work|cell)(?:\b|(?=_))(?:[^\w\ufffc]|_){0,4}){0,4}$"


@cache
def _context(words: tuple[str, ...]) -> re.Pattern[str]:
    alternatives = "|".join(re.escape(word).replace(r"\ ", r"[\s_-]{1,3}") for word in sorted(words, key=len, reverse=True))
    return re.compile(rf"(?<![a-z0-9])(?:{alternatives})(?![a-z])(?:[^\w\ufffc]|_){{0,6}}{_FILLER}", re.IGNORECASE)


def scan(row: Pattern, text: str) -> Iterator[tuple[int, int]]:
    """Yields where one row matches in a normalised text: expression, validator and context, without guards."""
    return _scan(row, row.compiled(), text, [(0, len(text))])


def _scan(row: Pattern, expression: re.Pattern[str], text: str, regions: Regions) -> Iterator[tuple[int, int]]:
    group: str | int = "value" if "value" in expression.groupindex else 0
    context = _context(row.context) if row.context else None
    if context is not None and row.digits:  # behind a cue alone there is mostly nothing to read
        regions = [part for part in regions if _DIGIT.search(text, *part)]
    for match in _within(expression, text, regions):
        start, end = match.span(group)
        if row.validator is not None and not row.validator(text[start:end]):
            continue
        if context is not None and not context.search(text, max(0, start - 70), start):
            continue
        if row.anchors and context is None and not _anchored(row, text, start, end):
            continue
        yield start, end


def _anchored(row: Pattern, text: str, start: int, end: int) -> bool:
    near = text[max(0, start - _BEFORE) : end + _BEFORE].lower()
    return any(anchor in near for anchor in row.anchors)


_BEFORE, _AFTER = 90, 120
_SPACE = re.compile(r"\s")
_DIGIT = re.compile("[0-9]")


def _around(marks: Iterable[tuple[int, int]], text: str) -> list[tuple[int, int]]:
    """Returns the regions around the marks, widened to white space so that no value is cut."""
    regions: list[tuple[int, int]] = []
    for first, last in marks:
        if regions and last <= regions[-1][1] - _AFTER:
            continue
        gap = _SPACE.search(text, last + _AFTER)
        start, end = max(0, first - _BEFORE), gap.start() if gap else len(text)
        if regions and start <= regions[-1][1]:
            regions[-1] = regions[-1][0], max(end, regions[-1][1])
        else:
            regions.append((start, end))
    return regions


def _within(expression: re.Pattern[str], text: str, regions: Regions) -> Iterator[re.Match[str]]:
    for start, end in regions:
        yield from expression.finditer(text, start, end)


_ONCE = threading.Lock()


@cache
def _automaton(*, named: bool = False) -> automaton.Windows:
    with _ONCE:  # a cache alone would let every thread of the first moment build its own
        return _built(named)


@cache
def _built(named: bool) -> automaton.Windows:
    return automaton.windows(_sought(named=named))


def _sought(*, named: bool) -> list[automaton.Sought]:
    """Everything that the one pass looks for: the rows (where they need a cue, behind it), the expressions of `decode`, and those of names where names are wanted."""
    rows = [automaton.Sought(_compiled(i), _context(row.context) if row.context and not row.rare else None) for i, row in enumerate(_ROWS)]
    return [*rows, *map(automaton.Sought, (*EXPRESSIONS, _TURNED, *(_CUES if named else ())))]


def _rows(text: str, windows: Mapping[int, Regions], wanted: Collection[Label]) -> Iterator[Span]:
    for index, parts in windows.items():
        if index < len(_ROWS) and (row := _ROWS[index]).label in wanted:
            for start, end in _scan(row, _compiled(index), text, parts):
                if _plausible(row, text, start, end):
                    yield Span(start, end, row.label, row.score)


def _plausible(row: Pattern, text: str, start: int, end: int) -> bool:
    """Applies the guards, and asks of an organisation or a place that it is more than ordinary words."""
    if row.label in (Label.ORG, Label.LOCATION) and not any(map(str.isdigit, text[start:end])):
        return _is_proper(text[start:end])
    if row.score >= STRONG and row.label is not Label.DATE:
        return True
    return not any(guard.start() <= start and end <= guard.end() for guard in _GUARD.finditer(text, max(0, start - 60), end + 40))


def _is_proper(name: str) -> bool:
    """Says whether a capitalised phrase has a word that is no ordinary word ("Howell Memorial Hospital", not "Mental Health")."""
    words = [word.lower() for word in re.findall(r"[A-Za-z][A-Za-z']+", name)]
    return any((word not in _words() or word in names()) and word not in _GENERIC for word in words)


_GENERIC = frozenset(
    "hospital center centre clinic imaging practice pharmacy health system healthcare memorial regional general medical family internal university college school llc inc ltd plc corp gmbh llp group sons".split()  # noqa: SIM905 - a table that reads as one
)


# Known values -----------------------------------------------------------------------------------------------------------------------------------------------

_MAX_GAP = 4
_SKIPPED = re.compile(r"[^0-9A-Za-z]+")
_NO_LETTERS = bytes(code for code in range(128) if not chr(code).isalnum())
_SHORT = 200
"""Characters below which trying a few expressions is quicker than the one pass over all."""


def spellings(known: Mapping[str, Sequence[str]]) -> dict[str, Label]:
    """Returns every spelling, in letters and digits alone, in which `detect` looks for known values, and the label under which it finds it."""
    found: dict[str, Label] = {}
    for label, group in sorted(((parse_label(label), group) for label, group in known.items()), key=lambda pair: -_ORDER[pair[0]]):
        for value in group:
            found |= dict.fromkeys(_spellings(label, fold(value)), label)
    return found


def is_telling(name: str) -> bool:
    """Says whether a name can be looked for elsewhere: no part of it is an ordinary word ("Young")."""
    return all(part not in _words() for part in re.findall(r"[a-z]{2,}", fold(name).lower()))


def leaves_none(text: str, spans: Sequence[Span], sought: Mapping[str, Label]) -> bool:
    """Says whether every known value that may stand in a text, encoded ones included, is inside a span, and under its own label where it is the whole of one: reading
    the text again with `known` would then change nothing.

    Args:
        text: the original text.
        spans: what was found in it.
        sought: `spellings` of the known values.
    """
    squeezed = _squeezed(text)
    inside = [_squeezed(text[span.start : span.end]) for span in spans]
    if any(sought.get(value, span.label) != span.label for value, span in zip(inside, spans, strict=True)):
        return False
    joined = "\n".join(inside)
    return all(squeezed.count(spelling) == joined.count(spelling) for spelling in sought if spelling in squeezed)


def _squeezed(text: str) -> str:
    return (
        plain(normalise(text).text, _code_places).encode("ascii", "ignore").translate(None, _NO_LETTERS).decode().lower()
    )  # as `_SKIPPED` does it, quicker


def _code_places(text: str) -> list[Regions]:
    """Returns where the expressions of `decode` can match: by the one pass for a long text, everywhere for a short one."""
    if len(text) < _SHORT:
        return [[(0, len(text))]] * len(_CODES)
    windows = _automaton()(text, [(0, len(text))])
    return [windows.get(number, ()) for number in _CODES]


def _known(text: str, values: Sequence[tuple[Label, str]]) -> Iterator[Span]:
    """Yields where a known value stands, in any spelling: letters and digits are compared, case and what stands between them is not."""
    if not values:
        return
    squeezed, places = _squeeze(text)
    for label, value in values:
        for needle in sorted(_spellings(label, fold(value))):
            yield from (Span(start, end, label, 1.0) for start, end in _find(needle, text, squeezed, places, label))


def _squeeze(text: str) -> tuple[str, array[int]]:
    """Returns the letters and digits of the text in lower case, with the place of each."""
    places = array("q", (i for i, c in enumerate(text) if c.isalnum() and len(c.lower()) == 1))
    return "".join([text[i] for i in places]).lower(), places


def _find(needle: str, text: str, squeezed: str, places: array[int], label: Label) -> Iterator[tuple[int, int]]:
    at = squeezed.find(needle)
    while at >= 0:
        last = at + len(needle) - 1
        start, end = places[at], places[last] + 1
        whole = not text[start - 1 : start].isalnum() and not text[end : end + 1].isalnum()
        close = len(needle) >= 4 or end - start == len(needle)
        if whole and close and all(places[i + 1] - places[i] <= _MAX_GAP for i in range(at, last)) and _as_name(label, needle, text[start:end]):
            yield start, end
        at = squeezed.find(needle, at + 1)


def _as_name(label: Label, needle: str, found: str) -> bool:
    """A known name that is also a word ("May", "Bean") counts only with a capital letter."""
    return label is not Label.PERSON or needle not in _words() or found[:1].isupper()


def _spellings(label: Label, value: str) -> set[str]:
    """Returns the spellings of a known value to look for, squeezed to lower-case letters and digits."""
    squeezed = _SKIPPED.sub("", value).lower()
    if label is Label.PERSON:
        return _person_spellings(value)
    if label is Label.AGE and (not squeezed.isdigit() or int(squeezed) < 90):
        return set()
    spellings = {squeezed}
    if label is Label.DATE:
        spellings |= _date_spellings(value)
    if label in (Label.PHONE, Label.FAX) and len(patterns.digits(value)) >= 10:
        number = patterns.digits(value)
        spellings |= {number, number[-10:], number[-7:]}
    if label is Label.ADDRESS:
        spellings |= {_SKIPPED.sub("", part).lower() for part in re.split(r"[,\n]", value) if len(part.strip()) >= 4}
    return {s for s in spellings if len(s) >= 3}


def _person_spellings(value: str) -> set[str]:
    """Full name in both orders, without middle names, each part alone, and initial with surname."""
    reversed_order = "," in value
    parts = [
        p.lower() for p in re.findall(r"[A-Za-z'-]+", value) if p.lower().strip(".") not in patterns.TITLES and p.upper() not in patterns.CREDENTIALS
    ]
    parts = [p for p in ("".join(c for c in part if c.isalpha()) for part in parts) if p]
    if not parts:
        return {_SKIPPED.sub("", value).lower()} - {""} if len(value) >= 3 else set()
    if reversed_order:
        parts = parts[1:] + parts[:1]
    first, last = parts[0], parts[-1]
    spellings = {p for p in parts if len(p) >= 3} | {"".join(parts), "".join([*parts[-1:], *parts[:-1]]), first + last, last + first}
    if len(parts) > 1 and len(last) >= 3:
        spellings |= {first[0] + last, last + first[0]}
    for piece in re.findall(r"[A-Za-z']+", value):
        spellings.add(piece.replace("'", "").lower())
    return {s for s in spellings if len(s) >= 3}


def _date_spellings(value: str) -> set[str]:
    parts = [int(p) for p in re.findall(r"\d+", value)]
    month = next((i + 1 for i, name in enumerate(patterns.MONTHS) if re.search(rf"\b{name[:3]}", value, re.IGNORECASE)), None)
    if month is not None and len(parts) >= 2:
        day, year = parts[0], parts[1]
    elif len(parts) >= 3 and parts[0] > 31:
        year, month, day = parts[:3]
    elif len(parts) >= 3:
        month, day, year = parts[:3]
        if month > 12:
            month, day = day, month
    else:
        return set()
    if not 1 <= month <= 12:
        return set()
    short, name = f"{year % 100:02d}", patterns.MONTHS[month - 1]
    spellings = set()
    for m, d in ((f"{month:02d}", f"{day:02d}"), (str(month), str(day))):
        for y in (str(year), short):
            spellings |= {y + m + d, m + d + y, d + m + y}
        for n in (name, name[:3]):
            spellings |= {n + d + str(year), d + n + str(year), d + n + short, n + d + short, n + d, d + n}
    for n in (name, name[:3]):
        spellings |= {n + str(day) + suffix + y for suffix in ("st", "nd", "rd", "th") for y in (str(year), "")}
    return {s for s in spellings if len(s) >= 6 or not s.isdigit()}


# Names ------------------------------------------------------------------------------------------------------------------------------------------------------


@cache
def _words() -> frozenset[str]:
    lines = (resources.files("discreet.deid") / "words.txt").read_text(encoding="utf-8").split("\n")
    return frozenset(line for line in lines if line and not line.startswith("#")) | patterns.NOT_NAMES


@cache
def names() -> Mapping[str, str]:
    """Returns the gazetteer: name in lower case -> its flags (F, M, G first name; L last name; S may be a surrogate)."""
    lines = (resources.files("discreet.deid") / "names.txt").read_text(encoding="utf-8").split("\n")
    pairs = (line.split(" ") for line in lines if line and not line.startswith("#"))
    return {name.lower(): flags for name, flags in pairs}


@cache
def places() -> frozenset[str]:
    """Returns towns and cities, as they are written."""
    lines = (resources.files("discreet.deid") / "places.txt").read_text(encoding="utf-8").split("\n")
    return frozenset(line for line in lines if line and not line.startswith("#"))


def is_first(token: str) -> bool:
    """Says whether a token is a first name of the gazetteer."""
    return any(flag in names().get(token.lower(), "") for flag in "FMG")


def is_last(token: str) -> bool:
    """Says whether a token is a last name of the gazetteer."""
    return "L" in names().get(token.lower(), "")


_FUNCTION_WORDS = frozenset(("do", "so", "no", "an", "he", "in", "to", "is", "it", "we", "my", "you", "she", "can", "has", "was", "for"))
_NO_NAME = patterns.NOT_NAMES | set(patterns.TITLES)
_CAPITALISED = r"[A-Z](?:[a-z]{1,30}|[A-Z]{1,30}|'[A-Z][a-z]{1,30}|[a-z]{1,3}[A-Z][a-z]{1,30})(?:[-'][A-Z]?[A-Za-z]{2,30}){0,2}(?![A-Za-z])"
_PARTICLE = rf"(?:{'|'.join(re.escape(p) for p in sorted(patterns.PARTICLES, key=len, reverse=True))})"
_GAP = r"[ \t\xa0]{1,2}"
_NAME = rf"(?:{_CAPITALISED}|[A-Z]\.(?= ?[A-Z]))(?:(?:{_GAP}(?:(?i:{_PARTICLE}){_GAP}){{0,2}})(?:{_CAPITALISED}|[A-Z]\b\.?)){{0,3}}"
_LOWER_NAME = r"[a-z][a-z'-]{1,30}(?![a-z])"

_RUN = re.compile(rf"(?<![A-Za-z'-]){_CAPITALISED}(?:{_GAP}(?:(?:{_PARTICLE}){_GAP}){{0,2}}(?:{_CAPITALISED}|[A-Z]\.?(?={_GAP}[A-Z]))){{0,4}}")
_TITLED = re.compile(rf"(?<![A-Za-z])(?i:{'|'.join(patterns.TITLES)})(?:\.|\b)[ \t\n]{{0,2}}(?P<value>{_NAME})")
_TITLED_LOWER = re.compile(
    rf"(?<![a-z])(?:dr|mr|mrs|ms|miss|doctor|prof|hi|hey|hello|dear|thanks|thank you|good morning|good afternoon)\b ?[.,]? (?!(?:dr|mr|mrs|ms)\b)(?P<value>{_LOWER_NAME}(?: {_LOWER_NAME})?)",
    re.IGNORECASE,
)
_TITLE_LOWER = re.compile(r"(?:dr|mr|mrs|ms)\b", re.IGNORECASE)
_LOWER_WORD = re.compile(r"(?<![a-z'-])[a-z]{4,30}(?![a-z'-])")
_LARGE, _SMALL = string.ascii_uppercase.encode(), string.ascii_lowercase.encode()
_LOWER_NEXT = re.compile(r" (?P<value>[a-z]{3,30})(?![a-z])")
_COLON = re.compile(rf"[:=][ \t]{{0,4}}(?P<value>{_NAME})")
_COLON_LOWER = re.compile(r"[:=][ \t]{0,4}(?P<value>[a-z]{3,30} [a-z]{3,30})(?![a-z'-])")
_COLON_CUE = re.compile(rf"(?<![a-z])(?:{'|'.join(sorted(patterns.COLON_CUES, key=len, reverse=True))})(?: name)?[ \t]{{0,2}}$", re.IGNORECASE)
_SPEAKER = re.compile(rf"(?<![a-z])(?:{'|'.join(patterns.SPEAKERS)})[ \t]{{0,2}}$", re.IGNORECASE)
_ADDRESSED = re.compile(
    rf"(?:(?<=[a-z,;] )|(?<=[a-z],\n))(?P<value>{_CAPITALISED})(?!{_GAP}[A-Z])|(?:(?<=[.?!:] )|(?<=\n)|\A)(?P<opening>{_CAPITALISED})(?=, )"
)
_ARTICLE = re.compile(r"\b(?:the|a|an|in|on|of|since|by|until|from|during|last|next|this|every|early|late|mid)\s$", re.IGNORECASE)
_NAMING = re.compile(rf"(?<![A-Za-z])(?i:{'|'.join(sorted(patterns.NAMING_CUES, key=len, reverse=True))}),?[ \t\n]{{1,2}}(?P<value>{_NAME})")
_PHRASE = re.compile(rf"(?<![A-Za-z])(?i:{'|'.join(sorted(patterns.PHRASE_CUES, key=len, reverse=True))}),?[ \t\n]{{1,2}}(?P<value>{_NAME})")
_RELATION = re.compile(
    rf"(?<![A-Za-z])(?i:{'|'.join(sorted(patterns.RELATIONS, key=len, reverse=True))}),?(?: (?:is|was)(?: named| called)?| named| called)?[ \t\n]{{1,2}}(?P<value>{_NAME})"
)
_CREDENTIALED = re.compile(
    rf"(?<![A-Za-z])(?P<value>{_NAME}),? {{1,2}}(?:{'|'.join(re.escape(c) for c in sorted(patterns.CREDENTIALS, key=len, reverse=True))})(?![A-Za-z])"
)
_COMMA = re.compile(
    rf"(?<![A-Za-z'-])(?P<value>{_CAPITALISED}(?:{_GAP}{_CAPITALISED})?, ?{_CAPITALISED}(?:{_GAP}(?:{_CAPITALISED}|[A-Z]\b\.?))?)(?!\.? {{0,2}}\d)"
)
_GIVEN = re.compile(rf", ?(?P<value>{_CAPITALISED})(?: [A-Z]\b\.?)?")
_DRUG = re.compile(rf"[a-z]{{2}}(?:{patterns.DRUG_ENDINGS})$")
_SINGLE = re.compile(r"(?<![A-Za-z])[A-Za-z][A-Za-z']+(?:-[A-Za-z']{2,})*(?<!'s)(?<!')")
_EPONYM = re.compile(rf"(?:'s)?[ \n](?:[a-z]{{1,12}}[ \n])?(?:{'|'.join(patterns.EPONYMS)})\b", re.IGNORECASE)
_DIRECTION = re.compile(
    rf"(?<![A-Za-z])(?:North|South|East|West|New|Port|Lake|NORTH|SOUTH|EAST|WEST|NEW|PORT|LAKE|Mount|Fort|Saint|St\.) (?P<value>{_CAPITALISED})"
)
_ENDING = "ville|town|burgh|burg|borough|bury|chester|shire|furt|stad|haven|mouth|berg|fort|ton|side|land|view|port"
_SUFFIX = re.compile(rf"(?:{_ENDING})$", re.IGNORECASE)
_TOWN = re.compile(rf"(?<![A-Za-z])[A-Z][a-z]{{2,20}}(?:{_ENDING})(?![A-Za-z])")
_LIVES = re.compile(
    rf"(?<![A-Za-z])(?i:lives? in|living in|lived in|resides? in|resident of|born in|moved (?:here )?(?:from|to)|native of|grew up in|travel(?:ed|led|ing)? to|flew to|trip to|city|town|hometown is|arrived at|based in)"
    rf":? (?P<value>{_CAPITALISED}(?:{_GAP}(?:(?:de|la|of|upon|am|el|los|las|del) )?(?:{_CAPITALISED}|pho|altos|bajos)){{0,3}})"
)
_EMPLOYED = re.compile(
    rf"(?<![A-Za-z])(?i:(?:works?|worked|working|employed|employee|job|jobs|position|years?|career|intern|interned|internship|internships|partner|manager|engineer|director|analyst|consultant|stint) (?:at|with|for|by)"
    rf"|(?:ceo|cto|cfo|founder|co-founder|owner|president|employees?|subsidiary|customer|client) of|hired by|acquired by|founded by|(?:later )?became part of|later became|merged with|laid off (?:from|by)|retired from) "
    rf"(?P<value>{_CAPITALISED}(?:{_GAP}(?:(?:of|and|&|de) )?{_CAPITALISED}){{0,3}})"
)
_IS_A_FIRM = re.compile(
    rf"(?P<value>{_CAPITALISED}(?:{_GAP}(?:(?:of|and|And|&) )?{_CAPITALISED}){{0,3}}),? (?:is|was|are) an? (?:[a-z-]{{2,20}} ){{0,3}}"
    r"(?:company|agency|firm|start-?up|bank|corporation|organi[sz]ation|manufacturer|retailer|supplier|publisher|studio|charity|brewery|brand|insurer|consultancy|employer)(?![a-z])"
)


def _names(text: str, others: Sequence[Span], regions: Regions, windows: Mapping[int, Regions]) -> Iterator[Span]:
    """Yields people and towns: cues, titles, lists and pairs of the gazetteer, then every other mention of what was found."""
    cued = {id(expression): windows.get(number, ()) for number, expression in enumerate(_CUES, _TURNED_AT + 1)}
    people = [*_cued(text, cued), *_listed(text, regions), *_caseless(text, regions)]
    yield from _foreign(text, regions)
    taken = [s for s in others if s.label is Label.PERSON]
    yield from people
    yield from _mentions(text, [*people, *taken])
    yield from _towns(text, cued)
    yield from _firms(text, cued)


def _firms(text: str, cued: Mapping[int, Regions]) -> Iterator[Span]:
    """Yields what somebody works at, and what is said to be a company, where it is more than ordinary words and nobody's title."""
    for expression in (_EMPLOYED, _IS_A_FIRM):
        for match in _within(expression, text, cued[id(expression)]):
            words = re.findall(r"[a-z'-]+", match["value"].lower())
            strange = not all(word in _words() or word in _GENERIC for word in words)
            if strange and match["value"] not in _REGIONS and not any(word in patterns.TITLES for word in words):
                yield Span(*match.span("value"), Label.ORG, SHAPE)


def _cued(text: str, cued: Mapping[int, Regions]) -> Iterator[Span]:
    for expression, score, needs_proof in (
        (_TITLED, STRONG, False),
        (_COLON, STRONG, False),
        (_NAMING, STRONG, False),
        (_CREDENTIALED, SHAPE, True),
        (_PHRASE, SHAPE, True),
        (_RELATION, SHAPE, True),
    ):
        for match in _within(expression, text, cued[id(expression)]):
            if expression is _COLON and not _COLON_CUE.search(text, max(0, match.start() - 45), match.start()):
                continue
            speaks = expression is _COLON and _SPEAKER.search(text, max(0, match.start() - 45), match.start()) is not None
            kept = _trim(text, *match.span("value"), proof=needs_proof or speaks)
            if speaks and kept is not None and not any(t.lower() in names() for t in text[slice(*kept)].split()):
                continue
            after = _GIVEN.match(text, kept[1]) if kept is not None and expression is _COLON else None
            if kept is not None and after is not None and is_first(after["value"]):
                kept = kept[0], after.end()
            if kept is not None:
                yield Span(*kept, Label.PERSON, score)
    yield from _addressed(text, cued)
    for match in _within(_COMMA, text, cued[id(_COMMA)]):
        surname, rest = [part.split() for part in match["value"].split(",")]
        given = [t for t in rest if len(t) > 1]
        if (
            given
            and all(is_first(t) or is_last(t) for t in given)
            and is_first(given[0])
            and all(is_last(t) or not _common(t) for t in surname)
            and not (_common(given[0]) and _common(surname[-1]))
        ):
            yield Span(*match.span("value"), Label.PERSON, SHAPE)
    for match in _within(_COLON_LOWER, text, cued[id(_COLON_LOWER)]):
        if _COLON_CUE.search(text, max(0, match.start() - 45), match.start()) and all(t in names() for t in match["value"].split()):
            yield Span(*match.span("value"), Label.PERSON, SHAPE)
    for match in _within(_TITLED_LOWER, text, cued[id(_TITLED_LOWER)]):
        said = match["value"]
        titled = _TITLE_LOWER.match(text, match.start()) is not None
        listed = list(itertools.takewhile(lambda t: _is_lower_name(t, titled=titled), said.split(" "))) if said.islower() else []  # noqa: B023 - used at once
        start = match.start("value")
        if not listed and said.islower() and _is_greeted(text, match.start(), start, said.split(" ")[0]):
            listed = said.split(" ")[:1]
        if listed:
            yield Span(start, start + len(" ".join(listed)), Label.PERSON, SHAPE)


_GREETING = re.compile(r"(?:hi|hey|hello|good morning|good afternoon)\b", re.IGNORECASE)
_GREETED = re.compile(r" ?(?:[,.!?]|\n|\Z)| (?:how|good to|nice to|great to|what|welcome|thanks|thank|it's|i'm|i am|so)\b")


def _is_greeted(text: str, start: int, at: int, word: str) -> bool:
    """Says whether somebody is greeted by a first name in lower case that is also a word ("hi hope , how are you"): what follows must be the rest of a greeting."""
    return "U" in names().get(word, "") and _GREETING.match(text, start) is not None and _GREETED.match(text, at + len(word)) is not None


def _is_lower_name(word: str, *, titled: bool) -> bool:
    """Says whether a word in lower case is a name: one of the lists that is no ordinary word, or behind a title anything but an ordinary word."""
    if titled:
        return word not in _FUNCTION_WORDS and (word in names() or not _common(word))
    return word in names() and not _common(word)


def _addressed(text: str, cued: Mapping[int, Regions]) -> Iterator[Span]:
    """Yields first names that are also words where only a name has a capital: within a sentence, or in front of one and a comma ("Dawn, how are you?")."""
    for match in _within(_ADDRESSED, text, cued[id(_ADDRESSED)]):
        group = "value" if match["value"] else "opening"
        token = match[group]
        usual = "U" in names().get(token.lower(), "") and token.lower() not in _NO_NAME and token not in _REGIONS and not token.isupper()
        if usual and not _ARTICLE.search(text, max(0, match.start() - 9), match.start()) and not _EPONYM.match(text, match.end()):
            yield Span(*match.span(group), Label.PERSON, WEAK)


def _trim(text: str, start: int, end: int, *, proof: bool) -> tuple[int, int] | None:
    """Cuts a cued run down to what can be a name: ordinary words at its end go; with `proof` a lone ordinary word is no name at all."""
    tokens = [(m.start() + start, m.end() + start, m.group()) for m in re.finditer(r"[A-Za-z][A-Za-z'.-]*", text[start:end])]
    if not tokens or tokens[0][2].lower().rstrip(".") in _NO_NAME:
        return None
    first = tokens[0][2]
    if first.lower() in _words() and first.lower() not in names() and (proof or len(tokens) == 1 or _common(tokens[1][2])):
        return None
    shout = text[start:end].isupper()
    keep = 1
    for _, _, part in tokens[1:]:
        bare = part.rstrip(".").lower()
        if (
            bare in _NO_NAME
            or part == "I"
            or bare in _FUNCTION_WORDS
            or (_common(bare) and not is_last(bare))
            or (shout and bare not in names() and len(bare) > 1)
        ):
            break
        keep += 1
    while keep > 1 and tokens[keep - 1][2].lower() in patterns.PARTICLES:
        keep -= 1
    if proof and keep == 1 and ((_common(first) and "U" not in names().get(first.lower(), "")) or len(first.rstrip(".")) < 3):
        return None
    if proof and keep == 1 and first.isupper() and first.lower() not in names():
        return None
    stop = tokens[keep - 1][1]
    if _EPONYM.match(text, stop):
        return None
    return tokens[0][0], stop - (text[stop - 1] == "." and len(tokens[keep - 1][2]) > 2)


def _common(token: str) -> bool:
    bare = token.lower()
    return bare in _words() or token in places() or (bare not in names() and _DRUG.search(bare) is not None)


def _listed(text: str, regions: Regions) -> Iterator[Span]:
    """Yields runs of capitalised words that the gazetteer knows: first and last name together, or a first name that is no ordinary word."""
    for match in _within(_RUN, text, regions):
        tokens = [(m.start() + match.start(), m.end() + match.start(), m.group()) for m in re.finditer(r"[A-Za-z][A-Za-z'-]*\.?", match.group())]
        at = 0
        while at < len(tokens):
            stop = _name_from(tokens, at)
            if stop > at and not _EPONYM.match(text, tokens[stop - 1][1]):
                yield Span(tokens[at][0], tokens[stop - 1][1], Label.PERSON, SHAPE if stop - at > 1 else WEAK)
            at = max(stop, at + 1)


def _caseless(text: str, regions: Regions) -> Iterator[Span]:
    """Yields usual first names (with a last name behind) in a text that was written without capitals, such as a transcript."""
    letters = text.encode("ascii", "ignore")
    small = letters.translate(None, _LARGE)
    if (len(letters) - len(small)) * 100 > len(small) - len(small.translate(None, _SMALL)):
        return
    for match in _within(_LOWER_WORD, text, regions):
        if "U" in names().get(match.group(), "") and not _common(match.group()):
            after = _LOWER_NEXT.match(text, match.end())
            whole = after is not None and is_last(after["value"]) and not _common(after["value"])
            yield Span(match.start(), after.end() if after is not None and whole else match.end(), Label.PERSON, WEAK)


_OTHER_SCRIPT = re.compile("[\u0370-\u058f]")
"""Greek, Cyrillic and Armenian: alphabets that tell a name by its capital."""
_OTHER_WORD = r"(?=[A-Za-z]{0,20}[\u0370-\u058f])[^\W\d_]{2,40}"
_RUN_OF_OTHERS = re.compile(rf"(?<![^\W_]){_OTHER_WORD}(?:[ -]{_OTHER_WORD}){{0,3}}(?![^\W_])")
_AT = re.compile(r"\b(?:in|to|at|from|near) $")


def _foreign(text: str, regions: Regions) -> Iterator[Span]:
    """Yields capitalised words of another alphabet in a text of Latin letters: what is not translated there is the name of somebody or of a place."""
    if text.isascii():
        return
    others = len(_OTHER_SCRIPT.findall(text))
    if not others or others * 4 > sum(map(str.isalpha, text)):
        return
    for match in _within(_RUN_OF_OTHERS, text, regions):
        words = match.group().split()
        if all(word.istitle() or word.isupper() for word in words) and any(len(word) > 2 for word in words):
            place = _AT.search(text, max(0, match.start() - 6), match.start()) is not None
            yield Span(*match.span(), Label.LOCATION if place else Label.PERSON, WEAK)


def _name_from(tokens: Sequence[tuple[int, int, str]], at: int) -> int:
    """Returns the end of the name that starts at token `at`, or `at` where none does."""
    first = tokens[at][2]
    if first.lower() in _NO_NAME:
        return at
    if not is_first(first):
        return _unlisted(tokens, at)
    stop = at + 1
    while stop < len(tokens) and (len(tokens[stop][2].rstrip(".")) == 1 or tokens[stop][2].lower() in patterns.PARTICLES):
        stop += 1
    if stop < len(tokens):
        last = tokens[stop][2]
        unknown = not _common(last) and last.lower() not in names() and not last.isupper()
        if (
            last.lower() not in patterns.NOT_NAMES
            and (is_last(last) or (is_first(last) and not _common(last)) or (unknown and not _common(first)))
            and not (_common(first) and _common(last) and not is_last(last))
        ):
            stop += 1
            while stop < len(tokens) and (is_last(tokens[stop][2]) and not _common(tokens[stop][2])):
                stop += 1
            return stop
    return at if _common(first) or len(first) < 3 else at + 1


def _unlisted(tokens: Sequence[tuple[int, int, str]], at: int) -> int:
    """Two neighbours that no list has, neither an ordinary word nor in capitals, are taken for a name, with an initial between them or without."""
    stop = at + 1
    while stop < len(tokens) and (len(tokens[stop][2].rstrip(".")) == 1 or tokens[stop][2].lower() in patterns.PARTICLES):
        stop += 1
    if stop >= len(tokens):
        return at
    pair = tokens[at][2], tokens[stop][2]
    rare = all(len(t) > 2 and not t.isupper() and not _common(t) and t not in _REGIONS for t in pair)
    return stop + 1 if rare and (any(t.lower() in names() for t in pair) or stop > at + 1) else at


def _mentions(text: str, people: Sequence[Span]) -> Iterator[Span]:
    """Yields every other place where a part of a found name stands: capitalised or upper case, and lower case when it is no ordinary word."""
    parts: dict[str, float] = {}
    for span in people:
        for token in re.findall(r"[A-Za-z][A-Za-z'-]+", text[span.start : span.end]):
            parts[token.lower()] = max(span.score, parts.get(token.lower(), 0.0))
    for token in _NO_NAME | set(patterns.PARTICLES):
        parts.pop(token, None)
    if not parts:
        return
    tokens = [match for match in _SINGLE.finditer(text) if match.group().lower() in parts]
    as_word = {match.group() for match in tokens}
    for match in tokens:
        if _counts_as_mention(match.group(), as_word, parts[match.group().lower()]) and not _EPONYM.match(text, match.end()):
            yield Span(match.start(), match.end(), Label.PERSON, WEAK)


def _counts_as_mention(token: str, as_word: set[str], score: float) -> bool:
    """An ordinary word ("Young") counts only with one capital, and only where the text never uses it in lower case."""
    bare = token.lower()
    if bare not in _words() and len(token) > 2:
        return True
    return token[0].isupper() and not token[1:].isupper() and (bare in names() or score >= STRONG) and bare not in as_word


def _towns(text: str, cued: Mapping[int, Regions]) -> Iterator[Span]:
    for match in _within(_PLACES, text, cued[id(_PLACES)]):
        yield Span(*match.span(), Label.LOCATION, SHAPE)
    for match in _within(_DIRECTION, text, cued[id(_DIRECTION)]):
        stem = _SUFFIX.sub("", match["value"]).lower()
        if (match["value"].lower() in names() or stem in names()) and match["value"].lower() not in patterns.NOT_NAMES:
            yield Span(*match.span(), Label.LOCATION, SHAPE)
    for match in _within(_TOWN, text, cued[id(_TOWN)]):
        stem = _SUFFIX.sub("", match.group()).lower()
        if stem in names() and match.group().lower() not in _words() and not is_last(match.group()) and not is_first(match.group()):
            yield Span(*match.span(), Label.LOCATION, SHAPE)
    for match in _within(_LIVES, text, cued[id(_LIVES)]):
        kept = _trim_place(text, *match.span("value"))
        if kept is not None:
            yield Span(*kept, Label.LOCATION, SHAPE)


def _trim_place(text: str, start: int, end: int) -> tuple[int, int] | None:
    tokens = [m.group() for m in re.finditer(r"[A-Za-z][A-Za-z'-]*", text[start:end])]
    if not tokens or all(t.lower() in _words() or t in _REGIONS for t in tokens) or text[start:end] in _REGIONS:
        return None
    return start, end


_REGIONS = frozenset(patterns.STATE_NAMES.split("|")) | frozenset(
    "America USA UK US England Scotland Wales Ireland Canada Mexico Europe Africa Asia India China Japan Germany France Spain Italy Poland Portugal Brazil Argentina Russia Ukraine Vietnam Korea Australia".split()  # noqa: SIM905 - a table that reads as one
)


_PLACES = re.compile(rf"(?<![\w-])(?:{'|'.join(re.escape(p) for p in sorted(places(), key=len, reverse=True))})(?![\w-])")
_CUES = (
    _TITLED, _COLON, _NAMING, _CREDENTIALED, _PHRASE, _RELATION, _ADDRESSED, _COMMA, _COLON_LOWER, _TITLED_LOWER, _DIRECTION, _TOWN, _LIVES, _PLACES,
    _EMPLOYED, _IS_A_FIRM,
)  # fmt: skip
"""Expressions of names that the automaton looks for beside the rows, encodings and lines written backwards."""
_CODES = range(len(_ROWS), len(_ROWS) + len(EXPRESSIONS))
_TURNED_AT = _CODES.stop


# Resolution -------------------------------------------------------------------------------------------------------------------------------------------------

_ORDER = {label: index for index, label in enumerate(Label)}


def _resolve(candidates: Iterable[Span], text: str) -> list[Span]:
    """Longest first, then strongest, then earliest; what a loser covers alone, or an earlier round left over, stays with the loser's label."""
    taken = bytearray(len(text))
    for match in _OPAQUES.finditer(text):
        taken[match.start() : match.end()] = b"\x01" * (match.end() - match.start())
    chosen: list[Span] = []
    for span in sorted(set(candidates), key=lambda s: (s.start - s.end, -s.score, s.start, _ORDER[Label(s.label)])):
        for start, end in _free(taken, span.start, span.end):
            start, end = _strip(text, start, end)
            if start < end:
                taken[start:end] = b"\x01" * (end - start)
                chosen.append(Span(start, end, span.label, span.score))
    return sorted(chosen, key=lambda s: s.start)


def _free(taken: bytearray, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Yields the stretches of [start, end) that nobody has taken."""
    at = taken.find(0, start, end)
    while at >= 0:
        stop = taken.find(1, at, end)
        stop = end if stop < 0 else stop
        yield at, stop
        at = taken.find(0, stop, end) if stop < end else -1


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    """Drops spaces, opaque characters and stray marks at both ends; nothing is left of a stretch without a letter or digit."""
    whole = not any(c.isalnum() for c in text[start:end])
    if whole:
        return start, start
    while text[start].isspace() or text[start] in ",;:" + OPAQUE:
        start += 1
    while text[end - 1].isspace() or text[end - 1] in ",;:" + OPAQUE:
        end -= 1
    return start, end
