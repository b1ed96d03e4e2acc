"""What an identifier looks like, as data: one row an expression, with the texts it must and must not match.

A new entity is a new row here (and, if its label is new, a line in `Label` and in docs/labels.md). Expressions run on *normalised* text (see `detect`): ASCII digits,
plain hyphens, quotes and spaces, Latin letters without accents. Each is bounded: every quantifier has an upper limit or is possessive, so a scan is linear
in the text (up to the constant of the limit).

A row whose shape alone proves little has `context`: it counts only when one of those words stands directly before the value (`MRN: `, `account number is `). A row with a
`validator` counts only when the check digit or calendar agrees. In the examples the value stands between « and »; `rejects` must yield nothing.

Sources: 45 CFR 164.514(b)(2) for the list of identifiers; the issuers' published formats for keys and national numbers; python-stdnum and phonenumbers for check digits.

Does not cover: names without a cue (that is `detect`'s gazetteer), values that are encoded (base64, percent, HTML entities), and languages other than English beyond
the numbers of the countries listed.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import date
from enum import StrEnum
from functools import cache
from importlib import import_module, resources
from typing import final

import phonenumbers
import stdnum.bitcoin
import stdnum.ca.sin
import stdnum.de.idnr
import stdnum.es.dni
import stdnum.es.nie
import stdnum.fr.nir
import stdnum.gb.nhs
import stdnum.iban
import stdnum.in_.aadhaar
import stdnum.it.codicefiscale
import stdnum.luhn
import stdnum.nl.bsn
import stdnum.pl.pesel
import stdnum.se.personnummer
import stdnum.us.ssn

VERSION = "8"
"""Part of every policy's digest: raised whenever a row or a rule of `detect` changes what is found."""


@final
class Label(StrEnum):
    """The closed list of labels; docs/labels.md says what each one means."""

    PERSON = "PERSON"
    DATE = "DATE"
    AGE = "AGE"
    PHONE = "PHONE"
    FAX = "FAX"
    EMAIL = "EMAIL"
    SSN = "SSN"
    MRN = "MRN"
    HEALTH_PLAN = "HEALTH_PLAN"
    ACCOUNT = "ACCOUNT"
    LICENCE = "LICENCE"
    VEHICLE = "VEHICLE"
    DEVICE = "DEVICE"
    URL = "URL"
    IP = "IP"
    MAC = "MAC"
    ADDRESS = "ADDRESS"
    ZIP = "ZIP"
    LOCATION = "LOCATION"
    ORG = "ORG"
    CARD = "CARD"
    IBAN = "IBAN"
    NATIONAL_ID = "NATIONAL_ID"
    SECRET = "SECRET"  # noqa: S105 - a label, not a credential
    ID = "ID"
    PLACEHOLDER = "PLACEHOLDER"


CERTAIN, STRONG, SHAPE, WEAK = 0.95, 0.9, 0.7, 0.5
"""Scores: checked by a check digit or unmistakable; named by a cue; a telling shape; a shape that a guard may overrule."""


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """One row.

    Args:
        label: what is found.
        expression: regular expression; the group `value` is the identifier, or else the whole match.
        score: in (0, 1]; decides between candidates of one length.
        validator: says of the matched value whether it can be one; None accepts all.
        context: words of which one must stand directly before the value, case ignored; empty asks for none.
        anchors: lower-case texts of which one must occur in the document, or the row is not run at all; empty: any digit.
        cased: letter case matters.
        rare: the expression matches less often than its cues stand in a text, so that the one pass looks for it and not for them.
        digits: the value holds a digit (False: the row also reads text that has none near).
        locale: ISO 3166 country the format belongs to, or "any".
        source: where the format is published.
        matches: texts with the value between « and ».
        rejects: texts in which the row finds nothing.
    """

    label: Label
    expression: str
    score: float
    validator: Callable[[str], bool] | None = None
    context: tuple[str, ...] = ()
    anchors: tuple[str, ...] = ()
    cased: bool = False
    rare: bool = False
    digits: bool = True
    locale: str = "any"
    source: str = "own"
    matches: tuple[str, ...] = ()
    rejects: tuple[str, ...] = ()

    def compiled(self) -> re.Pattern[str]:
        """Returns the compiled expression. A letter of a script that writes without spaces is no part of a word that a value must keep away from."""
        expression = self.expression.replace(r"(?<![\w", f"(?<![{_SPACED}").replace(r"(?![\w", f"(?![{_SPACED}")
        return re.compile(expression, 0 if self.cased else re.IGNORECASE)


def _letters(blocks: Iterable[range]) -> str:
    """Returns the letters and digits of blocks as the inside of a class; punctuation and marks are none."""
    codes = [code for block in blocks for code in block if chr(code).isalnum()]
    runs = [[code for _, code in run] for _, run in itertools.groupby(enumerate(codes), lambda each: each[1] - each[0])]
    return "".join(f"\\u{run[0]:04x}-\\u{run[-1]:04x}" for run in runs)


_SPACED = "0-9A-Za-z_" + _letters((range(0xC0, 0x700), range(0x1E00, 0x2000)))
"""Letters and digits of the Latin, Greek, Cyrillic, Armenian, Hebrew and Arabic scripts, which put spaces between words: in Chinese, Japanese and Korean a number stands directly behind the character before it."""


# Validators -------------------------------------------------------------------------------------------------------------------------------------------------


def longest_first(words: Iterable[str]) -> list[str]:
    """Returns words as the alternatives of an expression, in one order for every process: a stored automaton is found by its text."""
    return sorted(words, key=lambda word: (-len(word), word))


def digits(value: str) -> str:
    """Returns only the ASCII digits of the value."""
    return "".join(c for c in value if "0" <= c <= "9")


def _at_least(count: int, limit: int = 64) -> Callable[[str], bool]:
    return lambda value: count <= len(digits(value)) <= limit


def _stdnum(is_valid: Callable[[str], bool]) -> Callable[[str], bool]:
    return lambda value: bool(is_valid(value))


def _luhn(value: str) -> bool:
    number = digits(value)
    return len(set(number)) > 1 and bool(stdnum.luhn.is_valid(number))


def is_card(value: str) -> bool:
    """Says whether the digits could be a payment card: 12-19 digits, an issuer prefix, Luhn (ISO/IEC 7812)."""
    number = digits(value)
    return 12 <= len(number) <= 19 and number[0] in "23456" and _luhn(number)


def is_npi(value: str) -> bool:
    """Says whether this is a US National Provider Identifier: Luhn over 80840 and the number (45 CFR 162.406)."""
    return bool(stdnum.luhn.is_valid("80840" + digits(value)))


def is_dea(value: str) -> bool:
    """Says whether this is a US DEA registration: (d1+d3+d5) + 2(d2+d4+d6) ends in d7."""
    d = [int(c) for c in digits(value)]
    return len(d) == 7 and (d[0] + d[2] + d[4] + 2 * (d[1] + d[3] + d[5])) % 10 == d[6]


def is_vin(value: str) -> bool:
    """Says whether the ninth character is the check digit of a vehicle identification number (49 CFR 565.15)."""
    worth = dict(zip("ABCDEFGHJKLMNPRSTUVWXYZ0123456789", [*range(1, 9), *range(1, 6), 7, 9, *range(2, 10), *range(10)], strict=True))
    vin = value.upper()
    total = sum(worth[c] * w for c, w in zip(vin, (8, 7, 6, 5, 4, 3, 2, 10, 0, 9, 8, 7, 6, 5, 4, 3, 2), strict=True))
    return "0123456789X"[total % 11] == vin[8] and any(c.isdigit() for c in vin)


def _is_ip(value: str) -> bool:
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return False
    return address.version == 4 or (value.count(":") >= 2 and len(value) > 4)


def _is_phone(value: str) -> bool:
    try:
        return bool(phonenumbers.is_possible_number(phonenumbers.parse(value, None)))
    except phonenumbers.NumberParseException:
        return False


def _is_ssn(value: str) -> bool:
    number = digits(value)
    return len(number) == 9 and number[:3] != "000" and number[3:5] != "00" and number[5:] != "0000"


_IS_CODE = re.compile(
    r"\$?[A-Za-z_]\w*(?:\.[A-Za-z_]\w*){0,6}(?:\(|\[|\{)|\$[A-Za-z_{(]|\{\{|%\(|<%|[(){}\[\]]|[a-z]+(?:[._-][a-z]+)*\Z|[A-Z]+(?:_[A-Z]+)*\Z|self\.|process\.env"
    r"|[A-Za-z_][A-Za-z_.]*[)}\]]{1,4}\Z|[a-z]+(?:[A-Z][a-z]+)+\Z|[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+[)}\]]{0,4}\Z|(?:[a-z]{2,20}\.){2,8}[\w./@-]+\Z|https?://[^\s@]+\Z|(?:/[\w.-]+){2,}\Z|arn:aws:"
)
"""Calls, variables, templates, dotted names, addresses and paths: where a secret is kept, not the secret."""
_EXAMPLE = re.compile(
    r"(?:your|my|insert|replace|example|dummy|placeholder|change|enter)[_ -]?(?:\w{1,20}[_ -]?){0,4}(?:here|key|token|secret|password|me)?\Z|(.)\1{5,}\Z|[x*.#-]{6,}\Z",
    re.IGNORECASE,
)
"""What stands in documentation in place of a secret."""


def _is_secret(value: str) -> bool:
    """A password or token, not a word and not code: it mixes digits or marks with letters, or both cases."""
    if _IS_CODE.match(value) or (_EXAMPLE.match(value) and not any(c.isdigit() for c in value)):
        return False
    kinds = sum(
        (
            any(c.islower() for c in value),
            any(c.isupper() for c in value[1:]),
            any(c.isdigit() for c in value),
            any(not c.isalnum() and c not in "_-." for c in value),
        )
    )
    return len(value) >= 6 and kinds >= 2


def entropy(value: str) -> float:
    """Returns the Shannon entropy of the value's characters in bits a character."""
    counts = Counter(value)
    return -sum(n / len(value) * math.log2(n / len(value)) for n in counts.values()) if value else 0.0


def _at_least_bits(least: float) -> Callable[[str], bool]:
    return lambda value: entropy(value) >= least


def _is_random(value: str) -> bool:
    """Looks drawn at random: letters and digits well mixed, not a word, a path or a constant."""
    return (
        entropy(value) >= 3.7
        and sum(c.isdigit() for c in value) >= 3
        and sum(c.isalpha() for c in value) >= 3
        and value.count("/") + value.count(".") < 4
    )


@cache
def _national_check(module: str) -> Callable[[str], bool]:
    is_valid: Callable[[str], bool] = import_module(f"stdnum.{module}").is_valid
    return is_valid


def _national_valid(module: str) -> Callable[[str], bool]:
    return lambda value: bool(_national_check(module)(value))


MONTHS = ("january", "february", "march", "april", "may", "june", "july", "august", "september", "october", "november", "december")


def _is_numeric_date(value: str) -> bool:
    parts = [int(p) for p in re.split(r"\D+", value)[:3]]
    if len(parts) < 3:
        return False
    if parts[0] > 31:
        return _is_day(*parts)
    year = parts[2] if parts[2] > 99 else parts[2] + (1900 if parts[2] > 68 else 2000)
    return _is_day(year, parts[0], parts[1]) or _is_day(year, parts[1], parts[0])


def _is_day(year: int, month: int, day: int) -> bool:
    try:
        return 1850 <= date(year, month, day).year <= 2150
    except ValueError:
        return False


def _is_compact_date(value: str) -> bool:
    return _is_day(int(value[:4]), int(value[4:6]), int(value[6:8]))


def _is_month_day(value: str) -> bool:
    month, day = (int(p) for p in re.split(r"\D+", value)[:2])
    return _is_day(2000, month, day) or _is_day(2000, day, month)


def _is_day_of_month(value: str) -> bool:
    """A day and a month in words: "3 mars", of which the planet is none ("4 mars" alone proves too little without its year or weekday)."""
    return re.fullmatch(r"\d{1,2} mars", value) is None


def _is_named_date(value: str) -> bool:
    """`may 10` in lower case is a verb and a number unless a year follows."""
    has_year = re.search(r"\d{4}|'\d\d", value) is not None
    return has_year or re.search(r"\b(?:may|mar|march|sun|sat|dec|jan)\b", value) is None


def _is_old(value: str) -> bool:
    number = digits(value)
    return 90 <= int(number) <= 125 if number else True


# Pieces -----------------------------------------------------------------------------------------------------------------------------------------------------

