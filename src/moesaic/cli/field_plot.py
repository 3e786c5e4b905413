"""Every model's total against active parameters, as one SVG file that stands alone."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from moesaic.telemetry.scale import short

WIDTH, LEFT, TOP, RIGHT, BOTTOM = 1180, 64, 46, 520, 54
LINE = 17
LEGEND_COLUMNS = 2
_COLORS = ("#0067a8", "#c8500a", "#00805c", "#a3458a", "#8a6d00", "#4b5560", "#b0303a", "#5a4fcf")
_STYLE = (
    "text{font:11.5px system-ui,sans-serif;fill:#333}.grid{stroke:#e8e8e4}.share{stroke:#bbb;stroke-dasharray:3 4}"
    "text.title{font-size:15px;font-weight:600}text.tick{fill:#666;font-size:11px}"
    "text.number{font-weight:600;font-size:9px}"
)


class Model(NamedTuple):
    """A mark: parameters in total and active; `runs` is false for those that are only counted, drawn hollow."""

    name: str
    family: str
    total: int
    active: int
    runs: bool = True


class _Axes(NamedTuple):
    """Both axes are logarithmic, from one power of ten to another."""

    x_decades: tuple[int, int]
    y_decades: tuple[int, int]
    height: int

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * _share(value, self.x_decades)

    def y(self, value: float) -> float:
        return self.height - BOTTOM - (self.height - TOP - BOTTOM) * _share(value, self.y_decades)


def _share(value: float, decades: tuple[int, int]) -> float:
    return (math.log10(value) - decades[0]) / (decades[1] - decades[0])


def _decades(values: Sequence[int]) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return low, max(high, low + 1)


def draw(models: Sequence[Model]) -> str:
    """The picture as text: numbered marks, one colour a family, a legend; dashed lines where shares are equal."""
    rows = math.ceil(len(models) / LEGEND_COLUMNS)
    height = max(560, TOP + LINE * rows + 20)
    axes = _Axes(_decades([model.total for model in models]), _decades([model.active for model in models]), height)
    families = list(dict.fromkeys(model.family for model in models))
    marks = [
        _mark(number, model, _COLORS[families.index(model.family) % len(_COLORS)], axes, rows)
        for number, model in enumerate(models, 1)
    ]
    middle_x, middle_y = (LEFT + WIDTH - RIGHT) / 2, (TOP + height - BOTTOM) / 2
    x_label, y_label = "total (hollow: counted, does not run yet)", "active (active_gemm)"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}">'
        f'<style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="title" x="{LEFT}" y="24">Parameters in total and active for a token</text>'
        + "".join((*_grid(axes), *_shares(axes), *marks))
        + f'<text x="{middle_x}" y="{height - 14}" text-anchor="middle">{x_label}</text>'
        f'<text transform="translate(16 {middle_y}) rotate(-90)" text-anchor="middle">{y_label}</text></svg>\n'
    )


def _grid(axes: _Axes) -> list[str]:
    parts: list[str] = []
    right, bottom = WIDTH - RIGHT, axes.height - BOTTOM
    for decade in range(axes.x_decades[0], axes.x_decades[1] + 1):
        at = axes.x(10.0**decade)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>'
            f'<text class="tick" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{short(10.0**decade)}</text>'
        )
    for decade in range(axes.y_decades[0], axes.y_decades[1] + 1):
        at = axes.y(10.0**decade)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{short(10.0**decade)}</text>'
        )
    return parts


def _shares(axes: _Axes) -> list[str]:
    """Where all, a tenth and a hundredth of the parameters are active."""
    parts: list[str] = []
    (left, right), (bottom, top) = axes.x_decades, axes.y_decades
    for power, label in ((0, "all"), (1, "1/10"), (2, "1/100")):
        start, stop = max(left, bottom + power), min(right, top + power)
        if start >= stop:
            continue
        (x1, y1), (x2, y2) = ((axes.x(10.0**at), axes.y(10.0 ** (at - power))) for at in (start, stop))
        parts.append(
            f'<line class="share" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
            f'<text class="tick" x="{x2 - 4:.1f}" y="{y2 + 14:.1f}" text-anchor="end">{label}</text>'
        )
    return parts


def _mark(number: int, model: Model, color: str, axes: _Axes, rows: int) -> str:
    paint, ink = (f'fill="{color}"', "#fff") if model.runs else (f'fill="#fff" stroke="{color}"', color)
    column, row = divmod(number - 1, rows)
    legend = (WIDTH - RIGHT + 34 + column * (RIGHT - 40) / LEGEND_COLUMNS, TOP + 4 + LINE * row)
    name = html.escape(model.name)
    tip = f"{name}: {short(model.total)} in total, {short(model.active)} active"
    parts = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="7.5" {paint}><title>{tip}</title></circle>'
        f'<text class="number" x="{x:.1f}" y="{y + 3:.1f}" style="fill:{ink}" text-anchor="middle">{number}</text>'
        for x, y in ((axes.x(model.total), axes.y(model.active)), legend)
    ]
    return "".join(parts) + f'<text x="{legend[0] + 12:.1f}" y="{legend[1] + 4:.1f}">{name}</text>'
