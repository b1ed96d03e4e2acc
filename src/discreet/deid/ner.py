"""People, places, organisations and addresses by a small model of our own: sentences in, labelled ranges out.

    words ──hashed features──> vector of each word type (cached) ──four convolutions──> probability of each tag ──thresholds──> ranges

Why a convolution over hashed features: a word's vector depends on its spelling, shape and the gazetteers alone, so it is computed once for each word type; what is left is a few
matrix products for a whole batch. That is some hundred times faster than a transformer of the same size, needs numpy only, and reads unseen names by their form and place.

Guarantees: the result for one sentence is a function of that sentence and the weights (no state of a document, no randomness); ranges are sorted, disjoint, non-empty and refer to the
sentence as it was given; nothing is imported, downloaded or executed beyond numpy and safetensors; weights are checked for names and shapes. `benchmarks/train_tagger.py`
made the weights; docs/tagger.md is their data sheet.

Does not cover: dates and numbers (patterns do), names in scripts other than Latin, states that only a document shows (the propagation of `detect` does), sentences above
`MAX_TOKENS` tokens beyond that point in one piece (they are read in windows).
"""

from __future__ import annotations

import hashlib
import re
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Any, final

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load

from discreet.deid.languages import KINDS
from discreet.deid.normalise import OPAQUE
from discreet.deid.patterns import STATE_NAMES
from discreet.errors import RequestInvalid

WEIGHTS = "tagger.safetensors"
LABELS = ("PERSON", "LOCATION", "ORG", "ADDRESS")
TAGS = ("O", *(f"{part}-{label}" for label in LABELS for part in "BI"))
THRESHOLD = 0.4
"""Least probability of a name, summed over its tags, at which a token counts."""

BUCKETS, WIDTH, HIDDEN = 1 << 16, 48, 128
REACH = ((1, 2), (2, 1), (4, 1), (8, 1))
"""Of each convolution: step between the words it reads, and how many on each side."""

GAP = 8
"""Zero rows between two sentences: the furthest that one convolution reaches."""

MAX_TOKENS = 400
_BLOCK = 4096
_MAX_CACHED = 200_000

Floats = npt.NDArray[np.float32]

_TOKEN = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+|\n|[^\w\s]|_")


def tokens(sentence: str) -> Iterator[re.Match[str]]:
    """Yields words, runs of digits, marks and line breaks."""
    return _TOKEN.finditer(sentence)


# Features ---------------------------------------------------------------------------------------------------------------------------------------------------


@cache
def _lists() -> tuple[Mapping[str, str], frozenset[str], frozenset[str]]:
    def lines(name: str) -> list[str]:
        text = (resources.files("discreet.deid") / name).read_text(encoding="utf-8")
        return [line for line in text.split("\n") if line and not line.startswith("#")]

    listed = dict(line.lower().split(" ")[:2] for line in lines("names.txt") if " " in line)
    return MappingProxyType(listed), frozenset(lines("words.txt")), frozenset(word.lower() for town in lines("places.txt") for word in town.split())


def spelling(word: str) -> str:
    """Returns the part of a word's form that is about letters: lower case, digits as zeros."""
    return "0" * min(len(word), 8) if word.isdigit() else word.lower()[:24]


def features(word: str) -> dict[str, int]:
    """Returns the hashed features of a word, name -> bucket; `w` is its identity, `g` the lists it stands on."""
    low = spelling(word)
    rim = f"^{low}$"
    names, words, towns = _lists()
    listed = "".join(sorted(set(names.get(low, "").replace("s", "")))) + ("w" if low in words else "") + ("t" if low in towns else "")
    case = (
        "d"
        if word.isdigit()
        else "-"
        if not word[0].isalpha()
        else "l"
        if word.islower()
        else "c"
        if word[1:].islower() or len(word) == 1
        else "u"
        if word.isupper()
        else "m"
    )
    named = {
        "w": low,
        "g": listed,
        "c": case,
        "n": f"{case}{min(len(word), 12)}",
        "cg": f"{case}{listed}",
        **{f"p{k}": low[:k] for k in (1, 2, 3, 4) if len(low) > k},
        **{f"s{k}": low[-k:] for k in (1, 2, 3, 4) if len(low) > k},
        **{f"t{i}": rim[i : i + 3] for i in range(len(rim) - 2)},
    }
    return {name: zlib.crc32(f"{name[0] if name[0] == 't' else name}={value}".encode("utf-8", "replace")) % BUCKETS for name, value in named.items()}


