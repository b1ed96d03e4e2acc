"""The bytes that travel between a caller and the gateway: JSON that a stranger sent, JSON that goes out, and errors in OpenAI's form.

Bytes are capped before they are parsed, nesting is bounded before the parser recurses, and an object that says one key twice is refused, since two parsers could disagree
about which one counts.

Guarantees: no error of this module repeats a value of the request. The name of a refused field is repeated only where it looks like a field name (lower-case letters,
digits and underscores) and only in the answer to the caller.

Does not cover: which fields there are (`fields`), what a model can do with them (`local`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from discreet.errors import AccessDenied, DiscreetError, NotFound, OperationFailed, Refused, RequestInvalid

_FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_BRACKETS_AND_QUOTES = re.compile(r'\\.|["\[\]{}]', re.DOTALL)


def parse_json(body: bytes, *, max_bytes: int, max_depth: int) -> Any:
    """Reads JSON that a stranger sent.

    Raises:
        RequestInvalid: when the bytes are too many, not UTF-8, not JSON, nested deeper than `max_depth`, or say a key twice.
    """
    if len(body) > max_bytes:
        raise RequestInvalid(f"a request of at most {max_bytes} bytes", remedy="Send a shorter conversation.")
    try:
        text = body.decode()
        if text.count("{") + text.count("[") > max_depth:  # fewer brackets than that cannot nest deeper
            _check_depth(text, max_depth)
        parsed = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(parsed, ensure_ascii=False).encode()  # a lone surrogate has no UTF-8: refused here, not halfway through a model
    except (ValueError, RecursionError):
        raise RequestInvalid("a request that is JSON in UTF-8") from None
    return parsed


def to_json(body: Mapping[str, Any]) -> str:
    """Returns JSON in ASCII: a client that splits an event stream at Unicode line ends would otherwise cut an answer that holds one."""
    return json.dumps(body, separators=(",", ":"))


def error_body(error: DiscreetError) -> dict[str, dict[str, str | None]]:
    """Returns OpenAI's error object for one of our errors, whose message is public by contract."""
    param = str(error.value) if isinstance(error, RequestInvalid) and error.value is not None else None
    return {"error": {"message": str(error), "type": _error_type(error), "code": error.code, "param": param}}


def _error_type(error: DiscreetError) -> str:
    if isinstance(error, AccessDenied):
        return "authentication_error"
    if isinstance(error, RequestInvalid | NotFound):
        return "invalid_request_error"
    if isinstance(error, Refused):
        return "permission_error"
    return "rate_limit_error" if isinstance(error, OperationFailed) and error.http_status == 429 else "server_error"


def _check_depth(text: str, max_depth: int) -> None:
    """Counts brackets outside strings, in one pass that does not recurse."""
    depth, in_string = 0, False
    for match in _BRACKETS_AND_QUOTES.finditer(text):
        mark = match.group()
        if mark == '"':
            in_string = not in_string
        elif not in_string and len(mark) == 1:
            depth += 1 if mark in "[{" else -1
            if depth > max_depth:
                raise RequestInvalid(f"JSON nested at most {max_depth} deep")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise RequestInvalid("every key of an object once", value=field_name(key), remedy="Leave out the duplicate.")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def field_name(name: str | int) -> str:
    """Returns a field's name if it looks like one: a key of the caller's own making could be an identifier of a person."""
    return str(name) if isinstance(name, int) or _FIELD_NAME.fullmatch(name) else "(unprintable name)"
