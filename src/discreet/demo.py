"""The built-in hospital: a corpus that our own grammar writes, with every identifier known.

What: notes and doctor-patient exchanges of 40 to 80 tokens for some 2,000 patients, a public text of the same language about other people, a
held-out text, a list of patients who opted out, and the commented `discreet.toml` that the story runs on. The grammar is data
(`examples/grammar.toml`); names, addresses and mail addresses come from Faker; nothing is copied from a real note.

Why this way: each patient is a function of the public seed and their number alone, so the same call writes the same bytes, and one patient's
documents never depend on another's (PITFALLS 39). The seed is public on purpose: this text concerns nobody.

Guarantees: `CorpusFacts.gold` holds the place of every identifier that the generator wrote, in code points of the text. It measures the recall of the detectors and lies in no file
of the project: whoever is erased is gone from its folder.

Does not cover: real language. Recall and held-out loss on this corpus say that the machinery works, not how well it does on real notes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, final

from faker import Faker

from discreet import dossier, pipeline, report
from discreet.config import FILE_NAME
from discreet.errors import ConfigInvalid, NotFound, NotReleased, TrackRefused
from discreet.evidence.statement import Predicate
from discreet.keys import Stream
from discreet.pipeline import House, Observer
from discreet.store import write_atomically

SEED = "discreet hospital 1"
"""Public seed of the corpus; another seed is another hospital."""

EXAMPLES = ("hospital", "plain")
"""Names that `discreet init --example` knows."""

MIN_TOKENS, MAX_TOKENS = 40, 80
MAX_DOCUMENTS = 8
"""Documents of one patient, at most."""

LABELLED = 200
"""Public texts with their identifiers marked, on which the detectors are measured."""

_CORPUS_FILES = ("notes.jsonl", "public_train.jsonl", "labelled.jsonl", "held_out.jsonl", "opt_outs.txt")
_SIZES = {"patients": 2000, "documents": 5000, "public": 1500, "held_out": 48}
_FAST_SIZES = {"patients": 1500, "documents": 1700, "public": 600, "held_out": 60}
_FAST_SETTINGS = {
    "model.base": '"tiny"',
    "privacy.population": "1700",
    "privacy.steps": "8",
    "privacy.expected_batch": "400",
    "audit.canaries": "300",
    "audit.control_epochs": "16",
    "audit.control_learning_rate": "3e-3",
    "audit.people": "40",
    "audit.references": "2",
    "audit.neighbours": "1",
    "audit.answers": "32",
    "audit.deployed": '["bfloat16", "q8_0"]',
    "train.learning_rate": "3e-2",
    "run.threads": "1",
}

_MARGIN = 3  # of the estimate
_ZIPF = 1.3  # with at most 8 documents a mean of 2.5: most patients have one or two, few have many
_OPT_OUT_SHARE = 0.025
_FIRST_DAY = date(2021, 1, 4)
_DAYS = 1000
_CLINICIANS = 24
_SLOT = re.compile(r"\{([\^-]?)([a-z_0-9]+|[0-9.]+-[0-9.]+)\}")
_AREA_CODES = (
    "201",
    "206",
    "212",
    "215",
    "216",
    "248",
    "303",
    "305",
    "312",
    "313",
    "404",
    "412",
    "415",
    "503",
    "512",
    "602",
    "612",
    "614",
    "617",
    "702",
    "713",
    "718",
    "720",
    "773",
)
_WORD = re.compile(r"\d| (?=\d)|[A-Za-z]+|[^\sA-Za-z\d]|\n")


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Gold:
    """One identifier that the generator wrote: `text[start:end]`, in code points."""

    start: int
    end: int
    label: str


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Somebody who does not exist, with the identifiers that a hospital would hold."""

    unit: str
    first: str
    last: str
    female: bool
    born: date
    mrn: str
    phone: str
    email: str
    address: str

    @property
    def name(self) -> str:
        return f"{self.first} {self.last}"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One generated text with the place of each identifier in it."""

    id: str
    kind: str
    text: str
    gold: tuple[Gold, ...]


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusFacts:
    """What `write_corpus` wrote; `files` maps file name to the SHA-256 of its bytes, `gold` the id of a private document to the places of its identifiers."""

    patients: int
    documents: int
    opted_out: int
    public: int
    held_out: int
    gold: Mapping[str, Sequence[Mapping[str, Any]]]
    files: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Returns the facts as a JSON object."""
        numbers = {name: getattr(self, name) for name in ("patients", "documents", "opted_out", "public", "held_out")}
        return {**numbers, "gold_spans": sum(map(len, self.gold.values())), "files": dict(self.files)}


