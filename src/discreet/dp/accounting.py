"""What an event costs: dp_accounting events -> Guarantee, and the filter that a budget spends against.

Two numbers answer two questions. The privacy loss distribution (PLD) gives the tightest epsilon of *one* planned mechanism, its parameters fixed beforehand; it is
what a `Guarantee` states. A budget is different: whether and how the next run happens depends on what earlier runs showed, and full privacy profiles
do not compose under such choices (arXiv 2602.15815). Renyi divergence at a fixed order does (Feldman & Zrnic 2021; Lecuyer 2021), so `RdpFilter` admits spend by RDP.

    event --guarantee--> Guarantee (PLD, checked against RDP)        event --rdp--> vector --RdpFilter.charge--> what is left

Guarantees: NaN, negative and impossible parameters raise instead of costing nothing; zero steps cost 0 and zero noise costs infinity; the PLD epsilon is never
above the RDP one, and a large gap between the two is reported; no event is built from a class name found in data.

The filter, exactly: orders and a split of delta are fixed when it opens. Order a may spend B(a), the largest RDP that converts to (epsilon, delta_a), with
sum of delta_a = delta, and a charge is admitted while some order has room. Which order has room at the end depends on the answers seen, so one delta for all orders
would need a proof that we do not have; with the split, each order's filter fails with probability delta_a and the union bound covers the choice.

What enters how is the table `ACCOUNTANTS`. An event that only PLD knows enters as one (epsilon_i, delta_i) query of the whole run: outside an event of probability
delta_i it is epsilon_i-DP (Kairouz, Oh & Viswanath 2015), so it is charged min(epsilon_i, order * epsilon_i^2 / 2) at every order, or, among such queries alone, by
the sum of the epsilon_i; the delta_i come out of a share of delta set aside when the budget opened (fixed beforehand, hence again a union bound).

Sources: dp_accounting 0.6 (Google); Mironov 2017; Canonne, Kamath & Steinke 2020 (conversion); Bun & Steinke 2016 (pure DP to RDP); Kulynych et al. 2024 and
riskcal 1.5 (trade-off curve); Dong, Roth & Su 2022 (Gaussian DP).

Does not cover: shuffling and mechanisms outside `_FIELDS`; they are refused.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, final

import dp_accounting
import numpy as np
from dp_accounting import DpEvent, NeighboringRelation
from dp_accounting.pld import privacy_loss_distribution as pld_library
from dp_accounting.rdp import RdpAccountant, compute_epsilon
from riskcal.analysis import get_advantage_from_pld, get_beta_from_pld
from scipy import stats

from discreet.dp import mixtures

Relation = Literal["add_remove", "replace_one"]
Vector = np.ndarray[tuple[int], np.dtype[np.float64]]

_RELATIONS = {"add_remove": NeighboringRelation.ADD_OR_REMOVE_ONE, "replace_one": NeighboringRelation.REPLACE_ONE}

FINE, COARSE = 1e-4, 1e-3
"""Grids of the privacy loss. Both are pessimistic: a coarser grid can only overstate epsilon, by 0.05 % over 10,000 steps."""

MANY_STEPS = 20_000
_SMALLEST_DELTA = 1e-13
"""Below this the tail mass that PLD composition cuts off (1e-15) would show; RDP answers instead."""

ORDERS: tuple[float, ...] = (
    *(1 + tenth / 10 for tenth in range(2, 50)),
    *(half / 2 for half in range(12, 24)),
    *range(12, 65),
    *(80, 96, 128, 160, 192, 256, 320, 384, 512, 768, 1024),
)
"""Renyi orders of the RDP epsilon. Fractional orders cost a slow series each, so they are dense only where training has its optimum."""


class _DropsUnconvergedOrders(logging.Filter):
    """dp_accounting logs, for each order whose series does not converge, that it leaves the order out; that is safe, and thousands of lines in a search."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("_compute_log_a_frac failed to converge")


logging.getLogger("absl").addFilter(_DropsUnconvergedOrders())


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Guarantee:
    """An event's cost: the outputs with and without one unit are (epsilon, delta)-close.

    Attributes:
        epsilon: >= 0; infinity when there is no guarantee.
        delta: in [0, 1].
        unit: what one epsilon protects, such as "record" or "patient".
        relation: "add_remove" or "replace_one" of one unit.
        event: what was, or will be, run.
        accountant: "pld" or "rdp", whichever gave epsilon.
        epsilon_rdp: the RDP epsilon for the same event, None where RDP does not know the event.
        remarks: what a careful reader should look at; empty when the two accountants agree as they do on golden figures.
    """

    epsilon: float
    delta: float
    unit: str
    relation: Relation
    event: DpEvent
    accountant: str
    epsilon_rdp: float | None
    remarks: tuple[str, ...] = ()

    @property
    def trade_off(self) -> TradeOff:
        """The f-DP curve of the event: what the best attack on one unit reaches, `.tpr(fpr)`, `.advantage`, `.mu`, `.epsilons(deltas)`.

        Raises:
            ValueError: when PLD does not know the event: then (epsilon, delta) is all there is.
        """
        return trade_off(self.event, relation=self.relation)

    def curve(self, deltas: Sequence[float]) -> list[float]:
        """Returns the epsilon at each delta in (0, 1), by one composition."""
        return self.trade_off.epsilons(deltas)

    def group(self, size: int) -> Guarantee:
        """Returns what `size` units together are promised, at the same delta; of a record-level event it is the promise to a user with that many records.

        Raises:
            ValueError: when `size` is not a whole number >= 1, or no exact group event is known (`group_event`).
        """
        return guarantee(group_event(self.event, size), delta=self.delta, relation=self.relation, unit=f"group of {size} ({self.unit})")


