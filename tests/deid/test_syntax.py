"""Source code and tables come out in the syntax they came in, and without the values."""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import shutil
import subprocess
import warnings

import esprima
import pytest
import sqlglot
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from discreet.deid import syntax
from discreet.deid.operators import Operator
from discreet.deid.patterns import Label
from discreet.deid.policy import BUILTIN, Channel, Names, Policy
from discreet.deid.syntax import Syntax, column_label, of_file, redact
from discreet.errors import ConfigInvalid, OperationFailed, RequestInvalid
from discreet.keys import Key

KEY = Key(bytes(32))
VALUES = {"mail": "aurelia.quist@mail.example.org", "ssn": "536-90-4399", "phone": "212-555-0147", "date": "2024-03-05", "person": "Dr. Kelly Fuller"}
LEFT = re.compile("quist|90-4399|555-0147|2024-03-05|Fuller", re.IGNORECASE)
HARD = Policy(name="hard", channel=Channel.TRAINING, operators=dict.fromkeys(Label, Operator.MASK))
POLICIES = [BUILTIN["label"], BUILTIN["surrogate"], BUILTIN["redact"], HARD]


def parse(text: str, kind: Syntax) -> object:
    """Reads a text with somebody else's parser; raises where it is not valid."""
    if kind is Syntax.PYTHON:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SyntaxWarning)
            warnings.simplefilter("error", DeprecationWarning)
            return ast.parse(text)
    if kind is Syntax.JSON:
        return json.loads(text)
    if kind is Syntax.JSONL:
        return [json.loads(line) for line in text.splitlines()]
    if kind is Syntax.YAML:
        return list(yaml.safe_load_all(text))
    if kind is Syntax.SQL:
        return sqlglot.parse(text, read="postgres", error_level=sqlglot.ErrorLevel.RAISE)
    if kind is Syntax.JAVASCRIPT:
        return esprima.parseScript(text)
    return list(csv.reader(io.StringIO(text), strict=True))


PYTHON = '''# for Dr. Kelly Fuller, 212-555-0147
ssn = 536904399
def kelly_fuller_report(a, b):
    """Written by Dr. Kelly Fuller.
    On 2024-03-05."""
    x = f"Dear {a['name']!r:>{b}}, call 212-555-0147 {{now}} or {a["b"] if 0 else 'Dr. Kelly Fuller'}" if 0 else rf"{b}\\d 212-555-0147"
    y, z = r"\\d+ Dr. Kelly Fuller", b"aurelia.quist@mail.example.org"
    return "First\\nDr. Kelly Fuller\\t" + 'said: Dr. Kelly Fuller\\'s' + a @ b
'''.replace("{a[\"b\"] if 0 else 'Dr. Kelly Fuller'}", "{b}")
JAVASCRIPT = """// for Dr. Kelly Fuller
const re = /Dr. Kelly Fuller\\/[/]x/g, a = 4 / 2, b = a / 536904399;
const s = `Dear ${name}, call 212-555-0147 ${f(`Dr. Kelly Fuller ${"212-555-0147"}`)}`;
/* ssn 536-90-4399 */ let phone = 2125550147; f('Dr. Kelly Fuller\\'s', "aurelia.quist@mail.example.org");
"""
SQL = """-- for Dr. Kelly Fuller
INSERT INTO people (name, ssn, mail) VALUES ('Dr. Kelly Fuller''s', 536904399, 'aurelia.quist@mail.example.org'), ('x', '536-90-4399', NULL);
/* 212-555-0147 */ SELECT * FROM visits WHERE seen = '2024-03-05' AND note = $$Dr. Kelly Fuller$$;
"""
JSON = """{"name": "Dr. Kelly Fuller", "ssn": 536904399, "patient_name": "Xqzz Wvbt", "visits": [{"date": "2024-03-05", "phone": "212-555-0147",
 "note": "Seen by\\nDr. Kelly Fuller\\tfor \\u0041", "ok": true, "n": [1, -2.5e3]}], "aurelia.quist@mail.example.org": 1, "b.lee@mail.example.org": 2}"""
