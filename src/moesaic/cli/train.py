"""`moesaic train`: trains a model from a recipe, or a sweep of them, with checkpoints to go on from."""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from moesaic.cli import output
from moesaic.cli.foretelling import StepWatch
from moesaic.cli.live_block import watch
from moesaic.cli.recipes import Source, print_recipe, show_derived, source_of
from moesaic.cli.text_source import AnyText, add_corpus_argument, gather_for
from moesaic.cli.watch import watched_by_page
from moesaic.errors import ConfigError, RunFolderError
from moesaic.kernels.devices import described, device_of

if TYPE_CHECKING:
    from moesaic.train.loop import Listener, Trainer
    from moesaic.train.profile import Profiled
    from moesaic.train.recipe import Recipe
    from moesaic.train.resume import RunFolder
    from moesaic.train.size import TextFacts
    from moesaic.train.sweep import RunResult

MOST_PASSES = 4  # over the text without a word about it
FINAL_EVALUATIONS = 8  # the last evaluation reads this many times the text of the others, ...
MOST_FINAL_TOKENS = 65_536  # ... and not more than this of a domain

EXAMPLES = """\
example: moesaic train --out runs/first  # the tiny size, 2 to 3 minutes
example: moesaic train --out runs/first --resume  # go on after a stop
example: moesaic train --size small --print-recipe > small.toml  # a recipe to change and keep
example: moesaic train --out runs/even --set 'train.balance_losses=[["global_exact", 0.01]]'
example: moesaic train --config small.toml --corpus my-texts --out runs/small
example: moesaic train --out runs/rates --sweep train.learning_rate=1e-3,3e-3 train.seed=0,1"""


