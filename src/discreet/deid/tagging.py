"""Runs a name model as one more detector: only on the sentences that can hold a name, in batches, and never twice on the same sentence.

    view -> sentences -> gate -> cache -> one batch -> spans

A model costs more than all the rules together, so it reads as little as may be: a sentence without a capital letter beyond ordinary words at its start passes the gate by
(unless the whole text is written without capitals), and a sentence that was read before is answered from the cache.

Guarantees: what comes back depends on the sentences alone, not on what stood in the cache, so that a text is read the same way whatever was read before it (with a model
that itself does not depend on its batch companions). The cache holds keyed digests and offsets, no text; it belongs to one tagger, so that tenants who must not
time each other take a tagger each (PITFALLS 29).

Does not cover: the model (see `ner`), and its thresholds.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Protocol, final

from discreet.deid.patterns import Label
from discreet.errors import RequestInvalid

MAX_SENTENCE = 400
"""Longest piece that a model is given, in characters: a longer sentence is cut at white space."""

LONG_LINE = 60
"""A line shorter than this is read together with short neighbours."""

CACHE_SIZE = 8192
"""Sentences whose answer is kept."""

Tag = tuple[int, int, str, float]
"""Start, end (within the sentence), label of the closed list, score in (0, 1]."""


class Tagger(Protocol):
    """A model that finds names, places, organisations or other labels in sentences."""

    def tag(self, sentences: Sequence[str]) -> list[list[Tag]]:
        """Returns the tags of each sentence, in the order of the sentences; offsets are those of the sentence."""
        ...


@final
@dataclass(slots=True)
class Reader:
    """A tagger with its cache. One reader serves one audience: see the module's docstring.

    Args:
        tagger: the model.
        size: sentences whose answer is kept, at least 0.
    """

    tagger: Tagger
    size: int = CACHE_SIZE
    _cache: OrderedDict[bytes, list[Tag]] = field(default_factory=OrderedDict, repr=False)

    def read(self, text: str, regions: Sequence[tuple[int, int]], ordinary: frozenset[str]) -> Iterator[Tag]:
        """Yields the tags of the sentences that touch a region, as indices of the text.

        Args:
            text: normalised.
            regions: half-open, sorted, disjoint.
            ordinary: words in lower case that name nobody.

        Raises:
            RequestInvalid: when the tagger answers with another number of sentences, an offset outside its sentence, or an unknown label.
        """
        wanted = [(start, text[start:end]) for start, end in sentences(text, regions) if can_hold_a_name(text[start:end], ordinary)]
        answers = self._answers([sentence for _, sentence in wanted])
        for (at, sentence), tags in zip(wanted, answers, strict=True):
            for start, end, label, score in tags:
                if not (0 <= start < end <= len(sentence) and 0 < score <= 1 and label in Label.__members__):
                    raise RequestInvalid(
                        "tags within their sentence, with a label of docs/labels.md and a score in (0, 1]", value=(start, end, label, score)
                    )
                yield at + start, at + end, label, score

    def _answers(self, wanted: Sequence[str]) -> list[list[Tag]]:
        keys = [blake2b(sentence.encode("utf-8", "surrogatepass"), digest_size=16).digest() for sentence in wanted]
        missing = {key: sentence for key, sentence in zip(keys, wanted, strict=True) if key not in self._cache}
        fresh = self.tagger.tag(list(missing.values())) if missing else []
        if len(fresh) != len(missing):
            raise RequestInvalid("one list of tags for each sentence", value=(len(missing), len(fresh)))
        answers = {key: self._cache[key] for key in keys if key in self._cache} | dict(zip(missing, fresh, strict=True))
        for key in answers:
            self._cache[key] = answers[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self.size:
            self._cache.popitem(last=False)
        return [answers[key] for key in keys]


_ABBREVIATED = (r"[A-Z]", r"(?:St|Dr|Mr|Ms|Rd|Jr|Sr|Mt|Ft)", r"(?:Apt|Ste|Ave|Mrs|Rev|Bld|Mme)", r"(?:Blvd|Prof|Bldg|Unit)")
"""What a full stop behind it does not end a sentence: an initial, a title, a part of an address. Grouped by length, as looking back asks."""
_BREAK = re.compile(r"\n+|(?<=[.!?])" + "".join(rf"(?<!\b{short}\.)" for short in _ABBREVIATED) + r"[ \t]+(?=[\"'(]?[A-Z0-9])")
_CAPITAL = re.compile(r"[A-Z][A-Za-z'-]+|[^\W\d_a-zA-Z][^\W\d_]+")


def sentences(text: str, regions: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields the pieces of the text that touch a region, and the neighbours of those.

    A piece is one sentence of a long line, or several short lines, since an address and a letterhead say what they are only together. Where one ends depends on the lines beside it alone; a piece
    longer than `MAX_SENTENCE` is cut at white space.
    """
    bounds = [0, *_ends(text), len(text)]
    wanted: set[int] = set()
    for first, last in regions:
        index = max(0, bisect_right(bounds, first) - 1)
        stop = bisect_left(bounds, last)
        wanted.update(range(max(0, index - 1), min(len(bounds) - 1, stop + 1)))
    for index in sorted(wanted):
        yield from _cut(text, bounds[index], bounds[index + 1])


def _ends(text: str) -> Iterator[int]:
    long = _is_long(text, 0)
    for match in _BREAK.finditer(text):
        if text[match.start()] == "\n":
            following = _is_long(text, match.end())
            if long or following:
                yield match.end()
            long = following
        elif long:
            yield match.end()


def _is_long(text: str, start: int) -> bool:
    stop = text.find("\n", start, start + LONG_LINE)
    return stop < 0 and len(text) - start >= LONG_LINE


def _cut(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    while end - start > MAX_SENTENCE:
        space = text.rfind(" ", start + MAX_SENTENCE // 2, start + MAX_SENTENCE)
        stop = space if space > 0 else start + MAX_SENTENCE
        yield start, stop
        start = stop
    if text[start:end].strip():
        yield start, end


def can_hold_a_name(sentence: str, ordinary: frozenset[str]) -> bool:
    """Says whether a sentence has a capitalised word that is not ordinary, or any capitalised word but its first, or no capital at all."""
    return sentence.islower() or any(match.start() > 0 or match.group().lower() not in ordinary for match in _CAPITAL.finditer(sentence))
