"""What a guarantee lets any attack do to one person, and how far single people stand out under the audit's own.

Epsilon is not a risk. From the trade-off curve T (the largest true-positive rate of *any* attack at each false-positive rate) follows a figure that is: how often the best
possible guess "was this person's data used?" is right when both answers were equally likely beforehand, (1 + max(T(x) - x)) / 2, against 50 in 100 by tossing a coin
(Kulynych et al. 2024, "Attack-aware noise calibration"; Dong, Roth & Su 2019).

`ranked` says how far single people stand out, the most exposed first: internal, and without a name. Its sentences round up, never in our favour.

Does not cover: harm from a fact that is true of the whole population; a unit's several documents when the unit is smaller than the person.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize

from discreet.audit.bounds import TradeOff
from discreet.audit.extraction import Share

Float = NDArray[np.float64]


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