YAML = """# for Dr. Kelly Fuller
patient: Dr. Kelly Fuller
phones: [212-555-0147, "212-555-0147"]
ssn: 536-90-4399
seen: 2024-03-05
note: |
  Seen by Dr. Kelly Fuller on 2024-03-05.
    Call 212-555-0147.
more: >-
  Dr. Kelly Fuller
people:
  - Dr. Kelly Fuller
  - name: 'It''s Dr. Kelly Fuller'
    mail: aurelia.quist@mail.example.org
  - {name: Dr. Kelly Fuller, mail: aurelia.quist@mail.example.org}
  - &anchor !!str 212-555-0147
long: Seen by Dr. Kelly Fuller and
  then by Dr. Kelly Fuller too
version: 1.2.3
---
- *x
""".replace("---\n- *x\n", "")
CSV = 'id,patient_name,phone,note,n\r\n1,"Fuller, Kelly",212-555-0147,"Seen ""quickly"" by Dr. Kelly Fuller",45\r\n2,Xqzz Wvbt,2125550148,ok,\r\n3,"",,"two\r\nlines",7\r\n'
TEXTS = {
    Syntax.PYTHON: PYTHON, Syntax.JAVASCRIPT: JAVASCRIPT, Syntax.SQL: SQL, Syntax.JSON: JSON, Syntax.JSONL: JSON.replace("\n", "") + "\n" + '{"a": "212-555-0147"}\n', Syntax.YAML: YAML, Syntax.CSV: CSV,
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("kind", TEXTS)
def test_what_parsed_still_parses_and_no_value_is_left(kind: Syntax, policy: Policy) -> None:
    parse(TEXTS[kind], kind)
    out = redact(TEXTS[kind], kind, policy, key=KEY)
    parse(out.text, kind)
    left = out.text.replace("kelly_fuller_report", "")
    assert not LEFT.search(left)
    assert not re.search(r"536904399|2125550147|Xqzz", out.text)
    assert all(0 <= span.start < span.end <= len(TEXTS[kind]) for span in out.spans)
    assert all(a.end <= b.start for a, b in zip(out.spans, out.spans[1:], strict=False))


def test_code_stays_but_for_what_is_a_value() -> None:
    out = redact(PYTHON, "python", "label").text
    assert "def kelly_fuller_report(a, b):" in out
    assert 'ssn = "[SSN]"' in out
    assert "+ a @ b" in out
    assert "{a['name']!r:>{b}}" in out
    assert "{{now}}" in out
    kept = redact(
        "x = lambda jordan, madison: jordan @ madison\nclass Austin(Base): pass\nv = 'release 1.2.3 of 3f2504e0-4f89-41d3-9a0c-0305e82c3301'\n",
        "python",
        "label",
    )
    assert kept.spans == ()


def test_known_values_and_secrets_go_from_identifiers_too() -> None:
    out = redact("quorndike = 1\ndef f(quorndike, zyra): return quorndike + zyra\n", "python", "label", known={"PERSON": ["Zyra", "Quorndike"]}).text
    assert "quorndike" not in out
    assert "zyra" not in out
    tree = ast.parse(out)
    assert len({a.arg for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for a in f.args.args}) == 2, "two names stay two"


def test_json_keeps_keys_order_numbers_and_two_identifying_keys_stay_two() -> None:
    before, after = json.loads(JSON), json.loads(redact(JSON, "json", "label").text)
    assert list(before)[:4] == list(after)[:4]
    assert len(after) == len(before)
    assert "[EMAIL]" in after
    assert after["visits"][0]["n"] == [1, -2.5e3]
    assert after["visits"][0]["ok"] is True
    assert after["patient_name"] == "[PERSON]", "a field is what its name says, whatever the detector thinks of the value"


def test_yaml_keeps_its_shape() -> None:
    (before,), (after,) = list(yaml.safe_load_all(YAML)), list(yaml.safe_load_all(redact(YAML, "yaml", "label").text))

    def shape(value: object) -> object:
        return {k: shape(v) for k, v in value.items()} if isinstance(value, dict) else [shape(v) for v in value] if isinstance(value, list) else "."

    assert shape(before) == shape(after)
    assert after["version"] == "1.2.3"
    assert after["note"].count("\n") == before["note"].count("\n")


def test_csv_keeps_rows_columns_quotes_and_line_ends() -> None:
    out = redact(CSV, "csv", "label").text
    before, after = parse(CSV, Syntax.CSV), parse(out, Syntax.CSV)
    assert [len(row) for row in before] == [len(row) for row in after]
    assert after[0] == before[0]
    assert out.count("\r\n") == CSV.count("\r\n")
    assert '"[PERSON]",[PHONE],"Seen ""quickly"" by Dr. [PERSON]",45' in out
    assert after[2] == ["2", "[PERSON]", "[PHONE]", "ok", ""]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters(delimiter: str) -> None:
    text = delimiter.join(["id", "email", "n"]) + "\n" + delimiter.join(["1", "aurelia.quist@mail.example.org", "2"]) + "\n"
    assert redact(text, "csv", "label").text.split("\n")[1] == delimiter.join(["1", "[EMAIL]", "2"])


def test_columns_are_classified_by_sampling() -> None:
    rows = "".join(f"{n},212-555-01{n:02d},{'abc' if n % 2 else 'def'}\n" for n in range(30)) + "30,ext 44 please,abc\n"
    out = redact("a,b,c\n" + rows, "csv", "label").text.strip().split("\n")
    assert {line.split(",")[1] for line in out[1:]} == {"[PHONE]"}, "also the one that is no number alone"
    assert {line.split(",")[2] for line in out[1:]} == {"abc", "def"}
    assert column_label("b", ["PHONE"] * 6 + [""] * 4) is Label.PHONE
    assert column_label("b", ["PHONE"] * 5 + [""] * 5) is None
    assert column_label("b", ["PHONE"] * 4) is None
    assert column_label("dateOfBirth", []) is Label.DATE
    assert column_label("product_name", []) is None


def test_what_does_not_parse_is_text_and_is_redacted_all_the_same() -> None:
    for broken, kind in (
        ("def f(:\n Dr. Kelly Fuller called 212-555-0147", "python"),
        ('{"a": Dr. Kelly Fuller', "json"),
        ("x = '\x00' # Dr. Kelly Fuller", "python"),
    ):
        assert "Fuller" not in redact(broken, kind, "label").text
    deep = "[" * 100_000
    assert redact(deep, "json", "label").text == deep
    assert redact("(" * 20_000, "python", "label").text.startswith("((")


def test_mysql_escapes_and_unterminated_pieces() -> None:
    out = redact("INSERT INTO t VALUES ('Dr. Kelly Fuller\\'s', 'aurelia.quist@mail.example.org')", "sql", "label").text
    assert out == "INSERT INTO t VALUES ('Dr. [PERSON]\\'s', '[EMAIL]')" or "Fuller" not in out
    for kind, text in (
        ("sql", "SELECT 'Dr. Kelly Fuller"),
        ("javascript", "f(`Dr. Kelly Fuller ${"),
        ("yaml", 'a: "Dr. Kelly Fuller'),
        ("csv", 'a,b\n1,"Dr. Kelly Fuller'),
    ):
        assert "Fuller" not in redact(text, kind, "label").text


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestInvalid, match="syntax"):
        redact("x", "cobol", "label")
    with pytest.raises(ConfigInvalid, match="label"):
        redact("x", "json", "lable")
    monkeypatch.setattr(syntax, "_encoded", lambda value, *_, **__: '"' + value)
    with pytest.raises(OperationFailed) as caught:
        redact('{"a": "Dr. Kelly Fuller"}', "json", "label")
    assert "Fuller" not in str(caught.value)