def write_corpus(
    folder: Path, *, patients: int = 2000, documents: int = 5000, public: int = 1500, held_out: int = 120, seed: str = SEED
) -> CorpusFacts:
    """Writes the hospital into `folder`: the same arguments give the same bytes (with the same version of Faker).

    Files: `notes.jsonl` (private: id, patient, kind, text, name, mrn, dob, phone, email, address), `public_train.jsonl` and `held_out.jsonl` (id,
    kind, text; other people), `labelled.jsonl` (text, spans: the first of the public texts, marked), `opt_outs.txt` (one patient a line).

    Args:
        folder: where to write; made if absent, files of these names are replaced.
        patients: number of patients, >= 1.
        documents: number of private documents, between `patients` and 8 times as many.
        public: number of public training texts, >= 1.
        held_out: number of held-out texts, >= 1.
        seed: public name of the hospital.

    Raises:
        ConfigInvalid: when the numbers do not fit each other.
    """
    if min(patients, public, held_out) < 1 or not patients <= documents <= MAX_DOCUMENTS * patients:
        raise ConfigInvalid(
            f"patients, public, held_out >= 1 and patients <= documents <= {MAX_DOCUMENTS} * patients",
            value=f"patients={patients} documents={documents} public={public} held_out={held_out}",
        )
    folder.mkdir(parents=True, exist_ok=True)
    draw = Draw(Stream(hashlib.sha256(seed.encode()).digest()))
    staff = _staff(draw.fork("staff"))
    notes, gold = _private(draw, patients=patients, documents=documents, staff=staff)
    opted_out = _opted_out(draw.fork("opt-outs"), patients)
    strangers, marked = _strangers(draw.fork("public"), public, prefix="pub", staff=staff)
    unseen, _ = _strangers(draw.fork("held-out"), held_out, prefix="held", staff=_staff(draw.fork("other staff")))
    written = {
        "notes.jsonl": _lines(notes),
        "public_train.jsonl": _lines(strangers),
        "labelled.jsonl": _lines(marked[:LABELLED]),
        "held_out.jsonl": _lines(unseen),
        "opt_outs.txt": "".join(f"{unit}\n" for unit in opted_out),
    }
    for name, content in written.items():
        (folder / name).write_text(content, encoding="utf-8", newline="\n")
    return CorpusFacts(
        patients=patients,
        documents=len(notes),
        opted_out=len(opted_out),
        public=public,
        held_out=held_out,
        gold={row["id"]: row["spans"] for row in gold},
        files={name: hashlib.sha256(content.encode()).hexdigest() for name, content in written.items()},
    )


def write_config(folder: Path, *, example: str, settings: Mapping[str, str] | None = None) -> Path:
    """Writes the commented `discreet.toml` of an example and returns its path.

    Args:
        folder: the project's folder; made if absent.
        example: one of `EXAMPLES`.
        settings: "section.key" -> TOML literal, put in place of the example's own value ("model.base" -> '"tiny"'); comments stay.

    Raises:
        NotFound: when there is no such example.
        ConfigInvalid: when the folder already has a `discreet.toml`, or a setting names a line that the example does not have.
    """
    if example not in EXAMPLES:
        raise NotFound(f"an example called {' or '.join(EXAMPLES)}", value=example)
    path = folder / FILE_NAME
    if path.exists():
        raise ConfigInvalid(
            f"a folder without a {FILE_NAME}", value=str(folder), remedy="Choose another folder; an existing project is never overwritten."
        )
    content = (resources.files("discreet") / "examples" / f"{example}.toml").read_text(encoding="utf-8")
    for key, literal in (settings or {}).items():
        content = _with_setting(content, key, literal)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.encode())
    return path


