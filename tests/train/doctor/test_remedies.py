"""Remedies one by one, and with optimizers and routers of every kind."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.config import CapacityConfig, ModelConfig, MoeConfig, StackConfig
from moesaic.train.doctor import DoctorSettings
from moesaic.train.loop import Trainer
from tests.tiny import tiny_config
from tests.train.doctor.sick import CONFIG, LOOK, copy_expert, doctored, kill, looks, theatre, train
from tests.train.tiny_run import state_of

PLAIN = tiny_config(windows=(None, None))


def with_moe(config: ModelConfig = PLAIN, *, router: dict[str, Any] | None = None, **fields: Any) -> ModelConfig:
    """The first layer's block, changed."""
    layer = config.layers[0]
    assert isinstance(layer.feed_forward, MoeConfig)
    routing = dataclasses.replace(layer.feed_forward.router, **(router or {}))
    moe = dataclasses.replace(layer.feed_forward, router=routing, **fields)
    first = dataclasses.replace(layer, feed_forward=moe)
    return dataclasses.replace(config, decoder=StackConfig(layers=(first, *config.layers[1:])))


TIGHT = with_moe(capacity=CapacityConfig(factor=0.5))


def shout(run: Trainer) -> None:
    """Logits so large that the softmax is a step function; who is chosen stays as it was."""
    weight = theatre(run).router_weight("weight")
    assert weight is not None
    weight.master.mul_(2000)
    weight.publish()


def test_logits_that_leave_no_gradient_are_penalised_for_a_course():
    run = doctored(config=PLAIN, learning_rate=1e-5)
    shout(run)
    lines = train(run, 4)
    assert [(line["finding"], line["remedy"]) for line in lines] == [("unstable", "z_loss")]
    assert lines[0]["coefficients"] == {"router_z": [0.0, pytest.approx(0.001)]}
    assert run.stepper.coefficients(run.step)["router_z"] == pytest.approx(0.001)
    assert [line["doctor"] for line in train(run, 6)] == ["kept"]
    assert "router_z" not in run.stepper.coefficients(run.step)


def test_the_penalty_makes_logits_smaller():
    lengths = []
    for mode in ("act", "off"):
        run = doctored(mode, looks(course=30, every=2), config=PLAIN, learning_rate=3e-2)
        shout(run)
        train(run, 24)
        weight = theatre(run).router_weight("weight")
        assert weight is not None
        lengths.append(float(weight.master.norm()))
    assert lengths[0] < lengths[1]


def test_a_capacity_that_drops_rows_is_widened():
    run = doctored(config=TIGHT)
    (line,) = [line for line in train(run, 4) if line["finding"] == "dropping"]
    assert line["remedy"] == "capacity" and line["capacity_factor"] == [0.5, 0.625]
    assert factor(run) == 0.625


def test_a_capacity_is_put_back_where_it_made_the_loss_worse():
    run = doctored(config=TIGHT, look=looks(worse=-1.0))
    lines = [line for line in train(run, 12) if line["finding"] == "dropping"]
    assert [line["doctor"] for line in lines][:2] == ["treated", "undone"]
    assert factor(run) == 0.5


def factor(run: Trainer) -> float:
    limits = theatre(run).module.capacity
    assert limits is not None and limits.factor is not None
    return limits.factor


ROUTERS = {
    "noisy": with_moe(router={"name": "noisy_topk"}),
    "batch norm": with_moe(router={"batch_norm": True}),
    "jitter": with_moe(router={"jitter": 0.1}),
    "gating dropout": with_moe(router={"gating_dropout": 0.2}),
}


def silence(run: Trainer, expert: int) -> None:
    """Weights of 0; routers without a bias go on sending it tokens."""
    cut = theatre(run)
    for part in cut.expert_weights:
        cut.write(part, expert, torch.zeros_like(part.master[expert]))


