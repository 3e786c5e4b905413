"""Matrices of sixteen uneven values of four bits (kernels/uneven.py), as moesaic writes and reads them.

For a weight `X.weight` [outputs, inputs] a file holds `X.weight_codes` uint8 [outputs, inputs / 2], the even input in a
byte's low half, and `X.weight_words` int16 [outputs, inputs / 32]: a word of two scales for each block of 32 inputs.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.hub.codes import Coding
from moesaic.hub.parts import Box, box_of, slices, strides_of
from moesaic.hub.safetensors_header import TensorHeader
from moesaic.hub.stored import StoredTensors
from moesaic.kernels.uneven import BLOCK, Coded, dequantized
from moesaic.models.weight_map import Index

CODES, WORDS = "_codes", "_words"
Shape = tuple[int, ...]


class UnevenTensors:
    """Stored uneven matrices seen as plain ones of type `unpacked`; other tensors pass.

    Raises CheckpointError for codes without words or words without codes, and for the wrong shape or type.
    """

    def __init__(self, stored: StoredTensors, unpacked: str) -> None:
        self.stored = stored
        found = stored.tensors
        self._packed = {name.removesuffix(CODES) for name in found if name.endswith(f".weight{CODES}")}
        beside = {f"{name}{suffix}" for name in self._packed for suffix in (CODES, WORDS)}
        lone = [name for name in found if name.endswith(f".weight{WORDS}") and name not in beside]
        if lone:
            raise CheckpointError(f"{lone[0]} belongs to no codes in its folder; copy the weights again")
        tensors = {name: header for name, header in found.items() if name not in beside}
        self.tensors: Mapping[str, TensorHeader] = tensors | {
            name: _unpacked_header(name, found, unpacked) for name in self._packed
        }

    def companions(self, name: str) -> tuple[str, ...]:
        """The stored tensors that `name` is made of, where it is packed."""
        return (f"{name}{CODES}", f"{name}{WORDS}") if name in self._packed else ()

    def read(self, name: str, index: Index = ()) -> Tensor:
        """`tensor[index]`; unpacked weights come in fp32, exactly."""
        if name not in self._packed:
            return self.stored.read(name, index)
        rows, (start, stop) = box_of(self.tensors[name].shape, index)
        blocks = (start // BLOCK, -(-stop // BLOCK))
        inside = (blocks[0] * BLOCK, blocks[1] * BLOCK)
        values = dequantized(Coded(self._codes(name, (rows, inside)), self._words(name, (rows, blocks))))
        return values[:, start - inside[0] : stop - inside[0]][strides_of(index)]

    def read_into(self, out: Tensor, name: str, index: Index = ()) -> None:
        """`out.copy_(tensor[index])`."""
        if name in self._packed:
            out.copy_(self.read(name, index))
        else:
            self.stored.read_into(out, name, index)

    def coding(self, name: str) -> Coding | None:
        """See hub/codes.py; so for `codes` and `scales`, which are the words."""
        return Coding("uneven4", BLOCK) if name in self._packed else None

    def codes(self, name: str, index: Index = ()) -> Tensor:
        return self._codes(name, box_of(self.tensors[name].shape, index))[strides_of(index)]

    def scales(self, name: str, index: Index = ()) -> Tensor:
        outputs, inputs = self.tensors[name].shape
        return self._words(name, box_of((outputs, inputs // BLOCK), index))[strides_of(index)]

    def _codes(self, name: str, box: Box) -> Tensor:
        rows, (start, stop) = box
        first = start // 2
        both = self.stored.read(f"{name}{CODES}", slices((rows, (first, -(-stop // 2)))))
        return torch.stack((both & 15, both >> 4), dim=-1).flatten(-2)[:, start - 2 * first : stop - 2 * first]

    def _words(self, name: str, box: Box) -> Tensor:
        return self.stored.read(f"{name}{WORDS}", slices(box)).int() & 0xFFFF


def _unpacked_header(name: str, found: Mapping[str, TensorHeader], unpacked: str) -> TensorHeader:
    codes, words = found[f"{name}{CODES}"], found.get(f"{name}{WORDS}")
    if words is None:
        raise CheckpointError(
            f"{name}{CODES} in {codes.file} is there and {name}{WORDS} is missing; copy the weights again"
        )
    for suffix, header, dtype in ((CODES, codes, "U8"), (WORDS, words, "I16")):
        if header.dtype != dtype or len(header.shape) != 2:
            raise CheckpointError(
                f"{name}{suffix} in {header.file} is {header.dtype} {list(header.shape)}; known: {dtype} matrices"
            )
    outputs, halves = codes.shape
    if words.shape != (outputs, 2 * halves // BLOCK) or 2 * halves % BLOCK:
        raise CheckpointError(
            f"{name}{WORDS} in {words.file} is {list(words.shape)} and codes of {[outputs, 2 * halves]} need "
            f"{[outputs, -(-2 * halves // BLOCK)]}, a word for each {BLOCK} inputs; copy the weights again"
        )
    return TensorHeader(unpacked, (outputs, 2 * halves), codes.file)


def stored(shape: Shape) -> tuple[tuple[str, Shape], tuple[str, Shape]]:
    """Type and shape of the codes and of the words of a matrix."""
    outputs, inputs = shape
    return ("U8", (outputs, inputs // 2)), ("I16", (outputs, inputs // BLOCK))


def halves(codes: Tensor) -> Tensor:
    """Codes [..., inputs] two to a byte."""
    return codes[..., 0::2] | codes[..., 1::2] << 4
