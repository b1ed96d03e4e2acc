"""The engines of the one pass: the same words, and the same spans, whichever is installed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.deid import detect as module
from discreet.deid import scan
from discreet.deid.detect import detect
from discreet.deid.patterns import ISSUERS, PATTERNS
from discreet.deid.scan import Engine, searcher

WORDS = frozenset(word for row in (*PATTERNS, *ISSUERS) for word in row.anchors)
EXAMPLES = [example.replace("«", "").replace("»", "") for row in PATTERNS for example in row.matches]
AUTOMATA = [engine for engine in Engine if engine is not Engine.PLAIN]
texts = st.lists(
    st.one_of(st.sampled_from(EXAMPLES), st.sampled_from(sorted(WORDS)), st.sampled_from(["\ud800", "\x00", "é", "\n"]), st.text(max_size=9)),
    max_size=9,
)


@pytest.mark.parametrize("engine", AUTOMATA)
def test_an_automaton_finds_the_words_that_python_finds(engine: Engine) -> None:
    pytest.importorskip(engine)
    fast, plain = searcher(WORDS, engine), searcher(WORDS, Engine.PLAIN)

    @settings(max_examples=150, deadline=None)
    @given(texts.map("".join))
    def same(text: str) -> None:
        assert fast(text.lower()) == plain(text.lower())

    same()
    assert fast(" ".join(sorted(WORDS))) == WORDS
    assert fast("") == frozenset()


@pytest.mark.parametrize("engine", AUTOMATA)
def test_the_spans_are_those_of_plain_python(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(engine)
    text = "\n".join(EXAMPLES[::3])
    found = {}
    for chosen in (engine, Engine.PLAIN):
        monkeypatch.setattr(module, "_anchored", searcher(WORDS, chosen))
        found[chosen] = detect(text)
    assert found[engine] == found[Engine.PLAIN]
    assert len(found[engine]) > 50


def test_many_threads_may_scan_at_once() -> None:
    search = searcher(WORDS)
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(search, ["password and cookie: " * 50] * 200))) == 1


def test_the_words_are_what_an_engine_can_take() -> None:
    assert all(word and word.isascii() and "?" not in word and word == word.lower() for word in WORDS)


def test_without_a_wheel_plain_python_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "find_spec", lambda name: None)
    scan.best.cache_clear()
    try:
        assert scan.best() is Engine.PLAIN
    finally:
        scan.best.cache_clear()
