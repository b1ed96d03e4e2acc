"""One `discreet.toml` becomes one frozen `Project`. Unknown keys are errors that name the nearest known one.

`[privacy]`, `[model]` and `[train]` say what is computed: `privacy_digest` hashes `[privacy]` into the guarantee. `[run]` says only how fast: nothing in it
can change a released number. The keys are documented where they are declared; `docs/configuration.md` is generated from here.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from discreet.errors import ConfigInvalid, SourceMissing, UnknownKey
from discreet.record import Basis, Digest, Purpose, Sensitivity

FILE_NAME = "discreet.toml"
MAX_CONFIG_BYTES = 1_000_000

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


@final
class ProjectSection(_Section):
    """Who is responsible, and for what."""

    name: Name
    controller: str = Field(description="legal entity that decides on the data (GDPR Art. 4(7))")
    purpose: Name = Field(description="the one purpose for which records are admitted")


@final
class StoreSection(_Section):
    """Where state lives."""

    url: str = Field("sqlite:///.discreet/discreet.db", description="sqlite:///PATH (relative to this file) or postgresql+psycopg://...")


@final
class KeysSection(_Section):
    """Where the master key comes from."""

    master: str = Field("file:.discreet/master.key", description="file:PATH, env:NAME or vault+https://HOST/v1/MOUNT/KEY?file=PATH")


@final
class SourceSection(_Section):
    """One `[[source]]`: a body of text, its owner, and who may use it for what."""

    name: Name
    path: str = Field(
        description="file, folder or glob, relative to this file; a URL that fsspec knows (s3://...); with `query`, a database URL or env:NAME of one"
    )
    query: str = Field("", description="SQL that selects the records of a database source, ordered and read in one go")
    format: Literal["jsonl", "csv", "parquet", "text"] = "jsonl"
    text: str = Field("text", description="column that holds the text (format text: the file's content)")
    id: str = Field("id", description="column that identifies the record in its source (format text: the file name)")
    unit: str = Field("", description="column that names the privacy unit, such as patient (format text: the folder of the file)")
    known: dict[str, str] = Field(default_factory=dict, description="label -> column of identifiers of the same subject, e.g. PERSON = 'name'")
    owner: str = Field(description="person or role that answers for the source")
    licence: str = "internal"
    sensitivity: Sensitivity = Sensitivity.SPECIAL
    purposes: tuple[Name, ...] = Field(min_length=1)
    basis: Basis = Field(description="legal basis that covers the records of this source")
    opt_outs: str = Field("", description="file with one privacy unit a line: those who objected or withdrew")
    retention_days: Count = 3650
    residency: str = Field("", description="where the data must stay, e.g. EU")
    role: Literal["train", "public", "evaluation", "canary"] = Field(
        "train",
        description="train: the DP track; public: the non-private track; evaluation: public held-out text; canary: reserved, the audit plants its own",
    )

    @model_validator(mode="after")
    def _public_track_takes_public_text(self) -> SourceSection:
        if self.role in ("public", "evaluation") and self.sensitivity is not Sensitivity.PUBLIC:
            raise ValueError(f"Expected a source with role = '{self.role}' to have sensitivity = 'public', got '{self.sensitivity}'.")
        if not self.unit and self.format != "text" and self.sensitivity is not Sensitivity.PUBLIC:
            raise ValueError("Expected `unit` to name the column of the privacy unit of a source that is not public.")
        return self


@final
class ErasureSection(_Section):
    """How people are forgotten."""

    sources: Literal["rewrite", "retain"] = Field(
        "rewrite",
        description="what happens to the subject's rows in the source files: rewrite removes them; retain leaves them to the owner's own legal ground, and the certificate says so",
    )
    retain: tuple[str, ...] = Field(
        (),
        description="names of sources whose rows stay with their owner while the others are rewritten: databases and object stores, which cannot be rewritten from here",
    )
    backup_days: Annotated[int, Field(ge=0)] = Field(30, description="after so many days no backup holds anybody who is erased today")
    answer_seconds: Annotated[float, Field(ge=0, le=2_592_000)] = Field(
        300.0,
        description="a request is answered a full multiple of so many seconds after its identity was verified, so that the time does not tell who is in; more than the longest erasure takes, 0 for at once",
    )
    journal: str = Field(
        ".discreet/suppressions",
        description="file of suppressions, relative to this file; keep it outside what is backed up, so that no restored backup undoes an erasure",
    )


@final
class AccessSection(_Section):
    """Who may do what. While every list is empty, whoever runs the command holds all roles, and the report says so."""

    owner: tuple[str, ...] = Field((), description="user names of the operating system: open budgets, register sources")
    engineer: tuple[str, ...] = Field((), description="run, train, audit, update, propose a release, search, ask for private answers")
    privacy_officer: tuple[str, ...] = Field((), description="erase, consent, retention, access exports, approve, search")
    auditor: tuple[str, ...] = Field((), description="read the log, the report, the lineage and the evidence")
    product: tuple[str, ...] = Field((), description="serve what was released, read the public report, search, ask for private answers")


@final
class ThresholdSection(_Section):
    """A threshold and what it misses, as `discreet redact calibrate` prints it."""

    least: Share = Field(description="least score that counts")
    miss_rate: tuple[Share, Share] = Field(description="lower and upper limit of the share of values that are missed")
    confidence: Probability = Field(description="probability that all limits of the calibration hold together")
    values: Count = Field(description="labelled values that it was computed from")


@final
class DeidSection(_Section):
    """What happens to identifiers: on the training path, and where other channels are named, on those."""

    policy: Literal["surrogate", "label", "redact"] = Field(
        "surrogate", description="surrogate: consistent stand-ins per subject; label: [PERSON]; redact: removed"
    )
    names: Literal["rules", "model"] = Field("model", description="rules: lists and cues alone; model: the tagger of names as well")
    thresholds: dict[str, Share | ThresholdSection] = Field(
        default_factory=dict,
        description="label -> least score that counts, from `discreet redact calibrate`; on public or separately charged samples only",
    )
    operators: dict[str, dict[str, dict[str, str]]] = Field(
        default_factory=dict, description="channel -> sensitivity, or 'any' -> label -> operator, where it is another than the policy's"
    )
    k: int = Field(0, ge=0, description="quasi-identifiers are made coarser until at least so many people are expected to share them; 0 leaves them")
    labelled: str = Field(
        "", description="JSON Lines of public or generated texts with their identifiers marked: recall and precision are measured on them"
    )


@final
class ModelSection(_Section):
    """Which base model, and which of its parameters learn."""

    base: str = Field("smollm2-135m-instruct", description="smollm2-135m-instruct, tiny, or a folder of a Hugging Face causal LM (safetensors)")
    train: tuple[str, ...] = Field(
        ("lora",),
        description="'lora' for adapters, 'lora_B' for their B matrices alone, 'all', or patterns of parameter names (fnmatch); the rest is frozen",
    )
    lora_rank: Count = 4
    lora_alpha: Positive = 16.0
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    max_tokens: Count = Field(96, description="longest document in tokens; longer ones are cut")


@final
class PrivacySection(_Section):
    """The promise. Hashed into the guarantee."""

    epsilon: Positive = 8.0
    delta: Probability | None = Field(None, description="left out: 1 / (2 * population)")
    allow_large_delta: str = Field("", description="reason for delta >= 1/population, recorded in the log; empty refuses it")
    unit: str = Field("patient", description="what one epsilon protects: everything this unit contributed")
    population: Annotated[int, Field(ge=1)] | None = Field(
        None, description="public estimate of the number of units, canaries included; required to train"
    )
    cap: Count = Field(1, description="documents of one unit used in one step, chosen by keyed hash")
    combine: Literal["sum", "mean"] = Field("sum", description="what of a unit's documents is clipped: their sum or their mean")
    clip_norm: Positive = Field(0.5, description="largest gradient norm of one contribution; with clip_quantile that of the first step")
    clip_quantile: Probability | None = Field(
        None, description="share of the contributions that should lie within the clip norm, which then follows them; the votes are part of the price"
    )
    clip_rate: Positive = Field(0.2, description="how fast the clip norm follows, in logarithm a step")
    votes_noise: Positive | None = Field(None, description="standard deviation of the noise on the votes; left out: expected_batch / 20")
    steps: Count = 25
    expected_batch: Count = Field(64, description="expected number of units in a step (of documents with sampling = 'poisson_documents')")
    sampling: Literal["poisson", "truncated_poisson", "cyclic_poisson", "poisson_documents"] = Field(
        "poisson",
        description="who takes part in a step: units (poisson), at most batch_limit of them (truncated_poisson), one group after the other (cyclic_poisson, with bands), or documents",
    )
    batch_limit: Count | None = Field(None, description="largest number of units in a step; for truncated_poisson, and required there")
    bands: Count | None = Field(None, description="over how many steps the noise is correlated; for cyclic_poisson, and required there")
    target: Literal["budget", "pld"] = Field(
        "budget", description="what epsilon means: the budget's RDP filter admits it, or the tighter PLD figure meets it"
    )


@final
class TrainSection(_Section):
    """Optimisation. Public choices; they do not change the guarantee."""

    learning_rate: Positive = 2e-3
    optimizer: Annotated[str, Field(pattern=r"^[a-z0-9_]{1,32}$")] = Field(
        "adam",
        description="an optimiser of torch.optim in lower case, or adam_corrected (DP-AdamBC: the noise's variance is taken out of the second moment)",
    )
    warmup_steps: int = Field(0, ge=0)
    objective: Literal["likelihood", "preference"] = Field(
        "likelihood", description="likelihood: next tokens; preference: DPO on records that are pairs (docs/mechanisms.md), one loss a pair"
    )
    preference_beta: Positive = Field(0.1, description="with objective = 'preference': smaller lets the model go farther from where it starts")
    public_steps: int = Field(0, ge=0, description="steps of the non-private track on public sources, before the DP track")


@final
class SearchSection(_Section):
    """`[search]`: `discreet train --search` tries several settings of [train]; the whole search is one charge, and only its winner leaves."""

    tries: Literal["negative_binomial", "poisson", "each", "guided"] = Field(
        "negative_binomial", description="how many: drawn (negative_binomial, poisson), every candidate once, or guided by earlier scores"
    )
    mean: Annotated[float, Field(ge=1, allow_inf_nan=False)] = Field(4.0, description="expected number of tries; with guided their number")
    shape: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(1.0, description="of the negative binomial: 1 geometric, 0 logarithmic")
    learning_rate: tuple[Positive, ...] = Field((), description="candidates; none: the one of [train], and without any candidate there is no search")
    optimizer: tuple[str, ...] = Field((), description="candidates; none: the one of [train]")
    warmup_steps: tuple[Annotated[int, Field(ge=0)], ...] = Field((), description="candidates; none: those of [train]")
    score: Literal["public", "private"] = Field("public", description="loss on public held-out text, or a noised mean loss over the units")
    score_epsilon: Positive = Field(0.05, description="with score = 'private': what each try's score costs, part of epsilon")
    score_bound: Positive = Field(6.0, description="with score = 'private': largest loss that one unit counts for, in nats a token")

    @property
    def declared(self) -> bool:
        return bool(self.learning_rate or self.optimizer or self.warmup_steps)


@final
class BudgetSection(_Section):
    """The budget that the run is charged to. Opened once; nothing spent comes back, and only two people raise it."""

    name: Name = "default"
    epsilon: Positive = 8.0
    delta: Probability | None = Field(None, description="left out: the delta of [privacy]")
    periods: Annotated[int, Field(ge=0)] = Field(
        0, description="number of periods, each of which unlocks an equal share; 0: all of it from the start"
    )
    period_days: Positive = Field(91.0, description="length of a period in days, from the opening")
    carry_over: Literal["none", "one", "all"] = Field(
        "none", description="what becomes of an unused share: forfeited, kept for one period more, or kept"
    )


@final
class AuditSection(_Section):
    """How hard the model is attacked before release."""

    canaries: Annotated[int, Field(ge=20)] = 500
    level: Probability = 0.05
    false_positive_rate: Probability = 0.05
    control_epochs: Count = Field(6, description="passes of the non-private control over its canaries; it must be caught")
    control_learning_rate: Positive = 7e-4
    withheld: Annotated[float, Field(ge=0, lt=0.5)] = Field(
        0.0, description="share of people whom a coin keeps out of training, so that real records can be attacked; they must be in none of it"
    )
    people: Count = Field(100, description="people attacked on each side, at most, with two records each")
    references: Annotated[int, Field(ge=0, le=16)] = Field(0, description="reference adapters for LiRA (2 or more) and RMIA, trained on public text")
    neighbours: Annotated[int, Field(ge=0, le=32)] = Field(0, description="edited copies of each record for the neighbourhood attack")
    answers: Annotated[int, Field(ge=0, le=256)] = Field(32, description="texts that the model is let write, to look for identifiers in")
    deployed: tuple[Literal["bfloat16", "q8_0", "q4_0"], ...] = Field(
        (), description="merged children that are audited too, by what their weights are stored as"
    )


@final
class ReleaseSection(_Section):
    """Gates. All must hold, or the model is withheld."""

    verdicts: tuple[Literal["PASS", "INCONCLUSIVE"], ...] = ("PASS",)
    max_epsilon: Positive = Field(8.0, description="largest epsilon (PLD statement) that may leave")


@final
class ServeSection(_Section):
    """The gateway."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8765
    max_request_bytes: Count = 1_000_000
    max_new_tokens: Count = 256


