"""One optimiser step as a function of (model, corpus, plan, run key, step): with differential privacy, and without it on public text.

The private step is five lines that follow the plan: draw the units (Poisson), choose each one's documents (cap), add up clipped gradients micro-batch by
micro-batch, noise the sum once, divide by the *public* expected batch. All randomness is named by the step under the run key, so a resumed run replays it.

The loss of a document is the mean cross entropy of its next tokens, its end mark included: every document weighs the same before clipping, whatever its length,
and the loss depends on nothing but the document (PITFALLS 9). Padding carries no loss and is masked from attention.

Guarantees: a step whose sample is empty is noised and counted like any other; the realised batch is never divided by; documents of one unit are in one micro-batch.

Sources: Abadi et al. 2016, arXiv 1607.00133; micro-batching after Li et al. 2022, arXiv 2110.05679.

Does not cover: several ranks (`train/parallel.py`), packed rows.

Legend: D documents of a micro-batch, T tokens of its longest, V vocabulary, N tokens that carry a loss, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from discreet.dp import clipping, noise, sampling
from discreet.dp.clipping import ClippedSum
from discreet.dp.mechanism import Plan
from discreet.keys import Key
from discreet.model import Base
from discreet.record import Sensitive, Snapshot

_CHUNK = 128
"""Rows of logits held at once: 128 rows of a vocabulary of 49,152 are 25 MB."""

_PLAIN_HEADS = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}
"""Model types whose logits are hidden states times the head's weight and nothing more (no bias, scale or cap)."""

Documents = Sequence[Tensor]
"""Token ids of each document, int64 [t] each."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateCorpus:
    """A snapshot's documents as token ids, by privacy unit, in an order that the snapshot alone fixes.

    Attributes:
        units: for each unit its documents; sensitive.
        names: the pseudonym of each unit, which names its draws.
    """

    units: Sensitive[tuple[tuple[Tensor, ...], ...]]
    names: tuple[str, ...]

    @staticmethod
    def of(snapshot: Snapshot, texts: Sequence[str], base: Base, *, max_tokens: int) -> PrivateCorpus:
        """Tokenises the texts of a snapshot.

        Args:
            texts: the document at each position of the snapshot, from 0 (`corpus.texts`).
            max_tokens: >= 2; longer documents are cut.

        Raises:
            ValueError: when the snapshot has a position that `texts` has not.
        """
        positions_by_unit = snapshot.units.reveal()
        names = sorted(positions_by_unit)
        if any(not 0 <= position < len(texts) for positions in positions_by_unit.values() for position in positions):
            raise ValueError(f"Expected texts for every position of the snapshot, got {len(texts)}.")
        ids = tokenize(texts, base, max_tokens=max_tokens)
        return PrivateCorpus(units=Sensitive(tuple(tuple(ids[p] for p in positions_by_unit[name]) for name in names)), names=tuple(names))


def tokenize(texts: Sequence[str], base: Base, *, max_tokens: int) -> list[Tensor]:
    """Returns the token ids of each text, cut to `max_tokens` in all, the end mark included.

    Returns:
        int64 [2 <= t <= max_tokens] each; an empty text is the end mark twice, so that it has one next token.
    """
    if max_tokens < 2:
        raise ValueError(f"Expected max_tokens={max_tokens} >= 2.")
    end = base.tokenizer.eos_token_id
    encoded = base.tokenizer(list(texts))["input_ids"] if texts else []
    return [torch.tensor([*(ids[: max_tokens - 1] or [end]), end]) for ids in encoded]


def private_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, corpus: PrivateCorpus, plan: Plan, *, run_key: Key, step: int, token_budget: int
) -> int:
    """Takes one step of the plan.

    Args:
        step: from 1; names the step's draws under `run_key`.
        token_budget: padded tokens of a micro-batch, >= 1; changes speed and rounding, not the mechanism.

    Returns:
        the number of tokens read: private, for the display only.
    """
    total, tokens = clipped_step(model, corpus, plan, run_key=run_key, step=step, token_budget=token_budget)
    noised = noise.add(total, noise_multiplier=plan.noise_multiplier, key=run_key.stream("noise", step))
    _apply(model, optimizer, noised.gradients, divisor=plan.expected_batch)
    return tokens


def clipped_step(model: nn.Module, corpus: PrivateCorpus, plan: Plan, *, run_key: Key, step: int, token_budget: int) -> tuple[ClippedSum, int]:
    """Draws the units of one step and sums their clipped gradients, without noise: what never leaves a site of a fleet except masked and noised.

    Args:
        step: from 1; names the step's draws under `run_key`.
        token_budget: padded tokens of a micro-batch, >= 1.

    Returns:
        the clipped sum and the number of tokens read, both private.
    """
    units = _drawn(corpus, plan, run_key=run_key, step=step)
    total = ClippedSum.zero(model, clip_norm=plan.clip_norm)
    for group in sampling.micro_batches([[len(document) for document in unit] for unit in units], token_budget):
        documents = [document for unit in group for document in units[unit]]
        owners = [unit for unit in group for _ in units[unit]]
        total = total + clipping.clipped_sum(model, document_losses, padded(documents), owners, clip_norm=plan.clip_norm)
    return total, sum(len(document) for unit in units for document in unit)


def public_step(model: nn.Module, optimizer: torch.optim.Optimizer, documents: Documents, *, token_budget: int) -> int:
    """Takes one step without privacy on public documents: the mean of their losses. Returns the number of tokens read."""
    optimizer.zero_grad(set_to_none=True)
    for group in sampling.micro_batches([[len(document)] for document in documents], token_budget):
        losses_D = document_losses(model, padded([documents[index] for index in group]))
        (losses_D.sum() / len(documents)).backward()  # type: ignore[no-untyped-call]  # torch declares no types here
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return sum(len(document) for document in documents)


@torch.no_grad()
def mean_loss(model: nn.Module, documents: Documents, *, token_budget: int) -> float:
    """Returns the cross entropy per token over public documents, in nats."""
    total, count = 0.0, 0
    for group in sampling.micro_batches([[len(document)] for document in documents], token_budget):
        batch = padded([documents[index] for index in group])
        num_targets_D = batch["attention_mask"][:, 1:].sum(1)
        total += float((document_losses(model, batch).cpu() * num_targets_D).sum())
        count += int(num_targets_D.sum())
    return total / count


def padded(documents: Documents) -> dict[str, Tensor]:
    """Pads documents on the right.

    Returns:
        input_ids [D, T] and attention_mask [D, T], int64; padding is 0 in both.
    """
    ids_DT = torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True)
    lengths_D = torch.tensor([len(document) for document in documents])
    return {"input_ids": ids_DT, "attention_mask": (torch.arange(ids_DT.shape[1]) < lengths_D[:, None]).long()}


def document_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Computes each document's mean cross entropy of its next tokens.

    Args:
        batch: as `padded` makes it.

    Returns:
        float32 [D], in nats per token.
    """
    device = next(model.parameters()).device
    ids_DT, mask_DT = batch["input_ids"].to(device), batch["attention_mask"].to(device)
    is_target_DT = mask_DT[:, 1:].bool()
    losses_N = _token_losses(model, ids_DT, mask_DT, is_target_DT)
    document_N = torch.arange(len(ids_DT), device=device)[:, None].expand_as(is_target_DT)[is_target_DT]
    return torch.zeros(len(ids_DT), device=device).index_add(0, document_N, losses_N) / is_target_DT.sum(1)


