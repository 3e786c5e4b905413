"""Matrices in four bits, with a power of two for each 32 inputs, as DeepSeek-V4 releases its experts.

The numbers are those of MXFP4 (see hub/mxfp4.py), laid out by rows: for a weight `NAME` [outputs, inputs] a file holds
`NAME` of bytes [outputs, inputs / 2], two values each, the even one in its low half, and scales [outputs, inputs / 32].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.hub import mxfp4
from moesaic.hub.codes import CodesFormat
from moesaic.hub.packed import Shape
from moesaic.hub.parts import Box, slices
from moesaic.hub.stored import StoredTensors

GROUP, WEIGHT, SCALES = mxfp4.BLOCK, "I8", "F8_E8M0"


class Fp4Groups:
    """See the file."""

    name, blocks, dtype, scales = "FP4", f"groups of {GROUP}", WEIGHT, (SCALES, "U8")
    format: CodesFormat = "mxfp4"
    group = GROUP

    def shape(self, stored: Shape) -> Shape:
        return (*stored[:-1], *(2 * size for size in stored[-1:]))

    def scale_shape(self, shape: Shape) -> Shape:
        return (*shape[:-1], -(-shape[-1] // GROUP))

    def read(self, stored: StoredTensors, name: str, scale: str, box: Box) -> Tensor:
        *rows, (start, stop) = box
        first, last = start // GROUP, -(-stop // GROUP)
        outer = slices(tuple(rows))
        packed = stored.read(name, (*outer, slice(first * mxfp4.BYTES, last * mxfp4.BYTES))).view(torch.uint8)
        scales = stored.read(scale, (*outer, slice(first, last))).view(torch.uint8)
        packed = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % mxfp4.BYTES))  # the last group may be partial
        values = mxfp4.unpack(packed.unflatten(-1, (-1, mxfp4.BYTES)), scales)
        return values[..., start - first * GROUP : stop - first * GROUP]

    def codes(self, stored: StoredTensors, name: str, box: Box) -> Tensor:
        *rows, (start, stop) = box
        packed = stored.read(name, (*slices(tuple(rows)), slice(start // 2, -(-stop // 2)))).view(torch.uint8)
        return mxfp4.codes(packed)[..., start % 2 : start % 2 + stop - start]

    def row_scales(self, stored: StoredTensors, scale: str, box: Box) -> Tensor:
        return stored.read(scale, slices(box)).view(torch.uint8)


class Packed(NamedTuple):
    """Two values a byte [..., inputs / 2], and a power of two for each 32 of them."""

    values: Tensor
    scales: Tensor


def pack(values: Tensor) -> Packed:
    """A matrix whose inputs are a multiple of 32, rounded as `mxfp4.pack` does."""
    blocks, scales = mxfp4.pack(values)
    return Packed(blocks.flatten(-2).view(torch.int8), scales.view(torch.float8_e8m0fnu))
