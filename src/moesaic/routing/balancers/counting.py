"""What balancers count and average. T tokens, E experts.

Shares (f) are of what the router chose, before any capacity, biases included: what moves where rows go. Probabilities
(P) are of all experts' scores.
"""

import torch
from torch import Tensor

from moesaic.routing.routing import RoutingDecision


def choice_counts(decision: RoutingDecision) -> Tensor:
    """How often each expert was chosen, fp64 [E] on the CPU. Null experts are none of them."""
    return decision.chosen.counts_E.double()


def num_counted(decision: RoutingDecision) -> int:
    """The tokens that are no padding."""
    return decision.chosen.num_tokens if decision.mask_T is None else int(decision.mask_T.sum())


def shares(counts_E: Tensor, like: Tensor) -> Tensor:
    """Counts divided by their sum, in the dtype and on the device of `like`; zeros when nothing was chosen."""
    counts_E = counts_E.double()
    return (counts_E / counts_E.sum().clamp(min=1)).to(like)


def probabilities(scores_TE: Tensor) -> Tensor:
    """Each token's scores divided by their sum. A token without any score prefers none: 1 / E each, no gradient."""
    sums_T1 = scores_TE.sum(-1, keepdim=True)
    is_silent_T1 = sums_T1 == 0
    divided_TE = scores_TE / sums_T1.masked_fill(is_silent_T1, 1.0)
    return divided_TE.masked_fill(is_silent_T1, 1 / max(1, scores_TE.shape[1]))


def mean_over_tokens(values: Tensor, mask_T: Tensor | None) -> Tensor:
    """The mean over the first dimension of what `mask_T` keeps; 0 when that is nothing."""
    if mask_T is None:
        return values.mean(0) if values.shape[0] else values.sum(0)
    # Filled and not multiplied by 0: what stands at padding may be anything, NaN too.
    kept = values.masked_fill(~mask_T.view(-1, *[1] * (values.dim() - 1)), 0.0)
    return kept.sum(0) / mask_T.sum().clamp(min=1)


def plus_one_if_any(value: Tensor, decision: RoutingDecision) -> Tensor:
    """1 + value where anything was chosen, else 0: perfect balance is 1.0, and nothing is nothing."""
    return value + 1 if decision.chosen.token_ids_R.numel() else value * 0


def squared_variation(amounts_E: Tensor) -> Tensor:
    """CV^2: the population variance over the squared mean; 0 where all amounts are 0 (arXiv:1701.06538, eq. 7)."""
    mean = amounts_E.mean()
    return (amounts_E - mean).square().mean() / torch.where(mean == 0, torch.ones_like(mean), mean).square()
