"""Scores of planted canaries become lower bounds on epsilon, a test of the claimed trade-off curve, and one verdict.

Every canary was included or held out by its own fair coin (`audit.canaries`); every score says how much the model looks as if it had been trained on the
canary. **Higher means included**, everywhere in this file. Five readings of the same scores, from the strictest to the sharpest:

| function | hypothesis that it can refute | valid for one training run |
|---|---|---|
| `one_run` | (epsilon, delta)-DP | yes: Steinke, Nasr & Jagielski, "Privacy auditing with one (1) training run", 2023, Thm 5.2 |
| `f_dp_one_run` | mu-GDP, quoted as epsilon(delta) | yes: Mahloujifar, Melis & Chaudhuri, "Auditing f-differential privacy in one run", 2024, Alg. 3 |
| `clopper_pearson` | (epsilon, delta)-DP | only where canaries do not influence one another's scores |
| `gdp` | mu-GDP, quoted as epsilon(delta), from the same two error rates | only where canaries do not influence one another's scores |
| `curve_test` | the trade-off curve that the run itself was accounted with | only where canaries do not influence one another's scores |

`f_dp_one_run` is the certified bound; `curve_test` is the alarm with the power to decide at a few hundred canaries, where an (epsilon, delta) bound cannot
see anything (a claim of epsilon = 2.41 whose mechanism leaks three times too much: 0.92 against 0.00).

**Why the threshold may come from the data.** Fix the false-positive rate a in advance and let j = 1 + floor(a * n0). The threshold is the j-th largest score
among the n0 held-out canaries; a canary counts as positive strictly above it. Writing scores as increasing functions of uniform variables, the false-positive
rate of that threshold is at most the j-th smallest of n0 uniforms, which is Beta(j, n0 - j + 1): its upper quantile is an exact confidence limit, and
equals the Clopper-Pearson limit for j - 1 false positives at a threshold fixed beforehand. The scores of included canaries are independent of the held-out
ones, so that *given the threshold* the number of true positives is binomial and Clopper-Pearson holds for it unchanged. Both limits at level / 2 give the pair at
`level`. j depends on the coins alone, never on a score. No split, no search over thresholds, no loss of canaries.

**Repeated audits.** A house that audits until it passes, or fails by luck every twentieth night, tests at no level at all: `spent_level` gives the k-th audit its
share of one total level (alpha spending), so that the chance of *any* false FAIL, over however many audits, stays below it.

Every bound states its **ceiling**: the largest epsilon that a perfect attack could have shown with these canaries. Every curve test states its **power** and
the smallest effect it would have **detected**. An audit that could not have seen a leak is INCONCLUSIVE, never PASS (PITFALLS 35, 42).

Does not cover: attacks stronger than the scores given; average-case harm to ordinary records, which canaries exaggerate on purpose; interference between
canaries of one run, which the last three rows of the table assume away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

POWER = 0.8
"""Probability with which an effect must be found to count as detectable."""
MAX_EFFECT = 2.0
"""An audit that cannot detect this multiple of the claimed mu is inconclusive."""
CHANCE_SD = 3.0
"""Standard errors within which an AUC counts as chance (a fair one leaves them once in 370)."""

_CANNOT_BLOCK = ("certified bound", "mechanism: canaries", "records: ", "deployed: ")
"""Layers (beginnings of their names) that fail a model but need not pass it: a certified ceiling may lie below the claim, the noise, clipping and inclusion layers decide beside
the canaries, a few dozen withheld people show gross leaks alone, and a deployed child can only lose what its parent passed with."""
_GRID = 0.25
_MAX_PARAMETER = 64.0
_QUADRATURE_NODES = 200

Float = NDArray[np.float64]
Mask = NDArray[np.bool_]


class TradeOff(Protocol):
    """What a correct mechanism allows an attacker (`dp.accounting.trade_off`): the claim under test."""

    @property
    def mu(self) -> float:
        """Parameter of the Gaussian trade-off curve closest to the claim."""

    def tpr(self, fpr: float) -> float:
        """Returns the largest true-positive rate of any attack at this false-positive rate; concave, tpr(0) <= delta-ish, tpr(1) = 1."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class GaussianTradeOff:
    """The trade-off curve of mu-GDP: TPR = Phi(Phi^-1(FPR) + mu)  (Dong, Roth & Su 2019, eq. 6)."""

    mu: float

    def __post_init__(self) -> None:
        if not 0 <= self.mu < math.inf:
            raise ValueError(f"Expected 0 <= mu={self.mu} < inf.")

    def tpr(self, fpr: float) -> float:
        """Returns the largest true-positive rate at `fpr` in [0, 1]."""
        if fpr <= 0:
            return 0.0
        return float(special.ndtr(special.ndtri(min(fpr, 1.0)) + self.mu))


