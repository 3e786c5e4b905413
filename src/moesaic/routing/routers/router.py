"""What a router is: logits in, a choice of experts and their weights out.

T tokens, E experts, K choices a token, M columns of choices. All arithmetic is in fp32 or wider; ties go to the lower
expert id.
"""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic.kernels import ops
from moesaic.registry import Registry
from moesaic.router_config import GroupConfig, RouterConfig


class RouterInput(NamedTuple):
    """What a router may look at. `selection_bias_E` takes part in choosing only; `token_ids_T` serves look-ups.

    dictated_TM: experts already chosen, for the router to weigh only; -1 where a token has no such choice.
    mask_T: true for tokens that count; None when all do. training: whether noise and limits of training apply.
    noise_logits_TE: the logits of the noise (noisy top-k). table_VK: the experts of each token id (hash).
    """

    logits_TE: Tensor
    token_ids_T: Tensor | None = None
    selection_bias_E: Tensor | None = None
    dictated_TM: Tensor | None = None
    mask_T: Tensor | None = None
    training: bool = False
    noise_logits_TE: Tensor | None = None
    table_VK: Tensor | None = None


class Choice(NamedTuple):
    """A router's answer. `expert_ids_TM` has -1 where a token has no M-th choice, whose weight nobody reads.

    scores_TE: its unbiased score of every expert, for balancers and telemetry.
    ranked_TE: what it ranked, where that is not the score. noise_std_TE: of the noise in that (noisy top-k).
    """

    expert_ids_TM: Tensor
    weights_TM: Tensor
    scores_TE: Tensor
    weight_on: Literal["output", "input"] = "output"
    ranked_TE: Tensor | None = None
    noise_std_TE: Tensor | None = None


class Router(Protocol):
    """Logits in, a choice of experts and their weights out."""

    def __call__(self, seen: RouterInput, settings: RouterConfig) -> Choice: ...


ROUTERS: Registry[Router] = Registry("router")


def select(scores_TE: Tensor, seen: RouterInput, settings: RouterConfig) -> Tensor:
    """expert_ids_TM: the K best of scores plus bias, inside each token's best groups; or those that were dictated."""
    if seen.dictated_TM is not None:
        return seen.dictated_TM
    ranked_TE = scores_TE.detach()
    if seen.selection_bias_E is not None:
        ranked_TE = ranked_TE + seen.selection_bias_E
    if settings.groups is not None:
        ranked_TE = keep_best_groups(ranked_TE, settings.groups)
    return ops.select_topk(ranked_TE, settings.top_k)


def keep_best_groups(ranked_TE: Tensor, groups: GroupConfig) -> Tensor:
    """ranked_TE with -inf outside each token's `top_groups` best groups.

    Minus infinity and not 0: biased scores may be negative, and 0 would then win from outside.
    """
    num_tokens, num_experts = ranked_TE.shape
    grouped_TGe = ranked_TE.view(num_tokens, groups.num_groups, num_experts // groups.num_groups)
    best_TG = grouped_TGe.amax(-1) if groups.score == "max" else grouped_TGe.topk(2, dim=-1).values.sum(-1)
    kept_ids = ops.select_topk(best_TG.contiguous(), groups.top_groups)
    is_kept_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(1, kept_ids, True)
    return grouped_TGe.masked_fill(~is_kept_TG[:, :, None], -torch.inf).reshape(num_tokens, num_experts)


def weigh(scores_TE: Tensor, expert_ids_TM: Tensor, settings: RouterConfig, tiny: float = 0.0) -> Tensor:
    """weights_TM: the chosen scores, divided by their sum plus `tiny` if renormalize, times the scaling factor.

    Choices of -1 weigh 0 and do not count in the sum. A token without any gets zeros, and zero gradients.
    """
    weights_TM = scores_TE.gather(1, expert_ids_TM.clamp(min=0))
    if settings.renormalize:
        is_absent_TM = expert_ids_TM < 0
        weights_TM = weights_TM.masked_fill(is_absent_TM, 0.0)
        sums_T1 = weights_TM.sum(-1, keepdim=True) + tiny
        weights_TM = weights_TM / sums_T1.masked_fill(is_absent_TM.all(-1, keepdim=True), 1.0)
    if settings.scaling_factor != 1.0:
        weights_TM = weights_TM * settings.scaling_factor
    return weights_TM
