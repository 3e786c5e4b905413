"""Blocks are found by what they are made of: lists and stacks of experts, routers beside or among them, biases."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from moesaic.errors import ConfigError
from moesaic.train.lint.blocks import find_blocks

EXPERTS, WIDTH, INNER = 3, 8, 5


class Stacked(nn.Module):
    """Experts in two tensors, with biases whose shape is that of a router; perhaps with the router among them."""

    def __init__(self, with_router: bool) -> None:
        super().__init__()
        self.a, self.b = (
            nn.Parameter(torch.ones(EXPERTS, WIDTH, INNER)),
            nn.Parameter(torch.ones(EXPERTS, INNER, WIDTH)),
        )
        self.bias = None if with_router else nn.Parameter(torch.ones(EXPERTS, WIDTH))
        self.steer = nn.Parameter(torch.ones(WIDTH, EXPERTS)) if with_router else None


class Layer(nn.Module):
    def __init__(self, inner: nn.Module, with_router: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Module()
        self.feed.inside = inner
        if with_router:
            self.feed.pick = nn.Linear(WIDTH, EXPERTS)


def model_of(inner: Callable[[], nn.Module], with_router: bool) -> nn.Module:
    """As many layers as there are experts, so that a list of layers has the length of one of experts."""
    model = nn.Module()
    model.layers = nn.ModuleList(Layer(inner(), with_router) for _ in range(EXPERTS))
    model.head = nn.Linear(EXPERTS, WIDTH)
    return model


def test_a_list_of_experts_is_found_and_a_list_of_layers_is_none():
    blocks = find_blocks(model_of(lambda: nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS)), True))
    assert [block.name for block in blocks] == [f"layers.{index}.feed" for index in range(EXPERTS)]
    assert blocks[0].router == "layers.0.feed.pick.weight" and not blocks[0].is_transposed
    assert blocks[0].per_expert == ("layers.0.feed.pick.bias",)
    assert blocks[0].expert_of("layers.0.feed.inside.2.weight") == 2


def test_biases_of_stacked_experts_are_no_router():
    model = model_of(lambda: Stacked(False), True)
    block = find_blocks(model)[1]
    assert block.router == "layers.1.feed.pick.weight" and block.is_stacked
    assert {name.rpartition(".")[2] for name in block.expert_weights(model)} == {"a", "b", "bias"}


def test_a_router_among_the_experts_and_turned():
    model = model_of(lambda: Stacked(True), False)
    block = find_blocks(model)[0]
    assert block.name == block.experts == "layers.0.feed.inside"
    assert block.router.endswith(".steer") and block.is_transposed
    assert {name.rpartition(".")[2] for name in block.expert_weights(model)} == {"a", "b"}


def test_a_dense_model_has_none():
    with pytest.raises(ConfigError, match="Sequential has no mixture-of-experts blocks"):
        find_blocks(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Conv1d(4, 4, 3)))
