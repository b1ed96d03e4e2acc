"""What a client has answered, for good: one answer for each stage of a round, written before it leaves.

A client that was killed and asked again gives the same bytes; asked the same stage with *another* message, in this process or after any number of restarts, it refuses.
So it uploads one masked vector, signs one survivor set and reveals one share of each peer in a round, whatever the server sends (PITFALLS 33).

Does not cover: a client restored from an older backup of its database. Sessions are named freshly by the server, so an old backup meets an unknown session.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from sqlalchemy import Column, Integer, LargeBinary, String, Table, insert, select, update

from discreet.errors import MessageReplayed
from discreet.store import Store, metadata

_answers = Table(
    "federation_answers",
    metadata,
    Column("session", String(64), primary_key=True),
    Column("round", Integer, primary_key=True),
    Column("stage", String(16), primary_key=True),
    Column("request", String(64), nullable=False),
    Column("answer", LargeBinary, nullable=False),
)


class Journal:
    """The answers of one client, in its project's database."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def once(self, session: str, number: int, stage: str, request: bytes, answer: Callable[[], bytes]) -> bytes:
        """Returns the answer to a request of one stage: the recorded one if there is one, else a new one, recorded before it is returned.

        Args:
            number: of the round, >= 0.
            answer: computes the answer; not called when it is on record.

        Raises:
            MessageReplayed: when the stage was answered for another request, or its answer has been swept.
        """
        wanted = hashlib.sha256(request).hexdigest()
        found = self._find(session, number, stage, wanted)
        if found is not None:
            return found
        fresh = answer()
        place = {"session": session, "round": number, "stage": stage}
        with self._store.transaction() as tx:
            held = tx.execute(select(_answers).filter_by(**place)).one_or_none()
            if held is None:
                tx.execute(insert(_answers).values(**place, request=wanted, answer=fresh))
                return fresh
        return _same(held, wanted)  # another process was faster: its answer is the answer

    def rounds(self, session: str) -> int:
        """Returns one more than the number of the last round that was answered in a session."""
        with self._store.transaction() as tx:
            numbers = tx.execute(select(_answers.c.round).where(_answers.c.session == session)).scalars().all()
        return max(numbers, default=-1) + 1

    def answer(self, session: str, number: int, stage: str) -> bytes:
        """Returns the recorded answer of a stage; empty when there is none or it was swept."""
        with self._store.transaction() as tx:
            return bytes(tx.execute(select(_answers.c.answer).filter_by(session=session, round=number, stage=stage)).scalar_one_or_none() or b"")

    def count(self, session: str, *stages: str, other_than: int) -> int:
        """Returns in how many rounds of a session every one of these stages was answered, one round left out."""
        with self._store.transaction() as tx:
            found = [set(tx.execute(select(_answers.c.round).filter_by(session=session, stage=stage)).scalars()) for stage in stages]
        return len(set.intersection(*found) - {other_than})

    def sweep(self, session: str, before: int) -> None:
        """Empties the answers of rounds before `before`; that they were given stays on record."""
        with self._store.transaction() as tx:
            tx.execute(update(_answers).where(_answers.c.session == session, _answers.c.round < before).values(answer=b""))

    def _find(self, session: str, number: int, stage: str, wanted: str) -> bytes | None:
        with self._store.transaction() as tx:
            held = tx.execute(select(_answers).filter_by(session=session, round=number, stage=stage)).one_or_none()
        return None if held is None else _same(held, wanted)


def _same(held: object, wanted: str) -> bytes:
    request, answer = getattr(held, "request", ""), getattr(held, "answer", b"")
    if request != wanted or not answer:
        raise MessageReplayed("one message for each stage of a round", value=getattr(held, "stage", ""), remedy="Start a new round.")
    return bytes(answer)
