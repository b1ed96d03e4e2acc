"""Secure aggregation as two generators without I/O: messages (bytes) in, messages out, the sum or a named refusal at the end.

    stage      server sends to each client              client answers, once for good (journal.py)
    announce   terms and model                          fresh X25519 keys, signed
    cohort     the signed keys of everybody (U1)        shares of its two secrets, sealed for each peer
    delivery   the shares sealed for this client (U2)   its masked vector
    survivors  signed heads of the uploads (U3)         its signature under that survivor set
    agreement  those signatures                         one share for each peer: own seed of a survivor, mask key of one that dropped out

The server is the adversary. So the *client* holds a policy (`Policy`): a pinned roster of Ed25519 identities, session, plan, smallest cohort and survivor set, and a threshold
above 2n/3 (of two different survivor sets at most one then finds enough honest signatures; above n/2 for a server that only looks). Which share of a peer it reveals
follows from the survivor set that it signed, never from what the server asks for; every answer is on record before it leaves, so no second set gets another.

Terms (session, round, roster, members, model digest, plan) are hashed into every signature and every derived key: a client that is shown another model computes another
digest, and its peers refuse its keys. Clients may drop out at every stage; below the threshold or the planned minimum the round aborts and nothing is opened.

Every client shares with every other and verifies every other, so the threshold is exact: whoever is corrupt, fewer than `threshold` clients open nothing. (A random k-regular graph,
Bell et al. 2020, costs k instead of n and holds with a probability over the graph.) Verdicts on signatures are kept, because a good one depends on its bytes alone: in a simulation
of all clients each signature is verified once.

Sources: Bonawitz et al. 2017, eprint 2017/281 (double masking, consistency check, Fig. 4); Bell et al. 2020; Pasquini et al. 2022 (why masks bind the model).

Does not cover: a client that uploads nonsense: under masking its norm cannot be verified, only honest clients keep to it; a denial of service by server or clients;
traffic analysis (who takes part in a round is known to the server); colluders beyond n - threshold honest ones, counted in the noise by `fleet.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from types import MappingProxyType
from typing import Any, final

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from discreet.errors import EvidenceInvalid, PeerRefused, PlanInvalid, RoundAborted, SurvivorsRefused, TermsRefused
from discreet.evidence.statement import canonical_json, parse_json
from discreet.federated import masks
from discreet.federated.journal import Journal
from discreet.federated.masks import WORD, RoundKeys, Words
from discreet.keys import Stream

SIGNATURE_BYTES = 64
MAX_HEAD_BYTES = 1 << 20
MAX_CLIENTS = 10_000
_SEALED_BYTES = 2 * masks.SHARE_BYTES + 16
STAGES = ("announce", "cohort", "delivery", "survivors", "agreement")

Contribution = Callable[["Terms", bytes], Words]
"""Computes a client's vector from the terms and the announced model; called once, when the vector is to be masked."""


