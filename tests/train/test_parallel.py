"""Two processes over gloo against one, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from tests.conftest import on_two_ranks
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

from discreet import pipeline
from discreet.audit import bounds
from discreet.audit import mechanism as rehearsal
from discreet.config import SearchSection, TrainSection
from discreet.dp import adaptive, clipping, noise
from discreet.dp.clipping import ClippedSum
from discreet.dp.mechanism import Plan, calibrate
from discreet.errors import AccessDenied
from discreet.evidence.statement import Predicate
from discreet.keys import Key
from discreet.model import Base
from discreet.record import Digest
from discreet.train import loop, parallel, search
from discreet.train.parallel import ALONE, Ranks

from .conftest import NOTES, made_up

KEY = Key(bytes(range(32)))
DOCUMENTS = torch.linspace(-1, 1, 42).view(7, 6).sin()


def _small() -> nn.Module:
    made = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.linspace(-0.5, 0.5, p.numel()).view(p.shape))
    return made


def _partial(chosen: Iterable[int]) -> ClippedSum:
    made = _small()
    total = ClippedSum.zero(made, clip_norm=0.3)
    for i in chosen:
        total += clipping.clipped_sum(made, _losses, DOCUMENTS[i : i + 1], [i], clip_norm=0.3)
    return total


def _losses(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().flatten(1).sum(1)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("noise_multiplier", [0.0, 1.5])
def test_two_ranks_release_what_one_rank_releases(noise_multiplier: float) -> None:
    """Without noise the sums agree; with it the noise is drawn once, the very draw of one rank; a rank without documents stays in step (PITFALLS 3, 10)."""

    def work(ranks: Ranks) -> None:
        for count in (7, 1, 0):  # one document leaves a rank without any; none leaves both
            mine = parallel.shares([1] * count, ranks.size)[ranks.rank]
            got = parallel.add_noise(_partial(mine), noise_multiplier=noise_multiplier, key=KEY.stream("noise", 1), ranks=ranks)
            alone = noise.add(_partial(range(count)), noise_multiplier=noise_multiplier, key=KEY.stream("noise", 1))
            for name, gradient in alone.gradients.items():
                torch.testing.assert_close(got.gradients[name], gradient, rtol=1e-5, atol=1e-6)
                copies = [torch.empty_like(gradient) for _ in range(2)]
                dist.all_gather(copies, got.gradients[name].contiguous())
                assert torch.equal(*copies), "replicas differ"
            how: Any = {"quantile": 0.5, "rate": 0.2, "votes_multiplier": 1.0, "expected_batch": 7.0, "key": KEY.stream("noise", 1)}
            moved = parallel.next_clip_norm(_partial(mine), **how, ranks=ranks)
            assert moved == adaptive.update(_partial(range(count)), **how), "votes of the other rank are missing"

    on_two_ranks(work)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("patterns", ["all", pytest.param("lora", marks=pytest.mark.slow)])
def test_sharded_ranks_train_the_model_of_one(base: Base, plan: Plan, tmp_path: Path, patterns: str) -> None:
    """FSDP2 over two processes with noise: the draws of one rank, and what two began, one ends (PITFALLS 3, 9, 10, 12)."""
    paid = made_up(base, plan, tmp_path)
    setup = replace(paid.setup, model=paid.setup.model.model_copy(update={"train": (patterns,)}))

    class Stopped(Exception):
        pass

    def alone(name: str, folder: str) -> None:
        checkpoints = paid.checkpoints(name)
        loop.train(
            plan, paid.snapshot, paid.reservation, texts=NOTES, setup=setup, run_key=paid.run_key, checkpoints=checkpoints, adapter=tmp_path / folder
        )

    def together(stop: int) -> Callable[[Ranks], None]:
        shards = replace(setup, run=setup.run.model_copy(update={"weights": "sharded"}))

        def on_step(report: loop.StepReport) -> None:
            if report.step == stop:
                raise Stopped

        def work(ranks: Ranks) -> None:
            given: Any = {"texts": NOTES, "setup": shards, "run_key": paid.run_key, "checkpoints": paid.checkpoints("ranks")}
            with suppress(Stopped):
                loop.train(plan, paid.snapshot, paid.reservation, **given, adapter=tmp_path / "two", on_step=on_step, ranks=ranks)

        return work

    alone("alone", "one")
    on_two_ranks(together(2))
    shutil.copytree(tmp_path / "ranks", tmp_path / "handed over")
    on_two_ranks(together(0))
    alone("handed over", "three")
    one, two, three = (_weights(tmp_path / name) for name in ("one", "two", "three"))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=2e-4)
        torch.testing.assert_close(three[name], weight, rtol=1e-3, atol=2e-4)


def _weights(adapter: Path) -> dict[str, torch.Tensor]:
    [file] = adapter.glob("*.safetensors")
    return safetensors.torch.load_file(file)


@pytest.fixture
def _one_rank() -> Iterator[None]:
    """A group of this process alone: FSDP2 shards over it and computes as over many."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_one_rank")
