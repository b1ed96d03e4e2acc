"""The coordinator over an exchange that is lossy, late, dead or poisoned; the sites are the real protocol around a fixed vector."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from discreet.dp import discrete
from discreet.errors import DiscreetError, RoundAborted
from discreet.federated import fleet as fleets
from discreet.federated import secagg, transcript
from discreet.federated import site as parts
from discreet.federated.fleet import Agreement, FleetFile, Trainer
from discreet.federated.journal import Journal
from discreet.federated.masks import WORD
from discreet.federated.secagg import Policy, Roster
from discreet.keys import Key, Stream
from discreet.record import Digest
from discreet.store import Store

D = 64
BASE = Digest("sha256:" + "0" * 64)


class Quiet:
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.figures: list[Mapping[str, object]] = []

    def note(self, line: str) -> None:
        self.notes.append(line)

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None:
        self.figures.append(figures)


BOUNDED = {"noise": "central", "participation": "bounded", "separation": 2}


@lru_cache
def agreement(groups: int, minimum: int, bounded: bool) -> Agreement:
    usual: dict[str, Any] = {
        "name": "f",
        "sites": tuple("abcdef"),
        "rounds": 3,
        "population": 600,
        "expected_batch": 120,
        "epsilon": 8.0,
        "delta": 1e-3,
        **(BOUNDED if bounded else {}),
    }
    return fleets.agree(FleetFile(**usual, clip_norm=1.0, site_bound=40, minimum=minimum, groups=groups, learning_rate=0.1), dimension=D)


class Fleet:
    """Six sites that always contribute the same vector, as an exchange. `lost` answers nothing from a stage on; `dies_at` counts exchanges."""

    def __init__(self, folder: Path, *, groups: int = 1, minimum: int = 4, bounded: bool = False) -> None:
        self.folder, self.agreement = folder, agreement(groups, minimum, bounded)
        self.identities = {name: Ed25519PrivateKey.from_private_bytes(hashlib.sha256(name.encode()).digest()) for name in "abcdef"}
        self.here, self.lost, self.dies_at = set("abcdef"), dict[str, str](), 0
        self.vectors = {name: np.full(D, 2.0, np.float32) for name in "abcdef"}
        keys = parts.coordinator_keys(folder)
        server = keys.signer("federation").public_key().public_bytes_raw()
        roster = Roster(server=server, clients={name: key.public_key().public_bytes_raw() for name, key in self.identities.items()})
        self.session = parts.Session(id="s", roster=roster)
        self.members: dict[str, Any] = {}
        self.kept: dict[str, dict[str, bytes]] = {name: {} for name in "abcdef"}
        self.receipts: dict[str, list[secagg.Receipt]] = {name: [] for name in "abcdef"}
        self.journals = {name: Journal(Store(f"sqlite:///{folder}/{name}.db")) for name in "abcdef"}
        self.stages: list[str] = []

    def coordinator(self) -> parts.Coordinator:
        return parts.Coordinator(
            folder=self.folder,
            agreement=self.agreement,
            session=self.session,
            base=BASE,
            keyring=parts.coordinator_keys(self.folder),
            trainer=Trainer.start(np.zeros(D, np.float32), clip_norm=1.0),
            observer=Quiet(),
        )

    def present(self) -> set[str]:
        return set(self.here)

    def __call__(self, requests: Mapping[str, bytes], *, enough: int) -> Mapping[str, bytes]:
        replies, kind = {}, secagg.kind_of(next(iter(requests.values())))
        self.stages.append(kind)
        for name, request in requests.items():
            if not (name in self.lost and kind in secagg.STAGES and secagg.STAGES.index(self.lost[name]) <= secagg.STAGES.index(kind)):
                replies[name] = self.answer(name, kind, request)
        self.dies_at -= 1
        if self.dies_at == 0:
            raise KeyboardInterrupt
        return replies

    def answer(self, name: str, kind: str, request: bytes) -> bytes:
        if kind == "close":
            _, *entries = secagg.parts(secagg.checked_body(secagg.open_frame(request, self.session.roster.server, kind="close", terms=None)))
            transcript.verify(entries, roster=self.session.roster, name=name, receipts=self.receipts[name])
            said = {"kind": "receipt", "from": name, "valid": True, "failed": [], "rounds": len(self.receipts[name]), "head": ""}
            return secagg.sealed_frame(self.identities[name], said)
        kept = self.kept[name]
        if kind == "announce":
            kept.clear()
        # As a site does it: a stage that is asked again is answered by a member that takes the round up from its journal.
        for attempt in ("going on", "anew"):
            try:
                if kind == "announce" or attempt == "anew":
                    self.members[name] = self.member(name)
                    for stage in secagg.STAGES[: secagg.STAGES.index(kind)]:
                        self.members[name].send(kept[stage])
                reply = bytes(self.members[name].send(request))
            except (DiscreetError, StopIteration, KeyError):
                continue
            kept[kind] = request
            if kind == "agreement":
                with pytest.raises(StopIteration) as end:
                    self.members[name].send(b"")
                self.receipts[name] = [*[r for r in self.receipts[name] if r.number != end.value.value.number], end.value.value]
            return reply
        return b""

    def member(self, name: str) -> Any:
        def contribution(terms: secagg.Terms, payload: bytes) -> Any:
            secret = Stream(hashlib.sha256(f"{name} {terms.number}".encode()).digest())
            integers = discrete.encode(self.vectors[name], self.agreement.encoding, signs=fleets.round_signs(terms), secret=secret)
            return (integers & 0xFFFF).astype(WORD[16])

        fleet = self.agreement.fleet
        policy = Policy(
            roster=self.session.roster, session="s", plan=self.agreement.digest, minimum=fleet.minimum, dimension=D, bits=16, rounds=fleet.rounds
        )
        generator = secagg.client(
            contribution,
            name=name,
            identity=self.identities[name],
            policy=policy,
            stream=Key(bytes(32)).stream(name),
            journal=self.journals[name],
        )
        next(generator)
        return generator


def test_rounds_go_on_with_who_is_there_and_the_view_says_what_was_spent(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.lost = {"f": "delivery"}
    run = fleet.coordinator()
    result = run.run(fleet)
    assert (result["rounds"], result["aborted"], result["absent"]) == (3, 0, [])
    assert [figure["clients"] for figure in run.observer.figures] == [5, 5, 5]  # type: ignore[attr-defined]  # Quiet keeps them
    for way, sent in (("up", result["bytes_up"]), ("down", result["bytes_down"])):
        shown = [float(str(figure[way]).removesuffix(" kB")) for figure in run.observer.figures]  # type: ignore[attr-defined]
        assert shown == sorted(shown)
        assert 0 < shown[-1] <= sent / 1e3 + 0.5
    spent = [float(str(figure["epsilon"])) for figure in run.observer.figures]  # type: ignore[attr-defined]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(result["guarantee"]["epsilon"], abs=0.01)
    assert (run.trainer.parameters < 0).all(), "five sites pull the same way, noise or not"


@pytest.mark.parametrize("dies_at", range(1, 17))
def test_a_coordinator_killed_after_any_message_loses_no_round(tmp_path: Path, dies_at: int) -> None:
    """Killed when the replies to the n-th batch have come and before it could keep them; a second coordinator goes on where it was."""
    fleet = Fleet(tmp_path)
    fleet.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        fleet.coordinator().run(fleet)
    run = fleet.coordinator()
    result = run.run(fleet)
    assert (result["rounds"], result["aborted"]) == (3, 0)
    assert all(receipt["valid"] and receipt["rounds"] == 3 for receipt in result["receipts"].values())
    assert len(run.entries) == 3
    assert not list(run.place.glob("round-*"))


def test_a_round_that_aborts_costs_a_number_and_nothing_else(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    run = fleet.coordinator()
    fleet.lost = dict.fromkeys("ab", "delivery")  # 4 of 6 is below the 5 that a malicious server needs
    run._round(fleet)
    assert (run.trainer.number, run.attempts) == (0, 1)
    fleet.lost = {}
    result = run.run(fleet)
    assert (result["rounds"], result["aborted"]) == (3, 1)


def test_the_last_stage_is_asked_again_because_what_was_revealed_is_paid_for(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    fleet.lost = dict.fromkeys("ab", "agreement")
    answered = fleet.answer

    def once_late(name: str, kind: str, request: bytes) -> bytes:
        if kind == "agreement":
            fleet.lost = {}
        return answered(name, kind, request)

    fleet.answer = once_late  # type: ignore[method-assign]
    result = fleet.coordinator().run(fleet)
    assert (result["rounds"], result["aborted"]) == (3, 0)
    assert fleet.stages[:6].count("agreement") == 2


def test_a_run_waits_for_enough_sites_and_gives_up_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = Fleet(tmp_path)
    fleet.here = set("abc")
    monkeypatch.setattr(parts, "WAIT_S", 0.0)
    run = fleet.coordinator()
    with pytest.raises(RoundAborted, match="at least 4 sites"):
        run.run(fleet)
    assert run.attempts == 0
    fleet.here = set("abcdef")
    fleet.lost = dict.fromkeys("abcdef", "announce")
    with pytest.raises(RoundAborted, match="10 aborted"):
        run.run(fleet)


def test_the_median_of_noised_group_sums_outvotes_a_poisoned_group(tmp_path: Path) -> None:
    """Three groups of two; each sum is opened, noised and entered in the transcript on its own; one site sends the opposite at full weight."""
    fleet = Fleet(tmp_path, groups=3, minimum=2)
    fleet.vectors["a"] = np.full(D, -5.0, np.float32)
    run = fleet.coordinator()
    result = run.run(fleet)
    assert (result["rounds"], len(run.entries)) == (3, 9)
    assert np.mean(run.trainer.parameters < 0) > 0.9
    assert result["guarantee"]["minimum"] == 2
    assert all(receipt["valid"] for receipt in result["receipts"].values())


def test_nothing_on_the_coordinators_disk_or_in_the_transcript_opens_a_noise_free_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Central noise: neither the sum nor its digest before the noise, nor a share that opens it, is written or told anybody."""
    fleet = Fleet(tmp_path)
    file = fleet.agreement.fleet.model_copy(update={"noise": fleets.Noise.CENTRAL})
    fleet.agreement = fleets.agree(file, dimension=D)
    bare: list[bytes] = []
    open_ = fleets.opened_vector

    def listen(total: Any, *arguments: Any, **more: Any) -> Any:
        bare.append(total.tobytes())
        on_disk.extend(path.name for path in run.place.rglob("*") if path.is_file())
        return open_(total, *arguments, **more)

    on_disk: list[str] = []
    monkeypatch.setattr(fleets, "opened_vector", listen)
    run = fleet.coordinator()
    run.run(fleet)
    assert len(bare) == 3
    assert {"delivery", "survivors"} <= set(on_disk)
    assert "agreement" not in on_disk
    told = b"".join(run.entries) + b"".join(path.read_bytes() for path in run.place.rglob("*") if path.is_file())
    for total in bare:
        assert total not in told
        assert hashlib.sha256(total).hexdigest().encode() not in told


