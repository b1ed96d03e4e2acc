"""Line 11: the closed tuple of stores, what becomes of models, retention and the drill."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from sqlalchemy import Connection

from discreet import corpus, model
from discreet.audit import canaries as canary
from discreet.audit import membership
from discreet.deid import policy as deid
from discreet.errors import DigestMismatch, ErasureIncomplete, ModelUnsafe, NotFound, SourceEmpty, SourceMissing
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.governance import lineage, residue
from discreet.governance.access import Action, current_user
from discreet.governance.catalog import SourceFiles
from discreet.governance.erasure import Decision, Erasure, Finding, Identity, Reason, Transcript, unfinished
from discreet.keys import Key
from discreet.model import Base, PublicText
from discreet.pipeline.admission import freeze, generated_section, rows_as_lines, source_documents
from discreet.pipeline.house import House, Silent, deployment_fact, fact, facts, forget_model, remember, subject_of
from discreet.pipeline.people import Own, own_texts
from discreet.pipeline.training import abandon, checkpoints_of
from discreet.pipeline.weights import PUBLIC_ADAPTER, adapter_digest_of, frozen_public, load_base, setup_of
from discreet.record import Basis, Digest, Sensitivity, SubjectId
from discreet.serve import gateway, retrieval
from discreet.serve.retrieval import IndexStore
from discreet.store import partial_of
from discreet.train import loop
from discreet.train.checkpoint import CheckpointStore

if TYPE_CHECKING:
    from torch import nn

LEAST_IDENTIFIER = 5
"""Characters of an identifier below which its occurrence in a text says nothing."""
_WRITTEN = "text/"
_DRILL = "drill-"
RELEARNT = 16
"""Public texts that a model relearns from after an erasure."""
NO_SUBJECTS: Mapping[str, str] = {
    "cohorts": "HMACs of pseudonyms under a key of their own, which have to outlive the erasure: a budget is not refunded",
    "cli.accountability": "a chart of what a budget affords, where the operator said",
    "cli.evidence": "the public key beside a bundle",
    "cli.privacy": "a curve of a mechanism, where the operator said",
    "config": "parameters that the operator wrote",
    "deid.scan": "compiled patterns, in the user's cache",
    "demo": "generated people, written as the project's sources: `sources` is their store",
    "dossier": "computed from the log",
    "derived": "text that a released model wrote, and its children: nodes of the lineage below the model, decided with it",
    "duties": "public keys, where the operator said",
    "federate": "the rosters and terms of a fleet",
    "federated.processes": "certificates, keys of nodes, the relay app",
    "federated.journal": "masked, clipped, noised sums of a site, which name nobody",
    "federated.site": "rosters, receipts and noised sums; a site's records are in its own project",
    "evidence.log": "salted commitments; requests under an HMAC",
    "evidence.witness": "a witness's own key and checkpoints",
    "governance.access": "operators, not subjects",
    "governance.erasure": "suppressions as HMACs, which have to outlive the erasure; its scope is emptied by the certificate",
    "governance.lineage": "digests; those of the subject's records are forgotten when the keys are shredded",
    "keys": "the subject's key is shredded by the machine itself; an HMAC stays as its tombstone",
    "ledger": "budgets under pseudonyms by HMAC, which have to outlive the erasure: a budget is not refunded",
    "model": "weights and base models: decided by the machine itself, `models decided`",
    "pipeline.house": "what stages left: digests, parameters, curves on public text",
    "pipeline.releasing": "released weights: decided by the machine itself",
    "pipeline.story": "the public key, where the operator said",
    "redaction": "text that the operator asked to have redacted, where they said",
    "plot": "charts of the report",
    "report": "computed from the log",
    "serve.learning": "rows of the project's own source files: `sources` is their store",
    "serve.trail": "roll-ups of a gateway: digests and counts by label, never text or users",
    "train.search": "which settings were tried and their scores, sealed under the run's key and gone when it closes",
    "store": "the database itself: compacted by the machine, with its write-ahead log",
}
"""Modules that write files or tables and are no store of the tuple below, each with the reason. An architecture test holds that there is no third kind."""


def erasure_of(house: House) -> Erasure:
    """Returns the erasure over the closed tuple of all stores of this project."""
    project = house.project
    return Erasure(
        house.store,
        house.keyring,
        house.log,
        stores=(
            _OpenRuns(house),
            SourceFiles(project, house.keyring, house.store),
            house.consent,
            house.catalog,
            corpus.SnapshotStore(house.snapshots, house.keyring),
        ),
        derived=(
            CheckpointStore(
                _runs(house),
                states=lambda run, track: checkpoints_of(house, run, track=track),
                snapshots=corpus.SnapshotStore(house.snapshots, house.keyring),
            ),
            _UnfinishedWeights(house),
            IndexStore(house.indexes, house.keyring),
        ),
        models=_ProjectModels(house),
        unit=project.privacy.unit,
        max_epsilon=project.release.max_epsilon,
        backup_days=project.erasure.backup_days,
        answer_seconds=project.erasure.answer_seconds,
        responsible=_responsible(house),
        journal=project.path(project.erasure.journal),
    )


def _responsible(house: House) -> str:
    """Who has to act when an erasure stands still: by name where [access] names them."""
    return f"privacy officer ({', '.join(house.project.access.privacy_officer) or house.project.project.controller})"


@final
class _OpenRuns:
    """Runs that were killed on a snapshot of the subject: closed, and their keys destroyed; what they spent stays spent. Their states are `CheckpointStore`'s."""

    name = "open runs"

    def __init__(self, house: House) -> None:
        self._house = house

    def holds(self, subject: SubjectId) -> list[Digest]:
        """Returns the snapshots of the subject on which a run is open."""
        theirs = set(corpus.SnapshotStore(self._house.snapshots, self._house.keyring).holds(subject))
        return sorted({run.snapshot for run in self._house.ledger.open_runs() if run.snapshot in theirs and run.snapshot is not None})

    def purge(self, subject: SubjectId) -> None:
        theirs = self.holds(subject)
        for run in self._house.ledger.open_runs():
            if run.snapshot in theirs:  # its population is no longer what it reserved, and its key could still take the noise away
                abandon(self._house, run)

    def absence(self, subject: SubjectId) -> bool:
        return not self.holds(subject)


