"""The store: serialised writers, a clock that only moves forward, errors that lose nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url, text

from discreet import store as store_module
from discreet.errors import ClockBackwards, ConfigInvalid, OperationFailed, StorageFull
from discreet.store import Store, now


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
    with psycopg.connect(make_url(postgres).set(drivername="postgresql").render_as_string(hide_password=False), autocommit=True) as watch:
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
