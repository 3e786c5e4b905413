"""Losses that keep a router healthy without counting loads; reported as their equations have them.

T tokens, D hidden, E experts, K choices a token.
"""

import math

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.routing.balancers.counting import choice_counts, mean_over_tokens, num_counted, probabilities
from moesaic.routing.balancers.loss import balance_loss
from moesaic.routing.balancers.refusals import no_penalty, no_weight
from moesaic.routing.routing import RoutingDecision


@balance_loss("router_z", scope="token", refusals=[no_weight])
def router_z_loss(decision: RoutingDecision) -> Tensor:
    """mean_t (logsumexp_j z_tj)^2 (ST-MoE, arXiv:2202.08906, eq. 5): keeps router logits small."""
    return mean_over_tokens(torch.logsumexp(decision.logits_TE, dim=-1).square(), decision.mask_T)


@balance_loss("entropy", scope="token", refusals=[no_weight])
def entropy_loss(decision: RoutingDecision) -> Tensor:
    """mean_t H(p_t) in nats, p_t being the token's scores divided by their sum: makes choices sharper.

    The dynamic loss of arXiv:2403.07652 and the local one of LIMoE (arXiv:2206.02770).
    """
    return mean_over_tokens(_entropy(probabilities(decision.scores_TE)), decision.mask_T)


@balance_loss("batch_entropy", scope="micro-batch", refusals=[no_weight])
def batch_entropy_loss(decision: RoutingDecision) -> Tensor:
    """ln E - H(mean_t p_t): 0 where the mean probabilities are even (the global loss of LIMoE, arXiv:2206.02770).

    ln E is added, which changes no gradient. Of no tokens at all it is 0.
    """
    probability_E = mean_over_tokens(probabilities(decision.scores_TE), decision.mask_T)
    return math.log(probability_E.numel()) * probability_E.detach().sum() - _entropy(probability_E)


@balance_loss("similarity", scope="weights", refusals=[no_weight])
def similarity_loss(decision: RoutingDecision) -> Tensor:
    """sum_{i != j} cos(w_i, w_j)^2 over the router's rows: keeps experts' directions apart."""
    directions_ED = torch.nn.functional.normalize(_router_weight(decision), dim=-1)
    cosines_EE = directions_ED @ directions_ED.T
    return cosines_EE.square().sum() - cosines_EE.diagonal().square().sum()


@balance_loss("orthogonal", scope="weights", refusals=[no_weight])
def orthogonal_loss(decision: RoutingDecision) -> Tensor:
    """|| W W^T - I ||_1, entries summed, W being [E, D] (SimBal, arXiv:2506.14038): like tokens, like experts."""
    weight_ED = _router_weight(decision)
    identity_EE = torch.eye(weight_ED.shape[0], dtype=weight_ED.dtype, device=weight_ED.device)
    return (weight_ED @ weight_ED.T - identity_EE).abs().sum()


@balance_loss("relu_sparsity", scope="micro-batch", refusals=[no_penalty], own_coefficient=True)
def relu_sparsity_loss(decision: RoutingDecision) -> Tensor:
    """sum_i f_i mean_t g_ti (ReMoE, arXiv:2412.14711, its load-balancing form): an L1 norm, heavier on loaded experts.

    f_i = E / (K T) * (tokens that use expert i), g the gates. See `move_penalty` for its coefficient.
    """
    if decision.top_k is None:
        raise ConfigError('the "relu_sparsity" balance loss needs a decision that says its top_k')
    gates_E = mean_over_tokens(decision.scores_TE, decision.mask_T)
    used_E = choice_counts(decision).to(gates_E) / max(1, num_counted(decision))
    return used_E.numel() / decision.top_k * (used_E * gates_E).sum()


def _entropy(probabilities_E: Tensor) -> Tensor:
    """- sum p ln p along the last dimension, in nats, with finite gradients at 0."""
    tiny = torch.finfo(probabilities_E.dtype).tiny
    return -(probabilities_E * probabilities_E.clamp_min(tiny).log()).sum(-1)


def _router_weight(decision: RoutingDecision) -> Tensor:
    if decision.router_weight_ED is None:
        raise ConfigError("this balance loss looks at the router's weights, and the decision has none")
    return decision.router_weight_ED
