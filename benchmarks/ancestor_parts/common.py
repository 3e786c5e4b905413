"""What the three parts share: claims and tables, data that comes with scikit-learn, the choice of a learning rate."""

import importlib
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from moesaic.errors import MissingDependencyError

Row = dict[str, Any]
Run = TypeVar("Run")


class Claim(NamedTuple):
    """What a paper says, and whether it was found again here."""

    text: str
    is_found: bool
    figures: str


class Part(NamedTuple):
    """One ancestor: its task, tables of rows by title, claims."""

    task: str
    tables: dict[str, list[Row]]
    claims: list[Claim]


class Cases(NamedTuple):
    """Inputs and targets, to learn from and held out."""

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor


def talk(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def less(text: str, low: Row, high: Row, key: str) -> Claim:
    """The claim that one row has less of something than another."""
    return Claim(text, low[key] < high[key], f"{low[key]:.4g} against {high[key]:.4g}")


def data_set(name: str) -> Any:
    """A data set that comes with scikit-learn."""
    try:
        return getattr(importlib.import_module("sklearn.datasets"), f"load_{name}")()
    except ImportError as error:
        raise MissingDependencyError("the 1991 and 1994 data need scikit-learn; pip install scikit-learn") from error


def split(x: Tensor, y: Tensor, num_train: int) -> Cases:
    """Cases in a fixed random order: the first to learn from, the rest held out."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held = order[:num_train], order[num_train:]
    return Cases(x[train], y[train], x[held], y[held])


def best_rate(runs: Mapping[float, Sequence[Run]], cost: Callable[[Run], float]) -> float:
    """The learning rate with the lowest median cost over the seeds; of equals, the first."""
    return min(runs, key=lambda rate: median(cost(run) for run in runs[rate]))
