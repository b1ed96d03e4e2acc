"""THE STORY: from collected text to a served model, and back to erasure. Each stage is one call.

    ingest ──> train ──> audit ──> release ──> serve
      |  register, admit, de-identify, freeze
      |         |  calibrate, reserve, spend, train
      |         |          |  attack with canaries, controls
      '─────────┴──────────┴──────────┴─────────> statements in the log, in the transaction that stores the result

A stage that finished leaves its result in the table `stages`; calling it again returns that result. A stage that was killed is repeated: what it had already
logged is recognised, what it had already spent is not spent again, and training continues from its sealed checkpoint with the same draws.

Does not cover: more than one machine (federated/), serving itself (serve/), the demo's corpus and its non-private control (demo.py).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

from sqlalchemy import Column, Connection, String, Table, Text, delete, insert, select

from discreet import config, corpus, model
from discreet.audit import bounds, extraction, membership
from discreet.audit import canaries as canary
from discreet.audit.canaries import Canaries
from discreet.config import ModelSection, Project, SourceSection, TrainSection, digest_of
from discreet.deid import policy as deid
from discreet.dp import accounting, mechanism
from discreet.errors import BudgetExhausted, ConfigInvalid, DigestMismatch, NotFound, NotReleased, PlanInvalid, RunInProgress, TrackRefused
from discreet.evidence.log import Log
from discreet.evidence.statement import JSON, Entry, Predicate, Statement
from discreet.governance import lineage
from discreet.governance.catalog import Catalog, subject_id
from discreet.governance.consent import Consent
from discreet.governance.erasure import Decision, Erasure
from discreet.keys import Keyring, open_master
from discreet.ledger import Budget, CloseReason, Ledger, Reservation
from discreet.model import Base, PublicText
from discreet.record import Basis, Deidentified, Digest, Release, Sensitivity, Snapshot, SubjectId
from discreet.serve import gateway
from discreet.store import Store, metadata, write_atomically
from discreet.train import loop
from discreet.train.checkpoint import PURPOSE, Checkpoints, CheckpointStore
from discreet.train.step import tokenize

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from starlette.applications import Starlette
    from torch import nn

STAGES = ("ingest", "train", "audit", "release")
BATCH = 512
CANARY_SOURCE = "audit-canaries-{count}"
CONTROL_BATCH = 16
RECITED = 40
SERVED_BATCH = 100
"""Planted canaries that both models are asked to recite."""

_stages = Table(
    "stages",
    metadata,
    Column("name", String(32), primary_key=True),
    Column("config", String(71), primary_key=True),
    Column("result", Text, nullable=False),
)


class Observer(Protocol):
    """Hears what happens and may show it to the operator: counts and speeds that stay inside, never a text or an identifier."""

    def stage(self, name: str) -> None: ...

    def note(self, line: str) -> None: ...

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None: ...


@final
@dataclass(frozen=True, kw_only=True)
class House:
    """An open project: its configuration, its database and the parts that work on it."""

    project: Project
    store: Store
    keyring: Keyring
    log: Log
    catalog: Catalog
    consent: Consent
    ledger: Ledger

    @property
    def snapshots(self) -> Path:
        return self.project.state / "snapshots"

    @property
    def releases(self) -> Path:
        return self.project.state / "releases"


@contextmanager
def open_house(folder: Path, *, exclusive: bool = True) -> Iterator[House]:
    """Opens the project in `folder`.

    Args:
        folder: holds discreet.toml.
        exclusive: refuse when another command is at work on this project; the gateway, which only reads, does without.

    Raises:
        RunInProgress: when another command holds the project.
        ConfigInvalid, SourceMissing, KeyUnavailable: when the project cannot be opened.
    """
    project = config.load(folder)
    project.state.mkdir(mode=0o700, exist_ok=True)
    with _lock(project.state / "lock", exclusive=exclusive):
        store = Store(project.database_url())
        try:
            keyring = Keyring(store, open_master(project.master_location()))
            log = Log(store, keyring, f"discreet.{project.project.name}")
            catalog, consent = Catalog(store, keyring, log), Consent(store, keyring, log)
            yield House(project=project, store=store, keyring=keyring, log=log, catalog=catalog, consent=consent, ledger=Ledger(store, keyring, log))
        finally:
            store.close()


@contextmanager
def _lock(path: Path, *, exclusive: bool) -> Iterator[None]:
    with path.open("w") as file:
        if exclusive:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunInProgress("one command at a time on one project", remedy="Wait for the other command to end.") from None
        yield


# Lines 1 to 4: what it is, whether we may use it, what is left of the person, which corpus


@final
@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What ingest gives: the frozen snapshot of the DP track, public text for the other track, held-out text, and the planted canaries."""

    snapshot: Snapshot
    public: PublicText | None
    held_out: PublicText
    canaries: Canaries
    refused: int


