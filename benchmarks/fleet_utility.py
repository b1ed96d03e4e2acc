"""What federation and privacy cost in loss: 30 sites, one tiny model, four ways to train it, one table.

    OMP_NUM_THREADS=1 python benchmarks/fleet_utility.py roles --data FOLDER/shakespeare-roles --out benchmarks/results/fleet-utility-roles.json
    OMP_NUM_THREADS=1 python benchmarks/fleet_utility.py hospital --out benchmarks/results/fleet-utility-hospital.json
    OMP_NUM_THREADS=1 python benchmarks/fleet_utility.py hospital --patients 2400 --share 10 --out benchmarks/results/fleet-utility-hospital-large.json

    federated DP   every site clips each of its units, adds its share of discrete noise and masks; the coordinator opens the sum (the whole protocol, in this process)
    federated      the same, with no noise
    central DP     the DP engine on all units at one place: Poisson sample, clipping, continuous Gaussian noise
    central        all units at one place, neither clipped nor noised

All four take the same number of steps of the same Adam on the same adapters (B of LoRA, A frozen), with the same expected batch; both private ones have the same epsilon and
delta for one unit, the federated one by its RDP filter, the central one by the plan's own. Unit: one role (`roles`), one patient (`hospital`). The loss is over documents of
units that nobody trained on; the base has read other units' text.

One setting for every corpus: the defaults below, with three seeds. They were fixed before these runs, not before all runs: earlier ones had other ranks and shares (docs/federation.md says
which, and what they gave). The third command was fixed before anything of its size was run; it differs in size alone: ten times the patients, twice the batch.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from discreet import demo
from discreet import model as models
from discreet.config import ModelSection
from discreet.dp import discrete
from discreet.dp.mechanism import calibrate
from discreet.federated import fleet as fleets
from discreet.federated import secagg
from discreet.federated.fleet import Agreement, FleetFile, Trainer, Worker
from discreet.federated.secagg import Policy, Roster
from discreet.keys import Key
from discreet.model import Base, PublicText
from discreet.record import Basis, Sensitive, Sensitivity
from discreet.train import step as steps
from discreet.train.step import PrivateCorpus

SITES = 30
ROUNDS = 20
EPSILON = 8.0
MAX_TOKENS = 64
CLIP = 0.5
LEARNING_RATE = 1e-2
BUDGET = 2048


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is adapted and how much of the corpus a round reads: rank and targets of LoRA, units of which one in `share` is expected in a round, documents of one."""

    rank: int
    targets: tuple[str, ...]
    share: int
    cap: int

    @property
    def section(self) -> ModelSection:
        return ModelSection(base="tiny", train=("lora_B",), lora_rank=self.rank, lora_targets=self.targets, max_tokens=MAX_TOKENS)


@dataclass(frozen=True)
class Text:
    """Documents by unit, other units' documents for the base and for measuring."""

    units: dict[str, list[str]]
    public: list[str]
    held_out: list[str]
    unit: str


def roles(folder: Path) -> Text:
    """A document is consecutive utterances of one role, about 50 words. Of every five roles one is public, one held out."""
    by_role: dict[str, list[str]] = defaultdict(list)
    for line in (folder / "utterances.jsonl").read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        documents = by_role[said["user"]]
        if documents and len(documents[-1].split()) + len(said["text"].split()) <= 50:
            documents[-1] += "\n" + said["text"]
        else:
            documents.append(said["text"])
    part: list[dict[str, list[str]]] = [{}, {}, {}, {}, {}]
    for role, documents in by_role.items():
        part[hashlib.sha256(role.encode()).digest()[0] % 5][role] = documents
    return Text(units=part[2] | part[3] | part[4], public=list(chain(*part[0].values())), held_out=list(chain(*part[1].values()))[:300], unit="role")


