"""Routers that give experts their tokens, seeing the whole batch: their choice of a token depends on later ones.

T tokens, E experts, K choices a token. z are the logits.
"""

import numpy as np
import torch
from torch import Tensor

from moesaic.config.router import RouterConfig, SinkhornSettings
from moesaic.routing.assignment import balanced_assignment
from moesaic.routing.routers.router import ROUTERS, Choice, RouterInput, best_first, select, weigh


@ROUTERS.register("expert_choice")
def expert_choice(seen: RouterInput, settings: RouterConfig) -> Choice:
    """Every expert takes the tokens that score best for it (Zhou et al., arXiv:2202.09368, sec. 3.2).

    s = softmax(z) over experts; each expert takes its T K / E best tokens (where that is no whole number, the first
    T K mod E experts take one more); g = s[chosen]. Padding is no token. A token may have any number of experts.
    """
    scores_TE = torch.softmax(seen.logits_TE, dim=-1)
    expert_ids_TM = seen.dictated_TM
    if expert_ids_TM is None:
        expert_ids_TM = best_first(_taken(scores_TE.detach(), seen.mask_T, settings.top_k), scores_TE)
    return Choice(expert_ids_TM, weigh(scores_TE, expert_ids_TM, settings), scores_TE)


def _taken(scores_TE: Tensor, mask_T: Tensor | None, top_k: int) -> Tensor:
    """is_taken_TE: whether an expert takes a token; among equals the earlier token."""
    num_tokens, num_experts = scores_TE.shape
    num_routed = num_tokens
    if mask_T is not None:
        num_routed = int(mask_T.sum())
        scores_TE = scores_TE.masked_fill(~mask_T[:, None], -torch.inf)
    order_TE = torch.sort(scores_TE, dim=0, descending=True, stable=True).indices
    places_E = _shared_out(num_routed * top_k, num_experts).to(order_TE.device)
    has_place_TE = torch.arange(num_tokens, device=order_TE.device)[:, None] < places_E
    return torch.zeros_like(has_place_TE).scatter(0, order_TE, has_place_TE)


def _shared_out(total: int, num_experts: int) -> Tensor:
    """`total` in E whole numbers, the larger ones first."""
    return total // num_experts + (torch.arange(num_experts) < total % num_experts)


@ROUTERS.register("base")
def base(seen: RouterInput, settings: RouterConfig) -> Choice:
    """One expert a token, equally many tokens an expert (BASE, arXiv:2103.16716, eqs. 1-3).

    While training, the assignment with the largest sum of z in which every expert has T / E tokens, rounded down or
    up; padding is no token. In evaluation the largest z. g = sigmoid(z[chosen]).
    """
    scores_TE = torch.sigmoid(seen.logits_TE)
    if seen.training and seen.dictated_TM is None:
        expert_ids_T1 = _assigned(seen.logits_TE.detach(), seen.mask_T)[:, None]
    else:
        expert_ids_T1 = select(seen.logits_TE, seen, settings)
    return Choice(expert_ids_T1, weigh(scores_TE, expert_ids_T1, settings), scores_TE, ranked_TE=seen.logits_TE)


def _assigned(logits_TE: Tensor, mask_T: Tensor | None) -> Tensor:
    """expert_ids_T, -1 for padding."""
    expert_ids_T = torch.full((logits_TE.shape[0],), -1, dtype=torch.int64, device=logits_TE.device)
    routed = slice(None) if mask_T is None else mask_T
    values_TE = _finite(logits_TE[routed].cpu().double().numpy())
    expert_ids_T[routed] = torch.from_numpy(balanced_assignment(values_TE)).to(logits_TE.device)
    return expert_ids_T


def _finite(values_TE: np.ndarray) -> np.ndarray:
    """-inf as so low a number that one such pair is worse than all others together."""
    is_finite = np.isfinite(values_TE)
    low, high = (values_TE[is_finite].min(), values_TE[is_finite].max()) if is_finite.any() else (0.0, 0.0)
    far = (high - low + 1) * (len(values_TE) + 1)
    return np.nan_to_num(values_TE, nan=low - far, neginf=low - far, posinf=high + far)


@ROUTERS.register("sinkhorn")
def sinkhorn(seen: RouterInput, settings: RouterConfig) -> Choice:
    """Choices from scores whose experts are scaled to equal sums (S-BASE, arXiv:2202.01169, sec. 4.1).

    While training, exp(z) is scaled until every token's row and every expert's column has its equal part, and the
    K largest of each row are chosen; in evaluation the K largest z, token by token. s = softmax(z); g = s[chosen],
    divided by their sum if renormalize.
    """
    own = settings.settings
    assert isinstance(own, SinkhornSettings)
    scores_TE = torch.softmax(seen.logits_TE, dim=-1)
    ranked_TE = seen.logits_TE.detach()
    if seen.training:  # also where choices are dictated: a capacity looks for the next best in the same ranking
        routed_TE = ranked_TE if seen.mask_T is None else ranked_TE[seen.mask_T]
        ranked_TE = ranked_TE + _column_scales(routed_TE, own.iterations)
    expert_ids_TK = select(ranked_TE, seen, settings)
    return Choice(expert_ids_TK, weigh(scores_TE, expert_ids_TK, settings), scores_TE, ranked_TE=ranked_TE)


def _column_scales(logits_TE: Tensor, iterations: int) -> Tensor:
    """The logarithm of what Sinkhorn multiplies each column by; a row's own scale cannot change its order."""
    columns_E = logits_TE.new_zeros(logits_TE.shape[1])
    for _ in range(iterations):
        rows_T1 = _negated(torch.logsumexp(logits_TE + columns_E, dim=1, keepdim=True))
        columns_E = _negated(torch.logsumexp(logits_TE + rows_T1, dim=0))
    return columns_E


def _negated(log_sums: Tensor) -> Tensor:
    """-log_sums, but 0 where a sum has nothing in it."""
    return torch.where(log_sums.isneginf(), 0.0, -log_sums)
