from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional

from discreet import model as models
from discreet.config import ModelSection
from discreet.dp import noise, sampling
from discreet.dp.clipping import ClippedSum, clipped_sum
from discreet.dp.combine import Combine
from discreet.dp.noise import Noised
from discreet.keys import Key, Stream
from discreet.model import Base
from discreet.record import SubjectId
from discreet.train import step as steps
from discreet.train.preference import Pair
from discreet.train.step import PrivateCorpus, document_losses, mean_loss, padded, private_step, public_step, tokenize

from .conftest import NOTES, Paid

SECTION = ModelSection(base="tiny", max_tokens=48)


def _corpus(paid: Paid) -> PrivateCorpus:
    return PrivateCorpus.of(paid.snapshot, NOTES, paid.setup.base, max_tokens=48)


def test_tokenize_cuts_and_ends_every_document(base: Base) -> None:
    ids = tokenize(["", "a", "b" * 200], base, max_tokens=10)
    assert [len(document) for document in ids] == [2, 2, 10]
    assert all(document[-1] == base.tokenizer.eos_token_id for document in ids)
    with pytest.raises(ValueError, match="max_tokens=1 >= 2"):
        tokenize(["a"], base, max_tokens=1)


def test_document_loss_is_the_mean_over_its_own_tokens(base: Base) -> None:
    documents = tokenize([*NOTES[:3], "x"], base, max_tokens=48)
    losses_D = document_losses(base.module, padded(documents))
    for document, loss in zip(documents, losses_D, strict=True):
        logits_TV = base.module(input_ids=document[None]).logits[0, :-1]
        torch.testing.assert_close(loss, functional.cross_entropy(logits_TV, document[1:]), rtol=1e-4, atol=1e-5)


def test_padding_and_companions_change_nothing(base: Base) -> None:
    """PITFALLS 9."""
    short, long = tokenize(["one two", NOTES[0] + NOTES[1]], base, max_tokens=96)
    alone = document_losses(base.module, padded([short]))[0]
    beside = document_losses(base.module, padded([long, short]))[1]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-6)


def test_frozen_head_loss_equals_the_plain_one(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "_CHUNK", 7)
    batch = padded(tokenize(NOTES[:5], base, max_tokens=48))
    module = models.attach(base, SECTION)
    _move(module)
    sums = []
    for plain_heads in ({"llama"}, set()):
        monkeypatch.setattr(steps, "_PLAIN_HEADS", plain_heads)
        losses_D = document_losses(module, batch)
        grads = torch.autograd.grad(losses_D @ torch.arange(1.0, 6.0), list(models.trained_parameters(module).values()))
        sums.append((losses_D.detach(), grads, clipped_sum(module, document_losses, batch, list(range(5)), clip_norm=0.1)))
    (fused, fused_grads, fused_sum), (plain, plain_grads, plain_sum) = sums
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)
    for left, right in zip(fused_grads, plain_grads, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    for name, gradient in plain_sum.gradients.items():
        torch.testing.assert_close(fused_sum.gradients[name], gradient, rtol=1e-4, atol=1e-6)


def _move(module: torch.nn.Module) -> None:
    """Moves B off zero, so that A has a gradient too."""
    with torch.no_grad():
        for parameter in models.trained_parameters(module).values():
            parameter.add_(torch.linspace(-0.1, 0.1, parameter.numel()).view(parameter.shape))


def _tiny(kind: str) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    if kind == "llama":
        shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
        made: torch.nn.Module = LlamaForCausalLM(LlamaConfig(vocab_size=60, hidden_size=32, tie_word_embeddings=True, **shape))
    else:
        made = GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64))
    return made.double().eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_clipped_sum_of_rows_of_one_document(kind: str, attention: str) -> None:
    """PITFALLS 9: losses and clipped sums of units of one to three documents, packed and alone."""
    torch.manual_seed(0)
    module = _tiny(kind)
    module.set_attn_implementation(attention)
    units = [tuple(torch.randint(0, 60, (n,)) for n in of_unit) for of_unit in ((9, 3), (17,), (5, 5, 12), (2,), (30,))]
    packed = steps.arranged(units, 120, steps.Rows.PACKED)
    assert any(len(row) > 1 for rows in packed for row in rows)
    assert steps.work(units, packed).padding < steps.work(units, steps.arranged(units, 120, steps.Rows.PADDED)).padding
    alone = [[[(u, d)] for d in range(len(of_unit))] for u, of_unit in enumerate(units)]
    expected = steps.summed(module, units, alone, clip_norm=0.5, token_budget=10_000)
    got = steps.summed(module, units, packed, clip_norm=0.5, token_budget=10_000)
    tolerance = 1e-7 if attention == "eager" else 1e-11  # eager Llama takes its softmax in float32, whatever the model
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(got.gradients[name], gradient, rtol=1e-9, atol=tolerance)


