"""Proposes the sensitivity of a source by running a sample of it through the detectors: classification is detection at rest.

The sample is the records with the smallest digests. Digests are salted under keys that nobody chose, so this is a random sample that the text cannot steer,
the same at every call. A label counts when it is found in at least one document in a hundred: in a sample of more than a hundred a single false alarm classifies nothing, in a smaller one it does.

The result is a proposal to a person. It is never applied, and it proposes `PUBLIC` only for text in which nothing was found.

Does not cover: what makes text a special category by its meaning (a diagnosis, a belief) where no identifier gives it away; documents outside the sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

from discreet.deid.detect import detect
from discreet.deid.patterns import Label
from discreet.errors import SourceEmpty
from discreet.record import Record, Sensitivity

SAMPLE = 200
MIN_SHARE = 0.01

_SPECIAL = (Label.MRN, Label.HEALTH_PLAN)
_INTERNAL = (Label.DATE, Label.AGE, Label.ZIP, Label.LOCATION, Label.ORG, Label.URL, Label.SECRET)
_NOTHING = (Label.PLACEHOLDER,)

SENSITIVITY: Mapping[Label, Sensitivity] = MappingProxyType(
    {
        **dict.fromkeys(Label, Sensitivity.PERSONAL),
        **dict.fromkeys(_SPECIAL, Sensitivity.SPECIAL),
        **dict.fromkeys(_INTERNAL, Sensitivity.INTERNAL),
        **dict.fromkeys(_NOTHING, Sensitivity.PUBLIC),
    }
)
"""What one label says about the text around it. A label that is not named here identifies a person."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """What the sample suggests. `shares` is the share of sampled documents with each label that counts; internal (PITFALLS 41)."""

    sensitivity: Sensitivity
    shares: Mapping[Label, float]
    num_sampled: int

    def exceeds(self, declared: Sensitivity) -> bool:
        """Returns whether the text looks more sensitive than it was declared."""
        order = list(Sensitivity)
        return order.index(self.sensitivity) > order.index(declared)


def classify(records: Sequence[Record], *, sample: int = SAMPLE) -> Proposal:
    """Proposes a sensitivity for the source of these records.

    Args:
        records: of one source, as `Catalog.collect` gives them.
        sample: documents to look at, >= 1.

    Raises:
        SourceEmpty: when there is nothing to look at.
    """
    chosen = sorted(records, key=lambda record: record.digest)[:sample]
    if not chosen:
        raise SourceEmpty("at least one record to classify", value=f"{len(records)} records, sample {sample}")
    found: Counter[Label] = Counter()
    for record in chosen:
        found.update({Label(span.label) for span in detect(record.text.reveal(), known=record.known.reveal())})
    shares = {label: count / len(chosen) for label, count in sorted(found.items()) if count >= MIN_SHARE * len(chosen)}
    highest = max((SENSITIVITY[label] for label in shares), key=list(Sensitivity).index, default=Sensitivity.PUBLIC)
    return Proposal(sensitivity=highest, shares=MappingProxyType(shares), num_sampled=len(chosen))
