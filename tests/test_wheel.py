"""The wheel is what people install: it holds every file of the package, and works away from the source."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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