class Server(StrEnum):
    """What the clients assume of the server, and with it the smallest threshold: above 2n/3, or above n/2."""

    MALICIOUS = "malicious"
    SEMI_HONEST = "semi_honest"

    def threshold(self, count: int) -> int:
        """Returns the smallest threshold for a cohort of `count`."""
        return (2 * count) // 3 + 1 if self is Server.MALICIOUS else count // 2 + 1


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Roster:
    """Who is in the fleet: names and Ed25519 keys (32 bytes) of the clients, and the server's. Every client pins its digest."""

    server: bytes
    clients: Mapping[str, bytes]

    def __post_init__(self) -> None:
        keys = [self.server, *self.clients.values()]
        if len(set(keys)) != len(keys) or any(len(key) != 32 for key in keys):
            raise TermsRefused("a roster of different Ed25519 keys of 32 bytes", remedy="One identity each; a site is one client.")
        if not 2 <= len(self.clients) <= MAX_CLIENTS or not all(name and name.isprintable() and len(name) <= 64 for name in self.clients):
            raise TermsRefused(f"a roster of 2 to {MAX_CLIENTS} named clients", value=len(self.clients))

    @property
    def digest(self) -> str:
        """SHA-256 of names and keys, as 64 hex digits."""
        return _hex(canonical_json({"server": self.server.hex(), "clients": {name: key.hex() for name, key in self.clients.items()}}))


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What one round is about; its digest is in every signature and every derived key.

    Attributes:
        session, number: of the training run and of the round in it, from 0.
        members: the clients that are asked, sorted.
        threshold: answers that every stage needs, and shares that open a secret.
        minimum: survivors that the noise is planned for.
        dimension, bits: length and word size (16 or 32) of the vector.
        model: SHA-256 of the announced payload.
        roster, plan: digests that the clients pin.
    """

    session: str
    number: int
    members: tuple[str, ...]
    threshold: int
    minimum: int
    dimension: int
    bits: int
    model: str
    roster: str
    plan: str

    def to_json(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in self.__slots__}

    @property
    def digest(self) -> bytes:
        return _terms_digest(self)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The floor below which this client takes part in nothing. Set up with the site, never by the server.

    `rounds` is the number of rounds that the plan pays for: in no more of them does this client reveal a share, however many the server calls aborted.
    """

    roster: Roster
    session: str
    plan: str
    minimum: int
    dimension: int
    bits: int
    server: Server = Server.MALICIOUS
    rounds: int = 1 << 30

    def check(self, terms: Terms, *, name: str, next_round: int) -> None:
        """Raises:
        TermsRefused: when the terms are weaker than, or other than, this policy.
        """
        count = len(terms.members)
        rules = (
            (terms.session == self.session, "the session that this client joined", terms.session),
            (terms.number >= next_round, f"round {next_round} or a later one", terms.number),
            (terms.roster == self.roster.digest, "the pinned roster", None),
            (terms.plan == self.plan, "the agreed plan", None),
            (
                set(terms.members) <= set(self.roster.clients) and name in terms.members,
                "members out of the pinned roster, this client among them",
                None,
            ),
            (list(terms.members) == sorted(set(terms.members)), "each member once, sorted", None),
            (self.server.threshold(count) <= terms.threshold <= count, f"a threshold of {self.server.threshold(count)} to {count}", terms.threshold),
            (terms.minimum >= self.minimum, f"at least {self.minimum} survivors", terms.minimum),
            (count >= max(terms.minimum, 2), f"a cohort of at least {max(terms.minimum, 2)}", count),
            (
                (terms.dimension, terms.bits) == (self.dimension, self.bits),
                f"{self.dimension} words of {self.bits} bits",
                f"{terms.dimension} of {terms.bits}",
            ),
        )
        for holds, rule, value in rules:
            if not holds:
                raise TermsRefused(rule, value=value, remedy="Nothing left this client.")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What a client knows of a finished round: the terms it signed, the survivor set that enough peers signed, and the digest of its own upload in it."""

    session: str
    number: int
    terms: str
    model: str
    plan: str
    survivors: str
    upload: str

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@final
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Opened:
    """The sum of the survivors' vectors modulo 2^bits, and who they are (name -> digest of the upload). `left_out` says at which stage somebody was lost."""

    total: Words
    uploads: Mapping[str, str]
    left_out: Mapping[str, str]


def terms_for(
    roster: Roster,
    *,
    session: str,
    number: int,
    members: Iterable[str],
    minimum: int,
    dimension: int,
    bits: int,
    payload: bytes,
    plan: str,
    server: Server = Server.MALICIOUS,
) -> Terms:
    """Returns the terms of a round with the smallest threshold that the clients accept."""
    chosen = tuple(sorted(members))
    return Terms(
        session=session,
        number=number,
        members=chosen,
        threshold=max(server.threshold(len(chosen)), min(minimum, len(chosen))),
        minimum=minimum,
        dimension=dimension,
        bits=bits,
        model=_hex(payload),
        roster=roster.digest,
        plan=plan,
    )


# Frames: head = length, canonical JSON, signature; then the body, whose digest is in the JSON


@final
@dataclass(frozen=True, slots=True)
class Frame:
    """A message whose signature was verified; its body is checked by `checked_body`."""

    header: Mapping[str, Any]
    head: bytes
    body: bytes


