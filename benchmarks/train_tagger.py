"""Trains the name tagger of `discreet.deid.ner` and writes its weights. About a quarter of an hour on one CPU core.

    python benchmarks/train_tagger.py --data DATA --out src/discreet/deid/tagger.safetensors [--minutes 12]
    python benchmarks/train_tagger.py --data DATA --check

Text: sentences made from `tagger/templates.txt` with names of Faker's Latin locales, names put together from syllables, places and organisations; the sentences of MTS-Dialog (CC BY 4.0) in
which the rules find no name; WNUT17 train, the Broad Twitter Corpus, wikigold, re3d (CC BY 4.0, OGL and public domain), MEDDOCAN train (CC BY 4.0, Spanish); functions of
TheAlgorithms/Python (MIT); SEC-filings FIN5 (CC BY 3.0); presidio_research, one template in four (MIT). Every labelled sentence is also shown with other names in its place, and some of them in capitals or without any.
Held out, never trained on: presidio_research but for one template in four, aci_phi_synth, WNUT17 dev and test, the last tenth of wikigold. `--check` prints token precision, recall and F2 for them.

DATA is a folder with those sets in the form of docs/tagger.md. Needs torch (extra train) and faker. The seed is fixed; thread counts and library versions can still change the last bits.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import faker
import numpy as np
import torch
from safetensors.numpy import save_file
from torch import nn

from discreet.deid import ner
from discreet.deid.normalise import fold

Sentence = tuple[str, list[tuple[int, int, str]]]
HERE = Path(__file__).parent
LOCALES = [
    "en_US",
    "en_GB",
    "en_US",
    "en_GB",
    "en_AU",
    "en_CA",
    "en_IE",
    "en_IN",
    "en_US",
    "en_NZ",
    "de_DE",
    "de_AT",
    "fr_FR",
    "fr_CA",
    "es_ES",
    "es_MX",
    "es_CO",
    "it_IT",
    "nl_NL",
    "pl_PL",
    "pt_BR",
    "pt_PT",
    "sv_SE",
    "no_NO",
    "da_DK",
    "fi_FI",
    "cs_CZ",
    "sk_SK",
    "hu_HU",
    "ro_RO",
    "hr_HR",
    "sl_SI",
    "et_EE",
    "lt_LT",
    "lv_LV",
    "tr_TR",
    "id_ID",
    "fil_PH",
    "en_PK",
    "en_NG",
    "yo_NG",
    "vi_VN",
    "zu_ZA",
    "tw_GH",
    "sw",
    "ga_IE",
    "en_KE",
]
LEARNED = {
    "PER": "PERSON", "person": "PERSON", "Person": "PERSON", "LOC": "LOCATION", "location": "LOCATION", "Location": "LOCATION", "ORG": "ORG", "corporation": "ORG", "group": "ORG",
    "Organisation": "ORG", "NOMBRE_SUJETO_ASISTENCIA": "PERSON", "NOMBRE_PERSONAL_SANITARIO": "PERSON", "TERRITORIO": "LOCATION", "PAIS": "LOCATION", "HOSPITAL": "ORG", "INSTITUCION": "ORG",
    "CENTRO_SALUD": "ORG", "CALLE": "ADDRESS", "STREET_ADDRESS": "ADDRESS", "ADDRESS": "ADDRESS", "ZIP_CODE": "ADDRESS", "NAME": "PERSON", "CITY": "LOCATION", "EMPLOYER": "ORG", "PERSON": "PERSON", "GPE": "LOCATION", "ORGANIZATION": "ORG",
}  # fmt: skip
ORG_ENDS = (
    "Inc", "Inc.", "LLC", "Ltd", "Ltd.", "Corp", "Corporation", "Group", "GmbH", "AG", "S.A.", "plc", "Partners", "Holdings", "Bank", "Industries", "Foundation", "Logistics", "Insurance", "Airlines", "Motors",
    "Pharmacy", "Labs", "Technologies", "Systems", "and Sons", "& Co", "Brothers", "Media", "Daily News", "Post", "Construction", "Foods", "Consulting", "Law Group", "Credit Union", "Union", "Times",
)  # fmt: skip
HOSPITAL_ENDS = (
    "General Hospital", "Memorial Hospital", "Medical Center", "Clinic", "Hospital", "Regional Medical Center", "Community Hospital", "Children's Hospital", "Health System", "Family Practice", "University Hospital",
    "Cancer Center", "Health Centre", "Nursing Home", "Rehabilitation Center", "Imaging", "Dental", "Hospice", "Internal Medicine", "Orthopedics", "Infirmary", "Medical Group", "VA Medical Center",
)  # fmt: skip
SCHOOLS = (
    "University of {c}",
    "{c} University",
    "{l} College",
    "{c} High School",
    "{l} Elementary School",
    "{c} State University",
    "Technical University of {c}",
    "{l} Academy",
    "{c} School District",
)
COURTS = (
    "{c} District Court", "{c} Regional Court", "District Court of {c}", "Court of Appeal of {c}", "{c} Court of Appeal", "Supreme Court", "Supreme Court of {n}", "Constitutional Court", "{c} City Court", "High Court",
    "{c} Administrative Court", "Ministry of Justice", "Ministry of Foreign Affairs", "Ministry of the Interior", "{c} Public Prosecutor", "{c} Police Department", "{c} Assize Court", "Court of Cassation", "Federal Court",
    "{c} Crown Court", "{c} County Court", "{c} Regional Administrative Court", "Department of Health", "{n} Embassy", "{c} Magistrate's Court", "National Security Court", "Ministry of Finance", "{c} City Council",
    "European Court of Human Rights", "House of Lords", "{c} Sheriff's Office", "Court of First Instance", "State Security Court", "Legal Aid Board", "Prison Board", "Parole Board", "Securities Commission",
)  # fmt: skip
DEMONYM_FREE = [
    "Poland",
    "Turkey",
    "France",
    "Germany",
    "Italy",
    "Spain",
    "Russia",
    "Ukraine",
    "Austria",
    "Sweden",
    "Norway",
    "Finland",
    "Denmark",
    "Greece",
    "Romania",
    "Hungary",
    "Bulgaria",
    "Croatia",
    "Serbia",
    "Slovenia",
    "Moldova",
    "Georgia",
    "Armenia",
    "Azerbaijan",
    "Malta",
    "Cyprus",
    "Ireland",
    "Iceland",
    "Portugal",
    "Switzerland",
    "Belgium",
    "Latvia",
    "Lithuania",
    "Estonia",
    "Albania",
    "England",
    "Scotland",
    "Wales",
    "USA",
    "U.S.",
    "UK",
    "U.K.",
    "Mexico",
    "Canada",
    "Brazil",
    "Peru",
    "Chile",
    "China",
    "Japan",
    "India",
    "Pakistan",
    "Syria",
    "Iraq",
    "Iran",
    "Israel",
    "Egypt",
    "Morocco",
    "Kenya",
    "Nigeria",
    "Ghana",
    "Vietnam",
    "Thailand",
    "Australia",
    "California",
    "Texas",
    "Florida",
    "Ohio",
    "Virginia",
    "Illinois",
    "Georgia",
    "Michigan",
    "Oregon",
    "Utah",
    "Arizona",
    "Iowa",
    "CA",
    "NY",
    "TX",
    "MA",
]
STATES = [
    "AL", "AK", "AZ", "AR", "CA", "CO", "CT", "DE", "FL", "GA", "HI", "ID", "IL", "IN", "IA", "KS", "KY", "LA", "ME", "MD", "MA", "MI", "MN", "MS", "MO", "MT", "NE", "NV", "NH", "NJ", "NM", "NY", "NC", "ND", "OH", "OK", "OR", "PA", "RI", "SC", "SD", "TN", "TX", "UT", "VT", "VA", "WA", "WV", "WI", "WY", "DC",
    "Texas", "California", "Ohio", "Florida", "Bavaria", "Ontario", "Quebec", "Alberta", "Tuscany", "Normandy", "Kent", "Essex", "Queensland", "Victoria", "Catalonia", "Bohemia", "Upper Austria",
]  # fmt: skip
STREETS = (
    "Street",
    "St",
    "St.",
    "Road",
    "Rd",
    "Avenue",
    "Ave",
    "Lane",
    "Drive",
    "Dr",
    "Court",
    "Place",
    "Way",
    "Close",
    "Crescent",
    "Square",
    "Terrace",
    "Hill",
    "Flats",
    "Dale",
    "Isle",
    "Turnpike",
    "Pass",
    "Loop",
)
NATIONALITIES = (
    "Polish", "Turkish", "French", "German", "Italian", "Spanish", "Russian", "Ukrainian", "Austrian", "Swedish", "Norwegian", "Finnish", "Danish", "Greek", "Romanian", "Hungarian", "Bulgarian", "Croatian", "Serbian",
    "American", "British", "Irish", "Scottish", "Mexican", "Canadian", "Brazilian", "Chinese", "Japanese", "Indian", "Iranian", "Kenyan", "Nigerian", "Vietnamese", "Australian", "Moldovan", "Czech", "Slovak", "Dutch",
    "Portuguese", "Armenian", "Georgian", "Syrian", "Iraqi", "Egyptian", "Moroccan",
)  # fmt: skip
MEDICINES = [
    "Metformin",
    "Lisinopril",
    "Atorvastatin",
    "Lipitor",
    "Norvasc",
    "Amlodipine",
    "Protonix",
    "Lasix",
    "Bumex",
    "Prednisone",
    "Tylenol",
    "Ibuprofen",
    "Zoloft",
    "Lexapro",
    "Synthroid",
    "Levothyroxine",
    "Warfarin",
    "Eliquis",
    "Xarelto",
    "Plavix",
    "Aspirin",
    "Albuterol",
    "Flonase",
    "Singulair",
    "Gabapentin",
    "Tramadol",
    "Percocet",
    "Norco",
    "Mobic",
    "Meloxicam",
    "Humira",
    "Enbrel",
    "Ozempic",
    "Jardiance",
    "Farxiga",
    "Insulin",
    "Lantus",
    "Amoxicillin",
    "Augmentin",
    "Keflex",
    "Doxycycline",
    "Bactrim",
    "Cipro",
    "Zofran",
    "Miralax",
    "Nexium",
    "Prilosec",
    "Allopurinol",
    "Colchicine",
    "Coreg",
    "Toprol",
    "Diovan",
    "Losartan",
    "Cozaar",
    "Digoxin",
    "Entresto",
    "Keppra",
    "Lyrica",
    "Topamax",
    "Imitrex",
    "Claritin",
    "Zyrtec",
    "Benadryl",
    "Vancomycin",
    "Rocephin",
]


# Names ------------------------------------------------------------------------------------------------------------------------------------------------------


class Names:
    """Draws people, places and organisations."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.fakes = [faker.Faker(code) for code in LOCALES]
        for index, fake in enumerate(self.fakes):
            fake.seed_instance(1000 + index)
        self.pools: defaultdict[object, list[str]] = defaultdict(list)
        listed = list(ner._lists()[0])
        self.words = [w for w in sorted(ner._lists()[1]) if 3 < len(w) < 12 and w not in listed]
        self.starts = [n[: rng.choice((2, 3, 4))] for n in listed if len(n) > 4]
        self.ends = [n[-rng.choice((2, 3, 4)) :] for n in listed if len(n) > 4]
        self.cities = [fake.city() for fake in self.fakes for _ in range(160)]
        self.cities = [town.upper() if index % 12 == 0 else town for index, town in enumerate(self.cities)]
        self.countries = [self.fakes[0].country() for _ in range(400)] + DEMONYM_FREE * 2

    def made(self) -> str:
        return (self.rng.choice(self.starts) + self.rng.choice(("", "", "a", "e", "i", "o")) + self.rng.choice(self.ends)).capitalize()

    def first(self) -> str:
        return self.made() if self.rng.random() < 0.2 else self._latin(lambda fake: fake.first_name())

    def last(self) -> str:
        name = self.made() if self.rng.random() < 0.35 else self._latin(lambda fake: fake.last_name())
        draw = self.rng.random()
        return (
            f"{name}-{self.last()}"
            if draw < 0.04
            else f"Mc{name}"
            if draw < 0.05
            else f"O'{name}"
            if draw < 0.06
            else f"{self.rng.choice(('de', 'van', 'von', 'Van', 'De', 'da', 'al'))} {name}"
            if draw < 0.09
            else name
        )

    def person(self) -> str:
        first, last, draw = self.first(), self.last(), self.rng.random()
        initial = self.rng.choice("ABCDEFGHJKLMNPRSTW")
        if draw < 0.62:
            return f"{first} {last}"
        if draw < 0.72:
            return f"{first} {initial}. {last}"
        if draw < 0.78:
            return f"{initial}. {last}"
        if draw < 0.82:
            return f"{initial}.{self.rng.choice('ABDEFGHJKLMNPRST')}. {last}"
        if draw < 0.90:
            return f"{first} {self.first()} {last}"
        return (
            f"{last}, {first}"
            if draw < 0.94
            else f"{first} {last} {self.last()}"
            if draw < 0.97
            else f"{first} {last} {self.rng.choice(('Jr.', 'Jr', 'III', 'Sr.'))}"
        )

    def place(self) -> str:
        draw = self.rng.random()
        name = self.rng.choice(self.cities)
        if draw < 0.12:
            name = self.last() + self.rng.choice(
                ("ville", "ton", "burg", "field", " Falls", " Springs", " Hills", " Beach", " County", "stad", "ham")
            )
        return f"{self.rng.choice(('North', 'New', 'Port', 'East', 'Lake', 'San', 'Saint', 'St.'))} {name}" if draw > 0.95 else name

    def country(self) -> str:
        return self.rng.choice(self.countries)

    def organisation(self) -> str:
        draw = self.rng.random()
        if draw < 0.25:
            return self._latin(lambda fake: fake.company())
        if draw < 0.35:
            words = [w.capitalize() for w in self.rng.sample(self.words, self.rng.choice((1, 2, 2, 3)))]
            name = "".join(words[:2]).capitalize() if self.rng.random() < 0.3 else " ".join(words)
            return name + self.rng.choice(
                ("", "", "", " Inc", " Group", " Software", " Lines", " Media", " Agency", " Society", " Incorporated", " Fund", " Club")
            )
        if draw < 0.55:
            return f"{self.rng.choice((self.last, self.place, self.made))()} {self.rng.choice(ORG_ENDS)}"
        if draw < 0.65:
            return f"{self.last()} {self.rng.choice(('&', 'and'))} {self.last()}"
        if draw < 0.77:
            return self.fill(self.rng.choice(SCHOOLS))
        if draw < 0.83:
            return "".join(self.rng.choice("ABCDEFGHIKLMNOPRSTUVW") for _ in range(self.rng.choice((3, 3, 4))))
        return self.made() + self.rng.choice(("soft", "tech", "corp", "ex", "", "ify", " Solutions", "net")) if draw < 0.92 else self.hospital()

    def hospital(self) -> str:
        return f"{self.rng.choice((self.last, self.place, self.made, lambda: f'St. {self.first()}', lambda: f'{self.last()}-{self.last()}'))()} {self.rng.choice(HOSPITAL_ENDS)}"

    def street(self) -> str:
        """A street alone."""
        draw = self.rng.random()
        if draw < 0.2:
            return f"{self.rng.choice((self.last, self.made, self.first, self.place))()} {self.rng.choice(STREETS)}"
        if draw < 0.27:
            return f"{self.rng.choice(('Rua', 'Via', 'Calle', 'Rue', 'ul.', 'Avda.', 'Piazza', 'Avenue', 'Plaza', 'Trg', 'Praca', 'Strada'))} {self.person()}"
        if draw < 0.34:
            return self.last() + self.rng.choice(
                ("strasse", "gatan", "weg", "vej", "gade", "veien", "laan", "straat", "gasse", "katu", "tie", "vagen", " u.", " utca", "ova", " tee")
            )
        return self._latin(lambda fake: fake.street_name())

    def numbered(self) -> str:
        """A street with its number, before or behind, now and then twice, or a box."""
        rng, street = self.rng, self.street()
        number = str(rng.randrange(1, rng.choice((10, 100, 1000, 10000, 99999)))) + rng.choice(("", "", "", "", "", "A", "b", "/2"))
        draw = rng.random()
        if draw < 0.05:
            return rng.choice((f"P.O. Box {number}", f"PO Box {number}", f"Unit {number} Box {number[::-1]}", f"Postbus {number}"))
        if draw < 0.13:
            return self._latin(lambda fake: fake.street_address().replace("\n", ", "))
        if draw < 0.35:
            return f"{number} {street} {rng.randrange(1, 300)}"
        return f"{number} {street}" if draw < 0.72 else f"{street} {number}" if draw < 0.95 else f"{street}, {number}"

    def unit(self) -> str:
        return f"{self.rng.choice(('Apt.', 'Suite', 'Apt', 'Unit', 'Flat', 'Floor', '#', 'Room'))} {self.rng.randrange(1, 999):03d}"

    def code(self) -> str:
        return self._latin(lambda fake: fake.postcode())

    def region(self) -> str:
        draw = self.rng.random()
        return self.rng.choice(STATES) if draw < 0.6 else self._latin(lambda fake: fake.state() if hasattr(fake, "state") else fake.city())

    def block(self) -> str:
        """A whole address, as one line or several."""
        rng = self.rng
        gap = rng.choice((" ", ", ", "\n", "\n ", ", ", " "))
        town = self.place()
        town = town.upper() if rng.random() < 0.3 else town
        country = self.country() if rng.random() < 0.5 else ""
        draw = rng.random()
        if draw < 0.35:
            rest = (
                f"{town}{rng.choice((', ', ' ', gap + ', '))}{self.region() if rng.random() < 0.85 else 'nan'}{rng.choice((' ', gap))}{self.code()}"
            )
        elif draw < 0.6:
            rest = f"{rng.choice(('', 'D-', 'F-', 'CH-', ''))}{self.code()} {town}"
        elif draw < 0.75:
            rest = f"{town} {rng.choice((self.region(), self.code(), rng.choice(('AE', 'PR', 'VE', 'KR', 'LI', 'SL'))))}"
        else:
            return gap.join(p for p in (self.numbered(), self.unit() if rng.random() < 0.4 else "", town, f"{country} {self.code()}".strip()) if p)
        street = self.numbered() if rng.random() < 0.93 else f"the corner of {self.street()} and {self.street()}"
        unit = rng.choice((" ", gap)) + self.unit() if rng.random() < 0.4 else ""
        return gap.join(p for p in (street + unit, rest, country) if p)

    def court(self) -> str:
        return self.fill(self.rng.choice(COURTS))

    def fill(self, template: str) -> str:
        return template.replace("{c}", self.place()).replace("{l}", self.last()).replace("{n}", self.country())

    def _latin(self, draw) -> str:
        """Draws anew, or again from the first few thousand of that kind, which is quicker."""
        pool = self.pools[draw.__code__]
        if len(pool) >= 4000:
            return self.rng.choice(pool)
        pool.append(self._fresh(draw))
        return pool[-1]

    def _fresh(self, draw) -> str:
        for _ in range(20):
            name = draw(self.rng.choice(self.fakes))
            if max(name, default="a") < "\u0250" and "\n" not in name:
                return name
        return self.made()

    def plain(self, slot: str) -> str:
        rng = self.rng
        fake = self.fakes[rng.randrange(10)]
        if slot == "d":
            return rng.choice(
                (
                    fake.date("%m/%d/%Y"),
                    fake.date("%d %B %Y"),
                    fake.date("%B %d, %Y"),
                    fake.date("%Y-%m-%d"),
                    fake.date("%m/%d/%y"),
                    fake.date("%B %Y"),
                    fake.date("%d.%m.%Y"),
                )
            )
        if slot == "k":
            return fake.job() if rng.random() < 0.6 else fake.job().lower()
        return {
            "g": rng.choice(NATIONALITIES),
            "t": fake.time("%H:%M"),
            "#": str(rng.randrange(1, rng.choice((10, 100, 1000, 3000)))),
            "m": rng.choice(MEDICINES),
            "e": fake.email(),
            "r": fake.bothify("??######").upper(),
        }[slot]


