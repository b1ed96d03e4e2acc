"""Flower carries the messages: a ClientApp and a ServerApp over its Message API, both mere relays between its grid and a process of ours.

    `federate server`: Coordinator ──line── ServerApp ── SuperLink (TLS, node keys) ── SuperNode ── ClientApp ──line── `federate client`: Site.answer(bytes)

A Flower message holds one opaque field of bytes of our own protocol, and nothing else: no metrics, no example counts, none of Flower's SecAgg+ or DP code. Flower starts a
process for each message; here that process imports no model and no torch, it hands the bytes over a local socket to the site, which stays open. A reply that does not come
in time, an error, or a refusal counts as a client that dropped out. Which node is which site is asked once a run and trusted for nothing: every message is signed by the site's
own pinned identity. Another engine needs an `Exchange` (site.py), no more.

A stage ends when everybody has answered; when `enough` have and the others were given as long again (and `GRACE_S`); or at the timeout. A straggler is a client that
dropped out of this round; it is asked again in the next one.

Does not cover: Flower's user accounts and its simulation engine (it needs Ray; `discreet federate simulate` needs nothing).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Client, Connection
from typing import Any

from discreet.errors import OperationFailed, missing_extra

FIELD = "discreet"
HELLO = b"hello"
GRACE_S = 5.0
POLL_S = 0.5
ASK_AGAIN_S = 30.0


def client_app() -> Any:
    """Returns the ClientApp of a site; its node configuration names `line`, the socket of the site's process.

    Raises:
        MissingExtra: when flwr is not installed.
    """
    try:
        from flwr.app import ConfigRecord, Message, RecordDict
        from flwr.clientapp import ClientApp
    except ImportError:
        raise missing_flwr() from None
    app = ClientApp()

    @app.train()
    def answer(message: Any, context: Any) -> Any:
        reply = ask(str(context.node_config["line"]), bytes(message.content[FIELD]["b"]))
        return Message(RecordDict({FIELD: ConfigRecord({"b": reply})}), reply_to=message)

    return app


def server_app() -> Any:
    """Returns the ServerApp of a fleet; its run configuration names `line`, the socket of the coordinator's process, and ends when that closes it.

    Raises:
        MissingExtra: when flwr is not installed.
    """
    try:
        from flwr.serverapp import ServerApp
    except ImportError:
        raise missing_flwr() from None
    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        with Client(str(context.run_config["line"]), family="AF_UNIX") as line:
            relay(line, Carrier(grid))

    return app


def missing_flwr() -> Exception:
    """The error of every entry that needs Flower."""
    return missing_extra("federated", "flwr==1.41.0 (with --no-deps)")


def ask(line: str, request: bytes) -> bytes:
    """Hands one request to the process behind a local socket; nothing comes back when it is gone or refuses."""
    try:
        with Client(line, family="AF_UNIX") as connection:
            connection.send_bytes(request)
            return connection.recv_bytes()
    except (OSError, EOFError):
        return b""


def relay(line: Connection, carrier: Carrier) -> None:
    """Carries batches from a coordinator's process to the grid until the line closes."""
    while True:
        try:
            head, bodies = unpack(line.recv_bytes())
        except EOFError:
            return
        requests = dict(zip(head["names"], bodies, strict=True))
        replies = carrier(requests, enough=head["enough"], timeout=head["timeout"], names=head["sites"])
        line.send_bytes(pack({"names": list(replies), "present": sorted(carrier.present())}, list(replies.values())))


def pack(head: Mapping[str, Any], bodies: Sequence[bytes]) -> bytes:
    """Returns a batch: its head, and the bodies that go with the names in it."""
    said = json.dumps({**head, "sizes": [len(body) for body in bodies]}).encode()
    return b"".join([len(said).to_bytes(4, "big"), said, *bodies])


def unpack(content: bytes) -> tuple[dict[str, Any], list[bytes]]:
    """Returns head and bodies of a batch of `pack`."""
    at = 4 + int.from_bytes(content[:4], "big")
    head = json.loads(content[4:at])
    return head, list(_pieces(content, at, head["sizes"]))


def _pieces(content: bytes, at: int, sizes: Sequence[int]) -> Iterator[bytes]:
    for size in sizes:
        if at + size > len(content):
            raise OperationFailed("a whole batch on the line between coordinator and relay")
        yield content[at : at + size]
        at += size


class Carrier:
    """Batches of requests over Flower's grid. A node that comes back, or comes late, is found again before each batch.

    Args:
        grid: flwr's Grid.
    """

    def __init__(self, grid: Any) -> None:
        self._grid = grid
        self._nodes: dict[str, int] = {}
        self._asked: dict[int, float] = {}

    def present(self) -> set[str]:
        """Returns the sites whose nodes are connected now."""
        online = set(self._grid.get_node_ids())
        return {name for name, node in self._nodes.items() if node in online}

    def __call__(self, requests: Mapping[str, bytes], *, enough: int, timeout: float, names: Sequence[str]) -> dict[str, bytes]:
        """Returns the replies that came in time, by site.

        Args:
            requests: by site; empty to find out who is there.
            enough: replies after which stragglers are given as long again, no longer.
            timeout: seconds in all.
            names: the sites of the roster; a node that says another name is not asked again.
        """
        self._find(names, timeout)
        present = self.present()
        by_node = {self._nodes[name]: body for name, body in requests.items() if name in present}
        replies = self._send(by_node, enough=enough, timeout=timeout)
        return {name: replies[node] for name, node in self._nodes.items() if replies.get(node)}

    def _find(self, names: Sequence[str], timeout: float) -> None:
        """Asks the nodes that are new which site they are; one that does not say so is asked again after a while."""
        now = time.monotonic()
        strangers = [
            node for node in set(self._grid.get_node_ids()) - set(self._nodes.values()) if now - self._asked.get(node, -ASK_AGAIN_S) >= ASK_AGAIN_S
        ]
        self._asked |= dict.fromkeys(strangers, now)
        said = self._send(dict.fromkeys(strangers, HELLO), enough=len(strangers), timeout=min(timeout, ASK_AGAIN_S))
        for node, name in said.items():
            if name.decode("utf-8", "replace") in names:
                self._nodes[name.decode()] = node

    def _send(self, by_node: Mapping[int, bytes], *, enough: int, timeout: float) -> dict[int, bytes]:
        from flwr.app import ConfigRecord, Message, RecordDict

        if not by_node:
            return {}
        messages = [Message(RecordDict({FIELD: ConfigRecord({"b": body})}), node, "train", ttl=timeout + 60.0) for node, body in by_node.items()]
        waiting = {identifier for identifier in self._grid.push_messages(messages) if identifier}
        began, replies = time.monotonic(), {}
        deadline = began + timeout
        while waiting and time.monotonic() < deadline:
            for reply in self._grid.pull_messages(waiting):
                waiting.discard(reply.metadata.reply_to_message_id)
                if not reply.has_error():
                    replies[reply.metadata.src_node_id] = bytes(reply.content[FIELD]["b"])
                    if len(replies) == enough:
                        now = time.monotonic()
                        deadline = min(deadline, now + max(GRACE_S, now - began))
            if waiting:
                time.sleep(POLL_S)
        return replies
