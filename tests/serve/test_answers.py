"""Restoration does not depend on how a stream was cut, on any wire; bytes become events however they come."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discreet.errors import UpstreamFailed
from discreet.keys import Key
from discreet.serve import answers
from discreet.serve.answers import Answer, ToolArguments
from discreet.serve.filters import Conversation, JsonRestorer

VALUES = ("Aurelia Quistgaard", 'Ann "Annie" O\\Brien', "Zoë\nÅström")


def conversation() -> tuple[Conversation, list[str]]:
    opened = Conversation(Key(bytes(32)))
    return opened, [opened._vault.issue("PERSON", value) for value in VALUES]


def pieces(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[start:end] for start, end in itertools.pairwise(places)]


@given(st.lists(st.integers(0, 10_000), max_size=40), st.booleans())
def test_json_is_restored_as_json_for_every_cut(cuts, ascii_only):
    opened, shown = conversation()
    said = {"to": f"Ü {shown[0]}, {shown[1]}; {shown[2]}", shown[0].strip("<>"): [shown[1].lower(), "\\" + shown[0], "\U0001f600", 5]}
    text = json.dumps(said, ensure_ascii=ascii_only).replace("<", "\\u003c") if ascii_only else json.dumps(said, ensure_ascii=False)
    restorer = JsonRestorer(opened.restorer)
    restored = "".join(restorer.feed(piece) for piece in pieces(text, cuts)) + restorer.close()
    whole = Answer(opened, ToolArguments.RESTORE).whole(said)
    assert json.loads(restored) == whole
    assert whole["to"] == f"Ü {VALUES[0]}, {VALUES[1]}; {VALUES[2]}"


def test_json_is_restored_at_every_single_cut():
    opened, shown = conversation()
    text = json.dumps({"a": f"x\\{shown[1]}\u00e9\U0001f600"})
    expected = {"a": Answer(opened, ToolArguments.RESTORE).whole(f"x\\{shown[1]}\u00e9\U0001f600")}
    for cut in range(len(text) + 1):
        restorer = JsonRestorer(opened.restorer)
        assert json.loads(restorer.feed(text[:cut]) + restorer.feed(text[cut:]) + restorer.close()) == expected


@pytest.mark.parametrize("text", ['{"a": "x\\', '{"a": "\\u00', '"\\q"', "no json", '{"a": "\\uZZ"}', ""])
def test_what_is_not_json_passes_through_unrestored(text):
    restorer = JsonRestorer(conversation()[0].restorer)
    assert restorer.feed(text) + restorer.close() in (text, text.replace("\\q", "\\\\q").replace("\\uZZ", "\\\\uZZ"))


@given(st.lists(st.integers(0, 10_000), max_size=30))
def test_every_wire_restores_the_same_for_every_cut(cuts):
    opened, shown = conversation()
    text, expected = f"Dear {shown[0]}: {shown[1]}, {shown[2]}", f"Dear {VALUES[0]}: {VALUES[1]}, {VALUES[2]}"
    parts = pieces(text, cuts)

    chat = Answer(opened, ToolArguments.RESTORE)
    events = [{"choices": [{"index": 0, "delta": {"content": part}}]} for part in parts] + [
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    ]
    out = [each for event in events for each in chat.chat(event)]
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in out) == expected

    plain = Answer(opened, ToolArguments.RESTORE)
    events = [{"choices": [{"index": 0, "text": part}]} for part in parts] + [{"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}]
    assert "".join(each["choices"][0]["text"] for event in events for each in plain.completion(event)) == expected

    message = Answer(opened, ToolArguments.RESTORE)
    events = [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": part}} for part in parts] + [
        {"type": "content_block_stop", "index": 0}
    ]
    assert "".join(each["delta"]["text"] for event in events for each in message.message(event) if "delta" in each) == expected

    response = Answer(opened, ToolArguments.RESTORE)
    events = [{"type": "response.output_text.delta", "item_id": "i", "delta": part, "sequence_number": n} for n, part in enumerate(parts)]
    events.append({"type": "response.output_text.done", "item_id": "i", "text": text, "sequence_number": len(parts)})
    out = [each for event in events for each in response.response(event)]
    assert "".join(each["delta"] for each in out if "delta" in each) == expected
    assert out[-1]["text"] == expected
    assert [each["sequence_number"] for each in out] == list(range(len(out)))


def test_hold_back_is_bounded():
    answer, longest = Answer(conversation()[0], ToolArguments.RESTORE), 0
    said, heard = 0, 0
    for _ in range(2000):
        for piece in ("<PER", "SON_", "word "):
            said += len(piece)
            heard += sum(
                len(each["choices"][0]["delta"]["content"]) for each in answer.chat({"choices": [{"index": 0, "delta": {"content": piece}}]})
            )
            longest = max(longest, said - heard)
    assert longest <= 64


def test_another_conversation_restores_nothing():
    _, shown = conversation()
    other, _ = conversation()
    assert Answer(other, ToolArguments.RESTORE).whole({"content": shown[0], "arguments": json.dumps([shown[0]])}) == {
        "content": shown[0],
        "arguments": json.dumps([shown[0]]),
    }


SENT = 'event: x\r\ndata: {"a": "é€"}\r\n\r\n: comment\n\ndata: one\ndata: two\n\ndata: [DONE]\n\n'.encode()


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_events_do_not_depend_on_how_the_bytes_were_cut(size):
    async def chunks():
        for at in range(0, len(SENT), size):
            yield SENT[at : at + size]

    async def read():
        return [event async for some in answers.events(chunks()) for event in some]

    assert asyncio.run(read()) == ['{"a": "é€"}', "one\ntwo", "[DONE]"]


@pytest.mark.parametrize("sent", [b"data: \xff\n\n", b"data: " + b"x" * (answers.MAX_EVENT_BYTES + 1)])
def test_events_that_are_not_text_or_too_long_are_refused(sent):
    async def read():
        async def chunks():
            yield sent

        return [event async for some in answers.events(chunks()) for event in some]

    with pytest.raises(UpstreamFailed):
        asyncio.run(read())


@pytest.mark.parametrize("event", [{"type": "error"}, {"type": "response.failed"}])
def test_an_error_of_the_upstream_is_ours(event):
    answer = Answer(conversation()[0], ToolArguments.RESTORE)
    with pytest.raises(UpstreamFailed):
        answer.response(event)
