"""Which operator meets which label on which channel, and the one function that turns an `Admitted` record into a `Deidentified` one (line 3 of the story).

A `Policy` is data: every label of the closed list has an operator, and its digest (with the version of the detector and the bytes of its lists) says exactly what was done to a
text. Channels differ in what may come out: `training` text never holds anything reversible, `prompt` text holds placeholders of a `Vault`, `log` text holds nothing.

Guarantees: `deidentify` is a function of the record's text, its known identifiers, the policy and the subject's key, and of nothing else, so that one person's frozen bytes never
depend on another's (PITFALLS 39); with the policies `label`, `redact` and `log`, redacting twice is redacting once; no exception, representation or log line holds text.

Does not cover: identifiers that the detector misses; every report says so.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import final

from discreet.config import digest_of
from discreet.deid import ner, operators, patterns
from discreet.deid.detect import Span, detect, parse_label
from discreet.deid.operators import Operator, Surrogates
from discreet.deid.patterns import Label
from discreet.deid.tagging import Reader
from discreet.deid.vault import Vault
from discreet.errors import ConfigInvalid, RequestInvalid
from discreet.keys import Key
from discreet.record import Admitted, Deidentified, Digest, Sensitive


@final
class Channel(StrEnum):
    """Where the text goes."""

    TRAINING = "training"
    PROMPT = "prompt"
    LOG = "log"


@final
class Names(StrEnum):
    """What finds names: lists, cues and propagation alone, or the tagger of `ner` as well."""

    RULES = "rules"
    MODEL = "model"


_KEYED = frozenset((Operator.SURROGATE, Operator.SHIFT, Operator.TOKEN))
_DATA = ("names.txt", "words.txt", "places.txt")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """An operator for every label, on one channel.

    Args:
        name: how reports call it.
        channel: where the text goes.
        operators: one operator for each label.
        version: raised when the policy of that name changes.
        thresholds: label -> least score at which a span counts, in [0, 1]; 0 for the others. On the training path from public or separately charged samples only.
        names: what finds names beside the table.

    Raises:
        ConfigInvalid: when a label has no operator, dates alone are not the ones that shift, or placeholders would leave the prompt channel.
    """

    name: str
    channel: Channel
    operators: Mapping[Label, Operator]
    version: int = 1
    thresholds: Mapping[Label, float] = field(default_factory=dict)
    names: Names = Names.MODEL

    def __post_init__(self) -> None:
        missing = [label for label in Label if label not in self.operators]
        if missing:
            raise ConfigInvalid("an operator for every label", value=", ".join(missing))
        misused = [label for label, operator in self.operators.items() if operator is Operator.SHIFT and label is not Label.DATE]
        if misused:
            raise ConfigInvalid("the operator shift for DATE alone", value=", ".join(misused))
        if self.channel is not Channel.PROMPT and Operator.VAULT in self.operators.values():
            raise ConfigInvalid("the operator vault on the channel prompt alone", value=self.channel)
        if self.channel is Channel.TRAINING and Operator.TOKEN in self.operators.values():
            raise ConfigInvalid("no reversible operator (token) on the channel training", value=self.name)
        if not all(label in Label and 0 <= least <= 1 for label, least in self.thresholds.items()):
            raise ConfigInvalid("thresholds in [0, 1] for labels of docs/labels.md", value=", ".join(map(str, self.thresholds)))
        object.__setattr__(self, "operators", MappingProxyType(dict(self.operators)))
        object.__setattr__(self, "thresholds", MappingProxyType(dict(self.thresholds)))

    @property
    def digest(self) -> Digest:
        """SHA-256 over the policy, the version of the detector, the bytes of its lists and, where names are read by the model, its weights."""
        chosen = {label: self.operators[label] for label in Label}
        return digest_of(
            {
                "name": self.name,
                "channel": self.channel,
                "version": self.version,
                "operators": chosen,
                "detector": patterns.VERSION,
                "lists": _lists_digest(),
                **({"thresholds": {str(label): self.thresholds[label] for label in Label if label in self.thresholds}} if self.thresholds else {}),
                **({"model": ner.digest(), "least": ner.rules()} if self.names is Names.MODEL else {}),
            }
        )

    @property
    def needs_key(self) -> bool:
        """Whether an operator derives something from a subject's key."""
        return not _KEYED.isdisjoint(self.operators.values())


@cache
def _lists_digest() -> str:
    digest = hashlib.sha256()
    for name in _DATA:
        digest.update(hashlib.sha256((resources.files("discreet.deid") / name).read_bytes()).digest())
    return digest.hexdigest()


def _uniform(name: str, channel: Channel, operator: Operator, **others: Operator) -> Policy:
    return Policy(name=name, channel=channel, operators={label: others.get(label, operator) for label in Label})


