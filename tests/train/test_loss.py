import pytest
import torch

from moesaic.train import loss
from moesaic.train.loss import linear_cross_entropy


@pytest.mark.parametrize("num_tokens", [1, 5, 6, 7, 13])
def test_it_equals_the_plain_loss_and_its_gradients(num_tokens, monkeypatch):
    monkeypatch.setattr(loss, "ROWS_AT_ONCE", 6)
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(num_tokens, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    weight_VD = torch.randn(11, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    targets_T = torch.randint(0, 11, (num_tokens,), generator=generator)
    ours = linear_cross_entropy(x_TD, weight_VD, targets_T)
    plain = torch.nn.functional.cross_entropy(x_TD @ weight_VD.T, targets_T)
    assert ours.item() == pytest.approx(plain.item(), rel=1e-12)
    got = torch.autograd.grad(3 * ours, (x_TD, weight_VD))
    wanted = torch.autograd.grad(3 * plain, (x_TD, weight_VD))
    assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(got, wanted, strict=True))


def test_without_gradients_it_is_the_same_number():
    x_TD, weight_VD, targets_T = torch.randn(9, 4), torch.randn(7, 4), torch.randint(0, 7, (9,))
    plain = torch.nn.functional.cross_entropy(x_TD @ weight_VD.T, targets_T)
    assert linear_cross_entropy(x_TD, weight_VD, targets_T).item() == pytest.approx(plain.item(), rel=1e-5)
