"""Misuse that the type checker must refuse. `make check` runs mypy on this file: every line below is wrong, and says with which error; an ignore that is no longer
needed (the misuse became acceptable to the types) fails the check. Nothing here is ever run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from discreet import corpus, pipeline
from discreet.audit import bounds
from discreet.deid import policy
from discreet.dp import clipping, mechanism, noise, sampling
from discreet.keys import Key, Stream
from discreet.ledger import Ledger, Reservation
from discreet.record import Admitted, Deidentified, Purpose, Record, Release, Sensitive, Snapshot, SubjectId
from discreet.serve import gateway
from discreet.train import loop


def a_stage_takes_only_what_the_stage_before_gives(
    record: Record, admitted: Admitted, frozen: Snapshot, plan: mechanism.Plan, ledger: Ledger, key: Key, rules: policy.Policy, rest: Any
) -> None:
    policy.deidentify(record, rules, key)  # type: ignore[arg-type]
    policy.deidentify(admitted, rules)  # type: ignore[call-arg]
    policy.deidentify(admitted, "surrogate", key)  # type: ignore[arg-type]
    corpus.freeze([admitted], name="n", keyring=rest, log=rest, store=rest, folder=rest)  # type: ignore[list-item]
    ledger.reserve("b", plan, "sha256:00", "run")  # type: ignore[arg-type]
    loop.train(plan, frozen, plan, texts=rest, setup=rest, run_key=key, checkpoints=rest, adapter=rest)  # type: ignore[arg-type]
    loop.train(plan, frozen, texts=rest, setup=rest, run_key=key, checkpoints=rest, adapter=rest)  # type: ignore[call-arg]


def a_sum_without_a_sensitivity_gets_no_noise(gradients: dict[str, Tensor], clipped: clipping.ClippedSum, stream: Stream) -> None:
    noise.add(gradients, noise_multiplier=1.0, key=stream)  # type: ignore[arg-type]
    noise.add(clipped, noise_multiplier=1.0, key=7)  # type: ignore[arg-type]
    noise.add(clipped, 1.0, stream)  # type: ignore[call-arg]
    sampling.poisson(100, 0.1, 1234)  # type: ignore[arg-type]


def parameters_of_privacy_have_names_and_no_defaults(model: nn.Module, batch: Any) -> None:
    clipping.clipped_sum(model, lambda m, b: m(b), batch, [0, 1])  # type: ignore[call-arg]
    clipping.clipped_sum(model, lambda m, b: m(b), batch, [0, 1], 1.0)  # type: ignore[call-arg]
    mechanism.calibrate(epsilon=8.0, delta=1e-5, expected_batch=8, steps=2, clip_norm=1.0, unit="patient")  # type: ignore[call-arg]
    mechanism.calibrate(epsilon=8.0, delta=1e-5, population=99, expected_batch=8, steps=2, clip_norm=1.0, unit="u", poisson_sampling=False)  # type: ignore[call-arg]


def what_is_sensitive_is_opened_by_name(text: Sensitive[str], subject: SubjectId, plan: mechanism.Plan, reservation: Reservation) -> None:
    text.upper()  # type: ignore[attr-defined]
    len(text)  # type: ignore[arg-type]
    "note: " + text  # type: ignore[operator]
    plan.noise_multiplier = 0.0  # type: ignore[misc]
    reservation.id = "another"  # type: ignore[misc]
    Purpose(name=subject, why="")  # type: ignore[call-arg]


def only_a_release_is_served(house: pipeline.House, folder: Path, release: Release, left: Deidentified, key: Key) -> None:
    gateway.open_engine(folder, house, public_key="", key=key)  # type: ignore[arg-type]
    gateway.open_engine(release, left, public_key="", key=key)  # type: ignore[arg-type]
    pipeline.load_release(folder)  # type: ignore[call-arg]
    bounds.one_run([0.1], [True])  # type: ignore[call-arg]
