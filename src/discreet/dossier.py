"""The privacy officer's evidence: one signed folder that answers who, why, how private, how checked and from what, and that anyone checks offline.

    dossier.json    the answers, each labelled public, dp-released or internal
    report.html     the report of the same log, for people
    sbom.json       CycloneDX 1.6: every distribution that was importable where it was written
    log/            the bundle of the log that the answers were computed from (`evidence.log`)
    manifest.json   a DSSE envelope with size and SHA-256 of every file above, signed by the key of the log

`compile_dossier` computes the answers from the log's statements and the lineage; `write` puts the folder on disk; `verify` needs the folder and the public key, and computes
every answer anew that log and `sbom.json` give (the others: docs/formats.md). The public folder holds public and DP-released answers and the public log only.

Guarantees: nothing is written when the figure that is claimed is below what the accountant gives for the sampler that ran, when that sampler is not known here, when what was paid for
is not what ran, or when a model's parents are unknown. Two corpora that differ in one subject give public answers that are equal but for the DP-released ones. Control mappings are generated
from the answers that are there and say "supports": no document makes anyone compliant.

Sources: NIST SP 800-226 (2025) and the fields of the OpenDP deployment registry for the DP statement; CycloneDX 1.6 (ECMA-424); OpenLineage 2-0-2.

Does not cover: whether statements are true; the pace of entries, which the log's size and times show (docs/formats.md); packages that were loaded by path and not as a distribution.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dp_accounting import ComposedDpEvent, DpEvent

from discreet import __version__, report
from discreet.config import SourceSection
from discreet.dp import accounting
from discreet.dp.combine import Combine
from discreet.dp.mechanism import Mechanism, Sampling, mechanism_from_json
from discreet.dp.selection import Search
from discreet.errors import EvidenceInvalid, NotReleased
from discreet.evidence import note, statement
from discreet.evidence.log import BUNDLE, Log, VerifiedBundle, check_replaceable, key_beside, named, remove, verify_bundle, writing
from discreet.evidence.log import MANIFEST_TYPE as BUNDLE_TYPE
from discreet.evidence.statement import Exposure, canonical_json, parse_json
from discreet.governance import catalog, lineage
from discreet.record import Digest
from discreet.report import Fact, Logged, Report, Section
from discreet.store import Store, write_atomically

FORMAT = "discreet-dossier/v1"
MANIFEST_TYPE = "application/vnd.discreet.dossier+json"
LOG = "log"
FILES = ("dossier.json", "report.html", "sbom.json")
MANIFEST = "manifest.json"
MAX_FILE_BYTES = 64 << 20

_EARLIER = (*(f"{LOG}/{name}" for name in BUNDLE), LOG, *BUNDLE[:-1], *FILES, MANIFEST)
"""The names of earlier evidence, of a whole folder or of a log alone, in the order in which they are removed: nothing else ever is."""

_LEFT = (*(f"{LOG}.partial/{name}" for name in BUNDLE), f"{LOG}.partial", *(f"{name}.partial" for name in (*FILES, MANIFEST)), *_EARLIER)
"""What a kill may leave of an export."""

DELTAS = (1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
"""Where the privacy curve is stated."""

_SLACK = 1e-4
"""Relative difference between releases of the numerics library that a claim may have (as in `mechanism.plan_from_json`)."""

_LEFT_TO_THE_LOG = {"training.run", "training.public_runs", "budget.charges", "evidence.checkpoint", "evidence.destroyed"}
"""Facts of the report that name runs and times: the log beside the dossier has them."""

CONTROLS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("GDPR Art. 5(1)(b)", "purpose limitation", ("purpose.purposes",)),
    ("GDPR Art. 5(1)(c)", "data minimisation", ("deidentification.policy",)),
    ("GDPR Art. 5(2)", "accountability", ("evidence.public_key",)),
    ("GDPR Art. 17", "right to erasure", ("erasure.register",)),
    ("GDPR Art. 25", "data protection by design", ("guarantee.epsilon", "budget.epsilon")),
    ("GDPR Art. 28", "processor's evidence for the controller", ("purpose.controller",)),
    ("GDPR Art. 30", "records of processing", ("purpose.purposes", "evidence.public_key")),
    ("GDPR Art. 32(1)(d)", "regular testing of measures", ("audit.verdict",)),
    ("GDPR Art. 35(7)(d)", "measures named in an impact assessment", ("guarantee.epsilon", "audit.verdict")),
    ("HIPAA 45 CFR 164.312(b)", "audit controls", ("evidence.public_key",)),
    ("HIPAA 45 CFR 164.312(c)(1)", "integrity", ("evidence.public_key",)),
    ("HIPAA 45 CFR 164.514(b)", "de-identification", ("deidentification.policy",)),
    ("FERPA 34 CFR 99.31(b)", "de-identified records", ("deidentification.policy",)),
    ("FERPA 34 CFR 99.32", "record of disclosures", ("release.decision",)),
    ("NIST 800-53 AU-10", "non-repudiation", ("evidence.public_key",)),
    ("NIST 800-53 CM-8", "component inventory", ("software.sbom",)),
    ("NIST 800-53 PT-3", "personally identifiable information processing purposes", ("purpose.purposes",)),
    ("NIST 800-53 SI-19", "de-identification", ("deidentification.policy", "guarantee.epsilon")),
)
"""(control, what it asks, the answers that support it). A row is printed when all of its answers are there."""


def compile_dossier(
    entries: Sequence[Logged],
    *,
    public_key: str,
    software: Mapping[str, Any],
    origins: Sequence[Mapping[str, Any]] = (),
    unknown: Sequence[str] = (),
    sources: Mapping[str, SourceSection] = MappingProxyType({}),
) -> Report:
    """Computes the answers from the statements of a log.

    Args:
        entries: every statement.
        public_key: of the log, as text.
        software: the bill of materials (`bill_of_materials`).
        origins: how the model was made: OpenLineage events.
        unknown: digests that the run rests on and whose origin nobody knows.
        sources: the declaration of every registered source, by name.

    Raises:
        NotReleased: when a parent is unknown, or the claim, the payment, the sampler and the accountant do not agree.
    """
    built = report.build(entries, public_key=public_key)
    trained = _trained(entries)
    _refuse_unknown(unknown)
    extra = (_data_sheet(sources), *_statement(entries, trained), *_registers(entries, origins), _software(software))
    kept = (replace(s, facts=tuple(f for f in s.facts if f"{s.name}.{f.name}" not in _LEFT_TO_THE_LOG)) for s in built.sections)
    sections = tuple(section for section in (*kept, *extra) if section.facts)
    exposures = {f"{section.name}.{fact.name}": fact.exposure for section in sections for fact in section.facts}
    return replace(built, sections=(*sections, _controls(exposures)))


def write(log: Log, store: Store, folder: Path, *, public: bool, namespace: str) -> Path:
    """Writes the signed folder and returns it.

    Args:
        folder: new, empty, or earlier evidence, which is replaced once the new one is whole.
        public: only public and DP-released answers, and the public log.
        namespace: the project's name for OpenLineage.

    Raises:
        NotReleased: as `compile_dossier`; nothing is written.
        OperationFailed: when the folder holds anything else, or cannot be written.
        EvidenceInvalid: when what was written does not verify; earlier evidence is kept.
    """
    folder = named(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    check_replaceable(folder, _EARLIER, types=(MANIFEST_TYPE, BUNDLE_TYPE))
    check_replaceable(partial, _LEFT)
    with writing(partial, _LEFT):
        remove(partial, _LEFT)
        partial.mkdir(parents=True, mode=0o755 if public else 0o700)
        _write(log, store, partial, public=public, namespace=namespace)
        verify(partial, public_key=log.public_key())
        remove(folder, _EARLIER)
        partial.rename(folder)
    return folder


def _write(log: Log, store: Store, folder: Path, *, public: bool, namespace: str) -> None:
    """The log first: the answers are those of the statements under its checkpoint, whatever is appended meanwhile."""
    signed = (log.export(folder / LOG, public=public) / "checkpoint").read_bytes()
    size = note.open_checkpoint(signed, keys=note.parse_keys(log.public_key())).size
    entries = [entry for predicate in statement.Predicate for entry in log.select(predicate) if entry.index < size]
    software = bill_of_materials()
    origins, unknown = _origins(store, _trained(entries), namespace=namespace)
    with store.transaction() as tx:
        sources = catalog.declared(tx)
    answers = compile_dossier(entries, public_key=log.public_key(), software=software, origins=origins, unknown=unknown, sources=sources)
    page = report.build(entries, checkpoint=signed.decode(), public_key=log.public_key())
    shown, page = (answers.public(), page.public()) if public else (answers, page)
    contents = {"dossier.json": _json(to_json(shown)), "report.html": report.render_html(page).encode(), "sbom.json": _json(software)}
    for name, content in contents.items():
        write_atomically(folder / name, content)
    payload = canonical_json({"files": _described(folder), "format": FORMAT, "origin": log.origin, "public": public})
    write_atomically(folder / MANIFEST, log.seal(payload, payload_type=MANIFEST_TYPE))


def export(log: Log, store: Store, folder: Path, *, public: bool) -> tuple[Path, Path]:
    """Writes the folder and, beside it, the public key that verifies it; returns both paths. Arguments and errors as `write`."""
    key = key_beside(folder)
    written = write(log, store, folder, public=public, namespace=log.origin)
    write_atomically(key, (log.public_key() + "\n").encode())
    return written, key


def is_dossier(folder: Path) -> bool:
    """Returns whether a folder is to be verified as a dossier rather than as the bundle of a log."""
    return (folder / LOG).is_dir()


def verify(folder: Path, *, public_key: str, pinned: bytes | None = None) -> VerifiedBundle:
    """Verifies a folder with the public key alone: every file as signed, the log in it, and the answers against what that log says.

    Args:
        public_key: the C2SP vkey of the log, from somewhere else than the folder.
        pinned: an older checkpoint of the same log.

    Raises:
        EvidenceInvalid: `failed` names what broke.
    """
    if sorted(os.listdir(folder)) != sorted((*FILES, LOG, MANIFEST)) or (folder / LOG).is_symlink():
        raise EvidenceInvalid.of(["dossier: other files than it has"])
    verified = verify_bundle(folder / LOG, public_key=public_key, pinned=pinned)
    key = verified.keys[-1]
    payload, _ = statement.open_envelope(_read(folder / MANIFEST), payload_type=MANIFEST_TYPE, keys=note.by_label([key]))
    signed = parse_json(payload)
    described = _described(folder)
    expected = {"files": described, "format": FORMAT, "origin": key.name, "public": verified.public}
    if signed != expected:
        changed = [name for name, what in described.items() if _at(signed, "files", name) != what] or ["manifest.json"]
        raise EvidenceInvalid.of([f"{name}: differs from what was signed" for name in changed])
    _check_answers(statement.parse_once(_read(folder / "dossier.json")), verified, software=_read(folder / "sbom.json"))
    return verified


def verify_any(folder: Path, *, public_key: str, pinned: bytes | None = None) -> VerifiedBundle:
    """Verifies a dossier, or the bundle of a log alone. Arguments and errors as `verify`."""
    return (verify if is_dossier(folder) else verify_bundle)(folder, public_key=public_key, pinned=pinned)


def to_json(answers: Report) -> dict[str, Any]:
    """Returns the answers as the JSON document of docs/formats.md."""
    return answers.to_json() | {"schema": "urn:discreet:dossier:v1"}


def bill_of_materials() -> dict[str, Any]:
    """Returns a CycloneDX 1.6 document of every distribution that is importable here, in order of their names."""
    found = {_canonical(d.name): d for d in metadata.distributions() if d.name}
    components = [_component(name, found[name]) for name in sorted(found) if name != "discreet"]
    ours = {"type": "application", "bom-ref": "discreet", "name": "discreet", "version": __version__, "purl": f"pkg:pypi/discreet@{__version__}"}
    return {"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "metadata": {"component": ours}, "components": components}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _component(name: str, found: metadata.Distribution) -> dict[str, Any]:
    purl = f"pkg:pypi/{name}@{found.version}"
    made: dict[str, Any] = {"type": "library", "bom-ref": purl, "name": name, "version": found.version, "purl": purl}
    fields = found.metadata.json
    said, named = fields.get("license_expression"), str(fields.get("license") or "").strip().split("\n")[0][:120]
    if said:
        made["licenses"] = [{"expression": said}]
    elif named:
        made["licenses"] = [{"license": {"name": named}}]
    return made


def _trained(entries: Sequence[Logged]) -> Logged | None:
    """The statement that the report is about: the last model with a guarantee."""
    return max((e for e in entries if e.predicate == "trained" and e.fields.get("guarantee")), key=lambda e: e.index, default=None)


def _origins(store: Store, trained: Logged | None, *, namespace: str) -> tuple[list[dict[str, Any]], list[Digest]]:
    if trained is None:
        return [], []
    wanted = [Digest(str(trained.fields[name])) for name in ("adapter", "base")]
    with store.transaction() as tx:
        unknown = [digest for digest in wanted if not lineage.is_known(tx, digest)]
        above = [] if unknown else [a.digest for a in lineage.ancestors(tx, wanted[:1]) if a.kind is not lineage.Kind.RECORD]
        events = lineage.openlineage(tx, above, namespace=namespace)
    return events, unknown if unknown or above else wanted[:1]


def _refuse_unknown(unknown: Sequence[str]) -> None:
    if unknown:
        raise NotReleased(
            "evidence about a model whose parents are known",
            value=", ".join(unknown),
            remedy="It was withdrawn, or nobody knows its origin. The log alone can still be shown: `discreet evidence export --log-only`.",
        )


def _statement(entries: Sequence[Logged], trained: Logged | None) -> tuple[Section, ...]:
    """What NIST SP 800-226 and the OpenDP registry ask beyond the report, checked against what ran."""
    if trained is None:
        return ()
    claim = dict(trained.fields["guarantee"])
    event = _event(claim)
    _check_paid(entries, trained.fields, claim)
    price = accounting.guarantee(event, delta=claim["delta"], relation=claim["relation"], unit=claim["unit"])
    if not claim["epsilon"] >= price.epsilon * (1 - _SLACK):
        raise _disagree(f"epsilon {claim['epsilon']:.6g} claimed, {price.epsilon:.6g} accounted for {claim.get('sampler', 'poisson')} sampling")
    curve = price.curve(DELTAS) if accounting.has_pld(event) else []
    earlier = [_spend(e) for e in sorted(entries, key=lambda entry: entry.index) if e.predicate in ("spent", "measured")]
    facts = (
        Fact(
            name="curve",
            title="Privacy curve, as [delta, epsilon]",
            value=[[d, e] for d, e in zip(DELTAS[: len(curve)], curve, strict=True) if math.isfinite(e)],
        ),
        Fact(name="recomputed_epsilon", title="Epsilon, computed anew from the sampler that ran", value=price.epsilon),
        Fact(name="accountant", title="Accountant and version", value=f"{price.accountant}, dp-accounting {metadata.version('dp-accounting')}"),
        Fact(name="mapping", title="From records to units", value=f"every record names its {claim['unit']}; the corpus is frozen by {claim['unit']}"),
        Fact(name="cap_enforced", title="How the cap is enforced", value=_ENFORCED.get(str(claim.get("sampler", "poisson")), "")),
        Fact(name="composition", title="Everything released by this project under a budget, in order", value=earlier),
        Fact(name="queries", title="Queries charged, by budget and kind", value=_queries(entries), exposure=Exposure.INTERNAL),
        Fact(name="search", title="Searches for hyper-parameters that were charged", value=sum(s["kind"] == "search" for s in earlier)),
        Fact(name="preprocessing", title="Cost of preprocessing", value="de-identification and freezing look at each unit alone and release nothing"),
        Fact(name="in_range", title="Deployment tier", value="ledger-enforced: every later run on these people is charged to the same budget"),
    )
    return (Section(name="dp_statement", title="Differential privacy, as NIST SP 800-226 asks", facts=facts),)


_ENFORCED = {
    Sampling.POISSON.value: "in each step at most cap documents of a unit are taken, and clipped as one",
    Sampling.TRUNCATED_POISSON.value: "in each step at most cap documents of a unit are taken, and clipped as one",
    Sampling.CYCLIC_POISSON.value: "in each step at most cap documents of a unit are taken, and clipped as one",
    Sampling.POISSON_DOCUMENTS.value: "at most cap documents of a unit are taken, once for the whole run, each clipped alone",
}


def _event(claim: Mapping[str, Any]) -> DpEvent:
    """What ran, by the claim: one run or a whole search, composed with what it goes on from."""
    own = _mechanism(claim).event
    event = Search.from_json(claim["search"]).event(own) if "search" in claim else own
    return ComposedDpEvent([_event(claim["continues"]["guarantee"]), event]) if "continues" in claim else event


def _mechanism(claim: Mapping[str, Any]) -> Mechanism:
    """The mechanism that the claim says ran."""
    assumed = {"sampling": claim.get("sampler", Sampling.POISSON), "combine": Combine.SUM, "population": 1, "cap": 1}
    try:
        return mechanism_from_json(assumed | dict(claim))
    except (KeyError, ValueError, TypeError) as error:
        raise _disagree(str(error)) from None


def _check_paid(entries: Sequence[Logged], trained: Mapping[str, Any], claim: Mapping[str, Any]) -> None:
    """What was charged before the first noisy step is what the claim rests on, and no more steps ran; the same of every run that it goes on from."""
    if (above := claim.get("continues")) is not None:
        stated = [e.fields for e in entries if e.predicate == "trained" and e.fields.get("run") == above["run"]]
        if not stated or stated[-1]["guarantee"] != above["guarantee"]:
            raise _disagree("the run that it goes on from claimed something else")
        _check_paid(entries, stated[-1], above["guarantee"])
    paid = [e for e in entries if e.predicate == "spent" and e.fields.get("run") == trained["run"]]
    if not paid:
        raise _disagree("nothing was charged for the run")
    names = ("sampling_probability", "noise_multiplier", "clip_norm", "steps", "unit", "relation", "delta")
    differing = [name for name in names if name in paid[-1].fields and paid[-1].fields[name] != claim.get(name)]
    if differing:
        raise _disagree(f"{', '.join(differing)} of the charge differ from those of the model")
    if (trained.get("steps") or 0) > claim["steps"]:
        raise _disagree(f"{trained['steps']} steps ran, {claim['steps']} are claimed")


def _disagree(value: str) -> NotReleased:
    return NotReleased("a sampler, a charge and an accountant that agree", value=value, remedy="Do not publish this model; find out what ran.")


def _queries(entries: Sequence[Logged]) -> list[dict[str, Any]]:
    """Charges that are no training (statistics, retrieval, what was reserved by hand); their sum is no less than what they compose to."""
    found: dict[tuple[str, str], list[Logged]] = {}
    for entry in entries:
        if entry.predicate == "reserved" and entry.fields.get("kind") not in (None, "training", "search"):
            found.setdefault((str(entry.fields["budget"]), str(entry.fields.get("kind"))), []).append(entry)
    return [
        {"budget": budget, "kind": kind, "charges": len(made)}
        | {f"sum_of_{name}": math.fsum(float(e.fields[name]) for e in made if name in e.fields) for name in ("epsilon", "delta")}
        for (budget, kind), made in sorted(found.items())
    ]


def _spend(entry: Logged) -> dict[str, Any]:
    fields = {"kind": "query", **entry.fields} if entry.predicate == "measured" else entry.fields
    return {name: fields.get(name) for name in ("budget", "kind", "unit", "epsilon", "delta", "filter_epsilon", "accountant")}


def _registers(entries: Sequence[Logged], origins: Sequence[Mapping[str, Any]]) -> tuple[Section, ...]:
    erased = [{"time": e.time, "reason": e.fields.get("reason")} for e in entries if e.predicate == "erased" and "identity" in e.fields]
    changes = sum(e.predicate == "consent_changed" for e in entries)
    register = Fact(name="register", title="Erasures, oldest first", value=erased, exposure=Exposure.INTERNAL)
    consent = Fact(name="consent_changes", title="Statements of changed consent", value=changes, exposure=Exposure.INTERNAL)
    made = Fact(name="events", title="How the model was made (OpenLineage)", value=list(origins), exposure=Exposure.INTERNAL)
    return (
        Section(name="erasure", title="Erasure register", facts=(register, consent)),
        Section(name="lineage", title="Lineage", facts=(made,)),
    )


def _data_sheet(sources: Mapping[str, SourceSection]) -> Section:
    """What the owners declared of their sources when they were registered."""
    fields = ("owner", "licence", "residency", "sensitivity", "purposes", "basis", "unit", "retention_days", "role")
    sheet = [
        {"source": name} | {field: each[field] for field in fields} for name, section in sources.items() for each in [section.model_dump(mode="json")]
    ]
    facts = (Fact(name="sources", title="Sources, as they were declared", value=sheet, exposure=Exposure.INTERNAL),) if sheet else ()
    return Section(name="data_sheet", title="Data sheet", facts=facts)


def _software(software: Mapping[str, Any]) -> Section:
    listed = sha256(_json(software)).hexdigest()
    facts = (
        Fact(name="discreet", title="Version of discreet", value=software["metadata"]["component"]["version"]),
        Fact(name="sbom", title="SHA-256 of sbom.json", value=listed),
        Fact(name="components", title="Components", value=len(software["components"])),
    )
    return Section(name="software", title="Software", facts=facts)


def _controls(exposures: Mapping[str, Exposure]) -> Section:
    """The mappings whose answers are there; one is as internal as the most internal answer that it names."""
    order = (Exposure.PUBLIC, Exposure.DP_RELEASED, Exposure.INTERNAL)
    facts = tuple(
        Fact(
            name=control,
            title=f"{control}: {asks}",
            value={"supports": asks, "by": list(by)},
            exposure=max((exposures[name] for name in by), key=order.index),
        )
        for control, asks, by in CONTROLS
        if all(name in exposures for name in by)
    )
    return Section(name="controls", title="Controls that this evidence supports", facts=facts)


def _check_answers(said: object, verified: VerifiedBundle, *, software: bytes) -> None:
    """The document is what the log and sbom.json give anew, but for answers that this log does not hold: those are as they were signed, and of their exposure."""
    try:
        answers = compile_dossier(verified.entries, public_key="\n".join(map(str, verified.keys)), software=statement.parse_once(software))
    except NotReleased as error:
        raise EvidenceInvalid.of([f"dossier.json: log and sbom.json give no answers ({error})"]) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:  # which may quote what is internal
        raise EvidenceInvalid.of([f"dossier.json: log and sbom.json give no answers ({type(error).__name__})"]) from None
    expected = json.loads(json.dumps(to_json(answers.public() if verified.public else answers)))
    sections = expected["sections"]
    for section, fact, exposure in _ONLY_INSIDE if verified.public else _BESIDE_THE_LOG:
        if (value := _at(said, "sections", section, fact, "value")) is not None:
            sections.setdefault(section, {})[fact] = {"value": value, "exposure": str(exposure)}
    for fact in set(_OF_THE_ACCOUNTANT) & set(sections.get("dp_statement", {})):
        value = _at(said, "sections", "dp_statement", fact, "value")
        if _close(value, sections["dp_statement"][fact]["value"]):
            sections["dp_statement"][fact]["value"] = value
    if verified.public and isinstance(_at(said, "time"), str):  # of the last statement, which may be an internal one
        expected["time"] = _at(said, "time")
    exposures = {
        f"{section}.{name}": Exposure(fact["exposure"])
        for section, facts in sections.items()
        if section != "controls"
        for name, fact in facts.items()
    }
    sections["controls"] = {fact.name: {"value": fact.value, "exposure": str(fact.exposure)} for fact in _controls(exposures).facts}
    if _printed(said) != _printed(expected):
        wrong = [f"dossier.json: {name} differs from the log" for name in _differing(said, expected)] or ["dossier.json: says more than the log"]
        made_by = _at(expected, "sections", "software", "discreet", "value")
        if made_by != __version__:
            wrong.append(
                f"dossier.json: made by discreet {made_by}, whose wording may be another than that of {__version__}; install it, or verify log/ alone"
            )
        raise EvidenceInvalid.of(wrong)


_BESIDE_THE_LOG = (("data_sheet", "sources", Exposure.INTERNAL), ("lineage", "events", Exposure.INTERNAL))
"""Answers from the project's database."""

