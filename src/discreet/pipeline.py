"""THE STORY: from collected text to a served model, and back to erasure. Each stage is one call.

    ingest ──> train ──> audit ──> release ──> serve
      |  register, admit, de-identify, freeze
      |         |  calibrate, reserve, spend, train
      |         |          |  attack with canaries, controls
      '─────────┴──────────┴──────────┴─────────> statements in the log, in the transaction that stores the result

A stage that finished leaves its result in the table `stages`; calling it again returns that result. A stage that was killed is repeated: what it had already
logged is recognised, what it had already spent is not spent again, and training continues from its sealed checkpoint with the same draws.

Does not cover: machines that do not trust each other (federated/), serving itself (serve/), the demo's corpus and its non-private control (demo.py).
"""

from __future__ import annotations

import csv
import dataclasses
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
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, final

import numpy as np
from sqlalchemy import Column, Connection, String, Table, Text, delete, insert, select

from discreet import config, corpus, ledger, model
from discreet.audit import bounds, deployed, extraction, membership, records, risk
from discreet.audit import canaries as canary
from discreet.audit import mechanism as rehearsal
from discreet.audit.canaries import Canaries
from discreet.audit.external import LooseTradeOff
from discreet.config import ModelSection, PrivacySection, Project, SourceSection, TrainSection, digest_of
from discreet.deid import policy as deid
from discreet.deid.calibrate import samples_of
from discreet.deid.measure import measure
from discreet.dp import accounting, mechanism
from discreet.dp.combine import Combine
from discreet.errors import (
    BudgetExhausted,
    ConfigInvalid,
    DigestMismatch,
    ErasureIncomplete,
    ModelUnsafe,
    NotAdmitted,
    NotFound,
    NotReleased,
    OperationFailed,
    PlanInvalid,
    RecordInvalid,
    RunInProgress,
    SourceEmpty,
    SourceMissing,
    TrackRefused,
)
from discreet.evidence.log import Log
from discreet.evidence.statement import JSON, Entry, Predicate, Statement
from discreet.governance import lineage, residue
from discreet.governance.access import Access, Action, current_user
from discreet.governance.catalog import Catalog, RegisteredSource, SourceFiles, subject_id
from discreet.governance.classify import classify
from discreet.governance.consent import Consent
from discreet.governance.erasure import Decision, Erasure, Finding, Identity, Reason, Transcript
from discreet.keys import Key, Keyring, open_master
from discreet.ledger import Budget, CarryOver, CloseReason, Kind, Ledger, Period, Reservation, State
from discreet.model import Base, PublicText
from discreet.record import Basis, Deidentified, Digest, Purpose, Record, Release, Sensitive, Sensitivity, Snapshot, SubjectId
from discreet.serve import gateway
from discreet.store import Store, metadata, write_atomically
from discreet.train import loop, optimizers, parallel
from discreet.train import search as searching
from discreet.train.checkpoint import PUBLIC, Checkpoints, CheckpointStore
from discreet.train.parallel import ALONE, Ranks
from discreet.train.step import tokenize

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import nn

    from discreet.serve.local import Local
    from discreet.serve.run import Behind

STAGES = ("ingest", "train", "audit", "release")
BATCH = 512
CONSENT_S = 30.0
"""How often a run asks whether its records may still be used."""
INCONCLUSIVE_RULE = "an audit that could have seen a violation"
CANARY_SOURCE = "audit-canaries-{count}"
CONTROL_BATCH = 16
LEAST_IDENTIFIER = 5
"""Characters of an identifier below which its occurrence in a text says nothing."""
OF_RECORDS, OF_CHILDREN = 0.1, 0.1
"""Shares of an audit's level for real records and for deployed children; the rest is the canaries'."""
RECITED = 40
"""Planted canaries that both models are asked to recite."""
RELEARNT = 16
"""Public texts that a model relearns from after an erasure."""
PUBLIC_ADAPTER = "public-adapter"

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


class _Silent:
    """Hears and says nothing."""

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
    access: Access
    ranks: Ranks = ALONE

    @property
    def snapshots(self) -> Path:
        return self.project.state / "snapshots"

    @property
    def releases(self) -> Path:
        return self.project.state / "releases"


@contextmanager
def open_house(folder: Path, *, exclusive: bool = True, lost: tuple[str, str] | None = None) -> Iterator[House]:
    """Opens the project in `folder`; at its end the log's checkpoint is pinned beside the journal of suppressions, outside the database.

    Args:
        folder: holds discreet.toml.
        exclusive: refuse when another command is at work on this project; the gateway, which only reads, does without.
        lost: who goes on, and why, although the database lost entries that were signed; None refuses such a database.

    Raises:
        RunInProgress: when another command holds the project.
        EvidenceInvalid: when the log is not one that has grown from the pinned checkpoint: a backup was restored.
        ConfigInvalid, SourceMissing, KeyUnavailable: when the project cannot be opened.
    """
    project = config.load(folder)
    deid.check(project.deid)
    project.state.mkdir(mode=0o700, exist_ok=True)
    with _lock(project.state / "lock", exclusive=exclusive):
        store = Store(project.database_url())
        try:
            keyring = Keyring(store, open_master(project.master_location()))
            journal = project.path(project.erasure.journal)
            log = Log(store, keyring, f"discreet.{project.project.name}", pin=journal.with_name(f"{journal.name}.checkpoint"))
            catalog, consent = Catalog(store, keyring, log), Consent(store, keyring, log)
            access = Access(project.access, store=store, keyring=keyring, log=log)
            house = House(
                project=project,
                store=store,
                keyring=keyring,
                log=log,
                catalog=catalog,
                consent=consent,
                ledger=Ledger(store, keyring, log),
                access=access,
            )
            if lost is None:
                log.check_pin()
            if exclusive:
                erasure_of(house).reapply()
            if lost is not None:
                access.require(Action.APPROVE, who=current_user())
                log.accept_rollback(by=lost[0], reason=for_log(house, lost[1]))
            try:
                yield house
            finally:
                if exclusive:
                    log.pin()
        finally:
            store.close()


def train_together(folder: Path, observer: Observer) -> dict[str, Any] | None:
    """`train` on the ranks that torchrun announces: rank 0 does everything that is written, the others compute their share of every step.

    Returns:
        as `train`; None on every rank but the first.

    Raises:
        as `open_house` and `train`; torchrun then ends the other ranks.
    """
    with parallel.joined(config.load(folder).run.device) as ranks:
        if ranks.writes:
            with open_house(folder) as house:
                house.access.require(Action.RUN, who=current_user())
                return train(dataclasses.replace(house, ranks=ranks), observer)
        if ranks.follow():
            with open_house(folder, exclusive=False) as house:
                _assist(dataclasses.replace(house, ranks=ranks))
        return None


def _assist(house: House) -> None:
    """Reads the run that rank 0 has reserved, rehearses it, and takes its steps when it is spent: this rank decides nothing and writes nothing.

    Raises:
        RunInProgress: when not exactly one run is open.
    """
    silent, opened = Silent(), house.ledger.open_runs()
    root = opened[0].snapshot if len(opened) == 1 else None
    if root is None:
        raise RunInProgress("exactly one open run for the ranks to share", value=len(opened), remedy="Start the ranks again.")
    [reservation] = opened
    plan = mechanism.plan_from_json(_result(house, f"plan/{reservation.run}", "") or {})
    _rehearsed(house, plan, reservation.run)
    if not house.ranks.follow():
        return
    snapshot = corpus.open_snapshot(root, keyring=house.keyring, folder=house.snapshots)
    public, held_out = (_last_public(house, name) for name in ("public", "evaluation"))
    if held_out is None:
        raise NotFound("the held-out text that rank 0 froze")
    base, folder = load_base(house, public, silent), house.project.state / "runs" / reservation.run
    start = _public_track(house, base, public, held_out, folder, silent)
    steps = _take_steps if plan.search is None else _search
    steps(house, snapshot, held_out, plan, reservation, base, start, lambda _: None)


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
    """What ingest gives: the frozen snapshot of the DP track, public text for the other track, held-out text, the planted canaries, and the people whom a coin withheld."""

    snapshot: Snapshot
    public: PublicText | None
    held_out: PublicText
    canaries: Canaries
    refused: int
    withheld: Snapshot | None = None


def ingest(house: House, observer: Observer) -> Corpus:
    """Registers, admits, de-identifies and freezes every source of the project. Idempotent: what is logged already is not logged again.

    Raises:
        SourceMissing, SourceChanged, SourceEmpty, SourceNotText, RecordInvalid, RecordConflict: when a source breaks a rule; nothing is frozen.
        Forgotten: when a subject was erased meanwhile.
    """
    observer.stage("ingest")
    _refuse_unfinished(house)
    canaries = plant_canaries(house)
    documents: dict[str, list[Deidentified]] = {"train": [], "public": [], "evaluation": []}
    refused = 0
    for section in (*house.project.source, _canary_section(house, canaries)):
        planted = _rows_as_lines(canaries.rows()) if section.role == "canary" else None
        kept, num_refused = _source_documents(house, section, observer, generated=planted)
        documents["train" if section.role == "canary" else section.role] += kept
        refused += num_refused
    if not documents["evaluation"]:
        raise ConfigInvalid("a [[source]] with role = 'evaluation': public held-out text", remedy="`discreet init DIR` shows one.")
    documents["train"], kept_out = _by_coin(house, documents["train"])
    snapshot = _freeze(house, "train", documents["train"])
    withheld = _freeze(house, "withheld", kept_out) if kept_out else None
    public = _public_text(house, _freeze(house, "public", documents["public"], track=corpus.Track.PUBLIC)) if documents["public"] else None
    held_out = _public_text(house, _freeze(house, "evaluation", documents["evaluation"], track=corpus.Track.PUBLIC))
    observer.note(f"frozen {snapshot.root}; {refused} records refused")
    return Corpus(snapshot=snapshot, public=public, held_out=held_out, canaries=canaries, refused=refused, withheld=withheld)


