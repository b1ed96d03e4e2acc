"""`discreet evidence`: the signed log."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from discreet.cli.shared import HERE, Folder, Json, say
from discreet.errors import EvidenceInvalid, RequestInvalid, SourceMissing

evidence = typer.Typer(no_args_is_help=True, help="The signed log: export and verify.")


@evidence.command("export")
def evidence_export(
    out: Annotated[Path, typer.Option("--out", help="Folder for the evidence; earlier evidence there is replaced.")] = Path("evidence"),
    public: Annotated[bool, typer.Option("--public", help="Only what may be published: public and DP-released answers, and the public log.")] = False,
    log_only: Annotated[bool, typer.Option("--log-only", help="The signed log alone, without the answers computed from it.")] = False,
    trail: Annotated[
        Path | None, typer.Option("--trail", help="Folder of a gateway's trail (`discreet serve --upstream`) in place of a project: its log alone.")
    ] = None,
    project: Folder = HERE,
    as_json: Json = False,
) -> None:
    """Writes what a privacy officer needs as one signed folder that anyone can verify offline, and the public key beside it; verifies it once."""
    from discreet import dossier
    from discreet.evidence.log import named

    out = named(out)
    if trail is not None:
        from discreet.serve.trail import export

        bundle, key = export(trail, out, public=public)
    else:
        from discreet import duties, pipeline  # not above: a gateway alone has no training library

        with pipeline.open_house(project) as house:
            bundle, key = pipeline.export_evidence(house, out, public=public) if log_only else duties.export_evidence(house, out, public=public)
    verified = dossier.verify_any(bundle, public_key=key.read_text())
    document = {"bundle": str(bundle), "key": str(key), "public": public, "entries": len(verified.entries), "checkpoint": verified.note.decode()}
    say(as_json, document, [f"bundle: {bundle}", f"key:    {key}"])


@evidence.command("witness")
def evidence_witness(
    bundle: Path,
    key: Annotated[Path, typer.Option("--key", help="File with the log's public key.")],
    name: Annotated[str, typer.Option("--name", help="Name of your key, by convention a URL without a scheme.")],
    state: Annotated[Path, typer.Option("--state", help="Your folder: your key, and the last checkpoint of each log.")] = Path("witness"),
    as_json: Json = False,
) -> None:
    """Verifies the log of evidence, refuses a rollback or fork since you last saw the log (exit 4), and cosigns its checkpoint. For anyone: needs no project."""
    from discreet import dossier
    from discreet.evidence import witness

    log = bundle / dossier.LOG if dossier.is_dossier(bundle) else bundle
    signed = witness.cosign(log, public_key=_read(key), name=name, state=state)
    say(as_json, signed, [signed["checkpoint"], f"witness key: {signed['key']}"])


def _read(path: Path) -> str:
    """A public key, or another small file of text; its size first."""
    from discreet.evidence.note import MAX_NOTE_BYTES

    if not path.is_file():
        raise SourceMissing("a file with a public key or checkpoint", value=str(path))
    with path.open("rb") as file:
        content = file.read(MAX_NOTE_BYTES + 1)
    if len(content) > MAX_NOTE_BYTES:
        raise EvidenceInvalid.of([f"{path.name}: not a public key or checkpoint of at most {MAX_NOTE_BYTES} bytes"])
    return content.decode(errors="replace")


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
    bundle: Annotated[Path, typer.Argument(help="A folder of evidence, or a JSON file with a statement and its proof.")],
    key: Annotated[Path, typer.Option("--key", help="File with the log's public key; of a log whose key was rotated one a line.")],
    pinned: Annotated[Path | None, typer.Option("--pinned", help="An older checkpoint that you kept: the log must have grown from it.")] = None,
    witnesses: Annotated[
        Path | None, typer.Option("--witnesses", help="Keys of witnesses, one a line, each of whom must have cosigned --pinned.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Verifies evidence or a certificate with a public key alone: no network, no database (exit 4 when anything is broken)."""
    from discreet import dossier
    from discreet.evidence import witness
    from discreet.evidence.log import verify_certificate

    if not bundle.exists():
        raise SourceMissing("evidence, or a file with a certificate", value=str(bundle))
    if (witnesses and not pinned) or (pinned and bundle.is_file()):
        raise RequestInvalid("--pinned with a folder of evidence, and --witnesses with --pinned")
    try:
        public_key = _read(key)
        old = _read(pinned).encode() if pinned else None
        if old is not None and witnesses:
            witness.cosigned(old, public_key=public_key, witnesses=_read(witnesses))
        if bundle.is_file():
            entry, signed = verify_certificate(bundle, public_key=public_key)
            statements, said = 1, f"VALID: '{entry.predicate}' of {entry.time} is in the log under this checkpoint"
        else:
            verified = dossier.verify_any(bundle, public_key=public_key, pinned=old)
            statements, signed = len(verified.entries), verified.note
            said = f"VALID: {statements} statements under this checkpoint"
    except EvidenceInvalid as error:
        say(as_json, {"valid": False, "failed": error.failed or [str(error)], "checkpoint": None}, ["BROKEN", *(error.failed or [str(error)])])
        raise typer.Exit(error.exit_code) from None
    say(as_json, {"valid": True, "failed": [], "checkpoint": signed.decode(), "statements": statements}, [said, signed.decode()])
