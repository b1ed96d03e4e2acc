"""Lines 6 and 7: reserve, spend, train; killed and called again, the same run with the same draws."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discreet import corpus, model
from discreet.audit import bounds
from discreet.audit import mechanism as rehearsal
from discreet.config import TrainSection, digest_of
from discreet.dp import mechanism
from discreet.errors import ConfigInvalid, DigestMismatch, NotAdmitted, NotFound, NotReleased, OperationFailed, RunInProgress
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.governance import lineage
from discreet.ledger import CloseReason, Kind, Reservation, State
from discreet.model import Base, PublicText
from discreet.pipeline.admission import ingest
from discreet.pipeline.continuing import Parent, claim_of, parent_of, refuse_unpromised, weights_of
from discreet.pipeline.house import House, Observer, Silent, fact, facts, finished_result, forget_results, keep_result, remember, run_config
from discreet.pipeline.pricing import calibrate, open_project_budget, plan_of, refuse_unaffordable
from discreet.pipeline.weights import (
    PUBLIC_ADAPTER,
    adapter_digest_of,
    all_texts,
    last_frozen,
    last_public,
    load_base,
    public_roots,
    register_base,
    rounded_curve,
    setup_of,
    shown_to,
)
from discreet.record import Digest, Snapshot
from discreet.train import loop
from discreet.train import search as searching
from discreet.train.checkpoint import PRIVATE, PUBLIC, Checkpoints, Placing

if TYPE_CHECKING:
    from collections.abc import Callable

CONSENT_S = 30.0
"""How often a run asks whether its records may still be used."""


def train(house: House, observer: Observer, *, parent: Parent | None = None) -> dict[str, Any]:
    """Calibrates, reserves, spends and trains (lines 5 to 7). Killed and called again, it continues the same run with the same draws and spends nothing more.

    Args:
        house: the open project.
        observer: hears of it.
        parent: the model that a new run goes on from; left out, it begins at the base. A run that was reserved before keeps what it began with.

    Raises:
        PlanInvalid: when [privacy] has no solution, or the run and those that it goes on from cannot be composed or are together above [release] max_epsilon. Nothing was spent.
        BudgetExhausted: when the budget does not admit the run. Nothing was spent.
        NothingLearned: when no trainable parameter changed.
    """
    done = finished_result(house, "train")
    if done is not None:
        house.ranks.announce(False)
        return _close_run(house, done)
    frozen = ingest(house, observer)
    observer.stage("train")
    base = load_base(house, frozen.public, observer)
    _refuse_other_base(house, base, parent)
    run, plan, reservation = _reserve(house, frozen.snapshot, parent)
    for alert in house.ledger.show(house.project.budget.name).alerts:
        observer.note(f"ALERT: {alert}")
    observer.note(
        f"{plan.steps} steps at noise multiplier {plan.noise_multiplier:.3f}: epsilon {plan.guarantee.epsilon:.2f} (PLD), delta {plan.delta:.2g}"
    )
    folder = house.project.state / "runs" / run
    house.ranks.announce(True)
    rehearsed = _rehearsed(house, plan, run)
    start = _start(house, base, frozen.public, frozen.held_out, folder, observer)
    began = time.monotonic()
    _register_run(house, run, frozen.snapshot, base, start)
    house.ledger.spend(reservation)
    house.keyring.run(run)
    house.ranks.announce(True)
    on_step = _while_admitted(house, frozen.snapshot, shown_to(observer, "train"))
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
        "guarantee": claim_of(house, run) | {"privacy_digest": house.project.privacy_digest()},
        "curve": rounded_curve(trained.curve),
        "mechanism": rehearsed,
        **({"chosen": chosen} if chosen else {}),
        "withheld": frozen.withheld.root if frozen.withheld else None,
    }
    _record_training(house, result, reservation)
    return _close_run(house, result)


def assist(house: House) -> None:
    """Reads the run that rank 0 has reserved, rehearses it, and takes its steps when it is spent: this rank decides nothing and writes nothing.

    Raises:
        RunInProgress: when not exactly one run is open.
    """
    silent, opened = Silent(), house.ledger.open_runs()
    root = opened[0].snapshot if len(opened) == 1 else None
    if root is None:
        raise RunInProgress("exactly one open run for the ranks to share", value=len(opened), remedy="Start the ranks again.")
    [reservation] = opened
    plan = plan_of(house, reservation.run)
    _rehearsed(house, plan, reservation.run)
    if not house.ranks.follow():
        return
    snapshot = corpus.open_snapshot(root, keyring=house.keyring, folder=house.snapshots)
    public, held_out = (last_public(house, name) for name in ("public", "evaluation"))
    if held_out is None:
        raise NotFound("the held-out text that rank 0 froze")
    base, folder = load_base(house, public, silent), house.project.state / "runs" / reservation.run
    start = _start(house, base, public, held_out, folder, silent)
    steps = _take_steps if plan.search is None else _search
    steps(house, snapshot, held_out, plan, reservation, base, start, lambda _: None)


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
    setup, texts = setup_of(house, base, held_out=held_out, start=start), all_texts(house, snapshot)

    def one(number: int, train_: TrainSection, adapter: Path) -> loop.Trained:
        return loop.train(
            plan,
            snapshot,
            spent,
            texts=texts,
            setup=replace(setup, train=train_),
            run_key=key.derive("try", number),
            checkpoints=checkpoints_of(house, f"{run}.{number}", parents=[_run_node(run)]),
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
        drop=lambda number: checkpoints_of(house, f"{run}.{number}").destroy(),
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
        texts=all_texts(house, snapshot),
        setup=setup_of(house, base, held_out=held_out, start=start),
        run_key=house.keyring.run(reservation.run),
        checkpoints=checkpoints_of(house, reservation.run, parents=[_run_node(reservation.run)]),
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


def _start(house: House, base: Base, public: PublicText | None, held_out: PublicText, folder: Path, observer: Observer) -> Path | None:
    """The adapter that the DP track starts from: that of the run's parent, or of the public track."""
    parent = parent_of(house, folder.name)
    if parent is None:
        return _public_track(house, base, public, held_out, folder, observer)
    if adapter_digest_of(weights_of(house, parent)) != parent.adapter:
        raise DigestMismatch("the adapter that was released", remedy="Restore the files; a run that was paid for goes on from no other.")
    observer.note(f"goes on from {parent.run}; its price and this one's count together")
    return weights_of(house, parent)


