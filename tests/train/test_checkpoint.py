from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from discreet import model as models
from discreet.config import ModelSection
from discreet.errors import DigestMismatch, SealBroken, StorageFull
from discreet.keys import Key
from discreet.model import Base
from discreet.record import SubjectId
from discreet.train import checkpoint
from discreet.train.checkpoint import Checkpoints, CheckpointStore
from discreet.train.step import public_step, tokenize

from .conftest import NOTES

SUBJECT = {"plan": "sha256:aa"}


def _checkpoints(folder: Path, **changed: object) -> Checkpoints:
    return Checkpoints(**{"folder": folder, "key": Key(bytes(32)), "run": "r", **changed})  # type: ignore[arg-type]  # a test may pass anything


def _training(base: Base, name: str = "adam") -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    module = models.attach(base, ModelSection(base="tiny"))
    parameters = list(models.trained_parameters(module).values())
    return module, torch.optim.Adam(parameters, lr=0.01) if name == "adam" else torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def _steps(module: torch.nn.Module, optimizer: torch.optim.Optimizer, base: Base, count: int) -> None:
    documents = tokenize(NOTES[:4], base, max_tokens=24)
    for _ in range(count):
        public_step(module, optimizer, documents, token_budget=256)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_restored_training_goes_on_bit_for_bit(base: Base, tmp_path: Path, name: str) -> None:
    module, optimizer = _training(base, name)
    _steps(module, optimizer, base, 2)
    _checkpoints(tmp_path).save(module, optimizer, step=2, curve=((0, 4.5), (2, 4.25)), subject=SUBJECT)
    _steps(module, optimizer, base, 2)

    resumed, its_optimizer = _training(base, name)
    assert _checkpoints(tmp_path).restore(resumed, its_optimizer, subject=SUBJECT) == (2, ((0, 4.5), (2, 4.25)))
    _steps(resumed, its_optimizer, base, 2)
    for left, right in zip(models.trained_parameters(module).values(), models.trained_parameters(resumed).values(), strict=True):
        assert torch.equal(left, right)


def test_nothing_saved_restores_nothing(base: Base, tmp_path: Path) -> None:
    assert _checkpoints(tmp_path).restore(*_training(base), subject=SUBJECT) is None


def test_the_file_is_sealed_and_bound_to_its_run(base: Base, tmp_path: Path) -> None:
    module, optimizer = _training(base)
    _checkpoints(tmp_path).save(module, optimizer, step=1, curve=(), subject=SUBJECT)
    content = (tmp_path / "state").read_bytes()
    assert b"lora" not in content
    assert b"plan" not in content
    for other in (_checkpoints(tmp_path, run="another"), _checkpoints(tmp_path, key=Key(bytes(31) + b"\x01"))):
        with pytest.raises(SealBroken):
            other.restore(module, optimizer, subject=SUBJECT)
    (tmp_path / "state").write_bytes(content[:-1])
    with pytest.raises(SealBroken):
        _checkpoints(tmp_path).restore(module, optimizer, subject=SUBJECT)


def test_the_state_of_another_plan_is_refused(base: Base, tmp_path: Path) -> None:
    module, optimizer = _training(base)
    _checkpoints(tmp_path).save(module, optimizer, step=1, curve=(), subject=SUBJECT)
    with pytest.raises(DigestMismatch, match="another plan"):
        _checkpoints(tmp_path).restore(module, optimizer, subject={"plan": "sha256:bb"})
    wider = models.attach(base, ModelSection(base="tiny", lora_targets=("q_proj",)))
    with pytest.raises(DigestMismatch, match="parameters"):
        _checkpoints(tmp_path).restore(wider, torch.optim.Adam(list(models.trained_parameters(wider).values())), subject=SUBJECT)


def test_a_full_disk_keeps_the_state_before(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, optimizer = _training(base)
    _checkpoints(tmp_path).save(module, optimizer, step=1, curve=(), subject=SUBJECT)
    before = (tmp_path / "state").read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        _checkpoints(tmp_path).save(module, optimizer, step=2, curve=(), subject=SUBJECT)
    assert (tmp_path / "state").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_destroy_is_idempotent(base: Base, tmp_path: Path) -> None:
    module, optimizer = _training(base)
    _checkpoints(tmp_path).save(module, optimizer, step=1, curve=(), subject=SUBJECT)
    _checkpoints(tmp_path).destroy()
    _checkpoints(tmp_path).destroy()
    assert not any(tmp_path.iterdir())


def test_moments_return_to_where_their_parameter_lies() -> None:
    """On a GPU a moment left on the CPU stops the next step; the device without memory stands in for it."""
    parameter = torch.nn.Parameter(torch.zeros(3, device="meta"))
    assert checkpoint._like(parameter, torch.ones(3), "exp_avg").device.type == "meta"
    assert checkpoint._like(parameter, torch.tensor(2.0), "step").device.type == "cpu"


class _Keys:
    def purpose(self, name: str) -> Key:
        return Key(bytes(32))


class _Snapshots:
    def holds(self, subject: str) -> list[str]:
        return {"S1": ["sha256:one", "sha256:two"]}.get(subject, [])


def test_erasure_destroys_every_unfinished_state_and_says_what_held_the_subject(base: Base, tmp_path: Path) -> None:
    module, optimizer = _training(base)
    for run, root in (("run-a", "sha256:one"), ("run-b", "sha256:other")):
        Checkpoints.of(tmp_path, run, _Keys()).save(module, optimizer, step=1, curve=(), subject={"snapshot": root})  # type: ignore[arg-type]  # a stand-in
    (tmp_path / "run-b" / "private" / ".state-torn").write_bytes(b"cut short")

    def states(run: str, track: str) -> Checkpoints:
        return Checkpoints.of(tmp_path, run, _Keys(), track=track)  # type: ignore[arg-type]  # a stand-in

    store = CheckpointStore(tmp_path, states=states, snapshots=_Snapshots())  # type: ignore[arg-type]  # a stand-in
    assert store.holds(SubjectId("S1")) == ["sha256:one"]
    assert store.holds(SubjectId("S2")) == []
    assert not store.absence(SubjectId("S1"))
    for _ in range(2):
        store.purge(SubjectId("S2"))
    assert store.absence(SubjectId("S1"))
    assert not list(tmp_path.rglob("*state*"))
