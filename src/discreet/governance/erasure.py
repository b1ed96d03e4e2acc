"""A subject asks to be forgotten: a state machine that can be killed anywhere, two protocols that every store and model answers, one certificate.

    received -> identity verified -> scoped -> restricted -> stores purged -> derived purged -> keys shredded -> models decided -> verified -> certified -> closed

Each arrow is one transaction that moves the request from exactly the state before it (compare and swap), after work that may be repeated. A killed process is
continued by the next call; two at once certify once. Nothing is skipped: whatever is not done raises `ErasureIncomplete` with the store or model and
the role that has to act, and the request stays where it is.

Nobody is erased, and nobody's use is restricted, on the word of a stranger (PITFALLS 22): before `identity verified` a request changes nothing. Identity is
proved by a code that the controller sends to the address on file (`Erasure.code`, five attempts), or an operator with that right vouches. An unknown subject gets the
same code, the same steps and the same certificate as a known one.

What happens to what was made from the subject, as the accountant's transcript says (`decide`):
    snapshot, index, cache           the subject's part is destroyed in it
    checkpoint of an open run        destroyed whole, whoever asks
    base model of somebody else      cannot be erased: its output is filtered, and the certificate says so
    DP with this unit, add/remove    kept: it is (epsilon, delta)-close to the model trained without the subject; the budget is not refunded
    DP by record, k records          kept while the bound for a group of k is within `max_epsilon`: a mixture of Gaussians (Ganesh 2024), not k * epsilon
    anything else                    withdrawn: weights destroyed with all that was derived from them; the pinned recipe trains again without the subject

Verification does not trust what it checks: the closure is computed again by another algorithm, every store looks at its stored bytes again, and the audit's
test is run on the weights that stay. The certificate is the last statement: it names stores and rules, never the subject's digests, counts or findings.
Suppression outlives the erasure as an HMAC of the pseudonym, in the database and in a journal beside it, so that a restored database cannot bring anybody
back: `reapply` restricts them again and `unfinished` names them.

Erasing somebody who is in takes longer than finding nothing of a stranger, so the time of an answer would tell who is in. A request is answered a full multiple of
`[erasure] answer_seconds` after its identity was verified: the certificate, and the times that it states, come then for everybody. The time is written down with the state, so that
a process that was killed while it waited certifies at once when the time has come. Retention and drills answer nobody and do not wait.

Sources: GDPR Art. 11, 12, 17, 18; EDPB Opinion 28/2024; Ganesh 2024, "Tight group-level DP guarantees for DP-SGD with sampling via mixture of Gaussians
mechanisms". Does not cover: an erasure that takes longer than `answer_seconds` (it is answered at the next multiple, which tells that much; choose it above the longest), a model that is
withdrawn or a run that is given up (whoever watches sees it go, and its statements in the log), the bytes that a file system or a solid-state disk keeps after a file was replaced,
copies that left the project, a restored folder whose journal was restored with it (keep `[erasure] journal` elsewhere).
"""

from __future__ import annotations

import base64
import hmac
import json
import math
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, final

from sqlalchemy import Column, Connection, Float, Integer, String, Table, Text, insert, select, update

from discreet.errors import AccessDenied, ErasureIncomplete, NotFound
from discreet.evidence.log import Log
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.governance import lineage
from discreet.governance.lineage import Artifact, Kind
from discreet.keys import Key, Keyring
from discreet.record import Digest, Sensitive, SubjectId
from discreet.store import Store as Database
from discreet.store import metadata, now

