"""Prompts lose their identifiers, answers get them back, and neither depends on how the text was cut."""

from __future__ import annotations

import itertools
import re

import pytest
from discreet.deid.vault import Vault
from hypothesis import given
from hypothesis import strategies as st

from discreet.keys import Key
from discreet.serve.filters import Conversation, Restorer
from discreet.serve.wire import Message, TextPart

NAME, EMAIL, SSN = "Aurelia Quistgaard", "aurelia.quistgaard@example.org", "536-22-8145"


class Table:
    """A vault whose placeholders the test chooses, awkward ones included."""

    def __init__(self, values: dict[str, str]) -> None:
        self._values = values

    def values(self, conversation: str) -> dict[str, str]:
        return self._values if conversation == "here" else {}


def restore(values: dict[str, str], pieces: list[str]) -> str:
    restorer = Restorer(Table(values), "here")
    return "".join([restorer.feed(piece) for piece in pieces] + [restorer.close()])


def reference(values: dict[str, str], text: str) -> str:
    """What the restored text is, said without streams: at each place the longest placeholder, left to right, once."""
    out, at = "", 0
    while at < len(text):
        found = max((p for p in values if text.startswith(p, at)), key=len, default=None)
        out, at = (out + values[found], at + len(found)) if found else (out + text[at], at + 1)
    return out


def messages(*texts: str) -> list[Message]:
    return [Message(role="user", content=[TextPart(type="text", text=text)]) for text in texts]


def cuts(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


# --- restoring


awkward = st.dictionaries(st.text("ab[]", min_size=1, max_size=5), st.text("ab[]X", max_size=6), max_size=5)


@given(awkward, st.text("ab[]", max_size=30), st.lists(st.integers(0, 100), max_size=8))
def test_the_restored_text_does_not_depend_on_the_cuts(values, text, places):
    assert restore(values, cuts(text, places)) == restore(values, list(text)) == restore(values, [text]) == reference(values, text)


@given(st.lists(st.sampled_from(["[PERSON_1]", "[PERSON_10]", "[EMAIL_1]", "[PERSON_", "]", " text ", "é"]), max_size=6))
def test_every_single_split(parts):
    values = {"[PERSON_1]": NAME, "[PERSON_10]": "[PERSON_1]", "[EMAIL_1]": EMAIL}
    text = "".join(parts)
    assert {restore(values, [text[:at], text[at:]]) for at in range(len(text) + 1)} == {reference(values, text)}


@given(awkward, st.text("ab[]", max_size=30))
def test_less_than_the_longest_placeholder_is_held_back(values, text):
    restorer, longest, given_out = Restorer(Table(values), "here"), max(map(len, values), default=1), ""
    for character in text:
        given_out += restorer.feed(character)
        assert len(restorer._held) < longest
        assert reference(values, text).startswith(given_out)
    assert given_out + restorer.close() == reference(values, text)


def test_text_without_placeholders_is_not_delayed():
    restorer = Restorer(Table({"[PERSON_1]": NAME}), "here")
    assert [restorer.feed(piece) for piece in ("How ", "are [", "you]", "[PER")] == ["How ", "are ", "[you]", ""]
    assert restorer.close() == "[PER"


def test_a_restored_value_is_not_restored_again():
    assert restore({"[A]": "[B]", "[B]": "secret"}, ["[", "A]"]) == "[B]"
    assert restore({"[A]": "[", "B]": "x"}, list("[A]B]")) == "[x"


def test_values_are_text_not_patterns():
    assert restore({"[A]": r"\1 \g<0>"}, ["[A]"]) == r"\1 \g<0>"


def test_another_conversation_restores_nothing():
    restorer = Restorer(Table({"[A]": NAME}), "there")
    assert restorer.feed("[A]") + restorer.close() == "[A]"


def test_with_the_vault():
    vault = Vault(Key(bytes(32)))
    placeholder = vault.issue("c", "PERSON", NAME)
    vault.issue("d", "PERSON", "someone else")
    restorer = Restorer(vault, "c")
    assert "".join(restorer.feed(character) for character in f"Dear {placeholder}!") + restorer.close() == f"Dear {NAME}!"


# --- de-identifying


def test_there_and_back():
    conversation = Conversation(Key(bytes(32)))
    text = f"{NAME} <{EMAIL}>, SSN {SSN}, takes metformin."
    prompt = conversation.deidentify(messages(text))
    seen = prompt.turns[0].text
    assert not re.search("Aurelia|Quistgaard|aurelia|536|8145", seen)
    assert "takes metformin." in seen
    assert prompt.counts["EMAIL"] == 1
    restorer = conversation.restorer()
    assert restorer.feed(seen) + restorer.close() == text


def test_the_same_history_gives_the_same_placeholders():
    texts = (f"I am {NAME}.", f"Mail {EMAIL}", f"{NAME} again")
    first, again = (Conversation(Key(bytes(32))).deidentify(messages(*texts)) for _ in range(2))
    longer = Conversation(Key(bytes(32))).deidentify(messages(*texts, f"SSN {SSN}"))
    assert first == again
    assert longer.turns[:3] == first.turns


def test_what_is_found_once_is_replaced_everywhere():
    prompt = Conversation(Key(bytes(32))).deidentify(messages(f"Patient name: {NAME}", f"did {NAME.lower()} call?", NAME))
    assert not re.search("quistgaard", " ".join(turn.text for turn in prompt.turns), re.IGNORECASE)


def test_a_typed_placeholder_comes_back_as_typed():
    issued = Conversation(Key(bytes(32))).deidentify(messages(EMAIL)).turns[0].text
    conversation = Conversation(Key(bytes(32)))
    text = f"{EMAIL} is not {issued}"
    seen = conversation.deidentify(messages(text)).turns[0].text
    restorer = conversation.restorer()
    assert restorer.feed(seen) + restorer.close() == text
    assert seen.split()[0] != seen.split()[-1]


def test_representations_hide_the_text():
    conversation = Conversation(Key(bytes(32)))
    prompt = conversation.deidentify(messages(f"{NAME} has metformin"))
    assert "metformin" not in repr(prompt)
    assert "Aurelia" not in repr(conversation) + repr(vars(conversation)) + repr(conversation.restorer())


@pytest.mark.parametrize("text", ["", " ", "\n", "metformin 500 mg twice a day"])
def test_text_without_identifiers_is_unchanged(text):
    prompt = Conversation(Key(bytes(32))).deidentify(messages(text))
    assert prompt.turns[0].text == text
    assert sum(prompt.counts.values()) == 0
