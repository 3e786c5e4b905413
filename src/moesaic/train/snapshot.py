"""One moment of a run: everything that the next step needs, in memory and as a folder.

STEP/config.json, model.safetensors, ...   the model, as any Hugging Face tool loads it; where its family has no such
                                           model, weights.safetensors with our own names
STEP/trainer.safetensors                   what the optimizer keeps
STEP/trainer.json                          counters, scores, and what the run is
STEP/doctor.safetensors                    where a treatment is on trial: the rows that would undo it
STEP/random.json                           where the random number generators stand
STEP/SHA256SUMS                            the checksums of all of these, written last
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from moesaic.errors import CheckpointError, ConfigError
from moesaic.hub.loading import load
from moesaic.hub.saving import SavesItself, write_checkpoint, write_json, write_tensors
from moesaic.models.build import Model, build
from moesaic.train.manifest import damage, write_manifest
from moesaic.train.optimizer import Optimizer, named_state
from moesaic.train.random_state import random_state, restore_random_state

OWN_WEIGHTS = "weights.safetensors"
TRAINER_TENSORS = "trainer.safetensors"
TRAINER_FACTS = "trainer.json"
DOCTOR_TENSORS = "doctor.safetensors"
RANDOM = "random.json"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A moment of a run in memory. `facts` are JSON and hold at least the step."""

    model: Model
    optimizer_tensors: dict[str, Tensor]
    facts: dict[str, Any]
    random: dict[str, Any]
    doctor_tensors: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def take(
        cls,
        model: Model,
        optimizer: Optimizer,
        facts: dict[str, Any],
        *,
        copy: bool,
        doctor_tensors: dict[str, Tensor] | None = None,
    ) -> "Snapshot":
        """The moment as it is now. With `copy` training may go on while the snapshot is kept; else it must wait.
        doctor_tensors: never change."""
        tensors = dict(named_state(model, optimizer))
        if copy:
            model = copied(model, "cpu")
            tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        return cls(
            model=model,
            optimizer_tensors=tensors,
            facts=facts,
            random=random_state(),
            doctor_tensors=doctor_tensors or {},
        )

    def write(self, folder: Path, tokenizer: SavesItself | None) -> None:
        """Write it into an empty folder. Raises OSError when the disk says no."""
        try:
            write_checkpoint(self.model, folder)
        except ConfigError:  # its family has no such model (a new router, say), so no other tool could load it either
            write_tensors(folder / OWN_WEIGHTS, self.model.state_dict())
        if tokenizer is not None:
            tokenizer.save(folder)
        write_tensors(folder / TRAINER_TENSORS, self.optimizer_tensors)
        if self.doctor_tensors:
            write_tensors(folder / DOCTOR_TENSORS, self.doctor_tensors)
        write_json(folder / TRAINER_FACTS, self.facts)
        (folder / RANDOM).write_text(json.dumps(self.random) + "\n", encoding="utf-8")
        write_manifest(folder)


def copied(model: Model, device: torch.device | str) -> Model:
    """The same weights in memory of their own; nothing else of the model, whatever training has hung on it."""
    copy = build(model.config, device="meta")
    copy.load_state_dict(
        {name: tensor.to(device, copy=True) for name, tensor in model.state_dict().items()}, assign=True
    )
    return copy


class SavedStep:
    """A snapshot's folder. Its name says the step; what it holds is believed only after `damage` found nothing."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step, self.folder = step, folder

    @property
    def damage(self) -> str | None:
        """What is wrong with the first damaged file, or None. Reads every byte."""
        return damage(self.folder)

    @property
    def facts(self) -> dict[str, Any]:
        """What trainer.json says. Raises CheckpointError when it cannot be read."""
        return self._json(TRAINER_FACTS)

    @property
    def score(self) -> float | None:
        """The held-out bits per byte of this very step; None where none was measured, or where it cannot be read."""
        try:
            return self.facts.get("held_out_bits_per_byte")
        except CheckpointError:
            return None

    def load_weights(self) -> dict[str, Tensor]:
        """The model's weights and selection biases, by our own names."""
        if not (self.folder / OWN_WEIGHTS).exists():
            return load(self.folder).state_dict()
        return self._tensors(OWN_WEIGHTS)

    def load_optimizer_tensors(self) -> dict[str, Tensor]:
        """What `named_state` gave. To be copied: it is mapped, and the file goes when newer checkpoints are there."""
        return self._tensors(TRAINER_TENSORS)

    def load_doctor_tensors(self) -> dict[str, Tensor]:
        """What would undo the treatments on trial; empty without any."""
        return self._tensors(DOCTOR_TENSORS) if (self.folder / DOCTOR_TENSORS).exists() else {}

    def restore_random_state(self) -> None:
        """Put the process's random numbers where they stood."""
        restore_random_state(self._json(RANDOM))

    def _tensors(self, name: str) -> dict[str, Tensor]:
        try:
            return load_file(self.folder / name)
        except (OSError, SafetensorError) as error:
            raise self._unreadable(name, error) from error

    def _json(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: Exception) -> CheckpointError:
        return CheckpointError(f"cannot read {self.folder / name} ({error}); delete {self.folder}, then use --resume")