def _by_coin(house: House, documents: Sequence[Deidentified]) -> tuple[list[Deidentified], list[Deidentified]]:
    """Parts the people who are trained on from those whom the audit keeps out: a coin for each under the project's key, whatever they wrote and whoever else there is."""
    key, share = house.keyring.purpose("withheld"), house.project.audit.withheld
    canaries = {CANARY_SOURCE.format(count=house.project.audit.canaries)}

    def out(document: Deidentified) -> bool:
        return document.source not in canaries and int.from_bytes(key.mac(document.subject.encode())[:8]) < share * 2**64

    return [each for each in documents if not out(each)], [each for each in documents if out(each)]


def _source_documents(house: House, section: SourceSection, observer: Observer, *, generated: bytes | None = None) -> tuple[list[Deidentified], int]:
    """Lines 1 to 3 for one source."""
    source = house.catalog.register(house.project, section, generated=generated)
    house.consent.load_opt_outs(source)
    records = house.catalog.collect(source)
    _refuse_drift(house, source, records)
    admitted, refused = house.consent.admit_all(records, house.project.purpose)
    keys = house.keyring.subjects([each.record.subject for each in admitted])
    policy = _policy(house, section)
    kept = []
    for number, each in enumerate(admitted, start=1):
        kept.append(deid.deidentify(each, policy, keys[each.record.subject]))
        if number % 100 == 0 or number == len(admitted):
            observer.progress(f"de-identify {section.name}", number, len(admitted), {})
    _log_deidentified(house, section.name, kept, policy)
    return kept, len(refused)


def _refuse_drift(house: House, source: RegisteredSource, records: Sequence[Record]) -> None:
    """A sample of the rows that came since the last look goes through the detectors: what looks more sensitive than the source is declared stops the ingest. A person may confirm by name.

    New rows are looked at by themselves: among all the old ones they would be too few to count.
    """
    section, key = source.section, f"classified/{digest_of([source.name])[-20:]}"
    if section.basis is Basis.GENERATED or section.sensitivity is Sensitivity.SPECIAL:
        return
    seen = (_result(house, key, "") or {"index": -1})["index"]
    told = [e for e in house.log.select(Predicate.COLLECTED) if e.index > seen and e.fields["source"] == source.name]
    fresh = {digest for entry in told for digest in entry.subjects}
    new = [record for record in records if record.digest in fresh]
    if not new:
        return
    proposed, bar = classify(new), max(section.sensitivity, Sensitivity.INTERNAL, key=list(Sensitivity).index)
    confirmed = [e for e in house.log.entries(source.digest) if e.predicate is Predicate.OVERRIDDEN]
    if proposed.exceeds(bar) and not confirmed:
        remedy = f"Declare {proposed.sensitivity.value} (`discreet catalog register {source.name} --again`), or have a named person confirm it: `discreet catalog confirm {source.name} --by NAME --reason TEXT`."
        found = ", ".join(label.value for label in proposed.shares)
        raise TrackRefused(
            f"a source whose new rows look no more sensitive than {section.sensitivity.value}", value=f"{source.name}: {found}", remedy=remedy
        )
    with house.store.transaction() as tx:
        tx.execute(delete(_stages).where(_stages.c.name == key))
        _record(tx, key, "", {"index": told[-1].index})


def propose_sensitivity(house: House, name: str) -> dict[str, Any]:
    """Returns what a sample of a source, as it lies there now, suggests about its sensitivity: a proposal, applied by nobody. Shares stay inside.

    Raises:
        NotFound: when there is no such source.
        SourceMissing, SourceEmpty, SourceNotText, RecordInvalid, RecordConflict: as `Catalog.collect`.
    """
    house.access.require(Action.REGISTER_SOURCE, who=current_user())
    section = _section(house, name)
    source = house.catalog.present(house.project, section)
    proposed = classify(house.catalog.sample(source))
    return {
        "source": name,
        "declared": section.sensitivity.value,
        "proposed": proposed.sensitivity.value,
        "exceeds": proposed.exceeds(section.sensitivity),
        "sampled": proposed.num_sampled,
        "shares": {label.value: share for label, share in proposed.shares.items()},
    }


def _section(house: House, name: str) -> SourceSection:
    section = next((section for section in house.project.source if section.name == name), None)
    if section is None:
        raise NotFound("a [[source]] of that name in discreet.toml", value=name)
    return section


def confirm_sensitivity(house: House, name: str, *, by: str, reason: str) -> None:
    """Records that a named person read the sample and holds these bytes to be no more sensitive than they are declared.

    Raises:
        NotFound: when there is no such source.
    """
    house.access.require(Action.REGISTER_SOURCE, who=current_user())
    source = house.catalog.register(house.project, _section(house, name))
    fields: dict[str, JSON] = {
        "rule": "new rows look no more sensitive than their source is declared",
        "reason": for_log(house, reason),
        "name": name,
        "by": by,
    }
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.OVERRIDDEN, subjects=(source.digest,), fields=fields))


def _policy(house: House, source: SourceSection) -> deid.Policy:
    return deid.configured(house.project.deid, deid.Channel.TRAINING, source.sensitivity)


def for_log(house: House, text: str) -> str:
    """Returns what a person typed as it may stand in the log: without identifiers."""
    return deid.redact(text, deid.configured(house.project.deid, deid.Channel.LOG)).text


def subject_key(house: House, unit: str) -> tuple[SubjectId, Key]:
    """Returns a person's pseudonym and key, for stand-ins and tokens outside of the corpus.

    Raises:
        Forgotten: when they were erased.
    """
    house.access.require(Action.RUN, who=current_user())
    subject = subject_of(house, unit)
    return subject, house.keyring.subject(subject)


def restore_tokens(house: House, unit: str, text: str, *, policy: str) -> tuple[str, int]:
    """Puts the values of a person's tokens back into a text, and says so in the log, by number. Returns the text and how many were opened.

    Raises:
        AccessDenied: when whoever asks may not, or nobody else approved it for this person.
        Forgotten: when the person was erased: nothing opens their tokens any more.
        NotFound: when the project has no key of theirs.
    """
    who, subject = current_user(), subject_of(house, unit)
    about = reidentification(house, unit)
    house.access.require(Action.REIDENTIFY, who=who, about=about)
    if not house.keyring.has_subject(subject):
        raise NotFound("a subject of whom this project has tokens")
    restored, count = deid.restore(text, house.keyring.subject(subject), policy=policy, subject=subject)
    fields: dict[str, JSON] = {"kind": "re-identification", "action": Action.REIDENTIFY.value, "by": who.name, "policy": policy, "values": count}
    with house.store.transaction() as tx:
        house.log.append(
            tx, Statement(predicate=Predicate.ACCESS_GRANTED, subjects=(about,), fields={**fields, "role": ", ".join(house.access.roles(who))})
        )
    return restored, count


def reidentification(house: House, unit: str) -> Digest:
    """Returns what an approval and a statement about opening a person's tokens are bound to: an HMAC that outlives their erasure and names nobody."""
    return Digest("sha256:" + house.keyring.hmac("reidentified", subject_of(house, unit).encode()).hex())


def _log_deidentified(house: House, source: str, documents: Sequence[Deidentified], policy: deid.Policy) -> None:
    told = {digest for e in house.log.select(Predicate.DEIDENTIFIED) if e.fields["policy"] == policy.digest for digest in e.subjects}
    new = [document for document in documents if document.digest not in told]
    detector = _measured(house, policy) if new else {}
    with house.store.transaction() as tx:
        for batch in lineage.chunks(new, BATCH):
            counts: Counter[str] = Counter()
            for document in batch:
                counts.update(document.counts)
            fields: dict[str, JSON] = {"source": source, "policy": policy.digest, "counts": dict(sorted(counts.items())), **detector}
            house.log.append(tx, Statement(predicate=Predicate.DEIDENTIFIED, subjects=tuple(d.digest for d in batch), fields=fields))


def _measured(house: House, policy: deid.Policy) -> dict[str, JSON]:
    """The detectors' recall and precision on the project's labelled texts, for the statement; empty where there are none."""
    name = house.project.deid.labelled
    if not name:
        return {}
    path = house.project.path(name)
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError:
        raise SourceMissing("the file of [deid] labelled", value=name) from None
    except ValueError:
        raise RecordInvalid("JSON Lines in UTF-8 in the file of [deid] labelled", value=name) from None
    return {"detector": measure(samples_of(rows), policy).to_json() | {"corpus": path.name}}


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
    """The reserved source of the canaries: generated text, one unit each, through the same door as everything else, but never in a file."""
    return _generated_section(house, CANARY_SOURCE.format(count=len(canaries)), owner="audit")


def _generated_section(house: House, name: str, *, owner: str) -> SourceSection:
    return SourceSection(
        name=name,
        path=f"(generated by {owner})",
        unit="unit",
        owner=owner,
        licence="generated",
        sensitivity=Sensitivity.INTERNAL,
        purposes=(house.project.project.purpose,),
        basis=Basis.GENERATED,
        role="canary",
    )


