"""`moesaic train`: trains a model from a recipe, with checkpoints to go on from."""

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from moesaic.cli import output
from moesaic.cli.text_source import Text, add_corpus_argument, gather_text
from moesaic.cli.watch import watch
from moesaic.errors import RunFolderError

if TYPE_CHECKING:
    from moesaic.train.loop import Trainer
    from moesaic.train.recipe import Recipe
    from moesaic.train.resume import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "example: moesaic train --out runs/first --set train.steps=500 --set model.num_experts=32"
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="where the run is written")
    parser.add_argument(
        "--config", metavar="FILE", type=Path, help="a recipe in TOML: tables model and train (default: the demo's)"
    )
    parser.add_argument(
        "--set",
        metavar="TABLE.FIELD=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one field of the recipe, for example train.learning_rate=3e-4; may be given again",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add_corpus_argument(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")


def run(args: argparse.Namespace) -> int:
    from moesaic.train.resume import RunFolder

    recipe = _recipe(args)
    recipe.model_config(recipe.vocab_size, None)  # a mistake in it is answered before anything is read or written
    with RunFolder.claim(args.out) as folder:
        _check_fresh(folder, args.resume)
        text = gather_text(args.corpus, recipe.vocab_size, folder.path / "tokenizer")
        trainer = _trainer(recipe, text, folder)
        folder.write_recipe({"recipe": recipe.to_dict(), "corpus": text.source})
        _keep_tokenizer(text, folder)
        if trainer.resume():
            output.talk(f"going on from step {trainer.step} of {recipe.train.steps}")
        with watch("training", recipe.train.steps) as listener:
            trainer.train(listener)
        _finish(trainer, folder, text, args.json)
    output.next_command(f'moesaic generate {folder.model} --prompt "In the beginning"')
    return 0


def _recipe(args: argparse.Namespace) -> "Recipe":
    from moesaic.train.compare import DEMO_MODEL, demo_settings
    from moesaic.train.recipe import Recipe, apply_overrides

    if args.config is not None:
        return Recipe.from_toml(args.config, args.overrides)
    default = {"model": DEMO_MODEL, "train": dataclasses.asdict(demo_settings(seed=0))}
    return Recipe.from_dict(apply_overrides(default, args.overrides))


def _check_fresh(folder: "RunFolder", resume: bool) -> None:
    if folder.checkpoints and not resume:
        step, _ = folder.checkpoints[-1]
        raise RunFolderError(
            f"{folder.path} holds a run at step {step}; add --resume to go on, or choose another folder with --out"
        )


def _keep_tokenizer(text: Text, folder: "RunFolder") -> None:
    """A resumed run has read its tokenizer from here: written once, it cannot be lost to a full disk."""
    from moesaic.hub.staging import replaced_folder

    place = folder.path / "tokenizer"
    if not (place / "tokenizer.json").exists():
        with replaced_folder(place, is_stale=lambda name: True) as new:
            text.tokenizer.save(new)


def _trainer(recipe: "Recipe", text: Text, folder: "RunFolder") -> "Trainer":
    from moesaic.models.decoder import Decoder
    from moesaic.train.loop import Trainer

    config = recipe.model_config(text.tokenizer.vocab_size, text.packed.eos_id)
    output.talk(
        f"{config.family}: {output.number(config.total)} parameters, {output.number(config.active_gemm)} active, "
        f"{recipe.train.steps} steps of {recipe.train.tokens_per_step} tokens"
    )
    model = Decoder(config).initialize(recipe.train.seed)
    return Trainer(model, recipe.train, text.packed, run=folder, tokenizer=text.tokenizer)


def _finish(trainer: "Trainer", folder: "RunFolder", text: Text, as_json: bool) -> None:
    from moesaic.hub.saving import save

    save(trainer.model, folder.model, tokenizer=text.tokenizer)
    loss = trainer.evaluate(max_tokens=65_536).loss
    if as_json:
        output.print_json(
            {
                "model": str(folder.model),
                "steps": trainer.step,
                "bits_per_byte": loss.bits_per_byte,
                "by_domain": loss.by_domain,
                "training_seconds": trainer.seconds,
            }
        )
        return
    rows = [(name, f"{bits:.3f}") for name, bits in loss.by_domain.items()]
    output.table(("held-out text", "bits per byte"), [*rows, ("all, equal weight", f"{loss.bits_per_byte:.3f}")])
