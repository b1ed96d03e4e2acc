"""Quasi-identifiers: what alone says little and together points to one person. How many people are expected to share them, and coarser words until enough do.

    expected people = population x share(age) x share(sex) x share(place) x share(rarest term)

Of each kind the rarest value in the text counts once; kinds are multiplied as if they were independent, which makes people look rarer where they go together (a disease of old age),
so the figure errs to the careful side there. Shares of states are those of the census (U.S. Census Bureau, 2020 Census Apportionment Results, 26 April 2021, resident population, rounded to 0.1 million).
All others are *assumed*, not measured: ages as if all years up to 80 were equally common, a ZIP code by the mean over all codes, a town that is named without more as the 20,000 people below which HIPAA
does not let a place stand (45 CFR 164.514(b)(2)(i)(B)), conditions, offices and trades by an order of magnitude of our own (the EU calls a disease rare from 1 in 2,000, Regulation (EC) 141/2000; about 6 % of
people have one of them: Nguengang Wakap et al., EJHG 28 (2020)), a superlative ("the only", "the first woman to") as one in 10,000. Give `terms` your own figures: they count before these. Nothing is learnt from the texts at hand, so on the
training path one person's words never depend on another's (PITFALLS 39).

`k_map` counts, for every row of a table, the people of a population table with the same values; `generalise_table` finds the least coarse table in which all of them are at least k (k-map; with the table itself
as the population, k-anonymity). Source: Sweeney, IJUFKS 10 (2002); El Emam and Dankar, JAMIA 15 (2008).

Does not cover: terms that are not in the table (give your own `terms`), combinations of events, what a reader knows beyond the text, and attribute disclosure: k people who share a diagnosis share a secret.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import MappingProxyType
from typing import final

from discreet.deid.detect import detect
from discreet.deid.operators import SMALL_ZIP3
from discreet.deid.patterns import Label, longest_first
from discreet.errors import RequestInvalid

VERSION = 1
"""Raised when a table or a ladder changes: what a policy with k makes of a text changes with it."""

POPULATION = 331_000_000
"""People of the reference population: the United States, census of 2020 (331,449,281 residents)."""


@final
class Kind(StrEnum):
    """Kinds that are multiplied."""

    AGE = "age"
    SEX = "sex"
    PLACE = "place"
    TERM = "term"


@final
@dataclass(frozen=True, slots=True)
class Quasi:
    """One quasi-identifier, `text[start:end]`. `ladder` has its forms from as it stands to the coarsest, each with the share of the population that it fits."""

    start: int
    end: int
    kind: Kind
    ladder: tuple[tuple[str, float], ...]

    def __repr__(self) -> str:
        return f"<quasi-identifier: {self.kind}>"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Uniqueness:
    """How rare a document makes its subject. `expected`: people of the population who are expected to share all of it; `bits`: information about who it is; `shares`: by kind."""

    expected: float
    bits: float
    shares: Mapping[Kind, float]


def uniqueness(text: str, *, population: int = POPULATION, terms: Mapping[str, float] = MappingProxyType({})) -> Uniqueness:
    """Returns the uniqueness of a text by its quasi-identifiers; direct identifiers that still stand in it are not counted, they are `detect`'s.

    Args:
        text: at most `detect.MAX_CHARS` code points.
        population: people that the subject could be, >= 1.
        terms: further rare terms, lower case -> share of the population in (0, 1]; public figures.

    Raises:
        RequestInvalid: when the text is too long, or a figure is out of range.
    """
    _check(population, terms)
    return _uniqueness({kind: min(each.ladder[0][1] for each in found) for kind, found in _by_kind(find(text, terms=terms)).items()}, population)


def coarser(
    text: str, *, k: int, population: int = POPULATION, terms: Mapping[str, float] = MappingProxyType({})
) -> tuple[list[tuple[int, int, str]], Uniqueness]:
    """Returns the edits (start, end, put) that make at least k people share the quasi-identifiers of a text, and the uniqueness that is left.

    Step by step the kind that says most is made one step coarser (an age its band, a ZIP code its first three digits, a state its region, a condition its group), all its values together. Where the coarsest words still say
    too much, that is what comes back: the caller sees it in `expected`.
    """
    _check(population, terms)
    kinds = _by_kind(find(text, terms=terms))
    steps = dict.fromkeys(kinds, 0)

    def shares() -> dict[Kind, float]:
        return {kind: min(_rung(each, steps[kind])[1] for each in found) for kind, found in kinds.items()}

    while _uniqueness(shares(), population).expected < k:
        open_kinds = [kind for kind, found in kinds.items() if steps[kind] + 1 < max(len(each.ladder) for each in found)]
        if not open_kinds:
            break
        now = shares()
        steps[min(open_kinds, key=lambda kind: (now[kind], kind))] += 1
    edits = [
        (each.start, each.end, _rung(each, steps[kind])[0])
        for kind, found in kinds.items()
        for each in found
        if _rung(each, steps[kind]) != each.ladder[0]
    ]
    return sorted(edits), _uniqueness(shares(), population)


def _check(population: int, terms: Mapping[str, float]) -> None:
    if population < 1 or not all(0 < share <= 1 for share in terms.values()):
        raise RequestInvalid("a population of at least 1 and shares in (0, 1]", value=population)


def _rung(each: Quasi, step: int) -> tuple[str, float]:
    return each.ladder[min(step, len(each.ladder) - 1)]


def _by_kind(found: Sequence[Quasi]) -> dict[Kind, list[Quasi]]:
    kinds: dict[Kind, list[Quasi]] = {}
    for each in found:
        kinds.setdefault(each.kind, []).append(each)
    return kinds


def _uniqueness(shares: Mapping[Kind, float], population: int) -> Uniqueness:
    share = math.prod(shares.values())
    return Uniqueness(expected=population * share, bits=-math.log2(share), shares=MappingProxyType(dict(sorted(shares.items()))))


# In text ----------------------------------------------------------------------------------------------------------------------------------------------------

_YEARS = 80
"""Ages are counted as if each of so many years were equally common."""

_AGE = re.compile(
    r"(?<![\w.,/-])(?P<low>\d{1,2})(?:-(?P<high>\d{1,2}))?(?=(?:[ -]?(?:year|yr)s?[ -]old|[ -]?y\.?/?o\.?(?![a-z])|[ -](?:year|yr)[ -](?:female|male|woman|man)|(?:M|F)\b(?![-.]\d)))"
    r"|\b(?:[Aa]ged?|[Aa]ge:|(?:at|of) age)\s(?P<low2>\d{1,2})(?:-(?P<high2>\d{1,2}))?(?![\w/]|[.,]\d|-\d|\s?(?:mg|ml|mm|cm|kg|%))"
    r"|\b[Bb]orn in (?P<year>(?:19|20)\d\d)(?![\w/-])"
)
_SEX = re.compile(
    r"\b(?:woman|women|female|girl|lady|mother|daughter|wife|she|her|man|men|male|boy|gentleman|father|son|husband|he|his|him)\b", re.IGNORECASE
)
_CLAIM = re.compile(
    r"\bthe (?:only|sole|first|last|oldest|youngest|tallest|fastest|richest)\s(?:(?:[a-z-]+\s){0,3}(?:in|to|at|of|survivor|resident|employee|woman|man|person|member)\b)",
    re.IGNORECASE,
)
_ZIP = re.compile(r"(?:\b[A-Z]{2}\s|[Zz][Ii][Pp](?: code)?:?\s)(?P<value>\d{5})(?:-\d{4})?(?![\d-])")


def find(text: str, *, terms: Mapping[str, float] = MappingProxyType({})) -> list[Quasi]:
    """Returns the quasi-identifiers of a text, sorted by place; none overlaps another, and a mark such as `[PERSON]` holds none."""
    candidates = sorted([*_ages(text), *_sexes(text), *_places(text), *_terms(text, terms)], key=lambda each: (each.start, -each.end))
    found: list[Quasi] = []
    for each in candidates:
        if not found or each.start >= found[-1].end:
            found.append(each)
    return found


def _ages(text: str) -> Iterator[Quasi]:
    for match in _AGE.finditer(text):
        if match["year"]:
            decade = f"the {match['year'][:3]}0s"
            yield Quasi(*match.span("year"), Kind.AGE, ((match["year"], 1 / _YEARS), (decade, 10 / _YEARS), ("the past", 1.0)))
            continue
        low, high = ("low", "high") if match["low"] else ("low2", "high2")
        end = match.end(high) if match[high] else match.end(low)
        first, last = int(match[low]), int(match[high] or match[low])
        if last >= first:
            yield Quasi(match.start(low), end, Kind.AGE, tuple(_age_ladder(first, last)))


def _age_ladder(first: int, last: int) -> Iterator[tuple[str, float]]:
    width = last - first + 1
    yield (str(first) if first == last else f"{first}-{last}"), min(1.0, width / _YEARS)
    for band in (5, 10, 20, 40):
        start, stop = first // band * band, first // band * band + band - 1
        if band > width and stop >= last:
            yield f"{start}-{stop}", band / _YEARS
    yield "0-89", 1.0


def _sexes(text: str) -> Iterator[Quasi]:
    match = _SEX.search(text)
    if match:
        yield Quasi(*match.span(), Kind.SEX, ((match.group(), 0.5),))


_REGIONS: Mapping[str, tuple[float, str]] = MappingProxyType(
    {
        "the Northeast": (57.6, "Connecticut 3.6 Maine 1.4 Massachusetts 7.0 New_Hampshire 1.4 New_Jersey 9.3 New_York 20.2 Pennsylvania 13.0 Rhode_Island 1.1 Vermont 0.6"),
        "the Midwest": (69.0, "Illinois 12.8 Indiana 6.8 Iowa 3.2 Kansas 2.9 Michigan 10.1 Minnesota 5.7 Missouri 6.2 Nebraska 2.0 North_Dakota 0.8 Ohio 11.8 South_Dakota 0.9 Wisconsin 5.9"),
        "the South": (126.3, "Alabama 5.0 Arkansas 3.0 Delaware 1.0 Florida 21.5 Georgia 10.7 Kentucky 4.5 Louisiana 4.7 Maryland 6.2 Mississippi 3.0 North_Carolina 10.4 Oklahoma 4.0 South_Carolina 5.1 Tennessee 6.9 Texas 29.1 Virginia 8.6 West_Virginia 1.8"),
        "the West": (78.6, "Alaska 0.7 Arizona 7.2 California 39.5 Colorado 5.8 Hawaii 1.5 Idaho 1.8 Montana 1.1 Nevada 3.1 New_Mexico 2.1 Oregon 4.2 Utah 3.3 Washington 7.7 Wyoming 0.6"),
    }
)  # fmt: skip
"""Census regions and their states: people in millions, census of 2020; the South has the District of Columbia's 0.7 as well."""


