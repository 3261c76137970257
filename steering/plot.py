"""Length and accuracy against strength, drawn without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from thinkserve.steering.calibrate import Point

WIDTH, HEIGHT, MARGIN = 640, 360, 56
FONT = 'font-family="sans-serif" font-size="12"'
LENGTH, RIGHT = "#1f6fb4", "#c2571a"


def svg(title: str, points: Sequence[Point], chosen: Point, asked: Point | None = None) -> str:
    """An SVG document: tokens on the left axis, accuracy on the right, dashed what asking for brevity gives."""
    ordered = sorted(points, key=lambda point: point.scale)
    top = max(point.tokens for point in [*ordered, *([asked] if asked else [])]) * 1.05
    end = max(ordered[-1].scale, 1e-9)

    def x(scale: float) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * scale / end

    def y(share: float) -> float:
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * share

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" {FONT}>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(WIDTH / 2, 24, title, "black", "middle"),
        _text(WIDTH / 2, HEIGHT - 12, "scale", "black", "middle"),
        _text(8, MARGIN - 14, "mean tokens", LENGTH, "start"),
        _text(WIDTH - 8, MARGIN - 14, "accuracy", RIGHT, "end"),
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(_line([(MARGIN, y(share)), (WIDTH - MARGIN, y(share))], "#dddddd"))
        parts.append(_text(MARGIN - 6, y(share) + 4, f"{top * share:.0f}", LENGTH, "end"))
        parts.append(_text(WIDTH - MARGIN + 6, y(share) + 4, f"{100 * share:.0f}%", RIGHT, "start"))
    parts += [_text(x(point.scale), HEIGHT - MARGIN + 18, f"{point.scale:g}", "black", "middle") for point in ordered]
    parts.append(_line([(x(chosen.scale), y(0)), (x(chosen.scale), y(1))], "#444444", "2 3"))
    if asked:
        for share, colour in ((asked.tokens / top, LENGTH), (asked.accuracy, RIGHT)):
            parts.append(_line([(MARGIN, y(share)), (WIDTH - MARGIN, y(share))], colour, "6 4"))
    parts.append(_line([(x(p.scale), y(p.tokens / top)) for p in ordered], LENGTH))
    parts.append(_line([(x(p.scale), y(p.accuracy)) for p in ordered], RIGHT))
    return "\n".join([*parts, "</svg>", ""])


def _line(points: Sequence[tuple[float, float]], colour: str, dashes: str = "") -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dashed = f' stroke-dasharray="{dashes}"' if dashes else ""
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashed}/>'


def _text(x: float, y: float, text: str, colour: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" text-anchor="{anchor}">{escape(text)}</text>'
