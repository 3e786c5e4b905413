"""SparseMixer-2: experts sampled one after another, with a gradient for having sampled them.

T tokens, E experts, K choices a token. z are the logits.
"""

import torch
from torch import Tensor

from moesaic.config.router import RouterConfig, SparseMixerSettings
from moesaic.kernels import ops
from moesaic.routing.routers.router import ROUTERS, Choice, RouterInput

# Heun's third-order method: the midpoint, a third of the weight, for three quarters of what is not the largest.
_MIDPOINT = 0.3333  # as the released code rounds a third
_FULL_SHARE = 0.75


@ROUTERS.register("sparsemixer")
def sparsemixer(seen: RouterInput, settings: RouterConfig) -> Choice:
    """K rounds of one expert each (SparseMixer, arXiv:2310.00811; GRIN, arXiv:2409.12136, as Phi-3.5-MoE computes it).

    Each round closes the experts already chosen, and those with (max - z) / max(|z|, max) > 2 gap. p = softmax over
    the others; the largest is chosen, or while training one drawn from p; g = p[chosen]. While training, g of one that
    is not the largest is a third of p three times in four, and its gradient always that of p.
    Scores are the softmax over all experts.
    """
    own = settings.settings
    assert isinstance(own, SparseMixerSettings)
    # -inf as the lowest number: a round that has only closed experts left still takes one.
    logits_TE = seen.logits_TE.clamp(min=torch.finfo(seen.logits_TE.dtype).min)
    is_taken_TE = torch.zeros_like(logits_TE, dtype=torch.bool)
    ids, weights = [], []
    for choice in range(settings.top_k):
        open_TE = logits_TE.masked_fill(is_taken_TE, -torch.inf)
        open_TE = open_TE.masked_fill(_is_far(open_TE.detach(), own.gap), -torch.inf)
        id_T1 = _chosen(open_TE.detach(), seen, choice)
        weights.append(_weighed(torch.softmax(open_TE, dim=-1), id_T1, seen.training))
        ids.append(id_T1)
        is_taken_TE = is_taken_TE.scatter(1, id_T1, True)
    weights_TK = torch.cat(weights, dim=1) * settings.scaling_factor
    return Choice(torch.cat(ids, dim=1), weights_TK, torch.softmax(seen.logits_TE, dim=-1))


def _is_far(open_TE: Tensor, gap: float) -> Tensor:
    best_T1 = open_TE.amax(-1, keepdim=True)
    return (best_T1 - open_TE) / open_TE.abs().maximum(best_T1) > 2 * gap


def _chosen(open_TE: Tensor, seen: RouterInput, choice: int) -> Tensor:
    """The best open expert, or one drawn by adding Gumbel noise; what was dictated or drawn for gating dropout wins."""
    if seen.training:
        open_TE = open_TE - torch.empty_like(open_TE).exponential_().log()
    id_T1 = ops.select_topk(open_TE, 1)
    for others_TM in (seen.random_ids_TK, seen.dictated_TM):
        if others_TM is not None:
            other_T1 = others_TM[:, choice : choice + 1]
            id_T1 = torch.where(other_T1 >= 0, other_T1, id_T1)
    return id_T1


def _weighed(shares_TE: Tensor, id_T1: Tensor, training: bool) -> Tensor:
    weight_T1 = shares_TE.gather(1, id_T1)
    if not training:
        return weight_T1
    is_full_T1 = id_T1 == ops.select_topk(shares_TE, 1)
    is_full_T1 = is_full_T1 | (torch.rand_like(weight_T1.detach()) > _FULL_SHARE)
    value_T1 = torch.where(is_full_T1, weight_T1, _MIDPOINT * weight_T1).detach()
    return value_T1 + (weight_T1 - weight_T1.detach())
