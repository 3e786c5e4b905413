"""One HTML file that shows a run: no scripts, fonts or pictures from elsewhere. Every plot has its numbers in a table.

E experts, M domains.
"""

import html
import json
import math
import os
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moesaic.errors import RunFolderError
from moesaic.telemetry.health import LayerHealth, RouterHealth, domain_divergence, load_shares
from moesaic.telemetry.load import LayerLoad, StepLoad, sum_loads
from moesaic.telemetry.plots import HEAT_BINS, HEAT_OCTAVES, Format, Series, bars, color_bar, heat_map, line_chart
from moesaic.telemetry.report_data import HeldOut, ModelResult, ReportData
from moesaic.telemetry.scale import duration, fixed, short

MOST_COLUMNS = 48  # steps shown side by side; longer runs are summed into as many windows
MOST_POINTS = 160  # of a training curve; longer ones are averaged


def write_report(data: ReportData, path: str | Path) -> Path:
    """Write the page beside `path` and rename it into place. Raises RunFolderError where that cannot be written."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_text(render_page(data), encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise RunFolderError(
            f"cannot write {path}: {error.strerror}; choose a folder with room and write access"
        ) from error
    return path


def render_page(data: ReportData) -> str:
    """The whole page as text."""
    page = files("moesaic.telemetry") / "page"
    colours, style, script = (
        (page / name).read_text(encoding="utf-8") for name in ("colours.css", "page.css", "page.js")
    )
    sections = (_head(data), _comparison(data), _curves(data), _load(data), _domains(data), _samples(data), _next(data))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(data.title)}</title>\n<style>\n{colours}{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f'\n</main>\n<div id="tip" role="status" hidden></div>\n<script>\n{script}</script>\n</body>\n</html>\n'
    )


def _section(title: str, note: str, body: str) -> str:
    lead = f'<p class="note">{_text(note)}</p>' if note else ""
    return f"<section><h2>{_text(title)}</h2>{lead}{body}</section>"


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _head(data: ReportData) -> str:
    marks = {True: ("good", "✓", "good: "), False: ("bad", "✗", "not good: "), None: ("", "·", "")}
    verdicts = "".join(
        f'<li class="{style}"><span class="mark" aria-hidden="true">{sign}</span>'
        f'<span><span class="unseen">{spoken}</span>{_text(verdict.text)}</span></li>'
        for verdict in data.verdicts
        for style, sign, spoken in (marks[verdict.is_good],)
    )
    lead = f'<p class="lead">{_text(data.subtitle)}</p>' if data.subtitle else ""
    return f"<h1>{_text(data.title)}</h1>{lead}" + (f'<ul class="verdicts">{verdicts}</ul>' if verdicts else "")


class _Line(NamedTuple):
    """A row of the comparison. `best` picks the winner among known values; None where more is neither good nor bad."""

    name: str
    value: Callable[[ModelResult], float]
    show: Callable[[float], str]
    best: Callable[[Sequence[float]], float] | None = None


def _bytes(value: float) -> str:
    return short(value, "B")


_SIZE = (
    _Line("Total parameters", lambda m: m.total_parameters, short),
    _Line("Active parameters a token", lambda m: m.active_parameters, short),
)
_SPENT = (
    _Line("Training tokens", lambda m: m.training_tokens, short),
    _Line("Training FLOPs", lambda m: m.training_flops, lambda value: short(value, "FLOP")),
    _Line("Training time", lambda m: m.training_time_s, duration),
    _Line("Training, tokens/s", lambda m: m.training_tokens_per_s, short, max),
    _Line("Decoding, tokens/s", lambda m: m.decoding_tokens_per_s, short, max),
    _Line("Peak memory", lambda m: m.peak_memory_bytes, _bytes, min),
)


def _capacity_lines(models: Sequence[ModelResult]) -> list[_Line]:
    """What dropping rows as in training costs, where a model does: it says nothing of which model is better."""
    is_known = any(math.isfinite(model.capacity_gap) for model in models)
    return [_Line("Capacity gap, bits per byte", lambda m: m.capacity_gap, fixed)] if is_known else []


def _domain_names(models: Sequence[ModelResult]) -> list[str]:
    return list(dict.fromkeys(name for model in models for name in model.domain_bits_per_byte))


def _of_domain(name: str) -> Callable[[ModelResult], float]:
    return lambda model: model.domain_bits_per_byte.get(name, math.nan)


def _comparison(data: ReportData) -> str:
    if not data.models:
        return ""
    heads = "".join(f'<th scope="col">{_text(m.name)}<small>{_text(m.note)}</small></th>' for m in data.models)
    held_out = _Line("Bits per byte, all text", lambda m: m.bits_per_byte, fixed, min)
    per_domain = [_Line(name, _of_domain(name), fixed, min) for name in _domain_names(data.models)]
    rows = [
        *(_row(line, data.models) for line in _SIZE),
        _part("Held-out text (lower is better)", len(data.models)),
        _row(held_out, data.models),
        *(_row(line, data.models, "indent") for line in per_domain),
        *(_row(line, data.models) for line in _capacity_lines(data.models)),
        _part("Spent and reached", len(data.models)),
        *(_row(line, data.models) for line in _SPENT),
    ]
    note = (
        "The best of each row is marked. Models may have seen different numbers of tokens; the curves below compare "
        "them at equal ones."
    )
    body = (
        f'<div class="scroll"><table class="compare"><thead><tr><td></td>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    return _section("Side by side", note, body)


def _part(name: str, num_models: int) -> str:
    return f'<tr class="part"><th scope="rowgroup" colspan="{num_models + 1}">{_text(name)}</th></tr>'


def _row(line: _Line, models: Sequence[ModelResult], style: str = "") -> str:
    values = [float(line.value(model)) for model in models]
    known = [value for value in values if math.isfinite(value)]
    best = line.best(known) if line.best and len(known) > 1 else None
    cells = "".join(f"<td{' class=best' if value == best else ''}>{_text(line.show(value))}</td>" for value in values)
    return f'<tr class="{style}"><th scope="row">{_text(line.name)}</th>{cells}</tr>'


def _figure(caption: str, picture: str, table: str = "", small: str = "") -> str:
    note = f"<small>{_text(small)}</small>" if small else ""
    return f"<figure><figcaption>{_text(caption)}{note}</figcaption>{picture}{table}</figure>"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], summary: str) -> str:
    """A table that opens on demand; the first cell of a row names it."""
    top = "".join(f'<th scope="col">{_text(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<details><summary>{_text(summary)}</summary><div class="scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 30 8" aria-hidden="true"><line class="line {style}" x1="1" x2="29" y1="4" y2="4"/>'
        f"</svg>{_text(name)}</li>"
        for name, style in entries
    )
    return f'<ul class="legend">{items}</ul>'


def _curves(data: ReportData) -> str:
    if not any(model.held_out or model.training_loss for model in data.models):
        return ""
    legend = _legend([(model.name, f"s{index}") for index, model in enumerate(data.models)])
    figures = [
        _held_out_figure(data.models, "Against tokens", "training tokens", short, lambda p: p.tokens),
        _held_out_figure(
            data.models, "Against compute", "training FLOPs", lambda value: short(value, "FLOP"), lambda p: p.flops
        ),
        _held_out_figure(data.models, "Against time", "seconds of training", short, lambda p: p.seconds),
        _training_figure(data.models),
        _domain_bars(data.models),
    ]
    rows = [
        [model.name, short(p.tokens), short(p.flops, "FLOP"), duration(p.seconds), fixed(p.bits_per_byte)]
        for model in data.models
        for p in model.held_out
    ]
    heads = ("Model", "Tokens", "Training FLOPs", "Time", "Bits per byte")
    note = (
        "Bits per byte on held-out text: lower is better. An MoE is meant to win at equal tokens and at equal compute; "
        "wall-clock time also pays for moving tokens to experts."
    )
    table = _table(heads, rows, "Held-out values as a table")
    return _section("What the training bought", note, f'{legend}<div class="plots">{"".join(figures)}</div>{table}')


def _held_out_figure(
    models: Sequence[ModelResult], caption: str, x_label: str, x_format: Format, place: Callable[[HeldOut], float]
) -> str:
    series = [
        Series(m.name, [place(p) for p in m.held_out], [p.bits_per_byte for p in m.held_out], f"s{index}", m.label)
        for index, m in enumerate(models)
    ]
    title = f"held-out bits per byte against {x_label}"
    return _figure(
        caption,
        line_chart(series, title=title, x_label=x_label, y_label="bits per byte", x_format=x_format, cut_start=True),
    )


def _training_figure(models: Sequence[ModelResult]) -> str:
    series = []
    for index, model in enumerate(models):
        xs, ys = _thin([p[0] for p in model.training_loss], [p[1] for p in model.training_loss])
        series.append(Series(model.name, xs, ys, f"s{index}", model.label))
    chart = line_chart(
        series, title="training loss", x_label="training tokens", y_label="nats a token", x_format=short, cut_start=True
    )
    return _figure("Training loss", chart)


def _thin(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points: the means of runs of neighbours."""
    size = max(1, math.ceil(len(xs) / MOST_POINTS))
    starts = range(0, len(xs), size)
    return (
        [float(np.mean(xs[start : start + size])) for start in starts],
        [float(np.mean(ys[start : start + size])) for start in starts],
    )


