"""Choosing among several private runs: how many tries, and what the choice costs -> one event for the whole search.

    random   the number of tries is drawn from a declared distribution before the first; each try is an independent draw of the configuration; the best leaves and nothing
             else does: repeated selection (Papernot & Steinke 2022), a small factor whatever the number of candidates
    each     every candidate of a fixed grid once: composition
    guided   a later configuration may depend on earlier scores (Bayesian search): composition of as many as are planned

A score on public data is part of what a try releases at no price. A score on private data is one Laplace release of each try, and part of its event.

Guarantees: the event is computed from the fields that the drawing reads, as everywhere in a plan.

Source: Papernot & Steinke 2022, "Hyperparameter tuning with Renyi differential privacy", arXiv 2110.03620; Liu & Talwar 2019.

Does not cover: tries of different price; early stopping of a try.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, final

import dp_accounting
from dp_accounting import DpEvent
from scipy import optimize

_MOST_TRIES = 100_000


class Tries(StrEnum):
    """How the number of tries comes about."""

    NEGATIVE_BINOMIAL = "negative_binomial"
    """Drawn: truncated negative binomial (shape 1: geometric, 0: logarithmic); at least one."""

    POISSON = "poisson"
    """Drawn: Poisson; zero is possible, and then nothing comes of the search."""

    EACH = "each"
    """Every candidate once."""

    GUIDED = "guided"
    """As many as planned, each chosen after the scores of those before."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A search as the accountant sees it.

    Attributes:
        tries: how their number comes about.
        mean: expected number of tries where it is drawn; the number itself, a whole one, where it is not. >= 1.
        shape: of the negative binomial, >= 0; 1.0 elsewhere.
        score_epsilon: price of each try's private score (Laplace), > 0; None for a score on public data.
    """

    tries: Tries
    mean: float
    shape: float = 1.0
    score_epsilon: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and self.mean >= 1 and math.isfinite(self.shape) and self.shape >= 0):
            raise ValueError(f"Expected a finite mean={self.mean} >= 1 and a finite shape={self.shape} >= 0.")
        if not self.is_drawn and self.mean != int(self.mean):
            raise ValueError(f"Expected a whole number of tries, got {self.mean}.")
        if self.tries is not Tries.NEGATIVE_BINOMIAL and self.shape != 1.0:
            raise ValueError(f"Expected a shape for the negative binomial only, got {self.shape} with {self.tries}.")
        if self.score_epsilon is not None and not (math.isfinite(self.score_epsilon) and self.score_epsilon > 0):
            raise ValueError(f"Expected a finite score_epsilon={self.score_epsilon} > 0.")

    @property
    def is_drawn(self) -> bool:
        return self.tries in (Tries.NEGATIVE_BINOMIAL, Tries.POISSON)

    def event(self, run: DpEvent) -> DpEvent:
        """Returns what the whole search is, for runs that are each `run`."""
        one = run if self.score_epsilon is None else dp_accounting.ComposedDpEvent([run, dp_accounting.LaplaceDpEvent(1 / self.score_epsilon)])
        if not self.is_drawn:
            return dp_accounting.SelfComposedDpEvent(one, int(self.mean))
        shape = math.inf if self.tries is Tries.POISSON else self.shape
        return dp_accounting.dp_event.RepeatAndSelectDpEvent(one, self.mean, shape)

    def number(self, uniform: float) -> int:
        """Draws the number of tries.

        Args:
            uniform: a secret uniform in [0, 1); drawn once, before the first try.

        Returns:
            >= 1, or for Poisson >= 0; at most 100,000, beyond which lies no mass worth the name.
        """
        if not self.is_drawn:
            return int(self.mean)
        chance, count = (math.exp(-self.mean), 0) if self.tries is Tries.POISSON else (self._first(), 1)
        below = chance
        while below <= uniform and count < _MOST_TRIES:
            count += 1
            chance *= self.mean / count if self.tries is Tries.POISSON else (1 - self._gamma()) * (count - 1 + self.shape) / count
            below += chance
        return count

    def _first(self) -> float:
        """Chance of one try (arXiv 2110.03620, definition 1)."""
        gamma = self._gamma()
        if gamma == 1:
            return 1.0
        if self.shape == 0:
            return (1 - gamma) / math.log(1 / gamma)
        return (1 - gamma) * self.shape / math.expm1(-self.shape * math.log(gamma))

    def _gamma(self) -> float:
        """The parameter at which the distribution has its mean."""
        if self.mean == 1:
            return 1.0

        def mean(log_gamma: float) -> float:
            gamma = math.exp(log_gamma)
            if self.shape == 0:
                return (1 / gamma - 1) / -log_gamma
            return self.shape * (1 / gamma - 1) / -math.expm1(self.shape * log_gamma)

        return math.exp(optimize.brentq(lambda value: mean(value) - self.mean, -200.0, -1e-12, xtol=1e-14))

    def to_json(self) -> dict[str, Any]:
        return {"tries": self.tries.value, "mean": self.mean, "shape": self.shape, "score_epsilon": self.score_epsilon}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Search:
        """Returns the search of `to_json`.

        Raises:
            KeyError, TypeError, ValueError: when a field is missing, unknown or out of range.
        """
        return Search(**{**value, "tries": Tries(value["tries"])})