@pytest.mark.parametrize("kind", ROUTERS)
def test_routers_of_every_kind_are_healed(kind: str):
    run = doctored(config=ROUTERS[kind], learning_rate=1e-4)
    silence(run, 3)
    lines = [line for line in train(run, 4) if line.get("expert") == 3]
    assert [(line["doctor"], line["finding"], line["remedy"]) for line in lines] == [("treated", "dead", "reseed")]
    cut, busy = theatre(run), lines[0]["from"]
    assert all(torch.equal(part.master[3], part.master[busy]) for part in cut.expert_weights)
    assert all(line["held_out"][1] < 1.05 * line["held_out"][0] for line in lines)
    shares = np.sum([run.train_step().load.layers[0].counts_E for _ in range(4)], axis=0)
    pair = int(shares[3] + shares[busy])
    assert min(int(shares[3]), int(shares[busy])) > 0.2 * pair


def test_running_means_are_those_of_the_new_rows():
    run = doctored(config=ROUTERS["batch norm"], learning_rate=1e-4)
    train(run, 3)
    silence(run, 3)
    (line,) = [line for line in train(run, 1) if line.get("expert") == 3]
    assert run.doctor is not None
    probed = run.doctor._patient(run.step).probes[0]
    router = theatre(run).module.router
    assert router.running_mean is not None and router.running_var is not None and router.weight is not None
    for expert in (3, line["from"]):
        logits_T = probed.x_TD @ router.weight[expert].detach()
        assert float(router.running_mean[expert]) == pytest.approx(float(logits_T.mean()), rel=1e-3, abs=1e-4)
        assert float(router.running_var[expert]) == pytest.approx(float(logits_T.var(correction=0)), rel=1e-3)


@pytest.mark.parametrize("kind", ["noisy", "batch norm"])
def test_what_is_undone_is_undone_to_the_bit(kind: str):
    ill, left = (doctored(mode, looks(at_once=-1.0), config=ROUTERS[kind]) for mode in ("act", "off"))
    for run in (ill, left):
        silence(run, 3)
    assert {line["doctor"] for line in train(ill, 4)} == {"treated", "undone"}
    train(left, 4)
    assert state_of(ill) == state_of(left)


def test_muons_momentum_has_no_direction_in_a_new_expert():
    run = doctored(optimizer="muon", learning_rate=1e-4)
    train(run, 3)
    kill(run, 3)
    run.train_step()
    assert run.doctor is not None
    lines = run.doctor._look(run.step)
    assert [(line["remedy"], line["expert"]) for line in lines] == [("reseed", 3)]
    states = [run.optimizer.rules[part.name].state for part in theatre(run).expert_weights]
    assert all(not state["momentum_buffer"][3].any() and state["momentum_buffer"][1].any() for state in states)


def test_a_treatment_is_undone_to_the_bit_with_muon():
    ill, left = (doctored(mode, looks(at_once=-1.0), optimizer="muon") for mode in ("act", "off"))
    for run in (ill, left):
        kill(run, 3)
    assert [line["doctor"] for line in train(ill, 4)] == ["treated", "undone"]
    train(left, 4)
    assert state_of(ill) == state_of(left)


CASES: dict[str, tuple[ModelConfig, Any, DoctorSettings]] = {
    "a copy": (CONFIG, lambda run: copy_expert(run, 0, 1), LOOK),
    "large logits": (PLAIN, shout, LOOK),
    "a tight capacity": (TIGHT, lambda run: None, looks(worse=-1.0)),
    "zeros, batch norm": (ROUTERS["batch norm"], lambda run: silence(run, 3), looks(worse=-1.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stop_while_a_remedy_is_on_trial_changes_nothing(case: str):
    config, illness, look = CASES[case]
    whole, first = (doctored(config=config, look=look, learning_rate=1e-4) for _ in range(2))
    for run in (whole, first):
        illness(run)
    expected = train(whole, 14)
    before = train(first, 6)
    assert before and before == expected[: len(before)] and len(expected) > len(before)
    assert first.doctor is not None
    facts, tensors = first.doctor.state()
    second = doctored(config=config, look=look, learning_rate=1e-4)
    second.model.load_state_dict(first.model.state_dict())
    for (_, new), (_, old) in zip(second.optimizer.state(), first.optimizer.state(), strict=True):
        new.copy_(old)
    second.step = first.step
    assert second.doctor is not None
    second.doctor.restore(json.loads(json.dumps(facts)), {name: tensor.clone() for name, tensor in tensors.items()})
    assert train(second, 8) == expected[len(before) :]
    for name, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name
