"""Who may open, raise, spend and read budgets, rotate the log's key, export evidence, and go on after a rollback: deny by default, two people for a raise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from discreet import duties, pipeline
from discreet.deid import policy as deid
from discreet.errors import AccessDenied, BudgetExhausted, EvidenceInvalid, NotFound, OperationFailed, PlanInvalid, RecordInvalid, RequestInvalid
from discreet.evidence.log import verify_bundle, verify_certificate
from discreet.evidence.statement import Predicate
from discreet.governance import residue
from discreet.governance.access import Action, Principal
from discreet.ledger import Kind
from discreet.pipeline import House, admission, erasing, people, pricing, releasing, story, training

TOML = """
[project]
name = "ward"
controller = "General Hospital"
purpose = "note-assistant"
[access]
owner = ["olga"]
engineer = ["emil"]
privacy_officer = ["petra"]
auditor = ["axel"]
product = ["pia"]
[erasure]
answer_seconds = 0
[[source]]
name = "held-out"
path = "held.jsonl"
owner = "us"
sensitivity = "public"
purposes = ["note-assistant"]
basis = "generated"
role = "evaluation"
"""

As = Callable[[str], AbstractContextManager[House]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "discreet.toml").write_text(TOML)
    (tmp_path / "held.jsonl").write_text('{"id": "1", "text": "The patient was seen for a cough."}\n')
    return tmp_path


@pytest.fixture
def acting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> As:
    @contextmanager
    def as_(name: str) -> Iterator[House]:
        for module in (duties, admission, erasing, people, pricing, releasing, story):
            monkeypatch.setattr(module, "current_user", lambda: Principal(name))
        with pipeline.open_house(folder) as house:
            yield house

    return as_


def budget(house: House, name: str = "queries", epsilon: float = 1.0) -> None:
    duties.open_budget(house, name, epsilon=epsilon, delta=1e-6, unit="patient", query_delta=0.0, period=None)


def pairs(folder: Path) -> Path:
    (folder / "pairs.csv").write_text("subject,same_as\nS-2,S-1\n")
    return folder / "pairs.csv"


DUTIES: dict[str, tuple[Callable[[House, Path], object], set[str]]] = {
    "open": (lambda house, _: budget(house, "other"), {"olga"}),
    "reserve": (lambda house, _: duties.reserve(house, "queries", epsilon=0.01, delta=0.0, kind=Kind.STATISTICS), {"emil"}),
    "show": (lambda house, _: duties.show_budgets(house, None), {"olga", "emil", "petra", "axel"}),
    "plan": (lambda house, _: duties.plan(house, "queries", sampling_probability=0.01, noise_multiplier=2.0), {"olga", "emil", "petra", "axel"}),
    "rotate": (lambda house, out: duties.rotate_key(house, out / "log.pub"), {"olga"}),
    "tiles": (lambda house, out: duties.tiles(house, out / "tiles"), {"olga", "emil", "petra", "axel"}),
    "export": (lambda house, out: pipeline.export_evidence(house, out / "bundle", public=True), {"olga", "emil", "petra", "axel"}),
    "evidence": (lambda house, out: duties.export_evidence(house, out / "evidence", public=True), {"olga", "emil", "petra", "axel"}),
    "same person": (lambda house, out: duties.same_person(house, pairs(out)), {"petra"}),
    "erase": (lambda house, _: pipeline.erase(house, "nobody"), {"petra"}),
}


@pytest.mark.parametrize("duty", DUTIES)
def test_each_duty_is_somebodys_and_nobody_elses(acting: As, tmp_path: Path, duty: str) -> None:
    do, may = DUTIES[duty]
    with acting("olga") as house:
        budget(house)
    for name in ("olga", "emil", "petra", "axel", "pia", "stranger"):
        with acting(name) as house:
            if name in may:
                do(house, tmp_path)
            else:
                with pytest.raises(AccessDenied):
                    do(house, tmp_path)


def test_a_raise_needs_its_owner_and_a_second_person_for_exactly_that(acting: As) -> None:
    with acting("olga") as house:
        budget(house)
        with pytest.raises(AccessDenied, match="approve"):
            duties.raise_budget(house, "queries", epsilon=2.0, reason="the board decided")
        house.access.propose(Action.RAISE_BUDGET, who=Principal("olga"), about="queries to 2")
        with pytest.raises(AccessDenied):
            house.access.approve(Action.RAISE_BUDGET, who=Principal("olga"), about="queries to 2")
        house.access.approve(Action.RAISE_BUDGET, who=Principal("petra"), about="queries to 2")
        with pytest.raises(AccessDenied):
            duties.raise_budget(house, "queries", epsilon=20.0, reason="the board decided")
        with pytest.raises(PlanInvalid):
            duties.raise_budget(house, "queries", epsilon=2.0, reason=" ")
        assert duties.raise_budget(house, "queries", epsilon=2.0, reason="the board decided")["epsilon"] == 2.0
        with pytest.raises(AccessDenied):
            duties.raise_budget(house, "queries", epsilon=2.0, reason="again")
    with acting("emil") as house, pytest.raises(AccessDenied):
        duties.raise_budget(house, "queries", epsilon=3.0, reason="an engineer")


def test_a_run_opens_no_budget_for_whoever_may_not(acting: As, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training opens the budget of discreet.toml the first time: that stays the owner's."""
    monkeypatch.setattr(training, "calibrate", lambda house, snapshot: _Planned)
    monkeypatch.setattr(training, "refuse_unaffordable", lambda house, plan, snapshot: None)
    with acting("emil") as house, pytest.raises(AccessDenied, match="open budget"):
        training._reserve(house, _Frozen)  # type: ignore[arg-type]


