"""Layer 0: a rehearsal of the plan on planted gradients, which tells in seconds whether the code that will train is the mechanism that was accounted for.

`rehearse` runs the very step that training runs (`train.parallel.private_step`: draw, micro-batches, clip, noise, update), with the run's own plan, on a probe model whose
documents are gradient canaries: m orthogonal directions, each eight clip norms long, one privacy unit each, half of them held out by fair coins. What comes out of a step is
read coordinate by coordinate, in units of the clip norm. Five readings, and a sixth of a search, each a `bounds.Layer`:

| layer | what it finds |
|---|---|
| canaries | any leak beyond the accounted curve: the likelihood ratio of every canary's coordinates against the PLD curve (white box, every step seen) |
| noise | a noise scale that is 2 % off (1e5 coordinates), memory between neighbours |
| reuse | noise of one step that returns in another, whatever their distance |
| clipping | a unit that contributes more than the clip norm, also when its documents are several and the step is accumulated over micro-batches |
| tries | of a search: another number of tries than the accounted one, or one that depends on the scores; settings that are not chosen independently |
| inclusion | another sampling probability; shuffling reported as Poisson (counts that vary too little), units that come together (counts that vary too much) |

Correlated noise is read after it is made independent again: row t of C applied to the releases of the last b steps (`whitened`), which spreads a canary of step t over
the b steps from t on; the reading puts it together again (matched filter). A unit has one turn a round of b steps, and the rehearsal takes whole rounds. Where the clip
norm moves, each step is read in clip norms of its own; its votes are not read, so the canaries' claim is that of the gradient alone.

Everything in the rehearsal is generated, so every figure is public. Its coins, draws and noise come from a key of its own, never from the run's.

Guarantees: a correct mechanism fails with probability at most about `LEVEL` (the inclusion counts use a chi-squared of matched moments; the other tests are exact or safe).
A rehearsal of a plan whose single units hardly show (small sampling probability) says so: "canaries" is then INCONCLUSIVE and decides nothing, the others decide.

Source: Nasr et al. 2023, "Tight auditing of differentially private machine learning" (gradient canaries, likelihood ratios); Tramer et al. 2022, "Debugging differential
privacy"; Chua et al. 2024, "How private are DP-SGD implementations?" (shuffling).

A search is rehearsed apart: `train.search.search` is run over and over with stand-ins for its runs, under keys of the rehearsal, half of the times with scores that get
better and half with scores that get worse; how many tries it took is compared with the law that its event names.

On several ranks every rank rehearses with the same arguments, and each reads the same: the shares, the shards and the noise are those of the run.

Does not cover: the optimiser and the model of the run (post-processing, and gradients whose clipping `dp.clipping` tests).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats
from torch import Tensor, nn

from discreet.audit.bounds import Layer, TradeOff, Verdict, curve_test, noise_layer
from discreet.config import SearchSection, TrainSection
from discreet.dp import accounting, csprng
from discreet.dp.mechanism import Plan, Sampling, event_of
from discreet.dp.selection import Search, Tries
from discreet.errors import NothingLearned
from discreet.keys import Key
from discreet.record import Sensitive
from discreet.train import parallel, step
from discreet.train import search as searching
from discreet.train.course import Course
from discreet.train.parallel import ALONE, Ranks
from discreet.train.preference import Document
from discreet.train.step import PrivateCorpus, Rows

# M canaries, N of them included, T steps, K idle coordinates.

LEVEL = 0.001
"""Probability that the rehearsal of a correct mechanism fails."""
CANARIES = 2000
STEPS = 200
"""Steps rehearsed at most: the first of the plan; the claim is that of as many."""
SEARCHES = 200
"""Rehearsed searches at most; fewer where they are long, for `_TRIES` in all."""
COORDINATES = 100_000
FALSE_POSITIVE_RATE = 0.05

_LENGTH = 8.0
"""Clip norms that a canary's gradient is long: clipping at twice the norm, or not at all, shows."""
_TOLERANCE = 1e-5
_SHORTFALL = 1e-3
"""Clipping rounds down by some parts in a million; a canary that falls short by more was not clipped to the norm."""
_FEWEST_IDLE = 400
_CHECKED_STEPS = 8
_TRIES = 4000
_NO_SEARCH = SearchSection()

