"""One record through all eleven lines of the story, on a hospital of 60 patients and a model of the size of a toy; then withdrawn at each line."""

from __future__ import annotations

import csv
import dataclasses
import errno
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch
from sqlalchemy import text

from discreet import corpus, demo, derived, dossier, duties, federate, model, pipeline, report
from discreet.audit import deployed
from discreet.cli import serving
from discreet.config import ModelSection, RetrievalSection, load
from discreet.deid import policy as deid
from discreet.dp import mechanism
from discreet.dp.selection import Search, Tries
from discreet.errors import (
    AccessDenied,
    BudgetExhausted,
    DigestMismatch,
    ErasureIncomplete,
    EvidenceInvalid,
    Forgotten,
    NotAdmitted,
    NotFound,
    NotReleased,
    PlanInvalid,
    RecordInvalid,
    RequestInvalid,
    RunInProgress,
    SourceChanged,
    SourceMissing,
    StorageFull,
    TrackRefused,
)
from discreet.evidence.log import verify_proof
from discreet.evidence.statement import Exposure, Predicate, Statement, exposure
from discreet.governance import lineage, residue
from discreet.governance.access import Access, Action, current_user
from discreet.governance.consent import Reason
from discreet.governance.erasure import Finding
from discreet.model import PublicText
from discreet.pipeline import House, Silent, admission, continuing, erasing, pricing, releasing, story, training, weights
from discreet.pipeline.admission import plant_canaries
from discreet.pipeline.continuing import last_released
from discreet.pipeline.house import facts, finished_result, forget_model, needed_result, remember, run_config
from discreet.pipeline.people import own_texts
from discreet.record import Basis, Digest, Sensitivity, Snapshot
from discreet.serve.trail import Group
from discreet.train import loop, preference

NewProject = Callable[[Path], Path]


@pytest.fixture
def project(tmp_path: Path, new_project: NewProject) -> Path:
    """A project that has not run yet."""
    return new_project(tmp_path / "hospital")


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory, new_project: NewProject) -> Path:
    """A project that ran to its end; read only."""
    folder = new_project(tmp_path_factory.mktemp("told") / "hospital")
    with pipeline.open_house(folder) as house:
        pipeline.run(house, until=None, observer=Silent())
    return folder


@pytest.fixture
def house(told: Path) -> Iterator[House]:
    with pipeline.open_house(told) as opened:
        yield opened


@pytest.fixture
def copied(told: Path, tmp_path: Path) -> Iterator[House]:
    """A copy of the told project, to be changed."""
    shutil.copytree(told, tmp_path / "hospital")
    with pipeline.open_house(tmp_path / "hospital") as opened:
        yield opened


def _one(house: House) -> Any:
    """A record of the sensitive source that was admitted."""
    source = house.catalog.register(house.project, house.project.source[0])
    admitted, _ = house.consent.admit_all(house.catalog.collect(source), house.project.purpose)
    return admitted[0]


def _root(house: House) -> Digest:
    """The snapshot that the model was trained on."""
    return next(entry.subjects[0] for entry in house.log.select(Predicate.FROZEN) if entry.fields["name"] == "train")


def test_one_record_walks_through_every_line(house: House):
    admitted = _one(house)
    digest = admitted.record.digest
    statements = pipeline.trace(house, digest)
    assert [line["predicate"] for line in statements] == ["collected", "admitted", "deidentified"]
    for line, entry in zip(statements, house.log.entries(digest), strict=True):
        verify_proof(line["proof"].encode(), envelope=entry.envelope, public_key=house.log.public_key())
    [run] = [entry for entry in house.log.select(Predicate.TRAINED) if entry.fields["track"] == "dp"]
    order = {entry.predicate: entry.index for p in Predicate for entry in house.log.select(p)}
    story = [Predicate.COMMITTED, Predicate.FROZEN, Predicate.BUDGET_OPENED, Predicate.RESERVED, Predicate.SPENT, Predicate.TRAINED]
    story += [Predicate.CLOSED, Predicate.KEY_DESTROYED, Predicate.AUDITED, Predicate.RELEASED]
    assert [p.value for p in sorted(story, key=lambda p: order[p])] == [p.value for p in story]
    assert run.fields["guarantee"]["epsilon"] <= 8
    assert run.fields["guarantee"]["epsilon"] <= run.fields["guarantee"]["filter_epsilon"]
    snapshot = corpus.open_snapshot(_root(house), keyring=house.keyring, folder=house.snapshots)
    assert digest in corpus.digests(snapshot, house.keyring)


def test_what_is_frozen_holds_no_identifier_of_anybody(house: House):
    snapshot = corpus.open_snapshot(_root(house), keyring=house.keyring, folder=house.snapshots)
    texts = "\n".join(corpus.texts(snapshot, range(20), house.keyring))
    for line in (house.project.root / "notes.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["mrn"] not in texts
        assert row["phone"] not in texts
        assert row["email"] not in texts


def test_identifiers_of_the_source_reach_no_store_log_report_bundle_prompt_or_sink(
    copied: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
):
    """From the source through every place where something is written, to a prompt and its answer."""
    from starlette.testclient import TestClient

    from discreet.serve import asgi, gateway, proxy
    from discreet.serve.engine import Piece
    from discreet.serve.tenants import Settings, Tenant

    rows = [json.loads(line) for line in (copied.project.root / "notes.jsonl").read_text().splitlines()]
    needles = sorted({row[column] for row in rows for column in ("mrn", "phone", "email", "name")})
    assert pipeline.remains(copied, needles) == [], "state, database and decoded snapshots"
    for public in (True, False):
        dossier.export(copied.log, copied.store, tmp_path / "told" / str(public), public=public)
    report.write(copied.log, tmp_path / "told")
    written = [path.read_text(errors="replace") for path in (tmp_path / "told").rglob("*") if path.is_file()]
    told = [json.dumps(pipeline.trace(copied, _one(copied).record.digest)), *written]
    assert len(written) >= 6
    seen: list[str] = []

    class Echo:
        async def generate(self, turns, sampling):
            seen.append(" ".join(turn.text for turn in turns))
            yield Piece(text=turns[-1].text, prompt_tokens=1, completion_tokens=1)
            yield Piece(text="", prompt_tokens=1, completion_tokens=1, finish_reason="stop")

        def close(self):
            """Has nothing to end."""

    monkeypatch.setattr(gateway, "open_engine", lambda *_, **__: Echo())
    api_key, hashed = asgi.new_api_key()
    behind = pipeline.behind(copied)
    settings = Settings(tenants=(Tenant(name="default", key_hashes=(hashed,), policy=behind.policy),))
    with TestClient(proxy.app(behind.server(), settings, key=behind.key, trail=behind.trail)) as client:
        said = f"Patient: {rows[0]['name']}. Write to {rows[0]['email']} or call {rows[0]['phone']}, MRN: {rows[0]['mrn']}."
        body = {"model": pipeline.released_name(copied), "messages": [{"role": "user", "content": said}]}
        answer = client.post("/v1/chat/completions", json=body, headers={"authorization": f"Bearer {api_key}"})
    behind.write()
    said_of_it = copied.log.select(Predicate.SERVED)[-1].fields
    assert (said_of_it["release"], said_of_it["requests"]) == (answer.headers["x-discreet-adapter"], 1)
    assert answer.json()["choices"][0]["message"]["content"] == said, "restored for the one who asked"
    sinks = {
        "prompt": seen[0],
        "log": caplog.text,
        "output": "".join(capsys.readouterr()),
        **{f"told {number}": text for number, text in enumerate(told)},
    }
    assert [(sink, len(needle)) for sink, text in sinks.items() for needle in needles if needle in text] == []
    assert pipeline.remains(copied, needles) == [], "after the prompt"


def test_opted_out_patients_are_refused_and_said_to_be(house: House):
    opted_out = (house.project.root / "opt_outs.txt").read_text().split()
    rows = [json.loads(line) for line in (house.project.root / "notes.jsonl").read_text().splitlines()]
    refused = [entry for entry in house.log.select(Predicate.REFUSED) if entry.fields["reason"] == Reason.OBJECTED.value]
    assert sum(len(entry.subjects) for entry in refused) == sum(row["patient"] in opted_out for row in rows) > 0


def test_a_finished_story_is_not_told_twice(house: House):
    spent = len(house.log.select(Predicate.SPENT))
    size = house.log.checkpoint()
    pipeline.run(house, until=None, observer=Silent())
    assert len(house.log.select(Predicate.SPENT)) == spent == 1
    assert house.log.checkpoint() == size


def test_no_byte_of_a_finished_run_regenerates_its_noise(house: House):
    run = house.log.select(Predicate.TRAINED)[-1].fields["run"]
    with pytest.raises(Forgotten):
        house.keyring.run(run)
    assert not list((house.project.state / "runs" / run).rglob("*.sealed"))
    assert house.log.select(Predicate.KEY_DESTROYED)[-1].fields["run"] == run
    assert (_states(house), [*(house.project.state / "runs").rglob("state")]) == ([], []), "nor is a state left, or its node"


def test_evidence_verifies_offline_and_breaks_on_any_flip(house: House, tmp_path: Path):
    folder, key = dossier.export(house.log, house.store, tmp_path / "evidence", public=False)
    public_key = key.read_text()
    assert len(dossier.verify(folder, public_key=public_key).entries) > 10
    told = json.loads((folder / "dossier.json").read_text())["sections"]
    [sheet] = [each for each in told["data_sheet"]["sources"]["value"] if each["source"] == "notes"]
    assert (sheet["sensitivity"], sheet["unit"], told["purpose"]["controller"]["value"]) == (
        "special",
        "patient",
        ["Riverside General Hospital (generated)"],
    )
    assert told["deidentification"]["precision"]["value"] > 0.5 < told["deidentification"]["recall"]["value"]
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(EvidenceInvalid):
            dossier.verify(folder, public_key=public_key)
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def test_planted_names_reach_no_sink(house: House):
    """Leaks: every identifier of ten patients, searched in every file that the project wrote."""
    rows = [json.loads(line) for line in (house.project.root / "notes.jsonl").read_text().splitlines()][:10]
    secrets = {row[column].encode() for row in rows for column in ("mrn", "phone", "email", "name")}
    written = [path for path in house.project.state.rglob("*") if path.is_file()]
    assert len(written) > 5
    for path in written:
        content = path.read_bytes()
        assert not [s for s in secrets if s in content], path


# Withdrawn at each line: the next line refuses


def test_withdrawn_after_collection_is_not_admitted(project: Path):
    with pipeline.open_house(project) as house:
        source = house.catalog.register(house.project, house.project.source[0])
        record = house.catalog.collect(source)[0]
        house.consent.withdraw(record.subject, house.project.purpose)
        with pytest.raises(NotAdmitted):
            house.consent.admit(record, house.project.purpose)


def test_a_withdrawal_stops_the_training_that_is_under_way(project: Path, monkeypatch: pytest.MonkeyPatch):
    """A run asks at least every half minute; what it spent stays spent, and the next run is on a snapshot without them."""
    assert training.CONSENT_S <= 30
    monkeypatch.setattr(training, "CONSENT_S", 0.0)
    with pipeline.open_house(project) as house:

        class Withdraws(Silent):
            def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None:
                if (task, done) == ("train", 2):
                    house.consent.withdraw(subject, house.project.purpose)

        subject = _one(house).record.subject
        with pytest.raises(NotAdmitted, match="until the run ends"):
            pipeline.train(house, Withdraws())
        spent = house.ledger.budgets()[0].remaining_epsilon
        assert spent < house.project.budget.epsilon
        assert not house.log.select(Predicate.TRAINED)
        assert subject not in pipeline.ingest(house, Silent()).snapshot.units.reveal()


def test_a_withdrawn_public_record_stops_the_track_that_learns_from_it(project: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "CONSENT_S", 0.0)
    settings = project / "discreet.toml"
    settings.write_text(settings.read_text().replace("public_steps = 0", "public_steps = 2"))
    row = json.loads((project / "public_train.jsonl").read_text().splitlines()[3])
    with pipeline.open_house(project) as house:

        class Withdraws(Silent):
            def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None:
                if (task, done) == ("public track", 1):
                    house.consent.withdraw(pipeline.may_record_consent(house, row["id"], source="public"), house.project.purpose)

        with pytest.raises(NotAdmitted, match="until the run ends"):
            pipeline.train(house, Withdraws())
        assert not house.log.select(Predicate.SPENT), "no private step was taken"
        before = len(weights.frozen_public(house, "public"))
        pipeline.ingest(house, Silent())
        assert len(weights.frozen_public(house, "public")) == before - 1


def test_a_state_on_disk_is_a_node_below_its_run_until_it_goes(project: Path, monkeypatch: pytest.MonkeyPatch):
    """A run is killed in mid-air, then while a state takes the place of another; each file that lies there has its node, and no node outlives what an erasure destroys."""
    seen: list[list[Digest]] = []

    class Killed(Silent):
        def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None:
            if task == "train":
                seen.append(_states(house))
            if (task, done) == ("train", 2):
                raise KeyboardInterrupt

    with pipeline.open_house(project) as house:
        with pytest.raises(KeyboardInterrupt):
            pipeline.train(house, Killed())
        [state] = (house.project.state / "runs").glob("*/private/state")
        lies = model.file_digest(state)
        assert ([len(each) for each in seen], seen[-1], seen[0] != seen[-1]) == ([1, 1], [lies], True)
        with house.store.transaction() as tx:
            above = {each.kind for each in lineage.ancestors(tx, [lies])}
        assert above == {lineage.Kind.RECORD, lineage.Kind.SNAPSHOT, lineage.Kind.BASE, lineage.Kind.RUN}
        unit = json.loads((project / "notes.jsonl").read_text().splitlines()[-1])["patient"]
        told = {(event["job"]["name"], event["eventType"]) for event in pipeline.lineage_export(house, digest=_root(house))}
        assert told == {("make run", "START"), ("make checkpoint", "START")}, "neither is at its end"

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "replace", _killed)
            pipeline.train(house, Silent())
        assert (lies in _states(house), len(_states(house))) == (True, 2), "what was to be replaced lies there still"
        pipeline.erase(house, unit)
        assert (_states(house), [*(house.project.state / "runs").glob("*/private/*")]) == ([], [])
        assert pipeline.lineage_export(house, digest=_root(house)) == [], "nor a run that was given up"


