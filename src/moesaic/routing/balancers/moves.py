"""What moves once an optimizer step, by what was chosen in all of it: no gradient reaches these.

E experts, K choices a token.
"""

from typing import Literal

import torch
from torch import Tensor

from moesaic.config.router import ReluSettings

BiasRule = Literal["sign", "proportional"]


@torch.no_grad()
def update_selection_bias(
    selection_bias_E: Tensor, counts_E: Tensor, rate: float, *, rule: BiasRule = "sign", centered: bool = False
) -> None:
    """Move a selection bias in place: up below the mean load, down above (arXiv:2408.15664, alg. 1).

    "sign": by `rate`, whatever the distance. "proportional": by rate * (mean - c) / mean. The paper's variant has no
    division; that by the mean is ours, and makes one rate fit any batch. centered: the mean of the move is taken off
    it, so that biases do not drift together.
    `counts_E` are the choices of one whole optimizer step, before any capacity, over all micro-batches and ranks.
    Nothing moves where nothing was chosen.
    """
    counts_E = counts_E.double()
    mean = counts_E.mean()
    distance_E = (mean - counts_E).to(selection_bias_E.device)
    least = torch.finfo(torch.float64).tiny  # of a step in which nothing was chosen, where all distances are 0
    move_E = torch.sign(distance_E) if rule == "sign" else distance_E / mean.clamp(min=least)
    if centered:
        move_E = move_E - move_E.mean()
    selection_bias_E += (rate * move_E).to(selection_bias_E.dtype)


@torch.no_grad()
def move_penalty(penalty: Tensor, counts_E: Tensor, num_tokens: int, top_k: int, settings: ReluSettings) -> None:
    """Multiply a ReLU router's penalty by its factor while tokens use more than K experts on average, else divide it.

    In place (ReMoE, arXiv:2412.14711: lambda * factor^sign(target - sparsity)); on target, or without any token, it
    stays.
    """
    excess = float(counts_E.sum()) - top_k * num_tokens
    if excess:
        penalty *= settings.factor if excess > 0 else 1 / settings.factor
