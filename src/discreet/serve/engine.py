"""Tokens from a model: one Protocol of one method, and the engine that runs a local model.

An engine sees de-identified turns and sampling parameters, nothing else: no caller, no stop strings of the caller (they can hold identifiers; the gateway applies them
to the restored answer), no placeholder table.

`LocalEngine` decodes with a key-value cache on one worker thread, one answer at a time, behind a bounded queue; the cache dies with its request, so no request can time
another's prefix (PITFALLS 29). A caller that goes away is noticed before the next token. Text leaves only at character borders: bytes of an unfinished character wait for
their rest.

Temperature sampling inverts the cumulative distribution at uniforms drawn from `keys.Stream`: equal seeds under one key give equal answers, and no seed gives the
operating system's randomness.

Does not cover: batching of concurrent requests, upstream engines, speculative decoding.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, final

from discreet.errors import DiscreetError, OperationFailed, Overloaded, RequestInvalid
from discreet.keys import Key, Stream

if TYPE_CHECKING:  # torch is the model's dependency; a gateway in front of another engine starts without it
    import torch

Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]

_PLAIN_STOPS = ("\nUser:", "\nSystem:")
_REPLACEMENT = "\ufffd"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One message after the filters; `text` is hidden from `repr` all the same."""

    role: Role
    text: str = field(repr=False)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are chosen.

    Args:
        temperature: 0 (greedy) to 2.
        top_p: mass of the nucleus, in (0, 1].
        max_new_tokens: at least 1.
        seed: any integer for a repeatable answer; None for a fresh one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 2:
            raise RequestInvalid("0 <= temperature <= 2", value="temperature")
        if not 0 < self.top_p <= 1:
            raise RequestInvalid("0 < top_p <= 1", value="top_p")
        if self.max_new_tokens < 1:
            raise RequestInvalid("max_tokens >= 1", value="max_tokens")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """A piece of an answer. The last one, and only the last, has a `finish_reason`; token counts are those so far."""

    text: str = field(repr=False)
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None = None