def _states(house: House) -> list[Digest]:
    root = _root(house)
    with house.store.transaction() as tx:
        made = lineage.descendants(tx, [root])
    return [each.digest for each in made if each.kind is lineage.Kind.CHECKPOINT]


def test_not_admitted_cannot_be_deidentified(house: House):
    record = _one(house).record
    with pytest.raises((TypeError, AttributeError)):
        deid.deidentify(record, deid.BUILTIN["surrogate"], house.keyring.subject(record.subject))


def test_withdrawn_after_freezing_is_in_no_later_snapshot(project: Path):
    with pipeline.open_house(project) as house:
        before = pipeline.ingest(house, Silent()).snapshot
        subject = next(s for s, positions in before.units.reveal().items() if len(positions) > 1)
        house.consent.withdraw(subject, house.project.purpose)
        after = pipeline.ingest(house, Silent()).snapshot
        assert subject not in after.units.reveal()
        assert after.num_units == before.num_units - 1
        assert after.root != before.root


def test_a_changed_source_is_refused_before_training(project: Path):
    with pipeline.open_house(project) as house:
        pipeline.ingest(house, Silent())
    notes = project / "notes.jsonl"
    notes.write_text(notes.read_text().replace("cough", "coughs"))
    with pipeline.open_house(project) as house, pytest.raises(SourceChanged):
        pipeline.train(house, Silent())


def test_a_model_is_not_audited_before_it_is_trained(project: Path):
    with pipeline.open_house(project) as house:
        with pytest.raises(NotFound):
            pipeline.audit(house, Silent())
        with pytest.raises(NotFound):
            pipeline.release(house, Silent())


def test_an_exhausted_budget_refuses_a_second_run(copied: House, monkeypatch: pytest.MonkeyPatch):
    settings = copied.project.root / "discreet.toml"
    settings.write_text(settings.read_text().replace("learning_rate = 1e-2", "learning_rate = 2e-2"))
    copied_again = _reloaded(copied)
    for least, admitted in ((pricing.NOTHING_LEFT, r"0\.\d+"), (1.0, "0")):  # what is left admits a run of much noise, or none at all
        monkeypatch.setattr(pricing, "NOTHING_LEFT", least)
        with pytest.raises(BudgetExhausted, match=rf"it admits a run of epsilon {admitted}\. "):
            pipeline.train(copied_again, Silent())
    assert len(copied.log.select(Predicate.SPENT)) == 1


def _reloaded(house: House) -> House:
    """The same house under the discreet.toml that now lies there."""
    return House(**{**{name: getattr(house, name) for name in house.__dataclass_fields__}, "project": load(house.project.root)})


def test_a_paced_budget_trains_once_a_period(project: Path, monkeypatch: pytest.MonkeyPatch):
    """[budget] periods from the file to the run: the first share trains one run and alerts, the next run waits for its period, and an unused share is forfeited."""
    settings, days, real = project / "discreet.toml", 0.0, time.time
    monkeypatch.setattr(time, "time", lambda: real() + days * 86_400)
    paced = '[budget]\nname = "paced"\nepsilon = 12.0\nperiods = 3\nperiod_days = 30\ncarry_over = "none"\n\n'
    settings.write_text(re.sub(r"\[budget\]\n.*?\n\n", paced, settings.read_text(), flags=re.DOTALL))
    heard = _Heard()

    def trained(learning_rate: str) -> pipeline.House:
        settings.write_text(re.sub(r"learning_rate = .*", f"learning_rate = {learning_rate}", settings.read_text(), count=1))
        again = _reloaded(house)
        pipeline.train(again, heard)
        return again

    with pipeline.open_house(project) as house:
        trained("3e-3")
        with pytest.raises(BudgetExhausted, match="next period"):
            trained("4e-3")
        assert house.ledger.show("paced").unlocked == pytest.approx(1 / 3)
        days = 61.0
        trained("5e-3")
        with pytest.raises(BudgetExhausted):
            trained("6e-3")
        assert house.ledger.show("paced").unlocked == 1.0
        assert [entry.fields["epsilon"] <= 8 for entry in house.log.select(Predicate.SPENT)] == [True] * 2
        assert house.ledger.show("paced").remaining_epsilon > 1, "the share of the second period is there, and gone"
    assert any("ALERT: budget 'paced'" in note for note in heard.notes)


def test_a_plan_for_a_pld_epsilon_says_what_the_budget_counts(project: Path):
    settings = project / "discreet.toml"
    settings.write_text(settings.read_text().replace('target = "budget"', 'target = "pld"'))
    with pipeline.open_house(project) as house:
        assert not pipeline.price(house, Silent()).admitted
        with pytest.raises(BudgetExhausted, match=r"by RDP for the plan's .* by PLD; 8 is left"):
            pipeline.train(house, Silent())
        assert not house.log.select(Predicate.RESERVED)
        assert not house.log.select(Predicate.BUDGET_OPENED), "nothing was opened, nothing spent"


def test_the_reason_for_a_large_delta_reaches_the_log_without_names(project: Path):
    settings = project / "discreet.toml"
    large = 'delta = 0.01\nallow_large_delta = "a pilot, agreed with Mr. Quentin Vandersloot"\n'
    settings.write_text(settings.read_text().replace("[privacy]\n", f"[privacy]\n{large}"))
    with pipeline.open_house(project) as house:
        _, plan, reservation = training._reserve(house, pipeline.ingest(house, Silent()).snapshot)
        [said] = house.log.select(Predicate.OVERRIDDEN)
        assert said.subjects == (plan.digest,)
        assert (said.fields["value"], said.fields["run"]) == (0.01, reservation.run)
        assert said.fields["reason"].startswith("a pilot, agreed with")
        assert "Vandersloot" not in said.envelope.decode()


