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
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

from sqlalchemy import Column, Connection, String, Table, Text, insert, select

from discreet import config, corpus
from discreet.config import Project, SourceSection, digest_of
from discreet.deid import policy as deid
from discreet.dp import accounting, mechanism
from discreet.errors import NotReleased, PlanInvalid, RunInProgress, TrackRefused, UsageError
from discreet.evidence.log import Log
from discreet.evidence.statement import Predicate, Statement
from discreet.governance.catalog import Catalog
from discreet.governance.consent import Consent
from discreet.keys import Keyring, open_master
from discreet.ledger import Ledger, Reservation
from discreet.record import Basis, Deidentified, Digest, Release, Sensitivity, Snapshot, SubjectId
from discreet.store import Store, metadata

STAGES = ("ingest", "train", "audit", "release", "report")
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


# Lines 8 and 9: does it hold, may it leave


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
    envelope = path.read_bytes()
    entry = verify_envelope(envelope, public_key=public_key)
    if entry.predicate is not Predicate.RELEASED:
        raise NotReleased("a signed statement that releases a model", value=entry.predicate.value)
    return _release(folder, entry)


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
