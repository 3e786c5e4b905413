"""What a router is: logits in, a choice of experts and their weights out.

T tokens, E experts, K choices a token, M columns of choices. All arithmetic is in fp32 or wider; ties go to the lower
expert id. Logits may be -inf (an expert that is closed), but not all of a token's.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic.config.router import GroupConfig, RouterConfig
from moesaic.kernels import ops
from moesaic.registry import Registry


class RouterInput(NamedTuple):
    """What a router may look at. `selection_bias_E` ([E], or [T, E] where tokens have their own) takes part in choosing
    only; `token_ids_T` serves look-ups.

    dictated_TM: experts already chosen, for the router to weigh only; -1 where a token has no such choice. M >= K.
    mask_T: true for tokens that count; None when all do. training: whether noise and limits of training apply.
    noise_logits_TE: the logits of the noise (noisy top-k). table_VK: the experts of each token id (hash).
    random_ids_TK: experts in place of a token's own choice (gating dropout); -1 where it keeps that.
    """

    logits_TE: Tensor
    token_ids_T: Tensor | None = None
    selection_bias_E: Tensor | None = None
    dictated_TM: Tensor | None = None
    mask_T: Tensor | None = None
    training: bool = False
    noise_logits_TE: Tensor | None = None
    table_VK: Tensor | None = None
    random_ids_TK: Tensor | None = None


class Choice(NamedTuple):
    """A router's answer. `expert_ids_TM` has -1 where a token has no M-th choice, whose weight nobody reads.

    Where choices were dictated, `expert_ids_TM` need not repeat them; `weights_TM` has their columns.
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


class Rechooser(NamedTuple):
    """What a router would choose of other logits, without the noise of training: called with logits_TE, it returns
    expert_ids_TM."""

    settings: RouterConfig
    selection_bias_E: Tensor | None = None

    def __call__(self, logits_TE: Tensor) -> Tensor:
        seen = RouterInput(logits_TE, selection_bias_E=self.selection_bias_E)
        return ROUTERS[self.settings.name](seen, self.settings).expert_ids_TM

    @classmethod
    def joined(cls, rechoosers: "Sequence[Rechooser]", num_tokens: int) -> "Rechooser":
        """One for the logits of several, `num_tokens` of each below the others; all of one configuration."""
        biases = [one.selection_bias_E for one in rechoosers if one.selection_bias_E is not None]
        if len(rechoosers) == 1 or not biases:
            return rechoosers[0]
        return cls(rechoosers[0].settings, torch.stack(biases).repeat_interleave(num_tokens, dim=0))


def select(scores_TE: Tensor, seen: RouterInput, settings: RouterConfig) -> Tensor:
    """expert_ids_TM: the K best of scores plus bias, inside each token's best groups; or those that were dictated."""
    if seen.dictated_TM is not None:
        return seen.dictated_TM
    ranked_TE = scores_TE.detach()
    if seen.selection_bias_E is not None:
        ranked_TE = ranked_TE + seen.selection_bias_E
    if settings.groups is not None:
        ranked_TE = keep_best_groups(ranked_TE, settings.groups)
    expert_ids_TK = ops.select_topk(ranked_TE, settings.top_k)
    if seen.random_ids_TK is not None:
        expert_ids_TK = torch.where(seen.random_ids_TK >= 0, seen.random_ids_TK, expert_ids_TK)
    return expert_ids_TK


def keep_best_groups(ranked_TE: Tensor, groups: GroupConfig) -> Tensor:
    """ranked_TE with -inf outside each token's `top_groups` best groups.

    Minus infinity and not 0: biased scores may be negative, and 0 would then win from outside.
    """
    num_tokens, num_experts = ranked_TE.shape
    # Inside, -inf becomes the lowest number: closed experts of a kept group still come before all others.
    inside_TE = ranked_TE.clamp(min=torch.finfo(ranked_TE.dtype).min)
    grouped_TGe = inside_TE.view(num_tokens, groups.num_groups, num_experts // groups.num_groups)
    best_TG = grouped_TGe.amax(-1) if groups.score == "max" else grouped_TGe.topk(2, dim=-1).values.sum(-1)
    kept_ids = ops.select_topk(best_TG.contiguous(), groups.top_groups)
    is_kept_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(1, kept_ids, True)
    return grouped_TGe.masked_fill(~is_kept_TG[:, :, None], -torch.inf).reshape(num_tokens, num_experts)


def best_first(is_chosen_TE: Tensor, scores_TE: Tensor) -> Tensor:
    """expert_ids_TM of what is chosen, each token's best first, then -1; M is the most of any token, and at least 1."""
    counts_T1 = is_chosen_TE.sum(-1, keepdim=True)
    width = max(1, int(counts_T1.max())) if counts_T1.numel() else 1
    expert_ids_TM = ops.select_topk(scores_TE.detach().masked_fill(~is_chosen_TE, -torch.inf), width)
    return expert_ids_TM.masked_fill(torch.arange(width, device=counts_T1.device) >= counts_T1, -1)


def weigh(scores_TE: Tensor, expert_ids_TM: Tensor, settings: RouterConfig, tiny: float = 0.0) -> Tensor:
    """weights_TM: the chosen scores, divided by their sum plus `tiny` if renormalize, times the scaling factor.

    Choices of -1 weigh 0 and do not count in the sum. A sum too small to divide by (below the smallest normal number)
    divides nothing: weights and gradients stay finite.
    """
    weights_TM = scores_TE.gather(1, expert_ids_TM.clamp(min=0)).masked_fill(expert_ids_TM < 0, 0.0)
    if settings.renormalize:
        sums_T1 = weights_TM.sum(-1, keepdim=True) + tiny
        weights_TM = weights_TM / sums_T1.masked_fill(sums_T1 < torch.finfo(sums_T1.dtype).tiny, 1.0)
    if settings.scaling_factor != 1.0:
        weights_TM = weights_TM * settings.scaling_factor
    return weights_TM


def weigh_by_softmax(logits_TE: Tensor, expert_ids_TM: Tensor, settings: RouterConfig) -> Tensor:
    """weights_TM: softmax over the chosen logits alone, times the scaling factor. Choices of -1 take no part."""
    chosen_TM = logits_TE.gather(1, expert_ids_TM.clamp(min=0))
    chosen_TM = chosen_TM.masked_fill(expert_ids_TM < 0, -torch.inf)
    is_closed_T1 = chosen_TM.amax(-1, keepdim=True) == -torch.inf
    return torch.softmax(chosen_TM.masked_fill(is_closed_T1, 0.0), dim=-1) * settings.scaling_factor


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)). torch's own says x from 20 on, which is 1e-10 off."""
    return torch.nn.functional.softplus(x, threshold=50.0)