def sealed_frame(signer: Ed25519PrivateKey, header: Mapping[str, Any], body: bytes = b"") -> bytes:
    content = canonical_json({**header, "body": _hex(body)})
    return b"".join([len(content).to_bytes(4, "big"), content, signer.sign(masks.PROTOCOL + content), body])


def open_frame(frame: bytes, key: bytes, *, kind: str, terms: bytes | None) -> Frame:
    """Returns a frame that this key signed, of this kind and these terms.

    Raises:
        PeerRefused: when it is not.
    """
    header, head, body = _parse(frame)
    if header.get("kind") != kind or (terms is not None and header.get("terms") != terms.hex()):
        raise PeerRefused(
            f"a message of kind {kind} under the terms of this round", value=header.get("kind") if header.get("kind") in _KINDS else None
        )
    _verify(key, head)
    return Frame(header, head, body)


@lru_cache(maxsize=1 << 14)
def _verify(key: bytes, head: bytes) -> None:
    """Verifies the signature of a head; a verdict is a function of these bytes, so a good one is kept (a bad one raises, and is not)."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(head[-SIGNATURE_BYTES:], masks.PROTOCOL + head[4:-SIGNATURE_BYTES])
    except InvalidSignature:
        raise PeerRefused("a message that its pinned sender signed") from None


def checked_body(frame: Frame) -> bytes:
    if frame.header.get("body") != _hex(frame.body):
        raise PeerRefused("a message whose body is the one that was signed")
    return frame.body


def _parse(frame: bytes) -> tuple[Mapping[str, Any], bytes, bytes]:
    length = int.from_bytes(frame[:4], "big")
    end = 4 + length + SIGNATURE_BYTES
    if length > MAX_HEAD_BYTES or len(frame) < end:
        raise PeerRefused("a whole message")
    head = frame[:end]
    return _header(head), head, frame[end:]


@lru_cache(maxsize=1 << 14)
def _header(head: bytes) -> Mapping[str, Any]:
    try:
        header = parse_json(head[4:-SIGNATURE_BYTES])
    except EvidenceInvalid:
        raise PeerRefused("a message in canonical JSON") from None
    if not isinstance(header, dict):
        raise PeerRefused("a message in canonical JSON")
    return MappingProxyType(header)


def join(parts: Iterable[bytes]) -> bytes:
    return b"".join(piece for part in parts for piece in (len(part).to_bytes(4, "big"), part))


def parts(content: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "big")
        if at + 4 + length > len(content):
            raise PeerRefused("a whole list of messages")
        yield content[at + 4 : at + 4 + length]
        at += 4 + length


def _hex(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@lru_cache(maxsize=64)
def _terms_digest(terms: Terms) -> bytes:
    return hashlib.sha256(masks.PROTOCOL + canonical_json(terms.to_json())).digest()


def _set_digest(names: Iterable[str]) -> str:
    return _digest_of_sorted(tuple(sorted(names)))


@lru_cache(maxsize=64)
def _digest_of_sorted(names: tuple[str, ...]) -> str:
    return _hex(canonical_json(list(names)))


def survivors_digest(uploads: Mapping[str, str]) -> str:
    """Returns the digest of a survivor set: every survivor with the digest of its upload."""
    return _hex(canonical_json(sorted([name, upload] for name, upload in uploads.items())))


def upload_digest(masked: bytes) -> str:
    """Returns the digest of the vector in a client's own "masked" message."""
    return str(_parse(masked)[0].get("body"))


def kind_of(frame: bytes) -> str:
    """Returns the kind that a message claims to be; nothing of it is verified yet."""
    return str(_parse(frame)[0].get("kind"))


_KINDS = {*STAGES, "keys", "shares", "masked", "agreed", "reveal"}


# The client


