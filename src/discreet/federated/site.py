"""One site and the coordinator at work: databases, ledger and log around the protocol, whatever carries the messages (Flower in app.py, or one process).

    Site          a project folder whose corpus is frozen; `answer(request) -> reply` is all that a transport needs
    Coordinator   rounds over any `Exchange`: requests by site -> the replies that came in time; continues from its last checkpoint
    InProcess     the exchange of a simulation: sites and coordinator in one process, without a network

Every site keeps its own consent, de-identification, ledger and log. It computes the agreement itself from its copy of fleet.toml, pins roster and session (roster.json), and reserves and
spends the plan in its own ledger before its first contribution. A process that is started for every message takes up the round from its journal and the kept requests.

Guarantees: the coordinator's files hold nothing that was not released; a killed coordinator continues with the next round number, and no client opens more rounds
than the plan paid for; at the end each site has verified the transcript against its own receipts, or says what is wrong.

Does not cover: distributing fleet.toml and roster.json (the controllers agree on them outside); judging attestation evidence itself (an outside verifier does,
`Site.check_attestation`).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, final

from discreet import config, corpus
from discreet import model as models
from discreet.config import ModelSection, digest_of
from discreet.dp.accounting import rdp_epsilon
from discreet.dp.mechanism import event_of
from discreet.errors import DiscreetError, EvidenceInvalid, MessageReplayed, NotFound, RoundAborted, SourceMissing, TermsRefused
from discreet.evidence.log import Log
from discreet.evidence.statement import Predicate, Statement, canonical_json
from discreet.federated import fleet as fleets
from discreet.federated import secagg, transcript
from discreet.federated.fleet import Agreement, Correlated, FleetFile, Noise, Reals, Trainer, Worker
from discreet.federated.journal import Journal
from discreet.federated.masks import Words
from discreet.federated.secagg import STAGES, Opened, Policy, Receipt, Roster, Terms
from discreet.governance.access import Access, Action, current_user
from discreet.keys import Key, Keyring, open_master
from discreet.ledger import CloseReason, Ledger
from discreet.model import Base
from discreet.record import Digest
from discreet.store import Store, write_atomically
from discreet.train.parallel import ALONE, Ranks
from discreet.train.step import PrivateCorpus

ROSTER = "roster.json"
STATE = ".federation"
RETRIES = 10
"""Rounds that may abort in a run before the coordinator gives up."""

AGREEMENT_TRIES = 3
"""How often the last stage of a round is asked of those who have not answered: a share that was revealed to nobody's use would still have been paid for."""
ATTESTATION_S = 60.0
WAIT_S = 3600.0
"""How long a round waits for as many sites as it needs."""


class Exchange(Protocol):
    """A transport: carries requests, knows who is there."""

    def present(self) -> set[str]:
        """Returns the sites that are connected now."""
        ...

    def __call__(self, requests: Mapping[str, bytes], *, enough: int) -> Mapping[str, bytes]:
        """Sends each site its request and returns the replies that came in time; `enough` of them are enough, stragglers are not waited for much longer."""
        ...


class Observer(Protocol):
    """Hears rounds, clients, epsilon and bytes."""

    def note(self, line: str) -> None: ...

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None: ...


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """roster.json: who takes part in which training session."""

    id: str
    roster: Roster

    @staticmethod
    def load(folder: Path) -> Session:
        """Reads roster.json.

        Raises:
            SourceMissing: when the fleet has none yet.
        """
        path = folder / ROSTER
        if not path.is_file():
            raise SourceMissing(
                f"a {ROSTER} beside fleet.toml", value=str(folder), remedy="Collect the sites' keys: `discreet federate enroll -C SITE`."
            )
        fields = json.loads(path.read_text(encoding="utf-8"))
        clients = {name: bytes.fromhex(key) for name, key in fields["clients"].items()}
        return Session(id=fields["session"], roster=Roster(server=bytes.fromhex(fields["server"]), clients=clients))

    def save(self, folder: Path) -> None:
        fields = {"session": self.id, "server": self.roster.server.hex(), "clients": {name: key.hex() for name, key in self.roster.clients.items()}}
        write_atomically(folder / ROSTER, (json.dumps(fields, indent=2) + "\n").encode())


