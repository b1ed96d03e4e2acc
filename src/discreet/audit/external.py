"""Layers 3 and 4 as a tool of their own: any causal language model, members, non-members; no project, no ledger, no log.

The texts were chosen by whoever trained the model and not by our coins, and there is no control that must be caught: so the verdict is FAIL when a score beats what the claim
allows, and INCONCLUSIVE otherwise, never PASS. Without a claim nothing can be beaten: the figures are reported and the verdict is INCONCLUSIVE.

A bag of words, or the length of the texts, that tells members from non-members makes every figure meaningless (they differ in distribution, trained or not): FAIL is then withheld, and the report says so.

Beside the scores two events: the second half of a text is (n, p)-discoverable from the first, and the detectors of `deid` read an identifier of the second half in what the model
writes after the first. Non-members, and with an adapter the base, are their negative controls. Where there are subjects an event counts by subject.

The level is shared by all scores and events; each one's figures come with the claim's caps. Audits that are repeated share one level too: `number`. A claim (epsilon, delta) is read as the weakest curve that keeps it: min(1, delta + e^eps a,
1 - (1 - delta - a) e^-eps) (Kairouz, Oh & Viswanath 2015); `gaussian` gives the sharper curve
of a mechanism that is known to be Gaussian.

Does not cover: formats of adapters other than this project's and PEFT's LoRA without extras (`model.load_adapter`).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray

from discreet import model
from discreet.audit import attacks, bounds, extraction, membership, records
from discreet.audit.bounds import Verdict
from discreet.audit.extraction import PROBABILITY, SAMPLES
from discreet.errors import ConfigInvalid, SourceEmpty
from discreet.keys import Stream

if TYPE_CHECKING:
    from torch import nn

EVENTS = ("extraction", "identifiers")


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
    number: int = 0,
    token_budget: int = 2048,
) -> dict[str, Any]:
    """Attacks a model with records that it was trained on and records that it was not.

    Args:
        folder: a causal language model in safetensors, or a name that `model.load_base` knows.
        adapter: folder of an adapter on it; its base is then the reference of two more scores.
        members, non_members: files of one text a line: plain, or JSON objects with "text" and, for figures by person, "subject".
        cache: folder for what a named model is made into.
        claim: the curve that the model is said to keep, or None.
        level: probability of a false FAIL, in (0, 0.5]: of this audit alone, or with `number` of all audits of this model together.
        number: which audit of this model it is, from 1 (`bounds.spent_level`); 0 when they do not share a level.

    Returns:
        JSON: the verdict, one layer for every score (by record and, with subjects, by subject), the blind baselines (words, length), the attack's curves.

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
    blind = {
        "bag of words": membership.blind([texts[row] for row in order], is_member[order].tolist()),
        "length": bounds.area_under_curve(np.array([len(text) for text in texts], dtype=np.float64), is_member),
    }
    views = {name: (scored, is_member) for name, scored in scores.items()}
    if all(subjects):
        views |= {f"{name}, by subject": attacks.by_subject(scored, subjects, is_member) for name, scored in scores.items()}
    spent = bounds.spent_level(level, number) if number else level
    each = spent / (len(views) + len(EVENTS))
    measured = {name: attacks.measure(scored, labels, level=each, trade_off=claim) for name, (scored, labels) in views.items()}
    models = {"model": module} if adapter is None else {"model": module, "base": base.module}
    events = _events(texts, subjects if all(subjects) else [str(row) for row in range(len(texts))], is_member, models, base.tokenizer, token_budget)
    happened = {
        name: {of: records.event(said, members, trade_off=claim or _ANYTHING, level=each) for of, (said, members) in found_of.items()}
        for name, found_of in events.items()
    }
    return _document(measured, happened, blind=blind, counts=(len(inside), len(outside)), claimed=claim is not None, level=spent) | {
        "roc": {name: bounds.roc(attacks.ranked(scored), labels) for name, (scored, labels) in views.items()},
        "allowed": None if claim is None else [[x, claim.tpr(x)] for x in (0.0, *np.logspace(-4, 0, 60).tolist())],
    }


def _events(
    texts: Sequence[str], subjects: Sequence[str], is_member: NDArray[np.bool_], models: Mapping[str, nn.Module], tokenizer: Any, token_budget: int
) -> dict[str, dict[str, tuple[list[bool], NDArray[np.bool_]]]]:
    """For each event and model whether it happened to each subject, and who is a member; no model where one side's texts are too short for two halves."""
    ids = [list(map(int, tokenizer(text)["input_ids"])) for text in texts]
    half = min(50, max(2, int(np.quantile([len(each) for each in ids], 0.1)) // 2))
    rows = [row for row, each in enumerate(ids) if len(each) >= 2 * half]
    long, whose = [texts[row] for row in rows], [subjects[row] for row in rows]
    found: dict[str, dict[str, tuple[list[bool], NDArray[np.bool_]]]] = {name: {} for name in EVENTS}
    if not 0 < is_member[rows].sum() < len(rows):
        return found
    held = [
        extraction.identifiers([tokenizer.decode(ids[row][half : 3 * half])]) - extraction.identifiers([tokenizer.decode(ids[row][:half])])
        for row in rows
    ]
    for name, module in models.items():
        log_p = extraction.suffix_log_probabilities(module, tokenizer, long, prefix=half, suffix=half, token_budget=token_budget)
        likely = [extraction.discoverable([each], samples=SAMPLES, probability=PROBABILITY).count == 1 for each in log_p]
        written: list[str] = []
        for first in range(0, len(long), _TOGETHER):
            key = Stream(_PUBLIC_KEY).fork(first)
            written += extraction.write(module, tokenizer, long[first : first + _TOGETHER], tokens=2 * half, longest=half, key=key)
        read = [bool(extraction.identifiers([text]) & values) for text, values in zip(written, held, strict=True)]
        for event, happened in zip(EVENTS, (likely, read), strict=True):
            said, members = attacks.by_subject(happened, whose, is_member[rows])
            found[event][name] = ([bool(share > 0) for share in said], members)
    return found


def _document(
    measured: dict[str, attacks.Measured],
    happened: Mapping[str, Mapping[str, records.Event]],
    *,
    blind: Mapping[str, bounds.Chance],
    counts: tuple[int, int],
    claimed: bool,
    level: float,
) -> dict[str, Any]:
    alike = all(each.at_chance for each in blind.values())
    layers = [
        *(
            bounds.Layer(name=name, verdict=Verdict.PASS if each.at_chance else Verdict.INCONCLUSIVE, figures=each.figures())
            for name, each in blind.items()
        ),
        *(
            bounds.Layer(name=name, verdict=Verdict.FAIL if each.beaten and alike else Verdict.INCONCLUSIVE, figures=each.figures())
            for name, each in measured.items()
        ),
        *(
            bounds.Layer(
                name=name,
                verdict=Verdict.FAIL if claimed and found and found["model"].beaten and alike else Verdict.INCONCLUSIVE,
                figures={of: event.figures() for of, event in found.items()},
            )
            for name, found in happened.items()
        ),
    ]
    verdict = Verdict.FAIL if any(layer.verdict is Verdict.FAIL for layer in layers) else Verdict.INCONCLUSIVE
    why = {
        "no claim": not claimed,
        "members and non-members differ without any model": not alike,
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


_FEWEST, _TOGETHER = 20, 32
_ANYTHING = bounds.GaussianTradeOff(mu=64.0)
"""Stands for no claim: allows everything."""
_PUBLIC_KEY = bytes(32)
"""Of what the model is let write; whoever asks again reads the same."""
