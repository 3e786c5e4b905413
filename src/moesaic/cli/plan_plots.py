"""The pictures of a plan, as SVG text: lines over logarithmic axes, a stack of memory, a roofline."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

from moesaic.plan.hardware import Device, Number
from moesaic.plan.memory import DeviceMemory
from moesaic.plan.roofline import StepTime
from moesaic.telemetry.scale import short

COLORS = (
    "#0067a8", "#c8500a", "#00805c", "#a3458a", "#8a6d00", "#4b5560", "#b0303a", "#5a4fcf", "#2d8f9e", "#8c6046",
    "#7aa800", "#d98a9b", "#1d3f72",
)  # fmt: skip
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}.grid{stroke:#e8e8e4}.dashed{stroke-dasharray:5 4}"
    "text.title{font-size:15px;font-weight:600}text.tick{fill:#666;font-size:11px}"
)
_ROOF = "#8a8a86"
LEFT, TOP, RIGHT, BOTTOM = 66, 40, 170, 50


class Line(NamedTuple):
    """Points of one name, joined; dashed: drawn so, and named at its end in place of in the legend."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    dashed: bool = False


class Mark(NamedTuple):
    """A dot, its radius, and what a reader who points at it is told."""

    x: float
    y: float
    radius: float
    color: str
    name: str
    tip: str


class _Axes(NamedTuple):
    """Both are logarithmic."""

    size: tuple[int, int]
    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        return LEFT + (self.size[0] - LEFT - RIGHT) * _share(value, self.x_range)

    def y(self, value: float) -> float:
        return self.size[1] - BOTTOM - (self.size[1] - TOP - BOTTOM) * _share(value, self.y_range)


def log_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    size: tuple[int, int] = (720, 380),
) -> str:
    """Lines and dots over two logarithmic axes, named on the right. Values must be above 0."""
    xs = [x for line in lines for x, _ in line.points] + [mark.x for mark in marks]
    ys = [y for line in lines for _, y in line.points] + [mark.y for mark in marks]
    axes = _Axes(size, (min(xs) / 1.2, max(xs) * 1.2), (min(ys) / 1.4, max(ys) * 1.4))
    body = [*_grid(axes), *_labels(axes, x_label, y_label)]
    for line in lines:
        places = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in line.points)
        style = ' class="dashed"' if line.dashed else ""
        body.append(f'<polyline{style} points="{places}" fill="none" stroke="{line.color}" stroke-width="2"/>')
        if line.dashed:
            x, y = axes.x(line.points[-1][0]), axes.y(line.points[-1][1])
            body.append(
                f'<text x="{x:.1f}" y="{y - 5:.1f}" text-anchor="end" class="tick">{html.escape(line.name)}</text>'
            )
    for mark in marks:
        body.append(
            f'<circle cx="{axes.x(mark.x):.1f}" cy="{axes.y(mark.y):.1f}" r="{mark.radius:.1f}" fill="{mark.color}" '
            f'fill-opacity="0.8"><title>{html.escape(mark.tip)}</title></circle>'
        )
    entries = [(line.name, line.color) for line in lines if not line.dashed] + [
        (mark.name, mark.color) for mark in marks
    ]
    body += [_entry(size[0] - RIGHT + 14, TOP + 12 + 17 * at, *entry) for at, entry in enumerate(entries)]
    return svg(title, size, "".join(body))


