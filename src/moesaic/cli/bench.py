"""`moesaic bench`: what this machine can do, the bound that sets to a model, and what of it the engine reaches."""

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli import bench_plot, foretelling, output
from moesaic.errors import ConfigError

if TYPE_CHECKING:  # at run time torch comes in only once the options make sense
    from moesaic.bench.reached import Case
    from moesaic.engine.engine import Engine

BITS = (8, 4)
PREFILL = 512


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic bench`."""
    parser.epilog = "example: moesaic bench runs/demo/moe --bits 4 --batch 1,8,32"
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint folder, a .gguf file, or a preset; one without weights here is timed with random ones",
    )
    parser.add_argument(
        "--bits", type=int, choices=BITS, help="pack the weights in 8 or 4 bits (as they are, if not given)"
    )
    parser.add_argument("--experts-bits", type=int, choices=BITS, help="those of routed experts (as --bits)")
    parser.add_argument(
        "--values",
        choices=("even", "uneven"),
        default="even",
        help="what 4 bits stand for: even steps, or uneven ones, which lose less and compute more (%(default)s)",
    )
    parser.add_argument("--batch", metavar="N,N", default="1,8,32", help="texts that are written at once (%(default)s)")
    parser.add_argument(
        "--prefill",
        metavar="N",
        type=int,
        help=f"tokens of a prompt; 0: none ({PREFILL}, or as many as the model takes)",
    )
    parser.add_argument("--threads", metavar="N", type=int, help="use N processors (all that this process may use)")
    parser.add_argument("--samples", metavar="N", type=int, default=7, help="take N of each figure (%(default)s)")
    parser.add_argument("--plot", metavar="FILE", help="draw reached and bound over batches as an SVG file")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """Measure and report. Returns the exit code."""
    from moesaic.hub.resolve import locate

    batches = _check(args)
    locate(args.model)  # a mistyped name is answered before seconds go into importing torch
    from moesaic.kernels import backend

    backend.choose("native")  # the engine has no other kernels: what is missing is said here
    importlib.import_module("moesaic.tune.upcycle")  # makes known the preset whose weights it makes
    document = _measure(args, batches)
    if args.plot:
        _plot(Path(args.plot), document)
    if args.json:
        output.print_json(document)
    else:
        _print(document)
    return 0


def _check(args: argparse.Namespace) -> list[int]:
    """The batches. Raises ConfigError for options that make no sense."""
    if args.experts_bits is not None and args.bits is None:
        raise ConfigError("--experts-bits without --bits, which says how many the other weights get; give both")
    if args.values == "uneven" and 4 not in (args.bits, args.experts_bits):
        raise ConfigError("--values uneven without --bits 4, which it is for; give both")
    words = args.batch.split(",")
    if not all(word.strip().isdecimal() and int(word) > 0 for word in words):
        raise ConfigError(f"--batch {args.batch}; give numbers of texts above 0, comma-separated: 1,8,32")
    for option, value in (("--threads", args.threads), ("--samples", args.samples)):
        if value is not None and value < 1:
            raise ConfigError(f"{option} {value}; give 1 or more")
    if args.plot and not Path(args.plot).parent.is_dir():
        raise ConfigError(f"--plot {args.plot}; there is no folder {Path(args.plot).parent}, make it first")
    return sorted({int(word) for word in words})


def _measure(args: argparse.Namespace, batches: list[int]) -> dict[str, Any]:
    from moesaic.bench import reached
    from moesaic.bench.machine import measure_machine
    from moesaic.bench.probes import Probes
    from moesaic.bench.report import report

    prefill = _prefill(args)
    engine, dtype, drawn = _open(args, max(prefill + 1, reached.PROMPT_TOKENS + reached.MOST_STEPS))
    threads = engine.program.native.threads
    with output.progress("measuring the machine"):
        machine, probes = measure_machine(threads), Probes(threads)
    kept = reached.held(engine, dtype)
    cases: list[Case] = [reached.decode_case(engine, kept, batch) for batch in batches]
    if prefill:
        cases.append(reached.prefill_case(engine, kept, prefill))
    with output.progress("sampling", total=args.samples * len(cases)) as advance:
        reached.take_samples(engine, probes, cases, args.samples, lambda name: advance(1, note=name))
    foretelling.keep_bench(args.model, kept, [(case, _context(case)) for case in cases], threads)
    settings = {
        "model": args.model,
        "random_weights": drawn,
        "bits": args.bits,
        "experts_bits": args.experts_bits or args.bits,
        "values": args.values,
    }
    return settings | report(machine, kept, cases)


def _context(case: "Case") -> float:
    """Tokens that its texts have in the middle of a sample."""
    from moesaic.bench import reached

    return case.tokens if case.name.startswith("prefill") else reached.PROMPT_TOKENS + case.steps / 2


def _prefill(args: argparse.Namespace) -> int:
    """Tokens of the prompt. Raises ConfigError for one that the model cannot go on from."""
    from moesaic import hub
    from moesaic.engine.builder import longest

    most = longest(hub.read_config(args.model)) - 1
    if args.prefill is None:
        return min(PREFILL, most)
    if not 0 <= args.prefill <= most:
        raise ConfigError(f"--prefill {args.prefill}; this model takes prompts of 1 to {most} tokens, and 0 is none")
    return args.prefill


def _open(args: argparse.Namespace, max_length: int) -> "tuple[Engine, Any, bool]":
    """The engine, the dtype of what it does not round, and whether its weights were drawn."""
    from moesaic import hub
    from moesaic.bench.drawn import DrawnWeights
    from moesaic.engine.engine import Engine
    from moesaic.engine.weights import FileWeights
    from moesaic.hub.resolve import PRESET_WEIGHTS, locate, weights_place
    from moesaic.hub.sources import open_source

    place = locate(args.model)
    drawn = place.kind == "config" or (place.kind == "preset" and place.name not in PRESET_WEIGHTS)
    if drawn:
        output.talk(f"{args.model} brings no weights; its times are taken with random ones, which route almost evenly")
        weights = DrawnWeights(hub.read_config(args.model))
    else:
        weights = FileWeights(open_source(weights_place(args.model)))
    with output.progress(f"packing {args.model}"):
        engine = Engine(
            weights,
            bits=args.bits,
            experts_bits=args.experts_bits,
            values=args.values,
            threads=args.threads,
            max_length=max_length,
        )
    return engine, weights.dtype, drawn


def _print(document: dict[str, Any]) -> None:
    machine = document["machine"]
    output.table(("this machine", "per second", "range"), _machine_rows(machine), _machine_title(machine))
    output.write("\n")
    rows = [_case_row(case) for case in document["cases"]]
    columns = ("", "tokens/s", "range", "bound", "set by", "reached", "range", "reads", "outside kernels")
    output.table(columns, rows, _model_title(document))
    output.write("\n")
    parts = sorted(
        {part for case in document["cases"] for part in case["shares"]}, key=lambda part: _weight(document, part)
    )
    shares = [[part, *(f"{case['shares'].get(part, 0):.1%}" for case in document["cases"])] for part in parts]
    shares.append(["outside kernels", *(f"{case['outside_kernels']:.1%}" for case in document["cases"])])
    output.table(("share of time", *(case["case"] for case in document["cases"])), shares)
    for case in document["cases"]:
        if case["case"].startswith("prefill"):
            seconds = case["seconds"]["median"]
            output.talk(f"first token after {seconds:.3f} s, of which routing takes {case['routing']:.1%}")


def _machine_title(machine: dict[str, Any]) -> str:
    missing = f"; without {', '.join(machine['missing'])}" if machine["missing"] else ""
    threads = f"{machine['threads']} thread{'s' * (machine['threads'] > 1)}"
    return f"{machine['processor']}, {threads}, kernels {machine['isa']}{missing}"


def _machine_rows(machine: dict[str, Any]) -> list[list[str]]:
    speed = machine["bandwidth"]
    rows = [
        ["memory, read", output.size(speed["median"]), f"{output.size(speed['low'])} - {output.size(speed['high'])}"]
    ]
    for number, peak in machine["peaks"].items():
        rows.append([f"operations in {number}", output.number(peak) if peak else "-", "-"])
    return rows


def _model_title(document: dict[str, Any]) -> str:
    held, drawn = document["held"], ", random weights" if document["random_weights"] else ""
    formats = ", ".join(f"{part} {format_}" for part, format_ in held["formats"].items())
    products = ", ".join(f"{part} {number}" for part, number in held["products"].items())
    total = output.size(sum(held["packed_bytes"].values()))
    return (
        f"{document['model']}{drawn}: {total} packed, {held['bits_per_weight']:.2f} bits a weight ({formats}); "
        f"products: {products}"
    )


def _case_row(case: dict[str, Any]) -> list[str]:
    reached, fraction = case["tokens_per_second"], case["fraction"]
    return [
        case["case"],
        f"{reached['median']:,.1f}",
        f"{reached['low']:,.1f} - {reached['high']:,.1f}",
        f"{case['bound_tokens_per_second']['median']:,.1f}",
        case["bound_by"],
        f"{fraction['median']:.0%}",
        f"{fraction['low']:.0%} - {fraction['high']:.0%}",
        output.size(case["bytes"]),
        f"{case['outside_kernels']:.1%}",
    ]


def _weight(document: dict[str, Any], part: str) -> float:
    return -sum(case["shares"].get(part, 0.0) for case in document["cases"])


def _plot(path: Path, document: dict[str, Any]) -> None:
    points = [_point(case) for case in document["cases"] if case["case"].startswith("decode")]
    line = bench_plot.Line("decode", points)
    path.write_text(bench_plot.draw(f"{document['model']} on this machine", [line]), encoding="utf-8")
    output.talk(f"drawn: {path}")


def _point(case: dict[str, Any]) -> bench_plot.Point:
    reached = case["tokens_per_second"]
    spread = (reached["low"], reached["high"])
    return bench_plot.Point(case["tokens"], case["bound_tokens_per_second"]["median"], reached["median"], spread)