Float = NDArray[np.float64]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsal:
    """What the rehearsed steps did; generated, hence public.

    Attributes:
        seen_TM: released contribution along each canary's direction, in clip norms; T steps, or rounds where units take turns.
        included_M: the coins.
        idle_TK: released coordinates that no canary reaches, in clip norms, made independent: noise alone.
        counts_N: how often each included canary was drawn.
        sizes_T: how many were drawn in each step, or round.
        norms: norm of every contribution of the steps that were looked into, in clip norms.
    """

    seen_TM: Float
    included_M: NDArray[np.bool_]
    idle_TK: Float
    counts_N: NDArray[np.int64]
    sizes_T: NDArray[np.int64]
    norms: Float


def layers(
    plan: Plan,
    *,
    key: Key,
    level: float = LEVEL,
    section: SearchSection = _NO_SEARCH,
    ranks: Ranks = ALONE,
    device: str = "cpu",
    is_sharded: bool = False,
) -> list[Layer]:
    """Rehearses a plan and reads the result.

    Args:
        plan: what will be trained.
        key: randomness of the rehearsal; not the run key.
        level: probability of a false alarm, in (0, 0.5], shared by the readings that chance enters: all but the clipping.
        section: the candidates of the search that the plan pays for.
        ranks, device, is_sharded: how the run will be trained.
    """
    done, each = rehearse(plan, key=key, ranks=ranks, device=device, is_sharded=is_sharded), level / (5 if plan.search else 4)
    rounds = len(done.sizes_T)
    claim = accounting.trade_off(event_of(sampling_probability=plan.sampling_probability, noise_multiplier=plan.noise_multiplier, steps=rounds))
    return [
        canary_layer(
            done.seen_TM,
            done.included_M,
            trade_off=claim,
            sampling_probability=plan.sampling_probability,
            noise_multiplier=plan.noise_multiplier,
            level=each,
        ),
        noise_layer(done.idle_TK, scale=plan.noise_multiplier, level=each),
        reuse_layer(done.idle_TK, scale=plan.noise_multiplier, level=each),
        clip_layer(done.norms, clip_norm=1.0),
        inclusion_layer(done.counts_N, done.sizes_T, probability=plan.sampling_probability, level=each),
        *([tries_layer(*rehearse_search(plan, section, key=key.derive("search")), search=plan.search, level=each)] if plan.search else []),
    ]


