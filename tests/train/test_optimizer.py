"""What moves the weights: against torch's own optimizer, and bit-equal continuation of everything it keeps."""

import itertools

import pytest
import torch

from moesaic.errors import CheckpointError, ConfigError
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingTape
from moesaic.train.ema import WeightAverage
from moesaic.train.loss import losses
from moesaic.train.optimizer import AdamW, named_state, restore_state
from moesaic.train.precision import Copies, trained_weights
from moesaic.train.step import Stepper
from tests.tiny import lively, tiny_config
from tests.train.step_helpers import (
    BIASED,
    MOE,
    SETTINGS,
    batch,
    changed,
    cut,
    differences,
    lively_stepper,
    state_of,
    stepper,
)

TIED = tiny_config(windows=(None, None), tied=True)


class PlainTraining:
    """The same steps by torch.optim.AdamW and torch.nn.utils.clip_grad_norm_."""

    def __init__(self, model, settings):
        self.model, self.settings = model, settings
        named = list(model.named_parameters())
        decayed = [p for name, p in named if p.dim() >= 2 and not name.startswith("embedding")]
        free = [p for name, p in named if p.dim() < 2 or name.startswith("embedding")]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=1e-8, fused=True)

    def run(self, rate, micro_batches):
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for part in micro_batches:
            inputs, targets = torch.from_numpy(part.inputs_BS), torch.from_numpy(part.targets_BS)
            parts = losses(self.model, inputs, targets, self.settings.balance_losses, RoutingTape())
            (parts.total * (1 / len(micro_batches))).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)


@pytest.mark.parametrize("config", [MOE, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("clip_norm", [0.05, 1e9])
def test_fp32_is_what_torch_does(config, clip_norm):
    """Clipped and not. Torch rounds other operations together than we do (tests/kernels/test_adamw.py bounds that).

    From the second step on the gradients differ by as much, more where they cancel: 1e-4 of an update, which is about
    the learning rate.
    """
    settings = changed(clip_norm=clip_norm)
    ours, plain = stepper(settings, config), PlainTraining(Decoder(config).initialize(3), settings)
    for step in range(4):
        norm = plain.run(ours.learning_rate(step), [batch(step)])
        assert ours.run(step, [batch(step)]).gradient_norm == pytest.approx(norm, rel=2e-6)
    expected = dict(plain.model.state_dict())
    torch.testing.assert_close(dict(ours.model.state_dict()), expected, rtol=1e-6, atol=1e-4 * settings.learning_rate)
    kept = dict(named_state(ours.model, ours.optimizer))
    for name, parameter in plain.model.named_parameters():
        for key, tensor in plain.optimizer.state[parameter].items():
            torch.testing.assert_close(kept[f"{name}|{key}"], tensor, rtol=1e-4, atol=1e-7)


def test_fp32_over_micro_batches_is_what_torch_does():
    """Up to rounding: sums over micro-batches may be taken inside of the multiplications."""
    settings = changed(clip_norm=1e9)
    ours, plain = lively_stepper(settings), PlainTraining(lively(MOE), settings)
    for step in range(3):
        parts = cut(batch(step, num_rows=8), 4)
        norm = plain.run(ours.learning_rate(step), parts)
        assert ours.run(step, parts).gradient_norm == pytest.approx(norm, rel=1e-5)


def test_small_updates_reach_bf16_weights_through_their_masters():
    """Steps of 1e-4 on weights near 1 are below half of bf16's spacing: a bf16 weight alone would never move."""
    model = lively(MOE)
    name = "layers.0.attention_norm.weight"
    weights = {weight.name: weight for weight in trained_weights(model, "bf16")}
    weight = weights[name]
    rule = AdamW(weight.master, betas=(0.9, 0.95), weight_decay=0.0)
    before = weight.parameter.detach().clone()
    for _ in range(100):
        rule.update(torch.ones_like(weight.master), 1e-4, 1.0, Copies(weight.parameter.detach()))
    moved = before.float() - weight.parameter.float()
    assert moved.mean().item() == pytest.approx(0.01, rel=0.3)
    assert torch.equal(weight.parameter, weight.master.bfloat16())


def test_bf16_masters_begin_unrounded_and_the_router_stays_fp32():
    model = lively(BIASED)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {weight.name: weight for weight in trained_weights(model, "bf16")}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if ".router." in name else torch.bfloat16), name
        assert torch.equal(weights[name].master, before[name])
    (bias,) = [tensor for name, tensor in model.named_buffers() if name.endswith("selection_bias")][:1]
    assert bias.dtype == torch.float32


def test_fp32_settings_bring_a_bf16_model_back():
    model = lively(MOE).bfloat16()
    trained_weights(model, "fp32")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("optimizer", "precision", "ema_decay"), list(itertools.product(("adamw", "muon"), ("fp32", "bf16"), (0.0, 0.9)))
)
def test_named_state_brings_back_every_bit(optimizer, precision, ema_decay):
    """Through {name: tensor} and the model's own weights, into a model that began elsewhere."""
    settings = changed(optimizer=optimizer, precision=precision, ema_decay=ema_decay, micro_batches=2)
    whole = stepper(settings, BIASED)
    for step in range(6):
        whole.run(step, cut(batch(step), 2))
    stopped = stepper(settings, BIASED)
    for step in range(3):
        stopped.run(step, cut(batch(step), 2))
    state = {name: tensor.clone() for name, tensor in named_state(stopped.model, stopped.optimizer)}
    model = lively(BIASED, seed=9)
    model.load_state_dict({name: tensor.clone() for name, tensor in stopped.model.state_dict().items()}, assign=True)
    again = Stepper(model, settings)
    restore_state(again.model, again.optimizer, state)
    assert differences(state_of(stopped), state_of(again)) == []
    for step in range(3, 6):
        again.run(step, cut(batch(step), 2))
    assert differences(state_of(whole), state_of(again)) == []


