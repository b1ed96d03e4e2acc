"""Membership scores: how much more likely the trained model finds a text than the same model without its adapter.

The base model with the adapter switched off is a free and perfectly matched reference: it removes how common the words are, and leaves what training
added. score = log p(text | adapter on) - log p(text | adapter off), summed over tokens in nats; **higher means included**, as everywhere in the audit.

Guarantees: the score of a text does not depend on its batch companions or on padding (beyond float rounding); dropout is off, whatever mode the module was in, and its modes
come back as they were; no gradient is kept. A log-likelihood that is not finite is an error, never a low score (an audit must not pass because it crashed).

`blind` is the check on the audit itself: a bag of words that never sees the model must not tell included from held-out canaries.

Does not cover: scores with shadow models (LiRA, RMIA) and token-level statistics (min-k, zlib); they read the same log-likelihoods (`attacks.py` has them).
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from discreet.audit.bounds import Chance, area_under_curve
from discreet.errors import ConfigInvalid, OperationFailed, RecordInvalid, missing_extra

try:
    import torch
except ImportError as error:
    raise missing_extra("train", "torch") from error

if TYPE_CHECKING:
    from torch import Tensor, nn

# D documents, T tokens of the longest one in a micro-batch, V vocabulary, H hashed words.

_BUCKETS = 1 << 14
_WORD = re.compile(r"\w+")


def scores(
    module: nn.Module, tokenizer: Any, texts: Sequence[str], *, token_budget: int, adapter_off: Callable[[], AbstractContextManager[Any]]
) -> NDArray[np.float64]:
    """Scores each text by how much the adapter raised its log-likelihood.

    Args:
        module: causal language model with its adapter on; called with `input_ids` and `attention_mask`, answers with `.logits` [D, T, V].
        tokenizer: called with one text, answers with `["input_ids"]`: the tokens that training saw.
        texts: of at least two tokens each.
        token_budget: padded tokens in one micro-batch, >= 1; one text is always allowed.
        adapter_off: makes a context in which the adapter is off (`PeftModel.disable_adapter`).

    Returns:
        [D] float64 in nats, in the order of `texts`; higher means included.

    Raises:
        RecordInvalid: when a text has fewer than two tokens.
        OperationFailed: when a log-likelihood is not finite.
    """
    trained_D = log_likelihoods(module, tokenizer, texts, token_budget=token_budget)
    with adapter_off():
        return trained_D - log_likelihoods(module, tokenizer, texts, token_budget=token_budget)


def log_likelihoods(module: nn.Module, tokenizer: Any, texts: Sequence[str], *, token_budget: int) -> NDArray[np.float64]:
    """Returns log p of tokens 2.. of each text given those before, [D] float64 in nats. Args and Raises as `scores`."""
    tokens = [list(map(int, tokenizer(text)["input_ids"])) for text in texts]
    if any(len(ids) < 2 for ids in tokens):
        raise RecordInvalid("texts of at least two tokens", value=f"{sum(len(ids) < 2 for ids in tokens)} shorter")
    result_D = np.empty(len(tokens))
    with evaluating(module):
        for rows in micro_batches([len(ids) for ids in tokens], token_budget=token_budget):
            log_probs = token_log_probabilities(module, [tokens[row] for row in rows])
            result_D[rows] = [float(values.sum()) for values in log_probs]
    if not np.isfinite(result_D).all():
        raise OperationFailed("finite log-likelihoods", value=f"{int((~np.isfinite(result_D)).sum())} that are not", remedy="Training diverged.")
    return result_D


def token_log_probabilities(module: nn.Module, tokens: Sequence[Sequence[int]]) -> list[Tensor]:
    """Returns, for each sequence, log p of its tokens 2.. given those before: float64 tensors of len - 1 entries, on the CPU. Call it inside `evaluating`."""
    ids_DT, mask_DT = pad(module, tokens)
    logits_DTV = module(input_ids=ids_DT, attention_mask=mask_DT).logits[:, :-1].float()
    picked_DT = logits_DTV.gather(-1, ids_DT[:, 1:, None]).squeeze(-1).double() - logits_DTV.logsumexp(-1).double()
    return [picked_DT[row, : len(ids) - 1].cpu() for row, ids in enumerate(tokens)]


def pad(module: nn.Module, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Returns (ids [D, T], mask [D, T]), padded on the right with token 0, which the mask and causality keep from every real position."""
    longest = max(map(len, tokens))
    device = next(module.parameters()).device
    ids_DT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in tokens], dtype=torch.long, device=device)
    mask_DT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in tokens], dtype=torch.long, device=device)
    return ids_DT, mask_DT


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switches dropout and gradients off, and puts every submodule's mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, training in modes:
            part.training = training


def micro_batches(lengths: Sequence[int], *, token_budget: int) -> Iterator[list[int]]:
    """Yields positions grouped by length, so that rows x longest stays within the budget (a single longer text goes alone)."""
    if token_budget < 1:
        raise ConfigInvalid("token_budget >= 1", value=token_budget)
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda position: lengths[position]):
        if batch and (len(batch) + 1) * lengths[row] > token_budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def blind(texts: Sequence[str], included: Sequence[bool]) -> Chance:
    """Tries to tell included from held-out texts by their words alone, without any model; a fair audit leaves it at chance.

    Naive Bayes on hashed words and word pairs, cross-fitted: each half (even and odd positions) is scored by the classifier of the other, and the two AUCs are
    averaged. The two are trained on each other's labels, so they may agree completely: the standard error is that of one half.

    Args:
        texts: of all canaries, in the order they were drawn (exchangeable).
        included: their coins.

    Raises:
        ValueError: when one half has coins of one kind only (fewer than some 20 canaries).
    """
    features_DH, included_D = _bag_of_words(texts), np.asarray(included, dtype=np.bool_)
    even_D = np.arange(len(texts)) % 2 == 0
    halves = [area_under_curve(_naive_bayes(features_DH, included_D, fit=~half_D)[half_D], included_D[half_D]) for half_D in (even_D, ~even_D)]
    return Chance(auc=sum(half.auc for half in halves) / 2, standard_error=max(half.standard_error for half in halves))


def _bag_of_words(texts: Sequence[str]) -> NDArray[np.float32]:
    """[D, H] presence of hashed words and neighbouring pairs."""
    features_DH = np.zeros((len(texts), _BUCKETS), dtype=np.float32)
    for row, text in enumerate(texts):
        words = _WORD.findall(text.lower())
        for feature in [*words, *(f"{left} {right}" for left, right in pairwise(words))]:
            features_DH[row, zlib.crc32(feature.encode()) % _BUCKETS] = 1
    return features_DH


def _naive_bayes(features_DH: NDArray[np.float32], included_D: NDArray[np.bool_], *, fit: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[D] log-odds of a multinomial naive Bayes with add-one smoothing, without the prior (it would shift one half against the other)."""
    log_H = [np.log1p(features_DH[fit & side].sum(0, dtype=np.float64)) for side in (included_D, ~included_D)]
    totals = [np.log(features_DH[fit & side].sum(dtype=np.float64) + _BUCKETS) for side in (included_D, ~included_D)]
    return np.asarray(features_DH @ (log_H[0] - log_H[1]) - features_DH.sum(1) * (totals[0] - totals[1]), dtype=np.float64)