@pytest.mark.parametrize("dies_at", [8, 13])
def test_a_bounded_session_spends_the_steps_of_one_unit_and_its_noise_survives_the_coordinator(tmp_path: Path, dies_at: int) -> None:
    """Three steps, a unit in every second one: two of its own are paid for. A killed coordinator draws the correlated noise of the steps before again, to the bit."""
    first = Fleet(tmp_path, bounded=True)
    parts.coordinator_keys(tmp_path).purpose("federation-noise")  # made at its first use: here, so that the copy has it too
    shutil.copytree(tmp_path, tmp_path / "copy")
    run = first.coordinator()
    result = run.run(first)
    assert (result["rounds"], result["aborted"], result["guarantee"]["steps_of_a_unit"]) == (3, 0, 2)
    spent = [float(str(figure["epsilon"])) for figure in run.observer.figures]  # type: ignore[attr-defined]  # Quiet keeps them
    assert spent[0] == spent[1] < spent[2] == pytest.approx(result["guarantee"]["epsilon"], abs=0.01)
    second = Fleet(tmp_path / "copy", bounded=True)
    second.dies_at = dies_at
    with pytest.raises(KeyboardInterrupt):
        second.coordinator().run(second)
    again = second.coordinator()
    again.run(second)
    assert np.array_equal(again.trainer.parameters, run.trainer.parameters)
    assert all(receipt["valid"] for receipt in result["receipts"].values())
