"""A page on which a person sees what was found, marks what was missed and strikes out what is none; it exports samples for `discreet redact calibrate`.

One file without a network: script and style are inside, the content policy names the script by its digest and forbids everything else. Offsets that the page exports are code points of the text, as everywhere.

Does not cover: two people on one page; keeping a half-done review (the page keeps nothing, because what it shows is the original text).
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources

from discreet.deid.detect import Span
from discreet.deid.patterns import Label
from discreet.errors import RequestInvalid

MAX_CHARS = 3_000_000
"""Most text that one page shows; a browser gets slow beyond."""


def page(documents: Sequence[tuple[str, Sequence[Span]]]) -> str:
    """Returns the page, as HTML.

    Args:
        documents: each text with its spans, sorted and disjoint.

    Raises:
        RequestInvalid: when there is no text, or more than `MAX_CHARS` characters together.
    """
    size = sum(len(text) for text, _ in documents)
    if not 0 < size <= MAX_CHARS:
        raise RequestInvalid(f"1 to {MAX_CHARS} characters of text to review", value=size, remedy="Take a sample.")
    data = {
        "labels": [label.value for label in Label if label is not Label.PLACEHOLDER],
        "documents": [{"text": text, "spans": [{"start": s.start, "end": s.end, "label": s.label} for s in spans]} for text, spans in documents],
    }
    home = resources.files("discreet") / "templates"
    script = (home / "review.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    inside = json.dumps(data, ensure_ascii=True).replace("<", "\\u003c")  # no text can end the script element that it stands in
    filled = (home / "review.html").read_text(encoding="utf-8").replace("@SCRIPT_HASH@", digest).replace("@SCRIPT@", script)
    return filled.replace("@DATA@", inside)