@cache
def _states() -> Mapping[str, tuple[float, str]]:
    words = ((region, listed.split()) for region, (_, listed) in _REGIONS.items())
    return {
        name.replace("_", " "): (float(people), region) for region, listed in words for name, people in zip(listed[::2], listed[1::2], strict=True)
    }


@cache
def _state_names() -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(longest_first(_states()))})\b")


_ZIP5, _ZIP3, _TOWN = 10_000, 370_000, 20_000


def _places(text: str) -> Iterator[Quasi]:
    for match in _state_names().finditer(text):
        people, region = _states()[match.group()]
        yield Quasi(
            *match.span(),
            Kind.PLACE,
            ((match.group(), 1e6 * people / POPULATION), (region, 1e6 * _REGIONS[region][0] / POPULATION), ("the country", 1.0)),
        )
    for match in _ZIP.finditer(text):
        area = match["value"][:3]
        three = ("000**", 1.0) if area in SMALL_ZIP3 else (area + "**", _ZIP3 / POPULATION)
        yield Quasi(*match.span("value"), Kind.PLACE, ((match["value"], _ZIP5 / POPULATION), three, ("*****", 1.0)))
    for span in detect(text, labels=(Label.LOCATION,)):
        yield Quasi(span.start, span.end, Kind.PLACE, ((text[span.start : span.end], _TOWN / POPULATION), ("[LOCATION]", 1.0)))


