"""Small pictures as SVG text, made by pure functions: line charts, heat maps, bars. Colours come from the page's CSS.

Each element that has a value carries it as `data-tip`; line charts carry their points as `data-chart` for the page's
script. Without a script everything can still be read.
"""

import html
import json
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from moesaic.telemetry.scale import fixed, short, ticks

HEAT_BINS = 17  # an odd number, so that the middle one is the fair share
HEAT_OCTAVES = 2.0  # the scale ends at a quarter of and at four times the fair share

Format = Callable[[float], str]


class Series(NamedTuple):
    """One line: its name in the legend, a shorter one beside the line, its points. `style` picks colour and dashes."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    style: str = "s0"
    label: str = ""


class _Frame(NamedTuple):
    """Where data goes in a picture: the plot's rectangle and the ranges of the data that it shows."""

    left: float
    top: float
    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        return self.left + self.width * (value - self.x_range[0]) / (self.x_range[1] - self.x_range[0])

    def y(self, value: float) -> float:
        return self.top + self.height * (1 - (value - self.y_range[0]) / (self.y_range[1] - self.y_range[0]))


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_format: Format = short,
    y_format: Format = fixed,
    size: tuple[int, int] = (400, 260),
    y_floor: float | None = None,
    cut_start: bool = False,
) -> str:
    """Lines over a common x axis, labelled at their ends.

    Points with NaN break a line; a lone point is a dot. `y_floor` makes the axis begin there. `cut_start` lets a steep
    beginning leave the picture at the top, so that the rest can be told apart; the axis label then says so.
    """
    width, height = size
    kept = [line for line in (_finite(s) for s in series) if line.xs]
    if not kept:
        return _nothing(title, size)
    right = 14 + 6.3 * max(len(line.label) for line in kept)
    y_range, is_cut = _y_range(kept, y_floor, cut_start)
    frame = _Frame(48, 26, width - 48 - right, height - 72, _x_range(kept), y_range)
    note = f"{y_label} (the start lies above)" if is_cut else y_label
    body = [
        _axes(frame),
        f'<text class="axis" x="{frame.left}" y="14">{html.escape(note)}</text>',
        f'<text class="axis" x="{frame.left + frame.width / 2:.1f}" y="{height - 10}" '
        f'text-anchor="middle">{html.escape(x_label)}</text>',
        _lines(kept, frame),
        _end_labels(kept, frame),
    ]
    points = [
        {
            "name": line.name,
            "style": line.style,
            "at": [
                [round(frame.x(x), 1), round(frame.y(y), 1), x_format(x), y_format(y)]
                for x, y in zip(line.xs, line.ys, strict=True)
                if not math.isnan(y)
            ],
        }
        for line in kept
    ]
    chart = {"series": points, "x": x_label, "top": frame.top, "bottom": frame.top + frame.height}
    return _svg("chart", title, size, "".join(body), chart)


def heat_bin(ratio: float) -> int:
    """The colour of a load that is `ratio` times the fair share: logarithmic, the middle bin is 1."""
    if not ratio > 0:
        return 0
    position = math.log2(ratio) / HEAT_OCTAVES * (HEAT_BINS // 2)
    return HEAT_BINS // 2 + round(max(-(HEAT_BINS // 2), min(HEAT_BINS // 2, position)))


def heat_map(
    ratios: Sequence[Sequence[float]],
    *,
    title: str,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    cell: tuple[float, float] = (34, 26),
    show_values: bool = True,
    row_title: str = "",
    column_title: str = "",
) -> str:
    """A grid of loads, each as a multiple of its fair share. Cells below a tenth of it get a cross; NaN stays blank.

    Labels are thinned so that they never touch. Raises ValueError when labels and rows differ in number.
    """
    if not ratios or not ratios[0]:
        return _nothing(title, (320, 80))
    cell_width, cell_height = cell
    left = 14 + 6.4 * max(len(row_title), *(len(label) for label in row_labels))
    top = 34 if column_title or row_title else 18
    parts = []
    if column_title:
        parts.append(f'<text class="axis" x="{left:.1f}" y="10">{html.escape(column_title)}</text>')
    if row_title:
        parts.append(f'<text class="axis" x="{left - 6:.1f}" y="10" text-anchor="end">{html.escape(row_title)}</text>')
    every = max(1, math.ceil(6.6 * (1 + max(len(label) for label in column_labels)) / cell_width))
    for column, label in enumerate(column_labels):
        if column % every == 0:
            x = left + (column + 0.5) * cell_width
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{top - 6}" text-anchor="middle">{html.escape(label)}</text>'
            )
    every = max(1, math.ceil(12 / cell_height))
    for row, (label, values) in enumerate(zip(row_labels, ratios, strict=True)):
        y = top + row * cell_height
        if row % every == 0:
            parts.append(
                f'<text class="tick" x="{left - 6:.1f}" y="{y + cell_height / 2 + 4:.1f}" '
                f'text-anchor="end">{html.escape(label)}</text>'
            )
        for column, (ratio, name) in enumerate(zip(values, column_labels, strict=True)):
            tip = f"{row_title or 'row'} {label}, {column_title or 'column'} {name}: {ratio_text(ratio)}"
            parts.append(_cell(left + column * cell_width, y, cell, ratio, tip, show_values))
    size = (math.ceil(left + len(column_labels) * cell_width + 8), math.ceil(top + len(ratios) * cell_height + 4))
    return _svg("heat", title, size, "".join(parts))


