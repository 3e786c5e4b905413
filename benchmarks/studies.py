"""What the studies share: cells that are trained one after another and remembered, and the program around them.

A cell is one variant of a study's recipe. What a finished cell has reached is a line of OUT/results.jsonl; the same
command skips what stands there, so a study may be stopped at any time and goes on with its next cell.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from moesaic.cli import output
from moesaic.cli.text_source import Text, add_corpus_argument, gather_text
from moesaic.data.packed import Packed
from moesaic.errors import ConfigError, DataError, MoesaicError
from moesaic.evaluate.perplexity import HeldOutLoss, held_out_loss
from moesaic.layers.moe import capacity_applied
from moesaic.models.build import decoder_only
from moesaic.models.decoder import Decoder
from moesaic.telemetry.health import dead_experts, max_violation
from moesaic.telemetry.load import StepLoad
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.loop import Trainer
from moesaic.train.recipe import Recipe
from moesaic.train.reports import StepReport
from moesaic.train.resume import write_beside

LAST_STEPS = 50  # over which what is said of training batches is averaged
HELD_OUT_TOKENS = 32_768  # of each domain

Result = dict[str, Any]
AfterStep = Callable[[Trainer, StepReport], object]


@dataclass(frozen=True)
class Cell:
    """A variant: fields of the model and of the training that are otherwise than in the study's recipe.

    note: what a reader of its numbers must know. after_step: interferes with the training, for what no recipe says.
    """

    name: str
    model: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""
    after_step: AfterStep | None = None


@dataclass(frozen=True)
class Study:
    """A recipe (a tree, as a TOML file has it) and its variants."""

    recipe: Mapping[str, Any]
    cells: Sequence[Cell]

    def tree_of(self, cell: Cell, seed: int) -> dict[str, Any]:
        """What is said of a cell, as a recipe's file would; the rest is left to its defaults."""
        train = {**self.recipe["train"], **cell.train, "seed": seed}
        return {**self.recipe, "model": {**self.recipe["model"], **cell.model}, "train": train}

    def recipe_of(self, cell: Cell, seed: int) -> Recipe:
        """The recipe of a cell. Raises ConfigError for one that cannot be."""
        return Recipe.from_dict(self.tree_of(cell, seed))

    def chosen(self, names: Sequence[str] | None) -> list[Cell]:
        """The cells of these names, or all of them. Raises ConfigError for a name that is not there."""
        known = {cell.name: cell for cell in self.cells}
        if unknown := [name for name in names or () if name not in known]:
            raise ConfigError(f"--cells {unknown[0]!r}; known: {', '.join(known)}")
        return [known[name] for name in names] if names else list(self.cells)


