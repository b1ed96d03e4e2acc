"""Lines 1 to 4: what it is, whether we may use it, what is left of the person, which corpus."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from discreet import corpus
from discreet.audit import canaries as canary
from discreet.audit.canaries import Canaries
from discreet.config import SourceSection, digest_of
from discreet.deid import policy as deid
from discreet.deid.calibrate import samples_of
from discreet.deid.measure import measure
from discreet.errors import ConfigInvalid, RecordInvalid, SourceMissing, TrackRefused
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.governance import lineage
from discreet.governance.access import Action, current_user
from discreet.governance.catalog import RegisteredSource
from discreet.governance.classify import classify
from discreet.model import PublicText
from discreet.pipeline.house import House, Observer, fact, for_log, refuse_unfinished, remember, section_of, training_policy
from discreet.pipeline.weights import public_text
from discreet.record import Basis, Deidentified, Purpose, Record, Sensitivity, Snapshot, SubjectId

BATCH = 512
CANARY_SOURCE = "audit-canaries-{count}-v2"
"""A source of its own for every wording of the canaries: what is registered under a name does not change. Whoever changes what `canaries.plant` draws raises the version."""


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
    refuse_unfinished(house)
    canaries = plant_canaries(house)
    documents: dict[str, list[Deidentified]] = {"train": [], "public": [], "evaluation": []}
    refused = 0
    for section in (*house.project.source, _canary_section(house, canaries)):
        planted = rows_as_lines(canaries.rows()) if section.role == "canary" else None
        kept, num_refused = source_documents(house, section, observer, generated=planted)
        documents["train" if section.role == "canary" else section.role] += kept
        refused += num_refused
    if not documents["evaluation"]:
        raise ConfigInvalid("a [[source]] with role = 'evaluation': public held-out text", remedy="`discreet init DIR` shows one.")
    documents["train"], kept_out = _by_coin(house, documents["train"])
    snapshot = freeze(house, "train", documents["train"])
    withheld = freeze(house, "withheld", kept_out) if kept_out else None
    public = public_text(house, freeze(house, "public", documents["public"], track=corpus.Track.PUBLIC)) if documents["public"] else None
    held_out = public_text(house, freeze(house, "evaluation", documents["evaluation"], track=corpus.Track.PUBLIC))
    observer.note(f"frozen {snapshot.root}; {refused} records refused")
    return Corpus(snapshot=snapshot, public=public, held_out=held_out, canaries=canaries, refused=refused, withheld=withheld)


def _by_coin(house: House, documents: Sequence[Deidentified]) -> tuple[list[Deidentified], list[Deidentified]]:
    """Parts the people who are trained on from those whom the audit keeps out: a coin for each under the project's key, whatever they wrote and whoever else there is."""
    key, share = house.keyring.purpose("withheld"), house.project.audit.withheld
    canaries = {CANARY_SOURCE.format(count=house.project.audit.canaries)}

    def out(document: Deidentified) -> bool:
        return document.source not in canaries and int.from_bytes(key.mac(document.subject.encode())[:8]) < share * 2**64

    return [each for each in documents if not out(each)], [each for each in documents if out(each)]


def source_documents(
    house: House, section: SourceSection, observer: Observer, *, generated: bytes | None = None, purposes: Sequence[Purpose] = ()
) -> tuple[list[Deidentified], int]:
    """Lines 1 to 3 for one source, of what is admitted for one of these purposes; without any, for the project's. Also returns how many records were refused."""
    source = house.catalog.register(house.project, section, generated=generated)
    house.consent.load_opt_outs(source)
    records = house.catalog.collect(source)
    _refuse_drift(house, source, records)
    found = {each.record.digest: each for asked in purposes or (house.project.purpose,) for each in house.consent.admit_all(records, asked)[0]}
    admitted = [found[record.digest] for record in records if record.digest in found]
    keys = house.keyring.subjects([each.record.subject for each in admitted])
    policy = training_policy(house, section)
    places: dict[SubjectId, list[int]] = {}
    for place, each in enumerate(admitted):
        places.setdefault(each.record.subject, []).append(place)
    made: dict[int, Deidentified] = {}
    for number, (subject, own) in enumerate(places.items(), start=1):
        made |= zip(own, deid.deidentify_all([admitted[place] for place in own], policy, keys[subject]), strict=True)
        if number % 100 == 0 or number == len(places):
            observer.progress(f"de-identify {section.name}", len(made), len(admitted), {})
    kept = [made[place] for place in range(len(admitted))]
    _log_deidentified(house, section.name, kept, policy)
    return kept, len(records) - len(kept)


