"""The documentation is complete and true: every key, every error code, every pitfall; figures are recomputed, the loop runs, links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
import typer
from pydantic import BaseModel
from typer.core import TyperGroup

from discreet import cli, errors
from discreet.config import Project

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *ROOT.glob("*.md")])
PITFALLS = 43


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def rows(markdown: str) -> list[list[str]]:
    """Returns the cells of every table row whose first cell is a code span, a number or a word."""
    return [
        [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        for line in markdown.splitlines()
        if line.startswith("| ") and not line.startswith("|--")
    ]


def section_model(name: str) -> type[BaseModel]:
    annotation: Any = Project.model_fields[name].annotation
    return next((member for member in getattr(annotation, "__args__", ()) if isinstance(member, type) and issubclass(member, BaseModel)), annotation)


def documented() -> dict[str, dict[str, str]]:
    """Returns section -> key -> default, as docs/configuration.md has them."""
    parts = re.split(r"^## `\[+([a-z]+)\]+`$", text("configuration.md"), flags=re.MULTILINE)[1:]
    return {
        name: {row[0].strip("`"): row[1] for row in rows(body) if row[0].startswith("`")} for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def test_every_section_and_key_is_documented_and_no_other() -> None:
    known = {name: set(section_model(name).model_fields) for name in Project.model_fields if name != "root"}
    assert {name: set(keys) for name, keys in documented().items()} == known


@pytest.mark.parametrize("section", [name for name in Project.model_fields if name != "root"])
def test_documented_defaults_are_the_defaults(section: str) -> None:
    for key, field in section_model(section).model_fields.items():
        shown = documented()[section][key]
        if field.is_required():
            assert shown == "required", key
        elif field.get_default(call_default_factory=True, validated_data={}) is None:
            assert shown == "left out", key
        else:
            default = field.get_default(call_default_factory=True, validated_data={})
            assert json.loads(shown.strip("`")) == json.loads(json.dumps(default)), key


def family(kind: type[errors.DiscreetError]) -> Iterator[type[errors.DiscreetError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from family(child)


def test_every_error_is_documented_with_its_exit_code_and_status() -> None:
    found = {row[0].strip("`"): row[1:3] for row in rows(text("errors.md")) if row[0].startswith("`")}
    assert found == {kind.code: [str(kind.exit_code), str(kind.http_status)] for kind in family(errors.DiscreetError)}


def test_every_pitfall_has_its_line_and_every_named_test_exists() -> None:
    lines = [row for row in rows(text("pitfalls.md")) if row[0].isdigit()]
    assert [int(row[0]) for row in lines] == list(range(1, PITFALLS + 1))
    for number, _, guard in lines:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", guard)
        assert named or guard == "not yet guarded", f"pitfall {number}"
        for path, function in named:
            assert re.search(rf"^\s*(async )?def {function}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE), f"{path}::{function}"


def test_the_glossary_is_sorted_and_has_the_stage_words() -> None:
    words = [row[0].strip("*").lower() for row in rows(text("glossary.md")) if row[0].startswith("**")]
    assert words == sorted(words)
    assert {"admitted", "de-identified", "snapshot", "plan", "reservation", "guarantee", "audit", "release", "canary", "verdict", "ceiling"} <= set(
        words
    )


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Returns the mu whose trade-off curve touches (epsilon, delta): Dong, Roth & Su 2019, Cor. 2.13, by bisection."""
    cdf = NormalDist().cdf
    low, high = 1e-6, 50.0
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (low, mu) if cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * cdf(-epsilon / mu - mu / 2) > delta else (mu, high)
    return low


def test_the_figures_for_choosing_epsilon_are_right() -> None:
    normal = NormalDist()
    lines = [row for row in rows(text("choosing-unit-and-epsilon.md")) if re.fullmatch(r"[\d.]+", row[0])]
    assert [float(row[0]) for row in lines] == [0.5, 1, 2, 4, 8]
    for row in lines:
        epsilon = float(row[0])
        mu = gaussian_mu(epsilon, 0.0002)
        expected = [1 / (1 + math.exp(-epsilon)), normal.cdf(mu / 2), normal.cdf(normal.inv_cdf(0.01) + mu)]
        assert row[1:] == [f"{100 * value:.1f} %" for value in expected]


def test_the_training_loop_runs_as_it_stands() -> None:
    pytest.importorskip("discreet.dp.mechanism", reason="needs the extra: train")
    code = re.search(r"```python\n(.*?)```", text("training-loop.md"), re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code[1], "docs/training-loop.md", "exec"), scope)
    assert scope["plan"].guarantee.epsilon <= 3.0
    loss = (scope["model"](scope["inputs"]).squeeze(1) - scope["targets"]).square().mean()
    assert loss < scope["targets"].square().mean() / 4
    assert "epsilon" in printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each line of a code block that calls `discreet`, up to a comment."""
    for block in re.findall(r"^```(?:sh|bash|console)?\n(.*?)^```$", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.removeprefix("$ ").startswith("discreet "):
                yield shlex.split(line.removeprefix("$ "), comments=True)[1:]


@pytest.mark.parametrize("page", [page for page in PAGES if list(commands(page))], ids=lambda page: page.name)
def test_commands_in_the_documentation_exist_with_their_options(page: Path) -> None:
    for words in commands(page):
        command = typer.main.get_command(cli.app)
        while isinstance(command, TyperGroup) and words:
            words = words if words[0] in command.commands or "text" not in command.commands else ["text", *words]  # `redact FILE`
            assert words[0] in command.commands, words
            command, words = command.commands[words[0]], words[1:]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
        assert not isinstance(command, TyperGroup), command.name
        assert {word.split("=")[0] for word in words if word.startswith("-") and word != "-"} <= known, words


def test_the_changelog_begins_with_guarantees() -> None:
    headings = re.findall(r"^### (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == "Guarantees"


def test_the_licence_is_the_whole_text() -> None:
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
