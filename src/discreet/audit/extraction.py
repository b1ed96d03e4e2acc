"""Recitation: does the model complete a canary's public prefix with its secret?

Three readings of one secret. *Greedy*: the model continues the prefix with its most likely tokens, as many as the secret has; an exact match is verbatim extraction. *Probability*:
log p(secret | prefix) under teacher forcing, from which (n, p)-discoverability follows (Hayes et al. 2024): n samples say the secret at least once with
probability p. *Exposure* (Carlini et al. 2019): the rank of that probability among secrets that nobody planted, in bits; without training it is at least x with probability 2^-x.
`measured` gives all of them for one model, with intervals, planted canaries beside held-out ones: the latter are the control that shows what chance does. `leaks` does the same for
identifiers, in sentences that the control alone has seen.

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
import torch
from numpy.typing import ArrayLike
from scipy import special, stats

from discreet.audit.canaries import Canaries, Canary
from discreet.audit.membership import evaluating, micro_batches, pad, token_log_probabilities
from discreet.deid.detect import detect
from discreet.deid.normalise import fold
from discreet.dp import csprng
from discreet.errors import OperationFailed, RecordInvalid
from discreet.keys import Stream

if TYPE_CHECKING:
    from torch import Tensor, nn


SAMPLES, PROBABILITY = 1000, 0.5
"""A text is extractable when as many samples say it at least once with this probability."""

ANSWERS = 8
"""How often a model goes on from each sentence that ends in an identifier."""

FEWEST_REFERENCES = 20
"""Below this many, no tail is fitted."""


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


def exposure_extrapolated(target: float, references: ArrayLike) -> float:
    """Returns -log2 P[reference >= target] under a skew-normal fitted by moments (Carlini et al. 2019, Sec. 4.3): not capped by the number of references.

    An extrapolation and no test: beyond the references it is as good as the fit. A tail below the smallest float gives a lower limit.

    Args:
        target, references: as `exposure_bits`, R >= 20 references that are not all equal.
    """
    references_R = np.asarray(references, dtype=np.float64)
    if len(references_R) < FEWEST_REFERENCES or not np.isfinite(references_R).all() or np.ptp(references_R) == 0 or math.isnan(target):
        raise ValueError(f"Expected at least {FEWEST_REFERENCES} finite references that differ, got {len(references_R)}.")
    skew = float(np.clip(stats.skew(references_R), -0.99, 0.99))  # a skew-normal has |skew| < 0.9953
    part = abs(skew) ** (2 / 3)
    delta = math.copysign(math.sqrt(math.pi / 2 * part / (part + ((4 - math.pi) / 2) ** (2 / 3))), skew)
    width = float(references_R.std()) / math.sqrt(1 - 2 * delta**2 / math.pi)
    place = float(references_R.mean()) - width * delta * math.sqrt(2 / math.pi)
    shape, z = delta / math.sqrt(1 - delta**2), (target - place) / width
    tail = float(stats.skewnorm.logsf(z, shape))
    if tail == -math.inf:  # below the smallest float: 2 P[N > z] Phi(min(0, shape z)) is at least the tail, so exposure is not overstated
        tail = math.log(2) + float(stats.norm.logsf(z)) + (float(stats.norm.logcdf(shape * z)) if shape < 0 else 0.0)
    return -tail / math.log(2)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A share of `total` with its exact (Clopper-Pearson) confidence interval."""

    count: int
    total: int
    low: float
    high: float

    @staticmethod
    def of(count: int, total: int, *, level: float = 0.05) -> Share:
        """Args: count in [0, total]; total >= 1; level: probability that the interval misses, half on each side."""
        if not 0 <= count <= total or total < 1 or not 0 < level < 1:
            raise ValueError(f"Expected 0 <= count={count} <= total={total}, total >= 1, 0 < level={level} < 1.")
        low = float(special.betaincinv(count, total - count + 1, level / 2)) if count else 0.0
        high = float(special.betaincinv(count + 1, total - count, 1 - level / 2)) if count < total else 1.0
        return Share(count=count, total=total, low=low, high=high)

    def figures(self) -> dict[str, Any]:
        """Returns the share as JSON."""
        return {"count": self.count, "total": self.total, "share": self.count / self.total, "low": self.low, "high": self.high}


