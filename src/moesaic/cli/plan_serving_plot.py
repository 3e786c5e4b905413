"""A minute of serving as one SVG file that stands alone: who waits, who is written for, how many tokens come out."""

import numpy as np

from moesaic.plan.cluster.serving import Serving
from moesaic.telemetry.plots import Series, line_chart
from moesaic.telemetry.scale import short

_SIZE = (520, 250)
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}text.tick{fill:#666;font-size:11px}.grid{stroke:#e8e8e4}"
    ".base{stroke:#999}.line{fill:none;stroke-width:2}.s0{stroke:#0067a8}.s1{stroke:#c8500a}.s2{stroke:#00805c}"
    "circle.dot{fill:#fff;stroke-width:2}"
)


def draw(run: Serving) -> str:
    """Three pictures under one another."""
    samples = run.ledger.samples
    times = [sample.at for sample in samples]
    written = np.array(run.ledger.written_at)
    rates = (np.diff(written) / np.diff(times)).tolist() if len(times) > 1 else [0.0]
    waiting = [
        Series("waiting to be read", times, [sample.to_read for sample in samples], "s0", "to read"),
        Series("waiting to be written", times, [sample.to_write for sample in samples], "s1", "to write"),
    ]
    writing = [Series("being written", times, [sample.writing for sample in samples], "s2", "writing")]
    output = [Series("output", times[1:] or times, rates, "s0", "output")]
    charts = [
        _chart(waiting, "Requests that wait", "requests"),
        _chart(writing, "Texts being written", "texts"),
        _chart(output, "Output of all decode units", "tokens a second"),
    ]
    height = _SIZE[1] * len(charts)
    placed = "".join(f'<g transform="translate(0 {_SIZE[1] * at})">{chart}</g>' for at, chart in enumerate(charts))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_SIZE[0]}" height="{height}" '
        f'viewBox="0 0 {_SIZE[0]} {height}"><style>{_STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{placed}</svg>\n'
    )


def _chart(series: list[Series], title: str, label: str) -> str:
    return line_chart(series, title=title, x_label="seconds", y_label=label, y_format=short, size=_SIZE, y_floor=0.0)
