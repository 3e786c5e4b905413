"""What training minimises: the next token's cross-entropy, and the balance of the experts.

B batch, S sequence, T tokens, N rows of a chunk, D hidden, V vocab.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moesaic.config import ModelConfig, MoeConfig
from moesaic.config.router import RouterConfig
from moesaic.kernels import ops
from moesaic.layers.moe import MoeLayer
from moesaic.models.build import Model
from moesaic.models.decoder import Decoder
from moesaic.routing import RoutingDecision, RoutingTape
from moesaic.routing.balancers import BALANCE_LOSSES, BalanceLoss
from moesaic.train.counts import StepCounts
from moesaic.train.further_tokens import hidden_and_targets
from moesaic.train.gradients import add_gradient, has_buffer
from moesaic.train.micro_batches import Source

# Logits in memory at a time (16 MiB in fp32). But never fewer rows than D: the head's gradient is read and written once
# for every chunk of rows, which only that many multiplications make cheap, and their logits are no larger than it.
LOGITS_AT_ONCE = 2**22
LOGITS_AT_ONCE_ON_GPU = 2**26  # no cache to stay in, and small products leave most of a GPU idle
VOCABULARY_BLOCK = 1024


class _LinearCrossEntropy(torch.autograd.Function):
    """Logits of a few rows at a time: all of them would be the largest tensor of a step, read and written many times.

    The gradient is computed with the loss, while the logits are there, and scaled in backward.

    bf16: products are summed in fp32 and rounded once; softmax, loss and sums over chunks are in fp32. What is lost is
    in the logits, 2^-9 of their size at most, differently for every token (torch has no product of bf16 matrices with
    an fp32 result on CPUs), and in their gradient, 2^-9 of each number.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, bias_V: Tensor | None) -> Tensor:
        """The mean loss of the targets that are not negative; its gradients are computed here, too."""
        ctx.weight, ctx.num_targets = weight_VD, max(1, int((targets_T >= 0).sum()))
        wants_grad = any(ctx.needs_input_grad)
        num_rows = _rows_at_once(len(x_TD), x_TD.shape[1], len(weight_VD), x_TD.is_cuda)
        logits_NV = x_TD.new_empty(num_rows, len(weight_VD))
        wide_type = torch.promote_types(x_TD.dtype, torch.float32)
        dx_TD = torch.empty_like(x_TD) if wants_grad else None
        dw_VD, db_V = None, None
        loss = x_TD.new_zeros((), dtype=wide_type)
        for start in range(0, len(x_TD), num_rows):
            x_ND, targets_N = x_TD[start : start + num_rows], targets_T[start : start + num_rows]
            logits = logits_NV[: len(x_ND)]
            if bias_V is None:
                torch.mm(x_ND, weight_VD.T, out=logits)
            else:
                torch.addmm(bias_V, x_ND, weight_VD.T, out=logits)
            loss += ops.cross_entropy_(logits, targets_N).sum()
            if dx_TD is not None:
                torch.mm(logits, weight_VD, out=dx_TD[start : start + num_rows])
                dw_VD = logits.T @ x_ND if dw_VD is None else _plus_product(dw_VD.to(wide_type), logits.T, x_ND)
                if bias_V is not None:
                    part_V = logits.sum(0, dtype=wide_type)
                    db_V = part_V if db_V is None else db_V + part_V
        ctx.save_for_backward(dx_TD, dw_VD, db_V)
        ctx.bias_type = None if bias_V is None else bias_V.dtype
        return loss / ctx.num_targets

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  as the decorator types it
        ctx: Any, *d_loss: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
        dx_TD, dw_VD, db_V = ctx.saved_tensors
        scale = d_loss[0] / ctx.num_targets
        if dw_VD is None:  # no tokens at all
            no_bias = None if ctx.bias_type is None else ctx.weight.new_zeros(len(ctx.weight), dtype=ctx.bias_type)
            return torch.zeros_like(dx_TD), torch.zeros_like(ctx.weight), None, no_bias
        dx_TD = (dx_TD * scale).to(dx_TD.dtype) if ctx.needs_input_grad[0] else None
        db_V = (db_V * scale).to(ctx.bias_type) if ctx.needs_input_grad[3] else None
        if not ctx.needs_input_grad[1]:
            return dx_TD, None, None, db_V
        if has_buffer(ctx.weight):
            add_gradient(ctx.weight, dw_VD, scale)
            return dx_TD, None, None, db_V
        return dx_TD, (dw_VD * scale).to(ctx.weight.dtype), None, db_V


