"""THE STORY: from collected text to a served model, and back to erasure. Each stage is one call.

    ingest ──> train ──> audit ──> release ──> serve
      |  register, admit, de-identify, freeze
      |         |  calibrate, reserve, spend, train
      |         |          |  attack with canaries, controls
      '─────────┴──────────┴──────────┴─────────> statements in the log, in the transaction that stores the result

A stage that finished leaves its result in the table `stages`; calling it again returns that result. A stage that was killed is repeated: what it had already
logged is recognised, what it had already spent is not spent again, and training continues from its sealed checkpoint with the same draws.

The parts, each on top of those before it: house, weights, people, admission, pricing, continuing, training, auditing, releasing, erasing, searching, story.

Does not cover: machines that do not trust each other (federated/), serving itself (serve/), the demo's corpus (demo.py).
"""

from __future__ import annotations

from discreet.pipeline.admission import confirm_sensitivity, ingest, propose_sensitivity
from discreet.pipeline.auditing import audit, audit_child, utility_control
from discreet.pipeline.erasing import (
    NO_SUBJECTS,
    confirm_erasure,
    drill,
    erase,
    erasure_of,
    record_written,
    remains,
    request_erasure,
    resume_erasures,
    retention,
    unplaced,
)
from discreet.pipeline.house import House, Observer, Silent, finished, for_log, remember_adapter, subject_of
from discreet.pipeline.people import access_export, import_consent, may_record_consent, reidentification, restore_tokens, subject_key
from discreet.pipeline.pricing import budget_fields, open_project_budget, price
from discreet.pipeline.releasing import behind, load_release, override_inconclusive, release, released_name
from discreet.pipeline.searching import ask, build_index, search
from discreet.pipeline.story import export_evidence, lineage_export, open_house, run, trace, train_together, update
from discreet.pipeline.training import train
from discreet.pipeline.weights import PUBLIC_ADAPTER, load_base

__all__ = [
    "NO_SUBJECTS",
    "PUBLIC_ADAPTER",
    "House",
    "Observer",
    "Silent",
    "access_export",
    "ask",
    "audit",
    "audit_child",
    "behind",
    "budget_fields",
    "build_index",
    "confirm_erasure",
    "confirm_sensitivity",
    "drill",
    "erase",
    "erasure_of",
    "export_evidence",
    "finished",
    "for_log",
    "import_consent",
    "ingest",
    "lineage_export",
    "load_base",
    "load_release",
    "may_record_consent",
    "open_house",
    "open_project_budget",
    "override_inconclusive",
    "price",
    "propose_sensitivity",
    "record_written",
    "reidentification",
    "release",
    "released_name",
    "remains",
    "remember_adapter",
    "request_erasure",
    "restore_tokens",
    "resume_erasures",
    "retention",
    "run",
    "search",
    "subject_key",
    "subject_of",
    "trace",
    "train",
    "train_together",
    "unplaced",
    "update",
    "utility_control",
]