def ingest(house: House, observer: Observer) -> Corpus:
    """Registers, admits, de-identifies and freezes every source of the project. Idempotent: what is logged already is not logged again.

    Raises:
        SourceMissing, SourceChanged, SourceEmpty, SourceNotText, RecordInvalid, RecordConflict: when a source breaks a rule; nothing is frozen.
        Forgotten: when a subject was erased meanwhile.
    """
    observer.stage("ingest")
    canaries = plant_canaries(house)
    documents: dict[str, list[Deidentified]] = {"train": [], "public": [], "evaluation": []}
    refused = 0
    for section in (*house.project.source, _canary_section(house, canaries)):
        kept, num_refused = _source_documents(house, section, observer)
        documents["train" if section.role == "canary" else section.role] += kept
        refused += num_refused
    if not documents["evaluation"]:
        raise ConfigInvalid("a [[source]] with role = 'evaluation': public held-out text", remedy="`discreet init DIR` shows one.")
    snapshot = _freeze(house, "train", documents["train"])
    public = _public_text(house, _freeze(house, "public", documents["public"], track=corpus.Track.PUBLIC)) if documents["public"] else None
    held_out = _public_text(house, _freeze(house, "evaluation", documents["evaluation"], track=corpus.Track.PUBLIC))
    observer.note(f"frozen {snapshot.root}; {refused} records refused")
    return Corpus(snapshot=snapshot, public=public, held_out=held_out, canaries=canaries, refused=refused)


def _source_documents(house: House, section: SourceSection, observer: Observer) -> tuple[list[Deidentified], int]:
    """Lines 1 to 3 for one source."""
    source = house.catalog.register(house.project, section)
    house.consent.load_opt_outs(source)
    admitted, refused = house.consent.admit_all(house.catalog.collect(source), house.project.purpose)
    keys = house.keyring.subjects([each.record.subject for each in admitted])
    policy = deid.BUILTIN[house.project.deid.policy]
    kept = []
    for number, each in enumerate(admitted, start=1):
        kept.append(deid.deidentify(each, policy, keys[each.record.subject]))
        if number % 100 == 0 or number == len(admitted):
            observer.progress(f"de-identify {section.name}", number, len(admitted), {})
    _log_deidentified(house, section.name, kept, policy.digest)
    return kept, len(refused)


def _log_deidentified(house: House, source: str, documents: Sequence[Deidentified], policy: Digest) -> None:
    with house.store.transaction() as tx:
        told = {digest for entry in house.log.select(Predicate.DEIDENTIFIED, tx=tx) if entry.fields["policy"] == policy for digest in entry.subjects}
        new = [document for document in documents if document.digest not in told]
        for batch in lineage.chunks(new, BATCH):
            counts: Counter[str] = Counter()
            for document in batch:
                counts.update(document.counts)
            fields: dict[str, JSON] = {"source": source, "policy": policy, "counts": dict(sorted(counts.items()))}
            house.log.append(tx, Statement(predicate=Predicate.DEIDENTIFIED, subjects=tuple(d.digest for d in batch), fields=fields))


def _freeze(house: House, name: str, documents: Sequence[Deidentified], *, track: corpus.Track = corpus.Track.DP) -> Snapshot:
    """Line 4, and the edges from the records to their snapshot."""
    snapshot = corpus.freeze(documents, name=name, keyring=house.keyring, log=house.log, store=house.store, folder=house.snapshots, track=track)
    records = corpus.digests(snapshot, house.keyring)
    with house.store.transaction() as tx:
        lineage.derive(tx, lineage.Artifact(digest=snapshot.root, kind=lineage.Kind.SNAPSHOT), parents=records)
    return snapshot


def plant_canaries(house: House) -> Canaries:
    """Draws the canaries of the audit, the same at every call, and logs the commitment to texts and coins before anything is frozen."""
    key = house.keyring.purpose("canaries")
    canaries = canary.plant(house.project.audit.canaries, key=key.stream("plant"))
    committed = canary.commitment(canaries, salt=key.mac(b"commitment"), design=_design(house))
    with house.store.transaction() as tx:
        if committed not in {entry.fields["commitment"] for entry in house.log.select(Predicate.COMMITTED, tx=tx)}:
            fields: dict[str, JSON] = {"commitment": committed, "canaries": len(canaries), "kind": "canaries and reading of the audit"}
            house.log.append(tx, Statement(predicate=Predicate.COMMITTED, subjects=(committed,), fields=fields))
    return canaries


def _design(house: House) -> canary.Design:
    return canary.Design(false_positive_rate=house.project.audit.false_positive_rate, level=house.project.audit.level)


def _canary_section(house: House, canaries: Canaries) -> SourceSection:
    """The reserved source of the canaries: generated text, one unit each, through the same door as everything else."""
    path = house.project.state / "canaries.jsonl"
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in canaries.rows()).encode())
    return SourceSection(
        name=CANARY_SOURCE.format(count=len(canaries)),
        path=str(path.relative_to(house.project.root)),
        unit="unit",
        owner="audit",
        licence="generated",
        sensitivity=Sensitivity.INTERNAL,
        purposes=(house.project.project.purpose,),
        basis=Basis.GENERATED,
        role="canary",
    )


