"""What a fleet agrees on and computes: the promise from the file, one site's vector, the coordinator's step, clipping that adapts, the median of groups."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from tests.conftest import on_two_ranks

from discreet import model as models
from discreet.config import ModelSection, RunSection
from discreet.dp.accounting import rdp_epsilon
from discreet.dp.discrete import ROUNDING_BETA
from discreet.errors import ConfigInvalid, PlanInvalid, SourceMissing, TermsRefused
from discreet.federated import fleet as fleets
from discreet.federated.fleet import Agreement, FleetFile, Trainer
from discreet.federated.secagg import Terms
from discreet.federated.site import agreement_for
from discreet.keys import Key, Stream
from discreet.model import PublicText
from discreet.record import Basis, Digest, Sensitive, Sensitivity
from discreet.train.parallel import ALONE, Ranks
from discreet.train.step import PrivateCorpus, tokenize

BASE = Digest("sha256:" + "0" * 64)


def fleet(**changes: Any) -> FleetFile:
    usual = {"name": "f", "sites": ("a", "b", "c", "d"), "rounds": 5, "population": 400, "expected_batch": 80, "epsilon": 4.0, "delta": 1e-3}
    return FleetFile(**{**usual, "clip_norm": 1.0, "minimum": 3, "site_bound": 40, **changes})


@lru_cache(maxsize=64)
def agree(file: FleetFile, dimension: int) -> Agreement:
    """Calibration is slow; the same file gives the same agreement (`test_the_digest_changes_with_every_key` computes one twice)."""
    return fleets.agree(file, dimension=dimension)


def terms() -> Terms:
    return Terms(session="s", number=0, members=("a",), threshold=1, minimum=1, dimension=1, bits=16, model="", roster="", plan="")


def test_the_promise_is_that_of_the_plan_and_grows_with_the_sites_of_a_person() -> None:
    agreed = agree(fleet(), 500)
    said = agreed.guarantee()
    assert said["epsilon"] <= 4.0
    assert said["epsilon"] == pytest.approx(agreed.plan.guarantee.epsilon_rdp, rel=1e-12)
    assert said["unit"] == "(patient, site)"
    assert said["epsilon"] < said["epsilon_at_sites"]["2"] < said["epsilon_at_sites"]["3"]
    assert agreed.delta == pytest.approx(1e-3 + 5 * ROUNDING_BETA)
    assert said["wrap_probability"] <= 2.0**-40
    assert "not verifiable" in said["norm_bound"]
    assert any("2^-40" in line for line in agreed.lines())


def test_colluders_and_dropouts_make_each_share_of_noise_larger() -> None:
    plain, wary = (agree(fleet(colluders=c), 500).encoding for c in (0, 2))
    assert wary.local_std / wary.sensitivity == pytest.approx(math.sqrt(3) * plain.local_std / plain.sensitivity)
    local = agree(fleet(noise="local"), 500)
    assert local.encoding.local_std / local.encoding.sensitivity == pytest.approx(local.plan.noise_multiplier)


def test_the_digest_changes_with_every_key() -> None:
    assert agree(fleet(), 500).digest == fleets.agree(fleet(), dimension=500).digest
    changed = [agree(fleet(**change), 500).digest for change in ({"colluders": 1}, {"server": "semi_honest"})]
    assert len({agree(fleet(), 500).digest, agree(fleet(), 501).digest, *changed}) == 4


BAD = [{"minimum": 5}, {"colluders": 3}, {"adaptive_quantile": 0.5}, {"local_steps": 2}, {"delta": 0.5}, {"groups": 2}, {"expected_batch": 500}]


@pytest.mark.parametrize("changes", BAD)
def test_numbers_that_break_a_rule_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanInvalid):
        agree(fleet(**changes), 500)


def test_fleet_toml_is_read_strictly(tmp_path: Path) -> None:
    with pytest.raises(SourceMissing):
        fleets.load_fleet(tmp_path)
    from importlib import resources

    content = (resources.files("discreet") / "examples" / "fleet.toml").read_text()
    (tmp_path / "fleet.toml").write_text(content)
    assert fleets.load_fleet(tmp_path).sites == ("north", "south", "west")
    (tmp_path / "fleet.toml").write_text(content + "\nepsilom = 1\n")
    with pytest.raises(ConfigInvalid, match="epsilom"):
        fleets.load_fleet(tmp_path)
    (tmp_path / "fleet.toml").write_text("[")
    with pytest.raises(ConfigInvalid, match="TOML"):
        fleets.load_fleet(tmp_path)


def test_a_model_on_the_wire_comes_back_and_another_one_is_refused() -> None:
    vector = np.arange(5, dtype=np.float32)
    payload = fleets.payload_of(vector, base=BASE, clip_norm=0.5, step=3)
    back, clip, step = fleets.read_payload(payload, base=BASE)
    assert (back.tolist(), clip, step) == (vector.tolist(), 0.5, 3)
    for broken in (payload[:-1], payload[1:], b"", fleets.payload_of(np.full(5, np.nan, np.float32), base=BASE, clip_norm=0.5)):
        with pytest.raises(TermsRefused):
            fleets.read_payload(broken, base=BASE)
    with pytest.raises(TermsRefused):
        fleets.read_payload(payload, base=Digest("sha256:" + "1" * 64))


def test_a_sites_update_is_clipped_whole_and_its_bit_says_unclipped() -> None:
    small, large = np.full(4, 0.1, np.float32), np.full(4, 10.0, np.float32)
    assert fleets.site_vector(small, with_bit=True, is_in=True)[-1] == pytest.approx(fleets.BIT_WIDTH / 2)
    assert fleets.site_vector(large, with_bit=True, is_in=True)[-1] == pytest.approx(-fleets.BIT_WIDTH / 2)
    assert np.linalg.norm(fleets.site_vector(large, with_bit=False, is_in=True)) <= 1.0
    assert not fleets.site_vector(large, with_bit=True, is_in=False).any()
    assert not fleets.site_vector(np.array([np.nan, 1], np.float32), with_bit=False, is_in=True).any()


def test_the_clip_norm_follows_the_sites_norms_in_the_right_direction() -> None:
    agreed = agree(fleet(unit="site", population=4, expected_batch=4, delta=0.1, adaptive_quantile=0.5, site_bound=1), 4)
    for clip, grows in ((0.1, True), (30.0, False)):
        trainer = Trainer.start(np.zeros(4, np.float32), clip_norm=clip)
        updates = [np.full(4, norm / 2, np.float32) for norm in (0.8, 1.0, 1.2, 1.4)]
        total = np.sum([fleets.site_vector(update / np.float32(clip), with_bit=True, is_in=True) for update in updates], axis=0)
        trainer.apply([total], agreed)
        assert (trainer.clip_norm > clip) == grows
        assert trainer.number == 1


def test_the_median_of_groups_outvotes_one_poisoned_group() -> None:
    agreed = agree(fleet(groups=3, sites=tuple("abcdefghi"), minimum=3), 4)
    trainer = Trainer.start(np.zeros(4, np.float32), clip_norm=1.0)
    good = np.full(4, 10.0, np.float32)
    trainer.apply([good, good, -1e6 * good], agreed)
    assert (trainer.parameters < 0).all()
    single = agree(fleet(sites=tuple("abc"), minimum=3), 4).encoding
    assert (agreed.encoding.local_std, agreed.encoding.noise_multiplier) == (single.local_std, single.noise_multiplier), (
        "each group has the noise of a fleet of its own"
    )
    assert fleets.groups_of("ihgfedcba", 3) == [["a", "d", "g"], ["b", "e", "h"], ["c", "f", "i"]]


def test_a_checkpoint_continues_bit_for_bit() -> None:
    agreed = agree(fleet(), 4)
    straight = Trainer.start(np.zeros(4, np.float32), clip_norm=1.0)
    for step in range(4):
        if step == 2:
            resumed = Trainer.from_bytes(straight.to_bytes())
        straight.apply([np.full(4, step + 1.0, np.float32)], agreed)
    for step in (2, 3):
        resumed.apply([np.full(4, step + 1.0, np.float32)], agreed)
    assert resumed.to_bytes() == straight.to_bytes()


def test_central_noise_is_added_before_anything_is_decoded_and_only_then() -> None:
    central = agree(fleet(noise="central"), 4000)
    nothing = np.zeros(4000, "<u2")
    noised = fleets.opened_vector(nothing, central, terms(), central=Stream(hashlib.sha256(b"c").digest()))
    assert np.std(noised) == pytest.approx(central.encoding.noise_std, rel=0.1)
    with pytest.raises(PlanInvalid):
        fleets.opened_vector(nothing, central, terms(), central=None)
    with pytest.raises(PlanInvalid):
        fleets.opened_vector(nothing, agree(fleet(), 4000), terms(), central=Stream(bytes(32)))


def test_rotation_signs_follow_the_terms() -> None:
    assert fleets.round_signs(terms()).bytes(8) == fleets.round_signs(terms()).bytes(8)
    assert fleets.round_signs(terms()).bytes(8) != fleets.round_signs(dataclasses.replace(terms(), number=1)).bytes(8)


def test_epsilon_agrees_with_what_was_published_for_a_fleet() -> None:
    """Gboard's first Spanish model with DP-FTRL: 0.81-zCDP, published as epsilon 8.9 at delta 1e-10 (Google Research, February 2022). zCDP rho is a Gaussian of multiplier
    1/sqrt(2 rho), which is also what three steps of sqrt(3) times as much noise cost."""
    event = dp_accounting.GaussianDpEvent(1 / math.sqrt(2 * 0.81))
    assert rdp_epsilon(event, delta=1e-10) == pytest.approx(8.9, abs=0.05)
    three = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(math.sqrt(3 / (2 * 0.81))), 3)
    assert rdp_epsilon(three, delta=1e-10) == pytest.approx(rdp_epsilon(event, delta=1e-10))


def test_both_matrices_of_an_adapter_or_b_alone(tmp_path: Path) -> None:
    """With A frozen the sum of the sites' updates is that of the models and half is sent; with both trained the same protocol carries both. Another layout is another plan."""
    base = tiny(tmp_path)
    digests, dimensions = set(), []
    for train in (("lora_B",), ("lora",)):
        agreed = agreement_for(fleet(), base, ModelSection(base="tiny", train=train))
        module = models.attach(base, ModelSection(base="tiny", train=train))
        vector = fleets.flatten(models.trained_parameters(module))
        dimensions.append(agreed.encoding.dimension)
        digests.add(agreed.digest)
        fleets.unflatten(module, vector + np.float32(1.0))
        assert np.array_equal(fleets.flatten(models.trained_parameters(module)), vector + np.float32(1.0))
        assert len(vector) == agreed.encoding.dimension
    assert dimensions[1] > 1.5 * dimensions[0]
    other = agreement_for(fleet(), base, ModelSection(base="tiny", train=("lora_B",), lora_targets=("q_proj", "o_proj")))
    assert len({*digests, other.digest}) == 3