def _public_track(house: House, base: Base, public: PublicText | None, held_out: PublicText, folder: Path, observer: Observer) -> Path | None:
    """Trains the non-private track on public text first, when [train] asks for it; the DP track starts from its adapter."""
    steps, adapter = house.project.train.public_steps, folder / PUBLIC_ADAPTER
    if steps == 0:
        return None
    if public is None:
        raise ConfigInvalid("a [[source]] with role = 'public' for [train] public_steps > 0")
    run = f"public-{folder.name}"
    if run not in {entry.fields["run"] for entry in house.log.select(Predicate.TRAINED)}:
        with house.store.transaction() as tx:
            register_base(house, tx, base.digest)
            parents = [base.digest, *public_roots(house, tx)]  # without privacy: whoever is in the text can only be taken out by training again
        checkpoints = checkpoints_of(house, folder.name, track=PUBLIC, parents=parents)
        shown, snapshot = shown_to(observer, "public track"), last_frozen(house, "public")
        fitted = loop.fit(
            public,
            setup=setup_of(house, base, held_out=held_out),
            steps=steps,
            batch=house.project.privacy.expected_batch,
            order=house.keyring.purpose("public order").stream(folder.name),
            checkpoints=checkpoints,
            on_step=_while_admitted(house, snapshot, shown) if snapshot is not None else shown,
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
            house.log.append(
                tx, Statement(predicate=Predicate.TRAINED, subjects=(digest,), fields=fields | {"public_loss": rounded_curve(fitted.curve)})
            )
            lineage.derive(tx, lineage.Artifact(digest=digest, kind=lineage.Kind.MODEL), parents=parents)
        checkpoints.destroy()
    return adapter


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


def _reserve(house: House, snapshot: Snapshot, parent: Parent | None = None) -> tuple[str, mechanism.Plan, Reservation]:
    """Lines 5 and 6. A run is its configuration on its snapshot; its plan, and what it goes on from, are fixed when it is first reserved."""
    run = _run_id(house, snapshot)
    _close_abandoned(house, run)
    known = fact(house, f"plan/{run}") if house.ledger.has_run(run) else None
    plan = mechanism.plan_from_json(known) if known else calibrate(house, snapshot)
    if known is None:
        refuse_unaffordable(house, plan, snapshot)
        if parent is not None:
            refuse_unpromised(house, plan, snapshot, parent)
    open_project_budget(house, delta=plan.delta)
    if known is None:
        with house.store.transaction() as tx:
            remember(tx, f"plan/{run}", plan.to_json())
            forget_results(tx, {f"parent/{run}": ""})  # what a call left that was killed before it reserved
            if parent is not None:
                remember(tx, f"parent/{run}", parent.to_json())
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


def _refuse_other_base(house: House, base: Base, parent: Parent | None) -> None:
    """An adapter goes on the base and the parameters that it was made for, or on none."""
    if parent is None:
        return
    fits = base.digest == parent.base and model.fits(base, house.project.model, weights_of(house, parent))
    if not fits:
        remedy = "Nothing was spent. Set [model] to what it was, or train from the base (`discreet update`)."
        raise NotReleased("a released adapter for the base and the parameters of [model]", value=parent.adapter, remedy=remedy)


def _run_id(house: House, snapshot: Snapshot) -> str:
    """The same configuration on the same snapshot is the same run. Its name is public, so it comes from the configuration and a count, never from the snapshot (PITFALLS 41)."""
    made = digest_of([run_config(house), snapshot.root]).removeprefix("sha256:")
    if house.ledger.has_run(earlier := f"run-{made[:12]}"):  # named before names stopped depending on the snapshot
        return earlier
    key = f"run/{made[:24]}"
    known = fact(house, key)
    if known is not None and finished_result(house, "train") is None and _is_over(house, str(known["run"])):
        known = None  # its model was withdrawn, or it was given up: training again draws new noise, so it is a new run at a new price
    if known is None:
        with house.store.transaction() as tx:
            taken = [each["run"] for each in facts(tx, "run/")]
        numbered = (f"run-{digest_of([run_config(house), number]).removeprefix('sha256:')[:12]}" for number in count(len(taken)))
        known = {"run": next(name for name in numbered if name not in taken and not house.ledger.has_run(name))}
        with house.store.transaction() as tx:
            remember(tx, key, known)
    return str(known["run"])


def _is_over(house: House, run: str) -> bool:
    return house.ledger.has_run(run) and house.ledger.of_run(run).state is State.CLOSED


def _record_training(house: House, result: Mapping[str, Any], reservation: Reservation) -> None:
    """Logs the trained model. The snapshot's root stays inside: the statement is public (PITFALLS 41)."""
    parent = parent_of(house, result["run"])
    fields = {name: result[name] for name in ("run", "base", "adapter", "plan", "guarantee", "steps", "parameters")}
    fields |= {"track": "dp", "reservation": reservation.id, "public_loss": result["curve"]}
    kinds = ["preference tuning"] if house.project.train.objective == "preference" else []
    kinds += ["continued training"] if parent is not None else []
    kinds += ["winner of a search"] if "chosen" in result else []
    fields |= {"kind": ", ".join(kinds)} if kinds else {}
    fields |= {"chosen": result["chosen"]} if "chosen" in result else {}
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.TRAINED, subjects=(Digest(result["adapter"]),), fields=fields))
        artifact = lineage.Artifact(digest=Digest(result["adapter"]), kind=lineage.Kind.MODEL, protects=house.project.privacy.unit)
        lineage.derive(tx, artifact, parents=[_run_node(result["run"])])
        keep_result(tx, "train", run_config(house), result)


