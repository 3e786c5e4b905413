"""How one tensor of a model becomes tensors of a file: plain, FP8 with block scales, FP4 by rows, or MXFP4."""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.hub import fp4, fp8, mxfp4
from moesaic.hub.parts import Box, boxes
from moesaic.hub.quantization import PackedAs
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

    def __init__(self, style: PackedAs) -> None:
        self.style: PackedAs = style

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        scales = "F32" if self.style == "scale_inv" else "F8_E8M0"
        return {name: (fp8.WEIGHT, shape), self._scale(name): (scales, fp8.scale_shape(shape))}

    def boxes(self, shape: Shape, max_elements: int) -> Iterator[Box]:
        return boxes(shape, max_elements, (*[1] * (len(shape) - 2), fp8.BLOCK, fp8.BLOCK))

    def encode(self, name: str, shape: Shape, box: Box, values: Tensor) -> Iterator[Written]:
        packed = fp8.pack(values, powers_of_two=self.style == "scale")
        yield Written(name, _start(shape, box), packed.values)
        corner = (*box[:-2], *((start // fp8.BLOCK, -(-stop // fp8.BLOCK)) for start, stop in box[-2:]))
        yield Written(self._scale(name), _start(fp8.scale_shape(shape), corner), packed.scales)

    def _scale(self, name: str) -> str:
        return f"{name}_scale_inv" if self.style == "scale_inv" else _scale_beside(name)


class Fp4:
    """See hub/fp4.py."""

    dtype = torch.float32

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        rows, inputs = shape
        if inputs % fp4.GROUP:
            raise CheckpointError(
                f"{name} multiplies {inputs} inputs; mxfp4 packs {fp4.GROUP} at a time, so use another --dtype"
            )
        return {
            name: (fp4.WEIGHT, (rows, inputs // 2)),
            _scale_beside(name): (fp4.SCALES, (rows, inputs // fp4.GROUP)),
        }

    def boxes(self, shape: Shape, max_elements: int) -> Iterator[Box]:
        return boxes(shape, max_elements, (1, shape[-1]))

    def encode(self, name: str, shape: Shape, box: Box, values: Tensor) -> Iterator[Written]:
        packed = fp4.pack(values)
        start = _start(shape, box)
        yield Written(name, start // 2, packed.values)
        yield Written(_scale_beside(name), start // fp4.GROUP, packed.scales)


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


def _scale_beside(name: str) -> str:
    return f"{name.removesuffix('.weight')}.scale"


def _start(shape: Shape, box: Box) -> int:
    """The number of elements before a box."""
    return sum(start * math.prod(shape[dim + 1 :]) for dim, (start, _) in enumerate(box))