class Finished(NamedTuple):
    """A run that is done: its result, and its profile where one was asked for."""

    result: "RunResult"
    profiled: "Profiled | None"

    def to_json(self) -> dict[str, Any]:
        """What --json prints: the result's fields, and `profile` where one was made."""
        profile = {"profile": self.profiled.to_json()} if self.profiled else {}
        return {**self.result.to_json(), **profile}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic train`."""
    parser.epilog = EXAMPLES
    parser.add_argument("--out", metavar="FOLDER", type=Path, help="where the run is written")
    parser.add_argument(
        "--size", metavar="SIZE", help="derive the recipe from a size: tiny (the default), small, medium or large"
    )
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="a recipe in TOML: tables model, train and data; sweep too"
    )
    parser.add_argument(
        "--set",
        metavar="TABLE.FIELD=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one field of the recipe, for example train.learning_rate=3e-4; may be given again",
    )
    parser.add_argument(
        "--sweep",
        metavar="TABLE.FIELD=V,V",
        nargs="*",
        help="train every combination of these values, each in a folder of its own below --out; "
        "with nothing after it: those of the [sweep] table in --config",
    )
    add_corpus_argument(parser)
    parser.add_argument(
        "--resume", action="store_true", help="go on with what --out holds, by the recipe it was started with"
    )
    parser.add_argument(
        "--doctor",
        choices=["advise", "act", "off"],
        help="say what is ill about routers and experts, or mend it too and undo what does not help "
        "(sets train.doctor; off)",
    )
    parser.add_argument("--tensorboard", action="store_true", help="write event files for TensorBoard, too")
    parser.add_argument("--watch", action="store_true", help="open a page on this machine that follows the run")
    parser.add_argument("--no-browser", action="store_true", help="with --watch: only say where the page is")
    parser.add_argument("--prometheus", action="store_true", help="keep RUN/metrics.prom, routing for Prometheus, too")
    parser.add_argument(
        "--profile",
        metavar="STEPS",
        nargs="?",
        type=int,
        const=3,
        help="profile a few steps (3): a trace for Perfetto, trace.json.gz, and a table of where the time goes",
    )
    parser.add_argument("--print-recipe", action="store_true", help="print the recipe as TOML and leave")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print a recipe, train it, or train a sweep of it. Returns the exit code."""
    if args.out is None and not args.print_recipe:
        raise ConfigError("train needs --out FOLDER, or --print-recipe; see `moesaic train --help`")
    if args.profile is not None and args.profile < 1:
        raise ConfigError(f"--profile {args.profile}; give the number of steps to profile, 1 or more")
    if args.print_recipe and args.sweep is not None:
        raise ConfigError("--print-recipe prints one recipe and --sweep has many; leave one of them out")
    if args.watch and args.sweep is not None:
        raise ConfigError("--watch follows one run and --sweep has many; `moesaic watch` follows any of them")
    if args.no_browser and not args.watch:
        raise ConfigError("--no-browser says how to --watch; add it, or leave it out")
    if args.doctor is not None:
        args.overrides = [*args.overrides, f"train.doctor={args.doctor}"]
    source = source_of(args)
    if args.print_recipe:
        print_recipe(source, args.json)
        return 0
    if source.axes is not None:
        from moesaic.cli.sweeping import run_sweep

        return run_sweep(args, source)
    return _run_one(args, source)


def _run_one(args: argparse.Namespace, source: Source) -> int:
    from moesaic.train.resume import RunFolder

    recipe = source.recipe()  # a mistake in it is answered before anything is read or written
    device_of(recipe.train.device, "train.device")
    corpus = source.corpus_folder(args.corpus)
    with RunFolder.claim(args.out) as folder:
        _check_fresh(folder, args.resume)
        text = gather_for(recipe.data.task, corpus, recipe.vocab_size, folder.path / "tokenizer")
        recipe = source.recipe(text=text_facts(text))
        document: dict[str, Any] = {}
        if source.size is not None and source.tree is None:
            sized = source.sized(text=text_facts(text))
            show_derived(sized)
            document = {"derived": [row._asdict() for row in sized.derived]}
        finished = train_run(recipe, text, folder, args, corpus)
    if args.json:
        output.print_json({**finished.to_json(), **document})
    else:
        _show(finished)
    output.next_command(f"moesaic generate {folder.model} {_prompt(recipe, text)}")
    return 0


def _prompt(recipe: "Recipe", text: AnyText) -> str:
    """The options with which to try the model out."""
    from moesaic.data.packed import Packed
    from moesaic.data.special_tokens import language_token, sentinel

    if recipe.data.task == "span_corruption":
        return f'--prompt "In the {sentinel(0)} God created"'
    if isinstance(text.packed, Packed):
        return '--prompt "In the beginning"'
    source, target = next(iter(text.packed.train))
    return f'--prompt "{language_token(source)}Hello" --target-prefix "{language_token(target)}"'


def train_run(
    recipe: "Recipe", text: AnyText, folder: "RunFolder", args: argparse.Namespace, corpus: Path | None
) -> Finished:
    """Train one recipe in its folder, from its newest checkpoint if it has one, and evaluate what came of it."""
    trainer = _trainer(recipe, text, folder)
    folder.write_recipe(
        {
            "recipe": recipe.to_dict(),
            "corpus": text.source,
            "corpus_folder": None if corpus is None else str(corpus),
        }
    )
    _keep_tokenizer(text, folder)
    if trainer.resume():
        output.talk(f"going on from step {trainer.step} of {recipe.train.steps}")
    elif args.resume:
        output.talk(f"no checkpoint in {folder.path}: starting at step 0")
    profiled = _train(trainer, folder, args)
    return Finished(_finish(trainer, folder, text), profiled)


def text_facts(text: AnyText) -> "TextFacts":
    """What a size needs to know of the text: its training tokens and its vocabulary."""
    from moesaic.data.packed import Packed
    from moesaic.train.size import TextFacts

    num_tokens = text.packed.num_train_tokens if isinstance(text.packed, Packed) else 0
    return TextFacts(num_tokens, text.tokenizer.vocab_size)


def _train(trainer: "Trainer", folder: "RunFolder", args: argparse.Namespace) -> "Profiled | None":
    from moesaic.train.interrupt import Interrupted
    from moesaic.train.profile import StepProfiler

    with ExitStack() as stack:
        if args.watch:
            stack.enter_context(watched_by_page(folder.path, not args.no_browser))
        steps = StepWatch(trainer)
        listeners = [stack.enter_context(watch("training", trainer.settings.steps)), steps]
        if args.tensorboard:
            listeners.append(_board(stack, folder.path / "tensorboard", trainer.step + 1))
        if args.prometheus:
            listeners.append(_scraped(stack, folder.path / "metrics.prom"))
        profiler = None
        if args.profile is not None:
            profiler = stack.enter_context(StepProfiler(trainer, folder.path / "trace.json.gz", args.profile))
        try:
            trainer.train(*listeners)
        except Interrupted as stop:
            raise Interrupted(f"{stop}: moesaic train --out {args.out} --resume") from stop
    steps.keep(str(folder.path), folder.path)
    if profiler is None:
        return None
    if profiler.found is None:
        output.talk("no step was left to profile; take another folder with --out")
    else:
        _show_profile(profiler.found)
    return profiler.found


def _board(stack: ExitStack, folder: Path, first_step: int) -> "Listener":
    """A listener that writes what metrics.jsonl gets as TensorBoard's scalars."""
    from moesaic.telemetry.tensorboard import EventFile, line_scalars
    from moesaic.train.reports import losses_line

    events = stack.enter_context(EventFile(folder, first_step))
    return lambda report, evaluation: events.add(
        report.step, line_scalars(losses_line(report, evaluation), report.load)
    )


def _scraped(stack: ExitStack, place: Path) -> "Listener":
    """A listener that keeps the newest routing as Prometheus text."""
    from moesaic.telemetry.prometheus import PrometheusFile

    file = stack.enter_context(PrometheusFile(place))
    return lambda report, evaluation: file.add(report.load)


def _check_fresh(folder: "RunFolder", resume: bool) -> None:
    if (folder.path / "sweep.json").exists():
        raise RunFolderError(f"{folder.path} holds a sweep; add --sweep and --resume, or choose another folder")
    if folder.checkpoints and not resume:
        step, _ = folder.checkpoints[-1]
        raise RunFolderError(
            f"{folder.path} holds a run at step {step}; add --resume to go on, or choose another folder with --out"
        )


def _keep_tokenizer(text: AnyText, folder: "RunFolder") -> None:
    """A resumed run has read its tokenizer from here: written once, it cannot be lost to a full disk."""
    from moesaic.hub.staging import replaced_folder

    place = folder.path / "tokenizer"
    if not (place / "tokenizer.json").exists():
        with replaced_folder(place, is_stale=lambda name: True) as new:
            text.tokenizer.save(new)


def _trainer(recipe: "Recipe", text: AnyText, folder: "RunFolder") -> "Trainer":
    from moesaic.models.build import build
    from moesaic.train.loop import Trainer

    config = recipe.model_config(text.tokenizer.vocab_size, text.packed.eos_id)
    device = device_of(recipe.train.device, "train.device")
    output.talk(
        f"{config.family}: {output.number(config.total)} parameters, {output.number(config.active_gemm)} active, "
        f"{recipe.train.steps} steps of {_step_size(recipe)} in {recipe.train.precision} on {described(device)}"
    )
    _say_passes(recipe, text)
    model = build(config).initialize(recipe.train.seed)
    trainer = Trainer(
        model,
        recipe.train,
        text.packed,
        data=recipe.data,
        run=folder,
        tokenizer=text.tokenizer,
        keep_reports=1,
        say=output.talk,
    )
    if trainer.task.num_left_out:
        output.talk(
            f"{trainer.task.num_left_out} pairs have more than {recipe.train.sequence_length} tokens on a side and are "
            "left out; a longer train.sequence_length takes them in"
        )
    return trainer


def _step_size(recipe: "Recipe") -> str:
    settings = recipe.train
    if recipe.data.task != "translation":
        return f"{settings.tokens_per_step} tokens"
    return f"{settings.micro_batches * settings.batch_size} pairs"


def _say_passes(recipe: "Recipe", text: AnyText) -> None:
    from moesaic.data.packed import Packed

    settings = recipe.train
    if isinstance(text.packed, Packed):
        seen, there, what = settings.tokens_per_step, text.packed.num_train_tokens, "tokens of text"
    else:
        seen, there, what = settings.micro_batches * settings.batch_size, text.packed.num_train_pairs, "pairs"
    passes = settings.steps * seen / max(1, there)
    if passes > MOST_PASSES:
        output.talk(
            f"that is {passes:.1f} passes over {output.number(there)} {what}; "
            f"beyond {MOST_PASSES}, more text helps more than more steps"
        )


def _finish(trainer: "Trainer", folder: "RunFolder", text: AnyText) -> "RunResult":
    """Write the finished model and look at it once more, over more text."""
    from moesaic.hub.saving import save
    from moesaic.train.sweep import RunResult

    model = trainer.final_model()
    save(model, folder.model, tokenizer=text.tokenizer)
    tokens = max(
        trainer.settings.evaluate_tokens, min(MOST_FINAL_TOKENS, FINAL_EVALUATIONS * trainer.settings.evaluate_tokens)
    )
    evaluation = trainer.evaluate(max_tokens=tokens)
    loss, misled = evaluation.ema_loss or evaluation.loss, trainer.task.misled_loss(model, tokens)
    return RunResult(
        model=str(folder.model),
        steps=trainer.step,
        bits_per_byte=loss.bits_per_byte,
        by_domain=dict(loss.by_domain),
        training_seconds=trainer.seconds,
        total_parameters=trainer.model.config.total,
        active_parameters=trainer.model.config.active_gemm,
        other_sources=None if misled is None else misled.bits_per_byte,
    )


def _show(finished: Finished) -> None:
    result = finished.result
    rows = [(name, f"{bits:.3f}") for name, bits in result.by_domain.items()]
    rows.append(("all, equal weight", f"{result.bits_per_byte:.3f}"))
    if result.other_sources is not None:
        rows.append(("all, after sources of other targets", f"{result.other_sources:.3f}"))
    output.table(("held-out text", "bits per byte"), rows)


def _show_profile(profiled: "Profiled") -> None:
    rows = [
        (time.phase, f"{time.forward_ms:.2f}", f"{time.backward_ms:.2f}", f"{time.share:.1%}")
        for time in profiled.times
    ]
    last = profiled.first_step + profiled.num_steps - 1
    title = f"steps {profiled.first_step} to {last}, {profiled.step_ms:.1f} ms each, the profiler's own cost included"
    columns = ("phase", "forward ms", "backward ms", "of a step")
    output.talk(output.plain_table(columns, rows, title).rstrip())
    output.talk(f"trace: {profiled.trace} (open it in Perfetto or chrome://tracing)")
