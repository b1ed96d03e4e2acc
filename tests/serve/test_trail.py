"""The trail: what is counted while it is written is in exactly one statement, and the writer outlives every error."""

from __future__ import annotations

import asyncio
import threading

import pytest

from discreet.errors import OperationFailed
from discreet.evidence.log import verify_bundle
from discreet.evidence.statement import digest_of
from discreet.serve import trail
from discreet.serve.trail import Group, Trail

GROUP = Group(tenant="t", policy=digest_of(b"p"), model="m", server=digest_of(b"s"), released=False)


def count(kept: Trail, label: str = "SSN") -> bool:
    return kept.count(GROUP, route="/v1/chat/completions", status=200, counts={label: 1}, stopped={}, seconds=0.1)


def test_every_request_is_in_one_statement_whatever_is_written_meanwhile(tmp_path, monkeypatch):
    with trail.opened(tmp_path / "trail") as kept:
        real, tries = kept._log.append_all, []

        def append(tx, statements):
            tries.append(1)
            count(kept, f"L{len(tries)}")  # while the transaction runs: this must neither wait for it nor be lost
            if len(tries) % 3 == 0:
                raise OSError
            return real(tx, statements)

        monkeypatch.setattr(kept._log, "append_all", append)

        def counting() -> None:
            for _ in range(400):
                count(kept)

        threads = [threading.Thread(target=counting) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(12):
            if len(tries) % 3 == 2:
                with pytest.raises(OperationFailed):
                    kept.write()
            else:
                kept.write()
        for thread in threads:
            thread.join(20)
        monkeypatch.undo()
    bundle, key = trail.export(tmp_path / "trail", tmp_path / "bundle", public=False)
    entries = verify_bundle(bundle, public_key=key.read_text()).entries
    assert sum(entry.fields["requests"] for entry in entries) == 1200 + 12
    assert sum(entry.fields["counts"].get("SSN", 0) for entry in entries) == 1200


def test_a_request_is_signed_whole_or_not_yet(tmp_path):
    with trail.opened(tmp_path / "trail") as kept:
        writer = threading.Thread(target=kept.write)

        class Late(dict):
            def items(self):
                writer.start()  # a roll-up in the middle of a count
                writer.join(0.3)
                return super().items()

        count(kept)
        kept.count(GROUP, route="/v1/chat/completions", status=200, counts=Late(SSN=1), stopped={}, seconds=0.1)
        writer.join(20)
    bundle, key = trail.export(tmp_path / "trail", tmp_path / "bundle", public=False)
    [entry] = verify_bundle(bundle, public_key=key.read_text()).entries
    assert (entry.fields["requests"], entry.fields["counts"]) == (2, {"SSN": 2})


def test_the_writer_outlives_any_error(monkeypatch):
    tries: list[int] = []

    async def run() -> None:
        kept = Trail(None, None)
        monkeypatch.setattr(trail, "EVERY_S", 0.01)
        monkeypatch.setattr(Trail, "write", lambda _self: tries.append(1) or 1 / 0)
        writing = asyncio.create_task(kept.keep_writing())
        while len(tries) < 3 and not writing.done():
            await asyncio.sleep(0.01)
        writing.cancel()

    asyncio.run(asyncio.wait_for(run(), 10))
    assert len(tries) >= 3
