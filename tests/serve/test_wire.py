"""Requests are default-deny, and no refusal repeats what the caller wrote."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discreet.errors import AccessDenied, NotFound, OperationFailed, Overloaded, Refused, RequestInvalid
from discreet.serve import wire

SECRET = "Aurelia Quistgaard 123-45-6789"


def parse(body: object, *, max_bytes: int = 100_000) -> wire.ChatRequest:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return wire.parse_request(raw, max_bytes=max_bytes)


def request(**fields: object) -> dict[str, object]:
    return {"model": "m", "messages": [{"role": "user", "content": SECRET}], **fields}


def refused(body: object, **options: int) -> RequestInvalid:
    with pytest.raises(RequestInvalid) as caught:
        parse(body, **options)
    shown = repr(caught.value) + str(caught.value) + json.dumps(caught.value.to_json()) + json.dumps(wire.error_body(caught.value))
    assert "Aurelia" not in shown
    assert "6789" not in shown
    return caught.value


def test_reads_every_declared_field():
    body = request(
        temperature=0,
        top_p=0.5,
        max_tokens=9,
        max_completion_tokens=7,
        stream=True,
        stream_options={"include_usage": True},
        stop="x",
        seed=3,
        n=1,
        user="u",
    )
    parsed = parse(body)
    assert parsed.messages[0].text == SECRET
    assert parsed.stop == ["x"]
    assert parsed.max_new_tokens(100) == 7
    assert parsed.max_new_tokens(5) == 5


def test_null_is_absent():
    parsed = parse(request(temperature=None, stop=None, n=None, stream_options=None, user=None))
    assert parsed.max_new_tokens(5) == 5


def test_parts_are_one_text_so_that_a_split_identifier_is_whole():
    parts = [{"type": "text", "text": "123-45-"}, {"type": "text", "text": "6789"}]
    assert parse({"model": "m", "messages": [{"role": "user", "content": parts}]}).messages[0].text == "123-45-\n6789"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprobs", True),
        ("tools", []),
        ("response_format", {"type": "json_object"}),
        ("metadata", {"patient": SECRET}),
        ("store", False),
        ("prediction", SECRET),
    ],
)
def test_unknown_field_is_refused_by_name(field, value):
    error = refused(request(**{field: value}))
    assert error.value == field
    assert wire.error_body(error)["error"]["param"] == field


def test_unknown_field_inside_a_message_is_refused_by_path():
    error = refused({"model": "m", "messages": [{"role": "user", "content": "x", "name": SECRET}]})
    assert error.value == "messages.0.name"


@pytest.mark.parametrize("name", [SECRET, "Aurelia", "6789", "", "é", "a" * 65, "aurelia quistgaard"])
def test_a_field_name_that_could_be_a_person_is_not_repeated(name):
    assert refused(request(**{name: 1})).value == "(unprintable name)"


def test_images_are_refused_by_kind():
    parts = [{"type": "image_url", "image_url": {"url": f"http://intranet/{SECRET}"}}]
    error = refused({"model": "m", "messages": [{"role": "user", "content": parts}]})
    assert error.value == "messages.0.content.0.type"
    assert "'text'" in str(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", 16384),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "0.5"),
        ("top_p", 0),
        ("max_tokens", 0),
        ("max_tokens", True),
        ("stream", 1),
        ("stop", ["a"] * 5),
        ("stop", [""]),
        ("seed", 2**63),
        ("messages", []),
        ("messages", "text"),
        ("model", 7),
        ("user", SECRET * 100),
    ],
)
def test_value_out_of_range_is_refused_by_field(field, value):
    assert str(refused(request(**{field: value})).value).startswith(field)


@pytest.mark.parametrize(
    "message", [{"role": "tool", "content": "x"}, {"role": SECRET, "content": "x"}, {"role": "user"}, {"role": "user", "content": []}, SECRET, {}]
)
def test_malformed_message_is_refused(message):
    assert str(refused({"model": "m", "messages": [message]}).value).startswith("messages.0")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b"7",
        SECRET.encode(),
        b'{"model": NaN}',
        b'{"model": Infinity}',
        b'{"model": "\\ud800", "messages": []}',
        b'{"seed": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_not_json_in_utf8_is_refused(body):
    refused(body)


def test_a_lone_surrogate_in_a_message_is_refused():
    refused(b'{"model": "m", "messages": [{"role": "user", "content": "\\udc00"}]}')


@pytest.mark.parametrize("body", [b'{"model": "a", "model": "b"}', b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}'])
def test_duplicate_key_is_refused(body):
    assert refused(body).value in ("model", "content")


def test_size_is_capped_before_parsing():
    refused(b"[" * 1001, max_bytes=1000)
    assert "1000 bytes" in str(refused(b"[" * 1001, max_bytes=1000))


def test_depth_is_capped_without_recursion():
    assert "deep" in str(refused(b'{"a":' * 40_000, max_bytes=10**7))
    assert "deep" in str(refused(b"[" * 40_000, max_bytes=10**7))


def test_brackets_in_a_string_are_text():
    text = '[{"\\' * 100
    assert parse({"model": "m", "messages": [{"role": "user", "content": text}]}).messages[0].text == text


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
    )
)
def test_any_json_is_parsed_or_refused(value):
    try:
        parse({"model": "m", "messages": [{"role": "user", "content": value}]}, max_bytes=10**6)
    except RequestInvalid:
        pass
    else:
        assert isinstance(value, str | list)


def test_representations_hide_the_text():
    parsed = parse(request(stop=SECRET, user=SECRET))
    assert "Aurelia" not in repr(parsed) + repr(parsed.messages[0]) + repr(parsed.messages[0].content[0]) + str(parsed)
    assert "Aurelia" not in repr(wire.AnswerMessage(content=SECRET)) + repr(wire.Delta(content=SECRET))


def test_chunks_carry_usage_exactly_when_asked():
    choice = wire.ChunkChoice(delta=wire.Delta(content="é"))
    chunk = wire.ChatCompletionChunk(id="1", created=1, model="m", system_fingerprint="sha256:0", choices=[choice])
    assert "usage" not in json.loads(chunk.to_json(with_usage=False))
    body = json.loads(chunk.to_json(with_usage=True))
    assert body["usage"] is None
    assert body["choices"] == [{"index": 0, "delta": {"content": "é"}, "logprobs": None, "finish_reason": None}]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AccessDenied("a key"), "authentication_error"),
        (NotFound("a model"), "invalid_request_error"),
        (RequestInvalid("x"), "invalid_request_error"),
        (Refused("x"), "permission_error"),
        (Overloaded("x"), "rate_limit_error"),
        (OperationFailed("x"), "server_error"),
    ],
)
def test_errors_have_openai_shape(error, kind):
    body = wire.error_body(error)["error"]
    assert set(body) == {"message", "type", "code", "param"}
    assert body["type"] == kind
    assert body["code"] == error.code
