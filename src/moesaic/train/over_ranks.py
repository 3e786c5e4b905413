"""Gradients and statistics over ranks."""

from collections.abc import Iterable

import torch
from torch import Tensor

from moesaic.parallel import Ranks
from moesaic.train.gradients import Gradients, add_gradient, has_buffer
from moesaic.train.precision import Weight


@torch.no_grad()
def sum_gradients(gradients: Gradients, ranks: Ranks) -> None:
    """Add up collected gradients over ranks, in place. A weight without one on any rank keeps none."""
    if ranks.size == 1:
        return
    has_one = torch.tensor([gradients.of(weight) is not None for weight in gradients.weights], dtype=torch.int64)
    for weight, number in zip(gradients.weights, ranks.sum_(has_one).tolist(), strict=True):
        if not number:
            continue
        if gradients.of(weight) is None:  # an expert that no token of this rank reached
            _begin(weight)
        gradient = gradients.of(weight)
        assert gradient is not None
        ranks.sum_(gradient)


@torch.no_grad()
def average_statistics(statistics: Iterable[Tensor], ranks: Ranks) -> None:
    """Give running means and variances the mean of all ranks', in place: ranks that see other tokens stay alike."""
    if ranks.size == 1:
        return
    for tensor in statistics:
        ranks.sum_(tensor).div_(ranks.size)


def _begin(weight: Weight) -> None:
    zeros = torch.zeros_like(weight.parameter)
    if has_buffer(weight.parameter):
        add_gradient(weight.parameter, zeros)
    else:
        weight.parameter.grad = zeros
