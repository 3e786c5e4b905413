"""Losses that even the load out. Each is 1.0 in perfect balance, whatever K, and 0.0 of no tokens at all.

T tokens, E experts, K choices a token, N documents, G groups (devices). f are shares of choices, which have no
gradient; P are mean scores, which have.
"""

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.kernels import ops
from moesaic.routing.balancers.counting import (
    choice_counts,
    mean_over_tokens,
    plus_one_if_any,
    probabilities,
    shares,
    squared_variation,
)
from moesaic.routing.balancers.loss import balance_loss
from moesaic.routing.balancers.refusals import fixed_load, no_groups, no_noise, varying_k
from moesaic.routing.routing import RoutingDecision


@balance_loss("switch", scope="micro-batch", evens=True, refusals=[fixed_load])
@balance_loss("global_running", scope="running", evens=True, refusals=[fixed_load])
@balance_loss("global_exact", scope="step", evens=True, refusals=[fixed_load])
def switch_balance_loss(decision: RoutingDecision, counts_E: Tensor | None = None) -> Tensor:
    """E * sum_i f_i P_i (Switch, arXiv:2101.03961, eq. 4; GShard, arXiv:2006.16668, sec. 2.2, there by first choices).

    f is the share of all choices that fell on expert i (sums to 1), P its mean score (a token's scores are first
    divided by their sum). counts_E: choices of more than this batch, from which f is taken: with those of all ranks
    and micro-batches this is the global-batch loss (arXiv:2501.11873), whose P stays local.
    """
    share_E = shares(choice_counts(decision) if counts_E is None else counts_E, decision.scores_TE)
    probability_E = mean_over_tokens(probabilities(decision.scores_TE), decision.mask_T)
    return share_E.numel() * (share_E * probability_E).sum()


@balance_loss("sequence", scope="document", evens=True, refusals=[fixed_load, varying_k])
def sequence_balance_loss(decision: RoutingDecision) -> Tensor:
    """sum_i f_i P_i of each document (DeepSeek-V3, arXiv:2412.19437, eqs. 17-20).

    In a document of T tokens, f_i is E / (K T) times the tokens that have expert i among their K best unbiased scores;
    P_i is the mean of its scores, each token's scores divided by their sum.
    Documents are averaged by their tokens, so that every token pulls as hard as any other and splitting a batch into
    micro-batches changes nothing; documents of one length, as in the paper, count alike. Raises ConfigError for
    routers without a fixed K.
    """
    if decision.chosen.top_k is None:
        raise ConfigError('the "sequence" balance loss needs a fixed number of experts a token; use "switch"')
    share_TE = _document_shares(decision, decision.chosen.top_k)
    balance_T = share_TE.shape[1] * (share_TE * probabilities(decision.scores_TE)).sum(-1)
    return mean_over_tokens(balance_T, decision.mask_T)


def _document_shares(decision: RoutingDecision, top_k: int) -> Tensor:
    """For each token, the share of its document's choices that each expert has, [T, E]: f / E."""
    scores_TE, mask_T, document_ids_T = decision.scores_TE, decision.mask_T, decision.document_ids_T
    num_tokens, num_experts = scores_TE.shape
    if document_ids_T is None:
        document_ids_T = torch.zeros(num_tokens, dtype=torch.int64, device=scores_TE.device)
    num_documents = int(document_ids_T.max()) + 1 if num_tokens else 0
    cells_TK = document_ids_T[:, None] * num_experts + ops.select_topk(scores_TE, top_k)
    cells_TK = cells_TK if mask_T is None else cells_TK[mask_T]
    counts_NE = torch.bincount(cells_TK.flatten(), minlength=num_documents * num_experts).view(-1, num_experts)
    shares_NE = counts_NE.to(scores_TE.dtype) / counts_NE.sum(-1, keepdim=True).clamp(min=1)
    return shares_NE[document_ids_T]


@balance_loss("importance", scope="micro-batch", evens=True, refusals=[fixed_load])
def importance_loss(decision: RoutingDecision) -> Tensor:
    """1 + CV^2 of the weights each expert gets (arXiv:1701.06538, eqs. 6-7); the 1 changes no gradient.

    Importance_i = sum_t G_i(t). CV^2 is the population variance over the squared mean.
    """
    chosen = decision.chosen
    importance_E = chosen.weights_R.new_zeros(chosen.num_experts).index_add(0, chosen.expert_ids_R, chosen.weights_R)
    return plus_one_if_any(squared_variation(importance_E), decision)


