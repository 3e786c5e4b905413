"""How often experts were chosen in a step, over micro-batches and ranks: what scopes, biases and penalties count.

E experts.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.parallel import ALONE, Ranks
from moesaic.routing import RoutingDecision
from moesaic.routing.balancers import choice_counts
from moesaic.routing.balancers.counting import num_counted
from moesaic.routing.balancers.loss import Scope


class StepCounts:
    """Choices by layer, fp64 [E] on the CPU, and the tokens that chose there, over all ranks and micro-batches so far.

    whole: the same over the whole step, where a first pass has counted it; else the step is what has been added.
    """

    def __init__(self, ranks: Ranks = ALONE, whole: dict[int, Tensor] | None = None) -> None:
        self.ranks, self.whole = ranks, whole
        self.so_far: dict[int, Tensor] = {}
        self.num_tokens: dict[int, int] = {}

    def add(self, decisions: Mapping[int, RoutingDecision]) -> None:
        """Count one micro-batch, every rank its own: one sum over ranks for all layers."""
        if not decisions:
            return
        counts = [choice_counts(decision) for decision in decisions.values()]
        num_tokens = counts[0].new_tensor([num_counted(decision) for decision in decisions.values()])
        summed = self.ranks.sum_(torch.cat([num_tokens, *counts]))
        num_tokens, *by_layer = summed.split([len(counts), *(counts_E.numel() for counts_E in counts)])
        for layer, number, counts_E in zip(decisions, num_tokens.tolist(), by_layer, strict=True):
            self.num_tokens[layer] = self.num_tokens.get(layer, 0) + int(number)
            self.so_far[layer] = self.so_far[layer] + counts_E if layer in self.so_far else counts_E

    def of(self, scope: Scope, layer: int) -> Tensor:
        """The layer's choices in a scope that is wider than a micro-batch."""
        return self.whole[layer] if scope == "step" and self.whole is not None else self.so_far[layer]