# Several processes of one site


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_two_processes_of_a_site_contribute_what_one_does(tmp_path: Path) -> None:
    """The first rank answers, the other computes its share of every sum: the same integers, up to a rounding that another order of additions turned."""
    base, section = tiny(tmp_path), ModelSection(base="tiny", train=("lora_B",))
    agreed = agreement_for(fleet(population=40, expected_batch=20, delta=1e-2), base, section)
    texts = [f"a b c d {n} " * (1 + n % 3) for n in range(40)]
    units = tuple((document,) for document in tokenize(texts, base, max_tokens=16))
    corpus = PrivateCorpus(units=Sensitive(units), names=tuple(f"S{n:02d}" for n in range(40)))
    start = np.linspace(-0.1, 0.1, agreed.encoding.dimension, dtype=np.float32)
    payloads = [fleets.payload_of(start, base=base.digest, clip_norm=1.0, step=step) for step in range(2)]

    def worker(ranks: Ranks) -> fleets.Worker:
        return fleets.Worker.of(
            agreed, base=base, section=section, corpus=corpus, run_key=Key(bytes(32)), run=RunSection(token_budget=64), ranks=ranks
        )

    alone = [worker(ALONE).contribution(dataclasses.replace(terms(), number=step), payload) for step, payload in enumerate(payloads)]
    quiet = fleets.Worker.of(agreed, base=base, section=section, corpus=corpus, run_key=Key(b"\x01" * 32), run=RunSection(token_budget=64))
    assert np.mean(quiet.contribution(terms(), payloads[0]) == alone[0]) < 0.5, "noise of another key is other noise"

    def work(ranks: Ranks) -> None:
        if not ranks.writes:
            worker(ranks).assist()
            return
        first = worker(ranks)
        for step, payload in enumerate(payloads):
            together = first.contribution(dataclasses.replace(terms(), number=step), payload)
            off = (together - alone[step]).astype(np.int16)
            assert np.abs(off).max() <= 1
            assert np.mean(off == 0) > 0.99
        ranks.announce(False)

    on_two_ranks(work)