def binding(session: Session, agreement: Agreement) -> str:
    """Returns what a coordinator's attestation must carry as its report data: the session, the coordinator's key, the roster and the plan, as 64 hex digits."""
    said = {"session": session.id, "server": session.roster.server.hex(), "roster": session.roster.digest, "plan": agreement.digest}
    return hashlib.sha256(b"discreet attestation/1" + canonical_json(said)).hexdigest()


# A site


def prepare(folder: Path, *, name: str, snapshot: Digest, base: Path) -> None:
    """Records what ingest made of a site: which snapshot and which base model its rounds use."""
    fields = {"name": name, "snapshot": snapshot, "base": str(base)}
    write_atomically(folder / ".discreet" / "federation" / "site.json", json.dumps(fields).encode())


@final
class Site:
    """A site of the fleet, open: its project's database, keys, ledger and log, and the round it is in."""

    def __init__(self, folder: Path, *, fleet_folder: Path, ranks: Ranks = ALONE) -> None:
        """Opens a prepared site.

        Args:
            fleet_folder: of fleet.toml and roster.json.
            ranks: this process among those of the site (`torchrun`): the first one answers, the others `worker.assist`.

        Raises:
            SourceMissing: when the site was not prepared, or the fleet has no roster.
            NotFound: when the roster does not name this site with its key.
            AccessDenied: when the user of this process may not run the project.
        """
        self.project = config.load(folder)
        self.place = self.project.state / "federation"
        if not (self.place / "site.json").is_file():
            raise SourceMissing("a prepared site", value=str(folder), remedy="Run `discreet federate enroll -C SITE` first.")
        fields = json.loads((self.place / "site.json").read_text())
        self.name, self._root, self._base_path = str(fields["name"]), Digest(fields["snapshot"]), str(fields["base"])
        self.fleet, self.session = fleets.load_fleet(fleet_folder), Session.load(fleet_folder)
        self._store = Store(self.project.database_url())
        self._keyring = Keyring(self._store, open_master(self.project.master_location()))
        self._log = Log(self._store, self._keyring, f"discreet.{self.project.project.name}")
        self._ledger = Ledger(self._store, self._keyring, self._log)
        Access(self.project.access, store=self._store, keyring=self._keyring, log=self._log).require(Action.RUN, who=current_user())
        self.identity = self._keyring.signer("federation")
        if self.session.roster.clients.get(self.name) != self.identity.public_key().public_bytes_raw():
            raise NotFound("a roster that names this site with its key", value=self.name)
        self.journal = Journal(self._store)
        self.said = ""
        self._member: Generator[bytes, bytes, Receipt] | None = None
        self._ranks = ranks
        self._worker: Worker | None = None

    def close(self) -> None:
        self._store.close()

    def check_attestation(self, evidence: bytes, *, verifier: Sequence[str]) -> None:
        """Has an outside program judge what the coordinator says of itself, before this site answers anything. It can refuse and do nothing else.

        Args:
            evidence: as the coordinator gave it out; goes to the program's standard input.
            verifier: its command line; the binding (64 hex digits) is appended. Exit code 0 accepts.

        Raises:
            TermsRefused: when it does not accept.
        """
        bound = binding(self.session, self.agreement)
        try:
            accepted = subprocess.run([*verifier, bound], input=evidence, capture_output=True, timeout=ATTESTATION_S, check=False).returncode == 0
        except (OSError, subprocess.TimeoutExpired):
            accepted = False
        if not accepted:
            raise TermsRefused("a coordinator whose attestation the verifier accepts", value=bound, remedy="Nothing left this site.")

    def answer(self, request: bytes) -> bytes:
        """Answers one message of the coordinator.

        Raises:
            Refused: when it breaks this site's policy; nothing leaves.
        """
        kind = secagg.kind_of(request)
        if kind == "close":
            return self._finish(request)
        if kind == "announce":
            self._charge()
            self._member = self._new_member()
        elif self._member is None:
            self._member = self._taken_up(kind)
        reply = self._sent(kind, request)
        write_atomically(self.place / f"{kind}.request", request)
        self.said = f"{self.name}: answered {kind}"
        if kind == STAGES[-1]:
            with suppress(StopIteration):
                self._member.send(b"")
            self._keep_receipt(reply)
            self._member = None
        return reply

    def receipts(self) -> list[Receipt]:
        """Returns the receipts of this session, by round."""
        return [Receipt(**json.loads(path.read_text())) for path in sorted((self.place / self.session.id).glob("receipt-*.json"))]

    def outcome(self) -> dict[str, Any] | None:
        """Returns what this site verified at the end of the session; None before."""
        path = self.place / self.session.id / "receipt.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def leave(self) -> None:
        """Takes this site out of the session for good: no further answer, the run's key destroyed. What was spent stays spent."""
        run = f"federated-{self.session.id}"
        if self._ledger.has_run(run) and (held := self._ledger.of_run(run)).state.value != "closed":
            self._ledger.close(held, CloseReason.CRASH, executed_steps=self._spent_steps)
        self._keyring.close_run(run)

    def _sent(self, kind: str, request: bytes) -> bytes:
        """The member's answer. A stage that was answered before is asked again by a coordinator that was killed: the round is taken up anew and the journal answers."""
        try:
            with suppress(DiscreetError, StopIteration):
                return self._member.send(request) if self._member is not None else b""
            self._member = self._taken_up(kind)
            return self._member.send(request)
        except (DiscreetError, StopIteration) as error:
            self._member = None  # a refused message ends the generator, not the round
            if isinstance(error, StopIteration):
                raise MessageReplayed("a message of a stage that is still open", value=kind if kind in STAGES else None) from None
            raise

    @property
    def _spent_steps(self) -> int:
        return self.agreement.spent_steps(min(len(self.receipts()), self.fleet.rounds))

    def _taken_up(self, kind: str) -> Generator[bytes, bytes, Receipt]:
        """The round that an earlier process of this site was in: its requests again, answered from the journal."""
        member = self._new_member()
        for stage in STAGES[: STAGES.index(kind)] if kind in STAGES else ():
            path = self.place / f"{stage}.request"
            if path.is_file():
                member.send(path.read_bytes())
        return member

    def _new_member(self) -> Generator[bytes, bytes, Receipt]:
        member = secagg.client(
            self._contribution,
            name=self.name,
            identity=self.identity,
            policy=self.policy,
            stream=self._run_key.stream("protocol"),
            journal=self.journal,
        )
        next(member)
        return member

    def _contribution(self, terms: Terms, payload: bytes) -> Words:
        """The worker's vector. Under bounded participation a step that this site helped to open is not taken part in again, whatever the coordinator names.

        A sum that the others opened while this site was told that it had dropped out does not count: against that the coordinator is trusted, as it is with the noise (fleet.py).
        """
        if self.agreement.is_bounded:
            step = fleets.read_payload(payload, base=self.base.digest)[2]
            self.journal.once(terms.session, terms.number, f"step-{step}", payload, lambda: b"taken part")
            if self.journal.count(terms.session, f"step-{step}", STAGES[-1], other_than=terms.number):
                raise TermsRefused("a step that was not opened before", value=step, remedy="Nothing left this client.")
        return self.worker.contribution(terms, payload)

    @property
    def policy(self) -> Policy:
        agreement = self.agreement
        return Policy(
            roster=self.session.roster,
            session=self.session.id,
            plan=agreement.digest,
            minimum=self.fleet.minimum,
            dimension=agreement.encoding.dimension,
            bits=self.fleet.bits,
            server=self.fleet.server,
            rounds=self.fleet.rounds,
        )

    @cached_property
    def base(self) -> Base:
        """The base model that the site enrolled with."""
        return models.load_base(self._base_path, cache=self.project.state / "models")

    @cached_property
    def agreement(self) -> Agreement:
        """What the site makes of fleet.toml for itself; it outlives the session."""
        return agreement_for(self.fleet, self.base, self.project.model)

    @property
    def worker(self) -> Worker:
        """The site's model and corpus, opened when first needed.

        Raises:
            Forgotten: when the session is over and the run's key destroyed.
        """
        if self._worker is None:
            snapshot = corpus.open_snapshot(self._root, keyring=self._keyring, folder=self.project.state / "snapshots")
            count = 1 + max((position for held in snapshot.units.reveal().values() for position in held), default=-1)
            texts = corpus.texts(snapshot, range(count), self._keyring)
            private = PrivateCorpus.of(snapshot, texts, self.base, max_tokens=self.project.model.max_tokens)
            self._worker = Worker.of(
                self.agreement,
                base=self.base,
                section=self.project.model,
                corpus=private,
                run_key=self._run_key,
                run=self.project.run,
                ranks=self._ranks,
            )
        return self._worker

    @property
    def _run_key(self) -> Key:
        return self._keyring.run(f"federated-{self.session.id}")

    def _charge(self) -> None:
        """Opens the fleet's budget in this site's ledger, reserves the whole plan and spends it: before the first contribution, once."""
        plan, run = self.agreement.plan, f"federated-{self.session.id}"
        budget = f"fleet-{self.fleet.name}"
        self._ledger.open(budget, epsilon=self.fleet.epsilon, delta=self.fleet.delta, unit=plan.unit)
        snapshot = corpus.open_snapshot(self._root, keyring=self._keyring, folder=self.project.state / "snapshots")
        self._ledger.spend(self._ledger.reserve(budget, plan, snapshot, run))

    def _keep_receipt(self, reply: bytes) -> None:
        header = secagg.open_frame(reply, self.session.roster.clients[self.name], kind="reveal", terms=None).header
        announced = secagg.open_frame((self.place / "announce.request").read_bytes(), self.session.roster.server, kind="announce", terms=None).header
        masked = self.journal.answer(self.session.id, announced["terms_json"]["number"], "delivery")
        receipt = Receipt(
            session=self.session.id,
            number=announced["terms_json"]["number"],
            terms=header["terms"],
            model=announced["terms_json"]["model"],
            plan=announced["terms_json"]["plan"],
            survivors=header["survivors"],
            upload=secagg.upload_digest(masked),
        )
        write_atomically(self.place / self.session.id / f"receipt-{receipt.number:06d}.json", json.dumps(receipt.to_json()).encode())
        self.journal.sweep(self.session.id, before=receipt.number)

    def _finish(self, request: bytes) -> bytes:
        """The end of the session: checks the transcript, closes the reservation, destroys the run's key, trains the personal head if one is wished."""
        frame = secagg.open_frame(request, self.session.roster.server, kind="close", terms=None)
        if frame.header.get("session") != self.session.id:
            raise TermsRefused("the end of the session that this client joined", value=frame.header.get("session"))
        payload, *entries = secagg.parts(secagg.checked_body(frame))
        valid, failed = True, []
        try:
            transcript.verify(entries, roster=self.session.roster, name=self.name, receipts=self.receipts())
        except EvidenceInvalid as error:
            valid, failed = False, error.failed
        head = digest_of([entry.hex() for entry in entries])
        run = f"federated-{self.session.id}"
        held = self._ledger.of_run(run) if self._ledger.has_run(run) else None
        if held is not None and held.state.value != "closed":
            self._personalise(payload)
            self._ledger.close(held, CloseReason.COMPLETED, executed_steps=self._spent_steps)
            self._keyring.close_run(run)
            with self._store.transaction() as tx:
                fields = {"commitment": head, "run": run, "kind": "transcript of a federated session", "scheme": "verified" if valid else "REFUSED"}
                self._log.append(tx, Statement(predicate=Predicate.COMMITTED, subjects=(Digest(head),), fields=fields))
        result = {"kind": "receipt", "from": self.name, "valid": valid, "failed": list(failed), "rounds": len(self.receipts()), "head": head}
        write_atomically(self.place / self.session.id / "receipt.json", json.dumps(result).encode())
        return secagg.sealed_frame(self.identity, result)

    def _personalise(self, payload: bytes) -> None:
        if self.fleet.personal_steps:
            vector, _, _ = fleets.read_payload(payload, base=self.base.digest)
            self.worker.personalise(vector)
            models.save_adapter(self.worker.module, self.place / "personal")


