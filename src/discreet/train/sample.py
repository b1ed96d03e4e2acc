"""Texts drawn from a causal language model, token by token: what a released model writes when nobody asks it anything in particular.

Drawing is post-processing: whatever is done with a released model costs no more than its training did. The draws need no secrecy; they come from a stream so that a test can
repeat them.

Source: Yue et al. 2023, "Synthetic text generation with differential privacy", arXiv 2210.14348. Does not cover: prompts of different length.

Legend: B texts drawn together, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from discreet.dp import csprng
from discreet.keys import Stream

_BATCH = 16


@torch.no_grad()
def texts(module: nn.Module, tokenizer: Any, *, count: int, max_tokens: int, temperature: float, prompt: str, stream: Stream) -> list[str]:
    """Draws texts.

    Args:
        count: >= 1.
        max_tokens: tokens of a text after its prompt, >= 1; the end mark ends it earlier.
        temperature: > 0; 1 is the model's own distribution.
        prompt: beginning of every text, part of it; empty: the end mark of the text before.

    Raises:
        ValueError: when a figure is out of range.
    """
    if count < 1 or max_tokens < 1 or not temperature > 0:
        raise ValueError(f"Expected count={count} >= 1, max_tokens={max_tokens} >= 1 and temperature={temperature} > 0.")
    start = tokenizer(prompt)["input_ids"] if prompt else []
    start = start or [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id]
    drawn: list[str] = []
    for first in range(0, count, _BATCH):
        ids = torch.tensor([start] * min(_BATCH, count - first), device=next(module.parameters()).device)
        written = _written(module, ids, tokenizer.eos_token_id, max_tokens=max_tokens, temperature=temperature, stream=stream.fork(first))
        drawn += [(prompt + tokenizer.decode(each, skip_special_tokens=True)).strip() for each in written]
    return drawn


def _written(module: nn.Module, ids: Tensor, end: int, *, max_tokens: int, temperature: float, stream: Stream) -> list[list[int]]:
    """What follows after `ids` [B, t] in each row, up to the end mark."""
    state, said, open_B = None, [], torch.ones(len(ids), dtype=torch.bool, device=ids.device)
    for _ in range(max_tokens):
        answer = module(input_ids=ids, past_key_values=state, use_cache=True)
        state = answer.past_key_values
        sums_BV = torch.softmax(answer.logits[:, -1].double() / temperature, dim=-1).cumsum(-1)
        uniform_B1 = csprng.uniform(stream, len(ids)).to(ids.device)[:, None] * sums_BV[:, -1:]
        ids = torch.searchsorted(sums_BV, uniform_B1, right=True).clamp(max=sums_BV.shape[1] - 1)
        said.append(torch.where(open_B, ids[:, 0], end))
        open_B &= ids[:, 0] != end
        if not bool(open_B.any()):
            break
    return [row[: row.index(end)] if end in row else row for row in torch.stack(said, 1).tolist()]
