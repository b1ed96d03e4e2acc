"""The gateway's own evidence: what was served, in signed statements of the log, also where there is no project.

    request ──> counted in memory ── `BATCH` requests or `EVERY_S` seconds ──> one `served` statement for each tenant, policy, model and adapter

A statement says how many requests, on which routes, with which statuses, how many identifiers by label went in as placeholders and how many of the model's own were stopped, the
policy's digest, the model's name and the digest of what answered (the released adapter, or the name of a server), and the median and the 99th percentile of the time to the first byte. It never holds
text, a user, or a key.

Fail closed: when a roll-up could not be written, every later request is refused until one can.

Does not cover: what was counted since the last roll-up when the process is killed (at most `BATCH` requests or `EVERY_S` seconds).
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import final

from discreet.errors import OperationFailed, SourceMissing
from discreet.evidence.log import Log, key_beside
from discreet.evidence.statement import JSON, Predicate, Statement
from discreet.keys import Keyring, open_master
from discreet.record import Digest
from discreet.store import Store, write_atomically

BATCH, EVERY_S = 100, 60.0
MAX_TIMES = 10_000
ORIGIN = "discreet.gateway"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """What one statement is about.

    Args:
        tenant: name of the tenant.
        policy: digest of its policy.
        model: name of the model.
        server: digest of who answered: of the released adapter, or of the name of a server elsewhere.
        released: whether it is a verified release.
    """

    tenant: str
    policy: Digest
    model: str
    server: Digest
    released: bool


@final
@dataclass(slots=True)
class _Sum:
    requests: int = 0
    routes: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    stopped: Counter[str] = field(default_factory=Counter)
    passed: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)

    def statement(self, group: Group) -> Statement:
        times = sorted(self.seconds) or [0.0]
        fields: dict[str, JSON] = {
            "release": group.server if group.released else None,
            "requests": self.requests,
            "tenant": group.tenant,
            "policy": group.policy,
            "model": group.model,
            "server": None if group.released else group.server,
            "routes": dict(sorted(self.routes.items())),
            "statuses": dict(sorted(self.statuses.items())),
            "counts": dict(sorted(self.counts.items())),
            "stopped": dict(sorted(self.stopped.items())),
            **({"passed": dict(sorted(self.passed.items()))} if self.passed else {}),
            "first_byte_ms": {"p50": _ms(times[len(times) // 2]), "p99": _ms(times[int(len(times) * 0.99)])},
        }
        return Statement(predicate=Predicate.SERVED, subjects=(group.server,), fields=fields)


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


@final
class Trail:
    """Roll-ups of one gateway, counted and written from any thread: one lock for the sums, held for moments, and one for who writes, held as long as the database takes."""

    def __init__(self, store: Store, log: Log) -> None:
        """Writes into a log, and its database."""
        self._store, self._log = store, log
        self._sums: dict[Group, _Sum] = {}
        self._open, self._since = 0, time.monotonic()
        self._broken = False
        self._counting, self._one = threading.Lock(), threading.Lock()

    def refuse_if_broken(self) -> None:
        """Called before a request is answered.

        Raises:
            OperationFailed: when the last roll-up could not be written.
        """
        if self._broken:
            raise OperationFailed("a trail that can be written", remedy="Make room for the gateway's trail; requests are refused until then.")

    def count(
        self,
        group: Group,
        *,
        route: str,
        status: int,
        counts: Mapping[str, int],
        stopped: Mapping[str, int],
        seconds: float,
        passed: Mapping[str, int] = MappingProxyType({}),
    ) -> bool:
        """Counts one request; returns whether a roll-up is due."""
        with self._counting:
            total = self._sums.setdefault(group, _Sum())
            total.requests += 1
            total.routes[route] += 1
            total.statuses[str(status)] += 1
            total.counts.update(counts)
            total.stopped.update(stopped)
            total.passed.update(passed)
            if len(total.seconds) < MAX_TIMES:
                total.seconds.append(seconds)
            self._open += 1
            return self._open >= BATCH or time.monotonic() - self._since >= EVERY_S or self._broken

    def write(self) -> None:
        """Logs what was counted since the last statement; what cannot be written is kept for the next try.

        Raises:
            OperationFailed: when it cannot be written.
        """
        with self._one:
            with self._counting:
                sums, self._sums, self._open, self._since = self._sums, {}, 0, time.monotonic()
            if not sums:
                return
            try:
                with self._store.transaction() as tx:
                    self._log.append_all(tx, [total.statement(group) for group, total in sums.items()])
            except Exception as error:
                self._broken = True
                with self._counting:
                    for group, total in self._sums.items():
                        _add(sums.setdefault(group, _Sum()), total)
                    self._sums = sums
                raise OperationFailed("a trail that can be written", value=type(error).__name__) from None
            self._broken = False

    async def keep_writing(self) -> None:
        """Writes what is left over every `EVERY_S` seconds, until it is cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            with contextlib.suppress(Exception):  # `write` has marked the trail as broken; the next try comes
                await asyncio.to_thread(self.write)


def _add(total: _Sum, other: _Sum) -> None:
    total.requests += other.requests
    for name in ("routes", "statuses", "counts", "stopped", "passed"):
        getattr(total, name).update(getattr(other, name))
    total.seconds += other.seconds[: MAX_TIMES - len(total.seconds)]


def _open(folder: Path) -> tuple[Store, Log]:
    store = Store(f"sqlite:///{folder / 'trail.db'}")
    return store, Log(store, Keyring(store, open_master(f"file:{folder / 'master.key'}")), ORIGIN)


def export(folder: Path, out: Path, *, public: bool) -> tuple[Path, Path]:
    """Writes the trail as a bundle that verifies offline, and its public key beside it; returns both.

    Raises:
        SourceMissing: when there is no trail in the folder.
    """
    if not (folder / "trail.db").is_file():
        raise SourceMissing("the folder of a gateway's trail", value=str(folder))
    store, log = _open(folder)
    try:
        key = key_beside(out)
        bundle = log.export(out, public=public)
        write_atomically(key, (log.public_key() + "\n").encode())
        return bundle, key
    finally:
        store.close()


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Trail]:
    """Opens the trail of a gateway alone: `trail.db` and `master.key` in a folder that only its owner reads. What was counted is written at the end.

    Raises:
        KeyUnavailable, OperationFailed: when the folder cannot be used.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    store, log = _open(folder)
    try:
        trail = Trail(store, log)
        try:
            yield trail
        finally:
            trail.write()
    finally:
        store.close()