# Lines 5 to 7: what it costs, whether we can afford it, training


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
            f"mechanism          {plan.steps} Poisson steps, probability {plan.sampling_probability:.4f}, noise multiplier {plan.noise_multiplier:.4f}, clip norm {plan.clip_norm:g}",
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
            said.append("With [privacy] target = 'pld' the noise meets a PLD epsilon, and the budget counts by RDP, which asks for more: target = 'budget' fits it.")
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
    frozen = ingest(house, observer)
    plan = _calibrate(house, frozen.snapshot)
    spent_so_far, budget = _filter(house, plan.delta, frozen.snapshot)
    base = load_base(house, frozen.public, observer)
    parameters = sum(p.numel() for p in model.trained_parameters(model.attach(base, house.project.model)).values())
    tokens = _mean_tokens(house, base, frozen.snapshot) * plan.expected_batch * plan.cap * plan.steps
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
    setup = _setup(house, base, held_out=PublicText(text.texts[:1]), evaluations=1)
    reports: list[loop.StepReport] = []
    loop.fit(text, setup=setup, steps=2, batch=8, order=house.keyring.purpose("timing").stream("order"), on_step=reports.append)
    return 1 / reports[-1].tokens_per_second


def _calibrate(house: House, snapshot: Snapshot) -> mechanism.Plan:
    """Line 5. The population is a public figure that [privacy] names: the exact count is private, and everything below would give it away."""
    privacy = house.project.privacy
    if privacy.population is None:
        remedy = "Name a public figure, such as the registered number of patients and the canaries; the exact count would leak through the sampling probability."
        raise PlanInvalid("[privacy] population: a public estimate of the number of units", remedy=remedy)
    population = privacy.population
    delta = privacy.delta or 1 / (2 * population)
    budget = _filter(house, delta, snapshot)[0] if privacy.target == "budget" else None
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
            budget=budget,
            allow_large_delta=privacy.allow_large_delta,
        )
    except ValueError as error:
        raise PlanInvalid("[privacy] to have a solution", value=str(error), remedy="See docs/choosing-unit-and-epsilon.md.") from None
    if plan.delta >= 1 / snapshot.num_units and not plan.allow_large_delta:
        raise PlanInvalid("delta below one over the units really there", value=plan.delta, remedy="Lower [privacy] population or delta.")
    left = budget.remaining_epsilon() if budget else privacy.epsilon
    if left < min(privacy.epsilon, house.project.budget.epsilon) / 2:
        remedy = "A budget is never refilled. Set [privacy] epsilon to what is left, or open a budget for other people."
        raise BudgetExhausted(f"epsilon {privacy.epsilon:g} in budget {house.project.budget.name}", value=f"{left:.3g} left", remedy=remedy)
    return plan


def _filter(house: House, delta: float, snapshot: Snapshot) -> tuple[accounting.RdpFilter, Mapping[str, Any]]:
    """The budget as it stands for the people of a snapshot, or as it would be opened."""
    section = house.project.budget
    try:
        return house.ledger.filter(section.name, snapshot), budget_fields(house.ledger.show(section.name))
    except NotFound:
        fresh = accounting.RdpFilter.open(epsilon=section.epsilon, delta=section.delta or delta)
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
    }


def train(house: House, observer: Observer) -> dict[str, Any]:
    """Calibrates, reserves, spends and trains (lines 5 to 7). Killed and called again, it continues the same run with the same draws and spends nothing more.

    Raises:
        PlanInvalid: when [privacy] has no solution.
        BudgetExhausted: when the budget does not admit the run. Nothing was spent.
        NothingLearned: when no trainable parameter changed.
    """
    done = _finished(house, "train")
    if done is not None:
        return _close_run(house, done)
    frozen = ingest(house, observer)
    observer.stage("train")
    run, plan, reservation = _reserve(house, frozen.snapshot)
    observer.note(
        f"{plan.steps} steps at noise multiplier {plan.noise_multiplier:.3f}: epsilon {plan.guarantee.epsilon:.2f} (PLD), delta {plan.delta:.2g}"
    )
    base = load_base(house, frozen.public, observer)
    folder = house.project.state / "runs" / run
    start = _public_track(house, base, frozen, folder, observer)
    began = time.monotonic()
    trained = loop.train(
        plan,
        frozen.snapshot,
        house.ledger.spend(reservation),
        texts=_all_texts(house, frozen.snapshot),
        setup=_setup(house, base, held_out=frozen.held_out, start=start),
        run_key=house.keyring.run(run),
        checkpoints=_checkpoints(house, run),
        adapter=folder / "adapter",
        on_step=_shown(observer, "train"),
    )
    moved, trainable = model.moved(base, house.project.model, start=start, adapter=trained.adapter)
    result = {
        "run": run,
        "plan": plan.digest,
        "snapshot": frozen.snapshot.root,
        "base": base.digest,
        "base_path": str(base.path),
        "adapter": trained.adapter_digest,
        "steps": trained.steps,
        "parameters": trainable,
        "moved": moved,
        "seconds": round(time.monotonic() - began, 1),
        "guarantee": guarantee_fields(plan) | {"privacy_digest": house.project.privacy_digest()},
        "curve": _rounded(trained.curve),
    }
    _record_training(house, result, reservation)
    return _close_run(house, result)