class Results:
    """The finished cells in a file, a line each; a line that a kill cut off is dropped with the next one."""

    def __init__(self, place: Path) -> None:
        self.place = place

    @classmethod
    def in_folder(cls, folder: Path) -> "Results":
        """Those of a study's folder, which is made. Raises DataError where that cannot be."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
        return cls(folder / "results.jsonl")

    def read(self) -> list[Result]:
        """All whole lines, of two runs of the same cell the later. Raises DataError for one that is no result."""
        if not self.place.exists():
            return []
        lines = self.place.read_text(encoding="utf-8").split("\n")
        try:
            found = [json.loads(line) for line in lines[:-1] if line]  # the last one is empty, or was cut off
        except ValueError as error:
            raise DataError(f"{self.place} has a line that is no JSON ({error}); correct or delete it") from error
        return list({(result["cell"], result["seed"]): result for result in found}.values())

    def add(self, result: Result) -> None:
        """Append one, and have it on disk. Two runs may share a file."""
        text = json.dumps(result) + "\n"
        self.place.touch()
        with self.place.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
            file.seek(whole)
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())


def run(
    study: Study, cells: Sequence[Cell], seeds: Sequence[int], text: Text[Packed], results: Results
) -> list[Result]:
    """Train what has no result yet, seed by seed, and return the results of all these cells.

    Raises ConfigError for a cell that cannot be, before the first one is trained, and DataError when the file holds
    results of other settings.
    """
    todo = [(cell, seed, study.recipe_of(cell, seed)) for seed in seeds for cell in cells]
    for _, _, recipe in todo:
        recipe.model_config(text.tokenizer.vocab_size, text.packed.eos_id)
    wanted = {(cell.name, seed): _digest(study.tree_of(cell, seed), text) for cell, seed, _ in todo}
    for number, (cell, seed, recipe) in enumerate(todo, 1):
        found = _finished(results, wanted)  # read anew: another run may share the work
        if (cell.name, seed) in found:
            continue
        spent = [result["seconds"] for result in found.values()]
        remaining = statistics.mean(spent) * (len(todo) - len(found)) if spent else math.nan
        result = _train(cell, seed, recipe, text, f"cell {number} of {len(todo)}: {cell.name}, seed {seed}", remaining)
        results.add(result | {"settings": wanted[cell.name, seed]})
    found = _finished(results, wanted)
    return [found[key] for key in wanted]


def _finished(results: Results, wanted: Mapping[tuple[str, int], str]) -> dict[tuple[str, int], Result]:
    """What is there of the wanted (cell, seed) and their settings. Raises DataError for other settings."""
    found = {(result["cell"], result["seed"]): result for result in results.read()}
    for key in wanted.keys() & found.keys():
        if found[key]["settings"] != wanted[key]:
            raise DataError(f"{results.place} holds {key[0]} of other settings or other text; choose another --out")
    return {key: found[key] for key in wanted.keys() & found.keys()}


def _digest(tree: Mapping[str, Any], text: Text[Packed]) -> str:
    facts = json.dumps([tree, text.packed.digest, HELD_OUT_TOKENS], sort_keys=True)
    return hashlib.sha256(facts.encode()).hexdigest()[:16]


def _train(cell: Cell, seed: int, recipe: Recipe, text: Text[Packed], what: str, remaining: float) -> Result:
    config = recipe.model_config(text.tokenizer.vocab_size, text.packed.eos_id)
    trainer = Trainer(Decoder(config).initialize(seed), recipe.train, text.packed, recipe.data)
    started = time.perf_counter()
    when = f" (about {output.duration(remaining)} to go)" if math.isfinite(remaining) else ""
    reports: list[StepReport] = []
    with output.progress(f"{what}{when}", recipe.train.steps) as advance:
        while trainer.step < recipe.train.steps:
            report = trainer.train_step()
            if cell.after_step is not None:
                cell.after_step(trainer, report)
            reports.append(report)
            advance(1, f"loss {report.loss:.3f}")
    loss, load = _held_out(trainer, text)
    return {
        "cell": cell.name,
        "seed": seed,
        "bits_per_byte": loss.bits_per_byte,
        "by_domain": loss.by_domain,
        "capacity_gap": _capacity_gap(trainer, text, loss),
        **_held_out_balance(load),
        **_of_training(reports[-LAST_STEPS:]),
        "total": config.total,
        "active": config.active_all,
        "steps": recipe.train.steps,
        "tokens": recipe.train.steps * recipe.train.tokens_per_step,
        "seconds": round(time.perf_counter() - started, 1),
        "note": cell.note,
    }


def _held_out(trainer: Trainer, text: Text[Packed]) -> tuple[HeldOutLoss, StepLoad]:
    """The held-out loss as the model stands, and what fell on each expert."""
    recorder = LoadRecorder.for_model(trainer.model.config, num_domains=len(text.packed.domains))
    loss = held_out_loss(
        decoder_only(trainer.model, "a study"),
        text.packed,
        sequence_length=trainer.settings.sequence_length,
        max_tokens=HELD_OUT_TOKENS,
        recorder=recorder,
        document_attention=trainer.data.document_attention,
    )
    return loss, recorder.finish_step()


def _capacity_gap(trainer: Trainer, text: Text[Packed], loss: HeldOutLoss) -> float | None:
    """How many more bits per byte it is with rows dropped as in training; None without a capacity."""
    with capacity_applied(trainer.model) as has_capacity:
        return _held_out(trainer, text)[0].bits_per_byte - loss.bits_per_byte if has_capacity else None


def _held_out_balance(load: StepLoad) -> Result:
    """MaxVio of the held-out text, counted as the router chose (evaluation drops nothing), and experts without work."""
    violations = [max_violation(layer.counts_E) for layer in load.layers]
    dead = [dead_experts(one.counts_E, num_tokens=one.num_tokens, top_k=one.top_k) or () for one in load.layers]
    return {
        "max_violation": statistics.mean(violations),
        "max_violation_by_layer": violations,
        "dead_experts": sum(map(len, dead)),
    }


def _of_training(reports: Sequence[StepReport]) -> Result:
    layers = [layer for report in reports for layer in report.load.layers]
    return {
        "training_loss": statistics.mean(report.loss for report in reports),
        "batch_max_violation": statistics.mean(max_violation(layer.counts_E) for layer in layers),
        "dropped": statistics.mean(report.load.dropped_share for report in reports),
        "tokens_per_s": statistics.median(report.tokens_per_s for report in reports),
    }


class Spread(NamedTuple):
    """A mean over seeds and the standard deviation between them (0 for one seed)."""

    mean: float
    deviation: float

    def text(self, decimals: int = 3) -> str:
        """As a table shows it."""
        return f"{self.mean:.{decimals}f}" + (f" ±{self.deviation:.{decimals}f}" if self.deviation else "")


def spread(results: Iterable[Result], name: str) -> Spread:
    """What the seeds say of one number."""
    values = [result[name] for result in results]
    return Spread(statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def by_cell(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results of each cell, over its seeds."""
    grouped: dict[str, list[Result]] = {}
    for result in results:
        grouped.setdefault(result["cell"], []).append(result)
    return grouped


