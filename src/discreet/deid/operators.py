"""What happens to a found value: functions of the value, its label and a key; nothing is remembered.

`redact`, `label`, `mask` and `generalise` need no key. `Surrogates` gives stand-ins for one subject: one original always becomes one stand-in (across letter case,
spacing and name order, and, with the same key, across documents), two originals never become one within a document, and no stand-in is a value of the subject. Choices
are HMACs of (label, normalised value) under the subject's key, so that nobody without the key can test a guess, and nothing depends on the order of
documents or on anybody else's data (PITFALLS 26, 39). `shift_date` moves every date of a subject by one secret number of days, in the format it was written in.

Stand-ins are of the kind that cannot belong to somebody where such a kind exists: telephone numbers 555-01xx (NANP) and those that Ofcom, ARCEP and the Bundesnetzagentur keep for fiction, addresses of RFC 5737 and RFC 2606, social security
numbers of the never issued area 000, payment cards that fail Luhn, IBANs with check digits 00. Names, months, weekdays and streets of a stand-in are of the language of the original
(English, Spanish, French, German), and first names of its gender.

`ff1_encrypt` and `ff1_decrypt` are FF1 of NIST SP 800-38G, with the floor of 10^6 values of revision 1.

Does not cover: names in other scripts, which become Latin names; telephone numbers of other countries, which keep their country and may exist; agreement of gender between a stand-in and pronouns when the gazetteer does not know the name, weekdays of dates without a year, and two documents of one
subject of which one has a rare collision of stand-ins: there the document that has both originals resolves it.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, timedelta
from enum import StrEnum
from functools import cache
from types import MappingProxyType
from typing import final, overload

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESSIV
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from phonenumbers import COUNTRY_CODE_TO_REGION_CODE

from discreet.deid import languages
from discreet.deid.detect import names
from discreet.deid.normalise import fold
from discreet.deid.patterns import CREDENTIALS, PARTICLES, TITLES, Label, digits, is_card
from discreet.errors import SealBroken
from discreet.keys import Key

REDACTED = "[REDACTED]"


@final
class Operator(StrEnum):
    """What a policy does with a label."""

    KEEP = "keep"
    REDACT = "redact"
    LABEL = "label"
    MASK = "mask"
    GENERALISE = "generalise"
    SURROGATE = "surrogate"
    SHIFT = "shift"
    TOKEN = "token"  # noqa: S105 - the name of an operator, not a credential
    VAULT = "vault"


def redact(_value: str, _label: Label) -> str:
    """Returns the same mark for everything."""
    return REDACTED


def label_only(_value: str, label: Label) -> str:
    """Returns the label in brackets, `[PERSON]`."""
    return f"[{label}]"


def mask(value: str, _label: Label) -> str:
    """Returns the value with every letter and digit starred; punctuation and length stay."""
    return "".join("*" if c.isalnum() else c for c in value)


SMALL_ZIP3 = frozenset("036 059 063 102 203 556 692 790 821 823 830 831 878 879 884 890 893".split())  # noqa: SIM905 - a table that reads as one
"""Three-digit ZIP areas of at most 20,000 people (2000 census; HHS guidance on 45 CFR 164.514(b)(2)(i)(B))."""


def generalise(value: str, label: Label) -> str:
    """Returns a coarser value that Safe Harbor lets stand: the first three digits of a ZIP code, the year of a date, `90+`; the label for everything else."""
    number = digits(value)
    if label is Label.AGE:
        return "90+"
    if label is Label.ZIP and len(number) in (5, 9) and number == re.sub(r"[\s-]", "", value):
        return "000**" if number[:3] in SMALL_ZIP3 else number[:3] + "**"
    parsed = _Parsed.of(value) if label is Label.DATE else None
    if parsed is not None and parsed.has_year:
        return str(parsed.day.year)
    return label_only(value, label)


TOKEN = re.compile(rf"(?<![A-Z0-9_])(?:{'|'.join(sorted(Label, key=len, reverse=True))})_[A-Z2-7]{{26,}}(?![A-Za-z0-9])")
"""What `token` writes."""


def token(value: str, label: Label, key: Key, *, subject: str = "", policy: str = "") -> str:
    """Returns the value sealed under the subject's key: `PERSON_` and base32 of AES-SIV (RFC 5297), with label, subject and policy as associated data.

    Equal values of one subject give equal tokens. Nothing else has to be kept to open them; forgetting the subject's key closes them for good.
    """
    sealed = _siv(key).encrypt(value.encode("utf-8", "surrogatepass"), _bound(label, subject, policy))
    return f"{label}_{base64.b32encode(sealed).decode().rstrip('=')}"


def open_token(sealed: str, key: Key, *, subject: str = "", policy: str = "") -> str:
    """Returns the value of a token.

    Raises:
        SealBroken: when it was not made under this key, label, subject and policy; after `forget` of the subject no key opens it.
    """
    name, _, body = sealed.rpartition("_")
    try:
        raw = base64.b32decode(body + "=" * (-len(body) % 8))
        return _siv(key).decrypt(raw, _bound(name, subject, policy)).decode("utf-8", "surrogatepass")
    except (InvalidTag, ValueError):
        raise SealBroken("a token that opens under this key") from None


def _bound(label: str, subject: str, policy: str) -> list[bytes]:
    """Associated data as a vector: RFC 5297 keeps its parts apart."""
    return [label.encode(), subject.encode("utf-8", "surrogatepass"), policy.encode("utf-8", "surrogatepass")]


def _siv(key: Key) -> AESSIV:
    half = key.derive("deid/token")
    return AESSIV(half.mac(b"authentication") + half.mac(b"encryption"))


def canonical(value: str) -> str:
    """Returns the letters and digits of the folded value in lower case: what two spellings of one value have in common."""
    return "".join(c for c in fold(value).lower() if c.isalnum())


# Dates ------------------------------------------------------------------------------------------------------------------------------------------------------

MAX_SHIFT_DAYS = 365


def date_offset(key: Key) -> int:
    """Returns the subject's number of days: one for all their dates, in [-365, -1] or [1, 365], fixed by the key."""
    point = int.from_bytes(key.derive("deid/date").mac(b"offset")[:8], "big") % (2 * MAX_SHIFT_DAYS)
    return point - MAX_SHIFT_DAYS if point < MAX_SHIFT_DAYS else point - MAX_SHIFT_DAYS + 1