# The network ------------------------------------------------------------------------------------------------------------------------------------------------


@final
class Tagger:
    """The weights and the vectors of the words seen so far. Thread-safe; the cache changes speed only."""

    __slots__ = ("_layers", "_lock", "_out", "_rows", "_table", "_vectors")

    def __init__(self, weights: Mapping[str, npt.NDArray[Any]]) -> None:
        """Takes the tensors of the weights file.

        Raises:
            RequestInvalid: when a tensor is missing or has another shape.
        """
        _check(weights)
        self._table = weights["table"]
        self._layers = [(weights[f"conv{i}"].astype(np.float32), weights[f"bias{i}"].astype(np.float32)) for i in range(len(REACH))]
        self._out = weights["out"].astype(np.float32), weights["out_bias"].astype(np.float32)
        self._rows: dict[str, int] = {}
        self._vectors = np.zeros((1024, WIDTH), np.float32)
        self._lock = threading.Lock()

    def probabilities(self, sentences: Sequence[Sequence[str]]) -> list[Floats]:
        """Returns, for each sentence of words, the probabilities of `TAGS`: one row a word."""
        out: list[Floats] = []
        batch: list[Sequence[str]] = []
        size = 0
        for sentence in sentences:
            batch.append(sentence)
            size += len(sentence) + GAP
            if size >= _BLOCK:
                out += self._batch(batch)
                batch, size = [], 0
        return out + self._batch(batch) if batch else out

    def _batch(self, sentences: Sequence[Sequence[str]]) -> list[Floats]:
        lengths = [len(s) for s in sentences]
        starts = np.cumsum([GAP, *(n + GAP for n in lengths)])[:-1]
        total = int(sum(lengths)) + GAP * (len(sentences) + 1)
        places = np.concatenate([np.arange(a, a + n) for a, n in zip(starts, lengths, strict=True)])
        hidden: Floats = np.zeros((total, WIDTH), np.float32)
        hidden[places] = self._embed([word for sentence in sentences for word in sentence])
        for number, ((step, side), (kernel, bias)) in enumerate(zip(REACH, self._layers, strict=True)):
            hidden = _convolve(hidden, kernel, bias, step=step, side=side, places=places, residual=number > 0)
        return np.split(_softmax(hidden[places] @ self._out[0] + self._out[1]), np.cumsum(lengths)[:-1])

    def _embed(self, words: Sequence[str]) -> Floats:
        with self._lock:
            rows = self._rows
            if len(rows) > _MAX_CACHED:
                rows.clear()
            for word in {word for word in words if word not in rows}:
                self._add(word)
            return self._vectors[[rows[word] for word in words]]

    def _add(self, word: str) -> None:
        row = len(self._rows)
        if row == len(self._vectors):
            self._vectors = np.concatenate([self._vectors, np.zeros_like(self._vectors)])
        self._vectors[row] = self._table[list(features(word).values())].astype(np.float32).sum(axis=0)
        self._rows[word] = row


def _convolve(x: Floats, kernel: Floats, bias: Floats, *, step: int, side: int, places: npt.NDArray[np.int64], residual: bool) -> Floats:
    """One layer over [rows, width]: the words at `places` read their neighbours; the rows between sentences stay zero."""
    near = np.concatenate([x[places + offset * step] for offset in range(-side, side + 1)], axis=1)
    made = np.maximum(near @ kernel + bias, 0.0)
    out = np.zeros((len(x), kernel.shape[1]), np.float32)
    out[places] = made + x[places] if residual else made
    return out


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)


