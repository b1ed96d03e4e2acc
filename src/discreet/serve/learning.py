"""Prompts as training data, for those who asked for it: an opted-in caller's texts become rows of a project's own source, and nothing else of anybody's is ever kept.

    prompt ──> has this person granted the project's purpose? ──no──> forgotten
                          └──yes──> row of the source ──> `discreet update`: collect, admit, de-identify, snapshot

The row goes where every other record of the project comes from, so the same rules decide again when it is read: `consent.admit` refuses who has withdrawn meanwhile, the training
policy de-identifies, `retention_days` ends it, an erasure rewrites the file. The person is named by `user` (OpenAI) or `metadata.user_id` (Anthropic), as the source's unit column names people.

Off unless a project is given. A grant must be the person's own latest word (`discreet consent grant`): what the source declares is not asked, and a request without a person is never kept.

Fail closed: a row that cannot be written ends the request. Rows need no registration to be erased, shown to their person or ended by retention.

Does not cover: who may speak for the `user` that a tenant's program names; answers of the model (they are not kept); a row that is
offered in the moment in which an erasure puts the file back without somebody may be lost.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, final

from discreet.config import Project, SourceSection
from discreet.errors import ConfigInvalid, OperationFailed
from discreet.governance.catalog import subject_id
from discreet.governance.consent import Consent
from discreet.keys import Key, Keyring

EVERY_PURPOSE = "*"


@final
class Learner:
    """Keeps the prompts of those who opted in."""

    def __init__(self, project: Project, source: str, *, keyring: Keyring, consent: Consent) -> None:
        """Opens the source that takes the rows.

        Args:
            project: whose purpose people grant.
            source: name of one of its sources: a JSON Lines file of its own with a unit column.
            keyring: of the project.
            consent: of the project.

        Raises:
            ConfigInvalid: when there is no such source, or it has another form.
        """
        section = next((each for each in project.source if each.name == source), None)
        if section is None or section.format != "jsonl" or section.role != "train" or not section.unit or section.known or _is_elsewhere(section):
            raise ConfigInvalid("a source of role train in one JSON Lines file, with a unit and without known columns", value=source)
        self._project, self._section, self._keyring, self._consent = project, section, keyring, consent
        self._path = project.root / section.path

    def offer(self, person: str | None, texts: Sequence[str]) -> bool:
        """Keeps the texts of one request if its person has opted in; returns whether it did.

        Raises:
            OperationFailed: when they cannot be written.
        """
        if not person or not any(texts) or not self._has_opted_in(person):
            return False
        name = Key.random().mac(b"prompt").hex()[:32]
        row = {self._section.id: name, self._section.unit: person, self._section.text: "\n\n".join(texts)}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "replace")
        try:
            file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)  # let go of when the file is closed
                size = os.fstat(file).st_size
                if size and os.pread(file, 1, size - 1) != b"\n":  # a last line that its owner, or a crash, left open
                    line = b"\n" + line
                whole = os.write(file, line) == len(line)
                if not whole:  # half a row would close the whole source
                    os.ftruncate(file, size)
                os.fsync(file)
            finally:
                os.close(file)
        except OSError:
            whole = False
        if not whole:
            raise OperationFailed("a prompt of somebody who opted in to be kept", value=self._section.name)
        return True

    def _has_opted_in(self, person: str) -> bool:
        """Says whether the person's own latest word on the project's purpose, or on every purpose, is a grant of it."""
        subject = subject_id(self._keyring, unit=self._project.privacy.unit, value=person)
        if self._consent.is_erased(subject):  # what they once said outlives them; they do not come back by it
            return False
        words = [word for word in self._consent.history(subject) if word.purpose in (self._project.project.purpose, EVERY_PURPOSE)]
        return bool(words) and words[-1].basis is not None and words[-1].purpose == self._project.project.purpose


def _is_elsewhere(section: SourceSection) -> bool:
    return bool(section.query) or "://" in section.path or any(mark in section.path for mark in "*?[")


def person_of(body: Mapping[str, Any]) -> str | None:
    """Returns who a request says is asking."""
    metadata = body.get("metadata")
    named = body.get("user") or (metadata.get("user_id") if isinstance(metadata, Mapping) else None)
    return named if isinstance(named, str) else None


def texts_of(body: Mapping[str, Any]) -> list[str]:
    """Returns what the person wrote: the texts of the user's own turns, and of a bare prompt."""
    found: list[str] = []
    for turn in body.get("messages") or (body["input"] if isinstance(body.get("input"), list) else []):
        if isinstance(turn, Mapping) and turn.get("role") == "user":
            found += _strings(turn.get("content"))
    return [*found, *_strings(body.get("prompt")), *(_strings(body["input"]) if isinstance(body.get("input"), str) else [])]


def _strings(content: Any) -> list[str]:
    if isinstance(content, str):
        return [content]
    parts = content if isinstance(content, list) else []
    return [text for part in parts if isinstance(text := part.get("text") if isinstance(part, Mapping) else part, str)]