def _public_track(house: House, base: Base, frozen: Corpus, folder: Path, observer: Observer) -> Path | None:
    """Trains the non-private track on public text first, when [train] asks for it; the DP track starts from its adapter."""
    steps, adapter = house.project.train.public_steps, folder / "public-adapter"
    if steps == 0:
        return None
    if frozen.public is None:
        raise ConfigInvalid("a [[source]] with role = 'public' for [train] public_steps > 0")
    run = f"public-{folder.name}"
    if run not in {entry.fields["run"] for entry in house.log.select(Predicate.TRAINED)}:
        checkpoints = Checkpoints(folder=folder / "public", key=house.keyring.purpose(PURPOSE), run=folder.name)
        fitted = loop.fit(
            frozen.public,
            setup=_setup(house, base, held_out=frozen.held_out),
            steps=steps,
            batch=house.project.privacy.expected_batch,
            order=house.keyring.purpose("public order").stream(folder.name),
            checkpoints=checkpoints,
            on_step=_shown(observer, "public track"),
        )
        digest = model.save_adapter(fitted.module, adapter)
        fields = {
            "run": run,
            "track": "public",
            "base": base.digest,
            "adapter": digest,
            "plan": None,
            "guarantee": None,
            "steps": steps,
        }
        with house.store.transaction() as tx:
            house.log.append(tx, Statement(predicate=Predicate.TRAINED, subjects=(digest,), fields=fields | {"public_loss": _rounded(fitted.curve)}))
        checkpoints.destroy()
    return adapter


def _all_texts(house: House, snapshot: Snapshot) -> list[str]:
    """The document at each position of a snapshot."""
    return corpus.texts(snapshot, range(sum(len(positions) for positions in snapshot.units.reveal().values())), house.keyring)


def _public_text(house: House, snapshot: Snapshot) -> PublicText:
    return PublicText.of(_all_texts(house, snapshot), sensitivity=snapshot.sensitivity, basis=Basis.CONSENT)  # so that only its sensitivity admits it


def _setup(house: House, base: Base, *, held_out: PublicText, start: Path | None = None, evaluations: int = 2) -> loop.Setup:
    project = house.project
    return loop.Setup(base=base, model=project.model, train=project.train, run=project.run, held_out=held_out, start=start, evaluations=evaluations)


def load_base(house: House, public: PublicText | None, observer: Observer) -> Base:
    """Opens the project's base model; the tiny one is built on the project's public text, and found again by the path that training left.

    Raises:
        NotFound, ModelUnsafe, DigestMismatch, MissingExtra: when it cannot be opened.
    """
    name, cache = house.project.model.base, Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "discreet" / "models"
    if name != model.TINY:
        return model.load_base(name if name == model.SMOLLM2 else str(house.project.path(name)), cache=cache, progress=observer.note)
    if public is None:
        return model.load_base(_needed(house, "train")["base_path"], cache=cache)
    return model.build_tiny(public, cache=house.project.state / "models", steps=50, batch=16, learning_rate=1e-2, progress=observer.note)


def _shown(observer: Observer, task: str) -> Callable[[loop.StepReport], None]:
    def show(step: loop.StepReport) -> None:
        figures = {"loss": f"{step.loss:.3f}"} | ({} if step.epsilon is None else {"epsilon": f"{step.epsilon:.2f}"})
        observer.progress(task, step.step, step.steps, figures | {"tok/s": f"{step.tokens_per_second:.0f}", "padding": f"{step.padding:.1%}"})

    return show


def _rounded(curve: loop.Curve) -> list[list[float]]:
    return [[step, round(loss, 4)] for step, loss in curve]


def _reserve(house: House, snapshot: Snapshot) -> tuple[str, mechanism.Plan, Reservation]:
    """Lines 5 and 6. A run is its configuration on its snapshot; its plan is fixed when it is first reserved."""
    run = "run-" + digest_of([_run_config(house), snapshot.root]).removeprefix("sha256:")[:12]
    _close_abandoned(house, run)
    known = _result(house, f"plan/{run}", "") if house.ledger.has_run(run) else None
    plan = mechanism.plan_from_json(known) if known else _calibrate(house, snapshot)
    house.ledger.open(house.project.budget.name, epsilon=house.project.budget.epsilon, delta=house.project.budget.delta or plan.delta, unit=plan.unit)
    if known is None:
        with house.store.transaction() as tx:
            tx.execute(delete(_stages).where(_stages.c.name == f"plan/{run}"))
            _record(tx, f"plan/{run}", "", plan.to_json())
            if plan.allow_large_delta:
                fields: dict[str, JSON] = {"rule": "delta < 1 / population", "value": plan.delta, "reason": plan.allow_large_delta, "run": run}
                house.log.append(tx, Statement(predicate=Predicate.OVERRIDDEN, subjects=(plan.digest,), fields=fields))
    return run, plan, house.ledger.reserve(house.project.budget.name, plan, snapshot, run)


def _record_training(house: House, result: Mapping[str, Any], reservation: Reservation) -> None:
    """Logs the trained model. The snapshot's root stays inside: the statement is public (PITFALLS 41)."""
    fields = {name: result[name] for name in ("run", "base", "adapter", "plan", "guarantee", "steps", "parameters")}
    fields |= {"track": "dp", "reservation": reservation.id, "public_loss": result["curve"]}
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.TRAINED, subjects=(Digest(result["adapter"]),), fields=fields))
        artifact = lineage.Artifact(digest=Digest(result["adapter"]), kind=lineage.Kind.MODEL, protects=house.project.privacy.unit)
        lineage.derive(tx, artifact, parents=[Digest(result["snapshot"])])
        _record(tx, "train", _run_config(house), result)


