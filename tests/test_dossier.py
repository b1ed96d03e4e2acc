"""The officer's folder: refused when anything disagrees, equal in public for two corpora that differ in one subject, broken by any byte."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from discreet import dossier
from discreet.dp import accounting
from discreet.dp.banded import coefficients
from discreet.dp.mechanism import event_of
from discreet.dp.selection import Search, Tries
from discreet.errors import EvidenceInvalid, NotReleased, OperationFailed
from discreet.evidence import note, witness
from discreet.evidence.log import Log, verify_bundle
from discreet.evidence.statement import Predicate, Statement
from discreet.governance import lineage
from discreet.governance.lineage import Artifact, Kind
from discreet.keys import Key, Keyring
from discreet.record import Digest
from discreet.report import Exposure, Report
from discreet.store import Store

ADAPTER, OTHER, BASE = Digest("sha256:" + "ad" * 32), Digest("sha256:" + "ee" * 32), Digest("sha256:" + "ba" * 32)
SNAPSHOT, RECORD, PLAN = Digest("sha256:" + "50" * 32), Digest("sha256:" + "0e" * 32), Digest("sha256:" + "77" * 32)
Q, SIGMA, STEPS, DELTA = 0.02, 0.8, 30, 1e-5
SOFTWARE = {"components": [{"name": "x"}], "metadata": {"component": {"version": "1"}}}


DP_STATEMENT = (
    "guarantee.definition", "guarantee.epsilon", "guarantee.delta", "dp_statement.curve", "guarantee.unit", "dp_statement.mapping", "guarantee.cap", "dp_statement.cap_enforced",
    "guarantee.relation", "guarantee.mechanism", "guarantee.sampler", "dp_statement.accountant", "dp_statement.composition", "dp_statement.search", "dp_statement.preprocessing",
    "guarantee.unprotected", "guarantee.randomness", "guarantee.trust",
)  # fmt: skip
"""Definition, epsilon, delta, curve, unit and mapping, cap and enforcement, adjacency, mechanism, sampler that ran, accountant and version, composition, cost of search and preprocessing,
what is not protected, randomness, trust model."""


@pytest.fixture(scope="module")
def claim() -> dict[str, Any]:
    price = accounting.guarantee(event_of(sampling_probability=Q, noise_multiplier=SIGMA, steps=STEPS), delta=DELTA, unit="patient")
    run = {"sampling_probability": Q, "noise_multiplier": SIGMA, "steps": STEPS, "clip_norm": 0.5, "sampler": "poisson"}
    return {
        "epsilon": price.epsilon,
        "delta": DELTA,
        "unit": "patient",
        "relation": "add_remove",
        "accountant": "pld",
        "cap": 1,
        "population": 2000,
        **run,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    index: int
    predicate: str
    subjects: Sequence[str]
    fields: Mapping[str, Any]
    time: str


def statements(
    claim: Mapping[str, Any], *, people: int, run: str = "run-1", adapter: str = ADAPTER, loss: float = 2.2
) -> list[tuple[str, int, dict[str, Any]]]:
    paid = {name: claim[name] for name in ("unit", "delta", "relation", "sampling_probability", "noise_multiplier", "clip_norm", "steps", "epsilon")}
    return [
        ("collected", people, {"source": "notes", "sensitivity": "special"}),
        ("admitted", people, {"purpose": "note-assistant", "basis": "consent"}),
        ("deidentified", people, {"policy": "sha256:99", "counts": {"PERSON": people + 3}, "detector": {"samples": 40, "values": 200, "recall": 0.95, "recall_at_least": 0.91, "precision": 0.97, "precision_at_least": 0.94, "corpus": "labelled.jsonl"}}),
        ("budget_opened", 1, {"budget": "patients", "epsilon": 8.0, "delta": DELTA, "unit": "patient"}),
        ("reserved", 1, {"reservation": "r1", "run": run, "budget": "patients", "plan": PLAN, "snapshot": SNAPSHOT}),
        ("spent", 1, {"reservation": "r1", "run": run, "budget": "patients", "plan": PLAN, "kind": "training", **paid}),
        ("trained", 1, {"run": run, "plan": PLAN, "base": BASE, "adapter": adapter, "guarantee": dict(claim), "track": "dp", "steps": STEPS, "public_loss": [[0, 3.1], [30, loss]]}),
        ("audited", 1, {"adapter": adapter, "verdict": "PASS", "epsilon_lower": 0.3, "ceiling": 4.2, "detectable": 5.0, "level": 0.05}),
        ("released", 1, {"name": "notes-1", "adapter": adapter, "base": BASE, "guarantee": dict(claim), "gates": [], "controller": "ward"}),
        ("erased", 1, {"reason": "request"}),
        ("overridden", 1, {"rule": "an audit that could have seen a violation", "reason": "r", "by": "x", "value": f"held-out loss {loss}"}),
    ]  # fmt: skip


def entries(rows: Sequence[tuple[str, int, Mapping[str, Any]]]) -> list[Entry]:
    return [
        Entry(index=i, predicate=p, subjects=[f"{p}-{k}" for k in range(n)], fields=f, time=f"2026-11-23T10:00:{i:02d}.000000Z")
        for i, (p, n, f) in enumerate(rows)
    ]


def compiled(rows: Sequence[tuple[str, int, Mapping[str, Any]]], **more: Any) -> Report:
    return dossier.compile_dossier(entries(rows), public_key="log+key", software=SOFTWARE, **more)


def facts(answers: Report) -> dict[str, tuple[Any, Exposure]]:
    return {f"{s.name}.{f.name}": (f.value, f.exposure) for s in answers.sections for f in s.facts}


def test_two_corpora_that_differ_in_one_subject_have_equal_public_answers(claim: dict[str, Any]) -> None:
    """The weights, and what was measured on them, may differ: they are DP-released. Nothing else may."""
    one = facts(compiled(statements(claim, people=100)).public())
    two = facts(compiled(statements(claim, people=101, run="run-2", adapter=OTHER, loss=2.1)).public())
    assert one.keys() == two.keys()
    differing = {name for name in one if one[name] != two[name]}
    assert differing, "the test looks at something"
    assert {one[name][1] for name in differing} == {Exposure.DP_RELEASED}


def test_the_inside_says_more(claim: dict[str, Any]) -> None:
    inside, outside = facts(compiled(statements(claim, people=100))), facts(compiled(statements(claim, people=100)).public())
    assert {"records.collected", "erasure.register", "lineage.events"} <= inside.keys() - outside.keys()
    assert all(exposure is not Exposure.INTERNAL for _, exposure in outside.values())


def test_it_answers_what_the_issue_of_privacy_asks(claim: dict[str, Any]) -> None:
    found = facts(compiled(statements(claim, people=100)))
    assert found["dp_statement.recomputed_epsilon"][0] == pytest.approx(claim["epsilon"])
    curve = found["dp_statement.curve"][0]
    assert [d for d, _ in curve] == sorted((d for d, _ in curve), reverse=True)
    assert [e for _, e in curve] == sorted(e for _, e in curve)
    assert found["audit.detectable"][0] == 5.0
    wanted = ("5(1)(c)", "17", "25", "28", "30", "32(1)(d)", "35(7)(d)")
    assert {f"controls.GDPR Art. {number}" for number in wanted} <= found.keys()
    for rule in ("HIPAA 45 CFR 164.312", "HIPAA 45 CFR 164.514", "FERPA 34 CFR 99", "NIST 800-53"):
        assert any(name.startswith(f"controls.{rule}") for name in found), rule
    for name in DP_STATEMENT:
        assert found[name][0] not in (None, "", [], {}), name
    assert found["deidentification.precision"][0] == 0.97
    assert found["deidentification.recall"][0] == 0.95
    assert found["controls.GDPR Art. 17"][0]["supports"] == "right to erasure"
    text = json.dumps(dossier.to_json(compiled(statements(claim, people=100)))).lower()
    assert "compliant" not in text


def test_statistics_and_queries_are_in_the_composition(claim: dict[str, Any]) -> None:
    query = {"run": "query-2.patients", "budget": "patients", "plan": PLAN, "snapshot": None, "epsilon": 0.1, "delta": 1e-9}
    more = [
        ("reserved", 1, query | {"reservation": "patients-2", "kind": "statistics"}),
        ("measured", 1, {"what": "units", "reservation": "patients-2", "epsilon": 0.1, "values": [99], "unit": "patient"}),
        *[("reserved", 1, query | {"reservation": f"patients-{n}", "kind": "retrieval"}) for n in (3, 4)],
    ]
    rows = statements(claim, people=5)
    found = facts(compiled([*more, *rows]))
    assert [(each["kind"], each["epsilon"]) for each in found["dp_statement.composition"][0]] == [("query", 0.1), ("training", claim["epsilon"])]
    value, exposure = found["dp_statement.queries"]
    assert exposure is Exposure.INTERNAL
    assert [(each["kind"], each["charges"], each["sum_of_epsilon"], each["sum_of_delta"]) for each in value] == [
        ("retrieval", 2, 0.2, 2e-9),
        ("statistics", 1, 0.1, 1e-9),
    ]


def test_a_control_without_its_evidence_is_not_claimed(claim: dict[str, Any]) -> None:
    found = facts(compiled([row for row in statements(claim, people=5) if row[0] not in ("audited", "deidentified")]))
    assert "controls.GDPR Art. 32(1)(d)" not in found
    assert "controls.NIST 800-53 SI-19" not in found
    assert "controls.GDPR Art. 5(2)" in found


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("epsilon", 0.1, "accounted"),
        ("sampler", "shuffled", "shuffled"),
        ("sampler", "truncated_poisson", "batch_limit"),
        ("noise_multiplier", 0.9, "noise_multiplier"),
        ("steps", STEPS - 1, "steps"),
    ],
)
def test_a_claim_that_disagrees_is_refused(claim: dict[str, Any], field: str, value: Any, says: str) -> None:
    rows = copy.deepcopy(statements(claim, people=5))
    rows[6][2]["guarantee"][field] = value
    with pytest.raises(NotReleased, match=says):
        compiled(rows)


SEARCH = Search(tries=Tries.NEGATIVE_BINOMIAL, mean=4.0)


def test_a_search_is_accounted_as_a_whole(claim: dict[str, Any]) -> None:
    """The same run, claimed as the winner of a search: its epsilon is that of the selection, and the run's own is refused."""
    price = accounting.guarantee(SEARCH.event(event_of(sampling_probability=Q, noise_multiplier=SIGMA, steps=STEPS)), delta=DELTA)
    searched = claim | {"epsilon": price.epsilon, "accountant": "rdp", "search": SEARCH.to_json()}
    assert facts(compiled(statements(searched, people=5)))["dp_statement.recomputed_epsilon"][0] == pytest.approx(price.epsilon)
    with pytest.raises(NotReleased, match="accounted"):
        compiled(statements(searched | {"epsilon": claim["epsilon"]}, people=5))