_GROUPS: Mapping[str, tuple[float, str]] = MappingProxyType(
    {
        "rare condition": (
            0.06,
            "huntington's:1e-4 huntington_disease:1e-4 cystic_fibrosis:1e-4 amyotrophic_lateral_sclerosis:5e-5 phenylketonuria:7e-5 ehlers-danlos:2e-4 marfan:2e-4 haemophilia:1e-4 hemophilia:1e-4 gaucher:2e-5 fabry:2e-5 "
            "wilson's_disease:3e-5 narcolepsy:5e-4 myasthenia_gravis:2e-4 albinism:6e-5 achondroplasia:4e-5 duchenne:5e-5 creutzfeldt-jakob:1e-6 progeria:1e-7 tay-sachs:3e-6 acromegaly:6e-5 porphyria:1e-5 sarcoidosis:4e-4 "
            "scleroderma:2e-4 mesothelioma:1e-5 leprosy:2e-6 hansen's_disease:2e-6 tuberous_sclerosis:1e-4 turner_syndrome:2e-4 prader-willi:5e-5 guillain-barre:1e-5",
        ),
        "public official": (0.01, "mayor:6e-5 senator:3e-7 congressman:1e-6 congresswoman:1e-6 governor:2e-7 ambassador:6e-7 bishop:2e-6 astronaut:2e-7 olympian:3e-5 fire_chief:8e-5 police_chief:5e-5 school_superintendent:4e-5 coroner:1e-5"),
        "tradesperson": (0.05, "lighthouse_keeper:1e-6 glassblower:1e-5 organist:1e-4 taxidermist:1e-5 beekeeper:4e-4 harpist:1e-5 puppeteer:1e-5 falconer:1e-5 luthier:1e-5 bagpiper:1e-5 midwife:4e-5 jockey:1e-5 trapeze_artist:1e-6"),
    }
)  # fmt: skip
"""Group -> share of people it fits, and its terms with the order of magnitude of their share: assumed values, of which a caller's `terms` replace any."""