class Engine(Protocol):
    """Whatever turns a conversation into text."""

    def generate(self, turns: Sequence[Turn], sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """Yields the answer piece by piece; closing the generator stops the work.

        Raises:
            Overloaded: when the queue is full.
            RequestInvalid: when the conversation does not fit the model.
            OperationFailed: when the model fails; the message holds no text of the conversation.
        """
        ...


@final
class StopAt:
    """Cuts a stream at the first stop string to be completed, which does not appear; the same for every way to cut the stream into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """Returns what is certain not to belong to a stop string; nothing after a hit."""
        if self.hit:
            return ""
        self._held += text
        ends = [(at + len(stop), -len(stop)) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            end, minus_length = min(ends)
            self.hit = True
            return self._release(end + minus_length)
        return self._release(len(self._held) - self._pending())

    def close(self) -> str:
        """Returns what was held back, at the end of the stream."""
        return "" if self.hit else self._release(len(self._held))

    def _pending(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        sizes = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(self._held[-n:]) for stop in self._stops)), 0)

    def _release(self, count: int) -> str:
        released, self._held = self._held[:count], self._held[count:]
        return released


@final
class Detokenizer:
    """Token ids to text, one at a time, cut only where a character is complete; the pieces add up to the text of all ids decoded at once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._context = 0  # ids before the unread ones that the decoder needs to see (a leading space depends on its neighbour)
        self._read = 0

    def feed(self, token: int) -> str:
        """Returns the text that this token completes, often nothing."""
        self._ids.append(token)
        text = self._unread()
        if not text or text.endswith(_REPLACEMENT):
            return ""
        self._context, self._read = self._read, len(self._ids)
        return text

    def close(self) -> str:
        """Returns the rest, an unfinished character included (as U+FFFD)."""
        text = self._unread()
        self._context = self._read = len(self._ids)
        return text

    def _unread(self) -> str:
        known = self._decode(self._ids[self._context : self._read])
        return self._decode(self._ids[self._context :])[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@final
class LocalEngine:
    """A causal language model in this process."""

    def __init__(self, module: torch.nn.Module, tokenizer: Any, *, key: Key, max_waiting: int = 8) -> None:
        """Takes over the model for inference.

        Args:
            module: a transformers causal language model, with or without a PEFT adapter.
            tokenizer: its tokenizer; the chat template, where it has one, is used.
            key: from which the randomness of seeded requests derives.
            max_waiting: requests that may wait for the one being answered.
        """
        self._module = module.eval()
        self._tokenizer = tokenizer
        self._key = key
        self._max_waiting = max_waiting
        self._in_flight = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="discreet-engine")
        self._max_context = int(self._module.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]  # torch types every attribute as Tensor | Module
        self._ends = _end_tokens(module, tokenizer)
        self._controls = _control_strings(tokenizer)

    async def generate(self, turns: Sequence[Turn], sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """See `Engine.generate`."""
        if self._in_flight > self._max_waiting:
            raise Overloaded(f"at most {self._max_waiting} waiting requests", remedy="Try again shortly.")
        self._in_flight += 1
        cancelled = threading.Event()
        try:
            pieces = _Pipe(asyncio.get_running_loop())
            self._worker.submit(pieces.fill, lambda: self._decode(turns, sampling, cancelled))
            while (piece := await pieces.next()) is not None:
                yield piece
        finally:
            cancelled.set()
            self._in_flight -= 1

    def close(self) -> None:
        """Ends the worker thread once it is idle."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _decode(self, turns: Sequence[Turn], sampling: Sampling, cancelled: threading.Event) -> Iterator[Piece]:
        """Prefill, then one token after another, on the worker thread."""
        if cancelled.is_set():
            return
        step, cache, uniforms = self._prompt(turns), None, self._uniforms(sampling.seed)
        num_prompt = len(step)
        limit = min(sampling.max_new_tokens, self._max_context - num_prompt)
        words, stop = Detokenizer(self._tokenizer), StopAt(() if self._tokenizer.chat_template else _PLAIN_STOPS)
        reason: FinishReason = "length"
        count = 0
        while count < limit and not cancelled.is_set():
            logits_V, cache = self._forward(step, cache)
            token = _choose(logits_V, sampling, uniforms)
            if token in self._ends:
                reason = "stop"
                break
            count, step = count + 1, [token]
            yield Piece(text=stop.feed(words.feed(token)), prompt_tokens=num_prompt, completion_tokens=count)
            if stop.hit:
                break
        rest = stop.feed(words.close()) + stop.close()
        yield Piece(text=rest, prompt_tokens=num_prompt, completion_tokens=count, finish_reason="stop" if stop.hit else reason)

    def _forward(self, ids: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
        import torch

        with torch.inference_mode():
            device = next(self._module.parameters()).device
            answer = self._module(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True)
            return answer.logits[0, -1].double().cpu(), answer.past_key_values

    def _prompt(self, turns: Sequence[Turn]) -> list[int]:
        messages = [{"role": turn.role, "content": self._controls.sub(_defuse, turn.text)} for turn in turns]
        ids = self._render(messages)
        if len(ids) >= self._max_context:
            raise RequestInvalid(f"a conversation of fewer than {self._max_context} tokens", value="messages", remedy="Send a shorter conversation.")
        return ids

    def _render(self, messages: list[dict[str, str]]) -> list[int]:
        if self._tokenizer.chat_template:
            try:
                text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            except Exception:  # a template raises what it likes, and may quote the conversation
                raise RequestInvalid("an order of roles that the model's chat template accepts", value="messages") from None
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        lines = [f"{message['role'].capitalize()}: {message['content']}\n" for message in messages]
        return list(self._tokenizer("".join(lines) + "Assistant:")["input_ids"])

    def _uniforms(self, seed: int | None) -> Stream:
        key = Key.random() if seed is None else self._key.derive("seed", seed)
        return key.stream("tokens")


@final
class _Pipe:
    """Carries pieces from the worker thread to the event loop; what the worker raises is raised there, without its text."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._queue: asyncio.Queue[Piece | DiscreetError | None] = asyncio.Queue()

    def fill(self, source: Callable[[], Iterator[Piece]]) -> None:
        try:
            for piece in source():
                self._put(piece)
            self._put(None)
        except DiscreetError as error:
            self._put(error)
        except Exception as error:  # any other message may quote the conversation: only its kind travels
            self._put(OperationFailed("the model to answer", value=type(error).__name__))

    def _put(self, item: Piece | DiscreetError | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def next(self) -> Piece | None:
        item = await self._queue.get()
        if isinstance(item, DiscreetError):
            raise item
        return item


def _choose(logits_V: torch.Tensor, sampling: Sampling, uniforms: Stream) -> int:
    """Greedy, or the inverse of the nucleus' cumulative distribution at one uniform. V: vocabulary."""
    import torch

    if bool(torch.isnan(logits_V).any()):
        raise OperationFailed("a model whose output is a number", value="NaN")
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    sorted_V, order_V = torch.softmax(logits_V / sampling.temperature, dim=-1).sort(descending=True)
    sums_V = sorted_V.cumsum(-1)
    size = 1 + int((sums_V < sampling.top_p).sum())  # the smallest set whose mass reaches top_p
    nucleus = sums_V[:size]
    at = torch.searchsorted(nucleus, _uniform(uniforms) * nucleus[-1], right=True)
    return int(order_V[min(int(at), len(nucleus) - 1)])


def _uniform(stream: Stream) -> float:
    """Returns a uniform in [0, 1) with 53 random bits."""
    return (int.from_bytes(stream.bytes(8), "little") >> 11) * 2.0**-53


def _end_tokens(module: torch.nn.Module, tokenizer: Any) -> frozenset[int]:
    """The tokens after which nothing of this answer comes: end of text, and every control token, which can only close this turn or open another."""
    configured = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    control = [number for number, token in tokenizer.added_tokens_decoder.items() if token.special]
    return frozenset(int(end) for end in [*listed, *tokenizer.all_special_ids, *control] if end is not None)


def _control_strings(tokenizer: Any) -> re.Pattern[str]:
    """Matches the spelling of every control token: typed by a caller, it would open or close a turn of the chat template."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special} | set(tokenizer.all_special_tokens)
    spelled = sorted((re.escape(token) for token in special if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(spelled) or r"(?!)")


def _defuse(match: re.Match[str]) -> str:
    return f"{match.group()[0]} {match.group()[1:]}"