STATES = "AL AK AZ AR CA CO CT DE FL GA HI ID IL IN IA KS KY LA ME MD MA MI MN MS MO MT NE NV NH NJ NM NY NC ND OH OK OR PA RI SC SD TN TX UT VT VA WA WV WI WY DC PR VI GU".split()  # noqa: SIM905 - a table that reads as one
STATE_NAMES = (
    "Alabama|Alaska|Arizona|Arkansas|California|Colorado|Connecticut|Delaware|Florida|Georgia|Hawaii|Idaho|Illinois|Indiana|Iowa|Kansas|Kentucky|Louisiana|Maine|Maryland|"
    "Massachusetts|Michigan|Minnesota|Mississippi|Missouri|Montana|Nebraska|Nevada|New Hampshire|New Jersey|New Mexico|New York|North Carolina|North Dakota|Ohio|Oklahoma|Oregon|"
    "Pennsylvania|Rhode Island|South Carolina|South Dakota|Tennessee|Texas|Utah|Vermont|Virginia|Washington|West Virginia|Wisconsin|Wyoming"
)
_STATE = rf"(?:{'|'.join(STATES)}|{STATE_NAMES})"
_MONTH = r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)"
_WEEKDAY = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs?)?|fri|sat(?:ur)?|sun)(?:day)?\.?,? {1,2})"
_TIME = r"(?:(?:,? {1,2}(?:at {1,2})?|T)(?:[01]?\d|2[0-3]):[0-5]\d(?::[0-5]\d)?(?:\.\d{1,6})?(?: ?[ap]\.?m\b\.?)?(?:Z\b|[+-]\d\d:?\d\d)?)"
# folded, as the view is: no accents
_MONTH_ES = "enero|febrero|marzo|abril|mayo|junio|julio|agosto|sep?tiembre|octubre|noviembre|diciembre"
_MONTH_FR = "janv(?:ier)?|fevr?(?:ier)?|mars|avr(?:il)?|mai|juin|juil(?:let)?|aout|sept(?:embre)?|oct(?:obre)?|nov(?:embre)?|dec(?:embre)?"
_MONTH_DE = "jan(?:uar)?|janner|feb(?:ruar)?|marz|apr(?:il)?|mai|juni|juli|aug(?:ust)?|sept?(?:ember)?|okt(?:ober)?|nov(?:ember)?|dez(?:ember)?"
_GERMAN_ONLY = "januar|janner|februar|marz|mai|juni|juli|okt(?:ober)?|dez(?:ember)?"
_WEEKDAY_ES = "(?:lunes|martes|miercoles|jueves|viernes|sabado|domingo)"
_WEEKDAY_FR = "(?:lundi|mardi|mercredi|jeudi|vendredi|samedi|dimanche)"
_WEEKDAY_DE = "(?:montag|dienstag|mittwoch|donnerstag|freitag|samstag|sonnabend|sonntag|(?:mo|di|mi|do|fr|sa|so)(?=[.,]))"
_ANCHORS_ES = ("ene", "feb", "mar", "abr", "may", "jun", "jul", "ago", "sep", "set", "oct", "nov", "dic")
_ANCHORS_FR = ("jan", "fev", "mar", "avr", "mai", "jui", "aou", "sep", "oct", "nov", "dec")
_ANCHORS_DE = ("jan", "feb", "mar", "apr", "mai", "jun", "jul", "aug", "sep", "okt", "nov", "dez")
_CLOCK = r"(?:[01]?\d|2[0-3])(?:[:.h][0-5]\d| ?h)(?: ?h| ?uhr)?(?![\w])"
_CODE = r"(?<![\w-])(?=[A-Z-]{0,8}\d)[A-Z0-9](?:-?[A-Z0-9]){2,19}(?![\w-]|\.\d)"
_WORD = r"[A-Z][A-Za-z'-]{0,30}"
_STREET = (
    "street|st|avenue|ave?|road|rd|drive|dr|lane|ln|court|ct|circle|cir|boulevard|blvd|way|place|pl|terrace|ter|parkway|pkwy|highway|hwy|square|sq|trail|trl|alley|aly|loop|"
    "plaza|plz|via|point|pt|ridge|rdg|run|row|path|pike|turnpike|pass|bend|bluffs?|branch|bridge|brooks?|burgs?|bypass|camp|canyon|cape|causeway|center|centers|cliffs?|club|common|commons|"
    "corners?|course|courts|coves?|creek|crescent|crest|crossing|crossroads?|curve|dale|dam|divide|drives|estates?|expressway|extensions?|falls?|ferry|fields?|flats?|fords?|forest|forges?|"
    "forks?|fort|freeway|gardens?|gateway|glens?|greens?|groves?|harbors?|haven|heights|hills?|hollow|inlet|islands?|isle|land|lands|junctions?|keys?|knolls?|lakes?|landing|lights?|loaf|locks?|lodge|"
    "mall|manors?|meadows?|mews|mills?|mission|motorway|mountains?|mount|neck|oval|orchard|overpass|parks?|parkways|passage|pines?|plains?|plazas|points|ports?|prairie|radial|ramp|ranch|rapids?|"
    "rest|ridges|river|roads|route|rue|shoals?|shores?|skyway|springs?|spurs?|squares|stations?|stravenue|stream|streets|summit|throughway|trace|track|trafficway|trailer|tunnel|underpass|unions?|"
    "valleys?|viaduct|views?|villages?|ville|vista|walks?|wall|ways|wells?"
)
_UNIT = r"(?:,? {1,2}(?:apt|apartment|suite|ste|unit|room|rm|floor|fl|no)\b\.? {0,1}#?[A-Z0-9-]{1,6}|,? {0,2}#[A-Z0-9-]{1,6})"

# National numbers, one line each: country, module of python-stdnum that has the check digits, shape, words before it, a right and a wrong example.
# In a shape 9 is a digit, A a letter, X either, and a space stands for at most two of the usual separators or none.

_NATIONAL: tuple[tuple[str, str, str, tuple[str, ...], str, str], ...] = (
    ("AR", "ar.cuit", "99 99999999 9", ("cuit", "cuil"), "20-05536168-2", "20-05536168-0"),
    ("AT", "at.vnr", "9999 999999", ("svnr", "sozialversicherungsnummer", "sv-nummer"), "1237 010180", "1237 010181"),
    ("AU", "au.tfn", "999 999 999", ("tfn", "tax file number"), "123 456 782", "123 456 780"),
    ("BE", "be.nn", "99 99 99 999 99", ("rijksregisternummer", "numero national", "insz", "niss"), "85.07.30-033.28", "85.07.30-033.20"),
    ("BG", "bg.egn", "9999999999", ("egn",), "7523169263", "7523169260"),
    ("BR", "br.cpf", "999 999 999 99", ("cpf",), "390.533.447-05", "390.533.447-00"),
    ("CH", "ch.ssn", "999 9999 9999 99", ("ahv", "avs", "ahv-nr", "ahv-nummer"), "756.9217.0769.85", "756.9217.0769.80"),
    ("CL", "cl.rut", "99 999 999 X", ("rut",), "12.531.909-2", "12.531.909-0"),
    ("CN", "cn.ric", "99999999999999999X", ("id card", "resident identity", "identity number"), "360426199101010071", "360426199101010070"),
    ("CO", "co.nit", "999 999 999 9", ("nit",), "213.123.432-1", "213.123.432-0"),
    ("CU", "cu.ni", "99999999999", ("carne de identidad",), "91021027775", "91020027775"),
    ("CZ", "cz.rc", "999999 9999", ("rodne cislo",), "710319/2745", "710319/2740"),
    ("DK", "dk.cpr", "999999 9999", ("cpr", "cpr-nummer", "personnummer"), "211062-5629", "211032-5629"),
    ("DO", "do.cedula", "999 9999999 9", ("cedula",), "00113918205", "00113918200"),
    ("EC", "ec.ci", "999999999 9", ("cedula",), "171430710-3", "171430710-0"),
    ("EE", "ee.ik", "99999999999", ("isikukood",), "36805280109", "36805280100"),
    ("FI", "fi.hetu", "999999X999X", ("hetu", "henkilotunnus"), "131052-308T", "131052-300T"),
    ("GR", "gr.amka", "99999999999", ("amka",), "01013099997", "01013099990"),
    ("HR", "hr.oib", "99999999999", ("oib",), "33392005961", "33392005960"),
    ("ID", "id.nik", "9999999999999999", ("nik",), "3171011708450001", "3171011700450001"),
    ("IE", "ie.pps", "9999999AX", ("pps", "ppsn", "pps number"), "6433435F", "6433430F"),
    ("IL", "il.idnr", "99999999 9", ("teudat zehut", "israeli id"), "3933742-3", "3933742-0"),
    ("IS", "is_.kennitala", "999999 9999", ("kennitala", "kt"), "120174-3399", "120174-3391"),
    ("KR", "kr.rrn", "999999 9999999", ("rrn", "resident registration"), "971013-9019902", "971013-9019900"),
    ("LT", "lt.asmens", "99999999999", ("asmens kodas",), "33309240064", "33309240060"),
    ("LV", "lv.pvn", "999999 99999", ("personas kods",), "161175-19997", "161175-19990"),
    ("MX", "mx.curp", "AAAA999999AAAAAAXX", ("curp",), "BOXW310820HNERXN09", "BOXW310820HNERXN00"),
    ("MY", "my.nric", "999999 99 9999", ("nric", "mykad"), "770305-02-1234", "770305-00-1234"),
    ("NO", "no.fodselsnummer", "999999 99999", ("fodselsnummer", "fnr", "personnummer"), "151086 95088", "151086 95080"),
    ("NZ", "nz.ird", "99 999 999 9", ("ird", "ird number"), "49-091-850", "49-091-851"),
    ("PE", "pe.cui", "99999999 X", ("dni", "cui"), "10117410", "101174"),
    ("PK", "pk.cnic", "99999 9999999 9", ("cnic",), "34201-0891231-8", "34201-0891231-0"),
    ("PT", "pt.nif", "999 999 999", ("nif",), "501964843", "501964840"),
    ("PT", "pt.cc", "99999999 9 XX9", ("cartao de cidadao",), "00000000 0 ZZ4", "00000000 0 ZZ0"),
    ("RO", "ro.cnp", "9999999999999", ("cnp",), "1630615123457", "1630615123450"),
    ("SI", "si.emso", "9999999999999", ("emso", "jmbg"), "0101006500006", "0101006500000"),
    ("SK", "sk.rc", "999999 9999", ("rodne cislo",), "710319/2745", "710319/2740"),
    ("TH", "th.pin", "9 9999 99999 99 9", ("thai id", "citizen id"), "3100600445635", "3100600445630"),
    ("TR", "tr.tckimlik", "99999999999", ("tc kimlik", "kimlik no", "tckn"), "17291716060", "17291716061"),
    ("UA", "ua.rntrc", "9999999999", ("rntrc", "ipn", "rnokpp"), "1759013776", "1759013770"),
    ("UY", "uy.rut", "99 999999 999 9", ("rut",), "21-100342-001-7", "21-100342-001-0"),
    ("ZA", "za.idnr", "9999999999999", ("south african id", "sa id", "id number"), "7503305044089", "7503305044080"),
)
_SHAPES = {"9": r"\d", "A": "[A-Z]", "X": r"[\dA-Z+-]", " ": "[ ./-]{0,2}"}


def _optional_lead(shape: str) -> str:
    """Some numbers are written without their leading zeros or their last letter."""
    return {
        "99 999 999 X": r"\d{1,2}[.]?\d{3}[.]?\d{3}-?[\dK]",
        "99999999 9": r"\d{5,8}-?\d",
        "9999999AX": r"\d{7}[A-W][A-IW]?",
        "99 999 999 9": r"\d{2,3}-?\d{3}-?\d{3}",
        "99999999 X": r"\d{8}(?:-?[\dA-K])?",
    }.get(shape, "".join(_SHAPES[mark] for mark in shape))


def _national(country: str, module: str, shape: str, words: tuple[str, ...], right: str, wrong: str) -> Pattern:
    return Pattern(
        label=Label.NATIONAL_ID,
        expression=rf"(?<![\w-]){_optional_lead(shape)}(?![\w-])",
        score=CERTAIN,
        validator=_national_valid(module),
        context=words,
        anchors=words,
        locale=country,
        source=f"python-stdnum, {module}",
        matches=(f"{words[0]}: «{right}»", f"{words[-1]} «{right}» given"),
        rejects=(f"{words[0]}: {wrong}", f"weight {right}"),
    )


# Secrets by issuer ------------------------------------------------------------------------------------------------------------------------------------------


def _issuers() -> Iterator[Pattern]:
    """Yields a row for each rule of secret_rules.json: data of gitleaks (MIT, secret_rules.LICENSE.txt), made by benchmarks/import_secret_rules.py."""
    text = (resources.files("discreet.deid") / "secret_rules.json").read_text(encoding="utf-8")
    for rule in json.loads(text)["rules"]:
        yield Pattern(
            label=Label.SECRET,
            expression=rule["expression"],
            score=STRONG,
            validator=_at_least_bits(rule["entropy"]) if rule["entropy"] else None,
            anchors=tuple(rule["keywords"]),
            cased=True,
            digits=False,
            source=f"gitleaks: {rule['id']}",
        )


# The table --------------------------------------------------------------------------------------------------------------------------------------------------

