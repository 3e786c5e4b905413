"""The definitions against the plainest loops."""

import pytest
import torch

from moesaic.kernels import reference


def test_select_topk_prefers_the_lower_id_among_equals() -> None:
    assert reference.select_topk(torch.tensor([[1.0, 2.0, 2.0, 0.0, 1.0]]), 4).tolist() == [[1, 2, 0, 4]]


def test_sort_rows_leaves_out_expert_minus_one() -> None:
    token_ids_R, choice_R, offsets = reference.sort_rows(torch.tensor([[2, 0], [-1, -1], [0, 2]]), 4)
    assert token_ids_R.tolist() == [0, 2, 0, 2]
    assert choice_R.tolist() == [1, 0, 0, 1]
    assert offsets.tolist() == [0, 2, 2, 4, 4]


def test_combine_rows_sums_each_tokens_rows() -> None:
    out_RD, weights_R = torch.randn(5, 3), torch.rand(5)
    y_TD = reference.combine_rows(out_RD, weights_R, torch.tensor([3, 0, 4, 2, 1]), torch.tensor([0, 2, 2, 5]))
    weighted = out_RD * weights_R[:, None]
    expected = torch.stack([weighted[3] + weighted[0], torch.zeros(3), weighted[4] + weighted[2] + weighted[1]])
    torch.testing.assert_close(y_TD, expected)


def test_grouped_linear_gives_idle_experts_zero_gradient() -> None:
    x_RI, weight_EOI, offsets = torch.randn(3, 4), torch.randn(3, 5, 4), torch.tensor([0, 1, 1, 3])
    y_RO = reference.grouped_linear(x_RI, weight_EOI, offsets)
    torch.testing.assert_close(y_RO[0], weight_EOI[0] @ x_RI[0])
    torch.testing.assert_close(y_RO[2], weight_EOI[2] @ x_RI[2])
    assert reference.grouped_linear_weight_grad(y_RO, x_RI, offsets)[1].eq(0).all()


def test_weight_gradients_are_added_without_rounding() -> None:
    dy_RO, x_RI = torch.randn(3, 5).bfloat16(), torch.randn(3, 4).bfloat16()
    sum_EOI = torch.ones(1, 5, 4)
    reference.add_grouped_linear_weight_grad(dy_RO, x_RI, torch.tensor([0, 3]), sum_EOI, True)
    torch.testing.assert_close(sum_EOI[0], 1 + dy_RO.float().T @ x_RI.float())


def test_bf16_sums_are_rounded_once() -> None:
    out_RD = torch.tensor([[1.0], [2**-9], [2**-9]], dtype=torch.bfloat16)
    y_TD = reference.combine_rows(out_RD, torch.ones(3), torch.arange(3), torch.tensor([0, 3]))
    assert y_TD.item() == torch.tensor(1 + 2**-8).bfloat16().item()
    assert reference.combine_rows(out_RD.repeat(1, 2), torch.ones(3), torch.arange(3), torch.tensor([0, 3])).dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize("shape", [(0, 7), (1, 16), (5, 3, 33), (11, 130)])
def test_rms_norm_is_torchs_own(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(shape[-1], dtype=torch.float64)
    y, inverse = reference.rms_norm(x, weight, 1e-6)
    assert inverse.shape == x.shape[:-1]
    assert torch.allclose(y, torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6), rtol=1e-12)
