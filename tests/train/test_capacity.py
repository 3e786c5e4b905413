"""Training with a limit to experts' rows: recomputed alike, balanced by what was chosen, evaluated without it."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from moesaic.config import MoeConfig
from moesaic.config.capacity import CapacityConfig, Overflow
from moesaic.data.loader import Batch
from moesaic.evaluate.perplexity import held_out_loss
from moesaic.layers.moe import capacity_applied
from moesaic.models.build import decoder_only
from moesaic.routing import RoutingTape
from moesaic.telemetry.health import max_violation
from moesaic.telemetry.recorder import LoadRecorder
from moesaic.train.loop import Trainer
from moesaic.train.recompute import recompute_layers
from moesaic.train.reports import metrics_line
from moesaic.train.resume import RunFolder
from moesaic.train.step import Stepper
from tests.tiny import lively, tiny_config
from tests.train import step_helpers, tiny_run

OVERFLOWS = ("residual", "next_best", "shared")


def with_moe(config, **changes):
    """The same model with other settings of its MoE layers."""
    layers = tuple(
        dataclasses.replace(layer, feed_forward=dataclasses.replace(layer.feed_forward, **changes))
        if isinstance(layer.feed_forward, MoeConfig)
        else layer
        for layer in config.layers
    )
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, layers=layers))


def limited(overflow: Overflow = "residual", factor=0.7, **capacity):
    config = tiny_config(windows=(None, 5, None), router="sigmoid_topk", selection_bias=True, shared=True)
    return with_moe(config, capacity=CapacityConfig(factor=factor, overflow=overflow, **capacity))


def tokens(seed=1):
    return torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(seed))


def gradients_of(model, tape=None):
    mask_BS = torch.ones(3, 20, dtype=torch.bool)
    mask_BS[1, 14:] = False
    documents_BS = torch.tensor([[0] * 8 + [1] * 12, [0] * 20, [0] * 3 + [1] * 17])
    torch.manual_seed(0)
    x_BSD = model.hidden(tokens(), mask_BS, tape=tape, document_ids_BS=documents_BS)
    x_BSD[mask_BS].square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("pad", [False, True], ids=["tight", "padded"])
@pytest.mark.parametrize("overflow", OVERFLOWS)
@pytest.mark.parametrize("drop", ["position", "probability", "batch_prioritized"])
def test_recomputation_drops_the_same_rows(drop, overflow, pad):
    model = lively(with_moe(limited(overflow, drop=drop, pad=pad), expert_dropout=0.2)).train()
    plain, recorder = LoadRecorder.for_model(model.config), LoadRecorder.for_model(model.config)
    expected = gradients_of(model, plain)
    with recompute_layers(model):
        found = gradients_of(model, recorder)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    load = plain.finish_step()
    assert load.to_json() == recorder.finish_step().to_json()
    assert load.dropped_share > 0 or overflow == "next_best"


def test_a_run_reports_what_its_capacity_costs_and_evaluates_without_it(tmp_path):
    config = limited(factor=0.4)
    with RunFolder.claim(tmp_path / "run") as run:
        trainer = tiny_run.trainer(config=config, run=run)
        history = trainer.train()
    for evaluation in history.evaluations:
        assert evaluation.capacity_loss is not None
        gap = evaluation.capacity_loss.bits_per_byte - evaluation.loss.bits_per_byte
        assert evaluation.capacity_gap == pytest.approx(gap) and gap != 0
    seen = {"sequence_length": 16, "max_tokens": 64, "document_attention": True}
    model, last = decoder_only(trainer.model, "a test"), history.evaluations[-1]
    assert last.capacity_loss is not None
    assert held_out_loss(model, tiny_run.PACKED, **seen).by_domain == last.loss.by_domain
    with capacity_applied(model):
        assert held_out_loss(model, tiny_run.PACKED, **seen).by_domain == last.capacity_loss.by_domain
    dropless = lively(with_moe(config, capacity=None))
    dropless.load_state_dict(model.state_dict())
    assert held_out_loss(dropless, tiny_run.PACKED, **seen).by_domain == last.loss.by_domain

    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if "capacity_gap" in line]
    assert [line["step"] for line in found] == [e.step for e in history.evaluations if e.step]
    assert found[-1]["capacity_gap"] == last.capacity_gap
    assert found[-1]["capacity_held_out_bits_per_byte"] == last.capacity_loss.bits_per_byte
    assert found[-1]["held_out_bits_per_byte"] == last.loss.bits_per_byte
    assert all(layer["dropped_rows"] > 0 for line in lines for layer in line["load"]["layers"])
    report = history.steps[-1]
    print(f"gap {last.capacity_gap:.4f} bits per byte, {report.load.dropped_share:.1%} of rows dropped")


def test_a_run_without_capacity_knows_of_no_gap():
    trainer = tiny_run.trainer()
    history = trainer.train()
    assert [evaluation.capacity_gap for evaluation in history.evaluations] == [None] * 3
    line = metrics_line(history.steps[-1], history.evaluations[-1])
    assert not [name for name in line if name.startswith("capacity")]
    assert history.steps[-1].load.dropped_share == 0


def test_a_capacity_nobody_reaches_trains_the_same_bits():
    """And a tight one does not: the comparison can fail."""
    config = tiny_config(windows=(None, None), shared=True)
    states = []
    for capacity in (None, CapacityConfig(factor=5.0), CapacityConfig(factor=0.5)):
        stepper = Stepper(lively(with_moe(config, capacity=capacity)), step_helpers.SETTINGS)
        for step in range(3):
            stepper.run(step, [step_helpers.batch(step)])
        states.append(step_helpers.state_of(stepper))
    assert step_helpers.differences(states[0], states[1]) == []
    assert step_helpers.differences(states[0], states[2]) != []


@pytest.mark.parametrize("pad", [False, True], ids=["tight", "padded"])
def test_biases_move_by_what_was_chosen_though_slots_and_padding_make_it_look_even(pad):
    """One expert is wanted by every token and one by none. After dropping all that are wanted have the same rows."""
    config = with_moe(
        tiny_config(windows=(None,), router="sigmoid_topk", selection_bias=True),
        capacity=CapacityConfig(factor=0.5, pad=pad),
    )
    settings = step_helpers.changed(selection_bias_rate=0.05, learning_rate=1e-9, balance_losses=(), warmup_steps=0)
    model = lively(config)
    bias_E = model.get_buffer("layers.0.feed_forward.router.selection_bias")
    bias_E.copy_(torch.tensor([0.0, 0.9, 0.0, -0.9, 0.0]))
    stepper, recorder = Stepper(model, settings), LoadRecorder.for_model(config)
    layers, kept = [], []
    for step in range(20):
        whole = step_helpers.batch(step, num_rows=6, length=40)
        documents_BS = whole.document_ids_BS.copy()
        documents_BS[::2, 25:] = -1
        batch = Batch(whole.inputs_BS, whole.targets_BS, whole.domain_ids_B, documents_BS)
        before = bias_E.clone()
        kept.append(rows_kept(model, batch))
        load = stepper.run(step, [batch], recorder).load
        assert load is not None
        (layer,) = load.layers
        layers.append(layer)
        assert layer.num_tokens == int((documents_BS >= 0).sum())
        mean = layer.counts_E.mean()
        assert torch.equal(torch.sign(bias_E - before), torch.from_numpy(np.sign(mean - layer.counts_E)).float())
    slots = math.ceil(0.5 * 2 * layers[-1].num_tokens / 5)
    assert kept[0].count(slots) == 4 and min(kept[0]) < slots  # what is left tells nothing of who is wanted more
    assert bias_E[1] < 0.3 and bias_E[3] > -0.3
    violations = [max_violation(layer.counts_E) for layer in layers]
    assert violations[-1] < 0.35 * violations[0]
    print(f"MaxVio {violations[0]:.2f} to {violations[-1]:.2f} in 20 steps, pad={pad}")


@torch.no_grad()
def rows_kept(model, batch):
    tape = RoutingTape()
    with capacity_applied(model.eval()):
        model.hidden(
            torch.from_numpy(batch.inputs_BS),
            torch.from_numpy(batch.document_ids_BS) >= 0,
            tape=tape,
            document_ids_BS=torch.from_numpy(batch.document_ids_BS),
        )
    return tape.decisions[0].rows.counts_E.tolist()


def test_trainer_is_left_as_it_was_by_the_second_evaluation():
    trainer = tiny_run.trainer(config=limited())
    assert isinstance(trainer, Trainer)
    trainer.model.train()
    trainer.evaluate()
    assert trainer.model.training
    layers = [layer.feed_forward for layer in trainer.model.layers]
    assert not any(getattr(layer, "is_limited_in_evaluation", False) for layer in layers)
