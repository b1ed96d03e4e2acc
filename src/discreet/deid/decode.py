"""Reads through what hides an identifier: escapes, encodings, broken lines, markup inside a word, letters set apart, "at" and "dot".

    view --edits--> view --edits--> ... (at most `MAX_DEPTH` times)

Each step finds the hidden places of a text and says what is read there; the view keeps where it came from, so that a find inside a base64 string maps back to
that string. A find counts only when it touches an edit (`detect`), so that reading anew changes nothing that was plain.

Guarantees: at most `MAX_DEPTH` steps, and no step decodes more than `MAX_DECODED` characters; what is deeper or larger is not read (a 10 MB nest costs as much as its outer shell). Decoding is
by table and length, nothing is executed or decompressed.

Source: RFC 4648 (base64, base16), RFC 3986 (percent), RFC 8259 (JSON escapes), HTML 5 character references, RFC 7519 (JWT payload).

Does not cover: compression, encryption, rot13 and other ciphers; a word broken in two where both halves are words.
"""

from __future__ import annotations

import base64
import binascii
import html
import re
from collections.abc import Callable, Iterator, Sequence

from discreet.deid.normalise import OPAQUE, Edit, fold
from discreet.deid.scan import Regions

MAX_DEPTH = 4
"""How often a decoded text is decoded again."""

MAX_DECODED = 1_000_000
"""Characters that one step puts in at most."""

_ESCAPE = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z]{2,12});|(?:%[0-9a-fA-F]{2})+|\\u[0-9a-fA-F]{4}|\\x[0-9a-fA-F]{2}|\\[nrt\"/]")
_SIGN, _TELLING = "[A-Za-z0-9+/_-]", "[A-Z0-9+/_-]"
_BASE64_START = "(?:" + "|".join(f"{_SIGN}{{{k}}}{_TELLING}{_SIGN}{{{7 - k}}}" for k in range(1, 8)) + ")"
"""Eight signs, of which one behind the first is no small letter: a word is none."""
_BASE64 = re.compile(rf"(?<![\w+/=.%-]){_BASE64_START}{_SIGN}{{0,400}}={{0,2}}(?![\w+/=-])")
_BASE64_LONG = re.compile(rf"(?<![\w+/=.%-]){_BASE64_START}{_SIGN}{{401,}}={{0,2}}(?![\w+/=-])")
_HEX = re.compile(r"(?<![\w-])(?:0x)?(?:[2-7][0-9a-fA-F]){6,}(?![\w-])")
_APART = re.compile(r"(?<!\S)(?:[^\s\ufffc] {1,3}){4,200}[^\s\ufffc](?!\S)")
_MARKUP = re.compile(r"\*{1,3}|~~|__|(?<=\w)`{1,3}(?=\w)|(?<=\w)</?[a-z]{1,10}>(?=\w)")
_SAID_DOT, _SAID_AT = r"(?: {1,2}dot {1,2}| ?[(\[{] ?dot ?[)\]}] ?)", r"(?: {1,2}at {1,2}| ?[(\[{] ?at ?[)\]}] ?|@)"
_SPELLED = re.compile(
    rf"(?<!\w)(?:[\w+-]{{1,64}}(?:(?:{_SAID_DOT}|\.)[\w+-]{{1,64}}){{0,4}}{_SAID_AT}[\w-]{{1,63}}(?:(?:{_SAID_DOT}|\.)[\w-]{{1,63}}){{0,4}}(?:{_SAID_DOT}|\.)"
    rf"(?:com|org|net|edu|gov|mil|info|io|health|[a-z]{{2}})|\d{{1,3}}(?:{_SAID_DOT}\d{{1,3}}){{3}})(?!\w)",
    re.IGNORECASE,
)
_COUNTRY_CODES = frozenset("uk de fr es nl ch ca au nz ie pt pl se dk fi cz eu br mx jp cn kr ru za ar cl co".split())  # noqa: SIM905 - a table that reads as one
_TAIL = re.compile(r"[A-Za-z0-9.@]*\Z")
_GAP = re.compile(r"[ \t]{0,2}-?[ \t]{0,2}\r?")
_HEAD = re.compile(r"\n(?<=[A-Za-z0-9.@\t\r -]\n)[ \t]{0,8}([A-Za-z0-9.@-]{1,64})")
_DIGIT, _LETTER = re.compile("[0-9]"), re.compile("[A-Za-z]")
_NUMBER = re.compile(r"(?<!\S)[\d.-]*\d(?: [\d.-]+)*\Z")

EXPRESSIONS = (_ESCAPE, _BASE64, _BASE64_LONG, _HEX, _APART, _MARKUP, _SPELLED)
"""What `hidden` wants to know the places of, in the order of its `places`."""

BREAK = "break"
"""Kind of an edit that closes a line break; all others are `CODE`."""
CODE = "code"


def hidden(text: str, is_word: Callable[[str], bool], places: Sequence[Regions], regions: Regions) -> tuple[list[Edit], list[str]]:
    """Returns the edits that uncover what a text hides, sorted and disjoint, and the kind of each.

    Args:
        text: normalised.
        is_word: says of letters in lower case whether they are a word or a name; a line break between two words is none inside a word.
        places: for each of `EXPRESSIONS`, where in the text it can match at all.
        regions: where line breaks count.
    """
    found = sorted([*((e, CODE) for e in _codes(text, places)), *((e, BREAK) for e in _breaks(text, is_word, regions))])
    edits: list[Edit] = []
    kinds: list[str] = []
    room = MAX_DECODED
    for (start, end, put), kind in found:
        if (edits and start < edits[-1][1]) or len(put) > room:
            continue
        room -= len(put)
        edits.append((start, end, put.replace(OPAQUE, " ")))
        kinds.append(kind)
    return edits, kinds


