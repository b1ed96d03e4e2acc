"""What a guarantee means for one person, in words and in the numbers behind them.

Epsilon is not a risk. From the trade-off curve T (the largest true-positive rate of *any* attack at each false-positive rate) follow figures that are: how often the best
possible guess "was this person's data used?" is right when both answers were equally likely beforehand, (1 + max(T(x) - x)) / 2, against 50 in 100 by tossing a coin; and how
many participants such an attacker could point out while wrongly accusing one outsider in a hundred or in a thousand (Kulynych et al. 2024, "Attack-aware noise
calibration"; Dong, Roth & Su 2019). From epsilon alone follows the factor e^epsilon on the odds of any belief, up to delta.

`ranked` says how far single people stand out under the audit's own attack, the most exposed first: internal, and without a name.

Guarantees of `explain`: figures are upper limits on every attacker with any background knowledge but that person's record; in the sentence they are rounded up, never in our favour.

Does not cover: harm from a fact that is true of the whole population; a unit's several documents when the unit is smaller than the person.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from discreet.audit.attacks import FALSE_POSITIVE_RATES
from discreet.audit.bounds import TradeOff
from discreet.audit.extraction import Share

Float = NDArray[np.float64]


class Promise(Protocol):
    """The fields of `dp.accounting.Guarantee` that an explanation needs."""

    @property
    def epsilon(self) -> float: ...
    @property
    def delta(self) -> float: ...
    @property
    def unit(self) -> str: ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """One plain paragraph, and the public figures in it."""

    sentence: str
    figures: Mapping[str, Any]


def explain(guarantee: Promise, trade_off: TradeOff) -> Explanation:
    """Says what the guarantee means for one unit.

    Args:
        guarantee: `.epsilon` >= 0, `.delta` in [0, 1), `.unit` such as "patient".
        trade_off: the curve of the same guarantee.

    Raises:
        ValueError: when epsilon or delta is out of range.
    """
    if not guarantee.epsilon >= 0 or not 0 <= guarantee.delta < 1:
        raise ValueError(f"Expected epsilon={guarantee.epsilon} >= 0 and delta={guarantee.delta} in [0, 1).")
    best = advantage(trade_off)
    accuracy = (1 + best) / 2
    caught = {str(rate): trade_off.tpr(rate) for rate in FALSE_POSITIVE_RATES}
    odds = math.exp(guarantee.epsilon) if guarantee.epsilon < 700 else math.inf
    right, pointed = _percent(accuracy), _percent(caught["0.01"])
    sentence = (
        f"Someone who sees the model and everything else there is to know, and has to guess whether one {guarantee.unit}'s records were used, is right at most "
        f"{right} times in 100 instead of 50. If they may wrongly point at 1 in 100 of those who were not in it, they find at most {pointed} in 100 of those who "
        f"were. Up to a chance of {_chance(guarantee.delta)}, what the model tells them changes the odds of anything they believe about that {guarantee.unit} by a factor of at most "
        f"{_factor(odds)}."
    )
    figures = {
        "unit": guarantee.unit,
        "epsilon": guarantee.epsilon if math.isfinite(guarantee.epsilon) else None,
        "delta": guarantee.delta,
        "advantage": best,
        "accuracy": accuracy,
        "tpr_at_fpr": caught,
        "odds_factor": odds if math.isfinite(odds) else None,
    }
    return Explanation(sentence=sentence, figures=figures)


def advantage(trade_off: TradeOff) -> float:
    """Returns the largest T(x) - x over x in [0, 1], to 1e-6: 0 means that no attack beats a coin, 1 that one always succeeds.

    T - x is concave, so the search in one dimension cannot stop at a lesser peak.
    """
    found = optimize.minimize_scalar(lambda x: x - trade_off.tpr(float(x)), bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-9})
    return min(1.0, max(0.0, -float(found.fun)))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Exposed:
    """How far one person stands out under one attack; internal.

    Attributes:
        position: of the person in the list that was ranked, from 0: names nobody.
        alike: share of outsiders who look at least as much as if they had been in, with limits that hold for all ranked people together.
        right, right_low, right_high: how often whoever calls everybody "in" who looks at least like this person is right, were in and out equally likely; with limits.
        sentence: the same for a person to read.
    """

    position: int
    alike: Share
    right: float
    right_low: float
    right_high: float
    sentence: str

    def figures(self) -> dict[str, Any]:
        """Returns the row as JSON, without the position."""
        return {"alike": self.alike.figures(), "right": self.right, "low": self.right_low, "high": self.right_high, "sentence": self.sentence}


def ranked(scores: ArrayLike, members: ArrayLike, *, trade_off: TradeOff, count: int = 10, level: float = 0.05) -> list[Exposed]:
    """Ranks insiders by how few outsiders look like them, the most exposed first.

    Args:
        scores: [S] float of people, higher means member (`audit.records.people_scores`).
        members: [S] bool, at least one of each.
        trade_off: what the guarantee allows any attack.
        count: how many to return, >= 1.
        level: probability that any limit of any insider misses, shared by all insiders (Bonferroni): the first of many stands out by luck alone, and its limits know it.

    Raises:
        ValueError: when shapes differ or a side is empty.
    """
    scores_S, members_S = np.asarray(scores, dtype=np.float64), np.asarray(members, dtype=np.bool_)
    if scores_S.shape != members_S.shape or members_S.all() or not members_S.any() or np.isnan(scores_S).any():
        raise ValueError(f"Expected scores and members of one shape with both sides, got {scores_S.shape} and {members_S.shape}.")
    each, allowed = level / (2 * int(members_S.sum())), (1 + advantage(trade_off)) / 2
    order = [int(row) for row in np.argsort(-scores_S, kind="stable") if members_S[row]][:count]
    return [_exposed(row, scores_S, members_S, level=each, allowed=allowed) for row in order]


def _exposed(row: int, scores_S: Float, members_S: NDArray[np.bool_], *, level: float, allowed: float) -> Exposed:
    at_least_S = scores_S >= scores_S[row]
    inside, alike = (Share.of(int(at_least_S[side].sum()), int(side.sum()), level=level) for side in (members_S, ~members_S))
    right = (1 + inside.count / inside.total - alike.count / alike.total) / 2
    low, high = max(0.0, (1 + inside.low - alike.high) / 2), min(1.0, (1 + inside.high - alike.low) / 2)
    sentence = (
        f"Of {alike.total} people who were not in it, {alike.count} look at least as much as if they had been ({_percent(alike.low)} to {_percent(alike.high)} in 100 of all such people). "
        f"Someone who takes everybody who looks like this for one who was in is right {round(100 * right)} times in 100 instead of 50 "
        f"(between {math.floor(100 * low + 1e-9)} and {_percent(high)}); the guarantee allows at most {_percent(allowed)}."
    )
    return Exposed(position=row, alike=alike, right=right, right_low=low, right_high=high, sentence=sentence)


def _percent(share: float) -> int:
    """Rounds up, so that the sentence never promises more than the figure; 1e-9 forgives the last float digit."""
    return min(100, math.ceil(100 * share - 1e-9))


def _factor(odds: float) -> str:
    return f"{math.ceil(10 * odds - 1e-9) / 10:g}" if odds < 10 else f"{math.ceil(odds):,}" if odds < 1e6 else "more than a million"


def _chance(delta: float) -> str:
    """One significant digit, rounded up."""
    if delta == 0:
        return "0"
    unit = 10.0 ** math.floor(math.log10(delta))
    return f"{math.ceil(delta / unit - 1e-9) * unit:.1g}"
