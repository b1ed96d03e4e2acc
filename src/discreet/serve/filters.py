"""What may enter the model and what may leave it: prompts are de-identified, answers are restored for the caller who sent the values.

    caller's text ── detect ──> placeholders ──> model ──> placeholders ── restore ──> caller's text
                        └────── vault of this conversation ──────┘

A `Conversation` is one request: the caller of chat completions sends the whole history every time, so the table of placeholders is made anew from it, in the order of
appearance, and the same history gives the same placeholders. Two passes: what is found anywhere in the conversation is replaced everywhere in it, also where it stands
without the context that gave it away. Text that already looks like a placeholder is given one of its own, so that it comes back as it was typed and never as another's value.

The `Restorer` replaces, in one pass from left to right, the longest placeholder at each place. It holds back only what may still become a placeholder (at most the longest
one, less a character), so a stream is never buffered whole, and the result is the same for every way to cut it. A restored value is not looked at again. Only placeholders that this
conversation issued are known to it.

Fail closed: an exception here reaches the gateway, which answers with an error; there is no way to get text out of this module that has not passed it.

Does not cover: what no detector finds; placeholders that the model misspells (they stay as they are); identifiers that the model makes up or remembers.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

from discreet.deid import policy
from discreet.deid.detect import Span, detect
from discreet.deid.vault import Vault
from discreet.keys import Key
from discreet.record import Digest
from discreet.serve.engine import Role, Turn
from discreet.serve.wire import Message

_ROLES: Mapping[str, Role] = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

POLICY = policy.BUILT_IN["prompt"]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A conversation that may be shown to the model: placeholders in place of identifiers. `counts` maps label to number of spans replaced."""

    turns: tuple[Turn, ...]
    policy: Digest
    counts: Mapping[str, int]


@final
class Conversation:
    """One request's table of placeholders, in memory, under a key of its own that nothing else ever derives again."""

    def __init__(self, key: Key) -> None:
        """Opens an empty table.

        Args:
            key: of the gateway; the table's key is derived from it and a fresh random name.
        """
        self._name = Key.random().mac(b"conversation").hex()
        self._vault = Vault(key.derive("conversation", self._name))

    def deidentify(self, messages: Sequence[Message]) -> Prompt:
        """Returns the conversation as the model may see it."""
        texts = [message.text for message in messages]
        known = _known(texts)
        counts: Counter[str] = Counter()
        turns = []
        for message, text in zip(messages, texts, strict=True):
            spans = detect(text, known=known)
            counts.update(str(span.label) for span in spans)
            turns.append(Turn(role=_ROLES[message.role], text=self._replace(text, spans)))
        return Prompt(turns=tuple(turns), policy=POLICY.digest, counts=dict(counts))

    def _replace(self, text: str, spans: Sequence[Span]) -> str:
        parts, at = [], 0
        for span in spans:
            parts += [text[at : span.start], self._vault.issue(self._name, span.label, text[span.start : span.end])]
            at = span.end
        return "".join([*parts, text[at:]])

    def restorer(self) -> Restorer:
        """Returns what restores the answer; call it after `deidentify`."""
        return Restorer(self._vault, self._name)


def _known(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Returns label -> values found in any of the texts, so that each is found in all."""
    found: dict[str, dict[str, None]] = {}
    for text in texts:
        for span in detect(text):
            found.setdefault(span.label, {})[text[span.start : span.end]] = None
    return {label: tuple(values) for label, values in found.items()}


@final
class Restorer:
    """Puts the values of one conversation back into a stream of text."""

    def __init__(self, vault: Vault, conversation: str) -> None:
        self._values = dict(vault.values(conversation))
        self._pattern = re.compile("|".join(map(re.escape, sorted(self._values, key=len, reverse=True))) or r"(?!)")
        self._beginnings = frozenset(placeholder[:size] for placeholder in self._values for size in range(1, len(placeholder)))
        self._longest = max(map(len, self._values), default=0)
        self._held = ""

    def feed(self, text: str) -> str:
        """Returns what is certain by now; the rest, shorter than the longest placeholder, is held back."""
        self._held += text
        return self._release(ended=False)

    def close(self) -> str:
        """Returns what was held back, at the end of the stream."""
        return self._release(ended=True)

    def _release(self, *, ended: bool) -> str:
        released, at = [], 0
        open_at = len(self._held) if ended else self._undecided(at)
        while (match := self._pattern.search(self._held, at)) and match.start() < open_at:
            released += [self._held[at : match.start()], self._values[match.group()]]
            at = match.end()
            open_at = len(self._held) if ended else self._undecided(at)
        released.append(self._held[at:open_at])
        self._held = self._held[open_at:]
        return "".join(released)

    def _undecided(self, start: int) -> int:
        """The first place from `start` on whose text, up to the end, begins a placeholder and is not yet one; the end where there is none."""
        places = range(max(start, len(self._held) - self._longest + 1), len(self._held))
        return next((place for place in places if self._held[place:] in self._beginnings), len(self._held))