def _close_run(house: House, result: Mapping[str, Any]) -> dict[str, Any]:
    """Closes the reservation and destroys the run's key, so that nobody regenerates its noise. Idempotent: a call that was killed is finished by the next."""
    run = result["run"]
    house.ledger.close(house.ledger.of_run(run), CloseReason.COMPLETED, executed_steps=result["steps"])
    with house.store.transaction() as tx:
        told = run in {entry.fields["run"] for entry in house.log.select(Predicate.KEY_DESTROYED, tx=tx)}
    if not told:
        house.keyring.close_run(run)
        fields: dict[str, JSON] = {"run": run, "kind": "noise and sampling"}
        with house.store.transaction() as tx:
            house.log.append(tx, Statement(predicate=Predicate.KEY_DESTROYED, subjects=(Digest(result["adapter"]),), fields=fields))
    _checkpoints(house, run).destroy()
    return dict(result)


def _close_abandoned(house: House, current: str) -> None:
    """Closes runs that were killed and never resumed, because configuration or corpus changed: what they spent stays spent, their keys are destroyed."""
    for reservation in house.ledger.open_runs():
        if reservation.run != current:
            _abandon(house, reservation)


def _abandon(house: House, reservation: Reservation) -> None:
    house.ledger.close(reservation, CloseReason.CRASH)
    house.keyring.close_run(reservation.run)
    fields: dict[str, JSON] = {"run": reservation.run, "kind": "noise and sampling", "reason": "abandoned"}
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.KEY_DESTROYED, subjects=(reservation.plan,), fields=fields))
    _checkpoints(house, reservation.run).destroy()


def _checkpoints(house: House, run: str) -> Checkpoints:
    return Checkpoints.of(house.project.state / "runs", run, house.keyring)


# Line 8: does it hold


def audit(house: House, observer: Observer) -> dict[str, Any]:
    """Attacks the trained model with its canaries, beside a control that must be caught; logs the verdict.

    The control and every reference see canaries and public text only, never a sensitive record; the control lives in memory and is gone when this returns.

    Raises:
        NotFound: when nothing has been trained yet.
    """
    trained = _needed(house, "train")
    done = _finished(house, "audit")
    if done is not None:
        return done
    observer.stage("audit")
    canaries, plan = plant_canaries(house), mechanism.plan_from_json(_needed(house, f"plan/{trained['run']}"))
    base = load_base(house, None, observer)
    adapter = house.project.state / "runs" / trained["run"] / "adapter"
    if (base.digest, model.adapter_digest(adapter)) != (trained["base"], trained["adapter"]):
        raise DigestMismatch(
            "the base model and the adapter that were trained", remedy="Restore the files; another model cannot be audited in their place."
        )
    private = model.load_adapter(base, adapter)
    untouched = _log_likelihoods(house, base.module, base, canaries)
    scored = _log_likelihoods(house, private, base, canaries) - untouched
    observer.note("scored the private model; training the control on canaries alone")
    control = _control(house, base, canaries, observer)
    controlled = _log_likelihoods(house, control, base, canaries) - untouched
    found = bounds.verdict(
        scored,
        canaries.included,
        control=controlled,
        negatives={
            "bag of words": membership.blind(canaries.texts, canaries.included),
            "untouched model": bounds.area_under_curve(untouched, canaries.included),
        },
        epsilon=plan.guarantee.epsilon,
        delta=plan.delta,
        trade_off=accounting.trade_off(plan.event),
        fpr=house.project.audit.false_positive_rate,
        level=house.project.audit.level,
        mechanism=[
            bounds.mechanism_layer(
                accounted_steps=plan.steps, executed_steps=trained["steps"], trainable=trained["parameters"], moved=trained["moved"]
            )
        ],
    )
    observer.note(f"verdict {found.verdict}; asking both models to recite")
    result = found.to_json() | {"adapter": trained["adapter"], "run": trained["run"], "canaries": len(canaries)}
    result["recitation"] = _recitation(house, base, private, control, canaries)
    if found.verdict is not bounds.Verdict.PASS:
        result["recitation"]["example"]["private"] = "(not shown: the audit did not pass)"
    del control
    with house.store.transaction() as tx:
        subject = (Digest(trained["adapter"]),)
        house.log.append(tx, Statement(predicate=Predicate.AUDITED, subjects=subject, fields=_audit_fields(result)))
        fields = {"control": f"control of {trained['run']}", "run": trained["run"], "kind": "non-private, canaries only", "reason": "audit done"}
        house.log.append(tx, Statement(predicate=Predicate.CONTROL_DESTROYED, subjects=subject, fields=fields))
        _record(tx, "audit", _config_of(house, "audit"), result)
    return result


def _log_likelihoods(house: House, module: nn.Module, base: Base, canaries: Canaries) -> NDArray[np.float64]:
    return membership.log_likelihoods(module, base.tokenizer, canaries.texts, token_budget=house.project.run.token_budget)


