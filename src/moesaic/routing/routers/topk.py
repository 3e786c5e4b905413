"""Routers that take the K best scores; they differ in the score and in what divides it.

T tokens, E experts, K choices a token. z are the logits, b the selection bias (0 without one), s the scores.
"""

import torch
from torch import Tensor

from moesaic.config.router import RouterConfig
from moesaic.routing.routers.router import ROUTERS, Choice, RouterInput, select, softplus, weigh, weigh_by_softmax


@ROUTERS.register("softmax_topk")
def softmax_topk(seen: RouterInput, settings: RouterConfig) -> Choice:
    """Softmax over all experts, then the K largest (Mixtral arXiv:2401.04088 sec. 2.1; Qwen3; OLMoE without division).

    s = softmax(z); choose the top K of s + b; g = s[chosen], divided by their sum if renormalize.
    With groups scored by "max" this is the group-limited greedy choice of DeepSeek-V2 (arXiv:2405.04434, sec. 2.2.2).
    """
    scores_TE = torch.softmax(seen.logits_TE, dim=-1)
    expert_ids_TK = select(scores_TE, seen, settings)
    return Choice(expert_ids_TK, weigh(scores_TE, expert_ids_TK, settings), scores_TE)


# One expert and never renormalised: g = s[chosen], so that the router has a gradient (Switch, arXiv:2101.03961, eq. 2).
ROUTERS.register("switch")(softmax_topk)


@ROUTERS.register("dense")
def dense(seen: RouterInput, settings: RouterConfig) -> Choice:
    """Every expert, weighed by the softmax: the mixture of 1991 (Jacobs et al., Neural Computation 3(1), sec. 1).

    g = softmax(z).
    """
    return softmax_topk(seen, settings)


@ROUTERS.register("topk_softmax")
def topk_softmax(seen: RouterInput, settings: RouterConfig) -> Choice:
    """The K largest logits, then softmax over these alone (Granite; gpt-oss).

    Choose the top K of z + b; g = softmax(z[chosen]). Scores are the softmax over all experts.
    """
    expert_ids_TK = select(seen.logits_TE, seen, settings)
    weights_TK = weigh_by_softmax(seen.logits_TE, expert_ids_TK, settings)
    return Choice(expert_ids_TK, weights_TK, torch.softmax(seen.logits_TE, dim=-1), ranked_TE=seen.logits_TE)


@ROUTERS.register("sigmoid_topk")
def sigmoid_topk(seen: RouterInput, settings: RouterConfig) -> Choice:
    """Independent sigmoid scores, then the K largest (DeepSeek-V3 arXiv:2412.19437 eqs. 12-16).

    s = sigmoid(z); choose the top K of s + b; g = s[chosen] / (their sum + 1e-20) if renormalize.
    """
    scores_TE = torch.sigmoid(seen.logits_TE)
    expert_ids_TK = select(scores_TE, seen, settings)
    return Choice(expert_ids_TK, weigh(scores_TE, expert_ids_TK, settings, tiny=1e-20), scores_TE)


@ROUTERS.register("sqrt_softplus_topk")
def sqrt_softplus_topk(seen: RouterInput, settings: RouterConfig) -> Choice:
    """Scores that grow as the root of the logit, then the K largest (DeepSeek-V4, arXiv:2606.19348).

    s = sqrt(log(1 + exp(z))); choose the top K of s + b; g = s[chosen] / (their sum + 1e-20).
    """
    scores_TE = sqrt_softplus(seen.logits_TE)
    expert_ids_TK = select(scores_TE, seen, settings)
    return Choice(expert_ids_TK, weigh(scores_TE, expert_ids_TK, settings, tiny=1e-20), scores_TE)


def sqrt_softplus(logits_TE: Tensor) -> Tensor:
    """sqrt(log(1 + exp(z))), with the gradient 0 that it tends to where it is 0 (a root's own is infinite there)."""
    softplus_TE = softplus(logits_TE)
    is_zero_TE = softplus_TE == 0
    return softplus_TE.masked_fill(is_zero_TE, 1.0).sqrt().masked_fill(is_zero_TE, 0.0)


@ROUTERS.register("sigmoid_input")
def sigmoid_input(seen: RouterInput, settings: RouterConfig) -> Choice:
    """The K largest logits, whose sigmoids multiply the experts' inputs (Llama 4, as its released code has it).

    Choose the top K of z + b; g = sigmoid(z[chosen]); the experts see g x, and their outputs are summed as they are.
    """
    scores_TE = torch.sigmoid(seen.logits_TE)
    expert_ids_TK = select(seen.logits_TE, seen, settings)
    weights_TK = weigh(scores_TE, expert_ids_TK, settings)
    return Choice(expert_ids_TK, weights_TK, scores_TE, weight_on="input", ranked_TE=seen.logits_TE)
