"""Every field of a request that may go to a model elsewhere, and what becomes of it: the tables of four wires, and the one walk that applies them.

A table is closed. A field that is not in it, a part of a kind that is not in it (images, audio, files) and a value of another type are refused by path, because whatever a filter
does not know could carry text past it; where a tenant's policy says so, fields and parts that are not in it pass as JSON of any form, de-identified and counted, images,
audio and files excepted. What is in it is one of these: text, which is de-identified; a name (of a tool, of a field of a schema), which becomes a placeholder as a
whole where it holds an identifier; an id, replaced by its HMAC; `user`, replaced by a pseudonym of the tenant; a word of a closed list; a number; JSON of any form, in
which strings, names and numbers are treated as above.

Two passes over the whole request: the first collects every text, and what is found in one of them is replaced in all (`filters.Conversation`); the second rewrites.

Guarantees: no string of the caller's reaches the result except through the conversation, or as a word of these tables; no error repeats a value.

Source: OpenAI API reference (chat completions, completions, embeddings, responses), Anthropic API reference (messages), as of November 2026.

Does not cover: identifiers cut in two by the border of two messages; numbers in sampling parameters; images, audio and files (refused); what no detector finds.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from types import MappingProxyType
from typing import Any, Protocol, final

from discreet.errors import RequestInvalid
from discreet.keys import Key
from discreet.serve.filters import Conversation
from discreet.serve.wire import field_name

MAX_ANSWERS = 16
"""Most answers (`n`) that one request may ask for."""


@final
class Kind(Enum):
    """What becomes of a value."""

    TEXT = auto()
    STRIPPED = auto()  # text for an embedding: labels in place of identifiers, the same in every request
    NAME = auto()
    ID = auto()
    PSEUDONYM = auto()
    JSON = auto()
    JSON_TEXT = auto()
    MODEL = auto()
    NUMBER = auto()
    COUNT = auto()
    BOOL = auto()
    FALSE = auto()
    EMPTY = auto()


@final
@dataclass(frozen=True, slots=True)
class Tagged:
    """Objects that say in the field `type` which table is theirs."""

    tables: Mapping[str, Any]
    default: str | None = None


def _words(*words: str) -> frozenset[str]:
    return frozenset(words)


_TEXT, _NAME, _ID, _JSON, _NUMBER, _BOOL, _EMPTY = Kind.TEXT, Kind.NAME, Kind.ID, Kind.JSON, Kind.NUMBER, Kind.BOOL, Kind.EMPTY
_TEXTS = (_TEXT, [_TEXT])
_EFFORT, _TIER = _words("none", "minimal", "low", "medium", "high", "xhigh"), _words("auto", "default", "flex", "priority", "standard_only")
_CACHE = {"type": _words("ephemeral"), "ttl": _words("5m", "1h")}

_SAMPLING = {
    "model": Kind.MODEL,
    "temperature": _NUMBER,
    "top_p": _NUMBER,
    "top_k": _NUMBER,
    "min_p": _NUMBER,
    "stream": _BOOL,
    "user": Kind.PSEUDONYM,
    "metadata": _JSON,
}
_OPENAI = {
    **_SAMPLING,
    "n": Kind.COUNT,
    "seed": _NUMBER,
    "stop": _TEXTS,
    "max_tokens": _NUMBER,
    "presence_penalty": _NUMBER,
    "frequency_penalty": _NUMBER,
    "repetition_penalty": _NUMBER,
    "stream_options": {"include_usage": _BOOL, "include_obfuscation": _BOOL},
}
_SCHEMA = {"name": _NAME, "description": _TEXT, "schema": _JSON, "strict": _BOOL}
_FUNCTION = {"name": _NAME, "description": _TEXT, "parameters": _JSON, "strict": _BOOL}
_CHAT_MESSAGE = {
    "role": _words("system", "developer", "user", "assistant", "tool"),
    "content": (
        _TEXT,
        [
            Tagged(
                {"text": {"type": _words("text"), "text": _TEXT, "cache_control": _CACHE}, "refusal": {"type": _words("refusal"), "refusal": _TEXT}}
            )
        ],
    ),
    "name": _NAME,
    "refusal": _TEXT,
    "reasoning_content": _TEXT,
    "reasoning": _TEXT,
    "tool_calls": [{"id": _ID, "index": _NUMBER, "type": _words("function"), "function": {"name": _NAME, "arguments": Kind.JSON_TEXT}}],
    "tool_call_id": _ID,
    "annotations": _EMPTY,
    "audio": _EMPTY,
    "function_call": _EMPTY,
}

CHAT = {
    **_OPENAI,
    "messages": [_CHAT_MESSAGE],
    "max_completion_tokens": _NUMBER,
    "tools": [{"type": _words("function"), "function": _FUNCTION, "cache_control": _CACHE}],
    "tool_choice": (_words("none", "auto", "required"), {"type": _words("function"), "function": {"name": _NAME}}),
    "parallel_tool_calls": _BOOL,
    "response_format": Tagged(
        {
            "text": {"type": _words("text")},
            "json_object": {"type": _words("json_object")},
            "json_schema": {"type": _words("json_schema"), "json_schema": _SCHEMA},
        }
    ),
    "prediction": {"type": _words("content"), "content": _TEXT},
    "reasoning_effort": _EFFORT,
    "verbosity": _EFFORT,
    "service_tier": _TIER,
    "modalities": [_words("text")],
    "store": _BOOL,
    "safety_identifier": Kind.PSEUDONYM,
    "prompt_cache_key": Kind.PSEUDONYM,
    "logprobs": Kind.FALSE,
}

COMPLETIONS = {**_OPENAI, "prompt": _TEXTS, "suffix": _TEXT, "best_of": Kind.COUNT, "echo": _BOOL}

EMBEDDINGS = {
    "model": Kind.MODEL,
    "input": (Kind.STRIPPED, [Kind.STRIPPED]),
    "dimensions": _NUMBER,
    "encoding_format": _words("float", "base64"),
    "user": Kind.PSEUDONYM,
}

_RESPONSE_PARTS = [
    Tagged(
        {
            "input_text": {"type": _words("input_text"), "text": _TEXT},
            "output_text": {"type": _words("output_text"), "text": _TEXT, "annotations": _EMPTY, "logprobs": _EMPTY},
            "refusal": {"type": _words("refusal"), "refusal": _TEXT},
        }
    )
]
_STATUS = _words("in_progress", "completed", "incomplete")
_RESPONSE_ITEM = Tagged(
    {
        "message": {
            "type": _words("message"),
            "id": _ID,
            "status": _STATUS,
            "role": _words("system", "developer", "user", "assistant"),
            "content": (_TEXT, _RESPONSE_PARTS),
        },
        "function_call": {
            "type": _words("function_call"),
            "id": _ID,
            "call_id": _ID,
            "name": _NAME,
            "arguments": Kind.JSON_TEXT,
            "status": _STATUS,
        },
        "function_call_output": {
            "type": _words("function_call_output"),
            "id": _ID,
            "call_id": _ID,
            "output": (_TEXT, _RESPONSE_PARTS),
            "status": _STATUS,
        },
    },
    default="message",
)

RESPONSES = {
    **_SAMPLING,
    "input": (_TEXT, [_RESPONSE_ITEM]),
    "instructions": _TEXT,
    "max_output_tokens": _NUMBER,
    "tools": [{"type": _words("function"), **_FUNCTION}],
    "tool_choice": (_words("none", "auto", "required"), {"type": _words("function"), "name": _NAME}),
    "parallel_tool_calls": _BOOL,
    "text": {
        "format": Tagged(
            {
                "text": {"type": _words("text")},
                "json_object": {"type": _words("json_object")},
                "json_schema": {"type": _words("json_schema"), **_SCHEMA},
            }
        ),
        "verbosity": _EFFORT,
    },
    "reasoning": {"effort": _EFFORT, "summary": _words("auto", "concise", "detailed")},
    "truncation": _words("auto", "disabled"),
    "service_tier": _TIER,
    "stream_options": {"include_obfuscation": _BOOL},
    "store": _BOOL,
    "include": _EMPTY,
    "safety_identifier": Kind.PSEUDONYM,
    "prompt_cache_key": Kind.PSEUDONYM,
}

_BLOCK_TEXT = {"type": _words("text"), "text": _TEXT, "cache_control": _CACHE, "citations": _EMPTY}
_BLOCKS = [
    Tagged(
        {
            "text": _BLOCK_TEXT,
            "tool_use": {"type": _words("tool_use"), "id": _ID, "name": _NAME, "input": _JSON, "cache_control": _CACHE},
            "tool_result": {
                "type": _words("tool_result"),
                "tool_use_id": _ID,
                "content": (_TEXT, [Tagged({"text": _BLOCK_TEXT})]),
                "is_error": _BOOL,
                "cache_control": _CACHE,
            },
        }
    )
]

MESSAGES = {
    **{name: table for name, table in _SAMPLING.items() if name not in ("user", "min_p")},
    "messages": [{"role": _words("user", "assistant", "system"), "content": (_TEXT, _BLOCKS)}],
    "system": (_TEXT, [Tagged({"text": _BLOCK_TEXT})]),
    "max_tokens": _NUMBER,
    "stop_sequences": [_TEXT],
    "metadata": {"user_id": Kind.PSEUDONYM},
    "tools": [{"type": _words("custom"), "name": _NAME, "description": _TEXT, "input_schema": _JSON, "cache_control": _CACHE}],
    "tool_choice": {"type": _words("auto", "any", "tool", "none"), "name": _NAME, "disable_parallel_tool_use": _BOOL},
    "service_tier": _TIER,
}


class _Visitor(Protocol):
    """What happens to the strings of a request on one pass."""

    passed: Counter[str] | None

    def text(self, text: str) -> str: ...
    def name(self, name: str) -> str: ...
    def stripped(self, text: str) -> str: ...
    def id(self, value: str) -> str: ...
    def pseudonym(self, value: str) -> str: ...
    def context(self, text: str) -> None: ...


@final
@dataclass(slots=True)
class _Reader:
    """The first pass: notes every text, changes nothing."""

    texts: list[str] = field(default_factory=list, repr=False)
    passed: Counter[str] | None = None

    def text(self, text: str) -> str:
        self.texts.append(text)
        return text

    def name(self, name: str) -> str:
        return self.text(name)

    def stripped(self, text: str) -> str:
        return self.text(text)

    def id(self, value: str) -> str:
        return value

    def pseudonym(self, value: str) -> str:
        return value

    def context(self, text: str) -> None:
        self.texts.append(text)


@final
@dataclass(slots=True)
class _Writer:
    """The second pass."""

    conversation: Conversation
    tenant: Key
    ids: Key
    passed: Counter[str] | None = None

    def text(self, text: str) -> str:
        return self.conversation.text(text)

    def name(self, name: str) -> str:
        return self.conversation.name(name)

    def stripped(self, text: str) -> str:
        return self.conversation.labelled(text)

    def id(self, value: str) -> str:
        return f"call_{self.ids.mac(value.encode()).hex()[:24]}"

    def pseudonym(self, value: str) -> str:
        return f"u-{self.tenant.derive('user').mac(value.encode()).hex()[:24]}"

    def context(self, text: str) -> None:
        """Read on the first pass."""


def deidentify(
    body: object, table: Mapping[str, Any], conversation: Conversation, *, tenant: Key, max_chars: int, passed: Counter[str] | None = None
) -> dict[str, Any]:
    """Returns the request as the model may see it.

    Args:
        body: parsed JSON, as `wire.parse_json` gives it.
        table: of its wire: `CHAT`, `COMPLETIONS`, `EMBEDDINGS`, `RESPONSES` or `MESSAGES`.
        conversation: gets the placeholders.
        tenant: key of the tenant; pseudonyms of users derive from it.
        max_chars: most characters of text, >= 1.
        passed: gets the number of fields and of parts that are not in the table and pass as JSON of any form; None refuses them.

    Raises:
        RequestInvalid: when a field, a part or a value is not in the table, or there is too much text.
    """
    merged = _merged(body)
    reader = _Reader(passed=None if passed is None else Counter())
    _walk(merged, table, reader, "")
    if sum(map(len, reader.texts)) > max_chars:
        raise RequestInvalid(f"a request of at most {max_chars} characters of text", remedy="Send a shorter conversation.")
    conversation.learn(reader.texts)
    sent = _walk(merged, table, _Writer(conversation, tenant, Key.random(), passed), "")
    if not isinstance(sent, dict):
        raise RequestInvalid("a JSON object")
    return sent


def _merged(value: Any) -> Any:
    """Joins neighbouring text parts: an identifier cut in two by a part border is whole again."""
    if isinstance(value, dict):
        return {key: _merged(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    joined: list[Any] = []
    for item in map(_merged, value):
        if joined and _is_text(item) and _is_text(joined[-1]) and item["type"] == joined[-1]["type"]:
            joined[-1] = {**joined[-1], **item, "text": f"{joined[-1]['text']}\n{item['text']}"}
        else:
            joined.append(item)
    return joined


def _is_text(item: Any) -> bool:
    return isinstance(item, dict) and item.get("type") in ("text", "input_text") and isinstance(item.get("text"), str)


def _walk(value: Any, table: Any, visitor: _Visitor, path: str) -> Any:
    """Returns the value as its table has it."""
    if value is None:
        return None
    if isinstance(table, tuple):
        table = next((one for one in table if _fits(value, one)), table[0])
    if isinstance(table, Tagged):
        if visitor.passed is not None and isinstance(value, dict) and value.get("type", table.default) not in table.tables:
            return _passed(value, "part", visitor, path)
        table = _tagged(value, table, path)
    if isinstance(table, Mapping):
        return _object(value, table, visitor, path)
    if isinstance(table, list):
        if not isinstance(value, list):
            raise _wrong(path, "a list")
        if None in value:  # a field may be null, which is left out; an item that is null stands for nothing
            raise _wrong(f"{path}.{value.index(None)}", "there, not null")
        return [_walk(item, table[0], visitor, f"{path}.{place}") for place, item in enumerate(value)]
    if isinstance(table, frozenset):
        if not isinstance(value, str) or value not in table:
            raise _wrong(path, f"one of {', '.join(sorted(table))}")
        return value
    return _leaf(value, table, visitor, path)


def _fits(value: Any, table: Any) -> bool:
    if isinstance(table, Mapping | Tagged):
        return isinstance(value, dict)
    return isinstance(value, list) if isinstance(table, list) else isinstance(value, str)


def _tagged(value: Any, table: Tagged, path: str) -> Any:
    tag = value.get("type", table.default) if isinstance(value, dict) else None
    if not isinstance(tag, str) or tag not in table.tables:
        remedy = "Parts of other kinds (images, audio, files) cannot be de-identified yet and are refused."
        raise RequestInvalid(f"{path}.type to be one of {', '.join(table.tables)}", value=path, remedy=remedy)
    return table.tables[tag]


def _object(value: Any, table: Mapping[str, Any], visitor: _Visitor, path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(path, "an object")
    rewritten: dict[str, Any] = {}
    for key, item in value.items():
        named = f"{path}.{field_name(key)}".strip(".")
        if key in table:
            rewritten[key] = _walk(item, table[key], visitor, named)
        elif visitor.passed is None:
            raise RequestInvalid("known fields only", value=named, remedy="What the filters do not know is refused; leave it out.")
        else:
            rewritten |= _passed({key: item}, "field", visitor, named)
    return rewritten


_MEDIA = re.compile("image|audio|video|file|document", re.IGNORECASE)
_ENCODED = re.compile(r"\Adata:|\A(?:image|audio|video|application)/[\w.+-]+\Z|(?<![\w+/-])[\w+/-]{400}", re.IGNORECASE | re.ASCII)
"""A data URL, a media type, or a run that no word of a text has: bytes in some encoding."""


def _passed(value: dict[str, Any], what: str, visitor: _Visitor, path: str) -> Any:
    """What the table does not know, as JSON of any form."""
    if visitor.passed is None or _holds_media(value):
        raise RequestInvalid("no image, audio or file", value=path, remedy="They cannot be de-identified and are refused, whatever the policy.")
    visitor.passed[what] += 1
    visitor.context(json.dumps(value, ensure_ascii=False))
    return _json(value, visitor)


def _holds_media(value: Any) -> bool:
    if isinstance(value, str):
        return _ENCODED.search(value) is not None
    if isinstance(value, dict):
        return bool(_MEDIA.search(str(value.get("type", "")))) or any(map(_holds_media, value.values()))
    return isinstance(value, list) and any(map(_holds_media, value))


def _leaf(value: Any, kind: Kind, visitor: _Visitor, path: str) -> Any:
    if kind in _STRINGS:
        if not isinstance(value, str):
            raise _wrong(path, "a string")
        return _string(value, kind, visitor)
    if kind is Kind.JSON:
        visitor.context(json.dumps(value, ensure_ascii=False))  # the whole gives each value its context: {"ssn": 536228145}
        return _json(value, visitor)
    if not _VALID[kind](value):
        raise _wrong(path, _RULES[kind])
    return value


_STRINGS = frozenset((Kind.TEXT, Kind.STRIPPED, Kind.NAME, Kind.ID, Kind.PSEUDONYM, Kind.JSON_TEXT, Kind.MODEL))
_RULES = MappingProxyType(
    {
        Kind.NUMBER: "a number",
        Kind.COUNT: f"a whole number from 1 to {MAX_ANSWERS}",
        Kind.BOOL: "true or false",
        Kind.FALSE: "false",
        Kind.EMPTY: "empty",
    }
)
_VALID: Mapping[Kind, Callable[[Any], bool]] = MappingProxyType(
    {
        Kind.NUMBER: lambda value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and abs(value) < 2**63,
        Kind.COUNT: lambda value: isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_ANSWERS,
        Kind.BOOL: lambda value: isinstance(value, bool),
        Kind.FALSE: lambda value: value is False,
        Kind.EMPTY: lambda value: value == [],
    }
)


def _string(value: str, kind: Kind, visitor: _Visitor) -> str:
    if kind is Kind.MODEL:
        return value  # one of a list that the gateway has compared it with
    if kind is Kind.JSON_TEXT:
        return _json_text(value, visitor)
    rewrite = {
        Kind.TEXT: visitor.text,
        Kind.STRIPPED: visitor.stripped,
        Kind.NAME: visitor.name,
        Kind.ID: visitor.id,
        Kind.PSEUDONYM: visitor.pseudonym,
    }
    return rewrite[kind](value)


def _json_text(value: str, visitor: _Visitor) -> str:
    """A tool call's arguments: JSON in a string, or a text where it is not JSON."""
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return visitor.text(value)
    visitor.context(value)
    return json.dumps(_json(parsed, visitor), ensure_ascii=False)


def _json(value: Any, visitor: _Visitor) -> Any:
    """JSON of any form: strings are texts, keys are names, and a number that is an identifier becomes the placeholder of its digits."""
    if isinstance(value, str):
        return visitor.text(value)
    if isinstance(value, list):
        return [_json(item, visitor) for item in value]
    if isinstance(value, dict):
        return {visitor.name(key): _json(item, visitor) for key, item in value.items()}
    if isinstance(value, bool) or value is None:
        return value
    digits = str(value)
    text = visitor.text(digits)
    return value if text == digits else text


def _wrong(path: str, rule: str) -> RequestInvalid:
    return RequestInvalid(f"{path} to be {rule}" if path else f"{rule}", value=path or None)
