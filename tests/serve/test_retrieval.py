"""Search shows what is allowed and is moved by nothing else; private answers are paid for first and move by no more than was paid for; whoever is erased is in no byte of an index."""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from sqlalchemy import text

from discreet import corpus, pipeline
from discreet.config import AccessSection, DeidSection, RetrievalSection, load
from discreet.dp import counts
from discreet.errors import (
    AccessDenied,
    BudgetExhausted,
    ConfigInvalid,
    DigestMismatch,
    DiscreetError,
    Forgotten,
    NotAdmitted,
    NotFound,
    NotReleased,
    PlanInvalid,
    RequestInvalid,
    SealBroken,
    SourceChanged,
)
from discreet.evidence.log import verify_bundle
from discreet.evidence.statement import Exposure, Predicate, exposure
from discreet.governance import lineage, residue
from discreet.governance.access import Access, Action, current_user
from discreet.governance.erasure import Erasure, Identity, Reason, State
from discreet.keys import Key
from discreet.ledger import Kind
from discreet.pipeline import House, Silent, erasing, searching, story
from discreet.record import Basis, Digest, Purpose, Sensitive, SubjectId
from discreet.serve import retrieval
from discreet.serve.retrieval import IndexStore, Passage

TOML = """
[project]
name = "ward"
controller = "General Hospital"
purpose = "note-assistant"
[[source]]
name = "notes"
path = "notes.jsonl"
unit = "patient"
owner = "records office"
purposes = ["note-assistant", "care"]
basis = "consent"
retention_days = 100
[[source]]
name = "letters"
path = "letters.jsonl"
unit = "patient"
owner = "records office"
purposes = ["care"]
basis = "consent"
[[source]]
name = "held-out"
path = "held.jsonl"
owner = "us"
sensitivity = "public"
purposes = ["note-assistant"]
basis = "generated"
role = "evaluation"
[deid]
names = "rules"
[privacy]
population = 60
[budget]
epsilon = 3.0
[retrieval]
purposes = ["care", "note-assistant"]
reads = { product = ["notes"] }
"""
DRUGS = ("metformin", "insulin", "doxycycline")
NOTES = [
    {"id": f"n{number}", "patient": f"p{number}", "text": f"A cough, on day {number}. Given {DRUGS[number % 3]} against it. Rest and warm drinks."}
    for number in range(12)
] + [{"id": "n0b", "patient": "p0", "text": "The cough of p0 is better. Given insulin as well, and metformin still."}]
LETTERS = [{"id": f"l{number}", "patient": f"q{number}", "text": f"Cough cough cough, cough {number}."} for number in range(8)]
LETTERS.append({"id": "l8", "patient": "p2", "text": "Cough cough cough, and a cough of somebody who has a note as well."})


def write_project(folder: Path, notes: Sequence[Mapping[str, str]] = NOTES) -> Path:
    folder.mkdir()
    for name, rows in (("notes", notes), ("letters", LETTERS), ("held", [{"id": "1", "text": "A patient was seen for a cough."}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "discreet.toml").write_text(TOML)
    return folder


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with an index; to be copied."""
    folder = write_project(tmp_path_factory.mktemp("built") / "ward")
    with pipeline.open_house(folder) as house:
        pipeline.build_index(house, Silent())
    return folder


@pytest.fixture
def house(built: Path, tmp_path: Path) -> Iterator[House]:
    shutil.copytree(built, tmp_path / "ward")
    with pipeline.open_house(tmp_path / "ward") as opened:
        yield opened


def _found(house: House, query: str = "cough", **how: Any) -> list[str]:
    """Names of the patients whose notes a search shows, best first; the digests of the project's notes are told apart by their owner."""
    by_record = {digest: row["patient"] for row in NOTES for digest in house.catalog.holds(pipeline.subject_of(house, row["patient"]))}
    return [by_record.get(each["record"], "?") for each in pipeline.search(house, query, **{"limit": 100, **how})["passages"]]


def _with(house: House, **sections: Any) -> House:
    changed = house.project.model_copy(update=sections)
    return replace(house, project=changed, access=Access(changed.access, store=house.store, keyring=house.keyring, log=house.log))


# Words, passages, ranking


@given(st.text(alphabet=st.sampled_from("ab. \n!é"), max_size=3000))
def test_passages_are_short_and_together_the_text(said: str):
    pieces = list(retrieval.cut(said))
    assert "".join(pieces) == said
    assert all(len(piece) <= retrieval.LONGEST for piece in pieces)


def test_a_passage_ends_after_a_sentence():
    said = "One short sentence here. " * 40
    assert all(piece.endswith(". ") for piece in retrieval.cut(said))
    assert next(iter(retrieval.cut("word " * 200))).endswith("word ")


def _passage(said: str, *, record: str = "r", number: int = 0) -> Passage:
    return Passage(record=Digest(record), source="notes", number=number, text=Sensitive(said), vector=_counted(said))


def _counted(said: str) -> dict[str, int]:
    words = retrieval.terms(said)
    return {word: words.count(word) for word in words}


def test_the_ranking_is_bm25():
    """Against the formula, written out for three passages of 4, 2 and 3 words, of which 'cough' is in two and 'fever' in one."""
    passages = [_passage("cough cough and fever", record="a"), _passage("a cough", record="b"), _passage("nothing to say", record="c")]
    ranked = retrieval.rank(passages, "COUGH, fever cough", limit=10)
    weight = {"cough": 0.4700036292457356, "fever": 0.9808292530117262}  # ln(1 + 1.5/2.5), ln(1 + 2.5/1.5)
    first = weight["cough"] * 2 * 2.2 / (2 + 1.2 * (0.25 + 0.75 * 4 / 3)) + weight["fever"] * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 4 / 3))
    second = weight["cough"] * 2.2 / (1 + 1.2 * (0.25 + 0.75 * 2 / 3))
    assert [(p.record, score) for score, p in ranked] == [("a", pytest.approx(first)), ("b", pytest.approx(second))]
    assert retrieval.rank([], "cough", limit=3) == []
    assert [p.record for _, p in retrieval.rank([_passage("cough", record=r) for r in "cab"], "cough", limit=2)] == ["a", "b"], (
        "ties in the order of records"
    )


