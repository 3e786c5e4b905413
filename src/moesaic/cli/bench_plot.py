"""Tokens a second over batches, reached against bound, as one SVG file that stands alone."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from moesaic.telemetry.scale import short

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 760, 460, 64, 46, 190, 54
_COLORS = ("#0067a8", "#c8500a", "#00805c", "#a3458a", "#8a6d00", "#4b5560")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.grid{stroke:#e8e8e4}.bound{stroke-dasharray:5 4}"
    "text.title{font-size:15px;font-weight:600}text.tick{fill:#666;font-size:11px}"
)


class Point(NamedTuple):
    """Texts written at once; tokens a second of all: what is possible, what is reached (the median) and its range."""

    batch: int
    bound: float
    reached: float
    spread: tuple[float, float]


class Line(NamedTuple):
    """A model's points, in the order of their batches."""

    name: str
    points: Sequence[Point]


class _Axes(NamedTuple):
    """Both are logarithmic."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * _share(value, self.x_range)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * _share(value, self.y_range)


def draw(title: str, lines: Sequence[Line]) -> str:
    """The picture as text: for each model what is reached, with its range, and dashed what is possible."""
    points = [point for line in lines for point in line.points]
    batches, rates = (
        [point.batch for point in points],
        [rate for point in points for rate in (point.bound, *point.spread)],
    )
    axes = _Axes((min(batches) / 1.15, max(batches) * 1.15), (min(rates) / 1.3, max(rates) * 1.3))
    body = [*_grid(axes, sorted(set(batches)))]
    for number, line in enumerate(lines):
        body += _line(line, number, axes)
    middle = (LEFT + WIDTH - RIGHT) / 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="title" x="{LEFT}" y="24">{html.escape(title)}</text>'
        + "".join(body)
        + f'<text x="{middle}" y="{HEIGHT - 14}" text-anchor="middle">texts written at once</text>'
        f'<text transform="translate(16 {HEIGHT / 2}) rotate(-90)" text-anchor="middle">tokens a second, of all</text>'
        "</svg>\n"
    )


def _share(value: float, span: tuple[float, float]) -> float:
    low, high = map(math.log, span)
    return (math.log(value) - low) / (high - low)


def _grid(axes: _Axes, batches: Sequence[int]) -> list[str]:
    right, bottom, parts = WIDTH - RIGHT, HEIGHT - BOTTOM, []
    for batch in batches:
        at = axes.x(batch)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>'
            f'<text class="tick" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{batch}</text>'
        )
    low, high = axes.y_range
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for rate in (step * 10.0**decade for decade in decades for step in (1, 2, 5)):
        if low <= rate <= high:
            at = axes.y(rate)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
                f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{short(rate)}</text>'
            )
    return parts


def _line(line: Line, number: int, axes: _Axes) -> list[str]:
    color = _COLORS[number % len(_COLORS)]
    kinds = (("bound", [point.bound for point in line.points]), ("", [point.reached for point in line.points]))
    xs = [axes.x(point.batch) for point in line.points]
    parts = []
    for kind, rates in kinds:
        places = " ".join(f"{x:.1f},{axes.y(rate):.1f}" for x, rate in zip(xs, rates, strict=True))
        parts.append(f'<polyline class="{kind}" points="{places}" fill="none" stroke="{color}" stroke-width="2"/>')
    for x, point in zip(xs, line.points, strict=True):
        low, high = (axes.y(rate) for rate in point.spread)
        tip = f"{point.batch} texts: {short(point.reached)} of {short(point.bound)} tokens a second"
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{color}"/>'
            f'<circle cx="{x:.1f}" cy="{axes.y(point.reached):.1f}" r="4" fill="{color}"><title>{tip}</title></circle>'
        )
    at, y = WIDTH - RIGHT + 20, TOP + 10 + 44 * number
    name = html.escape(line.name)
    for kind, text, below in (("", f"{name}, reached", 0), ("bound", f"{name}, bound", 18)):
        parts.append(
            f'<line class="{kind}" x1="{at}" x2="{at + 22}" y1="{y + below - 4}" y2="{y + below - 4}" stroke="{color}" '
            f'stroke-width="2"/><text x="{at + 28}" y="{y + below}">{text}</text>'
        )
    return parts
