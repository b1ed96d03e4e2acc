"""Placeholders survive a model, and nobody but their own conversation opens them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.deid.patterns import Label
from discreet.deid.vault import ALPHABET, CODE_CHARS, MAX_PLACEHOLDER_CHARS, PLACEHOLDER, Vault, check_character
from discreet.errors import RequestInvalid, SealBroken
from discreet.keys import Key

KEY = Key(bytes(32))


def vault() -> Vault:
    return Vault(KEY, "conversation-1")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(list(Label)), st.text(max_size=30)), max_size=8))
def test_round_trip(pairs: list[tuple[Label, str]]) -> None:
    kept = vault()
    issued = [kept.issue(label, value) for label, value in pairs]
    assert [kept.restore_one(p) for p in issued] == [value for _, value in pairs]
    assert len(set(issued)) == len(set(pairs))
    assert kept.restore(" and ".join(issued)) == " and ".join(value for _, value in pairs)
    assert all(len(p) <= MAX_PLACEHOLDER_CHARS for p in issued)


def test_one_value_has_one_placeholder_in_a_conversation_and_another_elsewhere() -> None:
    placeholder = vault().issue("PERSON", "Kelly Fuller")
    assert vault().issue("PERSON", "Kelly Fuller") == placeholder
    assert Vault(KEY, "conversation-2").issue("PERSON", "Kelly Fuller") != placeholder
    assert Vault(Key(b"1" * 32), "conversation-1").issue("PERSON", "Kelly Fuller") != placeholder


def test_a_placeholder_of_another_conversation_opens_nothing() -> None:
    mine, other = vault(), Vault(KEY, "conversation-2")
    theirs = other.issue("PERSON", "Ann Lee")
    mine.issue("PERSON", "Ann Lee")
    assert mine.restore_one(theirs) is None
    assert mine.restore(f"to {theirs}") == f"to {theirs}"


@pytest.mark.parametrize(
    "mangle",
    [
        str.lower, str.title, lambda p: p.strip("<>"), lambda p: f"**{p}**", lambda p: f"`{p}`", lambda p: p.replace("_", "\\_"), lambda p: p.replace("<", "&lt;").replace(">", "&gt;"),
        lambda p: p.replace("<", "[").replace(">", "]"), lambda p: p.replace("_", " "), lambda p: p.replace("_", "-"), lambda p: f"<**{p[1:-1]}**>", lambda p: f" {p} ", lambda p: p[:-1],
    ],
)  # fmt: skip
@pytest.mark.parametrize("label", ["PERSON", "HEALTH_PLAN"])
def test_what_models_do_to_a_placeholder_is_forgiven(label: str, mangle: object) -> None:
    kept = vault()
    assert callable(mangle)
    assert kept.restore_one(mangle(kept.issue(label, "the value"))) == "the value"


@pytest.mark.parametrize("around", ["{}'s notes", "({})", "*{}*", "**{}**", "{}.", "{}s" , "to:{}"])  # fmt: skip
def test_restored_inside_prose(around: str) -> None:
    kept = vault()
    assert kept.restore(around.format(kept.issue("PERSON", "Ann Lee"))) == around.format("Ann Lee")


def test_every_single_error_in_the_code_is_noticed() -> None:
    kept = vault()
    placeholder = kept.issue("PERSON", "Ann Lee")
    start = placeholder.index("_") + 1
    for at in range(start, start + CODE_CHARS):
        for character in ALPHABET:
            wrong = placeholder[:at] + character + placeholder[at + 1 :]
            assert kept.restore_one(wrong) == ("Ann Lee" if wrong == placeholder else None)


@given(st.text(ALPHABET, min_size=CODE_CHARS - 1, max_size=CODE_CHARS - 1), st.integers(0, CODE_CHARS - 2))
def test_swapped_neighbours_break_the_check(body: str, at: int) -> None:
    code = body + check_character(body)
    swapped = code[:at] + code[at + 1] + code[at] + code[at + 2 :]
    assert swapped == code or check_character(swapped[:-1]) != swapped[-1]


def test_wrong_label_or_invented_placeholder_opens_nothing() -> None:
    kept = vault()
    placeholder = kept.issue("PERSON", "Ann Lee")
    assert kept.restore_one(placeholder.replace("PERSON", "PHONE")) is None
    assert kept.restore_one("<PERSON_1>") is None
    assert kept.restore_one("print the mapping") is None


def test_what_a_user_types_comes_back_as_typed() -> None:
    kept = vault()
    secret = kept.issue("SSN", "464-79-1772")
    escaped = kept.escape(f"what is {secret}, and {secret.lower()}?")
    assert secret not in escaped
    assert secret.lower() not in escaped
    assert kept.restore(escaped) == f"what is {secret}, and {secret.lower()}?"


def test_a_restored_value_is_not_read_again() -> None:
    kept = vault()
    inner = kept.issue("SSN", "464-79-1772")
    outer = kept.issue("PERSON", f"call me {inner}")
    assert kept.restore(outer) == f"call me {inner}"


def test_values_are_sealed_to_their_place() -> None:
    kept = vault()
    kept.issue("PERSON", "Zyra Quorndike")
    (code, entry), *_ = kept._kept.items()
    assert b"Quorndike" not in entry.sealed
    with pytest.raises(SealBroken):
        KEY.derive("deid/vault", "conversation-1").open(entry.sealed, context=kept._context(Label.SSN, code))


def test_vault_and_errors_print_no_value() -> None:
    kept = vault()
    kept.issue("PERSON", "Zyra Quorndike")
    assert "Quorndike" not in repr(kept)
    with pytest.raises(RequestInvalid) as caught:
        kept.issue("NICKNAME", "Zyra Quorndike")
    assert "Quorndike" not in repr(caught.value) + str(caught.value.to_json())


def test_prose_is_not_taken_for_a_placeholder() -> None:
    assert vault().typed("The ID card and the PERSON named in URL http://a.b, age 45, PHONE 555-0124, ID 12345678") == []
    assert PLACEHOLDER.search("PERSONAL_K7Q2XF3D") is None


def test_another_policy_does_not_open_what_was_kept() -> None:
    one, other = Vault(Key(bytes(32)), "c", policy="prompt"), Vault(Key(bytes(32)), "c", policy="prompt/ward")
    placeholder = one.issue("PERSON", "Ann Lee")
    assert other.issue("PERSON", "Ann Lee") == placeholder
    other._kept.update(one._kept)
    with pytest.raises(SealBroken):
        other.restore(placeholder)


@given(
    st.lists(
        st.sampled_from([" ", "_", "-", "<", ">", "**", "PERSON", "email", "SSN", "\\", "23456789", "ABCDEFGH", "K7Q2XF3D", "words", "x"])
        | st.text(max_size=3),
        max_size=12,
    ),
    st.booleans(),
)
def test_the_short_way_to_typed_placeholders_is_the_long_one(parts, issued):  # fmt: skip
    vault = Vault(Key(bytes(32)), "c")
    text = "".join([*parts, *([vault.issue(Label.PERSON, "Ann")] if issued else []), *parts])
    right = [match.span() for match in PLACEHOLDER.finditer(text) if check_character(match["code"].upper()[:-1]) == match["code"].upper()[-1]]
    assert vault.typed(text) == right
