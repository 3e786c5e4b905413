"""The whole layer's gradient against finite differences, in fp64, at points where no choice is about to change."""

import pytest
import torch

from moesaic.config import CapacityConfig, MlpConfig, MoeConfig, RouterConfig
from moesaic.errors import ConfigError
from moesaic.layers.moe import MoeLayer
from moesaic.routing import RoutingTape, TokenFacts
from moesaic.routing.balancers import mean_over_layers
from moesaic.train.loss import linear_cross_entropy
from tests.tiny import lively, tiny_config

HIDDEN, EXPERTS, TOP_K, TOKENS = 6, 5, 2, 7


def make_layer(router, *, renormalize=True, shared=False, bias=False, weight_on="output"):
    settings = RouterConfig(
        name=router,
        num_experts=EXPERTS,
        top_k=TOP_K,
        renormalize=renormalize,
        selection_bias=bias,
        scaling_factor=1.5,
    )
    config = MoeConfig(router=settings, intermediate_size=3, shared=MlpConfig(intermediate_size=4) if shared else None)
    torch.manual_seed(3)
    layer = MoeLayer(config, HIDDEN, 0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    if layer.router.selection_bias is not None:
        layer.router.selection_bias = torch.linspace(-0.3, 0.3, EXPERTS, dtype=torch.float64)
    choose = layer.router.choose
    layer.router.choose = lambda seen, settings: choose(seen, settings)._replace(weight_on=weight_on)
    return layer


def margin(layer, x_TD):
    """How far the closest token is from choosing otherwise."""
    decision = layer.router(x_TD, TokenFacts())
    bias = layer.router.selection_bias
    ranked = (decision.scores_TE if bias is None else decision.scores_TE + bias).sort(-1, descending=True).values
    return (ranked[:, TOP_K - 1] - ranked[:, TOP_K]).min().item()


def check_gradient(layer, *, fast_mode):
    """Output and balance losses against finite differences in the input and in every parameter."""
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64, requires_grad=True)
    assert margin(layer, x[0]) > 1e-3  # gradcheck moves by 1e-6

    def output_and_losses(x_BSD, *weights):
        tape = RoutingTape()
        facts = TokenFacts(document_ids_T=torch.tensor([0, 0, 0, 1, 1, 1, 1]))
        y = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x_BSD, facts, tape))
        return y, *(mean_over_layers(name, tape.decisions.values()) for name in ("switch", "sequence", "router_z"))

    assert torch.autograd.gradcheck(output_and_losses, (x, *parameters), fast_mode=fast_mode)


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize(("shared", "bias"), [(False, False), (True, True)])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk"])
def test_gradcheck_through_router_and_experts(router, renormalize, shared, bias, weight_on):
    """Along random directions; the slow test takes every element of the Jacobian."""
    layer = make_layer(router, renormalize=renormalize, shared=shared, bias=bias, weight_on=weight_on)
    check_gradient(layer, fast_mode=True)


@pytest.mark.slow
@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk"])
def test_gradcheck_of_every_element(router, weight_on):
    check_gradient(make_layer(router, shared=True, bias=True, weight_on=weight_on), fast_mode=False)


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk"])
def test_dictated_choices_are_weighed_by_the_router_with_its_gradient(router):
    layer = make_layer(router, bias=True)
    first, second = torch.randn(2, 1, TOKENS, HIDDEN, dtype=torch.float64)
    heard = RoutingTape()
    expected = layer(first, tape=heard)
    choices = {0: heard.decisions[0].rows}
    assert torch.equal(layer(first, tape=RoutingTape(choices=choices)), expected)

    dictated = RoutingTape(choices=choices)
    layer(second, tape=dictated).square().sum().backward()
    decision = dictated.decisions[0]
    ids, weights = decision.rows.as_topk()
    assert torch.equal(ids, choices[0].as_topk()[0])
    scores = decision.scores_TE.gather(1, ids)
    assert torch.allclose(weights, 1.5 * scores / scores.sum(-1, keepdim=True), rtol=1e-12)
    gradient_ED = layer.get_parameter("router.weight").grad
    assert gradient_ED is not None and gradient_ED.abs().sum() > 0


def test_dictated_choices_leave_padding_out_and_finite():
    layer = make_layer("softmax_topk")
    x = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64)
    x[0, 4:] *= 1e6  # scores of exactly 0: the sum of badly chosen ones would be 0 too
    facts = TokenFacts(mask_T=torch.arange(TOKENS) < 4)
    heard, dictated = RoutingTape(), RoutingTape()
    expected = layer(x, facts, heard)
    dictated.choices = {0: heard.decisions[0].rows}
    got = layer(x, facts, dictated)
    assert torch.equal(got, expected)
    got.sum().backward()
    gradient_ED = layer.get_parameter("router.weight").grad
    assert gradient_ED is not None and torch.isfinite(gradient_ED).all()


@pytest.mark.parametrize("router", ["softmax_topk", "sigmoid_topk"])
def test_a_whole_decoders_loss_changes_as_its_gradient_says(router):
    model = lively(tiny_config(router=router, shared=True, windows=(3, None))).double().train()
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 61, (2, 9), generator=generator)
    document_ids = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2], [0] * 9])

    def loss(tape=None):
        tape = tape or RoutingTape()
        x_TD = model.hidden(ids, tape=tape, document_ids_BS=document_ids).flatten(0, 1)
        balance = sum(mean_over_layers(name, tape.decisions.values()) for name in ("switch", "sequence", "router_z"))
        return linear_cross_entropy(x_TD, model.head_weight, ids.flatten().roll(1)) + 0.1 * balance

    loss().backward()
    parameters = list(model.parameters())
    for _ in range(4):
        directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
        slope = sum(
            (p.grad * d).sum().item() for p, d in zip(parameters, directions, strict=True) if p.grad is not None
        )
        sides = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter.add_(direction, alpha=step)
                sides.append(loss().item())
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=1e-6)
        assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_gate_weighs_the_shared_expert(overflow):
    """Each token's shared output times the sigmoid of its own number, and once more what overflowed to it."""
    capacity = CapacityConfig(factor=0.5, overflow="shared") if overflow else None
    config = MoeConfig(
        router=RouterConfig(name="softmax_topk", num_experts=EXPERTS, top_k=TOP_K),
        intermediate_size=3,
        shared=MlpConfig(intermediate_size=4),
        shared_gate=True,
        capacity=capacity,
    )
    torch.manual_seed(4)
    layer = MoeLayer(config, HIDDEN, 0).double().train()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    x, tape = torch.randn(1, TOKENS, HIDDEN, dtype=torch.float64), RoutingTape()
    y = layer(x, tape=tape)
    decision = tape.decisions[0]
    extra_T = decision.shared_weight_T if overflow else torch.zeros(TOKENS, dtype=torch.float64)
    assert extra_T is not None and (extra_T > 0).any() == overflow
    assert layer.shared_gate is not None and layer.shared_experts is not None
    gate_T1 = 1 / (1 + (-x[0] @ layer.shared_gate.weight.T).exp())
    shared = layer.shared_experts(x[0]) * (gate_T1 + extra_T[:, None])
    assert torch.allclose(y[0], layer.experts.compute(x[0], decision.rows) + shared)


def test_a_gate_needs_a_shared_expert():
    with pytest.raises(ConfigError, match="shared_gate without a shared expert"):
        router = RouterConfig(name="softmax_topk", num_experts=3, top_k=1)
        MoeConfig(router=router, intermediate_size=3, shared_gate=True)
