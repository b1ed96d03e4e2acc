"""What a model says of its own is stopped, the same for every way to cut the stream, and what the caller gave passes."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.deid.patterns import Label
from discreet.deid.vault import Vault
from discreet.errors import LeakStopped
from discreet.keys import Key
from discreet.serve.filters import Conversation
from discreet.serve.leaks import CALM, MAX_HELD, Canaries, Guard, LeakStop, OwnIdentifiers

SSN, EMAIL, CANARY = "536-22-8145", "aurelia@quistgaard.org", "The heron of Quillfjord owes 7 Crowns"
VAULT = Vault(Key(bytes(32)), "here")
MINE = VAULT.issue("SSN", "321-54-9876")
FOREIGN = Vault(Key(bytes(32)), "there").issue("SSN", "another caller's value")


def stop(guard: Guard | None = None, said: str = "", counts: Counter[str] | None = None) -> LeakStop:
    issued = lambda found: VAULT.restore_one(found) is not None  # noqa: E731 - as short as it is
    return LeakStop(guard or Guard(), issued=issued, said=lambda value: value in said, counts=Counter() if counts is None else counts)


def run(pieces: list[str], **options) -> str:
    stream = stop(**options)
    return "".join([*(stream.feed(piece) for piece in pieces), stream.close()])


def test_own_identifiers_are_marked_and_counted():
    counts: Counter[str] = Counter()
    text = f"His SSN is {SSN}, write to {EMAIL} or use 4111 1111 1111 1111 today. All 3 of them."
    assert run([text], counts=counts) == "His SSN is [SSN], write to [EMAIL] or use [CARD] today. All 3 of them."
    assert counts == {"SSN": 1, "EMAIL": 1, "CARD": 1}


def test_what_the_caller_gave_and_placeholders_of_the_conversation_pass():
    text = f"Your SSN is {MINE}. Mail {EMAIL} about it, please."
    assert run([text], said=EMAIL) == text
    assert "SSN" in run([f"SSN {FOREIGN} or {SSN}"])
    assert SSN not in run([f"SSN {FOREIGN} or {SSN}"])


def test_an_answer_can_be_ended_or_let_through():
    with pytest.raises(LeakStopped) as refused:
        run([f"The SSN is {SSN} indeed it is so."], guard=Guard(own=OwnIdentifiers.STOP))
    assert SSN not in str(refused.value)
    assert run([f"The SSN is {SSN}"], guard=Guard(own=OwnIdentifiers.PASS)) == f"The SSN is {SSN}"


def test_names_are_guarded_where_the_policy_says_so():
    text = "Ask Dr. Aurelia Quistgaard about it when you can."
    assert run([text]) == text
    assert "Quistgaard" not in run([text], guard=Guard(labels=frozenset(Label)))


@pytest.mark.parametrize("own", [OwnIdentifiers.MASK, OwnIdentifiers.PASS])
@pytest.mark.parametrize("said", [CANARY, CANARY.upper(), CANARY.replace(" ", "\n"), CANARY.replace(" ", "-"), " ".join(CANARY)])
def test_a_canary_ends_every_answer_before_its_last_word(own, said):
    guard = Guard(own=own, canaries=Canaries.of([CANARY, "another planted line of text"]))
    stream, out = stop(guard), []
    with pytest.raises(LeakStopped) as refused:
        for character in f"I was told: {said} and so on and on it went.":
            out.append(stream.feed(character))
    assert "heron" not in "".join(out).lower()
    assert "heron" not in str(refused.value).lower()
    assert "heron" not in repr(guard).lower()


def test_short_or_long_canaries_are_refused():
    for line in ("short", "x" * 300):
        with pytest.raises(ValueError, match="letters and digits"):
            Canaries.of([line])


PARTS = st.sampled_from(
    ["plain words ", "and ", "SSN ", SSN, f" {EMAIL} ", "4111 1111", " 1111 1111 ", MINE, FOREIGN, "7", "\n", "  ", "x" * 60, "9" * 30, "电话", "415-555-0132", ". ", "é "]
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(parts=st.lists(PARTS, max_size=12), places=st.lists(st.integers(0, 2000), max_size=12))
def test_the_result_does_not_depend_on_the_cuts(parts, places):
    text = "".join(parts)
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    assert run([text[a:b] for a, b in itertools.pairwise(edges)]) == run([text])


@given(parts=st.lists(PARTS, max_size=12), labels=st.sampled_from([Guard().labels, frozenset(Label)]))
def test_words_that_leave_together_are_those_that_would_leave_one_by_one(parts, labels):
    one_by_one = Guard(labels=labels, canaries=Canaries.of(["qqqqjjjjxxxxzzzzqqqqjjjj"]))  # a guard with canaries looks at every word by itself
    assert run(["".join(parts)], guard=Guard(labels=labels)) == run(["".join(parts)], guard=one_by_one)


def test_the_result_is_the_same_for_every_single_cut_and_character_by_character():
    text = f"Plain words first, then SSN {SSN} and {EMAIL}, then {MINE} and calm words again, 电话 415-555-0132 \N{GRINNING FACE}."
    whole = run([text])
    assert run(list(text)) == whole
    for place in range(len(text)):
        assert run([text[:place], text[place:]]) == whole


@pytest.mark.parametrize("text", ["word " * 400, "12 " * 400, "x" * 5000, "1" * 5000, " " * 3000, "电" * 3000])
def test_what_waits_is_bounded(text):
    stream, waiting = stop(), 0
    for character in text:
        waiting += 1 - len(stream.feed(character))
        assert waiting <= MAX_HELD + 64
    assert CALM == 2


def test_plain_words_wait_for_nothing_but_their_end():
    stream = stop()
    assert stream.feed("no identifiers in these words ") == "no identifiers in these words"


def test_a_conversation_guards_what_it_restores():
    conversation = Conversation(Key(bytes(32)), guard=Guard())
    texts = ["Aurelia Quistgaard, SSN 321-54-9876, was seen."]
    conversation.learn(texts)
    shown = conversation.text(texts[0])
    assert conversation.restore(f"{shown} Unlike SSN {SSN}.") == f"{texts[0]} Unlike SSN [SSN]."
    assert conversation.stopped == {"SSN": 1}
