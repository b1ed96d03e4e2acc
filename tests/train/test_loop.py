from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from discreet import model as models
from discreet.config import TrainSection
from discreet.dp.accounting import RdpFilter
from discreet.dp.mechanism import Adaptive, Sampling, calibrate
from discreet.errors import DigestMismatch, NothingLearned, PlanInvalid, ReservationRefused, SealBroken, SourceEmpty
from discreet.keys import Key, Stream
from discreet.ledger import State
from discreet.model import PublicText
from discreet.record import Digest
from discreet.train import loop
from discreet.train.course import Course
from discreet.train.loop import StepReport, Trained, fit, train

from .conftest import NOTES, Paid, generated

ORDER = bytes(32)


def _train(paid: Paid, name: str = "run", **changed: object) -> Trained:
    arguments = {
        "texts": NOTES,
        "setup": paid.setup,
        "run_key": paid.run_key,
        "checkpoints": paid.checkpoints(name),
        "adapter": paid.folder / f"{name}-adapter",
        **changed,
    }
    return train(paid.plan, paid.snapshot, paid.reservation, **arguments)  # type: ignore[arg-type]  # a test may pass anything


def test_train_takes_all_planned_steps_and_says_what_it_may_claim(paid: Paid) -> None:
    reports: list[StepReport] = []
    trained = _train(paid, on_step=reports.append)
    assert trained.steps == paid.plan.steps == len(reports) == 4
    assert trained.guarantee == paid.plan.guarantee
    assert (trained.plan, trained.reservation, trained.snapshot) == (paid.plan.digest, "r1", paid.snapshot.root)
    assert trained.base_digest == paid.setup.base.digest
    assert models.adapter_digest(trained.adapter) == trained.adapter_digest
    assert [step for step, _ in trained.curve] == [0, 2, 4]
    epsilons = [report.epsilon or 0.0 for report in reports]
    assert epsilons == sorted(epsilons)
    assert epsilons[-1] == pytest.approx(RdpFilter.open(epsilon=paid.plan.guarantee.epsilon, delta=1e-2).epsilon_of(paid.plan.event), rel=1e-6)
    assert [report.seconds_left == 0 for report in reports] == [False, False, False, True]


def test_the_saved_adapter_is_what_was_measured(paid: Paid) -> None:
    trained = _train(paid)
    again = models.load_adapter(paid.setup.base, trained.adapter)
    held_out = loop.tokenize(paid.setup.held_out.texts, paid.setup.base, max_tokens=48)
    assert loop.mean_loss(again, held_out, token_budget=128) == pytest.approx(trained.curve[-1][1], rel=1e-6)


class _Killed(Exception):
    pass


def test_resumed_equals_uninterrupted_bit_for_bit(paid: Paid) -> None:
    """PITFALLS 12: killed after each step in turn, the run ends in the same bytes and the same curve."""
    whole = _train(paid, "whole")

    def die(_: StepReport) -> None:
        raise _Killed

    for _ in range(paid.plan.steps):
        with pytest.raises(_Killed):
            _train(paid, "torn", on_step=die)
    torn = _train(paid, "torn")
    assert torn.adapter_digest == whole.adapter_digest
    assert torn.curve == whole.curve


CARRIED: dict[str, dict[str, Any]] = {
    "correlated": {"sampling": Sampling.CYCLIC_POISSON, "bands": 3},
    "adaptive": {"adaptive": Adaptive(quantile=0.5, rate=0.2, votes_multiplier=1.0)},
}


@pytest.fixture(params=CARRIED)
def carrying(request: pytest.FixtureRequest, paid: Paid) -> Paid:
    """A run that carries more from step to step than its parameters."""
    common = {"epsilon": 8.0, "delta": 1e-2, "population": 20, "expected_batch": 5, "steps": 4, "clip_norm": 0.5, "unit": "patient"}
    plan = calibrate(**common, **CARRIED[request.param])
    return dataclasses.replace(paid, plan=plan, reservation=dataclasses.replace(paid.reservation, plan=plan.digest))