def shift_date(value: str, days: int) -> str | None:
    """Returns the date moved by a number of days, written in the same format; None where the value is not understood.

    Intervals between full dates are kept exactly. A date without a year is moved in a year of 366 days; one without a day is moved as the fifteenth of its month.
    """
    parsed = _Parsed.of(value)
    if parsed is None:
        return None
    try:
        moved = parsed.day + timedelta(days=days)
    except OverflowError:
        return None
    return parsed.write(moved, days)


_WORD = re.compile(r"[^\W\d_]{3,}")


def _word_of(text: str, read: Callable[[str], tuple[str, int, bool] | None]) -> re.Match[str] | None:
    """Returns the first word that names a month, or a weekday."""
    return next((match for match in _WORD.finditer(text) if read(match.group()) is not None), None)


def _likely(text: str) -> str:
    """The language of a month that several have: German writes a full stop behind the day."""
    return "de" if re.search(r"\d\.\s", text) else "es" if re.search(r"\bde\b", text) else ""


@final
class _Parsed:
    """A date and the places of its parts in the text it was read from: field name -> (start, end)."""

    __slots__ = ("day", "has_year", "parts", "text")

    def __init__(self, text: str, day: date, parts: Mapping[str, tuple[int, int]]) -> None:
        self.text, self.day, self.parts = text, day, parts
        self.has_year = "y" in parts

    @staticmethod
    def of(value: str) -> _Parsed | None:
        """Reads a date in any format of the pattern table; the text is folded first."""
        text = fold(value)
        month = _word_of(text, languages.month)
        numbers = [(m.start(), m.end()) for m in re.finditer(r"\d+", text)]
        parts = _named_parts(text, month, numbers) if month else _numeric_parts(text, numbers)
        if parts is None:
            return None
        year = int(text[slice(*parts["y"])]) if "y" in parts else 2004
        if "y" in parts and parts["y"][1] - parts["y"][0] <= 2:
            year += 1900 if year > 68 else 2000
        number = _month_number(text[slice(*parts["m"])], _likely(text))
        day = int(text[slice(*parts["d"])]) if "d" in parts else 15
        try:
            return _Parsed(text, date(year, number, day), parts)
        except ValueError:
            return None

    def write(self, moved: date, days: int) -> str:
        """Writes another date in the place and the manner of this one."""
        padded = any(self.text[start] == "0" for name, (start, _) in self.parts.items() if name in "md") or all(
            end - start == 2 for name, (start, end) in self.parts.items() if name in "md" and self.text[start].isdigit()
        )
        written = {name: self._part(name, moved, padded=padded) for name in self.parts}
        weekday = _word_of(self.text, languages.weekday)
        pieces = [(*place, written[name]) for name, place in self.parts.items()]
        if weekday and weekday.span() != self.parts["m"]:
            pieces.append((*weekday.span(), _weekday_after(weekday.group(), days, _likely(self.text))))
        text = self.text
        for start, end, piece in sorted(pieces, reverse=True):
            text = text[:start] + piece + text[end:]
        return _ordinal(text) if "d" in self.parts else text

    def _part(self, name: str, moved: date, *, padded: bool) -> str:
        start, end = self.parts[name]
        old = self.text[start:end]
        if name == "y":
            return f"{moved.year:04d}" if len(old) == 4 else f"{moved.year % 100:02d}"
        if name == "m" and not old[0].isdigit():
            return _month_word(old, moved.month, _likely(self.text))
        number = moved.month if name == "m" else moved.day
        return f"{number:02d}" if padded else str(number)


