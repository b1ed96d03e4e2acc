"""One database: SQLite embedded, or PostgreSQL by URL, behind SQLAlchemy Core.

Tables are declared beside the code that needs them, on the shared `metadata`. Writers are serialised: a transaction takes the write lock before its first
read (`BEGIN IMMEDIATE` in SQLite, a transaction-scoped advisory lock in PostgreSQL), so a read followed by a write is never a race (PITFALLS 18).
What is written with `later` waits until somebody reads or the transaction ends, and then goes to PostgreSQL in one round trip, together with the commit: a lock that is held for fewer
round trips is a lock that more writers get.
The lock is given back before the disk has the transaction, and `transaction()` returns after it has: writers who wait for the disk at the same time wait once
(group commit). Whoever reads a transaction that a power failure then takes back loses their own too, since it lies behind it in the same write-ahead log.
Deleted rows are overwritten (`secure_delete`), and `scrub()` empties SQLite's write-ahead log, so that a destroyed key is gone from the files.

Errors of the database never carry the values of a statement (`hide_parameters`): they would end in a log.

Does not cover: PostgreSQL's own write-ahead log and dead tuples, which are the operator's to vacuum and rotate.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing as closing_
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import (
    ClauseElement,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    bindparam,
    create_engine,
    event,
    insert,
    select,
    update,
)
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
_LOCK_PATIENCE_S = 30.0
_NOW, _CLOCK, _WROTE, _PENDING = "discreet_now", "discreet_clock", "discreet_wrote", "discreet_pending"
"""What a connection remembers of its transaction: its time, the latest time of the database, whether it wrote, and what it has yet to write."""

_BEGIN = f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL synchronous_commit = off; SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})"
"""The isolation does not depend on the server's default: any other takes its snapshot before it waits for the lock, and reads what was there before the writer it waited for."""
_LATEST = "SELECT latest FROM discreet_clock"
_WAIT_FOR_DISK = "SELECT pg_logical_emit_message(true, 'discreet', '')"

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
        self._wal = f"{make_url(url).database}-wal" if self._is_sqlite else ""
        self._has_clock = False
        try:
            with self.transaction() as tx:
                metadata.create_all(tx)
                _migrate(tx)
        except OperationalError as error:
            raise OperationFailed("a database that opens", value=backend, remedy="Check [store] url and the server.") from error
        self._has_clock = True

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Yields a connection that holds the write lock; commits at the end, rolls back on any exception. What it wrote is on the disk when this returns.

        Raises:
            StorageFull: when the disk is full. Nothing of the transaction is kept.
            OperationFailed: when an error of a statement was caught inside the transaction, in PostgreSQL, which then keeps nothing of it.
        """
        try:
            with self._locked() as connection:
                if self._is_sqlite:
                    before = connection.connection.dbapi_connection.total_changes  # type: ignore[union-attr]  # SQLAlchemy types the driver's connection loosely
                    with connection.begin():
                        yield connection
                        _write_pending(connection)
                        wrote = connection.connection.dbapi_connection.total_changes != before  # type: ignore[union-attr]  # as above
                    if wrote:
                        self._sync_wal()
                else:
                    with connection.begin():
                        yield connection
                        if connection.connection.dbapi_connection.info.transaction_status.name == "INERROR":  # type: ignore[union-attr]  # as above
                            raise OperationFailed("a transaction without a failed statement", remedy="Nothing of it was kept; run the command again.")
                        if connection.info[_WROTE] or connection.info[_PENDING]:
                            _write_pending(connection, "COMMIT", _WAIT_FOR_DISK)
        except DBAPIError as error:
            if "disk is full" in str(error.orig) or "No space left" in str(error.orig):
                raise storage_full() from None
            raise
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise storage_full() from None
            raise

    @contextmanager
    def _locked(self) -> Iterator[Connection]:
        """A connection whose transaction, in PostgreSQL, has begun and has the lock; where its server has closed it since it was used last, all are opened anew."""
        connection = self.engine.connect()
        try:
            if not self._is_sqlite:
                try:
                    self._begin(connection)
                except DBAPIError as error:
                    if not error.connection_invalidated:
                        raise
                    connection.close()
                    self.engine.dispose()  # a server that was restarted has closed the others of the pool too; those in use are not touched
                    connection = self.engine.connect()
                    self._begin(connection)
            connection.info.pop(_NOW, None)
            connection.info[_PENDING] = []
            yield connection
        finally:
            if not connection.invalidated:  # the pool gives it to somebody else
                connection.info.pop(_PENDING, None)
            connection.close()

    def _begin(self, connection: Connection) -> None:
        """Begins, waits for the lock and reads the clock, in one round trip."""
        with _driver_errors(connection):
            driver: Any = connection.connection.dbapi_connection
            cursor = driver.execute(f"{_BEGIN}; {_LATEST}" if self._has_clock else _BEGIN)
            while cursor.nextset():
                pass
            latest = cursor.fetchone() if self._has_clock else None
            cursor.close()
        connection.info[_CLOCK] = latest[0] if latest else None
        connection.info[_WROTE] = False

    def _sync_wal(self) -> None:
        """Synchronises SQLite's file of the write-ahead log; opening it drops none of SQLite's locks, which lie on other files."""
        with suppress(FileNotFoundError):  # a database in memory
            descriptor = os.open(self._wal, os.O_RDONLY)
            try:
                os.fdatasync(descriptor) if hasattr(os, "fdatasync") else os.fsync(descriptor)
            finally:
                os.close(descriptor)

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
    """Returns the time of a transaction in seconds since 1970, the same throughout, and refuses a clock behind the latest time this database has seen (PITFALLS 23).

    Raises:
        ClockBackwards: when the clock is more than five seconds behind the recorded time.
    """
    if _NOW in tx.info:
        return float(tx.info[_NOW])
    current = time.time()
    latest = tx.info.get(_CLOCK) or next((row[0] for row in fetch(tx, _GET_CLOCK)), None)
    if latest is None:
        later(tx, _FIRST_CLOCK, [{"id": 1, "latest": repr(current)}])
        tx.info[_NOW] = current
        return current
    if current < float(latest) - CLOCK_TOLERANCE_S:
        behind = f"a clock {float(latest) - current:.0f} s behind the latest entry"
        raise ClockBackwards("a clock that does not run backwards", value=behind, remedy="Set the system clock, then run the command again.")
    if current > float(latest):
        later(tx, _SET_CLOCK, [{"current": repr(current)}])
    tx.info[_NOW] = max(current, float(latest))
    return max(current, float(latest))


def later(tx: Connection, statement: ClauseElement, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows with the commit, or before a query that names their table or any other statement of this transaction.

    Args:
        tx: from `Store.transaction`.
        statement: an INSERT or UPDATE that returns nothing, made once for the life of the process.
        rows: the value of every parameter by name, the same names in each.
    """
    if rows:
        tx.info[_PENDING].append((statement, rows))