def test_syntax_by_name() -> None:
    assert [of_file(name) for name in ("a.py", "B.JSON", "c.yml", "d.tsv", "e.txt", "Makefile", "f.jsonl")] == [
        "python",
        "json",
        "yaml",
        "csv",
        "text",
        "text",
        "jsonl",
    ]


word = st.sampled_from(
    [
        "total",
        "Dr. Kelly Fuller",
        "aurelia.quist@mail.example.org",
        "212-555-0147",
        "SSN 536-90-4399",
        "2024-03-05",
        "it's",
        'say "x"',
        "a\\b",
        "{x}",
        "#",
        "${y}",
        ": ",
        "%",
        "é",
        "/*",
        "--",
        "\n",
    ]
)
phrase = st.lists(word, min_size=1, max_size=5).map(" ".join)
flat = phrase.map(lambda text: text.replace("\n", " "))


def clean(text: str) -> bool:
    return not LEFT.search(text)


def check(text: str, kind: Syntax, policy: Policy) -> None:
    out = redact(text, kind, policy, key=KEY).text
    parse(out, kind)
    assert clean(out)


@settings(max_examples=60, deadline=None)
@given(st.lists(phrase, min_size=1, max_size=4), st.sampled_from(POLICIES))
def test_any_python_json_and_javascript_strings(values: list[str], policy: Policy) -> None:
    check("\n".join(f"v{n} = {value!r}  # {value!a}" for n, value in enumerate(values)) + "\n", Syntax.PYTHON, policy)
    check(json.dumps({f"k{n}": [value, {"x": value}] for n, value in enumerate(values)}, indent=1), Syntax.JSON, policy)
    check(json.dumps(values, ensure_ascii=False), Syntax.JSON, policy)
    check("".join(f"var v{n} = {json.dumps(value)}; // {json.dumps(value)}\n" for n, value in enumerate(values)), Syntax.JAVASCRIPT, policy)


@settings(max_examples=60, deadline=None)
@given(st.lists(flat, min_size=1, max_size=4), st.sampled_from(POLICIES))
def test_any_sql_yaml_and_csv_values(values: list[str], policy: Policy) -> None:
    quoted = ", ".join("'" + value.replace("'", "''").replace("\\", "/") + "'" for value in values)
    check(f"SELECT {quoted} FROM t;", Syntax.SQL, policy)
    check(yaml.safe_dump({f"k{n}": value for n, value in enumerate(values)}, allow_unicode=True), Syntax.YAML, policy)
    check(yaml.safe_dump([values, {"a": values}], default_flow_style=True, width=1000, allow_unicode=True), Syntax.YAML, policy)
    check(yaml.safe_dump({"a": [{"b": value} for value in values]}, default_style='"', allow_unicode=True), Syntax.YAML, policy)
    sink = io.StringIO()
    csv.writer(sink).writerows([[f"c{n}" for n in range(len(values))], values, values])
    check(sink.getvalue(), Syntax.CSV, policy)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_node_accepts_the_javascript() -> None:
    out = redact(JAVASCRIPT, "javascript", "surrogate", key=KEY).text
    assert subprocess.run(["node", "--check", "-"], input=out, text=True, capture_output=True, check=False).returncode == 0


def test_our_own_source_still_parses() -> None:
    from pathlib import Path

    source = Path(syntax.__file__).read_text(encoding="utf-8")
    rules = Policy(name="rules", channel=Channel.TRAINING, operators=dict.fromkeys(Label, Operator.LABEL), names=Names.RULES)
    ast.parse(redact(source, "python", rules).text)
