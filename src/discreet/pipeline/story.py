"""Opens a project and tells its story in order; takes in what changed; exports what was said."""

from __future__ import annotations

import dataclasses
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from discreet import config
from discreet.deid import policy as deid
from discreet.errors import NotFound, RunInProgress
from discreet.evidence.log import Log, key_beside
from discreet.evidence.statement import Predicate
from discreet.governance import lineage
from discreet.governance.access import Access, Action, current_user
from discreet.governance.catalog import Catalog
from discreet.governance.consent import Consent
from discreet.keys import Keyring, open_master
from discreet.ledger import Ledger
from discreet.pipeline.admission import ingest
from discreet.pipeline.auditing import audit
from discreet.pipeline.continuing import Parent, last_released, parent_of
from discreet.pipeline.erasing import erasure_of
from discreet.pipeline.house import (
    STAGES,
    House,
    Observer,
    config_of,
    fact,
    finished_result,
    for_log,
    forget_results,
    remember,
    restore_results,
    result_of,
    subject_of,
)
from discreet.pipeline.releasing import release
from discreet.pipeline.searching import build_index
from discreet.pipeline.training import assist, train
from discreet.record import Digest
from discreet.store import Store, write_atomically
from discreet.train import parallel

PENDING = "update"


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
                assist(dataclasses.replace(house, ranks=ranks))
        return None


@contextmanager
def _lock(path: Path, *, exclusive: bool) -> Iterator[None]:
    with path.open("w") as file:
        if exclusive:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunInProgress("one command at a time on one project", remedy="Wait for the other command to end.") from None
        yield


def lineage_export(house: House, *, unit: str = "", digest: str = "") -> list[dict[str, Any]]:
    """Returns OpenLineage run events for what was made from a person's records, or from an artifact."""
    house.access.require(Action.READ, who=current_user())
    with house.store.transaction() as tx:
        roots = list(house.catalog.holds_in(tx, subject_of(house, unit))) if unit else [Digest(digest)]
        return lineage.openlineage(tx, roots, namespace=house.log.origin)


def update(house: House, observer: Observer, *, start: Literal["base", "released"] = "base") -> dict[str, Any]:
    """Takes in what became of the sources: new records, the same ledger, the index, training, audit and release anew; warns when the audit sees more than before.

    Args:
        house: the open project.
        observer: hears of it.
        start: whether the new model is trained from the base, or goes on from the one that was released last (`continuing`).

    Raises:
        BudgetExhausted, NotReleased: as the stages do. What was released before is served on when no new model came to be.
    """
    house.access.require(Action.RUN, who=current_user())
    parent = last_released(house) if start == "released" else None
    before = house.log.select(Predicate.AUDITED)
    changed = [section.name for section in house.project.source if house.catalog.changed(house.project, section)]
    again = sorted({*changed, *_refused_before(house)})
    if again:
        trained = finished_result(house, "train") or fact(house, PENDING) or {}
        with house.store.transaction() as tx:
            remember(tx, PENDING, {"changed": again, "run": trained.get("run")})
    for section in house.project.source:
        if section.name in changed:
            house.catalog.register_again(house.project, section)
    if again and house.project.retrieval.purposes:
        build_index(house, observer)
    configs = {name: config_of(house, name) for name in STAGES[1:]} if again else {}
    with house.store.transaction() as tx:
        done = forget_results(tx, configs)
    try:
        outcome = run(house, until=None, observer=observer, parent=parent)
    except BaseException:
        if result_of(house, "train", configs.get("train", "")) is None:
            with house.store.transaction() as tx:
                restore_results(tx, done)
        raise
    bound = outcome["audit"]["epsilon_lower"]
    earlier = before[-1].fields["epsilon_lower"] if before else None
    rising = earlier is not None and bound > earlier
    if rising:
        observer.note(f"ALERT: the certified lower bound rose from {earlier:.2f} to {bound:.2f}")
    return {
        "changed": again,
        "run": outcome["train"]["run"],
        "continues": continues.run if (continues := parent_of(house, outcome["train"]["run"])) else None,
        "verdict": outcome["audit"]["verdict"],
        "epsilon_lower": bound,
        "earlier": earlier,
        "rising": rising,
    }


def _refused_before(house: House) -> list[str]:
    """Sources whose changes an earlier update took in without a model coming of it: refused, or killed before its training ended."""
    left, trained = fact(house, PENDING), finished_result(house, "train")
    return [] if left is None or (trained is not None and trained["run"] != left["run"]) else list(left["changed"])


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
    """Writes the log as a bundle and, beside it, the public key that verifies it. What an officer needs around it: `dossier.write`."""
    house.access.require(Action.READ, who=current_user())
    key = key_beside(folder)
    bundle = house.log.export(folder, public=public)
    write_atomically(key, (house.log.public_key() + "\n").encode())
    return bundle, key


def run(house: House, *, until: str | None, observer: Observer, parent: Parent | None = None) -> dict[str, Any]:
    """Runs the stages in order up to and including `until`; finished ones are not repeated.

    Args:
        house: the open project.
        until: the last stage; None for all.
        observer: hears of it.
        parent: the model that a new training run goes on from.

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
            outcome[name] = train(house, observer, parent=parent) if name == "train" else {"audit": audit, "release": release}[name](house, observer)
    return outcome
