"""THE STORY: from collected text to a served model, and back to erasure. Each stage is one call.

    ingest ──> train ──> audit ──> release ──> serve
      |  register, admit, de-identify, freeze
      |         |  calibrate, reserve, spend, train
      |         |          |  attack with canaries, controls
      '─────────┴──────────┴──────────┴─────────> statements in the log, in the transaction that stores the result

A stage that finished leaves its result in the table `stages`; calling it again returns that result. A stage that was killed is repeated: what it had already
logged is recognised, what it had already spent is not spent again, and training continues from its sealed checkpoint with the same draws.

Does not cover: more than one machine (federated/), serving itself (serve/), the demo's corpus and its non-private control (demo.py).
"""

from __future__ import annotations

import fcntl
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, final

from sqlalchemy import Column, Connection, String, Table, Text, insert, select

from discreet import config, corpus
from discreet.config import Project, SourceSection, digest_of
from discreet.deid import policy as deid
from discreet.dp import accounting, mechanism
from discreet.errors import NotReleased, PlanInvalid, RunInProgress, TrackRefused, UsageError
from discreet.evidence.log import Log
from discreet.evidence.statement import Predicate, Statement
from discreet.governance.catalog import Catalog
from discreet.governance.consent import Consent
from discreet.keys import Keyring, open_master
from discreet.ledger import Ledger, Reservation
from discreet.record import Basis, Deidentified, Digest, Release, Sensitivity, Snapshot, SubjectId
from discreet.store import Store, metadata

STAGES = ("ingest", "train", "audit", "release", "report")
BATCH = 512
CANARY_SOURCE = "audit-canaries"

_stages = Table("stages", metadata, Column("name", String(32), primary_key=True), Column("config", String(71), nullable=False), Column("result", Text, nullable=False))


class Observer(Protocol):
    """Hears what happens; shows it or not. Nothing sensitive is ever said to it."""

    def stage(self, name: str) -> None: ...

    def note(self, line: str) -> None: ...

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None: ...
