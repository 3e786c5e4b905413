"""`moesaic.lint`: all checks on someone's set-up."""

import functools
from collections.abc import Callable
from typing import Any

import moesaic.train.lint.learning
import moesaic.train.lint.load
import moesaic.train.lint.scale
import moesaic.train.lint.selection  # noqa: F401  checks enter their registry when they are imported
from moesaic.errors import ConfigError
from moesaic.train.lint.checks import CHECKS
from moesaic.train.lint.processes import Elsewhere
from moesaic.train.lint.recipe import RecipeSetUp
from moesaic.train.lint.report import Report
from moesaic.train.lint.setups import SetUp
from moesaic.train.lint.stand import Stand
from moesaic.train.lint.theirs import their_own
from moesaic.train.lint.trainer import TrainerSetUp, is_trainer
from moesaic.train.recipe import Recipe

ORDER = (
    "balancing",
    "layers pooled in the balance loss",
    "balance loss over micro-batches",
    "balance loss over ranks",
    "padding in the balance loss",
    "balance loss counted after dropping",
    "selection bias that never moves",
    "selection bias counted after dropping",
    "groups masked with 0",
    "experts without gradient",
)


def lint(build: Callable[[], Any] | Recipe, *, ranks: int = 2) -> Report:
    """Find out by experiment what a training set-up does to its mixture of experts, and what of it is wrong.

    build: called without arguments, gives a transformers Trainer, or a loop of one's own (`moesaic.train.lint.OwnLoop`:
    a model, a micro-batch and a function that makes a step); or a recipe of moesaic. Build it small: the same code with
    a tiny configuration has the same defects. Nothing is saved, and weights are put back after each experiment.
    ranks: processes for the check over ranks, in which `build` is called anew; below 2 for none.
    Routing is dictated from outside and the set-up's own code is run on it; what is found are measured factors, and no
    name of a module, weight or setting decides anything. Raises ConfigError for what cannot be trained or has no
    experts, and where the builder or its step fails.
    """
    if isinstance(build, Recipe):
        build = functools.partial(RecipeSetUp, build)
    with their_own("the builder"):
        set_up = set_up_of(build())
    stand = Stand(set_up)
    with their_own("reading the first batch"):
        _ = stand.set_up.batch
    elsewhere = Elsewhere(build, ranks)
    return Report(stand.set_up.subject, tuple(CHECKS[name].of(stand, elsewhere) for name in ORDER))


def set_up_of(built: Any) -> SetUp:
    """What a builder gave, as a set-up. Raises ConfigError for other things."""
    if is_trainer(built):
        return TrainerSetUp(built)
    if all(hasattr(built, name) for name in ("model", "batch", "step", "gradients", "columns", "padded")):
        return built
    raise ConfigError(
        f"the builder gave a {type(built).__name__}; let it return a transformers Trainer, or "
        "moesaic.train.lint.OwnLoop(model, batch, step)"
    )