def _rows_as_lines(rows: Sequence[Mapping[str, str]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


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
    plan = _calibrate(house, frozen.snapshot)
    spent_so_far, budget = _filter(house, plan.delta, frozen.snapshot)
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
    left = budget.remaining_epsilon() if budget else privacy.epsilon
    if left < min(privacy.epsilon, house.project.budget.epsilon) / 2:
        remedy = "Nothing spent comes back. Set [privacy] epsilon to what is left, or open a budget for other people."
        raise BudgetExhausted(f"epsilon {privacy.epsilon:g} in budget {house.project.budget.name}", value=f"{left:.3g} left", remedy=remedy)
    return plan


def _adaptive(privacy: PrivacySection) -> mechanism.Adaptive | None:
    if privacy.clip_quantile is None:
        return None
    votes_noise = privacy.votes_noise or privacy.expected_batch / 20  # Andrew et al. 2021, section 3.1
    return mechanism.Adaptive(quantile=privacy.clip_quantile, rate=privacy.clip_rate, votes_multiplier=votes_noise)


def _filter(house: House, delta: float, snapshot: Snapshot) -> tuple[accounting.RdpFilter, Mapping[str, Any]]:
    """The budget as it stands for the people of a snapshot, or as it would be opened."""
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


def train(house: House, observer: Observer) -> dict[str, Any]:
    """Calibrates, reserves, spends and trains (lines 5 to 7). Killed and called again, it continues the same run with the same draws and spends nothing more.

    Raises:
        PlanInvalid: when [privacy] has no solution.
        BudgetExhausted: when the budget does not admit the run. Nothing was spent.
        NothingLearned: when no trainable parameter changed.
    """
    done = _finished(house, "train")
    if done is not None:
        house.ranks.announce(False)
        return _close_run(house, done)
    frozen = ingest(house, observer)
    observer.stage("train")
    run, plan, reservation = _reserve(house, frozen.snapshot)
    for alert in house.ledger.show(house.project.budget.name).alerts:
        observer.note(f"ALERT: {alert}")
    observer.note(
        f"{plan.steps} steps at noise multiplier {plan.noise_multiplier:.3f}: epsilon {plan.guarantee.epsilon:.2f} (PLD), delta {plan.delta:.2g}"
    )
    base = load_base(house, frozen.public, observer)
    folder = house.project.state / "runs" / run
    house.ranks.announce(True)
    rehearsed = _rehearsed(house, plan, run)
    start = _public_track(house, base, frozen.public, frozen.held_out, folder, observer)
    began = time.monotonic()
    house.ledger.spend(reservation)
    house.keyring.run(run)
    house.ranks.announce(True)
    on_step = _while_admitted(house, frozen.snapshot, _shown(observer, "train"))
    chosen: dict[str, Any] = {}
    if plan.search is None:
        trained = _take_steps(house, frozen.snapshot, frozen.held_out, plan, reservation, base, start, on_step)
    else:
        won = _search(house, frozen.snapshot, frozen.held_out, plan, reservation, base, start, on_step)
        trained, chosen = won.trained, dict(won.chosen)
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
        "mechanism": rehearsed,
        **({"chosen": chosen} if chosen else {}),
        "withheld": frozen.withheld.root if frozen.withheld else None,
    }
    _record_training(house, result, reservation)
    return _close_run(house, result)


def _search(
    house: House,
    snapshot: Snapshot,
    held_out: PublicText,
    plan: mechanism.Plan,
    reservation: Reservation,
    base: Base,
    start: Path | None,
    on_step: loop.OnStep,
) -> searching.Winner[loop.Trained]:
    """Tries settings, each a private run under a key of its own, and keeps the best (`train/search.py`)."""
    run, section = reservation.run, house.project.search
    key, spent = house.keyring.run(run), house.ledger.spend(reservation)
    setup, texts = _setup(house, base, held_out=held_out, start=start), _all_texts(house, snapshot)

    def one(number: int, train_: TrainSection, adapter: Path) -> loop.Trained:
        return loop.train(
            plan,
            snapshot,
            spent,
            texts=texts,
            setup=replace(setup, train=train_),
            run_key=key.derive("try", number),
            checkpoints=_checkpoints(house, f"{run}.{number}"),
            adapter=adapter,
            on_step=on_step,
            ranks=house.ranks,
        )

    def score(number: int, trained: loop.Trained) -> float:
        if plan.search is None or plan.search.score_epsilon is None:
            return searching.public_score(number, trained)
        return searching.private_score(plan, section, snapshot, texts, setup, key)(number, trained)

    return searching.search(
        plan,
        section,
        train=house.project.train,
        run=one,
        drop=lambda number: _checkpoints(house, f"{run}.{number}").destroy(),
        score=score,
        run_key=key,
        folder=house.project.state / "runs" / run,
        ranks=house.ranks,
    )


def _take_steps(
    house: House,
    snapshot: Snapshot,
    held_out: PublicText,
    plan: mechanism.Plan,
    reservation: Reservation,
    base: Base,
    start: Path | None,
    on_step: loop.OnStep,
) -> loop.Trained:
    return loop.train(
        plan,
        snapshot,
        house.ledger.spend(reservation),
        texts=_all_texts(house, snapshot),
        setup=_setup(house, base, held_out=held_out, start=start),
        run_key=house.keyring.run(reservation.run),
        checkpoints=_checkpoints(house, reservation.run),
        adapter=house.project.state / "runs" / reservation.run / "adapter",
        on_step=on_step,
        ranks=house.ranks,
    )


def _rehearsed(house: House, plan: mechanism.Plan, run: str) -> list[dict[str, Any]]:
    """Takes the plan's first steps on planted gradients before anything is spent; the layers go into the audit's statement.

    Raises:
        OperationFailed: when the loop is not the mechanism that was accounted for. No budget was spent.
    """
    running = house.project.run
    layers = rehearsal.layers(
        plan,
        key=house.keyring.purpose("rehearsal").derive(run),
        section=house.project.search,
        ranks=house.ranks,
        device=running.device,
        is_sharded=house.ranks.size > 1 and running.weights == "sharded",
    )
    failed = [layer.name for layer in layers if layer.verdict is bounds.Verdict.FAIL]
    if failed:
        remedy = "Nothing was spent. The training code is not the mechanism that its epsilon is computed for."
        raise OperationFailed("a rehearsal that passes", value=", ".join(failed), remedy=remedy)
    return [layer.to_json() for layer in layers]


def _public_track(house: House, base: Base, public: PublicText | None, held_out: PublicText, folder: Path, observer: Observer) -> Path | None:
    """Trains the non-private track on public text first, when [train] asks for it; the DP track starts from its adapter."""
    steps, adapter = house.project.train.public_steps, folder / PUBLIC_ADAPTER
    if steps == 0:
        return None
    if public is None:
        raise ConfigInvalid("a [[source]] with role = 'public' for [train] public_steps > 0")
    run = f"public-{folder.name}"
    if run not in {entry.fields["run"] for entry in house.log.select(Predicate.TRAINED)}:
        checkpoints = Checkpoints.of(folder.parent, folder.name, house.keyring, track=PUBLIC)
        fitted = loop.fit(
            public,
            setup=_setup(house, base, held_out=held_out),
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
            _register_base(house, tx, base.digest)
            parents = [base.digest, *_public_roots(house, tx)]  # without privacy: whoever is in the text can only be taken out by training again
            lineage.derive(tx, lineage.Artifact(digest=digest, kind=lineage.Kind.MODEL), parents=parents)
        checkpoints.destroy()
    return adapter


def _all_texts(house: House, snapshot: Snapshot) -> list[str]:
    """The document at each position of a snapshot."""
    return corpus.texts(snapshot, range(sum(len(positions) for positions in snapshot.units.reveal().values())), house.keyring)


def _public_text(house: House, snapshot: Snapshot) -> PublicText:
    living = sorted(position for positions in snapshot.units.reveal().values() for position in positions)  # an erased record keeps its place
    return PublicText.of(
        corpus.texts(snapshot, living, house.keyring), sensitivity=snapshot.sensitivity, basis=Basis.CONSENT
    )  # so that only its sensitivity admits it


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
    tiny = model.build_tiny(public, cache=house.project.state / "models", steps=50, batch=16, learning_rate=1e-2, progress=observer.note)
    if house.ranks.writes:
        with house.store.transaction() as tx:
            _register_base(house, tx, tiny.digest)
    return tiny


def _shown(observer: Observer, task: str) -> Callable[[loop.StepReport], None]:
    def show(step: loop.StepReport) -> None:
        figures = {"loss": f"{step.loss:.3f}"} | ({} if step.epsilon is None else {"epsilon": f"{step.epsilon:.2f}"})
        observer.progress(task, step.step, step.steps, figures | {"tok/s": f"{step.tokens_per_second:.0f}", "padding": f"{step.padding:.1%}"})

    return show


def _while_admitted(house: House, snapshot: Snapshot, show: Callable[[loop.StepReport], None]) -> Callable[[loop.StepReport], None]:
    """Asks again, at least every half minute, whether every record of the run may still be used: a withdrawal stops it (GDPR Art. 7(3)); what was spent stays spent."""
    records = corpus.digests(snapshot, house.keyring)
    asked = time.monotonic()

    def on_step(step: loop.StepReport) -> None:
        nonlocal asked
        show(step)
        if time.monotonic() - asked >= CONSENT_S:
            asked = time.monotonic()
            if house.consent.revoked(records, house.project.purpose):
                raise NotAdmitted(
                    "a basis for every record until the run ends",
                    remedy="Somebody withdrew. Run again: it starts on a snapshot without them; what this run spent stays spent.",
                )

    return on_step


def _rounded(curve: loop.Curve) -> list[list[float]]:
    return [[step, round(loss, 4)] for step, loss in curve]


def _reserve(house: House, snapshot: Snapshot) -> tuple[str, mechanism.Plan, Reservation]:
    """Lines 5 and 6. A run is its configuration on its snapshot; its plan is fixed when it is first reserved."""
    run = _run_id(house, snapshot)
    _close_abandoned(house, run)
    known = _result(house, f"plan/{run}", "") if house.ledger.has_run(run) else None
    plan = mechanism.plan_from_json(known) if known else _calibrate(house, snapshot)
    if known is None:
        _refuse_unaffordable(house, plan, snapshot)
    open_project_budget(house, delta=plan.delta)
    if known is None:
        with house.store.transaction() as tx:
            tx.execute(delete(_stages).where(_stages.c.name == f"plan/{run}"))
            _record(tx, f"plan/{run}", "", plan.to_json())
            if plan.allow_large_delta:
                fields: dict[str, JSON] = {
                    "rule": "delta < 1 / population",
                    "value": plan.delta,
                    "reason": plan.allow_large_delta,
                    "run": run,
                }
                house.log.append(tx, Statement(predicate=Predicate.OVERRIDDEN, subjects=(plan.digest,), fields=fields))
    kind = Kind.TRAINING if plan.search is None else Kind.SEARCH
    return run, plan, house.ledger.reserve(house.project.budget.name, plan, snapshot, run, kind=kind)


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


def _run_id(house: House, snapshot: Snapshot) -> str:
    """The same configuration on the same snapshot is the same run. Its name is public, so it comes from the configuration and a count, never from the snapshot (PITFALLS 41)."""
    made = digest_of([_run_config(house), snapshot.root]).removeprefix("sha256:")
    if house.ledger.has_run(earlier := f"run-{made[:12]}"):  # named before names stopped depending on the snapshot
        return earlier
    key = f"run/{made[:24]}"
    known = _result(house, key, "")
    if known is not None and _finished(house, "train") is None and _is_over(house, str(known["run"])):
        known = None  # its model was withdrawn, or it was given up: training again draws new noise, so it is a new run at a new price
    if known is None:
        with house.store.transaction() as tx:
            taken = [json.loads(row.result)["run"] for row in tx.execute(select(_stages.c.result).where(_stages.c.name.startswith("run/")))]
        numbered = (f"run-{digest_of([_run_config(house), number]).removeprefix('sha256:')[:12]}" for number in count(len(taken)))
        known = {"run": next(name for name in numbered if name not in taken and not house.ledger.has_run(name))}
        with house.store.transaction() as tx:
            tx.execute(delete(_stages).where(_stages.c.name == key))
            _record(tx, key, "", known)
    return str(known["run"])


def _is_over(house: House, run: str) -> bool:
    return house.ledger.has_run(run) and house.ledger.of_run(run).state is State.CLOSED


def _refuse_unaffordable(house: House, plan: mechanism.Plan, snapshot: Snapshot) -> None:
    """A statement and a filter are two accountants (PITFALLS 43): a plan made for a PLD epsilon may cost more than the budget has."""
    budget, told = _filter(house, plan.delta, snapshot)
    if not plan.admitted_by(budget):
        raise BudgetExhausted(
            f"a plan that budget {told['name']} admits",
            value=f"it would count {budget.epsilon_of(plan.event):.3g} by RDP for the plan's {plan.guarantee.epsilon:.3g} by PLD; {told['remaining']:.3g} is left",
            remedy="Nothing was spent. [privacy] target = 'budget' finds the smallest noise that the budget admits; `discreet plan` shows both figures.",
        )


def _record_training(house: House, result: Mapping[str, Any], reservation: Reservation) -> None:
    """Logs the trained model. The snapshot's root stays inside: the statement is public (PITFALLS 41)."""
    fields = {name: result[name] for name in ("run", "base", "adapter", "plan", "guarantee", "steps", "parameters")}
    fields |= {"track": "dp", "reservation": reservation.id, "public_loss": result["curve"]}
    fields |= {"kind": "preference tuning"} if house.project.train.objective == "preference" else {}
    fields |= {"kind": "winner of a search", "chosen": result["chosen"]} if "chosen" in result else {}
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.TRAINED, subjects=(Digest(result["adapter"]),), fields=fields))
        artifact = lineage.Artifact(digest=Digest(result["adapter"]), kind=lineage.Kind.MODEL, protects=house.project.privacy.unit)
        _register_base(house, tx, Digest(result["base"]))
        start = house.project.state / "runs" / result["run"] / PUBLIC_ADAPTER
        above = [model.adapter_digest(start)] if start.exists() else []
        lineage.derive(tx, artifact, parents=[Digest(result["snapshot"]), Digest(result["base"]), *above])
        _record(tx, "train", _run_config(house), result)


