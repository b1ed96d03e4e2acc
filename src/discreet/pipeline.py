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

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

from sqlalchemy import Column, Connection, String, Table, Text, insert, select

from discreet import config, corpus
from discreet.config import Project, SourceSection, digest_of
from discreet.deid import policy as deid
from discreet.dp import accounting, mechanism
from discreet.errors import ConfigInvalid, NotFound, NotReleased, PlanInvalid, RunInProgress, TrackRefused
from discreet.evidence.log import Log
from discreet.evidence.statement import Entry, Predicate, Statement
from discreet.governance import lineage
from discreet.governance.catalog import Catalog, subject_id
from discreet.governance.consent import Consent
from discreet.governance.erasure import Decision, Erasure
from discreet.keys import Keyring, open_master
from discreet.ledger import CloseReason, Ledger, Reservation
from discreet.record import Basis, Deidentified, Digest, Release, Sensitivity, Snapshot, SubjectId
from discreet.store import Store, metadata, now, storage_full

STAGES = ("ingest", "train", "audit", "release")
BATCH = 512
CANARY_SOURCE = "audit-canaries"

_stages = Table("stages", metadata, Column("name", String(32), primary_key=True), Column("config", String(71), nullable=False), Column("result", Text, nullable=False))


class Observer(Protocol):
    """Hears what happens and may show it. Nothing sensitive is ever said to it."""

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
            yield House(project=project, store=store, keyring=keyring, log=log, catalog=catalog, consent=consent, ledger=Ledger(store, log))
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
            fields = {"source": source, "policy": policy, "counts": dict(sorted(counts.items()))}
            house.log.append(tx, Statement(predicate=Predicate.DEIDENTIFIED, subjects=tuple(d.digest for d in batch), fields=fields))


def _freeze(house: House, name: str, documents: Sequence[Deidentified], *, track: corpus.Track = corpus.Track.DP) -> Snapshot:
    return corpus.freeze(documents, name=name, keyring=house.keyring, log=house.log, store=house.store, folder=house.snapshots, track=track)


def plant_canaries(house: House) -> Canaries:
    """Draws the canaries of the audit, the same at every call, and logs the commitment to texts and coins before anything is frozen."""
    key = house.keyring.purpose("canaries")
    canaries = canary.plant(house.project.audit.canaries, key=key.stream("plant"))
    committed = canary.commitment(canaries, salt=key.mac(b"commitment"), design=_design(house))
    with house.store.transaction() as tx:
        if committed not in {entry.fields["commitment"] for entry in house.log.select(Predicate.COMMITTED, tx=tx)}:
            fields = {"commitment": committed, "canaries": len(canaries), "kind": "canaries and reading of the audit"}
            house.log.append(tx, Statement(predicate=Predicate.COMMITTED, subjects=(committed,), fields=fields))
    return canaries


def _design(house: House) -> canary.Design:
    return canary.Design(false_positive_rate=house.project.audit.false_positive_rate, level=house.project.audit.level)


