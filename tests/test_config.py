"""discreet.toml: unknown keys, broken values, and what may not be configured."""

from __future__ import annotations

from pathlib import Path

import pytest

from discreet.config import load
from discreet.errors import ConfigInvalid, SourceMissing, UnknownKey

MINIMAL = """
[project]
name = "ward"
controller = "General Hospital"
purpose = "note-assistant"

[[source]]
name = "notes"
path = "notes.jsonl"
unit = "patient"
owner = "records office"
purposes = ["note-assistant"]
basis = "consent"
"""


def _load(folder: Path, text: str):
    (folder / "discreet.toml").write_text(text)
    return load(folder)


def test_defaults(tmp_path: Path):
    project = _load(tmp_path, MINIMAL)
    assert project.source[0].sensitivity == "special", "unlabelled text is treated as the most sensitive"
    assert project.privacy.epsilon == 8.0
    assert project.database_url() == f"sqlite:///{tmp_path}/.discreet/discreet.db"
    assert project.master_location() == f"file:{tmp_path}/.discreet/master.key"


def test_privacy_is_hashed_and_run_is_not(tmp_path: Path):
    base = _load(tmp_path, MINIMAL).privacy_digest()
    assert _load(tmp_path, MINIMAL + "[run]\nthreads = 7\ntoken_budget = 64\n").privacy_digest() == base
    assert _load(tmp_path, MINIMAL + "[privacy]\nepsilon = 7.0\n").privacy_digest() != base


@pytest.mark.parametrize(
    ("extra", "where", "suggestion"),
    [
        ("[privacy]\nepsilom = 3\n", "privacy.epsilom", "epsilon"),
        ("[privcy]\nepsilon = 3\n", "privcy", "privacy"),
        ("[run]\nthread = 3\n", "run.thread", "threads"),
        ("[[source]]\nnam = 'x'\n", "source.1.nam", "name"),
    ],
)
def test_unknown_key_is_named_with_the_nearest(tmp_path: Path, extra: str, where: str, suggestion: str):
    with pytest.raises(UnknownKey) as caught:
        _load(tmp_path, MINIMAL + extra)
    assert caught.value.value == where
    assert suggestion in caught.value.remedy
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    "extra",
    [
        "[privacy]\nepsilon = 0\n",
        "[privacy]\nepsilon = -1\n",
        "[privacy]\nepsilon = nan\n",
        "[privacy]\nepsilon = inf\n",
        "[privacy]\ndelta = 1\n",
        "[privacy]\nsteps = 1.5\n",
        "[privacy]\nsteps = 0\n",
        "[privacy]\nclip_norm = 0\n",
        "[audit]\ncanaries = 3\n",
        "[release]\nverdicts = ['FAIL']\n",
    ],
)
def test_values_outside_their_rule_are_refused(tmp_path: Path, extra: str):
    with pytest.raises(ConfigInvalid):
        _load(tmp_path, MINIMAL + extra)


@pytest.mark.parametrize(
    "section",
    [
        MINIMAL.replace('basis = "consent"', 'basis = "consent"\nrole = "public"'),
        MINIMAL.replace('basis = "consent"', 'basis = "consent"\nrole = "evaluation"\nsensitivity = "internal"'),
        MINIMAL.replace('basis = "consent"', 'basis = "consent"\nrole = "canary"'),
        MINIMAL.replace('unit = "patient"\n', ""),
        MINIMAL + MINIMAL[MINIMAL.index("[[source]]") :],
    ],
    ids=["sensitive on the public track", "internal held-out text", "people as canaries", "no unit", "one name twice"],
)
def test_sources_that_break_a_promise_are_refused(tmp_path: Path, section: str):
    with pytest.raises(ConfigInvalid):
        _load(tmp_path, section)


def test_no_file_no_toml_and_no_utf8(tmp_path: Path):
    with pytest.raises(SourceMissing, match="discreet init"):
        load(tmp_path)
    with pytest.raises(ConfigInvalid):
        _load(tmp_path, "[project\n")
    (tmp_path / "discreet.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigInvalid):
        load(tmp_path)