def rehearse(plan: Plan, *, key: Key, ranks: Ranks = ALONE, device: str = "cpu", is_sharded: bool = False) -> Rehearsal:
    """Takes the plan's first steps on the probe, at most `STEPS`, by the function that training calls."""
    num_bands = max(1, len(plan.bands))
    num_canaries, num_steps = min(CANARIES, 2 * plan.population), max(1, min(STEPS, plan.steps) // num_bands) * num_bands
    included_M = csprng.bernoulli(key.stream("coins"), num_canaries, 0.5).numpy()
    planted = np.flatnonzero(included_M)[: plan.population]
    included_M[planted[-1] + 1 :] = False
    corpus = _corpus(planted, plan)
    probe: Any = _Probe(num_canaries, idle=max(_FEWEST_IDLE, -(-COORDINATES // num_steps)), pull=2 * _LENGTH * plan.clip_norm).to(device)
    if is_sharded:
        parallel.sharded(probe, device=device)
    optimizer = torch.optim.SGD(probe.parameters(), lr=plan.expected_batch / plan.clip_norm)
    budget = max(2, 2 * math.ceil(plan.sampling_probability * len(planted) / 2))
    run, seen, idle, norms = key.derive("run"), [], [], list[float]()
    counts_M, sizes = np.zeros(num_canaries, dtype=np.int64), []
    turn_M, course = np.zeros(num_canaries, dtype=np.int64), Course.of(plan)
    for number in range(1, num_steps + 1):
        drawn = step.drawn(corpus, plan, run_key=run, step=number)
        if drawn and number <= _CHECKED_STEPS:
            norms += _norms(probe, drawn, plan, budget, ranks)
        scale = plan.clip_norm / course.clip_norm
        parallel.private_step(
            probe, optimizer, corpus, plan, run_key=run, step=number, token_budget=budget, rows=Rows.PADDED, ranks=ranks, course=course
        )
        parallel.resharded(probe)
        who = [_position(documents[0]) for documents in drawn]
        np.add.at(counts_M, who, 1)
        turn_M[who] = (number - 1) % num_bands
        sizes.append(len(drawn))
        seen.append(scale * _read(probe.canaries.weight)[1:])
        idle.append(-scale * _read(probe.idle.weight))
        probe.reset()
    column = plan.bands or (1.0,)
    return Rehearsal(
        seen_TM=_rounds(whitened(np.array(seen), column), column, turn_M),
        included_M=included_M,
        idle_TK=whitened(np.array(idle), column),
        counts_N=counts_M[planted],
        sizes_T=np.array(sizes).reshape(-1, num_bands).sum(1),
        norms=np.array(norms),
    )


def whitened(released_TK: ArrayLike, column: Sequence[float]) -> Float:
    """Applies the strategy C to what every step released, so that its noise is the independent draws again.

    Args:
        released_TK: [T, K], in clip norms.
        column: coefficients of C (`dp.banded`); (1,) changes nothing.
    """
    released = np.asarray(released_TK, dtype=np.float64)
    result = column[0] * released
    for band in range(1, min(len(column), len(released))):
        result[band:] += column[band] * released[:-band]
    return result


def _rounds(white_TM: Float, column: Sequence[float], turn_M: NDArray[np.int64]) -> Float:
    """What a canary shows in each of its turns, over the steps that it is spread on; those whose turn nobody saw are read in the first group's turns."""
    if len(column) == 1:
        return white_TM
    num_steps, num_bands = len(white_TM), len(column)
    found = np.zeros((num_steps // num_bands, white_TM.shape[1]))
    for turn in range(num_bands):
        mine = turn_M == turn
        for round_, first in enumerate(range(turn, num_steps, num_bands)):
            part = np.asarray(column[: num_steps - first])
            found[round_, mine] = part @ white_TM[first : first + num_bands, mine] / np.sum(part**2)
    return found


def rehearse_search(plan: Plan, section: SearchSection, *, key: Key) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Searches over and over with runs that do nothing.

    Returns:
        tries of each search; the candidate of each try of all of them; number of candidates.
    """
    if plan.search is None:
        raise ValueError("Expected a plan that pays for a search.")
    options = searching.candidates(section)
    counts, chosen = [], list[int]()
    for number in range(max(20, min(SEARCHES, int(_TRIES / plan.search.mean))) if plan.search.is_drawn else 2):
        tries = _Tries(options, better=number % 2 == 0)
        with suppress(NothingLearned):  # no try, where that was drawn
            searching.search(
                plan,
                section,
                train=TrainSection(),
                run=tries.run,
                drop=lambda _: None,
                score=tries.score,
                run_key=key.derive("search", number),
                folder=None,
            )
        counts.append(len(tries.scored))
        chosen += tries.scored
    return np.array(counts), np.array(chosen, dtype=np.int64), len(options)


def tries_layer(counts: ArrayLike, chosen: ArrayLike, num_options: int, *, search: Search, level: float) -> Layer:
    """Compares how often searches tried, and what, with the law that is accounted for (Dvoretzky-Kiefer-Wolfowitz: safe at every number); half of the level each.

    Args:
        counts: [S] int, tries of each search.
        chosen: [N] int, the candidate of each try, from 0 to num_options - 1.
        level: probability of a false alarm, in (0, 0.5].
    """
    counts_S, chosen_N = np.asarray(counts), np.asarray(chosen)
    law = _law(search)
    gaps = {"tries": float(np.abs([np.mean(counts_S <= most) - law(most) for most in range(int(counts_S.max()) + 1)]).max())}
    allowed = {"tries": math.sqrt(math.log(4 / level) / (2 * len(counts_S))) if search.is_drawn else 1e-9}
    if search.is_drawn and len(chosen_N):
        shares = [np.mean(chosen_N <= option) - (option + 1) / num_options for option in range(num_options)]
        gaps["settings"], allowed["settings"] = float(np.abs(shares).max()), math.sqrt(math.log(4 / level) / (2 * len(chosen_N)))
    figures = {"searches": len(counts_S), "mean_tries": float(counts_S.mean())}
    figures |= {f"{name}_gap": gap for name, gap in gaps.items()} | {f"{name}_allowed": gap for name, gap in allowed.items()}
    holds = all(gap <= allowed[name] for name, gap in gaps.items())
    return Layer(name="mechanism: tries", verdict=Verdict.PASS if holds else Verdict.FAIL, figures=figures)


def _law(search: Search) -> Callable[[int], float]:
    """The distribution function of the number of tries that the event of a search is about (arXiv 2110.03620, definition 1), by other means than its drawing."""
    mean, shape = search.mean, search.shape
    if not search.is_drawn:
        return lambda most: float(most >= mean)
    if search.tries is Tries.POISSON:
        return lambda most: float(stats.poisson.cdf(most, mean))
    if mean == 1:
        return lambda most: float(most >= 1)
    if shape == 0:
        failure = optimize.brentq(lambda p: stats.logser.mean(p) - mean, 1e-12, 1 - 1e-12)
        return lambda most: float(stats.logser.cdf(most, failure))
    gamma = optimize.brentq(lambda g: stats.nbinom.mean(shape, g) / stats.nbinom.sf(0, shape, g) - mean, 1e-9, 1 - 1e-9)
    none = float(stats.nbinom.pmf(0, shape, gamma))
    return lambda most: max(0.0, float(stats.nbinom.cdf(most, shape, gamma)) - none) / (1 - none)


def canary_layer(
    seen_TM: ArrayLike, included: ArrayLike, *, trade_off: TradeOff, sampling_probability: float, noise_multiplier: float, level: float
) -> Layer:
    """Tests the released coordinates against the accounted curve, by the likelihood ratio of "drawn with probability q at each step" against "never".

    Args:
        seen_TM: [T, M] released contributions in clip norms.
        included: [M] bool, independent fair coins.
        trade_off: the claim for T steps.
        sampling_probability, noise_multiplier: of the plan, in (0, 1] and > 0.
        level: probability of a false FAIL, in (0, 0.5].

    Returns:
        FAIL when the curve is beaten; INCONCLUSIVE when twice the claimed effect would not have been found; else PASS.
    """
    drift_TM = (2 * np.asarray(seen_TM, dtype=np.float64) - 1) / (2 * noise_multiplier**2)
    with np.errstate(divide="ignore"):  # log(0) at q = 1: never drawn is impossible
        scores_M = np.logaddexp(np.log1p(-sampling_probability), math.log(sampling_probability) + drift_TM).sum(0)
    found = curve_test(scores_M, included, trade_off=trade_off, fpr=FALSE_POSITIVE_RATE, level=level)
    sees = found.detectable <= 2 * found.claimed
    said = Verdict.FAIL if found.rejected else Verdict.PASS if sees else Verdict.INCONCLUSIVE
    return Layer(name="mechanism: canaries", verdict=said, figures=found.figures())


def reuse_layer(noise_TK: ArrayLike, *, scale: float, level: float) -> Layer:
    """Compares the noise of every two steps: independent draws have a product that is near zero, a draw that returned has one near K.

    Args:
        noise_TK: [T, K] coordinates of noise alone, K >= 100.
        scale: planned standard deviation, > 0.
        level: probability of a false alarm, in (0, 0.5]: Chernoff's bound for sums of products of normals, times the number of pairs and signs.
    """
    noise = np.asarray(noise_TK, dtype=np.float64) / scale
    if noise.ndim != 2 or noise.shape[1] < 100 or not np.isfinite(noise).all():
        raise ValueError(f"Expected finite noise of [T, K >= 100], got shape {noise.shape}.")
    num_steps, k = noise.shape
    pairs = num_steps * (num_steps - 1)
    gram_TT = noise @ noise.T
    largest = float(np.abs(gram_TT[~np.eye(num_steps, dtype=np.bool_)]).max(initial=0.0))
    log_p = _log_product_tail(largest, k) + math.log(max(1, pairs))
    figures = {"steps": num_steps, "coordinates": k, "largest_correlation": largest / k, "p_value": math.exp(min(0.0, log_p))}
    return Layer(name="mechanism: reuse", verdict=Verdict.PASS if log_p > math.log(level) else Verdict.FAIL, figures=figures)


def clip_layer(norms: ArrayLike, *, clip_norm: float) -> Layer:
    """Says whether every contribution is within the clip norm, to 1e-5; canaries are longer, so each must also reach it (to 1e-3).

    Args:
        norms: [n] norms of the contributions of single units; with none, nothing was seen (INCONCLUSIVE).
        clip_norm: > 0.
    """
    norms_N = np.asarray(norms, dtype=np.float64)
    if not len(norms_N):
        return Layer(name="mechanism: clipping", verdict=Verdict.INCONCLUSIVE, figures={"contributions": 0})
    low, high = float(norms_N.min()) / clip_norm, float(norms_N.max()) / clip_norm
    holds = low >= 1 - _SHORTFALL and high <= 1 + _TOLERANCE  # NaN holds nowhere
    figures = {"contributions": len(norms_N), "shortest": low, "longest": high}
    return Layer(name="mechanism: clipping", verdict=Verdict.PASS if holds else Verdict.FAIL, figures=figures)


def inclusion_layer(counts: ArrayLike, sizes: ArrayLike, *, probability: float, level: float) -> Layer:
    """Compares who was drawn with independent coins: the total, the spread over units, the spread over steps; a third of the level each.

    Shuffling gives every unit the same count and every step the same size; drawing in groups spreads both too far.

    Args:
        counts: [N] int, how often each unit was drawn in T steps.
        sizes: [T] int, how many units each step drew.
        probability: planned, in (0, 1].
        level: probability of a false alarm, in (0, 0.5].
    """
    counts_N, sizes_T = np.asarray(counts), np.asarray(sizes)
    n, t, total = len(counts_N), len(sizes_T), int(np.sum(sizes))
    if not n or not t or not 0 < probability <= 1:
        raise ValueError(f"Expected units, steps and 0 < probability={probability} <= 1, got {n} and {t}.")
    p_values = {
        "rate_p": _two_sided(float(stats.binom.cdf(total, n * t, probability)), float(stats.binom.sf(total - 1, n * t, probability))),
        "units_p": _dispersion(counts_N, t, probability),
        "steps_p": _dispersion(sizes_T, n, probability),
    }
    figures = {"units": n, "steps": t, "planned": probability, "observed": total / (n * t), **p_values}
    return Layer(name="mechanism: inclusion", verdict=Verdict.PASS if min(p_values.values()) > level / 3 else Verdict.FAIL, figures=figures)


def _dispersion(counts: NDArray[Any], trials: int, probability: float) -> float:
    """Two-sided p-value of sum (c - np)^2 / (npq), whose mean and variance are exact and whose law is taken to be a scaled chi-squared (Satterthwaite 1946)."""
    spread = trials * probability * (1 - probability)
    if spread == 0:
        return 1.0 if bool((counts == trials).all()) else 0.0
    observed = float(np.square(counts - trials * probability).sum() / spread)
    variance = len(counts) * (2 + (1 - 6 * probability * (1 - probability)) / spread)
    scale, freedom = variance / (2 * len(counts)), 2 * len(counts) ** 2 / variance
    return _two_sided(float(stats.chi2.cdf(observed / scale, freedom)), float(stats.chi2.sf(observed / scale, freedom)))


def _two_sided(below: float, above: float) -> float:
    return min(1.0, 2 * min(below, above))


def _log_product_tail(total: float, count: int) -> float:
    """Chernoff: log P[sum of `count` products of independent standard normals >= total] <= -a total - count / 2 log(1 - a^2) at the best a in [0, 1)."""
    if total <= 0:
        return 0.0
    tilt = (math.sqrt(count**2 + 4 * total**2) - count) / (2 * total)
    return -tilt * total - count / 2 * math.log1p(-(tilt**2))


class _Tries:
    """Stands in for the runs of a search: remembers what was tried, and gives scores that get better, or worse, from try to try."""

    def __init__(self, options: Sequence[Mapping[str, Any]], *, better: bool) -> None:
        self._options, self._better = options, better
        self.scored: list[int] = []
        self._last = -1

    def run(self, _number: int, train: TrainSection, _adapter: Path) -> None:
        """Takes no step."""
        self._last = next(at for at, option in enumerate(self._options) if all(getattr(train, name) == value for name, value in option.items()))

    def score(self, number: int, _trained: None) -> float:
        """Counts the try; the winner's second run is not scored."""
        self.scored.append(self._last)
        return float(-number if self._better else number)


class _Output(NamedTuple):
    """What training reads of a model's answer; a tuple, in which sharding finds the tensor."""

    logits: Tensor


class _Probe(nn.Module):
    """A causal model of one weight a canary: the document (i + 1, 0) pulls weight i + 1 up with a force of pull / 2, at zero, and nothing else."""

    def __init__(self, num_canaries: int, *, idle: int, pull: float) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="probe")
        self.canaries = nn.Embedding(num_canaries + 1, 1)
        self.idle = nn.Embedding(idle, 1)
        self.pull = pull
        self.reset()

    def reset(self) -> None:
        with torch.no_grad():
            self.canaries.weight.zero_()
            self.idle.weight.zero_()

    def get_output_embeddings(self) -> None:
        """There is no head apart."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> _Output:  # noqa: ARG002 - what training passes
        pulled_DT1 = self.pull * self.canaries(input_ids)
        return _Output(torch.cat([pulled_DT1, torch.zeros_like(pulled_DT1)], dim=-1))


def _corpus(planted: NDArray[Any], plan: Plan) -> PrivateCorpus:
    """One unit a canary; of two documents where the plan clips them as one, so that a unit broken into records shows."""
    copies = 2 if plan.cap > 1 and plan.sampling is not Sampling.POISSON_DOCUMENTS else 1
    return PrivateCorpus(
        units=Sensitive(tuple((torch.tensor([int(position) + 1, 0]),) * copies for position in planted)),
        names=tuple(f"canary-{position:04d}" for position in planted),
    )


def _position(document: Document) -> int:
    """Which canary a rehearsed document is."""
    return int(cast(Tensor, document)[0]) - 1


def _read(weight: Tensor) -> Float:
    """The one column of a weight that may be sharded; every rank calls it."""
    column: Float = parallel.gathered(weight.detach())[:, 0].double().cpu().numpy()
    return column


def _norms(probe: nn.Module, drawn: step.Units, plan: Plan, budget: int, ranks: Ranks) -> list[float]:
    """Norm of what each canary of a step contributes before noise, in clip norms: canaries are orthogonal, so each is its own coordinate."""
    batches = step.arranged(drawn, budget, Rows.PADDED)
    partial = parallel.partial_sum(probe, drawn, batches, clip_norm=plan.clip_norm, token_budget=budget, combine=plan.combine, ranks=ranks)
    along_M = parallel.whole_sum(partial, ranks)["canaries.weight"][:, 0].abs() / plan.clip_norm
    return [float(along_M[position]) for position in sorted({_position(documents[0]) + 1 for documents in drawn})]
