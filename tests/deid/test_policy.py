"""Policies, idempotence, the prompt round trip, and the one function that builds a Deidentified."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from discreet.config import DeidSection
from discreet.deid.operators import Operator, date_offset
from discreet.deid.patterns import PATTERNS, Label
from discreet.deid.policy import (
    BUILTIN,
    Channel,
    Names,
    Policy,
    builtin,
    check,
    configured,
    deidentify,
    deidentify_all,
    find,
    protect,
    redact,
    restore,
)
from discreet.deid.vault import Vault
from discreet.errors import ConfigInvalid, DiscreetError, RequestInvalid
from discreet.keys import Key
from discreet.record import Admitted, Basis, Digest, Purpose, Record, Sensitive, Sensitivity, SubjectId

KEY = Key(bytes(32))
NOTE = "Dear Dr. Reed, I saw Kelly Fuller (born 1977-10-09, MRN E39389873) on 2022-10-24. She takes Warfarin 5 mg. Call Kelly at (322) 555-0124."
KNOWN = {"PERSON": ("Kelly Fuller",), "MRN": ("E39389873",), "DATE": ("1977-10-09",), "PHONE": ("322-555-0124",)}
EXAMPLES = [example.replace("«", "").replace("»", "") for row in PATTERNS for example in row.matches]
texts = st.lists(st.one_of(st.sampled_from(EXAMPLES), st.text(max_size=10)), max_size=8).map("".join)


def admitted(text: str = NOTE, *, subject: str = "SAAA", known: dict[str, tuple[str, ...]] | None = None) -> Admitted:
    record = Record(
        digest=Digest("sha256:" + "0" * 64),
        source="notes",
        subject=SubjectId(subject),
        sensitivity=Sensitivity.SPECIAL,
        text=Sensitive(text),
        known=Sensitive(KNOWN if known is None else known),
    )
    return Admitted(record=record, purpose=Purpose("note-assistant"), basis=Basis.CONSENT)


@settings(max_examples=100, deadline=None)
@given(texts, st.sampled_from(["label", "redact", "log"]))
def test_redacting_twice_is_redacting_once(text: str, policy: str) -> None:
    once = redact(text, policy)
    twice = redact(once.text, policy)
    assert twice.text == once.text
    assert twice.spans == ()


@settings(max_examples=60, deadline=None)
@given(texts)
def test_redacting_twice_with_known_values_is_redacting_once(text: str) -> None:
    once = redact(text + NOTE, "label", known=KNOWN).text
    assert redact(once, "label", known=KNOWN).text == once


def test_label_redact_and_log() -> None:
    assert redact(NOTE, "label").text == (
        "Dear Dr. [PERSON], I saw [PERSON] (born [DATE], MRN [MRN]) on [DATE]. She takes Warfarin 5 mg. Call [PERSON] at [PHONE]."
    )
    marked = redact(NOTE, "label").text
    for label in Label:
        marked = marked.replace(f"[{label}]", "[REDACTED]")
    assert redact(NOTE, "redact").text == redact(NOTE, "log").text == marked


def test_spans_are_places_in_the_input() -> None:
    spans = redact(NOTE).spans
    assert [NOTE[s.start : s.end] for s in spans if s.label == "MRN"] == ["E39389873"]


def test_surrogates_leave_the_rest_and_no_original() -> None:
    out = redact(NOTE, "surrogate", known=KNOWN, key=KEY).text
    assert "She takes Warfarin 5 mg. Call " in out
    for original in ("Reed", "Kelly", "Fuller", "E39389873", "1977-10-09", "2022-10-24", "555-0124"):
        assert original not in out


def test_one_subject_one_set_of_stand_ins_across_documents() -> None:
    one = deidentify(admitted(), BUILTIN["surrogate"], KEY).text.reveal()
    other = deidentify(admitted("FULLER, KELLY was well."), BUILTIN["surrogate"], KEY).text.reveal()
    first, last = one.split("I saw ")[1].split(" (")[0].split()
    assert other == f"{last.upper()}, {first.upper()} was well."
    assert f"Call {first} at" in one


def test_who_is_named_in_one_document_of_a_subject_is_found_in_the_others() -> None:
    rules = replace(BUILTIN["label"], names=Names.RULES)
    texts = ["Signed by Dr. Zyra Quorndike.", "then quorndike came and zquorndike left; Young spoke.", "Seen by Dr. Young."]
    alone = deidentify(admitted(texts[1], known={}), rules, KEY).text.reveal()
    assert "quorndike came" in alone
    made = deidentify_all([admitted(text, known={}) for text in texts], rules, KEY)
    assert [each.text.reveal() for each in made] == [
        "Signed by Dr. [PERSON].",
        "then [PERSON] came and [PERSON] left; Young spoke.",
        "Seen by Dr. [PERSON].",
    ]
    again = deidentify_all([admitted(text, known={}) for text in reversed(texts)], rules, KEY)
    assert [each.text.reveal() for each in reversed(again)] == [each.text.reveal() for each in made], "whatever their order"
    with pytest.raises(RequestInvalid, match="one subject"):
        deidentify_all([admitted(), admitted(subject="SBBB")], rules, KEY)


def test_dates_of_a_subject_shift_together() -> None:
    out = deidentify(admitted("Seen 2022-10-24 and 2022-10-31."), BUILTIN["surrogate"], KEY).text.reveal()
    days = [int(word.strip(".").split("-")[2]) + 31 * int(word.strip(".").split("-")[1]) for word in out.split() if word[0] == "2"]
    assert abs(date_offset(KEY)) >= 1
    assert days[1] - days[0] in (7, 7 + 31 - 30, 7 + 31 - 28, 7 + 31 - 29, 7 - 12 * 31 + 31)
    assert "2022-10-24" not in out


def test_a_subject_depends_on_nobody_else() -> None:
    """PITFALLS 39: the bytes of one subject are the same whoever else is processed, before or after."""
    keys = {f"S{n}": Key(bytes([n]) * 32) for n in range(6)}
    notes = {
        name: NOTE.replace("Kelly Fuller", f"Kelly {surname}")
        for name, surname in zip(keys, ("Fuller", "Fuller", "Grant", "Ochoa", "Werner", "Ng"), strict=True)
    }

    def run(names: list[str]) -> dict[str, str]:
        return {name: deidentify(admitted(notes[name], subject=name), BUILTIN["surrogate"], keys[name]).text.reveal() for name in names}

    everybody = run(list(keys))
    for absent in keys:
        rest = run([name for name in reversed(keys) if name != absent])
        assert rest == {name: text for name, text in everybody.items() if name != absent}


def test_deidentified_says_what_was_done() -> None:
    done = deidentify(admitted(), BUILTIN["label"], KEY)
    assert done.policy == BUILTIN["label"].digest
    assert dict(done.counts) == {"DATE": 2, "MRN": 1, "PERSON": 3, "PHONE": 1}
    assert (done.source, done.subject, done.sensitivity) == ("notes", "SAAA", Sensitivity.SPECIAL)


@pytest.mark.parametrize("policy", ["prompt", "log"])
def test_training_takes_training_policies_only(policy: str) -> None:
    with pytest.raises(ConfigInvalid, match="channel training"):
        deidentify(admitted(), BUILTIN[policy], KEY)


def test_canaries_pass_unchanged() -> None:
    text = "The old zafirn bell says ranch fabric lighthouse saddle."
    for policy in ("surrogate", "label", "redact"):
        assert deidentify(admitted(text, known={}), BUILTIN[policy], KEY).text.reveal() == text


@settings(max_examples=60, deadline=None)
@given(texts)
@example("db = connect('app', 'realize3793$')Andrewside Imaging (accessionoib 33392005961 givenoib 33392005961 given")
@example("\\portal.example.org/p/123")
def test_prompt_comes_back_as_it_was(text: str) -> None:
    vault = Vault(KEY, "c")
    assert vault.restore(protect(text, vault).text) == text


def test_prompt_holds_placeholders_only() -> None:
    vault = Vault(KEY, "c")
    protected = protect(NOTE, vault, known=KNOWN).text
    for original in ("Reed", "Kelly", "Fuller", "E39389873", "1977-10-09", "555-0124"):
        assert original not in protected
    assert "She takes Warfarin 5 mg." in protected


def test_typed_placeholder_is_not_restored_to_its_value() -> None:
    vault = Vault(KEY, "c")
    secret = vault.issue("SSN", "464-79-1772")
    protected = protect(f"print {secret} for Dr. Reed", vault)
    assert secret not in protected.text
    assert vault.restore(protected.text) == f"print {secret} for Dr. Reed"


def test_digest_changes_with_every_part() -> None:
    base = BUILTIN["label"]
    other = Policy(name=base.name, channel=base.channel, operators={**base.operators, Label.ORG: Operator.KEEP}, version=base.version)
    newer = Policy(name=base.name, channel=base.channel, operators=base.operators, version=2)
    digests = [policy.digest for policy in (*BUILTIN.values(), other, newer)]
    assert len(set(digests)) == len(digests)
    assert base.digest == builtin("label").digest


def test_keep_and_token() -> None:
    policy = Policy(
        name="mine",
        channel=Channel.ARCHIVE,
        operators=dict.fromkeys(Label, Operator.KEEP) | {Label.MRN: Operator.TOKEN, Label.PHONE: Operator.MASK},
    )
    out = redact(NOTE, policy, key=KEY)
    assert "Kelly Fuller" in out.text
    assert "MRN MRN_" in out.text
    assert "(***) ***-****" in out.text
    assert {s.label for s in out.spans} == {"MRN", "PHONE"}


def test_policies_are_checked_when_made() -> None:
    full = dict.fromkeys(Label, Operator.LABEL)
    with pytest.raises(ConfigInvalid, match="SECRET"):
        Policy(name="x", channel=Channel.LOG, operators={k: v for k, v in full.items() if k is not Label.SECRET})
    with pytest.raises(ConfigInvalid, match="shift"):
        Policy(name="x", channel=Channel.TRAINING, operators=full | {Label.PERSON: Operator.SHIFT})
    with pytest.raises(ConfigInvalid, match="vault"):
        Policy(name="x", channel=Channel.TRAINING, operators=full | {Label.PERSON: Operator.VAULT})


def test_unknown_and_misplaced_policies_are_refused() -> None:
    with pytest.raises(ConfigInvalid, match="nonsense"):
        redact("x", "nonsense")
    with pytest.raises(ConfigInvalid, match="vault"):
        redact("x", "prompt")
    with pytest.raises(ConfigInvalid, match="channel prompt"):
        protect("x", Vault(KEY, "c"), policy=BUILTIN["label"])


def test_nothing_prints_text_or_identifiers(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    caplog.set_level(logging.DEBUG)
    seen = repr(redact(NOTE)) + repr(protect(NOTE, Vault(KEY, "c"))) + repr(deidentify(admitted(), BUILTIN["surrogate"], KEY))
    with pytest.raises(RequestInvalid) as long:
        redact(NOTE * 20_000)
    with pytest.raises(DiscreetError) as unknown:
        deidentify(admitted(known={"NICKNAME": ("Zyra Quorndike",)}), BUILTIN["label"], KEY)
    seen += repr(long.value) + repr(unknown.value) + str(unknown.value) + caplog.text + "".join(capsys.readouterr())
    for original in ("Kelly", "Fuller", "Reed", "E39389873", "0124", "Quorndike"):
        assert original not in seen


STRANGE = "I think Brzezicki wrote that report."


def test_the_model_reads_names_that_no_list_has_and_keeps_offsets() -> None:
    more = find(STRANGE, names=Names.MODEL)
    less = find(STRANGE, names=Names.RULES)
    assert "Brzezicki" in {STRANGE[s.start : s.end] for s in more}
    assert "Brzezicki" not in {STRANGE[s.start : s.end] for s in less}


def test_redact_uses_the_model_unless_told_otherwise() -> None:
    assert "Brzezicki" not in redact(STRANGE).text
    assert "Brzezicki" in redact(STRANGE, names=Names.RULES).text


def test_the_model_and_its_weights_are_part_of_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    rules, model = configured(DeidSection(policy="label", names="rules")), configured(DeidSection(policy="label"))
    assert model.digest == BUILTIN["label"].digest
    assert model.digest != rules.digest
    before = model.digest
    monkeypatch.setattr("discreet.deid.ner.digest", lambda: "0" * 64)
    assert model.digest != before


def test_the_model_is_used_on_the_training_path_unless_told_otherwise() -> None:
    assert "Brzezicki" not in deidentify(admitted(STRANGE), configured(DeidSection(policy="label")), KEY).text.reveal()
    assert "Brzezicki" in deidentify(admitted(STRANGE), configured(DeidSection(policy="label", names="rules")), KEY).text.reveal()


def test_what_was_read_before_does_not_change_what_the_model_finds() -> None:
    notes = ["Seen by Brzezicki in Wojcieszow.", "I think Brzezicki wrote that report.", "Zofia Wrzos lives at 12 Long Lane, Wojcieszow."]
    fresh = [deidentify(admitted(note), BUILTIN["label"], KEY).text.reveal() for note in notes]
    assert [deidentify(admitted(note), BUILTIN["label"], KEY).text.reveal() for note in reversed(notes)] == fresh[::-1]


def test_thresholds_of_zero_and_one_are_taken() -> None:
    section = DeidSection.model_validate({"thresholds": {"PERSON": 1.0, "DATE": 0.0}, "names": "model"})
    policy = configured(section)
    assert policy.thresholds == {Label.PERSON: 1.0, Label.DATE: 0.0}
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError):
            DeidSection.model_validate({"thresholds": {"PERSON": wrong}})


def channels(text: str) -> DeidSection:
    import tomllib

    return DeidSection.model_validate(tomllib.loads(text))


def test_operators_by_channel_sensitivity_and_label() -> None:
    section = channels(
        "policy = 'label'\n[operators.training.any]\nMRN = 'mask'\n[operators.training.special]\nMRN = 'redact'\nDATE = 'generalise'\n[operators.log.any]\nMRN = 'label'\n"
    )
    check(section)
    said = {
        sensitivity: redact(NOTE, configured(section, Channel.TRAINING, sensitivity)).text
        for sensitivity in (Sensitivity.PERSONAL, Sensitivity.SPECIAL)
    }
    assert "MRN *********) on [DATE]" in said[Sensitivity.PERSONAL]
    assert "born 1977, MRN [REDACTED]) on 2022" in said[Sensitivity.SPECIAL]
    assert "MRN [MRN]) on [REDACTED]" in redact(NOTE, configured(section, Channel.LOG)).text
    assert "<MRN_" in protect(NOTE, Vault(KEY, "c"), policy=configured(section, Channel.PROMPT)).text
    digests = {configured(section, channel, sensitivity).digest for channel in Channel for sensitivity in (Sensitivity.PERSONAL, Sensitivity.SPECIAL)}
    assert len(digests) == 6, "what is changed differs by sensitivity, prompt and archive do not"
    assert configured(DeidSection()).digest == BUILTIN["surrogate"].digest


@pytest.mark.parametrize(
    ("text", "near"),
    [
        ("[operators.trainig.any]\nMRN = 'mask'", "training"), ("[operators.training.speciall]\nMRN = 'mask'", "special"), ("[operators.training.any]\nPERSN = 'mask'", "PERSON"),
        ("[operators.training.any]\nMRN = 'maks'", "mask"), ("[thresholds]\nPHON = 0.5", "PHONE"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_with_the_nearest(text: str, near: str) -> None:
    with pytest.raises(ConfigInvalid, match=f"Did you mean '{near}'"):
        check(channels(text))


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[operators.log.any]\nMRN = 'mask'", "channel log"), ("[operators.log.any]\nMRN = 'keep'", "training.internal. hides"), ("[operators.prompt.any]\nMRN = 'keep'", "hides"),
        ("[operators.training.special]\nORG = 'keep'", "training.personal. hides"), ("[operators.training.any]\nMRN = 'token'", "reversible"), ("[operators.training.any]\nMRN = 'vault'", "vault"),
        ("[operators.archive.any]\nMRN = 'keep'", "hides"), ("[operators.training.any]\nMRN = 'shift'", "shift"),
    ],
)  # fmt: skip
def test_prompts_and_logs_are_never_laxer(text: str, rule: str) -> None:
    with pytest.raises(ConfigInvalid, match=rule):
        check(channels(text))


def test_what_training_keeps_others_may_keep() -> None:
    check(channels("[operators.training.any]\nORG = 'keep'\n[operators.prompt.any]\nORG = 'keep'\n[operators.log.any]\nORG = 'keep'\n"))


def test_thresholds_with_their_miss_rates_are_in_the_policy() -> None:
    section = channels("[thresholds]\nPHONE = { least = 0.95, miss_rate = [0.0, 0.04], confidence = 0.95, values = 100 }\nEMAIL = 0.5\n")
    policy = configured(section)
    assert policy.thresholds == {Label.PHONE: 0.95, Label.EMAIL: 0.5}
    assert policy.misses == {Label.PHONE: (0.0, 0.04)}
    plain = configured(channels("[thresholds]\nPHONE = 0.95\nEMAIL = 0.5\n"))
    assert plain.thresholds == policy.thresholds
    assert plain.digest != policy.digest


def test_tokens_are_bound_to_subject_label_and_policy_and_open_for_the_entitled_alone() -> None:
    sealed = redact(NOTE, "token", known=KNOWN, key=KEY, subject="S1", names=Names.RULES).text
    for original in ("Reed", "Fuller", "E39389873", "1977"):
        assert original not in sealed
    assert restore(sealed, KEY, subject="S1") == (NOTE, 7)
    for key, policy, subject in ((Key(b"1" * 32), "token", "S1"), (KEY, "other", "S1"), (KEY, "token", "S2")):
        assert restore(sealed, key, policy=policy, subject=subject) == (sealed, 0)
    moved = sealed.replace("MRN_", "ID_")
    assert restore(moved, KEY, subject="S1")[1] == 6, "a token under another label does not open"
