"""Search and private answers over the frozen text: who may ask, for what, of whom at this moment; what it costs; what the log keeps.

    build_index   de-identified text of whoever is admitted for a purpose of [retrieval] -> snapshot -> index
    search        passages, for a role that may read their source
    ask           how many people's text says what, as noised counts: for everybody who may ask, and for whatever leaves

Access comes before ranking: role, sources of the role, purpose, and then the consent, erasure and retention of every single record as they stand at that moment. Only what is left is opened and
ranked. A withdrawal, or the beginning of an erasure, counts from the next search on, whatever the index was built from; a grant counts at once for whoever is in
the index for another purpose, else when it is built again.

A private answer is charged before anything is counted, to everybody in the snapshot. Whoever withdrew since is charged and not counted. That is sound: the mechanism is the same, a withdrawal changes the
data it sees by one unit, and two answers around it differ, for that one unit, by what both were charged for. It also keeps the refusal from saying who withdrew. Access, the figures, the index and the
budget decide before the text is opened; nothing is refused because of it afterwards.

Nothing of a query is logged, nor a hash of it: queries name people. Passages are not differentially private: put into the prompt of a model they void what is promised for its answer. Private answers are
post-processing, free to use anywhere. There is no cache. An index that is not of what the sources, [deid] and [retrieval] say now is refused (`discreet index`, or `discreet update`, builds it anew).

Does not cover: what readers do with what they may read, groups of people, that a refusal says that somebody in the index has no room for the price, and the budget of whoever asks (it is that of the people who are asked about).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from discreet import corpus
from discreet.config import SourceSection, digest_of
from discreet.dp import counts
from discreet.errors import (
    AccessDenied,
    BudgetExhausted,
    ConfigInvalid,
    NotAdmitted,
    NotFound,
    NotReleased,
    PlanInvalid,
    RequestInvalid,
    SourceChanged,
)
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.governance import lineage
from discreet.governance.access import Action, current_user
from discreet.ledger import Kind, Spend
from discreet.pipeline.admission import freeze, source_documents
from discreet.pipeline.erasing import erasure_of
from discreet.pipeline.house import House, Observer, fact, for_log, refuse_unfinished, remember
from discreet.pipeline.pricing import open_project_budget
from discreet.record import Digest, Purpose
from discreet.serve import retrieval
from discreet.serve.retrieval import Index

FACT = "index"
SNAPSHOT = "retrieval"
MOST_PASSAGES = 100
MOST_OPTIONS = 100


def build_index(house: House, observer: Observer) -> dict[str, Any]:
    """Builds the index of everybody who is admitted for a purpose of [retrieval], in place of the earlier one. Killed, it leaves the earlier one.

    Raises:
        ConfigInvalid: when [retrieval] names no purpose.
        ErasureIncomplete: while an erasure stands still.
        SourceMissing, SourceChanged, SourceEmpty, SourceNotText, RecordInvalid, RecordConflict, TrackRefused: when a source breaks a rule, or nobody is admitted.
    """
    house.access.require(Action.RUN, who=current_user())
    purposes = _purposes(house)
    refuse_unfinished(house)
    observer.stage("index")
    documents = [document for section in _sections(house) for document in source_documents(house, section, observer, purposes=purposes)[0]]
    snapshot = freeze(house, SNAPSHOT, documents)
    digest = retrieval.build(snapshot, config=_config(house), keyring=house.keyring, folder=house.indexes)
    earlier = fact(house, FACT)
    with house.store.transaction() as tx:
        lineage.derive(tx, lineage.Artifact(digest=digest, kind=lineage.Kind.INDEX), parents=[snapshot.root])
        if earlier is not None and earlier["digest"] != digest:
            gone = {Digest(earlier["digest"]), Digest(earlier["snapshot"])} - {snapshot.root}
            lineage.retire_all(tx, sorted(gone))
        fields: dict[str, JSON] = {"snapshot": snapshot.root, "purposes": [purpose.name for purpose in purposes], "documents": len(documents)}
        entry = house.log.append(tx, Statement(predicate=Predicate.INDEXED, subjects=(digest,), fields=fields))
        remember(tx, FACT, {"digest": digest, "snapshot": snapshot.root, "entry": entry})
    retrieval.sweep(house.indexes, keep=digest)
    _drop_other_snapshots(house, snapshot.root)
    observer.note(f"index {digest} of {len(documents)} records")
    return {"index": digest, "snapshot": snapshot.root, "purposes": [purpose.name for purpose in purposes], "documents": len(documents)}


def search(house: House, query: str, *, purpose: str = "", limit: int = 10) -> dict[str, Any]:
    """Returns the passages that say most about the query, of those that the user of this process may read for this purpose now; the log keeps who read which records.

    Args:
        query: words; neither logged nor kept.
        purpose: one of [retrieval] purposes; left out, the project's purpose, or the only one there is.
        limit: passages at most, 1 to 100.

    Raises:
        AccessDenied: when the role may not search, or may read no source.
        NotAdmitted: when the purpose is none of [retrieval].
        ConfigInvalid, RequestInvalid, NotFound, SourceChanged, NotReleased: when there is no retrieval, no word or limit, no index, a stale one, or one of unknown origin.
        SealBroken, DigestMismatch: when the index was changed.
    """
    who = current_user()
    house.access.require(Action.SEARCH, who=who)
    asked, roles = _asked(house, purpose), house.access.roles(who)
    readable = {name for role in roles for name in house.project.retrieval.reads.get(role.value, ())}
    if not readable:
        raise AccessDenied("a role that may read a source", value=", ".join(roles) or "no role", remedy="The owner names it in [retrieval] reads.")
    if not retrieval.terms(query) or not 1 <= limit <= MOST_PASSAGES:
        raise RequestInvalid(f"a query with a word in it, and 1 to {MOST_PASSAGES} passages", value=f"{limit} passages")
    index = _index(house)[0]
    opened = index.passages(_allowed(house, index, asked, sources=readable), house.keyring)
    found = retrieval.rank([passage for theirs in opened.values() for passage in theirs], query, limit=limit)
    about = dict.fromkeys((index.digest, *(passage.record for _, passage in found)))
    fields: dict[str, JSON] = {"purpose": asked.name, "by": who.name, "role": ", ".join(roles), "passages": len(found)}
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.SEARCHED, subjects=tuple(about), fields=fields))
    told = [
        {"record": passage.record, "source": passage.source, "passage": passage.number, "score": score, "text": passage.text.reveal()}
        for score, passage in found
    ]
    return {"purpose": asked.name, "passages": told}


def ask(house: House, query: str, *, options: Sequence[str], epsilon: float, votes: int = 1, purpose: str = "") -> dict[str, Any]:
    """Releases of how many people a passage holds every word of the query and mentions each option, at the price of `epsilon` (delta 0). Every call is a new charge.

    Args:
        query: words, of at most 600 characters; neither logged nor kept.
        options: 2 to 100 public phrases that differ in their words, each of at most 600 characters; the log keeps them without identifiers.
        epsilon: > 0.
        votes: options that one person counts for at most, 1 to their number; the noise grows with it.
        purpose: as for `search`.

    Raises:
        AccessDenied: when the role may not ask.
        PlanInvalid: when a figure breaks its rule, or no population is declared.
        BudgetExhausted: when the budget has no room for it. Nothing is counted, and what is left is not said: it comes from who is in the index.
        MissingExtra: when OpenDP is not installed. Nothing is charged.
        NotAdmitted, ConfigInvalid, RequestInvalid, NotFound, SourceChanged, NotReleased, SealBroken, DigestMismatch: as `search`.
    """
    house.access.require(Action.ASK, who=current_user())
    asked, privacy = _asked(house, purpose), house.project.privacy
    phrases = {tuple(retrieval.terms(option)) for option in options}
    if not retrieval.terms(query) or () in phrases or not len(options) == len(phrases) <= MOST_OPTIONS or len(options) < 2:
        raise RequestInvalid(
            f"a query with a word in it, and 2 to {MOST_OPTIONS} options that differ in their words", value=f"{len(options)} options"
        )
    if not all(len(said) <= retrieval.LONGEST and _encodes(said) for said in (query, *options)):
        raise RequestInvalid(f"a query and options of at most {retrieval.LONGEST} characters, each with a UTF-8 encoding")
    if not 1 <= votes <= len(options):
        raise PlanInvalid("votes from 1 to the number of options", value=votes)
    if privacy.population is None:
        raise PlanInvalid("[privacy] population: a public estimate of the number of units")
    spend = Spend(kind=Kind.RETRIEVAL, epsilon=epsilon)
    try:
        noised = counts.laplace(epsilon, sensitivity=votes)
    except ValueError as error:
        raise PlanInvalid.of(error) from None
    index, root = _index(house)
    snapshot = corpus.open_snapshot(root, keyring=house.keyring, folder=house.snapshots)
    public = [for_log(house, option) for option in options]
    open_project_budget(house, delta=privacy.delta or 1 / (2 * privacy.population))
    try:
        [paid] = house.ledger.charge(house.project.budget.name, [spend], snapshot=snapshot)
    except BudgetExhausted:
        remedy = "Ask for less. What is left is shown to whoever may read it: `discreet budget show`."
        raise BudgetExhausted("a price that the budget of everybody in the index admits", value=f"epsilon {epsilon:g}", remedy=remedy) from None
    opened = index.passages(_allowed(house, index, asked, sources=None), house.keyring)
    true = retrieval.votes(opened, query, options, most=votes, key=house.keyring.purpose("retrieval").derive("votes"))
    values = [max(0, count) for count in noised(true)]
    price: dict[str, Any] = {"reservation": paid.id, "epsilon": epsilon, "delta": 0.0, "unit": privacy.unit, "cap": votes}
    logged: dict[str, JSON] = {**price, "values": [[option, value] for option, value in zip(public, values, strict=True)]}
    fields: dict[str, JSON] = {"what": "units whose text answers a question, by option", **logged}
    fields |= {"mechanism": "discrete Laplace (OpenDP)", "kind": Kind.RETRIEVAL.value}
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.MEASURED, subjects=(digest_of(logged),), fields=fields))
    told = [{"option": option, "units": value} for option, value in zip(options, values, strict=True)]
    margin = counts.margin(epsilon, sensitivity=votes)
    return {"purpose": asked.name, **price, "options": told, "margin": margin}


def _purposes(house: House) -> list[Purpose]:
    named = house.project.retrieval.purposes
    if not named:
        raise ConfigInvalid(
            "[retrieval] purposes in discreet.toml: for what may be searched", remedy="The owner of the sources decides; see docs/retrieval.md."
        )
    return [Purpose(name) for name in named]


def _drop_other_snapshots(house: House, root: Digest) -> None:
    """Removes the frozen text of indexes that were replaced or never finished, its node first: nothing else was made from it."""
    for other in corpus.snapshots(keyring=house.keyring, folder=house.snapshots):
        if other.name == SNAPSHOT and other.root != root:
            with house.store.transaction() as tx:
                lineage.retire_all(tx, [other.root])
            corpus.remove(other)


def _encodes(said: str) -> bool:
    """Whether a text has a UTF-8 encoding: an argument that was none in its own has lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in said)


