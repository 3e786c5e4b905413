import math

import pytest
import torch

from moesaic.config import RouterConfig
from moesaic.errors import ConfigError
from moesaic.routing.routers import ROUTERS, RouterInput


def plain_choice(logits, score, top_k, bias, renormalize, scale):
    """The equations, in plain Python floats, for one token."""
    if score == "softmax":
        total = sum(math.exp(z) for z in logits)
        scores = [math.exp(z) / total for z in logits]
    else:
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    ranked = sorted(range(len(logits)), key=lambda e: (-(scores[e] + bias[e]), e))[:top_k]
    weights = [scores[e] for e in ranked]
    if renormalize:
        weights = [w / sum(weights) for w in weights]
    return ranked, [w * scale for w in weights], scores


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (5, 2), (7, 7), (16, 4)])
@pytest.mark.parametrize("biased", [True, False])
def test_routers_follow_their_equations(score, renormalize, num_experts, top_k, biased):
    generator = torch.Generator().manual_seed(num_experts)
    logits_TE = torch.randn(9, num_experts, generator=generator, dtype=torch.float64) * 3
    bias_E = torch.randn(num_experts, generator=generator, dtype=torch.float64) if biased else None
    settings = RouterConfig(
        name=f"{score}_topk", num_experts=num_experts, top_k=top_k, renormalize=renormalize, scaling_factor=2.5
    )
    choice = ROUTERS[settings.name](RouterInput(logits_TE, selection_bias_E=bias_E), settings)
    for token, logits in enumerate(logits_TE.tolist()):
        bias = bias_E.tolist() if bias_E is not None else [0.0] * num_experts
        ids, weights, scores = plain_choice(logits, score, top_k, bias, renormalize, 2.5)
        assert choice.expert_ids_TM[token].tolist() == ids
        assert choice.weights_TM[token].tolist() == pytest.approx(weights, rel=1e-12)
        assert choice.scores_TE[token].tolist() == pytest.approx(scores, rel=1e-12)


def test_among_equal_scores_the_lower_expert_wins():
    settings = RouterConfig(name="softmax_topk", num_experts=6, top_k=3)
    choice = ROUTERS["softmax_topk"](RouterInput(torch.zeros(4, 6)), settings)
    assert choice.expert_ids_TM.tolist() == [[0, 1, 2]] * 4


def test_a_bias_chooses_but_never_weighs_and_gets_no_gradient():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 0.0, 9.0], requires_grad=True)
    settings = RouterConfig(name="sigmoid_topk", num_experts=4, top_k=2, selection_bias=True)
    choice = ROUTERS["sigmoid_topk"](RouterInput(logits, selection_bias_E=bias), settings)
    scores = torch.sigmoid(logits)[0]
    assert choice.expert_ids_TM.tolist() == [[3, 0]]
    assert torch.allclose(choice.weights_TM[0], scores[[3, 0]] / (scores[3] + scores[0]))
    choice.weights_TM[0, 0].backward()
    assert logits.grad is not None
    assert bias.grad is None


def test_an_unknown_router_lists_the_known_ones():
    with pytest.raises(ConfigError, match="Known: sigmoid_topk, softmax_topk"):
        ROUTERS["softmax_top"]
