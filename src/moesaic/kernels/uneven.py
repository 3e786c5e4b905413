"""Rounding weights to sixteen uneven values times a scale, two groups of 16 inputs at a time.

Values lie closer to each other near 0, as weights do, so that four bits of a weight lose less than sixteen even steps.
Two neighbouring groups share a word of 16 bits: six of an exponent, and for each a sign and four bits of a scale, which
are one more of the exponent and three of a mantissa. That is 4.5 bits a weight.

I inputs, B blocks of 32 inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

VALUES = torch.tensor([0, 3, 7, 10, 14, 18, 23, 30, -34, -29, -22, -17, -13, -9, -6, -3], dtype=torch.float32)
"""What the codes from 0 to 15 stand for: the least mean squared error (Lloyd's iteration) of normal numbers in groups
of 16 whose scales were found as below, with 0 held among them, rounded to whole numbers that are 64 apart at most: then
four products with bytes of a row are summed in 16 bits."""
BLOCK, GROUP = 32, 16
NOT_A_NUMBER = 62 << 10 | 15 << 5 | 15
"""The word of a block that has no scales: both are NaN."""

_LEAST_EXPONENT, _MOST_CODE = -27, 61  # of a scale, and of the six bits where it is a number
_MARGIN = 1.25  # of the largest scale below the end of its octave, so that larger ones can be tried
_TRIED = (-1, 0, 1, 2)  # steps of the four bits beside the scale at which the largest weight is the least value
_SORTED = VALUES.roll(8)
_LEAST = -34.0
_THRESHOLDS = _SORTED[1:] + _SORTED[:-1] - 2 * _LEAST  # between two values, in half steps from the least
_ELEMENTS_AT_ONCE = 1 << 18


class Coded(NamedTuple):
    """codes uint8 [..., I], 0 to 15; words int32 [..., B], of which 16 bits are used."""

    codes: Tensor
    words: Tensor


def round_to_codes(weight: Tensor) -> Coded:
    """Weights [..., I] to the nearest values times a scale, tried in both signs: that of the least squared error.

    Blocks with a number that is not finite have no scales.
    """
    inputs = weight.shape[-1]
    rows = weight.reshape(-1, inputs)
    codes = torch.empty(rows.shape, dtype=torch.uint8)
    words = torch.empty(len(rows), -(-inputs // BLOCK), dtype=torch.int32)
    at_once = max(1, _ELEMENTS_AT_ONCE // max(1, inputs))
    for some in (slice(start, start + at_once) for start in range(0, len(rows), at_once)):
        padded = torch.nn.functional.pad(rows[some].float(), (0, -inputs % BLOCK)).unflatten(-1, (-1, 2, GROUP))
        found, words[some] = _round_blocks(padded)
        codes[some] = found.flatten(1)[:, :inputs]
    return Coded(codes.view_as(weight), words.view(*weight.shape[:-1], -1))


def scales_of(words: Tensor) -> Tensor:
    """The scales [..., 2 B] of the words' groups, in fp32."""
    exponents = words >> 10
    both = torch.stack([_scales(exponents, words >> 5 * odd & 15, words >> 5 * odd & 16) for odd in (0, 1)], dim=-1)
    return both.masked_fill((exponents > _MOST_CODE)[..., None], torch.nan).flatten(-2)


def dequantized(coded: Coded) -> Tensor:
    """What was rounded to, in fp32."""
    scales = scales_of(coded.words).repeat_interleave(GROUP, dim=-1)[..., : coded.codes.shape[-1]]
    return VALUES[coded.codes.long()] * scales


def _round_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of blocks [R, B, 2, 16], and their words [R, B]: csrc/round_uneven.h does the same to the bit."""
    is_finite = blocks.isfinite().all(-1).all(-1)
    blocks = blocks.where(is_finite[..., None, None], 0.0)
    largest = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))[..., 0]
    whole = largest.abs() / -_LEAST
    exponents = (_exponent(whole.amax(-1) * _MARGIN) - _LEAST_EXPONENT - 1).clamp(0, _MOST_CODE)[..., None]
    nearest = _nearest_bits(whole / torch.exp2((exponents + _LEAST_EXPONENT).float()))
    best, least = torch.zeros_like(nearest), torch.full_like(whole, torch.inf)
    for other_sign in (False, True):
        sign = torch.where((largest > 0) != other_sign, 16, 0)
        for step in _TRIED:
            tried = (nearest + step).clamp(0, 15)
            scales = _scales(exponents, tried, sign)[..., None]
            error = _folded((VALUES[_nearest_codes(blocks, scales)] * scales - blocks).square())
            best, least = torch.where(error < least, tried | sign, best), torch.minimum(error, least)
    codes = _nearest_codes(blocks, _scales(exponents, best & 15, best & 16)[..., None])
    words = exponents[..., 0] << 10 | best[..., 1] << 5 | best[..., 0]
    return codes, words.where(is_finite, NOT_A_NUMBER)


def _scales(exponents: Tensor, bits: Tensor, sign: Tensor) -> Tensor:
    magnitude = (1 + (bits & 7) / 8) * torch.exp2((exponents + (bits >> 3) + _LEAST_EXPONENT).float())
    return torch.where(sign != 0, -magnitude, magnitude)


def _nearest_bits(relative: Tensor) -> Tensor:
    """The four bits of the scale nearest to so many of the exponent's."""
    return ((relative.view(torch.int32) + (1 << 19) >> 20) - (127 << 3)).clamp(0, 15)


def _exponent(x: Tensor) -> Tensor:
    return (x.view(torch.int32) >> 23) - 127


def _nearest_codes(blocks: Tensor, scales: Tensor) -> Tensor:
    halves = (blocks * (2 / scales) - 2 * _LEAST).clamp(0.0, 127.0).trunc()
    return torch.bucketize(halves, _THRESHOLDS, right=True) ^ 8


def _folded(squares: Tensor) -> Tensor:
    """The sum of sixteen: those at equal places modulo 8, then the eight sums folded by halves."""
    total = squares[..., :8] + squares[..., 8:]
    for half in (4, 2, 1):
        total = total[..., :half] + total[..., half:]
    return total[..., 0]
