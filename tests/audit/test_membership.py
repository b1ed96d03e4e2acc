"""Membership scores against a plain loop, whatever the batch, the padding or the mode; the blind baseline at and off chance."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from discreet.audit import bounds, membership
from discreet.audit.canaries import plant
from discreet.errors import ConfigInvalid, OperationFailed, RecordInvalid
from discreet.keys import Stream


def _one_by_one(module, words, texts) -> list[float]:
    """The definition: sum of log p(next token), one text at a time, no padding, no batch."""
    module.eval()
    totals = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([words(text)["input_ids"]])
            log_probs = torch.log_softmax(module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double(), -1)
            totals.append(sum(float(log_probs[at, token]) for at, (_, token) in enumerate(pairwise(ids[0].tolist()))))
    return totals


@pytest.mark.parametrize("token_budget", [1, 37, 10_000])
def test_log_likelihoods_are_those_of_a_plain_loop_for_every_batching(untrained, canaries, token_budget: int) -> None:
    module, words = untrained
    texts = [canary.text if number % 3 else f"{canary.text} {canary.text}" for number, canary in enumerate(canaries)][:30]
    expected = _one_by_one(module, words, texts)
    module.batch_rows.clear()
    found = membership.log_likelihoods(module, words, texts, token_budget=token_budget)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert sum(module.batch_rows) == 30
    assert max(module.batch_rows) == {1: 1, 37: 3, 10_000: 30}[token_budget]


def test_score_is_what_the_adapter_added(untrained, canaries) -> None:
    module, words = untrained
    texts = canaries.texts[:10]
    off = [-(len(words(text)["input_ids"]) - 1) * math.log(len(words.vocabulary)) for text in texts]  # the base is uniform
    expected = np.array(_one_by_one(module, words, texts)) - off
    found = membership.scores(module, words, texts, token_budget=100, adapter_off=module.disable_adapter)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert module.adapter


def test_dropout_is_off_while_scoring_and_every_mode_comes_back(untrained, canaries) -> None:
    module, words = untrained
    module.train()
    module.head.eval()
    before = [part.training for part in module.modules()]
    first, second = (membership.log_likelihoods(module, words, canaries.texts[:20], token_budget=100) for _ in range(2))
    assert (first == second).all()
    assert [part.training for part in module.modules()] == before
    assert all(parameter.grad is None for parameter in module.parameters())


def test_modes_come_back_after_an_error(untrained) -> None:
    module, _ = untrained
    module.train()
    with pytest.raises(RuntimeError, match="on purpose"), membership.evaluating(module):
        raise RuntimeError("on purpose")
    assert module.training


def test_short_texts_divergence_and_a_bad_budget_are_errors(untrained, canaries) -> None:
    module, words = untrained
    with pytest.raises(RecordInvalid, match="two tokens"):
        membership.log_likelihoods(module, words, ["The"], token_budget=10)
    with pytest.raises(ConfigInvalid, match="token_budget"):
        membership.log_likelihoods(module, words, canaries.texts[:2], token_budget=0)
    with torch.no_grad():
        module.head.bias[0] = math.nan
    with pytest.raises(OperationFailed, match="finite"):
        membership.log_likelihoods(module, words, canaries.texts[:2], token_budget=100)


def test_the_trained_control_is_caught_and_the_untrained_one_is_not(control, untrained, canaries) -> None:
    claim = bounds.GaussianTradeOff(mu=1.666)
    for (module, words), expected in ((control, True), (untrained, False)):
        scores = membership.scores(module, words, canaries.texts, token_budget=2000, adapter_off=module.disable_adapter)
        test = bounds.curve_test(scores, canaries.included, trade_off=claim, fpr=0.05, level=0.025)
        area = bounds.area_under_curve(scores, canaries.included)
        assert test.rejected is expected
        assert area.at_chance is not expected
        assert (area.auc >= 0.9) is expected


def test_blind_baseline_is_at_chance_on_fair_canaries() -> None:
    """Each of 60 audits leaves chance with probability at most 0.003: one in 60 is allowed (more than one: 0.015)."""
    planted = [plant(200, key=Stream(bytes([seed]) * 32)) for seed in range(60)]
    checks = [membership.blind(canaries.texts, canaries.included) for canaries in planted]
    assert sum(not check.at_chance for check in checks) <= 1
    # Its stated standard error is honest: 60 z-scores of variance about 1 (chi-squared, upper 0.999 quantile 1.66; the mean of two halves may vary less).
    assert np.mean([((check.auc - 0.5) / check.standard_error) ** 2 for check in checks]) < 1.66


def test_blind_baseline_sees_one_giveaway_word(canaries) -> None:
    texts = [canary.text.replace("The ", "This ") if canary.included else canary.text for canary in canaries]
    check = membership.blind(texts, canaries.included)
    assert check.auc > 0.5
    assert not check.at_chance
