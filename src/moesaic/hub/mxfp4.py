"""MXFP4 weights, as gpt-oss releases its experts: 4 bits a value and a power of two per 32 values (OCP MX 1.0).

For a weight `NAME` [E, inputs, outputs] a file holds `NAME_blocks` uint8 [E, outputs, G, 16] and `NAME_scales` uint8
[E, outputs, G], G = inputs / 32. A byte holds two values, the even one in its low half; a value is one bit of sign and
an index into VALUES, times 2^(scale - 127).
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.hub.codes import Coding
from moesaic.hub.parts import box_of, strides_of
from moesaic.hub.safetensors_header import TensorHeader
from moesaic.hub.stored import StoredTensors
from moesaic.models.weight_map import Index

BLOCK, BYTES, BIAS = 32, 16, 127
BLOCKS, SCALES = "_blocks", "_scales"
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SIGNED = torch.tensor([*VALUES, *(-value for value in VALUES)])
_PAIRS = torch.stack((_SIGNED.repeat(16), _SIGNED.repeat_interleave(16)), dim=1)  # byte -> its low and high value
# Halfway between neighbours goes to the even code: where that is the upper one, the border lies just below.
_BORDERS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_BORDERS[1::2] = torch.nextafter(_BORDERS[1::2], torch.zeros(3))


class Mxfp4Tensors:
    """Stored MXFP4 tensors seen as plain ones, [E, inputs, outputs], of type `unpacked`; other tensors pass.

    Raises CheckpointError for blocks without scales or scales without blocks, and for the wrong shape or type.
    """

    def __init__(self, stored: StoredTensors, unpacked: str) -> None:
        self.stored = stored
        found = stored.tensors
        self._packed = {name.removesuffix(BLOCKS) for name in found if name.endswith(BLOCKS)}
        lone = [name for name in found if name.endswith(SCALES) and name.removesuffix(SCALES) not in self._packed]
        if lone:
            raise CheckpointError(f"{lone[0]} scales no MXFP4 blocks in its folder; copy the weights again")
        tensors = {name: header for name, header in found.items() if not name.endswith((BLOCKS, SCALES))}
        for name in self._packed:
            tensors[name] = _unpacked_header(name, found, unpacked)
        self.tensors: Mapping[str, TensorHeader] = tensors

    def companions(self, name: str) -> tuple[str, ...]:
        """The stored tensors that `name` is made of, where it is packed."""
        return (f"{name}{BLOCKS}", f"{name}{SCALES}") if name in self._packed else ()

    def read(self, name: str, index: Index = ()) -> Tensor:
        """`tensor[index]`; unpacked weights come in fp32, exactly."""
        if name not in self._packed:
            return self.stored.read(name, index)
        experts, (start, stop), outputs = box_of(self.tensors[name].shape, index)
        groups = slice(start // BLOCK, -(-stop // BLOCK))
        at = (slice(*experts), slice(*outputs), groups)
        values = unpack(self.stored.read(f"{name}{BLOCKS}", at), self.stored.read(f"{name}{SCALES}", at))
        first = start - groups.start * BLOCK
        return values[..., first : first + stop - start].mT[strides_of(index)]

    def coding(self, name: str) -> Coding | None:
        """See hub/codes.py; so for `codes` and `scales`."""
        return Coding("mxfp4", BLOCK, inputs_dim=-2) if name in self._packed else None

    def codes(self, name: str, index: Index = ()) -> Tensor:
        experts, (start, stop), outputs = box_of(self.tensors[name].shape, index)
        groups = slice(start // BLOCK, -(-stop // BLOCK))
        blocks = self.stored.read(f"{name}{BLOCKS}", (slice(*experts), slice(*outputs), groups))
        first = start - groups.start * BLOCK
        return codes(blocks).flatten(-2)[..., first : first + stop - start].mT[strides_of(index)]

    def scales(self, name: str, index: Index = ()) -> Tensor:
        num_experts, inputs, outputs = self.tensors[name].shape
        of_experts, groups, of_outputs = box_of((num_experts, inputs // BLOCK, outputs), index)
        at = (slice(*of_experts), slice(*of_outputs), slice(*groups))
        return self.stored.read(f"{name}{SCALES}", at).mT[strides_of(index)]

    def read_into(self, out: Tensor, name: str, index: Index = ()) -> None:
        """`out.copy_(tensor[index])`."""
        if name in self._packed:
            out.copy_(self.read(name, index))
        else:
            self.stored.read_into(out, name, index)


def _unpacked_header(name: str, found: Mapping[str, TensorHeader], unpacked: str) -> TensorHeader:
    blocks, scales = found[f"{name}{BLOCKS}"], found.get(f"{name}{SCALES}")
    if scales is None:
        raise CheckpointError(
            f"{name}{BLOCKS} in {blocks.file} is there and {name}{SCALES} is missing; copy the weights again"
        )
    for suffix, header in ((BLOCKS, blocks), (SCALES, scales)):
        if header.dtype != "U8":
            raise CheckpointError(f"{name}{suffix} in {header.file} is of type {header.dtype}; known: U8")
    if len(blocks.shape) != 4 or blocks.shape[3] != BYTES:
        raise CheckpointError(
            f"{name}{BLOCKS} in {blocks.file} is {list(blocks.shape)}; "
            f"MXFP4 blocks are [experts, outputs, groups, {BYTES}]"
        )
    if scales.shape != blocks.shape[:3]:
        raise CheckpointError(
            f"{name}{SCALES} in {scales.file} is {list(scales.shape)} and the blocks of {list(blocks.shape)} need "
            f"{list(blocks.shape[:3])}; copy the weights again"
        )
    num_experts, outputs, groups, _ = blocks.shape
    return TensorHeader(unpacked, (num_experts, groups * BLOCK, outputs), blocks.file)


class Packed(NamedTuple):
    """Two values a byte [..., G, 16], and a byte of scale for each 32 of them [..., G]."""

    blocks: Tensor
    scales: Tensor


def codes(packed: Tensor) -> Tensor:
    """The two values of each byte [..., n] as a byte each [..., 2 n]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """fp32 values [..., G * 32] of blocks [..., G, 16] and scales [..., G]; NaN where a scale is 255."""
    values = torch.nn.functional.embedding(blocks.int(), _PAIRS).flatten(-2)
    return values.mul_(scales.view(torch.float8_e8m0fnu).float()[..., None]).flatten(-2)


def pack(values: Tensor) -> Packed:
    """Values [..., G * 32] as MXFP4: the smallest power of two by which the largest of 32 fits, rounded to even.

    Where a smaller scale would cut off the largest value (the rounding that OCP MX names), the next one is taken, as
    the kernels of gpt-oss do. Values that were MXFP4 before stay the same.
    """
    grouped = values.float().contiguous().unflatten(-1, (-1, BLOCK))
    largest = grouped.abs().amax(dim=-1)
    mantissa, exponent = torch.frexp(largest / VALUES[-1])  # in [0.5, 1) times 2^exponent
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-BIAS, BIAS)
    scales = torch.where(largest > 0, exponent + BIAS, BIAS).to(torch.uint8)
    scaled = torch.ldexp(grouped, (BIAS - scales.int())[..., None])
    codes = torch.bucketize(scaled.abs(), _BORDERS).to(torch.uint8)
    codes |= torch.signbit(scaled).to(torch.uint8) << 3
    return Packed(codes[..., 0::2] | codes[..., 1::2] << 4, scales)
