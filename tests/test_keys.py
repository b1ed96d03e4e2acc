"""Keys: derivation, sealing, forgetting, the master key's three homes, and the keystream's published vectors."""

from __future__ import annotations

import base64
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from sqlalchemy import Connection

from discreet.errors import ConfigInvalid, Forgotten, KeyUnavailable, RecordInvalid, SealBroken, StorageFull
from discreet.keys import Key, Keyring, Stream, open_master
from discreet.record import SubjectId
from discreet.store import Store, storage_full


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path}/keys.db")


@pytest.fixture
def keyring(store: Store, tmp_path: Path) -> Keyring:
    return Keyring(store, open_master(f"file:{tmp_path}/master.key"))


def test_keystream_is_chacha20_rfc8439():
    # RFC 8439, A.1, test vectors 1 and 2: zero key, zero nonce, block counters 0 and 1.
    keystream = Stream(bytes(32)).bytes(128).hex()
    assert keystream.startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    assert keystream[128:].startswith("9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed")


def test_fork_depends_on_name_and_not_on_position():
    one, other = Stream(bytes(32)), Stream(bytes(32))
    one.bytes(17)
    assert one.fork("noise", 3).bytes(32) == other.fork("noise", 3).bytes(32)
    assert other.fork("noise", 3).bytes(32) != other.fork("noise", 4).bytes(32)
    assert other.fork("a", "bc").bytes(32) != other.fork("ab", "c").bytes(32)
    assert other.fork(1).bytes(32) != other.fork("1").bytes(32)


def test_no_nonce_is_used_twice():
    """Also for the same plaintext in the same context: a nonce that came from what is sealed would tell that two are equal."""
    key = Key.random()
    sealed = [key.seal(b"plain", context=b"shard/1") for _ in range(1000)]
    assert len({each[:12] for each in sealed}) == len(sealed), "1,000 of 2^96: a collision has probability 6e-24"
    assert {key.open(each, context=b"shard/1") for each in sealed} == {b"plain"}


def test_seal_opens_only_with_key_and_context():
    key = Key.random()
    sealed = key.seal(b"plain", context=b"shard/1")
    assert key.open(sealed, context=b"shard/1") == b"plain"
    for wrong_key, bytes_, context in [
        (Key.random(), sealed, b"shard/1"),
        (key, sealed, b"shard/2"),
        (key, sealed[:-1], b"shard/1"),
        (key, b"", b"shard/1"),
        (key, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"shard/1"),
    ]:
        with pytest.raises(SealBroken):
            wrong_key.open(bytes_, context=context)


def test_keys_never_print():
    key = Key.random()
    assert "<key>" in repr(key)
    assert key._secret.hex() not in f"{key!r}{key!s}"


def test_forgotten_subject_stays_forgotten(store: Store, keyring: Keyring, tmp_path: Path):
    subject = keyring.pseudonym("patient-1")
    sealed = keyring.subject(subject).seal(b"note", context=b"")
    reopened = Keyring(store, open_master(f"file:{tmp_path}/master.key"))
    assert reopened.subject(subject).open(sealed, context=b"") == b"note"
    wrapped = store.engine.raw_connection().cursor().execute("SELECT wrapped FROM wrapped_keys WHERE kind='subject'").fetchone()[0]
    keyring.forget(subject)
    with pytest.raises(Forgotten):
        keyring.subject(subject)
    with pytest.raises(Forgotten):
        Keyring(store, open_master(f"file:{tmp_path}/master.key")).subject(subject)
    store.close()
    for file in tmp_path.iterdir():
        assert wrapped not in file.read_bytes(), f"the wrapped key is still in {file.name}"


def test_closed_run_gives_no_key(keyring: Keyring):
    keyring.run("r1").stream("noise", 0)
    keyring.close_run("r1")
    keyring.close_run("r1")
    with pytest.raises(Forgotten):
        keyring.run("r1")


def test_subjects_in_one_go_are_the_subjects_one_by_one(keyring: Keyring):
    names = [SubjectId(f"S{i}") for i in range(5)]
    together = keyring.subjects(names)
    assert [together[n].mac(b"x") for n in names] == [keyring.subject(n).mac(b"x") for n in names]


def test_pseudonym_is_stable_and_keyed(keyring: Keyring, store: Store):
    assert keyring.pseudonym("p") == keyring.pseudonym("p") != keyring.pseudonym("q")
    assert Keyring(store, Key.random()).pseudonym("p") != keyring.pseudonym("p")


def test_master_file_is_private(tmp_path: Path):
    path = tmp_path / "master.key"
    assert open_master(f"file:{path}").mac(b"") == open_master(f"file:{path}").mac(b"")
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    with pytest.raises(KeyUnavailable, match="mode 0o644"):
        open_master(f"file:{path}")