def _canary_section(house: House, canaries: Canaries) -> SourceSection:
    """The reserved source of the canaries: generated text, one unit each, through the same door as everything else."""
    path = house.project.state / "canaries.jsonl"
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in canaries.rows()).encode())
    return SourceSection(
        name=CANARY_SOURCE,
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
    parameters: int

    def to_json(self) -> dict[str, Any]:
        return {
            "plan": self.plan.to_json(),
            "guarantee": guarantee_fields(self.plan),
            "budget": dict(self.budget),
            "admitted": self.admitted,
            "signal_to_noise": self.signal_to_noise,
            "tokens": self.tokens,
            "parameters": self.parameters,
        }

    def lines(self) -> list[str]:
        plan, promised = self.plan, self.plan.guarantee
        return [
            f"unit               one {plan.unit}: everything they contributed, {plan.cap} document(s) a step",
            f"epsilon            {plan.filter_epsilon:.3f} by the budget's filter (RDP), {promised.epsilon:.3f} by PLD, delta {promised.delta:.2g}",
            f"mechanism          {plan.steps} Poisson steps, probability {plan.sampling_probability:.4f}, noise multiplier {plan.noise_multiplier:.4f}, clip norm {plan.clip_norm:g}",
            f"noise              each step's mean gradient is hidden in noise of norm {self.noise_norm:.3f}; a full batch of aligned gradients has norm {plan.clip_norm:g}",
            f"signal to noise    at most {self.signal_to_noise:.2f} a step over {self.parameters:,} trainable parameters; below 0.01 expect little",
            f"work               about {self.tokens:,} tokens",
            f"budget             {self.budget['name']}: epsilon {self.budget['remaining_epsilon']:.3f} of {self.budget['epsilon']:g} left; this run "
            + ("is admitted" if self.admitted else "is REFUSED"),
            "Choosing unit and epsilon: docs/choosing-unit-and-epsilon.md. A larger population, a smaller batch or fewer steps lower epsilon at the same noise.",
        ]

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
    _, budget = _filter(house, plan.delta)
    base = load_base(house)
    parameters = model.count_trainable(base, house.project.model)
    positions = [positions[0] for positions in frozen.snapshot.units.reveal().values()][:200]
    lengths = [len(tokens) for tokens in model.tokenize(base, corpus.texts(frozen.snapshot, positions, house.keyring), house.project.model.max_tokens)]
    return Price(
        plan=plan,
        budget=budget,
        admitted=plan.admitted_by(_filter(house, plan.delta)[0]),
        signal_to_noise=plan.expected_batch / (plan.noise_multiplier * math.sqrt(parameters)),
        tokens=round(sum(lengths) / len(lengths) * plan.expected_batch * plan.cap * plan.steps, -2),
        parameters=parameters,
    )


def _calibrate(house: House, snapshot: Snapshot) -> mechanism.Plan:
    """Line 5. The population is the public figure of [privacy]; without one it is the exact count, and the guarantee says that the count is not protected."""
    privacy = house.project.privacy
    population = privacy.population or snapshot.num_units
    delta = privacy.delta or 1 / (2 * population)
    try:
        return mechanism.calibrate(
            epsilon=privacy.epsilon,
            delta=delta,
            population=population,
            expected_batch=privacy.expected_batch,
            steps=privacy.steps,
            clip_norm=privacy.clip_norm,
            unit=privacy.unit,
            cap=privacy.cap,
            budget=_filter(house, delta)[0] if privacy.target == "budget" else None,
            allow_large_delta=privacy.allow_large_delta,
        )
    except ValueError as error:
        raise PlanInvalid("[privacy] to have a solution", value=str(error), remedy="See docs/choosing-unit-and-epsilon.md.") from None


def _filter(house: House, delta: float) -> tuple[accounting.RdpFilter, Mapping[str, Any]]:
    """The budget as it stands, or as it would be opened."""
    section = house.project.budget
    try:
        return house.ledger.filter(section.name), house.ledger.show(section.name).to_json()
    except NotFound:
        fresh = accounting.RdpFilter.open(epsilon=section.epsilon, delta=section.delta or delta)
        return fresh, {"name": section.name, "epsilon": section.epsilon, "delta": section.delta or delta, "spent_epsilon": 0.0, "remaining_epsilon": section.epsilon}


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
        "sampler": "poisson",
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
        return done
    frozen = ingest(house, observer)
    observer.stage("train")
    run, plan, reservation = _reserve(house, frozen.snapshot)
    observer.note(f"{plan.steps} steps at noise multiplier {plan.noise_multiplier:.3f}: epsilon {plan.guarantee.epsilon:.2f} (PLD), delta {plan.delta:.2g}")
    base = load_base(house, frozen.public, observer)
    start = _public_track(house, base, frozen, run, observer)
    trained = loop.train(
        plan,
        _training_documents(house, base, frozen.snapshot),
        house.ledger.spend(reservation),
        base=base,
        start=start,
        project=house.project,
        run_key=house.keyring.run(run),
        seal=house.keyring.purpose("checkpoint"),
        folder=house.project.state / "runs" / run,
        held_out=frozen.held_out,
        on_step=lambda step: observer.progress("train", step.number, plan.steps, step.figures()),
    )
    result = {
        "run": run,
        "plan": plan.digest,
        "snapshot": frozen.snapshot.root,
        "base": base.digest,
        "adapter": trained.adapter,
        "steps": trained.steps,
        "parameters": trained.parameters,
        "seconds": round(trained.seconds, 1),
        "guarantee": guarantee_fields(plan) | {"privacy_digest": house.project.privacy_digest()},
        "curve": [[step, round(loss, 4)] for step, loss in trained.curve],
    }
    return _finish_training(house, result, reservation)


def _reserve(house: House, snapshot: Snapshot) -> tuple[str, mechanism.Plan, Reservation]:
    """Lines 5 and 6. A run is its configuration on its snapshot; its plan is fixed when it is first reserved."""
    run = "run-" + digest_of([_run_config(house), snapshot.root]).removeprefix("sha256:")[:12]
    known = _result(house, f"plan/{run}", "")
    plan = mechanism.Plan.from_json(known) if known else _calibrate(house, snapshot)
    house.ledger.open(house.project.budget.name, epsilon=house.project.budget.epsilon, delta=house.project.budget.delta or plan.delta, unit=plan.unit)
    if known is None:
        with house.store.transaction() as tx:
            _record(tx, f"plan/{run}", "", plan.to_json())
    return run, plan, house.ledger.reserve(house.project.budget.name, plan, snapshot, run)


def _finish_training(house: House, result: dict[str, Any], reservation: Reservation) -> dict[str, Any]:
    """Logs the trained model, closes the reservation and destroys the run's key, so that nobody regenerates its noise."""
    run, fields = result["run"], {name: result[name] for name in ("run", "base", "adapter", "plan", "guarantee", "steps", "parameters", "curve", "seconds")}
    with house.store.transaction() as tx:
        subjects = (Digest(result["adapter"]), Digest(result["snapshot"]))
        house.log.append(tx, Statement(predicate=Predicate.TRAINED, subjects=subjects, fields={**fields, "track": "dp", "reservation": reservation.id}))
        lineage.derive(tx, lineage.Artifact(digest=Digest(result["adapter"]), kind=lineage.Kind.MODEL), parents=[Digest(result["snapshot"])])
        _record(tx, "train", _run_config(house), result)
    house.ledger.close(reservation, reason=CloseReason.COMPLETED)
    house.keyring.close_run(run)
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.KEY_DESTROYED, subjects=(Digest(result["adapter"]),), fields={"run": run, "kind": "noise and sampling"}))
    return result


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
    private = model.load_adapter(base, house.project.state / "runs" / trained["run"] / "adapter")
    scored = _scores(house, base, private, canaries)
    observer.note("scored the private model; training the control on canaries alone")
    control = _control(house, base, canaries, observer)
    controlled = _scores(house, base, control, canaries)
    untouched = membership.log_likelihoods(base.module, base.tokenizer, canaries.texts, token_budget=house.project.run.token_budget)
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
    del control
    with house.store.transaction() as tx:
        subject = (Digest(trained["adapter"]),)
        house.log.append(tx, Statement(predicate=Predicate.AUDITED, subjects=subject, fields=_audit_fields(result)))
        fields = {"control": f"control of {trained['run']}", "run": trained["run"], "kind": "non-private, canaries only", "reason": "audit done"}
        house.log.append(tx, Statement(predicate=Predicate.CONTROL_DESTROYED, subjects=subject, fields=fields))
        _record(tx, "audit", _run_config(house), result)
    return result


