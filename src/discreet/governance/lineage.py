"""What was made from what: artifacts by digest, and derived-from edges between them.

    record --> snapshot --> run --> checkpoint, adapter, merge, quantisation --> index, cache, synthetic text --> deployment

Functions of an open transaction, so that an edge is written in the same transaction as the thing it describes. A child can be registered only when all
its parents are: an artifact of unknown origin does not get a name here, and what has no name here is not served (PITFALLS 21). A digest has one kind for
life. Closures are one recursive query, in SQLite and in PostgreSQL alike; a cycle cannot be written, because parents exist before their children.

Guarantees: `descendants` is complete over the edges that were written. Source: W3C PROV-DM, `wasDerivedFrom`.

No part keeps a cache of answers, vectors or opened text, so nothing is registered as `CACHE` today; whatever would keep one has to register it, and to be a store of the erasure.

Does not cover: edges that nobody wrote (a file copied by hand), and which sentence of a parent went into a child.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from itertools import islice
from typing import Any, TypeVar, final
from uuid import NAMESPACE_URL, uuid5

from sqlalchemy import Column, Connection, ForeignKey, Index, String, Table, delete, func, insert, select

from discreet.errors import NotFound, RecordConflict
from discreet.record import Digest
from discreet.store import metadata

T = TypeVar("T")

_IN_ONE_QUERY = 500
"""Bound parameters of one query; SQLite allows 32,766, PostgreSQL 65,535."""

_artifacts = Table(
    "artifacts",
    metadata,
    Column("digest", String(71), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("protects", String(64), nullable=False),
)
_derivations = Table(
    "derivations",
    metadata,
    Column("child", String(71), ForeignKey("artifacts.digest"), primary_key=True),
    Column("parent", String(71), ForeignKey("artifacts.digest"), primary_key=True),
    Index("derivations_by_parent", "parent"),
)


class Kind(StrEnum):
    """What a digest names. `MODEL` is an adapter or a fine-tuned model, `BASE` a model that others trained."""

    RECORD = "record"
    SNAPSHOT = "snapshot"
    RUN = "run"
    CHECKPOINT = "checkpoint"
    MODEL = "model"
    BASE = "base"
    MERGE = "merge"
    QUANTISATION = "quantisation"
    INDEX = "index"
    CACHE = "cache"
    SYNTHETIC = "synthetic"
    DEPLOYMENT = "deployment"

    @property
    def has_weights(self) -> bool:
        """Whether the artifact is, holds or was drawn from weights: what a training guarantee speaks about. Nothing of one subject can be cut out of it. A checkpoint is no
        such: no guarantee speaks about it while its run is open, and any erasure destroys it whole."""
        return self not in (Kind.RECORD, Kind.SNAPSHOT, Kind.RUN, Kind.CHECKPOINT, Kind.INDEX, Kind.CACHE)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A node of the lineage. `protects` is the privacy unit for which its training was differentially private; empty when it was not."""

    digest: Digest
    kind: Kind
    protects: str = ""


def register(tx: Connection, artifacts: Sequence[Artifact]) -> None:
    """Writes artifacts that have no parents here (records, base models). Idempotent.

    Raises:
        RecordConflict: when a digest is known as something else.
    """
    stored = {artifact.digest: artifact for artifact in _find(tx, [artifact.digest for artifact in artifacts])}
    known = dict(stored)
    for artifact in artifacts:
        if known.setdefault(artifact.digest, artifact) != artifact:
            raise RecordConflict("one kind for one digest", value=f"{artifact.digest} as {known[artifact.digest].kind} and {artifact.kind}")
    rows = [{"digest": a.digest, "kind": a.kind.value, "protects": a.protects} for a in known.values() if a.digest not in stored]
    if rows:
        tx.execute(insert(_artifacts), rows)


def derive(tx: Connection, child: Artifact, *, parents: Iterable[Digest]) -> None:
    """Writes that `child` was made from `parents`. Idempotent.

    Raises:
        NotFound: when a parent is not registered: a child of unknown origin is refused.
        RecordConflict: when the child is known as something else.
    """
    wanted = list(dict.fromkeys(parents))
    unknown = set(wanted) - {artifact.digest for artifact in _find(tx, wanted)}
    if unknown or child.digest in wanted:
        raise NotFound("every parent of an artifact to be registered before it", value=f"{len(unknown)} unknown parents of {child.digest}")
    register(tx, [child])
    stored = set(tx.execute(select(_derivations.c.parent).where(_derivations.c.child == child.digest)).scalars())
    rows = [{"child": child.digest, "parent": parent} for parent in wanted if parent not in stored]
    if rows:
        tx.execute(insert(_derivations), rows)


def retire(tx: Connection, digest: Digest) -> None:
    """Forgets an artifact that was destroyed and from which nothing was derived.

    Raises:
        NotFound: when there is no such artifact.
        RecordConflict: when other artifacts were made from it.
    """
    if not _find(tx, [digest]):
        raise NotFound("a registered artifact", value=digest)
    if descendants(tx, [digest]):
        raise RecordConflict("an artifact without descendants", value=digest, remedy="Destroy and retire its descendants first.")
    tx.execute(delete(_derivations).where(_derivations.c.child == digest))
    tx.execute(delete(_artifacts).where(_artifacts.c.digest == digest))


def retire_all(tx: Connection, digests: Sequence[Digest]) -> None:
    """Forgets artifacts that were destroyed together, children before parents. What is not registered any more is passed over.

    Raises:
        RecordConflict: when something that is not among them was made from one of them.
    """
    left = [artifact.digest for artifact in _find(tx, digests)]
    while left:
        leaves = [digest for digest in left if not descendants(tx, [digest])]
        for digest in leaves or left[:1]:
            retire(tx, digest)
            left.remove(digest)


