"""The plot is a picture that any browser opens."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from thinkserve.steering.calibrate import Point
from thinkserve.steering.plot import svg


def test_length_and_accuracy_are_drawn_against_the_scale() -> None:
    """Two curves with a point per scale, the choice, the dashed lines of what asking gives; names are escaped."""
    points = [Point(1.0, 40, 30, 0.8, 1.0), Point(0.0, 100, 90, 0.9, 1.0), Point(0.5, 60, 50, 0.9, 1.0)]

    drawn = svg("a <b> & c", points, points[2], Point(0, 50, 40, 0.85, 1.0))
    root = ET.fromstring(drawn)  # noqa: S314 - written by us

    lines = [line.attrib for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    curves = [line["points"].split() for line in lines if len(line["points"].split()) == 3]
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert 2 == len(curves)
    assert [["56.0", "320.0", "584.0"]] * 2 == [[point.split(",")[0] for point in curve] for curve in curves]
    assert [float(point.split(",")[1]) for point in curves[0]] == sorted(float(p.split(",")[1]) for p in curves[0])
    assert 3 == sum("stroke-dasharray" in line for line in lines)
    assert {"a <b> & c", "0", "0.5", "1"} <= set(texts)