def test_noise_and_clip_norm_are_carried_over_a_resume_bit_for_bit(carrying: Paid) -> None:
    whole = _train(carrying, "whole")

    def die(_: StepReport) -> None:
        raise _Killed

    for _ in range(carrying.plan.steps):
        with pytest.raises(_Killed):
            _train(carrying, "torn", on_step=die)
    assert _train(carrying, "torn").adapter_digest == whole.adapter_digest
    course = Course.opened(carrying.checkpoints("torn").course(), carrying.plan, carrying.run_key)
    assert course.step == 4
    assert (course.clip_norm == 0.5) is (carrying.plan.adaptive is None)
    with pytest.raises(SealBroken):
        Course.opened(carrying.checkpoints("torn").course(), carrying.plan, Key(bytes(32)))


def test_the_noise_of_a_step_is_not_in_an_opened_checkpoint(carrying: Paid) -> None:
    """PITFALLS 40: whoever has the checkpoint and its key, but not the run key, takes no noise off."""
    _train(carrying)
    opened = Key(bytes(32)).open((carrying.folder / "run" / "state").read_bytes(), context=b"checkpoint/run-1")
    memory = Course.opened(carrying.checkpoints().course(), carrying.plan, carrying.run_key).memory
    assert (memory is not None) is bool(carrying.plan.bands)
    for past in memory.past.values() if memory else ():
        assert len(past) == 2
        assert not any(noise.numpy().tobytes() in opened for noise in past)


def test_a_course_is_taken_step_by_step(carrying: Paid) -> None:
    course = Course.of(carrying.plan)
    for wrong in (0, 2):
        with pytest.raises(ValueError, match="Expected step 1"):
            course.take(wrong)
    with pytest.raises(ValueError, match="from its beginning"):
        Course.of(carrying.plan, step=2)


def test_the_correction_of_adam_does_not_go_with_changing_noise(carrying: Paid) -> None:
    setup = dataclasses.replace(carrying.setup, train=TrainSection(optimizer="adam_corrected"))
    with pytest.raises(PlanInvalid, match="adam_corrected"):
        _train(carrying, setup=setup)


def test_another_run_key_gives_another_model(paid: Paid) -> None:
    other = _train(paid, "other", run_key=Key(bytes(32)))
    assert other.adapter_digest != _train(paid).adapter_digest


def test_no_seed_is_in_what_a_run_leaves(paid: Paid) -> None:
    """PITFALLS 40: neither the run key nor what it derives for a step lies in the checkpoint, sealed or opened, or in the adapter."""
    trained = _train(paid)
    secrets = [paid.run_key._secret, paid.run_key.derive("stream", "noise", 1)._secret, paid.run_key.derive("stream", "sample", 1)._secret]
    sealed = (paid.folder / "run" / "state").read_bytes()
    opened = Key(bytes(32)).open(sealed, context=b"checkpoint/run-1")
    left = [sealed, opened, *(path.read_bytes() for path in trained.adapter.iterdir())]
    assert not any(secret in content for secret in secrets for content in left)


@pytest.mark.parametrize("state", [State.RESERVED, State.CLOSED])
def test_an_unspent_reservation_trains_nothing(paid: Paid, state: State) -> None:
    with pytest.raises(ReservationRefused, match="spent before training"):
        _train(dataclasses.replace(paid, reservation=dataclasses.replace(paid.reservation, state=state)))
    assert not (paid.folder / "run").exists()


@pytest.mark.parametrize("field", ["plan", "snapshot"])
def test_a_reservation_for_something_else_is_refused(paid: Paid, field: str) -> None:
    changed = dataclasses.replace(paid.reservation, **{field: Digest("sha256:" + "00" * 32)})
    with pytest.raises(ReservationRefused, match=f"the {field} that the reservation paid for"):
        _train(dataclasses.replace(paid, reservation=changed))