def _shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"table": (BUCKETS, WIDTH), "out": (HIDDEN, len(TAGS)), "out_bias": (len(TAGS),)}
    for i, (_, side) in enumerate(REACH):
        shapes |= {f"conv{i}": ((2 * side + 1) * (HIDDEN if i else WIDTH), HIDDEN), f"bias{i}": (HIDDEN,)}
    return shapes


def _check(weights: Mapping[str, npt.NDArray[Any]]) -> None:
    for name, shape in _shapes().items():
        if name not in weights or weights[name].shape != shape:
            raise RequestInvalid(f"weights with a tensor {name} of shape {shape}", remedy="Install the package again.")


# Sentences in, ranges out -----------------------------------------------------------------------------------------------------------------------------------


def tag(
    sentences: Sequence[str], *, thresholds: Mapping[str, float] = MappingProxyType({}), tagger: Tagger | None = None
) -> list[list[tuple[int, int, str, float]]]:
    """Returns the names of each sentence: (start, end, label, score), as indices of that sentence.

    Args:
        sentences: any texts; short ones are cheaper together.
        thresholds: least probability in (0, 1) for a label of `LABELS`; `THRESHOLD` for the others.
        tagger: another model than the one in the package.
    """
    model = tagger or installed()
    found = [list(tokens(sentence)) for sentence in sentences]
    pieces = [(i, at) for i, words in enumerate(found) for at in range(0, len(words), MAX_TOKENS)]
    rows = model.probabilities([[m.group() for m in found[i][at : at + MAX_TOKENS]] for i, at in pieces])
    least = np.array([thresholds.get(label, THRESHOLD) for label in LABELS], np.float32)
    out: list[list[tuple[int, int, str, float]]] = [[] for _ in sentences]
    for (i, at), probabilities in zip(pieces, rows, strict=True):
        out[i] += _ranges(found[i][at : at + MAX_TOKENS], probabilities, least)
    return out


def _ranges(words: Sequence[re.Match[str]], probabilities: Floats, least: Floats) -> Iterator[tuple[int, int, str, float]]:
    """Joins neighbouring words of one label; a beginning tag that is likelier than its inside tag starts a new range."""
    begins, insides = probabilities[:, 1::2], probabilities[:, 2::2]
    mass = begins + insides
    best = mass.argmax(axis=1)
    sure = mass.sum(axis=1) >= least[best]
    if not sure.any():
        return
    opening = begins[np.arange(len(words)), best] > insides[np.arange(len(words)), best]
    at = 0
    while at < len(words):
        if not sure[at]:
            at += 1
            continue
        stop = at + 1
        while stop < len(words) and sure[stop] and best[stop] == best[at] and not opening[stop]:
            stop += 1
        first, last = at, stop
        while last > first and not words[last - 1].group()[0].isalnum() and words[last - 1].group() != ".":
            last -= 1
        while first < last and not words[first].group()[0].isalnum():
            first += 1
        if first < last:
            yield words[first].start(), words[last - 1].end(), LABELS[best[at]], round(float(mass[at:stop, best[at]].mean()), 4)
        at = stop


LEAST: Mapping[str, float] = MappingProxyType({"PERSON": 0.65, "LOCATION": 0.45, "ORG": 0.55, "ADDRESS": 0.3})
"""Least score at which the model is believed; chosen on development texts so that precision on notes stays (docs/tagger.md). Part of the digest of a policy that reads names so."""

SURE: Mapping[str, float] = MappingProxyType({"PERSON": 0.93, "LOCATION": 0.65, "ORG": 0.7, "ADDRESS": 0.3})
"""The same for a name of ordinary words alone, which must have a capital letter as well."""

AGREED = 0.45
"""The same for a person with a word of the lists of names in it."""

ACRONYM = 0.99
"""The same for an organisation of up to five capitals or a place of up to three: most of them are tests, diseases and departments."""


