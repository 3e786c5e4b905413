"""Routers that draw at random while training, from torch's global generator: recomputation replays its state.

They draw as much when choices are dictated, so that what follows them draws the same numbers.

T tokens, E experts, K choices a token. z are the logits.
"""

import torch
from torch import Tensor

from moesaic.config.router import NoisySettings, RouterConfig, Top2Settings
from moesaic.routing.routers.router import ROUTERS, Choice, RouterInput, select, softplus, weigh, weigh_by_softmax


@ROUTERS.register("noisy_topk")
def noisy_topk(seen: RouterInput, settings: RouterConfig) -> Choice:
    """The K largest of noisy logits, then softmax over these (Shazeer et al., arXiv:1701.06538, eqs. 3-5).

    H = z + N(0, 1) * (softplus(x W_noise) + noise_epsilon) while training, else z; choose the top K of H;
    g = softmax(H[chosen]). Scores are the softmax of all H; H and the noise's standard deviation are handed on.
    """
    own = settings.settings
    assert isinstance(own, NoisySettings)
    noisy_TE, std_TE = seen.logits_TE, None
    if seen.training:
        assert seen.noise_logits_TE is not None, "noisy top-k without the logits of its noise"
        std_TE = softplus(seen.noise_logits_TE) + own.noise_epsilon
        noisy_TE = seen.logits_TE + torch.randn_like(seen.logits_TE) * std_TE
    expert_ids_TK = select(noisy_TE, seen, settings)
    weights_TK = weigh_by_softmax(noisy_TE, expert_ids_TK, settings)
    scores_TE = torch.softmax(noisy_TE, dim=-1)
    return Choice(expert_ids_TK, weights_TK, scores_TE, ranked_TE=noisy_TE, noise_std_TE=std_TE)


@ROUTERS.register("gshard_top2")
def gshard_top2(seen: RouterInput, settings: RouterConfig) -> Choice:
    """The two largest of the softmax, the second of them at random (GShard, arXiv:2006.16668, alg. 1).

    s = softmax(z); g1, g2 = the two largest, divided by their sum. While training, the second stays with probability
    min(1, 2 g2); when it goes, g1 remains as it is. Evaluation keeps both. Other ways to a second: Top2Settings.
    """
    own = settings.settings
    assert isinstance(own, Top2Settings)
    scores_TE = torch.softmax(seen.logits_TE, dim=-1)
    ranked_TE = _second_drawn(scores_TE) if seen.training and own.second == "sampling" else scores_TE
    pair_T2 = select(ranked_TE, seen._replace(dictated_TM=None), settings)
    if seen.dictated_TM is not None:
        pair_T2 = _completed(seen.dictated_TM, pair_T2)
    weights_T2 = weigh(scores_TE, pair_T2, settings)
    if seen.training and own.second == "random":
        share_T = weights_T2.detach()[:, 1] / weights_T2.detach().sum(-1)
        goes_T = torch.rand_like(share_T) >= 2 * share_T
        pair_T2 = torch.stack([pair_T2[:, 0], pair_T2[:, 1].masked_fill(goes_T, -1)], dim=1)
    return Choice(pair_T2, weights_T2, scores_TE)


def _second_drawn(scores_TE: Tensor) -> Tensor:
    """Scores by which the best stays the best, and each other is second as often as its score says (Gumbel noise)."""
    noisy_TE = scores_TE.detach().log() - torch.empty_like(scores_TE).exponential_().log()
    best_T1 = scores_TE.detach().argmax(-1, keepdim=True)
    return noisy_TE.scatter(1, best_T1, torch.inf)


def _completed(dictated_T2: Tensor, best_T2: Tensor) -> Tensor:
    """Dictated pairs in which a second that went is there again: the best expert that is not the first."""
    first_T, second_T = dictated_T2[:, 0], dictated_T2[:, 1]
    best_other_T = torch.where(best_T2[:, 0] == first_T, best_T2[:, 1], best_T2[:, 0])
    return torch.stack([first_T, torch.where(second_T >= 0, second_T, best_other_T)], dim=1)
