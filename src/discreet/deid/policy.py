"""Which operator meets which label on which channel, and the one function that turns an `Admitted` record into a `Deidentified` one (line 3 of the story).

A `Policy` is data: every label of the closed list has an operator, and its digest (with the version of the detector and the bytes of its lists) says exactly what was done to a
text. Channels differ in what may come out: `training` text never holds anything reversible, `prompt` text holds placeholders of a `Vault`, `log` text holds nothing.

Guarantees: `deidentify` is a function of the record's text, its known identifiers, the policy and the subject's key, and of nothing else, so that one person's frozen bytes never
depend on another's (PITFALLS 39); with the policies `label`, `redact` and `log`, redacting twice is redacting once; no exception, representation or log line holds text.

Does not cover: identifiers that the detector misses; every report says so.
"""

from __future__ import annotations

import difflib
import hashlib
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from importlib import resources
from itertools import pairwise
from types import MappingProxyType
from typing import final

from discreet.config import DeidSection, ThresholdSection, digest_of
from discreet.deid import ner, operators, patterns, quasi
from discreet.deid.detect import Span, detect, is_telling, leaves_none, parse_label, spellings
from discreet.deid.operators import Operator, Surrogates
from discreet.deid.patterns import STRONG, Label
from discreet.deid.tagging import Reader
from discreet.deid.vault import Vault
from discreet.errors import ConfigInvalid, RequestInvalid, SealBroken
from discreet.keys import Key
from discreet.record import Admitted, Deidentified, Digest, Sensitive, Sensitivity


@final
class Channel(StrEnum):
    """Where the text goes."""

    TRAINING = "training"
    PROMPT = "prompt"
    LOG = "log"
    ARCHIVE = "archive"
    """Kept or handed on; whoever is entitled can have a value back while its subject is not forgotten."""


@final
class Names(StrEnum):
    """What finds names: lists, cues and propagation alone, or the tagger of `ner` as well."""

    RULES = "rules"
    MODEL = "model"


_KEYED = frozenset((Operator.SURROGATE, Operator.SHIFT, Operator.TOKEN))
_MARKS = frozenset((Operator.REDACT, Operator.LABEL, Operator.KEEP))
_DATA = ("names.txt", "words.txt", "places.txt", "stand_ins.txt")


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
        misses: label -> lower and upper limit of the share of values that its threshold misses, as calibration stated them.
        k: quasi-identifiers are made coarser until at least so many people are expected to share them (`quasi`); 0 leaves them.

    Raises:
        ConfigInvalid: when a label has no operator, dates alone are not the ones that shift, placeholders would leave the prompt channel, or a log would hold more than marks.
    """

    name: str
    channel: Channel
    operators: Mapping[Label, Operator]
    version: int = 1
    thresholds: Mapping[Label, float] = field(default_factory=dict)
    names: Names = Names.MODEL
    misses: Mapping[Label, tuple[float, float]] = field(default_factory=dict)
    k: int = 0

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
        telling = sorted({operator for operator in self.operators.values() if operator not in _MARKS}) if self.channel is Channel.LOG else []
        if telling:
            raise ConfigInvalid("the operators redact, label and keep alone on the channel log", value=", ".join(telling))
        if not all(label in Label and 0 <= least <= 1 for label, least in self.thresholds.items()):
            raise ConfigInvalid("thresholds in [0, 1] for labels of docs/labels.md", value=", ".join(map(str, self.thresholds)))
        object.__setattr__(self, "operators", MappingProxyType(dict(self.operators)))
        object.__setattr__(self, "thresholds", MappingProxyType(dict(self.thresholds)))
        object.__setattr__(self, "misses", MappingProxyType(dict(self.misses)))

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
                **({"misses": {str(label): list(self.misses[label]) for label in Label if label in self.misses}} if self.misses else {}),
                **({"k": self.k, "quasi": quasi.VERSION} if self.k else {}),
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
            _uniform("token", Channel.ARCHIVE, Operator.TOKEN, PLACEHOLDER=Operator.LABEL),
        )
    }
)
"""The policies that a configuration names."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Redacted:
    """What is left of a text. `spans` are places in the original; the text is kept out of the representation, a detector can miss something.

    `expected`: people who are expected to share the quasi-identifiers that are left, where the policy asks for k; less than k where even the coarsest words say too much.
    """

    text: str = field(repr=False)
    spans: tuple[Span, ...]
    expected: float | None = None


