"""A project with a database, keys and a log, on disk and ready to be governed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from discreet.config import Project, SourceSection
from discreet.evidence.log import Log
from discreet.governance.catalog import Catalog
from discreet.governance.consent import Consent
from discreet.keys import Key, Keyring
from discreet.store import Store

NOTES = [
    {"id": "n1", "patient": "P-1", "text": "Zebediah came with a cough.", "name": "Zebediah"},
    {"id": "n2", "patient": "P-1", "text": "Zebediah is better.", "name": "Zebediah"},
    {"id": "n3", "patient": "P-2", "text": "Wilhelmina has a fracture.", "name": "Wilhelmina"},
]


@dataclass
class House:
    """The parts of one project, for a test to walk through."""

    root: Path
    store: Store
    keyring: Keyring
    log: Log
    catalog: Catalog
    consent: Consent
    master: Key

    def project(self, *sources: dict[str, Any], **privacy: Any) -> Project:
        head = {"name": "ward", "controller": "Clinic", "purpose": "note-assistant"}
        return Project.model_validate({"root": self.root, "project": head, "source": sources, "privacy": privacy})

    def write(self, name: str, content: object) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content if isinstance(content, str) else "".join(json.dumps(line) + "\n" for line in content))  # type: ignore[attr-defined]
        return name

    def notes(self, content: object = NOTES, **declared: Any) -> tuple[Project, SourceSection]:
        source = {"name": "notes", "unit": "patient", "owner": "Records office", "purposes": ["note-assistant"], "basis": "public_task", **declared}
        source.setdefault("path", "notes.jsonl")
        self.write(source["path"], content)
        project = self.project(source)
        return project, project.source[0]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    yield from open_house(f"sqlite:///{tmp_path}/discreet.db", tmp_path)


@pytest.fixture(params=["sqlite", "postgresql"])
def either_house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    """The same on SQLite and on PostgreSQL."""
    url = f"sqlite:///{tmp_path}/discreet.db" if request.param == "sqlite" else request.getfixturevalue("postgres")
    yield from open_house(url, tmp_path)


def open_house(url: str, root: Path) -> Iterator[House]:
    store = Store(url)
    master = Key.random()
    keyring = Keyring(store, master)
    log = Log(store, keyring, "example.org/ward")
    yield House(root, store, keyring, log, Catalog(store, keyring, log), Consent(store, keyring, log), master)
    store.close()