_ONLY_INSIDE = (("purpose", "purposes", Exposure.PUBLIC), ("deidentification", "policy", Exposure.PUBLIC))
"""Public answers from internal statements, which a public log does not show."""

_OF_THE_ACCOUNTANT = ("recomputed_epsilon", "curve", "accountant")
"""Answers that another release of the numerics library gives within `_SLACK`, and under its own version."""


def _at(document: object, *names: str) -> Any:
    for name in names:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _close(said: object, computed: object) -> bool:
    """Figures, or lists of them, within the slack; texts that differ in the last word, the version."""
    match said, computed:
        case list(), list():
            return len(said) == len(computed) and all(map(_close, said, computed))
        case str(), str():
            return said.rpartition(" ")[0] == computed.rpartition(" ")[0]
        case float(), float():
            return math.isclose(said, computed, rel_tol=_SLACK)
    return False


def _printed(document: object) -> str:
    """Tells 1 from 1.0 and true, which Python holds to be equal."""
    return json.dumps(document, sort_keys=True)


def _differing(said: object, expected: Mapping[str, Any]) -> list[str]:
    """What was expected and is not said so."""
    heads = [name for name, value in expected.items() if name != "sections" and _printed(_at(said, name)) != _printed(value)]
    facts = [(section, name, fact) for section, found in expected["sections"].items() for name, fact in found.items()]
    return heads + [f"{section}.{name}" for section, name, fact in facts if _printed(_at(said, "sections", section, name)) != _printed(fact)]


def _described(folder: Path) -> dict[str, dict[str, object]]:
    paths = {**{name: folder / name for name in FILES}, f"{LOG}/{MANIFEST}": folder / LOG / MANIFEST}
    return {name: {"sha256": sha256(content).hexdigest(), "size": len(content)} for name, path in paths.items() for content in [_read(path)]}


def _read(path: Path) -> bytes:
    """A regular file of at most 64 MiB, and no link."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > MAX_FILE_BYTES:
        raise EvidenceInvalid.of([f"{path.name}: not a regular file of at most {MAX_FILE_BYTES} bytes"])
    return path.read_bytes()


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, indent=2, ensure_ascii=False).encode()
