"""One optimiser step as a function of (model, corpus, plan, run key, step): with differential privacy, and without it on public text.

The private step is five lines that follow the plan: draw the units (Poisson), choose each one's documents (cap), add up clipped gradients micro-batch by
micro-batch, noise the sum once, divide by the *public* expected batch. All randomness is named by the step under the run key, so a resumed run replays it.

The loss of a document is the mean cross entropy of its next tokens, its end mark included: every document weighs the same before clipping, whatever its length,
and the loss depends on nothing but the document (PITFALLS 9). Padding carries no loss and is masked from attention.

Ragged text costs what its tokens cost. Padded rows (one document each) are grouped by length, with at most 1/32 of padding for units of one document. Packed rows hold
several documents that do not see each other: attention is block-diagonal and positions start again in each, so a document has the loss and gradient it has alone.
Small narrow micro-batches suit a CPU, where work is proportional to tokens; few wide ones suit a GPU, where a call has a price of its own.

Guarantees: a step whose sample is empty is noised and counted like any other; the realised batch is never divided by; documents of one unit are in one micro-batch, or,
where the unit is above the token budget, in parts that are added up before they are clipped once.

Sources: Abadi et al. 2016, arXiv 1607.00133; micro-batching after Li et al. 2022, arXiv 2110.05679; packing after Krell et al. 2021, arXiv 2107.02027.

Does not cover: several ranks (`train/parallel.py`); packed rows in models with sliding windows or recurrent layers (refused, or yours to know).

Legend: D documents of a micro-batch, B rows, T tokens of the longest row, V vocabulary, N tokens that carry a loss, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any, NamedTuple, final

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional

from discreet.dp import clipping, mechanism, noise, sampling
from discreet.dp.clipping import ClippedSum
from discreet.dp.combine import Combine
from discreet.dp.mechanism import Plan
from discreet.keys import Key
from discreet.model import Base
from discreet.record import Sensitive, Snapshot
from discreet.train import preference
from discreet.train.course import Course
from discreet.train.preference import Document

_CHUNK = 128
"""Rows of logits held at once: 128 rows of a vocabulary of 49,152 are 25 MB."""

_PLAIN_HEADS = {"llama", "mistral", "qwen2", "qwen3", "smollm3"}
"""Model types whose logits are hidden states times the head's weight and nothing more (no bias, scale or cap)."""

Documents = Sequence[Tensor]
"""Token ids of each document, int64 [t] each."""


Units = Sequence[tuple[Document, ...]]
"""The documents of each unit that takes part in a step."""

MicroBatch = Sequence[Sequence[tuple[int, int]]]
"""Rows of (unit, document of that unit): which document stands where."""


class Rows(StrEnum):
    """How documents are laid out in a micro-batch; changes speed and rounding, not the mechanism."""

    PADDED = "padded"
    PACKED = "packed"


