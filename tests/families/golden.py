"""What transformers' models of the tiny cases answered: kept in tests/golden/families, written by make_families.py.

A file a family holds the answers of its cases, and in its header what their checkpoints are made again from: the
configuration, with the version of transformers, and the names and shapes of the tensors, whose values are drawn (see
drawn.py).
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tests.families.drawn import drawn, noise

FOLDER = Path(__file__).parents[1] / "golden" / "families"
COUNTS = FOLDER / "preset_counts.json"
COLUMNS = slice(None, None, 10)  # those of logits that are kept: 14 of 131, the last one with them


@dataclass(frozen=True, kw_only=True)
class Golden:
    """A case: what transformers writes (without the values) and what its model answers."""

    case: str
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    num_learned: int
    answers: dict[str, Tensor] = field(repr=False)

    def write(self, folder: Path) -> None:
        """The checkpoint as transformers writes it."""
        tensors = {name: drawn(self.case, name, shape, self.config) for name, shape in self.shapes.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")


@cache
def golden(case: str) -> Golden:
    """What is kept of a case."""
    with safe_open(FOLDER / f"{_family(case)}.safetensors", "pt") as file:
        said = json.loads(file.metadata()["cases"])[case]
        names = [name for name in file.keys() if name.startswith(f"{case}: ")]  # noqa: SIM118 (no iteration)
        answers = {name.removeprefix(f"{case}: "): file.get_tensor(name) for name in names}
    return Golden(case=case, answers=answers, **said)


@cache
def preset_counts() -> dict[str, int]:
    """How many parameters transformers' model of a preset learns, but for what predicts further tokens."""
    return json.loads(COUNTS.read_text(encoding="utf-8"))


def keep(goldens: Iterable[Golden]) -> None:
    """Writes the files of these cases' families, of which they are all."""
    said = [each.name for each in fields(Golden) if each.name not in ("case", "answers")]
    for family, own in groupby(sorted(goldens, key=lambda each: _family(each.case)), lambda each: _family(each.case)):
        cases = list(own)
        header = {each.case: {name: getattr(each, name) for name in said} for each in cases}
        answers = {f"{each.case}: {name}": tensor for each in cases for name, tensor in each.answers.items()}
        metadata = {"cases": json.dumps(header, separators=(",", ":"))}
        save_file(answers, FOLDER / f"{family}.safetensors", metadata=metadata)


def slopes(gradients: dict[str, Tensor]) -> Tensor:
    """[N, 3] of N tensors, in the order of their names: the largest slope, and those along two drawn directions.

    Every element of a gradient is part of the latter, at the scale of one: a direction's numbers have a sum of squares
    of 1.
    """
    rows = []
    for name, slope in sorted(gradients.items()):
        directions = (noise(f"direction {number}: {name}", slope.shape) for number in (1, 2))
        along = [float((slope * direction).double().sum()) / slope.numel() ** 0.5 for direction in directions]
        rows.append([float(slope.abs().max()), *along])
    return torch.tensor(rows)


def _family(case: str) -> str:
    return case.partition("/")[0]