BUILTIN: Mapping[str, Policy] = MappingProxyType(
    {
        policy.name: policy
        for policy in (
            _uniform(
                "surrogate",
                Channel.TRAINING,
                Operator.SURROGATE,
                DATE=Operator.SHIFT,
                AGE=Operator.GENERALISE,
                SECRET=Operator.LABEL,
                PLACEHOLDER=Operator.LABEL,
            ),
            _uniform("label", Channel.TRAINING, Operator.LABEL),
            _uniform("redact", Channel.TRAINING, Operator.REDACT),
            _uniform("prompt", Channel.PROMPT, Operator.VAULT),
            _uniform("log", Channel.LOG, Operator.REDACT),
        )
    }
)
"""The policies that a configuration names."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Redacted:
    """What is left of a text. `spans` are places in the original; the text is kept out of the representation, a detector can miss something."""

    text: str = field(repr=False)
    spans: tuple[Span, ...]


def redact(
    text: str,
    policy: Policy | str = "label",
    *,
    known: Mapping[str, Sequence[str]] = MappingProxyType({}),
    key: Key | None = None,
    names: Names = Names.MODEL,
    found: Sequence[Span] | None = None,
) -> Redacted:
    """Replaces the identifiers of a text as a policy says.

    Args:
        text: at most `detect.MAX_CHARS` code points.
        policy: a policy, or the name of a built-in one.
        known: identifiers that the text is known to be about, label -> values.
        key: the subject's key, for surrogates, shifted dates and tokens; left out, they are consistent within this call only.
        names: what finds names, where the policy is given by its name. A `Policy` says it itself.
        found: what `find` has found in this text already; None to look for it here.

    Raises:
        ConfigInvalid: when there is no such policy, or it wants a vault (use `protect`).
        RequestInvalid: when the text is too long or a label unknown.
    """
    chosen = replace(builtin(policy), names=names) if isinstance(policy, str) else policy
    if chosen.channel is Channel.PROMPT:
        raise ConfigInvalid("a policy of the channel training or log", value=chosen.name, remedy="Prompts need a vault: use deid.policy.protect.")
    spans = _chosen(_found(text, chosen, known) if found is None else found, chosen)
    return Redacted(text=_rewrite(text, spans, _renderer(text, spans, chosen, known=known, key=key)), spans=tuple(spans))


def find(
    text: str, *, known: Mapping[str, Sequence[str]] = MappingProxyType({}), labels: Iterable[str] | None = None, names: Names = Names.MODEL
) -> list[Span]:
    """Returns what `detect.detect` finds, with the tagger of names beside the table. Known to callers as `discreet.detect`.

    Args:
        text: at most `detect.MAX_CHARS` code points.
        known: identifiers that the text is known to be about, label -> values.
        labels: only these labels; None for all.
        names: what finds names.

    Raises:
        RequestInvalid: when the text is too long or a label unknown.
    """
    return detect(text, known=known, labels=labels, reader=_reader(names))


def _reader(names: Names) -> Reader | None:
    """The reader lives for one call: nobody can time what another one's text left in its cache (PITFALLS 29)."""
    return Reader(ner.Names()) if names is Names.MODEL else None


def protect(
    text: str,
    vault: Vault,
    *,
    policy: Policy = BUILTIN["prompt"],
    known: Mapping[str, Sequence[str]] = MappingProxyType({}),
    key: Key | None = None,
    found: Sequence[Span] | None = None,
) -> Redacted:
    """Replaces the identifiers of a prompt with placeholders of its conversation, and what looks like a placeholder already with one of its own.

    Args:
        text: what the caller wrote, at most `detect.MAX_CHARS` code points.
        vault: the vault of this conversation; `vault.restore` undoes the replacement in the answer.
        policy: of the channel prompt.
        known: identifiers that the text is known to be about, label -> values.
        key: for policies with keyed operators beside the vault.
        found: what `find` has found in this text already; None to look for it here.

    Raises:
        ConfigInvalid: when the policy is for another channel.
        RequestInvalid: when the text is too long or a label unknown.
    """
    if policy.channel is not Channel.PROMPT:
        raise ConfigInvalid("a policy of the channel prompt", value=policy.name)
    typed = [Span(start, end, Label.PLACEHOLDER, 1.0) for start, end in vault.typed(text)]
    spans = _chosen(_around(_found(text, policy, known) if found is None else found, typed), policy)
    plain = _renderer(text, spans, policy, known=known, key=key)

    def render(span: Span) -> str:
        value = text[span.start : span.end]
        return vault.issue(span.label, value) if policy.operators[Label(span.label)] is Operator.VAULT else plain(span)

    return Redacted(text=_rewrite(text, spans, render), spans=tuple(spans))