def _register_base(house: House, tx: Connection, digest: Digest) -> None:
    """A base model that others trained has no parents here; the tiny one was made, without privacy, from the project's public snapshots."""
    if house.project.model.base != model.TINY:
        lineage.register(tx, [lineage.Artifact(digest=digest, kind=lineage.Kind.BASE)])
        return
    lineage.derive(tx, lineage.Artifact(digest=digest, kind=lineage.Kind.MODEL), parents=_public_roots(house, tx))


def _public_roots(house: House, tx: Connection) -> list[Digest]:
    """The public snapshots that the lineage knows, oldest first."""
    roots = [entry.subjects[0] for entry in house.log.select(Predicate.FROZEN, tx=tx) if entry.fields["name"] == "public"]
    known = {artifact.digest for artifact in lineage.find_all(tx, roots)}
    return [root for root in roots if root in known]


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
    _destroy_state(house, run)
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
    _destroy_state(house, reservation.run)


def _destroy_state(house: House, run: str) -> None:
    """Destroys the checkpoints of a run and of its tries."""
    runs = house.project.state / "runs"
    for folder in (runs / run, *runs.glob(f"{run}.*")):
        _checkpoints(house, folder.name).destroy()
        Checkpoints.of(runs, folder.name, house.keyring, track=PUBLIC).destroy()
    searching.forget(runs / run)


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
    level, claim = bounds.spent_level(house.project.audit.level, 1 + len(house.log.select(Predicate.AUDITED))), _claimed_curve(plan)
    rounded = _children(house, private, base, canaries, untouched, trade_off=claim, level=OF_CHILDREN * level)
    attacked = _attack(house, trained, base, private, observer, trade_off=claim, level=OF_RECORDS * level)
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
        trade_off=claim,
        fpr=house.project.audit.false_positive_rate,
        level=(1 - OF_CHILDREN - OF_RECORDS) * level,
        mechanism=[
            _committed(house, Digest(trained["snapshot"]), canaries),
            bounds.mechanism_layer(
                accounted_steps=plan.steps, executed_steps=trained["steps"], trainable=trained["parameters"], moved=trained["moved"]
            ),
            *(
                bounds.Layer(name=each["name"], verdict=bounds.Verdict(each["verdict"]), figures=each["figures"])
                for each in trained.get("mechanism", ())
            ),
            *rounded,
            *(_told(each) for each in attacked["layers"]),
        ],
    )
    observer.note(f"verdict {found.verdict}; asking both models to recite")
    result = found.to_json() | {"adapter": trained["adapter"], "run": trained["run"], "canaries": len(canaries), "level": level}
    result["records"] = attacked
    result["recitation"] = _recitation(house, base, {"private": (private, scored), "control": (control, controlled)}, canaries) | {
        "exposure": {
            "private": extraction.exposure_counts(scored, canaries.included),
            "control": extraction.exposure_counts(controlled, canaries.included),
        }
    }
    if found.verdict is not bounds.Verdict.PASS:
        result["recitation"]["example"]["private"] = "(not shown: the audit did not pass)"
    del control
    with house.store.transaction() as tx:
        subject = (Digest(trained["adapter"]),)
        house.log.append(tx, Statement(predicate=Predicate.AUDITED, subjects=subject, fields=_audit_fields(result)))
        inside: dict[str, JSON] = {"adapter": trained["adapter"], "run": trained["run"], **attacked}
        house.log.append(tx, Statement(predicate=Predicate.ATTACKED, subjects=subject, fields=inside))
        fields = {"control": f"control of {trained['run']}", "run": trained["run"], "kind": "non-private, canaries only", "reason": "audit done"}
        house.log.append(tx, Statement(predicate=Predicate.CONTROL_DESTROYED, subjects=subject, fields=fields))
        _record(tx, "audit", _config_of(house, "audit"), result)
    return result


def _claimed_curve(plan: mechanism.Plan) -> bounds.TradeOff:
    """The curve of the event where PLD knows it; of a search, that of its (epsilon, delta) alone."""
    if accounting.has_pld(plan.event):
        return accounting.trade_off(plan.event)
    return LooseTradeOff(epsilon=plan.guarantee.epsilon, delta=plan.delta)


def _committed(house: House, snapshot: Digest, canaries: Canaries) -> bounds.Layer:
    """FAIL when the corpus does not hold the canaries that are said to be in, and no other; INCONCLUSIVE when they, or how they are read, were committed to after it was frozen."""
    committed = canary.commitment(canaries, salt=house.keyring.purpose("canaries").mac(b"commitment"), design=_design(house))
    when = min((entry.index for entry in house.log.select(Predicate.COMMITTED) if entry.fields["commitment"] == committed), default=None)
    frozen = min(entry.index for entry in house.log.select(Predicate.FROZEN) if snapshot in entry.subjects)
    units = corpus.open_snapshot(snapshot, keyring=house.keyring, folder=house.snapshots).units.reveal()
    found = [subject_of(house, each.name) in units for each in canaries]
    early, right = when is not None and when < frozen, found == canaries.included
    figures = {"canaries": len(canaries), "committed_before_freezing": early, "planted_as_committed": right}
    said = bounds.Verdict.FAIL if not right else bounds.Verdict.PASS if early else bounds.Verdict.INCONCLUSIVE
    return bounds.Layer(name="canaries as committed", verdict=said, figures=figures)


def _log_likelihoods(house: House, module: nn.Module, base: Base, canaries: Canaries) -> NDArray[np.float64]:
    return membership.log_likelihoods(module, base.tokenizer, canaries.texts, token_budget=house.project.run.token_budget)


def _children(
    house: House,
    private: nn.Module,
    base: Base,
    canaries: Canaries,
    untouched: NDArray[np.float64],
    *,
    trade_off: bounds.TradeOff,
    level: float,
) -> list[bounds.Layer]:
    """Audits the model as it will be deployed, with the same canaries."""
    kinds, found = house.project.audit.deployed, []
    for kind, child in deployed.children(private, kinds):
        scored = _log_likelihoods(house, child, base, canaries) - untouched
        fpr = house.project.audit.false_positive_rate
        found.append(deployed.layer(kind, scored, canaries.included, trade_off=trade_off, fpr=fpr, level=level / len(kinds)))
    return found


