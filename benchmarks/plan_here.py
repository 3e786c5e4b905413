"""What the planner foretells of this machine beside what it then measures: decode, prefill and memory of our engine.

    python benchmarks/plan_here.py [FOLDER ...] [--made grouped,fine] [--formats own,8,4] [--measure] [--json FILE]

Runs on folders of checkpoints, and on models of made_models.py, drawn in memory (all of them where no folder is given).
Kernels are timed once on other made-up models (`moesaic.bench.here.measure`, kept for later runs; --measure: anew), and
none of the cells below takes part in that. Each model and format runs in a process of its own, whose peak memory is
measured first; then its cells are sampled in turns, each between two readings of the memory's bandwidth, and foretold
at that bandwidth. What is measured is kept for `moesaic plan verify`, and in FILE once a model and format are done:
a run that was stopped goes on from there. `moesaic plan verify FILE` adds FILE up alone.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from made_models import MADE, made

from moesaic.cli.main import main as moesaic
from moesaic.plan.kernels import KernelRates, measured_rates
from moesaic.plan.verify import Prediction, load, store

if TYPE_CHECKING:
    from moesaic.bench.bound import Held
    from moesaic.engine.engine import Engine
    from moesaic.engine.weights import Weights

FORMATS: dict[str, int | None] = {"own": None, "8": 8, "4": 4}
DECODE = ((1, 32), (8, 32), (2, 512), (16, 128))
"""Texts, and tokens that they have before."""
PREFILL = (64, 320)
LONGEST = 1024
CELLS = len(DECODE) + len(PREFILL) + 1


class Job(NamedTuple):
    """One model (a name of MADE, or a folder) in one format."""

    model: str
    format: str

    @property
    def name(self) -> str:
        """Of the model, as it is kept."""
        return self.model if self.model in MADE else Path(self.model).name


def weights_of(model: str) -> "Weights":
    """Drawn, or of files."""
    from moesaic.bench.drawn import DrawnWeights
    from moesaic.engine.weights import FileWeights
    from moesaic.hub.resolve import weights_place
    from moesaic.hub.sources import open_source

    return DrawnWeights(made(model)) if model in MADE else FileWeights(open_source(weights_place(model)))


def work(job: Job, samples: int) -> list[Prediction]:
    """One job: its peak memory, then its cells. Runs in a process of its own."""
    import torch

    from moesaic.bench import reached
    from moesaic.bench.foretold import predictions
    from moesaic.bench.machine import ReadProbe
    from moesaic.engine.engine import Engine
    from moesaic.train.memory import peak_memory_bytes

    rates = measured_rates()
    assert rates is not None, "the parent has measured"
    weights = weights_of(job.model)
    engine = Engine(weights, bits=FORMATS[job.format], max_length=LONGEST)  # pyright: ignore[reportArgumentType]  8, 4 or None
    kept = reached.held(engine, weights.dtype)
    cases = [(reached.decode_case(engine, kept, batch, context), context) for batch, context in DECODE]
    cases += [(reached.prefill_case(engine, kept, tokens), tokens) for tokens in PREFILL]
    peak = peak_prediction(rates, engine, kept, peak_memory_bytes(torch.device("cpu")))
    probe = ReadProbe(engine.program.native.threads)
    reached.take_samples(engine, probe, [case for case, _ in cases], samples, lambda _: None)
    middles = [
        (case, context + case.steps / 2 if case.name.startswith("decode") else context) for case, context in cases
    ]
    found = [*predictions(rates, kept, job.name, middles), replace(peak, model=job.name)]
    return [replace(each, setting={"packed": job.format, **each.setting}) for each in found]


def peak_prediction(rates: KernelRates, engine: "Engine", kept: "Held", measured: int) -> Prediction:
    """Of the most that the process has held."""
    from moesaic.bench.foretold import held_formats
    from moesaic.engine.cache import BLOCK_TOKENS
    from moesaic.engine.engine import PREFILL_TOKENS
    from moesaic.plan.engine_memory import engine_peak_bytes

    formats = held_formats(kept)
    foretold = engine_peak_bytes(
        rates,
        kept.config,
        formats,
        tokens=PREFILL_TOKENS,
        texts=max(batch for batch, _ in DECODE),
        cache_tokens=engine.cache.num_blocks * BLOCK_TOKENS,
    )
    return Prediction(
        source="bench",
        model="",
        quantity="peak_bytes",
        predicted=foretold,
        measured=float(measured),
        setting={"case": "peak memory", "formats": " ".join(sorted(set(kept.formats.values())))},
        machine=rates.machine,
    )


def run_apart(job: Job, samples: int) -> list[Prediction]:
    """The same in another process."""
    command = [sys.executable, __file__, "--worker", *job, "--samples", str(samples)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [Prediction(**each) for each in json.loads(done.stdout)]


def is_done(job: Job, kept: list[Prediction]) -> bool:
    """Whether all cells of it are there."""
    cases = {
        each.setting["case"] for each in kept if each.model == job.name and each.setting.get("packed") == job.format
    }
    return len(cases) == CELLS


def show(job: Job, found: list[Prediction]) -> None:
    """What one model in one format came to."""
    for each in found:
        scale, unit = (1e-6, "MB") if each.quantity == "peak_bytes" else (1e3, "ms")
        figures = f"{each.predicted * scale:9.2f} {each.measured * scale:9.2f} {unit}"
        at = f"  at {each.setting['bandwidth'] / 1e9:.1f} GB/s" if "bandwidth" in each.setting else ""
        print(f"{job.name:<10} {job.format:<4} {each.setting['case']:<18} {figures} {each.error:+7.1%}{at}", flush=True)


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """Every model in every format that is asked for."""
    drawn = options.made if options.made is not None else [] if options.folders else list(MADE)
    if unknown := [name for name in drawn if name not in MADE]:
        raise SystemExit(f"no made-up model {unknown[0]!r}; known: {', '.join(MADE)}")
    for model in (*drawn, *options.folders):
        for format_ in options.formats:
            yield Job(model, format_)


def main() -> None:
    """Measure every cell that is not kept yet, and print all beside their plans."""
    parser = argparse.ArgumentParser(description="Plans of this machine beside what it measures.")
    parser.add_argument("folders", nargs="*", metavar="FOLDER")
    parser.add_argument("--made", type=lambda text: text.split(","), help=f"of {', '.join(MADE)}")
    parser.add_argument("--formats", type=lambda text: text.split(","), default=list(FORMATS), help="of own, 8, 4")
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--measure", action="store_true", help="time this machine's kernels anew")
    parser.add_argument("--busy", action="store_true", help="go on although other programs ran when they were timed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep every cell there, a line each, and go on")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker is not None:
        print(json.dumps([asdict(each) for each in work(Job(*options.worker), options.samples)]))
        return
    rates = None if options.measure else measured_rates()
    if rates is None:
        from moesaic.bench import here

        rates = here.measure().rates
    if rates.busy and not options.busy:
        raise SystemExit(f"the kernels were timed while {rates.busy}; --measure when it is quiet, or go on with --busy")
    kept = load(options.json) if options.json else []
    for job in jobs_of(options):
        if is_done(job, kept):
            continue
        found = run_apart(job, options.samples)
        store(found, *([options.json] if options.json else []))
        show(job, found)
    if options.json:
        moesaic(["plan", "verify", str(options.json)])


if __name__ == "__main__":
    main()
