import pytest
import torch

from moesaic.config import RopeConfig
from moesaic.layers.rope import Rotation, rotate, rotation


def by_matrix(x_BSHA, turn):
    """eq. 34 for pairs (i, i + A/2): x cos + (-x2, x1) sin, in plain torch."""
    first, second = x_BSHA.chunk(2, dim=-1)
    return x_BSHA * turn.cos + torch.cat([-second, first], dim=-1) * turn.sin


def drawn(dtype, batch=2, length=7, heads=3, head_dim=10):
    torch.manual_seed(0)
    positions = torch.randint(0, 50, (batch, length))
    turn = rotation(RopeConfig(theta=100.0), head_dim, positions, dtype)
    return torch.randn(batch, length, heads, head_dim).to(dtype), turn


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-15), (torch.float32, 3e-7), (torch.bfloat16, 3e-2)])
def test_rotate_and_its_gradient_are_those_of_the_equation(dtype, bound):
    x, turn = drawn(dtype)
    mine, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = rotate(mine, turn), by_matrix(plain, turn)
    assert (out - expected).abs().max() <= bound * x.abs().max()
    out.backward(x.cos())
    expected.backward(x.cos())
    assert mine.grad is not None and plain.grad is not None
    assert (mine.grad - plain.grad).abs().max() <= bound
    with torch.no_grad():
        assert torch.equal(rotate(x, turn), out)


def test_gradcheck():
    x, turn = drawn(torch.float64)
    assert torch.autograd.gradcheck(lambda heads: rotate(heads, turn), (x.requires_grad_(),))


def test_products_of_turned_heads_depend_on_distance_alone():
    x, _ = drawn(torch.float64)
    config = RopeConfig(theta=100.0)
    products = []
    for start in (0, 31):
        turn: Rotation = rotation(config, 10, torch.tensor([[start, start + 5]]), torch.float64)
        q, k = rotate(x[:1, :1], Rotation(turn.cos[:, :1], turn.sin[:, :1])), x[:1, 1:2]
        products.append((q * rotate(k, Rotation(turn.cos[:, 1:], turn.sin[:, 1:]))).sum(-1))
    assert torch.allclose(products[0], products[1], atol=1e-5)
