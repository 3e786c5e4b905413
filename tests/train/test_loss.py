import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.routing import RoutingTape
from moesaic.train import loss
from moesaic.train.loss import linear_cross_entropy, losses
from tests.tiny import lively, tiny_config

IGNORED = -100  # as torch.nn.functional.cross_entropy has it

F = torch.nn.functional


def inputs(num_tokens, dtype=torch.float64, vocab_size=11, hidden_size=5, scale=1.0):
    generator = torch.Generator().manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, hidden_size, dtype=torch.float64, generator=generator) * scale
    weight_VD = torch.randn(vocab_size, hidden_size, dtype=torch.float64, generator=generator)
    targets_T = torch.randint(0, vocab_size, (num_tokens,), generator=generator)
    return x_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), targets_T


def test_it_equals_the_plain_loss_and_its_gradients(monkeypatch):
    """With chunks of 6 rows at most, and some targets that do not count."""
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 6 * 11)
    for num_tokens in (1, 5, 6, 7, 13, 31):
        x_TD, weight_VD, targets_T = inputs(num_tokens)
        targets_T[1::4] = IGNORED
        ours = linear_cross_entropy(x_TD, weight_VD, targets_T)
        plain = F.cross_entropy(x_TD @ weight_VD.T, targets_T)
        assert ours.item() == pytest.approx(plain.item(), rel=1e-12)
        got = torch.autograd.grad(3 * ours, (x_TD, weight_VD))
        wanted = torch.autograd.grad(3 * plain, (x_TD, weight_VD))
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("num_tokens", [0, 1, 6, 31])
def test_a_bias_counts_as_in_the_plain_loss(num_tokens, monkeypatch):
    monkeypatch.setattr(loss, "LOGITS_AT_ONCE", 6 * 11)
    x_TD, weight_VD, targets_T = inputs(num_tokens)
    bias_V = torch.linspace(-1, 1, len(weight_VD), dtype=torch.float64).requires_grad_()
    targets_T[1::4] = IGNORED
    ours = linear_cross_entropy(x_TD, weight_VD, targets_T, bias_V)
    plain = F.cross_entropy(x_TD @ weight_VD.T + bias_V, targets_T) if num_tokens else (x_TD.sum() + bias_V.sum()) * 0
    assert ours.item() == pytest.approx(plain.item(), rel=1e-12)
    got = torch.autograd.grad(3 * ours, (x_TD, bias_V))
    wanted = torch.autograd.grad(3 * plain, (x_TD, bias_V))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("rows_at_once", [3, 100])
def test_gradcheck(rows_at_once, monkeypatch):
    monkeypatch.setattr(loss, "_rows_at_once", lambda *_: rows_at_once)
    x_TD, weight_VD, targets_T = inputs(8)
    targets_T[2] = IGNORED
    assert torch.autograd.gradcheck(lambda x, w: linear_cross_entropy(x, w, targets_T), (x_TD, weight_VD))


