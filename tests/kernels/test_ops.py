"""The registered operations: gradients, tracing, and the same answer with and without torch in between."""

import pytest
import torch
from torch import Tensor

from moesaic.kernels import ops

EXPERTS, TOP_K = 4, 2


def rows(num_tokens: int) -> dict[str, Tensor]:
    expert_ids_TK = torch.tensor([[0, 2], [2, 3], [-1, -1], [3, 0], [2, -1]])[:num_tokens]
    token_ids_R, choice_R, offsets = ops.sort_rows(expert_ids_TK, EXPERTS)
    row_ids_R = torch.argsort(token_ids_R * TOP_K + choice_R, stable=True)
    token_offsets = torch.zeros(num_tokens + 1, dtype=torch.int64)
    token_offsets[1:] = torch.bincount(token_ids_R, minlength=num_tokens).cumsum(0)
    return {"token_ids_R": token_ids_R, "row_ids_R": row_ids_R, "token_offsets": token_offsets, "offsets": offsets}


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def moe(x_TD: Tensor, gate_up_EGD: Tensor, down_EDF: Tensor, weights_R: Tensor) -> Tensor:
    r = rows(x_TD.shape[0])
    x_RD = ops.gather_rows(x_TD, r["token_ids_R"], r["row_ids_R"], r["token_offsets"])
    h_RF = ops.silu_mul(ops.grouped_linear(x_RD, gate_up_EGD, r["offsets"]))
    out_RD = ops.grouped_linear(h_RF, down_EDF, r["offsets"])
    return ops.combine_rows(out_RD, weights_R, r["row_ids_R"], r["token_offsets"], r["token_ids_R"])


@pytest.mark.parametrize("num_tokens", [5, 1])
def test_gradients_of_the_whole_chain(num_tokens: int) -> None:
    num_rows = rows(num_tokens)["token_ids_R"].numel()
    inputs = (leaf(num_tokens, 3), leaf(EXPERTS, 10, 3), leaf(EXPERTS, 3, 5), leaf(num_rows))
    assert torch.autograd.gradcheck(moe, inputs)


def test_gradients_of_the_gated_product() -> None:
    offsets = rows(5)["offsets"]
    inputs = (leaf(7, 3), leaf(EXPERTS, 10, 3))
    assert torch.autograd.gradcheck(lambda x, gate_up: ops.grouped_gated(x, gate_up, offsets), inputs)


@pytest.mark.parametrize("shape", [(1, 4), (3, 2, 7)])
def test_gradients_of_the_norm(shape: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(lambda x, weight: ops.rms_norm(x, weight, 1e-6), (leaf(*shape), leaf(shape[-1])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_agree_with_those_in_fp64(dtype: torch.dtype) -> None:
    """The compiled kernels' gradients, against the reference's in double precision."""
    inputs = (leaf(5, 33), leaf(EXPERTS, 34, 33), leaf(EXPERTS, 33, 17), leaf(7))
    narrow = tuple(t.detach().to(dtype if t.dim() > 1 else torch.float32).requires_grad_() for t in inputs)
    wide = tuple(t.detach().double().requires_grad_() for t in narrow)
    for t in (narrow, wide):
        moe(*t).square().sum().backward()
    for got, wanted in zip(narrow, wide, strict=True):
        assert got.grad is not None and wanted.grad is not None
        error = (got.grad.double() - wanted.grad).abs().max() / wanted.grad.abs().max()
        assert error < (1e-5 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_direct_way_gives_the_same_bits(dtype: torch.dtype) -> None:
    weights = (leaf(EXPERTS, 34, 33, dtype=dtype), leaf(EXPERTS, 33, 17, dtype=dtype), leaf(7).float())
    registered = moe(leaf(5, 33, dtype=dtype), *weights)
    with torch.no_grad():
        direct = moe(leaf(5, 33, dtype=dtype), *weights)
    assert registered.requires_grad and not direct.requires_grad
    assert torch.equal(registered, direct)


def test_zero_rows_have_gradients() -> None:
    x_TD, weight_EOI = leaf(0, 3, dtype=torch.float32), leaf(EXPERTS, 6, 3, dtype=torch.float32)
    nothing = torch.empty(0, dtype=torch.int64)
    x_RD = ops.gather_rows(x_TD, nothing, nothing, torch.zeros(1, dtype=torch.int64))
    h_RF = ops.silu_mul(ops.grouped_linear(x_RD, weight_EOI, torch.zeros(EXPERTS + 1, dtype=torch.int64)))
    assert h_RF.shape == (0, 3)
    h_RF.sum().backward()
    assert weight_EOI.grad is not None and weight_EOI.grad.eq(0).all()


def samples() -> list[tuple[str, tuple[object, ...]]]:
    r = rows(5)
    out_RD, x_RD, weights_R = (leaf(7, *size, dtype=torch.float32) for size in ([6], [3], []))
    return [
        ("select_topk", (torch.rand(5, EXPERTS), 2)),
        ("gather_rows", (leaf(5, 6, dtype=torch.float32), r["token_ids_R"], r["row_ids_R"], r["token_offsets"])),
        ("combine_rows", (out_RD, weights_R, r["row_ids_R"], r["token_offsets"], r["token_ids_R"])),
        ("grouped_linear", (x_RD, leaf(EXPERTS, 5, 3, dtype=torch.float32), r["offsets"])),
        ("grouped_gated", (x_RD, leaf(EXPERTS, 10, 3, dtype=torch.float32), r["offsets"])),
        (
            "add_grouped_linear_weight_grad",
            (out_RD.detach(), x_RD.detach(), r["offsets"], torch.zeros(EXPERTS, 6, 3), True),
        ),
        ("silu_mul", (out_RD,)),
        ("rms_norm", (out_RD, leaf(out_RD.shape[1]), 1e-6)),
        ("sort_rows", (torch.tensor([[0, 2], [-1, 1]]), EXPERTS)),
    ]


@pytest.mark.parametrize(("name", "inputs"), samples(), ids=lambda value: value if isinstance(value, str) else "")
def test_registrations_are_sound(name: str, inputs: tuple[object, ...]) -> None:
    torch.library.opcheck(getattr(torch.ops.moesaic, name), inputs)


def test_meta_tensors_pass_through() -> None:
    x = torch.empty(7, 6, device="meta")
    assert ops.silu_mul(x).shape == (7, 3)
    weight_EOI = torch.empty(EXPERTS, 9, 6, device="meta")
    assert ops.grouped_linear(x, weight_EOI, torch.zeros(5, dtype=torch.int64)).shape == (7, 9)


def test_selection_takes_scores_with_gradient() -> None:
    assert ops.select_topk(leaf(3, EXPERTS, dtype=torch.float32), 2).shape == (3, 2)