def _named_parts(text: str, month: re.Match[str], numbers: Sequence[tuple[int, int]]) -> dict[str, tuple[int, int]] | None:
    parts = {"m": month.span()}
    for start, end in numbers:
        if end - start == 4 and "y" not in parts:
            parts["y"] = (start, end)
        elif end - start <= 2 and "d" not in parts and text[start - 1 : start] != "'" and text[end : end + 1] != ":":
            parts["d"] = (start, end)
        elif end - start == 2 and "y" not in parts and text[end : end + 1] != ":" and text[start - 1 : start] in "' -/":
            parts["y"] = (start, end)
    return parts if "d" in parts or "y" in parts else None


def _numeric_parts(text: str, numbers: Sequence[tuple[int, int]]) -> dict[str, tuple[int, int]] | None:
    sizes = [end - start for start, end in numbers]
    if sizes and sizes[0] == 8:
        at = numbers[0][0]
        return {"y": (at, at + 4), "m": (at + 4, at + 6), "d": (at + 6, at + 8)}
    if len(sizes) >= 3 and sizes[0] == 4:
        return dict(zip("ymd", numbers[:3], strict=True))
    if len(sizes) >= 3:
        european = text[numbers[0][1] : numbers[0][1] + 1] == "."
        order = "dmy" if european or int(text[slice(*numbers[0])]) > 12 else "mdy"
        return dict(zip(order, numbers[:3], strict=True))
    if len(sizes) == 2 and sizes[1] == 4:
        return dict(zip("my", numbers, strict=True))
    if len(sizes) == 2:
        return dict(zip("dm" if int(text[slice(*numbers[0])]) > 12 else "md", numbers, strict=True))
    return None


