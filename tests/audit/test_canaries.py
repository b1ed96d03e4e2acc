"""Canaries: distinct, independent, committed, and harmless to de-identification."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations

import pytest
from scipy import stats

from discreet.audit.canaries import MAX_CANARIES, WORDS, Canaries, Design, commitment, draw_secret, opening, plant, plant_identifiers, verify
from discreet.deid.detect import detect
from discreet.errors import ConfigInvalid, DigestMismatch, RecordInvalid
from discreet.keys import Stream

SALT = bytes(range(16))
DESIGN = Design(false_positive_rate=0.05, level=0.05)


def _plant(count: int = 500, seed: int = 1) -> Canaries:
    return plant(count, key=Stream(bytes([seed]) * 32))


def test_the_same_stream_plants_the_same_canaries_and_another_plants_others() -> None:
    assert _plant() == _plant()
    assert not set(_plant(seed=1).texts) & set(_plant(seed=2).texts)


def test_coins_are_fair_and_independent_not_exactly_half() -> None:
    """40 plantings of 500: sums are Binomial(500, 1/2), variance 125. A shuffle of exactly half would have variance 0; 39 degrees of freedom, false alarm 0.002."""
    sums = [sum(_plant(seed=seed).included) for seed in range(40)]
    assert sum(sums) / (40 * 500) == pytest.approx(0.5, abs=0.011)  # 3 sd
    spread = sum((total - 250) ** 2 for total in sums) / 125
    assert stats.chi2.ppf(0.001, 40) < spread < stats.chi2.ppf(0.999, 40)


def test_coins_do_not_depend_on_the_text() -> None:
    canaries = _plant(4000)
    by_template = {prefix: [0, 0] for prefix in {_template(canary.prefix) for canary in canaries}}
    for canary in canaries:
        by_template[_template(canary.prefix)][canary.included] += 1
    assert len(by_template) == 16
    assert stats.chi2_contingency(list(by_template.values())).pvalue > 0.001


def _template(prefix: str) -> str:
    return " ".join(word for word in prefix.split() if not _invented(word))


def _invented(word: str) -> bool:
    return word.endswith(("osk", "ump", "elt", "irn"))


def test_no_canary_is_a_near_duplicate_of_another() -> None:
    canaries = list(_plant())
    invented = [word for canary in canaries for word in canary.prefix.split() if _invented(word)]
    assert len(set(invented)) == len(canaries)
    secrets = [canary.secret.split() for canary in canaries]
    shared = max(sum(left == right for left, right in zip(a, b, strict=True)) for a, b in combinations(secrets, 2))
    assert shared <= 3


def test_secrets_hold_32_bits() -> None:
    assert len(WORDS) == len(set(WORDS)) == 256
    words = [word for secret in (draw_secret(Stream(bytes([7]) * 32).fork(i)) for i in range(2000)) for word in secret.split()]
    assert stats.chisquare([words.count(word) for word in WORDS]).pvalue > 0.001


def test_texts_have_no_shape_of_an_identifier() -> None:
    for canary in _plant():
        assert canary.text == f"{canary.prefix} {canary.secret}."
        body = canary.text[1:]
        assert body.islower()
        assert not any(character.isdigit() for character in body)
        assert len(canary.text.split()) <= 10


def test_deidentification_leaves_canaries_and_reads_planted_identifiers() -> None:
    for canary in _plant():
        assert detect(canary.text) == [], canary.name
    planted = plant_identifiers(60, key=Stream(bytes(range(32))))
    assert 15 < sum(planted.included) < 45
    for canary in planted:
        assert [canary.text[span.start : span.end] for span in detect(canary.text)] == [canary.secret]


def test_rows_hold_included_canaries_only_one_unit_each() -> None:
    canaries = _plant()
    rows = canaries.rows()
    assert [row["text"] for row in rows] == [canary.text for canary in canaries if canary.included]
    assert len({row["unit"] for row in rows}) == len({row["id"] for row in rows}) == len(rows)
    written = json.dumps(rows)
    assert not any(canary.secret in written for canary in canaries if not canary.included)


def test_a_canary_prints_neither_secret_nor_coin() -> None:
    canary = next(iter(_plant()))
    assert canary.secret not in repr(canary)
    assert "included" not in repr(canary)


@pytest.mark.parametrize("count", [0, -1, MAX_CANARIES + 1])
def test_plant_refuses_a_count_out_of_range(count: int) -> None:
    with pytest.raises(ConfigInvalid, match="canaries"):
        _plant(count)


def test_all_prefixes_are_available() -> None:
    assert len(_plant(MAX_CANARIES)) == MAX_CANARIES


def test_an_opening_verifies_after_a_round_trip_through_json() -> None:
    canaries = _plant(20)
    opened = json.loads(json.dumps(opening(canaries, salt=SALT, design=DESIGN)))
    assert verify(commitment(canaries, salt=SALT, design=DESIGN), opened) == (canaries, DESIGN)


def _flip(canaries: Canaries) -> Canaries:
    first, *rest = canaries
    return Canaries(canaries=(replace(first, included=not first.included), *rest))


def _reword(canaries: Canaries) -> Canaries:
    first, *rest = canaries
    return Canaries(canaries=(replace(first, secret="alley anchor apple arrow"), *rest))


@pytest.mark.parametrize(
    ("change", "design", "salt"),
    [
        (_flip, DESIGN, SALT),
        (_reword, DESIGN, SALT),
        (lambda same: same, replace(DESIGN, false_positive_rate=0.1), SALT),
        (lambda same: same, replace(DESIGN, level=0.01), SALT),
        (lambda same: same, replace(DESIGN, score="loss"), SALT),
        (lambda same: same, replace(DESIGN, method="best threshold"), SALT),
        (lambda same: same, DESIGN, bytes(16)),
    ],
    ids=["coin", "text", "rate", "level", "score", "method", "salt"],
)
def test_whatever_is_changed_after_the_commitment_is_found(change, design: Design, salt: bytes) -> None:
    canaries = _plant(20)
    committed = commitment(canaries, salt=SALT, design=DESIGN)
    with pytest.raises(DigestMismatch, match="commitment"):
        verify(committed, opening(change(canaries), salt=salt, design=design))


def test_a_short_salt_and_a_foreign_format_are_refused() -> None:
    from discreet.config import digest_of

    with pytest.raises(ConfigInvalid, match="salt"):
        commitment(_plant(20), salt=bytes(15), design=DESIGN)
    foreign = {"format": "other"}
    with pytest.raises(RecordInvalid, match="format"):
        verify(digest_of(foreign), foreign)