def client(
    contribution: Contribution, *, name: str, identity: Ed25519PrivateKey, policy: Policy, stream: Stream, journal: Journal
) -> Generator[bytes, bytes, Receipt]:
    """Takes part in one round. Prime it with `next`, then `send` each request of the server; the value of its end is the receipt.

    Args:
        contribution: the client's vector, clipped, quantised and noised; called once for good.
        identity: the client's long-term key, whose public half is in the roster under `name`.
        policy: what this client insists on.
        stream: secret of this client and session, forked here by round and terms; the same after a restart.
        journal: what was answered before, in this process or an earlier one.

    Raises:
        TermsRefused: when the terms are weaker than the policy, or the model is not the one of the terms.
        PeerRefused: when a message was not made by its pinned sender for this round.
        MessageReplayed: when a stage was already answered for another message.
        SurvivorsRefused: when the survivor set leaves this client out, names somebody who did not upload, is too small, or is not signed by enough.
    """
    request = yield b""
    member = _Member.of(request, contribution, name=name, identity=identity, policy=policy, stream=stream, journal=journal)
    for stage in STAGES:
        following = yield member.answer(stage, request)
        request = following
    return member.receipt()


@final
@dataclass(slots=True, kw_only=True)
class _Member:
    """A client in the middle of a round."""

    name: str
    identity: Ed25519PrivateKey
    policy: Policy
    journal: Journal
    contribution: Contribution
    terms: Terms
    payload: bytes
    keys: RoundKeys
    polynomial: Stream
    peers: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    senders: tuple[str, ...] = ()
    held: dict[str, bytes] = field(default_factory=dict)
    own_shares: dict[str, bytes] = field(default_factory=dict)
    upload: str = ""
    uploads: dict[str, str] = field(default_factory=dict)
    cohort: str = ""
    agreed_on: dict[str, bytes] = field(default_factory=dict)

    @staticmethod
    def of(
        request: bytes, contribution: Contribution, *, name: str, identity: Ed25519PrivateKey, policy: Policy, stream: Stream, journal: Journal
    ) -> _Member:
        """Reads the announcement; refuses terms below the policy before anything is drawn."""
        frame = open_frame(request, policy.roster.server, kind="announce", terms=None)
        terms = _terms_of(frame.header)
        # A killed client takes up the round it was in; a round after which it has answered another one is over.
        policy.check(terms, name=name, next_round=max(0, journal.rounds(policy.session) - 1))
        if _hex(checked_body(frame)) != terms.model:
            raise TermsRefused("the model that the terms name", remedy="Nothing left this client.")
        secret = stream.fork("secagg", terms.session, terms.number, terms.digest.hex())
        return _Member(
            name=name,
            identity=identity,
            policy=policy,
            journal=journal,
            contribution=contribution,
            terms=terms,
            payload=frame.body,
            keys=RoundKeys.draw(secret.fork("keys")),
            polynomial=secret.fork("shares"),
        )

    def answer(self, stage: str, request: bytes) -> bytes:
        """Checks a request, whatever is on record, and gives the one answer to it."""
        compute = {
            "announce": self._announce,
            "cohort": self._cohort,
            "delivery": self._delivery,
            "survivors": self._survivors,
            "agreement": self._agreement,
        }
        make = compute[stage](request)
        reply = self.journal.once(self.terms.session, self.terms.number, stage, request, make)
        if stage == "delivery":
            self.upload = str(_parse(reply)[0].get("body"))
        return reply

    def receipt(self) -> Receipt:
        return Receipt(
            session=self.terms.session,
            number=self.terms.number,
            terms=self.terms.digest.hex(),
            model=self.terms.model,
            plan=self.terms.plan,
            survivors=survivors_digest(self.uploads),
            upload=self.upload,
        )

    def _reply(self, kind: str, body: bytes = b"", **more: Any) -> bytes:
        return sealed_frame(self.identity, {"kind": kind, "terms": self.terms.digest.hex(), "from": self.name, **more}, body)

    def _request(self, request: bytes, kind: str) -> bytes:
        return checked_body(open_frame(request, self.policy.roster.server, kind=kind, terms=self.terms.digest))

    def _announce(self, _request: bytes) -> Callable[[], bytes]:
        return lambda: self._reply(
            "keys", cipher=_public(self.keys.cipher).hex(), mask=_public(self.keys.mask).hex(), seed=_commitment(self.keys.own_seed, self.terms)
        )

    def _cohort(self, request: bytes) -> Callable[[], bytes]:
        """U1: the signed keys of at least `threshold` members, this client's own among them, each key once."""
        for frame in parts(self._request(request, "cohort")):
            who, keys = _read_keys(frame, self.policy.roster, self.terms)
            if who in self.peers:
                raise PeerRefused("each client once in the cohort")
            self.peers[who] = keys
        if self.peers.get(self.name) != (_public(self.keys.cipher), _public(self.keys.mask)):
            raise PeerRefused("this client's own keys in the cohort")
        if len({key for pair in self.peers.values() for key in pair}) != 2 * len(self.peers):
            raise PeerRefused("different keys of different clients")
        if len(self.peers) < max(self.terms.threshold, self.terms.minimum):
            raise RoundAborted(f"a cohort of {max(self.terms.threshold, self.terms.minimum)}", value=len(self.peers))
        self.cohort = _set_digest(self.peers)
        return self._split

    def _split(self) -> bytes:
        names = sorted(self.peers)
        shares = [self._split_one(secret) for secret in (self._mask_secret(), self.keys.own_seed)]
        sealed = []
        for index, peer in enumerate(names):
            plain = shares[0][index] + shares[1][index]
            if peer != self.name:
                sealed.append(masks.seal_shares(self._pair_key(peer, f"{self.name}>{peer}"), plain, context=self._context(self.name, peer)))
        return self._reply("shares", b"".join(sealed), cohort=self.cohort)

    def _split_one(self, secret: bytes, *, points: Sequence[int] | None = None) -> list[bytes]:
        # The stream is forked by a digest of cohort and secret: a replay after a restart splits along the same polynomial.
        fork = self.polynomial.fork(self.cohort, _hex(b"which" + secret))
        return masks.split(secret, threshold=self.terms.threshold, points=points or range(1, len(self.peers) + 1), stream=fork)

    def _delivery(self, request: bytes) -> Callable[[], bytes]:
        """U2: those whose shares arrived; their shares open only under the same terms and the same cohort."""
        held: dict[str, bytes] = {}
        for part in parts(self._request(request, "delivery")):
            sealed, who = part[:_SEALED_BYTES], part[_SEALED_BYTES:].decode("utf-8", "replace")
            if who not in self.peers or who == self.name or who in held:
                raise PeerRefused("shares of other members of the cohort, each once")
            held[who] = masks.open_shares(self._pair_key(who, f"{who}>{self.name}"), sealed, context=self._context(who, self.name))
        self.held, self.senders = held, tuple(sorted([*held, self.name]))
        if len(self.senders) < max(self.terms.threshold, self.terms.minimum):
            raise RoundAborted(f"shares of {max(self.terms.threshold, self.terms.minimum)} clients", value=len(self.senders))
        return self._mask

    def _mask(self) -> bytes:
        vector = self.contribution(self.terms, self.payload)
        word = WORD[self.terms.bits]
        if vector.dtype != word or vector.shape != (self.terms.dimension,):
            raise PlanInvalid(f"a vector of {self.terms.dimension} words of {self.terms.bits} bits", value=f"{vector.dtype} {vector.shape}")
        total = vector.copy()
        seeds = {peer: masks.agree(self.keys.mask, self.peers[peer][1], terms=self.terms.digest, purpose="mask") for peer in self.held}
        masks.total_mask(total, own_seed=self.keys.own_seed, pair_seeds=seeds, name=self.name)
        return self._reply("masked", total.tobytes(), senders=_set_digest(self.senders))

    def _survivors(self, request: bytes) -> Callable[[], bytes]:
        """U3: signed heads of uploads over the same U2 as this client's own, which is among them unchanged."""
        uploads: dict[str, str] = {}
        senders = _set_digest(self.senders)
        for head in parts(self._request(request, "survivors")):
            who = _sender(head, self.policy.roster)
            frame = open_frame(head, self.policy.roster.clients[who], kind="masked", terms=self.terms.digest)
            if who in uploads or who not in self.senders or frame.header.get("senders") != senders:
                raise SurvivorsRefused("survivors that uploaded over the same cohort, each once", remedy="No share was revealed.")
            uploads[who] = str(frame.header.get("body"))
        if uploads.get(self.name) != self.upload:
            raise SurvivorsRefused("this client's own upload among the survivors", remedy="No share was revealed.")
        if len(uploads) < max(self.terms.threshold, self.terms.minimum):
            raise SurvivorsRefused(
                f"at least {max(self.terms.threshold, self.terms.minimum)} survivors", value=len(uploads), remedy="No share was revealed."
            )
        self.uploads = uploads
        return lambda: self._reply("agreed", survivors=survivors_digest(uploads))

    def _agreement(self, request: bytes) -> Callable[[], bytes]:
        """Reveals only when `threshold` survivors signed the very set that this client signed."""
        signed: set[str] = set()
        wanted = survivors_digest(self.uploads)
        for head in parts(self._request(request, "agreement")):
            who = _sender(head, self.policy.roster)
            frame = open_frame(head, self.policy.roster.clients[who], kind="agreed", terms=self.terms.digest)
            if who in self.uploads and frame.header.get("survivors") == wanted:
                signed.add(who)
        if self.journal.count(self.terms.session, "agreement", other_than=self.terms.number) >= self.policy.rounds:
            raise TermsRefused(f"at most {self.policy.rounds} opened rounds, which the plan paid for", remedy="No share was revealed.")
        if len(signed) < self.terms.threshold:
            raise SurvivorsRefused(f"the same survivor set signed by {self.terms.threshold}", value=len(signed), remedy="No share was revealed.")
        return self._reveal

    def _reveal(self) -> bytes:
        """One share for each sender but this client itself, whose own are split anew: own seed of a survivor, mask key of one that dropped out."""
        point = sorted(self.peers).index(self.name) + 1
        mine = [self._split_one(secret, points=[point])[0] for secret in (self._mask_secret(), self.keys.own_seed)]
        held = {**self.held, self.name: b"".join(mine)}
        shares = [held[who][masks.SHARE_BYTES :] if who in self.uploads else held[who][: masks.SHARE_BYTES] for who in self.senders]
        return self._reply("reveal", b"".join(shares), survivors=survivors_digest(self.uploads))

    def _mask_secret(self) -> bytes:
        return self.keys.mask.private_bytes_raw()

    def _pair_key(self, peer: str, purpose: str) -> bytes:
        if peer not in self.agreed_on:
            self.agreed_on[peer] = masks.exchange(self.keys.cipher, self.peers[peer][0])
        return masks.derive(self.agreed_on[peer], terms=self.terms.digest, purpose=f"shares {purpose}")

    def _context(self, sender: str, receiver: str) -> bytes:
        return canonical_json([sender, receiver, self.terms.digest.hex(), self.cohort])


