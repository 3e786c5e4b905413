"""A GPU's kernels against the reference in fp64, and a bound on their rounding; also on the CPU, where torch's grouped
product is a loop.

R rows sorted by expert, E experts, K choices, I inputs, O outputs.
"""

import pytest
import torch
from torch import Tensor

from moesaic.kernels import cuda, reference
from moesaic.kernels.adam import AdamStep

COUNTS = [[0, 0, 0], [0, 1, 0], [1, 0, 3, 2], [5, 0, 11], [40, 1, 0, 2], [7, 33, 17, 0, 65], [131], [257, 0, 509]]
SIZES = [(8, 16), (1, 2), (17, 6), (33, 26), (64, 96), (31, 50), (257, 126), (40, 64)]  # inputs, outputs


@pytest.fixture
def grouped(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device, with torch's grouped product also where it gains nothing."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        pytest.skip("torch's grouped product is a loop on this GPU")
    monkeypatch.setattr(cuda, "_takes", lambda rows, others: rows.dtype == others.dtype == torch.bfloat16 and len(rows))
    return device


def rand(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()])


def check(name: str, one: Tensor, other: Tensor, offsets: Tensor, terms: int) -> None:
    """A product summed in fp32 and rounded to its dtype once (see test_grouped.py)."""
    got, product = getattr(cuda, name)(one, other, offsets), getattr(reference, name)
    exact = product(one.cpu().double(), other.cpu().double(), offsets)
    magnitude = product(one.cpu().double().abs(), other.cpu().double().abs(), offsets)
    assert got.shape == exact.shape and got.dtype == one.dtype and got.is_contiguous() and got.device == one.device
    once_more = 2**-8 * exact.abs() if got.dtype == torch.bfloat16 else 0
    bound = ((terms + 2) * 2**-24 * magnitude + once_more) * 1.01 + 1e-30
    assert not exact.numel() or ((got.cpu().double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_products_and_their_gradients(counts: list[int], dtype: torch.dtype, grouped: torch.device) -> None:
    offsets, num_rows = offsets_of(counts), sum(counts)
    for inputs, outputs in SIZES:
        x_RI, dy_RO = (
            rand(grouped, num_rows, inputs, dtype=dtype),
            rand(grouped, num_rows, outputs, dtype=dtype, seed=1),
        )
        weight_EOI = rand(grouped, len(counts), outputs, inputs, dtype=dtype, seed=2)
        check("grouped_linear", x_RI, weight_EOI, offsets, inputs)
        check("grouped_linear_input_grad", dy_RO, weight_EOI, offsets, outputs)
        check("grouped_linear_weight_grad", dy_RO, x_RI, offsets, max(counts))
        dw_EOI = cuda.grouped_linear_weight_grad(dy_RO, x_RI, offsets)
        assert not dw_EOI[offsets.diff() == 0].any()
        sum_EOI = torch.full(weight_EOI.shape, torch.nan, device=grouped)
        cuda.add_grouped_linear_weight_grad(dy_RO, x_RI, offsets, sum_EOI, False)
        assert torch.equal(sum_EOI, dw_EOI.float())
        cuda.add_grouped_linear_weight_grad(dy_RO, x_RI, offsets, sum_EOI, True)
        assert torch.equal(sum_EOI, 2 * dw_EOI.float())
        gated, product = cuda.grouped_gated(x_RI, weight_EOI, offsets)
        assert torch.equal(product, cuda.grouped_linear(x_RI, weight_EOI, offsets))
        assert torch.equal(gated, reference.silu_mul(product))


@pytest.mark.parametrize(("num_tokens", "top_k"), [(0, 2), (1, 1), (17, 3), (509, 4)])
def test_rows_are_sorted_and_combined(num_tokens: int, top_k: int, device: torch.device) -> None:
    """Tokens with rows of their own number, some without any."""
    generator = torch.Generator().manual_seed(num_tokens)
    ids_TK = torch.randint(-1, 7, (num_tokens, top_k), generator=generator)
    got, expected = cuda.sort_rows(ids_TK.to(device), 7), reference.sort_rows(ids_TK, 7)
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(got, expected, strict=True))
    assert got[2].device.type == "cpu"
    token_ids_R, choice_R, _ = expected
    row_ids_R = torch.argsort(token_ids_R * top_k + choice_R)
    token_offsets = torch.cat([torch.zeros(1), torch.bincount(token_ids_R, minlength=num_tokens).cumsum(0)]).long()
    out_RD, weights_R = torch.randn(len(row_ids_R), 11), torch.rand(len(row_ids_R))
    for dtype in (torch.float32, torch.bfloat16):
        rows = (out_RD.to(dtype), weights_R, row_ids_R, token_offsets)
        y_TD = cuda.combine_rows(*(tensor.to(device) for tensor in rows))
        torch.testing.assert_close(y_TD.cpu(), reference.combine_rows(*rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_and_its_gradient(dtype: torch.dtype, gpu: torch.device) -> None:
    for shape in ((3, 5, 12), (1, 7), (0, 8), (257, 768)):
        x, dy = rand(gpu, *shape, dtype=dtype), rand(gpu, *shape, dtype=dtype, seed=1)
        weight = rand(gpu, shape[-1], dtype=dtype, seed=2)
        (y, inverse), (exact, exact_inverse) = cuda.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6)
        assert inverse.shape == exact_inverse.shape and inverse.dtype == exact_inverse.dtype
        torch.testing.assert_close(y, exact)
        torch.testing.assert_close(inverse, exact_inverse)
        dx, d_weight = cuda.rms_norm_grad(dy, x, weight, inverse)
        exact_dx, exact_d_weight = reference.rms_norm_grad(dy, x, weight, inverse)
        torch.testing.assert_close(dx, exact_dx)
        torch.testing.assert_close(d_weight, exact_d_weight, rtol=2e-2, atol=2e-2 * shape[0] ** 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_goes_once_over_memory(dtype: torch.dtype, gpu: torch.device) -> None:
    """fp64 is too wide for the fused kernels and goes to the reference."""
    for shape in ((5, 14), (2, 3, 6), (0, 8), (3, 2200)):
        gate_up, dy = rand(gpu, *shape, dtype=dtype), rand(gpu, *shape[:-1], shape[-1] // 2, dtype=dtype, seed=1)
        torch.testing.assert_close(cuda.silu_mul(gate_up), reference.silu_mul(gate_up))
        torch.testing.assert_close(cuda.silu_mul_grad(dy, gate_up), reference.silu_mul_grad(dy, gate_up))
    out_RD, dy_TD = rand(gpu, 9, 1037, dtype=dtype), rand(gpu, 4, 1037, dtype=dtype, seed=1)
    weights_R = rand(gpu, 9, dtype=torch.float32).abs()
    token_ids_R = torch.tensor([0, 3, 1, 1, 0, 3, 2, 2, 1], device=gpu)
    grads = cuda.combine_rows_grad(dy_TD, out_RD, weights_R, token_ids_R)
    for got, exact in zip(grads, reference.combine_rows_grad(dy_TD, out_RD, weights_R, token_ids_R), strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-5 if got.dtype != torch.bfloat16 else None, atol=1e-4)
    for batch, head_dim in ((1, 12), (2, 64), (2, 6)):
        x_BSHA, angles = rand(gpu, 2, 5, 3, head_dim, dtype=dtype), rand(gpu, batch, 5, 1, head_dim // 2, dtype=dtype)
        angles = torch.cat([angles, angles], dim=-1)
        for sign in (1.0, -1.0):
            turned = cuda.rotate(x_BSHA, angles.cos(), angles.sin(), sign)
            torch.testing.assert_close(turned, reference.rotate(x_BSHA, angles.cos(), angles.sin(), sign))
    for vocab in (7, 61, 5000, 32003):
        logits_NV = 3 * rand(gpu, 6, vocab, dtype=dtype)
        logits_NV[0, 3] = 60  # p is 1 in fp32
        targets_N = torch.tensor([3, -100, 1, 2, vocab - 1, 0], device=gpu)
        slopes_NV, exact_NV = logits_NV.clone(), logits_NV.clone()
        losses_N, exact_N = cuda.cross_entropy_(slopes_NV, targets_N), reference.cross_entropy_(exact_NV, targets_N)
        torch.testing.assert_close(losses_N, exact_N)
        torch.testing.assert_close(slopes_NV, exact_NV)


def test_one_step_of_adamw(device: torch.device) -> None:
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        weight, average = rand(device, 4097, dtype=dtype), rand(device, 4097, dtype=dtype, seed=1)
        moments = (torch.zeros_like(weight), torch.zeros_like(weight))
        ours, theirs = ([tensor.clone() for tensor in (weight, *moments, average)] for _ in range(2))
        for number in range(1, 6):
            settings = {"learning_rate": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1, "clip": 0.5, "newest": 0.3}
            step, gradient = AdamStep.number(number, **settings), rand(device, 4097, dtype=dtype, seed=number)
            rounded = torch.empty_like(weight, dtype=torch.bfloat16)
            for kernels, (moved, first, second, mean) in ((reference, theirs), (cuda, ours)):
                kernels.adamw_(moved, gradient.clone(), (first, second), step, rounded=rounded, average=mean)
            assert torch.equal(rounded, ours[0].bfloat16())
            for got, exact in zip(ours, theirs, strict=True):
                torch.testing.assert_close(got, exact, rtol=tolerance, atol=tolerance)
    still = AdamStep.number(1, learning_rate=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    before = ours[0].clone()
    cuda.adamw_(ours[0], ours[1].clone(), (ours[1], ours[2]), still)
    assert torch.equal(ours[0], before)
