"""A small made-up corpus and a trainer on it, for tests of the loop and its checkpoints."""

import dataclasses
import json
import random
from typing import Any

import numpy as np
import torch

from moesaic.data.loader import Packed, PackedDomain
from moesaic.models.decoder import Decoder
from moesaic.train.loop import Trainer
from moesaic.train.optimizer import named_state
from moesaic.train.random_state import random_state
from moesaic.train.recipe import TrainSettings
from tests.tiny import tiny_config

SETTINGS = TrainSettings(
    steps=6,
    batch_size=4,
    sequence_length=16,
    warmup_steps=2,
    learning_rate=1e-2,
    evaluate_every=3,
    checkpoint_every=2,
    evaluate_tokens=64,
)
CONFIG = tiny_config(windows=(None, None))
BIASED = tiny_config(windows=(None, None), router="sigmoid_topk", selection_bias=True)


def packed_text(num_tokens: int = 2000, digest: str = "a") -> Packed:
    """Two domains with different habits: counting up by one, and by three."""

    def domain(name: str, stride: int) -> PackedDomain:
        ids = (np.arange(num_tokens) * stride % 60 + 1).astype(np.uint16)
        return PackedDomain(name=name, train=ids, held_out=ids[:200])

    domains = (domain("ones", 1), domain("threes", 3))
    return Packed(domains=domains, byte_lengths=np.ones(61, dtype=np.int64), eos_id=0, digest=digest)


PACKED = packed_text()


def changed(**fields: Any) -> TrainSettings:
    return dataclasses.replace(SETTINGS, **fields)


def trainer(settings: TrainSettings = SETTINGS, config=CONFIG, packed: Packed = PACKED, **more: Any) -> Trainer:
    return Trainer(Decoder(config).initialize(settings.seed), settings, packed, **more)


class DrawingTrainer(Trainer):
    """Draws from every generator of the process in each step, as a router with noise or dropout would."""

    def train_step(self):
        random.random()
        np.random.random()
        torch.rand(3)
        return super().train_step()


def state_of(run: Trainer) -> dict[str, Any]:
    """Everything that must be bit-equal, as bytes and JSON: weights, biases, optimizer, step, random numbers."""
    tensors = {**run.model.state_dict(), **dict(named_state(run.model, run.optimizer))}
    raw = {name: (str(tensor.dtype), raw_bytes(tensor)) for name, tensor in tensors.items()}
    return raw | {"step": run.step, "random": json.dumps(random_state())}


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def seed_everything(seed: int = 5) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
