"""Answers on their way to the caller: placeholders back into values, on four wires, whole or in pieces of any size.

Every string of a stream that grows by pieces (text, reasoning, refusal, the arguments of each tool call) has a restorer of its own, which holds back at most what may still
become a placeholder, never the stream. What is held when such a string ends leaves in one more event of the same form, before the event that ends it. All other strings are
restored as wholes. Values are escaped where they enter the JSON of a tool call.

Destination-aware: the caller's answer has the values; the arguments of tool calls have them too (`ToolArguments.RESTORE`), or keep the placeholders where a tenant's tools are
third parties (`ToolArguments.PLACEHOLDER`).

Counts of cached tokens are set to zero: they tell a caller what others have asked (PITFALLS 29).

Fail closed: an event that does not have the form of its wire raises; the gateway ends the stream with an error, and nothing that was held leaves.

Source: the streaming events of OpenAI's and Anthropic's API references, as of November 2026; server-sent events, WHATWG HTML, section 9.2.

What the model says of its own is guarded on the way (`leaks`), in the strings that a model fills; ids and kinds are the server's and are left alone.

Does not cover: numbers outside the strings of a tool call's JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, AsyncIterable, Mapping
from enum import StrEnum
from typing import Any, final

from discreet.errors import UpstreamFailed
from discreet.serve.filters import Conversation, Growing, JsonRestorer

MAX_EVENT_BYTES = 4_000_000
"""Longest single event of an upstream."""

_CACHED = frozenset(
    ("cached_tokens", "cache_read_input_tokens", "cache_creation_input_tokens", "prompt_cache_hit_tokens", "prompt_cache_miss_tokens")
)
_MACHINE = frozenset(
    (
        "id",
        "object",
        "type",
        "role",
        "model",
        "status",
        "finish_reason",
        "stop_reason",
        "service_tier",
        "system_fingerprint",
        "item_id",
        "call_id",
        "tool_call_id",
    )
) | {"response_id", "previous_response_id", "prompt_cache_key", "safety_identifier", "user", "obfuscation", "encrypted_content", "signature"}
"""Fields that the server fills in, not the model: they are left as they are."""

_PLAIN_KEYS = (
    _CACHED | _MACHINE | {"choices", "message", "content", "text", "index", "usage", "created", "output", "annotations", "tool_calls", "function"}
)
_ARGUMENTS = frozenset(("arguments", "partial_json"))
_LINE_END = re.compile(rb"\r\n|\n|\r(?=.)", re.DOTALL)


@final
class ToolArguments(StrEnum):
    """What the arguments of a tool call hold when they reach the caller."""

    RESTORE = "restore"
    PLACEHOLDER = "placeholder"


@final
class Answer:
    """One answer: gives the restored form of its wire's bodies and events."""

    def __init__(self, conversation: Conversation, tools: ToolArguments) -> None:
        self._conversation = conversation
        self._tools = tools
        self._growing: dict[tuple[object, ...], Growing] = {}
        self._templates: dict[tuple[object, ...], dict[str, Any]] = {}
        self._bare: dict[str, Any] = {}
        self._number = 0
        self.ended = False

    def whole(self, value: Any) -> Any:
        """Returns a body, or a part of one, restored."""
        if isinstance(value, str):
            return self._conversation.restore(value)
        if isinstance(value, list):
            return [self.whole(item) for item in value]
        if isinstance(value, dict):
            return {self._key(key): self._member(key, item, value) for key, item in value.items()}
        return value

    def _key(self, key: str) -> str:
        return key if key in _PLAIN_KEYS else self._conversation.restore(key)

    def _member(self, key: str, value: Any, owner: Mapping[str, Any]) -> Any:
        if key in _CACHED:
            return 0 if value is not None else None
        if key == "cache_creation" or key == "logprobs":
            return None if not isinstance(value, list) else []
        if key in _MACHINE and isinstance(value, str):
            return value
        if key in _ARGUMENTS and isinstance(value, str):
            arguments = self._arguments()
            return arguments.feed(value) + arguments.close()
        if key == "input" and owner.get("type") == "tool_use" and self._tools is ToolArguments.PLACEHOLDER:
            arguments = self._arguments()
            return json.loads(arguments.feed(json.dumps(value)) + arguments.close())
        return self.whole(value)

    def _arguments(self) -> Growing:
        return JsonRestorer(self._conversation.restorer if self._tools is ToolArguments.RESTORE else self._conversation.guarded)

    def _grow(self, place: tuple[object, ...], text: str, *, arguments: bool = False) -> str:
        if place not in self._growing:
            self._growing[place] = self._arguments() if arguments else self._conversation.restorer()
        return self._growing[place].feed(text)

    def _close(self, place: tuple[object, ...]) -> str:
        return self._growing.pop(place).close() if place in self._growing else ""

    # --- chat completions and completions

    def chat(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the events that stand for one chunk of a chat completion."""
        events: list[dict[str, Any]] = []
        self._bare = {key: value for key, value in event.items() if key not in ("usage", "choices")}
        for choice in event.get("choices") or []:
            index = choice.get("index", 0)
            choice["delta"] = self._delta(index, choice.get("delta") or {})
            choice["logprobs"] = None
            if choice.get("finish_reason") is not None:
                self.ended = True
                events += self._chat_rest(index)
        return [*events, self._usage(event)]

    def _chat_rest(self, index: int) -> list[dict[str, Any]]:
        rest = self._rest(index)
        return [{**self._bare, "choices": [{"index": index, "delta": rest, "logprobs": None, "finish_reason": None}]}] if rest else []

    def done(self) -> list[dict[str, Any]]:
        """Returns what is held back where a server says that the answer has ended, but gave no choice a reason: small servers do."""
        if self.ended:
            return []
        self.ended = True
        events = [
            event
            for index in dict.fromkeys(int(str(place[0])) for place in self._growing if place[1] != "completion")
            for event in self._chat_rest(index)
        ]
        for place in [place for place in self._growing if place[1] == "completion"]:
            if rest := self._close(place):
                events.append({**self._bare, "choices": [{"index": place[0], "text": rest, "logprobs": None, "finish_reason": None}]})
        return events

    def _delta(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        grown: dict[str, Any] = {}
        for key, value in delta.items():
            if key == "role":
                grown[key] = value
            elif key == "tool_calls" and value is not None:
                grown[key] = [self._tool_call(index, call, place) for place, call in enumerate(value)]
            else:
                grown[key] = self._grow((index, key), value) if isinstance(value, str) else self.whole(value)
        return grown

    def _tool_call(self, index: int, call: dict[str, Any], place: int) -> dict[str, Any]:
        function = dict(call.get("function") or {})
        if isinstance(function.get("name"), str):
            function["name"] = self._conversation.restore(function["name"])
        if isinstance(function.get("arguments"), str):
            function["arguments"] = self._grow((index, "tool_calls", call.get("index", place)), function["arguments"], arguments=True)
        return {**call, "function": function}

    def _rest(self, index: int) -> dict[str, Any]:
        """Returns what is held back in the strings of one choice, as a delta."""
        delta: dict[str, Any] = {}
        for place in [place for place in self._growing if place[0] == index]:
            if not (rest := self._close(place)):
                continue
            if len(place) == 3:
                delta.setdefault("tool_calls", []).append({"index": place[2], "function": {"arguments": rest}})
            else:
                delta[str(place[1])] = rest
        return delta

    def completion(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the events that stand for one chunk of a completion."""
        events: list[dict[str, Any]] = []
        self._bare = {key: value for key, value in event.items() if key not in ("usage", "choices")}
        for choice in event.get("choices") or []:
            place = (choice.get("index", 0), "completion")
            choice["text"] = self._grow(place, choice.get("text") or "")
            choice["logprobs"] = None
            if choice.get("finish_reason") is not None:
                self.ended = True
                if rest := self._close(place):
                    choice["text"] += rest
        return [*events, self._usage(event)]

    def _usage(self, event: dict[str, Any]) -> dict[str, Any]:
        return {**event, "usage": self.whole(event["usage"])} if event.get("usage") else event

    # --- responses

    def response(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the events that stand for one event of a response; they are numbered anew.

        Raises:
            UpstreamFailed: when the event says that the response failed.
        """
        kind = str(event["type"])
        if kind in ("error", "response.failed"):
            raise UpstreamFailed("an answer to the end")
        self.ended = self.ended or kind in ("response.completed", "response.incomplete")
        events: list[dict[str, Any]]
        if kind.endswith(".delta") and isinstance(event.get("delta"), str):
            place = _place(kind, event)
            self._templates[place] = event
            events = [{**event, "delta": self._grow(place, event["delta"], arguments="arguments" in kind)}]
        else:
            closing = list(self._growing) if self.ended else [_place(kind.removesuffix(".done") + ".delta", event)]
            held = [(place, self._close(place)) for place in closing]
            events = [*({**self._templates[place], "delta": rest} for place, rest in held if rest), self.whole(event)]
        return [self._numbered(each) for each in events]

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        if "sequence_number" not in event:
            return event
        self._number += 1
        return {**event, "sequence_number": self._number - 1}

    # --- messages

    def message(self, event: dict[str, Any]) -> list[dict[str, Any]]:
        """Returns the events that stand for one event of an Anthropic message.

        Raises:
            UpstreamFailed: when it is an error.
        """
        kind = event["type"]
        if kind == "error":
            raise UpstreamFailed("an answer to the end")
        self.ended = self.ended or kind == "message_stop"
        if kind == "content_block_delta":
            return [{**event, "delta": self._block_delta(event["index"], event["delta"])}]
        if kind == "content_block_stop":
            places = [place for place in self._growing if place[0] == event["index"]]
            held = [(place, self._close(place)) for place in places]
            rests = [{"type": place[1], str(place[2]): rest} for place, rest in held if rest]
            return [*({"type": "content_block_delta", "index": event["index"], "delta": delta} for delta in rests), event]
        return [self.whole(event)]

    def _block_delta(self, index: int, delta: dict[str, Any]) -> dict[str, Any]:
        kind = str(delta["type"])
        name = {"text_delta": "text", "input_json_delta": "partial_json", "thinking_delta": "thinking"}.get(kind)
        if name is None:
            return self.whole(delta)  # type: ignore[no-any-return]  # an object in, an object out
        return {**delta, name: self._grow((index, kind, name), delta[name], arguments=name in _ARGUMENTS)}


def _place(kind: str, event: Mapping[str, Any]) -> tuple[object, ...]:
    return (kind, event.get("item_id"), event.get("output_index"), event.get("content_index"), event.get("summary_index"))


async def events(chunks: AsyncIterable[bytes]) -> AsyncGenerator[list[str], None]:
    """Yields the data of the server-sent events that each chunk completes, however its bytes were cut: what arrived together may leave together.

    Raises:
        UpstreamFailed: when an event is longer than `MAX_EVENT_BYTES` or not UTF-8.
    """
    held, lines = b"", []
    async for chunk in chunks:
        whole: list[str] = []
        *complete, held = _LINE_END.split(held + chunk)
        for line in complete:
            if line.startswith(b"data:"):
                lines.append(line[5:].removeprefix(b" "))
            elif not line and lines:
                whole.append(_text(b"\n".join(lines)))
                lines = []
        if len(held) + sum(map(len, lines)) > MAX_EVENT_BYTES:
            raise UpstreamFailed(f"events of at most {MAX_EVENT_BYTES} bytes")
        if whole:
            yield whole
    if held.startswith(b"data:"):
        lines.append(held[5:].strip())
    if lines:
        yield [_text(b"\n".join(lines))]


def _text(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError:
        raise UpstreamFailed("events in UTF-8") from None
