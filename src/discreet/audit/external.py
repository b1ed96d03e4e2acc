"""Layer 3 as a tool of its own: any causal language model, members, non-members; no project, no ledger, no log.

The texts were chosen by whoever trained the model and not by our coins, and there is no control that must be caught: so the verdict is FAIL when a score beats what the claim
allows, and INCONCLUSIVE otherwise, never PASS. Without a claim nothing can be beaten: the figures are reported and the verdict is INCONCLUSIVE.

A bag of words that tells members from non-members makes every figure meaningless (they differ in distribution, trained or not): FAIL is then withheld, and the report says so.

The level is shared by all scores; each one's figures come with the claim's caps. A claim (epsilon, delta) is read as the weakest curve that keeps it: min(1, delta + e^eps a,
1 - (1 - delta - a) e^-eps) (Kairouz, Oh & Viswanath 2015); `gaussian` gives the sharper curve
of a mechanism that is known to be Gaussian.

Does not cover: formats of adapters other than this project's and PEFT's LoRA without extras (`model.load_adapter`).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np

from discreet import model
from discreet.audit import attacks, bounds, membership
from discreet.audit.bounds import Verdict
from discreet.errors import ConfigInvalid, SourceEmpty


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LooseTradeOff:
    """The curve of (epsilon, delta)-DP and nothing more."""

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon < math.inf or not 0 < self.delta < 1:
            raise ConfigInvalid("0 <= epsilon < inf and 0 < delta < 1", value=f"{self.epsilon}, {self.delta}")

    @property
    def mu(self) -> float:
        """Parameter of the Gaussian curve through (epsilon, delta), to 1e-6; delta > 0."""
        low, high = 0.0, 1.0
        while bounds.gdp_epsilon(high, delta=self.delta) < self.epsilon:
            high *= 2
        while high - low > 1e-6:
            middle = (low + high) / 2
            low, high = (middle, high) if bounds.gdp_epsilon(middle, delta=self.delta) < self.epsilon else (low, middle)
        return high

    def tpr(self, fpr: float) -> float:
        """Returns the largest true-positive rate at `fpr` in [0, 1]."""
        growth = math.exp(min(self.epsilon, 700.0))
        return max(0.0, min(1.0, self.delta + growth * fpr, 1 - (1 - self.delta - fpr) / growth))


def gaussian(claim: LooseTradeOff) -> bounds.GaussianTradeOff:
    """Returns the curve of the Gaussian mechanism that meets the claim exactly."""
    return bounds.GaussianTradeOff(mu=claim.mu)


def audit(
    folder: str,
    *,
    adapter: Path | None,
    members: Path,
    non_members: Path,
    cache: Path,
    claim: bounds.TradeOff | None = None,
    level: float = 0.05,
    token_budget: int = 2048,
) -> dict[str, Any]:
    """Attacks a model with records that it was trained on and records that it was not.

    Args:
        folder: a causal language model in safetensors, or a name that `model.load_base` knows.
        adapter: folder of an adapter on it; its base is then the reference of two more scores.
        members, non_members: files of one text a line: plain, or JSON objects with "text" and, for figures by person, "subject".
        cache: folder for what a named model is made into.
        claim: the curve that the model is said to keep, or None.
        level: probability of a false FAIL, in (0, 0.5].

    Returns:
        JSON: the verdict, one layer for every score (by record and, with subjects, by subject), the blind baseline, the attack's curves.

    Raises:
        SourceEmpty: when a file holds fewer than 20 texts.
        NotFound, ModelUnsafe: as `model.load_base` and `model.load_adapter`.
    """
    inside, outside = _read(members), _read(non_members)
    texts = [text for text, _ in (*inside, *outside)]
    subjects = [subject for _, subject in (*inside, *outside)]
    is_member = np.array([True] * len(inside) + [False] * len(outside))
    base = model.load_base(folder, cache=cache)
    module = base.module if adapter is None else model.load_adapter(base, adapter)
    found = attacks.token_statistics(module, base.tokenizer, texts, token_budget=token_budget)
    reference = None if adapter is None else attacks.token_statistics(base.module, base.tokenizer, texts, token_budget=token_budget)
    scores = attacks.score(texts, found, reference)
    order = np.argsort(
        [zlib.crc32(text.encode()) for text in texts], kind="stable"
    )  # members and non-members interleaved, as the cross-fitted halves need
    blind = membership.blind([texts[row] for row in order], is_member[order].tolist())
    views = {name: (scored, is_member) for name, scored in scores.items()}
    if all(subjects):
        views |= {f"{name}, by subject": attacks.by_subject(scored, subjects, is_member) for name, scored in scores.items()}
    measured = {name: attacks.measure(scored, labels, level=level / len(views), trade_off=claim) for name, (scored, labels) in views.items()}
    return _document(measured, blind=blind, counts=(len(inside), len(outside)), claimed=claim is not None, level=level) | {
        "roc": {name: bounds.roc(attacks.ranked(scored), labels) for name, (scored, labels) in views.items()},
        "allowed": None if claim is None else [[x, claim.tpr(x)] for x in (0.0, *np.logspace(-4, 0, 60).tolist())],
    }


def _document(measured: dict[str, attacks.Measured], *, blind: bounds.Chance, counts: tuple[int, int], claimed: bool, level: float) -> dict[str, Any]:
    layers = [
        bounds.Layer(name="bag of words", verdict=Verdict.PASS if blind.at_chance else Verdict.INCONCLUSIVE, figures=blind.figures()),
        *(
            bounds.Layer(name=name, verdict=Verdict.FAIL if each.beaten and blind.at_chance else Verdict.INCONCLUSIVE, figures=each.figures())
            for name, each in measured.items()
        ),
    ]
    verdict = Verdict.FAIL if any(layer.verdict is Verdict.FAIL for layer in layers) else Verdict.INCONCLUSIVE
    why = {
        "no claim": not claimed,
        "members and non-members differ in their words alone": not blind.at_chance,
        "no control that must be caught": verdict is not Verdict.FAIL,
    }
    return {
        "verdict": str(verdict),
        "because": [reason for reason, holds in why.items() if holds],
        "members": counts[0],
        "non_members": counts[1],
        "level": level,
        "layers": [layer.to_json() for layer in layers],
    }


def _read(path: Path) -> Sequence[tuple[str, str]]:
    """(text, subject or nothing) of every line that is not empty."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) < _FEWEST:
        raise SourceEmpty(f"a file of at least {_FEWEST} texts, one a line", value=f"{path.name}: {len(lines)}")
    return [_parsed(line, number, path.name) for number, line in enumerate(lines, 1)]


def _parsed(line: str, number: int, name: str) -> tuple[str, str]:
    if not line.lstrip().startswith("{"):
        return line, ""
    try:
        row = json.loads(line)
        return str(row["text"]), str(row.get("subject", ""))
    except (ValueError, KeyError, TypeError):
        raise ConfigInvalid('lines of plain text or {"text": ..., "subject": ...}', value=f"{name}, line {number}") from None


_FEWEST = 20