def guarantee(event: DpEvent, *, delta: float, relation: Relation = "add_remove", unit: str = "record", grid: float | None = None) -> Guarantee:
    """Computes what an event costs.

    Args:
        event: dp_accounting event made of the kinds in `_FIELDS`.
        delta: in [0, 1].
        relation: neighbouring relation of the units.
        unit: the privacy unit, for the record.
        grid: discretisation of the privacy loss; None chooses `FINE`, or `COARSE` for what RDP does not know and for more than 20,000 steps.

    Returns:
        the PLD guarantee; the RDP one where PLD does not know the event or delta is below 1e-13.

    Raises:
        ValueError: when a parameter is NaN, negative or out of range; when no accountant knows the event under this relation; when PLD exceeds RDP, which
            means that one of the two is wrong.
    """
    _check_relation(relation)
    if not 0.0 <= delta <= 1.0:
        raise ValueError(f"Expected 0 <= delta={delta} <= 1.")
    parts = _parts(event)

    def result(epsilon: float, accountant: str, epsilon_rdp: float | None, remarks: tuple[str, ...] = ()) -> Guarantee:
        return Guarantee(
            epsilon=epsilon, delta=delta, unit=unit, relation=relation, event=event, accountant=accountant, epsilon_rdp=epsilon_rdp, remarks=remarks
        )

    if not parts or delta == 1.0:
        return result(0.0, "pld", 0.0)
    if any(_is_unprotected(part) for part, _ in parts):
        return result(math.inf, "pld", math.inf)
    epsilon_rdp = _epsilon_rdp(parts, delta, relation)
    composed = _pld_or_none(parts, relation, grid)
    if composed is None or (0 < delta < _SMALLEST_DELTA and epsilon_rdp is not None):
        if epsilon_rdp is None:
            raise ValueError(f"Expected an event that an accountant knows under {relation}, got {event}.")
        return result(epsilon_rdp, "rdp", epsilon_rdp, ("PLD does not cover this event or delta; this is the looser RDP epsilon.",))
    epsilon = float(composed.get_epsilon_for_delta(delta))
    if epsilon_rdp is None or delta == 0.0:
        return result(epsilon, "pld", epsilon_rdp)
    if epsilon > epsilon_rdp:  # near epsilon = 0 rounding the loss up to the grid can cost more than the slack of RDP: look closer before comparing
        epsilon = float(_pld_or_none(parts, relation, (grid or FINE) / 10).get_epsilon_for_delta(delta))
    return result(min(epsilon, epsilon_rdp), "pld", epsilon_rdp, _compare(epsilon, epsilon_rdp))


def pld_epsilon(event: DpEvent, *, delta: float, grid: float | None = COARSE) -> float:
    """Computes the PLD epsilon alone, under add/remove, for searches; a `Guarantee` is checked against RDP as well.

    Args:
        delta: in (0, 1).
        grid: discretisation of the privacy loss; a coarser one can only overstate. None chooses as `guarantee` does.

    Raises:
        ValueError: when a parameter is out of range or PLD does not know the event.
    """
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta={delta} < 1.")
    return trade_off(event, grid=grid).epsilons([delta])[0]


def rdp_epsilon(event: DpEvent, *, delta: float, relation: Relation = "add_remove") -> float:
    """Computes the RDP epsilon alone: quick, looser than PLD, and what discrete noise is accounted by (`dp/discrete.py`).

    Args:
        delta: in (0, 1).

    Returns:
        infinity for an event without noise.

    Raises:
        ValueError: when a parameter is out of range or RDP does not know the event under this relation.
    """
    _check_relation(relation)
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta={delta} < 1.")
    parts = _parts(event)
    if not parts:
        return 0.0
    found = math.inf if any(_is_unprotected(part) for part, _ in parts) else _epsilon_rdp(parts, delta, relation)
    if found is None:
        raise ValueError(f"Expected an event that RDP knows under {relation}, got {event}.")
    return found


def rdp(event: DpEvent, orders: Sequence[float], *, relation: Relation = "add_remove") -> Vector:
    """Computes the Renyi divergence of an event at each order.

    Args:
        orders: each > 1.

    Returns:
        float64 [len(orders)]; infinity where there is no bound.

    Raises:
        ValueError: when a parameter or an order is out of range, or RDP does not know the event under this relation.
    """
    _check_relation(relation)
    _check_orders(orders)
    return _rdp_of_parts(_parts(event), tuple(orders), relation)


