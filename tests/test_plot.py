"""A curve that a browser can draw."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from discreet import report
from discreet.errors import ConfigInvalid
from discreet.plot import curve_svg, save


def test_every_point_stands_where_its_figures_say() -> None:
    root = ElementTree.fromstring(curve_svg([(1e-6, 4.0), (1e-4, 2.0), (1e-2, 1.0)], title="a < b", x_title="delta", y_title="epsilon"))
    line = root.find("{http://www.w3.org/2000/svg}polyline")
    assert line is not None
    assert line.get("points") == "64.0,24.0 306.0,162.0 548.0,231.0"
    assert {"1e-6", "1e-2", "4", "delta", "epsilon"} <= {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}


@pytest.mark.parametrize("points", [[], [(1.0, 1.0)], [(0.0, 1.0), (1.0, 1.0)], [(0.1, math.inf), (1.0, 1.0)]])
def test_what_cannot_be_drawn_is_refused(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="two points"):
        curve_svg(points, title="", x_title="", y_title="")


def test_a_chart_of_the_report_becomes_a_picture_of_either_kind(tmp_path: Path) -> None:
    lines = [("claim", "claim", [[0, 0], [0.2, 0.9], [1, 1]]), ("found", "private", [[0.1, 0.2]])]
    chart = report._chart("Attack", "false", "true", lines, unit_square=True)
    assert chart is not None
    for name in ("a.png", "a.svg"):
        save(chart, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "a.svg").read_text()
    assert ElementTree.fromstring(drawn.split("?>", 1)[1].split(">", 1)[1]) is not None
    assert "Attack" in drawn
    with pytest.raises(ConfigInvalid, match="ends in"):
        save(chart, tmp_path / "a.pdf")
