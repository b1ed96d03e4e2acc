"""Children of a model: merged, rounded as their file holds them, audited."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from discreet import model
from discreet.audit import deployed
from discreet.audit.bounds import GaussianTradeOff, Verdict
from discreet.config import ModelSection
from discreet.errors import ModelUnsafe, NotFound


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    base = model.load_base("tiny", cache=tmp_path_factory.mktemp("cache"))
    module = model.attach(base, ModelSection(base="tiny"))
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.05)
    return module


def logits(module: torch.nn.Module) -> torch.Tensor:
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        return module(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


def test_merging_changes_nothing_and_leaves_the_parent_as_it_was(adapted: torch.nn.Module) -> None:
    before = logits(adapted)
    assert torch.allclose(logits(model.merged(adapted)), before, atol=1e-4)
    assert torch.equal(logits(adapted), before)


def test_every_kind_rounds_by_no_more_than_its_steps(adapted: torch.nn.Module) -> None:
    whole = dict(model.merged(adapted).named_parameters())
    for kind, child in deployed.children(adapted, deployed.KINDS):
        for name, parameter in child.named_parameters():
            largest = float(whole[name].detach().abs().max())
            steps = {"bfloat16": largest / 256, "q8_0": largest / 127, "q4_0": largest / 7}[kind]
            assert float((parameter - whole[name]).detach().abs().max()) <= steps, (kind, name)
        assert any(not torch.equal(parameter, whole[name]) for name, parameter in child.named_parameters())


def test_a_child_unlike_its_parent_is_inconclusive_and_one_that_leaks_fails() -> None:
    included = np.arange(400) % 2 == 0
    claim = GaussianTradeOff(mu=1.0)
    parent = np.random.default_rng(0).normal(size=400)

    def said(scores: np.ndarray) -> Verdict:
        return deployed.layer("q8_0", scores, parent, included, trade_off=claim, fpr=0.05, level=0.01).verdict

    rounding = np.random.default_rng(1).normal(size=400)
    assert said(np.zeros(400)) is Verdict.INCONCLUSIVE, "the adapter is not in it"
    assert said(rounding) is Verdict.INCONCLUSIVE, "nothing but rounding is in it"
    assert said(-parent) is Verdict.INCONCLUSIVE
    assert said(parent + 0.5 * rounding) is Verdict.PASS
    assert said(parent + 4 * included) is Verdict.FAIL
    few = deployed.layer("q8_0", parent[:60], parent[:60], included[:60], trade_off=claim, fpr=0.05, level=0.01)
    assert (few.verdict, few.figures["detectable"] > 2 * claim.mu) == (Verdict.INCONCLUSIVE, True), "it could not have seen a leak"


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> model.Base:
    """A base whose tokenizer merges: llama.cpp takes none without."""
    texts = tuple(f"The patient of bed {number % 7} was given syrup and went home." for number in range(40))
    return model.build_tiny(model.PublicText(texts), cache=tmp_path_factory.mktemp("spoken"), steps=0, vocabulary=300)


@pytest.mark.parametrize("kind", model.GGUF_KINDS)
def test_a_file_gives_back_what_it_was_made_of_to_its_precision(kind: str, spoken: model.Base, tmp_path: Path) -> None:
    module = model.merged(model.attach(spoken, ModelSection(base="tiny")))
    digest = model.write_gguf(module, spoken.tokenizer, tmp_path / "child.gguf", kind=kind)
    assert model.write_gguf(module, spoken.tokenizer, tmp_path / "again.gguf", kind=kind) == digest, "the same bytes"
    child, read = model.read_gguf(spoken, tmp_path / "child.gguf")
    assert read == digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.gguf", "child.gguf"]
    whole = dict(module.named_parameters())
    for name, parameter in child.named_parameters():
        largest = float(whole[name].detach().abs().max())
        assert float((parameter - whole[name]).detach().abs().max()) <= largest * {"f16": 1e-3, "q8_0": 1 / 127, "q4_0": 1 / 7}[kind], name
    if kind == "f16":
        assert torch.allclose(logits(child), logits(module), atol=0.02)
    with model.adapter_off(child, spoken):
        assert torch.equal(logits(child), logits(spoken.module)), "its reference is the base"


def test_a_file_with_other_tensors_or_without_some_is_refused(spoken: model.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    module = model.merged(spoken.module)
    model.write_gguf(module, spoken.tokenizer, tmp_path / "child.gguf", kind="f16")
    other = model.build_tiny(model.PublicText(("some other words",)), cache=tmp_path, steps=0, vocabulary=262)
    (tmp_path / "text.gguf").write_text("GGUF and no more")
    add = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_tensor", lambda self, name, *values, **how: None if "blk.1.ffn_up" in name else add(self, name, *values, **how)
    )
    model.write_gguf(module, spoken.tokenizer, tmp_path / "less.gguf", kind="f16")
    for base, file in ((other, "child.gguf"), (spoken, "text.gguf"), (spoken, "less.gguf")):
        with pytest.raises(ModelUnsafe):
            model.read_gguf(base, tmp_path / file)
    with pytest.raises(NotFound):
        model.read_gguf(spoken, tmp_path / "none.gguf")


def test_an_unknown_kind_is_refused(adapted: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="q2_k"):
        list(deployed.children(adapted, ["q2_k"]))
