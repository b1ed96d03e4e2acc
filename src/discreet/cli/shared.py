"""What every verb uses: options, output, progress, errors of mathematics."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from discreet.errors import PlanInvalid

T = TypeVar("T")
stderr = Console(stderr=True, highlight=False)
stdout = Console(highlight=False, soft_wrap=True)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
Folder = Annotated[Path, typer.Option("--project", "-C", help="Folder of the project's discreet.toml.")]
Fleet = Annotated[Path, typer.Option("--fleet", "-C", help="Folder of fleet.toml.")]
HERE = Path()


def say(as_json: bool, document: Mapping[str, Any], lines: Iterable[str]) -> None:
    """Prints one JSON document, or lines for people."""
    if as_json:
        typer.echo(json.dumps(document, indent=2, ensure_ascii=False))
    else:
        for line in lines:
            stdout.print(line, markup=False)


def as_plan_error(call: Callable[[], T]) -> T:
    """Runs mathematics that raises ValueError and turns that into our usage error."""
    try:
        return call()
    except ValueError as error:
        raise PlanInvalid.of(error) from None


def flat(document: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, object]]:
    """Yields the values of nested mappings by dotted name, lists left out."""
    for name, value in document.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield prefix + name, value


class Bars:
    """Shows the story on stderr: one line a stage, one bar a task. On a pipe it prints lines at every tenth of a task instead."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=stderr,
        )
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def stage(self, name: str) -> None:
        self.stop()
        stderr.print(f"[bold]{name}[/bold]")

    def note(self, line: str) -> None:
        stderr.print("  " + line, markup=False)

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, object]) -> None:
        said = "  ".join(f"{name} {value}" for name, value in figures.items())
        if not stderr.is_terminal:
            self._print_tenth(task, done, total, said)
            return
        if task not in self._tasks:
            self._bars.start()
            self._tasks[task] = self._bars.add_task(task, total=total, figures=said)
        self._bars.update(self._tasks[task], completed=done, total=total, figures=said)
        if done >= total:
            self._bars.refresh()

    def _print_tenth(self, task: str, done: int, total: int, said: str) -> None:
        tenth = 10 * done // max(total, 1)
        if self._tenths.get(task) != tenth:
            self._tenths[task] = tenth
            stderr.print(f"  {task} {done}/{total}  {said}", markup=False)

    def stop(self) -> None:
        self._bars.stop()
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks.clear()
