"""One pass that says where in a text each of some three hundred expressions can match at all, so that `re` reads only there (extra: scan).

    expressions --weakened--> one automaton (cached on disk) --text--> places --widened by the longest match--> windows of each expression

An expression is weakened into one that an automaton can run: look-around and back references go, possessive and lazy repeats become plain ones, and what may repeat at
either end repeats as seldom as it may. Each match of the expression then holds a place that the automaton reports, and lies within the window around it. `re` reads the windows with the
expression itself, so the spans are those of `re` alone on the whole text.

Three engines, fastest first: `hyperscan` (one automaton that reports places), `re2` (one set that says which expressions can match), and plain Python, which leaves every window open. A test holds them
to the same spans.

Guarantees: a window is never too small, for any text; an engine that fails raises, it never answers less. Calls from many threads wait for each other for the length of one scan, because
an automaton has one scratch space. The cache belongs to the user, is not writable by others (a stored automaton is trusted like code), and is built anew where it is missing, foreign or damaged.

Source: Hyperscan (Wang et al., NSDI 2019), pattern decomposition; Cox, "Regular Expression Matching in the Wild" (RE2 sets).
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import stat
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from re import _constants as sre  # type: ignore[attr-defined]  # the parser of `re` has no public name since 3.11
from re import _parser as parser  # type: ignore[attr-defined]  # nor has this
from typing import Any, Final, final

Regions = Sequence[tuple[int, int]]
"""Parts of a text, half-open, sorted and disjoint."""

Windows = Callable[[str, Regions], Mapping[int, Regions]]
"""From a text and its regions to the windows within them, by the number of the expression; an expression that cannot match is not in it."""

FARTHEST: Final = 4000
"""Longest match, in characters, for which a window is drawn; an expression that can match more reads the whole region."""


@final
class Engine(StrEnum):
    """What runs the weakened expressions, in the order of preference."""

    HYPERSCAN = "hyperscan"
    RE2 = "re2"
    PLAIN = "plain"


@cache
def best() -> Engine:
    """Returns the fastest engine that is installed."""
    return next(engine for engine in Engine if engine is Engine.PLAIN or find_spec(engine) is not None)


@final
@dataclass(frozen=True, slots=True)
class Sought:
    """An expression, or one that matters only close behind a cue: no more than `CUE_REACH` characters after the cue begins."""

    expression: re.Pattern[str]
    cue: re.Pattern[str] | None = None


CUE_REACH: Final = 90


def windows(sought: Sequence[Sought], engine: Engine | None = None) -> Windows:
    """Returns the function from a text and its regions to the windows in which each expression can match.

    Args:
        sought: what is looked for; not empty.
        engine: None for the best that is installed.

    Raises:
        ImportError: when the engine that is asked for is not installed.
        ValueError: when an expression has a construct of which no weaker form is known.
    """
    return _BUILDERS[engine or best()](sought)


# Weakening --------------------------------------------------------------------------------------------------------------------------------------------------

_OPAQUE, _LETTER, _OTHER = 0xFF, 0xFD, 0xFE
_MOST = 6
"""A repeat above it is taken for one without an end: a small automaton matters more than an exact count."""


def _encode_rest(error: UnicodeError) -> tuple[bytes, int]:
    """Gives every character beyond ASCII one byte: the opaque one, a letter or digit, or another."""
    assert isinstance(error, UnicodeEncodeError)
    part = error.object[error.start : error.end]
    return bytes(_OPAQUE if c == "\ufffc" else _LETTER if c.isalnum() else 0x20 if c.isspace() else _OTHER for c in part), error.end


codecs.register_error("discreet.classes", _encode_rest)


def _bytes(text: str) -> bytes:
    """Returns one byte for each character."""
    return text.encode("ascii", "discreet.classes")


_STANDS = {**{byte: chr(byte) for byte in range(128)}, _LETTER: "中", _OTHER: "€", _OPAQUE: "\ufffc"}


@final
class Weak:
    """The weakened form of an expression: `source` for bytes of `_bytes`, and how far a match reaches with all that it looks ahead."""

    __slots__ = ("reach", "source")

    def __init__(self, expression: re.Pattern[str]) -> None:
        tree = parser.parse(expression.pattern, expression.flags & ~re.UNICODE)
        _, widest = tree.getwidth()
        self.reach = int(widest) + _ahead(tree) + 2
        caseless = bool(expression.flags & re.IGNORECASE)
        before = _before(tree, caseless)
        items = _end(_followed(list(tree)))
        begun = _begin(items)
        whole = begun == [item for item in items if item[0] not in _NOTHING]
        self.source = before + _sequence(items if whole else begun, caseless, tree.state, first=whole and not before)
        if not self.source:
            raise ValueError(f"Expected an expression that needs at least one character, got {expression.pattern!r}.")


def _ahead(tree: Iterable[Any]) -> int:
    """Returns how many characters beyond a match its assertions look at, at most."""
    far = 0
    for operator, argument in tree:
        if operator in (sre.ASSERT, sre.ASSERT_NOT):
            direction, inner = argument
            far += (int(inner.getwidth()[1]) if direction > 0 else 0) + _ahead(inner)
        elif operator is sre.BRANCH:
            far += max(_ahead(branch) for branch in argument[1])
        elif operator is sre.SUBPATTERN:
            far += _ahead(argument[3])
        elif operator in _REPEATS:
            far += _ahead(argument[2]) * min(int(argument[1]), 50)
        elif operator is sre.ATOMIC_GROUP:
            far += _ahead(argument)
    return far


_REPEATS = (sre.MAX_REPEAT, sre.MIN_REPEAT, sre.POSSESSIVE_REPEAT)
_NOTHING = (sre.AT, sre.ASSERT, sre.ASSERT_NOT)


def _before(tree: Any, caseless: bool) -> str:
    """Returns what may stand before a match, where it begins with "not behind one of these characters"."""
    operator, argument = tree[0]
    first = next((item for item in tree if item[0] not in _NOTHING), None)
    if first is None or (first[0] in _REPEATS and first[1][0] != first[1][1]) or first[0] is sre.SUBPATTERN:
        return ""  # its beginning is weakened, see `_ends`
    if operator is not sre.ASSERT_NOT or argument[0] > 0 or len(argument[1]) != 1 or argument[1][0][0] not in (sre.LITERAL, sre.IN):
        return ""
    kind, value = argument[1][0]
    kept = [byte for byte, character in _STANDS.items() if not _matches(kind, value, character, caseless) or (kind is sre.IN and byte > 127)]
    return f"(?:^|{_bytes_class(kept)})"


def _followed(items: list[Any]) -> list[Any]:
    """Returns the sequence with a last "followed by" as a part of it."""
    while items and items[-1][0] in _NOTHING:
        operator, argument = items.pop()
        if operator is sre.ASSERT and argument[0] > 0:
            return [*items, *_followed(list(argument[1]))]
    return items


def _begin(items: list[Any]) -> list[Any]:
    """Returns the sequence with what repeats at its beginning repeated as seldom as it may; a match of the whole still holds a match of it."""
    items = [item for item in items if item[0] not in _NOTHING]
    while items and items[0][0] in _REPEATS and items[0][1][0] == 0:
        items.pop(0)
    if items and items[0][0] in _REPEATS:
        low, _, inner = items[0][1]
        items[0] = (sre.MAX_REPEAT, (low, low, inner))
    elif len(items) == 1 and items[0][0] is sre.SUBPATTERN:
        group, add, remove, inner = items[0][1]
        items[0] = (sre.SUBPATTERN, (group, add, remove, _begin(list(inner))))
    return items


def _end(items: list[Any]) -> list[Any]:
    """Returns the sequence with what repeats at its end, within its last group or branches too, repeated as seldom as it may: each match is reported where it ends, so one end is enough."""
    items = _followed(items)
    while items:
        operator, argument = items[-1]
        if operator in _REPEATS:
            low, _, inner = argument
            last = [(sre.MAX_REPEAT, (low, low, inner))] if low > 1 else _end(list(inner)) if low else []
        elif operator is sre.SUBPATTERN:
            group, add, remove, inner = argument
            inner = _end(list(inner))
            last = [(operator, (group, add, remove, inner))] if inner else []
        elif operator is sre.BRANCH:
            branches = [_end(list(branch)) for branch in argument[1]]
            last = [(operator, (argument[0], branches))] if all(branches) else []
        else:
            return items
        items = [*items[:-1], *last]
        if last:
            return items
    return items


def _emit(item: Any, caseless: bool, state: Any, *, first: bool = False) -> str:
    """Returns one item; where it stands first, with what must stand before it."""
    operator, argument = item
    if operator is sre.ASSERT and argument[0] < 0 and first:
        return _sequence(argument[1], caseless, state)
    if operator in _NOTHING:
        return ""
    if operator in (sre.LITERAL, sre.NOT_LITERAL, sre.ANY, sre.IN):
        return _class(operator, tuple(argument) if operator is sre.IN else argument, caseless)
    if operator is sre.BRANCH:
        return f"(?:{'|'.join(_sequence(branch, caseless, state, first=first) for branch in argument[1])})"
    if operator is sre.SUBPATTERN:
        _, add, remove, inner = argument
        caseless = (caseless or bool(add & re.IGNORECASE)) and not remove & re.IGNORECASE
        return f"(?:{_sequence(inner, caseless, state, first=first)})"
    if operator is sre.ATOMIC_GROUP:
        return f"(?:{_sequence(argument, caseless, state)})"
    if operator in _REPEATS:
        low, high, inner = argument
        if high == 0:
            return ""
        count = f"{{{min(low, 40)},{'' if high > max(low, _MOST) or low > 40 else high}}}"
        return f"(?:{_sequence(inner, caseless, state)}){count}"
    if operator is sre.GROUPREF:
        low, high = state.groupwidths[argument]
        return rf"[\x00-\xff]{{{low},{min(high, 1000)}}}"
    raise ValueError(f"Expected an expression of which a weaker form is known, got {operator}.")


def _sequence(items: Iterable[Any], caseless: bool, state: Any, *, first: bool = False) -> str:
    pieces = []
    for item in items:
        pieces.append(_emit(item, caseless, state, first=first))
        first = first and not pieces[-1] and item[0] in _NOTHING
    return "".join(pieces)


@cache
def _class(operator: Any, argument: Any, caseless: bool) -> str:
    """Returns the bytes whose characters match, as a class."""
    return _bytes_class([byte for byte, character in _STANDS.items() if _matches(operator, argument, character, caseless)])


def _bytes_class(kept: Sequence[int]) -> str:
    if not kept:
        raise ValueError("Expected a class that some character of the view matches.")
    parts, at = "", 0
    while at < len(kept):
        stop = at
        while stop + 1 < len(kept) and kept[stop + 1] == kept[stop] + 1:
            stop += 1
        parts += f"\\x{kept[at]:02x}" + (f"-\\x{kept[stop]:02x}" if stop > at else "")
        at = stop + 1
    return f"[{parts}]"


def _matches(operator: Any, argument: Any, character: str, caseless: bool) -> bool:
    if operator is sre.ANY:
        return character != "\n"
    if operator is sre.IN:
        negated = argument[0][0] is sre.NEGATE
        forms = {character, character.lower(), character.upper()} if caseless else {character}
        return any(_in(part, form) for part in argument if part[0] is not sre.NEGATE for form in forms) is not negated
    same = character.lower() == chr(argument).lower() if caseless else ord(character) == argument
    same = same or (operator is sre.LITERAL and argument > 127 and chr(argument) != "\ufffc" and ord(character) > 127)
    return same is (operator is sre.LITERAL)


_CATEGORIES: dict[Any, Callable[[str], bool]] = {
    sre.CATEGORY_DIGIT: str.isdecimal,
    sre.CATEGORY_SPACE: str.isspace,
    sre.CATEGORY_WORD: lambda c: c.isalnum() or c == "_",
    sre.CATEGORY_NOT_DIGIT: lambda c: not c.isdecimal(),
    sre.CATEGORY_NOT_SPACE: lambda c: not c.isspace(),
    sre.CATEGORY_NOT_WORD: lambda c: not (c.isalnum() or c == "_"),
}


def _in(part: Any, character: str) -> bool:
    """Says whether one part of a class has the character. A part beyond ASCII may have any other character beyond ASCII."""
    kind, value = part
    if kind is sre.CATEGORY:
        return _CATEGORIES[value](character)
    low, high = value if kind is sre.RANGE else (value, value)
    return low <= ord(character) <= high or (high > 127 and (low, high) != (0xFFFC, 0xFFFC) and ord(character) > 127)


# Engines ----------------------------------------------------------------------------------------------------------------------------------------------------


def _hyperscan(sought: Sequence[Sought]) -> Windows:
    import hyperscan

    weak = [Weak(s.cue or s.expression) for s in sought]
    reaches = [(0, CUE_REACH + Weak(s.expression).reach) if s.cue else (w.reach, w.reach) for w, s in zip(weak, sought, strict=True)]
    flags = [hyperscan.HS_FLAG_SINGLEMATCH if ahead > FARTHEST else 0 for _, ahead in reaches]  # one place opens the whole region
    database = _database([w.source for w in weak], flags)
    lock = threading.Lock()

    def find(text: str, regions: Regions) -> dict[int, Regions]:
        encoded = _bytes(text)
        found: defaultdict[int, list[tuple[int, int]]] = defaultdict(list)
        for first, last in regions:
            begin = max(0, first - 2 * CUE_REACH)  # a cue may stand before the region
            ends: defaultdict[int, list[int]] = defaultdict(list)
            with lock:
                database.scan(
                    encoded[begin:last], match_event_handler=lambda index, _start, end, _flags, _context, ends=ends: ends[index].append(end)
                )
            for index, places in ends.items():
                _widen(places, begin, first, last, reaches[index], found[index])
        return {index: mine for index, mine in sorted(found.items()) if mine}

    return find


def _widen(places: Sequence[int], begin: int, first: int, last: int, reach: tuple[int, int], mine: list[tuple[int, int]]) -> None:
    """Adds the windows around sorted places (so far behind, so far ahead), merged where they touch, within the region. A cue ends before its value begins: nothing behind it is read."""
    behind, ahead = begin - reach[0], begin + reach[1]
    if reach[1] > FARTHEST:
        mine.append((first, last))
        return
    start, stop = places[0] + behind, places[0] + ahead
    if places[-1] - places[0] > reach[0] + reach[1]:
        for place in places:
            if place + behind > stop:
                if start < last and stop > first:
                    mine.append((start if start > first else first, stop if stop < last else last))
                start = place + behind
            stop = place + ahead
    stop = places[-1] + ahead
    if start < last and stop > first:
        mine.append((start if start > first else first, stop if stop < last else last))


def _re2(sought: Sequence[Sought]) -> Windows:
    import re2

    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.max_mem = 1 << 28
    options.log_errors = False
    union = re2.Set.SearchSet(options)
    for one in sought:
        union.Add(Weak(one.cue or one.expression).source.encode())
    union.Compile()

    def find(text: str, regions: Regions) -> dict[int, Regions]:
        encoded = _bytes(text)
        possible = {index for first, last in regions for index in union.Match(encoded[max(0, first - 2 * CUE_REACH) : last]) or ()}
        return dict.fromkeys(sorted(possible), regions)

    return find


def _plain(sought: Sequence[Sought]) -> Windows:
    return lambda _text, regions: dict.fromkeys(range(len(sought)), regions)


_BUILDERS: dict[Engine, Callable[[Sequence[Sought]], Windows]] = {Engine.HYPERSCAN: _hyperscan, Engine.RE2: _re2, Engine.PLAIN: _plain}


# The stored automaton ---------------------------------------------------------------------------------------------------------------------------------------


WORTH_KEEPING = 50
"""Expressions from which on an automaton takes so long to build that it is stored."""

KEPT = 3
"""Automata that the cache holds at most: those of the versions used last."""


def _database(sources: Sequence[str], flags: Sequence[int]) -> Any:
    """Returns the automaton of the sources, from the cache where it is there."""
    import hyperscan

    digest = hashlib.sha256("\0".join([version("hyperscan"), *sources, *map(str, flags)]).encode()).hexdigest()
    path = _folder() / f"scan-{digest[:32]}.hs"
    stored = _trusted(path)
    if stored is not None:
        try:
            return _with_scratch(hyperscan.loadb(stored, hyperscan.HS_MODE_BLOCK))
        except hyperscan.HyperscanError:
            pass  # made by another processor or version: built anew below
    database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
    database.compile(expressions=[source.encode() for source in sources], ids=list(range(len(sources))), elements=len(sources), flags=flags)
    if len(sources) >= WORTH_KEEPING:
        _keep(path, hyperscan.dumpb(database))
    return database


def _with_scratch(database: Any) -> Any:
    import hyperscan

    database.scratch = hyperscan.Scratch(database)
    return database


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "discreet"


def _trusted(path: Path) -> bytes | None:
    """Returns the bytes of a cache file that nobody but this user can have written; each begins with its own digest."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o022 or status.st_uid != os.geteuid():
                return None
            content = file.read()
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def _keep(path: Path, content: bytes) -> None:
    """Stores the automaton for the next process; where that is not possible, the next one builds its own."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(content).digest() + content)
        Path(name).replace(path)
        for old in sorted(path.parent.glob("scan-*.hs"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink()
    except OSError:
        return
