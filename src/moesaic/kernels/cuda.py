"""What a GPU computes in another way than reference.py, under its names and signatures; everything else is from there.

Experts' products of bf16 are torch's grouped ones; what goes once over memory is fused.py's, where Triton builds it.
A GPU runs behind the program that feeds it, and stands still while that waits for an answer: nothing here reads a
number back but `sort_rows`, whose offsets everybody needs on the CPU.

T tokens, R rows sorted by expert, E experts, I inputs, O outputs, D hidden.
"""

import math
import sys
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

from moesaic.kernels import reference
from moesaic.kernels.adam import AdamStep
from moesaic.kernels.reference import (
    gather_rows,
    packed_linear,
    select_topk,
)

__all__ = [
    "adamw_",
    "add_grouped_linear_weight_grad",
    "combine_rows",
    "combine_rows_grad",
    "cross_entropy_",
    "gather_rows",
    "grouped_gated",
    "grouped_linear",
    "grouped_linear_input_grad",
    "grouped_linear_weight_grad",
    "packed_linear",
    "rms_norm",
    "rms_norm_grad",
    "rotate",
    "select_topk",
    "silu_mul",
    "silu_mul_grad",
    "sort_rows",
]

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_SLOWDOWN = 2
_WHOLE = 8  # elements of bf16 in the 16 bytes at which rows of a grouped product must begin
_HOPPER = (9, 0)  # before it torch's grouped product is a loop that waits for the offsets


def sort_rows(expert_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See reference.sort_rows. Waits for the GPU once."""
    top_k = expert_ids_TK.shape[1]
    sorted_ids, order = torch.sort(expert_ids_TK.reshape(-1), stable=True)
    experts = torch.arange(num_experts + 1, device=order.device, dtype=sorted_ids.dtype)
    offsets = torch.searchsorted(sorted_ids, experts).cpu()
    num_left_out = int(offsets[0])
    order = order[num_left_out:]
    return order // top_k, order % top_k, offsets - num_left_out


def combine_rows(out_RD: Tensor, weights_R: Tensor, row_ids_R: Tensor, token_offsets: Tensor) -> Tensor:
    """See reference.combine_rows."""
    fused = _fused(out_RD, weights_R)
    if fused is not None:
        return fused.combine_rows(out_RD, weights_R, row_ids_R, token_offsets)
    wide = torch.promote_types(out_RD.dtype, weights_R.dtype)
    weighed_RD = out_RD[row_ids_R].to(wide) * weights_R[row_ids_R, None].to(wide)
    # unsafe: the offsets are not read back to be checked.
    y_TD = torch.segment_reduce(weighed_RD, "sum", offsets=token_offsets, unsafe=True, initial=0)
    return y_TD.to(out_RD.dtype)


def combine_rows_grad(dy_TD: Tensor, out_RD: Tensor, weights_R: Tensor, token_ids_R: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.combine_rows_grad."""
    kernels = _fused(dy_TD, out_RD, weights_R) or reference
    return kernels.combine_rows_grad(dy_TD, out_RD, weights_R, token_ids_R)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See reference.silu_mul."""
    return (_fused(gate_up) or reference).silu_mul(gate_up)


def silu_mul_grad(dy: Tensor, gate_up: Tensor) -> Tensor:
    """See reference.silu_mul_grad."""
    return (_fused(dy, gate_up) or reference).silu_mul_grad(dy, gate_up)


def rotate(x_BSHA: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """See reference.rotate."""
    return (_fused(x_BSHA, cos, sin) or reference).rotate(x_BSHA, cos, sin, sign)


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """See reference.cross_entropy_."""
    kernels = _fused(logits_NV) if logits_NV.is_contiguous() else None
    return (kernels or reference).cross_entropy_(logits_NV, targets_N)


def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, offsets: Tensor) -> Tensor:
    """See reference.grouped_linear. bf16 on Hopper and later in one product; else expert by expert."""
    if not _takes(x_RI, weight_EOI):
        return reference.grouped_linear(x_RI, weight_EOI, offsets)
    product = grouped_mm(_whole(x_RI), _whole(weight_EOI, 2).mT, offs=_ends(offsets, x_RI))
    return _cut(product, weight_EOI.shape[1])


def grouped_linear_input_grad(dy_RO: Tensor, weight_EOI: Tensor, offsets: Tensor) -> Tensor:
    """See reference.grouped_linear_input_grad."""
    if not _takes(dy_RO, weight_EOI):
        return reference.grouped_linear_input_grad(dy_RO, weight_EOI, offsets)
    product = grouped_mm(_whole(dy_RO), _whole(weight_EOI, 2), offs=_ends(offsets, dy_RO))
    return _cut(product, weight_EOI.shape[2])


def grouped_linear_weight_grad(dy_RO: Tensor, x_RI: Tensor, offsets: Tensor) -> Tensor:
    """See reference.grouped_linear_weight_grad."""
    if not _takes(dy_RO, x_RI):
        return reference.grouped_linear_weight_grad(dy_RO, x_RI, offsets)
    dw_EOI = grouped_mm(_whole(dy_RO).mT, _whole(x_RI), offs=_ends(offsets, x_RI))
    without_rows = (offsets.diff() == 0).nonzero()[:, 0].tolist()
    if without_rows:  # the product leaves their memory as it was
        dw_EOI[without_rows] = 0
    return dw_EOI[:, : dy_RO.shape[1], : x_RI.shape[1]].contiguous()


def add_grouped_linear_weight_grad(
    dy_RO: Tensor, x_RI: Tensor, offsets: Tensor, sum_EOI: Tensor, accumulate: bool
) -> None:
    """See reference.add_grouped_linear_weight_grad; but the product of bf16 is rounded to bf16 before it is added."""
    dw_EOI = grouped_linear_weight_grad(dy_RO, x_RI, offsets)
    if accumulate:
        sum_EOI += dw_EOI
    else:
        sum_EOI.copy_(dw_EOI)


def grouped_gated(x_RI: Tensor, gate_up_EGI: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.grouped_gated."""
    gate_up_RG = grouped_linear(x_RI, gate_up_EGI, offsets)
    return silu_mul(gate_up_RG), gate_up_RG


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See reference.rms_norm."""
    if weight.dtype != x.dtype:
        return reference.rms_norm(x, weight, eps)
    y, inverse = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)
    return y, inverse[..., 0]


def rms_norm_grad(dy: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.rms_norm_grad."""
    if weight.dtype != x.dtype:
        return reference.rms_norm_grad(dy, x, weight, inverse)
    dx, d_weight = torch.ops.aten._fused_rms_norm_backward(
        dy, x, x.shape[-1:], inverse[..., None], weight, [True, True]
    )
    return dx, d_weight


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    step: AdamStep,
    *,
    rounded: Tensor | None = None,
    average: Tensor | None = None,
) -> None:
    """See reference.adamw_; the gradient's memory is used up."""
    if step.clip != 1:
        gradient.mul_(step.clip)
    first, second = moments
    # torch's own step corrects both moments by the number of steps. After endless many there is nothing to correct,
    # and what `step` has for it goes into the rate and the small number instead.
    rate = step.rate * step.second_root
    decay = (1 - step.kept) / rate if rate else 0.0
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]  AdamW(fused=True) calls it
        [weight],
        [gradient],
        [first],
        [second],
        [],
        [_endless(weight.device)],
        amsgrad=False,
        beta1=1 - step.fresh1,
        beta2=step.beta2,
        lr=rate,
        weight_decay=decay,
        eps=step.eps * step.second_root,
        maximize=False,
    )
    if rounded is not None:
        rounded.copy_(weight)
    if average is not None:
        average.lerp_(weight, step.newest)


