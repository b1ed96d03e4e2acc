"""A search over settings of [train], paid for as one: a plan with a search and its candidates -> the best private model.

The number of tries and each try's configuration come from the run key before the first try, so a search that was killed goes on with the same tries. Every try is a whole
private run under a key of its own; the losers' adapters are destroyed as soon as they have lost, and neither they, nor their scores, nor how many there were, leave.

Guarantees: configurations are drawn independently and uniformly where the number of tries is drawn; every candidate once in a fixed grid; a guided search takes exactly the
planned number. A private score is noised before anything looks at it. The order of tries does not decide: of equal scores the earlier wins.

Source: Papernot & Steinke 2022, arXiv 2110.03620; Snoek, Larochelle & Adams 2012 (guided: expected improvement under a Gaussian process).

Does not cover: candidates that change the price (steps, batch, clip norm); hiding from the operator, who sees the clock, how many tries there were.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import numpy as np
import torch
from scipy import stats

from discreet import model as models
from discreet.config import SearchSection, TrainSection
from discreet.dp import csprng, sampling
from discreet.dp.mechanism import Plan
from discreet.dp.selection import Search, Tries
from discreet.errors import NothingLearned
from discreet.keys import Key
from discreet.record import Snapshot
from discreet.store import write_atomically
from discreet.train.loop import Setup, Trained
from discreet.train.parallel import ALONE, Ranks
from discreet.train.step import PrivateCorpus, document_losses, laid_out

_CONTEXT = b"search"
_STATE = "search"
_TRY = "try"
_LENGTH = 0.5
"""Reach of one score in the unit square of candidates."""

Made = TypeVar("Made")
"""What a try gives: `Trained`, or in a rehearsal nothing."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Winner(Generic[Made]):
    """What leaves of a search: the best run, and its settings where they differ from [train]."""

    trained: Made
    chosen: Mapping[str, Any]


def declared(section: SearchSection) -> Search | None:
    """Returns the search that [search] declares, or None."""
    if not section.declared:
        return None
    tries = Tries(section.tries)
    number = float(len(candidates(section))) if tries is Tries.EACH else section.mean
    return Search(
        tries=tries,
        mean=number,
        shape=section.shape if tries is Tries.NEGATIVE_BINOMIAL else 1.0,
        score_epsilon=section.score_epsilon if section.score == "private" else None,
    )


def candidates(section: SearchSection) -> list[dict[str, Any]]:
    """Returns every combination of the declared values, in the order in which they are declared."""
    names = [
        name for name in ("learning_rate", "optimizer", "warmup_steps") if getattr(section, name)
    ]  # none: the one candidate that changes nothing
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(getattr(section, name) for name in names))]


def settings(section: TrainSection, chosen: Mapping[str, Any]) -> TrainSection:
    """Returns [train] with the chosen values in place of its own."""
    return TrainSection.model_validate(section.model_dump() | dict(chosen))


def search(
    plan: Plan,
    section: SearchSection,
    *,
    train: TrainSection,
    run: Callable[[int, TrainSection, Path], Made],
    drop: Callable[[int], None],
    score: Callable[[int, Made], float],
    run_key: Key,
    folder: Path | None,
    ranks: Ranks = ALONE,
) -> Winner[Made]:
    """Runs a paid search from its last finished try.

    Args:
        plan: with the search that was paid for.
        section: the candidates.
        train: what every try has in common.
        run: (number of the try from 0, settings, folder of the adapter) -> one private run, from its last checkpoint; called for each try with a folder of its own, and for the winner once more, which takes no step.
        drop: destroys the checkpoint of a try that has lost.
        score: of a finished try, smaller is better: on public text, or noised.
        run_key: of the whole search: numbers and configurations come from it.
        folder: where adapters and the sealed state lie; the winner's is `adapter`, and no other is left. None for a rehearsal, whose runs write nothing.
        ranks: this process among those that train together; all see the same folder, and rank 0 scores and writes.

    Raises:
        ValueError: when the plan pays for another search than the section declares.
        NothingLearned: when the drawn number of tries is zero (Poisson).
    """
    if plan.search is None or plan.search != declared(section):
        raise ValueError("Expected a plan that pays for the search of [search].")
    options, total = candidates(section), plan.search.number(float(csprng.uniform(run_key.stream("tries"), 1)))
    done, place = _Scores.read(folder, run_key) if folder else _Scores([], []), folder or Path()
    for number in range(len(done.scores), total):
        option = _option(plan.search, number, len(options), _coordinates(options), done, run_key)
        trained = run(number, settings(train, options[option]), place / _TRY)
        scored = torch.tensor([score(number, trained) if ranks.writes else math.nan], dtype=torch.float64)
        done.add(option, float(ranks.of_first(scored)))
        if ranks.writes and folder:
            done.write(folder, run_key)
            for lost in set(range(number + 1)) - {done.best}:
                drop(lost)
            shutil.rmtree(folder / _TRY)
        ranks.wait()
    if total == 0:
        raise NothingLearned("at least one try", remedy="Its number is drawn, and was zero. What was charged stays charged; start another search.")
    chosen = options[done.options[done.best]]
    return Winner(trained=run(done.best, settings(train, chosen), place / "adapter"), chosen=chosen)


