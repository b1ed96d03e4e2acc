"""The generated hospital: sizes, gold spans, independence of patients, same bytes every time."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from discreet.config import load
from discreet.demo import EXAMPLES, MAX_DOCUMENTS, CorpusFacts, estimated_tokens, write_config, write_corpus
from discreet.errors import ConfigInvalid, NotFound

SIZES: dict[str, Any] = {"patients": 200, "documents": 500, "public": 60, "held_out": 40}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CorpusFacts]:
    folder = tmp_path_factory.mktemp("hospital")
    return folder, write_corpus(folder, **SIZES)


def test_facts_count_what_was_written(hospital: tuple[Path, CorpusFacts]) -> None:
    folder, facts = hospital
    notes = rows(folder / "notes.jsonl")
    per_patient = Counter(row["patient"] for row in notes)
    assert (len(per_patient), len(notes)) == (200, 500) == (facts.patients, facts.documents)
    assert max(per_patient.values()) <= MAX_DOCUMENTS
    assert sum(count == 1 for count in per_patient.values()) > sum(count >= 5 for count in per_patient.values()) > 0
    assert {row["kind"] for row in notes} == {"note", "exchange"}
    assert len({row["id"] for row in notes}) == len(notes)
    assert len(rows(folder / "public_train.jsonl")) == facts.public == 60
    assert len(rows(folder / "held_out.jsonl")) == facts.held_out == 40
    assert set(facts.to_json()["files"]) == {path.name for path in folder.iterdir()}


def test_opt_outs_are_patients(hospital: tuple[Path, CorpusFacts]) -> None:
    folder, facts = hospital
    opted_out = (folder / "opt_outs.txt").read_text().splitlines()
    assert len(set(opted_out)) == len(opted_out) == facts.opted_out == 5
    assert set(opted_out) <= {row["patient"] for row in rows(folder / "notes.jsonl")}


def test_texts_are_40_to_80_tokens_and_all_differ(hospital: tuple[Path, CorpusFacts]) -> None:
    folder, _ = hospital
    texts = [row["text"] for name in ("notes", "public_train", "held_out") for row in rows(folder / f"{name}.jsonl")]
    assert len(set(texts)) == len(texts)
    assert all(40 <= estimated_tokens(text) <= 80 for text in texts)
    assert not any("{" in text or "  " in text or text != text.strip() for text in texts)


def test_gold_spans_hold_the_known_identifiers(hospital: tuple[Path, CorpusFacts]) -> None:
    folder, facts = hospital
    columns = {"MRN": "mrn", "EMAIL": "email", "ADDRESS": "address"}
    seen: Counter[str] = Counter()
    for row in rows(folder / "notes.jsonl"):
        spans = facts.gold[row["id"]]
        assert spans == sorted(spans, key=lambda span: span["start"])
        covered = {(span["label"], row["text"][span["start"] : span["end"]]) for span in spans}
        seen.update(span["label"] for span in spans)
        for label, column in columns.items():
            assert (row[column] in row["text"]) == ((label, row[column]) in covered)
        phones = {"".join(c for c in value if c.isdigit()) for label, value in covered if label == "PHONE"}
        assert phones <= {row["phone"].replace("-", "")}
        if row["name"] in row["text"]:
            assert ("PERSON", row["name"]) in covered
    assert sum(seen.values()) == facts.to_json()["gold_spans"]
    assert set(seen) == {"PERSON", "MRN", "DATE", "PHONE", "EMAIL", "ADDRESS"}


def test_the_same_arguments_give_the_same_bytes(hospital: tuple[Path, CorpusFacts], tmp_path: Path) -> None:
    _, facts = hospital
    assert write_corpus(tmp_path / "again", **SIZES).files == facts.files
    other = write_corpus(tmp_path / "other", **SIZES, seed="another hospital")
    assert other.files["notes.jsonl"] != facts.files["notes.jsonl"]


def test_a_patient_does_not_depend_on_the_others(hospital: tuple[Path, CorpusFacts], tmp_path: Path) -> None:
    """PITFALLS 39: with fewer patients around, the first patients are the same people with the same first document."""
    folder, _ = hospital
    write_corpus(tmp_path, patients=20, documents=50, public=1, held_out=1)
    firsts = [{row["id"]: row["text"] for row in rows(where / "notes.jsonl") if row["id"].endswith("-1")} for where in (folder, tmp_path)]
    assert len(firsts[1]) == 20
    assert all(firsts[0][name] == text for name, text in firsts[1].items())


def test_public_and_held_out_texts_name_no_patient(hospital: tuple[Path, CorpusFacts]) -> None:
    folder, _ = hospital
    identifiers = {row[column] for row in rows(folder / "notes.jsonl") for column in ("mrn", "phone", "email", "address")}
    for name in ("public_train", "held_out"):
        for row in rows(folder / f"{name}.jsonl"):
            assert set(row) == {"id", "kind", "text"}
            assert not any(identifier in row["text"] for identifier in identifiers)


@pytest.mark.parametrize("sizes", [{"patients": 0}, {"patients": 10, "documents": 9}, {"patients": 10, "documents": 81}, {"held_out": 0}])
def test_sizes_that_do_not_fit_are_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigInvalid, match="patients <= documents"):
        write_corpus(tmp_path / "never", **{**SIZES, **sizes})
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_are_valid_projects(tmp_path: Path, example: str) -> None:
    write_config(tmp_path, example=example)
    project = load(tmp_path)
    assert project.privacy.delta is None
    assert [source.role for source in project.source].count("canary") == 0


def test_settings_replace_one_value_and_keep_the_comments(tmp_path: Path) -> None:
    settings = {"model.base": '"tiny"', "privacy.steps": "7", "audit.canaries": "40"}
    text = write_config(tmp_path, example="hospital", settings=settings).read_text()
    project = load(tmp_path)
    assert (project.model.base, project.privacy.steps, project.audit.canaries) == ("tiny", 7, 40)
    assert "# half planted, half held back as twins" in text
    assert project.privacy.expected_batch == 160


def test_write_config_refuses(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="hospital or plain"):
        write_config(tmp_path, example="bank")
    with pytest.raises(ConfigInvalid, match="setting that the example has"):
        write_config(tmp_path, example="plain", settings={"privacy.colour": "1"})
    write_config(tmp_path, example="plain")
    with pytest.raises(ConfigInvalid, match="never overwritten"):
        write_config(tmp_path, example="plain")
