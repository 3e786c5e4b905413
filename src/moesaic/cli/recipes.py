"""Where `moesaic train` gets its recipe: a size, a file, or the run that is resumed; and how it shows what it got."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli import output
from moesaic.errors import ConfigError, RunFolderError

if TYPE_CHECKING:
    from moesaic.train.recipe import Recipe
    from moesaic.train.size import SizedRecipe, TextFacts

DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a recipe is made of: a size or a whole tree, the fields that are set on top, and the axes of a sweep.

    corpus: the folder of text that the resumed run used, where none is given now.
    """

    size: str | None = None
    tree: dict[str, Any] | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, list[Any]] | None = None
    corpus: Path | None = None

    def recipe(self, more: Mapping[str, Any] | None = None, text: "TextFacts | None" = None) -> "Recipe":
        """The recipe with `more` changes, checked as far as it can be without the text."""
        from moesaic.train.recipe import Recipe, with_values

        if self.tree is None:
            recipe = self.sized(more, text).recipe
        else:
            recipe = Recipe.from_dict(with_values(self.tree, {**self.changes, **(more or {})}))
        recipe.model_config(recipe.vocab_size, None)
        return recipe

    def sized(self, more: Mapping[str, Any] | None = None, text: "TextFacts | None" = None) -> "SizedRecipe":
        """The same with the reasons of every field; for sizes only."""
        from moesaic.train.size import derive

        assert self.size is not None
        return derive(self.size, {**self.changes, **(more or {})}, text=text)

    def corpus_folder(self, given: Path | None) -> Path | None:
        """The folder of text: the one given now, or the resumed run's, by its full name."""
        folder = given or self.corpus
        return None if folder is None else folder.resolve()

    def to_json(self) -> dict[str, Any]:
        """What recipe.json remembers of a sweep's start; the axes stand in sweep.json."""
        return {"size": self.size, "tree": self.tree, "changes": self.changes}


def source_of(args: argparse.Namespace) -> Source:
    """Read what the command line asks for. Raises ConfigError for what excludes each other."""
    from moesaic.train.recipe import parse_overrides, read_toml
    from moesaic.train.size import DEFAULT_SIZE
    from moesaic.train.sweep import axes_of_table

    if args.size is not None and args.config is not None:
        raise ConfigError("--size and --config both describe the recipe; give one, and change fields with --set")
    changes = parse_overrides(args.overrides)
    if args.config is not None:
        tree = read_toml(args.config)
        table = tree.pop("sweep", None)
        if table is not None and args.sweep is None:
            raise ConfigError(f"{args.config} has a [sweep] table; add --sweep to run it, or remove the table")
        axes = None if args.sweep is None else _axes(args.sweep, axes_of_table(table or {}))
        return Source(tree=tree, changes=changes, axes=axes)
    axes = None if args.sweep is None else _axes(args.sweep, {})
    earlier = _resumed(args.out) if args.resume and args.size is None else None
    if earlier is not None:
        return Source(
            size=earlier.size,
            tree=earlier.tree,
            changes={**earlier.changes, **changes},
            axes=axes or earlier.axes,
            corpus=earlier.corpus,
        )
    return Source(size=args.size or DEFAULT_SIZE, changes=changes, axes=axes)


def _axes(words: list[str], axes: dict[str, list[Any]]) -> dict[str, list[Any]]:
    from moesaic.train.sweep import parse_axis

    return {**axes, **dict(parse_axis(word) for word in words)}


def _resumed(out: Path) -> Source | None:
    """What the run or sweep in a folder was started with; None when there is none yet."""
    from moesaic.train.resume import damaged_recipe

    place, sweep = out / "recipe.json", out / "sweep.json"
    if not place.exists():
        return None
    try:
        facts = json.loads(place.read_text(encoding="utf-8"))
        corpus = facts["corpus_folder"]
        start = facts["start"] if "start" in facts else {"size": None, "tree": facts["recipe"], "changes": {}}
        source = Source(**start, corpus=None if corpus is None else Path(corpus))
        if not isinstance(source.size, str) and not isinstance(source.tree, dict):
            raise ValueError("it names neither a size nor a recipe")
        if not isinstance(source.changes, dict):
            raise ValueError("its changes are no table")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged_recipe(place, repr(error)) from error
    return replace(source, axes=_axes_of_sweep(sweep)) if "start" in facts else source


def _axes_of_sweep(place: Path) -> dict[str, list[Any]]:
    from moesaic.train.sweep import axes_of_table

    try:
        return axes_of_table(json.loads(place.read_text(encoding="utf-8"))["axes"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
        raise RunFolderError(
            f"{place} is damaged ({error!r}); delete it if it is there and give --config or --size, --sweep and "
            "--resume again: every point is looked at once more"
        ) from error


def print_recipe(source: Source, as_json: bool) -> None:
    """The recipe as TOML to keep in a file, with the reason of every derived field beside it."""
    from moesaic.train.toml_text import to_toml

    recipe = source.recipe()
    derived = source.sized().derived if source.tree is None else ()
    if as_json:
        output.print_json({"recipe": recipe.to_dict(), "derived": [row._asdict() for row in derived]})
    else:
        output.write(to_toml(recipe.to_dict(), {row.field: row.reason for row in derived}))
    output.next_command("moesaic train --config FILE --out runs/first, with this in FILE")


def show_derived(sized: "SizedRecipe") -> None:
    """What a size derived, field by field, and how long it may take, on stderr."""
    rows = [(row.field, _short(row.value), row.reason) for row in sized.derived]
    output.talk(output.plain_table(("field", "value", "why"), rows, f"--size {sized.size} derives").rstrip())
    time = output.duration(sized.seconds) if sized.seconds < DAY_S else f"{sized.seconds / DAY_S:,.0f} days"
    output.talk(f"{output.number(sized.tokens)} tokens, {sized.flops:.1e} FLOPs: about {time} on two CPU cores")
    if sized.seconds > DAY_S:
        output.talk(f"--size {sized.size} is more than CPUs do in a day: it is made for a GPU")


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
