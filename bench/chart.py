"""A line chart as SVG text: axes with round ticks, one colour per series, a legend. No dependencies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 720, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 170, 16, 52
COLOURS = (
    "#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#475569", "#a16207", "#be123c", "#14b8a6", "#1e3a8a", "#f472b6",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Series:
    """Points in order of x; a single one is drawn as a mark."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Axis:
    """Maps values from `low` to `high` onto pixels `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """The pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values that cover `low` to `high`."""
    if high <= low:
        low, high = low - 0.5, low + 0.5
    raw = (high - low) / count
    unit = 10.0 ** floor(log10(raw))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
    first = floor(low / step)
    return [round(step * index, 10) for index in range(first, ceil(high / step) + 1)]


def chart(series: Sequence[Series], x_name: str, y_name: str) -> str:
    """The chart; series without points are left out. ValueError when there are none."""
    drawn = [each for each in series if each.points]
    if not drawn:
        raise ValueError("nothing to draw")
    xs, ys = zip(*(point for each in drawn for point in each.points), strict=True)
    x_ticks, y_ticks = ticks(min(0.0, *xs), max(xs)), ticks(min(ys), max(ys))
    x_axis = Axis(x_ticks[0], x_ticks[-1], LEFT, WIDTH - RIGHT)
    y_axis = Axis(y_ticks[0], y_ticks[-1], HEIGHT - BOTTOM, TOP)
    size, middle = f'width="{WIDTH}" height="{HEIGHT}"', (TOP + HEIGHT - BOTTOM) / 2
    view = f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12"'
    turned = f'transform="rotate(-90 16 {middle})" x="16" y="{middle}" text-anchor="middle" fill="#111"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {view}>',
        f'<rect {size} fill="white"/>',
        *_grid(x_axis, y_axis, x_ticks, y_ticks),
        _text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 12, x_name, "middle"),
        f"<text {turned}>{escape(y_name)}</text>",
    ]
    for number, each in enumerate(drawn):
        colour, y = COLOURS[number % len(COLOURS)], TOP + 14 + 20 * number
        parts += _line(each, x_axis, y_axis, colour)
        parts.append(f'<rect x="{WIDTH - RIGHT + 16}" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(WIDTH - RIGHT + 32, y, each.name, "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _grid(x_axis: Axis, y_axis: Axis, x_ticks: Sequence[float], y_ticks: Sequence[float]) -> list[str]:
    parts = []
    for tick in x_ticks:
        x = x_axis.at(tick)
        parts.append(f'<line x1="{x:.1f}" y1="{y_axis.start}" x2="{x:.1f}" y2="{y_axis.end}" stroke="#e5e7eb"/>')
        parts.append(_text(x, y_axis.start + 18, f"{tick:g}", "middle"))
    for tick in y_ticks:
        y = y_axis.at(tick)
        parts.append(f'<line x1="{x_axis.start}" y1="{y:.1f}" x2="{x_axis.end}" y2="{y:.1f}" stroke="#e5e7eb"/>')
        parts.append(_text(x_axis.start - 8, y + 4, f"{tick:g}", "end"))
    return parts


def _line(series: Series, x_axis: Axis, y_axis: Axis, colour: str) -> list[str]:
    places = [(x_axis.at(x), y_axis.at(y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    marks = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>' for x, y in places]
    return [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>', *marks]


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#111">{escape(text)}</text>'
