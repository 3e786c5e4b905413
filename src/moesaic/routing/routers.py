"""The ways to choose experts. Selection (which) and weighting (how much) are separate: a bias may move the first only.

T tokens, E experts, K choices a token. All arithmetic is in fp32; ties go to the lower expert id.
"""

from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic.config import RouterConfig
from moesaic.kernels import ops
from moesaic.registry import Registry


class RouterInput(NamedTuple):
    """What a router may look at. `selection_bias_E` takes part in choosing only; `token_ids_T` serves look-ups.

    dictated_TK: experts already chosen, for the router to weigh only; -1 where a token (padding) has none.
    """

    logits_TE: Tensor
    token_ids_T: Tensor | None = None
    selection_bias_E: Tensor | None = None
    dictated_TK: Tensor | None = None


class Choice(NamedTuple):
    """A router's answer: `scores_TE` is its unbiased score of every expert, for balancers and telemetry."""

    expert_ids_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor
    weight_on: Literal["output", "input"] = "output"


class Router(Protocol):
    """Logits in, a choice of experts and their weights out."""

    def __call__(self, seen: RouterInput, settings: RouterConfig) -> Choice: ...


ROUTERS: Registry[Router] = Registry("router")


@ROUTERS.register("softmax_topk")
def softmax_topk(seen: RouterInput, settings: RouterConfig) -> Choice:
    """Softmax over all experts, then the K largest (Mixtral arXiv:2401.04088 sec. 2.1; Qwen3).

    p = softmax(z); choose top-K of p + b; g = p[chosen], divided by their sum if renormalize, times the scaling factor.
    """
    return _choose_topk(torch.softmax(seen.logits_TE, dim=-1), seen, settings, tiny=0.0)


@ROUTERS.register("sigmoid_topk")
def sigmoid_topk(seen: RouterInput, settings: RouterConfig) -> Choice:
    """Independent sigmoid scores, then the K largest (DeepSeek-V3 arXiv:2412.19437 eqs. 12-16, without groups).

    s = sigmoid(z); choose top-K of s + b; g = s[chosen] / (their sum + 1e-20) if renormalize, times the scaling factor.
    """
    return _choose_topk(torch.sigmoid(seen.logits_TE), seen, settings, tiny=1e-20)


def _choose_topk(scores_TE: Tensor, seen: RouterInput, settings: RouterConfig, tiny: float) -> Choice:
    expert_ids_TK = _select(scores_TE.detach(), seen, settings.top_k)
    weights_TK = scores_TE.gather(1, expert_ids_TK)
    if settings.renormalize:
        weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + tiny)
    if settings.scaling_factor != 1.0:
        weights_TK = weights_TK * settings.scaling_factor
    return Choice(expert_ids_TK, weights_TK, scores_TE)


def _select(scores_TE: Tensor, seen: RouterInput, top_k: int) -> Tensor:
    if seen.dictated_TK is not None:
        # A token without experts (padding) weighs its best one K times: finite, and read by no row.
        return torch.where(seen.dictated_TK < 0, scores_TE.argmax(-1, keepdim=True), seen.dictated_TK)
    biased_TE = scores_TE if seen.selection_bias_E is None else scores_TE + seen.selection_bias_E
    return ops.select_topk(biased_TE, top_k)