def estimated_tokens(text: str) -> int:
    """Returns about how many SmolLM2 tokens the text has (mean error 0.6, standard deviation 2.6 on this corpus).

    Each digit, the space before a number, each mark and each started seven letters of a word count one.
    """
    return sum(1 + (len(piece) - 1) // 7 for piece in _WORD.findall(text))


@final
class Draw:
    """Choices from a public stream: what a dice would do, the same for everybody. Never used where a secret is needed."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def fork(self, *path: str | int) -> Draw:
        """Returns independent choices named by `path`."""
        return Draw(self._stream.fork(*path))

    def below(self, bound: int) -> int:
        """Returns a whole number in [0, bound), bound < 2**32 (64 bits folded: the bias is below 2**-32)."""
        return int.from_bytes(self._stream.bytes(8), "big") % bound

    def choice(self, options: Sequence[str]) -> str:
        """Returns one of the options."""
        return options[self.below(len(options))]

    def weighted(self, weights: Sequence[float]) -> int:
        """Returns an index with probability proportional to its weight."""
        point = self.below(1 << 31) / (1 << 31) * sum(weights)
        for index, weight in enumerate(weights):
            point -= weight
            if point < 0:
                return index
        return len(weights) - 1

    def faker(self) -> Faker:
        """Returns Faker's own generator, seeded from here."""
        fake = _faker()
        fake.seed_instance(self.below(1 << 31))
        return fake


@cache
def _faker() -> Faker:
    return Faker("en_US")


@cache
def _grammar() -> dict[str, Any]:
    return tomllib.loads((resources.files("discreet") / "examples" / "grammar.toml").read_text(encoding="utf-8"))


def _with_setting(content: str, key: str, literal: str) -> str:
    """Replaces the value of one `key = value` line of a section, and nothing else."""
    section, _, name = key.rpartition(".")
    pattern = re.compile(rf"(^\[{re.escape(section)}\]\n(?:(?!\[).*\n)*?{re.escape(name)} = )([^\n#]*?)( *(?:#.*)?)$", re.MULTILINE)
    changed, count = pattern.subn(lambda found: found[1] + literal + found[3], content, count=1)
    if count != 1:
        raise ConfigInvalid("a setting that the example has", value=key)
    return changed


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _staff(draw: Draw) -> tuple[str, ...]:
    fake = draw.faker()
    return tuple(f"{fake.first_name()} {fake.last_name()}" for _ in range(_CLINICIANS))


def _private(draw: Draw, *, patients: int, documents: int, staff: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows of the private source and, apart from them, the gold spans."""
    counts = _counts(draw.fork("counts"), patients=patients, documents=documents)
    notes: list[dict[str, Any]] = []
    gold: list[dict[str, Any]] = []
    for number, count in enumerate(counts):
        own = draw.fork("patient", number)
        person = _person(own, number)
        columns = {
            "name": person.name,
            "mrn": person.mrn,
            "dob": person.born.isoformat(),
            "phone": person.phone,
            "email": person.email,
            "address": person.address,
        }
        for document in _documents(own, person, count, staff=staff):
            notes.append({"id": document.id, "patient": person.unit, "kind": document.kind, "text": document.text} | columns)
            gold.append({"id": document.id, "spans": _spans(document)})
    return notes, gold


def _spans(document: Document) -> list[dict[str, Any]]:
    return [{"start": g.start, "end": g.end, "label": g.label} for g in document.gold]


def _strangers(draw: Draw, count: int, *, prefix: str, staff: tuple[str, ...]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns texts about people who are not patients, one text each; and the same texts with their identifiers marked."""
    rows, marked = [], []
    for number in range(count):
        own = draw.fork(number)
        document = next(_documents(own, _person(own, number), 1, staff=staff))
        rows.append({"id": f"{prefix}-{number:05d}", "kind": document.kind, "text": document.text})
        marked.append({"text": document.text, "spans": _spans(document)})
    return rows, marked


def _opted_out(draw: Draw, patients: int) -> list[str]:
    """Returns the patients who opted out: 2.5 % of them, at least one, in the order of their numbers."""
    chosen: set[int] = set()
    while len(chosen) < max(1, round(_OPT_OUT_SHARE * patients)):
        chosen.add(draw.below(patients))
    return [_unit(number) for number in sorted(chosen)]


def _counts(draw: Draw, *, patients: int, documents: int) -> list[int]:
    """Returns the number of documents of each patient: Zipf-like on 1..8, moved one by one until the sum is `documents`."""
    weights = [k**-_ZIPF for k in range(1, MAX_DOCUMENTS + 1)]
    counts = [1 + draw.weighted(weights) for _ in range(patients)]
    step = 1 if sum(counts) < documents else -1
    while sum(counts) != documents:
        number = draw.below(patients)
        if 1 <= counts[number] + step <= MAX_DOCUMENTS:
            counts[number] += step
    return counts


def _unit(number: int) -> str:
    return f"P-{number:05d}"


def _person(draw: Draw, number: int) -> Person:
    """Returns the person with this number: a function of the seed and the number alone."""
    fake = draw.faker()
    female = draw.below(100) < 52
    first = fake.first_name_female() if female else fake.first_name_male()
    last = fake.last_name()
    handle = f"{first}.{last}" if draw.below(2) else f"{first[0]}{last}{draw.below(90) + 10}"
    return Person(
        unit=_unit(number),
        first=first,
        last=last,
        female=female,
        born=date(1934, 1, 1) + timedelta(days=draw.below(71 * 365)),
        mrn=f"{draw.below(90_000_000) + 10_000_000}",
        phone=f"{draw.choice(_AREA_CODES)}-555-{draw.below(10_000):04d}",
        email=f"{handle.lower()}@{draw.choice(('example.com', 'example.org', 'example.net', 'mail.example.com'))}",
        address=f"{fake.building_number()} {fake.street_name()}, {fake.city()}",
    )


def _documents(draw: Draw, person: Person, count: int, *, staff: tuple[str, ...]) -> Iterator[Document]:
    """Yields the person's documents: the same one or two illnesses through all of them, later visits later."""
    conditions = [draw.below(len(_grammar()["condition"])) for _ in range(1 + draw.below(2))]
    day = _FIRST_DAY + timedelta(days=draw.below(_DAYS))
    for number in range(count):
        own = draw.fork("document", number)
        writer = _Writer(own, person, visit=day, condition=_grammar()["condition"][conditions[number % len(conditions)]], staff=staff)
        kind = own.choice(("note", "exchange"))
        text, gold = writer.write(kind)
        yield Document(id=f"{person.unit}-{number + 1}", kind=kind, text=text, gold=gold)
        day += timedelta(days=7 + own.below(120))


@final
class _Writer:
    """Expands the grammar for one document and remembers where it wrote an identifier."""

    def __init__(self, draw: Draw, person: Person, *, visit: date, condition: Mapping[str, Sequence[str]], staff: tuple[str, ...]) -> None:
        self._draw = draw
        self._phrases: dict[str, Sequence[str]] = {**_grammar()["phrases"], **condition}
        self._facts, self._words = self._known(person, visit, staff)
        self._parts: list[str] = []
        self._length = 0
        self._gold: list[Gold] = []
        self._asked = 0

    def write(self, kind: str) -> tuple[str, tuple[Gold, ...]]:
        """Returns a text of 40 to 80 tokens and its gold spans; a text outside is thrown away and written again."""
        while True:
            self._parts, self._length, self._gold = [], 0, []
            self._expand(self._draw.choice(_grammar()["forms"][kind]), capital=False)
            text = "".join(self._parts)
            if MIN_TOKENS + _MARGIN <= estimated_tokens(text) <= MAX_TOKENS - _MARGIN:
                return text, tuple(self._gold)

    def _known(self, person: Person, visit: date, staff: tuple[str, ...]) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
        """Returns slot -> (label, value) for what identifies somebody, and slot -> word for what does not."""
        day_format = self._draw.choice(("%Y-%m-%d", "%m/%d/%Y", "%d %B %Y", "%b %d, %Y"))
        fake = self._draw.faker()
        digits = person.phone.replace("-", "")
        phone = self._draw.choice(
            (
                person.phone,
                f"({digits[:3]}) {digits[3:6]}-{digits[6:]}",
                f"{digits[:3]}.{digits[3:6]}.{digits[6:]}",
                f"{digits[:3]} {digits[3:6]} {digits[6:]}",
            )
        )
        female_relative = bool(self._draw.below(2))
        facts = {
            "name": ("PERSON", person.name),
            "first": ("PERSON", person.first),
            "last": ("PERSON", person.last),
            "relative": ("PERSON", fake.first_name_female() if female_relative else fake.first_name_male()),
            "clinician": ("PERSON", self._draw.choice(staff).split()[1]),
            "mrn": ("MRN", person.mrn),
            "phone": ("PHONE", phone),
            "email": ("EMAIL", person.email),
            "address": ("ADDRESS", person.address),
            "dob": ("DATE", person.born.strftime(day_format)),
            "visit": ("DATE", visit.strftime(day_format)),
            "visit2": ("DATE", (visit - timedelta(days=3 + self._draw.below(40))).strftime(day_format)),
            "next_visit": ("DATE", (visit + timedelta(days=7 + self._draw.below(90))).strftime(day_format)),
        }
        sex, pronoun, him, title = ("woman", "she", "her", "Ms.") if person.female else ("man", "he", "him", "Mr.")
        words = {"sex": sex, "he": pronoun, "him": him, "mr": title, "age": str((visit - person.born).days // 365)}
        words["relation"] = self._draw.choice(_grammar()["phrases"]["relation_female" if female_relative else "relation_male"])
        return facts, words

    def _expand(self, phrase: str, *, capital: bool) -> None:
        """Writes a phrase: its literal parts as they are, its slots expanded; `capital` raises the first letter written."""
        at = 0
        for found in _SLOT.finditer(phrase):
            self._write(phrase[at : found.start()], capital=capital and at == 0)
            self._slot(found[2], mark=found[1] or ("^" if capital and found.start() == 0 else ""))
            at = found.end()
        self._write(phrase[at:], capital=capital and at == 0)

    def _slot(self, name: str, *, mark: str) -> None:
        """Writes what stands in a slot: an identifier with its gold span, a word, a number, or a phrase of a table."""
        if name in self._facts:
            label, value = self._facts[name]
            self._gold.append(Gold(start=self._length, end=self._length + len(value), label=label))
            self._write(value, capital=False)
        elif name in self._words:
            self._write(self._words[name], capital=mark == "^")
        elif name[0].isdigit():
            self._write(self._number(name), capital=False)
        else:
            phrase = self._phrase(name)
            self._expand(re.sub(r"^(a|an) ", "", phrase) if mark == "-" else phrase, capital=mark == "^")

    def _phrase(self, name: str) -> str:
        """Returns a phrase of the table, one that was not written before where there is one; an answer fits the last question."""
        options = self._phrases["finding" if name == "finding2" else name]
        if name == "ask":
            self._asked = self._draw.below(len(options))
            return options[self._asked]
        if name == "answer":
            return self._draw.choice([options[self._asked], options[self._asked], options[self._asked], *options[len(self._phrases["ask"]) :]])
        written = "".join(self._parts).lower()
        fresh = [option for option in options if "{" in option or option.lower() not in written]
        return self._draw.choice(fresh or options)

    def _number(self, bounds: str) -> str:
        """Returns a number between the bounds: tenths if they have a decimal, else in the largest round step that divides both."""
        low, _, high = bounds.partition("-")
        if "." in low:
            tenths = round(float(low) * 10) + self._draw.below(round(float(high) * 10) - round(float(low) * 10) + 1)
            return f"{tenths / 10:.1f}"
        step = next(step for step in (250, 100, 25, 10, 5, 1) if int(low) % step == 0 == int(high) % step)
        return str(int(low) + step * self._draw.below((int(high) - int(low)) // step + 1))

    def _write(self, text: str, *, capital: bool) -> None:
        if text:
            self._parts.append(text[0].upper() + text[1:] if capital else text)
            self._length += len(text)


# The story


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How the story ended: what the last screen and `--json` show."""

    folder: Path
    facts: CorpusFacts
    result: Mapping[str, Any]
    refused: int
    utility: Mapping[str, Any]
    evidence: Mapping[str, Any]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Returns the document of schemas/demo.json."""
        audited, released = self.result["audit"], self.result["release"]
        return {
            "sentence": self.result["sentence"],
            "guarantee": self.result["train"]["guarantee"],
            "verdict": audited["verdict"],
            "decision": released["decision"],
            "evidence": dict(self.evidence),
            "seconds": round(self.seconds, 1),
            "corpus": {
                "patients": self.facts.patients,
                "documents": self.facts.documents,
                "opted_out": self.facts.opted_out,
                "refused": self.refused,
            },
            "loss": dict(self.utility),
            "recitation": audited["recitation"],
            "report": self.result["report"],
            "folder": str(self.folder),
        }

    def lines(self) -> list[str]:
        """Returns the last screen."""
        audited, said = self.result["audit"], self.result["audit"]["recitation"]
        loss, example = self.utility, said["example"]
        return [
            "",
            self.result["sentence"],
            "",
            f"refused    {self.refused} documents of {self.facts.opted_out} patients who opted out",
            f"learned    held-out loss {loss['before']:.3f} -> {loss['private']:.3f} private, {loss['control']:.3f} non-private control: "
            + (f"{100 * loss['gain_share']:.0f} % of the gain" if loss["gain_share"] is not None else "the control gained nothing"),
            f"audit      {audited['verdict']}: certified epsilon >= {audited['epsilon_lower']:.2f} (could have shown up to {audited['ceiling']:.2f})",
            f"recited    control {said['control']} of {said['tried']} canaries, private model {said['private']} of {said['tried']}",
            f"  prompt   {example['prompt']}",
            f"  control  {example['control']}",
            f"  private  {example['private']}",
            f"evidence   {'VALID' if self.evidence['valid'] else 'BROKEN'}: {self.evidence['statements']} signed statements, verified offline with {self.evidence['key']}",
            f"report     {self.result['report']}",
            f"time       {self.seconds:.0f} s",
            "",
            f"next       discreet serve -C {self.folder}      discreet trace DIGEST -C {self.folder}",
        ]


def init_project(folder: Path, *, example: str) -> list[str]:
    """Makes a project folder: the commented discreet.toml, and for the hospital its corpus. Returns the names of the files.

    Raises:
        NotFound: when there is no such example.
        ConfigInvalid: when the folder already is a project.
    """
    if example == "hospital":
        _check_free(folder)
    write_config(folder, example=example)
    return [FILE_NAME, *(write_corpus(folder).files if example == "hospital" else ())]


def tell(folder: Path, *, fast: bool, observer: Observer) -> Outcome:
    """Runs the whole story in `folder`, or continues it where it was stopped.

    Args:
        folder: of the demo project; made if absent.
        fast: a tiny model and a smaller hospital.
        observer: hears the progress.

    Raises:
        Refused: when a gate does not hold (the model is withheld), or the corpus is not the generated one.
    """
    began = time.monotonic()
    sizes = _FAST_SIZES if fast else _SIZES
    if not (folder / FILE_NAME).exists():
        observer.stage("corpus")
        _check_free(folder)
        write_corpus(folder, **sizes, seed=SEED)
        write_config(folder, example="hospital", settings=_FAST_SETTINGS if fast else {})
    with pipeline.open_house(folder) as house:
        facts = _generated(house, sizes)
        trained = pipeline.run(house, until="train", observer=observer)["train"]
        utility = _utility(house, trained, facts, observer)
        try:
            result = pipeline.run(house, until=None, observer=observer)
        except NotReleased:
            report.write(house.log, house.project.root)
            raise
        written = report.write(house.log, house.project.root)
        sentence = report.of(house.log).sentence
        evidence = _verified_offline(house)
        refused = sum(len(entry.subjects) for entry in house.log.select(Predicate.REFUSED))
    return Outcome(
        folder=folder,
        facts=facts,
        result=result | {"report": str(written[0]), "sentence": sentence},
        refused=refused,
        utility=utility,
        evidence=evidence,
        seconds=time.monotonic() - began,
    )


def remove(folder: Path) -> None:
    """Deletes an earlier demo.

    Raises:
        ConfigInvalid: when the folder holds another project.
    """
    path = folder / FILE_NAME
    if not path.is_file() or "Riverside General Hospital (generated)" not in path.read_text(encoding="utf-8"):
        raise ConfigInvalid("the folder of an earlier demo", value=str(folder), remedy="--fresh deletes nothing else.")
    shutil.rmtree(folder)


def _check_free(folder: Path) -> None:
    """Refuses to write a corpus over files that are somebody's. A corpus without a project is what a killed demo left behind: it is written again."""
    stranger = next((path for path in folder.glob("*") if path.name not in (*_CORPUS_FILES, FILE_NAME)), None)
    if stranger is not None:
        raise ConfigInvalid("an empty folder for the demo", value=stranger.name, remedy="Choose another folder with --dir.")


def _generated(house: House, sizes: Mapping[str, int]) -> CorpusFacts:
    """Writes the corpus again elsewhere and compares: the only proof that text concerns nobody is that our own code wrote it.

    Raises:
        TrackRefused: when a file of the project is not what the generator writes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        facts = write_corpus(Path(scratch), **sizes, seed=SEED)
    for section in house.project.source:
        if hashlib.sha256(house.project.path(section.path).read_bytes()).hexdigest() != facts.files.get(section.path):
            raise TrackRefused(
                "the generated corpus of the demo, byte for byte",
                value=section.name,
                remedy="Own data runs with `discreet run`, without a non-private control.",
            )
    return facts


def _utility(house: House, trained: Mapping[str, Any], facts: CorpusFacts, observer: Observer) -> dict[str, Any]:
    """Trains the same adapter on the same text without privacy, to say what privacy cost. Exists only because `_generated` held."""
    curve = pipeline.utility_control(house, generated=facts.files, observer=observer)
    before, private, control = trained["curve"][0][1], trained["curve"][-1][1], curve[-1][1]
    return {
        "before": before,
        "private": private,
        "control": control,
        "gain_share": (before - private) / (before - control) if control < before else None,
    }


def _verified_offline(house: House) -> dict[str, Any]:
    """Exports the evidence and verifies it as a stranger would: from the bundle and the public key alone."""
    bundle, key = dossier.export(house.log, house.store, house.project.root / "evidence", public=False)
    verified = dossier.verify(bundle, public_key=key.read_text())
    return {"valid": True, "failed": [], "statements": len(verified.entries), "bundle": str(bundle), "key": str(key)}