def test_a_model_that_goes_on_from_another_counts_both_runs(claim: dict[str, Any]) -> None:
    """The epsilon of the last run alone is refused, and so is a run below it that claimed something else, was not paid for, or is not in the log."""
    once = statements(claim, people=5)
    both = accounting.guarantee(event_of(sampling_probability=Q, noise_multiplier=SIGMA, steps=2 * STEPS), delta=DELTA).epsilon
    onward = claim | {"epsilon": both, "continues": {"run": "run-1", "guarantee": claim}}

    def told(last: dict[str, Any], first: list[Any] = once) -> Report:
        return compiled([*first, *statements(last, people=5, run="run-2", adapter=OTHER)])

    found = facts(told(onward))
    assert found["dp_statement.recomputed_epsilon"][0] == pytest.approx(both, rel=1e-4)
    assert "run-1" in found["guarantee.continues"][0]
    with pytest.raises(NotReleased, match="accounted"):
        told(onward | {"epsilon": claim["epsilon"]})
    with pytest.raises(NotReleased, match="claimed something else"):
        told(onward | {"continues": {"run": "run-1", "guarantee": claim | {"noise_multiplier": 9.0}}})
    with pytest.raises(NotReleased, match="claimed something else"):
        told(onward, [row for row in once if row[0] != "trained"])
    with pytest.raises(NotReleased, match="nothing was charged"):
        told(onward, [row for row in once if row[0] != "spent"])