def redact(
    text: str,
    policy: Policy | str = "label",
    *,
    known: Mapping[str, Sequence[str]] = MappingProxyType({}),
    key: Key | None = None,
    names: Names = Names.MODEL,
    found: Sequence[Span] | None = None,
    subject: str = "",
) -> Redacted:
    """Replaces the identifiers of a text as a policy says.

    Args:
        text: at most `detect.MAX_CHARS` code points.
        policy: a policy, or the name of a built-in one.
        known: identifiers that the text is known to be about, label -> values.
        key: the subject's key, for surrogates, shifted dates and tokens; left out, they are consistent within this call only.
        names: what finds names, where the policy is given by its name. A `Policy` says it itself.
        subject: whom tokens are bound to, beside their label and the policy; `restore` needs the same.
        found: what `find` has found in this text already; None to look for it here.

    Raises:
        ConfigInvalid: when there is no such policy, or it wants a vault (use `protect`).
        RequestInvalid: when the text is too long or a label unknown.
    """
    chosen = resolve(policy, names)
    spans = _chosen(_found(text, chosen, known) if found is None else found, chosen)
    render = renderer(text, spans, chosen, known=known, key=key, subject=subject)
    if not chosen.k:
        return Redacted(text=_rewrite(text, [(s.start, s.end, render(s)) for s in spans]), spans=tuple(spans))
    edits, expected = _coarser(text, spans, chosen.k)
    return Redacted(text=_rewrite(text, sorted([*edits, *((s.start, s.end, render(s)) for s in spans)])), spans=tuple(spans), expected=expected)


def resolve(policy: Policy | str, names: Names = Names.MODEL) -> Policy:
    """Returns the policy, or the built-in one of that name with a finder of names; refuses the vault's, which `redact` cannot apply.

    Raises:
        ConfigInvalid: when there is no such policy, or it is of the channel prompt.
    """
    chosen = replace(builtin(policy), names=names) if isinstance(policy, str) else policy
    if chosen.channel is Channel.PROMPT:
        raise ConfigInvalid(
            "a policy of the channel training, log or archive", value=chosen.name, remedy="Prompts need a vault: use deid.policy.protect."
        )
    return chosen


def restore(text: str, key: Key, *, policy: str = "token", subject: str = "") -> tuple[str, int]:
    """Returns the text with the tokens of this subject and policy opened, and how many there were; tokens that do not open stay as they are."""
    opened = 0

    def value(match: re.Match[str]) -> str:
        nonlocal opened
        try:
            plain = operators.open_token(match.group(), key, subject=subject, policy=policy)
        except SealBroken:
            return match.group()
        opened += 1
        return plain

    return operators.TOKEN.sub(value, text), opened


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
    plain = renderer(text, spans, policy, known=known, key=key)

    def render(span: Span) -> str:
        if policy.operators[Label(span.label)] is not Operator.VAULT:
            return plain(span)
        placeholder = vault.issue(span.label, text[span.start : span.end])
        # Behind a backslash that the user wrote, an angle bracket would read as a model's escape and take the backslash with it.
        return f"[{placeholder[1:-1]}]" if text[span.start - 1 : span.start] == "\\" else placeholder

    return Redacted(text=_rewrite(text, [(s.start, s.end, render(s)) for s in spans]), spans=tuple(spans))


def deidentify_all(admitted: Sequence[Admitted], policy: Policy, key: Key) -> list[Deidentified]:
    """Turns everything that one subject has in a source into what may be frozen: whoever is named beyond doubt in one document is looked for in the others.

    Args:
        admitted: all records of one subject and no others, so that what comes out depends on nobody else.
        policy, key: as `deidentify`.

    Raises:
        ConfigInvalid, RequestInvalid: as `deidentify`; or when there are several subjects.
    """
    if len({each.record.subject for each in admitted}) > 1:
        raise RequestInvalid("records of one subject")
    if len(admitted) < 2:
        return [deidentify(each, policy, key) for each in admitted]
    texts = [(each.record.text.reveal(), each.record.known.reveal()) for each in admitted]
    found = [_found(text, policy, known) for text, known in texts]
    names = _named(texts, found)
    return [deidentify(each, policy, key, names=names, found=spans) for each, spans in zip(admitted, found, strict=True)]