@balance_loss("load", scope="micro-batch", evens=True, refusals=[fixed_load, no_noise])
def load_loss(decision: RoutingDecision) -> Tensor:
    """1 + CV^2 of the smooth load (arXiv:1701.06538, eqs. 8-11); the 1 changes no gradient.

    Load_i = sum_t Phi((z_ti - kth_excluding(H_t, K, i)) / std_ti): the chance that expert i is among the K best if only
    its own noise is drawn again. z are the logits, H those with noise. kth_excluding is the (K+1)-th largest of H for
    experts among the K best, else the K-th. Raises ConfigError where no noise was drawn.
    """
    noisy_TE, std_TE, top_k = decision.ranked_TE, decision.noise_std_TE, decision.chosen.top_k
    if noisy_TE is None or std_TE is None or top_k is None or top_k == noisy_TE.shape[1]:
        raise ConfigError(
            'the "load" balance loss needs the noise of router "noisy_topk" in training, and top_k < num_experts; '
            'use "importance"'
        )
    best = noisy_TE.topk(top_k + 1, dim=-1)
    is_chosen_TE = torch.zeros_like(noisy_TE, dtype=torch.bool).scatter(1, best.indices[:, :top_k], True)
    rival_TE = torch.where(is_chosen_TE, best.values[:, top_k:], best.values[:, top_k - 1 : top_k])
    chance_TE = _normal_chance(decision.logits_TE - rival_TE, std_TE)
    if decision.mask_T is not None:
        chance_TE = chance_TE.masked_fill(~decision.mask_T[:, None], 0.0)
    return plus_one_if_any(squared_variation(chance_TE.sum(0)), decision)


def _normal_chance(margin_TE: Tensor, std_TE: Tensor) -> Tensor:
    """Phi(margin / std). Of infinite margins 1 or 0, with no gradient; of -inf against -inf 0."""
    is_certain_TE = ~margin_TE.isfinite()
    chance_TE = torch.special.ndtr(margin_TE.masked_fill(is_certain_TE, 0.0) / std_TE)
    return torch.where(is_certain_TE, (margin_TE > 0).to(margin_TE), chance_TE)


@balance_loss("device", scope="micro-batch", evens=True, refusals=[fixed_load, no_groups])
def device_balance_loss(decision: RoutingDecision) -> Tensor:
    """sum_d f'_d P'_d over groups of experts (DeepSeek-V2, arXiv:2405.04434, sec. 2.2.3).

    f'_d is the mean of f_i = E / (K T) * (choices of expert i) over the group's experts, P'_d the sum of their P_i.
    """
    num_groups = _num_groups(decision)
    share_G = shares(choice_counts(decision), decision.scores_TE).view(num_groups, -1).sum(-1)
    return num_groups * (share_G * _group_probabilities(decision, num_groups)).sum()


@balance_loss("communication", scope="micro-batch", evens=True, refusals=[fixed_load, no_groups])
def communication_balance_loss(decision: RoutingDecision) -> Tensor:
    """sum_d f''_d P''_d over groups of experts (DeepSeek-V2, arXiv:2405.04434, sec. 2.2.3).

    f''_d is G times the share of group d among all pairs of a token and a group it is sent to, P''_d the sum of the P_i
    of its experts. The paper divides by M pairs a token (M = top_groups); that is the same where tokens use all
    groups they may, and otherwise less than 1 in perfect balance.
    """
    num_groups, chosen = _num_groups(decision), decision.chosen
    group_ids_R = chosen.expert_ids_R // (chosen.num_experts // num_groups)
    is_sent_TG = torch.zeros(chosen.num_tokens, num_groups, dtype=torch.bool, device=group_ids_R.device)
    is_sent_TG[chosen.token_ids_R, group_ids_R] = True
    share_G = shares(is_sent_TG.sum(0), decision.scores_TE)
    return num_groups * (share_G * _group_probabilities(decision, num_groups)).sum()


def _group_probabilities(decision: RoutingDecision, num_groups: int) -> Tensor:
    probability_E = mean_over_tokens(probabilities(decision.scores_TE), decision.mask_T)
    return probability_E.view(num_groups, -1).sum(-1)


def _num_groups(decision: RoutingDecision) -> int:
    if decision.groups is None:
        raise ConfigError('this balance loss needs experts in groups; give the router groups, or use "switch"')
    return decision.groups.num_groups
