"""A plan as text: the verdict first, then whether it fits, how fast it is, what it costs."""

from collections.abc import Sequence

from moesaic.cli import output
from moesaic.plan.hardware import Device
from moesaic.plan.lifetime import Lifetime, Other
from moesaic.plan.memory import DeviceMemory
from moesaic.plan.plan import ServingPlan, TrainingPlan
from moesaic.plan.roofline import StepTime


def show(plan: ServingPlan | TrainingPlan) -> None:
    """Print it, the verdict as the first line."""
    output.write(f"{plan.verdict.line}\n\n")
    if isinstance(plan, ServingPlan):
        _show_serving(plan)
    else:
        _show_training(plan)


def _show_serving(plan: ServingPlan) -> None:
    serving = plan.serving
    title = (
        f"{plan.model} in {serving.formats.name} on {serving.machine.name} ({serving.layout}), {serving.users} "
        f"user{'s' * (serving.users > 1)} of {serving.context:,} tokens, routing: {serving.routing.name}"
    )
    output.table(["fits?", "the fullest device", "share"], memory_rows(plan.memory), title)
    output.write("\n")
    if plan.offload is not None:
        _show_offload(plan)
    output.table(["how fast?" if plan.fits else "how fast, if it fit?", ""], _speed_rows(plan))
    output.write("\n")
    output.table(["decode step", "time", "share", "bound by", "FLOP/byte", "reads"], step_rows(plan.decode))
    output.write("\n")
    output.table(
        ["users", "step", "tokens/s each", "of all", "$/M", "experts read", "bound by", "fits"], curve_rows(plan)
    )
    output.write("\n")
    if plan.dense:
        output.table(["instead of it a dense model of", "parameters", "the MoE's step is"], dense_rows(plan))
        output.write("\n")
    output.table(["how much?", ""], cost_rows(plan))
    if plan.lifetime is not None:
        output.write("\n")
        output.table(LIFETIME_COLUMNS, lifetime_rows(plan.lifetime, plan.model), lifetime_title(plan.lifetime))
    device = serving.machine.device
    output.talk(f"{device.name}: {device.source} ({device.date}); {_price(device)}")
    output.next_command(f"moesaic plan {plan.model} --machine {serving.machine.name} --report plan.html")


def _price(device: Device) -> str:
    return f"price {device.price_range} $/h" if device.price_range else "its price is not stated"


def memory_rows(memory: DeviceMemory) -> list[list[str]]:
    """What takes how much of the fullest device."""
    rows = [
        [name, output.size(size), f"{size / memory.capacity:.1%}"]
        for name, size in sorted(memory.parts.items(), key=lambda part: -part[1])
        if size
    ]
    free = output.size(abs(memory.free))
    return [
        *rows,
        ["in all", output.size(memory.total), f"{memory.total / memory.capacity:.1%}"],
        ["free" if memory.fits else "missing", free, f"{abs(memory.free) / memory.capacity:.1%}"],
    ]


def _speed_rows(plan: ServingPlan) -> list[list[str]]:
    serving, drafts = plan.serving, plan.serving.speculation.drafts
    rows = [
        ["tokens/s, of all users", f"{plan.tokens_per_second:,.1f}"],
        ["tokens/s, of each", f"{plan.tokens_per_second / serving.users:,.1f}"],
        ["prompt tokens/s", f"{plan.prefill.step.tokens / plan.prefill.seconds:,.0f}"],
        [f"first token of a prompt of {serving.context // 2:,}", _time(plan.first_token_s)],
        [f"most users of {serving.context:,} tokens", f"{plan.most_users:,}"],
    ]
    if isinstance(plan.engine, str):
        rows.append(["with moesaic's engine, by its kernels", plan.engine])
    elif plan.engine is not None:
        rate = serving.users / plan.engine.decode.seconds
        rows.append(["with moesaic's engine, by its kernels: tokens/s of all", f"{rate:,.1f}"])
        rows.append(["with moesaic's engine: prompt tokens/s", f"{plan.engine.prompt_rate:,.0f}"])
    if drafts:
        words = f"{drafts} drafts a step, {serving.speculation.acceptance:.0%} accepted"
        rows.append([words, f"{serving.speculation.tokens_per_step:.2f} tokens a step"])
    return rows


def step_rows(step: StepTime) -> list[list[str]]:
    """Each operation, the longest first, and what is sent."""
    whole = step.working + step.sending
    rows = [
        [
            op.op.name,
            _time(op.seconds),
            f"{op.seconds / whole:.1%}",
            op.by,
            f"{op.op.intensity:,.1f}",
            output.size(op.op.num_bytes),
        ]
        for op in sorted(step.ops, key=lambda op: -op.seconds)
    ]
    if step.sending:
        sent = step.traffic.link_bytes + step.traffic.network_bytes
        rows.append(["sending", _time(step.sending), f"{step.sending / whole:.1%}", "network", "-", output.size(sent)])
    return [*rows, ["in all", _time(step.seconds), "", step.bound_by, "", ""]]


