"""FF1 against NIST's vectors; stand-ins, dates and coarser values."""

from __future__ import annotations

from datetime import date, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.deid import operators
from discreet.deid.operators import MIN_DOMAIN, Surrogates, date_offset, ff1_decrypt, ff1_encrypt, generalise, mask, open_token, shift_date, token
from discreet.deid.patterns import Label, is_card
from discreet.errors import SealBroken
from discreet.keys import Key

K128 = "2B7E151628AED2A6ABF7158809CF4F3C"
K192 = K128 + "EF4359D8D580AA4F"
K256 = K192 + "7F036D6F04FC6A94"
T10, T11 = "39383736353433323130", "3737373770717273373737"

# NIST, "Examples with Intermediate Values", SP 800-38G, FF1 samples 1 to 9: key, radix, tweak, plaintext, ciphertext.
FF1_SAMPLES = [
    (K128, 10, "", "0123456789", "2433477484"),
    (K128, 10, T10, "0123456789", "6124200773"),
    (K128, 36, T11, "0123456789abcdefghi", "a9tv40mll9kdu509eum"),
    (K192, 10, "", "0123456789", "2830668132"),
    (K192, 10, T10, "0123456789", "2496655549"),
    (K192, 36, T11, "0123456789abcdefghi", "xbj3kv35jrawxv32ysr"),
    (K256, 10, "", "0123456789", "6657667009"),
    (K256, 10, T10, "0123456789", "1001623463"),
    (K256, 36, T11, "0123456789abcdefghi", "xs8a0azh2avyalyzuwd"),
]


@pytest.mark.parametrize(("key", "radix", "tweak", "plain", "cipher"), FF1_SAMPLES)
def test_ff1_agrees_with_nist(key: str, radix: int, tweak: str, plain: str, cipher: str) -> None:
    assert ff1_encrypt(bytes.fromhex(key), bytes.fromhex(tweak), plain, radix) == cipher
    assert ff1_decrypt(bytes.fromhex(key), bytes.fromhex(tweak), cipher, radix) == plain


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.binary(max_size=40), st.integers(2, 300), st.data())
def test_ff1_round_trip(key: bytes, tweak: bytes, radix: int, data: st.DataObject) -> None:
    shortest = next(n for n in range(2, 64) if radix**n >= MIN_DOMAIN)
    numerals = data.draw(st.lists(st.integers(0, radix - 1), min_size=shortest, max_size=shortest + 12))
    made = ff1_encrypt(key, tweak, numerals, radix)
    assert len(made) == len(numerals)
    assert all(0 <= n < radix for n in made)
    assert ff1_decrypt(key, tweak, made, radix) == numerals


@pytest.mark.parametrize(
    ("key", "digits", "radix"),
    [(16, "12345", 10), (16, "1" * 19, 2), (15, "1234567", 10), (16, "12a4567", 10), (16, "1234567", 37), (16, "1234567", 1)],
)
def test_ff1_refuses_what_is_not_safe(key: int, digits: str, radix: int) -> None:
    with pytest.raises(ValueError, match="Expected"):
        ff1_encrypt(bytes(key), b"", digits, radix)


def stand_ins(number: int, *values: tuple[Label, str]) -> Surrogates:
    return Surrogates(Key(bytes([number]) * 32), values)


NAMES = ((Label.PERSON, "Kelly Fuller"), (Label.PERSON, "FULLER,KELLY"), (Label.PERSON, "Dr. Fuller"))


def test_one_person_has_one_stand_in_in_every_spelling() -> None:
    made = stand_ins(1, *NAMES)
    first, last = made.of("Kelly Fuller", Label.PERSON).split()
    assert made.of("FULLER,KELLY", Label.PERSON) == f"{last.upper()},{first.upper()}"
    assert made.of("Dr. Fuller", Label.PERSON) == f"Dr. {last}"
    assert made.of("kelly", Label.PERSON) == first.lower()


