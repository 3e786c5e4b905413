"""Gradients of expert weights that are summed in the parameter's own buffer.

R rows sorted by expert, E experts, I inputs, O outputs, F expert inner.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.kernels import ops

OFFSETS = torch.tensor([0, 5, 5, 12])
EXPERTS, INPUTS, INNER, OUTPUTS = 3, 33, 20, 17


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(EXPERTS, 2 * INNER, INPUTS), (EXPERTS, OUTPUTS, INNER)]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def with_buffers(weights: list[nn.Parameter]) -> list[Any]:
    for weight in weights:
        held: Any = weight
        held.grad_buffer, held.grad_buffer_fresh = torch.full(weight.shape, torch.nan), True
    return weights


def rows(seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(12, INPUTS, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def feed_forward(x_RI: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    return ops.grouped_linear(ops.grouped_gated(x_RI, gate_up, OFFSETS), down, OFFSETS)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_two_backwards_sum_as_autograd_does(recompute: bool) -> None:
    plain, held = parameters(torch.float32), with_buffers(parameters(torch.float32))
    for seed in (1, 2):
        feed_forward(rows(seed, torch.float32), *plain).square().sum().backward()
        x_RI = rows(seed, torch.float32)
        y_RO = checkpoint(feed_forward, x_RI, *held, use_reentrant=False) if recompute else feed_forward(x_RI, *held)
        y_RO.square().sum().backward()
        assert x_RI.grad is not None
    for weight, other in zip(held, plain, strict=True):
        assert weight.grad is None and not weight.grad_buffer_fresh
        assert other.grad is not None and torch.equal(weight.grad_buffer, other.grad)
        assert weight.grad_buffer[1].eq(0).all()  # the expert without rows


def test_a_fresh_buffer_is_written_over() -> None:
    held = with_buffers(parameters(torch.float32))
    for _ in range(2):
        for weight in held:
            weight.grad_buffer_fresh = True
        feed_forward(rows(1, torch.float32), *held).sum().backward()
    plain = parameters(torch.float32)
    feed_forward(rows(1, torch.float32), *plain).sum().backward()
    for weight, other in zip(held, plain, strict=True):
        assert other.grad is not None and torch.equal(weight.grad_buffer, other.grad)


def test_narrow_weights_have_wide_gradients() -> None:
    held = with_buffers(parameters(torch.bfloat16))
    x_RI = rows(1, torch.bfloat16)
    feed_forward(x_RI, *held).sum().backward()
    wide = [nn.Parameter(weight.detach().double()) for weight in held]
    feed_forward(x_RI.detach().double(), *wide).sum().backward()
    for weight, other in zip(held, wide, strict=True):
        assert weight.grad_buffer.dtype == torch.float32 and other.grad is not None
        error = (weight.grad_buffer.double() - other.grad).abs().max() / other.grad.abs().max()
        assert error < 2e-2
        assert not torch.equal(weight.grad_buffer, weight.grad_buffer.bfloat16().float())


def test_frozen_weights_leave_their_buffer_alone() -> None:
    held = with_buffers(parameters(torch.float32))
    held[0].requires_grad_(False)
    feed_forward(rows(1, torch.float32), *held).sum().backward()
    assert held[0].grad_buffer_fresh and held[0].grad_buffer.isnan().all()
    assert held[1].grad_buffer.isfinite().all()