def ratio_text(ratio: float) -> str:
    """A load as a multiple of the fair share, in words."""
    return "no rows" if math.isnan(ratio) else f"{ratio:.2f} times the fair share"


def color_bar(width: int = 300) -> str:
    """The heat maps' scale, labelled."""
    step = width / HEAT_BINS
    parts = [
        f'<rect class="h{index}" x="{10 + index * step:.2f}" y="2" width="{step + 0.3:.2f}" height="12"/>'
        for index in range(HEAT_BINS)
    ]
    for position, label in enumerate(("≤ ¼", "½", "fair share", "2×", "≥ 4×")):
        x = 10 + (0.5 + position * (HEAT_BINS - 1) / 4) * step
        parts.append(f'<text class="tick" x="{x:.1f}" y="28" text-anchor="middle">{label}</text>')
    return _svg("heat", "colour scale: load as a multiple of the fair share", (width + 20, 34), "".join(parts))


def bars(
    groups: Sequence[str],
    series: Sequence[tuple[str, str, Sequence[float]]],
    *,
    title: str,
    x_label: str,
    width: int = 400,
    value_format: Format = fixed,
) -> str:
    """Horizontal bars from zero: for each group, one bar for each (name, style, values). NaN has no bar but a dash."""
    finite = [value for _, _, values in series for value in values if math.isfinite(value)]
    if not groups or not finite:
        return _nothing(title, (width, 80))
    left, thick, gap = 12 + 6.6 * max(len(group) for group in groups), 11, 12
    each = thick * len(series) + gap
    frame = _Frame(left, 8, width - left - 44, each * len(groups), (0.0, max(*finite, 1e-12)), (0.0, 1.0))
    parts = [_vertical_grid(frame, value_format)]
    for row, group in enumerate(groups):
        y = frame.top + row * each + gap / 2
        parts.append(
            f'<text class="tick" x="{left - 8:.1f}" y="{y + (each - gap) / 2 + 4:.1f}" '
            f'text-anchor="end">{html.escape(group)}</text>'
        )
        for index, (name, style, values) in enumerate(series):
            value, at = values[row], y + index * thick
            end = frame.x(value) if math.isfinite(value) else left
            tip = html.escape(f"{group}, {name}: {value_format(value)}", quote=True)
            parts.append(
                f'<rect class="bar {style}" data-tip="{tip}" x="{left:.1f}" y="{at:.1f}" '
                f'width="{max(0.0, end - left):.1f}" height="{thick - 2}"/>'
                f'<text class="value" x="{end + 5:.1f}" y="{at + 8.5:.1f}">{value_format(value)}</text>'
            )
    bottom = frame.top + frame.height + 34
    parts.append(f'<text class="axis" x="{left:.1f}" y="{bottom:.1f}">{html.escape(x_label)}</text>')
    return _svg("bars", title, (width, math.ceil(bottom + 8)), "".join(parts))