class Work(NamedTuple):
    """What a step computed, for the display only: the numbers are private."""

    tokens: int
    padding: int


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateCorpus:
    """A snapshot's documents as token ids, by privacy unit, in an order that the snapshot alone fixes.

    Attributes:
        units: for each unit its documents; sensitive.
        names: the pseudonym of each unit, which names its draws.
    """

    units: Sensitive[tuple[tuple[Document, ...], ...]]
    names: tuple[str, ...]

    @staticmethod
    def of(snapshot: Snapshot, texts: Sequence[str], base: Base, *, max_tokens: int, beta: float | None = None) -> PrivateCorpus:
        """Tokenises the texts of a snapshot.

        Args:
            texts: the document at each position of the snapshot, from 0 (`corpus.texts`).
            max_tokens: >= 2; longer documents are cut.
            beta: of preference tuning, > 0: texts that are pairs become pairs; None for none.

        Raises:
            ValueError: when the snapshot has a position that `texts` has not.
        """
        positions_by_unit = snapshot.units.reveal()
        names = sorted(positions_by_unit)
        if any(not 0 <= position < len(texts) for positions in positions_by_unit.values() for position in positions):
            raise ValueError(f"Expected texts for every position of the snapshot, got {len(texts)}.")
        ids: list[Document] = list(tokenize(texts, base, max_tokens=max_tokens))
        if beta is not None:
            ids = [preference.encode(text, base, max_tokens=max_tokens, beta=beta) or plain for text, plain in zip(texts, ids, strict=True)]
        return PrivateCorpus(units=Sensitive(tuple(tuple(ids[p] for p in positions_by_unit[name]) for name in names)), names=tuple(names))

    def against(self, model: nn.Module) -> PrivateCorpus:
        """Returns the corpus with what the model that training starts from says of each pair, one pair at a time so that it depends on no other."""

        @torch.no_grad()
        def known(document: Document) -> Document:
            if isinstance(document, Tensor):
                return document
            batch = _on(model, preference.laid_out([document]))
            return replace(document, reference=float(preference.scores(_pair_losses(model, batch), batch)))

        units = tuple(tuple(known(document) for document in unit) for unit in self.units.reveal())
        return PrivateCorpus(units=Sensitive(units), names=self.names)


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
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    corpus: PrivateCorpus,
    plan: Plan,
    *,
    run_key: Key,
    step: int,
    token_budget: int,
    rows: Rows = Rows.PADDED,
) -> Work:
    """Takes one step of the plan.

    Args:
        step: from 1; names the step's draws under `run_key`.
        token_budget: padded tokens of a micro-batch, >= 1; changes speed and rounding, not the mechanism.
        rows: one document a row, or several.

    Raises:
        ValueError: when the plan carries something from step to step (`parallel.private_step` takes it along).
    """
    Course.of(plan, step=step - 1)
    units = drawn(corpus, plan, run_key=run_key, step=step)
    batches = arranged(units, token_budget, rows)
    total = summed(model, units, batches, clip_norm=plan.clip_norm, token_budget=token_budget, combine=plan.combine)
    noised = noise.add(total, noise_multiplier=plan.noise_multiplier, key=run_key.stream("noise", step))
    update(model, optimizer, noised.gradients, divisor=plan.expected_batch)
    return work(units, batches)


def arranged(units: Units, token_budget: int, rows: Rows) -> list[MicroBatch]:
    """Lays the documents of the sampled units out in micro-batches; all documents of a unit are in one.

    Args:
        token_budget: largest padded size (rows times longest row) of a micro-batch, >= 1. A single unit above it gets a micro-batch of its own.
    """
    lengths = [[len(document) for document in unit] for unit in units]
    if rows is Rows.PACKED and all(isinstance(document, Tensor) for unit in units for document in unit):
        return _packed(lengths, token_budget)
    return [[[(unit, d)] for unit in group for d in range(len(units[unit]))] for group in sampling.micro_batches(lengths, token_budget)]


def _packed(lengths: Sequence[Sequence[int]], token_budget: int) -> list[MicroBatch]:
    """Places units, longest first, in the first micro-batch whose rows have room for all their documents (first fit decreasing, Johnson 1973)."""
    open_: list[tuple[int, list[list[tuple[int, int]]], list[int]]] = []
    for unit in sorted((u for u, of_unit in enumerate(lengths) if of_unit), key=lambda u: (-max(lengths[u]), u)):
        if not any(_place(lengths, unit, *each, budget=token_budget) for each in open_):
            open_.append((max(lengths[unit]), [], []))
            _place(lengths, unit, *open_[-1], budget=max(token_budget, len(lengths[unit]) * max(lengths[unit])))
    return [rows for _, rows, _ in open_]


def _place(lengths: Sequence[Sequence[int]], unit: int, width: int, rows: list[list[tuple[int, int]]], free: list[int], *, budget: int) -> bool:
    """Puts all documents of a unit into the rows of one micro-batch, or none of them."""
    left, chosen = list(free), []
    for length in lengths[unit]:
        row = next((r for r, room in enumerate(left) if room >= length), len(left))
        if row == len(left):
            left.append(width)
        if len(left) * width > budget:
            return False
        left[row] -= length
        chosen.append(row)
    free[:] = left
    rows.extend([] for _ in range(len(left) - len(rows)))
    for document, row in enumerate(chosen):
        rows[row].append((unit, document))
    return True


