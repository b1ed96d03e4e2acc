"""Reversible placeholders of one conversation: `<PERSON_K7Q2XF3D>` goes to the model, the value stays here, sealed.

Made to survive a model and to resist a guest. The code is seven characters of an HMAC over (label, value) under the conversation's key and a check character, from an
alphabet without 0, 1, I, L and O: 34 bits that cannot be guessed or counted up, and in which every single wrong character and every swap of two neighbours is noticed. The
parser forgives what models do to text (case, brackets, escapes, emphasis, spaces for underscores), and never what would change the code.

Guarantees: only a placeholder that this vault issued is ever restored, one pass at a time, so that a restored value is not read again; the same value has the same placeholder in a
conversation and another one elsewhere; values are kept under AES-256-GCM with conversation, policy, label and code as associated data; a placeholder that a user types is itself
replaced (`escape`), so that it comes back as the characters that were typed (PITFALLS 25).

Does not cover: storage across processes (the gateway builds the vault of a conversation again from the conversation's own messages), and who may ask for restoration, which is the
caller's decision.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import final

from discreet.deid.patterns import Label
from discreet.errors import RequestInvalid
from discreet.keys import Key

ALPHABET = "23456789ABCDEFGHJKMNPQRSTUVWXYZ"
"""31 symbols, a prime number: the weighted check sum then finds every single error and every transposition."""

CODE_CHARS = 8
MAX_PLACEHOLDER_CHARS = 64
"""Longest text that `PLACEHOLDER` matches: what a streaming restorer has to hold back."""

_LABELS = "|".join(re.escape(label).replace("_", r"(?:\\{0,2}[_ -])") for label in sorted(Label, key=len, reverse=True))
_OPEN, _CLOSE = r"(?:<|&lt;|\\<|\[|\{|\()", r"(?:>|&gt;|\\>|\]|\}|\))"
PLACEHOLDER = re.compile(
    rf"(?P<open>{_OPEN})?[*_`]{{0,2}}(?<![A-Za-z0-9])(?P<label>{_LABELS})\\{{0,2}}[_ -]{{1,2}}(?P<code>[{ALPHABET}]{{{CODE_CHARS}}})(?![A-Za-z0-9])[*_`]{{0,2}}(?(open){_CLOSE}?)",
    re.IGNORECASE | re.ASCII,  # without ASCII the Kelvin sign counts as a K and the long s as an S, which the check character does not know
)
"""Finds placeholders in the output of a model or the input of a user, in any of the forms that are understood."""

_CODE = re.compile(rf"[_ -]([{ALPHABET}]{{{CODE_CHARS}}})(?![A-Za-z0-9])", PLACEHOLDER.flags)


@final
@dataclass(frozen=True, slots=True)
class _Kept:
    label: Label
    sealed: bytes


@final
class Vault:
    """The placeholders of one conversation. Not thread-safe; one per request is enough, the same values give the same placeholders.

    Args:
        key: key of the tenant or the subject; forgetting it makes every sealed value unreadable.
        conversation: name of the conversation; placeholders of another one mean nothing here.
        policy: name of the policy under which values were taken in; another one does not open them.
    """

    __slots__ = ("_conversation", "_kept", "_key", "_policy")

    def __init__(self, key: Key, conversation: str, *, policy: str = "prompt") -> None:
        self._policy = policy
        self._key = key.derive("deid/vault", conversation)
        self._conversation = conversation
        self._kept: dict[str, _Kept] = {}

    @property
    def conversation(self) -> str:
        """The name of the conversation."""
        return self._conversation

    def __repr__(self) -> str:
        return f"<vault of {len(self._kept)} values>"

    def __len__(self) -> int:
        return len(self._kept)

    def issue(self, label: Label | str, value: str) -> str:
        """Returns the placeholder of a value, the same at every call.

        Raises:
            RequestInvalid: when the label is not in the closed list.
        """
        if label not in Label.__members__.values():
            raise RequestInvalid("a label of docs/labels.md", value=label)
        kind = Label(label)
        for attempt in range(64):
            code = self._code(kind, value, attempt)
            kept = self._kept.get(code)
            if kept is None:
                self._kept[code] = _Kept(kind, self._key.seal(value.encode("utf-8", "surrogatepass"), context=self._context(kind, code)))
            elif kept.label is not kind or self._open(kept, code) != value:
                continue
            return f"<{kind}_{code}>"
        raise RequestInvalid("fewer values in one conversation", value=len(self._kept))

    def restore_one(self, placeholder: str) -> str | None:
        """Returns the value of a placeholder as a model may have written it, or None when this vault did not issue it."""
        match = PLACEHOLDER.fullmatch(placeholder.strip().strip("*_`"))
        return None if match is None else self._restore(match)

    def restore(self, text: str) -> str:
        """Returns the text with every placeholder of this conversation replaced by its value, in one pass; others stay as they are."""
        return PLACEHOLDER.sub(lambda match: match.group() if (value := self._restore(match)) is None else value, text)

    def escape(self, text: str) -> str:
        """Returns the text with everything that looks like a placeholder replaced by one, whose value is what was typed."""
        pieces: list[str] = []
        at = 0
        for start, end in self.typed(text):
            pieces += (text[at:start], self.issue(Label.PLACEHOLDER, text[start:end]))
            at = end
        return "".join([*pieces, text[at:]])

    def typed(self, text: str) -> list[tuple[int, int]]:
        """Returns the places of what could be taken for a placeholder (its check character is right), whoever issued it."""
        if not any(_checks(match[1]) for match in _CODE.finditer(text)):  # an eighth of the time, and nearly always the answer
            return []
        return [match.span() for match in PLACEHOLDER.finditer(text) if _checks(match["code"])]

    def _restore(self, match: re.Match[str]) -> str | None:
        code = match["code"].upper()
        kept = self._kept.get(code)
        if kept is None or check_character(code[:-1]) != code[-1]:
            return None
        named = re.sub(r"[^A-Z]", "_", re.sub(r"\\", "", match["label"].upper()))
        return self._open(kept, code) if named == kept.label else None

    def _open(self, kept: _Kept, code: str) -> str:
        return self._key.open(kept.sealed, context=self._context(kept.label, code)).decode("utf-8", "surrogatepass")

    def _context(self, label: Label, code: str) -> bytes:
        return f"{len(self._conversation)}:{self._conversation}/{len(self._policy)}:{self._policy}/{label}/{code}".encode("utf-8", "surrogatepass")

    def _code(self, label: Label, value: str, attempt: int) -> str:
        digest = int.from_bytes(self._key.mac(f"{label}\0{attempt}\0{value}".encode("utf-8", "surrogatepass")), "big")
        code = ""
        for _ in range(CODE_CHARS - 1):
            digest, index = divmod(digest, len(ALPHABET))
            code += ALPHABET[index]
        return code + check_character(code)


def _checks(code: str) -> bool:
    return check_character(code.upper()[:-1]) == code.upper()[-1]


def check_character(code: str) -> str:
    """Returns the check character: the sum of (place + 1) * index, modulo 31."""
    return ALPHABET[sum((place + 1) * ALPHABET.index(c) for place, c in enumerate(code, start=1)) % len(ALPHABET)]
