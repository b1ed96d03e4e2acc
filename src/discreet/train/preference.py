"""Preference tuning: a document that is a pair (prompt, chosen, rejected) -> one loss, clipped with its unit like any other (DPO).

    loss = softplus(-beta (S - S_0)),   S = log p(chosen | prompt) - log p(rejected | prompt),   S_0 the same under the model that training starts from

Both answers of a pair stand in one row, each after its own copy of the prompt; they do not see each other (block-diagonal attention, positions from 0), so a pair is one
document: it has one loss, one gradient, and belongs to one unit, whoever stated the preference. S_0 depends on the pair alone and is computed before the first step.

A text is a pair when it holds both marks, each once and in order; any other text (a canary of the audit) is learnt by likelihood as usual.

Source: Rafailov et al. 2023, "Direct preference optimization", arXiv 2305.18290, equation 7. Does not cover: reward models, models with sliding windows (refused).

Legend: D documents, T tokens of the longest row, N tokens that carry a loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional

from discreet.model import Base

CHOSEN = "\n<|chosen|>\n"
REJECTED = "\n<|rejected|>\n"


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Pair:
    """A pair as token ids.

    Attributes:
        chosen, rejected: prompt and answer with the end mark, int64 [t] each.
        prompt: number of tokens of the prompt, >= 1, the same in both.
        beta: how far the model may go from where it starts, > 0: smaller is farther.
        reference: S_0, in nats.
    """

    chosen: Tensor
    rejected: Tensor
    prompt: int
    beta: float
    reference: float = 0.0

    def __len__(self) -> int:
        return len(self.chosen) + len(self.rejected)


Document = Tensor | Pair


def encode(text: str, base: Base, *, max_tokens: int, beta: float) -> Pair | None:
    """Returns the pair that a text is, or None. Of a long prompt the last half of `max_tokens` is kept; answers are cut to what is left.

    Raises:
        ValueError: when `max_tokens` is below 4.
    """
    if max_tokens < 4:
        raise ValueError(f"Expected max_tokens={max_tokens} >= 4 for a pair.")
    parts = _parts(text)
    if parts is None:
        return None
    end = base.tokenizer.eos_token_id
    prompt, chosen, rejected = (list(base.tokenizer(part)["input_ids"]) if part else [] for part in parts)
    prompt = prompt[-(max_tokens // 2) :] or [end]
    room = max_tokens - len(prompt) - 1
    tokens = [torch.tensor([*prompt, *answer[:room], end]) for answer in (chosen, rejected)]
    return Pair(chosen=tokens[0], rejected=tokens[1], prompt=len(prompt), beta=beta)


def _parts(text: str) -> tuple[str, str, str] | None:
    if text.count(CHOSEN) != 1 or text.count(REJECTED) != 1:
        return None
    prompt, rest = text.split(CHOSEN)
    chosen, mark, rejected = rest.partition(REJECTED)
    return (prompt, chosen, rejected) if mark else None


def laid_out(documents: Sequence[Document]) -> dict[str, Tensor]:
    """Lays out documents, at least one of them a pair, one a row.

    Returns:
        input_ids, position_ids (from 0 in each answer) and segments (0 chosen or plain, 1 rejected, -1 padding), int64 [D, T]; answers, bool [D, T]: tokens that are
        scored; is_pair, bool [D]; beta and reference, float32 [D].
    """
    rows = [[(each, 1)] if isinstance(each, Tensor) else [(each.chosen, each.prompt), (each.rejected, each.prompt)] for each in documents]

    def padded(parts: list[Tensor], value: int = 0) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    return {
        "input_ids": padded([torch.cat([ids for ids, _ in row]) for row in rows]),
        "position_ids": padded([torch.cat([torch.arange(len(ids)) for ids, _ in row]) for row in rows]),
        "segments": padded([torch.cat([torch.full((len(ids),), number) for number, (ids, _) in enumerate(row)]) for row in rows], -1),
        "answers": padded([torch.cat([torch.arange(len(ids)) >= first for ids, first in row]) for row in rows]).bool(),
        "is_pair": torch.tensor([not isinstance(each, Tensor) for each in documents]),
        "beta": torch.tensor([0.0 if isinstance(each, Tensor) else each.beta for each in documents]),
        "reference": torch.tensor([0.0 if isinstance(each, Tensor) else each.reference for each in documents]),
    }


def targets(batch: Mapping[str, Tensor]) -> Tensor:
    """Returns which tokens (from the second) are predicted and scored, bool [D, T - 1]."""
    segments_DT = batch["segments"]
    return (segments_DT[:, 1:] >= 0) & (segments_DT[:, 1:] == segments_DT[:, :-1]) & batch["answers"][:, 1:]


def losses(losses_N: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Makes each document's loss of the losses of its tokens.

    Args:
        losses_N: cross entropy of the tokens of `targets`, in reading order.

    Returns:
        [D]: the DPO loss of a pair, the mean over its tokens of any other document.
    """
    is_pair_D, score_D = batch["is_pair"], scores(losses_N, batch)
    num_targets_D = targets(batch).sum(1).clamp(min=1)
    margin_D = batch["beta"].to(losses_N.dtype) * (score_D - batch["reference"].to(losses_N.dtype))
    return torch.where(is_pair_D, functional.softplus(-margin_D), -score_D / num_targets_D)


def scores(losses_N: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns S of each pair, [D]; of any other document minus the sum of its losses."""
    is_target = targets(batch)
    signed_N = torch.where(batch["segments"][:, 1:][is_target] == 1, losses_N, -losses_N)
    return losses_N.new_zeros(len(batch["is_pair"])).index_add(0, is_target.nonzero()[:, 0], signed_N)
