"""Normalised text with the place in the original of every character: what every detector reads.

The view undoes what hides an identifier from an expression: compatibility forms and accents are folded, other digits become ASCII digits, look-alike Greek and Cyrillic
letters become Latin, and zero-width characters, soft hyphens, variation selectors and control characters vanish (PITFALLS 24). A mark that redaction left ("[PERSON]") is one opaque character.

The map is a list of segments, of which most stand for themselves, so that plain text costs nothing and `replace` composes: a view of a view is a view of the original.

Guarantees: every view character stands for a non-empty range of the original, in order; `original` of a range covers all that its characters stand for.

Does not cover: what needs more than one character to see through (escapes, encodings, line breaks, spaced-out text): that is `decode`.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import final

from discreet.deid.patterns import Label

OPAQUE = "\ufffc"
"""Stands in the view for a span that was found, or for a mark such as [PERSON] or [REDACTED] in the text."""

MARK = re.compile(rf"\[(?:REDACTED|{'|'.join(Label)})\]")
"""What the operators `label` and `redact` leave behind."""

Edit = tuple[int, int, str]
"""Half-open range of a view, and what is read in its place."""

_ITSELF = -1


@final
@dataclass(frozen=True, slots=True)
class View:
    """Text, and where it came from. Segment i starts at view offset `at[i]` and original offset `begin[i]`; it stands for itself where `end[i]` is -1, or else each
    of its characters stands for the whole `original[begin[i]:end[i]]`.
    """

    text: str
    at: list[int]
    begin: list[int]
    end: list[int]

    def original(self, start: int, end: int) -> tuple[int, int]:
        """Returns the half-open range of the original text that view[start:end] stands for (start < end)."""
        first, last = bisect_right(self.at, start) - 1, bisect_right(self.at, end - 1) - 1
        begin = self.begin[first] + (start - self.at[first] if self.end[first] == _ITSELF else 0)
        return begin, self.begin[last] + end - self.at[last] if self.end[last] == _ITSELF else self.end[last]

    def whole(self, start: int, end: int) -> tuple[int, int]:
        """Returns view[start:end] (start < end) widened to all characters that stand for what these stand for: a fraction sign is three of them."""
        first, last = bisect_right(self.at, start) - 1, bisect_right(self.at, end - 1) - 1
        start = start if self.end[first] == _ITSELF else self.at[first]
        return start, end if self.end[last] == _ITSELF else self.at[last + 1] if last + 1 < len(self.at) else len(self.text)

    def replace(self, edits: Sequence[Edit]) -> View:
        """Returns the view with each edit (ranges sorted, disjoint, not empty) made; what is put in stands for the whole range it replaces."""
        made = _Builder()
        done = 0
        for start, end, put in edits:
            made.copy(self, done, start)
            if put:
                made.add(put, *self.original(start, end))
            done = end
        made.copy(self, done, len(self.text))
        return made.view()

    def blank(self, ranges: Sequence[tuple[int, int]]) -> View:
        """Returns the view with each range (sorted, disjoint) replaced by one opaque character that stands for it."""
        return self.replace([(start, end, OPAQUE) for start, end in ranges])


class _Builder:
    """Collects pieces of a view from left to right."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._length = 0
        self._at: list[int] = []
        self._begin: list[int] = []
        self._end: list[int] = []

    def add(self, piece: str, begin: int, end: int) -> None:
        """Adds a piece that stands for original[begin:end], or for itself from `begin` on where end is -1."""
        self._pieces.append(piece)
        self._at.append(self._length)
        self._begin.append(begin)
        self._end.append(end)
        self._length += len(piece)

    def stretch(self, end: int) -> None:
        """Lets the last character stand for the original up to `end` as well."""
        if not self._pieces:
            return
        piece, begin, stop = self._pieces[-1], self._begin[-1], self._end[-1]
        if stop != _ITSELF or len(piece) == 1:
            self._end[-1] = end
            return
        self._pieces[-1] = piece[:-1]
        self._length -= 1
        self.add(piece[-1], begin + len(piece) - 1, end)

    def copy(self, view: View, start: int, end: int) -> None:
        """Adds view[start:end]."""
        index = bisect_right(view.at, start) - 1
        while start < end:
            stop = min(end, view.at[index + 1] if index + 1 < len(view.at) else end)
            if view.end[index] == _ITSELF:
                self.add(view.text[start:stop], view.begin[index] + start - view.at[index], _ITSELF)
            else:
                self.add(view.text[start:stop], view.begin[index], view.end[index])
            start, index = stop, index + 1

    def view(self) -> View:
        return View("".join(self._pieces), self._at or [0], self._begin or [0], self._end or [_ITSELF])