def forget(folder: Path) -> None:
    """Destroys what a search kept beside its winner, finished or not. Idempotent."""
    (folder / _STATE).unlink(missing_ok=True)
    shutil.rmtree(folder / _TRY, ignore_errors=True)


def public_score(_: int, trained: Trained) -> float:
    """The last loss on public held-out text; NaN counts as the worst."""
    last = trained.curve[-1][1]
    return last if math.isfinite(last) else math.inf


def private_score(
    plan: Plan, section: SearchSection, snapshot: Snapshot, texts: Sequence[str], setup: Setup, run_key: Key
) -> Callable[[int, Trained], float]:
    """Returns a score over the private units: the sum of each unit's mean loss, cut to the declared bound, noised by Laplace, over the public population.

    A unit moves the sum by at most the bound, so noise of scale bound / score_epsilon is score_epsilon-DP: the Laplace event that the plan counts for each try.
    """
    corpus = PrivateCorpus.of(snapshot, texts, setup.base, max_tokens=setup.model.max_tokens)  # likelihood, whatever the objective

    @torch.no_grad()
    def score(number: int, trained: Trained) -> float:
        module = models.load_adapter(setup.base, trained.adapter).to(setup.run.device)
        total = 0.0
        for name, documents in zip(corpus.names, corpus.units.reveal(), strict=True):
            kept = sampling.capped_range(len(documents), plan.cap, run_key.stream("scored").fork(name))
            loss = float(document_losses(module, laid_out([[documents[place]] for place in kept])).mean())
            total += min(max(loss, 0.0), section.score_bound) if math.isfinite(loss) else section.score_bound
        scale = section.score_bound / section.score_epsilon
        return (total + scale * float(csprng.laplace(run_key.stream("score", number), 1))) / plan.population

    return score


def _option(search_: Search, number: int, count: int, coordinates: np.ndarray[Any, np.dtype[np.float64]], done: _Scores, run_key: Key) -> int:
    """The candidate of a try: by a uniform draw of its own, in order, or by expected improvement."""
    if search_.tries is Tries.EACH:
        return number
    if search_.is_drawn or number == 0:
        return int(float(csprng.uniform(run_key.stream("configuration", number), 1)) * count)
    return _improvement(coordinates, done.options, done.scores)


def _coordinates(options: Sequence[Mapping[str, Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Candidates in the unit cube, one axis a setting, by rank among its values."""
    axes = []
    for name in options[0]:
        values = sorted({str(option[name]): option[name] for option in options}.values(), key=lambda value: (isinstance(value, str), value))
        axes.append([values.index(option[name]) / max(1, len(values) - 1) for option in options])
    return np.array(axes).T


def _improvement(points: np.ndarray[Any, np.dtype[np.float64]], tried: Sequence[int], scores: Sequence[float]) -> int:
    """The candidate with the largest expected improvement under a Gaussian process of squared exponential kernel; an untried one while there is any."""

    def kernel(left: np.ndarray[Any, np.dtype[np.float64]], right: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
        result: np.ndarray[Any, np.dtype[np.float64]] = np.exp(-((left[:, None] - right[None]) ** 2).sum(-1) / (2 * _LENGTH**2))
        return result

    seen, finite = points[list(tried)], np.asarray([score if math.isfinite(score) else np.nan for score in scores])
    values = np.where(np.isnan(finite), np.nanmax(finite) if not np.isnan(finite).all() else 0.0, finite)
    scaled = (values - values.mean()) / (values.std() or 1.0)
    cross, gram = kernel(points, seen), kernel(seen, seen) + 1e-3 * np.eye(len(seen))
    solved = np.linalg.solve(gram, np.column_stack([scaled, cross.T]))
    mean, spread = cross @ solved[:, 0], np.sqrt(np.clip(1 - np.einsum("ij,ji->i", cross, solved[:, 1:]), 1e-12, None))
    gain = (scaled.min() - mean) / spread
    expected = spread * (gain * stats.norm.cdf(gain) + stats.norm.pdf(gain))
    if len(set(tried)) < len(points):
        expected[list(set(tried))] = -np.inf
    return int(expected.argmax())


@dataclass(slots=True)
class _Scores:
    """Finished tries, the option and the score of each; sealed on disk under the run key, because losers' scores do not leave."""

    options: list[int]
    scores: list[float]

    @property
    def best(self) -> int:
        return min(range(len(self.scores)), key=lambda number: (self.scores[number], number))

    def add(self, option: int, score: float) -> None:
        self.options.append(option)
        self.scores.append(score)

    def write(self, folder: Path, run_key: Key) -> None:
        content = json.dumps([self.options, self.scores]).encode()
        write_atomically(folder / _STATE, run_key.derive("search").seal(content, context=_CONTEXT))

    @staticmethod
    def read(folder: Path, run_key: Key) -> _Scores:
        path = folder / _STATE
        return _Scores(*json.loads(run_key.derive("search").open(path.read_bytes(), context=_CONTEXT))) if path.exists() else _Scores([], [])
