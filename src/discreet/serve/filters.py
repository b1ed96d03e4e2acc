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

Before a value is put back, `leaks` stops what the model may not say of its own.

Does not cover: what no detector finds; placeholders that the model misspells (they stay as they are).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, final

from discreet.deid.detect import Span, leaves_none, spellings
from discreet.deid.operators import canonical
from discreet.deid.patterns import Label
from discreet.deid.policy import Policy, Redacted, builtin, find, protect, redact
from discreet.deid.vault import ALPHABET, CODE_CHARS, MAX_PLACEHOLDER_CHARS, PLACEHOLDER, Vault
from discreet.errors import RequestInvalid
from discreet.keys import Key
from discreet.record import Sensitive
from discreet.serve.leaks import Guard, LeakStop, squeeze

MAX_VALUES = 1000
"""Most different identifiers in one conversation."""

POLICY = builtin("prompt")
GUARD = Guard()

_SHORTEST_WORD = 4
_JOINTS = re.compile(r"[_.\-/]+|(?<=[a-z])(?=[A-Z])")


@final
class Conversation:
    """One request's table of placeholders, in memory, under a key of its own that nothing else ever derives again."""

    def __init__(self, key: Key, *, policy: Policy = POLICY, guard: Guard = GUARD) -> None:
        """Opens an empty table.

        Args:
            key: of the gateway, or of one of its tenants; the table's key is derived from it and a fresh random name.
            policy: of the channel prompt.
            guard: what the model may not say of its own.
        """
        self._name = Key.random().mac(b"conversation").hex()
        self._vault = Vault(key, self._name, policy=policy.name)
        self._stand_ins = key.derive("stand-ins", self._name) if policy.needs_key else None
        self._policy, self._guard = policy, guard
        self._known: Sensitive[Mapping[str, Sequence[str]]] = Sensitive({})
        self._sought: Sensitive[Mapping[str, Label]] = Sensitive({})
        self._words: Sensitive[frozenset[str]] = Sensitive(frozenset())
        self._read: Sensitive[dict[str, tuple[Span, ...]]] = Sensitive({})
        self._named: Sensitive[dict[str, str]] = Sensitive({})
        self._shown: Sensitive[list[str]] = Sensitive([])
        self.counts: Counter[str] = Counter()
        self.stopped: Counter[str] = Counter()

    def learn(self, texts: Sequence[str]) -> None:
        """Finds the identifiers of all texts of the request, so that each is replaced in all of them.

        Raises:
            RequestInvalid: when there are more than `MAX_VALUES` different ones.
        """
        known = self._found(texts)
        people = (part for name in known.get(Label.PERSON, ()) for part in name.split())
        values = [*people, *(value for values in known.values() for value in values)]
        self._known = Sensitive(known)
        self._sought = Sensitive(spellings(known))
        self._words = Sensitive(frozenset(word for value in values if len(word := canonical(value)) >= _SHORTEST_WORD))

    def _found(self, texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """Returns label -> values found in any of the texts, so that each is found in all."""
        found: dict[str, dict[str, None]] = {}
        for text in texts:
            for span in self._spans(text):
                found.setdefault(span.label, {})[text[span.start : span.end]] = None
        if sum(map(len, found.values())) > MAX_VALUES:  # the second pass looks for each of them in each text
            rule = f"at most {MAX_VALUES} different identifiers in a conversation"
            raise RequestInvalid(rule, value="messages", remedy="Send a shorter conversation.")
        return {label: tuple(values) for label, values in found.items()}

    def _spans(self, text: str) -> tuple[Span, ...]:
        """Returns what the text gives away by itself; read once in a request, however often it stands there."""
        read = self._read.reveal()
        if text not in read:
            read[text] = tuple(find(text, names=self._policy.names))
        return read[text]

    def text(self, text: str) -> str:
        """Returns the text with placeholders in place of identifiers; call `learn` first. It is read again only where a value of another text may stand uncovered."""
        spans = self._spans(text)
        if leaves_none(text, spans, self._sought.reveal()):
            redacted = protect(text, self._vault, policy=self._policy, key=self._stand_ins, found=spans)
        else:
            redacted = protect(text, self._vault, policy=self._policy, key=self._stand_ins, known=self._known.reveal())
        return self._counted(redacted)

    def labelled(self, text: str) -> str:
        """Returns the text with labels in place of identifiers: what it becomes depends on nothing else in the request."""
        redacted = redact(text, "label", found=self._spans(text))
        return self._counted(redacted)

    def _counted(self, redacted: Redacted) -> str:
        self.counts.update(str(span.label) for span in redacted.spans)
        self._shown.reveal().append(redacted.text)
        return redacted.text

    def name(self, name: str) -> str:
        """Returns the name of a tool or a field, or, where an identifier is part of it, a placeholder for the whole name in the letters that names may have."""
        named = self._named.reveal()
        if name not in named:
            named[name] = self._renamed(name)
        return named[name]

    def _renamed(self, name: str) -> str:
        same = canonical(name)
        spoken = _JOINTS.sub(" ", name)
        if not any(word in same for word in self._words.reveal()) and self.text(name) == name and (spoken == name or self.text(spoken) == spoken):
            return name
        return self._vault.issue(Label.PERSON, name).strip("<>")

    def restore(self, text: str) -> str:
        """Returns a text of the answer with the values of this conversation, in one pass, after what the model may not say was stopped.

        Raises:
            LeakStopped: when the answer must not leave.
        """
        guarded = self.guarded()
        return self._vault.restore(guarded.feed(text) + guarded.close())

    def restorer(self) -> Growing:
        """Returns what does the same for a string that grows; call it after `learn` and `text`."""
        return _Guarded(self.guarded(), Restorer(self._vault, self._name))

    def guarded(self) -> LeakStop:
        """Returns what only stops, for a string that keeps its placeholders."""
        return LeakStop(self._guard, issued=lambda found: self._vault.restore_one(found) is not None, said=self._said, counts=self.stopped)

    def _said(self, value: str) -> bool:
        """Says whether the request, as the model saw it, holds a value."""
        shown = self._shown.reveal()
        if len(shown) > 1:
            shown[:] = ["".join(map(squeeze, shown))]
        return squeeze(value) in "".join(map(squeeze, shown))


def prepare(policy: Policy = POLICY) -> None:
    """Builds what the filters need once in a process (some seconds), so that no caller waits for it."""
    conversation = Conversation(Key.random(), policy=policy)
    text = "Nothing is in here. " * 20 + "Seen 4 times."  # long enough, and with a digit, so that every filter reads it
    conversation.learn([text])
    conversation.restore(conversation.text(text))


class Growing(Protocol):
    """A string of an answer that arrives in pieces."""

    def feed(self, text: str) -> str:
        """Returns what is certain by now."""
        ...

    def close(self) -> str:
        """Returns the rest."""
        ...


@final
class _Guarded:
    """First what must not be said, then the values: a restored value is the caller's own, and is not read again."""

    def __init__(self, stop: LeakStop, restorer: Restorer) -> None:
        self._stop, self._restorer = stop, restorer

    def feed(self, text: str) -> str:
        return self._restorer.feed(self._stop.feed(text))

    def close(self) -> str:
        return self._restorer.feed(self._stop.close()) + self._restorer.close()


def _beginning() -> re.Pattern[str]:
    """Matches an end of text that may still become (or become more of) a placeholder: every proper beginning of what `PLACEHOLDER` matches."""
    code = rf"(?:[{ALPHABET}]{{1,{CODE_CHARS}}}(?:[*_`]{{1,2}})?(?:&|&g|&gt|\\)?)?"
    rest = rf"(?:\\{{0,2}}(?:[_ -]{{1,2}}{code})?)?"
    labels = []
    for label in Label:
        nested = rest
        for character in reversed(label):
            nested = rf"(?:\\{{0,2}}[_ -]{nested}|\\{{1,2}})?" if character == "_" else f"(?:{character}{nested})?"
        labels.append(nested.removesuffix("?"))
    opening = r"(?:<|&lt;|\\<|\[|\{|\()?[*_`]{0,2}"
    return re.compile(rf"(?:&|&l|&lt|\\|{opening}(?:(?<![A-Za-z0-9])(?:{'|'.join(labels)}))?)\Z", PLACEHOLDER.flags)


_BEGINNING = _beginning()


@final
class Restorer:
    """Puts the values of one conversation back into a stream of text; the pieces add up to `vault.restore` of the whole."""

    def __init__(self, vault: Vault, conversation: str) -> None:
        """Starts a stream.

        Args:
            vault: the placeholders.
            conversation: whose they must be; placeholders of another conversation are left as they are.
        """
        self._vault = vault if vault.conversation == conversation else Vault(Key.random(), conversation)
        self._held = ""
        self._before = 0  # characters of the held text that are out already: one, kept for the expression to look back at

    def feed(self, text: str) -> str:
        """Returns what is certain by now; the rest, at most `MAX_PLACEHOLDER_CHARS`, is held back."""
        self._held += text
        return self._release(ended=False)

    def close(self) -> str:
        """Returns what was held back, at the end of the stream."""
        return self._release(ended=True)

    def _release(self, *, ended: bool) -> str:
        released, at = [], self._before
        open_at = self._undecided(at, ended=ended)
        while (match := PLACEHOLDER.search(self._held, at)) and match.start() < open_at:
            value = self._vault.restore_one(match.group())
            released += [self._held[at : match.start()], match.group() if value is None else value]
            at = match.end()
            open_at = self._undecided(at, ended=ended)
        released.append(self._held[at:open_at])
        self._before = min(open_at, 1)
        self._held = self._held[open_at - self._before :]
        return "".join(released)

    def _undecided(self, start: int, *, ended: bool) -> int:
        """The first place from `start` on at which a placeholder may have begun that more text could complete or prolong; the end where there is none."""
        begun = None if ended else _BEGINNING.search(self._held, max(start, len(self._held) - MAX_PLACEHOLDER_CHARS))
        return len(self._held) if begun is None else begun.start()


_PLAIN, _ESCAPE, _HALF_ESCAPE = (
    re.compile(r'[^"\\]+'),
    re.compile(r"\\(?:u[0-9a-fA-F]{4}|[^u]|u(?![0-9a-fA-F]{0,3}\Z))", re.DOTALL),
    re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z"),
)
_SURROGATE = re.compile(r"[\ud800-\udfff]")


@final
class JsonRestorer:
    """Filters the strings of JSON that arrives in pieces (the arguments of a tool call): values are escaped, so that the JSON stays the JSON it was.

    Only what stands within quotes is restored. Escapes are read before a placeholder is looked for (`\\u003cPERSON_...`), and half an escape waits for its rest. JSON that
    is not valid stays as it is outside its strings.
    """

    def __init__(self, start: Callable[[], Growing]) -> None:
        """Takes what makes the filter of one string: `Conversation.restorer`, or `Conversation.guarded` where placeholders stay."""
        self._start = start
        self._inner: Growing | None = None
        self._held = ""

    def feed(self, text: str) -> str:
        """Returns what is certain by now."""
        self._held += text
        out: list[str] = []
        at = 0
        while at < len(self._held):
            if self._inner is None:
                quote = self._held.find('"', at)
                end = len(self._held) if quote < 0 else quote + 1
                out.append(self._held[at:end])
                self._inner = None if quote < 0 else self._start()
                at = end
            elif _HALF_ESCAPE.match(self._held, at):
                break
            elif self._held[at] == '"':
                out.append(_quoted(self._inner.close()) + '"')
                self._inner, at = None, at + 1
            else:
                match = _PLAIN.match(self._held, at) or _ESCAPE.match(self._held, at)
                unit = self._held[at] if match is None else match.group()
                out.append(_quoted(self._inner.feed(_unescaped(unit))))
                at += len(unit)
        self._held = self._held[at:]
        return "".join(out)

    def close(self) -> str:
        """Returns what was held back, at the end of the stream."""
        rest = "" if self._inner is None else _quoted(self._inner.close())
        rest, self._held, self._inner = rest + self._held, "", None
        return rest


def _unescaped(unit: str) -> str:
    if not unit.startswith("\\"):
        return unit
    try:
        return str(json.loads(f'"{unit}"', strict=False))
    except ValueError:
        return unit


def _quoted(text: str) -> str:
    """Returns the text as it stands between the quotes of a JSON string."""
    return _SURROGATE.sub(lambda match: f"\\u{ord(match.group()):04x}", json.dumps(text, ensure_ascii=False)[1:-1])
