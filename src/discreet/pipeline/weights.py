"""The base model, public text and what a training loop is given: shared by training, audit and erasure."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from discreet import corpus, model
from discreet.errors import ModelUnsafe, NotFound
from discreet.evidence.statement import Predicate
from discreet.governance import lineage
from discreet.model import Base, PublicText
from discreet.pipeline.house import House, Observer, needed_result
from discreet.record import Basis, Digest, Snapshot
from discreet.train import loop

if TYPE_CHECKING:
    from collections.abc import Callable

PUBLIC_ADAPTER = "public-adapter"


def all_texts(house: House, snapshot: Snapshot) -> list[str]:
    """The document at each position of a snapshot."""
    return corpus.texts(snapshot, range(sum(len(positions) for positions in snapshot.units.reveal().values())), house.keyring)


def public_text(house: House, snapshot: Snapshot) -> PublicText:
    """Returns the living texts of a snapshot, for the track without privacy.

    Raises:
        TrackRefused: when the snapshot is not public.
    """
    living = sorted(position for positions in snapshot.units.reveal().values() for position in positions)  # an erased record keeps its place
    return PublicText.of(
        corpus.texts(snapshot, living, house.keyring), sensitivity=snapshot.sensitivity, basis=Basis.CONSENT
    )  # so that only its sensitivity admits it


def setup_of(house: House, base: Base, *, held_out: PublicText, start: Path | None = None, evaluations: int = 2) -> loop.Setup:
    """Returns what a training loop is given beside its texts."""
    project = house.project
    return loop.Setup(base=base, model=project.model, train=project.train, run=project.run, held_out=held_out, start=start, evaluations=evaluations)


def adapter_digest_of(folder: Path) -> Digest | None:
    """Returns the digest of the adapter in a folder; None where there is no whole one, or no longer: it may have gone with the run beside it."""
    try:
        return model.adapter_digest(folder) if folder.is_dir() else None
    except (NotFound, ModelUnsafe):
        return None


def load_base(house: House, public: PublicText | None, observer: Observer) -> Base:
    """Opens the project's base model; the tiny one is built on the project's public text, and found again by the path that training left.

    Raises:
        NotFound, ModelUnsafe, DigestMismatch, MissingExtra: when it cannot be opened.
    """
    name, cache = house.project.model.base, Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "discreet" / "models"
    if name != model.TINY:
        return model.load_base(name if name == model.SMOLLM2 else str(house.project.path(name)), cache=cache, progress=observer.note)
    if public is None:
        return model.load_base(needed_result(house, "train")["base_path"], cache=cache)
    tiny = model.build_tiny(public, cache=house.project.state / "models", steps=50, batch=16, learning_rate=1e-2, progress=observer.note)
    if house.ranks.writes:
        with house.store.transaction() as tx:
            register_base(house, tx, tiny.digest)
    return tiny


def shown_to(observer: Observer, task: str) -> Callable[[loop.StepReport], None]:
    """Returns what tells an observer about each step."""

    def show(step: loop.StepReport) -> None:
        figures = {"loss": f"{step.loss:.3f}"} | ({} if step.epsilon is None else {"epsilon": f"{step.epsilon:.2f}"})
        observer.progress(task, step.step, step.steps, figures | {"tok/s": f"{step.tokens_per_second:.0f}", "padding": f"{step.padding:.1%}"})

    return show


def rounded_curve(curve: loop.Curve) -> list[list[float]]:
    """Returns a curve as the log and the report have it."""
    return [[step, round(loss, 4)] for step, loss in curve]


def register_base(house: House, tx: Connection, digest: Digest) -> None:
    """A base model that others trained has no parents here; the tiny one was made, without privacy, from the project's public snapshots."""
    if house.project.model.base != model.TINY:
        lineage.register(tx, [lineage.Artifact(digest=digest, kind=lineage.Kind.BASE)])
        return
    lineage.derive(tx, lineage.Artifact(digest=digest, kind=lineage.Kind.MODEL), parents=public_roots(house, tx))


def public_roots(house: House, tx: Connection) -> list[Digest]:
    """The public snapshots that the lineage knows, oldest first."""
    roots = [entry.subjects[0] for entry in house.log.select(Predicate.FROZEN, tx=tx) if entry.fields["name"] == "public"]
    known = {artifact.digest for artifact in lineage.find_all(tx, roots)}
    return [root for root in roots if root in known]


def frozen_public(house: House, name: str) -> tuple[str, ...]:
    """Texts of the public snapshot that was frozen last under this name; none when there is no such."""
    found = last_public(house, name)
    return found.texts if found else ()


def last_public(house: House, name: str) -> PublicText | None:
    """Returns the text of the public snapshot that was frozen last under this name; None when there is no such."""
    found = last_frozen(house, name)
    return public_text(house, found) if found is not None else None


def last_frozen(house: House, name: str) -> Snapshot | None:
    """Returns the snapshot that was frozen last under this name; None when there is no such."""
    roots = [entry.subjects[0] for entry in house.log.select(Predicate.FROZEN) if entry.fields["name"] == name]
    return corpus.open_snapshot(roots[-1], keyring=house.keyring, folder=house.snapshots) if roots else None