def curve_rows(plan: ServingPlan) -> list[list[str]]:
    """Growing batches."""
    return [
        [
            f"{point.users:,}",
            _time(point.seconds),
            f"{point.user_rate:,.1f}",
            f"{point.rate:,.0f}",
            "-" if point.dollars is None else f"{point.dollars:,.2f}",
            f"{point.distinct:.0%}",
            point.by,
            "yes" if point.fits else "no",
        ]
        for point in plan.curve
    ]


EQUAL: dict[str, str] = {"active": "equal active size", "quality": "about equal quality", "total": "equal total size"}


def dense_rows(plan: ServingPlan) -> list[list[str]]:
    """Against dense models, by batch."""
    return [
        [EQUAL[equal], output.number(found.dense_parameters), found.in_words] for equal, found in plan.dense.items()
    ]


def cost_rows(plan: ServingPlan) -> list[list[str]]:
    """Dollars and energy at the utilisation, and the month's workload here and at API prices."""
    found, work = plan.cost, plan.workload
    busy = f"at {plan.utilisation:.0%} utilisation"
    rows = []
    if found.input is not None and found.output is not None and found.month is not None:
        rows += [
            [f"$ a million input tokens {busy}", f"{found.input:,.3f}"],
            [f"$ a million output tokens {busy}", f"{found.output:,.3f}"],
            [f"$ a month for {work.requests:,.0f} requests", f"{found.month:,.0f}"],
        ]
    rows.append(["machines that takes", f"{found.machines:,.2f}"])
    if found.joules_per_token is not None and found.output_kwh is not None:
        rows.append(["J an output token", f"{found.joules_per_token:,.2f}"])
        rows.append(["kWh a million output tokens", f"{found.output_kwh:,.2f}"])
    for price in plan.prices:
        rows.append([f"$ a month at {price.name} ({price.date}: {price.source})", f"{price.month(work):,.0f}"])
    return rows


LIFETIME_COLUMNS = ["a whole life", "$ training", "$ a million tokens", "$ in all", "this one is cheaper from"]


def lifetime_title(found: Lifetime) -> str:
    """What is trained and served."""
    return (
        f"trained on {output.number(found.training.tokens)} tokens ({found.training_machine}, "
        f"{found.training.days:,.0f} days), then {output.number(found.served)} output tokens ({found.months:,.0f} "
        "months of the workload; what is read for them is counted in)"
    )


def lifetime_rows(found: Lifetime, model: str) -> list[list[str]]:
    """The model, and what else would write the same."""
    own = found.training.dollars or 0.0
    rows = [[model, f"{own:,.0f}", f"{found.per_million:,.2f}", f"{found.total:,.0f}", "-"]]
    for other in found.others:
        figures = [f"{other.training:,.0f}", f"{other.per_million:,.2f}", f"{other.total:,.0f}"]
        rows.append([other.name, *figures, _cheaper(other)])
    return rows


def _cheaper(other: Other) -> str:
    if other.ours_from is None:
        return "never"
    if other.ours_from:
        return f"from {output.number(other.ours_from)} tokens on"
    return "always" if other.ours_until is None else f"up to {output.number(other.ours_until)} tokens"


def _show_offload(plan: ServingPlan) -> None:
    found = plan.offload
    assert found is not None, "asked only where there is one"
    rows = [[tier.name, str(tier.experts), output.size(tier.bandwidth) + "/s"] for tier in found.tiers]
    seconds = plan.decode.seconds + found.seconds
    title = (
        f"with experts elsewhere it fits: {found.hit:.0%} of choices are found near, a step takes {_time(seconds)} "
        f"({plan.serving.users / seconds:,.1f} tokens/s)"
    )
    output.table(["experts of a layer in", "number", "read at"], rows, title)
    if found.computed_on_host:
        output.talk("at so small a batch it is quicker to compute missing experts where they lie, than to fetch them")
    output.write("\n")


def _show_training(plan: TrainingPlan) -> None:
    run = plan.run
    title = (
        f"{plan.model} on {run.machine.name} ({run.layout}), steps of {run.batch_tokens:,.0f} tokens in sequences of "
        f"{run.sequence_length:,}, {run.formats.name}, ZeRO-{run.training.zero}, recompute: {run.training.recompute}"
    )
    output.table(["fits?", "the fullest device", "share"], memory_rows(plan.memory), title)
    output.write("\n")
    rows: list[Sequence[str]] = [
        ["a step", _time(plan.step_s)],
        ["tokens/s", f"{plan.tokens_per_second:,.0f}"],
        ["of the stated rate (MFU)", f"{plan.flops_utilisation:.1%}"],
    ]
    if plan.cost is not None:
        rows += [
            [f"{output.number(plan.cost.tokens)} tokens: device hours", f"{plan.cost.device_hours:,.0f}"],
            ["days", f"{plan.cost.days:,.1f}"],
            ["$", "-" if plan.cost.dollars is None else f"{plan.cost.dollars:,.0f}"],
            ["MWh", "-" if plan.cost.kwh is None else f"{plan.cost.kwh / 1e3:,.1f}"],
        ]
    output.table(["how fast?", ""], rows)
    output.next_command(f"moesaic plan {plan.model} --machine {run.machine.name} --task serve")


def _time(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:,.0f} us"
    return f"{seconds * 1e3:,.2f} ms" if seconds < 1 else f"{seconds:,.2f} s"