def gdp_epsilon(mu: float, *, delta: float) -> float:
    """Returns the epsilon at which mu-GDP meets `delta` (Dong, Roth & Su 2019, Cor. 2.13), by bisection to 1e-12.

    Args:
        mu: Gaussian parameter, in [0, inf).
        delta: in (0, 1).
    """
    if not 0 <= mu < math.inf:
        raise ValueError(f"Expected 0 <= mu={mu} < inf.")
    _require_probability("delta", delta, zero=False)

    def spent(epsilon: float) -> float:
        log_tail = epsilon + special.log_ndtr(-epsilon / mu - mu / 2)
        return float(special.ndtr(-epsilon / mu + mu / 2) - math.exp(log_tail))

    if mu == 0 or spent(0.0) <= delta:
        return 0.0
    low, high = 0.0, 1.0
    while spent(high) > delta:
        high *= 2
    while high - low > 1e-12 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A lower bound on epsilon, and the most that a perfect attack could have shown.

    `mu` is the Gaussian parameter behind it where the method has one. `correct` of `guesses` guesses over `canaries` canaries were right (for
    `clopper_pearson`: true positives of included canaries).
    """

    method: str
    epsilon: float
    ceiling: float
    delta: float
    level: float
    canaries: int
    guesses: int
    correct: int
    mu: float | None = None

    def figures(self) -> dict[str, Any]:
        """Returns the bound as JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def one_run(scores: ArrayLike, included: ArrayLike, *, delta: float, level: float, guesses: int | None = None) -> Bound:
    """Bounds epsilon from one training run with many independent canaries (Steinke, Nasr & Jagielski 2023).

    The `guesses` most extreme canaries are guessed, half of them (the highest scores) as included, half as held out; the rest is abstained from.
    q = e^eps / (1 + e^eps), beta = P[Bin(r, q) >= v], p = beta + 2 m delta max_i (P[Bin(r, q) >= v - i] - beta) / i; the bound is where p reaches `level`.

    Args:
        scores: [m] float, finite; higher means included.
        included: [m] bool, the outcomes of m *independent fair coins* (not exactly half of them).
        delta: of the claim, in [0, 1).
        level: probability that the bound exceeds the true epsilon, in (0, 0.5].
        guesses: r in [1, m], fixed before the scores were seen; all m when None (the highest ceiling; m // 2 sees smaller leaks).

    Returns:
        The bound; `.epsilon` is 0 where nothing can be said.

    Raises:
        ValueError: when shapes or ranges are broken or a score is not finite.
    """
    scores_M, included_M = _check(scores, included)
    _require_probability("delta", delta)
    _require_level(level)
    r, v = _guess(scores_M, included_M, guesses)
    m = len(scores_M)

    def bound(correct: int) -> float:
        return _last_rejected(lambda epsilon: _one_run_p_value(epsilon, m=m, r=r, v=correct, delta=delta) < level)

    return Bound(method="one_run", epsilon=bound(v), ceiling=bound(r), delta=delta, level=level, canaries=m, guesses=r, correct=v)


