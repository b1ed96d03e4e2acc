"""What may leave beside a model: private statistics of the frozen corpus, text that the released model writes, and the model itself as one file.

    statistics   one pure-DP query about the people of the corpus; charged to the budget before anything is counted
    synthesize   text drawn from a verified release: post-processing, so nothing is charged; the statement names the reservation that paid for the model
    child        the release merged into a folder of safetensors or one GGUF file, or such a child that somebody else made of it; audited as it is stored

All leave a statement in the log, text and children a node in the lineage: whoever withdraws the model finds what was drawn from it, and made of it.

Guarantees: a unit counts once among the units and with at most `cap` documents, chosen by keyed hash, in the histogram; noise is OpenDP's discrete Laplace, whose scale is
checked by OpenDP's own proof of privacy (`map`) against what was charged.

Source: OpenDP 0.16 (`make_laplace`; its generator is the operating system's); Yue et al. 2023, arXiv 2210.14348 (synthetic text).

Does not cover: statistics of the texts' content. The canaries of the audit are units of the corpus and are counted.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from discreet import corpus, model, pipeline
from discreet.audit.bounds import Verdict
from discreet.config import digest_of
from discreet.dp import counts
from discreet.errors import DigestMismatch, NotReleased, PlanInvalid, RequestInvalid
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.evidence.statement import digest_of as digest_of_bytes
from discreet.governance import lineage
from discreet.governance.access import Action, current_user
from discreet.keys import Key
from discreet.ledger import Kind, Spend
from discreet.model import Base
from discreet.pipeline import House, Observer
from discreet.record import Digest, Release, Snapshot, SubjectId
from discreet.serve import gateway
from discreet.store import partial_of, storage_full, write_atomically

if TYPE_CHECKING:
    from sqlalchemy import Connection
    from torch import nn

MERGED = "merged"
CHILD_KINDS = (MERGED, *model.GGUF_KINDS)
"""What a release can be written as: a folder of safetensors in float32, or one GGUF file."""

BOUNDS = (64, 128, 256, 512, 1024, 2048, 4096)
"""Upper ends of the bins of the histogram, in characters; the last bin has none."""


def statistics(house: House, *, epsilon: float, observer: Observer) -> dict[str, Any]:
    """Releases the number of units and the lengths of their documents, at the price of `epsilon` (delta 0). Every call is a new charge.

    Args:
        epsilon: > 0, half of it for each of the two.

    Raises:
        PlanInvalid: when epsilon is not a positive number, or no population is declared.
        BudgetExhausted: when the budget has no room for it. Nothing is counted.
        MissingExtra: when OpenDP is not installed. Nothing is charged.
    """
    house.access.require(Action.RUN, who=current_user())
    if not epsilon > 0:
        raise PlanInvalid("an epsilon > 0", value=epsilon)
    privacy = house.project.privacy
    if privacy.population is None:
        raise PlanInvalid("[privacy] population: a public estimate of the number of units")
    count, histogram = _measurements(epsilon, cap=privacy.cap)
    frozen = pipeline.ingest(house, observer)
    pipeline.open_project_budget(house, delta=privacy.delta or 1 / (2 * privacy.population))
    [paid] = house.ledger.charge(house.project.budget.name, [Spend(kind=Kind.STATISTICS, epsilon=epsilon)], snapshot=frozen.snapshot)
    units = frozen.snapshot.units.reveal()
    lengths = _lengths(house, units, frozen.snapshot, cap=privacy.cap)
    values = {
        "units": max(0, *count([len(units)])),
        "documents_by_length": [[bound, max(0, noised)] for bound, noised in zip([*BOUNDS, None], histogram(binned(lengths)), strict=True)],
    }
    result: dict[str, Any] = {"reservation": paid.id, "epsilon": epsilon, "delta": 0.0, "unit": privacy.unit, "cap": privacy.cap, "values": values}
    fields: dict[str, JSON] = {"what": "units, and documents by length in characters", **result, "mechanism": "discrete Laplace (OpenDP)"}
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.MEASURED, subjects=(digest_of(result),), fields=fields))
    return result


def binned(lengths: Sequence[int]) -> list[int]:
    """Counts lengths by bin: up to each of `BOUNDS`, and above the last.

    Example:
        >>> binned([10, 64, 65, 10_000])
        [2, 1, 0, 0, 0, 0, 0, 1]
    """
    counts = [0] * (len(BOUNDS) + 1)
    for length in lengths:
        counts[sum(length > bound for bound in BOUNDS)] += 1
    return counts


def _measurements(epsilon: float, *, cap: int) -> tuple[Any, Any]:
    """Measurements of a count of units (a unit changes it by 1) and of a histogram of documents (by `cap`), each half of epsilon by its own proof."""
    try:
        return counts.laplace(epsilon / 2, sensitivity=1), counts.laplace(epsilon / 2, sensitivity=cap)
    except ValueError as error:
        raise PlanInvalid.of(error) from None


def _lengths(house: House, units: Mapping[SubjectId, tuple[int, ...]], snapshot: Snapshot, *, cap: int) -> list[int]:
    """Length in characters of at most `cap` documents of each unit; the choice for a unit depends on nobody else."""
    from discreet.dp import sampling

    stream = house.keyring.purpose("statistics").stream("documents")
    kept = [positions[place] for name, positions in units.items() for place in sampling.capped_range(len(positions), cap, stream.fork(name))]
    return [len(text) for text in corpus.texts(snapshot, kept, house.keyring)]


def synthesize(house: House, *, count: int, out: Path, max_tokens: int = 96, temperature: float = 1.0, prompt: str = "") -> dict[str, Any]:
    """Writes JSON Lines of texts that the released model draws, and where they come from into lineage and log.

    Args:
        count: number of texts, 1 to 100,000.
        out: file to write, whole or not at all.
        prompt: beginning of every text; public.

    Raises:
        RequestInvalid: when a figure is out of range.
        NotReleased, EvidenceInvalid, DigestMismatch: when there is no release, or it is not what was signed.
    """
    from discreet.train import sample

    house.access.require(Action.RUN, who=current_user())
    if not 1 <= count <= 100_000 or max_tokens < 1 or not temperature > 0:
        raise RequestInvalid("1 to 100,000 texts of at least one token at a temperature > 0", value=f"{count}, {max_tokens}, {temperature}")
    released, base, folder = _released(house)
    module = model.load_adapter(base, folder, digest=released.adapter)
    module.eval()
    stream = Key.random().stream("synthetic")
    texts = sample.texts(module, base.tokenizer, count=count, max_tokens=max_tokens, temperature=temperature, prompt=prompt, stream=stream)
    content = "".join(
        json.dumps({"id": f"synthetic-{number}", "text": text}, ensure_ascii=False) + "\n" for number, text in enumerate(texts)
    ).encode()
    digest = digest_of_bytes(content)
    trained = next(entry for entry in reversed(house.log.select(Predicate.TRAINED)) if entry.fields["adapter"] == released.adapter)
    fields: dict[str, JSON] = {
        "adapter": released.adapter,
        "guarantee": dict(released.guarantee),
        "reservation": trained.fields["reservation"],
        "texts": count,
        "kind": "drawn from a release: post-processing, nothing more is charged",
    }
    with house.store.transaction() as tx:  # first: a file that is there is one that an erasure finds
        lineage.derive(
            tx, lineage.Artifact(digest=digest, kind=lineage.Kind.SYNTHETIC, protects=house.project.privacy.unit), parents=[released.adapter]
        )
        pipeline.record_written(tx, digest, out)
    write_atomically(out, content)
    with house.store.transaction() as tx:
        house.log.append(tx, Statement(predicate=Predicate.SYNTHESIZED, subjects=(digest,), fields=fields))
    return {"file": str(out), "digest": digest, "texts": count, "adapter": released.adapter, "guarantee": dict(released.guarantee)}


def child(house: House, *, file: Path, kind: str = "") -> dict[str, Any]:
    """Audits the released model merged into a folder of safetensors or one GGUF file; with a kind it is written first, and stays only when it passes.

    The same bytes are audited once: asked again, nothing is drawn from the level of the project's audits and the verdict is the earlier one.

    Args:
        file: where to write, or what somebody else made of the release.
        kind: of `CHILD_KINDS`, or nothing for a file or folder that is there.

    Raises:
        RequestInvalid: when the kind is unknown, or what to write is there already, has no folder or cannot be written.
        StorageFull: when the disk is full.
        NotFound: when a file to audit is not there.
        ModelUnsafe: when it does not hold the base's tensors, or the model is none that can be written as GGUF.
        NotReleased: when a written child does not pass, or there is no release. The verdict is in the log.
        EvidenceInvalid, DigestMismatch: when the release is not what was signed.
    """
    house.access.require(Action.RUN, who=current_user())
    if kind and (kind not in CHILD_KINDS or file.exists()):
        raise RequestInvalid(f"a kind among {', '.join(CHILD_KINDS)} and a file that is not there yet", value=f"{kind}, {file.name}")
    if kind and not file.parent.is_dir():
        raise RequestInvalid("a folder that is there, for the file", value=file.parent.name)
    released, base, folder = _released(house)
    named = kind or (MERGED if file.is_dir() else "gguf")
    with pipeline.unplaced(house) as own:
        made, merge = _written_child(released, base, folder, own, kind=kind) if kind else (file, None)
        module, digest = model.read_child(base, made, scratch=own)
        earlier = [e for e in house.log.entries(digest) if e.predicate is Predicate.CHILD_AUDITED and e.fields["adapter"] == released.adapter]
        told = dict(earlier[-1].fields) if earlier else _audited(house, released, base, folder, module, kind=named)
        verdict = Verdict(told["verdict"])
        stays = not kind or verdict is Verdict.PASS
        is_child = verdict is not Verdict.INCONCLUSIVE or told["layers"][0]["figures"].get("alike", False)
        parts = model.child_files(made)
        with house.store.transaction() as tx:
            if stays and is_child:  # scores unlike the release's show no child of it: no node below it, and nobody's to destroy
                protects = house.project.privacy.unit if verdict is Verdict.PASS else ""
                _register(tx, digest, released, merge=merge, is_merge=made.is_dir(), protects=protects)
                pipeline.record_written(tx, digest, file, parts=parts)
            if not earlier:
                house.log.append(tx, Statement(predicate=Predicate.CHILD_AUDITED, subjects=(digest,), fields=told))
        if not stays:
            remedy = "Store it with more bits, or audit with more canaries; the figures are in the log."
            raise NotReleased("a child that passes its audit", value=str(verdict), remedy=remedy)
        if kind:  # last, as above
            _place(made, file)
    return {
        "file": str(file),
        "digest": digest,
        "kind": named,
        "adapter": released.adapter,
        "verdict": str(verdict),
        "layer": told["layers"][0],
    }


def _written_child(released: Release, base: Base, adapter: Path, own: Path, *, kind: str) -> tuple[Path, Digest]:
    """Merges the release and writes it; returns where, and the digest of the merge, which every kind is made of."""
    module, folder = model.merged(model.load_adapter(base, adapter, digest=released.adapter)), own / MERGED
    merge = model.write_merged(module, base.tokenizer, folder)
    if kind == MERGED:
        return folder, merge
    model.write_gguf(module, base.tokenizer, own / "made.gguf", kind=kind)
    return own / "made.gguf", merge


def _register(tx: Connection, digest: Digest, released: Release, *, merge: Digest | None, is_merge: bool, protects: str) -> None:
    """Writes a child below the adapter, or below the merge that lay in between."""
    above = [released.adapter, released.base]
    if merge is not None and merge != digest:
        if not lineage.is_known(tx, merge):
            lineage.derive(tx, lineage.Artifact(digest=merge, kind=lineage.Kind.MERGE, protects=protects), parents=above)
            pipeline.remember_adapter(tx, merge, released.adapter)
        above = [merge]
    if not lineage.is_known(tx, digest):
        kind = lineage.Kind.MERGE if is_merge else lineage.Kind.QUANTISATION
        lineage.derive(tx, lineage.Artifact(digest=digest, kind=kind, protects=protects), parents=above)


def _place(made: Path, file: Path) -> None:
    """Moves a child out of the project to where it was asked for, whole or not at all."""
    partial = partial_of(file)
    try:
        shutil.move(made, partial)
        partial.rename(file)
    except OSError as error:
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise (storage_full() if error.errno == errno.ENOSPC else RequestInvalid("a place where a file can be written", value=file.name)) from error


def _audited(house: House, released: Release, base: Base, folder: Path, module: nn.Module, *, kind: str) -> dict[str, Any]:
    """What the log will say about a child: its verdict, at the level of one audit more."""
    layer, level = pipeline.audit_child(house, base, folder, module, kind=kind)
    return {"adapter": released.adapter, "verdict": str(layer.verdict), "kind": kind, "level": level, "layers": [layer.to_json()]}


def _released(house: House) -> tuple[Release, Base, Path]:
    """The release, its base and the folder of its adapter, each what was signed."""
    released = pipeline.load_release(house.releases / pipeline.released_name(house), public_key=house.log.public_key())
    base, folder = pipeline.load_base(house, None, pipeline.Silent()), released.path / gateway.ADAPTER_FOLDER
    if (base.digest, model.adapter_digest(folder)) != (released.base, released.adapter):
        raise DigestMismatch("the base model and the adapter that were released")
    return released, base, folder