def test_one_person_keeps_the_stand_in_across_documents_whatever_else_they_hold() -> None:
    one = stand_ins(1, *NAMES).of("Kelly Fuller", Label.PERSON)
    other = stand_ins(1, (Label.PERSON, "Kelly Fuller"), (Label.PERSON, "Ann Reed"), (Label.PHONE, "322-555-0124")).of("Kelly Fuller", Label.PERSON)
    assert one == other


def test_another_subject_has_another_stand_in() -> None:
    assert len({stand_ins(n, *NAMES).of("Kelly Fuller", Label.PERSON) for n in range(20)}) >= 19


@pytest.mark.parametrize("label", [label for label in Label if label not in (Label.DATE, Label.AGE, Label.PERSON)])
def test_two_values_never_share_a_stand_in_and_none_is_an_original(label: Label) -> None:
    originals = [f"{n}2-{n}55-010{n}-AB" if label is not Label.LOCATION else f"Town{n}" for n in range(10)]
    made = stand_ins(3, *((label, value) for value in originals))
    out = [made.of(value, label) for value in originals]
    assert len(set(out)) == len(out)
    assert not set(out) & set(originals)
    assert [made.of(value, label) for value in originals] == out


def test_many_names_of_one_subject_stay_apart() -> None:
    pool = operators._pool("F")[:150] + operators._pool("L")[:150]
    made = stand_ins(4, *((Label.PERSON, name.capitalize()) for name in pool))
    out = [made.of(name.capitalize(), Label.PERSON).lower() for name in pool]
    assert len(set(out)) == len(out)
    assert not set(out) & set(pool)


@pytest.mark.parametrize(
    ("value", "label"),
    [("322-555-0124", Label.PHONE), ("(322) 555-0124", Label.PHONE), ("E39389873", Label.MRN), ("464-79-1772", Label.SSN), ("SN44063984-D", Label.DEVICE), ("4111 1111 1111 1111", Label.CARD)],
)  # fmt: skip
def test_format_is_kept(value: str, label: Label) -> None:
    out = stand_ins(5, (label, value)).of(value, label)
    assert [("d" if c.isdigit() else "a" if c.isalpha() else c) for c in out] == [("d" if c.isdigit() else "a" if c.isalpha() else c) for c in value]
    assert out != value


def test_one_number_in_two_formats_has_one_stand_in() -> None:
    made = stand_ins(6, (Label.PHONE, "322-555-0124"), (Label.PHONE, "(322) 555 0124"))
    assert operators.canonical(made.of("322-555-0124", Label.PHONE)) == operators.canonical(made.of("(322) 555 0124", Label.PHONE))


@pytest.mark.parametrize("number", range(25))
def test_stand_ins_cannot_belong_to_anybody(number: int) -> None:
    made = stand_ins(
        number,
        (Label.PHONE, "212-736-5000"),
        (Label.SSN, "464-79-1772"),
        (Label.CARD, "4111111111111111"),
        (Label.EMAIL, "a@b.co"),
        (Label.IP, "8.8.8.8"),
    )
    assert made.of("212-736-5000", Label.PHONE)[4:10] == "555-01"
    assert made.of("464-79-1772", Label.SSN)[:3] == "000"
    assert not is_card(made.of("4111111111111111", Label.CARD))
    assert made.of("a@b.co", Label.EMAIL).split("@")[1] in ("example.com", "example.net", "example.org")
    assert made.of("8.8.8.8", Label.IP).rsplit(".", 1)[0] in ("192.0.2", "198.51.100", "203.0.113")


def test_surrogates_print_nothing() -> None:
    assert repr(stand_ins(1, *NAMES)) == "<surrogates>"


@settings(max_examples=200, deadline=None)
@given(
    st.dates(date(1930, 1, 1), date(2060, 12, 31)),
    st.integers(-365, 365).filter(bool),
    st.sampled_from(["%Y-%m-%d", "%m/%d/%Y", "%d %b %Y", "%B %d, %Y", "%Y%m%d", "%A, %B %d, %Y", "%d-%b-%Y"]),
)
def test_dates_move_in_their_own_format(day: date, days: int, form: str) -> None:
    short_or_long = "%B" if day.month == 5 else "%b"  # "May" does not say which it is; it is read as the long form
    assert shift_date(day.strftime(form), days) == (day + timedelta(days=days)).strftime(form.replace("%b", short_or_long))


