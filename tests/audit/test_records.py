"""Attacks on real records: events and scores against the curve, what a memorising model shows, what leaves the house."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from discreet import corpus, pipeline, report
from discreet.audit import records, risk
from discreet.audit.bounds import GaussianTradeOff, Verdict
from discreet.audit.records import Attacked, Means
from discreet.deid import policy as deid
from discreet.evidence.statement import Predicate
from discreet.keys import Stream
from discreet.pipeline import Silent, admission, auditing
from discreet.pipeline.house import needed_result, remember, training_policy
from discreet.record import Digest

CLAIM = GaussianTradeOff(mu=1.0)
KEY = Stream(bytes(range(32)))


def attacked(texts: list[str], members: list[bool]) -> Attacked:
    return Attacked(texts=texts, subjects=[f"S{row // 2:03d}" for row in range(len(texts))], members=np.array(members))


def test_an_event_obeys_the_curve_until_insiders_have_it_too_often() -> None:
    members_S = np.arange(200) < 100
    within = records.event([row < 30 or 100 <= row < 110 for row in range(200)], members_S, trade_off=CLAIM, level=0.05)
    beyond = records.event([row < 90 or 100 <= row < 110 for row in range(200)], members_S, trade_off=CLAIM, level=0.05)
    assert (within.beaten, beyond.beaten) == (False, True)
    assert within.cap == beyond.cap == pytest.approx(CLAIM.tpr(0.1762), abs=1e-3)  # Clopper-Pearson of 10 in 100, two-sided 5 %


def test_an_event_of_a_model_that_keeps_its_claim_seldom_alarms() -> None:
    random, members_S, alarms = np.random.default_rng(0), np.arange(120) < 60, 0
    for _ in range(300):
        happened = random.random(120) < np.where(members_S, CLAIM.tpr(0.1), 0.1)
        alarms += records.event(happened, members_S, trade_off=CLAIM, level=0.05).beaten
    assert alarms <= 15  # at most 15 expected


def test_a_model_that_memorised_people_fails_and_its_most_exposed_are_named_by_position_alone(control, untrained, canaries) -> None:
    """Canaries play the people: two sentences each, and the control has read those of the insiders again and again."""
    inside = [each.text for each in canaries if each.included]
    outside = [each.text for each in canaries if not each.included]
    size = min(len(inside), len(outside)) // 2 * 2
    people = attacked([*inside[:size], *outside[:size]], [True] * size + [False] * size)
    module, words = control
    means = Means(
        module=module, reference=untrained[0], tokenizer=words, key=KEY, references=(untrained[0],), population=canaries.texts, neighbours=1
    )
    found = records.attack(people, means, trade_off=CLAIM, level=0.05)
    assert {layer.name: layer.verdict for layer in found.layers} == {
        "records: membership": Verdict.FAIL,
        "records: recitation": Verdict.FAIL,
        "records: identifiers": Verdict.INCONCLUSIVE,  # nothing was asked
    }
    by_subject = found.layers[0].figures["by_subject"]
    assert {"loss", "zlib", "min-k", "min-k++", "reference", "rmia", "neighbourhood"} <= set(by_subject)
    assert by_subject["reference"]["auc"] == 1
    assert by_subject["reference"]["auc_cap"] == pytest.approx(0.76, abs=0.02)
    exposed = risk.ranked(found.scores, found.members, trade_off=CLAIM, count=3)
    assert len(exposed) == 3
    assert exposed[0].right_low <= exposed[0].right <= exposed[0].right_high
    assert not any(subject in json.dumps(each.figures()) for each in exposed for subject in people.subjects)
    assert "0 look at least as much" in exposed[0].sentence


def test_a_model_that_saw_nobody_passes(untrained, canaries) -> None:
    texts = canaries.texts[:80]
    people = attacked(texts, [row // 2 % 2 == 0 for row in range(80)])
    found = records.attack(people, Means(module=untrained[0], reference=untrained[0], tokenizer=untrained[1], key=KEY), trade_off=CLAIM, level=0.05)
    assert [layer.verdict for layer in found.layers] == [Verdict.PASS, Verdict.PASS, Verdict.INCONCLUSIVE]


def test_few_outsiders_say_nothing(untrained, canaries) -> None:
    people = attacked(canaries.texts[:30], [row >= 10 for row in range(30)])
    found = records.attack(people, Means(module=untrained[0], reference=untrained[0], tokenizer=untrained[1], key=KEY), trade_off=CLAIM, level=0.05)
    assert {layer.verdict for layer in found.layers} == {Verdict.INCONCLUSIVE}
    assert found.layers[0].figures == {"insiders": 10, "outsiders": 5}


def test_limits_of_ranked_people_hold_for_all_of_them_together() -> None:
    """Nobody is exposed: the first of sixty stands out by luck, and in at most one of twenty rankings its limits forget it."""
    random, missed = np.random.default_rng(1), 0
    members_S = np.arange(120) < 60
    for _ in range(200):
        exposed = risk.ranked(random.normal(size=120), members_S, trade_off=CLAIM, count=5)
        missed += any(each.right_low > 0.5 for each in exposed)
    assert missed <= 10
    with pytest.raises(ValueError, match="both sides"):
        risk.ranked([1.0, 2.0], [True, True], trade_off=CLAIM)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, new_project) -> Path:
    """The hospital of the story, of whose patients a coin withholds three in ten; audited with everything there is."""
    folder = new_project(tmp_path_factory.mktemp("records") / "hospital")
    settings = folder / "discreet.toml"
    text = settings.read_text()
    for old, new in {
        "withheld = 0.0": "withheld = 0.3",
        "references = 0": "references = 2",
        "neighbours = 0": "neighbours = 1",
        "deployed = []": 'deployed = ["bfloat16", "q8_0", "q4_0"]',
        "people = 40": "people = 24",
    }.items():
        assert old in text
        text = text.replace(old, new)
    settings.write_text(text)
    with pipeline.open_house(folder) as house:
        pipeline.run(house, until="audit", observer=Silent())
    return folder


def test_the_pipeline_attacks_real_records_and_lets_the_verdict_out_alone(project: Path) -> None:
    with pipeline.open_house(project) as house:
        [public] = house.log.select(Predicate.AUDITED)
        [inside] = house.log.select(Predicate.ATTACKED)
        layers = {layer["name"]: layer for layer in public.fields["layers"]}
        assert {layer["verdict"] for layer in inside.fields["layers"]} == {"PASS"}
        assert {layers[name]["verdict"] for name in records.NAMES} == {"INCONCLUSIVE"}, "in public: it did not fail"
        assert {json.dumps(layers[name]["figures"]) for name in records.NAMES} == {"{}"}
        assert {layers[f"deployed: {kind}"]["verdict"] for kind in ("bfloat16", "q8_0", "q4_0")} == {"PASS"}
        measured = inside.fields["layers"][0]["figures"]["by_subject"]
        assert {"lira", "rmia", "neighbourhood", "error zone"} <= set(measured)
        assert inside.fields["layers"][2]["figures"]["prompts"] == 16
        assert len(inside.fields["people"]) == 10
        built = report.of(house.log)
        page, public_page = report.render_html(built), report.render_html(built.public())
    assert "The people most exposed" in page
    assert "who were not in it" in page
    assert "Attacks on real records" not in public_page
    assert not any(each["sentence"] in public_page for each in inside.fields["people"])


def test_nobody_who_withdrew_is_attacked(project: Path, tmp_path: Path) -> None:
    shutil.copytree(project, tmp_path / "hospital")
    with pipeline.open_house(tmp_path / "hospital") as house:
        trained = needed_result(house, "train")
        before = auditing._attacked(house, trained)
        gone = {before.subjects[0], before.subjects[-1]}
        for subject in gone:
            house.consent.withdraw(subject, house.project.purpose)
        assert gone.isdisjoint(auditing._attacked(house, trained).subjects)


def test_nobody_whom_an_earlier_run_of_the_model_saw_counts_as_an_outsider(project: Path, tmp_path: Path) -> None:
    """The share that is withheld was raised before the model went on: whoever is out now was in then."""
    shutil.copytree(project, tmp_path / "hospital")
    with pipeline.open_house(tmp_path / "hospital") as house:
        trained = needed_result(house, "train")
        seen = corpus.open_snapshot(Digest(trained["snapshot"]), keyring=house.keyring, folder=house.snapshots).units.reveal()
        further = trained | {"run": "run-further", "withheld": trained["snapshot"], "snapshot": trained["withheld"]}
        assert not auditing._attacked(house, further).members.all(), "a run that goes on from none"
        with house.store.transaction() as tx:
            remember(tx, "parent/run-further", {name: trained[name] for name in ("run", "adapter", "base")})
        attacked = auditing._attacked(house, further)
    assert seen
    assert attacked.members.all()
    assert len(attacked.subjects)


def test_who_is_withheld_is_in_no_training_snapshot_and_depends_on_nobody_else(project: Path) -> None:
    with pipeline.open_house(project) as house:
        frozen = pipeline.ingest(house, Silent())
        assert frozen.withheld is not None
        inside, outside = frozen.snapshot.units.reveal(), frozen.withheld.units.reveal()
        assert not set(inside) & set(outside)
        assert 5 <= len(outside) <= 35  # of 60 patients three in ten
        source = house.catalog.register(house.project, house.project.source[0])
        admitted, _ = house.consent.admit_all(house.catalog.collect(source), house.project.purpose)
        documents = [
            deid.deidentify(each, training_policy(house, house.project.source[0]), house.keyring.subject(each.record.subject)) for each in admitted
        ]
        for document in documents[:20]:
            _, out = admission._by_coin(house, [document])
            assert bool(out) == (document.subject in outside)
