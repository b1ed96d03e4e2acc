"""Regenerates src/discreet/deid/secret_rules.json from the public rule data of gitleaks (MIT, its licence goes beside it).

    python benchmarks/import_secret_rules.py --rules gitleaks.toml --licence LICENSE --commit HASH

gitleaks writes RE2; the rows here are read by Python's `re`. What changes: a flag in the middle becomes a scoped flag, `\\z` becomes `\\Z`, POSIX classes are spelled out, the
first group becomes `value`, open-ended quantifiers get the limit `LIMIT` (so that a scan stays linear), and the lazy run of word characters in front of a keyword, which adds
nothing to the value, goes. Left out: rules without a keyword or for file names, those that ask for a path, and `OWN`, for which the table has rows of its own.
"""

from __future__ import annotations

import argparse
import json
import re
import tomllib
from pathlib import Path
from typing import Any

LIMIT = 2000
OWN = frozenset(("generic-api-key", "private-key", "jwt", "jwt-base64", "kubernetes-secret-yaml", "curl-auth-header", "curl-auth-user"))
POSIX = {"[:alnum:]": "A-Za-z0-9", "[:alpha:]": "A-Za-z", "[:digit:]": "0-9", "[:xdigit:]": "0-9A-Fa-f"}


def converted(expression: str) -> str:
    """Returns the expression for Python's `re`."""
    text = expression.replace(r"\z", r"\Z").replace("[\\w.-]{0,50}?", "")
    for name, characters in POSIX.items():
        text = text.replace(name, characters)
    while (at := text.find("(?i)", 1)) > 0:
        end = _closing(text, at + 4)
        text = f"{text[:at]}(?i:{text[at + 4 : end]}){text[end:]}"
    text = _grouped(text)
    text = re.sub(r"(?<!\\)\{(\d+),\}", rf"{{\1,{LIMIT}}}", text)
    return _bounded(text)


def _walk(text: str, start: int = 0) -> list[tuple[int, str]]:
    """Returns the characters that are syntax: neither escaped nor within a class."""
    found, at, inside = [], start, False
    while at < len(text):
        if text[at] == "\\":
            at += 2
            continue
        if inside:
            inside = text[at] != "]"
        elif text[at] == "[":
            inside = True
            at += text[at + 1 : at + 2] == "^"
            at += text[at + 1 : at + 2] == "]"
        else:
            found.append((at, text[at]))
        at += 1
    return found


def _closing(text: str, start: int) -> int:
    depth = 0
    for at, mark in _walk(text, start):
        depth += {"(": 1, ")": -1}.get(mark, 0)
        if depth < 0:
            return at
    return len(text)


def _grouped(text: str) -> str:
    pieces, last, first = [], 0, True
    for at, mark in _walk(text):
        if mark == "(" and text[at + 1 : at + 2] != "?":
            pieces += (text[last:at], "(?P<value>" if first else "(?:")
            last, first = at + 1, False
    return "".join([*pieces, text[last:]])


def _bounded(text: str) -> str:
    pieces, last = [], 0
    for at, mark in _walk(text):
        if mark in "*+":
            pieces += (text[last:at], f"{{{0 if mark == '*' else 1},{LIMIT}}}")
            last = at + 1
    return "".join([*pieces, text[last:]])


def rule(row: dict[str, Any]) -> dict[str, object] | None:
    if row["id"] in OWN or "regex" not in row or "path" in row or not row.get("keywords"):
        return None
    made = {
        "id": row["id"],
        "expression": converted(row["regex"]),
        "keywords": [word.lower() for word in row["keywords"]],
        "entropy": row.get("entropy", 0),
    }
    re.compile(str(made["expression"]))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rules", type=Path, required=True)
    parser.add_argument("--licence", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    options = parser.parse_args()
    made = [found for row in tomllib.loads(options.rules.read_text())["rules"] if (found := rule(row))]
    folder = Path(__file__).parents[1] / "src" / "discreet" / "deid"
    head = {
        "source": "https://github.com/gitleaks/gitleaks config/gitleaks.toml",
        "commit": options.commit,
        "licence": "MIT: secret_rules.LICENSE.txt",
    }
    (folder / "secret_rules.json").write_text(json.dumps({**head, "rules": made}, indent=1) + "\n")
    (folder / "secret_rules.LICENSE.txt").write_text(options.licence.read_text())
    print(f"{len(made)} rules")


if __name__ == "__main__":
    main()