WORDS = st.lists(st.sampled_from(["cough", "fever", "metformin", "insulin", "new", "drug"]), max_size=8).map(" ".join)


@given(st.dictionaries(st.integers(0, 9), st.lists(WORDS, max_size=3), max_size=6), st.integers(1, 3))
@example({0: ["cough metformin insulin new drug"]}, 1)
def test_one_subject_moves_each_count_by_one_and_all_by_their_votes(said: dict[int, list[str]], most: int):
    options, key = ["metformin", "Insulin!", "new drug"], Key(bytes(32))
    subjects = {SubjectId(f"S{number}"): [_passage(each, number=n) for n, each in enumerate(own)] for number, own in said.items()}
    counted = retrieval.votes(subjects, "cough", options, most=most, key=key)
    assert counted[::-1] == retrieval.votes(subjects, "cough", options[::-1], most=most, key=key), "in which order options stand says nothing"
    for gone in subjects:
        without = retrieval.votes({s: own for s, own in subjects.items() if s != gone}, "cough", options, most=most, key=key)
        moved = [before - after for before, after in zip(counted, without, strict=True)]
        assert set(moved) <= {0, 1}
        assert sum(moved) <= most


def test_every_word_of_the_query_and_the_option_as_a_phrase():
    own = [_passage("A cough. The new drug helps."), _passage("Fever, and a drug that is new.", number=1)]

    def asked(query: str, *options: str) -> list[int]:
        return retrieval.votes({SubjectId("S"): own}, query, options, most=len(options), key=Key(bytes(32)))

    assert asked("cough", "new drug", "drug new", "dru") == [1, 0, 0]
    assert asked("cough fever", "drug", "helps") == [0, 0], "in one passage"
    assert asked("fever", "drug that", "new drug") == [1, 0]


# What is shown


def test_whoever_may_read_a_source_finds_its_passages_and_no_other(house: House):
    answer = pipeline.search(house, "cough insulin", purpose="care", limit=3)
    assert {each["source"] for each in answer["passages"]} == {"notes"}
    assert [each["score"] for each in answer["passages"]] == sorted((each["score"] for each in answer["passages"]), reverse=True)
    assert "insulin" in answer["passages"][0]["text"]
    assert len(_found(house)) == 13
    assert _found(house, "nothing that anybody says") == []
    letters = _with(house, retrieval=RetrievalSection(purposes=("care", "note-assistant"), reads={"auditor": ("letters",)}))
    assert {each["source"] for each in pipeline.search(letters, "cough", purpose="care")["passages"]} == {"letters"}
    assert pipeline.search(letters, "cough")["passages"] == [], "the letters are for care alone, whatever the index holds"


