"""docs/formats.md says what the code does: its table, its worked example, and its verifier that knows nothing of this package."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from discreet.evidence import merkle, note, statement
from discreet.evidence.log import Log, verify_bundle
from discreet.evidence.statement import PREDICATES, Predicate, Statement, digest_of
from discreet.keys import Key, Keyring
from discreet.store import Store

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()
SIGNER = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OPENED = Statement(
    predicate=Predicate.BUDGET_OPENED,
    subjects=(digest_of(b"budget"),),
    fields={"budget": "patients", "epsilon": 8.0, "delta": 1e-6, "unit": "patient"},
)
REFUSED = Statement(predicate=Predicate.REFUSED, subjects=(digest_of(b"record"),), fields={"purpose": "assistant", "reason": "opt-out"})


@pytest.mark.parametrize("kind", Predicate)
def test_the_table_of_kinds_is_the_code(kind: Predicate) -> None:
    row = PREDICATES[kind]
    required = ", ".join(f"`{name}`" for name in row.required)
    other = "any" if row.optional is None else ", ".join(f"`{name}`" for name in row.optional) or "none"
    assert f"| `{kind}` | {'public' if kind.public else 'internal'} | {required} | {other} |" in PAGE


def test_the_worked_example_is_what_the_code_makes() -> None:
    key = note.verifier_key(name="example.org/log", signer=SIGNER)
    place = {"origin": key.name, "index": 0, "serial": 0, "time": "2026-01-02T03:04:05.000006Z", "salt": bytes(16)}
    envelope = statement.sign(OPENED, signer=SIGNER, key_id=key.label, **place)
    leaf = merkle.leaf_hash(envelope)
    checkpoint = note.sign_note(note.Checkpoint(origin=key.name, size=1, root=leaf).text, name=key.name, signer=SIGNER).decode()
    for value in (str(key), envelope.decode(), leaf.hex(), *checkpoint.splitlines()):
        assert f"    {value}\n".removesuffix("    \n") in PAGE


def run_verifier(folder: Path, bundle: Path, key: str) -> subprocess.CompletedProcess[str]:
    [script] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (folder / "verify.py").write_text(script)
    return subprocess.run([sys.executable, "-I", folder / "verify.py", bundle, key], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("public", [True, False])
def test_the_verifier_of_the_page_agrees(tmp_path: Path, public: bool) -> None:
    store = Store(f"sqlite:///{tmp_path}/project.db")
    log = Log(store, Keyring(store, Key(bytes(32))), "example.org/log")
    with store.transaction() as tx:
        for what in (OPENED, REFUSED, REFUSED):
            log.append(tx, what)
    bundle = log.export(tmp_path / "bundle", public=public)
    shown = len(verify_bundle(bundle, public_key=log.public_key()).entries)
    answer = run_verifier(tmp_path, bundle, log.public_key())
    assert (answer.returncode, answer.stdout) == (0, f"{shown} statements of 3 verify under example.org/log\n"), answer.stderr
    for file in () if public else bundle.iterdir():
        content = file.read_bytes()
        file.write_bytes(content[:50] + bytes([content[50] ^ 1]) + content[51:])
        assert run_verifier(tmp_path, bundle, log.public_key()).returncode != 0, file.name
        file.write_bytes(content)
    store.close()
