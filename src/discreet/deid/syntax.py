"""Replaces identifiers in source code and structured text so that it still parses: Python, JavaScript, SQL, JSON, JSON Lines, YAML, CSV.

    text -> lexer of its syntax -> pieces (what is inside quotes, comments, scalars, cells; the rest is code)
    text -> detect -> spans -> cut at the borders of pieces -> each part decoded, replaced, encoded again as its piece demands

A replacement is written as its place needs it: escaped within quotes, without a line break or an end mark within a comment, quoted where a number becomes a word, sanitised in a plain YAML scalar. What is code stays as it
is (an identifier that reads like a name is an identifier, PITFALLS 27), but for numbers, secrets and values that are known to be sensitive. Keys stay, unless the whole key is an identifier of a person; then two of them stay two.

In tables (CSV; JSON and YAML by key) the columns are classified by a sample of their values and by their names: in a column of telephone numbers every value is one, whatever the detector says about it alone. A
sample reaches over records, so tables are for the command line and for callers with one person's table; the training path has `[source.known]` for its columns (PITFALLS 39).

Guarantees: Python that compiled to a tree and JSON that was valid are so afterwards (checked with the parser, or an error is raised); keys, columns, number of rows, quoting and line ends of JSON and CSV are those of the input. Spans are
places of the input.

Does not cover: JSX, template languages, heredocs, macros of SQL dialects; code that does not parse is treated as plain text, so that nothing in it is missed because it looks like code.
"""

from __future__ import annotations

import ast
import json
import keyword
import re
import warnings
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import PurePath
from types import MappingProxyType
from typing import final

from discreet.deid import policy as policies
from discreet.deid.detect import MAX_CHARS, Span
from discreet.deid.operators import Operator, canonical
from discreet.deid.patterns import Label
from discreet.deid.policy import Policy, Redacted
from discreet.errors import OperationFailed, RequestInvalid
from discreet.keys import Key


@final
class Syntax(StrEnum):
    """What a text is written in."""

    TEXT = "text"
    PYTHON = "python"
    JAVASCRIPT = "javascript"
    SQL = "sql"
    JSON = "json"
    JSONL = "jsonl"
    YAML = "yaml"
    CSV = "csv"


_SUFFIXES: Mapping[str, Syntax] = MappingProxyType(
    {
        ".py": Syntax.PYTHON, ".pyi": Syntax.PYTHON, ".js": Syntax.JAVASCRIPT, ".mjs": Syntax.JAVASCRIPT, ".cjs": Syntax.JAVASCRIPT, ".ts": Syntax.JAVASCRIPT, ".sql": Syntax.SQL,
        ".json": Syntax.JSON, ".jsonl": Syntax.JSONL, ".ndjson": Syntax.JSONL, ".yaml": Syntax.YAML, ".yml": Syntax.YAML, ".csv": Syntax.CSV, ".tsv": Syntax.CSV,
    }
)  # fmt: skip


def of_file(name: str) -> Syntax:
    """Returns the syntax of a file by the end of its name; text where it is none of ours."""
    return _SUFFIXES.get(PurePath(name).suffix.lower(), Syntax.TEXT)


def redact(
    text: str,
    syntax: Syntax | str,
    policy: Policy | str = "label",
    *,
    known: Mapping[str, Sequence[str]] = MappingProxyType({}),
    key: Key | None = None,
    subject: str = "",
) -> Redacted:
    """Replaces the identifiers of a text as a policy says, and leaves it in the syntax it is in.

    Args:
        text: at most `detect.MAX_CHARS` code points; a CSV file may be longer.
        syntax: what it is written in.
        policy: a policy, or the name of a built-in one; its `k` is for running text and is left out here.
        known: identifiers that the text is known to be about, label -> values.
        key: the subject's key, for surrogates, shifted dates and tokens.
        subject: whom tokens are bound to.

    Raises:
        ConfigInvalid: when there is no such policy.
        RequestInvalid: when the syntax is unknown or the text too long.
        OperationFailed: when what came out would not parse; nothing is returned then.
    """
    if syntax not in Syntax.__members__.values():
        raise RequestInvalid(f"a syntax out of {', '.join(Syntax)}", value=syntax)
    chosen, kind = policies.resolve(policy), Syntax(syntax)
    if not _parses(text, kind):
        kind = Syntax.TEXT
    if kind is Syntax.TEXT:
        return policies.redact(text, chosen, known=known, key=key, subject=subject)
    table = _csv(text) if kind is Syntax.CSV else None
    pieces = _pieces_of(table) if table is not None else list(_LEXERS[kind](text))
    spans = _spans_of_table(text, table, chosen, known) if table is not None else _spans(text, pieces, chosen, known)
    edits = _edits(text, pieces, spans, secret=_canonical_known(known), render=_Renderer(chosen, known, key, subject), syntax=kind)
    made = _applied(text, edits)
    if not _parses(made, kind):
        raise OperationFailed(f"redacted {kind} that parses", remedy="Redact it as plain text (--syntax text), and report this as a defect.")
    return Redacted(text=made, spans=tuple(Span(e.start, e.end, e.label, e.score) for e in edits))


