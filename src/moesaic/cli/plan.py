"""`moesaic plan`: what a model needs of a machine and gets from it, before anything is bought. Loads no torch."""

import argparse
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from moesaic.cli import output
from moesaic.cli.plan_options import Settings, read_count, read_layout, read_settings, read_workload
from moesaic.errors import ConfigError
from moesaic.plan import cost, hardware
from moesaic.plan.formats import PACKINGS
from moesaic.plan.memory import Training
from moesaic.plan.plan import CONTEXT, ServingPlan, TrainingPlan, make_plan, read_model
from moesaic.plan.rates import measured_rates
from moesaic.plan.roofline import Speculation
from moesaic.plan.units import quantity

SUBVERBS = {
    "compare": "plan_compare",
    "verify": "plan_verify",
    "simulate": "plan_simulate",
    "claims": "plan_claims",
    "disclosed": "plan_disclosed",
}
"""First words that are no model: `moesaic.cli.<module>` with `run(args) -> int` takes the words after them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic plan`."""
    parser.epilog = (
        "example: moesaic plan deepseek-v3 --machine 8xh200 --users 64\n"
        "         moesaic plan --machine 8xh100 --task serve --users 50 --context 8k\n"
        "         moesaic plan deepseek-v3 --machine 16xh200 --users 256 --against deepseek-v3-2025-02 "
        "--workload input=2k,output=500,requests=10M,reasoning=3,retries=1.1,cached=0.5,batch_discount=0.5\n"
        "         moesaic plan deepseek-v3 --machine 16xh200 --users 256 --tokens 14.8T "
        "--set train_machine=2048xh800,served=10T --against deepseek-v3-2025-02\n"
        "         moesaic plan compare mixtral-8x7b llama-2-70b --machine 2xh100 --plot FILE\n"
        "         moesaic plan simulate deepseek-v3 --machine 2048xh800 --set rate=1500\n"
        "         moesaic plan verify\n"
        "         moesaic plan disclosed\n"
        "         moesaic plan claims"
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="MODEL",
        help="a preset, a folder, a config.json or a .gguf file; none: which models fit. `compare A B`: two side by "
        "side; `verify`: what was predicted beside what was measured; `simulate MODEL`: a cluster, event by event; "
        "`disclosed`, `claims`: what others published and what people write, beside what is predicted",
    )
    parser.add_argument(
        "--machine",
        metavar="NxDEVICE",
        help="such as 8xh100, rtx4090, m3-max, or `here`, which is measured (as few h100 as hold the model)",
    )
    parser.add_argument("--task", choices=["serve", "train"], default="serve", help="what it is for (%(default)s)")
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        help=f"of the weights: {', '.join(PACKINGS)}; by role: bf16,experts=mxfp4 (as the model was released)",
    )
    parser.add_argument(
        "--cache", choices=["bf16", "fp8", "int8"], default="bf16", help="format of the cache (%(default)s)"
    )
    parser.add_argument(
        "--context", metavar="N", help=f"tokens of a text, such as 8k ({CONTEXT}, or what the model takes)"
    )
    parser.add_argument("--users", metavar="N", help="texts written at once (1)")
    parser.add_argument(
        "--layout", metavar="A=N,..", help="how it is spread: tp, ep, etp, pp, dp, redundant (the fastest that fits)"
    )
    parser.add_argument(
        "--routing",
        metavar="FILE",
        help="a routing trace of this model (experts are chosen evenly); with simulate also `uniform`, `recorded` "
        'or JSON {"loads": [[...], ...]} (recorded)',
    )
    parser.add_argument(
        "--speculate", metavar="N[,A]", help="N drafted tokens a step, of which a share A is accepted (0; 0.7)"
    )
    parser.add_argument(
        "--workload",
        metavar="A=V,..",
        help="a month's: input, output (tokens of a request), requests, reasoning, retries, cached, batch_discount",
    )
    parser.add_argument("--price", metavar="AMOUNT", help="of one device, such as '2.5 $/h' (as the table has it)")
    parser.add_argument("--against", metavar="NAME,..", help="API prices to compare with; `all` lists them")
    parser.add_argument(
        "--tokens",
        metavar="N",
        help="trained on so many, such as 14.8T: what that takes (--task train), or a whole life of it and of serving",
    )
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        default=[],
        help="a finer setting: overlap, utilisation, quality, host_memory, ssd, ssd_bandwidth, recompute, zero, "
        "micro_batch, batch_tokens; of a whole life (--tokens): served (output tokens), train_machine",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="write a page with pictures (HTML; with disclosed and claims Markdown)"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="with compare: draw both over batches, with simulate what waits, as an SVG file"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Plan and report. Returns the exit code."""
    words: list[str] = args.words
    if words and words[0] in SUBVERBS and not Path(words[0]).exists():
        return importlib.import_module(f"moesaic.cli.{SUBVERBS[words[0]]}").run(args)
    if args.plot:
        raise ConfigError("--plot draws `moesaic plan compare A B`; --report writes a page about one model")
    if len(words) > 1:
        raise ConfigError(f"{len(words)} words {' '.join(words)}; give one MODEL, or `compare A B`")
    if args.against == "all":
        return _list_prices(args)
    if not words:
        return importlib.import_module("moesaic.cli.plan_which").run(args)
    plan = plan_of(words[0], args)
    if args.report:
        from moesaic.cli import plan_report

        Path(args.report).write_text(plan_report.page(plan), encoding="utf-8")
        output.talk(f"written: {args.report}")
    if args.json:
        output.print_json(plan.to_dict())
        return 0
    from moesaic.cli import plan_text

    plan_text.show(plan)
    return 0


def plan_of(model: str, args: argparse.Namespace) -> ServingPlan | TrainingPlan:
    """The plan that the options ask for. Raises ConfigError for those that make no sense."""
    settings = read_settings(args.set)
    if not args.tokens and (settings.served is not None or settings.train_machine is not None):
        raise ConfigError("served or train_machine without --tokens; give the budget it is trained on, such as 14.8T")
    return make_plan(
        model,
        machine=machine_of(args.machine, args.price, settings),
        task=args.task,
        format=args.format,
        cache=args.cache,
        context=None if args.context is None else read_count("--context", args.context, binary=True),
        users=1 if args.users is None else read_count("--users", args.users),
        layout=None if args.layout is None else read_layout(args.layout),
        routing=_routing(args.routing, model),
        speculation=speculation_of(args.speculate),
        overlap=settings.overlap,
        workload=None if args.workload is None else read_workload(args.workload),
        utilisation=settings.utilisation,
        prices=_prices(args.against),
        quality=settings.quality,
        training=_training(settings),
        batch_tokens=settings.batch_tokens,
        train_tokens=None if args.tokens is None else quantity(args.tokens, "tokens", "--tokens"),
        train_machine=settings.train_machine,
        served=settings.served,
    )


def machine_of(text: str | None, price: str | None, settings: Settings) -> hardware.Machine | None:
    """The machine of this name with what the options say of it; None where none is named."""
    dollars = None if price is None else quantity(price, "$/h", "--price")
    if text is None:
        if price is not None or settings.host_memory or settings.ssd:
            raise ConfigError("--price, host_memory or ssd without --machine; name one, such as 8xh100")
        return None
    machine = _here() if text.strip().lower() == "here" else hardware.find_machine(text)
    return replace(
        machine.with_price(dollars),
        host_bytes=settings.host_memory or machine.host_bytes,
        host_bandwidth=settings.host_bandwidth or machine.host_bandwidth,
        ssd_bytes=settings.ssd or machine.ssd_bytes,
        ssd_bandwidth=settings.ssd_bandwidth or machine.ssd_bandwidth,
    )


def _here() -> hardware.Machine:
    """This machine: as it was measured before, or measured now, which takes half a minute and torch."""
    try:
        found, rates = hardware.measured_here(), measured_rates()
    except ConfigError:
        output.talk(f"{hardware.here_file()} is of another version, or damaged: this machine is measured again")
        found = rates = None
    if found is None:
        from moesaic.bench import here

        with output.progress("measuring this machine"):
            found, rates = here.measure()
    if rates is not None and rates.busy:
        output.talk(
            f"this machine was measured while {rates.busy}; when it is quiet, delete {hardware.here_file()}, and it is "
            "measured again"
        )
    return found


def speculation_of(text: str | None) -> Speculation | None:
    if text is None:
        return None
    count, _, share = text.partition(",")
    drafts = read_count("--speculate", count)
    try:
        return Speculation(drafts=drafts, acceptance=float(share) if share else 0.7)
    except ValueError as error:
        raise ConfigError(f"--speculate {text}; give drafts and the accepted share, such as 2,0.8") from error


def _routing(path: str | None, model: str) -> Any:
    if path is None:
        return None
    from moesaic.plan.traced import open_routing

    return open_routing(path, read_model(model)[1])


def _prices(names: str | None) -> tuple[cost.Price, ...]:
    return () if names is None else tuple(cost.find_price(name.strip()) for name in names.split(","))


def _training(settings: Settings) -> Training | None:
    given = {"recompute": settings.recompute, "zero": settings.zero, "tokens": settings.micro_batch}
    return Training(**{name: value for name, value in given.items() if value is not None})


def _list_prices(args: argparse.Namespace) -> int:
    known = cost.prices()
    if args.json:
        output.print_json({name: vars(price) for name, price in known.items()})
        return 0
    rows = [
        [
            name,
            f"{price.input:g}",
            "-" if price.cached is None else f"{price.cached:g}",
            f"{price.output:g}",
            price.date,
            price.source,
        ]
        for name, price in known.items()
    ]
    output.table(["price", "input $/M", "cached", "output", "date", "source"], rows)
    output.talk(f"yours go into {cost.own_prices()}")
    output.next_command(f"moesaic plan deepseek-v3 --machine 16xh100 --against {next(iter(known))}")
    return 0