SLOTS = {
    "p": "PERSON", "f": "PERSON", "l": "PERSON", "c": "LOCATION", "n": "LOCATION", "s": "LOCATION", "o": "ORG", "h": "ORG", "j": "ORG", "a": "ADDRESS", "x": "ADDRESS", "v": "ADDRESS", "u": "ADDRESS",
    "y": "ADDRESS", "z": "ADDRESS",
}  # fmt: skip
_SLOT = re.compile(r"\{([pflcnohjdt#maerxvuyszkg])\}")


def filled(template: str, names: Names) -> Sentence:
    """Returns the template with drawn values and the places of those that count."""
    draw = {
        "p": names.person,
        "f": names.first,
        "l": names.last,
        "c": names.place,
        "n": names.country,
        "o": names.organisation,
        "h": names.hospital,
        "j": names.court,
        "a": names.numbered,
        "x": names.numbered,
        "v": names.street,
        "u": names.unit,
        "y": names.block,
        "z": names.code,
        "s": names.region,
    }
    text, spans, at = "", [], 0
    template = template.replace("\\n", "\n")
    for match in _SLOT.finditer(template):
        text += template[at : match.start()]
        slot = match[1]
        value = fold(draw[slot]() if slot in draw else names.plain(slot))
        if slot in SLOTS:
            spans.append((len(text), len(text) + len(value), SLOTS[slot]))
        text += value
        at = match.end()
    return text + template[at:], spans


