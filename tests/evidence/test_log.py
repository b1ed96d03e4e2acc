"""The log in its database and its bundles: round trips, every flipped byte, every rule of the story, rollback and fork, concurrent writers."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from discreet import store as store_module
from discreet.errors import ClockBackwards, EvidenceInvalid, Forgotten, NotFound, OperationFailed, StorageFull
from discreet.evidence import log as log_module
from discreet.evidence import merkle, note, statement
from discreet.evidence.log import Log, VerifiedBundle, verify_bundle, verify_proof
from discreet.evidence.statement import Predicate, Statement, canonical_json, digest_of
from discreet.keys import Key, Keyring
from discreet.record import Digest
from discreet.store import Store

ORIGIN = "example.org/log"
ADAPTER = digest_of(b"adapter")
RECORDS = tuple(digest_of(bytes([i])) for i in range(3))
GUARANTEE = {"epsilon": 7.9, "delta": 1e-6, "unit": "patient"}
PLAN = digest_of(b"plan")

FIELDS: dict[str, dict[str, object]] = {
    "collected": {"source": "notes", "sensitivity": "special"},
    "admitted": {"purpose": "assistant", "basis": "consent"},
    "refused": {"purpose": "assistant", "reason": "opt-out"},
    "deidentified": {"policy": digest_of(b"policy"), "counts": {"PERSON": 3}},
    "frozen": {"name": "corpus"},
    "budget_opened": {"budget": "patients", "epsilon": 8.0, "delta": 1e-6, "unit": "patient"},
    "reserved": {"reservation": "r1", "run": "run-1", "budget": "patients", "plan": PLAN, "snapshot": digest_of(b"snapshot")},
    "spent": {"reservation": "r1", "run": "run-1", "budget": "patients", "plan": PLAN},
    "trained": {"run": "run-1", "track": "dp", "base": digest_of(b"base"), "adapter": ADAPTER, "plan": PLAN, "guarantee": GUARANTEE},
    "audited": {"adapter": ADAPTER, "verdict": "PASS", "epsilon_lower": 0.4, "ceiling": 3.2},
    "key_destroyed": {"run": "run-1"},
    "released": {"name": "assistant", "base": digest_of(b"base"), "adapter": ADAPTER, "guarantee": GUARANTEE},
    "closed": {"reservation": "r1", "reason": "finished"},
    "overridden": {"rule": "audit", "reason": "known"},
}
STORY = [
    "collected", "admitted", "refused", "deidentified", "frozen", "budget_opened", "reserved", "spent", "trained", "closed", "key_destroyed", "audited", "released",
]  # fmt: skip


def say(kind: str, *, subjects: tuple[Digest, ...] = (), **changes: object) -> Statement:
    predicate = Predicate(kind)
    return Statement(predicate=predicate, subjects=subjects or ((ADAPTER,) if predicate.public else RECORDS), fields={**FIELDS[kind], **changes})


class House:
    """A project with its database and its log; what a test writes goes through `tell`."""

    def __init__(self, folder: Path, master: Key | None = None, origin: str = ORIGIN) -> None:
        self.database = folder / "project.db"
        self.store = Store(f"sqlite:///{self.database}")
        self.keyring = Keyring(self.store, master or Key(bytes(32)))
        self.log = Log(self.store, self.keyring, origin)
        self.key = self.log.public_key()

    def tell(self, *statements: Statement | str) -> list[int]:
        with self.store.transaction() as tx:
            return [self.log.append(tx, say(s) if isinstance(s, str) else s) for s in statements]

    def sql(self, command: str, *values: object) -> None:
        connection = sqlite3.connect(self.database)
        with connection:
            connection.execute(command, values)
        connection.close()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def story(house: House) -> House:
    house.tell(*STORY)
    return house


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """The same story, shared by the tests that change bundles and not the house."""
    made = House(tmp_path_factory.mktemp("told"))
    made.tell(*STORY)
    yield made
    made.store.close()


def failures(path: Path, key: str, pinned: bytes | None = None) -> list[str]:
    with pytest.raises(EvidenceInvalid) as caught:
        verify_bundle(path, public_key=key, pinned=pinned)
    assert caught.value.failed
    assert caught.value.exit_code == 4
    assert caught.value.to_json()["failed"] == caught.value.failed
    return caught.value.failed


# ---------------------------------------------------------------- the log


def test_what_is_appended_is_found_by_subject_and_by_kind(told: House) -> None:
    assert [e.predicate for e in told.log.entries(RECORDS[1])] == ["collected", "admitted", "refused", "deidentified", "frozen", "reserved"]
    assert [e.index for e in told.log.entries(ADAPTER)] == [5, 7, 8, 9, 10, 11, 12]
    [spent] = told.log.select(Predicate.SPENT)
    assert (spent.index, dict(spent.fields), spent.serial) == (7, FIELDS["spent"], 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", spent.time)
    assert told.log.entries(digest_of(b"nothing")) == []


def test_reading_inside_the_transaction_sees_what_it_wrote(house: House) -> None:
    with house.store.transaction() as tx:
        house.log.append(tx, say("collected"))
        assert len(house.log.entries(RECORDS[0], tx=tx)) == len(house.log.select(Predicate.COLLECTED, tx=tx)) == 1


def test_an_entry_exists_exactly_if_its_transaction_commits(house: House) -> None:
    def fail() -> None:
        with house.store.transaction() as tx:
            house.log.append(tx, say("collected"))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert house.log.select(Predicate.COLLECTED) == []
    assert house.tell("collected") == [0]


def test_writers_at_once_get_different_places(house: House) -> None:
    barrier = threading.Barrier(8)

    def write() -> None:
        own = Store(f"sqlite:///{house.database}")
        log = Log(own, Keyring(own, Key(bytes(32))), ORIGIN)
        barrier.wait()
        for _ in range(5):
            with own.transaction() as tx:
                log.append(tx, say("overridden"))
        own.close()

    threads = [threading.Thread(target=write) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = house.log.select(Predicate.OVERRIDDEN)
    assert [e.index for e in entries] == [e.serial for e in entries] == list(range(40))
    assert len(house.log.verify().entries) == 40


def test_a_clock_that_ran_backwards_is_refused(story: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module.time, "time", lambda: 1_000_000_000.0)
    with pytest.raises(ClockBackwards):
        story.tell("collected")
    assert len(story.log.verify().entries) == len(STORY)


def test_times_that_fall_are_named(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log whose owner set the times is well signed; only the order of the times shows it."""
    times = iter([1_800_000_000.0, 1_800_000_000.0, 1_700_000_000.0])
    monkeypatch.setattr(log_module, "now", lambda _: next(times))
    house.tell("overridden", "overridden", "overridden")
    bundle = house.log.export(tmp_path / "bundle", public=True)
    assert failures(bundle, house.key) == ["entries.jsonl line 2 (entry 2, overridden): before the entry that precedes it"]


