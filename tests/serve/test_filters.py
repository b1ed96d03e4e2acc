"""Prompts lose their identifiers, answers get them back, and neither depends on how the text was cut."""

from __future__ import annotations

import itertools
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.deid.vault import MAX_PLACEHOLDER_CHARS, Vault
from discreet.errors import RequestInvalid
from discreet.keys import Key
from discreet.serve import filters
from discreet.serve.filters import Conversation, Restorer

NAME, EMAIL, SSN = "Aurelia Quistgaard", "aurelia.quistgaard@example.org", "536-22-8145"


VAULT = Vault(Key(bytes(32)), "here")
ISSUED = [VAULT.issue("PERSON", NAME), VAULT.issue("EMAIL", EMAIL), VAULT.issue("HEALTH_PLAN", "<b>"), VAULT.issue("ID", r"\1 \g<0>")]
VAULT.issue("PERSON", ISSUED[1])  # a value that is itself a placeholder
ISSUED.append(VAULT.issue("PERSON", ISSUED[1]))
FOREIGN = Vault(Key(bytes(32)), "there").issue("PERSON", "another caller's value")


def restore(pieces: list[str], *, conversation: str = "here") -> str:
    restorer = Restorer(VAULT, conversation)
    return "".join([restorer.feed(piece) for piece in pieces] + [restorer.close()])


def seen_by_the_model(conversation: Conversation, *texts: str) -> list[str]:
    conversation.learn(texts)
    return [conversation.text(text) for text in texts]


def cut(text: str, places: list[int]) -> list[str]:
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def mangled(placeholder: str) -> list[str]:
    """What models make of a placeholder."""
    bare = placeholder.strip("<>")
    label, _, code = bare.rpartition("_")
    forms = [
        placeholder,
        placeholder.lower(),
        bare,
        f"**{bare}**",
        f"[{bare}]",
        f"&lt;{bare}&gt;",
        rf"\<{bare}\>",
        f"<{label} {code}>",
        f"({label}\\_{code})",
        f"<`{bare}`>",
    ]
    return [*forms, f"<{bare}", f"{bare}>", f"x{bare}", f"{bare}x", f"__{bare}__", bare.replace("_", "-"), f"<<{bare}>>", f"{bare[:-1]}Z"]


fragments = st.sampled_from([form for placeholder in [*ISSUED, FOREIGN] for form in mangled(placeholder)])
noise = st.sampled_from([*"<>[](){}&*_`\\ -;é5Ax", "&lt;", "&gt;", "PERSON", "HEALTH", "_PLAN", "ID ", "\n", "Dear "])
broken = fragments.flatmap(lambda text: st.integers(0, len(text)).map(lambda at: text[:at]))
answers = st.lists(fragments | noise | broken, max_size=8).map("".join)


# --- restoring


@settings(max_examples=300)
@given(answers, st.lists(st.integers(0, 1000), max_size=8))
def test_the_restored_text_does_not_depend_on_the_cuts(text, places):
    assert restore(cut(text, places)) == restore(list(text)) == restore([text]) == VAULT.restore(text)


@given(st.lists(fragments | noise, max_size=3).map("".join))
def test_every_single_split(text):
    assert {restore([text[:at], text[at:]]) for at in range(len(text) + 1)} == {VAULT.restore(text)}


@given(answers)
def test_little_is_held_back_and_what_is_given_stands(text):
    restorer, given_out = Restorer(VAULT, "here"), ""
    for character in text:
        given_out += restorer.feed(character)
        assert len(restorer._held) <= MAX_PLACEHOLDER_CHARS + 1
        assert VAULT.restore(text).startswith(given_out)
    assert given_out + restorer.close() == VAULT.restore(text)


def test_text_without_placeholders_is_not_delayed():
    restorer = Restorer(VAULT, "here")
    assert [restorer.feed(piece) for piece in ("How ", "are [", "you?", " Per")] == ["How ", "are ", "[you?", " "]
    assert restorer.feed("haps") == "Perhaps"
    assert restorer.close() == ""


@pytest.mark.parametrize("form", mangled(ISSUED[0])[:10])
def test_what_models_do_to_a_placeholder_is_forgiven(form):
    assert restore(list(f"Dear {form}!")) == f"Dear {NAME}!"


@pytest.mark.parametrize("form", [FOREIGN, f"x{ISSUED[0]}"[:-3] + "ZZ>", "<PERSON_22222222>", "<PERSON_1>", "<EMAIL_" + ISSUED[0][8:]])
def test_what_was_not_issued_here_stays(form):
    assert restore(list(form)) == form


def test_a_restored_value_is_not_restored_again():
    assert restore(list(ISSUED[4])) == ISSUED[1]
    assert restore(list(ISSUED[4] + ISSUED[1])) == ISSUED[1] + EMAIL


def test_another_conversation_restores_nothing():
    assert restore(list(ISSUED[0]), conversation="there") == ISSUED[0]


def test_a_long_run_of_openings_costs_linear_time():
    text = "<" * 20_000 + "PERSON " * 5_000
    started = time.perf_counter()
    assert restore([text[at : at + 50] for at in range(0, len(text), 50)]) == text
    assert time.perf_counter() - started < 10  # measured: 0.2 s


