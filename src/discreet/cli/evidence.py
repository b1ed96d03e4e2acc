"""`discreet evidence`: the signed log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from discreet.cli.shared import HERE, Folder, Json, say
from discreet.errors import SourceMissing

evidence = typer.Typer(no_args_is_help=True, help="The signed log: export and verify.")


@evidence.command("export")
def evidence_export(
    out: Annotated[Path, typer.Option("--out", help="New folder for the bundle.")] = Path("evidence"),
    public: Annotated[bool, typer.Option("--public", help="Only what may be published.")] = False,
    trail: Annotated[
        Path | None, typer.Option("--trail", help="Folder of a gateway's trail (`discreet serve --upstream`) in place of a project.")
    ] = None,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Writes a bundle that anyone can verify offline, and the public key beside it; verifies it once."""
    from discreet.evidence.log import verify_bundle

    if trail is not None:
        from discreet.serve.trail import export

        bundle, key = export(trail, out, public=public)
    else:
        from discreet import pipeline  # not above: a gateway alone has no training library

        with pipeline.open_house(project) as house:
            bundle, key = pipeline.export_evidence(house, out, public=public)
    verified = verify_bundle(bundle, public_key=key.read_text())
    document = {"bundle": str(bundle), "key": str(key), "public": public, "entries": len(verified.entries), "checkpoint": verified.note.decode()}
    say(as_json, document, [f"bundle: {bundle}", f"key:    {key}"])


@evidence.command("dossier")
def evidence_dossier(
    out: Annotated[Path, typer.Option("--out", help="New folder for the dossier.")] = Path("dossier"),
    public: Annotated[bool, typer.Option("--public", help="Only public and DP-released answers, and the public log.")] = False,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Writes what a privacy officer needs as one signed folder, and the public key beside it; verifies it once."""
    from discreet import dossier, duties, pipeline
    from discreet.governance.access import Action
    from discreet.store import write_atomically

    with pipeline.open_house(project) as house:
        duties.ask(house, Action.READ)
        folder = dossier.write(house.log, house.store, out, public=public, namespace=house.log.origin)
        key = out.with_name(out.name + ".pub")
        write_atomically(key, (house.log.public_key() + "\n").encode())
        verified = dossier.verify(folder, public_key=key.read_text())
    document = {"dossier": str(folder), "key": str(key), "public": public, "entries": len(verified.entries), "checkpoint": verified.note.decode()}
    say(as_json, document, [f"dossier: {folder}", f"key:     {key}"])


@evidence.command("witness")
def evidence_witness(
    bundle: Path,
    key: Annotated[Path, typer.Option("--key", help="File with the log's public key.")],
    name: Annotated[str, typer.Option("--name", help="Name of your key, by convention a URL without a scheme.")],
    state: Annotated[Path, typer.Option("--state", help="Your folder: your key, and the last checkpoint of each log.")] = Path("witness"),
    as_json: Json = False,
) -> None:
    """Verifies a bundle, refuses a rollback or fork since you last saw the log (exit 4), and cosigns its checkpoint. For anyone: needs no project."""
    from discreet.evidence import witness

    if not key.is_file():
        raise SourceMissing("a file with the log's public key", value=str(key))
    signed = witness.cosign(bundle, public_key=key.read_text(), name=name, state=state)
    say(as_json, signed, [signed["checkpoint"], f"witness key: {signed['key']}"])


@evidence.command("rotate-key")
def evidence_rotate_key(
    out: Annotated[Path, typer.Option("--out", help="Where the public keys go, oldest first; hand the file out in place of the earlier one.")] = Path(
        "log.pub"
    ),
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Gives the log a new key; what the old one signed stays verifiable, and its private half is destroyed."""
    from discreet import duties, pipeline

    with pipeline.open_house(project) as house:
        done = duties.rotate_key(house, out)
    say(as_json, done, [*done["keys"], f"written to {out}"])


@evidence.command("pin")
def evidence_pin(
    accept: Annotated[bool, typer.Option("--accept-rollback", help="Go on with a database that lost entries; needs --by and --reason.")] = False,
    by: Annotated[str, typer.Option("--by", help="Who accepts the loss; the log keeps it.")] = "",
    reason: Annotated[str, typer.Option("--reason")] = "",
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Signs a checkpoint and keeps it outside the database; a restored backup is refused from then on."""
    from discreet import duties, pipeline

    if accept:
        done = duties.accept_rollback(project, by=by, reason=reason)
    else:
        with pipeline.open_house(project) as house:
            done = duties.pin(house)
    say(as_json, done, [done["checkpoint"]])


@evidence.command("tiles")
def evidence_tiles(
    out: Annotated[Path, typer.Option("--out", help="Folder to be served; an earlier export grows.")] = Path("tiles"),
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Writes checkpoint and tiles of the log (c2sp.org/tlog-tiles) for mirrors and monitors: hashes only, no statement."""
    from discreet import duties, pipeline

    with pipeline.open_house(project) as house:
        done = duties.tiles(house, out)
    say(as_json, done, [f"{done['tiles']} tiles in {out}"])


@evidence.command("verify")
def evidence_verify(
    bundle: Annotated[Path, typer.Argument(help="A folder (bundle or dossier), or a JSON file with a statement and its proof.")],
    key: Annotated[Path, typer.Option("--key", help="File with the log's public key; of a log whose key was rotated one a line.")],
    as_json: Json = False,
) -> None:
    """Verifies a bundle, a dossier or a certificate with a public key alone: no network, no database (exit 4 when anything is broken)."""
    from discreet import dossier
    from discreet.errors import EvidenceInvalid
    from discreet.evidence.log import verify_bundle, verify_certificate

    for path in (key, bundle):
        if not path.exists():
            raise SourceMissing("a bundle, and a file with the log's public key", value=str(path))
    public_key = key.read_text()
    try:
        if bundle.is_file():
            entry, signed = verify_certificate(bundle, public_key=public_key)
            statements, said = 1, f"VALID: '{entry.predicate}' of {entry.time} is in the log under this checkpoint"
        else:
            verified = (dossier.verify if dossier.is_dossier(bundle) else verify_bundle)(bundle, public_key=public_key)
            statements, signed = len(verified.entries), verified.note
            said = f"VALID: {statements} statements under this checkpoint"
    except EvidenceInvalid as error:
        say(as_json, {"valid": False, "failed": error.failed or [str(error)], "checkpoint": None}, ["BROKEN", *error.failed])
        raise typer.Exit(error.exit_code) from None
    say(as_json, {"valid": True, "failed": [], "checkpoint": signed.decode(), "statements": statements}, [said, signed.decode()])
