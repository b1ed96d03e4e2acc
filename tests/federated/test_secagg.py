"""The protocol against dropouts at every stage and against a server that lies: each lie is refused by name, and no share leaves."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.errors import DiscreetError, MessageReplayed, PeerRefused, RoundAborted, SurvivorsRefused, TermsRefused
from discreet.federated import masks, secagg
from discreet.federated.journal import Journal
from discreet.federated.secagg import STAGES, Opened, Policy, Roster, Server, Terms
from discreet.keys import Stream
from discreet.store import Store

D = 40
PAYLOAD = b"the model"
PLAN = "sha256:" + "0" * 64


def secret(*path: object) -> bytes:
    return hashlib.sha256(repr(path).encode()).digest()


class Memory:
    """A journal in memory with the rules of the real one, for tests that make thousands of clients."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, int, str], tuple[bytes, bytes]] = {}

    def once(self, session: str, number: int, stage: str, request: bytes, answer: Callable[[], bytes]) -> bytes:
        held = self.answers.setdefault((session, number, stage), (request, b"")) if (session, number, stage) in self.answers else None
        if held is not None and held[0] != request:
            raise MessageReplayed("one message for each stage of a round", value=stage)
        if held is None:
            self.answers[session, number, stage] = (request, answer())
        return self.answers[session, number, stage][1]

    def count(self, session: str, *stages: str, other_than: int) -> int:
        rounds = [{number for known, number, at in self.answers if (known, at) == (session, stage)} for stage in stages]
        return len(set.intersection(*rounds) - {other_than})

    def rounds(self, session: str) -> int:
        return max((number for known, number, _ in self.answers if known == session), default=-1) + 1


