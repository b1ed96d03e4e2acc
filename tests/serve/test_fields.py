"""The tables of requests: closed, and the one walk replaces every string."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from discreet.errors import RequestInvalid
from discreet.keys import Key
from discreet.serve import fields
from discreet.serve.filters import Conversation

KEY = Key(bytes(32))
NAME, EMAIL = "Aurelia Quistgaard", "aurelia@example.org"


def sent(body: dict[str, Any], table=fields.CHAT, **options) -> dict[str, Any]:
    return fields.deidentify(body, table, Conversation(KEY), tenant=KEY, max_chars=100_000, **options)


def test_an_identifier_cut_by_a_part_border_is_whole_again():
    parts = [{"type": "text", "text": "SSN 536-22-"}, {"type": "text", "text": "8145 was given."}]
    content = sent({"messages": [{"role": "user", "content": parts}]})["messages"][0]["content"]
    assert len(content) == 1
    assert "8145" not in json.dumps(content)


def test_a_number_that_is_an_identifier_becomes_a_placeholder_and_others_stay():
    body = {
        "messages": [
            {
                "role": "assistant",
                "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"ssn": 536228145, "n": 3}'}}],
            }
        ]
    }
    arguments = json.loads(sent(body)["messages"][0]["tool_calls"][0]["function"]["arguments"])
    assert arguments["n"] == 3
    assert "536228145" not in str(arguments["ssn"])


@pytest.mark.parametrize("name", ["get_weather", "lookup_patient", "send_email", "searchFiles", "create_order", "bash", "read_file", "street", "to"])
def test_ordinary_names_stay(name):
    body = {
        "messages": [{"role": "user", "content": f"Call Dr. {NAME}."}],
        "tools": [{"type": "function", "function": {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}}],
    }
    function = sent(body)["tools"][0]["function"]
    assert function == {"name": name, "parameters": {"properties": {name: {"type": "string"}}}}


def test_a_name_with_an_identifier_is_replaced_as_a_whole_and_comes_back():
    conversation = Conversation(KEY)
    conversation.learn([f"Call Dr. {NAME}."])
    shown = conversation.name("find_quistgaard")
    assert shown.replace("_", "").isalnum()
    assert "quist" not in shown.lower()
    assert conversation.restore(shown) == "find_quistgaard"


def test_ids_are_the_same_within_a_request_and_not_across():
    body = {
        "messages": [
            {"role": "assistant", "tool_calls": [{"id": EMAIL, "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": EMAIL, "content": "x"},
        ]
    }
    first, second = sent(body), sent(body)
    assert first["messages"][0]["tool_calls"][0]["id"] == first["messages"][1]["tool_call_id"] != second["messages"][1]["tool_call_id"]


@pytest.mark.parametrize(
    ("table", "body", "path"),
    [
        (fields.CHAT, {"messages": [{"role": "user", "content": "x", "note": "y"}]}, "messages.0.note"),
        (fields.CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content.0"),
        (fields.CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        (fields.CHAT, {NAME: 1}, "(unprintable name)"),
        (fields.CHAT, {"temperature": NAME}, "temperature"),
        (fields.CHAT, {"temperature": True}, "temperature"),
        (fields.CHAT, {"stream": "yes"}, "stream"),
        (fields.CHAT, {"tools": [{"type": "function", "function": "x"}]}, "tools.0.function"),
        (fields.RESPONSES, {"include": ["x"]}, "include"),
        (fields.RESPONSES, {"conversation": "x"}, "conversation"),
        (fields.MESSAGES, {"thinking": {}}, "thinking"),
        (fields.EMBEDDINGS, {"input": [[1]]}, "input.0"),
    ],
)
def test_what_is_not_in_the_table_is_refused_by_path(table, body, path):
    with pytest.raises(RequestInvalid) as error:
        sent(body, table)
    assert error.value.value == path
    assert NAME not in str(error.value)


@pytest.mark.parametrize("body", ["x", [], 3])
def test_a_body_is_an_object(body):
    with pytest.raises(RequestInvalid):
        sent(body)


def test_what_the_tables_do_not_know_passes_by_policy_alone_and_without_its_identifiers():
    part = {"type": "thinking_note", "note": f"Ask Dr. {NAME}.", "deep": [{"mail": EMAIL}]}
    body = {"messages": [{"role": "user", "content": [part], "mood": f"Dr. {NAME} is cross", "rank": 3}], "plugins": [{"id": "web", "owner": EMAIL}]}
    with pytest.raises(RequestInvalid):
        sent(body)
    passed: Counter[str] = Counter()
    got = sent(body, passed=passed)
    assert passed == {"part": 1, "field": 3}
    assert not any(value in json.dumps(got) for value in ("Aurelia", "Quistgaard", EMAIL))
    assert (got["messages"][0]["rank"], got["plugins"][0]["id"], got["messages"][0]["content"][0]["type"]) == (3, "web", "thinking_note")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "https://example.org/face.png"}},
        {"type": "note", "inner": [{"type": "input_audio", "data": "UklGRg=="}]},
        {"type": "note", "picture": "data:image/png;base64,iVBORw0KGgo="},
        {"type": "note", "inline": {"mime_type": "image/png", "data": "iVBORw0KGgo="}},
        {"type": "note", "bytes": "iVBORw0KGgo" * 40},
    ],
)
def test_images_and_audio_pass_by_no_policy(part):
    with pytest.raises(RequestInvalid, match="image, audio or file"):
        sent({"messages": [{"role": "user", "content": [part]}]}, passed=Counter())
