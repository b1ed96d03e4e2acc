"""A model in this process as one more server behind the gateway: OpenAI's chat completions, completions and responses, and Anthropic's messages, on one `Engine`.

    request of a wire ── read ──> turns, sampling, stop strings ──> engine ──> pieces ── written ──> body or events of the same wire

It gets what any upstream gets, so prompts, stop strings and names have placeholders already. The digest of the adapter that answers travels in every answer
(`x-discreet-adapter`, and `system_fingerprint` on OpenAI's wires).

Default deny: what the model cannot do (tools, several answers, JSON modes, penalties, log probabilities, storing) is refused by name, unless the request asks for what happens anyway
(`n` of 1, an empty list of tools). Who asks and whose caches are meant (`user`, `metadata`, `prompt_cache_key`) is read by nobody here.

Source: OpenAI API reference (chat completions, completions, responses and their streaming events), Anthropic API reference (messages), as of November 2026.

Does not cover: embeddings, tools, several choices.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, final

from discreet.errors import NotFound, OperationFailed, RequestInvalid
from discreet.keys import Key
from discreet.record import Digest
from discreet.serve.asgi import frame
from discreet.serve.engine import Engine, Piece, Role, Sampling, StopAt, Turn
from discreet.serve.upstream import CHAT, COMPLETIONS, MESSAGES, RESPONSES
from discreet.serve.wire import field_name, to_json

ADAPTER_HEADER = "x-discreet-adapter"

MAX_STOPS, MAX_STOP_CHARS = 16, 256

DEFAULTS = Sampling(temperature=0.2, top_p=0.9, max_new_tokens=256)

_ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_REMEDY = "This model does not do it; leave it out."

_HONOURED = frozenset(
    ("model", "stream", "stream_options", "temperature", "top_p", "seed", "max_tokens", "max_completion_tokens", "max_output_tokens")
)
_READ_BY_NOBODY = frozenset(("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls", "tool_choice"))
_AS_IT_IS: Mapping[str, Sequence[Any]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logprobs": (False,),
    "echo": (False,),
    "store": (False,),
    "tools": ([],),
    "include": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "text": ({}, {"format": {"type": "text"}}),
    "truncation": ("disabled",),
}
"""Fields that ask for nothing where they have one of these values."""

_PART_FIELDS = frozenset(("type", "text", "cache_control", "annotations", "citations", "logprobs"))
_TURN_FIELDS = frozenset(("role", "content", "type", "id", "status", "annotations"))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """One request in the engine's words, and what every object of its answer says about where it comes from."""

    prompt: Sequence[Turn] | str = field(repr=False)
    sampling: Sampling
    stop: StopAt
    model: str
    adapter: Digest
    with_usage: bool
    number: str = field(default_factory=lambda: Key.random().mac(b"answer").hex()[:24])
    created: int = field(default_factory=lambda: int(time.time()))


