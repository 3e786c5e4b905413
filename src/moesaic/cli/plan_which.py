"""`moesaic plan` without a model: which ones a machine serves."""

import argparse

from moesaic.cli import output
from moesaic.cli.plan import machine_of
from moesaic.cli.plan_options import read_count, read_settings
from moesaic.errors import ConfigError
from moesaic.plan.plan import CONTEXT
from moesaic.plan.which import which


def run(args: argparse.Namespace) -> int:
    """Rank the presets that fit. Returns the exit code."""
    if args.machine is None:
        raise ConfigError("plan takes a MODEL, or --machine to say which models fit; `moesaic plan --help` tells more")
    if args.report:
        raise ConfigError("--report writes a page about one model; name a MODEL, or leave it out")
    if args.task != "serve":
        raise ConfigError("--task train needs a MODEL; without one, models are ranked for serving")
    machine = machine_of(args.machine, args.price, read_settings(args.set))
    assert machine is not None, "one is named"
    users = 1 if args.users is None else read_count("--users", args.users)
    context = CONTEXT if args.context is None else read_count("--context", args.context, binary=True)
    found = which(machine, users=users, context=context, formats=(args.format,) if args.format else None)
    if args.json:
        output.print_json({"machine": machine.name, "models": [choice._asdict() for choice in found]})
        return 0
    rows = [
        [
            choice.model,
            choice.format,
            choice.layout,
            output.number(choice.size),
            f"{choice.memory_share:.0%}",
            f"{choice.rate:,.1f}",
            f"{choice.most_users:,}",
            "-" if choice.dollars is None else f"{choice.dollars:,.2f}",
        ]
        for choice in found
    ]
    asked = f"{users} user{'s' * (users > 1)} of {context:,} tokens"
    title = f"{machine.name}, {asked}; the best first, by size of a dense model as good"
    columns = ["model", "format", "layout", "as good as", "memory", "tokens/s each", "most users", "$/M output"]
    output.table(columns, rows, title)
    output.talk('"as good as" is the geometric mean of total and active parameters, a rule of thumb')
    output.next_command(
        f"moesaic plan {found[0].model} --format {found[0].format} --machine {machine.name} --users {users}"
    )
    return 0
