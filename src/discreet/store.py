"""One database: SQLite embedded, or PostgreSQL by URL, behind SQLAlchemy Core.

Tables are declared beside the code that needs them, on the shared `metadata`. Writers are serialised: a transaction takes the write lock before its first
read (`BEGIN IMMEDIATE` in SQLite, a transaction-scoped advisory lock in PostgreSQL), so a read followed by a write is never a race (PITFALLS 18).
Deleted rows are overwritten (`secure_delete`), and `scrub()` empties SQLite's write-ahead log, so that a destroyed key is gone from the files.

Errors of the database never carry the values of a statement (`hide_parameters`): they would end in a log.

Does not cover: PostgreSQL's own write-ahead log and dead tuples, which are the operator's to vacuum and rotate.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Column, Connection, Engine, Integer, MetaData, String, Table, create_engine, event, insert, select, text, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError, OperationalError

from discreet.errors import ClockBackwards, ConfigInvalid, OperationFailed, StorageFull

metadata = MetaData()

_schema = Table("discreet_schema", metadata, Column("version", Integer, nullable=False))
_clock = Table("discreet_clock", metadata, Column("id", Integer, primary_key=True), Column("latest", String(32), nullable=False))

Migration = Callable[[Connection], None]
MIGRATIONS: list[Migration] = []
"""Applied in order to databases of older versions; never edited once released."""

_ADVISORY_LOCK = 0x0D15C8EE7
_PATIENCE_S = 5.0
"""How long compacting waits for readers of the moment."""

CLOCK_TOLERANCE_S = 5.0


class Store:
    """An open database. Thread-safe; one per process."""

    def __init__(self, url: str) -> None:
        """Opens the database and creates or migrates its tables.

        Args:
            url: `sqlite:///PATH` or `postgresql+psycopg://...`.

        Raises:
            ConfigInvalid: when the URL names another database.
            OperationFailed: when the database cannot be opened or was written by a newer version.
        """
        backend = make_url(url).get_backend_name()
        if backend not in ("sqlite", "postgresql"):
            raise ConfigInvalid("a sqlite:/// or postgresql+psycopg:// database URL", value=backend)
        self.engine = _engine(url, backend)
        self._is_sqlite = backend == "sqlite"
        try:
            with self.transaction() as tx:
                metadata.create_all(tx)
                _migrate(tx)
        except OperationalError as error:
            raise OperationFailed("a database that opens", value=backend, remedy="Check [store] url and the server.") from error

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Yields a connection that holds the write lock; commits at the end, rolls back on any exception.

        Raises:
            StorageFull: when the disk is full. Nothing of the transaction is kept.
        """
        try:
            with self.engine.begin() as connection:
                if not self._is_sqlite:
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _ADVISORY_LOCK})
                yield connection
        except DBAPIError as error:
            if "disk is full" in str(error.orig) or "No space left" in str(error.orig):
                raise storage_full() from None
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise storage_full() from None
            raise

    def scrub(self) -> None:
        """Flushes what was deleted out of SQLite's write-ahead log, so that the files no longer hold it."""
        if self._is_sqlite:
            with self.engine.connect() as connection:
                connection.exec_driver_sql("COMMIT")
                connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")

    def compact(self) -> None:
        """Rewrites SQLite's file without its free pages and empties the write-ahead log: what was deleted is in no byte of either.

        Raises:
            OperationFailed: when another process keeps reading, so that the write-ahead log could not be emptied. Nothing is lost; call it again.
        """
        if self._is_sqlite:
            with self.engine.connect() as connection:
                connection.exec_driver_sql("COMMIT")
                connection.exec_driver_sql("VACUUM")
                patience = time.monotonic() + _PATIENCE_S
                while (busy := connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0]) and time.monotonic() < patience:
                    time.sleep(0.05)
            if busy:
                raise OperationFailed(
                    "nobody else to read the database while it is compacted", remedy="Stop the gateway, then run the command again."
                )

    def close(self) -> None:
        self.engine.dispose()


def storage_full() -> StorageFull:
    """Returns the error for a full disk, the same from every layer that writes."""
    return StorageFull("free space on the disk of the project", remedy="Free some space and run the command again; it resumes where it stopped.")


def now(tx: Connection) -> float:
    """Returns the time in seconds since 1970, and refuses a clock behind the latest time this database has seen (PITFALLS 23).

    Raises:
        ClockBackwards: when the clock is more than five seconds behind the recorded time.
    """
    current = time.time()
    latest = tx.execute(select(_clock.c.latest)).scalar_one_or_none()
    if latest is None:
        tx.execute(insert(_clock).values(id=1, latest=repr(current)))
        return current
    if current < float(latest) - CLOCK_TOLERANCE_S:
        behind = f"a clock {float(latest) - current:.0f} s behind the latest entry"
        raise ClockBackwards("a clock that does not run backwards", value=behind, remedy="Set the system clock, then run the command again.")
    if current > float(latest):
        tx.execute(update(_clock).values(latest=repr(current)))
    return max(current, float(latest))


def _engine(url: str, backend: str) -> Engine:
    if backend == "postgresql":
        return create_engine(url, pool_pre_ping=True, hide_parameters=True)
    database = make_url(url).database
    if database and database != ":memory:":
        Path(database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = create_engine(url, connect_args={"timeout": 30.0}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection, _record) -> None:  # type: ignore[no-untyped-def]  # SQLAlchemy hands over the raw driver connection
        connection.isolation_level = None  # the driver opens no transaction of its own; `begin` below does
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _migrate(tx: Connection) -> None:
    version = tx.execute(select(_schema.c.version)).scalar_one_or_none()
    if version is None:
        tx.execute(insert(_schema).values(version=len(MIGRATIONS)))
        return
    if version > len(MIGRATIONS):
        raise OperationFailed("a database of this version or older", value=f"schema {version}", remedy="Upgrade discreet.")
    for migration in MIGRATIONS[version:]:
        migration(tx)
    tx.execute(update(_schema).values(version=len(MIGRATIONS)))


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file so that it is there whole or not at all.

    Raises:
        StorageFull: when the disk is full; the earlier file is kept.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        if error.errno == errno.ENOSPC:
            raise storage_full() from None
        raise
