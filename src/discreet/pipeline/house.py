"""An open project, and what its finished stages left: the ground that every other part of the pipeline stands on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

from sqlalchemy import Column, Connection, String, Table, Text, delete, insert, select

from discreet.config import Project, SourceSection, digest_of
from discreet.deid import policy as deid
from discreet.errors import ErasureIncomplete, NotFound
from discreet.evidence.log import Log
from discreet.evidence.statement import Predicate
from discreet.governance.access import Access
from discreet.governance.catalog import Catalog, subject_id
from discreet.governance.consent import Consent
from discreet.governance.erasure import unfinished
from discreet.keys import Keyring
from discreet.ledger import Ledger
from discreet.record import Digest, SubjectId
from discreet.store import Store, metadata
from discreet.train.parallel import ALONE, Ranks

STAGES = ("ingest", "train", "audit", "release")
INCONCLUSIVE_RULE = "an audit that could have seen a violation"
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

    @property
    def indexes(self) -> Path:
        return self.project.state / "indexes"


def section_of(house: House, name: str) -> SourceSection:
    """Returns the [[source]] of that name.

    Raises:
        NotFound: when there is none.
    """
    section = next((section for section in house.project.source if section.name == name), None)
    if section is None:
        raise NotFound("a [[source]] of that name in discreet.toml", value=name)
    return section


def training_policy(house: House, source: SourceSection) -> deid.Policy:
    """Returns how the text of a source is de-identified for training."""
    return deid.configured(house.project.deid, deid.Channel.TRAINING, source.sensitivity)


def for_log(house: House, text: str) -> str:
    """Returns what a person typed as it may stand in the log: without identifiers."""
    return deid.redact(text, deid.configured(house.project.deid, deid.Channel.LOG)).text


def answered_for(house: House) -> str | None:
    """Who answered for the last audit's silence: an override about its adapter that was logged after it."""
    audited = house.log.select(Predicate.AUDITED)
    if not audited:
        return None
    last, adapter = audited[-1].index, Digest(str(audited[-1].fields["adapter"]))
    found = [
        e for e in house.log.entries(adapter) if e.predicate is Predicate.OVERRIDDEN and e.index > last and e.fields["rule"] == INCONCLUSIVE_RULE
    ]
    return str(found[-1].fields["by"]) if found else None


def subject_of(house: House, unit: str, *, source: str = "") -> SubjectId:
    """Returns the pseudonym of a person as the project's sources name them, or of one record of a public source."""
    if source:
        return subject_id(house.keyring, unit=f"record/{source}", value=unit)
    return subject_id(house.keyring, unit=house.project.privacy.unit, value=unit)


def refuse_unfinished(house: House) -> None:
    """Nothing is made of anybody's text while an erasure stands still.

    Raises:
        ErasureIncomplete: when somebody is restricted without a certificate.
    """
    if unfinished(house.store, house.keyring):
        raise ErasureIncomplete(
            "every erasure to be finished before anything else is made",
            value="somebody is restricted without a certificate: a killed erasure, or a restored backup",
            remedy="discreet erase --resume",
        )


class Silent:
    """An observer that shows nothing."""

    def stage(self, name: str) -> None:
        pass

    def note(self, line: str) -> None:
        pass

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None:
        pass


def run_config(house: House) -> str:
    """What identifies the computed result: everything but [run], [release] and [serve]."""
    project = house.project
    sections = (project.privacy, project.model, project.train, project.deid, *([project.search] if project.search.declared else []))
    return digest_of(
        [project.audit.canaries, project.budget.name, *([project.audit.withheld] if project.audit.withheld else [])]
        + [section.model_dump(mode="json") for section in sections]
        + [section.model_dump(mode="json") for section in project.source]
    )