def conduct(
    doc: str | None,
    example: str,
    study_of: Callable[[int], Study],
    show: Callable[[list[Result], Path], None],
    *,
    steps: int,
    seeds: list[int],
) -> None:
    """A study as a program. Mistakes are one line and exit 2; Ctrl-C says how to go on and exits 130.

    study_of: the study of cells with so many steps. show: prints tables and draws plots into a folder.
    """
    args = _parser(doc, example, steps, seeds).parse_args()
    try:
        _conduct(args, study_of(args.steps), show)
    except MoesaicError as error:
        output.talk(f"error: {error}")
        sys.exit(2)
    except KeyboardInterrupt:
        output.talk("stopped; the same command goes on with the cell that was not finished")
        sys.exit(130)


def _parser(doc: str | None, example: str, steps: int, seeds: list[int]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_corpus_argument(parser)
    here = Path(Path(sys.argv[0]).stem)
    numbers = " ".join(map(str, seeds))
    parser.add_argument("--out", type=Path, default=here, metavar="FOLDER", help="results (default: %(default)s)")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, metavar="N", help=f"default: {numbers}")
    parser.add_argument("--cells", nargs="+", metavar="NAME", help="only these (default: all of --list)")
    parser.add_argument("--steps", type=int, default=steps, metavar="N", help="of each cell (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="print the cells and what each changes, and stop")
    parser.add_argument("--report", action="store_true", help="train nothing: tables and plots of what is there")
    parser.add_argument("--json", action="store_true", help="print the results as one JSON document, no tables")
    return parser


def _conduct(args: argparse.Namespace, study: Study, show: Callable[[list[Result], Path], None]) -> None:
    cells = study.chosen(args.cells)
    if args.list:
        rows = [[cell.name, json.dumps(cell.model), json.dumps(cell.train), cell.note] for cell in cells]
        output.write(output.plain_table(["cell", "model", "train", ""], rows))
        return
    results = Results.in_folder(args.out)
    if args.report:
        names = {cell.name for cell in cells}
        found = [one for one in results.read() if one["cell"] in names and one["seed"] in args.seeds]
        if not found:
            raise DataError(f"{results.place} holds none of these cells; leave out --report to train them")
    else:
        found = run(study, cells, args.seeds, gather_text(args.corpus, 4096), results)
    if args.json:
        output.print_json({"results": found})
    else:
        show(found, args.out)


def write_picture(place: Path, picture: str) -> None:
    """Write an SVG whole, and say where."""
    write_beside(place, picture)
    output.talk(f"wrote {place}")
