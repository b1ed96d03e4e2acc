"""Membership scores: closed forms on small cases, intervals that hold, caps that bind."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special

from discreet.audit import attacks
from discreet.audit.bounds import GaussianTradeOff, area_under_curve
from discreet.audit.canaries import Canaries
from discreet.errors import OperationFailed, RecordInvalid
from discreet.keys import Stream


def statistics(log_probabilities: list[float], *, guessed: list[bool] | None = None) -> attacks.TokenStatistics:
    size = len(log_probabilities)
    return attacks.TokenStatistics(
        log_probabilities=np.array(log_probabilities),
        means=np.full(size, -2.0),
        deviations=np.full(size, 0.5),
        guessed=np.array(guessed or [False] * size),
    )


def test_scores_by_hand() -> None:
    text = statistics([-1.0, -2.0, -3.0, -4.0, -5.0, -1.0, -1.0, -1.0, -1.0, -1.0])
    assert attacks.loss(text) == -2.0
    assert attacks.min_k(text) == -4.5
    assert attacks.min_k_plus(text) == pytest.approx(-5.0)
    assert attacks.compressed(text, "aaaa") == pytest.approx(-20 / 12)
    assert attacks.min_k(statistics([-3.0])) == -3.0


def test_error_zone_counts_wrong_guesses_only_and_is_infinite_without_a_fall() -> None:
    model = statistics([-1.0, -1.0, -1.0], guessed=[False, False, True])
    assert attacks.error_zone(model, statistics([-3.0, -0.5, -9.0])) == 4.0
    assert attacks.error_zone(model, statistics([-3.0, -2.0, -1.0])) == math.inf
    assert attacks.error_zone(statistics([-1.0], guessed=[True]), statistics([-3.0])) == 0.0


def test_token_statistics_are_those_of_the_distribution(untrained, canaries: Canaries) -> None:
    module, words = untrained
    texts = canaries.texts[:5]
    found = attacks.token_statistics(module, words, texts, token_budget=40)
    ids = torch.tensor([words(texts[0])["input_ids"]])
    module.eval()
    with torch.inference_mode():
        log = module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, :-1].double().log_softmax(-1)
    np.testing.assert_allclose(found[0].log_probabilities, log.gather(-1, ids[0, 1:, None]).squeeze(-1), atol=1e-6)
    np.testing.assert_allclose(found[0].means, (log.exp() * log).sum(-1), atol=1e-6)
    with pytest.raises(RecordInvalid):
        attacks.token_statistics(module, words, [words.vocabulary[0]], token_budget=40)


def test_a_model_that_diverged_is_an_error(untrained, canaries: Canaries) -> None:
    module, words = untrained
    with torch.no_grad():
        module.head.bias.fill_(math.nan)
    with pytest.raises(OperationFailed):
        attacks.token_statistics(module, words, canaries.texts[:2], token_budget=40)


def test_every_score_finds_a_model_that_memorised(control, untrained, canaries: Canaries) -> None:
    (module, words), (before, _) = control, untrained
    trained, reference = (attacks.token_statistics(each, words, canaries.texts, token_budget=400) for each in (module, before))
    scores = attacks.score(canaries.texts, trained, reference)
    assert set(scores) == {*attacks.ALONE, *attacks.BESIDE}
    for name, scored in scores.items():
        found = attacks.measure(scored, canaries.included, level=0.05, trade_off=GaussianTradeOff(mu=1.0))
        assert found.auc > 0.9, name
        assert found.beaten, name


def test_the_share_of_the_others_is_taken_out_of_inner_products() -> None:
    """Unit gradients that share half of themselves: what the others add drowns the inner product; ridge zero is exact without noise."""
    random, count = np.random.default_rng(0), 300
    own = random.normal(size=(count, 2000))
    rows = own / np.linalg.norm(own, axis=1)[:, None] + random.normal(1, 0.3, size=count)[:, None] * np.eye(1, 2000)
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    gram, included = rows @ rows.T, random.random(count) < 0.5
    learnt = included * 2.0
    products = gram @ learnt + rows @ random.normal(size=2000)
    clear = attacks.untangled(products, gram, ridge=1.0)
    assert area_under_curve(products, included).auc < 0.6
    assert area_under_curve(clear, included).auc > 0.8
    exact = attacks.untangled(gram @ learnt, gram, ridge=1e-9)
    assert np.ptp(exact[included]) < 1e-4
    assert exact[included].mean() - exact[~included].mean() == pytest.approx(2.0, abs=1e-4)
    assert attacks.untangled(products + 5 * gram.sum(1), gram, ridge=1.0) == pytest.approx(clear, abs=1e-6), "what all learn alike says nothing"
    for wrong in ({"gram": gram[:2]}, {"ridge": 0.0}):
        with pytest.raises(ValueError, match="Gram"):
            attacks.untangled(products, **({"gram": gram, "ridge": 1.0} | wrong))


def test_lira_standardises_and_rmia_ranks() -> None:
    assert attacks.lira([3.0], [[1.0], [3.0]])[0] == pytest.approx(1 / math.sqrt(2))
    rising = attacks.rmia([-3.0, -2.0, -1.0], [[-2.0] * 3] * 2, population=[-2.5, -1.5], population_references=[[-2.0] * 2] * 2)
    assert rising.tolist() == [0.0, 0.5, 1.0]
    assert attacks.neighbourhood([-1.0], [[-2.0], [-4.0]])[0] == 2.0
    with pytest.raises(ValueError, match="R >= 2"):
        attacks.lira([1.0], [[1.0]])


def test_neighbours_exchange_two_words() -> None:
    made = attacks.neighbours("one two three", count=6, key=Stream(bytes(32)))
    assert set(made) == {"two one three", "one three two"}
    assert attacks.neighbours("one", count=2, key=Stream(bytes(32))) == ["one", "one"]


def test_subjects_are_means_and_have_one_side() -> None:
    scores, members = attacks.by_subject([1.0, 3.0, 5.0], ["a", "a", "b"], [True, True, False])
    assert (scores.tolist(), members.tolist()) == ([2.0, 5.0], [True, False])
    with pytest.raises(RecordInvalid):
        attacks.by_subject([1.0, 3.0], ["a", "a"], [True, False])


def test_the_cap_of_the_area_is_the_gaussian_closed_form() -> None:
    for mu in (0.268, 0.925, 1.666):
        cap = attacks.auc_cap(GaussianTradeOff(mu=mu))
        exact = float(special.ndtr(mu / math.sqrt(2)))
        assert exact <= cap <= exact + 0.005


def test_a_correct_model_is_seldom_accused_and_its_interval_covers() -> None:
    random, mu, beaten, covered = np.random.default_rng(1), 0.9, 0, 0
    members = np.arange(600) < 300
    for _ in range(200):
        found = attacks.measure(random.standard_normal(600) + mu * members, members, level=0.15, trade_off=GaussianTradeOff(mu=mu))
        beaten += found.beaten
        covered += found.auc_low <= special.ndtr(mu / math.sqrt(2)) <= found.auc_high
    assert beaten <= 30
    assert covered >= 180  # 190 expected: level / 3 misses


def test_twice_the_effect_is_found() -> None:
    members = np.arange(1000) < 500
    scores = np.random.default_rng(2).standard_normal(1000) + 1.8 * members
    assert attacks.measure(scores, members, level=0.05, trade_off=GaussianTradeOff(mu=0.9)).beaten


def test_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        attacks.measure([math.nan, 1.0], [True, False], level=0.05)
