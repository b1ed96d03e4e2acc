"""A tiny base, a snapshot of made-up notes, and a paid plan for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from discreet import model
from discreet.config import ModelSection, RunSection, TrainSection
from discreet.dp.mechanism import Plan, calibrate
from discreet.keys import Key
from discreet.ledger import Reservation, State
from discreet.model import Base, PublicText
from discreet.record import Basis, Digest, Sensitive, Sensitivity, Snapshot, SubjectId
from discreet.train.checkpoint import Checkpoints
from discreet.train.loop import Setup

NOTES = [f"Patient {n} has a cough for {n % 7} days. Give the syrup {n % 3} times a day." for n in range(40)]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return model.load_base("tiny", cache=tmp_path_factory.mktemp("cache"))


def generated(texts: list[str]) -> PublicText:
    return PublicText.of(texts, sensitivity=Sensitivity.PUBLIC, basis=Basis.GENERATED)


@dataclass(frozen=True, kw_only=True)
class Paid:
    """Everything that `train` takes."""

    plan: Plan
    snapshot: Snapshot
    reservation: Reservation
    setup: Setup
    run_key: Key
    folder: Path

    def checkpoints(self, name: str = "run") -> Checkpoints:
        return Checkpoints(folder=self.folder / name, key=Key(bytes(32)), run="run-1")


@pytest.fixture(scope="session")
def plan() -> Plan:
    return calibrate(epsilon=8.0, delta=1e-2, population=20, expected_batch=5, steps=4, clip_norm=0.5, unit="patient")


@pytest.fixture
def paid(base: Base, plan: Plan, tmp_path: Path) -> Paid:
    return made_up(base, plan, tmp_path)


def made_up(base: Base, plan: Plan, tmp_path: Path) -> Paid:
    """A paid run; the same for every process that asks."""
    units = {SubjectId(f"S{n:02d}"): (2 * n, 2 * n + 1) for n in range(20)}
    root = Digest("sha256:" + "ab" * 32)
    snapshot = Snapshot(root=root, name="notes", sensitivity=Sensitivity.SPECIAL, path=tmp_path, units=Sensitive(units))
    return Paid(
        plan=plan,
        snapshot=snapshot,
        reservation=Reservation(id="r1", budget="b", run="run-1", plan=plan.digest, snapshot=root, state=State.SPENT, remaining_epsilon=0.0),
        setup=Setup(
            base=base,
            model=ModelSection(base="tiny", max_tokens=48),
            train=TrainSection(learning_rate=0.01),
            run=RunSection(threads=1, token_budget=128),
            held_out=generated(["Patient 90 has a cough for 2 days.", "Give the syrup 3 times a day."]),
            evaluations=2,
        ),
        run_key=Key(bytes(range(32))),
        folder=tmp_path,
    )
