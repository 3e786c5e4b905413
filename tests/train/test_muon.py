from dataclasses import replace

import pytest
import torch

from moesaic.train.muon import Muon, orthogonalize
from moesaic.train.optimizer import AdamW, Optimizer
from moesaic.train.precision import Copies
from tests.tiny import lively
from tests.train.step_helpers import MOE, changed

SHAPES = [(8, 8), (5, 13), (13, 5), (1, 7), (96, 40)]


def torch_muon(weight, gradients, **settings):
    """What torch.optim.Muon makes of one matrix."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = torch.optim.Muon([parameter], adjust_lr_fn="match_rms_adamw", **settings)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.data


def our_muon(weight, matrix_shape, gradients, *, lr, weight_decay, momentum, clip=1.0):
    weight, average = weight.clone(), torch.zeros_like(weight)
    rule = Muon(weight, matrix_shape=matrix_shape, momentum=momentum, weight_decay=weight_decay)
    for gradient in gradients:
        rule.update(gradient.clone(), lr, clip, Copies(average=average))
        assert torch.equal(average, weight)  # every part of it followed
    return weight


SETTINGS = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_matrix_moves_as_in_torch(shape):
    torch.manual_seed(sum(shape))
    weight, *gradients = torch.randn(5, *shape)
    ours, theirs = our_muon(weight, shape, gradients, **SETTINGS), torch_muon(weight, gradients, **SETTINGS)
    # An update is bf16 and at most about 1.2 before its scale; four of them, each rounded differently at worst.
    assert (ours - theirs).abs().max() < 4 * 2**-8 * 1.2 * SETTINGS["lr"] * 0.2 * max(shape) ** 0.5


@pytest.mark.parametrize("at_once", [1, 3 * 7 * 10, 2**22])
def test_each_expert_s_gate_and_up_move_alone(at_once, monkeypatch):
    """[E, 2F, D] is 2E matrices: the same as moving them one after another."""
    monkeypatch.setattr("moesaic.train.muon.ELEMENTS_AT_ONCE", at_once)
    torch.manual_seed(0)
    weight, *gradients = torch.randn(4, 5, 14, 10)
    ours = our_muon(weight, (7, 10), gradients, **SETTINGS)
    for expert in range(5):
        for half in (slice(0, 7), slice(7, 14)):
            alone = torch_muon(weight[expert, half], [g[expert, half] for g in gradients], **SETTINGS)
            assert (ours[expert, half] - alone).abs().max() < 3 * 2**-8 * 1.2 * 0.05 * 0.2 * 10**0.5
    whole = torch_muon(weight[0], [g[0] for g in gradients], **SETTINGS)
    assert (ours[0] - whole).abs().max() > 0.01


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e4])[:, None, None]
    found = orthogonalize(matrices).float()
    u, s, vt = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ found @ vt.mT  # diagonal where directions are kept
    is_large = s > 0.05 * s[:, :1]  # five steps lift those above a twentieth to near 1
    assert inside.diagonal(dim1=-2, dim2=-1)[is_large].min() > 0.6
    assert inside.diagonal(dim1=-2, dim2=-1).max() < 1.3
    off_diagonal = inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 0.1


def test_an_expert_without_gradient_only_decays():
    torch.manual_seed(0)
    weight, gradient = torch.randn(2, 3, 4, 6)
    gradient[1] = 0
    moved = our_muon(weight, (4, 6), [gradient], **SETTINGS)
    assert torch.equal(moved[1], weight[1] * (1 - 0.05 * 0.1))
    assert not torch.allclose(moved[0], weight[0])


def test_an_update_is_as_large_as_adamw_s():
    """Root mean square of 0.2 (Moonlight), which is what AdamW's usually is."""
    torch.manual_seed(0)
    for shape in ((64, 64), (32, 128), (128, 32)):
        weight = torch.zeros(shape)
        moved = our_muon(weight, shape, [torch.randn(shape)], lr=1.0, weight_decay=0.0, momentum=0.95)
        assert moved.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_who_is_moved_by_muon():
    rules = Optimizer(lively(MOE), changed(optimizer="muon")).rules
    by_muon = {name.removeprefix("layers.0.") for name, rule in rules.items() if isinstance(rule, Muon)}
    assert {name for name in by_muon if not name.startswith("layers.")} == {
        *(f"attention.{name}_proj.weight" for name in "qkvo"),
        *(f"feed_forward.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")),
        "feed_forward.experts.gate_up",
        "feed_forward.experts.down",
    }
    gate_up = rules["layers.0.feed_forward.experts.gate_up"]
    assert isinstance(gate_up, Muon) and gate_up.matrices_EOI.shape == (10, 13, 20)


def test_biases_of_experts_are_vectors_whatever_their_shape():
    layers = tuple(
        replace(layer, feed_forward=replace(layer.feed_forward, bias=True)) if index in MOE.moe_layers else layer
        for index, layer in enumerate(MOE.layers)
    )
    config = replace(MOE, decoder=replace(MOE.decoder, layers=layers))
    rules = Optimizer(lively(config), changed(optimizer="muon", weight_decay=0.1)).rules
    biases = {name: rule for name, rule in rules.items() if name.endswith("_bias")}
    assert biases
    for rule in biases.values():
        assert isinstance(rule, AdamW) and rule.weight_decay == 0.0
