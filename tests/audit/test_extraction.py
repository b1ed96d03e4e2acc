"""Recitation: the control recites what it was trained on and nothing else; probabilities and exposure by their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from discreet.audit import extraction, membership
from discreet.audit.canaries import SECRET_WORDS
from discreet.audit.extraction import Recitation, exposure_bits, measured
from discreet.errors import OperationFailed, RecordInvalid


def test_the_control_recites_included_canaries_and_no_held_out_one(control, canaries) -> None:
    found = extraction.recite(*control, canaries, token_budget=500)
    assert [recitation.name for recitation in found] == [canary.name for canary in canaries]
    assert sum(recitation.exact for recitation in found if recitation.included) > 50
    assert not any(recitation.exact for recitation in found if not recitation.included)
    for recitation, canary in zip(found, canaries, strict=True):
        assert recitation.exact == (recitation.continuation == canary.secret) == (recitation.matched_fraction == 1)
        assert recitation.prompt == canary.prefix


def test_an_untrained_model_recites_nothing(untrained, canaries) -> None:
    found = extraction.recite(*untrained, canaries, token_budget=500)
    assert not any(recitation.exact for recitation in found)
    assert np.mean([recitation.matched_fraction for recitation in found]) < 0.1


def test_greedy_decoding_and_probability_are_those_of_a_plain_loop(control, canaries) -> None:
    module, words = control
    chosen = list(canaries)[:12]
    module.eval()
    for recitation, canary in zip(extraction.recite(module, words, chosen, token_budget=37), chosen, strict=True):
        sequence, total = words(canary.prefix)["input_ids"], 0.0
        free = list(sequence)
        with torch.no_grad():
            for token in words(canary.secret)["input_ids"]:
                logits = module(input_ids=torch.tensor([sequence]), attention_mask=None).logits[0, -1].double()
                total += float(torch.log_softmax(logits, -1)[token])
                sequence.append(token)
                free.append(int(module(input_ids=torch.tensor([free]), attention_mask=None).logits[0, -1].argmax()))
        assert recitation.log_probability == pytest.approx(total, abs=1e-4)
        assert recitation.continuation == words.decode(free[-SECRET_WORDS:])


def test_a_recitation_prints_no_text(control, canaries) -> None:
    found = extraction.recite(*control, list(canaries)[:5], token_budget=500)
    assert not any(part in repr(found) for recitation in found for part in (recitation.prompt, recitation.continuation))


def test_exposure_by_rank() -> None:
    references = np.log(np.linspace(0.001, 0.5, 1023))
    assert exposure_bits(0.0, references) == 10
    assert exposure_bits(-100.0, references) == 0
    assert exposure_bits(float(np.median(references)), references) == pytest.approx(1.0, abs=0.01)
    assert exposure_bits(references[-1], references) == 9  # a tie goes to the reference


def test_exposure_of_an_unplanted_secret_is_rarely_high() -> None:
    """P[exposure >= x] = 2^-x: of 2000 draws, Binomial(2000, 1/32) stays within 62.5 +- 31 (4 sd)."""
    rng = np.random.default_rng(3)
    high = sum(exposure_bits(rng.normal(), rng.normal(size=255)) >= 5 for _ in range(2000))
    assert abs(high - 62.5) <= 31


def test_exposure_refuses() -> None:
    for references in ([], [math.nan]):
        with pytest.raises(ValueError, match="reference"):
            exposure_bits(0.0, references)


def test_a_tokenizer_that_appends_or_merges_is_refused(control, canaries) -> None:
    module, words = control

    def closing(text: str) -> dict[str, list[int]]:
        return {"input_ids": [*words(text)["input_ids"], 0]}

    with pytest.raises(OperationFailed, match="keeps prefix and secret apart"):
        extraction.recite(module, closing, canaries, token_budget=100)


def test_extrapolated_exposure_agrees_with_the_normal_tail_and_is_not_capped() -> None:
    references = np.random.default_rng(0).standard_normal(20_000)
    assert extraction.exposure_extrapolated(3.0, references) == pytest.approx(-math.log2(0.00135), abs=0.5)
    assert extraction.exposure_extrapolated(8.0, references[:100]) > math.log2(101)
    for sample in (references, -np.square(references), np.square(references)):
        bits = [extraction.exposure_extrapolated(target, sample) for target in (4.0, 20.0, 200.0, 2000.0)]
        assert bits == sorted(bits)
        assert math.isfinite(bits[-1]), "a tail below the smallest float still has a lower limit"
    with pytest.raises(ValueError, match="at least 20"):
        extraction.exposure_extrapolated(1.0, [0.0] * 30)


def test_discoverable_counts_by_the_definition() -> None:
    found = extraction.discoverable([math.log(0.5), math.log(1e-3), math.log(1e-9), 0.0], samples=1000, probability=0.5)
    assert (found.count, found.total) == (3, 4)
    assert extraction.discoverable([-50.0] * 1000, samples=1000, probability=0.5).high == pytest.approx(0.00368, abs=1e-5)


def test_suffixes_are_read_in_one_pass(control, canaries) -> None:
    module, words = control
    included = [each.text for each in canaries if each.included]
    held_out = [each.text for each in canaries if not each.included]
    read = [extraction.suffix_log_probabilities(module, words, texts, prefix=5, suffix=4, token_budget=400) for texts in (included, held_out)]
    assert np.median(read[0]) > np.median(read[1]) + 5
    with pytest.raises(RecordInvalid):
        extraction.suffix_log_probabilities(module, words, included, prefix=500, suffix=4, token_budget=400)


def test_identifiers_in_what_was_written_are_read_and_folded() -> None:
    held = extraction.identifiers(["Call Dr. Ann Lee at 617-555-0142."])
    assert extraction.identifiers(["Please ring 617-555-0142 today."]) & held
    assert not extraction.identifiers(["Please ring 212-555-0199 today. Rest."]) & held


def test_a_model_that_remembers_is_told_from_one_that_does_not_by_every_figure(control, untrained, canaries) -> None:
    found = {}
    for name, pair in (("control", control), ("untrained", untrained)):
        scores = membership.log_likelihoods(*pair, canaries.texts, token_budget=500)
        found[name] = extraction.measured(extraction.recite(*pair, canaries, token_budget=500), scores, canaries.included)
    for kind in ("recited", "discoverable"):
        planted, held_out = found["control"][kind]["planted"], found["control"][kind]["held_out"]
        assert planted["low"] > max(held_out["high"], found["untrained"][kind]["planted"]["high"]), kind
        assert planted["low"] <= planted["share"] <= planted["high"]
    for kind in ("rank", "extrapolated"):
        assert found["control"]["exposure"][kind]["low"] > 3 > found["untrained"]["exposure"][kind]["high"], kind
    assert found["untrained"]["exposure"]["rank"]["low"] <= 1.5 <= found["untrained"]["exposure"]["rank"]["high"] + 1


def test_limits_of_a_median_hold_and_too_few_values_have_none() -> None:
    """Median of 30 normals: limits hold it in at least 95 % of draws; 2000 draws, 95 % - 4 sd = 93 %."""
    rng = np.random.default_rng(4)
    said = [extraction._middle(list(rng.normal(size=30)), level=0.05) for _ in range(2000)]
    assert 0.93 <= sum(each["low"] <= 0 <= each["high"] for each in said) / 2000 < 1
    assert extraction._middle([1.0, 2.0], level=0.05) == {"median": 1.5, "low": None, "high": None}


def test_exposure_is_counted_by_whole_bits() -> None:
    said = [
        Recitation(name="c", included=included, exact=False, matched_fraction=0.0, log_probability=-9.0, prompt="", continuation="")
        for included in (True, False)
    ]
    found = measured(said, [9.0, 2.5, 0.0, 1.0, 2.0, 3.0], [True, True, True, False, False, False])
    assert found["exposure"]["counts"] == [1, 1, 1]