def agreement_for(fleet: FleetFile, base: Base, section: ModelSection) -> Agreement:
    """Returns the agreement of a fleet on a base model and the adapters that are shared."""
    module = models.attach(base, section)
    dimension = sum(parameter.numel() for parameter in models.trained_parameters(module).values())
    return fleets.agree(fleet, dimension=dimension, layout=fleets.layout_of(module))


# The coordinator


@final
class Replay:
    """The replies to the stages of a round under way, kept until it is applied: a coordinator that was killed takes the round up where it stopped, and the sites answer the
    same from their journals. What lies here is sealed or masked; the shares of the last stage, which open the sum, are not kept but asked for again."""

    def __init__(self, place: Path) -> None:
        self._place = place

    def members(self, members: list[str]) -> list[str]:
        """Returns the members that the round began with."""
        path = self._place / "members"
        if not path.is_file():
            write_atomically(path, json.dumps(members).encode())
        return list(json.loads(path.read_text()))

    def of(self, stage: str, ask: Callable[[], Mapping[str, bytes]]) -> dict[str, bytes]:
        """Returns the kept replies of a stage, or asks and keeps them."""
        if stage == STAGES[-1]:
            return dict(ask())
        path = self._place / stage
        if not path.is_file():
            write_atomically(path, secagg.join(piece for name, body in ask().items() for piece in (name.encode(), body)))
        pieces = list(secagg.parts(path.read_bytes()))
        return {name.decode(): body for name, body in zip(pieces[::2], pieces[1::2], strict=True)}


