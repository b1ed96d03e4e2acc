"""Line 7 of the story: a paid plan and a frozen corpus become an adapter with its guarantee; and, apart from it, the track without privacy.

    train    the DP track: exactly the plan's steps, by `private_step`, only for a reservation that is already spent
    fit      the public track, audit controls and utility controls: takes `PublicText` and nothing else, so no sensitive source can reach it (PITFALLS 38)

Both measure loss on public held-out text only; no figure of private text leaves a step (PITFALLS 15). Both resume from a sealed checkpoint to the bit that an
uninterrupted run would have reached on the same machine and number of threads.

Guarantees: `Trained` exists only after all planned steps ran, each noised, and at least one trained parameter moved (PITFALLS 13); the plan, the corpus and the
reservation belong together by digest; the division, the noise and the sampling are the plan's, never the configuration's.

On several ranks (`train/parallel.py`) every rank calls `train` with the same arguments; rank 0 writes, and all return the same.

Does not cover: early stopping; `fit` on several ranks. Realised batch sizes show in the display (tokens per second): the operator already holds the data.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import torch
from torch import Tensor, nn

from discreet import model as models
from discreet.config import ModelSection, RunSection, TrainSection
from discreet.dp import csprng
from discreet.dp.accounting import Guarantee, RdpFilter, entry_of, rdp
from discreet.dp.mechanism import Plan
from discreet.errors import NothingLearned, ReservationRefused, SourceEmpty
from discreet.keys import Key, Stream
from discreet.ledger import Reservation, State
from discreet.model import Base, PublicText, trained_parameters
from discreet.record import Digest, Snapshot
from discreet.train import optimizers, parallel
from discreet.train.checkpoint import Checkpoints
from discreet.train.course import Course
from discreet.train.parallel import ALONE, Ranks
from discreet.train.step import PrivateCorpus, Rows, Work, mean_loss, public_step, tokenize

Curve = tuple[tuple[int, float], ...]
"""(step, cross entropy per token on public held-out text), from step 0."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Where a run stands, for a display.

    Attributes:
        epsilon: what the steps so far cost by RDP, at the plan's delta; None on the public track, and where only PLD knows the event. The whole plan was spent before the first.
        loss: last loss on public held-out text.
        padding: padded positions beside each token so far; 0 is none.
    """

    step: int
    steps: int
    epsilon: float | None
    loss: float
    tokens_per_second: float
    padding: float
    seconds_left: float


OnStep = Callable[[StepReport], None]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is trained and how; none of it changes a guarantee.

    Attributes:
        start: folder of an adapter to start from (made on the public track), or None for untrained adapters.
        held_out: public text that every curve is measured on.
        evaluations: about how many points a curve has after its first, >= 1.
    """

    base: Base
    model: ModelSection
    train: TrainSection
    run: RunSection
    held_out: PublicText
    start: Path | None = None
    evaluations: int = 5

    def __post_init__(self) -> None:
        if not self.held_out.texts:
            raise SourceEmpty("public held-out text", remedy="Add a source with role = 'evaluation'.")
        if self.evaluations < 1:
            raise ValueError(f"Expected evaluations={self.evaluations} >= 1.")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A privately trained adapter with what it may claim (line 7), built by `train`.

    Attributes:
        adapter: folder of the adapter.
        adapter_digest: of that folder.
        base_digest: of the base model under it.
        guarantee: the plan's.
        steps: noised updates that ran: all that were planned.
        curve: loss on public held-out text.
        plan: digest of the plan.
        snapshot: root of the corpus.
        reservation: the ledger's name for what was paid.
    """

    adapter: Path
    adapter_digest: Digest
    base_digest: Digest
    guarantee: Guarantee
    steps: int
    curve: Curve
    plan: Digest
    snapshot: Digest
    reservation: str


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """A model trained without privacy on public or generated text, in memory, built by `fit`. It is no `Trained`: nothing releases it."""

    module: nn.Module
    steps: int
    curve: Curve


@final
@dataclass(slots=True, kw_only=True)
class _Run:
    """A run in progress."""

    setup: Setup
    module: nn.Module
    optimizer: torch.optim.Optimizer
    held_out: Sequence[Tensor]
    steps: int
    epsilon_of: Callable[[int], float | None]
    on_step: OnStep
    checkpoints: Checkpoints | None
    subject: dict[str, str]
    ranks: Ranks = ALONE
    is_sharded: bool = False
    plan: Plan | None = None
    run_key: Key | None = None
    course: Course | None = None
    step: int = 0
    curve: list[tuple[int, float]] = field(default_factory=list)


def train(
    plan: Plan,
    snapshot: Snapshot,
    reservation: Reservation,
    *,
    texts: Sequence[str],
    setup: Setup,
    run_key: Key,
    checkpoints: Checkpoints,
    adapter: Path,
    on_step: OnStep = lambda _: None,
    ranks: Ranks = ALONE,
) -> Trained:
    """Runs a paid plan on a frozen corpus, from the last checkpoint if there is one.

    Args:
        reservation: of this plan and snapshot, in state "spent": the whole event was charged before the first noisy step.
        texts: the document at each position of the snapshot, from 0 (`corpus.texts`).
        run_key: `keyring.run(...)`, the source of sampling and noise: the same for every resume, destroyed when the run closes.
        checkpoints: where state is kept, in another place than the run key.
        adapter: folder for the result, written whole at the end.
        on_step: called after each step.
        ranks: this process among those that train together (`parallel.joined`); all see the same folders.

    Raises:
        ReservationRefused: when the reservation is not spent, or is for another plan or snapshot.
        NothingLearned: when no trained parameter changed.
        DigestMismatch, SealBroken: when the checkpoint is not of this run.
        StorageFull: when the disk is full; the run resumes from its last checkpoint.
    """
    _check_paid(plan, snapshot, reservation)
    optimizers.check(setup.train, plan)
    beta = setup.train.preference_beta if setup.train.objective == "preference" else None
    corpus = PrivateCorpus.of(snapshot, texts, setup.base, max_tokens=setup.model.max_tokens, beta=beta)
    subject = {"plan": plan.digest, "base": setup.base.digest, "snapshot": snapshot.root, "reservation": reservation.id}
    run = _begin(
        setup,
        steps=plan.steps,
        epsilon_of=_rdp_epsilon(plan),
        on_step=on_step,
        checkpoints=checkpoints,
        subject=subject,
        noise_std=plan.noise_std_of_mean,
        ranks=ranks,
    )
    corpus = corpus if beta is None else corpus.against(run.module)
    rows = Rows(setup.run.rows)
    run.plan, run.run_key, run.course = plan, run_key, Course.of(plan)

    def step(number: int) -> Work:
        budget = setup.run.token_budget
        return parallel.private_step(
            run.module, run.optimizer, corpus, plan, run_key=run_key, step=number, token_budget=budget, rows=rows, ranks=ranks, course=run.course
        )

    _go(run, step)
    whole = _whole(run)
    if ranks.writes:
        models.save_adapter(whole, adapter)
    ranks.wait()
    return Trained(
        adapter=adapter,
        adapter_digest=models.adapter_digest(adapter),
        base_digest=setup.base.digest,
        guarantee=plan.guarantee,
        steps=run.step,
        curve=tuple(run.curve),
        plan=plan.digest,
        snapshot=snapshot.root,
        reservation=reservation.id,
    )


def fit(
    text: PublicText,
    *,
    setup: Setup,
    steps: int,
    batch: int,
    order: Stream,
    checkpoints: Checkpoints | None = None,
    on_step: OnStep = lambda _: None,
) -> Fitted:
    """Trains without privacy, on public or generated text: passes over all of it in random order, `batch` documents a step.

    Args:
        text: what is learnt, at least one text.
        steps: >= 1. An epoch is ceil(number of texts / batch) steps.
        batch: documents in a step, >= 1; the last of an epoch may have fewer.
        order: source of the order; the same stream gives the same run.
        checkpoints: where to keep sealed state, or None to keep none.

    Raises:
        SourceEmpty: when there is no text.
        NothingLearned: when no trained parameter changed.
        DigestMismatch, SealBroken: when the checkpoint is not of this run.
    """
    if min(steps, batch) < 1:
        raise ValueError(f"Expected steps={steps} >= 1 and batch={batch} >= 1.")
    if not text.texts:
        raise SourceEmpty("public or generated text to train on")
    documents = tokenize(text.texts, setup.base, max_tokens=setup.model.max_tokens)
    subject = {"base": setup.base.digest, "steps": str(steps), "batch": str(batch)}
    run = _begin(setup, steps=steps, epsilon_of=lambda _: None, on_step=on_step, checkpoints=checkpoints, subject=subject)

    def step(number: int) -> Work:
        chosen = _in_order(len(documents), batch, order, number)
        return public_step(run.module, run.optimizer, [documents[i] for i in chosen], token_budget=setup.run.token_budget)

    _go(run, step)
    return Fitted(module=run.module, steps=run.step, curve=tuple(run.curve))


def _check_paid(plan: Plan, snapshot: Snapshot, reservation: Reservation) -> None:
    if reservation.state is not State.SPENT:
        raise ReservationRefused(
            "a reservation that is spent before training", value=reservation.state, remedy="Spend it first; a closed one is over."
        )
    if reservation.plan != plan.digest:
        raise ReservationRefused("the plan that the reservation paid for", value=plan.digest, remedy="Reserve this plan.")
    if reservation.snapshot != snapshot.root:
        raise ReservationRefused("the snapshot that the reservation paid for", value=snapshot.root, remedy="Reserve this snapshot.")


def _begin(
    setup: Setup,
    *,
    steps: int,
    epsilon_of: Callable[[int], float | None],
    on_step: OnStep,
    checkpoints: Checkpoints | None,
    subject: dict[str, str],
    noise_std: float = 0.0,
    ranks: Ranks = ALONE,
) -> _Run:
    torch.set_num_threads(setup.run.threads or max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    module = models.attach(setup.base, setup.model, start=setup.start).to(setup.run.device)
    is_sharded = ranks.size > 1 and setup.run.weights == "sharded"
    module = parallel.sharded(module, device=setup.run.device) if is_sharded else module
    return _Run(
        setup=setup,
        module=module,
        ranks=ranks,
        is_sharded=is_sharded,
        optimizer=optimizers.make(trained_parameters(module).values(), setup.train, noise_std=noise_std),
        held_out=tokenize(setup.held_out.texts, setup.base, max_tokens=setup.model.max_tokens),
        steps=steps,
        epsilon_of=epsilon_of,
        on_step=on_step,
        checkpoints=checkpoints,
        subject=subject,
    )


def _go(run: _Run, step: Callable[[int], Work]) -> None:
    """Takes every step that is left, saving and reporting after each; then says whether anything was learnt."""
    start = {name: parameter.detach().clone() for name, parameter in trained_parameters(run.module).items()}
    restored = run.checkpoints.restore(run.module, run.optimizer, subject=run.subject) if run.checkpoints else None
    if restored:
        run.step, run.curve = restored[0], list(restored[1])
        _resume_course(run)
    else:
        _measure(run)
    began, first, done = time.monotonic(), run.step, Work(tokens=0, padding=0)
    while run.step < run.steps:
        _set_learning_rate(run)
        took = step(run.step + 1)
        done = Work(tokens=done.tokens + took.tokens, padding=done.padding + took.padding)
        run.step += 1
        if run.step % max(1, run.steps // run.setup.evaluations) == 0 or run.step == run.steps:
            _measure(run)
        _save(run)
        run.on_step(_report(run, seconds=time.monotonic() - began, taken=run.step - first, done=done))
    if not parallel.any_moved(start, trained_parameters(run.module), run.ranks):
        raise NothingLearned("at least one trained parameter to change", remedy="Check [model] train, the learning rate and the texts.")


def _whole(run: _Run) -> nn.Module:
    """The trained module; where weights are sharded, a whole one with what was learnt. Every rank calls it."""
    if not run.is_sharded:
        return run.module
    module = models.attach(run.setup.base, run.setup.model, start=run.setup.start)
    with torch.no_grad():
        for (_, mine), shard in zip(trained_parameters(module).items(), trained_parameters(run.module).values(), strict=True):
            mine.copy_(parallel.gathered(shard.detach()))
    return module


def _measure(run: _Run) -> None:
    run.curve.append((run.step, mean_loss(run.module, run.held_out, token_budget=run.setup.run.token_budget)))
    parallel.resharded(run.module)


def _save(run: _Run) -> None:
    if run.checkpoints and (run.step % run.setup.run.checkpoint_every == 0 or run.step == run.steps):
        carried = b""
        if run.course and run.plan and run.run_key and (run.plan.bands or run.plan.adaptive):
            carried = parallel.whole(run.course, trained_parameters(run.module), run.ranks).sealed(run.run_key)
        if run.ranks.writes or run.is_sharded:
            writes = run.ranks.writes
            run.checkpoints.save(run.module, run.optimizer, step=run.step, curve=tuple(run.curve), subject=run.subject, course=carried, writes=writes)


def _resume_course(run: _Run) -> None:
    if run.plan is None or run.run_key is None or run.checkpoints is None:
        return
    carried = run.checkpoints.course()
    if carried:
        run.course = parallel.split(Course.opened(carried, run.plan, run.run_key, device=run.setup.run.device), trained_parameters(run.module))
    else:
        run.course = Course.of(run.plan, step=run.step)


def _report(run: _Run, *, seconds: float, taken: int, done: Work) -> StepReport:
    return StepReport(
        step=run.step,
        steps=run.steps,
        epsilon=run.epsilon_of(run.step),
        loss=run.curve[-1][1],
        tokens_per_second=done.tokens / max(seconds, 1e-9),
        padding=done.padding / max(done.tokens, 1),
        seconds_left=seconds / taken * (run.steps - run.step),
    )


def _set_learning_rate(run: _Run) -> None:
    """Linear warm-up, then constant: a function of the step alone, so that a resumed run has the same."""
    section = run.setup.train
    factor = min(1.0, (run.step + 1) / section.warmup_steps) if section.warmup_steps else 1.0
    for group in run.optimizer.param_groups:
        group["lr"] = section.learning_rate * factor


def _rdp_epsilon(plan: Plan) -> Callable[[int], float | None]:
    """epsilon after k steps by RDP: one step's divergence times the steps that a unit can be in, so one computation serves all. None where RDP does not know the event."""
    if entry_of(plan.event) != "rdp":
        return lambda _: None
    scale = RdpFilter.open(epsilon=max(plan.filter_epsilon or plan.guarantee.epsilon, 1e-3), delta=plan.delta)
    one_step = rdp(plan.mechanism.event_after(1), scale.orders)
    return lambda steps: scale.epsilon_of(one_step * -(-steps // max(1, len(plan.bands))))


def _in_order(num_documents: int, batch: int, order: Stream, step: int) -> list[int]:
    """Positions of one step's documents: each epoch is a new permutation, named by its number."""
    steps_per_epoch = -(-num_documents // batch)
    epoch, place = divmod(step - 1, steps_per_epoch)
    permutation = csprng.uniform(order.fork("epoch", epoch), num_documents).argsort().tolist()
    return [int(position) for position in permutation[place * batch : (place + 1) * batch]]
