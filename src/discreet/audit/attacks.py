"""Layer 3: membership attacks on real records, and what the accounted curve allows them to reach.

One pass of the model over a text gives the log-probability of every token, and mean and deviation of the log-probability under the model's own distribution; with the same of
a reference (the base without its adapter, or models trained on public, generated or charged data) every score below is arithmetic. **Higher means member**, everywhere.

| score | source |
|---|---|
| loss | mean token log-probability: Yeom et al. 2018 |
| zlib | log p over the compressed length: Carlini et al. 2021 |
| min-k | mean of the lowest fifth of the token log-probabilities: Shi et al. 2024 |
| min-k++ | the same of (log p - mu_t) / sigma_t over the vocabulary: Zhang et al. 2024 |
| reference | log p - log p of the reference: Carlini et al. 2021, with the adapter off as a reference that is free and perfectly matched |
| error zone | upward over downward shifts against the reference, where its guess is wrong: 2026, arXiv 2601.12104; without a downward shift +inf, never 0 |
| lira | Carlini et al. 2022, offline variant |
| rmia | Zarifzadeh et al. 2024, offline |
| neighbourhood | log p against that of lightly edited copies: Mattern et al. 2023 |
| gradient | white box: how far the weights went along the text's own gradient at the public start (Nasr et al. 2023), the shares of others taken out by least squares |

`measure` turns scores into an AUC and true-positive rates at 1 % and 0.1 %, with confidence intervals, beside the largest values that the trade-off curve allows; by record or
by subject (`by_subject`: the mean over a person's records).

Guarantees: a score that is not a number is an error; thresholds come from non-members alone, so that the intervals of the rates are exact (`audit.bounds`). The interval of the
AUC is that of DeLong et al. 1988 in logits, at least as wide as the one at chance.

Does not cover: members and non-members that differ in distribution: any score then "works", which is what the bag-of-words baseline (`membership.blind`) is for.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from discreet.audit.bounds import TradeOff, area_under_curve
from discreet.audit.membership import evaluating, micro_batches, pad
from discreet.dp import accounting
from discreet.errors import ConfigInvalid, OperationFailed, RecordInvalid
from discreet.keys import Stream

if TYPE_CHECKING:
    from torch import Tensor, nn

# D texts, R reference models, Z population texts, T tokens, V vocabulary.

FALSE_POSITIVE_RATES = (0.01, 0.001)
LOWEST_SHARE = 0.2

Float = NDArray[np.float64]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class TokenStatistics:
    """What a model says about the tokens 2.. of one text, [T] each: log p, mean and standard deviation of log p over the vocabulary, and whether it guessed the token."""

    log_probabilities: Float
    means: Float
    deviations: Float
    guessed: NDArray[np.bool_]


def token_statistics(module: nn.Module, tokenizer: Any, texts: Sequence[str], *, token_budget: int) -> list[TokenStatistics]:
    """Reads every text once.

    Args:
        module, tokenizer, texts, token_budget: as `membership.log_likelihoods`.

    Raises:
        RecordInvalid: when a text has fewer than two tokens.
        OperationFailed: when a log-probability is not finite.
    """
    tokens = [list(map(int, tokenizer(text)["input_ids"])) for text in texts]
    if any(len(ids) < 2 for ids in tokens):
        raise RecordInvalid("texts of at least two tokens", value=f"{sum(len(ids) < 2 for ids in tokens)} shorter")
    found: dict[int, TokenStatistics] = {}
    with evaluating(module):
        for rows in micro_batches([len(ids) for ids in tokens], token_budget=token_budget):
            ids_DT, mask_DT = pad(module, [tokens[row] for row in rows])
            logits_DTV = module(input_ids=ids_DT, attention_mask=mask_DT).logits
            for place, row in enumerate(rows):  # one by one: in float64 a batch of a large vocabulary would not fit
                found[row] = _statistics(logits_DTV[place, : len(tokens[row]) - 1].double(), ids_DT[place, 1 : len(tokens[row])])
    if not all(np.isfinite(each.log_probabilities).all() for each in found.values()):
        raise OperationFailed("finite log-probabilities", remedy="Training diverged.")
    return [found[row] for row in range(len(tokens))]


def _statistics(logits_TV: Tensor, ids_T: Tensor) -> TokenStatistics:
    log_TV = logits_TV.log_softmax(-1)
    share_TV = log_TV.exp()
    mean_T = (share_TV * log_TV).sum(-1)
    deviation_T = ((share_TV * log_TV.square()).sum(-1) - mean_T.square()).clamp(min=0).sqrt()
    return TokenStatistics(
        log_probabilities=log_TV.gather(-1, ids_T[:, None]).squeeze(-1).cpu().numpy(),
        means=mean_T.cpu().numpy(),
        deviations=deviation_T.cpu().numpy(),
        guessed=(log_TV.argmax(-1) == ids_T).cpu().numpy(),
    )


def loss(model: TokenStatistics) -> float:
    """Mean token log-probability."""
    return float(model.log_probabilities.mean())


def compressed(model: TokenStatistics, text: str) -> float:
    """log p over the bytes that zlib needs."""
    return float(model.log_probabilities.sum()) / len(zlib.compress(text.encode()))


def min_k(model: TokenStatistics) -> float:
    """Mean of the lowest fifth of the token log-probabilities, of at least one."""
    return _lowest(model.log_probabilities)


def min_k_plus(model: TokenStatistics) -> float:
    """Mean of the lowest fifth of the standardised token log-probabilities; a token whose distribution is a point counts 0."""
    sure = model.deviations < 1e-9
    return _lowest(np.where(sure, 0.0, (model.log_probabilities - model.means) / np.where(sure, 1.0, model.deviations)))


def error_zone(model: TokenStatistics, reference: TokenStatistics) -> float:
    """Sum of upward over sum of downward shifts where the model's guess is wrong; inf without a downward one, 0 where every guess is right."""
    shift_T = (model.log_probabilities - reference.log_probabilities)[~model.guessed]
    up, down = float(shift_T[shift_T > 0].sum()), float(-shift_T[shift_T < 0].sum())
    return up / down if down > 0 else math.inf if len(shift_T) else 0.0