@settings(max_examples=60)
@given(tokens=st.integers(0, 10_000), hidden=st.integers(1, 5000), vocabulary=st.integers(1, 300_000))
def test_chunks_cover_all_rows_evenly_and_bound_the_logits(tokens, hidden, vocabulary):
    rows = loss._rows_at_once(tokens, hidden, vocabulary)
    assert rows <= max(hidden, loss.LOGITS_AT_ONCE // vocabulary)
    num_chunks = -(-tokens // rows)
    assert num_chunks * rows - tokens < max(1, num_chunks)


def test_no_logits_are_kept_for_backward():
    """Only the gradients by the inputs: neither what is saved nor the graph grows with T x V."""
    x_TD, weight_VD, targets_T = inputs(300, torch.float32, vocab_size=97)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        linear_cross_entropy(x_TD, weight_VD, targets_T)
    assert sorted(saved) == [weight_VD.numel(), x_TD.numel()]


def test_without_gradients_it_is_the_same_number():
    x_TD, weight_VD, targets_T = inputs(9, torch.float32)
    with torch.no_grad():
        plain = F.cross_entropy(x_TD @ weight_VD.T, targets_T)
        assert linear_cross_entropy(x_TD, weight_VD, targets_T).item() == pytest.approx(plain.item(), rel=1e-6)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_targets_no_loss_and_no_gradient(num_tokens):
    x_TD, weight_VD, targets_T = inputs(num_tokens)
    found = linear_cross_entropy(x_TD, weight_VD, torch.full_like(targets_T, IGNORED))
    found.backward()
    assert found.item() == 0
    assert weight_VD.grad is not None and not weight_VD.grad.any()


@pytest.mark.parametrize("rows_at_once", [64, 1000])
def test_bf16_is_near_the_exact_loss_of_its_inputs(rows_at_once, monkeypatch):
    """A rounded logit l shifts probabilities by 2^-9 |l| of themselves; rounded slopes and products add 2^-8."""
    monkeypatch.setattr(loss, "_rows_at_once", lambda *_: rows_at_once)
    x_TD, weight_VD, targets_T = inputs(500, torch.bfloat16, vocab_size=97, hidden_size=32, scale=0.5)
    ours = linear_cross_entropy(x_TD, weight_VD, targets_T)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x_TD, weight_VD)]
    plain = F.cross_entropy(exact[0] @ exact[1].T, targets_T)
    bound = 2**-9 * (exact[0] @ exact[1].T).abs().max() + 2**-8
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(plain.item(), rel=1e-3)
    got = torch.autograd.grad(ours, (x_TD, weight_VD))
    wanted = torch.autograd.grad(plain, exact)
    for ours_grad, exact_grad in zip(got, wanted, strict=True):
        assert ours_grad.dtype == torch.bfloat16
        error = (ours_grad.double() - exact_grad).abs().max() / exact_grad.abs().max()
        assert error < bound


def test_a_sure_and_right_prediction_keeps_its_small_slope():
    """p - 1 of p = 0.9997 in fp32 has four digits left; rounding p to bf16 first would leave none."""
    x_TD = torch.tensor([[1.0]], dtype=torch.bfloat16, requires_grad=True)
    weight_VD = torch.tensor([[8.0], [0.0]], dtype=torch.bfloat16)
    linear_cross_entropy(x_TD, weight_VD, torch.tensor([0])).backward()
    assert x_TD.grad is not None
    assert x_TD.grad.item() == pytest.approx(-8 * torch.tensor(-8.0).double().sigmoid().item(), rel=2**-8)


def test_hopeless_predictions_have_a_finite_loss():
    x_TD, weight_VD = torch.tensor([[1.0]], requires_grad=True), torch.tensor([[500.0], [0.0]])
    found = linear_cross_entropy(x_TD, weight_VD, torch.tensor([1]))
    found.backward()
    assert found.item() == 500.0 and x_TD.grad is not None and x_TD.grad.item() == 500.0


def test_a_tied_head_gets_both_gradients():
    model = lively(tiny_config(windows=(None, None), tied=True)).double()
    tokens = torch.arange(24).view(2, 12) * 5 % 61
    losses(model, tokens, tokens.roll(-1, 1), [], RoutingTape()).total.backward()
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    for name, parameter in model.named_parameters():
        gradient = ours[name]
        assert gradient is not None and parameter.grad is not None
        assert torch.allclose(gradient, parameter.grad, rtol=1e-9, atol=1e-12), name


def test_the_router_feels_the_coefficient_and_only_it():
    """Balance losses reach the router whatever the others do: twice the coefficient, twice the penalty's gradient."""
    model = lively(tiny_config(windows=(None, None)))
    tokens = torch.arange(24).view(2, 12) * 5 % 61
    weight = model.get_parameter("layers.0.feed_forward.router.weight")

    def slope(coefficient):
        parts = losses(model, tokens, tokens, [("switch", coefficient)], RoutingTape())
        return torch.autograd.grad(parts.penalty, weight)[0] if coefficient else parts.penalty

    assert slope(0.1).abs().max() > 1e-4
    assert torch.allclose(slope(0.2), 2 * slope(0.1))
    assert slope(0.0) == 0
