"""Rounded matrices as they go to files, and what the rounding cost each."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.hub import packed_ints
from moesaic.hub.encodings import Shape, Written
from moesaic.hub.parts import Box, boxes
from moesaic.hub.stored import SPELLINGS
from moesaic.kernels.rounding import Bits, dequantized, round_to_ints


@dataclass
class Squares:
    """Sums over a tensor's weights: of what rounding changed, squared, and of the weights, squared."""

    error: float = 0.0
    weight: float = 0.0

    @property
    def relative(self) -> float:
        """|w - q| over |w|, 2-norms."""
        return (self.error / max(self.weight, 1e-60)) ** 0.5


class RoundedInts:
    """Whole numbers of `bits` bits with a scale, of type `scales`, for each `group` of inputs: see hub/packed_ints.py.

    `squares` grows as boxes are encoded.
    """

    dtype = torch.float32

    def __init__(self, bits: Bits, group: int, scales: torch.dtype) -> None:
        self.bits: Bits = bits
        self.group, self.scales = group, scales
        self.squares = Squares()

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        stored = packed_ints.stored(shape, self.bits, self.group, SPELLINGS[self.scales])
        return dict(zip(_names(name), stored, strict=True))

    def boxes(self, shape: Shape, max_elements: int) -> Iterator[Box]:
        return boxes(shape, max_elements, (1, shape[-1]))

    def encode(self, name: str, shape: Shape, box: Box, values: Tensor) -> Iterator[Written]:
        rounded = round_to_ints(values, self.bits, self.group, in_bf16=self.scales == torch.bfloat16)
        self.squares.error += float((dequantized(rounded, self.group) - values).square_().sum(dtype=torch.float64))
        self.squares.weight += float(values.square().sum(dtype=torch.float64))
        first, words = box[0][0], packed_ints.pack(rounded.values, self.bits)
        packed, scale, its_shape = _names(name)
        yield Written(packed, first * words.shape[-1], words)
        yield Written(scale, first * rounded.scales.shape[-1], rounded.scales.to(self.scales))
        if first == 0:
            yield Written(its_shape, 0, torch.tensor(shape))


def _names(name: str) -> tuple[str, str, str]:
    return f"{name}{packed_ints.PACKED}", f"{name}{packed_ints.SCALE}", f"{name}{packed_ints.SHAPE}"
