"""What a fleet agrees on and computes: the promise from the file, one site's vector, the coordinator's step, clipping that adapts, the median of groups."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from discreet.dp.discrete import ROUNDING_BETA
from discreet.errors import ConfigInvalid, PlanInvalid, SourceMissing, TermsRefused
from discreet.federated import fleet as fleets
from discreet.federated.fleet import Agreement, FleetFile, Trainer
from discreet.federated.secagg import Terms
from discreet.keys import Stream
from discreet.record import Digest

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
    assert said["epsilon"] == pytest.approx(agreed.plan.guarantee.epsilon_rdp)
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
    payload = fleets.payload_of(vector, base=BASE, clip_norm=0.5)
    back, clip = fleets.read_payload(payload, base=BASE)
    assert (back.tolist(), clip) == (vector.tolist(), 0.5)
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