PATTERNS: tuple[Pattern, ...] = (
    # internet
    Pattern(
        label=Label.EMAIL,
        expression=r"(?<![\w.+%-])[\w.+%-]{1,64}+@(?:[A-Z0-9-]{1,63}\.){1,8}[A-Z]{2,24}(?![\w-])",
        digits=False,
        score=CERTAIN,
        anchors=("@",),
        source="RFC 5321",
        matches=("write to «ann.lee+x@mail.example.org».", "<«a_b@example.com»>"),
        rejects=("@home", "a@b", "8 mg @ 9 pm"),
    ),
    Pattern(
        label=Label.URL,
        expression=r"(?<![\w])(?:https?|ftps?|sftp|ssh|wss?)://[^\s<>\"'\]\[)(￼]{2,2000}(?<![.,;:!?])",
        digits=False,
        score=CERTAIN,
        anchors=("://",),
        source="RFC 3986",
        matches=("see «https://portal.example.org/p/8806163».", "(«http://a.example/x?y=1»)"),
        rejects=("http://", "a://b"),
    ),
    Pattern(
        label=Label.URL,
        expression=r"(?<![\w@./-])(?:www\.(?:[a-z0-9-]{1,63}\.){1,5}[a-z]{2,24}|(?:[a-z0-9-]{1,63}\.){1,5}(?:com|org|net|edu|gov|info|io|health)(?=/))(?:/[^\s<>\"'\]\[)(￼]{0,500}(?<![.,;:!?]))?(?![\w@])",
        digits=False,
        score=STRONG,
        anchors=("www.", ".com/", ".org/", ".net/", ".edu/", ".gov/", ".info/", ".io/", ".health/"),
        source="RFC 3986",
        matches=("at «www.example.org».", "«portal.example.org/p/123»"),
        rejects=("e.g./i.e.", "and/or"),
    ),
    Pattern(
        label=Label.IP,
        expression=r"(?<![\w.])(?:(?:25[0-5]|2[0-4]\d|1?\d?\d)\.){3}(?:25[0-5]|2[0-4]\d|1?\d?\d)(?![\w]|\.\d)",
        score=SHAPE,
        validator=_is_ip,
        source="RFC 791",
        matches=("from IP «201.157.195.40».",),
        rejects=("1.2.3", "1.2.3.4.5", "300.1.1.1"),
    ),
    Pattern(
        label=Label.IP,
        expression=r"(?<![\w:.])(?:[0-9A-F]{0,4}:){2,7}[0-9A-F]{0,4}(?![\w:])",
        score=STRONG,
        validator=_is_ip,
        anchors=("::", *(f":{c}" for c in "abcdef"), *(f"{c}:" for c in "abcdef")),
        source="RFC 4291",
        matches=("host «2001:db8::8a2e:370:7334» up",),
        rejects=("at 12:30:45", "a::b", "1:2:3"),
    ),
    Pattern(
        label=Label.MAC,
        expression=r"(?<![\w:-])[0-9A-F]{2}([:-])(?:[0-9A-F]{2}\1){4}[0-9A-F]{2}(?![\w:-])",
        score=CERTAIN,
        source="IEEE 802",
        matches=("mac «00:1B:44:11:3A:B7»",),
        rejects=("12:30:45", "00:1B:44:11:3A"),
    ),
    # secrets
    Pattern(
        label=Label.SECRET,
        expression=r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[^￼]{0,8000}?(?:-----END [A-Z ]{0,40}PRIVATE KEY-----|\Z)",
        digits=False,
        score=1.0,
        anchors=("private key-----",),
        source="RFC 7468",
        matches=("key:\n«-----BEGIN RSA PRIVATE KEY-----\nMIIB\n-----END RSA PRIVATE KEY-----»",),
        rejects=("-----BEGIN CERTIFICATE-----",),
    ),
    Pattern(
        label=Label.SECRET,
        expression=r"(?<![\w-])eyJ[\w-]{8,2000}\.[\w-]{8,4000}\.[\w-]{0,2000}",
        digits=False,
        score=1.0,
        cased=True,
        anchors=("eyj",),
        source="RFC 7519",
        matches=("token «eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.abcDEF123_-»",),
        rejects=("eyJ is not enough",),
    ),
    Pattern(
        label=Label.SECRET,
        expression=(
            r"(?<![\w-])(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,255}|glpat-[\w-]{20,64}|xox[abeprs]-[\w-]{10,255}|AIza[\w-]{35}|[rs]k_(?:live|test)_\w{16,255}"
            r"|sk-(?:proj-|ant-)?[\w-]{20,255}|hf_[A-Za-z0-9]{30,64}|npm_[A-Za-z0-9]{36}|SG\.[\w-]{16,64}\.[\w-]{16,64}|SK[0-9a-f]{32}|ya29\.[\w-]{20,255}|dop_v1_[0-9a-f]{64}|pypi-[\w-]{50,255})(?![\w])"
        ),
        digits=False,
        score=1.0,
        cased=True,
        anchors=("akia", "asia", "gh", "glpat-", "xox", "aiza", "k_live_", "k_test_", "sk-", "hf_", "npm_", "sg.", "sk", "ya29.", "dop_v1_", "pypi-"),
        source="the issuers' documentation",
        matches=("id «" + "AKIA" + "IOSFODNN7EXAMPLE»", "«" + "ghp_" + "a1B2" * 9 + "»", "«" + "sk-proj-" + "Ab12" * 6 + "»"),
        rejects=("AKIA", "sk-learn", "ghp_short"),
    ),
    Pattern(
        label=Label.SECRET,
        expression=r"(?<![\w])[a-z][a-z0-9+]{1,20}://[^\s:/@\"'￼]{0,64}:[^\s@/\"'￼]{1,128}@[^\s\"'<>￼]{1,255}(?<![.,;])",
        digits=False,
        score=1.0,
        anchors=("@",),
        source="RFC 3986, userinfo",
        matches=("«postgresql://app:s3cret@db.internal:5432/notes»",),
        rejects=("https://example.org/a@b", "mailto:a@b.example"),
    ),
    Pattern(
        label=Label.SECRET,
        expression=(
            r"(?<![a-z])(?:password|passwd|pwd|pass(?:phrase|code)?|secret(?:[_ -]?key)?|(?:api|encryption|signing)[_ -]?key|(?:access|auth|bearer|refresh)[_ -]?(?:token|key)|client[_-]?secret|"
            r"private[_-]?(?:key|token)|token)[\"']?(?:\s{0,3}(?::=|=>|[:=])\s{0,3}[\"']?|>)(?P<value>[^\s\"',;<>￼]{6,200})"
        ),
        digits=False,
        score=STRONG,
        validator=_is_secret,
        anchors=("pass", "pwd", "secret", "key", "token"),
        matches=('password = "«hunter2!x»"', "API_KEY: «9f8e7d6c5b4a»", "<db_password>«Sell8186#»</db_password>", "SMTP_PASS=«%h8SIno!DPhyI»"),
        rejects=(
            "password: walrus",
            "the secret: be kind",
            "token = identifier",
            "token = next(tokens)",
            "password = os.environ['PW']",
            "bypass=On2Off3x",
            'password: "${DB_PASSWORD}"',
            'params={"api_key": api_key}',
            "login(password=passWord)",
            "token=Token{78af589 done",
            "token: android.os.BinderProxy@2bd79ce",
            "key_file_token = /run/secrets/Db1",
            'token_url: "https://id.example.org/Oauth2"',
            "api_key = YOUR_API_KEY_HERE",
            "secret = config.Secrets.Db1",
        ),
    ),
    Pattern(
        label=Label.SECRET,
        expression=r"(?<![\w-])--?(?:password|passwd|pass|pw|token|secret|api-?key|auth)(?: {1,2}|=)[\"']?(?P<value>[^\s\"'<>|&;￼-][^\s\"'<>|&;￼]{5,200})",
        digits=False,
        score=STRONG,
        validator=_is_secret,
        anchors=("-pass", "-pw", "-token", "-secret", "-api", "-auth"),
        source="command lines",
        matches=("mysql --password «these6436$» -u app", "--token=«L7d1nWMIrNCR»"),
        rejects=("--password --user", "--token $TOKEN9x", "--pass through"),
    ),
    Pattern(
        label=Label.SECRET,
        expression=r"(?<![\w])(?:connect|login|sign_?in|auth\w{0,12}|credentials?)\(\s{0,3}[\"'][^\"'\n￼]{1,64}[\"'],\s{0,3}[\"'](?P<value>[^\s\"'￼]{6,200})[\"']",
        digits=False,
        score=STRONG,
        validator=_is_secret,
        anchors=("(",),
        source="calls with a user and a password",
        matches=("db = connect('app', '«realize3793$»')",),
        rejects=("connect('host', 'primary')", "login('ann')"),
    ),
    Pattern(
        label=Label.SECRET,
        expression=r"(?<![\w/.:@-])[\w.-]{2,64}:(?P<value>[^\s:@/\"'￼]{6,128})@[\w-]{1,63}(?:\.[\w-]{1,63}){1,6}(?![\w@])",
        digits=False,
        score=STRONG,
        validator=_is_secret,
        anchors=("@",),
        source="user:password@host",
        matches=("app:«fMZZn6uQK»@ftp.internal",),
        rejects=("mailto:ann@mail.example", "git@github.com:user/repo"),
    ),
    Pattern(
        label=Label.SECRET,
        expression=r"(?<![\w])(?:authorization:\s{0,3})?(?:bearer|basic)\s{1,3}(?P<value>[\w.~+/!#$@%^*-]{8,2000}={0,2})",
        digits=False,
        score=STRONG,
        validator=_is_secret,
        anchors=("bearer", "basic"),
        source="RFC 6750",
        matches=("Authorization: Bearer «abcDEF123456789xyz»",),
        rejects=("bearer of bad news", "basic understanding"),
    ),
    # numbers with a check digit
    Pattern(
        label=Label.CARD,
        expression=r"(?<![\w.-])\d(?:[ -]?\d){11,18}(?![\w]|-\d)",
        score=CERTAIN,
        validator=is_card,
        source="ISO/IEC 7812",
        matches=("card «4111 1111 1111 1111» please", "«4735502776853011»", "«3782-822463-10005»"),
        rejects=("4111 1111 1111 1112", "123456789012"),
    ),
    Pattern(
        label=Label.CARD,
        expression=r"(?<![\w.-])\d(?:[ -]?\d){11,18}(?![\w]|-\d)",
        score=STRONG,
        context=("card", "visa", "mastercard", "amex", "cc"),
        anchors=("card", "visa", "amex", "cc"),
        matches=("my card number is «4735502776853012».",),
        rejects=("card 1234",),
    ),
    Pattern(
        label=Label.IBAN,
        expression=r"(?<![\w])[A-Z]{2}\d{2}[A-Z0-9]{11,30}(?![\w])",
        score=CERTAIN,
        validator=_stdnum(stdnum.iban.is_valid),
        source="ISO 13616",
        matches=("IBAN «GB82WEST12345698765432»", "«de89370400440532013000»"),
        rejects=("GB82WEST12345698765433",),
    ),
    Pattern(
        label=Label.IBAN,
        expression=r"(?<![\w])[A-Z]{2}\d{2}(?:[ -]?[A-Z0-9]{4}){2,7}(?:[ -]?[A-Z0-9]{1,3})?(?![\w])",
        score=CERTAIN,
        validator=_stdnum(stdnum.iban.is_valid),
        cased=True,
        source="ISO 13616",
        matches=("«DE89 3704 0044 0532 0130 00»",),
        rejects=("DE89 3704 0044 0532 0130 01",),
    ),
    Pattern(
        label=Label.SSN,
        expression=r"(?<![\w-])\d{3}-\s?\d{2}-\s?\d{4}(?![\w-])",
        score=STRONG,
        validator=_is_ssn,
        locale="US",
        source="SSA",
        matches=("SSN «464-79-1772».", "wrapped «464-79-\n1772»"),
        rejects=("000-12-3456", "464-79-177", "1464-79-1772"),
    ),
    Pattern(
        label=Label.SSN,
        expression=r"(?<![\w-])\d{3}[ .-]?\d{2}[ .-]?\d{4}(?![\w-])",
        score=CERTAIN,
        validator=_is_ssn,
        context=("ssn", "social security", "social", "soc sec", "ss#"),
        anchors=("ssn", "social", "soc sec", "ss#"),
        locale="US",
        source="SSA",
        matches=("SSN: «464791772»", "social security number is «464 79 1772»", "ssn «464.79.1772»"),
        rejects=("social 12345",),
    ),
    Pattern(
        label=Label.LICENCE,
        expression=r"(?<![\w-])[ABCDEFGHJKLMPRSTUX][A-Z9]\d{7}(?![\w-])",
        score=CERTAIN,
        validator=is_dea,
        locale="US",
        source="21 CFR 1301",
        matches=("DEA# «MC2671976»",),
        rejects=("MC2671975",),
    ),
    Pattern(
        label=Label.LICENCE,
        expression=r"(?<![\w-])\d{10}(?![\w-])",
        score=CERTAIN,
        validator=is_npi,
        context=("npi", "provider identifier"),
        anchors=("npi", "provider identifier"),
        locale="US",
        source="45 CFR 162.406",
        matches=("NPI «1465811028»",),
        rejects=("NPI 1465811029",),
    ),
    Pattern(
        label=Label.LICENCE,
        expression=_CODE,
        score=STRONG,
        validator=_at_least(4),
        context=(
            "dea",
            "npi",
            "license",
            "licence",
            "driver's license",
            "drivers license",
            "driver license",
            "driver's licence",
            "driving licence",
            "dl",
            "lic",
            "certificate",
            "registration",
        ),
        anchors=("dea", "npi", "license", "licence", "dl", "lic", "certificate", "registration"),
        matches=("driver's license «F162823540116»", "License number: «U629-2878»"),
        rejects=("license plate", "certificate of 12"),
    ),
    Pattern(
        label=Label.VEHICLE,
        expression=r"(?<![\w])[A-HJ-NPR-Z0-9]{17}(?![\w])",
        score=CERTAIN,
        validator=is_vin,
        source="49 CFR 565.15",
        matches=("VIN «1M8GDM9AXKP042788»",),
        rejects=("1M8GDM9A1KP042788",),
    ),
    Pattern(
        label=Label.VEHICLE,
        expression=r"(?<![\w-])(?=[A-Z]{0,4}[ -]?\d|\d{0,4}[ -]?[A-Z])(?=[A-Z -]{0,8}\d)[A-Z0-9]{1,4}(?:[ -]?[A-Z0-9]{1,5}){1,2}(?![\w-])",
        score=STRONG,
        context=("plate", "license plate", "licence plate", "tag", "plates", "vehicle registration", "vin"),
        anchors=("plate", "tag", "vehicle", "vin"),
        cased=True,
        matches=("(plate «EJP-8013»)", "license plate number «7ABC123»"),
        rejects=("a plate of food", "tagged"),
    ),
    Pattern(
        label=Label.NATIONAL_ID,
        expression=r"(?<![\w])[A-CEGHJ-PR-TW-Z][A-CEGHJ-NPR-TW-Z] ?\d{2} ?\d{2} ?\d{2} ?[A-D](?![\w])",
        score=STRONG,
        cased=True,
        locale="GB",
        source="HMRC NIM39110",
        matches=("NI number «AB 12 34 56 C»",),
        rejects=("AB123456E", "DQ123456A"),
    ),
    Pattern(
        label=Label.NATIONAL_ID,
        expression=r"(?<![\w<])[A-Z0-9<]{30,44}(?:\n[A-Z0-9<]{30,44}){0,2}(?![\w<])",
        score=CERTAIN,
        validator=lambda value: value.count("<") >= 4 and any(c.isdigit() for c in value),
        cased=True,
        anchors=("<<",),
        source="ICAO 9303, machine-readable zone",
        matches=("scan: «P<UTOERIKSSON<<ANNA<MARIA<<<<<<<<<<<<<<<<<<<\nL898902C36UTO7408122F1204159ZE184226B<<<<<10»",),
        rejects=("<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<<", "P<UTOERIKSSON<<ANNA"),
    ),
    Pattern(
        label=Label.NATIONAL_ID,
        expression=r"(?<![\w-])\d{3}[ -]?\d{3}[ -]?\d{4}(?![\w-])",
        score=CERTAIN,
        validator=_stdnum(stdnum.gb.nhs.is_valid),
        context=("nhs", "nhs number"),
        anchors=("nhs",),
        locale="GB",
        source="NHS data dictionary",
        matches=("NHS number «943 476 5870»",),
        rejects=("NHS number 943 476 5871",),
    ),
    Pattern(
        label=Label.NATIONAL_ID,
        expression=r"(?<![\w])(?:\d{8}|[XYZ]\d{7})-?[A-Z](?![\w])",
        score=CERTAIN,
        validator=lambda value: bool(stdnum.es.dni.is_valid(value) or stdnum.es.nie.is_valid(value)),
        locale="ES",
        source="Orden INT/2058/2008",
        matches=("DNI «12345678Z»", "NIE «X1234567L»"),
        rejects=("12345678A",),
    ),
    Pattern(
        label=Label.NATIONAL_ID,
        expression=r"(?<![\w])[12] ?\d{2} ?(?:0[1-9]|1[0-2]|[2-9]\d) ?\d[0-9AB] ?\d{3} ?\d{3} ?\d{2}(?![\w])",
        score=CERTAIN,
        validator=_stdnum(stdnum.fr.nir.is_valid),
        locale="FR",
        source="INSEE",
        matches=("NIR «2 95 10 99 126 111 93»",),
        rejects=("295109912611192",),
    ),
    Pattern(
        label=Label.NATIONAL_ID,
        expression=r"(?<![\w])[A-Z]{6}\d{2}[A-EHLMPR-T]\d{2}[A-Z]\d{3}[A-Z](?![\w])",
        score=CERTAIN,
        validator=_stdnum(stdnum.it.codicefiscale.is_valid),
        locale="IT",
        source="DM 23/12/1976",
        matches=("«RCCMNL83S18D969H»",),
        rejects=("RCCMNL83S18D969A",),
    ),
    Pattern(
        label=Label.NATIONAL_ID,
        expression=r"(?<![\w.-])\d{3}\.\d{3}\.\d{3}-\d{2}(?![\w-])",
        score=STRONG,
        locale="BR",
        source="Receita Federal",
        matches=("CPF «390.533.447-05»",),
        rejects=("390.533.447",),
    ),
    Pattern(
        label=Label.NATIONAL_ID,
        expression=r"(?<![\w-])[2-9]\d{3}[ -]?\d{4}[ -]?\d{4}(?![\w-])",
        score=CERTAIN,
        validator=_stdnum(stdnum.in_.aadhaar.is_valid),
        locale="IN",
        source="UIDAI",
        matches=("Aadhaar «2341 2341 2346»",),
        rejects=("2341 2341 2347",),
    ),
    Pattern(
        label=Label.NATIONAL_ID,
        expression=r"(?<![\w-])\d{3}[ -]?\d{3}[ -]?\d{3}(?![\w-])",
        score=CERTAIN,
        validator=_stdnum(stdnum.ca.sin.is_valid),
        context=("sin", "social insurance"),
        anchors=("sin", "social insurance"),
        locale="CA",
        source="ESDC",
        matches=("SIN «123-456-782»",),
        rejects=("SIN 123-456-783",),
    ),
    Pattern(
        label=Label.NATIONAL_ID,
        expression=r"(?<![\w-])\d{2} ?\d{3} ?\d{3} ?\d{3}(?![\w-])|(?<![\w-])\d{9}(?![\w-])|(?<![\w-])\d{11}(?![\w-])",
        score=CERTAIN,
        validator=lambda value: bool(stdnum.de.idnr.is_valid(value) or stdnum.nl.bsn.is_valid(value) or stdnum.pl.pesel.is_valid(value)),
        context=("steuer-id", "idnr", "steueridentifikationsnummer", "bsn", "burgerservicenummer", "pesel"),
        anchors=("steuer", "idnr", "bsn", "burgerservice", "pesel"),
        locale="DE",
        source="BZSt, RvIG, gov.pl",
        matches=("IdNr «36 574 261 809»", "BSN «111222333»", "PESEL «44051401359»"),
        rejects=("BSN 111222334",),
    ),
    Pattern(
        label=Label.NATIONAL_ID,
        expression=r"(?<![\w-])(?:19|20)?\d{6}[-+]\d{4}(?![\w-])",
        score=CERTAIN,
        validator=_stdnum(stdnum.se.personnummer.is_valid),
        locale="SE",
        source="Skatteverket",
        matches=("pnr «880320-0016»",),
        rejects=("880320-0018",),
    ),
    Pattern(
        label=Label.NATIONAL_ID,
        expression=_CODE,
        score=STRONG,
        validator=_at_least(5),
        context=("passport", "passport number", "national id", "identity card", "tax id", "tin", "itin"),
        anchors=("passport", "national id", "identity card", "tax id", "tin"),
        matches=("passport «X12345678»", "Passport No: «534567891»"),
        rejects=("passport photo",),
    ),
    # numbers named by a cue
    Pattern(
        label=Label.MRN,
        expression=_CODE,
        score=STRONG,
        validator=_at_least(3),
        context=(
            "mrn",
            "mr#",
            "mr #",
            "medical record",
            "med rec",
            "medical rec",
            "chart",
            "record",
            "patient id",
            "patient number",
            "pt id",
            "hospital number",
            "unit number",
            "hosp no",
            "record number",
            "card number",
            "number on my card",
        ),
        anchors=(
            "mrn",
            "mr#",
            "mr #",
            "medical rec",
            "med rec",
            "chart",
            "record",
            "patient id",
            "patient number",
            "pt id",
            "hospital n",
            "hosp n",
            "unit number",
            "card",
        ),
        matches=("MRN: «E39389873»", "(chart «B15415776»)", "medical record number is «MR-525876»", "MRN «472-96-72-3»", "MRN/«7173637»"),
        rejects=("chart review", "medical record", "record date"),
    ),
    Pattern(
        label=Label.MRN,
        expression=r"(?<![\w-])\d{3}-\d{2}-\d{2}-\d(?![\w-])",
        score=STRONG,
        matches=("FULLER,KELLY   «899-83-35-9»",),
        rejects=("899-83-3599", "1-899-83-35-9"),
    ),
    Pattern(
        label=Label.MRN,
        expression=r"(?<![\w-])MR-?\d{5,9}(?![\w-])|(?<![\w-])MRN-?\d{4,12}(?![\w-])",
        score=STRONG,
        anchors=("mr",),
        matches=("seen, «MR525876», today", "«MRN-0042317»"),
        rejects=("MR 5", "MRI123456"),
    ),
    Pattern(
        label=Label.HEALTH_PLAN,
        expression=_CODE,
        score=STRONG,
        validator=_at_least(4),
        context=(
            "member id",
            "member",
            "subscriber",
            "subscriber id",
            "policy",
            "policy number",
            "plan id",
            "health plan",
            "insurance id",
            "insurance",
            "group number",
            "beneficiary",
            "health plan beneficiary",
            "medicare",
            "medicaid",
            "mbi",
            "hicn",
            "payer id",
            "plan",
            "group",
            "coverage id",
        ),
        anchors=(
            "member",
            "subscriber",
            "policy",
            "plan",
            "insurance",
            "group",
            "beneficiary",
            "medicare",
            "medicaid",
            "mbi",
            "hicn",
            "payer",
            "coverage",
        ),
        matches=("Member ID: «XQH333828241»", "policy number «W833083168»", "Medicare «1EG4-TE5-MK73»"),
        rejects=("plan of care", "group therapy", "policy of 2020"),
    ),
    Pattern(
        label=Label.HEALTH_PLAN,
        expression=r"(?<![\w-])[1-9][AC-HJKMNP-RT-Y][AC-HJKMNP-RT-Y0-9]\d-?[AC-HJKMNP-RT-Y][AC-HJKMNP-RT-Y0-9]\d-?[AC-HJKMNP-RT-Y]{2}\d{2}(?![\w-])",
        score=STRONG,
        cased=True,
        locale="US",
        source="CMS MBI format",
        matches=("«1EG4-TE5-MK73»",),
        rejects=("1EG4-TE5-MK7",),
    ),
    Pattern(
        label=Label.ACCOUNT,
        expression=_CODE,
        score=STRONG,
        validator=_at_least(4),
        context=("account", "acct", "a/c", "invoice", "billing", "guarantor", "routing", "encounter", "visit number", "csn", "har", "account no"),
        anchors=("account", "acct", "a/c", "invoice", "billing", "guarantor", "routing", "encounter", "visit number", "csn", "har"),
        matches=("Acct# «4658141870»", "account number: «295022639»"),
        rejects=("account for 12", "on account of"),
    ),
    Pattern(
        label=Label.DEVICE,
        expression=_CODE,
        score=STRONG,
        validator=_at_least(4),
        context=("serial number", "serial no", "serial", "s/n", "sn", "udi", "device id", "device", "imei", "device identifier", "lot", "lot number"),
        anchors=("serial", "s/n", "sn", "udi", "device", "imei", "lot"),
        matches=("serial number «SN44063984-D»", "IMEI «490154203237518»", "S/N: «PCM-88123»"),
        rejects=("serial exams", "a lot 12"),
    ),
    Pattern(
        label=Label.DEVICE,
        expression=r"(?<![\w-])SN-?\d{6,12}(?:-[A-Z0-9])?(?![\w-])",
        score=STRONG,
        cased=True,
        anchors=("sn",),
        matches=("pump «SN22551845-D» ok",),
        rejects=("SN 1",),
    ),
    Pattern(
        label=Label.ID,
        expression=_CODE,
        score=STRONG,
        validator=_at_least(3),
        context=(
            "accession",
            "accession number",
            "specimen",
            "case",
            "case number",
            "reference",
            "ref",
            "confirmation",
            "ticket",
            "employee id",
            "badge",
            "id",
            "username",
            "user id",
            "login",
            "identifier",
            "order number",
            "prescription number",
            "rx number",
            "rx#",
            "claim",
            "claim number",
            "booking",
        ),
        anchors=(
            "accession",
            "specimen",
            "case",
            "ref",
            "confirmation",
            "ticket",
            "badge",
            "id",
            "user",
            "login",
            "order number",
            "prescription number",
            "rx",
            "claim",
            "booking",
        ),
        matches=("(accession «L-19-51055»)", "employee ID «88213»", "Ref: «AB-12345»"),
        rejects=("case of 12", "id est"),
    ),
    Pattern(
        label=Label.ID,
        expression=r"(?<![\w-])[A-Z]{1,3}-\d{2}-\d{4,7}(?![\w-])",
        score=SHAPE,
        cased=True,
        source="accession numbers of laboratories and radiology",
        matches=("study «CT-24-26462» read",),
        rejects=("T-10-12", "COVID-19"),
    ),
    Pattern(
        label=Label.ID,
        expression=r"(?<=[A-Z]{2} / )\d{4,6}(?![\w-])|(?<=[A-Z]{2}/)\d{4,6}(?![\w-])",
        score=SHAPE,
        cased=True,
        anchors=("/",),
        source="dictation lines",
        matches=("REED / «94325»",),
        rejects=("reed / 94325", "AB / 12"),
    ),
    Pattern(
        label=Label.ID,
        expression=r"(?<![\w.,/:$-])(?:\d{7,20}|[A-Z]{1,4}\d{6,14}(?:-[A-Z0-9])?)(?![\w%-]|[.,:/]\d)",
        score=WEAK,
        cased=True,
        source="45 CFR 164.514(b)(2)(i)(R): any other unique number",
        matches=("patient E-chart «9605004»", "«B82765639»"),
        rejects=("123456", "1,234,567", "$1234567", "ICD10", "12345678%"),
    ),
    # telephone
    Pattern(
        label=Label.PHONE,
        expression=r"(?<![\w.-])(?:\+?1[-. ]{0,2})?(?:\(\d{3}\)[ -]{0,2}|\d{3}[-. ]{1,2})\d{3}[-. ]{1,2}\d{4}(?: {0,2}(?:x|ext\.?|extension) {0,2}\d{1,6})?(?![\w-]|\.\d)",
        score=STRONG,
        locale="US",
        source="NANP",
        matches=("call «322-555-0124»", "«(287) 555-0197» home", "«810.555.0190»", "«+1 530 555 0139»", "«345-899-3560x4587»"),
        rejects=("322-555-01245", "12-34-56", "1322-555-0124-9"),
    ),
    Pattern(
        label=Label.PHONE,
        expression=r"(?<![\w+])(?:\+|00)[1-9]\d{0,2}[ .-]?(?:\(0?\d{0,4}\)[ .-]?)?\d(?:[ .-]?\d){5,13}(?![\w-])",
        score=STRONG,
        validator=lambda value: _is_phone("+" + re.sub(r"\(0\)", "", value).removeprefix("00").removeprefix("+")),
        source="E.164, phonenumbers",
        matches=("«+46 (0)179 459 33» fax", "ring «+447700677662»", "«0041 38 549 02 90»"),
        rejects=("+1 2", "+10 mg", "00123"),
    ),
    Pattern(
        label=Label.PHONE,
        expression=r"(?<![\w(+.-])(?:[x+]|ext\.? ?)?\(?\d(?:[ ().-]{0,2}\d){3,14}(?: {0,2}(?:x|ext\.?) {0,2}\d{1,6})?(?![\w-]|[.:/%]\d)",
        score=STRONG,
        validator=_at_least(4, 16),
        context=(
            "phone",
            "tel",
            "telephone",
            "call",
            "calls",
            "call me",
            "call back",
            "callback",
            "cell",
            "mobile",
            "pager",
            "paged",
            "beeper",
            "ext",
            "extension",
            "reached",
            "reach",
            "reachable",
            "contact",
            "voicemail",
            "dial",
            "phone number",
            "ring",
            "number to call",
            "sms",
            "whatsapp",
            "telefono",
            "telefon",
            "telefone",
            "movil",
            "celular",
        ),
        anchors=(
            "phone",
            "tel",
            "call",
            "cell",
            "mobile",
            "pager",
            "paged",
            "beeper",
            "ext",
            "reach",
            "contact",
            "voicemail",
            "dial",
            "ring",
            "sms",
            "whatsapp",
            "movil",
            "celular",
        ),
        matches=(
            "reached at «38577».",
            "Phone: «0494 92 82 32»",
            "pager «14540»",
            "call me on «9472 7916»?",
        ),
        rejects=("call in 2 weeks", "text 12", "office visit", "we registered 14540 patients", "portable 14540 Wh"),
    ),
    Pattern(
        label=Label.PHONE,
        expression=r"(?<![\w(+.-])(?:[x+]|ext\.? ?)?\(?\d(?:[ ().-]{0,2}\d){3,14}(?: {0,2}(?:x|ext\.?) {0,2}\d{1,6})?(?![\w-]|[.:/%]\d)",
        score=STRONG,
        validator=_at_least(7, 16),
        context=("text", "answering", "answer", "message", "messages", "registered", "portable", "handy", "office", "home"),
        anchors=("text", "answer", "message", "registered", "portable", "handy", "office", "home"),
        source="words that a number follows for other reasons, too",
        matches=("messages to «699 956 915»", "not answering at «99 668472»", "registered: «07700 900123»"),
        rejects=("we registered 14540 patients", "portable 14540 Wh", "message 4711"),
    ),
    Pattern(
        label=Label.PHONE,
        expression=r"(?<![\w(+.-])(?:\(0?\d{2,4}\) ?\d{2,4}[ -]?\d{3,4}|0\d{1,3}[ -]\d{2,4}(?:[ -]\d{2,4}){1,3}|0\d{3}[ -]\d{6,7}|8 ?\(\d{3}\) ?\d{3}[ -]\d{2}[ -]\d{2}|\d{2}(?:[ -]\d{2}){3}|\d{3} \d{4} \d{4})(?![\w-]|[.:/%]\d)",
        score=WEAK,
        source="national formats",
        matches=("«0494 92 82 32»", "«(08) 8747 6301»", "«71-33-52-22»", "«0961-7596216»", "«8 (495) 123-45-67»"),
        rejects=("08 12", "12-34-56", "2020-01-02"),
    ),
    Pattern(
        label=Label.PHONE,
        expression=r"(?<![\w])x\d{4,5}(?![\w-])",
        score=SHAPE,
        anchors=("x",),
        matches=("ext. «x5047»",),
        rejects=("x2", "x123456", "0x1234"),
    ),
    Pattern(
        label=Label.FAX,
        expression=r"(?<![\w(+.-])[x+]?\(?\d(?:[ ().-]{0,2}\d){3,14}(?![\w-]|[.:/%]\d)",
        score=CERTAIN,
        validator=_at_least(4, 16),
        context=("fax", "facsimile", "fax number", "faxed"),
        anchors=("fax", "facsimile"),
        matches=("Fax: «581-555-0178»", "fax «(569) 555-0108»", "fax «x7380»", "fax «75489»"),
        rejects=("fax it in 2 days",),
    ),
    # dates and ages
    Pattern(
        label=Label.DATE,
        expression=rf"(?<![\w/.-])(?:1[89]|20|21)\d{{2}}([-/.])(?:0?[1-9]|1[0-2])\1(?:0?[1-9]|[12]\d|3[01])(?![\d/-]){_TIME}?(?![\d])",
        score=STRONG,
        validator=_is_numeric_date,
        source="ISO 8601",
        matches=("on «2022-10-24»", "«1980-07-28 19:49:46»", "at «2024-04-03T10:00:00Z»", "«2024/4/3»"),
        rejects=("2022-13-24", "2022-10-244", "2023-02-30", "120-80-20"),
    ),
    Pattern(
        label=Label.DATE,
        expression=rf"(?<![\w/.-])(?:{_WEEKDAY})?(?:0?[1-9]|[12]\d|3[01])([-/.])(?:0?[1-9]|[12]\d|3[01])\1(?:(?:1[89]|20|21)\d{{2}}|\d{{2}})(?![\w/-]|\.\d){_TIME}?(?![\d])",
        score=STRONG,
        validator=lambda value: _is_numeric_date(re.sub(r"^\D+", "", value)),
        matches=("«12/15/2021»", "d.o.b. «03-21-1978»,", "«01/24/21».", "«31.12.1999»", "«6/24/1991»"),
        rejects=("1/2/3", "12/15", "99/99/1999", "1.2.3", "02-30-2023", "2-3-12-1"),
    ),
    Pattern(
        label=Label.DATE,
        expression=r"(?<![\w])(?:1[89]|20|21)\d{2} ?[年년] ?(?:1[0-2]|0?[1-9]) ?[月월] ?(?:[12]\d|3[01]|0?[1-9]) ?[日일]",
        score=STRONG,
        source="dates of Chinese, Japanese and Korean",
        matches=("初診«2026年3月14日»、", "«1985년 3월 5일»"),
        rejects=("2026年13月1日", "3月14"),
    ),
    Pattern(
        label=Label.DATE,
        expression=rf"(?<![\w-])(?:{_WEEKDAY})?{_MONTH}\.? {{0,2}}(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?(?![\d/:%]|\.\d)(?:(?:,? {{1,2}}|, ?)(?:(?:1[89]|20|21)\d{{2}}(?!\d)|'\d{{2}}(?!\d)))?{_TIME}?(?![\d])",
        score=STRONG,
        validator=_is_named_date,
        anchors=("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
        matches=("on «October 20, 2023»", "«Monday, May 23»", "«Jan 07»", "«Sept. 3rd, 2019» was"),
        rejects=("may 10 of them", "marched 3", "Mayo 12", "March 450"),
    ),
    Pattern(
        label=Label.DATE,
        expression=rf"(?<![\w/.-])(?:{_WEEKDAY})?(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?[ -]{{0,2}}(?:of {{1,2}})?{_MONTH}(?![a-z])\.?(?:[ ,-]{{1,3}}(?:(?:1[89]|20|21)\d{{2}}|'?\d{{2}})(?!\w|\.\d))?{_TIME}?(?![\d])",
        score=STRONG,
        validator=_is_named_date,
        anchors=("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
        matches=("born «09 Oct 1977»", "the «3rd of May, 2020»", "«12-JAN-2021»", "«4 July»"),
        rejects=("12 marks", "in 2 may be", "10 decibel"),
    ),
    Pattern(
        label=Label.DATE,
        expression=rf"(?<![\w-]){_MONTH}(?![a-z])\.?(?: of)?(?:,? {{1,2}}|[-/])(?:(?:1[89]|20|21)\d{{2}}|'\d{{2}})(?![\w/-])",
        score=STRONG,
        anchors=("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"),
        matches=("since «March 2023».", "«Sep. of 2019»", "«Aug-2020»"),
        rejects=("march 20", "may 20", "Mar 2500"),
    ),
    Pattern(
        label=Label.DATE,
        expression=r"(?<![\w/.-])(?:1[89]|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?![\w/-]|\.\d)",
        score=STRONG,
        validator=_is_compact_date,
        source="ISO 8601 basic, HL7",
        matches=("DOB «19540113»",),
        rejects=("19541313", "20230230"),
    ),
    Pattern(
        label=Label.DATE,
        expression=rf"(?<![\w/.-])(?:{_WEEKDAY_ES},? )?(?:dia )?(?:0?[1-9]|[12]\d|3[01])o? ?(?:de |-|/)? ?(?:{_MONTH_ES})(?![a-z])(?:(?:,? (?:de[l]? (?:ano )?)?|-|/)(?:1[89]|20|21)\d{{2}}(?!\d))?(?: a las {_CLOCK})?",
        score=STRONG,
        validator=_is_day_of_month,
        anchors=_ANCHORS_ES,
        locale="ES",
        source="RAE, Ortografía",
        matches=(
            "el «3 de mayo de 2019» por",
            "«lunes, 12 de febrero»",
            "ingresa el «1º de enero del 2020»",
            "«15/marzo/2018»",
            "«7 septiembre 2011 a las 10:30»",
        ),
        rejects=("30 de mayonesa", "de mayo", "mayo", "40 de enero"),
    ),
    Pattern(
        label=Label.DATE,
        expression=rf"(?<![\w-])(?:{_MONTH_ES}) (?:de[l]? (?:ano )?)?(?:1[89]|20|21)\d{{2}}(?![\w-])",
        score=STRONG,
        anchors=_ANCHORS_ES,
        locale="ES",
        source="RAE, Ortografía",
        matches=("desde «marzo de 2021».", "«agosto del año 2020»"),
        rejects=("enero de 12", "marzo"),
    ),
    Pattern(
        label=Label.DATE,
        expression=rf"(?<![\w/.-])(?:{_WEEKDAY_FR},? )?(?:1er|0?[1-9]|[12]\d|3[01])[ -](?:{_MONTH_FR})(?![a-z])(?:\.?[ -](?:1[89]|20|21)\d{{2}}(?!\d))?(?:,? a {_CLOCK})?",
        score=STRONG,
        validator=_is_day_of_month,
        anchors=_ANCHORS_FR,
        locale="FR",
        source="Imprimerie nationale, Lexique",
        matches=("le «1er février 2020» à Lyon", "«mardi 14 août»", "né le «3 déc. 1957»", "«12 juillet 1998 à 14h30»"),
        rejects=("40 janvier", "12 marsouins", "juin"),
    ),
    Pattern(
        label=Label.DATE,
        expression=rf"(?<![\w-])(?:{_MONTH_FR})\.? (?:1[89]|20|21)\d{{2}}(?![\w-])",
        score=STRONG,
        anchors=_ANCHORS_FR,
        locale="FR",
        source="Imprimerie nationale, Lexique",
        matches=("depuis «août 2019».", "en «décembre 1999»"),
        rejects=("aout 12", "fevrier"),
    ),
    Pattern(
        label=Label.DATE,
        expression=rf"(?<![\w/.-])(?:{_WEEKDAY_DE}\.?,? (?:den |dem |der )?)?(?:(?:0?[1-9]|[12]\d|3[01])\. ?(?:{_MONTH_DE})(?![a-z])\.? ?(?:1[89]|20|21)\d{{2}}(?!\d)"
        rf"|(?:(?<=am )|(?<=vom )|(?<=zum )|(?<=den )|(?<=bis )|(?<=seit )|(?<=ab )|(?<=tag, )|(?<=tag ))(?:0?[1-9]|[12]\d|3[01])\. ?(?:{_MONTH_DE})(?![a-z])|(?:0?[1-9]|[12]\d|3[01])\. ?(?:{_GERMAN_ONLY})(?![a-z]))(?:,? (?:um )?{_CLOCK})?",
        score=STRONG,
        anchors=_ANCHORS_DE,
        locale="DE",
        source="DIN 5008",
        matches=(
            "am «3. März 2020» in",
            "am «4. April» war",
            "«Montag, den 12. Mai»",
            "am «7. Juni»",
            "geb. «24. Dez. 1961»",
            "«1.Oktober 2018 um 9:30 Uhr»",
        ),
        rejects=("40. Mai", "3. Marzipan", "Dezember", "2. April shows", "1. Jan went home"),
    ),
    Pattern(
        label=Label.DATE,
        expression=rf"(?<![\w-])(?:{_MONTH_DE})\.? (?:1[89]|20|21)\d{{2}}(?![\w-])",
        score=STRONG,
        anchors=_ANCHORS_DE,
        locale="DE",
        source="DIN 5008",
        matches=("seit «März 2020».", "«Dezember 1999»"),
        rejects=("Juli 12", "Oktober"),
    ),
    Pattern(
        label=Label.DATE,
        expression=r"(?<![\w/.-])(?:0?[1-9]|1[0-2])[/-](?:19|20)\d{2}(?![\w/-])",
        score=SHAPE,
        matches=("since «03/2023»", "«7-2019»"),
        rejects=("13/2023", "120/2000"),
    ),
    Pattern(
        label=Label.DATE,
        expression=r"(?<![\w/.-])(?:0?[1-9]|[12]\d|3[01])[/-](?:0?[1-9]|[12]\d|3[01])(?![\w/-]|\.\d|,\d|%)",
        rare=True,
        score=SHAPE,
        validator=_is_month_day,
        context=("on", "dated", "date", "since", "dob", "visit", "seen", "appointment", "admitted", "discharged", "until", "by", "surgery"),
        matches=("seen on «10/24»", "since «3/14»."),
        rejects=("pain 5/10", "on 120/80", "strength 5/5"),
    ),
    Pattern(
        label=Label.AGE,
        expression=r"(?<![\w./-])\d{2,3}(?=[ -]{0,2}(?:years?|yrs?|y)[ -]{0,2}(?:old|o\b|of age))",
        score=STRONG,
        validator=_is_old,
        anchors=("old", "yo", "y o", "y-o", "of age"),
        source="45 CFR 164.514(b)(2)(i)(C)",
        matches=("a «98»-year-old man", "«91» years old", "«104» yrs old"),
        rejects=("a 45-year-old", "89 years old", "130 years old"),
    ),
    Pattern(
        label=Label.AGE,
        expression=r"(?<![\w./-])\d{2,3}(?= ?(?:yo|y/o|y\.o\.|yr/o)(?!\w))",
        score=STRONG,
        validator=_is_old,
        anchors=("yo", "y/o", "y.o.", "yr/o"),
        source="45 CFR 164.514(b)(2)(i)(C)",
        matches=("«92» y/o", "a «94»yo man"),
        rejects=("45 yo", "92 yogurts"),
    ),
    Pattern(
        label=Label.AGE,
        expression=r"(?<![\w./-])\d{2,3}(?![\w%/-]|\.\d)",
        score=STRONG,
        validator=_is_old,
        context=("age", "aged", "ages", "turned", "turning", "age of"),
        anchors=("age", "turn"),
        source="45 CFR 164.514(b)(2)(i)(C)",
        matches=("aged «97»", "Age: «101»", "turned «90»", "at the age of «93»"),
        rejects=("age 45", "turned 180", "dosage 95"),
    ),
    Pattern(
        label=Label.AGE,
        expression=r"(?<!\w)(?:ninety(?:[ -](?:one|two|three|four|five|six|seven|eight|nine))?|(?:one|a) hundred(?: and)?(?: (?:one|two|three|four|five|six|seven|eight|nine|ten))?)(?=[ -](?:years?)[ -](?:old|of age))",
        digits=False,
        score=STRONG,
        anchors=("ninety", "hundred"),
        source="45 CFR 164.514(b)(2)(i)(C)",
        matches=("«ninety-two»-year-old",),
        rejects=("ninety days",),
    ),
    # places
    Pattern(
        label=Label.ADDRESS,
        expression=rf"(?<![\w.-])\d{{1,6}}[A-Z]?,? {{1,2}}(?:\d{{1,5}} {{1,2}})?(?:[NSEW]{{1,2}}\.? )?(?:{_WORD}\.? {{1,2}}|\d{{1,3}}(?:st|nd|rd|th) {{1,2}}){{1,4}}(?i:{_STREET})\b\.?(?i:{_UNIT})?",
        score=STRONG,
        cased=True,
        locale="US",
        source="USPS Publication 28",
        matches=(
            "at «259 Dennis Roads Suite 696», today",
            "«440 Stone Shoals»",
            "«12 N. Main St.» is",
            "«350 5th Avenue»",
            "«771 David Creek Apt. 729»",
            "to «370 3911 Fourth Avenue»",
        ),
        rejects=("5 mg of Dr", "take 2 Tylenol", "120 over 80"),
    ),
    Pattern(
        label=Label.ADDRESS,
        expression=rf"(?<![\w.-])(?:{_WORD} {{1,2}}){{1,3}}(?:Street|Avenue|Road|Lane|Boulevard|Drive)(?![\w-])",
        digits=False,
        score=SHAPE,
        cased=True,
        rare=True,
        context=("on", "at", "in", "near", "along", "off", "of", "and"),
        anchors=("street", "avenue", "road", "lane", "boulevard", "drive"),
        matches=("shops on «Tarsicio Isle Street» were", "lives near «Magnolia Avenue»."),
        rejects=("on the Road", "a Silk Road town", "on road"),
    ),
    Pattern(
        label=Label.ADDRESS,
        expression=r"(?<![\w.-])\d{1,6} (?!(?:mg|ml|minutes?|hours?|days?|miles?|km|way|lane)\b)[a-z]{3,20}(?: [a-z]{3,20})? (?:street|avenue|boulevard|road|drive|lane)(?!\w)",
        score=SHAPE,
        cased=True,
        rare=True,
        context=("address", "lives at", "living at", "resides at", "moved to", "located at", "home address", "at"),
        anchors=("street", "avenue", "boulevard", "road", "drive", "lane"),
        locale="US",
        source="USPS Publication 28",
        matches=("address: «482 maple street» is",),
        rejects=("a 5 minute drive", "at 20 miles road", "two 4 lane road"),
    ),
    Pattern(
        label=Label.ADDRESS,
        expression=rf"(?<![\w])(?:P\.? ?O\.? {{0,2}}Box|Post Office Box) {{1,2}}#?\d{{1,7}}(?i:{_UNIT})?(?!\w)",
        score=STRONG,
        anchors=("box",),
        locale="US",
        matches=("mail to «P.O. Box 186»", "«PO Box 12345»"),
        rejects=("box 12", "PO dose"),
    ),
    Pattern(
        label=Label.ADDRESS,
        expression=(
            rf"(?<![\w])(?:(?:psc|unit) {{1,2}}\d{{1,6}},? {{1,2}}box {{1,2}}\d{{1,6}}(?:\s{{1,2}}(?:apo|fpo|dpo) [a-z]{{2}} \d{{5}})?|(?:apo|fpo|dpo) (?:aa|ae|ap) \d{{5}}"
            rf"|us[nsc]{{1,2}}(?:gc)? {_WORD}(?:[ -]{_WORD}){{0,2}}\s{{1,2}}(?:apo|fpo|dpo) [a-z]{{2}} \d{{5}})(?!\w)"
        ),
        score=STRONG,
        anchors=("psc", "apo", "fpo", "dpo"),
        locale="US",
        source="USPS military addresses",
        matches=("at «PSC 0413, Box 8144\nAPO AA 42323»", "«USNS Sekerkova\nFPO AA 65728»"),
        rejects=("unit 3 box", "APO 12"),
    ),
    Pattern(
        label=Label.ADDRESS,
        expression=r"(?<![\w])(?:Apt|Apartment|Suite|Ste)\.? #?\d{1,5}[A-Z]?(?![\w-])",
        score=SHAPE,
        anchors=("apt", "apartment", "suite", "ste"),
        matches=("\n«Suite 279»\n", "«Apt. 12B»"),
        rejects=("suite of tests", "aptitude 3"),
    ),
    Pattern(
        label=Label.ADDRESS,
        expression=rf"(?<![\w])\d{{2,6}}[A-Za-z]?(?: {{1,2}}\d{{1,5}})? {{1,2}}{_WORD}\.?(?: {{1,2}}(?:(?:de|la|du|des|del|di|da|do|van|von|der|el) )?{_WORD}\.?){{0,3}}(?: \d{{1,5}}[A-Za-z]?)?{_UNIT}?(?!\w)",
        score=SHAPE,
        cased=True,
        context=(
            "address",
            "lives at",
            "live at",
            "living at",
            "located at",
            "office",
            "resides at",
            "residing at",
            "moved to",
            "home address",
            "located in",
            "delivered to",
            "drops you off",
            "mailing address",
            "address of",
        ),
        anchors=("address", "lives at", "live at", "living at", "located", "resid", "moved to", "office", "delivered to", "drops you off"),
        matches=("lives at «63 Rue de Kairouan»", "address is «9931 14 Iliou Street»", "Address: «05405 Magasinsgatan 7»"),
        rejects=("address 3 issues", "moved to 4 West"),
    ),
    Pattern(
        label=Label.ADDRESS,
        expression=(
            rf"(?<![\w])(?:(?i:rue|avenue|boulevard|via|viale|calle|c/|ul\.|ulica|plaza|plac|rua|avenida|av\.|piazza|chemin|place|paseo|camino|corso|largo|praca) {{0,2}}"
            rf"(?:(?:de|la|du|des|del|di|da|do|dos|della|le|les|l'|d') ?){{0,3}}{_WORD}(?: {{1,2}}{_WORD}){{0,3}},? {{1,2}}\d{{1,5}}[A-Za-z]?"
            rf"|\d{{1,5}}[A-Za-z]?,? {{1,2}}(?:[Rr]ue|[Aa]venue|[Bb]oulevard|[Cc]hemin|[Pp]lace|[Aa]llee|[Ii]mpasse|[Qq]uai|[Cc]ours) (?:(?:de|la|du|des|le|les|l'|d') ?){{0,3}}{_WORD}(?:[ -]{{1,2}}{_WORD}){{0,3}})(?!\w)"
        ),
        score=SHAPE,
        cased=True,
        anchors=(
            "rue ",
            "avenue ",
            "boulevard ",
            "via ",
            "viale ",
            "calle ",
            "c/",
            "ul.",
            "ulica ",
            "plaza ",
            "plac",
            "rua ",
            "avenida ",
            "av.",
            "piazza ",
            "chemin ",
            "paseo ",
            "camino ",
            "corso ",
            "largo ",
            "praca ",
            "allee ",
        ),
        matches=("«ul. Wieckowskiego Stefana 28»", "«33 avenue de Provence»", "«C/ Senores Curas 88»"),
        rejects=("via mouth 2", "rue the day", "Take 3 avenues"),
    ),
    Pattern(
        label=Label.ADDRESS,
        expression=(
            r"(?<![\w])(?:[A-Z][a-z]{1,30}(?:(?<=katu)|(?<=kuja)|(?<=strasse)|(?<=gasse)|(?<=weg)|(?<=laan)|(?<=straat)|(?<=gatan)|(?<=vagen)|(?<=vej)|(?<=gade)|(?<=veien)|(?<=gata)|(?<=braut)|(?<=platz)|(?<=allee))"
            rf" \d{{1,5}}[A-Za-z]?|{_WORD}(?: {_WORD}){{0,2}} (?:Strasse|utca|ut|u\.|krt\.|utja|tere) \d{{1,4}}\.?)(?!\w)"
        ),
        score=SHAPE,
        cased=True,
        anchors=(
            "katu",
            "kuja",
            "strasse",
            "gasse",
            "weg",
            "laan",
            "straat",
            "gatan",
            "vagen",
            "vej",
            "gade",
            "veien",
            "gata",
            "braut",
            "platz",
            "allee",
            "utca",
            " ut ",
            " u.",
            "krt.",
            "utja",
            "tere",
        ),
        matches=("«Koskikatu 25»", "«Friedhofstrasse 33»", "«Villacher Strasse 89»"),
        rejects=("weg 2", "Tylenol 500"),
    ),
    Pattern(
        label=Label.ID,
        expression=r"(?<![\w./-])\d{4,6}/\d{2}(?:\d{2})?(?![\w/-]|\.\d)",
        score=STRONG,
        rare=True,
        context=("no", "nos", "case no", "application no", "application nos", "docket", "case", "docket no", "file no", "case number", "ref"),
        anchors=("no", "docket", "case", "ref"),
        source="dockets of courts",
        matches=("(application no. «36244/06»)", "case no. «8805/17»."),
        rejects=("no. 120/80 was measured", "ratio 300/20"),
    ),
    Pattern(
        label=Label.ZIP,
        expression=r"(?<![\w-])(?=[A-Z -]{0,4}\d)[A-Z0-9]{2,6}(?:[ -]?[A-Z0-9]{2,4})?(?![\w-]|\.\d)",
        score=STRONG,
        validator=_at_least(1),
        context=(
            *(
                "zip",
                "zip code",
                "zipcode",
                "postal code",
                "post code",
                "postcode",
                "postleitzahl",
                "plz",
                "code postal",
                "codigo postal",
                "cod postal",
                "cep",
                "psc",
            ),
            *(
                "poskode",
                "postnummer",
                "postinumero",
                "postiindeks",
                "iranyitoszam",
                "kod pocztowy",
                "posta kodu",
                "indeks",
            ),
        ),
        anchors=("zip", "pos", "plz", "code", "cod", "cep", "psc", "iranyitoszam", "indeks"),
        cased=True,
        source="UPU S42",
        matches=("ZIP: «6280»", "my postcode is «SW1A 1AA».", "irányítószám: «1051»"),
        rejects=("zip the file", "ZIP: none", "zip code of 3.5"),
    ),
    Pattern(
        label=Label.ZIP,
        expression=r"(?<![\w-])(?:\d{5}|\d{3} ?\d{3})(?![\w-]|\.\d| ?(?:mg|mcg|µg|g|ml|units?|iu|tab|cap)\b)",
        score=SHAPE,
        context=("cap", "pin", "pin code", "pincode"),
        anchors=("cap", "pin"),
        source="UPU S42: Italy, India; both words have other senses",
        matches=("CAP «20121» Milano", "Bengaluru, PIN «560 001»", "pin code: «110001»"),
        rejects=("omeprazole cap 20 mg daily", "GPIO pin 13", "cap 10000 units", "pin 1234"),
    ),
    Pattern(
        label=Label.ZIP,
        expression=r"(?:(?<=\b[A-Z][A-Z] )|(?<=\b[A-Z][A-Z]  ))\d{5}(?:-\d{4})?(?!\w|-|\.\d|,\d)",
        score=SHAPE,
        cased=True,
        validator=None,
        locale="US",
        source="USPS",
        matches=("Boston, MA «02115-1234»", "TX «75193»"),
        rejects=("Texas 751931", "ma 02115"),
    ),
    Pattern(
        label=Label.ZIP,
        expression=r"(?<![\w-])\d{5}(?:-\d{4})?(?![\w-])",
        score=STRONG,
        context=("zip", "zip code", "zipcode", "postal code", "postcode", "post code", "plz", *(name.lower() for name in STATE_NAMES.split("|"))),
        anchors=("zip", "post", "plz", *(name.lower() for name in STATE_NAMES.split("|"))),
        matches=("zip code «44070»", "Ohio «44070»"),
        rejects=("zip 1234",),
    ),
    Pattern(
        label=Label.ZIP,
        expression=r"(?<![\w-])(?:[A-Z]{1,2}\d[A-Z\d]? \d[ABD-HJLNP-UW-Z]{2}|[ABCEGHJ-NPRSTVXY]\d[ABCEGHJ-NPRSTV-Z] \d[ABCEGHJ-NPRSTV-Z]\d)(?![\w-])",
        score=SHAPE,
        cased=True,
        locale="GB",
        source="Royal Mail PAF, Canada Post",
        matches=("London «SW1A 1AA»", "«K1A 0B1» Ottawa"),
        rejects=("B12 5MG", "T4 10"),
    ),
    Pattern(
        label=Label.ZIP,
        expression=rf"(?:^|[,\n]) {{0,2}}(?:{_WORD}\.? ){{1,3}}(?:[A-Z]{{2}} )?(?P<value>\d{{5}}(?:-\d{{4}})?)(?![\w-]|[.,]\d)",
        score=SHAPE,
        cased=True,
        locale="US",
        source="USPS Publication 28",
        matches=("Suite 696, Port Robert «78099»   Tel", "12 Main St\nColintown «44070-1234»"),
        rejects=("in 44070", ", take 44070"),
    ),
    Pattern(
        label=Label.ZIP,
        expression=r"(?:(?:^|(?<=[,\n])|(?<=[,\n] ))(?:[A-Z]{1,2}-\d{4,5}|\d{5}|\d{2}-\d{3}|\d{3} \d{2}|\d{4} [A-Z]{2})|(?:(?<= \d, )|(?<= \d\d, )|(?<= \d\d\d, ))\d{4})(?= {1,2}[A-Z][a-z]{2})",
        score=SHAPE,
        cased=True,
        source="UPU S42: the code before the town",
        matches=("Weg 5, «10115» Berlin", "Storgatan 1\n«123 45» Lund", "ul. Dluga 4, «00-238» Warszawa", "Vej 12, «2200» Arhus", "«1012 AB» Delft"),
        rejects=("in 2019, 2200 Patients", "10115 berlin", "dose, 500 Units"),
    ),
    Pattern(
        label=Label.LOCATION,
        expression=rf"(?:(?<=[,\n] )|(?<=[,\n]))(?:{_WORD}\.? ){{0,2}}[A-Z][a-z][A-Za-z'-]{{1,30}}(?=,? (?:[A-Z]{{2}} )?\d{{5}}(?:-\d{{4}})?(?![\w-]|[.,]\d))",
        score=SHAPE,
        cased=True,
        locale="US",
        source="USPS Publication 28",
        matches=("Suite 696, «Port Robert» 78099",),
        rejects=("Suite 696, in 78099",),
    ),
    Pattern(
        label=Label.PERSON,
        expression=r"(?<![A-Za-z])[A-Z][A-Z'-]{1,30}(?= ?/ ?\d{4,6}(?![\w/-]))",
        score=SHAPE,
        cased=True,
        anchors=("/",),
        source="dictation lines",
        matches=("DT: 08/14/19  «REED» / 94325",),
        rejects=("BP / 120", "DATE/TIME"),
    ),
    Pattern(
        label=Label.LOCATION,
        expression=rf"(?<![\w.-])(?:[A-Z][a-zA-Z'-]{{1,30}}\.? {{1,2}}){{0,2}}[A-Z][a-zA-Z'-]{{1,30}}(?=, {{0,2}}{_STATE}\b(?!-))",
        digits=False,
        score=SHAPE,
        cased=True,
        locale="US",
        matches=("lives in «Hansenmouth», TX", "«East James», Ohio"),
        rejects=("pain, OR", "nausea, MI"),
    ),
    *(_national(*row) for row in _NATIONAL),
    # crypto addresses, places on the globe, cookies, keys of connection strings, and what merely looks drawn at random after a telling word
    Pattern(
        label=Label.ACCOUNT,
        expression=r"(?<![\w])(?:[13][1-9A-HJ-NP-Za-km-z]{25,34}|bc1[02-9ac-hj-np-z]{11,71})(?![\w])",
        score=CERTAIN,
        validator=_stdnum(stdnum.bitcoin.is_valid),
        cased=True,
        source="BIP 13, BIP 173",
        matches=("pay «1NEDqZPvTWRaoho48qXuLLsrYomMXPABfD»", "to «bc1qardv855yjngspvxuttq897aqca3lxju2y69jce»."),
        rejects=("1NEDqZPvTWRaoho48qXuLLsrYomMXPABfE", "bc1qardv855yjngspvxuttq897aqca3lxju2y69jcf"),
    ),
    Pattern(
        label=Label.ACCOUNT,
        expression=r"(?<![\w])(?:0x[0-9a-fA-F]{40}|4[0-9AB][1-9A-HJ-NP-Za-km-z]{93})(?![\w])",
        score=STRONG,
        cased=True,
        source="ERC-55, Monero standard address",
        matches=("wallet «0x52908400098527886E0F7030069857D2E4169EE7»",),
        rejects=("0x52908400098527886E0F70", "0x52908400098527886E0F7030069857D2E4169EE7a"),
    ),
    Pattern(
        label=Label.LOCATION,
        expression=r"(?<![\w.])[-+]?(?:[1-8]?\d|90)\.\d{3,10},? {0,2}[-+]?(?:1[0-7]\d|[1-9]?\d|180)\.\d{3,10}(?![\w.])",
        score=STRONG,
        context=("gps", "coordinates", "coords", "lat/lon", "lat/long", "latlon", "latlng", "geo", "location", "position", "ll", "q"),
        anchors=("gps", "coord", "lat", "geo", "location", "position", "ll=", "q="),
        source="ISO 6709",
        matches=("GPS: «52.5200, 13.40495»", "coordinates «-33.8688,151.2093»"),
        rejects=("loss 0.1234, 0.5678", "GPS 95.1234, 13.4049"),
    ),
    Pattern(
        label=Label.LOCATION,
        expression=r"(?<![\w.])(?:[1-8]?\d|90)\.\d{3,10} ?[NS],? {0,2}(?:1[0-7]\d|[1-9]?\d|180)\.\d{3,10} ?[EW](?![\w])",
        score=STRONG,
        cased=True,
        source="ISO 6709",
        matches=("at «52.5200 N, 13.40495 E»",),
        rejects=("52.5200 N", "52.5 N, 13.4 E"),
    ),
    Pattern(
        label=Label.SECRET,
        expression=r"(?<![\w-])(?:set-)?cookie[\"']?\s{0,3}:\s{0,3}[\"']?(?P<value>[\w.$!%-]{1,64}=[^\s;\"'￼]{1,2000}(?:; {0,2}[\w.$!%-]{1,64}=[^\s;\"'￼]{1,2000}){0,40})",
        digits=False,
        score=CERTAIN,
        anchors=("cookie",),
        source="RFC 6265",
        matches=("Cookie: «sid=31d4d96e407aad42; lang=en»", "Set-Cookie: «id=a3fWa»; Secure"),
        rejects=("the cookie: a biscuit", "cookies=on"),
    ),
    Pattern(
        label=Label.SECRET,
        expression=r"(?<![\w])(?:phpsessid|jsessionid|sessionid|session_id|connect\.sid|csrftoken|xsrf-token|asp\.net_sessionid|sid)=(?P<value>[\w.%:+/-]{8,500})",
        digits=False,
        score=STRONG,
        validator=_is_secret,
        anchors=("sess", "sid=", "csrf", "xsrf", ".sid"),
        source="RFC 6265",
        matches=("JSESSIONID=«0000A1b2C3d4E5»; x", "?sid=«9f8e7d6c5b4a»"),
        rejects=("sid=on", "sessionid=undefined"),
    ),
    Pattern(
        label=Label.SECRET,
        expression=r"(?<![\w])(?:AccountKey|SharedAccessKey|SharedSecretValue|sig)=(?P<value>[A-Za-z0-9+/%_-]{20,300}={0,2})",
        digits=False,
        score=CERTAIN,
        validator=_is_secret,
        anchors=("key=", "value=", "sig="),
        source="Azure connection strings",
        matches=("AccountName=a;AccountKey=«" + "Ab1+" * 11 + "==»;",),
        rejects=("AccountKey=short", "design=abcdefghijklmnopqrstuvwxyz"),
    ),
    Pattern(
        label=Label.SECRET,
        expression=(
            r"(?<![a-z])(?:access|auth|api|credentials?|creds|key|secret|token|signature|passcode)(?:[_.-]?[a-z]{2,12}){0,2}[\"']?\s{0,3}(?::=|=>|[:=])\s{0,3}[\"'`]?"
            r"(?P<value>[A-Za-z0-9+/_.-]{16,150}={0,2})(?![\w])"
        ),
        score=SHAPE,
        validator=_is_random,
        anchors=("access", "auth", "api", "cred", "key", "secret", "token", "signature", "passcode"),
        source="entropy after a telling word",
        matches=("service_credentials = '«q9Zt4Lw0xVb7Ns2KfR8u»'", "signature: «Zx81kQm40pLr77Tbn2Wc»"),
        rejects=("access: the_department_of_things", "key = aaaaaaaaaaaaaaaa111"),
    ),
    # organisations
    Pattern(
        label=Label.ORG,
        expression=(
            r"(?<![\w-])(?P<value>(?:[A-Z][A-Za-z'.-]{1,30}(?:,? (?:of|and|&|for|the) | {1,2}|, )){1,5}(?:(?:Regional|General|Memorial|Community|VA|Family|Internal|University|Children's|Medical) {1,2}){0,3}"
            r"(?:Hospital|HOSPITAL|Medical Center|MEDICAL CENTER|Medical Centre|Health System|HEALTH SYSTEM|Healthcare|HEALTHCARE|Clinic|CLINIC|Imaging|IMAGING|Family Practice|FAMILY PRACTICE|Medical Group|"
            r"Health Center|HEALTH CENTER|Hospice|HOSPICE|Pharmacy|PHARMACY|Nursing Home|University|UNIVERSITY|College|High School|Elementary School|Laboratories|Rehabilitation Center|Surgery Center|Cancer Center|Health|HEALTH))(?![\w-])"
        ),
        digits=False,
        score=SHAPE,
        cased=True,
        matches=(
            "at «Howell Memorial Hospital»",
            "«St. Tina Medical Center» on",
            "«WATERS & WALKER FAMILY PRACTICE»",
            "«Andrewside Imaging» (accession",
        ),
        rejects=("the hospital", "clinic visit"),
    ),
    Pattern(
        label=Label.ORG,
        expression=r"(?<![\w-])[A-Z][\w'&.-]{0,30}(?:,? (?:and |& )?[A-Z][\w'&.-]{0,30}){0,4},? {1,2}(?:LLC|Inc|Ltd|PLC|Corp|Corporation|GmbH|LLP|Group|and Sons|& Sons|Holdings|Partners|Foundation)\b\.?",
        digits=False,
        score=SHAPE,
        cased=True,
        anchors=("llc", "inc", "ltd", "plc", "corp", "gmbh", "llp", "group", "and sons", "& sons", "holdings", "partners", "foundation"),
        matches=("works at «Jefferson LLC» as", "«Pratt and Sons»", "«Pena, Williams Inc»"),
        rejects=("support group", "The group"),
    ),
    Pattern(
        label=Label.ORG,
        expression=r"(?<![\w-])[A-Z][A-Za-z']{1,30}(?:-[A-Z][A-Za-z']{1,30}|(?:, [A-Z][A-Za-z']{1,30}){0,2},? (?:and|&) [A-Z][A-Za-z']{1,30}|(?: [A-Z][A-Za-z'.]{1,30}){0,2})(?![\w-])",
        digits=False,
        score=STRONG,
        cased=True,
        context=(
            "employed by",
            "employed at",
            "employer",
            "works at",
            "works for",
            "worked at",
            "worked for",
            "work at",
            "work for",
            "job at",
            "employee of",
        ),
        anchors=("employ", "work", "job at"),
        matches=("employed by «Soto, Elliott and Larson» since", "works at «Green-Fuller»", "Employer: «Hooli»"),
        rejects=("works at night", "works for him"),
    ),
)

ISSUERS: tuple[Pattern, ...] = tuple(_issuers())
"""Rows of the secret scanners' public data: run like those of the table; a test makes their examples from their expressions."""

# What is never an identifier: values inside these are kept unless a cue or a check digit says otherwise (score >= STRONG).
GUARDS: tuple[str, ...] = (
    r"(?<![\w-])[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}(?![\w-])",  # UUID
    r"(?<![\w-])(?=[0-9a-f]{0,40}[a-f])(?=[0-9a-f]{0,40}\d)[0-9a-f]{7,64}(?![\w-])",  # commit hash, digest
    r"(?<!\w)(?:v|V|ver\.?|[Vv]ersion|[Rr]elease|[Rr]ev\.?)\s?\d{1,5}(?:\.\d{1,8}){1,5}(?:[-+][\w.]{1,20})?",  # version
    r"(?<![\w.])\d{1,7}(?:[.,]\d{1,4})?(?:\s?(?:-|to)\s?\d{1,7}(?:\.\d{1,3})?)? ?(?:mg|mcg|ug|g|gm|kg|ml|mL|cc|dl|dL|L|lbs?|units?|IU|mEq|mmol|mmHg|bpm|cm|mm|tablets?|tabs?|caps?|puffs?|drops?|%|percent|days?|weeks?|months?|hours?|hrs?|minutes?|mins?|years?)\b",  # dose, measure, duration
    r"(?<![\w/])\d{2,3}\s?/\s?\d{2,3}(?![\w/])",  # blood pressure
    r"(?<![\w-])[A-TV-Z]\d[0-9A-Z](?:\.[0-9A-Z]{1,4})?(?![\w-])",  # ICD-10
    r"(?<!\w)(?:CPT|HCPCS|ICD(?:-\d+)?(?:-CM)?|NDC|LOINC|SNOMED(?: CT)?|RxNorm|RxCUI|CUI|PMID|doi|ISBN|RFC|ISO|PubMed|ATC|NCT|GO|rs)[:#\s-]{0,3}[\d.]{2,20}[\w./-]{0,20}",  # public codes
    r"(?<!\w)0x[0-9a-fA-F]{1,16}(?!\w)",  # addresses in code
)

# Names ------------------------------------------------------------------------------------------------------------------------------------------------------

TITLES = (
    "dr",
    "doctor",
    "mr",
    "mrs",
    "ms",
    "miss",
    "mx",
    "prof",
    "professor",
    "sir",
    "madam",
    "rev",
    "reverend",
    "sister",
    "father",
    "nurse",
    "judge",
    "capt",
    "sgt",
    "lt",
    "col",
    "sra",
    "sr",
    "herr",
    "frau",
    "mme",
)
"""Before a name. Those that are also words (sister, father, nurse, judge) count only in front of a capital letter."""

CREDENTIALS = (
    "MD",
    "M.D.",
    "DO",
    "D.O.",
    "RN",
    "NP",
    "APRN",
    "CRNP",
    "PA",
    "PA-C",
    "PhD",
    "Ph.D.",
    "DDS",
    "DMD",
    "DPM",
    "LCSW",
    "LPN",
    "CNM",
    "CRNA",
    "PharmD",
    "PsyD",
    "MBBS",
    "FACP",
    "FACS",
    "FACC",
    "PT",
    "DPT",
    "OT",
    "MSW",
    "Esq",
)

COLON_CUES = (
    "patient",
    "patient name",
    "name",
    "full name",
    "first name",
    "last name",
    "surname",
    "maiden name",
    "pt",
    "signed",
    "signed by",
    "electronically signed by",
    "dictated by",
    "attending",
    "attending physician",
    "provider",
    "physician",
    "referring physician",
    "referring provider",
    "primary care physician",
    "pcp",
    "surgeon",
    "assistant",
    "cc",
    "attn",
    "attention",
    "from",
    "to",
    "author",
    "reported by",
    "seen by",
    "reviewed by",
    "reviewed with",
    "verified by",
    "transcribed by",
    "emergency contact",
    "contact",
    "next of kin",
    "guarantor",
    "subscriber",
    "spouse",
    "guardian",
    "caregiver",
    "re",
    "regarding",
    "dear",
    "user",
    "employee",
    "client",
    "insured",
    "informant",
    "interpreter",
    "nurse",
    "witness",
    "ordered by",
    "performed by",
    "consultant",
    "radiologist",
    "pathologist",
    "anesthesiologist",
)
"""Before a colon (or at the start of a line and two spaces), then a name."""

SPEAKERS = (
    "patient",
    "pt",
    "nurse",
    "provider",
    "physician",
    "user",
    "client",
    "informant",
    "interpreter",
    "caregiver",
    "guardian",
    "spouse",
    "contact",
    "from",
    "to",
    "re",
    "regarding",
    "attention",
)
"""Colon cues after which a sentence can stand as well: a lone ordinary word there is no name."""

PHRASE_CUES = (
    "letter to",
    "my name is",
    "name is",
    "call me",
    "i am",
    "i'm",
    "this is",
    "it is",
    "it's",
    "named",
    "called",
    "signed by",
    "dictated by",
    "seen by",
    "reviewed by",
    "referred by",
    "evaluated by",
    "followed by",
    "under the care of",
    "accompanied by",
    "spoke with",
    "spoke to",
    "discussed with",
    "met with",
    "thanks",
    "thank you",
    "dear",
    "hello",
    "hi",
    "hey",
    "said",
    "says",
    "told",
    "asked",
    "good morning",
    "good afternoon",
    "signed",
    "on behalf of",
    "referring",
)
"""Before a capitalised name without a colon; a single ordinary word after them is not a name."""

NAMING_CUES = ("my name is", "name is", "named", "call me", "called", "dear", "hello", "hi", "hey")
"""Phrase cues after which even a name that is also a word ("Frank") is one."""

RELATIONS = (
    "wife",
    "husband",
    "spouse",
    "partner",
    "son",
    "daughter",
    "mother",
    "father",
    "mom",
    "dad",
    "brother",
    "sister",
    "friend",
    "neighbor",
    "neighbour",
    "aunt",
    "uncle",
    "cousin",
    "niece",
    "nephew",
    "grandson",
    "granddaughter",
    "grandmother",
    "grandfather",
    "roommate",
    "caregiver",
    "guardian",
    "girlfriend",
    "boyfriend",
    "fiance",
    "fiancee",
    "colleague",
    "coworker",
    "boss",
    "stepson",
    "stepdaughter",
)

DRUG_ENDINGS = (
    "profen|cillin|mycin|statin|olol|pril|sartan|azole|azine|setron|zepam|zolam|caine|floxacin|cycline|sone|solone|formin|gliptin|gliflozin|glutide|tidine|parin|xaban|mab|tinib|ciclovir|triptan|dronate|"
    "lukast|terol|tropium|barbital|codone|morphone|phylline|thiazide|semide|lactone|dipine|zosin|oxetine|lopram|traline|piprazole|apine|peridone|trexate|prazole|cetamol|thyroxine|gabalin|pentin|toin"
)
"""Ends of generic drug names (WHO INN stems): an unknown word with one is no name."""

PARTICLES = (
    "de",
    "da",
    "di",
    "del",
    "della",
    "der",
    "den",
    "van",
    "von",
    "la",
    "le",
    "bin",
    "ibn",
    "al",
    "el",
    "du",
    "dos",
    "das",
    "ter",
    "ten",
    "st.",
    "y",
    "e",
)

EPONYMS = (
    "disease",
    "syndrome",
    "sign",
    "signs",
    "test",
    "tests",
    "maneuver",
    "manoeuvre",
    "catheter",
    "palsy",
    "cyst",
    "esophagus",
    "phenomenon",
    "thyroiditis",
    "lymphoma",
    "sarcoma",
    "score",
    "scale",
    "criteria",
    "dementia",
    "monitor",
    "stain",
    "smear",
    "procedure",
    "method",
    "classification",
    "contracture",
    "ulcer",
    "nodes",
    "reflex",
    "law",
    "fracture",
    "position",
    "splint",
    "tumor",
    "anemia",
    "chorea",
    "ataxia",
    "deformity",
    "sequence",
    "operation",
    "bandage",
    "clamp",
    "tube",
    "ring",
    "node",
    "cells",
    "bodies",
    "body",
    "triad",
    "angle",
    "canal",
    "gland",
    "space",
    "line",
    "point",
)
"""After a surname (with or without 's): the name of a disease or a test, not of a person."""

NOT_NAMES = frozenset(
    # headings, roles and sentence starters that follow names in notes, beyond words.txt
    """mrn dob dod ssn npi dea phone fax tel email date time age sex gender address hospital clinic center unit room plan assessment subjective objective history exam review note summary chief
    complaint present illness medications allergies labs imaging impression findings vitals ros hpi pmh psh heent cc bp hr rr temp spo2 er ed icu or usa uk us mri ct ekg ecg copd chf tylenol advil motrin
    aspirin lisinopril metformin lasix imitrex protonix ultram synthroid lipitor zoloft prozac xanax ativan monday tuesday wednesday thursday friday saturday sunday january february march july september
    october november december feb mar apr jun jul aug sep sept oct nov dec mon tue wed thu fri sat sun
    gerd iban bic swift visa christmas easter thanksgiving halloween covid medicare medicaid doctor nurse patient guest speaker provider bot dd dt""".split()  # noqa: SIM905 - a table that reads as one
)