@final
class _UnfinishedWeights:
    """Weights without a node: of a run that was killed or given up, of a release or a withdrawal that was killed half way, or children that a kill left here or half way to their place. No decision
    can reach them, so all go, whoever asks: they are made again, the same."""

    name = "unfinished weights"

    def __init__(self, house: House) -> None:
        self._house = house

    def holds(self, subject: SubjectId) -> list[Digest]:  # noqa: ARG002  # nobody can tell from weights, and they have no node
        return []

    def purge(self, subject: SubjectId) -> None:  # noqa: ARG002  # see the class
        for left in _unnamed(self._house):
            _remove(left)

    def absence(self, subject: SubjectId) -> bool:  # noqa: ARG002  # see the class
        return not _unnamed(self._house)


def _unnamed(house: House) -> list[Path]:
    """Weights that no node names, whole or not."""
    found = _weights(house)
    with house.store.transaction() as tx:
        known = {artifact.digest for artifact in lineage.find_all(tx, [digest for digest in found.values() if digest])}
    return [folder for folder, digest in found.items() if digest not in known] + _unfinished_children(house)


def _weights(house: House) -> dict[Path, Digest | None]:
    """The project's folders of weights, releases whole, with the digest of what each holds; None for what a killed write or a killed deletion left."""
    runs = [folder for folder in _runs(house).glob("*/*") if folder.name.lstrip(".").startswith((gateway.ADAPTER_FOLDER, PUBLIC_ADAPTER))]
    adapters = {folder: adapter_digest_of(folder) for folder in runs}
    released = {folder: adapter_digest_of(folder / gateway.ADAPTER_FOLDER) for folder in house.releases.glob("*") if folder.is_dir()}
    return adapters | released | {folder: _base_digest(folder) for folder in (house.project.state / "models").glob("*")}


def _runs(house: House) -> Path:
    return house.project.state / "runs"


