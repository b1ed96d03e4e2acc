"""The audit of any model from files: no project is needed, and it never says PASS."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from random import Random

import pytest

from discreet import cli, report
from discreet.audit import external
from discreet.audit.bounds import gdp_epsilon, spent_level
from discreet.config import ModelSection, RunSection, TrainSection
from discreet.errors import ConfigInvalid, SourceEmpty
from discreet.keys import Key
from discreet.model import PublicText, load_base, save_adapter
from discreet.record import Basis, Sensitivity
from discreet.train import loop


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
    assert {layer["verdict"] for layer in found["layers"] if layer["name"] in external.EVENTS} == {"INCONCLUSIVE"}


def test_a_model_that_learnt_its_members_fails_by_extraction_and_its_identifiers_are_read(tmp_path: Path) -> None:
    """Adapters on a Llama that went over forty notes a hundred times: the second half of each follows from the first, its address with it."""
    base = load_base("tiny", cache=tmp_path)
    words = [f"{first}{second}" for first in ("bo", "da", "fi", "lu", "ne", "pi") for second in ("lt", "rn", "sk", "mp", "rd", "nd", "st")]
    for name, side in (("in", words[:20]), ("out", words[20:40])):
        rows = [json.dumps({"text": f"about {word} go and ask {word}{word}@{word}.example", "subject": word}) for word in side]
        (tmp_path / name).write_text("\n".join(rows), encoding="utf-8")
    learnt = PublicText.of(
        [json.loads(row)["text"] for row in (tmp_path / "in").read_text().splitlines()], sensitivity=Sensitivity.PUBLIC, basis=Basis.CONSENT
    )
    setup = loop.Setup(
        base=base,
        model=ModelSection(base="tiny", train=("all",)),
        train=TrainSection(learning_rate=3e-3),
        run=RunSection(threads=1),
        held_out=learnt,
        evaluations=1,
    )
    module = loop.fit(learnt, setup=setup, steps=110, batch=20, order=Key(bytes(32)).stream("order")).module
    save_adapter(module, tmp_path / "adapter")
    claim = external.gaussian(external.LooseTradeOff(epsilon=1.0, delta=1e-5))
    found = external.audit("tiny", adapter=tmp_path / "adapter", members=tmp_path / "in", non_members=tmp_path / "out", cache=tmp_path, claim=claim)
    layers = {layer["name"]: layer for layer in found["layers"]}
    for event in external.EVENTS:
        sides = {of: (each["inside"]["count"], each["outside"]["count"]) for of, each in layers[event]["figures"].items()}
        assert sides["model"][0] >= 12, event
        assert sides["model"][1] <= 2, event
        assert sides["base"] == (0, 0), event
        assert layers[event]["verdict"] == "FAIL", event
    again = external.audit(
        "tiny", adapter=tmp_path / "adapter", members=tmp_path / "in", non_members=tmp_path / "out", cache=tmp_path, claim=claim, number=3
    )
    assert again["level"] == pytest.approx(spent_level(0.05, 3)), "the third audit of one shared level"


def test_files_that_differ_in_length_alone_make_no_model_fail(tmp_path: Path) -> None:
    """An untrained model scores long texts otherwise than short ones: that is no membership."""
    draw = Random(3)
    words = ["".join(parts) for parts in product(("co", "fe", "wa", "ni", "le", "ri", "be", "wo"), "rslnm", ("da", "ne", "li", "ko", "tu"))]
    for name, length in (("in", 12), ("out", 14)):
        rows = [json.dumps({"text": " ".join(draw.choice(words) for _ in range(length))}) for _ in range(60)]
        (tmp_path / name).write_text("\n".join(rows), encoding="utf-8")
    claim = external.gaussian(external.LooseTradeOff(epsilon=0.1, delta=1e-5))
    found = external.audit("tiny", adapter=None, members=tmp_path / "in", non_members=tmp_path / "out", cache=tmp_path, claim=claim)
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["zlib"]["figures"]["beaten"]
    assert layers["bag of words"]["verdict"] == "PASS"
    assert layers["length"]["verdict"] == "INCONCLUSIVE"
    assert found["verdict"] == "INCONCLUSIVE"
    assert "members and non-members differ without any model" in found["because"]


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
    monkeypatch.setattr(sys, "argv", ["discreet", "audit", *arguments, "--gaussian", "--plots", str(files / "plots"), "--json"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    document = json.loads(capsys.readouterr().out)
    assert ended.value.code == 0
    assert document["allowed"]
    assert (
        {path.stem for path in (files / "plots").glob("*.png")}
        == {path.stem for path in (files / "plots").glob("*.svg")}
        >= {"loss", "loss-by-subject"}
    )
    assert all(layer["figures"]["auc_cap"] == pytest.approx(0.575, abs=0.006) for layer in document["layers"] if "auc_cap" in layer["figures"])


def test_a_claim_is_a_curve() -> None:
    claim = external.LooseTradeOff(epsilon=1.0, delta=1e-5)
    assert gdp_epsilon(claim.mu, delta=1e-5) == pytest.approx(1.0, abs=1e-4)
    assert claim.tpr(0.01) == pytest.approx(0.02719, abs=1e-4)
    assert claim.tpr(1.0) == 1.0
    assert external.gaussian(claim).tpr(0.01) < claim.tpr(0.01)
    with pytest.raises(ConfigInvalid):
        external.LooseTradeOff(epsilon=-1.0, delta=1e-5)


def test_texts_too_short_for_two_halves_say_nothing_about_extraction(files: Path, tmp_path: Path) -> None:
    (tmp_path / "short").write_text("\n".join(["ab"] * 20), encoding="utf-8")
    found = external.audit("tiny", adapter=None, members=tmp_path / "short", non_members=files / "out.jsonl", cache=files)
    assert [(layer["verdict"], layer["figures"]) for layer in found["layers"] if layer["name"] in external.EVENTS] == [("INCONCLUSIVE", {})] * 2


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
