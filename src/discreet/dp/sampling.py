"""Who takes part in a step: Poisson sampling by privacy unit, the cap on one unit's documents, and micro-batches that never split a unit.

Each unit takes part in each step independently with the plan's probability; that independence is what the accountant's Poisson event means, so nothing here
shuffles, fills up or skips. An empty sample is a step like any other: it is noised and counted. Positions and sizes are private; only the plan's
probability is public.

Guarantees: inclusion is exact to 2^-53 and independent across units, steps and keys; a unit's choice of documents depends on no other unit; all documents of
one unit land in one micro-batch. Source: Abadi et al. 2016, "Deep Learning with Differential Privacy" (Poisson); units after Chua et al. 2024.

Truncation and sampling by document are these two draws put together, beside their events, in `mechanism.draw`.

Does not cover: sampling without replacement, distributed shards.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from discreet.dp import csprng
from discreet.keys import Stream


def poisson(num_units: int, probability: float, key: Stream) -> torch.Tensor:
    """Draws the units that take part in one step.

    Args:
        num_units: size of the population, >= 0.
        probability: inclusion probability of each unit, in [0, 1].
        key: this step's stream; a different one for every step.

    Returns:
        int64 [k], the sorted positions of the included units in [0, num_units); k may be 0.

    Raises:
        ValueError: when the probability is NaN or outside [0, 1], or `num_units` is negative.
    """
    return torch.nonzero(csprng.bernoulli(key, num_units, probability)).squeeze(1)


def capped(positions: torch.Tensor, cap: int, key: Stream) -> torch.Tensor:
    """Chooses at most `cap` of one unit's documents, uniformly at random.

    Args:
        positions: int64 [n], the documents of one unit.
        cap: largest number kept, >= 1.
        key: a stream forked for this step and this unit, so that the choice is independent of everyone else.

    Returns:
        int64 [min(n, cap)], sorted.

    Raises:
        ValueError: when `cap` is below 1.
    """
    if cap < 1:
        raise ValueError(f"Expected cap={cap} >= 1.")
    if len(positions) <= cap:
        return positions.sort().values
    order = csprng.uniform(key, len(positions)).argsort()
    return positions[order[:cap].to(positions.device)].sort().values


def capped_range(num_documents: int, cap: int, key: Stream) -> list[int]:
    """Chooses at most `cap` of the documents 0 to `num_documents` - 1 of one unit, as `capped` does."""
    return [int(position) for position in capped(torch.arange(num_documents), cap, key).tolist()]


_PADDING = 1 / 32
"""Largest share of padding in a micro-batch of one-document units, relative to its tokens."""

_PADDING_TOKENS = 8
"""Padding that is cheaper than one more micro-batch, whatever its share."""


def micro_batches(lengths_by_unit: Sequence[Sequence[int]], token_budget: int) -> list[list[int]]:
    """Groups the sampled units into micro-batches of similar length whose padded size stays within the budget.

    Units are taken in the order of their longest document. A micro-batch ends where the next unit would break the budget, or would leave more than 1/32 of
    padding beside its tokens: so ragged text costs what its tokens cost, at the price of more, smaller micro-batches. Documents of one unit that differ in length pad
    each other whatever the order (`train.step.packed` has no such limit).

    Args:
        lengths_by_unit: for each sampled unit, the token counts of its documents.
        token_budget: largest padded size (documents times longest document) of a micro-batch, >= 1. A single unit above it gets a micro-batch of its own.

    Returns:
        lists of indices into `lengths_by_unit`, longest documents last; every unit with a document appears exactly once. Empty for an empty sample.

    Raises:
        ValueError: when the budget is below 1.
    """
    if token_budget < 1:
        raise ValueError(f"Expected token_budget={token_budget} >= 1.")
    groups: list[list[int]] = []
    num_documents = num_tokens = 0
    for unit in sorted((u for u, lengths in enumerate(lengths_by_unit) if lengths), key=lambda u: (max(lengths_by_unit[u]), u)):
        lengths = lengths_by_unit[unit]
        padded = (num_documents + len(lengths)) * max(lengths)
        alone = num_documents * max(lengths_by_unit[groups[-1][-1]]) + len(lengths) * max(lengths) if groups else 0
        tokens = num_tokens + sum(lengths)
        is_wasteful = padded - alone > 0 and padded - tokens > max(_PADDING_TOKENS, _PADDING * tokens)
        if not groups or padded > token_budget or is_wasteful:
            groups.append([])
            num_documents = num_tokens = 0
        num_documents += len(lengths)
        num_tokens += sum(lengths)
        groups[-1].append(unit)
    return groups
