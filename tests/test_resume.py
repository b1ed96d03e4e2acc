"""Killed at any moment, continued by the next call: nothing is lost, nothing is spent twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from discreet import model, pipeline
from discreet.evidence.statement import Predicate

COMMAND = [sys.executable, "-c", "from discreet.cli import main; main()", "run", "-C"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}


def _start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, str(folder)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=ENVIRONMENT)


def _kill_at(folder: Path, marker: str) -> None:
    """Runs until a line of stderr holds `marker`, then kills without warning."""
    process = _start(folder)
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if marker in line:
            break
    else:
        pytest.fail(f"no line with {marker!r} in: {''.join(seen)[-2000:]}")
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()


def _finish(folder: Path) -> str:
    process = _start(folder)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    return errors


def _check_whole(folder: Path) -> None:
    """One of everything, in a log that verifies, and a release that opens."""
    with pipeline.open_house(folder) as house:
        house.log.verify()
        for once in (Predicate.COMMITTED, Predicate.BUDGET_OPENED, Predicate.RESERVED, Predicate.SPENT, Predicate.CLOSED):
            assert len(house.log.select(once)) == 1, once
        for once in (Predicate.TRAINED, Predicate.KEY_DESTROYED, Predicate.AUDITED, Predicate.RELEASED):
            assert len(house.log.select(once)) == 1, once
        [budget] = house.ledger.budgets()
        assert budget.num_reservations == 1
        released = pipeline.load_release(house.releases / pipeline.released_name(house), public_key=house.log.public_key())
        assert model.adapter_digest(released.path / "adapter") == released.adapter
        assert not list((house.project.state / "runs").rglob("*.partial"))


def test_killed_while_training_and_while_auditing(tmp_path: Path, new_project: Callable[[Path], Path]):
    folder = new_project(tmp_path / "hospital")
    _kill_at(folder, "train 2/4")
    with pipeline.open_house(folder) as house:
        assert len(house.log.select(Predicate.SPENT)) == 1, "the whole run was spent before its first step"
        assert not house.log.select(Predicate.TRAINED)
    _kill_at(folder, "control")
    said = _finish(folder)
    assert "train 1/4" not in said, "finished steps are not repeated"
    _check_whole(folder)


@pytest.mark.slow
def test_killed_at_five_random_moments(tmp_path: Path, new_project: Callable[[Path], Path]):
    began = time.monotonic()
    _finish(new_project(tmp_path / "other"))
    whole_s = time.monotonic() - began
    folder = new_project(tmp_path / "hospital")
    moments_s = [random.uniform(1.0, 0.6 * whole_s) for _ in range(5)]
    ended = []
    for moment_s in moments_s:
        process = _start(folder)
        time.sleep(moment_s)
        process.send_signal(signal.SIGKILL)
        ended.append(process.wait())
        process.communicate()
    assert -signal.SIGKILL in ended, f"no kill hit a running command: {moments_s}"
    _finish(folder)
    _check_whole(folder)


FULL_DISK = """
set -eu
mount -t tmpfs -o size=64m tmpfs "$2"
cp -r "$1/." "$2"
for spare in 0 40 200 600; do
    mount -o remount,size="$(( $(du -sk "$2" | cut -f1) + spare ))k" "$2"
    code=0
    "$3" -c 'from discreet.cli import main; main()' run $4 -C "$2" --json > "$5" 2> /dev/null || code=$?
    grep -q '"storage.full"' "$5" || { echo "spare $spare: exit $code"; head -c 400 "$5"; exit 9; }
    test "$code" = 1
done
mount -o remount,size=256m "$2"
"$3" -c 'from discreet.cli import main; main()' run $4 -C "$2" --json
cp -r "$2/." "$1"
"""


def _tell_on_a_full_disk(project: Path, scratch: Path, stage: str) -> None:
    """Fills the disk at four places, each time with the documented error, then makes room and finishes; the project comes back into its folder."""
    disk = scratch / "disk"
    disk.mkdir()
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c", FULL_DISK, "sh"]
    probe = subprocess.run([*unshare[:3], "mount", "-t", "tmpfs", "tmpfs", str(disk)], capture_output=True)
    if probe.returncode:
        pytest.skip("a full disk is a small tmpfs in a user namespace, and this system gives none")
    told = subprocess.run(
        [*unshare, str(project), str(disk), sys.executable, stage, str(scratch / "said.json")], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert told.returncode == 0, told.stdout + told.stderr[-2000:]


def test_a_full_disk_stops_the_ingest_with_its_error_and_loses_nothing(tmp_path: Path, new_project: Callable[[Path], Path]):
    folder = new_project(tmp_path / "hospital")
    _tell_on_a_full_disk(folder, tmp_path, "ingest")
    with pipeline.open_house(folder) as house:
        house.log.verify()
        assert len(house.log.select(Predicate.COMMITTED)) == 1
        assert {entry.fields["name"] for entry in house.log.select(Predicate.FROZEN)} == {"train", "public", "evaluation"}
        assert len(house.log.select(Predicate.FROZEN)) == 3


@pytest.mark.slow
def test_a_full_disk_anywhere_in_the_pipeline_spends_once(tmp_path: Path, new_project: Callable[[Path], Path]):
    folder = new_project(tmp_path / "hospital")
    _tell_on_a_full_disk(folder, tmp_path, "")

    _check_whole(folder)