class Fleet:
    """Clients and server of one session, in this process."""

    def __init__(self, count: int, *, server: Server = Server.MALICIOUS, minimum: int = 2, bits: int = 16, dimension: int = D) -> None:
        self.names = [f"site-{i:03d}" for i in range(count)]
        self.identities = {name: Ed25519PrivateKey.from_private_bytes(secret("identity", name)) for name in self.names}
        self.signer = Ed25519PrivateKey.from_private_bytes(secret("server"))
        public = {name: key.public_key().public_bytes_raw() for name, key in self.identities.items()}
        self.roster = Roster(server=self.signer.public_key().public_bytes_raw(), clients=public)
        self.policy = Policy(roster=self.roster, session="s", plan=PLAN, minimum=minimum, dimension=dimension, bits=bits, server=server)
        self.journals: dict[str, Any] = {name: Memory() for name in self.names}
        self.word = secagg.WORD[bits]
        self.receipts: dict[str, secagg.Receipt] = {}
        self.refused: dict[str, DiscreetError] = {}

    def terms(self, **changes: Any) -> Terms:
        usual = {
            "session": "s",
            "number": 0,
            "members": self.names,
            "minimum": self.policy.minimum,
            "dimension": self.policy.dimension,
            "bits": self.policy.bits,
        }
        return secagg.terms_for(self.roster, **{**usual, "payload": PAYLOAD, "plan": PLAN, "server": self.policy.server, **changes})

    def vector(self, name: str) -> np.ndarray[Any, Any]:
        return np.frombuffer(secret("vector", name) * (self.policy.dimension // 4 + 1), self.word)[: self.policy.dimension].copy()

    def member(self, name: str) -> Any:
        generator = secagg.client(
            lambda terms, payload: self.vector(name),
            name=name,
            identity=self.identities[name],
            policy=self.policy,
            stream=Stream(secret("client", name)),
            journal=self.journals[name],
        )
        next(generator)
        return generator

    def total(self, names: Any) -> np.ndarray[Any, Any]:
        return np.sum([self.vector(name) for name in names], axis=0, dtype=self.word)

    def run(
        self, lost: Mapping[str, str] | None = None, *, terms: Terms | None = None, tamper: Callable[[str, str, bytes], bytes] = lambda s, n, r: r
    ) -> Opened:
        """Runs a round. `lost` names the stage at which a client stops answering; `tamper` is the lying server, given stage, client and request."""
        members = {name: self.member(name) for name in self.names}
        hub = secagg.server(terms or self.terms(), roster=self.roster, signer=self.signer, payload=PAYLOAD)
        requests = next(hub)
        for stage in STAGES:
            replies = {}
            for name, request in requests.items():
                is_lost = name in (lost or {}) and STAGES.index((lost or {})[name]) <= STAGES.index(stage)
                if name in self.refused or is_lost:
                    continue
                try:
                    replies[name] = members[name].send(tamper(stage, name, request))
                except DiscreetError as error:
                    self.refused[name] = error
            try:
                requests = hub.send(replies)
            except StopIteration as end:
                for name in replies:
                    with pytest.raises(StopIteration) as finished:
                        members[name].send(b"")
                    self.receipts[name] = finished.value.value
                return end.value
        raise AssertionError


@settings(max_examples=40, deadline=None)
@given(st.integers(4, 9), st.sampled_from(Server), st.data())
def test_masks_cancel_under_any_dropout_set(count: int, server: Server, data: st.DataObject) -> None:
    names = [f"site-{i:03d}" for i in range(count)]
    cancels(count, server, data.draw(st.dictionaries(st.sampled_from(names), st.sampled_from(STAGES))))


@pytest.mark.parametrize("server", Server)
@pytest.mark.parametrize("first", [None, *STAGES])
def test_masks_cancel_under_every_dropout_set(server: Server, first: str | None) -> None:
    """Three clients, each lost at each stage or never: all 216 ways, for both thresholds."""
    for others in itertools.product([None, *STAGES], repeat=2):
        cancels(3, server, {f"site-{i:03d}": stage for i, stage in enumerate((first, *others)) if stage})


def cancels(count: int, server: Server, lost: dict[str, str]) -> None:
    """Whoever drops out at whatever stage: the sum is that of exactly those who uploaded, or nothing is opened."""
    fleet = Fleet(count, server=server)
    needed = fleet.terms().threshold
    uploaded = [name for name in fleet.names if STAGES.index(lost.get(name, "agreement")) > 2]
    if count - len(lost) < needed:
        with pytest.raises(RoundAborted):
            fleet.run(lost)
    else:
        opened = fleet.run(lost)
        assert sorted(opened.uploads) == uploaded
        assert opened.total.tolist() == fleet.total(uploaded).tolist()
        assert opened.left_out == lost
    assert fleet.refused == {}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_at_every_stage_t_and_above_open_and_one_below_aborts(stage: str, spare: int) -> None:
    fleet = Fleet(7)
    threshold = fleet.terms().threshold
    assert threshold == 5
    lost = dict.fromkeys(fleet.names[: 7 - threshold - spare], stage)
    if spare < 0:
        with pytest.raises(RoundAborted, match=stage):
            fleet.run(lost)
    else:
        assert fleet.run(lost).total.tolist() == fleet.total(set(fleet.names) - (set(lost) if STAGES.index(stage) < 3 else set())).tolist()


def test_thirty_two_bits_and_a_long_vector_cross_the_chunks() -> None:
    fleet = Fleet(3, bits=32, dimension=200_001, server=Server.SEMI_HONEST)
    assert np.array_equal(fleet.run({"site-001": "delivery"}).total, fleet.total(["site-000", "site-002"]))


def test_below_the_planned_minimum_the_round_aborts_though_the_threshold_is_met() -> None:
    fleet = Fleet(5, server=Server.SEMI_HONEST, minimum=4)
    with pytest.raises(RoundAborted, match="at least 4"):
        fleet.run(dict.fromkeys(fleet.names[:2], "delivery"))


# A server that lies


def lie(fleet: Fleet, tamper: Callable[[str, str, bytes], bytes]) -> dict[str, DiscreetError]:
    with pytest.raises(RoundAborted):
        fleet.run(tamper=tamper)
    return fleet.refused


def resealed(fleet: Fleet, request: bytes, change: Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]) -> bytes:
    """The request with other content, signed by the server: it may sign what it likes."""
    header, _, body = secagg._parse(request)
    return secagg.sealed_frame(fleet.signer, *change(header, body))


def edited_list(fleet: Fleet, wanted: str, edit: Callable[[str, list[bytes]], list[bytes]]) -> Callable[[str, str, bytes], bytes]:
    """A server that changes the list in its requests of one stage."""

    def tamper(stage: str, name: str, request: bytes) -> bytes:
        if stage != wanted:
            return request
        return resealed(fleet, request, lambda header, body: (header, secagg.join(edit(name, list(secagg.parts(body))))))

    return tamper


WEAKER = {
    "threshold lowered": {"threshold": 1},
    "minimum lowered": {"minimum": 1},
    "another session": {"session": "other"},
    "another plan": {"plan": "sha256:" + "1" * 64},
    "narrow words": {"bits": 32},
    "another dimension": {"dimension": D + 1},
    "a member twice": {"members": ("site-000", "site-000", *(f"site-{i:03d}" for i in range(1, 5)))},
    "a stranger": {"members": ("site-000", "site-001", "site-002", "stranger")},
    "a small cohort": {"members": ("site-000",), "threshold": 1},
    "another roster": {"roster": "0" * 64},
    "a model that is not the one sent": {"model": "0" * 64},
}


@pytest.mark.parametrize("changes", WEAKER.values(), ids=WEAKER)
def test_weaker_terms_are_refused(changes: dict[str, Any]) -> None:
    fleet = Fleet(5)

    def tamper(stage: str, name: str, request: bytes) -> bytes:
        return resealed(fleet, request, lambda header, body: ({**header, "terms_json": {**header["terms_json"], **changes}}, body))

    refused = lie(fleet, tamper)
    assert {type(error) for error in refused.values()} == {TermsRefused}
    assert len(refused) == 5
    assert all(journal.answers == {} for journal in fleet.journals.values())


def test_a_substituted_key_is_refused() -> None:
    """The server replaces a peer's keys by its own: it cannot sign for the peer."""
    fleet = Fleet(5)

    def edit(name: str, frames: list[bytes]) -> list[bytes]:
        header, _, _ = secagg._parse(frames[1])
        return [frames[0], secagg.sealed_frame(fleet.signer, {**header, "cipher": secret("mine").hex()}), *frames[2:]]

    assert {type(error) for error in lie(fleet, edited_list(fleet, "cohort", edit)).values()} == {PeerRefused}


CHANGED_COHORTS = {
    "a client twice": lambda frames: [*frames, frames[0]],
    "an unknown sender": lambda frames: [frames[0].replace(b"site-000", b"site-xyz"), *frames[1:]],
    "its own keys left out": lambda frames: frames[2:],
    "cut short": lambda frames: [frames[0][:50], *frames[1:]],
    "not JSON": lambda frames: [b"\x00\x00\x00\x02[]" + bytes(64), *frames[1:]],
}


@pytest.mark.parametrize("change", CHANGED_COHORTS.values(), ids=CHANGED_COHORTS)
def test_a_changed_cohort_is_refused(change: Callable[[list[bytes]], list[bytes]]) -> None:
    fleet = Fleet(7)
    refused = lie(fleet, edited_list(fleet, "cohort", lambda name, frames: change(frames)))
    assert PeerRefused in {type(error) for error in refused.values()}


def test_a_cohort_cut_below_the_threshold_is_refused() -> None:
    fleet = Fleet(7)

    def edit(name: str, frames: list[bytes]) -> list[bytes]:
        return [frame for frame in frames if name.encode() in frame] + [frame for frame in frames if name.encode() not in frame][:2]

    assert {type(error) for error in lie(fleet, edited_list(fleet, "cohort", edit)).values()} == {RoundAborted}


def test_another_model_for_one_client_is_noticed_by_its_peers() -> None:
    """Its terms differ, so its signature does: the server counts it out, and when shown to its peers they refuse."""
    fleet = Fleet(5)

    def tamper(stage: str, name: str, request: bytes) -> bytes:
        if name != "site-002" or stage != "announce":
            return request
        other = {**secagg._parse(request)[0]["terms_json"], "model": hashlib.sha256(b"another").hexdigest()}
        return resealed(fleet, request, lambda header, body: ({**header, "terms_json": other}, b"another"))

    opened = fleet.run(tamper=tamper)
    assert "site-002" in opened.left_out
    target = fleet.member("site-001")
    target_journal = fleet.journals["site-001"].answers
    target_journal.clear()
    other_terms = fleet.terms(payload=b"another")
    odd = secagg.sealed_frame(
        fleet.identities["site-002"],
        {"kind": "keys", "terms": other_terms.digest.hex(), "from": "site-002", "cipher": "00" * 32, "mask": "11" * 32, "seed": ""},
    )
    announced = next(secagg.server(fleet.terms(), roster=fleet.roster, signer=fleet.signer, payload=PAYLOAD))["site-001"]
    own = target.send(announced)
    cohort = secagg.sealed_frame(fleet.signer, {"kind": "cohort", "terms": fleet.terms().digest.hex()}, secagg.join([own, odd]))
    with pytest.raises(PeerRefused, match="terms of this round"):
        target.send(cohort)


def test_shares_of_another_cohort_or_receiver_do_not_open() -> None:
    fleet = Fleet(5)
    swapped = edited_list(fleet, "delivery", lambda name, parts: [parts[1][:82] + parts[0][82:], parts[0][:82] + parts[1][82:], *parts[2:]])
    assert {type(error) for error in lie(fleet, swapped).values()} == {PeerRefused}


LIES_ABOUT_SURVIVORS = {
    "leaves the client out": (SurvivorsRefused, lambda name, heads: [head for head in heads if name.encode() not in head]),
    "doubles a client": (SurvivorsRefused, lambda name, heads: [*heads, heads[0]]),
    "fewer than the threshold": (SurvivorsRefused, lambda name, heads: sorted(heads, key=lambda head: name.encode() not in head)[:3]),
    "somebody who did not upload": (PeerRefused, lambda name, heads: [heads[0].replace(b'"masked"', b'"agreed"'), *heads[1:]]),
    "an upload that was changed": (PeerRefused, lambda name, heads: [heads[0][:-1] + bytes([heads[0][-1] ^ 1]), *heads[1:]]),
}


@pytest.mark.parametrize(("error", "edit"), LIES_ABOUT_SURVIVORS.values(), ids=LIES_ABOUT_SURVIVORS)
def test_lies_about_survivors_are_refused(error: type[DiscreetError], edit: Callable[[str, list[bytes]], list[bytes]]) -> None:
    fleet = Fleet(7)
    refused = lie(fleet, edited_list(fleet, "survivors", edit))
    assert {type(each) for each in refused.values()} == {error}
    assert all("agreement" not in {stage for _, _, stage in journal.answers} for journal in fleet.journals.values()), "no share may leave"


def test_two_survivor_sets_for_two_halves_open_nothing() -> None:
    fleet = Fleet(7)

    def edit(name: str, heads: list[bytes]) -> list[bytes]:
        without = b"site-006" if name < "site-003" else b"site-000"
        return [head for head in heads if without not in head]

    refused = lie(fleet, edited_list(fleet, "survivors", edit))
    assert {type(each) for each in refused.values()} <= {SurvivorsRefused}
    assert all("agreement" not in {stage for _, _, stage in journal.answers} for journal in fleet.journals.values())


def test_both_shares_of_a_peer_are_not_to_be_had() -> None:
    """After the share of a survivor's own seed was revealed, the server asks for that of its mask key: as another agreement, another survivor set, another round on
    the same terms. What a client revealed for its peers is one share of each, whatever is asked."""
    fleet = Fleet(4)
    seen: dict[str, dict[str, bytes]] = {}

    def listen(stage: str, name: str, request: bytes) -> bytes:
        seen.setdefault(name, {})[stage] = request
        return request

    opened = fleet.run(tamper=listen)
    assert sorted(opened.uploads) == fleet.names
    target = fleet.names[0]
    without = resealed(fleet, seen[target]["survivors"], lambda header, body: (header, secagg.join(list(secagg.parts(body))[:3])))
    reordered = resealed(fleet, seen[target]["agreement"], lambda header, body: (header, secagg.join(list(secagg.parts(body))[::-1])))
    for stage, asked in (("survivors", without), ("agreement", reordered)):
        again = fleet.member(target)
        for earlier in STAGES[: STAGES.index(stage)]:
            again.send(seen[target][earlier])
        with pytest.raises(MessageReplayed):
            again.send(asked)
    revealed = secagg._parse(fleet.journals[target].answers["s", 0, "agreement"][1])[2]
    assert len(revealed) == len(fleet.names) * masks.SHARE_BYTES


def test_too_few_signatures_reveal_nothing() -> None:
    fleet = Fleet(7)
    assert {type(error) for error in lie(fleet, edited_list(fleet, "agreement", lambda name, heads: heads[:4])).values()} == {SurvivorsRefused}
    fleet = Fleet(7)
    assert {type(error) for error in lie(fleet, edited_list(fleet, "agreement", lambda name, heads: heads[:1] * 7)).values()} == {SurvivorsRefused}


def transcript(fleet: Fleet, name: str) -> list[bytes]:
    requests: list[bytes] = []

    def listen(stage: str, who: str, request: bytes) -> bytes:
        if who == name:
            requests.append(request)
        return request

    fleet.run(tamper=listen)
    return requests


def test_a_killed_client_answers_again_the_same_and_nothing_else(tmp_path: Any) -> None:
    """Both shares of one peer: a second survivor set is refused, by a new process that knows the first one from its database."""
    fleet = Fleet(7)
    store = Store(f"sqlite:///{tmp_path}/client.db")
    fleet.journals["site-001"] = Journal(store)
    requests = transcript(fleet, "site-001")
    store.close()
    store = Store(f"sqlite:///{tmp_path}/client.db")
    fleet.journals["site-001"] = Journal(store)
    again = fleet.member("site-001")
    replies = [again.send(request) for request in requests]
    assert [secagg._parse(reply)[0]["kind"] for reply in replies] == ["keys", "shares", "masked", "agreed", "reveal"]
    liar = fleet.member("site-001")
    for request in requests[:3]:
        liar.send(request)
    smaller = edited_list(fleet, "survivors", lambda name, heads: [head for head in heads if b"site-006" not in head])(
        "survivors", "site-001", requests[3]
    )
    with pytest.raises(MessageReplayed):
        liar.send(smaller)
    fleet.journals["site-001"].sweep("s", before=1)
    with pytest.raises(MessageReplayed):
        fleet.member("site-001").send(requests[0])
    store.close()


@pytest.mark.parametrize("order", [(1,), (0, 2), (0, 1, 3), (0, 0), (0, 1, 1)])
def test_reordered_and_repeated_messages_are_refused(order: tuple[int, ...]) -> None:
    fleet = Fleet(5)
    requests = transcript(fleet, "site-003")
    fleet.journals["site-003"].answers.clear()
    member = fleet.member("site-003")
    for index in order[:-1]:
        member.send(requests[index])
    with pytest.raises((PeerRefused, MessageReplayed)):
        member.send(requests[order[-1]])


def test_messages_of_an_earlier_round_or_session_are_refused() -> None:
    fleet = Fleet(5)
    old = transcript(fleet, "site-003")
    fleet.run(terms=fleet.terms(number=1))
    fleet.run(terms=fleet.terms(number=2))
    with pytest.raises(TermsRefused, match="round 2"):
        fleet.member("site-003").send(old[0])
    member = fleet.member("site-003")
    member.send(next(secagg.server(fleet.terms(number=3), roster=fleet.roster, signer=fleet.signer, payload=PAYLOAD))["site-003"])
    with pytest.raises(PeerRefused):
        member.send(old[1])


def test_the_same_round_is_not_run_twice_on_other_terms() -> None:
    """A second upload of the same round would carry a second draw of noise on the same data."""
    fleet = Fleet(5)
    fleet.run()
    with pytest.raises(RoundAborted):
        fleet.run(terms=fleet.terms(members=fleet.names[:4]))
    assert {type(error) for error in fleet.refused.values()} == {MessageReplayed}


def test_a_client_that_reveals_a_wrong_share_costs_the_round_and_nothing_more() -> None:
    fleet = Fleet(4)
    members = {name: fleet.member(name) for name in fleet.names}
    hub = secagg.server(fleet.terms(), roster=fleet.roster, signer=fleet.signer, payload=PAYLOAD)
    requests = next(hub)
    for stage in STAGES:
        replies = {name: members[name].send(request) for name, request in requests.items()}
        if stage == "agreement":
            header, _, body = secagg._parse(replies["site-000"])
            replies["site-000"] = secagg.sealed_frame(fleet.identities["site-000"], header, bytes([body[0] ^ 1]) + body[1:])
            with pytest.raises(RoundAborted, match="shares"):
                hub.send(replies)
            return
        requests = hub.send(replies)


def test_receipts_name_terms_survivors_and_upload() -> None:
    fleet = Fleet(4)
    opened = fleet.run({"site-003": "delivery"})
    assert sorted(fleet.receipts) == fleet.names[:3]
    for name, receipt in fleet.receipts.items():
        assert receipt.upload == opened.uploads[name]
        assert receipt.survivors == secagg.survivors_digest(opened.uploads)
        assert receipt.model == hashlib.sha256(PAYLOAD).hexdigest()


def test_no_more_rounds_are_opened_than_the_plan_paid_for() -> None:
    """A server that calls an opened round aborted and asks for another one in its place."""
    fleet = Fleet(4)
    fleet.policy = dataclasses.replace(fleet.policy, rounds=2)
    fleet.run()
    fleet.run(terms=fleet.terms(number=1))
    with pytest.raises(RoundAborted):
        fleet.run(terms=fleet.terms(number=2))
    assert {str(error)[:25] for error in fleet.refused.values()} == {"Expected at most 2 opened"}


def test_rosters_have_different_keys() -> None:
    key = bytes(32)
    with pytest.raises(TermsRefused):
        Roster(server=b"\x01" * 32, clients={"a": key, "b": key})


def test_one_masked_vector_is_indistinguishable_from_uniform() -> None:
    """Chi-square over the bytes of a masked all-zero vector, and no correlation with what was masked; fixed keys, false alarm 1e-6."""
    from scipy import stats

    fleet = Fleet(3, dimension=60_000)
    fleet.vector = lambda name: np.zeros(60_000, fleet.word)  # type: ignore[method-assign]  # the plainest of all vectors
    member = fleet.member("site-000")
    uploads: list[bytes] = []

    def listen(stage: str, name: str, request: bytes) -> bytes:
        if stage == "survivors" and name == "site-000":
            uploads.append(fleet.journals[name].answers["s", 0, "delivery"][1])
        return request

    member.close()
    opened = fleet.run(tamper=listen)
    assert not opened.total.any()
    body = np.frombuffer(secagg._parse(uploads[0])[2], np.uint8)
    for plane in (body[0::2], body[1::2]):
        counts = np.bincount(plane, minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-6
    words = body.view("<u2").astype(np.float64)
    assert abs(np.corrcoef(words[:-1], words[1:])[0, 1]) < 5 / np.sqrt(len(words))
