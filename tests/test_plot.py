"""A curve that a browser can draw."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from discreet.plot import curve_svg


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