def test_a_sharded_model_needs_a_rule_for_every_layer() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale

    class Borrowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lent = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return functional.linear(self.lent(x), self.lent.weight)

    for model, reason in (
        (nn.Sequential(nn.Linear(4, 4), Scale()), "rule and whole weights.*'1'"),
        (Borrowing(), "used by its own layer.*lent.weight"),
    ):
        x = torch.ones(2, 4)
        with pytest.raises(ValueError, match=reason):
            clipping.clipped_sum(fully_shard(model), _losses, x, [0, 1], clip_norm=1.0)


@pytest.mark.usefixtures("_one_rank")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")  # nothing is written into it
def test_a_sharded_sum_is_the_sum_and_nobody_adds_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3), nn.Tanh())
    x = torch.linspace(-1, 1, 24).view(3, 2, 4).sin()
    whole = clipping.clipped_sum(model, _losses, x, [0, 1, 1], clip_norm=0.3)
    shards = clipping.clipped_sum(fully_shard(model), _losses, x, [0, 1, 1], clip_norm=0.3)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(parallel.gathered(shards.gradients[name]), gradient)
    nobody = clipping.in_step(model, _losses, x[:1], clip_norm=0.3)
    assert nobody.votes == 0
    assert not any(bool(parallel.gathered(gradient).any()) for gradient in nobody.gradients.values())
    noised = noise.add(shards, noise_multiplier=2.0, key=Key(bytes(32)).stream("noise", 1))
    expected = noise.add(whole, noise_multiplier=2.0, key=Key(bytes(32)).stream("noise", 1))
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(parallel.gathered(noised.gradients[name]), gradient)
    with pytest.raises(ValueError, match="calls in_step"):
        clipping.clipped_sum(model, _losses, x[:0], [], clip_norm=0.3)
    with pytest.raises(ValueError, match="computed whole"):
        clipping.clipped_unit(model, _losses, [x], clip_norm=0.3)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize("is_sharded", [False, True])