def _leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: everything is ranked, and what may not be read is taken out of the best."""
    real, allowed = retrieval.rank, searching._allowed

    def everything(house: House, index: Any, purpose: Purpose, *, sources: set[str] | None) -> set[Digest]:
        _leaks.readable = allowed(house, index, purpose, sources=sources)
        return set(index.records)

    monkeypatch.setattr(searching, "_allowed", everything)
    monkeypatch.setattr(retrieval, "rank", lambda *a, **how: [each for each in real(*a, **how) if each[1].record in _leaks.readable])


def test_access_comes_before_the_best_are_chosen(house: House, monkeypatch: pytest.MonkeyPatch):
    """Nine letters say little but 'cough' and beat every note: an access check after the ranking starves the answer, and so tells that they are there."""
    assert len(_found(house, limit=3)) == 3
    _leaks(monkeypatch)
    assert _found(house, limit=3) == [], "the mutant is caught"


def _rebuilt_without(house: House, source: str, unit: str) -> None:
    """Takes a person out of a source and builds everything anew under the same keys."""
    path = house.project.root / f"{source}.jsonl"
    path.write_text("".join(f"{line}\n" for line in path.read_text().splitlines() if json.loads(line)["patient"] != unit))
    house.catalog.register_again(house.project, next(s for s in house.project.source if s.name == source))
    pipeline.build_index(house, Silent())


@pytest.mark.parametrize(("source", "unit"), [("letters", "q3"), ("notes", "p4")])
def test_whoever_may_not_be_read_changes_no_byte_of_an_answer(house: House, monkeypatch: pytest.MonkeyPatch, source: str, unit: str):
    """A letter, and a note whose patient withdrew: with them in the index and without, score, rank and count are the same to the bit."""
    house.consent.withdraw(pipeline.subject_of(house, "p4"))

    def answers() -> list[str]:
        return [json.dumps(pipeline.search(house, query, purpose="care", limit=k)) for query in ("cough", "cough insulin day") for k in (1, 5, 100)]

    def mutated() -> list[str]:
        with pytest.MonkeyPatch.context() as patched:
            _leaks(patched)
            return answers()

    before, leaking = answers(), mutated()
    _rebuilt_without(house, source, unit)
    assert answers() == before
    assert mutated() != leaking, "the mutant is caught"


def test_a_withdrawal_counts_from_the_next_search_on(house: House):
    subject = pipeline.subject_of(house, "p5")
    assert "p5" in _found(house)
    house.consent.withdraw(subject, Purpose("care"))
    assert "p5" not in _found(house, purpose="care")
    assert "p5" in _found(house, purpose="note-assistant")
    house.consent.withdraw(subject)
    assert "p5" not in _found(house)
    house.consent.grant(subject, Purpose("note-assistant"))
    assert "p5" in _found(house)


def _erasure(house: House, **stores: Any) -> Erasure:
    return Erasure(house.store, house.keyring, house.log, models=pipeline.erasure_of(house)._models, unit="patient", **{"stores": (), **stores})


class _Stuck:
    """A store that cannot be purged: the erasure stands still right after it has restricted its subject."""

    name = "stuck"

    def holds(self, subject: SubjectId) -> list[Digest]:
        return []

    def purge(self, subject: SubjectId) -> None:
        raise KeyboardInterrupt

    def absence(self, subject: SubjectId) -> bool:
        return False


def test_an_erasure_that_has_begun_counts_and_a_mere_request_does_not(house: House):
    subject = pipeline.subject_of(house, "p5")
    pipeline.request_erasure(house, "p5")
    assert "p5" in _found(house), "a stranger's word restricts nobody"
    with pytest.raises(KeyboardInterrupt):
        _erasure(house, stores=(_Stuck(),)).execute(subject, identity=Identity(method="test", by="test"))
    assert _erasure(house).state(subject) is State.RESTRICTED
    assert subject in [block.subject for block in _index(house).blocks], "their bytes are still there"
    assert "p5" not in _found(house)
    assert len(_found(house)) == 12


def test_a_restored_backup_brings_nobody_back_into_a_search(house: House):
    """The folder as it was before the erasure, with the journal of now: the search restricts whom it names, before any other command does."""
    house.store.close()
    kept = house.project.root.with_name("kept")
    shutil.copytree(house.project.state, kept)
    _erase(house, "p5")
    house.store.close()
    journal = (house.project.state / "suppressions").read_bytes()
    shutil.rmtree(house.project.state)
    shutil.copytree(kept, house.project.state)
    (house.project.state / "suppressions").write_bytes(journal)
    with pipeline.open_house(house.project.root, exclusive=False) as restored:
        assert pipeline.subject_of(restored, "p5") in [block.subject for block in _index(restored).blocks]
        assert "p5" not in _found(restored)
        assert len(_found(restored)) == 12


def test_what_is_past_retention_is_not_found(house: House, monkeypatch: pytest.MonkeyPatch):
    assert _found(house)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 101 * 86_400)
    assert _found(house) == []


def test_roles_and_purposes(house: House):
    pytest.importorskip("cedarpy")
    me, options = current_user().name, {"options": ["metformin", "insulin"], "epsilon": 0.01}
    pipeline.ask(house, "cough", **options)  # opens the budget
    for role, may_search, may_ask in (("auditor", 0, 0), ("owner", 0, 0), ("privacy_officer", 1, 0), ("engineer", 1, 1), ("product", 1, 1)):
        asked = _with(house, access=AccessSection(**{role: (me,)}), retrieval=RetrievalSection(purposes=("care",), reads={role: ("notes",)}))
        asked.store.scrub()
        for may, call in ((may_search, lambda h=asked: pipeline.search(h, "cough")), (may_ask, lambda h=asked: pipeline.ask(h, "cough", **options))):
            if may:
                with pytest.raises(SourceChanged):  # allowed, and then the index of other purposes is refused
                    call()
            else:
                with pytest.raises(AccessDenied, match="a role that may"):
                    call()
    product = _with(house, access=AccessSection(product=(me,)))
    assert len(_found(product)) == 13
    reads_nothing = _with(product, retrieval=house.project.retrieval.model_copy(update={"reads": {"auditor": ("notes",)}}))
    with pytest.raises(AccessDenied, match="may read a source"):
        pipeline.search(reads_nothing, "cough")
    assert pipeline.ask(reads_nothing, "cough", **options)["cap"] == 1, "private answers are for those who may read nothing"
    auditor = _with(house, access=AccessSection(auditor=(me,)))
    auditor.access.break_glass(Action.SEARCH, who=current_user(), reason="the ward asks what it was given")
    with pytest.raises(AccessDenied, match="may read a source"):  # broken glass opens the search, not the sources
        pipeline.search(auditor, "cough")
    with pytest.raises(NotAdmitted, match="marketing"):
        pipeline.search(product, "cough", purpose="marketing")
    with pytest.raises(ConfigInvalid, match="purposes"):
        pipeline.search(_with(house, retrieval=RetrievalSection()), "cough")
    for wrong in ({"query": " . "}, {"query": "cough", "limit": 0}, {"query": "cough", "limit": 101}):
        with pytest.raises(RequestInvalid):
            pipeline.search(house, **wrong)


def test_a_role_that_reads_an_unknown_source_is_a_mistake(tmp_path: Path):
    folder = write_project(tmp_path / "ward")
    (folder / "discreet.toml").write_text(TOML.replace('["notes"] }', '["nothing"] }'))
    with pytest.raises(ConfigInvalid, match="nothing"):
        load(folder)


def test_the_log_says_who_read_what_and_nothing_of_the_query(house: House, tmp_path: Path):
    words = "zwetschgenkuchen"
    answer = pipeline.search(house, f"cough {words}", limit=2)
    pipeline.ask(house, f"cough {words}", options=["metformin", "call +1 212 555 0142"], epsilon=0.1)
    [said] = house.log.select(Predicate.SEARCHED)
    assert [*said.subjects[1:]] == [each["record"] for each in answer["passages"]]
    assert said.fields == {
        "purpose": "note-assistant",
        "by": current_user().name,
        "role": ", ".join(house.access.roles(current_user())),
        "passages": 2,
    }
    assert [line["predicate"] for line in pipeline.trace(house, answer["passages"][0]["record"])][-1] == "searched"
    [measured] = house.log.select(Predicate.MEASURED)
    assert next(option for option, _ in measured.fields["values"]) == "metformin"
    assert "555" not in json.dumps(measured.fields["values"])
    pipeline.export_evidence(house, tmp_path / "evidence", public=False)
    house.store.close()
    assert residue.find(tmp_path, [words, "212 555 0142"]) == []


# The index as an artifact


def _index(house: House) -> retrieval.Index:
    [file] = house.indexes.iterdir()
    return retrieval.open_index(Digest(f"sha256:{file.stem}"), keyring=house.keyring, folder=house.indexes)


def test_the_index_is_below_its_snapshot_and_people_are_told_of_it(house: House):
    assert {event["job"]["name"] for event in pipeline.lineage_export(house, unit="p1")} == {"make snapshot", "make index"}
    assert {made["kind"] for made in pipeline.access_export(house, "p1")["derived"]} == {"snapshot", "index"}
    with house.store.transaction() as tx:
        tx.execute(text("DELETE FROM derivations"))
    for call in (lambda: pipeline.search(house, "cough"), lambda: pipeline.ask(house, "cough", options=["a", "b"], epsilon=1)):
        with pytest.raises(NotReleased, match="snapshot is known"):
            call()
    assert not house.ledger.budgets(), "and nothing was charged"


def test_a_newer_index_takes_the_place_of_the_older(house: House):
    before = _index(house).digest
    [root_before] = [Digest(f"sha256:{path.name}") for path in house.snapshots.iterdir()]
    house.consent.withdraw(pipeline.subject_of(house, "p5"))
    built = pipeline.build_index(house, Silent())
    assert built["index"] != before
    assert _index(house).digest == built["index"]
    with house.store.transaction() as tx:
        assert not lineage.is_known(tx, before)
        assert lineage.is_known(tx, Digest(built["index"]))
        assert [lineage.is_known(tx, root) for root in (root_before, Digest(built["snapshot"]))] == [False, True]
    assert [f"sha256:{path.name}" for path in house.snapshots.iterdir()] == [built["snapshot"]], "the text of the older went with it"
    assert pipeline.build_index(house, Silent())["index"] == built["index"], "the same again is the same"
    assert len(_found(house)) == 12


def test_a_stale_index_is_refused(house: House):
    with pytest.raises(SourceChanged, match="discreet index"):
        pipeline.search(_with(house, deid=DeidSection(names="rules", policy="redact")), "cough")
    with (house.project.root / "notes.jsonl").open("a") as file:
        file.write(json.dumps({"id": "n99", "patient": "p99", "text": "A cough that is new."}) + "\n")
    source = house.catalog.register_again(house.project, house.project.source[0])
    assert len(_found(house)) == 13, "nothing was taken in yet"
    house.catalog.collect(source)
    for call in (lambda: pipeline.search(house, "cough"), lambda: pipeline.ask(house, "cough", options=["a", "b"], epsilon=1)):
        with pytest.raises(SourceChanged, match="discreet index"):
            call()
    assert not house.ledger.budgets(), "and nothing was charged"
    pipeline.build_index(house, Silent())
    assert len(_found(house)) == 14


def test_a_changed_record_is_shown_neither_old_nor_new(house: House):
    path = house.project.root / "notes.jsonl"
    path.write_text(path.read_text().replace("on day 5.", "on the day before."))
    source = house.catalog.register_again(house.project, house.project.source[0])
    index = _index(house)
    before = searching._allowed(house, index, Purpose("care"), sources={"notes"})
    house.catalog.collect(source)
    assert len(before) - len(searching._allowed(house, index, Purpose("care"), sources={"notes"})) == 1, (
        "what was superseded is not allowed, stale index or not"
    )


def test_an_update_builds_the_index_before_it_trains(house: House, monkeypatch: pytest.MonkeyPatch):
    with (house.project.root / "notes.jsonl").open("a") as file:
        file.write(json.dumps({"id": "n99", "patient": "p99", "text": "A cough that is new."}) + "\n")

    class Trains(Exception):
        pass

    def train(*_: object, **__: object) -> None:
        raise Trains

    monkeypatch.setattr(story, "run", train)
    with pytest.raises(Trains):
        pipeline.update(house, Silent())
    assert len(_found(house)) == 14


def test_every_changed_byte_is_noticed(house: House):
    [file] = house.indexes.iterdir()
    content = file.read_bytes()
    for place in range(0, len(content), 61):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises((SealBroken, DigestMismatch)):
            _index(house).passages(_index(house).records.keys(), house.keyring)
    for cut_off in (content[:-1], content + b"x", b"", content[:20]):
        file.write_bytes(cut_off)
        with pytest.raises((SealBroken, DigestMismatch)):
            pipeline.search(house, "cough")
    first, second = _split(content, house)[1:3]
    file.write_bytes(content.replace(first, bytes(len(first))).replace(second, first))
    with pytest.raises((SealBroken, DigestMismatch)):  # in another's place
        _index(house).passages(_index(house).records.keys(), house.keyring)


def _split(content: bytes, house: House) -> list[bytes]:
    digest = Digest(f"sha256:{next(house.indexes.iterdir()).stem}")
    return [block.sealed for block in retrieval._read(content, digest, house.keyring.purpose("retrieval"))]


def test_a_kill_leaves_the_earlier_index_or_none(house: House, monkeypatch: pytest.MonkeyPatch):
    house.consent.withdraw(pipeline.subject_of(house, "p5"))

    def half(path: Path, content: bytes) -> None:
        path.with_name(path.name + ".partial").write_bytes(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_before_the_log(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    house.store.close()
    for where, how in ((retrieval, half), (lineage, killed_before_the_log)):
        child = os.fork()
        if child == 0:
            setattr(where, "write_atomically" if where is retrieval else "derive", how)
            monkeypatch.setattr(searching, "freeze", lambda h, name, documents: _frozen(h, documents))
            pipeline.build_index(house, Silent())
            os._exit(0)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
        assert len(list(house.indexes.iterdir())) == 2
        assert len(_found(house)) == 12, "the earlier index answers"
    assert not IndexStore(house.indexes, house.keyring).absence(pipeline.subject_of(house, "p5"))
    pipeline.build_index(house, Silent())
    assert len(list(house.indexes.iterdir())) == 1


def _nodes(house: House) -> list[str]:
    with house.store.transaction() as tx:
        return sorted(tx.execute(text("SELECT digest FROM artifacts WHERE kind IN ('snapshot', 'index')")).scalars())


class _Killed(BaseException):
    """In place of a kill, where the test goes on in the same process."""


def _kill(*about: object, **_: object) -> None:
    """Of a folder that was to be removed, the first file is gone already."""
    for folder in about:
        if isinstance(folder, Path):
            (folder / corpus._MANIFEST).unlink(missing_ok=True)
    raise _Killed


@pytest.mark.parametrize(("where", "name"), [(retrieval, "build"), (corpus, "remove"), (shutil, "rmtree")])
def test_what_a_kill_leaves_in_the_lineage_goes_with_the_next_index(house: House, monkeypatch: pytest.MonkeyPatch, where: Any, name: str):
    house.consent.withdraw(pipeline.subject_of(house, "p5"))
    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(where, name, _kill)
        pipeline.build_index(house, Silent())
    house.consent.withdraw(pipeline.subject_of(house, "p6"))
    built = pipeline.build_index(house, Silent())
    assert _nodes(house) == sorted([built["index"], built["snapshot"]])
    assert {made["kind"] for made in pipeline.access_export(house, "p1")["derived"]} == {"snapshot", "index"}
    assert len(pipeline.access_export(house, "p1")["derived"]) == 2
    assert _erase(house, "p1")["failed"] == []
    assert [path.name for path in house.snapshots.iterdir()] == [built["snapshot"].removeprefix("sha256:")]


def test_a_search_while_the_index_is_replaced_looks_into_the_new_one(house: House, monkeypatch: pytest.MonkeyPatch):
    house.consent.withdraw(pipeline.subject_of(house, "p5"))
    real, replaced = retrieval.open_index, []

    def late(*about: Any, **where: Any) -> retrieval.Index:
        if not replaced:
            replaced.append(pipeline.build_index(house, Silent()))
        return real(*about, **where)

    monkeypatch.setattr(retrieval, "open_index", late)
    assert len(_found(house)) == 12
    next(house.indexes.iterdir()).unlink()
    with pytest.raises(NotFound):  # and one that is gone is gone
        _found(house)


def _frozen(house: House, documents: Any) -> Any:
    """`freeze` without its edges, for a process in which `lineage.derive` kills."""
    return corpus.freeze(documents, name="retrieval", keyring=house.keyring, log=house.log, store=house.store, folder=house.snapshots)


# Erasing


def _erase(house: House, unit: str) -> dict[str, Any]:
    """As `pipeline.erase`, for nobody who waits for an answer."""
    identity = Identity(method="vouched for by the operator", by=current_user().name)
    return erasing._erase(house, pipeline.subject_of(house, unit), identity=identity, reason=Reason.DRILL)


def test_nothing_of_an_erased_person_is_left_in_an_index(house: House, tmp_path: Path):
    subject = pipeline.subject_of(house, "p0")
    index = _index(house)
    mine = next(block for block in index.blocks if block.subject == subject)
    shutil.copy(house.indexes / f"{index.digest[7:]}.index", tmp_path / f"{index.digest[7:]}.index")
    assert any("index (decoded)" in place for place in pipeline.remains(house, ["insulin as well"]))
    assert any("index (decoded)" in place for place in pipeline.remains(house, ["p0 still the well"])), "the vectors too"
    done = _erase(house, "p0")
    assert done["failed"] == []
    assert "indexes" in done["stores"]
    [entry] = [e for e in house.log.select(Predicate.ERASED) if "decisions" in e.fields]
    assert entry.fields["decisions"][index.digest].startswith("purged")
    house.store.close()
    content = next(house.indexes.iterdir()).read_bytes()
    assert mine.sealed not in content
    assert all(mine.sealed[start : start + 16] not in content for start in range(len(mine.sealed) - 16))
    needles = [*(row["text"] for row in NOTES if row["patient"] == "p0"), "insulin as well", "p0 still the well", subject]
    assert pipeline.remains(house, needles) == []
    assert subject not in [block.subject for block in _index(house).blocks]
    assert len(_found(house)) == 11, "the others are found as before"
    copy = retrieval.open_index(index.digest, keyring=house.keyring, folder=tmp_path)
    with pytest.raises(Forgotten):  # the key is gone, in every copy
        copy.passages(set(mine.records), house.keyring)


def test_an_index_that_does_not_open_stands_in_no_erasures_way(house: House):
    [file] = house.indexes.iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    (house.indexes / "left.index.partial").write_bytes(b"left")
    (house.indexes / ".DS_Store").write_bytes(b"Bud1")
    (house.indexes / "copies" / "old.index").mkdir(parents=True)
    (house.indexes / "old.index").mkdir()
    (house.indexes / "away").symlink_to(house.project.root)
    store = IndexStore(house.indexes, house.keyring)
    assert not store.absence(pipeline.subject_of(house, "nobody"))
    assert _erase(house, "p0")["failed"] == []
    assert list(house.indexes.iterdir()) == []
    assert (house.project.root / "notes.jsonl").is_file(), "a link goes, not what it leads to"
    with pytest.raises(NotFound, match="discreet index"):
        pipeline.search(house, "cough")
    (house.indexes / "old.index").mkdir()
    pipeline.build_index(house, Silent())
    assert len(list(house.indexes.iterdir())) == 1


def test_a_store_that_misses_the_index_is_named(house: House, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(IndexStore, "purge", lambda *_: None)
    with pytest.raises(DiscreetError, match="indexes"):
        _erase(house, "p0")
    assert "p0" not in _found(house)


def test_the_drill_plants_somebody_in_an_index_too(house: House, monkeypatch: pytest.MonkeyPatch):
    before = sorted(house.indexes.iterdir())
    assert pipeline.drill(house)["left"] == []
    assert sorted(house.indexes.iterdir()) == before
    monkeypatch.setattr(IndexStore, "purge", lambda *_: None)
    with pytest.raises(DiscreetError, match="indexes"):
        pipeline.drill(house)


@pytest.mark.parametrize(
    ("where", "name"), [(retrieval, "remove"), (lineage, "retire_all"), (corpus, "remove"), (shutil, "rmtree"), (erasing, "_erase")]
)
def test_what_a_killed_drill_leaves_goes_with_the_next(house: House, monkeypatch: pytest.MonkeyPatch, where: Any, name: str):
    def there() -> tuple[list[str], list[Path], list[Path]]:
        return _nodes(house), sorted(house.indexes.iterdir()), sorted(house.snapshots.iterdir())

    before = there()
    with monkeypatch.context() as patched, pytest.raises(_Killed):
        patched.setattr(where, name, _kill)
        pipeline.drill(house)
    assert there() != before
    pipeline.drill(house)
    assert there() == before


# Private answers


class _NoNoise:
    """Counts as they are, to see what is counted."""

    @staticmethod
    def of(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(counts, "laplace", lambda *_, **__: list)


def _units(house: House, query: str = "cough", **how: Any) -> dict[str, int]:
    asked = {"options": list(DRUGS), "epsilon": 0.1, "purpose": "care", **how}
    return {told["option"]: told["units"] for told in pipeline.ask(house, query, **asked)["options"]}


def test_people_are_counted_and_not_their_passages(house: House, monkeypatch: pytest.MonkeyPatch):
    """p0 has two notes and names two drugs: with one vote one of them, with two both, and never one twice."""
    _NoNoise.of(monkeypatch)
    assert sum(_units(house).values()) == 12
    assert _units(house, votes=2) == {"metformin": 4, "insulin": 5, "doxycycline": 4}
    assert _units(house, query="cough 3") == {"metformin": 1, "insulin": 0, "doxycycline": 0}
    house.consent.withdraw(pipeline.subject_of(house, "p0"))
    assert _units(house, votes=2) == {"metformin": 3, "insulin": 4, "doxycycline": 4}, "whoever withdrew is not counted"


def test_a_withdrawal_changes_no_charge(house: House):
    def charged() -> tuple[float, float]:
        before = house.ledger.show("default").remaining_epsilon if house.ledger.budgets() else 3.0
        answer = pipeline.ask(house, "cough", options=list(DRUGS), epsilon=0.25)
        return before - house.ledger.show("default").remaining_epsilon, answer["epsilon"]

    assert charged() == (pytest.approx(0.25), 0.25)
    house.consent.withdraw(pipeline.subject_of(house, "p0"))
    assert charged() == (pytest.approx(0.25), 0.25)
    [first, second] = house.log.select(Predicate.RESERVED)
    assert first.fields["snapshot"] == second.fields["snapshot"]
    assert {entry.fields["kind"] for entry in (first, second)} == {Kind.RETRIEVAL.value}


def test_the_charge_comes_before_the_count_and_a_refusal_looks_at_nothing(house: House, monkeypatch: pytest.MonkeyPatch):
    looked: list[str] = []

    def seen(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*a: Any, **how: Any) -> Any:
            looked.append(name)
            return real(*a, **how)

        return call

    monkeypatch.setattr(searching, "_allowed", seen("consent", searching._allowed))
    monkeypatch.setattr(retrieval.Index, "passages", seen("passages", retrieval.Index.passages))
    monkeypatch.setattr(house.ledger, "charge", seen("charge", house.ledger.charge))
    pipeline.ask(house, "cough", options=["metformin", "insulin"], epsilon=2.5)
    assert looked == ["charge", "consent", "passages"]
    looked.clear()
    with pytest.raises(BudgetExhausted):
        pipeline.ask(house, "cough", options=["metformin", "insulin"], epsilon=1.0)
    assert looked == ["charge"]
    assert len(house.log.select(Predicate.MEASURED)) == 1
    looked.clear()
    monkeypatch.setattr(retrieval, "votes", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pipeline.ask(house, "cough", options=["metformin", "insulin"], epsilon=0.25)
    assert house.ledger.show("default").remaining_epsilon == pytest.approx(0.25), "what was charged stays charged"


def test_neither_an_answer_nor_a_refusal_says_what_is_left(house: House):
    """What is left is that of whoever in the index has least: one person with an earlier spend moves it, without noise."""
    asked: dict[str, Any] = {"options": ["metformin", "insulin"], "epsilon": 1.75}
    answer = pipeline.ask(house, "cough", **asked)
    assert set(answer) == {"purpose", "reservation", "epsilon", "delta", "unit", "cap", "options", "margin"}
    with pytest.raises(BudgetExhausted) as refused:
        pipeline.ask(house, "cough", **asked)
    assert house.ledger.show("default").remaining_epsilon == pytest.approx(1.25)
    assert "1.25" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"epsilon": 0.0}, PlanInvalid),
        ({"epsilon": float("nan")}, PlanInvalid),
        ({"epsilon": 1e-310}, PlanInvalid),
        ({"votes": 0}, PlanInvalid),
        ({"votes": 3}, PlanInvalid),
        ({"options": ["metformin"]}, RequestInvalid),
        ({"options": ["metformin", "Metformin!"]}, RequestInvalid),
        ({"options": ["metformin", "..."]}, RequestInvalid),
        ({"options": [f"drug {n}" for n in range(101)]}, RequestInvalid),
        ({"options": ["metformin", "insulin\udc80"]}, RequestInvalid),
        ({"options": ["metformin", "insulin " + "x " * 297]}, RequestInvalid),
        ({"query": "?"}, RequestInvalid),
        ({"query": "cough\udc80"}, RequestInvalid),
        ({"query": "cough " * 101}, RequestInvalid),
        ({"purpose": "marketing"}, NotAdmitted),
    ],
)
def test_what_cannot_be_asked_costs_nothing(house: House, wrong: dict[str, Any], error: type[DiscreetError]):
    asked: dict[str, Any] = {"query": "cough", "options": ["metformin", "insulin"], "epsilon": 1.0, **wrong}
    with pytest.raises(error):
        pipeline.ask(house, asked.pop("query"), **asked)
    assert not house.ledger.budgets()


def test_the_noise_is_that_of_the_charge_and_of_the_votes(house: House, monkeypatch: pytest.MonkeyPatch):
    made: list[tuple[float, int]] = []
    real = counts.laplace

    def laplace(epsilon: float, *, sensitivity: int) -> Any:
        made.append((epsilon, sensitivity))
        return real(epsilon, sensitivity=sensitivity)

    monkeypatch.setattr(counts, "laplace", laplace)
    answer = pipeline.ask(house, "cough", options=list(DRUGS), epsilon=0.4, votes=2)
    assert made == [(0.4, 2)]
    assert (answer["epsilon"], answer["cap"], answer["delta"], answer["margin"]) == (0.4, 2, 0.0, counts.margin(0.4, sensitivity=2))
    assert all(isinstance(told["units"], int) and told["units"] >= 0 for told in answer["options"])
    [said] = house.log.select(Predicate.MEASURED)
    assert said.fields["kind"] == "retrieval"
    assert said.fields["values"] == [[told["option"], told["units"]] for told in answer["options"]]


def test_the_longest_options_have_room_in_the_log(house: House):
    """Of what grows most on its way into it: identifiers that become longer, and characters that are escaped. Whatever is charged is said."""
    for filler in ("\x01", "\N{DROMEDARY CAMEL}", "Al\x01", "a@b.c\x01"):
        options = [f"{number} {filler * 600}"[:600] for number in range(100)]
        pipeline.ask(house, "cough", options=options, epsilon=0.01)
    assert len(house.log.select(Predicate.MEASURED)) == 4


def _shown(house: House, out: Path) -> list[tuple[str, dict[str, Any]]]:
    bundle, key = pipeline.export_evidence(house, out, public=True)
    return [
        (
            entry.predicate.value,
            {name: value for name, value in entry.fields.items() if exposure(entry.predicate, name) is Exposure.PUBLIC}
            | ({} if exposure(entry.predicate, "subject") is Exposure.DP_RELEASED else {"subject": entry.subjects}),
        )
        for entry in verify_bundle(bundle, public_key=key.read_text()).entries
    ]


def test_public_bundles_of_two_corpora_that_differ_in_one_person_differ_only_in_what_is_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _NoNoise.of(monkeypatch)  # so that the released counts do differ
    told = []
    for name, notes in (("one", NOTES), ("other", [row for row in NOTES if row["patient"] != "p0"])):
        folder = write_project(tmp_path / name, notes)
        (folder / ".discreet").mkdir(mode=0o700)
        if (tmp_path / "one" / ".discreet" / "master.key").exists():
            shutil.copy(tmp_path / "one" / ".discreet" / "master.key", folder / ".discreet" / "master.key")
        with pipeline.open_house(folder) as house:
            pipeline.build_index(house, Silent())
            pipeline.search(house, "cough")
            pipeline.ask(house, "cough", options=list(DRUGS), epsilon=0.5, votes=2)
            told.append((_shown(house, tmp_path / f"{name}-bundle"), house.log.select(Predicate.MEASURED)[0].fields["values"]))
    (one, counted), (other, counted_without) = told
    assert one == other
    assert [kind for kind, _ in one] == ["budget_opened", "measured"]
    assert counted != counted_without


def test_the_same_on_postgresql(postgres: str, tmp_path: Path):
    pytest.importorskip("opendp")
    folder = write_project(tmp_path / "ward")
    (folder / "discreet.toml").write_text(f'{TOML}[store]\nurl = "{postgres}"\n')
    with pipeline.open_house(folder) as house:
        pipeline.build_index(house, Silent())
        assert len(_found(house)) == 13
        assert pipeline.ask(house, "cough", options=list(DRUGS), epsilon=0.5)["epsilon"] == 0.5
        assert house.ledger.show("default").remaining_epsilon == pytest.approx(2.5)
        house.consent.withdraw(pipeline.subject_of(house, "p1"))
        assert _erase(house, "p0")["failed"] == []
        assert len(_found(house)) == 10


# Where results may not go


def _imports_search(source: str) -> bool:
    names = {
        name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (getattr(node, "module", "") or "", *(alias.name for alias in node.names))
    }
    return any(part in ("pipeline", "retrieval", "searching") for name in names for part in name.split("."))


def test_no_answer_of_a_model_sees_a_passage():
    """PITFALLS 44: retrieval that is not private, in front of a private model, voids its claim. Nothing that serves imports the search, nor the pipeline that re-exports it. The
    layers of pyproject.toml refuse the pipeline too, and every detour over what lies above it."""
    for way in (
        "from discreet import pipeline",
        "import discreet.pipeline as p",
        "def f():\n from discreet.pipeline import search",
        "from . import retrieval",
    ):
        assert _imports_search(way), way
    assert [path.name for path in Path(retrieval.__file__).parent.glob("*.py") if _imports_search(path.read_text())] == []


def test_consent_of_a_person_without_basis_is_what_admits_them(house: House):
    """The letters are for care alone; one person grants the other purpose, and is found for it."""
    letters = _with(house, retrieval=house.project.retrieval.model_copy(update={"reads": {"product": ("letters",)}}))
    assert pipeline.search(letters, "cough", purpose="note-assistant")["passages"] == []
    house.consent.grant(pipeline.subject_of(house, "q1"), Purpose("note-assistant"), basis=Basis.CONSENT)
    assert [each["source"] for each in pipeline.search(letters, "cough", purpose="note-assistant")["passages"]] == ["letters"]