@final
class Names:
    """The tagger of the package as a detector: what it is sure of, and what the lists agree with. Satisfies `tagging.Tagger`."""

    __slots__ = ()

    def tag(self, sentences: Sequence[str]) -> list[list[tuple[int, int, str, float]]]:
        """Returns the names of each sentence that are believed."""
        return [
            _bridged(sentence, [tag for tag in tags if _believed(sentence[tag[0] : tag[1]], tag[2], tag[3])])
            for sentence, tags in zip(sentences, tag([sentence.replace(OPAQUE, "-") for sentence in sentences]), strict=True)
        ]


_BRIDGE = re.compile(r"[\s,()/-]{0,4}(?:[\w'-]{1,12}\.?[\s,()/-]{1,4}){0,2}")
_CORNER = re.compile(r"(?i:the corner of )$")
_WITHIN_A_PLACE = re.compile(r" (?:d[aeiou]s?|del|de la|di|la|le|les|los|las|of|upon|on|an|am|an der|nad|u) ")


def _bridged(sentence: str, tags: Sequence[tuple[int, int, str, float]]) -> list[tuple[int, int, str, float]]:
    """Returns the tags with an address whole: what the model left out between two parts of one, or in front of a street corner, is a part as well, and so is the particle within a town ("Caxias do Sul")."""
    out: list[tuple[int, int, str, float]] = []
    for start, end, label, score in tags:
        if label == "ADDRESS" and (corner := _CORNER.search(sentence, 0, start)):
            start = corner.start()
        if (
            out
            and "ADDRESS" in (label, out[-1][2])
            and {label, out[-1][2]} <= {"ADDRESS", "LOCATION"}
            and _BRIDGE.fullmatch(sentence, out[-1][1], start)
        ):
            out[-1] = out[-1][0], start, out[-1][2], out[-1][3]
        elif out and label == out[-1][2] == "LOCATION" and _WITHIN_A_PLACE.fullmatch(sentence, out[-1][1], start):
            out[-1] = out[-1][0], start, label, out[-1][3]
        out.append((start, end, label, score))
    return out


def _believed(name: str, label: str, score: float) -> bool:
    listed, ordinary, _ = _lists()
    words = [match.group() for match in tokens(name) if match.group()[0].isalpha()]
    strange = [word for word in words if word.lower() not in ordinary and len(word) > 1]
    if label == "ADDRESS":
        return len(name) > 2 and score >= LEAST[label]
    if not any(len(word) > 1 for word in words):
        return False
    capital = any(word[0].isupper() for word in words)
    if len(words) == 1 and name.isupper() and len(name) <= {"ORG": 5, "LOCATION": 3}.get(label, 0):
        return score >= ACRONYM
    if not capital and not _may_be_small(words, label):
        return False
    if not strange:
        usual = label != "PERSON" or any(word.lower() in listed for word in words)
        return capital and usual and score >= SURE[label] and not (label == "PERSON" and name.isupper())
    if label == "PERSON" and any(word.lower() in listed for word in strange):
        return score >= AGREED
    return score >= (LEAST[label] if capital else SURE[label])


def _may_be_small(words: Sequence[str], label: str) -> bool:
    """Says of a name without capitals whether it may be one: an organisation says what it is ("regional hospital", not "fatty foods"), and a state is no place that is looked for."""
    if label == "ORG":
        return not KINDS.isdisjoint(words)
    return label != "LOCATION" or " ".join(words) not in _STATES


_STATES = frozenset(STATE_NAMES.lower().split("|"))


def rules() -> dict[str, object]:
    """Returns what decides beside the weights when a name is believed, for digests."""
    return {"least": dict(LEAST), "sure": dict(SURE), "agreed": AGREED, "acronym": ACRONYM}


@cache
def installed() -> Tagger:
    """Returns the model of the package."""
    return Tagger(load(_weights()))


def digest() -> str:
    """Returns the SHA-256 of the weights, hex: part of the digest of every policy that uses the model."""
    return hashlib.sha256(_weights()).hexdigest()


def _weights() -> bytes:
    return (resources.files("discreet.deid") / WEIGHTS).read_bytes()
