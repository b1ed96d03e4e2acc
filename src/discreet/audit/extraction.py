"""Recitation: does the model complete a canary's public prefix with its secret?

Three readings of one secret. *Greedy*: the model continues the prefix with its most likely tokens, as many as the secret has; an exact match is verbatim extraction. *Probability*:
log p(secret | prefix) under teacher forcing, from which (n, p)-discoverability follows (Hayes et al. 2024): the fewest samples after which the secret was
said with probability p. *Exposure* (Carlini et al. 2019): the rank of that probability among secrets that nobody planted, in bits; without training it is at least x with probability 2^-x.

Prefix and secret are tokenised as they are in training, as one text; the prompt is what comes before the secret's first token.

Does not cover: near matches in meaning, and attacks with other prompts than the canary's own prefix. Continuations of canaries are generated text, yet kept
out of `repr` and marked internal, because an included secret is part of an open audit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import ArrayLike

from discreet.audit.canaries import SECRET_BITS, Canaries, Canary, draw_secret
from discreet.audit.membership import evaluating, micro_batches, pad, token_log_probabilities
from discreet.errors import ConfigInvalid, OperationFailed
from discreet.keys import Stream

if TYPE_CHECKING:
    from torch import nn


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Recitation:
    """How well the model recites one canary.

    exact: greedy decoding gave every token of the secret. matched_fraction: share of positions where it did, in [0, 1]. log_probability: of the secret given the
    prefix, in nats. prompt, continuation: internal; what was asked and what came back.
    """

    name: str
    included: bool
    exact: bool
    matched_fraction: float
    log_probability: float
    prompt: str = field(repr=False)
    continuation: str = field(repr=False)

    def samples_needed(self, probability: float = 0.5) -> float:
        """Returns the n of (n, p)-discoverable extraction: samples after which the secret was said with this probability; inf when it never is."""
        if not 0 < probability < 1:
            raise ValueError(f"Expected probability={probability} in (0, 1).")
        said = math.exp(self.log_probability)
        return math.inf if said == 0 else 1.0 if said >= 1 else math.log1p(-probability) / math.log1p(-said)


def recite(module: nn.Module, tokenizer: Any, canaries: Sequence[Canary] | Canaries, *, token_budget: int) -> list[Recitation]:
    """Asks the model for the secret of each canary.

    Args:
        module: causal language model, called as in `audit.membership.scores`.
        tokenizer: called with one text, answers with `["input_ids"]`; `.decode(ids)` gives text.
        canaries: any of them, included or not; the held-out ones say what chance does.
        token_budget: padded tokens in one micro-batch, >= 1.

    Raises:
        OperationFailed: when the tokenizer merges prefix and secret into one token.
    """
    canaries = list(canaries)
    split = [_split(tokenizer, canary.prefix, canary.secret) for canary in canaries]
    results: dict[int, Recitation] = {}
    with evaluating(module):
        for rows in micro_batches([len(prompt) + len(secret) for prompt, secret in split], token_budget=token_budget):
            said = _greedy(module, [split[row][0] for row in rows], [len(split[row][1]) for row in rows])
            forced = _secret_log_probabilities(module, [split[row] for row in rows])
            for row, tokens, log_probability in zip(rows, said, forced, strict=True):
                results[row] = _recitation(canaries[row], split[row][1], tokens, log_probability, tokenizer)
    return [results[row] for row in range(len(canaries))]


def exposure(module: nn.Module, tokenizer: Any, canary: Canary, *, references: int, key: Stream, token_budget: int) -> float:
    """Returns the canary's exposure in bits against random secrets behind the same prefix, at most log2(references + 1).

    Args:
        module: as in `recite`.
        tokenizer: as in `recite`.
        canary: the one to rank.
        references: number of random secrets, in [1, 2^32).
        key: randomness of the references; not the stream of `plant`.
        token_budget: padded tokens in one micro-batch, >= 1.
    """
    if not 1 <= references < 1 << SECRET_BITS:
        raise ConfigInvalid("references in [1, 2^32)", value=references)
    secrets = [canary.secret, *(draw_secret(key) for _ in range(references))]
    split = [_split(tokenizer, canary.prefix, secret) for secret in secrets]
    log_probabilities_R = np.empty(len(split))
    with evaluating(module):
        for rows in micro_batches([len(prompt) + len(secret) for prompt, secret in split], token_budget=token_budget):
            log_probabilities_R[rows] = _secret_log_probabilities(module, [split[row] for row in rows])
    return exposure_bits(float(log_probabilities_R[0]), log_probabilities_R[1:])


def exposure_bits(target: float, references: ArrayLike) -> float:
    """Returns log2(R + 1) - log2(rank of the target among R references), ties to the reference (Carlini et al. 2019, Sec. 4.2).

    Args:
        target: log-probability of the planted secret; higher is more exposed.
        references: [R] log-probabilities of secrets that were never planted, R >= 1.

    Raises:
        ValueError: when there is no reference or a figure is not a number.
    """
    references_R = np.asarray(references, dtype=np.float64)
    if references_R.ndim != 1 or not len(references_R) or np.isnan(references_R).any() or math.isnan(target):
        raise ValueError(f"Expected a target and at least one reference that are numbers, got references of shape {references_R.shape}.")
    return math.log2(len(references_R) + 1) - math.log2(1 + int((references_R >= target).sum()))


def _split(tokenizer: Any, prefix: str, secret: str) -> tuple[list[int], list[int]]:
    """Returns (prompt tokens, secret tokens); their concatenation is how training tokenises prefix and secret."""
    prompt, whole = (list(map(int, tokenizer(text)["input_ids"])) for text in (prefix, f"{prefix} {secret}"))
    if not prompt or whole[: len(prompt)] != prompt or len(whole) == len(prompt):
        raise OperationFailed("a tokenizer that keeps prefix and secret apart", remedy="It must not append an end token or merge over a space.")
    return prompt, whole[len(prompt) :]


def _greedy(module: nn.Module, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> list[list[int]]:
    """Returns the most likely `counts` tokens after each prompt. Recomputes the prefix at each step: secrets are a handful of tokens."""
    sequences = [list(prompt) for prompt in prompts]
    for _ in range(max(counts)):
        ids_DT, mask_DT = pad(module, sequences)
        best_DT = module(input_ids=ids_DT, attention_mask=mask_DT).logits.argmax(-1)
        for row, sequence in enumerate(sequences):
            sequence.append(int(best_DT[row, len(sequence) - 1]))
    return [sequence[len(prompt) : len(prompt) + count] for sequence, prompt, count in zip(sequences, prompts, counts, strict=True)]


def _secret_log_probabilities(module: nn.Module, split: Sequence[tuple[list[int], list[int]]]) -> list[float]:
    log_probs = token_log_probabilities(module, [prompt + secret for prompt, secret in split])
    return [float(values[len(prompt) - 1 :].sum()) for values, (prompt, _) in zip(log_probs, split, strict=True)]


def _recitation(canary: Canary, secret: list[int], said: list[int], log_probability: float, tokenizer: Any) -> Recitation:
    if not math.isfinite(log_probability):
        raise OperationFailed("a finite log-probability of the secret", remedy="Training diverged.")
    matched = sum(left == right for left, right in zip(said, secret, strict=True)) / len(secret)
    return Recitation(
        name=canary.name,
        included=canary.included,
        exact=said == secret,
        matched_fraction=matched,
        log_probability=log_probability,
        prompt=canary.prefix,
        continuation=str(tokenizer.decode(said)),
    )
