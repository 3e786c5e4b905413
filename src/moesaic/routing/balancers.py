"""The ways to keep experts evenly loaded. Losses are returned, one scalar a layer, never collected anywhere.

T tokens, E experts. Padding never counts: it has no rows, and `mask_T` leaves it out of the means.
"""

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from moesaic.registry import Registry
from moesaic.routing.routing import RoutingDecision


class BalanceLoss(Protocol):
    def __call__(self, decision: RoutingDecision) -> Tensor: ...


BALANCE_LOSSES: Registry[BalanceLoss] = Registry("balance loss")


@BALANCE_LOSSES.register("switch")
def switch_balance_loss(decision: RoutingDecision) -> Tensor:
    """E * sum_i f_i P_i (Switch, arXiv:2101.03961, eq. 4): 1.0 in perfect balance, whatever K.

    f is the share of the rows that expert i got (sums to 1), P its mean score (scores are first divided by their sum).
    """
    counts_E = decision.rows.counts_E.to(decision.scores_TE)
    share_E = counts_E / counts_E.sum().clamp(min=1)
    normalized_TE = decision.scores_TE / decision.scores_TE.sum(-1, keepdim=True)
    return share_E.numel() * (share_E * _mean_over_tokens(normalized_TE, decision.mask_T)).sum()


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


def _mean_over_tokens(values: Tensor, mask_T: Tensor | None) -> Tensor:
    if mask_T is None:
        return values.mean(0) if values.shape[0] else values.sum(0)
    mask = mask_T.to(values).reshape(-1, *[1] * (values.dim() - 1))
    return (values * mask).sum(0) / mask.sum().clamp(min=1)
