"""FP8 weights with a scale per block of 128 x 128, as DeepSeek-V3 releases them (arXiv:2412.19437, sec. 3.3).

A file holds `NAME` in float8_e4m3fn and `NAME_scale_inv` [..., ceil(rows/128), ceil(columns/128)], whose product is the
weight: w[r, c] = NAME[r, c] * NAME_scale_inv[r // 128, c // 128]. Scales are fp32, or powers of two, 2^(byte - 127), in
one byte (ue8m0). DeepSeek-V4 has these, and calls them `.scale`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.hub.codes import CodesFormat
from moesaic.hub.packed import Shape
from moesaic.hub.parts import Box, slices
from moesaic.hub.quantization import FP8_BLOCK as BLOCK
from moesaic.hub.stored import StoredTensors

WEIGHT, SCALES = "F8_E4M3", ("F32", "F8_E8M0", "U8")
LARGEST = 448.0  # of float8_e4m3fn


class Fp8Blocks:
    """See the file."""

    name, blocks, dtype, scales = "FP8", f"blocks of {BLOCK} x {BLOCK}", WEIGHT, SCALES
    format: CodesFormat = "fp8"
    group = BLOCK

    def shape(self, stored: Shape) -> Shape:
        return stored

    def scale_shape(self, shape: Shape) -> Shape:
        return scale_shape(shape)

    def read(self, stored: StoredTensors, name: str, scale: str, box: Box) -> Tensor:
        start, stop = box[-1]
        scales = self.row_scales(stored, scale, (*box[:-1], (start // BLOCK, -(-stop // BLOCK))))
        blocks = torch.arange(start, stop) // BLOCK - start // BLOCK
        return stored.read(name, slices(box)).float().mul_(scales.index_select(-1, blocks))

    def codes(self, stored: StoredTensors, name: str, box: Box) -> Tensor:
        return stored.read(name, slices(box)).view(torch.uint8)

    def row_scales(self, stored: StoredTensors, scale: str, box: Box) -> Tensor:
        *outer, (start, stop), groups = box
        values = scale_values(stored.read(scale, slices((*outer, (start // BLOCK, -(-stop // BLOCK)), groups))))
        return values.index_select(-2, torch.arange(start, stop) // BLOCK - start // BLOCK)


def scale_values(scale: Tensor) -> Tensor:
    """Scales as fp32, whichever way they are stored. The byte 255 is NaN, as the format (OCP MX 1.0) says."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def scale_shape(shape: Shape) -> Shape:
    """The shape of a weight's scales."""
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))


class Packed(NamedTuple):
    """Quantized values and their scales, fp32 or ue8m0."""

    values: Tensor
    scales: Tensor


def pack(values: Tensor, *, powers_of_two: bool = False) -> Packed:
    """A matrix (or several) in float8_e4m3fn and its fp32 scales: a block's largest magnitude becomes 448.

    Blocks start at the matrix's first row and column; the last ones may be partial. A block of zeros has scale 1.
    powers_of_two: scales are the next powers of two that are no smaller, in one byte (ue8m0).
    """
    rows, columns = values.shape[-2:]
    down, right = (-size % BLOCK for size in (rows, columns))
    padded = torch.nn.functional.pad(values.float(), (0, right, 0, down))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., R, 128, C, 128]
    largest = blocks.abs().amax(dim=(-3, -1))
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    if powers_of_two:
        mantissa, exponent = torch.frexp(scales)  # in [0.5, 1) times 2^exponent
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
        scales = torch.ldexp(torch.ones_like(scales), exponent)
    scaled = blocks.div_(scales[..., :, None, :, None]).clamp_(-LARGEST, LARGEST)
    packed = scaled.to(torch.float8_e4m3fn).flatten(-4, -3).flatten(-2, -1)
    return Packed(packed[..., :rows, :columns], scales.to(torch.float8_e8m0fnu) if powers_of_two else scales)