@pytest.mark.parametrize(
    "more",
    [{"sampler": "cyclic_poisson", "bands": list(coefficients(3, STEPS))}, {"adaptive": {"quantile": 0.5, "rate": 0.2, "votes_multiplier": 1.0}}],
)
def test_correlated_noise_and_a_moving_clip_are_accounted(claim: dict[str, Any], more: dict[str, Any]) -> None:
    claimed = claim | more
    price = accounting.guarantee(dossier._mechanism(claimed).event, delta=DELTA)
    assert price.epsilon != claim["epsilon"]
    rows = statements(claimed | {"epsilon": price.epsilon}, people=5)
    assert facts(compiled(rows))["dp_statement.recomputed_epsilon"][0] == pytest.approx(price.epsilon)
    with pytest.raises(NotReleased, match="accounted"):
        compiled(statements(claimed | {"epsilon": 0.9 * price.epsilon}, people=5))


def test_a_run_that_nobody_paid_for_is_refused(claim: dict[str, Any]) -> None:
    with pytest.raises(NotReleased, match="nothing was charged"):
        compiled([row for row in statements(claim, people=5) if row[0] != "spent"])


def test_an_unknown_parent_is_refused(claim: dict[str, Any]) -> None:
    with pytest.raises(NotReleased, match="parents are known"):
        compiled(statements(claim, people=5), unknown=[BASE])