class _Planned:
    delta, unit, digest = 1e-6, "patient", "sha256:" + "0" * 64


class _Frozen:
    root = "sha256:" + "1" * 64


def test_a_restored_database_is_refused_until_the_officer_accepts_the_loss(acting: As, folder: Path) -> None:
    with acting("olga") as house:
        budget(house)
    for part in folder.glob(".discreet/discreet.db*"):
        shutil.copy(part, folder / f"backup-{part.name}")
    with acting("emil") as house:
        duties.reserve(house, "queries", epsilon=0.9, delta=0.0, kind=Kind.STATISTICS)
        with pytest.raises(BudgetExhausted):
            duties.reserve(house, "queries", epsilon=0.9, delta=0.0, kind=Kind.STATISTICS)
    for part in folder.glob(".discreet/discreet.db*"):
        part.unlink()
    for part in folder.glob("backup-discreet.db*"):
        shutil.copy(part, folder / ".discreet" / part.name.removeprefix("backup-"))
    with pytest.raises(EvidenceInvalid, match="accept-rollback"), acting("emil"):
        pytest.fail("a spent budget came back")
    with pytest.raises(AccessDenied):
        duties.accept_rollback(folder, by="Emil", reason="I need the budget")
    with pytest.raises(EvidenceInvalid), acting("petra"):
        pytest.fail("still refused")
    with pytest.raises(PlanInvalid):
        duties.accept_rollback(folder, by="", reason="")
    duties.accept_rollback(folder, by="Petra", reason="the disk broke; the budget is retired")
    with acting("axel") as house:
        [said] = house.log.select(Predicate.OVERRIDDEN)
        assert said.fields["by"] == "Petra"


def test_a_withdrawal_is_missed_in_a_restored_backup(acting: As, folder: Path) -> None:
    """It is recorded without the project's lock, as while a model is trained, and pinned all the same."""
    with acting("olga") as house:
        budget(house)
    with acting("petra"):
        shutil.copytree(folder / ".discreet", folder / "backup", ignore=shutil.ignore_patterns("suppressions*"))
    with pipeline.open_house(folder, exclusive=False) as house:
        house.consent.withdraw(pipeline.may_record_consent(house, "P-1"))
    shutil.copytree(folder / "backup", folder / ".discreet", dirs_exist_ok=True)
    with pytest.raises(EvidenceInvalid, match="accept-rollback"), pipeline.open_house(folder):
        pytest.fail("nobody withdrew")