def forget_records(tx: Connection, digests: Sequence[Digest]) -> None:
    """Forgets the records of an erased subject; what was made from them stays registered."""
    for chunk in chunks([artifact.digest for artifact in _find(tx, digests) if artifact.kind is Kind.RECORD]):
        tx.execute(delete(_derivations).where(_derivations.c.parent.in_(chunk)))
        tx.execute(delete(_artifacts).where(_artifacts.c.digest.in_(chunk)))


def edges(tx: Connection) -> Iterator[tuple[Digest, Digest]]:
    """Yields every (parent, child) between artifacts that are not records."""
    parent = _artifacts.alias()
    query = select(_derivations.c.parent, _derivations.c.child).join(parent, parent.c.digest == _derivations.c.parent)
    for row in tx.execute(query.where(parent.c.kind != Kind.RECORD.value)):
        yield Digest(row.parent), Digest(row.child)


def openlineage(tx: Connection, digests: Sequence[Digest], *, namespace: str) -> list[dict[str, Any]]:
    """Returns two OpenLineage events for each artifact made from `digests`, START and COMPLETE of the run that made it: its parents are inputs, it is the output. Records are
    not named. The time is that of the export. A training run without a model, and a state of one that is open, has only its START.

    Args:
        tx: an open transaction.
        digests: artifacts or records to start from.
        namespace: the project's name for OpenLineage.
    """
    events: list[dict[str, Any]] = []
    at = datetime.now(UTC).isoformat()
    for artifact in descendants(tx, digests):
        query = select(_derivations.c.parent).where(_derivations.c.child == artifact.digest)
        above = _find(tx, [Digest(parent) for parent in tx.execute(query).scalars()])
        inputs = [{"namespace": namespace, "name": parent.digest} for parent in above if parent.kind is not Kind.RECORD]
        facets = {
            "discreet_artifact": {
                "_producer": _PRODUCER,
                "_schemaURL": f"{_PRODUCER}:artifact:v1",
                "kind": artifact.kind.value,
                "protects": artifact.protects,
            }
        }
        run = {
            "eventTime": at,
            "producer": _PRODUCER,
            "schemaURL": "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent",
            "run": {"runId": str(uuid5(NAMESPACE_URL, artifact.digest))},
            "job": {"namespace": namespace, "name": f"make {artifact.kind.value}"},
            "inputs": inputs,
        }
        made = {"namespace": namespace, "name": artifact.digest, "facets": facets}
        events.append({"eventType": "START", **run, "outputs": []})
        if artifact.kind not in (Kind.RUN, Kind.CHECKPOINT) or any(below.kind is Kind.MODEL for below in descendants(tx, [artifact.digest])):
            events.append({"eventType": "COMPLETE", **run, "outputs": [made]})
    return events


_PRODUCER = "urn:discreet"


def ancestors(tx: Connection, digests: Sequence[Digest]) -> list[Artifact]:
    """Returns everything that any of `digests` was made from, without themselves unless one comes from another, sorted by digest."""
    return _closure(tx, digests, start=_derivations.c.child, reached=_derivations.c.parent)


def descendants(tx: Connection, digests: Sequence[Digest]) -> list[Artifact]:
    """Returns everything that was made from any of `digests`, sorted by digest."""
    return _closure(tx, digests, start=_derivations.c.parent, reached=_derivations.c.child)


def find(tx: Connection, digest: Digest) -> Artifact:
    """Returns the artifact of that digest.

    Raises:
        NotFound: when it is not registered.
    """
    for artifact in _find(tx, [digest]):
        return artifact
    raise NotFound("a registered artifact", value=digest)


def find_all(tx: Connection, digests: Sequence[Digest]) -> list[Artifact]:
    """Returns those of `digests` that are registered, sorted by digest."""
    return sorted(_find(tx, digests), key=lambda artifact: artifact.digest)


def count_made(tx: Connection) -> int:
    """Returns how many artifacts are registered that are not records."""
    return int(tx.execute(select(func.count()).select_from(_artifacts).where(_artifacts.c.kind != Kind.RECORD.value)).scalar_one())


def is_known(tx: Connection, digest: Digest) -> bool:
    """Returns whether the digest is registered."""
    return bool(_find(tx, [digest]))


def chunks(items: Iterable[T], size: int = _IN_ONE_QUERY) -> Iterator[list[T]]:
    """Yields the items in lists of at most `size`."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _closure(tx: Connection, digests: Sequence[Digest], *, start: Column[str], reached: Column[str]) -> list[Artifact]:
    found: set[Digest] = set()
    for chunk in chunks(dict.fromkeys(digests)):
        step = select(reached.label("digest")).where(start.in_(chunk)).cte("reached", recursive=True)
        step = step.union(select(reached.label("digest")).join(step, start == step.c.digest))  # UNION drops what was reached before
        found.update(Digest(digest) for digest in tx.execute(select(step.c.digest)).scalars())
    return _find(tx, sorted(found))


def _find(tx: Connection, digests: Sequence[Digest]) -> list[Artifact]:
    rows = [
        row for chunk in chunks(digests) for row in tx.execute(select(_artifacts).where(_artifacts.c.digest.in_(chunk)).order_by(_artifacts.c.digest))
    ]
    return [Artifact(digest=Digest(row.digest), kind=Kind(row.kind), protects=row.protects) for row in rows]