def test_a_project_that_trained_nothing_has_a_dossier() -> None:
    assert "software.sbom" in facts(compiled([]))


@pytest.fixture
def project(tmp_path, claim):
    """A log with a whole story in it, and its lineage."""
    store = Store(f"sqlite:///{tmp_path}/discreet.db")
    log = Log(store, Keyring(store, Key(b"k" * 32)), "example.org/ward")
    with store.transaction() as tx:
        lineage.register(tx, [Artifact(digest=RECORD, kind=Kind.RECORD), Artifact(digest=BASE, kind=Kind.BASE)])
        lineage.derive(tx, Artifact(digest=SNAPSHOT, kind=Kind.SNAPSHOT), parents=[RECORD])
        lineage.derive(tx, Artifact(digest=ADAPTER, kind=Kind.MODEL), parents=[SNAPSHOT, BASE])
        rows = statements(claim, people=1)
        log.append_all(tx, [Statement(predicate=Predicate(p), subjects=(ADAPTER if "adapter" in f else PLAN,), fields=f) for p, _, f in rows])
    yield log, store, tmp_path
    store.close()


@pytest.mark.parametrize("public", [False, True])
def test_a_folder_verifies_with_the_key_alone_and_breaks_with_any_file(project, public):
    log, store, tmp_path = project
    folder = dossier.write(log, store, tmp_path / "out", public=public, namespace="ward")
    verified = dossier.verify(folder, public_key=log.public_key())
    assert verified.public is public
    assert dossier.is_dossier(folder)
    assert "PERSON" not in (folder / "dossier.json").read_text() or not public
    for path in [p for p in folder.rglob("*") if p.is_file()]:
        kept = path.read_bytes()
        path.write_bytes(kept[:-2] + bytes([kept[-2] ^ 1]) + kept[-1:])
        with pytest.raises(EvidenceInvalid):
            dossier.verify(folder, public_key=log.public_key())
        path.write_bytes(kept)
    (folder / "more").write_text("x")
    with pytest.raises(EvidenceInvalid, match="other files"):
        dossier.verify(folder, public_key=log.public_key())


@pytest.mark.parametrize(
    ("public", "section", "fact"),
    [
        (True, "guarantee", "epsilon"), (True, "audit", "verdict"), (False, "budget", "epsilon"), (False, "records", "admitted"), (False, "deidentification", "recall"),
        (True, "budget", "runs"), (True, "training", "adapter"), (True, "dp_statement", "recomputed_epsilon"), (True, "controls", "GDPR Art. 25"), (True, "software", "discreet"),
        (False, "dp_statement", "curve"), (False, "dp_statement", "composition"), (False, "erasure", "register"), (False, "software", "components"),
    ],
)  # fmt: skip
def test_answers_that_the_log_does_not_give_are_found_even_when_signed(project, public, section, fact):
    log, store, tmp_path = project
    folder = dossier.write(log, store, tmp_path / "out", public=public, namespace="ward")
    said = json.loads((folder / "dossier.json").read_text())
    said["sections"][section][fact]["value"] = 0.01
    _signed_again(log, folder, json.dumps(said))
    with pytest.raises(EvidenceInvalid) as caught:
        dossier.verify(folder, public_key=log.public_key())
    assert caught.value.failed == [f"dossier.json: {section}.{fact} differs from the log"]


