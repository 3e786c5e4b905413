"""`moesaic plan compare A B`: two models on one machine, side by side: the dense-or-MoE decision."""

import argparse
from pathlib import Path
from typing import Any

from moesaic.cli import output
from moesaic.cli.plan import plan_of
from moesaic.cli.plan_plots import COLORS, Line, log_chart
from moesaic.errors import ConfigError
from moesaic.plan.plan import ServingPlan


def run(args: argparse.Namespace) -> int:
    """Plan both and print them side by side. Returns the exit code."""
    models = args.words[1:]
    if len(models) != 2:
        raise ConfigError(
            f"plan compare takes two models, and here are {len(models)}; write `moesaic plan compare A B`"
        )
    if args.machine is None:
        raise ConfigError("plan compare needs a --machine, so that both stand on the same, such as 8xh100")
    if args.report:
        raise ConfigError("plan compare has no --report; --plot FILE draws both, and --report is of one MODEL")
    if args.task != "serve":
        raise ConfigError("plan compare is about serving; leave --task out")
    plans = [plan for plan in (plan_of(model, args) for model in models) if isinstance(plan, ServingPlan)]
    if args.plot:
        Path(args.plot).write_text(_plot(plans), encoding="utf-8")
        output.talk(f"drawn: {args.plot}")
    if args.json:
        output.print_json({"models": [plan.to_dict() for plan in plans], "faster": _faster(plans)})
        return 0
    output.write(f"{_verdict(plans)}\n\n")
    output.table(["", *(plan.model for plan in plans)], _rows(plans), f"on {plans[0].serving.machine.name}")
    output.write("\n")
    rows = [[f"{a.users:,}", *_cells(a, b)] for a, b in zip(*(_common(plans)), strict=True)]
    columns = [
        "users",
        *(f"{plan.model} tokens/s" for plan in plans),
        *(f"{plan.model} $/M" for plan in plans),
        "faster",
    ]
    output.table(columns, rows)
    output.next_command(f"moesaic plan {models[0]} --machine {plans[0].serving.machine.name}")
    return 0


def _common(plans: list[ServingPlan]) -> tuple[list[Any], list[Any]]:
    """The points of both at the same batches."""
    shared = {point.users for point in plans[0].curve} & {point.users for point in plans[1].curve}
    first, second = ([point for point in plan.curve if point.users in shared] for plan in plans)
    return first, second


def _cells(a: Any, b: Any) -> list[str]:
    rates = [f"{point.rate:,.0f}{'' if point.fits else ' (too many)'}" for point in (a, b)]
    dollars = ["-" if point.dollars is None else f"{point.dollars:,.2f}" for point in (a, b)]
    ratio = a.rate / b.rate
    return [*rates, *dollars, f"the first, {ratio:.2f}x" if ratio >= 1 else f"the second, {1 / ratio:.2f}x"]


def _faster(plans: list[ServingPlan]) -> dict[str, list[int]]:
    """At which batches which of them writes more tokens a second."""
    found: dict[str, list[int]] = {plan.model: [] for plan in plans}
    for a, b in zip(*_common(plans), strict=True):
        found[plans[0].model if a.rate >= b.rate else plans[1].model].append(a.users)
    return found


def _verdict(plans: list[ServingPlan]) -> str:
    """Who is faster from which batch on, where both fit, and at what memory."""
    misfits = [plan.model for plan in plans if not plan.fits]
    if misfits:
        return f"{' and '.join(misfits)} do{'es' * (len(misfits) == 1)} not fit; the times below are as if"
    faster = _faster(plans)
    sizes = ", ".join(f"{plan.model} {output.size(plan.memory.total)} a device" for plan in plans)
    for plan in plans:
        if not faster[plan.model]:
            other = next(each for each in plans if each is not plan)
            return f"{other.model} is faster at every batch ({sizes})"
    words = [f"{name} at {', '.join(map(str, batches))}" for name, batches in faster.items()]
    return f"faster by users at once: {'; '.join(words)} ({sizes})"


def _rows(plans: list[ServingPlan]) -> list[list[str]]:
    def row(name: str, of: Any) -> list[str]:
        return [name, *(of(plan) for plan in plans)]

    def dollars(value: float | None) -> str:
        return "-" if value is None else f"{value:,.2f}"

    return [
        row("parameters", lambda plan: output.number(plan.serving.config.total)),
        row("active", lambda plan: output.number(plan.serving.config.active_gemm)),
        row("format", lambda plan: plan.serving.formats.name),
        row("layout", lambda plan: str(plan.serving.layout)),
        row("the fullest device", lambda plan: f"{plan.memory.total / plan.memory.capacity:.0%}"),
        row("most users", lambda plan: f"{plan.most_users:,}"),
        row("tokens/s of each user", lambda plan: f"{plan.tokens_per_second / plan.serving.users:,.1f}"),
        row("prompt tokens/s", lambda plan: f"{plan.prefill.step.tokens / plan.prefill.seconds:,.0f}"),
        row("bound by", lambda plan: plan.verdict.binds),
        row("$ a million output tokens", lambda plan: dollars(plan.cost.output)),
        row("$ a month of the workload", lambda plan: dollars(plan.cost.month)),
    ]


def _plot(plans: list[ServingPlan]) -> str:
    lines = [
        Line(plan.model, [(point.users, point.rate) for point in plan.curve if point.fits] or [(1, 1)], COLORS[index])
        for index, plan in enumerate(plans)
    ]
    title = f"tokens a second of all users on {plans[0].serving.machine.name}"
    return log_chart(title, lines, x_label="texts written at once", y_label="tokens/s")