def hospital(patients: int) -> Text:
    """The generated hospital; its public text and held-out text are of other people."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo.write_corpus(folder, patients=patients, documents=2 * patients, public=600, held_out=120)
        units: dict[str, list[str]] = defaultdict(list)
        for line in (folder / "notes.jsonl").read_text(encoding="utf-8").splitlines():
            units[json.loads(line)["patient"]].append(json.loads(line)["text"])
        public, held_out = (
            [json.loads(line)["text"] for line in (folder / f).read_text().splitlines()] for f in ("public_train.jsonl", "held_out.jsonl")
        )
    return Text(units=dict(units), public=public, held_out=held_out, unit="patient")


def corpus_of(units: dict[str, list[str]], base: Base) -> PrivateCorpus:
    names = sorted(units)
    return PrivateCorpus(units=Sensitive(tuple(tuple(steps.tokenize(units[n], base, max_tokens=MAX_TOKENS)) for n in names)), names=tuple(names))


def fleet_file(text: Text, setting: Setting, noise: str) -> FleetFile:
    population, names = len(text.units), tuple(f"site-{i:02d}" for i in range(SITES))
    promise: dict[str, Any] = {"population": population, "expected_batch": population // setting.share, "epsilon": EPSILON, "delta": 0.5 / population}
    # A site holds a thirtieth of the units; its sum is bounded by four times what it expects to draw.
    bound = max(4, 4 * population // setting.share // SITES)
    return FleetFile(
        name="utility",
        sites=names,
        rounds=ROUNDS,
        cap=setting.cap,
        clip_norm=CLIP,
        site_bound=bound,
        minimum=27,
        noise=noise,
        learning_rate=LEARNING_RATE,
        **promise,
    )


def federated(text: Text, setting: Setting, base: Base, seed: int, *, noisy: bool) -> tuple[torch.nn.Module, Agreement]:
    module = models.attach(base, setting.section)
    dimension = sum(p.numel() for p in models.trained_parameters(module).values())
    agreed = fleets.agree(fleet_file(text, setting, "distributed" if noisy else "central"), dimension=dimension, layout=fleets.layout_of(module))
    names = agreed.fleet.sites
    ordered = sorted(text.units, key=lambda unit: hashlib.sha256(f"{seed} {unit}".encode()).digest())
    root = Key(hashlib.sha256(f"utility {seed}".encode()).digest())
    workers = {
        name: Worker(
            agreement=agreed,
            base=base,
            module=module,
            corpus=corpus_of({u: text.units[u] for u in ordered[i::SITES]}, base),
            run_key=root.derive("site", name),
            token_budget=BUDGET,
        )
        for i, name in enumerate(names)
    }
    identities = {name: Ed25519PrivateKey.from_private_bytes(root.derive("identity", name).mac(b"")) for name in names}
    signer = Ed25519PrivateKey.from_private_bytes(root.derive("server").mac(b""))
    roster = Roster(server=signer.public_key().public_bytes_raw(), clients={n: k.public_key().public_bytes_raw() for n, k in identities.items()})
    policy = Policy(roster=roster, session="u", plan=agreed.digest, minimum=27, dimension=dimension, bits=16)
    trainer = Trainer.start(fleets.flatten(models.trained_parameters(module)), clip_norm=CLIP)
    for number in range(ROUNDS):
        payload = fleets.payload_of(trainer.parameters, base=base.digest, clip_norm=CLIP)
        terms = secagg.terms_for(
            roster, session="u", number=number, members=names, minimum=27, dimension=dimension, bits=16, payload=payload, plan=agreed.digest
        )
        members = {}
        for name in names:
            members[name] = secagg.client(
                workers[name].contribution,
                name=name,
                identity=identities[name],
                policy=policy,
                stream=root.stream("protocol", name),
                journal=Unrecorded(),
            )
            next(members[name])
        total = opened(secagg.server(terms, roster=roster, signer=signer, payload=payload), members)
        trainer.apply([discrete.decode(total, agreed.encoding, signs=fleets.round_signs(terms))], agreed)
    fleets.unflatten(module, trainer.parameters)
    return module, agreed


def opened(hub: Any, members: dict[str, Any]) -> Any:
    requests = next(hub)
    while True:
        try:
            requests = hub.send({name: members[name].send(request) for name, request in requests.items()})
        except StopIteration as end:
            return end.value.total


class Unrecorded:
    """No journal: every client lives in this process until its round is over."""

    def once(self, session: str, number: int, stage: str, request: bytes, answer: Callable[[], bytes]) -> bytes:
        return answer()

    def rounds(self, session: str) -> int:
        return 0

    def count(self, session: str, *stages: str, other_than: int) -> int:
        return 0


def central(text: Text, setting: Setting, base: Base, seed: int, *, private: bool) -> tuple[torch.nn.Module, float]:
    module = models.attach(base, setting.section)
    file, corpus = fleet_file(text, setting, "central"), corpus_of(text.units, base)
    key = Key(hashlib.sha256(f"central {seed}".encode()).digest())
    optimizer = torch.optim.Adam(models.trained_parameters(module).values(), lr=LEARNING_RATE)
    plan = calibrate(
        epsilon=EPSILON,
        delta=file.delta,
        population=file.population,
        expected_batch=file.expected_batch,
        steps=ROUNDS,
        clip_norm=CLIP,
        unit=text.unit,
        cap=setting.cap,
    )
    for number in range(1, ROUNDS + 1):
        if private:
            steps.private_step(module, optimizer, corpus, plan, run_key=key, step=number, token_budget=BUDGET)
        else:
            documents = [d for unit in steps.drawn(corpus, plan, run_key=key, step=number) for d in unit]
            steps.public_step(module, optimizer, documents, token_budget=BUDGET)
    return module, plan.noise_multiplier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", choices=["roles", "hospital"])
    parser.add_argument("--data", type=Path, help="folder of utterances.jsonl, for roles")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--patients", type=int, default=240, help="of the hospital")
    parser.add_argument("--rank", type=int, default=2)
    parser.add_argument("--targets", nargs="+", default=["q_proj", "v_proj", "o_proj"])
    parser.add_argument("--share", type=int, default=2, help="one in this many units is expected in a round")
    parser.add_argument("--cap", type=int, default=2)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    setting = Setting(rank=asked.rank, targets=tuple(asked.targets), share=asked.share, cap=asked.cap)
    torch.set_num_threads(1)
    text = roles(asked.data) if asked.corpus == "roles" else hospital(asked.patients)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        public = PublicText.of(text.public, sensitivity=Sensitivity.PUBLIC, basis=Basis.GENERATED)
        base = models.build_tiny(public, cache=Path(folder), steps=150, batch=16, learning_rate=1e-2)
        held_out = steps.tokenize(text.held_out, base, max_tokens=MAX_TOKENS)

        def loss(module: torch.nn.Module) -> float:
            return steps.mean_loss(module, held_out, token_budget=BUDGET)

        start = loss(models.attach(base, setting.section))
        found: dict[str, list[float]] = defaultdict(list)
        for seed in range(asked.seeds):
            module, agreed = federated(text, setting, base, seed, noisy=True)
            found["federated DP"].append(loss(module))
            found["federated"].append(loss(federated(text, setting, base, seed, noisy=False)[0]))
            module, multiplier = central(text, setting, base, seed, private=True)
            found["central DP"].append(loss(module))
            found["central"].append(loss(central(text, setting, base, seed, private=False)[0]))
            print({name: round(values[-1], 4) for name, values in found.items()}, flush=True)
    said = agreed.guarantee()
    result = {
        "corpus": asked.corpus,
        "sites": SITES,
        "units": len(text.units),
        "unit": text.unit,
        "rounds": ROUNDS,
        "setting": asdict(setting),
        "parameters": agreed.encoding.dimension,
        "epsilon": {"federated DP": said["epsilon"], "central DP": EPSILON},
        "epsilon_at_sites": said["epsilon_at_sites"],
        "delta": said["delta"],
        "noise_multiplier": {"federated DP": said["noise_multiplier"], "central DP": multiplier},
        "loss_before": start,
        "loss": {name: statistics.mean(values) for name, values in found.items()},
        "spread": {name: float(np.ptp(values)) for name, values in found.items()},
        "seeds": asked.seeds,
        "cpu_s": time.process_time() - began,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}, {os.getloadavg()[0]:.1f} load",
    }
    print(json.dumps(result, indent=2))
    if asked.out:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