def _attack(
    house: House, trained: Mapping[str, Any], base: Base, private: nn.Module, observer: Observer, *, trade_off: bounds.TradeOff, level: float
) -> dict[str, Any]:
    """Layers 3 and 4 on the records of those who were trained on and of those whom the coin withheld; and the most exposed, without names. All of it stays inside."""
    rules = house.project.audit
    if trained.get("withheld") is None:
        said = bounds.Verdict.INCONCLUSIVE
        layers = [bounds.Layer(name=name, verdict=said, figures={"withheld": rules.withheld}).to_json() for name in records.NAMES]
        return {"layers": layers, "people": [], "roc": {}}
    observer.note("attacking real records")
    found = records.attack(_attacked(house, trained), _means(house, base, private, observer), trade_off=trade_off, level=level)
    exposed = risk.ranked(found.scores, found.members, trade_off=trade_off) if len(found.scores) else []
    return {
        "layers": [layer.to_json() for layer in found.layers],
        "people": [each.figures() for each in exposed],
        "roc": {name: [list(point) for point in points] for name, points in found.roc.items()},
    }


def _told(layer: Mapping[str, Any]) -> bounds.Layer:
    """What leaves of a layer on real records: FAIL, or that it did not fail. PASS and INCONCLUSIVE differ by how many people there are, which is private."""
    failed = layer["verdict"] == bounds.Verdict.FAIL
    return bounds.Layer(name=layer["name"], verdict=bounds.Verdict.FAIL if failed else bounds.Verdict.INCONCLUSIVE, figures={})


def _attacked(house: House, trained: Mapping[str, Any]) -> records.Attacked:
    """At most `[audit] people` on each side who have not withdrawn, chosen by a keyed hash, with two records each."""
    key, planted = house.keyring.purpose("attacked"), {subject_of(house, each.name) for each in plant_canaries(house)}
    rows: list[tuple[str, str, bool]] = []
    for root, inside in ((trained["snapshot"], True), (trained["withheld"], False)):
        snapshot = corpus.open_snapshot(Digest(root), keyring=house.keyring, folder=house.snapshots)
        recorded = corpus.digests(snapshot, house.keyring)
        gone = {digest for digest, _ in house.consent.revoked(recorded, house.project.purpose)}
        units = {
            subject: positions
            for subject, positions in snapshot.units.reveal().items()
            if subject not in planted and gone.isdisjoint(recorded[position] for position in positions)
        }
        chosen = sorted(units, key=lambda subject: key.mac(subject.encode()))[: house.project.audit.people]
        where = [(subject, position) for subject in chosen for position in units[subject][:2]]
        texts = corpus.texts(snapshot, [position for _, position in where], house.keyring)
        rows += [(text, subject, inside) for text, (subject, _) in zip(texts, where, strict=True)]
    return records.Attacked(texts=[row[0] for row in rows], subjects=[row[1] for row in rows], members=np.array([row[2] for row in rows]))


def _means(house: House, base: Base, private: nn.Module, observer: Observer) -> records.Means:
    """What the attacker has: the base, adapters trained on public text alone, public beginnings."""
    rules, held_out = house.project.audit, _frozen_public(house, "evaluation")
    key = house.keyring.purpose("attack")
    return records.Means(
        module=private,
        reference=base.module,
        tokenizer=base.tokenizer,
        key=key.stream("draws"),
        references=_references(house, base, held_out, key, observer),
        population=held_out,
        neighbours=rules.neighbours,
        prompts=[" ".join(held_out[number % len(held_out)].split()[: 4 + number % 5]) for number in range(rules.answers)],
        token_budget=min(512, house.project.run.token_budget),
    )


def _references(house: House, base: Base, held_out: Sequence[str], key: Key, observer: Observer) -> list[nn.Module]:
    """Reference adapters of the audited kind, each on a random half of the project's public text: never on a sensitive record (PITFALLS 38). They live in memory only."""
    text, made = _frozen_public(house, "public"), []
    for number in range(house.project.audit.references if text else 0):
        coins = key.stream("half", number).bytes(len(text))
        half = PublicText.of(
            [each for each, coin in zip(text, coins, strict=True) if coin & 1][:128], sensitivity=Sensitivity.PUBLIC, basis=Basis.CONSENT
        )
        setup = _setup(house, base, held_out=PublicText(tuple(held_out[:1])), evaluations=1)
        steps = -(-len(half.texts) // CONTROL_BATCH)
        made.append(
            loop.fit(
                half, setup=setup, steps=steps, batch=CONTROL_BATCH, order=key.stream("order", number), on_step=_shown(observer, "reference")
            ).module
        )
    return made


def _frozen_public(house: House, name: str) -> tuple[str, ...]:
    """Texts of the public snapshot that was frozen last under this name; none when there is no such."""
    found = _last_public(house, name)
    return found.texts if found else ()


def _last_public(house: House, name: str) -> PublicText | None:
    roots = [entry.subjects[0] for entry in house.log.select(Predicate.FROZEN) if entry.fields["name"] == name]
    return _public_text(house, corpus.open_snapshot(roots[-1], keyring=house.keyring, folder=house.snapshots)) if roots else None


def _recitation(house: House, base: Base, models: Mapping[str, tuple[nn.Module, NDArray[np.float64]]], canaries: Canaries) -> dict[str, Any]:
    """Asks both models, each with its scores, to complete canaries: the same prompts, side by side. Canaries are generated text, so they may be shown."""
    planted, held_out = ([each for each in canaries if each.included is side][:RECITED] for side in (True, False))
    budget = house.project.run.token_budget
    said = {name: extraction.recite(module, base.tokenizer, [*planted, *held_out], token_budget=budget) for name, (module, _) in models.items()}
    shown = max(range(len(planted)), key=lambda row: said["control"][row].matched_fraction)
    return {
        "tried": len(planted),
        "control": sum(each.exact for each in said["control"][: len(planted)]),
        "private": sum(each.exact for each in said["private"][: len(planted)]),
        "extraction": {name: extraction.measured(said[name], scores, canaries.included) for name, (_, scores) in models.items()},
        "example": {"prompt": planted[shown].prefix, **{name: said[name][shown].continuation for name in ("control", "private")}},
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
        "roc",
        "control_roc",
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
        house.access.require(Action.RELEASE, who=current_user(), about=trained["adapter"])
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
    gates = [*_gates(house, trained["guarantee"], audited), _basis_gate(house, trained)]
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
    config = _config_of(house, "release")  # it reads the log, which no other transaction may hold open
    with house.store.transaction() as tx:
        kind = Predicate.RELEASED if holds else Predicate.WITHHELD
        house.log.append(tx, Statement(predicate=kind, subjects=(Digest(trained["adapter"]),), fields=fields))
        result = {"decision": "released" if holds else "withheld", **fields}
        _record(tx, "release", config, result)
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
        _verdict_gate(house, audited),
        _gate("epsilon (PLD)", f"<= {rules.max_epsilon:g}", guarantee["epsilon"], guarantee["epsilon"] <= rules.max_epsilon),
        _gate("certified lower bound", "<= epsilon", audited["epsilon_lower"], audited["epsilon_lower"] <= guarantee["epsilon"]),
    ]


def _verdict_gate(house: House, audited: Mapping[str, Any]) -> dict[str, Any]:
    """The audit's verdict is one of those that may leave, or it saw nothing and a named person answers for that."""
    verdicts = house.project.release.verdicts
    by = _answered_for(house) if audited["verdict"] == "INCONCLUSIVE" else None
    got = f"{audited['verdict']}, overridden by {by}" if by else audited["verdict"]
    return _gate("audit verdict", " or ".join(verdicts), got, by is not None or audited["verdict"] in verdicts)


def override_inconclusive(house: House, *, by: str, reason: str) -> None:
    """Lets a model leave whose audit could have seen nothing, in the name of a person, in the log. A FAIL cannot be overridden.

    Raises:
        NotFound: when nothing was audited.
        PlanInvalid: when the audit was not INCONCLUSIVE, or nobody is named.
    """
    house.access.require(Action.APPROVE, who=current_user())
    audited = _needed(house, "audit")
    if audited["verdict"] != "INCONCLUSIVE":
        raise PlanInvalid("an INCONCLUSIVE audit to override", value=audited["verdict"], remedy="PASS needs no override, FAIL admits none.")
    if not by.strip() or not reason.strip():
        raise PlanInvalid("the name and the reason of whoever overrides", remedy="Give --by and --reason.")
    fields: dict[str, JSON] = {
        "rule": INCONCLUSIVE_RULE,
        "value": audited["verdict"],
        "reason": for_log(house, reason),
        "run": audited["run"],
        "by": by,
    }
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.OVERRIDDEN, subjects=(Digest(audited["adapter"]),), fields=fields))


def _answered_for(house: House) -> str | None:
    """Who answered for the last audit's silence: an override about its adapter that was logged after it."""
    audited = house.log.select(Predicate.AUDITED)
    if not audited:
        return None
    last, adapter = audited[-1].index, Digest(str(audited[-1].fields["adapter"]))
    found = [
        e for e in house.log.entries(adapter) if e.predicate is Predicate.OVERRIDDEN and e.index > last and e.fields["rule"] == INCONCLUSIVE_RULE
    ]
    return str(found[-1].fields["by"]) if found else None


def _basis_gate(house: House, trained: Mapping[str, Any]) -> dict[str, Any]:
    """Whoever withdrew since training is protected by the guarantee of their own unit, or the model does not leave."""
    if trained["guarantee"]["unit"] == house.project.privacy.unit:
        return _gate("basis", "none withdrawn, or DP for this unit", f"DP by {house.project.privacy.unit}", True)
    records = corpus.digests(corpus.open_snapshot(Digest(trained["snapshot"]), keyring=house.keyring, folder=house.snapshots), house.keyring)
    held = not house.consent.revoked(records, house.project.purpose)
    return _gate("basis", "none withdrawn, or DP for this unit", "held" if held else "withdrawn since", held)


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