def config_of(house: House, name: str) -> str:
    """What a stage's result depends on: its run, and for a release the gates too."""
    after = {"audit": (house.project.audit, None), "release": (house.project.audit, house.project.release)}.get(name, ())
    later = [section.model_dump(mode="json") for section in after if section is not None]
    if name == "release" and (by := answered_for(house)):
        later.append({"overridden": by})
    return digest_of([run_config(house), *later]) if later else run_config(house)


def result_of(house: House, name: str, config_digest: str) -> dict[str, Any] | None:
    """Returns what a stage left for a configuration; None where it has not finished."""
    with house.store.transaction() as tx:
        found = tx.execute(select(_stages.c.result).where(_stages.c.name == name, _stages.c.config == config_digest)).scalar_one_or_none()
    return None if found is None else dict(json.loads(found))


def finished_result(house: House, name: str) -> dict[str, Any] | None:
    """Returns what a stage left for this discreet.toml; None where it has not finished."""
    return result_of(house, name, config_of(house, name))


def needed_result(house: House, name: str) -> dict[str, Any]:
    """Returns what a stage left for this discreet.toml.

    Raises:
        NotFound: when it has not finished.
    """
    found = finished_result(house, name)
    if found is None:
        raise NotFound(f"the stage '{name}' to be done for this discreet.toml", remedy="Run `discreet run`.")
    return found


def finished(house: House) -> set[str]:
    """Returns the stages that are done for this discreet.toml."""
    return {name for name in STAGES if finished_result(house, name) is not None}


def keep_result(tx: Connection, name: str, config_digest: str, result: Mapping[str, Any]) -> None:
    """Writes what a stage leaves, in the transaction of its statement."""
    tx.execute(insert(_stages).values(name=name, config=config_digest, result=json.dumps(result)))


def forget_results(tx: Connection, named: Mapping[str, str]) -> list[dict[str, Any]]:
    """Takes back what stages left (name -> configuration). Returns the rows, for `restore_results`."""
    rows = []
    for name, made in named.items():
        chosen = _stages.c.name == name, _stages.c.config == made
        rows += [dict(row._mapping) for row in tx.execute(select(_stages).where(*chosen))]
        tx.execute(delete(_stages).where(*chosen))
    return rows


def restore_results(tx: Connection, rows: Sequence[Mapping[str, Any]]) -> None:
    """Puts back what `forget_results` took."""
    for row in rows:
        tx.execute(insert(_stages).values(**row))


def forget_model(tx: Connection, digest: Digest) -> None:
    """Takes back every stage's result that names weights as its adapter or base: they are gone. What is remembered stays: what a run went on from is part of its price."""
    for row in tx.execute(select(_stages).where(_stages.c.config != "")).all():
        result = json.loads(row.result)
        if digest in (result.get("adapter"), result.get("base")):
            tx.execute(delete(_stages).where(_stages.c.name == row.name, _stages.c.config == row.config))


def deployment_fact(digest: Digest) -> str:
    """Returns the name under which the project remembers which adapter a deployment serves, or a merge that lies nowhere holds."""
    return f"deployed/{digest[-23:]}"


def remember_adapter(tx: Connection, digest: Digest, adapter: Digest) -> None:
    """Remembers which adapter a deployment serves, or a merge holds."""
    remember(tx, deployment_fact(digest), {"adapter": adapter})


def fact(house: House, name: str) -> dict[str, Any] | None:
    """Returns what the project remembers under a name whatever discreet.toml says; None for nothing."""
    return result_of(house, name, "")


def facts(tx: Connection, prefix: str) -> list[dict[str, Any]]:
    """Returns everything that is remembered under names that begin so."""
    return [dict(json.loads(row.result)) for row in tx.execute(select(_stages.c.result).where(_stages.c.name.startswith(prefix)))]


def remember(tx: Connection, name: str, value: Mapping[str, Any]) -> None:
    """Remembers a value under a name whatever discreet.toml says, in place of what was there."""
    tx.execute(delete(_stages).where(_stages.c.name == name))
    keep_result(tx, name, "", value)