_Pieces = AsyncGenerator[Piece, None]
_Events = AsyncGenerator[dict[str, Any], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Form:
    """How one wire says things: the names of its own, its prompt, its whole answer and the events of a stream."""

    fields: frozenset[str]
    prompt: Callable[[Mapping[str, Any]], Sequence[Turn] | str]
    whole: Callable[[_Asked, str, Piece], dict[str, Any]]
    events: Callable[[_Asked, _Pieces], _Events]
    done: bool = False


@final
class Local:
    """A server that is a model in this process (`upstream.Server`)."""

    released = True
    max_answer_bytes = 0  # an answer is bounded by its tokens

    def __init__(self, engine: Engine, *, name: str, adapter: Digest, defaults: Sampling = DEFAULTS) -> None:
        """Takes over an engine.

        Args:
            engine: what answers.
            name: the name under which callers ask for it.
            adapter: digest of the adapter that answers.
            defaults: temperature and top_p where the caller gives none; `max_new_tokens` is the longest answer, a longer one is cut and says so.
        """
        self.paths = frozenset(_FORMS)
        self.digest = adapter
        self.headers: Mapping[str, str] = {ADAPTER_HEADER: adapter}
        self.name = name
        self._engine, self._defaults = engine, defaults

    async def open(self) -> None:
        """See `upstream.Server.open`: the model is there already."""

    async def close(self) -> None:
        """See `upstream.Server.close`."""
        self._engine.close()

    async def models(self) -> frozenset[str]:
        """See `upstream.Server.models`."""
        return frozenset((self.name,))

    async def ask(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the whole answer.

        Raises:
            NotFound, RequestInvalid, Overloaded, OperationFailed: as `stream`.
        """
        form, asked = self._read(path, body)
        texts: list[str] = []
        async with aclosing(self._pieces(asked)) as pieces:
            async for last in pieces:
                texts.append(last.text)
        return form.whole(asked, "".join(texts), last)

    @asynccontextmanager
    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """Gives the server-sent events of the answer while they come; the first token is there when it returns, so that a refusal still has its own status.

        Raises:
            NotFound: when it has no such route.
            RequestInvalid: when the request asks for what the model does not do, or does not fit it.
            Overloaded: when too many wait.
            OperationFailed: when the model fails; the message holds no text of the conversation.
        """
        form, asked = self._read(path, body)
        async with aclosing(self._pieces(asked)) as pieces:
            first = await anext(pieces)
            async with aclosing(_bytes(form, asked, _with_first(first, pieces))) as written:
                yield written

    def _read(self, path: str, body: Mapping[str, Any]) -> tuple[_Form, _Asked]:
        form = _FORMS.get(path)
        if form is None:
            raise NotFound("a route of the model that is served", remedy=f"It has {', '.join(sorted(_FORMS))}.")
        for name, value in body.items():
            if name not in _HONOURED | _READ_BY_NOBODY | form.fields and value is not None and value not in _AS_IT_IS.get(name, ()):
                raise RequestInvalid("what this model can do", value=field_name(name), remedy=_REMEDY)
        asked = _Asked(
            prompt=form.prompt(body),
            sampling=_sampling(body, self._defaults),
            stop=StopAt(_stops(body)),
            model=self.name,
            adapter=self.digest,
            with_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        )
        return form, asked

    async def _pieces(self, asked: _Asked) -> _Pieces:
        """Yields the answer, cut at the caller's stop strings; the last piece, and only the last, says why it ended."""
        async with aclosing(self._engine.generate(asked.prompt, asked.sampling)) as pieces:
            async for piece in pieces:
                ended = piece.finish_reason is not None
                text = asked.stop.feed(piece.text) + (asked.stop.close() if ended else "")
                yield replace(piece, text=text, finish_reason="stop" if asked.stop.found else piece.finish_reason)
                if ended or asked.stop.found:
                    return
        raise OperationFailed("an answer to the end")


async def _with_first(first: Piece, pieces: _Pieces) -> _Pieces:
    yield first
    async for piece in pieces:
        yield piece


async def _bytes(form: _Form, asked: _Asked, pieces: _Pieces) -> AsyncGenerator[bytes, None]:
    async with aclosing(pieces), aclosing(form.events(asked, pieces)) as events:
        async for event in events:
            yield frame(to_json(event)).encode()
    if form.done:
        yield frame("[DONE]").encode()


def _sampling(body: Mapping[str, Any], defaults: Sampling) -> Sampling:
    given = {name: body[name] for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "seed") if body.get(name) is not None}
    for name, number in given.items():
        if not isinstance(number, int):
            raise RequestInvalid(f"{name} to be a whole number", value=name)
    seed = given.pop("seed", None)
    temperature, top_p = body.get("temperature"), body.get("top_p")
    return Sampling(
        temperature=defaults.temperature if temperature is None else temperature,
        top_p=defaults.top_p if top_p is None else top_p,
        max_new_tokens=min(defaults.max_new_tokens, *given.values(), defaults.max_new_tokens),
        seed=seed,
    )


def _stops(body: Mapping[str, Any]) -> Sequence[str]:
    name = "stop" if body.get("stop") else "stop_sequences"
    given = body.get(name) or ()
    stops = (given,) if isinstance(given, str) else tuple(given)
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_CHARS for stop in stops):  # each is looked for in every piece, in the event loop
        raise RequestInvalid(
            f"at most {MAX_STOPS} stop strings of at most {MAX_STOP_CHARS} characters", value=name, remedy="Give fewer or shorter ones."
        )
    return stops


def _turns(messages: Sequence[Any], name: str, *, system: Any = None) -> tuple[Turn, ...]:
    turns = [] if system is None else [Turn(role="system", text=_text(system, "system"))]
    turns += [_turn(message, f"{name}.{place}") for place, message in enumerate(messages)]
    if not turns:
        raise RequestInvalid("a conversation of at least one message", value=name)
    return tuple(turns)