def _recitation(house: House, base: Base, private: nn.Module, control: nn.Module, canaries: Canaries) -> dict[str, Any]:
    """Asks both models to complete planted canaries: the same prompts, side by side. Canaries are generated text, so they may be shown."""
    planted = [each for each in canaries if each.included][:RECITED]
    budget = house.project.run.token_budget
    of_control = extraction.recite(control, base.tokenizer, planted, token_budget=budget)
    of_private = extraction.recite(private, base.tokenizer, planted, token_budget=budget)
    shown = max(range(len(planted)), key=lambda row: of_control[row].matched_fraction)
    return {
        "tried": len(planted),
        "control": sum(each.exact for each in of_control),
        "private": sum(each.exact for each in of_private),
        "example": {"prompt": planted[shown].prefix, "control": of_control[shown].continuation, "private": of_private[shown].continuation},
    }


def _control(house: House, base: Base, canaries: Canaries, observer: Observer) -> nn.Module:
    """Trains the positive control without privacy on the planted canaries alone, all weights of the last blocks. It lives in memory only.

    It has more room to memorise than the private model, so that what the audit can see is not limited by what a small adapter can hold.
    """
    rules = house.project.audit
    planted = PublicText.of([each.text for each in canaries if each.included], sensitivity=Sensitivity.INTERNAL, basis=Basis.GENERATED)
    steps = rules.control_epochs * -(-len(planted.texts) // CONTROL_BATCH)
    setup = replace(
        _setup(house, base, held_out=PublicText(planted.texts[:1]), evaluations=1),
        model=ModelSection(train=model.top_blocks(base), max_tokens=house.project.model.max_tokens),
        train=TrainSection(learning_rate=rules.control_learning_rate),
    )
    order = house.keyring.purpose("control order").stream("order")
    return loop.fit(planted, setup=setup, steps=steps, batch=CONTROL_BATCH, order=order, on_step=_shown(observer, "control")).module


def _audit_fields(result: Mapping[str, Any]) -> dict[str, Any]:
    names = (
        "adapter",
        "run",
        "verdict",
        "epsilon_lower",
        "ceiling",
        "detectable",
        "detectable_mu",
        "claimed_epsilon",
        "claimed_delta",
        "level",
        "layers",
        "canaries",
        "recitation",
    )
    return {name: result[name] for name in names}


# Line 9: may it leave


def release(house: House, observer: Observer) -> dict[str, Any]:
    """Signs the model out when every gate holds, else logs why it is withheld.

    Raises:
        NotReleased: when a gate does not hold.
        NotFound: when the model has not been audited.
    """
    trained, audited = _needed(house, "train"), _needed(house, "audit")
    done = _finished(house, "release")
    if done is None:
        observer.stage("release")
        done = _decide(house, trained, audited)
    failed = [gate["gate"] for gate in done["gates"] if not gate["holds"]]
    if failed:
        shutil.rmtree(house.releases / done["name"], ignore_errors=True)
        raise NotReleased(
            "every gate of [release] to hold", value=", ".join(failed), remedy="The report says what was found. Nothing left the house."
        )
    _publish(house, done)
    return done


def _decide(house: House, trained: Mapping[str, Any], audited: Mapping[str, Any]) -> dict[str, Any]:
    gates = _gates(house, trained["guarantee"], audited)
    holds = all(gate["holds"] for gate in gates)
    common = {
        "name": f"{house.project.project.name}-{trained['run'].removeprefix('run-')}",
        "adapter": trained["adapter"],
        "gates": gates,
        "run": trained["run"],
    }
    fields = common | (
        {"base": trained["base"], "guarantee": trained["guarantee"], "purpose": house.project.purpose.name, "verdict": audited["verdict"]}
        if holds
        else {"reasons": [gate["gate"] for gate in gates if not gate["holds"]], "verdict": audited["verdict"]}
    )
    with house.store.transaction() as tx:
        kind = Predicate.RELEASED if holds else Predicate.WITHHELD
        house.log.append(tx, Statement(predicate=kind, subjects=(Digest(trained["adapter"]),), fields=fields))
        result = {"decision": "released" if holds else "withheld", **fields}
        _record(tx, "release", _config_of(house, "release"), result)
    return result


def _publish(house: House, released: Mapping[str, Any]) -> None:
    """Puts adapter and signed statement where the gateway looks, after the log has them. Idempotent."""
    folder = house.releases / released["name"]
    if (folder / gateway.STATEMENT_FILE).is_file():
        return
    shutil.copytree(house.project.state / "runs" / released["run"] / "adapter", folder / gateway.ADAPTER_FOLDER, dirs_exist_ok=True)
    entry = next(entry for entry in reversed(house.log.select(Predicate.RELEASED)) if entry.fields["name"] == released["name"])
    write_atomically(folder / gateway.STATEMENT_FILE, entry.envelope)


def _gates(house: House, guarantee: Mapping[str, Any], audited: Mapping[str, Any]) -> list[dict[str, Any]]:
    rules = house.project.release
    return [
        _gate("audit verdict", " or ".join(rules.verdicts), audited["verdict"], audited["verdict"] in rules.verdicts),
        _gate("epsilon (PLD)", f"<= {rules.max_epsilon:g}", guarantee["epsilon"], guarantee["epsilon"] <= rules.max_epsilon),
        _gate("certified lower bound", "<= epsilon", audited["epsilon_lower"], audited["epsilon_lower"] <= guarantee["epsilon"]),
    ]


def _gate(name: str, required: str, got: object, holds: bool) -> dict[str, Any]:
    return {"gate": name, "required": required, "got": got, "holds": holds}


def load_release(folder: Path, *, public_key: str) -> Release:
    """Reads a release back from its signed statement; the files are checked against it by whoever opens them.

    Raises:
        NotReleased: when there is no signed release in the folder.
        EvidenceInvalid: when the statement was not signed by this log.
    """
    path = folder / gateway.STATEMENT_FILE
    if not path.is_file():
        raise NotReleased("a signed release in this project", remedy="Run `discreet run`; a withheld model is not served.")
    return _release(folder, gateway.released_entry(path.read_bytes(), public_key=public_key))


def _release(folder: Path, entry: Entry) -> Release:
    fields = entry.fields
    return Release(
        name=fields["name"],
        path=folder,
        base=Digest(fields["base"]),
        adapter=Digest(fields["adapter"]),
        guarantee=fields["guarantee"],
        statement=entry.envelope,
    )


# Lines 10 and 11, and what is said about it all


def gateway_app(house: House, served: Served, *, api_key_hash: str) -> Starlette:
    """Returns the gateway's application for the verified release of this project (line 10).

    Raises:
        NotReleased, EvidenceInvalid, DigestMismatch: when there is no release, or it is not what was signed.
    """
    key = house.log.public_key()
    released = load_release(house.releases / released_name(house), public_key=key)
    base = load_base(house, None, Silent())
    serving = house.project.serve
    engine = gateway.open_engine(released, base, public_key=key, key=house.keyring.purpose("gateway"))
    return gateway.app(
        engine,
        model_name=released.name,
        adapter=released.adapter,
        key=house.keyring.purpose("gateway"),
        api_key_hash=api_key_hash,
        on_served=served.count,
        limits=gateway.Limits(max_request_bytes=serving.max_request_bytes, max_new_tokens=serving.max_new_tokens),
    )


@final
class Served:
    """Rolls served requests up into one statement for every hundred, and for the rest when the gateway stops: digests and counts by label, never text."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._requests = 0
        self._counts: Counter[str] = Counter()
        self._about: tuple[Digest, Digest] | None = None

    def count(self, adapter: Digest, policy: Digest, counts: Mapping[str, int]) -> None:
        """Counts one request."""
        if self._about not in (None, (adapter, policy)):
            self.write()
        self._about = adapter, policy
        self._requests += 1
        self._counts.update(counts)
        if self._requests >= SERVED_BATCH:
            self.write()

    def write(self) -> None:
        """Logs what was counted since the last statement."""
        if self._about is None:
            return
        adapter, policy = self._about
        fields: dict[str, JSON] = {"release": adapter, "requests": self._requests, "policy": policy, "counts": dict(sorted(self._counts.items()))}
        with self._house.store.transaction() as tx:
            self._house.log.append(tx, Statement(predicate=Predicate.SERVED, subjects=(adapter,), fields=fields))
        self._requests, self._about = 0, None
        self._counts.clear()


def subject_of(house: House, unit: str) -> SubjectId:
    """Returns the pseudonym of a person as the project's sources name them."""
    return subject_id(house.keyring, unit=house.project.privacy.unit, value=unit)


def erase(house: House, unit: str) -> dict[str, Any]:
    """Erases one person from every store (line 11) and returns the certificate. An unknown person gets the same answer.

    Raises:
        ErasureIncomplete: when a store still holds them; the name of the store is the value.
    """
    snapshots = corpus.SnapshotStore(house.snapshots, house.keyring)
    stores = (house.catalog, snapshots, CheckpointStore(house.project.state / "runs", house.keyring, snapshots=snapshots))
    erasure = Erasure(house.store, house.keyring, house.log, stores=stores, unit=house.project.privacy.unit)
    lost = snapshots.holds(subject_of(house, unit))
    certificate = erasure.execute(subject_of(house, unit))
    for reservation in house.ledger.open_runs():
        if reservation.snapshot in lost:  # its population is no longer what it reserved, and its key could still take the noise away
            _abandon(house, reservation)
    return {
        "subject": certificate.request,
        "stores": list(certificate.stores),
        "failed": [],
        "models": [str(Decision.KEPT)] if house.log.select(Predicate.TRAINED) else [],
        "certificate": certificate.entry,
        "key_destroyed": True,
    }


def trace(house: House, digest: str) -> list[dict[str, Any]]:
    """Returns every statement about a record, snapshot or model, each with its inclusion proof (a file of c2sp.org/tlog-proof)."""
    return [
        {
            "index": e.index,
            "time": e.time,
            "predicate": e.predicate.value,
            "fields": dict(e.fields),
            "proof": bytes(house.log.prove(e.index)).decode(),
        }
        for e in house.log.entries(Digest(digest))
    ]


def export_evidence(house: House, folder: Path, *, public: bool) -> tuple[Path, Path]:
    """Writes the evidence bundle and, beside it, the public key that verifies it."""
    bundle = house.log.export(folder, public=public)
    key = folder.with_name(folder.name + ".pub")
    write_atomically(key, (house.log.public_key() + "\n").encode())
    return bundle, key


def run(house: House, *, until: str | None, observer: Observer) -> dict[str, Any]:
    """Runs the stages in order up to and including `until`; finished ones are not repeated.

    Raises:
        NotFound: when there is no such stage.
        DiscreetError: whatever a stage raises; what was finished stays finished.
    """
    if until is not None and until not in STAGES:
        raise NotFound(f"a stage out of {', '.join(STAGES)}", value=until)
    outcome: dict[str, Any] = {}
    for name in STAGES[: STAGES.index(until) + 1] if until else STAGES:
        if name == "ingest":
            if until == "ingest":
                outcome["ingest"] = {"snapshot": ingest(house, observer).snapshot.root}
        else:
            outcome[name] = {"train": train, "audit": audit, "release": release}[name](house, observer)
    return outcome


def utility_control(house: House, *, generated: Mapping[str, str], observer: Observer) -> list[list[float]]:
    """Trains the same adapter on the same frozen text without privacy, to say what privacy cost; gives its curve and destroys it.

    Args:
        generated: file name -> SHA-256 of text that our own code wrote.

    Raises:
        TrackRefused: when a training source is anything else. A sensitive source never gets here.
    """
    _refuse_sensitive(house, generated)
    trained = _needed(house, "train")
    done = _finished(house, "utility")
    if done is not None:
        return list(done["curve"])
    observer.stage("utility control (non-private, generated text only)")
    frozen = ingest(house, observer)
    base = load_base(house, frozen.public, observer)
    text = PublicText.of(_all_texts(house, frozen.snapshot), sensitivity=frozen.snapshot.sensitivity, basis=Basis.GENERATED)
    fitted = loop.fit(
        text,
        setup=_setup(house, base, held_out=frozen.held_out),
        steps=house.project.privacy.steps,
        batch=house.project.privacy.expected_batch,
        order=house.keyring.purpose("control order").stream("utility"),
        on_step=_shown(observer, "control"),
    )
    result = {"curve": _rounded(fitted.curve)}
    fields = {"run": f"utility-{trained['run']}", "track": "public", "base": trained["base"], "adapter": None, "plan": None, "guarantee": None}
    fields |= {"public_loss": result["curve"], "kind": "utility control"}
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.TRAINED, subjects=(Digest(trained["base"]),), fields=fields))
        gone = {"control": fields["run"], "run": trained["run"], "kind": "non-private, generated text", "reason": "curve measured"}
        house.log.append(tx, Statement(predicate=Predicate.CONTROL_DESTROYED, subjects=(Digest(trained["base"]),), fields=gone))
        _record(tx, "utility", _run_config(house), result)
    return list(result["curve"])


