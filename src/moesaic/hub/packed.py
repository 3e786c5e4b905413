"""Weights that are packed by themselves, with their scales beside them, seen as plain ones."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol

from torch import Tensor

from moesaic.errors import CheckpointError
from moesaic.hub.codes import CodesFormat, Coding
from moesaic.hub.parts import Box, box_of, strides_of
from moesaic.hub.safetensors_header import TensorHeader
from moesaic.hub.stored import StoredTensors
from moesaic.models.weight_map import Index

Shape = tuple[int, ...]


class Packing(Protocol):
    """One way to pack: its `name` and the `blocks` it has for messages, what its codes are and how many of a row share
    a scale, and the types of its values and scales."""

    name: str
    blocks: str
    format: CodesFormat
    group: int
    dtype: str
    scales: tuple[str, ...]

    def shape(self, stored: Shape) -> Shape:
        """Of the weight that is stored so."""
        ...

    def scale_shape(self, shape: Shape) -> Shape:
        """Of the scales of a weight."""
        ...

    def read(self, stored: StoredTensors, name: str, scale: str, box: Box) -> Tensor:
        """A box of the weight in fp32, exactly."""
        ...

    def codes(self, stored: StoredTensors, name: str, box: Box) -> Tensor:
        """A box of the weight's codes, a byte each."""
        ...

    def row_scales(self, stored: StoredTensors, scale: str, box: Box) -> Tensor:
        """A box of rows and groups: the scale of each."""
        ...


class _Packed(NamedTuple):
    packing: Packing
    scale: str


class PackedTensors:
    """Stored weights of these packings as plain ones of type `unpacked`; other tensors pass.

    The scales of `NAME.weight` are `NAME.weight_scale_inv` or, where there is that, `NAME.scale`. Raises
    CheckpointError for a weight without its scales, scales without a weight, or of the wrong shape or type.
    """

    def __init__(self, stored: StoredTensors, unpacked: str, packings: tuple[Packing, ...]) -> None:
        self.stored = stored
        by_dtype = {packing.dtype: packing for packing in packings}
        found = stored.tensors
        self._packed = {
            name: _Packed(by_dtype[header.dtype], _scale_name(name, found))
            for name, header in found.items()
            if header.dtype in by_dtype
        }
        scales = {packed.scale for packed in self._packed.values()}
        lone = [name for name in found if name.endswith(("_scale_inv", ".scale")) and name not in scales]
        if lone:
            names = " or ".join(packing.name for packing in packings)
            raise CheckpointError(f"{lone[0]} scales no {names} weight in its folder; copy the weights again")
        self.tensors: Mapping[str, TensorHeader] = {
            name: self._header(name, header, unpacked) for name, header in found.items() if name not in scales
        }

    def _header(self, name: str, header: TensorHeader, unpacked: str) -> TensorHeader:
        if name not in self._packed:
            return header
        packing, scale = self._packed[name]
        shape = packing.shape(header.shape)
        _check(name, header, packing, scale, self.stored.tensors.get(scale), shape)
        return header._replace(dtype=unpacked, shape=shape)

    def companions(self, name: str) -> tuple[str, ...]:
        """The stored tensors that `name` is made of, where it is packed."""
        return (name, self._packed[name].scale) if name in self._packed else ()

    def read(self, name: str, index: Index = ()) -> Tensor:
        """`tensor[index]`; unpacked weights come in fp32, exactly."""
        if name not in self._packed:
            return self.stored.read(name, index)
        packing, scale = self._packed[name]
        values = packing.read(self.stored, name, scale, box_of(self.tensors[name].shape, index))
        return values[strides_of(index)]

    def coding(self, name: str) -> Coding | None:
        """See hub/codes.py; so for `codes` and `scales`."""
        if name not in self._packed:
            return None
        packing = self._packed[name].packing
        return Coding(packing.format, packing.group)

    def codes(self, name: str, index: Index = ()) -> Tensor:
        packing, _ = self._packed[name]
        return packing.codes(self.stored, name, box_of(self.tensors[name].shape, index))[strides_of(index)]

    def scales(self, name: str, index: Index = ()) -> Tensor:
        packing, scale = self._packed[name]
        *outer, inputs = self.tensors[name].shape
        box = box_of((*outer, -(-inputs // packing.group)), index)
        return packing.row_scales(self.stored, scale, box)[strides_of(index)]

    def read_into(self, out: Tensor, name: str, index: Index = ()) -> None:
        """`out.copy_(tensor[index])`."""
        if name in self._packed:
            out.copy_(self.read(name, index))
        else:
            self.stored.read_into(out, name, index)


def _scale_name(name: str, found: Mapping[str, TensorHeader]) -> str:
    beside = f"{name.removesuffix('.weight')}.scale"
    return beside if beside in found else f"{name}_scale_inv"


def _check(
    name: str, header: TensorHeader, packing: Packing, scale_name: str, scale: TensorHeader | None, shape: Shape
) -> None:
    if scale is None:
        raise CheckpointError(
            f"{name} in {header.file} is {packing.name} and {scale_name} is missing; copy the weights again"
        )
    if len(shape) < 2:
        raise CheckpointError(f"{name} in {header.file} is {packing.name} of shape {list(shape)}; known: matrices")
    if scale.dtype not in packing.scales:
        raise CheckpointError(
            f"{scale_name} in {scale.file} is of type {scale.dtype}; known scales: {', '.join(packing.scales)}"
        )
    if scale.shape != packing.scale_shape(shape):
        raise CheckpointError(
            f"{scale_name} in {scale.file} is {list(scale.shape)} and {packing.blocks} of {list(shape)} need "
            f"{list(packing.scale_shape(shape))}; copy the weights again"
        )
