"""Attention against torch's own in fp64; the causal kernel against the reference over odd sizes."""

import pytest
import torch

from moesaic.kernels import reference
from moesaic.kernels.attention import attention

native = pytest.importorskip("moesaic.kernels.native", reason="the kernels were not built: no C++ compiler")

DTYPES = [torch.float32, torch.bfloat16]


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


@pytest.mark.parametrize("scale", [None, 0.3, 0.25])
@pytest.mark.parametrize("kind", ["causal", "all", "window", "documents"])
@pytest.mark.parametrize("key_value_heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sinks_take_their_share_of_the_softmax(kind, key_value_heads, dtype, scale):
    """Against a softmax with one more column, written out in fp64."""
    results = []
    for wanted, function in ((torch.float64, reference.attention_with_sinks), (dtype, attention)):
        inputs = _inputs(wanted, key_value_heads=key_value_heads)
        sinks_H = torch.tensor([-3.0, 0.0, 1.0, 6.0], dtype=wanted, requires_grad=True)
        causal, visible = kind == "causal", _visible(kind, 7, 7)
        out = function(*inputs, visible=visible, causal=causal, scale=scale, sinks_H=sinks_H)
        slope = torch.linspace(-1, 1, out.numel(), dtype=wanted).view(out.shape)
        results.append([out.detach(), *torch.autograd.grad(out, (*inputs, sinks_H), slope)])
    # A sink's gradient is a sum of outputs that cancel: in bf16 it loses some bits more than they do.
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for exact, computed in zip(*results, strict=True):
        assert computed.dtype == dtype
        assert (computed.double() - exact).abs().max() <= tolerance * exact.abs().max()


def test_a_sink_far_below_all_scores_changes_nothing():
    inputs = _inputs(torch.float32)
    with torch.no_grad():
        without = attention(*inputs, causal=True)
        assert torch.allclose(attention(*inputs, causal=True, sinks_H=torch.full((4,), -100.0)), without)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_may_have_a_scale_of_their_own(dtype, causal):
    inputs = _inputs(dtype)
    query, keys, values = (each.double() for each in inputs)
    exact = torch.nn.functional.scaled_dot_product_attention(
        query, keys, values, is_causal=causal, scale=0.3, enable_gqa=True
    )
    seen = attention(*inputs, causal=causal, scale=0.3).double()
    assert (seen - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * exact.abs().max()


def test_bf16_values_with_a_gradient_are_those_without():
    inputs = _inputs(torch.bfloat16)
    with torch.no_grad():
        plain = attention(*inputs, causal=True)
    assert torch.equal(attention(*inputs, causal=True).detach(), plain)


def _whole_rows(batch, length, heads, groups, head_dim, dtype):
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, length, count, head_dim) for count in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [(0, 5, 2, 1, 8), (2, 0, 2, 1, 8), (1, 1, 1, 1, 8), (2, 7, 2, 1, 6), (1, 65, 4, 2, 16), (2, 131, 3, 3, 20)],
    ids=str,
)
def test_causal_rows_of_odd_sizes_are_those_of_fp64(isa, sizes, dtype):
    """Against torch's attention in fp64: blocks of queries that end early, heads that share keys, widths with tails.

    fp32 loses some units in the last place of sums of S terms. bf16 rounds each probability and each of its slopes
    (2^-9 of each, and slopes are differences of numbers a few times their size), then sums them and rounds once more.
    """
    *inputs, d_out = _whole_rows(*sizes, dtype=dtype)
    exact = [tensor.double().requires_grad_() for tensor in inputs]
    q, k, v = (tensor.transpose(1, 2) for tensor in exact)
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    slopes = torch.autograd.grad(wanted, exact, d_out.double())
    out, log_sum = native.causal_attention(*inputs)
    found = (out, *native.causal_attention_grad(d_out, *inputs, out, log_sum))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(found, (wanted, *slopes), strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        scale = other.abs().max() if other.numel() else 0
        assert ((one.double() - other).abs() <= tolerance * scale + 1e-6).all()


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 8), (2, 9, 4, 2, 6), (1, 70, 3, 1, 16)], ids=str)
def test_the_reference_s_gradient_is_autograd_s(sizes):
    *inputs, d_out = (tensor.double() for tensor in _whole_rows(*sizes, dtype=torch.float32))
    for tensor in inputs:
        tensor.requires_grad_()
    out, log_sum = reference.causal_attention(*inputs)
    wanted = torch.autograd.grad(out, inputs, d_out)
    found = reference.causal_attention_grad(
        d_out, *(t.detach() for t in inputs), out_BSHA=out.detach(), log_sum_BHS=log_sum.detach()
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_causal_rows_are_bit_equal_for_any_number_of_threads_and_rows_beside_them(isa, dtype):
    *inputs, d_out = _whole_rows(3, 97, 4, 2, 24, dtype)

    def run(threads, inputs, d_out):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        out, log_sum = native.causal_attention(*inputs)
        slopes = native.causal_attention_grad(d_out, *inputs, out, log_sum)
        torch.set_num_threads(before)
        return out, log_sum, *slopes

    alone = run(1, inputs, d_out)
    for one, other in zip(alone, run(3, inputs, d_out), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(alone, run(1, [tensor[1:2] for tensor in inputs], d_out[1:2]), strict=True):
        assert torch.equal(one[1:2], other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_sees_nothing_of_later_ones(isa, dtype):
    inputs = _whole_rows(1, 80, 2, 2, 16, dtype)[:3]
    before = native.causal_attention(*inputs)[0]
    for tensor in inputs:
        tensor[:, 50:] = 300.0
    assert torch.equal(native.causal_attention(*inputs)[0][:, :50], before[:, :50])


def test_scores_that_are_not_finite_show():
    q, k, v = _whole_rows(1, 40, 1, 1, 8, torch.float32)[:3]
    k[0, 20, 0, 0] = float("nan")
    out = native.causal_attention(q, k, v)[0]
    assert out[0, :20].isfinite().all() and out[0, 20:].isnan().all()
