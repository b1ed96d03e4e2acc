"""A search: tries fixed beforehand, independent settings, one winner, resumed where it was killed, one charge."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from discreet import pipeline
from discreet.config import SearchSection, TrainSection
from discreet.dp.mechanism import Plan, calibrate
from discreet.errors import Forgotten, NothingLearned
from discreet.evidence.statement import Predicate
from discreet.governance import erasure
from discreet.keys import Key
from discreet.pipeline import erasing, training
from discreet.record import Digest
from discreet.train import search
from discreet.train.loop import Trained

RATES = (0.001, 0.002, 0.004, 0.008)
GRID = SearchSection(tries="negative_binomial", mean=8.0, learning_rate=RATES)


def planned(section: SearchSection) -> Plan:
    return calibrate(epsilon=8.0, delta=1e-3, population=100, expected_batch=10, steps=2, clip_norm=1.0, search=search.declared(section))


class Lab:
    """Runs that do nothing but remember what they were asked for."""

    def __init__(self, folder: Path, plan: Plan, loss: Callable[[float], float]) -> None:
        self.folder, self.plan, self.loss = folder, plan, loss
        self.rates: list[float] = []
        self.dropped: set[int] = set()
        self.dies_after = 10**6

    def run(self, number: int, train: TrainSection, adapter: Path) -> Trained:
        if len(self.rates) >= self.dies_after:
            raise KeyboardInterrupt
        adapter.mkdir(parents=True)
        (adapter / "weights").write_text(f"{train.learning_rate}")
        self.rates.append(train.learning_rate)
        nothing = Digest("sha256:" + "00" * 32)
        return Trained(
            adapter=adapter,
            adapter_digest=nothing,
            base_digest=nothing,
            guarantee=self.plan.guarantee,
            steps=2,
            curve=((2, self.loss(train.learning_rate)),),
            plan=self.plan.digest,
            snapshot=nothing,
            reservation="r1",
        )

    def search(self, section: SearchSection, key: int = 1) -> search.Winner[Trained]:
        return search.search(
            self.plan,
            section,
            train=TrainSection(),
            run=self.run,
            drop=self.dropped.add,
            score=search.public_score,
            run_key=Key(key.to_bytes(32, "little")),
            folder=self.folder,
        )


def searched(
    folder: Path, section: SearchSection = GRID, *, key: int = 1, loss: Callable[[float], float] = lambda rate: abs(rate - 0.002)
) -> tuple[Lab, search.Winner[Trained]]:
    lab = Lab(folder / f"{key}", planned(section), loss)
    return lab, lab.search(section, key)


def test_only_the_winner_is_left(tmp_path: Path) -> None:
    lab, winner = searched(tmp_path, key=3)
    tried = lab.rates[:-1]
    assert len(tried) > 1
    assert winner.chosen == {"learning_rate": min(tried, key=lambda rate: abs(rate - 0.002))}
    assert lab.rates[-1] == winner.chosen["learning_rate"]  # taken from its checkpoint, not trained again
    assert [path.name for path in lab.folder.iterdir() if path.is_dir()] == ["adapter"]
    assert len(lab.dropped) == len(tried) - 1
    search.forget(lab.folder)
    assert [path.name for path in lab.folder.iterdir()] == ["adapter"]


def test_tries_and_settings_depend_on_no_score(tmp_path: Path) -> None:
    """What repeated selection asks for: whatever the scores, the same number of tries with the same settings; over keys, uniform and independent."""
    lists = []
    for key in range(1, 41):
        falling = searched(tmp_path / "a", key=key)[0].rates[:-1]
        assert falling == searched(tmp_path / "b", key=key, loss=lambda rate: -rate)[0].rates[:-1]
        lists.append(falling)
    assert 4 < sum(map(len, lists)) / 40 < 13
    counts = [sum(found.count(rate) for found in lists) for rate in RATES]
    assert min(counts) > 0.6 * sum(counts) / 4
    assert any(len(set(found)) < len(found) for found in lists)  # with replacement


def test_a_grid_tries_every_candidate_once_and_a_guided_search_learns(tmp_path: Path) -> None:
    each = SearchSection(tries="each", learning_rate=RATES, warmup_steps=(0, 5))
    assert len(search.candidates(each)) == 8
    assert planned(each).search.mean == 8.0
    lab, _ = searched(tmp_path / "each", each)
    assert sorted(lab.rates[:-1]) == sorted(RATES * 2)
    many = tuple(0.001 * 1.3**power for power in range(20))
    guided = SearchSection(tries="guided", mean=8.0, learning_rate=many)
    for goal in (3, 16):
        lab, winner = searched(tmp_path / f"guided-{goal}", guided, loss=lambda rate, goal=goal: abs(many.index(rate) - goal) ** 2)
        assert len(lab.rates[:-1]) == len(set(lab.rates[:-1])) == 8
        assert abs(many.index(winner.chosen["learning_rate"]) - goal) <= 1


def test_a_killed_search_goes_on_with_the_same_tries(tmp_path: Path) -> None:
    whole, winner = searched(tmp_path / "whole", key=3)
    lab = Lab(tmp_path / "torn", planned(GRID), lambda rate: abs(rate - 0.002))
    for number in range(1, len(whole.rates)):
        lab.dies_after = number
        with pytest.raises(KeyboardInterrupt):
            lab.search(GRID, 3)
    lab.dies_after = 10**6
    assert lab.search(GRID, 3).chosen == winner.chosen
    assert lab.rates == whole.rates


def test_no_try_is_an_error_and_another_search_is_refused(tmp_path: Path) -> None:
    poisson = SearchSection(tries="poisson", mean=1.0, learning_rate=RATES)
    plan = planned(poisson)
    none = next(
        key for key in range(1, 50) if plan.search.number(float(search.csprng.uniform(Key(key.to_bytes(32, "little")).stream("tries"), 1))) == 0
    )
    with pytest.raises(NothingLearned, match="at least one try"):
        searched(tmp_path, poisson, key=none)
    with pytest.raises(ValueError, match="pays for the search"):
        Lab(tmp_path / "x", plan, lambda rate: rate).search(GRID)
    assert search.public_score(
        0, dataclasses.replace(Lab(tmp_path / "y", plan, float).run(0, TrainSection(), tmp_path / "z"), curve=((1, float("nan")),))
    ) == float("inf")


def test_a_search_is_one_charge_and_its_losers_leave_no_trace(
    tmp_path: Path, new_project: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the stored result and the destruction of its key, too."""

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    folder = new_project(tmp_path / "hospital")
    with (folder / "discreet.toml").open("a") as file:
        file.write('\n[search]\ntries = "each"\nlearning_rate = [0.002, 0.01]\nscore = "private"\nscore_epsilon = 0.5\n')
    with pipeline.open_house(folder) as house:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(training, "_close_run", killed)
            pipeline.train(house, pipeline.Silent())
        assert not house.log.select(Predicate.KEY_DESTROYED)
        result = pipeline.train(house, pipeline.Silent())
        with pytest.raises(Forgotten):
            house.keyring.run(result["run"])
        assert set(result["chosen"]) == {"learning_rate"}
        assert result["guarantee"]["search"] == {"tries": "each", "mean": 2.0, "shape": 1.0, "score_epsilon": 0.5}
        transcript = dataclasses.replace(erasing._transcript(result["guarantee"]), unit="record")
        assert erasure.group_epsilon(transcript, 2) == float("inf"), "no bound for a group follows from the price of a search"
        spent = house.log.select(Predicate.SPENT)
        assert [entry.fields["kind"] for entry in spent] == ["search"]
        trained = next(entry for entry in house.log.select(Predicate.TRAINED) if entry.fields["track"] == "dp")
        assert (trained.fields["kind"], trained.fields["chosen"]) == ("winner of a search", result["chosen"])
        runs = folder / ".discreet" / "runs"
        assert {path.name for path in (runs / result["run"]).iterdir()} <= {"adapter", "private"}
        assert not [path for path in runs.rglob("*") if path.is_file() and "adapter" not in path.parts]
        assert pipeline.train(house, pipeline.Silent()) == result
        with house.store.transaction() as tx:
            assert tx.execute(text("select count(*) from reservations where kind = 'search'")).scalar_one() == 1
