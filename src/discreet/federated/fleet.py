"""What a fleet agrees on before it trains, what one site contributes to a round, and what the coordinator makes of the sum. No network.

    fleet.toml ──agree──> Agreement (plan, encoding, guarantee), computed by every site for itself; its digest is pinned in each client's policy
    site:        model of the round ──drawn, summed──> clipped sum of its drawn units ──discrete.encode──> noised integers ──secagg──> masked
    coordinator: sum of the survivors ──decode──> / public expected batch ──> one optimiser step, a checkpoint, a signed entry of the transcript

The privacy unit is (site, subject) under `unit = "subject"`: a person known to k sites is k units, and the guarantee says what that costs (`Agreement.at_sites`); or the whole site.
Participation is Poisson: each site flips the coins of its own units, inside, so that not even the server knows who is in and amplification holds against it. A fleet that
cannot be sampled takes participation = "bounded" (DP-FTRL with a banded strategy): a unit is in every `separation`-th step, always the same ones, and the noise of a step takes back
part of that of the `separation` - 1 steps before it. The steps of one unit meet independent noise, so its price is that of its own steps, without amplification; running sums of the
steps, which are what the model feels, hold less noise. Central noise only: distributed shares would have to come from the same sites in every step.
Noise is planned for the smallest survivor set less the assumed colluders; a round below that aborts. More survivors mean more noise, which is not credited.

    noise        who adds it                    who must be trusted with a noise-free sum
    distributed  every client its share         nobody
    local        every client the whole of it   nobody, not even the other clients
    central      the coordinator                the coordinator (adaptive clipping is possible in each, for unit = "site")

Guarantees: the plan is reserved and spent in each site's own ledger before its first contribution; a contribution is computed once for good (journal.py); personal heads
(`personalise`) are trained after the last round and never uploaded: trained along, they would carry one unit into every later gradient beyond its clip.

Sources: McMahan et al. 2018 (DP-FedAvg); Kairouz et al. 2021 (distributed discrete Gaussian); Andrew et al. 2021; Sun et al. 2024 (FFA-LoRA: A frozen, the sum is exact);
Kairouz et al. 2021, arXiv 2103.00039 (DP-FTRL); Choquette-Choo et al. 2023, arXiv 2306.08153 (banded); Kalinin & Lampert 2024 (the banded square root).

Does not cover: verifying another client's norm bound or noise (not possible under masking; colluders are counted instead); the noise itself under bounded
participation (the coordinator adds it and is trusted with the sum; a site takes part in no step again that it helped to open, but a coordinator that opens a sum with the others
and tells the site that it dropped out could have it take part once more: site.py).
"""

from __future__ import annotations

import hashlib
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from discreet.config import ModelSection, RunSection, digest_of
from discreet.dp import adaptive, csprng, discrete
from discreet.dp.accounting import RdpFilter, rdp_epsilon
from discreet.dp.discrete import Encoding
from discreet.dp.mechanism import Plan, calibrate, event_of
from discreet.errors import ConfigInvalid, EvidenceInvalid, PlanInvalid, SourceMissing, TermsRefused
from discreet.evidence.statement import canonical_json, parse_json
from discreet.federated.masks import WORD, Words
from discreet.federated.secagg import Server, Terms
from discreet.keys import Key, Stream
from discreet.model import Base, attach, trained_parameters
from discreet.record import Digest, Sensitive
from discreet.train.parallel import ALONE, Ranks, summed_together
from discreet.train.step import PrivateCorpus, drawn, public_step

FILE_NAME = "fleet.toml"
BIT_WIDTH = 0.2
"""Weight of the clip bit beside an update of norm 1: it makes the joint sensitivity 0.5 % larger."""

Reals = NDArray[np.float32]


class Noise(StrEnum):
    """Who adds the noise."""

    DISTRIBUTED = "distributed"
    LOCAL = "local"
    CENTRAL = "central"


class Participation(StrEnum):
    """Who takes part in a round."""

    POISSON = "poisson"
    BOUNDED = "bounded"


