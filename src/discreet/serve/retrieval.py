"""Search over a frozen snapshot that shows only what this caller, purpose and moment allow, and counts of people over what nobody may read.

    FOLDER/DIGEST.index    magic, length of the manifest, the manifest sealed under the project's key "retrieval", then one block of each subject

A block holds a subject's passages and their vectors (how often each term occurs), sealed under the *subject's* key and bound to index, subject and records: whoever is
forgotten is shredded in every copy. Passages are cut from de-identified text, cut after sentences, and together are the text again. The digest names snapshot and configuration; a file is
written whole or not at all, and the file of an index is only ever replaced by one with fewer subjects (`IndexStore`, for `governance.erasure`) or built anew.

`Index.passages` opens what it is allowed to open and nothing else; `rank` and `votes` see no other passages. So a document that the caller may not read changes no
score, rank or count: how rare a term is, and how long passages are, is computed over the allowed ones in each search (PITFALLS 32). Results, vectors and opened blocks are kept nowhere.

Ranking is BM25 over words as they are written (NFKC, case folded). There is no neural embedder: it would be another model whose vectors give text away, for corpora in which words do well.

`votes` is the question over many documents: each subject whose own passages hold every word of the query names the options that these passages mention, at most `most` of them, chosen by a keyed hash.
What one says depends on nobody else: no document frequency, no best k. So one subject changes each count by at most 1 and all together by at most `most`.

Sources: Robertson & Zaragoza 2009 (BM25; the weight of a term as in Lucene, never negative).

Does not cover: who may ask and what is allowed (`pipeline.searching`), synonyms and inflection, words that a passage's end parts, how long an answer takes, indexes larger than memory.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import final

from discreet import corpus
from discreet.config import digest_of
from discreet.errors import DigestMismatch, NotFound, SealBroken
from discreet.keys import Key, Keyring
from discreet.record import Digest, Sensitive, Snapshot, SubjectId
from discreet.store import write_atomically

LONGEST = 600
"""Characters of a passage."""
SATURATION, LENGTH = 1.2, 0.75
"""BM25's k1 and b."""
_MAGIC = b"discreet-index/1\n"
_WORD = re.compile(r"\w+")
_END = re.compile(r"[.!?]\s+|\n+")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """A piece of one record's de-identified text: the record's digest and source, its number in the record, and how often each term occurs in it."""

    record: Digest
    source: str
    number: int
    text: Sensitive[str]
    vector: Mapping[str, int]

    def __repr__(self) -> str:
        return f"<passage of {self.record}>"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class _Block:
    """Where a subject's sealed bytes lie, and the source of each of their records."""

    subject: SubjectId
    records: Mapping[Digest, str]
    sealed: bytes


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """An opened index; its blocks are sealed still."""

    digest: Digest
    blocks: tuple[_Block, ...]

    @property
    def records(self) -> dict[Digest, str]:
        """Every record in it, with its source. Internal (PITFALLS 41)."""
        return {digest: source for block in self.blocks for digest, source in block.records.items()}

    def passages(self, allowed: AbstractSet[Digest], keyring: Keyring) -> dict[SubjectId, list[Passage]]:
        """Opens the passages of the allowed records, by subject; no other block is opened.

        Raises:
            SealBroken: when a block was changed or moved.
            Forgotten: when an allowed record's subject was erased since it was asked about.
        """
        blocks = [block for block in self.blocks if not allowed.isdisjoint(block.records)]
        keys = keyring.existing([block.subject for block in blocks])
        return {block.subject: [p for p in _opened(block, self.digest, keys) if p.record in allowed] for block in blocks}


# Words


def terms(text: str) -> list[str]:
    """Returns the words of a text in their order, NFKC, case folded.

    Example:
        >>> terms("Metformin, twice a day.")
        ['metformin', 'twice', 'a', 'day']
    """
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def cut(text: str) -> Iterator[str]:
    """Cuts a text into passages of at most 600 characters: after a sentence or a line where there is one, else after a word. Joined they are the text."""
    start = 0
    while len(text) - start > LONGEST:
        window = text[start : start + LONGEST]
        ends = [found.end() for found in _END.finditer(window)]
        end = ends[-1] if ends else window.rfind(" ") + 1 or LONGEST
        yield window[:end]
        start += end
    yield text[start:]