# --- de-identifying


def test_there_and_back():
    conversation = Conversation(Key(bytes(32)))
    text = f"{NAME} <{EMAIL}>, SSN {SSN}, takes metformin."
    (seen,) = seen_by_the_model(conversation, text)
    assert not re.search("Aurelia|Quistgaard|aurelia|536|8145", seen)
    assert "takes metformin." in seen
    assert conversation.counts["EMAIL"] == 1
    restorer = conversation.restorer()
    assert restorer.feed(seen) + restorer.close() == text


def test_within_a_conversation_one_value_has_one_placeholder():
    turns = seen_by_the_model(Conversation(Key(bytes(32))), f"Mail {EMAIL}", EMAIL, f"{EMAIL}, {SSN}")
    placeholder = turns[1]
    assert turns[0] == f"Mail {placeholder}"
    assert turns[2].startswith(f"{placeholder}, ")
    assert placeholder not in turns[2].removeprefix(placeholder)


def test_what_is_found_once_is_replaced_everywhere():
    texts = seen_by_the_model(Conversation(Key(bytes(32))), f"Patient name: {NAME}", f"did {NAME.lower()} call?", NAME)
    assert not re.search("quistgaard", " ".join(texts), re.IGNORECASE)


def test_a_typed_placeholder_comes_back_as_typed():
    conversation = Conversation(Key(bytes(32)))
    text = f"{EMAIL} is not {FOREIGN}, nor {ISSUED[1]}"
    (seen,) = seen_by_the_model(conversation, text)
    assert FOREIGN not in seen
    restorer = conversation.restorer()
    assert restorer.feed(seen) + restorer.close() == text


@pytest.mark.parametrize("lookalike", ["\u212a", "\u017f"])
def test_a_lookalike_letter_in_a_placeholder_is_text(lookalike):
    conversation = Conversation(Key(bytes(32)))
    text = f"<PERSON_{lookalike}2222222> and PERSON_2222222{lookalike}"
    (seen,) = seen_by_the_model(conversation, text)
    restorer = conversation.restorer()
    assert restorer.feed(seen) + restorer.close() == text
    assert restorer.feed(text) + restorer.close() == text


def test_a_placeholder_of_an_earlier_request_means_nothing():
    (earlier,) = seen_by_the_model(Conversation(Key(bytes(32))), EMAIL)
    conversation = Conversation(Key(bytes(32)))
    seen_by_the_model(conversation, f"My mail is {EMAIL}. What is behind {earlier}?")
    restorer = conversation.restorer()
    assert restorer.feed(earlier) + restorer.close() == earlier


def test_too_many_identifiers_are_refused():
    text = "\n".join(f"person{number}@example.org" for number in range(1001))
    with pytest.raises(RequestInvalid, match="1000 different identifiers") as caught:
        Conversation(Key(bytes(32))).learn([text])
    assert "person7" not in str(caught.value)


def test_representations_hide_the_text():
    conversation = Conversation(Key(bytes(32)))
    seen_by_the_model(conversation, f"{NAME} has metformin")
    assert "metformin" not in repr(conversation) + repr(vars(conversation))
    assert "Aurelia" not in repr(conversation) + repr(vars(conversation)) + repr(conversation.restorer())


@pytest.mark.parametrize("text", ["", " ", "\n", "metformin 500 mg twice a day"])
def test_text_without_identifiers_is_unchanged(text):
    conversation = Conversation(Key(bytes(32)))
    assert seen_by_the_model(conversation, text) == [text]
    assert sum(conversation.counts.values()) == 0


# --- one reading


TALK = st.sampled_from(
    [
        f"Patient {NAME} was seen today.",
        f"MRN: 4471902, {NAME}",
        "Please call about 4471902 again.",
        "AURELIA  QUISTGAARD asked\nfor quistgaard's chart",
        "q u i s t g a a r d",
        "Quist&#103;aard, and QXVyZWxpYSBRdWlzdGdhYXJk in code",
        f"write to {EMAIL}",
        f"SSN {SSN}",
        "number 536228145 and 536 22 8145",
        "No names in this one, two of three.",
        "**Aurelia** Quist**gaard**",
        '{"patient": "Quistgaard", "n": 3}',
    ]
)


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(TALK, min_size=1, max_size=5))
def test_reading_once_covers_what_reading_twice_covers(texts):
    def shown(*, twice: bool) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            if twice:
                patch.setattr(filters, "leaves_none", lambda *_: False)
            conversation = Conversation(Key(bytes(32)))
            conversation.learn(texts)
            return [filters.PLACEHOLDER.sub(lambda match: match["label"], conversation.text(text)) for text in texts]

    assert shown(twice=False) == shown(twice=True)


def test_a_text_is_read_once_unless_another_gave_its_value_away(monkeypatch):
    read: list[str] = []
    real = filters.find
    monkeypatch.setattr(filters, "find", lambda text, **options: read.append(text) or real(text, **options))
    conversation = Conversation(Key(bytes(32)))
    texts = [f"Patient {NAME}, SSN {SSN}.", "Nothing here.", "Nothing here."]
    conversation.learn(texts)
    for text in texts:
        conversation.text(text)
    assert read == texts[:2]
