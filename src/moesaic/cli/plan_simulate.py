"""`moesaic plan simulate MODEL`: a cluster that trains or serves it, event by event."""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moesaic.cli import output
from moesaic.cli.plan_options import read_layout, read_pairs
from moesaic.config import ModelConfig
from moesaic.errors import ConfigError
from moesaic.plan.cluster.outcome import ServingOutcome
from moesaic.plan.cluster.requests import Workload
from moesaic.plan.cluster.serving import Serving
from moesaic.plan.cluster.simulate import PoolSizes, Setup, simulate_serving, simulate_training
from moesaic.plan.cluster.training import TrainingOutcome
from moesaic.plan.cluster.troubles import Troubles
from moesaic.plan.formats import Formats, as_released, named
from moesaic.plan.hardware import Machine, find_machine

EXAMPLE = "moesaic plan simulate deepseek-v3 --machine 2048xh800 --set rate=1500"

_REQUESTS = ("rate", "prompt", "output", "spread", "cached", "arrivals")
_POOLS = ("prefill_ranks", "decode_ranks", "prefill_share", "chunk")
_SETUP = ("placement", "redundant", "overlap", "seed")
_TROUBLES = ("hours_between", "repair_s", "slow_share", "slowdown")
_STEP = ("micro_batches", "sequence", "schedule")
_WORDS = ("arrivals", "placement", "schedule")
_WHOLE = ("prefill_ranks", "decode_ranks", "chunk", "redundant", "seed", "micro_batches", "sequence")
SERVING = (*_REQUESTS, *_POOLS, *_SETUP, *_TROUBLES, "seconds")
TRAINING = (*_STEP, *_SETUP, *_TROUBLES)
"""What `--set` takes, by task."""


def run(args: argparse.Namespace) -> int:
    """Simulate and report. Returns the exit code."""
    from moesaic.plan.plan import read_model

    if len(args.words) != 2:
        raise ConfigError(f"plan simulate takes one model, and here are {len(args.words) - 1}; write `{EXAMPLE}`")
    if args.machine is None:
        raise ConfigError(f"plan simulate needs a --machine with its number of devices; write `{EXAMPLE}`")
    config = read_model(args.words[1])[1]
    formats = named(args.format or as_released(config.family), args.cache)
    settings = read(args.set, SERVING if args.task == "serve" else TRAINING)
    machine = find_machine(args.machine)
    if args.task == "train":
        return _train(args, config, formats, machine, settings)
    return _serve(args, config, formats, machine, settings)


def read(pairs: list[str], known: tuple[str, ...]) -> dict[str, Any]:
    """What `--set NAME=VALUE` says. Raises ConfigError for unknown names and what is no number."""
    found: dict[str, Any] = {}
    for pair in pairs:
        for name, value in read_pairs("--set", pair, known).items():
            try:
                found[name] = value if name in _WORDS else int(value) if name in _WHOLE else float(value)
            except ValueError as error:
                kind = "a whole number" if name in _WHOLE else "a number"
                raise ConfigError(f"--set {name}={value}; give {kind}") from error
    return found


def _some(settings: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: settings[name] for name in names if name in settings}


def _train(
    args: argparse.Namespace, config: ModelConfig, formats: Formats, machine: Machine, settings: dict[str, Any]
) -> int:
    if args.plot:
        raise ConfigError("--plot draws a minute of serving; leave it out with --task train")
    setup = {"routing": args.routing or "uniform", "redundant": 0} | _some(settings, _SETUP)
    result = simulate_training(
        config,
        formats,
        machine,
        layout=read_layout(args.layout) if args.layout else None,
        setup=Setup(**setup),
        troubles=Troubles(**_some(settings, _TROUBLES)),
        **_some(settings, _STEP),
    )
    if args.json:
        extra = {"tokens_per_device_s": result.tokens_per_device_s, "hours_per_trillion": result.hours_per_trillion}
        output.print_json(asdict(result) | extra)
        return 0
    output.table(["one step", "value"], _training_rows(result), f"{args.words[1]} on {machine.name}")
    output.next_command(f"moesaic plan {args.words[1]} --task train --machine {machine.name} --tokens 1T")
    return 0