def behind(house: House) -> Behind:
    """Returns what stands behind the gateway of this project (line 10): its verified release, read again on every call, its log and its policy for prompts.

    Raises:
        AccessDenied: when the user may not serve; on the call of `server`: NotReleased, EvidenceInvalid, DigestMismatch, when there is no release, or it is not what was signed.
    """
    from discreet.serve.local import DEFAULTS, Local
    from discreet.serve.run import Behind
    from discreet.serve.tenants import Limits
    from discreet.serve.trail import Trail

    house.access.require(Action.SERVE, who=current_user())
    serving, key = house.project.serve, house.keyring.purpose("gateway")
    current: list[Local] = []

    def server() -> Local:
        released = load_release(house.releases / released_name(house), public_key=house.log.public_key())
        _refuse_unknown_parents(house, released)
        if not current or (current[0].name, current[0].digest) != (released.name, released.adapter):
            engine = gateway.open_engine(released, load_base(house, None, Silent()), public_key=house.log.public_key(), key=key)
            defaults = dataclasses.replace(DEFAULTS, max_new_tokens=serving.max_new_tokens)
            current[:] = [Local(engine, name=released.name, adapter=released.adapter, defaults=defaults)]
        return current[0]

    return Behind(
        name=f"the released model {released_name(house)}",
        server=server,
        key=key,
        trail=Trail(house.store, house.log),
        policy=deid.configured(house.project.deid, deid.Channel.PROMPT),
        limits=Limits(max_request_bytes=serving.max_request_bytes),
    )


def subject_of(house: House, unit: str, *, source: str = "") -> SubjectId:
    """Returns the pseudonym of a person as the project's sources name them, or of one record of a public source."""
    if source:
        return subject_id(house.keyring, unit=f"record/{source}", value=unit)
    return subject_id(house.keyring, unit=house.project.privacy.unit, value=unit)


def _refuse_unknown_parents(house: House, released: Release) -> None:
    with house.store.transaction() as tx:
        known = lineage.is_known(tx, released.adapter) and lineage.is_known(tx, released.base) and bool(lineage.ancestors(tx, [released.adapter]))
    if not known:
        raise NotReleased(
            "a model whose parents are known", value=released.adapter, remedy="It was withdrawn, or nobody knows what it was made from."
        )


NO_SUBJECTS: Mapping[str, str] = {
    "cohorts": "HMACs of pseudonyms under a key of their own, which have to outlive the erasure: a budget is not refunded",
    "cli": "text that the operator asked to have redacted, where they said",
    "config": "parameters that the operator wrote",
    "deid.scan": "compiled patterns, in the user's cache",
    "demo": "generated people, written as the project's sources: `sources` is their store",
    "dossier": "computed from the log",
    "derived": "text that a released model wrote: a node of the lineage below the model, decided with it",
    "duties": "public keys, where the operator said",
    "federate": "the rosters and terms of a fleet",
    "federated.processes": "certificates, keys of nodes, the relay app",
    "federated.journal": "masked, clipped, noised sums of a site, which name nobody",
    "federated.site": "rosters, receipts and noised sums; a site's records are in its own project",
    "evidence.log": "salted commitments; requests under an HMAC",
    "evidence.witness": "a witness's own key and checkpoints",
    "governance.access": "operators, not subjects",
    "governance.erasure": "suppressions as HMACs, which have to outlive the erasure; its scope is emptied by the certificate",
    "governance.lineage": "digests; those of the subject's records are forgotten when the keys are shredded",
    "keys": "the subject's key is shredded by the machine itself; an HMAC stays as its tombstone",
    "ledger": "budgets under pseudonyms by HMAC, which have to outlive the erasure: a budget is not refunded",
    "model": "weights and base models: decided by the machine itself, `models decided`",
    "pipeline": "digests, parameters and curves on public text; releases are weights",
    "redaction": "text that the operator asked to have redacted, where they said",
    "plot": "charts of the report",
    "report": "computed from the log",
    "serve.learning": "rows of the project's own source files: `sources` is their store",
    "serve.trail": "roll-ups of a gateway: digests and counts by label, never text or users",
    "serve.gateway": "a private copy of released weights while it serves",
    "train.search": "which settings were tried and their scores, sealed under the run's key and gone when it closes",
    "store": "the database itself: compacted by the machine, with its write-ahead log",
}
"""Modules that write files or tables and are no store of the tuple below, each with the reason. An architecture test holds that there is no third kind."""


def erasure_of(house: House) -> Erasure:
    """Returns the erasure over the closed tuple of all stores of this project."""
    project = house.project
    return Erasure(
        house.store,
        house.keyring,
        house.log,
        stores=(
            _OpenRuns(house),
            SourceFiles(project, house.keyring, house.store),
            house.consent,
            house.catalog,
            corpus.SnapshotStore(house.snapshots, house.keyring),
        ),
        derived=(
            CheckpointStore(project.state / "runs", house.keyring, snapshots=corpus.SnapshotStore(house.snapshots, house.keyring)),
            _UnfinishedWeights(house),
        ),
        models=_ProjectModels(house),
        unit=project.privacy.unit,
        max_epsilon=project.release.max_epsilon,
        backup_days=project.erasure.backup_days,
        journal=project.path(project.erasure.journal),
    )


@final
class _OpenRuns:
    """Runs that were killed on a snapshot of the subject: closed, and their keys destroyed; what they spent stays spent. Their states are `CheckpointStore`'s."""

    name = "open runs"

    def __init__(self, house: House) -> None:
        self._house = house

    def holds(self, subject: SubjectId) -> list[Digest]:
        """Returns the snapshots of the subject on which a run is open."""
        theirs = set(corpus.SnapshotStore(self._house.snapshots, self._house.keyring).holds(subject))
        return sorted({run.snapshot for run in self._house.ledger.open_runs() if run.snapshot in theirs and run.snapshot is not None})

    def purge(self, subject: SubjectId) -> None:
        theirs = self.holds(subject)
        for run in self._house.ledger.open_runs():
            if run.snapshot in theirs:  # its population is no longer what it reserved, and its key could still take the noise away
                _abandon(self._house, run)

    def absence(self, subject: SubjectId) -> bool:
        return not self.holds(subject)


@final
class _UnfinishedWeights:
    """Weights trained without privacy on public text that a killed run left before their node was written. No decision can reach them, so all go, whoever asks: they are made again, the same."""

    name = "unfinished weights"

    def __init__(self, house: House) -> None:
        self._house = house

    def holds(self, subject: SubjectId) -> list[Digest]:  # noqa: ARG002  # nobody can tell from weights, and they have no node
        return []

    def purge(self, subject: SubjectId) -> None:  # noqa: ARG002  # see the class
        for folder in self._unnamed():
            shutil.rmtree(folder)

    def absence(self, subject: SubjectId) -> bool:  # noqa: ARG002  # see the class
        return not self._unnamed()

    def _unnamed(self) -> list[Path]:
        found = _public_weights(self._house)
        with self._house.store.transaction() as tx:
            known = {artifact.digest for artifact in lineage.find_all(tx, [digest for digest in found.values() if digest])}
        return [folder for folder, digest in found.items() if digest not in known]


def _public_weights(house: House) -> dict[Path, Digest | None]:
    """Folders of weights that public text alone has made, with their digests; None for what a killed write left."""
    runs = [folder for folder in (house.project.state / "runs").glob("*/*") if folder.name.lstrip(".").startswith(PUBLIC_ADAPTER)]
    adapters = {folder: _adapter_digest(folder) for folder in runs}
    return adapters | {folder: _base_digest(folder) for folder in (house.project.state / "models").glob("*")}


@final
class _ProjectModels:
    """The project's models, for the erasure."""

    def __init__(self, house: House) -> None:
        self._house = house

    def transcript(self, digest: Digest) -> Transcript:
        """Of the model itself, or of the weakest model that it was derived from."""
        with self._house.store.transaction() as tx:
            above = [a.digest for a in lineage.ancestors(tx, [digest]) if a.kind is lineage.Kind.MODEL]
        recorded = {e.subjects[0]: e.fields["guarantee"] for e in self._house.log.select(Predicate.TRAINED) if e.fields["adapter"]}
        concerned = [digest] if digest in recorded else [each for each in above if each in recorded]
        found = [_transcript(recorded[each]) for each in concerned]
        return max(found, key=lambda each: each.epsilon, default=Transcript())

    def test(self, subject: SubjectId, digest: Digest) -> Finding:
        """Compares the subject's frozen text with the same text under other stand-ins, which nobody trained on: under the null they are exchangeable, so the rank is an
        exact test. 39 twins first; only a text that beats them all is looked at again among 999, so that one test in five hundred is a false alarm. What is not exposed is tested once more after a few steps on public text: relearning brings back what is merely covered."""
        written = synthetic_file(self._house, digest)
        if written is not None:
            return self._searched(subject, written.read_text(encoding="utf-8"))
        adapter = next(
            (p for p in sorted((self._house.project.state / "runs").glob("*/adapter")) if _adapter_digest(p) == digest),
            None,
        )
        own = _own_texts(self._house, subject) if adapter else []
        if adapter is None or not own:
            return Finding.NO_POWER
        try:
            base = load_base(self._house, None, Silent())
        except NotFound:  # the weights are there, what they were trained on is not: nobody can be asked
            return Finding.NO_POWER
        found = self._ranked(subject, own, base, model.load_adapter(base, adapter))
        relearnt = _relearnt(self._house, base, adapter) if found is Finding.NOT_EXPOSED else None
        return found if relearnt is None else self._ranked(subject, own, base, relearnt)

    def _searched(self, subject: SubjectId, text: str) -> Finding:
        """Whether text that a model wrote holds one of the subject's texts, or an identifier that their source declares."""
        own = _own_texts(self._house, subject)
        values = {value for _, known, _ in own for group in known.values() for value in group if len(value) >= LEAST_IDENTIFIER}
        said = [json.dumps(each, ensure_ascii=False)[1:-1] for each in (*(mine for mine, _, _ in own), *values)]
        return Finding.EXPOSED if any(each in text for each in said) else Finding.NOT_EXPOSED if own else Finding.NO_POWER

    def _ranked(self, subject: SubjectId, own: Sequence[_Own], base: Base, module: nn.Module) -> Finding:
        for twins in (39, 999):
            rank = _rank_among_twins(self._house, subject, own, base, module, twins=twins)
            if rank is None:
                return Finding.NO_POWER
            if rank > 0:
                return Finding.NOT_EXPOSED if twins == 39 or rank > 1 else Finding.EXPOSED
        return Finding.EXPOSED

    def withdraw(self, digest: Digest) -> None:
        """Destroys every copy of the weights, or the text that they wrote where it was put, forgets the stages that made them and says so in the log."""
        house = self._house
        written = synthetic_file(house, digest)
        if written is not None:
            written.unlink()
        for adapter in [*(house.project.state / "runs").glob("*/*adapter"), *house.releases.glob("*/adapter")]:
            if _adapter_digest(adapter) == digest:
                shutil.rmtree(adapter.parent)
        for folder, found in _public_weights(house).items():
            if found == digest:
                shutil.rmtree(folder)
        with house.store.transaction() as tx:
            for row in tx.execute(select(_stages)).all():
                result = json.loads(row.result)
                if digest in (result.get("adapter"), result.get("base")):
                    tx.execute(delete(_stages).where(_stages.c.name == row.name, _stages.c.config == row.config))
            fields: dict[str, JSON] = {"adapter": digest, "reasons": ["erasure"]}
            house.log.append(tx, Statement(predicate=Predicate.WITHHELD, subjects=(digest,), fields=fields))


