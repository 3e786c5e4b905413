"""What the planner foretells of this machine beside what it then measures: decode, prefill and memory of our engine.

    python benchmarks/plan_here.py FOLDER [--models A,B,C,F,G] [--samples 5] [--measure] [--json FILE]

FOLDER holds models as benchmarks/peers/make_models.py makes them. Kernels are timed once on made-up models
(`moesaic.bench.here.measure`, kept for later runs; --measure: anew), and none of the cells below takes part in that.
Each model and format runs in a process of its own, whose peak memory is measured first; then each cell is sampled in
turns with the others, between two readings of the memory's bandwidth, and foretold at that bandwidth.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

MODELS = "A,B,C,F,G"
BITS: dict[str, tuple[int | None, ...]] = {"F": (None,), "G": (None,)}
"""F and G were released in few bits; the others run as they are, and rounded to 8 and 4."""
DECODE = ((1, 32), (8, 32), (2, 512), (16, 128))
PREFILL = (64, 320)
LONGEST = 1024


class Row(NamedTuple):
    """One cell."""

    model: str
    bits: int | None
    cell: str
    foretold: float
    measured: float
    bandwidth: float

    @property
    def error(self) -> float:
        return self.foretold / self.measured - 1


def work(folder: Path, bits: int | None, samples: int) -> dict[str, Any]:
    """One model in one format: its peak memory and its cells. Runs in a process of its own."""
    import torch

    from moesaic.bench import reached
    from moesaic.bench.foretold import held_formats, predictions
    from moesaic.bench.machine import ReadProbe
    from moesaic.engine.cache import BLOCK_TOKENS
    from moesaic.engine.engine import Engine
    from moesaic.engine.weights import FileWeights
    from moesaic.hub.resolve import weights_place
    from moesaic.hub.sources import open_source
    from moesaic.plan.engine_memory import engine_peak_bytes
    from moesaic.plan.kernels import measured_rates
    from moesaic.train.memory import peak_memory_bytes

    weights = FileWeights(open_source(weights_place(folder)))
    engine = Engine(weights, bits=bits, max_length=LONGEST)  # pyright: ignore[reportArgumentType]  8, 4 or None
    kept = reached.held(engine, weights.dtype)
    rates = measured_rates()
    assert rates is not None, "the parent has measured"
    cases = [(reached.decode_case(engine, kept, batch, context), context) for batch, context in DECODE]
    cases += [(reached.prefill_case(engine, kept, tokens), tokens) for tokens in PREFILL]
    peak = peak_memory_bytes(torch.device("cpu"))
    probe = ReadProbe(engine.program.native.threads)
    reached.take_samples(engine, probe, [case for case, _ in cases], samples, lambda _: None)
    middles = [
        (case, context + case.steps / 2 if case.name.startswith("decode") else context) for case, context in cases
    ]
    rows = [
        Row(folder.name, bits, str(each.setting["case"]), each.predicted, each.measured, each.setting["bandwidth"])
        for each in predictions(rates, kept, folder.name, middles)
    ]
    foretold = engine_peak_bytes(
        rates,
        kept.config,
        held_formats(kept),
        tokens=max(PREFILL),
        texts=16,
        cache_tokens=engine.cache.num_blocks * BLOCK_TOKENS,
    )
    return {"rows": rows, "peak": peak, "foretold_peak": foretold}


def run_apart(folder: Path, bits: int | None, samples: int) -> dict[str, Any]:
    """The same in another process."""
    command = [sys.executable, __file__, str(folder), "--worker", str(bits or 0), "--samples", str(samples)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def show_cells(rows: list[Row], model: str, done: dict[str, Any]) -> None:
    """What one model in one format came to."""
    for row in rows:
        seconds = f"{row.foretold * 1e3:9.2f} {row.measured * 1e3:9.2f} ms"
        print(f"{model:<10} {row.cell:<18} {seconds} {row.error:+7.1%}  at {row.bandwidth / 1e9:.1f} GB/s")
    foretold, measured = done["foretold_peak"], done["peak"]
    figures = f"{foretold / 1e6:9.0f} {measured / 1e6:9.0f} MB {foretold / measured - 1:+7.1%}"
    print(f"{model:<10} {'peak memory':<18} {figures}", flush=True)


def show(title: str, errors: list[float]) -> None:
    """One line of a table."""
    sizes = sorted(map(abs, errors))
    ninety = sizes[max(0, -(-9 * len(sizes) // 10) - 1)]
    print(
        f"{title:<10} {len(sizes):>3} cells: median error {statistics.median(sizes):.1%}, 90% within {ninety:.1%}, "
        f"within 20%: {sum(size <= 0.2 for size in sizes) / len(sizes):.0%}, signed {statistics.median(errors):+.1%}"
    )


def main() -> None:
    """Measure every cell, print it beside its plan."""
    parser = argparse.ArgumentParser(description="Plans of this machine beside what it measures.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps(work(options.folder, options.worker or None, options.samples)))
        return
    from moesaic.plan.kernels import measured_rates

    if options.measure or measured_rates() is None:
        from moesaic.bench import here

        here.measure()
    found: list[Row] = []
    peaks: list[float] = []
    for name in options.models.split(","):
        for bits in BITS.get(name, (None, 8, 4)):
            done = run_apart(options.folder / name, bits, options.samples)
            rows = [Row(*row) for row in done["rows"]]
            found += rows
            peaks.append(done["foretold_peak"] / done["peak"] - 1)
            show_cells(rows, f"{name} {bits or 'as it is'}", done)
    print()
    for kind in ("decode", "prefill"):
        show(kind, [row.error for row in found if row.cell.startswith(kind)])
    show("all", [row.error for row in found])
    show("peaks", peaks)
    if options.json:
        options.json.write_text(json.dumps({"rows": found, "peaks": peaks}), encoding="utf-8")


if __name__ == "__main__":
    main()