@cache
def _endless(device: torch.device) -> Tensor:
    return torch.full((), math.inf, device=device)


def _fused(*tensors: Tensor) -> Any:
    """The kernels of fused.py; None where they cannot be built, or for numbers wider than they compute with."""
    if any(tensor.dtype not in _NARROW for tensor in tensors) or not tensors[0].is_cuda:
        return None
    return _built(tensors[0].device)


@cache
def _built(device: torch.device) -> Any:
    try:
        fused = import_module("moesaic.kernels.fused")
        why = fused.works(device)
    except ImportError as error:
        fused, why = None, str(error)
    if why is None:
        return fused
    print(
        f"moesaic: Triton builds no kernels here ({why}). Install a C compiler (Debian, Ubuntu: apt install gcc) and "
        f"triton; until then training on {device} takes up to {_SLOWDOWN} times as long",
        file=sys.stderr,
    )
    return None


def _takes(rows: Tensor, others: Tensor) -> bool:
    """Whether torch multiplies these in one go."""
    if rows.dtype != torch.bfloat16 or others.dtype != torch.bfloat16 or not len(rows):
        return False
    return rows.is_cuda and torch.cuda.get_device_capability(rows.device) >= _HOPPER


def _ends(offsets: Tensor, like: Tensor) -> Tensor:
    """Where each expert's rows end, as the product wants it."""
    return offsets[1:].to(torch.int32).to(like.device, non_blocking=True)


def _whole(x: Tensor, dims: int = 1) -> Tensor:
    """With zeros up to a multiple of 16 bytes in the last dimensions, where it has another size; rows without gaps."""
    missing = [-x.shape[-1 - dim] % _WHOLE for dim in range(dims)]
    if any(missing):
        x = pad(x, [each for width in missing for each in (0, width)])
    return x.contiguous()


def _cut(product_RO: Tensor, width: int) -> Tensor:
    return product_RO if product_RO.shape[1] == width else product_RO[:, :width].contiguous()
