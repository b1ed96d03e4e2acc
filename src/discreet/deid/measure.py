"""How much the detectors find, and how much they flag wrongly, on text whose identifiers are marked.

Recall counts whole values (a name half covered is not covered); precision counts spans that touch a marked value. Both carry one-sided Clopper-Pearson limits at 95 %, so that a
hundred samples do not look like a proof.

Does not cover: text unlike the samples. The samples are public or generated: their figures are printed (PITFALLS 41).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from discreet.deid.calibrate import Sample, clopper_pearson
from discreet.deid.policy import Policy, redact

LEVEL = 0.05


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a policy's detectors did on labelled samples: counts of marked values and of spans found."""

    samples: int
    values: int
    covered: int
    found: int
    right: int

    @property
    def recall(self) -> float:
        """Share of the marked values that are covered to their last letter, in [0, 1]."""
        return self.covered / self.values if self.values else 1.0

    @property
    def precision(self) -> float:
        """Share of the spans found that touch a marked value, in [0, 1]."""
        return self.right / self.found if self.found else 1.0

    def to_json(self) -> dict[str, Any]:
        """Returns the figures with the limits that hold with 95 % each."""
        return {
            "samples": self.samples,
            "values": self.values,
            "recall": round(self.recall, 4),
            "recall_at_least": round(clopper_pearson(self.covered, self.values, LEVEL)[0], 4) if self.values else 0.0,
            "precision": round(self.precision, 4),
            "precision_at_least": round(clopper_pearson(self.right, self.found, LEVEL)[0], 4) if self.found else 0.0,
        }


def measure(samples: Sequence[Sample], policy: Policy) -> Measured:
    """Runs the detectors of a policy over labelled samples.

    Args:
        samples: texts with every identifier marked; see `calibrate.samples_of`.
        policy: of the channel training or log; its thresholds and its finder of names count.

    Raises:
        RequestInvalid: when a text is too long.
    """
    values = covered = found = right = 0
    for sample in samples:
        spans = redact(sample.text, policy).spans
        hidden = {at for span in spans for at in range(span.start, span.end)}
        marked = {at for start, end, _ in sample.gold for at in range(start, end)}
        values += len(sample.gold)
        covered += sum(all(at in hidden or not sample.text[at].isalnum() for at in range(start, end)) for start, end, _ in sample.gold)
        found += len(spans)
        right += sum(not marked.isdisjoint(range(span.start, span.end)) for span in spans)
    return Measured(samples=len(samples), values=values, covered=covered, found=found, right=right)