def _scores(house: House, base: Base, module: nn.Module, canaries: Canaries) -> NDArray[np.float64]:
    return membership.scores(
        module, base.tokenizer, canaries.texts, token_budget=house.project.run.token_budget, adapter_off=lambda: model.adapter_off(module, base)
    )


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
        raise NotReleased("every gate of [release] to hold", value=", ".join(failed), remedy="The report says what was found. Nothing left the house.")
    return done


def _decide(house: House, trained: Mapping[str, Any], audited: Mapping[str, Any]) -> dict[str, Any]:
    gates = _gates(house, trained["guarantee"], audited)
    holds = all(gate["holds"] for gate in gates)
    common = {"name": f"{house.project.project.name}-{trained['run'].removeprefix('run-')}", "adapter": trained["adapter"], "gates": gates, "run": trained["run"]}
    fields = common | (
        {"base": trained["base"], "guarantee": trained["guarantee"], "purpose": house.project.purpose.name, "verdict": audited["verdict"]}
        if holds
        else {"reasons": [gate["gate"] for gate in gates if not gate["holds"]], "verdict": audited["verdict"]}
    )
    folder = house.releases / common["name"]
    if holds:
        shutil.copytree(house.project.state / "runs" / trained["run"] / "adapter", folder / "adapter", dirs_exist_ok=True)
    result = {"decision": "released" if holds else "withheld", **fields}
    with house.store.transaction() as tx:
        kind = Predicate.RELEASED if holds else Predicate.WITHHELD
        index = house.log.append(tx, Statement(predicate=kind, subjects=(Digest(trained["adapter"]),), fields=fields))
        _record(tx, "release", _run_config(house), result)
        entry = next(entry for entry in house.log.select(kind, tx=tx) if entry.index == index)
        if holds:
            write_atomically(folder / "release.json", entry.envelope)
    return result


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
    path = folder / "release.json"
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