def renamed(sentence: Sentence, names: Names) -> Sentence:
    """Returns the sentence with other names of the same kind."""
    text, spans = sentence
    draw = {"PERSON": names.person, "LOCATION": names.place, "ORG": names.organisation, "ADDRESS": names.numbered}
    out, marks, at = "", [], 0
    for start, end, label in spans:
        one = " " not in text[start:end] and label == "PERSON"
        value = (
            names.rng.choice((names.first, names.last))()
            if one
            else names.block()
            if label == "ADDRESS" and re.search(r"[\n,]", text[start:end])
            else draw[label]()
        )
        value = fold(value)
        out += text[at:start]
        marks.append((len(out), len(out) + len(value), label))
        out += value
        at = end
    return out + text[at:], marks


def recased(sentence: Sentence, rng: random.Random) -> Sentence:
    """Returns the sentence as it is, or without capitals, or in capitals."""
    draw, text = rng.random(), sentence[0]
    changed = text.upper() if draw < 0.06 else text.lower() if draw < 0.16 else text
    return (changed if len(changed) == len(text) else text), sentence[1]


# Corpora ----------------------------------------------------------------------------------------------------------------------------------------------------


def conll(path: Path, column: int = -1) -> Iterator[Sentence]:
    """Yields the sentences of a file in one of the CoNLL formats, put together with spaces."""
    text, spans, previous = "", [], "O"
    for line in [*path.read_text(encoding="utf-8", errors="replace").splitlines(), ""]:
        parts = line.split()
        if len(parts) < 2 or line.startswith("-DOCSTART-"):
            if text:
                yield text, [s for s in spans if s[2]]
            text, spans, previous = "", [], "O"
            continue
        word, mark = parts[0], parts[column]
        text += "" if not text or word in ".,;:!?)'s" else " "
        kind = LEARNED.get(mark[2:], "")
        if mark != "O" and spans and previous[2:] == mark[2:] and not mark.startswith("B-"):
            spans[-1] = (spans[-1][0], len(text) + len(word), kind)
        elif mark != "O":
            spans.append((len(text), len(text) + len(word), kind))
        text += word
        previous = mark