def test_the_control_is_gone_and_the_log_says_so(house: House):
    audited = house.log.select(Predicate.AUDITED)[-1]
    gone = [entry for entry in house.log.entries(audited.subjects[0]) if entry.predicate is Predicate.CONTROL_DESTROYED]
    assert [(entry.fields["run"], entry.fields["kind"]) for entry in gone] == [(audited.fields["run"], "non-private, canaries only")]
    assert gone[0].index > audited.index
    known = {entry.fields["adapter"] for entry in house.log.select(Predicate.TRAINED)}
    left = [path.parent for path in house.project.state.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".bin", ".pt", ".sealed")]
    assert {model.adapter_digest(folder) for folder in left} == known, "no weights but the private model's"


def test_the_detectors_are_measured_on_labelled_text(house: House):
    measured = [entry.fields["detector"] for entry in house.log.select(Predicate.DEIDENTIFIED)]
    assert measured
    assert all(each["values"] > 100 and 0.9 <= each["recall"] <= 1 and each["recall_at_least"] < each["recall"] for each in measured)


def test_a_project_that_planted_canaries_of_other_words_before_still_ingests(project: Path):
    with pipeline.open_house(project) as house:
        names = [each.name for each in plant_canaries(house) if each.included]
        rows = [{"id": name, "unit": name, "text": f"The blue door is number {number}."} for number, name in enumerate(names)]
        before = admission.generated_section(house, f"audit-canaries-{house.project.audit.canaries}", owner="audit")
        admission.source_documents(house, before, Silent(), generated=admission.rows_as_lines(rows))
        texts = weights.all_texts(house, pipeline.ingest(house, Silent()).snapshot)
    assert not any("blue door" in text for text in texts)


def test_labelled_text_that_is_missing_or_broken_stops_the_ingest(project: Path):
    with pipeline.open_house(project) as house:
        (project / "labelled.jsonl").write_text("{broken\n")
        with pytest.raises(RecordInvalid):
            pipeline.ingest(house, Silent())
        (project / "labelled.jsonl").unlink()
        with pytest.raises(SourceMissing):
            pipeline.ingest(house, Silent())


def test_csv_parquet_and_a_folder_of_texts_train_too(project: Path):
    notes = [json.loads(line) for line in (project / "notes.jsonl").read_text().splitlines()]
    with (project / "notes.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(notes[0]))
        writer.writeheader()
        writer.writerows(notes)
    public = [json.loads(line) for line in (project / "public_train.jsonl").read_text().splitlines()]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(public), project / "public.parquet")
    (project / "held" / "out").mkdir(parents=True)
    for line in (project / "held_out.jsonl").read_text().splitlines():
        row = json.loads(line)
        (project / "held" / "out" / f"{row['id']}.txt").write_text(row["text"])
    settings = project / "discreet.toml"
    said = settings.read_text().replace('"notes.jsonl"\nformat = "jsonl"', '"notes.csv"\nformat = "csv"')
    said = said.replace('"public_train.jsonl"', '"public.parquet"\nformat = "parquet"').replace('"held_out.jsonl"', '"held"\nformat = "text"')
    settings.write_text(said)
    with pipeline.open_house(project) as house:
        trained = pipeline.run(house, until="train", observer=Silent())["train"]
        assert [section.format for section in house.project.source] == ["csv", "parquet", "text"]
        assert house.log.select(Predicate.FROZEN)[-1].fields["name"] == "evaluation"
    assert trained["moved"] == trained["parameters"] > 0


