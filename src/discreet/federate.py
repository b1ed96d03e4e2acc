"""The fleet's verbs: a site is enrolled through its own pipeline, then trains with the others; a simulation does all of it on one machine.

    init       three generated hospitals with the same public text, and fleet.toml
    enroll     one site: ingest (consent, de-identification, snapshot), its base model, its public key for the roster
    simulate   enroll every site, run the session in this process, evaluate on public held-out text, print guarantee and receipts

Does not cover: carrying keys and fleet.toml between controllers; release and audit of the shared adapter (`discreet audit` works on a site's own runs).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, final

from discreet import config, demo, pipeline
from discreet import model as models
from discreet.errors import ConfigInvalid, NotFound
from discreet.federated import fleet as fleets
from discreet.federated import site as parts
from discreet.federated.site import Coordinator, Exchange, Site
from discreet.model import Base, PublicText
from discreet.pipeline import Observer
from discreet.record import Basis, Sensitivity
from discreet.store import write_atomically
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
    """Freezes a site's corpus through its own pipeline, opens its base model and returns its public key. Idempotent."""
    with pipeline.open_house(folder) as house:
        frozen = pipeline.ingest(house, observer)
        base = pipeline.load_base(house, frozen.public, observer)
        project = house.project
    parts.prepare(folder, name=project.project.name, snapshot=frozen.snapshot.root, base=base.path)
    return Enrolled(name=project.project.name, key=parts.identity_of(folder), base=base, project=project, held_out=frozen.held_out)


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
    enrolled = [enroll(folder / name, observer) for name in fleets.load_fleet(folder).sites]
    parts.enlist(folder, {each.name: each.key for each in enrolled})
    if len({each.base.digest for each in enrolled}) != 1:
        raise NotFound(
            "one base model at every site", value=", ".join(each.name for each in enrolled), remedy="Give all sites the same public text or model."
        )
    parts.keep_model(folder, base=enrolled[0].base, section=enrolled[0].project.model)
    observer.stage("federate")
    sites = {each.name: Site(folder / each.name, fleet_folder=folder) for each in enrolled}
    try:
        return finish(folder, exchange=parts.in_process(sites, observer), first=enrolled[0], observer=observer) | {
            "seconds": round(time.monotonic() - began, 1)
        }
    finally:
        for site in sites.values():
            site.close()


def prepare(folder: Path, observer: Observer) -> None:
    """Enrolls every site that lies beside fleet.toml and writes roster.json: what a deployment's controllers do by exchanging files."""
    enrolled = [enroll(folder / name, observer) for name in fleets.load_fleet(folder).sites]
    parts.enlist(folder, {each.name: each.key for each in enrolled})
    parts.keep_model(folder, base=enrolled[0].base, section=enrolled[0].project.model)


def finish(folder: Path, *, exchange: Exchange, first: Enrolled, observer: Observer) -> dict[str, Any]:
    """Runs the rounds that are left over an exchange, saves the shared adapter and measures it on public text."""
    run = parts.coordinator(folder, base=first.base, section=first.project.model, observer=observer)
    for line in run.agreement.lines():
        observer.note(line)
    before = _loss(run, first)
    result = run.run(exchange)
    adapter = folder / "adapter"
    digest = parts.save_shared(run, base=first.base, section=first.project.model, folder=adapter)
    return result | {
        "loss": {"before": before, "after": _loss(run, first)},
        "adapter": str(adapter),
        "adapter_digest": digest,
        "fleet": run.agreement.fleet.name,
    }


def lines(result: Mapping[str, Any]) -> list[str]:
    """Returns the last screen of a session."""
    said, loss = result["guarantee"], result["loss"]
    return [
        "",
        f"The shared adapter is (epsilon {said['epsilon']:.2f}, delta {said['delta']:.2g})-private for one {said['unit']}, {said['relation']}, by RDP, "
        f"{said['noise']} noise of {said['minimum']} or more survivors, {said['colluders']} of them colluding.",
        *(f"A person at {count} sites: epsilon {epsilon:.2f}." for count, epsilon in said["epsilon_at_sites"].items()),
        f"rounds     {result['rounds']} opened, {result['aborted']} aborted; {result['bytes_up'] / 1e6:.2f} MB up, {result['bytes_down'] / 1e6:.2f} MB down",
        f"learned    loss on public held-out text {loss['before']:.3f} -> {loss['after']:.3f}",
        *(
            f"receipt    {name}: {each['rounds']} uploads, each counted once under the agreed model and plan"
            if each["valid"]
            else f"receipt    {name}: NOT HONOURED: {'; '.join(each['failed'])}"
            for name, each in result["receipts"].items()
        ),
        f"adapter    {result['adapter']}",
    ]


def _loss(run: Coordinator, first: Enrolled) -> float:
    module = models.attach(first.base, first.project.model)
    fleets.unflatten(module, run.trainer.parameters)
    documents = tokenize(first.held_out.texts, first.base, max_tokens=first.project.model.max_tokens)
    return mean_loss(module, documents, token_budget=first.project.run.token_budget)