def svg(title: str, size: tuple[int, int], body: str) -> str:
    """A picture that stands alone."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{size[0]}" height="{size[1]}" '
        f'viewBox="0 0 {size[0]} {size[1]}" '
        f'role="img"><style>{STYLE}</style><rect width="100%" height="100%" fill="#fff"/>'
        f'<text class="title" x="12" y="22">{html.escape(title)}</text>{body}</svg>\n'
    )


def memory_stack(memories: Sequence[DeviceMemory], device: str, names: Sequence[str]) -> str:
    """What devices hold, a bar for each beside its capacity; parts are named once, with the most of it."""
    left, width = 12 + 7 * max(map(len, names)), 696 - 7 * max(map(len, names))
    most = max(max(each.total, each.capacity) for each in memories)
    largest = {part: max(each.parts.get(part, 0.0) for each in memories) for each in memories for part in each.parts}
    parts = sorted((part for part, held in largest.items() if held), key=lambda part: -largest[part])
    colors = {part: COLORS[number % len(COLORS)] for number, part in enumerate(parts)}
    tall = 44 if len(memories) == 1 else 22
    body = []
    for row, (memory, name) in enumerate(zip(memories, names, strict=True)):
        y = 40 + row * (tall + 30)
        body += [f'<text x="12" y="{y + tall / 2 + 4:.0f}">{html.escape(name)}</text>']
        body += _bar(memory, colors, (left, y, width, tall), most)
    below = 40 + len(memories) * (tall + 30) + 18
    for number, part in enumerate(parts):
        words = f"{part} {largest[part] / 1e9:,.2f} GB"
        body.append(_entry(12 + 230 * (number % 3), below + 18 * (number // 3), words, colors[part]))
    height = below + 18 * ((len(parts) - 1) // 3) + 12
    return svg(f"memory of a device ({device})", (720, height), "".join(body))


def _bar(memory: DeviceMemory, colors: dict[str, str], place: tuple[int, int, int, int], most: float) -> list[str]:
    """One device. place: left, top, width of `most` bytes, height."""
    left, top, width, tall = place
    body, at = [], float(left)
    for part, color in colors.items():
        held = memory.parts.get(part, 0.0)
        wide = width * held / most
        tip = html.escape(f"{part}: {held / 1e9:,.2f} GB")
        body.append(
            f'<rect x="{at:.1f}" y="{top}" width="{wide:.2f}" height="{tall}" fill="{color}">'
            f"<title>{tip}</title></rect>"
        )
        at += wide
    edge = left + width * memory.capacity / most
    body.append(
        f'<line x1="{edge:.1f}" x2="{edge:.1f}" y1="{top - 5}" y2="{top + tall + 5}" stroke="#222" stroke-width="2"/>'
    )
    free = f"{abs(memory.free) / 1e9:,.1f} GB {'free' if memory.fits else 'missing'}"
    words = f"{memory.capacity / 1e9:,.1f} GB there, {free}"
    anchor = "end" if edge > 300 else "start"
    body.append(f'<text x="{edge:.1f}" y="{top + tall + 16}" text-anchor="{anchor}" class="tick">{words}</text>')
    return body


def roofline(step: StepTime, device: Device, title: str) -> str:
    """Every operation by its FLOPs a byte and its rate, under the roofs of what it computes in; larger: longer."""
    ops = [op for op in step.ops if op.op.flops and op.op.num_bytes and op.seconds]
    share = device.efficiency
    numbers: list[Number] = list(dict.fromkeys(device.computes_in(op.op.number) for op in ops))
    low = min(op.op.intensity for op in ops) / 2
    high = max(max(op.op.intensity for op in ops), 2 * max(device.flops[n] for n in numbers) / device.bandwidth)
    lines = []
    for rate in sorted({device.flops[number] for number in numbers}, reverse=True):
        peak, slope = rate * share.compute, device.bandwidth * share.memory
        alike = ", ".join(number for number in numbers if device.flops[number] == rate)
        points = [(low, low * slope), (peak / slope, peak), (high * 2, peak)]
        lines.append(Line(f"{alike}: {short(peak)}FLOP/s", points, _ROOF, dashed=True))
    whole = sum(op.seconds for op in ops)
    marks = [
        Mark(
            op.op.intensity,
            op.op.flops / op.seconds,
            4 + 14 * math.sqrt(op.seconds / whole),
            COLORS[index % len(COLORS)],
            op.op.name,
            f"{op.op.name}: {op.op.intensity:,.1f} FLOP/byte, {op.seconds / whole:.0%} of the time, bound by {op.by}",
        )
        for index, op in enumerate(ops)
    ]
    return log_chart(title, lines, x_label="FLOPs for each byte read", y_label="FLOPs a second", marks=marks)


def _entry(x: float, y: float, name: str, color: str) -> str:
    return (
        f'<rect x="{x:.0f}" y="{y - 9:.0f}" width="10" height="10" fill="{color}"/>'
        f'<text x="{x + 15:.0f}" y="{y:.0f}">{html.escape(name)}</text>'
    )


def _share(value: float, span: tuple[float, float]) -> float:
    low, high = map(math.log, span)
    return (math.log(max(value, 1e-300)) - low) / (high - low)


def _grid(axes: _Axes) -> list[str]:
    right, bottom, parts = axes.size[0] - RIGHT, axes.size[1] - BOTTOM, []
    for value in _steps(axes.x_range):
        at = axes.x(value)
        parts.append(
            f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>'
            f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{short(value)}</text>'
        )
    for value in _steps(axes.y_range):
        at = axes.y(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{short(value)}</text>'
        )
    return parts


def _steps(span: tuple[float, float]) -> list[float]:
    """Round values: powers of ten, and twos and fives where there are few."""
    decades = range(math.floor(math.log10(span[0])), math.ceil(math.log10(span[1])) + 1)
    factors = (1, 2, 5) if len(decades) <= 4 else (1,)
    return [f * 10.0**d for d in decades for f in factors if span[0] <= f * 10.0**d <= span[1]]


def _labels(axes: _Axes, x_label: str, y_label: str) -> list[str]:
    width, height = axes.size
    middle = (LEFT + width - RIGHT) / 2
    turned = f'transform="translate(16 {height / 2:.0f}) rotate(-90)"'
    return [
        f'<text x="{middle:.0f}" y="{height - 12}" text-anchor="middle">{html.escape(x_label)}</text>',
        f'<text {turned} text-anchor="middle">{html.escape(y_label)}</text>',
    ]
