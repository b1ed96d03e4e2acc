"""Bounds against published figures and an independent implementation; false alarms and power with fixed n and stated rates; mutants of the audit."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from discreet.audit import bounds
from discreet.audit.bounds import Chance, GaussianTradeOff, Verdict

DELTA = 1e-5
# mu of the Gaussian mechanism at (epsilon, 1e-5): Balle & Wang 2018, to three digits.
MU = {1: 0.268, 2: 0.502, 4: 0.925, 8: 1.666, 10: 2.000}
FAIR = {"blind": Chance(auc=0.5, standard_error=0.03)}


def _coins(m: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random(m) < 0.5


def _leak(m: int, mu: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores of a Gaussian mechanism with a tight attack: N(0, 1) held out, N(mu, 1) included."""
    rng = np.random.default_rng(seed)
    included = rng.random(m) < 0.5
    return rng.normal(size=m) + mu * included, included


def _perfect(m: int) -> tuple[np.ndarray, np.ndarray]:
    included = np.arange(m) % 2 == 0
    return included + np.linspace(0, 0.5, m), included


def _with_correct(m: int, guesses: int, correct: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores m, m - 1, ..., 1 and coins such that exactly `correct` of `guesses` two-sided guesses are right."""
    included = np.zeros(m, dtype=bool)
    top = guesses - guesses // 2
    included[:top] = True
    wrong = guesses - correct
    included[: min(wrong, top)] = False
    if wrong > top:
        included[m - (wrong - top) :] = True
    return np.arange(m, 0, -1.0), included


# The largest epsilon a perfect attack can show at 95 %, delta = 1e-5.
CEILINGS = [
    (100, 3.49, 2.78, 5.84, 2.57),
    (500, 5.10, 4.41, 8.76, 4.21),
    (1000, 5.78, 5.09, 9.92, 4.91),
    (5000, 7.28, 6.59, 12.5, 6.52),
]


@pytest.mark.parametrize(("m", "all_", "half", "f_dp", "clopper"), CEILINGS)
def test_a_perfect_attack_shows_the_published_ceilings(m: int, all_: float, half: float, f_dp: float, clopper: float) -> None:
    scores, included = _perfect(m)
    found = (
        bounds.one_run(scores, included, delta=DELTA, level=0.05),
        bounds.one_run(scores, included, delta=DELTA, level=0.05, guesses=m // 2),
        bounds.f_dp_one_run(scores, included, delta=DELTA, level=0.05),
        bounds.clopper_pearson(scores, included, delta=DELTA, level=0.05),
    )
    for bound, expected in zip(found, (all_, half, f_dp, clopper), strict=True):
        assert bound.epsilon == pytest.approx(expected, abs=0.006 if expected < 10 else 0.06)
        assert bound.ceiling == bound.epsilon


# m, guesses, correct, level, delta, epsilon (Steinke), epsilon (Mahloujifar): an independent implementation with brentq and dp_accounting's Gaussian calibration.
GOLDEN = [
    (1000, 200, 150, 0.05, 1e-5, 0.819973, 1.296916),
    (500, 250, 200, 0.05, 1e-5, 1.118356, 2.027945),
    (500, 500, 320, 0.05, 1e-4, 0.416060, 0.707558),
    (200, 40, 36, 0.01, 1e-6, 1.026697, 1.779456),
    (3000, 300, 299, 0.05, 1e-5, 4.089078, 6.393673),
]


@pytest.mark.parametrize(("m", "guesses", "correct", "level", "delta", "steinke", "mahloujifar"), GOLDEN)
def test_one_run_bounds_agree_with_an_independent_implementation(
    m: int, guesses: int, correct: int, level: float, delta: float, steinke: float, mahloujifar: float
) -> None:
    scores, included = _with_correct(m, guesses, correct)
    plain = bounds.one_run(scores, included, delta=delta, level=level, guesses=guesses)
    curve = bounds.f_dp_one_run(scores, included, delta=delta, level=level, guesses=guesses)
    assert (plain.correct, curve.correct) == (correct, correct)
    assert plain.epsilon == pytest.approx(steinke, abs=1e-5)
    assert curve.epsilon == pytest.approx(mahloujifar, abs=1e-4)
    assert plain.epsilon <= steinke + 1e-9  # bisection ends on the safe side


# jax_privacy, auditing_test.py (Apache-2.0), test_epsilon_one_run_close: 10,000 scores on each side at the quantiles of N(0, 1) and N(shift, 1), level 0.05, delta 1e-6, one-sided
# guesses at the best threshold, the level shared by the thresholds that are corners of the ROC curve's hull.
JAX = [(1, 1.13346, 2.164749), (2, 2.311945, 4.7218075), (4, 4.395568, 9.133752)]


def _corners(shift: float, n: int = 10_000) -> list[tuple[int, int]]:
    """(false, true positives) at the corners of the hull, from (0, 0) to (n, n)."""
    held_out = stats.norm.ppf((np.arange(n) + 0.5) / n)
    planted = held_out + shift
    thresholds = np.concatenate([held_out, planted])
    points = {(0, 0), *zip((n - np.searchsorted(held_out, thresholds)).tolist(), (n - np.searchsorted(planted, thresholds)).tolist(), strict=True)}
    hull: list[tuple[int, int]] = []
    for x, y in sorted(points):
        while len(hull) > 1 and (hull[-1][0] - hull[-2][0]) * (y - hull[-2][1]) >= (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]):
            hull.pop()
        hull.append((x, y))
    return hull


@pytest.mark.parametrize(("shift", "steinke", "mahloujifar"), [*(pytest.param(*each, marks=pytest.mark.slow) for each in JAX[:2]), JAX[2]])
def test_one_run_bounds_are_the_published_figures_of_jax_privacy(shift: float, steinke: float, mahloujifar: float) -> None:
    corners = _corners(shift)
    level, m = 0.05 / len(corners), 20_000

    def best(rejects) -> float:
        found = 0.0
        for false, true in corners[1:]:
            if rejects(found + 1e-9, false + true, true):
                low, high = found, 20.0
                while high - low > 1e-7:
                    middle = (low + high) / 2
                    low, high = (middle, high) if rejects(middle, false + true, true) else (low, middle)
                found = low
        return found

    plain = best(lambda epsilon, r, v: bounds._one_run_p_value(epsilon, m=m, r=r, v=v, delta=1e-6) < level)
    assert plain == pytest.approx(steinke, rel=1e-5)
    mu = best(lambda mu, r, v: bounds._f_dp_rejects(mu, m=m, r=r, v=v, level=level))
    assert bounds.gdp_epsilon(mu, delta=1e-6) == pytest.approx(mahloujifar, rel=1e-5)


@pytest.mark.parametrize(("epsilon", "mu"), MU.items())
def test_gdp_epsilon_agrees_with_the_analytic_gaussian(epsilon: float, mu: float) -> None:
    assert bounds.gdp_epsilon(mu, delta=DELTA) == pytest.approx(epsilon, rel=3e-3)


@pytest.mark.parametrize("mu", [0.3, 1.0, 1.5])
def test_the_bounds_of_two_samples_are_those_of_exact_binomial_limits_and_close_in_on_the_truth(mu: float) -> None:
    """As jax_privacy's test_epsilon_clopper_pearson_tight: scores at the quantiles of N(0, 1) and N(mu, 1), level 0.2, delta 0.1, to 20 %; the limits by scipy's binomtest."""
    n, fpr, level, delta = 200_000, 0.05, 0.2, 0.1
    held_out = stats.norm.ppf((np.arange(n) + 0.5) / n)
    scores, included = np.concatenate([held_out, held_out + mu]), np.arange(2 * n) >= n
    pair = bounds.clopper_pearson(scores, included, delta=delta, level=level, fpr=fpr)
    gaussian = bounds.gdp(scores, included, delta=delta, level=level, fpr=fpr)

    def limits(count: int) -> tuple[float, float]:
        found = stats.binomtest(count, n).proportion_ci(1 - level, "exact")
        return found.low, found.high

    tpr_low, fpr_high = limits(pair.correct)[0], limits(math.floor(fpr * n))[1]
    sides = ((tpr_low - delta) / fpr_high, (1 - fpr_high - delta) / (1 - tpr_low))
    assert pair.epsilon == pytest.approx(math.log(max(1.0, *sides)), abs=1e-9)
    assert gaussian.mu == pytest.approx(stats.norm.ppf(tpr_low) - stats.norm.ppf(fpr_high), abs=1e-9)
    assert 0.8 * mu <= gaussian.mu <= mu
    assert pair.epsilon <= gaussian.epsilon <= bounds.gdp_epsilon(mu, delta=delta)


def test_gdp_epsilon_at_its_edges() -> None:
    assert bounds.gdp_epsilon(0.0, delta=DELTA) == 0
    assert bounds.gdp_epsilon(1e-6, delta=DELTA) == 0  # total variation below delta
    assert bounds.gdp_epsilon(40.0, delta=DELTA) == pytest.approx(40**2 / 2 + 40 * 4.27, rel=0.01)
    with pytest.raises(ValueError, match="delta"):
        bounds.gdp_epsilon(1.0, delta=0.0)
    with pytest.raises(ValueError, match="mu"):
        bounds.gdp_epsilon(math.nan, delta=DELTA)


def test_without_delta_one_run_is_the_binomial_test() -> None:
    scores, included = _with_correct(100, 100, 100)
    q = 0.05 ** (1 / 100)
    assert bounds.one_run(scores, included, delta=0.0, level=0.05).epsilon == pytest.approx(math.log(q / (1 - q)), abs=1e-5)


RUNS = 300
# Binomial(300, 0.05) exceeds 27 with probability below 0.001.
ALLOWED = 27


@pytest.mark.parametrize(
    "auditor",
    [
        lambda s, i: bounds.one_run(s, i, delta=DELTA, level=0.05).epsilon > 0,
        lambda s, i: bounds.f_dp_one_run(s, i, delta=DELTA, level=0.05).epsilon > 0,
        lambda s, i: bounds.clopper_pearson(s, i, delta=DELTA, level=0.05).epsilon > 0,
        lambda s, i: bounds.gdp(s, i, delta=DELTA, level=0.05, fpr=0.05).epsilon > 0,
        lambda s, i: bounds.curve_test(s, i, trade_off=GaussianTradeOff(mu=0.0), fpr=0.05, level=0.05).rejected,
    ],
    ids=["one_run", "f_dp_one_run", "clopper_pearson", "gdp", "curve_test"],
)
def test_noise_alone_rarely_shows_a_leak(auditor) -> None:
    alarms = sum(auditor(np.random.default_rng(seed).normal(size=200), _coins(200, seed + RUNS)) for seed in range(RUNS))
    assert alarms <= ALLOWED


@pytest.mark.parametrize("fpr", [0.0, 0.05, 0.3])
def test_the_false_positive_limit_at_a_data_dependent_threshold_is_exact(fpr: float) -> None:
    """Uniform scores: the true false-positive rate of a threshold t is 1 - t. It must exceed the 90 % limit in 10 % of 4000 runs: 4 sd = 1.9 %."""
    rng, missed = np.random.default_rng(7), 0
    for _ in range(4000):
        scores, included = rng.random(80), rng.random(80) < 0.5
        rates = bounds._rates(scores, included, fpr=fpr)
        missed += 1 - rates.threshold > rates.fpr_high(0.1)
    assert missed / 4000 == pytest.approx(0.1, abs=0.019)


def test_a_mechanism_that_leaks_exactly_what_it_claims_is_rarely_rejected() -> None:
    claim = GaussianTradeOff(mu=1.0)
    alarms = sum(bounds.curve_test(*_leak(500, 1.0, seed), trade_off=claim, fpr=0.05, level=0.05).rejected for seed in range(200))
    assert alarms <= 20  # Binomial(200, 0.05) exceeds 20 with probability below 0.002


@pytest.mark.parametrize("epsilon", [4, 8])
def test_half_the_noise_is_found_with_500_canaries(epsilon: int) -> None:
    claim = GaussianTradeOff(mu=MU[epsilon])
    tests = [bounds.curve_test(*_leak(500, 2 * claim.mu, seed), trade_off=claim, fpr=0.05, level=0.05) for seed in range(50)]
    assert sum(test.rejected for test in tests) >= 47
    assert all(test.rejected == (test.p_value <= 0.05) for test in tests)


@pytest.mark.parametrize(("mu", "m"), [(0.5, 500), (1.666, 300)])
def test_declared_power_and_detectable_effect_are_what_simulation_shows(mu: float, m: int) -> None:
    claim = GaussianTradeOff(mu=mu)

    def simulated(effect: float) -> float:
        return float(np.mean([bounds.curve_test(*_leak(m, effect, seed), trade_off=claim, fpr=0.05, level=0.05).rejected for seed in range(200)]))

    declared = bounds.curve_test(*_perfect(m), trade_off=claim, fpr=0.05, level=0.05)
    assert simulated(declared.detectable) == pytest.approx(0.8, abs=0.1)  # 3.5 sd of Binomial(200, 0.8)
    assert simulated(2 * mu) == pytest.approx(declared.power, abs=0.1)


def test_a_bound_never_exceeds_the_truth_and_never_its_ceiling() -> None:
    for seed in range(40):
        scores, included = _leak(300, MU[4], seed)
        for bound in (
            bounds.one_run(scores, included, delta=DELTA, level=0.01),
            bounds.f_dp_one_run(scores, included, delta=DELTA, level=0.01),
            bounds.clopper_pearson(scores, included, delta=DELTA, level=0.01),
            bounds.gdp(scores, included, delta=DELTA, level=0.01, fpr=0.05),
        ):
            assert bound.epsilon <= 4.0
            assert bound.epsilon <= bound.ceiling


def test_higher_scores_mean_included() -> None:
    scores, included = _perfect(100)
    for auditor in (bounds.one_run, bounds.f_dp_one_run, bounds.clopper_pearson, bounds.gdp):
        assert auditor(scores, included, delta=DELTA, level=0.05).epsilon > 2
        assert auditor(-scores, included, delta=DELTA, level=0.05).epsilon == 0
    assert bounds.area_under_curve(scores, included).auc == 1
    assert bounds.area_under_curve(-scores, included).auc == 0


def test_equal_scores_say_nothing() -> None:
    scores, included = np.zeros(200), _coins(200, 1)
    assert bounds.clopper_pearson(scores, included, delta=DELTA, level=0.05).epsilon == 0
    assert not bounds.curve_test(scores, included, trade_off=GaussianTradeOff(mu=0.1), fpr=0.05, level=0.05).rejected
    assert bounds.area_under_curve(scores, included).auc == 0.5


def test_area_under_curve_counts_pairs() -> None:
    scores, included = _leak(60, 0.7, 3)
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[included] for b in scores[~included]]
    assert bounds.area_under_curve(scores, included).auc == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize(("auc", "fair"), [(0.5, True), (0.41, True), (0.59, True), (0.39, False), (0.61, False)])
def test_chance_is_three_standard_errors_on_both_sides(auc: float, fair: bool) -> None:
    assert Chance(auc=auc, standard_error=0.033).at_chance is fair


@pytest.mark.parametrize(("fpr", "false_positives"), [(0.0, 0), (0.019, 0), (0.02, 1), (0.05, 2), (0.99, 49)])
def test_the_threshold_is_the_committed_rank_of_the_held_out_scores(fpr: float, false_positives: int) -> None:
    test = bounds.curve_test(*_perfect(100), trade_off=GaussianTradeOff(mu=1.0), fpr=fpr, level=0.05)
    assert test.fpr == false_positives / 50
    assert test.threshold == np.sort(_perfect(100)[0][1::2])[::-1][false_positives]


def test_p_value_is_the_smallest_level_that_rejects() -> None:
    scores, included = _leak(300, 1.0, 11)
    p_value = bounds.curve_test(scores, included, trade_off=GaussianTradeOff(mu=0.5), fpr=0.05, level=0.05).p_value
    assert 1e-6 < p_value < 0.4
    for level, rejected in ((p_value * 1.01, True), (p_value * 0.98, False)):
        assert bounds.curve_test(scores, included, trade_off=GaussianTradeOff(mu=0.5), fpr=0.05, level=level).rejected is rejected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0, math.nan]}, "finite scores"),
        ({"scores": [1.0, math.inf]}, "finite scores"),
        ({"scores": [1.0]}, "one shape"),
        ({"scores": [], "included": []}, "one shape"),
        ({"included": [0, 2]}, "boolean"),
        ({"level": 0.0}, "level"),
        ({"level": 0.6}, "level"),
        ({"level": math.nan}, "level"),
        ({"delta": -1e-9}, "delta"),
        ({"delta": math.nan}, "delta"),
        ({"guesses": 3}, "guesses"),
        ({"guesses": 0}, "guesses"),
    ],
)
def test_one_run_refuses(change: dict, message: str) -> None:
    arguments = {"scores": [1.0, 0.0], "included": [True, False], "delta": DELTA, "level": 0.05} | change
    with pytest.raises(ValueError, match=message):
        bounds.one_run(arguments.pop("scores"), arguments.pop("included"), **arguments)


def test_tests_of_two_samples_refuse_canaries_of_one_side() -> None:
    with pytest.raises(ValueError, match="included and held-out"):
        bounds.curve_test([1.0, 2.0], [True, True], trade_off=GaussianTradeOff(mu=1.0), fpr=0.05, level=0.05)
    with pytest.raises(ValueError, match="fpr"):
        bounds.curve_test([1.0, 2.0], [True, False], trade_off=GaussianTradeOff(mu=1.0), fpr=1.0, level=0.05)


@pytest.mark.parametrize("mu", [math.inf, math.nan])
def test_a_claim_without_noise_is_refused_not_passed(mu: float) -> None:
    class Unprotected:
        def __init__(self) -> None:
            self.mu = mu

        def tpr(self, fpr: float) -> float:
            return 1.0

    with pytest.raises(ValueError, match="nothing to test"):
        bounds.curve_test(*_leak(100, 1.0, 1), trade_off=Unprotected(), fpr=0.05, level=0.05)


def _judge(scores, included, control, *, epsilon: int = 8, **changes):
    arguments = {
        "negatives": FAIR,
        "epsilon": float(epsilon),
        "delta": DELTA,
        "trade_off": GaussianTradeOff(mu=MU[epsilon]),
        "fpr": 0.05,
        "level": 0.05,
    }
    return bounds.verdict(scores, included, control=control, **(arguments | changes))


def _audit(leak: float, seed: int, m: int = 500) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    scores, included = _leak(m, leak, seed)
    return scores, included, np.random.default_rng(seed + 1).normal(size=m) + 8 * included


def test_the_unmutated_audit_passes_99_of_100() -> None:
    """The mechanism leaks as much as it claims, with an attack that is as good as one can be."""
    assert sum(_judge(*_audit(MU[8], seed)).verdict is Verdict.PASS for seed in range(100)) >= 99


@pytest.mark.parametrize("mutant", [2.0, 100.0], ids=["half the noise", "no noise"])
def test_a_mechanism_with_too_little_noise_fails(mutant: float) -> None:
    reports = [_judge(*_audit(mutant * MU[8], seed)) for seed in range(20)]
    assert all(report.verdict is Verdict.FAIL for report in reports)
    assert all(layer.verdict is Verdict.FAIL for report in reports for layer in report.layers if layer.name == "curve test")


def test_a_certified_bound_above_the_claim_fails() -> None:
    report = _judge(*_audit(20.0, 1), epsilon=4)
    assert report.epsilon_lower > 4
    assert {layer.name: layer.verdict for layer in report.layers}["certified bound"] is Verdict.FAIL


def test_a_control_that_was_not_trained_is_inconclusive() -> None:
    scores, included, _ = _audit(0.0, 3)
    assert _judge(scores, included, np.random.default_rng(9).normal(size=500)).verdict is Verdict.INCONCLUSIVE


def test_swapped_labels_are_inconclusive() -> None:
    scores, included, control = _audit(1.0, 3)
    report = _judge(scores, ~included, control)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert {layer.name: layer.verdict for layer in report.layers}["positive control"] is Verdict.INCONCLUSIVE


def test_a_blind_audit_is_inconclusive() -> None:
    """A score that reads nothing (all the same) cannot see a model that publishes its data, and must not let it pass."""
    _, included, _ = _audit(100.0, 3)
    assert _judge(np.zeros(500), included, np.zeros(500)).verdict is Verdict.INCONCLUSIVE


def test_canaries_that_differ_before_training_are_inconclusive() -> None:
    scores, included, control = _audit(0.5, 3)
    shifted = bounds.area_under_curve(np.random.default_rng(5).normal(size=500) + included, included)
    assert not shifted.at_chance
    assert _judge(scores, included, control, negatives={"blind": shifted}).verdict is Verdict.INCONCLUSIVE


def test_too_few_canaries_are_inconclusive_and_say_what_they_could_have_seen() -> None:
    report = _judge(*_audit(0.0, 3), epsilon=1)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert report.detectable_mu > 2 * MU[1]
    assert report.detectable == pytest.approx(bounds.gdp_epsilon(report.detectable_mu, delta=DELTA))
    tiny = _judge(*_audit(0.0, 3, m=20))
    assert tiny.verdict is Verdict.INCONCLUSIVE
    assert math.isinf(tiny.detectable)
    assert tiny.to_json()["detectable"] is None


def test_a_ceiling_below_the_claim_is_named_and_the_curve_test_decides() -> None:
    report = _judge(*_audit(0.0, 3, m=300))
    assert report.ceiling < 8
    assert report.verdict is Verdict.PASS
    assert {layer.name: layer.verdict for layer in report.layers}["certified bound"] is Verdict.INCONCLUSIVE


def test_a_broken_mechanism_layer_fails_a_clean_model() -> None:
    skipped = bounds.mechanism_layer(accounted_steps=25, executed_steps=26, trainable=4, moved=4)
    assert _judge(*_audit(0.0, 3), mechanism=[skipped]).verdict is Verdict.FAIL


def test_verdict_needs_a_negative_check_and_a_claim() -> None:
    with pytest.raises(ValueError, match="negative check"):
        _judge(*_audit(0.0, 3), negatives={})
    for epsilon in (0.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="epsilon"):
            bounds.verdict(
                *_audit(0.0, 3)[:2], control=[], negatives=FAIR, epsilon=epsilon, delta=DELTA, trade_off=GaussianTradeOff(mu=1), fpr=0.05, level=0.05
            )


def test_the_report_is_json_without_single_scores() -> None:
    scores, included, control = _audit(1.0, 3)
    report = _judge(scores, included, control).to_json()
    text = json.dumps(report, allow_nan=False)
    assert {"verdict", "epsilon_lower", "ceiling", "detectable", "layers"} <= report.keys()
    assert all({"name", "verdict", "figures"} == layer.keys() for layer in report["layers"])
    assert not any(repr(float(score)) in text for score in np.concatenate([scores, control]))


@pytest.mark.parametrize(
    ("executed", "moved", "expected"), [(25, 4, Verdict.PASS), (24, 4, Verdict.FAIL), (26, 4, Verdict.FAIL), (25, 0, Verdict.FAIL)]
)
def test_mechanism_layer_counts_steps_and_parameters(executed: int, moved: int, expected: Verdict) -> None:
    assert bounds.mechanism_layer(accounted_steps=25, executed_steps=executed, trainable=4, moved=moved).verdict is expected


def test_mechanism_layer_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="accounted_steps"):
        bounds.mechanism_layer(accounted_steps=0, executed_steps=0, trainable=1, moved=1)


@pytest.mark.parametrize(
    ("noise", "expected"),
    [
        (lambda z: 0.3 * z, Verdict.PASS),
        (lambda z: 0.98 * 0.3 * z, Verdict.FAIL),
        (lambda z: 0.3 * math.sqrt(2) * z, Verdict.FAIL),
        (lambda z: 0.0 * z, Verdict.FAIL),
        (lambda z: 0.3 * np.repeat(z[::2], 2), Verdict.FAIL),
    ],
    ids=["planned", "2 % too small", "added twice", "none", "drawn once per pair"],
)
def test_noise_layer_finds_wrong_noise(noise, expected: Verdict) -> None:
    drawn = noise(np.random.default_rng(4).normal(size=100_000))
    assert bounds.noise_layer(drawn, scale=0.3, level=0.001).verdict is expected


def test_noise_layer_rarely_alarms_and_refuses_nonsense() -> None:
    alarms = sum(bounds.noise_layer(np.random.default_rng(s).normal(size=500), scale=1.0, level=0.05).verdict is Verdict.FAIL for s in range(RUNS))
    assert alarms <= ALLOWED
    for noise, scale in (([0.0] * 99, 1.0), ([math.nan] * 100, 1.0), ([0.0] * 100, 0.0)):
        with pytest.raises(ValueError, match="Expected"):
            bounds.noise_layer(noise, scale=scale, level=0.05)


def test_an_adapter_that_was_not_loaded_is_inconclusive() -> None:
    """The audited model scores as its base does, while the control is caught: nothing was audited, whatever the other layers say."""
    _, included, control = _audit(1.0, 3)
    report = _judge(np.zeros(500), included, control)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert {layer.name: layer.verdict for layer in report.layers}["audited model"] is Verdict.INCONCLUSIVE


def test_repeated_audits_share_one_level() -> None:
    assert bounds.spent_level(0.05, 1) == pytest.approx(0.0304, abs=1e-4)
    assert sum(bounds.spent_level(0.05, number) for number in range(1, 10_000)) < 0.05
    with pytest.raises(ValueError, match="number"):
        bounds.spent_level(0.05, 0)


def test_the_first_audit_can_still_see_what_it_must() -> None:
    """The share of the level that a first audit gets leaves 300 and 500 canaries able to find twice the claim."""
    for m in (300, 500):
        scores, included = _leak(m, MU[8], 1)
        found = bounds.curve_test(scores, included, trade_off=GaussianTradeOff(mu=MU[8]), fpr=0.05, level=bounds.spent_level(0.05, 1) / 2)
        assert found.detectable <= bounds.MAX_EFFECT * found.claimed


def test_the_curve_of_an_attack_rises_from_nought_to_one() -> None:
    scores, included = _leak(500, 1.5, 1)
    points = bounds.roc(scores, included)
    assert points[-1] == (1.0, 1.0)
    assert points == sorted(points)
    assert len(points) <= 102
    found = bounds.curve_test(scores, included, trade_off=GaussianTradeOff(mu=1.0), fpr=0.1, level=0.05)
    assert min(points, key=lambda point: abs(point[0] - found.fpr))[1] == pytest.approx(found.tpr, abs=0.03)
    assert bounds.roc([1.0, 1.0], [True, False]) == [(0.0, 0.0), (1.0, 1.0)]
