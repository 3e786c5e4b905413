"""Rounded matrices as they go to files, and what the rounding cost each."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.hub import packed_ints, uneven_files
from moesaic.hub.encodings import Shape, Written
from moesaic.hub.parts import Box, boxes
from moesaic.hub.stored import SPELLINGS
from moesaic.kernels import uneven
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

    def add(self, rounded: Tensor, values: Tensor) -> None:
        self.error += float((rounded - values).square_().sum(dtype=torch.float64))
        self.weight += float(values.square().sum(dtype=torch.float64))


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
        self.squares.add(dequantized(rounded, self.group), values)
        first, words = box[0][0], packed_ints.pack(rounded.values, self.bits)
        packed, scale, its_shape = _names(name)
        yield Written(packed, first * words.shape[-1], words)
        yield Written(scale, first * rounded.scales.shape[-1], rounded.scales.to(self.scales))
        if first == 0:
            yield Written(its_shape, 0, torch.tensor(shape))


class RoundedUneven:
    """Sixteen uneven values with two scales for each 32 inputs: see hub/uneven_files.py. `squares` as above."""

    dtype = torch.float32
    bits: Bits = 4

    def __init__(self) -> None:
        self.squares = Squares()

    def stored(self, name: str, shape: Shape) -> dict[str, tuple[str, Shape]]:
        return dict(zip(_uneven_names(name), uneven_files.stored(shape), strict=True))

    def boxes(self, shape: Shape, max_elements: int) -> Iterator[Box]:
        return boxes(shape, max_elements, (1, shape[-1]))

    def encode(self, name: str, shape: Shape, box: Box, values: Tensor) -> Iterator[Written]:
        coded = uneven.round_to_codes(values)
        self.squares.add(uneven.dequantized(coded), values)
        first, both = box[0][0], uneven_files.halves(coded.codes)
        codes, words = _uneven_names(name)
        yield Written(codes, first * both.shape[-1], both)
        yield Written(words, first * coded.words.shape[-1], coded.words.short())


def _uneven_names(name: str) -> tuple[str, str]:
    return f"{name}{uneven_files.CODES}", f"{name}{uneven_files.WORDS}"


def _names(name: str) -> tuple[str, str, str]:
    return f"{name}{packed_ints.PACKED}", f"{name}{packed_ints.SCALE}", f"{name}{packed_ints.SHAPE}"