def lira(target: ArrayLike, references: ArrayLike) -> Float:
    """Standardises each text's log-likelihood by reference models that did not see it (offline LiRA); fewer than 64 share one deviation.

    Args:
        target: [D] log-likelihoods under the audited model.
        references: [R, D] under models without the text, R >= 2.
    """
    target_D, references_RD = _pair(target, references, fewest=2)
    deviation_D = references_RD.std(0, ddof=1) if len(references_RD) >= 64 else math.sqrt(float(references_RD.var(0, ddof=1).mean()))
    return np.asarray((target_D - references_RD.mean(0)) / np.maximum(deviation_D, 1e-12))


def rmia(
    target: ArrayLike, references: ArrayLike, *, population: ArrayLike, population_references: ArrayLike, share: float = 0.3, gamma: float = 1.0
) -> Float:
    """Share of the population that a text beats in target over reference likelihood (offline RMIA).

    Args:
        target, references: [D] and [R, D] mean token log-probabilities, R >= 1; the likelihoods are their exponentials.
        population, population_references: [Z] and [R, Z] of texts that nobody trained on.
        share: a of the offline correction p(x) = ((1 + a) mean_out(x) + (1 - a)) / 2, in [0, 1].
        gamma: factor by which to beat them, > 0.
    """
    target_D, references_RD = _pair(target, references, fewest=1)
    population_Z, references_RZ = _pair(population, population_references, fewest=1)
    if not 0 <= share <= 1 or not gamma > 0:
        raise ConfigInvalid("share in [0, 1] and gamma > 0", value=f"{share}, {gamma}")

    def log_ratio(log_p: Float, references_log_p: Float) -> Float:
        return np.asarray(log_p - np.log(((1 + share) * np.exp(references_log_p).mean(0) + 1 - share) / 2))

    ratios_Z = np.sort(log_ratio(population_Z, references_RZ))
    return np.asarray(np.searchsorted(ratios_Z, log_ratio(target_D, references_RD) - math.log(gamma), side="left") / len(ratios_Z))