def group_event(event: DpEvent, size: int) -> DpEvent:
    """Returns the event that a mechanism is for `size` units at once, under add/remove: exact, where the generic bound loses a factor e^(size * epsilon) in delta.

    A Gaussian's sensitivity grows to `size`; under Poisson sampling the number that take part is Binomial(size, q), a mixture of Gaussians (arXiv 2401.10294).

    Raises:
        ValueError: when `size` is not a whole number >= 1, or the event is of another kind.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"Expected a whole number size={size} >= 1.")
    return dp_accounting.ComposedDpEvent([dp_accounting.SelfComposedDpEvent(_group_once(part, size), count) for part, count in _parts(event)])


def _group_once(event: Any, size: int) -> DpEvent:
    if size == 1 or _is_unprotected(event):
        return event
    if isinstance(event, dp_accounting.GaussianDpEvent | dp_accounting.LaplaceDpEvent):
        return type(event)(event.noise_multiplier / size)
    if isinstance(event, dp_accounting.PoissonSampledDpEvent) and isinstance(event.event, dp_accounting.GaussianDpEvent):
        chances = stats.binom.pmf(np.arange(size + 1), size, event.sampling_probability)
        return mixture(event.event.noise_multiplier, [float(chance) for chance in chances])
    raise ValueError(
        f"Expected Gaussian or Laplace noise, or Poisson-sampled Gaussian noise, to say what it costs a group; got {type(event).__name__}."
    )


def mixture(noise_multiplier: float, chances: Sequence[float]) -> DpEvent:
    """Returns the Gaussian mechanism on a unit that adds i bounded contributions with probability `chances[i]`, i = 0, 1, ...; they sum to 1."""
    return dp_accounting.dp_event.MixtureOfGaussiansDpEvent(noise_multiplier, tuple(float(i) for i in range(len(chances))), tuple(chances))


def rdp_of_pure(epsilon: float, orders: Sequence[float]) -> Vector:
    """Bounds the RDP of a query that is epsilon-DP with delta 0: min(epsilon, order * epsilon^2 / 2) (Bun & Steinke 2016, Prop. 3.3).

    Raises:
        ValueError: when epsilon is NaN or negative, or an order is not above 1.
    """
    _check_orders(orders)
    if not epsilon >= 0:
        raise ValueError(f"Expected epsilon={epsilon} >= 0.")
    return np.minimum(epsilon, np.asarray(orders, dtype=np.float64) * epsilon**2 / 2)


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Attacks


@final
class TradeOff:
    """The best any attack on one unit can do against an event: true positives at each rate of false positives.

    Built by `trade_off` from the event's own privacy loss distribution, so it is far below what (epsilon, delta) alone would allow.
    """

    __slots__ = ("_mu", "_pld")

    def __init__(self, composed: Any) -> None:
        self._pld = composed
        self._mu: float | None = None

    def tpr(self, fpr: float) -> float:
        """Returns the largest true positive rate at a false positive rate in [0, 1]; exact up to the pessimistic grid."""
        if not 0.0 <= fpr <= 1.0:
            raise ValueError(f"Expected 0 <= fpr={fpr} <= 1.")
        if self._pld is None:
            return 1.0
        return float(min(1.0, max(fpr, 1.0 - float(get_beta_from_pld(self._pld, alpha=fpr)))))

    def tprs(self, fprs: Sequence[float] | Vector) -> Vector:
        """Returns `tpr` of many rates at once, in the time of one."""
        rates = np.asarray(fprs, dtype=np.float64)
        if not ((rates >= 0) & (rates <= 1)).all():
            raise ValueError("Expected every false positive rate in [0, 1].")
        return np.ones_like(rates) if self._pld is None else np.clip(1.0 - np.asarray(get_beta_from_pld(self._pld, alpha=rates)), rates, 1.0)

    def epsilons(self, deltas: Sequence[float]) -> list[float]:
        """Returns epsilon for each delta in (0, 1)."""
        return [math.inf if self._pld is None else float(self._pld.get_epsilon_for_delta(delta)) for delta in deltas]

    @property
    def advantage(self) -> float:
        """The largest TPR - FPR of any attack, in [0, 1]: the total variation distance (Kulynych et al. 2024)."""
        return 1.0 if self._pld is None else float(get_advantage_from_pld(self._pld))

    @property
    def mu(self) -> float:
        """The Gaussian DP parameter whose curve caps this one at every false positive rate from 1e-5 to 0.5 (128 points, evenly in logarithm).

        It is the largest mu = z(TPR) - z(FPR) on that grid; beyond it an attack can be a little stronger than N(mu, 1) against N(0, 1).
        """
        if self._mu is None:
            fprs = np.geomspace(1e-5, 0.5, 128)
            self._mu = float(np.max(stats.norm.ppf(self.tprs(fprs)) - stats.norm.ppf(fprs)))
        return self._mu


def trade_off(event: DpEvent, *, relation: Relation = "add_remove", grid: float | None = None) -> TradeOff:
    """Computes the trade-off curve of an event.

    Raises:
        ValueError: when a parameter is out of range or PLD does not know the event under this relation.
    """
    _check_relation(relation)
    parts = _parts(event)
    if any(_is_unprotected(part) for part, _ in parts):
        return TradeOff(None)
    composed = _pld_or_none(parts, relation, grid)
    if composed is None:
        raise ValueError(f"Expected an event that PLD accounting knows under {relation}, got {event}.")
    return TradeOff(composed)


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Budget filter


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class RdpFilter:
    """A privacy budget that stays valid when every charge depends on what the charges before it revealed.

    Open it with `RdpFilter.open`; `charge` returns the filter with the charge spent. Orders, shares of delta and limits never change.

    Attributes:
        epsilon, delta: the total that all admitted charges together satisfy.
        orders: Renyi orders, > 1.
        shares: each order's share of delta, summing to at most 1.
        spent: RDP spent at each order.
        relation: neighbouring relation of every charge.
        spent_delta: delta spent by (epsilon, delta) queries, at most what `shares` leave over.
        spent_basic: sum of the epsilons of such queries; infinity once anything was charged by RDP alone.
    """

    epsilon: float
    delta: float
    orders: tuple[float, ...]
    shares: tuple[float, ...]
    spent: tuple[float, ...]
    relation: Relation = "add_remove"
    spent_delta: float = 0.0
    spent_basic: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise ValueError(f"Expected a finite epsilon={self.epsilon} > 0.")
        if not 0 < self.delta < 1:
            raise ValueError(f"Expected 0 < delta={self.delta} < 1.")
        _check_relation(self.relation)
        _check_orders(self.orders)
        if not (len(self.orders) == len(self.shares) == len(self.spent)):
            raise ValueError("Expected one share of delta and one spent value for each order.")
        if not (all(share > 0 for share in self.shares) and math.fsum(self.shares) <= 1 + 1e-9):
            raise ValueError("Expected positive shares of delta that sum to at most 1.")
        if not (all(value >= 0 for value in self.spent) and self.spent_basic >= 0):
            raise ValueError("Expected spent values >= 0.")
        if not 0 <= self.spent_delta <= self.reserve * (1 + 1e-9):
            raise ValueError(f"Expected 0 <= spent_delta={self.spent_delta} <= the reserve {self.reserve}.")

    @staticmethod
    def open(*, epsilon: float, delta: float, relation: Relation = "add_remove") -> RdpFilter:
        """Opens a budget with nothing spent.

        The three orders lie around the optimum of subsampled Gaussian training, as multiples of the order that is optimal for one Gaussian at this (epsilon, delta).

        Args:
            epsilon: > 0, finite.
            delta: in (0, 1).
        """
        if not (math.isfinite(epsilon) and epsilon > 0 and 0 < delta < 1):
            raise ValueError(f"Expected a finite epsilon={epsilon} > 0 and 0 < delta={delta} < 1.")
        log_delta = math.sqrt(-math.log(delta))
        gaussian = log_delta / (math.sqrt(epsilon - math.log(delta)) - log_delta)
        orders = tuple(round(1 + factor * gaussian, 3) for factor, _ in _SPLIT)
        return RdpFilter(
            epsilon=epsilon, delta=delta, orders=orders, shares=tuple(share for _, share in _SPLIT), spent=(0.0,) * len(orders), relation=relation
        )

    @property
    def reserve(self) -> float:
        """The part of delta set aside for (epsilon, delta) queries when the budget opened."""
        return max(0.0, 1.0 - math.fsum(self.shares)) * self.delta

    @property
    def basic(self) -> float:
        """The sum of epsilons spent, infinity when something was charged by RDP alone: RDP never exceeds the sum where all were (epsilon, delta) queries."""
        return self.spent_basic if max(self.spent) <= self.spent_basic * (1 + 1e-12) else math.inf

    @property
    def next_delta(self) -> float:
        """The delta at which the next (epsilon, delta) query is charged: half of what is left of the reserve, so that it never runs out."""
        left = (self.reserve - self.spent_delta) / 2
        return left if left > _SMALLEST_DELTA else 0.0

    @property
    def limits(self) -> tuple[float, ...]:
        """B(order): the largest RDP at each order that converts to (epsilon, share * delta); negative where none does."""
        return tuple(self.epsilon - overhead for overhead in self._overheads())

    def admits(self, charge: DpEvent | Sequence[float] | Vector) -> bool:
        """Says whether the budget has room for an event, or for what `vector` gave for one."""
        return self._has_room(self._after(charge))

    def charge(self, charge: DpEvent | Sequence[float] | Vector) -> RdpFilter:
        """Returns the filter with the charge spent.

        Args:
            charge: an event; or what `vector` gave for one; or its RDP at `orders`.

        Raises:
            ValueError: when the budget has no room for it, or the charge is not valid.
        """
        after = self._after(charge)
        if not self._has_room(after):
            raise ValueError(f"Expected a charge that the budget admits; epsilon {self.remaining_epsilon():.4g} of {self.epsilon:.4g} is left.")
        return after

    def vector(self, event: DpEvent) -> Vector:
        """Computes an event's charge to this filter as it stands.

        Returns:
            float64 [len(orders) + 2]: RDP at each order, the basic epsilon (infinity for an event charged by RDP), and the delta taken from the reserve.

        Raises:
            ValueError: when a parameter is out of range, no one accountant knows the event, or an (epsilon, delta) query meets a budget that has no reserve.
        """
        if entry_of(event) == "rdp":
            divergences = rdp(event, self.orders, relation=self.relation)
            return np.append(divergences, [math.inf if np.any(divergences > 0) else 0.0, 0.0])
        if self.next_delta == 0:
            raise ValueError(
                "Expected a budget with a share of delta for events that RDP does not know; this one has none left. Open one with a reserve."
            )
        epsilon = trade_off(event, relation=self.relation).epsilons([self.next_delta])[0]
        return np.append(rdp_of_pure(epsilon, self.orders), [epsilon, self.next_delta])

    def spent_epsilon(self) -> float:
        """Returns the smallest epsilon of a budget, opened with these orders and delta, that would have admitted all charges so far; 0 when there were none."""
        return self._epsilon_of(self)

    def remaining_epsilon(self) -> float:
        """Returns `epsilon - spent_epsilon()`, never below 0. Charges do not add up in epsilon: ask `admits` whether one fits."""
        return max(0.0, self.epsilon - self.spent_epsilon())

    def epsilon_of(self, charge: DpEvent | Sequence[float] | Vector) -> float:
        """Returns the smallest epsilon of a budget, opened with these orders and delta, that would admit this charge alone."""
        return self._epsilon_of(replace(self, spent=(0.0,) * len(self.orders), spent_basic=0.0, spent_delta=0.0)._after(charge))

    def to_json(self) -> dict[str, Any]:
        """Returns the filter as JSON values."""
        return {
            "kind": "rdp_filter/2",
            "epsilon": self.epsilon,
            "delta": self.delta,
            "orders": list(self.orders),
            "shares": list(self.shares),
            "spent": list(self.spent),
            "relation": self.relation,
            "spent_delta": self.spent_delta,
            "spent_basic": self.basic if math.isfinite(self.basic) else None,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> RdpFilter:
        """Returns the filter of `to_json`.

        Raises:
            ValueError: when a field is missing, unknown or breaks its rule.
        """
        fields = {"kind", "epsilon", "delta", "orders", "shares", "spent", "relation"}
        if (
            set(value) == fields and value["kind"] == "rdp_filter/1"
        ):  # opened before (epsilon, delta) queries had a place: all of its delta is shared out
            value = {**value, "kind": "rdp_filter/2", "spent_delta": 0.0, "spent_basic": None}
        if set(value) != fields | {"spent_delta", "spent_basic"} or value["kind"] != "rdp_filter/2":
            raise ValueError(f"Expected the fields {sorted(fields)}, spent_delta and spent_basic of kind rdp_filter/2.")
        vectors: dict[str, Any] = {key: tuple(_number(item, key) for item in value[key]) for key in ("orders", "shares", "spent")}
        basic = math.inf if value["spent_basic"] is None else _number(value["spent_basic"], "spent_basic")
        numbers = {key: _number(value[key], key) for key in ("epsilon", "delta", "spent_delta")}
        return RdpFilter(relation=value["relation"], spent_basic=basic, **numbers, **vectors)

    def _overheads(self) -> list[float]:
        """What converting RDP at each order to (epsilon, share * delta) adds (Canonne, Kamath & Steinke 2020, Prop. 12)."""
        return [
            math.log1p(-1 / order) - math.log(share * self.delta * order) / (order - 1) for order, share in zip(self.orders, self.shares, strict=True)
        ]

    def _vector(self, charge: DpEvent | Sequence[float] | Vector) -> Vector:
        if isinstance(charge, DpEvent):
            return self.vector(charge)
        vector = np.asarray(charge, dtype=np.float64)
        if vector.shape == (len(self.orders),):
            vector = np.append(vector, [math.inf if np.any(vector > 0) else 0.0, 0.0])
        if vector.shape != (len(self.orders) + 2,) or not bool(np.all(vector >= 0)):
            raise ValueError(f"Expected a charge of {len(self.orders)} values >= 0, or of two more.")
        return vector

    def _after(self, charge: DpEvent | Sequence[float] | Vector) -> RdpFilter:
        vector = self._vector(charge)
        if self.spent_delta + vector[-1] > self.reserve * (1 + 1e-9):
            raise ValueError(f"Expected a charge whose delta={vector[-1]:.3g} is left of the reserve {self.reserve:.3g}.")
        spent = np.asarray(self.spent) + vector[:-2]
        basic, delta = self.basic + float(vector[-2]), self.spent_delta + float(vector[-1])
        return replace(self, spent=tuple(map(float, spent)), spent_basic=basic, spent_delta=delta)

    def _has_room(self, after: RdpFilter) -> bool:
        return after.basic <= self.epsilon or any(spent <= limit for spent, limit in zip(after.spent, self.limits, strict=True))

    def _epsilon_of(self, after: RdpFilter) -> float:
        if not any(value > 0 for value in after.spent):
            return 0.0
        return max(0.0, min(after.basic, *(value + overhead for value, overhead in zip(after.spent, self._overheads(), strict=True))))


_SPLIT = ((0.45, 0.445), (0.6, 0.445), (0.9, 0.1))
"""(order - 1 as a multiple of the single Gaussian's, share of delta). Over twelve plans from q = 0.01 to 1 and epsilon 0.5 to 8 this needs 2 to 9 % more noise
than the best single order chosen with hindsight. What the shares leave over, 1 % of delta, is the reserve for (epsilon, delta) queries."""


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Events


_FIELDS: dict[str, tuple[type[DpEvent], tuple[str, ...]]] = {
    "no_op": (dp_accounting.NoOpDpEvent, ()),
    "non_private": (dp_accounting.NonPrivateDpEvent, ()),
    "gaussian": (dp_accounting.GaussianDpEvent, ("noise_multiplier",)),
    "laplace": (dp_accounting.LaplaceDpEvent, ("noise_multiplier",)),
    "zcdp": (dp_accounting.ZCDpEvent, ("rho", "xi")),
    "randomized_response": (dp_accounting.RandomizedResponseDpEvent, ("noise_parameter", "num_buckets")),
    "mixture_of_gaussians": (dp_accounting.dp_event.MixtureOfGaussiansDpEvent, ("standard_deviation", "sensitivities", "sampling_probs")),
    "truncated_subsampled_gaussian": (
        dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent,
        ("dataset_size", "sampling_probability", "truncated_batch_size", "noise_multiplier"),
    ),
    "poisson_sampled": (dp_accounting.PoissonSampledDpEvent, ("sampling_probability", "event")),
    "sampled_without_replacement": (dp_accounting.SampledWithoutReplacementDpEvent, ("source_dataset_size", "sample_size", "event")),
    "repeat_and_select": (dp_accounting.dp_event.RepeatAndSelectDpEvent, ("event", "mean", "shape")),
    "self_composed": (dp_accounting.SelfComposedDpEvent, ("event", "count")),
    "composed": (dp_accounting.ComposedDpEvent, ("events",)),
}
"""The events that may be accounted, stored and read back: name in JSON -> (class, fields)."""

_KINDS = {kind: name for name, (kind, _) in _FIELDS.items()}

Entry = Literal["rdp", "epsilon_delta"]

ACCOUNTANTS: dict[str, tuple[tuple[str, ...], Entry]] = {
    "no_op": (("pld", "rdp"), "rdp"),
    "non_private": (("pld", "rdp"), "rdp"),
    "gaussian": (("pld", "rdp"), "rdp"),
    "laplace": (("pld", "rdp"), "rdp"),
    "zcdp": (("rdp",), "rdp"),
    "randomized_response": (("pld", "rdp"), "rdp"),
    "mixture_of_gaussians": (("pld",), "epsilon_delta"),
    "truncated_subsampled_gaussian": (("pld",), "epsilon_delta"),
    "poisson_sampled": (("pld", "rdp"), "rdp"),
    "sampled_without_replacement": (("rdp",), "rdp"),
    "repeat_and_select": (("rdp",), "rdp"),
}
"""Kind of mechanism -> (who can account for it, how it enters a filter). A composition is known to whoever knows all its parts; a relation, or a part inside a part, that
an accountant does not take is refused by that accountant all the same."""


def entry_of(event: DpEvent) -> Entry:
    """Says how an event enters a filter: by RDP, or as one (epsilon, delta) query of the whole run.

    Raises:
        ValueError: when a parameter is out of range, or no one accountant knows all its parts.
    """
    kinds = [_kind_of(part) for part, _ in _parts(event)]
    if all("rdp" in ACCOUNTANTS[kind][0] for kind in kinds):
        return "rdp"
    if all("pld" in ACCOUNTANTS[kind][0] for kind in kinds):
        return "epsilon_delta"
    raise ValueError(f"Expected an event that one accountant knows in whole; {sorted(set(kinds))} together are known to none.")


def has_pld(event: DpEvent) -> bool:
    """Says whether PLD knows every kind of mechanism in an event; a relation or a part inside a part may be refused all the same."""
    return all("pld" in ACCOUNTANTS[_kind_of(part)][0] for part, _ in _parts(event))


def event_to_json(event: DpEvent) -> dict[str, Any]:
    """Returns an event as JSON values.

    Raises:
        ValueError: when the event, or one inside it, is of a kind that is not accounted.
    """
    name = _kind_of(event)
    return {"kind": name, **{field: _field_to_json(getattr(event, field)) for field in _FIELDS[name][1]}}


def event_from_json(value: Mapping[str, Any]) -> DpEvent:
    """Returns the event of `event_to_json`, from the closed table of kinds: nothing in the data names a class or a module.

    Raises:
        ValueError: when a kind or field is unknown or missing, or a parameter is out of range.
    """
    event = _event_from_json(value)
    _parts(event)
    return event


def _event_from_json(value: Any) -> DpEvent:
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in _FIELDS:
        raise ValueError(f"Expected an event whose kind is one of {sorted(_FIELDS)}.")
    build, fields = _FIELDS[kind]
    if set(value) != {"kind", *fields}:
        raise ValueError(f"Expected an event of kind {kind!r} to have exactly the fields {sorted(fields)}.")
    return build(**{field: _field_from_json(field, value[field]) for field in fields})


def _field_to_json(value: Any) -> Any:
    if isinstance(value, DpEvent):
        return event_to_json(value)
    if isinstance(value, list | tuple):
        return [_field_to_json(item) for item in value]
    if isinstance(value, float) and math.isinf(value):  # the shape of a Poisson number of tries: JSON has no infinity
        return None
    return value.item() if isinstance(value, np.generic) else value


def _field_from_json(field: str, value: Any) -> Any:
    if field == "event":
        return _event_from_json(value)
    if field == "events":
        if not isinstance(value, list):
            raise ValueError("Expected events to be a list.")
        return [_event_from_json(item) for item in value]
    if field == "shape" and value is None:
        return math.inf
    return [_number(item, field) for item in value] if isinstance(value, list) else _number(value, field)


def _number(value: Any, name: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"Expected {name} to be a number.")
    return value


def _kind_of(event: Any) -> str:
    name = _KINDS.get(type(event))
    if name is None:
        raise ValueError(f"Expected an event that can be accounted, got {type(event).__name__}.")
    return name


def _parts(event: DpEvent) -> list[tuple[DpEvent, int]]:
    """Flattens compositions into (mechanism, times), equal mechanisms merged, and checks every parameter on the way."""
    merged: dict[DpEvent, int] = {}
    for part, count in _flatten(event, 1):
        hashable = _canonical(part)
        merged[hashable] = merged.get(hashable, 0) + count
    return list(merged.items())


def _flatten(event: DpEvent, count: int) -> Iterator[tuple[DpEvent, int]]:
    name = _kind_of(event)
    _CHECKS.get(name, _check_nothing)(event)
    if name == "self_composed":
        yield from _flatten(event.event, count * _count(event.count))
    elif name == "composed":
        for inner in event.events:
            yield from _flatten(inner, count)
    elif count > 0 and not _is_free(name, event):
        yield event, count


def _is_free(name: str, event: Any) -> bool:
    if name == "truncated_subsampled_gaussian":
        return 0 in (event.sampling_probability, event.truncated_batch_size, event.dataset_size)
    return name == "no_op" or (name == "poisson_sampled" and bool(event.sampling_probability == 0)) or (name == "zcdp" and event.rho + event.xi <= 0)


def _canonical(event: Any) -> DpEvent:
    """A hashable form; Poisson sampling with certainty is no sampling."""
    if isinstance(event, dp_accounting.ComposedDpEvent):
        return dp_accounting.ComposedDpEvent(tuple(_canonical(inner) for inner in event.events))
    if isinstance(event, dp_accounting.SelfComposedDpEvent):
        return dp_accounting.SelfComposedDpEvent(_canonical(event.event), event.count)
    if isinstance(event, dp_accounting.dp_event.RepeatAndSelectDpEvent):
        return dp_accounting.dp_event.RepeatAndSelectDpEvent(_canonical(event.event), event.mean, event.shape)
    if isinstance(event, dp_accounting.PoissonSampledDpEvent) and event.sampling_probability == 1:
        return event.event
    if isinstance(event, dp_accounting.dp_event.MixtureOfGaussiansDpEvent):
        return dp_accounting.dp_event.MixtureOfGaussiansDpEvent(event.standard_deviation, tuple(event.sensitivities), tuple(event.sampling_probs))
    return event


def _is_unprotected(event: Any) -> bool:
    """Says whether a mechanism adds no noise at all."""
    if hasattr(event, "event"):
        return any(_is_unprotected(part) for part, _ in _parts(event.event))
    if isinstance(event, dp_accounting.RandomizedResponseDpEvent):
        return bool(event.noise_parameter == 0 and event.num_buckets > 1)
    if isinstance(event, dp_accounting.dp_event.MixtureOfGaussiansDpEvent):
        return bool(event.standard_deviation == 0)
    return isinstance(event, dp_accounting.NonPrivateDpEvent) or bool(getattr(event, "noise_multiplier", 1.0) == 0)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 0:
        raise ValueError(f"Expected a whole number of steps >= 0, got {value}.")
    return int(value)


def _check_nothing(_: Any) -> None:
    """Compositions check their parts."""


def _check_noise(event: Any) -> None:
    _finite(event.noise_multiplier, "noise_multiplier")


def _check_sampling(event: Any) -> None:
    _probability(event.sampling_probability, "sampling_probability")
    if type(event.event) not in (dp_accounting.GaussianDpEvent, dp_accounting.LaplaceDpEvent):
        raise ValueError(f"Expected Poisson sampling of a Gaussian or Laplace mechanism, got {type(event.event).__name__}.")
    _check_noise(event.event)


def _check_truncated(event: Any) -> None:
    _probability(event.sampling_probability, "sampling_probability")
    _check_noise(event)
    _count(event.dataset_size)
    _count(event.truncated_batch_size)


def _check_mixture(event: Any) -> None:
    _finite(event.standard_deviation, "standard_deviation")
    for value in event.sensitivities:
        _finite(value, "sensitivity")
    for value in event.sampling_probs:
        _probability(value, "sampling_prob")
    if len(event.sensitivities) != len(event.sampling_probs) or abs(math.fsum(event.sampling_probs) - 1) > 1e-9:
        raise ValueError("Expected one probability for each sensitivity, summing to 1.")


def _check_fixed_size(event: Any) -> None:
    if _count(event.sample_size) > _count(event.source_dataset_size) or event.source_dataset_size == 0:
        raise ValueError(f"Expected 0 <= sample_size={event.sample_size} <= source_dataset_size={event.source_dataset_size}, which is not 0.")
    if type(event.event) is not dp_accounting.GaussianDpEvent:
        raise ValueError(f"Expected sampling of a Gaussian mechanism, got {type(event.event).__name__}.")
    _check_noise(event.event)


def _check_zcdp(event: Any) -> None:
    _finite(event.rho, "rho")
    _finite(event.xi, "xi")


def _check_response(event: Any) -> None:
    _probability(event.noise_parameter, "noise_parameter")
    if _count(event.num_buckets) < 1:
        raise ValueError(f"Expected num_buckets={event.num_buckets} >= 1.")


def _check_selection(event: Any) -> None:
    if not (math.isfinite(event.mean) and event.mean >= 1):
        raise ValueError(f"Expected a finite mean={event.mean} >= 1.")
    if math.isnan(event.shape) or event.shape < 0:
        raise ValueError(f"Expected shape={event.shape} >= 0.")
    _parts(event.event)


_CHECKS: dict[str, Any] = {
    "gaussian": _check_noise,
    "laplace": _check_noise,
    "poisson_sampled": _check_sampling,
    "truncated_subsampled_gaussian": _check_truncated,
    "mixture_of_gaussians": _check_mixture,
    "zcdp": _check_zcdp,
    "randomized_response": _check_response,
    "sampled_without_replacement": _check_fixed_size,
    "repeat_and_select": _check_selection,
}


def _finite(value: Any, name: str) -> None:
    if not (isinstance(value, int | float | np.number) and math.isfinite(value) and value >= 0):
        raise ValueError(f"Expected a finite {name}={value} >= 0.")


def _probability(value: Any, name: str) -> None:
    if not (isinstance(value, int | float | np.number) and 0 <= value <= 1):
        raise ValueError(f"Expected 0 <= {name}={value} <= 1.")


def _check_relation(relation: Any) -> None:
    if relation not in _RELATIONS:
        raise ValueError(f"Expected a relation in {sorted(_RELATIONS)}, got {relation!r}.")


def _check_orders(orders: Sequence[float]) -> None:
    if len(orders) == 0 or not all(math.isfinite(order) and order > 1 for order in orders):
        raise ValueError("Expected at least one order, each finite and above 1.")


# --------------------------------------------------------------------------------------------------------------------------------------------------
# Accountants


def _epsilon_rdp(parts: list[tuple[DpEvent, int]], delta: float, relation: Relation) -> float | None:
    try:
        vector = _rdp_of_parts(parts, ORDERS, relation)
    except ValueError:
        return None
    return math.inf if delta == 0 else float(compute_epsilon(ORDERS, vector, delta)[0])


def _rdp_of_parts(parts: list[tuple[DpEvent, int]], orders: tuple[float, ...], relation: Relation) -> Vector:
    """Sums the parts here, count times one: some releases of dp_accounting lose the count of some events."""
    total = np.zeros(len(orders))
    for part, count in parts:
        total += np.inf if _is_unprotected(part) else count * _rdp_once(part, orders, relation)
    return total


@lru_cache(maxsize=256)
def _rdp_once(event: DpEvent, orders: tuple[float, ...], relation: Relation) -> Vector:
    asked = tuple(sorted({*orders, *ORDERS})) if isinstance(event, dp_accounting.dp_event.RepeatAndSelectDpEvent) else orders
    try:  # the bound of a selection at one order uses the divergence of a run at the best other one
        vector = RdpAccountant(asked, _RELATIONS[relation]).compose(event).rdp
    except dp_accounting.UnsupportedEventError:
        raise ValueError(f"Expected an event that RDP accounting knows under {relation}, got {type(event).__name__}.") from None
    if np.any(np.isnan(vector)):
        raise ValueError(f"Expected a divergence that can be computed, got NaN for {event}.")
    result: Vector = np.maximum(np.asarray(vector)[[asked.index(order) for order in orders]], 0.0).astype(np.float64)
    for place, order in enumerate(orders):
        if math.isinf(result[place]) and order != math.floor(order):
            result[place] = _rdp_between(event, order, relation)
    result.setflags(write=False)
    return result


def _rdp_between(event: DpEvent, order: float, relation: Relation) -> float:
    """A bound at a fractional order where the library's series does not converge (little noise, an order near 1), from the whole orders beside it.

    (order - 1) * divergence is convex in the order and 0 at order 1, so it lies below the chord (van Erven and Harremoes 2014, cor. 2; Wang et al. 2019, cor. 10).
    """
    below, above = math.floor(order), math.floor(order) + 1
    high = (above - 1) * _rdp_once(event, (float(above),), relation)[0]
    low = (below - 1) * _rdp_once(event, (float(below),), relation)[0] if below > 1 else 0.0
    return float((above - order) * low + (order - below) * high) / (order - 1)


def _pld_or_none(parts: list[tuple[DpEvent, int]], relation: Relation, grid: float | None) -> Any:
    """Composes the privacy loss distributions of the parts; None where one of them has none under this relation."""
    if grid is None:
        is_slow = any(entry_of(part) != "rdp" for part, _ in parts)
        grid = COARSE if is_slow or sum(count for _, count in parts) > MANY_STEPS else FINE
    composed = pld_library.identity(value_discretization_interval=grid)
    for part, count in parts:
        one = _pld_once(part, count, _RELATIONS[relation], grid)
        if one is None:
            return None
        composed = composed.compose(one)
    return composed


@lru_cache(maxsize=8)
def _pld_once(event: Any, count: int, relation: NeighboringRelation, grid: float) -> Any:
    """The distribution of one mechanism run `count` times. Composed here, because PLDAccountant 0.6 drops the count of randomized response."""
    add_remove = relation is NeighboringRelation.ADD_OR_REMOVE_ONE
    if isinstance(event, dp_accounting.GaussianDpEvent):
        return pld_library.from_gaussian_mechanism(
            event.noise_multiplier / math.sqrt(count), value_discretization_interval=grid, neighboring_relation=relation
        )
    if isinstance(event, dp_accounting.PoissonSampledDpEvent) and isinstance(event.event, dp_accounting.GaussianDpEvent):
        one = pld_library.from_gaussian_mechanism(
            event.event.noise_multiplier,
            value_discretization_interval=grid,
            sampling_prob=event.sampling_probability,
            neighboring_relation=relation,
        )
    elif isinstance(event, dp_accounting.LaplaceDpEvent) and add_remove:
        one = pld_library.from_laplace_mechanism(event.noise_multiplier, value_discretization_interval=grid)
    elif isinstance(event, dp_accounting.PoissonSampledDpEvent) and add_remove:
        one = pld_library.from_laplace_mechanism(
            event.event.noise_multiplier, value_discretization_interval=grid, sampling_prob=event.sampling_probability
        )
    elif isinstance(event, dp_accounting.RandomizedResponseDpEvent) and not add_remove:
        if event.num_buckets == 1:
            return pld_library.identity(value_discretization_interval=grid)
        one = pld_library.from_randomized_response(
            event.noise_parameter, event.num_buckets, value_discretization_interval=grid, neighboring_relation=relation
        )
    elif isinstance(event, dp_accounting.dp_event.MixtureOfGaussiansDpEvent) and add_remove:
        one = mixtures.loss_distribution(event.standard_deviation, event.sensitivities, event.sampling_probs, grid=grid)
    elif isinstance(event, dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent):
        one = pld_library.from_truncated_subsampled_gaussian_mechanism(
            dataset_size=event.dataset_size,
            sampling_probability=event.sampling_probability,
            truncated_batch_size=event.truncated_batch_size,
            noise_multiplier=event.noise_multiplier,
            value_discretization_interval=grid,
            neighboring_relation=relation,
        )
    else:
        return None
    return one.self_compose(count) if count > 1 else one


def _compare(epsilon_pld: float, epsilon_rdp: float) -> tuple[str, ...]:
    """The tripwire between two accountants that share no formula.

    Raises:
        ValueError: when the tight one exceeds the loose one by more than the discretisation explains: then one of them is wrong, and nobody may rely on either.
    """
    if epsilon_pld > epsilon_rdp * 1.002 + 2e-3:
        raise ValueError(
            f"Expected PLD epsilon {epsilon_pld:.6g} <= RDP epsilon {epsilon_rdp:.6g}; the accountants disagree, so no guarantee is given."
        )
    if epsilon_rdp > 0.1 and epsilon_pld < 0.5 * epsilon_rdp:
        return (f"PLD epsilon {epsilon_pld:.4g} is less than half of RDP epsilon {epsilon_rdp:.4g}; check the event.",)
    return ()