_erasures = Table(
    "erasures",
    metadata,
    Column("token", String(64), primary_key=True),
    Column("state", String(20), nullable=False),
    Column("reason", String(16), nullable=False),
    Column("method", String(80), nullable=False),
    Column("nonce", String(32), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("scope", Text, nullable=False),
    Column("received_at", Float, nullable=False),
    Column("certified_at", Float),
    Column("entry", Integer),
)
_BATCH = 256
"""Artifacts in one statement, which has room for 512 digests."""

CODE_CHARS = 12
MAX_GROUP = 32
"""Records of one subject above which a record-level guarantee is not counted on: the mixture takes minutes to compute, and promises little."""
MAX_ATTEMPTS = 5
_SECONDS_A_DAY = 86_400
RESPONSE_DAYS = 30
"""GDPR Art. 12(3): one month."""


class State(StrEnum):
    """How far a request is. The order is the order of the steps."""

    RECEIVED = "received"
    IDENTITY_VERIFIED = "identity verified"
    SCOPED = "scoped"
    RESTRICTED = "restricted"
    STORES_PURGED = "stores purged"
    DERIVED_PURGED = "derived purged"
    KEYS_SHREDDED = "keys shredded"
    MODELS_DECIDED = "models decided"
    VERIFIED = "verified"
    CERTIFIED = "certified"
    CLOSED = "closed"

    @property
    def next(self) -> State:
        order = list(State)
        return order[order.index(self) + 1]

    def reached(self, other: State) -> bool:
        """Returns whether `other` lies at or before this state."""
        order = list(State)
        return order.index(self) >= order.index(other)


_NOT_YET_RESTRICTED = (State.RECEIVED.value, State.IDENTITY_VERIFIED.value, State.SCOPED.value)
_FINISHED = (State.CERTIFIED.value, State.CLOSED.value)


class Reason(StrEnum):
    """Why somebody is erased."""

    REQUEST = "request"
    RETENTION = "retention"
    DRILL = "drill"
    RESTORED = "restored"


_TIMERS = (Reason.RETENTION.value, Reason.DRILL.value)


class Store(Protocol):
    """Anything that keeps something of a subject. Every store implements this in its own file; `purge` is idempotent."""

    @property
    def name(self) -> str:
        """A word for the certificate ("corpus")."""

    def holds(self, subject: SubjectId) -> Sequence[Digest]:
        """Returns the digests of what holds something of the subject: records, snapshots, indexes."""

    def purge(self, subject: SubjectId) -> None:
        """Destroys everything of the subject.

        Raises:
            ErasureIncomplete: when it cannot, for a known and an unknown subject alike; the value names the role that can.
        """

    def absence(self, subject: SubjectId) -> bool:
        """Looks again, at the stored bytes themselves, and returns whether nothing of the subject is left."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Transcript:
    """What the accountant recorded of a training. Public figures.

    Attributes:
        unit: the privacy unit; empty when training was not private.
        relation: neighbouring relation of the units.
        epsilon, delta: of the statement.
        sampling_probability, noise_multiplier, steps: of Poisson-sampled Gaussian steps, from which the bound for a group is computed.
    """

    unit: str = ""
    relation: str = "add_remove"
    epsilon: float = math.inf
    delta: float = 1.0
    sampling_probability: float = 1.0
    noise_multiplier: float = 0.0
    steps: int = 0


class Finding(StrEnum):
    """What the audit's test says about one subject in the weights that stay."""

    NOT_EXPOSED = "not exposed"
    EXPOSED = "exposed"
    NO_POWER = "no power: nothing of the subject to look for"


class Models(Protocol):
    """What the erasure needs to know of the project's models, and to have done with them."""

    def transcript(self, digest: Digest) -> Transcript:
        """Returns the transcript of a model; the empty one when nobody trained it privately."""

    def test(self, subject: SubjectId, digest: Digest) -> Finding:
        """Attacks the weights with what is known of the subject, while it is still known."""

    def withdraw(self, digest: Digest) -> None:
        """Destroys the weights of a model and of whatever serves it. Idempotent."""


class Decision(StrEnum):
    """What is done with an artifact that was made from an erased subject."""

    PURGED = "purged: the subject's part of it is destroyed"
    KEPT = "kept: trained with differential privacy for this unit; the budget is not refunded"
    KEPT_GROUP = "kept: trained with differential privacy by record, and the bound for all records of the subject is within the policy; the budget is not refunded"
    WITHDRAWN = "withdrawn: not trained with differential privacy for this unit; the pinned recipe trains again without the subject"
    SUPPRESSED = "suppressed: a base model that others trained cannot be made to forget; its output is filtered"


def decide(artifact: Artifact, transcript: Transcript, *, unit: str, num_records: int, max_epsilon: float) -> Decision:
    """Decides by the table of the module docstring.

    Args:
        artifact: what was made from the subject.
        transcript: the accountant's, of the model or of the model it was derived from.
        unit: what a subject is ("patient").
        num_records: records of the subject that the model may have seen, >= 0.
        max_epsilon: largest epsilon that may stay for a group.
    """
    if not artifact.kind.has_weights:
        return Decision.PURGED
    if artifact.kind is Kind.BASE:
        return Decision.SUPPRESSED
    if transcript.relation != "add_remove":
        return Decision.WITHDRAWN
    if transcript.unit == unit:
        return Decision.KEPT
    if transcript.unit == "record" and group_epsilon(transcript, num_records) <= max_epsilon:
        return Decision.KEPT_GROUP
    return Decision.WITHDRAWN


def group_epsilon(transcript: Transcript, size: int) -> float:
    """Returns epsilon at the transcript's delta for `size` records at once, by the mixture of Gaussians over how many of them a step draws.

    Args:
        transcript: of Poisson-sampled Gaussian steps whose unit is a record.
        size: records of one subject, >= 0; above 32, or where the transcript claims no noise, the bound is not computed and the answer is infinity.
    """
    if size == 0:
        return 0.0
    if size > MAX_GROUP or transcript.noise_multiplier <= 0:
        return math.inf
    from dp_accounting import dp_event  # 0.5 s to import; only record-level models pay

    from discreet.dp import accounting

    q = transcript.sampling_probability
    drawn = [math.comb(size, count) * q**count * (1 - q) ** (size - count) for count in range(size + 1)]
    step = dp_event.MixtureOfGaussiansDpEvent(transcript.noise_multiplier, tuple(float(n) for n in range(size + 1)), tuple(drawn))
    event = dp_event.SelfComposedDpEvent(step, transcript.steps)
    return accounting.guarantee(event, delta=transcript.delta, unit="record").epsilon


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Identity:
    """On whose word a request is carried out: how it was proved, and by whom ("records office")."""

    method: str
    by: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class ErasurePlan:
    """What an erasure would touch, for the operator; it prints the same for a known and an unknown subject."""

    stores: tuple[str, ...]
    holdings: Sensitive[Mapping[str, int]]
    affected: Sensitive[Mapping[Digest, Decision]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What the subject gets: the entry of the log that says which stores proved absence and by which rules models were decided. No identifier, no count of theirs."""

    request: Digest
    entry: int
    stores: tuple[str, ...]
    backups_until: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One request for the operator's list; no subject in it."""

    request: Digest
    state: State
    reason: Reason
    overdue: bool


@final
@dataclass(slots=True)
class _Scope:
    """What a request has found so far; written down before anything is destroyed, and emptied by the certificate. `subject` is whose it is, so that a killed request can be finished
    after their key is gone, when nothing else knows them any more; `since` is when the identity was verified, `due` when the
    certificate is, in seconds since 1970."""

    artifacts: dict[Digest, Kind] = field(default_factory=dict)
    protects: dict[Digest, str] = field(default_factory=dict)
    records: set[Digest] = field(default_factory=set)
    decisions: dict[Digest, Decision] = field(default_factory=dict)
    findings: dict[Digest, Finding] = field(default_factory=dict)
    subject: SubjectId | None = None
    since: float | None = None
    due: float | None = None

    def to_json(self) -> str:
        fields = {"artifacts": self.artifacts, "protects": self.protects, "records": sorted(self.records)}
        fields |= {"subject": self.subject, "since": self.since, "due": self.due}
        decided = {digest: decision.name for digest, decision in self.decisions.items()}
        return json.dumps({**fields, "decisions": decided, "findings": {digest: found.name for digest, found in self.findings.items()}})

    @staticmethod
    def from_json(stored: str) -> _Scope:
        value = json.loads(stored)
        return _Scope(
            artifacts={Digest(d): Kind(kind) for d, kind in value.get("artifacts", {}).items()},
            protects={Digest(d): unit for d, unit in value.get("protects", {}).items()},
            records={Digest(d) for d in value.get("records", [])},
            decisions={Digest(d): Decision[name] for d, name in value.get("decisions", {}).items()},
            findings={Digest(d): Finding[name] for d, name in value.get("findings", {}).items()},
            subject=value.get("subject"),
            since=value.get("since"),
            due=value.get("due"),
        )


class Erasure:
    """The right to erasure over every store and model of one project."""

    def __init__(
        self,
        store: Database,
        keyring: Keyring,
        log: Log,
        *,
        stores: Sequence[Store],
        models: Models,
        unit: str,
        derived: Sequence[Store] = (),
        max_epsilon: float = 8.0,
        backup_days: int = 30,
        answer_seconds: float = 0.0,
        responsible: str = "privacy officer",
        journal: Path | None = None,
    ) -> None:
        """Binds the erasure to its stores.

        Args:
            stores: every store of what was collected; one that is left out is not erased.
            models: the project's models.
            unit: the privacy unit that a subject is ("patient"), as in `[privacy] unit`.
            derived: every store of what was made from it (indexes, caches, checkpoints), purged after `stores`.
            max_epsilon: largest epsilon that a group bound may reach for a model to stay.
            backup_days: after so many days no backup holds anybody who is erased today.
            answer_seconds: a request is certified a full multiple of so many seconds after its identity was verified; 0 at once.
            responsible: who has to act when something is left.
            journal: file of suppressions beside the database; None keeps none.
        """
        self._database = store
        self._keyring = keyring
        self._log = log
        self._stores = tuple(stores)
        self._derived = tuple(derived)
        self._models = models
        self._unit = unit
        self._max_epsilon = max_epsilon
        self._backup_days = backup_days
        self._answer_seconds = answer_seconds
        self._responsible = responsible
        self._journal = journal
        self._alone = threading.Lock()

    # What a request is

    def request(self, subject: SubjectId, *, reason: Reason = Reason.REQUEST) -> State:
        """Receives a request: before the identity is verified nothing is restricted or destroyed, and what was finished stays finished. Idempotent."""
        key = token(self._keyring, subject)
        with self._database.transaction() as tx:
            if _row(tx, key) is None:
                tx.execute(insert(_erasures).values(token=key, reason=reason.value, received_at=now(tx), **_FRESH))
        return self.state(subject)

    def code(self, subject: SubjectId) -> Sensitive[str]:
        """Receives a request and returns the code that proves it, for the address on file and nowhere else. A new code ends the earlier one."""
        self.request(subject)
        nonce = Key.random().stream("erasure").bytes(16).hex()
        mine = _erasures.c.token == token(self._keyring, subject)
        with self._database.transaction() as tx:
            tx.execute(update(_erasures).where(mine).values(nonce=nonce, attempts=0))
        return Sensitive(self._code(subject, nonce))

    def confirm(self, subject: SubjectId, code: str) -> None:
        """Verifies the identity by the code that was sent.

        Raises:
            AccessDenied: when the code is wrong, was never sent, or five wrong ones were tried; the answer is the same for everybody.
        """
        key, asked = token(self._keyring, subject), time.time()
        mine = _erasures.c.token == key
        with self._database.transaction() as tx:
            row = _row(tx, key)
            tries = row.attempts if row else MAX_ATTEMPTS
            given = code.strip().upper().replace("-", "").encode()
            expected = self._code(subject, row.nonce if row else "").encode()
            holds = hmac.compare_digest(given, expected) and row is not None and bool(row.nonce) and tries < MAX_ATTEMPTS
            if row is not None:
                tx.execute(update(_erasures).where(mine).values(attempts=tries + 1))
        if not holds:
            raise AccessDenied("the code that was sent to the address on file", remedy="Ask for a new code; five wrong ones end a code.")
        self._identify(subject, Identity(method="code sent to the address on file", by="subject"), reason=Reason.REQUEST, asked=asked)

    def state(self, subject: SubjectId) -> State:
        """Returns how far the request is.

        Raises:
            NotFound: when there is no request.
        """
        with self._database.transaction() as tx:
            row = _row(tx, token(self._keyring, subject))
        if row is None:
            raise NotFound("a request for erasure")
        return State(row.state)

    def plan(self, subject: SubjectId) -> ErasurePlan:
        """Returns what `execute` would touch, and writes nothing."""
        scope = self._look(subject, _Scope())
        counts = {store.name: len(store.holds(subject)) for store in self._all()}
        decided = {d: self._decide(scope, d) for d in sorted(scope.artifacts)}
        return ErasurePlan(stores=self._names(), holdings=Sensitive(counts), affected=Sensitive(decided))

    def execute(self, subject: SubjectId, *, identity: Identity | None = None, reason: Reason = Reason.REQUEST) -> Certificate:
        """Carries a request through to its certificate, from wherever it stands. Idempotent; a killed call is finished by the next.

        Args:
            subject: known or not; nobody can tell from the answer.
            identity: who vouches; None when the identity was verified before.
            reason: of a request that is made here.

        Raises:
            AccessDenied: when the identity is not verified.
            ErasureIncomplete: when a store or a model still holds the subject; its name and the responsible role are the value. They stay restricted.
        """
        asked = time.time()
        self.request(subject, reason=reason)
        with self._alone:  # two that rewrite one file would find each other's halves; commands are kept apart by the lock of the project
            if identity is not None:
                self._identify(subject, identity, reason=reason, asked=asked)
            while not (state := self.state(subject)).reached(State.CERTIFIED):
                if state is State.RECEIVED:
                    raise AccessDenied("a verified identity", remedy="Send the code of `discreet erase --request` to the address on file, or vouch.")
                if state is State.VERIFIED:
                    self._wait(subject)
                self._step(subject, state)
            return self._certificate(subject)

    # The steps: work that may be repeated, then one compare-and-swap

    def _step(self, subject: SubjectId, state: State) -> None:
        """Does the work that leads out of `state`."""
        match state:
            case State.IDENTITY_VERIFIED:
                self._scope(subject)
            case State.SCOPED:
                self._restrict(subject)
            case State.RESTRICTED:
                self._scope_again(subject)
                self._purge(subject, self._stores, state)
            case State.STORES_PURGED:
                self._purge(subject, self._derived, state)
            case State.DERIVED_PURGED:
                self._shred(subject)
            case State.KEYS_SHREDDED:
                self._decide_models(subject)
            case State.MODELS_DECIDED:
                self._verify(subject)
            case State.VERIFIED:
                self._certify(subject)
            case _:
                raise AssertionError(state)

    def _identify(self, subject: SubjectId, identity: Identity, *, reason: Reason, asked: float) -> None:
        """Begins the work, also anew after a certificate that is older than the question. From here the time of the answer runs: not from where a timer or a restored database had begun."""
        with self._database.transaction() as tx:
            row, at = _row(tx, token(self._keyring, subject)), now(tx)
            state, known = State(row.state), _Scope.from_json(row.scope)
            verified = {"method": f"{identity.method} ({identity.by})"[:80], "nonce": ""}
            fresh = verified | {"reason": reason.value, "scope": _Scope(subject=subject, since=at).to_json()}
            if state is State.RECEIVED:
                self._advance(tx, subject, state, **fresh)
            elif row.state in _FINISHED and row.certified_at < asked:
                self._put(tx, subject, state, {**fresh, "state": State.RESTRICTED.value, "received_at": at})
            elif row.state not in _FINISHED and reason is Reason.REQUEST and (known.since is None or row.reason in _TIMERS):
                scope = replace(known, subject=subject, since=at, due=self._answer_at(at, at))
                self._put(tx, subject, state, {**verified, "reason": reason.value, "scope": scope.to_json()})

    def _scope(self, subject: SubjectId) -> None:
        scope = self._look(subject, self._read(subject))
        with self._database.transaction() as tx:
            self._advance(tx, subject, State.IDENTITY_VERIFIED, scope=scope.to_json())

    def _restrict(self, subject: SubjectId) -> None:
        """From here on nothing of the subject is collected, admitted or sampled. The journal comes first: it may know more than the database, never less. It names their second identifiers too:
        a restored database may not know any more that they are theirs."""
        if self._journal is not None:
            with self._database.transaction() as tx:
                theirs = [own for own, person in self._keyring.second_identifiers(tx).items() if person == subject]
            for own in (subject, *sorted(theirs)):
                _write_journal(self._journal, self._keyring, token(self._keyring, own))
        with self._database.transaction() as tx:
            self._advance(tx, subject, State.SCOPED)

    def _scope_again(self, subject: SubjectId) -> None:
        """What came between scoping and restriction, and the test of the weights that will stay: afterwards nobody could tell any more."""
        scope = self._look(subject, self._read(subject))
        for digest in sorted(scope.artifacts):
            if self._decide(scope, digest) in (Decision.KEPT, Decision.KEPT_GROUP) and digest not in scope.findings:
                scope.findings[digest] = self._models.test(subject, digest)
        self._write(subject, scope)

    def _purge(self, subject: SubjectId, stores: Iterable[Store], state: State) -> None:
        for store in stores:
            store.purge(subject)
        self._refuse_remaining(subject, stores)
        with self._database.transaction() as tx:
            self._advance(tx, subject, state)

    def _shred(self, subject: SubjectId) -> None:
        self._keyring.forget(subject)
        with self._database.transaction() as tx:
            lineage.forget_records(tx, sorted(self._read(subject, tx=tx).records))
            self._advance(tx, subject, State.DERIVED_PURGED)
        self._database.compact()

    def _decide_models(self, subject: SubjectId) -> None:
        scope = self._read(subject)
        scope.decisions = {digest: self._decide(scope, digest) for digest in scope.artifacts}
        gone = [digest for digest, decision in scope.decisions.items() if decision is Decision.WITHDRAWN]
        with self._database.transaction() as tx:
            below = {artifact.digest: artifact for artifact in lineage.descendants(tx, gone)}  # what was made from a withdrawn model goes with it
        scope.artifacts |= {digest: artifact.kind for digest, artifact in below.items()}
        scope.decisions |= dict.fromkeys(below, Decision.WITHDRAWN)
        for digest, decision in scope.decisions.items():
            if decision is Decision.WITHDRAWN:
                self._models.withdraw(digest)
        with self._database.transaction() as tx:
            lineage.retire_all(tx, [digest for digest, decision in scope.decisions.items() if decision is Decision.WITHDRAWN])
            self._advance(tx, subject, State.KEYS_SHREDDED, scope=scope.to_json())

    def _verify(self, subject: SubjectId) -> None:
        self._refuse_remaining(subject, self._all())
        scope = self._read(subject)
        with self._database.transaction() as tx:
            missed = recomputed(tx, scope.artifacts) - scope.artifacts.keys() - scope.records
        exposed = [digest for digest, finding in scope.findings.items() if finding is Finding.EXPOSED]
        found = [f"artifact {digest} (unplanned)" for digest in sorted(missed)] + [f"model {digest} (exposed)" for digest in exposed]
        if found:
            for digest in exposed:  # the transcript says keep and the weights say no: the weights are believed
                scope.protects[digest] = ""
                del scope.findings[digest]
            with self._database.transaction() as tx:
                scope.artifacts |= {a.digest: a.kind for a in lineage.find_all(tx, sorted(missed))}
                self._put(tx, subject, State.MODELS_DECIDED, {"state": State.RESTRICTED.value, "scope": scope.to_json()})
            raise self._incomplete(found)
        self._database.compact()
        with self._database.transaction() as tx:
            scope.due = self._answer_at(scope.since, now(tx))
            self._advance(tx, subject, State.MODELS_DECIDED, scope=scope.to_json())

    def _answer_at(self, since: float | None, at: float) -> float:
        """The next time at which a certificate may be given, for work that ended at `at` on a request whose identity was verified at `since`."""
        if since is None or not self._answer_seconds:
            return at
        return since + max(1, math.ceil((at - since) / self._answer_seconds)) * self._answer_seconds

    def _wait(self, subject: SubjectId) -> None:
        """Sleeps until the certificate is due, by the clock: whoever is killed here goes on here. Retention and drills answer nobody, but for who asks meanwhile.

        Raises:
            ClockBackwards: when the clock was set back; nothing is lost.
        """
        with self._database.transaction() as tx:
            row = _row(tx, token(self._keyring, subject))
        due = 0.0 if row.reason in _TIMERS else _Scope.from_json(row.scope).due or 0.0
        while (left := due - time.time()) > 0:
            if left > self._answer_seconds:  # a clock that was set back, or a shorter wait by now
                with self._database.transaction() as tx:
                    now(tx)
            time.sleep(min(left, 1.0))

    def _certify(self, subject: SubjectId) -> None:
        scope = self._read(subject)
        request = request_digest(self._keyring, subject)
        with self._database.transaction() as tx:
            row = _row(tx, token(self._keyring, subject))
            if row is None or row.state != State.VERIFIED.value:
                return  # another process was faster
            fields: dict[str, JSON] = {"reason": row.reason, "stores": list(self._names())}
            batches = list(lineage.chunks(sorted(scope.decisions.items()), _BATCH))
            batches += [[]] * (
                -(-max(1, lineage.count_made(tx)) // _BATCH) - len(batches)
            )  # the place of a certificate in the log does not tell who is in
            for batch in batches:
                decisions: dict[str, JSON] = {digest: decision.value for digest, decision in batch}
                findings: dict[str, JSON] = {digest: scope.findings[digest].value for digest, _ in batch if digest in scope.findings}
                about = (request, *(digest for digest, _ in batch))
                self._log.append(tx, _erased_statement(about, {**fields, "decisions": decisions, "findings": findings}))
            at = now(tx)
            fields |= {"identity": row.method, "rules": [decision.value for decision in Decision], "backups_until": _day(at, self._backup_days)}
            entry = self._log.append(tx, _erased_statement((request,), fields))
            self._advance(tx, subject, State.VERIFIED, scope="{}", certified_at=at, entry=entry)
        self._database.compact()

    # After the certificate

    def close_due(self) -> int:
        """Closes the requests whose backups have passed their horizon, by recorded time; returns how many.

        Raises:
            ClockBackwards: when the clock was set back.
        """
        with self._database.transaction() as tx:
            before = now(tx) - self._backup_days * _SECONDS_A_DAY
            due = (_erasures.c.state == State.CERTIFIED.value) & (_erasures.c.certified_at <= before)
            return tx.execute(update(_erasures).where(due).values(state=State.CLOSED.value)).rowcount

    def open_requests(self) -> list[Progress]:
        """Returns the requests that have no certificate yet, oldest first."""
        with self._database.transaction() as tx:
            late = now(tx) - RESPONSE_DAYS * _SECONDS_A_DAY
            rows = tx.execute(select(_erasures).where(_erasures.c.state.not_in(_FINISHED)).order_by(_erasures.c.received_at)).all()
        return [
            Progress(request=_request(self._keyring, row.token), state=State(row.state), reason=Reason(row.reason), overdue=row.received_at < late)
            for row in rows
        ]

    def reapply(self) -> int:
        """Restricts whoever the journal names and the database does not: a restored backup brought them back. Returns how many.

        Raises:
            ErasureIncomplete: when the journal was changed.
        """
        if self._journal is None or not self._journal.exists():
            return 0
        tokens = _read_journal(self._journal, self._keyring)
        with self._database.transaction() as tx:
            second = {
                token(self._keyring, own) for own in self._keyring.second_identifiers(tx)
            }  # nobody's alone: whose they are is in the journal as well
            known = {row.token: row.state for row in tx.execute(select(_erasures.c.token, _erasures.c.state))}
            lost = [t for t in tokens if t not in second and known.get(t, State.RECEIVED.value) in _NOT_YET_RESTRICTED]
            for t in lost:
                restored = {**_FRESH, "state": State.RESTRICTED.value, "method": "journal of suppressions"}
                if t in known:
                    tx.execute(update(_erasures).where(_erasures.c.token == t).values(state=State.RESTRICTED.value))
                else:
                    tx.execute(insert(_erasures).values(token=t, reason=Reason.RESTORED.value, received_at=now(tx), **restored))
        return len(lost)

    # Plumbing

    def _look(self, subject: SubjectId, scope: _Scope) -> _Scope:
        """Adds what the stores hold and everything that was made from it."""
        held = sorted({digest for store in self._all() for digest in store.holds(subject)})
        with self._database.transaction() as tx:
            known = {artifact.digest: artifact for artifact in lineage.find_all(tx, held)}
            found = [known.get(digest, Artifact(digest=digest, kind=Kind.SNAPSHOT)) for digest in held]
            for artifact in (*found, *lineage.descendants(tx, held)):
                if artifact.kind is Kind.RECORD:
                    scope.records.add(artifact.digest)
                else:
                    scope.artifacts[artifact.digest] = artifact.kind
                    scope.protects.setdefault(artifact.digest, artifact.protects)
        return scope

    def _decide(self, scope: _Scope, digest: Digest) -> Decision:
        if digest in scope.decisions and scope.decisions[digest] is Decision.WITHDRAWN:
            return Decision.WITHDRAWN
        artifact = Artifact(digest=digest, kind=scope.artifacts[digest], protects=scope.protects.get(digest, ""))
        transcript = self._models.transcript(digest) if artifact.kind.has_weights and artifact.protects else Transcript()
        return decide(artifact, transcript, unit=self._unit, num_records=len(scope.records), max_epsilon=self._max_epsilon)

    def _refuse_remaining(self, subject: SubjectId, stores: Iterable[Store]) -> None:
        remaining = [store.name for store in stores if not store.absence(subject)]
        if remaining:
            raise self._incomplete(remaining)

    def _incomplete(self, found: Sequence[str]) -> ErasureIncomplete:
        return ErasureIncomplete(
            "every store and model to be without the erased subject",
            value=f"{', '.join(found)}; responsible: {self._responsible}",
            remedy="Repair or destroy what is named, then run the erasure again; the subject stays restricted until it succeeds.",
        )

    def _certificate(self, subject: SubjectId) -> Certificate:
        with self._database.transaction() as tx:
            row = _row(tx, token(self._keyring, subject))
        if row is None or row.entry is None:
            raise NotFound("a certificate")
        return Certificate(
            request=request_digest(self._keyring, subject),
            entry=row.entry,
            stores=self._names(),
            backups_until=_day(row.certified_at, self._backup_days),
        )

    def _advance(self, tx: Connection, subject: SubjectId, state: State, **values: Any) -> None:
        """Moves the request out of `state`, unless somebody else did."""
        self._put(tx, subject, state, {"state": state.next.value, **values})

    def _put(self, tx: Connection, subject: SubjectId, state: State, values: Mapping[str, Any]) -> None:
        mine = (_erasures.c.token == token(self._keyring, subject)) & (_erasures.c.state == state.value)
        tx.execute(update(_erasures).where(mine).values(dict(values)))

    def _read(self, subject: SubjectId, *, tx: Connection | None = None) -> _Scope:
        query = select(_erasures.c.scope).where(_erasures.c.token == token(self._keyring, subject))
        if tx is not None:
            return _Scope.from_json(tx.execute(query).scalar_one())
        with self._database.transaction() as own:
            return _Scope.from_json(own.execute(query).scalar_one())

    def _write(self, subject: SubjectId, scope: _Scope) -> None:
        with self._database.transaction() as tx:
            self._put(tx, subject, State.RESTRICTED, {"scope": scope.to_json()})

    def _code(self, subject: SubjectId, nonce: str) -> str:
        digest = self._keyring.hmac("erasure code", f"{nonce}/{token(self._keyring, subject)}".encode())
        return base64.b32encode(digest).decode()[:CODE_CHARS]

    def _all(self) -> tuple[Store, ...]:
        return (*self._stores, *self._derived)

    def _names(self) -> tuple[str, ...]:
        return tuple(store.name for store in self._all())


_FRESH: Mapping[str, Any] = {"state": State.RECEIVED.value, "method": "", "nonce": "", "attempts": 0, "scope": "{}"}


def erased(tx: Connection, keyring: Keyring, subjects: Sequence[SubjectId]) -> set[SubjectId]:
    """Returns those of `subjects` who were erased, or whose erasure has reached `restricted`."""
    by_token = {token(keyring, subject): subject for subject in subjects}
    begun = _erasures.c.state.not_in(_NOT_YET_RESTRICTED)
    found = [
        t for chunk in lineage.chunks(by_token) for t in tx.execute(select(_erasures.c.token).where(begun, _erasures.c.token.in_(chunk))).scalars()
    ]
    return {by_token[t] for t in found}


def unfinished(database: Database, keyring: Keyring) -> list[SubjectId]:
    """Returns the subjects whose erasure was begun, with a verified identity, and has no certificate: killed erasures, and people whom a restored database brought back."""
    with database.transaction() as tx:
        begun = _erasures.c.state.not_in((State.RECEIVED.value, *_FINISHED))
        scopes = {row.token: _Scope.from_json(row.scope) for row in tx.execute(select(_erasures.c.token, _erasures.c.scope).where(begun))}
    told = [scope.subject for scope in scopes.values() if scope.subject is not None]
    nameless = {each for each, scope in scopes.items() if scope.subject is None}  # what the journal brought back, and what an older version began
    return told + ([subject for subject in keyring.known_subjects() if token(keyring, subject) in nameless] if nameless else [])


def recomputed(tx: Connection, artifacts: Iterable[Digest]) -> set[Digest]:
    """Returns what was made from any of `artifacts`: breadth-first over the plain list of edges, so that an error in the recursive query of
    `lineage` does not confirm itself."""
    children: dict[Digest, list[Digest]] = {}
    for parent, child in lineage.edges(tx):
        children.setdefault(parent, []).append(child)
    seen: set[Digest] = set()
    queue = deque(artifacts)
    while queue:
        for child in children.get(queue.popleft(), ()):
            if child not in seen:
                seen.add(child)
                queue.append(child)
    return seen


def token(keyring: Keyring, subject: SubjectId) -> str:
    """Returns the entry of a subject in the suppression list: 64 hex digits that outlive the subject's key and name nobody."""
    return keyring.hmac("suppression", subject.encode()).hex()


def request_digest(keyring: Keyring, subject: SubjectId) -> Digest:
    """Returns the digest under which the log keeps a subject's requests; only the holder of the master key can compute it."""
    return _request(keyring, token(keyring, subject))


def _request(keyring: Keyring, suppression: str) -> Digest:
    return Digest("sha256:" + keyring.hmac("request", suppression.encode()).hex())


def _row(tx: Connection, key: str) -> Any:
    return tx.execute(select(_erasures).where(_erasures.c.token == key)).one_or_none()


def _erased_statement(subjects: tuple[Digest, ...], fields: Mapping[str, JSON]) -> Statement:
    return Statement(predicate=Predicate.ERASED, subjects=subjects, fields=fields)


def _day(at: float, days: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(at + days * _SECONDS_A_DAY, UTC).strftime("%Y-%m-%d")


def _write_journal(path: Path, keyring: Keyring, suppression: str) -> None:
    """Appends one suppression and its MAC, durably; nothing in it names anybody."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    line = f"{suppression} {keyring.hmac('journal', suppression.encode()).hex()}\n"
    if path.exists() and line in path.read_text():
        return
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())


def _read_journal(path: Path, keyring: Keyring) -> list[str]:
    """Reads the journal; a last line that a crash cut short is left out, any other change is refused."""
    lines = path.read_text().splitlines(keepends=True)
    pairs = [line.split() for line in lines if line.endswith("\n")]
    for pair in pairs:
        if len(pair) != 2 or not hmac.compare_digest(pair[1], keyring.hmac("journal", pair[0].encode()).hex()):
            raise ErasureIncomplete("a journal of suppressions that nobody changed", value=path.name, remedy="Restore it from where it was kept.")
    return [pair[0] for pair in pairs]