@pytest.mark.parametrize(
    ("value", "moved"),
    [
        ("6/24/1991", "8/3/1991"), ("01/24/21", "03/05/21"), ("October 20, 2023", "November 29, 2023"), ("12-JAN-2021", "21-FEB-2021"), ("3rd of May, 2020", "12th of June, 2020"),
        ("Monday, May 23", "Saturday, July 02"), ("2024-04-03T10:00:00Z", "2024-05-13T10:00:00Z"), ("31.12.1999", "09.02.2000"), ("Sept. 3rd, 2019", "Oct. 13th, 2019"), ("03/2023", "04/2023"),
    ],
)  # fmt: skip
def test_forty_days_later(value: str, moved: str) -> None:
    assert shift_date(value, 40) == moved


def test_what_is_no_date_is_not_moved() -> None:
    assert shift_date("soon", 3) is None
    assert shift_date("30 February 2020", 3) is None


def test_date_offset_is_one_number_of_the_key_within_a_year() -> None:
    offsets = [date_offset(Key(bytes([n]) * 32)) for n in range(200)]
    assert all(1 <= abs(days) <= 365 for days in offsets)
    assert len(set(offsets)) > 100
    assert date_offset(Key(bytes(32))) == date_offset(Key(bytes(32)))


def test_intervals_of_a_subject_are_kept() -> None:
    made = stand_ins(8, (Label.DATE, "2023-01-30"), (Label.DATE, "03/02/2023"))
    month, day, year = (int(p) for p in made.of("03/02/2023", Label.DATE).split("/"))
    assert (date(year, month, day) - date.fromisoformat(made.of("2023-01-30", Label.DATE))).days == 31


@pytest.mark.parametrize(
    ("value", "label", "out"),
    [
        ("44070", Label.ZIP, "440**"), ("03601-1234", Label.ZIP, "000**"), ("SW1A 1AA", Label.ZIP, "[ZIP]"), ("1977-10-09", Label.DATE, "1977"), ("May 23", Label.DATE, "[DATE]"),
        ("98", Label.AGE, "90+"), ("Ann", Label.PERSON, "[PERSON]"),
    ],
)  # fmt: skip
def test_generalise(value: str, label: Label, out: str) -> None:
    assert generalise(value, label) == out


def test_mask_keeps_length_and_punctuation() -> None:
    assert mask("(322) 555-0124", Label.PHONE) == "(***) ***-****"


def test_token_is_the_same_for_the_same_value_and_opens_with_the_key_alone() -> None:
    key, other = Key(bytes(32)), Key(b"1" * 32)
    sealed = token("322-555-0124", Label.PHONE, key)
    assert sealed == token("322-555-0124", Label.PHONE, key)
    assert sealed != token("322-555-0124", Label.PHONE, other)
    assert open_token(sealed, key) == "322-555-0124"
    assert open_token(token("", Label.HEALTH_PLAN, key), key) == ""
    for bad in (sealed.replace("PHONE", "FAX"), sealed[:-2] + "AA", "PHONE_", "x"):
        with pytest.raises(SealBroken):
            open_token(bad, key)
    with pytest.raises(SealBroken):
        open_token(sealed, other)


@pytest.mark.parametrize(
    ("value", "moved"),
    [
        ("12 de marzo de 2020", "21 de abril de 2020"), ("3. März 2021", "12. April 2021"), ("le 14 juillet 2019", "le 23 août 2019"), ("1er janvier 2020", "10 février 2020"),
        ("lunes, 5 de enero", "sábado, 14 de febrero"), ("Montag, 5. Mai 2025", "Samstag, 14. Juni 2025"), ("05.03.2020", "14.04.2020"), ("3. September 2021", "13. Oktober 2021"),
    ],
)  # fmt: skip
def test_forty_days_later_in_other_languages(value: str, moved: str) -> None:
    assert shift_date(value, 40) == moved


