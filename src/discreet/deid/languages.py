"""What a stand-in needs to know of a language: names, months, weekdays, streets, kinds of organisation. English, Spanish, French, German.

A word says which language it is; what stands beside it is not asked, so that one value has one stand-in in every document. Words are folded (lower case, no accents) where they are keys, and written as they are where they are put in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Literal

from discreet.deid.normalise import fold
from discreet.deid.patterns import MONTHS

LISTED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "en": MONTHS,
        "es": ("enero", "febrero", "marzo", "abril", "mayo", "junio", "julio", "agosto", "septiembre", "octubre", "noviembre", "diciembre"),
        "fr": ("janvier", "février", "mars", "avril", "mai", "juin", "juillet", "août", "septembre", "octobre", "novembre", "décembre"),
        "de": ("Januar", "Februar", "März", "April", "Mai", "Juni", "Juli", "August", "September", "Oktober", "November", "Dezember"),
    }
)
"""Language -> its months, January first."""

WEEKDAYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "en": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
        "es": ("lunes", "martes", "miércoles", "jueves", "viernes", "sábado", "domingo"),
        "fr": ("lundi", "mardi", "mercredi", "jeudi", "vendredi", "samedi", "dimanche"),
        "de": ("Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"),
    }
)
"""Language -> its days of the week, Monday first."""


@cache
def _words_of(days: Literal["months", "weekdays"]) -> Mapping[str, tuple[tuple[str, int, bool], ...]]:
    """Folded word -> (language, index, whole) of every reading, whole words first."""
    found: dict[str, list[tuple[str, int, bool]]] = {}
    for whole in (True, False):
        for language, words in (LISTED if days == "months" else WEEKDAYS).items():
            for index, word in enumerate(words):
                plain = fold(word).lower()
                for size in (len(plain),) if whole else range(3, min(len(plain), 6)):
                    found.setdefault(plain[:size], []).append((language, index, whole))
    return {word: tuple(readings) for word, readings in found.items()}


def month(word: str, likely: str = "") -> tuple[str, int, bool] | None:
    """Returns language, number (0 is January) and whether it is written out, of the name of a month or its beginning of three letters or more; None for another word.

    A word of several languages is of the one that is likely, else of the first of English, Spanish, French, German.
    """
    return _read("months", word, likely)


def weekday(word: str, likely: str = "") -> tuple[str, int, bool] | None:
    """Returns the same for the name of a day of the week, 0 for Monday."""
    return _read("weekdays", word, likely)


def _read(table: Literal["months", "weekdays"], word: str, likely: str) -> tuple[str, int, bool] | None:
    readings = _words_of(table).get(fold(word).lower(), ())
    return next((reading for reading in readings if reading[0] == likely), readings[0] if readings else None)


@cache
def names() -> Mapping[str, tuple[str, str]]:
    """Returns folded name -> (language, flag): F or M a first name, L a last name. English names are not here."""
    lines = (resources.files("discreet.deid") / "stand_ins.txt").read_text(encoding="utf-8").split("\n")
    parts = (line.split(" ") for line in lines if line and not line.startswith("#"))
    return {fold(name).lower(): (language, flag) for name, language, flag in parts}


@cache
def pool(language: str, flag: str) -> tuple[str, ...]:
    """Returns the names of a language that may stand in, as they are written, sorted."""
    lines = (resources.files("discreet.deid") / "stand_ins.txt").read_text(encoding="utf-8").split("\n")
    parts = (line.split(" ") for line in lines if line and not line.startswith("#"))
    return tuple(sorted(name for name, of, is_a in parts if (of, is_a) == (language, flag)))


STREETS: Mapping[str, tuple[re.Pattern[str], str, tuple[str, ...]]] = MappingProxyType(
    {
        "box": (re.compile(r"\bp\.?\s?o\.?\s?box\b|\bapartado\b|\bpostfach\b|\bboite postale\b"), "PO Box {number}", ("-",)),
        "es": (
            re.compile(r"\b(?:calle|avenida|avda|av|plaza|paseo|camino|carretera|travesia|ronda|c/)(?:\b|(?<=/))"),
            "Calle {name} {number}",
            ("del Roble", "del Cedro", "del Olmo", "del Fresno", "de la Encina", "del Pino", "del Sauce", "del Tilo", "del Haya", "del Ciprés"),
        ),
        "fr": (
            re.compile(r"\b(?:rue|avenue de|avenue du|avenue des|boulevard|allee|chemin|impasse|quai|place d[eu]s?)\b"),
            "{number} rue {name}",
            (
                "des Lilas",
                "des Tilleuls",
                "des Acacias",
                "du Chêne",
                "des Peupliers",
                "des Bouleaux",
                "du Noyer",
                "des Saules",
                "des Érables",
                "du Hêtre",
            ),
        ),
        "de": (
            re.compile(r"(?:strasse|str\.|weg|allee|gasse|platz|ufer|damm)\b"),
            "{name} {number}",
            (
                "Lindenweg",
                "Buchenweg",
                "Eichenstraße",
                "Ahornstraße",
                "Birkenweg",
                "Erlenstraße",
                "Eschenweg",
                "Ulmenstraße",
                "Kiefernweg",
                "Tannenstraße",
            ),
        ),
    }
)
"""Kind of address -> what tells it (folded), how its stand-in is written, and streets; English where none fits."""

_LISTED_KINDS = (
    "hospital clinic center centre university college school institute laboratory laboratories lab labs pharmacy practice group bank insurance church department of for and the at "
    "memorial general regional community medical health healthcare care system systems services service family internal surgical surgery medicine pediatric pediatrics dental cancer heart va associates partners physicians "
    "inc llc ltd plc corp corporation company co gmbh ag llp sa sl sarl foundation trust nhs "
    "universitario universitaria universidad clinica centro medico salud instituto colegio fundacion banco "
    "hopital clinique universite universitaire centre institut cabinet ecole "
    "klinikum klinik krankenhaus universitat universitatsklinikum praxis schule stiftung"
)
KINDS = frozenset(_LISTED_KINDS.split())
"""Words of an organisation's name that say what it is, not which (folded)."""