def test_equal_statements_have_different_salts(house: House) -> None:
    house.tell("collected", "collected")
    first, second = (json.loads(base64.b64decode(json.loads(e.envelope)["payload"])) for e in house.log.select(Predicate.COLLECTED))
    assert first["predicate"]["salt"] != second["predicate"]["salt"]


@pytest.mark.parametrize("origin", ["", "two words", "a+b", "a\nb"])
def test_refuses_origin(tmp_path: Path, origin: str) -> None:
    with pytest.raises(EvidenceInvalid):
        House(tmp_path, origin=origin)


def test_the_public_key_is_the_same_after_a_restart(house: House, tmp_path: Path) -> None:
    assert House(tmp_path).key == house.key
    assert note.parse_key(house.key).name == ORIGIN


def test_checkpoint_is_a_signed_note_over_the_tree_of_all_entries(told: House) -> None:
    head = note.open_checkpoint(told.log.checkpoint(), keys=[note.parse_key(told.key)])
    leaves = [merkle.leaf_hash(e.envelope) for e in told.log.verify().entries]
    assert (head.origin, head.size, head.root) == (ORIGIN, len(STORY), merkle.root(leaves))
    assert told.log.checkpoint() == told.log.checkpoint()


def test_an_empty_log_has_a_checkpoint_and_a_bundle(house: House, tmp_path: Path) -> None:
    for public in (True, False):
        verified = verify_bundle(house.log.export(tmp_path / "bundle", public=public), public_key=house.key)
        assert (verified.checkpoint.size, verified.entries, verified.public) == (0, (), public)


def test_every_entry_has_a_proof_that_verifies_for_it_alone(told: House) -> None:
    entries = told.log.verify().entries
    for entry in entries:
        proof = bytes(told.log.prove(entry.index))
        assert proof.startswith(b"c2sp.org/tlog-proof@v1\nindex %d\n" % entry.index)
        assert verify_proof(proof, envelope=entry.envelope, public_key=told.key) == entry
        with pytest.raises(EvidenceInvalid):
            verify_proof(proof, envelope=entries[entry.index - 1].envelope, public_key=told.key)
    for index in (-1, len(entries)):
        with pytest.raises(NotFound):
            told.log.prove(index)


def test_every_flipped_byte_of_a_proof_is_refused(told: House) -> None:
    proof, envelope = bytes(told.log.prove(7)), told.log.select(Predicate.SPENT)[0].envelope
    for position in range(len(proof)):
        flipped = bytearray(proof)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(EvidenceInvalid):
            verify_proof(bytes(flipped), envelope=envelope, public_key=told.key)
    for malformed in (
        b"",
        proof[:-1],
        proof + b"\n",
        b"x" * 100_000,
        proof.replace(b"index 7", b"index 07"),
        proof.replace(b"\nindex", b"\nextra YQ==\nindex"),
    ):
        with pytest.raises(EvidenceInvalid):
            verify_proof(malformed, envelope=envelope, public_key=told.key)


def test_a_proof_from_another_tree_is_refused(told: House, tmp_path: Path) -> None:
    other = House(tmp_path / "other", master=Key(bytes([1] * 32)))
    other.tell(*STORY)
    [envelope] = [e.envelope for e in told.log.select(Predicate.SPENT)]
    with pytest.raises(EvidenceInvalid):
        verify_proof(bytes(other.log.prove(7)), envelope=envelope, public_key=told.key)
    with pytest.raises(EvidenceInvalid):
        verify_proof(bytes(told.log.prove(7)), envelope=envelope, public_key=other.key)


# ---------------------------------------------------------------- tampering with the database


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("DELETE FROM log_entries WHERE position = 12", "entries for|rollback"),
        ("DELETE FROM log_entries WHERE position = 4", "out of place"),
        ("UPDATE log_entries SET position = 99 WHERE position = 12", "row 99: columns"),
        ("UPDATE log_entries SET leaf_hash = zeroblob(32) WHERE position = 4", "row 4: leaf hash"),
        ("UPDATE log_entries SET leaf_hash = zeroblob(3) WHERE position = 4", "row 4: leaf hash"),
        ("UPDATE log_entries SET envelope = zeroblob(9) WHERE position = 4", "row 4"),
        ("UPDATE log_entries SET predicate = 'withheld' WHERE position = 12", "row 12: columns"),
        ("UPDATE log_entries SET serial = 99 WHERE position = 12", "row 12: columns"),
        ("UPDATE log_entries SET time = '2020-01-01T00:00:00.000000Z' WHERE position = 12", "row 12: columns"),
        ("DELETE FROM log_subjects WHERE position = 4", "log_subjects: the rows of entry 4"),
        ("INSERT INTO log_subjects VALUES ('sha256:00', 4)", "log_subjects: the rows of entry 4"),
        ("UPDATE log_checkpoints SET note = x'78'", "log_checkpoints"),
    ],
)
def test_what_was_changed_in_the_database_is_named(story: House, command: str, named: str) -> None:
    story.log.checkpoint()
    assert len(story.log.verify().entries) == len(STORY)
    story.sql(command)
    with pytest.raises(EvidenceInvalid) as caught:
        story.log.verify()
    assert any(re.search(named, item) for item in caught.value.failed), caught.value.failed