@cache
def _known_terms() -> Mapping[str, tuple[float, str, float]]:
    pairs = ((group, share, row.rpartition(":")) for group, (share, listed) in _GROUPS.items() for row in listed.split())
    return {name.replace("_", " "): (float(rate), group, share) for group, share, (name, _, rate) in pairs}


@cache
def _term_names(more: tuple[str, ...]) -> re.Pattern[str]:
    names = longest_first({*_known_terms(), *more})
    return re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, names))})s?(?![\w-])", re.IGNORECASE)


def _terms(text: str, more: Mapping[str, float]) -> Iterator[Quasi]:
    known = _known_terms()
    for match in _term_names(tuple(sorted(more))).finditer(text):
        name = match.group().lower()
        name = name if name in more or name in known else name.removesuffix("s")
        if name in more:
            yield Quasi(*match.span(), Kind.TERM, ((match.group(), more[name]), ("[TERM]", 1.0)))
        else:
            share, group, common = known[name]
            yield Quasi(*match.span(), Kind.TERM, ((match.group(), share), (group, common), ("[TERM]", 1.0)))
    for match in _CLAIM.finditer(text):
        yield Quasi(*match.span(), Kind.TERM, ((match.group(), 1e-4), ("[TERM]", 1.0)))


# In tables --------------------------------------------------------------------------------------------------------------------------------------------------

Ladder = Sequence[Callable[[str], str]]


def _same(value: str) -> str:
    return value.strip()


def _star(_value: str) -> str:
    return "*"


def _zip3(value: str) -> str:
    digits = value.strip()[:5]
    return "*" if not re.fullmatch(r"\d{5}", digits) else "000**" if digits[:3] in SMALL_ZIP3 else digits[:3] + "**"


def _band(width: int) -> Callable[[str], str]:
    def banded(value: str) -> str:
        if not re.fullmatch(r"\d{1,3}", value.strip()):
            return "*"
        age = int(value)
        return "90+" if age >= 90 else f"{age // width * width}-{min(age // width * width + width - 1, 89)}"

    return banded


def _year(value: str) -> str:
    found = re.search(r"(?<!\d)(?:18|19|20)\d\d(?!\d)", value)
    return found.group() if found else "*"


def _decade(value: str) -> str:
    year = _year(value)
    return year if year == "*" else year[:3] + "0s"


LADDERS: Mapping[str, Ladder] = MappingProxyType(
    {
        "zip": (_same, _zip3, _star),
        "age": (_same, _band(5), _band(10), _band(20), _star),
        "date": (_same, _year, _decade, _star),
        "other": (_same, _star),
    }
)
"""Kind of column -> its forms, from as it stands to `*`."""

_SAMPLE = 1000


