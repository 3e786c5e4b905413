"""Softmax cross-entropy and rotation: native against reference against torch in fp64, over odd sizes."""

import pytest
import torch

from moesaic.kernels import ops, reference

native = pytest.importorskip("moesaic.kernels.native", reason="the kernels were not built: no C++ compiler")

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=["reference", *native._native.available_isas()])
def kernels(request: pytest.FixtureRequest):
    """The reference, and the compiled kernels with each instruction set."""
    if request.param == "reference":
        yield reference
        return
    before = native._native.isa()
    assert native._native.use_isa(request.param)
    yield native
    native._native.use_isa(before)


def _draw(*shape, dtype=torch.float32, scale=1.0, seed=0):
    """Normal numbers whose memory starts one element past an aligned address."""
    numel = torch.Size(shape).numel()
    numbers = scale * torch.randn(numel + 1, generator=torch.Generator().manual_seed(seed))
    return numbers.to(dtype)[1:].view(shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, vocab", [(0, 5), (1, 1), (3, 7), (2, 16), (5, 33), (7, 1031)])
def test_cross_entropy_is_that_of_fp64(kernels, dtype, rows, vocab):
    # Far below zero, where a zero taken in from beyond the row's end would be the largest logit.
    logits = _draw(rows, vocab, scale=5.0, dtype=dtype).sub_(300)
    targets = torch.arange(rows) * 3 % vocab
    targets[1:2] = -100
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    losses.sum().backward()
    found = kernels.cross_entropy_(logits, targets)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), losses.detach(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logits.double(), exact.grad, rtol=2e-5 if dtype == torch.float32 else 2**-8, atol=1e-6)


def test_the_slope_at_a_sure_target_does_not_cancel(kernels):
    logits = torch.tensor([[38.0, 30.0, 30.0]])
    kernels.cross_entropy_(logits, torch.tensor([0]))
    p = torch.tensor([[38.0, 30.0, 30.0]], dtype=torch.float64).softmax(-1)
    assert logits[0, 0].item() == pytest.approx(-(p[0, 1] + p[0, 2]).item(), rel=5e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stays_so(bad):
    logits = _draw(2, 40)
    logits[1, 17] = bad
    losses = ops.cross_entropy_(logits, torch.tensor([0, 1]))
    assert losses[0].isfinite() and losses[1].isnan()


def test_a_target_past_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="past 6"):
        native.cross_entropy_(_draw(1, 7), torch.tensor([7]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows_of_angles", [1, 2])
@pytest.mark.parametrize("head_dim", [2, 6, 32, 34, 64])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_rotation_is_complex_multiplication(kernels, dtype, rows_of_angles, head_dim, sign):
    x = _draw(2, 5, 3, head_dim, dtype=dtype)
    angles = _draw(rows_of_angles, 5, 1, head_dim // 2, scale=3.0, seed=1).repeat(1, 1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    half = head_dim // 2
    turn = torch.complex(cos.double(), sign * sin.double())[..., :half]
    turned = torch.complex(x.double()[..., :half], x.double()[..., half:]) * turn
    exact = torch.cat([turned.real, turned.imag], dim=-1)
    found = kernels.rotate(x, cos, sin, sign)
    torch.testing.assert_close(found.double(), exact, rtol=2**-7 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_rotation_of_no_tokens_and_of_heads_that_lie_apart():
    cos = sin = torch.ones(1, 0, 1, 8)
    assert ops.rotate(torch.empty(2, 0, 3, 8), cos, sin).shape == (2, 0, 3, 8)
    apart = _draw(2, 3, 5, 8).transpose(1, 2)
    cos, sin = _draw(1, 5, 1, 8), _draw(1, 5, 1, 8, seed=2)
    torch.testing.assert_close(ops.rotate(apart, cos, sin), reference.rotate(apart, cos, sin))


def test_the_gradient_of_a_rotation():
    x = _draw(2, 3, 2, 6, dtype=torch.float64).requires_grad_()
    angles = _draw(1, 3, 1, 3, dtype=torch.float64).repeat(1, 1, 1, 2)
    assert torch.autograd.gradcheck(ops.rotate, (x, angles.cos(), angles.sin()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads_gives_the_same_bits(dtype):
    threads, results = torch.get_num_threads(), []
    for number in (1, 2, 3):
        torch.set_num_threads(number)
        logits, x = _draw(37, 1031, dtype=dtype), _draw(2, 67, 8, 32, dtype=dtype)
        losses = native.cross_entropy_(logits, torch.arange(37))
        results.append((losses, logits, native.rotate(x, *[_draw(1, 67, 1, 32, dtype=dtype)] * 2)))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
