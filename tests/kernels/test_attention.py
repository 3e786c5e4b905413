"""Attention against torch's own in fp64, and the gradients of bf16 against those of fp32."""

import pytest
import torch

from moesaic.kernels.attention import attention


def _inputs(dtype, *, batch=2, heads=4, key_value_heads=2, queries=7, keys=7, head_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, heads, queries, head_dim), *[(batch, key_value_heads, keys, head_dim)] * 2]
    return [torch.randn(shape, generator=generator).to(torch.bfloat16).to(dtype).requires_grad_() for shape in shapes]


def _visible(kind, queries, keys):
    if kind == "window":
        distance = torch.arange(queries)[:, None] - torch.arange(keys)
        return ((distance >= 0) & (distance < 3))[None, None]
    if kind == "documents":
        documents_BS = torch.tensor([[0] * 3 + [1] * (keys - 3), [0] * keys])
        same = documents_BS[:, None, :, None] == documents_BS[:, None, None, :]
        return same & torch.ones(queries, keys, dtype=torch.bool).tril()
    return None


@pytest.mark.parametrize("kind", ["causal", "all", "window", "documents"])
@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_fp64(kind, key_value_heads, dtype):
    results = []
    for wanted in (torch.float64, dtype):
        inputs = _inputs(wanted, key_value_heads=key_value_heads)
        out = attention(*inputs, visible=_visible(kind, 7, 7), causal=kind == "causal")
        slope = torch.linspace(-1, 1, out.numel(), dtype=wanted).view(out.shape)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, slope)])
    # bf16 keeps 8 bits of inputs, probabilities and outputs; a sum of a few such terms loses a few of them.
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for exact, computed in zip(*results, strict=True):
        assert computed.dtype == dtype
        assert (computed.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_bf16_values_with_a_gradient_are_those_without():
    inputs = _inputs(torch.bfloat16)
    with torch.no_grad():
        plain = attention(*inputs, causal=True)
    assert torch.equal(attention(*inputs, causal=True).detach(), plain)
