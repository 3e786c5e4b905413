"""What training minimises: the next token's cross-entropy, and the balance of the experts.

B batch, S sequence, V vocab.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingDecision, RoutingTape
from moesaic.routing.balancers import mean_over_layers


class Losses(NamedTuple):
    """`total` is what is minimised: cross_entropy (nats a token) plus each balance loss times its coefficient."""

    total: Tensor
    cross_entropy: Tensor
    balance: dict[str, Tensor]


def losses(
    model: Decoder,
    inputs_BS: Tensor,
    targets_BS: Tensor,
    balance_losses: Sequence[tuple[str, float]],
    tape: RoutingTape,
) -> Losses:
    """One batch's losses. Each balance loss is computed per layer and averaged over layers; `tape` hears the routing."""
    logits_BSV = model(inputs_BS, tape=tape)
    cross_entropy = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())
    balance = _balance(balance_losses, list(tape.decisions.values()))
    total = cross_entropy
    for name, coefficient in balance_losses:
        if name in balance:
            total = total + coefficient * balance[name]
    return Losses(total, cross_entropy, balance)


def _balance(balance_losses: Sequence[tuple[str, float]], decisions: list[RoutingDecision]) -> dict[str, Tensor]:
    """Nothing for a dense model: it has no decisions."""
    if not decisions:
        return {}
    return {name: mean_over_layers(name, decisions) for name, _ in balance_losses}
