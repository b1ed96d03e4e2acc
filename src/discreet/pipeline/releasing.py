"""Lines 9 and 10: whether the model may leave, its signed folder, and what stands behind the gateway."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection

from discreet import corpus
from discreet.config import digest_of
from discreet.deid import policy as deid
from discreet.errors import NotFound, NotReleased, PlanInvalid
from discreet.evidence.statement import JSON, Entry, Predicate, Statement
from discreet.governance import lineage
from discreet.governance.access import Action, current_user
from discreet.pipeline.house import (
    INCONCLUSIVE_RULE,
    House,
    Observer,
    Silent,
    answered_for,
    config_of,
    finished_result,
    for_log,
    keep_result,
    needed_result,
    remember_adapter,
)
from discreet.pipeline.weights import load_base
from discreet.record import Digest, Release
from discreet.serve import gateway
from discreet.store import write_atomically

if TYPE_CHECKING:
    from discreet.serve.local import Local
    from discreet.serve.run import Behind


def release(house: House, observer: Observer) -> dict[str, Any]:
    """Signs the model out when every gate holds, else logs why it is withheld.

    Raises:
        NotReleased: when a gate does not hold.
        NotFound: when the model has not been audited.
    """
    trained, audited = needed_result(house, "train"), needed_result(house, "audit")
    done = finished_result(house, "release")
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
    declared = house.project.project
    fields = common | (
        {"base": trained["base"], "guarantee": trained["guarantee"], "purpose": house.project.purpose.name, "controller": declared.controller}
        | {"verdict": audited["verdict"]}
        if holds
        else {"reasons": [gate["gate"] for gate in gates if not gate["holds"]], "verdict": audited["verdict"]}
    )
    config = config_of(house, "release")  # it reads the log, which no other transaction may hold open
    with house.store.transaction() as tx:
        kind = Predicate.RELEASED if holds else Predicate.WITHHELD
        house.log.append(tx, Statement(predicate=kind, subjects=(Digest(trained["adapter"]),), fields=fields))
        if holds:
            _deploy(tx, name=common["name"], adapter=Digest(trained["adapter"]), unit=trained["guarantee"]["unit"])
        result = {"decision": "released" if holds else "withheld", **fields}
        keep_result(tx, "release", config, result)
    return result


def _deploy(tx: Connection, *, name: str, adapter: Digest, unit: str) -> None:
    """Writes the last edge: what is served under a name is this adapter."""
    served = lineage.Artifact(digest=digest_of({"deployment": name, "adapter": adapter}), kind=lineage.Kind.DEPLOYMENT, protects=unit)
    lineage.derive(tx, served, parents=[adapter])
    remember_adapter(tx, served.digest, adapter)


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
    by = answered_for(house) if audited["verdict"] == "INCONCLUSIVE" else None
    got = f"{audited['verdict']}, overridden by {by}" if by else audited["verdict"]
    return _gate("audit verdict", " or ".join(verdicts), got, by is not None or audited["verdict"] in verdicts)


def override_inconclusive(house: House, *, by: str, reason: str) -> None:
    """Lets a model leave whose audit could have seen nothing, in the name of a person, in the log. A FAIL cannot be overridden.

    Raises:
        NotFound: when nothing was audited.
        PlanInvalid: when the audit was not INCONCLUSIVE, or nobody is named.
    """
    house.access.require(Action.APPROVE, who=current_user())
    audited = needed_result(house, "audit")
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
    current: list[tuple[Local, Release]] = []

    def decided() -> Release:
        try:
            name = released_name(house)
        except NotFound:  # either the next model is being made, or the one that is served was withdrawn, which forgets the decision
            for _, served in current:
                _refuse_unknown_parents(house, served)
            raise
        released = load_release(house.releases / name, public_key=house.log.public_key())
        _refuse_unknown_parents(house, released)
        return released

    def server() -> Local:
        try:
            released = decided()
        except NotReleased:
            current.clear()  # the gateway lets go of it: a release that comes back is opened anew
            raise
        if not current or (current[0][1].name, current[0][1].adapter) != (released.name, released.adapter):
            engine = gateway.open_engine(released, load_base(house, None, Silent()), public_key=house.log.public_key(), key=key)
            defaults = dataclasses.replace(DEFAULTS, max_new_tokens=serving.max_new_tokens)
            current[:] = [(Local(engine, name=released.name, adapter=released.adapter, defaults=defaults), released)]
        return current[0][0]

    return Behind(
        server=server,
        key=key,
        trail=Trail(house.store, house.log),
        policy=deid.configured(house.project.deid, deid.Channel.PROMPT),
        limits=Limits(max_request_bytes=serving.max_request_bytes),
    )


def _refuse_unknown_parents(house: House, released: Release) -> None:
    with house.store.transaction() as tx:
        known = lineage.is_known(tx, released.adapter) and lineage.is_known(tx, released.base) and bool(lineage.ancestors(tx, [released.adapter]))
    if not known:
        raise NotReleased(
            "a model whose parents are known", value=released.adapter, remedy="It was withdrawn, or nobody knows what it was made from."
        )


def released_name(house: House) -> str:
    """Returns the name under which the released model is served.

    Raises:
        NotReleased: when the model was withheld. NotFound: when nothing was decided yet.
    """
    decided = needed_result(house, "release")
    if decided["decision"] != "released":
        raise NotReleased("a released model", remedy="The report says which gate did not hold.")
    return str(decided["name"])