# The server

Requests = dict[str, bytes]
Replies = Mapping[str, bytes]


def server(terms: Terms, *, roster: Roster, signer: Ed25519PrivateKey, payload: bytes) -> Generator[Requests, Replies, Opened]:
    """Runs one round. Prime it with `next`, which gives the first requests; `send` whatever replies came in time; the value of its end is the sum.

    A reply that is late, or not valid, counts as a client that dropped out.

    Args:
        payload: what is announced with the terms, the model.

    Raises:
        RoundAborted: when fewer answered a stage than the threshold or the planned minimum, or the shares do not combine. Nothing was opened.
    """
    hub = _Hub(terms=terms, roster=roster, signer=signer)
    asked = sealed_frame(signer, {"kind": "announce", "terms_json": terms.to_json()}, payload)
    hub.take_keys((yield dict.fromkeys(terms.members, asked)))
    hub.take_shares((yield hub.cohort()))
    hub.take_uploads((yield hub.delivery()))
    hub.take_agreed((yield hub.survivors()))
    hub.take_reveals((yield hub.agreement()))
    return hub.opened()


@final
@dataclass(slots=True, kw_only=True)
class _Hub:
    """The server in the middle of a round."""

    terms: Terms
    roster: Roster
    signer: Ed25519PrivateKey
    keys: dict[str, Frame] = field(default_factory=dict)
    sealed: dict[str, dict[str, bytes]] = field(default_factory=dict)
    heads: dict[str, Frame] = field(default_factory=dict)
    agreed: dict[str, Frame] = field(default_factory=dict)
    reveals: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    total: Words = field(default_factory=lambda: np.zeros(0, WORD[32]))

    def take_keys(self, replies: Replies) -> None:
        for who, frame in self._valid(replies, "keys", self.terms.members).items():
            _read_keys(frame.head, self.roster, self.terms)
            self.keys[who] = frame
        self._enough(self.keys, "announce", self.terms.members)

    def cohort(self) -> Requests:
        body = join(self.keys[who].head for who in sorted(self.keys))
        return dict.fromkeys(self.keys, self._ask("cohort", body))

    def take_shares(self, replies: Replies) -> None:
        names = sorted(self.keys)
        for who, frame in self._valid(replies, "shares", names).items():
            body, others = frame.body, [name for name in names if name != who]
            if len(body) == _SEALED_BYTES * len(others) and frame.header.get("cohort") == _set_digest(names):
                self.sealed[who] = {peer: body[i * _SEALED_BYTES : (i + 1) * _SEALED_BYTES] for i, peer in enumerate(others)}
        self._enough(self.sealed, "cohort", names)

    def delivery(self) -> Requests:
        return {
            who: self._ask("delivery", join(self.sealed[peer][who] + peer.encode() for peer in sorted(self.sealed) if peer != who))
            for who in self.sealed
        }

    def take_uploads(self, replies: Replies) -> None:
        word, wanted = WORD[self.terms.bits], _set_digest(self.sealed)
        self.total = np.zeros(self.terms.dimension, word)
        for who, frame in self._valid(replies, "masked", sorted(self.sealed)).items():
            if frame.header.get("senders") == wanted and len(frame.body) == self.total.nbytes:
                self.total += np.frombuffer(frame.body, word)
                self.heads[who] = Frame(frame.header, frame.head, b"")
        self._enough(self.heads, "delivery", self.sealed)

    def survivors(self) -> Requests:
        return dict.fromkeys(self.heads, self._ask("survivors", join(self.heads[who].head for who in sorted(self.heads))))

    def take_agreed(self, replies: Replies) -> None:
        wanted = survivors_digest(self.uploads)
        for who, frame in self._valid(replies, "agreed", sorted(self.heads)).items():
            if frame.header.get("survivors") == wanted:
                self.agreed[who] = frame
        self._enough(self.agreed, "survivors", self.heads, minimum=self.terms.threshold)

    def agreement(self) -> Requests:
        return dict.fromkeys(self.agreed, self._ask("agreement", join(self.agreed[who].head for who in sorted(self.agreed))))

    def take_reveals(self, replies: Replies) -> None:
        size = masks.SHARE_BYTES
        for who, frame in self._valid(replies, "reveal", sorted(self.agreed)).items():
            shares = tuple(frame.body[i : i + size] for i in range(0, len(frame.body), size))
            if len(shares) == len(self.sealed) and all(masks.is_share(share) for share in shares):
                self.reveals[who] = shares
        self._enough(self.reveals, "agreement", self.agreed, minimum=self.terms.threshold)

    def opened(self) -> Opened:
        """Takes every mask off: the own mask of each survivor, and the half-paired masks of each that dropped out after sharing."""
        names, cohort = sorted(self.reveals)[: self.terms.threshold], sorted(self.keys)
        weights = masks.weights([cohort.index(name) + 1 for name in names])
        for column, who in enumerate(sorted(self.sealed)):
            secret = self._combined([self.reveals[name][column] for name in names], weights)
            if who in self.heads:
                self._check_secret(_commitment(secret, self.terms) == self.keys[who].header["seed"])
                masks.add_mask(self.total, secret, sign=-1)
            else:
                self._take_off_pairs(who, X25519PrivateKey.from_private_bytes(secret))
        return Opened(total=self.total, uploads=self.uploads, left_out=dict(self.left_out))

    def _take_off_pairs(self, dropped: str, private: X25519PrivateKey) -> None:
        self._check_secret(_public(private).hex() == self.keys[dropped].header["mask"])
        for survivor in self.heads:
            seed = masks.agree(private, bytes.fromhex(self.keys[survivor].header["mask"]), terms=self.terms.digest, purpose="mask")
            masks.add_mask(self.total, seed, sign=-masks.pair_sign(survivor, dropped))

    @property
    def uploads(self) -> dict[str, str]:
        return {who: str(frame.header["body"]) for who, frame in self.heads.items()}

    def _combined(self, shares: Sequence[bytes], weights: Sequence[int]) -> bytes:
        try:
            return masks.combine(shares, weights)
        except PeerRefused:
            raise self._broken() from None

    def _check_secret(self, is_right: bool) -> None:
        if not is_right:
            raise self._broken()

    def _broken(self) -> RoundAborted:
        return RoundAborted("shares that combine to the secret that was committed to", remedy="A client revealed a wrong share; run the round again.")

    def _ask(self, kind: str, body: bytes) -> bytes:
        return sealed_frame(self.signer, {"kind": kind, "terms": self.terms.digest.hex()}, body)

    def _valid(self, replies: Replies, kind: str, expected: Iterable[str]) -> dict[str, Frame]:
        """The replies that their senders signed; the others count as lost."""
        found = {}
        for who in expected:
            try:
                frame = open_frame(replies.get(who, b""), self.roster.clients[who], kind=kind, terms=self.terms.digest)
                if frame.header.get("from") != who:
                    raise PeerRefused("a message of its sender")
                checked_body(frame)
                found[who] = frame
            except PeerRefused:
                continue
        return found

    def _enough(self, answered: Mapping[str, object], stage: str, asked: Iterable[str], *, minimum: int | None = None) -> None:
        self.left_out |= {who: stage for who in asked if who not in answered}
        needed = max(self.terms.threshold, self.terms.minimum) if minimum is None else minimum
        if len(answered) < needed:
            raise RoundAborted(f"at least {needed} clients at stage {stage}", value=len(answered), remedy="Nothing was opened; run the round again.")