@pytest.mark.parametrize("public", [False, True])
@pytest.mark.parametrize(
    "more",
    [
        {"status": "withheld"},
        {"sentence": "Nobody can be harmed."},
        {"extra": 1},
        {"sections": {"guarantee": {"invented": {"value": "none", "exposure": "public"}}}},
        {"sections": {"records": {"admitted": {"value": 5, "exposure": "internal"}}}},
        {"sections": {"purpose": {"purposes": {"value": ["x"], "exposure": "internal"}}}},
        {"sections": {"data_sheet": {"sources": {"value": [], "exposure": "public"}}}},
    ],
)
def test_a_signed_dossier_that_says_more_than_its_log_is_found(project, public, more):
    log, store, tmp_path = project
    folder = dossier.write(log, store, tmp_path / "out", public=public, namespace="ward")
    said = json.loads((folder / "dossier.json").read_text())
    for section, told in more.get("sections", {}).items():
        said["sections"].setdefault(section, {}).update(told)
    _signed_again(log, folder, json.dumps(said | {name: value for name, value in more.items() if name != "sections"}))
    with pytest.raises(EvidenceInvalid, match=r"dossier\.json"):
        dossier.verify(folder, public_key=log.public_key())


@pytest.mark.parametrize("content", ["[]", "1e999", '{"sections": []}', '{"sections": {"guarantee": []}}', "[" * 900 + "]" * 900])
def test_a_signed_dossier_of_another_form_is_refused(project, content):
    log, store, tmp_path = project
    folder = dossier.write(log, store, tmp_path / "out", public=False, namespace="ward")
    _signed_again(log, folder, content, public=False)
    with pytest.raises(EvidenceInvalid):
        dossier.verify(folder, public_key=log.public_key())


def test_another_release_of_the_accountant_may_differ_in_what_does_not_count(project):
    log, store, tmp_path = project
    folder = dossier.write(log, store, tmp_path / "out", public=True, namespace="ward")
    said = json.loads((folder / "dossier.json").read_text())
    stated = said["sections"]["dp_statement"]
    stated["recomputed_epsilon"]["value"] *= 1 + 1e-6
    stated["accountant"]["value"] = stated["accountant"]["value"].rpartition(" ")[0] + " 99.0"
    _signed_again(log, folder, json.dumps(said))
    assert dossier.verify(folder, public_key=log.public_key()).public


def test_evidence_of_another_version_is_computed_anew_or_says_whose_it_is(project, monkeypatch):
    log, store, tmp_path = project
    folder = dossier.write(log, store, tmp_path / "out", public=False, namespace="ward")
    made_by = dossier.__version__
    monkeypatch.setattr(dossier, "__version__", "99.0")
    assert not dossier.verify(folder, public_key=log.public_key()).public
    monkeypatch.setattr(dossier, "CONTROLS", tuple((control, f"{asks}, reworded", by) for control, asks, by in dossier.CONTROLS))
    with pytest.raises(EvidenceInvalid) as caught:
        dossier.verify(folder, public_key=log.public_key())
    assert f"made by discreet {made_by}" in caught.value.failed[-1]
    assert verify_bundle(folder / dossier.LOG, public_key=log.public_key()).entries, "the log verifies whatever its answers are called"


def _signed_again(log, folder, content, *, public=None):
    """The owner of the key puts another dossier.json under a manifest that verifies."""
    (folder / "dossier.json").write_text(content)
    payload = {
        "files": dossier._described(folder),
        "format": dossier.FORMAT,
        "origin": log.origin,
        "public": log_is_public(folder) if public is None else public,
    }
    (folder / "manifest.json").write_bytes(log.seal(dossier.canonical_json(payload), payload_type=dossier.MANIFEST_TYPE))