@pytest.mark.parametrize(("changes", "weights"), [({"unit": "site", "local_steps": 2}, "replicated"), ({}, "sharded")])
def test_what_several_processes_of_a_site_cannot_share_is_refused(tmp_path: Path, changes: dict[str, Any], weights: Any) -> None:
    base, section = tiny(tmp_path), ModelSection(base="tiny", train=("lora_B",))
    corpus = PrivateCorpus(units=Sensitive(()), names=())
    agreed = agreement_for(fleet(**changes), base, section)
    with pytest.raises(PlanInvalid, match="several processes"):
        fleets.Worker.of(
            agreed, base=base, section=section, corpus=corpus, run_key=Key(bytes(32)), run=RunSection(weights=weights), ranks=Ranks(rank=0, size=2)
        )


def tiny(folder: Path) -> models.Base:
    return models.build_tiny(PublicText.of(["a b c d"], sensitivity=Sensitivity.PUBLIC, basis=Basis.GENERATED), cache=folder, steps=0)


# Bounded participation


def bounded(**changes: Any) -> FleetFile:
    return fleet(noise="central", participation="bounded", separation=4, rounds=10, **changes)


def test_bounded_participation_costs_the_steps_of_one_unit_and_no_sampling() -> None:
    agreed = agree(bounded(), 200)
    said = agreed.guarantee()
    assert (said["sampling_probability"], said["steps_of_a_unit"], said["rounds"]) == (1.0, 3, 10)
    gaussian = math.sqrt(3) / said["noise_multiplier"]  # three steps are one Gaussian with as much less noise
    best = min(alpha * gaussian**2 / 2 + math.log1p(-1 / alpha) - math.log(1e-3 * alpha) / (alpha - 1) for alpha in np.linspace(1.5, 60, 4000))
    assert best <= said["epsilon"] <= 4.0
    assert [agreed.spent_steps(opened) for opened in (0, 1, 4, 5, 10)] == [0, 1, 1, 2, 3]