def summed(
    model: nn.Module, units: Units, batches: Sequence[MicroBatch], *, clip_norm: float, token_budget: int, combine: Combine = Combine.SUM
) -> ClippedSum:
    """Adds up the clipped gradients of the micro-batches; zero when there are none.

    Args:
        batches: as `arranged` made them for the same budget.
        token_budget: largest padded size of what is computed at once, >= 1; a unit above it is computed in parts, of whole documents, and clipped once.
        combine: whether the documents of a unit are added or averaged.
    """
    total = ClippedSum.zero(model, clip_norm=clip_norm)
    for rows in batches:
        owners = [unit for row in rows for unit, _ in row]
        if padded_size(units, rows) > token_budget and len(owners) > 1 and len(set(owners)) == 1:
            parts = _parts([units[unit][d] for row in rows for unit, d in row], token_budget)
            total += clipping.clipped_unit(model, document_losses, parts, clip_norm=clip_norm, combine=combine)
            continue
        batch = laid_out([[units[unit][d] for unit, d in row] for row in rows])
        documents = batch.get("documents")
        total += clipping.clipped_sum(model, document_losses, batch, owners, clip_norm=clip_norm, documents=documents, combine=combine)
    return total


def _parts(documents: Sequence[Document], token_budget: int) -> Iterator[dict[str, Tensor]]:
    """The documents of one unit in padded parts within the budget; a single document above it is a part."""
    for group in sampling.micro_batches([[len(document)] for document in documents], token_budget):
        yield laid_out([[documents[index]] for index in group])


def work(units: Units, batches: Sequence[MicroBatch]) -> Work:
    """Counts the tokens of the sampled documents, and the padding beside them."""
    tokens = sum(len(document) for unit in units for document in unit)
    return Work(tokens=tokens, padding=sum(padded_size(units, batch) for batch in batches) - tokens)


def padded_size(units: Units, batch: MicroBatch) -> int:
    """Returns rows times the longest row, in tokens."""
    return len(batch) * max(sum(len(units[unit][d]) for unit, d in row) for row in batch)


def public_step(model: nn.Module, optimizer: torch.optim.Optimizer, documents: Documents, *, token_budget: int) -> Work:
    """Takes one step without privacy on public documents: the mean of their losses. Returns what it computed."""
    optimizer.zero_grad(set_to_none=True)
    units = [(document,) for document in documents]
    batches = arranged(units, token_budget, Rows.PADDED)
    for rows in batches:
        losses_D = document_losses(model, laid_out([[documents[unit] for unit, _ in row] for row in rows]))
        (losses_D.sum() / len(documents)).backward()  # type: ignore[no-untyped-call]  # torch declares no types here
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return work(units, batches)


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


def laid_out(rows: Sequence[Sequence[Document]]) -> dict[str, Tensor]:
    """Lays out rows of one or several documents each.

    Returns:
        as `padded` for rows of one document each. Otherwise input_ids, position_ids (from 0 in each document) and documents (0..D-1 in reading order, -1 for
        padding), int64 [B, T] each.
    """
    everything = [document for row in rows for document in row]
    plain = [document for document in everything if isinstance(document, Tensor)]
    if len(plain) < len(everything):
        return preference.laid_out(everything)
    if all(len(row) == 1 for row in rows):
        return padded(plain)
    lengths_by_row = [torch.tensor([len(document) for document in row]) for row in rows]
    first_by_row = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    documents = [torch.arange(len(n)).repeat_interleave(n) + first for n, first in zip(lengths_by_row, first_by_row, strict=False)]
    positions = [torch.cat([torch.arange(length) for length in lengths.tolist()]) for lengths in lengths_by_row]
    return {
        "input_ids": torch.nn.utils.rnn.pad_sequence(
            [torch.cat([document for document in row if isinstance(document, Tensor)]) for row in rows], batch_first=True
        ),
        "position_ids": torch.nn.utils.rnn.pad_sequence(positions, batch_first=True),
        "documents": torch.nn.utils.rnn.pad_sequence(documents, batch_first=True, padding_value=-1),
    }


