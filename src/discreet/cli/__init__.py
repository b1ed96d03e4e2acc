"""Verbs, each short, each one call into the pipeline, the report or one library.

With `--json` a command prints exactly one JSON document on stdout; logs and progress go to stderr. Exit codes: 0 done, 2 usage, 3 refused, 4 verification
failed, 1 other. A user's mistake never ends in a traceback; an unexpected error prints its type and place only, because its message could quote text
(set DISCREET_DEBUG=1 to see it all).
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from discreet import __version__
from discreet.cli import accountability, evidence, federate, privacy, redacting, searching, serving, story
from discreet.cli.shared import stderr
from discreet.errors import DiscreetError

app = typer.Typer(
    no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False, help="Sensitive text to a language model that keeps it, with proof."
)
for group in (story.commands, accountability.commands, searching.commands, serving.commands):
    app.add_typer(group)
for name, group in (
    ("redact", redacting.redacting),
    ("privacy", privacy.privacy),
    ("budget", accountability.budget),
    ("consent", accountability.consent),
    ("catalog", accountability.catalog),
    ("access", accountability.access),
    ("evidence", evidence.evidence),
    ("federate", federate.federate),
):
    app.add_typer(group, name=name)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"discreet {__version__}")
        raise typer.Exit


def main() -> None:
    """Runs the command line; maps every error to its documented exit code."""
    as_json = "--json" in sys.argv
    # numpy reads it once: two threads for the name model's small products cost six times the CPU time and win none
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        code = app(standalone_mode=False)
    except DiscreetError as error:
        code = _fail(as_json, error.to_json(), f"{error} [{error.code}]", error.exit_code)
    except typer.Abort:
        code = _fail(as_json, {"error": {"code": "aborted"}}, "Stopped.", 1)
    except TyperException as error:
        code = _fail(as_json, {"error": {"code": "usage", "rule": str(error), "value": None, "remedy": "See --help."}}, f"{error} See --help.", 2)
    except KeyboardInterrupt:
        code = _fail(as_json, {"error": {"code": "interrupted"}}, "Interrupted; the next call resumes where this one stopped.", 1)
    except OSError as error:
        import errno

        if error.errno != errno.ENOSPC:
            code = _unexpected(as_json, error)
        else:
            from discreet.store import storage_full

            code = _fail(as_json, storage_full().to_json(), str(storage_full()), 1)
    except Exception as error:  # the last line of defence: nothing of an unexpected message is printed
        code = _unexpected(as_json, error)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(as_json: bool, document: dict[str, object], line: str, code: int) -> int:
    if as_json:
        typer.echo(json.dumps(document))
    stderr.print(line, markup=False, style="red")
    return code


def _unexpected(as_json: bool, error: BaseException) -> int:
    if os.environ.get("DISCREET_DEBUG"):
        traceback.print_exception(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(place.filename).name}:{place.lineno}"
    line = f"Unexpected {type(error).__name__} at {where}. This is a defect of discreet; nothing was lost. DISCREET_DEBUG=1 shows more."
    return _fail(as_json, {"error": {"code": "unexpected", "rule": type(error).__name__, "value": where}}, line, 1)