def normalise(text: str) -> View:
    """Returns the view of a text: folded characters with the place each one came from, and every mark blanked."""
    view = _fold(text)
    marks = [match.span() for match in MARK.finditer(view.text)] if "[" in view.text else []
    return view.blank(marks) if marks else view


def fold(value: str) -> str:
    """Returns the normalised form of a value, as it stands in a view."""
    return value if value.isascii() and value.isprintable() else _fold(value).text


_STRANGE = re.compile(r"[^\t\n\r -~]+")


def _fold(text: str) -> View:
    made = _Builder()
    done = 0
    for match in _STRANGE.finditer(text):
        if done < match.start():
            made.add(text[done : match.start()], done, _ITSELF)
        for index, character in enumerate(match.group(), match.start()):
            folded = _fold_character(character)
            if len(folded) == 1:
                made.add(folded, index, _ITSELF)
            elif folded:
                made.add(folded, index, index + 1)
            elif unicodedata.combining(character):
                made.stretch(index + 1)  # an accent belongs to the letter before it
        done = match.end()
    if done < len(text):
        made.add(text[done:], done, _ITSELF)
    return made.view()


_LATIN = dict(zip("øØłŁđĐðıəƏħ", "oOlLdDdieEh", strict=True)) | {"ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "Œ": "Oe", "þ": "th", "Þ": "Th"}
_LOOKALIKE = dict(zip("АВЕЅІЈКМНОРСТУХаеоріјѕсухԁһɡΑΒΕΖΗΙΚΜΝΟΡΤΥΧαονɑɩ∆∏∑", "ABESIJKMHOPCTYXaeopijscyxdhgABEZHIKMNOPTYXaovaiΔΠΣ", strict=True))
_PUNCTUATION = dict(zip("‘’‚‛′ʼ`´“”„‟″«»−⁃∕⁄․·﹒。", "''''''''\"\"\"\"\"\"\"--//....", strict=True))


@lru_cache(maxsize=8192)
def _fold_character(character: str) -> str:
    """Folds one character to zero or more ASCII ones where it has such a form; other scripts stay as they are."""
    if character in _LATIN or character in _LOOKALIKE or character in _PUNCTUATION:
        return _LATIN.get(character) or _LOOKALIKE.get(character) or _PUNCTUATION[character]
    if character == OPAQUE or "\uac00" <= character <= "\ud7a3":
        return character  # a Korean syllable is one letter
    category = unicodedata.category(character)
    if category == "Nd":
        return str(unicodedata.decimal(character))
    if category == "Pd":
        return "-"
    if category == "Zs":
        return " "
    if category in ("Zl", "Zp") or character == "\x85":
        return "\n"
    if category in ("Cf", "Cc") or character in "\u034f\u115f\u1160\u3164\uffa0" or "\ufe00" <= character <= "\ufe0f":
        return ""
    if "\u0300" <= character <= "\u036f" or "\U000e0100" <= character <= "\U000e01ef":
        return ""
    decomposed = unicodedata.normalize("NFKD", character)
    plain = "".join(c for c in decomposed if not "\u0300" <= c <= "\u036f")
    return "".join(_LATIN.get(c) or _LOOKALIKE.get(c, c) for c in plain) if plain != character else character
