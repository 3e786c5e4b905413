"""Matrices of whole numbers with a scale for each group of inputs, as compressed-tensors packs them, and vLLM reads.

For a weight `X.weight` [outputs, inputs] a file holds `X.weight_packed` int32 [outputs, ceil(inputs * bits / 32)],
`X.weight_scale` [outputs, groups] and `X.weight_shape` int64 [2]. A number has 2^(bits - 1) added and stands in the
word from its lowest bits on; the weight is the number times its group's scale. ("pack-quantized" of compressed-tensors
0.20, symmetric.)
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from moesaic.errors import CheckpointError
from moesaic.hub.parts import Box, box_of, slices, strides_of
from moesaic.hub.quantization import IntGroups, groups_of
from moesaic.hub.safetensors_header import TensorHeader
from moesaic.hub.stored import StoredTensors
from moesaic.models.weight_map import Index

PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
SCALES = ("F16", "BF16", "F32")
WORD = 32


class PackedIntTensors:
    """Stored packed matrices seen as plain ones of type `unpacked`; other tensors pass.

    Raises CheckpointError for matrices without scales or shape, scales without a matrix, and for the wrong shape or
    type; ConfigError for one that no group of the configuration is meant for.
    """

    def __init__(self, stored: StoredTensors, unpacked: str, groups: tuple[IntGroups, ...]) -> None:
        self.stored = stored
        found = stored.tensors
        names = [name.removesuffix(PACKED) for name in found if name.endswith(f".weight{PACKED}")]
        self._groups = {name: groups_of(name.removesuffix(".weight"), groups) for name in names}
        beside = {f"{name}{suffix}" for name in names for suffix in (PACKED, SCALE, SHAPE)}
        lone = [name for name in found if name.endswith((f".weight{SCALE}", f".weight{SHAPE}")) and name not in beside]
        if lone:
            raise CheckpointError(f"{lone[0]} belongs to no packed weight in its folder; copy the weights again")
        tensors = {name: header for name, header in found.items() if name not in beside}
        self.tensors: Mapping[str, TensorHeader] = tensors | {name: self._header(name, unpacked) for name in names}

    def _header(self, name: str, unpacked: str) -> TensorHeader:
        packed, scale, shape = (self._part(name, suffix) for suffix in (PACKED, SCALE, SHAPE))
        groups = self._groups[name]
        _check_type(f"{name}{PACKED}", packed, ("I32",), 2)
        _check_type(f"{name}{SCALE}", scale, SCALES, 2)
        _check_type(f"{name}{SHAPE}", shape, ("I64",), 1)
        outputs, words = packed.shape
        inputs = words * WORD // groups.bits
        if groups.group is None or scale.shape[1] * groups.group != inputs:  # the last word may be partly empty
            stated = self.stored.read(f"{name}{SHAPE}").tolist()
            inputs = stated[1] if len(stated) == 2 else 0
        if words != -(-inputs * groups.bits // WORD):
            raise CheckpointError(
                f"{name}{PACKED} in {packed.file} has {words} words a row and {inputs} inputs of {groups.bits} bits "
                f"need {-(-inputs * groups.bits // WORD)}; copy the weights again"
            )
        expected = (outputs, groups.count(inputs))
        if scale.shape != expected:
            raise CheckpointError(
                f"{name}{SCALE} in {scale.file} is {list(scale.shape)} and groups of {groups.group or 'all'} of "
                f"{[outputs, inputs]} need {list(expected)}; copy the weights again"
            )
        return TensorHeader(unpacked, (outputs, inputs), packed.file)

    def _part(self, name: str, suffix: str) -> TensorHeader:
        found = self.stored.tensors
        if f"{name}{suffix}" not in found:
            file = found[f"{name}{PACKED}"].file
            raise CheckpointError(
                f"{name}{PACKED} in {file} is there and {name}{suffix} is missing; copy the weights again"
            )
        return found[f"{name}{suffix}"]

    def companions(self, name: str) -> tuple[str, ...]:
        """The stored tensors that `name` is made of, where it is packed."""
        return tuple(f"{name}{suffix}" for suffix in (PACKED, SCALE, SHAPE)) if name in self._groups else ()

    def read(self, name: str, index: Index = ()) -> Tensor:
        """`tensor[index]`; unpacked weights come in fp32: numbers times scales."""
        if name not in self._groups:
            return self.stored.read(name, index)
        values = self._unpacked(name, box_of(self.tensors[name].shape, index))
        return values[strides_of(index)]

    def read_into(self, out: Tensor, name: str, index: Index = ()) -> None:
        """`out.copy_(tensor[index])`."""
        if name in self._groups:
            out.copy_(self.read(name, index))
        else:
            self.stored.read_into(out, name, index)

    def _unpacked(self, name: str, box: Box) -> Tensor:
        rows, (start, stop) = box
        groups = self._groups[name]
        a_word = WORD // groups.bits
        first = start // a_word
        words = self.stored.read(f"{name}{PACKED}", (*slices((rows,)), slice(first, -(-stop // a_word))))
        values = unpack(words, groups.bits)[:, start - first * a_word : stop - first * a_word].float()
        if groups.group is None:
            return values.mul_(self.stored.read(f"{name}{SCALE}", slices((rows,))).float())
        own = torch.arange(start, stop) // groups.group
        first = start // groups.group
        scales = self.stored.read(f"{name}{SCALE}", (*slices((rows,)), slice(first, -(-stop // groups.group))))
        return values.mul_(scales.float().index_select(1, own - first))


def _check_type(name: str, header: TensorHeader, known: tuple[str, ...], num_dims: int) -> None:
    if header.dtype not in known:
        raise CheckpointError(f"{name} in {header.file} is of type {header.dtype}; known: {', '.join(known)}")
    if len(header.shape) != num_dims:
        raise CheckpointError(f"{name} in {header.file} is {list(header.shape)}; known: {num_dims} dimensions")


class Stored(NamedTuple):
    """What a file holds of a matrix: type and shape of each tensor."""

    packed: tuple[str, tuple[int, ...]]
    scale: tuple[str, tuple[int, ...]]
    shape: tuple[str, tuple[int, ...]]


def stored(shape: tuple[int, ...], bits: int, group: int, scales: str) -> Stored:
    """The tensors of a matrix [outputs, inputs] in so many bits, with scales of this type."""
    outputs, inputs = shape
    packed, scale = (outputs, -(-inputs * bits // WORD)), (outputs, -(-inputs // group))
    return Stored(("I32", packed), (scales, scale), ("I64", (2,)))


def pack(values: Tensor, bits: int) -> Tensor:
    """Whole numbers of 4 or 8 bits (int8) [..., inputs] in words [..., ceil(inputs * bits / 32)]; empty bits are 0."""
    unsigned = (values.short() + (1 << (bits - 1))).to(torch.uint8)
    unsigned = pad(unsigned, (0, -values.shape[-1] % (WORD // bits)))
    if bits == 4:
        unsigned = unsigned[..., 0::2] | unsigned[..., 1::2] << 4
    return unsigned.contiguous().view(torch.int32)


def unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse, as int16 [..., words * 32 / bits]."""
    numbers = words.contiguous().view(torch.uint8)
    if bits == 4:
        numbers = torch.stack((numbers & 15, numbers >> 4), dim=-1).flatten(-2)
    return numbers.short() - (1 << (bits - 1))
