"""A run's folder: who is using it, what it has written, and the way back after a stop.

RUN/recipe.json          the recipe and the corpus it was started with
RUN/metrics.jsonl        one JSON object a line: steps, evaluations
RUN/checkpoints/step-N/  a model that any Hugging Face tool loads, plus trainer.safetensors and trainer.json
RUN/model/               the finished model
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.errors import CheckpointError, RunFolderError
from moesaic.hub.loading import load
from moesaic.hub.saving import SavesItself, write_checkpoint, write_json
from moesaic.hub.staging import replaced_folder
from moesaic.models.decoder import Decoder
from moesaic.train.optimizer import named_state, restore_state

TRAINER_TENSORS = "trainer.safetensors"
TRAINER_FACTS = "trainer.json"
KEPT_CHECKPOINTS = 2


class Restored(NamedTuple):
    """What a checkpoint brings back; `facts` are those given to `save_checkpoint`, and the step."""

    model: Decoder
    optimizer: torch.optim.Optimizer
    facts: dict[str, Any]


class RunFolder:
    """The files of one run. Take it with `RunFolder.claim`, which keeps others out."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    @contextmanager
    def claim(cls, path: Path) -> Iterator["RunFolder"]:
        """Use a folder alone. Raises RunFolderError when another process does, or when it cannot be written."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("w")
        except OSError as error:
            raise RunFolderError(f"cannot write to {path}: {error.strerror}; choose another folder") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunFolderError(
                    f"{path} is in use by another run; wait for it, or choose another folder with --out"
                ) from None
            yield cls(path)

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every complete checkpoint, oldest first."""
        found = self.path.glob("checkpoints/step-*")
        return sorted((int(folder.name.removeprefix("step-")), folder) for folder in found)

    def write_recipe(self, facts: dict[str, Any]) -> None:
        """Remember what the run is. Raises RunFolderError when the folder holds a run of another recipe."""
        place = self.path / "recipe.json"
        text = json.dumps(facts, indent=2)
        if not place.exists():
            write_beside(place, text)
        elif json.loads(place.read_text()) != json.loads(text):
            difference = _difference(json.loads(place.read_text()), json.loads(text))
            raise RunFolderError(
                f"{self.path} holds a run of another recipe: {difference}; "
                "choose another folder with --out, or delete this one"
            )

    def open_metrics(self, up_to_step: int) -> TextIO:
        """metrics.jsonl for appending, without the lines of steps that will be done again."""
        place = self.path / "metrics.jsonl"
        lines = place.read_text().splitlines() if place.exists() else []
        kept = [line for line in lines if _step_of(line) <= up_to_step]
        write_beside(place, "".join(line + "\n" for line in kept))
        return place.open("a", buffering=1)

    def save_checkpoint(
        self,
        step: int,
        model: Decoder,
        optimizer: torch.optim.Optimizer,
        facts: dict[str, Any],
        tokenizer: SavesItself | None,
    ) -> None:
        """Write everything that step `step` + 1 needs; complete or not there at all. Older checkpoints are dropped.

        Raises CheckpointError when the disk says no; earlier checkpoints are untouched.
        """
        folder = self.path / "checkpoints" / f"step-{step:06d}"
        with replaced_folder(folder, is_stale=lambda name: True) as new:
            write_checkpoint(model, new)
            if tokenizer is not None:
                tokenizer.save(new)
            _write_tensors(new / TRAINER_TENSORS, dict(named_state(model, optimizer)))
            write_json(new / TRAINER_FACTS, {"step": step, **facts})
        for _, old in self.checkpoints[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def restore(self, optimizer_of: Callable[[Decoder], torch.optim.Optimizer]) -> Restored | None:
        """The newest checkpoint, or None in a new run.

        `optimizer_of(model)` makes the optimizer whose state is filled.
        """
        if not self.checkpoints:
            return None
        _, folder = self.checkpoints[-1]
        try:
            facts = json.loads((folder / TRAINER_FACTS).read_text())
            tensors = load_file(folder / TRAINER_TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"the checkpoint {folder} cannot be read ({error}); delete it to go on from the one before"
            ) from error
        model = load(folder)
        optimizer = optimizer_of(model)
        restore_state(model, optimizer, tensors)
        return Restored(model, optimizer, facts)


def write_beside(place: Path, text: str) -> None:
    """Write a small file so that it is either the old one or the new one. Raises RunFolderError when it cannot be."""
    beside = place.with_name(f".{place.name}.partial")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, place)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunFolderError(
            f"cannot write {place}: {error.strerror}; free space or choose another folder with --out"
        ) from error


def _write_tensors(place: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place)
    except SafetensorError as error:  # which is what a full disk is to that package
        raise OSError(str(error)) from error


def _step_of(line: str) -> int:
    try:
        return json.loads(line).get("step", 0)
    except ValueError:  # the last line of a run that was killed while writing it
        return 2**62


def _difference(old: Any, new: Any, path: str = "") -> str:
    """The first place where two JSON trees differ, in words."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                return _difference(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    return f"{path} was {old!r} and is now {new!r}"
