"""The words that every layer shares: what a record is, whose it is, and what has been decided about it.

The stage values (`Record`, `Admitted`, `Deidentified`, `Snapshot`, `Release`) are *defined* here so that lower layers and siblings can accept them, and
*built* only in the home file of their stage (`tests/test_architecture.py` holds that). Text travels as `Sensitive[str]`, which prints as
`<sensitive>` and has to be opened by name, so that a careless log line or traceback shows nothing.

A record's `Digest` is a salted commitment (the salt belongs to the subject's key), not a hash of guessable text: when the key is forgotten the
digest links to nobody. See docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Generic, NewType, NoReturn, TypeVar, final

T = TypeVar("T")

Digest = NewType("Digest", str)
"""`sha256:` and 64 lower-case hex digits."""

SubjectId = NewType("SubjectId", str)
"""Keyed pseudonym of a privacy unit (`keys.Keyring.pseudonym`): stable in one project, meaningless outside it."""


@final
class Sensitive(Generic[T]):
    """A value that never prints itself; `reveal()` opens it, where the reader can see that it is opened."""

    __slots__ = ("_value",)

    def __init__(self, value: T) -> None:
        self._value = value

    def reveal(self) -> T:
        """Returns the value. Every call is a place where it can leak: keep them few."""
        return self._value

    def __repr__(self) -> str:
        return "<sensitive>"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return "<sensitive>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("Expected a Sensitive value to stay in this process; seal it with keys.py instead of serialising it.")


class Sensitivity(StrEnum):
    """How much harm a source can do, from none to special categories (GDPR Art. 9)."""

    PUBLIC = "public"
    INTERNAL = "internal"
    PERSONAL = "personal"
    SPECIAL = "special"


class Basis(StrEnum):
    """Legal bases of GDPR Art. 6(1)(a)-(f); `GENERATED` marks text that our own code wrote and that concerns nobody."""

    CONSENT = "consent"
    CONTRACT = "contract"
    LEGAL_OBLIGATION = "legal_obligation"
    VITAL_INTERESTS = "vital_interests"
    PUBLIC_TASK = "public_task"
    LEGITIMATE_INTERESTS = "legitimate_interests"
    GENERATED = "generated"


@final
@dataclass(frozen=True, slots=True)
class Purpose:
    """What the data is used for, in the controller's words ("note-assistant")."""

    name: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One document as it was collected (line 1 of the story), built by `governance.catalog`.

    `known` are identifiers of this subject that the source itself declares in other columns (label -> values, e.g. PERSON, MRN): the strongest detector
    there is for this subject's own text.
    """

    digest: Digest
    source: str
    subject: SubjectId
    sensitivity: Sensitivity
    text: Sensitive[str]
    known: Sensitive[Mapping[str, tuple[str, ...]]]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """A record that may be used for one purpose on a stated basis (line 2), built by `governance.consent`."""

    record: Record
    purpose: Purpose
    basis: Basis


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Deidentified:
    """What is left of a record after its policy (line 3), built by `deid.policy`. `counts` maps label to number of spans."""

    digest: Digest
    source: str
    subject: SubjectId
    sensitivity: Sensitivity
    text: Sensitive[str]
    policy: Digest
    counts: Mapping[str, int]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A frozen corpus (line 4), built by `corpus`: sealed shards on disk under `path`, named by the Merkle root over its record digests.

    `units` maps each privacy unit to the positions of its documents; it is sensitive (who is in, and how often), so it stays in memory. `sources` are the
    sorted names of the sources it was made from: the ledger charges what was trained on them to one budget, and reserves nothing without them.
    """

    root: Digest
    name: str
    sensitivity: Sensitivity
    path: Path
    units: Sensitive[Mapping[SubjectId, tuple[int, ...]]]
    sources: tuple[str, ...] = ()

    @property
    def num_units(self) -> int:
        """Number of privacy units: internal, see PITFALLS 41."""
        return len(self.units.reveal())


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A model that passed its gates (line 9), built by `pipeline.release` and re-built only from its verified signed statement.

    `guarantee` is the public statement of what was promised; `statement` the signed DSSE envelope it was read from.
    """

    name: str
    path: Path
    base: Digest
    adapter: Digest
    guarantee: Mapping[str, Any]
    statement: bytes