@final
class _ProjectModels:
    """The project's models, for the erasure."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._found: dict[tuple[SubjectId, Digest], Finding] = {}

    def transcript(self, digest: Digest) -> Transcript:
        """Of the model itself, or of the weakest of the models that it was made of. What such a model went on from counts no more: its own claim covers that."""
        recorded = {e.subjects[0]: e.fields["guarantee"] for e in self._house.log.select(Predicate.TRAINED) if e.fields["adapter"]}
        with self._house.store.transaction() as tx:
            above = [a.digest for a in lineage.ancestors(tx, [digest]) if a.digest in recorded]
            covered = {a.digest for a in lineage.ancestors(tx, above)}
        concerned = [digest] if digest in recorded else [each for each in above if each not in covered]
        found = [_transcript(recorded[each]) for each in concerned]
        return max(found, key=lambda each: each.epsilon, default=Transcript())

    def test(self, subject: SubjectId, digest: Digest) -> Finding:
        """Compares the subject's frozen text with the same text under other stand-ins, which nobody trained on: under the null they are exchangeable, so the rank is an
        exact test. 39 twins first; only a text that beats them all is looked at again among 999, so that one test in five hundred is a false alarm. What is not exposed is tested once more after a few steps on public text: relearning brings back what is merely covered.
        A deployment, and a merge that lies nowhere, is tested as the adapter that it holds, once."""
        served = fact(self._house, deployment_fact(digest))
        tested = subject, digest if served is None else Digest(served["adapter"])
        if tested not in self._found:
            self._found[tested] = self._tested(*tested)
        return self._found[tested]

    def _tested(self, subject: SubjectId, digest: Digest) -> Finding:
        for written in written_files(self._house, digest)[:1]:  # all hold the same bytes
            if written.is_dir() or model.is_gguf(written):
                return self._child(subject, digest, written)
            return self._searched(subject, written.read_text(encoding="utf-8"))
        adapter = next(
            (p for p in sorted(_runs(self._house).glob("*/adapter")) if adapter_digest_of(p) == digest),
            None,
        )
        own = own_texts(self._house, subject) if adapter else []
        if adapter is None or not own:
            return Finding.NO_POWER
        base = self._base_of(digest)
        if base is None:
            return Finding.NO_POWER
        found = self._ranked(subject, own, base, model.load_adapter(base, adapter))
        relearnt = _relearnt(self._house, base, adapter) if found is Finding.NOT_EXPOSED else None
        return found if relearnt is None else self._ranked(subject, own, base, relearnt)

    def _base_of(self, adapter: Digest) -> Base | None:
        """The base that an adapter was trained on; None where it is gone, or [model] names another by now: weights that are there cannot be asked about anybody without it."""
        trained_on = {e.fields["base"] for e in self._house.log.select(Predicate.TRAINED) if e.fields["adapter"] == adapter}
        try:
            base = load_base(self._house, None, Silent())
        except (NotFound, ModelUnsafe, DigestMismatch):
            return None
        return base if base.digest in trained_on else None

    def _child(self, subject: SubjectId, digest: Digest, file: Path) -> Finding:
        """The same test of a child in a file or folder of its own, at the precision that it holds."""
        own = own_texts(self._house, subject)
        parents = [Digest(e.fields["adapter"]) for e in self._house.log.entries(digest) if e.predicate is Predicate.CHILD_AUDITED]
        base = self._base_of(parents[-1]) if own and parents else None
        if base is None:
            return Finding.NO_POWER
        with unplaced(self._house) as scratch:
            return self._ranked(subject, own, base, model.read_child(base, file, scratch=scratch)[0])

    def _searched(self, subject: SubjectId, text: str) -> Finding:
        """Whether text that a model wrote holds one of the subject's texts, or an identifier that their source declares."""
        own = own_texts(self._house, subject)
        values = {value for _, known, _ in own for group in known.values() for value in group if len(value) >= LEAST_IDENTIFIER}
        said = [json.dumps(each, ensure_ascii=False)[1:-1] for each in (*(mine for mine, _, _ in own), *values)]
        return Finding.EXPOSED if any(each in text for each in said) else Finding.NOT_EXPOSED if own else Finding.NO_POWER

    def _ranked(self, subject: SubjectId, own: Sequence[Own], base: Base, module: nn.Module) -> Finding:
        for twins in (39, 999):
            rank = _rank_among_twins(self._house, subject, own, base, module, twins=twins)
            if rank is None:
                return Finding.NO_POWER
            if rank > 0:
                return Finding.NOT_EXPOSED if twins == 39 or rank > 1 else Finding.EXPOSED
        return Finding.EXPOSED

    def withdraw(self, digest: Digest) -> None:
        """Destroys every copy of the weights, or what was made of them where it was put, forgets the stages that made them and says so in the log.

        A run and a deployment go with their model: its folders are theirs. What a killed call left is no whole model any more, so that goes first.
        """
        house = self._house
        with house.store.transaction() as tx:
            if {artifact.kind for artifact in lineage.find_all(tx, [digest])} & {lineage.Kind.RUN, lineage.Kind.DEPLOYMENT}:
                return
        for left in _unnamed(house):
            _remove(left)
        known = fact(house, _written(digest))
        if known:
            for place in map(Path, _places(known)):
                model.destroy(place, _parts(known, place))
        found = [folder for folder, held in _weights(house).items() if held == digest]
        for folder in {each.parent if each.is_relative_to(_runs(house)) else each for each in found}:
            shutil.rmtree(folder)
        with house.store.transaction() as tx:
            forget_model(tx, digest)
            fields: dict[str, JSON] = {"adapter": digest, "reasons": ["erasure"]}
            house.log.append(tx, Statement(predicate=Predicate.WITHHELD, subjects=(digest,), fields=fields))