def record_synthetic(tx: Connection, digest: Digest, file: Path) -> None:
    """Remembers where text that a model wrote was put: inside, so that an erasure finds it."""
    tx.execute(delete(_stages).where(_stages.c.name == f"text/{digest[-24:]}"))
    _record(tx, f"text/{digest[-24:]}", "", {"file": str(file.resolve()), "digest": digest})


def synthetic_file(house: House, digest: Digest) -> Path | None:
    """Returns the file of text that a model wrote, where it still is what was written; a copy elsewhere is the operator's to destroy."""
    known = _result(house, f"text/{digest[-24:]}", "")
    file = Path(known["file"]) if known else None
    if file is None or not file.is_file() or "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        return None
    return file


def _adapter_digest(folder: Path) -> Digest | None:
    try:
        return model.adapter_digest(folder) if folder.is_dir() else None  # it may have gone with the run beside it
    except NotFound:
        return None


def _base_digest(folder: Path) -> Digest | None:
    try:
        return model.base_digest(folder)
    except (NotFound, ModelUnsafe):
        return None


def _transcript(guarantee: Mapping[str, Any] | None) -> Transcript:
    """Figures from which a bound for a group follows only where the run was one of plain Poisson-sampled Gaussian steps: elsewhere no noise is claimed."""
    names = ("unit", "relation", "epsilon", "delta", "sampling_probability", "noise_multiplier", "steps")
    if not guarantee:
        return Transcript()
    plain = guarantee.get("sampler", "poisson") == "poisson" and not {"search", "bands", "adaptive"} & guarantee.keys()
    return Transcript(**{name: guarantee[name] for name in names} | ({} if plain else {"noise_multiplier": 0.0}))


_Own = tuple[str, Mapping[str, tuple[str, ...]], deid.Policy]
"""A text, the identifiers that it is known to be about, and the policy of its source."""


def _own_texts(house: House, subject: SubjectId) -> list[_Own]:
    """What the sensitive training sources say about a subject now."""
    told: list[_Own] = []
    collected = set(house.catalog.holds(subject))  # a source may have grown: what came later was never trained on
    for section in house.project.source:
        if section.role != "train":
            continue
        found, policy = _rows_of(house, section, subject), _policy(house, section)
        told += [(text.reveal(), known.reveal(), policy) for digest, text, known in found if digest in collected]
    return told


def _rows_of(
    house: House, section: SourceSection, subject: SubjectId
) -> list[tuple[Digest, Sensitive[str], Sensitive[Mapping[str, tuple[str, ...]]]]]:
    """A person's rows in a source as it lies there now, registered or not; none where everybody was taken out of it."""
    try:
        return house.catalog.texts_of(house.catalog.present(house.project, section), subject)
    except SourceEmpty:
        return []