def _domain_bars(models: Sequence[ModelResult]) -> str:
    names = _domain_names(models)
    series = [
        (model.name, f"s{index}", [model.domain_bits_per_byte.get(name, math.nan) for name in names])
        for index, model in enumerate(models)
    ]
    picture = bars(names, series, title="held-out bits per byte per domain", x_label="bits per byte")
    return _figure("Per domain, at the end", picture)


def _ratios(load: LayerLoad) -> list[float]:
    """Each expert's load as a multiple of 1/E; NaN where the layer had no rows."""
    shares_E = load_shares(load.counts_E)
    return (shares_E * load.num_experts).tolist() if shares_E.any() else [math.nan] * load.num_experts


def _windows(loads: Sequence[StepLoad]) -> list[StepLoad]:
    """At most MOST_COLUMNS loads: sums over runs of neighbouring steps."""
    size = max(1, math.ceil(len(loads) / MOST_COLUMNS))
    return [sum_loads(loads[start : start + size]) for start in range(0, len(loads), size)]


def _load(data: ReportData) -> str:
    if not data.loads or not data.loads[0].layers:
        return ""
    windows = _windows(data.loads)
    steps = [str(window.step) for window in windows]
    health = [RouterHealth.of(window) for window in windows]
    note = (
        "Each cell is one expert's load as a multiple of its fair share, 1/E of the rows. Grey is fair, blue is less, "
        "orange is more; × marks an expert below a tenth of it."
    )
    dropped_share = sum_loads(data.loads).dropped_share
    if dropped_share:
        note += f" Of what the router chose, capacity dropped {dropped_share:.1%}."
    body = (
        f'<div class="scroll">{color_bar()}</div>{_load_at(windows, steps)}<h3 class="later">Over time</h3>'
        f'<div class="plots small">{_over_time(windows, steps)}</div>'
        f'<div class="plots">{_health_figures(windows, health)}</div>'
    )
    return _section("Who does the work", note, body)


