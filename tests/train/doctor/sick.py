"""A tiny run whose experts can be made ill, and a doctor who looks often."""

import dataclasses
from typing import Any

import torch

from moesaic.config import ModelConfig, MoeConfig, StackConfig
from moesaic.train.doctor import DoctorSettings
from moesaic.train.doctor.surgery import Theatre
from moesaic.train.loop import Trainer
from tests.tiny import tiny_config
from tests.train.tiny_run import changed, trainer


def with_router_bias(config: ModelConfig) -> ModelConfig:
    """A bias can close an expert for every token, whatever the tokens have in common."""
    layer = config.layers[0]
    assert isinstance(layer.feed_forward, MoeConfig)
    moe = dataclasses.replace(layer.feed_forward, router=dataclasses.replace(layer.feed_forward.router, bias=True))
    first = dataclasses.replace(layer, feed_forward=moe)
    return dataclasses.replace(config, decoder=StackConfig(layers=(first, *config.layers[1:])))


CONFIG = with_router_bias(tiny_config(windows=(None, None)))
LOOK = DoctorSettings(every=4, patience=1, course=6, worse=10.0, at_once=10.0)


def doctored(mode: str = "act", look: DoctorSettings = LOOK, config=CONFIG, **fields: Any) -> Trainer:
    """A trainer of 40 steps with 128 tokens each."""
    settings = changed(**{"steps": 40, "batch_size": 8, "warmup_steps": 0, "doctor": mode, **fields})
    run = trainer(settings, config)
    if run.doctor is not None:
        run.doctor.settings = look
        run.doctor.__post_init__()
    return run


def theatre(run: Trainer, layer: int = 0) -> Theatre:
    return Theatre(run.model, run.optimizer, layer)


def kill(run: Trainer, expert: int) -> None:
    """Weights of 0, and a router bias that closes it."""
    cut = theatre(run)
    bias = cut.router_weight("bias")
    assert bias is not None
    cut.write(bias, expert, torch.tensor(-30.0))
    for part in cut.expert_weights:
        cut.write(part, expert, torch.zeros_like(part.master[expert]))


def copy_expert(run: Trainer, source: int, target: int) -> None:
    cut = theatre(run)
    weight, bias = cut.router_weight("weight"), cut.router_weight("bias")
    assert weight is not None and bias is not None
    for part in (*cut.expert_weights, weight, bias):
        cut.write(part, target, part.master[source], state_of=source)


def train(run: Trainer, steps: int) -> list[dict[str, Any]]:
    """Steps with the doctor's visits, as the loop does them; what it logged."""
    lines: list[dict[str, Any]] = []
    for _ in range(steps):
        report = run.train_step()
        if run.doctor is not None:
            lines += run.doctor.after_step(run.step, report.load)
    return lines


def looks(**fields: Any) -> DoctorSettings:
    return dataclasses.replace(LOOK, **fields)