def test_master_from_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("DISCREET_TEST_MASTER", base64.b64encode(bytes(32)).decode())
    assert open_master("env:DISCREET_TEST_MASTER").mac(b"") == Key(bytes(32)).mac(b"")
    monkeypatch.setenv("DISCREET_TEST_MASTER", "too short")
    with pytest.raises(KeyUnavailable) as caught:
        open_master("env:DISCREET_TEST_MASTER")
    assert "too short" not in str(caught.value)
    with pytest.raises(ConfigInvalid):
        open_master("ftp:somewhere")


class _Transit(BaseHTTPRequestHandler):
    """Speaks the two calls of Vault's transit engine that we use, with a reversible toy cipher."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["X-Vault-Token"] != "token":
            self.send_response(403)
            self.end_headers()
            return
        answer = {"ciphertext": "vault:v1:" + body["plaintext"][::-1]} if "/encrypt/" in self.path else {"plaintext": body["ciphertext"][9:][::-1]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"data": answer}).encode())

    def log_message(self, *args: object) -> None:
        pass


def test_master_from_key_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    server = HTTPServer(("127.0.0.1", 0), _Transit)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    location = f"vault+http://127.0.0.1:{server.server_port}/v1/transit/discreet?file={tmp_path}/wrapped"
    try:
        monkeypatch.setenv("VAULT_TOKEN", "token")
        assert open_master(location).mac(b"") == open_master(location).mac(b"")
        assert (tmp_path / "wrapped").read_text().startswith("vault:v1:")
        monkeypatch.setenv("VAULT_TOKEN", "wrong")
        with pytest.raises(KeyUnavailable, match="HTTP 403"):
            open_master(location)
    finally:
        server.shutdown()
        server.server_close()
    assert os.environ["VAULT_TOKEN"] == "wrong"


def test_a_second_identifier_is_the_first_ones_person_for_good(store: Store, keyring: Keyring, tmp_path: Path):
    """Also after a restart and after the person's key was destroyed; all pairs or none; the database holds no pseudonym of either."""
    one, two, three, other = ("patient:1", "patient:2", "patient:3", "patient:4")
    second = keyring.pseudonym(two)
    assert keyring.declare_same([(two, one), (three, two)]) == 2, "a third by way of the second"
    assert keyring.pseudonym(one) == keyring.pseudonym(two) == keyring.pseudonym(three) != keyring.pseudonym(other)
    keyring.subject(keyring.pseudonym(other))
    for pairs in ([("patient:5", one), (other, one)], [(one, "patient:6")], [(two, "patient:6")], [(other, other)]):
        with pytest.raises(RecordInvalid):
            keyring.declare_same(pairs)
    assert keyring.pseudonym("patient:5") != keyring.pseudonym(one), "the pair before the refused one"
    keyring.subject(keyring.pseudonym(one))
    keyring.forget(keyring.pseudonym(one))
    store.scrub()
    again = Keyring(store, open_master(f"file:{tmp_path}/master.key"))
    assert again.pseudonym(three) == again.pseudonym(one)
    with pytest.raises(Forgotten):
        again.subject(again.pseudonym(two))
    content = (tmp_path / "keys.db").read_bytes()
    assert not any(word.encode() in content for word in (second, keyring.pseudonym(one)))


def test_two_keyrings_do_not_swap_two_identifiers(store: Store, keyring: Keyring, tmp_path: Path):
    """What counts is what the database says when the pair is declared, not when the keyring was opened."""
    stale = Keyring(store, open_master(f"file:{tmp_path}/master.key"))
    assert keyring.declare_same([("patient:2", "patient:1")]) == 1
    for pair in (("patient:1", "patient:2"), ("patient:2", "patient:3")):
        with pytest.raises(RecordInvalid, match="pair 1"):
            stale.declare_same([pair])
    assert stale.declare_same([("patient:2", "patient:1")], agree=lambda tx, new: pytest.fail("nothing is new")) == 0
    assert stale.pseudonym("patient:2") == keyring.pseudonym("patient:1")


def test_a_key_that_was_not_committed_is_not_given_out(store: Store, keyring: Keyring, monkeypatch: pytest.MonkeyPatch):
    begin, subject = store.transaction, keyring.pseudonym("patient:1")

    @contextmanager
    def full() -> Iterator[Connection]:
        with begin() as tx:
            yield tx
            raise storage_full()

    monkeypatch.setattr(store, "transaction", full)
    with pytest.raises(StorageFull):
        keyring.subjects([subject])
    monkeypatch.undo()
    key = keyring.subjects([subject])[subject]
    assert keyring.existing([subject]) == {subject: key}
