"""How one tensor of a model becomes tensors of a file: plain, FP8 with block scales, or MXFP4."""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.hub import fp8, mxfp4
from moesaic.hub.parts import Box, boxes
from moesaic.hub.stored import SPELLINGS

Shape = tuple[int, ...]


class Written(NamedTuple):
    """Contiguous values of a file's tensor, from its element `start` on."""

    name: str
    start: int
    values: Tensor


class Encoding(Protocol):
    """What a tensor of this name and shape is called and shaped in the file, and its bytes, box by box.

    dtype: that of the values it takes.
    """

    dtype: torch.dtype

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]: ...
    def boxes(self, shape: Shape, max_elements: int) -> Iterator[Box]: ...
    def encode(self, name: str, shape: Shape, box: Box, values: Tensor) -> Iterator[Written]: ...


class Plain:
    """Numbers of one type, row by row."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        return {name: (SPELLINGS[self.dtype], shape)}

    def boxes(self, shape: Shape, max_elements: int) -> Iterator[Box]:
        return boxes(shape, max_elements)

    def encode(self, name: str, shape: Shape, box: Box, values: Tensor) -> Iterator[Written]:
        yield Written(name, _start(shape, box), values)


class Fp8:
    """See hub/fp8.py."""

    dtype = torch.float32

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        return {name: (fp8.WEIGHT, shape), f"{name}{fp8.SUFFIX}": ("F32", fp8.scale_shape(shape))}

    def boxes(self, shape: Shape, max_elements: int) -> Iterator[Box]:
        return boxes(shape, max_elements, (*[1] * (len(shape) - 2), fp8.BLOCK, fp8.BLOCK))

    def encode(self, name: str, shape: Shape, box: Box, values: Tensor) -> Iterator[Written]:
        packed = fp8.pack(values)
        yield Written(name, _start(shape, box), packed.values)
        corner = (*box[:-2], *((start // fp8.BLOCK, -(-stop // fp8.BLOCK)) for start, stop in box[-2:]))
        yield Written(f"{name}{fp8.SUFFIX}", _start(fp8.scale_shape(shape), corner), packed.scales)


class Mxfp4:
    """See hub/mxfp4.py; takes [E, inputs, outputs]."""

    dtype = torch.float32

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        num_experts, inputs, outputs = shape
        if inputs % mxfp4.BLOCK:
            raise CheckpointError(
                f"{name} multiplies {inputs} inputs; mxfp4 packs {mxfp4.BLOCK} at a time, so use another --dtype"
            )
        scales = (num_experts, outputs, inputs // mxfp4.BLOCK)
        return {f"{name}{mxfp4.BLOCKS}": ("U8", (*scales, mxfp4.BYTES)), f"{name}{mxfp4.SCALES}": ("U8", scales)}

    def boxes(self, shape: Shape, max_elements: int) -> Iterator[Box]:
        num_experts, inputs, outputs = shape
        for experts, rows, columns in boxes((num_experts, outputs, inputs), max_elements, (1, 1, inputs)):
            yield experts, columns, rows

    def encode(self, name: str, shape: Shape, box: Box, values: Tensor) -> Iterator[Written]:
        packed = mxfp4.pack(values.mT)
        groups = shape[1] // mxfp4.BLOCK
        start = _start((shape[0], shape[2], groups), (box[0], box[2], (0, groups)))
        yield Written(f"{name}{mxfp4.BLOCKS}", start * mxfp4.BYTES, packed.blocks)
        yield Written(f"{name}{mxfp4.SCALES}", start, packed.scales)


def _start(shape: Shape, box: Box) -> int:
    """The number of elements before a box."""
    return sum(start * math.prod(shape[dim + 1 :]) for dim, (start, _) in enumerate(box))
