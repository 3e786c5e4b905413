"""The hot operations as torch sees them: registered operators with shapes for tracing, and gradients.

T tokens, R rows sorted by expert, E experts, K choices, I inputs, O outputs, D hidden.

Where nothing is traced and no gradient is wanted, a call goes straight to the backend: a registered operator costs
tens of microseconds a call, which decoding one token would feel. Everything else (training, torch.compile, tensors
that are not plain ones on CPU or GPU) goes through the registered operators.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from moesaic.kernels import backend
from moesaic.kernels.adam import AdamStep

_PLAIN = (Tensor, Parameter)


def _direct(*inputs: Tensor) -> bool:
    """Whether the backend may be called without torch's dispatcher in between."""
    if torch.compiler.is_compiling():
        return False
    wants_grad = torch.is_grad_enabled()
    for tensor in inputs:
        if type(tensor) not in _PLAIN or not (tensor.is_cpu or tensor.is_cuda):
            return False
        if wants_grad and tensor.requires_grad:
            return False
    return True


def select_topk(scores_TE: Tensor, top_k: int) -> Tensor:
    """Ids of each token's `top_k` best experts, best first; among equals the lower id wins. int64 [T, K].

    Has no gradient: weights are read from the scores at these ids.
    """
    scores_TE = scores_TE.detach()
    return backend.of(scores_TE).select_topk(scores_TE, top_k) if _direct(scores_TE) else _select_topk(scores_TE, top_k)


def sort_rows(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token_ids_R, choice_R, offsets): the pairs (token, choice) sorted by expert, stably. Expert -1 means no row.

    offsets is int64 [E+1] on the CPU: expert e owns rows offsets[e] to offsets[e+1].
    """
    if _direct(expert_ids_TK):
        return backend.of(expert_ids_TK).sort_rows(expert_ids_TK, num_experts)
    return _sort_rows(expert_ids_TK, num_experts)


def gather_rows(x_TD: Tensor, token_ids_R: Tensor, row_ids_R: Tensor, token_offsets: Tensor) -> Tensor:
    """x_RD: each row's token. `row_ids_R` and `token_offsets` (see Rows.by_token) order the sums of the gradient."""
    if _direct(x_TD, token_ids_R):
        return backend.of(x_TD).gather_rows(x_TD, token_ids_R)
    return _gather_rows(x_TD, token_ids_R, row_ids_R, token_offsets)


def combine_rows(
    out_RD: Tensor, weights_R: Tensor, row_ids_R: Tensor, token_offsets: Tensor, token_ids_R: Tensor
) -> Tensor:
    """y_TD: each token's rows, times their weights, summed in the order of `row_ids_R` (see Rows.by_token).

    Gradients reach `out_RD` and `weights_R`; `token_ids_R` is what they need to find their tokens.
    """
    if _direct(out_RD, weights_R):
        return backend.of(out_RD).combine_rows(out_RD, weights_R, row_ids_R, token_offsets)
    return _combine_rows(out_RD, weights_R, row_ids_R, token_offsets, token_ids_R)


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, offsets: Tensor) -> Tensor:
    """y_RO: each expert's rows times its own matrix, x @ W[e].T. `offsets` is int64 [E+1] on the CPU.

    Weights in bf16 beside rows in fp32 (on the CPU, without gradients) are widened in passing, which is exact: the
    result is that of the same values in fp32, bit for bit where our own kernels multiply, for half the reading.
    grouped_gated takes them, too.

    A weight with an attribute `grad_buffer` (fp32, of its shape) gets its gradient there, unrounded, and none from
    autograd: written where `grad_buffer_fresh` is true, which is then set to false, else added to what is there. The
    same holds for grouped_gated. Compiled graphs do not see the attribute and return the gradient as usual.
    """
    if _direct(x_RI, weight_EOI):
        return backend.of(x_RI).grouped_linear(x_RI, weight_EOI, offsets)
    return _grouped_linear(x_RI, weight_EOI, offsets)


def grouped_gated(x_RI: Tensor, gate_up_EGI: Tensor, offsets: Tensor) -> Tensor:
    """y_RF: silu_mul(grouped_linear(x, gate_up)), the activation applied while the product is in cache.

    `gate_up_EGI` holds each expert's gate rows, then its up rows, F each (SwiGLU, arXiv:2002.05202, eq. 6).
    """
    if _direct(x_RI, gate_up_EGI):
        return backend.of(x_RI).grouped_gated(x_RI, gate_up_EGI, offsets)[0]
    return _grouped_gated(x_RI, gate_up_EGI, offsets)[0]


