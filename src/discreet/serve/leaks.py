"""What a model may not say of its own: identifiers that nobody in this conversation gave it, and canaries, stopped while the answer streams.

    model's text ── words ──> plain ones pass at once
                         └──> telling ones (a digit, an @, a long token; a capital where names are guarded) wait for their neighbours ── detect ──> marked, or the stream ends

The upstream has seen placeholders in place of the caller's identifiers, so a raw identifier in its answer is one that it made up or remembers. Those of the guarded labels become
marks such as `[SSN]`, or end the answer, as the tenant's policy says. What the caller let through (a kept label, a value below a threshold) stands in the request as the model
saw it, and passes. A canary, in any letter case and spacing, always ends the answer.

Text is cut at places that depend on the text alone: a run of telling words ends at `CALM` plain words in a row or at `MAX_HELD` characters. So the result is the same for every way to
cut the stream, and at most `MAX_HELD` characters and one word wait. What was released shortly before is read again as context, never changed.

Fail closed: an exception here ends the stream.

Does not cover: guarded values in plain letters alone where names are not guarded; identifiers outside the strings of a tool call's JSON; what no detector finds; values that are
false but look real (they are stopped as well).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import final

from discreet.deid.detect import Span, detect
from discreet.deid.patterns import SHAPE, Label
from discreet.deid.vault import PLACEHOLDER
from discreet.errors import LeakStopped
from discreet.record import Sensitive

GUARDED = frozenset(Label) - {
    Label.PERSON, Label.DATE, Label.AGE, Label.URL, Label.ADDRESS, Label.ZIP, Label.LOCATION, Label.ORG, Label.ID, Label.PLACEHOLDER,
}  # fmt: skip
"""Labels stopped unless a policy says otherwise: those of which a model's own are never common knowledge."""

MAX_HELD, CONTEXT, CALM = 512, 120, 2
MAX_CANARY = 256
"""Longest canary in letters and digits."""

MIN_CANARY = 8

_EAST = "\u2e80-\U0010ffff"  # scripts that set no spaces: each character is a word
_WORD = re.compile(rf"\s*(?:[{_EAST}]|[^\s{_EAST}]+(?=[\s{_EAST}]))")
_WORDS = re.compile(rf"(?:\s*+(?:[{_EAST}]|[^\s{_EAST}]++(?=[\s{_EAST}])))*+")
"""As many of them as follow one another."""
_TELLING = re.compile(r"[\d@\uff20]|://|[\w+/=-]{24}")
_CAPITAL = re.compile(r"[A-Z]")
_NAMES = frozenset((Label.PERSON, Label.LOCATION, Label.ORG, Label.ADDRESS))
_SKIPPED = re.compile(r"[\W_]+")


@final
class OwnIdentifiers(StrEnum):
    """What happens to an identifier that the model says of its own."""

    MASK = "mask"
    STOP = "stop"
    PASS = "pass"  # noqa: S105 - a policy, not a password


@final
@dataclass(frozen=True, slots=True)
class Canaries:
    """Texts that must never leave: planted in private data, so that a model which says one gives itself away. Kept as they are compared: letters and digits in lower case."""

    squeezed: Sensitive[frozenset[str]]

    @staticmethod
    def of(texts: Iterable[str]) -> Canaries:
        """Returns the canaries of some lines.

        Raises:
            ValueError: when one has fewer than `MIN_CANARY` or more than `MAX_CANARY` letters and digits.
        """
        lines = [line.strip() for line in texts if line.strip()]
        squeezed = frozenset(squeeze(line) for line in lines)
        if any(not MIN_CANARY <= len(canary) <= MAX_CANARY for canary in squeezed):
            raise ValueError(f"canaries of {MIN_CANARY} to {MAX_CANARY} letters and digits")
        return Canaries(Sensitive(squeezed))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    """What is stopped in the answers of one tenant.

    Args:
        own: what happens to guarded identifiers of the model's own.
        labels: the guarded labels.
        canaries: what always ends an answer.
    """

    own: OwnIdentifiers = OwnIdentifiers.MASK
    labels: frozenset[Label] = GUARDED
    canaries: Canaries = field(default_factory=lambda: Canaries.of(()))

    @property
    def idle(self) -> bool:
        """Whether nothing is looked for."""
        return self.own is OwnIdentifiers.PASS and not self.canaries.squeezed.reveal()


def squeeze(text: str) -> str:
    """Returns the letters and digits of a text in lower case."""
    return _SKIPPED.sub("", text).lower()


