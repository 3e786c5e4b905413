"""A scatter plot that stands alone: one SVG file, no style sheet, no script."""

import html
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moesaic.telemetry.scale import short, ticks

WIDTH, LEAST_HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 880, 480, 68, 44, 260, 56
LEGEND_LINE = 21
_COLORS = ("#0067a8", "#c8500a", "#00805c", "#a3458a", "#8a6d00", "#4b5560")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.grid{stroke:#e8e8e4}"
    "text.title{font-size:15px;font-weight:600}text.tick{fill:#666;font-size:11px}"
    "text.number{font-weight:600;font-size:10px}"
)


class Dot(NamedTuple):
    """A mark: its name in the legend, and a point for every seed. `is_aside` draws it hollow."""

    name: str
    points: Sequence[tuple[float, float]]
    is_aside: bool = False


@dataclass(frozen=True)
class _Frame:
    """Where data goes: x by its logarithm."""

    xs: Sequence[float]
    ys: Sequence[float]
    height: int

    @property
    def right(self) -> int:
        return WIDTH - RIGHT

    @property
    def bottom(self) -> int:
        return self.height - BOTTOM

    def x(self, value: float) -> float:
        low, high = math.log10(min(self.xs)) - 0.1, math.log10(max(self.xs)) + 0.1
        return LEFT + (math.log10(value) - low) / (high - low) * (self.right - LEFT)

    def y(self, value: float) -> float:
        margin = 0.06 * (max(self.ys) - min(self.ys)) or 0.01
        low, high = min(self.ys) - margin, max(self.ys) + margin
        return TOP + (high - value) / (high - low) * (self.bottom - TOP)


def scatter(dots: Sequence[Dot], *, title: str, x_label: str, y_label: str) -> str:
    """The picture as text: x above 0 on a logarithmic axis, a numbered mark a name, a small one a point."""
    xs, ys = zip(*(point for dot in dots for point in dot.points), strict=True)
    frame = _Frame(xs, ys, max(LEAST_HEIGHT, TOP + LEGEND_LINE * len(dots) + 20))
    middle = (LEFT + frame.right) / 2
    body = [
        f'<text class="title" x="{LEFT}" y="24">{html.escape(title)}</text>',
        *_grid(frame),
        f'<text x="{middle}" y="{frame.height - 14}" text-anchor="middle">{html.escape(x_label)}</text>',
        f'<text transform="translate(16 {(TOP + frame.bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>",
        *(_mark(number, dot, frame) for number, dot in enumerate(dots, 1)),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{frame.height}" '
        f'viewBox="0 0 {WIDTH} {frame.height}"><style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        + "".join(body)
        + "</svg>\n"
    )


def _grid(frame: _Frame) -> list[str]:
    parts = []
    for y in ticks(min(frame.ys), max(frame.ys)):
        at = frame.y(y)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{frame.right}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>'
        )
    low, high = min(frame.xs), max(frame.xs)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for x in (step * 10.0**decade for decade in decades for step in (1, 2, 5)):
        if low / 1.25 <= x <= high * 1.25:
            at = frame.x(x)
            parts.append(
                f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{frame.bottom}"/>'
                f'<text class="tick" x="{at:.1f}" y="{frame.bottom + 18}" text-anchor="middle">{short(x)}</text>'
            )
    return parts


def _mark(number: int, dot: Dot, frame: _Frame) -> str:
    color = _COLORS[(number - 1) % len(_COLORS)]
    paint, ink = (f'fill="#fff" stroke="{color}"', color) if dot.is_aside else (f'fill="{color}"', "#fff")
    places = [(frame.x(x), frame.y(y)) for x, y in dot.points]
    middle = tuple(statistics.mean(axis) for axis in zip(*places, strict=True))
    legend = (frame.right + 22, TOP + 8 + LEGEND_LINE * (number - 1))
    name = html.escape(dot.name)
    parts = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}" opacity="0.5"/>' for x, y in places]
    for x, y in (middle, legend):
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8.5" {paint}><title>{name}</title></circle>'
            f'<text class="number" x="{x:.1f}" y="{y + 3.5:.1f}" style="fill:{ink}" text-anchor="middle">'
            f"{number}</text>"
        )
    return "".join(parts) + f'<text x="{legend[0] + 14}" y="{legend[1] + 4}">{name}</text>'