def names_of(texts: Sequence[tuple[str, Mapping[str, Sequence[str]]]], policy: Policy) -> tuple[str, ...]:
    """Returns the people whom a subject's texts, each with its known identifiers, name beyond doubt: those that `deidentify_all` looks for in all of them."""
    return _named(texts, [_found(text, policy, known) for text, known in texts])


def _named(texts: Sequence[tuple[str, Mapping[str, Sequence[str]]]], found: Sequence[Sequence[Span]]) -> tuple[str, ...]:
    sure = {
        text[span.start : span.end]
        for (text, _), spans in zip(texts, found, strict=True)
        for span in spans
        if span.label == Label.PERSON and span.score >= STRONG
    }
    return tuple(sorted(filter(is_telling, sure)))


def with_names(known: Mapping[str, Sequence[str]], names: Sequence[str]) -> Mapping[str, Sequence[str]]:
    """Returns the known identifiers of a text and these names."""
    return {**known, Label.PERSON: (*known.get(Label.PERSON, ()), *names)} if names else known


def deidentify(admitted: Admitted, policy: Policy, key: Key, *, names: Sequence[str] = (), found: Sequence[Span] | None = None) -> Deidentified:
    """Turns an admitted record into what may be frozen into a corpus. The only function that builds a `Deidentified`.

    Args:
        admitted: a record with a basis for its purpose; its own known identifiers are always looked for.
        policy: of the channel training.
        key: the subject's key (`Keyring.subject`): one person keeps one set of stand-ins and one date offset across all their documents.
        names: people whom other documents of the same subject name.
        found: what the detectors have found in the record's text without those names; None to look for it here.

    Raises:
        ConfigInvalid: when the policy is for another channel.
        RequestInvalid: when the text is too long or a known label is not in the closed list.
    """
    if policy.channel is not Channel.TRAINING:
        raise ConfigInvalid("a policy of the channel training", value=policy.name)
    record = admitted.record
    text, known = record.text.reveal(), with_names(record.known.reveal(), names)
    enough = found is not None and leaves_none(text, found, spellings(known))
    redacted = redact(text, policy, known=known, key=key, found=found if enough else None)
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
    return BUILTIN[known_word(name, BUILTIN, "a policy")]


def configured(section: DeidSection, channel: Channel = Channel.TRAINING, sensitivity: Sensitivity = Sensitivity.SPECIAL) -> Policy:
    """Returns the policy of a configuration for one channel and sensitivity: the built-in one, with the operators, the thresholds and the finder of names of `[deid]`.

    Args:
        section: `[deid]`; its `policy` is that of the channel training, the other channels have one each.
        channel: where the text goes.
        sensitivity: of the text's source; a prompt and a log line are of the highest.

    Raises:
        ConfigInvalid: when it names a channel, sensitivity, label or operator that is not known (the message has the nearest), or a policy that its channel does not permit.
    """
    names = Names(section.names)
    base = builtin({Channel.PROMPT: "prompt", Channel.LOG: "log", Channel.ARCHIVE: "token"}.get(channel, section.policy))
    changes = _changes(section, channel, sensitivity)
    least = {_label(name): value if isinstance(value, float) else value.least for name, value in section.thresholds.items()}
    return replace(
        base,
        name=f"{base.name}/{sensitivity}" if changes else base.name,
        operators={**base.operators, **changes},
        thresholds=least,
        misses={_label(name): value.miss_rate for name, value in section.thresholds.items() if isinstance(value, ThresholdSection)},
        names=names,
        k=section.k if channel is Channel.TRAINING else 0,
    )


def check(section: DeidSection) -> None:
    """Builds the policy of every channel and sensitivity, and compares them.

    Raises:
        ConfigInvalid: as `configured`; or when a prompt or a log would keep a label that training hides, or a more sensitive source one that a less sensitive one hides.
    """
    for named, by_sensitivity in section.operators.items():
        known_word(named, Channel, "a channel")
        for each in by_sensitivity:
            known_word(each, ("any", *Sensitivity), "a sensitivity or 'any'")
    kept = {(channel, each): _kept(configured(section, channel, each)) for channel in Channel for each in Sensitivity}
    order = [each for each in Sensitivity if each is not Sensitivity.PUBLIC]
    for channel in Channel:
        for lower, higher in pairwise(order):
            _refuse_laxer(kept[channel, higher] - kept[channel, lower], f"{channel}.{higher}", f"{channel}.{lower}")
    for channel in (Channel.PROMPT, Channel.LOG, Channel.ARCHIVE):
        for each in order:
            _refuse_laxer(kept[channel, each] - kept[Channel.TRAINING, each], f"{channel}.{each}", f"training.{each}")