def rank(passages: Sequence[Passage], query: str, *, limit: int) -> list[tuple[float, Passage]]:
    """Returns the passages that hold a word of the query, best first, with their score (> 0); ties in the order of records. Only what is passed counts.

    Args:
        passages: those that the caller may read.
        limit: how many at most.
    """
    wanted = list(dict.fromkeys(terms(query)))
    lengths = [sum(passage.vector.values()) for passage in passages]
    mean = sum(lengths) / max(1, len(lengths)) or 1.0
    frequency = {term: sum(term in passage.vector for passage in passages) for term in wanted}
    weight = {term: math.log1p((len(passages) - count + 0.5) / (count + 0.5)) for term, count in frequency.items()}
    scored = []
    for passage, length in zip(passages, lengths, strict=True):
        damping = SATURATION * (1 - LENGTH + LENGTH * length / mean)
        found = [(weight[term], passage.vector[term]) for term in wanted if term in passage.vector]
        if found:
            scored.append((sum(w * count * (SATURATION + 1) / (count + damping) for w, count in found), passage))
    return sorted(scored, key=lambda each: (-each[0], each[1].record, each[1].number))[:limit]


def votes(subjects: Mapping[SubjectId, Sequence[Passage]], query: str, options: Sequence[str], *, most: int, key: Key) -> list[int]:
    """Counts for each option the subjects of whom a passage holds every word of the query and mentions the option. Not private by itself: noise is the caller's.

    Args:
        subjects: the passages of each; one subject changes each count by at most 1, and all together by at most `most`.
        options: public, each with a word or more, mentioned when its words follow one another.
        most: options that one subject names at most, >= 1; which of them, a keyed hash of subject and option says.
        key: of that hash.
    """
    wanted, phrases = set(terms(query)), [f" {' '.join(terms(option))} " for option in options]
    counts = [0] * len(options)
    for subject, own in subjects.items():
        said = [f" {' '.join(terms(p.text.reveal()))} " for p in own if wanted <= p.vector.keys()]
        named = [place for place, phrase in enumerate(phrases) if any(phrase in each for each in said)]
        drawn = {place: key.mac(f"{subject}{phrases[place]}".encode()) for place in named}
        for place in sorted(named, key=drawn.__getitem__)[:most]:
            counts[place] += 1
    return counts


# Files


def name_of(snapshot: Digest, config: Digest) -> Digest:
    """Returns the digest of the index of a snapshot under a configuration. Depends on private records as the snapshot's root does: internal."""
    return digest_of([_MAGIC.decode(), LONGEST, snapshot, config])


def build(snapshot: Snapshot, *, config: Digest, keyring: Keyring, folder: Path) -> Digest:
    """Writes the index of a snapshot and returns its digest. What is there under that digest is replaced.

    Args:
        snapshot: its frozen text is checked against its root as it is read.
        config: digest of whatever else decides what is in it.
        folder: where indexes lie.

    Raises:
        Forgotten: when a subject was erased since it was frozen.
        DigestMismatch, SealBroken: when the snapshot is not what was frozen.
        StorageFull: when the disk is full; nothing is left behind.
    """
    digest, units = name_of(snapshot.root, config), snapshot.units.reveal()
    records, sources, keys = corpus.digests(snapshot, keyring), corpus.sources(snapshot, keyring), keyring.existing(list(units))
    texts = iter(corpus.texts(snapshot, [position for positions in units.values() for position in positions], keyring))
    blocks = []
    for subject, positions in units.items():
        theirs = {records[position]: sources[position] for position in positions}
        content = [[[piece, Counter(terms(piece))] for piece in cut(next(texts))] for _ in positions]
        sealed = keys[subject].seal(_canonical(content), context=_context(digest, subject, theirs))
        blocks.append(_Block(subject=subject, records=theirs, sealed=sealed))
    _write(folder, digest, blocks, keyring.purpose("retrieval"))
    return digest


def open_index(digest: Digest, *, keyring: Keyring, folder: Path) -> Index:
    """Opens an index by its digest.

    Raises:
        NotFound: when its file is not there.
        SealBroken, DigestMismatch: when the file is not what was written.
    """
    try:
        content = _path(folder, digest).read_bytes()
    except OSError:
        raise NotFound("the index that was built", value=digest, remedy="Build it again: `discreet index`.") from None
    return Index(digest=digest, blocks=_read(content, digest, keyring.purpose("retrieval")))


def decoded(folder: Path, keyring: Keyring) -> Iterator[tuple[Path, list[str]]]:
    """Yields every index file with what its blocks say of everybody in it, for whoever looks for somebody: each record's text, and the terms of its vectors. Errors as `open_index`."""
    for path in sorted(folder.glob("*.index")):
        index = open_index(Digest(f"sha256:{path.stem}"), keyring=keyring, folder=folder)
        said: dict[Digest, list[str]] = {}
        for theirs in index.passages(index.records.keys(), keyring).values():
            for passage in theirs:
                said.setdefault(passage.record, []).append(passage.text.reveal())
                said.setdefault(Digest(f"{passage.record} vectors"), []).append(f"{' '.join(passage.vector)} ")
        yield path, ["".join(pieces) for pieces in said.values()]