def _load_at(windows: Sequence[StepLoad], steps: Sequence[str]) -> str:
    """Layer x expert at one step, chosen with a slider; without a script it shows the last."""
    last = [_ratios(layer) for layer in windows[-1].layers]
    width = max(len(ratios) for ratios in last)
    experts = [str(expert) for expert in range(width)]
    layers = [str(layer.layer) for layer in windows[-1].layers]
    picture = heat_map(
        # Layers with fewer experts are padded so that the grid stays rectangular.
        [_padded(ratios, width) for ratios in last],
        title=f"load per layer and expert, step {steps[-1]}",
        row_labels=layers,
        column_labels=experts,
        cell=(max(9.0, min(44.0, 1100 / width)), 30),
        row_title="layer",
        column_title="expert",
    )
    ratios = [
        [[_json_number(value) for value in _padded(_ratios(layer), width)] for layer in window.layers]
        for window in windows
    ]
    payload = {
        "bins": HEAT_BINS,
        "octaves": HEAT_OCTAVES,
        "steps": [f"step {step}" for step in steps],
        "ratios": ratios,
    }
    table = _table(
        ("Layer", *(f"expert {expert}" for expert in experts)),
        [
            (layer, *(fixed(value, 2) for value in _padded(values, width)))
            for layer, values in zip(layers, last, strict=True)
        ],
        f"Step {steps[-1]} as a table",
    )
    return (
        '<div class="slider"><label for="step">Step</label>'
        f'<input id="step" type="range" min="0" max="{len(steps) - 1}" value="{len(steps) - 1}">'
        f'<output id="step-name" for="step">step {_text(steps[-1])}</output></div>'
        f'<div class="scroll" id="load-at">{picture}</div>{table}'
        # "<" cannot end the script early when it is written as an escape.
        f'<script type="application/json" id="loads">{json.dumps(payload).replace("<", chr(92) + "u003c")}</script>'
    )


def _padded(values: Sequence[float], width: int) -> list[float]:
    return [*values, *[math.nan] * (width - len(values))]


def _json_number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 3)


