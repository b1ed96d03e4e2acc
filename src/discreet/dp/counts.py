"""Counts of people, released under pure differential privacy: OpenDP's discrete Laplace, checked by OpenDP's own proof of privacy against what is charged.

Guarantees: a vector of counts of which one unit can change all together by `sensitivity` (L1, add/remove) is released with epsilon at most as asked, delta 0.

Source: OpenDP 0.16 (`make_laplace` on integers: exact sampling; its generator is the operating system's). Ghosh, Roughgarden & Sundararajan 2009 (geometric mechanism).

Does not cover: that one unit really changes the counts by no more; that the charge came first. Both are the caller's.
"""

from __future__ import annotations

import math
from typing import Any

from discreet.errors import missing_extra


def laplace(epsilon: float, *, sensitivity: int) -> Any:
    """Returns OpenDP's measurement of a list of counts: called with the true ones it gives the noised ones, and its `map(sensitivity)` is at most epsilon.

    Args:
        epsilon: finite, > 0.
        sensitivity: how much one unit can change all the counts together, >= 1.

    Raises:
        ValueError: when a figure breaks its rule, or no noise of this kind proves the epsilon.
        MissingExtra: when OpenDP is not installed.
    """
    if not (math.isfinite(epsilon) and epsilon > 0 and sensitivity >= 1 and math.isfinite(sensitivity / epsilon)):
        raise ValueError(f"Expected a finite epsilon={epsilon} > 0 for counts that one unit changes by sensitivity={sensitivity} >= 1.")
    try:
        import opendp.prelude as opendp
    except ImportError:
        raise missing_extra("statistics", "opendp") from None
    dp: Any = opendp
    dp.enable_features("contrib")
    measurement = dp.m.make_laplace(dp.vector_domain(dp.atom_domain(T=int)), dp.l1_distance(T=int), scale=sensitivity / epsilon)
    if not measurement.map(sensitivity) <= epsilon * (1 + 1e-9):
        raise ValueError(f"Expected a query whose proof of privacy is within its charge of epsilon={epsilon}.")
    return measurement


def margin(epsilon: float, *, sensitivity: int, level: float = 0.05) -> int:
    """Returns how far a noised count lies from the true one at most, but with probability `level`: the exact tail of the discrete Laplace. Public: no count enters it.

    Example:
        >>> margin(1.0, sensitivity=1)
        3
    """
    rate = epsilon / sensitivity  # P(|X| > t) = 2 ratio^(t + 1) / (1 + ratio), ratio = exp(-rate)
    return max(0, math.ceil(-math.log(level * (1 + math.exp(-rate)) / 2) / rate) - 1)