_GET_CLOCK = select(_clock.c.latest)
_SET_CLOCK = update(_clock).values(latest=bindparam("current"))
_FIRST_CLOCK = insert(_clock)


def fetch(tx: Connection, statement: ClauseElement, **values: Any) -> list[tuple[Any, ...]]:
    """Returns the rows of a query as the driver gives them, for queries that every reservation makes: SQLAlchemy's own way costs twice as much.

    Args:
        tx: from `Store.transaction`.
        statement: a SELECT of numbers, text and bytes, made once for the life of the process.
        values: of its parameters, by name.
    """
    sql, names = _compiled(tx.engine, statement, tuple(values))
    _before_read(tx, sql)
    driver: Any = tx.connection.dbapi_connection
    with _driver_errors(tx), closing_(driver.cursor()) as cursor:
        cursor.execute(sql, [values[name] for name in names] if names else values)
        return list(cursor.fetchall())


def _before_read(connection: Connection, sql: str) -> None:
    """Writes what was left for later, when a query names a table of it."""
    pending = connection.info.get(_PENDING)
    if pending and any(_target(connection.engine, each) in sql for each, _ in pending):
        _write_pending(connection)


def _write_pending(connection: Connection, *closing: str) -> None:
    """Executes what was left for later, in order, then the closing statements; PostgreSQL gets all of it at once.

    The last closing statement waits for the disk: it commits itself after the lock was given back. A transaction that has written to the log and commits synchronously takes everything before
    it along. A number alone would not do: one that has written nothing before its commit is not waited for (xact.c, RecordTransactionCommit).
    """
    pending: list[tuple[ClauseElement, Sequence[Mapping[str, Any]]]] = connection.info[_PENDING]
    connection.info[_PENDING] = []
    connection.info[_WROTE] = True
    driver: Any = connection.connection.dbapi_connection
    with _driver_errors(connection), driver.pipeline() if hasattr(driver, "pipeline") else nullcontext(), closing_(driver.cursor()) as cursor:
        for statement, rows in pending:
            sql, names = _compiled(connection.engine, statement, tuple(rows[0]))
            placed = [[row[name] for name in names] for row in rows] if names else rows
            if len(rows) == 1:
                cursor.execute(sql, placed[0])
            else:
                cursor.executemany(sql, placed)
        for sql in closing:
            cursor.execute(sql)