@final
@dataclass(slots=True, kw_only=True)
class Coordinator:
    """Runs the rounds of one session and keeps what a restart needs in FLEET/.federation."""

    folder: Path
    agreement: Agreement
    session: Session
    base: Digest
    keyring: Keyring
    trainer: Trainer
    observer: Observer
    attempts: int = 0
    entries: list[bytes] = field(default_factory=list)
    correlated: Correlated | None = None
    sent: int = 0
    received: int = 0

    @property
    def place(self) -> Path:
        return self.folder / STATE / self.session.id

    @property
    def _under_way(self) -> Path:
        return self.place / f"round-{self.trainer.number}"

    def restore(self) -> None:
        """Continues from the last checkpoint of this session, if there is one; a round that was under way is taken up where it stopped."""
        if (self.place / "attempts").is_file():
            self.attempts = json.loads((self.place / "attempts").read_text())
        if (self.place / "checkpoint").is_file():
            trainer, *self.entries = secagg.parts((self.place / "checkpoint").read_bytes())
            self.trainer = Trainer.from_bytes(trainer)
        for path in self.place.glob("round-*"):
            if path == self._under_way:
                self.attempts -= 1
            else:
                shutil.rmtree(path)

    def run(self, exchange: Exchange) -> dict[str, Any]:
        """Runs every round that is left, then closes the session. Returns the guarantee and what each site says of its receipts.

        Raises:
            RoundAborted: when ten rounds aborted, or the sites that a round needs did not come back.
        """
        self.restore()
        fleet = self.agreement.fleet
        while self.trainer.number < fleet.rounds:
            if self.attempts >= fleet.rounds + RETRIES:
                raise RoundAborted(f"at most {RETRIES} aborted rounds", remedy="Bring the missing sites back, then run again; it resumes.")
            self._round(exchange)
        return self._close(exchange)

    def _round(self, exchange: Exchange) -> None:
        present = self._awaited(exchange)
        number, self.attempts = self.attempts, self.attempts + 1
        write_atomically(self.place / "attempts", str(self.attempts).encode())
        totals, entries, survivors, place = [], list(self.entries), 0, self._under_way
        for index, group in enumerate(fleets.groups_of(self.session.roster.clients, self.agreement.fleet.groups)):
            members = [name for name in group if name in present]
            try:
                terms, opened = self._sum(exchange, number, members, Replay(place / str(index)))
            except RoundAborted as error:
                self.observer.note(f"round {number}: {error}")
                continue
            totals.append(self._noised(opened, terms))
            released = totals[-1].tobytes()
            entries.append(transcript.entry(opened, terms, released=released, entries=entries, signer=self.keyring.signer("federation")))
            survivors += len(opened.uploads)
        if totals:
            self.trainer.apply(totals, self.agreement)
            self.entries = entries
            self._save()
            self._tell(survivors)
        shutil.rmtree(place, ignore_errors=True)

    def _awaited(self, exchange: Exchange) -> set[str]:
        """The sites that are there, once they are as many as a round needs: a site that left for good is not asked, one that comes late is from now on."""
        needed, end = self.agreement.fleet.minimum, time.monotonic() + WAIT_S
        groups, noted = fleets.groups_of(self.session.roster.clients, self.agreement.fleet.groups), False
        while True:
            present = exchange.present()
            if any(len(present.intersection(group)) >= needed for group in groups):
                return present
            if not noted:
                self.observer.note(f"waiting for {needed} sites; here: {', '.join(sorted(present)) or 'none'}")
            noted = True
            if time.monotonic() > end:
                raise RoundAborted(f"at least {needed} sites", value=len(present), remedy="Bring the missing sites back, then run again; it resumes.")
            time.sleep(1.0)

    def _sum(self, exchange: Exchange, number: int, members: list[str], replay: Replay) -> tuple[Terms, Opened]:
        payload, fleet, members = self._payload(), self.agreement.fleet, replay.members(members)
        if len(members) < fleet.minimum:
            raise RoundAborted(f"a group of at least {fleet.minimum} sites", value=len(members))
        terms = secagg.terms_for(
            self.session.roster,
            session=self.session.id,
            number=number,
            members=members,
            minimum=fleet.minimum,
            dimension=self.agreement.encoding.dimension,
            bits=fleet.bits,
            payload=payload,
            plan=self.agreement.digest,
            server=fleet.server,
        )
        hub = secagg.server(terms, roster=self.session.roster, signer=self.keyring.signer("federation"), payload=payload)
        requests = next(hub)
        while True:
            try:
                stage = secagg.kind_of(next(iter(requests.values())))
                requests = hub.send(replay.of(stage, partial(self._asked, exchange, requests, terms)))
            except StopIteration as end:
                return terms, end.value

    def _asked(self, exchange: Exchange, requests: Mapping[str, bytes], terms: Terms) -> Mapping[str, bytes]:
        """The replies to one stage; the last stage is asked again of those who are missing, because what was revealed is paid for."""
        enough = max(terms.threshold, terms.minimum)
        replies = dict(self._counted(exchange, requests, enough=enough))
        if secagg.kind_of(next(iter(requests.values()))) == STAGES[-1]:
            for _ in range(AGREEMENT_TRIES - 1):
                if len(replies) >= terms.threshold:
                    break
                replies |= self._counted(exchange, {who: body for who, body in requests.items() if who not in replies}, enough=enough)
        return replies

    def _close(self, exchange: Exchange) -> dict[str, Any]:
        body = secagg.join([self._payload(), *self.entries])
        frame = secagg.sealed_frame(self.keyring.signer("federation"), {"kind": "close", "session": self.session.id}, body)
        present = sorted(exchange.present() & set(self.session.roster.clients))
        replies = self._counted(exchange, dict.fromkeys(present, frame), enough=len(present))
        receipts = {}
        for name, key in self.session.roster.clients.items():
            with suppress(DiscreetError):
                said = secagg.open_frame(replies.get(name, b""), key, kind="receipt", terms=None).header
                receipts[name] = {"valid": bool(said["valid"]), "failed": list(said["failed"]), "rounds": int(said["rounds"])}
        return {
            "session": self.session.id,
            "rounds": self.trainer.number,
            "aborted": self.attempts - self.trainer.number,
            "guarantee": self.agreement.guarantee(),
            "receipts": receipts,
            "absent": sorted(set(self.session.roster.clients) - set(receipts)),
            "bytes_down": self.sent,
            "bytes_up": self.received,
        }

    def _noised(self, opened: Opened, terms: Terms) -> Reals:
        """The decoded sum; central noise is drawn from streams of the coordinator's own key, named by session and round or step: a round taken up again draws the same."""
        key, agreement = self.keyring.purpose("federation-noise").derive(self.session.id), self.agreement
        if agreement.is_bounded:
            self.correlated = (self.correlated or Correlated(agreement.bands, key)).at(self.trainer.number, agreement.encoding)
            return fleets.opened_vector(opened.total, agreement, terms, central=None, correlated=self.correlated)
        central = key.stream(terms.number, *terms.members) if agreement.fleet.noise is Noise.CENTRAL else None
        return fleets.opened_vector(opened.total, agreement, terms, central=central)

    def _payload(self) -> bytes:
        return fleets.payload_of(self.trainer.parameters, base=self.base, clip_norm=self.trainer.clip_norm, step=self.trainer.number)

    def _counted(self, exchange: Exchange, requests: Mapping[str, bytes], *, enough: int) -> Mapping[str, bytes]:
        replies = exchange(requests, enough=enough)
        self.sent += sum(map(len, requests.values()))
        self.received += sum(map(len, replies.values()))
        return replies

    def _save(self) -> None:
        write_atomically(self.place / "checkpoint", secagg.join([self.trainer.to_bytes(), *self.entries]))

    def _tell(self, survivors: int) -> None:
        plan, done = self.agreement.plan, self.trainer.number
        event = event_of(
            sampling_probability=plan.sampling_probability, noise_multiplier=plan.noise_multiplier, steps=self.agreement.spent_steps(done)
        )
        spent = rdp_epsilon(event, delta=plan.delta)
        figures = {"clients": survivors, "epsilon": f"{spent:.2f}", "up": _size(self.received), "down": _size(self.sent)}
        self.observer.progress("rounds", done, self.agreement.fleet.rounds, figures)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def coordinator(folder: Path, *, base: Base, section: ModelSection, observer: Observer) -> Coordinator:
    """Opens the coordinator of a fleet.

    Args:
        folder: of fleet.toml and roster.json.
        base: the model that the fleet adapts; every site has the same.
        section: which adapters are shared, the `[model]` of every site.
    """
    fleet, session = fleets.load_fleet(folder), Session.load(folder)
    keyring = coordinator_keys(folder)
    if keyring.signer("federation").public_key().public_bytes_raw() != session.roster.server:
        raise NotFound("a roster that names this coordinator's key", value=fleet.name)
    start = fleets.flatten(models.trained_parameters(models.attach(base, section)))
    return Coordinator(
        folder=folder,
        agreement=agreement_for(fleet, base, section),
        session=session,
        base=base.digest,
        keyring=keyring,
        trainer=Trainer.start(start, clip_norm=fleet.clip_norm),
        observer=observer,
    )


