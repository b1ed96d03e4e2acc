"""The audit of any model from files: no project is needed, and it never says PASS."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from discreet import cli, report
from discreet.audit import external
from discreet.audit.bounds import gdp_epsilon
from discreet.errors import ConfigInvalid, SourceEmpty


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for name, first in (("in", 0), ("out", 100)):
        rows = [
            json.dumps({"text": f"Patient {n} has a cough for {n % 7} days and a fever.", "subject": f"p{n // 2}"}) for n in range(first, first + 40)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def test_a_model_without_a_claim_is_measured_and_not_judged(files: Path) -> None:
    found = external.audit("tiny", adapter=None, members=files / "in.jsonl", non_members=files / "out.jsonl", cache=files)
    assert found["verdict"] == "INCONCLUSIVE"
    assert "no claim" in found["because"]
    assert {"loss", "zlib", "min-k", "min-k++", "loss, by subject", "bag of words"} <= {layer["name"] for layer in found["layers"]}
    report.write_attack(found, files / "page.html")
    assert (files / "page.html").read_text(encoding="utf-8").count("<svg") == len(found["roc"])


def test_the_command_prints_one_document(files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HOME", str(files))
    arguments = [
        "--model",
        "tiny",
        "--members",
        str(files / "in.jsonl"),
        "--non-members",
        str(files / "out.jsonl"),
        "--epsilon",
        "1",
        "--delta",
        "1e-5",
    ]
    monkeypatch.setattr(sys, "argv", ["discreet", "audit", *arguments, "--gaussian", "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    document = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert document["allowed"]
    assert all(layer["figures"]["auc_cap"] == pytest.approx(0.575, abs=0.006) for layer in document["layers"] if layer["name"] != "bag of words")


def test_a_claim_is_a_curve() -> None:
    claim = external.LooseTradeOff(epsilon=1.0, delta=1e-5)
    assert gdp_epsilon(claim.mu, delta=1e-5) == pytest.approx(1.0, abs=1e-4)
    assert claim.tpr(0.01) == pytest.approx(0.02719, abs=1e-4)
    assert claim.tpr(1.0) == 1.0
    assert external.gaussian(claim).tpr(0.01) < claim.tpr(0.01)
    with pytest.raises(ConfigInvalid):
        external.LooseTradeOff(epsilon=-1.0, delta=1e-5)


def test_files_that_say_nothing_are_refused(files: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one text\n", encoding="utf-8")
    with pytest.raises(SourceEmpty):
        external.audit("tiny", adapter=None, members=short, non_members=files / "out.jsonl", cache=files)
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n".join(['{"txt": "a secret"}'] * 20), encoding="utf-8")
    with pytest.raises(ConfigInvalid) as refused:
        external.audit("tiny", adapter=None, members=broken, non_members=files / "out.jsonl", cache=files)
    assert "secret" not in str(refused.value)
