"""Routers that give each token as many experts as it needs.

T tokens, E experts, K choices a token, N null experts. z are the logits.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from moesaic.config.router import NullSettings, RouterConfig, TopPSettings
from moesaic.routing.routers.router import ROUTERS, Choice, RouterInput, best_first, select, weigh


@ROUTERS.register("relu")
def relu(seen: RouterInput, settings: RouterConfig) -> Choice:
    """Every expert whose logit is above 0 (ReMoE, arXiv:2412.14711, eqs. 5-6).

    g = s = relu(z). A token may have no expert or all; a penalty that grows and shrinks while training (the loss
    "relu_sparsity") holds their mean number at K.
    """
    scores_TE = torch.relu(seen.logits_TE)
    expert_ids_TM = seen.dictated_TM
    if expert_ids_TM is None:
        expert_ids_TM = best_first(scores_TE.detach() > 0, scores_TE)
    return Choice(expert_ids_TM, weigh(scores_TE, expert_ids_TM, settings), scores_TE)


@ROUTERS.register("top_p")
def top_p(seen: RouterInput, settings: RouterConfig) -> Choice:
    """The best experts until their probabilities reach p (Huang et al., arXiv:2403.07652, sec. 3.2).

    s = softmax(z), in descending order; choose the fewest whose sum is p or more, one at least, K at most;
    g = s[chosen], divided by their sum if renormalize.
    """
    own = settings.settings
    assert isinstance(own, TopPSettings)
    scores_TE = torch.softmax(seen.logits_TE, dim=-1)
    expert_ids_TK = select(scores_TE, seen, settings)
    if seen.dictated_TM is None:
        expert_ids_TK = expert_ids_TK.masked_fill(_before(scores_TE.detach().gather(1, expert_ids_TK)) >= own.p, -1)
    return Choice(expert_ids_TK, weigh(scores_TE, expert_ids_TK, settings), scores_TE)


def _before(values_TK: Tensor) -> Tensor:
    """The sum of all values before each, from left to right."""
    return pad(values_TK.cumsum(-1)[:, :-1], (1, 0))


@ROUTERS.register("null_topk")
def null_topk(seen: RouterInput, settings: RouterConfig) -> Choice:
    """K choices of E experts and N null experts, which cost nothing (AdaMoE, arXiv:2406.13233).

    s = softmax(z) over all E + N; choose the top K of s + b, null experts having no b; what falls on a null expert is
    no row. g = s[chosen], divided by the sum over real experts if renormalize. The scores handed on are the E real.
    """
    own = settings.settings
    assert isinstance(own, NullSettings)
    scores_TE = torch.softmax(seen.logits_TE, dim=-1)
    if seen.selection_bias_E is not None:
        seen = seen._replace(selection_bias_E=pad(seen.selection_bias_E, (0, own.num_null_experts)))
    expert_ids_TK = select(scores_TE, seen, settings)
    expert_ids_TK = expert_ids_TK.masked_fill(expert_ids_TK >= settings.num_experts, -1)
    return Choice(expert_ids_TK, weigh(scores_TE, expert_ids_TK, settings), scores_TE[:, : settings.num_experts])