def coordinator_keys(folder: Path) -> Keyring:
    """Returns the coordinator's own keys, made at the first call."""
    place = folder / STATE
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    return Keyring(Store(f"sqlite:///{place}/coordinator.db"), open_master(f"file:{place}/master.key"))


def identity_of(folder: Path) -> bytes:
    """Returns the public Ed25519 key of a site's project, 32 bytes."""
    project = config.load(folder)
    store = Store(project.database_url())
    try:
        return Keyring(store, open_master(project.master_location())).signer("federation").public_key().public_bytes_raw()
    finally:
        store.close()


def enlist(folder: Path, keys: Mapping[str, bytes]) -> Session:
    """Writes roster.json with a fresh session, or returns the session that has these keys."""
    server = coordinator_keys(folder).signer("federation").public_key().public_bytes_raw()
    roster = Roster(server=server, clients=dict(keys))
    if (folder / ROSTER).is_file() and Session.load(folder).roster == roster:
        return Session.load(folder)
    made = Session(id=Key.random().mac(b"session").hex()[:16], roster=roster)
    made.save(folder)
    return made


def save_shared(run: Coordinator, *, base: Base, section: ModelSection, folder: Path) -> Digest:
    """Writes the fleet's adapter and returns its digest."""
    module = models.attach(base, section)
    fleets.unflatten(module, run.trainer.parameters)
    return models.save_adapter(module, folder)