def test_a_checkpoint_of_another_reservation_is_refused(paid: Paid) -> None:
    _train(paid)
    with pytest.raises(DigestMismatch, match="another reservation"):
        _train(dataclasses.replace(paid, reservation=dataclasses.replace(paid.reservation, id="r2")))


def test_a_run_that_moved_nothing_is_an_error(paid: Paid, monkeypatch: pytest.MonkeyPatch) -> None:
    """PITFALLS 13."""
    monkeypatch.setattr(loop.optimizers, "make", lambda *_, **__: torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0))
    with pytest.raises(NothingLearned):
        _train(paid)
    assert not (paid.folder / "run-adapter").exists()


def test_full_training_of_chosen_layers_is_private_too(paid: Paid) -> None:
    section = paid.setup.model.model_copy(update={"train": ("model.layers.3.*", "model.norm.weight")})
    trained = _train(paid, setup=dataclasses.replace(paid.setup, model=section))
    learnt = json.loads((trained.adapter / "trained.json").read_text())["train"]
    assert "model.norm.weight" in learnt
    assert all(name.startswith(("model.layers.3.", "model.norm")) for name in learnt)


def test_private_training_may_start_from_a_public_adapter(paid: Paid) -> None:
    public = fit(generated(NOTES), setup=paid.setup, steps=2, batch=8, order=Stream(ORDER))
    models.save_adapter(public.module, paid.folder / "public")
    trained = _train(paid, setup=dataclasses.replace(paid.setup, start=paid.folder / "public"))
    assert trained.curve[0][1] == pytest.approx(public.curve[-1][1], rel=1e-6)


def test_fit_takes_public_text_only(paid: Paid) -> None:
    fitted = fit(generated(NOTES), setup=paid.setup, steps=6, batch=8, order=Stream(ORDER))
    assert (fitted.steps, [step for step, _ in fitted.curve]) == (6, [0, 3, 6])
    assert fitted.curve[-1][1] < fitted.curve[0][1]
    with pytest.raises(SourceEmpty):
        fit(PublicText(()), setup=paid.setup, steps=1, batch=1, order=Stream(ORDER))
    with pytest.raises(ValueError, match="batch=0"):
        fit(generated(NOTES), setup=paid.setup, steps=1, batch=0, order=Stream(ORDER))


def test_fit_resumes_to_the_bit(paid: Paid) -> None:
    whole = fit(generated(NOTES), setup=paid.setup, steps=4, batch=8, order=Stream(ORDER))

    def die(report: StepReport) -> None:
        if report.step == 2:
            raise _Killed

    with pytest.raises(_Killed):
        fit(generated(NOTES), setup=paid.setup, steps=4, batch=8, order=Stream(ORDER), checkpoints=paid.checkpoints("fit"), on_step=die)
    resumed = fit(generated(NOTES), setup=paid.setup, steps=4, batch=8, order=Stream(ORDER), checkpoints=paid.checkpoints("fit"))
    for left, right in zip(models.trained_parameters(whole.module).values(), models.trained_parameters(resumed.module).values(), strict=True):
        assert torch.equal(left, right)


def test_every_epoch_reads_every_document_once() -> None:
    order = Stream(ORDER)
    epochs = [[i for step in range(first, first + 3) for i in loop._in_order(10, 4, order, step)] for first in (1, 4)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(10))
    assert epochs[0] != epochs[1]


def test_warm_up_is_linear_and_ends(paid: Paid) -> None:
    setup = dataclasses.replace(paid.setup, train=TrainSection(learning_rate=0.5, warmup_steps=4))
    run = loop._begin(setup, steps=9, epsilon_of=lambda _: None, on_step=lambda _: None, checkpoints=None, subject={})
    rates = []
    for step in range(6):
        run.step = step
        loop._set_learning_rate(run)
        rates.append(run.optimizer.param_groups[0]["lr"])
    assert rates == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_setup_needs_public_held_out_text(paid: Paid) -> None:
    with pytest.raises(SourceEmpty, match="public held-out text"):
        dataclasses.replace(paid.setup, held_out=PublicText(()))