def neighbours(text: str, *, count: int, key: Stream) -> list[str]:
    """Returns copies of a text with two random neighbouring words exchanged; texts of one word come back as they are."""
    words, made = text.split(" "), []
    for _ in range(count):
        copy = list(words)
        if len(copy) > 1:
            place = int.from_bytes(key.bytes(8)) % (len(copy) - 1)
            copy[place : place + 2] = reversed(copy[place : place + 2])
        made.append(" ".join(copy))
    return made


def neighbourhood(target: ArrayLike, around: ArrayLike) -> Float:
    """Log-likelihood of each text, [D], less the mean of its neighbours, [N, D]."""
    target_D, around_ND = _pair(target, around, fewest=1)
    return np.asarray(target_D - around_ND.mean(0))


def gradient(start: nn.Module, moves: Sequence[Mapping[str, Tensor]], documents: Sequence[Tensor]) -> tuple[Float, Float]:
    """Returns <move, g / |g|> for the gradient g of each document's loss at the start, and <g / |g|, g' / |g'|> of every two documents.

    Where gradients are orthogonal the first is a sufficient statistic of the Gaussian mechanism; elsewhere each holds shares of all others, which `untangled` takes out.

    Args:
        start: the module before the move, its trained parameters requiring grad.
        moves: R differences "before less after" of the trained parameters, by name: of a whole training (`moved`), or of one step that somebody watched.
        documents: token ids as training saw them (`train.step.tokenize`), int64 [t >= 2] each.

    Returns:
        [R, D] and [D, D]. All gradients are held at once: D times the trained parameters in float32.

    Raises:
        OperationFailed: when a gradient is zero or not finite.
    """
    import torch

    from discreet.train import step

    learnt = {name: parameter for name, parameter in start.named_parameters() if parameter.requires_grad}
    slope_DP = torch.empty(len(documents), sum(parameter.numel() for parameter in learnt.values()))
    for row, document in enumerate(documents):
        [loss_] = step.document_losses(start, step.padded([document]))
        slope_DP[row] = _flat(torch.autograd.grad(loss_, list(learnt.values())))
    length_D1 = slope_DP.norm(dim=1, keepdim=True)
    if not bool(((length_D1 > 0) & length_D1.isfinite()).all()):
        raise OperationFailed("documents with a finite gradient that is not zero")
    slope_DP /= length_D1
    move_RP = torch.stack([_flat([move[name] for name in learnt]) for move in moves])
    return (move_RP @ slope_DP.T).double().numpy(), (slope_DP @ slope_DP.T).double().numpy()


def moved(start: nn.Module, trained: nn.Module) -> dict[str, Tensor]:
    """Returns how far training took each trained parameter down: the move of `gradient`."""
    after = dict(trained.named_parameters())
    return {name: parameter.detach() - after[name].detach() for name, parameter in start.named_parameters() if parameter.requires_grad}


def untangled(products: ArrayLike, gram: ArrayLike, *, ridge: float) -> Float:
    """Returns the best linear guess of how much each document was learnt, whatever is learnt on average, from inner products with the gradients of all of them.

    s = K a + K^1/2 z for contributions a, noise z and the Gram matrix K of unit gradients: the guess is (K + ridge I)^-1 (s - m K 1), m the generalised least-squares mean of a
    (best linear unbiased prediction, Robinson 1991). It uses public gradients and the released weights alone, no coin. Text canaries share most of their gradients
    (cosine about one half): the sum of the others drowns an inner product, and this is what is left to see.

    Args:
        products: [D], `gradient`'s.
        gram: [D, D], `gradient`'s.
        ridge: variance of the noise over that of a contribution, both in clip norms: for T steps of sampling probability q and fair coins T sigma^2 / (T q (1 - q) / 2 + (T q / 2)^2); > 0.
    """
    products_D, gram_DD = np.asarray(products, dtype=np.float64), np.asarray(gram, dtype=np.float64)
    if gram_DD.shape != 2 * products_D.shape or not ridge > 0:
        raise ValueError(f"Expected products [D], a Gram matrix [D, D] and ridge={ridge} > 0, got {products_D.shape} and {gram_DD.shape}.")
    solved_D2 = np.linalg.solve(gram_DD + ridge * np.eye(len(products_D)), np.stack([products_D, gram_DD.sum(1)], 1))
    mean = float(solved_D2[:, 0].sum() / solved_D2[:, 1].sum())
    return np.asarray(solved_D2[:, 0] - mean * solved_D2[:, 1])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    import torch

    return torch.cat([tensor.flatten() for tensor in tensors]).float().cpu()