def test_what_is_read_back_is_verified(story: House) -> None:
    story.sql("UPDATE log_entries SET envelope = (SELECT envelope FROM log_entries WHERE position = 8) WHERE position = 7")
    for read in (lambda: story.log.select(Predicate.SPENT), lambda: story.log.entries(ADAPTER)):
        with pytest.raises(EvidenceInvalid) as caught:
            read()
        assert caught.value.failed == ["log_entries row 7: not the entry that was appended"]


def test_a_log_signs_no_fork_and_no_rollback(story: House) -> None:
    story.log.checkpoint()
    story.sql("DELETE FROM log_entries WHERE position = 12")
    for attempt in (story.log.checkpoint, lambda: story.log.prove(0), lambda: story.tell("overridden")):
        with pytest.raises(EvidenceInvalid, match="rollback"):
            attempt()
    story.sql("INSERT INTO log_entries SELECT 12, zeroblob(32), envelope, predicate, 99, time FROM log_entries WHERE position = 11")
    with pytest.raises(EvidenceInvalid, match="fork"):
        story.log.export(story.database.parent / "bundle", public=True)
    story.sql("UPDATE log_tiles SET hash = zeroblob(32) WHERE position = 12")
    story.tell("refused")
    for attempt in (story.log.checkpoint, lambda: story.log.prove(0), lambda: story.log.export(story.database.parent / "bundle", public=True)):
        with pytest.raises(EvidenceInvalid, match="fork"):
            attempt()


def test_a_restored_backup_is_seen_by_whoever_kept_a_checkpoint(story: House, tmp_path: Path) -> None:
    with sqlite3.connect(story.database) as source, sqlite3.connect(tmp_path / "backup.db") as target:
        source.backup(target)
    story.tell("refused")
    kept = story.log.checkpoint()
    story.store.close()
    for file in tmp_path.glob("project.db*"):
        file.unlink()
    shutil.move(tmp_path / "backup.db", story.database)
    restored = House(tmp_path)
    bundle = restored.log.export(tmp_path / "bundle", public=True)
    assert verify_bundle(bundle, public_key=restored.key)  # nothing inside shows it
    assert any("rollback" in item for item in failures(bundle, restored.key, kept))
    with pytest.raises(EvidenceInvalid, match="rollback"):
        restored.log.verify(pinned=kept)
    restored.tell("admitted", "refused")
    bundle = restored.log.export(tmp_path / "bundle", public=True)
    assert any("fork" in item for item in failures(bundle, restored.key, kept))


# ---------------------------------------------------------------- bundles


def export(house: House, tmp_path: Path, *, public: bool) -> Path:
    return house.log.export(tmp_path / "bundle", public=public)


@pytest.mark.parametrize("public", [True, False])
def test_a_bundle_verifies_without_network_and_database(story: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, public: bool) -> None:
    bundle = export(story, tmp_path, public=public)
    story.store.close()
    story.database.unlink()
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("network"))
    verified = verify_bundle(bundle, public_key=story.key + "\n")
    assert isinstance(verified, VerifiedBundle)
    assert [e.predicate for e in verified.entries] == [kind for kind in STORY if not public or Predicate(kind).public]
    assert verified.checkpoint.size == len(STORY)
    assert verified.public is public
    assert verified.note == (bundle / "checkpoint").read_bytes()


def test_a_public_bundle_shows_nothing_of_internal_statements(told: House, tmp_path: Path) -> None:
    bundle = export(told, tmp_path, public=True)
    shown = b"".join((bundle / name).read_bytes() for name in sorted(os.listdir(bundle)))
    shown += b"".join(base64.b64decode(json.loads(line)["payload"]) for line in (bundle / "entries.jsonl").read_bytes().splitlines())
    shown += base64.b64decode(json.loads((bundle / "manifest.json").read_bytes())["payload"])
    for secret in (*RECORDS, "notes", "opt-out", "PERSON", "corpus", FIELDS["reserved"]["snapshot"]):
        assert str(secret).removeprefix("sha256:").encode() not in shown
    assert ADAPTER.removeprefix("sha256:").encode() in shown  # the search does find what is there


def test_an_internal_bundle_is_for_its_owner_alone(told: House, tmp_path: Path) -> None:
    assert export(told, tmp_path, public=False).stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("public", [True, False])
def test_every_flipped_byte_of_every_file_is_named(house: House, tmp_path: Path, public: bool) -> None:
    """Every byte of the checkpoint and every 9th of the others, each with another bit; the file is among what broke. The slow test below flips all bits."""
    house.tell("budget_opened", "reserved", "spent")
    bundle = export(house, tmp_path, public=public)
    for file in sorted(bundle.iterdir()):
        content = file.read_bytes()
        for position in range(0, len(content), 1 if file.name == "checkpoint" else 9):
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            file.write_bytes(flipped)
            assert any(item.startswith(file.name) for item in failures(bundle, house.key)), (file.name, position)
        file.write_bytes(content)
    verify_bundle(bundle, public_key=house.key)


@pytest.mark.slow
def test_every_flipped_bit_of_every_file_is_named(house: House, tmp_path: Path) -> None:
    house.tell("collected", "budget_opened")
    bundle = export(house, tmp_path, public=False)
    for file in sorted(bundle.iterdir()):
        content = file.read_bytes()
        for position in range(len(content)):
            for bit in range(8):
                flipped = bytearray(content)
                flipped[position] ^= 1 << bit
                file.write_bytes(flipped)
                assert any(item.startswith(file.name) for item in failures(bundle, house.key)), (file.name, position, bit)
        file.write_bytes(content)