def _training_rows(result: TrainingOutcome) -> list[list[str]]:
    rows = [
        ["takes", f"{result.step_s:.2f} s for {output.number(result.tokens)} tokens"],
        ["of that pipeline, sums and update", f"{result.pipeline_s:.2f} s, {result.sync_s:.2f} s"],
        ["tokens a second of one device", f"{result.tokens_per_device_s:,.0f}"],
        ["a trillion tokens", f"{output.number(result.hours_per_trillion)} device hours"],
        ["lanes wait for one another", f"{result.idle:.1%} of the time"],
        ["sending that nothing hides", f"{result.exposed:.1%} of the time"],
        ["rows of the busiest rank over the mean", f"{result.busiest_over_mean:.3f}"],
        ["sent between experts' devices", output.size(result.bytes_sent)],
    ]
    if result.failures:
        rows.append(["lost to failures", f"{result.failures} of them, {output.duration(result.lost_s)}"])
    return [*rows, ["events", f"{result.events:,}"]]


def _serve(
    args: argparse.Namespace, config: ModelConfig, formats: Formats, machine: Machine, settings: dict[str, Any]
) -> int:
    from moesaic.cli.plan import speculation_of

    if args.layout:
        raise ConfigError("--layout is for --task train; serving takes --set prefill_ranks=N,decode_ranks=N")
    run, result = simulate_serving(
        config,
        formats,
        machine,
        Workload(**_some({"rate": 100.0} | settings, _REQUESTS)),
        sizes=PoolSizes(**_some(settings, _POOLS)),
        setup=Setup(routing=args.routing or "recorded", **_some(settings, _SETUP)),
        troubles=Troubles(**_some(settings, _TROUBLES)),
        speculation=speculation_of(args.speculate),
        seconds=settings.get("seconds", 60.0),
    )
    if args.plot:
        from moesaic.cli import plan_serving_plot

        Path(args.plot).write_text(plan_serving_plot.draw(run), encoding="utf-8")
        output.talk(f"drawn: {args.plot}")
    if args.json:
        output.print_json(result.to_json())
        return 0
    title = f"{result.seconds:g} s of {args.words[1]} on {machine.name}, {run.workload.rate:g} requests a second"
    output.table(["serving", "value"], _serving_rows(run, result), title)
    again = ",".join(f"{name}={value}" for name, value in (settings | {"rate": f"{2 * run.workload.rate:g}"}).items())
    output.next_command(f"moesaic plan simulate {args.words[1]} --machine {args.machine} --set {again}")
    return 0


def _serving_rows(run: Serving, result: ServingOutcome) -> list[list[str]]:
    pools, places = run.pools, result.requests
    first, between = result.first_token_s, result.between_tokens_s
    return [
        ["prefill", f"{pools.prefills} units of {pools.prefill.ranks}, {pools.decode.device.name}"],
        ["decode", f"{pools.decodes} units of {pools.decode.ranks}, {pools.decode.redundant} replicas of experts"],
        ["busiest rank's rows over the mean", f"{pools.decode.placed.mean_uneven:.3f} (decode)"],
        ["input", f"{result.input_per_s:,.0f} tokens/s, {result.input_per_node_s:,.0f} a prefill node"],
        ["output", f"{result.output_per_s:,.0f} tokens/s, {result.output_per_node_s:,.0f} a decode node"],
        ["first token", f"{first['p50']:.2f} s (median), {first['p99']:.2f} s (one in a hundred waits longer)"],
        ["between tokens", f"{1e3 * between['p50']:.1f} ms (median), {1e3 * between['p99']:.1f} ms (99 %)"],
        ["a user gets", f"{result.tokens_per_user_s:.1f} tokens/s"],
        ["texts of a device", f"{result.texts_per_rank:.1f}"],
        ["requests", ", ".join(f"{count:,} {place.replace('_', ' ')}" for place, count in places.items())],
        ["failures", f"{result.failures}; {output.size(result.lost_state_bytes)} of states lost"],
        ["events", f"{result.events:,}"],
    ]