def silu_mul(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where the last dimension holds gate then up, F each (SwiGLU, arXiv:2002.05202, eq. 6)."""
    return backend.of(gate_up).silu_mul(gate_up) if _direct(gate_up) else _silu_mul(gate_up)


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """losses_N, in at least fp32; the logits become the gradient of their sum. A negative target does not count.

    Has no gradient: it is the gradient. For use inside an autograd function.
    """
    return backend.of(logits_NV).cross_entropy_(logits_NV, targets_N)


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    step: AdamStep,
    *,
    rounded: Tensor | None = None,
    average: Tensor | None = None,
) -> None:
    """Move an fp32 weight and its two moments in place by AdamW (arXiv:1711.05101, alg. 2), in one pass over memory.

    Where given, `rounded` becomes the moved weight in its own dtype and `average` takes it in. Has no gradient.
    """
    backend.of(weight).adamw_(weight, gradient, moments, step, rounded=rounded, average=average)


def rotate(x_BSHA: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(x1 cos - x2 sin, x2 cos + x1 sin) of each head's halves x1, x2; cos and sin are [B or 1, S, 1, A]."""
    return backend.of(x_BSHA).rotate(x_BSHA, cos, sin) if _direct(x_BSHA) else _rotate(x_BSHA, cos, sin, 1.0)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 (arXiv:1910.07467, eq. 4)."""
    if _direct(x, weight):
        return backend.of(x).rms_norm(x, weight, eps)[0]
    return _rms_norm(x, weight, eps)[0]


@torch.library.custom_op("moesaic::select_topk", mutates_args=())
def _select_topk(scores_TE: Tensor, top_k: int) -> Tensor:
    return backend.of(scores_TE).select_topk(scores_TE, top_k)


@_select_topk.register_fake
def _(scores_TE: Tensor, top_k: int) -> Tensor:
    return scores_TE.new_empty(scores_TE.shape[0], top_k, dtype=torch.int64)


@torch.library.custom_op("moesaic::sort_rows", mutates_args=())
def _sort_rows(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return backend.of(expert_ids_TK).sort_rows(expert_ids_TK, num_experts)


@_sort_rows.register_fake
def _(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    num_rows = torch.library.get_ctx().new_dynamic_size()
    token_ids_R = expert_ids_TK.new_empty(num_rows, dtype=torch.int64)
    offsets = torch.empty(num_experts + 1, dtype=torch.int64, device="cpu")
    return token_ids_R, torch.empty_like(token_ids_R), offsets


@torch.library.custom_op("moesaic::gather_rows", mutates_args=())
def _gather_rows(x_TD: Tensor, token_ids_R: Tensor, row_ids_R: Tensor, token_offsets: Tensor) -> Tensor:
    return backend.of(x_TD).gather_rows(x_TD, token_ids_R)


@_gather_rows.register_fake
def _(x_TD: Tensor, token_ids_R: Tensor, row_ids_R: Tensor, token_offsets: Tensor) -> Tensor:
    return x_TD.new_empty(token_ids_R.shape[0], x_TD.shape[1])


def _keep_gather(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, token_ids_R, row_ids_R, token_offsets = inputs
    ctx.save_for_backward(token_ids_R, row_ids_R, token_offsets)


def _gather_backward(ctx: Any, dx_RD: Tensor) -> tuple[Tensor | None, ...]:
    token_ids_R, row_ids_R, token_offsets = ctx.saved_tensors
    ones_R = dx_RD.new_ones(dx_RD.shape[0], dtype=_weight_dtype(dx_RD.dtype))
    return _combine_rows(dx_RD.contiguous(), ones_R, row_ids_R, token_offsets, token_ids_R), None, None, None


def _weight_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32 for narrow rows, so that their sum is not rounded at each addend."""
    return torch.promote_types(dtype, torch.float32)


torch.library.register_autograd("moesaic::gather_rows", _gather_backward, setup_context=_keep_gather)


@torch.library.custom_op("moesaic::combine_rows", mutates_args=())
def _combine_rows(
    out_RD: Tensor, weights_R: Tensor, row_ids_R: Tensor, token_offsets: Tensor, token_ids_R: Tensor
) -> Tensor:
    return backend.of(out_RD).combine_rows(out_RD, weights_R, row_ids_R, token_offsets)


@_combine_rows.register_fake
def _(out_RD: Tensor, weights_R: Tensor, row_ids_R: Tensor, token_offsets: Tensor, token_ids_R: Tensor) -> Tensor:
    return out_RD.new_empty(token_offsets.shape[0] - 1, out_RD.shape[1])


@torch.library.custom_op("moesaic::combine_rows_grad", mutates_args=())
def _combine_rows_grad(dy_TD: Tensor, out_RD: Tensor, weights_R: Tensor, token_ids_R: Tensor) -> tuple[Tensor, Tensor]:
    return backend.of(dy_TD).combine_rows_grad(dy_TD, out_RD, weights_R, token_ids_R)


@_combine_rows_grad.register_fake
def _(dy_TD: Tensor, out_RD: Tensor, weights_R: Tensor, token_ids_R: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(out_RD), torch.empty_like(weights_R)


def _keep_combine(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    out_RD, weights_R, _, _, token_ids_R = inputs
    ctx.save_for_backward(out_RD, weights_R, token_ids_R)


def _combine_backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor | None, ...]:
    d_out_RD, d_weights_R = _combine_rows_grad(dy_TD.contiguous(), *ctx.saved_tensors)
    return d_out_RD, d_weights_R, None, None, None


torch.library.register_autograd("moesaic::combine_rows", _combine_backward, setup_context=_keep_combine)


@torch.library.custom_op("moesaic::grouped_linear", mutates_args=())
def _grouped_linear(x_RI: Tensor, weight_EOI: Tensor, offsets: Tensor) -> Tensor:
    return backend.of(x_RI).grouped_linear(x_RI, weight_EOI, offsets)


@_grouped_linear.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, offsets: Tensor) -> Tensor:
    return x_RI.new_empty(x_RI.shape[0], weight_EOI.shape[1])


@torch.library.custom_op("moesaic::grouped_linear_input_grad", mutates_args=())
def _grouped_linear_input_grad(dy_RO: Tensor, weight_EOI: Tensor, offsets: Tensor) -> Tensor:
    return backend.of(dy_RO).grouped_linear_input_grad(dy_RO, weight_EOI, offsets)


@_grouped_linear_input_grad.register_fake
def _(dy_RO: Tensor, weight_EOI: Tensor, offsets: Tensor) -> Tensor:
    return dy_RO.new_empty(dy_RO.shape[0], weight_EOI.shape[2])


@torch.library.custom_op("moesaic::grouped_linear_weight_grad", mutates_args=())
def _grouped_linear_weight_grad(dy_RO: Tensor, x_RI: Tensor, offsets: Tensor) -> Tensor:
    return backend.of(dy_RO).grouped_linear_weight_grad(dy_RO, x_RI, offsets)


@_grouped_linear_weight_grad.register_fake
def _(dy_RO: Tensor, x_RI: Tensor, offsets: Tensor) -> Tensor:
    return dy_RO.new_empty(offsets.shape[0] - 1, dy_RO.shape[1], x_RI.shape[1])


@torch.library.custom_op("moesaic::add_grouped_linear_weight_grad", mutates_args=("sum_EOI",))
def _add_grouped_linear_weight_grad(
    dy_RO: Tensor, x_RI: Tensor, offsets: Tensor, sum_EOI: Tensor, accumulate: bool
) -> None:
    backend.of(dy_RO).add_grouped_linear_weight_grad(dy_RO, x_RI, offsets, sum_EOI, accumulate)


@_add_grouped_linear_weight_grad.register_fake
def _(dy_RO: Tensor, x_RI: Tensor, offsets: Tensor, sum_EOI: Tensor, accumulate: bool) -> None:
    return None


def _keep_product(ctx: Any, x_RI: Tensor, weight_EOI: Tensor, offsets: Tensor, *more: Tensor) -> None:
    ctx.save_for_backward(x_RI, weight_EOI, offsets, *more)
    # Unpacked, a saved tensor may be another object (torch.utils.checkpoint detaches it) without our attribute.
    ctx.parameter = weight_EOI if hasattr(weight_EOI, "grad_buffer") else None


def _product_grads(
    ctx: Any, dy_RO: Tensor, x_RI: Tensor, weight_EOI: Tensor, offsets: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """(dx_RI, dw_EOI) of a grouped product, as far as they are wanted; dw goes to the parameter's buffer, if any."""
    needs_x, needs_weight = ctx.needs_input_grad[:2]
    direct = _direct(dy_RO, x_RI, weight_EOI)
    dx_RI = dw_EOI = None
    if needs_x:
        input_grad = backend.of(dy_RO).grouped_linear_input_grad if direct else _grouped_linear_input_grad
        dx_RI = input_grad(dy_RO, weight_EOI, offsets)
    if needs_weight and ctx.parameter is not None:
        add = backend.of(dy_RO).add_grouped_linear_weight_grad if direct else _add_grouped_linear_weight_grad
        add(dy_RO, x_RI, offsets, ctx.parameter.grad_buffer, not ctx.parameter.grad_buffer_fresh)
        ctx.parameter.grad_buffer_fresh = False
    elif needs_weight:
        weight_grad = backend.of(dy_RO).grouped_linear_weight_grad if direct else _grouped_linear_weight_grad
        dw_EOI = weight_grad(dy_RO, x_RI, offsets)
    return dx_RI, dw_EOI


def _keep_linear(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _keep_product(ctx, *inputs)


def _linear_backward(ctx: Any, dy_RO: Tensor) -> tuple[Tensor | None, ...]:
    return *_product_grads(ctx, dy_RO.contiguous(), *ctx.saved_tensors), None


torch.library.register_autograd("moesaic::grouped_linear", _linear_backward, setup_context=_keep_linear)


@torch.library.custom_op("moesaic::grouped_gated", mutates_args=())
def _grouped_gated(x_RI: Tensor, gate_up_EGI: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    return backend.of(x_RI).grouped_gated(x_RI, gate_up_EGI, offsets)


@_grouped_gated.register_fake
def _(x_RI: Tensor, gate_up_EGI: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    rows, outputs = x_RI.shape[0], gate_up_EGI.shape[1]
    return x_RI.new_empty(rows, outputs // 2), x_RI.new_empty(rows, outputs)


def _keep_gated(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    _keep_product(ctx, *inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros for output[1] would be made, as large as it is


def _gated_backward(ctx: Any, dy_RF: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy_RF is None:
        return None, None, None
    *factors, gate_up_RG = ctx.saved_tensors
    dy_RF = dy_RF.contiguous()
    silu_grad = backend.of(dy_RF).silu_mul_grad if _direct(dy_RF, gate_up_RG) else _silu_mul_grad
    return *_product_grads(ctx, silu_grad(dy_RF, gate_up_RG), *factors), None


torch.library.register_autograd("moesaic::grouped_gated", _gated_backward, setup_context=_keep_gated)


@torch.library.custom_op("moesaic::silu_mul", mutates_args=())
def _silu_mul(gate_up: Tensor) -> Tensor:
    return backend.of(gate_up).silu_mul(gate_up)


@_silu_mul.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op("moesaic::silu_mul_grad", mutates_args=())
def _silu_mul_grad(dy: Tensor, gate_up: Tensor) -> Tensor:
    return backend.of(dy).silu_mul_grad(dy, gate_up)


@_silu_mul_grad.register_fake
def _(dy: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _keep_silu_mul(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _silu_mul_backward(ctx: Any, dy: Tensor) -> Tensor:
    return _silu_mul_grad(dy.contiguous(), ctx.saved_tensors[0])


torch.library.register_autograd("moesaic::silu_mul", _silu_mul_backward, setup_context=_keep_silu_mul)


@torch.library.custom_op("moesaic::rotate", mutates_args=())
def _rotate(x_BSHA: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    return backend.of(x_BSHA).rotate(x_BSHA, cos, sin, sign)


@_rotate.register_fake
def _(x_BSHA: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    return x_BSHA.new_empty(x_BSHA.shape)


def _keep_rotation(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    _, cos, sin, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)


def _rotate_backward(ctx: Any, dy_BSHA: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of a rotation is the rotation back."""
    return _rotate(dy_BSHA, *ctx.saved_tensors, -ctx.sign), None, None, None


torch.library.register_autograd("moesaic::rotate", _rotate_backward, setup_context=_keep_rotation)


@torch.library.custom_op("moesaic::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return backend.of(x).rms_norm(x, weight, eps)


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=_weight_dtype(x.dtype))


@torch.library.custom_op("moesaic::rms_norm_grad", mutates_args=())
def _rms_norm_grad(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return backend.of(dy).rms_norm_grad(dy, x, weight, inverse)


@_rms_norm_grad.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep_rms_norm(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _rms_norm_backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return None, None, None
    x, weight, inverse = ctx.saved_tensors
    return *_rms_norm_grad(dy.contiguous(), x, weight, inverse), None


torch.library.register_autograd("moesaic::rms_norm", _rms_norm_backward, setup_context=_keep_rms_norm)
