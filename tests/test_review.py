"""The review page: nothing in it can reach a network or end its own script; its logic marks, strikes, undoes and exports; a browser shows it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from discreet import review
from discreet.deid.calibrate import samples_of
from discreet.deid.detect import Span
from discreet.deid.patterns import Label
from discreet.errors import RequestInvalid

TEXT = "Dr. Kelly Fuller 👩‍⚕️ saw Zyra\x00 </script><script>alert(1)</script> @DATA@ \u2028 in Ashville."
SPANS = [Span(4, 16, "PERSON", 0.9), Span(TEXT.index("Ashville"), TEXT.index("Ashville") + 8, "LOCATION", 0.8)]


def data_of(page: str) -> Any:
    return json.loads(page.split('id="data">')[1].split("</script>")[0])


def test_the_page_holds_the_texts_and_nothing_can_end_its_script() -> None:
    page = review.page([(TEXT, SPANS), ("plain", [])])
    assert page.count("</script>") == 2
    assert "alert(1)</script>" not in page
    data = data_of(page)
    assert data["documents"][0]["text"] == TEXT
    assert data["documents"][0]["spans"] == [{"start": s.start, "end": s.end, "label": s.label} for s in SPANS]
    assert set(data["labels"]) == {label.value for label in Label} - {"PLACEHOLDER"}


def test_the_page_asks_nobody_for_anything() -> None:
    page = review.page([(TEXT, SPANS)])
    assert not re.search(
        r"https?://|<link|<img|src=|@import|url\(|fetch\(|XMLHttp|WebSocket|sendBeacon|localStorage|innerHTML|eval\(", page.replace(TEXT, "")
    )
    script = page.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_too_much_or_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(review, "MAX_CHARS", 10)
    for documents in ([], [("x" * 11, [])]):
        with pytest.raises(RequestInvalid):
            review.page(documents)


LOGIC = """
const check = (name, found, wanted) => { if (JSON.stringify(found) !== JSON.stringify(wanted)) { console.log(name, JSON.stringify(found)); process.exit(1); } };
const data = JSON.parse(require("fs").readFileSync(0, "utf8"));
const review = new Review(data);
check("nothing is exported before it is ticked", review.lines(), "");
review.toggle(0, 4);
check("struck", review.documents[0].spans[0].state, "removed");
const zyra = data[0].text.indexOf("Zyra");
const place = Array.from(data[0].text.slice(0, zyra)).length;
check("a word by a place in it", review.word(0, place + 2), [place, place + 4]);
check("added", review.add(0, place - 1, place + 4, "PERSON"), true);
check("white space is no mark", review.add(0, place - 1, place, "PERSON"), false);
check("tally", review.tally(), { reviewed: 0, documents: 2, found: 1, added: 1, removed: 1 });
review.toggle(0, place);
check("an added mark goes", review.tally().added, 0);
check("undone", [review.undo(), review.tally().added], [0, 1]);
review.add(0, place, place + 2, "ID");
check("a mark over another takes its place", review.documents[0].spans.filter((s) => s.start === place), [{ start: place, end: place + 2, label: "ID", state: "added" }]);
review.undo();
review.review(0, true);
review.review(1, true);
review.undo();
process.stdout.write(review.lines());
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_marks_are_struck_added_undone_and_exported_as_samples() -> None:
    script = (resources.files("discreet") / "templates" / "review.js").read_text(encoding="utf-8")
    documents = data_of(review.page([(TEXT, SPANS), ("plain", [])]))["documents"]
    done = subprocess.run(["node", "-e", script + LOGIC], input=json.dumps(documents), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sample,) = samples_of([json.loads(line) for line in done.stdout.strip("\n").split("\n")])
    assert sample.text == TEXT
    assert [(TEXT[start:end], label) for start, end, label in sample.gold] == [("Zyra", Label.PERSON), ("Ashville", Label.LOCATION)]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromedriver") is None, reason="needs chromedriver")
def test_a_person_can_do_it_in_a_browser(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(review.page([(TEXT, SPANS), ("A second text by Kelly.", [])]), encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def call(method: str, path: str, body: object = None) -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", None if body is None else json.dumps(body).encode(), method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def click(element: Any, x: int = 0) -> None:
        place = {"type": "pointerMove", "duration": 0, "x": x, "y": 0, "origin": element}
        press = [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        call("POST", f"{session}/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [place, *press]}]})

    def one(selector: str) -> Any:
        return call("POST", f"{session}/element", {"using": "css selector", "value": selector})

    def run(script: str) -> Any:
        return call("POST", f"{session}/execute/sync", {"script": script, "args": []})

    try:
        for _ in range(100):
            try:
                call("GET", "/status")
                break
            except OSError:
                time.sleep(0.1)
        preferences = {"download.default_directory": str(tmp_path)}
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,700"], "prefs": preferences}
        made = call("POST", "/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}})
        session = f"/session/{made['sessionId']}"
        call("POST", f"{session}/url", {"url": (tmp_path / "page.html").as_uri()})
        click(one("mark[data-label=LOCATION]"))
        assert run("return review.tally().removed") == 1
        place = run(
            "const r = document.createRange(); const n = document.querySelectorAll('.text')[1].firstChild.firstChild; r.setStart(n, 17); r.setEnd(n, 22); const b = r.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]"
        )
        press = [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}]
        move = {"type": "pointerMove", "duration": 0, "x": round(place[0]), "y": round(place[1]), "origin": "viewport"}
        call("POST", f"{session}/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move, *press]}]})
        assert run("return review.documents[1].spans") == [{"start": 17, "end": 22, "label": "PERSON", "state": "added"}]
        boxes = call("POST", f"{session}/elements", {"using": "css selector", "value": "input[type=checkbox]"})
        for box in boxes:
            click(box)
        click(one("#export"))
        for _ in range(100):
            if (tmp_path / "labels.jsonl").exists():
                break
            time.sleep(0.1)
        samples = samples_of([json.loads(line) for line in (tmp_path / "labels.jsonl").read_text(encoding="utf-8").strip("\n").split("\n")])
        assert [[s.text[start:end] for start, end, _ in s.gold] for s in samples] == [["Kelly Fuller"], ["Kelly"]]
        assert [entry for entry in call("POST", f"{session}/se/log", {"type": "browser"}) if entry["level"] == "SEVERE"] == []
        (tmp_path / "seen.png").write_bytes(base64.b64decode(call("GET", f"{session}/screenshot")))
        call("DELETE", session)
    finally:
        driver.terminate()
        driver.wait(timeout=20)
