"""Bytes of a stranger become JSON or a refusal, and no refusal repeats what the caller wrote."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from discreet.errors import AccessDenied, NotFound, OperationFailed, Overloaded, Refused, RequestInvalid
from discreet.serve import wire

SECRET = "Aurelia Quistgaard 123-45-6789"


def parse(body: object, *, max_bytes: int = 100_000) -> object:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return wire.parse_json(raw, max_bytes=max_bytes, max_depth=16)


def refused(body: object, **options: int) -> RequestInvalid:
    with pytest.raises(RequestInvalid) as caught:
        parse(body, **options)
    shown = repr(caught.value) + str(caught.value) + json.dumps(caught.value.to_json()) + json.dumps(wire.error_body(caught.value))
    assert "Aurelia" not in shown
    assert "6789" not in shown
    return caught.value


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff",
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
    assert parse({"content": text}) == {"content": text}


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
    )
)
def test_any_json_is_parsed_or_refused(value):
    try:
        assert parse({"content": value}, max_bytes=10**6) == {"content": value}
    except RequestInvalid:
        assert "deep" in str(refused({"content": value}, max_bytes=10**6)) or "JSON" in str(refused({"content": value}, max_bytes=10**6))


@pytest.mark.parametrize("name", ["Aurelia Quistgaard", "aurelia-quistgaard", "Temperature", "x" * 65, ""])
def test_a_field_name_that_could_be_a_person_is_not_repeated(name):
    assert wire.field_name(name) == "(unprintable name)"
    assert wire.field_name("max_tokens") == "max_tokens"


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