def swap(lines: list[bytes]) -> list[bytes]:
    return [*lines[:2], lines[3], lines[2], *lines[4:]]


EDITS: dict[str, tuple[str, Callable[[list[bytes]], list[bytes]]]] = {
    "removed": ("entries.jsonl", lambda lines: lines[:2] + lines[3:]),
    "removed at the end": ("entries.jsonl", lambda lines: lines[:-1]),
    "added twice": ("entries.jsonl", lambda lines: [*lines, lines[-1]]),
    "swapped": ("entries.jsonl", swap),
    "cut": ("entries.jsonl", lambda lines: [*lines[:-1], lines[-1][:-5]]),
    "blank line": ("entries.jsonl", lambda lines: [*lines, b"\n"]),
    "none": ("entries.jsonl", lambda _: []),
    "a line without end": ("entries.jsonl", lambda lines: [*lines, b"x" * (statement.MAX_ENVELOPE_BYTES + 5)]),
}


@pytest.mark.parametrize("public", [True, False])
@pytest.mark.parametrize("edit", EDITS)
def test_edited_entries_are_named_even_when_the_manifest_is_not_looked_at(
    told: House, tmp_path: Path, edit: str, public: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = export(told, tmp_path, public=public)
    name, change = EDITS[edit]
    lines = (bundle / name).read_bytes().splitlines(keepends=True)
    (bundle / name).write_bytes(b"".join(change(lines)))
    assert f"{name}: differs from manifest.json" in failures(bundle, told.key)
    if (public, edit) not in {(True, "removed at the end"), (True, "none")}:  # of a public tail only the manifest knows
        monkeypatch.setattr(log_module, "_check_manifest", lambda *_, **__: [])
        assert any(item.startswith(name) for item in failures(bundle, told.key))


def remake(house: House, bundle: Path, **changes: object) -> None:
    """Signs a new manifest over the files as they are: what a dishonest owner of the key would do."""
    outer = json.loads((bundle / "manifest.json").read_bytes())
    manifest = json.loads(base64.b64decode(outer["payload"]))
    files = {name: log_module._Seen.of([(bundle / name).read_bytes()]).described() for name in manifest["files"]}
    payload = canonical_json({**manifest, "files": files, **changes})
    signed = statement.seal_envelope(
        payload, payload_type=log_module.MANIFEST_TYPE, signer=house.keyring.signer("log"), key_id=note.parse_key(house.key).label
    )
    (bundle / "manifest.json").write_bytes(signed)


def test_the_owner_of_the_key_cannot_leave_out_a_public_statement(told: House, tmp_path: Path) -> None:
    bundle = export(told, tmp_path, public=True)
    lines = (bundle / "entries.jsonl").read_bytes().splitlines(keepends=True)
    (bundle / "entries.jsonl").write_bytes(b"".join(lines[:3] + lines[4:]))
    remake(told, bundle)
    assert failures(bundle, told.key) == ["entries.jsonl lines: a public statement is missing, or there twice"]


def test_the_owner_of_the_key_cannot_change_a_hidden_leaf(told: House, tmp_path: Path) -> None:
    bundle = export(told, tmp_path, public=True)
    leaves = (bundle / "leaves").read_bytes()
    (bundle / "leaves").write_bytes(bytes(32) + leaves[32:])
    remake(told, bundle)
    assert failures(bundle, told.key) == ["leaves: not the tree of the checkpoint"]
    (bundle / "leaves").write_bytes(leaves + bytes(32))
    remake(told, bundle, size=len(STORY) + 1)
    assert failures(bundle, told.key) == ["leaves: not the tree of the checkpoint"]


def test_a_node_is_not_shown_as_a_leaf(told: House, tmp_path: Path) -> None:
    """The root alone, called a tree of one leaf, has the right root: the size that was signed tells."""
    bundle = export(told, tmp_path, public=True)
    (bundle / "leaves").write_bytes(note.open_checkpoint((bundle / "checkpoint").read_bytes(), keys=[note.parse_key(told.key)]).root)
    (bundle / "entries.jsonl").write_bytes(b"")
    remake(told, bundle, size=1)
    assert failures(bundle, told.key) == ["leaves: not the tree of the checkpoint"]


def test_the_owner_of_the_key_cannot_show_an_internal_bundle_as_public(told: House, tmp_path: Path) -> None:
    bundle = export(told, tmp_path, public=False)
    remake(told, bundle, public=True)
    assert any("internal, in a public bundle" in item for item in failures(bundle, told.key))
    bundle = export(told, tmp_path, public=True)
    remake(told, bundle, public=False)
    assert any("out of place" in item for item in failures(bundle, told.key))


@pytest.mark.parametrize(
    "changes",
    [
        {"format": "discreet-bundle/v2"},
        {"origin": "example.org/other"},
        {"size": 1},
        {"files": {}},
        {"files": {"../checkpoint": {"sha256": "0" * 64, "size": 1}}},
        {"public": 1},
        {"files": []},
        {"more": 1},
    ],
)
def test_a_well_signed_manifest_of_something_else_is_named(told: House, tmp_path: Path, changes: dict) -> None:
    bundle = export(told, tmp_path, public=True)
    remake(told, bundle, **changes)
    assert any(item.startswith("manifest.json") for item in failures(bundle, told.key))


@pytest.mark.parametrize("name", ["checkpoint", "leaves", "entries.jsonl", "manifest.json"])
def test_a_missing_file_a_link_and_a_folder_are_named(told: House, tmp_path: Path, name: str) -> None:
    bundle = export(told, tmp_path, public=True)
    content = (bundle / name).read_bytes()
    (bundle / name).unlink()
    assert f"{name}: missing" in failures(bundle, told.key)
    (tmp_path / "elsewhere").write_bytes(content)
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name}: not a regular file that can be read" in failures(bundle, told.key)
    (bundle / name).unlink()
    for make in (os.mkdir, os.mkfifo):
        make(bundle / name)
        assert any(item.startswith(f"{name}: not a regular file") for item in failures(bundle, told.key))
        (os.rmdir if (bundle / name).is_dir() else os.unlink)(bundle / name)


