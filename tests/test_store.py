"""The store: serialised writers, a clock that only moves forward, errors that lose nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import Column, Integer, LargeBinary, MetaData, Table, insert, make_url, select, text
from sqlalchemy.exc import DBAPIError

from discreet import store as store_module
from discreet.errors import ClockBackwards, ConfigInvalid, OperationFailed, StorageFull
from discreet.store import Store, fetch, later, now


def test_read_then_write_is_never_a_race(tmp_path: Path):
    store = Store(f"sqlite:///{tmp_path}/a.db")
    with store.transaction() as tx:
        tx.execute(text("CREATE TABLE counter (n INTEGER)"))
        tx.execute(text("INSERT INTO counter VALUES (0)"))
    barrier = threading.Barrier(8)

    def increment() -> None:
        barrier.wait()
        for _ in range(5):
            with store.transaction() as tx:
                n = tx.execute(text("SELECT n FROM counter")).scalar_one()
                tx.execute(text("UPDATE counter SET n = :n"), {"n": n + 1})

    threads = [threading.Thread(target=increment) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.transaction() as tx:
        assert tx.execute(text("SELECT n FROM counter")).scalar_one() == 40
    store.close()


def test_an_exception_keeps_nothing(tmp_path: Path):
    store = Store(f"sqlite:///{tmp_path}/a.db")
    with pytest.raises(RuntimeError), store.transaction() as tx:
        tx.execute(text("CREATE TABLE t (n INTEGER)"))
        raise RuntimeError
    with store.transaction() as tx:
        assert tx.execute(text("SELECT count(*) FROM sqlite_master WHERE name = 't'")).scalar_one() == 0
    store.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"sqlite:///{tmp_path}/a.db" if request.param == "sqlite" else request.getfixturevalue("postgres"))
    with opened.transaction() as tx:
        later_table.create(tx)
        other_table.create(tx)
    yield opened
    opened.close()


later_table = Table("later_rows", MetaData(), Column("n", Integer, primary_key=True), Column("b", LargeBinary))
other_table = Table("other_rows", MetaData(), Column("n", Integer, primary_key=True))
PUT, PUT_OTHER, ALL = insert(later_table), insert(other_table), select(later_table.c.n, later_table.c.b).order_by(later_table.c.n)


def test_what_is_left_for_later_is_there_for_whoever_reads_and_after_the_commit(store: Store):
    with store.transaction() as tx:
        later(tx, PUT, [{"n": 1, "b": b"x"}])
        later(tx, PUT_OTHER, [{"n": 7}])
        assert fetch(tx, ALL) == [(1, b"x")]
        later(tx, PUT, [{"n": 2, "b": b"y"}, {"n": 3, "b": None}])
        assert [row.n for row in tx.execute(ALL)] == [1, 2, 3]
        later(tx, PUT, [{"n": 4, "b": b"z"}])
        tx.execute(text("UPDATE later_rows SET n = n + 10"))
        later(tx, PUT, [])
        later(tx, PUT, [{"n": 5, "b": b"z"}])
    with store.transaction() as tx:
        assert [n for n, _ in fetch(tx, ALL)] == [5, 11, 12, 13, 14]
        assert tx.execute(select(other_table.c.n)).scalars().all() == [7]


@pytest.mark.parametrize("fault", [RuntimeError, DBAPIError])
def test_what_was_left_for_later_goes_with_its_transaction(store: Store, fault: type[Exception]):
    """Neither the rows nor the wish to write them outlive a failed transaction, and the error tells no value."""
    with store.transaction() as tx:
        later(tx, PUT, [{"n": 1, "b": b"x"}])
    with pytest.raises(fault) as caught, store.transaction() as tx:
        later(tx, PUT, [{"n": 2, "b": b"x"}, {"n": 1, "b": b"the secret"}])
        if fault is RuntimeError:
            raise RuntimeError
    assert "secret" not in str(caught.value)
    store.scrub()
    with store.transaction() as tx:
        assert [n for n, _ in fetch(tx, ALL)] == [1]


def test_a_connection_that_the_server_closed_is_opened_anew(postgres: str):
    """As many as the pool holds, as after a restart of the server: no transaction fails."""
    store = Store(postgres)
    with ExitStack() as held:
        pooled = [held.enter_context(store.engine.connect()) for _ in range(4)]
        backends = [each.execute(text("SELECT pg_backend_pid()")).scalar_one() for each in pooled]
    assert len(set(backends)) == 4
    with plainly(postgres) as other:
        for backend in backends:
            other.execute("SELECT pg_terminate_backend(%s, 5000)", [backend])
    for _ in backends:
        with store.transaction() as tx:
            assert now(tx) > 0
    store.close()


def plainly(url: str) -> psycopg.Connection:
    return psycopg.connect(make_url(url).set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True)


def test_a_transaction_reads_what_the_one_before_it_wrote_whatever_the_servers_isolation(postgres: str):
    with plainly(postgres) as other:
        other.execute(f"ALTER DATABASE {make_url(postgres).database} SET default_transaction_isolation = 'repeatable read'")
    store = Store(postgres)
    with store.transaction() as tx:
        later_table.create(tx)
    seen: list[int] = []

    def read() -> None:
        with store.transaction() as tx:
            seen.extend(n for n, _ in fetch(tx, ALL))

    with store.transaction() as tx, plainly(postgres) as watch:
        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(1000):
            if watch.execute("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted").fetchone():
                break
            time.sleep(0.005)
        else:
            pytest.fail("the reader does not wait for the lock")
        tx.execute(PUT, {"n": 1, "b": None})
    reader.join()
    assert seen == [1]
    store.close()


def test_a_caught_error_does_not_pass_for_a_commit(postgres: str):
    """PostgreSQL answers COMMIT with a rollback when a statement failed before."""
    store = Store(postgres)
    with store.transaction() as tx:
        later_table.create(tx)
    with pytest.raises(OperationFailed, match="without a failed statement"), store.transaction() as tx:
        tx.execute(PUT, {"n": 1, "b": None})
        with suppress(DBAPIError):
            tx.execute(PUT, {"n": 1, "b": None})
    with store.transaction() as tx:
        assert fetch(tx, ALL) == []
    store.close()


def test_full_disk_is_said_and_loses_nothing(tmp_path: Path):
    store = Store(f"sqlite:///{tmp_path}/a.db")
    with store.transaction() as tx:
        tx.execute(text("CREATE TABLE t (b BLOB)"))
        tx.execute(text("INSERT INTO t VALUES (zeroblob(10))"))
    with pytest.raises(StorageFull, match="Free some space"), store.transaction() as tx:
        pages = tx.execute(text("PRAGMA page_count")).scalar_one()
        tx.execute(text(f"PRAGMA max_page_count = {pages + 2}"))
        tx.execute(text("INSERT INTO t VALUES (zeroblob(1000000))"))
    with store.transaction() as tx:
        tx.execute(text("PRAGMA max_page_count = 1000000"))
        assert tx.execute(text("SELECT count(*) FROM t")).scalar_one() == 1
    store.close()


def test_clock_that_ran_backwards_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(f"sqlite:///{tmp_path}/a.db")
    monkeypatch.setattr(store_module.time, "time", lambda: 1000.0)
    with store.transaction() as tx:
        assert now(tx) == 1000.0
    monkeypatch.setattr(store_module.time, "time", lambda: 998.0)
    with store.transaction() as tx:
        assert now(tx) == 1000.0, "a small step back is smoothed"
    monkeypatch.setattr(store_module.time, "time", lambda: 900.0)
    with pytest.raises(ClockBackwards, match="100 s behind"), store.transaction() as tx:
        now(tx)
    store.close()


def test_other_databases_and_newer_schemas_are_refused(tmp_path: Path):
    with pytest.raises(ConfigInvalid, match="mysql"):
        Store("mysql://localhost/x")
    store = Store(f"sqlite:///{tmp_path}/a.db")
    with store.transaction() as tx:
        tx.execute(text("UPDATE discreet_schema SET version = 999"))
    store.close()
    with pytest.raises(OperationFailed, match="schema 999"):
        Store(f"sqlite:///{tmp_path}/a.db")


def test_migrations_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    Store(f"sqlite:///{tmp_path}/a.db").close()
    monkeypatch.setattr(store_module, "MIGRATIONS", [lambda tx: tx.execute(text("CREATE TABLE added (n INTEGER)"))])
    for _ in range(2):
        store = Store(f"sqlite:///{tmp_path}/a.db")
        with store.transaction() as tx:
            assert tx.execute(text("SELECT version FROM discreet_schema")).scalar_one() == 1
            tx.execute(text("SELECT n FROM added"))
        store.close()


def test_what_postgresql_committed_is_on_the_disk_when_the_call_returns(postgres: str):
    """Its writer of the log, which would bring it there a little later, is put to sleep first."""
    store = Store(postgres)
    with plainly(postgres) as watch:
        watch.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
        watch.execute("SELECT pg_reload_conf()")
        try:
            with store.transaction() as tx:
                tx.execute(text("CREATE TABLE counter (n INTEGER)"))
            for n in range(20):
                with store.transaction() as tx:
                    tx.execute(text("INSERT INTO counter VALUES (:n)"), {"n": n})
                    written = tx.execute(text("SELECT pg_current_wal_insert_lsn()")).scalar_one()
                assert watch.execute("SELECT pg_current_wal_flush_lsn() > %s", [written]).fetchone() == (True,), n
        finally:
            watch.execute("ALTER SYSTEM RESET wal_writer_delay")
            watch.execute("SELECT pg_reload_conf()")
    store.close()
