"""The house rules that no other tool holds: who may build a stage value, what importing costs, which errors are tested."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from discreet import errors

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "discreet"

HOMES = {
    "Record": "governance/catalog.py",
    "Admitted": "governance/consent.py",
    "Deidentified": "deid/policy.py",
    "Snapshot": "corpus.py",
    "Plan": "dp/mechanism.py",
    "Reservation": "ledger.py",
    "ClippedSum": "dp/clipping.py",
    "Noised": "dp/noise.py",
    "Guarantee": "dp/accounting.py",
    "Trained": "train/loop.py",
    "AuditReport": "audit/bounds.py",
    "Release": "pipeline/releasing.py",
}


def _calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""
            yield name, node.lineno


def _built_elsewhere(source: str, file: str) -> list[str]:
    return [f"{file}:{line} builds {name}" for name, line in _calls(ast.parse(source)) if name in HOMES and HOMES[name] != file]


def test_stage_values_are_built_only_at_home():
    found = [hit for path in SOURCE.rglob("*.py") for hit in _built_elsewhere(path.read_text(), path.relative_to(SOURCE).as_posix())]
    assert found == []


def test_the_rule_itself_can_fail():
    assert _built_elsewhere("x = record.Admitted(record=r)", "pipeline/story.py") == ["pipeline/story.py:1 builds Admitted"]


@pytest.mark.parametrize("home", sorted(set(HOMES.values())))
def test_homes_exist(home: str):
    assert (SOURCE / home).is_file()


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, discreet; print([m for m in ('torch', 'transformers', 'starlette', 'sqlalchemy', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def _concrete(base: type[errors.DiscreetError]) -> Iterator[type[errors.DiscreetError]]:
    for child in base.__subclasses__():
        yield child
        yield from _concrete(child)


def test_error_codes_are_unique_and_drawn_in_the_tree():
    classes = list(_concrete(errors.DiscreetError))
    assert len({c.code for c in classes}) == len(classes)
    for cls in classes:
        assert cls.__name__ in (errors.__doc__ or ""), f"{cls.__name__} is missing in the drawing"


@pytest.mark.parametrize("cls", [c for c in _concrete(errors.DiscreetError) if not c.__subclasses__()], ids=lambda c: c.__name__)
def test_every_error_has_a_test_that_provokes_it(cls: type[errors.DiscreetError]):
    text = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py") if p.name != "test_architecture.py")
    assert cls.__name__ in text or cls.code in text, f"no test names {cls.__name__}"


def test_messages_state_rule_value_and_remedy():
    error = errors.PlanInvalid("epsilon > 0", value=-1.0, remedy="Choose one.")
    assert str(error) == "Expected epsilon > 0. Got -1.0. Choose one."
    assert error.to_json() == {"error": {"code": "plan.invalid", "rule": "epsilon > 0", "value": "-1.0", "remedy": "Choose one."}}


def test_the_public_names_are_there():
    import discreet

    found = discreet.detect("Call Dr. Ann Lee.")
    assert [span.label for span in found] == ["PERSON"]
    assert "Ann Lee" not in discreet.redact("Call Dr. Ann Lee.").text
    with pytest.raises(AttributeError):
        _ = discreet.nothing


WRITES = re.compile(
    r"\bTable\(|write_(?:atomically|bytes|text|table)\(|os\.open\(|open\((?:[^()]*, )?[\"'][wax]b?\+?[\"']|mkstemp|mkdtemp|TemporaryDirectory\(|NamedTemporaryFile\("
    r"|copytree\(|copyfile(?:obj)?\(|shutil\.(?:copy2?|move)\(|save_file\(|save_pretrained\(|np\.savez?|to_(?:csv|parquet)\(|savefig\(|GGUFWriter\("
)
STORES = {
    "serve.retrieval": "IndexStore",
    "corpus": "SnapshotStore",
    "governance.catalog": "SourceFiles",
    "governance.consent": "consent",
    "train.checkpoint": "CheckpointStore",
}
"""Home of each store in `pipeline.erasure_of`, and what it is called there."""


def test_every_module_that_writes_is_a_store_of_the_erasure_or_says_why_not():
    from discreet import pipeline

    names = {path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", "."): path.read_text() for path in SOURCE.rglob("*.py")}
    writing = {name for name, text in names.items() if WRITES.search(text)}
    for line in (
        'path.open("wb")',
        "open(path, 'a')",
        "np.savez(out, ids)",
        "shutil.copy(a, b)",
        "frame.to_parquet(out)",
        'Table("chunks", metadata)',
    ):
        assert WRITES.search(line), line
    assert not WRITES.search('path.open("rb")')
    assert writing - STORES.keys() - pipeline.NO_SUBJECTS.keys() == set()
    assert not STORES.keys() & pipeline.NO_SUBJECTS.keys()
    body = names["pipeline.erasing"].partition("def erasure_of")[2].partition("\nclass ")[0]
    assert [name for name, store in STORES.items() if store not in body] == []