def _refuse_sensitive(house: House, generated: Mapping[str, str]) -> None:
    for section in house.project.source:
        source = house.project.path(section.path)
        if not source.is_file() or hashlib.sha256(source.read_bytes()).hexdigest() != generated.get(section.path):
            raise TrackRefused(
                "a corpus that our own code generated, byte for byte", value=section.name, remedy="Non-private controls never see a source."
            )


# Plumbing


class Silent:
    """An observer that shows nothing."""

    def stage(self, name: str) -> None:
        pass

    def note(self, line: str) -> None:
        pass

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None:
        pass


def _run_config(house: House) -> str:
    """What identifies the computed result: everything but [run], [release] and [serve]."""
    project = house.project
    sections = (project.privacy, project.model, project.train, project.budget, project.deid)
    return digest_of(
        [project.audit.canaries]
        + [section.model_dump(mode="json") for section in sections]
        + [section.model_dump(mode="json") for section in project.source]
    )


def _config_of(house: House, name: str) -> str:
    """What a stage's result depends on: its run, and for a release the gates too."""
    if name.startswith("plan/"):
        return ""
    after = {"audit": (house.project.audit, None), "release": (house.project.audit, house.project.release)}.get(name, ())
    later = [section for section in after if section is not None]
    return digest_of([_run_config(house), *(section.model_dump(mode="json") for section in later)]) if later else _run_config(house)