def log_is_public(folder):
    return json.loads((folder / "dossier.json").read_text())["audience"] != "internal"


def test_a_signed_dossier_with_a_key_twice_is_refused(project):
    """Of two values readers keep the first or the last: what one shows is not what another checked."""
    log, store, tmp_path = project
    folder = dossier.write(log, store, tmp_path / "out", public=True, namespace="ward")
    _signed_again(log, folder, '{"status": "withheld", ' + (folder / "dossier.json").read_text().lstrip()[1:])
    with pytest.raises(EvidenceInvalid, match="twice"):
        dossier.verify(folder, public_key=log.public_key())


def test_earlier_evidence_is_replaced_and_nothing_else(project):
    log, store, tmp_path = project
    folder = dossier.write(log, store, tmp_path / "out", public=False, namespace="ward")
    assert dossier.verify_any(dossier.write(log, store, folder, public=True, namespace="ward"), public_key=log.public_key()).public
    alone = log.export(tmp_path / "alone", public=True)
    assert dossier.verify_any(alone, public_key=log.public_key()).public
    dossier.verify(dossier.write(log, store, alone, public=True, namespace="ward"), public_key=log.public_key())
    (folder / "log" / "mine").write_text("x")
    with pytest.raises(OperationFailed):
        dossier.write(log, store, folder, public=False, namespace="ward")
    assert (folder / "log" / "mine").read_text() == "x"


@pytest.mark.parametrize("held", ["report.html", "manifest.json", "sbom.json", "leaves", "log/manifest.json"])
def test_a_file_that_has_the_name_of_evidence_is_not_removed(project, held):
    log, store, tmp_path = project
    mine = tmp_path / "out" / held
    mine.parent.mkdir(parents=True)
    mine.write_text("{}")
    for attempt in (
        lambda: dossier.write(log, store, tmp_path / "out", public=False, namespace="ward"),
        lambda: log.export(tmp_path / "out", public=False),
    ):
        with pytest.raises(OperationFailed, match="earlier evidence"):
            attempt()
    assert mine.read_text() == "{}"


def test_a_key_of_another_kind_is_not_overwritten(project):
    log, store, tmp_path = project
    (tmp_path / "id.pub").write_text("ssh-ed25519 AAAA me@here")
    with pytest.raises(OperationFailed, match="public key"):
        dossier.export(log, store, tmp_path / "id", public=True)
    assert (tmp_path / "id.pub").read_text() == "ssh-ed25519 AAAA me@here"
    assert not (tmp_path / "id").exists()
    for _ in range(2):
        _, key = dossier.export(log, store, tmp_path / "out", public=True)
    assert key.read_text() == log.public_key() + "\n"


@pytest.mark.parametrize(
    "left", ["out.partial/log.partial/entries.jsonl", "out.partial/dossier.json.partial", "out.partial/log/leaves", "out/manifest.json"]
)
def test_what_a_kill_left_stands_in_the_way_of_nothing(project, left):
    """Killed while it was written, or while earlier evidence was removed, of which the manifest goes last."""
    log, store, tmp_path = project
    dossier.write(log, store, tmp_path / "earlier", public=False, namespace="ward")
    (tmp_path / left).parent.mkdir(parents=True)
    (tmp_path / left).write_bytes((tmp_path / "earlier" / "manifest.json").read_bytes())
    folder = dossier.write(log, store, tmp_path / "out", public=False, namespace="ward")
    assert not dossier.verify(folder, public_key=log.public_key()).public
    assert not (tmp_path / "out.partial").exists()


def test_what_is_appended_meanwhile_breaks_no_evidence(project, monkeypatch):
    log, store, tmp_path = project
    export = log.export

    def racing(folder, *, public):
        said = Statement(predicate=Predicate.SERVED, subjects=(ADAPTER,), fields={"release": ADAPTER, "requests": 3})
        for last in (False, True):
            with store.transaction() as tx:
                log.append(tx, said)
            if not last:
                bundle = export(folder, public=public)
        return bundle

    monkeypatch.setattr(log, "export", racing)
    folder = dossier.write(log, store, tmp_path / "out", public=False, namespace="ward")
    verified = dossier.verify(folder, public_key=log.public_key())
    assert sum(e.predicate is Predicate.SERVED for e in verified.entries) == 1


