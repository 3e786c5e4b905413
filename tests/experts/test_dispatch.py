from typing import Literal

import pytest
import torch

from moesaic.config import ClampedSwiglu, MoeConfig, RouterConfig
from moesaic.experts import dispatch, padded
from moesaic.experts.grouped import GroupedExperts
from moesaic.routing import Rows

WeightOn = Literal["output", "input"]


def make(num_tokens, num_experts, top_k, hidden, inner, dtype=torch.float64, weight_on: WeightOn = "output", seed=0):
    torch.manual_seed(seed)
    router = RouterConfig(name="softmax_topk", num_experts=num_experts, top_k=top_k)
    experts = GroupedExperts(MoeConfig(router=router, intermediate_size=inner), hidden).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_TD = torch.randn(num_tokens, hidden, dtype=dtype)
    scores = torch.randn(num_tokens, num_experts).softmax(-1)
    weights_TK, ids_TK = scores.topk(top_k)
    return experts, x_TD, ids_TK, weights_TK, Rows.from_topk(ids_TK, weights_TK, num_experts, weight_on=weight_on)


def plain(experts, x_TD, ids_TK, weights_TK, weight_on):
    """Token by token, choice by choice."""
    y_TD = torch.zeros_like(x_TD)
    for token in range(x_TD.shape[0]):
        for expert, weight in zip(ids_TK[token].tolist(), weights_TK[token].to(x_TD.dtype), strict=True):
            x = x_TD[token] * weight if weight_on == "input" else x_TD[token]
            gate, up = (experts.gate_up[expert] @ x).chunk(2)
            out = experts.down[expert] @ (torch.nn.functional.silu(gate) * up)
            y_TD[token] += out if weight_on == "input" else out * weight
    return y_TD


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 3, 2), (1, 5, 1), (13, 7, 3), (17, 4, 4)])
def test_compute_equals_token_by_token(num_tokens, num_experts, top_k, weight_on):
    experts, x_TD, ids_TK, weights_TK, rows = make(num_tokens, num_experts, top_k, 12, 5, weight_on=weight_on)
    expected = plain(experts, x_TD, ids_TK, weights_TK, weight_on)
    assert torch.allclose(experts.compute(x_TD, rows), expected, rtol=1e-10, atol=1e-12)


def biased(num_tokens, num_experts, top_k, hidden, inner, activation):
    """Experts with biases, and tokens with their rows."""
    torch.manual_seed(1)
    router = RouterConfig(name="topk_softmax", num_experts=num_experts, top_k=top_k)
    config = MoeConfig(router=router, intermediate_size=inner, activation=activation, bias=True)
    experts = GroupedExperts(config, hidden).double()
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x_TD = torch.randn(num_tokens, hidden, dtype=torch.float64)
    weights_TK, ids_TK = torch.randn(num_tokens, num_experts).softmax(-1).topk(top_k)
    return experts, x_TD, ids_TK, weights_TK, Rows.from_topk(ids_TK, weights_TK, num_experts)


@pytest.mark.parametrize("activation", ["silu", ClampedSwiglu(limit=0.6, alpha=1.702, shift=1.0)])
@pytest.mark.parametrize("slots", [None, 9])
def test_experts_with_biases_equal_token_by_token(activation, slots):
    experts, x_TD, ids_TK, weights_TK, rows = biased(13, 7, 3, 12, 5, activation)
    assert experts.gate_up_bias is not None and experts.down_bias is not None
    expected = torch.zeros_like(x_TD)
    for token, expert, weight in zip(range(13), ids_TK, weights_TK.double(), strict=True):
        for e, w in zip(expert.tolist(), weight, strict=True):
            gate_up = experts.gate_up[e] @ x_TD[token] + experts.gate_up_bias[e]
            expected[token] += w * (experts.down[e] @ experts.activation(gate_up) + experts.down_bias[e])
    seen = experts.compute(x_TD, rows) if slots is None else padded.compute(experts, x_TD, rows, slots)
    assert torch.allclose(seen, expected, rtol=1e-6, atol=1e-7)


def test_gradients_reach_the_biases():
    experts, x_TD, _, _, rows = biased(6, 3, 2, 4, 3, ClampedSwiglu(limit=5.0, alpha=1.702, shift=1.0))
    names, parameters = zip(*experts.named_parameters(), strict=True)
    assert names == ("gate_up", "gate_up_bias", "down", "down_bias")

    def output(x, *tensors):
        return torch.func.functional_call(experts, dict(zip(names, tensors, strict=True)), (x, rows.expert_offsets))

    x_RD = dispatch.gather(x_TD, rows).requires_grad_()
    assert torch.autograd.gradcheck(output, (x_RD, *parameters), fast_mode=True)


def test_tokens_without_rows_get_zeros():
    experts, x_TD, ids_TK, weights_TK, _ = make(6, 4, 2, 8, 3)
    mask_T = torch.tensor([True, False, True, True, False, True])
    y_TD = experts.compute(x_TD, Rows.from_topk(ids_TK, weights_TK, 4, mask_T=mask_T))
    assert (y_TD[~mask_T] == 0).all()
    assert (y_TD[mask_T] != 0).any(dim=1).all()


def test_gradients_reach_inputs_weights_and_router():
    experts, x_TD, ids_TK, weights_TK, _ = make(7, 4, 2, 6, 3)
    x_TD.requires_grad_()
    weights_TK = weights_TK.double().requires_grad_()

    def forward(x, weights, gate_up, down):
        experts.gate_up.data, experts.down.data = gate_up.data, down.data
        rows = Rows.from_topk(ids_TK, weights, 4)
        inner = experts.activation(dispatch.ops.grouped_linear(dispatch.gather(x, rows), gate_up, rows.expert_offsets))
        return dispatch.combine(dispatch.ops.grouped_linear(inner, down, rows.expert_offsets), rows)

    parameters = (experts.gate_up.detach().clone().requires_grad_(), experts.down.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(forward, (x_TD, weights_TK, *parameters))


def test_an_expert_without_rows_gets_exact_zero_gradients():
    experts, x_TD, _, _, _ = make(5, 3, 1, 6, 4, dtype=torch.float32)
    rows = Rows.from_topk(torch.zeros(5, 1, dtype=torch.int64), torch.ones(5, 1), 3)
    experts.compute(x_TD, rows).sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None
        assert (parameter.grad[1:] == 0).all()
        assert (parameter.grad[0] != 0).any()


def test_the_same_batch_twice_gives_the_same_bits():
    experts, x_TD, _, _, rows = make(101, 8, 3, 16, 7, dtype=torch.float32)
    assert torch.equal(experts.compute(x_TD, rows), experts.compute(x_TD, rows))