def _turn(message: Mapping[str, Any], path: str) -> Turn:
    role = _ROLES.get(message.get("role") or "")
    if role is None:
        raise RequestInvalid(f"one of the roles {', '.join(_ROLES)}", value=f"{path}.role", remedy=_REMEDY)
    for name, value in message.items():
        if name not in _TURN_FIELDS and value not in (None, []):
            raise RequestInvalid("what this model can do", value=f"{path}.{field_name(name)}", remedy=_REMEDY)
    return Turn(role=role, text=_text(message.get("content"), f"{path}.content"))


def _text(content: Any, path: str) -> str:
    """Returns the parts as the one string that the model sees."""
    if isinstance(content, str):
        return content
    parts = content or []
    if not parts or not all(isinstance(part.get("text"), str) and _PART_FIELDS.issuperset(part) for part in parts):
        raise RequestInvalid("text, or parts that are text", value=path, remedy=_REMEDY)
    return "\n".join(part["text"] for part in parts)


# --- chat completions and completions


def _usage(last: Piece) -> dict[str, Any]:
    """Token counts. Those of cached tokens are absent on purpose: they tell a caller what others have asked (PITFALLS 29)."""
    total = last.prompt_tokens + last.completion_tokens
    return {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.completion_tokens, "total_tokens": total}


