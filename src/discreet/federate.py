"""The fleet's verbs: a site is enrolled through its own pipeline, then trains with the others; a simulation does all of it on one machine.

    init       three generated hospitals with the same public text, and fleet.toml
    enroll     one site: ingest (consent, de-identification, snapshot), its base model, its public keys for the roster
    roster     the coordinator: what every site enrolled with becomes roster.json, with a fresh session
    serve      the coordinator over Flower: every round that is left, restarted as often as need be
    attend     a site over Flower, until the session is closed and its receipts are checked
    simulate   all of it on one machine: enroll every site, run the session in this process, evaluate on public held-out text, print guarantee and receipts

Does not cover: carrying files between controllers; release and audit of the shared adapter (`discreet audit` works on a site's own runs).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, final

from discreet import config, demo, pipeline
from discreet import model as models
from discreet.errors import ConfigInvalid, NotFound
from discreet.federated import fleet as fleets
from discreet.federated import processes
from discreet.federated import site as parts
from discreet.federated.site import Coordinator, Exchange, Site
from discreet.governance.access import Action, current_user
from discreet.model import Base, PublicText
from discreet.pipeline import Observer
from discreet.record import Basis, Sensitivity
from discreet.store import write_atomically
from discreet.train import parallel
from discreet.train.step import mean_loss, tokenize

SIZES = {"patients": 150, "documents": 320, "public": 300, "held_out": 40}
SETTINGS = {
    "model.base": '"../base"',
    "model.train": '["lora_B"]',
    "privacy.population": "250",
    "privacy.steps": "10",
    "privacy.expected_batch": "32",
    "audit.canaries": "40",
    "run.threads": "1",
}


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolled:
    """A site that is ready to train, and the public text by which a simulation measures."""

    name: str
    key: bytes
    node: str
    base: Base
    project: config.Project
    held_out: PublicText


def init_fleet(folder: Path) -> list[str]:
    """Makes the folder of the example fleet and returns the names of its files.

    Raises:
        ConfigInvalid: when the folder already holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigInvalid("an empty folder for the fleet", value=str(folder), remedy="Choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / fleets.FILE_NAME, (resources.files("discreet") / "examples" / fleets.FILE_NAME).read_bytes())
    sites = fleets.load_fleet(folder).sites
    for site in sites:
        demo.write_corpus(folder / site, **SIZES, seed=f"discreet fleet {site}")
        for shared in ("public_train.jsonl", "held_out.jsonl"):
            if site != sites[0]:
                shutil.copyfile(folder / sites[0] / shared, folder / site / shared)
        demo.write_config(folder / site, example="hospital", settings={"project.name": f'"{site}"', **SETTINGS})
    _write_base(folder, folder / sites[0] / "public_train.jsonl")
    return [fleets.FILE_NAME, "base", *(f"{site}/{config.FILE_NAME}" for site in sites)]


def _write_base(folder: Path, public: Path) -> None:
    """The tiny model that all sites adapt, taught the generated public text once: a fleet needs the same base bytes everywhere."""
    rows = [json.loads(line)["text"] for line in public.read_text(encoding="utf-8").splitlines()]
    text = PublicText.of(rows, sensitivity=Sensitivity.PUBLIC, basis=Basis.GENERATED)
    shutil.move(models.build_tiny(text, cache=folder / ".base", steps=80, batch=16, learning_rate=1e-2).path, folder / "base")
    shutil.rmtree(folder / ".base")


def enroll(folder: Path, observer: Observer) -> Enrolled:
    """Freezes a site's corpus through its own pipeline, opens its base model and returns its public key. Idempotent.

    Raises:
        AccessDenied: when the user of this process may not run the project.
    """
    with pipeline.open_house(folder) as house:
        house.access.require(Action.RUN, who=current_user())
        frozen = pipeline.ingest(house, observer)
        base = pipeline.load_base(house, frozen.public, observer)
        project = house.project
    parts.prepare(folder, name=project.project.name, snapshot=frozen.snapshot.root, base=base.path)
    node = processes.write_node_key(_flower(project.state / "federation") / "node").read_text().strip()
    return Enrolled(name=project.project.name, key=parts.identity_of(folder), node=node, base=base, project=project, held_out=frozen.held_out)


def document(enrolled: Enrolled) -> dict[str, Any]:
    """Returns what the coordinator needs of an enrolled site: its name, its two public keys, which base model it adapts and how."""
    section = enrolled.project.model.model_dump(mode="json", exclude={"base"})
    return {"name": enrolled.name, "key": enrolled.key.hex(), "node": enrolled.node, "base": enrolled.base.digest, "model": section}


def roster(folder: Path, documents: Sequence[Mapping[str, Any]], *, base: Path, host: str) -> dict[str, Any]:
    """Writes roster.json, ca.crt and what the coordinator needs to start. Sites get fleet.toml, roster.json and ca.crt; the digest is what they compare outside.

    Args:
        folder: of fleet.toml.
        documents: what each site's `enroll` printed.
        base: folder of the base model.
        host: by which the sites reach the coordinator; it is in the certificate.

    Raises:
        NotFound: when they are not the sites of fleet.toml, or do not adapt the same base model in the same way.
    """
    by_name = {str(each["name"]): each for each in documents}
    if len(by_name) != len(documents) or set(by_name) != set(fleets.load_fleet(folder).sites):
        raise NotFound("one document of each site of fleet.toml", value=", ".join(sorted(by_name)))
    opened, first = models.load_base(str(base), cache=folder / parts.STATE), documents[0]
    if any(each["base"] != opened.digest or each["model"] != first["model"] for each in documents):
        raise NotFound(
            "one base model and one [model] section at every site", value=opened.digest, remedy="Give all sites the same model files and keys."
        )
    session = parts.enlist(folder, {name: bytes.fromhex(each["key"]) for name, each in by_name.items()})
    parts.keep_model(folder, base=opened, section=config.ModelSection.model_validate(first["model"]))
    place = _flower(folder / parts.STATE)
    for name, each in by_name.items():
        write_atomically(place / "nodes" / f"{name}.pub", (str(each["node"]) + "\n").encode())
    processes.write_credentials(place, host=host)
    shutil.copyfile(place / "ca.crt", folder / "ca.crt")
    agreement = parts.agreement_for(fleets.load_fleet(folder), opened, config.ModelSection.model_validate(first["model"]))
    said = {"digest": session.roster.digest, "server": session.roster.server.hex(), "binding": parts.binding(session, agreement)}
    return {"session": session.id, "sites": sorted(by_name), **said}


def serve(folder: Path, *, host: str, port: int, timeout: float, observer: Observer) -> dict[str, Any]:
    """Runs the rounds that are left over Flower, and saves the shared adapter. Started again after its death, it continues.

    Args:
        folder: of fleet.toml and roster.json.
        host, port: to listen on.
        timeout: seconds that a stage may take.

    Raises:
        MissingExtra: when flwr is not installed.
        SourceMissing: when there is no roster yet.
    """
    processes.tool("flower-superlink")
    base, section = parts.kept_model(folder)
    run, place = parts.coordinator(folder, base=base, section=section, observer=observer), _flower(folder / parts.STATE)
    nodes = {name: place / "nodes" / f"{name}.pub" for name in run.session.roster.clients}
    link = processes.Link(place=place, nodes=nodes, host=host, port=port, timeout=timeout, observer=observer)
    for line in run.agreement.lines():
        observer.note(line)
    try:
        result = run.run(link) | _saved(run, base=base, section=section, folder=folder)
    finally:
        link.close()
    write_atomically(run.place / "result.json", json.dumps(result, indent=2).encode())
    return result


def attend(folder: Path, *, fleet: Path, superlink: str, observer: Observer, verifier: Sequence[str] = ()) -> dict[str, Any] | None:
    """Takes part with one site until the session is closed, and returns what the site verified of it; None on every rank but the first under `torchrun`.

    Args:
        folder: of the site's project.
        fleet: with fleet.toml, roster.json and ca.crt as the coordinator gave them out.
        superlink: host:port of the coordinator.
        verifier: command line that judges the file `attestation` beside roster.json (`Site.check_attestation`); empty asks for none.

    Raises:
        MissingExtra: when flwr is not installed.
        TermsRefused: when the coordinator's attestation is not accepted.
    """
    processes.tool("flower-supernode")
    with parallel.joined(config.load(folder).run.device) as ranks:
        if not ranks.writes and not ranks.follow():
            return None
        with closing(Site(folder, fleet_folder=fleet, ranks=ranks)) as site:
            if not ranks.writes:
                site.worker.assist()
                return None
            place = _flower(site.place)
            if verifier:
                evidence = fleet / "attestation"
                site.check_attestation(evidence.read_bytes() if evidence.is_file() else b"", verifier=verifier)
            shutil.copyfile(fleet / "ca.crt", place / "ca.crt")
            outcome = site.outcome()
            if outcome is None:
                site.worker.ranks.announce(True)  # opened by the first rank first, which makes the run's key
                outcome = processes.attend(site, place=place, superlink=superlink, observer=observer)
            ranks.announce(False)
            said = {"valid": outcome["valid"], "failed": outcome["failed"], "rounds": outcome["rounds"], "transcript": outcome["head"]}
            return {"site": site.name, "fleet": site.fleet.name, "session": site.session.id, **said, "guarantee": site.agreement.guarantee()}


def leave(folder: Path, *, fleet: Path) -> dict[str, Any]:
    """Takes a site out of its session for good: its reservation is closed, spent as it is, and its key of the session destroyed."""
    site = Site(folder, fleet_folder=fleet)
    try:
        site.leave()
        return {"site": site.name, "session": site.session.id, "rounds": len(site.receipts())}
    finally:
        site.close()


def _flower(place: Path) -> Path:
    return place / "flower"


def _saved(run: Coordinator, *, base: Base, section: config.ModelSection, folder: Path) -> dict[str, Any]:
    digest = parts.save_shared(run, base=base, section=section, folder=folder / "adapter")
    return {"adapter": str(folder / "adapter"), "adapter_digest": digest, "fleet": run.agreement.fleet.name}


def prepare(folder: Path, observer: Observer) -> list[Enrolled]:
    """Enrolls every site that lies beside fleet.toml and writes the roster: what a deployment's controllers do by exchanging files."""
    enrolled = [enroll(folder / name, observer) for name in fleets.load_fleet(folder).sites]
    roster(folder, [document(each) for each in enrolled], base=enrolled[0].base.path, host="127.0.0.1")
    return enrolled


def simulate(folder: Path, observer: Observer) -> dict[str, Any]:
    """Runs a whole session on one machine; continues where it was stopped.

    Args:
        folder: of fleet.toml, with a folder for each site.

    Returns:
        guarantee, rounds, losses on public held-out text, what each site verified of its receipts, bytes and seconds.

    Raises:
        NotFound: when the sites do not adapt the same base model.
    """
    began = time.monotonic()
    enrolled = prepare(folder, observer)
    observer.stage("federate")
    sites = {each.name: Site(folder / each.name, fleet_folder=folder) for each in enrolled}
    try:
        return finish(folder, exchange=parts.InProcess(sites, observer), first=enrolled[0], observer=observer) | {
            "seconds": round(time.monotonic() - began, 1)
        }
    finally:
        for site in sites.values():
            site.close()


def finish(folder: Path, *, exchange: Exchange, first: Enrolled, observer: Observer) -> dict[str, Any]:
    """Runs the rounds that are left over an exchange, saves the shared adapter and measures it on public text."""
    run = parts.coordinator(folder, base=first.base, section=first.project.model, observer=observer)
    for line in run.agreement.lines():
        observer.note(line)
    before = _loss(run, first)
    result = run.run(exchange)
    saved = _saved(run, base=first.base, section=first.project.model, folder=folder)
    return result | {"loss": {"before": before, "after": _loss(run, first)}} | saved


def lines(result: Mapping[str, Any]) -> list[str]:
    """Returns the last screen of a session."""
    said, loss = result["guarantee"], result.get("loss")
    return [
        "",
        f"The shared adapter is (epsilon {said['epsilon']:.2f}, delta {said['delta']:.2g})-private for one {said['unit']}, {said['relation']}, by RDP, "
        f"{said['noise']} noise of {said['minimum']} or more survivors, {said['colluders']} of them colluding.",
        *(f"A person at {count} sites: epsilon {epsilon:.2f}." for count, epsilon in said["epsilon_at_sites"].items()),
        f"rounds     {result['rounds']} opened, {result['aborted']} aborted; {result['bytes_up'] / 1e6:.2f} MB up, {result['bytes_down'] / 1e6:.2f} MB down",
        *([f"learned    loss on public held-out text {loss['before']:.3f} -> {loss['after']:.3f}"] if loss else []),
        *(
            f"receipt    {name}: {each['rounds']} uploads, each counted once under the agreed model and plan"
            if each["valid"]
            else f"receipt    {name}: NOT HONOURED: {'; '.join(each['failed'])}"
            for name, each in result["receipts"].items()
        ),
        *(f"receipt    {name}: not there at the end" for name in result["absent"]),
        f"adapter    {result['adapter']}",
    ]


def _loss(run: Coordinator, first: Enrolled) -> float:
    module = models.attach(first.base, first.project.model)
    fleets.unflatten(module, run.trainer.parameters)
    documents = tokenize(first.held_out.texts, first.base, max_tokens=first.project.model.max_tokens)
    return mean_loss(module, documents, token_budget=first.project.run.token_budget)
