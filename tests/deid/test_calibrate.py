"""Thresholds from labelled samples: the limits are Clopper-Pearson's, a target that the samples cannot show is not met."""

from __future__ import annotations

import pytest
from scipy.stats import binom

from discreet.config import DeidSection
from discreet.deid.calibrate import Sample, calibrate, clopper_pearson, samples_of
from discreet.deid.patterns import Label
from discreet.deid.policy import configured, redact
from discreet.errors import ConfigInvalid, RequestInvalid


def mails(count: int) -> list[Sample]:
    return [Sample(text=f"write to a{i}@mail.example.org now", gold=((9, 9 + len(f"a{i}@mail.example.org"), Label.EMAIL),)) for i in range(count)]


@pytest.mark.parametrize(("count", "total"), [(0, 20), (3, 50), (50, 50)])
def test_the_limits_are_where_the_binomial_tails_are(count: int, total: int) -> None:
    lower, upper = clopper_pearson(count, total, 0.05)
    if count < total:
        assert binom.cdf(count, total, upper) == pytest.approx(0.05)
    if count:
        assert binom.sf(count - 1, total, lower) == pytest.approx(0.05)
    assert lower <= count / total <= upper


def test_many_samples_meet_the_target_and_few_cannot() -> None:
    (many,) = calibrate(mails(300))
    assert many.met
    assert many.missed == 0
    assert many.upper <= 0.05
    assert many.threshold >= 0.9
    (few,) = calibrate(mails(10))
    assert not few.met
    assert few.threshold == 0


def test_what_is_missed_is_counted() -> None:
    hidden = Sample(text="the word is swordfish", gold=((12, 21, Label.SECRET),))
    rows = {row.label: row for row in calibrate([*mails(5), hidden])}
    assert rows[Label.SECRET].missed == 1
    assert rows[Label.SECRET].upper == 1.0


def test_bad_samples_are_refused_without_their_text() -> None:
    for row in (
        {"text": "Ann"},
        {"text": "Ann", "spans": [{"start": 0, "end": 3, "label": "NOBODY"}]},
        {"text": "Ann", "spans": [{"start": 0, "end": 9, "label": "PERSON"}]},
        7,
    ):
        with pytest.raises(RequestInvalid) as caught:
            samples_of([row])
        assert "Ann" not in str(caught.value)
    with pytest.raises(RequestInvalid):
        calibrate([])
    with pytest.raises(RequestInvalid):
        calibrate(mails(1), miss_rate=0.0)


def test_a_threshold_becomes_part_of_the_policy() -> None:
    plain, strict = configured(DeidSection(policy="label")), configured(DeidSection(policy="label", thresholds={"EMAIL": 0.99}))
    assert plain.digest != strict.digest
    assert "[EMAIL]" in redact("write to a@mail.example.org now", plain).text
    assert "[EMAIL]" not in redact("write to a@mail.example.org now", strict).text
    with pytest.raises(ConfigInvalid, match="PERSON"):
        configured(DeidSection(policy="label", thresholds={"NOBODY": 0.5}))
