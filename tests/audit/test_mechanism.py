"""The rehearsal of a plan: the loop as it is passes, whatever it samples by; how it is broken is in test_mutants.py."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from discreet.audit import mechanism as rehearsal
from discreet.audit.bounds import Layer, Verdict
from discreet.config import SearchSection
from discreet.dp import mechanism, noise
from discreet.dp.mechanism import Adaptive, Plan, Sampling, calibrate
from discreet.dp.selection import Search
from discreet.errors import NothingLearned
from discreet.keys import Key
from discreet.train import search
from discreet.train.search import declared

CANARIES = "mechanism: canaries"
NOISE = "mechanism: noise"
REUSE = "mechanism: reuse"
CLIPPING = "mechanism: clipping"
INCLUSION = "mechanism: inclusion"


@pytest.fixture(scope="module")
def plan() -> Plan:
    return calibrate(epsilon=2.4, delta=1e-4, population=1000, expected_batch=100, steps=20, clip_norm=0.5, unit="patient", cap=2)


def failed(layers: list[Layer]) -> set[str]:
    return {layer.name for layer in layers if layer.verdict is Verdict.FAIL}


def test_the_loop_as_it_is_passes(plan: Plan) -> None:
    layers = rehearsal.layers(plan, key=Key(bytes(32)))
    assert [layer.name for layer in layers] == [CANARIES, NOISE, REUSE, CLIPPING, INCLUSION]
    assert failed(layers) == set()
    assert layers[3].figures["longest"] == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", list(Sampling))
def test_every_sampler_passes(sampling: Sampling) -> None:
    made = calibrate(
        epsilon=2.4,
        delta=1e-4,
        population=600,
        expected_batch=60,
        steps=6,
        clip_norm=0.5,
        unit="patient",
        sampling=sampling,
        cap=1,
        **({"batch_limit": 120} if sampling is Sampling.TRUNCATED_POISSON else {"bands": 2} if sampling is Sampling.CYCLIC_POISSON else {}),
    )
    assert failed(rehearsal.layers(made, key=Key(bytes(32)))) == set()


@pytest.mark.parametrize(
    "more",
    [{"sampling": Sampling.CYCLIC_POISSON, "bands": 4}, {"adaptive": Adaptive(quantile=0.3, rate=0.2, votes_multiplier=5.0)}],
    ids=["bands", "adaptive"],
)
def test_correlated_noise_and_a_moving_clip_norm_pass(plan: Plan, more: dict[str, Any]) -> None:
    made = calibrate(epsilon=2.4, delta=1e-4, population=1000, expected_batch=100, steps=20, clip_norm=0.5, unit="patient", cap=2, **more)
    assert failed(rehearsal.layers(made, key=Key(bytes(32)))) == set()


def test_noise_that_is_not_correlated_as_planned_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    common = {"epsilon": 2.4, "delta": 1e-4, "population": 1000, "expected_batch": 100, "steps": 20, "clip_norm": 0.5, "unit": "patient"}
    made = calibrate(**common, sampling=Sampling.CYCLIC_POISSON, bands=4)
    add, draw = noise.add, mechanism.draw
    with monkeypatch.context() as patch:
        patch.setattr(noise, "add", lambda clipped, *, noise_multiplier, key, memory: add(clipped, noise_multiplier=noise_multiplier, key=key))
        assert NOISE in failed(rehearsal.layers(made, key=Key(bytes(32))))
    everyone = calibrate(**common)
    monkeypatch.setattr(mechanism, "draw", lambda plan, sizes, names, *, key, step: draw(everyone, sizes, names, key=key, step=step))
    assert INCLUSION in failed(rehearsal.layers(made, key=Key(bytes(32))))


def test_inclusion_counts_of_fair_coins_rarely_alarm() -> None:
    random = np.random.default_rng(0)
    alarms = 0
    for _ in range(400):
        drawn_TN = random.random((20, 300)) < 0.05
        layer = rehearsal.inclusion_layer(drawn_TN.sum(0), drawn_TN.sum(1), probability=0.05, level=0.05)
        alarms += layer.verdict is Verdict.FAIL
    assert alarms <= 34  # 20 expected, 3 standard errors more


def test_a_full_batch_is_counted_exactly() -> None:
    whole = rehearsal.inclusion_layer([5] * 30, [30] * 5, probability=1.0, level=0.01)
    one_missing = rehearsal.inclusion_layer([4] + [5] * 29, [29] + [30] * 4, probability=1.0, level=0.01)
    assert (whole.verdict, one_missing.verdict) == (Verdict.PASS, Verdict.FAIL)


def test_no_contribution_seen_is_inconclusive_and_a_broken_one_fails() -> None:
    assert rehearsal.clip_layer([], clip_norm=1.0).verdict is Verdict.INCONCLUSIVE
    assert rehearsal.clip_layer([1.0, float("nan")], clip_norm=1.0).verdict is Verdict.FAIL
    assert rehearsal.clip_layer([1.0, 0.0], clip_norm=1.0).verdict is Verdict.FAIL


SEARCHES = [
    SearchSection(tries="negative_binomial", mean=4.0, learning_rate=(1e-3, 2e-3, 4e-3)),
    SearchSection(tries="negative_binomial", mean=3.0, shape=0.0, learning_rate=(1e-3, 2e-3)),
    SearchSection(tries="negative_binomial", mean=3.0, shape=0.5, learning_rate=(1e-3, 2e-3)),
    SearchSection(tries="poisson", mean=2.0, learning_rate=(1e-3, 2e-3)),
    SearchSection(tries="each", learning_rate=(1e-3, 2e-3), warmup_steps=(0, 4)),
    SearchSection(tries="guided", mean=3.0, learning_rate=(1e-3, 2e-3)),
]


def of_search(plan: Plan, section: SearchSection) -> Layer:
    """The reading of the tries of a declared search, at the level of a rehearsal."""
    made = dataclasses.replace(plan, search=declared(section))  # its price is not looked at
    assert made.search is not None
    return rehearsal.tries_layer(*rehearsal.rehearse_search(made, section, key=Key(bytes(32))), search=made.search, level=rehearsal.LEVEL / 6)


@pytest.mark.parametrize("section", SEARCHES, ids=lambda section: f"{section.tries} {section.shape:g}")
def test_a_search_as_it_is_passes(plan: Plan, section: SearchSection) -> None:
    layer = of_search(plan, section)
    assert layer.verdict is Verdict.PASS
    assert layer.figures["tries_gap"] < 0.15


def _as_many_as_planned(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Search, "number", lambda self, _uniform: int(self.mean))


def _the_first_is_drawn_again(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(search, "_option", lambda *_: 0)


def _until_a_score_is_worse(patch: pytest.MonkeyPatch) -> None:
    add = search._Scores.add

    def stopping(done: Any, option: int, score: float) -> None:
        add(done, option, score)
        if score > done.scores[0]:
            raise NothingLearned("a better score")

    patch.setattr(search._Scores, "add", stopping)


@pytest.mark.parametrize(
    ("broken", "section"),
    [
        (_as_many_as_planned, SEARCHES[0]),
        (_the_first_is_drawn_again, SEARCHES[0]),
        (_until_a_score_is_worse, SEARCHES[0]),
        (_until_a_score_is_worse, SEARCHES[4]),
    ],
)
def test_a_broken_search_fails(
    plan: Plan, broken: Callable[[pytest.MonkeyPatch], None], section: SearchSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    assert of_search(plan, section).verdict is Verdict.FAIL


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(ValueError, match="K >= 100"):
        rehearsal.reuse_layer(np.zeros((3, 5)), scale=1.0, level=0.01)
    with pytest.raises(ValueError, match="probability"):
        rehearsal.inclusion_layer([1], [1], probability=0.0, level=0.01)


@pytest.fixture
def draws() -> np.ndarray:
    return np.random.default_rng(3).standard_normal((50, 400))


def test_independent_noise_is_not_taken_for_reused(draws: np.ndarray) -> None:
    assert rehearsal.reuse_layer(draws, scale=1.0, level=0.01).verdict is Verdict.PASS
    draws[31] = -draws[4]
    assert rehearsal.reuse_layer(draws, scale=1.0, level=0.01).verdict is Verdict.FAIL