def _parses(text: str, kind: Syntax) -> bool:
    """Says whether a text is valid; where there is no parser at hand, that it is taken to be."""
    try:
        if kind is Syntax.PYTHON:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(text)
        elif kind in (Syntax.JSON, Syntax.JSONL):
            for part in [text] if kind is Syntax.JSON else filter(str.strip, text.split("\n")):
                json.loads(part)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


# Pieces -----------------------------------------------------------------------------------------------------------------------------------------------------


@final
class Style(StrEnum):
    """How the inside of a piece is written."""

    ESCAPED = "escaped"  # backslash escapes: Python, JavaScript, JSON, YAML's double quotes
    RAW = "raw"  # no escapes: raw strings, dollar quotes
    BYTES = "bytes"
    DOUBLED = "doubled"  # the quote is doubled: SQL, CSV, YAML's single quotes
    INTERPOLATED = "interpolated"  # f-strings
    TEMPLATE = "template"
    REGEX = "regex"
    COMMENT = "comment"
    PLAIN = "plain"  # YAML without quotes
    BLOCK = "block"  # YAML's | and >
    CELL = "cell"  # CSV without quotes
    NUMBER = "number"  # JSON's


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """`text[start:end]`, without its quotes. `quote` is the mark that ends it, for a CSV cell its delimiter; `key` says that it names a field; `whole`, of a plain scalar, that quotes may be put around it."""

    start: int
    end: int
    style: Style
    quote: str = ""
    key: bool = False
    whole: bool = False