ALONE: Mapping[str, Callable[[TokenStatistics, str], float]] = {
    "loss": lambda model, _: loss(model),
    "zlib": compressed,
    "min-k": lambda model, _: min_k(model),
    "min-k++": lambda model, _: min_k_plus(model),
}
BESIDE: Mapping[str, Callable[[TokenStatistics, TokenStatistics], float]] = {
    "reference": lambda model, reference: float((model.log_probabilities - reference.log_probabilities).sum()),
    "error zone": error_zone,
}


def score(texts: Sequence[str], model: Sequence[TokenStatistics], reference: Sequence[TokenStatistics] | None = None) -> dict[str, Float]:
    """Returns the scores of every row of `ALONE`, and with a reference those of `BESIDE`, [D] each."""
    found = {name: np.array([row(each, text) for each, text in zip(model, texts, strict=True)]) for name, row in ALONE.items()}
    if reference is not None:
        found |= {name: np.array([row(a, b) for a, b in zip(model, reference, strict=True)]) for name, row in BESIDE.items()}
    return found


def by_subject(scores: ArrayLike, subjects: Sequence[str], members: ArrayLike) -> tuple[Float, NDArray[np.bool_]]:
    """Averages the scores of each subject's records.

    Returns:
        scores and membership by subject, in the order of first appearance.

    Raises:
        RecordInvalid: when a subject is both member and non-member.
    """
    scores_D, members_D = np.asarray(scores, dtype=np.float64), np.asarray(members, dtype=np.bool_)
    rows: dict[str, list[int]] = {}
    for row, subject in enumerate(subjects):
        rows.setdefault(subject, []).append(row)
    if any(len(set(members_D[each].tolist())) > 1 for each in rows.values()):
        raise RecordInvalid("subjects that are members or not, with all their records")
    return np.array([scores_D[each].mean() for each in rows.values()]), np.array([members_D[each[0]] for each in rows.values()])


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """True-positive rate at a false-positive rate, with exact limits (half the level each side); `cap` is what the claim allows at the upper limit of the false-positive rate."""

    aimed: float
    tpr: float
    low: float
    high: float
    fpr_high: float
    cap: float | None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """How well one score tells members from non-members; `beaten` says that it does better than the claim allows."""

    auc: float
    auc_low: float
    auc_high: float
    auc_cap: float | None
    rates: tuple[Rate, ...]

    @property
    def beaten(self) -> bool:
        over = [rate.low > rate.cap for rate in self.rates if rate.cap is not None]
        return any(over) or (self.auc_cap is not None and self.auc_low > self.auc_cap)

    def figures(self) -> dict[str, Any]:
        """Returns the measurement as JSON."""
        rates = [{name: getattr(rate, name) for name in rate.__slots__} for rate in self.rates]
        return {"auc": self.auc, "auc_low": self.auc_low, "auc_high": self.auc_high, "auc_cap": self.auc_cap, "rates": rates, "beaten": self.beaten}


def measure(scores: ArrayLike, members: ArrayLike, *, level: float, trade_off: TradeOff | None = None) -> Measured:
    """Measures a score.

    Args:
        scores: [D] float, higher means member; infinite is allowed, NaN is not.
        members: [D] bool, at least one of each.
        level: probability that any of the claim's three caps is found beaten by a model that keeps it; each has a third.
        trade_off: the claim, or None without one.

    Raises:
        ValueError: when a score is NaN, shapes differ or a side is empty.
    """
    ranks_D = ranked(scores)
    area, members_D = area_under_curve(ranks_D, members), np.asarray(members, dtype=np.bool_)
    low, high = _auc_interval(ranks_D, members_D, area.auc, area.standard_error, level / 3)
    return Measured(
        auc=area.auc,
        auc_low=low,
        auc_high=high,
        auc_cap=None if trade_off is None else auc_cap(trade_off),
        rates=tuple(_rate(ranks_D, members_D, fpr, level / 3, trade_off) for fpr in FALSE_POSITIVE_RATES),
    )