def _terms_of(header: Mapping[str, Any]) -> Terms:
    given = header.get("terms_json")
    kinds = {
        "session": str,
        "number": int,
        "members": list,
        "threshold": int,
        "minimum": int,
        "dimension": int,
        "bits": int,
        "model": str,
        "roster": str,
        "plan": str,
    }
    if not isinstance(given, dict) or set(given) != set(kinds) or any(type(given[key]) is not kind for key, kind in kinds.items()):
        raise TermsRefused("terms with all their fields")
    return Terms(**{**given, "members": tuple(str(member) for member in given["members"])})


def _sender(frame: bytes, roster: Roster) -> str:
    who = _parse(frame)[0].get("from")
    if not isinstance(who, str) or who not in roster.clients:
        raise PeerRefused("a sender out of the pinned roster")
    return who


def _read_keys(frame: bytes, roster: Roster, terms: Terms) -> tuple[str, tuple[bytes, bytes]]:
    """Returns who sent a "keys" message and the two public keys in it."""
    who = _sender(frame, roster)
    if who not in terms.members:
        raise PeerRefused("keys of a member of this round")
    header = open_frame(frame, roster.clients[who], kind="keys", terms=terms.digest).header
    try:
        cipher, mask = bytes.fromhex(header["cipher"]), bytes.fromhex(header["mask"])
    except (KeyError, TypeError, ValueError):
        raise PeerRefused("two X25519 keys") from None
    return who, (cipher, mask)


def _public(private: X25519PrivateKey) -> bytes:
    return private.public_key().public_bytes_raw()


def _commitment(seed: bytes, terms: Terms) -> str:
    """A commitment to a 256-bit seed: it hides, because the seed is uniform, and the server checks by it what it combined."""
    return _hex(masks.PROTOCOL + b" seed" + terms.digest + seed)