@lru_cache(maxsize=256)
def _compiled(engine: Engine, statement: ClauseElement, columns: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The SQL of a statement for a database, and the order of its parameters where the driver takes them by place."""
    compiled: Any = statement.compile(dialect=engine.dialect, column_keys=columns)
    return str(compiled), tuple(compiled.positiontup or ())


@lru_cache(maxsize=256)
def _target(engine: Engine, statement: ClauseElement) -> str:
    """The table that an INSERT or UPDATE writes."""
    return str(statement.compile(dialect=engine.dialect)).removeprefix("INSERT INTO ").removeprefix("UPDATE ").partition(" ")[0]


@contextmanager
def _driver_errors(connection: Connection) -> Iterator[None]:
    """Errors of the driver as SQLAlchemy raises them, without the values of a statement."""
    base: Any = connection.dialect.loaded_dbapi.Error
    try:
        yield
    except base as error:
        gone = connection.dialect.is_disconnect(error, connection.connection.driver_connection, None)
        if gone:
            connection.invalidate(error)
        raise DBAPIError.instance(None, None, error, base, hide_parameters=True, connection_invalidated=gone) from None


def _engine(url: str, backend: str) -> Engine:
    if backend == "postgresql":
        server = create_engine(url, isolation_level="AUTOCOMMIT", hide_parameters=True)  # `Store` begins its transactions itself
        _listen(server)
        return server
    database = make_url(url).database
    if database and database != ":memory:":
        Path(database).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    engine = create_engine(url, connect_args={"timeout": _LOCK_PATIENCE_S}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection, _record) -> None:  # type: ignore[no-untyped-def]  # SQLAlchemy hands over the raw driver connection
        connection.isolation_level = None  # the driver opens no transaction of its own; `begin` below does
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "foreign_keys=ON", "secure_delete=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        _begin_immediate(connection)

    _listen(engine)
    return engine


def _listen(engine: Engine) -> None:
    """Before a statement that could tell, what was left for later is written; whether it may write is noted."""

    @event.listens_for(engine, "before_cursor_execute")
    def _before(connection, _cursor, statement, _parameters, _context, _many) -> None:  # type: ignore[no-untyped-def]  # SQLAlchemy's hook
        if statement.startswith("SELECT"):
            _before_read(connection, statement)
            return
        if connection.info.get(_PENDING):
            _write_pending(connection)
        connection.info[_WROTE] = True


def _begin_immediate(connection: Connection) -> None:
    """Waits for the write lock in short sleeps: SQLite's own grow to a tenth of a second, in which the lock is free."""
    driver = connection.connection.dbapi_connection
    patience, pause = time.monotonic() + _LOCK_PATIENCE_S, 0.0002
    driver.execute("PRAGMA busy_timeout=0")  # type: ignore[union-attr]  # the driver's connection, typed loosely
    try:
        while True:
            try:
                driver.execute("BEGIN IMMEDIATE")  # type: ignore[union-attr]  # typed loosely, as above
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > patience:
                    break
            time.sleep(pause)
            pause = min(pause * 1.3, 0.002)
        connection.exec_driver_sql("BEGIN IMMEDIATE")  # fails again, as an error of SQLAlchemy's that carries no values
    finally:
        driver.execute(f"PRAGMA busy_timeout={int(_LOCK_PATIENCE_S * 1000)}")  # type: ignore[union-attr]  # typed loosely, as above


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
    partial = partial_of(path)
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


def partial_of(path: Path) -> Path:
    """Returns where a file lies while it is written beside its place, and where a kill leaves it."""
    return path.with_name(path.name + ".partial")


def sync_folder(folder: Path) -> None:
    """Makes what was renamed into a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
