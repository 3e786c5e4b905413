"""What the planner foretells of this machine beside what it then measures: decode, prefill and memory of our engine.

    python benchmarks/plan_here.py [FOLDER ...] [--made grouped,fine] [--formats own,8,4] [--measure] [--json FILE]

Runs on folders of checkpoints, and on models of made_models.py, drawn in memory (all of them where no folder is given).
Kernels are timed once on other made-up models (`moesaic.bench.here.measure`, kept for later runs; --measure: anew), and
none of the cells below takes part in that. Each model and format runs in a process of its own, whose peak memory is
measured first. Then all processes take turns, one at a time, several times over (--samples): each samples every cell of
its own once, between two readings of what memory, caches and processors give (bench/probes.py), and each sample is
foretold at these. Where two readings are apart by more than a quarter, the sample is taken anew, up to twice, whatever
it was. Of foretold and of measured seconds medians are compared. They are kept for `moesaic plan verify`, and in FILE;
samples are kept beside it as they come (FILE.samples), and a run that was stopped goes on from there.
`moesaic plan verify FILE` adds FILE up alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from made_models import MADE, made

from moesaic.cli.main import main as moesaic
from moesaic.plan.rates import KernelRates, measured_rates
from moesaic.plan.verify import Prediction, Quantity, store

if TYPE_CHECKING:
    from moesaic.bench.bound import Held
    from moesaic.engine.engine import Engine
    from moesaic.engine.weights import Weights

FORMATS: dict[str, int | None] = {"own": None, "8": 8, "4": 4}
DECODE = ((1, 32), (8, 32), (2, 512), (16, 128))
"""Texts, and tokens that they have before."""
PREFILL = (64, 320)
LONGEST = 1024


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


class Seen(NamedTuple):
    """One sample of a cell: its name, tokens that a text has, seconds, and what was foretold at the speeds around it;
    or the peak memory of a job."""

    job: Job
    what: Quantity
    case: str
    context: float
    formats: str
    measured: float
    predicted: float
    bandwidth: float = 0.0
    compute: float = 0.0


def work(job: Job) -> None:
    """One job, in a process of its own: its peak memory, then all cells once for each line that comes."""
    import torch

    from moesaic.bench import reached
    from moesaic.bench.foretold import foretold_seconds, step_of
    from moesaic.bench.probes import Probes
    from moesaic.engine.engine import Engine
    from moesaic.train.memory import peak_memory_bytes

    rates = measured_rates()
    assert rates is not None, "the parent has measured"
    weights = weights_of(job.model)
    engine = Engine(weights, bits=FORMATS[job.format], max_length=LONGEST)  # pyright: ignore[reportArgumentType]  8, 4 or None
    kept = reached.held(engine, weights.dtype)
    cases = [(reached.decode_case(engine, kept, batch, context), context) for batch, context in DECODE]
    cases += [(reached.prefill_case(engine, kept, tokens), tokens) for tokens in PREFILL]
    formats = " ".join(sorted(set(kept.formats.values())))
    peak, foretold = peak_memory_bytes(torch.device("cpu")), foretold_peak(rates, engine, kept)
    tell([Seen(job, "peak_bytes", "peak memory", 0, formats, float(peak), foretold)])
    probes = Probes(engine.program.native.threads)
    for _ in sys.stdin:
        found, before = [], probes.speeds()
        for case, tokens in cases:
            sample, before = reached.take_sample(engine, probes, case, before)
            decodes = case.name.startswith("decode")
            context = tokens + case.steps / 2 if decodes else float(tokens)
            foretold = foretold_seconds(rates, kept, step_of(case, context), sample)
            what: Quantity = "decode_s" if decodes else "prefill_s"
            speeds = sample.speeds
            found.append(
                Seen(job, what, case.name, context, formats, sample.seconds, foretold, speeds.bandwidth, speeds.compute)
            )
        tell(found)


def tell(found: list[Seen]) -> None:
    """The parent."""
    print(json.dumps([each._asdict() for each in found]), flush=True)


def foretold_peak(rates: KernelRates, engine: "Engine", kept: "Held") -> float:
    """The most bytes that the process has held."""
    from moesaic.bench.foretold import held_formats
    from moesaic.engine.cache import BLOCK_TOKENS
    from moesaic.engine.engine import PREFILL_TOKENS
    from moesaic.plan.engine_memory import engine_peak_bytes

    return engine_peak_bytes(
        rates,
        kept.config,
        held_formats(kept),
        tokens=PREFILL_TOKENS,
        texts=max(batch for batch, _ in DECODE),
        cache_tokens=engine.cache.num_blocks * BLOCK_TOKENS,
    )


class Worker:
    """A job's process, which waits between its turns."""

    def __init__(self, job: Job) -> None:
        command = [sys.executable, __file__, "--worker", *job]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.peak = self._hear()

    def sample(self) -> list[Seen]:
        """All its cells once."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> list[Seen]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker ended with {self._process.wait()}; start again, and the run goes on")
        return [seen_of(each) for each in json.loads(line)]

    def end(self) -> None:
        """Let it go."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def seen_of(tree: dict[str, Any]) -> Seen:
    """The inverse of _asdict after JSON."""
    return Seen(**{**tree, "job": Job(*tree["job"])})