def test_evidence_that_does_not_verify_replaces_nothing(project, monkeypatch):
    log, store, tmp_path = project
    folder = dossier.write(log, store, tmp_path / "out", public=False, namespace="ward")
    before = (folder / "manifest.json").read_bytes()
    to_json = dossier.to_json
    times = iter("12")
    monkeypatch.setattr(dossier, "to_json", lambda answers: to_json(answers) | {"time": next(times)})
    with pytest.raises(EvidenceInvalid):
        dossier.write(log, store, folder, public=False, namespace="ward")
    assert (folder / "manifest.json").read_bytes() == before
    assert not (tmp_path / "out.partial").exists()


def test_the_present_folder_can_be_written(project, monkeypatch):
    log, store, tmp_path = project
    for name, export in (
        ("whole", lambda: dossier.export(log, store, Path("."), public=False)[0]),
        ("alone", lambda: log.export(Path("."), public=False)),
    ):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert export() == tmp_path / name
        dossier.verify_any(tmp_path / name, public_key=log.public_key())


def test_a_log_that_is_a_link_is_refused(project):
    log, store, tmp_path = project
    folder = dossier.write(log, store, tmp_path / "out", public=False, namespace="ward")
    (folder / "log").rename(tmp_path / "elsewhere")
    (folder / "log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EvidenceInvalid):
        dossier.verify(folder, public_key=log.public_key())


def test_a_model_whose_origin_was_forgotten_gets_no_dossier(project):
    log, store, tmp_path = project
    with store.transaction() as tx:
        lineage.retire(tx, ADAPTER)
    with pytest.raises(NotReleased):
        dossier.write(log, store, tmp_path / "out", public=False, namespace="ward")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_in_it_is_left_alone(project):
    log, store, tmp_path = project
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(OperationFailed):
        dossier.write(log, store, tmp_path / "out", public=False, namespace="ward")


def test_the_bill_of_materials_is_cyclonedx_of_what_is_here():
    bill = dossier.bill_of_materials()
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    named = {c["name"]: c for c in bill["components"]}
    assert named["numpy"]["purl"] == f"pkg:pypi/numpy@{named['numpy']['version']}"
    assert len({c["bom-ref"] for c in bill["components"]}) == len(bill["components"])
    assert "discreet" not in named
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill)) is None
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill | {"components": [{"name": "x"}]})) is not None


def test_a_witness_signs_growth_and_nothing_else(project, tmp_path):
    log, store, _ = project
    first = log.export(tmp_path / "first", public=True)
    signed = witness.cosign(first, public_key=log.public_key(), name="witness.example", state=tmp_path / "witness")
    keys = [note.parse_key(log.public_key()), note.parse_key(signed["key"])]
    note.open_note(signed["checkpoint"].encode(), keys=keys)
    assert (tmp_path / "witness" / "witness.key").stat().st_mode & 0o077 == 0
    assert witness.cosigned(signed["checkpoint"].encode(), public_key=log.public_key(), witnesses=signed["key"])
    alone = "".join(line for line in signed["checkpoint"].splitlines(keepends=True) if not line.startswith(f"\N{EM DASH} {log.origin} "))
    note.open_note(alone.encode(), keys=keys)
    with pytest.raises(EvidenceInvalid, match="trusted key"):
        witness.cosigned(alone.encode(), public_key=log.public_key(), witnesses=signed["key"])
    with store.transaction() as tx:
        log.append(tx, Statement(predicate=Predicate.ERASED, subjects=(PLAN,), fields={"reason": "request"}))
    second = log.export(tmp_path / "second", public=True)
    again = witness.cosign(second, public_key=log.public_key(), name="witness.example", state=tmp_path / "witness")
    assert again["key"] == signed["key"]
    with pytest.raises(EvidenceInvalid, match="rollback"):
        witness.cosign(first, public_key=log.public_key(), name="witness.example", state=tmp_path / "witness")
