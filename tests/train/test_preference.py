"""A pair is one document with one loss, its own reference, and its unit's clip."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from discreet import corpus, pipeline
from discreet import model as models
from discreet.config import ModelSection
from discreet.dp.clipping import clipped_sum
from discreet.evidence.statement import Predicate
from discreet.keys import Key
from discreet.model import Base, trained_parameters
from discreet.train import preference
from discreet.train.loop import train
from discreet.train.preference import CHOSEN, REJECTED, Pair
from discreet.train.step import PrivateCorpus, Rows, arranged, document_losses, laid_out, tokenize

from .conftest import NOTES, Paid

PAIRS = [f"How long has patient {n} coughed?{CHOSEN}For {n % 7} days.{REJECTED}No idea, ask somebody else." for n in range(40)]
SECTION = ModelSection(base="tiny", max_tokens=48)


def pair(base: Base, text: str, *, max_tokens: int = 48, reference: float = 0.7) -> Pair:
    found = preference.encode(text, base, max_tokens=max_tokens, beta=0.5)
    assert found is not None
    return dataclasses.replace(found, reference=reference)


@pytest.fixture
def module(base: Base) -> nn.Module:
    made = models.attach(base, SECTION)
    with torch.no_grad():
        for number, parameter in enumerate(trained_parameters(made).values()):
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).sin().view_as(parameter) * (1 + number % 3))
    return made


def by_hand(module: nn.Module, document: Pair | Tensor) -> Tensor:
    """The loss from separate forward passes, without layout or mask."""

    def log_probability(ids: Tensor, first: int) -> Tensor:
        logits = module(input_ids=ids[None]).logits[0, :-1].float()
        return -functional.cross_entropy(logits, ids[1:], reduction="none")[first - 1 :].sum()

    if isinstance(document, Tensor):
        return -log_probability(document, 1) / (len(document) - 1)
    score = log_probability(document.chosen, document.prompt) - log_probability(document.rejected, document.prompt)
    return functional.softplus(-document.beta * (score - document.reference))


def test_the_loss_is_the_papers(base: Base, module: nn.Module) -> None:
    documents = [pair(base, PAIRS[1]), tokenize(NOTES[:1], base, max_tokens=48)[0], pair(base, PAIRS[2] + " " + NOTES[3])]
    losses_D = document_losses(module, laid_out([[document] for document in documents]))
    for loss, document in zip(losses_D, documents, strict=True):
        torch.testing.assert_close(loss, by_hand(module, document), rtol=1e-4, atol=1e-5)


def test_a_pair_is_clipped_with_its_unit(base: Base, module: nn.Module) -> None:
    """Against autograd, one unit at a time; two pairs of one unit and a plain document of another."""
    documents = [pair(base, PAIRS[1]), pair(base, PAIRS[2]), tokenize(NOTES[:1], base, max_tokens=48)[0]]
    units, parameters = [0, 0, 1], trained_parameters(module)
    total = clipped_sum(module, document_losses, laid_out([[each] for each in documents]), units, clip_norm=0.05)
    expected = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for unit in (0, 1):
        loss = torch.stack([by_hand(module, each) for each, owner in zip(documents, units, strict=True) if owner == unit]).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        for name, gradient in zip(parameters, gradients, strict=True):
            expected[name] += gradient * min(1.0, 0.05 / float(norm))
    for name, gradient in total.gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=2e-3, atol=1e-6)


def test_the_reference_is_where_training_starts_and_depends_on_the_pair_alone(paid: Paid, module: nn.Module) -> None:
    corpus = PrivateCorpus.of(paid.snapshot, PAIRS, paid.setup.base, max_tokens=48, beta=0.5).against(module)
    documents = [document for unit in corpus.units.reveal() for document in unit]
    assert all(isinstance(document, Pair) for document in documents)
    batch = laid_out([[document] for document in documents[:4]])
    assert document_losses(module, batch).tolist() == pytest.approx([0.6931] * 4, abs=1e-3)
    fewer = PrivateCorpus.of(paid.snapshot, [PAIRS[0], *NOTES[1:]], paid.setup.base, max_tokens=48, beta=0.5).against(module)
    assert fewer.units.reveal()[0][0].reference == documents[0].reference  # type: ignore[union-attr]  # the first is a pair in both


def test_what_is_no_pair_is_learnt_as_it_is(base: Base) -> None:
    for text in (NOTES[0], f"a{CHOSEN}b", f"a{REJECTED}b{CHOSEN}c", PAIRS[0] + CHOSEN, f"a{CHOSEN}b{REJECTED}c{REJECTED}d"):
        assert preference.encode(text, base, max_tokens=48, beta=0.1) is None
    long = pair(base, "word " * 100 + PAIRS[0], max_tokens=20)
    assert (long.prompt, len(long.chosen) <= 20, len(long.rejected) <= 20, len(long)) == (10, True, True, len(long.chosen) + len(long.rejected))
    assert long.chosen[:10].equal(long.rejected[:10])
    with pytest.raises(ValueError, match="max_tokens=3"):
        preference.encode(PAIRS[0], base, max_tokens=3, beta=0.1)


def test_pairs_are_never_packed(base: Base) -> None:
    units = [(pair(base, text),) for text in PAIRS[:4]]
    assert arranged(units, 4096, Rows.PACKED) == arranged(units, 4096, Rows.PADDED)


def test_training_on_pairs_prefers_what_was_chosen(paid: Paid) -> None:
    """Through the private loop, with next to no noise: the mean loss over the pairs falls below log 2."""
    section = paid.setup.train.model_copy(update={"objective": "preference", "preference_beta": 0.5, "learning_rate": 0.02})
    quiet = dataclasses.replace(paid.plan, mechanism=dataclasses.replace(paid.plan.mechanism, noise_multiplier=1e-3))
    reservation = dataclasses.replace(paid.reservation, plan=quiet.digest)
    setup = dataclasses.replace(paid.setup, train=section)
    trained = train(
        quiet,
        paid.snapshot,
        reservation,
        texts=PAIRS,
        setup=setup,
        run_key=Key(bytes(range(32))),
        checkpoints=paid.checkpoints(),
        adapter=paid.folder / "adapter",
    )
    start = models.attach(setup.base, setup.model)
    corpus = PrivateCorpus.of(paid.snapshot, PAIRS, setup.base, max_tokens=48, beta=0.5).against(start)
    batch = laid_out([[document] for unit in corpus.units.reveal() for document in unit])
    after = document_losses(models.load_adapter(setup.base, trained.adapter), batch)
    assert float(after.detach().mean()) < 0.67


def test_pairs_walk_through_the_whole_story(tmp_path: Path, new_project: Callable[[Path], Path]) -> None:
    """From rows of a source to a released model: the marks survive de-identification, the unit pays once, the audit looks and the release verifies."""
    folder = new_project(tmp_path / "hospital")
    rows = [json.loads(line) for line in (folder / "notes.jsonl").read_text().splitlines()]
    for row in rows:
        row["text"] = f"What is written about the patient?{CHOSEN}{row['text']}{REJECTED}I do not say."
    (folder / "notes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written = (folder / "discreet.toml").read_text()
    (folder / "discreet.toml").write_text(written.replace("[train]", '[train]\nobjective = "preference"'))
    with pipeline.open_house(folder) as house:
        told = pipeline.run(house, until=None, observer=pipeline.Silent())
        root = next(entry.subjects[0] for entry in house.log.select(Predicate.FROZEN) if entry.fields["name"] == "train")
        snapshot = corpus.open_snapshot(root, keyring=house.keyring, folder=house.snapshots)
        texts = corpus.texts(snapshot, range(sum(map(len, snapshot.units.reveal().values()))), house.keyring)
        whole = [text for text in texts if CHOSEN in text]
        assert len(whole) > 100
        assert all(preference._parts(text) is not None for text in whole)
        [trained] = [entry for entry in house.log.select(Predicate.TRAINED) if entry.fields["track"] == "dp"]
        assert trained.fields["kind"] == "preference tuning"
        assert all(len(house.log.select(once)) == 1 for once in (Predicate.RESERVED, Predicate.SPENT, Predicate.AUDITED, Predicate.RELEASED))
        assert told["train"]["moved"] > 0
        house.log.verify()
