"""Operations over rows that a GPU does in one pass over its memory, where plain torch takes several. In Triton.

Names, signatures and meaning are those of reference.py; everything is computed in fp32 and rounded once. Importing this
fails where Triton is not installed, and `works` tells whether it can build anything.

T tokens, R rows, D hidden, F expert inner, V vocab, N rows of logits, H heads, A head dim.
"""

# Triton comes with torch for GPUs only, and a kernel of it is launched by a subscript.
# pyright: reportMissingImports=false, reportIndexIssue=false

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_MOST_VOCAB_BLOCK = 4096
_TAYLOR = 0.05  # below it four terms of exp(x) - 1 are exact in fp32


@cache
def works(device: torch.device) -> str | None:
    """None where kernels can be built and run; else what stands in the way (mostly: no C compiler)."""
    try:
        silu_mul(torch.zeros(1, 2, device=device))
    except Exception as error:  # whatever building a kernel may raise
        return str(error).splitlines()[0] if str(error) else repr(error)
    return None


@triton.jit
def _silu_mul(gate_up, y, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    gate = tl.load(gate_up + row * 2 * width + cols, mask=inside).to(tl.float32)
    up = tl.load(gate_up + row * 2 * width + width + cols, mask=inside).to(tl.float32)
    tl.store(y + row * width + cols, (gate * tl.sigmoid(gate) * up).to(y.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See reference.silu_mul."""
    width = gate_up.shape[-1] // 2
    gate_up, y = gate_up.contiguous(), gate_up.new_empty(*gate_up.shape[:-1], width)
    if y.numel():
        block = _block(width)
        _silu_mul[(y.numel() // width, triton.cdiv(width, block))](gate_up, y, width, BLOCK=block)
    return y


@triton.jit
def _silu_mul_grad(dy, gate_up, d_gate_up, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside, at = cols < width, row * 2 * width + cols
    slope = tl.load(dy + row * width + cols, mask=inside).to(tl.float32)
    gate = tl.load(gate_up + at, mask=inside).to(tl.float32)
    up = tl.load(gate_up + at + width, mask=inside).to(tl.float32)
    share = tl.sigmoid(gate)
    d_gate = slope * up * share * (1 + gate * (1 - share))
    tl.store(d_gate_up + at, d_gate.to(d_gate_up.dtype.element_ty), mask=inside)
    tl.store(d_gate_up + at + width, (slope * gate * share).to(d_gate_up.dtype.element_ty), mask=inside)


def silu_mul_grad(dy: Tensor, gate_up: Tensor) -> Tensor:
    """See reference.silu_mul_grad."""
    dy, gate_up, width = dy.contiguous(), gate_up.contiguous(), dy.shape[-1]
    d_gate_up = torch.empty_like(gate_up)
    if dy.numel():
        block = _block(width)
        grid = (dy.numel() // width, triton.cdiv(width, block))
        _silu_mul_grad[grid](dy, gate_up, d_gate_up, width, BLOCK=block)
    return d_gate_up


@triton.jit
def _combine_rows(out, weights, row_ids, token_offsets, y, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cols < width
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for place in range(tl.load(token_offsets + token), tl.load(token_offsets + token + 1)):
        row = tl.load(row_ids + place)
        values = tl.load(out + row * width + cols, mask=inside).to(tl.float32)
        total += values * tl.load(weights + row).to(tl.float32)
    tl.store(y + token * width + cols, total.to(y.dtype.element_ty), mask=inside)


def combine_rows(out_RD: Tensor, weights_R: Tensor, row_ids_R: Tensor, token_offsets: Tensor) -> Tensor:
    """See reference.combine_rows: a token's rows are added up in the order of `row_ids_R`."""
    out_RD, width = out_RD.contiguous(), out_RD.shape[1]
    y_TD = out_RD.new_empty(len(token_offsets) - 1, width)
    if y_TD.numel():
        block = _block(width)
        inputs = (out_RD, weights_R.contiguous(), row_ids_R.contiguous(), token_offsets.contiguous())
        _combine_rows[(len(y_TD), triton.cdiv(width, block))](*inputs, y_TD, width, BLOCK=block)
    return y_TD


@triton.jit
def _combine_rows_grad(dy, out, weights, token_ids, d_out, d_weights, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token, weight = tl.load(token_ids + row), tl.load(weights + row).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        inside = cols < width
        slope = tl.load(dy + token * width + cols, mask=inside, other=0.0).to(tl.float32)
        total += slope * tl.load(out + row * width + cols, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_out + row * width + cols, (slope * weight).to(d_out.dtype.element_ty), mask=inside)
    tl.store(d_weights + row, tl.sum(total, 0).to(d_weights.dtype.element_ty))


def combine_rows_grad(dy_TD: Tensor, out_RD: Tensor, weights_R: Tensor, token_ids_R: Tensor) -> tuple[Tensor, Tensor]:
    """See reference.combine_rows_grad."""
    dy_TD, out_RD, weights_R = dy_TD.contiguous(), out_RD.contiguous(), weights_R.contiguous()
    d_out_RD, d_weights_R = torch.empty_like(out_RD), torch.zeros_like(weights_R)
    if out_RD.numel():
        inputs, width = (dy_TD, out_RD, weights_R, token_ids_R.contiguous()), out_RD.shape[1]
        _combine_rows_grad[(len(out_RD),)](*inputs, d_out_RD, d_weights_R, width, BLOCK=_block(width))
    return d_out_RD, d_weights_R


@triton.jit
def _rotate(x, cos, sin, y, num_heads, num_places, sign, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    pairs, heads = tl.arange(0, BLOCK)[None, :], tl.arange(0, HEADS)[:, None]
    turn = (token % num_places) * 2 * HALF + pairs
    cos_first = tl.load(cos + turn, mask=pairs < HALF).to(tl.float32)
    cos_second = tl.load(cos + turn + HALF, mask=pairs < HALF).to(tl.float32)
    sine = tl.load(sin + turn, mask=pairs < HALF).to(tl.float32) * sign
    inside = (heads < num_heads) & (pairs < HALF)
    at = (token * num_heads + heads) * 2 * HALF + pairs
    first, second = tl.load(x + at, mask=inside).to(tl.float32), tl.load(x + at + HALF, mask=inside).to(tl.float32)
    tl.store(y + at, (first * cos_first - second * sine).to(y.dtype.element_ty), mask=inside)
    tl.store(y + at + HALF, (second * cos_second + first * sine).to(y.dtype.element_ty), mask=inside)


def rotate(x_BSHA: Tensor, cos: Tensor, sin: Tensor, sign: float = 1.0) -> Tensor:
    """See reference.rotate."""
    x_BSHA, cos, sin = x_BSHA.contiguous(), cos.contiguous(), sin.contiguous()
    y_BSHA, (num_heads, head_dim) = torch.empty_like(x_BSHA), x_BSHA.shape[2:]
    if y_BSHA.numel():
        num_tokens, num_places = x_BSHA.shape[0] * x_BSHA.shape[1], cos.shape[0] * cos.shape[1]
        sizes = {"HEADS": triton.next_power_of_2(num_heads), "HALF": head_dim // 2}
        block = triton.next_power_of_2(head_dim // 2)
        _rotate[(num_tokens,)](x_BSHA, cos, sin, y_BSHA, num_heads, num_places, sign, **sizes, BLOCK=block)
    return y_BSHA


@triton.jit
def _cross_entropy(logits, targets, losses, width, TAYLOR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * width
    target = tl.load(targets + row)
    counts = target >= 0
    # Before the sums, at which all threads meet: afterwards some of them may have overwritten it.
    at_target = tl.load(logits + tl.maximum(target, 0)).to(tl.float32)
    greatest = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        greatest = tl.maximum(greatest, tl.load(logits + cols, mask=cols < width, other=float("-inf")).to(tl.float32))
    most = tl.max(greatest, 0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        total += tl.exp(tl.load(logits + cols, mask=cols < width, other=float("-inf")).to(tl.float32) - most)
    log_sum = most + tl.log(tl.sum(total, 0))
    for start in range(0, width, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        log_p = tl.load(logits + cols, mask=cols < width, other=float("-inf")).to(tl.float32) - log_sum
        # p - 1 without cancellation where p is near 1
        near = log_p * (1 + log_p / 2 * (1 + log_p / 3 * (1 + log_p / 4)))
        less_one = tl.where(log_p > -TAYLOR, near, tl.exp(log_p) - 1)
        slope = tl.where(counts, tl.where(cols == target, less_one, tl.exp(log_p)), 0.0)
        tl.store(logits + cols, slope.to(logits.dtype.element_ty), mask=cols < width)
    tl.store(losses + row, tl.where(counts, log_sum - at_target, 0.0))


def cross_entropy_(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """See reference.cross_entropy_; the logits' rows must lie without gaps."""
    losses_N = torch.empty(len(targets_N), dtype=torch.float32, device=logits_NV.device)
    if len(targets_N):
        width = logits_NV.shape[1]
        block = min(_MOST_VOCAB_BLOCK, triton.next_power_of_2(width))
        grid = (len(targets_N),)
        _cross_entropy[grid](logits_NV, targets_N.contiguous(), losses_N, width, TAYLOR=_TAYLOR, BLOCK=block)
    return losses_N


def _block(width: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(width))
