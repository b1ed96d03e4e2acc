"""Lineage: closures are complete, origins are known, kinds do not change."""

from __future__ import annotations

import hashlib

import jsonschema
import pytest

from discreet.errors import NotFound, RecordConflict
from discreet.governance import lineage
from discreet.governance.lineage import Artifact, Kind
from discreet.record import Digest


def digest(name):
    return Digest("sha256:" + hashlib.sha256(str(name).encode()).hexdigest())


@pytest.fixture
def tx(house):
    """Two records in one snapshot, a model from it, a merged model from that; a third record in a snapshot of its own."""
    with house.store.transaction() as connection:
        lineage.register(connection, [Artifact(digest=digest(n), kind=Kind.RECORD) for n in ("r1", "r2", "r3")])
        for child, kind, parents in [
            ("s1", Kind.SNAPSHOT, ["r1", "r2"]),
            ("s2", Kind.SNAPSHOT, ["r3"]),
            ("m1", Kind.MODEL, ["s1"]),
            ("m2", Kind.MODEL, ["m1", "s2"]),
        ]:
            lineage.derive(connection, Artifact(digest=digest(child), kind=kind), parents=[digest(p) for p in parents])
        yield connection


def names(artifacts, *known):
    by_digest = {digest(name): name for name in ("r1", "r2", "r3", "s1", "s2", "m1", "m2")}
    return {by_digest[artifact.digest] for artifact in artifacts}


def test_descendants_and_ancestors_are_transitive(tx):
    assert names(lineage.descendants(tx, [digest("r1")])) == {"s1", "m1", "m2"}
    assert names(lineage.descendants(tx, [digest("r3")])) == {"s2", "m2"}
    assert names(lineage.ancestors(tx, [digest("m2")])) == {"m1", "s1", "s2", "r1", "r2", "r3"}
    assert names(lineage.ancestors(tx, [digest("m1")])) == {"s1", "r1", "r2"}
    assert lineage.descendants(tx, [digest("m2")]) == []


def test_everything_is_idempotent(tx):
    lineage.register(tx, [Artifact(digest=digest("r1"), kind=Kind.RECORD)] * 2)
    lineage.derive(tx, Artifact(digest=digest("s1"), kind=Kind.SNAPSHOT), parents=[digest("r1"), digest("r1")])
    assert names(lineage.ancestors(tx, [digest("s1")])) == {"r1", "r2"}


EVENT = {
    "type": "object",
    "required": ["eventTime", "producer", "schemaURL", "run", "job"],
    "properties": {
        "eventType": {"enum": ["START", "RUNNING", "COMPLETE", "ABORT", "FAIL", "OTHER"]},
        "eventTime": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)$"},
        "producer": {"type": "string", "pattern": r"^[a-z][a-z0-9+.-]*:\S+$"},
        "schemaURL": {"type": "string", "pattern": r"^https://openlineage\.io/spec/\d+-\d+-\d+/OpenLineage\.json#/\$defs/RunEvent$"},
        "run": {"type": "object", "required": ["runId"], "properties": {"runId": {"pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}}},
        "job": {"type": "object", "required": ["namespace", "name"]},
        **{side: {"type": "array", "items": {"$ref": "#/$defs/dataset"}} for side in ("inputs", "outputs")},
    },
    "$defs": {
        "dataset": {
            "type": "object",
            "required": ["namespace", "name"],
            "properties": {"facets": {"additionalProperties": {"type": "object", "required": ["_producer", "_schemaURL"]}}},
        }
    },
}
"""What the OpenLineage schema asks of a run event and its data sets."""


def test_events_are_what_openlineage_asks_for_and_name_no_record(tx):
    events = lineage.openlineage(tx, [digest("r1")], namespace="ward")
    for event in events:
        jsonschema.validate(event, EVENT)
    runs: dict[str, list[str]] = {}
    for event in events:
        runs.setdefault(event["run"]["runId"], []).append(event["eventType"])
    assert sorted(runs.values()) == [["START", "COMPLETE"]] * 3, "each run begins and ends once"
    made = {event["outputs"][0]["name"]: {each["name"] for each in event["inputs"]} for event in events if event["outputs"]}
    assert made == {digest("s1"): set(), digest("m1"): {digest("s1")}, digest("m2"): {digest("m1"), digest("s2")}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({key: value for key, value in events[0].items() if key != "job"}, EVENT)


def test_only_what_ended_is_complete(tx):
    """A run has its end when it has a model; a state of it never."""
    for name, kind, parents in (
        ("run", Kind.RUN, ["s1"]),
        ("state", Kind.CHECKPOINT, ["run"]),
        ("dead", Kind.RUN, ["s1"]),
        ("m3", Kind.MODEL, ["run"]),
    ):
        lineage.derive(tx, Artifact(digest=digest(name), kind=kind), parents=[digest(p) for p in parents])
    events = lineage.openlineage(tx, [digest("s1")], namespace="ward")
    ended = {event["outputs"][0]["name"] for event in events if event["eventType"] == "COMPLETE"}
    assert ended == {digest(name) for name in ("m1", "m2", "m3", "run")}
    assert len([event for event in events if event["eventType"] == "START"]) == 6


def test_an_unknown_parent_is_refused(tx):
    with pytest.raises(NotFound, match="1 unknown parent"):
        lineage.derive(tx, Artifact(digest=digest("m3"), kind=Kind.MODEL), parents=[digest("s1"), digest("stranger")])
    assert not lineage.is_known(tx, digest("m3"))


def test_a_digest_has_one_kind(tx):
    with pytest.raises(RecordConflict):
        lineage.register(tx, [Artifact(digest=digest("r1"), kind=Kind.MODEL)])
    with pytest.raises(RecordConflict):
        lineage.derive(tx, Artifact(digest=digest("m1"), kind=Kind.MODEL, protects="patient"), parents=[digest("s1")])


def test_nothing_is_its_own_parent(tx):
    with pytest.raises(NotFound):
        lineage.derive(tx, Artifact(digest=digest("s1"), kind=Kind.SNAPSHOT), parents=[digest("s1")])


def test_only_leaves_retire(tx):
    with pytest.raises(RecordConflict):
        lineage.retire(tx, digest("m1"))
    lineage.retire(tx, digest("m2"))
    lineage.retire(tx, digest("m1"))
    assert names(lineage.descendants(tx, [digest("r1")])) == {"s1"}
    with pytest.raises(NotFound):
        lineage.find(tx, digest("m1"))


def test_wide_and_deep_graphs_close(tx):
    wide = [digest(f"w{i}") for i in range(1500)]
    lineage.register(tx, [Artifact(digest=d, kind=Kind.RECORD) for d in wide])
    parent = digest("c0")
    lineage.derive(tx, Artifact(digest=parent, kind=Kind.SNAPSHOT), parents=wide)
    for step in range(1, 50):
        child = digest(f"c{step}")
        lineage.derive(tx, Artifact(digest=child, kind=Kind.MODEL), parents=[parent])
        parent = child
    assert len(lineage.ancestors(tx, [parent])) == 1500 + 49
    assert len(lineage.descendants(tx, wide)) == 50
