"""Search: the index, passages for those who may read them, private answers for everybody else."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from discreet.cli.shared import HERE, Bars, Folder, Json, say
from discreet.errors import RequestInvalid

commands = typer.Typer()


@commands.command()
def index(project: Folder = HERE, as_json: Json = False) -> None:
    """Builds the index that `search` looks into, of everybody who is admitted for a purpose of [retrieval], in place of the earlier one."""
    from discreet import pipeline

    with pipeline.open_house(project) as house:
        built = pipeline.build_index(house, Bars())
    say(as_json, built, [f"index: {built['index']}", f"snapshot: {built['snapshot']}", f"purposes: {', '.join(built['purposes'])}"])


@commands.command()
def search(
    query: Annotated[str, typer.Argument(help="Words; - reads them from standard input, where no list of processes shows them.")],
    purpose: Annotated[str, typer.Option("--purpose", help="What for: one of [retrieval] purposes.")] = "",
    limit: Annotated[int, typer.Option("--limit", "-k", help="Passages at most.")] = 10,
    private: Annotated[bool, typer.Option("--private", help="Release noised counts of people instead of passages; charged to the budget.")] = False,
    option: Annotated[list[str] | None, typer.Option("--option", help="With --private: a public phrase to count; at least two.")] = None,
    epsilon: Annotated[float | None, typer.Option("--epsilon", help="With --private: price of the answer; delta 0.")] = None,
    votes: Annotated[int, typer.Option("--votes", help="With --private: options that one person counts for, at most.")] = 1,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Shows the passages that you may read for this purpose now; with --private counts of people under differential privacy."""
    from discreet import pipeline

    if private is (epsilon is None) or private is not bool(option):
        raise RequestInvalid("--epsilon and --option with --private, and only there")
    words = sys.stdin.read() if query == "-" else query
    if epsilon is not None:
        with pipeline.open_house(project) as house:
            answer = pipeline.ask(house, words, options=option or [], epsilon=epsilon, votes=votes, purpose=purpose)
        lines = [f"{told['units']:>8}  {told['option']}" for told in answer["options"]]
        near = f"each within {answer['margin']} of the true number of {answer['unit']}s with probability 0.95; epsilon {answer['epsilon']:g}"
        say(as_json, answer, [*lines, near])
        return
    with pipeline.open_house(project, exclusive=False) as house:
        found = pipeline.search(house, words, purpose=purpose, limit=limit)
    lines = [f"{each['score']:.3f}  {each['source']}  {each['record']}\n{_plain(each['text'])}\n" for each in found["passages"]]
    say(as_json, found, lines or ["nothing"])


def _plain(text: str) -> str:
    """A record's text without what would speak to the terminal."""
    return "".join(character if character.isprintable() or character == "\n" else "\N{REPLACEMENT CHARACTER}" for character in text)
