"""What was predicted beside what was measured: kept in small files, added up to a table of errors, and its drift.

One JSON object a line, in moesaic's state folder (and in the run folder of a training run, where there is one).
"""

import datetime
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moesaic.errors import ConfigError
from moesaic.plan.hardware import state_folder

Quantity = Literal["decode_s", "prefill_s", "step_s", "tokens_per_second", "peak_bytes"]
FILE = "predictions.jsonl"
DRIFT = 10
"""Newest measurements, whose error is compared with that of all before."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One figure, foretold and then measured. source: what measured it. setting: in which cell, words and numbers.
    machine: where, in words."""

    source: Literal["bench", "train", "serve"]
    model: str
    quantity: Quantity
    predicted: float
    measured: float
    setting: dict[str, Any]
    date: str = ""
    machine: str = ""

    @property
    def error(self) -> float:
        """Relative, of what was measured; above 0 where too much was foretold."""
        return self.predicted / self.measured - 1


class Errors(NamedTuple):
    """Of one quantity of one source: how many, median and nine tenths of the absolute errors, share within 20%, the
    median error with its sign, and by how much the newest are off more than those before (None: too few)."""

    source: str
    quantity: Quantity
    number: int
    median: float
    ninety: float
    within_20: float
    bias: float
    drift: float | None


def store(predictions: Iterable[Prediction], *others: Path) -> Path:
    """Append to the file in moesaic's state folder, and to others. Figures not above 0 are left out."""
    lines = "".join(f"{json.dumps(asdict(_dated(each)))}\n" for each in predictions if _is_sound(each))
    own = state_folder() / FILE
    for path in (own, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(lines)
    return own


def load(path: Path | None = None) -> list[Prediction]:
    """All that was stored, oldest first; none where there is no file. Raises ConfigError for a damaged one."""
    path = path or state_folder() / FILE
    if not path.is_file():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(Prediction(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{path}, line {number} is no prediction ({error}); take the line away") from error
    return found


def error_table(predictions: Sequence[Prediction]) -> list[Errors]:
    """A row for each quantity of each source."""
    groups: dict[tuple[str, Quantity], list[Prediction]] = {}
    for each in predictions:
        groups.setdefault((each.source, each.quantity), []).append(each)
    return [_errors(source, quantity, group) for (source, quantity), group in sorted(groups.items())]


def _errors(source: str, quantity: Quantity, group: Sequence[Prediction]) -> Errors:
    sizes = [abs(each.error) for each in group]
    return Errors(
        source,
        quantity,
        len(group),
        statistics.median(sizes),
        sorted(sizes)[max(0, math.ceil(0.9 * len(sizes)) - 1)],
        sum(size <= 0.2 for size in sizes) / len(sizes),
        statistics.median(each.error for each in group),
        _drift(group),
    )


def _drift(group: Sequence[Prediction]) -> float | None:
    """How much larger the signed error of the newest is than that of the ones before."""
    if len(group) < 2 * DRIFT:
        return None
    newest, before = group[-DRIFT:], group[:-DRIFT]
    return statistics.median(each.error for each in newest) - statistics.median(each.error for each in before)


def _dated(each: Prediction) -> Prediction:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return each if each.date else Prediction(**{**asdict(each), "date": now})


def _is_sound(each: Prediction) -> bool:
    return all(math.isfinite(value) and value > 0 for value in (each.predicted, each.measured))