def test_what_is_kept_has_plain_names():
    keys = {name.rsplit("|", 1)[1] for name in dict(_state(optimizer="muon", precision="bf16", ema_decay=0.5))}
    assert keys == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer", "master", "ema"}
    names = set(dict(_state()))
    assert names == {
        f"{name}|{key}" for name, _ in lively(MOE).named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert "layers.0.feed_forward.router.weight|master" not in dict(_state(precision="bf16"))


def _state(**fields):
    trained = lively_stepper(changed(**fields))
    return named_state(trained.model, trained.optimizer)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"precision": "bf16"}, r"\|master is missing"),
        ({"ema_decay": 0.9}, r"\|ema is missing"),
        ({"optimizer": "muon"}, "is not kept by this recipe|is missing"),
    ],
)
def test_state_of_another_recipe_is_refused(fields, words):
    trained = lively_stepper(changed(**fields))
    before = state_of(trained)
    with pytest.raises(CheckpointError, match=words):
        restore_state(trained.model, trained.optimizer, dict(_state()))
    assert differences(before, state_of(trained)) == []


def test_state_of_another_size_is_refused():
    trained = lively_stepper()
    state = dict(_state())
    state["final_norm.weight|exp_avg"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"final_norm.weight\|exp_avg has shape \(3,\) .* and \(20,\)"):
        restore_state(trained.model, trained.optimizer, state)


def test_the_average_is_the_weighted_mean_of_the_weights_so_far():
    (weight, *_) = trained_weights(lively(MOE), "fp32")
    average, decay, seen = WeightAverage([weight], 0.8), 0.8, []
    for step in range(7):
        weight.master.normal_()
        seen.append(weight.master.clone())
        Copies(average=average.of(weight), newest=average.newest(step)).follow(weight.master)
    shares = torch.tensor([decay ** (6 - i) for i in range(7)])
    wanted = torch.einsum("s,s...->...", shares / shares.sum(), torch.stack(seen))
    assert torch.allclose(average.of(weight), wanted, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_average_takes_the_model_s_place_and_leaves_no_trace(precision):
    trained = stepper(changed(precision=precision, ema_decay=0.7, optimizer="muon"), BIASED)
    for step in range(4):
        trained.run(step, [batch(step)])
    before = state_of(trained)
    averages = {name.removesuffix("|ema"): tensor for name, tensor in before.items() if name.endswith("|ema")}
    with trained.optimizer.averaged_weights():
        for name, parameter in trained.model.named_parameters():
            assert torch.equal(parameter, averages[name].to(parameter.dtype)), name
    assert differences(before, state_of(trained)) == []
    with pytest.raises(ZeroDivisionError), trained.optimizer.averaged_weights():
        raise ZeroDivisionError
    assert differences(before, state_of(trained)) == []
    with pytest.raises(ConfigError, match="keeps no average"), stepper(SETTINGS).optimizer.averaged_weights():
        pass
