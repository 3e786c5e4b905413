"""`moesaic lint`: what a training set-up does to its mixture of experts, found out by experiment."""

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesaic.cli import output
from moesaic.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.train.lint import Report
    from moesaic.train.recipe import Recipe

FOUND = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moesaic lint`."""
    parser.epilog = (
        "example: moesaic lint small.toml\n"
        "example: moesaic lint my_training.py:build  # a function that returns a transformers Trainer, or an OwnLoop\n"
        "exit code 2: something was found"
    )
    parser.add_argument("setup", metavar="SETUP", help="a recipe in TOML, or FILE.py:FUNCTION, a builder of your own")
    parser.add_argument(
        "--set",
        metavar="TABLE.FIELD=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="change one field of the recipe first, for example model.hidden_size=64; may be given again",
    )
    parser.add_argument(
        "--ranks", metavar="N", type=int, default=2, help="processes for the check over ranks; 1 for none (%(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Check a set-up and print the report. Returns the exit code."""
    if args.ranks < 1:
        raise ConfigError(f"--ranks {args.ranks}; give 1 or more")
    build = _setup(args)
    from moesaic.train.lint import lint

    with output.progress("checking"):
        report = lint(build, ranks=args.ranks)
    if args.json:
        output.print_json(report.to_json())
    else:
        _print(report)
    return FOUND if report.findings else 0


def _print(report: "Report") -> None:
    output.table(("check", "verdict", "what was seen"), report.rows(), report.subject)
    for paragraph in report.advice():
        output.write(f"\n{paragraph}\n")


def _setup(args: argparse.Namespace) -> "Recipe | Callable[[], Any]":
    file, _, function = args.setup.rpartition(":")
    if args.setup.endswith(".py") or (file.endswith(".py") and not function):
        raise ConfigError(f"{args.setup} names no function; give FILE.py:FUNCTION, which returns a set-up")
    if file.endswith(".py"):
        if args.overrides:
            raise ConfigError("--set changes a recipe, and this is a builder of your own; change it there")
        return _builder(Path(file), function)
    from moesaic.train.recipe import Recipe, parse_overrides, read_toml, with_values

    tree = read_toml(Path(args.setup))
    tree.pop("sweep", None)
    return Recipe.from_dict(with_values(tree, parse_overrides(args.overrides)))


def _builder(file: Path, function: str) -> Callable[[], Any]:
    """The function, from a module that other processes find by its name, too."""
    if not file.is_file():
        raise ConfigError(f"{file} is no file; give FILE.py:FUNCTION, a function that returns a set-up")
    from moesaic.train.lint.theirs import their_own

    sys.path.insert(0, str(file.resolve().parent))
    with their_own(f"importing {file}"):
        module = importlib.import_module(file.stem)
    if Path(module.__file__ or "").resolve() != file.resolve():
        raise ConfigError(f"{file} has the name of another module, {file.stem!r}; give the file another name")
    build = getattr(module, function, None)
    if not callable(build):
        raise ConfigError(f"{file} has no function {function!r}; give FILE.py:FUNCTION, which returns a set-up")
    return build