def kind_of(name: str, values: Sequence[str]) -> str:
    """Returns the kind of a column, by its name and a sample of its values: `zip`, `age`, `date` or `other`."""
    sample = [value.strip() for value in values[:_SAMPLE] if value.strip()]
    fits = {
        "zip": (r"zip|post(?:al)?_?code", r"\d{5}(?:-\d{4})?"),
        "age": (r"(?:^|_)age", r"\d{1,3}"),
        "date": (r"", r"\d{4}-\d{2}-\d{2}.*|\d{1,2}/\d{1,2}/\d{4}|(?:19|20)\d\d"),
    }
    for kind, (named, form) in fits.items():
        if sample and re.search(named, name.lower()) and sum(re.fullmatch(form, value) is not None for value in sample) >= 0.9 * len(sample):
            return kind
    return "other"


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Generalised:
    """A table in which every row that is left has at least k people. `steps`: column -> how coarse; `rows`: index of each row that is left, and its values; `smallest`: least people of any of them."""

    kinds: Mapping[str, str]
    steps: Mapping[str, int]
    rows: tuple[tuple[int, tuple[str, ...]], ...]
    smallest: int
    suppressed: int

    def __repr__(self) -> str:
        return f"<table of {len(self.rows)} rows>"


MAX_COLUMNS = 7


def k_map(rows: Sequence[Sequence[str]], population: Sequence[Sequence[str]]) -> list[int]:
    """Returns for each row how many rows of the population have the same values (same columns, same order)."""
    counts = Counter(tuple(row) for row in population)
    return [counts[tuple(row)] for row in rows]


def generalise_table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], *, k: int, population: Sequence[Sequence[str]] | None = None, suppress: float = 0.0
) -> Generalised:
    """Makes a table as little coarse as is enough for k: the first of all combinations of ladders by total number of steps, and among those with as many steps the one that keeps most different rows.

    Args:
        columns: names of the quasi-identifiers, at most `MAX_COLUMNS`.
        rows: their values, one sequence for each row, in the order of `columns`.
        k: people that must share the values of a row, >= 2.
        population: rows of everybody who could be in the table, same columns; None for the table itself (k-anonymity).
        suppress: largest share of rows that may be left out instead, in [0, 1).

    Raises:
        RequestInvalid: when an argument is out of range, or no table is coarse enough because the population is smaller than k.
    """
    if not (1 <= len(columns) <= MAX_COLUMNS and k >= 2 and 0 <= suppress < 1):
        raise RequestInvalid(
            f"1 to {MAX_COLUMNS} columns, k >= 2 and 0 <= suppress < 1", value=f"{len(columns)} columns, k = {k}, suppress = {suppress}"
        )
    kinds = {name: kind_of(name, [row[place] for row in rows]) for place, name in enumerate(columns)}
    ladders = [LADDERS[kinds[name]] for name in columns]
    own, everybody = Counter(tuple(row) for row in rows), Counter(tuple(row) for row in (rows if population is None else population))
    for steps in _by_height([len(ladder) for ladder in ladders], lambda steps: -len({_coarse(row, ladders, steps) for row in own})):
        counts: Counter[tuple[str, ...]] = Counter()
        for row, times in everybody.items():
            counts[_coarse(row, ladders, steps)] += times
        left_out = sum(times for row, times in own.items() if counts[_coarse(row, ladders, steps)] < k)
        if left_out <= suppress * len(rows):
            made = [(place, _coarse(tuple(row), ladders, steps)) for place, row in enumerate(rows)]
            kept = tuple((place, row) for place, row in made if counts[row] >= k)
            smallest = min((counts[row] for _, row in kept), default=0)
            return Generalised(kinds=kinds, steps=dict(zip(columns, steps, strict=True)), rows=kept, smallest=smallest, suppressed=left_out)
    raise RequestInvalid("a population of at least k people", value=f"{sum(everybody.values())} rows, k = {k}")


def _by_height(sizes: Sequence[int], tie: Callable[[tuple[int, ...]], int]) -> Iterator[tuple[int, ...]]:
    combinations = itertools.product(*(range(size) for size in sizes))
    for _, level in itertools.groupby(sorted(combinations, key=sum), key=sum):
        yield from sorted(level, key=tie)


def _coarse(row: tuple[str, ...], ladders: Sequence[Ladder], steps: Sequence[int]) -> tuple[str, ...]:
    return tuple(ladder[step](value) for value, ladder, step in zip(row, ladders, steps, strict=True))