def _relearnt(house: House, base: Base, adapter: Path) -> nn.Module | None:
    """The adapter after a few steps on the project's public text, in memory only; None where there is none. No sensitive record is read (PITFALLS 38)."""
    texts = _frozen_public(house, "public")[:RELEARNT]
    if not texts:
        return None
    public = PublicText.of(texts, sensitivity=Sensitivity.PUBLIC, basis=Basis.CONSENT)
    setup = _setup(house, base, held_out=PublicText(public.texts[:1]), start=adapter, evaluations=1)
    order = house.keyring.purpose("relearning").stream("order")
    return loop.fit(public, setup=setup, steps=-(-len(texts) // 4), batch=4, order=order).module


def _rank_among_twins(
    house: House,
    subject: SubjectId,
    own: Sequence[_Own],
    base: Base,
    module: nn.Module,
    *,
    twins: int,
) -> int | None:
    """Returns how many of `twins` the module prefers to the subject's own text; None when stand-ins make no difference."""

    def frozen(key: Key) -> list[str]:
        return [deid.redact(text, policy, known=known, key=key).text for text, known, policy in own]

    mine = frozen(house.keyring.subject(subject))
    others = [frozen(Key.random()) for _ in range(twins)]
    if all(other == mine for other in others):
        return None
    texts = [text for version in (mine, *others) for text in version]
    scored = membership.scores(
        module, base.tokenizer, texts, token_budget=house.project.run.token_budget, adapter_off=lambda: model.adapter_off(module, base)
    )
    sums = scored.reshape(twins + 1, len(own)).sum(axis=1)
    return int((sums[1:] >= sums[0]).sum())


def _refuse_unfinished(house: House) -> None:
    if erasure_of(house).unfinished():
        raise ErasureIncomplete(
            "every erasure to be finished before anything else is made",
            value="somebody is restricted without a certificate: a killed erasure, or a restored backup",
            remedy="discreet erase --resume",
        )


def erase(house: House, unit: str, *, source: str = "") -> dict[str, Any]:
    """Erases one person from every store (line 11) and returns the certificate. An unknown person gets the same answer.

    Args:
        house: the open project.
        unit: the person as the sources name them.
        source: the public source whose record `unit` is; empty for a privacy unit of the project.

    Raises:
        AccessDenied: when the operator may not, or a request of theirs is not verified.
        ErasureIncomplete: when a store still holds them; the name of the store and the responsible role are the value.
    """
    who = current_user()
    house.access.require(Action.ERASE, who=who)
    identity = Identity(method="vouched for by the operator", by=who.name)
    return _erase(house, subject_of(house, unit, source=source), identity=identity, reason=Reason.REQUEST)


def _erase(house: House, subject: SubjectId, *, identity: Identity | None, reason: Reason) -> dict[str, Any]:
    certificate = erasure_of(house).execute(subject, identity=identity, reason=reason)
    [entry] = [each for each in house.log.entries(certificate.request) if each.index == certificate.entry]
    return {
        "subject": certificate.request,
        "stores": list(certificate.stores),
        "failed": [],
        "models": _rules(house),
        "certificate": certificate.entry,
        "backups_until": certificate.backups_until,
        "statement": entry.envelope.decode(),
        "proof": bytes(house.log.prove(certificate.entry)).decode(),
        "key_destroyed": True,
    }


def _rules(house: House) -> list[str]:
    """What would be decided about each model, whoever asks: the same list for everybody, or it would say who is in."""
    trained = [entry for entry in house.log.select(Predicate.TRAINED) if entry.fields["adapter"]]
    kept = {e.subjects[0]: _transcript(e.fields["guarantee"]).unit == house.project.privacy.unit for e in trained}
    return [f"{digest}: {Decision.KEPT if private else Decision.WITHDRAWN}" for digest, private in sorted(kept.items())]


def request_erasure(house: House, unit: str, *, source: str = "") -> str:
    """Receives a request and returns the code for the address on file; nothing changes before it is confirmed."""
    house.access.require(Action.ERASE, who=current_user())
    return erasure_of(house).code(subject_of(house, unit, source=source)).reveal()


def confirm_erasure(house: House, unit: str, code: str, *, source: str = "") -> dict[str, Any]:
    """Erases a person whose identity the code proves.

    Raises:
        AccessDenied: when the code is wrong.
    """
    subject = subject_of(house, unit, source=source)
    erasure_of(house).confirm(subject, code)
    return _erase(house, subject, identity=None, reason=Reason.REQUEST)


def resume_erasures(house: House) -> int:
    """Finishes what was killed, and erases again whoever a restored backup brought back. Returns how many."""
    house.access.require(Action.ERASE, who=current_user())
    subjects = erasure_of(house).unfinished()
    for subject in subjects:
        _erase(house, subject, identity=None, reason=Reason.RESTORED)
    return len(subjects)


def retention(house: House) -> dict[str, Any]:
    """Erases whoever is past retention with every record, and closes the requests whose backups are past their horizon: the same machine, on a timer.

    Raises:
        ClockBackwards: when the clock was set back.
        SourceMissing, SourceNotText, RecordInvalid, RecordConflict: when a source cannot be read: nobody's erasure could be verified then, so nobody is erased.
    """
    who = current_user()
    house.access.require(Action.ERASE, who=who)
    _sight_growth(house)
    due = house.catalog.past_retention(house.project.source)
    for subject in due:
        _erase(house, subject, identity=Identity(method="retention", by=who.name), reason=Reason.RETENTION)
    erasure = erasure_of(house)
    closed = erasure.close_due()
    waiting = [{"request": p.request, "state": p.state.value, "reason": p.reason.value, "overdue": p.overdue} for p in erasure.open_requests()]
    return {"erased": len(due), "closed": closed, "open": waiting}


def _sight_growth(house: House) -> None:
    """Lets the retention of rows run that a source has gained and nobody collected yet. A source that was never there holds nobody."""
    registered = {source["name"] for source in house.catalog.sources()}
    for section in house.project.source:
        try:
            source = house.catalog.present(house.project, section)
        except SourceEmpty:
            continue
        except SourceMissing:
            if section.name in registered:
                raise
            continue
        house.catalog.sight(source)


def drill(house: House) -> dict[str, Any]:
    """Plants a generated person in every store, erases them like anybody else, and searches every byte of the state for them. Run it weekly.

    Raises:
        ErasureIncomplete: when a byte of them is left; the value names the file.
    """
    house.access.require(Action.ERASE, who=current_user())
    who = f"drill-{Key.random().stream('drill').bytes(8).hex()}"
    secret = f"{canary.draw_secret(Key.random().stream('drill'))} {who}"
    rows = [{"id": f"{who}-{number}", "unit": who, "text": f"The drill says {secret}, note {number}."} for number in range(3)]
    section = _generated_section(house, who, owner="erasure drill")
    kept, _ = _source_documents(house, section, Silent(), generated=_rows_as_lines(rows))
    frozen = _freeze(house, who, kept)
    subject = subject_of(house, who)
    began = time.monotonic()
    outcome = _erase(house, subject, identity=Identity(method="drill", by=current_user().name), reason=Reason.DRILL)
    shutil.rmtree(frozen.path)
    left = remains(house, [secret, subject, *(row["text"] for row in rows)])
    if left:
        raise ErasureIncomplete("no byte of the planted person to be left", value=f"{', '.join(left)}; responsible: privacy officer")
    return {"certificate": outcome["certificate"], "stores": outcome["stores"], "seconds": round(time.monotonic() - began, 2), "left": []}


def remains(house: House, needles: Sequence[str], *, tokens: Sequence[Sequence[int]] = ()) -> list[str]:
    """Returns the files of the project's state that hold something of somebody (`governance.residue`), every living document decoded among them.

    Args:
        needles: their texts and identifiers.
        tokens: their texts as token ids.
    """
    found = residue.find(house.project.state, needles, tokens=tokens)
    for root in sorted(house.snapshots.glob("*")) if house.snapshots.is_dir() else []:
        if len(root.name) == 64:
            snapshot = corpus.open_snapshot(Digest(f"sha256:{root.name}"), keyring=house.keyring, folder=house.snapshots)
            positions = [each for living in snapshot.units.reveal().values() for each in living]
            if any(needle in text for text in corpus.texts(snapshot, positions, house.keyring) for needle in needles):
                found.append(f"snapshots/{root.name} (decoded)")
    return found


def may_record_consent(house: House, unit: str) -> SubjectId:
    """Returns the pseudonym of a person whose words the operator may record.

    Raises:
        AccessDenied: when their role may not.
    """
    house.access.require(Action.CONSENT, who=current_user())
    return subject_of(house, unit)


def import_consent(house: House, file: Path) -> int:
    """Reads a CSV of subject, purpose ("*": every purpose) and basis (empty: withdrawn), and records it whole or not at all.

    Raises:
        SourceMissing, RecordInvalid: when it cannot be read or a line breaks a rule; nothing is recorded.
    """
    house.access.require(Action.CONSENT, who=current_user())
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise SourceMissing("a readable CSV file in UTF-8") from None
    words = []
    for number, row in enumerate(csv.DictReader(lines), start=2):
        subject, purpose, basis = (row.get(name) for name in ("subject", "purpose", "basis"))
        if not subject or not purpose or basis is None or basis not in ("", *Basis):
            raise RecordInvalid("subject, purpose and a basis of GDPR Art. 6 (or none, for a withdrawal)", value=f"line {number}")
        words.append((subject_of(house, subject), None if purpose == "*" else Purpose(purpose), Basis(basis) if basis else None))
    return house.consent.import_words(words)


def access_export(house: House, unit: str) -> dict[str, Any]:
    """Returns what the project holds about one person, for that person (GDPR Art. 15), in each source as it lies there now. Holds their text: it goes to them and nowhere else.

    Raises:
        SourceMissing: when a source cannot be read: an export that leaves it out would not be whole.
    """
    house.access.require(Action.ACCESS_EXPORT, who=current_user())
    subject = subject_of(house, unit)
    sources = []
    for section in house.project.source:
        held = _rows_of(house, section, subject)
        if held:
            declared = {"name": section.name, "owner": section.owner, "basis": section.basis.value, "purposes": list(section.purposes)}
            sources.append({**declared, "retention_days": section.retention_days, "records": [{"digest": d, "text": t.reveal()} for d, t, _ in held]})
    with house.store.transaction() as tx:
        digests = list(house.catalog.holds_in(tx, subject))
        made = lineage.descendants(tx, digests)
    words = [{"purpose": w.purpose, "basis": w.basis.value if w.basis else None, "at": w.at} for w in house.consent.history(subject)]
    derived = [{"digest": a.digest, "kind": a.kind.value, "protects": a.protects} for a in made]
    return {"controller": house.project.project.controller, "sources": sources, "consent": words, "derived": derived}


def lineage_export(house: House, *, unit: str = "", digest: str = "") -> list[dict[str, Any]]:
    """Returns OpenLineage run events for what was made from a person's records, or from an artifact."""
    house.access.require(Action.READ, who=current_user())
    with house.store.transaction() as tx:
        roots = list(house.catalog.holds_in(tx, subject_of(house, unit))) if unit else [Digest(digest)]
        return lineage.openlineage(tx, roots, namespace=house.log.origin)


def update(house: House, observer: Observer) -> dict[str, Any]:
    """Takes in what became of the sources: new records, the same ledger, training, audit and release anew; warns when the audit sees more than before.

    Raises:
        BudgetExhausted, NotReleased: as the stages do. What was released before is served on when no new model came to be.
    """
    house.access.require(Action.RUN, who=current_user())
    before = house.log.select(Predicate.AUDITED)
    again = [section.name for section in house.project.source if house.catalog.changed(house.project, section)]
    for section in house.project.source:
        if section.name in again:
            house.catalog.register_again(house.project, section)
    configs = {name: _config_of(house, name) for name in STAGES[1:]} if again else {}
    with house.store.transaction() as tx:
        done = [tx.execute(select(_stages).where(_stages.c.name == name, _stages.c.config == made)).one_or_none() for name, made in configs.items()]
        for name, made in configs.items():
            tx.execute(delete(_stages).where(_stages.c.name == name, _stages.c.config == made))
    try:
        outcome = run(house, until=None, observer=observer)
    except BaseException:
        if _result(house, "train", configs.get("train", "")) is None:
            with house.store.transaction() as tx:
                for row in done:
                    if row is not None:
                        tx.execute(insert(_stages).values(**row._mapping))
        raise
    bound = outcome["audit"]["epsilon_lower"]
    earlier = before[-1].fields["epsilon_lower"] if before else None
    rising = earlier is not None and bound > earlier
    if rising:
        observer.note(f"ALERT: the certified lower bound rose from {earlier:.2f} to {bound:.2f}")
    return {
        "changed": again,
        "run": outcome["train"]["run"],
        "verdict": outcome["audit"]["verdict"],
        "epsilon_lower": bound,
        "earlier": earlier,
        "rising": rising,
    }


def trace(house: House, digest: str) -> list[dict[str, Any]]:
    """Returns every statement about a record, snapshot or model, each with its envelope and its inclusion proof (a file of c2sp.org/tlog-proof)."""
    house.access.require(Action.READ, who=current_user())
    return [
        {
            "index": e.index,
            "time": e.time,
            "predicate": e.predicate.value,
            "fields": dict(e.fields),
            "statement": e.envelope.decode(),
            "proof": bytes(house.log.prove(e.index)).decode(),
        }
        for e in house.log.entries(Digest(digest))
    ]


def export_evidence(house: House, folder: Path, *, public: bool) -> tuple[Path, Path]:
    """Writes the evidence bundle and, beside it, the public key that verifies it."""
    house.access.require(Action.READ, who=current_user())
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
    house.access.require(Action.RUN, who=current_user())
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
    snapshot = corpus.open_snapshot(Digest(trained["snapshot"]), keyring=house.keyring, folder=house.snapshots)
    public, held_out = (_last_public(house, name) for name in ("public", "evaluation"))
    if held_out is None:
        raise NotFound("the held-out text that training froze")
    fitted = loop.fit(
        PublicText.of(_all_texts(house, snapshot), sensitivity=snapshot.sensitivity, basis=Basis.GENERATED),
        setup=_setup(house, load_base(house, public, observer), held_out=held_out),
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
    sections = (project.privacy, project.model, project.train, project.deid, *([project.search] if project.search.declared else []))
    return digest_of(
        [project.audit.canaries, project.budget.name, *([project.audit.withheld] if project.audit.withheld else [])]
        + [section.model_dump(mode="json") for section in sections]
        + [section.model_dump(mode="json") for section in project.source]
    )


def _config_of(house: House, name: str) -> str:
    """What a stage's result depends on: its run, and for a release the gates too."""
    if name.startswith("plan/"):
        return ""
    after = {"audit": (house.project.audit, None), "release": (house.project.audit, house.project.release)}.get(name, ())
    later = [section.model_dump(mode="json") for section in after if section is not None]
    if name == "release" and (by := _answered_for(house)):
        later.append({"overridden": by})
    return digest_of([_run_config(house), *later]) if later else _run_config(house)


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