def _rows_at_once(num_tokens: int, hidden_size: int, vocab_size: int, on_gpu: bool = False) -> int:
    """Rows of a chunk: as many chunks as must be, equally long, so that no short one wastes a pass."""
    most = max(hidden_size, (LOGITS_AT_ONCE_ON_GPU if on_gpu else LOGITS_AT_ONCE) // vocab_size)
    num_chunks = max(1, -(-num_tokens // most))
    return max(1, -(-num_tokens // num_chunks))


def _plus_product(total_VD: Tensor, left_VN: Tensor, right_ND: Tensor) -> Tensor:
    """total + left @ right, in place. Narrow products are added block by block, to widen them in the cache."""
    if total_VD.dtype == left_VN.dtype:
        return total_VD.addmm_(left_VN, right_ND)
    for total, left in zip(total_VD.split(VOCABULARY_BLOCK), left_VN.split(VOCABULARY_BLOCK), strict=True):
        total += left @ right_ND
    return total_VD


def linear_cross_entropy(x_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, bias_V: Tensor | None = None) -> Tensor:
    """The mean cross-entropy of x @ weight.T + bias over the targets that are not negative, in nats, in fp32 or wider.

    As torch.nn.functional.cross_entropy gives it; without any target it is 0, with zero gradients.
    """
    return _LinearCrossEntropy.apply(x_TD, weight_VD, targets_T, bias_V)  # pyright: ignore[reportReturnType]


class Losses(NamedTuple):
    """cross_entropy: nats a target. penalty: the sum of the balance losses times their coefficients.

    balance: each balance loss, the mean of the layers'. mtp: of each layer that predicts further tokens, its summed
    cross-entropy over the number of the model's own targets (DeepSeek-V3, arXiv:2412.19437, eq. 24).
    prediction: cross_entropy, and the mean of `mtp` times its coefficient (eq. 25).
    """

    cross_entropy: Tensor
    penalty: Tensor
    balance: dict[str, Tensor]
    mtp: tuple[Tensor, ...]
    prediction: Tensor

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.prediction + self.penalty


def losses(
    model: Model,
    inputs_BS: Tensor,
    targets_BS: Tensor,
    balance_losses: Sequence[tuple[str, float]],
    tape: RoutingTape,
    *,
    mask_BS: Tensor | None = None,
    document_ids_BS: Tensor | None = None,
    source: Source | None = None,
    mtp_coefficient: float = 0.0,
    carried: Callable[..., Tensor] | None = None,
    counts: StepCounts | None = None,
    shares: Sequence[float] | None = None,
) -> Losses:
    """One batch's losses; each balance loss is computed per layer, then averaged. `tape` hears the routing.

    mask_BS: true where there is a token; None when everywhere. source: what an encoder-decoder reads.
    mtp_coefficient: of the layers that predict further tokens, which do not run at 0. carried: stands for
    `model.carried` (a compiled one).
    counts: of the step that this batch is a part of; it is added to them. None: the batch is the whole step.
    shares: the part of the step's tokens that each layer sees in this batch, by which its balance losses count.
    """
    beside: dict[str, Any] = {"document_ids_BS": document_ids_BS} if source is None else source._asdict()
    h_0 = (carried or model.carried)(inputs_BS, mask_BS, tape=tape, **beside)
    x_TD, targets_T = model.before_head(h_0).flatten(0, 1), targets_BS.flatten()
    cross_entropy = linear_cross_entropy(x_TD, model.head_weight, targets_T, model.head_bias)
    mtp, prediction = [], cross_entropy
    if mtp_coefficient and isinstance(model, Decoder):
        places = {"mask_BS": mask_BS, "document_ids_BS": document_ids_BS}
        for ahead in hidden_and_targets(model, h_0, inputs_BS, targets_BS, tape, **places):
            mtp.append(_further_cross_entropy(model, *ahead, num_targets=int((targets_T >= 0).sum())))
            prediction = prediction + mtp[-1] * (mtp_coefficient / len(model.mtp))
    counts = counts or StepCounts()
    counts.add(tape.decisions)
    penalty, balance = torch.zeros_like(cross_entropy), {}
    for name, coefficient in balance_losses if tape.decisions else ():
        loss = BALANCE_LOSSES[name]
        by_layer = _by_layer(loss, model.config, tape.decisions, counts, shares)
        balance[name] = torch.stack(list(by_layer.values())).mean()
        if coefficient:
            penalty = penalty + coefficient * _mean_times_own(loss, model, by_layer)
    return Losses(cross_entropy, penalty, balance, tuple(mtp), prediction)


def _further_cross_entropy(model: Decoder, ahead_BSD: Tensor, targets_BS: Tensor, *, num_targets: int) -> Tensor:
    """Summed over a further layer's targets, over the number of the model's own."""
    targets_T = targets_BS.flatten()
    mean = linear_cross_entropy(ahead_BSD.flatten(0, 1), model.head_weight, targets_T, model.head_bias)
    return mean * ((targets_T >= 0).sum() / max(1, num_targets))


def _by_layer(
    loss: BalanceLoss,
    config: ModelConfig,
    decisions: Mapping[int, RoutingDecision],
    counts: StepCounts,
    shares: Sequence[float] | None,
) -> dict[int, Tensor]:
    """The loss of each layer that takes it, times the layer's share."""
    routers = routers_of(config)
    return {
        layer: loss.of(decision, counts.of(loss.scope, layer)) * (1.0 if shares is None else shares[layer])
        for layer, decision in decisions.items()
        if loss.refusal(routers[layer]) is None
    }


def _mean_times_own(loss: BalanceLoss, model: Model, by_layer: Mapping[int, Tensor]) -> Tensor:
    """The mean over layers, each times its own coefficient where it has one."""
    if not loss.own_coefficient:
        return torch.stack(list(by_layer.values())).mean()
    own = penalties(model)
    return torch.stack([own[layer].to(value) * value for layer, value in by_layer.items()]).mean()


def routers_of(config: ModelConfig) -> dict[int, RouterConfig]:
    """The routers of a model, by the number of the layer."""
    parts = {index: layer.feed_forward for index, layer in enumerate(config.every_layer)}
    return {index: part.router for index, part in parts.items() if isinstance(part, MoeConfig)}


def penalties(model: Model) -> dict[int, Tensor]:
    """The coefficients that ReLU routers keep for themselves, by layer; the very buffers."""
    layers = [module for module in model.modules() if isinstance(module, MoeLayer)]
    return {
        layer.layer: layer.router.get_buffer("penalty_coefficient")
        for layer in layers
        if layer.router.config.name == "relu"
    }