@contextmanager
def unplaced(house: House) -> Iterator[Path]:
    """A folder of the project for children that are not where they shall be yet, empty, and gone afterwards. What a kill leaves in it, or half moved out of it, goes with the next, or with any erasure."""
    for left in _unfinished_children(house):
        _remove(left)
    own = _unplaced(house)
    own.mkdir(mode=0o700)
    try:
        yield own
    finally:
        shutil.rmtree(own)


def _unplaced(house: House) -> Path:
    return house.project.state / "children"


def _unfinished_children(house: House) -> list[Path]:
    """What kills left of children and of text: in the project's folder for them, and beside the places where they should be."""
    with house.store.transaction() as tx:
        known = facts(tx, _WRITTEN)
    places = [_unplaced(house), *(partial_of(Path(place)) for each in known for place in _places(each))]
    return [place for place in places if place.exists()]


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def record_written(tx: Connection, digest: Digest, file: Path, *, parts: Mapping[str, Digest] | None = None) -> None:
    """Remembers where a file was put that was made of a model, text that it drew or its merged weights: inside, so that an erasure finds it, each time that it was put somewhere.

    Args:
        parts: what lies there, as `model.child_files` gives it; left out, one file of that digest.
    """
    name = _written(digest)
    places = {place for known in facts(tx, name) for place in _places(known)}
    remember(tx, name, {"files": sorted({*places, str(file.resolve())}), "digest": digest, "parts": dict(parts or {"": digest})})


def written_files(house: House, digest: Digest) -> list[Path]:
    """Returns the files, or folders of weights, that were made of a model, where they still are as a whole what was written; a copy elsewhere is the operator's to destroy."""
    known = fact(house, _written(digest))
    files = [Path(place) for place in _places(known)] if known else []
    return [file for file in files if model.child_digest(file) == digest]


def _places(known: Mapping[str, Any]) -> list[str]:
    """Where a file was put; what was remembered first named one place."""
    return list(known.get("files") or [known["file"]])


def _parts(known: Mapping[str, Any], place: Path) -> dict[str, Digest]:
    """What was written to a place; where that was not remembered yet, all that makes a model there while it is the one that was written."""
    if "parts" in known:
        return {name: Digest(digest) for name, digest in known["parts"].items()}
    return model.child_files(place) if model.child_digest(place) == known["digest"] else {}


def _written(digest: Digest) -> str:
    return f"{_WRITTEN}{digest[-24:]}"


def _base_digest(folder: Path) -> Digest | None:
    try:
        return model.base_digest(folder)
    except (NotFound, ModelUnsafe):
        return None


def _transcript(guarantee: Mapping[str, Any] | None) -> Transcript:
    """Figures from which a bound for a group follows only where the run was one of plain Poisson-sampled Gaussian steps: elsewhere no noise is claimed."""
    names = ("unit", "relation", "epsilon", "delta", "sampling_probability", "noise_multiplier", "steps")
    if not guarantee:
        return Transcript()
    plain = guarantee.get("sampler", "poisson") == "poisson" and not {"search", "bands", "adaptive", "continues"} & guarantee.keys()
    return Transcript(**{name: guarantee[name] for name in names} | ({} if plain else {"noise_multiplier": 0.0}))


