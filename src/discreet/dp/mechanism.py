"""Public parameters -> Plan: sampler, clip, noise and event bound together, so that what is accounted is what is run.

    Mechanism (what will be done) --calibrate--> Plan (with what it costs, and the digest under which it is reserved)

The defects that broke published systems were almost all a sampler, a clip or a step count that differed from the accounted one (PITFALLS 1, 2). A `Plan` is the only
value that the ledger reserves and the trainer takes, it can only be built here, and its event is computed from its own fields.

Calibration searches the smallest noise multiplier. With a budget it is the smallest that the budget's RDP filter admits (valid when later runs depend on this one),
and the tighter PLD epsilon stands beside it; without one it is the smallest whose PLD epsilon meets the target: bracketed by RDP, refined on a coarse PLD grid that
can only overstate, verified once on the fine one.

Source: Abadi et al. 2016 (mechanism); the division by a public expected batch follows the add/remove relation, under which the realised size is private.

A sampler and its event stand in one row of `_PAIRS`; `draw` and `Mechanism.event` both read that row, so neither can be changed without the other (PITFALLS 1). Correlated
noise belongs to one sampler (its units come back only where the noise is independent), and an adaptive clip norm lowers the noise that is accounted: both are fields of the
mechanism, so they cannot be switched on beside it.

Does not cover: adaptive clipping together with correlated noise (refused).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, final

import dp_accounting
from dp_accounting import DpEvent
from scipy import stats

from discreet.dp import banded
from discreet.dp.accounting import (
    COARSE,
    FINE,
    Guarantee,
    RdpFilter,
    Relation,
    entry_of,
    event_to_json,
    guarantee,
    has_pld,
    mixture,
    pld_epsilon,
    rdp,
)
from discreet.dp.combine import Combine
from discreet.dp.selection import Search
from discreet.record import Digest

if TYPE_CHECKING:
    from discreet.keys import Key

_RELATION: Relation = "add_remove"
_TOLERANCE = 2e-4
"""Relative width at which a search for the noise multiplier stops, on its private side."""

_ROUGH = 1e-2
"""Grid on which noise is bracketed for events that only PLD knows."""

_TINY_EPSILON = 0.05
_LARGEST_NOISE = 1e6
_SMALLEST_NOISE = 1e-2


@final
class Sampling(StrEnum):
    """Who takes part in a step, and what is clipped as one; each member is a row of `_PAIRS`."""

    POISSON = "poisson"
    """Each unit with the sampling probability; its documents (at most `cap` a step) are clipped as one (user-level sampling, ULS)."""

    TRUNCATED_POISSON = "truncated_poisson"
    """The same, and of more than `batch_limit` units that many, chosen uniformly."""

    CYCLIC_POISSON = "cyclic_poisson"
    """Units are dealt into as many groups as the noise has bands, by one secret coin each; a step samples its group alone, in turn: a unit comes back after that many steps."""

    POISSON_DOCUMENTS = "poisson_documents"
    """Each of a unit's at most `cap` documents, chosen once for the whole run, with the sampling probability and clipped alone (example-level sampling, ELS)."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptive:
    """A clip norm that follows a quantile of the contributions' norms (`dp.adaptive`); what it learns of them is part of the price.

    Attributes:
        quantile: share of the contributions that should lie within the clip norm, in (0, 1).
        rate: step of the clip norm in logarithm, > 0.
        votes_multiplier: standard deviation of the noise on the votes, each +-1/2; > 0.
    """

    quantile: float
    rate: float
    votes_multiplier: float

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"Expected 0 < quantile={self.quantile} < 1.")
        _positive(self.rate, "rate")
        _positive(self.votes_multiplier, "votes_multiplier")

    def to_json(self) -> dict[str, float]:
        return {"quantile": self.quantile, "rate": self.rate, "votes_multiplier": self.votes_multiplier}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Mechanism:
    """DP-SGD on privacy units: a sampler, one flat clip, one Gaussian draw a step.

    Attributes:
        sampling_probability: chance of each unit (each document under POISSON_DOCUMENTS) to take part in a step, in (0, 1].
        noise_multiplier: noise standard deviation divided by `clip_norm`, > 0.
        clip_norm: L2 bound of one unit's contribution to a step, > 0; with `adaptive` to the first step.
        steps: number of noised updates, >= 1, all of them paid for.
        sampling: the sampler, and with it the event.
        population: number of units, >= 1; what truncation is accounted for.
        cap: largest number of documents of one unit, >= 1.
        batch_limit: largest number of units in a step under TRUNCATED_POISSON, >= 1; None under every other sampler.
        combine: whether the documents of a unit are added or averaged before they are clipped as one; the price is the same.
        bands: coefficients of the correlated noise (`dp.banded`) under CYCLIC_POISSON, at most one a step; empty for independent noise.
        adaptive: how the clip norm moves, or None when it is fixed.
    """

    sampling_probability: float
    noise_multiplier: float
    clip_norm: float
    steps: int
    sampling: Sampling = Sampling.POISSON
    population: int = 1
    cap: int = 1
    batch_limit: int | None = None
    combine: Combine = Combine.SUM
    bands: tuple[float, ...] = ()
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        if not 0 < self.sampling_probability <= 1:
            raise ValueError(f"Expected 0 < sampling_probability={self.sampling_probability} <= 1.")
        _positive(self.noise_multiplier, "noise_multiplier")
        _positive(self.clip_norm, "clip_norm")
        _whole(self.steps, "steps")
        _whole(self.population, "population")
        _whole(self.cap, "cap")
        if (self.batch_limit is not None) != (self.sampling is Sampling.TRUNCATED_POISSON):
            raise ValueError(f"Expected a batch_limit for truncated Poisson sampling and for no other, got {self.batch_limit} with {self.sampling}.")
        if self.batch_limit is not None:
            _whole(self.batch_limit, "batch_limit")
        if bool(self.bands) != (self.sampling is Sampling.CYCLIC_POISSON):
            raise ValueError(f"Expected bands for cyclic Poisson sampling and for no other, got {len(self.bands)} with {self.sampling}.")
        if self.bands:
            banded.check(self.bands)
            if len(self.bands) > self.steps:
                raise ValueError(f"Expected at most one band a step, got {len(self.bands)} bands and {self.steps} steps.")
            if self.adaptive is not None:
                raise ValueError("Expected a fixed clip norm with correlated noise: the two together are not accounted for.")

    @property
    def event(self) -> DpEvent:
        """The dp_accounting event that this mechanism is, for one unit, under add/remove."""
        return self.event_after(self.steps)

    def event_after(self, steps: int) -> DpEvent:
        """The event of the first steps alone: of the unit that was in most of them.

        Args:
            steps: from 0 to `self.steps`.
        """
        return dp_accounting.SelfComposedDpEvent(_PAIRS[self.sampling].event(self), -(-steps // max(1, len(self.bands))))

    @property
    def accounted_multiplier(self) -> float:
        """Standard deviation of the noise over the sensitivity, of all that a step releases: with an adaptive clip norm below `noise_multiplier`."""
        if self.adaptive is None:
            return self.noise_multiplier
        from discreet.dp.adaptive import joint_multiplier  # here, because it imports torch, and other prices need none

        return joint_multiplier(noise_multiplier=self.noise_multiplier, votes_multiplier=self.adaptive.votes_multiplier)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A calibrated mechanism with its price. Built by `calibrate` and `plan_from_json` only.

    Attributes:
        mechanism: what is run.
        population: number of privacy units, public.
        expected_batch: expected number of units (documents under POISSON_DOCUMENTS) in a step; sums are divided by it, never by the realised number.
        unit: what one epsilon protects.
        cap: largest number of documents of one unit used in one step.
        guarantee: the PLD epsilon at `delta`: what the finished run may claim, standing alone.
        filter_epsilon: the epsilon that the budget's RDP filter would need for this plan alone; None when calibrated without a budget.
        allow_large_delta: the recorded reason for delta >= 1/population; empty when it is below.
        search: how several runs of the mechanism are tried and the best is chosen: then `guarantee` and `event` are those of the whole search; None for one run.
    """

    mechanism: Mechanism
    population: int
    expected_batch: int
    unit: str
    cap: int
    guarantee: Guarantee
    filter_epsilon: float | None
    allow_large_delta: str = ""
    search: Search | None = None

    @property
    def sampling_probability(self) -> float:
        return self.mechanism.sampling_probability

    @property
    def noise_multiplier(self) -> float:
        return self.mechanism.noise_multiplier

    @property
    def clip_norm(self) -> float:
        return self.mechanism.clip_norm

    @property
    def steps(self) -> int:
        return self.mechanism.steps

    @property
    def relation(self) -> str:
        return self.guarantee.relation

    @property
    def delta(self) -> float:
        return self.guarantee.delta

    @property
    def event(self) -> DpEvent:
        return self.guarantee.event

    @property
    def noise_std_of_mean(self) -> float:
        """Standard deviation of the noise on each coordinate of the released mean, at its largest over the steps: the signal has to stand out from it."""
        spread = math.sqrt(math.fsum(banded.inverse(self.bands, self.steps) ** 2)) if self.bands else 1.0
        return self.noise_multiplier * self.clip_norm * spread / self.expected_batch

    @property
    def bands(self) -> tuple[float, ...]:
        return self.mechanism.bands

    @property
    def adaptive(self) -> Adaptive | None:
        return self.mechanism.adaptive

    @property
    def sampling(self) -> Sampling:
        return self.mechanism.sampling

    @property
    def combine(self) -> Combine:
        return self.mechanism.combine

    @property
    def digest(self) -> Digest:
        """SHA-256 of `to_json` in canonical JSON (sorted keys, no spaces, UTF-8)."""
        canonical = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return Digest("sha256:" + hashlib.sha256(canonical.encode()).hexdigest())

    def admitted_by(self, budget: RdpFilter) -> bool:
        """Says whether a budget, as it stands, has room for the whole planned event."""
        return budget.relation == self.relation and budget.admits(self.event)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as JSON values; every one of them is public."""
        return {
            "kind": "plan/1",
            "sampling": self.sampling.value,
            "batch_limit": self.mechanism.batch_limit,
            "sampling_probability": self.sampling_probability,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "steps": self.steps,
            "population": self.population,
            "expected_batch": self.expected_batch,
            "unit": self.unit,
            "cap": self.cap,
            "combine": self.combine.value,
            "relation": self.relation,
            "delta": self.delta,
            "epsilon": self.guarantee.epsilon,
            "epsilon_rdp": self.guarantee.epsilon_rdp,
            "filter_epsilon": self.filter_epsilon,
            "allow_large_delta": self.allow_large_delta,
            "event": event_to_json(self.event),
            **{name: value for name, value in self.extras().items() if name != "batch_limit"},
        }

    def extras(self) -> dict[str, Any]:
        """Returns, as JSON values, the fields that most plans leave out: `batch_limit`, `bands`, `adaptive`, `search`."""
        return {
            **({"search": self.search.to_json()} if self.search else {}),
            **({"batch_limit": self.mechanism.batch_limit} if self.mechanism.batch_limit else {}),
            **({"bands": list(self.bands)} if self.bands else {}),
            **({"adaptive": self.adaptive.to_json()} if self.adaptive else {}),
        }


Group = tuple[int, tuple[int, ...]]
"""(position of a unit, positions of its documents that are clipped as one)."""


def draw(plan: Plan, num_documents: Sequence[int], names: Sequence[str], *, key: Key, step: int) -> list[Group]:
    """Draws who takes part in a step, by the plan's sampler: the one that its event accounts for.

    Args:
        num_documents: for each unit, how many documents it has.
        names: for each unit its pseudonym, all different; it names the unit's own draws.
        key: the run key: the same for every step and every resume.
        step: from 1.

    Returns:
        one group for each contribution that is clipped alone, in order of units; empty for an empty sample.

    Raises:
        ValueError: when the two lists differ in length, or truncated sampling meets more units than its population.
    """
    if len(num_documents) != len(names):
        raise ValueError("Expected one name for each unit.")
    return _PAIRS[plan.sampling].draw(plan.mechanism, num_documents, names, key, step)


def _draw_units(mechanism: Mechanism, num_documents: Sequence[int], names: Sequence[str], key: Key, step: int) -> list[Group]:
    from discreet.dp import sampling  # here, because it imports torch, and prices need none

    chosen = sampling.poisson(len(names), mechanism.sampling_probability, key.stream("sample", step)).tolist()
    return _with_documents(chosen, mechanism, num_documents, names, key, step)


def _draw_truncated(mechanism: Mechanism, num_documents: Sequence[int], names: Sequence[str], key: Key, step: int) -> list[Group]:
    """Draws among exactly `population` places, empty ones included: the size that the event is computed for, whatever the private number of units."""
    from discreet.dp import sampling

    if len(names) > mechanism.population:
        raise ValueError("Expected no more units than the population that truncation is accounted for.")
    limit, stream = mechanism.batch_limit or 0, key.stream("sample", step)
    chosen = sampling.poisson(mechanism.population, mechanism.sampling_probability, stream)
    kept = sampling.capped(chosen, limit, stream.fork("truncate")).tolist()
    return _with_documents([unit for unit in kept if unit < len(names)], mechanism, num_documents, names, key, step)


def _draw_cyclic(mechanism: Mechanism, num_documents: Sequence[int], names: Sequence[str], key: Key, step: int) -> list[Group]:
    """Each unit's group is one fair coin of its own, drawn once for the run: it says nothing about anybody else, and removing a unit moves nobody's chances."""
    from discreet.dp import csprng, sampling

    num_groups = len(mechanism.bands)
    groups = (csprng.uniform(key.stream("groups", 0), len(names)) * num_groups).long()
    turn = (groups == (step - 1) % num_groups).nonzero().squeeze(1)
    chosen = turn[sampling.poisson(len(turn), mechanism.sampling_probability, key.stream("sample", step))].tolist()
    return _with_documents(chosen, mechanism, num_documents, names, key, step)


def _draw_documents(mechanism: Mechanism, num_documents: Sequence[int], names: Sequence[str], key: Key, step: int) -> list[Group]:
    """The contribution cap holds over the whole run: its stream names no step."""
    from discreet.dp import sampling

    cap, coins = key.stream("documents", 0), key.stream("sample", step)
    drawn: list[Group] = []
    for unit, name in enumerate(names):
        allowed = sampling.capped_range(num_documents[unit], mechanism.cap, cap.fork(name))
        taken = sampling.poisson(len(allowed), mechanism.sampling_probability, coins.fork(name)).tolist()
        drawn += [(unit, (allowed[place],)) for place in taken]
    return drawn


def _with_documents(
    chosen: Sequence[int], mechanism: Mechanism, num_documents: Sequence[int], names: Sequence[str], key: Key, step: int
) -> list[Group]:
    from discreet.dp import sampling

    stream = key.stream("documents", step)
    return [(unit, tuple(sampling.capped_range(num_documents[unit], mechanism.cap, stream.fork(names[unit])))) for unit in chosen]


def _poisson_event(mechanism: Mechanism) -> DpEvent:
    return dp_accounting.PoissonSampledDpEvent(mechanism.sampling_probability, dp_accounting.GaussianDpEvent(mechanism.accounted_multiplier))


def _truncated_event(mechanism: Mechanism) -> DpEvent:
    """arXiv 2508.15089. Its dataset has `population` places; leaving a place empty, as `_draw_truncated` does, is weaker than adding or removing one."""
    return dp_accounting.dp_event.TruncatedSubsampledGaussianDpEvent(
        mechanism.population, mechanism.sampling_probability, mechanism.batch_limit, mechanism.accounted_multiplier
    )


def _documents_event(mechanism: Mechanism) -> DpEvent:
    """One unit's documents take part independently: Binomial(cap, q) contributions of norm at most clip_norm each (arXiv 2401.10294, 2407.07737)."""
    chances = stats.binom.pmf(range(mechanism.cap + 1), mechanism.cap, mechanism.sampling_probability)
    return mixture(mechanism.accounted_multiplier, [float(chance) for chance in chances])


class _Pair(NamedTuple):
    draw: Callable[[Mechanism, Sequence[int], Sequence[str], Key, int], list[Group]]
    event: Callable[[Mechanism], DpEvent]


_PAIRS = {
    Sampling.POISSON: _Pair(_draw_units, _poisson_event),
    Sampling.TRUNCATED_POISSON: _Pair(_draw_truncated, _truncated_event),
    Sampling.CYCLIC_POISSON: _Pair(_draw_cyclic, _poisson_event),
    Sampling.POISSON_DOCUMENTS: _Pair(_draw_documents, _documents_event),
}
"""A sampler and the event of one step under it; under CYCLIC_POISSON of one step in which a unit's group has its turn, whose noise no other such step shares
(arXiv 2306.08153, theorem 4)."""


def event_of(*, sampling_probability: float, noise_multiplier: float, steps: int) -> DpEvent:
    """Returns the event of `steps` Poisson-sampled Gaussian releases."""
    return dp_accounting.SelfComposedDpEvent(
        dp_accounting.PoissonSampledDpEvent(sampling_probability, dp_accounting.GaussianDpEvent(noise_multiplier)), steps
    )


def calibrate(
    *,
    epsilon: float,
    delta: float,
    population: int,
    expected_batch: int,
    steps: int,
    clip_norm: float,
    unit: str = "record",
    cap: int = 1,
    budget: RdpFilter | None = None,
    allow_large_delta: str = "",
    sampling: Sampling = Sampling.POISSON,
    batch_limit: int | None = None,
    combine: Combine = Combine.SUM,
    bands: int = 0,
    adaptive: Adaptive | None = None,
    search: Search | None = None,
) -> Plan:
    """Finds the least noise that keeps the promise.

    Args:
        epsilon: > 0, finite. With a budget: the RDP epsilon of the plan must not exceed it either.
        delta: in (0, 1), below 1/population.
        population: number of privacy units, >= 1, a public number.
        expected_batch: expected units in a step, from 1 to `population`; under POISSON_DOCUMENTS documents, if every unit had `cap` of them.
        steps: noised updates, >= 1.
        clip_norm: > 0, finite.
        unit: what one epsilon protects.
        cap: documents of one unit used in one step, >= 1.
        budget: the filter, as it stands, that must admit the whole plan.
        allow_large_delta: a reason to accept delta >= 1/population; it is recorded in the plan.
        sampling: who takes part in a step.
        batch_limit: largest number of units in a step, for TRUNCATED_POISSON only.
        combine: whether the documents of a unit are added or averaged before they are clipped as one.
        bands: over how many steps the noise is correlated, for CYCLIC_POISSON only; from 1 to `steps` and to population / expected_batch.
        adaptive: how the clip norm moves.
        search: how several runs are tried; epsilon and delta are then those of the whole search.

    Returns:
        the plan with the smallest noise multiplier, to 0.02 %.

    Raises:
        ValueError: when a parameter breaks its rule; when delta >= 1/population without a reason; when no noise multiplier up to 10^6 is admitted.
    """
    _positive(epsilon, "epsilon")
    _check_delta(delta, population, allow_large_delta)
    _check_batch(population, expected_batch, cap)
    _whole(steps, "steps")
    _positive(clip_norm, "clip_norm")
    _check_unit(unit)
    fixed: dict[str, Any] = {
        "steps": steps,
        "clip_norm": clip_norm,
        "sampling": sampling,
        "population": population,
        "cap": cap,
        "batch_limit": batch_limit,
        "combine": combine,
        "bands": banded.coefficients(bands, steps) if bands else (),
        "adaptive": adaptive,
    }
    fixed["sampling_probability"] = _probability(sampling, expected_batch, population, cap=cap, bands=bands)

    def event(noise_multiplier: float) -> DpEvent:
        return _searched(Mechanism(noise_multiplier=noise_multiplier, **fixed), search)

    noise_multiplier = (
        _noise_for_target(event, epsilon=epsilon, delta=delta) if budget is None else _noise_for_budget(budget, event, epsilon=epsilon, delta=delta)
    )
    return _plan(
        Mechanism(noise_multiplier=noise_multiplier, **fixed),
        expected_batch=expected_batch,
        unit=unit,
        delta=delta,
        filter_epsilon=None if budget is None else budget.epsilon_of(event(noise_multiplier)),
        allow_large_delta=allow_large_delta if delta >= 1 / population else "",
        search=search,
    )


def _searched(mechanism: Mechanism, search: Search | None) -> DpEvent:
    """The event of one run, or of the search that it belongs to."""
    return mechanism.event if search is None else search.event(mechanism.event)


def _probability(sampling: Sampling, expected_batch: int, population: int, *, cap: int, bands: int) -> float:
    """Chance of whoever is asked in a step: everyone, every document up to the cap, or one group out of `bands`."""
    if sampling is Sampling.CYCLIC_POISSON and expected_batch * bands > population:
        raise ValueError(f"Expected bands={bands} <= population / expected_batch={population / expected_batch:.4g}: a group has to fill its steps.")
    return expected_batch * max(1, bands) / (population * cap if sampling is Sampling.POISSON_DOCUMENTS else population)


def noise_for(*, epsilon: float, delta: float, sampling_probability: float, steps: int) -> float:
    """Finds the smallest noise multiplier whose PLD epsilon at delta is at most `epsilon`, under add/remove.

    Raises:
        ValueError: when a parameter breaks its rule, or no noise multiplier up to 10^6 is enough.
    """
    _positive(epsilon, "epsilon")
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta={delta} < 1.")

    def event(noise_multiplier: float) -> DpEvent:
        return event_of(sampling_probability=sampling_probability, noise_multiplier=noise_multiplier, steps=steps)

    return _noise_for_target(event, epsilon=epsilon, delta=delta)


def _noise_for_target(event: Callable[[float], DpEvent], *, epsilon: float, delta: float) -> float:
    """The smallest noise multiplier whose PLD epsilon meets the target: bracketed by the quickest accountant that knows the event."""
    grid = COARSE if epsilon > _TINY_EPSILON else FINE
    has_rdp = entry_of(event(1.0)) == "rdp"

    def quick(noise: float) -> float:
        if not has_rdp:
            return pld_epsilon(event(noise), delta=delta, grid=min(_ROUGH, epsilon / 100))
        return min(_rdp_epsilon(event(noise), delta), _pld_if_tiny(event(noise), epsilon, delta))

    if not has_pld(event(1.0)):
        return _smallest(lambda noise: _rdp_epsilon(event(noise), delta) <= epsilon)
    bracket = _smallest(lambda noise: quick(noise) <= epsilon, tolerance=1e-2)
    noise_multiplier = _least_noise(lambda noise: pld_epsilon(event(noise), delta=delta, grid=grid), epsilon, low=0.85 * bracket, high=bracket)
    while (
        pld_epsilon(event(noise_multiplier), delta=delta, grid=None if has_rdp else grid) > epsilon
    ):  # what only PLD knows is slow on the finest grid
        noise_multiplier *= 1 + _TOLERANCE
    return noise_multiplier


def mechanism_from_json(value: Mapping[str, Any]) -> Mechanism:
    """Rebuilds the mechanism that a stored plan or a public claim describes; other fields are left aside.

    Raises:
        KeyError, TypeError, ValueError: when a field is missing, of another type or out of range.
    """
    fields = ("sampling_probability", "noise_multiplier", "clip_norm", "steps", "population", "cap")
    return Mechanism(
        sampling=Sampling(value["sampling"]),
        combine=Combine(value["combine"]),
        batch_limit=value.get("batch_limit"),
        bands=tuple(value.get("bands", ())),
        adaptive=Adaptive(**value["adaptive"]) if "adaptive" in value else None,
        **{key: value[key] for key in fields},
    )


def plan_from_json(value: Mapping[str, Any]) -> Plan:
    """Rebuilds a stored plan: its price is computed anew, and must not be above the one it states.

    Whoever resumes a run may have another release of the numerics library, whose figures differ in the last digits. So the stored figures stay, and with them the digest
    under which the plan was paid, when the computed ones are at most 1e-4 (relative) above them and at most 1 % below; everything else must be equal.

    Raises:
        ValueError: when a field is missing, unknown or out of range, or a stated figure differs from the computed one.
    """
    try:
        plan = _plan(
            mechanism_from_json(value),
            search=Search.from_json(value["search"]) if "search" in value else None,
            **{key: value[key] for key in ("expected_batch", "unit", "delta", "filter_epsilon", "allow_large_delta")},
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"Expected a plan with all its fields, got {type(error).__name__}.") from None
    computed = plan.to_json()
    changed = sorted(key for key in computed.keys() | value.keys() if not _follows(key, computed.get(key), value.get(key)))
    if changed:
        raise ValueError(f"Expected a plan whose figures follow from its parameters; these do not: {changed}.")
    return replace(plan, guarantee=replace(plan.guarantee, epsilon=value["epsilon"], epsilon_rdp=value["epsilon_rdp"]))


_FIGURES = {"epsilon", "epsilon_rdp"}
_UNDERSTATED, _OVERSTATED = 1e-4, 1e-2
"""How far a stored figure may lie below the computed one, which is less than the fine grid is pessimistic by, and above it."""


def _follows(key: str, computed: Any, stored: Any) -> bool:
    if key in _FIGURES and isinstance(computed, float) and isinstance(stored, float):
        return computed * (1 - _UNDERSTATED) <= stored <= computed * (1 + _OVERSTATED)
    if key == "event":
        return _same_event(computed, stored)
    return bool(computed == stored) and type(computed) is type(stored)


def _same_event(computed: Any, stored: Any) -> bool:
    """The event is the parameters over again; only the probabilities of a mixture are computed, and may differ in the last digits."""
    if isinstance(computed, dict) and isinstance(stored, dict):
        return computed.keys() == stored.keys() and all(_same_event(computed[key], stored[key]) for key in computed)
    if isinstance(computed, list) and isinstance(stored, list):
        return len(computed) == len(stored) and all(map(_same_event, computed, stored))
    if isinstance(computed, float) and isinstance(stored, float):
        return math.isclose(computed, stored, rel_tol=1e-12)
    return bool(computed == stored)


def _plan(
    mechanism: Mechanism,
    *,
    expected_batch: int,
    unit: str,
    delta: float,
    filter_epsilon: float | None,
    allow_large_delta: str,
    search: Search | None,
) -> Plan:
    """The only place where a Plan is built."""
    population, cap = mechanism.population, mechanism.cap
    _check_delta(delta, population, allow_large_delta)
    _check_batch(population, expected_batch, cap)
    _check_unit(unit)
    if mechanism.sampling_probability != _probability(mechanism.sampling, expected_batch, population, cap=cap, bands=len(mechanism.bands)):
        raise ValueError(
            "Expected sampling_probability = expected_batch / population, / (population * cap) where documents are sampled, * bands where groups are."
        )
    return Plan(
        mechanism=mechanism,
        population=population,
        expected_batch=expected_batch,
        unit=unit,
        cap=cap,
        guarantee=guarantee(_searched(mechanism, search), delta=delta, relation=_RELATION, unit=unit),
        filter_epsilon=filter_epsilon,
        allow_large_delta=allow_large_delta,
        search=search,
    )


def _noise_for_budget(budget: RdpFilter, event: Callable[[float], DpEvent], *, epsilon: float, delta: float) -> float:
    """The smallest noise multiplier that the filter admits and whose own epsilon, by RDP where RDP knows the event, meets the target."""
    if budget.relation != _RELATION:
        raise ValueError(f"Expected a budget for the {_RELATION} relation, got {budget.relation}.")

    def fits(noise: float) -> bool:
        return budget.admits(event(noise))

    def meets(noise: float) -> bool:
        by_rdp = entry_of(event(noise)) == "rdp"
        return (_rdp_epsilon(event(noise), delta) if by_rdp else pld_epsilon(event(noise), delta=delta, grid=FINE)) <= epsilon

    noise_multiplier = _smallest(fits)
    return noise_multiplier if meets(noise_multiplier) else _smallest(lambda noise: meets(noise) and fits(noise))


def _pld_if_tiny(event: DpEvent, epsilon: float, delta: float) -> float:
    """PLD epsilon where the target is below what RDP at finite orders can show, whatever the noise; infinity elsewhere."""
    return pld_epsilon(event, delta=delta, grid=FINE) if epsilon <= _TINY_EPSILON else math.inf


def _rdp_epsilon(event: DpEvent, delta: float) -> float:
    """RDP epsilon over orders enough for a search; a subset of orders can only overstate."""
    overhead = [math.log1p(-1 / order) - math.log(delta * order) / (order - 1) for order in _SEARCH_ORDERS]
    return max(0.0, min(value + extra for value, extra in zip(rdp(event, _SEARCH_ORDERS).tolist(), overhead, strict=True)))


_SEARCH_ORDERS = (
    1.5,
    1.75,
    2.0,
    2.25,
    2.5,
    2.75,
    3.0,
    3.5,
    4.0,
    5.0,
    6.0,
    7.0,
    8.0,
    10.0,
    12.0,
    16.0,
    20.0,
    26.0,
    32.0,
    48.0,
    64.0,
    128.0,
    256.0,
    512.0,
)


def _smallest(enough: Callable[[float], bool], *, high: float = 1.0, tolerance: float = _TOLERANCE) -> float:
    """The smallest noise multiplier for which a monotone predicate holds."""
    while not enough(high):
        high *= 2
        if high > _LARGEST_NOISE:
            raise ValueError(
                f"Expected a target that some noise multiplier up to {_LARGEST_NOISE:g} meets; nothing is left of it, or it is too small."
            )
    low = high / 2
    while low > _SMALLEST_NOISE and enough(low):
        low, high = low / 2, low
    return _bisect(enough, low, high, tolerance=tolerance)


def _bisect(enough: Callable[[float], bool], low: float, high: float, *, tolerance: float = _TOLERANCE) -> float:
    """Narrows (low, high], where the predicate holds at `high`; returns a point where it was seen to hold."""
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        if enough(middle):
            high = middle
        else:
            low = middle
    return high


def _least_noise(cost: Callable[[float], float], target: float, *, low: float, high: float) -> float:
    """The least noise whose cost, a falling function that is nearly a power of the noise, is at most the target: secants in logarithms, kept in a bracket."""
    cost_low, cost_high = cost(low), cost(high)
    while cost_low <= target and low > _SMALLEST_NOISE:
        low, high, cost_low, cost_high = low / 2, low, cost(low / 2), cost_low
    while cost_high < target * (1 - _TOLERANCE) and high > low * (1 + _TOLERANCE / 4):
        fraction = 0.5
        if math.isfinite(cost_low) and cost_high > 0:
            fraction = math.log(cost_low / (target * (1 - _TOLERANCE / 2))) / math.log(cost_low / cost_high)
        middle = low * (high / low) ** min(0.95, max(0.05, fraction))
        cost_middle = cost(middle)
        if cost_middle <= target:
            high, cost_high = middle, cost_middle
        else:
            low, cost_low = middle, cost_middle
    return high


def _positive(value: float, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"Expected a finite {name}={value} > 0.")


def _whole(value: int, name: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"Expected a whole number {name}={value} >= 1.")


def _check_delta(delta: float, population: int, allow_large_delta: str) -> None:
    _whole(population, "population")
    if not 0 < delta < 1:
        raise ValueError(f"Expected 0 < delta={delta} < 1.")
    if delta >= 1 / population and not allow_large_delta.strip():
        raise ValueError(
            f"Expected delta={delta} < 1/population={1 / population:.3g}: a larger one allows some unit to be published outright. "
            "Give a reason in allow_large_delta to record an exception."
        )


def _check_batch(population: int, expected_batch: int, cap: int) -> None:
    _whole(expected_batch, "expected_batch")
    _whole(cap, "cap")
    if expected_batch > population:
        raise ValueError(f"Expected expected_batch={expected_batch} <= population={population}.")


def _check_unit(unit: str) -> None:
    if not unit:
        raise ValueError("Expected unit to name what one epsilon protects, such as 'patient'.")