def test_unknown_files_are_named_in_ascii(told: House, tmp_path: Path) -> None:
    bundle = export(told, tmp_path, public=True)
    (bundle / "\x1b[31mextra").write_bytes(b"")
    (bundle / ".hidden").mkdir()
    assert failures(bundle, told.key) == [r"'\x1b[31mextra': not part of a bundle", "'.hidden': not part of a bundle"]


def test_files_beyond_their_caps_are_not_read(told: House, tmp_path: Path) -> None:
    bundle = export(told, tmp_path, public=True)
    for name, cap in log_module._CAPS.items():
        original = (bundle / name).read_bytes()
        os.truncate(bundle / name, cap + 1)  # sparse: takes no space
        assert any(item.startswith(f"{name}: not a regular file of at most") for item in failures(bundle, told.key))
        (bundle / name).write_bytes(original)


def test_everything_that_broke_is_named_at_once(told: House, tmp_path: Path) -> None:
    bundle = export(told, tmp_path, public=False)
    for name in ("checkpoint", "leaves", "manifest.json"):
        content = bytearray((bundle / name).read_bytes())
        content[40] ^= 1
        (bundle / name).write_bytes(content)
    lines = (bundle / "entries.jsonl").read_bytes().splitlines(keepends=True)
    lines[3], lines[8] = lines[3].replace(b"A", b"B", 1), lines[8].replace(b"A", b"B", 1)
    (bundle / "entries.jsonl").write_bytes(b"".join(lines))
    failed = failures(bundle, told.key)
    for named in ("checkpoint", "manifest.json", "entries.jsonl line 1 ", "entries.jsonl line 3", "entries.jsonl line 8"):
        assert any(item.startswith(named) for item in failed), (named, failed)


def test_a_bundle_under_another_key_or_log_is_refused(told: House, tmp_path: Path) -> None:
    bundle = export(told, tmp_path, public=True)
    other = House(tmp_path / "other", master=Key(bytes([1] * 32)))
    renamed = House(tmp_path / "renamed", origin="example.org/other")
    for key in (other.key, renamed.key):
        failed = failures(bundle, key)
        assert {"checkpoint", "manifest.json", "entries.jsonl line 0"} <= {item.split(":")[0] for item in failed}
    for malformed in ("", "nonsense", told.key[:-1]):
        assert failures(bundle, malformed)[0].startswith("public key: ")


def test_files_of_two_bundles_of_one_log_do_not_mix(story: House, tmp_path: Path) -> None:
    old = story.log.export(tmp_path / "old", public=True)
    story.tell("refused", "overridden")
    new = story.log.export(tmp_path / "new", public=True)
    for name in ("checkpoint", "leaves", "entries.jsonl", "manifest.json"):
        mixed = tmp_path / "mixed"
        shutil.copytree(new, mixed)
        shutil.copy(old / name, mixed / name)
        assert failures(mixed, story.key)
        shutil.rmtree(mixed)


def test_a_bundle_grows_from_a_pinned_checkpoint(story: House, tmp_path: Path) -> None:
    pinned = story.log.checkpoint()
    story.tell("refused")
    bundle = export(story, tmp_path, public=True)
    assert verify_bundle(bundle, public_key=story.key, pinned=pinned).checkpoint.size == len(STORY) + 1
    assert failures(bundle, story.key, b"nonsense")[0].startswith("pinned checkpoint")
    other = House(tmp_path / "other", master=Key(bytes([1] * 32)))
    assert failures(bundle, story.key, other.log.checkpoint())[0].startswith("pinned checkpoint")


def test_export_replaces_an_earlier_bundle_and_nothing_else(story: House, tmp_path: Path) -> None:
    bundle = export(story, tmp_path, public=False)
    story.tell("refused")
    assert export(story, tmp_path, public=True) == bundle
    assert verify_bundle(bundle, public_key=story.key).public
    (bundle / "mine.txt").write_text("keep")
    with pytest.raises(OperationFailed, match="earlier evidence"):
        export(story, tmp_path, public=True)
    assert (bundle / "mine.txt").read_text() == "keep"
    assert not (tmp_path / "bundle.partial").exists()


def test_export_replaces_no_link_and_no_file(told: House, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "bundle").symlink_to(tmp_path / "target")
    with pytest.raises(OperationFailed):
        export(told, tmp_path, public=True)
    (tmp_path / "bundle").unlink()
    (tmp_path / "bundle").write_text("a file")
    with pytest.raises(OperationFailed):
        export(told, tmp_path, public=True)


@pytest.mark.parametrize(("number", "error"), [(28, StorageFull), (13, OperationFailed)])
def test_an_export_that_cannot_be_written_keeps_the_earlier_bundle(
    story: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error: type[Exception]
) -> None:
    bundle = export(story, tmp_path, public=True)
    story.tell("refused")

    def full(descriptor: int) -> None:
        raise OSError(number, "planted")

    monkeypatch.setattr(log_module.os, "fsync", full)
    with pytest.raises(error):
        export(story, tmp_path, public=True)
    monkeypatch.undo()
    assert verify_bundle(bundle, public_key=story.key).checkpoint.size == len(STORY)
    assert not (tmp_path / "bundle.partial").exists()


# ---------------------------------------------------------------- the story