def remove(folder: Path, digest: Digest) -> None:
    """Removes the file of an index."""
    _path(folder, digest).unlink(missing_ok=True)


def sweep(folder: Path, *, keep: Digest) -> None:
    """Removes everything but the file of one index: those that it replaced, what a crash left, and what is no index."""
    for path in folder.iterdir():
        if path != _path(folder, keep):
            _clear(path)


@final
class IndexStore:
    """What the indexes hold of a subject, for `governance.erasure`: whatever lies in the folder, registered or not. What is no index, or does not open any more, is destroyed; an index is built again."""

    name = "indexes"

    def __init__(self, folder: Path, keyring: Keyring) -> None:
        self._folder = folder
        self._key = keyring.purpose("retrieval")

    def holds(self, subject: SubjectId) -> list[Digest]:
        """Returns the digests of the indexes with a block of the subject."""
        return [digest for digest, _, blocks in self._all() if blocks and any(block.subject == subject for block in blocks)]

    def purge(self, subject: SubjectId) -> None:
        """Writes every index anew without the subject's block, and removes whatever else lies there. Idempotent."""
        for digest, path, blocks in self._all():
            if blocks is None:
                _clear(path)
            elif any(block.subject == subject for block in blocks):
                _write(self._folder, digest, [block for block in blocks if block.subject != subject], self._key)

    def absence(self, subject: SubjectId) -> bool:
        """Returns whether everything there is an index that opens, names the subject nowhere and has no byte that is not of somebody named."""
        return all(blocks is not None and all(block.subject != subject for block in blocks) for _, _, blocks in self._all())

    def _all(self) -> list[tuple[Digest, Path, tuple[_Block, ...] | None]]:
        """Whatever lies there with its blocks; None where it is no index, or does not open."""
        found: list[tuple[Digest, Path, tuple[_Block, ...] | None]] = []
        for path in sorted(self._folder.iterdir()) if self._folder.is_dir() else []:
            digest = Digest(f"sha256:{path.stem}")
            try:
                content = path.read_bytes() if path == _path(self._folder, digest) and path.is_file() else b""
                found.append((digest, path, _read(content, digest, self._key)))
            except (DigestMismatch, SealBroken):
                found.append((digest, path, None))
        return found


def _clear(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _path(folder: Path, digest: Digest) -> Path:
    return folder / f"{digest.removeprefix('sha256:')}.index"


def _write(folder: Path, digest: Digest, blocks: Sequence[_Block], key: Key) -> None:
    rows = [[block.subject, len(block.sealed), list(block.records.items())] for block in blocks]
    manifest = key.seal(_canonical(rows), context=_context(digest, "manifest", {}))
    folder.mkdir(mode=0o700, exist_ok=True)
    write_atomically(_path(folder, digest), _MAGIC + len(manifest).to_bytes(8, "big") + manifest + b"".join(block.sealed for block in blocks))


def _read(content: bytes, digest: Digest, key: Key) -> tuple[_Block, ...]:
    """The blocks of a file; every byte of it is accounted for."""
    start = len(_MAGIC) + 8
    end = start + int.from_bytes(content[len(_MAGIC) : start], "big")
    if not content.startswith(_MAGIC) or end > len(content):
        raise _changed(digest)
    blocks = []
    for subject, length, records in json.loads(key.open(content[start:end], context=_context(digest, "manifest", {}))):
        blocks.append(_Block(subject=SubjectId(subject), records={Digest(d): source for d, source in records}, sealed=content[end : end + length]))
        end += length
    if end != len(content):
        raise _changed(digest)
    return tuple(blocks)


def _changed(digest: Digest) -> DigestMismatch:
    return DigestMismatch("an index as it was built", value=digest, remedy="Build it again: `discreet index`.")


def _opened(block: _Block, digest: Digest, keys: Mapping[SubjectId, Key]) -> Iterator[Passage]:
    content = json.loads(keys[block.subject].open(block.sealed, context=_context(digest, block.subject, block.records)))
    for (record, source), passages in zip(block.records.items(), content, strict=True):
        for number, (text, vector) in enumerate(passages):
            yield Passage(record=record, source=source, number=number, text=Sensitive(text), vector=vector)


def _context(digest: Digest, part: str, records: Mapping[Digest, str]) -> bytes:
    return _canonical(["discreet/index", digest, part, list(records.items())])


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
