"""Pictures as files: one curve as SVG text with no library, and the report's charts as PNG or SVG for slides and papers (extra: report).

`curve_svg` opens wherever a person looks. `save` draws a chart that `report.charts` has laid out already, line for line what its page shows.

Source: SVG 1.1 (W3C). Does not cover: what is in a chart (`report.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from io import BytesIO
from pathlib import Path
from typing import Protocol

from discreet.errors import ConfigInvalid, missing_extra
from discreet.store import write_atomically

_STYLES = {"private": ("#0a6b62", "-"), "control": ("#b4481c", "-"), "claim": ("#1d2730", "--"), "chance": ("#8a979f", ":")}
_BOX = (560.0, 276.0)
_FORBIDDEN = "#a31621"

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


class Series(Protocol):
    """A line of a chart: its label, its style, and "x,y x,y" in the chart's box; without a path, its dots."""

    @property
    def label(self) -> str: ...
    @property
    def style(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def dots(self) -> Sequence[tuple[float, float]]: ...


class Chart(Protocol):
    """A chart as `report.charts` lays it out, in a box of 560 x 252 with y downwards."""

    @property
    def title(self) -> str: ...
    @property
    def x_title(self) -> str: ...
    @property
    def y_title(self) -> str: ...
    @property
    def series(self) -> Sequence[Series]: ...
    @property
    def x_ticks(self) -> Sequence[tuple[float, str]]: ...
    @property
    def y_ticks(self) -> Sequence[tuple[float, str]]: ...
    @property
    def forbidden(self) -> str: ...


def save(chart: Chart, path: Path) -> None:
    """Writes a chart as one picture.

    Args:
        path: ends in .png or .svg.

    Raises:
        MissingExtra: when matplotlib is not installed.
        ConfigInvalid: when the suffix is another one.
        StorageFull: when the disk is full.
    """
    if path.suffix not in (".png", ".svg"):
        raise ConfigInvalid("a picture that ends in .png or .svg", value=path.suffix)
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing_extra("report", "matplotlib") from error
    figure = Figure(figsize=(_BOX[0] / 72, _BOX[1] / 72), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, _BOX[0]), ylim=(_BOX[1] - 24, -24))
    axes.axis("off")
    axes.text(_BOX[0] / 2, -10, chart.title, ha="center", fontsize=9)
    for y, label in chart.y_ticks:
        axes.plot([56, 548], [y, y], color="#d5dce1", linewidth=0.6)
        axes.text(50, y, label, ha="right", va="center", fontsize=7)
    for x, label in chart.x_ticks:
        axes.text(x, 230, label, ha="center", fontsize=7)
    if chart.forbidden:
        axes.fill(*zip(*_points(chart.forbidden), strict=True), color=_FORBIDDEN, alpha=0.08, linewidth=0)
    for series in chart.series:
        colour, dashes = _STYLES[series.style]
        if series.path:
            marker = "o" if len(series.dots) == 2 and series.style == "private" else ""
            axes.plot(
                *zip(*_points(series.path), strict=True),
                color=colour,
                linestyle=dashes,
                linewidth=1.3,
                marker=marker,
                markersize=4,
                label=series.label,
            )
        else:
            axes.plot(*zip(*series.dots, strict=True), "o", color=colour, markersize=4, label=series.label)
    axes.text(302, 246, chart.x_title, ha="center", fontsize=8)
    axes.text(12, 114, chart.y_title, rotation=90, ha="center", va="center", fontsize=8)
    axes.legend(loc="lower right", bbox_to_anchor=(0.98, 0.16), fontsize=7, framealpha=0.9)
    drawn = BytesIO()
    figure.savefig(drawn, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None)
    write_atomically(path, drawn.getvalue())


def _points(path: str) -> list[tuple[float, float]]:
    """The corners of "x,y x,y"."""
    return [(float(x), float(y)) for x, y in (corner.split(",") for corner in path.split())]