def _token_losses(model: nn.Module, ids_DT: Tensor, mask_DT: Tensor, is_target_DT: Tensor) -> Tensor:
    outer: Any = model
    causal: Any = outer.get_base_model() if isinstance(model, PeftModel) else outer
    head = causal.get_output_embeddings()
    inputs = {"input_ids": ids_DT, "attention_mask": mask_DT, "use_cache": False}
    targets_N = ids_DT[:, 1:][is_target_DT]
    if _is_plain_and_frozen(causal, head):
        hidden_DTH = causal.get_decoder()(**inputs).last_hidden_state[:, :-1]
        return _FrozenHeadLoss.apply(hidden_DTH[is_target_DT], head.weight, targets_N)  # type: ignore[no-any-return, no-untyped-call]  # autograd.Function is untyped
    logits_NV = causal(**inputs).logits[:, :-1][is_target_DT]
    return functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def _is_plain_and_frozen(causal: Any, head: Any) -> bool:
    is_plain = causal.config.model_type in _PLAIN_HEADS and type(head) is nn.Linear and getattr(head, "bias", None) is None
    return is_plain and not head.weight.requires_grad


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross entropy through a frozen head, a chunk of rows at a time: the logits of a large vocabulary never exist all at once, forward or backward."""

    @staticmethod
    def forward(ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, targets_N: Tensor) -> Tensor:
        losses_N = hidden_NH.new_empty(len(hidden_NH))
        grad_NH = torch.empty_like(hidden_NH) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden_NH), _CHUNK):
            rows = slice(start, start + _CHUNK)
            logits_NV = hidden_NH[rows] @ weight_VH.T
            log_total_N1 = logits_NV.logsumexp(1, keepdim=True)
            losses_N[rows] = (log_total_N1 - logits_NV.gather(1, targets_N[rows, None])).squeeze(1)
            if grad_NH is not None:
                error_NV = logits_NV.sub_(log_total_N1).exp_()
                error_NV[torch.arange(len(error_NV)), targets_N[rows]] -= 1.0
                grad_NH[rows] = error_NV @ weight_VH
        ctx.save_for_backward(grad_NH)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grad_outputs[0][:, None], None, None


def _drawn(corpus: PrivateCorpus, plan: Plan, *, run_key: Key, step: int) -> list[tuple[Tensor, ...]]:
    """The documents of each unit that takes part in the step."""
    units = corpus.units.reveal()
    chosen = sampling.poisson(len(units), plan.sampling_probability, run_key.stream("sample", step)).tolist()
    documents_key = run_key.stream("documents", step)
    return [_capped(units[u], plan.cap, documents_key.fork(corpus.names[u])) for u in chosen]


def _capped(documents: tuple[Tensor, ...], cap: int, key: Any) -> tuple[Tensor, ...]:
    return tuple(documents[i] for i in sampling.capped(torch.arange(len(documents)), cap, key).tolist())


def _apply(model: nn.Module, optimizer: torch.optim.Optimizer, sums: Mapping[str, Tensor], *, divisor: float) -> None:
    parameters = dict(model.named_parameters())
    for name, sum_ in sums.items():
        parameters[name].grad = (sum_ / divisor).to(parameters[name].dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
