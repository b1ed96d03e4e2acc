"""Input made to cost as much as it can: an attack on every expression, nests of encodings, characters that are none."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from re import _constants as op  # type: ignore[attr-defined]  # the parser of the standard library has no stubs
from re import _parser as parser  # type: ignore[attr-defined]  # as above
from typing import Any

import pytest
from tests.deid.test_patterns import written

from discreet.deid.decode import EXPRESSIONS
from discreet.deid.detect import _CUES, _TURNED, MAX_CHARS, detect
from discreet.deid.patterns import ISSUERS, PATTERNS
from discreet.errors import RequestInvalid

SHORT, LONG = 16_000, 64_000
"""Characters of an attack: what grows with the square of the text takes sixteen times as long for the second. Both are beyond the longest repeat that the table allows."""

LINEAR, FLOOR, MOST = 9.0, 0.02, 2.0
"""Largest growth that is still called linear; CPU seconds below which nobody can tell; and the most that the long one may take."""

REPEATS = (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT)


def repeated(items: Any, before: str, draw: Random) -> Iterator[tuple[str, str]]:
    """Yields, for each repeat of an expression, what leads there and one turn of it."""
    for code, argument in items:
        if code in REPEATS:
            turn = written(argument[2], draw)
            if turn:
                yield before, turn
            yield from repeated(argument[2], before, draw)
        elif code is op.BRANCH:
            for branch in argument[1]:
                yield from repeated(branch, before, draw)
        elif code is op.SUBPATTERN:
            yield from repeated(argument[3], before, draw)
        elif code in (op.ASSERT, op.ASSERT_NOT):
            yield from repeated(argument[1], before, draw)
        before += written([(code, argument)], draw)


def attacks(expression: re.Pattern[str]) -> set[tuple[str, str]]:
    """Returns pairs of a beginning and what is repeated behind it, so that the expression nearly matches everywhere."""
    draw = Random(5)
    tree = parser.parse(expression.pattern, expression.flags & ~re.UNICODE)
    sample = written(tree, draw)
    return {*repeated(tree, "", draw), ("", sample), ("", sample[:-1] + " "), (sample[:-1], "a"), (sample[:-1], "1")} - {("", "")}


def seconds(expression: re.Pattern[str], text: str) -> float:
    began = time.process_time()
    for _ in expression.finditer(text):
        pass
    return time.process_time() - began


def text_of(begin: str, turn: str, size: int) -> str:
    return begin + turn * (size // len(turn)) + "\x00"


ROWS = [
    *((f"{row.label}: {row.source}", row.compiled()) for row in (*PATTERNS, *ISSUERS)),
    *(("names and encodings", e) for e in (*_CUES, *EXPRESSIONS, _TURNED)),
]


@pytest.mark.slow
@pytest.mark.parametrize("expression", [pytest.param(e, id=f"{number} {name}") for number, (name, e) in enumerate(ROWS)])
def test_no_expression_takes_more_than_linear_time(expression: re.Pattern[str]) -> None:
    for begin, turn in sorted(attacks(expression)):
        if not turn:
            continue
        long = seconds(expression, text_of(begin, turn, LONG))
        if long > FLOOR:
            best = min(seconds(expression, text_of(begin, turn, LONG)) for _ in range(3))
            short = min(seconds(expression, text_of(begin, turn, SHORT)) for _ in range(3))
            assert best < min(max(LINEAR * short, FLOOR), MOST), (begin[:60], turn[:60], short, best)


@pytest.mark.slow
@pytest.mark.parametrize("expression", [pytest.param(e, id=f"{number} {name}") for number, (name, e) in enumerate(ROWS)])
def test_the_whole_engine_is_bounded_under_every_attack(expression: re.Pattern[str]) -> None:
    detect("so that the automaton is there")
    for begin, turn in sorted(attacks(expression))[:12]:
        text = text_of(begin, turn, 20_000) if turn else begin
        began = time.process_time()
        detect(text)
        assert time.process_time() - began < 5, (begin[:60], turn[:60])  # measured 0.01 to 0.5


def nest(size: int) -> bytes:
    """Returns base64 of base64 of ... of text with a number in it, ten deep, of about `size` bytes."""
    inner = b"SSN 464-79-1772 of Kelly Fuller. " * (int(size / (4 / 3) ** 10) // 33)
    for _ in range(10):
        inner = base64.b64encode(inner)
    return inner


def redact(path: Path, *options: str) -> tuple[subprocess.CompletedProcess[bytes], float]:
    before = os.times()
    command = [sys.executable, "-c", "from discreet.cli import main; main()", "redact", str(path), *options]
    done = subprocess.run(command, capture_output=True, check=False, timeout=300)
    return done, os.times().children_user - before.children_user


@pytest.mark.slow
def test_ten_megabytes_of_nested_base64(tmp_path: Path) -> None:
    whole = nest(10_000_000)
    assert len(whole) > 8_000_000
    (tmp_path / "line.txt").write_bytes(whole)
    done, _ = redact(tmp_path / "line.txt")
    assert done.returncode == 2
    assert b"line 1" in done.stderr
    assert b"464-79-1772" not in done.stdout + done.stderr
    (tmp_path / "mail.txt").write_bytes(base64.encodebytes(base64.b64decode(whole)))
    done, spent = redact(tmp_path / "mail.txt", "--jobs", "1")
    assert done.returncode == 0, done.stderr
    assert spent < 120  # a quarter of the time on a quiet core
    with pytest.raises(RequestInvalid, match="at most"):
        detect(whole.decode())
    began = time.process_time()
    detect(whole.decode()[: MAX_CHARS // 4 * 4])
    assert time.process_time() - began < 20


def test_what_is_nested_no_deeper_than_is_said_is_found() -> None:
    text = "SSN: 464-79-1772"
    for _ in range(3):
        text = base64.b64encode(text.encode()).decode()
    assert [(s.start, s.end) for s in detect(f"see {text} there")] == [(4, 4 + len(text))]


@pytest.mark.parametrize("odd", ["\x00", "\ud800", "\udfff\ud800", "\ufffe", "\U0010ffff", "\ufeff", "\u202e", "\x1b[31m", "\ufffc", *"،؛؟।։×÷"])
def test_odd_characters_hide_nothing_beside_them(odd: str) -> None:
    text = f"{odd}mail ann.keller@mail.example.org {odd} SSN: 464-79-1772{odd}"
    found = {text[s.start : s.end].strip(odd) for s in detect(text)}
    assert {"ann.keller@mail.example.org", "464-79-1772"} <= found


def test_an_unknown_label_in_a_policy_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(RequestInvalid, match="SHOESIZE"):
        detect("x", labels=["SHOESIZE"])
    project = '[project]\nname = "p"\ncontroller = "c"\npurpose = "p"\n[[source]]\nname = "s"\npath = "x"\nunit = "u"\nowner = "o"\npurposes = ["p"]\nbasis = "consent"\n'
    (tmp_path / "discreet.toml").write_text(project + '[deid]\npolicy = "label"\n[deid.operators.training.personal]\nSHOESIZE = "label"\n')
    (tmp_path / "a.txt").write_text("Kelly Fuller")
    done, _ = redact(tmp_path / "a.txt", "-C", str(tmp_path))
    assert done.returncode == 2
    assert b"SHOESIZE" in done.stderr
    assert b"Kelly" not in done.stderr