@pytest.mark.parametrize("number", range(12))
def test_names_keep_language_and_gender(number: int) -> None:
    values = ["María García", "Jürgen Müller", "Kelly Smith", "Robert Jones"]
    made = {value: stand_ins(number, *((Label.PERSON, each) for each in values)).of(value, Label.PERSON) for value in values}
    known = {value: [operators.languages.names().get(operators.fold(part).lower()) for part in out.split()] for value, out in made.items()}
    assert known["María García"] == [("es", "F"), ("es", "L")]
    assert known["Jürgen Müller"] == [("de", "M"), ("de", "L")]
    assert known["Kelly Smith"] == [None, None]
    assert made["Robert Jones"].split()[0].lower() in operators._pool("M")


@pytest.mark.parametrize("value", ["Иван Петров", "李明", "محمد علي", "Ελένη", "Αλέξανδρος Παπαδόπουλος"])
def test_a_name_in_another_script_leaves_no_letter(value: str) -> None:
    out = stand_ins(2, (Label.PERSON, value)).of(value, Label.PERSON)
    assert out.replace(" ", "").isascii()
    assert not set(out.lower()) & set(value.lower()) - set(" ")


@pytest.mark.parametrize(
    ("value", "kept"),
    [("Hospital Universitario La Paz", "Hospital Universitario"), ("Universität Heidelberg", "Universität"), ("St. Mary's Memorial Hospital", "Memorial Hospital"), ("Acme Widgets", "Group"), ("Howell Memorial Hospital", "Memorial Hospital"), ("GENERAL HOSPITAL", "GENERAL HOSPITAL")],
)  # fmt: skip
def test_of_an_organisation_only_its_kind_stays(value: str, kept: str) -> None:
    out = stand_ins(2, (Label.ORG, value)).of(value, Label.ORG)
    assert kept in out
    for word in ("Paz", "Heidelberg", "Mary", "Acme", "Widgets", "Howell"):
        assert word not in out
    assert out != value


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        ("Calle Mayor 12, 3º", r"Calle del? .* \d+"), ("Hauptstraße 5", r"\w+(?:weg|straße) \d+"), ("12 rue de Rivoli", r"\d+ rue d\w+ .*"), ("PO Box 442", r"PO Box \d+"),
        ("123 Main Street, Apt 4B", r"\d+ \w+ \w+, Apt \d+"),
    ],
)  # fmt: skip
def test_an_address_keeps_the_manner_of_its_language(value: str, pattern: str) -> None:
    assert operators.re.fullmatch(pattern, stand_ins(3, (Label.ADDRESS, value)).of(value, Label.ADDRESS))


@pytest.mark.parametrize(
    ("value", "label", "pattern"),
    [
        ("+1 (212) 736-5000", Label.PHONE, r"\+1 \(\d{3}\) 555-01\d\d"), ("+44 7911 123456", Label.PHONE, r"\+44 7700 900\d\d\d"), ("+33 6 12 34 56 78", Label.PHONE, r"\+33 1 99 00 \d\d \d\d"),
        ("+34 612 345 678", Label.PHONE, r"\+34 \d{3} \d{3} \d{3}"), ("030 1234567", Label.PHONE, r"0[1-9]\d \d{7}"), ("DE89 3704 0044 0532 0130 00", Label.IBAN, r"DE00(?: \d{4}){4} \d\d"), ("2001:db8:7::1", Label.IP, r"2001:db8::[a-f]{4}"),
    ],
)  # fmt: skip
def test_countries_and_ranges_of_nobody(value: str, label: Label, pattern: str) -> None:
    assert operators.re.fullmatch(pattern, stand_ins(4, (label, value)).of(value, label))


def test_tokens_bind_subject_and_policy() -> None:
    key = Key(bytes(32))
    sealed = token("x", Label.PERSON, key, subject="S1", policy="token")
    assert operators.TOKEN.fullmatch(sealed)
    assert open_token(sealed, key, subject="S1", policy="token") == "x"
    for other in ({"subject": "S2", "policy": "token"}, {"subject": "S1", "policy": "log"}, {"subject": "S1token", "policy": ""}):
        with pytest.raises(SealBroken):
            open_token(sealed, key, **other)