def discoverable(log_probabilities: Sequence[float], *, samples: int, probability: float, level: float = 0.05) -> Share:
    """Counts the (n, p)-discoverable texts: those that `samples` draws say at least once with `probability` (Hayes et al. 2024, Def. 3.1).

    Args:
        log_probabilities: of each secret given its prefix, in nats, <= 0 (`Recitation.log_probability`, `suffix_log_probabilities`).
        samples: n >= 1.
        probability: p in (0, 1).
        level: of the confidence interval.
    """
    if samples < 1 or not 0 < probability < 1:
        raise ValueError(f"Expected samples={samples} >= 1 and 0 < probability={probability} < 1.")
    needed = math.log1p(-probability) / samples
    said = [min(math.exp(each), 1.0) for each in log_probabilities]
    return Share.of(sum(share >= 1 or math.log1p(-share) <= needed for share in said), len(said), level=level)


def suffix_log_probabilities(module: nn.Module, tokenizer: Any, texts: Sequence[str], *, prefix: int, suffix: int, token_budget: int) -> list[float]:
    """Returns log p(the `suffix` tokens after the first `prefix` | those) of every text that has as many, in nats: one teacher-forced pass.

    Args:
        prefix, suffix: numbers of tokens, >= 1; 50 and 50 are customary.

    Raises:
        RecordInvalid: when no text is long enough.
    """
    tokens = [list(map(int, tokenizer(text)["input_ids"]))[: prefix + suffix] for text in texts]
    whole = [ids for ids in tokens if len(ids) == prefix + suffix]
    if not whole or min(prefix, suffix) < 1:
        raise RecordInvalid(f"at least one text of {prefix} + {suffix} tokens", value=len(texts))
    found = np.empty(len(whole))
    with evaluating(module):
        for rows in micro_batches([len(ids) for ids in whole], token_budget=token_budget):
            found[rows] = [float(values[prefix - 1 :].sum()) for values in token_log_probabilities(module, [whole[row] for row in rows])]
    return [float(value) for value in found]


def measured(said: Sequence[Recitation], scores: ArrayLike, included: ArrayLike, *, level: float = 0.05) -> dict[str, Any]:
    """Returns what one model gives away of its canaries, as JSON: shares of planted and of held-out ones, and medians of exposure, each with exact limits.

    Args:
        said: recitations of planted and of held-out canaries, at least one of each.
        scores: [m] float of all canaries, as `bounds.curve_test`: planted ones are ranked among those that were held out.
        included: [m] bool.
        level: probability that one interval misses. Held-out scores are taken as they are: the interval of an exposure is over planted canaries alone.

    Returns:
        recited, discoverable: {planted, held_out} as `Share.figures`. exposure: by rank, and extrapolated where at least 20 held-out scores differ, as {median, low, high}
        in bits; a null limit says that there are too few canaries for one. Its counts are planted canaries by whole bits of rank: without memory, half of them have less than one.
    """
    scores_M, included_M = np.asarray(scores, dtype=np.float64), np.asarray(included, dtype=np.bool_)
    planted, held_out = scores_M[included_M], scores_M[~included_M]
    sides = {"planted": [each for each in said if each.included], "held_out": [each for each in said if not each.included]}
    recited = {side: Share.of(sum(each.exact for each in found), len(found), level=level) for side, found in sides.items()}
    likely = {
        side: discoverable([each.log_probability for each in found], samples=SAMPLES, probability=PROBABILITY, level=level)
        for side, found in sides.items()
    }
    bits = [exposure_bits(float(each), held_out) for each in planted]
    counts = np.bincount([int(each) for each in bits], minlength=int(math.log2(1 + len(held_out))) + 1)
    exposures: dict[str, Any] = {"rank": _middle(bits, level=level), "counts": [int(count) for count in counts]}
    if len(held_out) >= FEWEST_REFERENCES and np.ptp(held_out) > 0:
        exposures["extrapolated"] = _middle([exposure_extrapolated(float(each), held_out) for each in planted], level=level)
    return {
        "recited": {side: share.figures() for side, share in recited.items()},
        "discoverable": {"samples": SAMPLES, "probability": PROBABILITY, **{side: share.figures() for side, share in likely.items()}},
        "exposure": exposures,
    }