def _over_time(windows: Sequence[StepLoad], steps: Sequence[str]) -> str:
    figures = []
    for index, layer in enumerate(windows[-1].layers):
        by_step = [_ratios(window.layers[index]) for window in windows]
        experts = [str(expert) for expert in range(layer.num_experts)]
        picture = heat_map(
            [list(row) for row in zip(*by_step, strict=True)],
            title=f"layer {layer.layer}: load per expert over steps",
            row_labels=experts,
            column_labels=steps,
            cell=(max(4.0, min(20.0, 216 / len(steps))), max(3.0, min(10.0, 160 / layer.num_experts))),
            show_values=False,
            row_title="expert",
            column_title="step",
        )
        table = _table(
            ("Step", *(f"expert {expert}" for expert in experts)),
            [(step, *(fixed(value, 2) for value in values)) for step, values in zip(steps, by_step, strict=True)],
            "As a table",
        )
        figures.append(_figure(f"Layer {layer.layer}", f'<div class="scroll">{picture}</div>', table))
    return "".join(figures)


def _layer_style(index: int, num_layers: int) -> str:
    return f"l{round(index * 7 / max(1, num_layers - 1))}"


def _health_figures(windows: Sequence[StepLoad], health: Sequence[RouterHealth]) -> str:
    measures: tuple[tuple[str, str, str, Callable[[LayerHealth], float]], ...] = (
        ("MaxVio", "heaviest expert over the mean, minus 1: 0 is even", "MaxVio", lambda layer: layer.max_violation),
        (
            "Entropy of the load",
            "1 is perfectly even, 0 is all on one expert",
            "H / ln E",
            lambda layer: layer.load_entropy,
        ),
        (
            "Entropy of the router",
            "1 cannot decide, 0 is certain, a token's mean",
            "H / ln E",
            lambda layer: layer.router_entropy,
        ),
    )
    xs = [window.step for window in windows]
    num_layers = len(windows[-1].layers)
    figures = []
    for caption, small, y_label, measure in measures:
        values = [[measure(step.layers[index]) for step in health] for index in range(num_layers)]
        names = [f"layer {layer.layer}" for layer in windows[-1].layers]
        series = [
            Series(name, xs, ys, _layer_style(index, num_layers), name)
            for index, (name, ys) in enumerate(zip(names, values, strict=True))
        ]
        floor = 0.0 if caption == "MaxVio" else None
        chart = line_chart(series, title=caption, x_label="step", y_label=y_label, y_floor=floor)
        rows = [(str(step), *(fixed(line[at]) for line in values)) for at, step in enumerate(xs)]
        figures.append(_figure(caption, chart, _table(("Step", *names), rows, "As a table"), small))
    return "".join(figures)


def _domains(data: ReportData) -> str:
    layers = () if data.domain_load is None else data.domain_load.layers
    figures = []
    for layer in layers:
        if layer.domain_counts_ME is None:
            continue
        counts_ME = layer.domain_counts_ME
        ratios = [
            (load_shares(counts_E) * layer.num_experts).tolist() if counts_E.any() else [math.nan] * layer.num_experts
            for counts_E in counts_ME
        ]
        names = [
            data.domains[index] if index < len(data.domains) else f"domain {index}" for index in range(len(ratios))
        ]
        experts = [str(expert) for expert in range(layer.num_experts)]
        picture = heat_map(
            ratios,
            title=f"layer {layer.layer}: load per domain and expert",
            row_labels=names,
            column_labels=experts,
            cell=(max(9.0, min(27.0, 432 / layer.num_experts)), 24),
            column_title="expert",
        )
        rows = [(name, *(fixed(value, 2) for value in values)) for name, values in zip(names, ratios, strict=True)]
        divergence = f"Jensen-Shannon divergence between domains: {fixed(domain_divergence(counts_ME))} of 1"
        table = _table(("Domain", *experts), rows, "As a table")
        figures.append(_figure(f"Layer {layer.layer}", f'<div class="scroll">{picture}</div>', table, divergence))
    if not figures:
        return ""
    note = (
        "On held-out text, each domain's rows over the experts, again as multiples of the fair share. A divergence of "
        "0 means that all domains use the experts alike; 1 that they share none."
    )
    body = f'<div class="scroll">{color_bar()}</div><div class="plots wide">{"".join(figures)}</div>'
    return _section("Which expert serves which text", note, body)


def _samples(data: ReportData) -> str:
    if not data.continuations:
        return ""
    samples = "".join(f"<blockquote><b>{_text(s.prompt)}</b>{_text(s.text)}</blockquote>" for s in data.continuations)
    return _section("In its own words", "The prompt is in grey; the model wrote the rest.", samples)


def _next(data: ReportData) -> str:
    commands = "".join(f"<dt>{_text(c.purpose)}</dt><dd><code>{_text(c.line)}</code></dd>" for c in data.commands)
    facts = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in data.facts)
    go_on = _section("Go on", "", f'<dl class="commands">{commands}</dl>') if commands else ""
    return go_on + (_section("This run", "", f'<dl class="facts">{facts}</dl>') if facts else "")