def changed(kind: str, **changes: object) -> list[Statement]:
    return [say(k, **(changes if k == kind else {})) for k in STORY]


def without(*kinds: str) -> list[Statement]:
    return [say(kind) for kind in STORY if kind not in kinds]


BROKEN: dict[str, tuple[list[Statement], str]] = {
    "spent without a budget": (without("budget_opened"), r"\(spent\) without budget_opened of the same budget"),
    "spent without a reservation": (without("reserved"), r"\(spent\) without reserved"),
    "spent for another run": (changed("spent", run="run-2"), r"\(spent\) differs from entry 6 in run"),
    "spent by another plan": (changed("spent", plan=digest_of(b"other")), r"\(spent\) differs from entry 6 in plan"),
    "spent twice": ([*without("closed"), say("spent")], r"second spent of the same reservation"),
    "reserved twice": ([*without(), say("reserved")], r"second reserved of the same reservation"),
    "closed twice": ([*without(), say("closed")], r"second closed of the same reservation"),
    "opened twice": ([*without(), say("budget_opened")], r"second budget_opened of the same budget"),
    "spent after it was closed": (
        [say(k) for k in ("budget_opened", "reserved", "closed", "spent")],
        r"\(spent\) after its reservation was closed",
    ),
    "closed without a reservation": ([say("closed")], r"\(closed\) without reserved"),
    "trained without paying": (without("spent"), r"\(trained\) without spent of the same run"),
    "trained another run": (changed("trained", run="run-2"), r"\(trained\) without spent of the same run"),
    "trained by another plan": (changed("trained", plan=digest_of(b"other")), r"\(trained\) differs from entry 7 in plan"),
    "trained twice": ([*without(), say("trained")], r"second trained of the same run"),
    "released without an audit": (without("audited"), r"\(released\) without audited of the same adapter"),
    "released another adapter": (changed("released", adapter=digest_of(b"other")), r"\(released\) without audited of the same adapter"),
    "released untrained": (without("trained"), r"\(released\) without trained of the same adapter"),
    "released with a better guarantee": (
        changed("released", guarantee={**GUARANTEE, "epsilon": 1.0}),
        r"\(released\) differs from entry 8 in guarantee",
    ),
    "released on another base": (changed("released", base=digest_of(b"other")), r"\(released\) differs from entry 8 in base"),
    "released after a failed audit": (changed("audited", verdict="FAIL"), r"\(released\) after a failed audit"),
    "released before the audit": ([*without("audited", "released"), say("released"), say("audited")], r"\(released\) without audited"),
}
NEEDS_INTERNAL = {"spent without a reservation", "spent for another run", "spent by another plan", "reserved twice", "closed without a reservation"}


@pytest.mark.parametrize("case", BROKEN)
def test_a_story_that_does_not_hold_is_told(house: House, tmp_path: Path, case: str) -> None:
    statements, named = BROKEN[case]
    house.tell(*statements)
    for public in (False, True):
        bundle = export(house, tmp_path, public=public)
        if public and case in NEEDS_INTERNAL:
            with contextlib.suppress(EvidenceInvalid):  # another rule may see it; this one needs the internal statements
                verify_bundle(bundle, public_key=house.key)
            continue
        failed = failures(bundle, house.key)
        assert any(re.search(named, item) for item in failed), failed
        assert all(item.startswith("story: ") for item in failed)
    with pytest.raises(EvidenceInvalid):
        house.log.verify()


HOLDS = {
    "the whole story": without(),
    "nothing": [],
    "a control on generated text, never paid for": [say("trained", track="public", plan=None, guarantee=None)],
    "a reservation closed unspent": [say(k) for k in ("budget_opened", "reserved", "closed")],
    "a failed audit, overridden about that adapter": [*changed("audited", verdict="FAIL")[:-1], say("overridden"), say("released")],
    "a failed audit, then a passed one": [*changed("audited", verdict="FAIL")[:-1], say("audited"), say("released")],
}


@pytest.mark.parametrize("case", HOLDS)
def test_a_story_that_holds_verifies(house: House, tmp_path: Path, case: str) -> None:
    house.tell(*HOLDS[case])
    for public in (True, False):
        verify_bundle(export(house, tmp_path, public=public), public_key=house.key)


def test_an_override_about_something_else_changes_nothing(house: House, tmp_path: Path) -> None:
    about_another = say("overridden", subjects=(digest_of(b"other"),))
    house.tell(*changed("audited", verdict="FAIL")[:-1], about_another, say("released"))
    assert any("failed audit" in item for item in failures(export(house, tmp_path, public=True), house.key))


# ---------------------------------------------------------------- tiles: proofs of a long log without reading it


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """More entries than one tile holds: two full ones and the beginning of a third."""
    made = House(tmp_path_factory.mktemp("long"))
    for count in (255, 1, 257, 30):
        with made.store.transaction() as tx:
            made.log.append_all(tx, [say("refused", subjects=RECORDS[:1])] * count)
    yield made
    made.store.close()


def test_proofs_from_tiles_are_those_of_the_whole_tree(long: House) -> None:
    with long.store.transaction() as tx:
        leaves = log_module._leaves(tx)
    head = note.open_checkpoint(long.log.checkpoint(), keys=[note.parse_key(long.key)])
    assert (head.size, head.root) == (543, merkle.root(leaves))
    for index in (0, 1, 254, 255, 256, 257, 400, 511, 512, 541, 542):
        assert list(long.log.prove(index).path) == merkle.inclusion_proof(leaves, index), index
    with long.store.transaction() as tx:
        tree = log_module._Tree.of(tx)
        for old in (0, 1, 255, 256, 257, 512, 513, 543):
            assert list(tree.growth(old)) == merkle.consistency_proof(leaves, old), old


