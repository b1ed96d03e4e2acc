"""Every error that Discreet raises on purpose, as one tree.

    DiscreetError                      exit  http  code
    |-- UsageError                        2   400
    |   |-- ConfigInvalid                           config.invalid
    |   |   `-- UnknownKey                          config.unknown_key
    |   |-- SourceEmpty                             source.empty
    |   |-- SourceNotText                           source.not_text
    |   |-- SourceMissing                           source.missing
    |   |-- RecordInvalid                           record.invalid
    |   |-- RecordConflict                          record.conflict
    |   |-- PlanInvalid                             plan.invalid
    |   |-- ModelUnsafe                             model.unsafe
    |   |-- RequestInvalid                          request.invalid
    |   `-- NotFound                                not_found        (http 404)
    |-- Refused                           3   403
    |   |-- NotAdmitted                             consent.not_admitted
    |   |-- TrackRefused                            track.refused
    |   |-- BudgetExhausted                         budget.exhausted (http 429)
    |   |-- ReservationRefused                      budget.reservation
    |   |-- NotReleased                             release.withheld
    |   |-- AccessDenied                            access.denied    (http 401)
    |   |-- LeakStopped                             serve.leak
    |   |-- TermsRefused                            federation.terms
    |   |-- PeerRefused                             federation.peer
    |   |-- MessageReplayed                         federation.replayed
    |   |-- SurvivorsRefused                        federation.survivors
    |   |-- RoundAborted                            federation.aborted
    |   `-- Forgotten                               keys.forgotten   (http 410)
    |-- VerificationFailed                4   409
    |   |-- EvidenceInvalid                         evidence.invalid
    |   |-- DigestMismatch                          digest.mismatch
    |   |-- SourceChanged                           source.changed
    |   `-- SealBroken                              seal.broken
    `-- OperationFailed                   1   500
        |-- MissingExtra                            extra.missing
        |-- StorageFull                             storage.full     (http 507)
        |-- ClockBackwards                          clock.backwards
        |-- RunInProgress                           run.in_progress  (http 409)
        |-- NothingLearned                          train.nothing_learned
        |-- KeyUnavailable                          keys.unavailable
        |-- Overloaded                              serve.overloaded (http 429)
        |-- UpstreamFailed                          serve.upstream   (http 502)
        |-- OutOfTime                               serve.timeout    (http 504)
        `-- ErasureIncomplete                       erasure.incomplete

A message states the rule, the value that broke it and the remedy. The value is public by contract: callers never pass text, names or
identifiers of people. The mathematics (`dp`, `evidence.merkle`, `audit.bounds`) raises plain `ValueError` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self


class DiscreetError(Exception):
    """Base of all errors; `str(error)` is safe to print and to log.

    Args:
        rule: what was expected, as a phrase ("epsilon > 0").
        value: the public value that broke the rule; left out when None.
        remedy: what the reader can do about it.
    """

    code: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 1
    http_status: ClassVar[int] = 500

    def __init__(self, rule: str, *, value: object = None, remedy: str = "") -> None:
        self.rule = rule
        self.value = value
        self.remedy = remedy
        got = "" if value is None else f" Got {value}."
        super().__init__(f"Expected {rule}.{got}{' ' + remedy if remedy else ''}")

    def to_json(self) -> dict[str, object]:
        """Returns the error as the object that every `--json` command prints on stdout."""
        value = None if self.value is None else str(self.value)
        return {"error": {"code": self.code, "rule": self.rule, "value": value, "remedy": self.remedy}}


class UsageError(DiscreetError):
    code, exit_code, http_status = "usage", 2, 400


class ConfigInvalid(UsageError):
    code = "config.invalid"


class UnknownKey(ConfigInvalid):
    code = "config.unknown_key"


class SourceEmpty(UsageError):
    code = "source.empty"


class SourceNotText(UsageError):
    code = "source.not_text"


class SourceMissing(UsageError):
    code = "source.missing"


class RecordInvalid(UsageError):
    code = "record.invalid"


class RecordConflict(UsageError):
    code = "record.conflict"


class PlanInvalid(UsageError):
    code = "plan.invalid"

    @classmethod
    def of(cls, error: ValueError, *, remedy: str = "") -> Self:
        """Says what the mathematics said ("Expected clip_norm=-1.0 > 0."), whose rule holds the public value."""
        return cls(str(error).removeprefix("Expected ").removesuffix("."), remedy=remedy)


class ModelUnsafe(UsageError):
    code = "model.unsafe"


class RequestInvalid(UsageError):
    code = "request.invalid"


class NotFound(UsageError):
    code, http_status = "not_found", 404


class Refused(DiscreetError):
    code, exit_code, http_status = "refused", 3, 403


class NotAdmitted(Refused):
    code = "consent.not_admitted"


class TrackRefused(Refused):
    code = "track.refused"


class BudgetExhausted(Refused):
    code, http_status = "budget.exhausted", 429


class ReservationRefused(Refused):
    code = "budget.reservation"


class NotReleased(Refused):
    code = "release.withheld"


class AccessDenied(Refused):
    code, http_status = "access.denied", 401


class LeakStopped(Refused):
    code = "serve.leak"


class Forgotten(Refused):
    code, http_status = "keys.forgotten", 410


class TermsRefused(Refused):
    code = "federation.terms"


class PeerRefused(Refused):
    code = "federation.peer"


class MessageReplayed(Refused):
    code = "federation.replayed"


class SurvivorsRefused(Refused):
    code = "federation.survivors"


class RoundAborted(Refused):
    code = "federation.aborted"


class VerificationFailed(DiscreetError):
    code, exit_code, http_status = "verification", 4, 409


class EvidenceInvalid(VerificationFailed):
    """Evidence that does not verify; `failed` names every file, entry and rule that broke (empty when one value is malformed)."""

    code = "evidence.invalid"

    def __init__(self, rule: str, *, value: object = None, remedy: str = "", failed: Sequence[str] = ()) -> None:
        super().__init__(rule, value=value, remedy=remedy)
        self.failed = list(failed)

    @classmethod
    def of(cls, failed: Sequence[str]) -> Self:
        """Says how many things broke, and which was the first."""
        return cls("evidence that verifies", value=f"{len(failed)} failures, first: {failed[0]}", remedy="Trust nothing in it.", failed=failed)

    def to_json(self) -> dict[str, object]:
        """Returns the error with `failed` beside it, at the top level as in the answer of a successful verification."""
        return {**super().to_json(), "failed": self.failed}


class DigestMismatch(VerificationFailed):
    code = "digest.mismatch"


class SourceChanged(VerificationFailed):
    code = "source.changed"


class SealBroken(VerificationFailed):
    code = "seal.broken"


class OperationFailed(DiscreetError):
    code, exit_code, http_status = "operation", 1, 500


class MissingExtra(OperationFailed):
    code = "extra.missing"


class StorageFull(OperationFailed):
    code, http_status = "storage.full", 507


class ClockBackwards(OperationFailed):
    code = "clock.backwards"


class RunInProgress(OperationFailed):
    code, http_status = "run.in_progress", 409


class NothingLearned(OperationFailed):
    code = "train.nothing_learned"


class KeyUnavailable(OperationFailed):
    code = "keys.unavailable"


class Overloaded(OperationFailed):
    code, http_status = "serve.overloaded", 429


class UpstreamFailed(OperationFailed):
    code, http_status = "serve.upstream", 502


class OutOfTime(OperationFailed):
    code, http_status = "serve.timeout", 504


class ErasureIncomplete(OperationFailed):
    code = "erasure.incomplete"


def missing_extra(extra: str, module: str) -> MissingExtra:
    """Returns the error for a part of Discreet whose optional dependency is absent."""
    return MissingExtra(f"the optional package {module!r} to be installed", remedy=f"pip install 'discreet[{extra}]'")