class FleetFile(BaseModel):
    """The keys of fleet.toml; unknown ones are errors. All of it is public, and every site has the same file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,30}$")
    sites: tuple[str, ...] = Field(min_length=2, description="names of the sites; folders of that name beside the file in a simulation")
    server: Server = Field(Server.MALICIOUS, description="malicious: more than 2/3 of a cohort must answer; semi_honest: more than half")
    rounds: int = Field(ge=1)
    unit: Literal["subject", "site"] = "subject"
    unit_name: str = "patient"
    population: int = Field(ge=1, description="units in the whole fleet: a public estimate, never an exact count")
    expected_batch: int = Field(ge=1, description="expected units in a round, over all sites")
    participation: Participation = Field(
        Participation.POISSON, description="poisson: every unit by its own coin; bounded: in every `separation`-th step"
    )
    separation: int = Field(1, ge=1, description='steps from one participation of a unit to the next; participation = "bounded" only')
    cap: int = Field(1, ge=1, description='documents of one unit used in one round, chosen by keyed hash; unit = "subject" only')
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    clip_norm: float = Field(gt=0)
    site_bound: int = Field(1, ge=1, description="clipped units that one site's sum may weigh at most; a larger sum is scaled down")
    minimum: int = Field(ge=2, description="survivors that the noise is planned for; below it a round aborts")
    colluders: int = Field(0, ge=0, description="survivors whose noise is not counted on")
    noise: Noise = Noise.DISTRIBUTED
    bits: Literal[16, 32] = 16
    learning_rate: float = Field(1e-2, gt=0)
    local_steps: int = Field(1, ge=1, description='steps inside a site in one round; unit = "site" only')
    adaptive_quantile: float | None = Field(None, gt=0, lt=1, description='clip norm follows this quantile of update norms; unit = "site" only')
    groups: int = Field(1, ge=1, description="more than 1: the coordinate median of this many noised group means")
    personal_steps: int = Field(0, ge=0, description="steps each site takes for itself after the last round; the result stays there")


def load_fleet(folder: Path) -> FleetFile:
    """Reads fleet.toml.

    Raises:
        SourceMissing: when there is none.
        ConfigInvalid: when a key is unknown or a value breaks its rule.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise SourceMissing(f"a {FILE_NAME} in this folder", value=str(folder), remedy="Make one with `discreet init DIR --example fleet`.")
    try:
        return FleetFile.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{FILE_NAME} to be TOML in UTF-8", value=str(error)) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigInvalid(f"{FILE_NAME} to be valid: {where}: {first['msg'].removeprefix('Value error, ')}") from None


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """What every site computes from fleet.toml for itself: the plan, the integers, the promise. Built by `agree`."""

    fleet: FleetFile
    plan: Plan
    encoding: Encoding
    layout: str = ""

    @property
    def digest(self) -> str:
        """Pinned by every client: the file, the plan and the encoding as computed, and which parameters the vector holds in which order."""
        said = {"fleet": self.fleet.model_dump(mode="json"), "plan": self.plan.digest, "encoding": self.encoding.to_json(), "layout": self.layout}
        return digest_of(said)

    @property
    def unit(self) -> str:
        return self.plan.unit

    @property
    def is_bounded(self) -> bool:
        return self.fleet.participation is Participation.BOUNDED

    @property
    def bands(self) -> tuple[float, ...]:
        """The column of the banded strategy: the first `separation` coefficients of the square root of the running sum, scaled to norm 1; (1,) under Poisson."""
        root = np.cumprod([1.0, *((2 * k - 1) / (2 * k) for k in range(1, self.fleet.separation))])
        return tuple(float(value) for value in root / math.sqrt(math.fsum(root**2)) * (1 - 1e-12))

    def spent_steps(self, opened: int) -> int:
        """Returns how many steps of the plan `opened` rounds have spent: under bounded participation the steps of one unit."""
        return -(-opened // self.fleet.separation)

    @property
    def delta(self) -> float:
        """The plan's delta and what the rounding may add."""
        return self.plan.delta + self.fleet.rounds * discrete.ROUNDING_BETA

    def at_sites(self, count: int) -> float:
        """Returns epsilon for one person with data at `count` sites: `count` units, drawn independently, of joint norm `count` clip norms.

        Whenever one of them is in, all are counted as in: sampling probability 1 - (1-q)^count, noise multiplier divided by `count`.
        """
        q = self.plan.sampling_probability
        event = event_of(sampling_probability=1 - (1 - q) ** count, noise_multiplier=self.plan.noise_multiplier / count, steps=self.plan.steps)
        return rdp_epsilon(event, delta=self.plan.delta)

    def guarantee(self) -> dict[str, Any]:
        """Returns the promise as public JSON values. The accountant is RDP: the noise is discrete (dp/discrete.py)."""
        sites = {str(k): round(self.at_sites(k), 4) for k in (2, 3) if k <= len(self.fleet.sites) and self.fleet.unit == "subject"}
        return {
            "epsilon": self.at_sites(1),
            "delta": self.delta,
            "unit": self.unit,
            "relation": self.plan.relation,
            "accountant": "rdp",
            "epsilon_at_sites": sites,
            "noise": self.fleet.noise.value,
            "noise_multiplier": self.plan.noise_multiplier,
            "sampling_probability": self.plan.sampling_probability,
            "rounds": self.fleet.rounds,
            "participation": self.fleet.participation.value,
            "steps_of_a_unit": self.plan.steps,
            "minimum": self.fleet.minimum,
            "colluders": self.fleet.colluders,
            "server": self.fleet.server.value,
            "wrap_probability": self.encoding.wrap_probability,
            "norm_bound": "kept by honest clients; not verifiable under masking",
        }

    def lines(self) -> list[str]:
        """Returns the promise for people."""
        said, over = self.guarantee(), ", ".join(f"{e:.2f} at {k} sites" for k, e in self.guarantee()["epsilon_at_sites"].items())
        return [
            f"epsilon            {said['epsilon']:.3f} by RDP, delta {said['delta']:.2g}, for one {self.unit}"
            + (f"; for one person {over}" if over else ""),
            f"noise              {self.fleet.noise}, multiplier {self.plan.noise_multiplier:.3f}, planned for {self.fleet.minimum} survivors, {self.fleet.colluders} of them colluding",
            f"integers           {self.encoding.bits} bits, scale {self.encoding.scale:.1f}, noise {100 * (self.encoding.overhead - 1):.1f} % larger for the grid, "
            f"P(any wrap) <= 2^{math.log2(max(self.encoding.wrap_probability, 1e-300)):.1f}",
            f"server             assumed {self.fleet.server}; norm bounds are kept by honest clients and cannot be verified under masking",
        ]


def agree(fleet: FleetFile, *, dimension: int, layout: str = "") -> Agreement:
    """Computes plan and encoding from the public file: the least noise that an RDP budget of (epsilon, delta) admits.

    Args:
        dimension: number of shared parameters.
        layout: digest of their names and shapes (`layout_of`).

    Raises:
        PlanInvalid: when the numbers break a rule of the mathematics or of the protocol.
    """
    is_site = fleet.unit == "site"
    rules = (
        (fleet.minimum <= len(fleet.sites) // fleet.groups, "a minimum that every group of sites can reach"),
        (fleet.colluders < fleet.minimum, "fewer colluders than the smallest survivor set"),
        (fleet.participation is Participation.BOUNDED or fleet.separation == 1, 'separation with participation = "bounded"'),
        (fleet.separation <= fleet.rounds, "a separation within the rounds"),
        (
            fleet.participation is Participation.POISSON or (fleet.noise is Noise.CENTRAL and fleet.groups == 1 and fleet.adaptive_quantile is None),
            'bounded participation with noise = "central", one group and a fixed clip norm',
        ),
        (is_site or (fleet.adaptive_quantile is None and fleet.local_steps == 1), 'adaptive_quantile and local_steps with unit = "site"'),
    )
    for holds, rule in rules:
        if not holds:
            raise PlanInvalid(rule)
    try:
        plan = calibrate(
            epsilon=fleet.epsilon,
            delta=fleet.delta,
            population=fleet.population,
            # Under bounded participation the steps of one unit are disjoint columns of the strategy, each of norm 1: as many Gaussian steps without sampling.
            expected_batch=fleet.population if fleet.participation is Participation.BOUNDED else fleet.expected_batch,
            steps=-(-fleet.rounds // fleet.separation),
            clip_norm=fleet.clip_norm,
            cap=fleet.cap,
            unit="site" if is_site else f"({fleet.unit_name}, site)",
            budget=RdpFilter.open(epsilon=fleet.epsilon, delta=fleet.delta),
        )
        bit = BIT_WIDTH if fleet.adaptive_quantile else 0.0
        encoding = discrete.encode_for(
            dimension=dimension + bool(bit),
            bits=fleet.bits,
            clients=len(fleet.sites) // fleet.groups + (len(fleet.sites) % fleet.groups > 0),
            noisy=1 if fleet.noise is Noise.LOCAL else fleet.minimum - fleet.colluders,
            client_norm=math.hypot(1.0, bit / 2) if is_site else float(fleet.site_bound),
            clip_norm=math.hypot(1.0, bit / 2),
            noise_multiplier=plan.noise_multiplier,
        )
    except ValueError as error:
        raise PlanInvalid("a fleet that the mathematics accepts", value=str(error)) from None
    if encoding.renyi_slack * fleet.rounds > 1e-12:
        raise PlanInvalid("noise of each client wide enough to be as good as Gaussian", value=encoding.local_std, remedy="Use 32 bits.")
    return Agreement(fleet=fleet, plan=plan, encoding=encoding, layout=layout)


# The model on the wire


def layout_of(module: nn.Module) -> str:
    """Returns the digest of the names and shapes of the trained parameters, in the order of `flatten`."""
    return digest_of({name: list(parameter.shape) for name, parameter in sorted(trained_parameters(module).items())})


def flatten(tensors: Mapping[str, torch.Tensor]) -> Reals:
    """Returns tensors, sorted by name, as one float32 vector."""
    return np.concatenate([tensors[name].detach().float().cpu().numpy().ravel() for name in sorted(tensors)]).astype(np.float32)


def unflatten(module: nn.Module, vector: Reals) -> None:
    """Writes a vector of `flatten` into the trained parameters of a module.

    Raises:
        TermsRefused: when it has another length.
    """
    parameters, at = trained_parameters(module), 0
    if len(vector) != sum(parameter.numel() for parameter in parameters.values()):
        raise TermsRefused("a model with the parameters of this fleet", value=len(vector))
    with torch.no_grad():
        for name in sorted(parameters):
            count = parameters[name].numel()
            parameters[name].copy_(torch.from_numpy(vector[at : at + count].copy()).view(parameters[name].shape))
            at += count


def payload_of(vector: Reals, *, base: Digest, clip_norm: float, step: int = 0) -> bytes:
    """Returns what a round announces: base digest, clip norm, step (from 0; aborted rounds are none) and shared parameters. Its digest is the model digest of the terms."""
    return canonical_json({"base": base, "clip_norm": clip_norm, "count": len(vector), "step": step}) + b"\n" + vector.astype("<f4").tobytes()


def read_payload(payload: bytes, *, base: Digest) -> tuple[Reals, float, int]:
    """Returns parameters, clip norm and step of an announced model.

    Raises:
        TermsRefused: when it is malformed, not finite, or on another base model.
    """
    head, _, body = payload.partition(b"\n")
    try:
        fields = parse_json(head)
        vector, clip_norm, step = np.frombuffer(body, "<f4"), float(fields["clip_norm"]), int(fields["step"])
        is_right = (
            fields["base"] == base and fields["count"] == len(vector) and bool(np.isfinite(vector).all()) and 0 < clip_norm < math.inf and step >= 0
        )
    except (EvidenceInvalid, KeyError, TypeError, ValueError):
        is_right = False
    if not is_right:
        raise TermsRefused("a model of this fleet on this base", remedy="Nothing left this client.")
    return vector.astype(np.float32), clip_norm, step


def round_signs(terms: Terms) -> Stream:
    """Returns the public stream of a round's rotation: the same for all who were shown the same terms."""
    return Stream(hashlib.sha256(b"discreet rotation/1" + terms.digest).digest())


# One site in one round


@final
@dataclass(slots=True, kw_only=True, eq=False)
class Worker:
    """A site's model and corpus, which never leave it. `contribution` is what `secagg.client` asks for."""

    agreement: Agreement
    base: Base
    module: nn.Module
    corpus: PrivateCorpus
    run_key: Key
    token_budget: int = 512
    ranks: Ranks = ALONE

    @staticmethod
    def of(
        agreement: Agreement, *, base: Base, section: ModelSection, corpus: PrivateCorpus, run_key: Key, run: RunSection, ranks: Ranks = ALONE
    ) -> Worker:
        """Opens the worker of a site, on the device and with the token budget of its `[run]`.

        Args:
            ranks: this process among the site's own (`torchrun`); the first one answers, the others `assist`.

        Raises:
            PlanInvalid: when several processes are to share what one has to do.
        """
        if ranks.size > 1 and (agreement.fleet.unit == "site" or run.weights == "sharded"):
            raise PlanInvalid('unit = "subject" and [run] weights = "replicated" for a site of several processes', value=ranks.size)
        module = attach(base, section).to(run.device)
        return Worker(agreement=agreement, base=base, module=module, corpus=corpus, run_key=run_key, token_budget=run.token_budget, ranks=ranks)

    def contribution(self, terms: Terms, payload: bytes) -> Words:
        """Returns this site's clipped, rounded and noised vector for one round, modulo 2^bits."""
        start, clip_norm, applied = read_payload(payload, base=self.base.digest)
        unflatten(self.module, start)
        step = terms.number + 1
        if self.agreement.fleet.unit == "site":
            vector = self._site_update(step, start, clip_norm, is_in=self._is_in(step, applied))
        else:
            if clip_norm != self.agreement.plan.clip_norm:
                raise TermsRefused("the clip norm of the plan", value=clip_norm)
            self._turn_of(applied)  # refused before the other ranks are asked
            if self.ranks.size > 1:
                self.ranks.announce(True)
            vector = self._subject_sum(start, step, applied)
        encoding = self.agreement.encoding
        sent = _quiet(encoding) if self.agreement.fleet.noise is Noise.CENTRAL else encoding
        integers = discrete.encode(vector, sent, signs=round_signs(terms), secret=self.run_key.stream("federated", step))
        return (integers & ((1 << encoding.bits) - 1)).astype(WORD[encoding.bits])

    def assist(self) -> None:
        """Computes this rank's part of every contribution that the first rank announces; returns when it says that there are no more."""
        while self.ranks.follow():
            self._subject_sum(np.zeros(self.agreement.encoding.dimension, np.float32), 0, 0)

    def personalise(self, vector: Reals) -> int:
        """Trains the module on, from the final shared parameters, for this site alone. Returns the number of tokens read."""
        unflatten(self.module, vector)
        optimizer = torch.optim.Adam(trained_parameters(self.module).values(), lr=self.agreement.fleet.learning_rate)
        documents = [document for unit in self.corpus.units.reveal() for document in unit]
        tokens = 0
        for step in range(self.agreement.fleet.personal_steps):
            chosen = csprng.uniform(self.run_key.stream("personal", step), len(documents)).argsort()[:8].tolist()
            tokens += public_step(self.module, optimizer, [documents[i] for i in chosen], token_budget=self.token_budget).tokens
        return tokens

    def _in_turn(self, applied: int) -> PrivateCorpus:
        """The units that are asked in a step: all of them, or under bounded participation those whose turn it is. A unit's turn is drawn once a session, inside the site."""
        if not self.agreement.is_bounded:
            return self.corpus
        kept = [i for i, name in enumerate(self.corpus.names) if self._turn(name) == self._turn_of(applied)]
        units = self.corpus.units.reveal()
        return PrivateCorpus(units=Sensitive(tuple(units[i] for i in kept)), names=tuple(self.corpus.names[i] for i in kept))

    def _is_in(self, step: int, applied: int) -> bool:
        if self.agreement.is_bounded:
            return self._turn("site") == self._turn_of(applied)
        return bool(csprng.bernoulli(self.run_key.stream("sample", step), 1, self.agreement.plan.sampling_probability).item())

    def _turn(self, name: str) -> int:
        return int.from_bytes(self.run_key.derive("turn").mac(name.encode())[:8], "big") % self.agreement.fleet.separation

    def _turn_of(self, applied: int) -> int:
        if applied >= self.agreement.fleet.rounds:
            raise TermsRefused(f"a step below the {self.agreement.fleet.rounds} of the plan", value=applied)
        return applied % self.agreement.fleet.separation

    def _subject_sum(self, start: Reals, step: int, applied: int) -> Reals:
        """The sum of the drawn units' gradients in clip norms. All ranks compute it at the model and step of the first, which alone masks and sends it."""
        plan = self.agreement.plan
        unflatten(self.module, self.ranks.of_first(torch.from_numpy(start)).numpy())
        step, applied = self.ranks.of_first(torch.tensor([step, applied])).tolist()
        corpus = self._in_turn(applied)
        units = drawn(corpus, plan, run_key=self.run_key, step=step) if corpus.names else []
        total = summed_together(self.module, units, clip_norm=plan.clip_norm, token_budget=self.token_budget, combine=plan.combine, ranks=self.ranks)
        return flatten(total) / np.float32(plan.clip_norm)

    def _site_update(self, step: int, start: Reals, clip_norm: float, *, is_in: bool) -> Reals:
        """The site's own update, clipped as a whole; zero (but noised and masked all the same) when it is not in."""
        fleet = self.agreement.fleet
        optimizer = torch.optim.SGD(trained_parameters(self.module).values(), lr=fleet.learning_rate)
        documents = [document for unit in self.corpus.units.reveal() for document in unit]
        for local in range(fleet.local_steps if is_in else 0):
            chosen = csprng.uniform(self.run_key.stream("local", step, local), len(documents)).argsort()[:16].tolist()
            public_step(self.module, optimizer, [documents[i] for i in chosen], token_budget=self.token_budget)
        update = (start - flatten(trained_parameters(self.module))) / np.float32(clip_norm)
        return site_vector(update, with_bit=fleet.adaptive_quantile is not None, is_in=is_in)


def site_vector(update: Reals, *, with_bit: bool, is_in: bool) -> Reals:
    """Returns a site's update, clipped to norm 1, and its clip bit as +-1/2 of `BIT_WIDTH` (one half when it was *not* clipped); zeros when it is not in.

    Args:
        update: float32 [d] in units of the clip norm.
    """
    norm = float(np.linalg.norm(update.astype(np.float64))) if np.isfinite(update).all() else math.inf
    clipped = update * np.float32(min(1.0, (1 - 1e-6) / max(norm, 1e-30))) if math.isfinite(norm) else np.zeros_like(update)
    bit = [np.float32(BIT_WIDTH * (0.5 if norm <= 1.0 else -0.5))] if with_bit else []
    return np.concatenate([clipped, np.array(bit, np.float32)]) * np.float32(is_in)


def _quiet(encoding: Encoding) -> Encoding:
    """The same integers without noise, for central DP: the same grid, or the sum would not decode."""
    return Encoding(**{**{name: getattr(encoding, name) for name in Encoding.__slots__}, "noise_multiplier": 0.0})


# The coordinator


@final
@dataclass(slots=True, kw_only=True)
class Trainer:
    """The shared parameters and the optimiser's state (Adam on the noised mean): everything a restarted coordinator needs. None of it is secret: it was released."""

    parameters: Reals
    first: Reals
    second: Reals
    number: int
    clip_norm: float

    @staticmethod
    def start(vector: Reals, *, clip_norm: float) -> Trainer:
        return Trainer(parameters=vector, first=np.zeros_like(vector), second=np.zeros_like(vector), number=0, clip_norm=clip_norm)

    def apply(self, totals: Sequence[Reals], agreement: Agreement) -> None:
        """Takes one step with the decoded, noised sums of each group: their mean, or the coordinate median of the group means."""
        fleet = agreement.fleet
        expected = fleet.expected_batch / len(totals)
        mean = np.median(np.stack(totals), axis=0).astype(np.float32) / np.float32(expected)
        if fleet.adaptive_quantile is not None:
            unclipped = float(mean[-1]) / BIT_WIDTH + 0.5
            next_clip = adaptive.moved(self.clip_norm, fraction=unclipped, quantile=fleet.adaptive_quantile, rate=0.2)
            mean = mean[:-1]
        else:
            next_clip = self.clip_norm
        self._move(mean * np.float32(self.clip_norm), fleet)
        self.clip_norm, self.number = next_clip, self.number + 1

    def _move(self, gradient: Reals, fleet: FleetFile) -> None:
        if fleet.unit == "site":  # the sites' updates carry their own learning rate
            self.parameters = self.parameters - gradient
            return
        step = self.number + 1
        self.first = (0.9 * self.first + 0.1 * gradient).astype(np.float32)
        self.second = (0.999 * self.second + 0.001 * gradient**2).astype(np.float32)
        scaled = (self.first / (1 - 0.9**step)) / (np.sqrt(self.second / (1 - 0.999**step)) + 1e-8)
        self.parameters = (self.parameters - fleet.learning_rate * scaled).astype(np.float32)

    def to_bytes(self) -> bytes:
        head = canonical_json({"number": self.number, "clip_norm": self.clip_norm, "count": len(self.parameters)})
        return head + b"\n" + b"".join(part.astype("<f4").tobytes() for part in (self.parameters, self.first, self.second))

    @staticmethod
    def from_bytes(content: bytes) -> Trainer:
        head, _, body = content.partition(b"\n")
        fields = json.loads(head)
        parts = np.frombuffer(body, "<f4").reshape(3, fields["count"]).astype(np.float32)
        return Trainer(parameters=parts[0], first=parts[1], second=parts[2], number=fields["number"], clip_norm=fields["clip_norm"])


def groups_of(names: Iterable[str], count: int) -> list[list[str]]:
    """Returns the sites in `count` groups, by name in turn: fixed, so that a unit is always in one group and each group's sum is a release of its own units."""
    ordered = sorted(names)
    return [ordered[start::count] for start in range(count)]


def opened_vector(total: Words, agreement: Agreement, terms: Terms, *, central: Stream | None, correlated: Correlated | None = None) -> Reals:
    """Returns the decoded sum of a round; under central DP the noise is added here, before anything else sees the sum.

    Args:
        central: the coordinator's secret stream of this round; None unless noise = "central" and participation is Poisson: discrete noise on the integers.
        correlated: the noise of the steps under bounded participation, moved on by this one.

    Raises:
        PlanInvalid: when noise is central and neither is given, or the other way round.
    """
    wanted = (agreement.fleet.noise is Noise.CENTRAL and not agreement.is_bounded, agreement.is_bounded)
    if wanted != (central is not None, correlated is not None):
        raise PlanInvalid("a stream of noise exactly under central DP")
    encoding = agreement.encoding
    if central is not None:
        noise = discrete.discrete_gaussian(central, encoding.dimension, std=encoding.noise_multiplier * encoding.sensitivity)
        total = total + (noise & ((1 << encoding.bits) - 1)).astype(total.dtype)
    vector = discrete.decode(total, encoding, signs=round_signs(terms))
    return vector if correlated is None else vector + correlated.next(encoding)


@final
class Correlated:
    """Row after row of C^-1 z for the banded strategy C: u_t = (z_t - c_1 u_(t-1) - ...) / c_0. Nothing of it is stored; a restart draws it again from its streams."""

    def __init__(self, bands: Sequence[float], key: Key) -> None:
        self._bands, self._key, self.step = tuple(bands), key, 0
        self._past: list[NDArray[np.float64]] = []

    def __repr__(self) -> str:
        return "<correlated noise>"

    def next(self, encoding: Encoding) -> Reals:
        """Returns the noise of the next step, float32 [d], of the standard deviation that the plan and the sum's sensitivity ask for."""
        fresh = csprng.normal(self._key.stream("correlated", self.step), [encoding.dimension]).numpy().astype(np.float64)
        fresh *= encoding.noise_multiplier * encoding.sensitivity / encoding.scale
        for coefficient, noise in zip(self._bands[1:], self._past, strict=False):
            fresh -= coefficient * noise
        fresh /= self._bands[0]
        self._past = [fresh, *self._past][: len(self._bands) - 1]
        self.step += 1
        return fresh.astype(np.float32)

    def at(self, step: int, encoding: Encoding) -> Correlated:
        """Moves on to a step, drawing what lies between, after a restart."""
        while self.step < step:
            self.next(encoding)
        return self