def jsonl(path: Path) -> Iterator[Sentence]:
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        spans = sorted((s["start"], s["end"], LEARNED[s["label"]]) for s in row["spans"] if s["label"] in LEARNED)
        yield row["text"], spans


def public(data: Path, part: int = 0) -> Iterator[Sentence]:
    """The rows of presidio_research of a part: template numbers that leave that rest when divided by four. 0 is learned from, 2 is looked at, 1 and 3 are the test of benchmarks/deid.py."""
    path = data / "presidio_research/synth_dataset_v2.jsonl"
    for line, sentence in zip(path.read_text(encoding="utf-8").splitlines(), jsonl(path), strict=True):
        if json.loads(line)["template_id"] % 4 == part:
            yield sentence


_BREAK = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n+")


def sentences(document: Sentence) -> Iterator[Sentence]:
    """Cuts a document at line breaks and full stops, never within a name."""
    text, spans = document
    at = 0
    for stop in [m.end() for m in _BREAK.finditer(text) if not any(s < m.end() and m.start() < e for s, e, _ in spans)] + [len(text)]:
        if text[at:stop].strip():
            yield text[at:stop], [(s - at, e - at, label) for s, e, label in spans if at <= s and e <= stop]
        at = stop


def corpora(data: Path) -> list[Sentence]:
    """The labelled sentences to learn from."""
    base = data / "ner_english"
    found: list[Sentence] = []
    found += conll(base / "WNUT17/CONLL-format/data/train/wnut17train.conll")
    for name in "abefgh":
        found += conll(base / f"BTC/CONLL-format/data/{name}.conll")
    wiki = list(conll(base / "wikigold/CONLL-format/data/wikigold.conll.txt"))
    found += 2 * wiki[: len(wiki) * 9 // 10]
    for part in ("train", "test"):
        found += [
            s
            for s in conll(base / f"re3d/CONLL-format/data/{part}/re3d-{part}.conll")
            if all(any(c.isupper() for c in s[0][a:b]) for a, b, _ in s[1])
        ]
    found += [
        (text, [s for s in spans if text[s[0] : s[1]].lower() not in ("lender", "borrower", "agent")])
        for text, spans in conll(base / "SEC-filings/CONLL-format/data/train/FIN5.txt")
    ]
    found += 3 * list(public(data))
    for document in list(jsonl(data / "meddocan/train.jsonl"))[:220]:
        found += [s for s in sentences(document) if s[1] or random.Random(len(s[0])).random() < 0.3]
    return found


def empty(data: Path) -> list[Sentence]:
    """Sentences without a name, as far as rules and lists can tell."""
    from discreet.deid.detect import detect

    texts: list[str] = []
    for line in (data / "mts-dialog/train.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts += [s for s, _ in sentences((row["note"] + "\n" + row["dialogue"], []))]
    rng = random.Random(5)
    texts = rng.sample(texts, min(14000, len(texts)))
    kept = [text for text in texts if not any(span.label in ("PERSON", "LOCATION", "ORG") for span in detect(text))]
    for line in (data / "python-functions/functions.jsonl").read_text(encoding="utf-8").splitlines()[:300]:
        kept += [s for s, _ in sentences((json.loads(line)["code"], []))][:12]
    return [(text, []) for text in kept if not re.search(r"\b(?:Dr|Mr|Mrs|Ms)\b\.? [A-Z]", text)]


# Training ---------------------------------------------------------------------------------------------------------------------------------------------------


@cache
def featured(word: str) -> tuple[tuple[int, ...], int, int, int]:
    """Returns the buckets of a word, and where among them its identity and its lists are."""
    named = ner.features(word)
    order = list(named)
    return tuple(named.values()), order.index("w"), order.index("g"), order.index("cg")


def encoded(sentence: Sentence) -> tuple[list[str], list[int]]:
    """Returns the words and their tags as numbers, read as `detect` reads them: folded."""
    text, spans = sentence
    text = text if text.isascii() else "".join(one if len(one := fold(c)) == 1 else c for c in text)
    words, marks, last = [], [], None
    for match in ner.tokens(text):
        span = next((s for s in spans if s[0] <= match.start() < s[1]), None)
        words.append(match.group())
        marks.append(0 if span is None else 1 + 2 * ner.LABELS.index(span[2]) + (span is last))
        last = span
    return words[: ner.MAX_TOKENS], marks[: ner.MAX_TOKENS]


class Net(nn.Module):
    """The network of `ner.Tagger`, to be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(ner.BUCKETS, ner.WIDTH, mode="sum", sparse=True)
        nn.init.normal_(self.table.weight, std=0.1)
        self.layers = nn.ModuleList(nn.Linear((2 * side + 1) * (ner.HIDDEN if i else ner.WIDTH), ner.HIDDEN) for i, (_, side) in enumerate(ner.REACH))
        self.out = nn.Linear(ner.HIDDEN, len(ner.TAGS))
        self.drop = nn.Dropout(0.25)

    def forward(self, flat: torch.Tensor, offsets: torch.Tensor, which: torch.Tensor, places: torch.Tensor, total: int) -> torch.Tensor:
        x = torch.zeros(total, ner.WIDTH).index_copy(0, places, self.drop(self.table(flat, offsets)[which]))
        for number, ((step, side), layer) in enumerate(zip(ner.REACH, self.layers, strict=True)):
            near = torch.cat([x[places + k * step] for k in range(-side, side + 1)], dim=1)
            made = torch.relu(layer(near))
            rows = made + x[places] if number else made
            x = torch.zeros(total, ner.HIDDEN).index_copy(0, places, rows)
        return self.out(self.drop(x[places]))


def batch_of(chosen: Sequence[tuple[list[str], list[int]]], rng: random.Random, counts: Counter[str]):
    """Returns the tensors of a batch; a word loses its identity or its lists now and then, the rarer the more often."""
    flat, offsets, index, which, places, marks, at = [], [], {}, [], [], [], ner.GAP
    for words, tags in chosen:
        for word in words:
            if word not in index:
                buckets, w, g, cg = featured(word)
                lost = {w} if rng.random() < max(0.08, 1.5 / (1 + counts[word])) else set()
                lost |= {g, cg} if rng.random() < 0.25 else set()
                index[word] = len(offsets)
                offsets.append(len(flat))
                flat += [b for i, b in enumerate(buckets) if i not in lost]
            which.append(index[word])
        places += range(at, at + len(words))
        marks += tags
        at += len(words) + ner.GAP
    return (*(torch.tensor(v) for v in (flat, offsets, which, places)), at), torch.tensor(marks)


def train(data: Path, out: Path, *, minutes: float, seed: int = 20) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    names = Names(rng)
    templates = [
        line
        for line in (HERE / "tagger/templates.txt").read_text(encoding="utf-8").splitlines()
        if (line and line[:2] not in ("# ",)) or line.startswith("# Written")
    ]
    real, none = corpora(data), empty(data)
    print(f"{len(real)} labelled, {len(none)} empty, {len(templates)} templates", flush=True)
    counts = Counter(word for text, _ in [*real, *none] for word in (m.group() for m in ner.tokens(text)))
    net = Net()
    sparse = torch.optim.SparseAdam(list(net.table.parameters()), lr=2e-3)
    dense = torch.optim.AdamW([*net.layers.parameters(), *net.out.parameters()], lr=2e-3, weight_decay=1e-3)
    began, rounds, losses = time.process_time(), 0, []
    while (spent := (time.process_time() - began) / 60) < minutes:
        rate = 2e-3 * min(1.0, 2.2 * (1 - spent / minutes) + 0.02)
        for group in (*sparse.param_groups, *dense.param_groups):
            group["lr"] = rate
        drawn: list[Sentence] = []
        for _ in range(64):
            kind = rng.random()
            if kind < 0.42:
                drawn.append(filled(rng.choice(templates), names))
            elif kind < 0.80:
                sentence = rng.choice(real)
                drawn.append(renamed(sentence, names) if sentence[1] and rng.random() < 0.4 else sentence)
            else:
                drawn.append(rng.choice(none))
            while rng.random() < 0.3:  # lines in one reading, as in a note
                other = filled(rng.choice(templates), names) if rng.random() < 0.6 else rng.choice(none) if rng.random() < 0.6 else rng.choice(real)
                text = drawn[-1][0] + rng.choice(("\n", "\n", " "))
                drawn[-1] = text + other[0], drawn[-1][1] + [(a + len(text), b + len(text), label) for a, b, label in other[1]]
        inputs, marks = batch_of([encoded(recased(s, rng)) for s in drawn], rng, counts)
        loss = nn.functional.cross_entropy(net(*inputs), marks, weight=torch.tensor([1.0] + [1.4] * (len(ner.TAGS) - 1)), label_smoothing=0.01)
        sparse.zero_grad()
        dense.zero_grad()
        loss.backward()
        sparse.step()
        dense.step()
        losses.append(loss.item())
        rounds += 1
        if rounds % 500 == 0:
            print(f"{rounds} rounds, {spent:.1f} min, loss {np.mean(losses[-500:]):.4f}", flush=True)
            write(net, out)
    write(net, out)


def write(net: Net, out: Path) -> None:
    tensors = {"table": net.table.weight, "out": net.out.weight.T, "out_bias": net.out.bias}
    for i, layer in enumerate(net.layers):
        tensors |= {f"conv{i}": layer.weight.T, f"bias{i}": layer.bias}
    save_file({name: np.ascontiguousarray(value.detach().numpy().astype(np.float16)) for name, value in tensors.items()}, out)


# Check ------------------------------------------------------------------------------------------------------------------------------------------------------


def held_out(data: Path) -> Iterator[tuple[str, list[Sentence]]]:
    base = data / "ner_english"
    wiki = list(conll(base / "wikigold/CONLL-format/data/wikigold.conll.txt"))
    yield "wikigold, last tenth", wiki[len(wiki) * 9 // 10 :]
    yield "WNUT17 dev", list(conll(base / "WNUT17/CONLL-format/data/dev/emerging.dev.conll"))
    yield "presidio_research, part 2", list(public(data, 2))
    yield "aci notes", [s for d in jsonl(data / "aci_phi_synth/notes_dev.jsonl") for s in sentences(d)]
    yield "aci dialogues", [s for d in jsonl(data / "aci_phi_synth/dialogues_dev.jsonl") for s in sentences(d)]
    yield "MEDDOCAN dev", [s for d in list(jsonl(data / "meddocan/dev.jsonl"))[:80] for s in sentences(d)]


def check(data: Path) -> None:
    for name, chosen in held_out(data):
        began = time.process_time()
        found = ner.tag([text for text, _ in chosen])
        spent = time.process_time() - began
        print(f"{name}: {sum(len(t) for t, _ in chosen) / spent / 1e3:.0f}k characters a second")
        for label in (*ner.LABELS, None):
            hit = said = gold = 0
            for (text, spans), tags in zip(chosen, found, strict=True):
                words = [m.span() for m in ner.tokens(text) if m.group()[0].isalpha()]
                truth = {w for w in words for s in spans if s[0] <= w[0] < s[1] and label in (None, s[2])}
                guess = {w for w in words for s in tags if s[0] <= w[0] < s[1] and label in (None, s[2])}
                hit, said, gold = hit + len(truth & guess), said + len(guess), gold + len(truth)
            p, r = hit / max(said, 1), hit / max(gold, 1)
            print(f"  {label or 'any':<9} precision {p:.3f} recall {r:.3f} F2 {5 * p * r / max(4 * p + r, 1e-9):.3f} of {gold}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("src/discreet/deid/tagger.safetensors"))
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    check(asked.data) if asked.check else train(asked.data, asked.out, minutes=asked.minutes)