def document_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Computes each document's mean cross entropy of its next tokens.

    Args:
        batch: as `padded` or `laid_out` makes it.

    Returns:
        float32 [D] (float64 for a float64 model), in nats per token.

    Raises:
        ValueError: when rows are packed for a model whose layers do not all attend to the whole row.
    """
    parameter = next(model.parameters())
    batch = _on(model, batch)
    if "segments" in batch:
        return preference.losses(_pair_losses(model, batch), batch)
    if "documents" in batch:
        document_BT = batch["documents"]
        inputs = {"position_ids": batch["position_ids"], "attention_mask": _block_diagonal(model, document_BT, parameter.dtype)}
    else:
        document_BT = torch.arange(len(batch["input_ids"]), device=parameter.device)[:, None].where(batch["attention_mask"].bool(), -1)
        inputs = {"attention_mask": batch["attention_mask"]}
    is_target_BT = (document_BT[:, 1:] >= 0) & (document_BT[:, 1:] == document_BT[:, :-1])
    losses_N = _token_losses(model, {"input_ids": batch["input_ids"], **inputs}, is_target_BT)
    document_N = document_BT[:, 1:][is_target_BT]
    num_targets_D = torch.bincount(document_N, minlength=int(document_BT.max()) + 1)
    return losses_N.new_zeros(len(num_targets_D)).index_add(0, document_N, losses_N) / num_targets_D


def _on(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _pair_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross entropy of the scored tokens of rows that hold pairs, [N]."""
    mask = _block_diagonal(model, batch["segments"], next(model.parameters()).dtype)
    inputs = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "attention_mask": mask}
    return _token_losses(model, inputs, preference.targets(batch))


def _block_diagonal(model: nn.Module, document_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, T, T]: a token sees its own document up to itself. Additive, because eager attention adds it; sdpa takes either kind."""
    window = getattr(getattr(model, "config", None), "sliding_window", None)
    if window is not None and window < document_BT.shape[1]:
        raise ValueError(f"Expected a model whose layers attend to the whole row, got sliding_window={window}; use padded rows.")
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return torch.zeros(same_BTT.shape, dtype=dtype, device=same_BTT.device).masked_fill(~same_BTT.tril(), torch.finfo(dtype).min)[:, None]


def _token_losses(model: nn.Module, inputs: Mapping[str, Tensor], is_target_BT: Tensor) -> Tensor:
    outer: Any = model
    causal: Any = outer.get_base_model() if isinstance(model, PeftModel) else outer
    head = causal.get_output_embeddings()
    targets_N = inputs["input_ids"][:, 1:][is_target_BT]
    if isinstance(outer, FSDPModule):
        causal = outer  # sharded weights are gathered by the call of the whole model, and there only
    elif _is_plain_and_frozen(causal, head):
        hidden_BTH = causal.get_decoder()(**inputs, use_cache=False).last_hidden_state[:, :-1]
        return _FrozenHeadLoss.apply(hidden_BTH[is_target_BT], head.weight, targets_N)  # type: ignore[no-any-return, no-untyped-call]  # autograd.Function is untyped
    logits_NV = causal(**inputs, use_cache=False).logits[:, :-1][is_target_BT]
    return functional.cross_entropy(logits_NV if logits_NV.dtype is torch.float64 else logits_NV.float(), targets_N, reduction="none")


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
                error_NV[torch.arange(len(error_NV), device=error_NV.device), targets_N[rows]] -= 1.0
                grad_NH[rows] = error_NV @ weight_VH
        ctx.save_for_backward(grad_NH)
        return losses_N

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (grad_NH,) = ctx.saved_tensors
        return grad_NH * grad_outputs[0][:, None], None, None


def drawn(corpus: PrivateCorpus, plan: Plan, *, run_key: Key, step: int) -> list[tuple[Document, ...]]:
    """The documents of each contribution to the step that is clipped as one."""
    units = corpus.units.reveal()
    contributions = mechanism.draw(plan, [len(documents) for documents in units], corpus.names, key=run_key, step=step)
    return [tuple(units[unit][place] for place in places) for unit, places in contributions]


def update(model: nn.Module, optimizer: torch.optim.Optimizer, sums: Mapping[str, Tensor], *, divisor: float) -> None:
    """Divides by the public batch and lets the optimiser take its step."""
    parameters = dict(model.named_parameters())
    for name, sum_ in sums.items():
        parameters[name].grad = (sum_ / divisor).to(parameters[name].dtype)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
