"""Random batches and a model for tests of one optimizer step."""

import dataclasses
from typing import Any

import numpy as np
import torch

from moesaic.config import ModelConfig
from moesaic.data.loader import Batch
from moesaic.models.decoder import Decoder
from moesaic.train.optimizer import named_state
from moesaic.train.recipe import TrainSettings
from moesaic.train.step import Stepper
from tests.tiny import lively, tiny_config

SETTINGS = TrainSettings(steps=20, batch_size=4, sequence_length=16, warmup_steps=2, learning_rate=1e-2)
MOE = tiny_config(windows=(None, None), shared=True)
BIASED = tiny_config(windows=(None, None), router="sigmoid_topk", selection_bias=True)


def changed(**fields: Any) -> TrainSettings:
    return dataclasses.replace(SETTINGS, **fields)


def stepper(settings: TrainSettings = SETTINGS, config: ModelConfig = MOE) -> Stepper:
    return Stepper(Decoder(config).initialize(3), settings)


def lively_stepper(settings: TrainSettings = SETTINGS, config: ModelConfig = MOE) -> Stepper:
    return Stepper(lively(config), settings)


def batch(seed: int, num_rows: int = 4, length: int = 16) -> Batch:
    windows = np.random.default_rng(seed).integers(0, 61, (num_rows, length + 1))
    return Batch(
        inputs_BS=windows[:, :-1].copy(),
        targets_BS=windows[:, 1:].copy(),
        domain_ids_B=np.arange(num_rows) % 2,
        document_ids_BS=np.zeros((num_rows, length), dtype=np.int64),
    )


def cut(whole: Batch, num_parts: int) -> list[Batch]:
    return [Batch(*parts) for parts in zip(*(np.split(array, num_parts) for array in whole), strict=True)]


def state_of(trained: Stepper) -> dict[str, torch.Tensor]:
    """Copies of everything that must be the same for training to go on the same."""
    tensors = {**trained.model.state_dict(), **dict(named_state(trained.model, trained.optimizer))}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def differences(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> list[str]:
    """The names of tensors that are not bit for bit the same (NaN equals NaN)."""
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(_bits(first[name]), _bits(second[name]))]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
