"""Rounding weights to whole numbers times a scale, group by group of inputs.

I inputs, G groups.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Bits = Literal[4, 6, 8]
BITS: tuple[Bits, ...] = (4, 8)
"""What models are rounded to; six bits are for the engine's heads, and no file has them."""
Values = Literal["even", "uneven"]
"""What four bits stand for: whole numbers, or the sixteen values of uneven.py."""
GROUP = 32
"""Inputs that share a scale where nobody says how many."""

# Shares of the scale that uses the whole range: a smaller one cuts off the largest weights and steps finer elsewhere.
_SHARES = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)

_ELEMENTS_AT_ONCE = 1 << 18  # of fp32 weights and what is tried on them: what a core's cache holds


class Rounded(NamedTuple):
    """weight ~ values * scales: values int8 [..., I], scales fp16 [..., G]."""

    values: Tensor
    scales: Tensor


def round_to_ints(weight: Tensor, bits: Bits, group: int, *, in_bf16: bool = False) -> Rounded:
    """Weights [..., I] to the nearest whole numbers of `bits` bits, with a scale for each `group` of inputs.

    in_bf16: only such scales as bf16 holds, too, for files that store them so.

    8 bits: -127 to 127, the largest magnitude at an end. 6 and 4 bits: -32 to 31 and -8 to 7, the largest magnitude at
    the lower end (so a scale may be negative); in 4 bits a somewhat smaller scale where the squared error of the group
    is then less.
    """
    inputs = weight.shape[-1]
    groups = -(-inputs // group)
    rows = weight.reshape(-1, inputs)
    values = torch.empty(rows.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(rows), groups, dtype=torch.float16, device=weight.device)
    at_once = max(1, _ELEMENTS_AT_ONCE // max(1, inputs))
    for some in (slice(start, start + at_once) for start in range(0, len(rows), at_once)):
        padded = torch.nn.functional.pad(rows[some].float(), (0, -inputs % group)).unflatten(-1, (groups, group))
        storable = _in_both if in_bf16 else _in_fp16
        own = _whole_range(padded, bits, storable)
        if bits == 4:
            own = _best_of_shares(padded, own, storable)
        values[some] = _nearest(padded, own, bits).to(torch.int8).flatten(1)[:, :inputs]
        scales[some] = own.half()
    return Rounded(values.view_as(weight), scales.view(*weight.shape[:-1], groups))


def dequantized(rounded: Rounded, group: int) -> Tensor:
    """What was rounded to, in fp32."""
    scales = rounded.scales.float().repeat_interleave(group, dim=-1)[..., : rounded.values.shape[-1]]
    return rounded.values.float() * scales


_Storable = Callable[[Tensor], Tensor]


def _whole_range(groups: Tensor, bits: Bits, storable: _Storable) -> Tensor:
    """Scales [..., G] of groups [..., G, group], in fp32 and as they will be stored."""
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
    if bits != 8:
        return storable(largest / _range(bits)[0])
    # A little larger, so that rounding it to fp16 does not put the largest weight out of reach.
    return storable(torch.where(largest == 0, 0.0, largest.abs() / 127 * (1 + 2**-11) + 2**-25))


def _range(bits: Bits) -> tuple[int, int]:
    """The least and the largest number; of eight bits, as many to both sides."""
    end = 1 << (bits - 1)
    return (1 - end if bits == 8 else -end), end - 1


def _in_fp16(scales: Tensor) -> Tensor:
    """Rounded to fp16; what would become infinite is held at its largest number."""
    return scales.clamp(-65504.0, 65504.0).half().float()


def _in_both(scales: Tensor) -> Tensor:
    """Rounded to what fp16 and bf16 both hold."""
    return scales.clamp(-65280.0, 65280.0).bfloat16().half().float()


def _nearest(groups: Tensor, scales: Tensor, bits: Bits, out: Tensor | None = None) -> Tensor:
    inverse = torch.where(scales == 0, 0.0, 1.0 / scales)[..., None]
    return torch.mul(groups, inverse, out=out).round_().clamp_(*_range(bits))


def _best_of_shares(groups: Tensor, scales: Tensor, storable: _Storable) -> Tensor:
    """For each group the scale with the least squared error, among shares of the given one."""
    groups = groups.movedim(-1, 0).contiguous().movedim(0, -1)  # long rows in memory, for speed
    scratch = torch.empty_like(groups)  # fresh memory for each share would cost more than the arithmetic
    best, least = scales, torch.full_like(scales, torch.inf)
    for share in _SHARES:
        tried = storable(scales * share)
        error = _folded(_nearest(groups, tried, 4, scratch).mul_(tried[..., None]).sub_(groups).square_())
        best, least = torch.where(error < least, tried, best), torch.minimum(error, least)
    return best


def _folded(squares: Tensor) -> Tensor:
    """The sum over the last dimension in an order of its own, which csrc/round_columns.h follows to the bit: numbers
    at equal places modulo 8 one after another, then the eight sums folded by halves."""
    if missing := -squares.shape[-1] % 8:
        squares = torch.nn.functional.pad(squares, (0, missing))
    eights = squares.unflatten(-1, (-1, 8)).unbind(-2)
    total = eights[0].clone()
    for each in eights[1:]:
        total += each
    for half in (4, 2, 1):
        total = total[..., :half] + total[..., half:]
    return total[..., 0]