def _asked(house: House, name: str) -> Purpose:
    """The purpose of a request; of a purpose that nobody named nothing is shown."""
    purposes = _purposes(house)
    wanted = Purpose(name) if name else purposes[0] if len(purposes) == 1 else house.project.purpose
    if wanted not in purposes:
        raise NotAdmitted(
            "a purpose among [retrieval] purposes", value=wanted.name, remedy=f"--purpose {' or '.join(each.name for each in purposes)}"
        )
    return wanted


def _sections(house: House) -> list[SourceSection]:
    return [section for section in house.project.source if section.role == "train"]


def _config(house: House) -> Digest:
    """What decides what is in an index beside the text; who may read it is asked at every search."""
    sections = [section.model_dump(mode="json") for section in (*_sections(house), house.project.deid)]
    return digest_of([sorted(house.project.retrieval.purposes), house.project.privacy.unit, *sections])


def _index(house: House) -> tuple[Index, Digest]:
    """The index as it stands and the root of its snapshot: of this configuration, of everything that was collected, and of known origin. Whoever the journal of suppressions names
    and a restored database does not is restricted first: a search waits for no other command."""
    erasure_of(house).reapply()
    known = fact(house, FACT)
    try:
        return _standing(house, known)
    except (NotFound, NotReleased, SourceChanged):
        newer = fact(house, FACT)
        if newer == known:
            raise
        return _standing(house, newer)  # it was replaced meanwhile