def _kept(policy: Policy) -> frozenset[Label]:
    return frozenset(label for label, operator in policy.operators.items() if operator is Operator.KEEP)


def _refuse_laxer(more: frozenset[Label], where: str, there: str) -> None:
    if more:
        remedy = f"[deid.operators.{there}] hides it: keep it there too, or hide it here."
        raise ConfigInvalid(
            f"nothing kept in [deid.operators.{where}] that [deid.operators.{there}] hides", value=", ".join(sorted(more)), remedy=remedy
        )


def _changes(section: DeidSection, channel: Channel, sensitivity: Sensitivity) -> dict[Label, Operator]:
    of_channel = section.operators.get(channel, {})
    named = {**of_channel.get("any", {}), **of_channel.get(sensitivity, {})}
    return {_label(name): Operator(known_word(operator, Operator, "an operator")) for name, operator in named.items()}


def _label(name: str) -> Label:
    return Label[known_word(name.upper(), Label.__members__, "a label")]


def known_word(word: str, known: Iterable[str], kind: str) -> str:
    """Returns the word.

    Raises:
        ConfigInvalid: when it is not in the list; the message has the nearest that is.
    """
    words = [str(each) for each in known]
    if word in words:
        return word
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    remedy = f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(words)}."
    raise ConfigInvalid(f"{kind} that is known (docs/labels.md)", value=word, remedy=remedy)


def spans_in(text: str, policy: Policy, known: Mapping[str, Sequence[str]] = MappingProxyType({})) -> list[Span]:
    """Returns the spans that a policy replaces: what its finders find, less what it keeps and what is below its thresholds."""
    return _chosen(_found(text, policy, known), policy)


def finder(names: Names = Names.MODEL) -> Callable[[str], list[Span]]:
    """Returns the finder of a policy, without its thresholds: what calibration measures."""
    return lambda text: detect(text, reader=_reader(names))


def _found(text: str, policy: Policy, known: Mapping[str, Sequence[str]]) -> list[Span]:
    return detect(text, known=known, reader=_reader(policy.names))


def _chosen(spans: Sequence[Span], policy: Policy) -> list[Span]:
    return [s for s in spans if policy.operators[Label(s.label)] is not Operator.KEEP and s.score >= policy.thresholds.get(Label(s.label), 0.0)]


def renderer(
    text: str,
    spans: Sequence[Span],
    policy: Policy,
    *,
    known: Mapping[str, Sequence[str]] = MappingProxyType({}),
    key: Key | None = None,
    subject: str = "",
) -> Callable[[Span], str]:
    """Returns the function from a span to what stands in its place. Arguments as those of `redact`; the vault's operator is `protect`'s."""
    key = (key or Key.random()) if policy.needs_key else key
    stand_ins = None if key is None or not policy.needs_key else Surrogates(key, [*_known_values(known), *_found_values(text, spans)])

    def render(span: Span) -> str:
        value, label = text[span.start : span.end], Label(span.label)
        operator = policy.operators[label]
        if operator in (Operator.SURROGATE, Operator.SHIFT) and stand_ins is not None:
            return stand_ins.of(value, label)
        if operator is Operator.TOKEN and key is not None:
            return operators.token(value, label, key, subject=subject, policy=policy.name)
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


def _coarser(text: str, spans: Sequence[Span], k: int) -> tuple[list[tuple[int, int, str]], float]:
    """Returns the edits, as places of the text, that make its quasi-identifiers coarse enough; those within spans are replaced anyway and count as gone."""
    marked = _rewrite(text, [(s.start, s.end, operators.REDACTED) for s in spans])
    moved, at = 0, [(0, 0)]  # where each part between spans begins in the marked text, and how far that is from its place in the text
    for span in spans:
        moved += len(operators.REDACTED) - (span.end - span.start)
        at.append((span.end + moved, moved))
    edits, left = quasi.coarser(marked, k=k)
    back = [(start - at[bisect_right(at, (start, len(marked))) - 1][1], end - start, put) for start, end, put in edits]
    return [(start, start + length, put) for start, length, put in back], left.expected


def _rewrite(text: str, edits: Sequence[tuple[int, int, str]]) -> str:
    pieces: list[str] = []
    at = 0
    for start, end, put in edits:
        pieces += (text[at:start], put)
        at = end
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