def _register_run(house: House, run: str, snapshot: Snapshot, base: Base, start: Path | None) -> None:
    """Writes the run into the lineage before it makes anything, below its snapshot, its base and the adapter that it starts from."""
    above = [model.adapter_digest(start)] if start is not None else []
    with house.store.transaction() as tx:
        register_base(house, tx, base.digest)
        lineage.derive(tx, lineage.Artifact(digest=_run_node(run), kind=lineage.Kind.RUN), parents=[snapshot.root, base.digest, *above])


def _run_node(run: str) -> Digest:
    return digest_of({"run": run})


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
            abandon(house, reservation)


def abandon(house: House, reservation: Reservation) -> None:
    """Gives a run up: closed, its key and state destroyed, its node retired unless it made a model; what it spent stays spent."""
    _destroy_state(house, reservation.run)
    with house.store.transaction() as tx:
        if not lineage.descendants(tx, [_run_node(reservation.run)]):
            lineage.retire_all(tx, [_run_node(reservation.run)])
    house.ledger.close(reservation, CloseReason.CRASH)
    house.keyring.close_run(reservation.run)
    fields: dict[str, JSON] = {"run": reservation.run, "kind": "noise and sampling", "reason": "abandoned"}
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.KEY_DESTROYED, subjects=(reservation.plan,), fields=fields))


def _destroy_state(house: House, run: str) -> None:
    """Destroys the checkpoints of a run and of its tries."""
    runs = house.project.state / "runs"
    for folder in (runs / run, *runs.glob(f"{run}.*")):
        for track in (PRIVATE, PUBLIC):
            checkpoints_of(house, folder.name, track=track).destroy()
    searching.forget(runs / run)


def checkpoints_of(house: House, run: str, *, track: str = PRIVATE, parents: Sequence[Digest] = ()) -> Checkpoints:
    """Returns where a track of a run keeps its state; whoever saves one says what it is made from."""
    return Checkpoints.of(house.project.state / "runs", run, house.keyring, track=track, placing=_placing(house, f"{run}/{track}", parents))


def _placing(house: House, place: str, parents: Sequence[Digest]) -> Placing:
    """Writes a state's node and its place in one transaction before it lies there, and afterwards takes back the nodes of those that it replaced."""
    name = f"state/{digest_of(place)[-24:]}"

    @contextmanager
    def placing(state: Digest | None) -> Iterator[None]:
        with house.store.transaction() as tx:
            before = [Digest(digest) for known in facts(tx, name) for digest in known["digests"]]
            if state is not None:
                lineage.derive(tx, lineage.Artifact(digest=state, kind=lineage.Kind.CHECKPOINT), parents=parents)
                remember(tx, name, {"digests": [*before, state]})
        yield
        if before:
            with house.store.transaction() as tx:
                lineage.retire_all(tx, [digest for digest in before if digest != state])
                forget_results(tx, {name: ""})
                if state is not None:
                    remember(tx, name, {"digests": [state]})

    return placing