def _result(house: House, name: str, config_digest: str) -> dict[str, Any] | None:
    with house.store.transaction() as tx:
        found = tx.execute(select(_stages.c.result).where(_stages.c.name == name, _stages.c.config == config_digest)).scalar_one_or_none()
    return None if found is None else dict(json.loads(found))


def finished(house: House) -> set[str]:
    """Returns the stages that are done for this discreet.toml."""
    return {name for name in STAGES if _finished(house, name) is not None}


def _finished(house: House, name: str) -> dict[str, Any] | None:
    return _result(house, name, _config_of(house, name))


def _needed(house: House, name: str) -> dict[str, Any]:
    found = _result(house, name, _config_of(house, name))
    if found is None:
        raise NotFound(f"the stage '{name}' to be done for this discreet.toml", remedy="Run `discreet run`.")
    return found


def _record(tx: Connection, name: str, config_digest: str, result: Mapping[str, Any]) -> None:
    tx.execute(insert(_stages).values(name=name, config=config_digest, result=json.dumps(result)))


def released_name(house: House) -> str:
    """Returns the name under which the released model is served.

    Raises:
        NotReleased: when the model was withheld. NotFound: when nothing was decided yet.
    """
    decided = _needed(house, "release")
    if decided["decision"] != "released":
        raise NotReleased("a released model", remedy="The report says which gate did not hold.")
    return str(decided["name"])
