"""The engines of the one pass: the same spans, whichever is installed, for texts made from the expressions themselves."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from random import Random
from re import _parser as parser  # type: ignore[attr-defined]

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.deid.test_patterns import written

from discreet.deid import detect as module
from discreet.deid import scan
from discreet.deid.detect import detect
from discreet.deid.patterns import ISSUERS, PATTERNS
from discreet.deid.scan import Engine, Sought, Windows, windows

EXAMPLES = [example.replace("«", "").replace("»", "") for row in PATTERNS for example in (*row.matches, *row.rejects)]
MADE = [written(parser.parse(row.expression), Random(seed)) for seed, row in enumerate((*PATTERNS, *ISSUERS))]
CUES = sorted({word for row in PATTERNS for word in row.context})
AUTOMATA = [engine for engine in Engine if engine is not Engine.PLAIN]
pieces = st.one_of(
    st.sampled_from(EXAMPLES),
    st.sampled_from(MADE),
    st.sampled_from(CUES),
    st.sampled_from(["\ud800", "\x00", "é", "中", "€", "\ufffc", "\n", " - ", "[PERSON]"]),
    st.text(max_size=6),
)
texts = st.tuples(st.lists(pieces, max_size=9), st.sampled_from(["", " ", ": ", "\n"])).map(lambda parts: parts[1].join(parts[0]))


@cache
def engine_of(engine: Engine) -> Windows:
    return windows(module._sought(named=True), engine)


def spans(text: str, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[module.Span]:
    with monkeypatch.context() as patched:
        patched.setattr(module, "_automaton", lambda *, named=False: engine_of(engine))
        return detect(text)


@pytest.mark.parametrize("engine", AUTOMATA)
def test_the_spans_are_those_of_plain_python(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(engine)

    @settings(max_examples=80, deadline=None)
    @given(texts)
    @example("\n".join(EXAMPLES[::2]))
    @example(" ".join(EXAMPLES[1::2]))
    @example("MRN: " + "\n".join(MADE[::3]))
    def same(text: str) -> None:
        assert spans(text, engine, monkeypatch) == spans(text, Engine.PLAIN, monkeypatch)

    same()
    assert len(spans("\n".join(EXAMPLES), engine, monkeypatch)) > 50


EXPRESSIONS = [
    r"(?<![a-z])ab{1,3}c(?!d)", r"a+b", r"(?<=x )[A-Z]{2,4}(?= y{1,3})", r"(a|bc){2,3}\d?", r"(?i:ab)C", r"([ab])-\1", r"[^a-c\s]{2,5}z", r"a{3}", r"(?:ab?){2}+c", r"a.{0,3}?b\b", r"[éa]b",
    r"(?=a)[abc]{2,}d", r"(?:(?<=q)a|b)c", r"(?>ab|a)c", r"(?:(?<=c )|(?<=b,))(a{1,3}b?|c{2}d{0,2})", r"(?:(?<=q)ab*|\Ac)(?=d )", r"(?<!a)(?:(?<=b)c{1,2}|d)(?:a|b?)", r"x(?:a{2,4}|b(?:cd?){1,2})",
]  # fmt: skip


@pytest.mark.parametrize("engine", AUTOMATA)
@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_window_holds_every_match(engine: Engine, expression: str) -> None:
    pytest.importorskip(engine)
    compiled = re.compile(expression)
    find = windows([Sought(compiled)], engine)

    @settings(max_examples=60, deadline=None)
    @given(st.text("abcdxyzqAC -1é\n", max_size=40), st.integers(0, 10), st.integers(0, 40))
    def held(text: str, first: int, length: int) -> None:
        regions = [(min(first, len(text)), min(first + length, len(text)))]
        found = [m.span() for part in find(text, regions).get(0, ()) for m in compiled.finditer(text, *part)]
        assert found == [m.span() for m in compiled.finditer(text, *regions[0])]

    held()


def test_a_cue_opens_the_window_behind_it() -> None:
    find = windows([Sought(re.compile(r"\d{4}"), re.compile("code"))])
    assert find("1234 " + "x" * 300 + " 1234", [(0, 310)]) == {}
    (start, stop), *more = find("x" * 300 + " code 1234 " + "x" * 300, [(0, 611)])[0]
    assert not more
    assert start <= 306 < 310 <= stop < 500


def test_what_has_no_weaker_form_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        windows([Sought(re.compile("a*"))], Engine.HYPERSCAN)


def test_many_threads_may_scan_at_once() -> None:
    text = "write to ann@mail.example.org: " * 20
    with ThreadPoolExecutor(8) as pool:
        assert len({tuple(found) for found in pool.map(detect, [text] * 60)}) == 1


def test_the_stored_automaton_is_taken_only_from_this_users_hands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hyperscan")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(scan, "WORTH_KEEPING", 1)
    sought = [Sought(re.compile("stored[0-9]"))]
    windows(sought, Engine.HYPERSCAN)
    (kept,) = (tmp_path / "discreet").iterdir()
    assert scan._trusted(kept) is not None
    kept.chmod(0o666)
    assert scan._trusted(kept) is None
    kept.chmod(0o600)
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    assert scan._trusted(kept) is None
    assert windows(sought, Engine.HYPERSCAN)("a stored7 b", [(0, 11)])[0]
    assert scan._trusted(kept) is not None, "built anew"
    for number in range(5):
        windows([Sought(re.compile(f"stored{number}"))], Engine.HYPERSCAN)
    assert len(list((tmp_path / "discreet").iterdir())) == scan.KEPT


def test_every_process_asks_for_the_same_automaton() -> None:
    code = """
import hashlib
from discreet.deid import detect
sought = detect._sought(named=True)
print(hashlib.sha256(repr([(s.expression.pattern, s.cue and s.cue.pattern) for s in sought]).encode()).hexdigest())
"""
    seeds = ({**os.environ, "PYTHONHASHSEED": seed} for seed in "12")
    said = {subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout for env in seeds}
    assert len(said) == 1, "an automaton whose expressions have another order is built again, in seconds, by every process"


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hyperscan")
    monkeypatch.setattr(scan, "WORTH_KEEPING", 1)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert windows([Sought(re.compile("kept[0-9]"))], Engine.HYPERSCAN)("kept1", [(0, 5)])


def test_without_a_wheel_plain_python_searches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "find_spec", lambda name: None)
    scan.best.cache_clear()
    try:
        assert scan.best() is Engine.PLAIN
    finally:
        scan.best.cache_clear()
