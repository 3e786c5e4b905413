"""Packed weights as they lie in files, for kernels that multiply them so: a code for each number, scales beside them.

O outputs, I inputs, G groups of inputs that share a scale.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from moesaic.hub.parts import Box, box_of, box_shape
from moesaic.hub.safetensors_header import TensorHeader
from moesaic.hub.values import Values
from moesaic.models.weight_map import Index, Piece, WeightMap
from moesaic.tensor_spec import TensorSpec

CodesFormat = Literal["fp8", "mxfp4", "uneven4"]
BITS: dict[CodesFormat, float] = {"fp8": 8.25, "mxfp4": 4.25, "uneven4": 4.5}
"""What a weight takes in memory, scales included (see kernels/blocks.py)."""


_SCALES: dict[CodesFormat, torch.dtype] = {"fp8": torch.float32, "mxfp4": torch.uint8, "uneven4": torch.int32}


class Coding(NamedTuple):
    """How a tensor of a file is packed: inputs that share a scale, and which of its dimensions counts inputs."""

    format: CodesFormat
    group: int
    inputs_dim: Literal[-1, -2] = -1


class Codes(NamedTuple):
    """values uint8 [..., O, I]: e4m3 (fp8), e2m1 from 0 to 15 (mxfp4), or those of uneven values. scales [..., O, G]:
    fp32; exponents (uint8): a value is times 2^(exponent - 127); or words of two scales (int32, see kernels/uneven.py).
    """

    values: Tensor
    scales: Tensor


@dataclass(frozen=True)
class CodedTensor:
    """One of our tensors that files hold in a format. read: all of it, or what one expert has of it."""

    format: CodesFormat
    read: Callable[[int | None], Codes]


class CodedTensors(Protocol):
    """A view of packed tensors that can show them as they are, too."""

    @property
    def tensors(self) -> Mapping[str, TensorHeader]: ...

    def coding(self, name: str) -> Coding | None:
        """How this tensor is packed; None where it is plain."""
        ...

    def codes(self, name: str, index: Index = ()) -> Tensor:
        """`tensor[index]`, a byte of code for each number."""
        ...

    def scales(self, name: str, index: Index = ()) -> Tensor:
        """`scales[index]`, shaped as the tensor is, its inputs counted in groups."""
        ...


class CodedValues:
    """Our tensors of a model by their codes, box by box."""

    def __init__(self, view: CodedTensors, weight_map: WeightMap) -> None:
        self._view, self._pieces = view, weight_map
        self._codes = Values(_Shown(view.tensors, view.codes), weight_map)
        self._scales = Values(_Shown(_scale_headers(view), view.scales), weight_map)

    def coding(self, spec: TensorSpec) -> Coding | None:
        """How all pieces of a tensor are packed; None where they are not, or not alike, or cut across groups."""
        pieces = [piece for piece in self._pieces[spec.name] if not piece.is_copy]
        codings = {self._view.coding(piece.name) for piece in pieces}
        coding = codings.pop() if len(codings) == 1 else None
        if coding is None or not all(self._has_whole_inputs(spec, piece, coding) for piece in pieces):
            return None
        return coding

    def read(self, spec: TensorSpec, coding: Coding, box: Box) -> Codes:
        """A box that has all inputs."""
        groups = -(-spec.shape[-1] // coding.group)
        values = torch.empty(box_shape(box), dtype=torch.uint8)
        self._codes.read_into(values, spec, box)
        grouped = spec._replace(shape=(*spec.shape[:-1], groups))
        box = (*box[:-1], (0, groups))
        scales = torch.empty(box_shape(box), dtype=_SCALES[coding.format])
        self._scales.read_into(scales, grouped, box)
        return Codes(values, scales)

    def _has_whole_inputs(self, spec: TensorSpec, piece: Piece, coding: Coding) -> bool:
        if piece.transposed != (coding.inputs_dim == -2) or box_of(spec.shape, piece.index)[-1] != (0, spec.shape[-1]):
            return False
        shape = self._view.tensors[piece.name].shape
        dim = len(shape) + coding.inputs_dim
        at = piece.file_index[dim] if dim < len(piece.file_index) else slice(None)
        return isinstance(at, slice) and at.indices(shape[dim]) == (0, shape[dim], 1)


class _Shown:
    """Tensors as one of a view's methods shows them."""

    def __init__(self, tensors: Mapping[str, TensorHeader], read: Callable[[str, Index], Tensor]) -> None:
        self.tensors, self._read = tensors, read

    def read(self, name: str, index: Index = ()) -> Tensor:
        return self._read(name, index)

    def read_into(self, out: Tensor, name: str, index: Index = ()) -> None:
        out.copy_(self._read(name, index))


def _scale_headers(view: CodedTensors) -> dict[str, TensorHeader]:
    found = {}
    for name, header in view.tensors.items():
        if (coding := view.coding(name)) is not None:
            shape = list(header.shape)
            shape[coding.inputs_dim] = -(-shape[coding.inputs_dim] // coding.group)
            found[name] = header._replace(shape=tuple(shape))
    return found
