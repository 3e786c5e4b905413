"""An MoE beside dense twins in our own engine, over batch sizes, and what the roofline foretells.

    python benchmarks/crossover.py A D E --models FOLDER [--bits 4] [--batch 1,2,4,8,16,32,64] [--plot crossover.svg]

The first model is compared with each of the others: with one text an MoE reads as little as its twin of equal active
size, with many it reads every expert, as its twin of equal total size does at once. `foretold` is the same ratio of the
bounds, from this machine's bandwidth (read before and after each sample) and its best products. Where a ratio crosses
--level between two batches is found along a line over the logarithm of the batch.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moesaic.bench import reached
from moesaic.bench.machine import Machine, measure_machine
from moesaic.bench.probes import Probes
from moesaic.bench.report import report
from moesaic.cli import bench_plot, output
from moesaic.engine.engine import Engine


def measure(
    folder: Path, names: Sequence[str], bits: int | None, batches: Sequence[int], samples: int
) -> tuple[Machine, dict[str, list[dict[str, Any]]]]:
    """The machine, and the rows of `moesaic bench` for each model, batch by batch."""
    engines = {name: Engine(folder / name, bits=bits, max_length=192) for name in names}  # pyright: ignore[reportArgumentType]
    threads = next(iter(engines.values())).program.native.threads
    machine, probes = measure_machine(threads), Probes(threads)
    kept = {name: reached.held(engine, torch.bfloat16) for name, engine in engines.items()}
    cases = {
        name: [reached.decode_case(engine, kept[name], batch) for batch in batches] for name, engine in engines.items()
    }
    with output.progress("sampling", total=samples * len(batches) * len(names)) as advance:
        for _ in range(samples):
            for index in range(len(batches)):
                for name, engine in engines.items():
                    reached.take_samples(
                        engine, probes, cases[name][index : index + 1], 1, lambda note: advance(1, note=note)
                    )
    return machine, {name: report(machine, kept[name], cases[name])["cases"] for name in names}


def crossing(batches: Sequence[int], ratios: Sequence[float], level: float) -> float | None:
    """The batch at which ratios first pass a level; None where they stay on one side."""
    for (low, before), (high, after) in zip(
        zip(batches, ratios, strict=True), list(zip(batches, ratios, strict=True))[1:], strict=False
    ):
        if (before - level) * (after - level) <= 0 and before != after:
            share = (before - level) / (before - after)
            return math.exp(math.log(low) + share * (math.log(high) - math.log(low)))
    return None


def tokens(row: dict[str, Any], which: str) -> float:
    """Tokens a second, in the median."""
    return row[which]["median"]


def main() -> None:
    """Print a row for every batch, then where the ratios cross the level."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="MODEL", help="the MoE and then its twins")
    parser.add_argument("--models", type=Path, required=True, help="the folder that they are in")
    parser.add_argument("--bits", type=int, choices=(8, 4))
    parser.add_argument("--batch", default="1,2,4,8,16,32,64")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--level", type=float, default=0.5)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    batches = [int(word) for word in args.batch.split(",")]
    machine, rows = measure(args.models, args.names, args.bits, batches, args.samples)
    first, *others = args.names
    columns = ["texts", *(f"{name} tokens/s" for name in args.names)]
    columns += [f"{first} : {name}{what}" for name in others for what in ("", ", foretold")]
    ratios = {
        (name, which): [tokens(a, which) / tokens(b, which) for a, b in zip(rows[first], rows[name], strict=True)]
        for name in others
        for which in ("tokens_per_second", "bound_tokens_per_second")
    }
    table = [
        [str(batch), *(f"{tokens(rows[name][at], 'tokens_per_second'):.1f}" for name in args.names)]
        + [f"{ratio[at]:.2f}" for ratio in ratios.values()]
        for at, batch in enumerate(batches)
    ]
    output.table(columns, table, f"{machine.processor}, {machine.threads} threads, {args.bits or 16} bits")
    for (name, which), ratio in ratios.items():
        at = crossing(batches, ratio, args.level)
        kind = "foretold" if which.startswith("bound") else "measured"
        where = "stays on one side of" if at is None else f"at {at:.1f} texts crosses"
        output.talk(f"{first} : {name}, {kind}, {where} {args.level:g}")
    if args.plot:
        lines = [
            bench_plot.Line(
                name,
                [
                    bench_plot.Point(
                        row["tokens"],
                        tokens(row, "bound_tokens_per_second"),
                        tokens(row, "tokens_per_second"),
                        (row["tokens_per_second"]["low"], row["tokens_per_second"]["high"]),
                    )
                    for row in rows[name]
                ],
            )
            for name in args.names
        ]
        args.plot.write_text(bench_plot.draw("An MoE and its dense twins", lines), encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine._asdict(), "rows": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