def deidentify(admitted: Admitted, policy: Policy, key: Key) -> Deidentified:
    """Turns an admitted record into what may be frozen into a corpus. The only function that builds a `Deidentified`.

    Args:
        admitted: a record with a basis for its purpose; its own known identifiers are always looked for.
        policy: of the channel training.
        key: the subject's key (`Keyring.subject`): one person keeps one set of stand-ins and one date offset across all their documents.

    Raises:
        ConfigInvalid: when the policy is for another channel.
        RequestInvalid: when the text is too long or a known label is not in the closed list.
    """
    if policy.channel is not Channel.TRAINING:
        raise ConfigInvalid("a policy of the channel training", value=policy.name)
    record = admitted.record
    redacted = redact(record.text.reveal(), policy, known=record.known.reveal(), key=key)
    return Deidentified(
        digest=record.digest,
        source=record.source,
        subject=record.subject,
        sensitivity=record.sensitivity,
        text=Sensitive(redacted.text),
        policy=policy.digest,
        counts=MappingProxyType(dict(sorted(Counter(str(span.label) for span in redacted.spans).items()))),
    )


def builtin(name: str) -> Policy:
    """Returns the built-in policy of that name.

    Raises:
        ConfigInvalid: when there is none.
    """
    if name not in BUILTIN:
        raise ConfigInvalid(f"a policy called {', '.join(BUILTIN)}", value=name)
    return BUILTIN[name]


def configured(name: str, thresholds: Mapping[str, float], *, names: Names | str = Names.MODEL) -> Policy:
    """Returns the built-in policy of that name with the thresholds and the finder of names of a configuration.

    Raises:
        ConfigInvalid: when there is no such policy or label.
    """
    try:
        least = {parse_label(label): value for label, value in thresholds.items()}
    except RequestInvalid as error:
        raise ConfigInvalid("labels of docs/labels.md in [deid.thresholds]", remedy=str(error)) from None
    return replace(builtin(name), thresholds=least, names=Names(names))


def _found(text: str, policy: Policy, known: Mapping[str, Sequence[str]]) -> list[Span]:
    return detect(text, known=known, reader=_reader(policy.names))


def _chosen(spans: Sequence[Span], policy: Policy) -> list[Span]:
    return [s for s in spans if policy.operators[Label(s.label)] is not Operator.KEEP and s.score >= policy.thresholds.get(Label(s.label), 0.0)]


def _renderer(text: str, spans: Sequence[Span], policy: Policy, *, known: Mapping[str, Sequence[str]], key: Key | None) -> Callable[[Span], str]:
    """Returns the function from a span to what stands in its place."""
    key = (key or Key.random()) if policy.needs_key else key
    stand_ins = None if key is None or not policy.needs_key else Surrogates(key, [*_known_values(known), *_found_values(text, spans)])

    def render(span: Span) -> str:
        value, label = text[span.start : span.end], Label(span.label)
        operator = policy.operators[label]
        if operator in (Operator.SURROGATE, Operator.SHIFT) and stand_ins is not None:
            return stand_ins.of(value, label)
        if operator is Operator.TOKEN and key is not None:
            return operators.token(value, label, key)
        return _PLAIN[operator](value, label)

    return render


_PLAIN: Mapping[Operator, Callable[[str, Label], str]] = {
    Operator.REDACT: operators.redact,
    Operator.LABEL: operators.label_only,
    Operator.MASK: operators.mask,
    Operator.GENERALISE: operators.generalise,
    Operator.VAULT: operators.label_only,
}


def _known_values(known: Mapping[str, Sequence[str]]) -> list[tuple[Label, str]]:
    return sorted((parse_label(label), value) for label, group in known.items() for value in group)


def _found_values(text: str, spans: Sequence[Span]) -> list[tuple[Label, str]]:
    """Sorted, so that stand-ins depend on which values a document has, not on their order."""
    return sorted({(Label(span.label), text[span.start : span.end]) for span in spans})


def _rewrite(text: str, spans: Sequence[Span], render: Callable[[Span], str]) -> str:
    pieces: list[str] = []
    at = 0
    for span in spans:
        pieces += (text[at : span.start], render(span))
        at = span.end
    return "".join([*pieces, text[at:]])


def _around(spans: Sequence[Span], fixed: Sequence[Span]) -> list[Span]:
    """Returns the fixed spans and what they leave of the others."""
    kept = list(fixed)
    for span in spans:
        at = span.start
        for other in fixed:
            if at < other.end and other.start < span.end:
                if at < other.start:
                    kept.append(Span(at, other.start, span.label, span.score))
                at = max(at, other.end)
        if at < span.end:
            kept.append(Span(at, span.end, span.label, span.score))
    return sorted(kept, key=lambda s: s.start)