@pytest.mark.parametrize("changes", [{"noise": "distributed"}, {"groups": 2, "sites": tuple("abcdefgh")}, {"separation": 11}])
def test_bounded_participation_has_its_rules(changes: dict[str, Any]) -> None:
    with pytest.raises(PlanInvalid):
        agree(FleetFile(**{**bounded().model_dump(), **changes}), 200)
    with pytest.raises(PlanInvalid):
        agree(fleet(separation=2), 200)


def test_the_strategys_columns_have_norm_one_and_a_units_steps_share_no_row() -> None:
    """What the accountant relies on: for participations `separation` apart, ||C x||^2 is the number of them."""
    bands = agree(bounded(), 200).bands
    matrix = sum(value * np.eye(10, k=-band) for band, value in enumerate(bands))
    for first in range(4):
        x = np.zeros(10)
        x[first::4] = 1.0
        assert np.linalg.norm(matrix @ x) ** 2 <= len(x[first::4]) <= 3


def test_correlated_noise_is_the_inverse_of_the_strategy_and_is_drawn_again_after_a_restart() -> None:
    agreed, key = agree(bounded(), 4000), Key(bytes(32))
    noise = fleets.Correlated(agreed.bands, key)
    rows = np.stack([noise.next(agreed.encoding) for _ in range(6)])
    matrix = sum(value * np.eye(6, k=-band) for band, value in enumerate(agreed.bands))
    whitened = matrix @ rows
    std = agreed.encoding.noise_multiplier * agreed.encoding.sensitivity / agreed.encoding.scale
    assert np.std(whitened, axis=1) == pytest.approx(np.full(6, std), rel=0.06)
    assert np.abs(np.corrcoef(whitened) - np.eye(6)).max() < 5 / math.sqrt(4000)
    assert np.std(rows.sum(0)) < math.sqrt(6) * std, "running sums hold less noise than independent draws"
    again = fleets.Correlated(agreed.bands, key).at(5, agreed.encoding)
    assert np.array_equal(again.next(agreed.encoding), rows[5])
    with pytest.raises(PlanInvalid):
        fleets.opened_vector(np.zeros(4000, "<u2"), agreed, terms(), central=Stream(bytes(32)))


def test_every_unit_has_its_turn_and_only_that() -> None:
    names = tuple(f"S{n:02d}" for n in range(40))
    corpus = PrivateCorpus(units=Sensitive(tuple((torch.tensor([n, 0]),) for n in range(40))), names=names)
    worker = fleets.Worker(agreement=agree(bounded(), 200), base=None, module=None, corpus=corpus, run_key=Key(bytes(32)))  # type: ignore[arg-type]  # the draw alone
    turns = [set(worker._in_turn(step).names) for step in range(10)]
    assert set.union(*turns[:4]) == set(names)
    assert sum(map(len, turns[:4])) == 40
    assert turns[4:8] == turns[:4]
    assert min(map(len, turns)) >= 3
    with pytest.raises(TermsRefused):
        worker._in_turn(10)