_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "/": "/", "0": "\0"}
_ESCAPE = re.compile(r"\\(?:u\{([0-9a-fA-F]{1,6})\}|u([0-9a-fA-F]{4})|x([0-9a-fA-F]{2})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_BLANK_ESCAPES = frozenset(("\\n", "\\t", "\\r", "\\b", "\\f", "\\v"))


def _decoded(raw: str, piece: Piece) -> str:
    if piece.style is Style.DOUBLED:
        return raw.replace(piece.quote * 2, piece.quote)
    if piece.style in (Style.ESCAPED, Style.INTERPOLATED, Style.TEMPLATE, Style.REGEX) and "\\" in raw:
        return _ESCAPE.sub(_unescape, raw)
    return raw


def _unescape(match: re.Match[str]) -> str:
    code = match[1] or match[2] or match[3] or match[4]
    if code:
        return chr(int(code, 16)) if int(code, 16) <= 0x10FFFF else ""
    return _ESCAPES.get(match[5], match[5])


def _encoded(value: str, piece: Piece, syntax: Syntax, *, whole: bool) -> str:
    """Writes a value as it may stand in a piece."""
    flat = " ".join(value.splitlines()) if "\n" in value or "\r" in value else value
    return _ENCODERS[piece.style](flat, piece, syntax, whole)


def _escape(value: str, piece: Piece, _syntax: Syntax, _whole: bool) -> str:
    out = value.replace("\\", "\\\\").replace(piece.quote[:1], "\\" + piece.quote[:1])
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" if ord(c) < 0x10000 else "?" for c in out)


def _raw(value: str, piece: Piece, _syntax: Syntax, _whole: bool) -> str:
    return "".join(c for c in value if c not in "\\{}" and c not in piece.quote)


def _bytes(value: str, piece: Piece, syntax: Syntax, whole: bool) -> str:
    return _escape(value.encode("ascii", "replace").decode(), piece, syntax, whole)


def _doubled(value: str, piece: Piece, _syntax: Syntax, _whole: bool) -> str:
    return value.replace(piece.quote, piece.quote * 2)


def _interpolated(value: str, piece: Piece, syntax: Syntax, whole: bool) -> str:
    return _escape(value, piece, syntax, whole).replace("{", "{{").replace("}", "}}")


def _template(value: str, piece: Piece, syntax: Syntax, whole: bool) -> str:
    return _escape(value, piece, syntax, whole).replace("${", "\\${")


def _regex(value: str, _piece: Piece, _syntax: Syntax, _whole: bool) -> str:
    return re.sub(r"([\\/\[\](){}^$.*+?|])", r"\\\1", value)


def _comment(value: str, _piece: Piece, _syntax: Syntax, _whole: bool) -> str:
    return value.replace("*/", "* /")


_YAML_SAFE = str.maketrans(
    {"[": "<", "]": ">", "{": "<", "}": ">", ",": " ", "#": " ", '"': " ", "'": " ", "&": " ", "*": "x", "!": " ", "`": " ", "@": " at ", "%": " "}
)
_YAML_KEPT = re.compile(r"[+-]?\d+(?:\.\d+)?|\d{4}-\d{2}-\d{2}|[A-Za-z][A-Za-z0-9 ._-]*[A-Za-z0-9]")


def _plain(value: str, _piece: Piece, _syntax: Syntax, whole: bool) -> str:
    if whole and not (_YAML_KEPT.fullmatch(value) and not _YAML_WORDS.fullmatch(value)):
        return json.dumps(value, ensure_ascii=False)
    safe = value.translate(_YAML_SAFE).replace(": ", " ").strip(" -?:|>=")
    return (safe + ">" if "<" in safe and safe.count("<") > safe.count(">") else safe) or "x"


_YAML_WORDS = re.compile(r"(?i:y|n|yes|no|true|false|on|off|null)")


def _block(value: str, _piece: Piece, _syntax: Syntax, _whole: bool) -> str:
    return value


def _cell(value: str, piece: Piece, _syntax: Syntax, whole: bool) -> str:
    """A part of a cell without quotes can have no delimiter; a whole cell gets quotes for it."""
    if not any(c in value for c in ('"', piece.quote)):
        return value
    return '"' + value.replace('"', '""') + '"' if whole else value.replace('"', "'").replace(piece.quote, " ")


def _number(value: str, _piece: Piece, syntax: Syntax, _whole: bool) -> str:
    return _literal(value, syntax)


_ENCODERS: Mapping[Style, Callable[[str, Piece, Syntax, bool], str]] = MappingProxyType(
    {
        Style.ESCAPED: _escape, Style.RAW: _raw, Style.BYTES: _bytes, Style.DOUBLED: _doubled, Style.INTERPOLATED: _interpolated, Style.TEMPLATE: _template, Style.REGEX: _regex,
        Style.COMMENT: _comment, Style.PLAIN: _plain, Style.BLOCK: _block, Style.CELL: _cell, Style.NUMBER: _number,
    }
)  # fmt: skip


# Lexers -----------------------------------------------------------------------------------------------------------------------------------------------------

_PY = re.compile(r"#(?P<comment>[^\n]*)|(?<![A-Za-z0-9_])(?P<prefix>[rRbBuUfF]{0,2})(?P<quote>\"\"\"|'''|\"|')|[A-Za-z_]\w*")


def _python(text: str) -> Iterator[Piece]:
    at = 0
    while match := _PY.search(text, at):
        at = match.end()
        if match["comment"] is not None:
            yield Piece(*match.span("comment"), Style.COMMENT)
        elif match["quote"]:
            prefix = match["prefix"].lower()
            style = Style.RAW if "r" in prefix else Style.BYTES if "b" in prefix else Style.INTERPOLATED if "f" in prefix else Style.ESCAPED
            if "f" in prefix:
                pieces, at = _braced(text, at, match["quote"], "{", style)
                yield from pieces
            else:
                end = _end_of_string(text, at, match["quote"])
                yield Piece(at, end, style, match["quote"])
                at = end + len(match["quote"])


def _end_of_string(text: str, at: int, quote: str) -> int:
    while at < len(text) and not text.startswith(quote, at):
        at += 2 if text[at] == "\\" else 1
    return min(at, len(text))


def _braced(text: str, at: int, quote: str, opening: str, style: Style) -> tuple[list[Piece], int]:
    """Reads a string with code in braces from behind its quote on; returns its pieces, those of strings within the code too, and where it ends."""
    pieces, begin = [], at
    while at < len(text) and not text.startswith(quote, at):
        if text[at] == "\\" or (style is not Style.TEMPLATE and text.startswith((opening * 2, "}}"), at)):
            at += 2
        elif text.startswith(opening, at):
            pieces.append(Piece(begin, at, style, quote))
            inner, at = _code_in_braces(text, at + len(opening))
            pieces += inner
            begin = at
        else:
            at += 1
    at = min(at, len(text))
    return [*pieces, Piece(begin, at, style, quote)], at + len(quote)


def _code_in_braces(text: str, at: int) -> tuple[list[Piece], int]:
    pieces, depth = [], 1
    while at < len(text) and depth:
        character = text[at]
        if character in "'\"":
            end = _end_of_string(text, at + 1, character)
            pieces.append(Piece(at + 1, end, Style.ESCAPED, character))
            at = end
        elif character == "`":
            inner, at = _braced(text, at + 1, "`", "${", Style.TEMPLATE)
            pieces += inner
            continue
        depth += (character == "{") - (character == "}")
        at += 1
    return pieces, at


_JS = re.compile(
    r"//(?P<line>[^\n]*)|/\*(?P<block>.*?)(?:\*/|\Z)|(?P<quote>[\"'`])|(?P<regex>/(?![*/])(?P<body>(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n\[])+)/)|[A-Za-z_$][\w$]*|\d[\w.]*",
    re.DOTALL,
)
_BEFORE_REGEX = re.compile(r"(?:^|[(,=:\[!&|?{};+*%<>~^-]|\b(?:return|typeof|case|in|of|delete|void|throw|new|else|do))\s*\Z")


def _javascript(text: str) -> Iterator[Piece]:
    at = 0
    while match := _JS.search(text, at):
        at = match.end()
        if match["line"] is not None or match["block"] is not None:
            yield Piece(*match.span("line" if match["line"] is not None else "block"), Style.COMMENT)
        elif match["quote"] == "`":
            pieces, at = _braced(text, at, "`", "${", Style.TEMPLATE)
            yield from pieces
        elif match["quote"]:
            end = _end_of_string(text, at, match["quote"])
            yield Piece(at, end, Style.ESCAPED, match["quote"])
            at = end + 1
        elif match["regex"]:
            if _BEFORE_REGEX.search(text, max(0, match.start() - 60), match.start()):
                yield Piece(*match.span("body"), Style.REGEX)
            else:
                at = match.start() + 1


_SQL = re.compile(r"--(?P<line>[^\n]*)|/\*(?P<block>.*?)(?:\*/|\Z)|(?P<dollar>\$[A-Za-z_]*\$)|(?P<quote>['\"`])", re.DOTALL)


def _sql(text: str) -> Iterator[Piece]:
    """Reads standard quotes, and MySQL's backslash where standard quotes do not come out even."""
    pieces, even = _sql_with(text, backslash=False)
    yield from pieces if even else _sql_with(text, backslash=True)[0]


def _sql_with(text: str, *, backslash: bool) -> tuple[list[Piece], bool]:
    pieces: list[Piece] = []
    at, even = 0, True
    while match := _SQL.search(text, at):
        at = match.end()
        if match["line"] is not None or match["block"] is not None:
            pieces.append(Piece(*match.span("line" if match["line"] is not None else "block"), Style.COMMENT))
            continue
        quote = match["dollar"] or match["quote"]
        end = at
        while end < len(text) and not text.startswith(quote, end):
            end += 2 if backslash and text[end] == "\\" else 1
            while len(quote) == 1 and text.startswith(quote * 2, end):
                end += 2
        even &= end < len(text)
        end = min(end, len(text))
        pieces.append(Piece(at, end, Style.RAW if match["dollar"] else Style.DOUBLED, quote))
        at = end + len(quote)
    return pieces, even


_JSON = re.compile(r'"(?P<inside>(?:[^"\\]|\\.)*)"(?P<key>\s*:)?|(?P<number>-?\d[\d.eE+-]*)', re.DOTALL)


def _json(text: str) -> Iterator[Piece]:
    for match in _JSON.finditer(text):
        if match["number"]:
            yield Piece(*match.span(), Style.NUMBER)
        else:
            yield Piece(*match.span("inside"), Style.ESCAPED, '"', key=match["key"] is not None)


_YAML_KEY = re.compile(r"(?P<key>\"(?:[^\"\\]|\\.)*\"|'(?:[^']|'')*'|[^\s#\"'\[\]{},&*!|>%@`-][^\n]*?|-[^\s][^\n]*?)\s*:(?=\s|$)")
_YAML_DASH = re.compile(r"-(?:[ \t]+|$)")
_YAML_BLOCK = re.compile(r"[|>][+-]?\d?[+-]?[ \t]*(?:#[^\n]*)?$")
_YAML_ATOM = re.compile(
    r"(?P<comment>(?:^|(?<=\s))#[^\n]*)|\"(?P<double>(?:[^\"\\]|\\.)*)\"|'(?P<single>(?:[^']|'')*)'|(?P<plain>[^\s\[\]{},#\"'][^\n\[\]{},#]*(?:#(?<!\s#)[^\n\[\]{},#]*)*)",
    re.DOTALL,
)


def _yaml(text: str) -> Iterator[Piece]:
    at = 0
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        indent = len(text[at:end]) - len(text[at:end].lstrip(" "))
        place = at + indent
        while dash := _YAML_DASH.match(text, place, end):
            place = dash.end()
        if text.startswith(("---", "...", "%"), at):
            place = min(end, at + 4) if text.startswith("---", at) else end
        key = _YAML_KEY.match(text, place, end)
        if key:
            yield from _yaml_key(*key.span("key"), text)
            place = key.end()
        place += len(text[place:end]) - len(text[place:end].lstrip())
        tag = re.compile(r"(?:[!&][^\s]*\s+)+").match(text, place, end)
        place = tag.end() if tag else place
        if _YAML_BLOCK.match(text, place, end):
            stop = _end_of_block(text, end + 1, indent if key is not None or place > at + indent else -1)
            yield Piece(min(end + 1, len(text)), stop, Style.BLOCK)
            at = stop
            continue
        at = yield from _yaml_value(
            text, place, end, alone=_is_single_line(text, end, indent) and (key is not None or text[at:place].strip().startswith("-"))
        )


def _yaml_key(start: int, end: int, text: str) -> Iterator[Piece]:
    if text[start] in "\"'":
        yield Piece(start + 1, end - 1, Style.ESCAPED if text[start] == '"' else Style.DOUBLED, text[start], key=True)
    else:
        yield Piece(start, end, Style.PLAIN, key=True)


def _is_single_line(text: str, end: int, indent: int) -> bool:
    """Says whether the scalar that ends here does not go on: the next line with text is not further in."""
    following = re.compile(r"\n(?:[ \t]*\n)*([ ]*)(?=\S)").match(text, end)
    return following is None or len(following[1]) <= indent


def _end_of_block(text: str, at: int, indent: int) -> int:
    while at < len(text):
        end = text.find("\n", at)
        end = len(text) if end < 0 else end
        line = text[at:end]
        if line.strip() and len(line) - len(line.lstrip(" ")) <= indent:
            return at
        at = end + 1
    return min(at, len(text))


def _yaml_value(text: str, place: int, end: int, *, alone: bool) -> Generator[Piece, None, int]:
    """Yields the pieces of a value; returns where the next line begins (a quoted scalar may go on over several)."""
    flow = place < end and text[place] in "[{"
    if place < end and not flow and text[place] not in "\"'#":
        comment = re.compile(r"\s#").search(text, place, end)
        stop = comment.start() if comment else end
        stop -= len(text[place:stop]) - len(text[place:stop].rstrip())
        yield Piece(place, stop, Style.PLAIN, whole=alone)
        place = stop
    while match := _YAML_ATOM.search(text, place):
        if match.start() >= end:
            break
        if match["comment"]:
            yield Piece(match.start() + 1, match.end(), Style.COMMENT)
        elif match["double"] is not None:
            yield Piece(*match.span("double"), Style.ESCAPED, '"', key=_is_flow_key(text, match.end()))
        elif match["single"] is not None:
            yield Piece(*match.span("single"), Style.DOUBLED, "'", key=_is_flow_key(text, match.end()))
        else:
            yield from _flow_plain(text, match.start(), min(match.end(), end))
        place = match.end()
        end = max(end, text.find("\n", place) if text.find("\n", place) >= 0 else len(text)) if place > end else end
    return end + 1


def _is_flow_key(text: str, at: int) -> bool:
    return text[at : at + 1] == ":"


def _flow_plain(text: str, start: int, end: int) -> Iterator[Piece]:
    """A plain atom of a flow, `key: value` or `value`."""
    colon = re.compile(r":(?:\s|$)").search(text, start, end)
    if colon:
        yield Piece(start, colon.start(), Style.PLAIN, key=True)
        start = colon.end()
    stop = end - (len(text[start:end]) - len(text[start:end].rstrip()))
    if start < stop:
        yield Piece(start, stop, Style.PLAIN)


_LEXERS: Mapping[Syntax, Callable[[str], Iterator[Piece]]] = MappingProxyType(
    {Syntax.PYTHON: _python, Syntax.JAVASCRIPT: _javascript, Syntax.SQL: _sql, Syntax.JSON: _json, Syntax.JSONL: _json, Syntax.YAML: _yaml}
)


# Spans ------------------------------------------------------------------------------------------------------------------------------------------------------


def _spans(text: str, pieces: Sequence[Piece], policy: Policy, known: Mapping[str, Sequence[str]]) -> list[Span]:
    found = policies.spans_in(text, policy, known)
    columns: dict[str, list[Piece]] = defaultdict(list)
    for name, piece in _fields(text, pieces):
        columns[name].append(piece)
    return _with_columns(text, columns, found, policy)


def _fields(text: str, pieces: Sequence[Piece]) -> Iterator[tuple[str, Piece]]:
    """Yields the values that stand behind a key, with the key."""
    for before, piece in pairwise(pieces):
        if before.key and not piece.key and not text[before.end : piece.start].strip("\"' \t:"):
            yield text[before.start : before.end], piece


def _with_columns(text: str, columns: Mapping[str, Sequence[Piece]], found: Sequence[Span], policy: Policy) -> list[Span]:
    """Adds the whole values of columns that have a label; what was found within them goes under."""
    whole: list[Span] = []
    for name, cells in columns.items():
        filled = [cell for cell in cells if text[cell.start : cell.end].strip()]
        label = column_label(name, [_covering(found, cell) for cell in filled[:_SAMPLE]])
        if label is None or policy.operators[label] is Operator.KEEP:
            continue
        whole += [Span(cell.start, cell.end, label, 0.9) for cell in filled]
    inside = _Cover(whole)
    return sorted([*whole, *(span for span in found if not inside.touches(span.start, span.end))], key=lambda span: span.start)


_SAMPLE = 200
_MIN_VALUES = 5
_SHARE = 0.6
_NAMED: Mapping[str, Label] = MappingProxyType(
    {
        r"(?:first|last|middle|given|family|full|patient|client|employee|customer|contact|maiden)_?names?|sur_?name|forename|nombre|apellidos?|nachname|vorname|prenom": Label.PERSON,
        r"dob|(?:date_?of_?)?birth_?(?:date|day)?|geburtsdatum": Label.DATE,
        r"ssn|social_?security(?:_?(?:no|number))?": Label.SSN,
        r"mrn|medical_?record_?(?:no|number)": Label.MRN,
        r"e_?mail(?:_?address)?": Label.EMAIL,
        r"(?:cell|home|work|mobile)?_?(?:tele)?phone(?:_?(?:no|number))?|mobile|tel": Label.PHONE,
        r"fax(?:_?(?:no|number))?": Label.FAX,
        r"zip(?:_?code)?|post(?:al)?_?code": Label.ZIP,
        r"city|town|birth_?place": Label.LOCATION,
        r"(?:street|home|mailing|postal)?_?address(?:_?line)?_?\d?|street": Label.ADDRESS,
        r"pass_?word|passwd|secret|api_?key|access_?token": Label.SECRET,
        r"iban": Label.IBAN,
    }
)  # fmt: skip
"""Names of columns that say what every value is."""


def column_label(name: str, covered: Sequence[str]) -> Label | None:
    """Returns the label of a column by its name, or by a sample of its values.

    Args:
        name: of the column or key.
        covered: for each value of the sample the label of the span that covers it, "" where none does.
    """
    plain = re.sub(r"(?<=[a-z])(?=[A-Z])|[\s.-]+", "_", name).lower()
    for expression, label in _NAMED.items():
        if re.fullmatch(expression, plain):
            return label
    counts = Counter(label for label in covered if label)
    if len(covered) < _MIN_VALUES or not counts:
        return None
    commonest, count = counts.most_common(1)[0]
    return Label(commonest) if count >= _SHARE * len(covered) else None


def _covering(found: Sequence[Span], cell: Piece) -> str:
    index = bisect_right(found, cell.start, key=lambda span: span.end)
    span = found[index] if index < len(found) else None
    return span.label if span is not None and span.start <= cell.start + 1 and span.end >= cell.end - 1 else ""


@final
class _Cover:
    """Ranges to ask about, sorted and disjoint."""

    def __init__(self, spans: Sequence[Span]) -> None:
        ranges = sorted((span.start, span.end) for span in spans)
        self._starts, self._ends = [start for start, _ in ranges], [end for _, end in ranges]

    def touches(self, start: int, end: int) -> bool:
        index = bisect_right(self._ends, start)
        return index < len(self._ends) and self._starts[index] < end


# Edits ------------------------------------------------------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class _Edit:
    start: int
    end: int
    label: str
    score: float
    put: str


@final
class _Renderer:
    """Renders values that are not in one text: the parts of spans, decoded."""

    def __init__(self, policy: Policy, known: Mapping[str, Sequence[str]], key: Key | None, subject: str) -> None:
        self._policy, self._known, self._key, self._subject = policy, known, key, subject

    def __call__(self, values: Sequence[tuple[str, Span]]) -> list[str]:
        spans, at = [], 0
        for value, span in values:
            spans.append(Span(at, at + len(value), span.label, span.score))
            at += len(value) + 1
        text = "\n".join(value for value, _ in values)
        render = policies.renderer(text, spans, self._policy, known=self._known, key=self._key, subject=self._subject)
        return [render(span) for span in spans]


_Part = tuple[int, int, Piece | None, Span]


def _edits(text: str, pieces: Sequence[Piece], spans: Sequence[Span], *, secret: frozenset[str], render: _Renderer, syntax: Syntax) -> list[_Edit]:
    parts = [part for span in spans for part in _cut(text, pieces, span, syntax, secret)]
    parts = [part for index, part in enumerate(parts) if not index or part[0] >= parts[index - 1][1]]
    values = [text[start:end] if piece is None else _decoded(text[start:end], piece) for start, end, piece, _ in parts]
    rendered = render([(value, span) for value, (_, _, _, span) in zip(values, parts, strict=True)])
    names = _Names()
    edits = []
    for (start, end, piece, span), value, new in zip(parts, values, rendered, strict=True):
        if piece is None:
            put = names.of(value) if re.fullmatch(r"[^\W\d][\w$]*", value) else _literal(new, syntax)
        else:
            whole = start == piece.start and end == piece.end and (piece.whole or piece.style is Style.CELL)
            put = _encoded(names.key(value, new) if piece.key else new, piece, syntax, whole=whole)
        edits.append(_Edit(start, end, span.label, span.score, put))
    return edits


@final
class _Names:
    """Keys and identifiers that were two stay two."""

    def __init__(self) -> None:
        self._keys: dict[str, dict[str, int]] = defaultdict(dict)
        self._identifiers: dict[str, int] = {}

    def key(self, value: str, new: str) -> str:
        number = self._keys[new].setdefault(value, len(self._keys[new]) + 1)
        return new if number == 1 else f"{new}_{number}"

    def of(self, identifier: str) -> str:
        return f"redacted_{self._identifiers.setdefault(identifier, len(self._identifiers) + 1)}"


def _literal(new: str, syntax: Syntax) -> str:
    """What stands for a number in code: a number, or a string."""
    if re.fullmatch(r"0|[1-9]\d*(?:\.\d+)?", new):
        return new
    return "'" + new.replace("'", "''") + "'" if syntax is Syntax.SQL else json.dumps(new)


def _cut(text: str, pieces: Sequence[Piece], span: Span, syntax: Syntax, secret: frozenset[str]) -> Iterator[_Part]:
    """Yields the parts of a span: those within pieces, and of the code between them what is replaced there."""
    index = bisect_right(pieces, span.start, key=lambda piece: piece.end)
    at = span.start
    while at < span.end:
        piece = pieces[index] if index < len(pieces) else None
        if piece is None or piece.start >= span.end:
            yield from _in_code(text, at, span.end, span, syntax, secret)
            return
        if at < piece.start:
            yield from _in_code(text, at, piece.start, span, syntax, secret)
        yield from _in_piece(text, max(at, piece.start), min(span.end, piece.end), piece, span, syntax)
        at, index = max(at, piece.end), index + 1


def _in_piece(text: str, start: int, end: int, piece: Piece, span: Span, syntax: Syntax) -> Iterator[_Part]:
    if piece.key and not (start == piece.start and end == piece.end):
        return  # a field whose name has such a word in it is a field
    if piece.style is Style.NUMBER:
        start, end = piece.start, piece.end
    elif piece.style in (Style.ESCAPED, Style.BYTES, Style.INTERPOLATED, Style.TEMPLATE, Style.REGEX):
        start, end = _whole_escapes(text, start, end, piece)
    elif piece.style is Style.DOUBLED:
        start, end = _whole_pairs(text, start, end, piece)
    if piece.style is Style.BLOCK:
        yield from _by_line(text, start, end, piece, span)
    elif start < end and any(map(str.isalnum, text[start:end])):
        if piece.style is Style.COMMENT or piece.style is Style.PLAIN or (syntax is Syntax.PYTHON and len(piece.quote) == 3):
            yield from _by_line(text, start, end, piece, span)
        else:
            yield start, end, piece, span


def _by_line(text: str, start: int, end: int, piece: Piece, span: Span) -> Iterator[_Part]:
    """Line by line, so that the lines and their indentation stay."""
    for match in re.compile(r"[^\s](?:[^\n]*[^\s])?").finditer(text, start, end):
        if any(map(str.isalnum, match.group())):
            yield *match.span(), piece, span


def _whole_escapes(text: str, start: int, end: int, piece: Piece) -> tuple[int, int]:
    """Moves the borders of a part out of escapes: an escaped line break or tab at the border stays outside, another escape is inside."""
    for match in _ESCAPE.finditer(text, piece.start, min(piece.end, end + 10)):
        blank = match.group() in _BLANK_ESCAPES
        if match.start() < start < match.end():
            start = match.end() if blank else match.start()
        if match.start() < end < match.end():
            end = match.start() if blank else min(match.end(), piece.end)
        if start == match.start() and blank:
            start = match.end()
    return start, max(start, end)


def _whole_pairs(text: str, start: int, end: int, piece: Piece) -> tuple[int, int]:
    for match in re.compile(re.escape(piece.quote) * 2).finditer(text, piece.start, piece.end):
        if match.start() < start < match.end():
            start = match.end()
        if match.start() < end < match.end():
            end = match.start()
    return start, max(start, end)


_CODE_NUMBER = re.compile(r"(?<![\w$.])\d[\d_]*(?:[ ./-]?\d+)*(?:\.\d+)?(?![\w$])")
_CODE_NAME = re.compile(r"[^\W\d][\w$]*")


def _in_code(text: str, start: int, end: int, span: Span, syntax: Syntax, secret: frozenset[str]) -> Iterator[_Part]:
    """Numbers are values; identifiers are replaced where they are secrets or known values."""
    if syntax in (Syntax.YAML, Syntax.CSV):
        return  # what is outside of their pieces is punctuation
    for match in _CODE_NUMBER.finditer(text, max(0, start - 40), min(len(text), end + 40)):
        if match.start() < end and start < match.end():
            yield *match.span(), None, span
    if syntax in (Syntax.JSON, Syntax.JSONL):
        return
    for match in _CODE_NAME.finditer(text, max(0, start - 80), min(len(text), end + 80)):
        inside = match.start() < end and start < match.end()
        if inside and not keyword.iskeyword(match.group()) and (canonical(match.group()) in secret or canonical(text[start:end]) in secret):
            yield *match.span(), None, span


def _canonical_known(known: Mapping[str, Sequence[str]]) -> frozenset[str]:
    return frozenset(canonical(value) for values in known.values() for value in values)


def _applied(text: str, edits: Sequence[_Edit]) -> str:
    made: list[str] = []
    at = 0
    for edit in edits:
        made += (text[at : edit.start], edit.put)
        at = edit.end
    return "".join([*made, text[at:]])


# CSV --------------------------------------------------------------------------------------------------------------------------------------------------------


@final
@dataclass(frozen=True, slots=True)
class _Table:
    """Cells of every row, and the names of the columns; `head` is 1 where the first row has the names."""

    rows: list[list[Piece]]
    names: list[str]
    head: int

    def __repr__(self) -> str:
        return f"<table of {len(self.rows)} rows>"


def _csv(text: str) -> _Table:
    first = text.partition("\n")[0]
    delimiter = max(",;\t|", key=lambda mark: len(re.sub(r'"[^"]*"', "", first).split(mark)))
    rows: list[list[Piece]] = [[]]
    at = 0
    while at <= len(text):
        quoted = text.startswith('"', at)
        if quoted:
            end = _end_of_cell(text, at + 1)
            rows[-1].append(Piece(at + 1, end, Style.DOUBLED, '"'))
            end += 1
        else:
            end = min((place for mark in (delimiter, "\n", "\r") if (place := text.find(mark, at)) >= 0), default=len(text))
            rows[-1].append(Piece(at, end, Style.CELL, delimiter))
        if text.startswith("\r\n", end):
            end += 1
        if text[end : end + 1] in ("\n", "\r"):
            rows.append([])
        at = end + 1
        if at == len(text) and text[end : end + 1] in ("\n", "\r", ""):
            break
    rows = [row for row in rows if row]
    names = [text[cell.start : cell.end].strip() for cell in rows[0]] if rows else []
    head = 1 if len(rows) > 1 and all(name and not re.search(r"\d{3}|@", name) for name in names) and len(set(names)) == len(names) else 0
    return _Table(rows, names if head else [f"column {number}" for number in range(1, len(names) + 1)], head)


def _end_of_cell(text: str, at: int) -> int:
    while (at := text.find('"', at)) >= 0 and text.startswith('""', at):
        at += 2
    return at if at >= 0 else len(text)


def _pieces_of(table: _Table) -> list[Piece]:
    return [cell for row in table.rows[table.head :] for cell in row]


_BATCH_CHARS = MAX_CHARS // 8


def _spans_of_table(text: str, table: _Table, policy: Policy, known: Mapping[str, Sequence[str]]) -> list[Span]:
    """Finds each cell's identifiers with its column's name as context, then what columns are."""
    found: list[Span] = []
    columns: dict[str, list[Piece]] = defaultdict(list)
    batch: list[tuple[str, Piece]] = []
    size = 0
    for row in table.rows[table.head :]:
        named = [(table.names[place] if place < len(table.names) else "", cell) for place, cell in enumerate(row)]
        for name, cell in named:
            columns[name].append(cell)
        batch += named
        size += sum(len(name) + cell.end - cell.start + 3 for name, cell in named)
        if size > _BATCH_CHARS:
            found += _spans_of_cells(text, batch, policy, known)
            batch, size = [], 0
    found += _spans_of_cells(text, batch, policy, known)
    return _with_columns(text, columns, found, policy)


def _spans_of_cells(text: str, cells: Sequence[tuple[str, Piece]], policy: Policy, known: Mapping[str, Sequence[str]]) -> list[Span]:
    lines, places, at = [], [], 0
    for name, cell in cells:
        lines.append(f"{name}: {text[cell.start : cell.end]}\n")
        places.append(at + len(name) + 2)
        at += len(lines[-1])
    found = []
    for span in policies.spans_in("".join(lines), policy, known):
        index = max(0, bisect_right(places, span.start) - 1)
        while index < len(cells) and places[index] < span.end:
            cell, place = cells[index][1], places[index]
            start, end = max(span.start, place), min(span.end, place + cell.end - cell.start)
            if start < end:
                found.append(Span(cell.start + start - place, cell.start + end - place, span.label, span.score))
            index += 1
    return found
