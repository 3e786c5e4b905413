"""A plan as a page that people look at: one HTML file with its pictures inside, nothing fetched from anywhere."""

import html
from collections.abc import Sequence

from moesaic.cli import plan_text
from moesaic.cli.plan_plots import COLORS, Line, Mark, log_chart, memory_stack, roofline
from moesaic.plan.dense import BATCHES
from moesaic.plan.layout import Layout
from moesaic.plan.plan import ServingPlan, TrainingPlan

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:780px;margin:2em auto;padding:0 1em;background:#fff}
h1{font-size:1.5em;margin-bottom:.2em}h2{font-size:1.15em;margin-top:2em}.verdict{background:#f3f1ea;padding:.8em 1em;
border-left:4px solid #c8500a}table{border-collapse:collapse;font-size:13px;margin:.6em 0}
td,th{padding:.15em .8em .15em 0;text-align:left}td+td,th+th{text-align:right}th{border-bottom:1px solid #bbb}
small{color:#666}td,th{white-space:nowrap}.wide{overflow-x:auto}.wide svg{display:block;min-width:600px;max-width:100%;
height:auto}td:last-child,th:last-child{padding-right:0}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#0f0f0f}.verdict{background:#22211e}th{border-color:#555}
small{color:#999}.wide svg{filter:invert(1) hue-rotate(180deg)}.wide svg>rect:first-of-type{fill:#f0f0f0}}
"""
Rows = Sequence[Sequence[str]]


def page(plan: ServingPlan | TrainingPlan) -> str:
    """The whole page."""
    body = _serving(plan) if isinstance(plan, ServingPlan) else _training(plan)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{_text(plan.model)}: plan</title>'
        f"<style>{_STYLE}</style>{body}<p><small>Written by `moesaic plan`. {_source(plan)}</small></p></html>\n"
    )


def _serving(plan: ServingPlan) -> str:
    serving = plan.serving
    device, stages = serving.machine.device, serving.stages
    title = f"{plan.model} in {serving.formats.name} on {serving.machine.name}"
    users = f"{serving.users} user{'s' * (serving.users > 1)} of {serving.context:,} tokens"
    parts = [
        f"<h1>{_text(title)}</h1><p>{_text(f'{serving.layout}; {users}; routing: {serving.routing.name}')}</p>",
        f'<p class="verdict">{_text(plan.verdict.line)}</p>',
        "<h2>Does it fit?</h2>",
        _wide(memory_stack(stages, device.name, _stage_names(serving.layout))),
        _table(["", "the fullest device", "share"], plan_text.memory_rows(plan.memory)),
        "<h2>How fast?</h2>",
        _wide(roofline(plan.decode, device, "operations of a decode step under the roofs")),
        _table(["decode step", "time", "share", "bound by", "FLOP/byte", "reads"], plan_text.step_rows(plan.decode)),
        _wide(roofline(plan.prefill, device, "operations of a prefill step under the roofs")),
        "<h2>Batch and latency</h2>",
        _wide(_curve(plan)),
        _table(
            ["users", "step", "tokens/s each", "of all", "$/M", "experts read", "bound by", "fits"],
            plan_text.curve_rows(plan),
        ),
    ]
    if plan.dense:
        parts += [
            "<h2>Would a dense model do?</h2>",
            _wide(_dense(plan)),
            _table(["a dense model of", "parameters", "the MoE's step is"], plan_text.dense_rows(plan)),
        ]
    parts += ["<h2>How much?</h2>", _table(["", ""], plan_text.cost_rows(plan))]
    return "".join(parts)


def _training(plan: TrainingPlan) -> str:
    run = plan.run
    device = run.machine.device
    rows = [
        ["a step", f"{plan.step_s:,.2f} s"],
        ["tokens/s", f"{plan.tokens_per_second:,.0f}"],
        ["of the stated rate (MFU)", f"{plan.flops_utilisation:.1%}"],
    ]
    if plan.cost is not None:
        rows.append(["device hours", f"{plan.cost.device_hours:,.0f}"])
        rows.append(["$", "-" if plan.cost.dollars is None else f"{plan.cost.dollars:,.0f}"])
    return "".join(
        [
            f"<h1>Training {_text(plan.model)} on {_text(run.machine.name)}</h1><p>{_text(str(run.layout))}</p>",
            f'<p class="verdict">{_text(plan.verdict.line)}</p>',
            "<h2>Does it fit?</h2>",
            _wide(memory_stack(run.stages, device.name, _stage_names(run.layout))),
            _table(["", "the fullest device", "share"], plan_text.memory_rows(plan.memory)),
            "<h2>How fast?</h2>",
            _wide(roofline(run.forward(), device, "operations of a forward pass under the roofs")),
            _table(["", ""], rows),
        ]
    )


def _curve(plan: ServingPlan) -> str:
    points = [point for point in plan.curve if point.fits] or list(plan.curve)
    lines = [
        Line("tokens/s of all", [(point.users, point.rate) for point in points], COLORS[0]),
        Line("tokens/s of each", [(point.users, point.user_rate) for point in points], COLORS[1]),
    ]
    here = (plan.serving.users, plan.tokens_per_second)
    marks = [Mark(*here, 6, COLORS[2], "this plan", f"{here[0]} users: {here[1]:,.0f} tokens/s")]
    return log_chart(
        "tokens a second over users", lines, x_label="texts written at once", y_label="tokens/s", marks=marks
    )


def _dense(plan: ServingPlan) -> str:
    lines = [
        Line(f"of {plan_text.EQUAL[name]}", list(zip(BATCHES, found.ratios, strict=True)), COLORS[index])
        for index, (name, found) in enumerate(plan.dense.items())
    ]
    lines.append(Line("as fast", [(BATCHES[0], 1.0), (BATCHES[-1], 1.0)], "#999", dashed=True))
    return log_chart(
        "the MoE's step over a dense model's", lines, x_label="texts written at once", y_label="times as long"
    )


def _source(plan: ServingPlan | TrainingPlan) -> str:
    device = (plan.serving if isinstance(plan, ServingPlan) else plan.run).machine.device
    share = device.efficiency
    return _text(
        f"{device.name}: {device.source} ({device.date}). Reckoned with {share.memory:.0%} of its bandwidth, "
        f"{share.compute:.0%} of its arithmetic, {share.network:.0%} of its links, and {share.kernel_s * 1e6:.1f} us "
        "for starting each operation."
    )


def _table(heads: Sequence[str], rows: Rows) -> str:
    head = "".join(f"<th>{_text(each)}</th>" for each in heads)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _wide(picture: str) -> str:
    """What scrolls by itself where the page is narrow."""
    return f'<div class="wide">{picture}</div>'


def _stage_names(layout: Layout) -> list[str]:
    """Of each pipeline stage: its devices hold as much each."""
    if layout.pp == 1:
        return ["the device" if layout.devices == 1 else f"each of {layout.devices}"]
    return [f"stage {number + 1}, each of {layout.stage_devices}" for number in range(layout.pp)]


def _text(value: str) -> str:
    return html.escape(value)