def plain(text: str, places: Callable[[str], Sequence[Regions]]) -> str:
    """Returns a normalised text with everything but line breaks read through, `MAX_DEPTH` times at most, for those who need no places.

    Args:
        text: normalised.
        places: for each of `EXPRESSIONS`, where in a text it can match at all.
    """
    for _ in range(MAX_DEPTH):
        pieces: list[str] = []
        at, room = 0, MAX_DECODED
        for start, end, put in sorted(_codes(text, places(text))):
            if start >= at and len(put) <= room:
                pieces += (text[at:start], put)
                at, room = end, room - len(put)
        if not pieces:
            break
        text = "".join([*pieces, text[at:]])
    return text


def _codes(text: str, places: Sequence[Regions]) -> Iterator[Edit]:
    escapes, short, long, hexes, apart, markup, spelled = (
        [match for part in parts for match in e.finditer(text, *part)] for e, parts in zip(EXPRESSIONS, places, strict=True)
    )
    for match in escapes:
        put = _unescape(match.group())
        if put is not None and put != match.group():
            yield match.start(), match.end(), put
    for matches, decode in (([*short, *long], _from_base64), (hexes, _from_hex)):
        for match in matches:
            put = decode(match.group())
            if put is not None:
                yield match.start(), match.end(), put
    for match in apart:
        if sum(c.isalnum() for c in match.group()) >= 4:
            yield from _closed(text, match.start(), match.end())
    yield from ((match.start(), match.end(), "") for match in markup)
    for match in spelled:
        if "dot" in match.group().lower() or "at" in match.group().lower():
            yield from _said(match)


def _said(match: re.Match[str]) -> Iterator[Edit]:
    """Yields the spelled signs of an address, unless it ends in a two-letter word that is no country ("at the dot on")."""
    ending = re.split(r"[^A-Za-z0-9]", match.group())[-1].lower()
    if len(ending) == 2 and not ending.isdigit() and ending not in _COUNTRY_CODES:
        return
    for sign in re.finditer(rf"{_SAID_AT}|{_SAID_DOT}", match.group(), re.IGNORECASE):
        yield match.start() + sign.start(), match.start() + sign.end(), "." if "dot" in sign.group().lower() else "@"


def _closed(text: str, start: int, end: int) -> Iterator[Edit]:
    """Yields the gaps of letters set apart: one space goes, three are a space."""
    for match in re.finditer(r" {1,3}", text[start:end]):
        yield start + match.start(), start + match.end(), "" if len(match.group()) == 1 else " "


def _breaks(text: str, is_word: Callable[[str], bool], regions: Regions) -> Iterator[Edit]:
    """Yields line breaks inside what seems one word, number or address."""
    for after in (match for part in regions for match in _HEAD.finditer(text, *part)):
        line = text[max(0, after.start() - 110) : after.start()]
        bare = line.rstrip(" \t\r-")
        last = bare[max(bare.rfind(" "), bare.rfind("\n")) + 1 :][-64:]
        tail = last if last.isalnum() and last.isascii() else _TAIL.search(last)[0]  # type: ignore[index]  # it matches at the end at least
        if tail and _GAP.fullmatch(line, len(bare)) and _is_one(tail, after[1], bare[-len(tail) - 40 :], is_word):
            yield after.start() - len(line) + len(bare), after.start(1), ""


def _is_one(tail: str, head: str, before: str, is_word: Callable[[str], bool]) -> bool:
    if "@" in tail or "@" in head or ((tail[-1].isdigit() or tail[-1] == ".") and head[0].isdigit()):
        return True
    if (tail + head).isalpha():
        whole, halves = (tail + head).lower(), (tail.lower(), head.lower())
        return len(whole) >= 4 and not all(map(is_word, halves)) and (is_word(whole) or (len(head) <= 2 and not is_word(halves[1])))
    numeric = _NUMBER.search(before) is not None
    return (tail[-1].isdigit() and head[0] == "-" and any(c.isdigit() for c in head)) or (numeric and head[:1].isdigit()) or _mixed(tail, head)


def _mixed(tail: str, head: str) -> bool:
    """Says whether both halves are digits and letters mixed, or one is and the other is digits: an account number, a key."""
    return bool(_DIGIT.search(tail) and _DIGIT.search(head) and _LETTER.search(tail + head))


def _unescape(code: str) -> str | None:
    if code[0] == "&":
        return fold(html.unescape(code)) or None
    if code[0] == "%":
        return _plain(binascii.unhexlify(code.replace("%", "")))
    if code[1] in "ux":
        number = int(code[2:], 16)
        return None if 0xD800 <= number < 0xE000 else fold(chr(number))
    return {"n": "\n", "r": "\n", "t": "\t", '"': '"', "/": "/"}[code[1]]


def _from_base64(code: str) -> str | None:
    bare = code.rstrip("=").replace("-", "+").replace("_", "/")
    if len(bare) % 4 == 1 or len(bare) > MAX_DECODED:
        return None
    try:
        return _plain(base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True))
    except binascii.Error:
        return None


def _from_hex(code: str) -> str | None:
    bare = code.removeprefix("0x")
    return _plain(binascii.unhexlify(bare)) if len(bare) <= MAX_DECODED else None


def _plain(raw: bytes) -> str | None:
    """Returns bytes as folded text, or None where they are no text."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        return None
    readable = sum(c.isprintable() or c in "\t\n\r" for c in text)
    return fold(text) if text and readable == len(text) else None
