"""Risk in words: closed forms of the Gaussian curve and of pure epsilon-DP, and never rounded in our favour."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import pytest
from scipy.special import ndtr

from discreet.audit.bounds import GaussianTradeOff
from discreet.audit.risk import advantage, explain


@dataclass
class _Promise:
    epsilon: float
    delta: float = 1e-5
    unit: str = "patient"


@dataclass
class _Pure:
    """Trade-off curve of (epsilon, delta)-DP: Kairouz, Oh & Viswanath 2015."""

    epsilon: float
    delta: float = 0.0
    mu: float = math.nan

    def tpr(self, fpr: float) -> float:
        return min(1.0, math.exp(self.epsilon) * fpr + self.delta, 1 - math.exp(-self.epsilon) * (1 - self.delta - fpr))


@pytest.mark.parametrize("mu", [0.0, 0.01, 0.268, 1.0, 1.666, 5.0, 10.0])
def test_advantage_of_the_gaussian_curve(mu: float) -> None:
    assert advantage(GaussianTradeOff(mu=mu)) == pytest.approx(2 * ndtr(mu / 2) - 1, abs=1e-6)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.1, 0.0), (1.0, 1e-3), (3.0, 0.0), (8.0, 1e-5)])
def test_advantage_of_epsilon_delta(epsilon: float, delta: float) -> None:
    expected = (math.expm1(epsilon) + 2 * delta) / (math.exp(epsilon) + 1)
    assert advantage(_Pure(epsilon, delta)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("epsilon", "mu", "right", "caught"), [(1, 0.268, 56, 2), (4, 0.925, 68, 9), (8, 1.666, 80, 26)])
def test_the_sentence_says_the_published_caps_rounded_up(epsilon: int, mu: float, right: int, caught: int) -> None:
    explanation = explain(_Promise(epsilon), GaussianTradeOff(mu=mu))
    assert f"right at most {right} times in 100 instead of 50" in explanation.sentence
    assert f"find at most {caught} in 100" in explanation.sentence
    assert "one patient's records" in explanation.sentence
    assert right / 100 >= explanation.figures["accuracy"] > (right - 1) / 100


def test_no_leak_is_a_coin() -> None:
    explanation = explain(_Promise(0.0, 0.0), _Pure(0.0))
    assert "right at most 50 times in 100" in explanation.sentence
    assert "factor of at most 1." in explanation.sentence


def test_the_odds_factor_is_e_to_the_epsilon() -> None:
    assert explain(_Promise(8.0), GaussianTradeOff(mu=1.666)).figures["odds_factor"] == pytest.approx(2980.96, rel=1e-5)
    assert "factor of at most 2,981." in explain(_Promise(8.0), GaussianTradeOff(mu=1.666)).sentence
    assert "more than a million" in explain(_Promise(20.0), GaussianTradeOff(mu=3.0)).sentence


@pytest.mark.parametrize(("delta", "said"), [(1e-5, "1e-05"), (1 / 4500, "0.0003"), (2e-4, "0.0002"), (0.0, "0"), (9.5e-5, "0.0001")])
def test_delta_is_rounded_up(delta: float, said: str) -> None:
    assert f"Up to a chance of {said}," in explain(_Promise(1.0, delta), GaussianTradeOff(mu=0.268)).sentence


def test_small_odds_are_rounded_up() -> None:
    assert "factor of at most 2.8." in explain(_Promise(math.log(2.71)), GaussianTradeOff(mu=0.268)).sentence


def test_figures_are_json_even_without_privacy() -> None:
    explanation = explain(_Promise(math.inf), GaussianTradeOff(mu=30.0))
    assert json.loads(json.dumps(explanation.figures, allow_nan=False))["odds_factor"] is None
    assert "right at most 100 times in 100" in explanation.sentence


def test_explain_refuses() -> None:
    for promise in (_Promise(-1.0), _Promise(math.nan), _Promise(1.0, 1.0), _Promise(1.0, math.nan)):
        with pytest.raises(ValueError, match="epsilon"):
            explain(promise, GaussianTradeOff(mu=1.0))