def _middle(values: Sequence[float], *, level: float) -> dict[str, float | None]:
    """The median with the order statistics that enclose it whatever the distribution is; too few values have no limits."""
    ordered = sorted(values)
    rank = int(stats.binom.ppf(level / 2, len(ordered), 0.5))  # P[Bin < rank] <= level / 2
    low, high = (ordered[rank - 1], ordered[-rank]) if rank else (None, None)
    return {"median": float(np.median(values)), "low": low, "high": high}


def identifiers(texts: Sequence[str]) -> set[str]:
    """Returns the values that the detectors of `deid` read in texts, folded. They are sensitive and stay in memory."""
    return {fold(text[span.start : span.end]) for text in texts for span in detect(text)}


def leaks(module: nn.Module, tokenizer: Any, planted: Canaries, *, key: Stream) -> dict[str, Share]:
    """Lets a model go on from sentences that end in an identifier, and counts those whose identifier the detectors read in what it wrote: planted and held-out ones.

    The same two functions that read real records: a control that was trained on the planted ones shows that they see, one that was not what they see by chance.

    Args:
        planted: of `canaries.plant_identifiers`, at least one of each side.
        key: as `write`.
    """
    split = [_split(tokenizer, each.prefix, each.secret) for each in planted]
    longest, rows = max(len(secret) for _, secret in split), list(planted)
    said: dict[bool, list[bool]] = {True: [], False: []}
    for length in sorted({len(prompt) for prompt, _ in split}):
        alike = [each for each, (prompt, _) in zip(rows, split, strict=True) if len(prompt) == length]
        answers = write(module, tokenizer, [each.prefix for each in alike] * ANSWERS, tokens=longest + 1, key=key)
        for place, each in enumerate(alike):
            said[each.included].append(bool(identifiers(answers[place :: len(alike)]) & identifiers([each.secret])))
    return {side: Share.of(sum(said[included]), len(said[included])) for side, included in (("planted", True), ("held_out", False))}


def write(module: nn.Module, tokenizer: Any, prompts: Sequence[str], *, tokens: int, key: Stream, longest: int | None = None) -> list[str]:
    """Lets a model go on from each prompt by sampling at temperature one, and returns what it wrote, the prompts left out.

    Args:
        prompts: texts of at least one token each; cut to the length of the shortest, so that all go in one batch.
        tokens: how many each answer has, >= 1.
        longest: tokens that are left of a prompt, at most; all when None.
        key: randomness of the draws: the same key and prompts give two models the same uniform numbers.
    """
    ids = [list(map(int, tokenizer(prompt)["input_ids"])) for prompt in prompts]
    if not ids or not all(ids) or tokens < 1:
        raise RecordInvalid("prompts of at least one token, and tokens >= 1", value=tokens)
    length = min(*map(len, ids), longest or len(ids[0]))
    with evaluating(module):
        prompt_DT, mask_DT = pad(module, [each[:length] for each in ids])
        said_DT, past, inputs_DT = prompt_DT[:, :0], None, prompt_DT
        for place in range(tokens):
            answer = module(input_ids=inputs_DT, attention_mask=mask_DT, past_key_values=past, use_cache=True)
            chosen_D1 = _sampled(answer.logits[:, -1], key.fork("token", str(place)))
            past, inputs_DT = answer.past_key_values, chosen_D1
            said_DT, mask_DT = torch.cat([said_DT, chosen_D1], 1), torch.cat([mask_DT, torch.ones_like(chosen_D1)], 1)
    return [str(tokenizer.decode(row)) for row in said_DT.tolist()]


def _sampled(logits_DV: Tensor, key: Stream) -> Tensor:
    """One token a row by the inverse of its distribution function, [D, 1]."""
    reached_DV = logits_DV.double().softmax(-1).cumsum(-1)
    drawn_D1 = csprng.uniform(key, len(logits_DV)).to(reached_DV)[:, None] * reached_DV[:, -1:]
    return (reached_DV < drawn_D1).sum(-1, keepdim=True)


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
