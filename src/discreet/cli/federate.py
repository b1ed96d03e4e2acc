"""`discreet federate`: a fleet that trains together."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from discreet.cli.shared import HERE, Bars, Fleet, Folder, Json, say
from discreet.errors import SourceMissing

federate = typer.Typer(no_args_is_help=True, help="A fleet that trains together and shows nobody its data.")


@federate.command("simulate")
def federate_simulate(fleet: Fleet = HERE, as_json: Json = False) -> None:
    """Runs every site and the coordinator of a fleet on this machine; resumes where it stopped."""
    from discreet import federate as fleets

    result = fleets.simulate(fleet, Bars())
    say(as_json, result, fleets.lines(result))


@federate.command("enroll")
def federate_enroll(project: Folder = HERE, as_json: Json = False) -> None:
    """Freezes a site's corpus and prints the public key that goes into the fleet's roster.json."""
    from discreet import federate as fleets

    document = fleets.document(fleets.enroll(project, Bars()))
    say(as_json, document, [f"{document['name']} {document['key']}"])


@federate.command("roster")
def federate_roster(
    enrolled: Annotated[list[Path], typer.Argument(help="What `enroll --json` printed at each site, one file each.")],
    base: Annotated[Path, typer.Option("--base", help="Folder of the base model.")],
    host: Annotated[str, typer.Option("--host", help="By which the sites reach the coordinator; it is in the certificate.")] = "127.0.0.1",
    fleet: Fleet = HERE,
    as_json: Json = False,
) -> None:
    """Writes roster.json and ca.crt, which every site gets beside fleet.toml."""
    from discreet import federate as fleets

    made = fleets.roster(fleet, [_json_file(path) for path in enrolled], base=base, host=host)
    say(
        as_json,
        made,
        [
            f"session {made['session']} of {', '.join(made['sites'])}",
            f"roster  {made['digest']}  (compare it at every site)",
            f"binding {made['binding']}  (report data of an attestation)",
        ],
    )


@federate.command("server")
def federate_server(
    fleet: Fleet = HERE,
    host: Annotated[str, typer.Option("--host", help="Address to listen on, the one of the certificate.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port")] = 9700,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that a stage of a round may take.")] = 600.0,
    as_json: Json = False,
) -> None:
    """Coordinates a fleet over Flower; started again after its death, it continues the round that was under way."""
    from discreet import federate as fleets

    result = fleets.serve(fleet, host=host, port=port, timeout=timeout, observer=Bars())
    say(as_json, result, fleets.lines(result))


@federate.command("client")
def federate_client(
    superlink: Annotated[str, typer.Argument(help="HOST:PORT of the coordinator.")],
    project: Folder = HERE,
    fleet: Annotated[Path, typer.Option("--fleet", help="Folder with fleet.toml, roster.json and ca.crt.")] = HERE,
    verifier: Annotated[
        str, typer.Option("--verifier", help="Program that accepts the coordinator's `attestation` (stdin; the binding is its argument) by exit 0.")
    ] = "",
    as_json: Json = False,
) -> None:
    """Takes part with this site until the session is closed; exit 4 when its receipts are not honoured. On several processes: `torchrun --no-python ... discreet federate client`."""
    from discreet import federate as fleets

    result = fleets.attend(project, fleet=fleet, superlink=superlink, observer=Bars(), verifier=shlex.split(verifier))
    if result is None:  # another rank prints
        return
    said = "each counted once under the agreed model and plan" if result["valid"] else f"NOT HONOURED: {'; '.join(result['failed'])}"
    say(as_json, result, [f"receipt    {result['site']}: {result['rounds']} uploads, {said}"])
    if not result["valid"]:
        raise typer.Exit(4)


@federate.command("leave")
def federate_leave(
    project: Folder = HERE,
    fleet: Annotated[Path, typer.Option("--fleet", help="Folder with fleet.toml and roster.json.")] = HERE,
    as_json: Json = False,
) -> None:
    """Takes this site out of its session for good; what it spent stays spent."""
    from discreet import federate as fleets

    left = fleets.leave(project, fleet=fleet)
    say(as_json, left, [f"{left['site']} left session {left['session']} after {left['rounds']} rounds"])


def _json_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SourceMissing("a file that `discreet federate enroll --json` printed", value=f"{path.name}: {type(error).__name__}") from None
    if not isinstance(content, dict) or not {"name", "key", "node", "base", "model"} <= set(content):
        raise SourceMissing("a file that `discreet federate enroll --json` printed", value=path.name)
    return content
