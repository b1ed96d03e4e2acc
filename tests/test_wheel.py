"""The wheel is what people install: it holds every file of the package, and works away from the source."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from discreet.evidence.log import Log
from discreet.evidence.statement import Predicate, Statement, digest_of
from discreet.keys import Key, Keyring
from discreet.store import Store

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unpacked wheel, built from a copy of the source."""
    work = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, work)
    shutil.copytree(ROOT / "src", work / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    code = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
    built = subprocess.run([sys.executable, "-c", code, str(work)], cwd=work, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    [wheel] = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(work / "site")
    return work / "site"


def test_the_wheel_holds_every_file_of_the_package(installed: Path):
    def files(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts}

    assert files(installed / "discreet") == files(ROOT / "src" / "discreet")


def test_the_installed_package_works_away_from_its_source(installed: Path, tmp_path: Path):
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); import discreet; print(discreet.__file__); from discreet.cli import main; main()"
    asked = [sys.executable, "-c", code, str(installed), "init", str(tmp_path / "ward"), "--json"]
    told = subprocess.run(asked, cwd=tmp_path, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr[-2000:]
    assert told.stdout.startswith(str(installed)), "another copy was imported"
    assert (tmp_path / "ward" / "discreet.toml").is_file()


CORE_ONLY = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "peft", "safetensors", "starlette", "uvicorn", "httpx", "cedarpy", "fsspec", "psycopg", "matplotlib", "flwr"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
sys.path.insert(0, sys.argv.pop(1))
import socket
def connect(*_):
    raise SystemExit("network")
socket.socket.connect = connect
from discreet.cli import main
main()
"""


def test_evidence_verifies_with_the_package_and_the_public_key_alone(installed: Path, tmp_path: Path):
    """No extra, no network, no project: a bundle and a statement with its proof verify, and a changed bundle does not."""
    store = Store(f"sqlite:///{tmp_path}/project.db")
    log = Log(store, Keyring(store, Key(bytes(32))), "example.org/log")
    fields = {"budget": "patients", "epsilon": 8.0, "delta": 1e-6, "unit": "patient"}
    with store.transaction() as tx:
        log.append(tx, Statement(predicate=Predicate.BUDGET_OPENED, subjects=(digest_of(b"budget"),), fields=fields))
    [entry] = log.select(Predicate.BUDGET_OPENED)
    (tmp_path / "away").mkdir()
    certificate = {"statement": entry.envelope.decode(), "proof": bytes(log.prove(0)).decode()}
    (tmp_path / "away" / "certificate.json").write_text(json.dumps(certificate))
    log.rotate()
    bundle = log.export(tmp_path / "away" / "bundle", public=True)
    (tmp_path / "away" / "log.pub").write_text(log.public_key())
    store.close()
    (tmp_path / "project.db").unlink()

    def verify(what: str) -> dict:
        asked = [sys.executable, "-c", CORE_ONLY, str(installed), "evidence", "verify", what, "--key", "log.pub", "--json"]
        told = subprocess.run(asked, cwd=tmp_path / "away", capture_output=True, text=True)
        assert told.returncode in (0, 4), told.stderr[-2000:]
        return json.loads(told.stdout)

    assert verify("bundle")["valid"]
    assert verify("certificate.json")["valid"]
    (bundle / "leaves").write_bytes(bytes(64))
    assert not verify("bundle")["valid"]