def _svg(kind: str, title: str, size: tuple[int, int], body: str, chart: object = None) -> str:
    data = "" if chart is None else f' tabindex="0" data-chart="{html.escape(json.dumps(chart), quote=True)}"'
    width, height = size
    return (
        f'<svg class="{kind}" role="img" aria-label="{html.escape(title, quote=True)}" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"{data}>{body}</svg>'
    )


def _nothing(title: str, size: tuple[int, int]) -> str:
    width, height = size
    return _svg(
        "empty",
        title,
        size,
        f'<text class="axis" x="{width / 2}" y="{height / 2}" text-anchor="middle">nothing measured</text>',
    )


def _finite(series: Series) -> Series:
    """Without infinities and unknown x; unknown y stay as NaN and break the line. Empty when no point is left."""
    pairs = [
        (x, y if math.isfinite(y) else math.nan) for x, y in zip(series.xs, series.ys, strict=True) if math.isfinite(x)
    ]
    if all(math.isnan(y) for _, y in pairs):
        pairs = []
    return series._replace(xs=[x for x, _ in pairs], ys=[y for _, y in pairs])


def _x_range(series: Sequence[Series]) -> tuple[float, float]:
    values = [x for line in series for x in line.xs]
    low, high = min(values), max(values)
    pad = max(0.5, 0.05 * abs(low))
    return (low, high) if high > low else (low - pad, high + pad)


