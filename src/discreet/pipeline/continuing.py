"""Training that goes on from a released model: a further run on the same people, whose promise is that of both runs together.

The parent is fixed when the run is first reserved, and every resume goes on from it. The new run is charged like any other; what its model promises is the composition of its own
event with those of all runs that it goes on from, because its weights depend on every one of them.

Does not cover: a parent that another project released.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from dp_accounting import ComposedDpEvent

from discreet.dp import accounting, mechanism
from discreet.dp.accounting import Guarantee
from discreet.errors import NotReleased, PlanInvalid
from discreet.evidence.statement import Predicate
from discreet.governance import lineage
from discreet.pipeline.house import House, fact
from discreet.pipeline.pricing import filter_of, guarantee_fields, plan_of
from discreet.pipeline.weights import adapter_digest_of
from discreet.record import Digest, Snapshot


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Parent:
    """A released model to go on from: its run, its adapter, and its base."""

    run: str
    adapter: Digest
    base: Digest

    def to_json(self) -> dict[str, str]:
        return {"run": self.run, "adapter": self.adapter, "base": self.base}


def last_released(house: House) -> Parent:
    """Returns the model that was released last.

    Raises:
        NotReleased: when none was, when its weights are gone or its parents unknown (it was withdrawn), or when it protects another unit than the project now does.
    """
    released = house.log.select(Predicate.RELEASED)
    if not released:
        raise NotReleased("a released model to go on from", remedy="`discreet update` without --continue trains from the base.")
    said = released[-1].fields
    parent = Parent(run=said["run"], adapter=Digest(said["adapter"]), base=Digest(said["base"]))
    with house.store.transaction() as tx:
        known = lineage.is_known(tx, parent.adapter)
    unit = said["guarantee"]["unit"]
    if not known or unit != house.project.privacy.unit or adapter_digest_of(weights_of(house, parent)) != parent.adapter:
        value = f"{parent.adapter}, which protects one {unit}"
        raise NotReleased("the weights of the last release, for the project's unit, to go on from", value=value, remedy="Train from the base.")
    return parent


def weights_of(house: House, parent: Parent) -> Path:
    """Returns the folder of a parent's adapter."""
    return house.project.state / "runs" / parent.run / "adapter"


def parent_of(house: House, run: str) -> Parent | None:
    """Returns the model that a run goes on from; None when it began at the base."""
    known = fact(house, f"parent/{run}")
    return None if known is None else Parent(run=known["run"], adapter=Digest(known["adapter"]), base=Digest(known["base"]))


def runs_above(house: House, run: str) -> Iterator[str]:
    """Yields the runs that a run goes on from, newest first."""
    while (parent := parent_of(house, run)) is not None:
        run = parent.run
        yield run


def promise_of(house: House, run: str) -> Guarantee:
    """Returns what the model of a run promises, standing alone: the price of its plan, composed with those of the runs that it goes on from, at the delta of its own."""
    return _composed([plan_of(house, each) for each in (run, *runs_above(house, run))])


def refuse_unpromised(house: House, plan: mechanism.Plan, snapshot: Snapshot, parent: Parent) -> None:
    """Composes a planned run with those that it would go on from, before anything is spent: its model can promise nothing else.

    Raises:
        PlanInvalid: when no accountant knows all of them, or together they are above `[release] max_epsilon`. Nothing was spent.
    """
    above = [plan_of(house, each) for each in (parent.run, *runs_above(house, parent.run))]
    try:
        promised = _composed([plan, *above])
        filter_of(house, plan.delta, snapshot)[0].epsilon_of(promised.event)
    except ValueError:
        remedy = "Nothing was spent. Set [search] and [privacy] sampling to what that run had, or train from the base (`discreet update`)."
        value = ", ".join(f"{each.sampling.value}{' in a search' if each.search else ''}" for each in (plan, *above))
        raise PlanInvalid(f"a run that one accountant composes with {parent.run}, from which it goes on", value=value, remedy=remedy) from None
    most = house.project.release.max_epsilon
    if promised.epsilon > most:
        remedy = "Nothing was spent. Lower [privacy] epsilon, raise [release] max_epsilon, or train from the base (`discreet update`)."
        rule = f"a run that with {parent.run}, from which it goes on, stays within [release] max_epsilon = {most:g}"
        raise PlanInvalid(rule, value=f"{promised.epsilon:.4g}", remedy=remedy)


def _composed(plans: Sequence[mechanism.Plan]) -> Guarantee:
    """The price of plans together, newest first, at the delta of the newest."""
    if len(plans) == 1:
        return plans[0].guarantee
    event = ComposedDpEvent([plan.event for plan in reversed(plans)])
    return accounting.guarantee(event, delta=plans[0].delta, unit=plans[0].unit)


def claim_of(house: House, run: str) -> dict[str, Any]:
    """Returns the public statement of a run's model: the figures of its own mechanism, the epsilon of everything together, and what the run that it goes on from stated.

    It names that run and not its adapter, whose digest is a function of private records.
    """
    plan, parent = plan_of(house, run), parent_of(house, run)
    if parent is None:
        return guarantee_fields(plan)
    promised = promise_of(house, run)
    counted = house.ledger.filter(house.project.budget.name).epsilon_of(promised.event)
    together = {"epsilon": promised.epsilon, "accountant": promised.accountant, "filter_epsilon": counted}
    stated = next(e.fields["guarantee"] for e in reversed(house.log.select(Predicate.TRAINED)) if e.fields["run"] == parent.run)
    return guarantee_fields(plan) | together | {"continues": {"run": parent.run, "guarantee": dict(stated)}}