def _openai(asked: _Asked, kind: str, prefix: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    about = {"id": f"{prefix}-{asked.number}", "object": kind, "created": asked.created, "model": asked.model, "system_fingerprint": asked.adapter}
    return {**about, "choices": list(choices)}


def _choice(finish_reason: str | None, **content: Any) -> dict[str, Any]:
    return {"index": 0, **content, "logprobs": None, "finish_reason": finish_reason}


def _chat_whole(asked: _Asked, text: str, last: Piece) -> dict[str, Any]:
    choice = _choice(last.finish_reason, message={"role": "assistant", "content": text})
    return {**_openai(asked, "chat.completion", "chatcmpl", [choice]), "usage": _usage(last)}


async def _chat_events(asked: _Asked, pieces: _Pieces) -> _Events:
    def chunk(finish_reason: str | None = None, **delta: str) -> dict[str, Any]:
        made = _openai(asked, "chat.completion.chunk", "chatcmpl", [_choice(finish_reason, delta=delta)])
        return {**made, "usage": None} if asked.with_usage else made

    yield chunk(role="assistant", content="")
    async for last in pieces:
        if last.text:
            yield chunk(content=last.text)
    yield chunk(last.finish_reason)
    if asked.with_usage:
        yield {**_openai(asked, "chat.completion.chunk", "chatcmpl", []), "usage": _usage(last)}


def _completion_whole(asked: _Asked, text: str, last: Piece) -> dict[str, Any]:
    return {**_openai(asked, "text_completion", "cmpl", [_choice(last.finish_reason, text=text)]), "usage": _usage(last)}


async def _completion_events(asked: _Asked, pieces: _Pieces) -> _Events:
    async for last in pieces:
        if last.text or last.finish_reason:
            yield _openai(asked, "text_completion", "cmpl", [_choice(last.finish_reason, text=last.text)])
    if asked.with_usage:
        yield {**_openai(asked, "text_completion", "cmpl", []), "usage": _usage(last)}


def _bare(body: Mapping[str, Any]) -> str:
    prompt = body.get("prompt")
    if not isinstance(prompt, str):
        raise RequestInvalid("one prompt that is a string", value="prompt", remedy=_REMEDY)
    return prompt


# --- responses


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": []}


def _item(asked: _Asked, status: str, content: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"id": f"msg_{asked.number}", "type": "message", "role": "assistant", "status": status, "content": list(content)}


def _response(asked: _Asked, status: str, output: Sequence[Mapping[str, Any]], last: Piece | None = None) -> dict[str, Any]:
    about = {"id": f"resp_{asked.number}", "object": "response", "created_at": asked.created, "model": asked.model, "status": status}
    as_asked = {"temperature": asked.sampling.temperature, "top_p": asked.sampling.top_p, "max_output_tokens": asked.sampling.max_new_tokens}
    fixed: dict[str, Any] = {"error": None, "metadata": {}, "parallel_tool_calls": False, "tool_choice": "none", "tools": [], "instructions": None}
    cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
    return {**about, **as_asked, **fixed, "incomplete_details": cut, "output": list(output), "usage": None if last is None else _response_usage(last)}


def _response_usage(last: Piece) -> dict[str, Any]:
    counts = {
        "input_tokens": last.prompt_tokens,
        "output_tokens": last.completion_tokens,
        "total_tokens": last.prompt_tokens + last.completion_tokens,
    }
    return {**counts, "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}


def _response_whole(asked: _Asked, text: str, last: Piece) -> dict[str, Any]:
    status = "incomplete" if last.finish_reason == "length" else "completed"
    return _response(asked, status, [_item(asked, status, [_part(text)])], last)


async def _response_events(asked: _Asked, pieces: _Pieces) -> _Events:
    number = -1

    def event(kind: str, **content: Any) -> dict[str, Any]:
        nonlocal number
        number += 1
        return {"type": f"response.{kind}", "sequence_number": number, **content}

    here = {"item_id": f"msg_{asked.number}", "output_index": 0, "content_index": 0}
    for kind in ("created", "in_progress"):
        yield event(kind, response=_response(asked, "in_progress", []))
    yield event("output_item.added", output_index=0, item=_item(asked, "in_progress", []))
    yield event("content_part.added", **here, part=_part(""))
    texts: list[str] = []
    async for last in pieces:
        texts.append(last.text)
        if last.text:
            yield event("output_text.delta", **here, delta=last.text, logprobs=[])
    whole = _response_whole(asked, "".join(texts), last)
    yield event("output_text.done", **here, text="".join(texts), logprobs=[])
    yield event("content_part.done", **here, part=_part("".join(texts)))
    yield event("output_item.done", output_index=0, item=whole["output"][0])
    yield event(whole["status"], response=whole)


def _said(body: Mapping[str, Any]) -> Sequence[Turn]:
    given = body.get("input")
    messages = [{"role": "user", "content": given}] if isinstance(given, str) else given or []
    if any(item.get("type", "message") != "message" for item in messages):
        raise RequestInvalid("an input of messages", value="input", remedy=_REMEDY)
    return _turns(messages, "input", system=body.get("instructions"))


# --- messages


def _stop_reason(asked: _Asked, last: Piece) -> dict[str, Any]:
    reason = "stop_sequence" if asked.stop.found else {"stop": "end_turn", "length": "max_tokens"}[last.finish_reason or "stop"]
    return {"stop_reason": reason, "stop_sequence": asked.stop.found}


def _message(asked: _Asked, content: Sequence[Mapping[str, Any]], usage: Mapping[str, int], **end: Any) -> dict[str, Any]:
    about = {"id": f"msg_{asked.number}", "type": "message", "role": "assistant", "model": asked.model}
    return {**about, "content": list(content), "stop_reason": None, "stop_sequence": None, **end, "usage": dict(usage)}


def _message_whole(asked: _Asked, text: str, last: Piece) -> dict[str, Any]:
    usage = {"input_tokens": last.prompt_tokens, "output_tokens": last.completion_tokens}
    return _message(asked, [{"type": "text", "text": text}], usage, **_stop_reason(asked, last))


async def _message_events(asked: _Asked, pieces: _Pieces) -> _Events:
    last = await anext(pieces)
    yield {"type": "message_start", "message": _message(asked, [], {"input_tokens": last.prompt_tokens, "output_tokens": 0})}
    yield {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    while True:
        if last.text:
            yield {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": last.text}}
        if last.finish_reason is not None:
            break
        last = await anext(pieces)
    yield {"type": "content_block_stop", "index": 0}
    yield {"type": "message_delta", "delta": _stop_reason(asked, last), "usage": {"output_tokens": last.completion_tokens}}
    yield {"type": "message_stop"}


_FORMS: Mapping[str, _Form] = {
    CHAT: _Form(
        fields=frozenset(("messages", "stop")),
        prompt=lambda body: _turns(body.get("messages") or [], "messages"),
        whole=_chat_whole,
        events=_chat_events,
        done=True,
    ),
    COMPLETIONS: _Form(fields=frozenset(("prompt", "stop")), prompt=_bare, whole=_completion_whole, events=_completion_events, done=True),
    RESPONSES: _Form(fields=frozenset(("input", "instructions")), prompt=_said, whole=_response_whole, events=_response_events),
    MESSAGES: _Form(
        fields=frozenset(("messages", "system", "stop_sequences")),
        prompt=lambda body: _turns(body.get("messages") or [], "messages", system=body.get("system")),
        whole=_message_whole,
        events=_message_events,
    ),
}