def test_the_ranks_that_will_train_rehearse(is_sharded: bool) -> None:
    """As they are, all pass and read the same; noise that every rank draws for every parameter, and a share that is computed twice, are found."""
    made = calibrate(epsilon=8.0, delta=1e-3, population=200, expected_batch=60, steps=6, clip_norm=0.5)

    def failed(ranks: Ranks) -> set[str]:
        layers = rehearsal.layers(made, key=KEY, ranks=ranks, is_sharded=is_sharded)
        both: list[Any] = [None, None]
        dist.all_gather_object(both, [layer.to_json() for layer in layers])
        assert both[0] == both[1]
        return {layer.name for layer in layers if layer.verdict is bounds.Verdict.FAIL}

    def work(ranks: Ranks) -> None:
        assert failed(ranks) == set()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel, "shares", lambda costs, size: [list(range(len(costs)))] * size)
            assert "mechanism: clipping" in failed(ranks)
        if not is_sharded:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(parallel, "_owned", lambda tensors, _: sorted(tensors))
                assert "mechanism: noise" in failed(ranks)

    on_two_ranks(work)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_ranks_search_as_one_does(tmp_path: Path) -> None:
    """All take the tries of one process, settle on its winner by what rank 0 scores, and only rank 0 writes; what two began, one ends."""
    section = SearchSection(tries="negative_binomial", mean=8.0, learning_rate=(0.001, 0.002, 0.004, 0.008))
    made = calibrate(epsilon=8.0, delta=1e-3, population=100, expected_batch=10, steps=2, clip_norm=1.0, search=search.declared(section))
    nothing = Digest("sha256:" + "00" * 32)

    def searched(folder: Path, ranks: Ranks, *, dies_at: int = 1000) -> tuple[list[float], Any]:
        rates: list[float] = []

        def run(_number: int, train: TrainSection, adapter: Path) -> loop.Trained:
            if len(rates) == dies_at:
                raise KeyboardInterrupt
            if ranks.writes:
                adapter.mkdir(parents=True)
            ranks.wait()
            rates.append(train.learning_rate)
            given: Any = {"adapter_digest": nothing, "base_digest": nothing, "plan": nothing, "snapshot": nothing, "guarantee": made.guarantee}
            return loop.Trained(adapter=adapter, steps=2, curve=((2, train.learning_rate),), reservation="r1", **given)

        def score(_: int, trained: loop.Trained) -> float:
            assert ranks.writes, "only rank 0 scores"
            return abs(trained.curve[-1][1] - 0.002)

        given: Any = {
            "train": TrainSection(),
            "run": run,
            "drop": lambda _: None,
            "score": score,
            "run_key": Key(bytes(31) + b"\x03"),
            "folder": folder,
            "ranks": ranks,
        }
        chosen = None
        with suppress(KeyboardInterrupt):
            chosen = search.search(made, section, **given).chosen
        return rates, chosen

    alone, chosen = searched(tmp_path / "one", ALONE)
    assert len(set(alone)) > 2

    def together(folder: Path, dies_at: int) -> Callable[[Ranks], None]:
        def work(ranks: Ranks) -> None:
            found = searched(folder, ranks, dies_at=dies_at)
            assert found == ((alone, chosen) if dies_at == 1000 else (alone[:dies_at], None))

        return work

    on_two_ranks(together(tmp_path / "two", 1000))
    on_two_ranks(together(tmp_path / "torn", 2))
    assert searched(tmp_path / "torn", ALONE) == (alone[2:], chosen)
    assert [path.name for path in (tmp_path / "two").iterdir() if path.is_dir()] == ["adapter"]


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["replicated", "sharded"])
def test_the_command_trains_on_two_ranks(new_project: Callable[[Path], Path], tmp_path: Path, weights: str) -> None:
    """`torchrun discreet train`: one of every statement; called again, every rank finds the run finished."""
    folder = new_project(tmp_path / "project")
    written = (folder / "discreet.toml").read_text()
    (folder / "discreet.toml").write_text(written.replace("[run]", f'[run]\nweights = "{weights}"'))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", sys.executable, "-c", _COMMAND, "train"]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *command, "-C", str(folder), "--json"],
            capture_output=True,
            text=True,
            timeout=550,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads(done.stdout)["moved"] > 0, "one document on stdout, from rank 0"
    with pipeline.open_house(folder) as house:
        house.log.verify()
        assert all(len(house.log.select(once)) == 1 for once in (Predicate.RESERVED, Predicate.SPENT, Predicate.TRAINED, Predicate.KEY_DESTROYED))


_COMMAND = "from discreet.cli import main; main()"


def test_shares_hold_everything_once_and_are_even() -> None:
    dealt = parallel.shares([9, 1, 4, 4, 6], 2)
    assert sorted(index for of_rank in dealt for index in of_rank) == [0, 1, 2, 3, 4]
    assert [sum([9, 1, 4, 4, 6][index] for index in of_rank) for of_rank in dealt] == [13, 11]
    assert parallel.shares([], 3) == [[], [], []]


def test_ranks_train_only_for_whoever_may(new_project: Callable[[Path], Path], tmp_path: Path) -> None:
    """Rank 0 asks for the role before it looks at anything; the others do nothing that it has not announced."""
    folder = new_project(tmp_path / "project")
    settings = folder / "discreet.toml"
    settings.write_text(settings.read_text() + "\n[access]\nengineer = ['somebody else']\n")

    def work(ranks: Ranks) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(parallel, "joined", lambda _: nullcontext(ranks))
            if ranks.writes:
                with pytest.raises(AccessDenied):
                    pipeline.train_together(folder, pipeline.Silent())
                ranks.announce(False)
            else:
                assert pipeline.train_together(folder, pipeline.Silent()) is None

    on_two_ranks(work)
    settings.write_text(settings.read_text().replace("[access]\nengineer = ['somebody else']", ""))
    with pipeline.open_house(folder) as house:
        assert not house.ledger.open_runs()
        assert not house.log.select(Predicate.FROZEN)


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with parallel.joined("cpu") as ranks:
        assert ranks is ALONE
        ranks.wait()
    with pytest.raises(ValueError, match="rank=2 < size=2"):
        Ranks(rank=2, size=2)
    assert torch.distributed.is_initialized() is False
