"""Tokens from a model: one Protocol of one method, and the engine that runs a local model.

An engine sees de-identified turns (or a bare text) and sampling parameters, nothing else: no caller, no stop strings of the caller, no placeholder table.

`LocalEngine` decodes with a key-value cache on one worker thread, behind a bounded queue, in continuous batches: a new answer joins those that are under way after its prompt was read,
block by block between their tokens, and leaves when it ends. An answer's rows of the cache die with it and are never another's prefix (PITFALLS 29). A caller that goes away is noticed
before the next token. Text leaves only at character borders: bytes of an unfinished character wait for
their rest.

Temperature sampling inverts the cumulative distribution at uniforms drawn from `keys.Stream`: equal seeds under one key give equal answers, and no seed gives the
operating system's randomness; an answer that others accompany has the same logits up to rounding.

Does not cover: batches of models whose cache forgets (sliding windows), upstream engines, speculative decoding.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, final

from discreet.errors import DiscreetError, OperationFailed, Overloaded, RequestInvalid
from discreet.keys import Key, Stream

if TYPE_CHECKING:  # torch is the model's dependency; a gateway in front of another engine starts without it
    import torch

T = TypeVar("T")
Role = Literal["system", "user", "assistant"]
FinishReason = Literal["stop", "length"]

_PLAIN_STOPS = ("\nUser:", "\nSystem:")
_REPLACEMENT = "\ufffd"

PREFILL = 256
"""Tokens of a new prompt that are read between two tokens of the answers under way."""


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

    def generate(self, prompt: Sequence[Turn] | str, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """Yields the answer piece by piece; closing the generator stops the work.

        Args:
            prompt: the turns of a conversation, or a bare text that is to be continued.
            sampling: how tokens are chosen.

        Raises:
            Overloaded: when the queue is full.
            RequestInvalid: when the conversation does not fit the model.
            OperationFailed: when the model fails; the message holds no text of the conversation.
        """
        ...

    def close(self) -> None:
        """Ends the work; called when nobody is answered any more."""
        ...


@final
class StopAt:
    """Cuts a stream at the first stop string to be completed, which does not appear; the same for every way to cut the stream into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """Returns what is certain not to belong to a stop string; nothing after a hit."""
        if self.found:
            return ""
        self._held += text
        ends = [(at + len(stop), -len(stop)) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if ends:
            end, minus_length = min(ends)
            self.found = self._held[end + minus_length : end]
            return self._release(end + minus_length)
        return self._release(len(self._held) - self._pending())

    def close(self) -> str:
        """Returns what was held back, at the end of the stream."""
        return "" if self.found else self._release(len(self._held))

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
@dataclass(slots=True, kw_only=True)
class _Running:
    """One answer under way, on the worker thread. `cached` tokens of it are in the cache; `last` is the one that is not yet."""

    pieces: _Pipe
    sampling: Sampling
    uniforms: Stream
    cancelled: threading.Event
    words: Detokenizer
    stop: StopAt
    todo: list[int]
    limit: int
    num_prompt: int
    cache: Any = None
    cached: int = 0
    count: int = 0
    last: int = 0


@final
class LocalEngine:
    """A causal language model in this process."""

    def __init__(self, module: torch.nn.Module, tokenizer: Any, *, key: Key, max_waiting: int = 16, max_batch: int = 16) -> None:
        """Takes over the model for inference.

        Args:
            module: a transformers causal language model, with or without a PEFT adapter.
            tokenizer: its tokenizer; the chat template, where it has one, is used.
            key: from which the randomness of seeded requests derives.
            max_waiting: requests that may wait for those being answered.
            max_batch: requests that are answered at once, >= 1.
        """
        self._module = module.eval()
        self._tokenizer = tokenizer
        self._key = key
        self._max_waiting, self._max_batch = max_waiting, max_batch
        self._in_flight = 0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="discreet-engine")
        self._arrivals: deque[tuple[Sequence[Turn] | str, Sampling, threading.Event, _Pipe]] = deque()
        self._lock, self._at_work = threading.Lock(), False
        self._max_context = int(self._module.config.max_position_embeddings)  # type: ignore[union-attr, arg-type]  # torch types every attribute as Tensor | Module
        self._ends = _end_tokens(module, tokenizer)
        self._controls = _control_strings(tokenizer)

    async def generate(self, prompt: Sequence[Turn] | str, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """See `Engine.generate`."""
        if self._in_flight >= self._max_batch + self._max_waiting:
            raise Overloaded(f"at most {self._max_waiting} waiting requests", remedy="Try again shortly.")
        self._in_flight += 1
        cancelled = threading.Event()
        try:
            pieces = _Pipe(asyncio.get_running_loop())
            with self._lock:
                self._arrivals.append((prompt, sampling, cancelled, pieces))
                idle, self._at_work = not self._at_work, True
            if idle:
                self._worker.submit(self._work)
            while (piece := await pieces.next()) is not None:
                yield piece
        finally:
            cancelled.set()
            self._in_flight -= 1

    def close(self) -> None:
        """Ends the worker thread once it is idle."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    def _work(self) -> None:
        """Answers until nobody waits: one block of a new prompt, then one token for everybody, and again."""
        joining: list[_Running] = []
        batch = _Batch()
        while True:
            with self._lock:
                arrived = [self._arrivals.popleft() for _ in range(min(len(self._arrivals), self._max_batch - len(batch.rows) - len(joining)))]
                self._at_work = bool(arrived or joining or batch.rows)
                if not self._at_work:
                    return
            for prompt, sampling, cancelled, pieces in arrived:
                if (running := pieces.attempt(partial(self._start, prompt, sampling, cancelled, pieces))) is not None:
                    joining.append(running)
            if joining and self._prefill(joining[0]):
                joined = joining.pop(0)
                if not joined.pieces.ended:
                    self._together(batch, lambda joined=joined: batch.join(joined))  # type: ignore[misc]  # mypy infers no type for a default of a lambda
            if batch.rows:
                self._together(batch, lambda: self._step(batch))

    def _together(self, batch: _Batch, work: Callable[[], None]) -> None:
        """Does what concerns all; when it fails, it fails for each of them."""
        try:
            work()
        except Exception as error:
            for row in batch.rows:
                row.pieces.fail(error)
            batch.rows, batch.cache = [], None

    def _start(self, prompt: Sequence[Turn] | str, sampling: Sampling, cancelled: threading.Event, pieces: _Pipe) -> _Running | None:
        if cancelled.is_set():
            pieces.end()
            return None
        ids = self._prompt(prompt)
        return _Running(
            pieces=pieces,
            sampling=sampling,
            uniforms=self._uniforms(sampling.seed),
            cancelled=cancelled,
            words=Detokenizer(self._tokenizer),
            stop=StopAt(() if self._tokenizer.chat_template or isinstance(prompt, str) else _PLAIN_STOPS),
            todo=ids,
            limit=min(sampling.max_new_tokens, self._max_context - len(ids)),
            num_prompt=len(ids),
        )

    def _prefill(self, row: _Running) -> bool:
        """Reads a block of a prompt; returns whether the row is through with it, or has ended."""
        block, row.todo = row.todo[:PREFILL], row.todo[PREFILL:]
        logits_V = None if row.cancelled.is_set() else row.pieces.attempt(lambda: self._read(row, block))
        if logits_V is None:
            row.pieces.end()
        elif not row.todo:
            row.pieces.attempt(lambda: self._advance(row, logits_V))
        return row.pieces.ended or not row.todo

    def _read(self, row: _Running, block: list[int]) -> torch.Tensor:
        logits_V, row.cache = self._forward(block, row.cache)
        row.cached += len(block)
        return logits_V

    def _step(self, batch: _Batch) -> None:
        """One token for every row."""
        for row in batch.rows:
            if row.cancelled.is_set():
                row.pieces.end()
        batch.leave()
        if not batch.rows:
            return
        if len(batch.rows) == 1:
            logits_V, batch.cache = self._forward([batch.rows[0].last], batch.cache)
            logits: Sequence[torch.Tensor] = [logits_V]
        else:
            logits = list(self._forward_all(batch))
        for row, logits_V in zip(batch.rows, logits, strict=True):
            row.cached += 1
            row.pieces.attempt(partial(self._advance, row, logits_V))
        batch.leave()

    def _advance(self, row: _Running, logits_V: torch.Tensor) -> None:
        """Takes the next token of one row, and ends it where it ends."""
        token = _choose(logits_V, row.sampling, row.uniforms)
        reason: FinishReason = "length"
        if token in self._ends:
            reason = "stop"
        else:
            row.count, row.last = row.count + 1, token
            row.pieces.put(Piece(text=row.stop.feed(row.words.feed(token)), prompt_tokens=row.num_prompt, completion_tokens=row.count))
            if not row.stop.found and row.count < row.limit:
                return
        rest = row.stop.feed(row.words.close()) + row.stop.close()
        reason = "stop" if row.stop.found else reason
        row.pieces.put(Piece(text=rest, prompt_tokens=row.num_prompt, completion_tokens=row.count, finish_reason=reason))
        row.pieces.end()

    def _forward_all(self, batch: _Batch) -> torch.Tensor:
        """Returns the logits [B, V] of the next token of each row; rows that are shorter than the longest are padded on the left, and the padding is masked."""
        import torch

        device = next(self._module.parameters()).device
        lengths_B = torch.tensor([row.cached for row in batch.rows], device=device)
        width = int(lengths_B.max()) + 1
        mask_BT = (torch.arange(width, device=device) >= (width - 1 - lengths_B)[:, None]).long()
        with torch.inference_mode():
            answer = self._module(
                input_ids=torch.tensor([[row.last] for row in batch.rows], device=device),
                attention_mask=mask_BT,
                position_ids=lengths_B[:, None],
                past_key_values=batch.cache,
                use_cache=True,
            )
        batch.cache = answer.past_key_values
        return answer.logits[:, -1].double().cpu()  # type: ignore[no-any-return]  # transformers types its output as Any

    def _forward(self, ids: list[int], cache: Any) -> tuple[torch.Tensor, Any]:
        import torch

        with torch.inference_mode():
            device = next(self._module.parameters()).device
            answer = self._module(input_ids=torch.tensor([ids], device=device), past_key_values=cache, use_cache=True)
            return answer.logits[0, -1].double().cpu(), answer.past_key_values

    def _prompt(self, prompt: Sequence[Turn] | str) -> list[int]:
        if isinstance(prompt, str):
            ids = list(self._tokenizer(self._controls.sub(_defuse, prompt))["input_ids"])
        else:
            ids = self._render([{"role": turn.role, "content": self._controls.sub(_defuse, turn.text)} for turn in prompt])
        if not ids:
            raise RequestInvalid("a prompt of at least one token", value="prompt")
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
        self.ended = False

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Returns what some work for this answer gives, or ends the answer with its error."""
        try:
            return work()
        except Exception as error:
            self.fail(error)
        return None

    def fail(self, error: Exception) -> None:
        # any message but our own may quote the conversation: only its kind travels
        self.put(error if isinstance(error, DiscreetError) else OperationFailed("the model to answer", value=type(error).__name__))
        self.ended = True

    def end(self) -> None:
        if not self.ended:
            self.put(None)
        self.ended = True

    def put(self, item: Piece | DiscreetError | None) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def next(self) -> Piece | None:
        item = await self._queue.get()
        if isinstance(item, DiscreetError):
            raise item
        return item


@final
class _Batch:
    """The rows that are decoded together, and the one cache that holds the keys and values of all, each row's at the right."""

    def __init__(self) -> None:
        self.rows: list[_Running] = []
        self.cache: Any = None

    def join(self, row: _Running) -> None:
        """Takes in a row whose prompt has been read."""
        if self.rows:
            width = max(row.cached, *(each.cached for each in self.rows))
            for ours, theirs in zip(_layers(self.cache), _layers(row.cache), strict=True):
                ours.keys = _stacked(ours.keys, theirs.keys, width)
                ours.values = _stacked(ours.values, theirs.values, width)
        else:
            self.cache = row.cache
        row.cache = None
        self.rows.append(row)

    def leave(self) -> None:
        """Lets go of the rows that have ended, and of the columns that none of the others fills."""
        kept = [place for place, row in enumerate(self.rows) if not row.pieces.ended]
        if len(kept) == len(self.rows):
            return
        alone = len(self.rows) == 1
        self.rows = [self.rows[place] for place in kept]
        if not self.rows:
            self.cache = None
        elif not alone:
            width = max(row.cached for row in self.rows)
            for layer in _layers(self.cache):
                layer.keys, layer.values = layer.keys[kept, :, -width:], layer.values[kept, :, -width:]


def _layers(cache: Any) -> Sequence[Any]:
    """Returns the layers of a cache that holds every token.

    Raises:
        OperationFailed: when a layer forgets (sliding windows, states): its rows cannot be padded. `max_batch=1` decodes such a model.
    """
    layers: Sequence[Any] = cache.layers
    if any(type(layer).__name__ != "DynamicLayer" for layer in layers):
        raise OperationFailed("a model whose cache holds every token", value="sliding window", remedy="Open the engine with max_batch=1.")
    return layers


def _stacked(some_BHTD: torch.Tensor, one_1HTD: torch.Tensor, width: int) -> torch.Tensor:
    """Returns both as rows of one tensor of a width, padded with zeros on the left."""
    import torch

    padded = [torch.nn.functional.pad(each, (0, 0, width - each.shape[2], 0)) for each in (some_BHTD, one_1HTD)]
    return torch.cat(padded)


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