def test_a_proof_reads_tiles_and_not_the_log(long: House) -> None:
    asked: list[str] = []
    from sqlalchemy import event

    event.listen(long.store.engine, "before_cursor_execute", lambda *args: asked.append(f"{args[2]} {args[3]}"))
    long.log.checkpoint()
    del asked[:]
    long.log.prove(300)
    assert sum("log_tiles" in query for query in asked) == 3, asked  # the tile of the leaf, the last one, and the one above them
    assert not any("leaf_hash" in query for query in asked)


@pytest.mark.parametrize(
    ("command", "index", "named"),
    [
        ("UPDATE log_tiles SET hash = zeroblob(32) WHERE level = 1 AND position = 0", 300, "hash 0 of level 1"),
        ("DELETE FROM log_tiles WHERE level = 1 AND position = 1", 3, "hash 1 of level 1"),
        ("DELETE FROM log_tiles WHERE level = 0 AND position = 1", 3, "hash 1 of level 0"),
        ("UPDATE log_tiles SET hash = zeroblob(32) WHERE level = 0 AND position = 3", 2, "hash 3 of level 0"),
        ("UPDATE log_entries SET envelope = (SELECT envelope FROM log_entries WHERE position = 4) WHERE position = 3", 3, "row 3"),
    ],
)
def test_a_changed_tile_gives_no_proof_and_is_named(house: House, command: str, index: int, named: str) -> None:
    with house.store.transaction() as tx:
        house.log.append_all(tx, [say("refused", subjects=RECORDS[:1])] * 513)
    house.log.prove(index)
    house.sql(command)
    with pytest.raises(EvidenceInvalid):
        house.log.prove(index)
    with pytest.raises(EvidenceInvalid) as caught:
        house.log.verify()
    assert any(named in item for item in caught.value.failed), caught.value.failed


def test_a_log_that_was_begun_without_tiles_gets_them(house: House) -> None:
    with house.store.transaction() as tx:
        house.log.append_all(tx, [say("refused", subjects=RECORDS[:1])] * 300)
    house.sql("DELETE FROM log_tiles")
    reopened = Log(house.store, house.keyring, ORIGIN)
    assert reopened.verify().checkpoint.size == 300


def test_exported_tiles_hold_the_tree(long: House, tmp_path: Path) -> None:
    folder = long.log.export_tiles(tmp_path / "site")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert set(files) == {"checkpoint", "tile/0/000", "tile/0/001", "tile/0/002.p/31", "tile/1/000.p/2"}
    leaves = files["tile/0/000"] + files["tile/0/001"] + files["tile/0/002.p/31"]
    hashes = [leaves[i : i + 32] for i in range(0, len(leaves), 32)]
    assert files["tile/1/000.p/2"] == merkle.root(hashes[:256]) + merkle.root(hashes[256:512])
    assert note.open_checkpoint(files["checkpoint"], keys=[note.parse_key(long.key)]).root == merkle.root(hashes)
    assert log_module._tile_name(1234067, 256).as_posix() == "x001/x234/067"


# ---------------------------------------------------------------- a new key


@pytest.mark.parametrize("public", [True, False])
def test_after_a_rotation_old_proofs_and_every_key_verify(house: House, tmp_path: Path, public: bool) -> None:
    house.tell(*STORY[:8])
    before, [spent] = house.log.prove(7), house.log.select(Predicate.SPENT)
    keys = house.log.rotate()
    assert keys.split("\n")[0] == house.key
    house.tell(*STORY[8:])
    third = house.log.rotate()
    house.tell("overridden")
    assert verify_proof(bytes(before), envelope=spent.envelope, public_key=house.key) == spent
    assert verify_proof(bytes(before), envelope=spent.envelope, public_key=third) == spent
    assert verify_proof(bytes(house.log.prove(7)), envelope=spent.envelope, public_key=third) == spent
    with pytest.raises(EvidenceInvalid):  # the old key knows nothing of the checkpoint's
        verify_proof(bytes(house.log.prove(7)), envelope=spent.envelope, public_key=house.key)
    assert house.log.verify(pinned=before.checkpoint).keys == note.parse_keys(third)
    bundle = house.log.export(tmp_path / "bundle", public=public)
    for known in (*third.split("\n"), third, keys):
        assert verify_bundle(bundle, public_key=known, pinned=before.checkpoint).keys == note.parse_keys(third)
    reopened = Log(house.store, house.keyring, ORIGIN)
    assert reopened.public_key() == third
    with pytest.raises(Forgotten):
        Keyring(house.store, Key(bytes(32))).signer("log")


def test_a_bundle_of_before_verifies_with_the_keys_of_after(house: House, tmp_path: Path) -> None:
    house.tell(*STORY)
    bundle = house.log.export(tmp_path / "bundle", public=True)
    keys = house.log.rotate()
    assert verify_bundle(bundle, public_key=keys).keys == (note.parse_key(house.key),)
    with pytest.raises(EvidenceInvalid):
        verify_bundle(bundle, public_key=keys.split("\n")[1])


def test_a_process_that_did_not_rotate_signs_with_the_new_key(house: House) -> None:
    other = Log(house.store, Keyring(house.store, Key(bytes(32))), ORIGIN)
    house.log.rotate()
    with house.store.transaction() as tx:
        other.append(tx, say("refused"))
    assert len(house.log.verify().entries) == 2


