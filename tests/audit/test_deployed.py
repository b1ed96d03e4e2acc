"""Children of a model: merged, rounded as their file holds them, audited."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from discreet import model
from discreet.audit import deployed
from discreet.audit.bounds import GaussianTradeOff, Verdict
from discreet.config import ModelSection


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


def test_a_child_that_lost_its_adapter_is_inconclusive_and_one_that_leaks_fails() -> None:
    included = np.arange(400) % 2 == 0
    claim = GaussianTradeOff(mu=0.5)

    def said(scores: np.ndarray) -> Verdict:
        return deployed.layer("q8_0", scores, included, trade_off=claim, fpr=0.05, level=0.01).verdict

    noise = np.random.default_rng(0).normal(size=400)
    assert said(np.zeros(400)) is Verdict.INCONCLUSIVE
    assert said(noise) is Verdict.PASS
    assert said(noise + 4 * included) is Verdict.FAIL


def test_an_unknown_kind_is_refused(adapted: torch.nn.Module) -> None:
    with pytest.raises(ValueError, match="q2_k"):
        list(deployed.children(adapted, ["q2_k"]))
