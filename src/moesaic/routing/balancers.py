"""The ways to keep experts evenly loaded. Losses are returned, one scalar a layer, never collected anywhere.

T tokens, E experts, K choices a token, N documents. Padding never counts: it has no rows, and `mask_T` leaves it out
of the means.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.kernels import ops
from moesaic.registry import Registry
from moesaic.routing.routing import RoutingDecision


class BalanceLoss(Protocol):
    """One layer's routing in, one scalar out, with its gradient."""

    def __call__(self, decision: RoutingDecision) -> Tensor: ...


BALANCE_LOSSES: Registry[BalanceLoss] = Registry("balance loss")


@BALANCE_LOSSES.register("switch")
def switch_balance_loss(decision: RoutingDecision) -> Tensor:
    """E * sum_i f_i P_i (Switch, arXiv:2101.03961, eq. 4): 1.0 in perfect balance, whatever K.

    f is the share of the rows that expert i got (sums to 1), P its mean score (scores are first divided by their sum).
    """
    counts_E = decision.rows.counts_E.to(decision.scores_TE)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    return share_E.numel() * (share_E * _mean_over_tokens(_normalized(decision.scores_TE), decision.mask_T)).sum()


@BALANCE_LOSSES.register("sequence")
def sequence_balance_loss(decision: RoutingDecision) -> Tensor:
    """sum_i f_i P_i of each document (DeepSeek-V3, arXiv:2412.19437, eqs. 17-20): 1.0 in perfect balance, whatever K.

    In a document of T tokens, f_i is E / (K T) times the tokens that have expert i among their K best unbiased scores;
    P_i is the mean of its scores, each token's scores divided by their sum.
    Documents are averaged by their tokens, so that every token pulls as hard as any other and splitting a batch into
    micro-batches changes nothing; documents of one length, as in the paper, count alike. Raises ConfigError for
    routers without a fixed K.
    """
    if decision.rows.top_k is None:
        raise ConfigError('the "sequence" balance loss needs a fixed number of experts a token; use "switch"')
    share_TE = _document_shares(decision, decision.rows.top_k)
    balance_T = share_TE.shape[1] * (share_TE * _normalized(decision.scores_TE)).sum(-1)
    return _mean_over_tokens(balance_T, decision.mask_T)


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


@BALANCE_LOSSES.register("router_z")
def router_z_loss(decision: RoutingDecision) -> Tensor:
    """mean_t (logsumexp_j z_tj)^2 (ST-MoE, arXiv:2202.08906, eq. 5): keeps router logits small."""
    return _mean_over_tokens(torch.logsumexp(decision.logits_TE, dim=-1).square(), decision.mask_T)


def mean_over_layers(name: str, decisions: Iterable[RoutingDecision]) -> Tensor:
    """The named loss of each layer, averaged over layers.

    Never pooled: counts summed over layers hide layers that collapsed onto different experts.
    """
    return torch.stack([BALANCE_LOSSES[name](decision) for decision in decisions]).mean()


@torch.no_grad()
def update_selection_bias(selection_bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """Move a selection bias in place: up by `rate` below the mean load, down above (arXiv:2408.15664, alg. 1).

    `counts_E` are the rows of one whole optimizer step, over all micro-batches and ranks.
    """
    counts_E = counts_E.to(selection_bias_E)
    selection_bias_E += rate * torch.sign(counts_E.mean() - counts_E)


def _normalized(scores_TE: Tensor) -> Tensor:
    return scores_TE / scores_TE.sum(-1, keepdim=True)


def _mean_over_tokens(values: Tensor, mask_T: Tensor | None) -> Tensor:
    if mask_T is None:
        return values.mean(0) if values.shape[0] else values.sum(0)
    mask = mask_T.to(values).reshape(-1, *[1] * (values.dim() - 1))
    return (values * mask).sum(0) / mask.sum().clamp(min=1)
