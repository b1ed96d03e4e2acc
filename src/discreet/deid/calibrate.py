"""From labelled samples to thresholds: per label, the highest score threshold whose miss rate is still below a target, with its confidence interval.

For each label the gold values and the score of the span that covers each (0 where none does) decide: at a threshold t a value is missed when its score is below t. The bound
is the one-sided Clopper-Pearson limit at the level over the number of labels and candidate thresholds (Bonferroni), so that choosing the threshold on the same samples is paid for.

Guarantees: with probability at least the confidence, every stated upper limit holds for values drawn like the samples; a label without enough samples for the target gets threshold 0 and is
named as not met, never a hopeful figure.

Source: Clopper and Pearson, Biometrika 26 (1934). Does not cover: texts unlike the samples; on the training path the samples must be public or charged for (PITFALLS 39).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from scipy.stats import beta

from discreet.deid.detect import Span, detect, parse_label
from discreet.deid.patterns import Label
from discreet.errors import RequestInvalid

CANDIDATES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.0)
"""Thresholds that are tried, fixed beforehand."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """A text and the places of what must be found in it, as (start, end, label)."""

    text: str
    gold: tuple[tuple[int, int, Label], ...]

    def __post_init__(self) -> None:
        if not all(0 <= start < end <= len(self.text) for start, end, _ in self.gold):
            raise RequestInvalid("spans within their text")

    def __repr__(self) -> str:
        return f"<sample with {len(self.gold)} spans>"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated:
    """The threshold of one label and what it misses: `missed` of `values`, at most `upper` of all with the confidence; `met` says whether that is the target."""

    label: Label
    threshold: float
    values: int
    missed: int
    lower: float
    upper: float
    met: bool
    flagged_wrongly: int


def calibrate(
    samples: Sequence[Sample], *, miss_rate: float = 0.05, confidence: float = 0.95, find: Callable[[str], Sequence[Span]] = detect
) -> list[Calibrated]:
    """Returns a row for every label of the samples.

    Args:
        samples: labelled texts, drawn like the texts to come.
        miss_rate: target in (0, 1) for the upper limit of each label.
        confidence: in (0, 1), over all labels together.
        find: the finder that the thresholds are for; scores of another one mean something else.

    Raises:
        RequestInvalid: when there is no labelled value, or a rate is out of range.
    """
    if not (0 < miss_rate < 1 and 0 < confidence < 1):
        raise RequestInvalid("0 < miss rate < 1 and 0 < confidence < 1", value=f"{miss_rate}, {confidence}")
    scores: dict[Label, list[float]] = defaultdict(list)
    wrong: dict[Label, list[float]] = defaultdict(list)
    for sample in samples:
        spans = find(sample.text)
        for start, end, label in sample.gold:
            scores[label].append(_covered(spans, start, end))
        for span in spans:
            if not any(start < span.end and span.start < end for start, end, _ in sample.gold):
                wrong[Label(span.label)].append(span.score)
    if not scores:
        raise RequestInvalid("at least one labelled value in the samples", remedy="Label some with `discreet redact FILE --review`.")
    level = (1 - confidence) / (len(scores) * len(CANDIDATES))
    return [_chosen(label, scores[label], wrong[label], miss_rate=miss_rate, level=level) for label in sorted(scores)]


def _covered(spans: Sequence[Span], start: int, end: int) -> float:
    """Returns the least score among the spans that cover [start, end) together; 0 where a letter or digit stays bare."""
    touching = [span for span in spans if span.start < end and start < span.end]
    bare = set(range(start, end)) - {i for span in touching for i in range(span.start, span.end)}
    return min((span.score for span in touching), default=0.0) if len(bare) <= (end - start) // 8 else 0.0


def _chosen(label: Label, scores: Sequence[float], wrong: Sequence[float], *, miss_rate: float, level: float) -> Calibrated:
    for threshold in CANDIDATES:
        missed = sum(score < threshold or score == 0 for score in scores)
        lower, upper = clopper_pearson(missed, len(scores), level)
        if upper <= miss_rate or threshold == CANDIDATES[-1]:
            break
    return Calibrated(
        label=label,
        threshold=threshold,
        values=len(scores),
        missed=missed,
        lower=lower,
        upper=upper,
        met=upper <= miss_rate,
        flagged_wrongly=sum(s >= threshold for s in wrong),
    )


def clopper_pearson(count: int, total: int, level: float) -> tuple[float, float]:
    """Returns the one-sided lower and upper limits of a rate, each wrong with probability at most `level`."""
    lower = float(beta.ppf(level, count, total - count + 1)) if count else 0.0
    upper = float(beta.ppf(1 - level, count + 1, total - count)) if count < total else 1.0
    return lower, upper


def samples_of(rows: Iterable[object]) -> list[Sample]:
    """Reads rows {"text", "spans": [{"start", "end", "label"}]}, as the page of `discreet redact --review` exports them.

    Raises:
        RequestInvalid: with the number of the row that is not one, or the label that is unknown.
    """
    found = []
    for number, row in enumerate(rows, start=1):
        try:
            if not isinstance(row, Mapping) or not isinstance(row["text"], str):
                raise TypeError
            gold = tuple((int(span["start"]), int(span["end"]), parse_label(str(span["label"]))) for span in row["spans"])
        except (KeyError, TypeError, ValueError):
            raise RequestInvalid("rows with `text` and `spans` of start, end and label", value=f"row {number}") from None
        found.append(Sample(text=row["text"], gold=gold))
    return found
