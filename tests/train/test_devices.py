"""Training on a GPU follows training on the CPU, is resumed there, and goes on where the other left off."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.engine.generate import generate
from moesaic.errors import ConfigError, MissingDependencyError
from moesaic.hub import load, save
from moesaic.models.decoder import Decoder
from moesaic.train.loop import Trainer
from moesaic.train.recipe import TrainSettings
from moesaic.train.resume import RunFolder
from moesaic.train.step import Stepper
from tests.tiny import lively, tiny_config
from tests.train.step_helpers import batch
from tests.train.tiny_run import BIASED, CONFIG, PACKED, changed, trainer

LOSSES = (("switch", 0.01), ("global_exact", 0.01), ("router_z", 1e-3), ("sequence", 1e-3))


def gradients_of(settings: TrainSettings, device: Any) -> dict[str, torch.Tensor]:
    """What one step of two micro-batches would move the weights by."""
    stepper = Stepper(lively(tiny_config(windows=(None, 5), shared=True)).to(device), settings)
    found = {}

    def keep(step: int, learning_rate: float, norm: torch.Tensor) -> None:
        for weight in stepper.optimizer.weights:
            gradient = stepper.optimizer.gradients.of(weight)
            assert gradient is not None, weight.name
            found[weight.name] = gradient.cpu().clone()

    stepper.optimizer.step = keep
    stepper.run(0, [batch(0), batch(1)])
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 3e-2)])
def test_gradients_are_those_of_the_cpu(precision: Any, tolerance: float, gpu: torch.device) -> None:
    settings = changed(precision=precision, micro_batches=2, balance_losses=LOSSES)
    here, there = gradients_of(settings, "cpu"), gradients_of(settings, gpu)
    for name, gradient in here.items():
        assert (there[name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"precision": "bf16"},
        {"optimizer": "muon", "recompute": "layers"},
        {"ema_decay": 0.9, "micro_batches": 2, "balance_losses": LOSSES},
    ],
    ids=str,
)
def test_a_run_follows_that_of_the_cpu(fields: dict[str, Any], gpu: torch.device) -> None:
    """Losses of 12 steps within 1% (bf16) or 0.1%, and so the held-out ones."""
    settings = changed(steps=12, **fields)
    tolerance = 1e-2 if {"precision", "optimizer"} & fields.keys() else 1e-3
    here, there = (trainer(settings=changed(steps=12, device=name, **fields)) for name in ("cpu", str(gpu)))
    curves = [run.train() for run in (here, there)]
    assert there.model.embedding.weight.is_cuda and settings.device == "auto"
    losses = [[step.loss for step in curve.steps] for curve in curves]
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
    assert losses[0][-1] < 0.9 * losses[0][0]
    last = [curve.evaluations[-1] for curve in curves]
    assert last[1].loss.bits_per_byte == pytest.approx(last[0].loss.bits_per_byte, rel=tolerance)
    assert there.final_model().embedding.weight.is_cuda
    counts = [sum(layer.counts_E.sum() for layer in curve.steps[0].load.layers) for curve in curves]
    assert counts[0] == counts[1]


@pytest.mark.parametrize("background", [True, False])
def test_a_run_goes_on_on_another_device(background: bool, tmp_path: Path, gpu: torch.device) -> None:
    """On the CPU, then on a GPU, then on the CPU: near the run that was never moved."""
    plain = trainer(changed(steps=9), BIASED).train()
    where = ["cpu", str(gpu), "cpu"]
    losses = []
    for stop_after, name in zip((3, 6, 9), where, strict=True):
        settings = changed(steps=9, device=name, async_checkpoints=background, checkpoint_every=3)
        with RunFolder.claim(tmp_path) as folder:
            run = trainer(settings, BIASED, run=folder, stop_after=stop_after)
            assert run.resume() == (stop_after > 3)
            losses += [step.loss for step in run.train().steps]
    assert losses == pytest.approx([step.loss for step in plain.steps], rel=1e-3)


def test_a_resumed_run_draws_the_numbers_of_the_uninterrupted_one(tmp_path: Path, gpu: torch.device) -> None:
    """A router that draws: with other numbers its losses would be others."""
    config = tiny_config(windows=(None, None), router="noisy_topk")

    def losses_of(folder: RunFolder | None, stop_after: int) -> list[float]:
        run = trainer(changed(device=str(gpu), checkpoint_every=3), config, run=folder, stop_after=stop_after)
        run.resume()
        return [step.loss for step in run.train().steps]

    whole = losses_of(None, 6)
    with RunFolder.claim(tmp_path) as folder:
        parts = losses_of(folder, 3) + losses_of(folder, 6)
    assert parts == pytest.approx(whole, rel=1e-5)


def test_what_was_trained_there_is_loaded_and_writes_the_same_here(tmp_path: Path, gpu: torch.device) -> None:
    run = trainer(changed(device=str(gpu)))
    run.train()
    save(run.model, tmp_path)
    here, there = load(tmp_path), load(tmp_path, device=gpu)
    assert generate(here, [[5, 6, 7], [9, 12]], 12) == generate(there, [[5, 6, 7], [9, 12]], 12)


def test_a_device_is_named_as_torch_names_it_and_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^train.device='gpu'; use auto, cpu, cuda or cuda:1$"):
        changed(device="gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependencyError, match=r"train.device='cuda' and torch .* finds .*; use cpu, or install"):
        trainer(changed(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(MissingDependencyError, match=r"'cuda:7' and torch finds 2 of them; use cuda:0 to cuda:1"):
        trainer(changed(device="cuda:7"))


def test_it_stays_on_the_cpu_where_that_is_named_or_nothing_else_is_there() -> None:
    for name in ("cpu", "auto"):  # auto: tests/conftest.py says cpu
        run = Trainer(Decoder(CONFIG).initialize(0), changed(device=name), PACKED)
        assert run.device == run.stepper.device == torch.device("cpu")
        assert np.isfinite(run.train_step().loss)
