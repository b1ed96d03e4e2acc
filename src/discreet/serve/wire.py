"""What travels between a caller and the gateway: OpenAI's chat completions, as much of them as one private text model can honour.

A request is default-deny: a field that is not declared here is refused by name, never ignored, because a field that is ignored could carry an identifier past the
filters or promise what the gateway does not do (images, tools, `logprobs`). Bytes are capped before they are parsed, nesting is bounded before the parser recurses, and an
object that says one key twice is refused, since two parsers could disagree about which one counts.

Guarantees: no error of this module repeats a value of the request. The name of a refused field is repeated only where it looks like a field name (lower-case letters,
digits and underscores) and only in the answer to the caller.

Source: OpenAI API reference, "Create chat completion" and "The chat completion chunk object".

Does not cover: tools, images, audio, `logprobs`, `response_format`, embeddings, the Responses API.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from discreet.errors import AccessDenied, DiscreetError, NotFound, OperationFailed, Refused, RequestInvalid

MAX_DEPTH = 16
MAX_MESSAGES = 1024
_FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_BRACKETS_AND_QUOTES = re.compile(r'\\.|["\[\]{}]', re.DOTALL)

Role = Literal["system", "developer", "user", "assistant"]
FinishReason = Literal["stop", "length"]


class _Inbound(BaseModel):
    """Strict (no coercion), closed, immutable, and silent about its input when it fails."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, hide_input_in_errors=True)

    def __repr_args__(self) -> tuple[()]:
        """Shows no field: what a caller wrote does not belong in a traceback."""
        return ()


@final
class TextPart(_Inbound):
    """One part of a message; text is the only kind."""

    type: Literal["text"]
    text: str


@final
class Message(_Inbound):
    """One turn of the conversation as the caller sends it: identifiers included."""

    role: Role
    content: list[TextPart] = Field(min_length=1)

    @field_validator("content", mode="before")
    @classmethod
    def _one_form(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @property
    def text(self) -> str:
        """The parts as the one string that the model sees and that the filters scan: an identifier cut in two by a part border is whole again."""
        return "\n".join(part.text for part in self.content)


@final
class StreamOptions(_Inbound):
    include_usage: bool | None = None


@final
class ChatRequest(_Inbound):
    """The body of `POST /v1/chat/completions`. `user` is accepted and dropped: it names a person and no part of the gateway needs it."""

    model: Annotated[str, Field(max_length=256)]
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    user: Annotated[str, Field(max_length=512)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_many(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    def max_new_tokens(self, limit: int) -> int:
        """Returns the smallest of the limits that the caller and the gateway set; an answer cut by it says `finish_reason: length`."""
        return min(x for x in (self.max_tokens, self.max_completion_tokens, limit) if x is not None)


class _Outbound(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def __repr_args__(self) -> tuple[()]:
        """Shows no field, as above: an answer is as private as its question."""
        return ()


@final
class Usage(_Outbound):
    """Token counts. `cached_tokens` is absent on purpose: it tells a caller what others have asked (PITFALLS 29)."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@final
class AnswerMessage(_Outbound):
    role: Literal["assistant"] = "assistant"
    content: str


@final
class Choice(_Outbound):
    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: None = None
    finish_reason: FinishReason


@final
class ChatCompletion(_Outbound):
    """An answer in one piece. `system_fingerprint` is the digest of the adapter that gave it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


@final
class Delta(_Outbound):
    role: Literal["assistant"] | None = None
    content: str | None = None


@final
class ChunkChoice(_Outbound):
    index: Literal[0] = 0
    delta: Delta
    logprobs: None = None
    finish_reason: FinishReason | None = None


@final
class ChatCompletionChunk(_Outbound):
    """One piece of a streamed answer; the last before `[DONE]` has no choices and the usage, where the caller asked for it."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None

    def to_json(self, *, with_usage: bool) -> str:
        """Returns the chunk; the `usage` key is there (null until the end) exactly when the caller asked for it, as OpenAI has it."""
        body = self.model_dump(mode="json", exclude=None if with_usage else {"usage"})
        for choice in body["choices"]:
            choice["delta"] = {key: value for key, value in choice["delta"].items() if value is not None}
        return to_json(body)


@final
class Model(_Outbound):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["discreet"] = "discreet"


@final
class ModelList(_Outbound):
    object: Literal["list"] = "list"
    data: list[Model]


def parse_request(body: bytes, *, max_bytes: int) -> ChatRequest:
    """Reads the body of `POST /v1/chat/completions`.

    Args:
        body: the bytes as received.
        max_bytes: size above which they are not parsed.

    Raises:
        RequestInvalid: when the bytes are too many, not UTF-8, not JSON, nested too deep, say a key twice, hold an unknown field or a value out of range. Its `value` is
            the path of the field ("messages.0.content"), never what the field holds.
    """
    parsed = parse_json(body, max_bytes=max_bytes)
    try:
        return ChatRequest.model_validate(parsed)
    except ValidationError as error:
        finding = _explain(error)
    raise finding


def parse_json(body: bytes, *, max_bytes: int, max_depth: int = MAX_DEPTH) -> Any:
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


_RULES = {
    "missing": "a required field",
    "literal_error": "one of {expected}",
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "list_type": "a list",
    "model_type": "an object",
    "dict_type": "an object",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "too_short": "at least {min_length} item",
    "too_long": "at most {max_length} items",
    "string_too_short": "a string that is not empty",
    "string_too_long": "a string of at most {max_length} characters",
}
"""What each of pydantic's findings means in our words; its own messages are not used, since some repeat the input."""


def _explain(error: ValidationError) -> RequestInvalid:
    """Turns pydantic's most telling finding into our error: a wrong kind of part first, then unknown fields, then the rest."""
    found = error.errors(include_url=False, include_input=False)
    order = {"literal_error": 0, "extra_forbidden": 1}
    first = min(found, key=lambda finding: order.get(finding["type"], 2))
    path = ".".join(field_name(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return RequestInvalid("known fields only", value=path, remedy="This gateway does not support it; leave it out.")
    rule = _RULES.get(first["type"], "a valid value").format_map(first.get("ctx", {}))
    return RequestInvalid(f"{path} to be {rule}" if path else "a JSON object", value=path or None)