def _relearnt(house: House, base: Base, adapter: Path) -> nn.Module | None:
    """The adapter after a few steps on the project's public text, in memory only; None where there is none. No sensitive record is read (PITFALLS 38)."""
    texts = frozen_public(house, "public")[:RELEARNT]
    if not texts:
        return None
    public = PublicText.of(texts, sensitivity=Sensitivity.PUBLIC, basis=Basis.CONSENT)
    setup = setup_of(house, base, held_out=PublicText(public.texts[:1]), start=adapter, evaluations=1)
    order = house.keyring.purpose("relearning").stream("order")
    return loop.fit(public, setup=setup, steps=-(-len(texts) // 4), batch=4, order=order).module


def _rank_among_twins(
    house: House,
    subject: SubjectId,
    own: Sequence[Own],
    base: Base,
    module: nn.Module,
    *,
    twins: int,
) -> int | None:
    """Returns how many of `twins` the module prefers to the subject's own text; None when stand-ins make no difference."""

    names = deid.names_of([(text, known) for text, known, _ in own], own[0][2]) if len(own) > 1 else ()

    def frozen(key: Key) -> list[str]:
        return [deid.redact(text, policy, known=deid.with_names(known, names), key=key).text for text, known, policy in own]

    mine = frozen(house.keyring.subject(subject))
    others = [frozen(Key.random()) for _ in range(twins)]
    if all(other == mine for other in others):
        return None
    texts = [text for version in (mine, *others) for text in version]
    scored = membership.scores(
        module, base.tokenizer, texts, token_budget=house.project.run.token_budget, adapter_off=lambda: model.adapter_off(module, base)
    )
    sums = scored.reshape(twins + 1, len(own)).sum(axis=1)
    return int((sums[1:] >= sums[0]).sum())


def erase(house: House, unit: str, *, source: str = "") -> dict[str, Any]:
    """Erases one person from every store (line 11) and returns the certificate. An unknown person gets the same answer.

    Args:
        house: the open project.
        unit: the person as the sources name them.
        source: the public source whose record `unit` is; empty for a privacy unit of the project.

    Raises:
        AccessDenied: when the operator may not, or a request of theirs is not verified.
        ErasureIncomplete: when a store still holds them; the name of the store and the responsible role are the value.
    """
    who = current_user()
    house.access.require(Action.ERASE, who=who)
    identity = Identity(method="vouched for by the operator", by=who.name)
    return _erase(house, subject_of(house, unit, source=source), identity=identity, reason=Reason.REQUEST)


def _erase(house: House, subject: SubjectId, *, identity: Identity | None, reason: Reason) -> dict[str, Any]:
    certificate = erasure_of(house).execute(subject, identity=identity, reason=reason)
    [entry] = [each for each in house.log.entries(certificate.request) if each.index == certificate.entry]
    return {
        "subject": certificate.request,
        "stores": list(certificate.stores),
        "failed": [],
        "models": _rules(house),
        "certificate": certificate.entry,
        "backups_until": certificate.backups_until,
        "statement": entry.envelope.decode(),
        "proof": bytes(house.log.prove(certificate.entry)).decode(),
        "key_destroyed": True,
    }


def _rules(house: House) -> list[str]:
    """What would be decided about each model, whoever asks: the same list for everybody, or it would say who is in."""
    trained = [entry for entry in house.log.select(Predicate.TRAINED) if entry.fields["adapter"]]
    told = {e.subjects[0]: _explained(_transcript(e.fields["guarantee"]), unit=house.project.privacy.unit) for e in trained}
    return [f"{digest}: {said}" for digest, said in sorted(told.items())]


def _explained(transcript: Transcript, *, unit: str) -> str:
    """The decision about a model of this transcript, with the figures that it follows from."""
    if transcript.unit != unit or transcript.relation != "add_remove":
        return Decision.WITHDRAWN.value
    said = f"adding or leaving out one {unit} changes what it could have become by at most epsilon {transcript.epsilon:.3g}, delta {transcript.delta:.2g}"
    return f"{Decision.KEPT.value} ({said})"


def request_erasure(house: House, unit: str, *, source: str = "") -> str:
    """Receives a request and returns the code for the address on file; nothing changes before it is confirmed."""
    house.access.require(Action.ERASE, who=current_user())
    return erasure_of(house).code(subject_of(house, unit, source=source)).reveal()


def confirm_erasure(house: House, unit: str, code: str, *, source: str = "") -> dict[str, Any]:
    """Erases a person whose identity the code proves.

    Raises:
        AccessDenied: when the code is wrong.
    """
    subject = subject_of(house, unit, source=source)
    erasure_of(house).confirm(subject, code)
    return _erase(house, subject, identity=None, reason=Reason.REQUEST)


def resume_erasures(house: House) -> int:
    """Finishes what was killed, and erases again whoever a restored backup brought back. Returns how many."""
    house.access.require(Action.ERASE, who=current_user())
    subjects = unfinished(house.store, house.keyring)
    for subject in subjects:
        _erase(house, subject, identity=None, reason=Reason.RESTORED)
    return len(subjects)


def retention(house: House) -> dict[str, Any]:
    """Erases whoever is past retention with every record, and closes the requests whose backups are past their horizon: the same machine, on a timer.

    Raises:
        ClockBackwards: when the clock was set back.
        SourceMissing, SourceNotText, RecordInvalid, RecordConflict: when a source cannot be read: nobody's erasure could be verified then, so nobody is erased.
    """
    who = current_user()
    house.access.require(Action.ERASE, who=who)
    _sight_growth(house)
    due = house.catalog.past_retention(house.project.source)
    for subject in due:
        _erase(house, subject, identity=Identity(method="retention", by=who.name), reason=Reason.RETENTION)
    erasure = erasure_of(house)
    closed = erasure.close_due()
    waiting = [{"request": p.request, "state": p.state.value, "reason": p.reason.value, "overdue": p.overdue} for p in erasure.open_requests()]
    return {"erased": len(due), "closed": closed, "open": waiting}


def _sight_growth(house: House) -> None:
    """Lets the retention of rows run that a source has gained and nobody collected yet. A source that was never there holds nobody."""
    registered = {source["name"] for source in house.catalog.sources()}
    for section in house.project.source:
        try:
            source = house.catalog.present(house.project, section)
        except SourceEmpty:
            continue
        except SourceMissing:
            if section.name in registered:
                raise
            continue
        house.catalog.sight(source)


def drill(house: House) -> dict[str, Any]:
    """Plants a generated person in every store, erases them like anybody else, and searches every byte of the state for them. Run it weekly.

    Raises:
        ErasureIncomplete: when a byte of them is left; the value names the file.
    """
    house.access.require(Action.ERASE, who=current_user())
    who = f"{_DRILL}{Key.random().stream('drill').bytes(8).hex()}"
    secret = f"{canary.draw_secret(Key.random().stream('drill'))} {who}"
    rows = [{"id": f"{who}-{number}", "unit": who, "text": f"The drill says {secret}, note {number}."} for number in range(3)]
    section = generated_section(house, who, owner="erasure drill")
    kept, _ = source_documents(house, section, Silent(), generated=rows_as_lines(rows))
    frozen = freeze(house, who, kept)
    index = retrieval.build(frozen, config=frozen.root, keyring=house.keyring, folder=house.indexes)
    with house.store.transaction() as tx:
        lineage.derive(tx, lineage.Artifact(digest=index, kind=lineage.Kind.INDEX), parents=[frozen.root])
    subject = subject_of(house, who)
    began = time.monotonic()
    outcome = _erase(house, subject, identity=Identity(method="drill", by=current_user().name), reason=Reason.DRILL)
    _clear_drills(house)
    left = remains(house, [secret, subject, *(row["text"] for row in rows)])
    if left:
        raise ErasureIncomplete("no byte of the planted person to be left", value=f"{', '.join(left)}; responsible: {_responsible(house)}")
    return {"certificate": outcome["certificate"], "stores": outcome["stores"], "seconds": round(time.monotonic() - began, 2), "left": []}


def _clear_drills(house: House) -> None:
    """Removes what this drill made, and what a killed one left. The snapshot goes last: by it the next drill finds the rest."""
    for snapshot in corpus.snapshots(keyring=house.keyring, folder=house.snapshots):
        if snapshot.name.startswith(_DRILL):
            index = retrieval.name_of(snapshot.root, snapshot.root)
            retrieval.remove(house.indexes, index)
            with house.store.transaction() as tx:
                lineage.retire_all(tx, [index, snapshot.root])
            corpus.remove(snapshot)


def remains(house: House, needles: Sequence[str], *, tokens: Sequence[Sequence[int]] = ()) -> list[str]:
    """Returns the files of the project's state that hold something of somebody (`governance.residue`), every living document decoded among them.

    Args:
        needles: their texts and identifiers.
        tokens: their texts as token ids.
    """
    found = residue.find(house.project.state, needles, tokens=tokens)
    for snapshot in corpus.snapshots(keyring=house.keyring, folder=house.snapshots):
        positions = [each for living in snapshot.units.reveal().values() for each in living]
        if any(needle in text for text in corpus.texts(snapshot, positions, house.keyring) for needle in needles):
            found.append(f"snapshots/{snapshot.path.name} (decoded)")
    for path, said in retrieval.decoded(house.indexes, house.keyring):
        if any(needle in text for text in said for needle in needles):
            found.append(f"indexes/{path.name} (decoded)")
    return found
