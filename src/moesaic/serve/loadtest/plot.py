"""A load test as pictures: speed and requests over time, and how latencies are spread. HTML or SVG, standing alone."""

import html
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np

from moesaic.serve.loadtest.asking import Asked
from moesaic.telemetry.plots import Series, line_chart
from moesaic.telemetry.scale import fixed

_WINDOWS = 60
_POINTS = 200
_SIZE = (460, 280)
_GAP = 24


def page(title: str, asked: Sequence[Asked]) -> str:
    """All pictures on one HTML page."""
    figures = "".join(f"<figure><figcaption>{name}</figcaption>{chart}</figure>" for name, chart in _charts(asked))
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>'
        f"<style>{_style()}</style></head><body><main><h1>{html.escape(title)}</h1>"
        f'<div class="plots">{figures}</div></main></body></html>\n'
    )


def svg(title: str, asked: Sequence[Asked]) -> str:
    """The same pictures under each other, as one SVG."""
    charts = _charts(asked)
    width, height = _SIZE[0] + 2 * _GAP, 60 + len(charts) * (_SIZE[1] + 2 * _GAP)
    body = [f'<text x="{_GAP}" y="32" style="font-size:16px;font-weight:600">{html.escape(title)}</text>']
    for index, (name, chart) in enumerate(charts):
        top = 60 + index * (_SIZE[1] + 2 * _GAP)
        body.append(
            f'<text x="{_GAP}" y="{top}" style="font-weight:600">{name}</text>'
            f'<g transform="translate({_GAP} {top + 8})">{chart}</g>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        f'style="background:var(--paper);font-family:system-ui,sans-serif"><style>{_style()}'
        f"svg.chart{{width:{_SIZE[0]}px;max-width:none}}</style>{''.join(body)}</svg>\n"
    )


def write(path: Path, title: str, asked: Sequence[Asked]) -> None:
    """To a file, as its name says: .svg, else HTML."""
    path.write_text((svg if path.suffix == ".svg" else page)(title, asked), encoding="utf-8")


def _charts(asked: Sequence[Asked]) -> list[tuple[str, str]]:
    good = [each for each in asked if each.error is None]
    first = [each.first_s - each.started_s for each in good if each.first_s is not None]
    gaps = [gap for each in good for gap in each.gaps_s]
    whole = [each.ended_s - each.started_s for each in good]
    return [
        ("Pieces of answers a second", _chart([_speed(good)], "seconds", "pieces/s")),
        ("Requests that run", _chart([_running(asked)], "seconds", "requests")),
        ("Time to the first token", _chart([_spread(first)], "seconds", "share of requests")),
        ("Time between tokens", _chart([_spread(gaps, 1e3)], "milliseconds", "share of tokens")),
        ("Whole request", _chart([_spread(whole)], "seconds", "share of requests")),
    ]


def _chart(series: Sequence[Series], x_label: str, y_label: str) -> str:
    return line_chart(series, title=y_label, x_label=x_label, y_label=y_label, y_format=fixed, size=_SIZE, y_floor=0.0)


def _speed(good: Sequence[Asked]) -> Series:
    """Of answers' pieces as they came, in equal windows."""
    times = [
        time for each in good if each.first_s is not None for time in each.first_s + np.cumsum([0.0, *each.gaps_s])
    ]
    if not times:
        return Series("", [], [])
    counts, edges = np.histogram(times, bins=_WINDOWS, range=(0.0, max(times)))
    width = edges[1] - edges[0]
    return Series("", ((edges[:-1] + edges[1:]) / 2).tolist(), (counts / width).tolist())


def _running(asked: Sequence[Asked]) -> Series:
    end = max((each.ended_s for each in asked), default=0.0)
    xs = np.linspace(0.0, end, _POINTS)
    started, ended = (np.sort([getattr(each, name) for each in asked]) for name in ("started_s", "ended_s"))
    counts = np.searchsorted(started, xs, "right") - np.searchsorted(ended, xs, "right")
    return Series("", xs.tolist(), counts.astype(float).tolist())


def _spread(values: Sequence[float], scale: float = 1.0) -> Series:
    """What share of them is no more than x."""
    if not values:
        return Series("", [], [])
    shares = np.linspace(0.0, 1.0, _POINTS)
    return Series("", (np.quantile(values, shares) * scale).tolist(), shares.tolist())


def _style() -> str:
    return (files("moesaic.telemetry") / "page" / "page.css").read_text(encoding="utf-8")