@final
class LeakStop:
    """One growing string of an answer; the pieces add up to the same text for every way to cut them."""

    def __init__(self, guard: Guard, *, issued: Callable[[str], bool], said: Callable[[str], bool], counts: Counter[str]) -> None:
        """Starts a string.

        Args:
            guard: what to stop.
            issued: says whether a placeholder is of this conversation.
            said: says whether the request, as the model saw it, holds a value.
            counts: label -> number stopped, added to.
        """
        self._guard, self._issued, self._said, self._counts = guard, issued, said, counts
        self._telling = re.compile(f"{_TELLING.pattern}|{_CAPITAL.pattern}") if guard.labels & _NAMES else _TELLING
        self._canaries = guard.canaries.squeezed.reveal()
        self._all_canaries = "\n".join(self._canaries)
        self._unread = ""
        self._held: list[str] = []
        self._held_chars = self._calm = 0
        self._hot = False
        self._before = ""

    def feed(self, text: str) -> str:
        """Returns what may leave by now.

        Raises:
            LeakStopped: when the answer must end here.
        """
        if self._guard.idle:
            return text
        self._unread += text
        released: list[str] = []
        at = 0
        while True:
            if not self._hot and not self._canaries:
                at = self._past_plain(at, released)
            match = _WORD.match(self._unread, at)
            end = match.end() if match is not None else at + MAX_HELD if len(self._unread) - at > MAX_HELD else 0
            if not end:
                break
            released.append(self._word(self._unread[at : min(end, at + MAX_HELD)]))
            at = min(end, at + MAX_HELD)
        self._unread = self._unread[at:]
        return "".join(released)

    def _past_plain(self, at: int, released: list[str]) -> int:
        """Lets the words in front of the next telling one out together, and returns their end: what `_word` would do to each of them, in one step."""
        telling = self._telling.search(self._unread, at)
        words = _WORDS.match(self._unread, at, len(self._unread) if telling is None else telling.start())
        if words is None or words.end() == at:
            return at
        released.append(self._out(words.group()))
        return words.end()

    def close(self) -> str:
        """Returns the rest, at the end of the string. Raises like `feed`."""
        if self._guard.idle:
            return ""
        last, self._unread = self._unread, ""
        return (self._word(last) if last else "") + self._flush()

    def _word(self, word: str) -> str:
        """Takes one word with the white space before it; returns what may leave."""
        if self._is_telling(word):
            self._hot, self._calm = True, 0
        elif not self._hot:
            return self._out(word)
        else:
            self._calm += 1
        self._held.append(word)
        self._held_chars += len(word)
        return self._flush() if self._calm >= CALM or self._held_chars >= MAX_HELD else ""

    def _is_telling(self, word: str) -> bool:
        bare = word.strip()
        if self._canaries and (letters := squeeze(bare)) and letters in self._all_canaries:
            return True
        return self._telling.search(bare) is not None

    def _flush(self) -> str:
        text = "".join(self._held)
        self._held, self._held_chars, self._calm, self._hot = [], 0, 0, False
        return self._out(self._read(text)) if text else ""

    def _out(self, text: str) -> str:
        self._before = (self._before + text)[-2 * MAX_CANARY :]
        return text

    def _read(self, text: str) -> str:
        if self._canaries:
            squeezed = squeeze(self._before + text)
            if any(canary in squeezed for canary in self._canaries):
                self._counts["canary"] += 1
                raise LeakStopped("an answer without canaries")
        if self._guard.own is OwnIdentifiers.PASS:
            return text
        placeholders = [match.span() for match in PLACEHOLDER.finditer(text) if self._issued(match.group())]
        if not self._telling.search(_without(text, placeholders)):
            return text
        before = self._before[-CONTEXT:]
        found = [span for span in detect(before + text, labels=self._guard.labels) if span.score >= SHAPE]
        own = [span for span in _shifted(found, -len(before)) if not _overlaps(span, placeholders) and not self._said(text[span.start : span.end])]
        self._counts.update(span.label for span in own)
        if own and self._guard.own is OwnIdentifiers.STOP:
            raise LeakStopped("an answer without identifiers of the model's own", value=", ".join(sorted({span.label for span in own})))
        pieces: list[str] = []
        at = 0
        for span in own:
            pieces += (text[at : span.start], f"[{span.label}]")
            at = span.end
        return "".join([*pieces, text[at:]])


def _without(text: str, ranges: Iterable[tuple[int, int]]) -> str:
    pieces: list[str] = []
    at = 0
    for start, end in ranges:
        pieces.append(text[at:start])
        at = end
    return " ".join([*pieces, text[at:]])


def _shifted(spans: Iterable[Span], by: int) -> list[Span]:
    """Moves spans; what stood before the text is gone already, so they begin with the text at the earliest."""
    return [Span(max(0, span.start + by), span.end + by, span.label, span.score) for span in spans if span.end + by > 0]


def _overlaps(span: Span, ranges: Iterable[tuple[int, int]]) -> bool:
    return any(span.start < end and start < span.end for start, end in ranges)
