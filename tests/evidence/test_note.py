"""The published note of golang.org/x/mod/sumdb/note as a vector, round trips, and every way to mangle a note, a checkpoint or a key."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.errors import EvidenceInvalid
from discreet.evidence import note

VKEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
SEED = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"
SIGNATURE = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
NOTE = f"{TEXT}\n— PeterNeumann {SIGNATURE}\n".encode()
CHECKPOINT = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
ORIGIN = "example.com/behind-the-sofa"
LOG = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
WITNESS = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
LOG_KEY = note.verifier_key(name=ORIGIN, signer=LOG)
WITNESS_KEY = note.verifier_key(name="witness.example.com/w1", signer=WITNESS, algorithm=note.Algorithm.COSIGNATURE_V1)


def test_the_published_note_opens_and_is_what_we_print() -> None:
    opened = note.open_note(NOTE, keys=[note.parse_key(VKEY)])
    assert opened.text == TEXT
    assert [str(key) for key in opened.signed_by] == [VKEY]
    assert note.sign_note(TEXT, name="PeterNeumann", signer=Ed25519PrivateKey.from_private_bytes(SEED)) == NOTE


def test_no_changed_or_cut_verifier_key_is_accepted() -> None:
    assert str(note.parse_key(VKEY)) == VKEY
    for start in range(len(VKEY)):
        for end in range(start + 1, len(VKEY) + 1):
            if (start, end) != (0, len(VKEY)):
                with pytest.raises(EvidenceInvalid):
                    note.parse_key(VKEY[start:end])
    for position, character in enumerate(VKEY):
        with pytest.raises(EvidenceInvalid):
            note.parse_key(VKEY[:position] + chr(ord(character) + 1) + VKEY[position + 1 :])


@pytest.mark.parametrize(
    "vkey",
    [
        "PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==",  # wrong length, with the right hash
        "PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW",  # unknown algorithm, with the right hash
        "",
        "++",
        VKEY + "\n",
        VKEY.upper(),
    ],
)
def test_refuses_verifier_key(vkey: str) -> None:
    with pytest.raises(EvidenceInvalid):
        note.parse_key(vkey)


def test_every_flipped_bit_of_a_note_is_refused() -> None:
    key = note.parse_key(VKEY)
    for position in range(len(NOTE)):
        for bit in range(8):
            flipped = bytearray(NOTE)
            flipped[position] ^= 1 << bit
            with pytest.raises(EvidenceInvalid):
                note.open_note(bytes(flipped), keys=[key])


LINE = f"— PeterNeumann {SIGNATURE}\n"


@pytest.mark.parametrize(
    "malformed",
    [
        "",
        "\n",
        TEXT,
        TEXT + "\n",
        TEXT + LINE,  # no blank line
        "\n" + LINE,  # no text
        f"{TEXT}\n{LINE}"[:-1],  # no final newline
        f"{TEXT}\n{LINE}\n",  # a blank line after the signatures
        f"{TEXT}\n{LINE}garbage\n",
        f"{TEXT}\n{LINE}".replace("— ", "- "),
        f"{TEXT}\n{LINE}".replace("— ", "—  "),
        f"{TEXT}\n{LINE}".replace("\n", "\r\n"),
        f"{TEXT}\n{LINE}".replace("PeterNeumann", "Peter+Neumann"),
        f"{TEXT}\n{LINE}".replace("PeterNeumann ", " "),
        f"{TEXT}\n{LINE}".replace("PeterNeumann", "Peter\u00a0Neumann"),
        f"{TEXT}\n{LINE}".replace("AM=\n", "AN=\n"),  # spare bits of the base64
        f"{TEXT}\n{LINE}".replace("AM=\n", "AM\n"),
        f"{TEXT}\n— PeterNeumann x08gow==\n",  # a key ID and no signature
        f"{TEXT}\x00\n{LINE}",
        f"{TEXT}\t\n\n{LINE}",
        f"{TEXT}\n" + LINE * 101,
        "x" * note.MAX_NOTE_BYTES + f"\n\n{LINE}",
    ],
)
def test_refuses_note(malformed: str) -> None:
    with pytest.raises(EvidenceInvalid):
        note.open_note(malformed.encode(), keys=[note.parse_key(VKEY)])


def test_refuses_bytes_that_are_not_utf8() -> None:
    with pytest.raises(EvidenceInvalid):
        note.open_note(b"\xff" + NOTE, keys=[note.parse_key(VKEY)])


def test_unknown_signatures_are_ignored_and_known_ones_must_verify() -> None:
    key = note.parse_key(VKEY)
    unknown = f"— Somebody {base64.b64encode(bytes(68)).decode()}\n"
    forged = f"— PeterNeumann {base64.b64encode(key.key_id + bytes(64)).decode()}\n"
    assert note.open_note(NOTE + unknown.encode(), keys=[key]).text == TEXT
    for keys, text in (([key], NOTE + forged.encode()), ([key], f"{TEXT}\n{unknown}".encode()), ([], NOTE), ([LOG_KEY], NOTE)):
        with pytest.raises(EvidenceInvalid):
            note.open_note(text, keys=keys)


def test_the_same_name_with_another_key_is_another_key() -> None:
    impostor = note.verifier_key(name="PeterNeumann", signer=LOG)
    with pytest.raises(EvidenceInvalid):
        note.open_note(NOTE, keys=[impostor])


def test_lines_end_at_newlines_alone() -> None:
    """A text with U+2028 or U+0085 is one line to every reader, not two to some."""
    text = "a\u2028b\u0085c\n"
    assert note.open_note(note.sign_note(text, name=ORIGIN, signer=LOG), keys=[LOG_KEY]).text == text


lines = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs"]), max_size=20)


@given(st.lists(lines, min_size=1, max_size=5).filter(lambda found: found != [""]))
@settings(max_examples=60, deadline=None)
def test_what_is_signed_is_what_opens(text_lines: list[str]) -> None:
    text = "\n".join(text_lines) + "\n"
    assert note.open_note(note.sign_note(text, name=ORIGIN, signer=LOG), keys=[LOG_KEY]).text == text


@pytest.mark.parametrize("text", ["", "no newline", "tab\t\n", "lone \ud800\n"])
def test_refuses_to_sign(text: str) -> None:
    with pytest.raises(EvidenceInvalid):
        note.sign_note(text, name=ORIGIN, signer=LOG)


def test_checkpoint_of_the_specification() -> None:
    checkpoint = note.parse_checkpoint(CHECKPOINT)
    assert (checkpoint.origin, checkpoint.size, checkpoint.root.hex()[:8]) == (ORIGIN, 20852163, "0ac5186a")
    assert checkpoint.text == CHECKPOINT
    extended = note.parse_checkpoint(CHECKPOINT + "extension\n")
    assert extended.extensions == ("extension",)
    assert extended.text == CHECKPOINT + "extension\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        CHECKPOINT[:-1],
        CHECKPOINT + "\n",
        "\n" + CHECKPOINT,
        CHECKPOINT.replace("20852163", "020852163"),
        CHECKPOINT.replace("20852163", "-1"),
        CHECKPOINT.replace("20852163", "+1"),
        CHECKPOINT.replace("20852163", "2_0"),
        CHECKPOINT.replace("20852163", "٢"),  # a digit to str.isdigit, not to us
        CHECKPOINT.replace("20852163", "9" * 19),
        CHECKPOINT.replace("20852163", "9" * 5000),
        CHECKPOINT.replace("CsUY", ""),
        CHECKPOINT.replace("2I=", "2J="),
        CHECKPOINT.replace("2I=", "2I"),
        "origin\n1\n",
    ],
)
def test_refuses_checkpoint(text: str) -> None:
    with pytest.raises(EvidenceInvalid):
        note.parse_checkpoint(text)


def test_a_checkpoint_is_of_the_log_that_the_key_names() -> None:
    own = note.sign_note(CHECKPOINT, name=ORIGIN, signer=LOG)
    assert note.open_checkpoint(own, keys=[LOG_KEY]).size == 20852163
    foreign = note.sign_note(CHECKPOINT.replace("sofa", "chair"), name=ORIGIN, signer=LOG)
    with pytest.raises(EvidenceInvalid, match="the log that the key names"):
        note.open_checkpoint(foreign, keys=[LOG_KEY])


def test_a_witness_cosigns_what_the_log_signed() -> None:
    signed = note.sign_note(CHECKPOINT, name=ORIGIN, signer=LOG)
    cosigned = note.cosign(signed, log_key=LOG_KEY, name=WITNESS_KEY.name, signer=WITNESS, timestamp=1679315147)
    assert note.open_note(cosigned, keys=[LOG_KEY, WITNESS_KEY]).signed_by == (LOG_KEY, WITNESS_KEY)
    assert note.open_checkpoint(cosigned, keys=[LOG_KEY]).size == 20852163  # whoever does not know the witness ignores it
    line = cosigned.decode().split("\n")[-2].split(" ")[2]
    content = base64.b64decode(line)
    assert (content[:4], int.from_bytes(content[4:12], "big"), len(content)) == (WITNESS_KEY.key_id, 1679315147, 76)
    WITNESS.public_key().verify(
        content[12:], b"cosignature/v1\ntime 1679315147\n" + CHECKPOINT.encode()
    )  # the message as the specification spells it


def test_the_printed_cosignature_of_the_specification_has_our_layout() -> None:
    """Its keys are not published, so what can be held against it is the form: key ID, time, signature; a note of two signers is one that we read."""
    printed = {
        ORIGIN: "Az3grlgtzPICa5OS8npVmf1Myq/5IZniMp+ZJurmRDeOoRDe4URYN7u5/Zhcyv2q1gGzGku9nTo+zyWE+xeMcTOAYQ8=",
        WITNESS_KEY.name: "jWbPPwAAAABkGFDLEZMHwSRaJNiIDoe9DYn/zXcrtPHeolMI5OWXEhZCB9dlrDJsX3b2oyin1nPZqhf5nNo0xUe+mbIUBkBIfZ+qnA==",
    }
    text, lines = note._split(f"{CHECKPOINT}\n{''.join(f'— {name} {line}{chr(10)}' for name, line in printed.items())}".encode())
    assert note.parse_checkpoint(text).size == 20852163
    assert [(name, len(content)) for name, content in lines] == [(ORIGIN, 4 + 64), (WITNESS_KEY.name, 4 + 8 + 64)]
    assert int.from_bytes(lines[1][1][4:12], "big") == 1679315147, "as the message that the specification spells out"


def test_a_cosignature_of_another_time_or_kind_is_refused() -> None:
    signed = note.sign_note(CHECKPOINT, name=ORIGIN, signer=LOG)
    cosigned = note.cosign(signed, log_key=LOG_KEY, name=WITNESS_KEY.name, signer=WITNESS, timestamp=1679315147)
    line = cosigned.decode().split("\n")[-2].split(" ")[2]
    content = bytearray(base64.b64decode(line))
    for time in (1679315148, 1 << 63):
        content[4:12] = time.to_bytes(8, "big")
        with pytest.raises(EvidenceInvalid):
            note.open_note(cosigned.replace(line.encode(), base64.b64encode(content)), keys=[LOG_KEY, WITNESS_KEY])
    assert note.parse_key(str(WITNESS_KEY)) == WITNESS_KEY
    for timestamp in (0, 1 << 63):
        with pytest.raises(EvidenceInvalid):
            note.cosign(signed, log_key=LOG_KEY, name="w", signer=WITNESS, timestamp=timestamp)
    with pytest.raises(EvidenceInvalid):  # a witness signs checkpoints only
        note.cosign(note.sign_note(TEXT, name=ORIGIN, signer=LOG), log_key=LOG_KEY, name="w", signer=WITNESS, timestamp=1)


def test_the_error_is_bland() -> None:
    secrets = []
    for malformed in (b"secret-in-the-note", b"secret\n\n" + LINE.encode(), NOTE.replace(b"crypto", b"secret")):
        with pytest.raises(EvidenceInvalid) as caught:
            note.open_note(malformed, keys=[note.parse_key(VKEY)])
        secrets.append(str(caught.value))
    assert not any("secret" in message for message in secrets)
