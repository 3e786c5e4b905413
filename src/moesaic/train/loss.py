"""What training minimises: the next token's cross-entropy, and the balance of the experts.

B batch, S sequence, T tokens, D hidden, V vocab.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingDecision, RoutingTape
from moesaic.routing.balancers import mean_over_layers

ROWS_AT_ONCE = 512


class _LinearCrossEntropy(torch.autograd.Function):
    """Logits of a few rows at a time: all of them would be the largest tensor of a step, read and written many times.

    The gradient is computed with the loss, while the logits are there, and scaled in backward.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
        num_tokens = max(1, x_TD.shape[0])
        wants_grad = any(ctx.needs_input_grad)
        dx_TD = torch.empty_like(x_TD) if wants_grad else None
        dw_VD = torch.zeros_like(weight_VD) if wants_grad else None
        loss = x_TD.new_zeros((), dtype=torch.promote_types(x_TD.dtype, torch.float32))
        for start in range(0, x_TD.shape[0], ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            targets = targets_T[rows, None]
            logits = (x_TD[rows] @ weight_VD.T).to(loss.dtype)
            normalizer = logits.logsumexp(-1, keepdim=True)
            loss += (normalizer - logits.gather(1, targets)).sum()
            if dx_TD is not None and dw_VD is not None:
                d_logits = logits.sub_(normalizer).exp_()
                d_logits.scatter_add_(1, targets, torch.full_like(normalizer, -1.0))
                d_logits = d_logits.div_(num_tokens).to(x_TD.dtype)
                torch.mm(d_logits, weight_VD, out=dx_TD[rows])
                dw_VD.addmm_(d_logits.T, x_TD[rows])
        ctx.save_for_backward(dx_TD, dw_VD)
        return loss / num_tokens

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[Tensor, Tensor, None]:
        dx_TD, dw_VD = ctx.saved_tensors
        return dx_TD * d_loss[0], dw_VD * d_loss[0], None


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """The mean cross-entropy of x @ weight.T, in nats, as torch.nn.functional.cross_entropy gives it."""
    return _LinearCrossEntropy.apply(x_TD, weight_VD, targets_T)  # pyright: ignore[reportReturnType]


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
    """One batch's losses; each balance loss is computed per layer, then averaged. `tape` hears the routing."""
    hidden_TD = model.hidden(inputs_BS, tape=tape).flatten(0, 1)
    cross_entropy = linear_cross_entropy(hidden_TD, model.head_weight, targets_BS.flatten())
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