def keep_model(folder: Path, *, base: Base, section: ModelSection) -> None:
    """Records for a coordinator that runs in a process of its own which base model and adapters the fleet trains."""
    write_atomically(
        folder / STATE / "model.json", json.dumps({"base": str(base.path.resolve()), "section": section.model_dump(mode="json")}).encode()
    )


def kept_model(folder: Path) -> tuple[Base, ModelSection]:
    """Opens what `keep_model` recorded.

    Raises:
        SourceMissing: when nothing was recorded.
    """
    path = folder / STATE / "model.json"
    if not path.is_file():
        raise SourceMissing(
            "a coordinator that knows the fleet's base model", value=str(folder), remedy="Run `discreet federate server` from the start."
        )
    fields = json.loads(path.read_text())
    return models.load_base(fields["base"], cache=folder / STATE), ModelSection.model_validate(fields["section"])


@dataclass(frozen=True, slots=True)
class InProcess:
    """The exchange of a simulation: every site answers in this process; one that refuses is noted and counts as lost."""

    sites: Mapping[str, Site]
    observer: Observer

    def present(self) -> set[str]:
        return set(self.sites)

    def __call__(self, requests: Mapping[str, bytes], *, enough: int) -> Mapping[str, bytes]:  # noqa: ARG002  # nobody is late here
        replies = {}
        for name, request in requests.items():
            try:
                replies[name] = self.sites[name].answer(request)
            except DiscreetError as error:
                self.observer.note(f"{name}: {error} [{error.code}]")
        return replies