@pytest.mark.parametrize("rows", ["padded", "packed", "pairs"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_losses_are_made_on_the_models_device(kind: str, rows: str) -> None:
    """As for the clipped sum: what is made without saying where cannot be computed with."""
    module, documents = _tiny(kind), [torch.arange(9), torch.arange(4), torch.arange(6)]
    if rows == "pairs":
        made = [Pair(chosen=document, rejected=document.flip(0), prompt=2, beta=0.1) for document in documents]
        batch = steps.laid_out([[document] for document in made])
    else:
        batch = steps.laid_out([documents] if rows == "packed" else [[document] for document in documents])
    module.requires_grad_(False)
    module.get_input_embeddings().weight.requires_grad_()
    plain = document_losses(module, batch)
    with torch.device("meta"):
        found = document_losses(module, batch)
        found.sum().backward()
    assert torch.equal(found, plain)


def test_packing_never_splits_a_unit_and_keeps_the_budget() -> None:
    lengths = [[40, 2], [7], [7, 7, 7], [30], [1], [90, 90]]
    for budget in (1, 50, 100, 1000):
        packed = steps._packed(lengths, budget)
        placed = [document for rows in packed for row in rows for document in row]
        assert sorted(placed) == [(u, d) for u, of_unit in enumerate(lengths) for d in range(len(of_unit))]
        for rows in packed:
            width = max(sum(lengths[u][d] for u, d in row) for row in rows)
            assert len(rows) * width <= budget or len({u for row in rows for u, _ in row}) == 1
        assert sum(len({u for row in rows for u, _ in row}) for rows in packed) == len(lengths)


def test_packing_is_refused_where_attention_has_a_window() -> None:
    module = _tiny("llama")
    module.config.sliding_window = 4
    batch = steps.laid_out([[torch.arange(5), torch.arange(3)]])
    with pytest.raises(ValueError, match="sliding_window=4"):
        document_losses(module, batch)


def test_private_step_is_its_plan(paid: Paid) -> None:
    """Draw, clip a unit at a time, add, noise once, divide by the public batch: recomputed here by hand with SGD of rate one."""
    corpus, plan, module = _corpus(paid), paid.plan, models.attach(paid.setup.base, SECTION)
    _move(module)
    before = {name: parameter.detach().clone() for name, parameter in models.trained_parameters(module).items()}
    by_hand = copy.deepcopy(module)
    private_step(module, _sgd(module), corpus, plan, run_key=paid.run_key, step=3, token_budget=64)

    total = ClippedSum.zero(by_hand, clip_norm=plan.clip_norm)
    chosen = sampling.poisson(20, plan.sampling_probability, paid.run_key.stream("sample", 3)).tolist()
    assert chosen  # the fixed key draws somebody
    for unit in chosen:
        documents = corpus.units.reveal()[unit]
        key = paid.run_key.stream("documents", 3).fork(corpus.names[unit])
        kept = [documents[i] for i in sampling.capped(torch.arange(2), plan.cap, key).tolist()]
        total = total + clipped_sum(by_hand, document_losses, padded(kept), [0] * len(kept), clip_norm=plan.clip_norm)
    noised = noise.add(total, noise_multiplier=plan.noise_multiplier, key=paid.run_key.stream("noise", 3))
    for name, parameter in models.trained_parameters(module).items():
        torch.testing.assert_close(parameter.detach(), before[name] - noised.gradients[name] / plan.expected_batch, rtol=1e-4, atol=1e-5)


def _sgd(module: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(list(models.trained_parameters(module).values()), lr=1.0)


def test_an_empty_sample_is_noised_and_applied(paid: Paid, monkeypatch: pytest.MonkeyPatch) -> None:
    """PITFALLS 3."""
    monkeypatch.setattr(sampling, "poisson", lambda *_: torch.zeros(0, dtype=torch.int64))
    module = models.attach(paid.setup.base, SECTION)
    before = {name: parameter.detach().clone() for name, parameter in models.trained_parameters(module).items()}
    assert private_step(module, _sgd(module), _corpus(paid), paid.plan, run_key=paid.run_key, step=1, token_budget=64).tokens == 0
    assert all(not torch.equal(before[name], parameter) for name, parameter in models.trained_parameters(module).items())


def test_the_divisor_is_the_public_batch(paid: Paid, monkeypatch: pytest.MonkeyPatch) -> None:
    """PITFALLS 2: whoever takes part, the noise of the update has the same size. With twice the sample nothing but the sum changes."""
    sizes = []
    for taking_part in (0, 20):
        monkeypatch.setattr(sampling, "poisson", lambda *_, count=taking_part: torch.arange(count))
        monkeypatch.setattr(noise, "add", _only_noise)
        module = models.attach(paid.setup.base, SECTION)
        start = torch.cat([p.detach().flatten() for p in models.trained_parameters(module).values()])
        private_step(module, _sgd(module), _corpus(paid), paid.plan, run_key=paid.run_key, step=1, token_budget=512)
        sizes.append(torch.cat([p.detach().flatten() for p in models.trained_parameters(module).values()]) - start)
    torch.testing.assert_close(sizes[0], sizes[1], rtol=0, atol=0)
    expected = paid.plan.noise_multiplier * paid.plan.clip_norm / paid.plan.expected_batch
    assert sizes[0].std().item() == pytest.approx(expected, rel=0.05)


_add = noise.add


def _only_noise(clipped: ClippedSum, *, noise_multiplier: float, key: Stream) -> Noised:
    silent = {name: torch.zeros_like(gradient) for name, gradient in clipped.gradients.items()}
    return _add(ClippedSum(gradients=silent, clip_norm=clipped.clip_norm), noise_multiplier=noise_multiplier, key=key)


def test_micro_batches_do_not_change_the_sum(paid: Paid) -> None:
    results = []
    for token_budget in (1, 4096):
        module = models.attach(paid.setup.base, SECTION)
        private_step(module, _sgd(module), _corpus(paid), paid.plan, run_key=paid.run_key, step=1, token_budget=token_budget)
        results.append(torch.cat([p.detach().flatten() for p in models.trained_parameters(module).values()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_choice_of_documents_depends_on_unit_and_step_alone(paid: Paid) -> None:
    corpus = _corpus(paid)

    smaller = PrivateCorpus(units=type(corpus.units)(corpus.units.reveal()[:10]), names=corpus.names[:10])
    key = Key(bytes(31) + b"\x07")
    picks: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    for which, one in enumerate((corpus, smaller)):
        for number in range(1, 30):
            kept = sampling.capped_range(len(one.units.reveal()[3]), 1, key.stream("documents", number).fork(one.names[3]))
            drawn = tuple(one.units.reveal()[3][place] for place in kept)
            picks[which].append(drawn[0])
    assert all(torch.equal(left, right) for left, right in zip(picks[0], picks[1], strict=True))
    assert len({tuple(pick.tolist()) for pick in picks[0]}) == 2


def test_corpus_is_ordered_by_unit_and_refuses_missing_texts(paid: Paid) -> None:
    corpus = _corpus(paid)
    assert corpus.names == tuple(sorted(corpus.names))
    assert "cough" not in repr(corpus)
    with pytest.raises(ValueError, match="every position"):
        PrivateCorpus.of(paid.snapshot, NOTES[:-1], paid.setup.base, max_tokens=48)
    assert SubjectId(corpus.names[0]) in paid.snapshot.units.reveal()


def test_a_long_document_is_cut_short_and_never_becomes_two(paid: Paid) -> None:
    """So parts are what the owner makes of a text, and each is a document of the unit that its row names."""
    corpus, positions = PrivateCorpus.of(paid.snapshot, [note * 20 for note in NOTES], paid.setup.base, max_tokens=48), paid.snapshot.units.reveal()
    assert {name: len(documents) for name, documents in zip(corpus.names, corpus.units.reveal(), strict=True)} == {
        name: len(at) for name, at in positions.items()
    }
    assert {len(document) for documents in corpus.units.reveal() for document in documents if isinstance(document, torch.Tensor)} == {48}
    assert max(len(at) for at in positions.values()) > 1


def test_public_step_learns_public_text(base: Base) -> None:
    module = models.attach(base, SECTION)
    documents = tokenize(NOTES[:8], base, max_tokens=48)
    optimizer = torch.optim.Adam(list(models.trained_parameters(module).values()), lr=0.02)
    before = mean_loss(module, documents, token_budget=256)
    for _ in range(8):
        assert public_step(module, optimizer, documents, token_budget=256).tokens == sum(len(document) for document in documents)
    assert mean_loss(module, documents, token_budget=256) < before - 0.05


@pytest.mark.parametrize("combine", Combine)
@pytest.mark.parametrize("rows", steps.Rows)
def test_a_unit_above_the_token_budget_is_computed_in_parts_and_clipped_once(
    base: Base, monkeypatch: pytest.MonkeyPatch, combine: Combine, rows: steps.Rows
) -> None:
    """A subject of 40 documents with a budget of about 4, beside one that fits."""
    module = models.attach(base, SECTION)
    _move(module)
    units = [tuple(tokenize(NOTES, base, max_tokens=32)), tuple(tokenize(NOTES[:2], base, max_tokens=32))]
    largest = 4 * max(len(document) for document in units[0])
    sizes: list[int] = []
    whole = steps.document_losses
    unlimited = steps.summed(module, units, steps.arranged(units, 10**6, rows), clip_norm=0.05, token_budget=10**6, combine=combine)
    monkeypatch.setattr(steps, "document_losses", lambda model, batch: sizes.append(batch["input_ids"].numel()) or whole(model, batch))
    parts = steps.summed(module, units, steps.arranged(units, largest, rows), clip_norm=0.05, token_budget=largest, combine=combine)
    assert max(sizes) <= largest
    assert len(sizes) >= 10
    for name, gradient in unlimited.gradients.items():
        torch.testing.assert_close(parts.gradients[name], gradient, rtol=1e-4, atol=1e-7)
    assert parts.votes == unlimited.votes