def _month_number(word: str, likely: str) -> int:
    found = None if word.isdigit() else languages.month(word, likely)
    return int(word) if found is None else found[1] + 1


def _month_word(old: str, month: int, likely: str) -> str:
    language, _, whole = languages.month(old, likely) or ("en", 0, True)
    new = languages.LISTED[language][month - 1]
    return _like(old, new if whole or len(old) > 4 else new[:3])


def _weekday_after(old: str, days: int, likely: str) -> str:
    language, index, whole = languages.weekday(old, likely) or ("en", 0, True)
    new = languages.WEEKDAYS[language][(index + days) % 7]
    return _like(old, new if whole or len(old) > 5 else new[: len(old) if language != "en" else 3])


def _ordinal(text: str) -> str:
    def suffix(match: re.Match[str]) -> str:
        day = int(match[1])
        return match[1] + ("th" if 10 <= day % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th"))

    french = re.sub(r"\b(\d{1,2})er\b", lambda match: match.group() if match[1] == "1" else match[1], text)
    return re.sub(r"(\d{1,2})(?:st|nd|rd|th)\b", suffix, french)


def _like(old: str, new: str) -> str:
    """Returns the new word in the letter case of the old one."""
    if old.isupper() and len(old) > 1:
        return new.upper()
    if old.islower():
        return new.lower()
    return new[:1].upper() + new[1:]


# Surrogates -------------------------------------------------------------------------------------------------------------------------------------------------

_TOWN_FRONTS = "Ash Birch Clover Dale Elm Fair Glen Haw King Lark Maple North Oak Pine Rose Stone Thorn Under Vale West Yarrow Amble Dun East Green Hazel Iron Lake New Silver".split()  # noqa: SIM905 - a table that reads as one
_TOWN_BACKS = "bridge brook bury combe dale field ford gate ham hollow hurst leigh low mere moor stead thorpe wick well worth".split()  # noqa: SIM905 - a table that reads as one
_STREETS = "Alder Aspen Beech Birch Cedar Chestnut Cypress Elm Fern Hawthorn Hickory Juniper Larch Laurel Linden Maple Oak Pine Poplar Rowan Spruce Sycamore Walnut Willow".split()  # noqa: SIM905 - a table that reads as one
_STREET_KINDS = ("Street", "Avenue", "Road", "Lane", "Drive", "Court")
_NAME = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
"""One part of a name, in any script."""


@cache
def _pool(flag: str) -> tuple[str, ...]:
    """Names that may stand in for English ones: of women (F), of men (M), last names (L); lower case, sorted."""
    wanted = {"F": "FU", "M": "MU", "L": "L"}[flag]  # used for one gender only, or mostly as a last name
    listed = ((name, flags.replace("S", "")) for name, flags in names().items() if "S" in flags and len(name) >= 3 and name not in languages.names())
    return tuple(sorted(name for name, flags in listed if (flags.replace("L", "") == wanted if flag != "L" else flags[0] == wanted)))


@final
class Surrogates:
    """Stand-ins for one subject in one document. The same key gives the same stand-ins in the next document.

    Args:
        key: the subject's key.
        values: every (label, value) that will be asked for, known identifiers first; none of them becomes a stand-in.
    """

    __slots__ = ("_choice", "_days", "_key", "_names", "_taken")

    def __init__(self, key: Key, values: Iterable[tuple[Label, str]]) -> None:
        self._key = key.derive("deid/surrogate")
        self._days = date_offset(key)
        pairs = list(values)
        self._taken = {canonical(value) for _, value in pairs} | {
            part for label, value in pairs if label is Label.PERSON for part in _name_parts(value)
        }
        self._choice: dict[tuple[Label, str], str] = {}
        self._names: dict[str, str] = {}
        for part in dict.fromkeys(part for label, value in pairs if label is Label.PERSON for part in _name_parts(value)):
            self._name(part)

    def __repr__(self) -> str:
        return "<surrogates>"

    def of(self, value: str, label: Label) -> str:
        """Returns the stand-in for a value: never the value itself, nor another value of the subject."""
        if label is Label.PERSON:
            return self._person(value)
        if label is Label.DATE:
            return shift_date(value, self._days) or label_only(value, label)
        if label is Label.AGE:
            return generalise(value, label)
        same = (label, canonical(value))
        if label in _FORMATTED:
            return self._formatted(value, label)
        if same not in self._choice:
            self._choice[same] = self._made(value, label)
        return self._choice[same]

    def _person(self, value: str) -> str:
        folded = fold(value)
        parts = _NAME.findall(folded)
        if not parts:
            return label_only(value, Label.PERSON)
        return re.sub(_NAME.pattern + r"\.?", lambda m: self._name_like(m.group(), parts), folded)

    def _name_like(self, old: str, parts: Sequence[str]) -> str:
        bare = old.rstrip(".")
        if _is_frame(bare) and len(parts) > 1:
            return old
        if len(bare) == 1 and bare.isascii():
            return self._initial(bare) + old[1:]
        return _like(bare, self._name(bare.lower())) + old[len(bare) :]

    def _initial(self, letter: str) -> str:
        options = [c for c in "ABCDEFGHJKLMNPRSTW" if c != letter.upper()]
        return options[self._draw(Label.PERSON, letter.lower(), 0) % len(options)]

    def _name(self, part: str) -> str:
        if part not in self._names:
            self._names[part] = self._free(self._pool_of(part), Label.PERSON, part)
        return "-".join(piece[:1].upper() + piece[1:] for piece in self._names[part].split("-"))

    def _pool_of(self, part: str) -> tuple[str, ...]:
        """Names of the same language and gender, as far as the lists know them."""
        language, flag = languages.names().get(part, ("en", ""))
        if flag:
            return languages.pool(language, flag)
        flags = names().get(part, "L") if reads_as_first(part) else "L"
        genders = [gender for gender in "MF" if gender in flags]
        return _pool("L" if flags == "L" else genders[0] if len(genders) == 1 else "MF"[self._draw(Label.PERSON, part, 0) % 2])

    def _made(self, value: str, label: Label) -> str:
        same = canonical(value)
        if label is Label.EMAIL:
            host = ("example.com", "example.net", "example.org")[self._draw(label, same, 1) % 3]
            return f"{self._free([f'{a[0]}{b}{n}' for a, b, n in self._triples(label, same)], label, same)}@{host}"
        if label is Label.URL:
            return f"https://example.org/{self._scrambled('abcdefgh', label, same)}"
        if label is Label.IP and ":" in value:
            return "2001:db8::" + self._scrambled("abcd", Label.MAC, same)
        if label is Label.IP:
            return self._free([f"{net}.{host}" for net in ("192.0.2", "198.51.100", "203.0.113") for host in range(1, 255)], label, same)
        if label is Label.ADDRESS:
            return self._address(value, same)
        if label is Label.LOCATION:
            return _like(value, self._free([front + back for front in _TOWN_FRONTS for back in _TOWN_BACKS], label, same))
        return self._organisation(value, same)

    def _address(self, value: str, same: str) -> str:
        """A street that does not exist, in the order of its language; a box stays a box, a flat a flat."""
        plain = fold(value).lower()
        _, form, streets = next((row for row in languages.STREETS.values() if row[0].search(plain)), (None, "{number} {name} {kind}", _STREETS))
        street, kind = (
            streets[self._draw(Label.ADDRESS, same, 1) % len(streets)],
            _STREET_KINDS[self._draw(Label.ADDRESS, same, 2) % len(_STREET_KINDS)],
        )
        flat = re.search(r"\b(apt|apartment|suite|ste|unit)\b", plain)
        end = f", {_like(value[flat.start() : flat.end()], flat.group())} {self._draw(Label.ADDRESS, same, 3) % 90 + 1}" if flat else ""
        return self._free([form.format(number=number, name=street, kind=kind) + end for number in range(11, 9989)], Label.ADDRESS, same)

    def _organisation(self, value: str, same: str) -> str:
        """What says which organisation it is becomes one name; the words that say what kind stay."""
        name = self._free(_pool("L"), Label.ORG, same)
        name = name.upper() if value.isupper() else name.capitalize()
        words = re.split(r"(?:\s|(?<=\w)[,/](?=\s))+", value.strip())
        kinds = [fold(word).lower().strip(".,&'") in languages.KINDS for word in words]
        if not any(kinds):
            return f"{name} Group"
        if all(kinds):
            return " ".join([name, *words])
        return " ".join(
            word if kind else name for index, (word, kind) in enumerate(zip(words, kinds, strict=True)) if kind or not index or kinds[index - 1]
        )

    def _triples(self, label: Label, same: str) -> list[tuple[str, str, int]]:
        first, last = _pool("F") + _pool("M"), _pool("L")
        return [
            (
                first[self._draw(label, same, 10 + i) % len(first)],
                last[self._draw(label, same, 40 + i) % len(last)],
                self._draw(label, same, 70 + i) % 90 + 10,
            )
            for i in range(20)
        ]

    def _formatted(self, value: str, label: Label) -> str:
        """Keeps punctuation, length and letter case; the letters and digits come from the spelling-independent value."""
        kept, same = _kept_prefix(value, label)
        if (label, same) not in self._choice:
            self._choice[label, same] = self._scrambled(same, label, same, prefix=kept)
        characters = iter(kept + self._choice[label, same])
        out = [(next(characters, "0") if c.isalnum() else c) for c in fold(value)]
        return "".join(c.upper() if old.isupper() else c for c, old in zip(out, fold(value), strict=True))

    def _scrambled(self, shape: str, label: Label, same: str, *, prefix: str = "") -> str:
        for attempt in range(1000):
            stream = self._key.stream(label, same, attempt).bytes(4 * len(shape))
            made = "".join(_scramble(c, stream[4 * i : 4 * i + 4], label) for i, c in enumerate(shape))
            made = _harmless(made, label, prefix)
            if made != same and made not in self._taken:
                self._taken.add(made)
                return made
        return "0" * len(shape)

    def _free(self, options: Sequence[str], label: Label, same: str) -> str:
        """Returns the first choice of the key that is neither an original of the subject nor given away; walks on from there, to double names in the end."""
        at = self._draw(label, same, 0) % len(options)
        for step in range(len(options)):
            option = options[(at + step) % len(options)]
            if canonical(option) not in self._taken:
                self._taken.add(canonical(option))
                return option
        return self._free([f"{options[at]}-{option}" for option in options], label, same)

    def _draw(self, label: Label, same: str, number: int) -> int:
        return int.from_bytes(self._key.mac(f"{label}\0{same}\0{number}".encode())[:8], "big")


_FORMATTED = frozenset(
    (
        Label.PHONE,
        Label.FAX,
        Label.SSN,
        Label.MRN,
        Label.HEALTH_PLAN,
        Label.ACCOUNT,
        Label.LICENCE,
        Label.VEHICLE,
        Label.DEVICE,
        Label.MAC,
        Label.ZIP,
        Label.CARD,
        Label.IBAN,
        Label.NATIONAL_ID,
        Label.SECRET,
        Label.ID,
    )
)


def _scramble(character: str, noise: bytes, label: Label) -> str:
    draw = int.from_bytes(noise, "big")
    if character.isdigit():
        return str(draw % 10)
    if label in (Label.PHONE, Label.FAX):
        return character
    return "abcdefghjkmnpqrstuvwxyz"[draw % 23] if label is not Label.MAC else "abcdef"[draw % 6]


_FICTION: Mapping[str, tuple[int, str]] = MappingProxyType({"44": (10, "7700900"), "33": (9, "19900"), "49": (10, "3023125")})
"""Country code -> length and beginning of national numbers that its regulator keeps for fiction (Ofcom, ARCEP, Bundesnetzagentur)."""


def _kept_prefix(value: str, label: Label) -> tuple[str, str]:
    """Returns what of a value's letters and digits stays (the country of a telephone number or an IBAN, a trunk 0) and the rest, which is the same for every way to write it."""
    same = canonical(value)
    if label in (Label.PHONE, Label.FAX) and same.isdigit():
        if len(same) == 11 and same[0] == "1":
            return "1", same[1:]
        if fold(value).lstrip(" (").startswith(("+", "00")):
            national = same.removeprefix("00")
            code = next((national[:size] for size in (1, 2, 3) if int(national[:size] or 0) in COUNTRY_CODE_TO_REGION_CODE), "")
            return same[: len(same) - len(national)] + code, national[len(code) :]
        if same[:1] == "0":
            return "0", same[1:]
    if label is Label.IBAN and same[:2].isalpha() and same[2:4].isdigit():
        return same[:2], same[2:]
    return "", same


def _harmless(made: str, label: Label, prefix: str = "") -> str:
    """Moves a made number into a range that is never issued, where there is one."""
    if label in (Label.PHONE, Label.FAX) and made.isdigit():
        length, start = _FICTION.get(prefix.removeprefix("00"), (0, ""))
        if len(made) == length:
            return start + made[len(start) :]
        if prefix == "0" and made[:1] == "0":
            return "3" + made[1:]
        return str(2 + int(made[0]) % 8) + made[1:3] + "55501" + made[8:] if len(made) == 10 and prefix in ("", "1", "001") else made
    if label is Label.SSN and made.isdigit() and len(made) == 9:
        return "000" + made[3:]
    if label is Label.CARD and is_card(made):
        return made[:-1] + str((int(made[-1]) + 1) % 10)
    if label is Label.IBAN and prefix:
        return "00" + made[2:]
    return made


def _name_parts(value: str) -> list[str]:
    return [p.lower() for p in _NAME.findall(fold(value)) if (len(p) > 1 or not p.isascii()) and not _is_frame(p)]


def _is_frame(part: str) -> bool:
    """Titles, credentials and particles stay as they are: they say nothing about who it is."""
    return part.lower() in TITLES or part.lower() in PARTICLES or part in CREDENTIALS


def reads_as_first(part: str) -> bool:
    """Says whether the gazetteer takes a name for a first name before a last name; unknown names are last names. Depends on the name alone, so every document agrees."""
    flag = languages.names().get(part.lower(), ("", ""))[1]
    return flag in ("F", "M") or (not flag and names().get(part.lower(), "L")[0] in "FMG")


# FF1 --------------------------------------------------------------------------------------------------------------------------------------------------------

_ALPHABET = "0123456789abcdefghijklmnopqrstuvwxyz"
MIN_DOMAIN = 1_000_000


@overload
def ff1_encrypt(key: bytes, tweak: bytes, digits: str, radix: int = 10) -> str: ...
@overload
def ff1_encrypt(key: bytes, tweak: bytes, digits: Sequence[int], radix: int = 10) -> list[int]: ...
def ff1_encrypt(key: bytes, tweak: bytes, digits: str | Sequence[int], radix: int = 10) -> str | list[int]:
    """Encrypts numerals to as many numerals of the same radix (FF1, NIST SP 800-38G, AES).

    Args:
        key: 16, 24 or 32 bytes.
        tweak: public context, at most 2**32 - 1 bytes; the same numerals differ under another tweak.
        digits: text of 0-9a-z for a radix up to 36, or numbers in [0, radix).
        radix: in [2, 65536], with radix ** len(digits) >= 10**6.

    Returns:
        Text for text, numbers for numbers.

    Raises:
        ValueError: when the domain is too small to be safe, or an argument is outside its range.
    """
    return _ff1(key, tweak, digits, radix, encrypt=True)


@overload
def ff1_decrypt(key: bytes, tweak: bytes, digits: str, radix: int = 10) -> str: ...
@overload
def ff1_decrypt(key: bytes, tweak: bytes, digits: Sequence[int], radix: int = 10) -> list[int]: ...
def ff1_decrypt(key: bytes, tweak: bytes, digits: str | Sequence[int], radix: int = 10) -> str | list[int]:
    """Returns the numerals of which `ff1_encrypt` made these. Arguments and errors are those of `ff1_encrypt`."""
    return _ff1(key, tweak, digits, radix, encrypt=False)


def _ff1(key: bytes, tweak: bytes, numerals: str | Sequence[int], radix: int, *, encrypt: bool) -> str | list[int]:
    if len(key) not in (16, 24, 32):
        raise ValueError(f"Expected a key of 16, 24 or 32 bytes, got {len(key)}.")
    if not 2 <= radix <= 65536 or (isinstance(numerals, str) and radix > 36):
        raise ValueError(f"Expected 2 <= radix <= 65536 (36 for text), got {radix}.")
    numbers = [_ALPHABET.find(c) for c in numerals] if isinstance(numerals, str) else list(numerals)
    if not all(0 <= n < radix for n in numbers):
        raise ValueError(f"Expected numerals of radix {radix}.")
    if len(numbers) < 2 or radix ** len(numbers) < MIN_DOMAIN:
        raise ValueError(f"Expected radix ** length >= {MIN_DOMAIN} (NIST SP 800-38G), got {radix} ** {len(numbers)}.")
    out = _feistel(key, tweak, numbers, radix, encrypt=encrypt)
    return "".join(_ALPHABET[n] for n in out) if isinstance(numerals, str) else out


def _feistel(key: bytes, tweak: bytes, numbers: list[int], radix: int, *, encrypt: bool) -> list[int]:
    """The ten rounds of algorithms 7 and 8; names are the standard's."""
    n, t = len(numbers), len(tweak)
    u = n // 2
    v = n - u
    a, b = _number(numbers[:u], radix), _number(numbers[u:], radix)
    width = ((radix**v - 1).bit_length() + 7) // 8
    d = 4 * ((width + 3) // 4) + 4
    head = bytes((1, 2, 1)) + radix.to_bytes(3, "big") + bytes((10, u % 256)) + n.to_bytes(4, "big") + t.to_bytes(4, "big")
    for i in range(10) if encrypt else range(9, -1, -1):
        size = u if i % 2 == 0 else v
        inner = b if encrypt else a
        block = tweak + bytes((-t - width - 1) % 16) + bytes((i,)) + inner.to_bytes(width, "big")
        y = int.from_bytes(_expand(key, head + block, d), "big")
        if encrypt:
            a, b = b, (a + y) % radix**size
        else:
            a, b = (b - y) % radix**size, a
    return _numerals(a, radix, u) + _numerals(b, radix, v)


def _expand(key: bytes, message: bytes, count: int) -> bytes:
    """CBC-MAC of the message, stretched to `count` bytes with further cipher blocks (steps 6.ii and 6.iii)."""
    cipher = Cipher(AES(key), ECB()).encryptor()  # noqa: S305 - FF1 is defined on the raw block cipher
    r = bytes(16)
    for at in range(0, len(message), 16):
        r = cipher.update(bytes(x ^ y for x, y in zip(r, message[at : at + 16], strict=True)))
    s = r
    for j in range(1, (count + 15) // 16):
        s += cipher.update((int.from_bytes(r, "big") ^ j).to_bytes(16, "big"))
    return s[:count]


def _number(numerals: Sequence[int], radix: int) -> int:
    value = 0
    for numeral in numerals:
        value = value * radix + numeral
    return value


def _numerals(value: int, radix: int, count: int) -> list[int]:
    out = []
    for _ in range(count):
        value, numeral = divmod(value, radix)
        out.append(numeral)
    return out[::-1]