@final
class RetrievalSection(_Section):
    """Search over the de-identified text of the sources with role = "train". Without a purpose there is none."""

    purposes: tuple[Name, ...] = Field(
        (), description="for what may be searched; a record is found for those that its basis covers; none: there is no retrieval"
    )
    reads: dict[Literal["owner", "engineer", "privacy_officer", "auditor", "product"], tuple[Name, ...]] = Field(
        default_factory=dict,
        description="role -> sources whose passages it may read; a role that is not named reads none. Private answers ask for none",
    )


@final
class RunSection(_Section):
    """How fast, never what."""

    threads: int = Field(0, ge=0, description="0: all cores")
    device: Literal["cpu", "cuda"] = "cpu"
    token_budget: Count = Field(2048, description="tokens in one micro-batch")
    rows: Literal["padded", "packed"] = Field(
        "padded", description="padded: one document a row, grouped by length (CPU); packed: several that do not see each other (GPU)"
    )
    checkpoint_every: Count = 1
    weights: Literal["replicated", "sharded"] = Field(
        "replicated", description="under torchrun: every rank holds the model, or its shard of it (FSDP2) with optimiser state and noise"
    )


@final
class Project(_Section):
    """A validated `discreet.toml` and the folder it stands in."""

    root: Path
    project: ProjectSection
    store: StoreSection = StoreSection()
    keys: KeysSection = KeysSection()
    source: tuple[SourceSection, ...] = Field(min_length=1)
    erasure: ErasureSection = ErasureSection()
    access: AccessSection = AccessSection()
    deid: DeidSection = DeidSection()
    model: ModelSection = ModelSection()
    privacy: PrivacySection = PrivacySection()
    train: TrainSection = TrainSection()
    search: SearchSection = SearchSection()
    budget: BudgetSection = BudgetSection()
    audit: AuditSection = AuditSection()
    release: ReleaseSection = ReleaseSection()
    serve: ServeSection = ServeSection()
    retrieval: RetrievalSection = RetrievalSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _names_are_unique(self) -> Project:
        names = [source.name for source in self.source]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"Expected every [[source]] to have its own name, got '{name}' twice.")
        readable = [name for sources in self.retrieval.reads.values() for name in sources]
        for key, named in (("[erasure] retain", self.erasure.retain), ("[retrieval] reads", readable)):
            unknown = sorted(set(named) - set(names))
            if unknown:
                raise ValueError(f"Expected {key} to name sources, got {', '.join(unknown)}.")
        if any(source.role == "canary" for source in self.source):
            raise ValueError("Expected no [[source]] with role = 'canary': the audit plants its own.")
        return self

    @property
    def state(self) -> Path:
        """Folder of everything Discreet writes for this project."""
        return self.root / ".discreet"

    @property
    def purpose(self) -> Purpose:
        return Purpose(self.project.purpose)

    def path(self, relative: str) -> Path:
        """Returns a declared path, resolved against the project's folder."""
        return self.root / relative

    def database_url(self) -> str:
        """Returns the store URL with a relative SQLite path resolved against the project's folder."""
        prefix = "sqlite:///"
        return prefix + str(self.root / self.store.url.removeprefix(prefix)) if self.store.url.startswith(prefix) else self.store.url

    def master_location(self) -> str:
        """Returns the master key's location with a relative file resolved against the project's folder."""
        return f"file:{self.root / self.keys.master.removeprefix('file:')}" if self.keys.master.startswith("file:") else self.keys.master

    def privacy_digest(self) -> Digest:
        """Returns the SHA-256 of `[privacy]` in canonical JSON."""
        return digest_of(self.privacy.model_dump(mode="json"))