def _standing(house: House, known: dict[str, Any] | None) -> tuple[Index, Digest]:
    if known is None:
        raise NotFound("an index", remedy="Build it: `discreet index`.")
    digest, root = Digest(known["digest"]), Digest(known["snapshot"])
    names = {section.name for section in _sections(house)}
    newer = [entry for entry in house.log.select(Predicate.COLLECTED, after=known["entry"]) if entry.fields["source"] in names]
    if newer or retrieval.name_of(root, _config(house)) != digest:
        raise SourceChanged("an index of what the sources, [deid] and [retrieval] say now", remedy="Build it anew: `discreet index`.")
    with house.store.transaction() as tx:
        origin = [artifact.digest for artifact in lineage.descendants(tx, [root])]
    if digest not in origin:
        raise NotReleased(
            "an index whose snapshot is known", value=digest, remedy="Nobody knows what it was made from. Build it anew: `discreet index`."
        )
    return retrieval.open_index(digest, keyring=house.keyring, folder=house.indexes), root


def _allowed(house: House, index: Index, purpose: Purpose, *, sources: set[str] | None) -> set[Digest]:
    """The records of these sources (None: of all) that may be used for this purpose now. Asked of the database every time, before anything is opened."""
    wanted = [digest for digest, source in index.records.items() if sources is None or source in sources]
    return set(wanted) - {digest for digest, _ in house.consent.revoked(wanted, purpose)}