def gateway_app(house: House, *, api_key_hash: str) -> Starlette:
    """Returns the gateway's application for the verified release of this project (line 10).

    Raises:
        NotReleased, EvidenceInvalid, DigestMismatch: when there is no release, or it is not what was signed.
    """
    name = _needed(house, "release").get("name", "")
    key = house.log.public_key()
    released = load_release(house.releases / name, public_key=key)
    base = load_base(house, None, Silent())
    serving = house.project.serve
    engine = gateway.open_engine(released, base, public_key=key, key=house.keyring.purpose("gateway"))
    return gateway.app(
        engine,
        model_name=released.name,
        adapter=released.adapter,
        key=house.keyring.purpose("gateway"),
        api_key_hash=api_key_hash,
        on_served=lambda adapter, policy, counts: _count_served(house, adapter, policy, counts),
        limits=gateway.Limits(max_request_bytes=serving.max_request_bytes, max_new_tokens=serving.max_new_tokens),
    )


def _count_served(house: House, adapter: Digest, policy: Digest, counts: Mapping[str, int]) -> None:
    """Logs one served request: digests and counts by label, never text."""
    fields = {"release": adapter, "requests": 1, "policy": policy, "counts": dict(counts)}
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.SERVED, subjects=(adapter,), fields=fields))


def subject_of(house: House, unit: str) -> SubjectId:
    """Returns the pseudonym of a person as the project's sources name them."""
    section = next((section for section in house.project.source if section.role == "train"), house.project.source[0])
    return subject_id(house.keyring, unit=section.unit, value=unit)


def erase(house: House, unit: str) -> dict[str, Any]:
    """Erases one person from every store (line 11) and returns the certificate. An unknown person gets the same answer.

    Raises:
        ErasureIncomplete: when a store still holds them; the name of the store is the value.
    """
    stores = (house.catalog, corpus.SnapshotStore(house.snapshots, house.keyring))
    erasure = Erasure(house.store, house.keyring, house.log, stores=stores, unit=house.project.privacy.unit)
    certificate = erasure.execute(subject_of(house, unit))
    return {
        "subject": certificate.request,
        "stores": list(certificate.stores),
        "failed": [],
        "models": [str(Decision.KEPT)],
        "certificate": certificate.entry,
        "key_destroyed": True,
    }


def trace(house: House, digest: str) -> list[dict[str, Any]]:
    """Returns every statement about a record, snapshot or model, each with its inclusion proof (a file of c2sp.org/tlog-proof)."""
    return [
        {"index": e.index, "time": e.time, "predicate": e.predicate.value, "fields": dict(e.fields), "proof": bytes(house.log.prove(e.index)).decode()}
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
    plan = mechanism.plan_from_json(_needed(house, f"plan/{trained['run']}"))
    curve = loop.fit_like(plan, _training_documents(house, base, frozen.snapshot), base=base, project=house.project, held_out=frozen.held_out, on_step=lambda step: observer.progress("control", step.number, plan.steps, step.figures()))
    result = {"curve": [[step, round(loss, 4)] for step, loss in curve]}
    fields = {"run": f"utility-{trained['run']}", "track": "public", "base": trained["base"], "adapter": None, "plan": None, "guarantee": None, "public_loss": result["curve"], "kind": "utility control"}
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
            raise TrackRefused("a corpus that our own code generated, byte for byte", value=section.name, remedy="Non-private controls never see a source.")


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
    sections = (project.privacy, project.model, project.train, project.audit, project.budget, project.deid)
    return digest_of([section.model_dump(mode="json") for section in sections] + [section.model_dump(mode="json") for section in project.source])


def _result(house: House, name: str, config_digest: str) -> dict[str, Any] | None:
    with house.store.transaction() as tx:
        found = tx.execute(select(_stages.c.result).where(_stages.c.name == name, _stages.c.config == config_digest)).scalar_one_or_none()
    return None if found is None else dict(json.loads(found))


def _finished(house: House, name: str) -> dict[str, Any] | None:
    return _result(house, name, _run_config(house))


def _needed(house: House, name: str) -> dict[str, Any]:
    found = _result(house, name, "" if name.startswith("plan/") else _run_config(house))
    if found is None:
        raise NotFound(f"the stage '{name}' to be done for this discreet.toml", remedy="Run `discreet run`.")
    return found


def _record(tx: Connection, name: str, config_digest: str, result: Mapping[str, Any]) -> None:
    tx.execute(insert(_stages).values(name=name, config=config_digest, result=json.dumps(result)))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all.

    Raises:
        StorageFull: when the disk is full; the earlier file is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise storage_full() from None
        raise