def test_pairs_are_learnt_by_preference_through_the_whole_pipeline(project: Path):
    """DPO from the source to the release: the marks survive de-identification, a pair is a document of its patient, and the log says what kind of tuning it was."""
    notes = [json.loads(line) for line in (project / "notes.jsonl").read_text().splitlines()]
    for note in notes:
        note["text"] = f"{note['text']}{preference.CHOSEN}Call back in two days.{preference.REJECTED}No answer."
    (project / "notes.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes))
    settings = project / "discreet.toml"
    settings.write_text(settings.read_text().replace("[train]", '[train]\nobjective = "preference"'))
    with pipeline.open_house(project) as house:
        told = pipeline.run(house, until=None, observer=Silent())
        result = told["train"]
        assert result["moved"] == result["parameters"] > 0
        assert pipeline.released_name(house)
        assert result["guarantee"]["unit"] == "patient"
        [trained] = [entry for entry in house.log.select(Predicate.TRAINED) if entry.fields["track"] == "dp"]
        assert trained.fields["kind"] == "preference tuning"
        snapshot = corpus.open_snapshot(_root(house), keyring=house.keyring, folder=house.snapshots)
        texts = weights.all_texts(house, snapshot)
        base = model.load_base(house.project.model.base, cache=house.project.state / "models")
        pairs = [preference.encode(each, base, max_tokens=house.project.model.max_tokens, beta=0.1) for each in texts]
        assert sum(pair is not None for pair in pairs) > 0.9 * len(notes) - 10, "all but the opted-out, beside canaries"
        assert any(pair is None for pair in pairs), "the canaries are no pairs"


def test_ranks_and_a_learning_gateway_start_for_those_who_may(project: Path):
    with (project / "discreet.toml").open("a") as file:
        file.write('\n[access]\nowner = ["olga"]\nengineer = ["emil"]\n')
    with pytest.raises(AccessDenied):
        pipeline.train_together(project, Silent())
    with pytest.raises(AccessDenied), serving._learner(project, "notes"):
        pass
    with pytest.raises(AccessDenied):
        federate.enroll(project, Silent())


def test_a_raised_budget_keeps_the_runs_that_were_reserved_from_it(copied: House):
    before = run_config(copied)
    copied.ledger.raise_to(copied.project.budget.name, 9.0, reason="a second year of notes")
    pipeline.open_project_budget(copied, delta=copied.project.privacy.delta or 1e-3)
    assert copied.ledger.show(copied.project.budget.name).epsilon == 9.0
    settings = copied.project.root / "discreet.toml"
    text = settings.read_text()
    settings.write_text(text.replace('name = "patients"\nepsilon = 8.0', 'name = "patients"\nepsilon = 9.0'))
    assert settings.read_text() != text
    assert (
        run_config(House(**{**{name: getattr(copied, name) for name in copied.__dataclass_fields__}, "project": load(copied.project.root)})) == before
    )


def test_an_erased_public_record_leaves_a_hole_that_is_read_around(copied: House):
    row = json.loads((copied.project.root / "public_train.jsonl").read_text().splitlines()[3])
    before = weights.frozen_public(copied, "public")
    pipeline.erase(copied, row["id"], source="public")
    after = weights.frozen_public(copied, "public")
    assert (len(after), set(after) < set(before)) == (len(before) - 1, True)


def test_text_that_a_withdrawn_model_wrote_is_destroyed_where_it_was_put(copied: House, tmp_path: Path):
    made = derived.synthesize(copied, count=2, out=tmp_path / "texts.jsonl", max_tokens=8)
    other = derived.synthesize(copied, count=1, out=tmp_path / "changed.jsonl", max_tokens=8)
    (tmp_path / "changed.jsonl").write_text("somebody else's file by now\n")
    models = erasing._ProjectModels(copied)
    for digest in (made["digest"], other["digest"]):
        models.withdraw(digest)
    assert not (tmp_path / "texts.jsonl").exists()
    assert (tmp_path / "changed.jsonl").exists(), "a file that is no longer what the model wrote is not ours to destroy"


def test_text_that_a_model_wrote_is_searched_for_a_person(copied: House, tmp_path: Path):
    made = derived.synthesize(copied, count=1, out=tmp_path / "texts.jsonl", max_tokens=8)
    subject = _one(copied).record.subject
    models = erasing._ProjectModels(copied)
    assert models.test(subject, made["digest"]) is Finding.NOT_EXPOSED
    mine, known, _ = own_texts(copied, subject)[0]
    for leak in (mine, known["PERSON"][0]):
        file = tmp_path / "leak.jsonl"
        file.write_text(json.dumps({"text": f"he said {leak}"}, ensure_ascii=False) + "\n")
        digest = Digest("sha256:" + hashlib.sha256(file.read_bytes()).hexdigest())
        with copied.store.transaction() as tx:
            pipeline.record_written(tx, digest, file)
        assert models.test(subject, digest) is Finding.EXPOSED


def test_a_model_that_remembers_a_person_is_found_after_relearning_too(copied: House, monkeypatch: pytest.MonkeyPatch):
    """A non-private adapter on one person's frozen text, its memory covered at first sight; the project's own adapter shows nothing either way."""
    models, subject = erasing._ProjectModels(copied), _one(copied).record.subject
    own, base = own_texts(copied, subject), pipeline.load_base(copied, None, Silent())
    frozen = [deid.redact(text, policy, known=known, key=copied.keyring.subject(subject)).text for text, known, policy in own]
    learnt = PublicText.of(frozen, sensitivity=Sensitivity.INTERNAL, basis=Basis.GENERATED)
    setup = weights.setup_of(copied, base, held_out=learnt, evaluations=1)
    module = loop.fit(learnt, setup=setup, steps=60, batch=4, order=copied.keyring.purpose("test").stream("order")).module
    folder = copied.project.state / "runs" / "remembers" / "adapter"
    remembers = model.save_adapter(module, folder)
    said = {"run": "remembers", "track": "public", "base": base.digest, "adapter": remembers, "plan": None, "guarantee": None, "steps": 60}
    with copied.store.transaction() as tx:
        copied.log.append(tx, Statement(predicate=Predicate.TRAINED, subjects=(remembers,), fields=said))
    [private] = [each.fields["adapter"] for each in copied.log.select(Predicate.TRAINED) if each.fields["track"] == "dp"]
    assert [models.test(subject, each) for each in (remembers, private)] == [Finding.EXPOSED, Finding.NOT_EXPOSED]
    covered, ranked = [], erasing._ProjectModels._ranked

    def once_covered(self: Any, *about: Any) -> Finding:
        covered.append(about)
        return Finding.NOT_EXPOSED if len(covered) == 1 else ranked(self, *about)

    monkeypatch.setattr(erasing._ProjectModels, "_ranked", once_covered)
    models = erasing._ProjectModels(copied)  # as the next erasure makes it; one remembers what it found
    assert models.test(subject, remembers) is Finding.EXPOSED
    covered.clear()
    assert models.test(subject, private) is Finding.NOT_EXPOSED
    assert len(covered) == 2, "asked again after relearning"


def test_the_audit_tells_what_both_models_give_away_of_canaries(house: House):
    [audited] = house.log.select(Predicate.AUDITED)
    found = audited.fields["recitation"]["extraction"]
    for kind in ("recited", "discoverable"):
        control, private = found["control"][kind], found["private"][kind]
        assert control["planted"]["low"] > max(control["held_out"]["high"], private["planted"]["high"]), kind
    assert found["control"]["exposure"]["rank"]["low"] > found["private"]["exposure"]["rank"]["high"]
    assert found["control"]["exposure"]["extrapolated"]["median"] > found["private"]["exposure"]["extrapolated"]["median"]
    read = audited.fields["recitation"]["identifiers"]
    assert read["control"]["planted"]["low"] > read["control"]["held_out"]["high"], "identifiers that were learnt are read in what is written"
    assert read["private"]["planted"]["count"] == read["private"]["held_out"]["count"] == 0


def test_statistics_do_not_open_a_budget_for_whoever_may_only_run(copied: House, monkeypatch: pytest.MonkeyPatch):
    asked: list[Action] = []
    monkeypatch.setattr(Access, "require", lambda self, action, **about: asked.append(action))
    pipeline.open_project_budget(copied, delta=1e-3)
    assert asked == [], "it is open"
    monkeypatch.setattr(copied.ledger, "budgets", list)
    pipeline.open_project_budget(copied, delta=copied.ledger.show("patients").delta)
    assert asked == [Action.OPEN_BUDGET]


def test_a_tampered_release_is_not_loaded(copied: House):
    from discreet.serve import gateway

    released = pipeline.load_release(copied.releases / pipeline.released_name(copied), public_key=copied.log.public_key())
    weights = next((released.path / "adapter").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    base = pipeline.load_base(copied, None, Silent())
    with pytest.raises(DigestMismatch):
        gateway.open_engine(released, base, public_key=copied.log.public_key(), key=copied.keyring.purpose("gateway"))
    with pytest.raises(NotReleased):
        pipeline.load_release(copied.project.root, public_key=copied.log.public_key())


def test_the_rehearsal_of_the_mechanism_lands_in_the_log(house: House):
    layers = {layer["name"]: layer["verdict"] for layer in house.log.select(Predicate.AUDITED)[-1].fields["layers"]}
    assert {layers[f"mechanism: {name}"] for name in ("steps", "noise", "reuse", "clipping", "inclusion")} == {"PASS"}


def test_an_inconclusive_audit_leaves_in_the_name_of_a_person_only(copied: House):
    changes = {
        "release": copied.project.release.model_copy(update={"verdicts": ("PASS",)}),
        "audit": copied.project.audit.model_copy(update={"level": 1e-12}),  # at which so few canaries see nothing
    }
    fields = {name: getattr(copied, name) for name in copied.__dataclass_fields__}
    strict = House(**{**fields, "project": copied.project.model_copy(update=changes)})
    assert pipeline.audit(strict, Silent())["verdict"] == "INCONCLUSIVE"
    with pytest.raises(NotReleased, match="audit verdict"):
        pipeline.release(strict, Silent())
    with pytest.raises(PlanInvalid, match="name"):
        pipeline.override_inconclusive(strict, by=" ", reason="too few canaries")
    pipeline.override_inconclusive(strict, by="Ada Okoro", reason="too few canaries")
    assert pipeline.release(strict, Silent())["decision"] == "released"
    assert copied.log.select(Predicate.OVERRIDDEN)[-1].fields["by"] == "Ada Okoro"


def test_a_failed_gate_withholds_the_model(copied: House):
    strict = _with(copied, release=copied.project.release.model_copy(update={"max_epsilon": 0.001}))
    with pytest.raises(NotReleased, match="epsilon"):
        pipeline.release(strict, Silent())
    assert copied.log.select(Predicate.WITHHELD)[-1].fields["reasons"] == ["epsilon (PLD)"]


def test_an_erased_person_is_gone_and_stays_gone(copied: House):
    unit = json.loads((copied.project.root / "notes.jsonl").read_text().splitlines()[0])["patient"]
    subject = pipeline.subject_of(copied, unit)
    size = _log_size(copied)
    certificate = pipeline.erase(copied, unit)
    assert (certificate["failed"], certificate["certificate"]) == ([], size + 1)
    trained = needed_result(copied, "train")
    promised = f"epsilon {trained['guarantee']['epsilon']:.3g}, delta {trained['guarantee']['delta']:.2g}"
    assert [said for said in certificate["models"] if said.startswith(f"{trained['adapter']}: kept: ") and promised in said] == certificate["models"]
    with pytest.raises(Forgotten):
        copied.keyring.subject(subject)
    again = copied.catalog.collect(copied.catalog.register(copied.project, copied.project.source[0]))
    assert subject not in {record.subject for record in again}
    size = _log_size(copied)
    unknown = pipeline.erase(copied, "nobody at all")
    assert unknown["certificate"] == size + 1, "the same place in the log, whoever asks"
    assert unknown.keys() == certificate.keys()
    of_the_log = ("subject", "certificate", "statement", "proof")
    assert {k: v for k, v in unknown.items() if k not in of_the_log} == {k: v for k, v in certificate.items() if k not in of_the_log}
    entry = verify_proof(certificate["proof"].encode(), envelope=certificate["statement"].encode(), public_key=copied.log.public_key())
    assert entry.predicate is Predicate.ERASED
    assert entry.subjects == (certificate["subject"],)
    assert subject not in certificate["statement"]


def _log_size(house: House) -> int:
    return int(house.log.checkpoint().split(b"\n")[1])


def test_nothing_of_an_erased_person_is_left_in_the_project_folder(copied: House, tmp_path: Path):
    """Every file of the folder, raw; the database with its write-ahead log and free pages; every living document decoded, as text and as tokens; weights as bytes; and what an officer
    exported while the person was in: evidence and report, which still verify."""
    rows = [json.loads(line) for line in (copied.project.root / "notes.jsonl").read_text().splitlines()]
    opted_out = set((copied.project.root / "opt_outs.txt").read_text().split())
    unit = next(row["patient"] for row in rows if row["patient"] not in opted_out)
    mine = [row for row in rows if row["patient"] == unit]
    subject = pipeline.subject_of(copied, unit)
    [root] = [Digest(f"sha256:{p.name}") for p in copied.snapshots.iterdir() if subject in _units(copied, f"sha256:{p.name}")]
    frozen = corpus.open_snapshot(root, keyring=copied.keyring, folder=copied.snapshots)
    texts = corpus.texts(frozen, frozen.units.reveal()[subject], copied.keyring)
    needles = [row[column] for row in mine for column in ("id", "patient", "text", "mrn", "phone", "email")] + [*texts, subject]
    base = pipeline.load_base(copied, None, Silent())
    ids = [tuple(base.tokenizer(text)["input_ids"]) for text in texts]
    assert pipeline.remains(copied, [subject]), "the search finds who is there"
    np.savez_compressed(copied.project.state / "cache.npz", ids=np.array(ids[0], dtype=np.int32))
    assert any("token ids" in place for place in pipeline.remains(copied, [], tokens=ids)), "and their tokens in an archive"
    (copied.project.state / "cache.npz").unlink()
    (tmp_path / "officer").mkdir()
    evidence, key = duties.export_evidence(copied, tmp_path / "officer" / "evidence", public=False)
    report.write(copied.log, tmp_path / "officer")
    done = pipeline.erase(copied, unit)
    assert done["failed"] == []
    assert residue.find(tmp_path / "officer", needles, tokens=ids) == []
    collected = [e for e in dossier.verify(evidence, public_key=key.read_text()).entries if e.predicate is Predicate.COLLECTED]
    assert collected, "and their digests, which nobody can tell from others any more"
    copied.store.close()
    assert residue.find(copied.project.root, needles, tokens=ids) == []
    assert pipeline.remains(copied, needles, tokens=ids) == []
    after = corpus.open_snapshot(root, keyring=copied.keyring, folder=copied.snapshots)
    alive = corpus.texts(after, [p for positions in after.units.reveal().values() for p in positions], copied.keyring)
    assert not set(ids) & {tuple(base.tokenizer(text)["input_ids"]) for text in alive}
    decided = copied.log.select(Predicate.ERASED)[-2].fields
    assert any(value.startswith("kept: trained with differential privacy") for value in decided["decisions"].values())
    assert set(decided["findings"].values()) == {"not exposed"}


def _units(house: House, root: str) -> set[str]:
    return set(corpus.open_snapshot(Digest(root), keyring=house.keyring, folder=house.snapshots).units.reveal())


def test_the_drill_plants_erases_and_finds_nothing(copied: House):
    done = pipeline.drill(copied)
    assert done["left"] == []
    assert not list(copied.project.state.glob("canaries*")), "which canaries are in lies in no file"


def test_an_unfinished_erasure_stops_everything_else(copied: House):
    unit = json.loads((copied.project.root / "notes.jsonl").read_text().splitlines()[0])["patient"]
    shutil.copy(copied.project.state / "discreet.db", copied.project.root / "backup.db")
    copied.store.close()
    shutil.copy(copied.project.state / "discreet.db", copied.project.root / "backup.db")
    pipeline.erase(copied, unit)
    copied.store.close()
    shutil.copy(copied.project.root / "backup.db", copied.project.state / "discreet.db")
    assert pipeline.erasure_of(copied).reapply() == 1
    with pytest.raises(ErasureIncomplete, match="--resume"):
        pipeline.ingest(copied, Silent())
    assert pipeline.resume_erasures(copied) == 1
    assert pipeline.subject_of(copied, unit) not in copied.keyring.known_subjects()


def test_a_person_sees_what_is_held_and_what_was_made_of_it(copied: House):
    rows = [json.loads(line) for line in (copied.project.root / "notes.jsonl").read_text().splitlines()]
    unit = rows[0]["patient"]
    held = pipeline.access_export(copied, unit)
    assert [r["text"] for s in held["sources"] for r in s["records"]] == [row["text"] for row in rows if row["patient"] == unit]
    events = pipeline.lineage_export(copied, unit=unit)
    assert {event["job"]["name"] for event in events} == {"make snapshot", "make run", "make model", "make deployment"}
    assert pipeline.access_export(copied, "nobody")["sources"] == []


def test_a_model_of_unknown_origin_is_not_served(copied: House):
    with copied.store.transaction() as tx:
        tx.execute(text("DELETE FROM derivations"))
    with pytest.raises(NotReleased, match="parents"):
        pipeline.behind(copied).server()


def test_another_release_is_noticed_and_the_same_one_is_loaded_once(copied: House, monkeypatch: pytest.MonkeyPatch):
    from discreet.serve import gateway

    opened: list[str] = []
    monkeypatch.setattr(gateway, "open_engine", lambda released, *_, **__: opened.append(released.adapter))
    behind = pipeline.behind(copied)
    first = behind.server()
    assert behind.server() is first
    real = pipeline.load_release
    other = dataclasses.replace(real(copied.releases / pipeline.released_name(copied), public_key=copied.log.public_key()), name="another")
    monkeypatch.setattr(releasing, "load_release", lambda *_, **__: other)
    second = behind.server()
    assert second is not first
    assert (second.name, len(opened)) == ("another", 2)

    def undecided(_house: House) -> str:
        raise NotFound("the stage 'release' to be done")

    monkeypatch.setattr(releasing, "released_name", undecided)
    with pytest.raises(NotFound):  # the next one is being made
        behind.server()
    with copied.store.transaction() as tx:
        tx.execute(text("DELETE FROM derivations"))
    with pytest.raises(NotReleased):  # a withdrawal forgets the decision
        behind.server()
    monkeypatch.undo()
    with pytest.raises(NotReleased):
        behind.server()


def test_statistics_are_charged_and_said(copied: House):
    pytest.importorskip("opendp")
    before = copied.ledger.show(copied.project.budget.name).remaining_epsilon
    with pytest.raises(BudgetExhausted):
        derived.statistics(copied, epsilon=9.0, observer=Silent())
    assert not copied.log.select(Predicate.MEASURED)
    found = derived.statistics(copied, epsilon=1e-4, observer=Silent())
    assert copied.ledger.show(copied.project.budget.name).remaining_epsilon < before
    assert set(found) == {"reservation", "epsilon", "delta", "unit", "cap", "values"}, "what is left comes from who is in the corpus"
    assert [len(found["values"]["documents_by_length"]), found["unit"]] == [8, "patient"]
    [said] = copied.log.select(Predicate.MEASURED)
    assert said.fields["values"] == found["values"]
    with pytest.raises(PlanInvalid, match="an epsilon > 0"):
        derived.statistics(copied, epsilon=0.0, observer=Silent())


def test_synthetic_text_is_below_its_model_in_the_lineage(copied: House, tmp_path: Path):
    out = tmp_path / "synthetic.jsonl"
    before = copied.ledger.show(copied.project.budget.name).remaining_epsilon
    made = derived.synthesize(copied, count=3, out=out, max_tokens=8)
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["synthetic-0", "synthetic-1", "synthetic-2"]
    assert copied.ledger.show(copied.project.budget.name).remaining_epsilon == before
    with copied.store.transaction() as tx:
        [node] = [each for each in lineage.descendants(tx, [Digest(made["adapter"])]) if each.kind is lineage.Kind.SYNTHETIC]
    assert (node.digest, node.protects) == (made["digest"], "patient")
    [said] = copied.log.select(Predicate.SYNTHESIZED)
    assert said.fields["reservation"] == copied.ledger.of_run(needed_result(copied, "train")["run"]).id
    for wrong in ({"count": 0}, {"max_tokens": 0}, {"temperature": 0.0}):
        with pytest.raises(RequestInvalid):
            derived.synthesize(copied, **{"count": 1, "out": out, **wrong})


def test_a_child_in_one_file_is_audited_and_goes_with_its_model(copied: House, tmp_path: Path):
    file = tmp_path / "child.gguf"
    made = derived.child(copied, file=file, kind="q8_0")
    assert made["verdict"] == "PASS"
    [said] = copied.log.select(Predicate.CHILD_AUDITED)
    assert (said.subjects, said.fields["verdict"]) == ((made["digest"],), "PASS")
    assert said.fields["level"] < copied.log.select(Predicate.AUDITED)[-1].fields["level"] / 3, "an audit more, of one shared level"
    with copied.store.transaction() as tx:
        [node] = [each for each in lineage.descendants(tx, [Digest(made["adapter"])]) if each.kind is lineage.Kind.QUANTISATION]
    assert node.digest == made["digest"]
    models, subject = erasing._ProjectModels(copied), _one(copied).record.subject
    assert models.test(subject, node.digest) is Finding.NOT_EXPOSED
    for name, vocabulary in (("of its shapes", None), ("of others", 262)):
        now = _with(copied, model=copied.project.model.model_copy(update={"base": str(_another_base(copied, tmp_path / name, vocabulary))}))
        for digest in (node.digest, Digest(made["adapter"])):
            assert erasing._ProjectModels(now).test(subject, digest) is Finding.NO_POWER, f"[model] names a base {name}"
    merged = derived.child(copied, file=tmp_path / "merged", kind="merged")
    assert (merged["verdict"], model.base_digest(tmp_path / "merged")) == ("PASS", merged["digest"])
    with copied.store.transaction() as tx:
        chain = {each.digest: each.kind for each in lineage.ancestors(tx, [node.digest])}
        assert lineage.find(tx, Digest(merged["digest"])).kind is lineage.Kind.MERGE
    assert chain[merged["digest"]] is lineage.Kind.MERGE, "the file is made of the very merge that the folder holds"
    assert {*chain.values()} == {getattr(lineage.Kind, name) for name in ("RECORD", "SNAPSHOT", "BASE", "RUN", "MODEL", "MERGE")}
    assert erasing._ProjectModels(copied).test(subject, Digest(merged["digest"])) is Finding.NOT_EXPOSED
    shutil.copytree(tmp_path / "merged", tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").write_text("how to serve it")
    assert derived.child(copied, file=tmp_path / "theirs")["digest"] == merged["digest"], "the same bytes, asked once"
    base = pipeline.load_base(copied, None, Silent())
    model.write_gguf(model.merged(base.module), base.tokenizer, tmp_path / "base.gguf", kind="q8_0")
    other = derived.child(copied, file=tmp_path / "base.gguf")
    assert other["verdict"] == "INCONCLUSIVE", "the adapter is not in it"
    with copied.store.transaction() as tx:
        assert not lineage.is_known(tx, other["digest"]), "not shown to be made of the release"
    models.withdraw(other["digest"])
    assert derived.child(copied, file=tmp_path / "again.gguf", kind="q8_0")["digest"] == made["digest"]
    models.withdraw(node.digest)
    assert [(tmp_path / f"{name}.gguf").exists() for name in ("child", "again", "base")] == [False, False, True]
    models.withdraw(Digest(merged["digest"]))
    assert ((tmp_path / "merged").exists(), [each.name for each in (tmp_path / "theirs").iterdir()]) == (False, ["README.md"]), (
        "nothing of the operator's"
    )


@pytest.mark.parametrize("place", ["merged", "runs", "releases"])
def test_a_withdrawal_that_is_killed_between_two_files_is_finished_by_the_next(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
):
    """Before each file in turn: what is left is no whole model, whose digest would find it."""
    unlink, left = Path.unlink, [0]

    def counted(path: Path, missing_ok: bool = False) -> None:
        if path.is_relative_to(folder):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        unlink(path, missing_ok=missing_ok)

    with pipeline.open_house(project) as house:
        folder = tmp_path / "merged" if place == "merged" else house.project.state / place / "one" / "adapter"
        models = erasing._ProjectModels(house)
        for files in range(2 + (place == "merged")):
            digest, left[0] = _placed(house, folder), files
            with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
                patched.setattr(Path, "unlink", counted)
                patched.setattr(shutil, "rmtree", lambda path: [each.unlink() for each in sorted(path.rglob("*")) if each.is_file()])
                models.withdraw(digest)
            assert len([*folder.iterdir()]) == (3 if place == "merged" else 2) - files
            models.withdraw(digest)
            assert not folder.exists(), f"killed after {files} files"
            assert erasing._UnfinishedWeights(house).absence(pipeline.subject_of(house, "nobody"))


def _placed(house: House, folder: Path) -> Digest:
    """Puts weights into a folder of the project, or of an operator who was given a child, with their node."""
    folder.mkdir(parents=True, exist_ok=True)
    is_child = folder.name != "adapter"
    for name in ("config.json", "tokenizer.json") if is_child else ("adapter_config.json",):
        (folder / name).write_text("{}")
    safetensors.torch.save_file({"w": torch.ones(3)}, folder / ("model.safetensors" if is_child else "adapter_model.safetensors"))
    digest = model.base_digest(folder) if is_child else model.adapter_digest(folder)
    with house.store.transaction() as tx:
        lineage.register(tx, [lineage.Artifact(digest=digest, kind=lineage.Kind.MERGE if is_child else lineage.Kind.MODEL)])
        if is_child:
            pipeline.record_written(tx, digest, folder, parts=model.child_files(folder))
    return digest


def test_a_child_that_somebody_added_to_goes_and_what_they_added_stays(project: Path, tmp_path: Path):
    folder = tmp_path / "merged"
    with pipeline.open_house(project) as house:
        for name in ("training_args.bin", "special_tokens_map.json"):
            digest = _placed(house, folder)
            (folder / name).write_text("{}")
            erasing._ProjectModels(house).withdraw(digest)
            assert [each.name for each in folder.iterdir()] == [name]
            (folder / name).unlink()
        digest = _placed(house, folder)
        with house.store.transaction() as tx:  # as it was remembered before the files were
            remember(tx, erasing._written(digest), {"file": str(folder), "digest": digest})
        erasing._ProjectModels(house).withdraw(digest)
        assert not folder.exists()


def test_weights_without_a_node_go_with_any_erasure(project: Path):
    """Of a run that was given up after it saved them, and of a release that was killed while it was copied."""
    with pipeline.open_house(project) as house:
        folders = [house.project.state / "runs" / "one" / "adapter", house.releases / "one" / "adapter"]
        kept = house.project.state / "runs" / "two" / "adapter"
        for folder in (*folders, kept):
            folder.mkdir(parents=True)
            safetensors.torch.save_file({folder.parent.name: torch.ones(3)}, folder / "adapter_model.safetensors")
        (folders[0] / "adapter_config.json").write_text("{}")
        (folders[1] / "adapter_config.json").write_text('{"half": ')
        (kept / "adapter_config.json").write_text("{}")
        with house.store.transaction() as tx:
            lineage.register(tx, [lineage.Artifact(digest=model.adapter_digest(kept), kind=lineage.Kind.MODEL)])
        store = erasing._UnfinishedWeights(house)
        assert not store.absence(pipeline.subject_of(house, "nobody"))
        store.purge(pipeline.subject_of(house, "nobody"))
        assert ([each.exists() for each in folders], kept.exists()) == ([False, False], True)


def test_a_child_whose_audit_could_have_seen_nothing_is_a_child(copied: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Somebody else's file of the release, asked at a level at which twice the claim cannot be seen: no promise, and an erasure finds it."""
    monkeypatch.setattr(deployed, "MAX_EFFECT", 0.0)
    base, released = pipeline.load_base(copied, None, Silent()), copied.releases / pipeline.released_name(copied)
    model.write_gguf(model.merged(model.load_adapter(base, released / "adapter")), base.tokenizer, tmp_path / "theirs.gguf", kind="f16")
    found = derived.child(copied, file=tmp_path / "theirs.gguf")
    assert found["verdict"] == "INCONCLUSIVE"
    with copied.store.transaction() as tx:
        assert lineage.find(tx, found["digest"]).protects == ""
        assert found["digest"] in {each.digest for each in lineage.descendants(tx, [Digest(found["adapter"])])}
    erasing._ProjectModels(copied).withdraw(Digest(found["digest"]))
    assert not (tmp_path / "theirs.gguf").exists()


def test_a_child_is_where_an_erasure_finds_it_or_nowhere(copied: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No folder, a full disk, a copy that a kill left in the project, and one that it left half way to its place."""
    with pytest.raises(RequestInvalid, match="folder"):
        derived.child(copied, file=tmp_path / "nowhere" / "child.gguf", kind="f16")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "move", full)
        with pytest.raises(StorageFull):
            derived.child(copied, file=tmp_path / "child.gguf", kind="f16")
    assert ([*tmp_path.glob("*.gguf")], (copied.project.state / "children").exists()) == ([], False)
    made = derived.child(copied, file=tmp_path / "child.gguf", kind="f16")
    assert (len(copied.log.select(Predicate.CHILD_AUDITED)), erasing.written_files(copied, made["digest"])) == (1, [tmp_path / "child.gguf"])
    (copied.project.state / "children").mkdir()
    shutil.copy(tmp_path / "child.gguf", copied.project.state / "children" / "made.gguf")
    half, rename = tmp_path / "half.gguf.partial", Path.rename
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", lambda path, to: _killed() if path == half else rename(path, to))
        derived.child(copied, file=tmp_path / "half.gguf", kind="f16")
    assert (half.is_file(), (tmp_path / "half.gguf").exists()) == (True, False)
    left = half.read_bytes()
    pipeline.erase(copied, "nobody at all")
    assert ((copied.project.state / "children").exists(), half.exists()) == (False, False)
    half.write_bytes(left)
    derived.child(copied, file=tmp_path / "next.gguf", kind="f16")
    assert not half.exists(), "nor after the next child"
    half.write_bytes(left)
    erasing._ProjectModels(copied).withdraw(Digest(made["digest"]))
    assert [*tmp_path.glob("*.gguf*")] == []


def _another_base(house: House, folder: Path, vocabulary: int | None) -> Path:
    """A base that the project's adapter was not trained on: its own with one weight moved, or one of another vocabulary."""
    if vocabulary is not None:
        return model.build_tiny(PublicText(("some other words",)), cache=folder, steps=0, vocabulary=vocabulary).path
    shutil.copytree(pipeline.load_base(house, None, Silent()).path, folder)
    weights = next(folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (folder / "DIGEST").unlink(missing_ok=True)
    return folder


def test_a_child_that_leaks_is_not_left(copied: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    planted = [each.text for each in plant_canaries(copied) if each.included]
    learnt = PublicText.of(planted, sensitivity=Sensitivity.INTERNAL, basis=Basis.GENERATED)
    setup = weights.setup_of(copied, pipeline.load_base(copied, None, Silent()), held_out=PublicText(planted[:1]), evaluations=1)
    setup = replace(setup, model=ModelSection(train=("all",), max_tokens=copied.project.model.max_tokens))
    leaky = loop.fit(learnt, setup=setup, steps=60, batch=16, order=copied.keyring.purpose("test").stream("order")).module
    monkeypatch.setattr(model, "merged", lambda _: leaky)
    with pytest.raises(NotReleased):
        derived.child(copied, file=tmp_path / "child.gguf", kind="f16")
    assert list(tmp_path.glob("*.gguf")) == []
    base = pipeline.load_base(copied, None, Silent())
    model.write_gguf(leaky, base.tokenizer, tmp_path / "theirs.gguf", kind="f16")
    found = derived.child(copied, file=tmp_path / "theirs.gguf")
    [said] = copied.log.select(Predicate.CHILD_AUDITED)
    assert (said.fields["verdict"], found["verdict"], found["layer"]) == ("FAIL", "FAIL", said.fields["layers"][0]), "the same bytes are asked once"
    with copied.store.transaction() as tx:
        assert lineage.find(tx, found["digest"]).protects == "", "no promise of the release holds for what beats it"
    for wrong in ({"kind": "q2_k"}, {"kind": "f16", "file": copied.project.root / "discreet.toml"}):
        with pytest.raises(RequestInvalid):
            derived.child(copied, **{"file": tmp_path / "other.gguf", **wrong})


def test_every_kind_of_statement_is_written(copied: House, tmp_path: Path):
    """The table of kinds has no row that nothing writes: the finished story, and each act that it has no occasion for."""
    pytest.importorskip("opendp")
    unit = json.loads((copied.project.root / "notes.jsonl").read_text().splitlines()[0])["patient"]
    rules = copied.project.release.model_copy(update={"max_epsilon": 0.001})
    copied.consent.withdraw(pipeline.subject_of(copied, unit), copied.project.purpose)
    copied.access.break_glass(Action.READ, who=current_user(), reason="the audit cannot wait")
    copied.ledger.raise_to(copied.project.budget.name, 9.0, reason="a second year of notes")
    derived.statistics(copied, epsilon=1e-4, observer=Silent())
    searched = _with(copied, retrieval=RetrievalSection(purposes=("note-assistant",), reads={"product": ("notes",)}))
    pipeline.build_index(searched, Silent())
    pipeline.search(searched, "cough")
    derived.synthesize(copied, count=1, out=tmp_path / "synthetic.jsonl", max_tokens=4)
    pipeline.confirm_sensitivity(copied, "public", by="Petra", reason="read it")
    trail, adapter = pipeline.behind(copied).trail, Digest(copied.log.select(Predicate.RELEASED)[-1].fields["adapter"])
    group = Group(tenant="default", policy=Digest("sha256:" + "0" * 64), model="ward", server=adapter, released=True)
    trail.count(group, route="chat", status=200, counts={"PERSON": 1}, stopped={}, seconds=0.1)
    trail.write()
    derived.child(copied, file=tmp_path / "child.gguf", kind="f16")
    with pytest.raises(NotReleased):
        pipeline.release(_with(copied, release=rules), Silent())
    pipeline.erase(copied, unit)
    copied.log.rotate()
    assert {predicate for predicate in Predicate if not copied.log.select(predicate)} == set()


def _with(house: House, **sections: Any) -> House:
    """The same house with other sections of its configuration."""
    fields = {name: getattr(house, name) for name in house.__dataclass_fields__}
    return House(**{**fields, "project": house.project.model_copy(update=sections)})


def test_two_runs_at_once_are_refused(project: Path):
    with pipeline.open_house(project), pytest.raises(RunInProgress), pipeline.open_house(project):
        pass


def test_a_sensitive_source_never_reaches_a_track_without_privacy(copied: House):
    genuine = demo.write_corpus(copied.project.root.parent / "again", patients=60, documents=130, public=60, held_out=12).files
    altered = dict(genuine) | {"notes.jsonl": "0" * 64}
    with pytest.raises(TrackRefused, match="notes"):
        pipeline.utility_control(copied, generated=altered, observer=Silent())
    with pytest.raises(TrackRefused):
        model.PublicText.of(["text"], sensitivity=Sensitivity.SPECIAL, basis=Basis.CONSENT)
    opened = corpus.open_snapshot(_root(copied), keyring=copied.keyring, folder=copied.snapshots)
    with pytest.raises(TrackRefused):
        model.PublicText.of(["text"], sensitivity=opened.sensitivity, basis=Basis.CONSENT)


def _shown(folder: Path, out: Path) -> list[tuple[str, dict[str, Any]]]:
    """What the public evidence of a project says, statements and answers, without what is DP-released, and without the log's key and the commitment to the canaries, which are fresh in each project."""
    with pipeline.open_house(folder) as opened:
        written, key = dossier.export(opened.log, opened.store, out, public=True)
    answers = json.loads((written / "dossier.json").read_text())
    assert {fact["exposure"] for section in answers["sections"].values() for fact in section.values()} == {"public", "dp-released"}
    said = [
        (name, {fact: each["value"] for fact, each in section.items() if each["exposure"] == "public" and fact != "public_key"})
        for name, section in answers["sections"].items()
    ]
    for entry in dossier.verify(written, public_key=key.read_text()).entries:
        plain = {name: value for name, value in entry.fields.items() if exposure(entry.predicate, name) is Exposure.PUBLIC}
        fresh = plain.pop("commitment", None)
        about = {} if fresh or exposure(entry.predicate, "subject") is Exposure.DP_RELEASED else {"subject": entry.subjects}
        said.append((entry.predicate.value, plain | about))
    return said


@pytest.mark.slow
def test_public_bundles_of_two_corpora_that_differ_in_one_person_differ_only_in_what_is_released(told: Path, tmp_path: Path, new_project: NewProject):
    """The whole pipeline twice, under one master key: with everybody, and without one patient."""
    without = new_project(tmp_path / "hospital")
    rows = [json.loads(line) for line in (without / "notes.jsonl").read_text().splitlines()]
    opted_out = set((without / "opt_outs.txt").read_text().split())
    gone = next(row["patient"] for row in rows if row["patient"] not in opted_out)
    (without / "notes.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows if row["patient"] != gone))
    (without / ".discreet").mkdir(mode=0o700, exist_ok=True)
    shutil.copy(told / ".discreet" / "master.key", without / ".discreet" / "master.key")
    with pipeline.open_house(without) as opened:
        pipeline.run(opened, until=None, observer=Silent())
    one, other = _shown(told, tmp_path / "one"), _shown(without, tmp_path / "other")
    assert [kind for kind, _ in one] == [kind for kind, _ in other]
    assert one == other
    for name in ("dossier.json", "log/entries.jsonl"):
        assert (tmp_path / "one" / name).read_bytes() != (tmp_path / "other" / name).read_bytes(), "the test looks at something"


class _Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, line: str) -> None:
        self.notes.append(line)


def _add_a_note(house: House) -> None:
    path = house.project.root / "notes.jsonl"
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows, json.dumps(json.loads(rows[0]) | {"id": "new-1", "text": "Seen again, better."})]) + "\n")


def test_an_update_takes_new_records_and_warns_when_the_risk_rises(copied: House, monkeypatch: pytest.MonkeyPatch):
    """The stages themselves are replaced: what they are called for, and what becomes of their answers, is what is tested."""
    assert pipeline.update(copied, Silent())["changed"] == [], "nothing changed: nothing is done again"
    _add_a_note(copied)
    finished = []

    def rerun(house: House, *, until: str | None, observer: object, parent: object) -> dict[str, Any]:
        assert parent is None, "trained from the base"
        finished.append(pipeline.finished(house))
        records = house.catalog.collect(house.catalog.register(house.project, house.project.source[0]))
        assert any(record.text.reveal() == "Seen again, better." for record in records)
        return {"train": {"run": "run-x"}, "audit": {"epsilon_lower": 99.0, "verdict": "PASS"}}

    monkeypatch.setattr(story, "run", rerun)
    heard = _Heard()
    done = pipeline.update(copied, heard)
    assert (done["changed"], done["rising"], done["epsilon_lower"]) == (["notes"], True, 99.0)
    assert finished == [set()], "every stage is done again"
    assert any("ALERT" in note for note in heard.notes)


def test_an_update_after_a_raise_trains_within_what_is_left(copied: House):
    """A raise that is large against the noise asks the filter for orders near 1, where dp_accounting gives up: nothing seemed left of the budget.

    What a refused update took in is still new to the next one, and no longer when a model came of it.
    """
    _add_a_note(copied)
    with pytest.raises(BudgetExhausted):
        pipeline.update(copied, Silent())
    copied.ledger.raise_to(copied.project.budget.name, 40.0, reason="a second year of notes")
    left = copied.ledger.budgets()[0].remaining_epsilon
    assert 20 < left < 40, "[privacy] epsilon stays at 8"
    done = pipeline.update(copied, Silent())
    assert (done["changed"], done["rising"]) == (["notes"], False)
    assert copied.ledger.budgets()[0].remaining_epsilon < left
    assert (again := pipeline.update(copied, Silent()))["changed"] == []
    assert again["run"] == done["run"]
    assert [entry.fields["guarantee"]["epsilon"] <= 8 for entry in copied.log.select(Predicate.TRAINED) if entry.fields["track"] == "dp"] == [
        True
    ] * 2


def test_an_update_goes_on_from_the_last_release_and_counts_both_runs(copied: House, tmp_path: Path):
    """Charged as a further run on the same people, below its parent in the lineage; claim, audit, gate and dossier take the price of both together."""
    settings = copied.project.root / "discreet.toml"
    _add_a_note(copied)
    budget = copied.project.budget.name
    copied.ledger.raise_to(budget, 24.0, reason="a second year of notes")
    settings.write_text(settings.read_text().replace("max_epsilon = 8.0", "max_epsilon = 16.0"))
    house = _reloaded(copied)
    left, first = house.ledger.show(budget).remaining_epsilon, house.log.select(Predicate.RELEASED)[-1]
    done = pipeline.update(house, Silent(), start="released")
    assert (done["changed"], done["continues"]) == (["notes"], first.fields["run"])
    assert house.ledger.show(budget).remaining_epsilon < left
    second = house.log.select(Predicate.RELEASED)[-1]
    claim, alone = second.fields["guarantee"], first.fields["guarantee"]
    [paid] = [entry for entry in house.log.select(Predicate.SPENT) if entry.fields["run"] == done["run"]]
    assert claim["continues"] == {"run": first.fields["run"], "guarantee": alone}
    assert max(alone["epsilon"], paid.fields["epsilon"]) < claim["epsilon"] < alone["epsilon"] + paid.fields["epsilon"]
    assert house.log.select(Predicate.AUDITED)[-1].fields["claimed_epsilon"] == claim["epsilon"]
    assert house.log.select(Predicate.TRAINED)[-1].fields["kind"] == "continued training"
    with house.store.transaction() as tx:
        above = {artifact.digest for artifact in lineage.ancestors(tx, [Digest(second.fields["adapter"])])}
    assert first.fields["adapter"] in above
    answers = dossier.write(house.log, house.store, tmp_path / "dossier", public=True, namespace="example.org")
    said = json.loads((answers / "dossier.json").read_text())["sections"]
    assert said["dp_statement"]["recomputed_epsilon"]["value"] == pytest.approx(claim["epsilon"], rel=1e-4)
    assert first.fields["run"] in said["guarantee"]["continues"]["value"]
    assert "data_sheet" not in said
    transcript = pipeline.erasure_of(house)._models.transcript(Digest(second.fields["adapter"]))
    assert (transcript.unit, transcript.noise_multiplier) == ("patient", 0.0), "kept for the unit; for a group no bound is claimed"
    _add_a_note(house)
    settings.write_text(settings.read_text().replace("lora_alpha = 16.0", "lora_alpha = 8.0"))
    charged = len(house.log.select(Predicate.RESERVED))
    with pytest.raises(NotReleased, match="Nothing was spent"):
        pipeline.update(_reloaded(house), Silent(), start="released")
    assert len(house.log.select(Predicate.RESERVED)) == charged
    shutil.rmtree(house.project.state / "runs" / done["run"])
    with pytest.raises(NotReleased, match="to go on from"):
        pipeline.update(house, Silent(), start="released")


def _grown(house: House) -> Snapshot:
    """What is frozen of a source that grew by a note."""
    _add_a_note(house)
    house.catalog.register_again(house.project, house.project.source[0])
    return pipeline.ingest(house, Silent()).snapshot


def _planned(**kind: Any) -> mechanism.Plan:
    return mechanism.calibrate(epsilon=8.0, delta=1e-3, population=180, expected_batch=24, steps=4, clip_norm=0.5, unit="patient", **kind)


def test_a_continued_run_that_no_accountant_composes_spends_nothing(copied: House, monkeypatch: pytest.MonkeyPatch):
    """A search is known to RDP alone, truncated sampling to PLD alone: whichever came first, the refusal comes before the reservation."""
    run, reserved = copied.log.select(Predicate.RELEASED)[-1].fields["run"], len(copied.log.select(Predicate.RESERVED))
    searched = _planned(search=Search(tries=Tries.NEGATIVE_BINOMIAL, mean=2.0))
    truncated = _planned(sampling=mechanism.Sampling.TRUNCATED_POISSON, batch_limit=60)
    copied.ledger.raise_to(copied.project.budget.name, 60.0, reason="a second year of notes")
    parent, snapshot = last_released(copied), _grown(copied)
    for earlier, later in ((searched, truncated), (truncated, searched)):
        monkeypatch.setattr(training, "calibrate", lambda *_, later=later: later)
        with copied.store.transaction() as tx:
            remember(tx, f"plan/{run}", earlier.to_json())
        with pytest.raises(PlanInvalid, match=r"one accountant composes with run-.*Nothing was spent.*discreet update"):
            training._reserve(copied, snapshot, parent)
    assert len(copied.log.select(Predicate.RESERVED)) == reserved
    with copied.store.transaction() as tx:
        assert (facts(tx, "parent/"), len(facts(tx, "plan/"))) == ([], 1)


def test_a_continued_run_that_could_not_be_released_spends_nothing(copied: House):
    """Both runs together are above the gate: refused before anything is charged, and what was released is served on."""
    served, reserved = pipeline.released_name(copied), len(copied.log.select(Predicate.RESERVED))
    copied.ledger.raise_to(copied.project.budget.name, 24.0, reason="a second year of notes")
    _add_a_note(copied)
    gate = needed_result(copied, "train")["guarantee"]["epsilon"] * 1.01
    with pytest.raises(PlanInvalid, match=r"max_epsilon.*Nothing was spent"):
        pipeline.update(_with(copied, release=copied.project.release.model_copy(update={"max_epsilon": gate})), Silent(), start="released")
    assert (pipeline.released_name(copied), len(copied.log.select(Predicate.RESERVED))) == (served, reserved)


def test_an_update_from_the_base_forgets_the_parent_of_a_run_that_never_was_reserved(copied: House, monkeypatch: pytest.MonkeyPatch):
    """Killed between the two, the continued run left what it would have gone on from; the same corpus is the same run."""
    copied.ledger.raise_to(copied.project.budget.name, 24.0, reason="a second year of notes")
    house = _with(copied, release=copied.project.release.model_copy(update={"max_epsilon": 16.0}))
    monkeypatch.setattr(type(house.ledger), "reserve", _killed)
    left, snapshot = [], _grown(house)
    for parent in (last_released(house), None):
        with pytest.raises(KeyboardInterrupt):
            training._reserve(house, snapshot, parent)
        with house.store.transaction() as tx:
            left.append((len(facts(tx, "run/")), len(facts(tx, "parent/"))))
    assert left == [(2, 1), (2, 0)]


def _killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_an_update_that_the_budget_refuses_leaves_the_release_where_it_was(copied: House):
    """The same ledger: what was spent stays spent, nothing new is trained, and what was released is still served."""
    served, spent = pipeline.released_name(copied), copied.ledger.budgets()[0]
    _add_a_note(copied)
    with pytest.raises(BudgetExhausted):
        pipeline.update(copied, Silent())
    assert copied.ledger.budgets()[0] == spent
    assert pipeline.released_name(copied) == served


def test_whoever_is_past_retention_is_erased_on_the_timer(copied: House, monkeypatch: pytest.MonkeyPatch):
    """One person is due: they alone are erased, with a certificate; nobody else, and nobody twice."""
    rows = [json.loads(line) for line in (copied.project.root / "notes.jsonl").read_text().splitlines()]
    opted_out = set((copied.project.root / "opt_outs.txt").read_text().split())
    subject = pipeline.subject_of(copied, next(row["patient"] for row in rows if row["patient"] not in opted_out))
    before = copied.keyring.known_subjects()
    with copied.store.transaction() as tx:
        tx.execute(text("UPDATE records SET collected_at = 0 WHERE subject = :s"), {"s": subject})
    assert pipeline.retention(copied) == {"erased": 1, "closed": 0, "open": []}
    assert set(before) - set(copied.keyring.known_subjects()) == {subject}
    assert copied.log.select(Predicate.ERASED)[-1].fields["reason"] == "retention"
    assert pipeline.retention(copied)["erased"] == 0


def _with_chats(house: House, rows: list[dict[str, str]]) -> House:
    """The project with a source that the gateway writes to; nobody has registered it since it grew."""
    settings = house.project.root / "discreet.toml"
    chats = ["[[source]]", 'name = "chats"', 'path = "chats.jsonl"', 'unit = "patient"', 'owner = "DPO"', 'basis = "consent"', "retention_days = 10"]
    settings.write_text("\n".join([settings.read_text(), *chats, f'purposes = ["{house.project.project.purpose}"]', ""]))
    (house.project.root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:1]))
    grown = House(**{**{name: getattr(house, name) for name in house.__dataclass_fields__}, "project": load(house.project.root)})
    grown.catalog.collect(grown.catalog.register(grown.project, grown.project.source[-1]))
    (house.project.root / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return grown


CHATS = [  # of people whom no stand-in is called after
    {"id": "c1", "patient": "chat-1", "text": "The first prompt of Xanthippe."},
    {"id": "c2", "patient": "chat-1", "text": "The second prompt of Xanthippe."},
    {"id": "c3", "patient": "chat-2", "text": "A prompt of Thessaly."},
]


def test_erasure_and_access_reach_a_source_that_grew_since_its_registration(copied: House):
    house = _with_chats(copied, CHATS)
    keys = house.keyring.known_subjects()
    held = pipeline.access_export(house, "chat-1")
    told = [record for source in held["sources"] for record in source["records"]]
    assert [(record["text"], record["digest"] is None) for record in told] == [(CHATS[0]["text"], False), (CHATS[1]["text"], True)]
    assert pipeline.access_export(house, "chat-2")["sources"], "nobody has collected anything of theirs"
    assert pipeline.propose_sensitivity(house, "chats")["sampled"] == 3
    assert house.keyring.known_subjects() == keys, "looking makes no key"
    for who, left in (("chat-1", [CHATS[2]]), ("chat-2", [])):
        done = pipeline.erase(house, who)
        assert (done["failed"], [json.loads(line) for line in (house.project.root / "chats.jsonl").read_text().splitlines()]) == ([], left)
    assert pipeline.remains(house, ["chat-1", "chat-2", "Xanthippe", "Thessaly"]) == []
    assert pipeline.access_export(house, "chat-2")["sources"] == []


def test_retention_reaches_a_source_that_grew_since_its_registration(copied: House, monkeypatch: pytest.MonkeyPatch):
    house = _with_chats(copied, CHATS)
    assert pipeline.retention(house)["erased"] == 0
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 11 * 86_400)
    assert pipeline.retention(house)["erased"] == 2
    assert (house.project.root / "chats.jsonl").read_text() == ""
    assert pipeline.retention(house)["erased"] == 0


@pytest.fixture(params=["tiny", "folder"])
def with_public_track(project: Path, request: pytest.FixtureRequest) -> Iterator[House]:
    """A project whose first adapter learnt from public text without privacy, on a tiny base that did too or on one that others made, up to the trained model."""
    settings = project / "discreet.toml"
    said = settings.read_text()
    if request.param == "tiny":
        said = re.sub(r"(?m)^base = .*$", 'base = "tiny"', said)
    settings.write_text(said.replace("public_steps = 0", "public_steps = 2"))
    with pipeline.open_house(project) as opened:
        pipeline.run(opened, until="train", observer=Silent())
        yield opened


def test_whoever_is_behind_a_public_record_reaches_all_that_was_trained_on_it(with_public_track: House):
    """Tiny base, adapter of the public track and the private model above them: trained without privacy on the record, so all go; training again is a new run at a new price."""
    house, row = with_public_track, json.loads((with_public_track.project.root / "public_train.jsonl").read_text().splitlines()[3])
    trained = needed_result(house, "train")
    public = next(entry.subjects[0] for entry in house.log.select(Predicate.TRAINED) if entry.fields["track"] == "public")
    with house.store.transaction() as tx:
        assert {trained["base"], trained["snapshot"], public} <= {a.digest for a in lineage.ancestors(tx, [Digest(trained["adapter"])])}
        assert public in {a.digest for a in lineage.descendants(tx, [Digest(trained["base"])])}
    patient = json.loads((house.project.root / "notes.jsonl").read_text().splitlines()[0])["patient"]
    child = lineage.Artifact(digest=Digest("sha256:" + "c" * 64), kind=lineage.Kind.QUANTISATION, protects="patient")
    with house.store.transaction() as tx:
        lineage.derive(tx, child, parents=[Digest(trained["adapter"])])
    pipeline.erase(house, patient)
    assert finished_result(house, "train") is not None, "the private model is kept for a patient"
    kept = house.log.select(Predicate.ERASED)[0].fields["decisions"]
    assert kept[child.digest] == kept[trained["adapter"]], "and with it what was made of it, whatever public model it went on from"
    pipeline.erase(house, row["id"], source="public")
    decided = {d: said for entry in house.log.select(Predicate.ERASED) for d, said in entry.fields.get("decisions", {}).items()}
    made_here = {trained["base"]} if house.project.model.base == "tiny" else set()
    assert {digest for digest, said in decided.items() if said.startswith("withdrawn")} >= {public, trained["adapter"], *made_here}
    assert made_here or trained["base"] not in decided
    assert [*(house.project.state / "models").glob("*"), *(house.project.state / "runs").glob("*/*adapter*")] == []
    assert pipeline.remains(house, [row["text"]]) == []
    with pytest.raises(BudgetExhausted):
        pipeline.train(house, Silent())
    assert len(house.log.select(Predicate.SPENT)) == 1


def test_withdrawn_weights_take_results_of_stages_along_but_not_what_a_run_went_on_from(copied: House):
    trained = needed_result(copied, "train")
    with copied.store.transaction() as tx:
        remember(tx, "parent/next", {"run": trained["run"], "adapter": trained["adapter"], "base": trained["base"]})
        forget_model(tx, Digest(trained["adapter"]))
    assert finished_result(copied, "train") is None
    assert continuing.parent_of(copied, "next") is not None, "a price without it would be too small"


def test_what_a_killed_public_track_left_goes_with_any_erasure(copied: House):
    """A state, and weights whose node was never written: nobody can be cut out of them, so they go whoever asks."""
    runs = copied.project.state / "runs"
    [run] = [path for path in runs.iterdir() if (path / "adapter").is_dir()]
    (run / "public").mkdir()
    (run / "public" / ".state-killed").write_bytes(b"sealed")
    shutil.copytree(run / "adapter", run / pipeline.PUBLIC_ADAPTER)
    described = run / pipeline.PUBLIC_ADAPTER / "adapter_config.json"
    described.write_text(described.read_text() + " ")
    (copied.project.state / "models" / "tiny-0").mkdir(parents=True)
    done = pipeline.erase(copied, "nobody at all")
    assert {"checkpoints", "unfinished weights"} <= set(done["stores"])
    assert [
        (run / "public" / ".state-killed").exists(),
        (run / pipeline.PUBLIC_ADAPTER).exists(),
        (copied.project.state / "models" / "tiny-0").exists(),
    ] == [False] * 3
    assert (run / "adapter").is_dir()


OPEN = """
[project]
name = "ward"
controller = "General Hospital"
purpose = "note-assistant"
[audit]
canaries = 20
[[source]]
name = "public"
path = "public.jsonl"
owner = "us"
sensitivity = "public"
purposes = ["note-assistant"]
basis = "legitimate_interests"
role = "public"
[[source]]
name = "held-out"
path = "held.jsonl"
owner = "us"
sensitivity = "public"
purposes = ["note-assistant"]
basis = "generated"
role = "evaluation"
"""
PLAIN = [{"id": str(number), "text": f"The patient was seen for a cough, and {number} sat beside."} for number in range(150)]
PERSONAL = {"id": "drifted", "text": "Dr. Aurelia Quistgaard writes to aurelia@example.org."}


def test_new_rows_that_look_more_sensitive_than_the_source_stop_the_update(tmp_path: Path):
    """One new row beside 150 old ones: looked at by itself, it is refused with a remedy, until a person confirms these very bytes."""
    (tmp_path / "discreet.toml").write_text(OPEN)
    (tmp_path / "held.jsonl").write_text(json.dumps(PLAIN[0]) + "\n")
    path = tmp_path / "public.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PLAIN))
    with pipeline.open_house(tmp_path) as house:
        pipeline.ingest(house, Silent())
        assert not pipeline.propose_sensitivity(house, "public")["exceeds"]
        path.write_text(path.read_text() + json.dumps(PERSONAL) + "\n")
        for _ in range(2):
            with pytest.raises(TrackRefused, match="catalog confirm public") as refused:
                pipeline.update(house, Silent())
            assert "Quistgaard" not in str(refused.value)
        pipeline.confirm_sensitivity(house, "public", by="Petra", reason="a character of a novel")
        assert pipeline.ingest(house, Silent()).public is not None
        path.write_text(path.read_text() + json.dumps(PERSONAL | {"id": "again"}) + "\n")
        with pytest.raises(TrackRefused):
            pipeline.update(house, Silent())
        with pytest.raises(NotFound):
            pipeline.propose_sensitivity(house, "nothing")
