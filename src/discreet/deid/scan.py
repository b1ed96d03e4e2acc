"""One pass that says which words of the table a text has at all, so that of some three hundred rows only the few run that can match (extra: scan).

Three engines, fastest first: `hyperscan` (one automaton of all words), `re2` (one set), and plain Python, which looks for one word after the other. They answer the same question
about literal words, so that what `detect` finds does not depend on which one is installed; a test holds them to it.

Guarantees: the answer is exact, for any text (lone surrogates included); an engine that fails raises, it never answers less. Calls from many threads wait for each other
for the length of one scan, because an automaton has one scratch space.

Does not cover: the expressions themselves, which `re` reads: they look around, and neither automaton can.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import StrEnum
from functools import cache
from importlib.util import find_spec
from typing import final

Search = Callable[[str], frozenset[str]]


@final
class Engine(StrEnum):
    """What looks for the words, in the order of preference."""

    HYPERSCAN = "hyperscan"
    RE2 = "re2"
    PLAIN = "plain"


@cache
def searcher(words: frozenset[str], engine: Engine | None = None) -> Search:
    """Returns the function from a text to those of the words that occur in it.

    Args:
        words: not empty, ASCII, without a question mark (which stands for a lone surrogate in the scanned bytes).
        engine: None for the best that is installed.

    Raises:
        ImportError: when the engine that is asked for is not installed.
    """
    return _BUILDERS[engine or best()](sorted(words))


@cache
def best() -> Engine:
    """Returns the fastest engine that is installed."""
    return next(engine for engine in Engine if engine is Engine.PLAIN or find_spec(engine) is not None)


def _hyperscan(words: list[str]) -> Search:
    import hyperscan

    database = hyperscan.Database(mode=hyperscan.HS_MODE_BLOCK)
    quoted = ["".join(f"\\x{byte:02x}" for byte in word.encode()).encode() for word in words]
    flags = [hyperscan.HS_FLAG_SINGLEMATCH] * len(words)
    database.compile(expressions=quoted, ids=list(range(len(words))), elements=len(words), flags=flags)
    lock = threading.Lock()

    def search(text: str) -> frozenset[str]:
        found: set[str] = set()
        with lock:
            database.scan(text.encode("utf-8", "replace"), match_event_handler=lambda index, *_: found.add(words[index]))
        return frozenset(found)

    return search


def _re2(words: list[str]) -> Search:
    import re2

    options = re2.Options()
    options.literal = True
    options.max_mem = 1 << 28
    union = re2.Set.SearchSet(options)
    for word in words:
        union.Add(word)
    union.Compile()
    return lambda text: frozenset(words[index] for index in union.Match(text.encode("utf-8", "replace")) or ())


def _plain(words: list[str]) -> Search:
    return lambda text: frozenset(word for word in words if word in text)


_BUILDERS: dict[Engine, Callable[[list[str]], Search]] = {Engine.HYPERSCAN: _hyperscan, Engine.RE2: _re2, Engine.PLAIN: _plain}
