"""What carries the messages: batches come back whole, a stage does not wait for ever, a node that is late or a stranger, and lines that are dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from multiprocessing.connection import Listener, Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from discreet.errors import OperationFailed
from discreet.federated import app


def test_a_batch_comes_back_whole_and_a_cut_one_is_refused() -> None:
    head, bodies = app.unpack(app.pack({"names": ["a", "b", "c"]}, [b"", b"\x00\xff" * 9, b"x"]))
    assert (head["names"], bodies) == (["a", "b", "c"], [b"", b"\x00\xff" * 9, b"x"])
    with pytest.raises(OperationFailed):
        app.unpack(app.pack({}, [b"abc"])[:-1])


def test_a_line_that_is_dead_or_hangs_up_gives_an_empty_reply(tmp_path: Path) -> None:
    assert app.ask(str(tmp_path / "nobody"), b"x") == b""
    with Listener(str(tmp_path / "line"), family="AF_UNIX") as listener:
        thread = threading.Thread(target=lambda: listener.accept().close())
        thread.start()
        assert app.ask(str(tmp_path / "line"), b"x") == b""
        thread.join()


class Grid:
    """A Flower grid whose nodes answer after so many polls; None for never."""

    def __init__(self, nodes: dict[int, tuple[bytes, int | None]]) -> None:
        self.nodes, self.online = nodes, set(nodes)
        self.waiting: dict[str, list[Any]] = {}
        self.sent: list[tuple[int, bytes]] = []

    def get_node_ids(self) -> list[int]:
        return sorted(self.online)

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        made = []
        for message in messages:
            node, body = message.metadata.dst_node_id, bytes(message.content[app.FIELD]["b"])
            self.sent.append((node, body))
            made.append(f"m{len(self.sent)}")
            self.waiting[made[-1]] = [node, self.nodes[node][0] if body == app.HELLO else b"re:" + body, self.nodes[node][1]]
        return made

    def pull_messages(self, wanted: Iterable[str]) -> list[Any]:
        ready = []
        for identifier in wanted:
            held = self.waiting[identifier]
            if held[2] is not None:
                held[2] -= 1
            if held[2] is not None and held[2] <= 0:
                metadata = SimpleNamespace(reply_to_message_id=identifier, src_node_id=held[0])
                ready.append(SimpleNamespace(metadata=metadata, has_error=lambda: False, content={app.FIELD: {"b": held[1]}}))
        return ready


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = pytest.importorskip("flwr.supercore.task_identity", reason="flwr is not installed: pip install --no-deps flwr==1.41.0").TaskIdentity
    for name in ("_run_id", "_node_id", "_task_id"):
        monkeypatch.setattr(identity, name, 1)
    monkeypatch.setattr(app, "POLL_S", 0.01)
    monkeypatch.setattr(app, "GRACE_S", 0.1)


NAMES = ["north", "south", "west"]


def ask(carrier: app.Carrier, *, enough: int, timeout: float = 5.0, names: Iterable[str] = NAMES) -> dict[str, bytes]:
    return carrier({name: name.encode() for name in names}, enough=enough, timeout=timeout, names=NAMES)


@pytest.mark.usefixtures("quick")
def test_each_site_gets_its_own_request_and_a_stranger_none() -> None:
    grid = Grid({1: (b"north", 1), 2: (b"south", 1), 3: (b"west", 2), 4: (b"mallory", 1)})
    carrier = app.Carrier(grid)
    assert ask(carrier, enough=3) == {name: b"re:" + name.encode() for name in NAMES}
    assert carrier.present() == set(NAMES)
    assert [body for node, body in grid.sent if node == 4] == [app.HELLO]


@pytest.mark.usefixtures("quick")
def test_a_straggler_is_not_waited_for_once_enough_have_answered() -> None:
    grid = Grid({1: (b"north", 1), 2: (b"south", 1), 3: (b"west", 1)})
    carrier = app.Carrier(grid)
    ask(carrier, enough=3)
    grid.nodes[3] = (b"west", None)
    began = time.monotonic()
    assert set(ask(carrier, enough=2)) == {"north", "south"}
    assert time.monotonic() - began < 2.0
    began = time.monotonic()
    assert set(ask(carrier, enough=3, timeout=0.3)) == {"north", "south"}
    assert 0.3 <= time.monotonic() - began < 2.0


@pytest.mark.usefixtures("quick")
def test_a_late_joiner_is_found_and_one_that_left_is_not_asked() -> None:
    grid = Grid({1: (b"north", 1), 2: (b"south", 1), 3: (b"west", 1)})
    grid.online = {1, 2}
    carrier = app.Carrier(grid)
    assert set(ask(carrier, enough=2)) == {"north", "south"}
    grid.online = {1, 3}
    assert set(ask(carrier, enough=2)) == {"north", "west"}
    assert carrier.present() == {"north", "west"}
    assert [body for node, body in grid.sent if node == 2] == [app.HELLO, b"south"]


@pytest.mark.usefixtures("quick")
def test_a_relay_carries_batches_until_the_line_closes() -> None:
    here, there = Pipe()
    thread = threading.Thread(target=app.relay, args=(there, app.Carrier(Grid({1: (b"north", 1)}))))
    thread.start()
    here.send_bytes(app.pack({"names": ["north"], "enough": 1, "timeout": 5.0, "sites": NAMES}, [b"x"]))
    head, bodies = app.unpack(here.recv_bytes())
    assert (head["names"], head["present"], bodies) == (["north"], ["north"], [b"re:x"])
    here.close()
    thread.join(5)
    assert not thread.is_alive()
