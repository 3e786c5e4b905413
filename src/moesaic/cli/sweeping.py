"""`moesaic train --sweep`: every point of a sweep trained in its own folder, and a table of how they did."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli import output
from moesaic.cli.recipes import Source
from moesaic.cli.text_source import AnyText, gather_for
from moesaic.cli.train import text_facts, train_run
from moesaic.errors import MoesaicError, RunFolderError
from moesaic.train.interrupt import Interrupted

if TYPE_CHECKING:
    from moesaic.train.recipe import Recipe
    from moesaic.train.resume import RunFolder
    from moesaic.train.sweep import Point, RunResult, Sweep


def run_sweep(args: argparse.Namespace, source: Source) -> int:
    """Train what is left of the sweep. Raises MoesaicError at the end when points have failed."""
    from moesaic.train.resume import RunFolder
    from moesaic.train.sweep import Sweep, points_of

    assert source.axes is not None
    for point in points_of(source.axes):
        source.recipe(point.changes)  # a mistake in any of them is answered before anything is read or written
    corpus = source.corpus_folder(args.corpus)
    with RunFolder.claim(args.out) as folder:
        if folder.checkpoints:
            raise RunFolderError(f"{folder.path} holds a single run; choose another folder with --out for the sweep")
        sweep = Sweep.begin(folder.path, source.axes, resume=args.resume)
        trainer = _PointTrainer(args, source, folder, corpus)
        trainer.remember()
        try:
            sweep.run(trainer, output.talk)
        except KeyboardInterrupt as stop:
            hint = f"moesaic train --out {args.out} --resume"
            raise Interrupted(f"{_done(sweep)} of {len(sweep.points)} points are done; go on with {hint}") from stop
    _show(sweep, args.json)
    _refuse_failures(sweep)
    output.next_command(f'moesaic generate {_best_model(sweep)} --prompt "In the beginning"')
    return 0


class _PointTrainer:
    """Trains a point; the text is gathered once for each size of vocabulary and each task."""

    def __init__(self, args: argparse.Namespace, source: Source, folder: "RunFolder", corpus: Path | None) -> None:
        self.args, self.source, self.folder, self.corpus = args, source, folder, corpus
        self._texts: dict[tuple[int, str], AnyText] = {}
        self._text(source.recipe())  # text that cannot be used is the whole sweep's failure, not a point's

    def remember(self) -> None:
        """Write what the sweep was started with, for --resume."""
        self.folder.write_recipe(
            {
                "start": json.loads(json.dumps(self.source.to_json())),
                "corpus": next(iter(self._texts.values())).source,
                "corpus_folder": None if self.corpus is None else str(self.corpus),
            }
        )

    def __call__(self, point: "Point") -> "RunResult":
        from moesaic.train.resume import RunFolder

        text = self._text(self.source.recipe(point.changes))
        recipe = self.source.recipe(point.changes, text_facts(text))
        with RunFolder.claim(self.folder.path / point.name) as folder:
            return train_run(recipe, text, folder, self.args, self.corpus).result

    def _text(self, recipe: "Recipe") -> AnyText:
        vocab_size, task = recipe.vocab_size, recipe.data.task
        if (vocab_size, task) not in self._texts:
            name = "-".join(("tokenizer", str(vocab_size), *([] if task == "causal" else [task])))
            place = self.folder.path / name
            text = gather_for(task, self.corpus, vocab_size, place)
            if not (place / "tokenizer.json").exists():
                text.tokenizer.save(place)
            self._texts[vocab_size, task] = text
        return self._texts[vocab_size, task]


def _done(sweep: "Sweep") -> int:
    return sum(point.status == "done" for point in sweep.points)


def _best_model(sweep: "Sweep") -> str:
    best = sweep.best_first[0].result
    assert best is not None
    return best.model


def _show(sweep: "Sweep", as_json: bool) -> None:
    if as_json:
        output.print_json({**sweep.to_json(), "best": sweep.best_first[0].name})
        return
    rows = []
    for point in sweep.best_first:
        result = point.result
        numbers = (
            (f"{result.bits_per_byte:.3f}", str(result.steps), output.duration(result.training_seconds))
            if result
            else ("-", "-", "-")
        )
        rows.append((point.name, *numbers, point.error or point.status))
    output.table(("point", "held-out bits per byte", "steps", "training time", "state"), rows)


def _refuse_failures(sweep: "Sweep") -> None:
    failed = [point for point in sweep.points if point.status == "failed"]
    if failed:
        raise MoesaicError(
            f"{len(failed)} of {len(sweep.points)} points failed, the first of them {failed[0].name}: "
            f"{failed[0].error}; put it right and go on with --resume"
        )