def digest_of(value: Any) -> Digest:
    """Returns the SHA-256 of a public value in canonical JSON (sorted keys, no spaces, UTF-8)."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return Digest("sha256:" + hashlib.sha256(canonical.encode()).hexdigest())


def load(folder: Path) -> Project:
    """Reads and validates `discreet.toml` in `folder`.

    Raises:
        SourceMissing: when there is no such file.
        UnknownKey: when a key is not known; the message suggests the nearest.
        ConfigInvalid: when the file is not TOML or a value breaks its rule.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        raise SourceMissing(f"a {FILE_NAME} in this folder", value=str(folder), remedy="Make one with `discreet init DIR`.")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise ConfigInvalid(f"a {FILE_NAME} of at most {MAX_CONFIG_BYTES} bytes")
    try:
        declared = tomllib.loads(path.read_bytes().decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigInvalid(f"{FILE_NAME} to be TOML in UTF-8", value=str(error)) from None
    try:
        return Project.model_validate({**declared, "root": folder.resolve()})
    except ValidationError as error:
        raise _explain(error) from None


def _explain(error: ValidationError) -> ConfigInvalid:
    """Turns pydantic's most telling finding into our error; its input value is configuration, never a person's text."""
    found = error.errors(include_url=False, include_context=False)
    first = next((finding for finding in found if finding["type"] == "extra_forbidden"), found[0])
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        key = str(first["loc"][-1])
        known = list(_known_keys(first["loc"][:-1]))
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        remedy = f"Did you mean '{near[0]}'?" if near else f"Known keys: {', '.join(known)}."
        return UnknownKey(f"a known key in {FILE_NAME}", value=where, remedy=remedy)
    value = first.get("input")
    shown = f"{where} = {value!r}" if isinstance(value, str | int | float | bool) else where
    return ConfigInvalid(f"{FILE_NAME} to be valid: {first['msg'].removeprefix('Value error, ').rstrip('.')}", value=shown or None)


def _known_keys(location: tuple[int | str, ...]) -> Iterator[str]:
    model: Any = Project
    for part in location:
        if isinstance(part, str) and part in getattr(model, "model_fields", {}):
            annotation = model.model_fields[part].annotation
            model = next((a for a in getattr(annotation, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)), annotation)
    return (name for name in getattr(model, "model_fields", {}) if name != "root")
