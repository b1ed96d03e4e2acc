"""One curve as one SVG file: points -> text, with no library, script or font of its own, so that it opens wherever a person looks.

Source: SVG 1.1 (W3C). Does not cover: charts of the report, which are part of its page (`report.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 548, 24, 300


def curve_svg(points: Sequence[tuple[float, float]], *, title: str, x_title: str, y_title: str) -> str:
    """Draws points joined by lines over a logarithmic x axis, with a tick at every power of ten.

    Args:
        points: (x > 0, y >= 0), all finite, at least two different x.

    Raises:
        ValueError: when a point is out of range, or all have one x.
    """
    if not all(x > 0 and y >= 0 and math.isfinite(x) and math.isfinite(y) for x, y in points) or len({x for x, _ in points}) < 2:
        raise ValueError("Expected at least two points with x > 0 and y >= 0, all finite.")
    logs = [math.log10(x) for x, _ in points]
    first, last, top = min(logs), max(logs), max(y for _, y in points) or 1.0

    def place(log_x: float, y: float) -> tuple[float, float]:
        return _LEFT + (_RIGHT - _LEFT) * (log_x - first) / (last - first), _BOTTOM - (_BOTTOM - _TOP) * y / top

    path = " ".join("{:.1f},{:.1f}".format(*place(log_x, y)) for log_x, (_, y) in zip(logs, points, strict=True))
    across = [(place(tick, 0)[0], f"1e{tick}") for tick in range(math.ceil(first - 1e-9), math.floor(last + 1e-9) + 1)]
    up = [(place(first, top * part / 4)[1], f"{top * part / 4:.3g}") for part in range(5)]
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 560 352" font-family="sans-serif" font-size="12" role="img">',
        f"<title>{escape(title)}</title>",
        '<rect width="560" height="352" fill="white"/>',
        *(f'<line x1="{_LEFT}" x2="{_RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ccc"/>' for y, _ in up),
        *(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>' for y, label in up),
        *(f'<text x="{x:.1f}" y="{_BOTTOM + 18}" text-anchor="middle">{label}</text>' for x, label in across),
        f'<polyline points="{path}" fill="none" stroke="#1f5fa8" stroke-width="2"/>',
        f'<text x="306" y="340" text-anchor="middle">{escape(x_title)}</text>',
        f'<text transform="translate(16 162) rotate(-90)" text-anchor="middle">{escape(y_title)}</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"
