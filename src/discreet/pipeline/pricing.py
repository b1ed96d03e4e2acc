"""Line 5 and what it costs: calibration against the budget as it stands, before anything is spent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from discreet import corpus, ledger, model
from discreet.config import PrivacySection
from discreet.dp import accounting, mechanism
from discreet.dp.combine import Combine
from discreet.errors import BudgetExhausted, NotFound, PlanInvalid
from discreet.governance.access import Action, current_user
from discreet.ledger import Budget, CarryOver, Period
from discreet.model import Base, PublicText
from discreet.pipeline.admission import ingest
from discreet.pipeline.house import House, Observer, fact, for_log
from discreet.pipeline.weights import load_base, setup_of
from discreet.record import Basis, Sensitivity, Snapshot
from discreet.train import loop, optimizers
from discreet.train import search as searching
from discreet.train.step import tokenize

NOTHING_LEFT = 1e-3
"""Epsilon below which a budget is used up."""


@final
@dataclass(frozen=True, kw_only=True)
class Price:
    """What a run would cost, before anything is spent."""

    plan: mechanism.Plan
    budget: Mapping[str, Any]
    admitted: bool
    signal_to_noise: float
    tokens: int
    seconds: float
    parameters: int

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_json(),
            "guarantee": guarantee_fields(self.plan),
            "budget": dict(self.budget),
            "admitted": self.admitted,
            "signal_to_noise": self.signal_to_noise,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 1),
            "parameters": self.parameters,
            "advice": self.advice,
        }

    def lines(self) -> list[str]:
        plan, promised = self.plan, self.plan.guarantee
        return [
            f"unit               one {plan.unit}: everything they contributed, {plan.cap} document(s) a step",
            f"epsilon            {promised.epsilon:.3f} by PLD, {promised.epsilon_rdp or math.inf:.3f} by RDP as the budget counts, delta {promised.delta:.2g}",
            f"mechanism          {plan.steps} steps, {plan.sampling.value.replace('_', ' ')} sampling, probability {plan.sampling_probability:.4f}, noise multiplier {plan.noise_multiplier:.4f}, clip norm {plan.clip_norm:g}",
            f"noise              each step's mean gradient is hidden in noise of norm {self.noise_norm:.3f}; a full batch of aligned gradients has norm {plan.clip_norm:g}",
            f"signal to noise    at most {self.signal_to_noise:.2f} a step over {self.parameters:,} trainable parameters; below 0.01 expect little",
            f"work               about {self.tokens:,} tokens, {self.seconds / 60:.1f} minutes",
            f"budget             {self.budget['name']}: epsilon {self.budget['remaining']:.3f} of {self.budget['epsilon']:g} left; this run "
            + ("is admitted" if self.admitted else "is REFUSED"),
            *self.advice,
        ]

    @property
    def advice(self) -> list[str]:
        """What to change when the price does not please."""
        said = ["Choosing unit and epsilon: docs/choosing-unit-and-epsilon.md."]
        if not self.admitted:
            said.append("The budget does not admit this plan: take fewer steps, a smaller batch or epsilon, or wait for another population.")
            said.append(
                "With [privacy] target = 'pld' the noise meets a PLD epsilon, and the budget counts by RDP, which asks for more: target = 'budget' fits it."
            )
        if self.plan.guarantee.epsilon > 10:
            said.append("Above epsilon 10 the promise says little about one person; a larger population or fewer steps lower it at the same noise.")
        if self.signal_to_noise < 0.05:
            said.append("The noise drowns the signal: train fewer parameters (a lower lora_rank), or enlarge expected_batch.")
        return said

    @property
    def noise_norm(self) -> float:
        """Expected L2 norm of the noise on the mean gradient."""
        return self.plan.noise_multiplier * self.plan.clip_norm * math.sqrt(self.parameters) / self.plan.expected_batch


def price(house: House, observer: Observer) -> Price:
    """Calibrates the run against the budget as it stands and says what it would cost. Spends nothing, opens no budget.

    Raises:
        PlanInvalid: when [privacy] breaks a rule of the mathematics (delta >= 1/population, a target out of reach).
        BudgetExhausted: when no noise fits into what is left of the budget.
    """
    house.access.require(Action.RUN, who=current_user())
    frozen = ingest(house, observer)
    plan = calibrate(house, frozen.snapshot)
    spent_so_far, budget = filter_of(house, plan.delta, frozen.snapshot)
    base = load_base(house, frozen.public, observer)
    parameters = sum(p.numel() for p in model.trained_parameters(model.attach(base, house.project.model)).values())
    tokens = _mean_tokens(house, base, frozen.snapshot) * plan.expected_batch * plan.cap * plan.steps * (plan.search.mean if plan.search else 1)
    return Price(
        plan=plan,
        budget=budget,
        admitted=plan.admitted_by(spent_so_far),
        signal_to_noise=plan.expected_batch / (plan.noise_multiplier * math.sqrt(parameters)),
        tokens=round(tokens),
        seconds=_seconds_a_token(house, base) * tokens,
        parameters=parameters,
    )


def _mean_tokens(house: House, base: Base, snapshot: Snapshot) -> float:
    """Mean length of a sample of the frozen documents: for the operator, never in a public document."""
    positions = [positions[0] for positions in snapshot.units.reveal().values()][:200]
    lengths = [len(ids) for ids in tokenize(corpus.texts(snapshot, positions, house.keyring), base, max_tokens=house.project.model.max_tokens)]
    return sum(lengths) / len(lengths)


def _seconds_a_token(house: House, base: Base) -> float:
    """Times two steps of the same work on a public sentence."""
    text = PublicText.of(["The ward was quiet and the night was long. " * 4] * 16, sensitivity=Sensitivity.PUBLIC, basis=Basis.GENERATED)
    setup = setup_of(house, base, held_out=PublicText(text.texts[:1]), evaluations=1)
    reports: list[loop.StepReport] = []
    loop.fit(text, setup=setup, steps=2, batch=8, order=house.keyring.purpose("timing").stream("order"), on_step=reports.append)
    return 1 / reports[-1].tokens_per_second


def calibrate(house: House, snapshot: Snapshot) -> mechanism.Plan:
    """Line 5. The population is a public figure that [privacy] names: the exact count is private, and everything below would give it away."""
    privacy = house.project.privacy
    if privacy.population is None:
        remedy = "Name a public figure, such as the registered number of patients and the canaries; the exact count would leak through the sampling probability."
        raise PlanInvalid("[privacy] population: a public estimate of the number of units", remedy=remedy)
    population = privacy.population
    delta = privacy.delta or 1 / (2 * population)
    budget = filter_of(house, delta, snapshot)[0] if privacy.target == "budget" else None
    if budget is not None and budget.remaining_epsilon() < NOTHING_LEFT:
        raise _exhausted(house, admitted=0.0)
    try:
        plan = mechanism.calibrate(
            epsilon=privacy.epsilon,
            delta=delta,
            population=population,
            expected_batch=privacy.expected_batch,
            steps=privacy.steps,
            clip_norm=privacy.clip_norm,
            unit=privacy.unit,
            cap=privacy.cap,
            combine=Combine(privacy.combine),
            budget=budget,
            allow_large_delta=privacy.allow_large_delta
            and for_log(house, privacy.allow_large_delta),  # it stands in the plan, and so in tables and answers
            sampling=mechanism.Sampling(privacy.sampling),
            batch_limit=privacy.batch_limit,
            bands=privacy.bands or 0,
            adaptive=_adaptive(privacy),
            search=searching.declared(house.project.search),
        )
    except ValueError as error:
        raise PlanInvalid.of(error, remedy="See [privacy] in discreet.toml and docs/choosing-unit-and-epsilon.md.") from None
    for chosen in searching.candidates(house.project.search):
        optimizers.check(searching.settings(house.project.train, chosen), plan)
    if plan.delta >= 1 / snapshot.num_units and not plan.allow_large_delta:
        raise PlanInvalid("delta below one over the units really there", value=plan.delta, remedy="Lower [privacy] population or delta.")
    admitted = plan.guarantee.epsilon_rdp or plan.filter_epsilon or 0.0  # what only PLD knows is charged as the filter says
    if budget is not None and admitted < min(privacy.epsilon, budget.epsilon) / 2:
        raise _exhausted(house, admitted=admitted)
    return plan


def _exhausted(house: House, *, admitted: float) -> BudgetExhausted:
    section = house.project.budget
    remedy = "Nothing spent comes back. Set [privacy] epsilon to what it admits, open a budget for other people, or have two people raise this one (`discreet budget raise`)."
    remedy += " Its next period unlocks more." if section.periods else ""
    value = f"it admits a run of epsilon {admitted:.3g}"
    return BudgetExhausted(f"room for epsilon {house.project.privacy.epsilon:g}, or half of it, in budget {section.name}", value=value, remedy=remedy)


def plan_of(house: House, run: str) -> mechanism.Plan:
    """Returns the plan that was fixed when a run was first reserved.

    Raises:
        NotFound: when no such run was reserved.
    """
    known = fact(house, f"plan/{run}")
    if known is None:
        raise NotFound("the plan of a run that was reserved", value=run)
    return mechanism.plan_from_json(known)


def _adaptive(privacy: PrivacySection) -> mechanism.Adaptive | None:
    if privacy.clip_quantile is None:
        return None
    votes_noise = privacy.votes_noise or privacy.expected_batch / 20  # Andrew et al. 2021, section 3.1
    return mechanism.Adaptive(quantile=privacy.clip_quantile, rate=privacy.clip_rate, votes_multiplier=votes_noise)


def filter_of(house: House, delta: float, snapshot: Snapshot) -> tuple[accounting.RdpFilter, Mapping[str, Any]]:
    """Returns the budget as it stands for the people of a snapshot, or as it would be opened; and its fields."""
    section = house.project.budget
    try:
        return house.ledger.filter(section.name, snapshot), budget_fields(house.ledger.show(section.name))
    except NotFound:
        fresh = ledger.unopened(epsilon=section.epsilon, delta=section.delta or delta, unit=house.project.privacy.unit, period=_period(house))
        return fresh, {
            "name": section.name,
            "epsilon": section.epsilon,
            "delta": fresh.delta,
            "unit": house.project.privacy.unit,
            "spent": 0.0,
            "remaining": section.epsilon,
        }


def budget_fields(budget: Budget) -> dict[str, Any]:
    """Returns a budget as JSON values."""
    return {
        "name": budget.name,
        "epsilon": budget.epsilon,
        "delta": budget.delta,
        "unit": budget.unit,
        "spent": budget.epsilon - budget.remaining_epsilon,
        "remaining": budget.remaining_epsilon,
        "reservations": budget.num_reservations,
        "query_delta": budget.query_delta,
        "period": None if budget.period is None else budget.period.to_json(),
        "unlocked": budget.unlocked,
        "alerts": list(budget.alerts),
    }


def guarantee_fields(plan: mechanism.Plan) -> dict[str, Any]:
    """Returns the public statement of a plan: what the report prints and the release signs."""
    return {
        "epsilon": plan.guarantee.epsilon,
        "delta": plan.delta,
        "unit": plan.unit,
        "relation": plan.relation,
        "accountant": plan.guarantee.accountant,
        "filter_epsilon": plan.filter_epsilon,
        "noise_multiplier": plan.noise_multiplier,
        "sampling_probability": plan.sampling_probability,
        "sampler": plan.sampling.value,
        "steps": plan.steps,
        "clip_norm": plan.clip_norm,
        "expected_batch": plan.expected_batch,
        "population": plan.population,
        "cap": plan.cap,
        **plan.extras(),
    }


def open_project_budget(house: House, *, delta: float) -> None:
    """Opens the budget of discreet.toml where it is not open yet. One that is open stays as it is, also when it was raised since; what is charged to it is checked there.

    Raises:
        AccessDenied: when it is not open, and whoever asks may not open it.
    """
    section = house.project.budget
    if section.name not in {held.name for held in house.ledger.budgets()}:
        house.access.require(Action.OPEN_BUDGET, who=current_user())
        unit = house.project.privacy.unit
        house.ledger.open(section.name, epsilon=section.epsilon, delta=section.delta or delta, unit=unit, period=_period(house))


def _period(house: House) -> Period | None:
    section = house.project.budget
    return Period(days=section.period_days, count=section.periods, carry_over=CarryOver(section.carry_over)) if section.periods else None


def refuse_unaffordable(house: House, plan: mechanism.Plan, snapshot: Snapshot) -> None:
    """A statement and a filter are two accountants (PITFALLS 43): a plan made for a PLD epsilon may cost more than the budget has."""
    budget, told = filter_of(house, plan.delta, snapshot)
    if not plan.admitted_by(budget):
        raise BudgetExhausted(
            f"a plan that budget {told['name']} admits",
            value=f"it would count {budget.epsilon_of(plan.event):.3g} by RDP for the plan's {plan.guarantee.epsilon:.3g} by PLD; {told['remaining']:.3g} is left",
            remedy="Nothing was spent. [privacy] target = 'budget' finds the smallest noise that the budget admits; `discreet plan` shows both figures.",
        )
