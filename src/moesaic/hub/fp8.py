"""FP8 weights with a scale per block of 128 x 128, as DeepSeek-V3 releases them (arXiv:2412.19437, sec. 3.3).

A file holds `NAME` in float8_e4m3fn and `NAME_scale_inv` [..., ceil(rows/128), ceil(columns/128)], whose product is the
weight: w[r, c] = NAME[r, c] * NAME_scale_inv[r // 128, c // 128]. Scales are fp32, or powers of two, 2^(byte - 127), in
one byte (ue8m0).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.hub.parts import box_of, slices, strides_of
from moesaic.hub.quantization import FP8_BLOCK as BLOCK
from moesaic.hub.safetensors_header import TensorHeader
from moesaic.hub.stored import StoredTensors
from moesaic.models.weight_map import Index

WEIGHT, SCALES, SUFFIX = "F8_E4M3", ("F32", "F8_E8M0", "U8"), "_scale_inv"
LARGEST = 448.0  # of float8_e4m3fn


class Fp8Tensors:
    """Stored FP8 tensors seen as plain ones of type `unpacked`; other tensors pass.

    Raises CheckpointError for a weight without its scales, scales without a weight, or of the wrong shape or type.
    """

    def __init__(self, stored: StoredTensors, unpacked: str) -> None:
        self.stored = stored
        packed = {name for name, header in stored.tensors.items() if header.dtype == WEIGHT}
        for name in packed:
            _check(name, stored.tensors)
        scales = {f"{name}{SUFFIX}" for name in packed}
        lone = [name for name in stored.tensors if name.endswith(SUFFIX) and name not in scales]
        if lone:
            raise CheckpointError(f"{lone[0]} scales no FP8 weight in its folder; copy the weights again")
        self.tensors: Mapping[str, TensorHeader] = {
            name: header._replace(dtype=unpacked) if name in packed else header
            for name, header in stored.tensors.items()
            if name not in scales
        }
        self._packed = packed

    def companions(self, name: str) -> tuple[str, ...]:
        """The stored tensors that `name` is made of, where it is packed."""
        return (name, f"{name}{SUFFIX}") if name in self._packed else ()

    def read(self, name: str, index: Index = ()) -> Tensor:
        """`tensor[index]`; unpacked weights come in fp32, exactly."""
        if name not in self._packed:
            return self.stored.read(name, index)
        box = box_of(self.tensors[name].shape, index)
        weight = self.stored.read(name, slices(box)).float()
        corner = tuple((start // BLOCK, -(-stop // BLOCK)) for start, stop in box[-2:])
        scale = scale_values(self.stored.read(f"{name}{SUFFIX}", slices((*box[:-2], *corner))))
        for dim, (start, stop) in zip((-2, -1), box[-2:], strict=True):
            blocks = torch.arange(start, stop) // BLOCK - start // BLOCK
            scale = scale.index_select(dim, blocks)
        return weight.mul_(scale)[strides_of(index)]

    def read_into(self, out: Tensor, name: str, index: Index = ()) -> None:
        """`out.copy_(tensor[index])`."""
        if name in self._packed:
            out.copy_(self.read(name, index))
        else:
            self.stored.read_into(out, name, index)


def scale_values(scale: Tensor) -> Tensor:
    """Scales as fp32, whichever way they are stored. The byte 255 is NaN, as the format (OCP MX 1.0) says."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a weight's scales."""
    return (*shape[:-2], *(-(-size // BLOCK) for size in shape[-2:]))


def _check(name: str, stored: Mapping[str, TensorHeader]) -> None:
    header, scale = stored[name], stored.get(f"{name}{SUFFIX}")
    if scale is None:
        raise CheckpointError(f"{name} in {header.file} is FP8 and {name}{SUFFIX} is missing; copy the weights again")
    if len(header.shape) < 2:
        raise CheckpointError(f"{name} in {header.file} is FP8 of shape {list(header.shape)}; known: matrices")
    if scale.dtype not in SCALES:
        raise CheckpointError(
            f"{name}{SUFFIX} in {scale.file} is of type {scale.dtype}; known scales: {', '.join(SCALES)}"
        )
    if scale.shape != scale_shape(header.shape):
        raise CheckpointError(
            f"{name}{SUFFIX} in {scale.file} is {list(scale.shape)} and blocks of {BLOCK} x {BLOCK} of "
            f"{list(header.shape)} need {list(scale_shape(header.shape))}; copy the weights again"
        )


class Packed(NamedTuple):
    """Quantized values and their scales."""

    values: Tensor
    scales: Tensor


def pack(values: Tensor) -> Packed:
    """A matrix (or several) in float8_e4m3fn and its fp32 scales: a block's largest magnitude becomes 448.

    Blocks start at the matrix's first row and column; the last ones may be partial. A block of zeros has scale 1.
    """
    rows, columns = values.shape[-2:]
    down, right = (-size % BLOCK for size in (rows, columns))
    padded = torch.nn.functional.pad(values.float(), (0, right, 0, down))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # [..., R, 128, C, 128]
    largest = blocks.abs().amax(dim=(-3, -1))
    scales = torch.where(largest > 0, largest / LARGEST, 1.0)
    scaled = blocks.div_(scales[..., :, None, :, None]).clamp_(-LARGEST, LARGEST)
    packed = scaled.to(torch.float8_e4m3fn).flatten(-4, -3).flatten(-2, -1)
    return Packed(packed[..., :rows, :columns], scales)