def _y_range(series: Sequence[Series], floor: float | None, cut_start: bool) -> tuple[tuple[float, float], bool]:
    values = [y for line in series for y in line.ys if not math.isnan(y)]
    low, high, is_cut = min(values), max(values), False
    if cut_start:
        settled = [y for line in series for y in line.ys[len(line.ys) // 4 :] if not math.isnan(y)]
        if settled and high - low > 1.6 * (max(settled) - low) > 0:
            high, is_cut = max(settled), True
    low = low if floor is None else min(floor, low)
    pad = 0.06 * (high - low) or max(0.05 * abs(high), 1e-9)
    return (low if floor is not None else low - 2.5 * pad, high + pad), is_cut


def _axes(frame: _Frame) -> str:
    parts = []
    marks = ticks(*frame.y_range)
    for value in marks:
        y = frame.y(value)
        parts.append(
            f'<line class="grid" x1="{frame.left}" x2="{frame.left + frame.width:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{frame.left - 7}" y="{y + 4:.1f}" text-anchor="end">'
            f"{_tick_text(value, marks)}</text>"
        )
    bottom = frame.top + frame.height
    parts.append(
        f'<line class="base" x1="{frame.left}" x2="{frame.left + frame.width:.1f}" y1="{bottom}" y2="{bottom}"/>'
    )
    for value in ticks(*frame.x_range, target=5):
        parts.append(
            f'<text class="tick" x="{frame.x(value):.1f}" y="{bottom + 17}" text-anchor="middle">{short(value)}</text>'
        )
    return "".join(parts)


def _tick_text(value: float, marks: Sequence[float]) -> str:
    step = marks[1] - marks[0] if len(marks) > 1 else abs(value)
    # 10^308 is the last power of ten that is a float.
    decimals = min(308, max(0, -math.floor(math.log10(step) + 1e-9))) if step > 0 else 0
    # A step of 0.25 needs one decimal more than its power of ten says.
    decimals += round(step * 10**decimals, 6) % 1 != 0
    return short(value) if abs(value) >= 1e4 else f"{value:.{decimals}f}"


def _vertical_grid(frame: _Frame, value_format: Format) -> str:
    bottom = frame.top + frame.height
    marks = ticks(*frame.x_range, target=5)
    return "".join(
        f'<line class="grid" x1="{frame.x(value):.1f}" x2="{frame.x(value):.1f}" y1="{frame.top}" y2="{bottom:.1f}"/>'
        f'<text class="tick" x="{frame.x(value):.1f}" y="{bottom + 15:.1f}" text-anchor="middle">'
        f"{_tick_text(value, marks)}</text>"
        for value in marks
    )


def _lines(series: Sequence[Series], frame: _Frame) -> str:
    """The lines, clipped to the plot by an inner picture (which needs no ids that could clash on a page)."""
    parts = []
    for line in series:
        for run in _runs(line, frame):
            if len(run) == 1:
                parts.append(f'<circle class="dot {line.style}" cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="3.5"/>')
            else:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
                parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
    box = f"{frame.left - 4} {frame.top} {frame.width + 8:.1f} {frame.height + 4:.1f}"
    x, y, width, height = box.split()
    return f'<svg x="{x}" y="{y}" width="{width}" height="{height}" viewBox="{box}">{"".join(parts)}</svg>'


def _runs(line: Series, frame: _Frame) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.xs, line.ys, strict=True):
        if math.isnan(y):
            runs.append([])
        else:
            runs[-1].append((frame.x(x), frame.y(y)))
    return [run for run in runs if run]


def _end_labels(series: Sequence[Series], frame: _Frame) -> str:
    """A dot and a name at each line's end. Names at the right edge are pushed apart; none where there is no room."""
    spacing, bottom = 12.5, frame.top + frame.height
    parts, at_edge = [], []
    for line in series:
        x, y = next((x, y) for x, y in zip(reversed(line.xs), reversed(line.ys), strict=True) if not math.isnan(y))
        at_x, at_y = frame.x(x), min(bottom, max(frame.top, frame.y(y)))
        parts.append(f'<circle class="dot {line.style}" cx="{at_x:.1f}" cy="{at_y:.1f}" r="3"/>')
        if at_x > frame.left + 0.9 * frame.width:
            at_edge.append((at_y, at_x, line))
        else:
            # Other lines go on past this end, so its name stands on the side where none of them is near.
            gaps = [_height_at(other, x, frame) - at_y for other in series if other is not line]
            is_free_below = at_y + 22 < bottom and not any(0 < gap < 24 for gap in gaps)
            parts.append(_name(at_x, at_y + 17 if is_free_below else at_y - 9, line, "middle"))
    at_edge.sort(key=lambda end: end[0])
    if len(at_edge) * spacing <= frame.height:
        heights = _spread([y for y, _, _ in at_edge], spacing, bottom)
        edge = frame.left + frame.width + 9
        parts += [_name(edge, height + 4, line, "start") for height, (_, _, line) in zip(heights, at_edge, strict=True)]
    return "".join(parts)


def _height_at(line: Series, x: float, frame: _Frame) -> float:
    """Where a line's known point nearest to x is drawn."""
    known = [(abs(at - x), y) for at, y in zip(line.xs, line.ys, strict=True) if not math.isnan(y)]
    return frame.y(min(known)[1])


def _spread(heights: list[float], spacing: float, bottom: float) -> list[float]:
    """Sorted heights moved as little as keeps them `spacing` apart and above `bottom`."""
    spread = list(heights)
    for index in range(1, len(spread)):
        spread[index] = max(spread[index], spread[index - 1] + spacing)
    for index in range(len(spread) - 1, -1, -1):
        limit = spread[index + 1] - spacing if index + 1 < len(spread) else bottom
        spread[index] = min(spread[index], limit)
    return spread


def _name(x: float, y: float, line: Series, anchor: str) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="name {line.style}" {place}>{html.escape(line.label)}</text>'


def _cell(x: float, y: float, cell: tuple[float, float], ratio: float, tip: str, show_value: bool) -> str:
    width, height = cell
    style = "hn" if math.isnan(ratio) else f"h{heat_bin(ratio)}"
    is_dead = ratio < 0.1
    gap = 1.5 if width > 12 else 0.0
    parts = [
        f'<rect class="{style}" data-tip="{html.escape(tip, quote=True)}" x="{x:.1f}" y="{y:.1f}" '
        f'width="{width - gap:.1f}" height="{height - (1.5 if height > 12 else 0):.1f}"/>'
    ]
    if show_value and width >= 26 and not math.isnan(ratio):
        ink = "on-dark" if abs(heat_bin(ratio) - HEAT_BINS // 2) > 4 else "on-light"
        value = "×" if is_dead else f"{ratio:.1f}"
        parts.append(
            f'<text class="cell {ink}" x="{x + (width - gap) / 2:.1f}" y="{y + height / 2 + 3:.1f}" '
            f'text-anchor="middle">{value}</text>'
        )
    return "".join(parts)