def _refuse_drift(house: House, source: RegisteredSource, records: Sequence[Record]) -> None:
    """A sample of the rows that came since the last look goes through the detectors: what looks more sensitive than the source is declared stops the ingest. A person may confirm by name.

    New rows are looked at by themselves: among all the old ones they would be too few to count.
    """
    section, key = source.section, f"classified/{digest_of([source.name])[-20:]}"
    if section.basis is Basis.GENERATED or section.sensitivity is Sensitivity.SPECIAL:
        return
    seen = (fact(house, key) or {"index": -1})["index"]
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
        remember(tx, key, {"index": told[-1].index})


def propose_sensitivity(house: House, name: str) -> dict[str, Any]:
    """Returns what a sample of a source, as it lies there now, suggests about its sensitivity: a proposal, applied by nobody. Shares stay inside.

    Raises:
        NotFound: when there is no such source.
        SourceMissing, SourceEmpty, SourceNotText, RecordInvalid, RecordConflict: as `Catalog.collect`.
    """
    house.access.require(Action.REGISTER_SOURCE, who=current_user())
    section = section_of(house, name)
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


def confirm_sensitivity(house: House, name: str, *, by: str, reason: str) -> None:
    """Records that a named person read the sample and holds these bytes to be no more sensitive than they are declared.

    Raises:
        NotFound: when there is no such source.
    """
    house.access.require(Action.REGISTER_SOURCE, who=current_user())
    source = house.catalog.register(house.project, section_of(house, name))
    fields: dict[str, JSON] = {
        "rule": "new rows look no more sensitive than their source is declared",
        "reason": for_log(house, reason),
        "name": name,
        "by": by,
    }
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.OVERRIDDEN, subjects=(source.digest,), fields=fields))


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


def freeze(house: House, name: str, documents: Sequence[Deidentified], *, track: corpus.Track = corpus.Track.DP) -> Snapshot:
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
    committed = canary.commitment(canaries, salt=key.mac(b"commitment"), design=audit_design(house))
    with house.store.transaction() as tx:
        if committed not in {entry.fields["commitment"] for entry in house.log.select(Predicate.COMMITTED, tx=tx)}:
            fields: dict[str, JSON] = {"commitment": committed, "canaries": len(canaries), "kind": "canaries and reading of the audit"}
            house.log.append(tx, Statement(predicate=Predicate.COMMITTED, subjects=(committed,), fields=fields))
    return canaries


def audit_design(house: House) -> canary.Design:
    """Returns the reading of the audit that is committed to before training."""
    return canary.Design(false_positive_rate=house.project.audit.false_positive_rate, level=house.project.audit.level)


def _canary_section(house: House, canaries: Canaries) -> SourceSection:
    """The reserved source of the canaries: generated text, one unit each, through the same door as everything else, but never in a file."""
    return generated_section(house, CANARY_SOURCE.format(count=len(canaries)), owner="audit")


def generated_section(house: House, name: str, *, owner: str) -> SourceSection:
    """Returns a source of text that our own code writes, of the project's own purpose."""
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


def rows_as_lines(rows: Sequence[Mapping[str, str]]) -> bytes:
    """Returns rows as JSON Lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
