"""Layers 3 and 4 on real records: what an attacker who holds somebody's record learns from the model, and what the model writes of its own accord.

Non-members are people whom a coin of their own withheld from training (`[audit] withheld`): same sources, same consent, same de-identification, so that nothing but training
tells them from the others. The guarantee holds for them trivially; what is measured here touches them inside the house only.

| layer | event that must not be likelier for who is in than the curve allows |
|---|---|
| records: membership | a score of `audit.attacks` above the threshold that outsiders set; AUC and rates by subject (they decide) and by record (reported: records of one person are no independent sample) |
| records: recitation | the end of one of a person's records is (n, p)-discoverable from its beginning |
| records: identifiers | the detectors of `deid` read an identifier of the person in what the model wrote; beside it what the base writes on the same prompts; PASS needs a control whose identifiers were read |

Every event is a membership test, so its rates obey the accounted trade-off curve: a layer FAILs when the lower limit of the rate among insiders exceeds the curve at the upper limit
of the rate among outsiders, both exact. It says PASS otherwise, which means no more than that: with a few dozen outsiders the limits are wide, so these layers can fail a model
and never carry a PASS (`audit.bounds`). Where nobody was withheld they are INCONCLUSIVE.

Every figure here is a function of private records: internal (PITFALLS 41). What leaves is each layer's verdict; a correct mechanism FAILs with probability at most `level`
whatever the records are, so that bit differs between two data sets with at most that probability.

Does not cover: reference models that saw sensitive text: `references` are trained on public or generated text, or are released models themselves (PITFALLS 38).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, final

import numpy as np
from numpy.typing import NDArray
from scipy import special

from discreet.audit import attacks, bounds, extraction, membership
from discreet.audit.bounds import Layer, TradeOff, Verdict
from discreet.audit.extraction import PROBABILITY, SAMPLES, Share
from discreet.keys import Stream

if TYPE_CHECKING:
    from torch import nn

# D records, S subjects, R references, N neighbours.

NAMES = ("records: membership", "records: recitation", "records: identifiers")
_FEWEST = 10
"""Outsiders below which no interval says anything."""


@final
@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Attacked:
    """Records under attack; sensitive, in memory only. One entry a record, [D].

    Attributes:
        texts: as they were frozen (or would have been).
        subjects: whose.
        members: whether the person was trained on.
    """

    texts: Sequence[str]
    subjects: Sequence[str]
    members: NDArray[np.bool_]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What the attacker has.

    Attributes:
        module, reference: the audited model, and the base under it.
        tokenizer: of both.
        references: models that saw neither insiders nor outsiders; LiRA needs two, RMIA one.
        population: public texts that nobody trained on, for RMIA.
        neighbours: edited copies of each text; 0 leaves that attack out.
        prompts: public beginnings that the models are asked to go on from; none leaves the third layer out.
        tokens: how many each answer has, >= 1.
        sees_identifiers: whether identifiers were found in what a control wrote that had learnt some (`extraction.leaks`); without it that layer gives no verdict but FAIL.
        key: randomness of neighbours and answers.
        token_budget: of a micro-batch.
    """

    module: nn.Module
    reference: nn.Module
    tokenizer: Any
    key: Stream
    references: Sequence[nn.Module] = ()
    population: Sequence[str] = ()
    neighbours: int = 0
    prompts: Sequence[str] = ()
    tokens: int = 48
    sees_identifiers: bool = False
    token_budget: int = 512


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What the attack found; internal.

    Attributes:
        layers: one for each of `NAMES`.
        subjects: who was attacked, [S].
        scores: their mean score against the base, [S]; higher means member. Empty where nothing was attacked. `audit.risk.ranked` ranks them.
        members: whether they were in, [S].
        roc: curves of the scores by subject, as `bounds.roc` gives them.
    """

    layers: tuple[Layer, ...]
    subjects: tuple[str, ...] = ()
    scores: NDArray[np.float64]
    members: NDArray[np.bool_]
    roc: Mapping[str, list[tuple[float, float]]]


def attack(attacked: Attacked, means: Means, *, trade_off: TradeOff, level: float) -> Found:
    """Attacks the records.

    Args:
        trade_off: the claim.
        level: probability of a false FAIL, in (0, 0.5], a third for each layer.

    Returns:
        what was found; layers are INCONCLUSIVE where there are fewer than ten people on a side.
    """
    subjects, members_S = _people(attacked)
    counts = {"insiders": int(members_S.sum()), "outsiders": int((~members_S).sum())}
    if min(counts.values()) < _FEWEST:
        layers = tuple(Layer(name=name, verdict=Verdict.INCONCLUSIVE, figures=counts) for name in NAMES)
        return Found(layers=layers, scores=np.zeros(0), members=members_S, roc={})
    share, found = level / 3, scores(attacked, means)
    people = {name: attacks.by_subject(each, attacked.subjects, attacked.members)[0] for name, each in found.items()}
    return Found(
        layers=(
            _membership(attacked, found, people, members_S, trade_off=trade_off, level=share),
            _recitation(attacked, means, subjects, members_S, trade_off=trade_off, level=share),
            _identifiers(attacked, means, subjects, members_S, trade_off=trade_off, level=share),
        ),
        subjects=tuple(subjects),
        scores=people["reference"],
        members=members_S,
        roc={name: bounds.roc(attacks.ranked(each), members_S) for name, each in people.items()},
    )


def scores(attacked: Attacked, means: Means) -> dict[str, NDArray[np.float64]]:
    """Returns every score that the means allow, [D] each; higher means member."""
    texts, budget = attacked.texts, means.token_budget

    def read(module: nn.Module, of: Sequence[str]) -> list[attacks.TokenStatistics]:
        return attacks.token_statistics(module, means.tokenizer, of, token_budget=budget)

    trained = read(means.module, texts)
    found = attacks.score(texts, trained, read(means.reference, texts))
    if means.references:
        mean_D = np.array([attacks.loss(each) for each in trained])
        references_RD = np.array([[attacks.loss(each) for each in read(module, texts)] for module in means.references])
        if len(means.references) > 1:
            found["lira"] = attacks.lira(mean_D, references_RD)
        if means.population:
            own_Z, others_RZ = (
                np.array([attacks.loss(each) for each in read(means.module, means.population)]),
                np.array([[attacks.loss(each) for each in read(module, means.population)] for module in means.references]),
            )
            found["rmia"] = attacks.rmia(mean_D, references_RD, population=own_Z, population_references=others_RZ)
    if means.neighbours:
        edited = [attacks.neighbours(text, count=means.neighbours, key=means.key.fork("neighbours", str(row))) for row, text in enumerate(texts)]
        flat_DN = membership.log_likelihoods(means.module, means.tokenizer, [copy for of_text in edited for copy in of_text], token_budget=budget)
        target_D = np.array([float(each.log_probabilities.sum()) for each in trained])
        found["neighbourhood"] = attacks.neighbourhood(target_D, flat_DN.reshape(len(texts), means.neighbours).T)
    return found


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """How often something happened to insiders and to outsiders, with exact limits, against the curve."""

    inside: Share
    outside: Share
    cap: float

    @property
    def beaten(self) -> bool:
        return self.inside.low > self.cap

    def figures(self) -> dict[str, Any]:
        """Returns the event as JSON."""
        return {"inside": self.inside.figures(), "outside": self.outside.figures(), "cap": self.cap, "beaten": self.beaten}


def event(happened: Sequence[bool], members: NDArray[np.bool_], *, trade_off: TradeOff, level: float) -> Event:
    """Compares an event's rates with the curve: the lower limit inside against T of the upper limit outside, half of the level each.

    Args:
        happened: [S], to independent people.
        members: [S] bool, at least one of each.
        level: probability that a model that keeps the claim is found to beat it, in (0, 0.5].
    """
    happened_S = np.asarray(happened, dtype=np.bool_)
    inside, outside = (Share.of(int(happened_S[side].sum()), int(side.sum()), level=level) for side in (members, ~members))
    high = 1.0 if outside.count == outside.total else float(special.betaincinv(outside.count + 1, outside.total - outside.count, 1 - level / 2))
    return Event(inside=inside, outside=outside, cap=trade_off.tpr(high))


def _membership(
    attacked: Attacked,
    found: Mapping[str, NDArray[np.float64]],
    people: Mapping[str, NDArray[np.float64]],
    members_S: NDArray[np.bool_],
    *,
    trade_off: TradeOff,
    level: float,
) -> Layer:
    each = level / len(found)
    by_subject = {name: attacks.measure(values, members_S, level=each, trade_off=trade_off) for name, values in people.items()}
    by_record = {name: attacks.measure(values, attacked.members, level=each, trade_off=trade_off) for name, values in found.items()}
    beaten = [name for name, measured in by_subject.items() if measured.beaten]
    figures = {
        "insiders": int(members_S.sum()),
        "outsiders": int((~members_S).sum()),
        "beaten": beaten,
        "by_subject": {name: measured.figures() for name, measured in by_subject.items()},
        "by_record": {name: measured.figures() for name, measured in by_record.items()},
    }
    return Layer(name=NAMES[0], verdict=Verdict.FAIL if beaten else Verdict.PASS, figures=figures)


def _recitation(
    attacked: Attacked, means: Means, subjects: Sequence[str], members_S: NDArray[np.bool_], *, trade_off: TradeOff, level: float
) -> Layer:
    """Halves of each record, 50 + 50 tokens at most: the second from the first."""
    lengths = [len(means.tokenizer(text)["input_ids"]) for text in attacked.texts]
    half = min(50, max(2, int(np.median(lengths)) // 2))
    rows = [row for row, length in enumerate(lengths) if length >= 2 * half]

    def recited(module: nn.Module) -> dict[str, bool]:
        said = dict.fromkeys(subjects, False)
        texts = [attacked.texts[row] for row in rows]
        log_p = extraction.suffix_log_probabilities(module, means.tokenizer, texts, prefix=half, suffix=half, token_budget=means.token_budget)
        for row, each in zip(rows, log_p, strict=True):
            said[attacked.subjects[row]] |= extraction.discoverable([each], samples=SAMPLES, probability=PROBABILITY).count == 1
        return said

    said, control = recited(means.module), recited(means.reference)
    found = event([said[each] for each in subjects], members_S, trade_off=trade_off, level=level)
    base = event([control[each] for each in subjects], members_S, trade_off=trade_off, level=level)
    figures = {"tokens": half, "samples": SAMPLES, "probability": PROBABILITY, **found.figures(), "base": base.figures()}
    return Layer(name=NAMES[1], verdict=Verdict.FAIL if found.beaten else Verdict.PASS, figures=figures)


def _identifiers(
    attacked: Attacked, means: Means, subjects: Sequence[str], members_S: NDArray[np.bool_], *, trade_off: TradeOff, level: float
) -> Layer:
    if not means.prompts:
        return Layer(name=NAMES[2], verdict=Verdict.INCONCLUSIVE, figures={"prompts": 0})
    held: dict[str, set[str]] = {subject: set() for subject in subjects}
    for text, subject in zip(attacked.texts, attacked.subjects, strict=True):
        held[subject] |= extraction.identifiers([text])

    def leaked(module: nn.Module) -> list[bool]:
        written = extraction.write(module, means.tokenizer, means.prompts, tokens=means.tokens, key=means.key.fork("answers"))
        values = extraction.identifiers(written)
        return [bool(values & held[subject]) for subject in subjects]

    found, base = (event(leaked(module), members_S, trade_off=trade_off, level=level) for module in (means.module, means.reference))
    figures = {
        "prompts": len(means.prompts),
        "tokens": means.tokens,
        "control_read": means.sees_identifiers,
        **found.figures(),
        "base": base.figures(),
    }
    said = Verdict.FAIL if found.beaten else Verdict.PASS if means.sees_identifiers else Verdict.INCONCLUSIVE
    return Layer(name=NAMES[2], verdict=said, figures=figures)


def _people(attacked: Attacked) -> tuple[list[str], NDArray[np.bool_]]:
    if not attacked.subjects:
        return [], np.zeros(0, dtype=np.bool_)
    _, members_S = attacks.by_subject(attacked.members, attacked.subjects, attacked.members)
    return list(dict.fromkeys(attacked.subjects)), members_S