class Kept:
    """All samples so far, in a file where one is given."""

    def __init__(self, path: Path | None) -> None:
        self._path = None if path is None else path.with_name(path.name + ".samples")
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path and self._path.is_file() else []
        self.seen = [seen_of(json.loads(line)) for line in lines]

    def add(self, found: list[Seen]) -> None:
        """And keep it."""
        self.seen += found
        if self._path:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(each._asdict())}\n" for each in found)

    def turns(self, job: Job) -> int:
        """That a job has had."""
        cases = Counter(each.case for each in self.seen if each.job == job and each.what != "peak_bytes")
        return min(cases.values(), default=0)

    def of(self, job: Job) -> dict[str, list[Seen]]:
        """A job's samples, cell by cell."""
        cells: dict[str, list[Seen]] = {}
        for each in self.seen:
            if each.job == job:
                cells.setdefault(each.case, []).append(each)
        return cells


def sample_all(jobs: list[Job], samples: int, kept: Kept) -> None:
    """Until every job has had its turns."""
    workers: dict[Job, Worker] = {}
    for job in jobs:
        if kept.turns(job) < samples:
            workers[job] = Worker(job)
            if not kept.of(job):
                kept.add(workers[job].peak)
    for turn in range(samples):
        for job, worker in workers.items():
            if kept.turns(job) <= turn:
                kept.add(worker.sample())
                print(f"turn {turn + 1} of {samples}: {job.name} {job.format}", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.end()


def middle(samples: list[Seen], machine: str) -> Prediction:
    """Of a cell's samples."""
    first = samples[0]
    setting: dict[str, Any] = {"packed": first.job.format, "case": first.case, "formats": first.formats}
    if first.bandwidth:
        setting |= {
            "context": round(first.context),
            "bandwidth": round(statistics.median(each.bandwidth for each in samples)),
        }
    return Prediction(
        source="bench",
        model=first.job.name,
        quantity=first.what,
        predicted=statistics.median(each.predicted for each in samples),
        measured=statistics.median(each.measured for each in samples),
        setting=setting,
        machine=machine,
    )


def show(each: Prediction) -> None:
    """What one cell came to."""
    scale, unit = (1e-6, "MB") if each.quantity == "peak_bytes" else (1e3, "ms")
    figures = f"{each.predicted * scale:9.2f} {each.measured * scale:9.2f} {unit}"
    at = f"  at {each.setting['bandwidth'] / 1e9:.1f} GB/s" if "bandwidth" in each.setting else ""
    print(f"{each.model:<10} {each.setting['packed']:<4} {each.setting['case']:<18} {figures} {each.error:+7.1%}{at}")


def jobs_of(options: argparse.Namespace) -> Iterator[Job]:
    """Every model in every format that is asked for."""
    drawn = options.made if options.made is not None else [] if options.folders else list(MADE)
    if unknown := [name for name in drawn if name not in MADE]:
        raise SystemExit(f"no made-up model {unknown[0]!r}; known: {', '.join(MADE)}")
    for model in (*drawn, *options.folders):
        for format_ in options.formats:
            yield Job(model, format_)


def main() -> None:
    """Sample every cell as often as is asked for, and print all beside their plans."""
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
        work(Job(*options.worker))
        return
    rates = None if options.measure else measured_rates()
    if rates is None:
        from moesaic.bench import here

        rates = here.measure().rates
    if rates.busy and not options.busy:
        raise SystemExit(f"the kernels were timed while {rates.busy}; --measure when it is quiet, or go on with --busy")
    kept, jobs = Kept(options.json), list(jobs_of(options))
    sample_all(jobs, options.samples, kept)
    found = [middle(samples, rates.machine) for job in jobs for samples in kept.of(job).values()]
    for each in found:
        show(each)
    if options.json:
        options.json.unlink(missing_ok=True)
    store(found, *([options.json] if options.json else []))
    if options.json:
        moesaic(["plan", "verify", str(options.json)])


if __name__ == "__main__":
    main()