def auc_cap(trade_off: TradeOff) -> float:
    """Returns the largest area under the curve that the claim allows: the integral of T, from above (T is concave and rises, so its right ends bound it)."""
    grid = np.concatenate([[0.0], np.logspace(-6, -2, 60), np.linspace(0.015, 1, 198)])
    heights = trade_off.tprs(grid[1:]) if isinstance(trade_off, accounting.TradeOff) else np.array([trade_off.tpr(float(x)) for x in grid[1:]])
    return min(1.0, float((np.diff(grid) * heights).sum()))


def _rate(ranks_D: Float, members_D: NDArray[np.bool_], fpr: float, level: float, trade_off: TradeOff | None) -> Rate:
    outside, inside = np.sort(ranks_D[~members_D])[::-1], ranks_D[members_D]
    place = 1 + math.floor(fpr * len(outside))
    hits, total = int((inside > outside[place - 1]).sum()), len(inside)
    low = float(special.betaincinv(hits, total - hits + 1, level / 2)) if hits else 0.0
    high = float(special.betaincinv(hits + 1, total - hits, 1 - level / 2)) if hits < total else 1.0
    fpr_high = float(special.betaincinv(place, len(outside) - place + 1, 1 - level / 2))
    return Rate(aimed=fpr, tpr=hits / total, low=low, high=high, fpr_high=fpr_high, cap=None if trade_off is None else trade_off.tpr(fpr_high))


def _auc_interval(ranks_D: Float, members_D: NDArray[np.bool_], auc: float, at_chance: float, level: float) -> tuple[float, float]:
    """DeLong's variance of the AUC; in logits where it is not 0 or 1, else the standard error at chance."""
    inside, outside = ranks_D[members_D], ranks_D[~members_D]
    ordered_in, ordered_out = np.sort(inside), np.sort(outside)
    above_in = (np.searchsorted(ordered_out, inside, "left") + np.searchsorted(ordered_out, inside, "right")) / (2 * len(outside))
    above_out = 1 - (np.searchsorted(ordered_in, outside, "left") + np.searchsorted(ordered_in, outside, "right")) / (2 * len(inside))
    variance = above_in.var() / max(1, len(inside) - 1) + above_out.var() / max(1, len(outside) - 1)
    z, error = float(-special.ndtri(level / 2)), max(math.sqrt(float(variance)), at_chance if not 0 < auc < 1 else 0.0)
    if not 0 < auc < 1:
        return max(0.0, auc - z * error), min(1.0, auc + z * error)
    reach = z * error / (auc * (1 - auc))
    return float(special.expit(special.logit(auc) - reach)), float(special.expit(special.logit(auc) + reach))


def ranked(scores: ArrayLike) -> Float:
    """Ranks, ties shared: every figure here depends on the order alone, and an infinite score has a rank like any other."""
    scores_D = np.asarray(scores, dtype=np.float64)
    if scores_D.ndim != 1 or np.isnan(scores_D).any():
        raise ValueError(f"Expected scores of shape [D] without NaN, got shape {scores_D.shape}.")
    return np.asarray(stats.rankdata(scores_D), dtype=np.float64)


def _lowest(values_T: Float) -> float:
    count = max(1, int(len(values_T) * LOWEST_SHARE))
    return float(np.sort(values_T)[:count].mean())


def _pair(target: ArrayLike, references: ArrayLike, *, fewest: int) -> tuple[Float, Float]:
    target_D, references_RD = np.asarray(target, dtype=np.float64), np.asarray(references, dtype=np.float64)
    fits = target_D.ndim == 1 and references_RD.shape[1:] == target_D.shape and len(references_RD) >= fewest
    if not fits or not np.isfinite(target_D).all() or not np.isfinite(references_RD).all():
        raise ValueError(f"Expected finite [D] and [R >= {fewest}, D], got {target_D.shape} and {references_RD.shape}.")
    return target_D, references_RD