def test_a_key_that_was_rotated_out_signs_nothing_more(house: House, tmp_path: Path) -> None:
    """The thief of an old key: their entry after the rotation, and their own rotation, are refused by whoever knows the new key."""
    stolen, old = house.keyring.signer("log"), note.parse_key(house.key)
    house.tell("refused")
    keys = house.log.rotate()
    house.log._signer, house.log._keys = stolen, log_module._Keys(((0, old), (99, old)))
    house.tell("refused")
    with pytest.raises(EvidenceInvalid, match="not in force"):
        Log(house.store, house.keyring, ORIGIN).verify()
    thief = House(tmp_path / "thief", master=Key(bytes([9] * 32)))
    thief.log._signer, thief.log._keys = stolen, log_module._Keys(((0, old),))
    thief.keyring._cache["signer", "log"] = Key(stolen.private_bytes_raw())
    thief.sql("DELETE FROM wrapped_keys WHERE kind = 'signer'")
    with thief.store.transaction() as tx:
        tx.execute(
            text("INSERT INTO wrapped_keys VALUES ('signer', 'log', :w)"),
            {"w": thief.keyring._wrap.seal(stolen.private_bytes_raw(), context=b"signer/log")},
        )
    thief.log.rotate()
    forged = thief.log.export(tmp_path / "forged", public=True)
    assert verify_bundle(forged, public_key=str(old))  # whoever knows the stolen key alone cannot tell
    with pytest.raises(EvidenceInvalid):
        verify_bundle(forged, public_key=keys)


@pytest.mark.parametrize("field", ["old", "new", "consent"])
def test_a_rotation_that_the_new_key_did_not_consent_to_is_refused(house: House, tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Statement

    def forged(**given: object) -> Statement:
        fields = dict(given["fields"])  # type: ignore[call-overload]
        return real(**{**given, "fields": fields | {field: base64.b64encode(bytes(64)).decode()}})  # type: ignore[arg-type]

    monkeypatch.setattr(log_module, "Statement", forged)
    keys = house.log.rotate()
    bundle = house.log.export(tmp_path / "bundle", public=True)
    for known in keys.split("\n"):
        assert failures(bundle, known) == ["keys: the key of entry 1 was not named by the one before it"]


# ---------------------------------------------------------------- the pin


def test_a_restored_database_is_refused_by_the_pin(tmp_path: Path) -> None:
    """A rollback, and a log that went on from one, are noticed at the next start; a named person may accept the loss, in the log."""
    house = House(tmp_path)
    house.log = Log(house.store, house.keyring, ORIGIN, pin=tmp_path / "pinned")
    house.log.check_pin()
    house.tell("refused")
    with sqlite3.connect(house.database) as source, sqlite3.connect(tmp_path / "backup.db") as target:
        source.backup(target)
    house.tell("refused")
    pinned = house.log.pin()
    assert (tmp_path / "pinned").read_bytes() == pinned
    house.log.check_pin()
    house.store.close()
    for file in tmp_path.glob("project.db*"):
        file.unlink()
    shutil.move(tmp_path / "backup.db", house.database)
    restored = House(tmp_path)
    restored.log = Log(restored.store, restored.keyring, ORIGIN, pin=tmp_path / "pinned")
    with pytest.raises(EvidenceInvalid, match="rollback"):
        restored.log.check_pin()
    restored.tell("refused", "refused")
    with pytest.raises(EvidenceInvalid, match="fork"):
        restored.log.check_pin()
    restored.log.accept_rollback(by="Ada", reason="the disk broke")
    restored.log.check_pin()
    [said] = restored.log.select(Predicate.OVERRIDDEN)
    assert said.fields == {"rule": "no rollback", "reason": "the disk broke", "by": "Ada", "value": "2 entries signed, 3 here"}
    assert any("fork" in item for item in failures(restored.log.export(tmp_path / "bundle", public=True), restored.key, pinned))
    restored.store.close()


def test_the_pin_of_two_processes_never_goes_backwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One signs a checkpoint and is slow to write it; meanwhile the other appends and pins."""
    pinned = tmp_path / "pinned"
    slow, quick = House(tmp_path), House(tmp_path)
    for house in (slow, quick):
        house.log = Log(house.store, house.keyring, ORIGIN, pin=pinned)
    slow.tell("refused")
    signed, written, write = threading.Event(), threading.Event(), log_module.write_atomically

    def dawdle(path: Path, content: bytes) -> None:
        if not signed.is_set():
            signed.set()
            written.wait(0.3)  # the other one may have to wait for this one
        write(path, content)

    monkeypatch.setattr(log_module, "write_atomically", dawdle)

    def follow() -> None:
        signed.wait()
        quick.tell("refused")
        quick.log.pin()
        written.set()

    threads = [threading.Thread(target=slow.log.pin), threading.Thread(target=follow)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert note.open_checkpoint(pinned.read_bytes(), keys=[note.parse_key(slow.key)]).size == 2
    for house in (slow, quick):
        house.store.close()


def test_whoever_opened_the_log_before_its_key_changed_pins_it_afterwards(tmp_path: Path) -> None:
    old, new = House(tmp_path), House(tmp_path)
    for house in (old, new):
        house.log = Log(house.store, house.keyring, ORIGIN, pin=tmp_path / "pinned")
    old.log.pin()
    new.log.rotate()
    new.log.pin()
    assert old.log.pin() == (tmp_path / "pinned").read_bytes()
    for house in (old, new):
        house.store.close()


def test_a_note_of_two_gigabytes_is_not_read(told: House, tmp_path: Path) -> None:
    """A sparse file: what is read of it is its size."""
    bundle = export(told, tmp_path, public=True)
    with (bundle / "checkpoint").open("r+b") as file:
        file.truncate(2 << 30)
    assert any("checkpoint: not a regular file of at most" in item for item in failures(bundle, told.key))


def test_a_duplicate_key_in_an_entry_is_refused(told: House, tmp_path: Path) -> None:
    bundle = export(told, tmp_path, public=True)
    first, rest = (bundle / "entries.jsonl").read_bytes().split(b"\n", 1)
    doubled = b'{"payload":"eA==",' + first[1:]
    (bundle / "entries.jsonl").write_bytes(doubled + b"\n" + rest)
    assert any("entries.jsonl line 0" in item for item in failures(bundle, told.key))