def test_the_pairs_of_one_person_and_their_statement_are_there_together_or_not_at_all(
    acting: As, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with acting("petra") as house:
        with monkeypatch.context() as broken:
            broken.setattr(house.log, "append", lambda tx, statement: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                duties.same_person(house, pairs(folder))
        with house.store.transaction() as tx:
            assert house.keyring.second_identifiers(tx) == {}
        assert duties.same_person(house, pairs(folder)) == 1
        [said] = house.log.select(Predicate.CONSENT_CHANGED)
        assert said.fields["pairs"] == 1


def test_who_withdrew_a_moment_ago_is_nobodys_second(acting: As, folder: Path) -> None:
    """The officer's keyring was opened before; the word counts that is there when the pair is written."""
    with acting("petra") as house, pipeline.open_house(folder, exclusive=False) as beside:
        beside.consent.withdraw(pipeline.may_record_consent(beside, "S-2"), None)
        with pytest.raises(RecordInvalid, match="pair 1"):
            duties.same_person(house, pairs(folder))
        with house.store.transaction() as tx:
            assert house.keyring.second_identifiers(tx) == {}


@pytest.mark.parametrize("export", [pipeline.export_evidence, duties.export_evidence])
def test_a_file_that_is_no_earlier_key_is_not_written_over(acting: As, tmp_path: Path, export: Callable[..., tuple[Path, Path]]) -> None:
    (tmp_path / "bundle.pub").write_text("ssh-ed25519 AAAA somebody")
    with acting("olga") as house, pytest.raises(OperationFailed, match="public key"):
        export(house, tmp_path / "bundle", public=False)
    assert (tmp_path / "bundle.pub").read_text() == "ssh-ed25519 AAAA somebody"
    assert not (tmp_path / "bundle").exists()


def test_a_certificate_is_checked_with_the_key_alone(acting: As, folder: Path, tmp_path: Path) -> None:
    with acting("petra") as house:
        done = pipeline.erase(house, "somebody")
        key = house.log.public_key()
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(done))
    entry, _ = verify_certificate(path, public_key=key)
    assert (entry.predicate, entry.subjects) == (Predicate.ERASED, (done["subject"],))
    with acting("olga") as house:
        keys = str(duties.rotate_key(house, tmp_path / "log.pub")["keys"][0])
        bundle, _ = pipeline.export_evidence(house, tmp_path / "bundle", public=False)
    assert keys == key
    verify_certificate(path, public_key=(tmp_path / "log.pub").read_text())
    verify_bundle(bundle, public_key=key)
    for broken in (
        json.dumps(done | {"proof": done["proof"].replace(f"index {done['certificate']}", "index 0")}),
        json.dumps(done | {"statement": done["statement"].replace("A", "B", 1)}),
        json.dumps(done)[:-1] + ', "proof": ""}',
        "[]",
        "{",
    ):
        path.write_text(broken)
        with pytest.raises(EvidenceInvalid):
            verify_certificate(path, public_key=key)


def test_an_unknown_budget_is_not_raised(acting: As) -> None:
    with acting("olga") as house, pytest.raises(NotFound):
        duties.raise_budget(house, "nothing", epsilon=2.0, reason="none")


def test_re_identification_is_denied_by_default_needs_two_people_once_and_says_so(acting: As) -> None:
    """Emil (engineer) proposes, Petra (officer) approves, for one person; the log keeps who, how many and an HMAC, never the person or a value."""
    who, value = "MRN-4711", "quistgaard@example.org"
    with acting("emil") as house:
        subject, key = pipeline.subject_key(house, who)
        text = deid.redact(f"Write to {value}.", "token", key=key, subject=subject).text
        pipeline.subject_key(house, "MRN-2")
    assert value not in text
    for name in ("olga", "emil", "petra", "axel", "pia", "stranger"):
        with acting(name) as house, pytest.raises(AccessDenied):
            pipeline.restore_tokens(house, who, text, policy="token")
    for name in ("olga", "petra", "axel", "pia", "stranger"):
        with acting(name) as house, pytest.raises(AccessDenied):
            duties.propose(house, Action.REIDENTIFY, who)
    with acting("emil") as house:
        duties.propose(house, Action.REIDENTIFY, who)
        with pytest.raises(AccessDenied):
            duties.approve(house, Action.REIDENTIFY, who)
    for name in ("olga", "axel", "pia", "stranger"):
        with acting(name) as house, pytest.raises(AccessDenied):
            duties.approve(house, Action.REIDENTIFY, who)
    with acting("petra") as house:
        duties.approve(house, Action.REIDENTIFY, who)
        with pytest.raises(AccessDenied):
            pipeline.restore_tokens(house, who, text, policy="token")
    with acting("emil") as house:
        with pytest.raises(AccessDenied):
            pipeline.restore_tokens(house, "MRN-2", text, policy="token")
        assert pipeline.restore_tokens(house, who, text, policy="token") == (f"Write to {value}.", 1)
        with pytest.raises(AccessDenied):
            pipeline.restore_tokens(house, who, text, policy="token")
        approved, opened = house.log.select(Predicate.ACCESS_GRANTED)
        assert (approved.fields["by"], approved.fields["proposed_by"]) == ("petra", "emil")
        assert {name: opened.fields[name] for name in ("kind", "by", "values", "role")} == {
            "kind": "re-identification",
            "by": "emil",
            "values": 1,
            "role": "engineer",
        }
        assert opened.subjects == (approved.fields["about"],)
        house.store.close()
        assert residue.find(house.project.state, [who, value]) == []
        for entry in (approved, opened):
            assert subject not in entry.envelope.decode()
            assert not entry.predicate.public


def test_what_an_approval_is_for_has_a_closed_form(acting: As) -> None:
    with acting("olga") as house:
        for action, about in ((Action.RELEASE, "the model of Aurelia Quistgaard"), (Action.RAISE_BUDGET, "queries for Aurelia Quistgaard")):
            with pytest.raises(RequestInvalid) as refused:
                duties.propose(house, action, about)
            assert "Quistgaard" not in str(refused.value)
        duties.propose(house, Action.RAISE_BUDGET, "queries to 2")


REASON, NAMED = "Dr. Aurelia Quistgaard asked for it, SSN 536-22-8145, aurelia@example.org", ("Quistgaard", "536-22-8145", "aurelia@example.org")


def test_a_reason_reaches_the_log_without_identifiers(acting: As, folder: Path) -> None:
    """Of a raised budget, a broken glass, and a rollback that somebody accepted."""
    with acting("olga") as house:
        budget(house)
        duties.propose(house, Action.RAISE_BUDGET, "queries to 2")
    with acting("petra") as house:
        duties.approve(house, Action.RAISE_BUDGET, "queries to 2")
        duties.break_glass(house, Action.RUN, REASON)
    with acting("olga") as house:
        duties.raise_budget(house, "queries", epsilon=2.0, reason=REASON)
    with acting("petra"):
        pass
    duties.accept_rollback(folder, by="Petra", reason=REASON)
    with acting("axel") as house:
        said = [house.log.select(kind)[-1] for kind in (Predicate.BUDGET_RAISED, Predicate.ACCESS_GRANTED, Predicate.OVERRIDDEN)]
        assert all("asked for it" in entry.fields["reason"] for entry in said)
        house.store.close()
        assert residue.find(house.project.state, NAMED) == []