def f_dp_one_run(scores: ArrayLike, included: ArrayLike, *, delta: float, level: float, guesses: int | None = None) -> Bound:
    """Bounds mu, and with it epsilon(delta), from one training run (Mahloujifar, Melis & Chaudhuri 2024, for a Gaussian f).

    Tighter than `one_run` because it uses the whole curve: it refutes "mu-GDP", and quotes the largest refuted mu as the epsilon of that curve. Where the
    mechanism's curve is not Gaussian, the figure is that of the Gaussian curve, and `curve_test` is the test of the mechanism's own.

    Args: as `one_run`, with delta in (0, 1) and m // 2 guesses when None: of 500 canaries at a claim of epsilon = 4 and twice its mu, half refutes 85 runs in 100,
    all of them none.
    """
    scores_M, included_M = _check(scores, included)
    _require_probability("delta", delta, zero=False)
    _require_level(level)
    m = len(scores_M)
    r, v = _guess(scores_M, included_M, max(1, m // 2) if guesses is None else guesses)

    def bound(correct: int) -> float:
        return _last_rejected(lambda mu: _f_dp_rejects(mu, m=m, r=r, v=correct, level=level))

    mu = bound(v)
    epsilon, ceiling = gdp_epsilon(mu, delta=delta), gdp_epsilon(bound(r), delta=delta)
    return Bound(method="f_dp_one_run", epsilon=epsilon, ceiling=ceiling, delta=delta, level=level, canaries=m, guesses=r, correct=v, mu=mu)


def clopper_pearson(scores: ArrayLike, included: ArrayLike, *, delta: float, level: float, fpr: float = 0.0) -> Bound:
    """Bounds epsilon from the two error rates at a threshold set by the held-out canaries (see the module: why that is valid).

    Both eps >= ln((TPR - delta) / FPR) and eps >= ln((1 - FPR - delta) / (1 - TPR)) follow from the same two confidence limits, so the larger one stands.

    Args: as `one_run`; `fpr` is the false-positive rate aimed at, in [0, 1), fixed in advance; 0 puts the threshold at the largest held-out score.
    """
    scores_M, included_M = _check(scores, included)
    _require_probability("delta", delta)
    _require_level(level)
    rates = _rates(scores_M, included_M, fpr=fpr)

    def bound(true_positives: int) -> float:
        low, high = _tpr_low(true_positives, rates.included, level / 2), rates.fpr_high(level / 2)
        return max(0.0, _log_ratio(low - delta, high), _log_ratio(1 - high - delta, 1 - low))

    return Bound(
        method="clopper_pearson",
        epsilon=bound(rates.true_positives),
        ceiling=bound(rates.included),
        delta=delta,
        level=level,
        canaries=len(scores_M),
        guesses=rates.included,
        correct=rates.true_positives,
    )


def gdp(scores: ArrayLike, included: ArrayLike, *, delta: float, level: float, fpr: float = 0.0) -> Bound:
    """Bounds mu, and with it epsilon(delta), from the two error rates of `clopper_pearson`: mu >= Phi^-1(TPR) - Phi^-1(FPR) (Nasr et al. 2023), 0 where that is negative.

    Args: as `clopper_pearson`, with delta in (0, 1).
    """
    scores_M, included_M = _check(scores, included)
    _require_probability("delta", delta, zero=False)
    _require_level(level)
    rates = _rates(scores_M, included_M, fpr=fpr)

    def bound(true_positives: int) -> float:
        low, high = _tpr_low(true_positives, rates.included, level / 2), rates.fpr_high(level / 2)
        return max(0.0, float(special.ndtri(low) - special.ndtri(high)))

    mu = bound(rates.true_positives)
    return Bound(
        method="gdp",
        epsilon=gdp_epsilon(mu, delta=delta),
        ceiling=gdp_epsilon(bound(rates.included), delta=delta),
        delta=delta,
        level=level,
        canaries=len(scores_M),
        guesses=rates.included,
        correct=rates.true_positives,
        mu=mu,
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CurveTest:
    """Outcome of `curve_test`.

    rejected: the claim is refuted at `level`. p_value: the smallest level at which it would be.
    tpr, fpr: observed at `threshold`. tpr_low, fpr_high: their confidence limits at level / 2 each. cap: the claim's largest TPR at fpr_high; rejected iff tpr_low > cap.
    power: probability of a rejection, had the model leaked at twice the claimed mu. detectable: smallest GDP mu that is rejected with probability 0.8, inf if none is.
    claimed: the claim's mu.
    """

    rejected: bool
    p_value: float
    level: float
    threshold: float
    tpr: float
    fpr: float
    tpr_low: float
    fpr_high: float
    cap: float
    included: int
    held_out: int
    power: float
    detectable: float
    claimed: float

    def figures(self) -> dict[str, Any]:
        """Returns the test as JSON; an infinite detectable effect is null."""
        return {name: _finite(getattr(self, name)) for name in self.__slots__ if name != "threshold"}


def curve_test(scores: ArrayLike, included: ArrayLike, *, trade_off: TradeOff, fpr: float, level: float) -> CurveTest:
    """Tests whether the attack does better than the claimed trade-off curve allows: rejects iff TPR_low > T(FPR_high).

    By concavity of T the test also holds for canaries that differ from one another: the average of the single true-positive rates is at most T of the average
    false-positive rate.

    Args:
        scores: [m] float, finite; higher means included.
        included: [m] bool, the outcomes of independent fair coins; at least one of each.
        trade_off: the claim: `.tpr(fpr)` and `.mu`.
        fpr: false-positive rate aimed at, in [0, 1), fixed in advance.
        level: probability of a false rejection, in (0, 0.5].

    Raises:
        ValueError: when shapes or ranges are broken, a score is not finite, all canaries are on one side, or the claim promises nothing (infinite mu).
    """
    scores_M, included_M = _check(scores, included)
    _require_level(level)
    if not 0 <= trade_off.mu < math.inf:
        raise ValueError(f"Expected a claim with 0 <= mu={trade_off.mu} < inf: without noise there is nothing to test.")
    rates = _rates(scores_M, included_M, fpr=fpr)
    cap = trade_off.tpr(rates.fpr_high(level / 2))
    low = _tpr_low(rates.true_positives, rates.included, level / 2)
    needed = _needed(rates.included, cap, level / 2)
    return CurveTest(
        rejected=low > cap,
        p_value=_p_value(rates, trade_off),
        level=level,
        threshold=rates.threshold,
        tpr=rates.true_positives / rates.included,
        fpr=(rates.rank - 1) / rates.held_out,
        tpr_low=low,
        fpr_high=rates.fpr_high(level / 2),
        cap=cap,
        included=rates.included,
        held_out=rates.held_out,
        power=_power(MAX_EFFECT * trade_off.mu, rates, needed, rates.threshold_z()),
        detectable=_detectable(rates, needed),
        claimed=trade_off.mu,
    )


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Chance:
    """Area under the ROC curve with its standard error under "scores know nothing" (Mann-Whitney)."""

    auc: float
    standard_error: float

    @property
    def at_chance(self) -> bool:
        """Whether the AUC is within `CHANCE_SD` standard errors of one half."""
        return abs(self.auc - 0.5) <= CHANCE_SD * self.standard_error

    def figures(self) -> dict[str, Any]:
        """Returns the check as JSON."""
        return {"auc": self.auc, "standard_error": self.standard_error, "at_chance": self.at_chance}


def area_under_curve(scores: ArrayLike, included: ArrayLike) -> Chance:
    """Returns P[score of an included canary > score of a held-out one], ties counted half, and its standard error at chance.

    Args: as `curve_test`. The standard error is sqrt((n1 + n0 + 1) / (12 n1 n0)), exact without ties and too large (careful) with them.
    """
    scores_M, included_M = _check(scores, included)
    n1, n0 = _both_sides(included_M)
    rank_sum = float(stats.rankdata(scores_M)[included_M].sum())
    return Chance(auc=(rank_sum - n1 * (n1 + 1) / 2) / (n1 * n0), standard_error=math.sqrt((n1 + n0 + 1) / (12 * n1 * n0)))


class Verdict(StrEnum):
    """What the audit says. INCONCLUSIVE: it could not have seen a violation, so it says nothing."""

    PASS = "PASS"  # noqa: S105 (a verdict, no password)
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer of the audit: its name, what it says, and the public figures it says it from."""

    name: str
    verdict: Verdict
    figures: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Returns the layer as JSON."""
        return {"name": self.name, "verdict": str(self.verdict), "figures": dict(self.figures)}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """What the audit found (line 8), built by `verdict` alone. Holds no score of a single canary.

    epsilon_lower, ceiling: the certified one-run bound and the most it could have shown. detectable: the epsilon (at the claim's delta) of the smallest Gaussian
    effect that the curve test finds with probability 0.8, inf if there is none; detectable_mu: the same as mu. roc, control_roc: the attack's curves, as `roc` gives them.
    """

    verdict: Verdict
    epsilon_lower: float
    ceiling: float
    detectable: float
    detectable_mu: float
    claimed_epsilon: float
    claimed_delta: float
    level: float
    layers: tuple[Layer, ...]
    roc: tuple[tuple[float, float], ...] = ()
    control_roc: tuple[tuple[float, float], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Returns the report as JSON; an infinite figure is null."""
        figures = {name: _finite(getattr(self, name)) for name in self.__slots__ if name not in ("verdict", "layers")}
        return {"verdict": str(self.verdict), **figures, "layers": [layer.to_json() for layer in self.layers]}


def verdict(
    scores: ArrayLike,
    included: ArrayLike,
    *,
    control: ArrayLike,
    negatives: Mapping[str, Chance],
    epsilon: float,
    delta: float,
    trade_off: TradeOff,
    fpr: float,
    level: float,
    mechanism: Sequence[Layer] = (),
) -> AuditReport:
    """Judges one trained model by its canaries.

    FAIL when the curve test rejects, when the certified bound exceeds the claimed epsilon, or when a mechanism layer fails. Otherwise INCONCLUSIVE when the same
    curve test does not reject the non-private control, when a negative check is not at chance, or when the smallest detectable effect is above twice the claimed mu.
    Otherwise PASS. The curve test and the certified bound each run at level / 2: a correct mechanism FAILs with probability at most `level`.

    Args:
        scores: [m] float, finite; scores of the audited model, higher means included.
        included: [m] bool, the outcomes of independent fair coins.
        control: [m] float; scores of the non-private control trained on the same included canaries.
        negatives: checks that must be at chance: a blind baseline on the texts, the untouched model. At least one.
        epsilon: claimed, > 0.
        delta: claimed, in (0, 1).
        trade_off: curve of the same claim.
        fpr: false-positive rate of the curve test, in [0, 1), committed before training.
        level: probability of a false FAIL, in (0, 0.5].
        mechanism: layers of `mechanism_layer` and `noise_layer`.

    Raises:
        ValueError: when shapes or ranges are broken, or no negative check is given.
    """
    if not 0 < epsilon < math.inf:
        raise ValueError(f"Expected 0 < epsilon={epsilon} < inf.")
    if not negatives:
        raise ValueError("Expected at least one negative check: a blind baseline or the untouched model.")
    curve = curve_test(scores, included, trade_off=trade_off, fpr=fpr, level=level / 2)
    caught = curve_test(control, included, trade_off=trade_off, fpr=fpr, level=level / 2)
    certified = f_dp_one_run(scores, included, delta=delta, level=level / 2)
    layers = (
        *mechanism,
        _presence_layer(scores),
        _control_layer(caught, area_under_curve(control, included)),
        *(Layer(name=f"negative: {name}", verdict=_when(check.at_chance), figures=check.figures()) for name, check in negatives.items()),
        _curve_layer(curve, area_under_curve(scores, included)),
        _certified_layer(
            certified,
            one_run(scores, included, delta=delta, level=level / 2, guesses=certified.guesses),
            clopper_pearson(scores, included, delta=delta, level=level / 2, fpr=fpr),
            gdp(scores, included, delta=delta, level=level / 2, fpr=fpr),
            claimed=epsilon,
        ),
    )
    return AuditReport(
        verdict=_overall(layers),
        epsilon_lower=certified.epsilon,
        ceiling=certified.ceiling,
        detectable=gdp_epsilon(curve.detectable, delta=delta) if math.isfinite(curve.detectable) else math.inf,
        detectable_mu=curve.detectable,
        claimed_epsilon=epsilon,
        claimed_delta=delta,
        level=level,
        layers=layers,
        roc=tuple(roc(scores, included)),
        control_roc=tuple(roc(control, included)),
    )


def spent_level(total: float, number: int) -> float:
    """Returns the level of the number-th audit: total * 6 / (pi^2 number^2), whose sum over all audits is the total (Euler 1735).

    Args:
        total: probability of any false alarm over all audits, in (0, 0.5].
        number: from 1.
    """
    _require_level(total)
    if number < 1:
        raise ValueError(f"Expected number={number} >= 1.")
    return total * 6 / (math.pi * number) ** 2


def roc(scores: ArrayLike, included: ArrayLike) -> list[tuple[float, float]]:
    """Returns at most 102 points (false-positive rate, true-positive rate) of the attack, from (0, .) to (1, 1), for a plot: it names no canary."""
    scores_M, included_M = _check(scores, included)
    n1, n0 = _both_sides(included_M)
    held_out, planted = np.sort(scores_M[~included_M])[::-1], scores_M[included_M]
    ranks = sorted({round(n0 * share / 100) for share in range(100)} - {n0})
    return [*((rank / n0, float((planted > held_out[rank]).sum()) / n1) for rank in ranks), (1.0, 1.0)]


def mechanism_layer(*, accounted_steps: int, executed_steps: int, trainable: int, moved: int) -> Layer:
    """Returns layer 0: what was run is what was accounted, and training reached every trainable parameter.

    Args:
        accounted_steps: steps of the plan, >= 1.
        executed_steps: noisy updates that really happened, >= 0.
        trainable: number of trainable parameter tensors, >= 1.
        moved: how many of them differ from their start.
    """
    if accounted_steps < 1 or executed_steps < 0 or trainable < 1 or not 0 <= moved <= trainable:
        raise ValueError(f"Expected {accounted_steps=} >= 1, {executed_steps=} >= 0, {trainable=} >= 1 and 0 <= {moved=} <= trainable.")
    figures = {"accounted_steps": accounted_steps, "executed_steps": executed_steps, "trainable": trainable, "moved": moved}
    holds = executed_steps == accounted_steps and moved == trainable
    return Layer(name="mechanism: steps", verdict=Verdict.PASS if holds else Verdict.FAIL, figures=figures)


def noise_layer(noise: ArrayLike, *, scale: float, level: float) -> Layer:
    """Returns layer 0: the noise of a step whose gradient was zero has the planned scale and no memory.

    Two tests at level / 2 each: the sum of squares over scale^2 is chi-squared with d degrees of freedom (two-sided); the product of neighbours, normalised, is standard
    normal under independence. With d = 1e5 a scale that is 2 % off is found more than four standard errors away.

    Args:
        noise: [d] float, coordinates of the noise of one step, d >= 100.
        scale: the planned standard deviation, sigma * clip_norm, > 0.
        level: probability of a false alarm, in (0, 0.5].
    """
    noise_D = np.asarray(noise, dtype=np.float64).ravel()
    if len(noise_D) < 100 or not np.isfinite(noise_D).all():
        raise ValueError(f"Expected at least 100 finite noise coordinates, got {len(noise_D)}.")
    if not 0 < scale < math.inf:
        raise ValueError(f"Expected 0 < scale={scale} < inf.")
    _require_level(level)
    energy = float(np.square(noise_D / scale).sum())
    scale_p = 2 * min(float(stats.chi2.cdf(energy, len(noise_D))), float(stats.chi2.sf(energy, len(noise_D))))
    neighbours = float((noise_D[1:] * noise_D[:-1]).sum() / (scale**2 * math.sqrt(len(noise_D) - 1)))
    memory_p = 2 * float(special.ndtr(-abs(neighbours)))
    figures = {
        "coordinates": len(noise_D),
        "planned": scale,
        "observed": scale * math.sqrt(energy / len(noise_D)),
        "scale_p": scale_p,
        "memory_p": memory_p,
    }
    return Layer(name="mechanism: noise", verdict=Verdict.PASS if min(scale_p, memory_p) > level / 2 else Verdict.FAIL, figures=figures)


def _presence_layer(scores: ArrayLike) -> Layer:
    """A model that scores every canary alike is the base without its adapter: nothing was audited."""
    spread = float(np.ptp(np.asarray(scores, dtype=np.float64)))
    return Layer(name="audited model", verdict=_when(spread > 0), figures={"score_range": spread})


def _control_layer(caught: CurveTest, area: Chance) -> Layer:
    return Layer(name="positive control", verdict=_when(caught.rejected), figures={**caught.figures(), "auc": area.auc})


def _curve_layer(curve: CurveTest, area: Chance) -> Layer:
    sees = curve.detectable <= MAX_EFFECT * curve.claimed
    return Layer(name="curve test", verdict=Verdict.FAIL if curve.rejected else _when(sees), figures={**curve.figures(), "auc": area.auc})


def _certified_layer(certified: Bound, *others: Bound, claimed: float) -> Layer:
    """Returns the one-run layer, the other bounds beside it; where its ceiling is below the claim it cannot refute, so it says INCONCLUSIVE and the curve test decides alone."""
    said = Verdict.FAIL if certified.epsilon > claimed else _when(certified.ceiling > claimed)
    return Layer(
        name="certified bound", verdict=said, figures={**certified.figures(), "claimed": claimed, **{each.method: each.figures() for each in others}}
    )


def _when(holds: bool) -> Verdict:
    return Verdict.PASS if holds else Verdict.INCONCLUSIVE


def _overall(layers: Sequence[Layer]) -> Verdict:
    """Any FAIL fails; otherwise every layer must PASS, but for the two whose power the plan itself may rule out."""
    if any(layer.verdict is Verdict.FAIL for layer in layers):
        return Verdict.FAIL
    return _when(all(layer.verdict is Verdict.PASS for layer in layers if not layer.name.startswith(_CANNOT_BLOCK)))


def _check(scores: ArrayLike, included: ArrayLike) -> tuple[Float, Mask]:
    scores_M, included_M = np.asarray(scores, dtype=np.float64), np.asarray(included)
    if scores_M.ndim != 1 or scores_M.shape != included_M.shape or not len(scores_M):
        raise ValueError(f"Expected scores and included of one shape [m], m >= 1, got {scores_M.shape} and {included_M.shape}.")
    if not np.isin(included_M, (0, 1)).all():
        raise ValueError("Expected included to be boolean.")
    if not np.isfinite(scores_M).all():
        raise ValueError(f"Expected finite scores, got {int((~np.isfinite(scores_M)).sum())} that are not.")
    return scores_M, included_M.astype(np.bool_)


def _both_sides(included_M: Mask) -> tuple[int, int]:
    n1 = int(included_M.sum())
    if not 0 < n1 < len(included_M):
        raise ValueError(f"Expected included and held-out canaries, got {n1} of {len(included_M)} included.")
    return n1, len(included_M) - n1


def _require_probability(name: str, value: float, *, zero: bool = True) -> None:
    if not (0 <= value < 1) or (value == 0 and not zero):
        raise ValueError(f"Expected {name}={value} in {'[' if zero else '('}0, 1).")


def _require_level(level: float) -> None:
    if not 0 < level <= 0.5:
        raise ValueError(f"Expected level={level} in (0, 0.5].")


def _guess(scores_M: Float, included_M: Mask, guesses: int | None) -> tuple[int, int]:
    """Returns (guesses made, guesses that are right); ties are broken by position, which knows nothing of the coins."""
    r = len(scores_M) if guesses is None else guesses
    if not 1 <= r <= len(scores_M):
        raise ValueError(f"Expected guesses={guesses} in [1, {len(scores_M)}].")
    order = np.argsort(-scores_M, kind="stable")
    guessed_in, guessed_out = order[: r - r // 2], order[len(order) - r // 2 :]
    return r, int(included_M[guessed_in].sum() + (~included_M[guessed_out]).sum())


def _last_rejected(rejects: Callable[[float], bool]) -> float:
    """Returns the largest parameter below the first that is not rejected: from 0 in steps of 0.25, then by bisection, on the rejected (safe) side."""
    low = 0.0
    if not rejects(low):
        return low
    while rejects(low + _GRID):
        low += _GRID
        if low >= _MAX_PARAMETER:
            return low
    high = low + _GRID
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if rejects(middle) else (low, middle)
    return low


def _one_run_p_value(epsilon: float, *, m: int, r: int, v: int, delta: float) -> float:
    """Steinke et al. 2023, Thm 5.2: probability of at least v right guesses out of r, with the correction for delta."""
    q = float(special.expit(epsilon))
    beta = float(stats.binom.sf(v - 1, r, q))
    if delta == 0 or v == 0:
        return min(1.0, beta)
    below_V = np.cumsum(stats.binom.pmf(np.arange(v - 1, -1, -1), r, q))
    alpha = float((below_V / np.arange(1, v + 1)).max())
    return min(1.0, beta + 2 * m * delta * alpha)


def _f_dp_rejects(mu: float, *, m: int, r: int, v: int, level: float) -> bool:
    """Mahloujifar et al. 2024, Alg. 3 with the blow-up inverse of the Gaussian curve: are v right guesses out of r too many for mu-GDP?"""
    right, wrong = level * v / m, level * (r - v) / m
    for i in range(v - 1, -1, -1):
        allowed = max(wrong, float(special.ndtr(special.ndtri(min(right, 1.0)) - mu)))
        right += i / (r - i) * (allowed - wrong)
        wrong = allowed
        if right + wrong > r / m:
            return True
    return False


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Rates:
    threshold: float
    rank: int
    true_positives: int
    included: int
    held_out: int

    def fpr_high(self, level: float) -> float:
        """Upper confidence limit of the false-positive rate at the rank-th largest held-out score: exact, see the module."""
        return float(special.betaincinv(self.rank, self.held_out - self.rank + 1, 1 - level))

    def threshold_z(self) -> Float:
        """Phi^-1 of the threshold's true false-positive rate, Beta(rank, held_out - rank + 1), at evenly spaced quantiles: a deterministic quadrature."""
        quantiles_Q = (np.arange(_QUADRATURE_NODES) + 0.5) / _QUADRATURE_NODES
        return np.asarray(special.ndtri(special.betaincinv(self.rank, self.held_out - self.rank + 1, quantiles_Q)))


def _rates(scores_M: Float, included_M: Mask, *, fpr: float) -> _Rates:
    _require_probability("fpr", fpr)
    n1, n0 = _both_sides(included_M)
    rank = 1 + math.floor(fpr * n0)
    threshold = float(np.sort(scores_M[~included_M])[-rank])
    return _Rates(threshold=threshold, rank=rank, true_positives=int((scores_M[included_M] > threshold).sum()), included=n1, held_out=n0)


def _tpr_low(true_positives: int, included: int, level: float) -> float:
    """Clopper-Pearson lower limit of a binomial proportion."""
    return 0.0 if true_positives == 0 else float(special.betaincinv(true_positives, included - true_positives + 1, level))


def _needed(included: int, cap: float, level: float) -> int | None:
    """Smallest number of true positives whose lower limit exceeds the cap; None when not even all of them do."""
    count_K = np.arange(1, included + 1)
    above = special.betaincinv(count_K, included - count_K + 1, level) > cap
    return int(count_K[above.argmax()]) if above[-1] else None


def _log_ratio(numerator: float, denominator: float) -> float:
    return math.log(numerator / denominator) if numerator > 0 else 0.0


def _p_value(rates: _Rates, trade_off: TradeOff) -> float:
    """The smallest level at which the claim is refuted, by bisection in the logarithm; both limits loosen with the level, so there is one."""

    def rejects(level: float) -> bool:
        return _tpr_low(rates.true_positives, rates.included, level / 2) > trade_off.tpr(rates.fpr_high(level / 2))

    if not rejects(1.0):
        return 1.0
    low, high = -20.0, 0.0
    if rejects(10**low):
        return float(10**low)
    while high - low > 1e-3:
        middle = (low + high) / 2
        low, high = (low, middle) if rejects(10**middle) else (middle, high)
    return float(10**high)


def _power(mu: float, rates: _Rates, needed: int | None, threshold_Q: Float) -> float:
    """Probability that `needed` true positives are reached when the scores leak exactly mu-GDP, averaged over where the threshold may fall."""
    return 0.0 if needed is None else float(special.bdtrc(needed - 1, rates.included, special.ndtr(threshold_Q + mu)).mean())


def _detectable(rates: _Rates, needed: int | None) -> float:
    """Smallest mu with power at least `POWER`, on the safe (larger) side; power grows with mu, so bisection finds it."""
    if needed is None:
        return math.inf
    threshold_Q = rates.threshold_z()
    low, high = 0.0, 1.0
    while _power(high, rates, needed, threshold_Q) < POWER:
        low, high = high, 2 * high
        if high > _MAX_PARAMETER:
            return math.inf
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if _power(middle, rates, needed, threshold_Q) >= POWER else (middle, high)
    return high


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
